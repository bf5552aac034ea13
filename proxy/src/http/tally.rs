//! The completion record of a request in the making. Whatever happens to the request, the record is given in exactly
//! once, when the tally is dropped: a request that ends in no other way ended because the client left.

use super::Hop;
use super::body::Source;
use crate::balance::Picked;
use crate::telemetry::{Flag, RequestProtocol, RequestRecord};
use http::HeaderMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Instant;

/// What is known so far of a request.
#[derive(Debug)]
pub(crate) struct Tally {
    hop: Rc<Hop>,
    started: Instant,
    source: Option<Rc<Source>>,
    upstream: Option<SocketAddr>,
    picked: Option<Picked>,
    protocol: RequestProtocol,
    code: u16,
    grpc_status: Option<u16>,
    flag: Option<Flag>,
    sent: u64,
}

impl Tally {
    pub(crate) fn new(hop: Rc<Hop>) -> Self {
        Self {
            hop,
            started: Instant::now(),
            source: None,
            upstream: None,
            picked: None,
            protocol: RequestProtocol::Http,
            code: 0,
            grpc_status: None,
            flag: Some(Flag::DownstreamTermination),
            sent: 0,
        }
    }

    /// It is a gRPC request.
    pub(crate) fn grpc(&mut self) {
        self.protocol = RequestProtocol::Grpc;
    }

    /// It has a body.
    pub(crate) fn uploads(&mut self, source: &Rc<Source>) {
        self.source = Some(Rc::clone(source));
    }

    /// It goes to `upstream`; an endpoint that was picked counts as used until the end.
    pub(crate) fn sent_to(&mut self, upstream: SocketAddr, picked: Option<Picked>) {
        self.upstream = Some(upstream);
        self.picked = picked;
    }

    /// A response begins; `flag` says why it is not the destination's.
    pub(crate) fn answered(&mut self, code: u16, headers: &HeaderMap, flag: Option<Flag>) {
        self.code = code;
        if self.protocol == RequestProtocol::Grpc {
            // A trailers-only response has it in the head.
            self.grpc_status(headers);
        }
        if flag.is_some() {
            self.flag = flag;
        }
    }

    /// Reads `grpc-status`.
    pub(crate) fn grpc_status(&mut self, fields: &HeaderMap) {
        if let Some(status) = fields.get("grpc-status") {
            self.grpc_status = status.to_str().ok().and_then(|status| status.parse().ok());
        }
    }

    /// Body bytes of the response.
    pub(crate) fn count(&mut self, bytes: usize) {
        self.sent += bytes as u64;
    }

    /// The response is over, `flag` saying why if not by its proper end. What made the proxy answer itself stands.
    pub(crate) fn body_ended(&mut self, flag: Option<Flag>) {
        if self.flag == Some(Flag::DownstreamTermination) || flag.is_some() {
            self.flag = flag;
        }
    }
}

impl Drop for Tally {
    fn drop(&mut self) {
        self.hop.worker.recorder.request(&RequestRecord {
            downstream: self.hop.down(),
            upstream: self.upstream,
            principal: self.picked.as_ref().and_then(|picked| picked.endpoint().expected),
            protocol: self.protocol,
            code: self.code,
            grpc_status: self.grpc_status,
            flag: self.flag,
            duration: self.started.elapsed(),
            request_bytes: self.source.as_ref().map_or(0, |source| source.taken()),
            response_bytes: self.sent,
        });
    }
}
