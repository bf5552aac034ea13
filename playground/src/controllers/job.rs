//! Jobs.

use serde_json::{Value, json};

use super::{Context, controller, deleting, put_condition, seconds_since};
use crate::apiserver::resource;
use crate::json::{condition, list, number, text};

pub(super) async fn pass(cx: &mut Context) {
    for job in cx.all(&resource::JOBS).await.iter().filter(|j| !deleting(j)) {
        sync(cx, job).await;
    }
}

fn over(job: &Value) -> bool {
    condition(job, "Complete") || condition(job, "Failed")
}

async fn sync(cx: &mut Context, job: &Value) {
    if over(job) {
        let ttl = job.pointer("/spec/ttlSecondsAfterFinished").and_then(Value::as_i64);
        let since = list(job, "/status/conditions").iter().find_map(|c| seconds_since(text(c, "/lastTransitionTime")));
        if ttl.zip(since).is_some_and(|(ttl, since)| since >= ttl) {
            cx.delete(&resource::JOBS, job).await;
        }
        return;
    }
    let uid = text(job, "/metadata/uid");
    let pods = cx.all(&resource::PODS).await;
    let mine: Vec<&Value> = pods.iter().filter(|p| controller(p) == uid).collect();
    let phase = |p: &Value, phase: &str| text(p, "/status/phase") == phase;
    let succeeded = mine.iter().filter(|p| phase(p, "Succeeded")).count() as i64;
    let failed: Vec<&&Value> = mine.iter().filter(|p| phase(p, "Failed")).collect();
    let active: Vec<&&Value> = mine.iter().filter(|p| !phase(p, "Succeeded") && !phase(p, "Failed") && !deleting(p)).collect();
    let parallelism = number(job, "/spec/parallelism", 1).max(0);
    let completions = number(job, "/spec/completions", 1).max(0);
    let restarts: i64 = active.iter().flat_map(|p| list(p, "/status/containerStatuses")).map(|s| number(s, "/restartCount", 0)).sum();
    let limit = number(job, "/spec/backoffLimit", 6);
    let deadline = job.pointer("/spec/activeDeadlineSeconds").and_then(Value::as_i64);
    let age = seconds_since(text(job, "/status/startTime")).unwrap_or(0);
    let mut conditions = list(job, "/status/conditions").to_vec();
    let failure = if failed.len() as i64 + restarts > limit {
        Some(("BackoffLimitExceeded", "Job has reached the specified backoff limit"))
    } else if deadline.is_some_and(|d| age >= d) {
        Some(("DeadlineExceeded", "Job was active longer than specified deadline"))
    } else {
        None
    };
    let now = crate::now();
    let started = if text(job, "/status/startTime").is_empty() { json!(now) } else { job["status"]["startTime"].clone() };
    let mut status = json!({"startTime": started, "active": active.len(), "succeeded": succeeded, "failed": failed.len(),
        "ready": active.iter().filter(|p| condition(p, "Ready")).count(), "terminating": mine.iter().filter(|p| deleting(p)).count(), "uncountedTerminatedPods": {}});
    if succeeded >= completions && failure.is_none() {
        for pod in &active {
            cx.delete(&resource::PODS, pod).await;
        }
        put_condition(&mut conditions, "SuccessCriteriaMet", "True", "CompletionsReached", "Reached expected number of succeeded pods");
        put_condition(&mut conditions, "Complete", "True", "CompletionsReached", "Reached expected number of succeeded pods");
        status["completionTime"] = json!(now);
        status["active"] = json!(0);
    } else if let Some((reason, message)) = failure {
        for pod in &active {
            cx.delete(&resource::PODS, pod).await;
        }
        put_condition(&mut conditions, "FailureTarget", "True", reason, message);
        put_condition(&mut conditions, "Failed", "True", reason, message);
        status["active"] = json!(0);
    } else if job["spec"]["suspend"] == true {
        for pod in &active {
            cx.delete(&resource::PODS, pod).await;
        }
        put_condition(&mut conditions, "Suspended", "True", "JobSuspended", "Job suspended");
    } else {
        let wanted = parallelism.min(completions - succeeded);
        // After a failure the next pod waits, twice as long each time.
        let pause = if failed.is_empty() { 0 } else { (10_i64 << (failed.len() - 1).min(6)).min(360) };
        let ends = failed.iter().flat_map(|p| list(p, "/status/containerStatuses")).filter_map(|s| seconds_since(text(s, "/state/terminated/finishedAt")));
        if ends.min().is_none_or(|since| since >= pause) {
            for _ in active.len() as i64..wanted {
                if cx.create_pod(job, "Job", "batch/v1", None).await.is_err() {
                    break;
                }
            }
        }
    }
    if !conditions.is_empty() {
        status["conditions"] = json!(conditions);
    }
    cx.status(&resource::JOBS, job, status).await;
}
