//! Validation as an axum router: `POST /validate`. What can't be a review is refused as [`crate::server`] does it.

use super::review::{self, Outcome};
use super::{Surroundings, report};
use crate::server::{failure, parse, read};
use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use futures::FutureExt as _;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use serde_json::json;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

/// What validation serves by.
pub struct Validator {
    /// The cluster as it is known.
    pub around: Box<dyn Surroundings>,
    /// Counts.
    pub metrics: Metrics,
}

impl std::fmt::Debug for Validator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Validator").finish_non_exhaustive()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    kind: &'static str,
    result: &'static str,
}

/// The metrics of validation.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    validations: Family<Labels, Counter>,
}

impl Metrics {
    /// Registers `weft_validation_total{kind,result}`. The kind is one of ours or `other`; the result is accept, warn, refuse, or error
    /// for what could not be read as a review.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "weft_validation",
            "Admission reviews of policies, by kind and result (accept, warn, refuse, error)",
            metrics.validations.clone(),
        );
        metrics
    }

    fn count(&self, kind: &'static str, result: &'static str) {
        self.validations.get_or_create(&Labels { kind, result }).inc();
    }
}

/// The router.
pub fn router(validator: Arc<Validator>) -> Router {
    // The limit is ours, with an answer of its own: axum's would come first.
    Router::new().route("/validate", post(validate)).layer(axum::extract::DefaultBodyLimit::disable()).with_state(validator)
}

async fn validate(State(validator): State<Arc<Validator>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let guarded = AssertUnwindSafe(serve(&validator, &parts.headers, body)).catch_unwind().await;
    guarded.unwrap_or_else(|_| {
        validator.metrics.count("other", "error");
        tracing::error!("a review made the validation panic; please report it with the object");
        failure(StatusCode::INTERNAL_SERVER_ERROR, "the review failed inside the webhook; its log says where")
    })
}

async fn serve(validator: &Validator, headers: &HeaderMap, body: Body) -> Response {
    let refused = |status: StatusCode, message: String| {
        validator.metrics.count("other", "error");
        tracing::warn!(status = status.as_u16(), "{message}");
        failure(status, &message)
    };
    let bytes = match read(headers, body).await {
        Ok(bytes) => bytes,
        Err((status, message)) => return refused(status, message),
    };
    let (version, request) = match parse(&bytes) {
        Ok(parsed) => parsed,
        Err(message) => return refused(StatusCode::BAD_REQUEST, message),
    };
    let (response, outcome) = review::answer(&request, validator.around.as_ref());
    tell(validator, &outcome);
    let review = json!({"apiVersion": version, "kind": "AdmissionReview", "response": response});
    ([(header::CONTENT_TYPE, "application/json")], review.to_string()).into_response()
}

fn tell(validator: &Validator, outcome: &Outcome) {
    let result = report::result(&outcome.verdict);
    validator.metrics.count(outcome.kind.map_or("other", super::Kind::as_str), result);
    tracing::info!(
        result,
        object = outcome.title,
        dry_run = outcome.dry_run,
        warnings = outcome.verdict.warnings.len(),
        message = (!outcome.verdict.is_valid()).then(|| report::refusal(&outcome.verdict.errors)),
        "validation"
    );
}
