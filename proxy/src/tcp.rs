//! Carries bytes between two sockets until both sides have ended, and passes on how they ended: a half-close as a half-close,
//! a reset as a reset.
//!
//! Small exchanges are copied through a buffer that all connections of the thread share (a connection that waits owns
//! none); a side that fills it whole is a bulk transfer and is spliced through a pipe, so its bytes stay in the kernel.
//! What a slow reader leaves over is kept, at most one buffer's worth, and its sender is not read meanwhile.
//!
//! Where a side is mutual TLS, its bytes have to come up to be en- or decrypted ([`secure`]); the same buffer is used.

mod secure;

use crate::io::{Prefixed, Stream};
use crate::sys::{self, Pipes};
use crate::telemetry::Flag;
use std::cell::{Cell, RefCell};
use std::io;
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::TcpStream;

const BUFFER: usize = 64 * 1024;
/// How long a spliced sender may pause and keep its pipe.
const PAUSE: Duration = Duration::from_millis(5);

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER].into_boxed_slice());
}

/// How a carried connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Bytes from the client.
    pub received: u64,
    /// Bytes to the client.
    pub sent: u64,
    /// Who broke it, if it was broken.
    pub flag: Option<Flag>,
}

/// Whose socket failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Source,
    Sink,
}

/// Carries everything, both ways, beginning with what has been read already, until both sides have ended or `cut` says why not.
pub async fn carry(
    client: Prefixed<Stream>,
    upstream: Prefixed<Stream>,
    pipes: &Pipes,
    cut: impl Future<Output = Flag>,
) -> Outcome {
    let (prefix, client) = client.into_parts();
    let (said, upstream) = upstream.into_parts();
    match (client, upstream) {
        (Stream::Plain(client), Stream::Plain(upstream)) if said.is_empty() => plain(&prefix, client, upstream, pipes, cut).await,
        (client, upstream) => secure::carry(prefix, client, said, upstream, cut).await,
    }
}

/// Both sides are as they are on the wire.
async fn plain(prefix: &[u8], client: TcpStream, upstream: TcpStream, pipes: &Pipes, cut: impl Future<Output = Flag>) -> Outcome {
    let (received, sent) = (Cell::new(0), Cell::new(0));
    let broken = {
        let up = pump(prefix, &client, &upstream, pipes, &received);
        let down = pump(&[], &upstream, &client, pipes, &sent);
        let (mut up, mut down, mut cut) = (std::pin::pin!(up), std::pin::pin!(down), std::pin::pin!(cut));
        let (mut up_ended, mut down_ended) = (false, false);
        loop {
            if up_ended && down_ended {
                break None;
            }
            tokio::select! {
                end = &mut up, if !up_ended => match end {
                    Ok(()) => up_ended = true,
                    Err(Side::Source) => break Some(Flag::DownstreamTermination),
                    Err(Side::Sink) => break Some(Flag::UpstreamTermination),
                },
                end = &mut down, if !down_ended => match end {
                    Ok(()) => down_ended = true,
                    Err(Side::Source) => break Some(Flag::UpstreamTermination),
                    Err(Side::Sink) => break Some(Flag::DownstreamTermination),
                },
                flag = &mut cut => break Some(flag),
                // A side that has ended its stream is not read any more, but may still be reset.
                () = failed(&client), if up_ended => break Some(Flag::DownstreamTermination),
                () = failed(&upstream), if down_ended => break Some(Flag::UpstreamTermination),
            }
        }
    };
    if broken.is_some() {
        sys::reset_on_close(&client);
        sys::reset_on_close(&upstream);
    }
    Outcome { received: received.get(), sent: sent.get(), flag: broken }
}

async fn failed(stream: &TcpStream) {
    // Without an error pending the readiness is only a hang-up of both directions: nothing to say.
    let pending = stream.ready(Interest::ERROR).await.is_ok() && matches!(stream.take_error(), Ok(None));
    if pending {
        std::future::pending::<()>().await;
    }
}

async fn pump(prefix: &[u8], from: &TcpStream, to: &TcpStream, pipes: &Pipes, count: &Cell<u64>) -> Result<(), Side> {
    let mut rest = Vec::new();
    if !prefix.is_empty() {
        write_all(to, prefix).await.map_err(|_| Side::Sink)?;
        count.set(count.get() + prefix.len() as u64);
    }
    loop {
        from.readable().await.map_err(|_| Side::Source)?;
        let read = SCRATCH.with_borrow_mut(|buffer| {
            let n = match from.try_read(buffer) {
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(_) => return Err(Side::Source),
            };
            let written = match to.try_write(&buffer[..n]) {
                Ok(written) => written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(_) if n == 0 => 0,
                Err(_) => return Err(Side::Sink),
            };
            rest.extend_from_slice(&buffer[written..n]);
            Ok(Some(n))
        })?;
        let Some(n) = read else { continue };
        if n == 0 {
            return sys::shutdown_write(to).map_err(|_| Side::Sink);
        }
        if !rest.is_empty() {
            write_all(to, &rest).await.map_err(|_| Side::Sink)?;
            rest = Vec::new();
        }
        count.set(count.get() + n as u64);
        if n == BUFFER && splice(from, to, pipes, count).await? {
            return Ok(());
        }
        // A busy pair would keep the thread for itself otherwise.
        tokio::task::consume_budget().await;
    }
}

async fn write_all(to: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.try_write(bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => to.writable().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Splices until the source has nothing at hand (`false`: copy on, which waits without holding a pipe) or has ended.
async fn splice(from: &TcpStream, to: &TcpStream, pipes: &Pipes, count: &Cell<u64>) -> Result<bool, Side> {
    let Ok(pipe) = pipes.take() else { return Ok(false) };
    loop {
        let filled = match from.try_io(Interest::READABLE, || pipe.fill(from)) {
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // A sender at full speed is back within moments; one that pauses is copied until it fills a buffer again.
                match tokio::time::timeout(PAUSE, from.readable()).await {
                    Ok(ready) => ready.map_err(|_| Side::Source)?,
                    Err(_) => {
                        pipes.give(pipe);
                        return Ok(false);
                    }
                }
                continue;
            }
            // The kernel can't splice these: copying can.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(false),
            Err(_) => return Err(Side::Source),
        };
        if filled == 0 {
            pipes.give(pipe);
            return sys::shutdown_write(to).map(|()| true).map_err(|_| Side::Sink);
        }
        let mut left = filled;
        while left > 0 {
            match to.try_io(Interest::WRITABLE, || pipe.pour(to, left)) {
                Ok(n) => left -= n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    to.writable().await.map_err(|_| Side::Sink)?;
                }
                Err(_) => return Err(Side::Sink),
            }
        }
        count.set(count.get() + filled as u64);
        tokio::task::consume_budget().await;
    }
}
