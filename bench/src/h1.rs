//! HTTP/1.1 from prepared bytes: the generator's connections and the backend that answers them.

use anyhow::{Context, Result, bail};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Size of the backend's response body.
pub(crate) const BODY: usize = 1024;

/// A request on a connection that stays.
pub(crate) const KEEP_ALIVE: &[u8] =
    b"GET /bench HTTP/1.1\r\nHost: bench.example\r\nUser-Agent: weft-bench\r\nAccept: */*\r\n\r\n";

/// A request that is the last of its connection.
const LAST: &[u8] =
    b"GET /bench HTTP/1.1\r\nHost: bench.example\r\nUser-Agent: weft-bench\r\nAccept: */*\r\nConnection: close\r\n\r\n";

/// A peer that takes longer than this to answer has failed.
const PATIENCE: Duration = Duration::from_secs(10);

/// A client connection: one request at a time.
#[derive(Debug)]
pub(crate) struct Conn<S> {
    io: S,
    buf: Box<[u8]>,
}

impl Conn<TcpStream> {
    /// Connects over TCP.
    pub(crate) async fn connect(to: SocketAddr) -> Result<Self> {
        let io = TcpStream::connect(to).await.with_context(|| format!("can't connect to {to}"))?;
        io.set_nodelay(true)?;
        Ok(Self::over(io, 4096))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Conn<S> {
    /// Speaks over `io`. Responses may have `capacity` bytes.
    pub(crate) fn over(io: S, capacity: usize) -> Self {
        Self { io, buf: vec![0; capacity].into() }
    }

    /// Sends `request` and reads the whole response, which must be a 200 with a length. Returns its body.
    pub(crate) async fn exchange(&mut self, request: &[u8]) -> Result<&[u8]> {
        self.io.write_all(request).await.context("writing the request")?;
        let mut filled = 0;
        let (mut head, mut length) = (0, 0);
        loop {
            if filled == self.buf.len() {
                bail!("the response is larger than {} bytes", self.buf.len());
            }
            let n = self.io.read(&mut self.buf[filled..]).await.context("reading the response")?;
            if n == 0 {
                bail!("the connection was closed after {filled} bytes of the response");
            }
            filled += n;
            if head == 0 {
                let Some(parsed) = parse_head(&self.buf[..filled])? else {
                    continue;
                };
                (head, length) = parsed;
            }
            match filled.cmp(&(head + length)) {
                std::cmp::Ordering::Less => {}
                std::cmp::Ordering::Equal => return Ok(&self.buf[head..filled]),
                std::cmp::Ordering::Greater => bail!("bytes after the end of the response"),
            }
        }
    }

    /// Reads to the end of the connection; the peer must not send anything more.
    async fn expect_end(&mut self) -> Result<()> {
        match self.io.read(&mut self.buf).await {
            Ok(0) => Ok(()),
            Ok(n) => bail!("{n} bytes where the connection should have ended"),
            Err(error) => Err(error).context("waiting for the end of the connection"),
        }
    }
}

/// Length of the head and of the body that follows; `None` while the head is incomplete.
fn parse_head(bytes: &[u8]) -> Result<Option<(usize, usize)>> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut response = httparse::Response::new(&mut headers);
    let head = match response.parse(bytes).context("this is no HTTP/1.1 response")? {
        httparse::Status::Complete(head) => head,
        httparse::Status::Partial => return Ok(None),
    };
    if response.code != Some(200) {
        bail!("status {} where 200 was expected", response.code.unwrap_or(0));
    }
    let length = response
        .headers
        .iter()
        .find(|h| h.name.eq_ignore_ascii_case("content-length"))
        .and_then(|h| std::str::from_utf8(h.value).ok()?.parse().ok())
        .context("the response has no Content-Length (the backend sent one)")?;
    Ok(Some((head, length)))
}

/// One connection, request after request until `stop`; each adds one to `done`.
pub(crate) async fn closed_loop(to: SocketAddr, done: Arc<AtomicU64>, stop: Instant) -> Result<()> {
    let mut conn = Conn::connect(to).await?;
    while Instant::now() < stop {
        checked(conn.exchange(KEEP_ALIVE)).await?;
        done.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// A connection per request until `stop`; each adds one to `done`.
pub(crate) async fn churn(to: SocketAddr, done: Arc<AtomicU64>, stop: Instant) -> Result<()> {
    while Instant::now() < stop {
        let mut conn = Conn::connect(to).await?;
        checked(conn.exchange(LAST)).await?;
        tokio::time::timeout(PATIENCE, conn.expect_end()).await.context("the connection is not closed")??;
        done.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// One request, whose response must be the backend's.
pub(crate) async fn probe(to: SocketAddr) -> Result<Conn<TcpStream>> {
    let mut conn = Conn::connect(to).await?;
    checked(conn.exchange(KEEP_ALIVE)).await?;
    Ok(conn)
}

/// The response must come in time and be the backend's in full.
pub(crate) async fn checked(exchange: impl Future<Output = Result<&[u8]>>) -> Result<()> {
    let body = tokio::time::timeout(PATIENCE, exchange).await.context("no answer within 10 s")??;
    if body.len() != BODY {
        bail!("a body of {} bytes where {BODY} were expected", body.len());
    }
    Ok(())
}

/// The backend: answers every request with the same 1 KiB. Pipelined requests too, as peers may send them so.
pub(crate) async fn serve(listener: TcpListener) {
    loop {
        // Out of descriptors, or a client that has gone already: the next accept may well succeed.
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(5)).await;
            continue;
        };
        tokio::spawn(answer(stream));
    }
}

async fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buf = [0u8; 4096];
    let mut filled = 0;
    loop {
        let n = stream.read(&mut buf[filled..]).await?;
        if n == 0 {
            return Ok(());
        }
        filled += n;
        let mut rest = 0;
        while let Some(end) = buf[rest..filled].windows(4).position(|w| w == b"\r\n\r\n") {
            let last = ends_connection(&buf[rest..rest + end]);
            rest += end + 4;
            stream.write_all(response()).await?;
            if last {
                return stream.shutdown().await;
            }
        }
        buf.copy_within(rest..filled, 0);
        filled -= rest;
        if filled == buf.len() {
            return Err(std::io::Error::other("a request head of more than 4 KiB"));
        }
    }
}

/// Whether a request head holds `Connection: close`, in any case. (A peer with a pool never passes it on.)
fn ends_connection(head: &[u8]) -> bool {
    let wanted = b"connection: close";
    head.windows(wanted.len()).any(|w| (w[0] | 0x20) == b'c' && w.eq_ignore_ascii_case(wanted))
}

fn response() -> &'static [u8] {
    static RESPONSE: OnceLock<Vec<u8>> = OnceLock::new();
    RESPONSE.get_or_init(|| {
        let mut bytes = format!("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {BODY}\r\n\r\n").into_bytes();
        bytes.resize(bytes.len() + BODY, b'w');
        bytes
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_told_from_bodies() {
        let head = b"HTTP/1.1 200 OK\r\ncontent-LENGTH: 5\r\n\r\n";
        assert_eq!(parse_head(&head[..20]).unwrap(), None);
        assert_eq!(parse_head(head).unwrap(), Some((head.len(), 5)));
        assert!(parse_head(b"HTTP/1.1 503 No\r\ncontent-length: 5\r\n\r\n").is_err());
        assert!(parse_head(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").is_err());
        assert!(parse_head(b"SSH-2.0-OpenSSH\r\n").is_err());
    }

    #[tokio::test]
    async fn generator_and_backend_understand_each_other() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        tokio::spawn(serve(listener));
        let done = Arc::new(AtomicU64::new(0));
        closed_loop(to, Arc::clone(&done), Instant::now() + Duration::from_millis(50)).await.unwrap();
        assert!(done.load(Ordering::Relaxed) > 0);
        // Two requests at once, the second in two pieces.
        let mut stream = TcpStream::connect(to).await.unwrap();
        stream.write_all(KEEP_ALIVE).await.unwrap();
        stream.write_all(&KEEP_ALIVE[..30]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        stream.write_all(&KEEP_ALIVE[30..]).await.unwrap();
        let mut both = vec![0; response().len() * 2];
        stream.read_exact(&mut both).await.unwrap();
        assert_eq!(both, [response(), response()].concat());
    }

    #[tokio::test]
    async fn a_peer_that_answers_wrongly_is_an_error() {
        for wrong in ["HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", "HTTP/1.1 502 Bad\r\nContent-Length: 0\r\n\r\n", ""] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let to = listener.local_addr().unwrap();
            tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                stream.read_exact(&mut [0; KEEP_ALIVE.len()]).await.unwrap();
                stream.write_all(wrong.as_bytes()).await.unwrap();
            });
            assert!(probe(to).await.is_err(), "{wrong:?} passed for the backend's answer");
        }
    }
}
