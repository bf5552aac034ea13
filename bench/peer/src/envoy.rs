//! Envoy with the policies of every set: a listener each, configured as Istio configures a sidecar's inbound HTTP where it
//! matters for a verdict.
//!
//! The app behind it is a response of Envoy itself, which says in `x-seen-path` what the app would have been sent.

use crate::case::{Mode, Set};
use crate::identity::Authority;
use crate::translate;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const HCM: &str = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
const ROUTER: &str = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";
const RBAC: &str = "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC";
const NETWORK_RBAC: &str = "type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC";
const TCP: &str = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
const INSPECTOR: &str = "type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector";
const DOWNSTREAM: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext";

/// Where Envoy listens.
pub(crate) const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 3, 1);

/// A running Envoy. Ends with the value.
#[derive(Debug)]
pub(crate) struct Envoy {
    child: Child,
}

impl Envoy {
    /// Starts it for `sets`, whose raw connections go to `echo`, and waits until it listens.
    pub(crate) fn start(binary: &Path, dir: &Path, sets: &[Set], authority: &Authority, echo: SocketAddr) -> Result<Self> {
        let binary = std::fs::canonicalize(binary)
            .with_context(|| format!("{}: Envoy is not there; `make peer` installs it", binary.display()))?;
        let leaf = authority.leaf("spiffe://cluster.local/ns/default/sa/app")?;
        let tls = json!({"name": "tls", "typed_config": {
            "@type": DOWNSTREAM,
            "require_client_certificate": true,
            "common_tls_context": {
                "tls_certificates": [{
                    "certificate_chain": {"inline_string": leaf.pem.0}, "private_key": {"inline_string": leaf.pem.1},
                }],
                "validation_context": {"trusted_ca": {"inline_string": authority.root}},
                "alpn_protocols": ["istio"],
            },
        }});
        let mut listeners = Vec::new();
        for set in sets {
            let filters = if set.http { http(set)? } else { raw(set)? };
            listeners.push(json!({
                "name": set.port.to_string(),
                "address": address(SocketAddr::from((ADDRESS, set.port))),
                "listener_filters": [{"name": "inspector", "typed_config": {"@type": INSPECTOR}}],
                "filter_chains": [
                    {"filter_chain_match": {"transport_protocol": "tls"}, "transport_socket": tls, "filters": filters},
                    {"filter_chain_match": {"transport_protocol": "raw_buffer"}, "filters": filters},
                ],
            }));
        }
        let config = json!({
            // Istio's bootstrap says so: a fragment is cut off and not refused.
            "layered_runtime": {"layers": [{"name": "static", "static_layer": {
                "envoy.reloadable_features.http_reject_path_with_fragment": false,
            }}]},
            "static_resources": {
                "listeners": listeners,
                "clusters": [{
                    "name": "echo", "type": "STATIC",
                    "load_assignment": {"cluster_name": "echo", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(echo)}}]}]},
                }],
            },
        });
        let path = dir.join("envoy.json");
        std::fs::write(&path, config.to_string())?;
        let log = std::fs::File::create(dir.join("envoy.log"))?;
        let mut command = Command::new(binary);
        command.arg("-c").arg(path).args(["--concurrency", "1", "--disable-hot-restart", "-l", "warning"]);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut envoy = Self { child: command.spawn()? };
        let start = Instant::now();
        for set in sets {
            while TcpStream::connect((ADDRESS, set.port)).is_err() {
                if let Some(status) = envoy.child.try_wait()? {
                    let log = std::fs::read_to_string(dir.join("envoy.log")).unwrap_or_default();
                    bail!("Envoy ended ({status}):\n{log}");
                }
                if start.elapsed() > Duration::from_secs(60) {
                    bail!("Envoy does not listen on port {} after a minute", set.port);
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(envoy)
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        // Nothing of it is kept.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn address(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}

fn http(set: &Set) -> Result<Vec<Value>> {
    let mut filters = Vec::new();
    for rules in translate::filters(&set.policies, true)? {
        filters.push(json!({"name": format!("rbac-{}", filters.len()), "typed_config": {"@type": RBAC, "rules": rules}}));
    }
    filters.push(json!({"name": "router", "typed_config": {"@type": ROUTER}}));
    let seen =
        json!([{"header": {"key": "x-seen-path", "value": "%REQ(:PATH)%"}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}]);
    let ok = json!({"status": 200});
    Ok(vec![json!({"name": "http", "typed_config": {
        "@type": HCM,
        "stat_prefix": "http",
        "codec_type": "AUTO",
        "use_remote_address": false,
        "normalize_path": set.mode != Mode::None,
        "merge_slashes": matches!(set.mode, Mode::MergeSlashes | Mode::DecodeAndMergeSlashes),
        "path_with_escaped_slashes_action":
            if set.mode == Mode::DecodeAndMergeSlashes { "UNESCAPE_AND_FORWARD" } else { "KEEP_UNCHANGED" },
        "route_config": {"virtual_hosts": [{
            "name": "all", "domains": ["*"], "response_headers_to_add": seen,
            "routes": [
                {"match": {"connect_matcher": {}}, "direct_response": ok},
                {"match": {"safe_regex": {"regex": ".*"}}, "direct_response": ok},
            ],
        }]},
        "http_filters": filters,
    }})])
}

fn raw(set: &Set) -> Result<Vec<Value>> {
    let mut filters = Vec::new();
    for rules in translate::filters(&set.policies, false)? {
        let name = format!("rbac-{}", filters.len());
        filters.push(json!({"name": name, "typed_config": {"@type": NETWORK_RBAC, "stat_prefix": name, "rules": rules}}));
    }
    filters.push(json!({"name": "tcp", "typed_config": {"@type": TCP, "stat_prefix": "tcp", "cluster": "echo"}}));
    Ok(filters)
}
