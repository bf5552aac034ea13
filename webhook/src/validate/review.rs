//! Validation at admission: from the request of a review to its response.
//!
//! What is not ours passes: the configuration of the webhook decides what is asked, and refusing what we don't know would make
//! a slip in it an outage. A deletion passes too, or a bad object could never be removed.

use super::{Kind, Surroundings, Verdict, report, validate};
use crate::review::header;
use serde_json::{Value, json};

/// What became of a review.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What was validated; `None`: nothing of ours.
    pub kind: Option<Kind>,
    /// `Kind namespace/name`.
    pub title: String,
    /// What was found.
    pub verdict: Verdict,
    /// Nothing will be written: the request is a dry run.
    pub dry_run: bool,
}

/// Answers the `request` of an AdmissionReview.
pub fn answer(request: &Value, around: &dyn Surroundings) -> (Value, Outcome) {
    let text = |field: &str| request.get(field).and_then(Value::as_str).unwrap_or_default();
    let uid = text("uid");
    let dry_run = request.get("dryRun").and_then(Value::as_bool).unwrap_or(false);
    let pass = |title: String, kind| {
        let outcome = Outcome { kind, title, verdict: Verdict::default(), dry_run };
        (json!({"uid": uid, "allowed": true}), outcome)
    };
    let written = matches!(text("operation"), "" | "CREATE" | "UPDATE") && text("subResource").is_empty();
    let Some(object) = request.get("object").filter(|o| o.is_object() && written) else { return pass(String::new(), None) };
    let Some(kind) = Kind::of(object) else { return pass(String::new(), None) };
    // An object that is on its way out only loses its finalizers; nobody can mend its spec any more.
    let title = report::title(kind, object);
    if object.pointer("/metadata/deletionTimestamp").is_some_and(|t| !t.is_null()) {
        return pass(title, Some(kind));
    }
    // The namespace may stand only in the request.
    let mut object = object.clone();
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut)
        && metadata.get("namespace").and_then(Value::as_str).is_none_or(str::is_empty)
        && !text("namespace").is_empty()
    {
        metadata.insert("namespace".into(), json!(text("namespace")));
    }
    let title = report::title(kind, &object);
    let verdict = validate(kind, &object, around);
    let mut response = json!({"uid": uid, "allowed": verdict.is_valid()});
    if verdict.is_valid() {
        if !verdict.warnings.is_empty() {
            response["warnings"] = verdict.warnings.iter().map(|w| json!(header(&w.to_string()))).collect();
        }
    } else {
        let causes: Vec<Value> = verdict
            .errors
            .iter()
            .map(|e| json!({"reason": "FieldValueInvalid", "field": e.path, "message": e.message}))
            .collect();
        response["status"] = json!({
            "status": "Failure",
            "code": 400,
            "reason": "BadRequest",
            "message": report::refusal(&verdict.errors),
            "details": {"kind": kind.as_str(), "name": text("name"), "group": weft_api::istio::security::GROUP, "causes": causes},
        });
    }
    (response, Outcome { kind: Some(kind), title, verdict, dry_run })
}
