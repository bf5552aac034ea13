//! Just enough controllers for what a mesh notices: workloads become pods, pods become endpoints, pods get a node.
//!
//! Every controller is a function from one object to the calls that bring the cluster closer to it, called again whenever
//! something that it looks at changes. It reads the store itself and not a copy, so that what it did a moment ago is never overlooked;
//! what it decides is computed by pure functions. Objects are worked on side by side: one whose pods are refused (by a
//! webhook that doesn't answer, say) delays no other. A failed call is repeated after a growing delay.

mod deployment;
mod endpoints;
mod job;
mod pods;
mod replicaset;
mod sets;

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use futures::future::BoxFuture;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::apiserver::resource::{self, Gvr};
use crate::apiserver::{Api, PatchKind, Status};
use crate::json::{id, list, text};
use crate::node;

/// What a controller's function answers: when to look again although nothing has changed.
type Again = Result<Option<Duration>, Status>;
/// Works on one object.
type Reconcile = fn(Api, Value) -> BoxFuture<'static, Again>;

/// Starts all controllers. `api` gives the API as the service account of this name.
pub(crate) fn start(api: impl Fn(&str) -> Api) {
    let (deployments, sets, pods) = (resource::DEPLOYMENTS, resource::REPLICASETS, resource::PODS);
    let run = |name: &str, primary: Gvr, watched: Vec<Gvr>, reconcile: Reconcile| {
        tokio::spawn(work(api(name), primary, watched, reconcile));
    };
    run("deployment-controller", deployments, vec![sets.clone(), pods.clone()], |a, o| Box::pin(deployment::reconcile(a, o)));
    run("replicaset-controller", sets, vec![pods.clone()], |a, o| Box::pin(replicaset::reconcile(a, o)));
    run("statefulset-controller", resource::STATEFULSETS, vec![pods.clone()], |a, o| Box::pin(sets::stateful(a, o)));
    run("daemon-set-controller", resource::DAEMONSETS, vec![pods.clone(), resource::NODES], |a, o| Box::pin(sets::daemon(a, o)));
    run("job-controller", resource::JOBS, vec![pods.clone()], |a, o| Box::pin(job::reconcile(a, o)));
    run("endpointslice-controller", resource::SERVICES, vec![pods.clone()], |a, o| Box::pin(endpoints::reconcile(a, o)));
    run("kube-scheduler", pods, vec![resource::NODES], |a, o| Box::pin(schedule(a, o)));
}

/// Calls `reconcile` for every object of `primary` when it or something of `watched` has changed: for each object one call at
/// a time, and one more after the last change.
async fn work(api: Api, primary: Gvr, watched: Vec<Gvr>, reconcile: Reconcile) {
    let (changed, mut changes) = mpsc::channel::<()>(1);
    for gvr in watched.into_iter().chain([primary.clone()]) {
        let (api, changed) = (api.clone(), changed.clone());
        tokio::spawn(async move {
            loop {
                let (_, mut watch) = api.list_and_watch(&gvr);
                // A full channel holds a note already.
                let _ = changed.try_send(());
                while watch.next().await.is_some() {
                    let _ = changed.try_send(());
                }
                sleep(Duration::from_millis(100)).await;
            }
        });
    }
    let mut busy: HashSet<String> = HashSet::new();
    let mut dirty: HashSet<String> = HashSet::new();
    let mut failures: HashMap<String, u32> = HashMap::new();
    let mut tasks: JoinSet<(String, Again)> = JoinSet::new();
    let mut wake: Option<Instant> = None;
    loop {
        let timer = async {
            match wake {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = changes.recv() => {}
            () = timer => wake = None,
            Some(done) = tasks.join_next() => {
                let Ok((uid, again)) = done else { continue };
                busy.remove(&uid);
                let delay = match again {
                    Ok(delay) => {
                        failures.remove(&uid);
                        delay
                    }
                    // The object has changed or gone: the change itself brings us back.
                    Err(e) if e.is_conflict() || e.is_not_found() => Some(Duration::from_millis(50)),
                    Err(e) => {
                        let count = failures.entry(uid.clone()).or_insert(0);
                        *count += 1;
                        tracing::debug!("{}: {e}", primary.resource);
                        Some(Duration::from_millis(100 << (*count).min(7)))
                    }
                };
                if let Some(delay) = delay {
                    let at = Instant::now() + delay;
                    wake = Some(wake.map_or(at, |w| w.min(at)));
                }
                if !dirty.remove(&uid) {
                    continue;
                }
            }
        }
        // What changes together is looked at together.
        sleep(Duration::from_millis(10)).await;
        let Ok(all) = api.list(&primary, None, None).await else { continue };
        for object in all.items {
            let uid = text(&object, "/metadata/uid").to_owned();
            if busy.contains(&uid) {
                dirty.insert(uid);
                continue;
            }
            busy.insert(uid.clone());
            let call = reconcile(api.clone(), object);
            tasks.spawn(async move { (uid, call.await) });
        }
    }
}

/// Puts a pod on the node, or says why it can't be there.
async fn schedule(api: Api, pod: Value) -> Again {
    if !text(&pod, "/spec/nodeName").is_empty() || !text(&pod, "/metadata/deletionTimestamp").is_empty() {
        return Ok(None);
    }
    let (ns, name) = id(&pod);
    let gated = !list(&pod, "/spec/schedulingGates").is_empty();
    let labels = api.get(&resource::NODES, None, node::NAME).await?["metadata"]["labels"].clone();
    let unmatched = crate::json::entries(&pod, "/spec/nodeSelector").find(|(k, v)| labels[*k] != **v);
    let (reason, message) = match (gated, unmatched) {
        (false, None) => return api.bind(&ns, &name, node::NAME).await.map(|()| None),
        (true, _) => ("SchedulingGated", "Scheduling is blocked due to non-empty scheduling gates".to_owned()),
        (false, Some((key, value))) => {
            ("Unschedulable", format!("0/1 nodes are available: nodeSelector {key}={value} doesn't match the node."))
        }
    };
    if list(&pod, "/status/conditions").iter().any(|c| c["type"] == "PodScheduled" && c["message"] == message.as_str()) {
        return Ok(None);
    }
    let condition = json!({"type": "PodScheduled", "status": "False", "reason": reason, "message": message, "lastTransitionTime": crate::now()});
    let patch = json!({"status": {"conditions": [condition]}});
    api.patch(&resource::PODS, Some(&ns), &name, Some("status"), PatchKind::Strategic, patch).await?;
    if !gated {
        crate::events::record(&api, "default-scheduler", &pod, "Warning", "FailedScheduling", &message).await;
    }
    Ok(None)
}

/// Writes an object's status if it is another than before.
async fn write_status(api: &Api, gvr: &Gvr, object: &Value, status: Value) -> Result<(), Status> {
    if object.get("status") == Some(&status) {
        return Ok(());
    }
    let mut new = object.clone();
    new["status"] = status;
    api.update_status(gvr, new).await.map(drop)
}

/// A condition with the time of its last change kept.
fn condition(before: &Value, kind: &str, status: bool, reason: &str, message: &str) -> Value {
    let status = if status { "True" } else { "False" };
    let old = list(before, "/status/conditions").iter().find(|c| c["type"] == kind);
    let kept = |key: &str, same: bool| {
        old.filter(|_| same)
            .map_or_else(|| json!(crate::now()), |o| if o[key].is_null() { json!(crate::now()) } else { o[key].clone() })
    };
    let state = old.is_some_and(|o| o["status"] == status);
    let all = state && old.is_some_and(|o| o["reason"] == reason && o["message"] == message);
    json!({"type": kind, "status": status, "reason": reason, "message": message,
        "lastTransitionTime": kept("lastTransitionTime", state), "lastUpdateTime": kept("lastUpdateTime", all)})
}

/// A number or a percentage of `total`.
fn int_or_percent(value: &Value, total: i64, round_up: bool) -> i64 {
    match value.as_str().and_then(|s| s.strip_suffix('%')).and_then(|s| s.parse::<i64>().ok()) {
        Some(percent) if round_up => (total * percent + 99) / 100,
        Some(percent) => total * percent / 100,
        None => value.as_i64().unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages_round_as_they_should() {
        for (value, total, up, expected) in [
            (json!("25%"), 3, true, 1),
            (json!("25%"), 3, false, 0),
            (json!("100%"), 3, false, 3),
            (json!(2), 3, true, 2),
            (Value::Null, 3, true, 0),
        ] {
            assert_eq!(int_or_percent(&value, total, up), expected, "{value}");
        }
    }

    #[test]
    fn a_condition_keeps_its_time_until_its_status_changes() {
        let old = json!({"status": {"conditions": [{"type": "A", "status": "True", "reason": "x", "message": "", "lastTransitionTime": "then"}]}});
        assert_eq!(condition(&old, "A", true, "y", "")["lastTransitionTime"], "then");
        assert_ne!(condition(&old, "A", false, "y", "")["lastTransitionTime"], "then");
    }
}
