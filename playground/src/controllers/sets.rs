//! StatefulSet and DaemonSet → pods, as far as a mesh can tell: names, order, identity, replacement of outdated pods. Volume
//! claims don't exist here; a StatefulSet that has some says so in an event.

use std::time::Duration;

use serde_json::{Value, json};

use super::{Again, pods, write_status};
use crate::apiserver::{Api, resource};
use crate::json::{digest, list, number, text};

const HASH: &str = "controller-revision-hash";

fn current(pod: &Value, hash: &str) -> bool {
    pod["metadata"]["labels"][HASH] == hash
}

/// What to do next for a StatefulSet.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    Nothing,
    Create(i64),
    Delete(String),
}

/// The one next step: pods are made in order, each when the one before is ready, and replaced from the last to the first.
fn next(set: &Value, pods: &[Value], hash: &str) -> Next {
    let name = text(set, "/metadata/name");
    let ordinal = |p: &Value| text(p, "/metadata/name").strip_prefix(name)?.strip_prefix('-')?.parse::<i64>().ok();
    let parallel = text(set, "/spec/podManagementPolicy") == "Parallel";
    let replicas = number(set, "/spec/replicas", 1);
    let mut found: Vec<(i64, &Value)> = pods.iter().filter_map(|p| Some((ordinal(p)?, p))).collect();
    found.sort_by_key(|(n, _)| *n);
    for n in 0..replicas {
        match found.iter().find(|(m, _)| *m == n) {
            None => return Next::Create(n),
            Some((_, pod)) if pods::ended(pod) && !pods::terminating(pod) => {
                return Next::Delete(text(pod, "/metadata/name").to_owned());
            }
            Some((_, pod)) if !parallel && (pods::terminating(pod) || !pods::ready(pod)) => {
                // An outdated pod that never gets ready must not block its own replacement.
                let stuck = !pods::terminating(pod) && !current(pod, hash);
                return if stuck { Next::Delete(text(pod, "/metadata/name").to_owned()) } else { Next::Nothing };
            }
            Some(_) => {}
        }
    }
    if let Some((_, pod)) = found.iter().rev().find(|(n, _)| *n >= replicas) {
        return if pods::terminating(pod) { Next::Nothing } else { Next::Delete(text(pod, "/metadata/name").to_owned()) };
    }
    let partition = number(set, "/spec/updateStrategy/rollingUpdate/partition", 0);
    if text(set, "/spec/updateStrategy/type") == "OnDelete" || found.iter().any(|(_, p)| pods::terminating(p) || !pods::ready(p))
    {
        return Next::Nothing;
    }
    let outdated = found.iter().rev().find(|(n, p)| *n >= partition && !current(p, hash));
    outdated.map_or(Next::Nothing, |(_, pod)| Next::Delete(text(pod, "/metadata/name").to_owned()))
}

/// StatefulSet.
pub(super) async fn stateful(api: Api, set: Value) -> Again {
    const NAME: &str = "statefulset-controller";
    if pods::terminating(&set) {
        return Ok(None);
    }
    let hash = digest(&set["spec"]["template"]);
    if !list(&set, "/spec/volumeClaimTemplates").is_empty() {
        let message = "The playground has no storage: volumeClaimTemplates are not supported; use an emptyDir volume";
        crate::events::record(&api, NAME, &set, "Warning", "FailedCreate", message).await;
        return Ok(None);
    }
    let all = pods::of(&api, &set).await?;
    let mut again = None;
    match next(&set, &all, &hash) {
        Next::Nothing => {}
        Next::Create(n) => {
            let mut pod = pods::from_template(&set, &set["spec"]["template"]);
            let name = format!("{}-{n}", text(&set, "/metadata/name"));
            if !pod["metadata"]["labels"].is_object() {
                pod["metadata"]["labels"] = json!({});
            }
            pod["metadata"]["labels"]["statefulset.kubernetes.io/pod-name"] = json!(name);
            pod["metadata"]["labels"]["apps.kubernetes.io/pod-index"] = json!(n.to_string());
            pod["metadata"]["labels"][HASH] = json!(hash);
            pod["spec"]["hostname"] = json!(name);
            pod["spec"]["subdomain"] = set["spec"]["serviceName"].clone();
            pod["metadata"]["name"] = json!(name);
            pods::create(&api, NAME, &set, pod).await?;
            again = Some(Duration::ZERO);
        }
        Next::Delete(name) => {
            if let Some(pod) = all.iter().find(|p| p["metadata"]["name"] == name.as_str()) {
                pods::delete(&api, NAME, &set, pod).await?;
            }
        }
    }
    let all: Vec<Value> = pods::of(&api, &set).await?.into_iter().filter(pods::active).collect();
    let ready = all.iter().filter(|p| pods::ready(p)).count();
    let updated = all.iter().filter(|p| current(p, &hash)).count();
    let revision = format!("{}-{hash}", text(&set, "/metadata/name"));
    let before = text(&set, "/status/currentRevision");
    let settled = updated == all.len() || before.is_empty();
    let status = json!({
        "observedGeneration": set["metadata"]["generation"], "replicas": all.len(), "readyReplicas": ready, "availableReplicas": ready,
        "currentReplicas": if settled { updated } else { all.len() - updated }, "updatedReplicas": updated,
        "currentRevision": if settled { &revision } else { before }, "updateRevision": revision, "collisionCount": 0,
    });
    write_status(&api, &resource::STATEFULSETS, &set, status).await?;
    Ok(again)
}

/// DaemonSet: with one node, one pod.
pub(super) async fn daemon(api: Api, set: Value) -> Again {
    const NAME: &str = "daemonset-controller";
    if pods::terminating(&set) {
        return Ok(None);
    }
    let hash = digest(&set["spec"]["template"]);
    let node = api.get(&resource::NODES, None, crate::node::NAME).await?;
    let wanted = crate::json::entries(&set, "/spec/template/spec/nodeSelector").all(|(k, v)| node["metadata"]["labels"][k] == *v);
    let all: Vec<Value> = pods::of(&api, &set).await?;
    let active: Vec<&Value> = all.iter().filter(|p| pods::active(p)).collect();
    let rolling = text(&set, "/spec/updateStrategy/type") != "OnDelete";
    for pod in &all {
        let surplus = !wanted || pods::ended(pod) || rolling && !current(pod, &hash);
        if surplus && !pods::terminating(pod) {
            pods::delete(&api, NAME, &set, pod).await?;
        }
    }
    // The next one comes when the old one is gone: both could need the same port of the node.
    if wanted && all.is_empty() {
        let mut pod = pods::from_template(&set, &set["spec"]["template"]);
        pod["metadata"]["generateName"] = json!(format!("{}-", text(&set, "/metadata/name")));
        if !pod["metadata"]["labels"].is_object() {
            pod["metadata"]["labels"] = json!({});
        }
        pod["metadata"]["labels"][HASH] = json!(hash);
        pods::create(&api, NAME, &set, pod).await?;
    }
    let number_of = |which: &dyn Fn(&Value) -> bool| active.iter().filter(|p| which(p)).count();
    let (ready, desired) = (number_of(&pods::ready), usize::from(wanted));
    let status = json!({
        "observedGeneration": set["metadata"]["generation"], "desiredNumberScheduled": desired, "numberMisscheduled": 0,
        "currentNumberScheduled": active.len().min(1), "updatedNumberScheduled": number_of(&|p| current(p, &hash)),
        "numberReady": ready, "numberAvailable": ready, "numberUnavailable": desired.saturating_sub(ready),
    });
    write_status(&api, &resource::DAEMONSETS, &set, status).await?;
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stateful_pods_come_in_order_and_are_replaced_from_the_end() {
        let set = json!({"metadata": {"name": "s"}, "spec": {"replicas": 2}});
        let pod = |n: u32, ready: bool, hash: &str| {
            json!({"metadata": {"name": format!("s-{n}"), "labels": {HASH: hash}},
                "status": {"conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]}})
        };
        assert_eq!(next(&set, &[], "a"), Next::Create(0));
        assert_eq!(next(&set, &[pod(0, false, "a")], "a"), Next::Nothing);
        assert_eq!(next(&set, &[pod(0, true, "a")], "a"), Next::Create(1));
        assert_eq!(next(&set, &[pod(0, true, "a"), pod(1, true, "a")], "b"), Next::Delete("s-1".into()));
        assert_eq!(next(&set, &[pod(0, true, "a"), pod(1, false, "b")], "b"), Next::Nothing);
        assert_eq!(next(&set, &[pod(0, false, "a"), pod(1, true, "b")], "b"), Next::Delete("s-0".into()));
        assert_eq!(next(&set, &[pod(0, true, "a"), pod(1, true, "a"), pod(2, true, "a")], "a"), Next::Delete("s-2".into()));
    }
}
