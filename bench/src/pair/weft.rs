//! Two `weft-proxy` without Kubernetes: a `weft-control` that reads the two pods from a folder of manifests gives them their identities, tells the
//! client's proxy whom it will find, and the app's proxy that it must take mutual TLS only, and whom it lets in.
//!
//! The namespace is STRICT, so a request that arrives has had mutual TLS: there is no figure for plaintext by mistake.

use super::{Fronts, free_ports};
use crate::certs::TRUST_DOMAIN;
use crate::fetch;
use crate::machine::Cores;
use crate::peer::Binaries;
use crate::process::{self, Process};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The address of the app's pod.
pub(super) const SERVER_ADDRESS: [u8; 4] = [127, 0, 1, 2];
const CLIENT_ADDRESS: &str = "127.0.1.1";

/// The control plane of a pair.
#[derive(Debug)]
pub(super) struct Control {
    _process: Process,
    address: SocketAddr,
    root: PathBuf,
}

impl Control {
    /// Starts `weft-control` and waits until it is ready. `server` are the app's ports.
    pub(super) async fn start(binaries: &Binaries, cores: Cores, server: Fronts) -> Result<Self> {
        let dir = process::folder()?;
        let manifests = dir.path().join("manifests");
        std::fs::create_dir(&manifests)?;
        std::fs::write(
            manifests.join("all.json"),
            json!({"apiVersion": "v1", "kind": "List", "items": objects(server)}).to_string(),
        )?;
        let tokens = dir.path().join("tokens");
        std::fs::write(&tokens, "token-of-client bench/client\ntoken-of-server bench/server\n")?;
        let root = dir.path().join("root.pem");
        let [webhook, control, metrics, console] = free_ports([127, 0, 0, 1])?;
        let binary = std::fs::canonicalize(&binaries.control)
            .with_context(|| format!("{}: build weft-control first, or see --control", binaries.control.display()))?;
        let mut command = Command::new(binary);
        command.arg("--manifests").arg(&manifests).arg("--tokens").arg(&tokens).arg("--trust-bundle-out").arg(&root);
        command.arg("--config").arg(dir.path().join("none.yaml")).args(["--log-level", "warn"]);
        command.args(["--bind", "127.0.0.1", "--san", "127.0.0.1"]);
        for (flag, port) in
            [("--webhook-port", webhook), ("--control-port", control), ("--metrics-port", metrics), ("--console-port", console)]
        {
            command.args([flag, &port.port().to_string()]);
        }
        let mut process = Process::start(command, cores, dir)?;
        process.ready(async || fetch::text(metrics, "/healthz/ready").await).await.context("weft-control")?;
        Ok(Self { _process: process, address: control, root })
    }

    /// How the two proxies are started.
    pub(super) fn commands(
        &self,
        binary: &Path,
        dirs: [&Path; 2],
        front: Fronts,
        middle: Fronts,
        back: Fronts,
        admin: [SocketAddr; 2],
    ) -> Result<[Command; 2]> {
        let outbound = self.command(binary, dirs[0], ("client", CLIENT_ADDRESS), "outbound", (front, middle), admin[0])?;
        let address = std::net::Ipv4Addr::from(SERVER_ADDRESS).to_string();
        let inbound = self.command(binary, dirs[1], ("server", &address), "inbound", (middle, back), admin[1])?;
        Ok([outbound, inbound])
    }

    fn command(
        &self,
        binary: &Path,
        dir: &Path,
        (account, address): (&str, &str),
        direction: &str,
        (from, to): (Fronts, Fronts),
        admin: SocketAddr,
    ) -> Result<Command> {
        let token = dir.join("token");
        std::fs::write(&token, format!("token-of-{account}"))?;
        let protocols = ["http1", "http2", "tcp", "tcp"];
        let listeners: Vec<Value> = protocols
            .iter()
            .zip(from.all().into_iter().zip(to.all()))
            .map(|(protocol, (from, to))| json!({"address": from, "direction": direction, "protocol": protocol, "upstream": to}))
            .collect();
        let config = json!({
            "workers": 1,
            "admin": admin,
            "listeners": listeners,
            "addresses": [address],
            "workload": {"pod": account, "name": account, "kind": "Pod", "namespace": "bench", "serviceAccount": account},
            "control": {"address": self.address.to_string(), "root": self.root, "token": token},
        });
        let path = dir.join("weft.yaml");
        std::fs::write(&path, config.to_string()).with_context(|| format!("can't write {}", path.display()))?;
        let mut command = Command::new(std::fs::canonicalize(binary)?);
        command.arg("--config").arg(path);
        Ok(command)
    }
}

/// The two pods, STRICT, and a policy that lets the one in to the other.
fn objects(server: Fronts) -> Vec<Value> {
    let ports = [("http-one", server.h1), ("http2-two", server.h2), ("tcp-bulk", server.tcp), ("tcp-opaque", server.opaque)];
    let ports: Vec<Value> =
        ports.iter().map(|(name, at)| json!({"name": name, "containerPort": at.port(), "protocol": "TCP"})).collect();
    let address = std::net::Ipv4Addr::from(SERVER_ADDRESS).to_string();
    let mut objects = vec![json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "bench"}})];
    for (name, address, ports) in [("client", CLIENT_ADDRESS, json!([])), ("server", address.as_str(), Value::from(ports))] {
        objects.push(json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name, "namespace": "bench", "uid": name, "labels": {"app": name},
                "annotations": {"weft.mesh/status": "{}"},
            },
            "spec": {
                "serviceAccountName": name,
                "containers": [{"name": "app", "image": "app", "ports": ports}, {"name": "weft-proxy", "image": "weft-proxy"}],
            },
            "status": {
                "phase": "Running", "podIP": address, "podIPs": [{"ip": address}],
                "conditions": [{"type": "Ready", "status": "True"}],
                "containerStatuses": [{"name": "weft-proxy", "started": true, "ready": true, "state": {"running": {}}}],
            },
        }));
    }
    objects.push(json!({
        "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
        "metadata": {"name": "default", "namespace": "bench"},
        "spec": {"mtls": {"mode": "STRICT"}},
    }));
    objects.push(json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "client", "namespace": "bench"},
        "spec": {
            "action": "ALLOW",
            "rules": [{"from": [{"source": {"principals": [format!("{TRUST_DOMAIN}/ns/bench/sa/client")]}}]}],
        },
    }));
    objects
}

/// Handshakes and resumed ones among them, of the outbound proxy, from its metrics.
pub(super) fn handshakes(metrics: &str) -> Option<(u64, u64)> {
    let of = |result: &str| {
        let wanted = format!("result=\"{result}\"");
        let lines = metrics.lines().filter(|line| line.starts_with("weft_proxy_tls_handshakes_total{"));
        let values = lines.filter(|line| line.contains("direction=\"outbound\"") && line.contains(&wanted));
        values.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).reduce(|a, b| a + b).map(|n| n as u64)
    };
    let (full, resumed) = (of("full"), of("resumed"));
    full.or(resumed)?;
    Some((full.unwrap_or(0) + resumed.unwrap_or(0), resumed.unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_read() {
        let line = |direction: &str, result: &str, n: u32| {
            format!("weft_proxy_tls_handshakes_total{{direction=\"{direction}\",result=\"{result}\",reason=\"\"}} {n}\n")
        };
        let text = line("outbound", "full", 3)
            + &line("outbound", "resumed", 5)
            + &line("inbound", "full", 7)
            + &line("outbound", "failed", 9);
        assert_eq!(handshakes(&text), Some((8, 5)));
        assert_eq!(handshakes(&line("inbound", "full", 7)), None);
    }
}
