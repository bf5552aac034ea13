//! Snapshot in, messages out: what a pod's proxy is told, as a pure function of what is known. Nothing here does I/O or
//! keeps state, so that every rule is a line in a table of a test.
//!
//! - [`protocol`]: what a port's name, `appProtocol` and number say about what is spoken there.
//! - [`workload`]: the labels of a pod's telemetry, and the object at the top of its owners.
//! - [`inbound`]: the ports on which the app listens, by the Services that lead to the pod and by the pod itself.
//! - [`destination`]: what stands behind an address that an app connects to.
//! - [`security`]: policies: mutual TLS, who may do what, whose tokens are believed.

pub mod destination;
pub mod inbound;
pub mod protocol;
pub mod security;
pub mod workload;

use crate::index::View;
use crate::model::Pod;
use crate::model::policy::Policies;
use security::jwt::Keys;
use weft_api::{names, wire};
use weft_webhook::{MeshSettings, TrafficSettings};

/// What the compiler takes from the settings.
#[derive(Clone, Debug, PartialEq)]
pub struct Mesh {
    /// Name of the cluster, a label of metrics.
    pub cluster: String,
    /// Domain of Services, `cluster.local`.
    pub cluster_domain: String,
    /// Trust domain of identities.
    pub trust_domain: String,
    /// Which inbound traffic pods redirect where neither they nor their namespaces say so.
    pub traffic: TrafficSettings,
    /// The control plane's namespace, the root namespace where the settings name none.
    pub control_namespace: String,
    /// What the settings say about policy.
    pub policy: MeshSettings,
}

impl Mesh {
    /// The namespace whose policies hold for the whole mesh.
    pub fn root_namespace(&self) -> &str {
        let named = &self.policy.root_namespace;
        if named.is_empty() { &self.control_namespace } else { named }
    }
}

impl Default for Mesh {
    fn default() -> Self {
        Self {
            cluster: "Kubernetes".into(),
            cluster_domain: names::CLUSTER_DOMAIN.into(),
            trust_domain: names::TRUST_DOMAIN.into(),
            traffic: TrafficSettings::default(),
            control_namespace: names::CONTROL_NAMESPACE.into(),
            policy: MeshSettings::default(),
        }
    }
}

/// All that the configuration of a pod depends on.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// The pod's own namespace.
    pub view: &'a View,
    /// The policies of the root namespace.
    pub root: &'a Policies,
    /// The settings.
    pub mesh: &'a Mesh,
    /// The keys of token issuers.
    pub keys: &'a Keys,
}

/// The whole inbound configuration of a pod.
pub fn inbound_config(pod: &Pod, known: &Known<'_>) -> wire::Inbound {
    let mut inbound = wire::Inbound {
        workload: Some(workload::labels(pod, known.view, known.mesh)),
        ports: inbound::ports(pod, known.view, known.mesh),
        ..wire::Inbound::default()
    };
    security::inbound(pod, known, &mut inbound);
    inbound
}

/// The inbound configuration of a pod in a world that consists of `objects` alone, as [`crate::source::wire::parse`] reads them from
/// manifests: what a control plane that knew nothing else would tell its proxy. Keys that would have to be fetched are not there. `None`:
/// there is no such pod among the objects.
pub fn offline(
    objects: impl IntoIterator<Item = crate::model::Object>,
    namespace: &str,
    pod: &str,
    mesh: &Mesh,
) -> Option<wire::Inbound> {
    let index = crate::index::Index::new([]);
    index.replace(objects);
    let view = index.view(namespace)?;
    let root = index.policies_of(mesh.root_namespace());
    Some(inbound_config(view.pods.get(pod)?, &Known { view: &view, root: &root, mesh, keys: &Keys::default() }))
}
