//! What a proxy is started with, from the environment that the webhook writes ([`env`]) or from a file ([`file`]), in one
//! schema. It stays as it is while the process runs; what changes at run time is in [`crate::inbound::Config`].

pub mod env;
pub mod file;

use crate::conn::Direction;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;
use weft_api::names;
use weft_api::probe::{AppMetrics, Probes};

/// How long things may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// A connection to the destination, default 5 s.
    pub connect: Duration,
    /// How long the client of a connection without a declared protocol may be silent before the destination is connected
    /// (and may speak first), default 5 ms.
    pub detect_silence: Duration,
    /// How long the first bytes may take to become enough to tell the protocol once the first has come, default 2 s.
    pub detect: Duration,
    /// A TLS handshake of the mesh, default 10 s.
    pub handshake: Duration,
    /// A request's head, from its first byte to its last, default 10 s.
    pub request_header: Duration,
    /// An idle keep-alive connection to the app or the destination stays in the pool, default 50 s.
    pub pool_idle: Duration,
    /// How long a drain may take, default 25 s.
    pub drain: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            detect_silence: Duration::from_millis(5),
            detect: Duration::from_secs(2),
            handshake: Duration::from_secs(10),
            request_header: Duration::from_secs(10),
            pool_idle: Duration::from_secs(50),
            drain: Duration::from_secs(25),
        }
    }
}

/// What is spoken on a port or listener.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Not declared: told from the first bytes, or from the server's speaking first.
    #[default]
    Detect,
    /// HTTP of either version.
    Http,
    /// HTTP/1.0 and HTTP/1.1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// TLS that is passed through.
    Tls,
    /// Opaque: nothing is read before the destination is connected.
    Tcp,
}

impl Protocol {
    /// From its number in a message; none: this version does not know it.
    pub fn from_wire(number: i32) -> Option<Self> {
        use weft_api::wire::Protocol as Wire;
        Some(match Wire::try_from(number).ok()? {
            Wire::Detect => Self::Detect,
            Wire::Http => Self::Http,
            Wire::Http1 => Self::Http1,
            Wire::Http2 => Self::Http2,
            Wire::Tls => Self::Tls,
            Wire::Tcp => Self::Tcp,
        })
    }

    /// HTTP of some version.
    pub fn is_http(self) -> bool {
        matches!(self, Self::Http | Self::Http1 | Self::Http2)
    }
}

/// How the kernel hands connections over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// NAT: `SO_ORIGINAL_DST` tells the destination, the app sees 127.0.0.6 as its client.
    #[default]
    Redirect,
    /// The accepted socket's own address is the destination, the app sees the client's address. Inbound only.
    Tproxy,
}

/// A listening address.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Listener {
    /// Where it listens.
    pub address: SocketAddr,
    /// Which way its connections go.
    pub direction: Direction,
    /// Where they go; none: to the original destination that the kernel knows.
    pub upstream: Option<SocketAddr>,
    /// What they speak.
    pub protocol: Protocol,
    /// The machine may lack its address family.
    #[serde(skip)]
    pub optional: bool,
}

/// Format of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Who the proxy is: what it tells the control plane, and the labels of its metrics until that answers.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Identity {
    /// Name of the pod.
    pub pod: String,
    /// Its namespace.
    pub namespace: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its node.
    pub node: String,
    /// Its service account.
    pub service_account: String,
    /// Kind of the owner at the top.
    pub workload_kind: String,
    /// Name of the owner at the top.
    pub workload: String,
    /// The cluster.
    pub cluster: String,
    /// Trust domain of identities.
    pub trust_domain: String,
}

/// Where the control plane is and what it is trusted by.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Control {
    /// `host:port`.
    pub address: String,
    /// PEM file with the roots of its certificate.
    pub root: PathBuf,
    /// File with the token that proves who the proxy is.
    pub token: PathBuf,
}

/// Everything that stays as it is while the process runs.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Settings {
    /// How long things may take.
    #[serde(skip)]
    pub timeouts: Timeouts,
    /// Where connections are taken.
    pub listeners: Vec<Listener>,
    /// Where the admin server listens.
    pub admin: Vec<SocketAddr>,
    /// Number of worker threads.
    pub workers: usize,
    /// How inbound connections are handed over.
    pub mode: Mode,
    /// Who the proxy is.
    pub identity: Identity,
    /// The control plane, if there is one.
    pub control: Option<Control>,
    /// Inbound ports with a declared protocol, until the control plane says more.
    pub ports: Vec<(u16, Protocol)>,
    /// Destination ports, both ways, that carry opaque TCP.
    pub opaque_ports: Vec<RangeInclusive<u16>>,
    /// The app's own probes.
    #[serde(skip)]
    pub probes: Probes,
    /// Where the app's own metrics are.
    pub app_metrics: Option<AppMetrics>,
    /// Log filter.
    pub log: String,
    /// Log format.
    pub log_format: LogFormat,
    /// Where the app's DNS queries are answered, if they are captured.
    pub dns: Option<crate::dns::Settings>,
    /// Whether connections are taken on behalf of a pod: the proxy then outlives the app's listening sockets.
    pub in_pod: bool,
}

/// The default log filter.
pub const LOG: &str = "warn,weft_proxy=info";

impl Default for Settings {
    /// One worker, no listener, no control plane.
    fn default() -> Self {
        Self {
            timeouts: Timeouts::default(),
            listeners: Vec::new(),
            admin: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, names::ADMIN_PORT))],
            workers: 1,
            mode: Mode::default(),
            identity: Identity::default(),
            control: None,
            ports: Vec::new(),
            opaque_ports: Vec::new(),
            probes: Probes::new(),
            app_metrics: None,
            log: LOG.into(),
            log_format: LogFormat::default(),
            dns: None,
            in_pod: false,
        }
    }
}

impl Settings {
    /// Whether connections to a port are never looked into.
    pub fn is_opaque(&self, port: u16) -> bool {
        self.opaque_ports.iter().any(|range| range.contains(&port))
    }

    /// The address at which the app is probed and scraped: the pod's own, or loopback without a pod.
    pub fn app_address(&self) -> IpAddr {
        self.identity.addresses.first().copied().unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
    }
}

/// Why settings can't be used. Its text names the field, what is wrong and what is expected.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub struct Invalid(pub String);

/// Reads `80`, `1-1023` and lists of them, comma-separated. Empty parts are ignored.
pub fn parse_ports(field: &str, text: &str) -> Result<Vec<RangeInclusive<u16>>, Invalid> {
    let mut ports = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        match (from.trim().parse::<u16>(), to.trim().parse::<u16>()) {
            (Ok(from), Ok(to)) if 0 < from && from <= to => ports.push(from..=to),
            _ => return Err(Invalid(format!("{field}: {part:?} is no port (1 to 65535) and no range such as 9000-9099"))),
        }
    }
    Ok(ports)
}

/// Reads `250ms`, `10s`, `2m`, `1h`.
pub fn parse_duration(field: &str, text: &str) -> Result<Duration, Invalid> {
    let at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit = match &text[at..] {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => 0,
    };
    match text[..at].parse::<u64>().ok().and_then(|n| n.checked_mul(unit)) {
        Some(ms) if unit > 0 => Ok(Duration::from_millis(ms)),
        _ => Err(Invalid(format!("{field}: {text:?} is no duration: expected a number and a unit, such as 250ms, 10s, 2m"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_and_durations() {
        assert_eq!(parse_ports("p", "80, 90-99,").unwrap(), [80..=80, 90..=99]);
        for bad in ["0", "70000", "9-1", "x", "1-2-3"] {
            assert!(parse_ports("p", bad).unwrap_err().0.starts_with("p: "), "{bad}");
        }
        assert_eq!(parse_duration("d", "250ms").unwrap(), Duration::from_millis(250));
        assert_eq!(parse_duration("d", "2m").unwrap(), Duration::from_secs(120));
        for bad in ["", "5", "s", "-1s", "1.5s", "99999999999999999999s"] {
            assert!(parse_duration("d", bad).is_err(), "{bad}");
        }
    }
}
