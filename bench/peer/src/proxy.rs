//! Weft as people run it, but without Kubernetes: for each normalisation a `weft-control` that reads the pods and policies from a folder, for
//! each pod a `weft-proxy`, and an app behind it that says in `x-seen-path` what it was sent.

use crate::case::{Answer, Mode, Set};
use crate::client::{Clients, PING};
use crate::identity::Authority;
use crate::weft::ADDRESS;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Where the apps are; their ports are those of the policies.
const APPS: Ipv4Addr = Ipv4Addr::new(127, 0, 3, 3);
const PATIENCE: Duration = Duration::from_secs(60);
/// So many proxies run at a time.
const BATCH: usize = 20;

/// A process that ends with the value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Nothing of it is kept.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The answers to all calls of all sets.
pub(crate) fn answers(sets: &[Set], binaries: &Path, dir: &Path) -> Result<Vec<Vec<Answer>>> {
    let mut answers = vec![Vec::new(); sets.len()];
    for mode in [Mode::None, Mode::Base, Mode::MergeSlashes, Mode::DecodeAndMergeSlashes] {
        let of_mode: Vec<usize> = (0..sets.len()).filter(|n| sets[*n].mode == mode).collect();
        if of_mode.is_empty() {
            continue;
        }
        let control = Control::start(sets, &of_mode, mode, binaries, dir)?;
        let clients = Clients::new(&control.authority()?, weft_api::names::ALPN_HTTP1)?;
        let raw_clients = Clients::new(&control.authority()?, weft_api::names::ALPN_TCP)?;
        for batch in of_mode.chunks(BATCH) {
            let proxies = batch.iter().map(|n| control.proxy(&sets[*n], *n, binaries));
            let proxies = proxies.collect::<Result<Vec<_>>>()?;
            for (n, proxy) in batch.iter().zip(proxies) {
                let set = &sets[*n];
                proxy.ready(set.policies.len())?;
                let clients = if set.http { &clients } else { &raw_clients };
                let each = set.calls.iter().map(|call| {
                    let answer = clients.call(call, SocketAddr::from((ADDRESS, set.port)), set.http);
                    answer.with_context(|| format!("Weft, port {}, {}\n{}", set.port, call.words(), set.words()))
                });
                answers[*n] = each.collect::<Result<_>>()?;
            }
        }
    }
    Ok(answers)
}

struct Control {
    dir: PathBuf,
    port: u16,
    _process: Running,
}

impl Control {
    fn start(sets: &[Set], of_mode: &[usize], mode: Mode, binaries: &Path, dir: &Path) -> Result<Self> {
        let dir = dir.join(format!("{mode:?}"));
        let (manifests, state) = (dir.join("manifests"), dir.join("state"));
        std::fs::create_dir_all(&manifests)?;
        std::fs::create_dir_all(&state)?;
        let mut objects = vec![json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default"}})];
        let mut tokens = String::new();
        for n in of_mode {
            objects.push(pod(*n, sets[*n].port, sets[*n].http));
            objects.extend(sets[*n].raw.iter().enumerate().map(|(m, spec)| policy(*n, m, spec)));
            tokens.push_str(&format!("token-{n} default/pod-{n}\n"));
        }
        let all = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        std::fs::write(manifests.join("all.json"), all.to_string())?;
        std::fs::write(dir.join("tokens"), tokens)?;
        let normalization = match mode {
            Mode::None => "NONE",
            Mode::Base => "BASE",
            Mode::MergeSlashes => "MERGE_SLASHES",
            Mode::DecodeAndMergeSlashes => "DECODE_AND_MERGE_SLASHES",
        };
        let config = json!({"mesh": {"pathNormalization": {"normalization": normalization}}});
        std::fs::write(dir.join("config.yaml"), config.to_string())?;
        let ports = [free()?, free()?, free()?, free()?];
        let mut command = Command::new(std::fs::canonicalize(binaries.join("weft-control"))?);
        command.arg("--manifests").arg(manifests).arg("--state-dir").arg(&state).arg("--tokens").arg(dir.join("tokens"));
        command.arg("--trust-bundle-out").arg(dir.join("root.pem")).arg("--config").arg(dir.join("config.yaml"));
        command.args(["--bind", "127.0.0.1", "--san", "127.0.0.1", "--log-level", "warn", "--max-streams-per-address", "100000"]);
        for (flag, port) in ["--webhook-port", "--control-port", "--metrics-port", "--console-port"].into_iter().zip(ports) {
            command.args([flag, &port.to_string()]);
        }
        let mut process = spawn(command, &dir.join("control.log"))?;
        wait(&mut process, &dir.join("control.log"), || {
            get(SocketAddr::from(([127, 0, 0, 1], ports[2])), "/healthz/ready").is_ok()
        })?;
        Ok(Self { dir, port: ports[1], _process: process })
    }

    /// Its root with the key, which signs for the clients.
    fn authority(&self) -> Result<Authority> {
        let text = std::fs::read_to_string(self.dir.join("state/authority.json")).context("what weft-control has kept")?;
        let kept: Value = serde_json::from_str(&text)?;
        let part =
            |name: &str| kept.pointer(name).and_then(Value::as_str).with_context(|| format!("authority.json lacks {name}"));
        Authority::load(part("/own/certificate")?, part("/own/key")?)
    }

    fn proxy(&self, set: &Set, n: usize, binaries: &Path) -> Result<Proxy> {
        let dir = self.dir.join(format!("proxy-{n}"));
        std::fs::create_dir_all(&dir)?;
        let app = TcpListener::bind((APPS, set.port)).with_context(|| format!("the app of pod-{n}"))?;
        let http = set.http;
        std::thread::spawn(move || serve(&app, http));
        std::fs::write(dir.join("token"), format!("token-{n}"))?;
        let admin = SocketAddr::from(([127, 0, 0, 1], free()?));
        let protocol = if set.http { "http1" } else { "tcp" };
        let config = json!({
            "workers": 1,
            "admin": admin,
            "listeners": [{
                "address": SocketAddr::from((ADDRESS, set.port)), "direction": "inbound", "protocol": protocol,
                "upstream": SocketAddr::from((APPS, set.port)),
            }],
            "workload": {"pod": format!("pod-{n}"), "namespace": "default", "serviceAccount": "app"},
            "control": {"address": format!("127.0.0.1:{}", self.port), "root": self.dir.join("root.pem"), "token": dir.join("token")},
        });
        std::fs::write(dir.join("weft.yaml"), config.to_string())?;
        let mut command = Command::new(std::fs::canonicalize(binaries.join("weft-proxy"))?);
        command.arg("--config").arg(dir.join("weft.yaml"));
        let log = dir.join("log");
        Ok(Proxy { process: spawn(command, &log)?, admin, log })
    }
}

struct Proxy {
    process: Running,
    admin: SocketAddr,
    log: PathBuf,
}

impl Proxy {
    /// Waits until it has its certificate and its pod's policies.
    fn ready(&self, policies: usize) -> Result<()> {
        let start = Instant::now();
        loop {
            let told = get(self.admin, "/config").ok().and_then(|text| serde_json::from_str::<Value>(&text).ok());
            let version = told.as_ref().and_then(|all| all.pointer("/inbound/version")?.as_u64());
            if version.unwrap_or(0) > 0 && get(self.admin, "/healthz/ready").is_ok() {
                return Ok(());
            }
            if start.elapsed() > PATIENCE {
                let log = std::fs::read_to_string(&self.log).unwrap_or_default();
                bail!("process {} has not got its {policies} policies:\n{log}", self.process.0.id());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn pod(n: usize, port: u16, http: bool) -> Value {
    let name = if http { "http-app" } else { "tcp-app" };
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": format!("pod-{n}"), "namespace": "default", "uid": format!("pod-{n}"), "labels": {"app": format!("pod-{n}")},
            "annotations": {"weft.mesh/status": "{}"},
        },
        "spec": {
            "serviceAccountName": "app",
            "containers": [
                {"name": "app", "image": "app", "ports": [{"name": name, "containerPort": port}]},
                {"name": "weft-proxy", "image": "weft-proxy"},
            ],
        },
        "status": {"phase": "Running", "podIP": Ipv4Addr::from(0x7f04_0001 + n as u32).to_string()},
    })
}

fn policy(n: usize, m: usize, spec: &Value) -> Value {
    let mut spec = spec.clone();
    spec["selector"] = json!({"matchLabels": {"app": format!("pod-{n}")}});
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": format!("pod-{n}-{m}"), "namespace": "default"}, "spec": spec,
    })
}

fn free() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

fn spawn(mut command: Command, log: &Path) -> Result<Running> {
    let file = std::fs::File::create(log)?;
    command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
    let child = command.spawn().with_context(|| format!("can't start {}", command.get_program().display()))?;
    Ok(Running(child))
}

fn wait(process: &mut Running, log: &Path, mut ready: impl FnMut() -> bool) -> Result<()> {
    let start = Instant::now();
    while !ready() {
        if process.0.try_wait()?.is_some() || start.elapsed() > PATIENCE {
            bail!("it does not become ready:\n{}", std::fs::read_to_string(log).unwrap_or_default());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// The body of an answer with status 200.
fn get(from: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(from)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no response")?;
    if !head.starts_with("HTTP/1.1 200") {
        bail!("{head}");
    }
    Ok(body.to_owned())
}

/// The app: tells what it was sent, or sends it back. Ends with the program.
fn serve(listener: &TcpListener, http: bool) {
    for stream in listener.incoming().flatten() {
        std::thread::spawn(move || if http { tell(stream) } else { echo(stream) });
    }
}

fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    let mut buf = [0; PING.len()];
    loop {
        let n = stream.read(&mut buf)?;
        if n == 0 {
            return Ok(());
        }
        stream.write_all(&buf[..n])?;
    }
}

fn tell(mut stream: TcpStream) -> std::io::Result<()> {
    let mut seen = Vec::new();
    let mut buf = [0; 4096];
    loop {
        let Some(end) = seen.windows(4).position(|w| w == b"\r\n\r\n") else {
            let n = stream.read(&mut buf)?;
            if n == 0 {
                return Ok(());
            }
            seen.extend_from_slice(&buf[..n]);
            continue;
        };
        let mut answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx-seen-path: ".to_vec();
        answer.extend_from_slice(seen[..end].split(|b| *b == b' ').nth(1).unwrap_or_default());
        answer.extend_from_slice(b"\r\n\r\n");
        stream.write_all(&answer)?;
        seen.drain(..end + 4);
    }
}
