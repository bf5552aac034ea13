//! A worker's part of the telemetry: takes records, updates series. It keeps the handles of the combinations that it has met,
//! so that a record costs a look-up in a small map of its own and no lock.

use super::journal::Series;
use super::series::{Metrics, RequestSeries, TcpSeries};
use super::{ConnectionRecord, Detected, Flag, RequestProtocol, RequestRecord};
use crate::conn::{Direction, Downstream};
use crate::inbound::Config;
use crate::report::Collector;
use crate::tls::{Identities, IdentitySet};
use arc_swap::ArcSwap;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct RequestKey {
    direction: Direction,
    port: u16,
    protocol: RequestProtocol,
    code: u16,
    grpc: Option<u8>,
    flag: Option<Flag>,
    principal: Option<IdentitySet>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct TcpKey {
    direction: Direction,
    port: u16,
    flag: Option<Flag>,
    principal: Option<IdentitySet>,
}

/// See the module.
#[derive(Debug)]
pub struct Recorder {
    metrics: Arc<Metrics>,
    generation: Cell<u64>,
    requests: RefCell<HashMap<RequestKey, RequestSeries>>,
    tcp: RefCell<HashMap<TcpKey, TcpSeries>>,
    kinds: RefCell<HashMap<(Direction, Detected), Counter>>,
    open: [Gauge; 2],
    report: Collector,
    identities: Rc<Identities>,
    policies: RefCell<Series>,
}

impl Default for Recorder {
    /// One whose series nobody scrapes.
    fn default() -> Self {
        Self::new(Arc::new(Metrics::new(Arc::new(ArcSwap::from_pointee(Config::default())))), Rc::default())
    }
}

/// An open connection: the gauge goes down when it is dropped.
#[derive(Debug)]
pub struct Open(Gauge);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Recorder {
    /// A worker's recorder into these series.
    pub fn new(metrics: Arc<Metrics>, identities: Rc<Identities>) -> Self {
        let open = [Direction::Inbound, Direction::Outbound]
            .map(|d| metrics.open.get_or_create_owned(&vec![("direction", d.as_str().to_owned())]));
        Self {
            generation: Cell::new(metrics.generation()),
            policies: RefCell::default(),
            metrics,
            requests: RefCell::default(),
            tcp: RefCell::default(),
            kinds: RefCell::default(),
            open,
            report: Collector::closed(),
            identities,
        }
    }

    /// The same, and what comes in is reported to the control plane.
    pub fn reporting(self) -> Self {
        Self { report: Collector::new(self.metrics.reports_dropped.clone()), ..self }
    }

    /// What is gathered for the control plane.
    pub fn report(&self) -> &Collector {
        &self.report
    }

    pub(super) fn policies(&self) -> &RefCell<Series> {
        &self.policies
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// A connection is open until the value is dropped.
    pub fn opened(&self, direction: Direction) -> Open {
        let gauge = self.open[usize::from(direction == Direction::Outbound)].clone();
        gauge.inc();
        Open(gauge)
    }

    /// It is known what a connection speaks.
    pub fn connection_kind(&self, direction: Direction, kind: Detected) {
        let mut kinds = self.kinds.borrow_mut();
        let counter = kinds.entry((direction, kind)).or_insert_with(|| {
            let labels = vec![("direction", direction.as_str().to_owned()), ("protocol", kind.as_str().to_owned())];
            self.metrics.connections.get_or_create_owned(&labels)
        });
        counter.inc();
    }

    /// A connection to the proxy itself was refused.
    pub fn loop_refused(&self) {
        self.metrics.loops.inc();
    }

    /// A destination could not be connected.
    pub fn connect_failed(&self) {
        self.metrics.connect_failures.inc();
    }

    /// A TLS handshake of the mesh is over: `full`, `resumed` or `failed`, and why it failed.
    pub fn handshake(&self, direction: Direction, result: &'static str, reason: &'static str) {
        self.metrics.handshake(direction, result, reason);
    }

    /// A connection was refused because of what it is, by PeerAuthentication.
    pub fn refused_plaintext(&self) {
        self.metrics.plaintext_refused.inc();
    }

    /// Nothing is known of a destination, so that it is passed through.
    pub fn unresolved(&self) {
        self.metrics.unresolved.inc();
    }

    /// Lets go of handles that are no longer the right ones.
    fn refresh(&self) {
        let now = self.metrics.generation();
        if self.generation.replace(now) != now {
            self.requests.borrow_mut().clear();
            self.tcp.borrow_mut().clear();
        }
    }

    /// Counts a request that is over.
    pub fn request(&self, record: &RequestRecord<'_>) {
        self.refresh();
        let key = RequestKey {
            direction: record.downstream.direction,
            port: port(record.downstream),
            protocol: record.protocol,
            code: record.code,
            // Codes above 16 are not gRPC's.
            grpc: record.grpc_status.map(|s| u8::try_from(s).ok().filter(|s| *s <= 16).unwrap_or(2)),
            flag: record.flag,
            principal: record.downstream.principal.or(record.principal),
        };
        let mut requests = self.requests.borrow_mut();
        let series = requests.entry(key).or_insert_with(|| self.metrics.request_series(&self.request_labels(&key)));
        series.total.inc();
        series.duration.observe(record.duration.as_secs_f64() * 1000.0);
        series.request_bytes.observe(record.request_bytes as f64);
        series.response_bytes.observe(record.response_bytes as f64);
        series.touched.store(true, Ordering::Relaxed);
    }

    fn request_labels(&self, key: &RequestKey) -> super::series::Labels {
        let protocol = match key.protocol {
            RequestProtocol::Http => "http",
            RequestProtocol::Grpc => "grpc",
        };
        let mut labels = self.metrics.labels(key.direction, key.port, protocol, self.name(key.principal).as_deref());
        labels.push(("response_code", key.code.to_string()));
        labels.push(("grpc_response_status", key.grpc.map(|s| s.to_string()).unwrap_or_default()));
        labels.push(("response_flags", key.flag.map_or("-", Flag::as_str).into()));
        labels
    }

    /// The other side's name, if it has one and no more.
    fn name(&self, principal: Option<IdentitySet>) -> Option<String> {
        self.identities.get(principal?).and_then(|set| set.first().cloned())
    }

    fn with_tcp(&self, down: &Downstream, to: Option<IdentitySet>, flag: Option<Flag>, count: impl FnOnce(&TcpSeries)) {
        self.refresh();
        let principal = down.principal.or(to);
        let key = TcpKey { direction: down.direction, port: port(down), flag, principal };
        let mut tcp = self.tcp.borrow_mut();
        let series = tcp.entry(key).or_insert_with(|| {
            let mut labels = self.metrics.labels(key.direction, key.port, "tcp", self.name(key.principal).as_deref());
            labels.push(("response_flags", key.flag.map_or("-", Flag::as_str).into()));
            self.metrics.tcp_series(&labels)
        });
        count(series);
        series.touched.store(true, Ordering::Relaxed);
    }

    /// An opaque connection is open.
    pub fn tcp_opened(&self, down: &Downstream, to: Option<IdentitySet>) {
        self.with_tcp(down, to, None, |series| {
            series.opened.inc();
        });
    }

    /// Counts an opaque connection that was over before it was open to a destination: under one flag both times, so that what was
    /// opened and what was closed agree.
    pub fn refused(&self, record: &ConnectionRecord<'_>) {
        self.with_tcp(record.downstream, record.principal, record.flag, |series| {
            series.opened.inc();
        });
        self.connection(record);
    }

    /// Counts an opaque connection that is over.
    pub fn connection(&self, record: &ConnectionRecord<'_>) {
        self.with_tcp(record.downstream, record.principal, record.flag, |series| {
            series.closed.inc();
            series.received.inc_by(record.received);
            series.sent.inc_by(record.sent);
        });
    }
}

/// The app's port; an outbound one is no label.
fn port(down: &Downstream) -> u16 {
    if down.direction == Direction::Inbound { down.original.0.port() } else { 0 }
}
