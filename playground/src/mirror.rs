//! A local copy of one resource, kept current by a watch.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use serde_json::Value;
use tokio::sync::watch;

use crate::apiserver::{Api, EventKind, resource::Gvr};
use crate::json;

/// The objects of one resource by namespace and name.
pub(crate) struct Mirror {
    objects: RwLock<BTreeMap<(String, String), Arc<Value>>>,
    changed: watch::Sender<u64>,
}

impl Mirror {
    /// Starts a copy; it is complete when this returns.
    pub(crate) fn start(api: &Api, gvr: &Gvr) -> Arc<Self> {
        let (items, mut watch) = api.list_and_watch(gvr);
        let mirror = Arc::new(Self { objects: RwLock::new(index(items)), changed: watch::Sender::new(0) });
        let (api, gvr, copy) = (api.clone(), gvr.clone(), mirror.clone());
        tokio::spawn(async move {
            loop {
                match watch.next().await {
                    Some(event) => copy.update(|map| {
                        let id = json::id(&event.object);
                        match event.kind {
                            EventKind::Deleted => map.remove(&id),
                            EventKind::Added | EventKind::Modified => map.insert(id, event.object.clone()),
                        };
                    }),
                    None => {
                        let (items, again) = api.list_and_watch(&gvr);
                        copy.update(|map| *map = index(items));
                        watch = again;
                        // A closed store ends every watch at once; don't spin on it.
                        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    }
                }
            }
        });
        mirror
    }

    fn update(&self, change: impl FnOnce(&mut BTreeMap<(String, String), Arc<Value>>)) {
        change(&mut self.objects.write().unwrap_or_else(PoisonError::into_inner));
        self.changed.send_modify(|n| *n += 1);
    }

    /// One object.
    pub(crate) fn get(&self, ns: &str, name: &str) -> Option<Arc<Value>> {
        let key = (ns.to_owned(), name.to_owned());
        self.objects.read().unwrap_or_else(PoisonError::into_inner).get(&key).cloned()
    }

    /// All objects, in order.
    pub(crate) fn all(&self) -> Vec<Arc<Value>> {
        self.objects.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Changes whenever the copy does.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

fn index(items: Vec<Value>) -> BTreeMap<(String, String), Arc<Value>> {
    items.into_iter().map(|o| (json::id(&o), Arc::new(o))).collect()
}
