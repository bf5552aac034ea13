//! The command line.

use crate::ca::keeper::{Plan, UserSecret};
use crate::serve::limits::Bounds;
use clap::{Parser, ValueEnum};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;
use weft_api::names;

/// The control plane of Weft: serves the injection webhook (HTTPS), tells proxies their configuration (gRPC over TLS), keeps
/// certificates, caBundle and trust bundles right.
#[derive(Clone, Debug, Parser)]
#[command(name = "weft-control", version)]
pub struct Flags {
    /// Namespace of the control plane. Default: that of this pod, else weft-system.
    #[arg(long, env = "WEFT_NAMESPACE")]
    pub namespace: Option<String>,
    /// Name of the Service in front of the control plane; the serving certificate bears it.
    #[arg(long, default_value = names::CONTROL)]
    pub service: String,
    /// Image of weft-proxy where the settings name none.
    #[arg(long, env = "WEFT_IMAGE_PROXY")]
    pub image_proxy: Option<String>,
    /// Settings of injection (YAML), read again whenever they change. Need not exist.
    #[arg(long, default_value = "/etc/weft/config.yaml", value_name = "FILE")]
    pub config: PathBuf,
    /// Read objects from the YAML files of this folder in place of a cluster.
    #[arg(long, value_name = "DIR")]
    pub manifests: Option<PathBuf>,
    /// With --manifests: folder of the root and serving certificate. Default: a new root, in memory, with every start.
    #[arg(long, value_name = "DIR", requires = "manifests")]
    pub state_dir: Option<PathBuf>,
    /// With --manifests: file of the tokens by which proxies prove who they are, a line `TOKEN NAMESPACE/POD[/SERVICEACCOUNT]`
    /// each. Without it any local process may ask, and nobody else.
    #[arg(long, value_name = "FILE", requires = "manifests")]
    pub tokens: Option<PathBuf>,
    /// With --manifests: write the root certificate (PEM) that proxies must trust into this file.
    #[arg(long, value_name = "FILE", requires = "manifests")]
    pub trust_bundle_out: Option<PathBuf>,
    /// Kubeconfig. Default: the service account of this pod, or what kubectl would use.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Address to listen on. Default: all; with --manifests and no --tokens, 127.0.0.1.
    #[arg(long, value_name = "IP")]
    pub bind: Option<IpAddr>,
    /// Port of the webhook (HTTPS).
    #[arg(long, default_value_t = names::WEBHOOK_PORT)]
    pub webhook_port: u16,
    /// Port of the proxies' API (gRPC over TLS).
    #[arg(long, default_value_t = names::CONTROL_PORT)]
    pub control_port: u16,
    /// Port of /metrics, /healthz/live and /healthz/ready (HTTP).
    #[arg(long, default_value_t = names::CONTROL_METRICS_PORT)]
    pub metrics_port: u16,
    /// Port of the console (HTTP on loopback only, whatever --bind says), which the `weft` command asks through a port-forward.
    #[arg(long, default_value_t = names::CONSOLE_PORT)]
    pub console_port: u16,
    /// Further DNS name or IP address of the serving certificate; may be repeated.
    #[arg(long, value_name = "NAME")]
    pub san: Vec<String>,
    /// Domain of the cluster's Services.
    #[arg(long, default_value = names::CLUSTER_DOMAIN)]
    pub cluster_domain: String,
    /// Life of the serving certificate in seconds; it is renewed at two thirds of it.
    #[arg(long, default_value_t = crate::ca::issue::SERVING_LIFE.as_secs(), value_name = "SECONDS")]
    pub serving_life: u64,
    /// Life of workload certificates in seconds; proxies renew them at half of it, and get no longer one.
    #[arg(long, default_value_t = names::LEAF_LIFE_SECONDS, value_name = "SECONDS")]
    pub leaf_life: u64,
    /// Secret (in the control namespace) with your own certificate authority, as Istio's `cacerts` or as cert-manager writes it.
    /// Default: `cacerts` if it is there, else a root that the control plane makes.
    #[arg(long, value_name = "NAME", conflicts_with = "manifests")]
    pub ca_secret: Option<String>,
    /// Seconds for which a new root is made known to everybody before certificates are signed below it. Kubelets take up to two minutes
    /// to bring a changed ConfigMap into pods.
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    pub rotation_delay: u64,
    /// Streams of proxies that one address may have open. Many proxies share one where pods are behind a gateway.
    #[arg(long, default_value_t = Bounds::default().streams_per_address, value_name = "COUNT")]
    pub max_streams_per_address: usize,
    /// Streams of proxies that may be open in all.
    #[arg(long, default_value_t = Bounds::default().streams, value_name = "COUNT")]
    pub max_streams: usize,
    /// Seconds to go on serving after SIGTERM, not ready any more, until nobody calls us: load balancers take a moment.
    #[arg(long, default_value_t = 5, value_name = "SECONDS")]
    pub shutdown_delay: u64,
    /// Seconds that calls under way may then take.
    #[arg(long, default_value_t = 15, value_name = "SECONDS")]
    pub shutdown_grace: u64,
    /// Log filter: error, warn, info, debug, trace, or directives such as `info,weft_control::ca=debug`.
    #[arg(long, env = "WEFT_LOG", default_value = "info", value_name = "FILTER")]
    pub log_level: String,
    /// How to write the log.
    #[arg(long, env = "WEFT_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Name of this replica in the election. Default: the pod's name.
    #[arg(long, env = "POD_NAME", value_name = "NAME")]
    pub identity: Option<String>,
}

/// How to write the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Where a pod finds its own namespace.
const OWN_NAMESPACE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/namespace";

impl Flags {
    /// The control namespace.
    pub fn namespace(&self) -> String {
        let own = || std::fs::read_to_string(OWN_NAMESPACE).ok().map(|s| s.trim().to_owned()).filter(|s| !s.is_empty());
        self.namespace.clone().or_else(own).unwrap_or_else(|| names::CONTROL_NAMESPACE.into())
    }

    /// The address to listen on.
    pub fn bind(&self) -> IpAddr {
        let local_only = self.manifests.is_some() && self.tokens.is_none();
        let default = if local_only {
            IpAddr::from([127, 0, 0, 1])
        } else if std::path::Path::new("/proc/net/if_inet6").exists() {
            // Takes IPv4 too.
            IpAddr::from([0u16; 8])
        } else {
            IpAddr::from([0, 0, 0, 0])
        };
        self.bind.unwrap_or(default)
    }

    /// All names of the serving certificate.
    pub fn serving_names(&self) -> Vec<String> {
        let mut names = crate::ca::issue::serving_names(&self.service, &self.namespace(), &self.cluster_domain);
        names.extend(self.san.iter().cloned());
        names
    }

    /// Life of the serving certificate.
    pub fn serving_life(&self) -> Duration {
        Duration::from_secs(self.serving_life.max(1))
    }

    /// Longest life of a workload's certificate.
    pub fn leaf_life(&self) -> Duration {
        Duration::from_secs(self.leaf_life.max(1))
    }

    /// How certificates are made.
    pub fn plan(&self) -> Plan {
        let secret = match &self.ca_secret {
            _ if self.manifests.is_some() => UserSecret::None,
            Some(name) if !name.is_empty() => UserSecret::Named(name.clone()),
            _ => UserSecret::Default,
        };
        Plan {
            names: self.serving_names(),
            life: self.serving_life(),
            leaf_life: self.leaf_life(),
            delay: Duration::from_secs(self.rotation_delay),
            secret,
        }
    }

    /// What one source may take.
    pub fn bounds(&self) -> Bounds {
        Bounds { streams_per_address: self.max_streams_per_address, streams: self.max_streams, ..Bounds::default() }
    }

    /// Name of this replica for people: its pod.
    pub fn replica(&self) -> String {
        self.identity.clone().or_else(|| std::env::var("HOSTNAME").ok()).unwrap_or_else(|| names::CONTROL.into())
    }

    /// Name of this replica, unique among them.
    pub fn identity(&self) -> String {
        let name = self.replica();
        // A container that restarts keeps its pod's name and must not be taken for the one that died.
        format!("{name}_{:08x}", rand::random::<u32>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(args: &[&str]) -> Flags {
        Flags::try_parse_from(["weft-control"].iter().chain(args)).unwrap()
    }

    #[test]
    fn the_command_line_is_sound() {
        <Flags as clap::CommandFactory>::command().debug_assert();
        assert!(Flags::try_parse_from(["weft-control", "--tokens", "x"]).is_err(), "only with --manifests");
    }

    #[test]
    fn without_tokens_it_listens_locally() {
        assert!(flags(&["--manifests", "d"]).bind().is_loopback());
        assert!(flags(&["--manifests", "d", "--tokens", "t"]).bind().is_unspecified());
        assert!(flags(&[]).bind().is_unspecified());
        assert_eq!(flags(&["--bind", "10.0.0.1"]).bind(), IpAddr::from([10, 0, 0, 1]));
    }

    #[test]
    fn names_of_the_certificate() {
        let names = flags(&["--namespace", "mesh", "--san", "10.0.0.1"]).serving_names();
        assert_eq!(
            names,
            ["weft-control.mesh.svc", "weft-control.mesh.svc.cluster.local", "weft-control.mesh", "localhost", "10.0.0.1"]
        );
    }
}
