//! What is asked, and what the answer was.

use serde_json::Value;
use std::net::Ipv4Addr;
use weft_api::istio::security::{Action, AuthorizationPolicySpec};

/// How far paths are normalised: Istio's `pathNormalization`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Mode {
    /// Not at all.
    None,
    /// RFC 3986.
    Base,
    /// And `//` is `/`.
    MergeSlashes,
    /// After `%2f` and `%5c` were decoded.
    DecodeAndMergeSlashes,
}

/// A pod with its policies.
#[derive(Clone, Debug)]
pub(crate) struct Set {
    /// The port of its app, on which both proxies listen for it.
    pub(crate) port: u16,
    /// How its proxy normalises.
    pub(crate) mode: Mode,
    /// HTTP, else raw TCP.
    pub(crate) http: bool,
    /// All policies that select it.
    pub(crate) policies: Vec<AuthorizationPolicySpec>,
    /// The same, as they are written.
    pub(crate) raw: Vec<Value>,
    /// What is sent to it.
    pub(crate) calls: Vec<Call>,
}

impl Set {
    /// Its policies as a person would write them.
    pub(crate) fn words(&self) -> String {
        let mut out = String::new();
        for policy in &self.policies {
            out.push_str(&format!("    {} {:?}\n", if policy.action == Action::Deny { "DENY " } else { "ALLOW" }, Brief(policy)));
        }
        out
    }
}

/// A policy's lists that hold something.
struct Brief<'a>(&'a AuthorizationPolicySpec);

impl std::fmt::Debug for Brief<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut rules = f.debug_list();
        for rule in &self.0.rules {
            let mut parts = Vec::new();
            for source in rule.from.iter().filter_map(|from| from.source.as_ref()) {
                parts.push(brief(&format!("{source:?}")));
            }
            for operation in rule.to.iter().filter_map(|to| to.operation.as_ref()) {
                parts.push(brief(&format!("{operation:?}")));
            }
            for condition in &rule.when {
                parts.push(brief(&format!("{condition:?}")));
            }
            rules.entry(&format_args!("{}", parts.join(" + ")));
        }
        rules.finish()
    }
}

/// Debug output of a struct without its empty members.
fn brief(debug: &str) -> String {
    let (name, rest) = debug.split_once(" { ").unwrap_or((debug, ""));
    let members = rest.trim_end_matches(" }").split(", ").collect::<Vec<_>>().join(", ");
    let mut kept = Vec::new();
    for member in members.split("], ") {
        if !member.ends_with('[') && !member.ends_with("[]") && !member.contains("unknown") {
            kept.push(if member.contains('[') { format!("{}]", member.trim_end_matches(']')) } else { member.to_owned() });
        }
    }
    format!("{name}({})", kept.join(", "))
}

/// One request (or, to raw TCP, one connection).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    /// Index into [`IDENTITIES`]; `None`: plaintext.
    pub(crate) identity: Option<usize>,
    /// Address that the client connects from.
    pub(crate) source: Ipv4Addr,
    /// Server name of the client's TLS.
    pub(crate) sni: Option<&'static str>,
    /// The request line without the version.
    pub(crate) line: Vec<u8>,
    /// Header lines, `Host` among them (or not).
    pub(crate) headers: Vec<Vec<u8>>,
}

impl Call {
    /// The bytes that are sent.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = self.line.clone();
        out.extend_from_slice(b" HTTP/1.1\r\n");
        for header in &self.headers {
            out.extend_from_slice(header);
            out.extend_from_slice(b"\r\n");
        }
        out.extend_from_slice(b"Connection: close\r\n\r\n");
        out
    }

    /// As it is sent.
    pub(crate) fn method(&self) -> &[u8] {
        self.line.split(|b| *b == b' ').next().unwrap_or_default()
    }

    /// As it is sent: path, query and all.
    pub(crate) fn target(&self) -> &[u8] {
        let method = self.method().len();
        self.line.get(method + 1..).unwrap_or_default()
    }

    /// For people.
    pub(crate) fn words(&self) -> String {
        let headers: Vec<String> = self.headers.iter().map(|h| h.escape_ascii().to_string()).collect();
        format!(
            "{} [{}] by {} from {}{}",
            self.line.escape_ascii(),
            headers.join(" | "),
            self.identity.map_or("nobody", |n| IDENTITIES[n]),
            self.source,
            self.sni.map(|name| format!(" to {name}")).unwrap_or_default()
        )
    }
}

/// Who may call.
pub(crate) const IDENTITIES: [&str; 5] = [
    "spiffe://cluster.local/ns/default/sa/frontend",
    "spiffe://cluster.local/ns/prod/sa/frontend",
    "spiffe://cluster.local/ns/prod-eu/sa/api",
    "spiffe://cluster.local/ns/default/sa/a.b",
    "spiffe://cluster.local/ns/defaultx/sa/frontend2",
];

/// What a proxy did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Let through; the app saw this target, if the proxy says.
    Allowed(Option<Vec<u8>>),
    /// Refused by a policy.
    Denied,
    /// Refused as no proper request, before any policy.
    Malformed(u16),
}

impl Answer {
    /// Whether the app was reached.
    pub(crate) fn allowed(&self) -> bool {
        matches!(self, Self::Allowed(_))
    }

    /// For people.
    pub(crate) fn words(&self) -> String {
        match self {
            Self::Allowed(Some(path)) => format!("allowed as {}", path.escape_ascii()),
            Self::Allowed(None) => "allowed".into(),
            Self::Denied => "denied".into(),
            Self::Malformed(status) => format!("malformed ({status})"),
        }
    }
}
