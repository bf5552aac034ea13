//! The forms of values in policies.

use ipnet::IpNet;
use std::net::IpAddr;
use weft_api::istio::ParseError;
use weft_api::wire::StringMatch;
use weft_api::wire::string_match::Kind;

/// Where a value stands, for messages.
#[derive(Clone, Debug)]
pub(super) struct At(pub(super) String);

impl At {
    pub(super) fn field(&self, name: &str) -> Self {
        Self(format!("{}.{name}", self.0))
    }

    pub(super) fn item(&self, index: usize) -> Self {
        Self(format!("{}[{index}]", self.0))
    }

    pub(super) fn wrong<T>(&self, message: impl Into<String>) -> Result<T, ParseError> {
        Err(ParseError { path: self.0.clone(), message: message.into() })
    }
}

pub(super) fn matching(kind: Kind) -> StringMatch {
    StringMatch { kind: Some(kind) }
}

/// Reads a list of values, each by `read`. An empty value is a mistake wherever it stands.
pub(super) fn list<T>(
    values: &[String],
    at: &At,
    mut read: impl FnMut(&str, &At) -> Result<T, ParseError>,
) -> Result<Vec<T>, ParseError> {
    values
        .iter()
        .enumerate()
        .map(|(i, value)| {
            let at = at.item(i);
            if value.is_empty() { at.wrong("must not be empty") } else { read(value, &at) }
        })
        .collect()
}

/// `text`, `text*`, `*text`, or `*` for whatever is not empty. A star anywhere else is a star, as in Istio.
pub(super) fn stars(value: &str) -> StringMatch {
    matching(if value == "*" {
        Kind::Present(true)
    } else if let Some(suffix) = value.strip_prefix('*') {
        Kind::Suffix(suffix.into())
    } else if let Some(prefix) = value.strip_suffix('*') {
        Kind::Prefix(prefix.into())
    } else {
        Kind::Exact(value.into())
    })
}

/// Whether [`stars`] takes one of the stars for the character, which is hardly ever meant.
pub(super) fn has_literal_star(value: &str) -> bool {
    match stars(value).kind {
        Some(Kind::Suffix(text) | Kind::Prefix(text) | Kind::Exact(text)) => text.contains('*'),
        _ => false,
    }
}

/// A namespace, where `*` stands for any text wherever it stands.
pub(super) fn glob(value: &str) -> StringMatch {
    matching(if value == "*" {
        Kind::Present(true)
    } else if value.contains('*') {
        Kind::Glob(value.into())
    } else {
        Kind::Exact(value.into())
    })
}

/// A path: as [`stars`], or a template with `{*}` and `{**}`.
pub(super) fn path(value: &str, at: &At) -> Result<StringMatch, ParseError> {
    if !value.contains("{*}") && !value.contains("{**}") {
        return Ok(stars(value));
    }
    let segments = value.trim_matches('/').split('/');
    if !value.starts_with('/') {
        return at.wrong(format!("the template {value:?} must begin with /"));
    }
    let mut ended = false;
    for segment in segments {
        match segment {
            "{*}" | "{**}" if ended => return at.wrong(format!("{{**}} must be the last operator of {value:?}")),
            "{*}" => {}
            "{**}" => ended = true,
            other if other.contains(['{', '}', '*']) => {
                return at.wrong(format!("the segment {other:?} of a template is neither text nor {{*}} nor {{**}}"));
            }
            _ => {}
        }
    }
    Ok(matching(Kind::Template(value.into())))
}

/// An address or a block of addresses, as a CIDR.
pub(super) fn block(value: &str, at: &At) -> Result<String, ParseError> {
    let found = value.parse::<IpNet>().ok().or_else(|| value.parse::<IpAddr>().ok().map(IpNet::from));
    match found {
        Some(net) => Ok(net.trunc().to_string()),
        None => at.wrong(format!("{value:?} is no address or CIDR, for example 10.0.0.0/8")),
    }
}

/// A port. 0 is let pass, as by admission: it matches nothing.
pub(super) fn port(value: &str, at: &At) -> Result<u16, ParseError> {
    match value.parse::<u16>() {
        Ok(port) => Ok(port),
        Err(_) => at.wrong(format!("{value:?} is no port between 1 and 65535")),
    }
}

/// `account`, of the policy's namespace, or `namespace/account`.
pub(super) fn service_account(value: &str, namespace: &str, at: &At) -> Result<String, ParseError> {
    let (namespace, account) = value.split_once('/').unwrap_or((namespace, value));
    if namespace.is_empty() || account.is_empty() || account.contains('/') {
        return at.wrong(format!("{value:?} is neither account nor namespace/account"));
    }
    if value.contains('*') {
        return at.wrong(format!("{value:?}: * has no meaning in service accounts"));
    }
    Ok(format!("{namespace}/{account}"))
}
