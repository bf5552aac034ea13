//! Kubernetes objects as they arrive, cut down to the fields that the control plane reads: serde skips the rest while it
//! parses, so that a list of a thousand pods never stands in memory in full. The same types read the API's JSON and a
//! folder's YAML.

use crate::compile::security;
use crate::model::{
    Container, ContainerPort, Endpoint, EndpointPort, EndpointSlice, Key, Namespace, Object, Owned, Owner, Pod, Redirection,
    Service, ServicePort, Target, Transport, Webhook, WebhookEntry,
};
use base64::Engine as _;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use std::borrow::Cow;
use std::collections::BTreeMap;
use weft_api::istio::Spec;
use weft_api::istio::security::{self as istio, AuthorizationPolicySpec, PeerAuthenticationSpec, RequestAuthenticationSpec};
use weft_api::{annotations as keys, names};
use weft_webhook::options::PortSet;

/// Annotations of a pod or namespace longer than this are no setting of a mesh and are not kept (the largest, a
/// `last-applied-configuration`, holds the whole object once more).
const LONGEST_ANNOTATION: usize = 1024;

/// The annotations that the decision may read: those of the three meshes, and not what other tools store.
fn mesh_annotations(metadata: &ObjectMeta) -> BTreeMap<String, String> {
    let mesh = |key: &str| {
        key == keys::INJECT_BARE
            || key == keys::INJECTION_ISTIO
            || key
                .split_once('/')
                .is_some_and(|(domain, _)| ["weft.mesh", "linkerd.io", "istio.io"].iter().any(|d| domain.ends_with(d)))
    };
    let Some(annotations) = &metadata.annotations else { return BTreeMap::new() };
    annotations
        .iter()
        .filter(|(key, value)| mesh(key) && (value.len() <= LONGEST_ANNOTATION || *key == keys::STATUS))
        .map(|(key, value)| {
            // Of the mark of an injection only its presence counts.
            (key.clone(), if key == keys::STATUS { "{}".into() } else { value.clone() })
        })
        .collect()
}

fn controller(metadata: &ObjectMeta) -> Option<Owner> {
    let owners = metadata.owner_references.as_deref().unwrap_or_default();
    let owner = owners.iter().find(|o| o.controller == Some(true)).or_else(|| owners.first().filter(|_| owners.len() == 1))?;
    Some(Owner {
        api_version: owner.api_version.clone(),
        kind: owner.kind.clone(),
        name: owner.name.clone(),
        uid: owner.uid.clone(),
    })
}

fn place(metadata: &ObjectMeta) -> (String, String) {
    let namespace = metadata.namespace.clone().unwrap_or_else(|| "default".into());
    (namespace, metadata.name.clone().unwrap_or_default())
}

fn created(metadata: &ObjectMeta) -> String {
    metadata.creation_timestamp.as_ref().map(|t| t.0.to_string()).unwrap_or_default()
}

fn transport(protocol: Option<&str>) -> Transport {
    match protocol {
        None | Some("TCP" | "") => Transport::Tcp,
        Some(_) => Transport::Other,
    }
}

macro_rules! resource {
    ($type:ty, $of:ty) => {
        resource!($type, $of, metadata);
    };
    ($type:ty, $of:ty, $($metadata:tt).+) => {
        impl kube::Resource for $type {
            type DynamicType = ();
            type Scope = <$of as kube::Resource>::Scope;
            fn kind((): &()) -> Cow<'_, str> {
                <$of as kube::Resource>::kind(&())
            }
            fn group((): &()) -> Cow<'_, str> {
                <$of as kube::Resource>::group(&())
            }
            fn version((): &()) -> Cow<'_, str> {
                <$of as kube::Resource>::version(&())
            }
            fn plural((): &()) -> Cow<'_, str> {
                <$of as kube::Resource>::plural(&())
            }
            fn meta(&self) -> &ObjectMeta {
                &self.$($metadata).+
            }
            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.$($metadata).+
            }
        }
    };
}

/// An object of which only the metadata is asked for.
pub type WireNamespace = kube::core::PartialObjectMeta<k8s_openapi::api::core::v1::Namespace>;
/// See [`WireNamespace`].
pub type WireReplicaSet = kube::core::PartialObjectMeta<k8s_openapi::api::apps::v1::ReplicaSet>;
/// See [`WireNamespace`].
pub type WireJob = kube::core::PartialObjectMeta<k8s_openapi::api::batch::v1::Job>;

/// What an object on the wire becomes.
pub trait Slim {
    /// The facts that are kept.
    fn slim(self) -> Object;
}

impl Slim for WireNamespace {
    fn slim(self) -> Object {
        Object::Namespace(Namespace {
            annotations: mesh_annotations(&self.metadata),
            terminating: self.metadata.deletion_timestamp.is_some(),
            name: self.metadata.name.unwrap_or_default(),
            labels: self.metadata.labels.unwrap_or_default(),
        })
    }
}

fn owned(metadata: &ObjectMeta) -> Owned {
    let (namespace, name) = place(metadata);
    Owned { namespace, name, owner: controller(metadata) }
}

impl Slim for WireReplicaSet {
    fn slim(self) -> Object {
        Object::ReplicaSet(owned(&self.metadata))
    }
}

impl Slim for WireJob {
    fn slim(self) -> Object {
        Object::Job(owned(&self.metadata))
    }
}

/// A pod.
#[derive(Clone, Debug, Deserialize)]
pub struct WirePod {
    #[serde(default)]
    metadata: ObjectMeta,
    #[serde(default)]
    spec: WirePodSpec,
    #[serde(default)]
    status: WirePodStatus,
}
resource!(WirePod, k8s_openapi::api::core::v1::Pod);

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WirePodSpec {
    service_account_name: Option<String>,
    host_network: Option<bool>,
    os: Option<WireOs>,
    containers: Vec<WireContainer>,
    init_containers: Option<Vec<WireContainer>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct WireOs {
    #[serde(default)]
    name: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WireContainer {
    name: String,
    image: Option<String>,
    restart_policy: Option<String>,
    args: Option<Vec<String>>,
    ports: Option<Vec<WireContainerPort>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WireContainerPort {
    name: Option<String>,
    container_port: u16,
    protocol: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WirePodStatus {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<WirePodIp>>,
    container_statuses: Option<Vec<WireContainerStatus>>,
    init_container_statuses: Option<Vec<WireContainerStatus>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WireContainerStatus {
    name: String,
    restart_count: Option<u32>,
    state: WireContainerState,
    last_state: WireContainerState,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct WireContainerState {
    running: Option<serde::de::IgnoredAny>,
    terminated: Option<serde::de::IgnoredAny>,
}

impl WirePodStatus {
    /// See [`Pod::proxy_started`].
    fn proxy_started(&self) -> bool {
        let (containers, init) = (&self.container_statuses, &self.init_container_statuses);
        if containers.is_none() && init.is_none() {
            return true;
        }
        let run = |s: &WireContainerState| s.running.is_some() || s.terminated.is_some();
        let mut all = containers.iter().chain(init).flatten();
        all.any(|s| s.name == names::PROXY_CONTAINER && (run(&s.state) || run(&s.last_state) || s.restart_count > Some(0)))
    }
}

/// What `weft-init` was told to redirect, by its arguments.
fn redirection(init: &[WireContainer]) -> Option<Redirection> {
    let args = init.iter().find(|c| c.name == names::INIT_CONTAINER)?.args.as_deref()?;
    let ports = |flag: &str| {
        let text = args.iter().find_map(|arg| arg.strip_prefix(flag)?.strip_prefix('='))?;
        PortSet::parse(text, true).ok()
    };
    Some(Redirection { inbound: ports("--inbound-ports")?, exclude: ports("--exclude-inbound-ports")? })
}

#[derive(Clone, Debug, Default, Deserialize)]
struct WirePodIp {
    #[serde(default)]
    ip: String,
}

fn container(wire: WireContainer) -> Container {
    let ports = wire.ports.unwrap_or_default().into_iter().map(|p| ContainerPort {
        name: p.name.unwrap_or_default(),
        port: p.container_port,
        transport: transport(p.protocol.as_deref()),
    });
    Container { name: wire.name, image: wire.image.unwrap_or_default(), ports: ports.collect() }
}

impl Slim for WirePod {
    fn slim(self) -> Object {
        let (namespace, name) = place(&self.metadata);
        let stays = |c: &WireContainer| c.restart_policy.as_deref() == Some("Always");
        let init = self.spec.init_containers.unwrap_or_default();
        let (redirection, proxy_started) = (redirection(&init), self.status.proxy_started());
        let init = init.into_iter().filter(stays);
        let mut addresses: Vec<_> =
            self.status.pod_ips.unwrap_or_default().iter().filter_map(|entry| entry.ip.parse().ok()).collect();
        if let (true, Some(ip)) = (addresses.is_empty(), self.status.pod_ip) {
            addresses.extend(ip.parse::<std::net::IpAddr>());
        }
        Object::Pod(Pod {
            created: created(&self.metadata),
            annotations: mesh_annotations(&self.metadata),
            owner: controller(&self.metadata),
            terminating: self.metadata.deletion_timestamp.is_some(),
            namespace,
            name,
            uid: self.metadata.uid.unwrap_or_default(),
            labels: self.metadata.labels.unwrap_or_default(),
            service_account: self.spec.service_account_name.filter(|s| !s.is_empty()).unwrap_or_else(|| "default".into()),
            host_network: self.spec.host_network.unwrap_or(false),
            os: self.spec.os.map(|os| os.name),
            addresses,
            containers: init.chain(self.spec.containers).map(container).collect(),
            finished: matches!(self.status.phase.as_deref(), Some("Succeeded" | "Failed")),
            proxy_started,
            redirection,
        })
    }
}

/// A service.
#[derive(Clone, Debug, Deserialize)]
pub struct WireService {
    #[serde(default)]
    metadata: ObjectMeta,
    #[serde(default)]
    spec: WireServiceSpec,
}
resource!(WireService, k8s_openapi::api::core::v1::Service);

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WireServiceSpec {
    #[serde(rename = "type")]
    type_: Option<String>,
    selector: Option<BTreeMap<String, String>>,
    ports: Option<Vec<WireServicePort>>,
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Option<Vec<String>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WireServicePort {
    name: Option<String>,
    port: u16,
    target_port: Option<WireTarget>,
    app_protocol: Option<String>,
    protocol: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum WireTarget {
    Number(u16),
    Name(String),
}

impl Slim for WireService {
    fn slim(self) -> Object {
        let (namespace, name) = place(&self.metadata);
        let ports = self.spec.ports.unwrap_or_default().into_iter().map(|p| ServicePort {
            name: p.name.unwrap_or_default(),
            port: p.port,
            target: match p.target_port {
                None | Some(WireTarget::Number(0)) => Target::Same,
                Some(WireTarget::Number(number)) => Target::Number(number),
                Some(WireTarget::Name(name)) => name.parse().map_or(Target::Name(name), Target::Number),
            },
            app_protocol: p.app_protocol,
            transport: transport(p.protocol.as_deref()),
        });
        // A headless service says `None` here, which is no address.
        let mut cluster_ips: Vec<std::net::IpAddr> =
            self.spec.cluster_ips.iter().flatten().filter_map(|ip| ip.parse().ok()).collect();
        if let (true, Some(ip)) = (cluster_ips.is_empty(), &self.spec.cluster_ip) {
            cluster_ips.extend(ip.parse::<std::net::IpAddr>());
        }
        Object::Service(Service {
            cluster_ips,
            namespace,
            name,
            created: created(&self.metadata),
            selector: self.spec.selector.unwrap_or_default(),
            ports: ports.collect(),
            external_name: self.spec.type_.as_deref() == Some("ExternalName"),
        })
    }
}

/// An EndpointSlice.
#[derive(Clone, Debug, Deserialize)]
pub struct WireEndpointSlice {
    #[serde(default)]
    metadata: ObjectMeta,
    #[serde(default)]
    ports: Option<Vec<WireEndpointPort>>,
    #[serde(default)]
    endpoints: Option<Vec<WireEndpoint>>,
}
resource!(WireEndpointSlice, k8s_openapi::api::discovery::v1::EndpointSlice);

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WireEndpointPort {
    name: Option<String>,
    port: Option<u16>,
    app_protocol: Option<String>,
    protocol: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WireEndpoint {
    addresses: Vec<String>,
    target_ref: Option<WireTargetRef>,
    conditions: Option<WireConditions>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
struct WireConditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct WireTargetRef {
    kind: String,
    name: String,
}

impl Slim for WireEndpointSlice {
    fn slim(self) -> Object {
        let (namespace, name) = place(&self.metadata);
        let endpoints = self.endpoints.unwrap_or_default();
        let ports = self.ports.unwrap_or_default().into_iter().map(|p| EndpointPort {
            name: p.name.unwrap_or_default(),
            port: p.port.unwrap_or_default(),
            app_protocol: p.app_protocol,
            transport: transport(p.protocol.as_deref()),
        });
        let service = self.metadata.labels.as_ref().and_then(|l| l.get("kubernetes.io/service-name")).cloned();
        Object::EndpointSlice(EndpointSlice {
            namespace,
            name,
            service: service.unwrap_or_default(),
            ports: ports.collect(),
            endpoints: endpoints.into_iter().map(endpoint).collect(),
        })
    }
}

fn endpoint(wire: WireEndpoint) -> Endpoint {
    let conditions = wire.conditions.unwrap_or_default();
    let ready = conditions.ready.unwrap_or(true);
    Endpoint {
        addresses: wire.addresses.iter().filter_map(|a| a.parse().ok()).collect(),
        pod: wire.target_ref.filter(|target| target.kind == "Pod").map(|target| target.name),
        ready,
        serving: conditions.serving.unwrap_or(ready),
        terminating: conditions.terminating.unwrap_or(false),
    }
}

/// A MutatingWebhookConfiguration.
#[derive(Clone, Debug, Deserialize)]
pub struct WireWebhook {
    #[serde(default)]
    metadata: ObjectMeta,
    #[serde(default)]
    webhooks: Option<Vec<WireWebhookEntry>>,
}
resource!(WireWebhook, k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration);

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WireWebhookEntry {
    name: String,
    client_config: WireClientConfig,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WireClientConfig {
    ca_bundle: Option<String>,
    service: Option<WireServiceReference>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct WireServiceReference {
    namespace: String,
    name: String,
}

impl WireWebhook {
    fn common(self) -> Webhook {
        let entries = self.webhooks.unwrap_or_default().into_iter().map(|entry| WebhookEntry {
            name: entry.name,
            service: entry.client_config.service.map(|s| Key::new(s.namespace, s.name)),
            // What is no base64 is wrong whatever it says, and is put right like any other drift.
            ca_bundle: entry
                .client_config
                .ca_bundle
                .and_then(|text| base64::engine::general_purpose::STANDARD.decode(text).ok())
                .unwrap_or_default(),
        });
        Webhook { name: self.metadata.name.unwrap_or_default(), entries: entries.collect() }
    }
}

impl Slim for WireWebhook {
    fn slim(self) -> Object {
        Object::Webhook(self.common())
    }
}

/// A ValidatingWebhookConfiguration, whose shape is the same.
#[derive(Clone, Debug, Deserialize)]
#[serde(transparent)]
pub struct WireValidator(WireWebhook);
resource!(WireValidator, k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration, 0.metadata);

impl Slim for WireValidator {
    fn slim(self) -> Object {
        Object::Validator(self.0.common())
    }
}

/// An object of a custom resource of Istio's, as it is: what it says is read by [`crate::compile::security`]. The version is the one that
/// the API server was found to serve.
pub struct WirePolicy<S> {
    metadata: ObjectMeta,
    value: serde_json::Value,
    spec: std::marker::PhantomData<fn() -> S>,
}

impl<S> Clone for WirePolicy<S> {
    fn clone(&self) -> Self {
        Self { metadata: self.metadata.clone(), value: self.value.clone(), spec: std::marker::PhantomData }
    }
}

impl<S> std::fmt::Debug for WirePolicy<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.value.fmt(f)
    }
}

impl<'de, S> Deserialize<'de> for WirePolicy<S> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(deserializer)?;
        let metadata = match value.get("metadata") {
            Some(metadata) => ObjectMeta::deserialize(metadata).map_err(serde::de::Error::custom)?,
            None => ObjectMeta::default(),
        };
        Ok(Self { metadata, value, spec: std::marker::PhantomData })
    }
}

impl<S: Spec> kube::Resource for WirePolicy<S> {
    type DynamicType = &'static str;
    type Scope = kube::core::NamespaceResourceScope;
    fn kind(_: &&'static str) -> Cow<'static, str> {
        S::KIND.into()
    }
    fn group(_: &&'static str) -> Cow<'static, str> {
        S::GROUP.into()
    }
    fn version(version: &&'static str) -> Cow<'static, str> {
        (*version).into()
    }
    fn plural(_: &&'static str) -> Cow<'static, str> {
        S::PLURAL.into()
    }
    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }
    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

impl Slim for WirePolicy<PeerAuthenticationSpec> {
    fn slim(self) -> Object {
        Object::Peer(security::peer::read(self.value))
    }
}

impl Slim for WirePolicy<AuthorizationPolicySpec> {
    fn slim(self) -> Object {
        Object::Authorization(security::authorization::read(self.value))
    }
}

impl Slim for WirePolicy<RequestAuthenticationSpec> {
    fn slim(self) -> Object {
        Object::Request(security::jwt::read(self.value))
    }
}

/// Reads one document of a manifest. `None`: a kind that the control plane does not read.
///
/// # Errors
/// The document has one of our kinds and can't be read, or has no name; the message names kind, object and field.
pub fn parse(document: serde_json::Value) -> Result<Option<Object>, String> {
    fn read<T: for<'de> Deserialize<'de> + Slim>(document: serde_json::Value) -> Result<Object, String> {
        let kind = document["kind"].as_str().unwrap_or_default().to_owned();
        let name = document.pointer("/metadata/name").and_then(serde_json::Value::as_str).unwrap_or_default().to_owned();
        if name.is_empty() {
            return Err(format!("{kind} has no metadata.name"));
        }
        let object: T = serde_json::from_value(document).map_err(|e| format!("{kind} {name}: {e}"))?;
        Ok(object.slim())
    }
    let of_istio = |version: &str| version.split_once('/').is_some_and(|(group, _)| group == istio::GROUP);
    let api_version = document["apiVersion"].as_str().unwrap_or_default();
    let kind = document["kind"].as_str().unwrap_or_default();
    match (api_version, kind) {
        ("v1", "Namespace") => read::<WireNamespace>(document).map(Some),
        ("v1", "Pod") => read::<WirePod>(document).map(Some),
        ("v1", "Service") => read::<WireService>(document).map(Some),
        ("discovery.k8s.io/v1", "EndpointSlice") => read::<WireEndpointSlice>(document).map(Some),
        ("apps/v1", "ReplicaSet") => read::<WireReplicaSet>(document).map(Some),
        ("batch/v1", "Job") => read::<WireJob>(document).map(Some),
        ("admissionregistration.k8s.io/v1", "MutatingWebhookConfiguration") => read::<WireWebhook>(document).map(Some),
        ("admissionregistration.k8s.io/v1", "ValidatingWebhookConfiguration") => read::<WireValidator>(document).map(Some),
        // A version that does not exist is a mistake of the policy and told as one.
        (version, "PeerAuthentication") if of_istio(version) => read::<WirePolicy<PeerAuthenticationSpec>>(document).map(Some),
        (version, "AuthorizationPolicy") if of_istio(version) => read::<WirePolicy<AuthorizationPolicySpec>>(document).map(Some),
        (version, "RequestAuthentication") if of_istio(version) => {
            read::<WirePolicy<RequestAuthenticationSpec>>(document).map(Some)
        }
        (_, "") => Err("a document without kind; is it a Kubernetes object?".into()),
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_pod_is_cut_down() {
        let pod = parse(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": "p", "namespace": "n", "uid": "u", "labels": {"a": "b"},
                "annotations": {"inject": "enabled", "weft.mesh/status": "{\"containers\":[]}", "config.linkerd.io/opaque-ports": "1",
                    "traffic.sidecar.istio.io/excludeInboundPorts": "2", "kubectl.kubernetes.io/last-applied-configuration": "…",
                    "notweft.example/x": "y"},
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "r", "uid": "ru", "controller": true}]
            },
            "spec": {"initContainers": [{"name": "i"}, {"name": "weft-proxy", "restartPolicy": "Always"}],
                "containers": [{"name": "c", "image": "x", "unknownField": {"deep": [1]}}], "newField": 1},
            "status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]}
        }))
        .unwrap()
        .unwrap();
        let Object::Pod(pod) = pod else { panic!("{pod:?}") };
        assert_eq!(
            pod.annotations.keys().collect::<Vec<_>>(),
            ["config.linkerd.io/opaque-ports", "inject", "traffic.sidecar.istio.io/excludeInboundPorts", "weft.mesh/status"]
        );
        assert_eq!(pod.containers.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["weft-proxy", "c"]);
        assert!(pod.meshed() && !pod.finished && !pod.terminating);
        assert_eq!(pod.addresses.len(), 2);
        assert_eq!(pod.service_account, "default");
        assert_eq!(pod.owner.unwrap().uid, "ru");
    }

    #[test]
    fn a_container_called_like_ours_is_not_enough() {
        let pod = parse(json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"},
            "spec": {"containers": [{"name": "weft-proxy"}]}}));
        let Ok(Some(Object::Pod(pod))) = pod else { panic!("{pod:?}") };
        assert!(!pod.meshed());
    }

    #[test]
    fn targets() {
        let service = parse(json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": {"ports": [
            {"port": 1}, {"port": 2, "targetPort": 20}, {"port": 3, "targetPort": "web"}, {"port": 4, "targetPort": "40"}, {"port": 5, "protocol": "SCTP"}]}}));
        let Ok(Some(Object::Service(service))) = service else { panic!("{service:?}") };
        let targets: Vec<_> = service.ports.iter().map(|p| p.target.clone()).collect();
        assert_eq!(targets, [Target::Same, Target::Number(20), Target::Name("web".into()), Target::Number(40), Target::Same]);
        assert_eq!(service.ports[4].transport, Transport::Other);
        assert_eq!(service.namespace, "default");
    }

    #[test]
    fn mistakes_name_the_object() {
        let error =
            parse(json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": {"ports": [{"port": "x"}]}}))
                .unwrap_err();
        assert!(error.contains("Service s") && error.contains('x'), "{error}");
        assert!(parse(json!({"apiVersion": "v1", "kind": "Pod"})).unwrap_err().contains("metadata.name"));
        assert!(parse(json!({"a": 1})).unwrap_err().contains("kind"));
        assert_eq!(parse(json!({"apiVersion": "apps/v1", "kind": "Deployment"})).unwrap(), None);
    }
}
