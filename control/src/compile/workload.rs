//! Who a pod is in telemetry, and the object at the top of its owners: what a person thinks of as the workload.

use super::Mesh;
use crate::index::View;
use crate::model::{Owner, Pod};
use weft_api::wire;

/// The object at the top of a pod's owners: Deployment, StatefulSet, CronJob …, or the pod itself.
///
/// The chain is followed by what the watch has seen. Where a ReplicaSet or Job was not seen (it may have been created a
/// moment ago), names that Kubernetes is known to build tell the same, without a uid.
pub fn root(pod: &Pod, view: &View) -> Owner {
    let Some(owner) = &pod.owner else {
        return Owner { api_version: "v1".into(), kind: "Pod".into(), name: pod.name.clone(), uid: pod.uid.clone() };
    };
    root_of_owner(owner, &pod.labels, view)
}

/// As [`root`], for a pod of which only the controlling owner and the labels are known (one that is being created).
pub fn root_of_owner(owner: &Owner, labels: &std::collections::BTreeMap<String, String>, view: &View) -> Owner {
    let known = match owner.kind.as_str() {
        "ReplicaSet" => view.replica_sets.get(&owner.name),
        "Job" => view.jobs.get(&owner.name),
        _ => None,
    };
    if let Some(known) = known {
        return known.owner.clone().unwrap_or_else(|| owner.clone());
    }
    guess(owner, labels).unwrap_or_else(|| owner.clone())
}

fn guess(owner: &Owner, labels: &std::collections::BTreeMap<String, String>) -> Option<Owner> {
    let top = |api_version: &str, kind: &str, name: &str| Owner {
        api_version: api_version.into(),
        kind: kind.into(),
        name: name.into(),
        uid: String::new(),
    };
    match owner.kind.as_str() {
        "ReplicaSet" => {
            for (label, api_version, kind) in [
                ("rollouts-pod-template-hash", "argoproj.io/v1alpha1", "Rollout"),
                ("pod-template-hash", "apps/v1", "Deployment"),
            ] {
                if let Some(hash) = labels.get(label) {
                    let name = owner.name.strip_suffix(hash.as_str())?.strip_suffix('-')?;
                    return (!name.is_empty()).then(|| top(api_version, kind, name));
                }
            }
            None
        }
        "Job" => {
            let (name, stamp) = owner.name.rsplit_once('-')?;
            let scheduled = (8..=10).contains(&stamp.len()) && stamp.bytes().all(|b| b.is_ascii_digit());
            (scheduled && !name.is_empty()).then(|| top("batch/v1", "CronJob", name))
        }
        "ReplicationController" => {
            let name = labels.get("deploymentconfig")?;
            Some(top("apps.openshift.io/v1", "DeploymentConfig", name))
        }
        _ => None,
    }
}

/// The labels of the pod's telemetry. What is not known stays empty; the proxy writes `unknown`.
pub fn labels(pod: &Pod, view: &View, mesh: &Mesh) -> wire::Workload {
    let root = root(pod, view);
    let first = |keys: &[&str]| keys.iter().find_map(|key| pod.labels.get(*key)).filter(|v| !v.is_empty()).cloned();
    wire::Workload {
        namespace: pod.namespace.clone(),
        service_account: pod.service_account.clone(),
        app: first(&["app", "app.kubernetes.io/name"]).unwrap_or_default(),
        version: first(&["version", "app.kubernetes.io/version"]).unwrap_or_default(),
        canonical_service: first(&["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"])
            .unwrap_or_else(|| root.name.clone()),
        canonical_revision: first(&["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"])
            .unwrap_or_else(|| "latest".into()),
        cluster: mesh.cluster.clone(),
        name: root.name,
        kind: root.kind,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Owned;
    use std::sync::Arc;

    fn pod(owner: Option<(&str, &str)>, labels: &[(&str, &str)]) -> Pod {
        Pod {
            namespace: "default".into(),
            name: "go-app-7d9f-x2x".into(),
            service_account: "go".into(),
            labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            owner: owner.map(|(kind, name)| Owner {
                api_version: "apps/v1".into(),
                kind: kind.into(),
                name: name.into(),
                uid: "u".into(),
            }),
            ..Pod::default()
        }
    }

    #[test]
    fn the_top_of_the_owners() {
        let empty = View::default();
        for (owner, labels, expected) in [
            (None, &[][..], "Pod/go-app-7d9f-x2x"),
            (Some(("ReplicaSet", "go-app-7d9f")), &[("pod-template-hash", "7d9f")][..], "Deployment/go-app"),
            (Some(("ReplicaSet", "go-app-7d9f")), &[("rollouts-pod-template-hash", "7d9f")][..], "Rollout/go-app"),
            (Some(("ReplicaSet", "go-app")), &[("pod-template-hash", "7d9f")][..], "ReplicaSet/go-app"),
            (Some(("ReplicaSet", "-7d9f")), &[("pod-template-hash", "7d9f")][..], "ReplicaSet/-7d9f"),
            (Some(("ReplicaSet", "bare")), &[][..], "ReplicaSet/bare"),
            (Some(("StatefulSet", "db")), &[][..], "StatefulSet/db"),
            (Some(("Job", "backup-28123456")), &[][..], "CronJob/backup"),
            (Some(("Job", "backup-1")), &[][..], "Job/backup-1"),
            (Some(("Job", "backup-2812345x")), &[][..], "Job/backup-2812345x"),
            (Some(("ReplicationController", "x-1")), &[("deploymentconfig", "x")][..], "DeploymentConfig/x"),
            (Some(("Widget", "w")), &[][..], "Widget/w"),
        ] {
            let root = root(&pod(owner, labels), &empty);
            assert_eq!(format!("{}/{}", root.kind, root.name), expected, "{owner:?}");
        }
    }

    #[test]
    fn what_the_watch_has_seen_beats_names() {
        let deployment =
            Owner { api_version: "apps/v1".into(), kind: "Deployment".into(), name: "other".into(), uid: "d".into() };
        let mut view = View::default();
        let owned = |owner: Option<Owner>| Arc::new(Owned { namespace: "default".into(), name: "go-app-7d9f".into(), owner });
        let pod = pod(Some(("ReplicaSet", "go-app-7d9f")), &[("pod-template-hash", "7d9f")]);
        view.replica_sets.insert("go-app-7d9f".into(), owned(Some(deployment.clone())));
        assert_eq!(root(&pod, &view), deployment);
        view.replica_sets.insert("go-app-7d9f".into(), owned(None));
        assert_eq!(root(&pod, &view).kind, "ReplicaSet");
    }

    #[test]
    fn labels_of_telemetry() {
        let mesh = Mesh { cluster: "c1".into(), ..Mesh::default() };
        let plain = labels(&pod(None, &[]), &View::default(), &mesh);
        assert_eq!((plain.app.as_str(), plain.version.as_str()), ("", ""));
        assert_eq!((plain.canonical_service.as_str(), plain.canonical_revision.as_str()), ("go-app-7d9f-x2x", "latest"));
        let named = labels(
            &pod(None, &[("app", "go-app"), ("version", "v1"), ("app.kubernetes.io/name", "goapp")]),
            &View::default(),
            &mesh,
        );
        assert_eq!((named.app.as_str(), named.version.as_str()), ("go-app", "v1"));
        assert_eq!((named.canonical_service.as_str(), named.canonical_revision.as_str()), ("goapp", "v1"));
        assert_eq!((named.cluster.as_str(), named.service_account.as_str()), ("c1", "go"));
    }
}
