//! The environment variables by which the webhook tells a pod's proxy what it must know. `weft-proxy` reads them when it
//! is started without `--config`.

/// Name of the pod (downward API).
pub const POD_NAME: &str = "WEFT_POD_NAME";
/// Namespace of the pod (downward API).
pub const POD_NAMESPACE: &str = "WEFT_POD_NAMESPACE";
/// Addresses of the pod, comma-separated (downward API, `status.podIPs`).
pub const POD_IPS: &str = "WEFT_POD_IPS";
/// Name of the node (downward API).
pub const NODE_NAME: &str = "WEFT_NODE_NAME";
/// Service account of the pod (downward API).
pub const SERVICE_ACCOUNT: &str = "WEFT_SERVICE_ACCOUNT";
/// The workload at the top of the owners, `Kind/name`.
pub const WORKLOAD: &str = "WEFT_WORKLOAD";
/// `host:port` of the control plane's gRPC API. Empty or absent: run without one.
pub const CONTROL_ADDRESS: &str = "WEFT_CONTROL_ADDRESS";
/// Trust domain of identities.
pub const TRUST_DOMAIN: &str = "WEFT_TRUST_DOMAIN";
/// Name of the cluster, a label of metrics.
pub const CLUSTER: &str = "WEFT_CLUSTER";
/// JSON of [`crate::probe::Probes`]: the app's own probes.
pub const PROBES: &str = "WEFT_PROBES";
/// JSON of [`crate::probe::AppMetrics`]: where the app's own metrics are scraped.
pub const APP_METRICS: &str = "WEFT_APP_METRICS";
/// Ports and ranges that carry opaque TCP, comma-separated.
pub const OPAQUE_PORTS: &str = "WEFT_OPAQUE_PORTS";
/// Log filter, default `warn,weft_proxy=info`.
pub const LOG: &str = "WEFT_LOG";
/// `text` (default) or `json`.
pub const LOG_FORMAT: &str = "WEFT_LOG_FORMAT";
/// Number of worker threads. Absent: by the cgroup's CPU quota, rounded up, 1 without a quota.
pub const WORKERS: &str = "WEFT_WORKERS";
/// The container's CPU limit in millicores (downward API), 0 or absent: none.
pub const CPU_LIMIT_MILLIS: &str = "WEFT_CPU_LIMIT_MILLIS";
/// Seconds that a drain may take, default 25.
pub const DRAIN_SECONDS: &str = "WEFT_DRAIN_SECONDS";
/// Outbound listener's port, default 15001.
pub const OUTBOUND_PORT: &str = "WEFT_OUTBOUND_PORT";
/// Inbound listener's port, default 15006.
pub const INBOUND_PORT: &str = "WEFT_INBOUND_PORT";
/// Admin port, default 15020.
pub const ADMIN_PORT: &str = "WEFT_ADMIN_PORT";
/// `true`: the redirection captures DNS, and the proxy answers it on port 15053. Default `false`.
pub const DNS_CAPTURE: &str = "WEFT_DNS_CAPTURE";
/// `redirect` (default) or `tproxy`.
pub const MODE: &str = "WEFT_MODE";
