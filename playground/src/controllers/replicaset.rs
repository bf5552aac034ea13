//! ReplicaSet → pods.

use std::time::Duration;

use futures::future::join_all;
use serde_json::{Value, json};

use super::{Again, condition, pods, write_status};
use crate::apiserver::{Api, resource};
use crate::json::{entries, number, text};

const NAME: &str = "replicaset-controller";
/// Pods that are created at a time; the real controller starts slowly too, so that a quota or a webhook isn't stormed.
const BURST: i64 = 20;

/// Creates what is missing, deletes what is too much, reports.
pub(super) async fn reconcile(api: Api, set: Value) -> Again {
    let all = pods::of(&api, &set).await?;
    let active: Vec<Value> = all.into_iter().filter(pods::active).collect();
    let mut refused = None;
    if !pods::terminating(&set) {
        let missing = number(&set, "/spec/replicas", 1) - active.len() as i64;
        if missing > 0 {
            let mut pod = pods::from_template(&set, &set["spec"]["template"]);
            pod["metadata"]["generateName"] = json!(format!("{}-", text(&set, "/metadata/name")));
            let made = join_all((0..missing.min(BURST)).map(|_| pods::create(&api, NAME, &set, pod.clone()))).await;
            refused = made.into_iter().find_map(Result::err);
        } else {
            let surplus = pods::least_missed(active.clone(), usize::try_from(-missing).unwrap_or(0));
            for result in join_all(surplus.iter().map(|pod| pods::delete(&api, NAME, &set, pod))).await {
                result?;
            }
        }
    }
    // Counted anew, with what was just made and removed.
    let now: Vec<Value> = pods::of(&api, &set).await?.into_iter().filter(pods::active).collect();
    let minimum = number(&set, "/spec/minReadySeconds", 0);
    let waits: Vec<i64> = now.iter().filter_map(|p| pods::until_available(p, minimum)).collect();
    let labelled =
        now.iter().filter(|p| entries(&set, "/spec/template/metadata/labels").all(|(k, v)| p["metadata"]["labels"][k] == *v));
    let mut status = json!({
        "replicas": now.len(), "fullyLabeledReplicas": labelled.count(), "readyReplicas": waits.len(),
        "availableReplicas": waits.iter().filter(|w| **w == 0).count(), "observedGeneration": set["metadata"]["generation"],
    });
    if let Some(e) = &refused {
        status["conditions"] = json!([condition(&set, "ReplicaFailure", true, "FailedCreate", &e.message)]);
    }
    write_status(&api, &resource::REPLICASETS, &set, status).await?;
    match refused {
        Some(e) => Err(e),
        None => Ok(waits.into_iter().filter(|w| *w > 0).min().map(|w| Duration::from_secs(w as u64 + 1))),
    }
}
