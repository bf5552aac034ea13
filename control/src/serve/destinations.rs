//! Which proxies follow which addresses, and what they are told of them.
//!
//! A destination is computed once for all proxies that follow the address, when the first asks and whenever something it depends on
//! was published: its namespace, the address itself, the settings. Only one that came out different is handed on. Each stream has a
//! [`Mailbox`] with room for one destination an address: a proxy that reads slowly gets the latest and never a queue of old ones.
//!
//! Nothing is answered before the index knows every kind: until then, a Service would pass for an unknown address, and the proxy would
//! send plaintext where mutual TLS is due.

use crate::compile::security::jwt::Keys;
use crate::compile::{Known, Mesh, destination};
use crate::index::{At, Changes, Index};
use crate::model::policy::Policies;
use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Notify, watch};
use weft_api::wire::Destination;

/// All followed addresses. Share it by `Arc`.
pub struct Destinations {
    index: Arc<Index>,
    mesh: watch::Receiver<Arc<Mesh>>,
    followed: Mutex<HashMap<SocketAddr, Followed>>,
    ids: AtomicU64,
}

/// An address that is followed.
struct Followed {
    /// Where it lies, if it lies anywhere.
    namespace: Option<String>,
    now: Arc<Destination>,
    by: HashMap<u64, Arc<Mailbox>>,
}

/// Destinations that a stream is still to send.
#[derive(Debug, Default)]
pub struct Mailbox {
    waiting: Mutex<BTreeMap<SocketAddr, Arc<Destination>>>,
    /// Told with each letter.
    pub arrived: Notify,
}

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<SocketAddr, Arc<Destination>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, address: SocketAddr, destination: Arc<Destination>) {
        self.lock().insert(address, destination);
        self.arrived.notify_one();
    }

    /// Takes one.
    pub fn take(&self) -> Option<(SocketAddr, Arc<Destination>)> {
        self.lock().pop_first()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }
}

/// Follows addresses for one stream, until it is dropped.
pub struct Follower {
    all: Arc<Destinations>,
    id: u64,
    mailbox: Arc<Mailbox>,
    addresses: std::collections::HashSet<SocketAddr>,
}

impl Follower {
    /// Where its destinations arrive.
    pub fn mailbox(&self) -> &Arc<Mailbox> {
        &self.mailbox
    }

    /// How many addresses it follows.
    pub fn len(&self) -> usize {
        self.addresses.len()
    }

    /// Whether it follows none.
    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty()
    }

    /// Whether it follows this one.
    pub fn follows(&self, address: SocketAddr) -> bool {
        self.addresses.contains(&address)
    }

    /// Follows an address: the destination arrives at once, and again whenever it changes.
    pub fn follow(&mut self, address: SocketAddr) {
        self.addresses.insert(address);
        let mut followed = self.all.lock();
        let entry = followed.entry(address).or_insert_with(|| {
            let (namespace, now) = self.all.resolve(address);
            Followed { namespace, now: Arc::new(now), by: HashMap::new() }
        });
        entry.by.insert(self.id, self.mailbox.clone());
        self.mailbox.put(address, entry.now.clone());
    }

    /// Follows it no more.
    pub fn leave(&mut self, address: SocketAddr) {
        if self.addresses.remove(&address) {
            forget(&mut self.all.lock(), address, self.id);
            self.mailbox.lock().remove(&address);
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let mut followed = self.all.lock();
        for address in &self.addresses {
            forget(&mut followed, *address, self.id);
        }
    }
}

fn forget(followed: &mut HashMap<SocketAddr, Followed>, address: SocketAddr, id: u64) {
    if let Some(entry) = followed.get_mut(&address) {
        entry.by.remove(&id);
        if entry.by.is_empty() {
            followed.remove(&address);
        }
    }
}

impl Destinations {
    /// Nothing is followed yet.
    pub fn new(index: Arc<Index>, mesh: watch::Receiver<Arc<Mesh>>) -> Self {
        Self { index, mesh, followed: Mutex::default(), ids: AtomicU64::new(0) }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SocketAddr, Followed>> {
        self.followed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A follower for one stream.
    pub fn follower(self: &Arc<Self>) -> Follower {
        let id = self.ids.fetch_add(1, Ordering::Relaxed);
        Follower { all: self.clone(), id, mailbox: Arc::default(), addresses: std::collections::HashSet::new() }
    }

    /// How many different addresses are followed.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// What stands behind an address this moment, and the namespace in which it lies.
    pub fn resolve(&self, address: SocketAddr) -> (Option<String>, Destination) {
        let mesh = self.mesh.borrow().clone();
        let root = self.index.policies_of(mesh.root_namespace());
        self.resolve_in(address, &root, &mesh)
    }

    fn resolve_in(&self, address: SocketAddr, root: &Policies, mesh: &Mesh) -> (Option<String>, Destination) {
        // Where to connect does not depend on anybody's tokens.
        let keys = &Keys::default();
        match self.index.at(address.ip().to_canonical()) {
            Some((At::Service(service), view)) => {
                let known = Known { view: &view, root, mesh, keys };
                (Some(service.namespace.clone()), destination::of_service(address, &service, &known))
            }
            Some((At::Pod(pod), view)) => {
                let known = Known { view: &view, root, mesh, keys };
                (Some(pod.namespace.clone()), destination::of_pod(address, &pod, &known))
            }
            None => (None, destination::unknown(address)),
        }
    }

    /// Computes anew what `changes` may concern, or everything, and hands on what came out different.
    pub fn refresh(&self, changes: Option<&Changes>) {
        let mesh = self.mesh.borrow().clone();
        let root = self.index.policies_of(mesh.root_namespace());
        // A policy of the root namespace concerns everybody.
        let changes = changes.filter(|changes| !changes.policies.contains(mesh.root_namespace()));
        let mut followed = self.lock();
        for (address, entry) in followed.iter_mut() {
            let concerned = changes.is_none_or(|changes| {
                changes.addresses.contains(&address.ip().to_canonical())
                    || entry.namespace.as_ref().is_some_and(|namespace| changes.namespaces.contains(namespace))
            });
            if !concerned {
                continue;
            }
            let (namespace, now) = self.resolve_in(*address, &root, &mesh);
            entry.namespace = namespace;
            if *entry.now != now {
                entry.now = Arc::new(now);
                for mailbox in entry.by.values() {
                    mailbox.put(*address, entry.now.clone());
                }
            }
        }
    }

    /// Keeps all destinations right, until it is dropped.
    pub async fn run(self: Arc<Self>) {
        let mut generation = self.index.generation();
        let mut mesh = self.mesh.clone();
        loop {
            tokio::select! {
                changed = generation.changed() => {
                    if changed.is_err() { return }
                    let changes = self.index.take_changes();
                    self.refresh(Some(&changes));
                }
                changed = mesh.changed() => {
                    if changed.is_err() { return std::future::pending().await }
                    self.refresh(None);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Key, Kind, Object};
    use crate::source::wire::parse;
    use serde_json::json;

    fn service(namespace: &str, name: &str, ip: &str) -> Object {
        parse(json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace},
            "spec": {"clusterIP": ip, "ports": [{"name": "http", "port": 80}]}}))
        .unwrap()
        .unwrap()
    }

    fn slice(namespace: &str, service: &str, addresses: &[&str]) -> Object {
        parse(json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": format!("{service}-1"), "namespace": namespace, "labels": {"kubernetes.io/service-name": service}},
            "ports": [{"name": "http", "port": 8080}],
            "endpoints": addresses.iter().map(|a| json!({"addresses": [a]})).collect::<Vec<_>>()}))
        .unwrap()
        .unwrap()
    }

    fn addresses(mailbox: &Mailbox) -> Option<(String, Vec<String>)> {
        let (address, destination) = mailbox.take()?;
        assert_eq!(address.to_string(), destination.address);
        Some((destination.address.clone(), destination.endpoints.iter().map(|e| e.address.clone()).collect()))
    }

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn who_follows_is_told_what_changed_and_nothing_else() {
        let index = Arc::new(Index::new([]));
        let (_keep, mesh) = watch::channel(Arc::default());
        let all = Arc::new(Destinations::new(index.clone(), mesh));
        let publish = || {
            index.publish();
            all.refresh(Some(&index.take_changes()));
        };
        index.replace([service("a", "s", "10.96.0.1"), slice("a", "s", &["10.0.0.1"]), service("b", "t", "10.96.0.2")]);
        publish();
        let (mut one, mut two) = (all.follower(), all.follower());
        one.follow(at("10.96.0.1:80"));
        two.follow(at("10.96.0.1:80"));
        two.follow(at("10.96.0.2:80"));
        two.follow(at("10.96.0.3:80"));
        let told = |f: &Follower| std::iter::from_fn(|| addresses(f.mailbox())).collect::<Vec<_>>();
        let first = ("10.96.0.1:80".to_owned(), vec!["10.0.0.1:8080".to_owned()]);
        assert_eq!(told(&one), std::slice::from_ref(&first));
        assert_eq!(told(&two), [first, ("10.96.0.2:80".into(), vec![]), ("10.96.0.3:80".into(), vec![])]);

        // Two changes before anybody reads are one.
        index.apply(slice("a", "s", &["10.0.0.2"]));
        publish();
        index.apply(slice("a", "s", &["10.0.0.3"]));
        publish();
        let third = ("10.96.0.1:80".to_owned(), vec!["10.0.0.3:8080".to_owned()]);
        assert_eq!(told(&one), std::slice::from_ref(&third));
        assert_eq!(told(&two), [third]);

        // An address that becomes known, and one that nobody has any more.
        index.apply(service("c", "u", "10.96.0.3"));
        index.delete(Kind::Service, &Key::new("b", "t"));
        publish();
        assert_eq!(told(&two).len(), 2);
        assert!(told(&one).is_empty());

        // What changes without changing the answer is no news.
        index.apply(service("a", "other", "10.96.0.9"));
        publish();
        assert!(told(&one).is_empty() && told(&two).is_empty());

        one.leave(at("10.96.0.1:80"));
        index.apply(slice("a", "s", &["10.0.0.4"]));
        publish();
        assert!(told(&one).is_empty());
        assert_eq!(told(&two).len(), 1);
        assert_eq!(all.len(), 3);
        drop(two);
        assert!(all.is_empty());
    }
}
