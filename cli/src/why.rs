//! `weft why`: the decision on a pod and each step that led to it, in words: the very code of the webhook, asked about a pod in
//! the cluster or in a file.
//!
//! A manifest is judged as the cluster would judge it at admission, by the settings that are in force there and the namespace that it would go to. Where
//! no cluster answers, or settings are given with `--config`, it is judged as `weft inject` judges it. What was assumed is
//! always said.

mod request;

use crate::inject;
use anyhow::{Context as _, bail};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::{Api, Client};
use serde_json::Value;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use weft_api::names;
use weft_webhook::offline::Offline;
use weft_webhook::{
    ClusterFacts, Context, NamespaceFacts, Origin, Settings, Verdict, decide_from, inject as inject_pod, workload, yaml,
};

/// Arguments of `weft why`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  weft why pod/go-app-5d4f8c7b6-x2x9k
  weft why pod/go-app-5d4f8c7b6-x2x9k -n shop
  weft why -f deployment.yaml
  weft why -f deployment.yaml --config config.yaml
  weft why request --from pod/a --to svc/b --path /api/x")]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    about: Option<About>,
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
    /// A manifest instead of a pod in the cluster, or - for standard input; judged by the cluster's settings if one answers
    #[arg(short = 'f', long = "filename", value_name = "FILE|-")]
    filename: Option<PathBuf>,
    /// With -f: these settings (the `config.yaml` of the control plane's ConfigMap weft-config), and no cluster is asked
    #[arg(long, value_name = "FILE", requires = "filename")]
    config: Option<PathBuf>,
}

/// How long a cluster may take before a manifest is judged without it.
const PATIENCE: Duration = Duration::from_secs(5);

/// What else there is a why of.
#[derive(Debug, clap::Subcommand)]
enum About {
    /// What would become of a request, or became of a refused one, and each rule that was looked at
    Request(Box<request::Args>),
}

/// Runs it.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if let Some(About::Request(args)) = &args.about {
        return request::run(args);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match (&args.target, &args.filename) {
        (_, Some(file)) => runtime.block_on(from_file(file, args)),
        (Some(target), None) => runtime.block_on(from_cluster(target, args)),
        (None, None) => bail!("name a pod, or a file with -f"),
    }
}

/// A cluster as far as a decision needs it.
struct Cluster {
    client: Client,
    /// The namespace that objects without one go to.
    namespace: String,
    settings: Settings,
    facts: ClusterFacts,
}

impl Cluster {
    async fn connect(args: &Args) -> anyhow::Result<Self> {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let options = kube::config::KubeConfigOptions { context: args.context.clone(), ..Default::default() };
        let config = kube::Config::from_kubeconfig(&options).await.context("reading the kubeconfig")?;
        let namespace = args.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config)?;
        let version = client.apiserver_version().await.context("asking the cluster for its version")?;
        let (settings, note) = settings_in_force(&client, &args.control_namespace).await;
        if let Some(note) = note {
            eprintln!("note: {note}");
        }
        Ok(Self { client, namespace, settings, facts: ClusterFacts::of_version(&version.major, &version.minor) })
    }

    async fn namespace_facts(&self, name: &str) -> anyhow::Result<Option<NamespaceFacts>> {
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        Ok(namespaces.get_opt(name).await?.map(|ns| NamespaceFacts {
            name: name.to_owned(),
            labels: ns.metadata.labels.unwrap_or_default(),
            annotations: ns.metadata.annotations.unwrap_or_default(),
        }))
    }
}

async fn from_file(file: &PathBuf, args: &Args) -> anyhow::Result<ExitCode> {
    let streams = inject::read_all(std::slice::from_ref(file))?;
    let cluster = match &args.config {
        Some(_) => None,
        None => match tokio::time::timeout(PATIENCE, Cluster::connect(args)).await {
            Ok(Ok(cluster)) => Some(cluster),
            Ok(Err(error)) => {
                eprintln!("note: no cluster is asked ({error:#}): judged as `weft inject` does, by default settings");
                None
            }
            Err(_) => {
                eprintln!("note: the cluster did not answer in {PATIENCE:?}: judged as `weft inject` does, by default settings");
                None
            }
        },
    };
    let settings = match &cluster {
        Some(cluster) => cluster.settings.clone(),
        None => inject::settings(args.config.as_deref())?,
    };
    let facts = cluster.as_ref().map_or(ClusterFacts { native_sidecars: true, ..ClusterFacts::default() }, |c| c.facts);
    let mut offline = Offline::new(settings.clone());
    for (_, stream) in &streams {
        offline.note_namespaces(stream);
    }
    for document in streams.iter().flat_map(|(_, stream)| yaml::split(stream)) {
        let object = yaml::read(document).map_err(|e| anyhow::anyhow!("{}: {e}", file.display()))?;
        let Some(pod) = workload::pod_pointer(&object).and_then(|p| object.pointer(p)) else { continue };
        let own = object.pointer("/metadata/namespace").and_then(Value::as_str);
        let title = workload::title(&object);
        let Some(cluster) = &cluster else {
            // As `weft inject` has it: of a namespace that is not among the documents the name counts at least.
            let by_name = own.map(|name| NamespaceFacts { name: name.to_owned(), ..NamespaceFacts::default() });
            let known = own.and_then(|n| offline.namespaces.get(n)).or(by_name.as_ref());
            explain(&title, pod, Origin::Offline(known), &settings, facts, Existing::No);
            continue;
        };
        let name = own.unwrap_or(&cluster.namespace);
        // A Namespace among the documents is what the cluster is going to have.
        let known = match offline.namespaces.get(name) {
            Some(known) => Some(known.clone()),
            None => cluster.namespace_facts(name).await.with_context(|| format!("namespace {name}"))?,
        };
        let origin = known.as_ref().map_or(Origin::Unknown(name), Origin::Admission);
        explain(&title, pod, origin, &settings, facts, Existing::No);
    }
    Ok(ExitCode::SUCCESS)
}

async fn from_cluster(target: &str, args: &Args) -> anyhow::Result<ExitCode> {
    let name = match target.split_once('/') {
        Some(("pod" | "pods" | "po", name)) => name,
        Some((kind, _)) => bail!("{kind}: only pods are explained; name one as pod/NAME"),
        None => target,
    };
    let cluster = Cluster::connect(args).await?;
    let namespace = &cluster.namespace;
    // Raw, so that nothing of a newer Kubernetes is lost.
    let request =
        kube::api::Request::new(format!("/api/v1/namespaces/{namespace}/pods")).get(name, &kube::api::GetParams::default())?;
    let pod: Value = cluster.client.request(request).await.with_context(|| format!("pod/{name} in namespace {namespace}"))?;
    let facts = cluster.namespace_facts(namespace).await?;
    let origin = facts.as_ref().map_or(Origin::Unknown(namespace), Origin::Admission);
    explain(&format!("pod/{name}"), &pod, origin, &cluster.settings, cluster.facts, Existing::Yes);
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

/// Whether the pod is there already, with or without its sidecar.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Existing {
    Yes,
    No,
}

fn explain(title: &str, pod: &Value, origin: Origin<'_>, settings: &Settings, cluster: ClusterFacts, existing: Existing) {
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
    match (yes, carries, existing) {
        (_, _, Existing::No) => {}
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
