//! Settings from the environment of a pod's container. Every variable is optional; one that is set must be right, because a
//! proxy that silently ran with half of its configuration would be found out by its traffic.

use super::{Control, Identity, Invalid, Listener, LogFormat, Mode, Protocol, Settings, parse_ports};
use crate::conn::Direction;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;
use weft_api::{env, names};

/// Reads the settings; `get` looks a variable up, `quota` is the number of CPUs that the cgroup grants.
pub fn read(get: impl Fn(&str) -> Option<String>, quota: Option<usize>) -> Result<Settings, Invalid> {
    let get = |name: &str| get(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
    let text = |name: &str| get(name).unwrap_or_default();
    let mut settings = Settings { in_pod: true, ..Settings::default() };

    let mode = match get(env::MODE).as_deref() {
        None | Some("redirect") => Mode::Redirect,
        Some("tproxy") => Mode::Tproxy,
        Some(other) => return Err(Invalid(format!("{}: {other:?} is neither redirect nor tproxy", env::MODE))),
    };
    settings.mode = mode;
    let outbound = number(get, env::OUTBOUND_PORT, names::OUTBOUND_PORT)?;
    let inbound = number(get, env::INBOUND_PORT, names::INBOUND_PORT)?;
    let admin = number(get, env::ADMIN_PORT, names::ADMIN_PORT)?;
    for (port, direction) in [(outbound, Direction::Outbound), (inbound, Direction::Inbound)] {
        for ip in [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)] {
            settings.listeners.push(Listener {
                address: SocketAddr::new(ip, port),
                direction,
                upstream: None,
                protocol: Protocol::Detect,
                optional: ip.is_ipv6(),
            });
        }
    }
    settings.admin = vec![(Ipv4Addr::UNSPECIFIED, admin).into(), (Ipv6Addr::UNSPECIFIED, admin).into()];

    let mut addresses = Vec::new();
    for part in text(env::POD_IPS).split(',').map(str::trim).filter(|part| !part.is_empty()) {
        addresses.push(part.parse().map_err(|_| Invalid(format!("{}: {part:?} is no IP address", env::POD_IPS)))?);
    }
    let workload = text(env::WORKLOAD);
    let (workload_kind, workload) = workload.split_once('/').unwrap_or(("", &workload));
    settings.identity = Identity {
        pod: text(env::POD_NAME),
        namespace: text(env::POD_NAMESPACE),
        addresses,
        node: text(env::NODE_NAME),
        service_account: text(env::SERVICE_ACCOUNT),
        workload_kind: workload_kind.into(),
        workload: workload.into(),
        cluster: get(env::CLUSTER).unwrap_or_else(|| "Kubernetes".into()),
        trust_domain: get(env::TRUST_DOMAIN).unwrap_or_else(|| names::TRUST_DOMAIN.into()),
    };
    settings.control = get(env::CONTROL_ADDRESS).map(|address| Control {
        address,
        root: names::TRUST_BUNDLE_PATH.into(),
        token: names::TOKEN_PATH.into(),
    });
    settings.dns = match get(env::DNS_CAPTURE).as_deref() {
        None | Some("false") => None,
        // Loopback only: a datagram's answer has to come from the address that the query was redirected to.
        Some("true") => Some(crate::dns::Settings {
            listen: vec![(Ipv4Addr::LOCALHOST, names::DNS_PORT).into(), (Ipv6Addr::LOCALHOST, names::DNS_PORT).into()],
            resolvers: Vec::new(),
        }),
        Some(other) => return Err(Invalid(format!("{}: {other:?} is neither true nor false", env::DNS_CAPTURE))),
    };
    settings.opaque_ports = parse_ports(env::OPAQUE_PORTS, &text(env::OPAQUE_PORTS))?;
    if let Some(json) = get(env::PROBES) {
        settings.probes = serde_json::from_str(&json).map_err(|e| Invalid(format!("{}: {e}", env::PROBES)))?;
    }
    if let Some(json) = get(env::APP_METRICS) {
        let metrics = serde_json::from_str(&json).map_err(|e| Invalid(format!("{}: {e}", env::APP_METRICS)))?;
        settings.app_metrics = Some(metrics);
    }
    if let Some(log) = get(env::LOG) {
        settings.log = log;
    }
    settings.log_format = match get(env::LOG_FORMAT).as_deref() {
        None | Some("text") => LogFormat::Text,
        Some("json") => LogFormat::Json,
        Some(other) => return Err(Invalid(format!("{}: {other:?} is neither text nor json", env::LOG_FORMAT))),
    };
    let limit: u64 = number(get, env::CPU_LIMIT_MILLIS, 0)?;
    let by_limit = (limit > 0).then_some(limit.div_ceil(1000) as usize);
    settings.workers = match number(get, env::WORKERS, 0)? {
        0 => by_limit.or(quota).unwrap_or(1).max(1),
        workers => workers,
    };
    let drain = number(get, env::DRAIN_SECONDS, settings.timeouts.drain.as_secs())?;
    settings.timeouts.drain = Duration::from_secs(drain);
    Ok(settings)
}

fn number<T: FromStr>(get: impl Fn(&str) -> Option<String>, name: &str, default: T) -> Result<T, Invalid> {
    match get(name) {
        None => Ok(default),
        Some(text) => text.parse().map_err(|_| Invalid(format!("{name}: {text:?} is not a number in range"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(vars: &[(&str, &str)]) -> Result<Settings, Invalid> {
        read(|name| vars.iter().find(|var| var.0 == name).map(|var| var.1.to_owned()), Some(3))
    }

    #[test]
    fn an_empty_environment_is_a_working_pod() {
        let settings = with(&[]).unwrap();
        assert_eq!(settings.listeners.len(), 4);
        assert_eq!(settings.workers, 3);
        assert_eq!(settings.control, None);
    }

    #[test]
    fn what_the_webhook_writes_is_read() {
        let settings = with(&[
            (env::POD_IPS, "10.0.0.7,fd00::7"),
            (env::WORKLOAD, "Deployment/go-app"),
            (env::CONTROL_ADDRESS, "weft-control.weft-system.svc:15012"),
            (env::PROBES, r#"{"/app-health/go-app/livez":{"httpGet":{"path":"/healthz","port":8080}}}"#),
            (env::APP_METRICS, r#"{"port":8080}"#),
            (env::OPAQUE_PORTS, "3306,9000-9010"),
            (env::CPU_LIMIT_MILLIS, "1500"),
            (env::DRAIN_SECONDS, "7"),
            (env::MODE, "tproxy"),
            (env::DNS_CAPTURE, "true"),
        ])
        .unwrap();
        assert_eq!(settings.identity.addresses.len(), 2);
        assert_eq!((settings.identity.workload_kind.as_str(), settings.identity.workload.as_str()), ("Deployment", "go-app"));
        assert_eq!(settings.probes["/app-health/go-app/livez"].timeout_seconds, 1);
        assert_eq!(settings.app_metrics.as_ref().unwrap().path, "/metrics");
        assert!(settings.is_opaque(9005) && !settings.is_opaque(9011));
        assert_eq!(settings.workers, 2);
        assert_eq!(settings.timeouts.drain, Duration::from_secs(7));
        assert_eq!(settings.mode, Mode::Tproxy);
        assert_eq!(settings.dns.unwrap().listen, ["127.0.0.1:15053".parse().unwrap(), "[::1]:15053".parse().unwrap()]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (name, value) in [
            (env::POD_IPS, "10.0.0"),
            (env::MODE, "magic"),
            (env::DNS_CAPTURE, "perhaps"),
            (env::INBOUND_PORT, "70000"),
            (env::PROBES, "{"),
            (env::WORKERS, "-1"),
            (env::LOG_FORMAT, "xml"),
            (env::OPAQUE_PORTS, "0"),
        ] {
            assert!(with(&[(name, value)]).unwrap_err().0.starts_with(name), "{name}");
        }
    }
}
