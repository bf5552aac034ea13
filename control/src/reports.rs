//! What the proxies report: their certificates, how often policies decided, who called them, what they refused. Kept in memory, for
//! questions of people ([`crate::serve::console`]), never for decisions of the mesh: it may be incomplete, and is lost with a restart.
//!
//! - A replica knows only what proxies that are attached to it have said; whoever asks adds up.
//! - A report counts for the pod that the stream was proved to be of, whatever it says. So a compromised proxy can lie about itself
//!   and about nobody else.
//! - Everything is bounded: texts are cut, lists of one report are cut, each store has a limit, and a proxy that reports more than
//!   [`Limits::burst`] times in a row without [`Limits::pause`] between has the rest ignored. What is left out is counted.
//! - Time is monotonic, tied to the wall clock at the start; a test moves it by hand.

pub mod edges;
mod numbers;

use edges::{Count, Edges, Key};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use weft_api::console::{Certificate, PolicyHit, Proxy, Refusal, Source, Workload};
use weft_api::wire::{self, AuthorizationAction, Hello, Report};

pub use numbers::Numbers;

/// Longest text that is kept of a report, in bytes; a SPIFFE id may have 2,048, those of Kubernetes have at most 600.
const TEXT: usize = 700;
/// Longest path or host that is kept.
const PATH: usize = 256;

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Of edges.
    pub edges: edges::Limits,
    /// Refused requests.
    pub refusals: usize,
    /// Refused requests of one report.
    pub refusals_per_report: usize,
    /// Pairs of pod and policy that hits are counted for.
    pub hits: usize,
    /// Of them those of one pod.
    pub hits_per_pod: usize,
    /// Proxies that are gone.
    pub gone: usize,
    /// How long they are remembered.
    pub remember: Duration,
    /// Reports that a proxy may send in a row.
    pub burst: u32,
    /// Time in which it may send one more.
    pub pause: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            edges: edges::Limits::default(),
            refusals: 10_000,
            refusals_per_report: 64,
            hits: 100_000,
            hits_per_pod: 2_000,
            gone: 10_000,
            remember: Duration::from_secs(3600),
            burst: 100,
            pause: Duration::from_millis(200),
        }
    }
}

/// The time: that of the machine, or, in tests, one that moves when it is told to.
#[derive(Clone, Debug)]
struct Clock {
    wall: SystemTime,
    start: Instant,
    moved: Option<Arc<AtomicU64>>,
}

impl Clock {
    fn new() -> Self {
        Self { wall: SystemTime::now(), start: Instant::now(), moved: None }
    }

    /// Time since the start.
    fn elapsed(&self) -> Duration {
        match &self.moved {
            Some(moved) => Duration::from_millis(moved.load(Ordering::Relaxed)),
            None => self.start.elapsed(),
        }
    }

    /// Seconds since 1970.
    fn now(&self) -> u64 {
        (self.wall + self.elapsed()).duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
    }
}

/// A pod: namespace and name.
type PodName = (String, String);

#[derive(Debug)]
struct Attachment {
    proxy: Proxy,
    /// Streams that are open; a proxy that reconnects may have two for a moment.
    streams: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct HitKey {
    policy: String,
    action: i32,
    dry_run: bool,
}

#[derive(Debug, Default)]
struct Dropped {
    reports: u64,
    hits: u64,
    refusals: u64,
}

#[derive(Debug)]
struct State {
    proxies: BTreeMap<PodName, Attachment>,
    /// Those that are gone, in the order in which they went; some may have come back.
    gone: VecDeque<(u64, PodName)>,
    hits: HashMap<PodName, BTreeMap<HitKey, (u64, u64)>>,
    hit_count: usize,
    edges: Edges,
    refusals: VecDeque<Refusal>,
    dropped: Dropped,
    reports: u64,
}

/// The store. Share it by `Arc`.
#[derive(Debug)]
pub struct Reports {
    limits: Limits,
    clock: Clock,
    state: Mutex<State>,
}

impl Default for Reports {
    fn default() -> Self {
        Self::new(Limits::default())
    }
}

impl Reports {
    /// An empty store.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            clock: Clock::new(),
            state: Mutex::new(State {
                proxies: BTreeMap::new(),
                gone: VecDeque::new(),
                hits: HashMap::new(),
                hit_count: 0,
                edges: Edges::new(limits.edges),
                refusals: VecDeque::new(),
                dropped: Dropped::default(),
                reports: 0,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while the lock was held can at worst have left one report half counted.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A proxy has attached, and was proved to be the one that it says. It counts as connected until the value is dropped.
    pub fn attach(self: &Arc<Self>, hello: &Hello) -> Attached {
        let name = (hello.namespace.clone(), hello.pod.clone());
        let now = self.clock.now();
        let mut state = self.lock();
        state.forget_gone(now, &self.limits);
        let streams = state.proxies.get(&name).map_or(0, |a| a.streams);
        let before = state.proxies.remove(&name).map(|a| a.proxy);
        let proxy = Proxy {
            namespace: cut(&hello.namespace, TEXT),
            pod: cut(&hello.pod, TEXT),
            addresses: hello.addresses.iter().take(8).map(|a| cut(a, 64)).collect(),
            node: cut(&hello.node, TEXT),
            version: cut(&hello.version, 100),
            workload: before.as_ref().map(|p| p.workload.clone()).unwrap_or_default(),
            connected: true,
            since: now,
            gone: 0,
            // It reports its own when it has one; until then the one that it had a moment ago says more than nothing.
            certificate: before.and_then(|p| p.certificate),
            refused: String::new(),
        };
        state.proxies.insert(name.clone(), Attachment { proxy, streams: streams + 1 });
        drop(state);
        let allowance = Mutex::new(Allowance { left: self.limits.burst, at: self.clock.elapsed() });
        Attached { reports: self.clone(), name, workload: Mutex::default(), allowance }
    }

    /// The proxies that are attached, and those that were a while ago, in order of namespace and pod.
    pub fn proxies(&self) -> Vec<Proxy> {
        let now = self.clock.now();
        let mut state = self.lock();
        state.forget_gone(now, &self.limits);
        state.proxies.values().map(|a| a.proxy.clone()).collect()
    }

    /// How often policies decided, in order of policy and pod.
    pub fn hits(&self) -> Vec<PolicyHit> {
        let state = self.lock();
        let mut all: Vec<PolicyHit> = state
            .hits
            .iter()
            .flat_map(|((namespace, pod), hits)| {
                hits.iter().map(move |(key, (allowed, denied))| PolicyHit {
                    namespace: namespace.clone(),
                    pod: pod.clone(),
                    policy: key.policy.clone(),
                    action: action(key.action).into(),
                    dry_run: key.dry_run,
                    allowed: *allowed,
                    denied: *denied,
                })
            })
            .collect();
        drop(state);
        all.sort_by(|a, b| (&a.policy, &a.namespace, &a.pod, &a.action).cmp(&(&b.policy, &b.namespace, &b.pod, &b.action)));
        all
    }

    /// The edges of the last while (at most an hour), in no order.
    pub fn edges(&self, since: Duration) -> Vec<(Arc<Key>, Count)> {
        let now = self.clock.now() / 60;
        // The current minute has only begun: one more is looked at, so that "the last minute" is never empty at its start.
        self.lock().edges.since(now, since.as_secs().div_ceil(60) + 1)
    }

    /// Samples of edges that were not kept.
    pub fn edges_dropped(&self) -> u64 {
        self.lock().edges.dropped()
    }

    /// For how long samples are kept by now.
    pub fn kept(&self) -> Duration {
        self.clock.elapsed().min(Duration::from_secs(self.limits.edges.minutes * 60))
    }

    /// Refused requests, newest first.
    pub fn refusals(&self, wanted: impl Fn(&Refusal) -> bool, limit: usize) -> Vec<Refusal> {
        self.lock().refusals.iter().rev().filter(|r| wanted(r)).take(limit).cloned().collect()
    }
}

impl State {
    fn forget_gone(&mut self, now: u64, limits: &Limits) {
        while let Some((at, _)) = self.gone.front()
            && (*at + limits.remember.as_secs() <= now || self.gone.len() > limits.gone)
        {
            let Some((at, name)) = self.gone.pop_front() else { break };
            // Unless it came back, or went again later.
            if self.proxies.get(&name).is_some_and(|a| !a.proxy.connected && a.proxy.gone == at) {
                self.proxies.remove(&name);
                if let Some(hits) = self.hits.remove(&name) {
                    self.hit_count -= hits.len();
                }
            }
        }
    }

    fn count_hits(&mut self, name: &PodName, hits: Vec<wire::PolicyHits>, limits: &Limits) {
        let pod = self.hits.entry(name.clone()).or_default();
        for hit in hits {
            let key = HitKey { policy: cut(&hit.policy, TEXT), action: hit.action, dry_run: hit.dry_run };
            let room = self.hit_count < limits.hits && pod.len() < limits.hits_per_pod;
            if !room && !pod.contains_key(&key) {
                self.dropped.hits += 1;
                continue;
            }
            let entry = pod.entry(key).or_insert_with(|| {
                self.hit_count += 1;
                (0, 0)
            });
            entry.0 = entry.0.saturating_add(hit.allowed);
            entry.1 = entry.1.saturating_add(hit.denied);
        }
        if pod.is_empty() {
            self.hits.remove(name);
        }
    }
}

#[derive(Debug)]
struct Allowance {
    left: u32,
    /// Since the start.
    at: Duration,
}

/// A proxy that is attached; see [`Reports::attach`].
#[derive(Debug)]
pub struct Attached {
    reports: Arc<Reports>,
    name: PodName,
    workload: Mutex<Arc<Workload>>,
    allowance: Mutex<Allowance>,
}

impl Attached {
    /// What is known of the pod's workload.
    pub fn workload(&self, labels: &wire::Workload) {
        let workload = Arc::new(Workload {
            namespace: labels.namespace.clone(),
            kind: labels.kind.clone(),
            name: labels.name.clone(),
            service_account: labels.service_account.clone(),
        });
        if let Some(attachment) = self.reports.lock().proxies.get_mut(&self.name) {
            attachment.proxy.workload = (*workload).clone();
        }
        *self.workload.lock().unwrap_or_else(PoisonError::into_inner) = workload;
    }

    /// The proxy has taken its configuration, or (with a reason) refused it.
    pub fn answered(&self, error: &str) {
        if let Some(attachment) = self.reports.lock().proxies.get_mut(&self.name) {
            attachment.proxy.refused = cut(error, TEXT);
        }
    }

    /// Takes a report. Cheap where the proxy sends more than it may.
    pub fn report(&self, report: Report) {
        let Reports { limits, clock, .. } = &*self.reports;
        let allowed = self.may_report();
        let workload = self.destination();
        let now = clock.now();
        let mut state = self.reports.lock();
        if !allowed {
            state.dropped.reports += 1;
            return;
        }
        state.reports += 1;
        if let Some(certificate) = report.certificate
            && let Some(attachment) = state.proxies.get_mut(&self.name)
        {
            attachment.proxy.certificate = Some(Certificate {
                identity: cut(&certificate.identity, TEXT),
                not_before: certificate.not_before,
                not_after: certificate.not_after,
                issuer: cut(&certificate.issuer, TEXT),
                serial: cut(&certificate.serial, 100),
                error: cut(&certificate.error, TEXT),
            });
        }
        if !report.hits.is_empty() {
            state.count_hits(&self.name, report.hits, limits);
        }
        for edge in report.edges {
            let Some(port) = u16::try_from(edge.port).ok().filter(|p| *p != 0) else { continue };
            let last = if edge.last == 0 { now } else { edge.last.min(now) };
            let count = Count { count: edge.count, denied: edge.denied.min(edge.count), last };
            let key = Key {
                destination: workload.clone(),
                port,
                http: edge.protocol == "http",
                source_identity: cut(&edge.source_identity, TEXT).into(),
                source_address: if edge.source_identity.is_empty() {
                    cut(&edge.source_address, 64).into()
                } else {
                    Box::default()
                },
                method: cut(&edge.method, 32).into(),
                path: cut(&edge.path, PATH).into(),
                host: cut(&edge.host, PATH).into(),
                request_principal: cut(&edge.request_principal, PATH).into(),
            };
            state.edges.add(now / 60, last / 60, key, count);
        }
        let left_out = report.refusals.len().saturating_sub(limits.refusals_per_report);
        state.dropped.refusals += left_out as u64;
        // Newest last: the newest are kept.
        for refusal in report.refusals.into_iter().skip(left_out) {
            if state.refusals.len() >= limits.refusals {
                state.refusals.pop_front();
            }
            let refusal = self.refusal(refusal, &workload);
            state.refusals.push_back(refusal);
        }
    }

    fn destination(&self) -> Arc<Workload> {
        let known = self.workload.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if !known.name.is_empty() {
            return known;
        }
        // Not yet told its configuration: the pod speaks for itself.
        let (namespace, pod) = self.name.clone();
        Arc::new(Workload { namespace, kind: "Pod".into(), name: pod, service_account: String::new() })
    }

    fn refusal(&self, refusal: wire::Refusal, workload: &Workload) -> Refusal {
        Refusal {
            time: refusal.time,
            request_id: cut(&refusal.request_id, 200),
            source: Source {
                identity: cut(&refusal.source_identity, TEXT),
                address: cut(&refusal.source_address, 64),
                ..Source::default()
            },
            namespace: self.name.0.clone(),
            pod: self.name.1.clone(),
            destination: workload.clone(),
            port: u16::try_from(refusal.port).unwrap_or_default(),
            method: cut(&refusal.method, 32),
            path: cut(&refusal.path, PATH),
            host: cut(&refusal.host, PATH),
            policy: cut(&refusal.policy, TEXT),
            reason: cut(&refusal.reason, TEXT),
        }
    }

    fn may_report(&self) -> bool {
        let (limits, now) = (&self.reports.limits, self.reports.clock.elapsed());
        let mut allowance = self.allowance.lock().unwrap_or_else(PoisonError::into_inner);
        let earned = now.saturating_sub(allowance.at).as_nanos() / limits.pause.as_nanos().max(1);
        if earned > 0 {
            allowance.left = allowance.left.saturating_add(u32::try_from(earned).unwrap_or(u32::MAX)).min(limits.burst);
            allowance.at = now;
        }
        let may = allowance.left > 0;
        allowance.left = allowance.left.saturating_sub(1);
        may
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let now = self.reports.clock.now();
        let mut state = self.reports.lock();
        let Some(attachment) = state.proxies.get_mut(&self.name) else { return };
        attachment.streams = attachment.streams.saturating_sub(1);
        if attachment.streams == 0 {
            attachment.proxy.connected = false;
            attachment.proxy.gone = now;
            state.gone.push_back((now, self.name.clone()));
            state.forget_gone(now, &self.reports.limits);
        }
    }
}

/// An action as policies spell it.
pub fn action(action: i32) -> &'static str {
    match AuthorizationAction::try_from(action) {
        Ok(AuthorizationAction::Allow) => "ALLOW",
        Ok(AuthorizationAction::Deny) => "DENY",
        Ok(AuthorizationAction::Audit) => "AUDIT",
        Ok(AuthorizationAction::Custom) => "CUSTOM",
        Err(_) => "UNKNOWN",
    }
}

/// A text, cut to so many bytes at a boundary of characters.
fn cut(text: &str, bytes: usize) -> String {
    if text.len() <= bytes {
        return text.to_owned();
    }
    let end = (0..=bytes).rev().find(|end| text.is_char_boundary(*end)).unwrap_or_default();
    text[..end].to_owned()
}

#[cfg(test)]
mod tests;
