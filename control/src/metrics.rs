//! The control plane's own metrics. Label values come from closed sets, or from names of namespaces; nothing that a request
//! brings becomes a label.

use crate::model::Kind;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::fmt::Write as _;

/// Label `resource`: a watched kind.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Resource {
    resource: &'static str,
}

impl Resource {
    /// The label of a kind.
    pub fn of(kind: Kind) -> Self {
        Self { resource: kind.plural() }
    }
}

/// Label `namespace`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct InNamespace {
    /// The namespace.
    pub namespace: String,
}

/// How something ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It worked, or was agreed to.
    Ok,
    /// It failed, or was refused.
    Error,
    /// It was left out, because there was too much of it or it had been said.
    Dropped,
}

impl EncodeLabelValue for Outcome {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        encoder.write_str(match self {
            Self::Ok => "ok",
            Self::Error => "error",
            Self::Dropped => "dropped",
        })
    }
}

/// Label `result`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Ended {
    /// How it ended.
    pub result: Outcome,
}

impl Ended {
    /// It worked.
    pub const OK: Self = Self { result: Outcome::Ok };
    /// It failed.
    pub const ERROR: Self = Self { result: Outcome::Error };
    /// It was left out.
    pub const DROPPED: Self = Self { result: Outcome::Dropped };
}

/// Label `reason` of a refused stream.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Refused {
    /// One of a closed set of codes.
    pub reason: &'static str,
}

/// Labels `result` and `reason` of a request for a certificate.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Certified {
    result: &'static str,
    /// One of a closed set of codes; empty with a certificate.
    reason: &'static str,
}

impl Certified {
    /// A certificate was issued.
    pub const OK: Self = Self { result: "ok", reason: "" };

    /// None was: refused (the caller's doing) or failed (ours).
    pub fn not(refused: bool, reason: &'static str) -> Self {
        Self { result: if refused { "refused" } else { "error" }, reason }
    }
}

/// All metrics. Share it by `Arc`.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Failed tries of a watch.
    pub watch_errors: Family<Resource, Counter>,
    /// Full lists: one at the start, and one for each time that a watch could not be resumed.
    pub lists: Family<Resource, Counter>,
    /// Objects known.
    pub objects: Family<Resource, Gauge>,
    /// Manifest files that can't be used.
    pub bad_manifests: Gauge,
    /// 1 on the replica that writes.
    pub leader: Gauge,
    /// 1 while the settings in force are those of the file.
    pub settings_good: Gauge,
    /// Readings of the settings.
    pub settings_reads: Family<Ended, Counter>,
    /// Streams of proxies.
    pub streams: Gauge,
    /// Configurations sent.
    pub pushes: Counter,
    /// What proxies answered.
    pub acks: Family<Ended, Counter>,
    /// Streams that were refused.
    pub refused: Family<Refused, Counter>,
    /// Requests for workload certificates.
    pub certificates: Family<Certified, Counter>,
    /// When the serving certificate in force ends.
    pub serving_expiry: Gauge,
    /// When the root below which certificates are signed ends.
    pub root_expiry: Gauge,
    /// When what signs certificates ends, or the first of those above it.
    pub issuer_expiry: Gauge,
    /// Roots that are trusted: more than one during a rotation.
    pub roots: Gauge,
    /// 0 while the user's certificate authority can't be used.
    pub authority_good: Gauge,
    /// Renewals of the serving certificate by this replica.
    pub serving_renewals: Counter,
    /// Corrections of `caBundle`.
    pub ca_bundle_writes: Family<Ended, Counter>,
    /// Writes of trust bundles.
    pub trust_bundle_writes: Family<Ended, Counter>,
    /// Policies that are not in force as they are written.
    pub bad_policies: Gauge,
    /// Writes of policies' status.
    pub policy_status_writes: Family<Ended, Counter>,
    /// Fetches of token issuers' keys.
    pub key_fetches: Family<Ended, Counter>,
    /// Events.
    pub events: Family<Ended, Counter>,
    /// Pods without a sidecar in namespaces that want one.
    pub missed_pods: Family<InNamespace, Gauge>,
    /// 1 while ready.
    pub ready: Gauge,
}

impl Metrics {
    /// Registers all of them.
    pub fn register(&self, registry: &mut Registry) {
        let version: Family<Vec<(String, String)>, Gauge> = Family::default();
        version.get_or_create(&vec![("version".into(), env!("CARGO_PKG_VERSION").into())]).set(1);
        registry.register("weft_control_info", "The version of the control plane", version);
        registry.register("weft_watch_errors", "Failed tries of a watch of the API server", self.watch_errors.clone());
        registry.register(
            "weft_watch_lists",
            "Full lists of a resource: one at the start, then one for each watch that could not be resumed",
            self.lists.clone(),
        );
        registry.register("weft_objects", "Objects that the control plane knows", self.objects.clone());
        registry.register(
            "weft_bad_manifests",
            "Manifest files that can't be used; their last good objects stay in force",
            self.bad_manifests.clone(),
        );
        registry.register("weft_leader", "1 on the replica that writes to the cluster", self.leader.clone());
        registry.register(
            "weft_settings_good",
            "1 while the settings file is in force, 0 while it is wrong and older settings stay",
            self.settings_good.clone(),
        );
        registry.register("weft_settings_reads", "Readings of the settings file", self.settings_reads.clone());
        registry.register("weft_discovery_streams", "Proxies that are connected", self.streams.clone());
        registry.register("weft_discovery_pushes", "Configurations sent to proxies", self.pushes.clone());
        registry.register("weft_discovery_acks", "What proxies answered to configurations", self.acks.clone());
        registry.register("weft_discovery_refused", "Streams of proxies that were refused", self.refused.clone());
        registry.register("weft_certificates", "Requests for workload certificates", self.certificates.clone());
        registry.register(
            "weft_serving_certificate_expiry_timestamp_seconds",
            "When the serving certificate in force ends",
            self.serving_expiry.clone(),
        );
        registry.register(
            "weft_root_certificate_expiry_timestamp_seconds",
            "When the root certificate ends",
            self.root_expiry.clone(),
        );
        registry.register(
            "weft_issuer_certificate_expiry_timestamp_seconds",
            "When the certificate that signs workloads' certificates ends, or the first of those above it",
            self.issuer_expiry.clone(),
        );
        registry.register("weft_trusted_roots", "Roots that are trusted: more than one during a rotation", self.roots.clone());
        registry.register(
            "weft_certificate_authority_good",
            "1, or 0 while the user's certificate authority can't be used and the last good one stays in force",
            self.authority_good.clone(),
        );
        registry.register(
            "weft_serving_certificate_renewals",
            "Renewals of the serving certificate by this replica",
            self.serving_renewals.clone(),
        );
        registry.register(
            "weft_ca_bundle_writes",
            "Corrections of caBundle in webhook configurations",
            self.ca_bundle_writes.clone(),
        );
        registry.register("weft_trust_bundle_writes", "Writes of trust bundle ConfigMaps", self.trust_bundle_writes.clone());
        registry.register(
            "weft_bad_policies",
            "Policies that are not in force as they are written; the log and their status say why",
            self.bad_policies.clone(),
        );
        registry.register("weft_policy_status_writes", "Writes of policies' status", self.policy_status_writes.clone());
        registry.register("weft_key_fetches", "Fetches of token issuers' keys", self.key_fetches.clone());
        registry.register("weft_events", "Kubernetes events: written, failed, or left out as repetitions", self.events.clone());
        registry.register(
            "weft_missed_pods",
            "Pods without a sidecar that would get one if they were created now",
            self.missed_pods.clone(),
        );
        registry.register("weft_control_ready", "1 while this replica is ready", self.ready.clone());
        registry.register_collector(Box::new(Process));
    }
}

/// Facts about this process, read when they are asked for.
#[derive(Debug)]
struct Process;

impl prometheus_client::collector::Collector for Process {
    fn encode(&self, mut encoder: prometheus_client::encoding::DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Some(bytes) = resident_bytes("/proc/self/status") else { return Ok(()) };
        let metric = prometheus_client::metrics::gauge::ConstGauge::new(bytes);
        let kind = prometheus_client::metrics::MetricType::Gauge;
        let descriptor = encoder.encode_descriptor("process_resident_memory_bytes", "Memory of this process", None, kind)?;
        prometheus_client::encoding::EncodeMetric::encode(&metric, descriptor)
    }
}

/// Resident memory of a process in bytes, from its `/proc/…/status`.
pub fn resident_bytes(status: &str) -> Option<i64> {
    let text = std::fs::read_to_string(status).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: i64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_metrics_are_encoded() {
        let metrics = Metrics::default();
        let mut registry = Registry::default();
        metrics.register(&mut registry);
        metrics.acks.get_or_create(&Ended::ERROR).inc();
        metrics.missed_pods.get_or_create(&InNamespace { namespace: "shop".into() }).set(3);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "weft_discovery_acks_total{result=\"error\"} 1",
            "weft_missed_pods{namespace=\"shop\"} 3",
            "weft_control_info{version=",
            "process_resident_memory_bytes ",
        ] {
            assert!(text.contains(line), "{line} in\n{text}");
        }
    }
}
