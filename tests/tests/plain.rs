//! A mesh without Kubernetes: weft-control with a folder of manifests and static tokens, and two proxies of a plain machine that talk mutual
//! TLS, as docs/control.md shows it; the root is replaced while requests go on.

use anyhow::{Context as _, ensure};
use serde_json::Value;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use weft_tests::cluster::binary;

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(dir: &Path, name: &str, args: &[String]) -> anyhow::Result<Running> {
    let log =
        std::fs::File::create(dir.join(format!("{}.log", args.last().map_or(name, |a| a.rsplit('/').next().unwrap_or(name)))))?;
    let child =
        Command::new(binary(name)).args(args).stdout(Stdio::null()).stderr(log).spawn().with_context(|| name.to_owned())?;
    Ok(Running(child))
}

fn free(host: &str) -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind((host, 0))?.local_addr()?)
}

/// The status of a GET on a connection of its own.
fn get(address: SocketAddr) -> anyhow::Result<u16> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: cart\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    text.split(' ').nth(1).and_then(|status| status.parse().ok()).with_context(|| format!("no HTTP: {text}"))
}

fn eventually<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> anyhow::Result<T> {
    let begin = Instant::now();
    loop {
        match check() {
            Some(found) => return Ok(found),
            None if begin.elapsed() > Duration::from_secs(60) => anyhow::bail!("did not happen: {what}"),
            None => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

fn identities(console: SocketAddr) -> Option<Value> {
    let out =
        Command::new(binary("weft")).args(["identity", "-A", "-o", "json", "--console", &console.to_string()]).output().ok()?;
    serde_json::from_slice(&out.stdout).ok()
}

#[test]
fn two_proxies_on_a_plain_machine() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (app, cart, caller) = (free("127.0.0.1")?, free("127.0.0.2")?, free("127.0.0.1")?);
    let (control, console, webhook, metrics) = (free("127.0.0.1")?, free("127.0.0.1")?, free("127.0.0.1")?, free("127.0.0.1")?);
    std::fs::create_dir(dir.path().join("manifests"))?;
    let pod = |name: &str, ip: &str, ports: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, annotations: {{weft.mesh/status: \"{{}}\"}}}}\n\
             spec: {{serviceAccountName: {name}, containers: [{{name: app{ports}}}, {{name: weft-proxy}}]}}\n\
             status: {{podIPs: [{{ip: {ip}}}]}}\n"
        )
    };
    let ports = format!(", ports: [{{name: http, containerPort: {}}}]", cart.port());
    let pods = format!("{}---\n{}", pod("frontend", "127.0.0.1", ""), pod("cart", "127.0.0.2", &ports));
    std::fs::write(dir.path().join("manifests/pods.yaml"), pods)?;
    std::fs::write(dir.path().join("tokens"), "red-secret shop/frontend/frontend\nblue-secret shop/cart/cart\n")?;
    for (name, pod, listener) in [
        ("red", "frontend", format!("{{address: \"{caller}\", direction: outbound, upstream: \"{cart}\"}}")),
        ("blue", "cart", format!("{{address: \"{cart}\", direction: inbound, upstream: \"{app}\"}}")),
    ] {
        std::fs::write(dir.path().join(format!("{name}.token")), format!("{name}-secret"))?;
        let file = format!(
            "listeners: [{listener}]\nadmin: {}\nworkload: {{pod: {pod}, namespace: shop, serviceAccount: {pod}}}\n\
             control: {{address: \"localhost:{}\", root: {}, token: {}}}\n",
            free("127.0.0.1")?,
            control.port(),
            path("root.pem"),
            path(&format!("{name}.token")),
        );
        std::fs::write(dir.path().join(format!("{name}.yaml")), file)?;
    }
    let mut args: Vec<String> = ["--bind=127.0.0.1", "--config=/dev/null", "--rotation-delay=2"].map(String::from).into();
    for (flag, value) in [
        ("manifests", path("manifests")),
        ("tokens", path("tokens")),
        ("trust-bundle-out", path("root.pem")),
        ("control-port", control.port().to_string()),
        ("console-port", console.port().to_string()),
        ("webhook-port", webhook.port().to_string()),
        ("metrics-port", metrics.port().to_string()),
        ("state-dir", path("state")),
    ] {
        args.push(format!("--{flag}={value}"));
    }
    let _control = start(dir.path(), "weft-control", &args)?;
    let _app = start(dir.path(), "weft-sample", &["echo".into(), format!("--port={}", app.port())])?;
    eventually("the control plane has a root", || dir.path().join("root.pem").exists().then_some(()))?;
    let _blue = start(dir.path(), "weft-proxy", &["--config".into(), path("blue.yaml")])?;
    let _red = start(dir.path(), "weft-proxy", &["--config".into(), path("red.yaml")])?;
    let before = eventually("both have certificates", || {
        let listed = identities(console)?;
        let named = |pod: &str| {
            let wanted = format!("spiffe://cluster.local/ns/shop/sa/{pod}");
            listed["proxies"]
                .as_array()?
                .iter()
                .any(|p| p["pod"] == pod && p["certificate"]["identity"] == wanted.as_str())
                .then_some(())
        };
        named("cart").and(named("frontend")).map(|()| listed.clone())
    })?;
    eventually("requests are answered", || (get(caller).ok()? == 200).then_some(()))?;

    std::fs::write(dir.path().join("state/rotate-root"), "monday")?;
    let begin = Instant::now();
    let (mut sent, mut switched) = (0, None::<Value>);
    // For some seconds more, so that requests with new certificates are among them.
    while switched.is_none() || sent % 50 != 0 {
        ensure!(get(caller)? == 200, "request {sent} failed");
        sent += 1;
        if sent % 50 == 0 && switched.is_none() {
            switched = identities(console).filter(|listed| {
                let serial = |listed: &Value, n: usize| listed["proxies"][n]["certificate"]["serial"].clone();
                listed["authority"]["issuer"] != before["authority"]["issuer"]
                    && (0..2).all(|n| serial(listed, n).is_string() && serial(listed, n) != serial(&before, n))
            });
        }
        ensure!(begin.elapsed() < Duration::from_secs(60), "the root is not replaced: {:?}", identities(console));
        std::thread::sleep(Duration::from_millis(5));
    }
    ensure!(get(caller)? == 200);
    let edges = eventually("the proxies have told of their requests", || {
        let out =
            Command::new(binary("weft")).args(["edges", "-A", "-o", "json", "--console", &console.to_string()]).output().ok()?;
        let edges: Value = serde_json::from_slice(&out.stdout).ok()?;
        edges["edges"].as_array().filter(|edges| !edges.is_empty()).cloned()
    })?;
    ensure!(edges.iter().all(|edge| edge["source"]["identity"] == "spiffe://cluster.local/ns/shop/sa/frontend"), "{edges:?}");
    Ok(())
}
