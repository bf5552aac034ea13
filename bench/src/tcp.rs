//! Raw TCP: a backend that sends for ever and a client that throws everything away.
//!
//! The client asks the kernel to discard (`MSG_TRUNC`), so that the measuring core copies each byte once and not twice.

use anyhow::{Context, Result, bail};
use nix::sys::socket::{MsgFlags, recv};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::{TcpListener, TcpStream};

const CHUNK: usize = 256 * 1024;

/// Reads from one connection until `stop`; adds the number of bytes to `done`.
pub(crate) async fn drain(to: SocketAddr, done: Arc<AtomicU64>, stop: Instant) -> Result<()> {
    let stream = TcpStream::connect(to).await.with_context(|| format!("can't connect to {to}"))?;
    // MSG_TRUNC discards up to the buffer's length; its contents stay as they are.
    let mut buf = vec![0; 4 * CHUNK];
    while Instant::now() < stop {
        tokio::time::timeout(Duration::from_secs(10), stream.readable()).await.context("no bytes for 10 s")??;
        let outcome = stream.try_io(Interest::READABLE, || {
            recv(stream.as_raw_fd(), &mut buf, MsgFlags::MSG_TRUNC | MsgFlags::MSG_DONTWAIT).map_err(Into::into)
        });
        match outcome {
            Ok(0) => bail!("the stream ended, although the backend sends for ever"),
            Ok(n) => done.fetch_add(n as u64, Ordering::Relaxed),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error).context("reading the stream"),
        };
        // Where the peer always has more, the connections would otherwise starve each other and the backend.
        tokio::task::yield_now().await;
    }
    Ok(())
}

/// The backend: sends to each client as much as it takes.
pub(crate) async fn serve(listener: TcpListener) {
    loop {
        let Ok((mut stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(5)).await;
            continue;
        };
        tokio::spawn(async move {
            let chunk = vec![b'w'; CHUNK];
            // Ends when the client has gone.
            while stream.write_all(&chunk).await.is_ok() {}
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bytes_are_counted() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        tokio::spawn(serve(listener));
        let done = Arc::new(AtomicU64::new(0));
        drain(to, Arc::clone(&done), Instant::now() + Duration::from_millis(100)).await.unwrap();
        assert!(done.load(Ordering::Relaxed) > CHUNK as u64);
    }

    #[tokio::test]
    async fn an_end_is_an_error() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        tokio::spawn(async move { drop(listener.accept().await) });
        assert!(drain(to, Arc::default(), Instant::now() + Duration::from_secs(5)).await.is_err());
    }
}
