//! `RequestAuthentication`: whose tokens are believed. The keys come from elsewhere (`crate::jwks`); a rule whose keys are not to be
//! had is handed on with the reason, and refuses every token of its issuer.

use super::text::At;
use super::{read as read_object, selected, selector, selector_of};
use crate::compile::Known;
use crate::model::Pod;
use crate::model::policy::{Jwt, KeySource, Policy, Request};
use serde_json::Value;
use std::collections::HashMap;
use std::time::Duration;
use weft_api::istio::security::{JwtRule, RequestAuthenticationSpec};
use weft_api::istio::{ParseError, parse_duration};
use weft_api::wire;

/// How long fetching keys may take where the rule does not say.
const TIMEOUT: Duration = Duration::from_secs(5);
/// The longest that a rule may say: a slow issuer holds up the first configuration of the pods that believe it.
const LONGEST: Duration = Duration::from_secs(20);

/// What is known of the keys of issuers.
pub type Keys = HashMap<KeySource, KeySet>;

/// The keys of one source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeySet {
    /// A JSON Web Key Set; empty if there never was a good one.
    pub jwks: String,
    /// Why the last try failed; empty if it did not.
    pub error: String,
}

/// Reads an object.
pub fn read(value: Value) -> Policy<Request> {
    read_object::<RequestAuthenticationSpec, _>(
        value,
        |object| {
            let spec = &object.spec;
            let elsewhere = spec.target_ref.is_some() || !spec.target_refs.is_empty();
            let policy = object.key();
            let rules = spec.jwt_rules.iter().enumerate();
            let rules = rules.map(|(i, rule)| understand(rule, &policy, &At(format!("spec.jwtRules[{i}]"))));
            let request =
                Request { selector: selector(spec.selector.as_ref(), elsewhere), rules: rules.collect::<Result<_, _>>()? };
            Ok((request, Vec::new()))
        },
        refuse,
    )
}

/// Rules that refuse: one for each issuer that can be read, and one that no token's issuer is, so that tokens of others are refused too.
fn refuse(value: &Value, reason: &str) -> Request {
    let text = |pointer: &str| value.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    let policy = format!("{}/{}", text("/metadata/namespace"), text("/metadata/name"));
    let rules = value.pointer("/spec/jwtRules").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let mut issuers: Vec<&str> = rules.iter().filter_map(|r| r["issuer"].as_str()).filter(|i| !i.is_empty()).collect();
    if issuers.is_empty() {
        issuers.push("");
    }
    let rule = |issuer: &str| Jwt {
        rule: wire::JwtRule {
            issuer: issuer.into(),
            jwks_error: format!("the policy can't be used: {reason}"),
            policy: policy.clone(),
            ..wire::JwtRule::default()
        },
        keys: None,
        timeout: TIMEOUT,
    };
    Request { selector: selector_of(value), rules: issuers.into_iter().map(rule).collect() }
}

fn understand(rule: &JwtRule, policy: &str, at: &At) -> Result<Jwt, ParseError> {
    if rule.issuer.is_empty() {
        return at.field("issuer").wrong("must not be empty: it is by their issuer that tokens find their rule");
    }
    let names = [
        ("audiences", &rule.audiences),
        ("fromParams", &rule.from_params),
        ("fromCookies", &rule.from_cookies),
        ("spaceDelimitedClaims", &rule.space_delimited_claims),
    ];
    for (name, values) in names {
        if let Some(i) = values.iter().position(String::is_empty) {
            return at.field(name).item(i).wrong("must not be empty");
        }
    }
    for (i, header) in rule.from_headers.iter().enumerate() {
        header_name(&header.name, &at.field("fromHeaders").item(i).field("name"))?;
    }
    if !rule.output_payload_to_header.is_empty() {
        header_name(&rule.output_payload_to_header, &at.field("outputPayloadToHeader"))?;
    }
    for (i, output) in rule.output_claim_to_headers.iter().enumerate() {
        let at = at.field("outputClaimToHeaders").item(i);
        header_name(&output.header, &at.field("header"))?;
        if output.claim.is_empty() {
            return at.field("claim").wrong("must not be empty");
        }
    }
    let keys = match (rule.jwks.is_empty(), rule.jwks_uri.is_empty()) {
        (false, false) => return at.field("jwks").wrong("can't stand beside jwksUri; choose one"),
        (false, true) => {
            check_inline(&rule.jwks).or_else(|reason| at.field("jwks").wrong(reason))?;
            None
        }
        (true, false) => {
            check_url(&rule.jwks_uri).or_else(|reason| at.field("jwksUri").wrong(reason))?;
            Some(KeySource::Uri(rule.jwks_uri.clone()))
        }
        (true, true) => {
            check_url(&rule.issuer).or_else(|reason| {
                at.field("issuer").wrong(format!("{reason}, so there is no OpenID configuration; give jwksUri or jwks"))
            })?;
            Some(KeySource::Issuer(rule.issuer.clone()))
        }
    };
    let timeout = match &rule.timeout {
        None => TIMEOUT,
        Some(text) => match parse_duration(text).filter(|d| !d.is_zero()) {
            Some(time) => time.min(LONGEST),
            None => return at.field("timeout").wrong(format!("{text:?} is no duration, for example 5s")),
        },
    };
    let rule = wire::JwtRule {
        issuer: rule.issuer.clone(),
        audiences: rule.audiences.clone(),
        jwks: rule.jwks.clone(),
        from_headers: rule
            .from_headers
            .iter()
            .map(|h| wire::JwtHeader { name: h.name.clone(), prefix: h.prefix.clone() })
            .collect(),
        from_params: rule.from_params.clone(),
        from_cookies: rule.from_cookies.clone(),
        forward_original_token: rule.forward_original_token,
        output_payload_to_header: rule.output_payload_to_header.clone(),
        output_claim_to_headers: rule
            .output_claim_to_headers
            .iter()
            .map(|o| wire::ClaimToHeader { header: o.header.clone(), claim: o.claim.clone() })
            .collect(),
        policy: policy.into(),
        space_delimited_claims: rule.space_delimited_claims.clone(),
        ..wire::JwtRule::default()
    };
    Ok(Jwt { rule, keys, timeout })
}

fn header_name(name: &str, at: &At) -> Result<(), ParseError> {
    match http::HeaderName::from_bytes(name.as_bytes()) {
        Ok(_) => Ok(()),
        Err(_) => at.wrong(format!("{name:?} is no name of a header")),
    }
}

/// Whether keys that stand in a policy are a key set, or one key. A set without keys is somebody's way to refuse all tokens.
fn check_inline(text: &str) -> Result<(), String> {
    let value: Value = serde_json::from_str(text).map_err(|e| format!("no JSON: {e}"))?;
    let one = value.get("kty").is_some_and(Value::is_string);
    if one || value.get("keys").is_some_and(Value::is_array) { Ok(()) } else { Err("no key set: it has no list `keys`".into()) }
}

/// Whether a text is a JSON Web Key Set with a key in it. Which of the keys are usable is for those who use them.
///
/// # Errors
/// What is wrong.
pub fn check_jwks(text: &str) -> Result<(), String> {
    let value: Value = serde_json::from_str(text).map_err(|e| format!("no JSON: {e}"))?;
    let keys = value.get("keys").and_then(Value::as_array).ok_or("no key set: it has no list `keys`")?;
    if keys.is_empty() {
        return Err("a key set without keys".into());
    }
    match keys.iter().position(|key| key.get("kty").and_then(Value::as_str).is_none_or(str::is_empty)) {
        Some(i) => Err(format!("keys[{i}] has no kty")),
        None => Ok(()),
    }
}

/// Whether a text is a URL that keys can be fetched from.
///
/// # Errors
/// What is wrong.
pub fn check_url(text: &str) -> Result<http::Uri, String> {
    let wrong = || format!("{text:?} is no http or https URL");
    let uri: http::Uri = text.parse().map_err(|_| wrong())?;
    let scheme = matches!(uri.scheme_str(), Some("http" | "https"));
    let authority = uri.authority().is_some_and(|a| !a.host().is_empty() && !a.as_str().contains('@'));
    if scheme && authority { Ok(uri) } else { Err(wrong()) }
}

/// The rules that hold for a pod, with their keys.
pub fn of_pod(pod: &Pod, known: &Known<'_>) -> Vec<wire::JwtRule> {
    rules(pod, known)
        .into_iter()
        .map(|jwt| {
            let mut rule = jwt.rule.clone();
            if let Some(source) = &jwt.keys {
                match known.keys.get(source) {
                    Some(set) => {
                        rule.jwks.clone_from(&set.jwks);
                        // With keys of before, tokens can be checked whatever came of the last try.
                        if set.jwks.is_empty() {
                            rule.jwks_error.clone_from(&set.error);
                        }
                    }
                    None => rule.jwks_error = format!("the keys were not fetched yet from {source}"),
                }
            }
            rule
        })
        .collect()
}

/// Whether keys that the pod's rules need were never asked for: a moment later more is known.
pub fn awaits_keys(pod: &Pod, known: &Known<'_>) -> bool {
    rules(pod, known).iter().filter_map(|jwt| jwt.keys.as_ref()).any(|source| !known.keys.contains_key(source))
}

fn rules<'a>(pod: &'a Pod, known: &Known<'a>) -> Vec<&'a Jwt> {
    let policies = selected(pod, known, |policies| policies.requests.values().map(|p| (p.as_ref(), &p.spec.selector)).collect());
    policies.into_iter().flat_map(|policy| &policy.spec.rules).collect()
}
