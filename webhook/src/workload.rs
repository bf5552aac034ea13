//! Where the pod is in each kind of object, and which workload a pod belongs to.

use serde_json::Value;

/// The owner of a pod as its own metadata tells it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    /// API version.
    pub api_version: String,
    /// Kind.
    pub kind: String,
    /// Name.
    pub name: String,
    /// uid, empty where it is not known.
    pub uid: String,
}

/// The controlling owner of a pod, exactly as its `ownerReferences` name it.
pub fn controller(pod: &Value) -> Option<Owner> {
    let references = pod.pointer("/metadata/ownerReferences")?.as_array()?;
    let reference = references.iter().find(|r| r.get("controller").and_then(Value::as_bool) == Some(true))?;
    let text = |field: &str| reference.get(field).and_then(Value::as_str).unwrap_or_default().to_owned();
    Some(Owner { api_version: text("apiVersion"), kind: text("kind"), name: text("name"), uid: text("uid") })
}

/// The workload at the top, by what the names and labels of a pod tell without asking the API (kind and name): a
/// ReplicaSet's Deployment or Argo Rollout, a Job's CronJob, a ReplicationController's DeploymentConfig, else the
/// controlling owner, else the pod.
pub fn workload(pod: &Value) -> (String, String) {
    let label = |name: &str| pod.pointer("/metadata/labels").and_then(|l| l.get(name)).and_then(Value::as_str);
    let Some(owner) = controller(pod) else {
        let meta = |field: &str| pod.pointer(&format!("/metadata/{field}")).and_then(Value::as_str).filter(|s| !s.is_empty());
        let name = meta("name").or_else(|| meta("generateName").map(|g| g.trim_end_matches('-'))).unwrap_or_default();
        return ("Pod".into(), name.to_owned());
    };
    let without = |hash: &str| owner.name.strip_suffix(hash).and_then(|n| n.strip_suffix('-')).map(str::to_owned);
    match owner.kind.as_str() {
        "ReplicaSet" => {
            if let Some(name) = label("rollouts-pod-template-hash").and_then(without) {
                return ("Rollout".into(), name);
            }
            if let Some(name) = label("pod-template-hash").and_then(without) {
                return ("Deployment".into(), name);
            }
        }
        "Job" => {
            if let Some((name, time)) = owner.name.rsplit_once('-')
                && (8..=10).contains(&time.len())
                && time.bytes().all(|b| b.is_ascii_digit())
                && !name.is_empty()
            {
                return ("CronJob".into(), name.to_owned());
            }
        }
        "ReplicationController" => {
            if let Some(name) = label("deploymentconfig") {
                return ("DeploymentConfig".into(), name.to_owned());
            }
        }
        _ => {}
    }
    (owner.kind, owner.name)
}

/// Where the pod (its `metadata` and `spec`) is in an object of this kind, as a JSON pointer; `None`: the kind has none.
pub fn pod_pointer(object: &Value) -> Option<&'static str> {
    let kind = object.get("kind")?.as_str()?;
    let group = object.get("apiVersion")?.as_str()?.rsplit_once('/').map_or("", |(group, _)| group);
    match (group, kind) {
        ("", "Pod") => Some(""),
        ("", "ReplicationController")
        | ("apps" | "extensions", "Deployment" | "ReplicaSet" | "DaemonSet" | "StatefulSet")
        | ("batch", "Job")
        | ("apps.openshift.io" | "", "DeploymentConfig")
        | ("argoproj.io", "Rollout") => Some("/spec/template"),
        ("batch", "CronJob") => Some("/spec/jobTemplate/spec/template"),
        _ => None,
    }
}

/// `kind/name` of an object as summaries write it.
pub fn title(object: &Value) -> String {
    let kind = object.get("kind").and_then(Value::as_str).unwrap_or("document").to_lowercase();
    let meta = |field: &str| object.pointer(&format!("/metadata/{field}")).and_then(Value::as_str).filter(|s| !s.is_empty());
    match meta("name").map(str::to_owned).or_else(|| meta("generateName").map(|g| format!("{g}*"))) {
        Some(name) => format!("{kind}/{name}"),
        None => kind,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(owner_kind: &str, owner: &str, labels: Value) -> Value {
        json!({"metadata": {"name": "p", "labels": labels, "ownerReferences": [
            {"apiVersion": "v1", "kind": "Other", "name": "no", "uid": "0"},
            {"apiVersion": "apps/v1", "kind": owner_kind, "name": owner, "uid": "1", "controller": true}]}})
    }

    #[test]
    fn workloads_by_name() {
        for (kind, name, labels, want) in [
            ("ReplicaSet", "go-app-5d4f", json!({"pod-template-hash": "5d4f"}), ("Deployment", "go-app")),
            ("ReplicaSet", "go-app", json!({}), ("ReplicaSet", "go-app")),
            ("ReplicaSet", "web-77", json!({"rollouts-pod-template-hash": "77", "pod-template-hash": "x"}), ("Rollout", "web")),
            ("Job", "nightly-28000000", json!({}), ("CronJob", "nightly")),
            ("Job", "once-1", json!({}), ("Job", "once-1")),
            ("ReplicationController", "dc-3", json!({"deploymentconfig": "dc"}), ("DeploymentConfig", "dc")),
            ("StatefulSet", "db", json!({}), ("StatefulSet", "db")),
        ] {
            assert_eq!(workload(&pod(kind, name, labels)), (want.0.to_owned(), want.1.to_owned()));
        }
        assert_eq!(workload(&json!({"metadata": {"generateName": "a-b-"}})), ("Pod".into(), "a-b".into()));
    }

    #[test]
    fn pods_in_kinds() {
        for (version, kind, want) in [
            ("v1", "Pod", Some("")),
            ("apps/v1", "Deployment", Some("/spec/template")),
            ("batch/v1", "CronJob", Some("/spec/jobTemplate/spec/template")),
            ("argoproj.io/v1alpha1", "Rollout", Some("/spec/template")),
            ("apps.openshift.io/v1", "DeploymentConfig", Some("/spec/template")),
            ("example.com/v1", "Deployment", None),
            ("v1", "Service", None),
        ] {
            assert_eq!(pod_pointer(&json!({"apiVersion": version, "kind": kind})), want, "{version} {kind}");
        }
    }
}
