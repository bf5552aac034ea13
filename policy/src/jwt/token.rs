//! A token taken apart. Nothing in it is believed yet.

use super::claims::Claims;
use super::jwks::Algorithm;
use super::{MAX_TOKEN, Refusal, base64url};
use serde_json::{Map, Value};

/// The parts of a JWS in compact form.
#[derive(Debug)]
pub(super) struct Token<'a> {
    pub(super) algorithm: Algorithm,
    pub(super) key_id: Option<String>,
    pub(super) claims: Claims,
    /// Header and payload as they were signed.
    pub(super) signed: &'a str,
    pub(super) signature: Vec<u8>,
    not_before: Option<f64>,
    expiry: Option<f64>,
}

impl<'a> Token<'a> {
    pub(super) fn parse(text: &'a str) -> Result<Self, Refusal> {
        if text.len() > MAX_TOKEN {
            return Err(Refusal::TooLong);
        }
        let mut parts = text.split('.');
        let (Some(header), Some(payload), Some(signature), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(Refusal::Form);
        };
        if header.is_empty() || payload.is_empty() || signature.is_empty() {
            return Err(Refusal::Form);
        }
        let signed = &text[..header.len() + 1 + payload.len()];
        let fields = object(&base64url(header).ok_or(Refusal::HeaderBase64)?).ok_or(Refusal::HeaderJson)?;
        let algorithm = fields.get("alg").and_then(Value::as_str).ok_or(Refusal::Algorithm)?;
        let algorithm = Algorithm::by_name(algorithm).ok_or(Refusal::AlgorithmUnknown)?;
        if fields.contains_key("crit") {
            return Err(Refusal::Critical);
        }
        let key_id = match fields.get("kid") {
            None => None,
            Some(Value::String(id)) => Some(id.clone()).filter(|id| !id.is_empty()),
            Some(_) => return Err(Refusal::KeyId),
        };
        let all = object(&base64url(payload).ok_or(Refusal::PayloadBase64)?).ok_or(Refusal::PayloadJson)?;
        for (name, refusal) in [("iss", Refusal::Issuer), ("sub", Refusal::Subject)] {
            if all.get(name).is_some_and(|value| !value.is_string()) {
                return Err(refusal);
            }
        }
        let seconds = |name: &str, refusal: Refusal| match all.get(name) {
            None => Ok(None),
            Some(value) => value.as_f64().filter(|seconds| seconds.is_finite() && *seconds >= 0.0).map(Some).ok_or(refusal),
        };
        seconds("iat", Refusal::IssuedAt)?;
        let not_before = seconds("nbf", Refusal::NotBefore)?;
        let expiry = seconds("exp", Refusal::Expiry)?;
        match all.get("aud") {
            None | Some(Value::String(_)) => {}
            Some(Value::Array(list)) if list.iter().all(Value::is_string) => {}
            Some(_) => return Err(Refusal::Audience),
        }
        let signature = base64url(signature).ok_or(Refusal::SignatureBase64)?;
        Ok(Self {
            algorithm,
            key_id,
            claims: Claims::new(all, payload.trim_end_matches('=')),
            signed,
            signature,
            not_before,
            expiry,
        })
    }

    /// Checks `nbf` and `exp`, where they are there.
    pub(super) fn in_time(&self, now: u64, skew: u64) -> Result<(), Refusal> {
        let (now, skew) = (now as f64, skew as f64);
        if self.not_before.is_some_and(|from| now + skew < from) {
            return Err(Refusal::NotYetValid);
        }
        if self.expiry.is_some_and(|until| now > until + skew) {
            return Err(Refusal::Expired);
        }
        Ok(())
    }
}

fn object(json: &[u8]) -> Option<Map<String, Value>> {
    serde_json::from_slice(json).ok()
}
