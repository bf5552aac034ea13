//! Events: what happened to an object, for people (`kubectl describe`, `kubectl get events`).

use serde_json::{Value, json};

use crate::apiserver::{Api, PatchKind, resource};
use crate::json::{digest, number, text};

/// Writes an event about an object (with its `apiVersion` and `kind`); the same one again only counts up.
pub(crate) async fn record(api: &Api, component: &str, about: &Value, kind: &str, reason: &str, message: &str) {
    let name = text(about, "/metadata/name");
    let ns = match text(about, "/metadata/namespace") {
        "" => "default",
        ns => ns,
    };
    let uid = text(about, "/metadata/uid");
    let event = format!("{name}.{}", digest(&json!([uid, component, kind, reason, message])));
    let now = crate::now();
    let body = json!({
        "metadata": {"name": event, "namespace": ns}, "type": kind, "reason": reason, "message": message, "count": 1,
        "involvedObject": {
            "apiVersion": about["apiVersion"], "kind": about["kind"], "namespace": about["metadata"]["namespace"], "name": name, "uid": uid
        },
        "source": {"component": component}, "reportingComponent": component, "reportingInstance": crate::node::NAME,
        "firstTimestamp": now, "lastTimestamp": now,
    });
    let Err(refused) = api.create(&resource::EVENTS, Some(ns), body).await else { return };
    if refused.is_already_exists() {
        let old = api.get(&resource::EVENTS, Some(ns), &event).await.unwrap_or_default();
        let patch = json!({"count": number(&old, "/count", 1) + 1, "lastTimestamp": now});
        let _ = api.patch(&resource::EVENTS, Some(ns), &event, None, PatchKind::Merge, patch).await;
    }
}
