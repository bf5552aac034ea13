//! DNS of the app, captured: queries that the redirection leads here go to the pod's own resolvers and their answers back, byte for
//! byte but for the id.
//!
//! A datagram is asked anew from a socket of its own, with an unpredictable port and id, so that nobody off the path can slip
//! an answer in ([`udp`]). A TCP connection gets a connection of its own to a resolver ([`tcp`]). What a resolver truncated the app is
//! told so, and asks again over TCP. Nothing is cached, sorted or rewritten: what the app sees is what its resolvers say.
//!
//! **Failure.** A resolver that is silent, refuses or fails is followed by the next. When none is left, the app gets SERVFAIL at once
//! instead of waiting for its own timeout. Too many queries under way: SERVFAIL too. The proxy's own queries are exempt
//! from the redirection by their user; should they come back all the same (the proxy runs as another user), they are dropped and
//! counted, never asked again.
//!
//! It has a thread and a runtime of its own: a flood of queries costs neither requests nor probes anything.

pub mod message;
mod metrics;
pub mod resolvers;
mod tcp;
mod udp;

pub use metrics::{Metrics, Outcome, Transport};
pub use resolvers::Resolvers;

use crate::sys;
use anyhow::Context as _;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Most datagrams under way: each holds a descriptor for each resolver that it has been sent to.
const QUERIES: usize = 512;
/// Most TCP clients.
const CLIENTS: usize = 128;
/// The largest message.
const MESSAGE: usize = 65_535;

/// Where DNS is answered and who is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Settings {
    /// Where queries are taken, by UDP and by TCP. IPv6 addresses may be missing on the machine.
    pub listen: Vec<SocketAddr>,
    /// Who is asked; empty: the nameservers of `/etc/resolv.conf`.
    pub resolvers: Vec<SocketAddr>,
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
struct Patience {
    /// Until the next resolver is asked as well.
    attempt: Duration,
    /// Until the app is told SERVFAIL: sooner than a stub resolver's usual 5 s, so that it learns why.
    datagram: Duration,
    /// A TCP connection to a resolver, and an answer on it.
    stream: Duration,
    /// A TCP client that has nothing under way.
    idle: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            attempt: Duration::from_millis(1500),
            datagram: Duration::from_millis(4500),
            stream: Duration::from_secs(3),
            idle: Duration::from_secs(20),
        }
    }
}

/// What the listeners share.
#[derive(Debug)]
struct Server {
    resolvers: Resolvers,
    metrics: Arc<Metrics>,
    patience: Patience,
    /// Sockets of ours that ask, by address family (whether IPv6), transport and port: a query from one of them is our own.
    asking: RefCell<HashMap<(Transport, bool, u16), u16>>,
    queries: Cell<usize>,
    clients: Cell<usize>,
    /// What a datagram is received into; taken only while nothing is awaited.
    buffer: RefCell<Box<[u8]>>,
}

impl Server {
    fn new(resolvers: Resolvers, metrics: Arc<Metrics>, patience: Patience) -> Rc<Self> {
        Rc::new(Self {
            resolvers,
            metrics,
            patience,
            asking: RefCell::default(),
            queries: Cell::new(0),
            clients: Cell::new(0),
            buffer: RefCell::new(vec![0; MESSAGE].into()),
        })
    }

    /// Notes a socket that asks, until the value is dropped.
    fn asks(self: &Rc<Self>, transport: Transport, own: SocketAddr) -> Asking {
        let key = (transport, own.is_ipv6(), own.port());
        *self.asking.borrow_mut().entry(key).or_default() += 1;
        Asking { server: Rc::clone(self), key }
    }

    /// Whether a query that came from there is one that we have sent.
    fn is_own(&self, transport: Transport, peer: SocketAddr) -> bool {
        self.asking.borrow().contains_key(&(transport, peer.is_ipv6(), peer.port()))
    }

    fn count(&self, transport: Transport, outcome: Outcome) {
        self.metrics.query(transport, outcome);
    }
}

struct Asking {
    server: Rc<Server>,
    key: (Transport, bool, u16),
}

impl Drop for Asking {
    fn drop(&mut self) {
        let mut asking = self.server.asking.borrow_mut();
        if let Some(count) = asking.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                asking.remove(&self.key);
            }
        }
    }
}

/// Counts its holder among those that are at work.
struct Place<'a>(&'a Cell<usize>);

impl<'a> Place<'a> {
    fn take(count: &'a Cell<usize>, limit: usize) -> Option<Self> {
        (count.get() < limit).then(|| {
            count.set(count.get() + 1);
            Self(count)
        })
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// The open sockets.
#[derive(Debug)]
pub struct Sockets {
    datagrams: Vec<std::net::UdpSocket>,
    streams: Vec<std::net::TcpListener>,
}

/// Opens the sockets.
///
/// # Errors
/// An IPv4 address can't be listened on: names would not resolve in the pod, so the proxy must not come up without it.
pub fn open(settings: &Settings) -> anyhow::Result<Sockets> {
    let mut sockets = Sockets { datagrams: Vec::new(), streams: Vec::new() };
    for address in &settings.listen {
        let both = std::net::UdpSocket::bind(address)
            .and_then(|socket| socket.set_nonblocking(true).map(|()| socket))
            .and_then(|datagrams| Ok((datagrams, sys::listen(*address, false)?)));
        match both {
            Ok((datagrams, streams)) => {
                sockets.datagrams.push(datagrams);
                sockets.streams.push(streams);
            }
            Err(error) if address.is_ipv6() => tracing::debug!("no DNS on {address}: {error}"),
            Err(error) => anyhow::bail!("listening for DNS on {address} failed: {error}; does the app use the port?"),
        }
    }
    Ok(sockets)
}

/// Answers until the process ends, in a thread of its own.
///
/// # Errors
/// The thread can't be started.
pub fn start(settings: &Settings, sockets: Sockets, metrics: Arc<Metrics>) -> anyhow::Result<()> {
    let resolvers = Resolvers::new(&settings.resolvers);
    let work = move || {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return tracing::error!("DNS is not answered: {error}"),
        };
        let server = Server::new(resolvers, metrics, Patience::default());
        tokio::task::LocalSet::new().block_on(&runtime, serve(sockets, server));
    };
    std::thread::Builder::new().name("dns".into()).stack_size(1 << 20).spawn(work).context("starting the thread for DNS")?;
    Ok(())
}

async fn serve(sockets: Sockets, server: Rc<Server>) {
    let mut loops = tokio::task::JoinSet::new();
    for socket in sockets.datagrams {
        match tokio::net::UdpSocket::from_std(socket) {
            Ok(socket) => {
                loops.spawn_local(udp::serve(Rc::new(socket), Rc::clone(&server)));
            }
            Err(error) => tracing::error!("DNS by UDP is not answered: {error}"),
        }
    }
    for socket in sockets.streams {
        match tokio::net::TcpListener::from_std(socket) {
            Ok(socket) => {
                loops.spawn_local(tcp::accept(socket, Rc::clone(&server)));
            }
            Err(error) => tracing::error!("DNS by TCP is not answered: {error}"),
        }
    }
    while loops.join_next().await.is_some() {}
}

#[cfg(test)]
mod tests;
