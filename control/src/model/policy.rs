//! Policies as the control plane keeps them: read once, when they arrive, into the neutral model of the wire. What can't be read
//! is told ([`Policy::problem`]) and never guessed at: the version before stays in force, and where there is none, a reading that refuses.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use weft_api::istio::security::MtlsMode;
use weft_api::wire;

/// A policy object.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Policy<T> {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.creationTimestamp`; empty if unknown.
    pub created: String,
    /// `metadata.generation` of the present version; 0 if unknown.
    pub generation: i64,
    /// What is in force: the present version, or with a `problem` an earlier one (`kept`) or what refuses.
    pub spec: T,
    /// Why the present version can't be used, with the path of the field.
    pub problem: Option<String>,
    /// An earlier version is in force.
    pub kept: bool,
    /// What may not be meant as it is written, though it can be used.
    pub doubts: Vec<String>,
    /// What its status says of it, if anything of ours.
    pub reported: Option<Reported>,
}

impl<T: Clone> Policy<T> {
    /// The policy with what an earlier version said, if this one says nothing that can be used.
    pub fn after(mut self, earlier: Option<&Self>) -> Self {
        if let Some(earlier) = earlier.filter(|e| self.problem.is_some() && (e.problem.is_none() || e.kept)) {
            self.spec = earlier.spec.clone();
            self.created.clone_from(&earlier.created);
            self.kept = true;
        }
        self
    }

    /// `namespace/name`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Sorts the oldest first; of equals, the first by name.
    pub fn age(&self) -> (bool, &str, &str) {
        (self.created.is_empty(), &self.created, &self.name)
    }
}

/// The condition of ours in an object's status.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reported {
    /// `status`: `True` or `False`.
    pub status: String,
    /// `reason`.
    pub reason: String,
    /// `message`.
    pub message: String,
    /// `observedGeneration`.
    pub generation: i64,
}

/// Which pods a policy is for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    /// Labels that a pod must have; without any, all pods of the namespace (of the mesh, in the root namespace).
    pub labels: BTreeMap<String, String>,
    /// It is attached to something other than pods (a Service, a Gateway), and sidecars pass it over.
    pub elsewhere: bool,
}

impl Selector {
    /// Whether it is for a pod with these labels (and in a namespace where it counts).
    pub fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        !self.elsewhere && self.labels.iter().all(|(k, v)| labels.get(k) == Some(v))
    }

    /// Whether it is for all pods.
    pub fn is_all(&self) -> bool {
        !self.elsewhere && self.labels.is_empty()
    }
}

/// A `PeerAuthentication`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// For whom.
    pub selector: Selector,
    /// The mode.
    pub mode: MtlsMode,
    /// Modes of single ports of the pods.
    pub ports: BTreeMap<u16, MtlsMode>,
}

/// An `AuthorizationPolicy`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Authorization {
    /// For whom.
    pub selector: Selector,
    /// What becomes of what matches.
    pub action: wire::AuthorizationAction,
    /// Only told.
    pub dry_run: bool,
    /// What matches.
    pub rules: Vec<wire::AuthorizationRule>,
    /// CUSTOM: who is asked, by the name in the mesh settings.
    pub provider: String,
    /// See [`wire::AuthorizationPolicy`].
    pub broken: String,
}

/// A `RequestAuthentication`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request {
    /// For whom.
    pub selector: Selector,
    /// Its rules.
    pub rules: Vec<Jwt>,
}

/// A rule of a [`Request`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Jwt {
    /// The rule, with its keys if they stand in it.
    pub rule: wire::JwtRule,
    /// Where its keys are fetched otherwise.
    pub keys: Option<KeySource>,
    /// How long that may take.
    pub timeout: Duration,
}

/// Where the keys of a token issuer are.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KeySource {
    /// At this URL.
    Uri(String),
    /// Where the OpenID configuration of this issuer says.
    Issuer(String),
}

impl std::fmt::Display for KeySource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Uri(uri) => f.write_str(uri),
            Self::Issuer(issuer) => write!(f, "the OpenID configuration of {issuer}"),
        }
    }
}

/// The policies of a namespace, by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Policies {
    /// `PeerAuthentication`s.
    pub peers: BTreeMap<String, Arc<Policy<Peer>>>,
    /// `AuthorizationPolicy`s.
    pub authorizations: BTreeMap<String, Arc<Policy<Authorization>>>,
    /// `RequestAuthentication`s.
    pub requests: BTreeMap<String, Arc<Policy<Request>>>,
}

impl Policies {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.peers.is_empty() && self.authorizations.is_empty() && self.requests.is_empty()
    }
}
