//! Envoy on both sides of a mutual TLS connection, as a mesh configures it: SPIFFE ids in both directions (the client checks the server's id
//! exactly, the server that the client is of the trust domain), and an RBAC filter in front of the app that lets one client in.
//!
//! TLS 1.3 only, as Weft. Session resumption, curves and buffers are Envoy's defaults. Of Istio's own filters (metadata
//! exchange, stats, ALPN) there is none, so this is less than an Istio sidecar does.

use super::{Between, Fronts};
use crate::certs::{self, Files};
use serde_json::{Value, json};
use std::net::SocketAddr;

const HCM: &str = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
const ROUTER: &str = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";
const TCP: &str = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
const OPTIONS: &str = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
const UPSTREAM: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
const DOWNSTREAM: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext";
const NETWORK_RBAC: &str = "type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC";
const HTTP_RBAC: &str = "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC";

/// The proxy of the client: plaintext in, mutual TLS out.
pub(super) fn outbound(front: Fronts, to: Fronts, admin: SocketAddr, files: &Files, between: Between) -> Value {
    let mut listeners = Vec::new();
    let mut clusters = Vec::new();
    let http2 = [("h1", between == Between::Http2), ("h2", true), ("tcp", false), ("opaque", false)];
    for ((name, http2), (from, to)) in http2.into_iter().zip(front.all().into_iter().zip(to.all())) {
        let mut cluster = cluster(name, to, http2);
        cluster["transport_socket"] = json!({
            "name": "tls",
            "typed_config": {
                "@type": UPSTREAM,
                "sni": "server.bench.svc.cluster.local",
                "common_tls_context": tls(files, &json!({"exact": certs::identity("server")})),
            },
        });
        clusters.push(cluster);
        listeners.push(json!({"name": name, "address": address(from), "filter_chains": [{"filters": [filter(name, &[])]}]}));
    }
    whole(admin, listeners, clusters)
}

/// The proxy of the app: mutual TLS in, authorization, plaintext out.
pub(super) fn inbound(front: Fronts, back: Fronts, admin: SocketAddr, files: &Files, between: Between) -> Value {
    let mut listeners = Vec::new();
    let mut clusters = Vec::new();
    let policy = json!({
        "action": "ALLOW",
        "policies": {"ns[bench]-policy[client]-rule[0]": {
            "permissions": [{"any": true}],
            "principals": [{"authenticated": {"principal_name": {"exact": certs::identity("client")}}}],
        }},
    });
    let http_rbac = json!({"name": "rbac", "typed_config": {"@type": HTTP_RBAC, "rules": policy}});
    let rbac = json!({"name": "rbac", "typed_config": {"@type": NETWORK_RBAC, "stat_prefix": "tcp", "rules": policy}});
    for (name, (from, to)) in ["h1", "h2", "tcp", "opaque"].into_iter().zip(front.all().into_iter().zip(back.all())) {
        clusters.push(cluster(name, to, name == "h2"));
        let filters = match name {
            "h1" | "h2" => {
                let mut filter = filter(name, std::slice::from_ref(&http_rbac));
                if between == Between::Http2 {
                    filter["typed_config"]["codec_type"] = json!("HTTP2");
                }
                vec![filter]
            }
            _ => vec![rbac.clone(), filter(name, &[])],
        };
        let of_mesh = json!({"prefix": format!("spiffe://{}/", certs::TRUST_DOMAIN)});
        listeners.push(json!({
            "name": name,
            "address": address(from),
            "filter_chains": [{
                "filters": filters,
                "transport_socket": {"name": "tls", "typed_config": {
                    "@type": DOWNSTREAM,
                    "require_client_certificate": true,
                    "common_tls_context": tls(files, &of_mesh),
                }},
            }],
        }));
    }
    whole(admin, listeners, clusters)
}

fn tls(files: &Files, san: &Value) -> Value {
    json!({
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [{"certificate_chain": {"filename": files.chain}, "private_key": {"filename": files.key}}],
        "validation_context": {
            "trusted_ca": {"filename": files.root},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": san}],
        },
        "alpn_protocols": ["istio"],
    })
}

fn filter(name: &str, before_router: &[Value]) -> Value {
    if matches!(name, "tcp" | "opaque") {
        return json!({"name": "tcp", "typed_config": {"@type": TCP, "stat_prefix": name, "cluster": name}});
    }
    let mut filters = before_router.to_vec();
    filters.push(json!({"name": "router", "typed_config": {"@type": ROUTER}}));
    json!({"name": "http", "typed_config": {
        "@type": HCM,
        "stat_prefix": name,
        "codec_type": if name == "h2" { "HTTP2" } else { "HTTP1" },
        "normalize_path": true,
        "route_config": {"virtual_hosts": [{
            "name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": name}}],
        }]},
        "http_filters": filters,
    }})
}

fn cluster(name: &str, to: SocketAddr, http2: bool) -> Value {
    let mut cluster = json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(to)}}]}]},
    });
    if http2 {
        cluster["typed_extension_protocol_options"] = json!({"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": OPTIONS, "explicit_http_config": {"http2_protocol_options": {}},
        }});
    }
    cluster
}

/// An address in Envoy's configuration.
fn address(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}

fn whole(admin: SocketAddr, listeners: Vec<Value>, clusters: Vec<Value>) -> Value {
    json!({"admin": {"address": address(admin)}, "static_resources": {"listeners": listeners, "clusters": clusters}})
}

/// Handshakes and resumed ones among them, of the outbound proxy's raw TCP connections, from its `/stats`.
pub(super) fn handshakes(stats: &str) -> Option<(u64, u64)> {
    let value = |name: &str| {
        let line = stats.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))?;
        line.trim().parse().ok()
    };
    Some((value("cluster.opaque.ssl.handshake")?, value("cluster.opaque.ssl.session_reused")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_are_read() {
        let text = "cluster.opaque.ssl.handshake: 12\ncluster.opaque.ssl.session_reused: 9\nlistener.x.ssl.handshake: 7\n";
        assert_eq!(handshakes(text), Some((12, 9)));
        assert_eq!(handshakes("cluster.opaque.ssl.handshake: 12\n"), None);
    }
}
