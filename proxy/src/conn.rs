//! What is known of an accepted connection: plain data, copied wherever it is needed.

use std::net::SocketAddr;
use std::time::Instant;

/// Which way a connection goes, seen from the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// From elsewhere to the app.
    Inbound,
    /// From the app to elsewhere.
    Outbound,
}

impl Direction {
    /// `inbound` or `outbound`, as metrics and logs spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

/// The address that the client connected to before the redirection (or the one that the configuration fixes).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OrigDst(pub SocketAddr);

/// An accepted connection.
#[derive(Clone, Copy, Debug)]
pub struct Downstream {
    /// The client's address.
    pub peer: SocketAddr,
    /// The address on which the proxy accepted it.
    pub local: SocketAddr,
    /// Where the client wanted to go.
    pub original: OrigDst,
    /// Which way it goes.
    pub direction: Direction,
    /// When it was accepted.
    pub accepted: Instant,
    /// The configuration fixes where connections of this listener go ([`OrigDst`] is then that address).
    pub fixed: bool,
}
