//! `weft why`: the decision on a pod and each step that led to it, in words: the very code of the webhook, asked about a pod in
//! the cluster or in a file.

use crate::inject;
use anyhow::{Context as _, bail};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::{Api, Client};
use serde_json::Value;
use std::path::PathBuf;
use std::process::ExitCode;
use weft_api::names;
use weft_webhook::{
    ClusterFacts, Context, NamespaceFacts, Origin, Settings, Verdict, decide_from, inject as inject_pod, workload, yaml,
};

/// Arguments of `weft why`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  weft why pod/go-app-5d4f8c7b6-x2x9k
  weft why pod/go-app-5d4f8c7b6-x2x9k -n shop
  weft why -f deployment.yaml")]
pub(crate) struct Args {
    /// pod/NAME
    #[arg(required_unless_present = "filename", conflicts_with = "filename")]
    target: Option<String>,
    /// Namespace of the pod (default: the context's)
    #[arg(short, long)]
    namespace: Option<String>,
    /// Context of the kubeconfig
    #[arg(long)]
    context: Option<String>,
    /// Namespace of the control plane, where the settings are
    #[arg(long, default_value = names::CONTROL_NAMESPACE)]
    control_namespace: String,
    /// A manifest instead of a pod in the cluster, or - for standard input
    #[arg(short = 'f', long = "filename", value_name = "FILE|-")]
    filename: Option<PathBuf>,
}

/// Runs it.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    match (&args.target, &args.filename) {
        (_, Some(file)) => from_file(file),
        (Some(target), None) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(from_cluster(target, args))
        }
        (None, None) => bail!("name a pod, or a file with -f"),
    }
}

fn from_file(file: &PathBuf) -> anyhow::Result<ExitCode> {
    let streams = inject::read_all(std::slice::from_ref(file))?;
    let settings = Settings::default();
    let mut offline = weft_webhook::offline::Offline::new(settings.clone());
    for (_, stream) in &streams {
        offline.note_namespaces(stream);
    }
    for document in streams.iter().flat_map(|(_, stream)| yaml::split(stream)) {
        let object = yaml::read(document).map_err(|e| anyhow::anyhow!("{}: {e}", file.display()))?;
        let Some(pod) = workload::pod_pointer(&object).and_then(|p| object.pointer(p)) else { continue };
        let namespace = object.pointer("/metadata/namespace").and_then(Value::as_str);
        let known = namespace.and_then(|n| offline.namespaces.get(n));
        explain(
            &workload::title(&object),
            pod,
            Origin::Offline(known),
            &settings,
            ClusterFacts { native_sidecars: true, ..ClusterFacts::default() },
        );
    }
    Ok(ExitCode::SUCCESS)
}

async fn from_cluster(target: &str, args: &Args) -> anyhow::Result<ExitCode> {
    let name = match target.split_once('/') {
        Some(("pod" | "pods" | "po", name)) => name,
        Some((kind, _)) => bail!("{kind}: only pods are explained; name one as pod/NAME"),
        None => target,
    };
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let options = kube::config::KubeConfigOptions { context: args.context.clone(), ..Default::default() };
    let config = kube::Config::from_kubeconfig(&options).await.context("reading the kubeconfig")?;
    let namespace = args.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
    let client = Client::try_from(config)?;
    // Raw, so that nothing of a newer Kubernetes is lost.
    let request =
        kube::api::Request::new(format!("/api/v1/namespaces/{namespace}/pods")).get(name, &kube::api::GetParams::default())?;
    let pod: Value = client.request(request).await.with_context(|| format!("pod/{name} in namespace {namespace}"))?;
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let facts = namespaces.get_opt(&namespace).await?.map(|ns| NamespaceFacts {
        name: namespace.clone(),
        labels: ns.metadata.labels.unwrap_or_default(),
        annotations: ns.metadata.annotations.unwrap_or_default(),
    });
    let (settings, note) = settings_in_force(&client, &args.control_namespace).await;
    if let Some(note) = note {
        eprintln!("note: {note}");
    }
    let version = client.apiserver_version().await?;
    let cluster = ClusterFacts::of_version(&version.major, &version.minor);
    let origin = match &facts {
        Some(facts) => Origin::Admission(facts),
        None => Origin::Unknown(&namespace),
    };
    explain(&format!("pod/{name}"), &pod, origin, &settings, cluster);
    Ok(ExitCode::SUCCESS)
}

/// The settings that the control plane runs with; the defaults where they can't be read, and why.
async fn settings_in_force(client: &Client, namespace: &str) -> (Settings, Option<String>) {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let found = match maps.get_opt("weft-config").await {
        Ok(found) => found.and_then(|m| m.data).and_then(|mut d| d.remove("config.yaml")),
        Err(error) => {
            return (
                Settings::default(),
                Some(format!("the settings in {namespace} can't be read ({error}); defaults are assumed")),
            );
        }
    };
    match found {
        None => (
            Settings::default(),
            Some(format!("there is no ConfigMap weft-config in {namespace}: is Weft installed? Defaults are assumed")),
        ),
        Some(text) => match Settings::from_yaml(&text) {
            Ok(settings) => (settings, None),
            Err(error) => {
                (Settings::default(), Some(format!("the settings in {namespace} are not valid ({error}); defaults are assumed")))
            }
        },
    }
}

fn explain(title: &str, pod: &Value, origin: Origin<'_>, settings: &Settings, cluster: ClusterFacts) {
    let decision = decide_from(pod, origin, settings);
    let carries = has_sidecar(pod);
    let yes = decision.verdict == Verdict::Inject;
    println!("{title}: {} ({})", if yes { "injected" } else { "not injected" }, decision.reason);
    for (i, step) in decision.steps.iter().enumerate() {
        println!("  {}. {step}", i + 1);
    }
    for warning in &decision.warnings {
        println!("  warning: {warning}");
    }
    if yes {
        let context = Context { namespace: origin.namespace(), settings, cluster, workload: None };
        match inject_pod(pod, context) {
            Ok(injection) => injection.warnings.iter().for_each(|w| println!("  warning: {w}")),
            Err(refusals) => refusals.iter().for_each(|r| println!("  refused: {r}")),
        }
    }
    match (yes, carries, origin) {
        (_, _, Origin::Offline(_)) => {}
        (true, false, _) => println!(
            "  It has no sidecar all the same: it was created before injection was switched on, or while the webhook was away. Restart its workload."
        ),
        (false, true, _) => println!("  It has a sidecar all the same, from before: restart its workload to take it out."),
        _ => println!("  The pod is as the decision says: {} sidecar.", if carries { "with its" } else { "without a" }),
    }
}

fn has_sidecar(pod: &Value) -> bool {
    ["/spec/containers", "/spec/initContainers"]
        .into_iter()
        .filter_map(|p| pod.pointer(p)?.as_array())
        .flatten()
        .any(|c| c.get("name").and_then(Value::as_str) == Some(names::PROXY_CONTAINER))
}
