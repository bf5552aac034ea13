//! A worker's connections to destinations, for reuse. Nothing here is shared between threads, so nothing is locked.
//!
//! HTTP/1: idle connections in a stack per destination, the freshest on top; one that has died is gone the moment its task learns of
//! it. HTTP/2: one connection per destination carries all requests until its streams are used up; then there is another.
//!
//! Invariant: an HTTP/1 connection is in the stack only when its last exchange is over on both sides. A [`Lease`] that is
//! dropped instead of given back closes its connection.

use super::body::Upload;
use super::reply::Failure;
use super::tap::{Ear, Tapped};
use crate::io::Stream;
use crate::telemetry::Flag;
use crate::tls::Alpn;
use crate::upstream::{self, Plan};
use crate::worker::Worker;
use http::StatusCode;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio::task::spawn_local;

/// Idle HTTP/1 connections kept per destination.
const IDLE_PER_DESTINATION: usize = 256;
/// How old a connection may become. Destinations behind a virtual address are rebalanced by that.
const MAX_AGE: Duration = Duration::from_secs(3600);
/// How many requests a connection may carry.
const MAX_REQUESTS: u32 = 1_000_000;
/// HTTP/2 connections per destination. When their streams are used up too, requests queue in the library.
const MAX_H2: usize = 16;
/// How many connections a request may see made, and taken by others or closed at once, before it gives up: in a burst every
/// one up to [`MAX_H2`] may be used up before its turn comes.
const H2_DIALS: usize = MAX_H2 + 4;
/// How often connections that have been idle for too long are looked for.
const SWEEP: Duration = Duration::from_secs(5);
/// Size of the read buffer towards a destination, and of what is buffered for writing.
const H1_BUFFER: usize = 256 * 1024;
const H1_HEAD: usize = 100 * 1024;
const H2_STREAM_WINDOW: u32 = 1024 * 1024;
const H2_CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;
const H2_SEND_BUFFER: usize = 256 * 1024;

/// Runs the parts of a connection as local tasks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LocalExecutor;

impl<F> hyper::rt::Executor<F> for LocalExecutor
where
    F: Future + 'static,
    F::Output: 'static,
{
    fn execute(&self, future: F) {
        spawn_local(future);
    }
}

/// Connections of a worker.
#[derive(Default)]
pub struct Pool {
    h1: RefCell<HashMap<Plan, Vec<H1>>>,
    h2: RefCell<HashMap<Plan, Rc<Shared>>>,
    sweeping: Cell<bool>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("idle", &self.idle()).finish_non_exhaustive()
    }
}

/// An HTTP/1 connection that can be asked.
struct H1 {
    sender: http1::SendRequest<Upload>,
    ear: Rc<Ear>,
    born: Instant,
    idle_since: Instant,
    served: u32,
}

/// The HTTP/2 connections to one destination.
#[derive(Default)]
struct Shared {
    connections: RefCell<Vec<H2>>,
    dialing: RefCell<Option<Rc<Dial>>>,
}

struct H2 {
    sender: http2::SendRequest<Upload>,
    line: Rc<Line>,
    active: Rc<Active>,
    born: Instant,
}

type H2Connection = http2::Connection<TokioIo<Stream>, Upload, LocalExecutor>;

/// The connection itself, driven by its task and asked by others for what its peer's settings say; empty once it is over.
struct Line(RefCell<Option<H2Connection>>);

impl Line {
    fn max_streams(&self) -> usize {
        self.0.borrow().as_ref().map_or(0, H2Connection::current_max_send_streams)
    }

    fn extended_connect(&self) -> bool {
        self.0.borrow().as_ref().is_some_and(H2Connection::is_extended_connect_protocol_enabled)
    }

    /// Errors reach the requests that wait, by their senders.
    async fn drive(&self) {
        poll_fn(|cx| {
            let mut line = self.0.borrow_mut();
            let Some(connection) = line.as_mut() else { return Poll::Ready(()) };
            let polled = Pin::new(connection).poll(cx).map(drop);
            if polled.is_ready() {
                *line = None;
            }
            polled
        })
        .await;
    }
}

/// How many requests an HTTP/2 connection carries, and since when none.
struct Active {
    count: Cell<usize>,
    idle_since: Cell<Instant>,
}

/// A connection attempt that several requests wait for.
#[derive(Default)]
struct Dial {
    done: Notify,
    failure: RefCell<Option<Failure>>,
}

/// The right to send one request.
pub(crate) struct Lease(Held);

enum Held {
    H1(Box<LeasedH1>),
    H2(LeasedH2),
}

/// An HTTP/1 connection that is in use.
pub(crate) struct LeasedH1 {
    worker: Rc<Worker>,
    plan: Plan,
    connection: H1,
    /// It has carried a request before, so that its peer may be closing it just now.
    pub(crate) reused: bool,
    /// It must not be used again.
    pub(crate) spent: bool,
}

/// A share of an HTTP/2 connection.
pub(crate) struct LeasedH2 {
    pub(crate) sender: http2::SendRequest<Upload>,
    line: Rc<Line>,
    active: Rc<Active>,
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Held::H1(_) => "Lease(HTTP/1)",
            Held::H2(_) => "Lease(HTTP/2)",
        })
    }
}

impl From<Box<LeasedH1>> for Lease {
    fn from(lease: Box<LeasedH1>) -> Self {
        Self(Held::H1(lease))
    }
}

impl From<LeasedH2> for Lease {
    fn from(lease: LeasedH2) -> Self {
        Self(Held::H2(lease))
    }
}

impl Lease {
    /// The exchange is over and was whole.
    pub(crate) fn give_back(self) {
        match self.0 {
            Held::H1(lease) => lease.give_back(),
            Held::H2(lease) => drop(lease),
        }
    }
}

impl LeasedH2 {
    /// Whether the destination offers extended CONNECT, as far as its settings have come.
    pub(crate) fn extended_connect(&self) -> bool {
        self.line.extended_connect()
    }
}

impl Drop for LeasedH2 {
    fn drop(&mut self) {
        self.active.count.set(self.active.count.get() - 1);
        if self.active.count.get() == 0 {
            self.active.idle_since.set(Instant::now());
        }
    }
}

impl LeasedH1 {
    pub(crate) fn sender(&mut self) -> &mut http1::SendRequest<Upload> {
        &mut self.connection.sender
    }

    pub(crate) fn ear(&self) -> &Rc<Ear> {
        &self.connection.ear
    }

    fn give_back(mut self: Box<Self>) {
        if self.spent || self.connection.sender.is_closed() || self.worker.drain.is_draining() {
            return;
        }
        if self.connection.sender.is_ready() {
            (*self).put();
        } else {
            // The response is over before the request (an early answer), or the task has not come to it yet.
            spawn_local(async move {
                if self.connection.sender.ready().await.is_ok() {
                    (*self).put();
                }
            });
        }
    }

    fn put(self) {
        let Self { worker, plan, mut connection, .. } = self;
        connection.idle_since = Instant::now();
        connection.served += 1;
        if connection.served >= MAX_REQUESTS || connection.idle_since.duration_since(connection.born) >= MAX_AGE {
            return;
        }
        let mut pools = worker.pool.h1.borrow_mut();
        let stack = pools.entry(plan).or_default();
        if stack.len() < IDLE_PER_DESTINATION {
            stack.push(connection);
            worker.pool.sweep(&worker);
        }
    }
}

impl Pool {
    /// An empty pool.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets go of what only one client may use: that client has gone.
    pub(crate) fn forget(&self, plan: &Plan) {
        if plan.client.is_some() {
            self.h1.borrow_mut().remove(plan);
            self.h2.borrow_mut().remove(plan);
        }
    }

    /// How many idle HTTP/1 connections it holds.
    pub fn idle(&self) -> usize {
        self.h1.borrow().values().map(Vec::len).sum()
    }

    /// An idle connection to `plan`, if there is a live one. `careful`: also look whether the kernel already knows of its end.
    pub(crate) fn take_h1(worker: &Rc<Worker>, plan: &Plan, careful: bool) -> Option<Box<LeasedH1>> {
        let mut pools = worker.pool.h1.borrow_mut();
        let stack = pools.get_mut(plan)?;
        while let Some(connection) = stack.pop() {
            if connection.sender.is_ready() && !connection.sender.is_closed() && !(careful && connection.ear.is_stale()) {
                let lease = LeasedH1 { worker: Rc::clone(worker), plan: *plan, connection, reused: true, spent: false };
                return Some(Box::new(lease));
            }
        }
        None
    }

    /// A new connection to `plan`.
    pub(crate) async fn connect_h1(worker: &Rc<Worker>, plan: &Plan) -> Result<Box<LeasedH1>, Failure> {
        let stream = upstream::open(worker, plan, Alpn::Http1).await.map_err(|error| Failure::connect(&error))?;
        let (io, ear) = Tapped::new(stream);
        let handshake = http1::Builder::new()
            .preserve_header_case(true)
            .max_buf_size(H1_BUFFER)
            .max_headers(super::headers::MAX_FIELDS)
            .max_header_size(H1_HEAD)
            .handshake(TokioIo::new(io))
            .await;
        let (sender, mut connection) = handshake.map_err(|error| Failure::exchange(&error))?;
        let tap = Rc::clone(&ear);
        spawn_local(async move {
            // Errors reach the request that waits, by its sender.
            if poll_fn(|cx| Pin::new(&mut connection).poll(cx)).await.is_ok()
                && let Some(tunnel) = tap.take_handover()
            {
                let parts = connection.into_parts();
                let _ = tunnel.send((parts.io.into_inner().into_inner(), parts.read_buf));
            }
        });
        let now = Instant::now();
        let connection = H1 { sender, ear, born: now, idle_since: now, served: 0 };
        Ok(Box::new(LeasedH1 { worker: Rc::clone(worker), plan: *plan, connection, reused: false, spent: false }))
    }

    /// A share of an HTTP/2 connection to `plan`, which is made if there is none with a free stream.
    pub(crate) async fn share_h2(worker: &Rc<Worker>, plan: &Plan) -> Result<LeasedH2, Failure> {
        let shared = Rc::clone(worker.pool.h2.borrow_mut().entry(*plan).or_default());
        for _ in 0..H2_DIALS {
            if let Some(lease) = shared.lease() {
                return Ok(lease);
            }
            let ongoing = shared.dialing.borrow().clone();
            let dial = match ongoing {
                Some(dial) => dial,
                None => shared.dial(worker, *plan),
            };
            let mut done = std::pin::pin!(dial.done.notified());
            done.as_mut().enable();
            if shared.dialing.borrow().as_ref().is_some_and(|current| Rc::ptr_eq(current, &dial)) {
                done.await;
            }
            let failure = dial.failure.borrow().clone();
            if let Some(failure) = failure {
                return Err(failure);
            }
        }
        let text = "the destination closes HTTP/2 connections as soon as they are made";
        Err(Failure::new(StatusCode::SERVICE_UNAVAILABLE, Flag::UpstreamTermination, text))
    }

    /// Sees to it that idle connections are let go in time, as long as there are any.
    fn sweep(&self, worker: &Rc<Worker>) {
        if self.sweeping.replace(true) {
            return;
        }
        let worker: Weak<Worker> = Rc::downgrade(worker);
        spawn_local(async move {
            loop {
                tokio::time::sleep(SWEEP).await;
                let Some(worker) = worker.upgrade() else { return };
                let limit = worker.settings.timeouts.pool_idle;
                if worker.pool.drop_idle(limit) {
                    worker.pool.sweeping.set(false);
                    return;
                }
            }
        });
    }

    /// Closes what has been idle for `limit`. Returns whether nothing is left.
    fn drop_idle(&self, limit: Duration) -> bool {
        let now = Instant::now();
        let idle = |since: Instant| now.saturating_duration_since(since) >= limit;
        let mut h1 = self.h1.borrow_mut();
        h1.retain(|_, stack| {
            stack.retain(|connection| !connection.sender.is_closed() && !idle(connection.idle_since));
            !stack.is_empty()
        });
        let mut h2 = self.h2.borrow_mut();
        h2.retain(|_, shared| {
            shared.connections.borrow_mut().retain(|connection| {
                let unused = connection.active.count.get() == 0 && idle(connection.active.idle_since.get());
                !connection.sender.is_closed() && !unused
            });
            !shared.connections.borrow().is_empty() || shared.dialing.borrow().is_some()
        });
        h1.is_empty() && h2.is_empty()
    }
}

impl Shared {
    fn lease(&self) -> Option<LeasedH2> {
        let mut connections = self.connections.borrow_mut();
        connections.retain(|connection| !connection.sender.is_closed());
        let young = |connection: &&H2| connection.born.elapsed() < MAX_AGE;
        let free = |connection: &&H2| connection.active.count.get() < connection.line.max_streams();
        let chosen = match connections.iter().filter(young).find(free) {
            Some(connection) => connection,
            None if connections.len() < MAX_H2 => return None,
            None => connections.iter().min_by_key(|connection| connection.active.count.get())?,
        };
        chosen.active.count.set(chosen.active.count.get() + 1);
        Some(LeasedH2 { sender: chosen.sender.clone(), line: Rc::clone(&chosen.line), active: Rc::clone(&chosen.active) })
    }

    /// Starts a connection attempt as a task of its own, so that it does not end with the request that caused it.
    fn dial(self: &Rc<Self>, worker: &Rc<Worker>, plan: Plan) -> Rc<Dial> {
        let dial = Rc::new(Dial::default());
        *self.dialing.borrow_mut() = Some(Rc::clone(&dial));
        let (shared, worker, attempt) = (Rc::clone(self), Rc::clone(worker), Rc::clone(&dial));
        spawn_local(async move {
            match connect_h2(&worker, &plan).await {
                Ok(connection) => {
                    shared.connections.borrow_mut().push(connection);
                    worker.pool.sweep(&worker);
                }
                Err(failure) => *attempt.failure.borrow_mut() = Some(failure),
            }
            *shared.dialing.borrow_mut() = None;
            attempt.done.notify_waiters();
        });
        dial
    }
}

async fn connect_h2(worker: &Rc<Worker>, plan: &Plan) -> Result<H2, Failure> {
    let stream = upstream::open(worker, plan, Alpn::Http2).await.map_err(|error| Failure::connect(&error))?;
    let handshake = http2::Builder::new(LocalExecutor)
        .timer(TokioTimer::new())
        .initial_stream_window_size(H2_STREAM_WINDOW)
        .initial_connection_window_size(H2_CONNECTION_WINDOW)
        .max_send_buf_size(H2_SEND_BUFFER)
        .max_header_list_size(H1_HEAD as u32)
        .handshake(TokioIo::new(stream))
        .await;
    let (sender, connection) = handshake.map_err(|error| Failure::exchange(&error))?;
    let line = Rc::new(Line(RefCell::new(Some(connection))));
    let driven = Rc::clone(&line);
    spawn_local(async move { driven.drive().await });
    let now = Instant::now();
    Ok(H2 { sender, line, active: Rc::new(Active { count: Cell::new(0), idle_since: Cell::new(now) }), born: now })
}
