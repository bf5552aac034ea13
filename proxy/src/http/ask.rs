//! External authorizers, whom CUSTOM policies have asked: over HTTP, or by gRPC (`envoy.service.auth.v3.Authorization/Check`).
//!
//! They are reached as the app's own requests would be: through the mesh with mutual TLS where the control plane knows them, else at
//! their address, over the worker's pool. An authorizer who can't be asked, answers late, with 5xx or with nonsense is an error, and an
//! error refuses unless the configuration says otherwise (`failOpen`).

mod check;
mod http_check;

use super::Hop;
use super::admit::Refused;
use super::body::Source as Body;
use crate::balance::{Pick, Picked};
use crate::conn::Arrival;
use crate::log;
use crate::telemetry::Flag;
use crate::upstream::{self, Plan};
use crate::worker::Worker;
use bytes::Bytes;
use http::StatusCode;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};
use weft_api::wire;
use weft_api::wire::external_authorizer::Protocol;
use weft_api::wire::string_match::Kind;

/// How long an authorizer may think if the configuration says nothing.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the addresses of a name are used.
const NAME_LIFE: Duration = Duration::from_secs(10);
/// Most bytes of an authorizer's answer.
const ANSWER_BYTES: usize = 256 * 1024;

thread_local! {
    /// What names led to lately.
    static NAMES: RefCell<HashMap<String, (Instant, SocketAddr)>> = RefCell::default();
}

/// What an authorizer says.
#[derive(Debug)]
pub(crate) enum Answer {
    /// Go on, with these changes.
    Allowed(Box<Changes>),
    /// Answer that.
    Refused(Box<Refused>),
}

/// What is to change on a request that goes on.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    pub(crate) set: Vec<(HeaderName, HeaderValue)>,
    pub(crate) append: Vec<(HeaderName, HeaderValue)>,
    pub(crate) remove: Vec<HeaderName>,
    /// For the response of the app.
    pub(crate) response: HeaderMap,
}

/// A body as far as an authorizer is to see it.
#[derive(Debug, Default)]
pub(super) struct Excerpt {
    pub(super) bytes: Bytes,
    pub(super) whole: bool,
}

/// Asks about a request.
pub(crate) async fn about_request(
    authorizer: &wire::ExternalAuthorizer,
    head: &Parts,
    hop: &Hop,
    body: Option<&Rc<Body>>,
    own: Option<&str>,
) -> Answer {
    let excerpt = match (body, authorizer.max_body_bytes as usize) {
        (None, _) | (_, 0) => Excerpt { bytes: Bytes::new(), whole: true },
        (Some(body), limit) => match body.ahead(limit).await {
            Ok((bytes, whole)) => Excerpt { bytes, whole },
            Err(()) => {
                let text = "weft: the request's body broke off or is malformed [DPE]\n";
                return Answer::Refused(Refused::new(StatusCode::BAD_REQUEST, Flag::DownstreamProtocolError, text));
            }
        },
    };
    if !excerpt.whole && !authorizer.allow_partial_body {
        let text = "weft: the body is larger than the external authorizer takes [UAEX]\n";
        return Answer::Refused(Refused::new(StatusCode::PAYLOAD_TOO_LARGE, Flag::UnauthorizedExternally, text));
    }
    let asking = async {
        let (plan, _picked) = way(&hop.worker, &authorizer.address).await?;
        match &authorizer.protocol {
            Some(Protocol::Http(http)) => http_check::ask(authorizer, http, head, &excerpt, &hop.worker, &plan).await,
            Some(Protocol::Grpc(_)) => {
                let request = check::of_request(head, &hop.arrival, &excerpt, authorizer.pack_as_bytes, own);
                check::ask(authorizer, request, &hop.worker, &plan).await
            }
            None => Err("its protocol is not known".into()),
        }
    };
    match in_time(authorizer, asking).await {
        Ok(answer) => answer,
        Err(_) if authorizer.fail_open => Answer::Allowed(Box::default()),
        Err(_) => {
            let status = StatusCode::from_u16(authorizer.status_on_error as u16).ok().filter(|status| status.as_u16() >= 400);
            Answer::Refused(Refused::new(status.unwrap_or(StatusCode::FORBIDDEN), Flag::UnauthorizedExternally, Bytes::new()))
        }
    }
}

/// Asks about an opaque connection. Whether it may be.
pub(crate) async fn about_connection(
    authorizer: &wire::ExternalAuthorizer,
    arrival: &Arrival,
    worker: &Rc<Worker>,
    own: Option<&str>,
) -> bool {
    let asking = async {
        let (plan, _picked) = way(worker, &authorizer.address).await?;
        match &authorizer.protocol {
            Some(Protocol::Grpc(_)) => check::ask(authorizer, check::of_connection(arrival, own), worker, &plan).await,
            _ => Err("it can't be asked about opaque connections".into()),
        }
    };
    match in_time(authorizer, asking).await {
        Ok(answer) => matches!(answer, Answer::Allowed(_)),
        Err(_) => authorizer.fail_open,
    }
}

async fn in_time(
    authorizer: &wire::ExternalAuthorizer,
    asking: impl Future<Output = Result<Answer, String>>,
) -> Result<Answer, String> {
    let patience = if authorizer.timeout_ms == 0 { PATIENCE } else { Duration::from_millis(authorizer.timeout_ms) };
    let answer = tokio::time::timeout(patience, asking).await;
    let answer = answer.unwrap_or_else(|_| Err(format!("no answer within {} ms", patience.as_millis())));
    if let Err(why) = &answer {
        let follows = if authorizer.fail_open { "let through (failOpen)" } else { "refused" };
        log::connection_error(&format_args!(
            "the external authorizer {} ({}) can't be asked: {why}; {follows}",
            authorizer.name, authorizer.address
        ));
    }
    answer
}

/// How to get to an authorizer.
async fn way(worker: &Worker, address: &str) -> Result<(Plan, Option<Picked>), String> {
    let target = resolve(address).await?;
    let through = Plan { target, source: None, client: None, expected: None };
    let Some(route) = worker.routes.to(target).await else { return Ok((through, None)) };
    match route.pick(&worker.routes, None) {
        Pick::Through => Ok((through, None)),
        Pick::Endpoint(picked) => Ok((upstream::to_endpoint(picked.endpoint()), Some(picked))),
        Pick::Nobody(host) => Err(format!("no pod behind {host} is ready")),
    }
}

async fn resolve(address: &str) -> Result<SocketAddr, String> {
    if let Ok(plain) = address.parse() {
        return Ok(plain);
    }
    let known = NAMES.with_borrow(|names| names.get(address).copied());
    if let Some((_, known)) = known.filter(|(since, _)| since.elapsed() < NAME_LIFE) {
        return Ok(known);
    }
    let mut found = tokio::net::lookup_host(address).await.map_err(|error| format!("its name can't be resolved: {error}"))?;
    let found = found.next().ok_or("its name has no address")?;
    NAMES.with_borrow_mut(|names| names.insert(address.to_owned(), (Instant::now(), found)));
    Ok(found)
}

/// Whether a header's name is among the patterns.
fn listed(patterns: &[wire::StringMatch], name: &HeaderName) -> bool {
    let name = name.as_str();
    patterns.iter().any(|pattern| match &pattern.kind {
        Some(Kind::Exact(text)) => name.eq_ignore_ascii_case(text),
        Some(Kind::Prefix(text)) => name.get(..text.len()).is_some_and(|head| head.eq_ignore_ascii_case(text)),
        Some(Kind::Suffix(text)) => {
            name.len().checked_sub(text.len()).and_then(|at| name.get(at..)).is_some_and(|tail| tail.eq_ignore_ascii_case(text))
        }
        Some(Kind::Present(true)) => true,
        _ => false,
    })
}

/// Fields that an authorizer may not set, or pass on to the client: they frame the message or are the next hop's.
fn is_framing(name: &HeaderName) -> bool {
    use http::header;
    matches!(
        *name,
        header::HOST
            | header::CONTENT_LENGTH
            | header::TRANSFER_ENCODING
            | header::CONNECTION
            | header::UPGRADE
            | header::TE
            | header::TRAILER
    ) || matches!(name.as_str(), "keep-alive" | "proxy-connection")
}
