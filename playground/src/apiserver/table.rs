//! What `kubectl get` prints: the table is made by the server.

use super::resource::ResourceInfo;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

type Cell = fn(&Value) -> Value;
type Column = (&'static str, &'static str, i32, Cell);

fn text(o: &Value, p: &str) -> Value {
    json!(o.pointer(p).and_then(Value::as_str).unwrap_or_default())
}

fn number(o: &Value, p: &str) -> Value {
    json!(o.pointer(p).and_then(Value::as_i64).unwrap_or(0))
}

fn or_none(parts: &[String]) -> Value {
    json!(if parts.is_empty() { "<none>".to_owned() } else { parts.join(",") })
}

fn strings<'a>(o: &'a Value, list: &str, field: &str) -> Vec<&'a str> {
    o.pointer(list).and_then(Value::as_array).into_iter().flatten().filter_map(|i| i[field].as_str()).collect()
}

fn pairs(o: Option<&Value>) -> Value {
    let all: Vec<String> = o
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default()))
        .collect();
    or_none(&all)
}

/// How old, as `kubectl` says it.
pub fn age(time: &str) -> String {
    let Ok(then) = time.parse::<Timestamp>() else { return "<unknown>".into() };
    duration(super::api::seconds() - then.as_second())
}

fn duration(seconds: i64) -> String {
    let s = seconds.max(0);
    let (m, h, d) = (s / 60, s / 3600, s / 86400);
    match s {
        0..120 => format!("{s}s"),
        120..600 if s % 60 != 0 => format!("{m}m{}s", s % 60),
        120..10800 => format!("{m}m"),
        10800..28800 if m % 60 != 0 => format!("{h}h{}m", m % 60),
        10800..172_800 => format!("{h}h"),
        172_800..691_200 if h % 24 != 0 => format!("{d}d{}h", h % 24),
        _ => format!("{d}d"),
    }
}

fn created(o: &Value) -> Value {
    json!(age(o["metadata"]["creationTimestamp"].as_str().unwrap_or_default()))
}

fn statuses<'a>(pod: &'a Value, list: &str) -> impl Iterator<Item = &'a Value> {
    pod["status"][list].as_array().into_iter().flatten()
}

fn sidecar(pod: &Value, name: &str) -> bool {
    pod["spec"]["initContainers"].as_array().into_iter().flatten().any(|c| c["name"] == name && c["restartPolicy"] == "Always")
}

fn pod_ready(pod: &Value) -> Value {
    let sidecars: Vec<&Value> =
        statuses(pod, "initContainerStatuses").filter(|s| sidecar(pod, s["name"].as_str().unwrap_or_default())).collect();
    let specs = pod["spec"]["containers"].as_array().map_or(0, Vec::len)
        + pod["spec"]["initContainers"].as_array().into_iter().flatten().filter(|c| c["restartPolicy"] == "Always").count();
    let ready = sidecars.into_iter().chain(statuses(pod, "containerStatuses")).filter(|s| s["ready"] == json!(true)).count();
    json!(format!("{ready}/{specs}"))
}

/// The STATUS column of a pod.
pub fn pod_status(pod: &Value) -> String {
    let mut reason = pod["status"]["reason"].as_str().or_else(|| pod["status"]["phase"].as_str()).unwrap_or("Unknown").to_owned();
    let inits = pod["spec"]["initContainers"].as_array().map_or(0, Vec::len);
    let mut initializing = false;
    for (i, status) in statuses(pod, "initContainerStatuses").enumerate() {
        let state = &status["state"];
        let name = status["name"].as_str().unwrap_or_default();
        if state["terminated"]["exitCode"] == json!(0) || (sidecar(pod, name) && status["started"] == json!(true)) {
            continue;
        }
        initializing = true;
        reason = if state["terminated"].is_object() {
            match state["terminated"]["reason"].as_str() {
                Some(r) if !r.is_empty() => format!("Init:{r}"),
                _ => format!("Init:ExitCode:{}", state["terminated"]["exitCode"]),
            }
        } else {
            match state["waiting"]["reason"].as_str() {
                Some(r) if !r.is_empty() && r != "PodInitializing" => format!("Init:{r}"),
                _ => format!("Init:{i}/{inits}"),
            }
        };
        break;
    }
    if !initializing {
        let mut running = false;
        for status in statuses(pod, "containerStatuses") {
            let state = &status["state"];
            if let Some(r) = state["waiting"]["reason"].as_str().filter(|r| !r.is_empty()) {
                r.clone_into(&mut reason);
            } else if state["terminated"].is_object() {
                reason = match state["terminated"]["reason"].as_str() {
                    Some(r) if !r.is_empty() => r.to_owned(),
                    _ => format!("ExitCode:{}", state["terminated"]["exitCode"]),
                };
            } else if status["ready"] == json!(true) && state["running"].is_object() {
                running = true;
            }
        }
        if reason == "Completed" && running {
            reason = "Running".into();
        }
    }
    if pod["metadata"]["deletionTimestamp"].is_string() { "Terminating".into() } else { reason }
}

fn pod_restarts(pod: &Value) -> Value {
    let all: Vec<&Value> = statuses(pod, "initContainerStatuses")
        .filter(|s| sidecar(pod, s["name"].as_str().unwrap_or_default()))
        .chain(statuses(pod, "containerStatuses"))
        .collect();
    let count: i64 = all.iter().filter_map(|s| s["restartCount"].as_i64()).sum();
    let last = all.iter().filter_map(|s| s["lastState"]["terminated"]["finishedAt"].as_str()).max();
    match last.filter(|_| count > 0) {
        Some(at) => json!(format!("{count} ({} ago)", age(at))),
        None => json!(count.to_string()),
    }
}

fn ports(service: &Value) -> Value {
    let all: Vec<String> = service["spec"]["ports"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|p| match p["nodePort"].as_u64() {
            Some(n) => format!("{}:{n}/{}", p["port"], p["protocol"].as_str().unwrap_or("TCP")),
            None => format!("{}/{}", p["port"], p["protocol"].as_str().unwrap_or("TCP")),
        })
        .collect();
    or_none(&all)
}

fn images(o: &Value) -> Value {
    json!(strings(o, "/spec/template/spec/containers", "image").join(","))
}

fn names(o: &Value) -> Value {
    json!(strings(o, "/spec/template/spec/containers", "name").join(","))
}

fn columns(info: &ResourceInfo) -> Vec<Column> {
    let name: Column = ("Name", "string", 0, |o| text(o, "/metadata/name"));
    let since: Column = ("Age", "string", 0, created);
    let mut all = vec![name];
    let middle: &[Column] = match (info.key.group.as_str(), info.kind.as_str()) {
        ("", "Pod") => &[
            ("Ready", "string", 0, pod_ready),
            ("Status", "string", 0, |o| json!(pod_status(o))),
            ("Restarts", "string", 0, pod_restarts),
            ("Age", "string", 0, created),
            ("IP", "string", 1, |o| json!(o["status"]["podIP"].as_str().unwrap_or("<none>"))),
            ("Node", "string", 1, |o| json!(o["spec"]["nodeName"].as_str().unwrap_or("<none>"))),
            ("Nominated Node", "string", 1, |_| json!("<none>")),
            ("Readiness Gates", "string", 1, |_| json!("<none>")),
        ],
        ("apps", "Deployment") => &[
            ("Ready", "string", 0, |o| json!(format!("{}/{}", number(o, "/status/readyReplicas"), number(o, "/spec/replicas")))),
            ("Up-to-date", "string", 0, |o| number(o, "/status/updatedReplicas")),
            ("Available", "string", 0, |o| number(o, "/status/availableReplicas")),
            ("Age", "string", 0, created),
            ("Containers", "string", 1, names),
            ("Images", "string", 1, images),
            ("Selector", "string", 1, |o| pairs(o.pointer("/spec/selector/matchLabels"))),
        ],
        ("apps", "ReplicaSet") => &[
            ("Desired", "integer", 0, |o| number(o, "/spec/replicas")),
            ("Current", "integer", 0, |o| number(o, "/status/replicas")),
            ("Ready", "integer", 0, |o| number(o, "/status/readyReplicas")),
            ("Age", "string", 0, created),
            ("Containers", "string", 1, names),
            ("Images", "string", 1, images),
            ("Selector", "string", 1, |o| pairs(o.pointer("/spec/selector/matchLabels"))),
        ],
        ("apps", "StatefulSet") => &[
            ("Ready", "string", 0, |o| json!(format!("{}/{}", number(o, "/status/readyReplicas"), number(o, "/spec/replicas")))),
            ("Age", "string", 0, created),
        ],
        ("batch", "Job") => &[
            ("Status", "string", 0, |o| {
                let done = |t: &str| {
                    o["status"]["conditions"].as_array().into_iter().flatten().any(|c| c["type"] == t && c["status"] == "True")
                };
                json!(if done("Complete") {
                    "Complete"
                } else if done("Failed") {
                    "Failed"
                } else {
                    "Running"
                })
            }),
            ("Completions", "string", 0, |o| {
                json!(format!("{}/{}", number(o, "/status/succeeded"), number(o, "/spec/completions")))
            }),
            ("Age", "string", 0, created),
        ],
        ("", "Service") => &[
            ("Type", "string", 0, |o| text(o, "/spec/type")),
            ("Cluster-IP", "string", 0, |o| json!(o["spec"]["clusterIP"].as_str().unwrap_or("<none>"))),
            ("External-IP", "string", 0, |o| json!(o["spec"]["externalName"].as_str().unwrap_or("<none>"))),
            ("Port(s)", "string", 0, ports),
            ("Age", "string", 0, created),
            ("Selector", "string", 1, |o| pairs(o.pointer("/spec/selector"))),
        ],
        ("", "Namespace") => &[("Status", "string", 0, |o| text(o, "/status/phase")), ("Age", "string", 0, created)],
        ("", "Node") => &[
            ("Status", "string", 0, |o| {
                let ready = o["status"]["conditions"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .any(|c| c["type"] == "Ready" && c["status"] == "True");
                json!(if ready { "Ready" } else { "NotReady" })
            }),
            ("Roles", "string", 0, |_| json!("<none>")),
            ("Age", "string", 0, created),
            ("Version", "string", 0, |o| text(o, "/status/nodeInfo/kubeletVersion")),
        ],
        ("", "ConfigMap") => &[
            ("Data", "integer", 0, |o| json!(o["data"].as_object().map_or(0, serde_json::Map::len))),
            ("Age", "string", 0, created),
        ],
        ("", "Secret") => &[
            ("Type", "string", 0, |o| text(o, "/type")),
            ("Data", "integer", 0, |o| json!(o["data"].as_object().map_or(0, serde_json::Map::len))),
            ("Age", "string", 0, created),
        ],
        ("" | "events.k8s.io", "Event") => {
            return vec![
                ("Last Seen", "string", 0, |o| {
                    json!(age(o["lastTimestamp"]
                        .as_str()
                        .or_else(|| o["eventTime"].as_str())
                        .or_else(|| o["metadata"]["creationTimestamp"].as_str())
                        .unwrap_or_default()))
                }),
                ("Type", "string", 0, |o| text(o, "/type")),
                ("Reason", "string", 0, |o| text(o, "/reason")),
                ("Object", "string", 0, |o| {
                    json!(format!(
                        "{}/{}",
                        o["involvedObject"]["kind"].as_str().unwrap_or_default().to_lowercase(),
                        o["involvedObject"]["name"].as_str().unwrap_or_default()
                    ))
                }),
                ("Message", "string", 0, |o| json!(o["message"].as_str().unwrap_or_default().trim())),
            ];
        }
        ("discovery.k8s.io", "EndpointSlice") => &[
            ("AddressType", "string", 0, |o| text(o, "/addressType")),
            ("Ports", "string", 0, |o| {
                or_none(&o["ports"].as_array().into_iter().flatten().map(|p| p["port"].to_string()).collect::<Vec<_>>())
            }),
            ("Endpoints", "string", 0, |o| {
                or_none(
                    &o["endpoints"]
                        .as_array()
                        .into_iter()
                        .flatten()
                        .filter_map(|e| e["addresses"][0].as_str().map(str::to_owned))
                        .collect::<Vec<_>>(),
                )
            }),
            ("Age", "string", 0, created),
        ],
        ("coordination.k8s.io", "Lease") => {
            &[("Holder", "string", 0, |o| text(o, "/spec/holderIdentity")), ("Age", "string", 0, created)]
        }
        ("admissionregistration.k8s.io", _) => {
            &[("Webhooks", "integer", 0, |o| json!(o["webhooks"].as_array().map_or(0, Vec::len))), ("Age", "string", 0, created)]
        }
        _ => &[],
    };
    all.extend_from_slice(middle);
    if middle.is_empty() {
        all.push(since);
    }
    all
}

/// A table of these objects.
pub fn table(info: &ResourceInfo, version: &str, items: &[Value], list_meta: &Value, include: &str, with_columns: bool) -> Value {
    let custom = info.version(version).map(|v| v.columns.clone()).unwrap_or_default();
    let mut definitions = Vec::new();
    let builtin = if custom.is_empty() { columns(info) } else { columns(info)[..1].to_vec() };
    for (name, kind, priority, _) in &builtin {
        let format = if *name == "Name" { "name" } else { "" };
        definitions.push(json!({"name": name, "type": kind, "format": format, "description": "", "priority": priority}));
    }
    for column in &custom {
        definitions.push(json!({"name": column["name"], "type": column["type"], "format": column["format"].as_str().unwrap_or_default(), "description": "", "priority": column["priority"].as_i64().unwrap_or(0)}));
    }
    let has_age = custom.iter().any(|c| c["name"] == "Age");
    if !custom.is_empty() && !has_age {
        definitions.push(json!({"name": "Age", "type": "date", "format": "", "description": "", "priority": 0}));
    }
    let rows: Vec<Value> = items
        .iter()
        .map(|object| {
            let mut cells: Vec<Value> = builtin.iter().map(|(.., cell)| cell(object)).collect();
            for column in &custom {
                cells.push(json_path(object, column));
            }
            if !custom.is_empty() && !has_age {
                cells.push(created(object));
            }
            let inner = match include {
                "Object" => object.clone(),
                "None" => Value::Null,
                _ => partial(object),
            };
            json!({"cells": cells, "object": inner})
        })
        .collect();
    json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": list_meta, "columnDefinitions": if with_columns { json!(definitions) } else { json!([]) }, "rows": rows})
}

fn json_path(object: &Value, column: &Value) -> Value {
    let mut at = object;
    for step in column["jsonPath"].as_str().unwrap_or_default().split('.').filter(|s| !s.is_empty()) {
        let next = match step.split_once('[') {
            None => at.get(step),
            Some((field, rest)) => {
                let list = at.get(field).and_then(Value::as_array);
                let index: Option<usize> = rest.trim_end_matches(']').parse().ok();
                let filter =
                    rest.trim_end_matches(')').trim_end_matches(']').split_once("=='").or_else(|| rest.split_once("==\""));
                match (index, filter) {
                    (Some(i), _) => list.and_then(|l| l.get(i)),
                    (None, Some((key, want))) => {
                        let key = key.trim_start_matches(['?', '(', '@']).trim_start_matches('.');
                        let want = want.trim_end_matches(['\'', '"', ')', ']']);
                        list.and_then(|l| l.iter().find(|i| i[key] == want))
                    }
                    _ => None,
                }
            }
        };
        match next {
            Some(next) => at = next,
            None => return Value::Null,
        }
    }
    if column["type"] == "date" { json!(age(at.as_str().unwrap_or_default())) } else { at.clone() }
}

/// The metadata of an object alone.
pub fn partial(object: &Value) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"]})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_read_as_kubectl_writes_them() {
        for (seconds, want) in [
            (5, "5s"),
            (119, "119s"),
            (120, "2m"),
            (130, "2m10s"),
            (700, "11m"),
            (10_900, "3h1m"),
            (90_000, "25h"),
            (180_000, "2d2h"),
            (900_000, "10d"),
        ] {
            assert_eq!(duration(seconds), want);
        }
    }

    #[test]
    fn a_pod_with_a_native_sidecar_counts_both() {
        let pod = json!({"spec": {"containers": [{"name": "a"}], "initContainers": [{"name": "i"}, {"name": "s", "restartPolicy": "Always"}]},
            "status": {"phase": "Running", "initContainerStatuses": [{"name": "i", "state": {"terminated": {"exitCode": 0}}}, {"name": "s", "ready": true, "started": true, "state": {"running": {}}}],
            "containerStatuses": [{"name": "a", "ready": true, "state": {"running": {}}}]}});
        assert_eq!((pod_ready(&pod), pod_status(&pod)), (json!("2/2"), "Running".to_owned()));
    }
}
