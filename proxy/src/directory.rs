//! What the proxy knows of destinations, by the address that the app connects to.
//!
//! A destination is asked for when the first connection to it comes, and what is then known stays known, through any outage of
//! the control plane, until nothing has gone there for [`UNUSED`]. The directory is shared by all threads, but its lock is only
//! taken when a worker meets an address for the first time and when something changes: a worker keeps a [`Slot`] for each address that
//! it has met, and reads what is in it without a lock.
//!
//! A destination about which nothing is known (not a Service or a pod of the cluster; or there is no control plane, or it is
//! away) is passed through: connected as the app wanted, in plaintext. Whether that is acceptable is the receiving side's decision, by its
//! PeerAuthentication; here it is counted (`weft_proxy_unresolved_total`).

use crate::settings::Protocol;
use arc_swap::ArcSwapOption;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, mpsc};
use weft_api::wire;

/// Without a use for this long a destination is forgotten.
pub const UNUSED: Duration = Duration::from_secs(600);
/// Destinations that are known at once. An app that goes through more addresses than that (a scanner, a crawler) makes room by forgetting the
/// one that was used longest ago.
pub const MOST: usize = 4000;
/// How long the first connection to a destination waits for what the control plane knows of it.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// Somewhere to connect.
#[derive(Clone, Debug, PartialEq)]
pub struct Endpoint {
    /// Where.
    pub address: SocketAddr,
    /// Who may be there, of whom one has to prove it by mutual TLS. Empty: plaintext is spoken.
    pub identities: Vec<String>,
    /// Whose it is.
    pub workload: Option<wire::Workload>,
    /// Name of the pod.
    pub pod: String,
}

/// What stands behind an address.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Destination {
    /// The Service, if it is one's.
    pub service: Option<wire::ServiceRef>,
    /// What the Service declares.
    pub protocol: Protocol,
    /// Connections go to that very address.
    pub direct: bool,
    /// Where connections may go.
    pub endpoints: Vec<Endpoint>,
}

impl Destination {
    /// Reads a message.
    ///
    /// # Errors
    /// What is wrong with it; it is then to be refused as a whole.
    pub fn from_wire(message: wire::Destination) -> Result<(SocketAddr, Self), String> {
        let address = message.address.parse().map_err(|_| format!("destination: {:?} is no address", message.address))?;
        let protocol = Protocol::from_wire(message.protocol)
            .ok_or_else(|| format!("destination {address}: protocol {} is not known to this version", message.protocol))?;
        let mut endpoints = Vec::with_capacity(message.endpoints.len());
        for endpoint in message.endpoints {
            let at = endpoint.address.parse();
            let at = at.map_err(|_| format!("destination {address}: endpoint {:?} is no address", endpoint.address))?;
            if let Some(bad) = endpoint.identities.iter().find(|id| crate::tls::spiffe::split(id).is_none()) {
                return Err(format!("destination {address}: endpoint {at}: {bad:?} is no SPIFFE identity"));
            }
            let (workload, pod) = (endpoint.workload, endpoint.pod);
            endpoints.push(Endpoint { address: at, identities: endpoint.identities, workload, pod });
        }
        Ok((address, Self { service: message.service, protocol, direct: message.direct, endpoints }))
    }

    /// Nothing is known of it.
    pub fn is_unknown(&self) -> bool {
        self.service.is_none() && self.endpoints.is_empty()
    }
}

/// The place of a destination in the directory.
#[derive(Debug)]
pub struct Slot {
    /// Its address.
    pub address: SocketAddr,
    current: ArcSwapOption<Destination>,
    answered: Notify,
    /// Seconds since the directory's beginning.
    used: AtomicU64,
    forgotten: AtomicBool,
}

impl Slot {
    /// What is known, if there was an answer.
    pub fn current(&self) -> arc_swap::Guard<Option<Arc<Destination>>> {
        self.current.load()
    }

    /// It was dropped from the directory, and is not kept up any more.
    pub fn is_forgotten(&self) -> bool {
        self.forgotten.load(Ordering::Relaxed)
    }
}

/// What the discovery client is to tell the control plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Somebody wants to know of it.
    Watch(SocketAddr),
    /// Nobody does any more.
    Unwatch(SocketAddr),
}

/// See the module.
#[derive(Debug)]
pub struct Directory {
    slots: Mutex<HashMap<SocketAddr, Arc<Slot>>>,
    /// None: there is no control plane, so nobody can be asked.
    wishes: Option<mpsc::UnboundedSender<Wish>>,
    connected: AtomicBool,
    started: Instant,
}

impl Directory {
    /// An empty directory, and where its wishes arrive.
    pub fn new() -> (Self, mpsc::UnboundedReceiver<Wish>) {
        let (wishes, inbox) = mpsc::unbounded_channel();
        (Self { wishes: Some(wishes), ..Self::closed() }, inbox)
    }

    /// One that will never know anything.
    pub fn closed() -> Self {
        Self { slots: Mutex::default(), wishes: None, connected: AtomicBool::new(false), started: Instant::now() }
    }

    /// Whether there is nobody to ask, ever.
    pub fn is_closed(&self) -> bool {
        self.wishes.is_none()
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<SocketAddr, Arc<Slot>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        self.started.elapsed().as_secs()
    }

    fn wish(&self, wish: Wish) {
        if let Some(wishes) = &self.wishes {
            let _ = wishes.send(wish);
        }
    }

    /// The place of an address, which is asked for if it is new.
    pub fn slot(&self, address: SocketAddr) -> Arc<Slot> {
        let mut slots = self.slots();
        if let Some(slot) = slots.get(&address) {
            return Arc::clone(slot);
        }
        if slots.len() >= MOST
            && let Some(oldest) = slots.values().min_by_key(|slot| slot.used.load(Ordering::Relaxed)).map(|slot| slot.address)
        {
            self.forget(&mut slots, oldest);
        }
        let slot = Arc::new(Slot {
            address,
            current: ArcSwapOption::empty(),
            answered: Notify::new(),
            used: AtomicU64::new(self.now()),
            forgotten: AtomicBool::new(false),
        });
        slots.insert(address, Arc::clone(&slot));
        self.wish(Wish::Watch(address));
        slot
    }

    fn forget(&self, slots: &mut HashMap<SocketAddr, Arc<Slot>>, address: SocketAddr) {
        if let Some(slot) = slots.remove(&address) {
            slot.forgotten.store(true, Ordering::Relaxed);
            self.wish(Wish::Unwatch(address));
        }
    }

    /// Something goes to the destination.
    pub fn touch(&self, slot: &Slot) {
        slot.used.store(self.now(), Ordering::Relaxed);
    }

    /// Waits until there is an answer, but not for ever, and not at all while the control plane is away. Whether there is one.
    pub async fn answered(&self, slot: &Slot) -> bool {
        let waiting = async {
            loop {
                let mut answered = std::pin::pin!(slot.answered.notified());
                answered.as_mut().enable();
                if slot.current.load().is_some() {
                    return true;
                }
                if !self.connected.load(Ordering::Acquire) {
                    return false;
                }
                answered.await;
            }
        };
        tokio::time::timeout(PATIENCE, waiting).await.unwrap_or(false)
    }

    /// Takes an answer. False: nobody has asked.
    pub fn put(&self, address: SocketAddr, destination: Destination) -> bool {
        let slot = self.slots().get(&address).map(Arc::clone);
        let Some(slot) = slot else { return false };
        if slot.current.load().as_deref() != Some(&destination) {
            slot.current.store(Some(Arc::new(destination)));
        }
        slot.answered.notify_waiters();
        true
    }

    /// The control plane is there (all addresses are to be asked for again: they are returned), or has gone.
    pub fn connected(&self, connected: bool) -> Vec<SocketAddr> {
        self.connected.store(connected, Ordering::Release);
        let slots = self.slots();
        if !connected {
            // Who waits for an answer will not get it soon.
            slots.values().for_each(|slot| slot.answered.notify_waiters());
        }
        slots.keys().copied().collect()
    }

    /// Forgets what has not been used for long. To be called now and then.
    pub fn sweep(&self) {
        let now = self.now();
        let mut slots = self.slots();
        let unused = |slot: &Arc<Slot>| now.saturating_sub(slot.used.load(Ordering::Relaxed)) >= UNUSED.as_secs();
        let old: Vec<SocketAddr> = slots.values().filter(|slot| unused(slot)).map(|slot| slot.address).collect();
        for address in old {
            self.forget(&mut slots, address);
        }
    }

    /// All that is known, for people.
    pub fn list(&self) -> Vec<(SocketAddr, Option<Arc<Destination>>)> {
        let mut all: Vec<_> = self.slots().values().map(|slot| (slot.address, slot.current.load_full())).collect();
        all.sort_by_key(|(address, _)| *address);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(n: u16) -> SocketAddr {
        format!("10.0.0.1:{n}").parse().unwrap()
    }

    fn drain(inbox: &mut mpsc::UnboundedReceiver<Wish>) -> Vec<Wish> {
        std::iter::from_fn(|| inbox.try_recv().ok()).collect()
    }

    #[tokio::test]
    async fn the_first_to_come_waits_for_the_answer_but_not_for_a_control_plane_that_is_away() {
        let (directory, mut inbox) = Directory::new();
        let slot = directory.slot(address(80));
        assert_eq!(drain(&mut inbox), [Wish::Watch(address(80))]);
        assert!(!directory.answered(&slot).await, "nobody is connected");
        assert_eq!(directory.connected(true), [address(80)]);
        let (answered, ()) = tokio::join!(directory.answered(&slot), async {
            tokio::time::sleep(Duration::from_millis(5)).await;
            assert!(directory.put(address(80), Destination::default()));
        });
        assert!(answered);
        directory.connected(false);
        assert!(directory.answered(&slot).await, "what is known stays known");
        let other = directory.slot(address(81));
        directory.connected(true);
        let started = tokio::time::Instant::now();
        assert!(!directory.answered(&other).await);
        assert!(started.elapsed() >= PATIENCE);
        assert!(!directory.put(address(9), Destination::default()), "nobody asked");
    }

    #[test]
    fn room_is_made_by_forgetting_the_least_recently_used() {
        let (directory, mut inbox) = Directory::new();
        let first = directory.slot(address(1));
        first.used.store(0, Ordering::Relaxed);
        for n in 2..=MOST as u16 {
            directory.slot(address(n)).used.store(5, Ordering::Relaxed);
        }
        assert!(!first.is_forgotten());
        drain(&mut inbox);
        directory.slot(address(60_000));
        assert!(first.is_forgotten());
        assert_eq!(drain(&mut inbox), [Wish::Unwatch(address(1)), Wish::Watch(address(60_000))]);
        assert_eq!(directory.list().len(), MOST);
    }

    #[test]
    fn messages() {
        let message = |address: &str, endpoint: &str, identity: &str| wire::Destination {
            address: address.into(),
            protocol: wire::Protocol::Http1.into(),
            endpoints: vec![wire::Endpoint {
                address: endpoint.into(),
                identities: vec![identity.into()],
                ..wire::Endpoint::default()
            }],
            ..wire::Destination::default()
        };
        let (at, destination) = Destination::from_wire(message("10.0.0.1:80", "10.1.0.1:8080", "spiffe://a/b")).unwrap();
        assert_eq!((at, destination.protocol), (address(80), Protocol::Http1));
        assert!(!destination.is_unknown());
        for (bad, word) in [
            (message("x", "10.1.0.1:8080", "spiffe://a/b"), "\"x\""),
            (message("10.0.0.1:80", "10.1.0.1", "spiffe://a/b"), "\"10.1.0.1\""),
            (message("10.0.0.1:80", "10.1.0.1:1", "a/b"), "\"a/b\""),
            (wire::Destination { protocol: 99, ..message("10.0.0.1:80", "10.1.0.1:1", "spiffe://a/b") }, "99"),
        ] {
            assert!(Destination::from_wire(bad).unwrap_err().contains(word));
        }
    }
}
