//! The status of a pod as `kubectl` shows it, from the states of its containers. Pure.

use serde_json::{Value, json};

use super::container::{Container, Kind, Phase, State};
use crate::json::{condition, list, text};

/// What is known about a pod besides its containers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Facts {
    /// Its addresses; empty until its network is there.
    pub addresses: Vec<String>,
    /// The address of the node.
    pub host: String,
    /// When the node took it.
    pub started: String,
    /// `Succeeded` or `Failed`, when it has ended.
    pub end: Option<&'static str>,
    /// The time for conditions that change now.
    pub now: String,
}

fn initialized(containers: &[(&Container, State)]) -> bool {
    containers.iter().all(|(c, s)| match c.kind {
        Kind::Init => s.finished && matches!(&s.phase, Phase::Ended(e) if e.code == 0),
        Kind::Sidecar => s.started || s.finished,
        Kind::Main => true,
    })
}

/// The phase of a pod that hasn't ended.
fn phase(pod: &Value, containers: &[(&Container, State)]) -> &'static str {
    let waiting = |s: &State| matches!(s.phase, Phase::Waiting { .. }) && s.last.is_none();
    let begun = containers.iter().any(|(c, s)| c.kind == Kind::Main && s.runs > 0);
    let pending = !begun && !initialized(containers) || containers.iter().any(|(c, s)| c.kind == Kind::Main && waiting(s));
    // A pod doesn't fall back once it has been running.
    if pending && text(pod, "/status/phase") != "Running" { "Pending" } else { "Running" }
}

fn state(phase: &Phase, id: &str) -> Value {
    match phase {
        Phase::Waiting { reason, message } if message.is_empty() => json!({"waiting": {"reason": reason}}),
        Phase::Waiting { reason, message } => json!({"waiting": {"reason": reason, "message": message}}),
        Phase::Running { since } => json!({"running": {"startedAt": since}}),
        Phase::Ended(e) => {
            let mut out = json!({"exitCode": e.code, "reason": e.reason, "startedAt": e.started, "finishedAt": e.finished, "containerID": id});
            if !e.message.is_empty() {
                out["message"] = json!(e.message);
            }
            json!({ "terminated": out })
        }
    }
}

fn container(uid: &str, c: &Container, s: &State) -> Value {
    let id = |run: u32| format!("playground://{uid}/{}/{run}", c.name);
    let image = text(&c.spec, "/image");
    let ready = match (&s.phase, c.kind) {
        (Phase::Ended(e), Kind::Init) => e.code == 0,
        (Phase::Running { .. }, _) => s.ready,
        _ => false,
    };
    let mut out = json!({
        "name": c.name, "image": image, "imageID": if s.runs > 0 { format!("playground://{image}") } else { String::new() },
        "ready": ready, "started": matches!(s.phase, Phase::Running { .. }) && s.started,
        "restartCount": s.runs.saturating_sub(1), "state": state(&s.phase, &id(s.runs)), "lastState": {},
    });
    if s.runs > 0 {
        out["containerID"] = json!(id(s.runs));
    }
    if let Some(last) = &s.last {
        out["lastState"] = state(&Phase::Ended(last.clone()), &id(s.runs.saturating_sub(1)));
    }
    out
}

fn names(containers: &[&str]) -> String {
    format!("[{}]", containers.join(" "))
}

/// The whole status. `pod` is the object as it is now: what others wrote into its conditions is kept.
pub(crate) fn status(pod: &Value, containers: &[(&Container, State)], facts: &Facts) -> Value {
    let unready: Vec<&str> = containers
        .iter()
        .filter(|(c, s)| c.kind != Kind::Init && !(s.ready && matches!(s.phase, Phase::Running { .. })))
        .map(|(c, _)| c.name.as_str())
        .collect();
    let uninitialized: Vec<&str> =
        containers.iter().filter(|(c, s)| !initialized(&[(c, s.clone())])).map(|(c, _)| c.name.as_str()).collect();
    let gates = list(pod, "/spec/readinessGates").iter().map(|g| text(g, "/conditionType")).find(|g| !condition(pod, g));
    let not_ready = match (facts.end, unready.is_empty(), gates) {
        (Some("Succeeded"), _, _) => Some(("PodCompleted", String::new())),
        (Some(_), _, _) => Some(("PodFailed", String::new())),
        (None, false, _) => Some(("ContainersNotReady", format!("containers with unready status: {}", names(&unready)))),
        (None, true, Some(gate)) => {
            Some(("ReadinessGatesNotReady", format!("corresponding condition of pod readiness gate \"{gate}\" does not exist.")))
        }
        (None, true, None) => None,
    };
    let unready_containers = if gates.is_some() && unready.is_empty() && facts.end.is_none() { None } else { not_ready.clone() };
    let init = if uninitialized.is_empty() || facts.end == Some("Succeeded") {
        None
    } else {
        Some(("ContainersNotInitialized", format!("containers with incomplete status: {}", names(&uninitialized))))
    };
    let network = if facts.addresses.is_empty() || facts.end.is_some() { Some(("", String::new())) } else { None };
    let own = [
        ("PodReadyToStartContainers", network),
        ("Initialized", init),
        ("Ready", not_ready),
        ("ContainersReady", unready_containers),
        ("PodScheduled", None),
    ];
    let before = list(pod, "/status/conditions");
    let mut conditions: Vec<Value> = own
        .iter()
        .map(|(kind, problem)| {
            let status = if problem.is_none() { "True" } else { "False" };
            let since = before.iter().find(|c| c["type"] == *kind && c["status"] == status).map(|c| c["lastTransitionTime"].clone());
            let mut out = json!({"type": kind, "status": status, "lastProbeTime": null, "lastTransitionTime": since.unwrap_or_else(|| json!(facts.now))});
            if let Some((reason, message)) = problem {
                if !reason.is_empty() {
                    out["reason"] = json!(reason);
                }
                if !message.is_empty() {
                    out["message"] = json!(message);
                }
            }
            out
        })
        .collect();
    conditions.extend(before.iter().filter(|c| own.iter().all(|(kind, _)| c["type"] != *kind)).cloned());
    let uid = text(pod, "/metadata/uid");
    let of = |init: bool| -> Vec<Value> {
        containers.iter().filter(|(c, _)| (c.kind != Kind::Main) == init).map(|(c, s)| container(uid, c, s)).collect()
    };
    let mut out = json!({
        "phase": facts.end.unwrap_or_else(|| phase(pod, containers)), "conditions": conditions, "hostIP": facts.host,
        "hostIPs": [{"ip": facts.host}], "startTime": facts.started, "qosClass": qos(pod), "containerStatuses": of(false),
    });
    let inits = of(true);
    if !inits.is_empty() {
        out["initContainerStatuses"] = json!(inits);
    }
    if let Some(first) = facts.addresses.first() {
        out["podIP"] = json!(first);
        out["podIPs"] = facts.addresses.iter().map(|ip| json!({ "ip": ip })).collect();
    }
    out
}

fn qos(pod: &Value) -> &'static str {
    let all = || list(pod, "/spec/containers").iter().chain(list(pod, "/spec/initContainers"));
    let has = |c: &Value, kind: &str, name: &str| c["resources"][kind].get(name).is_some();
    let any = |c: &Value| ["limits", "requests"].iter().any(|k| has(c, k, "cpu") || has(c, k, "memory"));
    let full = |c: &Value| {
        ["cpu", "memory"].iter().all(|n| {
            has(c, "limits", n) && (!has(c, "requests", n) || c["resources"]["requests"][n] == c["resources"]["limits"][n])
        })
    };
    if all().all(full) {
        "Guaranteed"
    } else if all().any(any) {
        "Burstable"
    } else {
        "BestEffort"
    }
}

#[cfg(test)]
mod tests {
    use super::super::container::Ended;
    use super::*;

    fn ended(code: i32) -> Phase {
        Phase::Ended(Ended { code, ..Ended::default() })
    }

    #[test]
    fn a_pod_is_ready_when_its_sidecar_is_too() {
        let sidecar = Container::new(&json!({"name": "proxy"}), Kind::Sidecar);
        let init = Container::new(&json!({"name": "init"}), Kind::Init);
        let main = Container::new(&json!({"name": "app"}), Kind::Main);
        let running =
            State { phase: Phase::Running { since: String::new() }, started: true, ready: true, runs: 1, ..State::default() };
        let unready = State { ready: false, ..running.clone() };
        let done = State { phase: ended(0), finished: true, runs: 1, ..State::default() };
        let facts = Facts { addresses: vec!["10.0.0.1".into()], now: "now".into(), ..Facts::default() };
        let get = |a: &State, b: &State, c: &State| {
            let pod = json!({"metadata": {}, "status": {"conditions": [{"type": "x/y", "status": "True"}]}});
            status(&pod, &[(&init, a.clone()), (&sidecar, b.clone()), (&main, c.clone())], &facts)
        };
        let is = |s: &Value, kind: &str| condition(&json!({ "status": s }), kind);
        let all = get(&done, &running, &running);
        assert_eq!(all["phase"], "Running");
        assert!(is(&all, "Ready") && is(&all, "Initialized") && is(&all, "x/y"), "{all}");
        let some = get(&done, &unready, &running);
        assert!(!is(&some, "Ready"));
        assert_eq!(some["conditions"][2]["message"], "containers with unready status: [proxy]");
        let early = get(&State::default(), &State::default(), &State::default());
        assert_eq!(early["phase"], "Pending");
        assert!(!is(&early, "Initialized"));
        let crashed = State {
            phase: Phase::Waiting { reason: "CrashLoopBackOff".into(), message: String::new() },
            last: Some(Ended::default()),
            runs: 3,
            ..State::default()
        };
        let crashing = get(&done, &running, &crashed);
        assert_eq!((&crashing["phase"], &crashing["containerStatuses"][0]["restartCount"]), (&json!("Running"), &json!(2)));
    }
}
