//! The binary as a process: signals, memory, what it says.

use crate::common::{FakeApi, eventually};
use crate::discovery::{http_get, ready};
use serde_json::json;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use weft_control::metrics::resident_bytes;

struct Process {
    child: Child,
    metrics: SocketAddr,
    webhook: SocketAddr,
    log: std::path::PathBuf,
    _dir: tempfile::TempDir,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn start(api: &FakeApi, more: &[&str]) -> Process {
    let dir = tempfile::tempdir().unwrap();
    let kubeconfig = dir.path().join("kubeconfig");
    std::fs::write(&kubeconfig, api.kubeconfig()).unwrap();
    let log = dir.path().join("log");
    let (webhook, control, metrics) = (free_port(), free_port(), free_port());
    let child = Command::new(env!("CARGO_BIN_EXE_weft-control"))
        .args(["--namespace=weft-system", "--bind=127.0.0.1", "--config"])
        .arg(dir.path().join("config.yaml"))
        .arg("--kubeconfig")
        .arg(&kubeconfig)
        .args([
            format!("--webhook-port={webhook}"),
            format!("--control-port={control}"),
            format!("--metrics-port={metrics}"),
            "--console-port=0".into(),
        ])
        .args(more)
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let at = |port| SocketAddr::from(([127, 0, 0, 1], port));
    Process { child, metrics: at(metrics), webhook: at(webhook), log, _dir: dir }
}

impl Process {
    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    fn signal(&self) {
        let status = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Memory that the process wrote: without its code.
    fn anonymous(&self) -> i64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.split_whitespace().next().unwrap().parse::<i64>().unwrap() * 1024
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_ends_in_order() {
    let api = FakeApi::start().await;
    let mut process = start(&api, &["--shutdown-delay=2", "--log-format=json"]);
    ready(process.metrics).await;
    let leases = "apis/coordination.k8s.io/v1/leases";
    eventually("it leads", || api.get(leases, "weft-system", "weft-control")).await;
    process.signal();
    let since = Instant::now();
    eventually("the lease is given back", || {
        (api.get(leases, "weft-system", "weft-control")?["spec"]["holderIdentity"] == "").then_some(())
    })
    .await;
    let (status, body) = http_get(process.metrics, "/healthz/ready").await.unwrap();
    assert_eq!(status, 503);
    assert!(body.contains("shutting down"), "{body}");
    assert_eq!(http_get(process.metrics, "/healthz/live").await.unwrap().0, 200);
    assert!(tokio::net::TcpStream::connect(process.webhook).await.is_ok(), "still serving");
    let status = loop {
        if let Some(status) = process.child.try_wait().unwrap() {
            break status;
        }
        assert!(since.elapsed() < Duration::from_secs(10), "it does not end:\n{}", process.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert!(since.elapsed() >= Duration::from_secs(2));
    assert!(status.success(), "{status}");
    let log = process.log();
    assert!(log.lines().all(|line| serde_json::from_str::<serde_json::Value>(line).is_ok()), "{log}");
    assert!(log.contains("ended in order"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_is_away_at_the_start_ends_nothing() {
    let api = FakeApi::start().await;
    api.set_down(true);
    let mut process = start(&api, &["--shutdown-delay=0"]);
    let mut last = None;
    for _ in 0..200 {
        last = http_get(process.metrics, "/healthz/ready").await;
        if last.is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    let (status, body) = last.unwrap();
    assert_eq!(status, 503);
    assert!(body.contains("not listed yet") && body.contains("no certificate yet"), "{body}");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(process.child.try_wait().unwrap().is_none(), "{}", process.log());
    api.set_down(false);
    ready(process.metrics).await;
    assert!(process.log().contains("trying again"), "{}", process.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_time_will_not_mend_ends_it_with_a_message() {
    let api = FakeApi::start().await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = format!("--metrics-port={}", taken.local_addr().unwrap().port());
    let mut process = start(&api, &[]);
    drop(process.child.kill());
    let output = Command::new(env!("CARGO_BIN_EXE_weft-control"))
        .args([
            "--manifests=/nonexistent/folder",
            "--bind=127.0.0.1",
            "--webhook-port=0",
            "--control-port=0",
            "--metrics-port=0",
            "--console-port=0",
        ])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("/nonexistent/folder"));
    let output = Command::new(env!("CARGO_BIN_EXE_weft-control"))
        .args(["--manifests=/tmp", "--bind=127.0.0.1", "--webhook-port=0", "--control-port=0", &port])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--metrics-port"));
}

/// The target is 30 MB of resident memory with 1,000 namespaces, for a release build. A debug build's code alone is larger than
/// that, so the memory that the process itself wrote is what is held to a limit here: what remains is for the code.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_namespaces_fit() {
    let empty = FakeApi::start().await;
    let process = start(&empty, &["--shutdown-delay=0"]);
    ready(process.metrics).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let before = process.anonymous();
    drop(process);
    let api = FakeApi::start().await;
    for n in 0..1000 {
        let last_applied = "x".repeat(2000);
        api.put(
            "api/v1/namespaces",
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": format!("team-{n}"),
            "labels": {"kubernetes.io/metadata.name": format!("team-{n}"), "team": format!("t{n}"), "istio-injection": "enabled"},
            "annotations": {"kubectl.kubernetes.io/last-applied-configuration": last_applied},
            "managedFields": [{"manager": "kubectl", "operation": "Update", "apiVersion": "v1", "fieldsType": "FieldsV1",
                "fieldsV1": {"f:metadata": {"f:labels": {".": {}, "f:team": {}}}}}]}}),
        );
    }
    let process = start(&api, &["--shutdown-delay=0"]);
    ready(process.metrics).await;
    eventually("all namespaces have their bundle", || (api.list("api/v1/configmaps").len() == 1000).then_some(())).await;
    let (_, text) = http_get(process.metrics, "/metrics").await.unwrap();
    assert!(text.contains("weft_objects{resource=\"namespaces\"} 1000"), "{text}");
    let after = process.anonymous();
    let all = resident_bytes(&format!("/proc/{}/status", process.child.id())).unwrap();
    println!("memory: {} KiB empty, {} KiB with 1,000 namespaces ({} KiB with code)", before / 1024, after / 1024, all / 1024);
    assert!(after < 20 << 20, "{} KiB", after / 1024);
    assert!(after - before < 10 << 20, "grew by {} KiB", (after - before) / 1024);
}
