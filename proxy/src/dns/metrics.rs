//! `weft_dns_*`.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use std::time::Duration;

const BUCKETS: [f64; 12] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 2.5, 5.0];

/// How a query came: the label `transport`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// `udp`.
    Udp,
    /// `tcp`.
    Tcp,
}

/// What became of a query: the label `outcome`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// A resolver's answer was handed on, whatever it says: `answered`.
    Answered,
    /// No resolver answered: SERVFAIL, `failed`.
    Failed,
    /// Too many queries were under way: SERVFAIL, `overload`.
    Overload,
    /// No query at all: dropped, `malformed`.
    Malformed,
    /// A query of the proxy's own: dropped, `loop`.
    Loop,
}

/// The series; cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics {
    queries: Family<Vec<(&'static str, &'static str)>, Counter>,
    duration: Histogram,
    /// Queries that wait for a resolver.
    pub under_way: Gauge,
    /// Attempts at a resolver that brought no answer.
    pub resolver_failures: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            queries: Family::default(),
            duration: Histogram::new(BUCKETS),
            under_way: Gauge::default(),
            resolver_failures: Counter::default(),
        }
    }
}

impl Metrics {
    /// Makes them part of what is scraped.
    pub fn register(&self, registry: &mut Registry) {
        let dns = registry.sub_registry_with_prefix("weft_dns");
        dns.register("queries", "Captured queries by what became of them", self.queries.clone());
        dns.register("duration_seconds", "Time that captured queries took", self.duration.clone());
        dns.register("queries_under_way", "Captured queries that wait for a resolver", self.under_way.clone());
        dns.register("resolver_failures", "Attempts at a resolver without an answer", self.resolver_failures.clone());
    }

    /// Counts a query that is over.
    pub fn query(&self, transport: Transport, outcome: Outcome) {
        let transport = match transport {
            Transport::Udp => "udp",
            Transport::Tcp => "tcp",
        };
        let outcome = match outcome {
            Outcome::Answered => "answered",
            Outcome::Failed => "failed",
            Outcome::Overload => "overload",
            Outcome::Malformed => "malformed",
            Outcome::Loop => "loop",
        };
        self.queries.get_or_create_owned(&vec![("transport", transport), ("outcome", outcome)]).inc();
    }

    /// Notes how long one took.
    pub fn took(&self, duration: Duration) {
        self.duration.observe(duration.as_secs_f64());
    }
}
