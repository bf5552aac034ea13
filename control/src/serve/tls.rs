//! Accepts TLS connections and serves an axum router on them: the webhook (HTTP/1.1 and HTTP/2) and the proxies' API (gRPC).
//!
//! - A peer that does not finish its handshake or its request head in time is dropped; one connection's failure is never
//!   another's. When descriptors run out, accepting pauses.
//! - Shutdown: no more connections are accepted, idle ones are closed, calls under way are finished, up to a limit.

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// Time for a TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Time for the head of a request, and thus how long an idle HTTP/1.1 connection is kept. Longer than the 90 s for which clients keep
/// theirs: were we to close first, a review could be written into a connection that is just going.
const HEAD: Duration = Duration::from_secs(120);
/// How often an idle HTTP/2 peer is asked whether it still lives, and how long it has to answer.
const PING: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(20));
/// Streams that one HTTP/2 connection may have open.
const STREAMS: u32 = 256;
/// Pause after an accept that failed for want of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(100);

/// Address of the peer, an extension of each request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer(pub SocketAddr);

/// Serves `router` until `end`, then finishes what is under way, at most for `grace`.
pub async fn serve(
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    router: Router,
    end: CancellationToken,
    grace: Duration,
) {
    let acceptor = TlsAcceptor::from(tls);
    let graceful = Arc::new(std::sync::Mutex::new(Some(GracefulShutdown::new())));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = end.cancelled() => break,
        };
        match accepted {
            Ok((stream, peer)) => {
                let (acceptor, router, graceful) = (acceptor.clone(), router.clone(), graceful.clone());
                tokio::spawn(async move { connection(stream, peer, acceptor, router, graceful).await });
            }
            Err(error) if connection_error(&error) => debug!(%error, "a connection ended before it was accepted"),
            Err(error) => {
                warn!(%error, "cannot accept connections for the moment (out of file descriptors?); trying again");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    drop(listener);
    let under_way = graceful.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
    if let Some(under_way) = under_way
        && tokio::time::timeout(grace, under_way.shutdown()).await.is_err()
    {
        warn!("calls were still under way after {} s; they are cut off", grace.as_secs());
    }
}

fn connection_error(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    acceptor: TlsAcceptor,
    router: Router,
    graceful: Arc<std::sync::Mutex<Option<GracefulShutdown>>>,
) {
    // Without it, small answers wait for the peer's delayed acknowledgement.
    let _ = stream.set_nodelay(true);
    let stream = match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return debug!(%peer, %error, "TLS handshake failed"),
        Err(_) => return debug!(%peer, "TLS handshake took too long"),
    };
    let service = TowerToHyperService::new(router.layer(axum::Extension(Peer(peer))));
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(PING.0)
        .keep_alive_timeout(PING.1)
        .max_concurrent_streams(STREAMS);
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).into_owned();
    let watched = {
        let graceful = graceful.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // Shutdown has begun while this peer shook hands: it has to go elsewhere.
        let Some(graceful) = graceful.as_ref() else { return };
        graceful.watch(connection)
    };
    if let Err(error) = watched.await {
        debug!(%peer, %error, "connection ended");
    }
}
