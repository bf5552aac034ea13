//! `weft-bench webhook`: AdmissionReviews to a `weft-control` that knows many namespaces, over TLS, at a fixed rate.
//!
//! `weft-control` runs with `--manifests` on a folder of Namespace documents, so the path that is measured is the one of a
//! cluster: TLS, HTTP, the review, the namespace out of the index, the decision, the patch. Reviews are of pods as a ReplicaSet makes
//! them, in namespaces that ask for injection; every answer is read and must carry a patch.

use crate::h1;
use crate::load;
use crate::machine::{Cores, Machine};
use crate::pace::{Backlog, Schedule};
use crate::process::{self, Process};
use crate::{proc, stats};
use anyhow::{Context, Result, bail};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use serde::Deserialize;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::client::TlsStream;

/// How to measure the webhook.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// weft-control, built with the profile that is to be measured.
    #[arg(long, value_name = "FILE", default_value = "target/dist/weft-control")]
    control: PathBuf,
    /// Reviews a second.
    #[arg(long, default_value = "1000")]
    rate: u64,
    /// Seconds of the measurement.
    #[arg(long, default_value = "10")]
    seconds: f64,
    /// Keep-alive connections.
    #[arg(long, default_value = "8")]
    connections: usize,
    /// Namespaces that the control plane knows.
    #[arg(long, default_value = "1000")]
    namespaces: usize,
    /// Core of weft-control.
    #[arg(long, default_value = "0")]
    peer_core: usize,
    /// Core of the load generator.
    #[arg(long, default_value = "1")]
    load_core: usize,
    /// Folder for webhook.json.
    #[arg(long, value_name = "DIR", default_value = "bench/results")]
    out: PathBuf,
}

/// Runs `weft-bench webhook`. False if a target is missed is not its business: it measures.
pub(crate) async fn run(args: Args) -> Result<bool> {
    if args.connections == 0 || args.namespaces == 0 || args.seconds <= 0.0 {
        bail!("--connections, --namespaces and --seconds must be greater than 0");
    }
    let cores = Cores::new(args.peer_core, args.load_core)?;
    let machine = Machine::look(cores);
    let dir = process::folder()?;
    let manifests = dir.path().join("manifests");
    std::fs::create_dir(&manifests)?;
    std::fs::write(manifests.join("namespaces.yaml"), namespaces(args.namespaces))?;
    let bundle = dir.path().join("root.pem");
    let [webhook, control, metrics] = free_ports()?;
    let binary = std::fs::canonicalize(&args.control)
        .with_context(|| format!("{}: build weft-control first, or see --control", args.control.display()))?;
    let mut command = Command::new(binary);
    command.arg("--manifests").arg(&manifests).arg("--trust-bundle-out").arg(&bundle);
    command.arg("--config").arg(dir.path().join("none.yaml")).args(["--log-level", "warn"]);
    for (flag, port) in [("--webhook-port", webhook), ("--control-port", control), ("--metrics-port", metrics)] {
        command.args([flag, &port.port().to_string()]);
    }
    let mut process = Process::start(command, cores, dir)?;
    let startup = process.ready(async || is_ready(metrics).await).await.context("weft-control")?;
    let pid = process.pid();

    let requests: Arc<Vec<Vec<u8>>> = Arc::new((0..args.namespaces.min(200)).map(request).collect());
    let tls = tls(&bundle)?;
    let first = connect(&tls, webhook).await?.exchange(&requests[0]).await.map(check)?;
    first.context("the first review")?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let rss_idle = proc::rss_kib(pid)?;
    open_loop(&args, &tls, webhook, &requests, 1.0).await.context("warming up")?;
    let (cpu, start) = (proc::cpu_time(pid)?, Instant::now());
    let latencies = open_loop(&args, &tls, webhook, &requests, args.seconds).await?;
    let (cpu, wall) = (proc::cpu_time(pid)?.saturating_sub(cpu), start.elapsed());
    let rss_after = proc::rss_kib(pid)?;

    let micros = |percent| stats::percentile(&latencies, percent) as f64 / 1e3;
    let rate = latencies.len() as f64 / wall.as_secs_f64();
    let cpu_per = cpu.as_secs_f64() * 1e6 / latencies.len() as f64;
    println!(
        "webhook: {rate:.0} reviews/s asked and answered over {} TLS connections, weft-control on one core",
        args.connections
    );
    println!(
        "  latency p50 {:.0} µs, p99 {:.0} µs, p99.9 {:.0} µs (target: p99 under 2,000 µs)",
        micros(50.0),
        micros(99.0),
        micros(99.9)
    );
    println!("  CPU {cpu_per:.1} µs per review");
    println!(
        "  RSS with {} namespaces: {:.1} MiB idle, {:.1} MiB after the load (target: under 30 MB)",
        args.namespaces,
        rss_idle as f64 / 1024.0,
        rss_after as f64 / 1024.0
    );
    println!("  ready {:.0} ms after exec", startup.as_secs_f64() * 1e3);
    let report = json!({
        "machine": machine, "cores": cores, "connections": args.connections, "namespaces": args.namespaces,
        "asked_rate": args.rate, "rate": rate, "reviews": latencies.len(), "cpu_us_per_review": cpu_per,
        "p50_us": micros(50.0), "p99_us": micros(99.0), "p999_us": micros(99.9),
        "rss_idle_kib": rss_idle, "rss_after_kib": rss_after, "startup_ms": startup.as_secs_f64() * 1e3,
    });
    std::fs::create_dir_all(&args.out)?;
    let path = args.out.join("webhook.json");
    std::fs::write(&path, format!("{report:#}\n")).with_context(|| format!("can't write {}", path.display()))?;
    Ok(true)
}

async fn open_loop(
    args: &Args,
    tls: &Arc<rustls::ClientConfig>,
    to: SocketAddr,
    requests: &Arc<Vec<Vec<u8>>>,
    seconds: f64,
) -> Result<Vec<u64>> {
    let backlog = Arc::new(Backlog::default());
    let mut clients = JoinSet::new();
    for first in 0..args.connections {
        let mut conn = connect(tls, to).await?;
        let (backlog, requests) = (Arc::clone(&backlog), Arc::clone(requests));
        clients.spawn(async move {
            let mut latencies = Vec::new();
            while let Some(intended) = backlog.take().await {
                let request = &requests[(first * 31 + latencies.len()) % requests.len()];
                let answer = tokio::time::timeout(Duration::from_secs(10), conn.exchange(request));
                let body = answer.await.context("no answer within 10 s")??;
                latencies.push(intended.elapsed().as_nanos() as u64);
                check(body)?;
            }
            Ok::<_, anyhow::Error>(latencies)
        });
    }
    load::collect(&backlog, Schedule::new(args.rate, Duration::from_secs_f64(seconds)), clients).await
}

async fn is_ready(metrics: SocketAddr) -> Result<()> {
    let mut conn = h1::Conn::connect(metrics).await?;
    conn.exchange(b"GET /healthz/ready HTTP/1.1\r\nHost: localhost\r\n\r\n").await.map(drop)
}

async fn connect(tls: &Arc<rustls::ClientConfig>, to: SocketAddr) -> Result<h1::Conn<TlsStream<TcpStream>>> {
    let stream = TcpStream::connect(to).await.with_context(|| format!("can't connect to {to}"))?;
    stream.set_nodelay(true)?;
    let connector = tokio_rustls::TlsConnector::from(Arc::clone(tls));
    let stream = connector.connect(ServerName::try_from("localhost")?, stream).await.context("TLS to the webhook")?;
    Ok(h1::Conn::over(stream, 128 * 1024))
}

fn tls(bundle: &Path) -> Result<Arc<rustls::ClientConfig>> {
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(bundle).with_context(|| format!("{}", bundle.display()))? {
        roots.add(certificate?)?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn free_ports() -> Result<[SocketAddr; 3]> {
    let [a, b, c] = [(); 3].map(|()| std::net::TcpListener::bind("127.0.0.1:0"));
    Ok([a?.local_addr()?, b?.local_addr()?, c?.local_addr()?])
}

/// `count` Namespaces, as many labels and annotations as one meets in clusters; all ask for injection.
fn namespaces(count: usize) -> String {
    let document = |i| {
        format!(
            "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: team-{i}\n  uid: 00000000-0000-4000-8000-{i:012}\n  resourceVersion: \"{}\"\n  \
             labels: {{kubernetes.io/metadata.name: team-{i}, team: team-{i}, pod-security.kubernetes.io/enforce: restricted}}\n  \
             annotations: {{inject: enabled, example.com/owner: team-{i}@example.com, example.com/cost-centre: \"{}\"}}\n",
            1000 + i,
            i * 7
        )
    };
    let documents: Vec<String> = (0..count).map(document).collect();
    documents.join("---\n")
}

/// The review of a pod in namespace `i`, as the bytes that an API server would send.
fn request(i: usize) -> Vec<u8> {
    let body = review(i).to_string();
    format!(
        "POST /inject?timeout=10s HTTP/1.1\r\nHost: weft-control.weft-system.svc\r\nUser-Agent: kube-apiserver-admission\r\n\
         Accept: application/json, */*\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

fn review(i: usize) -> Value {
    let namespace = format!("team-{i}");
    let probe = |path: &str| json!({"httpGet": {"path": path, "port": "http", "scheme": "HTTP"}, "timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3});
    let token =
        json!({"name": "kube-api-access-x7k2p", "readOnly": true, "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"});
    let container = |name: &str, port: u16| {
        json!({
            "name": name, "image": format!("registry.example.com/{namespace}/{name}:1.4.2"), "imagePullPolicy": "IfNotPresent",
            "ports": [{"name": "http", "containerPort": port, "protocol": "TCP"}],
            "env": [{"name": "LOG_LEVEL", "value": "info"}, {"name": "POD_NAME", "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.name"}}}],
            "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "256Mi"}},
            "volumeMounts": [{"name": "config", "mountPath": "/etc/app"}, token],
            "livenessProbe": probe("/live"), "readinessProbe": probe("/ready"),
            "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
            "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}, "runAsNonRoot": true}
        })
    };
    json!({
        "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
        "request": {
            "uid": uid(i), "kind": {"group": "", "version": "v1", "kind": "Pod"},
            "resource": {"group": "", "version": "v1", "resource": "pods"},
            "requestKind": {"group": "", "version": "v1", "kind": "Pod"},
            "requestResource": {"group": "", "version": "v1", "resource": "pods"},
            "namespace": namespace, "operation": "CREATE", "dryRun": false, "oldObject": null,
            "userInfo": {"username": "system:serviceaccount:kube-system:replicaset-controller", "groups": ["system:serviceaccounts", "system:authenticated"]},
            "options": {"kind": "CreateOptions", "apiVersion": "meta.k8s.io/v1"},
            "object": {
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {
                    "generateName": "shop-6d4f9c7b5d-", "namespace": namespace, "creationTimestamp": null,
                    "labels": {"app": "shop", "version": "v1", "pod-template-hash": "6d4f9c7b5d"},
                    "annotations": {"prometheus.io/scrape": "true", "prometheus.io/port": "8080", "kubectl.kubernetes.io/restartedAt": "2026-11-24T08:00:00Z"},
                    "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "shop-6d4f9c7b5d", "uid": uid(i + 1), "controller": true, "blockOwnerDeletion": true}]
                },
                "spec": {
                    "containers": [container("shop", 8080), container("cache", 8081)],
                    "initContainers": [{"name": "migrate", "image": "registry.example.com/migrate:3", "resources": {}, "volumeMounts": [token]}],
                    "volumes": [
                        {"name": "config", "configMap": {"name": "shop", "defaultMode": 420}},
                        {"name": "kube-api-access-x7k2p", "projected": {"defaultMode": 420, "sources": [
                            {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
                            {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}}]}}
                    ],
                    "serviceAccountName": "shop", "restartPolicy": "Always", "terminationGracePeriodSeconds": 30, "dnsPolicy": "ClusterFirst",
                    "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}}, "schedulerName": "default-scheduler",
                    "tolerations": [{"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}],
                    "priority": 0, "enableServiceLinks": true, "preemptionPolicy": "PreemptLowerPriority"
                },
                "status": {}
            }
        }
    })
}

fn uid(i: usize) -> String {
    format!("7f3c1c1e-0000-4000-8000-{i:012x}")
}

#[derive(Deserialize)]
struct Answer<'a> {
    #[serde(borrow)]
    response: Response<'a>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Response<'a> {
    uid: &'a str,
    allowed: bool,
    #[serde(default)]
    patch: &'a str,
    #[serde(default)]
    patch_type: &'a str,
}

/// The answer must admit the pod with a patch: a webhook that skips is quick, and not what is measured.
fn check(body: &[u8]) -> Result<()> {
    let answer: Answer<'_> = serde_json::from_slice(body).context("the answer is no AdmissionReview")?;
    let response = answer.response;
    if !response.uid.starts_with("7f3c1c1e-")
        || !response.allowed
        || response.patch_type != "JSONPatch"
        || response.patch.len() < 200
    {
        bail!("not injected: {}", String::from_utf8_lossy(&body[..body.len().min(600)]));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_whole() {
        let bytes = request(7);
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.ends_with(&format!("Content-Length: {}", body.len())));
        let review: Value = serde_json::from_str(body).unwrap();
        assert_eq!(review["request"]["namespace"], "team-7");
        assert_eq!(namespaces(3).matches("kind: Namespace").count(), 3);
    }

    #[test]
    fn only_an_injected_pod_counts() {
        let answer = |response: Value| json!({"apiVersion": "admission.k8s.io/v1", "response": response}).to_string();
        let patch = "W".repeat(300);
        let good = json!({"uid": uid(1), "allowed": true, "patchType": "JSONPatch", "patch": patch});
        check(answer(good.clone()).as_bytes()).unwrap();
        for (key, value) in [("allowed", json!(false)), ("patch", json!("")), ("uid", json!("other")), ("patchType", json!("x"))]
        {
            let mut bad = good.clone();
            bad[key] = value;
            assert!(check(answer(bad).as_bytes()).is_err(), "{key}");
        }
        assert!(check(answer(json!({"uid": uid(1), "allowed": true})).as_bytes()).is_err());
        assert!(check(b"{").is_err());
    }
}
