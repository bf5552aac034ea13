//! Logs, exec, attach and port-forward: the subresources that are byte streams.
//!
//! Exec and attach speak WebSocket with Kubernetes' channel protocols (`v5.channel.k8s.io`, `v4.channel.k8s.io`) or SPDY/3.1,
//! as kubectl before 1.30 does; port-forward speaks SPDY/3.1, tunnelled through a WebSocket
//! (`SPDY/3.1+portforward.k8s.io`) or not, or WebSocket channels.

use super::backend::{ExecRequest, ExecSession, LogOptions};
use super::rest::{Ask, reply, stream};
use super::spdy;
use super::status::Status;
use axum::body::Body;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::extract::{FromRequestParts as _, Request};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use bytes::{BufMut as _, BytesMut};
use futures::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;

/// The container that a request means: the one it names, or the default one.
fn container(ask: &Ask, pod: &Value) -> Result<String, Status> {
    let all: Vec<&str> = ["containers", "initContainers", "ephemeralContainers"]
        .iter()
        .filter_map(|l| pod["spec"][*l].as_array())
        .flatten()
        .filter_map(|c| c["name"].as_str())
        .collect();
    let name = &ask.target.name;
    match ask.param("container") {
        "" => {
            let annotated = pod["metadata"]["annotations"]["kubectl.kubernetes.io/default-container"].as_str();
            let apps = pod["spec"]["containers"].as_array().map_or(0, Vec::len);
            match annotated.filter(|a| all.contains(a)).or_else(|| all.first().copied().filter(|_| apps == 1)) {
                Some(found) => Ok(found.to_owned()),
                None => {
                    Err(Status::bad_request(format!("a container name must be specified for pod {name}, choose one of: {all:?}")))
                }
            }
        }
        given if all.contains(&given) => Ok(given.to_owned()),
        given => Err(Status::bad_request(format!("container {given} is not valid for pod {name}"))),
    }
}

/// `GET …/log`.
pub(super) async fn logs(ask: &Ask) -> Result<Response, Status> {
    let pod = ask.core.get(&ask.info, &ask.target.namespace, &ask.target.name)?;
    let number = |key: &str| ask.param(key).parse().ok();
    let options = LogOptions {
        container: container(ask, &pod)?,
        follow: ask.flag("follow"),
        previous: ask.flag("previous"),
        since_seconds: ask.param("sinceSeconds").parse().ok(),
        since_time: Some(ask.param("sinceTime").to_owned()).filter(|t| !t.is_empty()),
        tail_lines: number("tailLines"),
        timestamps: ask.flag("timestamps"),
        limit_bytes: number("limitBytes"),
    };
    let backend = ask.core.backend()?;
    Ok(stream(backend.logs(&ask.target.namespace, &ask.target.name, options).await?))
}

/// Exec, attach, port-forward.
pub(super) async fn upgrade(ask: Ask, request: Request) -> Result<Response, Status> {
    let pod = ask.core.get(&ask.info, &ask.target.namespace, &ask.target.name)?;
    let backend = ask.core.backend()?;
    let (ns, name) = (ask.target.namespace.clone(), ask.target.name.clone());
    let over_spdy = header_words(request.headers(), header::UPGRADE.as_str()).any(|w| w.eq_ignore_ascii_case("SPDY/3.1"));
    if ask.target.sub == "portforward" {
        if over_spdy {
            return over(request, &[PORT_FORWARD], move |streams| spdy::forward(streams, backend, ns, name));
        }
        let ports: Vec<u16> = ask
            .query
            .get("ports")
            .into_iter()
            .flatten()
            .flat_map(|p| p.split(',').filter_map(|p| p.parse().ok()).collect::<Vec<_>>())
            .collect();
        let upgrade = websocket(request).await?.protocols([TUNNEL, "v4.channel.k8s.io", PORT_FORWARD]);
        let tunnelled = upgrade.selected_protocol().is_some_and(|p| p == TUNNEL);
        return Ok(upgrade.on_upgrade(move |socket| async move {
            if tunnelled {
                spdy::forward(spdy::serve(tunnel(socket)), backend, ns, name).await;
            } else {
                forward(socket, backend, ns, name, ports).await;
            }
        }));
    }
    let tty = ask.flag("tty");
    let wanted = ExecRequest {
        container: container(&ask, &pod)?,
        command: if ask.target.sub == "attach" { Vec::new() } else { ask.query.get("command").cloned().unwrap_or_default() },
        stdin: ask.flag("stdin"),
        stdout: ask.flag("stdout"),
        stderr: ask.flag("stderr") && !tty,
        tty,
    };
    let session = match backend.exec(&ns, &name, wanted).await {
        Ok(session) => session,
        Err(status) => return Ok(reply(status.code, &status.to_json())),
    };
    if over_spdy {
        return over(request, &["v4.channel.k8s.io"], move |streams| spdy::exec(streams, session, tty, outcome));
    }
    let upgrade = websocket(request).await?.protocols(["v5.channel.k8s.io", "v4.channel.k8s.io"]);
    Ok(upgrade.on_upgrade(move |socket| exec(socket, session)))
}

const PORT_FORWARD: &str = "portforward.k8s.io";
const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";

async fn websocket(request: Request) -> Result<WebSocketUpgrade, Status> {
    let (mut parts, _) = request.into_parts();
    let upgrade = WebSocketUpgrade::from_request_parts(&mut parts, &()).await;
    upgrade.map_err(|e| Status::bad_request(format!("an upgrade to WebSocket or to SPDY/3.1 is required: {e}")))
}

fn header_words<'a>(headers: &'a HeaderMap, name: &'a str) -> impl Iterator<Item = &'a str> {
    headers.get_all(name).iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(',')).map(str::trim)
}

/// Switches a request to SPDY/3.1 and serves the streams that the client opens, with the first of our protocols that the
/// client offers.
fn over<F: Future<Output = ()> + Send + 'static>(
    mut request: Request,
    ours: &[&'static str],
    serve: impl FnOnce(mpsc::Receiver<spdy::Stream>) -> F + Send + 'static,
) -> Result<Response, Status> {
    const PROTOCOL: &str = "x-stream-protocol-version";
    let chosen = ours.iter().find(|p| header_words(request.headers(), PROTOCOL).any(|w| w == **p));
    let chosen = chosen.ok_or_else(|| {
        Status::new(
            403,
            "Forbidden",
            format!("unable to upgrade: none of the stream protocols that the client offers is one of {ours:?}"),
        )
    })?;
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        // A client that goes away before the switch has nobody to tell.
        if let Ok(io) = upgrade.await {
            serve(spdy::serve(hyper_util::rt::TokioIo::new(io))).await;
        }
    });
    let response = Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, "SPDY/3.1")
        .header(PROTOCOL, *chosen);
    response.body(Body::empty()).map_err(Status::internal)
}

/// The end of a WebSocket that went well. Without this code kubectl reports an error.
fn closed() -> Message {
    Message::Close(Some(CloseFrame { code: axum::extract::ws::close_code::NORMAL, reason: "".into() }))
}

/// A WebSocket whose binary messages are one stream of bytes.
fn tunnel(socket: WebSocket) -> tokio::io::DuplexStream {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let (mut sink, mut source) = socket.split();
    let (mut read, mut write) = tokio::io::split(far);
    tokio::spawn(async move {
        while let Some(Ok(message)) = source.next().await {
            match message {
                Message::Binary(data) if write.write_all(&data).await.is_err() => return,
                Message::Close(_) => break,
                _ => {}
            }
        }
        let _ = write.shutdown().await;
    });
    tokio::spawn(async move {
        let mut buffer = vec![0; 32 * 1024];
        while let Ok(n @ 1..) = read.read(&mut buffer).await {
            if sink.send(Message::Binary(bytes::Bytes::copy_from_slice(&buffer[..n]))).await.is_err() {
                return;
            }
        }
        let _ = sink.send(closed()).await;
    });
    near
}

/// How a command ended, as clients read it from the error channel.
fn outcome(code: &std::io::Result<i32>) -> Value {
    match code {
        Ok(0) => json!({"metadata": {}, "status": "Success"}),
        Ok(code) => {
            json!({"metadata": {}, "status": "Failure", "message": format!("command terminated with non-zero exit code: exit status {code}"), "reason": "NonZeroExitCode",
            "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]}})
        }
        Err(error) => {
            json!({"metadata": {}, "status": "Failure", "message": error.to_string(), "reason": "InternalError", "code": 500})
        }
    }
}

fn frame(channel: u8, data: &[u8]) -> Message {
    let mut bytes = BytesMut::with_capacity(data.len() + 1);
    bytes.put_u8(channel);
    bytes.put_slice(data);
    Message::Binary(bytes.freeze())
}

async fn exec(socket: WebSocket, session: ExecSession) {
    let (mut sink, mut source) = socket.split();
    let (out, mut frames) = mpsc::channel::<Message>(64);
    let writer = tokio::spawn(async move {
        while let Some(message) = frames.recv().await {
            if sink.send(message).await.is_err() {
                return;
            }
        }
        let _ = sink.send(closed()).await;
        let _ = sink.close().await;
    });
    let pump = |channel: u8, stream: Option<std::pin::Pin<Box<dyn tokio::io::AsyncRead + Send>>>| {
        let out = out.clone();
        tokio::spawn(async move {
            let Some(mut stream) = stream else { return };
            let mut buffer = vec![0; 32 * 1024];
            while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                if out.send(frame(channel, &buffer[..n])).await.is_err() {
                    return;
                }
            }
        })
    };
    let (stdout, stderr) = (pump(1, session.stdout), pump(2, session.stderr));
    let mut stdin = session.stdin;
    let resize = session.resize;
    let (gone, mut left) = mpsc::channel::<()>(1);
    let reader = tokio::spawn(async move {
        while let Some(Ok(message)) = source.next().await {
            let Message::Binary(data) = message else {
                if matches!(message, Message::Close(_)) {
                    break;
                }
                continue;
            };
            match data.first() {
                Some(0) => {
                    if let Some(pipe) = &mut stdin
                        && pipe.write_all(&data[1..]).await.is_err()
                    {
                        stdin = None;
                    }
                }
                // v5: a channel is closed.
                Some(255) if data.get(1) == Some(&0) => stdin = None,
                Some(4) => {
                    let size: Value = serde_json::from_slice(&data[1..]).unwrap_or_default();
                    let number = |k: &str| size[k].as_u64().and_then(|n| u16::try_from(n).ok()).unwrap_or(0);
                    if let Some(resize) = &resize {
                        let _ = resize.send((number("Width"), number("Height"))).await;
                    }
                }
                _ => {}
            }
        }
        drop(gone);
    });
    let status = tokio::select! {
        code = session.exit => outcome(&code),
        _ = left.recv() => {
            stdout.abort();
            stderr.abort();
            return;
        }
    };
    let _ = stdout.await;
    let _ = stderr.await;
    let _ = out.send(frame(3, status.to_string().as_bytes())).await;
    drop(out);
    let _ = writer.await;
    reader.abort();
}

/// Port-forward over channels: for the i-th port, channel 2i is data and 2i+1 errors; each begins with the port.
async fn forward(socket: WebSocket, backend: Arc<dyn super::backend::NodeBackend>, ns: String, name: String, ports: Vec<u16>) {
    let (mut sink, mut source) = socket.split();
    let (out, mut frames) = mpsc::channel::<Message>(64);
    tokio::spawn(async move {
        while let Some(message) = frames.recv().await {
            if sink.send(message).await.is_err() {
                return;
            }
        }
        let _ = sink.send(closed()).await;
        let _ = sink.close().await;
    });
    let mut pipes = Vec::new();
    for (i, port) in ports.iter().enumerate() {
        let data = u8::try_from(i * 2).unwrap_or(u8::MAX);
        for channel in [data, data + 1] {
            let _ = out.send(frame(channel, &port.to_le_bytes())).await;
        }
        match backend.port_forward(&ns, &name, *port).await {
            Ok(stream) => {
                let (mut read, write) = tokio::io::split(stream);
                pipes.push(Some(write));
                let out = out.clone();
                tokio::spawn(async move {
                    let mut buffer = vec![0; 32 * 1024];
                    while let Ok(n @ 1..) = read.read(&mut buffer).await {
                        if out.send(frame(data, &buffer[..n])).await.is_err() {
                            return;
                        }
                    }
                });
            }
            Err(status) => {
                let _ = out.send(frame(data + 1, status.message.as_bytes())).await;
                pipes.push(None);
            }
        }
    }
    drop(out);
    while let Some(Ok(message)) = source.next().await {
        let Message::Binary(data) = message else {
            if matches!(message, Message::Close(_)) {
                return;
            }
            continue;
        };
        let Some((channel, payload)) = data.split_first() else { continue };
        if let Some(Some(pipe)) = pipes.get_mut(usize::from(*channel / 2))
            && channel % 2 == 0
            && pipe.write_all(payload).await.is_err()
        {
            return;
        }
    }
}
