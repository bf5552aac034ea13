//! Deployments: one ReplicaSet per template, and the steps from the old ones to the new one.

use serde_json::{Value, json};

use super::{Context, controller, deleting, put_condition};
use crate::apiserver::{PatchKind, resource};
use crate::json::{digest, entries, flag, id, list, number, text};

const REVISION: &str = "deployment.kubernetes.io/revision";
const HASH: &str = "pod-template-hash";

/// How many more and how many fewer pods a roll may have. Percentages: surge is rounded up, unavailability down.
fn bounds(deployment: &Value, replicas: i64) -> (i64, i64) {
    let read = |key: &str, up: bool| {
        let value = deployment.pointer(&format!("/spec/strategy/rollingUpdate/{key}"));
        if let Some(n) = value.and_then(Value::as_i64) {
            return n;
        }
        let percent: i64 = value.and_then(Value::as_str).and_then(|s| s.trim_end_matches('%').parse().ok()).unwrap_or(25);
        if up { (replicas * percent + 99) / 100 } else { replicas * percent / 100 }
    };
    let (surge, unavailable) = (read("maxSurge", true), read("maxUnavailable", false));
    if surge == 0 && unavailable == 0 { (0, 1) } else { (surge, unavailable) }
}

/// What a ReplicaSet has: wanted pods, pods, available pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Count {
    wanted: i64,
    pods: i64,
    available: i64,
}

/// The next step of a rolling update: how many pods the new set and each of the old ones (oldest first) should have.
fn step(replicas: i64, (surge, unavailable): (i64, i64), new: Count, old: &[Count]) -> (i64, Vec<i64>) {
    let mut olds: Vec<i64> = old.iter().map(|c| c.wanted).collect();
    let total = new.wanted + olds.iter().sum::<i64>();
    if new.wanted > replicas {
        return (replicas, olds);
    }
    let grown = new.wanted + (replicas + surge - total).clamp(0, replicas - new.wanted);
    if grown > new.wanted {
        return (grown, olds);
    }
    let floor = replicas - unavailable;
    let mut spare = total - floor - (new.wanted - new.available).max(0);
    // Pods that don't work anyway go first, they cost nothing.
    for (n, count) in old.iter().enumerate() {
        let broken = (count.wanted - count.available).clamp(0, spare.max(0));
        olds[n] -= broken;
        spare -= broken;
    }
    let mut working = new.available + old.iter().map(|c| c.available).sum::<i64>() - floor;
    for wanted in &mut olds {
        let down = (*wanted).clamp(0, working.max(0).min(spare.max(0)));
        *wanted -= down;
        working -= down;
        spare -= down;
    }
    (new.wanted, olds)
}

fn without_hash(template: &Value) -> Value {
    let mut copy = template.clone();
    if let Some(labels) = copy.pointer_mut("/metadata/labels").and_then(Value::as_object_mut) {
        labels.remove(HASH);
    }
    if let Some(metadata) = copy.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.retain(|_, v| !v.is_null());
    }
    copy
}

fn revision(set: &Value) -> i64 {
    entries(set, "/metadata/annotations").find(|(k, _)| *k == REVISION).and_then(|(_, v)| v.parse().ok()).unwrap_or(0)
}

fn count(set: &Value) -> Count {
    Count { wanted: number(set, "/spec/replicas", 0), pods: number(set, "/status/replicas", 0), available: number(set, "/status/availableReplicas", 0) }
}

async fn scale(cx: &Context, set: &Value, replicas: i64) {
    if number(set, "/spec/replicas", 0) == replicas {
        return;
    }
    let (ns, name) = id(set);
    let patch = json!({"spec": {"replicas": replicas}});
    if let Err(e) = cx.api.patch(&resource::REPLICASETS, Some(&ns), &name, None, PatchKind::Merge, patch).await {
        tracing::warn!("scaling of replicaset {ns}/{name}: {e}");
    }
}

async fn create_set(cx: &Context, deployment: &Value, number: i64) -> Option<Value> {
    let (ns, name) = id(deployment);
    let mut template = deployment["spec"]["template"].clone();
    let hash = digest(&json!([without_hash(&template), deployment["status"]["collisionCount"]]));
    template["metadata"]["labels"][HASH] = json!(hash);
    let mut selector = deployment["spec"]["selector"].clone();
    selector["matchLabels"][HASH] = json!(hash);
    let mut annotations = deployment["metadata"]["annotations"].as_object().cloned().unwrap_or_default();
    annotations.retain(|k, _| k != "kubectl.kubernetes.io/last-applied-configuration" && k != REVISION);
    annotations.insert(REVISION.into(), json!(number.to_string()));
    let set = json!({
        "apiVersion": "apps/v1", "kind": "ReplicaSet",
        "metadata": {"name": format!("{name}-{hash}"), "namespace": ns, "labels": template["metadata"]["labels"], "annotations": annotations,
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "Deployment", "name": name, "uid": deployment["metadata"]["uid"], "controller": true, "blockOwnerDeletion": true}]},
        "spec": {"replicas": 0, "selector": selector, "template": template, "minReadySeconds": deployment["spec"].get("minReadySeconds").cloned().unwrap_or(json!(0))}
    });
    match cx.api.create(&resource::REPLICASETS, Some(&ns), set).await {
        Ok(set) => Some(set),
        Err(e) => {
            tracing::warn!("replicaset for deployment {ns}/{name}: {e}");
            None
        }
    }
}

async fn annotate(cx: &Context, gvr: &resource::Gvr, object: &Value, number: i64) {
    let (ns, name) = id(object);
    if revision(object) != number {
        let patch = json!({"metadata": {"annotations": {REVISION: number.to_string()}}});
        let _ = cx.api.patch(gvr, Some(&ns), &name, None, PatchKind::Merge, patch).await;
    }
}

pub(super) async fn pass(cx: &Context) {
    for deployment in cx.all(&resource::DEPLOYMENTS).await.iter().filter(|d| !deleting(d)) {
        sync(cx, deployment).await;
    }
}

async fn sync(cx: &Context, deployment: &Value) {
    let (ns, _) = id(deployment);
    let uid = text(deployment, "/metadata/uid");
    let load = async || -> Vec<Value> {
        let all = cx.api.list(&resource::REPLICASETS, Some(&ns), None).await.map(|l| l.items).unwrap_or_default();
        let mut mine: Vec<Value> = all.into_iter().filter(|s| controller(s) == uid && !deleting(s)).collect();
        mine.sort_by_key(revision);
        mine
    };
    let sets = load().await;
    let template = without_hash(&deployment["spec"]["template"]);
    let highest = sets.iter().map(revision).max().unwrap_or(0);
    let is_new = |set: &Value| without_hash(&set["spec"]["template"]) == template;
    let replicas = number(deployment, "/spec/replicas", 1).max(0);
    let paused = flag(deployment, "/spec/paused");
    let new = match sets.iter().find(|s| is_new(s)) {
        Some(set) => Some(set.clone()),
        None if paused => None,
        None => create_set(cx, deployment, highest + 1).await,
    };
    let old: Vec<&Value> = sets.iter().filter(|s| !is_new(s)).collect();
    if let Some(new) = &new {
        // An older template that is wanted again gets the next number: that is what undoing is.
        let number = if revision(new) < highest { highest + 1 } else { revision(new) };
        annotate(cx, &resource::REPLICASETS, new, number).await;
        annotate(cx, &resource::DEPLOYMENTS, deployment, number).await;
        let counts: Vec<Count> = old.iter().map(|s| count(s)).collect();
        if paused {
            let others: i64 = counts.iter().map(|c| c.wanted).sum();
            scale(cx, new, (replicas - others).max(0)).await;
        } else if text(deployment, "/spec/strategy/type") == "Recreate" {
            for set in &old {
                scale(cx, set, 0).await;
            }
            let pods = cx.api.list(&resource::PODS, Some(&ns), None).await.map(|l| l.items).unwrap_or_default();
            if !pods.iter().any(|p| old.iter().any(|s| controller(p) == text(s, "/metadata/uid"))) {
                scale(cx, new, replicas).await;
            }
        } else {
            let (wanted, olds) = step(replicas, bounds(deployment, replicas), count(new), &counts);
            scale(cx, new, wanted).await;
            for (set, wanted) in old.iter().zip(olds) {
                scale(cx, set, wanted).await;
            }
        }
    }
    let keep = number(deployment, "/spec/revisionHistoryLimit", 10).max(0) as usize;
    let idle: Vec<&&Value> = old.iter().filter(|s| count(s) == Count { wanted: 0, pods: 0, available: 0 }).collect();
    for set in idle.iter().take(idle.len().saturating_sub(keep)) {
        cx.delete(&resource::REPLICASETS, set).await;
    }
    write_status(cx, deployment, &load().await, replicas, is_new).await;
}

async fn write_status(cx: &Context, seen: &Value, sets: &[Value], replicas: i64, is_new: impl Fn(&Value) -> bool) {
    let (ns, name) = id(seen);
    let Ok(deployment) = cx.api.get(&resource::DEPLOYMENTS, Some(&ns), &name).await else { return };
    if deployment["metadata"]["generation"] != seen["metadata"]["generation"] {
        return;
    }
    let sum = |key: &str, new_only: bool| -> i64 {
        sets.iter().filter(|s| !new_only || is_new(s)).map(|s| number(s, &format!("/status/{key}"), 0)).sum()
    };
    let (all, ready, available) = (sum("replicas", false), sum("readyReplicas", false), sum("availableReplicas", false));
    let updated = sum("replicas", true);
    let current = sets.iter().find(|s| is_new(s));
    let set_name = current.map_or("", |s| text(s, "/metadata/name"));
    let mut conditions = list(&deployment, "/status/conditions").to_vec();
    let (_, unavailable) = bounds(&deployment, replicas);
    if available >= replicas - unavailable {
        put_condition(&mut conditions, "Available", "True", "MinimumReplicasAvailable", "Deployment has minimum availability.");
    } else {
        put_condition(&mut conditions, "Available", "False", "MinimumReplicasUnavailable", "Deployment does not have minimum availability.");
    }
    let complete = updated == replicas && all == replicas && sum("availableReplicas", true) >= replicas;
    let before = (number(&deployment, "/status/updatedReplicas", 0), number(&deployment, "/status/availableReplicas", 0), number(&deployment, "/status/replicas", 0));
    let progressing = conditions.iter().find(|c| c["type"] == "Progressing").cloned().unwrap_or_default();
    let idle = super::seconds_since(text(&progressing, "/lastUpdateTime")).unwrap_or(0);
    if complete {
        let message = format!("ReplicaSet \"{set_name}\" has successfully progressed.");
        put_condition(&mut conditions, "Progressing", "True", "NewReplicaSetAvailable", &message);
    } else if before != (updated, available, all) || progressing.is_null() || progressing["reason"] == "NewReplicaSetAvailable" {
        conditions.retain(|c| c["type"] != "Progressing");
        let message = format!("ReplicaSet \"{set_name}\" is progressing.");
        put_condition(&mut conditions, "Progressing", "True", "ReplicaSetUpdated", &message);
    } else if idle > number(&deployment, "/spec/progressDeadlineSeconds", 600) {
        let message = format!("ReplicaSet \"{set_name}\" has timed out progressing.");
        put_condition(&mut conditions, "Progressing", "False", "ProgressDeadlineExceeded", &message);
    }
    conditions.retain(|c| c["type"] != "ReplicaFailure");
    conditions.extend(current.into_iter().flat_map(|s| list(s, "/status/conditions")).filter(|c| c["type"] == "ReplicaFailure").cloned());
    let mut status = json!({
        "observedGeneration": deployment["metadata"]["generation"], "replicas": all, "updatedReplicas": updated,
        "readyReplicas": ready, "availableReplicas": available, "unavailableReplicas": (all.max(replicas) - available).max(0), "conditions": conditions,
    });
    // Zero is written as nothing, as clients know it; `replicas` and its kin are kept so that a reader can compare them.
    if status["unavailableReplicas"] == 0
        && let Some(map) = status.as_object_mut()
    {
        map.remove("unavailableReplicas");
    }
    cx.status(&resource::DEPLOYMENTS, &deployment, status).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_roll_never_leaves_its_bounds_and_ends() {
        for replicas in 0..8_i64 {
            for percent in [(1, 0), (0, 1), (2, 3), (replicas.max(1), 0)] {
                let full = |n| Count { wanted: n, pods: n, available: n };
                let (mut new, mut old) = (full(0), vec![full(replicas)]);
                let mut rounds = 0;
                while new != full(replicas) || old[0].wanted != 0 {
                    let (n, o) = step(replicas, percent, new, &old);
                    assert!(n + o[0] <= replicas + percent.0, "surge {percent:?} of {replicas}: {n} + {o:?}");
                    // Pods of the new set become available one at a time, and after the step.
                    let available = (new.available + 1).min(n);
                    assert!(new.available + o[0] >= replicas - percent.1, "available {percent:?} of {replicas}");
                    new = Count { wanted: n, pods: n, available };
                    old = vec![full(o[0])];
                    rounds += 1;
                    assert!(rounds < 100, "{percent:?} of {replicas} doesn't end");
                }
            }
        }
    }

    #[test]
    fn broken_old_pods_go_first_and_unready_new_ones_hold_the_roll() {
        let c = |wanted, available| Count { wanted, pods: wanted, available };
        assert_eq!(step(3, (1, 0), c(1, 0), &[c(3, 3)]), (1, vec![3]));
        assert_eq!(step(3, (1, 0), c(1, 1), &[c(3, 2)]), (1, vec![2]));
        assert_eq!(step(2, (1, 0), c(5, 5), &[]), (2, vec![]));
    }

    #[test]
    fn percentages_round_as_kubernetes_does() {
        assert_eq!(bounds(&json!({}), 3), (1, 0));
        assert_eq!(bounds(&json!({"spec": {"strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": "50%"}}}}), 3), (0, 1));
        assert_eq!(bounds(&json!({"spec": {"strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 0}}}}), 3), (0, 1));
    }
}
