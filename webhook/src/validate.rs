//! Validation of the policies that people write, at admission and offline (`weft validate`), as one pure function of the object
//! and of what is known of the cluster.
//!
//! - **Errors** refuse the object. All that Istio 1.32 refuses is refused here: by its schema, by the rules of the CRD and by its own
//!   validation. Beyond that only what can't mean anything: a field that nobody knows (it would silently do nothing), a
//!   method or header that is not one, and what Weft can't do and would therefore have to enforce blindly.
//! - **Warnings** let it pass: it is valid, but surely not what was meant ([`warn`]).
//!
//! An error names the field by its path, the value, and what is allowed there; all mistakes are told at once. What the
//! cluster would have to say is asked through [`Surroundings`]; who knows nothing (a file on a laptop) gets fewer warnings,
//! never other errors. So what is accepted offline is accepted at admission.
//!
//! The raw JSON is walked, not the typed object, because a typed reader stops at the first mistake. What passes the walk is
//! then read into the types of `weft_api::istio`; that this always succeeds is tested with random input, and should it not, that
//! is an error too.

mod authorization;
pub mod offline;
mod peer;
pub mod report;
mod request;
pub mod review;
pub mod server;
mod shared;
pub mod surroundings;
mod values;
mod walk;
mod warn;

pub use surroundings::{Nothing, PlaintextCaller, PodFacts, PodPort, Protocol, ServicePort, Surroundings};

use serde_json::Value;
use std::fmt;
use walk::{At, Findings};
use weft_api::istio::security::{self, AuthorizationPolicySpec, PeerAuthenticationSpec, RequestAuthenticationSpec};
use weft_api::istio::{Object, ParseError, Spec};

/// The kinds that are validated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Which mutual TLS is asked for.
    PeerAuthentication,
    /// Who may do what.
    AuthorizationPolicy,
    /// Whose tokens are believed.
    RequestAuthentication,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::PeerAuthentication, Self::AuthorizationPolicy, Self::RequestAuthentication];

    /// As `kind` says it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PeerAuthentication => PeerAuthenticationSpec::KIND,
            Self::AuthorizationPolicy => AuthorizationPolicySpec::KIND,
            Self::RequestAuthentication => RequestAuthenticationSpec::KIND,
        }
    }

    /// The kind of an object by its `apiVersion` and `kind`; `None`: not one of ours. Any version of the group counts, so
    /// that one which does not exist is told instead of passed over.
    pub fn of(object: &Value) -> Option<Self> {
        let text = |field: &str| object.get(field).and_then(Value::as_str).unwrap_or_default();
        let (group, _) = text("apiVersion").split_once('/')?;
        Self::ALL.into_iter().find(|k| group == security::GROUP && k.as_str() == text("kind"))
    }
}

/// One thing that is wrong or doubtful.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Path of the field, such as `spec.rules[0].to[0].operation.methods[1]`.
    pub path: String,
    /// The value, and what is allowed or what comes of it.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() { f.write_str(&self.message) } else { write!(f, "{}: {}", self.path, self.message) }
    }
}

/// What is to be said about an object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Why it is refused; empty: it is accepted.
    pub errors: Vec<Problem>,
    /// What its author should know, if it is accepted.
    pub warnings: Vec<Problem>,
}

impl Verdict {
    /// Whether the object is accepted.
    pub fn is_valid(&self) -> bool {
        self.errors.is_empty()
    }
}

/// Validates an object of a kind.
pub fn validate(kind: Kind, object: &Value, around: &dyn Surroundings) -> Verdict {
    let mut found = Findings::default();
    shared::envelope(&mut found, kind, object);
    let none = Value::Object(serde_json::Map::new());
    let spec = object.get("spec").filter(|s| !s.is_null()).unwrap_or(&none);
    let root = At::root("spec");
    match kind {
        Kind::PeerAuthentication => peer::check(&mut found, &root, spec),
        Kind::AuthorizationPolicy => authorization::check(&mut found, &root, spec),
        Kind::RequestAuthentication => request::check(&mut found, &root, spec),
    }
    if found.errors.is_empty() {
        let read = match kind {
            Kind::PeerAuthentication => read(object).map(|o| warn::peer(&mut found, &o, around)),
            Kind::AuthorizationPolicy => read(object).map(|o| warn::authorization(&mut found, &o, around)),
            Kind::RequestAuthentication => read(object).map(|o| warn::request(&mut found, &o, around)),
        };
        if let Err(ParseError { path, message }) = read {
            found.errors.push(Problem { path, message });
        }
    }
    Verdict { errors: found.errors, warnings: found.warnings }
}

fn read<S: Spec>(object: &Value) -> Result<Object<S>, ParseError> {
    Object::from_value(object.clone())
}

#[cfg(test)]
mod tests;
