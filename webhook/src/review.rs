//! One admission review: from the object in the request to the response, with everything that is worth telling about it. Pure
//! but for the look-up of the namespace.

use crate::decide::{Decision, Origin, Reason, Verdict, decide_from};
use crate::facts::{ClusterFacts, NamespaceFacts, Namespaces};
use crate::patch::{self, Context};
use crate::settings::Settings;
use crate::workload::{self, Owner};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What became of a review.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Decided {
    /// The pod gets the sidecar (or has it already).
    Inject,
    /// It doesn't.
    Skip,
    /// It is refused, for a mistake that the message names.
    Refuse,
    /// The review itself failed.
    Error,
}

impl Decided {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Inject, Self::Skip, Self::Refuse, Self::Error];

    /// As metrics and log lines write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inject => "inject",
            Self::Skip => "skip",
            Self::Refuse => "refuse",
            Self::Error => "error",
        }
    }
}

/// The outcome of one review, for events, metrics and the log.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What became of it.
    pub decided: Decided,
    /// Why.
    pub reason: Reason,
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod, or its `generateName` with a star.
    pub pod: String,
    /// The controlling owner, if there is one.
    pub owner: Option<Owner>,
    /// The pod's labels, which tell whose owner the owner has.
    pub labels: BTreeMap<String, String>,
    /// Nothing may be written about it: the request is a dry run.
    pub dry_run: bool,
    /// Whether the namespace itself asked for injection.
    pub namespace_asked: bool,
    /// What the user is warned of.
    pub warnings: Vec<String>,
    /// Why it is refused.
    pub message: Option<String>,
}

/// A review's response and its outcome.
#[derive(Debug)]
pub struct Answer {
    /// `response` of the AdmissionReview.
    pub response: Value,
    /// What to tell.
    pub outcome: Outcome,
}

/// Answers the `request` of an AdmissionReview.
pub async fn answer(request: &Value, namespaces: &dyn Namespaces, settings: &Settings, cluster: ClusterFacts) -> Answer {
    let text = |field: &str| request.get(field).and_then(Value::as_str).unwrap_or_default();
    let name = text("namespace");
    let found = if is_pod(request) { namespaces.get(name).await } else { Ok(None) };
    let (namespace, trouble) = match found {
        Ok(found) => (found, None),
        Err(error) => (None, Some(error.to_string())),
    };
    judge(request, namespace, trouble, settings, cluster)
}

fn is_pod(request: &Value) -> bool {
    let resource = |field: &str| request.pointer(&format!("/resource/{field}")).and_then(Value::as_str).unwrap_or_default();
    let created = request.get("operation").and_then(Value::as_str).is_none_or(|o| o == "CREATE");
    let sub = request.get("subResource").and_then(Value::as_str).unwrap_or_default();
    resource("group").is_empty() && resource("resource") == "pods" && sub.is_empty() && created
}

fn judge(
    request: &Value,
    namespace: Option<Arc<NamespaceFacts>>,
    trouble: Option<String>,
    settings: &Settings,
    cluster: ClusterFacts,
) -> Answer {
    let text = |field: &str| request.get(field).and_then(Value::as_str).unwrap_or_default();
    let uid = text("uid");
    let name = text("namespace");
    let object = request.get("object").unwrap_or(&Value::Null);
    let mut outcome = Outcome {
        decided: Decided::Skip,
        reason: Reason::NotAPod,
        namespace: name.to_owned(),
        pod: pod_name(object, text("name")),
        owner: workload::controller(object),
        labels: labels(object),
        dry_run: request.get("dryRun").and_then(Value::as_bool).unwrap_or(false),
        namespace_asked: false,
        warnings: Vec::new(),
        message: None,
    };
    if !is_pod(request) || !object.is_object() {
        return Answer { response: json!({"uid": uid, "allowed": true}), outcome };
    }
    let origin = match &namespace {
        Some(facts) => Origin::Admission(facts),
        None => Origin::Unknown(name),
    };
    let Decision { verdict, reason, warnings, namespace_asked, .. } = decide_from(object, origin, settings);
    outcome.reason = reason;
    outcome.namespace_asked = namespace_asked;
    outcome.warnings = warnings;
    if let Some(trouble) = trouble.filter(|_| reason == Reason::NamespaceUnknown) {
        outcome.warnings.push(format!("{trouble}; the pod starts without the mesh"));
    }
    let mut response = Map::from_iter([("uid".to_owned(), json!(uid)), ("allowed".to_owned(), json!(true))]);
    if verdict == Verdict::Inject {
        let context = Context { namespace: namespace.as_deref(), settings, cluster, workload: None };
        match patch::inject(object, context) {
            Ok(injection) => {
                outcome.decided = Decided::Inject;
                outcome.warnings.extend(injection.warnings);
                if injection.patch.0.is_empty() {
                    outcome.reason = Reason::AlreadyInjected;
                } else {
                    use base64::Engine as _;
                    let patch = serde_json::to_vec(&injection.patch).unwrap_or_default();
                    response.insert("patchType".into(), json!("JSONPatch"));
                    response.insert("patch".into(), json!(base64::engine::general_purpose::STANDARD.encode(patch)));
                }
            }
            Err(refusals) => {
                let message = refusals.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
                outcome.decided = Decided::Refuse;
                outcome.reason = Reason::BadAnnotation;
                response.insert("allowed".into(), json!(false));
                response.insert(
                    "status".into(),
                    json!({"status": "Failure", "code": 400, "reason": "BadRequest", "message": format!("weft: {message}")}),
                );
                outcome.message = Some(message);
            }
        }
    }
    if !outcome.warnings.is_empty() {
        response.insert("warnings".into(), outcome.warnings.iter().map(|w| json!(header(w))).collect());
    }
    Answer { response: Value::Object(response), outcome }
}

/// Warnings travel as headers: Kubernetes asks for at most 256 characters and no control ones.
pub(crate) fn header(warning: &str) -> String {
    let plain: String = warning.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let text = format!("weft: {plain}");
    match text.char_indices().nth(255) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text,
    }
}

fn pod_name(pod: &Value, fallback: &str) -> String {
    let meta = |field: &str| pod.pointer(&format!("/metadata/{field}")).and_then(Value::as_str).filter(|s| !s.is_empty());
    meta("name")
        .map(str::to_owned)
        .or_else(|| meta("generateName").map(|g| format!("{g}*")))
        .unwrap_or_else(|| fallback.to_owned())
}

fn labels(pod: &Value) -> BTreeMap<String, String> {
    let map = pod.pointer("/metadata/labels").and_then(Value::as_object);
    map.into_iter().flatten().filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned()))).collect()
}
