//! One completion record per request and per connection, built once when it ends, feeds everything that observes.

mod journal;
mod recorder;
mod series;

pub use journal::Decision;
pub use recorder::{Open, Recorder};
pub use series::Metrics;

use crate::conn::Downstream;
use crate::tls::IdentitySet;
use std::net::SocketAddr;
use std::time::Duration;

/// Why a request or connection ended other than by a response of the destination: Envoy's response flags, because
/// dashboards and people know them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Flag {
    /// `UF`: the destination could not be connected.
    UpstreamConnectFailure,
    /// `UC`: the destination closed the connection before its response was complete.
    UpstreamTermination,
    /// `UT`: the destination did not answer in time.
    UpstreamTimeout,
    /// `UH`: no healthy destination.
    NoHealthyUpstream,
    /// `UO`: a limit on connections or requests to the destination was reached.
    UpstreamOverflow,
    /// `UPE`: the destination broke the protocol.
    UpstreamProtocolError,
    /// `DC`: the client closed the connection before the end.
    DownstreamTermination,
    /// `DPE`: the client broke the protocol.
    DownstreamProtocolError,
    /// `DT`: the request took longer than it may.
    DurationTimeout,
    /// `SI`: the stream was idle for too long.
    StreamIdleTimeout,
    /// `NR`: no route, or a destination that the proxy refuses (a loop).
    NoRoute,
    /// `UPI` (Weft's own): whoever answered at the destination could not prove the identity that it should have.
    UpstreamIdentity,
    /// `PTR` (Weft's own): plaintext where only mutual TLS is taken.
    PlaintextRefused,
    /// `RBAC` (Weft's own): an AuthorizationPolicy refuses.
    Denied,
    /// `UAEX`: an external authorizer refuses, or can't be asked.
    UnauthorizedExternally,
    /// `JWT` (Weft's own): a token is not valid.
    Unauthenticated,
    /// `NC` (Weft's own): the control plane has not said yet who may call.
    NoConfiguration,
    /// `OM`: the process is short of memory or descriptors.
    Overload,
}

impl Flag {
    /// Envoy's abbreviation.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UpstreamConnectFailure => "UF",
            Self::UpstreamTermination => "UC",
            Self::UpstreamTimeout => "UT",
            Self::NoHealthyUpstream => "UH",
            Self::UpstreamOverflow => "UO",
            Self::UpstreamProtocolError => "UPE",
            Self::DownstreamTermination => "DC",
            Self::DownstreamProtocolError => "DPE",
            Self::DurationTimeout => "DT",
            Self::StreamIdleTimeout => "SI",
            Self::NoRoute => "NR",
            Self::UpstreamIdentity => "UPI",
            Self::PlaintextRefused => "PTR",
            Self::Denied => "RBAC",
            Self::UnauthorizedExternally => "UAEX",
            Self::Unauthenticated => "JWT",
            Self::NoConfiguration => "NC",
            Self::Overload => "OM",
        }
    }
}

/// What a request was spoken in: the label `request_protocol`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RequestProtocol {
    /// HTTP of any version: `http`.
    Http,
    /// gRPC (HTTP/2 with `content-type: application/grpc`): `grpc`.
    Grpc,
}

/// A request that is over.
#[derive(Clone, Copy, Debug)]
pub struct RequestRecord<'a> {
    /// The connection that it came by.
    pub downstream: &'a Downstream,
    /// Where it was sent, if it was.
    pub upstream: Option<SocketAddr>,
    /// Outbound: who had to prove himself there; none: plaintext.
    pub principal: Option<IdentitySet>,
    /// What it was spoken in.
    pub protocol: RequestProtocol,
    /// Status of the response that the client got; 0: none (the client left before).
    pub code: u16,
    /// `grpc-status` of a gRPC response.
    pub grpc_status: Option<u16>,
    /// Why it ended, if not by the destination's whole response.
    pub flag: Option<Flag>,
    /// From the request's head to the response's last byte.
    pub duration: Duration,
    /// Size of the request: body bytes.
    pub request_bytes: u64,
    /// Size of the response: body bytes.
    pub response_bytes: u64,
}

/// An opaque connection that is over (or was refused).
#[derive(Clone, Copy, Debug)]
pub struct ConnectionRecord<'a> {
    /// The connection.
    pub downstream: &'a Downstream,
    /// Where it went, if it did.
    pub upstream: Option<SocketAddr>,
    /// Outbound: who had to prove himself there; none: plaintext.
    pub principal: Option<IdentitySet>,
    /// Why it ended, if not by both sides' leave.
    pub flag: Option<Flag>,
    /// From accept to the end.
    pub duration: Duration,
    /// Bytes from the client.
    pub received: u64,
    /// Bytes to the client.
    pub sent: u64,
}

/// What a connection turned out to speak: the label `protocol` of `weft_proxy_connections_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Detected {
    /// HTTP/1 (or HTTP of a version that is told later).
    Http1,
    /// HTTP/2.
    Http2,
    /// TLS of the app, passed through.
    Tls,
    /// Opaque.
    Tcp,
    /// Opaque, and the server spoke first.
    ServerFirst,
}

impl Detected {
    /// As the label spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http1 => "http1",
            Self::Http2 => "http2",
            Self::Tls => "tls",
            Self::Tcp => "tcp",
            Self::ServerFirst => "server-first",
        }
    }
}
