//! A stream whose first bytes have been read already: detection has to look at what the client sends, and whoever
//! carries the connection on must see those bytes exactly once, before anything else.

use bytes::{Buf, Bytes};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// `S` with bytes in front that were read from it before. Writes go straight through.
#[derive(Debug)]
pub struct Prefixed<S> {
    prefix: Bytes,
    stream: S,
}

impl<S> Prefixed<S> {
    /// `prefix` is what was taken from `stream`; empty if nothing was.
    pub fn new(prefix: Bytes, stream: S) -> Self {
        Self { prefix, stream }
    }

    /// What has not been read of the prefix yet.
    pub fn prefix(&self) -> &[u8] {
        &self.prefix
    }

    /// The stream beneath, for its addresses and options. Reading from it would reorder bytes.
    pub fn get_ref(&self) -> &S {
        &self.stream
    }

    /// The rest of the prefix, which is to be forwarded first, and the stream.
    pub fn into_parts(self) -> (Bytes, S) {
        (self.prefix, self.stream)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.prefix.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buf);
        }
        let n = self.prefix.len().min(buf.remaining());
        buf.put_slice(&self.prefix[..n]);
        self.prefix.advance(n);
        if self.prefix.is_empty() {
            // Lets go of the buffer.
            self.prefix = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefixed<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_shutdown(cx))?;
        Poll::Ready(Ok(()))
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::AsyncReadExt;

    proptest! {
        #[test]
        fn bytes_come_once_and_in_order(prefix: Vec<u8>, rest: Vec<u8>, chunk in 1usize..64) {
            let mut io = Prefixed::new(Bytes::from(prefix.clone()), &rest[..]);
            let mut seen = Vec::new();
            let mut buf = vec![0; chunk];
            futures::executor::block_on(async {
                loop {
                    let n = io.read(&mut buf).await.unwrap();
                    if n == 0 { break }
                    seen.extend_from_slice(&buf[..n]);
                }
            });
            prop_assert_eq!(seen, [prefix, rest].concat());
        }
    }
}
