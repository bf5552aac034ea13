//! Keeps the ConfigMap with the trust bundle in every namespace that has meshed pods or asks for injection: a pod that
//! mounts it does not start before it is there.
//!
//! It is written when it is missing or says something else, whoever changed it, and when the roots change: a rotation goes on only once
//! every namespace has the new one, which this keeper says. Where no meshed pod is left it stays: it does no
//! harm, holds no secret, and a pod may be on its way.

use super::Bundle;
use crate::ca::issue;
use crate::index::{Index, View};
use crate::metrics::{Ended, Metrics};
use crate::source::kube::{backoff, within};
use futures::{StreamExt, pin_mut};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::runtime::watcher;
use kube::{Api, Client};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tracing::{debug, warn};
use weft_api::names;
use weft_webhook::Settings;

/// Whether a namespace needs the bundle.
pub fn wanted(name: &str, view: &View, settings: &Settings) -> bool {
    if settings.is_system_namespace(name) || view.namespace.as_ref().is_some_and(|ns| ns.terminating) {
        return false;
    }
    let asks = view.namespace.as_ref().is_some_and(|ns| {
        // A pod that says nothing itself shows what its namespace says.
        let silent = crate::model::Pod { namespace: name.into(), ..Default::default() };
        super::missed::would_inject(&silent, Some(ns), settings)
    });
    asks || view
        .pods
        .values()
        .any(|pod| !pod.finished && (pod.meshed() || super::missed::would_inject(pod, view.namespace.as_deref(), settings)))
}

/// Keeps all namespaces right while `leader` says so, and tells in `spread` which bundle they all have. Runs until it is dropped.
pub async fn run(
    client: Client,
    bundle: Bundle,
    spread: watch::Sender<Arc<str>>,
    index: Arc<Index>,
    settings: watch::Receiver<Arc<Settings>>,
    leader: watch::Receiver<bool>,
    metrics: Arc<Metrics>,
) {
    let keeper =
        Keeper { client, bundle, spread, said: Mutex::default(), drifted: Notify::new(), listed: watch::Sender::new(false) };
    tokio::join!(keeper.follow(), keeper.keep(index, settings, leader, metrics));
}

/// A digest of what a ConfigMap says: of a thousand namespaces the texts themselves would be megabytes.
type Digest = [u8; 32];

fn digest(bundle: &str) -> Digest {
    issue::fingerprint(bundle.as_bytes())
}

struct Keeper {
    client: Client,
    bundle: Bundle,
    spread: watch::Sender<Arc<str>>,
    /// What the ConfigMap of each namespace was seen to say.
    said: Mutex<HashMap<String, Digest>>,
    drifted: Notify,
    listed: watch::Sender<bool>,
}

impl Keeper {
    fn note(&self, namespace: String, says: Option<Digest>) {
        let right = digest(&self.bundle.borrow());
        let mut known = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let before = match says {
            Some(says) => known.insert(namespace, says),
            None => known.remove(&namespace),
        };
        if before == Some(right) && says != Some(right) {
            self.drifted.notify_one();
        }
    }

    fn says(&self, namespace: &str, right: &Digest) -> bool {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).get(namespace) == Some(right)
    }

    /// Follows the ConfigMaps of that name in all namespaces.
    async fn follow(&self) {
        let fields = format!("metadata.name={}", names::TRUST_BUNDLE_CONFIGMAP);
        let api: Api<ConfigMap> = Api::all(self.client.clone());
        let events = watcher::watcher(api, watcher::Config::default().fields(&fields).page_size(200));
        pin_mut!(events);
        let mut seen = HashSet::new();
        let mut failures = 0;
        while let Some(event) = events.next().await {
            match event {
                Ok(watcher::Event::Init) => seen.clear(),
                Ok(watcher::Event::InitApply(map)) => {
                    let namespace = map.metadata.namespace.clone().unwrap_or_default();
                    self.note(namespace.clone(), said(&map));
                    seen.insert(namespace);
                }
                Ok(watcher::Event::InitDone) => {
                    failures = 0;
                    self.said.lock().unwrap_or_else(PoisonError::into_inner).retain(|namespace, _| seen.contains(namespace));
                    self.listed.send_replace(true);
                    self.drifted.notify_one();
                }
                Ok(watcher::Event::Apply(map)) => {
                    failures = 0;
                    let says = said(&map);
                    self.note(map.metadata.namespace.unwrap_or_default(), says);
                }
                Ok(watcher::Event::Delete(map)) => self.note(map.metadata.namespace.unwrap_or_default(), None),
                Err(error) => {
                    failures += 1;
                    debug!(%error, "watch of the trust bundles failed");
                    if failures == 3 {
                        warn!(%error, "cannot watch configmaps {} (is the ClusterRole weft-control complete?); trying again",
                            names::TRUST_BUNDLE_CONFIGMAP);
                    }
                    tokio::time::sleep(backoff(failures)).await;
                }
            }
        }
    }

    async fn keep(
        &self,
        index: Arc<Index>,
        mut settings: watch::Receiver<Arc<Settings>>,
        mut leader: watch::Receiver<bool>,
        metrics: Arc<Metrics>,
    ) {
        let mut generation = index.generation();
        let (mut synced, mut listed) = (index.synced(), self.listed.subscribe());
        if synced.wait_for(|s| *s).await.is_err() || listed.wait_for(|l| *l).await.is_err() {
            return;
        }
        let mut failures = 0;
        let mut bundle = self.bundle.clone();
        // What was found of each namespace as it was then: only one that changed is looked at again.
        let mut looked_at: HashMap<String, (Arc<View>, bool)> = HashMap::new();
        loop {
            if leader.wait_for(|leads| *leads).await.is_err() {
                return;
            }
            generation.mark_unchanged();
            if settings.has_changed().unwrap_or(false) {
                looked_at.clear();
            }
            let rules = settings.borrow_and_update().clone();
            let text = bundle.borrow_and_update().clone();
            let right = digest(&text);
            let mut failed = false;
            let views: HashMap<String, Arc<View>> = index.views().into_iter().collect();
            looked_at.retain(|namespace, _| views.contains_key(namespace));
            for (namespace, view) in views {
                let known = looked_at.get(&namespace).filter(|(before, _)| Arc::ptr_eq(before, &view)).map(|(_, wanted)| *wanted);
                let wanted = known.unwrap_or_else(|| {
                    let wanted = wanted(&namespace, &view, &rules);
                    looked_at.insert(namespace.clone(), (view, wanted));
                    wanted
                });
                if !wanted || self.says(&namespace, &right) {
                    continue;
                }
                match self.write(&namespace, &text).await {
                    Ok(()) => {
                        metrics.trust_bundle_writes.get_or_create(&Ended::OK).inc();
                        self.note(namespace, Some(right));
                    }
                    Err(kube::Error::Api(status)) if gone(&status) => {
                        debug!(namespace, "the namespace is being deleted");
                    }
                    Err(error) => {
                        failed = true;
                        metrics.trust_bundle_writes.get_or_create(&Ended::ERROR).inc();
                        warn!(%error, namespace, "cannot write configmap {namespace}/{}; meshed pods there wait for it. Trying again",
                            names::TRUST_BUNDLE_CONFIGMAP);
                    }
                }
            }
            failures = if failed { failures + 1 } else { 0 };
            if !failed {
                self.spread.send_if_modified(|told| std::mem::replace(told, text.clone()) != text);
            }
            let again = async { if failed { tokio::time::sleep(backoff(failures)).await } else { std::future::pending().await } };
            tokio::select! {
                changed = generation.changed() => if changed.is_err() { return },
                changed = settings.changed() => {
                    if changed.is_err() { return }
                    looked_at.clear();
                }
                changed = bundle.changed() => if changed.is_err() { return },
                changed = leader.changed() => if changed.is_err() { return },
                () = self.drifted.notified() => {
                    // Whoever deletes it in a loop gets a loop of two writes a second, not of thousands.
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
                () = again => {}
            }
        }
    }

    async fn write(&self, namespace: &str, bundle: &str) -> Result<(), kube::Error> {
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), namespace);
        let map = ConfigMap {
            metadata: ObjectMeta {
                name: Some(names::TRUST_BUNDLE_CONFIGMAP.into()),
                labels: Some(BTreeMap::from([("app.kubernetes.io/managed-by".into(), names::CONTROL.into())])),
                ..ObjectMeta::default()
            },
            data: Some(BTreeMap::from([(names::TRUST_BUNDLE_KEY.into(), bundle.to_owned())])),
            ..ConfigMap::default()
        };
        match within(api.create(&PostParams::default(), &map)).await {
            Err(kube::Error::Api(status)) if status.is_already_exists() => {}
            other => return other.map(drop),
        }
        let patch = serde_json::json!({"data": {names::TRUST_BUNDLE_KEY: bundle}});
        within(api.patch(names::TRUST_BUNDLE_CONFIGMAP, &PatchParams::default(), &Patch::Merge(patch))).await.map(drop)
    }
}

fn said(map: &ConfigMap) -> Option<Digest> {
    map.data.as_ref().and_then(|data| data.get(names::TRUST_BUNDLE_KEY)).map(|text| digest(text))
}

/// The namespace is gone, or going.
fn gone(status: &kube::core::Status) -> bool {
    status.code == 404 || (status.is_forbidden() && status.message.contains("being terminated"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Container, Namespace, Pod};

    #[test]
    fn who_needs_the_bundle() {
        let settings = Settings::default();
        let namespace = |annotations: &[(&str, &str)]| {
            Some(Arc::new(Namespace {
                name: "shop".into(),
                annotations: annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
                ..Namespace::default()
            }))
        };
        let pod = |annotations: &[(&str, &str)], container: &str| {
            let pod = Pod {
                name: "p".into(),
                namespace: "shop".into(),
                annotations: annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
                containers: vec![Container { name: container.into(), ..Container::default() }],
                ..Pod::default()
            };
            BTreeMap::from([("p".to_owned(), Arc::new(pod))])
        };
        let view = |namespace, pods| View { namespace, pods, ..View::default() };
        assert!(!wanted("shop", &view(namespace(&[]), BTreeMap::new()), &settings));
        assert!(wanted("shop", &view(namespace(&[("inject", "enabled")]), BTreeMap::new()), &settings));
        assert!(!wanted("kube-system", &view(namespace(&[("inject", "enabled")]), BTreeMap::new()), &settings));
        assert!(!wanted("shop", &view(namespace(&[]), pod(&[], "app")), &settings));
        assert!(wanted("shop", &view(namespace(&[]), pod(&[("weft.mesh/status", "{}")], "weft-proxy")), &settings));
        assert!(wanted("shop", &view(namespace(&[]), pod(&[("inject", "enabled")], "app")), &settings));
    }
}
