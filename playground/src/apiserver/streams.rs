//! Logs, exec, attach and port-forward: the subresources that are byte streams. Exec and port-forward speak WebSocket with
//! Kubernetes' channel protocols (`v5.channel.k8s.io`, `v4.channel.k8s.io`).

use super::backend::{ExecRequest, ExecSession, LogOptions};
use super::rest::{Ask, reply, stream};
use super::status::Status;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::extract::{FromRequestParts as _, Request};
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
                None => Err(Status::bad_request(format!("a container name must be specified for pod {name}, choose one of: {all:?}"))),
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
    let (mut parts, _) = request.into_parts();
    let upgrade = WebSocketUpgrade::from_request_parts(&mut parts, &()).await;
    let upgrade = upgrade.map_err(|_| {
        Status::bad_request("the playground speaks WebSocket here, not SPDY: use kubectl 1.31 or newer (or set KUBECTL_REMOTE_COMMAND_WEBSOCKETS=true with 1.29 and 1.30)")
    })?;
    let backend = ask.core.backend()?;
    let (ns, name) = (ask.target.namespace.clone(), ask.target.name.clone());
    if ask.target.sub == "portforward" {
        let ports: Vec<u16> = ask.query.get("ports").into_iter().flatten().flat_map(|p| p.split(',').filter_map(|p| p.parse().ok()).collect::<Vec<_>>()).collect();
        let upgrade = upgrade.protocols(["v4.channel.k8s.io", "portforward.k8s.io"]);
        return Ok(upgrade.on_upgrade(move |socket| forward(socket, backend, ns, name, ports)));
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
    let upgrade = upgrade.protocols(["v5.channel.k8s.io", "v4.channel.k8s.io"]);
    Ok(upgrade.on_upgrade(move |socket| exec(socket, session)))
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
        // Without the code of a normal end kubectl reports an error.
        let _ = sink.send(Message::Close(Some(CloseFrame { code: close_code::NORMAL, reason: "".into() }))).await;
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
        code = session.exit => match code {
            Ok(0) => json!({"metadata": {}, "status": "Success"}),
            Ok(code) => json!({"metadata": {}, "status": "Failure", "message": format!("command terminated with non-zero exit code: exit status {code}"), "reason": "NonZeroExitCode",
                "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]}}),
            Err(error) => json!({"metadata": {}, "status": "Failure", "message": error.to_string(), "reason": "InternalError", "code": 500}),
        },
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
        // Without the code of a normal end kubectl reports an error.
        let _ = sink.send(Message::Close(Some(CloseFrame { code: close_code::NORMAL, reason: "".into() }))).await;
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
