//! What the workload controllers share: which pods are theirs, making one from a template, removing some.

use serde_json::{Value, json};

use crate::apiserver::{Api, DeleteOptions, Status, resource};
use crate::json::{condition, id, list, number, text};

/// Whether an object is controlled by this owner.
pub(super) fn owned(object: &Value, owner: &Value) -> bool {
    list(object, "/metadata/ownerReferences").iter().any(|r| r["controller"] == true && r["uid"] == owner["metadata"]["uid"])
}

/// The reference from a dependent to its owner.
pub(super) fn reference(owner: &Value) -> Value {
    json!({"apiVersion": owner["apiVersion"], "kind": owner["kind"], "name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"],
        "controller": true, "blockOwnerDeletion": true})
}

/// The pods of an owner, whatever has become of them.
pub(super) async fn of(api: &Api, owner: &Value) -> Result<Vec<Value>, Status> {
    let all = api.list(&resource::PODS, Some(text(owner, "/metadata/namespace")), None).await?;
    Ok(all.items.into_iter().filter(|p| owned(p, owner)).collect())
}

/// It hasn't ended, and nobody has deleted it.
pub(super) fn active(pod: &Value) -> bool {
    !terminating(pod) && !ended(pod)
}

/// It succeeded or failed.
pub(super) fn ended(pod: &Value) -> bool {
    ["Succeeded", "Failed"].contains(&text(pod, "/status/phase"))
}

/// It is being deleted.
pub(super) fn terminating(object: &Value) -> bool {
    !text(object, "/metadata/deletionTimestamp").is_empty()
}

/// It is ready.
pub(super) fn ready(pod: &Value) -> bool {
    condition(pod, "Ready")
}

/// Seconds until a ready pod has been ready for `minimum` seconds; `None` while it isn't ready.
pub(super) fn until_available(pod: &Value, minimum: i64) -> Option<i64> {
    if !ready(pod) {
        return None;
    }
    let since = list(pod, "/status/conditions").iter().find(|c| c["type"] == "Ready").map(|c| text(c, "/lastTransitionTime"));
    let since = since.and_then(seconds).unwrap_or(0);
    Some((since + minimum - crate::apiserver::api::seconds()).max(0))
}

/// A time of the API in seconds since 1970.
pub(super) fn seconds(time: &str) -> Option<i64> {
    time.parse::<k8s_openapi::jiff::Timestamp>().ok().map(k8s_openapi::jiff::Timestamp::as_second)
}

/// A pod from a template.
pub(super) fn from_template(owner: &Value, template: &Value) -> Value {
    let mut pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": owner["metadata"]["namespace"],
        "ownerReferences": [reference(owner)]}, "spec": template["spec"]});
    for key in ["labels", "annotations", "finalizers"] {
        if let Some(value) = template.pointer(&format!("/metadata/{key}")).filter(|v| !v.is_null()) {
            pod["metadata"][key] = value.clone();
        }
    }
    pod
}

/// Creates a pod; a refusal becomes an event of its owner, where people look for it.
pub(super) async fn create(api: &Api, component: &str, owner: &Value, pod: Value) -> Result<Value, Status> {
    let ns = text(owner, "/metadata/namespace");
    match api.create(&resource::PODS, Some(ns), pod).await {
        Ok(pod) => {
            let message = format!("Created pod: {}", text(&pod, "/metadata/name"));
            crate::events::record(api, component, owner, "Normal", "SuccessfulCreate", &message).await;
            Ok(pod)
        }
        Err(e) => {
            let message = format!("Error creating: {}", e.message);
            crate::events::record(api, component, owner, "Warning", "FailedCreate", &message).await;
            Err(e)
        }
    }
}

/// Deletes a pod, with the grace period that it asks for.
pub(super) async fn delete(api: &Api, component: &str, owner: &Value, pod: &Value) -> Result<(), Status> {
    let (ns, name) = id(pod);
    let options = DeleteOptions { uid: Some(text(pod, "/metadata/uid").to_owned()), ..DeleteOptions::default() };
    match api.delete(&resource::PODS, Some(&ns), &name, options).await {
        Err(e) if !e.is_not_found() => Err(e),
        _ => {
            crate::events::record(api, component, owner, "Normal", "SuccessfulDelete", &format!("Deleted pod: {name}")).await;
            Ok(())
        }
    }
}

/// The pods to remove first: without a node, pending, unready, the most restarts, the youngest.
pub(super) fn least_missed(mut pods: Vec<Value>, count: usize) -> Vec<Value> {
    pods.sort_by_cached_key(|p| {
        let restarts: i64 = list(p, "/status/containerStatuses").iter().map(|c| number(c, "/restartCount", 0)).sum();
        let created = std::cmp::Reverse(text(p, "/metadata/creationTimestamp").to_owned());
        (!text(p, "/spec/nodeName").is_empty(), text(p, "/status/phase") == "Running", ready(p), -restarts, created)
    });
    pods.truncate(count);
    pods
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_missed_pods_go_first() {
        let pod = |name: &str, phase: &str, ready: &str, created: &str| {
            json!({"metadata": {"name": name, "creationTimestamp": created}, "spec": {"nodeName": "n"},
                "status": {"phase": phase, "conditions": [{"type": "Ready", "status": ready}]}})
        };
        let pods = vec![
            pod("old", "Running", "True", "2020-01-01T00:00:00Z"),
            pod("young", "Running", "True", "2020-01-02T00:00:00Z"),
            pod("unready", "Running", "False", "2020-01-01T00:00:00Z"),
            pod("pending", "Pending", "False", "2020-01-01T00:00:00Z"),
        ];
        let names: Vec<String> = least_missed(pods, 3).iter().map(|p| text(p, "/metadata/name").to_owned()).collect();
        assert_eq!(names, ["pending", "unready", "young"]);
    }

    #[test]
    fn a_pod_is_available_when_it_has_been_ready_long_enough() {
        let pod = |status: &str, since: &str| json!({"status": {"conditions": [{"type": "Ready", "status": status, "lastTransitionTime": since}]}});
        assert_eq!(until_available(&pod("False", "2020-01-01T00:00:00Z"), 0), None);
        assert_eq!(until_available(&pod("True", "2020-01-01T00:00:00Z"), 10), Some(0));
        assert!((8..=10).contains(&until_available(&pod("True", &crate::now()), 10).unwrap()));
    }
}
