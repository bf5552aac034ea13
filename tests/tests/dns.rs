//! With DNS capture a pod resolves names through its sidecar, over UDP and over TCP, and gets what its resolvers say.

#![allow(clippy::large_futures)]

use anyhow::{Context as _, ensure};
use weft_tests::cluster::containers;
use weft_tests::{Cluster, metrics};

async fn answered(cluster: &Cluster, namespace: &str, pod: &str) -> anyhow::Result<f64> {
    let samples = cluster.metrics(namespace, pod).await?;
    for outcome in ["failed", "overload", "malformed", "loop"] {
        let n = metrics::sum(&samples, "weft_dns_queries_total", &[("outcome", outcome)]);
        ensure!(n == 0.0, "{n} queries of {pod} ended as {outcome}");
    }
    Ok(metrics::sum(&samples, "weft_dns_queries_total", &[("outcome", "answered")]))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_resolves_names_through_its_sidecar() -> anyhow::Result<()> {
    let cluster = Cluster::start("dns").await?;
    cluster.install(&[]).await?;
    let ns = format!("e2e-dns-{}", std::process::id());
    cluster.namespace(&ns, &[("inject", "enabled"), ("weft.mesh/dns-capture", "true")]).await?;
    cluster.apply(&cluster.sample("echo")?, &ns).await?;
    if let Err(error) = cluster.rolled_out(&ns, "echo").await {
        anyhow::bail!("{error:#}\n{}", cluster.describe(&ns).await);
    }
    let pod = cluster.pods(&ns, "app=echo").await?.into_iter().next().context("no echo pod")?;
    ensure!(containers(&pod).iter().any(|(name, _)| name == "weft-proxy"), "echo is not in the mesh");
    let pod = pod.metadata.name.context("no name")?;

    let before = answered(&cluster, &ns, &pod).await?;
    let full = format!("http://echo.{ns}.svc.cluster.local/");
    for url in ["http://echo/", &full] {
        let out = cluster.exec(&ns, &pod, "echo", &["client", url]).await?;
        assert!(out.success && out.stdout.contains("StatusCode=200"), "{url}: {}{}", out.stdout, out.stderr);
    }
    let then = answered(&cluster, &ns, &pod).await?;
    assert!(then >= before + 2.0, "the sidecar had answered {before} queries, and then {then}");

    // A name that is not there is not there: NXDOMAIN is an answer, and it comes at once.
    let begun = std::time::Instant::now();
    let out = cluster.exec(&ns, &pod, "echo", &["client", "http://nobody.example.invalid/"]).await?;
    assert!(!out.success, "{}", out.stdout);
    assert!(begun.elapsed().as_secs() < 10, "{:?}: {}", begun.elapsed(), out.stderr);
    assert!(answered(&cluster, &ns, &pod).await? > then);
    Ok(())
}
