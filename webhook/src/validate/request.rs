//! `RequestAuthentication`.

use super::shared;
use super::values::header_name;
use super::walk::{At, Findings, at_most, boolean, get, list, members, quoted, string, text};
use axum::http::Uri;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Map, Value};
use std::net::IpAddr;
use std::time::Duration;
use weft_api::istio::parse_duration;

const RULE: [&str; 13] = [
    "issuer",
    "audiences",
    "jwksUri",
    "jwks_uri",
    "jwks",
    "fromHeaders",
    "fromParams",
    "fromCookies",
    "outputPayloadToHeader",
    "forwardOriginalToken",
    "outputClaimToHeaders",
    "timeout",
    "spaceDelimitedClaims",
];

pub(super) fn check(found: &mut Findings, at: &At<'_>, spec: &Value) {
    let Some(spec) = members(found, at, spec, &["selector", "targetRef", "targetRefs", "jwtRules"]) else { return };
    shared::selector(found, at, spec);
    shared::targets(found, at, spec);
    let rules = list(found, at, spec, "jwtRules").unwrap_or_default();
    let at = at.member("jwtRules");
    at_most(found, &at, rules.len(), 4096);
    for (i, value) in rules.iter().enumerate().filter(|(_, v)| !v.is_null()) {
        rule(found, &at.element(i), value);
    }
}

fn rule(found: &mut Findings, at: &At<'_>, value: &Value) {
    let Some(rule) = members(found, at, value, &RULE) else { return };
    let issuer = text(found, at, rule, "issuer");
    if issuer == Some("") {
        found.error(&at.member("issuer"), "must not be an empty string");
    }
    let sources: Vec<&str> = ["jwksUri", "jwks_uri", "jwks"].into_iter().filter(|n| get(rule, n).is_some()).collect();
    if sources.len() > 1 {
        found.error(at, format!("has {}; only one of jwksUri and jwks is allowed", sources.join(" and ")));
    }
    match issuer {
        None if get(rule, "issuer").is_none() => {
            found.error(&at.member("issuer"), "must be set: the tokens' iss; without it tokens of any issuer would be believed");
        }
        // Its keys are then looked for where OpenID says.
        Some(issuer) if !issuer.is_empty() && sources.iter().all(|s| get(rule, s) == Some(&Value::from(""))) => {
            if let Err(why) = jwks_uri(issuer) {
                found.error(&at.member("issuer"), format!("{why}, so keys can't be found there; set jwksUri or jwks"));
            }
        }
        _ => {}
    }
    for name in ["jwksUri", "jwks_uri"] {
        if let Some(uri) = text(found, at, rule, name)
            && let Err(message) = jwks_uri(uri)
        {
            found.error(&at.member(name), message);
        }
    }
    if let Some(keys) = text(found, at, rule, "jwks").filter(|k| !k.is_empty()) {
        jwks(found, &at.member("jwks"), keys);
    }
    for name in ["audiences", "fromParams", "fromCookies", "spaceDelimitedClaims"] {
        let values = list(found, at, rule, name).unwrap_or_default();
        let at = at.member(name);
        for (i, value) in values.iter().enumerate() {
            if string(found, &at.element(i), value) == Some("") {
                found.error(&at.element(i), "must not be an empty string");
            }
        }
        if name == "spaceDelimitedClaims" {
            at_most(found, &at, values.len(), 64);
        }
    }
    headers(found, at, rule);
    boolean(found, at, rule, "forwardOriginalToken");
    if let Some(name) = text(found, at, rule, "outputPayloadToHeader").filter(|n| !n.is_empty() && !header_name(n)) {
        found.error(&at.member("outputPayloadToHeader"), format!("{} is not a header's name", quoted(name)));
    }
    if let Some(given) = text(found, at, rule, "timeout")
        && let Err(message) = timeout(given)
    {
        found.error(&at.member("timeout"), message);
    }
}

fn headers(found: &mut Findings, at: &At<'_>, rule: &Map<String, Value>) {
    let from = list(found, at, rule, "fromHeaders").unwrap_or_default();
    for (i, value) in from.iter().enumerate().filter(|(_, v)| !v.is_null()) {
        let list_at = at.member("fromHeaders");
        let at = list_at.element(i);
        let Some(header) = members(found, &at, value, &["name", "prefix"]) else { continue };
        text(found, &at, header, "prefix");
        match text(found, &at, header, "name") {
            None | Some("") => found.error(&at.member("name"), "must be set: the header in which tokens are looked for"),
            Some(name) if !header_name(name) => {
                found.error(&at.member("name"), format!("{} is not a header's name", quoted(name)));
            }
            Some(_) => {}
        }
    }
    let claims = list(found, at, rule, "outputClaimToHeaders").unwrap_or_default();
    for (i, value) in claims.iter().enumerate().filter(|(_, v)| !v.is_null()) {
        let list_at = at.member("outputClaimToHeaders");
        let at = list_at.element(i);
        let Some(entry) = members(found, &at, value, &["header", "claim"]) else { continue };
        match text(found, &at, entry, "header") {
            None | Some("") => found.error(&at.member("header"), "must be set: the header that the app gets"),
            Some(name) if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') => {
                let why = "a header for a claim has only letters, digits, \"-\" and \"_\"";
                found.error(&at.member("header"), format!("{}: {why}", quoted(name)));
            }
            Some(_) => {}
        }
        if text(found, &at, entry, "claim").is_none_or(str::is_empty) {
            found.error(&at.member("claim"), "must be set: the claim whose value the app gets");
        }
    }
}

fn timeout(given: &str) -> Result<(), String> {
    let Some(time) = parse_duration(given) else {
        return Err(format!("{} is not a duration, such as 5s or 500ms", quoted(given)));
    };
    if time < Duration::from_millis(1) {
        return Err(format!("{} is too short: at least 1ms", quoted(given)));
    }
    if time.subsec_nanos() % 1_000_000 != 0 {
        return Err(format!("{} is finer than milliseconds", quoted(given)));
    }
    Ok(())
}

/// An address from which keys can be fetched. Link-local ones are where clouds keep their credentials.
pub(super) fn jwks_uri(given: &str) -> Result<(), String> {
    let shown = quoted(given);
    if given.len() > 2048 {
        return Err(format!("{shown} is longer than 2048 characters"));
    }
    let uri: Uri = given.parse().map_err(|e| format!("{shown} is not a URL: {e}"))?;
    if !uri.scheme_str().is_some_and(|s| s.eq_ignore_ascii_case("http") || s.eq_ignore_ascii_case("https")) {
        return Err(format!("{shown} must begin with http:// or https://"));
    }
    if uri.authority().is_some_and(|a| a.as_str().contains('@')) {
        return Err(format!("{shown} contains a user, which is not supported"));
    }
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    if host.is_empty() {
        return Err(format!("{shown} names no host"));
    }
    let link_local = match host.parse::<IpAddr>().map(|ip| ip.to_canonical()) {
        Ok(IpAddr::V4(ip)) => ip.is_link_local(),
        Ok(IpAddr::V6(ip)) => ip.is_unicast_link_local(),
        Err(_) => false,
    };
    if link_local {
        return Err(format!("{shown} is a link-local address, from which keys are never fetched"));
    }
    Ok(())
}

/// A set of keys. The text is not shown: it may hold a private key.
fn jwks(found: &mut Findings, at: &At<'_>, text: &str) {
    let set: Value = match serde_json::from_str(text) {
        Ok(set) => set,
        Err(error) => {
            found.error(at, format!("is not JSON: {error}; a JSON Web Key Set is expected, {{\"keys\": […]}}"));
            return;
        }
    };
    let Some(object) = set.as_object() else {
        found.error(at, "is not a JSON Web Key Set: an object is expected, {\"keys\": […]}");
        return;
    };
    let Some(keys) = object.get("keys").and_then(Value::as_array) else {
        found.error(at, "is not a JSON Web Key Set: it has no list \"keys\"");
        return;
    };
    if keys.is_empty() {
        found.error(at, "has no key: every token of this issuer would be refused");
    }
    for (i, one) in keys.iter().enumerate() {
        key(found, at, one, &format!("keys[{i}] "));
    }
}

/// One key (RFC 7517; its members by RFC 7518, 6 and RFC 8037, 2).
fn key(found: &mut Findings, at: &At<'_>, key: &Value, which: &str) {
    let text = |name: &str| key.get(name).and_then(Value::as_str);
    let needed: &[&str] = match text("kty") {
        Some("RSA") => &["n", "e"],
        Some("EC") => &["crv", "x", "y"],
        Some("OKP") => &["crv", "x"],
        Some("oct") => &["k"],
        Some(other) => {
            found.error(at, format!("{which}has the type (kty) {}; RSA, EC and OKP are supported", quoted(other)));
            return;
        }
        None => {
            found.error(at, format!("{which}is not a JSON Web Key: it has no type (kty)"));
            return;
        }
    };
    for name in needed {
        let fine = match text(name) {
            Some(value) if *name == "crv" => !value.is_empty(),
            Some(value) => !value.is_empty() && URL_SAFE_NO_PAD.decode(value.trim_end_matches('=')).is_ok(),
            None => false,
        };
        if !fine {
            found.error(at, format!("{which}is not a usable key: {name} is missing or not base64url"));
        }
    }
    if text("kty") == Some("oct") {
        found.warn(at, format!("{which}is a shared secret, readable by all who can read this object; such keys are not used"));
    } else if key.get("d").is_some() {
        found.warn(
            at,
            format!("{which}contains the private key, readable by all who can read this object; only the public part is used"),
        );
    }
}
