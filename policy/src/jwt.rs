//! RequestAuthentication: where tokens are, whether they are genuine, and what they say.
//!
//! Semantics are those of Envoy's filter as Istio configures it. A rule (one issuer) looks for tokens in its places. A request without any token
//! passes and has no request principal. Otherwise one rule must find all tokens in its places valid; the first that does gives the principal.
//! Whether a token is *required* is a matter of [`crate::authz`].
//!
//! Only signatures by public keys count: what a key is for follows from the key, never from the token alone, so a token can't choose to be
//! checked as something weaker; `none` and HMAC don't exist here. Critical header parameters are unknown, so tokens with them are refused. Rules whose key set is
//! absent or unusable refuse every token of their issuer.
//!
//! No clock: the time is an argument.

mod claims;
mod jwks;
mod token;

pub use claims::Claims;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jwks::Jwks;
use std::borrow::Cow;
use token::Token;
use weft_api::wire;

/// Longest token that is looked at, in bytes.
pub const MAX_TOKEN: usize = 32 * 1024;
/// More tokens than this in the places of one rule are refused.
const MAX_TOKENS: usize = 8;
/// Tolerance about times unless a rule says another, in seconds.
const CLOCK_SKEW: u64 = 60;

/// Why a token is refused. The texts are those that users of Envoy know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// Not three parts.
    #[error("Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections")]
    Form,
    /// Longer than [`MAX_TOKEN`].
    #[error("Jwt is too long")]
    TooLong,
    /// More than a few in the places of one rule.
    #[error("Found multiple Jwt tokens")]
    TooMany,
    /// The first part.
    #[error("Jwt header is an invalid Base64url encoded")]
    HeaderBase64,
    /// The first part.
    #[error("Jwt header is an invalid JSON")]
    HeaderJson,
    /// Absent or no string.
    #[error("Jwt header [alg] field is required and must be a string")]
    Algorithm,
    /// Among them `none` and HMAC.
    #[error("Jwt header [alg] is not supported")]
    AlgorithmUnknown,
    /// Not a string.
    #[error("Jwt header [kid] field is not a string")]
    KeyId,
    /// There are critical parameters, and none is understood.
    #[error("Jwt header [crit] is not supported")]
    Critical,
    /// The second part.
    #[error("Jwt payload is an invalid Base64url encoded")]
    PayloadBase64,
    /// The second part.
    #[error("Jwt payload is an invalid JSON")]
    PayloadJson,
    /// Not a string.
    #[error("Jwt payload [iss] field is not a string")]
    Issuer,
    /// Not a string.
    #[error("Jwt payload [sub] field is not a string")]
    Subject,
    /// Not a number of seconds.
    #[error("Jwt payload [iat] field is not an integer")]
    IssuedAt,
    /// Not a number of seconds.
    #[error("Jwt payload [nbf] field is not an integer")]
    NotBefore,
    /// Not a number of seconds.
    #[error("Jwt payload [exp] field is not an integer")]
    Expiry,
    /// Neither a string nor a list of strings.
    #[error("Jwt payload [aud] field is not a string or string list")]
    Audience,
    /// The third part.
    #[error("Jwt signature is an invalid Base64url encoded")]
    SignatureBase64,
    /// No rule knows it.
    #[error("Jwt issuer is not configured")]
    UnknownIssuer,
    /// `nbf` lies ahead.
    #[error("Jwt not yet valid")]
    NotYetValid,
    /// `exp` is past.
    #[error("Jwt is expired")]
    Expired,
    /// None of them is among the rule's.
    #[error("Audiences in Jwt are not allowed")]
    AudienceNotAllowed,
    /// The rule has no usable keys.
    #[error("Jwks doesn't have any valid public key")]
    NoKeys,
    /// None has the token's key id and fits its algorithm.
    #[error("Jwks doesn't have key to match kid or alg from Jwt")]
    NoSuchKey,
    /// It does not fit.
    #[error("Jwt verification fails")]
    Signature,
}

impl Refusal {
    /// The status of the response: 403 for audiences, else 401.
    pub fn status(self) -> u16 {
        if self == Self::AudienceNotAllowed { 403 } else { 401 }
    }
}

/// What a request carries, as far as tokens go.
pub trait Source {
    /// Shows the values of a header field, by its name in lower case, in their order.
    fn header(&self, name: &str, each: &mut dyn FnMut(&[u8]));
    /// The query without the question mark.
    fn query(&self) -> Option<&str>;
}

/// A header that is to be set on the request for the app.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// In lower case.
    pub header: Box<str>,
    /// Visible text.
    pub value: String,
}

/// A token that was found to be genuine, and what follows for the request.
#[derive(Debug)]
pub struct Verified<'a> {
    /// What it says.
    pub claims: Claims,
    /// The rule that it satisfied.
    pub rule: &'a Rule,
}

/// Where a token is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    /// A header's name in lower case and what comes before the token there.
    Header(Box<str>, Box<str>),
    Param(Box<str>),
    Cookie(Box<str>),
}

/// A compiled [`wire::JwtRule`].
#[derive(Debug)]
pub struct Rule {
    /// "namespace/name" of the RequestAuthentication.
    pub policy: Box<str>,
    issuer: Box<str>,
    audiences: Box<[Box<str>]>,
    places: Box<[Place]>,
    keys: Result<Jwks, Box<str>>,
    forward: bool,
    payload_header: Option<Box<str>>,
    /// Header and path to the claim.
    claim_headers: Box<[(Box<str>, Box<str>)]>,
    skew: u64,
    /// Claims that are lists with spaces between, besides those that always are.
    spaced: std::sync::Arc<[Box<str>]>,
}

/// All rules of a workload.
#[derive(Debug, Default)]
pub struct Rules {
    rules: Vec<Rule>,
    outputs: Vec<Box<str>>,
}

impl Rules {
    /// Compiles rules. It can't fail: a rule without usable keys refuses the tokens of its issuer.
    pub fn compile(rules: &[wire::JwtRule]) -> Self {
        let rules: Vec<Rule> = rules.iter().map(Rule::compile).collect();
        let mut outputs: Vec<Box<str>> = rules.iter().flat_map(Rule::outputs).map(Into::into).collect();
        outputs.sort_unstable();
        outputs.dedup();
        Self { rules, outputs }
    }

    /// Whether there is nothing to be done.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// The rules, in the order of the configuration.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// Headers (lower case) that say what tokens say: a client's own must be removed, whatever becomes of its token.
    pub fn outputs(&self) -> &[Box<str>] {
        &self.outputs
    }

    /// Looks for tokens and proves them. `now`: seconds since 1970. `Ok(None)`: the request has none.
    pub fn verify(&self, source: &dyn Source, now: u64) -> Result<Option<Verified<'_>>, Refusal> {
        let mut refusal = None;
        for rule in &self.rules {
            match rule.verify(source, now) {
                Ok(None) => {}
                Ok(Some(claims)) => return Ok(Some(Verified { claims: claims.spaced(&rule.spaced), rule })),
                // Another rule's issuer is the least that can be said about a token.
                Err(Refusal::UnknownIssuer) => refusal = refusal.or(Some(Refusal::UnknownIssuer)),
                Err(why) => refusal = Some(why),
            }
        }
        refusal.map_or(Ok(None), Err)
    }
}

impl Rule {
    fn compile(wire: &wire::JwtRule) -> Self {
        let lower = |name: &str| name.to_ascii_lowercase().into_boxed_str();
        let mut places: Vec<Place> =
            wire.from_headers.iter().map(|header| Place::Header(lower(&header.name), header.prefix.as_str().into())).collect();
        places.extend(wire.from_params.iter().map(|name| Place::Param(name.as_str().into())));
        places.extend(wire.from_cookies.iter().map(|name| Place::Cookie(name.as_str().into())));
        if places.is_empty() {
            places = vec![Place::Header("authorization".into(), "Bearer ".into()), Place::Param("access_token".into())];
        }
        let keys = if wire.jwks.trim().is_empty() {
            Err(if wire.jwks_error.is_empty() { "there is no key set".into() } else { wire.jwks_error.as_str().into() })
        } else {
            Jwks::parse(&wire.jwks).map_err(String::into_boxed_str)
        };
        Self {
            policy: wire.policy.as_str().into(),
            issuer: wire.issuer.as_str().into(),
            audiences: wire.audiences.iter().map(|audience| bare(audience).into()).collect(),
            places: places.into(),
            keys,
            forward: wire.forward_original_token,
            payload_header: (!wire.output_payload_to_header.is_empty()).then(|| lower(&wire.output_payload_to_header)),
            claim_headers: wire.output_claim_to_headers.iter().map(|to| (lower(&to.header), to.claim.as_str().into())).collect(),
            spaced: wire.space_delimited_claims.iter().map(|claim| claim.as_str().into()).collect(),
            skew: if wire.clock_skew_seconds == 0 { CLOCK_SKEW } else { u64::from(wire.clock_skew_seconds) },
        }
    }

    /// Why the rule has no usable keys, if so: for whoever lists what is in force.
    pub fn keys_error(&self) -> Option<&str> {
        self.keys.as_ref().err().map(|why| &**why)
    }

    /// Whose tokens it proves.
    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    fn outputs(&self) -> impl Iterator<Item = &str> {
        self.payload_header.iter().map(|name| &**name).chain(self.claim_headers.iter().map(|(header, _)| &**header))
    }

    /// The headers for the app that a token of this rule asks for.
    pub fn output(&self, claims: &Claims) -> Vec<Output> {
        let mut out = Vec::new();
        if let Some(header) = &self.payload_header {
            out.push(Output { header: header.clone(), value: claims.encoded().into() });
        }
        for (header, claim) in &self.claim_headers {
            if let Some(value) = claims.printable(claim) {
                out.push(Output { header: header.clone(), value });
            }
        }
        out
    }

    /// Header fields in which the token was looked for and which the app must not see (unless it is to have the token).
    pub fn consumed_headers(&self) -> impl Iterator<Item = &str> {
        self.places.iter().filter(|_| !self.forward).filter_map(|place| match place {
            Place::Header(name, _) => Some(&**name),
            Place::Param(_) | Place::Cookie(_) => None,
        })
    }

    /// `Ok(None)`: nothing is in the rule's places.
    fn verify(&self, source: &dyn Source, now: u64) -> Result<Option<Claims>, Refusal> {
        let mut first = None;
        for text in self.tokens(source)? {
            let claims = self.check(&text, now)?;
            first = first.or(Some(claims));
        }
        Ok(first)
    }

    fn tokens(&self, source: &dyn Source) -> Result<Vec<String>, Refusal> {
        let mut found: Vec<String> = Vec::new();
        let mut take = |token: &[u8]| found.push(String::from_utf8_lossy(token).into_owned());
        for place in &self.places {
            match place {
                Place::Header(name, prefix) => source.header(name, &mut |value| {
                    if prefix.is_empty() {
                        take(value);
                    } else if let Some(at) = find(value, prefix.as_bytes()) {
                        take(word(&value[at + prefix.len()..]));
                    }
                }),
                Place::Param(name) => {
                    for pair in source.query().unwrap_or_default().split('&') {
                        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                        if decoded(key) == name.as_bytes() {
                            take(&decoded(value));
                        }
                    }
                }
                Place::Cookie(name) => source.header("cookie", &mut |value| {
                    for pair in value.split(|byte| *byte == b';') {
                        let pair = pair.trim_ascii();
                        if let Some(token) = pair.strip_prefix(name.as_bytes()).and_then(|rest| rest.strip_prefix(b"=")) {
                            take(token.strip_prefix(b"\"").and_then(|token| token.strip_suffix(b"\"")).unwrap_or(token));
                        }
                    }
                }),
            }
        }
        if found.len() > MAX_TOKENS { Err(Refusal::TooMany) } else { Ok(found) }
    }

    /// In Envoy's order: form, issuer, times, audiences, and only then the costly signature.
    fn check(&self, text: &str, now: u64) -> Result<Claims, Refusal> {
        let token = Token::parse(text)?;
        if token.claims.issuer() != Some(&*self.issuer) {
            return Err(Refusal::UnknownIssuer);
        }
        token.in_time(now, self.skew)?;
        let allowed = |audience: &str| self.audiences.iter().any(|allowed| **allowed == *bare(audience));
        if !self.audiences.is_empty() && !token.claims.audiences().any(allowed) {
            return Err(Refusal::AudienceNotAllowed);
        }
        let keys = self.keys.as_ref().map_err(|_| Refusal::NoKeys)?;
        keys.verify(token.key_id.as_deref(), token.algorithm, token.signed.as_bytes(), &token.signature)?;
        Ok(token.claims)
    }
}

/// An audience without scheme and slash at the end, which Envoy takes for the same.
fn bare(audience: &str) -> &str {
    let audience = audience.strip_prefix("https://").or_else(|| audience.strip_prefix("http://")).unwrap_or(audience);
    audience.strip_suffix('/').unwrap_or(audience)
}

fn find(text: &[u8], part: &[u8]) -> Option<usize> {
    text.windows(part.len()).position(|window| window == part)
}

/// The characters that a token may have, up to the first other one.
fn word(text: &[u8]) -> &[u8] {
    let text = text.trim_ascii_start();
    let end = text.iter().position(|byte| !(byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'=')));
    &text[..end.unwrap_or(text.len())]
}

/// Of a query: percent-encoding undone. What is no valid escape stays.
fn decoded(text: &str) -> Cow<'_, [u8]> {
    if !text.contains('%') {
        return Cow::Borrowed(text.as_bytes());
    }
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let digits = bytes.get(at + 1..at + 3).filter(|_| *byte == b'%');
        let digits = digits.and_then(|digits| std::str::from_utf8(digits).ok()).filter(|d| !d.starts_with('+'));
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(value) => {
                out.push(value);
                at += 3;
            }
            None => {
                out.push(*byte);
                at += 1;
            }
        }
    }
    Cow::Owned(out)
}

/// Base64url without padding; padding, which some issuers add, is taken too.
fn base64url(text: &str) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')).ok()
}

/// The `www-authenticate` field of a refusal: `uri` is that of the request, cut to 256 bytes as Envoy does.
pub fn challenge(uri: &str) -> String {
    let cut = (0..=uri.len().min(256)).rev().find(|at| uri.is_char_boundary(*at)).unwrap_or(0);
    let uri: String = uri[..cut].chars().filter(|c| !matches!(c, '"' | '\\') && !c.is_control()).collect();
    format!("Bearer realm=\"{uri}\", error=\"invalid_token\"")
}

#[cfg(test)]
mod tests;
