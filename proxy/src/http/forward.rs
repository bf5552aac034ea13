//! A request's life, from its head to the response's head: checked, sent, sent again where that is safe, answered.
//!
//! A request is sent again only if the destination cannot have acted on it (RFC 9110, section 9.2.2): it was never
//! written; or an HTTP/2 peer says that it refused the stream; or it went out on a reused connection
//! that died without a byte of answer, has no body, and its method is idempotent. The second attempt of the last
//! kind goes over a fresh connection, so that there is no third.

use super::Hop;
use super::admit::{self, Admitted, Refused};
use super::body::{Download, Gate, Source, Upload};
use super::headers::{self, Wire, Wishes};
use super::pool::{LeasedH1, LeasedH2, Pool};
use super::reply::{self, Failure};
use super::screen::Busy;
use super::tally::Tally;
use super::tunnel::{self, Tunnel};
use crate::conn::Direction;
use crate::telemetry::Flag;
use crate::upstream::{ENDPOINTS, Plan};
use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{Method, Request, Response, StatusCode, Version};
use hyper::body::{Body, Incoming};
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;

/// What is known of a request besides its head.
struct Story {
    /// The version that the client asked in.
    client: Version,
    connect: bool,
    head_only: bool,
    wishes: Wishes,
    source: Option<Rc<Source>>,
    tally: Tally,
    busy: Option<Busy>,
    /// What an external authorizer adds to the response.
    extra: Admitted,
}

impl Story {
    fn adorn(&mut self, headers: &mut http::HeaderMap) {
        if let Some(extra) = self.extra.take() {
            headers.extend(*extra);
        }
    }
}

/// Serves one request of the connection `hop`.
pub(crate) async fn handle(
    request: Request<Incoming>,
    hop: Rc<Hop>,
    busy: Option<Busy>,
) -> Result<Response<Download>, Infallible> {
    let tally = Tally::new(Rc::clone(&hop));
    let (mut head, body) = request.into_parts();
    let mut story = Story {
        client: head.version,
        connect: head.method == Method::CONNECT,
        head_only: head.method == Method::HEAD,
        wishes: Wishes::default(),
        source: None,
        tally,
        busy,
        extra: None,
    };
    let down = hop.down();
    match headers::prepare_request(&mut head, hop.wire, hop.wire, down.direction, down.original.0) {
        Ok(wishes) => story.wishes = wishes,
        Err(refusal) => return Ok(own(story, &Failure::refused(refusal))),
    }
    if story.wishes.grpc {
        story.tally.grpc();
    }
    if !body.is_end_stream() {
        // An HTTP/2 peer may refuse a stream after the body has begun; see `Source`.
        let source = Source::new(body, hop.wire == Wire::H2);
        story.tally.uploads(&source);
        story.source = Some(source);
    }
    if down.direction == Direction::Inbound {
        match admit::admit(&mut head, &hop, story.source.as_ref()).await {
            Ok(extra) => story.extra = extra,
            Err(refused) => return Ok(refuse(story, *refused)),
        }
    }
    let plan = match aim(&hop, &mut story, None) {
        Ok(plan) => plan,
        Err(failure) => return Ok(own(story, &failure)),
    };
    Ok(match hop.wire {
        Wire::H1 => over_h1(head, hop, story, plan).await,
        Wire::H2 => over_h2(head, hop, story, plan).await,
    })
}

/// Chooses where a request goes, another endpoint than `not` if there is a choice.
fn aim(hop: &Hop, story: &mut Story, not: Option<SocketAddr>) -> Result<Plan, Failure> {
    let target = hop.target(not).map_err(|error| Failure::connect(&error))?;
    story.tally.sent_to(target.plan.target, target.picked);
    Ok(target.plan)
}

/// Whether a request that could not be sent for this reason may go to another endpoint, and to which. Nothing of it has been sent.
fn aim_elsewhere(hop: &Hop, story: &mut Story, plan: Plan, failure: &Failure, attempt: usize) -> Option<Plan> {
    if !failure.elsewhere || attempt >= ENDPOINTS || hop.arrival.route.is_none() {
        return None;
    }
    aim(hop, story, Some(plan.target)).ok().filter(|other| other.target != plan.target)
}

/// The proxy's own response.
fn own(mut story: Story, failure: &Failure) -> Response<Download> {
    let (response, body, grpc_status) = failure.response(story.wishes.grpc);
    let (mut head, ()) = response.into_parts();
    if story.wishes.opaque_after || story.connect {
        // The bytes after this request were not looked at as HTTP.
        head.headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    let code = if grpc_status.is_some() { 200 } else { failure.status.as_u16() };
    story.tally.answered(code, &head.headers, Some(failure.flag));
    let body = if story.head_only { Bytes::new() } else { body };
    Response::from_parts(head, Download::own(body, Some(story.tally), story.busy))
}

/// The response to a request that may not go on.
fn refuse(mut story: Story, refused: Refused) -> Response<Download> {
    let mut response = Response::new(());
    let grpc_status = refused.grpc_status();
    *response.headers_mut() = refused.headers;
    let (status, text) = if story.wishes.grpc {
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert("grpc-status", HeaderValue::from(grpc_status));
        if let Ok(message) = HeaderValue::from_str(&reply::percent(&refused.body)) {
            headers.insert("grpc-message", message);
        }
        (StatusCode::OK, Bytes::new())
    } else {
        let headers = response.headers_mut();
        if !refused.body.is_empty() {
            headers.entry(header::CONTENT_TYPE).or_insert(HeaderValue::from_static("text/plain"));
        }
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(refused.body.len()));
        (refused.status, refused.body)
    };
    *response.status_mut() = status;
    if story.wishes.opaque_after || story.connect {
        // The bytes after this request were not looked at as HTTP.
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    story.tally.answered(status.as_u16(), response.headers(), Some(refused.flag));
    let body = if story.head_only { Bytes::new() } else { text };
    response.map(|()| Download::own(body, Some(story.tally), story.busy))
}

async fn over_h1(head: http::request::Parts, hop: Rc<Hop>, mut story: Story, mut plan: Plan) -> Response<Download> {
    let gate = (story.wishes.expect_continue && story.source.is_some()).then(|| Arc::new(Gate::default()));
    let tunnels = story.wishes.upgrade || story.connect;
    let repeatable = story.source.is_none() && !tunnels && head.method.is_idempotent();
    let mut request = Request::from_parts(head, upload(&story, gate.as_ref()));
    if let Some(gate) = gate.clone() {
        hyper::ext::on_informational(&mut request, move |response| {
            if response.status() == StatusCode::CONTINUE {
                gate.open();
            }
        });
    }
    let mut fresh_only = false;
    let mut attempt = 1;
    loop {
        let pooled = if fresh_only { None } else { Pool::take_h1(&hop.worker, &plan, !repeatable) };
        let lease = match pooled {
            Some(lease) => Ok(lease),
            None => Pool::connect_h1(&hop.worker, &plan).await,
        };
        let mut lease = match lease {
            Ok(lease) => lease,
            Err(failure) => match aim_elsewhere(&hop, &mut story, plan, &failure, attempt) {
                Some(other) => {
                    plan = other;
                    attempt += 1;
                    continue;
                }
                None => return own(story, &failure),
            },
        };
        lease.ear().begin(repeatable && lease.reused);
        let handover = tunnels.then(|| lease.ear().expect_handover());
        let mut error = match exchange(&mut lease, request, &hop).await {
            Ok(response) => {
                lease.ear().forget();
                let tunnel = handover.map(Tunnel::H1);
                return answer_h1(response, lease, gate, tunnel, &hop, story);
            }
            Err(error) => error,
        };
        let again = match error.take_message() {
            // Never written.
            Some(unsent) if lease.reused => Some(unsent),
            Some(_) => None,
            None if lease.reused && repeatable && !lease.ear().heard() => {
                fresh_only = true;
                lease.ear().recorded()
            }
            None => None,
        };
        match again {
            Some(unsent) => request = unsent,
            None => {
                if story.source.as_ref().is_some_and(|source| source.has_failed()) {
                    if let Some(link) = &hop.link {
                        link.tell();
                    }
                    return own(story, &Failure::broken_request());
                }
                return own(story, &Failure::exchange(&error.into_error()));
            }
        }
    }
}

type Sent<T> = Result<T, hyper::client::conn::TrySendError<Request<Upload>>>;

/// Sends a request and waits for the response's head. A half-close of the client meanwhile is passed on, and is for the
/// destination to judge.
async fn exchange(lease: &mut LeasedH1, request: Request<Upload>, hop: &Hop) -> Sent<Response<Incoming>> {
    let ear = Rc::clone(lease.ear());
    // With a body nobody can tell here when the last byte of it is out.
    let whole = request.body().is_end_stream();
    let mut sent = pin!(lease.sender().try_send_request(request));
    let mut half_closed = false;
    let result = poll_fn(|cx| {
        let polled = sent.as_mut().poll(cx);
        if polled.is_pending()
            && whole
            && !half_closed
            && let Some(link) = &hop.link
            && link.poll_half_closed(cx).is_ready()
        {
            half_closed = true;
            ear.half_close();
        }
        polled
    })
    .await;
    lease.spent |= half_closed;
    result
}

fn upload(story: &Story, gate: Option<&Arc<Gate>>) -> Upload {
    match (&story.source, gate) {
        (None, _) => Upload::none(),
        (Some(source), None) => Upload::of(source),
        (Some(source), Some(gate)) => Upload::of(source).behind(Arc::clone(gate)),
    }
}

fn answer_h1(
    response: Response<Incoming>,
    mut lease: Box<LeasedH1>,
    gate: Option<Arc<Gate>>,
    tunnel: Option<Tunnel>,
    hop: &Hop,
    mut story: Story,
) -> Response<Download> {
    let (mut head, body) = response.into_parts();
    let switches = head.status == StatusCode::SWITCHING_PROTOCOLS || story.connect && head.status.is_success();
    if let Err(malformed) = headers::prepare_response(&mut head, Wire::H1, hop.wire, story.client) {
        return own(story, &Failure::malformed(malformed));
    }
    if switches && (tunnel.is_none() || story.connect == (head.status == StatusCode::SWITCHING_PROTOCOLS)) {
        return own(story, &Failure::malformed(headers::Malformed::Upgrade));
    }
    story.adorn(&mut head.headers);
    story.tally.answered(head.status.as_u16(), &head.headers, None);
    if let Some(tunnel) = tunnel.filter(|_| switches) {
        hop.become_tunnel(tunnel, story.tally);
        return Response::from_parts(head, Download::own(Bytes::new(), None, story.busy));
    }
    // Whatever follows on the client's connection cannot be told for sure from the body of this request.
    let unread_body = gate.as_ref().is_some_and(|gate| gate.is_waiting());
    if story.wishes.opaque_after || story.connect || unread_body {
        head.headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    lease.spent |= story.wishes.opaque_after || story.connect || unread_body;
    Response::from_parts(head, Download::relayed(body, story.tally, lease.into(), gate, story.busy))
}

/// How often a request is tried over HTTP/2 before the client hears of it. Being refused costs little and is safe to repeat, and
/// several new connections may refuse one after another: before its settings have come nobody knows how many streams a peer takes.
const H2_ATTEMPTS: usize = 8;

async fn over_h2(mut head: http::request::Parts, hop: Rc<Hop>, mut story: Story, mut plan: Plan) -> Response<Download> {
    let client = story.connect.then(|| head.extensions.remove::<hyper::upgrade::OnUpgrade>()).flatten();
    let extended = head.extensions.get::<hyper::ext::Protocol>().is_some();
    let (mut attempt, mut endpoints) = (1, 1);
    loop {
        let mut lease = match Pool::share_h2(&hop.worker, &plan).await {
            Ok(lease) => lease,
            Err(failure) => match aim_elsewhere(&hop, &mut story, plan, &failure, endpoints) {
                Some(other) => {
                    plan = other;
                    endpoints += 1;
                    continue;
                }
                None => return own(story, &failure),
            },
        };
        if extended && !extended_connect(&lease).await {
            let text = "the destination does not offer extended CONNECT (RFC 8441)";
            let failure = Failure::new(StatusCode::NOT_IMPLEMENTED, Flag::UpstreamProtocolError, text);
            return own(story, &failure);
        }
        let spare = head.clone();
        let request = Request::from_parts(head, upload(&story, None));
        let mut error = match lease.sender.try_send_request(request).await {
            Ok(response) => {
                if let Some(source) = &story.source {
                    source.forget();
                }
                return answer_h2(response, lease, client, &hop, story);
            }
            Err(error) => error,
        };
        let unsent = error.take_message();
        let unprocessed = unsent.is_some() || tunnel::was_refused(error.error());
        let whole = story.source.as_ref().is_none_or(|source| source.is_replayable());
        if unprocessed && whole && attempt < H2_ATTEMPTS {
            attempt += 1;
            head = spare;
            continue;
        }
        if story.source.as_ref().is_some_and(|source| source.has_failed()) {
            story.wishes.grpc = false;
            return own(story, &Failure::broken_request());
        }
        return own(story, &Failure::exchange(&error.into_error()));
    }
}

/// Whether the destination offers extended CONNECT. Its settings may not have come yet on a connection that was just made.
async fn extended_connect(lease: &LeasedH2) -> bool {
    for wait in [0, 5, 50, 500] {
        if lease.extended_connect() {
            return true;
        }
        tokio::time::sleep(std::time::Duration::from_millis(wait)).await;
    }
    lease.extended_connect()
}

fn answer_h2(
    mut response: Response<Incoming>,
    lease: LeasedH2,
    client: Option<hyper::upgrade::OnUpgrade>,
    hop: &Hop,
    mut story: Story,
) -> Response<Download> {
    let server = (story.connect && response.status().is_success()).then(|| hyper::upgrade::on(&mut response));
    let (mut head, body) = response.into_parts();
    if let Err(malformed) = headers::prepare_response(&mut head, Wire::H2, hop.wire, story.client) {
        return own(story, &Failure::malformed(malformed));
    }
    story.adorn(&mut head.headers);
    story.tally.answered(head.status.as_u16(), &head.headers, None);
    if let (Some(client), Some(server)) = (client, server) {
        tunnel::spawn_h2(client, server, lease, story.tally, hop.worker.drain.guard());
        return Response::from_parts(head, Download::own(Bytes::new(), None, story.busy));
    }
    Response::from_parts(head, Download::relayed(body, story.tally, lease.into(), None, story.busy))
}
