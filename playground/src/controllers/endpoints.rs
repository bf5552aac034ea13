//! Service + pods → EndpointSlices, and the older Endpoints.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::{Again, pods};
use crate::apiserver::{Api, DeleteOptions, Status, resource};
use crate::json::{digest, entries, flag, id, list, text};

const MANAGER: &str = "endpointslice-controller.k8s.io";
const SERVICE: &str = "kubernetes.io/service-name";

/// The ports of a Service as this pod has them: a named target port is looked up in its containers.
fn ports(service: &Value, pod: &Value) -> Vec<Value> {
    let mut out = Vec::new();
    let containers = || {
        list(pod, "/spec/containers")
            .iter()
            .chain(list(pod, "/spec/initContainers").iter().filter(|c| c["restartPolicy"] == "Always"))
    };
    for port in list(service, "/spec/ports") {
        let protocol = if text(port, "/protocol").is_empty() { "TCP" } else { text(port, "/protocol") };
        let number = match &port["targetPort"] {
            Value::String(name) => name.parse().ok().or_else(|| {
                let same = |p: &&Value| p["name"] == name.as_str() && (p["protocol"] == protocol || p["protocol"].is_null());
                containers().flat_map(|c| list(c, "/ports")).find(same)?["containerPort"].as_u64()
            }),
            Value::Number(n) if n.as_u64() != Some(0) => n.as_u64(),
            _ => port["port"].as_u64(),
        };
        if let Some(number) = number {
            let mut entry = json!({"name": text(port, "/name"), "port": number, "protocol": protocol});
            if let Some(app) = port["appProtocol"].as_str() {
                entry["appProtocol"] = json!(app);
            }
            out.push(entry);
        }
    }
    out
}

fn endpoint(service: &Value, pod: &Value, address: &str) -> Value {
    let (ready, leaving) = (pods::ready(pod), pods::terminating(pod));
    let published = flag(service, "/spec/publishNotReadyAddresses");
    let mut out = json!({
        "addresses": [address], "nodeName": pod["spec"]["nodeName"],
        "conditions": {"ready": published || ready && !leaving, "serving": ready, "terminating": leaving},
        "targetRef": {"kind": "Pod", "namespace": pod["metadata"]["namespace"], "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]},
    });
    let host = text(pod, "/spec/hostname");
    if !host.is_empty() && pod["spec"]["subdomain"] == service["metadata"]["name"] {
        out["hostname"] = json!(host);
    }
    out
}

/// The slices that a Service should have, by name.
fn slices(service: &Value, pods: &[Value]) -> BTreeMap<String, Value> {
    let families: BTreeSet<&str> = list(service, "/spec/ipFamilies").iter().filter_map(Value::as_str).collect();
    let families = if families.is_empty() { BTreeSet::from(["IPv4"]) } else { families };
    let mut groups: BTreeMap<(String, String), (Vec<Value>, Vec<Value>)> = BTreeMap::new();
    for pod in pods {
        let ports = ports(service, pod);
        for address in list(pod, "/status/podIPs").iter().map(|a| text(a, "/ip")) {
            let family = if address.contains(':') { "IPv6" } else { "IPv4" };
            if families.contains(family) {
                let group =
                    groups.entry((family.to_owned(), json!(ports).to_string())).or_insert_with(|| (ports.clone(), Vec::new()));
                group.1.push(endpoint(service, pod, address));
            }
        }
    }
    // A Service without pods has one empty slice, which tells those who watch that it is known.
    for family in families {
        if !groups.keys().any(|(f, _)| f == family) {
            groups.insert((family.to_owned(), String::new()), (Vec::new(), Vec::new()));
        }
    }
    let (ns, name) = id(service);
    let mut labels = json!({});
    for (key, value) in entries(service, "/metadata/labels") {
        labels[key] = json!(value);
    }
    labels[SERVICE] = json!(name);
    labels["endpointslice.kubernetes.io/managed-by"] = json!(MANAGER);
    if text(service, "/spec/clusterIP") == "None" {
        labels["service.kubernetes.io/headless"] = json!("");
    }
    groups
        .into_iter()
        .map(|((family, _), (ports, mut endpoints))| {
            endpoints.sort_by_key(|e| e["addresses"][0].to_string());
            let slice = format!("{name}-{}", digest(&json!([service["metadata"]["uid"], family, ports])));
            let object = json!({
                "metadata": {"name": slice, "namespace": ns, "labels": labels, "ownerReferences": [pods::reference(service)]},
                "addressType": family, "endpoints": endpoints, "ports": ports,
            });
            (slice, object)
        })
        .collect()
}

/// The `subsets` of the Endpoints object, IPv4 only as ever.
fn subsets(slices: &BTreeMap<String, Value>) -> Value {
    let mut out = Vec::new();
    for slice in slices.values().filter(|s| s["addressType"] == "IPv4") {
        let of = |ready: bool| -> Vec<Value> {
            let some = list(slice, "/endpoints")
                .iter()
                .filter(|e| e["conditions"]["ready"] == ready && e["conditions"]["terminating"] != true);
            let address = |e: &Value| json!({"ip": e["addresses"][0], "nodeName": e["nodeName"], "targetRef": e["targetRef"]});
            some.map(address).collect()
        };
        let mut subset = json!({"ports": slice["ports"]});
        for (key, addresses) in [("addresses", of(true)), ("notReadyAddresses", of(false))] {
            if !addresses.is_empty() {
                subset[key] = json!(addresses);
            }
        }
        if subset.as_object().is_some_and(|s| s.len() > 1) {
            out.push(subset);
        }
    }
    json!(out)
}

async fn write_endpoints(api: &Api, service: &Value, subsets: Value) -> Result<(), Status> {
    let (ns, name) = id(service);
    let mut object = match api.get(&resource::ENDPOINTS, Some(&ns), &name).await {
        Ok(old) => old,
        Err(e) if e.is_not_found() => {
            json!({"metadata": {"name": name, "namespace": ns, "ownerReferences": [pods::reference(service)]}})
        }
        Err(e) => return Err(e),
    };
    if object["subsets"] == subsets {
        return Ok(());
    }
    object["subsets"] = subsets;
    if object["metadata"]["resourceVersion"].is_null() {
        api.create(&resource::ENDPOINTS, Some(&ns), object).await?;
    } else {
        api.update(&resource::ENDPOINTS, object).await?;
    }
    Ok(())
}

/// Brings the slices of one Service up to date. Those of a Service without selector are its owner's business.
pub(super) async fn reconcile(api: Api, service: Value) -> Again {
    let has_selector = entries(&service, "/spec/selector").next().is_some();
    if !has_selector || text(&service, "/spec/type") == "ExternalName" || pods::terminating(&service) {
        return Ok(None);
    }
    let (ns, name) = id(&service);
    let mut selected = api.list(&resource::PODS, Some(&ns), None).await?.items;
    selected.retain(|p| !pods::ended(p) && entries(&service, "/spec/selector").all(|(k, v)| p["metadata"]["labels"][k] == v));
    let wanted = slices(&service, &selected);
    let mut existing = api.list(&resource::ENDPOINTSLICES, Some(&ns), None).await?.items;
    existing.retain(|s| s["metadata"]["labels"][SERVICE] == name.as_str() && pods::owned(s, &service));
    for (slice, object) in &wanted {
        let Some(old) = existing.iter().find(|s| s["metadata"]["name"] == slice.as_str()) else {
            api.create(&resource::ENDPOINTSLICES, Some(&ns), object.clone()).await?;
            continue;
        };
        let mut new = old.clone();
        for key in ["endpoints", "ports"] {
            new[key] = object[key].clone();
        }
        new["metadata"]["labels"] = object["metadata"]["labels"].clone();
        if new != *old {
            api.update(&resource::ENDPOINTSLICES, new).await?;
        }
    }
    for old in existing.iter().filter(|s| !wanted.contains_key(text(s, "/metadata/name"))) {
        api.delete(&resource::ENDPOINTSLICES, Some(&ns), text(old, "/metadata/name"), DeleteOptions::default()).await?;
    }
    write_endpoints(&api, &service, subsets(&wanted)).await?;
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, ready: &str, port: u16) -> Value {
        json!({"metadata": {"name": name, "namespace": "n"},
            "spec": {"hostname": name, "subdomain": "s", "containers": [{"ports": [{"name": "http", "containerPort": port}]}]},
            "status": {"podIPs": [{"ip": format!("10.0.0.{port}")}, {"ip": format!("fd00::{port}")}], "conditions": [{"type": "Ready", "status": ready}]}})
    }

    #[test]
    fn pods_with_other_ports_get_slices_of_their_own() {
        let service = json!({"metadata": {"name": "s", "namespace": "n", "uid": "u"}, "spec": {"ports": [{"name": "web", "port": 80, "targetPort": "http"}]}});
        let found = slices(&service, &[pod("a", "True", 1), pod("b", "False", 1), pod("c", "True", 2)]);
        assert_eq!(found.len(), 2);
        let two = found.values().find(|s| s["ports"][0]["port"] == 1).unwrap();
        assert_eq!(two["endpoints"].as_array().unwrap().len(), 2);
        let of = |host: &str| {
            two["endpoints"].as_array().unwrap().iter().find(|e| e["hostname"] == host).unwrap()["conditions"]["ready"].clone()
        };
        assert_eq!((of("a"), of("b")), (json!(true), json!(false)));
        let sets = subsets(&found);
        assert_eq!(sets.as_array().unwrap().iter().filter(|s| s.get("notReadyAddresses").is_some()).count(), 1);
    }

    #[test]
    fn a_service_without_pods_has_one_empty_slice_per_family() {
        let service = json!({"metadata": {"name": "s", "namespace": "n", "uid": "u"}, "spec": {"ipFamilies": ["IPv4", "IPv6"], "ports": [{"port": 80}]}});
        assert_eq!(slices(&service, &[]).len(), 2);
        let both = slices(&service, &[pod("a", "True", 1)]);
        assert_eq!(both.values().filter(|s| s["addressType"] == "IPv6").count(), 1);
        assert_eq!(subsets(&both).as_array().unwrap().len(), 1);
    }

    #[test]
    fn a_pod_that_is_leaving_serves_but_gets_nothing_new() {
        let mut leaving = pod("a", "True", 1);
        leaving["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        let one = endpoint(&json!({"metadata": {"name": "x"}}), &leaving, "10.0.0.1");
        assert_eq!(one["conditions"], json!({"ready": false, "serving": true, "terminating": true}));
        assert!(one.get("hostname").is_none());
    }
}
