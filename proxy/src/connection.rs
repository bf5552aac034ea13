//! The life of an accepted connection, top to bottom: find out where it goes and what it speaks, then hand it to HTTP or
//! carry its bytes.

use crate::conn::{Direction, Downstream};
use crate::detect::{self, Leaning, Verdict};
use crate::http::{self, HttpVersion};
use crate::inbound::Config;
use crate::io::Prefixed;
use crate::log;
use crate::settings::{Listener, Protocol};
use crate::sys::{self, Pipes};
use crate::telemetry::{ConnectionRecord, Detected, Flag};
use crate::upstream::{self, ConnectError};
use crate::worker::Worker;
use arc_swap::ArcSwap;
use bytes::BytesMut;
use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;
use tokio::net::TcpStream;

/// What a worker's connections need beside [`Worker`].
#[derive(Debug)]
pub struct Context {
    /// The worker.
    pub worker: Rc<Worker>,
    /// What is known of the pod.
    pub config: Arc<ArcSwap<Config>>,
    /// Free pipes.
    pub pipes: Pipes,
    /// How many clients are served.
    pub clients: Cell<u64>,
}

/// Serves a connection to its end.
pub async fn serve(stream: TcpStream, peer: SocketAddr, listener: Rc<Listener>, context: Rc<Context>) {
    let worker = &context.worker;
    let _guard = worker.drain.guard();
    let down = match describe(&stream, peer, &listener, worker) {
        Ok(down) => down,
        Err(error) => {
            log::connection_error(&format_args!("{peer}: no original destination: {error}"));
            return sys::reset_on_close(&stream);
        }
    };
    let _open = worker.recorder.opened(down.direction);
    let target = down.original.0;
    if !down.fixed && upstream::loops(&worker.settings, target) {
        worker.recorder.loop_refused();
        let port = target.port();
        log::connection_error(&format_args!(
            "{peer}: refused, its destination {target} is the proxy's own port {port}; connect the app's port instead"
        ));
        return sys::reset_on_close(&stream);
    }
    let declared = declared(&listener, &down, &context);
    let io = Prefixed::new(bytes::Bytes::new(), stream);
    match declared {
        Protocol::Tcp => opaque(io, None, down, Detected::Tcp, &context).await,
        Protocol::Http => http(io, HttpVersion::Auto, Detected::Http1, down, &context).await,
        Protocol::Http1 => http(io, HttpVersion::H1, Detected::Http1, down, &context).await,
        Protocol::Http2 => http(io, HttpVersion::H2, Detected::Http2, down, &context).await,
        // The server name is the client's to send first; a client that doesn't is carried all the same.
        Protocol::Tls | Protocol::Detect => detected(io, down, &context).await,
    }
}

fn describe(stream: &TcpStream, peer: SocketAddr, listener: &Listener, worker: &Worker) -> io::Result<Downstream> {
    stream.set_nodelay(true)?;
    let local = stream.local_addr()?;
    let original = match listener.upstream {
        Some(upstream) => crate::conn::OrigDst(upstream),
        None => sys::original_dst(stream, worker.settings.mode, listener.direction)?,
    };
    Ok(Downstream {
        peer,
        local,
        original,
        direction: listener.direction,
        accepted: Instant::now(),
        fixed: listener.upstream.is_some(),
    })
}

/// The listener's own protocol, else the pod's annotation, else (inbound) what is declared for the port.
fn declared(listener: &Listener, down: &Downstream, context: &Context) -> Protocol {
    let port = down.original.0.port();
    if listener.protocol != Protocol::Detect {
        listener.protocol
    } else if context.worker.settings.is_opaque(port) {
        Protocol::Tcp
    } else if down.direction == Direction::Inbound {
        context.config.load().protocol(port)
    } else {
        Protocol::Detect
    }
}

async fn http(io: Prefixed<TcpStream>, version: HttpVersion, kind: Detected, down: Downstream, context: &Context) {
    context.worker.recorder.connection_kind(down.direction, kind);
    // Boxed: the future of an opaque connection need not be as large as that of an HTTP one.
    Box::pin(http::serve(io, version, down, Rc::clone(&context.worker))).await;
}

async fn detected(io: Prefixed<TcpStream>, down: Downstream, context: &Context) {
    let (_, client) = io.into_parts();
    let timeouts = &context.worker.settings.timeouts;
    let mut ahead = None;
    if tokio::time::timeout(timeouts.detect_silence, speaks(&client)).await.is_err() {
        // A silent client: maybe the server is to speak first. Whoever does decides.
        let connecting = async {
            let plan = upstream::plan(&context.worker, &down);
            let server = upstream::connect(&context.worker, &plan).await?;
            Ok::<_, ConnectError>(server)
        };
        let mut connecting = std::pin::pin!(connecting);
        let client_first = tokio::select! {
            biased;
            () = speaks(&client) => true,
            result = &mut connecting => {
                match result {
                    Ok(server) => ahead = Some(server),
                    Err(error) => return refuse(client, &error, down, context),
                }
                false
            }
        };
        if !client_first && let Some(server) = ahead.take() {
            let server_first = tokio::select! {
                biased;
                () = speaks(&client) => false,
                () = speaks(&server) => true,
            };
            let io = Prefixed::new(bytes::Bytes::new(), client);
            if server_first {
                return opaque(io, Some(server), down, Detected::ServerFirst, context).await;
            }
            return judged(io, Some(server), down, context).await;
        }
    }
    judged(Prefixed::new(bytes::Bytes::new(), client), ahead, down, context).await;
}

/// Waits until a side has sent something, has ended or is broken, and takes nothing from it. Readiness alone does not say
/// so: a new socket counts as ready until a read has found nothing.
async fn speaks(stream: &TcpStream) {
    let _ = stream.peek(&mut [0]).await;
}

/// Reads what the client says first and acts on it.
async fn judged(io: Prefixed<TcpStream>, ahead: Option<TcpStream>, down: Downstream, context: &Context) {
    let (_, client) = io.into_parts();
    let mut seen = BytesMut::new();
    let reading = tokio::time::timeout(context.worker.settings.timeouts.detect, first_bytes(&client, &mut seen));
    let verdict = match reading.await {
        Ok(Ok(verdict)) => verdict,
        Ok(Err(_)) => {
            context.worker.recorder.refused(&closed(&down, ahead.as_ref(), Some(Flag::DownstreamTermination)));
            if let Some(server) = &ahead {
                sys::reset_on_close(server);
            }
            return sys::reset_on_close(&client);
        }
        Err(_) => match detect::judge(&seen) {
            Verdict::More(Leaning::Http1) => Verdict::Http1,
            Verdict::More(Leaning::Tls) => Verdict::Tls(None),
            Verdict::More(Leaning::Opaque) => Verdict::Opaque,
            verdict => verdict,
        },
    };
    let io = Prefixed::new(seen.freeze(), client);
    match verdict {
        Verdict::Http1 => {
            drop(ahead);
            http(io, HttpVersion::H1, Detected::Http1, down, context).await;
        }
        Verdict::Http2 => {
            drop(ahead);
            http(io, HttpVersion::H2, Detected::Http2, down, context).await;
        }
        Verdict::Tls(server_name) => {
            tracing::debug!(peer = %down.peer, destination = %down.original.0, ?server_name, "TLS is passed through");
            opaque(io, ahead, down, Detected::Tls, context).await;
        }
        Verdict::Opaque | Verdict::More(_) => opaque(io, ahead, down, Detected::Tcp, context).await,
    }
}

/// Reads until there is a verdict or the client has ended its stream. What was read is in `seen`, whatever becomes of the
/// future.
async fn first_bytes(client: &TcpStream, seen: &mut BytesMut) -> io::Result<Verdict> {
    loop {
        client.readable().await?;
        seen.reserve(1024);
        match client.try_read_buf(seen) {
            Ok(0) => return Ok(Verdict::Opaque),
            Ok(_) => match detect::judge(seen) {
                Verdict::More(_) => {}
                verdict => return Ok(verdict),
            },
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// Carries bytes that are not looked into.
async fn opaque(io: Prefixed<TcpStream>, ahead: Option<TcpStream>, down: Downstream, kind: Detected, context: &Context) {
    let worker = &context.worker;
    worker.recorder.connection_kind(down.direction, kind);
    let (prefix, client) = io.into_parts();
    let server = match ahead {
        Some(server) => server,
        None => match upstream::connect(worker, &upstream::plan(worker, &down)).await {
            Ok(server) => server,
            Err(error) => return refuse(client, &error, down, context),
        },
    };
    let upstream = server.peer_addr().ok();
    worker.recorder.tcp_opened(&down);
    let outcome = crate::tcp::carry(&prefix, client, server, &context.pipes).await;
    worker.recorder.connection(&ConnectionRecord {
        downstream: down,
        upstream,
        flag: outcome.flag,
        duration: down.accepted.elapsed(),
        received: outcome.received,
        sent: outcome.sent,
    });
}

fn refuse(client: TcpStream, error: &ConnectError, down: Downstream, context: &Context) {
    log::connection_error(&format_args!("{} {}: {error}", down.direction.as_str(), down.peer));
    context.worker.recorder.refused(&closed(&down, None, Some(error.flag())));
    // The client sees what it would have seen without a proxy: its connection broken.
    sys::reset_on_close(&client);
}

fn closed(down: &Downstream, server: Option<&TcpStream>, flag: Option<Flag>) -> ConnectionRecord {
    ConnectionRecord {
        downstream: *down,
        upstream: server.and_then(|server| server.peer_addr().ok()),
        flag,
        duration: down.accepted.elapsed(),
        received: 0,
        sent: 0,
    }
}
