//! Asking over HTTP: the request's method, path and some of its headers go to the authorizer; 200 lets the request pass, 5xx is an
//! error, anything else is the answer that the client gets.

use super::{ANSWER_BYTES, Answer, Changes, Excerpt, is_framing, listed};
use crate::http::admit::{self, Refused};
use crate::http::body::Upload;
use crate::http::pool::{Lease, Pool};
use crate::telemetry::Flag;
use crate::upstream::Plan;
use crate::worker::Worker;
use http::header::{self, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use std::rc::Rc;
use weft_api::wire;

/// Asks.
pub(super) async fn ask(
    authorizer: &wire::ExternalAuthorizer,
    how: &wire::HttpAuthorizer,
    head: &Parts,
    excerpt: &Excerpt,
    worker: &Rc<Worker>,
    plan: &Plan,
) -> Result<Answer, String> {
    let target = head.uri.path_and_query().map_or("/", |target| target.as_str());
    let mut parts = Request::builder()
        .method(head.method.clone())
        .uri(format!("{}{target}", how.path_prefix))
        .body(())
        .map_err(|error| format!("the request for it can't be made: {error}"))?
        .into_parts()
        .0;
    for (name, value) in &head.headers {
        if *name == header::AUTHORIZATION || listed(&how.include_request_headers, name) && !is_framing(name) {
            parts.headers.append(name.clone(), value.clone());
        }
    }
    for (name, value) in &how.additional_headers {
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_str(value)) {
            parts.headers.insert(name, value);
        }
    }
    if let Ok(host) = HeaderValue::from_bytes(admit::host(head)) {
        parts.headers.insert(header::HOST, host);
    }
    parts.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(excerpt.bytes.len()));
    let (response, lease) = exchange(&parts, excerpt, worker, plan).await?;
    let (answer, body) = response.into_parts();
    if answer.status.is_server_error() {
        return Err(format!("it answers {}", answer.status.as_u16()));
    }
    let body = Limited::new(body, ANSWER_BYTES).collect().await.map_err(|error| format!("its answer broke off: {error}"))?;
    let body = body.to_bytes();
    Lease::from(lease).give_back();
    let fields =
        || answer.headers.iter().filter(|(name, _)| !is_framing(name)).map(|(name, value)| (name.clone(), value.clone()));
    if answer.status == StatusCode::OK {
        let mut changes = Changes::default();
        for (name, value) in fields() {
            if listed(&how.headers_to_upstream_on_allow, &name) {
                changes.set.push((name.clone(), value.clone()));
            }
            if listed(&how.headers_to_downstream_on_allow, &name) {
                changes.response.append(name, value);
            }
        }
        return Ok(Answer::Allowed(Box::new(changes)));
    }
    tracing::debug!(authorizer = authorizer.name, status = answer.status.as_u16(), "refused by an external authorizer");
    let mut refused = Refused::new(answer.status, Flag::UnauthorizedExternally, body);
    let all = how.headers_to_downstream_on_deny.is_empty();
    for (name, value) in fields() {
        let always = matches!(name, header::WWW_AUTHENTICATE | header::LOCATION);
        if all || always || listed(&how.headers_to_downstream_on_deny, &name) {
            refused.headers.append(name, value);
        }
    }
    Ok(Answer::Refused(refused))
}

type Exchanged = (Response<Incoming>, Box<crate::http::pool::LeasedH1>);

/// Sends, over an idle connection first; once more over a new one if that has died.
async fn exchange(parts: &Parts, excerpt: &Excerpt, worker: &Rc<Worker>, plan: &Plan) -> Result<Exchanged, String> {
    let mut pooled = Pool::take_h1(worker, plan, true);
    loop {
        let mut lease = match pooled.take() {
            Some(lease) => lease,
            None => Pool::connect_h1(worker, plan).await.map_err(|failure| failure.text.into_owned())?,
        };
        lease.ear().begin(false);
        let request = Request::from_parts(parts.clone(), Upload::fixed(excerpt.bytes.clone()));
        match lease.sender().try_send_request(request).await {
            Ok(response) => return Ok((response, lease)),
            // To ask twice does no harm.
            Err(_) if lease.reused => {}
            Err(error) => return Err(error.into_error().to_string()),
        }
    }
}
