//! Names and numbers, the same as Istio's where a user would expect it, so that existing network policies, dashboards
//! and habits carry over.

/// Port on which the proxy takes the app's outgoing connections.
pub const OUTBOUND_PORT: u16 = 15001;
/// Port on which the proxy takes connections that come in for the app.
pub const INBOUND_PORT: u16 = 15006;
/// Port of metrics, readiness, rewritten probes and the rest of the proxy's administration.
pub const ADMIN_PORT: u16 = 15020;
/// Port on which captured DNS queries arrive.
pub const DNS_PORT: u16 = 15053;
/// Ports of the proxy that an app container must not use.
pub const PROXY_PORTS: [u16; 4] = [OUTBOUND_PORT, INBOUND_PORT, ADMIN_PORT, DNS_PORT];

/// Port on which `weft-control` serves admission webhooks over HTTPS.
pub const WEBHOOK_PORT: u16 = 15017;
/// Port of the Service in front of [`WEBHOOK_PORT`].
pub const WEBHOOK_SERVICE_PORT: u16 = 443;
/// Port on which `weft-control` serves the gRPC API over TLS.
pub const CONTROL_PORT: u16 = 15012;
/// Port of the control plane's metrics and health (plain HTTP: `/metrics`, `/healthz/live`, `/healthz/ready`).
pub const CONTROL_METRICS_PORT: u16 = 15014;
/// Port of the console, by which the `weft` command asks the control plane: plain HTTP on loopback only, reached by port-forward,
/// so that Kubernetes decides who may (RBAC on `pods/portforward` in the control plane's namespace).
pub const CONSOLE_PORT: u16 = 15019;

/// ALPN names by which the proxies of a mesh know each other's TLS from the app's own. With the first the client has not told the protocol
/// (yet): it is told from the bytes inside. The server believes a client's word only where its own port declares nothing.
pub const ALPN_DETECT: &[u8] = b"weft";
/// See [`ALPN_DETECT`]: opaque bytes.
pub const ALPN_TCP: &[u8] = b"weft-tcp";
/// See [`ALPN_DETECT`]: HTTP/1.x.
pub const ALPN_HTTP1: &[u8] = b"weft-http/1.1";
/// See [`ALPN_DETECT`]: HTTP/2.
pub const ALPN_HTTP2: &[u8] = b"weft-h2";
/// All of them.
pub const MESH_ALPNS: [&[u8]; 4] = [ALPN_DETECT, ALPN_TCP, ALPN_HTTP1, ALPN_HTTP2];

/// User and group that the proxy runs as; the redirection exempts their traffic.
pub const PROXY_UID: u32 = 1337;
/// See [`PROXY_UID`].
pub const PROXY_GID: u32 = 1337;
/// Source address of the proxy's connections to its own app, which the redirection leaves alone.
pub const PASSTHROUGH_V4: std::net::Ipv4Addr = std::net::Ipv4Addr::new(127, 0, 0, 6);
/// As [`PASSTHROUGH_V4`]; `weft-init` adds it to `lo`.
pub const PASSTHROUGH_V6: std::net::Ipv6Addr = std::net::Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6);

/// Name of the sidecar container.
pub const PROXY_CONTAINER: &str = "weft-proxy";
/// Name of the init container that redirects the pod's traffic.
pub const INIT_CONTAINER: &str = "weft-init";

/// Namespace of the control plane unless the user chose another.
pub const CONTROL_NAMESPACE: &str = "weft-system";
/// Name of the control plane's Deployment, Service and service account.
pub const CONTROL: &str = "weft-control";
/// Name of the control plane's mutating webhook configuration.
pub const WEBHOOK_CONFIGURATION: &str = "weft-injector";
/// Name of the configuration by which the control plane validates policies.
pub const VALIDATOR_CONFIGURATION: &str = "weft-validator";
/// Secret (in the control namespace, `kubernetes.io/tls` with an extra `ca.crt`) with the control plane's CA.
pub const CA_SECRET: &str = "weft-ca";
/// Secret by which a user brings his own CA, as Istio's users do: `ca-cert.pem`, `ca-key.pem`, `root-cert.pem`, `cert-chain.pem`, or
/// the keys of a `kubernetes.io/tls` Secret (`tls.crt`, `tls.key`, `ca.crt`), as cert-manager writes them. Goes before [`CA_SECRET`].
pub const USER_CA_SECRET: &str = "cacerts";
/// Annotation of the CA Secret by which `weft identity rotate` asks for new leaves (its value: RFC 3339 time of the request).
pub const RENEW_ANNOTATION: &str = "weft.mesh/renew-before";
/// Annotation of [`CA_SECRET`] by which `weft identity rotate --root` asks for a new root (its value: RFC 3339 time of the request).
pub const ROTATE_ROOT_ANNOTATION: &str = "weft.mesh/rotate-root";
/// Secret with the control plane's serving certificate.
pub const SERVING_SECRET: &str = "weft-control-serving";
/// Lease by which replicas of the control plane agree on who writes.
pub const LEASE: &str = "weft-control";
/// ConfigMap in every namespace with meshed pods that holds the trust bundle.
pub const TRUST_BUNDLE_CONFIGMAP: &str = "weft-trust-bundle";
/// Key of the PEM bundle in [`TRUST_BUNDLE_CONFIGMAP`].
pub const TRUST_BUNDLE_KEY: &str = "root.pem";

/// Directory in the proxy container with the projected token and the trust bundle.
pub const PROXY_SECRETS_DIR: &str = "/var/run/secrets/weft";
/// The projected service account token: audience [`TOKEN_AUDIENCE`].
pub const TOKEN_PATH: &str = "/var/run/secrets/weft/token";
/// The trust bundle (PEM).
pub const TRUST_BUNDLE_PATH: &str = "/var/run/secrets/weft/root.pem";
/// Audience of the token by which a proxy proves who it is.
pub const TOKEN_AUDIENCE: &str = "weft";
/// Directory with the downward API's `labels` and `annotations` files.
pub const POD_INFO_DIR: &str = "/etc/weft/pod";

/// Trust domain unless the user chose another.
pub const TRUST_DOMAIN: &str = "cluster.local";
/// How long a workload's certificate lives, in seconds: 24 h.
pub const LEAF_LIFE_SECONDS: u64 = 24 * 3600;
/// How long before the moment of its issue a workload's certificate begins to be valid, in seconds: what clocks may differ by.
/// (The moment of issue is thus its `notBefore` plus this.)
pub const LEAF_BACKDATE_SECONDS: u64 = 600;
/// Domain of the cluster's Services.
pub const CLUSTER_DOMAIN: &str = "cluster.local";

/// Namespaces whose pods are never injected (the control namespace is one more).
pub const SYSTEM_NAMESPACES: [&str; 3] = ["kube-system", "kube-public", "kube-node-lease"];

/// The SPIFFE identity of a service account.
pub fn spiffe_id(trust_domain: &str, namespace: &str, service_account: &str) -> String {
    format!("spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}")
}
