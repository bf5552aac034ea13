//! Deployment → ReplicaSets: one per version of the pod template, scaled against each other as the strategy says.
//!
//! Revisions are numbered in an annotation, as `kubectl rollout history` and `undo` expect; going back to an earlier template takes
//! its ReplicaSet up again under a new number.

use std::time::Duration;

use serde_json::{Value, json};

use super::{Again, condition, int_or_percent, pods, write_status};
use crate::apiserver::{Api, DeleteOptions, PatchKind, Status, resource};
use crate::json::{digest, flag, id, list, number, text};

const NAME: &str = "deployment-controller";
const REVISION: &str = "deployment.kubernetes.io/revision";
const HASH: &str = "pod-template-hash";

/// A ReplicaSet in numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Count {
    /// Wanted by its spec.
    wanted: i64,
    /// Pods that there are.
    pods: i64,
    /// Pods that are available.
    available: i64,
}

/// What bounds a rolling update.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    replicas: i64,
    surge: i64,
    unavailable: i64,
    recreate: bool,
}

/// The new sizes: of the new ReplicaSet, and of the old ones in their order (oldest first). Pure; called again after each step.
pub(super) fn step(plan: Plan, new: Count, old: &[Count]) -> (i64, Vec<i64>) {
    let mut olds: Vec<i64> = old.iter().map(|c| c.wanted).collect();
    if plan.recreate {
        let gone = old.iter().all(|c| c.pods == 0 && c.wanted == 0);
        return (if gone { plan.replicas } else { new.wanted.min(plan.replicas) }, vec![0; old.len()]);
    }
    let total: i64 = new.wanted + olds.iter().sum::<i64>();
    let grown = new.wanted + (plan.replicas + plan.surge - total).clamp(0, (plan.replicas - new.wanted).max(0));
    let target = grown.min(plan.replicas);
    if target != new.wanted {
        // First the new ones; the old ones have their turn when these are there.
        return (target, olds);
    }
    let least = plan.replicas - plan.unavailable;
    let mut room = total - least - (new.wanted - new.available);
    // Old pods that aren't available anyway go first: that costs nothing.
    for (size, count) in olds.iter_mut().zip(old) {
        let broken = (count.wanted - count.available).clamp(0, room.max(0));
        *size -= broken;
        room -= broken;
    }
    let available: i64 = new.available + old.iter().map(|c| c.available.min(c.wanted)).sum::<i64>();
    let mut spare = available - least;
    for size in &mut olds {
        let cut = (*size).min(spare.max(0));
        *size -= cut;
        spare -= cut;
    }
    (target, olds)
}

fn revision(object: &Value) -> i64 {
    object["metadata"]["annotations"][REVISION].as_str().and_then(|r| r.parse().ok()).unwrap_or(0)
}

fn count(set: &Value) -> Count {
    Count {
        wanted: number(set, "/spec/replicas", 0),
        pods: number(set, "/status/replicas", 0),
        available: number(set, "/status/availableReplicas", 0),
    }
}

fn plan(deployment: &Value) -> Plan {
    let replicas = number(deployment, "/spec/replicas", 1);
    let rolling = &deployment["spec"]["strategy"]["rollingUpdate"];
    let or = |key: &str| rolling.get(key).cloned().unwrap_or_else(|| json!("25%"));
    let surge = int_or_percent(&or("maxSurge"), replicas, true);
    let unavailable = int_or_percent(&or("maxUnavailable"), replicas, false);
    // Both 0 would stand still.
    let unavailable = if surge == 0 && unavailable == 0 { 1 } else { unavailable.min(replicas) };
    Plan { replicas, surge, unavailable, recreate: text(deployment, "/spec/strategy/type") == "Recreate" }
}

/// The hash label of the present template.
fn hash(deployment: &Value) -> String {
    digest(&deployment["spec"]["template"])
}

fn new_set(deployment: &Value, hash: &str, revision: i64) -> Value {
    let mut set = json!({
        "apiVersion": "apps/v1", "kind": "ReplicaSet",
        "metadata": {
            "name": format!("{}-{hash}", text(deployment, "/metadata/name")), "namespace": deployment["metadata"]["namespace"],
            "labels": deployment["spec"]["template"]["metadata"]["labels"], "annotations": annotations(deployment, revision),
            "ownerReferences": [pods::reference(deployment)],
        },
        "spec": {
            "replicas": 0, "minReadySeconds": deployment["spec"]["minReadySeconds"].as_i64().unwrap_or(0),
            "selector": deployment["spec"]["selector"], "template": deployment["spec"]["template"],
        }
    });
    for pointer in ["/metadata/labels", "/spec/selector/matchLabels", "/spec/template/metadata/labels"] {
        let (parent, key) = pointer.rsplit_once('/').unwrap_or_default();
        if let Some(parent) = set.pointer_mut(parent) {
            if !parent[key].is_object() {
                parent[key] = json!({});
            }
            parent[key][HASH] = json!(hash);
        }
    }
    set
}

fn annotations(deployment: &Value, revision: i64) -> Value {
    let mut out = json!({ REVISION: revision.to_string() });
    for (key, value) in crate::json::entries(deployment, "/metadata/annotations") {
        if ![REVISION, "kubectl.kubernetes.io/last-applied-configuration"].contains(&key) {
            out[key] = json!(value);
        }
    }
    out["deployment.kubernetes.io/desired-replicas"] = json!(number(deployment, "/spec/replicas", 1).to_string());
    out
}

/// The ReplicaSet of the present template, made if it isn't there, with the highest revision.
async fn present(api: &Api, deployment: &Value, sets: &[Value]) -> Result<Value, Status> {
    let (ns, hash) = (text(deployment, "/metadata/namespace"), hash(deployment));
    let found = sets.iter().find(|s| s["metadata"]["labels"][HASH] == hash.as_str());
    let others = sets.iter().filter(|s| s["metadata"]["labels"][HASH] != hash.as_str()).map(revision).max().unwrap_or(0);
    let Some(found) = found else {
        return api.create(&resource::REPLICASETS, Some(ns), new_set(deployment, &hash, others + 1)).await;
    };
    let wanted = if revision(found) > others { revision(found) } else { others + 1 };
    let annotations = annotations(deployment, wanted);
    let stale = annotations.as_object().into_iter().flatten().any(|(k, v)| found["metadata"]["annotations"][k] != *v);
    if !stale {
        return Ok(found.clone());
    }
    let body = json!({"metadata": {"annotations": annotations}, "spec": {"minReadySeconds": number(deployment, "/spec/minReadySeconds", 0)}});
    api.patch(&resource::REPLICASETS, Some(ns), text(found, "/metadata/name"), None, PatchKind::Merge, body).await
}

async fn scale(api: &Api, deployment: &Value, set: &Value, to: i64) -> Result<(), Status> {
    let from = number(set, "/spec/replicas", 0);
    if from == to {
        return Ok(());
    }
    let (ns, name) = id(set);
    api.patch(&resource::REPLICASETS, Some(&ns), &name, None, PatchKind::Merge, json!({"spec": {"replicas": to}})).await?;
    let word = if to > from { "up" } else { "down" };
    let message = format!("Scaled {word} replica set {name} from {from} to {to}");
    crate::events::record(api, NAME, deployment, "Normal", "ScalingReplicaSet", &message).await;
    Ok(())
}

fn progressing(deployment: &Value, name: &str, complete: bool, moved: bool) -> Value {
    let old = list(deployment, "/status/conditions").iter().find(|c| c["type"] == "Progressing");
    if complete {
        let message = format!("ReplicaSet \"{name}\" has successfully progressed.");
        return condition(deployment, "Progressing", true, "NewReplicaSetAvailable", &message);
    }
    let limit = number(deployment, "/spec/progressDeadlineSeconds", 600);
    // A new version has its time from its first step on.
    let same =
        old.is_some_and(|o| text(o, "/message").contains(&format!("\"{name}\"")) && o["reason"] != "NewReplicaSetAvailable");
    let since = old.filter(|_| same).and_then(|o| pods::seconds(text(o, "/lastUpdateTime")));
    if let Some(since) = since
        && !moved
        && crate::apiserver::api::seconds() - since > limit
    {
        let message = format!("ReplicaSet \"{name}\" has timed out progressing.");
        return condition(deployment, "Progressing", false, "ProgressDeadlineExceeded", &message);
    }
    let mut out =
        condition(deployment, "Progressing", true, "ReplicaSetUpdated", &format!("ReplicaSet \"{name}\" is progressing."));
    if moved {
        out["lastUpdateTime"] = json!(crate::now());
    }
    out
}

fn status(deployment: &Value, new: &Value, all: &[Value]) -> Value {
    let sum = |key: &str| all.iter().map(|s| number(s, &format!("/status/{key}"), 0)).sum::<i64>();
    let plan = plan(deployment);
    let updated = number(new, "/status/replicas", 0);
    let (replicas, ready, available) = (sum("replicas"), sum("readyReplicas"), sum("availableReplicas"));
    let enough = available >= plan.replicas - plan.unavailable;
    let (reason, message) = if enough {
        ("MinimumReplicasAvailable", "Deployment has minimum availability.")
    } else {
        ("MinimumReplicasUnavailable", "Deployment does not have minimum availability.")
    };
    let complete = updated == plan.replicas && replicas == plan.replicas && available >= plan.replicas;
    let before = |key: &str| number(deployment, &format!("/status/{key}"), 0);
    let moved = updated > before("updatedReplicas") || ready > before("readyReplicas") || available > before("availableReplicas");
    let mut conditions = vec![
        condition(deployment, "Available", enough, reason, message),
        progressing(deployment, text(new, "/metadata/name"), complete, moved),
    ];
    conditions.extend(all.iter().flat_map(|s| list(s, "/status/conditions")).find(|c| c["type"] == "ReplicaFailure").cloned());
    let mut out = json!({
        "observedGeneration": deployment["metadata"]["generation"], "replicas": replicas, "updatedReplicas": updated,
        "readyReplicas": ready, "availableReplicas": available, "conditions": conditions,
    });
    let missing = (plan.replicas - available).max(0);
    if missing > 0 {
        out["unavailableReplicas"] = json!(missing);
    }
    out
}

/// One step of the rollout, and the report.
pub(super) async fn reconcile(api: Api, deployment: Value) -> Again {
    if pods::terminating(&deployment) {
        return Ok(None);
    }
    let (ns, name) = id(&deployment);
    let owned = async || -> Result<Vec<Value>, Status> {
        let mut sets = api.list(&resource::REPLICASETS, Some(&ns), None).await?.items;
        sets.retain(|s| pods::owned(s, &deployment));
        sets.sort_by_key(revision);
        Ok(sets)
    };
    let mut sets = owned().await?;
    let paused = flag(&deployment, "/spec/paused");
    if !paused || sets.is_empty() {
        present(&api, &deployment, &sets).await?;
        sets = owned().await?;
    }
    // A paused deployment is scaled, not rolled out.
    let hash = if paused {
        text(sets.last().unwrap_or(&Value::Null), "/metadata/labels/pod-template-hash").to_owned()
    } else {
        hash(&deployment)
    };
    let (mut new, old): (Vec<Value>, Vec<Value>) = sets.into_iter().partition(|s| s["metadata"]["labels"][HASH] == hash.as_str());
    let Some(new) = new.pop() else { return Ok(Some(Duration::from_millis(50))) };
    let counts: Vec<Count> = old.iter().map(count).collect();
    let (size, sizes) = step(plan(&deployment), count(&new), &counts);
    if paused && old.iter().any(|s| number(s, "/spec/replicas", 0) > 0) {
        // In the middle of a rollout nothing moves.
    } else {
        scale(&api, &deployment, &new, size).await?;
        for (set, size) in old.iter().zip(sizes) {
            scale(&api, &deployment, set, size).await?;
        }
    }
    let keep = number(&deployment, "/spec/revisionHistoryLimit", 10).max(0) as usize;
    let idle: Vec<&Value> = old.iter().filter(|s| count(s) == Count::default()).collect();
    for set in &idle[..idle.len().saturating_sub(keep)] {
        api.delete(&resource::REPLICASETS, Some(&ns), text(set, "/metadata/name"), DeleteOptions::default()).await?;
    }
    let mut current = api.get(&resource::DEPLOYMENTS, Some(&ns), &name).await?;
    if current["metadata"]["generation"] != deployment["metadata"]["generation"] {
        return Ok(Some(Duration::ZERO));
    }
    if revision(&current) != revision(&new) {
        let body = json!({"metadata": {"annotations": {REVISION: revision(&new).to_string()}}});
        current = api.patch(&resource::DEPLOYMENTS, Some(&ns), &name, None, PatchKind::Merge, body).await?;
    }
    let all = owned().await?;
    let new = all.iter().find(|s| s["metadata"]["uid"] == new["metadata"]["uid"]).cloned().unwrap_or(new);
    let status = status(&current, &new, &all);
    let waits = status["conditions"][1]["reason"] == "ReplicaSetUpdated";
    write_status(&api, &resource::DEPLOYMENTS, &current, status).await?;
    // The deadline has to be noticed even if nothing happens.
    Ok(waits.then_some(Duration::from_secs(5)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays a rollout in which pods become available one step later, and checks the bounds in every state.
    fn roll(plan: Plan, mut old: Vec<Count>) -> usize {
        let mut new = Count::default();
        for round in 0..100 {
            let (size, sizes) = step(plan, new, &old);
            let done = new.available == plan.replicas && new.wanted == plan.replicas && old.iter().all(|c| c.pods == 0);
            if done {
                return round;
            }
            new.wanted = size;
            for (count, size) in old.iter_mut().zip(sizes) {
                count.wanted = size;
                count.pods = size;
                count.available = count.available.min(size);
            }
            let total: i64 = new.wanted + old.iter().map(|c| c.wanted).sum::<i64>();
            let available: i64 = new.available + old.iter().map(|c| c.available).sum::<i64>();
            if !plan.recreate {
                assert!(total <= plan.replicas + plan.surge, "too many: {new:?} {old:?}");
                assert!(available >= plan.replicas - plan.unavailable, "too few: {new:?} {old:?}");
            } else {
                assert!(new.wanted == 0 || old.iter().all(|c| c.pods == 0), "both at once: {new:?} {old:?}");
            }
            new.pods = new.wanted;
            if round % 2 == 1 {
                new.available = new.wanted;
            }
        }
        panic!("the rollout never ends: {new:?} {old:?}");
    }

    #[test]
    fn every_rollout_ends_and_never_leaves_its_bounds() {
        for replicas in 1..7 {
            for surge in 0..3 {
                for unavailable in 0..3 {
                    if surge == 0 && unavailable == 0 {
                        continue;
                    }
                    let plan = Plan { replicas, surge, unavailable: unavailable.min(replicas), recreate: false };
                    let full = Count { wanted: replicas, pods: replicas, available: replicas };
                    roll(plan, vec![full]);
                    if replicas > 1 {
                        let a = Count { wanted: 1, pods: 1, available: 1 };
                        let b = Count { wanted: replicas - 1, pods: replicas - 1, available: replicas - 1 };
                        roll(plan, vec![a, b]);
                    }
                }
            }
            let full = Count { wanted: replicas, pods: replicas, available: replicas };
            roll(Plan { replicas, surge: 0, unavailable: 0, recreate: true }, vec![full]);
        }
    }

    #[test]
    fn scaling_needs_no_rollout() {
        let plan = |replicas| Plan { replicas, surge: 1, unavailable: 0, recreate: false };
        let three = Count { wanted: 3, pods: 3, available: 3 };
        assert_eq!(step(plan(5), three, &[]), (5, vec![]));
        assert_eq!(step(plan(1), three, &[]), (1, vec![]));
        assert_eq!(step(plan(0), three, &[]), (0, vec![]));
        // An old version that never became available blocks nothing.
        let broken = Count { wanted: 1, pods: 1, available: 0 };
        assert_eq!(step(plan(3), three, &[broken]), (3, vec![0]));
    }

    #[test]
    fn a_replica_set_carries_the_hash_everywhere() {
        let deployment = json!({"apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {"name": "d", "namespace": "n", "uid": "u", "annotations": {"a": "b", "kubectl.kubernetes.io/last-applied-configuration": "x"}},
            "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "d"}}, "template": {"metadata": {"labels": {"app": "d"}}, "spec": {}}}});
        let set = new_set(&deployment, "abc", 4);
        for pointer in ["/metadata/labels", "/spec/selector/matchLabels", "/spec/template/metadata/labels"] {
            assert_eq!(set.pointer(pointer), Some(&json!({"app": "d", "pod-template-hash": "abc"})), "{pointer}");
        }
        assert_eq!(
            set["metadata"]["annotations"],
            json!({REVISION: "4", "a": "b", "deployment.kubernetes.io/desired-replicas": "2"})
        );
        assert_eq!(revision(&set), 4);
    }
}
