//! Pods that have no sidecar although they would get one if they were created now: the webhook was away when they came, or
//! their namespace asked for injection only later. Nothing is done to them (only their owner may restart them), but it is said: in
//! `weft_missed_pods`, in the log, and as an event on the workload, with the command that helps.

use crate::compile::workload;
use crate::events::{Events, Kind as EventKind};
use crate::index::{Index, View};
use crate::metrics::{InNamespace, Metrics};
use crate::model::{Namespace, Owner, Pod};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tracing::warn;
use weft_webhook::{NamespaceFacts, Settings, Verdict};

/// How long changes are gathered before namespaces are looked at.
const GATHER: Duration = Duration::from_secs(1);

/// Whether the webhook would inject this pod.
pub fn would_inject(pod: &Pod, namespace: Option<&Namespace>, settings: &Settings) -> bool {
    // Most pods of a cluster are in namespaces where nobody speaks of injection; they are passed over without building the
    // object that the decision reads. Every key that can ask for injection has the word in it.
    let mentions = |map: &BTreeMap<String, String>| map.keys().any(|key| key.contains("inject"));
    let namespace_mentions = namespace.is_some_and(|ns| mentions(&ns.annotations) || mentions(&ns.labels));
    if !namespace_mentions && !mentions(&pod.annotations) && !mentions(&pod.labels) {
        return false;
    }
    let facts = namespace_facts(&pod.namespace, namespace);
    weft_webhook::decide(&pod.to_value(), &facts, settings).verdict == Verdict::Inject
}

/// A namespace as the webhook's decision reads it.
pub fn namespace_facts(name: &str, namespace: Option<&Namespace>) -> NamespaceFacts {
    NamespaceFacts {
        name: name.to_owned(),
        labels: namespace.map(|ns| ns.labels.clone()).unwrap_or_default(),
        annotations: namespace.map(|ns| ns.annotations.clone()).unwrap_or_default(),
    }
}

/// The missed pods of a namespace, by the workload to which they belong.
pub fn missed(view: &View, settings: &Settings) -> BTreeMap<Owner, Vec<String>> {
    let mut found: BTreeMap<Owner, Vec<String>> = BTreeMap::new();
    for pod in view.pods.values() {
        if pod.finished || pod.terminating || pod.meshed() || !would_inject(pod, view.namespace.as_deref(), settings) {
            continue;
        }
        found.entry(workload::root(pod, view)).or_default().push(pod.name.clone());
    }
    found
}

fn advice(owner: &Owner, namespace: &str) -> String {
    match owner.kind.as_str() {
        "Deployment" | "StatefulSet" | "DaemonSet" => {
            format!("run `kubectl rollout restart {}/{} -n {namespace}`", owner.kind.to_ascii_lowercase(), owner.name)
        }
        "Job" | "CronJob" => "its next run gets one".into(),
        _ => "create the pod anew".into(),
    }
}

/// Reports missed pods while `leader` says so. Runs until it is dropped.
pub async fn run(
    index: Arc<Index>,
    mut settings: watch::Receiver<Arc<Settings>>,
    mut leader: watch::Receiver<bool>,
    events: Events,
    metrics: Arc<Metrics>,
) {
    let mut generation = index.generation();
    let mut looked_at: HashMap<String, Arc<View>> = HashMap::new();
    let mut said: HashMap<String, BTreeMap<Owner, Vec<String>>> = HashMap::new();
    if index.synced().wait_for(|s| *s).await.is_err() {
        return;
    }
    loop {
        if !*leader.borrow_and_update() {
            // Another replica counts now: what this one counted must not be added to it.
            metrics.missed_pods.clear();
            looked_at.clear();
            said.clear();
            if leader.wait_for(|leads| *leads).await.is_err() {
                return;
            }
        }
        generation.mark_unchanged();
        if settings.has_changed().unwrap_or(false) {
            looked_at.clear();
        }
        let rules = settings.borrow_and_update().clone();
        let views: HashMap<String, Arc<View>> = index.views().into_iter().collect();
        looked_at.retain(|namespace, _| views.contains_key(namespace));
        said.retain(|namespace, _| {
            let there = views.contains_key(namespace);
            if !there {
                metrics.missed_pods.remove(&InNamespace { namespace: namespace.clone() });
            }
            there
        });
        for (namespace, view) in views {
            if looked_at.get(&namespace).is_some_and(|before| Arc::ptr_eq(before, &view)) {
                continue;
            }
            let found = missed(&view, &rules);
            let label = InNamespace { namespace: namespace.clone() };
            let before = said.remove(&namespace).unwrap_or_default();
            if found.is_empty() {
                metrics.missed_pods.remove(&label);
            } else {
                metrics.missed_pods.get_or_create(&label).set(found.values().map(|pods| pods.len() as i64).sum());
                for (owner, pods) in &found {
                    if before.get(owner).is_some_and(|known| pods.iter().all(|pod| known.contains(pod))) {
                        continue;
                    }
                    report(&events, &namespace, owner, pods);
                }
                said.insert(namespace.clone(), found);
            }
            looked_at.insert(namespace, view);
        }
        tokio::select! {
            changed = generation.changed() => if changed.is_err() { return },
            changed = settings.changed() => {
                if changed.is_err() { return }
                looked_at.clear();
            }
            changed = leader.changed() => if changed.is_err() { return },
        }
        tokio::time::sleep(GATHER).await;
    }
}

fn report(events: &Events, namespace: &str, owner: &Owner, pods: &[String]) {
    let advice = advice(owner, namespace);
    warn!(namespace, kind = %owner.kind, workload = %owner.name, pods = pods.len(),
        "pods without a sidecar in a namespace that wants one; {advice}");
    let count = match pods {
        [one] => format!("Pod {one} runs"),
        many => format!("{} pods run", many.len()),
    };
    let note =
        format!("{count} without a sidecar (created before injection was asked for, or while the webhook was away): {advice}");
    events.send(namespace, owner.clone(), EventKind::Missed, note);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Container, Owned};
    use weft_api::annotations as keys;

    fn pod(name: &str, change: impl FnOnce(&mut Pod)) -> (String, Arc<Pod>) {
        let mut pod = Pod {
            namespace: "shop".into(),
            name: name.into(),
            containers: vec![Container { name: "app".into(), ..Container::default() }],
            owner: Some(Owner {
                api_version: "apps/v1".into(),
                kind: "ReplicaSet".into(),
                name: "cart-1".into(),
                uid: "r".into(),
            }),
            ..Pod::default()
        };
        change(&mut pod);
        (name.into(), Arc::new(pod))
    }

    #[test]
    fn only_running_pods_that_would_be_injected() {
        let deployment = Owner { api_version: "apps/v1".into(), kind: "Deployment".into(), name: "cart".into(), uid: "d".into() };
        let mut view = View {
            namespace: Some(Arc::new(Namespace {
                name: "shop".into(),
                annotations: BTreeMap::from([("inject".into(), "enabled".into())]),
                ..Namespace::default()
            })),
            ..View::default()
        };
        view.replica_sets.insert(
            "cart-1".into(),
            Arc::new(Owned { namespace: "shop".into(), name: "cart-1".into(), owner: Some(deployment.clone()) }),
        );
        view.pods.extend([
            pod("missed-1", |_| ()),
            pod("missed-2", |_| ()),
            pod("finished", |p| p.finished = true),
            pod("going", |p| p.terminating = true),
            pod("host", |p| p.host_network = true),
            pod("no", |p| drop(p.annotations.insert("inject".into(), "disabled".into()))),
            pod("meshed", |p| {
                p.annotations.insert("weft.mesh/status".into(), "{}".into());
                p.containers.push(Container { name: "weft-proxy".into(), ..Container::default() });
            }),
        ]);
        let settings = Settings::default();
        let found = missed(&view, &settings);
        assert_eq!(found, BTreeMap::from([(deployment.clone(), vec!["missed-1".to_owned(), "missed-2".to_owned()])]));
        assert!(advice(&deployment, "shop").contains("kubectl rollout restart deployment/cart -n shop"));
        view.namespace = None;
        assert!(missed(&view, &settings).is_empty());
        for key in [keys::INJECT_BARE, keys::INJECT, keys::INJECT_LINKERD, keys::INJECT_ISTIO, keys::INJECTION_ISTIO] {
            assert!(key.contains("inject"), "{key} would be passed over");
        }
    }
}
