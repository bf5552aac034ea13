//! ReplicaSets, and the simple form of StatefulSets and DaemonSets that one node needs.

use serde_json::{Value, json};

use super::{Context, controller, deleting, ended, true_for};
use crate::apiserver::resource;
use crate::json::{condition, number, text};

/// The pods that an owner counts.
fn own<'a>(pods: &'a [Value], owner: &Value) -> Vec<&'a Value> {
    let uid = text(owner, "/metadata/uid");
    pods.iter().filter(|p| controller(p) == uid && !deleting(p) && !ended(p)).collect()
}

/// Those that have been ready for long enough.
fn available(pods: &[&Value], seconds: i64) -> usize {
    pods.iter().filter(|p| true_for(p, "Ready").is_some_and(|s| s >= seconds)).count()
}

/// Which pods go first: those that don't run, then the youngest.
fn victims(mut pods: Vec<&Value>, count: usize) -> Vec<&Value> {
    pods.sort_by_key(|p| {
        let ready = condition(p, "Ready");
        (ready, std::cmp::Reverse(text(p, "/metadata/creationTimestamp").to_owned()))
    });
    pods.truncate(count);
    pods
}

pub(super) async fn pass(cx: &mut Context) {
    let sets = cx.all(&resource::REPLICASETS).await;
    for set in sets.iter().filter(|s| !deleting(s)) {
        let wanted = number(set, "/spec/replicas", 1).max(0) as usize;
        let pods = cx.all(&resource::PODS).await;
        let mine = own(&pods, set);
        let mut failure = None;
        for _ in mine.len()..wanted {
            if let Err(e) = cx.create_pod(set, "ReplicaSet", "apps/v1", None).await {
                failure = Some(e.message);
                break;
            }
        }
        for pod in victims(mine.clone(), mine.len().saturating_sub(wanted)) {
            cx.delete(&resource::PODS, pod).await;
        }
        let pods = cx.all(&resource::PODS).await;
        let mine = own(&pods, set);
        let ready = mine.iter().filter(|p| condition(p, "Ready")).count();
        let mut status = json!({
            "replicas": mine.len(), "fullyLabeledReplicas": mine.len(), "readyReplicas": ready,
            "availableReplicas": available(&mine, number(set, "/spec/minReadySeconds", 0)),
            "observedGeneration": set["metadata"]["generation"],
        });
        if let Some(message) = failure {
            let mut conditions = crate::json::list(set, "/status/conditions").to_vec();
            if message == "waiting after a failure" && !conditions.is_empty() {
                status["conditions"] = json!(conditions);
            } else {
                super::put_condition(&mut conditions, "ReplicaFailure", "True", "FailedCreate", &message);
                status["conditions"] = json!(conditions);
            }
        }
        cx.status(&resource::REPLICASETS, set, status).await;
    }
}

/// StatefulSets (in order, one at a time, no volume claims) and DaemonSets (one pod).
pub(super) async fn pass_others(cx: &mut Context) {
    let sets = cx.all(&resource::STATEFULSETS).await;
    for set in sets.iter().filter(|s| !deleting(s)) {
        let pods = cx.all(&resource::PODS).await;
        let uid = text(set, "/metadata/uid");
        let all: Vec<&Value> = pods.iter().filter(|p| controller(p) == uid).collect();
        let hash = crate::json::digest(&set["spec"]["template"]);
        let wanted = number(set, "/spec/replicas", 1).max(0) as usize;
        let name = |n: usize| format!("{}-{n}", text(set, "/metadata/name"));
        let find = |n: usize| all.iter().copied().find(|p| p["metadata"]["name"] == name(n).as_str());
        let current = |p: &Value| p["metadata"]["labels"]["controller-revision-hash"] == hash.as_str();
        let mut owner = set.clone();
        owner["spec"]["template"]["metadata"]["labels"]["controller-revision-hash"] = json!(hash);
        let parallel = set["spec"]["podManagementPolicy"] == "Parallel";
        for n in 0..wanted {
            match find(n) {
                None => {
                    owner["spec"]["template"]["metadata"]["labels"]["statefulset.kubernetes.io/pod-name"] = json!(name(n));
                    owner["spec"]["template"]["spec"]["hostname"] = json!(name(n));
                    owner["spec"]["template"]["spec"]["subdomain"] = set["spec"]["serviceName"].clone();
                    let _ = cx.create_pod(&owner, "StatefulSet", "apps/v1", Some(name(n))).await;
                    if !parallel {
                        break;
                    }
                }
                Some(p) if ended(p) && !deleting(p) => cx.delete(&resource::PODS, p).await,
                Some(p) if !condition(p, "Ready") && !parallel => break,
                Some(_) => {}
            }
        }
        let outdated = (0..wanted).rev().filter_map(find).find(|p| !current(p));
        let settled = (0..wanted).filter_map(find).all(|p| condition(p, "Ready") && !deleting(p));
        if let Some(p) = outdated.filter(|_| settled) {
            cx.delete(&resource::PODS, p).await;
        }
        for p in all.iter().filter(|p| (0..wanted).all(|n| p["metadata"]["name"] != name(n).as_str()) && !deleting(p)) {
            cx.delete(&resource::PODS, p).await;
        }
        let mine = own(&pods, set);
        let updated = mine.iter().filter(|p| current(p)).count();
        let ready = mine.iter().filter(|p| condition(p, "Ready")).count();
        let status = json!({"replicas": mine.len(), "readyReplicas": ready, "availableReplicas": ready, "currentReplicas": updated,
            "updatedReplicas": updated, "currentRevision": hash, "updateRevision": hash, "observedGeneration": set["metadata"]["generation"]});
        cx.status(&resource::STATEFULSETS, set, status).await;
    }
    let sets = cx.all(&resource::DAEMONSETS).await;
    for set in sets.iter().filter(|s| !deleting(s)) {
        let pods = cx.all(&resource::PODS).await;
        let hash = crate::json::digest(&set["spec"]["template"]);
        let uid = text(set, "/metadata/uid");
        let mut owner = set.clone();
        owner["spec"]["template"]["metadata"]["labels"]["controller-revision-hash"] = json!(hash);
        let all: Vec<&Value> = pods.iter().filter(|p| controller(p) == uid).collect();
        if all.is_empty() {
            let _ = cx.create_pod(&owner, "DaemonSet", "apps/v1", None).await;
        }
        let current = |p: &Value| p["metadata"]["labels"]["controller-revision-hash"] == hash.as_str();
        for p in all.iter().filter(|p| !deleting(p) && (ended(p) || !current(p))) {
            cx.delete(&resource::PODS, p).await;
        }
        let mine = own(&pods, set);
        let ready = mine.iter().filter(|p| condition(p, "Ready")).count();
        let status = json!({"desiredNumberScheduled": 1, "currentNumberScheduled": mine.len(), "numberMisscheduled": 0, "numberReady": ready,
            "numberAvailable": ready, "numberUnavailable": 1_usize.saturating_sub(ready),
            "updatedNumberScheduled": mine.iter().filter(|p| current(p)).count(), "observedGeneration": set["metadata"]["generation"]});
        cx.status(&resource::DAEMONSETS, set, status).await;
    }
}
