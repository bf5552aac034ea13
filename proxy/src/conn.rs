//! What is known of an accepted connection: plain data, copied wherever it is needed.

use crate::balance::Route;
use crate::tls::IdentitySet;
use std::net::SocketAddr;
use std::rc::Rc;
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
    /// Who the client proved to be by mutual TLS; none: plaintext (outbound connections are the app's own and always so).
    pub principal: Option<IdentitySet>,
    /// The configuration fixes where connections of this listener go ([`OrigDst`] is then that address).
    pub fixed: bool,
}

/// An accepted connection with all that was found out about it: what its requests share.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// The connection.
    pub down: Downstream,
    /// The client's SPIFFE id, if it proved one.
    pub caller: Option<Rc<str>>,
    /// The server name in the ClientHello of the app's own TLS.
    pub server_name: Option<Rc<str>>,
    /// Outbound: what is known of where it goes.
    pub route: Option<Rc<Route>>,
}

impl From<Downstream> for Arrival {
    fn from(down: Downstream) -> Self {
        Self { down, caller: None, server_name: None, route: None }
    }
}
