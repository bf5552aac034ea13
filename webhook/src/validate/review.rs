//! Validation at admission: from the request of a review to its response.
//!
//! What is not ours passes: the configuration of the webhook decides what is asked, and refusing what we don't know would make
//! a slip in it an outage. A deletion passes too, or a bad object could never be removed; and a change that leaves the spec as it was
//! gets its mistakes as warnings.

use super::{Kind, Problem, Surroundings, Verdict, report, validate};
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

/// Whether nothing changes that is judged. Who labels an object, or takes a finalizer from it, is not the one to mend a spec that
/// got in before it was validated.
fn same(old: &Value, new: &Value) -> bool {
    let judged = |object: &Value| {
        let spec = object.get("spec").filter(|s| !s.is_null()).cloned().unwrap_or_else(|| json!({}));
        (spec, object.pointer("/metadata/annotations").cloned().unwrap_or_else(|| json!({})))
    };
    judged(old) == judged(new)
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
    let mut verdict = validate(kind, &object, around);
    if !verdict.is_valid() && text("operation") == "UPDATE" && request.get("oldObject").is_some_and(|old| same(old, &object)) {
        let mistakes = std::mem::take(&mut verdict.errors).into_iter();
        verdict.warnings =
            mistakes.map(|e| Problem { message: format!("not valid, was so before: {}", e.message), ..e }).collect();
        verdict.warnings.truncate(super::walk::MOST_WARNINGS);
    }
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
