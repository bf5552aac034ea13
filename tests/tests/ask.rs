//! What a person asks about the mesh: who talks to whom, what a policy would break, what is in force, why a request was refused.

#![allow(clippy::large_futures)]

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use std::time::Duration;
use weft_tests::Cluster;
use weft_tests::cluster::eventually;

/// Reports are some seconds behind: of the worker, of the stream, and of a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A copy of the echo sample under another name and service account; `meshed` or not.
async fn deploy(cluster: &Cluster, ns: &str, name: &str, meshed: bool) -> anyhow::Result<String> {
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}});
    cluster.apply(&account.to_string(), ns).await?;
    let inject = if meshed { "enabled" } else { "disabled" };
    let yaml = cluster
        .sample("echo")?
        .replace("name: echo\n", &format!("name: {name}\n"))
        .replace("app: echo\n", &format!("app: {name}\n"))
        .replace("    spec:\n      containers:", &format!("    spec:\n      serviceAccountName: {name}\n      containers:"))
        .replace(
            "      labels:\n        app:",
            &format!("      annotations:\n        weft.mesh/inject: {inject}\n      labels:\n        app:"),
        );
    cluster.apply(&yaml, ns).await?;
    cluster.rolled_out(ns, name).await?;
    let pod = cluster.pods(ns, &format!("app={name}")).await?.into_iter().next().context("no pod")?;
    pod.metadata.name.context("no name")
}

async fn call(cluster: &Cluster, ns: &str, (pod, container): (&str, &str), args: &[&str]) -> anyhow::Result<String> {
    let out = cluster.exec(ns, pod, container, &[&["client"], args].concat()).await?;
    ensure!(out.success, "client {args:?}: {}{}", out.stdout, out.stderr);
    Ok(out.stdout)
}

/// Runs `weft … -o json`; the exit status and what it printed.
fn weft(cluster: &Cluster, args: &[&str]) -> anyhow::Result<(bool, Value)> {
    let out = cluster.weft(&[args, &["-o", "json"]].concat())?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let value =
        serde_json::from_str(&text).with_context(|| format!("weft {args:?}: {text}{}", String::from_utf8_lossy(&out.stderr)))?;
    Ok((out.status.success(), value))
}

/// How many requests of these edges there are.
fn sum(edges: &Value, wanted: impl Fn(&Value) -> bool) -> u64 {
    edges.as_array().into_iter().flatten().filter(|e| wanted(e)).filter_map(|e| e["count"].as_u64()).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn see_what_goes_on_and_ask_before_and_after() -> anyhow::Result<()> {
    let cluster = Cluster::start("ask").await?;
    cluster.install(&[]).await?;
    let ns = &format!("e2e-ask-{}", std::process::id());
    cluster.namespace(ns, &[("inject", "enabled")]).await?;
    deploy(&cluster, ns, "echo", true).await?;
    let (caller, stranger) = (deploy(&cluster, ns, "caller", true).await?, deploy(&cluster, ns, "stranger", false).await?);
    let (caller, stranger) = ((caller.as_str(), "caller"), (stranger.as_str(), "stranger"));
    call(&cluster, ns, caller, &["http://echo/items", "--count=5"]).await?;
    call(&cluster, ns, stranger, &["http://echo/items", "--count=3"]).await?;

    // Who talks to whom, and whether it is encrypted.
    let identity = format!("spiffe://cluster.local/ns/{ns}/sa/caller");
    let to_echo = |e: &Value| e["destination"]["name"] == "echo" && e["port"] == 8080 && e["protocol"] == "http";
    let result = eventually("both callers among the edges", PATIENCE, async || {
        let (_, seen) = weft(&cluster, &["edges", "-n", ns])?;
        let secure = sum(&seen["edges"], |e| to_echo(e) && e["source"]["identity"] == *identity);
        let plain =
            sum(&seen["edges"], |e| to_echo(e) && e["source"]["identity"] == "" && e["source"]["workload"] == "deploy/stranger");
        ensure!(secure >= 5 && plain >= 3, "{seen:#}");
        Ok(())
    })
    .await;
    ensure!(result.is_ok(), "{result:?}\n{}", cluster.describe(ns).await);
    let table = String::from_utf8(cluster.weft(&["edges", "-n", ns, "--paths"])?.stdout)?;
    assert!(table.lines().any(|l| l.contains("/items") && l.contains("mTLS") && l.contains(&format!("{ns}/caller"))), "{table}");
    assert!(table.lines().any(|l| l.contains("/items") && l.contains("PLAINTEXT")), "{table}");

    // What would STRICT break? The stranger, and nobody else.
    let dir = tempfile::tempdir()?;
    let strict = dir.path().join("strict.yaml");
    let object = json!({"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": {"name": "default"}, "spec": {"mtls": {"mode": "STRICT"}}});
    std::fs::write(&strict, object.to_string())?;
    let (harmless, preview) = weft(&cluster, &["policy", "preview", "-n", ns, "-f", strict.to_str().context("path")?])?;
    let changes = preview["changes"].as_array().context("no changes")?;
    assert!(
        !harmless && sum(&preview["changes"], |c| c["source"]["workload"] == "deploy/stranger" && to_echo(c)) >= 3,
        "{preview:#}"
    );
    assert!(changes.iter().all(|c| c["effect"] == "refused" && c["source"]["identity"] == ""), "{preview:#}");

    // A policy takes effect, and its hits are told.
    let policy = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "no-admin"},
        "spec": {"action": "DENY", "selector": {"matchLabels": {"app": "echo"}}, "rules": [{"to": [{"operation": {"paths": ["/admin*"]}}]}]}
    });
    cluster.apply(&policy.to_string(), ns).await?;
    let refused = async || call(&cluster, ns, caller, &["http://echo/admin/x", "-H", "x-request-id:ask-1"]).await;
    eventually("the policy in force", PATIENCE, async || {
        let out = refused().await?;
        ensure!(out.contains("StatusCode=403"), "{out}");
        Ok(())
    })
    .await?;
    eventually("the policy's hits", PATIENCE, async || {
        let (_, authz) = weft(&cluster, &["authz", "svc/echo", "-n", ns])?;
        let policy = &authz["policies"][0];
        ensure!(policy["policy"] == format!("{ns}/no-admin") && policy["denied"].as_u64() >= Some(1), "{authz:#}");
        ensure!(authz["mtls"][0]["mode"] == "PERMISSIVE", "{authz:#}");
        Ok(())
    })
    .await?;

    // Why: supposed, and for real.
    let from = format!("pod/{}", caller.0);
    let why =
        |path: &str| weft(&cluster, &["why", "request", "-n", ns, "--from", &from, "--to", "svc/echo:http", "--path", path]);
    let (allowed, verdict) = why("/admin/../admin/x")?;
    assert!(!allowed && verdict["verdicts"][0]["policy"] == format!("{ns}/no-admin"), "{verdict:#}");
    let (allowed, verdict) = why("/items")?;
    assert!(allowed && verdict["verdicts"][0]["verdict"] == "allow", "{verdict:#}");
    eventually("the refused request", PATIENCE, async || {
        let out = cluster.weft(&["why", "request", "--id", "ask-1"])?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let told = text.contains("GET echo/admin/x")
            && text.contains(&format!("policy {ns}/no-admin"))
            && text.contains(&format!("{ns}/caller"));
        ensure!(told, "{text}{}", String::from_utf8_lossy(&out.stderr));
        Ok(())
    })
    .await
}

/// A process that ends with the value.
struct Process(std::process::Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const FOLDER: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {selector: {app: cart}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: cart-1, namespace: shop, labels: {app: cart}, annotations: {weft.mesh/status: '{}'}}
spec: {serviceAccountName: cart, containers: [{name: app, ports: [{containerPort: 8080}]}, {name: weft-proxy}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: readers, namespace: shop}
spec: {rules: [{from: [{source: {serviceAccounts: [web]}}], to: [{operation: {methods: [GET]}}]}]}
";

#[test]
fn a_control_plane_without_kubernetes_can_be_asked_too() -> anyhow::Result<()> {
    use std::process::{Command, Stdio};
    use weft_tests::cluster::binary;
    let dir = tempfile::tempdir()?;
    let folder = dir.path().join("manifests");
    std::fs::create_dir(&folder)?;
    std::fs::write(folder.join("all.yaml"), FOLDER)?;
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let log = dir.path().join("log");
    let child = Command::new(binary("weft-control"))
        .arg(format!("--manifests={}", folder.display()))
        .arg(format!("--config={}", dir.path().join("none.yaml").display()))
        .args(["--webhook-port=0", "--control-port=0", "--metrics-port=0"])
        .arg(format!("--console-port={port}"))
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(&log)?)
        .spawn()
        .context("weft-control")?;
    let _control = Process(child);
    let address = format!("127.0.0.1:{port}");
    let weft = |args: &[&str]| {
        // No cluster is needed, and none is asked.
        Command::new(binary("weft"))
            .args(args)
            .args(["-n", "shop", "--console", &address])
            .env("KUBECONFIG", "/nonexistent")
            .output()
    };
    let text =
        |out: &std::process::Output| format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    let started = std::time::Instant::now();
    let authz = loop {
        let out = weft(&["authz", "svc/cart", "-o", "json"])?;
        if out.status.success() {
            break serde_json::from_slice::<Value>(&out.stdout)?;
        }
        ensure!(started.elapsed() < PATIENCE, "{}\n{}", text(&out), std::fs::read_to_string(&log)?);
        std::thread::sleep(Duration::from_millis(100));
    };
    assert_eq!((&authz["policies"][0]["policy"], &authz["pods"]), (&json!("shop/readers"), &json!(["cart-1"])), "{authz:#}");
    let why = |from: &str, method: &str| weft(&["why", "request", "--from", "sa", from, "--to", "svc/cart", "--method", method]);
    let out = why("shop/web", "GET")?;
    assert!(out.status.success() && text(&out).contains("ALLOWED: ALLOW policy shop/readers matches"), "{}", text(&out));
    let out = why("shop/web", "POST")?;
    assert!(!out.status.success() && text(&out).contains("methods"), "{}", text(&out));
    let out = weft(&["policy", "preview", "-f", folder.to_str().context("path")?])?;
    assert!(out.status.success() && text(&out).contains("No traffic to meshed pods was seen"), "{}", text(&out));
    let out = weft(&["edges"])?;
    assert!(
        out.status.success() && text(&out).contains("No requests to meshed pods were seen in namespace shop"),
        "{}",
        text(&out)
    );
    Ok(())
}
