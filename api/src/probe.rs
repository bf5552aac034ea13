//! The app's own probes and metrics, as the webhook hands them to the proxy: the kubelet asks
//! `:15020/app-health/<container>/<kind>`, and the proxy performs the original probe inside the pod.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Original probes by the path under which the proxy performs them, for example `/app-health/go-app/livez`.
pub type Probes = BTreeMap<String, Probe>;

/// One probe. Exactly one of the actions is set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Probe {
    /// GET a path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http_get: Option<HttpGet>,
    /// Connect, nothing more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp_socket: Option<TcpSocket>,
    /// The gRPC health protocol.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grpc: Option<Grpc>,
    /// Seconds until the probe has failed, default 1 as in Kubernetes.
    #[serde(default = "one")]
    pub timeout_seconds: u32,
}

/// As Kubernetes' HTTPGetAction, with the port resolved to a number.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpGet {
    /// Path and query, default `/`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub path: String,
    /// Port of the app.
    pub port: u16,
    /// `HTTP` (default) or `HTTPS`; the certificate is not verified, as the kubelet doesn't.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub scheme: String,
    /// Host to connect to; empty: the pod's own address.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub host: String,
    /// Headers to send, repeated names allowed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub http_headers: Vec<HttpHeader>,
}

/// A header of an [`HttpGet`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpHeader {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: String,
}

/// As Kubernetes' TCPSocketAction.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpSocket {
    /// Port of the app.
    pub port: u16,
    /// Host to connect to; empty: the pod's own address.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub host: String,
}

/// As Kubernetes' GRPCAction.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grpc {
    /// Port of the app.
    pub port: u16,
    /// Service named in the health request, default none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub service: String,
}

/// Where the app's own metrics are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppMetrics {
    /// Port, `prometheus.io/port`.
    pub port: u16,
    /// Path, `prometheus.io/path`, default `/metrics`.
    #[serde(default = "metrics_path")]
    pub path: String,
    /// `http` (default) or `https`, `prometheus.io/scheme`.
    #[serde(default = "http")]
    pub scheme: String,
}

fn one() -> u32 {
    1
}

fn metrics_path() -> String {
    "/metrics".into()
}

fn http() -> String {
    "http".into()
}
