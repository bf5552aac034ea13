//! What validation asks of the cluster, to warn of what can only be seen there. The control plane answers from its index; offline
//! nobody does ([`Nothing`]). A method that answers `None` does not know, and then nothing is said that would depend on it: a
//! warning that is a guess trains people to overlook warnings.

use std::collections::BTreeMap;

/// The cluster as validation sees it. Called on the request's own path: answers come from memory.
pub trait Surroundings: Send + Sync {
    /// The namespace whose policies hold in the whole mesh.
    fn root_namespace(&self) -> Option<String> {
        None
    }

    /// The mesh's trust domain first, then those that count as the same.
    fn trust_domains(&self) -> Vec<String> {
        Vec::new()
    }

    /// Whether there is a namespace of this name.
    fn has_namespace(&self, _name: &str) -> Option<bool> {
        None
    }

    /// Whether the mesh settings have an extension provider of this name.
    fn has_provider(&self, _name: &str) -> Option<bool> {
        None
    }

    /// The running pods with all of `labels`, in one namespace or (`None`) in all.
    fn pods(&self, _namespace: Option<&str>, _labels: &BTreeMap<String, String>) -> Option<Vec<PodFacts>> {
        None
    }

    /// Who called the pods with all of `labels` without mutual TLS lately, by what the proxies reported; the most frequent first.
    fn plaintext_callers(&self, _namespace: Option<&str>, _labels: &BTreeMap<String, String>) -> Vec<PlaintextCaller> {
        Vec::new()
    }
}

/// Who knows nothing of any cluster.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nothing;

impl Surroundings for Nothing {}

/// A pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodFacts {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Whether it has the sidecar; only then a policy is in force for it.
    pub meshed: bool,
    /// Its ports that it or a Service declares.
    pub ports: Vec<PodPort>,
    /// Ports of Services that lead to it.
    pub services: Vec<ServicePort>,
}

/// A port of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodPort {
    /// The port.
    pub number: u16,
    /// What is spoken there.
    pub protocol: Protocol,
}

/// What is declared of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP of any version.
    Http,
    /// Opaque bytes: HTTP attributes don't exist.
    Tcp,
    /// Nothing; it is found out for each connection.
    Detected,
}

/// A port of a Service that leads to a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServicePort {
    /// The Service's name.
    pub service: String,
    /// Its port.
    pub port: u16,
    /// The pod's port to which it leads.
    pub target: u16,
}

/// Somebody who called without mutual TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlaintextCaller {
    /// A name for people: `shop/cart-5d…`, or an address.
    pub who: String,
    /// The pod's port that was called.
    pub port: u16,
    /// How often it was seen.
    pub count: u64,
}
