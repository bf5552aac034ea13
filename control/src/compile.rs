//! Snapshot in, messages out: what a pod's proxy is told, as a pure function of what is known. Nothing here does I/O or
//! keeps state, so that every rule is a line in a table of a test.
//!
//! - [`protocol`]: what a port's name, `appProtocol` and number say about what is spoken there.
//! - [`workload`]: the labels of a pod's telemetry, and the object at the top of its owners.
//! - [`inbound`]: the ports on which the app listens, by the Services that lead to the pod and by the pod itself.
//! - [`destination`]: what stands behind an address that an app connects to.

pub mod destination;
pub mod inbound;
pub mod protocol;
pub mod workload;

use crate::index::View;
use crate::model::Pod;
use weft_api::{names, wire};
use weft_webhook::TrafficSettings;

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
}

impl Default for Mesh {
    fn default() -> Self {
        Self {
            cluster: "Kubernetes".into(),
            cluster_domain: names::CLUSTER_DOMAIN.into(),
            trust_domain: names::TRUST_DOMAIN.into(),
            traffic: TrafficSettings::default(),
        }
    }
}

/// The whole inbound configuration of a pod.
pub fn inbound_config(pod: &Pod, view: &View, mesh: &Mesh) -> wire::Inbound {
    wire::Inbound {
        workload: Some(workload::labels(pod, view, mesh)),
        ports: inbound::ports(pod, view, mesh),
        ..wire::Inbound::default()
    }
}
