//! Gathers what an HTTP/2 connection writes during one turn into few system calls.
//!
//! The HTTP/2 library writes and flushes each DATA frame of 256 bytes or more by itself, so a hundred responses that are ready at
//! once would cost a hundred writes. A [`Corked`] stream only notes a flush; whoever polls the connection pulls the
//! [`Cork`] after each turn, when the library has nothing more to say. Large writes go straight through.
//!
//! Invariant: what was accepted is written before anything that came later, and before the stream is shut down. An
//! error of a late write is kept and reported by the next write or flush.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What is gathered at most. A stream of large DATA frames reaches it with the second and is then not copied any more.
const GATHERED: usize = 32 * 1024;

#[derive(Debug)]
struct Gathering<S> {
    stream: S,
    out: Vec<u8>,
    written: usize,
    failed: Option<io::Error>,
}

impl<S: AsyncWrite + Unpin> Gathering<S> {
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(error) = self.failed.take() {
            return Poll::Ready(Err(error));
        }
        while self.written < self.out.len() {
            let n = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.out[self.written..]))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += n;
        }
        // Connections that rest own no buffer.
        self.out = Vec::new();
        self.written = 0;
        Poll::Ready(Ok(()))
    }
}

/// The connection's side: a stream whose writes and flushes wait for the cork.
#[derive(Debug)]
pub(crate) struct Corked<S>(Rc<RefCell<Gathering<S>>>);

/// The side of whoever polls the connection.
#[derive(Debug)]
pub(crate) struct Cork<S>(Rc<RefCell<Gathering<S>>>);

/// Puts a cork on `stream`.
pub(crate) fn cork<S>(stream: S) -> (Corked<S>, Cork<S>) {
    let shared = Rc::new(RefCell::new(Gathering { stream, out: Vec::new(), written: 0, failed: None }));
    (Corked(Rc::clone(&shared)), Cork(shared))
}

impl<S: AsyncWrite + Unpin> Cork<S> {
    /// Writes what has gathered, or as much as the kernel takes; the task is woken when it takes more. Returns
    /// whether the connection has to be polled again, to learn of an error.
    pub(crate) fn pull(&self, cx: &mut Context<'_>) -> bool {
        let mut gathering = self.0.borrow_mut();
        if gathering.out.is_empty() {
            return false;
        }
        match gathering.poll_drain(cx) {
            Poll::Ready(Err(error)) => {
                gathering.out = Vec::new();
                gathering.written = 0;
                gathering.failed = Some(error);
                true
            }
            Poll::Ready(Ok(())) | Poll::Pending => false,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Corked<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0.borrow_mut().stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Corked<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let mut this = self.0.borrow_mut();
        if let Some(error) = this.failed.take() {
            return Poll::Ready(Err(error));
        }
        let n: usize = bufs.iter().map(|buf| buf.len()).sum();
        if this.out.len() - this.written + n > GATHERED {
            ready!(this.poll_drain(cx))?;
            if n > GATHERED / 2 {
                return Pin::new(&mut this.stream).poll_write_vectored(cx, bufs);
            }
        }
        if this.out.capacity() == 0 {
            this.out.reserve(GATHERED / 4);
        }
        for buf in bufs {
            this.out.extend_from_slice(buf);
        }
        Poll::Ready(Ok(n))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.0.borrow_mut().failed.take().map_or(Ok(()), Err))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut this = self.0.borrow_mut();
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn bytes_wait_for_the_pull_and_keep_their_order() {
        let (ours, mut theirs) = tokio::io::duplex(1 << 20);
        let (mut corked, cork) = cork(ours);
        let mut expected = Vec::new();
        for (i, length) in [10, GATHERED - 20, 300, GATHERED * 2, 5, 17_000, 17_000, 1].into_iter().enumerate() {
            let piece = vec![i as u8; length];
            corked.write_all(&piece).await.unwrap();
            corked.flush().await.unwrap();
            expected.extend(piece);
        }
        poll_fn(|cx| Poll::Ready(cork.pull(cx))).await;
        let mut seen = vec![0; expected.len()];
        theirs.read_exact(&mut seen).await.unwrap();
        assert!(seen == expected);
        corked.write_all(b"last").await.unwrap();
        let early = tokio::time::timeout(std::time::Duration::from_millis(20), theirs.read_u8()).await;
        assert!(early.is_err(), "written before the pull");
        corked.shutdown().await.unwrap();
        let mut rest = String::new();
        theirs.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "last");
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_holds_the_writer_up() {
        let (ours, mut theirs) = tokio::io::duplex(1000);
        let (mut corked, cork) = cork(ours);
        let mut accepted = 0;
        while tokio::time::timeout(std::time::Duration::from_millis(20), corked.write_all(&[7; 1000])).await.is_ok() {
            accepted += 1000;
            assert!(accepted < 4 * GATHERED, "no back-pressure");
            poll_fn(|cx| Poll::Ready(cork.pull(cx))).await;
        }
        let mut seen = vec![0; 1000];
        theirs.read_exact(&mut seen).await.unwrap();
        assert!(!poll_fn(|cx| Poll::Ready(cork.pull(cx))).await);
    }

    #[tokio::test]
    async fn an_error_of_a_late_write_reaches_the_connection() {
        let (ours, theirs) = tokio::io::duplex(10);
        let (mut corked, cork) = cork(ours);
        drop(theirs);
        corked.write_all(b"x").await.unwrap();
        assert!(poll_fn(|cx| Poll::Ready(cork.pull(cx))).await, "the connection has to be polled again");
        assert!(corked.flush().await.is_err());
    }
}
