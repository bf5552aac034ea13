//! What the control plane tells a proxy about its own pod: the workload (labels of metrics) and the declared ports. A
//! whole value replaces the one before; readers take it at the start of a connection.

use crate::authz::Policy;
use crate::conn::{Direction, Downstream};
use crate::settings::{Protocol, Settings};
use std::collections::BTreeMap;
use std::sync::Arc;
use weft_api::wire;

/// The labels of the pod's telemetry. An empty one is `unknown` in metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Workload {
    /// Name of the owner at the top.
    pub name: String,
    /// Its kind.
    pub kind: String,
    /// Its namespace.
    pub namespace: String,
    /// The pod's service account.
    pub service_account: String,
    /// Label `app`.
    pub app: String,
    /// Label `version`.
    pub version: String,
    /// Canonical service.
    pub canonical_service: String,
    /// Canonical revision.
    pub canonical_revision: String,
    /// The cluster.
    pub cluster: String,
}

/// The Service that a port belongs to.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its fully qualified name.
    pub host: String,
}

/// A declared port of the app.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Port {
    /// What is spoken there.
    pub protocol: Protocol,
    /// The Service that declares it.
    pub service: Option<Service>,
}

/// All that a proxy knows of its pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Config {
    /// Version of the message that it came by; 0: from the settings, no message yet.
    pub version: u64,
    /// The labels.
    pub workload: Workload,
    /// The declared ports; any other is detected.
    pub ports: BTreeMap<u16, Port>,
    /// Which connections are taken.
    pub mtls: Mtls,
    /// Ports where that is different.
    pub port_mtls: BTreeMap<u16, Mtls>,
    /// Who may call.
    pub policy: Arc<Policy>,
}

/// Which connections are taken on a port (the modes of PeerAuthentication).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Mtls {
    /// Mutual TLS of the mesh, plaintext and the app's own TLS.
    #[default]
    Permissive,
    /// Only mutual TLS of the mesh.
    Strict,
    /// Whatever comes is the app's.
    Disable,
}

impl Mtls {
    fn from_wire(number: i32) -> Option<Self> {
        Some(match wire::MtlsMode::try_from(number).ok()? {
            wire::MtlsMode::Permissive => Self::Permissive,
            wire::MtlsMode::Strict => Self::Strict,
            wire::MtlsMode::Disable => Self::Disable,
        })
    }
}

impl Config {
    /// What is known before the control plane has spoken.
    pub fn initial(settings: &Settings) -> Self {
        let identity = &settings.identity;
        let workload = Workload {
            name: identity.workload.clone(),
            kind: identity.workload_kind.clone(),
            namespace: identity.namespace.clone(),
            service_account: identity.service_account.clone(),
            canonical_service: identity.workload.clone(),
            cluster: identity.cluster.clone(),
            ..Workload::default()
        };
        let ports = settings.ports.iter().map(|&(port, protocol)| (port, Port { protocol, service: None })).collect();
        let policy = Arc::new(if settings.control.is_some() { Policy::pending() } else { Policy::default() });
        Self { version: 0, workload, ports, policy, ..Self::default() }
    }

    /// Reads a message. An error says which port is wrong; the message is then to be refused as a whole.
    pub fn from_wire(version: u64, inbound: wire::Inbound) -> Result<Self, String> {
        Self::default().succeed(version, inbound)
    }

    /// Reads a message that replaces this configuration. What did not change is taken over.
    ///
    /// # Errors
    /// As [`Config::from_wire`].
    pub fn succeed(&self, version: u64, inbound: wire::Inbound) -> Result<Self, String> {
        let mode = |field: &str, number: i32| {
            Mtls::from_wire(number).ok_or_else(|| format!("{field}: mode {number} is not known to this version"))
        };
        let mtls = mode("mtls", inbound.mtls)?;
        let policy = Policy::after(&self.policy, &inbound);
        let mut port_mtls = BTreeMap::new();
        for of in &inbound.port_mtls {
            let port = u16::try_from(of.port).ok().filter(|port| *port != 0);
            let port = port.ok_or_else(|| format!("port_mtls: {} is no port (1 to 65535)", of.port))?;
            port_mtls.insert(port, mode("port_mtls", of.mode)?);
        }
        let workload = inbound.workload.unwrap_or_default();
        let mut ports = BTreeMap::new();
        for declared in inbound.ports {
            let port = u16::try_from(declared.port).ok().filter(|port| *port != 0);
            let port = port.ok_or_else(|| format!("ports: {} is no port (1 to 65535)", declared.port))?;
            let protocol = Protocol::from_wire(declared.protocol).ok_or_else(|| {
                let number = declared.protocol;
                format!("ports: port {port} has protocol {number}, which this version does not know")
            })?;
            let service = declared.service.map(|s| Service { name: s.name, namespace: s.namespace, host: s.host });
            if ports.insert(port, Port { protocol, service }).is_some() {
                return Err(format!("ports: port {port} is declared twice"));
            }
        }
        let workload = Workload {
            name: workload.name,
            kind: workload.kind,
            namespace: workload.namespace,
            service_account: workload.service_account,
            app: workload.app,
            version: workload.version,
            canonical_service: workload.canonical_service,
            canonical_revision: workload.canonical_revision,
            cluster: workload.cluster,
        };
        Ok(Self { version, workload, ports, mtls, port_mtls, policy })
    }

    /// Which connections are taken on a port of the app.
    pub fn mtls(&self, port: u16) -> Mtls {
        self.port_mtls.get(&port).copied().unwrap_or(self.mtls)
    }

    /// Whether a connection that is open may stay so.
    pub fn takes(&self, down: &Downstream) -> bool {
        down.direction == Direction::Outbound || down.principal.is_some() || self.mtls(down.original.0.port()) != Mtls::Strict
    }

    /// What is declared for a port of the app.
    pub fn protocol(&self, port: u16) -> Protocol {
        self.ports.get(&port).map_or(Protocol::Detect, |port| port.protocol)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(ports: &[(u32, i32)]) -> wire::Inbound {
        let ports = ports.iter().map(|&(port, protocol)| wire::InboundPort { port, protocol, service: None });
        wire::Inbound { ports: ports.collect(), ..wire::Inbound::default() }
    }

    #[test]
    fn messages() {
        let config = Config::from_wire(3, message(&[(80, 5), (3306, 4)])).unwrap();
        assert_eq!(config.protocol(80), Protocol::Http);
        assert_eq!(config.protocol(3306), Protocol::Tcp);
        assert_eq!(config.protocol(81), Protocol::Detect);
        for (bad, word) in
            [([(0, 0)].as_slice(), "0"), (&[(70000, 0)], "70000"), (&[(80, 99)], "99"), (&[(80, 1), (80, 2)], "twice")]
        {
            assert!(Config::from_wire(1, message(bad)).unwrap_err().contains(word));
        }
    }
}
