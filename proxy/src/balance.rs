//! Which endpoint of a destination is next: of two that are picked at random, the one with fewer requests under way ("the power of two
//! choices"). Each worker decides by what it sent itself; nothing is shared.

use crate::directory::{Destination, Directory, Slot};
use crate::settings::Protocol;
use crate::tls::{Clients, Identities, IdentitySet};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

/// Routes that a worker keeps before it looks for those that were forgotten.
const KEPT: usize = 1024;

/// An endpoint as a worker sees it.
#[derive(Debug)]
pub struct Endpoint {
    /// Where.
    pub address: SocketAddr,
    /// Who has to prove himself there; none: plaintext.
    pub expected: Option<IdentitySet>,
    under_way: Cell<u32>,
}

/// An endpoint that was picked: it counts as used until this is dropped.
#[derive(Debug)]
pub struct Picked(Rc<Endpoint>);

impl Picked {
    fn new(endpoint: &Rc<Endpoint>) -> Self {
        endpoint.under_way.set(endpoint.under_way.get() + 1);
        Self(Rc::clone(endpoint))
    }

    /// The endpoint.
    pub fn endpoint(&self) -> &Endpoint {
        &self.0
    }
}

impl Drop for Picked {
    fn drop(&mut self) {
        self.0.under_way.set(self.0.under_way.get().saturating_sub(1));
    }
}

/// Where something is to go.
#[derive(Debug)]
pub enum Pick {
    /// To the very address that the app wanted: nothing else is known of it.
    Through,
    /// To this endpoint.
    Endpoint(Picked),
    /// Nowhere: the Service (named) has no endpoint that is ready.
    Nobody(String),
}

#[derive(Debug, Default)]
struct Known {
    source: Option<Arc<Destination>>,
    endpoints: Vec<Rc<Endpoint>>,
}

/// A worker's view of a destination.
#[derive(Debug)]
pub struct Route {
    slot: RefCell<Arc<Slot>>,
    known: RefCell<Known>,
}

impl Route {
    fn refresh(&self, routes: &Routes) {
        let forgotten = self.slot.borrow().is_forgotten();
        if forgotten {
            // A connection that outlived the memory of its destination: what was known counts until there is an answer.
            let address = self.slot.borrow().address;
            *self.slot.borrow_mut() = routes.directory.slot(address);
        }
        let slot = self.slot.borrow();
        routes.directory.touch(&slot);
        let current = slot.current();
        let Some(current) = current.as_ref() else { return };
        let mut known = self.known.borrow_mut();
        if known.source.as_ref().is_some_and(|source| Arc::ptr_eq(source, current)) {
            return;
        }
        let before = std::mem::take(&mut known.endpoints);
        known.endpoints = current
            .endpoints
            .iter()
            .map(|endpoint| {
                let expected =
                    (!endpoint.identities.is_empty()).then(|| routes.clients.identities().number(&endpoint.identities));
                let same = before.iter().find(|known| known.address == endpoint.address && known.expected == expected);
                same.map(Rc::clone)
                    .unwrap_or_else(|| Rc::new(Endpoint { address: endpoint.address, expected, under_way: Cell::new(0) }))
            })
            .collect();
        known.source = Some(Arc::clone(current));
    }

    /// What is declared for the destination.
    pub fn protocol(&self) -> Protocol {
        self.known.borrow().source.as_ref().map_or(Protocol::Detect, |source| source.protocol)
    }

    /// The destination as the control plane told it, if it did.
    pub fn destination(&self) -> Option<Arc<Destination>> {
        self.known.borrow().source.clone()
    }

    /// Picks an endpoint, another one than `not` if there is one.
    pub fn pick(&self, routes: &Routes, not: Option<SocketAddr>) -> Pick {
        self.refresh(routes);
        let known = self.known.borrow();
        let Some(source) = &known.source else { return Pick::Through };
        if source.is_unknown() {
            return Pick::Through;
        }
        match choose(&known.endpoints, not, || routes.random()) {
            Some(endpoint) => Pick::Endpoint(Picked::new(endpoint)),
            None => Pick::Nobody(source.service.as_ref().map(|service| service.host.clone()).unwrap_or_default()),
        }
    }
}

/// The better of two at random.
fn choose(endpoints: &[Rc<Endpoint>], not: Option<SocketAddr>, mut random: impl FnMut() -> u64) -> Option<&Rc<Endpoint>> {
    let mut one = || {
        // Multiplication spreads evenly enough, and needs no division.
        let at = ((u128::from(random()) * endpoints.len() as u128) >> 64) as usize;
        let at = if endpoints.len() > 1 && not == Some(endpoints[at].address) { (at + 1) % endpoints.len() } else { at };
        &endpoints[at]
    };
    match endpoints.len() {
        0 => None,
        1 => endpoints.first(),
        _ => {
            let (a, b) = (one(), one());
            Some(if b.under_way.get() < a.under_way.get() { b } else { a })
        }
    }
}

/// A worker's routes.
#[derive(Debug)]
pub struct Routes {
    directory: Arc<Directory>,
    /// The worker's TLS clients, which number the sets of identities.
    pub clients: Clients,
    routes: RefCell<HashMap<SocketAddr, Rc<Route>>>,
    seed: Cell<u64>,
}

impl Routes {
    /// None yet.
    pub fn new(directory: Arc<Directory>, identities: Rc<Identities>) -> Self {
        let seed = Cell::new(rand::random::<u64>() | 1);
        Self { directory, clients: Clients::new(identities), routes: RefCell::default(), seed }
    }

    /// The way to an address. Waits, the first time, for what the control plane knows of it. None: there is nobody to ask.
    pub async fn to(&self, address: SocketAddr) -> Option<Rc<Route>> {
        if self.directory.is_closed() {
            return None;
        }
        let known = self.routes.borrow().get(&address).map(Rc::clone);
        let route = known.unwrap_or_else(|| {
            let route = Rc::new(Route { slot: RefCell::new(self.directory.slot(address)), known: RefCell::default() });
            let mut routes = self.routes.borrow_mut();
            if routes.len() >= KEPT {
                routes.retain(|_, route| !route.slot.borrow().is_forgotten());
            }
            routes.insert(address, Rc::clone(&route));
            route
        });
        route.refresh(self);
        if route.known.borrow().source.is_none() {
            let slot = Arc::clone(&route.slot.borrow());
            self.directory.answered(&slot).await;
            route.refresh(self);
        }
        Some(route)
    }

    /// Xorshift: fast, and good enough to spread load.
    fn random(&self) -> u64 {
        let mut x = self.seed.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.seed.set(x);
        x.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::directory;

    fn destination(addresses: &[&str]) -> Destination {
        let endpoint = |a: &&str| directory::Endpoint {
            address: a.parse().unwrap(),
            identities: Vec::new(),
            workload: None,
            pod: String::new(),
        };
        Destination {
            service: Some(weft_api::wire::ServiceRef { host: "s.default.svc".into(), ..Default::default() }),
            endpoints: addresses.iter().map(endpoint).collect(),
            ..Destination::default()
        }
    }

    fn address(pick: &Pick) -> SocketAddr {
        let Pick::Endpoint(picked) = pick else { panic!("{pick:?}") };
        picked.endpoint().address
    }

    #[tokio::test]
    async fn load_is_even_and_follows_what_is_under_way() {
        let (directory, _inbox) = Directory::new();
        let directory = Arc::new(directory);
        let routes = Routes::new(Arc::clone(&directory), Rc::default());
        let service: SocketAddr = "10.0.0.1:80".parse().unwrap();
        let route = routes.to(service).await.unwrap();
        assert!(matches!(route.pick(&routes, None), Pick::Through), "nothing is known");
        directory.put(service, destination(&["10.1.0.1:1", "10.1.0.2:1", "10.1.0.3:1"]));
        let mut count: HashMap<SocketAddr, u32> = HashMap::new();
        for _ in 0..30_000 {
            *count.entry(address(&route.pick(&routes, None))).or_default() += 1;
        }
        assert!(count.len() == 3 && count.values().all(|n| (9_000..11_000).contains(n)), "{count:?}");
        // What is held counts: a hundred requests that never end are spread evenly.
        let held: Vec<Pick> = (0..99).map(|_| route.pick(&routes, None)).collect();
        let mut count: HashMap<SocketAddr, u32> = HashMap::new();
        for pick in &held {
            *count.entry(address(pick)).or_default() += 1;
        }
        assert!(count.values().all(|n| (27..=39).contains(n)), "{count:?}");
        let not = "10.1.0.1:1".parse().unwrap();
        assert!((0..100).all(|_| address(&route.pick(&routes, Some(not))) != not));
        // An endpoint that stays keeps its count.
        directory.put(service, destination(&["10.1.0.3:1", "10.1.0.4:1"]));
        let fresh = (0..400).filter(|_| address(&route.pick(&routes, None)) == "10.1.0.4:1".parse().unwrap()).count();
        assert!(fresh >= 250, "{fresh}");
        directory.put(service, destination(&[]));
        assert!(matches!(route.pick(&routes, None), Pick::Nobody(host) if host == "s.default.svc"));
        directory.put(service, Destination::default());
        assert!(matches!(route.pick(&routes, None), Pick::Through));
    }
}
