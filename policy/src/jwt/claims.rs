//! What a verified token says, and how policies look at it.

use serde_json::{Map, Value};
use std::sync::Arc;

/// Claims whose text is a list with spaces between (RFC 6749 and what Istio treats alike).
const SPACED: [&str; 2] = ["scope", "permission"];

/// The payload of a token.
#[derive(Clone, Debug, PartialEq)]
pub struct Claims {
    all: Map<String, Value>,
    principal: Option<Box<str>>,
    encoded: Box<str>,
    /// Further claims (at the top) that are lists with spaces between.
    spaced: Arc<[Box<str>]>,
}

impl Claims {
    /// From the payload and its base64url form.
    pub(super) fn new(all: Map<String, Value>, encoded: &str) -> Self {
        let text = |name: &str| all.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
        let principal = text("iss").zip(text("sub")).map(|(issuer, subject)| format!("{issuer}/{subject}").into());
        Self { principal, encoded: encoded.into(), all, spaced: Arc::default() }
    }

    /// The rule that verified the token says which claims are lists with spaces between (`spaceDelimitedClaims`).
    pub(super) fn spaced(self, spaced: &Arc<[Box<str>]>) -> Self {
        Self { spaced: Arc::clone(spaced), ..self }
    }

    fn is_spaced(&self, claim: &str) -> bool {
        SPACED.contains(&claim) || self.spaced.iter().any(|other| **other == *claim)
    }

    /// As if a token with this payload had been verified: for questions that people ask by hand, and tests.
    pub fn assumed(all: Map<String, Value>) -> Self {
        use base64::Engine as _;
        let encoded = super::URL_SAFE_NO_PAD.encode(Value::Object(all.clone()).to_string());
        Self::new(all, &encoded)
    }

    /// "issuer/subject"; `None` if either is absent or empty.
    pub fn principal(&self) -> Option<&str> {
        self.principal.as_deref()
    }

    /// `iss`.
    pub fn issuer(&self) -> Option<&str> {
        self.all.get("iss").and_then(Value::as_str)
    }

    /// `azp`.
    pub fn presenter(&self) -> Option<&str> {
        self.all.get("azp").and_then(Value::as_str)
    }

    /// `aud`, a text or a list of texts.
    pub fn audiences(&self) -> impl Iterator<Item = &str> {
        let (one, many) = match self.all.get("aud") {
            Some(Value::String(one)) => (Some(one.as_str()), None),
            Some(Value::Array(many)) => (None, Some(many)),
            _ => (None, None),
        };
        one.into_iter().chain(many.into_iter().flatten().filter_map(Value::as_str))
    }

    /// All claims.
    pub fn all(&self) -> &Map<String, Value> {
        &self.all
    }

    /// The payload as it stood in the token, base64url.
    pub fn encoded(&self) -> &str {
        &self.encoded
    }

    /// Shows each text at a claim: the claim's own, or those of its list. Numbers and truth values are no texts.
    pub(crate) fn each_text(&self, path: &[Box<str>], each: &mut dyn FnMut(&str)) {
        let Some((first, rest)) = path.split_first() else { return };
        let mut value = self.all.get(&**first);
        for part in rest {
            value = value.and_then(|value| value.get(&**part));
        }
        match value {
            Some(Value::String(text)) if rest.is_empty() && self.is_spaced(first) => {
                text.split(' ').filter(|word| !word.is_empty()).for_each(each);
            }
            Some(Value::String(text)) => each(text),
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).for_each(each),
            _ => {}
        }
    }

    /// A claim ("sub", "a.b") as the value of a header: texts, numbers and truth values. `None`: it is absent, empty, of another kind, or holds
    /// what a header can't.
    pub(super) fn printable(&self, claim: &str) -> Option<String> {
        let value = match self.all.get(claim) {
            // A claim whose name has dots goes before a nested one.
            Some(value) => value,
            None => {
                let mut parts = claim.split('.');
                let first = self.all.get(parts.next()?)?;
                parts.try_fold(first, |value, part| value.get(part))?
            }
        };
        let text = match value {
            Value::String(text) => text.clone(),
            Value::Bool(_) | Value::Number(_) => value.to_string(),
            _ => return None,
        };
        (!text.is_empty() && text.bytes().all(|byte| byte == b'\t' || byte >= b' ' && byte != 0x7f)).then_some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_may_say_that_more_claims_are_lists_with_spaces() {
        let all = serde_json::json!({"roles": "admin dev", "scope": "a b", "other": "c d"});
        let Value::Object(all) = all else { unreachable!() };
        let texts = |claims: &Claims, name: &str| {
            let mut texts = Vec::new();
            claims.each_text(&[name.into()], &mut |text| texts.push(text.to_owned()));
            texts
        };
        let plain = Claims::assumed(all);
        assert_eq!(texts(&plain, "roles"), ["admin dev"]);
        let told = plain.spaced(&Arc::from([Box::from("roles")]));
        assert_eq!(
            (texts(&told, "roles"), texts(&told, "scope")),
            (vec!["admin".into(), "dev".into()], vec!["a".into(), "b".into()])
        );
        assert_eq!(texts(&told, "other"), ["c d"]);
    }
}
