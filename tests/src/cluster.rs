//! A cluster to test on. With `KUBECONFIG` set it is that one, otherwise a playground of our own that ends with the value.
//!
//! A real cluster must already have the images: `WEFT_E2E_REGISTRY` and `WEFT_E2E_TAG` say under which name
//! (`<registry>/weft-control:<tag>` and so on).

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, AttachParams, DynamicObject, ListParams, LogParams, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::discovery::Scope;
use kube::{Client, Config, ResourceExt as _};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};
use tokio::io::AsyncReadExt as _;

/// The images that the samples name; replaced by the ones under test.
const SAMPLE_IMAGE: &str = "ghcr.io/weft-mesh/weft-sample:0.1.0";

/// How long anything may take that a cluster does by itself.
const PATIENCE: Duration = Duration::from_secs(120);

/// See the module.
pub struct Cluster {
    /// A client with all rights.
    pub client: Client,
    /// The kubeconfig of [`Self::client`].
    pub kubeconfig: PathBuf,
    registry: String,
    tag: String,
    playground: Option<Playground>,
    namespaces: std::sync::Mutex<Vec<String>>,
}

impl Drop for Cluster {
    /// A cluster that is not ours is left as it was found, but for the control plane.
    fn drop(&mut self) {
        let namespaces = std::mem::take(&mut *self.namespaces.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        if self.playground.is_some() || namespaces.is_empty() {
            return;
        }
        let kubeconfig = self.kubeconfig.clone();
        let delete = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
            runtime.block_on(async {
                let config = kube::config::Kubeconfig::read_from(&kubeconfig).ok()?;
                let config = Config::from_custom_kubeconfig(config, &kube::config::KubeConfigOptions::default()).await.ok()?;
                let api: Api<k8s_openapi::api::core::v1::Namespace> = Api::all(Client::try_from(config).ok()?);
                for name in &namespaces {
                    let _ = api.delete(name, &kube::api::DeleteParams::default()).await;
                }
                Some(())
            })
        };
        let _ = std::thread::spawn(delete).join();
    }
}

struct Playground {
    dir: PathBuf,
    keep: bool,
}

impl Drop for Playground {
    fn drop(&mut self) {
        if !self.keep {
            let _ = Command::new(binary("weft")).args(["playground", "down", "--dir"]).arg(&self.dir).output();
        }
    }
}

/// What a process in a container left behind.
#[derive(Debug)]
pub struct Executed {
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Whether it exited with 0.
    pub success: bool,
}

/// Where a binary of this workspace is: beside the running one, or in `WEFT_BIN_DIR`.
pub fn binary(name: &str) -> PathBuf {
    let dir = std::env::var_os("WEFT_BIN_DIR").map(PathBuf::from).or_else(|| {
        let exe = std::env::current_exe().ok()?;
        exe.ancestors().skip(1).find(|dir| dir.join("weft").is_file()).map(Path::to_owned)
    });
    dir.unwrap_or_else(|| PathBuf::from("target/debug")).join(name)
}

/// A file of this repository.
///
/// # Errors
/// It can't be read.
pub fn file(path: &str) -> anyhow::Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}

impl Cluster {
    /// The cluster in `KUBECONFIG`, or a new playground in a folder of its own.
    ///
    /// # Errors
    /// It can't be reached, or the playground doesn't start: the message has its output.
    pub async fn start(name: &str) -> anyhow::Result<Self> {
        if let Some(path) = std::env::var_os("KUBECONFIG").filter(|p| !p.is_empty()) {
            return Self::connect(PathBuf::from(path), None).await;
        }
        let dir = std::env::temp_dir().join(format!("weft-{name}-{}", std::process::id()));
        Self::playground(&dir, false).await
    }

    /// A playground in this folder; `keep` leaves it running.
    ///
    /// # Errors
    /// It doesn't start: the message has its output.
    pub async fn playground(dir: &Path, keep: bool) -> anyhow::Result<Self> {
        let playground = Playground { dir: dir.to_owned(), keep };
        let out =
            Command::new(binary("weft")).args(["playground", "up", "--dir"]).arg(dir).output().context("weft playground up")?;
        if !out.status.success() {
            bail!("weft playground up failed:\n{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        }
        Self::connect(dir.join("kubeconfig"), Some(playground)).await
    }

    async fn connect(kubeconfig: PathBuf, playground: Option<Playground>) -> anyhow::Result<Self> {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let config = kube::config::Kubeconfig::read_from(&kubeconfig)?;
        let config = Config::from_custom_kubeconfig(config, &kube::config::KubeConfigOptions::default()).await?;
        let client = Client::try_from(config)?;
        client.apiserver_version().await.with_context(|| format!("the cluster in {}", kubeconfig.display()))?;
        let env = |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.to_owned());
        Ok(Self {
            client,
            kubeconfig,
            registry: env("WEFT_E2E_REGISTRY", "localhost/weft"),
            tag: env("WEFT_E2E_TAG", "dev"),
            playground,
            namespaces: std::sync::Mutex::default(),
        })
    }

    /// Whether this is a playground.
    pub fn is_playground(&self) -> bool {
        self.playground.is_some()
    }

    /// Runs `weft` against this cluster.
    ///
    /// # Errors
    /// It can't be started.
    pub fn weft(&self, args: &[&str]) -> anyhow::Result<Output> {
        Command::new(binary("weft")).args(args).env("KUBECONFIG", &self.kubeconfig).output().context("weft")
    }

    /// `weft install <args> | kubectl apply -f -`, and waits until the control plane is ready and the webhook has its bundle.
    ///
    /// # Errors
    /// Printing, applying or waiting failed.
    pub async fn install(&self, args: &[&str]) -> anyhow::Result<()> {
        let mut all = vec!["install", "--registry", &self.registry, "--tag", &self.tag, "--set", "image.pullPolicy=IfNotPresent"];
        all.extend(args);
        let out = self.weft(&all)?;
        ensure!(out.status.success(), "weft install: {}", String::from_utf8_lossy(&out.stderr));
        self.apply(&String::from_utf8(out.stdout)?, "default").await?;
        self.rolled_out("weft-system", "weft-control").await?;
        let webhooks: Api<k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration> =
            Api::all(self.client.clone());
        let validators: Api<k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration> =
            Api::all(self.client.clone());
        eventually("the webhooks' caBundle", PATIENCE, async || {
            let hook = webhooks.get("weft-injector").await?;
            let ready = hook.webhooks.iter().flatten().all(|w| w.client_config.ca_bundle.is_some());
            let validator = validators.get_opt("weft-validator").await?.and_then(|v| v.webhooks);
            let validates = validator.iter().flatten().all(|w| w.client_config.ca_bundle.is_some());
            ensure!(ready && validates, "caBundle is not there yet");
            Ok(())
        })
        .await
    }

    /// A sample of the repository with the image under test.
    ///
    /// # Errors
    /// No such sample.
    pub fn sample(&self, name: &str) -> anyhow::Result<String> {
        Ok(file(&format!("manifests/samples/{name}.yaml"))?.replace(SAMPLE_IMAGE, &self.sample_image()))
    }

    /// The image of the sample programs.
    pub fn sample_image(&self) -> String {
        format!("{}/weft-sample:{}", self.registry, self.tag)
    }

    /// `kubectl apply --server-side -f -`.
    ///
    /// # Errors
    /// The first document that can't be read or applied, by name.
    pub async fn apply(&self, yaml: &str, namespace: &str) -> anyhow::Result<()> {
        for document in yaml.split("\n---").map(|d| d.trim_start_matches("---")) {
            let object: Value = serde_saphyr::from_str(document).with_context(|| document.to_owned())?;
            if object.is_null() {
                continue;
            }
            self.apply_object(&object, namespace).await?;
        }
        Ok(())
    }

    async fn apply_object(&self, object: &Value, namespace: &str) -> anyhow::Result<()> {
        let object: DynamicObject = serde_json::from_value(object.clone())?;
        let types = object.types.clone().context("no apiVersion and kind")?;
        let name = object.name_any();
        let what = format!("{} {name}", types.kind);
        let (resource, capabilities) = kube::discovery::pinned_kind(&self.client, &GroupVersionKind::try_from(&types)?)
            .await
            .with_context(|| what.clone())?;
        let api: Api<DynamicObject> = match capabilities.scope {
            Scope::Cluster => Api::all_with(self.client.clone(), &resource),
            Scope::Namespaced => {
                let ns = object.metadata.namespace.as_deref().unwrap_or(namespace);
                Api::namespaced_with(self.client.clone(), ns, &resource)
            }
        };
        let params = PatchParams::apply("weft-e2e").force();
        api.patch(&name, &params, &Patch::Apply(&object)).await.with_context(|| format!("apply {what}"))?;
        Ok(())
    }

    /// Creates a namespace with these annotations and waits for its service account.
    ///
    /// # Errors
    /// It can't be created.
    pub async fn namespace(&self, name: &str, annotations: &[(&str, &str)]) -> anyhow::Result<()> {
        let annotations: serde_json::Map<String, Value> = annotations.iter().map(|(k, v)| ((*k).to_owned(), json!(v))).collect();
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "annotations": annotations}});
        self.apply_object(&object, "").await?;
        self.namespaces.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(name.to_owned());
        let accounts: Api<k8s_openapi::api::core::v1::ServiceAccount> = Api::namespaced(self.client.clone(), name);
        eventually("the default service account", PATIENCE, async || {
            accounts.get("default").await?;
            Ok(())
        })
        .await
    }

    /// `kubectl annotate namespace`.
    ///
    /// # Errors
    /// There is no such namespace.
    pub async fn annotate_namespace(&self, name: &str, key: &str, value: Option<&str>) -> anyhow::Result<()> {
        let api: Api<k8s_openapi::api::core::v1::Namespace> = Api::all(self.client.clone());
        let patch = json!({"metadata": {"annotations": {key: value}}});
        api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        Ok(())
    }

    /// `kubectl rollout restart deployment/NAME`.
    ///
    /// # Errors
    /// There is no such Deployment.
    pub async fn restart(&self, namespace: &str, name: &str) -> anyhow::Result<()> {
        let api: Api<k8s_openapi::api::apps::v1::Deployment> = Api::namespaced(self.client.clone(), namespace);
        api.restart(name).await?;
        Ok(())
    }

    /// `kubectl rollout status deployment/NAME`: every replica is new and available, and no old pod is left.
    ///
    /// # Errors
    /// Two minutes are over; the message says what the pods wait for.
    pub async fn rolled_out(&self, namespace: &str, name: &str) -> anyhow::Result<()> {
        let api: Api<k8s_openapi::api::apps::v1::Deployment> = Api::namespaced(self.client.clone(), namespace);
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let done = eventually(&format!("deployment/{name} in {namespace}"), PATIENCE, async || {
            let deployment = api.get(name).await?;
            let want = deployment.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1);
            let status = deployment.status.clone().unwrap_or_default();
            let observed = status.observed_generation.unwrap_or_default() >= deployment.metadata.generation.unwrap_or_default();
            ensure!(
                observed
                    && status.updated_replicas.unwrap_or(0) == want
                    && status.available_replicas.unwrap_or(0) == want
                    && status.replicas.unwrap_or(0) == want,
                "{} of {want} updated, {} available, {} in all",
                status.updated_replicas.unwrap_or_default(),
                status.available_replicas.unwrap_or_default(),
                status.replicas.unwrap_or_default()
            );
            let labels = deployment.spec.and_then(|s| s.selector.match_labels).unwrap_or_default();
            let selector = labels.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(",");
            let left = pods.list(&ListParams::default().labels(&selector)).await?.items.len();
            ensure!(left == usize::try_from(want)?, "{left} pods are there, {want} should be");
            Ok(())
        })
        .await;
        match done {
            Ok(()) => Ok(()),
            Err(e) => bail!("{e:#}\n{}", self.describe(namespace).await),
        }
    }

    /// What the pods of a namespace wait for: phases, container states, events and the ends of logs, for error messages.
    pub async fn describe(&self, namespace: &str) -> String {
        let mut text = String::new();
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        for pod in pods.list(&ListParams::default()).await.map(|l| l.items).unwrap_or_default() {
            let status = pod.status.clone().unwrap_or_default();
            text.push_str(&format!("pod/{} {}\n", pod.name_any(), status.phase.unwrap_or_default()));
            let states =
                status.init_container_statuses.into_iter().flatten().chain(status.container_statuses.into_iter().flatten());
            for state in states {
                text.push_str(&format!("  {} ready={} restarts={} ", state.name, state.ready, state.restart_count));
                text.push_str(&serde_json::to_string(&state.state).unwrap_or_default());
                text.push('\n');
                let tail = LogParams { container: Some(state.name.clone()), tail_lines: Some(15), ..LogParams::default() };
                if let Ok(log) = pods.logs(&pod.name_any(), &tail).await {
                    log.lines().for_each(|line| text.push_str(&format!("    | {line}\n")));
                }
            }
        }
        let events: Api<k8s_openapi::api::core::v1::Event> = Api::namespaced(self.client.clone(), namespace);
        for event in events.list(&ListParams::default()).await.map(|l| l.items).unwrap_or_default() {
            text.push_str(&format!(
                "event {} {} {}\n",
                event.involved_object.name.unwrap_or_default(),
                event.reason.unwrap_or_default(),
                event.message.unwrap_or_default()
            ));
        }
        text
    }

    /// The pods with these labels (`a=b,c=d`) that are not on their way out.
    ///
    /// # Errors
    /// They can't be listed.
    pub async fn pods(&self, namespace: &str, labels: &str) -> anyhow::Result<Vec<Pod>> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let mut pods = api.list(&ListParams::default().labels(labels)).await?.items;
        pods.retain(|p| p.metadata.deletion_timestamp.is_none());
        Ok(pods)
    }

    /// The log of a container.
    ///
    /// # Errors
    /// There is none.
    pub async fn logs(&self, namespace: &str, pod: &str, container: &str) -> anyhow::Result<String> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        Ok(api.logs(pod, &LogParams { container: Some(container.into()), ..LogParams::default() }).await?)
    }

    /// Runs a command in a container.
    ///
    /// # Errors
    /// It can't be started.
    pub async fn exec(&self, namespace: &str, pod: &str, container: &str, command: &[&str]) -> anyhow::Result<Executed> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let params = AttachParams::default().container(container).stdin(false).stderr(true);
        let mut attached = api.exec(pod, command.iter().copied(), &params).await?;
        let (mut stdout, mut stderr) = (String::new(), String::new());
        let (mut out, mut err) = (attached.stdout().context("no stdout")?, attached.stderr().context("no stderr")?);
        let status = attached.take_status().context("no status")?;
        let (a, b) = tokio::join!(out.read_to_string(&mut stdout), err.read_to_string(&mut stderr));
        a?;
        b?;
        let success = status.await.is_some_and(|s| s.status.as_deref() == Some("Success"));
        Ok(Executed { stdout, stderr, success })
    }

    /// GETs a path of a pod's port through a port-forward: status and body.
    ///
    /// # Errors
    /// The port can't be reached, or answers no HTTP.
    pub async fn get(&self, namespace: &str, pod: &str, port: u16, path: &str) -> anyhow::Result<(u16, String)> {
        let work = async {
            let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
            let mut forward = api.portforward(pod, &[port]).await?;
            let stream = forward.take_stream(port).context("no stream")?;
            let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
            let driver = tokio::spawn(connection);
            let request = hyper::Request::get(path).header("host", "localhost").body(Empty::<Bytes>::new())?;
            let response = sender.send_request(request).await?;
            let status = response.status().as_u16();
            let body = response.into_body().collect().await?.to_bytes();
            drop(sender);
            driver.abort();
            anyhow::Ok((status, String::from_utf8_lossy(&body).into_owned()))
        };
        tokio::time::timeout(Duration::from_secs(15), work).await.with_context(|| format!("GET {pod}:{port}{path}"))?
    }

    /// The metrics of a pod's proxy.
    ///
    /// # Errors
    /// The admin port doesn't answer, or not in the text format.
    pub async fn metrics(&self, namespace: &str, pod: &str) -> anyhow::Result<Vec<crate::metrics::Sample>> {
        let (status, body) = self.get(namespace, pod, weft_api::names::ADMIN_PORT, "/stats/prometheus").await?;
        ensure!(status == 200, "/stats/prometheus of {pod} answers {status}");
        crate::metrics::parse(&body)
    }
}

/// Names of all containers of a pod that keep running, sidecars included, with whether they are ready.
pub fn containers(pod: &Pod) -> Vec<(String, bool)> {
    let spec = pod.spec.clone().unwrap_or_default();
    let sidecars: Vec<String> = spec
        .init_containers
        .into_iter()
        .flatten()
        .filter(|c| c.restart_policy.as_deref() == Some("Always"))
        .map(|c| c.name)
        .collect();
    let status = pod.status.clone().unwrap_or_default();
    let inits = status.init_container_statuses.into_iter().flatten().filter(|s| sidecars.contains(&s.name));
    let apps = status.container_statuses.into_iter().flatten();
    inits.chain(apps).map(|s| (s.name, s.ready)).collect()
}

/// Tries until it works.
///
/// # Errors
/// The last failure, when the time is over.
pub async fn eventually(
    what: &str,
    within: Duration,
    mut attempt: impl AsyncFnMut() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let start = Instant::now();
    loop {
        match attempt().await {
            Ok(()) => return Ok(()),
            Err(e) if start.elapsed() > within => return Err(e.context(format!("{what}: not within {} s", within.as_secs()))),
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}
