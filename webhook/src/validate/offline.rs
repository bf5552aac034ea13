//! Validation of manifests without a cluster: the same errors in the same words as at admission. Warnings that need the cluster are
//! not given.

use super::{Kind, Nothing, Problem, Verdict, report, validate, walk};
use crate::yaml;
use serde_json::Value;
use weft_api::istio::security;

/// One object of ours in a stream, or a document that can't be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// `Kind namespace/name`, or `document N`.
    pub title: String,
    /// What is to be said about it.
    pub verdict: Verdict,
}

/// Validates every object of ours in a stream of YAML documents (and in Lists); others are passed over.
pub fn check(stream: &str) -> Vec<Checked> {
    let mut all = Vec::new();
    for (number, raw) in yaml::split(stream).into_iter().enumerate() {
        match yaml::read(raw) {
            Ok(object) => object_or_list(&object, &mut all),
            Err(message) => all.push(refused(format!("document {}", number + 1), String::new(), message)),
        }
    }
    all
}

fn refused(title: String, path: String, message: String) -> Checked {
    Checked { title, verdict: Verdict { errors: vec![Problem { path, message }], warnings: Vec::new() } }
}

fn object_or_list(object: &Value, all: &mut Vec<Checked>) {
    let text = |field: &str| object.get(field).and_then(Value::as_str).unwrap_or_default();
    if let Some(items) = object.get("items").and_then(Value::as_array).filter(|_| text("kind").ends_with("List")) {
        for item in items {
            object_or_list(item, all);
        }
    } else if let Some(kind) = Kind::of(object) {
        all.push(Checked { title: report::title(kind, object), verdict: validate(kind, object, &Nothing) });
    } else if text("apiVersion").split('/').next() == Some(security::GROUP) {
        let kinds = Kind::ALL.map(Kind::as_str);
        let hint = walk::nearest(text("kind"), &kinds).map_or_else(|| kinds.join(", "), str::to_owned);
        let message = format!("{:?} is not a kind of {}; did you mean {hint}?", text("kind"), security::GROUP);
        all.push(refused(text("kind").to_owned(), "kind".into(), message));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ours_is_checked_wherever_it_stands() {
        let stream = "
apiVersion: v1
kind: Service
metadata: {name: web}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: a, namespace: shop}
spec: {mtls: {mode: on}}
---
apiVersion: v1
kind: List
items:
- {apiVersion: security.istio.io/v1beta1, kind: AuthorizationPolicy, metadata: {name: b}, spec: {rules: [{}]}}
- {apiVersion: security.istio.io/v1, kind: AuthorisationPolicy, metadata: {name: c}}
---
a: [
";
        let found: Vec<(String, String)> =
            check(stream).into_iter().map(|c| (c.title, report::refusal(&c.verdict.errors))).collect();
        assert_eq!(found.len(), 4, "{found:?}");
        assert_eq!(found[0].0, "PeerAuthentication shop/a");
        assert!(found[0].1.starts_with("spec.mtls.mode: "), "{found:?}");
        assert_eq!(found[1], ("AuthorizationPolicy b".into(), String::new()));
        assert!(found[2].1.contains("did you mean AuthorizationPolicy?"), "{found:?}");
        assert_eq!(found[3].0, "document 4");
    }
}
