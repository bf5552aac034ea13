//! What an intermediary does to a message head (RFC 9110, section 7.6; RFC 9112, section 3.2; RFC 9113, section 8):
//! refuses what it may not forward, removes what is meant for the next hop only, keeps the target and `Host` in agreement.
//!
//! Pure, and in place: a head without hop-by-hop fields (the common one) is walked once and not changed. Where a
//! field has to go, the others keep their order.

use crate::conn::Direction;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts as RequestHead;
use http::uri::{Authority, PathAndQuery, Scheme, Uri};
use http::{Method, StatusCode, Version};
use std::net::SocketAddr;

/// What the two ends of a hop speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Wire {
    /// HTTP/1.0 and HTTP/1.1.
    H1,
    /// HTTP/2.
    H2,
}

/// How many header fields a message may have.
pub(crate) const MAX_FIELDS: usize = 200;

/// Why a request is not forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// HTTP/1.1 without `Host`, HTTP/2 without an authority.
    NoHost,
    /// More than one `Host`.
    ManyHosts,
    /// `Host` or the authority is no host and port.
    BadHost,
    /// HTTP/2 with `:authority` and `host` that differ.
    HostMismatch,
    /// A request target whose form does not fit the method.
    BadTarget,
    /// A transfer coding other than `chunked`.
    TransferEncoding,
    /// More than [`MAX_FIELDS`].
    TooManyFields,
}

impl Refusal {
    /// The response that says so.
    pub(crate) fn status(self) -> StatusCode {
        match self {
            Self::TooManyFields => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            _ => StatusCode::BAD_REQUEST,
        }
    }

    /// In words, for the body of that response.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::NoHost => "the request names no host",
            Self::ManyHosts => "the request has more than one Host",
            Self::BadHost => "the request's host is not valid",
            Self::HostMismatch => "the request's :authority and host differ",
            Self::BadTarget => "the form of the request target does not fit the method",
            Self::TransferEncoding => "the request's transfer coding is not chunked",
            Self::TooManyFields => "the request has too many header fields",
        }
    }
}

/// What a request asks for beyond an ordinary response.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wishes {
    /// `Upgrade` to something else than HTTP/2 in the clear, properly nominated.
    pub(crate) upgrade: bool,
    /// An `Upgrade` field was there, nominated or not: what follows the request on the connection is not for certain HTTP.
    pub(crate) opaque_after: bool,
    /// `Expect: 100-continue`.
    pub(crate) expect_continue: bool,
    /// `content-type: application/grpc…`.
    pub(crate) grpc: bool,
}

/// Whether the value of an `Upgrade` field offers nothing but HTTP/2 in the clear, which is declined by ignoring it (RFC 9113,
/// section 3.1: obsolete).
pub(crate) fn is_h2c(value: &[u8]) -> bool {
    value.trim_ascii().eq_ignore_ascii_case(b"h2c")
}

/// What one walk over a head finds.
#[derive(Default)]
struct Found {
    /// Something has to be removed or rewritten.
    hop_by_hop: bool,
    hosts: usize,
    te_trailers: bool,
    upgrade: bool,
    transfer_encoding: usize,
    wishes: Wishes,
}

fn walk(headers: &HeaderMap) -> Found {
    let mut found = Found::default();
    for (name, value) in headers {
        match *name {
            header::HOST => found.hosts += 1,
            header::CONNECTION => found.hop_by_hop = true,
            header::TE => {
                found.hop_by_hop = true;
                found.te_trailers |= tokens(value).any(|token| token.eq_ignore_ascii_case(b"trailers"));
            }
            header::UPGRADE => {
                found.hop_by_hop = true;
                found.upgrade |= !is_h2c(value.as_bytes());
            }
            header::TRANSFER_ENCODING => found.transfer_encoding += 1,
            header::EXPECT => {
                found.wishes.expect_continue = value.as_bytes().eq_ignore_ascii_case(b"100-continue");
            }
            header::CONTENT_TYPE => found.wishes.grpc = is_grpc(value),
            _ => {
                // Not constants of the library; lengths differ from nearly everything, so this is cheap.
                found.hop_by_hop |= matches!(name.as_str(), "keep-alive" | "proxy-connection" | "http2-settings");
            }
        }
    }
    found
}

fn is_grpc(value: &HeaderValue) -> bool {
    let value = value.as_bytes();
    let prefix = b"application/grpc";
    value.len() >= prefix.len()
        && value[..prefix.len()].eq_ignore_ascii_case(prefix)
        && matches!(value.get(prefix.len()), None | Some(b'+' | b';' | b' '))
}

fn tokens(value: &HeaderValue) -> impl Iterator<Item = &[u8]> {
    value.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii).filter(|token| !token.is_empty())
}

/// Checks a request that came by `from` and makes it ready to leave by `to`. `original` is where the client connected to:
/// the `Host` of an HTTP/1.0 request that has none.
pub(crate) fn prepare_request(
    head: &mut RequestHead,
    from: Wire,
    to: Wire,
    direction: Direction,
    original: SocketAddr,
) -> Result<Wishes, Refusal> {
    if head.headers.len() > MAX_FIELDS {
        return Err(Refusal::TooManyFields);
    }
    let found = walk(&head.headers);
    let mut wishes = found.wishes;
    match from {
        Wire::H1 => {
            if found.transfer_encoding > 1
                || found.transfer_encoding == 1
                    && !head.headers[header::TRANSFER_ENCODING].as_bytes().eq_ignore_ascii_case(b"chunked")
            {
                return Err(Refusal::TransferEncoding);
            }
            target_h1(head, found.hosts, direction, original)?;
            wishes.opaque_after = found.upgrade;
            wishes.upgrade = found.upgrade
                && head.version == Version::HTTP_11
                && head.headers.get_all(header::CONNECTION).iter().flat_map(tokens).any(|t| t.eq_ignore_ascii_case(b"upgrade"));
        }
        Wire::H2 => target_h2(head, found.hosts)?,
    }
    if found.hop_by_hop {
        let keep = KeptFields { upgrade: wishes.upgrade && to == Wire::H1, te_trailers: found.te_trailers };
        remove_hop_by_hop(&mut head.headers, keep, to);
    }
    match (from, to) {
        (Wire::H1, Wire::H2) => to_h2(head)?,
        (Wire::H2, Wire::H1) => to_h1(head),
        (Wire::H1, Wire::H1) => head.version = Version::HTTP_11,
        (Wire::H2, Wire::H2) => {}
    }
    Ok(wishes)
}

/// RFC 9112, section 3.2: the four forms of a request target, and what `Host` must be.
fn target_h1(head: &mut RequestHead, hosts: usize, direction: Direction, original: SocketAddr) -> Result<(), Refusal> {
    if hosts > 1 {
        return Err(Refusal::ManyHosts);
    }
    let host = head.headers.get(header::HOST);
    match host {
        Some(host) if !valid_host(host.as_bytes()) => return Err(Refusal::BadHost),
        None if head.version == Version::HTTP_11 => return Err(Refusal::NoHost),
        _ => {}
    }
    let connect = head.method == Method::CONNECT;
    match (head.uri.scheme(), head.uri.authority()) {
        (None, None) => {
            let path = head.uri.path();
            if connect || !path.starts_with('/') && (path != "*" || head.method != Method::OPTIONS) {
                return Err(Refusal::BadTarget);
            }
            if host.is_none() {
                head.headers.insert(header::HOST, host_of(original));
            }
        }
        (None, Some(authority)) => {
            if !connect || authority.port().is_none() || !valid_host(authority.as_str().as_bytes()) {
                return Err(Refusal::BadTarget);
            }
            set_host(&mut head.headers, authority)?;
        }
        (Some(_), Some(authority)) => {
            if connect || !valid_host(authority.as_str().as_bytes()) {
                return Err(Refusal::BadTarget);
            }
            set_host(&mut head.headers, authority)?;
            if direction == Direction::Inbound {
                // The next hop is the origin, which is asked in origin form; an outbound request may be on its way to
                // a forward proxy that the app knows of, so there the form stays.
                head.uri = origin_form(&head.uri);
            }
        }
        (Some(_), None) => return Err(Refusal::BadTarget),
    }
    Ok(())
}

/// RFC 9113, section 8.3.1.
fn target_h2(head: &mut RequestHead, hosts: usize) -> Result<(), Refusal> {
    if hosts > 1 {
        return Err(Refusal::ManyHosts);
    }
    match (head.uri.authority(), head.headers.get(header::HOST)) {
        (None, None) => return Err(Refusal::NoHost),
        (Some(authority), host) => {
            if !valid_host(authority.as_str().as_bytes()) {
                return Err(Refusal::BadHost);
            }
            if host.is_some_and(|host| !host.as_bytes().eq_ignore_ascii_case(authority.as_str().as_bytes())) {
                return Err(Refusal::HostMismatch);
            }
        }
        (None, Some(host)) => {
            if host.is_empty() || !valid_host(host.as_bytes()) {
                return Err(Refusal::BadHost);
            }
        }
    }
    Ok(())
}

/// `uri-host [":" port]` by its characters (RFC 3986, section 3.2.2). Empty is valid: a target without an authority.
fn valid_host(host: &[u8]) -> bool {
    host.iter().all(|byte| {
        byte.is_ascii_alphanumeric()
            || matches!(
                byte,
                b'-' | b'.'
                    | b'_'
                    | b'~'
                    | b':'
                    | b'['
                    | b']'
                    | b'%'
                    | b'!'
                    | b'$'
                    | b'&'
                    | b'\''
                    | b'('
                    | b')'
                    | b'*'
                    | b'+'
                    | b';'
                    | b'='
            )
    })
}

/// RFC 9112, section 3.2.2: what the target says wins over what `Host` says.
fn set_host(headers: &mut HeaderMap, authority: &Authority) -> Result<(), Refusal> {
    if headers.get(header::HOST).is_some_and(|host| host.as_bytes() == authority.as_str().as_bytes()) {
        return Ok(());
    }
    let value = HeaderValue::from_str(authority.as_str()).map_err(|_| Refusal::BadHost)?;
    headers.insert(header::HOST, value);
    Ok(())
}

fn host_of(address: SocketAddr) -> HeaderValue {
    // Digits, dots, colons and brackets: always a valid value.
    HeaderValue::from_str(&address.to_string()).unwrap_or_else(|_| HeaderValue::from_static(""))
}

fn origin_form(uri: &Uri) -> Uri {
    match uri.path_and_query() {
        Some(path) => Uri::from(path.clone()),
        None => Uri::from(PathAndQuery::from_static("/")),
    }
}

#[derive(Clone, Copy)]
struct KeptFields {
    upgrade: bool,
    te_trailers: bool,
}

/// Removes `Connection`, what it nominates, and the fields that are hop-by-hop by nature. What the next hop has to
/// know is said anew, in the place where it was said before.
fn remove_hop_by_hop(headers: &mut HeaderMap, keep: KeptFields, to: Wire) {
    let nominated: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .flat_map(tokens)
        .filter_map(|token| HeaderName::from_bytes(token).ok())
        .filter(may_be_nominated)
        .collect();
    let mut connection = match (to, keep.upgrade, keep.te_trailers) {
        (Wire::H1, true, true) => Some(HeaderValue::from_static("TE, upgrade")),
        (Wire::H1, true, false) => Some(HeaderValue::from_static("upgrade")),
        (Wire::H1, false, true) => Some(HeaderValue::from_static("TE")),
        _ => None,
    };
    let mut te = keep.te_trailers.then(|| HeaderValue::from_static("trailers"));
    // Rebuilt rather than removed from: removal from the library's map moves its last field to the front.
    let fields = headers.len();
    let old = std::mem::replace(headers, HeaderMap::with_capacity(fields));
    let mut current = None;
    for (name, value) in old {
        if name.is_some() {
            current = name;
        }
        let Some(name) = &current else { continue };
        let value = match *name {
            header::CONNECTION => connection.take(),
            header::TE => te.take(),
            header::UPGRADE => keep.upgrade.then_some(value).filter(|value| !is_h2c(value.as_bytes())),
            header::TRANSFER_ENCODING if to == Wire::H2 => None,
            _ if matches!(name.as_str(), "keep-alive" | "proxy-connection" | "http2-settings") => None,
            _ => (!nominated.contains(name)).then_some(value),
        };
        if let Some(value) = value {
            headers.append(name.clone(), value);
        }
    }
    if let Some(connection) = connection {
        headers.append(header::CONNECTION, connection);
    }
}

/// Fields that a `Connection` cannot take from a message: framing and routing are not the sender's to withdraw, and the ones
/// treated by name are not either.
fn may_be_nominated(name: &HeaderName) -> bool {
    !matches!(
        *name,
        header::HOST
            | header::CONTENT_LENGTH
            | header::TRANSFER_ENCODING
            | header::TRAILER
            | header::CONNECTION
            | header::TE
            | header::UPGRADE
    ) && !matches!(name.as_str(), "close" | "keep-alive")
}

/// An HTTP/1 request becomes an HTTP/2 one (RFC 9113, section 8.3.1).
fn to_h2(head: &mut RequestHead) -> Result<(), Refusal> {
    let authority = match head.headers.remove(header::HOST) {
        Some(host) if !host.is_empty() => {
            Some(Authority::from_maybe_shared(bytes::Bytes::copy_from_slice(host.as_bytes())).map_err(|_| Refusal::BadHost)?)
        }
        _ => head.uri.authority().cloned(),
    };
    head.headers.remove(header::TRANSFER_ENCODING);
    let mut parts = http::uri::Parts::default();
    parts.authority = authority;
    if head.method != Method::CONNECT {
        parts.scheme = Some(head.uri.scheme().cloned().unwrap_or(Scheme::HTTP));
        parts.path_and_query = Some(head.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/")));
        if parts.authority.is_none() {
            return Err(Refusal::NoHost);
        }
    }
    head.uri = Uri::from_parts(parts).map_err(|_| Refusal::BadTarget)?;
    head.version = Version::HTTP_2;
    Ok(())
}

/// An HTTP/2 request becomes an HTTP/1.1 one (RFC 9113, sections 8.3.1 and 8.2.3).
fn to_h1(head: &mut RequestHead) {
    if let Some(authority) = head.uri.authority()
        && !head.headers.contains_key(header::HOST)
        && let Ok(host) = HeaderValue::from_str(authority.as_str())
    {
        head.headers.insert(header::HOST, host);
    }
    if head.method != Method::CONNECT {
        head.uri = origin_form(&head.uri);
    }
    if head.headers.get_all(header::COOKIE).iter().nth(1).is_some() {
        let crumbs: Vec<&[u8]> = head.headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
        if let Ok(cookie) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..])) {
            head.headers.insert(header::COOKIE, cookie);
        }
    }
    head.version = Version::HTTP_11;
}

/// Why a response of the destination is not passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Malformed {
    /// `Transfer-Encoding` next to `Content-Length`: the length of the body is anyone's guess.
    Framing,
    /// A transfer coding that this proxy does not know.
    TransferEncoding,
    /// An answer to an upgrade or CONNECT that was not asked for.
    Upgrade,
}

impl Malformed {
    /// In words, for the body of the 502.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Framing => "the response has both Content-Length and Transfer-Encoding",
            Self::TransferEncoding => "the response has an unknown transfer coding",
            Self::Upgrade => "the response switches to a protocol that was not asked for",
        }
    }
}

/// Checks a response that came by `from` and makes it ready for a client that speaks `to`, `client` being the version in
/// which it asked.
pub(crate) fn prepare_response(head: &mut http::response::Parts, from: Wire, to: Wire, client: Version) -> Result<(), Malformed> {
    let found = walk(&head.headers);
    let upgrade = head.status == StatusCode::SWITCHING_PROTOCOLS || head.status == StatusCode::UPGRADE_REQUIRED;
    if found.transfer_encoding > 0 {
        if from == Wire::H1 && head.headers.contains_key(header::CONTENT_LENGTH) {
            return Err(Malformed::Framing);
        }
        let value = &head.headers[header::TRANSFER_ENCODING];
        let identity = value.as_bytes().eq_ignore_ascii_case(b"identity");
        if found.transfer_encoding > 1 || !identity && !value.as_bytes().eq_ignore_ascii_case(b"chunked") {
            return Err(Malformed::TransferEncoding);
        }
        if to == Wire::H2 || client == Version::HTTP_10 || identity {
            head.headers.remove(header::TRANSFER_ENCODING);
        }
    }
    if found.hop_by_hop {
        remove_hop_by_hop(&mut head.headers, KeptFields { upgrade: upgrade && found.upgrade, te_trailers: false }, to);
    }
    head.version = match to {
        Wire::H1 => Version::HTTP_11,
        Wire::H2 => Version::HTTP_2,
    };
    Ok(())
}

#[cfg(test)]
mod tests;
