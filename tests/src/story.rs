//! The guide's story, step by step: install, deploy, annotate the namespace, restart the deployments, and look. The demo
//! tells it with words around it, the end-to-end test asserts it: both run these functions.

use crate::cluster::{Cluster, containers, eventually};
use crate::metrics;
use anyhow::{Context as _, ensure};
use kube::ResourceExt as _;
use std::time::Duration;

/// The Deployments of the story, in the namespace it is told in.
pub const DEPLOYMENTS: [&str; 3] = ["go-app", "go-app-v2", "frontend"];

/// Deploys go-app in two versions and frontend, without the mesh.
///
/// # Errors
/// Something can't be applied or does not become ready.
pub async fn deploy(cluster: &Cluster, namespace: &str) -> anyhow::Result<()> {
    for sample in ["go-app", "frontend"] {
        cluster.apply(&cluster.sample(sample)?, namespace).await?;
    }
    for name in DEPLOYMENTS {
        cluster.rolled_out(namespace, name).await?;
    }
    Ok(())
}

/// Restarts every Deployment of the story and waits.
///
/// # Errors
/// A Deployment does not become ready again.
pub async fn restart(cluster: &Cluster, namespace: &str) -> anyhow::Result<()> {
    for name in DEPLOYMENTS {
        cluster.restart(namespace, name).await?;
    }
    for name in DEPLOYMENTS {
        cluster.rolled_out(namespace, name).await?;
    }
    Ok(())
}

/// One line of `kubectl get pods`.
#[derive(Clone, Debug)]
pub struct PodLine {
    /// Its name.
    pub name: String,
    /// Containers that are ready.
    pub ready: usize,
    /// Containers that keep running.
    pub all: usize,
    /// Whether one of them is the sidecar.
    pub meshed: bool,
}

/// The pods of the story.
///
/// # Errors
/// They can't be listed.
pub async fn pods(cluster: &Cluster, namespace: &str) -> anyhow::Result<Vec<PodLine>> {
    let mut lines = Vec::new();
    for app in ["go-app", "frontend"] {
        for pod in cluster.pods(namespace, &format!("app={app}")).await? {
            let containers = containers(&pod);
            lines.push(PodLine {
                name: pod.name_any(),
                ready: containers.iter().filter(|(_, ready)| *ready).count(),
                all: containers.len(),
                meshed: containers.iter().any(|(name, _)| name == weft_api::names::PROXY_CONTAINER),
            });
        }
    }
    Ok(lines)
}

/// Requests that the proxies have counted.
#[derive(Clone, Debug)]
pub struct Counted {
    /// By the proxy of frontend, as the source.
    pub source: f64,
    /// By the proxies of go-app, as the destination, per pod.
    pub destination: Vec<(String, f64)>,
}

/// Waits until the proxies on both sides have counted this many successful requests.
///
/// # Errors
/// They have not within a minute; the message has the counts.
pub async fn counted(cluster: &Cluster, namespace: &str, at_least: f64) -> anyhow::Result<Counted> {
    let mut last = None;
    eventually("requests counted on both sides", Duration::from_secs(60), async || {
        let frontend = cluster.pods(namespace, "app=frontend").await?;
        let frontend = frontend.first().context("no frontend pod")?.name_any();
        let ok = |reporter| [("reporter", reporter), ("response_code", "200")];
        let source = metrics::sum(&cluster.metrics(namespace, &frontend).await?, "istio_requests_total", &ok("source"));
        let mut destination = Vec::new();
        for pod in cluster.pods(namespace, "app=go-app").await? {
            let samples = cluster.metrics(namespace, &pod.name_any()).await?;
            destination.push((pod.name_any(), metrics::sum(&samples, "istio_requests_total", &ok("destination"))));
        }
        let total: f64 = destination.iter().map(|(_, n)| n).sum();
        last = Some(Counted { source, destination });
        ensure!(source >= at_least && total >= at_least, "frontend's proxy has counted {source}, go-app's {total}");
        Ok(())
    })
    .await?;
    last.context("nothing was counted")
}

/// What the init container of a pod says that it did.
///
/// # Errors
/// There is no such log.
pub async fn redirection(cluster: &Cluster, namespace: &str) -> anyhow::Result<String> {
    let pod = cluster.pods(namespace, "app=go-app").await?.first().context("no go-app pod")?.name_any();
    cluster.logs(namespace, &pod, weft_api::names::INIT_CONTAINER).await
}

/// Asks the proxy of each go-app pod for the app's own readiness, as the kubelet does after injection.
///
/// # Errors
/// A probe is not answered.
pub async fn probes(cluster: &Cluster, namespace: &str) -> anyhow::Result<Vec<(String, u16)>> {
    let mut results = Vec::new();
    for pod in cluster.pods(namespace, "app=go-app").await? {
        let (status, _) =
            cluster.get(namespace, &pod.name_any(), weft_api::names::ADMIN_PORT, "/app-health/go-app/readyz").await?;
        results.push((pod.name_any(), status));
    }
    Ok(results)
}

/// Waits until `weft edges` has seen frontend call go-app by mutual TLS, and returns what it prints.
///
/// # Errors
/// It has not within a minute.
pub async fn edges(cluster: &Cluster, namespace: &str) -> anyhow::Result<String> {
    let identity = weft_api::names::spiffe_id(weft_api::names::TRUST_DOMAIN, namespace, "frontend");
    let mut table = String::new();
    eventually("frontend among the callers of go-app", Duration::from_secs(60), async || {
        let out = cluster.weft(&["edges", "-n", namespace, "-o", "json"])?;
        ensure!(out.status.success(), "weft edges: {}", String::from_utf8_lossy(&out.stderr));
        let seen = String::from_utf8_lossy(&out.stdout).into_owned();
        ensure!(seen.contains(&identity), "{identity} is not among them yet");
        table = String::from_utf8_lossy(&cluster.weft(&["edges", "-n", namespace])?.stdout).into_owned();
        Ok(())
    })
    .await?;
    Ok(table)
}
