use super::*;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{self as sig, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, RsaKeyPair};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::LazyLock;

const NOW: u64 = 1_700_000_000;

fn b64(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

struct Keys {
    rsa: RsaKeyPair,
    p256: EcdsaKeyPair,
    p384: EcdsaKeyPair,
    p521: EcdsaKeyPair,
    ed: Ed25519KeyPair,
}

static KEYS: LazyLock<Keys> = LazyLock::new(|| Keys {
    rsa: RsaKeyPair::generate(KeySize::Rsa2048).unwrap(),
    p256: EcdsaKeyPair::generate(&sig::ECDSA_P256_SHA256_FIXED_SIGNING).unwrap(),
    p384: EcdsaKeyPair::generate(&sig::ECDSA_P384_SHA384_FIXED_SIGNING).unwrap(),
    p521: EcdsaKeyPair::generate(&sig::ECDSA_P521_SHA512_FIXED_SIGNING).unwrap(),
    ed: Ed25519KeyPair::generate().unwrap(),
});

fn ec(pair: &EcdsaKeyPair, crv: &str, kid: &str) -> Value {
    let point = &pair.public_key().as_ref()[1..];
    let (x, y) = point.split_at(point.len() / 2);
    json!({"kty": "EC", "crv": crv, "x": b64(x), "y": b64(y), "kid": kid})
}

fn jwks() -> String {
    let keys = &*KEYS;
    // DER of RFC 8017: the modulus, then 3 bytes of exponent behind their tag and length.
    let public = keys.rsa.public_key().as_ref();
    let (n, e) = public.split_at(public.len() - 5);
    let (n, e) = (&n[n.len() - keys.rsa.public_modulus_len()..], &e[2..]);
    let mut ed = json!({"kty": "OKP", "crv": "Ed25519", "kid": "ed"});
    ed["x"] = b64(keys.ed.public_key().as_ref()).into();
    json!({"keys": [
        {"kty": "RSA", "n": b64(n), "e": b64(e), "kid": "rsa"},
        ec(&keys.p256, "P-256", "p256"), ec(&keys.p384, "P-384", "p384"), ec(&keys.p521, "P-521", "p521"), ed,
        {"kty": "oct", "k": "c2VjcmV0", "kid": "secret"},
        {"kty": "RSA", "n": "AQAB", "e": "AQAB", "kid": "short"},
    ]})
    .to_string()
}

fn sign(alg: &str, signed: &[u8]) -> Vec<u8> {
    let rng = SystemRandom::new();
    let keys = &*KEYS;
    let rsa = |how: &'static dyn sig::RsaEncoding| {
        let mut out = vec![0; keys.rsa.public_modulus_len()];
        keys.rsa.sign(how, &rng, signed, &mut out).unwrap();
        out
    };
    match alg {
        "RS256" => rsa(&sig::RSA_PKCS1_SHA256),
        "RS384" => rsa(&sig::RSA_PKCS1_SHA384),
        "RS512" => rsa(&sig::RSA_PKCS1_SHA512),
        "PS256" => rsa(&sig::RSA_PSS_SHA256),
        "PS384" => rsa(&sig::RSA_PSS_SHA384),
        "PS512" => rsa(&sig::RSA_PSS_SHA512),
        "ES256" => keys.p256.sign(&rng, signed).unwrap().as_ref().to_vec(),
        "ES384" => keys.p384.sign(&rng, signed).unwrap().as_ref().to_vec(),
        "ES512" => keys.p521.sign(&rng, signed).unwrap().as_ref().to_vec(),
        _ => keys.ed.sign(signed).as_ref().to_vec(),
    }
}

fn token_with(header: &Value, claims: &Value) -> String {
    let signed = format!("{}.{}", b64(header.to_string()), b64(claims.to_string()));
    let signature = sign(header["alg"].as_str().unwrap_or_default(), signed.as_bytes());
    format!("{signed}.{}", b64(signature))
}

fn token(claims: &Value) -> String {
    token_with(&json!({"alg": "ES256", "kid": "p256"}), claims)
}

fn rule() -> wire::JwtRule {
    wire::JwtRule { issuer: "iss".into(), jwks: jwks(), policy: "n/p".into(), ..Default::default() }
}

#[derive(Default)]
struct Asked {
    headers: Vec<(&'static str, String)>,
    query: Option<String>,
}

impl Source for Asked {
    fn header(&self, name: &str, each: &mut dyn FnMut(&[u8])) {
        self.headers.iter().filter(|(n, _)| *n == name).for_each(|(_, value)| each(value.as_bytes()));
    }

    fn query(&self) -> Option<&str> {
        self.query.as_deref()
    }
}

fn bearer(token: &str) -> Asked {
    Asked { headers: vec![("authorization", format!("Bearer {token}"))], query: None }
}

fn verify(rules: &[wire::JwtRule], asked: &Asked) -> Result<Option<String>, Refusal> {
    let rules = Rules::compile(rules);
    rules.verify(asked, NOW).map(|verified| verified.map(|v| v.claims.principal().unwrap_or_default().to_owned()))
}

fn good() -> Value {
    json!({"iss": "iss", "sub": "me", "exp": NOW + 100, "nbf": NOW - 100, "iat": NOW - 100})
}

#[test]
fn every_algorithm() {
    let kids = [("RS256", "rsa"), ("RS384", "rsa"), ("RS512", "rsa"), ("PS256", "rsa"), ("PS384", "rsa"), ("PS512", "rsa")];
    let more = [("ES256", "p256"), ("ES384", "p384"), ("ES512", "p521"), ("EdDSA", "ed")];
    for (alg, kid) in kids.into_iter().chain(more) {
        for header in [json!({"alg": alg, "kid": kid}), json!({"alg": alg})] {
            let token = token_with(&header, &good());
            assert_eq!(verify(&[rule()], &bearer(&token)), Ok(Some("iss/me".into())), "{header}");
            // Any change of the claims shows.
            let parts: Vec<&str> = token.split('.').collect();
            let forged = format!("{}.{}.{}", parts[0], b64(json!({"iss": "iss", "sub": "root"}).to_string()), parts[2]);
            assert_eq!(verify(&[rule()], &bearer(&forged)), Err(Refusal::Signature), "{header}");
        }
        // A key of another kind does not check it.
        let other = if kid == "p256" { "rsa" } else { "p256" };
        let token = token_with(&json!({"alg": alg, "kid": other}), &good());
        assert_eq!(verify(&[rule()], &bearer(&token)), Err(Refusal::NoSuchKey), "{alg}");
    }
}

#[test]
fn weak_algorithms_do_not_exist() {
    for alg in ["none", "None", "HS256", "HS512", "rs256", ""] {
        let header = json!({"alg": alg});
        let signed = format!("{}.{}", b64(header.to_string()), b64(good().to_string()));
        // As an attacker would: keyed with the public key's own text.
        let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, jwks().as_bytes());
        let token = format!("{signed}.{}", b64(aws_lc_rs::hmac::sign(&key, signed.as_bytes())));
        assert_eq!(verify(&[rule()], &bearer(&token)), Err(Refusal::AlgorithmUnknown), "{alg}");
    }
    let unsigned = format!("{}.{}.", b64(r#"{"alg":"none"}"#), b64(good().to_string()));
    assert_eq!(verify(&[rule()], &bearer(&unsigned)), Err(Refusal::Form));
}

#[test]
fn what_is_refused() {
    let with = |name: &str, value: Value| {
        let mut claims = good();
        claims[name] = value;
        token(&claims)
    };
    let header = |header: Value| token_with(&header, &good());
    let cases = [
        (with("exp", json!(NOW - 61)), Refusal::Expired),
        (with("exp", json!(0)), Refusal::Expired),
        (with("nbf", json!(NOW + 61)), Refusal::NotYetValid),
        (with("exp", json!("soon")), Refusal::Expiry),
        (with("exp", json!(-1)), Refusal::Expiry),
        (with("nbf", json!([])), Refusal::NotBefore),
        (with("iat", json!("x")), Refusal::IssuedAt),
        (with("iss", json!("other")), Refusal::UnknownIssuer),
        (with("iss", json!(1)), Refusal::Issuer),
        (with("sub", json!(1)), Refusal::Subject),
        (with("aud", json!(1)), Refusal::Audience),
        (with("aud", json!(["a", 1])), Refusal::Audience),
        (header(json!({"alg": "ES256", "kid": "none of them"})), Refusal::NoSuchKey),
        (header(json!({"alg": "ES256", "kid": 1})), Refusal::KeyId),
        (header(json!({"alg": 1})), Refusal::Algorithm),
        (header(json!({"kid": "p256"})), Refusal::Algorithm),
        (header(json!({"alg": "ES256", "crit": ["b64"], "b64": false})), Refusal::Critical),
        (header(json!({"alg": "ES256", "crit": []})), Refusal::Critical),
        ("a.b".into(), Refusal::Form),
        ("a.b.c.d.e".into(), Refusal::Form),
        (".b.c".into(), Refusal::Form),
        (String::new(), Refusal::Form),
        (format!("{}.b.c", b64("[]")), Refusal::HeaderJson),
        (format!("a.{}.c", b64("{}")), Refusal::HeaderBase64),
        (format!("{}.a.c", b64(r#"{"alg":"ES256"}"#)), Refusal::PayloadBase64),
        (format!("{}.{}.c", b64(r#"{"alg":"ES256"}"#), b64("1")), Refusal::PayloadJson),
        (format!("{}.{}.c", b64(r#"{"alg":"ES256"}"#), b64("{}")), Refusal::SignatureBase64),
        ("a".repeat(MAX_TOKEN + 1), Refusal::TooLong),
    ];
    for (token, why) in cases {
        assert_eq!(verify(&[rule()], &bearer(&token)), Err(why), "{token}");
    }
    // Within the tolerance.
    for token in [with("exp", json!(NOW - 60)), with("nbf", json!(NOW + 60)), with("exp", json!(NOW as f64 + 0.5))] {
        assert!(verify(&[rule()], &bearer(&token)).is_ok());
    }
    let strict = wire::JwtRule { clock_skew_seconds: 5, ..rule() };
    assert_eq!(verify(&[strict], &bearer(&with("exp", json!(NOW - 6)))), Err(Refusal::Expired));
}

#[test]
fn audiences() {
    let rule = wire::JwtRule { audiences: vec!["https://a.b/".into(), "c".into()], ..rule() };
    for (aud, good) in [
        (json!("c"), true),
        (json!(["x", "c"]), true),
        (json!("a.b"), true),
        (json!("http://a.b"), true),
        (json!("x"), false),
        (json!([]), false),
        (Value::Null, false),
    ] {
        let mut claims = json!({"iss": "iss", "sub": "me"});
        if !aud.is_null() {
            claims["aud"] = aud.clone();
        }
        let result = verify(std::slice::from_ref(&rule), &bearer(&token(&claims)));
        assert_eq!(result, if good { Ok(Some("iss/me".into())) } else { Err(Refusal::AudienceNotAllowed) }, "{aud}");
    }
    assert_eq!((Refusal::AudienceNotAllowed.status(), Refusal::Expired.status()), (403, 401));
}

#[test]
fn places() {
    let token = token(&good());
    let none: Result<Option<String>, Refusal> = Ok(None);
    let mut param = Asked { query: Some(format!("x=1&access_token={token}")), ..Default::default() };
    assert_eq!(verify(&[rule()], &param), Ok(Some("iss/me".into())));
    assert_eq!(verify(&[rule()], &Asked::default()), none);
    // Other schemes are no tokens.
    assert_eq!(verify(&[rule()], &Asked { headers: vec![("authorization", "Basic eA==".into())], query: None }), none);
    // All that are there must be good.
    param.headers = vec![("authorization", "Bearer x.y.z".into())];
    assert!(verify(&[rule()], &param).is_err());
    let twice = Asked {
        headers: vec![("authorization", format!("Bearer {token}")), ("authorization", "Bearer a.b".into())],
        query: None,
    };
    assert_eq!(verify(&[rule()], &twice), Err(Refusal::Form));

    let elsewhere = wire::JwtRule {
        from_headers: vec![wire::JwtHeader { name: "X-Jwt".into(), prefix: String::new() }],
        from_params: vec!["t".into()],
        from_cookies: vec!["c".into()],
        ..rule()
    };
    let elsewhere = std::slice::from_ref(&elsewhere);
    assert_eq!(verify(elsewhere, &bearer("nonsense")), none);
    for asked in [
        Asked { headers: vec![("x-jwt", token.clone())], query: None },
        Asked { headers: vec![("cookie", format!("a=b; c={token}; d=e"))], query: None },
        Asked { headers: vec![], query: Some(format!("t={}", token.replace('.', "%2E"))) },
    ] {
        assert_eq!(verify(elsewhere, &asked), Ok(Some("iss/me".into())));
    }
    let many = Asked { headers: (0..9).map(|_| ("x-jwt", token.clone())).collect(), query: None };
    assert_eq!(verify(elsewhere, &many), Err(Refusal::TooMany));
}

#[test]
fn several_rules() {
    let other = wire::JwtRule { issuer: "other".into(), ..rule() };
    let mine = bearer(&token(&good()));
    for rules in [[rule(), other.clone()], [other.clone(), rule()]] {
        assert_eq!(verify(&rules, &mine), Ok(Some("iss/me".into())));
        let stranger = bearer(&token(&json!({"iss": "stranger", "sub": "me"})));
        assert_eq!(verify(&rules, &stranger), Err(Refusal::UnknownIssuer));
        // What is wrong with it counts more than that others don't know its issuer.
        let expired = bearer(&token(&json!({"iss": "iss", "sub": "me", "exp": 1})));
        assert_eq!(verify(&rules, &expired), Err(Refusal::Expired));
    }
}

#[test]
fn key_sets_that_are_no_use_refuse() {
    for jwks in ["", " ", "{", "{}", r#"{"keys":[]}"#, r#"{"keys":[{"kty":"oct","k":"YQ"}]}"#, r#"{"keys":{}}"#] {
        let rule = wire::JwtRule { jwks: jwks.into(), ..rule() };
        assert!(Rules::compile(std::slice::from_ref(&rule)).rules()[0].keys_error().is_some(), "{jwks}");
        assert_eq!(verify(&[rule], &bearer(&token(&good()))), Err(Refusal::NoKeys), "{jwks}");
    }
    // A key for encryption, or for one other algorithm, checks nothing.
    for (name, value, why) in
        [("use", "enc", Refusal::NoKeys), ("alg", "ES384", Refusal::NoSuchKey), ("alg", "RSA-OAEP", Refusal::NoKeys)]
    {
        let mut key = ec(&KEYS.p256, "P-256", "p256");
        key[name] = value.into();
        let rule = wire::JwtRule { jwks: json!({"keys": [key]}).to_string(), ..rule() };
        assert_eq!(verify(&[rule], &bearer(&token(&good()))), Err(why), "{name}: {value}");
    }
}

#[test]
fn outputs() {
    let rule = wire::JwtRule {
        output_payload_to_header: "X-Payload".into(),
        output_claim_to_headers: [("X-Sub", "sub"), ("X-N", "a.n"), ("X-Bad", "bad"), ("X-None", "none"), ("X-List", "list")]
            .map(|(header, claim)| wire::ClaimToHeader { header: header.into(), claim: claim.into() })
            .into(),
        ..rule()
    };
    let rules = Rules::compile(&[rule]);
    assert_eq!(rules.outputs().len(), 6);
    let claims = json!({"iss": "iss", "sub": "me", "a": {"n": 7}, "bad": "x\r\ny: z", "list": ["a"]});
    let asked = bearer(&token(&claims));
    let verified = rules.verify(&asked, NOW).unwrap().unwrap();
    let output = verified.rule.output(&verified.claims);
    let names: Vec<&str> = output.iter().map(|out| &*out.header).collect();
    assert_eq!(names, ["x-payload", "x-sub", "x-n"]);
    assert_eq!((output[0].value.as_str(), output[2].value.as_str()), (b64(claims.to_string()).as_str(), "7"));
    assert_eq!(verified.rule.consumed_headers().collect::<Vec<_>>(), ["authorization"]);
}

#[test]
fn the_challenge_can_not_be_broken_out_of() {
    assert_eq!(challenge("http://h/a\"b\\\r\nx"), "Bearer realm=\"http://h/abx\", error=\"invalid_token\"");
    assert!(challenge(&"ä".repeat(400)).len() < 300);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_500))]

    #[test]
    fn nothing_that_anyone_writes_passes_or_panics(text in any::<String>(), parts in prop::collection::vec(any::<String>(), 3)) {
        static RULES: LazyLock<Rules> = LazyLock::new(|| Rules::compile(&[rule()]));
        let encoded = parts.iter().map(b64).collect::<Vec<_>>().join(".");
        for token in [&text, &encoded] {
            prop_assert!(!matches!(RULES.verify(&bearer(token), NOW), Ok(Some(_))));
        }
        let query = Asked { query: Some(text.clone()), ..Default::default() };
        prop_assert!(!matches!(RULES.verify(&query, NOW), Ok(Some(_))));
        challenge(&text);
        let rules = Rules::compile(&[wire::JwtRule { jwks: text, ..Default::default() }]);
        prop_assert!(rules.rules()[0].keys_error().is_some());
    }

    #[test]
    fn a_good_token_with_one_byte_changed_is_refused(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        static GOOD: LazyLock<(Rules, String)> = LazyLock::new(|| (Rules::compile(&[rule()]), token(&good())));
        let mut changed = GOOD.1.clone().into_bytes();
        let at = at.index(changed.len());
        changed[at] = byte;
        let changed = String::from_utf8_lossy(&changed).into_owned();
        // The bearer's word ends where a character is none of a token's; the rest does not count then.
        prop_assume!(changed != GOOD.1);
        prop_assert!(!matches!(GOOD.0.verify(&bearer(&changed), NOW), Ok(Some(_))));
    }
}
