//! The life of an accepted connection, top to bottom: find out where it goes and what it speaks, then hand it to HTTP or
//! carry its bytes. What comes in for the app passes [`inbound`] first, which tells mutual TLS, plaintext and the app's own TLS apart.

mod admit;
mod inbound;

use crate::balance::{Pick, Picked};
use crate::conn::{Arrival, Direction, Downstream};
use crate::detect::{self, Hello, Leaning, Verdict};
use crate::http::{self, HttpVersion};
use crate::io::{Prefixed, Stream};
use crate::log;
use crate::settings::{Listener, Protocol};
use crate::sys::{self, Pipes};
use crate::telemetry::{ConnectionRecord, Detected, Flag};
use crate::tls::Alpn;
use crate::upstream::{self, ConnectError, ENDPOINTS};
use crate::worker::Worker;
use bytes::{Bytes, BytesMut};
use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Instant;
use tokio::net::TcpStream;

/// What a worker's connections need beside [`Worker`].
#[derive(Debug)]
pub struct Context {
    /// The worker.
    pub worker: Rc<Worker>,
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
    let io = Prefixed::new(Bytes::new(), Stream::from(stream));
    let arrival = Arrival::from(down);
    match down.direction {
        Direction::Outbound => outbound(io, declared, arrival, &context).await,
        Direction::Inbound => inbound::serve(io, declared, arrival, &context).await,
    }
}

/// The app's own connections: what is known of the destination says what is spoken, and who has to be there.
async fn outbound(io: Prefixed<Stream>, declared: Protocol, mut arrival: Arrival, context: &Context) {
    arrival.route = context.worker.routes.to(arrival.down.original.0).await;
    let declared = match &arrival.route {
        Some(route) if declared == Protocol::Detect => route.protocol(),
        _ => declared,
    };
    dispatch(io, declared, arrival, context).await;
}

/// Hands a connection on by what is declared.
async fn dispatch(io: Prefixed<Stream>, declared: Protocol, arrival: Arrival, context: &Context) {
    match declared {
        Protocol::Tcp => opaque(io, None, arrival, Detected::Tcp, context).await,
        Protocol::Http => http(io, HttpVersion::Auto, Detected::Http1, arrival, context).await,
        Protocol::Http1 => http(io, HttpVersion::H1, Detected::Http1, arrival, context).await,
        Protocol::Http2 => http(io, HttpVersion::H2, Detected::Http2, arrival, context).await,
        // The server name is the client's to send first; a client that doesn't is carried all the same.
        Protocol::Tls | Protocol::Detect => detected(io, declared, arrival, context).await,
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
        principal: None,
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
        context.worker.config.load().protocol(port)
    } else {
        Protocol::Detect
    }
}

async fn http(io: Prefixed<Stream>, version: HttpVersion, kind: Detected, arrival: Arrival, context: &Context) {
    context.worker.recorder.connection_kind(arrival.down.direction, kind);
    http::serve(io, version, arrival, Rc::clone(&context.worker)).await;
}

/// Finds out what is spoken, from whoever speaks first.
async fn detected(mut client: Prefixed<Stream>, declared: Protocol, arrival: Arrival, context: &Context) {
    let timeouts = &context.worker.settings.timeouts;
    let mut ahead = None;
    let silent = tokio::time::timeout(timeouts.detect_silence, client.speaks()).await.is_err();
    if silent && admit::is_doubtful(&arrival, &context.worker) {
        // No connection to the app for one who may not have it. If it is HTTP, that will be judged by its requests.
        if tokio::time::timeout(timeouts.detect, client.speaks()).await.is_err() {
            return opaque(client, None, arrival, Detected::Tcp, context).await;
        }
    } else if silent {
        // A silent client: maybe the server is to speak first. Whoever does decides.
        let connected = {
            let mut connecting = std::pin::pin!(connect(&arrival, Alpn::Detect, context));
            tokio::select! {
                biased;
                () = client.speaks() => None,
                result = &mut connecting => Some(result),
            }
        };
        let server = match connected {
            None => None,
            Some(Ok(server)) => Some(server),
            Some(Err(error)) => return refuse(client, &error, &arrival.down, context),
        };
        if let Some(mut server) = server {
            let server_first = tokio::select! {
                biased;
                () = client.speaks() => false,
                () = server.io.speaks() => true,
            };
            if server_first {
                return opaque(client, Some(server), arrival, Detected::ServerFirst, context).await;
            }
            ahead = Some(server);
        }
    }
    judged(client, ahead, declared, arrival, context).await;
}

/// Reads what the client says first and acts on it.
async fn judged(
    mut client: Prefixed<Stream>,
    ahead: Option<Server>,
    declared: Protocol,
    mut arrival: Arrival,
    context: &Context,
) {
    let mut seen = BytesMut::new();
    // Mutual TLS inside mutual TLS is not ours.
    let ours = inbound::terminates(&arrival.down, context);
    let judge = |bytes: &[u8]| if declared == Protocol::Tcp { detect::tls_or_opaque(bytes) } else { detect::judge(bytes) };
    let patience = context.worker.settings.timeouts.detect;
    let verdict = match tokio::time::timeout(patience, first_bytes(&mut client, &mut seen, judge)).await {
        Ok(Ok(verdict)) => verdict,
        Ok(Err(_)) => {
            context.worker.recorder.refused(&closed(&arrival.down, ahead.as_ref(), Some(Flag::DownstreamTermination)));
            if let Some(server) = &ahead {
                sys::reset_on_close(server.io.get_ref().tcp());
            }
            return sys::reset_on_close(client.get_ref().tcp());
        }
        Err(_) => match judge(&seen) {
            Verdict::More(Leaning::Http1) => Verdict::Http1,
            Verdict::More(Leaning::Tls) => Verdict::Tls(Hello::default()),
            Verdict::More(Leaning::Opaque) => Verdict::Opaque,
            verdict => verdict,
        },
    };
    let (_, stream) = client.into_parts();
    let io = Prefixed::new(seen.freeze(), stream);
    match verdict {
        Verdict::Http1 => {
            drop(ahead);
            http(io, HttpVersion::H1, Detected::Http1, arrival, context).await;
        }
        Verdict::Http2 => {
            drop(ahead);
            http(io, HttpVersion::H2, Detected::Http2, arrival, context).await;
        }
        Verdict::Tls(hello) if hello.mesh && ours => {
            drop(ahead);
            // Boxed: what is inside begins anew.
            Box::pin(inbound::secure(io, declared, arrival, context)).await;
        }
        Verdict::Tls(hello) => {
            tracing::debug!(peer = %arrival.down.peer, destination = %arrival.down.original.0, ?hello, "TLS is passed through");
            arrival.server_name = hello.server_name.map(Rc::from);
            opaque(io, ahead, arrival, Detected::Tls, context).await;
        }
        Verdict::Opaque | Verdict::More(_) => opaque(io, ahead, arrival, Detected::Tcp, context).await,
    }
}

/// Reads until there is a verdict or the client has ended its stream. What was read is in `seen`, whatever becomes of the
/// future.
async fn first_bytes(
    client: &mut Prefixed<Stream>,
    seen: &mut BytesMut,
    judge: impl Fn(&[u8]) -> Verdict,
) -> io::Result<Verdict> {
    loop {
        if client.look(seen).await? == 0 {
            return Ok(Verdict::Opaque);
        }
        match judge(seen) {
            Verdict::More(_) => {}
            verdict => return Ok(verdict),
        }
    }
}

/// A connection to a destination, and the endpoint's count.
struct Server {
    io: Prefixed<Stream>,
    address: SocketAddr,
    picked: Option<Picked>,
}

/// Connects where an opaque connection goes: to the address itself, or to an endpoint; to another one if that can't be connected.
async fn connect(arrival: &Arrival, alpn: Alpn, context: &Context) -> Result<Server, ConnectError> {
    let worker = &context.worker;
    let mut not = None;
    let mut attempts = 0;
    loop {
        attempts += 1;
        let picked = match arrival.route.as_ref().map(|route| route.pick(&worker.routes, not)) {
            None => None,
            Some(Pick::Through) => {
                worker.recorder.unresolved();
                None
            }
            Some(Pick::Endpoint(picked)) => Some(picked),
            Some(Pick::Nobody(host)) => return Err(ConnectError::Nobody(host)),
        };
        let plan = match &picked {
            Some(picked) => upstream::to_endpoint(picked.endpoint()),
            None => upstream::plan(worker, &arrival.down),
        };
        match upstream::open(worker, &plan, alpn).await {
            Ok(stream) => return Ok(Server { io: Prefixed::new(Bytes::new(), stream), address: plan.target, picked }),
            Err(error) if picked.is_some() && error.is_of_endpoint() && attempts < ENDPOINTS => not = Some(plan.target),
            Err(error) => return Err(error),
        }
    }
}

/// Carries bytes that are not looked into.
async fn opaque(io: Prefixed<Stream>, ahead: Option<Server>, arrival: Arrival, kind: Detected, context: &Context) {
    let worker = &context.worker;
    let down = &arrival.down;
    worker.recorder.connection_kind(down.direction, kind);
    if down.direction == Direction::Inbound
        && let Err(flag) = admit::admitted(&arrival, worker).await
    {
        // A server that spoke first was connected because nothing spoke against it then.
        worker.recorder.refused(&closed(down, ahead.as_ref(), Some(flag)));
        if let Some(server) = &ahead {
            sys::reset_on_close(server.io.get_ref().tcp());
        }
        return sys::reset_on_close(io.get_ref().tcp());
    }
    let server = match ahead {
        Some(server) => server,
        None => match connect(&arrival, Alpn::Tcp, context).await {
            Ok(server) => server,
            Err(error) => return refuse(io, &error, down, context),
        },
    };
    let Server { io: upstream, address, picked } = server;
    let principal = picked.as_ref().and_then(|picked| picked.endpoint().expected);
    worker.recorder.tcp_opened(down, principal);
    let outcome = crate::tcp::carry(io, upstream, &context.pipes, admit::unwelcome(worker, &arrival)).await;
    worker.recorder.connection(&ConnectionRecord {
        downstream: down,
        upstream: Some(address),
        principal,
        flag: outcome.flag,
        duration: down.accepted.elapsed(),
        received: outcome.received,
        sent: outcome.sent,
    });
}

fn refuse(client: Prefixed<Stream>, error: &ConnectError, down: &Downstream, context: &Context) {
    log::connection_error(&format_args!("{} {}: {error}", down.direction.as_str(), down.peer));
    context.worker.recorder.refused(&closed(down, None, Some(error.flag())));
    // The client sees what it would have seen without a proxy: its connection broken.
    sys::reset_on_close(client.get_ref().tcp());
}

fn closed<'a>(down: &'a Downstream, server: Option<&Server>, flag: Option<Flag>) -> ConnectionRecord<'a> {
    ConnectionRecord {
        downstream: down,
        upstream: server.map(|server| server.address),
        principal: None,
        flag,
        duration: down.accepted.elapsed(),
        received: 0,
        sent: 0,
    }
}
