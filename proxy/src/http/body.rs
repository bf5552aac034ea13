//! The two bodies of a forwarded request. Both stream, hold nothing but what is in flight, and count.
//!
//! [`Upload`] goes to the destination. It knows whether anything of it was taken (until then a request may be sent
//! again) and can wait for the destination's `100 Continue`. [`Download`] goes to the client; its end, or its
//! being dropped, completes the request's record and gives the connection to the destination back to the pool.

use super::pool::Lease;
use super::screen::Busy;
use super::tally::Tally;
use crate::telemetry::Flag;
use bytes::Bytes;
use futures::task::AtomicWaker;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use std::cell::{Cell, RefCell};
use std::error::Error;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::time::Sleep;

/// How long a request with `Expect: 100-continue` waits for an app that does not answer it; the client's own patience is
/// commonly one second too.
const CONTINUE_PATIENCE: Duration = Duration::from_secs(1);

const WAITING: u8 = 0;
const OPEN: u8 = 1;
const ABANDONED: u8 = 2;

/// Holds an upload back until the destination says `100 Continue`. Reading the body is what makes the server side send
/// its own 100 to the client, so the client hears it when the app has said it.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: AtomicU8,
    waker: AtomicWaker,
}

impl Gate {
    /// The destination wants the body.
    pub(crate) fn open(&self) {
        self.set(OPEN);
    }

    /// The exchange is over; if the body was still held back, nobody will want it.
    fn abandon(&self) {
        self.set(ABANDONED);
    }

    fn set(&self, state: u8) {
        if self.state.compare_exchange(WAITING, state, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            self.waker.wake();
        }
    }

    /// Whether nothing has let the body pass yet.
    pub(crate) fn is_waiting(&self) -> bool {
        self.state.load(Ordering::Acquire) == WAITING
    }
}

/// How much of an upload is kept for another attempt, where another attempt is possible (see [`Source::keep`]).
const REPLAY_BYTES: usize = 64 * 1024;

/// The client's body, shared by the attempts to send it.
#[derive(Debug)]
pub(crate) struct Source {
    body: RefCell<Incoming>,
    taken: Cell<u64>,
    polled: Cell<bool>,
    failed: Cell<bool>,
    /// Frames to send again if the destination refuses the stream unprocessed; `None`: not kept, or too much.
    kept: RefCell<Option<Vec<Bytes>>>,
    /// Trailers that were read before anybody wanted to send them.
    trailers: RefCell<Option<http::HeaderMap>>,
}

impl Source {
    /// `keep`: remember up to 64 KiB for another attempt.
    pub(crate) fn new(body: Incoming, keep: bool) -> Rc<Self> {
        Rc::new(Self {
            body: RefCell::new(body),
            taken: Cell::new(0),
            polled: Cell::new(false),
            failed: Cell::new(false),
            kept: RefCell::new(keep.then(Vec::new)),
            trailers: RefCell::default(),
        })
    }

    /// Reads ahead until there are `limit` bytes or the body has ended: the first bytes (at most `limit`), and whether they are all. They
    /// are sent to the destination all the same. `Err`: the body broke off.
    ///
    /// To be called before the body is sent.
    pub(crate) async fn ahead(&self, limit: usize) -> Result<(Bytes, bool), ()> {
        let mut frames: Vec<Bytes> = self.kept.take().unwrap_or_default();
        let mut read: usize = frames.iter().map(Bytes::len).sum();
        let mut ended = self.trailers.borrow().is_some();
        while !ended && read <= limit {
            let frame = std::future::poll_fn(|cx| Pin::new(&mut *self.body.borrow_mut()).poll_frame(cx)).await;
            match frame.map(|frame| frame.map(Frame::into_data)) {
                None => ended = true,
                Some(Ok(Ok(data))) => {
                    read += data.len();
                    self.taken.set(self.taken.get() + data.len() as u64);
                    frames.push(data);
                }
                Some(Ok(Err(other))) => {
                    *self.trailers.borrow_mut() = other.into_trailers().ok();
                    ended = true;
                }
                Some(Err(_)) => {
                    self.failed.set(true);
                    return Err(());
                }
            }
        }
        let mut bytes = bytes::BytesMut::with_capacity(read.min(limit));
        for frame in &frames {
            bytes.extend_from_slice(&frame[..frame.len().min(limit - bytes.len())]);
        }
        let whole = ended && read <= limit;
        *self.kept.borrow_mut() = Some(frames);
        Ok((bytes.freeze(), whole))
    }

    /// Body bytes that came from the client so far.
    pub(crate) fn taken(&self) -> u64 {
        self.taken.get()
    }

    /// Nothing was taken from it yet.
    pub(crate) fn is_untouched(&self) -> bool {
        !self.polled.get()
    }

    /// Reading it failed: the client left or broke the protocol.
    pub(crate) fn has_failed(&self) -> bool {
        self.failed.get()
    }

    /// The whole of it can be sent once more.
    pub(crate) fn is_replayable(&self) -> bool {
        self.is_untouched() || self.kept.borrow().is_some()
    }

    /// Stops keeping, once the destination has answered.
    pub(crate) fn forget(&self) {
        self.kept.take();
    }

    fn keep(&self, data: &Bytes) {
        let mut kept = self.kept.borrow_mut();
        if let Some(frames) = kept.as_mut() {
            if self.taken.get() > REPLAY_BYTES as u64 {
                *kept = None;
            } else {
                frames.push(data.clone());
            }
        }
    }
}

/// The body of a request on its way to the destination.
#[derive(Debug, Default)]
pub(crate) struct Upload {
    source: Option<Rc<Source>>,
    /// What an earlier attempt took, to be sent first.
    again: std::collections::VecDeque<Bytes>,
    gate: Option<(Arc<Gate>, Pin<Box<Sleep>>)>,
}

impl Upload {
    /// No body.
    pub(crate) fn none() -> Self {
        Self::default()
    }

    /// These bytes.
    pub(crate) fn fixed(bytes: Bytes) -> Self {
        let again = if bytes.is_empty() { std::collections::VecDeque::new() } else { [bytes].into() };
        Self { again, ..Self::default() }
    }

    /// `source` from its beginning: what earlier attempts took comes first.
    pub(crate) fn of(source: &Rc<Source>) -> Self {
        let again = source.kept.borrow().iter().flatten().cloned().collect();
        Self { source: Some(Rc::clone(source)), again, gate: None }
    }

    /// Holds it back until `gate` opens or patience ends.
    pub(crate) fn behind(mut self, gate: Arc<Gate>) -> Self {
        self.gate = Some((gate, Box::pin(tokio::time::sleep(CONTINUE_PATIENCE))));
        self
    }

    fn poll_gate(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Box<dyn Error + Send + Sync>>> {
        if let Some((gate, patience)) = &mut self.gate {
            gate.waker.register(cx.waker());
            if gate.is_waiting() {
                ready!(patience.as_mut().poll(cx));
                gate.open();
            }
            if gate.state.load(Ordering::Acquire) == ABANDONED {
                return Poll::Ready(Err("the exchange ended before the body was wanted".into()));
            }
            self.gate = None;
        }
        Poll::Ready(Ok(()))
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = Box<dyn Error + Send + Sync>;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = &mut *self;
        ready!(this.poll_gate(cx))?;
        if let Some(source) = &this.source {
            source.polled.set(true);
        }
        if let Some(data) = this.again.pop_front() {
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        let Some(source) = &this.source else { return Poll::Ready(None) };
        if let Some(trailers) = source.trailers.take() {
            source.forget();
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
        let frame = ready!(Pin::new(&mut *source.body.borrow_mut()).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => match frame.data_ref() {
                Some(data) => {
                    source.taken.set(source.taken.get() + data.len() as u64);
                    source.keep(data);
                }
                // Trailers are not kept: a request that has them is not sent again once they came.
                None => source.forget(),
            },
            Some(Err(_)) => source.failed.set(true),
            None => {}
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.again.is_empty()
            && self
                .source
                .as_ref()
                .is_none_or(|source| source.body.borrow().is_end_stream() && source.trailers.borrow().is_none())
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            None => SizeHint::with_exact(self.again.iter().map(|data| data.len() as u64).sum()),
            // The head says what the length is; after a replay the hint would have to be put together.
            Some(_) if !self.again.is_empty() => SizeHint::default(),
            Some(source) => source.body.borrow().size_hint(),
        }
    }
}

#[derive(Debug)]
enum Content {
    Relayed(Incoming),
    Own(Bytes),
}

/// The body of a response on its way to the client.
#[derive(Debug)]
pub(crate) struct Download {
    content: Content,
    tally: Option<Tally>,
    lease: Option<Lease>,
    gate: Option<Arc<Gate>>,
    busy: Option<Busy>,
}

impl Download {
    /// The destination's body; `lease` goes back to the pool at its end.
    pub(crate) fn relayed(body: Incoming, tally: Tally, lease: Lease, gate: Option<Arc<Gate>>, busy: Option<Busy>) -> Self {
        Self { content: Content::Relayed(body), tally: Some(tally), lease: Some(lease), gate, busy }
    }

    /// A body of the proxy's own, which may be empty.
    pub(crate) fn own(body: Bytes, tally: Option<Tally>, busy: Option<Busy>) -> Self {
        Self { content: Content::Own(body), tally, lease: None, gate: None, busy }
    }

    fn finish(&mut self, flag: Option<Flag>) {
        if let Some(gate) = self.gate.take() {
            gate.abandon();
        }
        if let Some(lease) = self.lease.take()
            && flag.is_none()
        {
            lease.give_back();
        }
        if let Some(mut tally) = self.tally.take() {
            tally.body_ended(flag);
        }
        self.busy = None;
    }
}

impl Body for Download {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = &mut *self;
        let frame = match &mut this.content {
            Content::Relayed(body) => ready!(Pin::new(body).poll_frame(cx)),
            Content::Own(body) => {
                let data = std::mem::take(body);
                (!data.is_empty()).then(|| Ok(Frame::data(data)))
            }
        };
        match &frame {
            Some(Ok(frame)) => {
                if let Some(tally) = &mut this.tally {
                    match (frame.data_ref(), frame.trailers_ref()) {
                        (Some(data), _) => tally.count(data.len()),
                        (None, Some(trailers)) => tally.grpc_status(trailers),
                        (None, None) => {}
                    }
                }
            }
            Some(Err(_)) => this.finish(Some(Flag::UpstreamTermination)),
            None => this.finish(None),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Relayed(body) => body.is_end_stream(),
            Content::Own(body) => body.is_empty(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Relayed(body) => body.size_hint(),
            Content::Own(body) => SizeHint::with_exact(body.len() as u64),
        }
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        let flag = (!self.is_end_stream()).then_some(Flag::DownstreamTermination);
        self.finish(flag);
    }
}
