//! Responses that the proxy gives itself: when the destination cannot, or the request may not be forwarded.
//!
//! The body is one line of text that ends in the response flag, the same that metrics carry, so that what a user
//! reports leads to the series. gRPC clients read no bodies: they get a trailers-only response with a status.

use super::headers::{Malformed, Refusal};
use crate::telemetry::Flag;
use crate::upstream::ConnectError;
use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{Response, StatusCode};
use std::borrow::Cow;
use std::fmt::Write;

/// gRPC status codes (the gRPC protocol's list) that the proxy answers with.
const GRPC_INTERNAL: u16 = 13;
const GRPC_UNIMPLEMENTED: u16 = 12;
const GRPC_UNAVAILABLE: u16 = 14;

/// Why there is no response of the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) status: StatusCode,
    pub(crate) flag: Flag,
    pub(crate) text: Cow<'static, str>,
    /// The client's connection cannot go on.
    pub(crate) close: bool,
    /// Another endpoint may do better; nothing was sent.
    pub(crate) elsewhere: bool,
}

impl Failure {
    pub(crate) fn new(status: StatusCode, flag: Flag, text: impl Into<Cow<'static, str>>) -> Self {
        Self { status, flag, text: text.into(), close: false, elsewhere: false }
    }

    /// A connection to the destination could not be made.
    pub(crate) fn connect(error: &ConnectError) -> Self {
        let status = match error {
            ConnectError::Peer(..) => StatusCode::BAD_GATEWAY,
            _ => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self { elsewhere: error.is_of_endpoint(), ..Self::new(status, error.flag(), error.to_string()) }
    }

    /// The client's request may not be forwarded.
    pub(crate) fn refused(refusal: Refusal) -> Self {
        Self { close: true, ..Self::new(refusal.status(), Flag::DownstreamProtocolError, refusal.as_str()) }
    }

    /// The client's request went wrong in its body.
    pub(crate) fn broken_request() -> Self {
        let text = "the request's body broke off or is malformed";
        Self { close: true, ..Self::new(StatusCode::BAD_REQUEST, Flag::DownstreamProtocolError, text) }
    }

    /// The destination's response may not be passed on.
    pub(crate) fn malformed(malformed: Malformed) -> Self {
        Self::new(StatusCode::BAD_GATEWAY, Flag::UpstreamProtocolError, malformed.as_str())
    }

    /// The request was sent, or was about to be, and no response came.
    pub(crate) fn exchange(error: &hyper::Error) -> Self {
        if error.is_parse() || error.is_parse_status() || error.is_parse_too_large() {
            let text = format!("the destination's response is malformed: {error}");
            return Self::new(StatusCode::BAD_GATEWAY, Flag::UpstreamProtocolError, text);
        }
        if error.is_user() {
            let text = format!("the request cannot be expressed towards the destination: {error}");
            return Self::new(StatusCode::BAD_GATEWAY, Flag::UpstreamProtocolError, text);
        }
        let mut text = String::from("the destination closed the connection before it answered");
        if let Some(cause) = std::error::Error::source(error) {
            let _ = write!(text, " ({cause})");
        }
        Self::new(StatusCode::SERVICE_UNAVAILABLE, Flag::UpstreamTermination, text)
    }

    fn grpc_status(&self) -> u16 {
        match self.status {
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT => GRPC_UNAVAILABLE,
            StatusCode::NOT_IMPLEMENTED => GRPC_UNIMPLEMENTED,
            _ => GRPC_INTERNAL,
        }
    }

    /// The response, its body, and the `grpc-status` in it if it is for a gRPC client.
    pub(crate) fn response(&self, grpc: bool) -> (Response<()>, Bytes, Option<u16>) {
        let mut response = Response::new(());
        let headers = response.headers_mut();
        if grpc {
            let status = self.grpc_status();
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert("grpc-status", HeaderValue::from(status));
            if let Ok(message) = HeaderValue::from_str(&self.grpc_message()) {
                headers.insert("grpc-message", message);
            }
            return (response, Bytes::new(), Some(status));
        }
        let body = Bytes::from(format!("weft: {} [{}]\n", self.text, self.flag.as_str()));
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
        if self.close {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        *response.status_mut() = self.status;
        (response, body, None)
    }

    fn grpc_message(&self) -> String {
        percent(format!("weft: {} [{}]", self.text, self.flag.as_str()).as_bytes())
    }
}

/// A text in the percent-encoding that gRPC prescribes for `grpc-message`.
pub(super) fn percent(text: &[u8]) -> String {
    let mut out = String::with_capacity(text.len() + 16);
    for byte in text {
        if (b' '..=b'~').contains(byte) && *byte != b'%' {
            out.push(char::from(*byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_told_as_text_and_to_grpc_as_trailers() {
        let failure = Failure::new(StatusCode::SERVICE_UNAVAILABLE, Flag::UpstreamConnectFailure, "100 % füll");
        let (plain, body, _) = failure.response(false);
        assert_eq!(plain.status(), 503);
        assert_eq!(body, "weft: 100 % füll [UF]\n".as_bytes());
        let (grpc, body, status) = failure.response(true);
        assert_eq!((grpc.status().as_u16(), body.len(), status), (200, 0, Some(14)));
        assert_eq!(grpc.headers()["grpc-message"], "weft: 100 %25 f%C3%BCll [UF]");
    }

    #[test]
    fn a_refusal_closes_the_connection() {
        let (response, ..) = Failure::refused(Refusal::ManyHosts).response(false);
        assert_eq!(response.status(), 400);
        assert_eq!(response.headers()[header::CONNECTION], "close");
    }
}
