//! The few facts that the control plane keeps of each Kubernetes object. Sources (a cluster, a folder of manifests)
//! produce them, [`crate::index`] holds them, [`crate::compile`] and the controllers read them. Everything else of an object is dropped
//! on arrival: that is what keeps a control plane small in a large cluster.

pub mod policy;

pub use policy::Policy;

use std::collections::BTreeMap;
use std::net::IpAddr;
use weft_api::{annotations, names};
use weft_webhook::options::PortSet;

/// What an object is known by inside one kind. Cluster-scoped objects have an empty namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
}

impl Key {
    /// A key of its two parts.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.namespace.is_empty() { write!(f, "{}", self.name) } else { write!(f, "{}/{}", self.namespace, self.name) }
    }
}

/// The kinds that are watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// `v1/Namespace`.
    Namespace,
    /// `v1/Pod`.
    Pod,
    /// `v1/Service`.
    Service,
    /// `discovery.k8s.io/v1/EndpointSlice`.
    EndpointSlice,
    /// `apps/v1/ReplicaSet`, metadata only.
    ReplicaSet,
    /// `batch/v1/Job`, metadata only.
    Job,
    /// `admissionregistration.k8s.io/v1/MutatingWebhookConfiguration`.
    Webhook,
    /// `admissionregistration.k8s.io/v1/ValidatingWebhookConfiguration`.
    Validator,
    /// `security.istio.io/PeerAuthentication`.
    Peer,
    /// `security.istio.io/AuthorizationPolicy`.
    Authorization,
    /// `security.istio.io/RequestAuthentication`.
    Request,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Namespace,
        Self::Pod,
        Self::Service,
        Self::EndpointSlice,
        Self::ReplicaSet,
        Self::Job,
        Self::Webhook,
        Self::Validator,
        Self::Peer,
        Self::Authorization,
        Self::Request,
    ];

    /// The kinds of policies, whose definitions may be installed later, or never.
    pub const POLICIES: [Self; 3] = [Self::Peer, Self::Authorization, Self::Request];

    /// Lower-case plural, as in a URL of the API and in metrics.
    pub fn plural(self) -> &'static str {
        match self {
            Self::Namespace => "namespaces",
            Self::Pod => "pods",
            Self::Service => "services",
            Self::EndpointSlice => "endpointslices",
            Self::ReplicaSet => "replicasets",
            Self::Job => "jobs",
            Self::Webhook => "mutatingwebhookconfigurations",
            Self::Validator => "validatingwebhookconfigurations",
            Self::Peer => "peerauthentications",
            Self::Authorization => "authorizationpolicies",
            Self::Request => "requestauthentications",
        }
    }
}

/// One object of a source.
#[derive(Clone, Debug, PartialEq)]
// Objects pass through this type one at a time; what is kept is kept by its own type.
#[allow(clippy::large_enum_variant)]
pub enum Object {
    /// A namespace.
    Namespace(Namespace),
    /// A pod.
    Pod(Pod),
    /// A service.
    Service(Service),
    /// Endpoints of a service.
    EndpointSlice(EndpointSlice),
    /// A ReplicaSet, which only leads on to its Deployment.
    ReplicaSet(Owned),
    /// A Job, which may lead on to its CronJob.
    Job(Owned),
    /// A mutating webhook configuration.
    Webhook(Webhook),
    /// A validating webhook configuration.
    Validator(Webhook),
    /// Which mutual TLS is asked for.
    Peer(Policy<policy::Peer>),
    /// Who may do what.
    Authorization(Policy<policy::Authorization>),
    /// Whose tokens are believed.
    Request(Policy<policy::Request>),
}

impl Object {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Namespace(_) => Kind::Namespace,
            Self::Pod(_) => Kind::Pod,
            Self::Service(_) => Kind::Service,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::ReplicaSet(_) => Kind::ReplicaSet,
            Self::Job(_) => Kind::Job,
            Self::Webhook(_) => Kind::Webhook,
            Self::Validator(_) => Kind::Validator,
            Self::Peer(_) => Kind::Peer,
            Self::Authorization(_) => Kind::Authorization,
            Self::Request(_) => Kind::Request,
        }
    }

    /// Its key. A namespace lies in itself, so that all that concerns it is found in one place.
    pub fn key(&self) -> Key {
        match self {
            Self::Namespace(n) => Key::new(n.name.as_str(), n.name.as_str()),
            Self::Pod(p) => Key::new(p.namespace.as_str(), p.name.as_str()),
            Self::Service(s) => Key::new(s.namespace.as_str(), s.name.as_str()),
            Self::EndpointSlice(e) => Key::new(e.namespace.as_str(), e.name.as_str()),
            Self::ReplicaSet(o) | Self::Job(o) => Key::new(o.namespace.as_str(), o.name.as_str()),
            Self::Webhook(w) | Self::Validator(w) => Key::new("", w.name.as_str()),
            Self::Peer(p) => Key::new(p.namespace.as_str(), p.name.as_str()),
            Self::Authorization(p) => Key::new(p.namespace.as_str(), p.name.as_str()),
            Self::Request(p) => Key::new(p.namespace.as_str(), p.name.as_str()),
        }
    }
}

/// A namespace: what the injection decision reads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespace {
    /// Its name.
    pub name: String,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// `metadata.annotations` without those that are long and not ours.
    pub annotations: BTreeMap<String, String>,
    /// It is being deleted: nothing can be created in it any more.
    pub terminating: bool,
}

/// The controlling owner of an object.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner {
    /// `apiVersion`, for example `apps/v1`.
    pub api_version: String,
    /// `kind`, for example `ReplicaSet`.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
}

/// An object of which only the owner matters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owned {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The owner that controls it.
    pub owner: Option<Owner>,
}

/// A pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// `metadata.annotations` that mean something to a mesh.
    pub annotations: BTreeMap<String, String>,
    /// The owner that controls it.
    pub owner: Option<Owner>,
    /// `spec.serviceAccountName`, `default` where the pod names none.
    pub service_account: String,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// `spec.os.name`.
    pub os: Option<String>,
    /// `status.podIPs`.
    pub addresses: Vec<IpAddr>,
    /// `spec.containers`, and those of `spec.initContainers` that stay (native sidecars).
    pub containers: Vec<Container>,
    /// `status.phase` is `Succeeded` or `Failed`.
    pub finished: bool,
    /// It is being deleted.
    pub terminating: bool,
    /// `metadata.creationTimestamp` (RFC 3339 in UTC, so that text order is time order); empty if unknown.
    pub created: String,
    /// Whether the sidecar has run, be it that it is just restarting. Where nobody reports containers at all (a folder of
    /// manifests), it counts as having run.
    pub proxy_started: bool,
    /// What the pod's `weft-init` redirects to the sidecar, if the pod has one. This is what holds for the pod, whatever became of
    /// annotations and settings since it was injected.
    pub redirection: Option<Redirection>,
}

/// The inbound ports that a pod's rules redirect to its sidecar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redirection {
    /// These,
    pub inbound: PortSet,
    /// without these.
    pub exclude: PortSet,
}

impl Redirection {
    /// Whether connections to the port reach the sidecar. The sidecar's own ports are none of the app's.
    pub fn takes(&self, port: u16) -> bool {
        self.inbound.contains(port) && !self.exclude.contains(port) && !names::PROXY_PORTS.contains(&port)
    }
}

impl Pod {
    /// Whether the pod carries our sidecar: the container is there *and* the injection left its mark. (A container that
    /// is merely called like ours does not make a pod meshed.)
    pub fn meshed(&self) -> bool {
        self.annotations.contains_key(annotations::STATUS) && self.containers.iter().any(|c| c.name == names::PROXY_CONTAINER)
    }

    /// The containers of the app: all but ours.
    pub fn app_containers(&self) -> impl Iterator<Item = &Container> {
        self.containers.iter().filter(|c| c.name != names::PROXY_CONTAINER && c.name != names::INIT_CONTAINER)
    }

    /// The pod as the webhook's decision reads it. It has all that the decision depends on and nothing else.
    pub fn to_value(&self) -> serde_json::Value {
        let containers: Vec<_> = self.containers.iter().map(|c| serde_json::json!({"name": c.name, "image": c.image})).collect();
        let mut spec = serde_json::json!({
            "hostNetwork": self.host_network,
            "serviceAccountName": self.service_account,
            "containers": containers,
        });
        if let Some(os) = &self.os {
            spec["os"] = serde_json::json!({"name": os});
        }
        serde_json::json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": self.name,
                "namespace": self.namespace,
                "labels": self.labels,
                "annotations": self.annotations,
            },
            "spec": spec,
        })
    }
}

/// A container of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Container {
    /// Its name.
    pub name: String,
    /// Its image.
    pub image: String,
    /// The ports that it declares.
    pub ports: Vec<ContainerPort>,
}

/// A port that a container declares.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContainerPort {
    /// Its name, empty if it has none.
    pub name: String,
    /// The port.
    pub port: u16,
    /// TCP, UDP or SCTP.
    pub transport: Transport,
}

/// `protocol` of a port in Kubernetes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// TCP, what the mesh carries.
    #[default]
    Tcp,
    /// UDP or SCTP, what it leaves alone.
    Other,
}

/// A service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// `metadata.creationTimestamp` (RFC 3339 in UTC, so that text order is time order); empty if unknown.
    pub created: String,
    /// `spec.selector`; empty: its endpoints are written by somebody else.
    pub selector: BTreeMap<String, String>,
    /// `spec.ports`.
    pub ports: Vec<ServicePort>,
    /// `type: ExternalName`: no pod stands behind it.
    pub external_name: bool,
    /// `spec.clusterIPs`; empty for a headless one.
    pub cluster_ips: Vec<IpAddr>,
}

impl Service {
    /// Whether the service's selector picks a pod with these labels.
    pub fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        !self.external_name && !self.selector.is_empty() && self.selector.iter().all(|(k, v)| labels.get(k) == Some(v))
    }
}

/// A port of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServicePort {
    /// Its name, empty if it has none.
    pub name: String,
    /// The service's port.
    pub port: u16,
    /// Where it leads in the pod.
    pub target: Target,
    /// `appProtocol`.
    pub app_protocol: Option<String>,
    /// TCP, UDP or SCTP.
    pub transport: Transport,
}

/// `targetPort`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Target {
    /// The same number as the service's port.
    #[default]
    Same,
    /// A number.
    Number(u16),
    /// The name of a port of the pod's containers, which may be another number in each pod.
    Name(String),
}

/// Endpoints of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Label `kubernetes.io/service-name`.
    pub service: String,
    /// `ports`.
    pub ports: Vec<EndpointPort>,
    /// `endpoints`, in all states.
    pub endpoints: Vec<Endpoint>,
}

impl EndpointSlice {
    /// Whether one of the endpoints, in whatever state, is this pod.
    pub fn names(&self, pod: &Pod) -> bool {
        self.endpoints.iter().any(|e| match &e.pod {
            Some(name) => *name == pod.name,
            None => e.addresses.iter().any(|a| pod.addresses.contains(a)),
        })
    }
}

/// An endpoint of an EndpointSlice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// Its addresses, all of them the same endpoint's.
    pub addresses: Vec<IpAddr>,
    /// The pod of the slice's namespace that it refers to.
    pub pod: Option<String>,
    /// `conditions.ready`; what is unknown counts as ready, as Kubernetes has it.
    pub ready: bool,
    /// `conditions.serving`: ready, but perhaps on its way out.
    pub serving: bool,
    /// `conditions.terminating`.
    pub terminating: bool,
}

/// A port of an EndpointSlice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointPort {
    /// Name of the service's port, empty if it has none.
    pub name: String,
    /// The port of the endpoint.
    pub port: u16,
    /// `appProtocol`.
    pub app_protocol: Option<String>,
    /// TCP, UDP or SCTP.
    pub transport: Transport,
}

/// A webhook configuration, mutating or validating, as far as the control plane keeps it right.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Webhook {
    /// Its name.
    pub name: String,
    /// Its webhooks, in order.
    pub entries: Vec<WebhookEntry>,
}

/// One webhook of a [`Webhook`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WebhookEntry {
    /// Its name.
    pub name: String,
    /// Namespace and name of the service that it calls, if it calls one.
    pub service: Option<Key>,
    /// The certificates (PEM) by which the API server knows it; empty if there are none.
    pub ca_bundle: Vec<u8>,
}
