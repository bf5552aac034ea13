//! The series themselves: Istio's standard metrics under Istio's names and labels, so that dashboards and alerts work
//! unchanged, and Weft's own as `weft_proxy_*`.
//!
//! Labels come only from the pod's own configuration and from small closed sets (status codes, flags, protocols): no request can create
//! a series by what it says. A series that nothing has touched for [`IDLE`] goes away.

use crate::conn::Direction;
use crate::inbound::Config;
use arc_swap::ArcSwap;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a series may be idle.
const IDLE: Duration = Duration::from_secs(600);

/// Envoy's default buckets, which Istio's dashboards expect.
const BUCKETS: [f64; 19] = [
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1000.0,
    2500.0,
    5000.0,
    10_000.0,
    30_000.0,
    60_000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];

/// A set of labels, names and values in order.
pub(super) type Labels = Vec<(&'static str, String)>;

#[derive(Clone, Debug)]
struct Buckets;

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new(BUCKETS)
    }
}

type Histograms = Family<Labels, Histogram, Buckets>;

/// The handles of one combination of labels of requests.
#[derive(Clone, Debug)]
pub(super) struct RequestSeries {
    pub(super) total: Counter,
    pub(super) duration: Histogram,
    pub(super) request_bytes: Histogram,
    pub(super) response_bytes: Histogram,
    pub(super) touched: Arc<AtomicBool>,
}

/// The handles of one combination of labels of opaque connections.
#[derive(Clone, Debug)]
pub(super) struct TcpSeries {
    pub(super) opened: Counter,
    pub(super) closed: Counter,
    pub(super) received: Counter,
    pub(super) sent: Counter,
    pub(super) touched: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Use {
    touched: Arc<AtomicBool>,
    last: Instant,
}

/// All series of the process. Workers take handles from it and keep them; only a scrape and the first use of a combination
/// take a lock.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    config: Arc<ArcSwap<Config>>,
    requests: Family<Labels, Counter>,
    durations: Histograms,
    request_bytes: Histograms,
    response_bytes: Histograms,
    tcp_opened: Family<Labels, Counter>,
    tcp_closed: Family<Labels, Counter>,
    tcp_received: Family<Labels, Counter>,
    tcp_sent: Family<Labels, Counter>,
    pub(super) connections: Family<Labels, Counter>,
    pub(super) open: Family<Labels, Gauge>,
    pub(super) loops: Counter,
    pub(super) connect_failures: Counter,
    /// Samples for the control plane for which there was no room.
    pub reports_dropped: Counter,
    handshakes: Family<Labels, Counter>,
    pub(super) plaintext_refused: Counter,
    pub(super) unresolved: Counter,
    authz: Family<Labels, Counter>,
    certificates: Family<Labels, Counter>,
    certificate_expiry: Gauge,
    /// Our own identity, as the certificate says.
    principal: ArcSwap<String>,
    /// 1 while the stream to the control plane stands.
    pub control_connected: Gauge,
    /// Version of the configuration in force.
    pub config_version: Gauge,
    /// Captured DNS.
    pub dns: Arc<crate::dns::Metrics>,
    in_use: Mutex<HashMap<(bool, Labels), Use>>,
    generation: AtomicU64,
    started: Instant,
}

impl Metrics {
    /// All at zero, with labels from this configuration.
    pub fn new(config: Arc<ArcSwap<Config>>) -> Self {
        let mut registry = Registry::default();
        let histograms = || Histograms::new_with_constructor(Buckets);
        let mut metrics = Self {
            registry: Registry::default(),
            config,
            requests: Family::default(),
            durations: histograms(),
            request_bytes: histograms(),
            response_bytes: histograms(),
            tcp_opened: Family::default(),
            tcp_closed: Family::default(),
            tcp_received: Family::default(),
            tcp_sent: Family::default(),
            connections: Family::default(),
            open: Family::default(),
            loops: Counter::default(),
            connect_failures: Counter::default(),
            reports_dropped: Counter::default(),
            handshakes: Family::default(),
            plaintext_refused: Counter::default(),
            unresolved: Counter::default(),
            authz: Family::default(),
            certificates: Family::default(),
            certificate_expiry: Gauge::default(),
            principal: ArcSwap::default(),
            control_connected: Gauge::default(),
            config_version: Gauge::default(),
            dns: Arc::default(),
            in_use: Mutex::default(),
            generation: AtomicU64::new(0),
            started: Instant::now(),
        };
        let istio = registry.sub_registry_with_prefix("istio");
        istio.register("requests", "Requests", metrics.requests.clone());
        istio.register("request_duration_milliseconds", "Duration of requests", metrics.durations.clone());
        istio.register("request_bytes", "Sizes of request bodies", metrics.request_bytes.clone());
        istio.register("response_bytes", "Sizes of response bodies", metrics.response_bytes.clone());
        istio.register("tcp_connections_opened", "Opaque connections opened", metrics.tcp_opened.clone());
        istio.register("tcp_connections_closed", "Opaque connections closed", metrics.tcp_closed.clone());
        istio.register("tcp_received_bytes", "Bytes from clients of opaque connections", metrics.tcp_received.clone());
        istio.register("tcp_sent_bytes", "Bytes to clients of opaque connections", metrics.tcp_sent.clone());
        let weft = registry.sub_registry_with_prefix("weft");
        weft.register("authz", "Decisions of policies about requests and connections", metrics.authz.clone());
        let own = registry.sub_registry_with_prefix("weft_proxy");
        own.register("connections", "Connections by what they turned out to speak", metrics.connections.clone());
        own.register("connections_open", "Connections that are open now", metrics.open.clone());
        own.register("loops_refused", "Connections to the proxy itself that were refused", metrics.loops.clone());
        let help = "Samples of traffic for the control plane that were left out for want of room";
        own.register("reports_dropped", help, metrics.reports_dropped.clone());
        own.register("connect_failures", "Connections to destinations that could not be made", metrics.connect_failures.clone());
        own.register("tls_handshakes", "TLS handshakes of the mesh by result and reason", metrics.handshakes.clone());
        own.register(
            "plaintext_refused",
            "Connections without mutual TLS where only that is taken",
            metrics.plaintext_refused.clone(),
        );
        own.register(
            "unresolved",
            "Requests and connections that were passed through, their destination being unknown",
            metrics.unresolved.clone(),
        );
        own.register("certificates", "Attempts to get a certificate, by result", metrics.certificates.clone());
        own.register(
            "certificate_expiry_timestamp_seconds",
            "When the certificate in force ends",
            metrics.certificate_expiry.clone(),
        );
        own.register("control_connected", "Whether the stream to the control plane stands", metrics.control_connected.clone());
        own.register("config_version", "Version of the configuration in force", metrics.config_version.clone());
        metrics.dns.register(&mut registry);
        metrics.registry = registry;
        metrics
    }

    /// The series of a policy's decisions; an empty name: that no policy matched was the reason.
    pub(super) fn authz(&self, action: &str, policy: &str, result: &str) -> Counter {
        let labels = [("action", action), ("policy", policy), ("result", result)];
        self.authz.get_or_create_owned(&labels.map(|(name, value)| (name, value.to_owned())).into())
    }

    pub(super) fn handshake(&self, direction: Direction, result: &'static str, reason: &'static str) {
        let labels =
            vec![("direction", direction.as_str().to_owned()), ("result", result.to_owned()), ("reason", reason.to_owned())];
        self.handshakes.get_or_create_owned(&labels).inc();
    }

    /// A certificate is in force, and ends then.
    pub fn certificate(&self, leaf: &crate::tls::spiffe::Leaf) {
        self.certificates.get_or_create_owned(&vec![("result", "issued".to_owned())]).inc();
        if **self.principal.load() != leaf.id {
            self.principal.store(Arc::new(leaf.id.clone()));
            self.relabel();
        }
        let end = leaf.not_after.duration_since(std::time::SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
        self.certificate_expiry.set(i64::try_from(end).unwrap_or(i64::MAX));
    }

    /// An attempt to get a certificate failed.
    pub fn certificate_failed(&self) {
        self.certificates.get_or_create_owned(&vec![("result", "failed".to_owned())]).inc();
    }

    /// Grows whenever workers have to let go of their handles.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    /// The configuration has changed: labels are another.
    pub fn relabel(&self) {
        self.generation.fetch_add(1, Ordering::Relaxed);
    }

    fn used(&self, tcp: bool, labels: &Labels) -> Arc<AtomicBool> {
        let mut in_use = self.in_use.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = in_use.entry((tcp, labels.clone()));
        Arc::clone(&entry.or_insert_with(|| Use { touched: Arc::new(AtomicBool::new(true)), last: Instant::now() }).touched)
    }

    pub(super) fn request_series(&self, labels: &Labels) -> RequestSeries {
        RequestSeries {
            total: self.requests.get_or_create_owned(labels),
            duration: self.durations.get_or_create_owned(labels),
            request_bytes: self.request_bytes.get_or_create_owned(labels),
            response_bytes: self.response_bytes.get_or_create_owned(labels),
            touched: self.used(false, labels),
        }
    }

    pub(super) fn tcp_series(&self, labels: &Labels) -> TcpSeries {
        TcpSeries {
            opened: self.tcp_opened.get_or_create_owned(labels),
            closed: self.tcp_closed.get_or_create_owned(labels),
            received: self.tcp_received.get_or_create_owned(labels),
            sent: self.tcp_sent.get_or_create_owned(labels),
            touched: self.used(true, labels),
        }
    }

    /// Drops what has been idle; to be called now and then.
    pub fn sweep(&self) {
        let now = Instant::now();
        let mut gone = Vec::new();
        self.in_use.lock().unwrap_or_else(PoisonError::into_inner).retain(|key, used| {
            if used.touched.swap(false, Ordering::Relaxed) {
                used.last = now;
            }
            let keep = now.duration_since(used.last) < IDLE;
            if !keep {
                gone.push(key.clone());
            }
            keep
        });
        for (tcp, labels) in &gone {
            if *tcp {
                for family in [&self.tcp_opened, &self.tcp_closed, &self.tcp_received, &self.tcp_sent] {
                    family.remove(labels);
                }
            } else {
                self.requests.remove(labels);
                for family in [&self.durations, &self.request_bytes, &self.response_bytes] {
                    family.remove(labels);
                }
            }
        }
        if !gone.is_empty() {
            self.relabel();
        }
    }

    /// The labels that all series of a direction share; `port` is the app's, for an inbound one.
    pub(super) fn labels(&self, direction: Direction, port: u16, protocol: &'static str, principal: Option<&str>) -> Labels {
        let config = self.config.load();
        let known = |text: &str| if text.is_empty() { "unknown".to_owned() } else { text.to_owned() };
        let w = &config.workload;
        let own = [
            ("workload", known(&w.name)),
            ("workload_namespace", known(&w.namespace)),
            ("principal", principal.map_or_else(|| "unknown".to_owned(), |_| known(&self.principal.load()))),
            ("app", known(&w.app)),
            ("version", known(&w.version)),
            ("cluster", known(&w.cluster)),
            ("canonical_service", known(&w.canonical_service)),
            ("canonical_revision", known(&w.canonical_revision)),
        ];
        const SOURCE: [&str; 8] = [
            "source_workload",
            "source_workload_namespace",
            "source_principal",
            "source_app",
            "source_version",
            "source_cluster",
            "source_canonical_service",
            "source_canonical_revision",
        ];
        const DESTINATION: [&str; 8] = [
            "destination_workload",
            "destination_workload_namespace",
            "destination_principal",
            "destination_app",
            "destination_version",
            "destination_cluster",
            "destination_canonical_service",
            "destination_canonical_revision",
        ];
        let outbound = direction == Direction::Outbound;
        let mut labels: Labels = vec![("reporter", if outbound { "source" } else { "destination" }.into())];
        for (side, is_own) in [(SOURCE, outbound), (DESTINATION, !outbound)] {
            for (name, (_, value)) in side.into_iter().zip(&own) {
                let other = || match principal {
                    Some(principal) if name.ends_with("_principal") => principal.to_owned(),
                    _ => "unknown".to_owned(),
                };
                labels.push((name, if is_own { value.clone() } else { other() }));
            }
        }
        let service = config.ports.get(&port).filter(|_| !outbound).and_then(|p| p.service.as_ref());
        let of = |f: fn(&crate::inbound::Service) -> &String| service.map_or_else(|| "unknown".to_owned(), |s| known(f(s)));
        labels.push(("destination_service", of(|s| &s.host)));
        labels.push(("destination_service_name", of(|s| &s.name)));
        labels.push(("destination_service_namespace", of(|s| &s.namespace)));
        labels.push(("request_protocol", protocol.into()));
        let security = match (outbound, principal) {
            (true, _) => "unknown",
            (false, Some(_)) => "mutual_tls",
            (false, None) => "none",
        };
        labels.push(("connection_security_policy", security.into()));
        labels
    }

    /// Everything, in Prometheus' text format 0.0.4.
    pub fn text(&self) -> String {
        let mut open = String::new();
        // Writing to a string can't fail.
        let _ = encode(&mut open, &self.registry);
        let mut text = classic(&open);
        self.process(&mut text);
        text
    }

    fn process(&self, text: &mut String) {
        let mut one = |name: &str, kind: &str, help: &str, value: f64| {
            let _ = writeln!(text, "# HELP weft_proxy_{name} {help}\n# TYPE weft_proxy_{name} {kind}\nweft_proxy_{name} {value}");
        };
        one("uptime_seconds", "gauge", "Time since the process started.", self.started.elapsed().as_secs_f64());
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        if let Some(pages) = read("/proc/self/statm").split_ascii_whitespace().nth(1).and_then(|p| p.parse::<f64>().ok()) {
            one("resident_memory_bytes", "gauge", "Resident memory.", pages * 4096.0);
        }
        let stat = read("/proc/self/stat");
        let after = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        let ticks: f64 = after.split_ascii_whitespace().skip(11).take(2).filter_map(|t| t.parse::<f64>().ok()).sum();
        one("cpu_seconds_total", "counter", "CPU time, user and system.", ticks / 100.0);
        let dropped = crate::log::queue::dropped() as f64;
        one("log_lines_dropped_total", "counter", "Log lines that nobody took as fast as they came.", dropped);
        if let Ok(fds) = std::fs::read_dir("/proc/self/fd") {
            one("open_fds", "gauge", "Open descriptors.", fds.count() as f64);
        }
        let _ = writeln!(
            text,
            "# HELP weft_proxy_build_info Version.\n# TYPE weft_proxy_build_info gauge\nweft_proxy_build_info{{version=\"{}\"}} 1",
            env!("CARGO_PKG_VERSION")
        );
    }
}

/// From OpenMetrics to the classic format: the type of a counter names it with its `_total`, and there is no end mark.
fn classic(open: &str) -> String {
    let mut counters: Vec<&str> = Vec::new();
    for line in open.lines() {
        if let Some(name) = line.strip_prefix("# TYPE ").and_then(|l| l.strip_suffix(" counter")) {
            counters.push(name);
        }
    }
    let mut text = String::with_capacity(open.len());
    for line in open.lines().filter(|l| *l != "# EOF") {
        let meta = ["# HELP ", "# TYPE "].iter().find_map(|p| Some((*p, line.strip_prefix(p)?)));
        match meta.and_then(|(p, rest)| Some((p, rest.split_once(' ')?))) {
            Some((prefix, (name, rest))) if counters.contains(&name) => {
                let _ = writeln!(text, "{prefix}{name}_total {rest}");
            }
            _ => {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_classic_format_names_counters_by_their_total() {
        let open = "# HELP a Help.\n# TYPE a counter\na_total 1\n# HELP b B.\n# TYPE b gauge\nb 2\n# EOF\n";
        assert_eq!(classic(open), "# HELP a_total Help.\n# TYPE a_total counter\na_total 1\n# HELP b B.\n# TYPE b gauge\nb 2\n");
    }
}
