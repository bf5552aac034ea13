//! Where a client is sent instead.

use super::{Found, Request};
use weft_api::wire;

/// A compiled redirect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redirect {
    /// 301, 302, 303, 307 or 308.
    pub code: u16,
    scheme: Option<String>,
    authority: Option<String>,
    port: Option<u16>,
    port_from_scheme: bool,
    port_from_request: bool,
    path: Option<String>,
    prefix: Option<String>,
}

impl Redirect {
    pub(super) fn new(wire: &wire::Redirect) -> Result<Self, String> {
        let code = match wire.code {
            0 => 301,
            code @ (301 | 302 | 303 | 307 | 308) => code as u16,
            code => return Err(format!("code {code} is not one of 301, 302, 303, 307, 308")),
        };
        let some = |text: &String| (!text.is_empty()).then(|| text.clone());
        let port = u16::try_from(wire.port).map_err(|_| format!("{} is no port", wire.port))?;
        Ok(Self {
            code,
            scheme: some(&wire.scheme),
            authority: some(&wire.authority),
            port: (port != 0).then_some(port),
            port_from_scheme: wire.port_from_scheme,
            port_from_request: wire.port_from_request,
            path: some(&wire.path),
            prefix: wire.has_prefix.then(|| wire.prefix.clone()),
        })
    }

    /// The `Location`.
    pub fn location(&self, request: &impl Request, found: &Found<'_>) -> String {
        let scheme = self.scheme.as_deref().unwrap_or(request.scheme());
        let authority = request.authority();
        let (own_host, own_port) = split_port(authority);
        let (host, given) = self.authority.as_deref().map_or((own_host, None), split_port);
        let port = match self.port {
            Some(port) => Some(port),
            None if given.is_some() => given,
            None if self.port_from_scheme => None,
            None if self.port_from_request => own_port,
            // Another scheme or host has its own default port.
            None if self.scheme.is_some() || self.authority.is_some() => None,
            None => own_port,
        };
        let default = if scheme == "https" { 443 } else { 80 };
        let port = port.filter(|port| *port != default);
        let path = match (&self.path, &self.prefix) {
            (Some(path), _) => path.clone(),
            (None, Some(prefix)) => found.with_prefix(request.path(), prefix),
            (None, None) => request.path().to_owned(),
        };
        let mut location = format!("{scheme}://{host}");
        if let Some(port) = port {
            location.push_str(&format!(":{port}"));
        }
        location.push_str(&path);
        // A path that brings a query of its own means that one.
        if let (Some(query), false) = (request.query(), path.contains('?')) {
            location.push('?');
            location.push_str(query);
        }
        location
    }
}

/// Host and port of an authority; IPv6 addresses stay in their brackets.
fn split_port(authority: &str) -> (&str, Option<u16>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && (!host.contains(':') || host.ends_with(']')) => match port.parse() {
            Ok(port) => (host, Some(port)),
            Err(_) => (authority, None),
        },
        _ => (authority, None),
    }
}
