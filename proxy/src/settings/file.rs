//! Settings from a YAML file, for machines without Kubernetes, tests and benchmarks. Unknown keys are refused.

use super::{Identity, Invalid, Listener, LogFormat, Mode, Protocol, Settings, parse_duration, parse_ports};
use crate::conn::Direction;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use weft_api::probe::{AppMetrics, Probes};

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct File {
    listeners: Vec<FileListener>,
    admin: Option<SocketAddr>,
    workers: Option<usize>,
    mode: Mode,
    ports: BTreeMap<u16, Protocol>,
    opaque_ports: String,
    addresses: Vec<IpAddr>,
    workload: FileWorkload,
    control: Option<FileControl>,
    probes: Probes,
    app_metrics: Option<AppMetrics>,
    dns: Option<FileDns>,
    timeouts: BTreeMap<String, String>,
    log: Option<String>,
    log_format: LogFormat,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct FileListener {
    address: SocketAddr,
    direction: Direction,
    upstream: Option<SocketAddr>,
    #[serde(default)]
    protocol: Protocol,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct FileWorkload {
    pod: String,
    name: String,
    kind: String,
    namespace: String,
    service_account: String,
    cluster: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct FileControl {
    address: String,
    root: PathBuf,
    token: PathBuf,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct FileDns {
    listen: Vec<SocketAddr>,
    #[serde(default)]
    resolvers: Vec<SocketAddr>,
}

/// Reads the settings from YAML; `quota` is the number of CPUs that the cgroup grants.
pub fn read(yaml: &str, quota: Option<usize>) -> Result<Settings, Invalid> {
    let file: File = serde_saphyr::from_str(yaml).map_err(|error| Invalid(error.to_string()))?;
    if file.listeners.is_empty() {
        return Err(Invalid("listeners: none is given, so the proxy would have nothing to do".into()));
    }
    let mut settings = Settings::default();
    for (name, text) in &file.timeouts {
        let timeouts = &mut settings.timeouts;
        let field = match name.as_str() {
            "connect" => &mut timeouts.connect,
            "detectSilence" => &mut timeouts.detect_silence,
            "detect" => &mut timeouts.detect,
            "handshake" => &mut timeouts.handshake,
            "requestHeader" => &mut timeouts.request_header,
            "poolIdle" => &mut timeouts.pool_idle,
            "drain" => &mut timeouts.drain,
            _ => {
                return Err(Invalid(format!(
                    "timeouts.{name}: unknown; there are connect, detectSilence, detect, handshake, requestHeader, poolIdle, drain"
                )));
            }
        };
        *field = parse_duration(&format!("timeouts.{name}"), text)?;
    }
    settings.listeners = file
        .listeners
        .into_iter()
        .map(|l| Listener {
            address: l.address,
            direction: l.direction,
            upstream: l.upstream,
            protocol: l.protocol,
            optional: false,
        })
        .collect();
    for listener in &settings.listeners {
        if listener.upstream == Some(listener.address) {
            return Err(Invalid(format!("listeners: {} has itself as upstream, a loop", listener.address)));
        }
    }
    settings.admin = file.admin.map_or(settings.admin, |admin| vec![admin]);
    settings.workers = match file.workers {
        Some(0) => return Err(Invalid("workers: must be at least 1".into())),
        Some(workers) => workers,
        None => quota.unwrap_or(1).max(1),
    };
    settings.mode = file.mode;
    settings.ports = file.ports.into_iter().collect();
    settings.opaque_ports = parse_ports("opaquePorts", &file.opaque_ports)?;
    settings.identity = Identity {
        pod: file.workload.pod,
        namespace: file.workload.namespace,
        addresses: file.addresses,
        service_account: file.workload.service_account,
        workload_kind: file.workload.kind,
        workload: file.workload.name,
        cluster: file.workload.cluster,
        ..Identity::default()
    };
    settings.control = file.control.map(|c| super::Control { address: c.address, root: c.root, token: c.token });
    settings.probes = file.probes;
    settings.app_metrics = file.app_metrics;
    settings.dns = file.dns.map(|dns| crate::dns::Settings { listen: dns.listen, resolvers: dns.resolvers });
    if let Some(dns) = &settings.dns
        && let Some(same) = dns.resolvers.iter().find(|resolver| dns.listen.contains(resolver))
    {
        return Err(Invalid(format!("dns.resolvers: {same} is where the proxy itself listens, a loop")));
    }
    settings.log = file.log.unwrap_or(settings.log);
    settings.log_format = file.log_format;
    Ok(settings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_documented_example_is_read() {
        let page = include_str!("../../../docs/proxy.md");
        let yaml = page.split("```yaml\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
        let settings = read(yaml, None).unwrap();
        assert_eq!(settings.listeners.len(), 2);
        assert_eq!(settings.listeners[0].protocol, Protocol::Http1);
        assert_eq!(settings.timeouts.connect, Duration::from_secs(5));
        assert_eq!(settings.ports, [(8080, Protocol::Http)]);
        assert_eq!(settings.dns.unwrap().resolvers.len(), 1);
    }

    #[test]
    fn mistakes_are_refused_by_name() {
        let listener = "listeners: [{address: 127.0.0.1:1, direction: outbound, upstream: 127.0.0.1:2}]\n";
        assert!(read(listener, Some(4)).is_ok_and(|settings| settings.workers == 4));
        for (yaml, word) in [
            ("", "listeners"),
            ("listeners: []", "listeners"),
            (&format!("{listener}wokers: 2"), "wokers"),
            (&format!("{listener}workers: 0"), "workers"),
            (&format!("{listener}timeouts: {{conect: 1s}}"), "timeouts.conect"),
            (&format!("{listener}timeouts: {{connect: 1}}"), "timeouts.connect"),
            (&format!("{listener}opaquePorts: '0'"), "opaquePorts"),
            ("listeners: [{address: 127.0.0.1:1, direction: outbound, upstream: 127.0.0.1:1}]", "loop"),
            ("listeners: [{address: 127.0.0.1:1, direction: sideways}]", "sideways"),
            (&format!("{listener}dns: {{listen: ['127.0.0.1:53'], resolvers: ['127.0.0.1:53']}}"), "dns.resolvers"),
        ] {
            let error = read(yaml, None).unwrap_err().0;
            assert!(error.contains(word), "{yaml}: {error}");
        }
    }
}
