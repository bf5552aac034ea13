//! Carries bytes where at least one side is mutual TLS.
//!
//! How a side ends stays what it was: the end of a TLS stream (close_notify) becomes a half-close and the other way round, and a side that
//! breaks off, which in TLS includes an end without close_notify (RFC 8446, section 6.1: it may have been cut by anybody on the way), becomes a reset.

use super::{BUFFER, Outcome, SCRATCH};
use crate::io::Stream;
use crate::sys;
use crate::telemetry::Flag;
use bytes::{Buf, Bytes};
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes that go one way.
struct Way {
    /// What was read and not yet written.
    rest: Bytes,
    /// Bytes carried.
    count: u64,
    unflushed: bool,
    ended: bool,
    shut: bool,
}

/// Whose stream failed.
enum Broken {
    Source,
    Sink,
}

impl Way {
    fn new(rest: Bytes) -> Self {
        Self { rest, count: 0, unflushed: false, ended: false, shut: false }
    }

    /// Goes on as far as it can. Ready: the way is over, in order or not.
    fn poll(&mut self, cx: &mut Context<'_>, from: &mut Stream, to: &mut Stream) -> Poll<Result<(), Broken>> {
        loop {
            if self.shut {
                return Poll::Ready(Ok(()));
            }
            while !self.rest.is_empty() {
                let n = ready!(Pin::new(&mut *to).poll_write(cx, &self.rest)).map_err(|_| Broken::Sink)?;
                if n == 0 {
                    return Poll::Ready(Err(Broken::Sink));
                }
                self.rest.advance(n);
                self.count += n as u64;
                self.unflushed = true;
            }
            if self.ended {
                return match ready!(Pin::new(&mut *to).poll_shutdown(cx)) {
                    // The other side may have gone altogether by now, which its own way tells.
                    Err(error) if error.kind() != io::ErrorKind::NotConnected => Poll::Ready(Err(Broken::Sink)),
                    _ => {
                        self.shut = true;
                        Poll::Ready(Ok(()))
                    }
                };
            }
            let read = SCRATCH.with_borrow_mut(|buffer| self.pass(cx, from, to, buffer));
            match read {
                Poll::Ready(Ok(0)) => self.ended = true,
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(broken)) => return Poll::Ready(Err(broken)),
                Poll::Pending => {
                    // What TLS holds back has to be out before we wait.
                    if self.unflushed {
                        ready!(Pin::new(&mut *to).poll_flush(cx)).map_err(|_| Broken::Sink)?;
                        self.unflushed = false;
                    }
                    return Poll::Pending;
                }
            }
        }
    }

    /// Reads once and writes what was read; what the sink does not take is kept. Returns how much was read.
    fn pass(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut Stream,
        to: &mut Stream,
        buffer: &mut [u8],
    ) -> Poll<Result<usize, Broken>> {
        debug_assert_eq!(buffer.len(), BUFFER);
        let mut buf = ReadBuf::new(buffer);
        // A TLS record holds 16 KiB at most: more of them make fewer writes.
        let ended = loop {
            let before = buf.filled().len();
            match Pin::new(&mut *from).poll_read(cx, &mut buf) {
                Poll::Ready(Ok(())) if buf.filled().len() == before => break true,
                Poll::Ready(Ok(())) if buf.remaining() > 0 => {}
                Poll::Ready(Ok(())) => break false,
                Poll::Ready(Err(_)) if buf.filled().is_empty() => return Poll::Ready(Err(Broken::Source)),
                // What came before the break is passed on; the next read finds the break again.
                Poll::Ready(Err(_)) => break false,
                Poll::Pending if buf.filled().is_empty() => return Poll::Pending,
                Poll::Pending => break false,
            }
        };
        let filled = buf.filled();
        if filled.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let written = match Pin::new(&mut *to).poll_write(cx, filled) {
            Poll::Ready(Ok(n)) => n,
            Poll::Ready(Err(_)) => return Poll::Ready(Err(Broken::Sink)),
            Poll::Pending => 0,
        };
        self.count += written as u64;
        self.unflushed |= written > 0;
        if written < filled.len() {
            self.rest = Bytes::copy_from_slice(&filled[written..]);
        }
        self.ended |= ended;
        Poll::Ready(Ok(filled.len()))
    }
}

/// Carries `prefix` and `said` (what was read of either side before) and then everything, both ways, until both sides have ended or `cut`
/// says why not.
pub(super) async fn carry(
    prefix: Bytes,
    mut client: Stream,
    said: Bytes,
    mut upstream: Stream,
    cut: impl Future<Output = Flag>,
) -> Outcome {
    let mut cut = std::pin::pin!(cut);
    let (mut up, mut down) = (Way::new(prefix), Way::new(said));
    let broken = poll_fn(|cx| {
        let first = up.poll(cx, &mut client, &mut upstream);
        let second = down.poll(cx, &mut upstream, &mut client);
        match (first, second) {
            (Poll::Ready(Err(Broken::Source)), _) | (_, Poll::Ready(Err(Broken::Sink))) => {
                Poll::Ready(Some(Flag::DownstreamTermination))
            }
            (Poll::Ready(Err(Broken::Sink)), _) | (_, Poll::Ready(Err(Broken::Source))) => {
                Poll::Ready(Some(Flag::UpstreamTermination))
            }
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => Poll::Ready(None),
            _ => cut.as_mut().poll(cx).map(Some),
        }
    })
    .await;
    if broken.is_some() {
        sys::reset_on_close(client.tcp());
        sys::reset_on_close(upstream.tcp());
    }
    Outcome { received: up.count, sent: down.count, flag: broken }
}
