//! The containers and volumes that a pod gets, as typed values: a quote in an annotation can't break anything.
//!
//! The proxy runs as 1337:1337 with no capability, no way to more privileges, a read-only root file system and the runtime's
//! seccomp profile. The init container runs as root with `NET_ADMIN` alone, which the kernel demands for firewall rules, and
//! `NET_RAW` where iptables-legacy needs it. (With TPROXY the proxy needs root and `NET_ADMIN` too, to listen
//! transparently; it is exempt from redirection by its group then.)

use crate::options::{Mode, Options};
use crate::settings::{Backend, LogFormat, Resources, Settings};
use k8s_openapi::api::core::v1::{
    Capabilities, ClusterTrustBundleProjection, ConfigMapProjection, Container, DownwardAPIVolumeFile, DownwardAPIVolumeSource,
    EnvVar, EnvVarSource, ExecAction, HTTPGetAction, KeyToPath, Lifecycle, LifecycleHandler, ObjectFieldSelector, Probe,
    ProjectedVolumeSource, ResourceFieldSelector, ResourceRequirements, SeccompProfile, SecurityContext,
    ServiceAccountTokenProjection, Volume, VolumeMount, VolumeProjection,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::collections::BTreeMap;
use weft_api::probe::{AppMetrics, Probes};
use weft_api::{env, names};

/// Name of the volume with the token and the trust bundle.
pub const SECRETS_VOLUME: &str = "weft-secrets";
/// Name of the volume with the pod's labels and annotations.
pub const POD_INFO_VOLUME: &str = "weft-pod-info";

/// Seconds that the token is good for; the kubelet renews it at 80 % of that.
const TOKEN_SECONDS: i64 = 3600;
/// How long, in seconds, the proxy may take to be ready before the kubelet gives up: it needs a tenth of one.
const STARTUP_SECONDS: i32 = 120;

/// What the sidecar of one pod must know about it.
#[derive(Debug)]
pub struct PodFacts<'a> {
    /// `Kind/name` of the workload.
    pub workload: String,
    /// The app's probes.
    pub probes: &'a Probes,
    /// The app's own metrics.
    pub metrics: Option<&'a AppMetrics>,
}

/// The user and group that the proxy runs as, for the redirection's exemption.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunAs {
    /// User.
    pub uid: i64,
    /// Group.
    pub gid: i64,
}

/// The proxy container.
pub fn proxy(options: &Options, settings: &Settings, facts: &PodFacts<'_>) -> Container {
    let transparent = options.mode == Mode::Tproxy;
    let get = HTTPGetAction {
        path: Some("/healthz/ready".into()),
        port: IntOrString::Int(names::ADMIN_PORT.into()),
        scheme: Some("HTTP".into()),
        ..HTTPGetAction::default()
    };
    let probe = |period: i32, threshold: i32| Probe {
        http_get: Some(get.clone()),
        period_seconds: Some(period),
        timeout_seconds: Some(3),
        failure_threshold: Some(threshold),
        ..Probe::default()
    };
    // Without native sidecars nothing but a postStart hook keeps the app from starting on a dead network.
    let wait = Lifecycle {
        post_start: Some(LifecycleHandler {
            exec: Some(ExecAction {
                command: Some(vec!["weft-proxy".into(), "wait".into(), format!("--timeout={STARTUP_SECONDS}s")]),
            }),
            ..LifecycleHandler::default()
        }),
        ..Lifecycle::default()
    };
    Container {
        name: names::PROXY_CONTAINER.into(),
        image: Some(options.image.clone()),
        image_pull_policy: settings.image_pull_policy.map(|p| p.as_str().into()),
        env: Some(proxy_env(options, settings, facts)),
        lifecycle: (!options.native).then_some(wait),
        startup_probe: Some(probe(1, STARTUP_SECONDS)),
        readiness_probe: Some(probe(10, 3)),
        resources: requirements(&options.resources),
        restart_policy: options.native.then(|| "Always".into()),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            privileged: Some(false),
            capabilities: Some(Capabilities {
                add: transparent.then(|| vec!["NET_ADMIN".into()]),
                drop: Some(vec!["ALL".into()]),
            }),
            read_only_root_filesystem: Some(true),
            run_as_non_root: Some(!transparent),
            run_as_user: Some(if transparent { 0 } else { names::PROXY_UID.into() }),
            run_as_group: Some(names::PROXY_GID.into()),
            seccomp_profile: Some(seccomp()),
            ..SecurityContext::default()
        }),
        termination_message_policy: Some("FallbackToLogsOnError".into()),
        volume_mounts: Some(vec![mount(SECRETS_VOLUME, names::PROXY_SECRETS_DIR), mount(POD_INFO_VOLUME, names::POD_INFO_DIR)]),
        ..Container::default()
    }
}

/// The init container, for a proxy that runs as this user and group.
pub fn init(options: &Options, settings: &Settings, run_as: RunAs) -> Container {
    let raw = (options.backend == Backend::Legacy).then(|| "NET_RAW".to_owned());
    Container {
        name: names::INIT_CONTAINER.into(),
        image: Some(options.image.clone()),
        image_pull_policy: settings.image_pull_policy.map(|p| p.as_str().into()),
        command: Some(vec!["weft-init".into()]),
        args: Some(init_args(options, settings, run_as)),
        resources: requirements(&settings.init.resources),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            privileged: Some(false),
            capabilities: Some(Capabilities {
                add: Some(std::iter::once("NET_ADMIN".to_owned()).chain(raw).collect()),
                drop: Some(vec!["ALL".into()]),
            }),
            read_only_root_filesystem: Some(true),
            run_as_non_root: Some(false),
            run_as_user: Some(0),
            run_as_group: Some(0),
            seccomp_profile: Some(seccomp()),
            ..SecurityContext::default()
        }),
        termination_message_policy: Some("FallbackToLogsOnError".into()),
        ..Container::default()
    }
}

fn init_args(options: &Options, settings: &Settings, run_as: RunAs) -> Vec<String> {
    let admin = options.exclude_inbound_ports.clone().with(names::ADMIN_PORT);
    let mut args = vec![
        format!("--outbound-port={}", names::OUTBOUND_PORT),
        format!("--inbound-port={}", names::INBOUND_PORT),
        format!("--proxy-uid={}", run_as.uid),
        format!("--proxy-gid={}", run_as.gid),
        format!("--inbound-ports={}", options.inbound_ports),
        format!("--exclude-inbound-ports={admin}"),
        format!("--outbound-cidrs={}", options.outbound_cidrs),
    ];
    let mut some = |flag: &str, value: String| {
        if !value.is_empty() {
            args.push(format!("--{flag}={value}"));
        }
    };
    some("outbound-ports", options.outbound_ports.to_string());
    some("exclude-outbound-ports", options.exclude_outbound_ports.to_string());
    some("exclude-outbound-cidrs", options.exclude_outbound_cidrs.to_string());
    some("exclude-interfaces", options.exclude_interfaces.join(","));
    if options.dns_capture {
        args.push("--dns-capture=true".into());
    }
    if !options.drop_invalid {
        args.push("--drop-invalid=false".into());
    }
    if options.mode != Mode::Redirect {
        args.push(format!("--mode={}", options.mode.as_str()));
    }
    if options.backend != Backend::Auto {
        args.push(format!("--backend={}", options.backend.as_str()));
    }
    if settings.init.skip_verify {
        args.push("--skip-verify".into());
    }
    args
}

fn proxy_env(options: &Options, settings: &Settings, facts: &PodFacts<'_>) -> Vec<EnvVar> {
    let value = |name: &str, value: String| EnvVar { name: name.into(), value: Some(value), value_from: None };
    let field = |name: &str, path: &str| EnvVar {
        name: name.into(),
        value: None,
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector { api_version: Some("v1".into()), field_path: path.into() }),
            ..EnvVarSource::default()
        }),
    };
    let mut all = vec![
        field(env::POD_NAME, "metadata.name"),
        field(env::POD_NAMESPACE, "metadata.namespace"),
        field(env::POD_IPS, "status.podIPs"),
        field(env::NODE_NAME, "spec.nodeName"),
        field(env::SERVICE_ACCOUNT, "spec.serviceAccountName"),
        value(env::WORKLOAD, facts.workload.clone()),
        value(env::CONTROL_ADDRESS, settings.control_address()),
        value(env::TRUST_DOMAIN, settings.trust_domain.clone()),
        value(env::CLUSTER, settings.cluster.clone()),
        value(env::LOG, options.log_level.clone()),
    ];
    if settings.proxy.log_format == LogFormat::Json {
        all.push(value(env::LOG_FORMAT, "json".into()));
    }
    if options.resources.limits.contains_key("cpu") {
        all.push(EnvVar {
            name: env::CPU_LIMIT_MILLIS.into(),
            value: None,
            value_from: Some(EnvVarSource {
                resource_field_ref: Some(ResourceFieldSelector {
                    container_name: Some(names::PROXY_CONTAINER.into()),
                    resource: "limits.cpu".into(),
                    divisor: Some(Quantity("1m".into())),
                }),
                ..EnvVarSource::default()
            }),
        });
    }
    if let Some(seconds) = options.drain_seconds {
        all.push(value(env::DRAIN_SECONDS, seconds.to_string()));
    }
    if !options.opaque_ports.is_empty() {
        all.push(value(env::OPAQUE_PORTS, options.opaque_ports.to_string()));
    }
    if options.mode != Mode::Redirect {
        all.push(value(env::MODE, options.mode.as_str().into()));
    }
    if options.dns_capture {
        all.push(value(env::DNS_CAPTURE, "true".into()));
    }
    if !facts.probes.is_empty() {
        all.push(value(env::PROBES, probes_json(facts.probes)));
    }
    if let Some(metrics) = facts.metrics {
        all.push(value(env::APP_METRICS, serde_json::to_string(metrics).unwrap_or_default()));
    }
    all.extend(settings.proxy.env.iter().map(|(name, v)| value(name, v.clone())));
    // A later value of the same name would only shadow: the user's settings replace ours.
    let mut seen = BTreeMap::new();
    for (i, var) in all.iter().enumerate() {
        seen.insert(var.name.clone(), i);
    }
    let mut i = 0;
    all.retain(|var| {
        i += 1;
        seen.get(&var.name) == Some(&(i - 1))
    });
    all
}

/// The value of `WEFT_PROBES`. Kubernetes expands `$(NAME)` in values; a doubled `$` keeps it from that.
pub fn probes_json(probes: &Probes) -> String {
    serde_json::to_string(probes).unwrap_or_default().replace("$(", "$$(")
}

/// Reads back what [`probes_json`] wrote.
pub fn read_probes(text: &str) -> Option<Probes> {
    serde_json::from_str(&text.replace("$$(", "$(")).ok()
}

/// The volumes of the sidecar.
pub fn volumes(settings: &Settings) -> Vec<Volume> {
    let token = VolumeProjection {
        service_account_token: Some(ServiceAccountTokenProjection {
            audience: Some(names::TOKEN_AUDIENCE.into()),
            expiration_seconds: Some(TOKEN_SECONDS),
            path: "token".into(),
        }),
        ..VolumeProjection::default()
    };
    let bundle = match &settings.trust_bundle.cluster_trust_bundle {
        Some(name) => VolumeProjection {
            cluster_trust_bundle: Some(ClusterTrustBundleProjection {
                name: Some(name.clone()),
                path: names::TRUST_BUNDLE_KEY.into(),
                ..ClusterTrustBundleProjection::default()
            }),
            ..VolumeProjection::default()
        },
        None => VolumeProjection {
            config_map: Some(ConfigMapProjection {
                name: settings.trust_bundle.config_map.clone(),
                items: Some(vec![KeyToPath {
                    key: names::TRUST_BUNDLE_KEY.into(),
                    path: names::TRUST_BUNDLE_KEY.into(),
                    mode: None,
                }]),
                optional: None,
            }),
            ..VolumeProjection::default()
        },
    };
    let info = |path: &str| DownwardAPIVolumeFile {
        path: path.into(),
        field_ref: Some(ObjectFieldSelector { api_version: Some("v1".into()), field_path: format!("metadata.{path}") }),
        ..DownwardAPIVolumeFile::default()
    };
    vec![
        Volume {
            name: SECRETS_VOLUME.into(),
            projected: Some(ProjectedVolumeSource { default_mode: Some(0o644), sources: Some(vec![token, bundle]) }),
            ..Volume::default()
        },
        Volume {
            name: POD_INFO_VOLUME.into(),
            downward_api: Some(DownwardAPIVolumeSource {
                default_mode: Some(0o644),
                items: Some(vec![info("labels"), info("annotations")]),
            }),
            ..Volume::default()
        },
    ]
}

fn mount(name: &str, path: &str) -> VolumeMount {
    VolumeMount { name: name.into(), mount_path: path.into(), read_only: Some(true), ..VolumeMount::default() }
}

fn seccomp() -> SeccompProfile {
    SeccompProfile { type_: "RuntimeDefault".into(), localhost_profile: None }
}

fn requirements(resources: &Resources) -> Option<ResourceRequirements> {
    let map = |m: &BTreeMap<String, String>| {
        (!m.is_empty()).then(|| m.iter().map(|(k, v)| (k.clone(), Quantity(v.clone()))).collect::<BTreeMap<_, _>>())
    };
    let (requests, limits) = (map(&resources.requests), map(&resources.limits));
    (requests.is_some() || limits.is_some()).then_some(ResourceRequirements { requests, limits, claims: None })
}
