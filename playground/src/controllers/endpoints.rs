//! EndpointSlices, and the older Endpoints, of Services with a selector.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::{Context, deleting, ended};
use crate::apiserver::{resource, selector::Labels};
use crate::json::{condition, digest, flag, id, list, text};

const MANAGED: &str = "endpointslice.kubernetes.io/managed-by";
const SERVICE: &str = "kubernetes.io/service-name";

/// A Service's ports as this pod has them; a port whose name the pod doesn't know is left out.
fn ports(service: &Value, pod: &Value) -> Vec<Value> {
    let number = |port: &Value| -> Option<u64> {
        let target = match port.get("targetPort") {
            None | Some(Value::Null) => &port["port"],
            Some(target) => target,
        };
        if let Some(n) = target.as_u64() {
            return Some(n);
        }
        let name = target.as_str()?;
        let containers = list(pod, "/spec/containers").iter().chain(list(pod, "/spec/initContainers").iter().filter(|c| c["restartPolicy"] == "Always"));
        containers.flat_map(|c| list(c, "/ports")).find(|p| p["name"] == name)?["containerPort"].as_u64()
    };
    let mut out = Vec::new();
    for port in list(service, "/spec/ports") {
        if let Some(n) = number(port) {
            let protocol = if text(port, "/protocol").is_empty() { "TCP" } else { text(port, "/protocol") };
            let mut own = json!({"name": text(port, "/name"), "port": n, "protocol": protocol});
            if let Some(app) = port.get("appProtocol") {
                own["appProtocol"] = app.clone();
            }
            out.push(own);
        }
    }
    out
}

fn endpoint(service: &Value, pod: &Value) -> Value {
    let ready = condition(pod, "Ready");
    let going = deleting(pod);
    let mut out = json!({
        "addresses": [text(pod, "/status/podIP")],
        "conditions": {"ready": flag(service, "/spec/publishNotReadyAddresses") || ready && !going, "serving": ready, "terminating": going},
        "nodeName": text(pod, "/spec/nodeName"),
        "targetRef": {"kind": "Pod", "namespace": pod["metadata"]["namespace"], "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]},
    });
    let (host, subdomain) = (text(pod, "/spec/hostname"), text(pod, "/spec/subdomain"));
    if !host.is_empty() && subdomain == text(service, "/metadata/name") {
        out["hostname"] = json!(host);
    }
    out
}

/// The slices of a Service, one per list of ports: pods may give a named port different numbers.
fn slices(service: &Value, pods: &[Value]) -> Vec<Value> {
    let selector = Labels::from_object(Some(&json!({"matchLabels": service["spec"]["selector"]}))).unwrap_or_default();
    let ns = text(service, "/metadata/namespace");
    let mut groups: BTreeMap<String, (Vec<Value>, Vec<Value>)> = BTreeMap::new();
    for pod in pods {
        let counts = text(pod, "/metadata/namespace") == ns && selector.matches(pod) && !ended(pod) && !text(pod, "/status/podIP").is_empty();
        if counts {
            let ports = ports(service, pod);
            groups.entry(digest(&json!(ports))).or_insert_with(|| (ports, Vec::new())).1.push(endpoint(service, pod));
        }
    }
    if groups.is_empty() {
        groups.insert("empty".into(), (Vec::new(), Vec::new()));
    }
    let name = text(service, "/metadata/name");
    let mut labels = service["metadata"]["labels"].as_object().cloned().unwrap_or_default();
    labels.insert(SERVICE.into(), json!(name));
    labels.insert(MANAGED.into(), json!("endpointslice-controller.k8s.io"));
    if service["spec"]["clusterIP"] == "None" {
        labels.insert("service.kubernetes.io/headless".into(), json!(""));
    }
    groups
        .into_iter()
        .map(|(hash, (ports, endpoints))| {
            json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                "metadata": {"name": format!("{name}-{}", &hash[..5]), "namespace": ns, "labels": labels,
                    "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": name, "uid": service["metadata"]["uid"], "controller": true, "blockOwnerDeletion": true}]},
                "ports": ports, "endpoints": endpoints,
            })
        })
        .collect()
}

/// The Endpoints object that says the same.
fn classic(service: &Value, slices: &[Value]) -> Value {
    let mut subsets = Vec::new();
    for slice in slices {
        let pick = |ready: bool| -> Vec<Value> {
            let chosen = list(slice, "/endpoints").iter().filter(|e| (e["conditions"]["ready"] == true) == ready && e["conditions"]["terminating"] != true);
            chosen.map(|e| json!({"ip": e["addresses"][0], "nodeName": e["nodeName"], "targetRef": e["targetRef"]})).collect()
        };
        let (ready, not_ready) = (pick(true), pick(false));
        let mut subset = json!({"ports": slice["ports"]});
        if !ready.is_empty() {
            subset["addresses"] = json!(ready);
        }
        if !not_ready.is_empty() {
            subset["notReadyAddresses"] = json!(not_ready);
        }
        if subset.as_object().is_some_and(|s| s.len() > 1) {
            subsets.push(subset);
        }
    }
    let meta = &service["metadata"];
    let mut labels = meta["labels"].as_object().cloned().unwrap_or_default();
    labels.insert("endpoints.kubernetes.io/managed-by".into(), json!("endpoint-controller"));
    json!({"apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": meta["name"], "namespace": meta["namespace"], "labels": labels,
        "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": meta["name"], "uid": meta["uid"]}]}, "subsets": subsets})
}

/// Writes an object if it differs in what is ours.
async fn put(cx: &Context, gvr: &resource::Gvr, old: Option<&Value>, new: Value, keys: &[&str]) {
    let (ns, name) = id(&new);
    let result = match old {
        None => cx.api.create(gvr, Some(&ns), new).await.map(drop),
        Some(old) if keys.iter().all(|k| old.get(*k) == new.get(*k)) && old["metadata"]["labels"] == new["metadata"]["labels"] => Ok(()),
        Some(old) => {
            let mut changed = old.clone();
            for key in keys {
                changed[*key] = new[*key].clone();
            }
            changed["metadata"]["labels"] = new["metadata"]["labels"].clone();
            cx.api.update(gvr, changed).await.map(drop)
        }
    };
    if let Err(e) = result
        && !e.is_conflict()
        && !e.is_not_found()
        && !e.is_already_exists()
    {
        tracing::warn!("{} {ns}/{name}: {e}", gvr.resource);
    }
}

pub(super) async fn pass(cx: &Context) {
    let (services, pods) = (cx.all(&resource::SERVICES).await, cx.all(&resource::PODS).await);
    let (old_slices, old_endpoints) = (cx.all(&resource::ENDPOINTSLICES).await, cx.all(&resource::ENDPOINTS).await);
    for service in services.iter().filter(|s| !deleting(s)) {
        let key = id(service);
        let has_selector = service["spec"]["selector"].as_object().is_some_and(|s| !s.is_empty());
        if !has_selector || text(service, "/spec/type") == "ExternalName" {
            continue;
        }
        let wanted = slices(service, &pods);
        let mut names = BTreeSet::new();
        for slice in &wanted {
            let (ns, name) = id(slice);
            let old = old_slices.iter().find(|o| id(o) == (ns.clone(), name.clone()));
            put(cx, &resource::ENDPOINTSLICES, old, slice.clone(), &["ports", "endpoints"]).await;
            names.insert(name);
        }
        let mine = |o: &&Value| o["metadata"]["labels"][SERVICE] == key.1.as_str() && !o["metadata"]["labels"][MANAGED].is_null() && id(o).0 == key.0;
        for old in old_slices.iter().filter(mine).filter(|o| !names.contains(&id(o).1)) {
            cx.delete(&resource::ENDPOINTSLICES, old).await;
        }
        let old = old_endpoints.iter().find(|o| id(o) == key);
        put(cx, &resource::ENDPOINTS, old, classic(service, &wanted), &["subsets"]).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_port_is_each_pods_own() {
        let service = json!({"metadata": {"name": "s", "namespace": "n"}, "spec": {"selector": {"a": "b"}, "ports": [{"name": "h", "port": 80, "targetPort": "web"}]}});
        let pod = |ip: &str, port: u16, ready: &str| {
            json!({"metadata": {"name": ip, "namespace": "n", "labels": {"a": "b"}}, "spec": {"containers": [{"ports": [{"name": "web", "containerPort": port}]}]},
                "status": {"podIP": ip, "conditions": [{"type": "Ready", "status": ready}]}})
        };
        let pods = [pod("10.0.0.1", 1, "True"), pod("10.0.0.2", 2, "True"), pod("10.0.0.3", 2, "False")];
        let got = slices(&service, &pods);
        assert_eq!(got.len(), 2);
        let ready: Vec<_> = crate::services::backends(&got.into_iter().map(std::sync::Arc::new).collect::<Vec<_>>(), "n", "s", "h");
        assert_eq!(ready, [("10.0.0.1".parse().unwrap(), 1), ("10.0.0.2".parse().unwrap(), 2)]);
    }
}
