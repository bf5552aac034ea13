//! Annotations and labels of pods and namespaces. Weft's own begin with [`PREFIX`]; those of Istio and Linkerd are read
//! as aliases by the webhook (ours win).

/// Prefix of Weft's own annotations and labels.
pub const PREFIX: &str = "weft.mesh/";

/// `enabled` / `disabled`: the bare key that the guide uses.
pub const INJECT_BARE: &str = "inject";
/// `enabled` / `disabled`.
pub const INJECT: &str = "weft.mesh/inject";
/// `enabled` / `disabled` (Linkerd's key).
pub const INJECT_LINKERD: &str = "linkerd.io/inject";
/// `true` / `false` (Istio's key).
pub const INJECT_ISTIO: &str = "sidecar.istio.io/inject";
/// `enabled` / `disabled` (Istio's namespace label).
pub const INJECTION_ISTIO: &str = "istio-injection";

/// Set on an injected pod: JSON that says what was added, by which `uninject` and a second injection know it.
pub const STATUS: &str = "weft.mesh/status";
/// Set on an injected pod: the containers that the user had put under our names, to be merged again.
pub const OVERRIDES: &str = "weft.mesh/overrides";
/// `true` / `false`: native sidecar for this pod, whatever the cluster's default.
pub const NATIVE_SIDECAR: &str = "weft.mesh/native-sidecar";
/// `true` / `false`: rewrite the app's probes (default true).
pub const REWRITE_PROBES: &str = "weft.mesh/rewrite-probes";
/// `true` / `false`: merge the app's Prometheus metrics into the proxy's scrape (default true).
pub const MERGE_METRICS: &str = "weft.mesh/merge-metrics";

/// Inbound ports to redirect: `*` or a list with ranges (default `*`).
pub const INBOUND_PORTS: &str = "weft.mesh/inbound-ports";
/// Inbound ports that go to the app directly.
pub const EXCLUDE_INBOUND_PORTS: &str = "weft.mesh/exclude-inbound-ports";
/// Outbound ports that are redirected whatever the CIDRs say.
pub const OUTBOUND_PORTS: &str = "weft.mesh/outbound-ports";
/// Outbound ports that leave directly.
pub const EXCLUDE_OUTBOUND_PORTS: &str = "weft.mesh/exclude-outbound-ports";
/// Outbound destinations to redirect: `*` or CIDRs (default `*`).
pub const OUTBOUND_CIDRS: &str = "weft.mesh/outbound-cidrs";
/// Outbound destinations that are left alone.
pub const EXCLUDE_OUTBOUND_CIDRS: &str = "weft.mesh/exclude-outbound-cidrs";
/// Network interfaces whose traffic is left alone.
pub const EXCLUDE_INTERFACES: &str = "weft.mesh/exclude-interfaces";
/// `true` / `false`: capture DNS (default false).
pub const DNS_CAPTURE: &str = "weft.mesh/dns-capture";
/// `true` / `false`: drop packets that conntrack calls INVALID (default true).
pub const DROP_INVALID: &str = "weft.mesh/drop-invalid";
/// `redirect` (default) or `tproxy`.
pub const INTERCEPTION_MODE: &str = "weft.mesh/interception-mode";
/// `auto` (default), `nft`, `legacy` or `nftables`.
pub const INIT_BACKEND: &str = "weft.mesh/init-backend";
/// Ports (ranges allowed) that carry opaque TCP: no detection.
pub const OPAQUE_PORTS: &str = "weft.mesh/opaque-ports";

/// CPU request of the proxy, a Kubernetes quantity.
pub const PROXY_CPU_REQUEST: &str = "weft.mesh/proxy-cpu-request";
/// CPU limit of the proxy.
pub const PROXY_CPU_LIMIT: &str = "weft.mesh/proxy-cpu-limit";
/// Memory request of the proxy.
pub const PROXY_MEMORY_REQUEST: &str = "weft.mesh/proxy-memory-request";
/// Memory limit of the proxy.
pub const PROXY_MEMORY_LIMIT: &str = "weft.mesh/proxy-memory-limit";
/// Log filter of the proxy (`error` … `trace`, or directives such as `info,weft_proxy::http=debug`).
pub const PROXY_LOG_LEVEL: &str = "weft.mesh/proxy-log-level";
/// Image of the proxy.
pub const PROXY_IMAGE: &str = "weft.mesh/proxy-image";
/// Seconds that the proxy may take to drain after SIGTERM.
pub const DRAIN_SECONDS: &str = "weft.mesh/drain-seconds";
