//! Probes and lifecycle hooks, as the kubelet makes them: from the node to the pod's address, or inside the container.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use tokio::time::{sleep, timeout};

use super::container::{self, Container};
use super::pod::Pod;
use crate::json::{list, number, text};
use crate::{netns, tls};

/// The three probes of a container: startup first, then liveness and readiness side by side. Ends when the container has to be
/// restarted and has been stopped; the caller drops it when the process ends.
pub(crate) async fn supervise(pod: &Arc<Pod>, c: &Arc<Container>) {
    if let Some(probe) = c.spec.get("startupProbe")
        && !until(pod, c, probe, "Startup").await
    {
        return;
    }
    let readiness = c.spec.get("readinessProbe");
    c.set(pod, |s| {
        s.started = true;
        s.ready = readiness.is_none();
    });
    let live = async {
        match c.spec.get("livenessProbe") {
            Some(probe) => watch_over(pod, c, probe, "Liveness").await,
            None => std::future::pending().await,
        }
    };
    let ready = async {
        if let Some(probe) = readiness {
            follow(pod, c, probe).await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = live => {}
        () = ready => {}
    }
}

fn seconds(probe: &Value, key: &str, default: i64) -> Duration {
    Duration::from_secs(number(probe, key, default).max(0) as u64)
}

fn period(probe: &Value) -> Duration {
    seconds(probe, "/periodSeconds", 10).max(Duration::from_secs(1))
}

async fn attempt(pod: &Arc<Pod>, c: &Arc<Container>, probe: &Value, what: &str) -> bool {
    let limit = seconds(probe, "/timeoutSeconds", 1).max(Duration::from_secs(1));
    let result = timeout(limit, handler(pod, c, probe)).await;
    let why = match result {
        Ok(Ok(())) => return true,
        Ok(Err(why)) => why,
        Err(_) => format!("no answer within {} s", limit.as_secs()),
    };
    if !c.stopping.is_cancelled() {
        pod.event("Warning", "Unhealthy", &format!("{what} probe failed: {why}")).await;
    }
    false
}

/// Probes until it succeeds (true), or so often without success that the container was stopped (false).
async fn until(pod: &Arc<Pod>, c: &Arc<Container>, probe: &Value, what: &str) -> bool {
    sleep(seconds(probe, "/initialDelaySeconds", 0)).await;
    let mut failures = 0;
    while !attempt(pod, c, probe, what).await {
        failures += 1;
        if failures >= number(probe, "/failureThreshold", 3) && !c.stopping.is_cancelled() {
            kill(pod, c, probe, what).await;
            return false;
        }
        sleep(period(probe)).await;
    }
    true
}

async fn watch_over(pod: &Arc<Pod>, c: &Arc<Container>, probe: &Value, what: &str) {
    loop {
        if !until(pod, c, probe, what).await {
            return;
        }
        sleep(period(probe)).await;
    }
}

async fn kill(pod: &Arc<Pod>, c: &Arc<Container>, probe: &Value, what: &str) {
    let message = format!("Container {} failed {} probe, will be restarted", c.name, what.to_lowercase());
    pod.event("Normal", "Killing", &message).await;
    container::restart(pod, c, probe).await;
}

async fn follow(pod: &Arc<Pod>, c: &Arc<Container>, probe: &Value) {
    sleep(seconds(probe, "/initialDelaySeconds", 0)).await;
    let (mut good, mut bad) = (0, 0);
    loop {
        if attempt(pod, c, probe, "Readiness").await {
            (good, bad) = (good + 1, 0);
        } else {
            (good, bad) = (0, bad + 1);
        }
        let ready = c.state.borrow().ready;
        if !ready && good >= number(probe, "/successThreshold", 1) {
            c.set(pod, |s| s.ready = true);
        } else if ready && bad >= number(probe, "/failureThreshold", 3) {
            c.set(pod, |s| s.ready = false);
        }
        // A container that isn't ready yet is asked at least each second, so that nobody waits for nothing.
        sleep(if c.state.borrow().ready { period(probe) } else { period(probe).min(Duration::from_secs(1)) }).await;
    }
}

/// A port by number or by a container port's name.
fn port(c: &Container, value: &Value) -> Result<u16, String> {
    if let Some(n) = value.as_u64() {
        return u16::try_from(n).map_err(|_| format!("port {n} is out of range"));
    }
    let name = value.as_str().unwrap_or_default();
    if let Ok(n) = name.parse() {
        return Ok(n);
    }
    let found = list(&c.spec, "/ports").iter().find(|p| p["name"] == name).and_then(|p| p["containerPort"].as_u64());
    found.and_then(|n| u16::try_from(n).ok()).ok_or_else(|| format!("the container has no port named \"{name}\""))
}

fn address(pod: &Pod, host: &str, port: u16) -> Result<SocketAddr, String> {
    let ip: IpAddr = match host {
        "" => *pod.addresses.get().and_then(|a| a.first()).ok_or("the pod has no address yet")?,
        host => host.parse().map_err(|_| format!("host {host:?} is not an IP address"))?,
    };
    Ok(SocketAddr::new(ip, port))
}

/// Runs one probe or hook.
///
/// # Errors
/// It failed; the text says how.
pub(crate) async fn handler(pod: &Arc<Pod>, c: &Arc<Container>, spec: &Value) -> Result<(), String> {
    let dial = async |host: &str, value: &Value| -> Result<tokio::net::TcpStream, String> {
        let to = address(pod, host, port(c, value)?)?;
        netns::dial(&pod.node.netns, to, Duration::from_secs(30)).await.map_err(|e| format!("dial tcp {to}: {e}"))
    };
    if let Some(get) = spec.get("httpGet") {
        let stream = dial(text(get, "/host"), &get["port"]).await?;
        return if text(get, "/scheme") == "HTTPS" {
            let stream = tls::unverified("localhost", stream).await.map_err(|e| format!("TLS: {e}"))?;
            http_get(TokioIo::new(stream), get, pod, c).await
        } else {
            http_get(TokioIo::new(stream), get, pod, c).await
        };
    }
    if let Some(socket) = spec.get("tcpSocket") {
        return dial(text(socket, "/host"), &socket["port"]).await.map(drop);
    }
    if let Some(grpc) = spec.get("grpc") {
        let stream = dial("", &grpc["port"]).await?;
        return grpc_check(stream, text(grpc, "/service")).await;
    }
    if let Some(exec) = spec.get("exec") {
        let command: Vec<String> = list(exec, "/command").iter().filter_map(|v| v.as_str().map(str::to_owned)).collect();
        let (code, output) = super::backend::run_in(pod, c, command).await.map_err(|e| e.to_string())?;
        return if code == 0 { Ok(()) } else { Err(format!("command exited with {code}: {}", output.trim())) };
    }
    if let Some(pause) = spec.get("sleep") {
        sleep(seconds(pause, "/seconds", 0)).await;
        return Ok(());
    }
    Err("this kind of handler is not supported by the playground".to_owned())
}

async fn http_get<S>(stream: S, get: &Value, pod: &Pod, c: &Container) -> Result<(), String>
where
    S: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let to = address(pod, text(get, "/host"), port(c, &get["port"])?)?;
    let path = match text(get, "/path") {
        "" => "/".to_owned(),
        path if path.starts_with('/') => path.to_owned(),
        path => format!("/{path}"),
    };
    let mut request =
        http::Request::get(path).header("user-agent", "kube-probe/1.33").header("accept", "*/*").header("connection", "close");
    let mut host = to.to_string();
    for header in list(get, "/httpHeaders") {
        let (name, value) = (text(header, "/name"), text(header, "/value"));
        if name.eq_ignore_ascii_case("host") {
            value.clone_into(&mut host);
        } else {
            request = request.header(name, value);
        }
    }
    let request = request.header("host", host).body(Full::<Bytes>::default()).map_err(|e| e.to_string())?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await.map_err(|e| e.to_string())?;
    let driver = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(connection));
    let response = sender.send_request(request).await.map_err(|e| e.to_string())?;
    let status = response.status().as_u16();
    drop(driver);
    if (200..400).contains(&status) { Ok(()) } else { Err(format!("HTTP probe failed with statuscode: {status}")) }
}

/// `grpc.health.v1.Health/Check`: 1 is `SERVING`.
async fn grpc_check(stream: tokio::net::TcpStream, service: &str) -> Result<(), String> {
    let name = service.as_bytes();
    let mut message = Vec::new();
    if let Ok(length @ 1..128) = u8::try_from(name.len()) {
        message.extend([0x0a, length]);
        message.extend(name);
    }
    let mut frame = vec![0];
    frame.extend((message.len() as u32).to_be_bytes());
    frame.extend(message);
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    let driver = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(connection));
    let request = http::Request::post("http://localhost/grpc.health.v1.Health/Check")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(Bytes::from(frame)))
        .map_err(|e| e.to_string())?;
    let response = sender.send_request(request).await.map_err(|e| e.to_string())?;
    let body = response.into_body().collect().await.map_err(|e| e.to_string())?.to_bytes();
    drop(driver);
    if body.get(5..7) == Some(&[0x08, 0x01]) { Ok(()) } else { Err("service unhealthy (the answer isn't SERVING)".to_owned()) }
}
