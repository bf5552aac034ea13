//! What a pod's annotations, its namespace's, and the settings together say about its sidecar: resolved once, into typed
//! values, before anything is patched.
//!
//! Order for each option: the pod's own key, the pod's aliases (Istio's and Linkerd's), the namespace's own key, its
//! aliases, the settings. A value that is not allowed is a [`Refusal`] that names level, key, value and what is allowed: these
//! annotations decide what is redirected, so a misread one must not pass for a default.

mod values;

pub use values::{
    Allowed, Cidrs, Mode, PortSet, check_image, check_quantity, parse_bool, parse_interfaces, parse_log_level, parse_seconds,
    quantity,
};

use crate::facts::{ClusterFacts, NamespaceFacts};
use crate::settings::{Backend, NativeSidecars, Resources, Settings, TrafficSettings};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;
use weft_api::annotations as keys;

/// An annotation that Weft reads: the documentation's table and the check for unknown keys come from the same list.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    /// Weft's key.
    pub key: &'static str,
    /// Keys of Istio and Linkerd that mean the same.
    pub aliases: &'static [&'static str],
    /// Whether it counts on a namespace too, for its pods.
    pub inherited: bool,
}

const fn known(key: &'static str, aliases: &'static [&'static str]) -> Known {
    Known { key, aliases, inherited: true }
}

/// All annotations that Weft reads or writes.
pub const KNOWN: [Known; 25] = [
    known(keys::INJECT, &[keys::INJECT_BARE, keys::INJECT_LINKERD, keys::INJECT_ISTIO]),
    Known { key: keys::STATUS, aliases: &[], inherited: false },
    Known { key: keys::OVERRIDES, aliases: &[], inherited: false },
    known(keys::NATIVE_SIDECAR, &["sidecar.istio.io/nativeSidecar"]),
    known(keys::REWRITE_PROBES, &["sidecar.istio.io/rewriteAppHTTPProbers"]),
    known(keys::MERGE_METRICS, &["prometheus.istio.io/merge-metrics"]),
    known(keys::INBOUND_PORTS, &["traffic.sidecar.istio.io/includeInboundPorts"]),
    known(keys::EXCLUDE_INBOUND_PORTS, &["traffic.sidecar.istio.io/excludeInboundPorts", "config.linkerd.io/skip-inbound-ports"]),
    known(keys::OUTBOUND_PORTS, &["traffic.sidecar.istio.io/includeOutboundPorts"]),
    known(
        keys::EXCLUDE_OUTBOUND_PORTS,
        &["traffic.sidecar.istio.io/excludeOutboundPorts", "config.linkerd.io/skip-outbound-ports"],
    ),
    known(keys::OUTBOUND_CIDRS, &["traffic.sidecar.istio.io/includeOutboundIPRanges"]),
    known(keys::EXCLUDE_OUTBOUND_CIDRS, &["traffic.sidecar.istio.io/excludeOutboundIPRanges"]),
    known(keys::EXCLUDE_INTERFACES, &["traffic.sidecar.istio.io/excludeInterfaces"]),
    known(keys::DNS_CAPTURE, &[]),
    known(keys::DROP_INVALID, &[]),
    known(keys::INTERCEPTION_MODE, &["sidecar.istio.io/interceptionMode"]),
    known(keys::INIT_BACKEND, &[]),
    known(keys::OPAQUE_PORTS, &["config.linkerd.io/opaque-ports"]),
    known(keys::PROXY_CPU_REQUEST, &["sidecar.istio.io/proxyCPU", "config.linkerd.io/proxy-cpu-request"]),
    known(keys::PROXY_CPU_LIMIT, &["sidecar.istio.io/proxyCPULimit", "config.linkerd.io/proxy-cpu-limit"]),
    known(keys::PROXY_MEMORY_REQUEST, &["sidecar.istio.io/proxyMemory", "config.linkerd.io/proxy-memory-request"]),
    known(keys::PROXY_MEMORY_LIMIT, &["sidecar.istio.io/proxyMemoryLimit", "config.linkerd.io/proxy-memory-limit"]),
    known(keys::PROXY_LOG_LEVEL, &["sidecar.istio.io/logLevel", "config.linkerd.io/proxy-log-level"]),
    known(keys::PROXY_IMAGE, &[]),
    known(keys::DRAIN_SECONDS, &[]),
];

/// Where an annotation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// On the pod.
    Pod,
    /// On its namespace.
    Namespace,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pod => "pod",
            Self::Namespace => "namespace",
        })
    }
}

/// Why a pod is refused: a mistake in a mesh annotation, or a name that the sidecar needs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A value that is not allowed.
    #[error("annotation {key} on the {level}: {value:?} is not {allowed}")]
    BadValue {
        /// Where it stands.
        level: Level,
        /// Its key.
        key: String,
        /// Its value.
        value: String,
        /// What is allowed, in words.
        allowed: Allowed,
    },
    /// A value that is allowed by itself, but not with another one.
    #[error("annotation {key} on the {level}: {value:?} {problem}")]
    Conflict {
        /// Where it stands.
        level: Level,
        /// Its key.
        key: String,
        /// Its value.
        value: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A container, volume or status annotation of the user's that is in the sidecar's way.
    #[error("{0}")]
    InTheWay(String),
}

/// The options of one pod.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Native sidecar or container.
    pub native: bool,
    /// Rewrite probes.
    pub rewrite_probes: bool,
    /// Merge the app's metrics.
    pub merge_metrics: bool,
    /// Inbound ports to redirect.
    pub inbound_ports: PortSet,
    /// Inbound ports that go to the app directly.
    pub exclude_inbound_ports: PortSet,
    /// Outbound ports to redirect whatever the CIDRs say.
    pub outbound_ports: PortSet,
    /// Outbound ports that leave directly.
    pub exclude_outbound_ports: PortSet,
    /// Outbound destinations to redirect.
    pub outbound_cidrs: Cidrs,
    /// Outbound destinations that are left alone.
    pub exclude_outbound_cidrs: Cidrs,
    /// Interfaces that are left alone.
    pub exclude_interfaces: Vec<String>,
    /// Capture DNS.
    pub dns_capture: bool,
    /// Drop packets that conntrack calls INVALID.
    pub drop_invalid: bool,
    /// REDIRECT or TPROXY.
    pub mode: Mode,
    /// Which firewall tool.
    pub backend: Backend,
    /// Ports of opaque TCP.
    pub opaque_ports: PortSet,
    /// The proxy's requests and limits.
    pub resources: Resources,
    /// The proxy's log filter.
    pub log_level: String,
    /// The image.
    pub image: String,
    /// Seconds of drain; absent: the proxy's default.
    pub drain_seconds: Option<u32>,
}

struct Found<'a> {
    level: Level,
    key: &'a str,
    value: &'a str,
}

impl Found<'_> {
    fn refuse(&self, allowed: Allowed) -> Refusal {
        Refusal::BadValue { level: self.level, key: self.key.to_owned(), value: self.value.to_owned(), allowed }
    }
}

struct Reader<'a> {
    pod: Option<&'a serde_json::Map<String, Value>>,
    namespace: Option<&'a BTreeMap<String, String>>,
    refusals: Vec<Refusal>,
}

impl<'a> Reader<'a> {
    fn find(&self, key: &'static str) -> Option<Found<'a>> {
        let known = KNOWN.iter().find(|k| k.key == key)?;
        let all = || std::iter::once(key).chain(known.aliases.iter().copied());
        let pod = all().find_map(|key| {
            let value = self.pod?.get(key)?.as_str()?;
            Some(Found { level: Level::Pod, key, value })
        });
        pod.or_else(|| {
            all().filter(|_| known.inherited).find_map(|key| {
                let value = self.namespace?.get(key)?.as_str();
                Some(Found { level: Level::Namespace, key, value })
            })
        })
    }

    fn read<T>(&mut self, key: &'static str, default: T, parse: impl FnOnce(&Found<'a>) -> Result<T, Allowed>) -> T {
        let Some(found) = self.find(key) else { return default };
        match parse(&found) {
            Ok(value) => value,
            Err(allowed) => {
                self.refusals.push(found.refuse(allowed));
                default
            }
        }
    }

    fn quantity(&mut self, key: &'static str) -> Option<(String, f64)> {
        self.read(key, None, |f| {
            check_quantity(f.value)?;
            Ok(quantity(f.value).map(|q| (f.value.to_owned(), q)))
        })
    }
}

impl Options {
    /// Reads them.
    ///
    /// # Errors
    /// Every annotation with a value that is not allowed.
    pub fn read(
        pod: &Value,
        namespace: Option<&NamespaceFacts>,
        settings: &Settings,
        cluster: ClusterFacts,
    ) -> Result<Self, Vec<Refusal>> {
        let mut reader = Reader {
            pod: pod.pointer("/metadata/annotations").and_then(Value::as_object),
            namespace: namespace.map(|n| &n.annotations),
            refusals: Vec::new(),
        };
        let r = &mut reader;
        let traffic = &settings.traffic;
        // The settings have been checked when they were read.
        let ports = |text: &str| PortSet::parse(text, true).unwrap_or(PortSet::NONE);
        let cidrs = |text: &str| Cidrs::parse(text, true).unwrap_or(Cidrs::Blocks(Vec::new()));
        let native_default = match settings.native_sidecars {
            NativeSidecars::Auto => cluster.native_sidecars,
            NativeSidecars::Enabled => true,
            NativeSidecars::Disabled => false,
        };
        let named = |name: &str| crate::probes::any_port_named(pod, name);
        let lenient = |f: &Found<'_>| f.level == Level::Namespace;
        let opaque_default = PortSet::parse_named(&traffic.opaque_ports, named, true).unwrap_or(PortSet::NONE);
        let options = Self {
            native: r.read(keys::NATIVE_SIDECAR, native_default, |f| parse_bool(f.value)),
            rewrite_probes: r.read(keys::REWRITE_PROBES, settings.rewrite_probes, |f| parse_bool(f.value)),
            merge_metrics: r.read(keys::MERGE_METRICS, settings.merge_metrics, |f| parse_bool(f.value)),
            inbound_ports: r.read(keys::INBOUND_PORTS, ports(&traffic.inbound_ports), |f| PortSet::parse(f.value, true)),
            exclude_inbound_ports: r
                .read(keys::EXCLUDE_INBOUND_PORTS, ports(&traffic.exclude_inbound_ports), |f| PortSet::parse(f.value, false)),
            outbound_ports: r.read(keys::OUTBOUND_PORTS, ports(&traffic.outbound_ports), |f| PortSet::parse(f.value, false)),
            exclude_outbound_ports: r
                .read(keys::EXCLUDE_OUTBOUND_PORTS, ports(&traffic.exclude_outbound_ports), |f| PortSet::parse(f.value, false)),
            outbound_cidrs: r.read(keys::OUTBOUND_CIDRS, cidrs(&traffic.outbound_cidrs), |f| Cidrs::parse(f.value, true)),
            exclude_outbound_cidrs: r
                .read(keys::EXCLUDE_OUTBOUND_CIDRS, cidrs(&traffic.exclude_outbound_cidrs), |f| Cidrs::parse(f.value, false)),
            exclude_interfaces: r.read(keys::EXCLUDE_INTERFACES, Vec::new(), |f| parse_interfaces(f.value)),
            dns_capture: r.read(keys::DNS_CAPTURE, traffic.dns_capture, |f| parse_bool(f.value)),
            drop_invalid: r.read(keys::DROP_INVALID, traffic.drop_invalid, |f| parse_bool(f.value)),
            mode: r.read(keys::INTERCEPTION_MODE, traffic.mode, |f| Mode::parse(f.value)),
            backend: r.read(keys::INIT_BACKEND, settings.init.backend, |f| Backend::parse(f.value)),
            opaque_ports: r.read(keys::OPAQUE_PORTS, opaque_default, |f| PortSet::parse_named(f.value, named, lenient(f))),
            resources: Resources::default(),
            log_level: r.read(keys::PROXY_LOG_LEVEL, settings.proxy.log_level.clone(), |f| parse_log_level(f.value)),
            image: r.read(keys::PROXY_IMAGE, settings.image.clone(), |f| check_image(f.value).map(|()| f.value.to_owned())),
            drain_seconds: r.read(keys::DRAIN_SECONDS, settings.proxy.drain_seconds, |f| parse_seconds(f.value).map(Some)),
        };
        let resources = resources(r, &settings.proxy.resources);
        if reader.refusals.is_empty() { Ok(Self { resources, ..options }) } else { Err(reader.refusals) }
    }
}

/// The inbound ports that a pod with these annotations, in a namespace with those, redirects to its sidecar, and those of them that it
/// does not. A value that is not allowed counts as absent: no pod is injected with one.
pub fn inbound_ports(
    pod: &BTreeMap<String, String>,
    namespace: Option<&BTreeMap<String, String>>,
    settings: &TrafficSettings,
) -> (PortSet, PortSet) {
    let find = |key: &'static str, star: bool, default: &str| {
        let known = KNOWN.iter().find(|k| k.key == key);
        let keys = || std::iter::once(key).chain(known.into_iter().flat_map(|k| k.aliases.iter().copied()));
        let levels = std::iter::once(pod).chain(namespace);
        let said = levels.flat_map(|level| keys().filter_map(|key| level.get(key))).next();
        said.and_then(|text| PortSet::parse(text, star).ok())
            .unwrap_or_else(|| PortSet::parse(default, star).unwrap_or(PortSet::NONE))
    };
    (
        find(keys::INBOUND_PORTS, true, &settings.inbound_ports),
        find(keys::EXCLUDE_INBOUND_PORTS, false, &settings.exclude_inbound_ports),
    )
}

/// The proxy's resources: what the annotations say over what the settings say. A default that an annotation's limit undercuts
/// comes down to the limit; two annotations that contradict each other are a mistake.
fn resources(reader: &mut Reader<'_>, settings: &Resources) -> Resources {
    let mut all = settings.clone();
    for (name, request_key, limit_key) in [
        ("cpu", keys::PROXY_CPU_REQUEST, keys::PROXY_CPU_LIMIT),
        ("memory", keys::PROXY_MEMORY_REQUEST, keys::PROXY_MEMORY_LIMIT),
    ] {
        let (request, limit) = (reader.quantity(request_key), reader.quantity(limit_key));
        if let (Some((r, rq)), Some((l, lq))) = (&request, &limit)
            && rq > lq
            && let Some(found) = reader.find(request_key)
        {
            reader.refusals.push(Refusal::Conflict {
                level: found.level,
                key: found.key.to_owned(),
                value: r.clone(),
                problem: format!("is more than the limit, {l}"),
            });
            continue;
        }
        if let Some((text, _)) = &request {
            all.requests.insert(name.into(), text.clone());
        }
        if let Some((text, _)) = &limit {
            all.limits.insert(name.into(), text.clone());
        }
        let of = |map: &BTreeMap<String, String>| map.get(name).and_then(|text| Some((text.clone(), quantity(text)?)));
        if let (Some((r, rq)), Some((l, lq))) = (of(&all.requests), of(&all.limits))
            && rq > lq
        {
            if request.is_some() {
                all.limits.insert(name.into(), r);
            } else {
                all.requests.insert(name.into(), l);
            }
        }
    }
    all
}

/// Warnings about keys under `weft.mesh/` that Weft doesn't know, on the pod and on its namespace.
pub fn unknown_keys(pod: &Value, namespace: Option<&NamespaceFacts>) -> Vec<String> {
    let pod_keys = pod.pointer("/metadata/annotations").and_then(Value::as_object).into_iter().flat_map(|m| m.keys());
    let ns_keys = namespace.into_iter().flat_map(|n| n.annotations.keys());
    let all = pod_keys.map(|k| (Level::Pod, k)).chain(ns_keys.map(|k| (Level::Namespace, k)));
    all.filter(|(_, key)| key.starts_with(keys::PREFIX) && KNOWN.iter().all(|k| k.key != key.as_str()))
        .map(|(level, key)| {
            let near = KNOWN.iter().map(|k| (distance(k.key, key), k.key)).min().filter(|(d, _)| *d <= 6);
            let hint = near.map(|(_, k)| format!(" (did you mean {k}?)")).unwrap_or_default();
            format!("annotation {key} on the {level} is not known to Weft and is ignored{hint}")
        })
        .collect()
}

/// Levenshtein's distance, for guessing what was meant.
pub fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let change = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests;
