//! One test of a rule: an attribute of the request against a list of values. Rules, of whatever part, are made of nothing else,
//! so that there is one piece of code which decides, one which indexes and one which explains.

use super::request::Request;
use super::text::{Fold, TextMatch};
use ipnet::IpNet;
use std::net::IpAddr;

/// What is looked at.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Attribute {
    Principal,
    Namespace,
    /// "namespace/sa/name".
    ServiceAccount,
    TrustDomain,
    RequestPrincipal,
    SourceIp,
    RemoteIp,
    DestinationIp,
    Port,
    Sni,
    Host,
    Method,
    Path,
    /// In lower case.
    Header(Box<str>),
    Audiences,
    Presenter,
    Claim(Box<[Box<str>]>),
}

impl Attribute {
    /// Whether only HTTP requests have it.
    pub(crate) fn is_http(&self) -> bool {
        matches!(
            self,
            Self::RequestPrincipal
                | Self::Host
                | Self::Method
                | Self::Path
                | Self::Header(_)
                | Self::Audiences
                | Self::Presenter
                | Self::Claim(_)
        )
    }

    /// How its texts are compared.
    pub(crate) fn fold(&self) -> Fold {
        if *self == Self::Host { Fold::Lower } else { Fold::Exactly }
    }
}

/// What the attribute is compared with.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Values {
    Texts(Box<[TextMatch]>),
    Nets(Box<[IpNet]>),
    Ports(Box<[u16]>),
}

/// A test that holds if any value matches; a negated one if none does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Field {
    pub(crate) attribute: Attribute,
    pub(crate) negated: bool,
    pub(crate) values: Values,
    /// As users know it: "source.principals", "operation.notPaths", "when request.headers[x-a]".
    pub(crate) name: Box<str>,
}

impl Field {
    pub(crate) fn holds(&self, request: &Request<'_>) -> bool {
        self.is_met(request) != self.negated
    }

    /// Whether any value matches. What the request does not have matches nothing.
    fn is_met(&self, request: &Request<'_>) -> bool {
        match &self.values {
            Values::Ports(ports) => ports.contains(&request.destination.port()),
            Values::Nets(nets) => address(&self.attribute, request).is_some_and(|ip| nets.iter().any(|net| net.contains(&ip))),
            Values::Texts(patterns) => {
                let fold = self.attribute.fold();
                match &self.attribute {
                    Attribute::Header(name) => {
                        let mut met = false;
                        header(name, request, &mut |value| {
                            // A field that is there is present, were it empty: as Envoy sees it.
                            met |= patterns.iter().any(|pattern| *pattern == TextMatch::Present || pattern.matches(value, fold));
                        });
                        met
                    }
                    Attribute::Audiences => {
                        token(request).is_some_and(|token| token.audiences().any(|value| any(patterns, value.as_bytes(), fold)))
                    }
                    Attribute::Claim(path) => token(request).is_some_and(|token| {
                        let mut met = false;
                        token.each_text(path, &mut |value| met |= any(patterns, value.as_bytes(), fold));
                        met
                    }),
                    plain => text(plain, request).is_some_and(|value| any(patterns, value, fold)),
                }
            }
        }
    }

    /// The values as people write them.
    pub(crate) fn expected(&self) -> Vec<String> {
        match &self.values {
            Values::Texts(patterns) if self.attribute == Attribute::ServiceAccount => {
                patterns.iter().map(|pattern| pattern.words().replacen("/sa/", "/", 1)).collect()
            }
            Values::Texts(patterns) => patterns.iter().map(TextMatch::words).collect(),
            Values::Nets(nets) => nets.iter().map(ToString::to_string).collect(),
            Values::Ports(ports) => ports.iter().map(ToString::to_string).collect(),
        }
    }

    /// What the request has there, in words; `None`: nothing.
    pub(crate) fn actual(&self, request: &Request<'_>) -> Option<String> {
        let words = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match &self.attribute {
            Attribute::Port => Some(request.destination.port().to_string()),
            Attribute::SourceIp | Attribute::RemoteIp | Attribute::DestinationIp => {
                address(&self.attribute, request).map(|ip| ip.to_string())
            }
            Attribute::Header(name) => {
                let mut all = Vec::new();
                header(name, request, &mut |value| all.push(words(value)));
                (!all.is_empty()).then(|| all.join(", "))
            }
            Attribute::Audiences => token(request).map(|token| token.audiences().collect::<Vec<_>>().join(", ")),
            Attribute::Claim(path) => token(request).and_then(|token| {
                let mut all = Vec::new();
                token.each_text(path, &mut |value| all.push(value.to_owned()));
                (!all.is_empty()).then(|| all.join(", "))
            }),
            Attribute::ServiceAccount => text(&self.attribute, request).map(|value| words(value).replacen("/sa/", "/", 1)),
            plain => text(plain, request).map(words),
        }
    }
}

fn any(patterns: &[TextMatch], value: &[u8], fold: Fold) -> bool {
    patterns.iter().any(|pattern| pattern.matches(value, fold))
}

fn token<'a>(request: &Request<'a>) -> Option<&'a crate::jwt::Claims> {
    request.http.as_ref().and_then(|http| http.token)
}

/// The address that an attribute means.
pub(crate) fn address(attribute: &Attribute, request: &Request<'_>) -> Option<IpAddr> {
    let ip = match attribute {
        Attribute::SourceIp => request.source_ip,
        Attribute::RemoteIp => request.remote_ip,
        Attribute::DestinationIp => request.destination.ip(),
        _ => return None,
    };
    // A dual-stack socket's view of IPv4 must not escape the IPv4 blocks.
    Some(ip.to_canonical())
}

/// The text of an attribute that has at most one.
#[inline]
pub(crate) fn text<'a>(attribute: &Attribute, request: &Request<'a>) -> Option<&'a [u8]> {
    let http = request.http.as_ref();
    let text = match attribute {
        Attribute::Principal => request.source.as_ref()?.principal.as_bytes(),
        Attribute::Namespace => request.source.as_ref()?.namespace?.as_bytes(),
        Attribute::ServiceAccount => match request.source.as_ref()?.account() {
            "" => return None,
            account => account.as_bytes(),
        },
        Attribute::TrustDomain => request.source.as_ref()?.trust_domain.as_bytes(),
        Attribute::Sni => request.sni?.as_bytes(),
        Attribute::Host => http?.host,
        Attribute::Method => http?.method.as_bytes(),
        Attribute::Path => http?.path.as_bytes(),
        Attribute::RequestPrincipal => http?.token?.principal()?.as_bytes(),
        Attribute::Presenter => http?.token?.presenter()?.as_bytes(),
        _ => return None,
    };
    Some(text)
}

/// Shows each value of a header by itself, so that nobody hides one behind another by sending the field twice. What HTTP/2 and Envoy call
/// pseudo-headers are found too.
pub(crate) fn header(name: &str, request: &Request<'_>, each: &mut dyn FnMut(&[u8])) {
    let Some(http) = request.http.as_ref() else { return };
    match (name, http.query) {
        (":authority" | "host", _) => each(http.host),
        (":method", _) => each(http.method.as_bytes()),
        (":path", None) => each(http.path.as_bytes()),
        (":path", Some(query)) => each(&[http.path.as_bytes(), b"?", query.as_bytes()].concat()),
        (name, _) => http.headers.each(name, each),
    }
}
