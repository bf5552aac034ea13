//! What the proxy tells the control plane of its traffic, so that people can ask: who called whom, which policies decided, what was
//! refused. Samples, not bookkeeping: what has no room or gets lost on the way is left out; metrics are exact and kept elsewhere.
//!
//! Each worker has a [`Collector`] of its own. A request costs one look-up in a small map, without lock, clock or, for one whose like was
//! seen lately, allocation. Some seconds after the first of them the worker hands what it has to the process's thread, whose
//! [`Outbox`] keeps it until the control plane takes it.
//!
//! Clients choose paths, hosts and methods, so the map is bounded: with [`KEYS`] distinct ones paths and hosts of new ones are no longer told
//! apart, and with [`FOLDED`] more of these, new ones are left out, and counted.

mod outbox;

pub use outbox::Outbox;

use prometheus_client::metrics::counter::Counter;
use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::{BuildHasher, BuildHasherDefault, Hasher, RandomState};
use std::net::IpAddr;
use std::time::{Duration, SystemTime};
use tokio::sync::{Notify, mpsc};
use weft_api::wire;

/// Distinct requests that a worker tells apart by path and host.
pub const KEYS: usize = 4096;
/// Distinct ones beyond, without path and host.
pub const FOLDED: usize = 1024;
/// How long a worker gathers.
pub const GATHER: Duration = Duration::from_secs(5);
/// Longest path and host.
const TEXT: usize = 256;
/// Refused requests of one batch.
const REFUSALS: usize = 64;
/// Policies that hits are counted for.
const POLICIES: usize = 4096;
/// Batches after which a key that was not met is forgotten.
const IDLE: u32 = 12;
/// Methods that are kept where paths no longer are.
const METHODS: [&str; 9] = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "CONNECT", "TRACE"];

/// A request, or an opaque connection, that came in for the app.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    /// SPIFFE id of the peer; `None`: plaintext.
    pub identity: Option<&'a str>,
    /// Address of the peer.
    pub address: IpAddr,
    /// Port of the app.
    pub port: u16,
    /// What was asked for; `None`: an opaque connection.
    pub http: Option<SeenHttp<'a>>,
    /// Policy refused it.
    pub denied: bool,
}

/// The HTTP side of a [`Seen`].
#[derive(Clone, Copy, Debug)]
pub struct SeenHttp<'a> {
    /// As it came; empty, with an empty path: the request was not read.
    pub method: &'a str,
    /// Normalised, without the query.
    pub path: &'a str,
    /// With the port if the client wrote one.
    pub host: &'a [u8],
    /// "issuer/subject" of a verified token.
    pub principal: Option<&'a str>,
    /// `x-request-id`.
    pub request_id: Option<&'a [u8]>,
}

/// What a worker has gathered.
#[derive(Debug, Default)]
pub struct Batch {
    /// Who called.
    pub edges: Vec<wire::Edge>,
    /// Which policies decided.
    pub hits: Vec<wire::PolicyHits>,
    /// What was refused.
    pub refusals: Vec<wire::Refusal>,
}

impl Batch {
    fn is_empty(&self) -> bool {
        self.edges.is_empty() && self.hits.is_empty() && self.refusals.is_empty()
    }
}

/// Keys are hashes already.
#[derive(Debug, Default)]
struct Same(u64);

impl Hasher for Same {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {}
    fn write_u64(&mut self, n: u64) {
        self.0 = n;
    }
}

#[derive(Debug)]
struct Entry {
    edge: wire::Edge,
    address: IpAddr,
    /// Batches since it was met.
    idle: u32,
    folded: bool,
}

/// What of a request tells it from others.
#[derive(Clone, Copy)]
struct Key<'a> {
    identity: &'a str,
    address: IpAddr,
    port: u16,
    http: bool,
    method: &'a str,
    path: &'a str,
    host: &'a str,
    principal: &'a str,
}

impl<'a> Key<'a> {
    fn of(seen: &Seen<'a>) -> Self {
        let http = seen.http.as_ref();
        Self {
            identity: seen.identity.unwrap_or_default(),
            address: seen.address.to_canonical(),
            port: seen.port,
            http: http.is_some(),
            method: http.map_or("", |http| cut(http.method)),
            // A CONNECT has no path, and an empty one means that it isn't known, as an empty method does.
            path: http.map_or("", |http| match http.path {
                "" if !http.method.is_empty() => "/",
                path => cut(path),
            }),
            host: http.map_or("", |http| cut(std::str::from_utf8(http.host).unwrap_or("?"))),
            principal: http.and_then(|http| http.principal).map_or("", cut),
        }
    }

    /// Without what a client may choose freely.
    fn folded(self) -> Self {
        let method = if METHODS.contains(&self.method) { self.method } else { "" };
        Self { method, path: "", host: "", principal: "", ..self }
    }

    fn hash(&self, state: &RandomState) -> u64 {
        let mut hasher = state.build_hasher();
        for text in [self.identity, self.method, self.path, self.host, self.principal] {
            hasher.write(text.as_bytes());
            hasher.write_u8(0xff);
        }
        hasher.write_u32(u32::from(self.port) << 1 | u32::from(self.http));
        if self.identity.is_empty() {
            match self.address {
                IpAddr::V4(ip) => hasher.write_u32(ip.to_bits()),
                IpAddr::V6(ip) => hasher.write_u128(ip.to_bits()),
            }
        }
        hasher.finish()
    }

    /// Whether an entry is this one's, and not another one's with the same hash.
    fn is(&self, entry: &Entry) -> bool {
        let edge = &entry.edge;
        edge.source_identity == self.identity
            && (!self.identity.is_empty() || entry.address == self.address)
            && edge.port == u32::from(self.port)
            && (edge.protocol == "http") == self.http
            && edge.method == self.method
            && edge.path == self.path
            && edge.host == self.host
            && edge.request_principal == self.principal
    }

    fn entry(&self, folded: bool) -> Entry {
        let edge = wire::Edge {
            source_identity: self.identity.into(),
            source_address: if self.identity.is_empty() { self.address.to_string() } else { String::new() },
            port: self.port.into(),
            protocol: if self.http { "http" } else { "tcp" }.into(),
            method: self.method.into(),
            path: self.path.into(),
            host: self.host.into(),
            request_principal: self.principal.into(),
            ..wire::Edge::default()
        };
        Entry { edge, address: self.address, idle: 0, folded }
    }
}

/// A text, cut to [`TEXT`] bytes at a boundary of characters.
fn cut(text: &str) -> &str {
    if text.len() <= TEXT {
        return text;
    }
    let end = (0..=TEXT).rev().find(|end| text.is_char_boundary(*end)).unwrap_or_default();
    &text[..end]
}

#[derive(Clone, Copy, Debug, Default)]
struct Hit {
    allowed: u64,
    denied: u64,
}

/// Of one policy, by action and dry run: either may change while the name stays.
#[derive(Debug, Default)]
struct Hits([[Hit; 2]; 4]);

const ACTIONS: [wire::AuthorizationAction; 4] = [
    wire::AuthorizationAction::Allow,
    wire::AuthorizationAction::Deny,
    wire::AuthorizationAction::Audit,
    wire::AuthorizationAction::Custom,
];

#[derive(Debug, Default)]
struct Gathered {
    edges: HashMap<u64, Entry, BuildHasherDefault<Same>>,
    /// Of them, the folded ones.
    folded: usize,
    hits: HashMap<Box<str>, Hits>,
    refusals: Vec<wire::Refusal>,
    /// Something has come since the last batch.
    dirty: bool,
}

/// A worker's part; see the module.
#[derive(Debug, Default)]
pub struct Collector {
    state: RandomState,
    gathered: RefCell<Gathered>,
    first: Notify,
    /// Nobody takes what is gathered: nothing is.
    closed: bool,
    dropped: Counter,
}

impl Collector {
    /// A collector; samples for which there is no room are counted in `dropped`.
    pub fn new(dropped: Counter) -> Self {
        Self { dropped, ..Self::default() }
    }

    /// One that gathers nothing, because there is no control plane.
    pub fn closed() -> Self {
        Self { closed: true, ..Self::default() }
    }

    /// Counts a request or connection.
    pub fn seen(&self, seen: &Seen<'_>) {
        if self.closed {
            return;
        }
        let mut gathered = self.gathered.borrow_mut();
        let key = Key::of(seen);
        if !gathered.count(&key, key.hash(&self.state), seen.denied, false) {
            let folded = key.folded();
            if !gathered.count(&folded, folded.hash(&self.state), seen.denied, true) {
                self.dropped.inc();
            }
        }
        self.wake(&mut gathered);
    }

    /// Counts a decision of a policy ("namespace/name"; empty: that no ALLOW policy matched was the reason).
    pub fn hit(&self, policy: &str, action: wire::AuthorizationAction, dry_run: bool, denied: bool) {
        if self.closed {
            return;
        }
        let mut gathered = self.gathered.borrow_mut();
        if !gathered.hits.contains_key(policy) {
            if gathered.hits.len() >= POLICIES {
                self.dropped.inc();
                return;
            }
            gathered.hits.insert(policy.into(), Hits::default());
        }
        if let Some(hits) = gathered.hits.get_mut(policy) {
            let kind = &mut hits.0[action as usize & 3][usize::from(dry_run)];
            if denied { kind.denied += 1 } else { kind.allowed += 1 }
        }
        self.wake(&mut gathered);
    }

    /// Keeps a refused request or connection.
    pub fn refused(&self, seen: &Seen<'_>, policy: &str, reason: &str) {
        if self.closed {
            return;
        }
        let mut gathered = self.gathered.borrow_mut();
        if gathered.refusals.len() >= REFUSALS {
            self.dropped.inc();
            return;
        }
        let key = Key::of(seen);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let id = seen.http.as_ref().and_then(|http| http.request_id);
        gathered.refusals.push(wire::Refusal {
            time: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
            request_id: id.map_or_else(String::new, |id| cut(&String::from_utf8_lossy(id)).to_owned()),
            source_identity: key.identity.into(),
            source_address: key.address.to_string(),
            port: key.port.into(),
            method: key.method.into(),
            path: key.path.into(),
            host: key.host.into(),
            policy: policy.into(),
            reason: reason.into(),
        });
        self.wake(&mut gathered);
    }

    fn wake(&self, gathered: &mut Gathered) {
        if !std::mem::replace(&mut gathered.dirty, true) {
            self.first.notify_one();
        }
    }

    /// What was gathered since the last time.
    pub fn take(&self) -> Batch {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
        self.gathered.borrow_mut().take(now)
    }

    /// Hands batches on, for ever. A quiet worker is not woken.
    pub async fn run(&self, out: mpsc::Sender<Batch>) {
        self.run_every(GATHER, out).await;
    }

    async fn run_every(&self, time: Duration, out: mpsc::Sender<Batch>) {
        loop {
            self.first.notified().await;
            tokio::time::sleep(time).await;
            if out.is_closed() {
                return;
            }
            // Nobody has taken the last ones yet: what was gathered stays and goes with the next.
            if out.capacity() == 0 {
                self.first.notify_one();
                continue;
            }
            let batch = self.take();
            if !batch.is_empty() {
                let _ = out.try_send(batch);
            }
        }
    }
}

impl Gathered {
    /// Counts a key. False: there is no room for a new one.
    fn count(&mut self, key: &Key<'_>, hash: u64, denied: bool, folded: bool) -> bool {
        let room = if folded { self.folded < FOLDED } else { self.edges.len() - self.folded < KEYS };
        let entry = match self.edges.entry(hash) {
            std::collections::hash_map::Entry::Occupied(entry) => {
                let entry = entry.into_mut();
                if !key.is(entry) {
                    return false;
                }
                entry
            }
            std::collections::hash_map::Entry::Vacant(_) if !room => return false,
            std::collections::hash_map::Entry::Vacant(entry) => {
                self.folded += usize::from(folded);
                entry.insert(key.entry(folded))
            }
        };
        entry.edge.count += 1;
        entry.edge.denied += u64::from(denied);
        true
    }

    fn take(&mut self, now: u64) -> Batch {
        self.dirty = false;
        let mut batch = Batch { refusals: std::mem::take(&mut self.refusals), ..Batch::default() };
        let folded = &mut self.folded;
        self.edges.retain(|_, entry| {
            if entry.edge.count == 0 {
                entry.idle += 1;
                let keep = entry.idle < IDLE;
                *folded -= usize::from(!keep && entry.folded);
                return keep;
            }
            entry.idle = 0;
            batch.edges.push(wire::Edge { last: now, ..entry.edge.clone() });
            (entry.edge.count, entry.edge.denied) = (0, 0);
            true
        });
        self.hits.retain(|policy, hits| {
            let before = batch.hits.len();
            for (action, kinds) in ACTIONS.iter().zip(hits.0) {
                for (dry_run, Hit { allowed, denied }) in [false, true].into_iter().zip(kinds) {
                    if allowed + denied > 0 {
                        let (policy, action) = (policy.to_string(), (*action).into());
                        batch.hits.push(wire::PolicyHits { policy, action, dry_run, allowed, denied });
                    }
                }
            }
            *hits = Hits::default();
            batch.hits.len() > before
        });
        batch
    }
}

#[cfg(test)]
mod tests;
