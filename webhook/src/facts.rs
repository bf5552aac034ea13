//! What the decision needs to know besides the pod, and the seams by which whoever serves the webhook supplies it.

use serde_json::Value;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

/// A namespace as far as injection cares.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamespaceFacts {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// `metadata.annotations`. They are not in an AdmissionReview and no selector of a webhook can match them, which is
    /// why the server of the webhook keeps a watch on namespaces.
    pub annotations: BTreeMap<String, String>,
}

impl NamespaceFacts {
    /// The facts of a Namespace object; labels and annotations that are no strings are left out.
    pub fn from_object(object: &Value) -> Self {
        let map = |pointer: &str| -> BTreeMap<String, String> {
            object
                .pointer(pointer)
                .and_then(Value::as_object)
                .map(|m| m.iter().filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned()))).collect())
                .unwrap_or_default()
        };
        Self {
            name: object.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default().to_owned(),
            labels: map("/metadata/labels"),
            annotations: map("/metadata/annotations"),
        }
    }
}

/// Facts about the cluster as a whole that change seldom.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClusterFacts {
    /// Whether every API server in use runs native sidecars (Kubernetes 1.29 or newer); decides where the settings say
    /// `auto`.
    pub native_sidecars: bool,
    /// Which other meshes' injectors are installed.
    pub injectors: OtherInjectors,
}

impl ClusterFacts {
    /// Facts of an API server's version as `/version` reports it, for example major `1`, minor `29+`. A version that
    /// can't be read counts as new: 1.28 went out of support in 2024.
    pub fn of_version(major: &str, minor: &str) -> Self {
        let number = |s: &str| -> Option<u32> {
            let digits: String = s.chars().take_while(char::is_ascii_digit).collect();
            digits.parse().ok()
        };
        let native_sidecars = match (number(major), number(minor)) {
            (Some(1), Some(minor)) => minor >= 29,
            _ => true,
        };
        Self { native_sidecars, injectors: OtherInjectors::default() }
    }
}

/// Injection webhooks of other meshes in this cluster: two meshes in one pod take each other's traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OtherInjectors {
    /// A MutatingWebhookConfiguration of Istio's injector exists.
    pub istio: bool,
    /// A MutatingWebhookConfiguration of Linkerd's injector exists.
    pub linkerd: bool,
}

impl OtherInjectors {
    /// Notes what the name of a MutatingWebhookConfiguration says (`istio-sidecar-injector…`,
    /// `linkerd-proxy-injector-webhook-config`).
    pub fn note(&mut self, configuration_name: &str) {
        self.istio |=
            configuration_name.starts_with("istio-sidecar-injector") || configuration_name.starts_with("istio-revision-tag");
        self.linkerd |= configuration_name.starts_with("linkerd-proxy-injector");
    }
}

/// A future in a box, as trait objects need it.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A namespace could not be looked up. The pod is then judged by what it says itself and never denied.
#[derive(Clone, Debug, thiserror::Error)]
#[error("cannot read namespace {name}: {cause}")]
pub struct LookupError {
    /// The namespace.
    pub name: String,
    /// Why.
    pub cause: String,
}

/// Where the server learns about namespaces.
pub trait Namespaces: Send + Sync {
    /// The namespace, from what a watch has seen or else by one read of the API (a namespace and its pods may be created
    /// together, and the pods' reviews may overtake the watch). `None`: it does not exist.
    fn get<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<Arc<NamespaceFacts>>, LookupError>>;
}

/// A fixed set of namespaces: for tests, benches and machines without a cluster.
#[derive(Clone, Debug, Default)]
pub struct FixedNamespaces(pub BTreeMap<String, Arc<NamespaceFacts>>);

impl FromIterator<NamespaceFacts> for FixedNamespaces {
    fn from_iter<I: IntoIterator<Item = NamespaceFacts>>(namespaces: I) -> Self {
        Self(namespaces.into_iter().map(|n| (n.name.clone(), Arc::new(n))).collect())
    }
}

impl Namespaces for FixedNamespaces {
    fn get<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<Arc<NamespaceFacts>>, LookupError>> {
        let found = self.0.get(name).cloned();
        Box::pin(std::future::ready(Ok(found)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn native_sidecars_by_version() {
        for (major, minor, native) in
            [("1", "28", false), ("1", "29", true), ("1", "29+", true), ("1", "9", false), ("2", "0", true), ("", "", true)]
        {
            assert_eq!(ClusterFacts::of_version(major, minor).native_sidecars, native, "{major}.{minor}");
        }
    }

    #[test]
    fn injectors_are_known_by_name() {
        let mut others = OtherInjectors::default();
        others.note("weft-injector");
        others.note("cert-manager-webhook");
        assert_eq!(others, OtherInjectors::default());
        others.note("istio-sidecar-injector-canary");
        assert!(others.istio && !others.linkerd);
        others.note("linkerd-proxy-injector-webhook-config");
        assert!(others.linkerd);
    }
}
