//! What a pod or its namespace has that gets in the mesh's way: found at admission, where somebody reads it, and not when
//! traffic fails.

use crate::facts::{ClusterFacts, NamespaceFacts};
use crate::options::{Options, Refusal};
use crate::sidecar::{POD_INFO_VOLUME, SECRETS_VOLUME};
use serde_json::Value;
use weft_api::names;

/// Names of containers of the meshes that we read annotations of.
pub(crate) const PROXY_NAMES: [&str; 3] = [names::PROXY_CONTAINER, "istio-proxy", "linkerd-proxy"];

fn list<'a>(pod: &'a Value, pointer: &str) -> &'a [Value] {
    pod.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn name(value: &Value) -> &str {
    value.get("name").and_then(Value::as_str).unwrap_or_default()
}

/// Names that the sidecar needs for itself.
pub(crate) fn refusals(pod: &Value) -> Vec<Refusal> {
    let mut found = Vec::new();
    for pointer in ["/spec/containers", "/spec/initContainers"] {
        for container in list(pod, pointer) {
            let name = name(container);
            if name == names::PROXY_CONTAINER || name == names::INIT_CONTAINER {
                found.push(Refusal::InTheWay(format!(
                    "container {name:?} has a name that the mesh needs for itself: rename it{}",
                    if name == names::PROXY_CONTAINER { ", or give it the image \"auto\" to override the sidecar" } else { "" }
                )));
            }
        }
    }
    for volume in list(pod, "/spec/volumes") {
        if [SECRETS_VOLUME, POD_INFO_VOLUME].contains(&name(volume)) {
            found.push(Refusal::InTheWay(format!(
                "volume {:?} has a name that the mesh needs for itself: rename it",
                name(volume)
            )));
        }
    }
    found
}

/// What may not work as the user expects.
pub(crate) fn warnings(pod: &Value, namespace: Option<&NamespaceFacts>, cluster: ClusterFacts, options: &Options) -> Vec<String> {
    let mut found = Vec::new();
    let pod_user = pod.pointer("/spec/securityContext/runAsUser").and_then(Value::as_i64);
    let pod_group = pod.pointer("/spec/securityContext/runAsGroup").and_then(Value::as_i64);
    for pointer in ["/spec/containers", "/spec/initContainers"] {
        for container in list(pod, pointer) {
            let name = name(container);
            if name == names::PROXY_CONTAINER || name == names::INIT_CONTAINER {
                continue;
            }
            if PROXY_NAMES.contains(&name) {
                found.push(format!(
                    "container {name} looks like another mesh's sidecar: two meshes in one pod take each other's traffic"
                ));
            }
            let own = |field: &str| container.get("securityContext").and_then(|s| s.get(field)).and_then(Value::as_i64);
            if own("runAsUser").or(pod_user) == Some(names::PROXY_UID.into()) {
                found.push(format!(
                    "container {name} runs as user {}, the proxy's own: its traffic bypasses the mesh; choose another user",
                    names::PROXY_UID
                ));
            } else if own("runAsGroup").or(pod_group) == Some(names::PROXY_GID.into()) {
                found.push(format!(
                    "container {name} runs as group {}, the proxy's own: its traffic bypasses the mesh; choose another group",
                    names::PROXY_GID
                ));
            }
            for port in container.get("ports").and_then(Value::as_array).into_iter().flatten() {
                let number = port.get("containerPort").and_then(Value::as_u64).unwrap_or_default();
                let taken = names::PROXY_PORTS.iter().any(|p| u64::from(*p) == number);
                if taken && (number != u64::from(names::DNS_PORT) || options.dns_capture) {
                    found.push(format!(
                        "container {name} listens on port {number}, which the proxy needs: one of them will fail to start"
                    ));
                }
            }
        }
    }
    if pod.pointer("/spec/hostPID").and_then(Value::as_bool) == Some(true) {
        found.push("hostPID lets the app see and trace its proxy".into());
    }
    if let Some(ns) = namespace {
        if let Some(level) =
            ns.labels.get("pod-security.kubernetes.io/enforce").filter(|l| *l == "baseline" || *l == "restricted")
        {
            found.push(format!(
                "namespace {} enforces the Pod Security level {level}, which refuses the NET_ADMIN that {} needs: the pod will be \
                 rejected; label the namespace pod-security.kubernetes.io/enforce=privileged",
                ns.name,
                names::INIT_CONTAINER
            ));
        }
        let label = |key: &str| ns.labels.get(key).map(String::as_str);
        let pod_label = |key: &str| pod.pointer("/metadata/labels").and_then(|l| l.get(key)).and_then(Value::as_str);
        let istio = label("istio-injection") == Some("enabled")
            || label("istio.io/rev").is_some()
            || pod_label("sidecar.istio.io/inject") == Some("true");
        if cluster.injectors.istio && istio {
            found.push(
                "Istio's injection webhook is installed and claims this pod too: two meshes in one pod take each other's traffic"
                    .into(),
            );
        }
        let linkerd = |map: Option<&str>| matches!(map, Some("enabled" | "ingress"));
        let pod_annotation =
            pod.pointer("/metadata/annotations").and_then(|a| a.get("linkerd.io/inject")).and_then(Value::as_str);
        if cluster.injectors.linkerd
            && (linkerd(ns.annotations.get("linkerd.io/inject").map(String::as_str)) || linkerd(pod_annotation))
        {
            found.push("Linkerd's injection webhook is installed and claims this pod too: two meshes in one pod take each other's traffic".into());
        }
    }
    found
}
