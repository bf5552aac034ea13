//! Streams: plain TCP or mutual TLS over it ([`Stream`]), and a stream whose first bytes have been read already ([`Prefixed`]):
//! detection has to look at what the client sends, and whoever carries the connection on must see those bytes exactly once, before anything
//! else.

use bytes::{Buf, Bytes, BytesMut};
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

/// What is read ahead at most to find out who speaks.
const AHEAD: usize = 1024;

/// What is read at once from a socket that has much to give.
const BULK: usize = 64 * 1024;

/// A socket under TLS. The TLS library reads some KiB at a time, which for a bulk transfer are several system calls per record; this reads more
/// at once as long as the socket gives it, and keeps what the library has not taken yet. A connection that is not in bulk owns no buffer.
#[derive(Debug)]
pub struct Bulk {
    stream: TcpStream,
    /// The last read took all that it could.
    plenty: bool,
    ahead: Vec<u8>,
    at: usize,
}

impl From<TcpStream> for Bulk {
    fn from(stream: TcpStream) -> Self {
        Self { stream, plenty: false, ahead: Vec::new(), at: 0 }
    }
}

impl Bulk {
    /// The socket beneath.
    pub fn tcp(&self) -> &TcpStream {
        &self.stream
    }
}

impl AsyncRead for Bulk {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.at == this.ahead.len() {
            if !this.plenty {
                let before = buf.filled().len();
                ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
                this.plenty = buf.remaining() == 0 && buf.filled().len() > before;
                return Poll::Ready(Ok(()));
            }
            this.ahead.clear();
            this.at = 0;
            this.ahead.reserve(BULK);
            match tokio_util::io::poll_read_buf(Pin::new(&mut this.stream), cx, &mut this.ahead) {
                Poll::Ready(Ok(n)) => this.plenty = n >= buf.remaining(),
                other => {
                    // A pause, an end or an error: what comes next is read as usual.
                    this.plenty = false;
                    this.ahead = Vec::new();
                    return other.map_ok(drop);
                }
            }
        }
        let n = (this.ahead.len() - this.at).min(buf.remaining());
        buf.put_slice(&this.ahead[this.at..this.at + n]);
        this.at += n;
        if this.at == this.ahead.len() && !this.plenty {
            this.ahead = Vec::new();
            this.at = 0;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Bulk {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// A connection, to a client or to a destination.
#[derive(Debug)]
pub enum Stream {
    /// As it is on the wire.
    Plain(TcpStream),
    /// Mutual TLS of the mesh, terminated here.
    Secure(Box<TlsStream<Prefixed<Bulk>>>),
}

impl From<TcpStream> for Stream {
    fn from(stream: TcpStream) -> Self {
        Self::Plain(stream)
    }
}

impl Stream {
    /// The socket beneath, for its addresses and options. Reading from it or writing to it would break the stream.
    pub fn tcp(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Secure(stream) => stream.get_ref().0.get_ref().tcp(),
        }
    }

    /// Whether it is mutual TLS.
    pub fn is_secure(&self) -> bool {
        matches!(self, Self::Secure(_))
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.tcp().as_raw_fd()
    }
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Secure(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut *self {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Secure(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Secure(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Secure(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        match &mut *self {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Secure(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Secure(stream) => stream.is_write_vectored(),
        }
    }
}

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

impl Prefixed<Stream> {
    /// Waits until the other side has sent something, has ended or is broken; loses nothing of it, whatever becomes of the future.
    /// (Readiness alone does not say so: a new socket counts as ready until a read has found nothing.)
    pub async fn speaks(&mut self) {
        if !self.prefix.is_empty() {
            return;
        }
        match &mut self.stream {
            Stream::Plain(stream) => {
                let _ = stream.peek(&mut [0]).await;
            }
            Stream::Secure(stream) => {
                // What is inside can't be looked at without taking it. An end or an error will be found again by the next read.
                self.prefix = poll_fn(|cx| {
                    let mut ahead = [0; AHEAD];
                    let mut buf = ReadBuf::new(&mut ahead);
                    let _ = ready!(Pin::new(&mut *stream).poll_read(cx, &mut buf));
                    Poll::Ready(Bytes::copy_from_slice(buf.filled()))
                })
                .await;
            }
        }
    }

    /// Reads more of what the other side says into `seen`, after the prefix, which is moved there. 0: it has ended its stream. What was
    /// read is in `seen`, whatever becomes of the future.
    pub async fn look(&mut self, seen: &mut BytesMut) -> io::Result<usize> {
        if !self.prefix.is_empty() {
            let prefix = std::mem::take(&mut self.prefix);
            seen.extend_from_slice(&prefix);
            return Ok(prefix.len());
        }
        seen.reserve(1024);
        match &mut self.stream {
            // Not through `poll_read`: a silent connection is to own no buffer.
            Stream::Plain(stream) => loop {
                stream.readable().await?;
                match stream.try_read_buf(seen) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    read => return read,
                }
            },
            Stream::Secure(stream) => poll_fn(|cx| tokio_util::io::poll_read_buf(Pin::new(&mut *stream), cx, seen)).await,
        }
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
