//! Job → pods: until enough have succeeded, or too many have failed. A native sidecar doesn't keep a pod from ending, so it doesn't
//! keep a Job from completing.

use std::time::Duration;

use futures::future::join_all;
use serde_json::{Value, json};

use super::{Again, condition, pods, write_status};
use crate::apiserver::{Api, DeleteOptions, resource};
use crate::json::{flag, list, number, text};

const NAME: &str = "job-controller";

/// How a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Tally {
    active: i64,
    ready: i64,
    succeeded: i64,
    failed: i64,
    /// Restarts of containers in pods that still run (`restartPolicy: OnFailure`).
    restarts: i64,
}

fn tally(pods: &[Value]) -> Tally {
    let mut out = Tally::default();
    for pod in pods {
        match text(pod, "/status/phase") {
            "Succeeded" => out.succeeded += 1,
            "Failed" => out.failed += 1,
            _ if pods::terminating(pod) => {}
            _ => {
                out.active += 1;
                out.ready += i64::from(pods::ready(pod));
                out.restarts += list(pod, "/status/containerStatuses").iter().map(|c| number(c, "/restartCount", 0)).sum::<i64>();
            }
        }
    }
    out
}

/// What a job is about to do.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// Complete.
    Complete,
    /// Failed, with reason and message.
    Failed(&'static str, &'static str),
    /// This many pods more (or fewer).
    Run(i64),
}

fn verdict(job: &Value, tally: Tally, age: Option<i64>) -> Verdict {
    let parallelism = number(job, "/spec/parallelism", 1);
    // Without `completions` one success is enough, and no pod is started after it.
    let completions = job["spec"]["completions"].as_i64();
    let done = match completions {
        Some(n) => tally.succeeded >= n,
        None => tally.succeeded > 0 && tally.active == 0,
    };
    if done {
        return Verdict::Complete;
    }
    let on_failure = text(job, "/spec/template/spec/restartPolicy") == "OnFailure";
    let failures = tally.failed + if on_failure { tally.restarts } else { 0 };
    if failures > number(job, "/spec/backoffLimit", 6) {
        return Verdict::Failed("BackoffLimitExceeded", "Job has reached the specified backoff limit");
    }
    if let (Some(age), Some(limit)) = (age, job["spec"]["activeDeadlineSeconds"].as_i64())
        && age >= limit
    {
        return Verdict::Failed("DeadlineExceeded", "Job was active longer than specified deadline");
    }
    let wanted = match completions {
        _ if flag(job, "/spec/suspend") => 0,
        Some(n) => parallelism.min(n - tally.succeeded),
        None if tally.succeeded > 0 => tally.active.min(parallelism),
        None => parallelism,
    };
    Verdict::Run(wanted - tally.active)
}

fn finished(job: &Value) -> Option<&Value> {
    list(job, "/status/conditions").iter().find(|c| ["Complete", "Failed"].contains(&text(c, "/type")) && c["status"] == "True")
}

/// Removes a finished job when its time to live is over.
async fn expire(api: &Api, job: &Value, end: &Value) -> Again {
    let Some(life) = job["spec"]["ttlSecondsAfterFinished"].as_i64() else { return Ok(None) };
    let ended = pods::seconds(text(end, "/lastTransitionTime")).unwrap_or(0);
    let left = ended + life - crate::apiserver::api::seconds();
    if left > 0 {
        return Ok(Some(Duration::from_secs(left as u64)));
    }
    let options = DeleteOptions { propagation: Some("Background".into()), ..DeleteOptions::default() };
    api.delete(&resource::JOBS, Some(text(job, "/metadata/namespace")), text(job, "/metadata/name"), options).await?;
    Ok(None)
}

/// Starts pods, or ends the job.
pub(super) async fn reconcile(api: Api, job: Value) -> Again {
    if pods::terminating(&job) {
        return Ok(None);
    }
    if let Some(end) = finished(&job) {
        return expire(&api, &job, end).await;
    }
    let all = pods::of(&api, &job).await?;
    let now = crate::apiserver::api::seconds();
    let started = pods::seconds(text(&job, "/status/startTime"));
    let count = tally(&all);
    let verdict = verdict(&job, count, started.map(|s| now - s));
    let mut status = json!({
        "startTime": started.map_or_else(|| json!(crate::now()), |_| job["status"]["startTime"].clone()),
        "active": count.active, "ready": count.ready, "succeeded": count.succeeded, "failed": count.failed, "terminating": 0,
    });
    if flag(&job, "/spec/suspend") {
        status["conditions"] = json!([condition(&job, "Suspended", true, "JobSuspended", "Job suspended")]);
    }
    let active = || all.iter().filter(|p| pods::active(p));
    let mut again = job["spec"]["activeDeadlineSeconds"].as_i64().map(|s| Duration::from_secs(s.max(1) as u64));
    match verdict {
        Verdict::Complete | Verdict::Failed(..) => {
            join_all(active().map(|p| pods::delete(&api, NAME, &job, p))).await;
            status["active"] = json!(0);
            status["ready"] = json!(0);
            let (kinds, reason, message) = match verdict {
                Verdict::Failed(reason, message) => (["FailureTarget", "Failed"], reason, message),
                _ => (["SuccessCriteriaMet", "Complete"], "CompletionsReached", "Reached expected number of succeeded pods"),
            };
            status["conditions"] = kinds.map(|k| condition(&job, k, true, reason, message)).into_iter().collect();
            if kinds[1] == "Complete" {
                status["completionTime"] = json!(crate::now());
                crate::events::record(&api, NAME, &job, "Normal", "Completed", "Job completed").await;
            } else {
                crate::events::record(&api, NAME, &job, "Warning", reason, message).await;
            }
            again = None;
        }
        Verdict::Run(more) if more > 0 => {
            // After failures pods come slower: 10 s, 20 s, … since the last one.
            let last = all
                .iter()
                .filter(|p| text(p, "/status/phase") == "Failed")
                .filter_map(|p| pods::seconds(text(p, "/metadata/creationTimestamp")))
                .max();
            let pause = if count.failed == 0 { 0 } else { 10 << (count.failed - 1).min(5) };
            let due = last.map_or(0, |last| last + pause - now);
            if due > 0 {
                again = Some(Duration::from_secs(due as u64));
            } else {
                let mut pod = pods::from_template(&job, &job["spec"]["template"]);
                pod["metadata"]["generateName"] = json!(format!("{}-", text(&job, "/metadata/name")));
                for made in join_all((0..more).map(|_| pods::create(&api, NAME, &job, pod.clone()))).await {
                    made?;
                }
                again = Some(Duration::from_millis(50));
            }
        }
        Verdict::Run(more) => {
            let surplus = pods::least_missed(active().cloned().collect(), usize::try_from(-more).unwrap_or(0));
            join_all(surplus.iter().map(|p| pods::delete(&api, NAME, &job, p))).await;
        }
    }
    write_status(&api, &resource::JOBS, &job, status).await?;
    Ok(again)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_runs_until_enough_have_succeeded_or_too_many_failed() {
        let job = |spec: Value| json!({ "spec": spec });
        let count = |active, succeeded, failed| Tally { active, succeeded, failed, ..Tally::default() };
        let three = job(json!({"completions": 3, "parallelism": 2, "backoffLimit": 1}));
        assert_eq!(verdict(&three, count(0, 0, 0), None), Verdict::Run(2));
        assert_eq!(verdict(&three, count(1, 2, 0), None), Verdict::Run(0));
        assert_eq!(verdict(&three, count(0, 3, 0), None), Verdict::Complete);
        assert_eq!(verdict(&three, count(0, 0, 1), None), Verdict::Run(2));
        assert!(matches!(verdict(&three, count(0, 0, 2), None), Verdict::Failed("BackoffLimitExceeded", _)));
        let queue = job(json!({"parallelism": 2}));
        assert_eq!(verdict(&queue, count(2, 0, 0), None), Verdict::Run(0));
        assert_eq!(verdict(&queue, count(1, 1, 0), None), Verdict::Run(0));
        assert_eq!(verdict(&queue, count(0, 1, 0), None), Verdict::Complete);
        let late = job(json!({"completions": 1, "activeDeadlineSeconds": 5}));
        assert!(matches!(verdict(&late, count(1, 0, 0), Some(5)), Verdict::Failed("DeadlineExceeded", _)));
        assert_eq!(verdict(&job(json!({"completions": 1, "suspend": true})), count(1, 0, 0), None), Verdict::Run(-1));
        let again = Tally { active: 1, restarts: 7, ..Tally::default() };
        let retrying = job(json!({"completions": 1, "template": {"spec": {"restartPolicy": "OnFailure"}}}));
        assert!(matches!(verdict(&retrying, again, None), Verdict::Failed(..)));
    }
}
