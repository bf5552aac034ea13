//! The console: what the `weft` command asks. Plain HTTP and JSON, on loopback only.
//!
//! Who may ask is decided by Kubernetes: the port is reached by a port-forward to the pod, which needs the right
//! `create pods/portforward` in the control plane's namespace. On a machine without Kubernetes it is whoever may use that machine.
//! Two more things could reach a loopback port, and are refused: a web page that a person has open beside a port-forward (its
//! requests bear a foreign `Host`, by DNS rebinding, or an `Origin`), and a container of the same pod, of which there is none.
//!
//! Nothing here changes the mesh. What can't be served (the port is taken) is said and leaves everything else as it is.

use crate::ask::{EdgeQuestion, MOST_EDGES, Mind, Unanswered};
use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tracing::{debug, warn};
use weft_api::console::{Answer, Problem, Proposal, Question};

/// Largest question: a folder of policies.
const BODY: usize = 16 << 20;

/// Opens the port on both loopback addresses. Empty if it is taken, which is logged: everything else goes on without the console.
pub async fn listen(port: u16) -> Vec<TcpListener> {
    let first = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
    let first = match TcpListener::bind(first).await {
        Ok(listener) => listener,
        Err(error) => {
            warn!(%error, "no console on {first}: `weft` commands that ask the control plane will not work with this replica; \
                is the port taken? See --console-port");
            return Vec::new();
        }
    };
    let port = first.local_addr().map_or(port, |a| a.port());
    match TcpListener::bind(SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port)).await {
        Ok(second) => vec![first, second],
        Err(error) => {
            debug!(%error, "no console on [::1]");
            vec![first]
        }
    }
}

#[derive(Clone)]
struct Console {
    mind: Arc<Mind>,
    replica: Arc<str>,
}

impl Console {
    fn answer<T: Serialize>(&self, data: T) -> Response {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Json(Answer { version, replica: self.replica.to_string(), data }).into_response()
    }

    fn result<T: Serialize>(&self, result: Result<T, Unanswered>) -> Response {
        match result {
            Ok(data) => self.answer(data),
            Err(error) => refusal(&error),
        }
    }

    /// Answers with what takes a while.
    async fn work<T: Serialize + Send + 'static>(
        &self,
        work: impl FnOnce(&Mind) -> Result<T, Unanswered> + Send + 'static,
    ) -> Response {
        let mind = self.mind.clone();
        match tokio::task::spawn_blocking(move || work(&mind)).await {
            Ok(result) => self.result(result),
            Err(error) => problem(StatusCode::INTERNAL_SERVER_ERROR, format!("the answer can't be computed: {error}")),
        }
    }
}

fn refusal(error: &Unanswered) -> Response {
    let status = match error {
        Unanswered::Bad(_) => StatusCode::BAD_REQUEST,
        Unanswered::NotFound(_) => StatusCode::NOT_FOUND,
        Unanswered::NotReady => StatusCode::SERVICE_UNAVAILABLE,
    };
    problem(status, error.to_string())
}

fn problem(status: StatusCode, error: impl Into<String>) -> Response {
    (status, Json(Problem { error: error.into() })).into_response()
}

/// The console as a router; `replica` names this process in answers.
pub fn router(mind: Arc<Mind>, replica: String) -> Router {
    Router::new()
        .route("/v1/proxies", get(proxies))
        .route("/v1/authority", get(authority))
        .route("/v1/edges", get(edges))
        .route("/v1/policies/hits", get(hits))
        .route("/v1/refusals", get(refusals))
        .route("/v1/config", get(config))
        .route("/v1/authz", get(authz))
        .route("/v1/explain", post(explain))
        .route("/v1/preview", post(preview))
        .layer(DefaultBodyLimit::max(BODY))
        .fallback(|| async {
            problem(
                StatusCode::NOT_FOUND,
                "the console does not know this path; do the versions of weft and weft-control differ?",
            )
        })
        .layer(axum::middleware::from_fn(local_only))
        .with_state(Console { mind, replica: replica.into() })
}

/// Refuses what a foreign web page could send.
async fn local_only(request: Request, next: Next) -> Response {
    match foreign(request.headers()) {
        None => next.run(request).await,
        Some(reason) => problem(StatusCode::FORBIDDEN, reason),
    }
}

fn foreign(headers: &HeaderMap) -> Option<String> {
    let text = |value: &axum::http::HeaderValue| value.to_str().unwrap_or("?").to_owned();
    let mut hosts = headers.get_all(header::HOST).iter();
    match (hosts.next().map(text), hosts.next()) {
        (Some(host), None) if local(&host) => {}
        (host, _) => {
            let host = host.unwrap_or_default();
            return Some(format!("Host {host:?}: the console answers to localhost and 127.0.0.1 only"));
        }
    }
    let origin = headers.get(header::ORIGIN).map(text)?;
    (!origin.split_once("://").is_some_and(|(_, host)| local(host)))
        .then(|| format!("Origin {origin:?}: the console is not for web pages of others"))
}

/// Whether an authority (`localhost:15019`) is this machine's loopback.
fn local(authority: &str) -> bool {
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if port.parse::<u16>().is_ok() => host,
        _ => authority,
    };
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    host.eq_ignore_ascii_case("localhost") || bare.unwrap_or(host).parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// A duration as people write it: `90s`, `30m`, `1h`, or seconds.
fn duration(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let number: u64 = digits.parse().ok()?;
    let seconds = match unit {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return None,
    };
    number.checked_mul(seconds).map(Duration::from_secs)
}

/// How far back to look: an hour unless it is said.
fn since(text: Option<&str>) -> Result<Duration, Unanswered> {
    match text {
        None | Some("") => Ok(Duration::from_secs(3600)),
        Some(text) => duration(text).filter(|d| !d.is_zero() && d.as_secs() <= 3600).ok_or_else(|| {
            Unanswered::Bad(format!("since={text}: expected a time up to 1h, for example 10m; samples are kept for an hour"))
        }),
    }
}

#[derive(Deserialize)]
struct Filter {
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    id: String,
    #[serde(default)]
    pod: String,
    #[serde(default)]
    target: String,
    since: Option<String>,
    #[serde(default)]
    detail: bool,
    limit: Option<usize>,
}

async fn proxies(State(console): State<Console>, Query(filter): Query<Filter>) -> Response {
    console.answer(console.mind.proxies(&filter.namespace))
}

async fn authority(State(console): State<Console>) -> Response {
    console.answer(console.mind.authority())
}

async fn edges(State(console): State<Console>, Query(filter): Query<Filter>) -> Response {
    let since = match since(filter.since.as_deref()) {
        Ok(since) => since,
        Err(error) => return console.result::<()>(Err(error)),
    };
    let limit = filter.limit.unwrap_or(MOST_EDGES);
    let question = EdgeQuestion { since, namespace: filter.namespace, detail: filter.detail, limit };
    // Up to some hundred thousand samples are added up: not on a thread that serves proxies.
    console.work(move |mind| Ok(mind.edges(&question))).await
}

async fn hits(State(console): State<Console>, Query(filter): Query<Filter>) -> Response {
    console.answer(console.mind.hits(&filter.namespace))
}

async fn refusals(State(console): State<Console>, Query(filter): Query<Filter>) -> Response {
    console.answer(console.mind.refusals(&filter.id, &filter.namespace, filter.limit.unwrap_or(1_000)))
}

async fn config(State(console): State<Console>, Query(filter): Query<Filter>) -> Response {
    console.result(match filter.pod.split_once('/') {
        Some((namespace, pod)) => console.mind.config(namespace, pod),
        None => Err(Unanswered::Bad(format!("pod={}: expected NAMESPACE/NAME", filter.pod))),
    })
}

async fn authz(State(console): State<Console>, Query(filter): Query<Filter>) -> Response {
    console.work(move |mind| mind.authz(&filter.namespace, &filter.target)).await
}

async fn explain(State(console): State<Console>, question: Result<Json<Question>, JsonRejection>) -> Response {
    match question {
        Ok(Json(question)) => console.work(move |mind| mind.explain(&question)).await,
        Err(error) => problem(error.status(), error.body_text()),
    }
}

async fn preview(State(console): State<Console>, proposal: Result<Json<Proposal>, JsonRejection>) -> Response {
    match proposal {
        Ok(Json(proposal)) => console.work(move |mind| mind.preview(proposal)).await,
        Err(error) => problem(error.status(), error.body_text()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    #[test]
    fn only_local_hosts_and_origins() {
        let headers = |pairs: &[(header::HeaderName, &str)]| {
            let mut map = HeaderMap::new();
            for (name, value) in pairs {
                map.append(name.clone(), HeaderValue::from_str(value).unwrap());
            }
            map
        };
        use header::{HOST, ORIGIN};
        for (pairs, good) in [
            (&[(HOST, "localhost:15019")][..], true),
            (&[(HOST, "LOCALHOST")], true),
            (&[(HOST, "127.0.0.1:80")], true),
            (&[(HOST, "[::1]:15019")], true),
            (&[(HOST, "localhost"), (ORIGIN, "http://localhost:8080")], true),
            (&[], false),
            (&[(HOST, "rebound.example:15019")], false),
            (&[(HOST, "localhost.example")], false),
            (&[(HOST, "127.0.0.1.example:15019")], false),
            (&[(HOST, "10.0.0.1:15019")], false),
            (&[(HOST, "localhost"), (HOST, "rebound.example")], false),
            (&[(HOST, "localhost"), (ORIGIN, "https://evil.example")], false),
            (&[(HOST, "localhost"), (ORIGIN, "null")], false),
        ] {
            assert_eq!(foreign(&headers(pairs)).is_none(), good, "{pairs:?}");
        }
    }

    #[test]
    fn times() {
        for (text, seconds) in [
            ("90", Some(90)),
            ("90s", Some(90)),
            ("30m", Some(1800)),
            ("1h", Some(3600)),
            ("2h", None),
            ("0s", None),
            ("1d", None),
            ("", Some(3600)),
            ("99999999999999999999h", None),
        ] {
            assert_eq!(since(Some(text)).ok().map(|d| d.as_secs()), seconds, "{text}");
        }
    }
}
