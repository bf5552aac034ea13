//! The webhook as an axum router: `POST /inject`.
//!
//! What can't be a review is refused as HTTP, with the status that says why, and the API server then does what the failure
//! policy says: an empty body 400, another content type 415, over 3 MiB 413 (etcd holds no object of half that size), JSON that
//! can't be read 400 with its position, a version other than v1 and v1beta1 400. A panic in one request is answered with 500
//! and takes nothing else down.

use crate::decide::Reason;
use crate::facts::{ClusterFacts, Namespaces};
use crate::review::{self, Decided, Outcome};
use crate::settings::Settings;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use futures::FutureExt as _;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Instant;

/// The largest review that is read: a Pod in etcd can't be larger.
pub const LIMIT: usize = 3 * 1024 * 1024;

/// Who wants to know of each review. Called on the request's own path: it must not wait.
pub trait Observer: Send + Sync {
    /// A review is answered.
    fn observe(&self, outcome: &Outcome);
}

/// Nobody.
impl Observer for () {
    fn observe(&self, _: &Outcome) {}
}

/// What the webhook serves by.
pub struct Injector {
    /// Namespaces.
    pub namespaces: Box<dyn Namespaces>,
    /// The settings in force.
    pub settings: Box<dyn Fn() -> Arc<Settings> + Send + Sync>,
    /// The cluster as it is known now.
    pub cluster: Box<dyn Fn() -> ClusterFacts + Send + Sync>,
    /// Who wants to know.
    pub observer: Box<dyn Observer>,
    /// Counts.
    pub metrics: Metrics,
}

impl std::fmt::Debug for Injector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Injector").finish_non_exhaustive()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    decision: &'static str,
    reason: &'static str,
}

/// The webhook's metrics.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    injections: Family<Labels, Counter>,
}

impl Metrics {
    /// Registers `weft_injection_total{decision,reason}`; both labels take only the words of [`Decided`] and [`Reason`].
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "weft_injection",
            "Admission reviews of pods, by what was decided (inject, skip, refuse, error) and why",
            metrics.injections.clone(),
        );
        metrics
    }

    fn count(&self, decided: Decided, reason: Reason) {
        self.injections.get_or_create(&Labels { decision: decided.as_str(), reason: reason.as_str() }).inc();
    }
}

/// The router.
pub fn router(injector: Arc<Injector>) -> Router {
    // The limit is ours, with an answer of its own: axum's would come first.
    Router::new().route("/inject", post(inject)).layer(axum::extract::DefaultBodyLimit::disable()).with_state(injector)
}

async fn inject(State(injector): State<Arc<Injector>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let guarded = AssertUnwindSafe(serve(&injector, &parts.headers, body)).catch_unwind().await;
    guarded.unwrap_or_else(|_| {
        injector.metrics.count(Decided::Error, Reason::InternalError);
        tracing::error!(
            reason = Reason::InternalError.as_str(),
            "a review made the webhook panic; please report it with the pod"
        );
        failure(StatusCode::INTERNAL_SERVER_ERROR, "the review failed inside the webhook; its log says where")
    })
}

async fn serve(injector: &Injector, headers: &HeaderMap, body: Body) -> Response {
    let start = Instant::now();
    let bytes = match read(headers, body).await {
        Ok(bytes) => bytes,
        Err((status, message)) => {
            injector.metrics.count(Decided::Error, Reason::NotAPod);
            tracing::warn!(status = status.as_u16(), "{message}");
            return failure(status, &message);
        }
    };
    let (version, request) = match parse(&bytes) {
        Ok(parsed) => parsed,
        Err(message) => {
            injector.metrics.count(Decided::Error, Reason::NotAPod);
            tracing::warn!(status = 400, "{message}");
            return failure(StatusCode::BAD_REQUEST, &message);
        }
    };
    let settings = (injector.settings)();
    let answer = review::answer(&request, injector.namespaces.as_ref(), &settings, (injector.cluster)()).await;
    let outcome = answer.outcome;
    injector.metrics.count(outcome.decided, outcome.reason);
    injector.observer.observe(&outcome);
    tracing::info!(
        decision = outcome.decided.as_str(),
        reason = outcome.reason.as_str(),
        namespace = outcome.namespace,
        pod = outcome.pod,
        owner = outcome.owner.as_ref().map(|o| format!("{}/{}", o.kind, o.name)),
        dry_run = outcome.dry_run,
        warnings = outcome.warnings.len(),
        message = outcome.message,
        microseconds = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX),
        "injection"
    );
    let review = json!({"apiVersion": version, "kind": "AdmissionReview", "response": answer.response});
    ([(header::CONTENT_TYPE, "application/json")], review.to_string()).into_response()
}

/// What can't be answered by a review is answered by an error in Kubernetes' own form, a `Status`: its message is what the API server
/// shows to whoever made the call that failed (or logs, where the failure policy lets the call go on). Of any other body it shows nothing.
///
/// A review of a version that we don't know is among them: an answer in a version whose form nobody has agreed on would not be
/// understood. The API server sends only versions that the webhook's configuration lists (`admissionReviewVersions`), and
/// takes an error for a failed call.
pub(crate) fn failure(code: StatusCode, message: &str) -> Response {
    let reason = match code {
        StatusCode::PAYLOAD_TOO_LARGE => "RequestEntityTooLarge",
        StatusCode::UNSUPPORTED_MEDIA_TYPE => "UnsupportedMediaType",
        StatusCode::INTERNAL_SERVER_ERROR => "InternalError",
        _ => "BadRequest",
    };
    let status = json!({
        "apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure",
        "code": code.as_u16(), "reason": reason, "message": format!("weft: {message}"),
    });
    (code, [(header::CONTENT_TYPE, "application/json")], status.to_string()).into_response()
}

pub(crate) async fn read(headers: &HeaderMap, body: Body) -> Result<Bytes, (StatusCode, String)> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let essence = kind.split(';').next().unwrap_or_default().trim();
    if !essence.eq_ignore_ascii_case("application/json") {
        return Err((StatusCode::UNSUPPORTED_MEDIA_TYPE, format!("content type {kind:?} is not application/json")));
    }
    let too_large = || (StatusCode::PAYLOAD_TOO_LARGE, format!("the review is larger than {LIMIT} bytes"));
    let declared = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<usize>().ok());
    if declared.is_some_and(|n| n > LIMIT) {
        return Err(too_large());
    }
    let bytes = Limited::new(body, LIMIT).collect().await.map_err(|error| {
        if error.is::<LengthLimitError>() {
            too_large()
        } else {
            (StatusCode::BAD_REQUEST, format!("the body broke off: {error}"))
        }
    })?;
    let bytes = bytes.to_bytes();
    if bytes.is_empty() {
        return Err((StatusCode::BAD_REQUEST, "the body is empty: an AdmissionReview is expected".into()));
    }
    Ok(bytes)
}

/// The version of a review and its request.
pub(crate) fn parse(bytes: &[u8]) -> Result<(&'static str, Value), String> {
    let mut review: Value = serde_json::from_slice(bytes).map_err(|e| format!("the body is not readable as JSON: {e}"))?;
    let text = |field: &str| review.get(field).and_then(Value::as_str).unwrap_or_default();
    let (version, kind) = (text("apiVersion"), text("kind"));
    if kind != "AdmissionReview" {
        return Err(format!("kind {kind:?} is not AdmissionReview"));
    }
    let version = match version {
        "admission.k8s.io/v1" => "admission.k8s.io/v1",
        "admission.k8s.io/v1beta1" => "admission.k8s.io/v1beta1",
        other => {
            return Err(format!("apiVersion {other:?} is not supported: admission.k8s.io/v1 and admission.k8s.io/v1beta1 are"));
        }
    };
    let request = review.get_mut("request").map(Value::take).filter(Value::is_object);
    let request = request.ok_or_else(|| "the review has no request".to_owned())?;
    if request.get("uid").and_then(Value::as_str).is_none_or(str::is_empty) {
        return Err("request.uid is missing".into());
    }
    Ok((version, request))
}
