//! Asking by gRPC: `envoy.service.auth.v3.Authorization/Check`. The messages are those parts of Envoy's that matter here, by their
//! field numbers (envoy/service/auth/v3/external_auth.proto, attribute_context.proto).

use super::{ANSWER_BYTES, Answer, Changes, Excerpt, is_framing};
use crate::conn::Arrival;
use crate::http::admit::{self, Refused};
use crate::http::body::Upload;
use crate::http::pool::Pool;
use crate::telemetry::Flag;
use crate::upstream::Plan;
use crate::worker::Worker;
use bytes::{BufMut, Bytes, BytesMut};
use http::header::{self, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Method, Request, StatusCode, Version};
use http_body_util::{BodyExt, Limited};
use prost::Message;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::SystemTime;
use weft_api::wire;

const METHOD: &str = "/envoy.service.auth.v3.Authorization/Check";

/// The question.
#[derive(Clone, PartialEq, Message)]
pub(super) struct CheckRequest {
    #[prost(message, optional, tag = "1")]
    attributes: Option<Attributes>,
}

#[derive(Clone, PartialEq, Message)]
struct Attributes {
    #[prost(message, optional, tag = "1")]
    source: Option<Peer>,
    #[prost(message, optional, tag = "2")]
    destination: Option<Peer>,
    #[prost(message, optional, tag = "4")]
    request: Option<Asked>,
    #[prost(message, optional, tag = "12")]
    tls_session: Option<TlsSession>,
}

#[derive(Clone, PartialEq, Message)]
struct Peer {
    #[prost(message, optional, tag = "1")]
    address: Option<Address>,
    #[prost(string, tag = "4")]
    principal: String,
}

#[derive(Clone, PartialEq, Message)]
struct Address {
    #[prost(message, optional, tag = "1")]
    socket_address: Option<SocketAddress>,
}

#[derive(Clone, PartialEq, Message)]
struct SocketAddress {
    #[prost(string, tag = "2")]
    address: String,
    #[prost(uint32, tag = "3")]
    port_value: u32,
}

#[derive(Clone, PartialEq, Message)]
struct Asked {
    #[prost(message, optional, tag = "1")]
    time: Option<Timestamp>,
    #[prost(message, optional, tag = "2")]
    http: Option<HttpRequest>,
}

#[derive(Clone, PartialEq, Message)]
struct Timestamp {
    #[prost(int64, tag = "1")]
    seconds: i64,
    #[prost(int32, tag = "2")]
    nanos: i32,
}

#[derive(Clone, PartialEq, Message)]
struct HttpRequest {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(string, tag = "2")]
    method: String,
    #[prost(map = "string, string", tag = "3")]
    headers: HashMap<String, String>,
    #[prost(string, tag = "4")]
    path: String,
    #[prost(string, tag = "5")]
    host: String,
    #[prost(string, tag = "6")]
    scheme: String,
    #[prost(int64, tag = "9")]
    size: i64,
    #[prost(string, tag = "10")]
    protocol: String,
    #[prost(string, tag = "11")]
    body: String,
    #[prost(bytes = "bytes", tag = "12")]
    raw_body: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct TlsSession {
    #[prost(string, tag = "1")]
    sni: String,
}

/// The answer.
#[derive(Clone, PartialEq, Message)]
struct CheckResponse {
    #[prost(message, optional, tag = "1")]
    status: Option<Status>,
    #[prost(message, optional, tag = "2")]
    denied: Option<Denied>,
    #[prost(message, optional, tag = "3")]
    ok: Option<Allowed>,
}

#[derive(Clone, PartialEq, Message)]
struct Status {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
}

#[derive(Clone, PartialEq, Message)]
struct Denied {
    #[prost(message, optional, tag = "1")]
    status: Option<HttpStatus>,
    #[prost(message, repeated, tag = "2")]
    headers: Vec<HeaderOption>,
    #[prost(string, tag = "3")]
    body: String,
}

#[derive(Clone, PartialEq, Message)]
struct HttpStatus {
    #[prost(int32, tag = "1")]
    code: i32,
}

#[derive(Clone, PartialEq, Message)]
struct Allowed {
    #[prost(message, repeated, tag = "2")]
    headers: Vec<HeaderOption>,
    #[prost(string, repeated, tag = "5")]
    headers_to_remove: Vec<String>,
    #[prost(message, repeated, tag = "6")]
    response_headers_to_add: Vec<HeaderOption>,
}

#[derive(Clone, PartialEq, Message)]
struct HeaderOption {
    #[prost(message, optional, tag = "1")]
    header: Option<Header>,
    #[prost(message, optional, tag = "2")]
    append: Option<Flagged>,
}

#[derive(Clone, PartialEq, Message)]
struct Header {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(string, tag = "2")]
    value: String,
    #[prost(bytes = "bytes", tag = "3")]
    raw_value: Bytes,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct Flagged {
    #[prost(bool, tag = "1")]
    value: bool,
}

impl HeaderOption {
    /// Name, value, and whether it stands beside others of the name. None: it is not one that may be set.
    fn field(&self) -> Option<(HeaderName, HeaderValue, bool)> {
        let header = self.header.as_ref()?;
        let name = HeaderName::from_bytes(header.key.as_bytes()).ok().filter(|name| !is_framing(name))?;
        let value = if header.raw_value.is_empty() { header.value.as_bytes() } else { &header.raw_value };
        Some((name, HeaderValue::from_bytes(value).ok()?, self.append.is_some_and(|append| append.value)))
    }
}

fn peer(address: SocketAddr, principal: Option<&str>) -> Peer {
    let socket_address =
        Some(SocketAddress { address: address.ip().to_canonical().to_string(), port_value: address.port().into() });
    Peer { address: Some(Address { socket_address }), principal: principal.unwrap_or_default().into() }
}

fn attributes(arrival: &Arrival, own: Option<&str>, http: Option<HttpRequest>) -> CheckRequest {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let time = Timestamp { seconds: now.as_secs() as i64, nanos: now.subsec_nanos() as i32 };
    CheckRequest {
        attributes: Some(Attributes {
            source: Some(peer(arrival.down.peer, arrival.caller.as_deref())),
            destination: Some(peer(arrival.down.original.0, own)),
            request: Some(Asked { time: Some(time), http }),
            tls_session: arrival.server_name.as_deref().map(|sni| TlsSession { sni: sni.into() }),
        }),
    }
}

/// The question about a connection.
pub(super) fn of_connection(arrival: &Arrival, own: Option<&str>) -> CheckRequest {
    attributes(arrival, own, None)
}

/// The question about a request.
pub(super) fn of_request(head: &Parts, arrival: &Arrival, excerpt: &Excerpt, as_bytes: bool, own: Option<&str>) -> CheckRequest {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let path = head.uri.path_and_query().map_or("", |target| target.as_str());
    let host = text(admit::host(head));
    let mut headers: HashMap<String, String> = HashMap::with_capacity(head.headers.len() + 3);
    for (name, value) in &head.headers {
        headers
            .entry(name.as_str().to_owned())
            .and_modify(|joined| {
                joined.push(',');
                joined.push_str(&String::from_utf8_lossy(value.as_bytes()));
            })
            .or_insert_with(|| text(value.as_bytes()));
    }
    headers.insert(":method".into(), head.method.as_str().into());
    headers.insert(":path".into(), path.into());
    headers.insert(":authority".into(), host.clone());
    let field = |name: HeaderName| head.headers.get(name).and_then(|value| value.to_str().ok());
    let http = HttpRequest {
        id: head.headers.get("x-request-id").map(|id| text(id.as_bytes())).unwrap_or_default(),
        method: head.method.as_str().into(),
        headers,
        path: path.into(),
        host,
        scheme: "http".into(),
        size: field(header::CONTENT_LENGTH).and_then(|length| length.parse().ok()).unwrap_or(-1),
        protocol: if head.version == Version::HTTP_2 { "HTTP/2" } else { "HTTP/1.1" }.into(),
        body: if as_bytes { String::new() } else { text(&excerpt.bytes) },
        raw_body: if as_bytes { excerpt.bytes.clone() } else { Bytes::new() },
    };
    attributes(arrival, own, Some(http))
}

/// Asks.
pub(super) async fn ask(
    authorizer: &wire::ExternalAuthorizer,
    question: CheckRequest,
    worker: &Rc<Worker>,
    plan: &Plan,
) -> Result<Answer, String> {
    let mut frame = BytesMut::with_capacity(5 + question.encoded_len());
    frame.put_u8(0);
    frame.put_u32(question.encoded_len() as u32);
    question.encode(&mut frame).map_err(|error| format!("the question can't be written: {error}"))?;
    let request = Request::builder()
        .method(Method::POST)
        .version(Version::HTTP_2)
        .uri(format!("http://{}{METHOD}", authorizer.address))
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .body(Upload::fixed(frame.freeze()))
        .map_err(|error| format!("the question can't be made: {error}"))?;
    let mut lease = Pool::share_h2(worker, plan).await.map_err(|failure| failure.text.into_owned())?;
    let response = lease.sender.try_send_request(request).await.map_err(|error| error.into_error().to_string())?;
    let (head, body) = response.into_parts();
    if head.status != StatusCode::OK {
        return Err(format!("it answers {}", head.status.as_u16()));
    }
    let body = Limited::new(body, ANSWER_BYTES).collect().await.map_err(|error| format!("its answer broke off: {error}"))?;
    let trailers = body.trailers().unwrap_or(&head.headers);
    let status = trailers.get("grpc-status").or_else(|| head.headers.get("grpc-status"));
    match status.map(HeaderValue::as_bytes) {
        Some(b"0") => {}
        Some(code) => return Err(format!("it answers grpc-status {}", String::from_utf8_lossy(code))),
        None => return Err("its answer has no grpc-status".into()),
    }
    let bytes = body.to_bytes();
    let message = match *bytes {
        // Not compressed (it was not offered), and its length.
        [0, a, b, c, d, ref message @ ..] if u32::from_be_bytes([a, b, c, d]) as usize == message.len() => message,
        _ => return Err("its answer is no gRPC message".into()),
    };
    let response = CheckResponse::decode(message).map_err(|error| format!("its answer can't be read: {error}"))?;
    Ok(answer(response))
}

fn answer(response: CheckResponse) -> Answer {
    // Without a status it is OK, as an absent code is 0.
    if response.status.as_ref().is_none_or(|status| status.code == 0) && response.denied.is_none() {
        let ok = response.ok.unwrap_or_default();
        let mut changes = Changes::default();
        for (name, value, append) in ok.headers.iter().filter_map(HeaderOption::field) {
            if append { changes.append.push((name, value)) } else { changes.set.push((name, value)) }
        }
        let removable = ok.headers_to_remove.iter().filter_map(|name| HeaderName::from_bytes(name.as_bytes()).ok());
        changes.remove = removable.filter(|name| !is_framing(name)).collect();
        for (name, value, _) in ok.response_headers_to_add.iter().filter_map(HeaderOption::field) {
            changes.response.append(name, value);
        }
        return Answer::Allowed(Box::new(changes));
    }
    let denied = response.denied.unwrap_or_default();
    let status =
        denied.status.and_then(|status| u16::try_from(status.code).ok()).and_then(|code| StatusCode::from_u16(code).ok());
    let mut refused = Refused::new(status.unwrap_or(StatusCode::FORBIDDEN), Flag::UnauthorizedExternally, denied.body);
    for (name, value, append) in denied.headers.iter().filter_map(HeaderOption::field) {
        if append {
            refused.headers.append(name, value);
        } else {
            refused.headers.insert(name, value);
        }
    }
    Answer::Refused(refused)
}
