//! What single values may be. An `Err` says what is wrong with the value and what is allowed; the value itself is named by the caller.

use super::walk::{nearest, quoted};
use std::net::IpAddr;

/// What the values of a field are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sort {
    /// Anything but an empty string: principals, namespaces, hosts.
    Text,
    /// An IP address or a CIDR range.
    Ip,
    /// A port number.
    Port,
    /// An HTTP method.
    Method,
    /// A path or a path template.
    Path,
    /// `account` or `namespace/account`.
    ServiceAccount,
    /// A trust domain with at most one star, at an end.
    TrustDomain,
    /// As [`Sort::TrustDomain`], but a slash is let pass, as in conditions.
    Wildcard,
}

impl Sort {
    /// How many values a list may have.
    pub(super) fn most(self) -> Option<usize> {
        (self == Self::ServiceAccount).then_some(16)
    }

    /// Whether a value is of this sort.
    pub(super) fn check(self, value: &str) -> Result<(), String> {
        if value.is_empty() {
            return Err("an empty string is not allowed, it would match nothing".into());
        }
        match self {
            Self::Text => Ok(()),
            Self::Ip => ip(value),
            Self::Port => port(value),
            Self::Method => method(value),
            Self::Path => path(value),
            Self::ServiceAccount => service_account(value),
            Self::TrustDomain if value.contains('/') => {
                Err(format!("{} is not a trust domain: it contains \"/\"", quoted(value)))
            }
            Self::TrustDomain | Self::Wildcard => wildcard(value),
        }
    }
}

/// An address, or a range whose host bits are of no interest.
fn ip(value: &str) -> Result<(), String> {
    let Some((address, bits)) = value.split_once('/') else {
        return value.parse::<IpAddr>().map(|_| ()).map_err(|_| {
            format!("{} is not an IP address or CIDR range, such as 10.1.2.3, 10.0.0.0/8 or 2001:db8::/32", quoted(value))
        });
    };
    let most = match address.parse::<IpAddr>() {
        Ok(IpAddr::V4(_)) => 32,
        Ok(IpAddr::V6(_)) => 128,
        Err(_) => return Err(format!("{} is not a CIDR range: {} is not an IP address", quoted(value), quoted(address))),
    };
    let digits = !bits.is_empty() && bits.len() <= 3 && bits.bytes().all(|b| b.is_ascii_digit());
    let plain = bits == "0" || !bits.starts_with('0');
    if digits && plain && bits.parse::<u32>().is_ok_and(|n| n <= most) {
        return Ok(());
    }
    Err(format!("{} is not a CIDR range: after the \"/\" comes a number from 0 to {most}", quoted(value)))
}

fn port(value: &str) -> Result<(), String> {
    let digits = value.bytes().all(|b| b.is_ascii_digit());
    if digits && value.trim_start_matches('0').len() <= 5 && value.parse::<u64>().is_ok_and(|n| (1..=65535).contains(&n)) {
        return Ok(());
    }
    Err(format!(
        "{} is not a port: a number from 1 to 65535 in quotes, such as \"8080\"; names and ranges are not allowed",
        quoted(value)
    ))
}

/// Methods that programs send, as RFC 9110 and RFC 5789 register them.
const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];

/// Whether `byte` may be in a token of HTTP (RFC 9110, 5.6.2).
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// A method is any token (a star at an end is a wildcard). One that differs only in case from a method that programs send is
/// refused: methods are compared with their case, and no program sends `get`.
fn method(value: &str) -> Result<(), String> {
    if !value.bytes().all(is_token) {
        return Err(format!("{} is not a method: it has characters that no method has", quoted(value)));
    }
    let upper = value.to_ascii_uppercase();
    if upper != value && METHODS.contains(&upper.as_str()) {
        return Err(format!("{} is not a method: methods are upper case, did you mean \"{upper}\"?", quoted(value)));
    }
    Ok(())
}

/// A name of a header.
pub(super) fn header_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(is_token)
}

const ONE: &str = "{*}";
const ANY: &str = "{**}";

/// Whether a path is a template; otherwise it is compared as a string, with a star at an end as wildcard.
pub(super) fn is_template(path: &str) -> bool {
    path.contains(ONE) || path.contains(ANY)
}

/// Characters of a segment in a template: RFC 3986's `pchar`, but for the star.
fn is_literal(segment: &str) -> bool {
    !segment.is_empty() && segment.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~%!$&'()+,;:@=".contains(&b))
}

fn path(value: &str) -> Result<(), String> {
    let template = is_template(value);
    if template && !value.starts_with('/') {
        return Err(format!("{} is not a path template: it must begin with \"/\"", quoted(value)));
    }
    let mut ended = false;
    for segment in value.trim_matches('/').split('/') {
        if segment == ONE || segment == ANY {
            if ended {
                return Err(format!("{} is not a path template: {{**}} must be the last operator", quoted(value)));
            }
            ended = segment == ANY;
            continue;
        }
        if segment.contains(['{', '}']) {
            return Err(format!(
                "{} is not a path: braces are allowed only as {{*}} (one segment) and {{**}} (any number, last), each a whole segment",
                quoted(value)
            ));
        }
        if template && !is_literal(segment) {
            let why = if segment.is_empty() {
                "it has an empty segment".to_owned()
            } else if segment.contains('*') {
                "\"*\" can't be mixed with {*} and {**}".to_owned()
            } else {
                format!("the segment {} has characters that no path has", quoted(segment))
            };
            return Err(format!("{} is not a path template: {why}", quoted(value)));
        }
    }
    Ok(())
}

fn service_account(value: &str) -> Result<(), String> {
    let wrong = |why: &str| Err(format!("{} is not a service account: {why}", quoted(value)));
    if value.contains('*') {
        return wrong("wildcards are not allowed here (use principals)");
    }
    if value.len() > 320 {
        return wrong("it is longer than 320 characters");
    }
    match value.split_once('/') {
        None => Ok(()),
        Some(("", _)) => wrong("the namespace before \"/\" is empty"),
        Some((_, "")) => wrong("the name after \"/\" is empty"),
        Some((_, name)) if name.contains('/') => wrong("\"account\" or \"namespace/account\" is expected"),
        Some(_) => Ok(()),
    }
}

fn wildcard(value: &str) -> Result<(), String> {
    let stars = value.matches('*').count();
    if stars > 1 {
        return Err(format!("{}: only one \"*\" is allowed", quoted(value)));
    }
    if stars == 1 && !value.starts_with('*') && !value.ends_with('*') {
        return Err(format!("{}: \"*\" is allowed only as first or last character", quoted(value)));
    }
    Ok(())
}

/// Attributes of conditions that take no key in brackets.
const PLAIN_KEYS: [(&str, Sort); 12] = [
    ("source.ip", Sort::Ip),
    ("remote.ip", Sort::Ip),
    ("source.namespace", Sort::Text),
    ("source.serviceAccount", Sort::ServiceAccount),
    ("source.principal", Sort::Text),
    ("source.trustDomain", Sort::Wildcard),
    ("request.auth.principal", Sort::Text),
    ("request.auth.audiences", Sort::Text),
    ("request.auth.presenter", Sort::Text),
    ("destination.ip", Sort::Ip),
    ("destination.port", Sort::Port),
    ("connection.sni", Sort::Text),
];

/// What the values of a condition's attribute are.
pub(super) fn attribute(key: &str) -> Result<Sort, String> {
    if let Some((_, sort)) = PLAIN_KEYS.iter().find(|(k, _)| *k == key) {
        return Ok(*sort);
    }
    let (name, rest) = key.find('[').map_or((key, ""), |at| key.split_at(at));
    match name {
        "request.headers" => match rest.strip_prefix('[').and_then(|r| r.strip_suffix(']')) {
            // `:authority` and its like are names here.
            Some(header) if header_name(header.strip_prefix(':').unwrap_or(header)) => return Ok(Sort::Text),
            Some(header) if !header.is_empty() => return Err(format!("{} is not a header's name", quoted(header))),
            _ => return Err(format!("{} must have the form request.headers[name]", quoted(key))),
        },
        "request.auth.claims" => {
            if claims(rest) {
                return Ok(Sort::Text);
            }
            return Err(format!("{} must have the form request.auth.claims[name] or request.auth.claims[a][b]", quoted(key)));
        }
        "destination.namespace" => return Err(format!("{} is the policy's own namespace: leave the condition out", quoted(key))),
        "destination.labels" => return Err(format!("{} is what spec.selector is for", quoted(key))),
        "destination.name" | "destination.user" => {
            return Err(format!("{} was part of v1alpha1 only: use spec.selector", quoted(key)));
        }
        _ => {}
    }
    if name.starts_with("experimental.envoy.filters.") {
        return Err(format!("{} is not supported by Weft, which has no Envoy filters whose metadata it could read", quoted(key)));
    }
    let mut known: Vec<&str> = PLAIN_KEYS.iter().map(|(k, _)| *k).collect();
    known.extend(["request.headers", "request.auth.claims"]);
    let hint = match nearest(name, &known) {
        Some(near) => format!("did you mean {near}?"),
        None => format!("known are {}", known.join(", ")),
    };
    Err(format!("{} is not an attribute of a request; {hint}", quoted(key)))
}

/// `[a]`, `[a][b]` …
fn claims(brackets: &str) -> bool {
    let Some(inner) = brackets.strip_prefix('[').and_then(|r| r.strip_suffix(']')) else { return false };
    inner.split("][").all(|name| !name.is_empty() && !name.contains(['[', ']']))
}
