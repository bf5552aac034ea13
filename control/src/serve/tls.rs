//! Accepts TLS connections and serves an axum router on them: the webhook (HTTP/1.1 and HTTP/2) and the proxies' API (gRPC).
//!
//! - A peer that does not finish its handshake or its request head in time is dropped; one connection's failure is never
//!   another's. When descriptors run out, accepting pauses.
//! - One address may have so many connections open ([`PER_ADDRESS`], or half of the descriptors that we may have); more are closed at
//!   once, so that a client that goes wild leaves room for all others.
//! - Shutdown: no more connections are accepted, idle ones are closed, calls under way are finished, up to a limit.

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
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
/// Connections that one address may have open. A gateway in front of many proxies needs one for each of them.
const PER_ADDRESS: usize = 2000;
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
    let open = Arc::new(Open::new(descriptors().map_or(PER_ADDRESS, |limit| (limit / 2).clamp(1, PER_ADDRESS))));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = end.cancelled() => break,
        };
        match accepted {
            Ok((stream, peer)) => {
                let Some(place) = open.clone().place(peer.ip()) else {
                    debug!(%peer, "too many connections are open from this address; closing this one");
                    continue;
                };
                let (acceptor, router, graceful) = (acceptor.clone(), router.clone(), graceful.clone());
                tokio::spawn(async move {
                    let _place = place;
                    connection(stream, peer, acceptor, router, graceful).await;
                });
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

/// Open connections by address.
struct Open {
    most: usize,
    counts: std::sync::Mutex<HashMap<IpAddr, usize>>,
}

impl Open {
    fn new(most: usize) -> Self {
        Self { most, counts: std::sync::Mutex::default() }
    }

    /// A place for a connection, given back when it is dropped; `None`: the address has its share.
    fn place(self: Arc<Self>, address: IpAddr) -> Option<Place> {
        let address = address.to_canonical();
        {
            let mut counts = self.counts.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let count = counts.entry(address).or_default();
            if *count >= self.most {
                return None;
            }
            *count += 1;
        }
        Some(Place { open: self, address })
    }
}

struct Place {
    open: Arc<Open>,
    address: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.open.counts.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.address) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}

/// How many file descriptors this process may have open; `None`: as many as it likes, or unknown.
fn descriptors() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/self/limits").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_its_share_and_no_more() {
        let open = Arc::new(Open::new(2));
        let (one, other): (IpAddr, IpAddr) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        let places = [open.clone().place(one).unwrap(), open.clone().place("::ffff:10.0.0.1".parse().unwrap()).unwrap()];
        assert!(open.clone().place(one).is_none());
        assert!(open.clone().place(other).is_some());
        drop(places);
        assert!(open.clone().place(one).is_some());
        assert!(open.counts.lock().unwrap().is_empty());
        assert!(descriptors().is_none_or(|limit| limit > 0));
    }
}
