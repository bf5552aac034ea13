//! `weft-demo`: the guide's story on the playground, told to a person. Exits with 0 only if all of it really happened.

// One future on the main thread: its size is no matter.
#![allow(clippy::large_futures)]

use anyhow::ensure;
use clap::Parser;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::Instant;
use weft_tests::{Cluster, story};

/// The whole mesh on this machine: no Kubernetes, no container runtime.
#[derive(Parser)]
struct Args {
    /// Leave the playground running
    #[arg(long)]
    keep: bool,
    /// Folder of the playground
    #[arg(long, default_value = "/tmp/weft-demo")]
    dir: PathBuf,
}

#[tokio::main]
async fn main() -> std::process::ExitCode {
    let args = Args::parse();
    match tell(&args).await {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            println!("\n\x1b[31mThe demo failed:\x1b[0m {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

/// Announces a step, runs it, and says how long it took.
async fn step<T>(command: &str, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    print!("\n\x1b[1m$ {command}\x1b[0m\n  …");
    std::io::stdout().flush()?;
    let start = Instant::now();
    let result = work.await;
    let mark = if result.is_ok() { "\x1b[32m✔\x1b[0m" } else { "\x1b[31m✘\x1b[0m" };
    println!("\r  {mark} {:.1} s", start.elapsed().as_secs_f64());
    result
}

async fn tell(args: &Args) -> anyhow::Result<()> {
    let namespace = "default";
    println!(
        "Weft's demo: a playground (a cluster in a box: real pods in network namespaces, no Kubernetes), the mesh, and the guide's story."
    );

    let cluster =
        step(&format!("weft playground up --dir {}", args.dir.display()), Cluster::playground(&args.dir, args.keep)).await?;
    step("weft install | kubectl apply -f -", cluster.install(&[])).await?;
    step("kubectl apply -f manifests/samples/go-app.yaml -f manifests/samples/frontend.yaml", story::deploy(&cluster, namespace))
        .await?;
    let before = show_pods(&cluster, namespace).await?;
    ensure!(before.iter().all(|p| !p.meshed), "a pod is in the mesh although nothing asked for it");

    step("kubectl annotate namespace default inject=enabled", cluster.annotate_namespace(namespace, "inject", Some("enabled")))
        .await?;
    step(
        "kubectl rollout restart deployment/go-app deployment/go-app-v2 deployment/frontend",
        story::restart(&cluster, namespace),
    )
    .await?;
    let after = show_pods(&cluster, namespace).await?;
    ensure!(after.iter().all(|p| p.meshed && p.ready == 2 && p.all == 2), "not every pod is 2/2 with its sidecar");

    let log = step("kubectl logs deployment/go-app -c weft-init", story::redirection(&cluster, namespace)).await?;
    log.lines().for_each(|line| println!("    {line}"));

    let counted = step("(frontend calls go-app; what both proxies counted)", story::counted(&cluster, namespace, 100.0)).await?;
    println!("    frontend's proxy, as source:          {:>6} requests with status 200", counted.source);
    for (pod, n) in &counted.destination {
        println!("    {pod}'s proxy, as destination: {n:>6} requests with status 200");
    }

    let probes = step("(the app's readiness probe, performed by its proxy)", story::probes(&cluster, namespace)).await?;
    for (pod, status) in &probes {
        println!("    {pod}: GET :15020/app-health/go-app/readyz → {status}");
    }
    ensure!(!probes.is_empty() && probes.iter().all(|(_, status)| *status == 200), "a probe failed");

    let edges = step("weft edges", story::edges(&cluster, namespace)).await?;
    edges.lines().for_each(|line| println!("    {line}"));

    println!("\n\x1b[32mAll of that really happened.\x1b[0m");
    let kubeconfig = cluster.kubeconfig.display();
    if args.keep {
        println!("The playground is still up. Try:");
        println!("  export KUBECONFIG={kubeconfig}");
        println!("  kubectl get pods -o wide");
        println!("  kubectl describe pod -l app=go-app");
        println!("  kubectl logs deployment/frontend -c weft-proxy");
        println!(
            "  kubectl port-forward deployment/frontend 15020 & curl -s localhost:15020/stats/prometheus | grep istio_requests_total"
        );
        println!("  kubectl apply -f manifests/samples/authorizationpolicy-frontend.yaml && weft authz svc/go-app");
        println!("  weft playground down --dir {}", args.dir.display());
    } else {
        println!("`make demo KEEP=1` leaves it running, for kubectl and for you.");
    }
    Ok(())
}

async fn show_pods(cluster: &Cluster, namespace: &str) -> anyhow::Result<Vec<story::PodLine>> {
    let pods = story::pods(cluster, namespace).await?;
    println!("\n\x1b[1m$ kubectl get pods\x1b[0m");
    for pod in &pods {
        println!("    {:<40} {}/{}  {}", pod.name, pod.ready, pod.all, if pod.meshed { "with weft-proxy" } else { "" });
    }
    Ok(pods)
}
