//! What a connection or stream becomes after a successful `Upgrade` or CONNECT: bytes both ways, each direction closed when
//! its sender closes it, until both are.

use super::pool::LeasedH2;
use super::tally::Tally;
use super::tap::Handover;
use crate::drain::Guard;
use crate::io::Prefixed;
use bytes::Bytes;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use std::error::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::oneshot;
use tokio::task::spawn_local;

/// Per direction. Small, because tunnels are mostly long-lived and mostly idle.
const BUFFER: usize = 16 * 1024;

/// The other end of a tunnel, before it is there.
#[derive(Debug)]
pub(crate) enum Tunnel {
    /// An HTTP/1 connection, handed over by its task once the response is read.
    H1(oneshot::Receiver<Handover>),
}

/// Carries an HTTP/1 connection on as a tunnel: `client` with what was read of it beyond the request.
pub(crate) async fn run<S>(client: S, read_ahead: Bytes, other: Tunnel, mut tally: Tally)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let Tunnel::H1(handover) = other;
    // No handover: the destination's connection broke in the very moment; the client sees its end.
    let Ok((server, response_ahead)) = handover.await else { return };
    let mut client = Prefixed::new(read_ahead, client);
    let mut server = Prefixed::new(response_ahead, server);
    copy(&mut client, &mut server, &mut tally).await;
}

async fn copy<A, B>(client: &mut A, server: &mut B, tally: &mut Tally)
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    if let Ok((_, sent)) = tokio::io::copy_bidirectional_with_sizes(client, server, BUFFER, BUFFER).await {
        tally.count(sent as usize);
        tally.body_ended(None);
    }
}

/// Joins two HTTP/2 streams.
pub(crate) fn spawn_h2(client: OnUpgrade, server: OnUpgrade, lease: LeasedH2, mut tally: Tally, guard: Guard) {
    spawn_local(async move {
        let _held = (lease, guard);
        if let (Ok(client), Ok(server)) = (client.await, server.await) {
            copy(&mut TokioIo::new(client), &mut TokioIo::new(server), &mut tally).await;
        }
    });
}

/// Whether the destination says that it has not processed the stream: `REFUSED_STREAM`, or a stream above the last one of a
/// graceful GOAWAY (RFC 9113, sections 8.7 and 6.8).
pub(crate) fn was_refused(error: &hyper::Error) -> bool {
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            let refused = error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
            let gone = error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR);
            return error.is_remote() && (refused || gone);
        }
        cause = error.source();
    }
    false
}
