//! The proxy's ear on its own HTTP/1 connections to destinations.
//!
//! Whether a request may be sent again after its connection died depends on what crossed the wire: nothing came back, and
//! (RFC 9110, section 9.2.2) sending twice does no harm. HTTP libraries do not tell; the bytes do. The request's head is
//! gone by then (it was serialised in place, never copied), so for requests that could be repeated the tap keeps the
//! serialised bytes, from which a second request is parsed in the rare case that it is needed.

use super::body::Upload;
use crate::io::Stream;
use http::{HeaderName, HeaderValue, Request, Version};
use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;

/// A connection that stopped being HTTP: the stream, and what was read of it beyond the response.
pub(crate) type Handover = (Stream, bytes::Bytes);

/// What is known about a connection's bytes since the last [`Ear::begin`].
#[derive(Debug)]
pub(crate) struct Ear {
    fd: RawFd,
    /// A TLS session can't be half-closed behind its back.
    secure: bool,
    heard: Cell<bool>,
    /// Bytes were written, and all that hyper had are out.
    wrote: Cell<bool>,
    flushed: Cell<bool>,
    /// The client has half-closed: to be passed on once the request is out.
    closing: Cell<bool>,
    recording: Cell<bool>,
    record: RefCell<Vec<u8>>,
    /// Where the stream goes when the connection becomes a tunnel.
    handover: RefCell<Option<oneshot::Sender<Handover>>>,
}

impl Ear {
    /// A request is about to be sent; `record`: keep its bytes.
    pub(crate) fn begin(&self, record: bool) {
        self.heard.set(false);
        self.wrote.set(false);
        self.flushed.set(false);
        self.closing.set(false);
        self.recording.set(record);
        self.record.borrow_mut().clear();
    }

    /// Whether the destination has sent anything since.
    pub(crate) fn heard(&self) -> bool {
        self.heard.get()
    }

    /// Forgets the request, once its response is there.
    pub(crate) fn forget(&self) {
        self.recording.set(false);
    }

    /// Expects that the connection becomes a tunnel.
    pub(crate) fn expect_handover(&self) -> oneshot::Receiver<Handover> {
        let (sender, receiver) = oneshot::channel();
        *self.handover.borrow_mut() = Some(sender);
        receiver
    }

    pub(crate) fn take_handover(&self) -> Option<oneshot::Sender<Handover>> {
        self.handover.borrow_mut().take()
    }

    /// Whether the kernel already holds the destination's close (or bytes that nobody asked for). Only while the connection's
    /// task holds the stream, which the caller knows from its sender.
    pub(crate) fn is_stale(&self) -> bool {
        use nix::sys::socket::{MsgFlags, recv};
        let mut byte = [0];
        match recv(self.fd, &mut byte, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
            Err(nix::errno::Errno::EAGAIN) => false,
            Ok(_) | Err(_) => true,
        }
    }

    /// Half-closes the connection as the client did, once the request (which has no body) is written; the response still comes.
    /// (Not one of mutual TLS: the peer has the whole request, and the connection serves others.)
    pub(crate) fn half_close(&self) {
        if self.secure {
            return;
        }
        self.closing.set(true);
        self.close_if_sent();
    }

    fn close_if_sent(&self) {
        if !self.closing.get() || !self.flushed.get() {
            return;
        }
        self.closing.set(false);
        // Fails only if the connection is gone, which its task notices.
        let _ = nix::sys::socket::shutdown(self.fd, nix::sys::socket::Shutdown::Write);
    }

    /// The request whose bytes were kept, with no body.
    pub(crate) fn recorded(&self) -> Option<Request<Upload>> {
        parse(&self.record.borrow())
    }
}

fn parse(record: &[u8]) -> Option<Request<Upload>> {
    let mut fields = vec![httparse::EMPTY_HEADER; super::headers::MAX_FIELDS + 8];
    let mut head = httparse::Request::new(&mut fields);
    match head.parse(record) {
        Ok(httparse::Status::Complete(length)) if length == record.len() => {}
        _ => return None,
    }
    let mut request = Request::new(Upload::none());
    *request.method_mut() = head.method?.parse().ok()?;
    *request.uri_mut() = head.path?.parse().ok()?;
    *request.version_mut() = Version::HTTP_11;
    for field in head.headers {
        let name = HeaderName::from_bytes(field.name.as_bytes()).ok()?;
        request.headers_mut().append(name, HeaderValue::from_bytes(field.value).ok()?);
    }
    Some(request)
}

/// A stream that is listened to.
#[derive(Debug)]
pub(crate) struct Tapped {
    io: Stream,
    ear: Rc<Ear>,
}

impl Tapped {
    pub(crate) fn new(io: Stream) -> (Self, Rc<Ear>) {
        let ear = Rc::new(Ear {
            fd: io.as_raw_fd(),
            secure: io.is_secure(),
            heard: Cell::new(false),
            wrote: Cell::new(false),
            flushed: Cell::new(false),
            closing: Cell::new(false),
            recording: Cell::new(false),
            record: RefCell::default(),
            handover: RefCell::default(),
        });
        (Self { io, ear: Rc::clone(&ear) }, ear)
    }

    pub(crate) fn into_inner(self) -> Stream {
        self.io
    }
}

impl AsyncRead for Tapped {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.io).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.ear.heard.set(true);
        }
        polled
    }
}

impl AsyncWrite for Tapped {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.io).poll_write(cx, buf);
        self.ear.wrote.set(true);
        if self.ear.recording.get() {
            // Also what the kernel did not take: the request is then sent whole on another connection.
            let taken = if let Poll::Ready(Ok(n)) = &polled { *n } else { buf.len() };
            if !polled.is_pending() {
                self.ear.record.borrow_mut().extend_from_slice(&buf[..taken]);
            }
        }
        polled
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.ear.wrote.set(true);
        if self.ear.recording.get() && !polled.is_pending() {
            let mut taken = if let Poll::Ready(Ok(n)) = &polled { *n } else { usize::MAX };
            let mut record = self.ear.record.borrow_mut();
            for buf in bufs {
                let n = taken.min(buf.len());
                record.extend_from_slice(&buf[..n]);
                taken -= n;
            }
        }
        polled
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.io).poll_flush(cx);
        // Called when hyper's buffer is empty.
        if polled.is_ready() && self.ear.wrote.get() {
            self.ear.flushed.set(true);
            self.ear.close_if_sent();
        }
        polled
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recorded_head_becomes_a_request_again() {
        let request = parse(b"GET /a?b HTTP/1.1\r\nHost: x\r\nA: 1\r\nA: 2\r\n\r\n").unwrap();
        assert_eq!((request.method().as_str(), request.uri().to_string()), ("GET", "/a?b".to_owned()));
        assert_eq!(request.headers().get_all("a").iter().count(), 2);
        assert!(parse(b"GET / HTTP/1.1\r\nHost: x\r\n").is_none());
        assert!(parse(b"GET / HTTP/1.1\r\nHost: x\r\n\r\nmore").is_none());
    }
}
