//! The control loops of a cluster: Deployments, ReplicaSets, Jobs, endpoints, and a scheduler for the one node.
//!
//! One task makes pass after pass over everything, each pass reading the store anew, whenever something has changed and once a second.
//! That is slower than the real controllers with thousands of objects and can't act on stale copies. A failed
//! write (a conflict, a webhook's refusal) is tried again by the next pass.

mod deployment;
mod endpoints;
mod job;
mod replicas;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use serde_json::{Value, json};

use crate::apiserver::{Api, DeleteOptions, PatchKind, Status, resource, resource::Gvr};
use crate::json::{digest, flag, id, list, number, text};
use crate::mirror::Mirror;

/// What one controller works with.
pub(crate) struct Context {
    /// Acts as the controller.
    pub api: Api,
    /// When a failed creation may be tried again, by the owner's uid.
    pub retry: HashMap<String, Instant>,
}

impl Context {
    async fn all(&self, gvr: &Gvr) -> Vec<Value> {
        self.api.list(gvr, None, None).await.map(|l| l.items).unwrap_or_default()
    }

    /// Writes a status if it is another one than before.
    async fn status(&self, gvr: &Gvr, object: &Value, status: Value) {
        if object.get("status") == Some(&status) {
            return;
        }
        let mut new = object.clone();
        new["status"] = status;
        // Somebody else's write in between is seen by the next pass.
        if let Err(e) = self.api.update_status(gvr, new).await
            && !e.is_conflict()
            && !e.is_not_found()
        {
            tracing::warn!("status of {} {:?}: {e}", gvr.resource, id(object));
        }
    }

    async fn delete(&self, gvr: &Gvr, object: &Value) {
        let (ns, name) = id(object);
        let options = DeleteOptions { uid: Some(text(object, "/metadata/uid").to_owned()), ..DeleteOptions::default() };
        if let Err(e) = self.api.delete(gvr, Some(&ns), &name, options).await
            && !e.is_not_found()
            && !e.is_conflict()
        {
            tracing::warn!("deletion of {} {ns}/{name}: {e}", gvr.resource);
        }
    }

    /// Creates a pod from an owner's template. A refusal becomes an event on the owner, and a pause.
    async fn create_pod(&mut self, owner: &Value, kind: &str, api_version: &str, name: Option<String>) -> Result<(), Status> {
        let uid = text(owner, "/metadata/uid").to_owned();
        if self.retry.get(&uid).is_some_and(|t| Instant::now() < *t) {
            return Err(Status::new(429, "TooManyRequests", "waiting after a failure"));
        }
        let (ns, owner_name) = id(owner);
        let template = &owner["spec"]["template"];
        let mut metadata = template.get("metadata").cloned().unwrap_or_else(|| json!({}));
        match name {
            Some(name) => metadata["name"] = json!(name),
            None => metadata["generateName"] = json!(format!("{owner_name}-")),
        }
        metadata["namespace"] = json!(ns);
        metadata["ownerReferences"] = json!([{"apiVersion": api_version, "kind": kind, "name": owner_name, "uid": uid,
            "controller": true, "blockOwnerDeletion": true}]);
        if let Some(map) = metadata.as_object_mut() {
            map.remove("creationTimestamp");
        }
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]});
        match self.api.create(&resource::PODS, Some(&ns), pod).await {
            Ok(_) => {
                self.retry.remove(&uid);
                Ok(())
            }
            Err(e) => {
                self.retry.insert(uid, Instant::now() + Duration::from_secs(2));
                self.event(owner, kind, api_version, "FailedCreate", &format!("Error creating: {}", e.message)).await;
                Err(e)
            }
        }
    }

    async fn event(&self, owner: &Value, kind: &str, api_version: &str, reason: &str, message: &str) {
        let (ns, name) = id(owner);
        let now = crate::now();
        let event = format!("{name}.{}", digest(&json!([owner["metadata"]["uid"], reason, message])));
        let body = json!({
            "metadata": {"name": event, "namespace": ns}, "type": "Warning", "reason": reason, "message": message, "count": 1,
            "involvedObject": {"apiVersion": api_version, "kind": kind, "namespace": ns, "name": name, "uid": owner["metadata"]["uid"]},
            "source": {"component": "playground-controllers"}, "firstTimestamp": now, "lastTimestamp": now,
        });
        if let Err(e) = self.api.create(&resource::EVENTS, Some(&ns), body).await
            && e.is_already_exists()
        {
            let patch = json!({ "lastTimestamp": now });
            let _ = self.api.patch(&resource::EVENTS, Some(&ns), &event, None, PatchKind::Merge, patch).await;
        }
    }
}

/// The uid of an object's controller.
fn controller(object: &Value) -> &str {
    list(object, "/metadata/ownerReferences").iter().find(|o| flag(o, "/controller")).map_or("", |o| text(o, "/uid"))
}

fn deleting(object: &Value) -> bool {
    !text(object, "/metadata/deletionTimestamp").is_empty()
}

/// A pod that has ended counts no more.
fn ended(pod: &Value) -> bool {
    matches!(text(pod, "/status/phase"), "Succeeded" | "Failed")
}

/// Seconds since a condition became true; `None` if it isn't.
fn true_for(object: &Value, kind: &str) -> Option<i64> {
    let found = list(object, "/status/conditions").iter().find(|c| c["type"] == kind && c["status"] == "True")?;
    seconds_since(text(found, "/lastTransitionTime"))
}

fn seconds_since(time: &str) -> Option<i64> {
    let time: k8s_openapi::jiff::Timestamp = time.parse().ok()?;
    Some(crate::instant().duration_since(time).as_secs())
}

/// Sets a condition; its time changes only with its status.
fn put_condition(conditions: &mut Vec<Value>, kind: &str, status: &str, reason: &str, message: &str) {
    let now = crate::now();
    let old = conditions.iter().find(|c| c["type"] == kind);
    let time = |key: &str, keep: bool| old.filter(|_| keep).map_or_else(|| json!(now), |c| c[key].clone());
    let same = old.is_some_and(|c| c["status"] == status);
    let all = same && old.is_some_and(|c| c["reason"] == reason && c["message"] == message);
    let new = json!({"type": kind, "status": status, "reason": reason, "message": message,
        "lastUpdateTime": time("lastUpdateTime", all), "lastTransitionTime": time("lastTransitionTime", same)});
    match conditions.iter_mut().find(|c| c["type"] == kind) {
        Some(c) => *c = new,
        None => conditions.push(new),
    }
}

/// Puts pods that nobody has placed on the one node.
async fn schedule(cx: &Context) {
    for pod in cx.all(&resource::PODS).await {
        let (ns, name) = id(&pod);
        let wanted = matches!(text(&pod, "/spec/schedulerName"), "" | "default-scheduler");
        if text(&pod, "/spec/nodeName").is_empty() && !deleting(&pod) && wanted && number(&pod, "/spec/schedulingGates", 0) == 0 {
            if !list(&pod, "/spec/schedulingGates").is_empty() {
                continue;
            }
            if let Err(e) = cx.api.bind(&ns, &name, crate::node::NAME).await
                && !e.is_not_found()
                && !e.is_conflict()
            {
                tracing::warn!("scheduling of pod {ns}/{name}: {e}");
            }
        }
    }
}

/// Starts all controllers; they run for as long as the process lives. `account` gives the API as this service account of `kube-system`.
pub(crate) fn start(account: impl Fn(&str) -> Api) {
    let context = |name: &str| Context { api: account(name), retry: HashMap::new() };
    let watched = [
        resource::DEPLOYMENTS, resource::REPLICASETS, resource::STATEFULSETS, resource::DAEMONSETS, resource::JOBS, resource::PODS, resource::SERVICES,
    ];
    let watcher = account("controller-manager");
    let mirrors: Vec<_> = watched.iter().map(|gvr| Mirror::start(&watcher, gvr)).collect();
    let changes = mirrors.iter().map(|m| tokio_stream::wrappers::WatchStream::from_changes(m.changes()));
    let mut changes = futures::stream::select_all(changes);
    let scheduler = context("scheduler");
    let mut replicas = context("replicaset-controller");
    let mut sets = context("statefulset-controller");
    let mut jobs = context("job-controller");
    let (deployments, slices) = (context("deployment-controller"), context("endpointslice-controller"));
    tokio::spawn(async move {
        loop {
            deployment::pass(&deployments).await;
            replicas::pass(&mut replicas).await;
            replicas::pass_others(&mut sets).await;
            job::pass(&mut jobs).await;
            schedule(&scheduler).await;
            endpoints::pass(&slices).await;
            let _ = tokio::time::timeout(Duration::from_secs(1), changes.next()).await;
            // What changes together is looked at together.
            tokio::time::sleep(Duration::from_millis(20)).await;
            while let Some(Some(_)) = futures::FutureExt::now_or_never(changes.next()) {}
        }
    });
}
