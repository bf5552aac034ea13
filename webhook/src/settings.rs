//! The settings of injection: one schema, delivered as data. `weft-control` reads them from the ConfigMap `weft-config`
//! (key `config.yaml`), `weft inject` from a file; both are strict, so that a misspelt key is an error where it was made
//! and not a default in silence.

mod mesh;

pub use mesh::{ExtensionProvider, GrpcAuthorizer, HttpAuthorizer, MeshSettings, Normalization, PathNormalization, RequestBody};

use crate::options::{Cidrs, Mode, PortSet, check_quantity};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use weft_api::names;

/// Settings of injection. Every field has a default; annotations of a pod or namespace go before them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Settings {
    /// Image of `weft-proxy` (it holds `weft-init` too).
    pub image: String,
    /// `imagePullPolicy` of both containers; absent: what Kubernetes makes of the image's tag.
    pub image_pull_policy: Option<PullPolicy>,
    /// Names of Secrets that are added to the pod's `imagePullSecrets`.
    pub image_pull_secrets: Vec<String>,
    /// Whether the proxy is a native sidecar (an init container that stays).
    pub native_sidecars: NativeSidecars,
    /// Namespace of the control plane: never injected, and where [`Settings::control_address`] points by default.
    pub control_namespace: String,
    /// `host:port` of the control plane's gRPC API; absent: `weft-control.<control namespace>.svc:15012`.
    pub control_address: Option<String>,
    /// Trust domain of identities.
    pub trust_domain: String,
    /// Name of the cluster, a label of metrics.
    pub cluster: String,
    /// Namespaces that are never injected, beside the control namespace.
    pub system_namespaces: Vec<String>,
    /// Where a pod finds the certificates that it trusts.
    pub trust_bundle: TrustBundle,
    /// The proxy container.
    pub proxy: ProxySettings,
    /// The init container.
    pub init: InitSettings,
    /// Which traffic is redirected.
    pub traffic: TrafficSettings,
    /// Send the kubelet's probes of app containers through the proxy.
    pub rewrite_probes: bool,
    /// Merge the app's metrics into the proxy's scrape where the pod asks to be scraped.
    pub merge_metrics: bool,
    /// Identity and policy of the whole mesh; injection does not depend on it.
    pub mesh: MeshSettings,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            image: format!("ghcr.io/weft-mesh/weft-proxy:{}", env!("CARGO_PKG_VERSION")),
            image_pull_policy: None,
            image_pull_secrets: Vec::new(),
            native_sidecars: NativeSidecars::Auto,
            control_namespace: names::CONTROL_NAMESPACE.into(),
            control_address: None,
            trust_domain: names::TRUST_DOMAIN.into(),
            cluster: "Kubernetes".into(),
            system_namespaces: names::SYSTEM_NAMESPACES.map(String::from).into(),
            trust_bundle: TrustBundle::default(),
            proxy: ProxySettings::default(),
            init: InitSettings::default(),
            traffic: TrafficSettings::default(),
            rewrite_probes: true,
            merge_metrics: true,
            mesh: MeshSettings::default(),
        }
    }
}

impl Settings {
    /// Reads settings from YAML and checks them.
    ///
    /// # Errors
    /// YAML that can't be read (with its position), an unknown key, or a value that is not allowed.
    pub fn from_yaml(text: &str) -> Result<Self, SettingsError> {
        let settings: Self = if text.trim().is_empty() {
            Self::default()
        } else {
            serde_saphyr::from_str(text).map_err(|e| SettingsError(e.to_string()))?
        };
        settings.check()?;
        Ok(settings)
    }

    /// Checks the values that the types alone leave open.
    ///
    /// # Errors
    /// The first value that is not allowed, with its key.
    pub fn check(&self) -> Result<(), SettingsError> {
        if self.image.is_empty() || self.image.contains(char::is_whitespace) {
            return Err(SettingsError(format!("image: {:?} is no image reference", self.image)));
        }
        for (key, value) in [("controlNamespace", &self.control_namespace), ("trustDomain", &self.trust_domain)] {
            if value.is_empty() {
                return Err(SettingsError(format!("{key}: must not be empty")));
            }
        }
        for (owner, resources) in [("proxy", &self.proxy.resources), ("init", &self.init.resources)] {
            for (kind, list) in [("requests", &resources.requests), ("limits", &resources.limits)] {
                for (name, quantity) in list {
                    check_quantity(quantity).map_err(|allowed| {
                        SettingsError(format!("{owner}.resources.{kind}.{name}: {quantity:?} is not {allowed}"))
                    })?;
                }
            }
        }
        let ports = [
            ("traffic.inboundPorts", &self.traffic.inbound_ports, true),
            ("traffic.excludeInboundPorts", &self.traffic.exclude_inbound_ports, false),
            ("traffic.outboundPorts", &self.traffic.outbound_ports, false),
            ("traffic.excludeOutboundPorts", &self.traffic.exclude_outbound_ports, false),
            ("traffic.opaquePorts", &self.traffic.opaque_ports, false),
        ];
        for (key, value, star) in ports {
            PortSet::parse(value, star).map_err(|allowed| SettingsError(format!("{key}: {value:?} is not {allowed}")))?;
        }
        let cidrs = [
            ("traffic.outboundCidrs", &self.traffic.outbound_cidrs, true),
            ("traffic.excludeOutboundCidrs", &self.traffic.exclude_outbound_cidrs, false),
        ];
        for (key, value, star) in cidrs {
            Cidrs::parse(value, star).map_err(|allowed| SettingsError(format!("{key}: {value:?} is not {allowed}")))?;
        }
        self.mesh.check()
    }

    /// `host:port` of the control plane's gRPC API.
    pub fn control_address(&self) -> String {
        self.control_address
            .clone()
            .unwrap_or_else(|| format!("{}.{}.svc:{}", names::CONTROL, self.control_namespace, names::CONTROL_PORT))
    }

    /// Whether pods of this namespace are never injected.
    pub fn is_system_namespace(&self, namespace: &str) -> bool {
        namespace == self.control_namespace || self.system_namespaces.iter().any(|n| n == namespace)
    }
}

/// Settings that can't be used; the message names the key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SettingsError(pub String);

/// `imagePullPolicy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PullPolicy {
    /// Ask the registry each time.
    Always,
    /// Only when the node lacks the image.
    IfNotPresent,
    /// Never: the image must be on the node.
    Never,
}

impl PullPolicy {
    /// As Kubernetes spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Always => "Always",
            Self::IfNotPresent => "IfNotPresent",
            Self::Never => "Never",
        }
    }
}

/// Whether proxies are native sidecars.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum NativeSidecars {
    /// Where the API server is 1.29 or newer.
    #[default]
    Auto,
    /// Always.
    Enabled,
    /// Never.
    Disabled,
}

/// Where a pod finds the certificates that it trusts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct TrustBundle {
    /// Name of the ConfigMap (key `root.pem`) that the control plane keeps in every namespace with meshed pods.
    pub config_map: String,
    /// Name of a ClusterTrustBundle to project in place of the ConfigMap (Kubernetes 1.33, behind a feature gate there).
    pub cluster_trust_bundle: Option<String>,
}

impl Default for TrustBundle {
    fn default() -> Self {
        Self { config_map: names::TRUST_BUNDLE_CONFIGMAP.into(), cluster_trust_bundle: None }
    }
}

/// Resource requests and limits, by resource name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Resources {
    /// What the scheduler sets aside.
    pub requests: BTreeMap<String, String>,
    /// What the container may use at most.
    pub limits: BTreeMap<String, String>,
}

impl Resources {
    fn small() -> Self {
        Self {
            requests: BTreeMap::from([("cpu".into(), "10m".into()), ("memory".into(), "20Mi".into())]),
            limits: BTreeMap::new(),
        }
    }
}

/// The proxy container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ProxySettings {
    /// Requests (10m CPU, 20Mi memory by default) and limits (none by default).
    pub resources: Resources,
    /// Log filter.
    pub log_level: String,
    /// `text` or `json`.
    pub log_format: LogFormat,
    /// Seconds that a drain may take after SIGTERM; absent: the proxy's own default, 25.
    pub drain_seconds: Option<u32>,
    /// Further environment variables of the proxy.
    pub env: BTreeMap<String, String>,
}

impl Default for ProxySettings {
    fn default() -> Self {
        Self {
            resources: Resources::small(),
            log_level: "warn,weft_proxy=info".into(),
            log_format: LogFormat::Text,
            drain_seconds: None,
            env: BTreeMap::new(),
        }
    }
}

/// How the proxy writes its log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// The init container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct InitSettings {
    /// Requests (as small as the proxy's) and limits.
    pub resources: Resources,
    /// Which firewall tool applies the rules.
    pub backend: Backend,
    /// Do not prove the redirection after applying it.
    pub skip_verify: bool,
}

impl Default for InitSettings {
    fn default() -> Self {
        Self { resources: Resources::small(), backend: Backend::Auto, skip_verify: false }
    }
}

/// Which firewall tool applies the redirection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Backend {
    /// What the kernel supports.
    #[default]
    Auto,
    /// `iptables-nft`.
    Nft,
    /// `iptables-legacy`; the init container then gets `NET_RAW` too.
    Legacy,
    /// Native nftables.
    Nftables,
}

impl Backend {
    /// As the flag of `weft-init` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Nft => "nft",
            Self::Legacy => "legacy",
            Self::Nftables => "nftables",
        }
    }

    /// Reads it.
    ///
    /// # Errors
    /// What is allowed.
    pub fn parse(text: &str) -> Result<Self, crate::options::Allowed> {
        [Self::Auto, Self::Nft, Self::Legacy, Self::Nftables]
            .into_iter()
            .find(|b| text.eq_ignore_ascii_case(b.as_str()))
            .ok_or("one of `auto`, `nft`, `legacy`, `nftables`")
    }
}

/// Which traffic is redirected. Lists are comma-separated, ports may be ranges.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct TrafficSettings {
    /// `*` or ports.
    pub inbound_ports: String,
    /// Ports that go to the app directly (15020 always does).
    pub exclude_inbound_ports: String,
    /// Ports that are redirected whatever the CIDRs say.
    pub outbound_ports: String,
    /// Ports that leave directly.
    pub exclude_outbound_ports: String,
    /// `*` or CIDRs.
    pub outbound_cidrs: String,
    /// CIDRs that are left alone.
    pub exclude_outbound_cidrs: String,
    /// Ports that carry opaque TCP.
    pub opaque_ports: String,
    /// Capture DNS.
    pub dns_capture: bool,
    /// Drop packets that conntrack calls INVALID.
    pub drop_invalid: bool,
    /// How inbound connections reach the proxy.
    pub mode: Mode,
}

impl Default for TrafficSettings {
    fn default() -> Self {
        Self {
            inbound_ports: "*".into(),
            exclude_inbound_ports: String::new(),
            outbound_ports: String::new(),
            exclude_outbound_ports: String::new(),
            outbound_cidrs: "*".into(),
            exclude_outbound_cidrs: String::new(),
            opaque_ports: String::new(),
            dns_capture: false,
            drop_invalid: true,
            mode: Mode::Redirect,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_text_is_the_default() {
        assert_eq!(Settings::from_yaml("").unwrap(), Settings::default());
        assert_eq!(Settings::from_yaml("{}").unwrap(), Settings::default());
        Settings::default().check().unwrap();
    }

    #[test]
    fn yaml_is_read_and_written() {
        let settings = Settings::from_yaml(
            "image: registry.local/weft-proxy:dev\nnativeSidecars: disabled\nimagePullPolicy: Never\n\
             proxy:\n  resources:\n    limits: {cpu: 500m}\n  logFormat: json\ninit:\n  backend: nft\n\
             traffic:\n  excludeOutboundPorts: 3306,9300-9310\n  mode: tproxy\n",
        )
        .unwrap();
        assert_eq!(settings.native_sidecars, NativeSidecars::Disabled);
        assert_eq!(settings.proxy.resources.limits["cpu"], "500m");
        assert_eq!(settings.traffic.mode, Mode::Tproxy);
        let again = Settings::from_yaml(&serde_json::to_string(&settings).unwrap()).unwrap();
        assert_eq!(again, settings);
    }

    #[test]
    fn mistakes_name_their_key() {
        for (text, key) in [
            ("imgae: x", "imgae"),
            ("image: ''", "image"),
            ("traffic: {excludeInboundPorts: '0'}", "traffic.excludeInboundPorts"),
            ("traffic: {excludeOutboundCidrs: '*'}", "traffic.excludeOutboundCidrs"),
            ("proxy: {resources: {limits: {cpu: lots}}}", "proxy.resources.limits.cpu"),
            ("init: {backend: ebpf}", "ebpf"),
            ("controlNamespace: ''", "controlNamespace"),
        ] {
            let error = Settings::from_yaml(text).unwrap_err().to_string();
            assert!(error.contains(key), "{text}: {error}");
        }
    }

    #[test]
    fn control_address_follows_the_namespace() {
        let mut settings = Settings { control_namespace: "mesh".into(), ..Settings::default() };
        assert_eq!(settings.control_address(), "weft-control.mesh.svc:15012");
        assert!(settings.is_system_namespace("mesh") && settings.is_system_namespace("kube-system"));
        settings.control_address = Some("10.0.0.1:1".into());
        assert_eq!(settings.control_address(), "10.0.0.1:1");
    }
}
