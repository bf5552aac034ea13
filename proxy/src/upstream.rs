//! Connections from the proxy to where a client wanted to go.

use crate::conn::Downstream;
use crate::telemetry::Flag;
use crate::worker::Worker;
use std::io;
use std::net::{IpAddr, SocketAddr};
use tokio::net::TcpStream;

/// How a connection is made: also what connections in a pool are alike by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Plan {
    /// Where to connect.
    pub target: SocketAddr,
    /// The source address to bind, if one has to be: 127.0.0.6 / ::6 towards the app, the client's own in TPROXY mode.
    pub source: Option<IpAddr>,
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
}

impl ConnectError {
    /// The response flag that stands for it.
    pub fn flag(&self) -> Flag {
        match self {
            Self::Loop(_) => Flag::NoRoute,
            Self::Timeout(_) | Self::Io(..) => Flag::UpstreamConnectFailure,
        }
    }
}

/// How to go where the client of `down` wanted to go.
pub fn plan(worker: &Worker, down: &Downstream) -> Plan {
    let _ = worker;
    Plan { target: down.original.0, source: None }
}

/// Connects, within the connect timeout, with `TCP_NODELAY`.
pub async fn connect(worker: &Worker, plan: &Plan) -> Result<TcpStream, ConnectError> {
    let connecting = TcpStream::connect(plan.target);
    let stream = match tokio::time::timeout(worker.settings.timeouts.connect, connecting).await {
        Err(_) => return Err(ConnectError::Timeout(plan.target)),
        Ok(result) => result.map_err(|error| ConnectError::Io(plan.target, error))?,
    };
    stream.set_nodelay(true).map_err(|error| ConnectError::Io(plan.target, error))?;
    Ok(stream)
}
