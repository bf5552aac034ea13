//! A second look at the raw bytes of HTTP/1 requests, before the parser sees them.
//!
//! The parser is lenient in places where an intermediary must not be, and where it is lenient it drops the evidence:
//! `Content-Length` next to `Transfer-Encoding` disappears, a repeated length is folded, a lone line feed ends a line.
//! A request that two parties can read differently is how requests are smuggled (RFC 9112, sections 6.3 and 11.2), so
//! this module follows the framing of each message (heads, lengths, chunks, trailers; also when they are pipelined or
//! arrive byte by byte), copies nothing that passes, and refuses what is ambiguous.
//!
//! Refusing works through the parser: the stream is cut before the offending byte, and a sequence follows which no HTTP/1
//! parser accepts at that place. So the answer (400 and close) comes in its turn, after the responses to
//! earlier requests of the pipeline, and a body that goes wrong in the middle fails as a body.
//!
//! Invariant: wherever the parser and this module both accept, they agree on where a message ends, because everything
//! accepted here is the strict grammar. Where the parser is stricter still, the connection ends, and what is thought here no longer matters.

use memchr::memchr2;
use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

/// Why a message was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ambiguity {
    /// A line feed without a carriage return before it.
    BareLf,
    /// A carriage return without a line feed after it.
    BareCr,
    /// A header line that begins with white space.
    ObsFold,
    /// `Content-Length` that is no plain number, or given twice with different numbers.
    Length,
    /// `Transfer-Encoding` other than one `chunked`.
    TransferEncoding,
    /// Both of them.
    LengthAndTransferEncoding,
    /// A framing field so long that it is no honest one.
    Overlong,
    /// Chunk framing against the grammar.
    Chunk,
}

impl Ambiguity {
    /// A phrase for logs.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::BareLf => "a bare LF",
            Self::BareCr => "a bare CR",
            Self::ObsFold => "a folded header line",
            Self::Length => "an invalid or conflicting Content-Length",
            Self::TransferEncoding => "a Transfer-Encoding other than chunked",
            Self::LengthAndTransferEncoding => "both Content-Length and Transfer-Encoding",
            Self::Overlong => "an overlong Content-Length, Transfer-Encoding or Upgrade",
            Self::Chunk => "an invalid chunk",
        }
    }
}

/// How much of a line that arrives in pieces is kept: names and values that matter here are far shorter.
const CARRY: usize = 256;

/// What no parser accepts within a head or a trailer section, complete so that the parser looks at once.
const POISON_LINE: &[u8] = b"\0\r\n\r\n";
/// What no parser accepts in chunk framing.
const POISON_CHUNK: &[u8] = b"\r\0";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Between messages; empty lines may come (RFC 9112, section 2.2).
    Idle,
    Fields,
    Body(u64),
    ChunkSize {
        size: u64,
        digits: u8,
    },
    ChunkExtension(u64),
    ChunkSizeLf(u64),
    ChunkData(u64),
    ChunkDataCr,
    ChunkDataLf,
    Trailers,
    /// After CONNECT or an upgrade: whatever comes is not HTTP/1 messages.
    Opaque,
}

/// Follows the framing of a stream of requests.
#[derive(Debug)]
pub(crate) struct Screen {
    stage: Stage,
    /// The beginning of a line whose end has not come yet.
    line: Vec<u8>,
    /// The last byte seen was a CR that belongs to a line.
    cr: bool,
    length: Option<u64>,
    chunked: bool,
    opaque_next: bool,
}

impl Screen {
    pub(crate) fn new() -> Self {
        Self { stage: Stage::Idle, line: Vec::new(), cr: false, length: None, chunked: false, opaque_next: false }
    }

    /// Whether all that came was whole messages.
    fn between_messages(&self) -> bool {
        matches!(self.stage, Stage::Idle) && self.line.is_empty() && !self.cr
    }

    fn poison(&self) -> &'static [u8] {
        match self.stage {
            Stage::ChunkSize { .. }
            | Stage::ChunkExtension(_)
            | Stage::ChunkSizeLf(_)
            | Stage::ChunkDataCr
            | Stage::ChunkDataLf => POISON_CHUNK,
            _ => POISON_LINE,
        }
    }

    /// Follows `bytes`. On a refusal: how many of them are good.
    fn scan(&mut self, bytes: &[u8]) -> Result<(), (usize, Ambiguity)> {
        let mut at = 0;
        while at < bytes.len() {
            let rest = &bytes[at..];
            match self.stage {
                Stage::Idle | Stage::Fields | Stage::Trailers => {
                    at += self.scan_line(rest).map_err(|(good, why)| (at + good, why))?;
                }
                Stage::Body(left) => {
                    let n = left.min(rest.len() as u64);
                    at += n as usize;
                    self.stage = if n == left { self.next_message() } else { Stage::Body(left - n) };
                }
                Stage::ChunkData(left) => {
                    let n = left.min(rest.len() as u64);
                    at += n as usize;
                    self.stage = if n == left { Stage::ChunkDataCr } else { Stage::ChunkData(left - n) };
                }
                Stage::Opaque => return Ok(()),
                _ => {
                    self.stage = self.chunk_byte(rest[0]).ok_or((at, Ambiguity::Chunk))?;
                    at += 1;
                }
            }
        }
        Ok(())
    }

    /// The next stage of chunk framing, byte by byte: these lines are a few bytes long. `None`: not the grammar.
    fn chunk_byte(&self, byte: u8) -> Option<Stage> {
        Some(match (self.stage, byte) {
            (Stage::ChunkSize { size, digits }, b'\r') if digits > 0 => Stage::ChunkSizeLf(size),
            (Stage::ChunkSize { size, digits }, b';') if digits > 0 => Stage::ChunkExtension(size),
            (Stage::ChunkSize { size, digits }, _) => {
                // 15 digits are an exabyte: no overflow, here or in the parser.
                let digit = (byte as char).to_digit(16).filter(|_| digits < 15)?;
                Stage::ChunkSize { size: size << 4 | u64::from(digit), digits: digits + 1 }
            }
            (Stage::ChunkExtension(size), b'\r') => Stage::ChunkSizeLf(size),
            (Stage::ChunkExtension(_), b'\n' | 0) => return None,
            (Stage::ChunkExtension(size), _) => Stage::ChunkExtension(size),
            (Stage::ChunkSizeLf(0), b'\n') => Stage::Trailers,
            (Stage::ChunkSizeLf(size), b'\n') => Stage::ChunkData(size),
            (Stage::ChunkDataCr, b'\r') => Stage::ChunkDataLf,
            (Stage::ChunkDataLf, b'\n') => Stage::ChunkSize { size: 0, digits: 0 },
            _ => return None,
        })
    }

    /// Takes one line, or the part of it that is there. Returns how many bytes that were.
    fn scan_line(&mut self, bytes: &[u8]) -> Result<usize, (usize, Ambiguity)> {
        if self.cr {
            if bytes[0] != b'\n' {
                return Err((0, Ambiguity::BareCr));
            }
            self.cr = false;
            let line = std::mem::take(&mut self.line);
            let done = self.line_done(&line);
            // Keeps the allocation: who sends one line in pieces sends more.
            self.line = line;
            self.line.clear();
            return done.map(|()| 1).map_err(|why| (0, why));
        }
        let Some(end) = memchr2(b'\r', b'\n', bytes) else {
            self.carry(bytes);
            return Ok(bytes.len());
        };
        if bytes[end] == b'\n' {
            return Err((end, Ambiguity::BareLf));
        }
        match bytes.get(end + 1) {
            None => {
                self.carry(&bytes[..end]);
                self.cr = true;
                Ok(end + 1)
            }
            Some(b'\n') if self.line.is_empty() => self.line_done(&bytes[..end]).map(|()| end + 2).map_err(|why| (end, why)),
            Some(b'\n') => {
                self.carry(&bytes[..end]);
                self.cr = true;
                self.scan_line(&bytes[end + 1..]).map(|n| end + 1 + n).map_err(|(_, why)| (end, why))
            }
            Some(_) => Err((end, Ambiguity::BareCr)),
        }
    }

    fn carry(&mut self, part: &[u8]) {
        let room = CARRY.saturating_sub(self.line.len());
        self.line.extend_from_slice(&part[..part.len().min(room)]);
    }

    /// A whole line, without its end. A line that came in pieces is cut at [`CARRY`] bytes.
    fn line_done(&mut self, line: &[u8]) -> Result<(), Ambiguity> {
        match self.stage {
            Stage::Idle if line.is_empty() => {}
            Stage::Idle => {
                self.opaque_next = line.starts_with(b"CONNECT ");
                self.length = None;
                self.chunked = false;
                self.stage = Stage::Fields;
            }
            Stage::Fields if line.is_empty() => self.head_done(),
            Stage::Trailers if line.is_empty() => self.stage = self.next_message(),
            Stage::Trailers | Stage::Fields if matches!(line[0], b' ' | b'\t') => return Err(Ambiguity::ObsFold),
            Stage::Fields => return self.field(line),
            _ => {}
        }
        Ok(())
    }

    fn field(&mut self, line: &[u8]) -> Result<(), Ambiguity> {
        // The names that matter begin with one of these; anything else costs this one comparison.
        let name: &[u8] = match line[0] | 0x20 {
            b'c' => b"content-length",
            b't' => b"transfer-encoding",
            b'u' => b"upgrade",
            _ => return Ok(()),
        };
        let Some(value) = value_of(line, name) else { return Ok(()) };
        if line.len() >= CARRY {
            return Err(Ambiguity::Overlong);
        }
        match name[0] {
            b'c' => {
                let length = parse_length(value).ok_or(Ambiguity::Length)?;
                if self.length.replace(length).is_some_and(|before| before != length) {
                    return Err(Ambiguity::Length);
                }
            }
            b't' => {
                if self.chunked || !value.eq_ignore_ascii_case(b"chunked") {
                    return Err(Ambiguity::TransferEncoding);
                }
                self.chunked = true;
            }
            _ => self.opaque_next |= !super::headers::is_h2c(value),
        }
        if self.chunked && self.length.is_some() {
            return Err(Ambiguity::LengthAndTransferEncoding);
        }
        Ok(())
    }

    fn head_done(&mut self) {
        self.stage = match (self.chunked, self.length) {
            (true, _) => Stage::ChunkSize { size: 0, digits: 0 },
            (false, Some(length)) if length > 0 => Stage::Body(length),
            _ => self.next_message(),
        };
    }

    fn next_message(&self) -> Stage {
        if self.opaque_next { Stage::Opaque } else { Stage::Idle }
    }
}

/// The value of a header line if its name is `name` (in lower case), without white space around.
fn value_of<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    if line.len() > name.len() && line[name.len()] == b':' && line[..name.len()].eq_ignore_ascii_case(name) {
        Some(line[name.len() + 1..].trim_ascii())
    } else {
        None
    }
}

fn parse_length(value: &[u8]) -> Option<u64> {
    if value.is_empty() || value.len() > 19 || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    Some(value.iter().fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0')))
}

/// What the I/O wrapper of an HTTP/1 connection and the requests on it tell each other. One thread, so cells do.
#[derive(Debug, Default)]
pub(crate) struct Link {
    /// A request is being served.
    busy: Cell<bool>,
    /// The client has half-closed.
    eof: Cell<bool>,
    /// Whoever wanted to read when the end of the stream was held back.
    reader: RefCell<Option<Waker>>,
    /// Whoever serves the request and wants to know of a half-close.
    server: RefCell<Option<Waker>>,
    refused: Cell<Option<Ambiguity>>,
    /// The last request's handler saw that its body was refused.
    told: Cell<bool>,
    /// When a request last began or ended.
    last: Cell<Option<Instant>>,
    /// The last look at the stream found nothing, and no message had begun.
    between: Cell<bool>,
    /// Something was written and has not been flushed since.
    unflushed: Cell<bool>,
}

impl Link {
    /// Marks the connection as serving a request until the guard is dropped.
    pub(crate) fn enter(self: &Rc<Self>) -> Busy {
        self.busy.set(true);
        self.told.set(false);
        Busy(Rc::clone(self))
    }

    /// Why the connection's last message was refused, if one was.
    pub(crate) fn refused(&self) -> Option<Ambiguity> {
        self.refused.get()
    }

    /// Whether nothing has happened for `pause` and nothing is under way: whoever parses and serialises has no state that
    /// matters then.
    pub(crate) fn rests(&self, pause: Duration) -> bool {
        !self.busy.get()
            && self.between.get()
            && !self.unflushed.get()
            && !self.eof.get()
            && self.refused.get().is_none()
            && self.last.get().is_some_and(|last| last.elapsed() >= pause)
    }

    /// When a request last began or ended, or the connection began.
    pub(crate) fn last(&self) -> Option<Instant> {
        self.last.get()
    }

    /// Notes that the refusal has become a response and a record already.
    pub(crate) fn tell(&self) {
        self.told.set(true);
    }

    /// See [`Self::tell`].
    pub(crate) fn was_told(&self) -> bool {
        self.told.get()
    }

    /// Resolves when the client has half-closed the connection during a request.
    pub(crate) fn poll_half_closed(&self, cx: &Context<'_>) -> Poll<()> {
        if self.eof.get() {
            return Poll::Ready(());
        }
        let mut server = self.server.borrow_mut();
        if !server.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            *server = Some(cx.waker().clone());
        }
        Poll::Pending
    }
}

/// See [`Link::enter`].
#[derive(Debug)]
pub(crate) struct Busy(Rc<Link>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.set(false);
        self.0.last.set(Some(Instant::now()));
        if self.0.eof.get()
            && let Some(reader) = self.0.reader.take()
        {
            reader.wake();
        }
    }
}

/// A client's connection under the eyes of a [`Screen`].
///
/// It also holds back the end of the stream while a request is served: a client that half-closes after its request still wants
/// the response.
#[derive(Debug)]
pub(crate) struct Screened<S> {
    io: S,
    screen: Screen,
    /// What remains of the poison to deliver; `Some` once the stream is refused.
    poison: Option<&'static [u8]>,
    link: Rc<Link>,
    head_timeout: Duration,
    /// Runs while nothing is being served.
    timer: Option<Pin<Box<Sleep>>>,
    /// When the head that is arriving began to.
    head_since: Option<Instant>,
}

/// How long a connection may be without a request.
pub(crate) const IDLE: Duration = Duration::from_secs(3600);

const TIMED_OUT: &[u8] = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";

impl<S> Screened<S> {
    /// `head_timeout`: how long a request's head may take from its first byte to its last.
    pub(crate) fn new(io: S, link: Rc<Link>, head_timeout: Duration) -> Self {
        link.last.set(Some(Instant::now()));
        Self { io, screen: Screen::new(), poison: None, link, head_timeout, timer: None, head_since: None }
    }

    pub(crate) fn into_inner(self) -> S {
        self.io
    }

    /// The stream beneath.
    pub(crate) fn get_mut(&mut self) -> &mut S {
        &mut self.io
    }
}

impl<S: AsyncWrite + Unpin> Screened<S> {
    /// Nothing came. Ready if the client has been silent for too long.
    fn poll_patience(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.link.between.set(false);
        if self.link.busy.get() || matches!(self.screen.stage, Stage::Opaque) {
            return Poll::Pending;
        }
        let in_head = matches!(self.screen.stage, Stage::Fields) || !self.screen.between_messages();
        self.link.between.set(!in_head);
        let deadline = if in_head {
            *self.head_since.get_or_insert_with(Instant::now) + self.head_timeout
        } else {
            self.head_since = None;
            self.link.last.get().unwrap_or_else(Instant::now) + IDLE
        };
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline.into())));
        if timer.deadline().into_std() > deadline {
            timer.as_mut().reset(deadline.into());
        }
        // A timer that is early costs one look; a timer that is always right would cost one reset per request.
        while timer.as_mut().poll(cx).is_ready() {
            if Instant::now() >= deadline {
                if in_head {
                    // The parser has no answer for this. Nothing else is being written: no request is being served.
                    let _ = Pin::new(&mut self.io).poll_write(cx, TIMED_OUT);
                }
                return Poll::Ready(());
            }
            timer.as_mut().reset(deadline.into());
        }
        Poll::Pending
    }
}

fn deliver(poison: &mut &'static [u8], buf: &mut ReadBuf<'_>) {
    let n = poison.len().min(buf.remaining());
    buf.put_slice(&poison[..n]);
    *poison = &poison[n..];
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Screened<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if let Some(poison) = &mut this.poison {
            deliver(poison, buf);
            return Poll::Ready(Ok(()));
        }
        this.link.between.set(false);
        let before = buf.filled().len();
        if !this.link.eof.get() {
            match Pin::new(&mut this.io).poll_read(cx, buf) {
                Poll::Ready(result) => result?,
                Poll::Pending => {
                    ready!(this.poll_patience(cx));
                    return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
                }
            }
            if buf.filled().len() == before && buf.remaining() > 0 && this.screen.between_messages() {
                this.link.eof.set(true);
                if let Some(server) = this.link.server.take() {
                    server.wake();
                }
            }
        }
        if this.link.eof.get() {
            if this.link.busy.get() {
                *this.link.reader.borrow_mut() = Some(cx.waker().clone());
                return Poll::Pending;
            }
            return Poll::Ready(Ok(()));
        }
        if let Err((good, why)) = this.screen.scan(&buf.filled()[before..]) {
            buf.set_filled(before + good);
            this.link.refused.set(Some(why));
            let mut poison = this.screen.poison();
            if good == 0 {
                deliver(&mut poison, buf);
            }
            this.poison = Some(poison);
        }
        if !matches!(this.screen.stage, Stage::Fields) {
            this.head_since = None;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Screened<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.link.unflushed.set(true);
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.io).poll_flush(cx))?;
        // Who writes flushes when nothing is left to write.
        self.link.unflushed.set(false);
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        self.link.unflushed.set(true);
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn scan_whole(bytes: &[u8]) -> Result<Stage, Ambiguity> {
        let mut screen = Screen::new();
        screen.scan(bytes).map(|()| screen.stage).map_err(|(_, why)| why)
    }

    #[test]
    fn framing_is_followed_and_ambiguity_refused() {
        use Ambiguity as A;
        let table: &[(&str, Result<Stage, Ambiguity>)] = &[
            ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", Ok(Stage::Idle)),
            ("\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", Ok(Stage::Idle)),
            ("POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nab", Ok(Stage::Body(1))),
            ("POST / HTTP/1.1\r\ncontent-length: 3\r\nContent-Length:3 \r\n\r\nabc", Ok(Stage::Idle)),
            ("POST / HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n", Err(A::Length)),
            ("POST / HTTP/1.1\r\nContent-Length: +3\r\n\r\n", Err(A::Length)),
            ("POST / HTTP/1.1\r\nContent-Length: 3, 3\r\n\r\n", Err(A::Length)),
            ("POST / HTTP/1.1\r\nContent-Length: \r\n\r\n", Err(A::Length)),
            ("POST / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n", Err(A::Length)),
            ("POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", Err(A::LengthAndTransferEncoding)),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n", Err(A::LengthAndTransferEncoding)),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", Err(A::TransferEncoding)),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: identity\r\n\r\n", Err(A::TransferEncoding)),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: xchunked\r\n\r\n", Err(A::TransferEncoding)),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", Err(A::TransferEncoding)),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: CHUNKED\r\n\r\n5;a=b\r\nhello\r\n0\r\n\r\n", Ok(Stage::Idle)),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: y\r\n\r\n", Ok(Stage::Idle)),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n x\r\n\r\n", Err(A::ObsFold)),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\nhello\r\n", Err(A::Chunk)),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5;\nhello\r\n", Err(A::Chunk)),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0x5\r\nhello\r\n", Err(A::Chunk)),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5 \r\nhello\r\n", Err(A::Chunk)),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", Err(A::Chunk)),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n\r\n", Err(A::Chunk)),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhelloX", Err(A::Chunk)),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000000\r\n", Err(A::Chunk)),
            ("GET / HTTP/1.1\nHost: a\r\n\r\n", Err(A::BareLf)),
            ("GET / HTTP/1.1\r\nA: b\rC: d\r\n\r\n", Err(A::BareCr)),
            ("GET / HTTP/1.1\r\nA: b\r\n c\r\n\r\n", Err(A::ObsFold)),
            ("CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\nany\nthing\r", Ok(Stage::Opaque)),
            ("GET / HTTP/1.1\r\nUpgrade: websocket\r\n\r\n\x01\n", Ok(Stage::Opaque)),
            ("GET / HTTP/1.1\r\nUpgrade: h2c\r\n\r\n", Ok(Stage::Idle)),
        ];
        for (input, expected) in table {
            assert_eq!(scan_whole(input.as_bytes()), *expected, "{input:?}");
        }
    }

    fn message() -> impl Strategy<Value = Vec<u8>> {
        let body = proptest::collection::vec(any::<u8>(), 0..40);
        let chunks = proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..20), 0..4);
        prop_oneof![
            Just(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n".to_vec()),
            body.prop_map(|body| {
                let mut out = format!("POST / HTTP/1.1\r\nX: y\r\nContent-Length: {}\r\n\r\n", body.len()).into_bytes();
                out.extend(body);
                out
            }),
            chunks.prop_map(|chunks| {
                let mut out = b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
                for chunk in chunks {
                    out.extend(format!("{:X}\r\n", chunk.len()).into_bytes());
                    out.extend(chunk);
                    out.extend(b"\r\n");
                }
                out.extend(b"0\r\nT: v\r\n\r\n");
                out
            }),
        ]
    }

    proptest! {
        /// A pipeline of sound messages passes however it is cut, and the verdict on any bytes does not depend on the cuts.
        #[test]
        fn cuts_do_not_matter(
            messages in proptest::collection::vec(message(), 1..5),
            noise in proptest::option::of((any::<prop::sample::Index>(), any::<u8>())),
            cuts in proptest::collection::vec(1usize..40, 1..30),
        ) {
            let mut stream = messages.concat();
            let sound = noise.is_none();
            if let Some((at, byte)) = noise {
                let at = at.index(stream.len());
                stream[at] = byte;
            }
            let whole = scan_whole(&stream);
            if sound {
                prop_assert_eq!(whole, Ok(Stage::Idle));
            }
            let mut screen = Screen::new();
            let mut rest = &stream[..];
            let mut pieces = Ok(());
            for cut in cuts.iter().cycle() {
                if rest.is_empty() || pieces.is_err() {
                    break;
                }
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                pieces = screen.scan(now).map_err(|(_, why)| why);
                rest = later;
            }
            prop_assert_eq!(pieces.map(|()| screen.stage), whole);
        }
    }

    #[test]
    fn what_poisons_a_head_is_complete() {
        // The parser looks at a head that came in pieces only when it sees its end.
        assert!(POISON_LINE.ends_with(b"\r\n\r\n"));
    }
}
