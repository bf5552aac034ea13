//! HTTP/1.x and HTTP/2 forwarding: hyper's connections on both sides, nothing stacked on them.
//!
//! A connection's life is [`serve`]: it is told which version it speaks, and every request on it goes through
//! `forward`, which checks and adapts the head (`headers`), takes a connection to the destination from the worker's
//! [`Pool`], and streams the bodies (`body`) through. On HTTP/1 the raw bytes pass a `screen` first, which refuses what can be
//! read in two ways. A request's end, however it comes, closes one record (`tally`).
//!
//! What a request costs: no boxed future, no copied header map, no lock, no log line. What fails: a
//! request that breaks the protocol is refused with 400 or 431 and the connection closed; a destination that cannot be reached is
//! a 503, one that breaks the protocol a 502, each with a flag that the metrics carry too (`reply`).

mod admit;
mod ask;
mod body;
mod cork;
mod forward;
mod headers;
mod pool;
mod reply;
mod screen;
mod tally;
mod tap;
mod tunnel;

pub(crate) use ask::about_connection as ask_about;
pub use pool::Pool;

use crate::balance::{Pick, Picked};
use crate::conn::{Arrival, Downstream};
use crate::io::{Prefixed, Stream};
use crate::telemetry::{Flag, RequestProtocol, RequestRecord};
use crate::upstream::{self, ConnectError, Plan};
use crate::worker::Worker;
use bytes::BytesMut;
use headers::{MAX_FIELDS, Wire};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use pool::LocalExecutor;
use screen::{IDLE, Link, Screened};
use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};
use tally::Tally;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tunnel::Tunnel;

/// What a request's or response's head may measure.
const MAX_HEAD: usize = 100 * 1024;
/// The read buffer of a client's connection grows up to this under load, and shrinks again.
const H1_BUFFER: usize = 128 * 1024;
/// Streams that a client may have open on one connection.
const H2_STREAMS: u32 = 1000;
const H2_STREAM_WINDOW: u32 = 512 * 1024;
const H2_CONNECTION_WINDOW: u32 = 2 * 1024 * 1024;
const H2_SEND_BUFFER: usize = 256 * 1024;
/// Streams that a client may reset before they were even looked at (rapid reset, CVE-2023-44487).
const H2_PENDING_RESETS: usize = 50;
/// Streams that a client may make us reset by breaking the protocol.
const H2_ERROR_RESETS: usize = 256;
/// A client that has not answered a ping for [`H2_PING_PATIENCE`] is gone.
const H2_PING: Duration = Duration::from_secs(60);
const H2_PING_PATIENCE: Duration = Duration::from_secs(20);
/// How long a refused connection is read on, so that the answer is not lost to a reset, and how much of it.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 256 * 1024;

/// A keep-alive connection without a request for this long gives its buffers (16 KiB) back. Longer than the pause between the
/// requests of a busy client, for which setting them up again would be a cost.
const REST: Duration = Duration::from_millis(100);

const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The version that a connection speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HttpVersion {
    /// HTTP/1.0 or HTTP/1.1.
    H1,
    /// HTTP/2 with prior knowledge.
    H2,
    /// Either: told by the first bytes.
    Auto,
}

/// What all requests of a client's connection share.
#[derive(Debug)]
pub(crate) struct Hop {
    worker: Rc<Worker>,
    arrival: Arrival,
    /// How to go to the very address that the client wanted.
    through: Plan,
    wire: Wire,
    /// HTTP/1 only.
    link: Option<Rc<Link>>,
    tunnel: RefCell<Option<(Tunnel, Tally)>>,
    /// What the app is told of the caller, once a request has asked.
    client_cert: std::cell::OnceCell<Option<http::header::HeaderValue>>,
}

impl Hop {
    fn new(worker: Rc<Worker>, arrival: Arrival, wire: Wire, link: Option<Rc<Link>>) -> Rc<Self> {
        let through = upstream::plan(&worker, &arrival.down);
        let (tunnel, client_cert) = (RefCell::default(), std::cell::OnceCell::new());
        Rc::new(Self { worker, arrival, through, wire, link, tunnel, client_cert })
    }

    fn down(&self) -> &Downstream {
        &self.arrival.down
    }

    /// Where a request goes: to another endpoint than `not`, if there is a choice.
    fn target(&self, not: Option<SocketAddr>) -> Result<Target, ConnectError> {
        let Some(route) = &self.arrival.route else { return Ok(Target { plan: self.through, picked: None }) };
        match route.pick(&self.worker.routes, not) {
            Pick::Through => {
                self.worker.recorder.unresolved();
                Ok(Target { plan: self.through, picked: None })
            }
            Pick::Endpoint(picked) => Ok(Target { plan: upstream::to_endpoint(picked.endpoint()), picked: Some(picked) }),
            Pick::Nobody(host) => Err(ConnectError::Nobody(host)),
        }
    }

    /// The HTTP/1 connection is to go on as a tunnel when the response's head is written.
    fn become_tunnel(&self, tunnel: Tunnel, tally: Tally) {
        *self.tunnel.borrow_mut() = Some((tunnel, tally));
    }
}

/// Where a request goes.
#[derive(Debug)]
struct Target {
    plan: Plan,
    /// Keeps the endpoint's count.
    picked: Option<Picked>,
}

/// Serves a connection to its end. The caller holds the drain guard meanwhile.
///
/// A client that has said nothing costs its socket and this small future: buffers and the state of HTTP come with its first byte. It may be silent
/// for as long as between two requests, an hour, because pools of connections are often filled before they are needed, and
/// whoever finds one closed that would stand without a proxy has met the proxy. From its first byte on the time for a head counts.
pub async fn serve(mut io: Prefixed<Stream>, version: HttpVersion, arrival: impl Into<Arrival>, worker: Rc<Worker>) {
    let arrival = arrival.into();
    if !rest(&worker, &arrival.down, &mut io).await {
        // Nothing is owed to the client; the close is what it is told.
        let _ = io.shutdown().await;
        return;
    }
    Box::pin(speak(io, version, arrival, worker)).await;
}

async fn speak(io: Prefixed<Stream>, version: HttpVersion, arrival: Arrival, worker: Rc<Worker>) {
    if version == HttpVersion::H1 {
        return serve_h1(io, arrival, worker).await;
    }
    let patience = worker.settings.timeouts.request_header;
    let Ok(Some((io, is_h2))) = tokio::time::timeout(patience, tell(io)).await else { return };
    // Where HTTP/2 is declared the library says what is wrong with anything else.
    if is_h2 || version == HttpVersion::H2 { serve_h2(io, arrival, worker).await } else { serve_h1(io, arrival, worker).await }
}

/// Reads until the bytes are HTTP/2's preface or are not. `None`: the client left before.
async fn tell(io: Prefixed<Stream>) -> Option<(Prefixed<Stream>, bool)> {
    let (prefix, mut stream) = io.into_parts();
    let mut seen = BytesMut::from(prefix);
    loop {
        let n = seen.len().min(H2_PREFACE.len());
        if seen[..n] != H2_PREFACE[..n] || n == H2_PREFACE.len() {
            let is_h2 = n == H2_PREFACE.len() && seen[..n] == *H2_PREFACE;
            return Some((Prefixed::new(seen.freeze(), stream), is_h2));
        }
        seen.reserve(1024);
        if !matches!(stream.read_buf(&mut seen).await, Ok(1..)) {
            return None;
        }
    }
}

/// Polls a connection to its end, and tells it when it has to come to it: a drain starts, or it is not welcome any more.
async fn until_drained<C, T>(worker: &Worker, down: &Downstream, mut connection: Pin<&mut C>, shut: impl Fn(Pin<&mut C>)) -> T
where
    C: Future<Output = T>,
{
    let mut draining = pin!(worker.over(down));
    let mut told = false;
    poll_fn(|cx| {
        let polled = connection.as_mut().poll(cx);
        if polled.is_pending() && !told && draining.as_mut().poll(cx).is_ready() {
            told = true;
            shut(connection.as_mut());
            return connection.as_mut().poll(cx);
        }
        polled
    })
    .await
}

/// How the serving of an HTTP/1 connection paused or ended.
enum Served {
    Resting,
    Ended(hyper::Result<()>),
}

async fn serve_h1(io: Prefixed<Stream>, arrival: Arrival, worker: Rc<Worker>) {
    let down = arrival.down;
    let link = Rc::new(Link::default());
    let hop = Hop::new(Rc::clone(&worker), arrival, Wire::H1, Some(Rc::clone(&link)));
    let mut io = Screened::new(io, Rc::clone(&link), worker.settings.timeouts.request_header);
    let (ended, connection) = loop {
        let (requests, marks) = (Rc::clone(&hop), Rc::clone(&link));
        let service = service_fn(move |request| forward::handle(request, Rc::clone(&requests), Some(marks.enter())));
        let mut connection = http1::Builder::new()
            .preserve_header_case(true)
            .auto_date_header(false)
            .max_headers(MAX_FIELDS)
            .max_header_size(MAX_HEAD)
            .max_buf_size(H1_BUFFER)
            .header_read_timeout(None)
            .serve_connection(TokioIo::new(io), service);
        match until_rest(&worker, &down, &link, Pin::new(&mut connection), http1::Connection::graceful_shutdown).await {
            Served::Ended(ended) => break (ended, connection),
            // What the parser may still hold is empty lines between messages.
            Served::Resting => io = connection.into_parts().io.into_inner(),
        }
        if !rest(&worker, &down, io.get_mut()).await {
            let _ = io.shutdown().await;
            return;
        }
    };
    if let Some((tunnel, tally)) = hop.tunnel.take() {
        if ended.is_ok() {
            let parts = connection.into_parts();
            tunnel::run(parts.io.into_inner().into_inner(), parts.read_buf, tunnel, tally).await;
        }
        return;
    }
    let refused = link.refused();
    let broke = refused.is_some() || ended.as_ref().is_err_and(|error| error.is_parse() || error.is_parse_too_large());
    if broke {
        if let Some(why) = refused {
            tracing::debug!(peer = %down.peer, reason = why.as_str(), "refused an HTTP/1 request");
        }
        if !link.was_told() {
            record_refusal(&hop, ended.as_ref().err());
        }
        linger(connection.into_parts().io.into_inner().into_inner()).await;
    }
}

/// Polls an HTTP/1 connection to its end or until it rests. A drain ends it.
async fn until_rest<C>(
    worker: &Worker,
    down: &Downstream,
    link: &Link,
    connection: Pin<&mut C>,
    shut: impl Fn(Pin<&mut C>),
) -> Served
where
    C: Future<Output = hyper::Result<()>>,
{
    let mut tick = pin!(tokio::time::sleep(REST));
    let mut serving = pin!(until_drained(worker, down, connection, shut));
    poll_fn(|cx| {
        if let Poll::Ready(ended) = serving.as_mut().poll(cx) {
            return Poll::Ready(Served::Ended(ended));
        }
        while tick.as_mut().poll(cx).is_ready() {
            if link.rests(REST) && !worker.is_over(down) {
                return Poll::Ready(Served::Resting);
            }
            let from = link.last().filter(|last| last.elapsed() < REST).unwrap_or_else(Instant::now);
            tick.as_mut().reset((from + REST).into());
        }
        Poll::Pending
    })
    .await
}

/// Waits for the client's next bytes (or its end). False: the connection is over, or nothing came for [`IDLE`].
async fn rest(worker: &Worker, down: &Downstream, io: &mut Prefixed<Stream>) -> bool {
    tokio::select! {
        biased;
        ready = tokio::time::timeout(IDLE, io.speaks()) => ready.is_ok(),
        () = worker.over(down) => false,
    }
}

/// A request that no handler saw leaves a record too.
fn record_refusal(hop: &Hop, error: Option<&hyper::Error>) {
    let code = if error.is_some_and(hyper::Error::is_parse_too_large) { 431 } else { 400 };
    hop.worker.recorder.request(&RequestRecord {
        downstream: hop.down(),
        upstream: None,
        principal: None,
        protocol: RequestProtocol::Http,
        code,
        grpc_status: None,
        flag: Some(Flag::DownstreamProtocolError),
        duration: Duration::ZERO,
        request_bytes: 0,
        response_bytes: 0,
    });
}

/// Closes a connection on which bytes may still be coming.
async fn linger(mut io: Prefixed<Stream>) {
    let started = Instant::now();
    if io.shutdown().await.is_err() {
        return;
    }
    let mut scratch = vec![0; 8192];
    let mut seen = 0;
    while seen < LINGER_BYTES {
        let Some(left) = LINGER.checked_sub(started.elapsed()) else { return };
        match tokio::time::timeout(left, io.read(&mut scratch)).await {
            Ok(Ok(n)) if n > 0 => seen += n,
            _ => return,
        }
    }
}

async fn serve_h2(io: Prefixed<Stream>, arrival: Arrival, worker: Rc<Worker>) {
    let down = arrival.down;
    let hop = Hop::new(Rc::clone(&worker), arrival, Wire::H2, None);
    let plan = hop.through;
    let (io, cork) = cork::cork(io);
    let service = service_fn(move |request| forward::handle(request, Rc::clone(&hop), None));
    let connection = http2::Builder::new(LocalExecutor)
        .timer(TokioTimer::new())
        .auto_date_header(false)
        .max_header_list_size(MAX_HEAD as u32)
        .max_concurrent_streams(H2_STREAMS)
        .initial_stream_window_size(H2_STREAM_WINDOW)
        .initial_connection_window_size(H2_CONNECTION_WINDOW)
        .max_send_buf_size(H2_SEND_BUFFER)
        .max_pending_accept_reset_streams(H2_PENDING_RESETS)
        .max_local_error_reset_streams(H2_ERROR_RESETS)
        .keep_alive_interval(H2_PING)
        .keep_alive_timeout(H2_PING_PATIENCE)
        .enable_connect_protocol()
        .serve_connection(TokioIo::new(io), service);
    let mut connection = pin!(connection);
    let mut serving = pin!(until_drained(&worker, &down, connection.as_mut(), http2::Connection::graceful_shutdown));
    let ended: Result<(), hyper::Error> = poll_fn(|cx| {
        loop {
            let polled = serving.as_mut().poll(cx);
            if !cork.pull(cx) || polled.is_ready() {
                return polled;
            }
        }
    })
    .await;
    worker.pool.forget(&plan);
    if let Err(error) = ended {
        tracing::debug!(peer = %down.peer, %error, "an HTTP/2 connection ended with an error");
    }
}
