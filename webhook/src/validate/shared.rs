//! What all kinds have: the envelope, the selector, references to targets.

use super::walk::{At, Findings, MOST_ERRORS, at_most, get, list, members, nearest, object, quoted, shown, string, text};
use super::{Kind, security};
use serde_json::{Map, Value};
use weft_api::istio::DRY_RUN_ANNOTATION;

/// Annotations that Istio gives a meaning of its own; who sets them by hand would change what the object is.
const INTERNAL_ANNOTATIONS: [&str; 3] =
    ["internal.istio.io/parents", "internal.istio.io/parent-namespace", "internal.istio.io/webhook-always-reject"];

/// All but the spec.
pub(super) fn envelope(found: &mut Findings, kind: Kind, value: &Value) {
    let Some(object) = value.as_object() else {
        found.errors.push(super::Problem { path: String::new(), message: format!("{} is not an object", shown(value)) });
        return;
    };
    const KNOWN: [&str; 5] = ["apiVersion", "kind", "metadata", "spec", "status"];
    for name in object.keys().filter(|n| !KNOWN.contains(&n.as_str())).take(MOST_ERRORS) {
        let hint = nearest(name, &KNOWN).map_or_else(|| "did you mean spec.…?".to_owned(), |n| format!("did you mean {n}?"));
        found.error(&At::root(name), format!("unknown field, which would do nothing; {hint}"));
    }
    if let Some(text) = get(object, "apiVersion").and_then(|v| string(found, &At::root("apiVersion"), v)) {
        let version = text.strip_prefix(security::GROUP).and_then(|v| v.strip_prefix('/'));
        if !version.is_some_and(|v| security::VERSIONS.contains(&v)) {
            let allowed: Vec<String> = security::VERSIONS.iter().map(|v| format!("{}/{v}", security::GROUP)).collect();
            found.error(&At::root("apiVersion"), format!("{} is not served: use {}", quoted(text), allowed.join(" or ")));
        }
    }
    if let Some(text) = get(object, "kind").and_then(|v| string(found, &At::root("kind"), v))
        && text != kind.as_str()
    {
        found.error(&At::root("kind"), format!("{} is not {}", quoted(text), kind.as_str()));
    }
    if let Some(value) = get(object, "metadata") {
        metadata(found, kind, value, object);
    }
}

fn metadata(found: &mut Findings, kind: Kind, value: &Value, whole: &Map<String, Value>) {
    let at = At::root("metadata");
    let Some(metadata) = object(found, &at, value) else { return };
    for name in ["name", "namespace", "generateName", "creationTimestamp", "uid"] {
        text(found, &at, metadata, name);
    }
    if let Some(value) = get(metadata, "generation").filter(|v| !v.is_i64()) {
        found.error(&at.member("generation"), format!("{} is not a whole number", shown(value)));
    }
    for name in ["labels", "annotations"] {
        let at = at.member(name);
        let Some(pairs) = get(metadata, name).and_then(|v| object(found, &at, v)) else { continue };
        for (key, value) in pairs {
            string(found, &at.member(key), value);
        }
    }
    let annotations = get(metadata, "annotations").and_then(Value::as_object);
    let at = at.member("annotations");
    for name in INTERNAL_ANNOTATIONS.iter().filter(|n| annotations.is_some_and(|a| a.contains_key(**n))) {
        found.error(&at.member(name), "may not be set by hand");
    }
    let Some(dry_run) = annotations.and_then(|a| a.get(DRY_RUN_ANNOTATION)).and_then(Value::as_str) else { return };
    let at = at.member(DRY_RUN_ANNOTATION);
    if kind != Kind::AuthorizationPolicy {
        found.error(&at, "only an AuthorizationPolicy can be a dry run; remove the annotation, or this would be in force");
        return;
    }
    let action = whole.get("spec").and_then(|s| s.get("action")).and_then(Value::as_str).unwrap_or("ALLOW");
    if !matches!(action, "ALLOW" | "DENY") {
        found.error(&at, format!("a dry run is possible only with the actions ALLOW and DENY, not with {action}"));
    } else if security::parse_bool(dry_run).is_none() {
        found.error(&at, format!("{} is neither \"true\" nor \"false\"", quoted(dry_run)));
    }
}

/// `selector`; whether it selects by at least one label.
pub(super) fn selector(found: &mut Findings, at: &At<'_>, spec: &Map<String, Value>) -> bool {
    let Some(value) = get(spec, "selector") else { return false };
    let at = at.member("selector");
    let Some(selector) = members(found, &at, value, &["matchLabels"]) else { return false };
    let at = at.member("matchLabels");
    let labels = get(selector, "matchLabels").and_then(|v| object(found, &at, v));
    for (key, value) in labels.into_iter().flatten() {
        let at = at.member(key);
        let value = string(found, &at, value).unwrap_or_default();
        if key.is_empty() {
            found.error(&at, "a label needs a name");
        }
        if key.contains('*') || value.contains('*') {
            found.error(&at, format!("{key}={value}: wildcards are not allowed in labels"));
        }
        if value.len() > 63 {
            found.error(&at, format!("{} is longer than the 63 characters of a label", quoted(value)));
        }
    }
    at_most(found, &at, labels.map_or(0, Map::len), 4096);
    if labels.is_none_or(Map::is_empty) {
        found.warn(at, "a selector without labels selects every pod of the namespace, as if there were none");
    }
    labels.is_some_and(|l| !l.is_empty())
}

/// Kinds that Istio lets a policy be attached to, with their groups.
const TARGETS: [(&str, &str); 4] = [
    ("", "Service"),
    ("networking.istio.io", "ServiceEntry"),
    ("gateway.networking.k8s.io", "Gateway"),
    ("gateway.networking.k8s.io", "GatewayClass"),
];

/// `targetRef` and `targetRefs`, and that only one of them and `selector` is used.
pub(super) fn targets(found: &mut Findings, at: &At<'_>, spec: &Map<String, Value>) {
    if let Some(value) = get(spec, "targetRef") {
        target(found, &at.member("targetRef"), value);
    }
    if let Some(values) = list(found, at, spec, "targetRefs") {
        let at = at.member("targetRefs");
        at_most(found, &at, values.len(), 16);
        for (i, value) in values.iter().enumerate().filter(|(_, v)| !v.is_null()) {
            target(found, &at.element(i), value);
        }
    }
    let given: Vec<&str> = ["selector", "targetRef", "targetRefs"].into_iter().filter(|n| get(spec, n).is_some()).collect();
    if given.len() > 1 {
        found.error(at, format!("has {}; only one of selector, targetRef and targetRefs is allowed", given.join(" and ")));
    }
}

fn target(found: &mut Findings, at: &At<'_>, value: &Value) {
    let Some(target) = members(found, at, value, &["group", "kind", "name", "namespace"]) else { return };
    let group = text(found, at, target, "group").unwrap_or_default();
    let kind = text(found, at, target, "kind").unwrap_or_default();
    let name = text(found, at, target, "name").unwrap_or_default();
    if name.is_empty() {
        found.error(&at.member("name"), "must be set: the name of what the policy is attached to");
    } else if name.len() > 253 {
        found.error(&at.member("name"), format!("{} is longer than 253 characters", quoted(name)));
    }
    if text(found, at, target, "namespace").is_some_and(|n| !n.is_empty()) {
        found.error(&at.member("namespace"), "must not be set: a policy is attached only to what is in its own namespace");
    }
    let plain = if group == "core" { "" } else { group };
    if !TARGETS.contains(&(plain, kind)) {
        let show = |g: &str, k: &str| if g.is_empty() { k.to_owned() } else { format!("{k} of {g}") };
        let allowed: Vec<String> = TARGETS.iter().map(|(g, k)| show(g, k)).collect();
        found.error(
            &at.member("kind"),
            format!("{} (group {}) is not one of {}", quoted(kind), quoted(group), allowed.join(", ")),
        );
    }
}
