//! Connections from the proxy to where a client wanted to go.

use crate::balance::Endpoint;
use crate::conn::{Direction, Downstream};
use crate::io::Stream;
use crate::log;
use crate::settings::{Mode, Settings};
use crate::sys;
use crate::telemetry::Flag;
use crate::tls::{Alpn, HandshakeError, IdentitySet};
use crate::worker::Worker;
use std::io;
use std::net::{IpAddr, SocketAddr};
use tokio::net::TcpStream;
use weft_api::names;

/// How a connection is made: also what connections in a pool are alike by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Plan {
    /// Where to connect.
    pub target: SocketAddr,
    /// The source address to bind, if one has to be: 127.0.0.6 / ::6 towards the app, the client's own in TPROXY mode.
    pub source: Option<IpAddr>,
    /// Whose connection it is, where it is no other client's: an address that the kernel may balance (a Service's) has to be
    /// connected anew for each connection of the app, or one endpoint would get all of its requests.
    pub client: Option<SocketAddr>,
    /// Who has to prove himself there, by mutual TLS; none: plaintext.
    pub expected: Option<IdentitySet>,
}

/// Why a connection could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The destination is the proxy itself.
    #[error("the destination {0} is the proxy itself: refused, it would loop")]
    Loop(SocketAddr),
    /// Nothing came back in time.
    #[error("connecting {0} timed out; maybe a NetworkPolicy or a firewall drops the packets")]
    Timeout(SocketAddr),
    /// The kernel said no.
    #[error("connecting {0} failed: {1}")]
    Io(SocketAddr, #[source] io::Error),
    /// Whoever is there could not prove to be whom we were told to expect. Nothing was sent.
    #[error("{0} is not who it should be: {1}; refused")]
    Peer(SocketAddr, String),
    /// Mutual TLS could not be set up.
    #[error("mutual TLS with {0} failed: {1}")]
    Handshake(SocketAddr, String),
    /// Mutual TLS is due, and this proxy has no certificate.
    #[error("mutual TLS with {0} is due and this proxy has no certificate yet; can it reach the control plane? (its log says)")]
    NoCertificate(SocketAddr),
    /// The Service has no endpoint that is ready.
    #[error("no pod behind {0} is ready")]
    Nobody(String),
}

impl ConnectError {
    /// The response flag that stands for it.
    pub fn flag(&self) -> Flag {
        match self {
            Self::Loop(_) => Flag::NoRoute,
            Self::Timeout(_) | Self::Io(..) | Self::Handshake(..) | Self::NoCertificate(_) => Flag::UpstreamConnectFailure,
            Self::Peer(..) => Flag::UpstreamIdentity,
            Self::Nobody(_) => Flag::NoHealthyUpstream,
        }
    }

    /// Whether another endpoint may do better. One that is not who it should be is reported, not passed over.
    pub fn is_of_endpoint(&self) -> bool {
        matches!(self, Self::Timeout(_) | Self::Io(..) | Self::Handshake(..))
    }
}

/// How to go where the client of `down` wanted to go.
pub fn plan(worker: &Worker, down: &Downstream) -> Plan {
    let target = down.original.0;
    let source = (down.direction == Direction::Inbound && !down.fixed).then(|| match (worker.settings.mode, target) {
        (Mode::Tproxy, _) => down.peer.ip(),
        (Mode::Redirect, SocketAddr::V4(_)) => names::PASSTHROUGH_V4.into(),
        (Mode::Redirect, SocketAddr::V6(_)) => names::PASSTHROUGH_V6.into(),
    });
    let client = (down.direction == Direction::Outbound && !down.fixed).then_some(down.peer);
    Plan { target, source, client, expected: None }
}

/// Whether a connection to `target` would come back to one of our own listeners: the port is one of theirs, and the address
/// is this pod's. A listener whose upstream is fixed only counts by its exact address.
pub fn loops(settings: &Settings, target: SocketAddr) -> bool {
    settings.listeners.iter().any(|listener| {
        if listener.address.port() != target.port() {
            return false;
        }
        let ip = target.ip();
        let own = ip.is_loopback() || ip.is_unspecified() || settings.identity.addresses.contains(&ip);
        listener.address.ip() == ip || listener.address.ip().is_unspecified() && own
    })
}

/// Endpoints that are tried at most before a connection or request is given up.
pub const ENDPOINTS: usize = 3;

/// How to go to an endpoint that was picked.
pub fn to_endpoint(endpoint: &Endpoint) -> Plan {
    Plan { target: endpoint.address, source: None, client: None, expected: endpoint.expected }
}

/// Connects, and secures the connection if that is due. `alpn` is what will be spoken.
pub async fn open(worker: &Worker, plan: &Plan, alpn: Alpn) -> Result<Stream, ConnectError> {
    let stream = connect(worker, plan).await?;
    let Some(expected) = plan.expected else { return Ok(Stream::Plain(stream)) };
    let target = plan.target;
    let secrets = worker.identity.as_ref().and_then(|holder| holder.get()).ok_or(ConnectError::NoCertificate(target))?;
    // Boxed: the handshake is large, and most of a connection's life comes after it.
    let securing = Box::pin(worker.routes.clients.secure(&secrets, expected, alpn, target.ip(), stream));
    let secured = tokio::time::timeout(worker.settings.timeouts.handshake, securing).await;
    match secured.unwrap_or_else(|_| Err(HandshakeError::Broken(io::ErrorKind::TimedOut.into()))) {
        Ok((stream, resumed)) => {
            worker.recorder.handshake(Direction::Outbound, if resumed { "resumed" } else { "full" }, "");
            Ok(stream)
        }
        Err(error) => {
            worker.recorder.handshake(Direction::Outbound, "failed", error.reason());
            worker.recorder.connect_failed();
            let text = error.to_string();
            let error = match error {
                HandshakeError::Peer(_) => ConnectError::Peer(target, text),
                HandshakeError::Broken(_) => ConnectError::Handshake(target, text),
            };
            log::connection_error(&format_args!("outbound: {error}"));
            Err(error)
        }
    }
}

/// Connects, within the connect timeout, with `TCP_NODELAY`.
pub async fn connect(worker: &Worker, plan: &Plan) -> Result<TcpStream, ConnectError> {
    let target = plan.target;
    if loops(&worker.settings, target) {
        worker.recorder.loop_refused();
        return Err(ConnectError::Loop(target));
    }
    let failed = |error: io::Error| {
        worker.recorder.connect_failed();
        ConnectError::Io(target, error)
    };
    let socket = sys::dialer(target, plan.source, worker.settings.mode).map_err(failed)?;
    match tokio::time::timeout(worker.settings.timeouts.connect, socket.connect(target)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(failed(error)),
        Err(_) => {
            worker.recorder.connect_failed();
            Err(ConnectError::Timeout(target))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::env;

    #[test]
    fn only_the_proxy_itself_loops() {
        let pod = |name: &str| (name == weft_api::env::POD_IPS).then(|| "10.0.0.7,fd00::7".to_owned());
        let settings = env::read(pod, None).unwrap();
        for (target, expected) in [
            ("10.0.0.7:15001", true),
            ("10.0.0.7:15006", true),
            ("[fd00::7]:15006", true),
            ("127.0.0.1:15001", true),
            ("[::1]:15001", true),
            ("10.0.0.7:8080", false),
            ("10.0.0.8:15006", false),
            ("10.0.0.7:15020", false),
        ] {
            assert_eq!(loops(&settings, target.parse().unwrap()), expected, "{target}");
        }
    }
}
