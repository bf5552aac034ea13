//! The objects, and what happened to them: an in-memory store with one revision counter for everything, as etcd has.
//!
//! Every write takes the next revision, which becomes the object's `metadata.resourceVersion`, and appends one event
//! to a bounded history. A watch first replays that history from its revision and then follows; one that asks for a
//! revision which the history no longer covers is told so (410), and one that reads too slowly is ended, which clients
//! answer by watching again from the last revision they saw.
//!
//! Revisions start at the current Unix time in seconds: a client that outlives a restart of the playground holds
//! revisions from before it, which are then too old rather than in the future.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tokio::sync::broadcast;

use super::resource::Key;

/// How an object changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// It is new.
    Added,
    /// It is another than before.
    Modified,
    /// It is gone; the event carries its last state.
    Deleted,
}

/// One change.
#[derive(Debug, Clone)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// The object after the change (with [`EventKind::Deleted`]: its last state, at the revision of the deletion).
    pub object: Arc<Value>,
    /// The object before the change: a filtered watch has to tell "left my filter" from "never was in it".
    pub previous: Option<Arc<Value>>,
    /// Revision of the change.
    pub revision: u64,
    /// Resource of the object.
    pub key: Key,
}

/// Why a write didn't happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WriteError {
    /// There is such an object already.
    Exists,
    /// There is no such object.
    Missing,
    /// The object has another revision than the writer thought.
    Changed,
}

type Name = (String, String);

struct Inner {
    revision: u64,
    /// Watches may start at this revision or later.
    compacted: u64,
    objects: HashMap<Key, BTreeMap<Name, Arc<Value>>>,
    history: VecDeque<Arc<Event>>,
    capacity: usize,
    pages: HashMap<u64, Page>,
    next_page: u64,
}

struct Page {
    made: Instant,
    revision: u64,
    items: Arc<Vec<Arc<Value>>>,
}

/// How long a `continue` token is good for, as etcd's default compaction makes it.
const PAGE_LIFE: Duration = Duration::from_mins(5);

/// The store. Cheap to share behind an `Arc`.
pub struct Store {
    inner: Mutex<Inner>,
    feed: Mutex<broadcast::Sender<Arc<Event>>>,
}

/// A snapshot of a resource.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The objects, in order of namespace and name.
    pub items: Vec<Arc<Value>>,
    /// The revision the snapshot was taken at.
    pub revision: u64,
}

/// Changes of one resource from a revision on.
pub struct Watch {
    key: Key,
    backlog: VecDeque<Arc<Event>>,
    live: broadcast::Receiver<Arc<Event>>,
    seen: u64,
}

impl Watch {
    /// The next change. `None` means that the watch has ended (it fell behind, or the server closed it): start again
    /// from the last revision, or from a list.
    pub async fn next(&mut self) -> Option<Arc<Event>> {
        if let Some(event) = self.backlog.pop_front() {
            self.seen = event.revision;
            return Some(event);
        }
        loop {
            match self.live.recv().await {
                Ok(event) => {
                    let fresh = event.revision > self.seen;
                    self.seen = self.seen.max(event.revision);
                    if fresh && event.key == self.key {
                        return Some(event);
                    }
                }
                Err(_) => return None,
            }
        }
    }

    /// Everything up to this revision has been delivered.
    pub fn seen(&self) -> u64 {
        self.seen
    }
}

fn set_revision(object: &mut Value, revision: u64) {
    if let Some(meta) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        meta.insert("resourceVersion".to_owned(), json!(revision.to_string()));
    }
}

/// `metadata.resourceVersion` as a number; 0 when absent.
pub fn revision_of(object: &Value) -> u64 {
    object.pointer("/metadata/resourceVersion").and_then(Value::as_str).and_then(|s| s.parse().ok()).unwrap_or(0)
}

impl Store {
    /// An empty store that remembers `history` changes (at least 1).
    pub fn new(history: usize) -> Self {
        let revision = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_secs());
        let inner = Inner {
            revision,
            compacted: revision,
            objects: HashMap::new(),
            history: VecDeque::new(),
            capacity: history.max(1),
            pages: HashMap::new(),
            next_page: 1,
        };
        Self { inner: Mutex::new(inner), feed: Mutex::new(broadcast::channel(8192).0) }
    }

    // A panic while the lock is held can't leave the maps half changed: each write below is done in its last lines.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The latest revision.
    pub fn revision(&self) -> u64 {
        self.lock().revision
    }

    /// One object.
    pub fn get(&self, key: &Key, namespace: &str, name: &str) -> Option<Arc<Value>> {
        self.lock().objects.get(key)?.get(&(namespace.to_owned(), name.to_owned())).cloned()
    }

    /// All objects of a resource, or those of one namespace.
    pub fn list(&self, key: &Key, namespace: Option<&str>) -> Snapshot {
        let inner = self.lock();
        Snapshot { items: collect(&inner, key, namespace), revision: inner.revision }
    }

    /// A snapshot and the changes after it.
    pub fn list_and_watch(&self, key: &Key) -> (Snapshot, Watch) {
        let inner = self.lock();
        let snapshot = Snapshot { items: collect(&inner, key, None), revision: inner.revision };
        let watch = self.follow(key, inner.revision, VecDeque::new());
        drop(inner);
        (snapshot, watch)
    }

    // Called with the inner lock held, so that no event falls between backlog and live feed.
    fn follow(&self, key: &Key, seen: u64, backlog: VecDeque<Arc<Event>>) -> Watch {
        let live = self.feed.lock().unwrap_or_else(PoisonError::into_inner).subscribe();
        Watch { key: key.clone(), backlog, live, seen }
    }

    /// Changes after `since`, or `Err(oldest)` when the history begins only at `oldest`.
    pub fn watch(&self, key: &Key, since: u64) -> Result<Watch, u64> {
        let inner = self.lock();
        if since < inner.compacted {
            return Err(inner.compacted);
        }
        let start = inner.history.partition_point(|e| e.revision <= since);
        let backlog = inner.history.iter().skip(start).filter(|e| e.key == *key).cloned().collect();
        let watch = self.follow(key, since, backlog);
        drop(inner);
        Ok(watch)
    }

    /// Adds an object; its `resourceVersion` is set.
    pub fn create(&self, key: &Key, namespace: &str, name: &str, mut object: Value) -> Result<Arc<Value>, WriteError> {
        let mut inner = self.lock();
        let id = (namespace.to_owned(), name.to_owned());
        if inner.objects.get(key).is_some_and(|m| m.contains_key(&id)) {
            return Err(WriteError::Exists);
        }
        let revision = inner.revision + 1;
        set_revision(&mut object, revision);
        let object = Arc::new(object);
        inner.objects.entry(key.clone()).or_default().insert(id, object.clone());
        self.record(&mut inner, EventKind::Added, key, object.clone(), None);
        Ok(object)
    }

    /// Replaces an object that is still at revision `expected`.
    pub fn update(
        &self,
        key: &Key,
        namespace: &str,
        name: &str,
        expected: u64,
        mut object: Value,
    ) -> Result<Arc<Value>, WriteError> {
        let mut inner = self.lock();
        let revision = inner.revision + 1;
        let id = (namespace.to_owned(), name.to_owned());
        let slot = inner.objects.get_mut(key).and_then(|m| m.get_mut(&id)).ok_or(WriteError::Missing)?;
        if revision_of(slot) != expected {
            return Err(WriteError::Changed);
        }
        set_revision(&mut object, revision);
        let object = Arc::new(object);
        let previous = std::mem::replace(slot, object.clone());
        self.record(&mut inner, EventKind::Modified, key, object.clone(), Some(previous));
        Ok(object)
    }

    /// Removes an object that is still at revision `expected`. Returns its last state.
    pub fn delete(&self, key: &Key, namespace: &str, name: &str, expected: u64) -> Result<Arc<Value>, WriteError> {
        let mut inner = self.lock();
        let id = (namespace.to_owned(), name.to_owned());
        let map = inner.objects.get_mut(key).ok_or(WriteError::Missing)?;
        let current = map.get(&id).ok_or(WriteError::Missing)?;
        if revision_of(current) != expected {
            return Err(WriteError::Changed);
        }
        let Some(previous) = map.remove(&id) else { return Err(WriteError::Missing) };
        let mut last = (*previous).clone();
        set_revision(&mut last, inner.revision + 1);
        let last = Arc::new(last);
        self.record(&mut inner, EventKind::Deleted, key, last.clone(), Some(previous));
        Ok(last)
    }

    fn record(&self, inner: &mut Inner, kind: EventKind, key: &Key, object: Arc<Value>, previous: Option<Arc<Value>>) {
        inner.revision += 1;
        let event = Arc::new(Event { kind, object, previous, revision: inner.revision, key: key.clone() });
        if inner.history.len() == inner.capacity
            && let Some(oldest) = inner.history.pop_front()
        {
            inner.compacted = oldest.revision;
        }
        inner.history.push_back(event.clone());
        // No receiver is no error: nobody watches.
        let _ = self.feed.lock().unwrap_or_else(PoisonError::into_inner).send(event);
    }

    /// Forgets the history, as etcd does every five minutes: watches from before now answer 410, and outstanding
    /// `continue` tokens have expired.
    pub fn compact(&self) {
        let mut inner = self.lock();
        inner.history.clear();
        inner.pages.clear();
        inner.compacted = inner.revision;
    }

    /// Ends all watches; clients come back and resume.
    pub fn end_watches(&self) {
        *self.feed.lock().unwrap_or_else(PoisonError::into_inner) = broadcast::channel(8192).0;
    }

    /// Keeps a snapshot for the following pages of a list. Returns its number.
    pub fn keep_page(&self, items: Arc<Vec<Arc<Value>>>, revision: u64) -> u64 {
        let mut inner = self.lock();
        let now = Instant::now();
        inner.pages.retain(|_, page| now.duration_since(page.made) < PAGE_LIFE);
        let id = inner.next_page;
        inner.next_page += 1;
        inner.pages.insert(id, Page { made: now, revision, items });
        id
    }

    /// The snapshot that [`Store::keep_page`] kept, unless it has expired.
    pub fn page(&self, id: u64) -> Option<(Arc<Vec<Arc<Value>>>, u64)> {
        let inner = self.lock();
        let page = inner.pages.get(&id)?;
        (page.made.elapsed() < PAGE_LIFE).then(|| (page.items.clone(), page.revision))
    }

    /// All resources that have objects.
    pub fn keys(&self) -> Vec<Key> {
        self.lock().objects.iter().filter(|(_, m)| !m.is_empty()).map(|(k, _)| k.clone()).collect()
    }
}

fn collect(inner: &Inner, key: &Key, namespace: Option<&str>) -> Vec<Arc<Value>> {
    let Some(map) = inner.objects.get(key) else { return Vec::new() };
    match namespace {
        None => map.values().cloned().collect(),
        Some(ns) => {
            map.range((ns.to_owned(), String::new())..).take_while(|((n, _), _)| n == ns).map(|(_, v)| v.clone()).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(name: &str) -> Value {
        json!({"metadata": {"name": name, "namespace": "a"}})
    }

    #[tokio::test]
    async fn a_watch_replays_and_follows_without_gap_or_repeat() {
        let store = Store::new(100);
        let key = Key::new("", "pods");
        let first = revision_of(&store.create(&key, "a", "x", object("x")).expect("create"));
        store.create(&key, "a", "y", object("y")).expect("create");
        let mut watch = store.watch(&key, first).expect("watch");
        store.delete(&key, "a", "x", first).expect("delete");
        let got = watch.next().await.expect("event");
        assert_eq!((got.kind, got.revision), (EventKind::Added, first + 1));
        let got = watch.next().await.expect("event");
        assert_eq!((got.kind, got.revision), (EventKind::Deleted, first + 2));
        store.end_watches();
        assert!(watch.next().await.is_none());
    }

    #[test]
    fn a_revision_older_than_the_history_is_refused() {
        let store = Store::new(2);
        let key = Key::new("", "pods");
        let start = store.revision();
        for name in ["a", "b", "c"] {
            store.create(&key, "a", name, object(name)).expect("create");
        }
        assert_eq!(store.watch(&key, start).err(), Some(start + 1));
        assert!(store.watch(&key, start + 1).is_ok());
        store.compact();
        assert!(store.watch(&key, start + 2).is_err());
        assert!(store.watch(&key, start + 3).is_ok());
    }

    #[test]
    fn a_write_against_an_old_revision_changes_nothing() {
        let store = Store::new(10);
        let key = Key::new("", "pods");
        let rev = revision_of(&store.create(&key, "a", "x", object("x")).expect("create"));
        store.update(&key, "a", "x", rev, object("x")).expect("update");
        assert_eq!(store.update(&key, "a", "x", rev, object("x")).err(), Some(WriteError::Changed));
        assert_eq!(store.delete(&key, "a", "x", rev).err(), Some(WriteError::Changed));
    }
}
