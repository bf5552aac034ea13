//! Which way a request goes: Istio's VirtualService and the Gateway API's HTTPRoute, as the control plane compiled them
//! ([`weft_api::wire::HttpRoute`]).
//!
//! Compiled once per configuration ([`Routes::new`]); finding a request's route allocates nothing. Routes are tried in their order, the first
//! that matches counts; there is no second guess: what matches nothing is for the caller to answer (404). Regular expressions are those of RE2 (the `regex`
//! crate runs in linear time, as RE2 does) and match the whole text.
//!
//! What a route cannot be compiled for (a regular expression that is none) is refused as a whole configuration, so that a proxy
//! keeps its last good one; the control plane has refused it before.

mod cors;
mod fields;
mod redirect;
mod retry;
mod split;
mod text;

#[cfg(test)]
mod tests;

pub use cors::{Cors, Preflight};
pub use fields::Changes;
pub use redirect::Redirect;
pub use retry::{Answer, Conditions, Retries};
pub use split::{Split, Weighted};
pub use text::Text;

use regex::Regex;
use std::borrow::Cow;
use std::time::Duration;
use weft_api::wire;
use weft_api::wire::http_route::Action as WireAction;

/// What a route looks at.
pub trait Request {
    /// As it came.
    fn method(&self) -> &str;
    /// Without the query.
    fn path(&self) -> &str;
    /// Without the `?`.
    fn query(&self) -> Option<&str>;
    /// `Host` or `:authority`, as it came.
    fn authority(&self) -> &str;
    /// `http` or `https`.
    fn scheme(&self) -> &str;
    /// The first value of a header; its name is in lower case.
    fn header(&self, name: &str) -> Option<&str>;
}

/// A route that can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("route {route:?}: {field}: {reason}")]
pub struct Invalid {
    /// Name of the route.
    pub route: String,
    /// What is wrong.
    pub field: &'static str,
    /// Why.
    pub reason: String,
}

/// The routes of a destination, in order.
#[derive(Debug, Default)]
pub struct Routes {
    routes: Vec<Route>,
}

/// A compiled route.
#[derive(Debug)]
pub struct Route {
    /// As the user named it.
    pub name: String,
    /// Who wrote it: "namespace/name".
    pub source: String,
    matches: Vec<Match>,
    /// What happens.
    pub action: Action,
    rewrite: Option<Rewrite>,
    /// What takes the place of the authority.
    pub authority: Option<String>,
    /// Changes of the request's header.
    pub request: Changes,
    /// Changes of the response's header.
    pub response: Changes,
    /// For the whole request, tries included.
    pub timeout: Option<Duration>,
    /// None: only what certainly never reached the app is sent again.
    pub retries: Option<Retries>,
    /// Injected trouble.
    pub fault: Option<Fault>,
    /// Copies that go elsewhere.
    pub mirrors: Vec<Mirror>,
    /// Cross-origin requests.
    pub cors: Option<Cors>,
}

/// What happens to a request.
#[derive(Debug)]
pub enum Action {
    /// It goes to one of these.
    Split(Split),
    /// The client is sent elsewhere.
    Redirect(Redirect),
    /// It is answered here.
    Direct {
        /// Status.
        code: u16,
        /// Body.
        body: Vec<u8>,
    },
}

/// Injected trouble. Parts are millionths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    /// How many requests are delayed, and by how much.
    pub delay: Option<(u32, Duration)>,
    /// How many are answered here, and how: status, and gRPC status if that is meant.
    pub abort: Option<(u32, u16, Option<u16>)>,
}

/// A copy of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// Place of the backend.
    pub backend: usize,
    /// Millionths of the requests.
    pub ppm: u32,
}

#[derive(Debug, Default)]
struct Match {
    path: Path,
    method: Option<Text>,
    authority: Option<Text>,
    scheme: Option<Text>,
    headers: Vec<(String, Text)>,
    without: Vec<(String, Text)>,
    query: Vec<(String, Text)>,
}

#[derive(Debug, Default)]
enum Path {
    #[default]
    Any,
    Text(Text),
    /// Letter case doesn't matter: an exact text or a prefix, in lower case.
    NoCase(String, bool),
    /// A prefix of whole segments, without a slash at its end.
    Segments(String),
}

/// How a path is rewritten.
#[derive(Debug)]
enum Rewrite {
    Prefix(String),
    Full(String),
    Regex(Regex, String),
}

/// A route that was found for a request.
#[derive(Clone, Copy, Debug)]
pub struct Found<'a> {
    /// The route.
    pub route: &'a Route,
    /// Its place.
    pub index: usize,
    /// How many bytes of the path the match's prefix took (all of them for an exact match).
    prefix: usize,
}

impl Routes {
    /// Compiles.
    ///
    /// # Errors
    /// The first route that can't be used.
    pub fn new(routes: &[wire::HttpRoute]) -> Result<Self, Invalid> {
        Ok(Self { routes: routes.iter().map(Route::new).collect::<Result<_, _>>()? })
    }

    /// There is none: everything goes to the destination itself.
    pub fn is_empty(&self) -> bool {
        self.routes.is_empty()
    }

    /// All of them, in order.
    pub fn iter(&self) -> std::slice::Iter<'_, Route> {
        self.routes.iter()
    }

    /// The first route that matches.
    pub fn find(&self, request: &impl Request) -> Option<Found<'_>> {
        self.routes.iter().enumerate().find_map(|(index, route)| {
            let prefix = route.takes(request)?;
            Some(Found { route, index, prefix })
        })
    }
}

impl<'a> IntoIterator for &'a Routes {
    type Item = &'a Route;
    type IntoIter = std::slice::Iter<'a, Route>;
    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

fn millis(ms: u64) -> Option<Duration> {
    (ms > 0).then(|| Duration::from_millis(ms))
}

impl Route {
    fn new(wire: &wire::HttpRoute) -> Result<Self, Invalid> {
        let invalid = |field: &'static str, reason: String| Invalid { route: wire.name.clone(), field, reason };
        let matches = wire.matches.iter().map(|m| Match::new(m).map_err(|reason| invalid("matches", reason)));
        let action = match &wire.action {
            Some(WireAction::Split(split)) => Action::Split(Split::new(split).map_err(|reason| invalid("split", reason))?),
            Some(WireAction::Redirect(redirect)) => {
                Action::Redirect(Redirect::new(redirect).map_err(|reason| invalid("redirect", reason))?)
            }
            Some(WireAction::DirectResponse(direct)) => Action::Direct {
                code: status(direct.code).map_err(|reason| invalid("direct_response.code", reason))?,
                body: direct.body.clone(),
            },
            None => return Err(invalid("action", "there is none".into())),
        };
        let mut authority = None;
        let mut rewrite = None;
        if let Some(wanted) = &wire.rewrite {
            authority = (!wanted.authority.is_empty()).then(|| wanted.authority.clone());
            rewrite = if !wanted.regex.is_empty() {
                let regex = Regex::new(&wanted.regex).map_err(|e| invalid("rewrite.regex", e.to_string()))?;
                Some(Rewrite::Regex(regex, dollars(&wanted.substitution)))
            } else if !wanted.full_path.is_empty() {
                Some(Rewrite::Full(wanted.full_path.clone()))
            } else {
                wanted.has_prefix.then(|| Rewrite::Prefix(wanted.prefix.clone()))
            };
        }
        let changes =
            |field, wire: &Option<wire::HeaderChanges>| Changes::new(wire.as_ref()).map_err(|reason| invalid(field, reason));
        let fault = wire.fault.as_ref().map(|fault| {
            let grpc = fault.abort_grpc_status_plus_one.checked_sub(1).and_then(|code| u16::try_from(code).ok());
            let code = if grpc.is_some() { 200 } else { status(fault.abort_status).unwrap_or(503) };
            Fault {
                delay: (fault.delay_ppm > 0).then(|| (fault.delay_ppm, Duration::from_millis(fault.delay_ms))),
                abort: (fault.abort_ppm > 0).then_some((fault.abort_ppm, code, grpc)),
            }
        });
        let retries = wire.retries.as_ref().map(Retries::new).transpose().map_err(|reason| invalid("retries", reason))?;
        let cors = wire.cors.as_ref().map(Cors::new).transpose().map_err(|reason| invalid("cors", reason))?;
        Ok(Self {
            name: wire.name.clone(),
            source: wire.source.clone(),
            matches: matches.collect::<Result<_, _>>()?,
            action,
            rewrite,
            authority,
            request: changes("request_headers", &wire.request_headers)?,
            response: changes("response_headers", &wire.response_headers)?,
            timeout: millis(wire.timeout_ms),
            retries,
            fault,
            mirrors: wire.mirrors.iter().map(|m| Mirror { backend: m.backend as usize, ppm: m.ppm }).collect(),
            cors,
        })
    }

    fn takes(&self, request: &impl Request) -> Option<usize> {
        if self.matches.is_empty() {
            return Some(0);
        }
        self.matches.iter().find_map(|m| m.takes(request))
    }
}

fn status(code: u32) -> Result<u16, String> {
    u16::try_from(code).ok().filter(|code| (200..=599).contains(code)).ok_or_else(|| format!("{code} is no status (200 to 599)"))
}

/// A substitution in RE2's syntax (`\1`) in that of the `regex` crate (`${1}`).
fn dollars(substitution: &str) -> String {
    let mut out = String::with_capacity(substitution.len() + 4);
    let mut chars = substitution.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '$' => out.push_str("$$"),
            '\\' => match chars.peek() {
                Some(digit) if digit.is_ascii_digit() => {
                    out.push_str("${");
                    out.push(*digit);
                    out.push('}');
                    chars.next();
                }
                Some('\\') => {
                    out.push('\\');
                    chars.next();
                }
                _ => out.push('\\'),
            },
            c => out.push(c),
        }
    }
    out
}

impl Match {
    fn new(wire: &wire::HttpMatch) -> Result<Self, String> {
        let text = |wire: &Option<wire::TextMatch>| wire.as_ref().map(Text::new).transpose();
        let fields = |wire: &[wire::FieldMatch], lower: bool| {
            wire.iter()
                .map(|field| {
                    let name = if lower { field.name.to_ascii_lowercase() } else { field.name.clone() };
                    Ok((name, field.value.as_ref().map_or(Ok(Text::Present), Text::new)?))
                })
                .collect::<Result<Vec<_>, String>>()
        };
        let path = match (&wire.path, wire.path_segment_prefix.as_str()) {
            (None, "") => Path::Any,
            (None, prefix) => Path::Segments(prefix.trim_end_matches('/').to_owned()),
            (Some(path), _) => match (Text::new(path)?, wire.path_ignores_case) {
                (Text::Exact(text), true) => Path::NoCase(text.to_ascii_lowercase(), true),
                (Text::Prefix(text), true) => Path::NoCase(text.to_ascii_lowercase(), false),
                (text, _) => Path::Text(text),
            },
        };
        Ok(Self {
            path,
            method: text(&wire.method)?,
            authority: text(&wire.authority)?,
            scheme: text(&wire.scheme)?,
            headers: fields(&wire.headers, true)?,
            without: fields(&wire.without_headers, true)?,
            query: fields(&wire.query, false)?,
        })
    }

    /// How many bytes of the path the prefix takes, if all holds.
    fn takes(&self, request: &impl Request) -> Option<usize> {
        let path = request.path();
        let prefix = match &self.path {
            Path::Any => 0,
            Path::Text(text) => {
                if !text.takes(path) {
                    return None;
                }
                match text {
                    Text::Prefix(prefix) => prefix.len(),
                    Text::Exact(_) => path.len(),
                    Text::Regex(_) | Text::Present => 0,
                }
            }
            Path::NoCase(text, whole) => {
                let head = path.as_bytes().get(..text.len())?;
                if !head.eq_ignore_ascii_case(text.as_bytes()) || *whole && path.len() != text.len() {
                    return None;
                }
                text.len()
            }
            Path::Segments(prefix) => {
                let rest = path.strip_prefix(prefix.as_str())?;
                if !rest.is_empty() && !rest.starts_with('/') {
                    return None;
                }
                prefix.len()
            }
        };
        let holds = |text: &Option<Text>, value: &str| text.as_ref().is_none_or(|text| text.takes(value));
        let all = holds(&self.method, request.method())
            && holds(&self.authority, request.authority())
            && holds(&self.scheme, request.scheme())
            && self.headers.iter().all(|(name, text)| request.header(name).is_some_and(|value| text.takes(value)))
            && self.without.iter().all(|(name, text)| match (request.header(name), text) {
                (None, Text::Present) => true,
                // A field that is missing counts as an empty one.
                (value, text) => !text.takes(value.unwrap_or_default()),
            })
            && self.query.iter().all(|(name, text)| parameter(request.query(), name).is_some_and(|value| text.takes(&value)));
        all.then_some(prefix)
    }
}

/// The first query parameter of that name, decoded if it has to be.
pub(crate) fn parameter<'a>(query: Option<&'a str>, name: &str) -> Option<Cow<'a, str>> {
    query?.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decoded(key) == name).then(|| decoded(value))
    })
}

fn decoded(text: &str) -> Cow<'_, str> {
    if !text.contains(['%', '+']) {
        return Cow::Borrowed(text);
    }
    let hex = |c: u8| char::from(c).to_digit(16).map(|d| d as u8);
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let pair = bytes.get(at + 1).and_then(|c| hex(*c)).zip(bytes.get(at + 2).and_then(|c| hex(*c)));
        match (byte, pair) {
            (b'%', Some((high, low))) => {
                out.push(high << 4 | low);
                at += 3;
            }
            (b'+', _) => {
                out.push(b' ');
                at += 1;
            }
            _ => {
                out.push(byte);
                at += 1;
            }
        }
    }
    Cow::Owned(String::from_utf8_lossy(&out).into_owned())
}

impl Found<'_> {
    /// The path (without query) that the backend gets, if it is another.
    pub fn path(&self, path: &str) -> Option<String> {
        match self.route.rewrite.as_ref()? {
            Rewrite::Full(full) => Some(full.clone()),
            Rewrite::Regex(regex, substitution) => match regex.replace_all(path, substitution.as_str()) {
                Cow::Borrowed(_) => None,
                Cow::Owned(path) => Some(path),
            },
            Rewrite::Prefix(prefix) => Some(self.with_prefix(path, prefix)),
        }
    }

    /// The path with something else in the place of the matched prefix; never with two slashes where they meet, and never empty.
    fn with_prefix(&self, path: &str, prefix: &str) -> String {
        let rest = path.get(self.prefix..).unwrap_or_default();
        let mut new = String::with_capacity(prefix.len() + rest.len() + 1);
        new.push_str(prefix);
        if new.ends_with('/') && rest.starts_with('/') {
            new.pop();
        }
        new.push_str(rest);
        if !new.starts_with('/') {
            new.insert(0, '/');
        }
        new
    }
}
