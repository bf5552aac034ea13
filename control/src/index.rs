//! What is known about the cluster, as immutable snapshots.
//!
//! What the control plane computes for a pod depends on objects of the pod's own namespace, so the unit of a snapshot is
//! the namespace: a [`View`] is immutable, cheap to share, and replaced as a whole. Whoever serves a pod subscribes to its
//! namespace alone; a change elsewhere does not wake it. Apps talk across namespaces, by address: a table leads from each address
//! to the Service or pod that has it ([`Index::at`]), and whoever follows addresses is told which of them, and which namespaces,
//! a publication has changed ([`Index::take_changes`]).
//!
//! Invariants:
//! - Writers ([`Index::apply`], …) change the working state at once; admission ([`Index::namespace`]) reads it at once.
//! - Subscribers see a namespace's changes after [`Index::publish`], which the [`publisher`] calls a moment after the first of a
//!   burst: a rollout of a thousand pods is a handful of snapshots, not a thousand.
//! - Nothing is published before every kind was listed once ([`Index::synced`]): a view without its services would make a
//!   proxy forget what it had been told before.
//! - An object that is applied unchanged changes nothing: a relist after a dropped watch wakes nobody.

use crate::model::policy::Policies;
use crate::model::{EndpointSlice, Key, Kind, Namespace, Object, Owned, Pod, Service, Webhook};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};

/// How long a burst of changes is gathered before subscribers see it.
pub const GATHER: Duration = Duration::from_millis(20);

/// All that is known of one namespace at one moment.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// The namespace itself, if it was seen.
    pub namespace: Option<Arc<Namespace>>,
    /// Pods by name.
    pub pods: BTreeMap<String, Arc<Pod>>,
    /// Services by name.
    pub services: BTreeMap<String, Arc<Service>>,
    /// EndpointSlices by name.
    pub slices: BTreeMap<String, Arc<EndpointSlice>>,
    /// ReplicaSets by name.
    pub replica_sets: BTreeMap<String, Arc<Owned>>,
    /// Jobs by name.
    pub jobs: BTreeMap<String, Arc<Owned>>,
    /// Policies. The same `Arc` as long as none of them changes.
    pub policies: Arc<Policies>,
}

impl View {
    fn is_empty(&self) -> bool {
        self.namespace.is_none()
            && self.pods.is_empty()
            && self.services.is_empty()
            && self.slices.is_empty()
            && self.replica_sets.is_empty()
            && self.jobs.is_empty()
            && self.policies.is_empty()
    }

    fn contains(&self, object: &Object) -> bool {
        match object {
            Object::Namespace(n) => self.namespace.as_deref() == Some(n),
            Object::Pod(p) => self.pods.get(&p.name).is_some_and(|known| **known == *p),
            Object::Service(s) => self.services.get(&s.name).is_some_and(|known| **known == *s),
            Object::EndpointSlice(e) => self.slices.get(&e.name).is_some_and(|known| **known == *e),
            Object::ReplicaSet(o) => self.replica_sets.get(&o.name).is_some_and(|known| **known == *o),
            Object::Job(o) => self.jobs.get(&o.name).is_some_and(|known| **known == *o),
            Object::Peer(p) => self.policies.peers.get(&p.name).is_some_and(|known| **known == *p),
            Object::Authorization(p) => self.policies.authorizations.get(&p.name).is_some_and(|known| **known == *p),
            Object::Request(p) => self.policies.requests.get(&p.name).is_some_and(|known| **known == *p),
            Object::Webhook(_) | Object::Validator(_) => false,
        }
    }

    /// A policy that can't be used leaves the version before it in force.
    fn kept(&self, object: Object) -> Object {
        let known = &self.policies;
        match object {
            Object::Peer(p) => {
                let earlier = known.peers.get(&p.name);
                Object::Peer(p.after(earlier.map(AsRef::as_ref)))
            }
            Object::Authorization(p) => {
                let earlier = known.authorizations.get(&p.name);
                Object::Authorization(p.after(earlier.map(AsRef::as_ref)))
            }
            Object::Request(p) => {
                let earlier = known.requests.get(&p.name);
                Object::Request(p.after(earlier.map(AsRef::as_ref)))
            }
            other => other,
        }
    }

    fn has(&self, kind: Kind, name: &str) -> bool {
        match kind {
            Kind::Namespace => self.namespace.is_some(),
            Kind::Pod => self.pods.contains_key(name),
            Kind::Service => self.services.contains_key(name),
            Kind::EndpointSlice => self.slices.contains_key(name),
            Kind::ReplicaSet => self.replica_sets.contains_key(name),
            Kind::Job => self.jobs.contains_key(name),
            Kind::Peer => self.policies.peers.contains_key(name),
            Kind::Authorization => self.policies.authorizations.contains_key(name),
            Kind::Request => self.policies.requests.contains_key(name),
            Kind::Webhook | Kind::Validator => false,
        }
    }

    fn put(&mut self, object: Object) {
        match object {
            Object::Namespace(n) => self.namespace = Some(Arc::new(n)),
            Object::Pod(p) => drop(self.pods.insert(p.name.clone(), Arc::new(p))),
            Object::Service(s) => drop(self.services.insert(s.name.clone(), Arc::new(s))),
            Object::EndpointSlice(e) => drop(self.slices.insert(e.name.clone(), Arc::new(e))),
            Object::ReplicaSet(o) => drop(self.replica_sets.insert(o.name.clone(), Arc::new(o))),
            Object::Job(o) => drop(self.jobs.insert(o.name.clone(), Arc::new(o))),
            Object::Peer(p) => drop(self.edit_policies().peers.insert(p.name.clone(), Arc::new(p))),
            Object::Authorization(p) => drop(self.edit_policies().authorizations.insert(p.name.clone(), Arc::new(p))),
            Object::Request(p) => drop(self.edit_policies().requests.insert(p.name.clone(), Arc::new(p))),
            Object::Webhook(_) | Object::Validator(_) => {}
        }
    }

    fn edit_policies(&mut self) -> &mut Policies {
        Arc::make_mut(&mut self.policies)
    }

    fn remove(&mut self, kind: Kind, name: &str) {
        match kind {
            Kind::Namespace => self.namespace = None,
            Kind::Pod => drop(self.pods.remove(name)),
            Kind::Service => drop(self.services.remove(name)),
            Kind::EndpointSlice => drop(self.slices.remove(name)),
            Kind::ReplicaSet => drop(self.replica_sets.remove(name)),
            Kind::Job => drop(self.jobs.remove(name)),
            Kind::Peer => drop(self.edit_policies().peers.remove(name)),
            Kind::Authorization => drop(self.edit_policies().authorizations.remove(name)),
            Kind::Request => drop(self.edit_policies().requests.remove(name)),
            Kind::Webhook | Kind::Validator => {}
        }
    }

    fn names(&self, kind: Kind) -> Vec<String> {
        match kind {
            Kind::Namespace => self.namespace.iter().map(|n| n.name.clone()).collect(),
            Kind::Pod => self.pods.keys().cloned().collect(),
            Kind::Service => self.services.keys().cloned().collect(),
            Kind::EndpointSlice => self.slices.keys().cloned().collect(),
            Kind::ReplicaSet => self.replica_sets.keys().cloned().collect(),
            Kind::Job => self.jobs.keys().cloned().collect(),
            Kind::Peer => self.policies.peers.keys().cloned().collect(),
            Kind::Authorization => self.policies.authorizations.keys().cloned().collect(),
            Kind::Request => self.policies.requests.keys().cloned().collect(),
            Kind::Webhook | Kind::Validator => Vec::new(),
        }
    }

    fn count(&self, kind: Kind) -> usize {
        match kind {
            Kind::Namespace => usize::from(self.namespace.is_some()),
            Kind::Pod => self.pods.len(),
            Kind::Service => self.services.len(),
            Kind::EndpointSlice => self.slices.len(),
            Kind::ReplicaSet => self.replica_sets.len(),
            Kind::Job => self.jobs.len(),
            Kind::Peer => self.policies.peers.len(),
            Kind::Authorization => self.policies.authorizations.len(),
            Kind::Request => self.policies.requests.len(),
            Kind::Webhook | Kind::Validator => 0,
        }
    }
}

/// Who has an address.
#[derive(Clone, Debug, PartialEq)]
pub enum At {
    /// It is a cluster IP of this Service.
    Service(Arc<Service>),
    /// It is this pod's own.
    Pod(Arc<Pod>),
}

/// What publications have changed since somebody last looked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Namespaces of which anything changed.
    pub namespaces: BTreeSet<String>,
    /// Namespaces of which a policy changed.
    pub policies: BTreeSet<String>,
    /// Addresses that somebody got or lost.
    pub addresses: HashSet<IpAddr>,
}

/// Who claims an address; several do for a moment when pods come and go.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Claim {
    kind: Kind,
    key: Key,
}

/// The addresses that an object has for itself alone. A pod that has ended has given its address back, and one in the host's network
/// has the node's.
fn addresses(object: &Object) -> &[IpAddr] {
    match object {
        Object::Service(service) => &service.cluster_ips,
        Object::Pod(pod) if !pod.finished && !pod.host_network => &pod.addresses,
        _ => &[],
    }
}

#[derive(Debug, Default)]
struct State {
    namespaces: HashMap<String, Arc<View>>,
    dirty: BTreeSet<String>,
    webhooks: Webhooks,
    webhooks_dirty: bool,
    listed: HashSet<Kind>,
    subscribers: HashMap<String, watch::Sender<Arc<View>>>,
    claims: HashMap<IpAddr, Vec<Claim>>,
    moved: HashSet<IpAddr>,
    policies_dirty: BTreeSet<String>,
    changes: Changes,
}

impl State {
    fn edit(&mut self, namespace: &str, change: impl FnOnce(&mut View)) {
        let view = self.namespaces.entry(namespace.to_owned()).or_default();
        change(Arc::make_mut(view));
        if view.is_empty() {
            self.namespaces.remove(namespace);
        }
        self.dirty.insert(namespace.to_owned());
    }

    fn apply(&mut self, object: Object) -> bool {
        let key = object.key();
        let kind = object.kind();
        if let Object::Webhook(webhook) | Object::Validator(webhook) = object {
            let key = (kind, key.name);
            if self.webhooks.get(&key).is_some_and(|known| **known == webhook) {
                return false;
            }
            self.webhooks.insert(key, Arc::new(webhook));
            self.webhooks_dirty = true;
            return true;
        }
        let mut object = object;
        if let Some(view) = self.namespaces.get(&key.namespace) {
            object = view.kept(object);
            if view.contains(&object) {
                return false;
            }
        }
        if Kind::POLICIES.contains(&kind) {
            self.policies_dirty.insert(key.namespace.clone());
        }
        if matches!(kind, Kind::Service | Kind::Pod) {
            let old = self.addresses_of(kind, &key);
            self.claim(kind, &key, &old, addresses(&object));
        }
        self.edit(&key.namespace, |view| view.put(object));
        true
    }

    fn addresses_of(&self, kind: Kind, key: &Key) -> Vec<IpAddr> {
        let Some(view) = self.namespaces.get(&key.namespace) else { return Vec::new() };
        match kind {
            Kind::Service => view.services.get(&key.name).map(|s| s.cluster_ips.clone()).unwrap_or_default(),
            Kind::Pod => view
                .pods
                .get(&key.name)
                .filter(|p| !p.finished && !p.host_network)
                .map(|p| p.addresses.clone())
                .unwrap_or_default(),
            _ => Vec::new(),
        }
    }

    /// Takes addresses from an object and gives it others.
    fn claim(&mut self, kind: Kind, key: &Key, old: &[IpAddr], new: &[IpAddr]) {
        for ip in old.iter().filter(|ip| !new.contains(ip)) {
            if let Some(claims) = self.claims.get_mut(ip) {
                claims.retain(|claim| claim.kind != kind || claim.key != *key);
                if claims.is_empty() {
                    self.claims.remove(ip);
                }
            }
            self.moved.insert(*ip);
        }
        for ip in new.iter().filter(|ip| !old.contains(ip)) {
            self.claims.entry(*ip).or_default().push(Claim { kind, key: key.clone() });
            self.moved.insert(*ip);
        }
    }

    fn at(&self, ip: IpAddr) -> Option<(At, Arc<View>)> {
        let mut newest: Option<(Arc<Pod>, Arc<View>)> = None;
        for claim in self.claims.get(&ip)? {
            let Some(view) = self.namespaces.get(&claim.key.namespace) else { continue };
            if claim.kind == Kind::Service {
                if let Some(service) = view.services.get(&claim.key.name) {
                    return Some((At::Service(service.clone()), view.clone()));
                }
            } else if let Some(pod) = view.pods.get(&claim.key.name) {
                // While one pod goes and another gets its address, the one that stays counts, then the newest.
                let rank = |p: &Pod| (!p.terminating, p.created.clone(), p.uid.clone());
                if newest.as_ref().is_none_or(|(known, _)| rank(known) < rank(pod)) {
                    newest = Some((pod.clone(), view.clone()));
                }
            }
        }
        newest.map(|(pod, view)| (At::Pod(pod), view))
    }

    fn delete(&mut self, kind: Kind, key: &Key) -> bool {
        if is_webhook(kind) {
            let known = self.webhooks.remove(&(kind, key.name.clone())).is_some();
            self.webhooks_dirty |= known;
            return known;
        }
        if !self.namespaces.get(&key.namespace).is_some_and(|view| view.has(kind, &key.name)) {
            return false;
        }
        if Kind::POLICIES.contains(&kind) {
            self.policies_dirty.insert(key.namespace.clone());
        }
        let old = self.addresses_of(kind, key);
        self.claim(kind, key, &old, &[]);
        self.edit(&key.namespace, |view| view.remove(kind, &key.name));
        true
    }

    fn keys(&self, kind: Kind) -> Vec<Key> {
        if is_webhook(kind) {
            return self.webhooks.keys().filter(|(k, _)| *k == kind).map(|(_, name)| Key::new("", name.as_str())).collect();
        }
        self.namespaces
            .iter()
            .flat_map(|(ns, view)| view.names(kind).into_iter().map(|name| Key::new(ns.as_str(), name)))
            .collect()
    }
}

/// Webhook configurations by kind ([`Kind::Webhook`] or [`Kind::Validator`]) and name.
pub type Webhooks = BTreeMap<(Kind, String), Arc<Webhook>>;

fn is_webhook(kind: Kind) -> bool {
    matches!(kind, Kind::Webhook | Kind::Validator)
}

/// The index. Share it by `Arc`.
#[derive(Debug)]
pub struct Index {
    state: Mutex<State>,
    changed: Notify,
    generation: watch::Sender<u64>,
    policies: watch::Sender<u64>,
    webhooks: watch::Sender<Arc<Webhooks>>,
    synced: watch::Sender<bool>,
    expected: HashSet<Kind>,
}

impl Index {
    /// An empty index whose source will list the kinds in `expected`; until each was listed, it counts as not synced.
    pub fn new(expected: impl IntoIterator<Item = Kind>) -> Self {
        Self {
            state: Mutex::default(),
            changed: Notify::new(),
            generation: watch::Sender::new(0),
            policies: watch::Sender::new(0),
            webhooks: watch::Sender::default(),
            synced: watch::Sender::new(false),
            expected: expected.into_iter().collect(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while the lock was held can at worst have left one object half a burst behind; going on serves pods.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds or replaces an object.
    pub fn apply(&self, object: Object) {
        if self.lock().apply(object) {
            self.changed.notify_one();
        }
    }

    /// Removes an object.
    pub fn delete(&self, kind: Kind, key: &Key) {
        if self.lock().delete(kind, key) {
            self.changed.notify_one();
        }
    }

    /// A list of a kind has ended: what it did not name is gone, and the kind counts as listed.
    pub fn listed(&self, kind: Kind, seen: &HashSet<Key>) {
        {
            let mut state = self.lock();
            for key in state.keys(kind) {
                if !seen.contains(&key) {
                    state.delete(kind, &key);
                }
            }
            state.listed.insert(kind);
        }
        self.changed.notify_one();
    }

    /// Replaces everything by `objects` in one step: no reader sees a part of it.
    pub fn replace(&self, objects: impl IntoIterator<Item = Object>) {
        {
            let mut state = self.lock();
            let mut seen: HashMap<Kind, HashSet<Key>> = HashMap::new();
            for object in objects {
                seen.entry(object.kind()).or_default().insert(object.key());
                state.apply(object);
            }
            for kind in Kind::ALL {
                let seen = seen.remove(&kind).unwrap_or_default();
                for key in state.keys(kind) {
                    if !seen.contains(&key) {
                        state.delete(kind, &key);
                    }
                }
                state.listed.insert(kind);
            }
        }
        self.changed.notify_one();
    }

    /// Makes all changes visible to subscribers, unless a kind is still to be listed.
    pub fn publish(&self) {
        let mut state = self.lock();
        if !self.expected.is_subset(&state.listed) {
            return;
        }
        let dirty = std::mem::take(&mut state.dirty);
        for namespace in &dirty {
            let view = state.namespaces.get(namespace).cloned().unwrap_or_default();
            if let Some(sender) = state.subscribers.get(namespace) {
                if sender.receiver_count() == 0 {
                    state.subscribers.remove(namespace);
                } else {
                    sender.send_replace(view);
                }
            }
        }
        if std::mem::take(&mut state.webhooks_dirty) {
            self.webhooks.send_replace(Arc::new(state.webhooks.clone()));
        }
        let moved = std::mem::take(&mut state.moved);
        state.changes.addresses.extend(moved);
        let policies = std::mem::take(&mut state.policies_dirty);
        let policies_changed = !policies.is_empty();
        state.changes.policies.extend(policies);
        state.changes.namespaces.extend(dirty.iter().cloned());
        let first = !*self.synced.borrow();
        drop(state);
        if first {
            self.synced.send_replace(true);
        }
        if first || policies_changed {
            self.policies.send_modify(|generation| *generation += 1);
        }
        if first || !dirty.is_empty() {
            self.generation.send_modify(|generation| *generation += 1);
        }
    }

    /// Subscribes to a namespace (which need not exist yet). The first value is the present view.
    pub fn subscribe(&self, namespace: &str) -> watch::Receiver<Arc<View>> {
        let mut state = self.lock();
        let view = state.namespaces.get(namespace).cloned().unwrap_or_default();
        state.subscribers.entry(namespace.to_owned()).or_insert_with(|| watch::Sender::new(view)).subscribe()
    }

    /// Grows with each published change; for those who look at all namespaces.
    pub fn generation(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// Grows with each publication that changes a policy, in whatever namespace.
    pub fn policies(&self) -> watch::Receiver<u64> {
        self.policies.subscribe()
    }

    /// The present policies of a namespace.
    pub fn policies_of(&self, namespace: &str) -> Arc<Policies> {
        self.lock().namespaces.get(namespace).map(|view| view.policies.clone()).unwrap_or_default()
    }

    /// All policies of the cluster, by namespace.
    pub fn all_policies(&self) -> Vec<Arc<Policies>> {
        let state = self.lock();
        state.namespaces.values().filter(|view| !view.policies.is_empty()).map(|view| view.policies.clone()).collect()
    }

    /// Whether every kind was listed once.
    pub fn synced(&self) -> watch::Receiver<bool> {
        self.synced.subscribe()
    }

    /// The webhook configurations, mutating and validating.
    pub fn webhooks(&self) -> watch::Receiver<Arc<Webhooks>> {
        self.webhooks.subscribe()
    }

    /// What publications have changed since the last call. There is one who calls this, waiting for [`Index::generation`].
    pub fn take_changes(&self) -> Changes {
        std::mem::take(&mut self.lock().changes)
    }

    /// Who has an address this very moment, published or not, with the view of the namespace.
    pub fn at(&self, ip: IpAddr) -> Option<(At, Arc<View>)> {
        self.lock().at(ip)
    }

    /// The present view of a namespace.
    pub fn view(&self, namespace: &str) -> Option<Arc<View>> {
        self.lock().namespaces.get(namespace).cloned()
    }

    /// The namespace as it is known this very moment, published or not.
    pub fn namespace(&self, namespace: &str) -> Option<Arc<Namespace>> {
        self.lock().namespaces.get(namespace).and_then(|view| view.namespace.clone())
    }

    /// All namespaces with their present views.
    pub fn views(&self) -> Vec<(String, Arc<View>)> {
        self.lock().namespaces.iter().map(|(name, view)| (name.clone(), view.clone())).collect()
    }

    /// Kinds that are still to be listed.
    pub fn missing(&self) -> Vec<Kind> {
        let state = self.lock();
        let mut missing: Vec<Kind> = self.expected.iter().filter(|kind| !state.listed.contains(kind)).copied().collect();
        missing.sort_unstable();
        missing
    }

    /// How many objects of a kind are known.
    pub fn count(&self, kind: Kind) -> usize {
        let state = self.lock();
        if is_webhook(kind) {
            return state.webhooks.keys().filter(|(k, _)| *k == kind).count();
        }
        state.namespaces.values().map(|view| view.count(kind)).sum()
    }
}

/// Publishes changes, each burst once, until it is dropped.
pub async fn publisher(index: Arc<Index>) {
    loop {
        index.changed.notified().await;
        tokio::time::sleep(GATHER).await;
        index.publish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(namespace: &str, name: &str) -> Object {
        Object::Pod(Pod { namespace: namespace.into(), name: name.into(), ..Pod::default() })
    }

    fn namespace(name: &str) -> Object {
        Object::Namespace(Namespace { name: name.into(), ..Namespace::default() })
    }

    #[test]
    fn nothing_is_published_before_all_kinds_were_listed() {
        let index = Index::new([Kind::Namespace, Kind::Pod]);
        let mut view = index.subscribe("a");
        index.apply(namespace("a"));
        index.apply(pod("a", "one"));
        index.listed(Kind::Namespace, &HashSet::from([Key::new("a", "a")]));
        index.publish();
        assert!(!view.has_changed().unwrap());
        assert!(index.namespace("a").is_some(), "admission reads at once");
        assert_eq!(index.missing(), [Kind::Pod]);
        index.listed(Kind::Pod, &HashSet::from([Key::new("a", "one")]));
        index.publish();
        assert!(view.has_changed().unwrap() && *index.synced().borrow());
        assert_eq!(view.borrow_and_update().pods.len(), 1);
    }

    #[test]
    fn a_change_wakes_its_own_namespace_only() {
        let index = Index::new([]);
        index.replace([pod("a", "one"), pod("b", "two")]);
        index.publish();
        let (mut a, mut b) = (index.subscribe("a"), index.subscribe("b"));
        a.mark_unchanged();
        b.mark_unchanged();
        index.apply(pod("a", "three"));
        index.publish();
        assert!(a.has_changed().unwrap());
        assert!(!b.has_changed().unwrap());
    }

    #[test]
    fn a_relist_drops_what_is_gone_and_wakes_nobody_for_the_rest() {
        let index = Index::new([]);
        index.replace([pod("a", "one"), pod("a", "two"), pod("b", "three")]);
        index.publish();
        let (mut a, mut b) = (index.subscribe("a"), index.subscribe("b"));
        a.mark_unchanged();
        b.mark_unchanged();
        index.apply(pod("a", "one"));
        index.apply(pod("b", "three"));
        index.listed(Kind::Pod, &HashSet::from([Key::new("a", "one"), Key::new("b", "three")]));
        index.publish();
        assert_eq!(a.borrow_and_update().pods.keys().collect::<Vec<_>>(), ["one"]);
        assert!(!b.has_changed().unwrap());
    }

    #[test]
    fn an_old_view_stays_as_it_was() {
        let index = Index::new([]);
        index.replace([pod("a", "one")]);
        index.publish();
        let old = index.view("a").unwrap();
        index.delete(Kind::Pod, &Key::new("a", "one"));
        index.publish();
        assert_eq!(old.pods.len(), 1);
        assert!(index.view("a").is_none());
    }

    fn pod_at(name: &str, created: &str, ip: &str, change: impl FnOnce(&mut Pod)) -> Object {
        let mut pod = Pod {
            namespace: "a".into(),
            name: name.into(),
            created: created.into(),
            addresses: vec![ip.parse().unwrap()],
            ..Pod::default()
        };
        change(&mut pod);
        Object::Pod(pod)
    }

    #[test]
    fn addresses_lead_to_their_owner_while_pods_come_and_go() {
        let index = Index::new([]);
        let ip: IpAddr = "10.0.0.1".parse().unwrap();
        let who = || {
            index.at(ip).map(|(at, _)| match at {
                At::Pod(pod) => pod.name.clone(),
                At::Service(service) => format!("service {}", service.name),
            })
        };
        index.replace([pod_at("old", "2026-01-01T00:00:00Z", "10.0.0.1", |_| {})]);
        assert_eq!(who().unwrap(), "old");
        index.apply(pod_at("new", "2026-01-02T00:00:00Z", "10.0.0.1", |_| {}));
        assert_eq!(who().unwrap(), "new");
        index.apply(pod_at("newer", "2026-01-03T00:00:00Z", "10.0.0.1", |p| p.terminating = true));
        assert_eq!(who().unwrap(), "new", "the one that stays");
        index.apply(pod_at("new", "2026-01-02T00:00:00Z", "10.0.0.1", |p| p.finished = true));
        assert_eq!(who().unwrap(), "old");
        index.apply(pod_at("old", "2026-01-01T00:00:00Z", "10.0.0.2", |_| {}));
        index.delete(Kind::Pod, &Key::new("a", "newer"));
        assert_eq!(who(), None);
        index.apply(pod_at("host", "2026-01-01T00:00:00Z", "10.0.0.1", |p| p.host_network = true));
        assert_eq!(who(), None, "the node's address is nobody's own");
        index.apply(Object::Service(Service {
            namespace: "b".into(),
            name: "s".into(),
            cluster_ips: vec![ip],
            ..Service::default()
        }));
        assert_eq!(who().unwrap(), "service s");
        index.publish();
        let changes = index.take_changes();
        assert_eq!(changes.namespaces, BTreeSet::from(["a".to_owned(), "b".to_owned()]));
        assert_eq!(changes.addresses, HashSet::from([ip, "10.0.0.2".parse().unwrap()]));
        index.apply(pod_at("old", "2026-01-01T00:00:00Z", "10.0.0.2", |p| p.labels = BTreeMap::from([("x".into(), "y".into())])));
        index.publish();
        assert!(index.take_changes().addresses.is_empty());
        assert_eq!(index.take_changes(), Changes::default());
    }

    #[tokio::test]
    async fn a_burst_is_published_once() {
        let index = Arc::new(Index::new([]));
        let task = tokio::spawn(publisher(index.clone()));
        let mut generation = index.generation();
        for n in 0..100 {
            index.apply(pod("a", &format!("p{n}")));
        }
        generation.changed().await.unwrap();
        tokio::time::sleep(GATHER * 5).await;
        assert_eq!(*index.generation().borrow(), 1);
        assert_eq!(index.count(Kind::Pod), 100);
        task.abort();
    }
}
