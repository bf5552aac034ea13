//! What must hold for any bytes whatsoever. `make fuzz` runs each with bytes that a fuzzer makes up, `make test` with those of `fuzz/corpus/`.
#![allow(dead_code)] // Each fuzz target uses one of them.

use prost::Message;
use std::borrow::Cow;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use weft_api::wire;
use weft_policy::authz::{Engine, Headers, Http, Peer, Request, Verdict};
use weft_policy::explain::explain;
use weft_policy::jwt::{Refusal, Rules, Source};
use weft_policy::path::{Normalization, normalise};
use weft_proxy::detect::{Verdict as Bytes, judge, tls_or_opaque};

/// A check and its name.
pub(crate) type Check = (&'static str, fn(&[u8]));

/// Every check by the name of its folder in `fuzz/corpus/`.
pub(crate) const ALL: &[Check] = &[("detect", detect), ("path", path), ("jwt", jwt), ("policy", policy)];

/// First bytes of connections: the verdict about a beginning is never taken back by what follows (but for a line that is longer than a
/// request line is waited for).
pub(crate) fn detect(input: &[u8]) {
    let Some((&cut, bytes)) = input.split_first() else { return };
    let beginning = &bytes[..bytes.len() * usize::from(cut) / 255];
    for of in [judge, tls_or_opaque] {
        if bytes.is_empty() || beginning.is_empty() {
            continue;
        }
        let (early, late) = (of(beginning), of(bytes));
        if bytes.len() < 4000 && !matches!(early, Bytes::More(_)) {
            assert_eq!(early, late, "{}", bytes.escape_ascii());
        }
    }
}

const MODES: [Normalization; 4] =
    [Normalization::None, Normalization::Base, Normalization::MergeSlashes, Normalization::DecodeAndMergeSlashes];

/// Request targets: the result is in normal form, and normalising it again changes nothing.
pub(crate) fn path(input: &[u8]) {
    let target = String::from_utf8_lossy(input);
    for how in MODES {
        let Ok(once) = normalise(&target, how) else { continue };
        assert!(!once.contains('#'));
        if how == Normalization::None || once == "*" {
            continue;
        }
        let path = once.split('?').next().unwrap_or_default();
        assert!(path.starts_with('/') && !path.contains('\\') && path.is_ascii(), "{target:?} {once:?}");
        let dots = |segment: &str| matches!(segment.split(';').next(), Some("." | ".."));
        assert!(!path.split('/').any(dots), "{target:?} {once:?}");
        assert!(how == Normalization::Base || !path.contains("//"), "{target:?} {once:?}");
        assert_eq!(normalise(&once, how).as_deref(), Ok(&*once), "{target:?}");
    }
}

/// A key set with a key of each kind whose private half nobody has: no token is ever proved by it.
const JWKS: &str = r#"{"keys":[
{"kty":"EC","crv":"P-256","kid":"ec","x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4","y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM"},
{"kty":"OKP","crv":"Ed25519","kid":"ed","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"},
{"kty":"RSA","kid":"rsa","e":"AQAB","n":"0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"}
]}"#;

struct Carrier<'a>(&'a [u8], Cow<'a, str>);

impl Source for Carrier<'_> {
    fn header(&self, _: &str, each: &mut dyn FnMut(&[u8])) {
        each(self.0);
    }

    fn query(&self) -> Option<&str> {
        Some(&self.1)
    }
}

/// Tokens: whatever stands in a header or a query, it proves nothing.
pub(crate) fn jwt(input: &[u8]) {
    let rule = wire::JwtRule { issuer: "https://issuer.example".into(), jwks: JWKS.into(), ..wire::JwtRule::default() };
    let anywhere = wire::JwtRule {
        from_headers: vec![wire::JwtHeader { name: "x-token".into(), prefix: String::new() }],
        from_params: vec!["t".into()],
        from_cookies: vec!["t".into()],
        ..rule.clone()
    };
    let rules = Rules::compile(&[rule.clone(), anywhere]);
    let carrier = Carrier(input, String::from_utf8_lossy(input));
    assert!(!matches!(rules.verify(&carrier, 1_800_000_000), Ok(Some(_))));
    // And whatever stands in a key set: it is read or refused.
    let odd = Rules::compile(&[wire::JwtRule { jwks: String::from_utf8_lossy(input).into(), ..rule }]);
    let token = b"Bearer eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJodHRwczovL2lzc3Vlci5leGFtcGxlIn0.AAAA";
    let verdict = odd.verify(&Carrier(token, Cow::Borrowed("")), 1_800_000_000);
    assert!(!matches!(verdict, Ok(Some(_))) && verdict.err() != Some(Refusal::Form));
}

/// Policies from the wire: compiling and asking them never panics, what decides and what explains agree, and a policy set that can't be
/// understood at all lets nothing through that an empty ALLOW would keep out.
pub(crate) fn policy(input: &[u8]) {
    let Some((&cut, input)) = input.split_first() else { return };
    let (request, config) = input.split_at(input.len() * usize::from(cut) / 255);
    let Ok(inbound) = wire::Inbound::decode(config) else { return };
    let engine = Engine::compile(&inbound.authorization, &["cluster.local".to_owned()]);
    let text = String::from_utf8_lossy(request);
    let mut parts = text.split('\n');
    let mut next = || parts.next().unwrap_or_default();
    let (id, host, method, target, sni) = (next(), next(), next(), next(), next());
    let headers: Vec<(String, String)> = parts
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let Ok(target) = normalise(target, Normalization::Base) else { return };
    let (path, query) = target.split_once('?').map_or((&*target, None), |(path, query)| (path, Some(query)));
    let mut request = Request {
        source: Peer::parse(id),
        source_ip: IpAddr::V4(Ipv4Addr::new(10, 0, 0, cut)),
        remote_ip: IpAddr::V4(Ipv4Addr::new(10, 0, 1, cut)),
        destination: SocketAddr::from(([10, 0, 0, 1], 8080)),
        sni: (!sni.is_empty()).then_some(sni),
        http: Some(Http { method, host: host.as_bytes(), path, query, headers: &headers as &dyn Headers, token: None }),
    };
    for _ in 0..2 {
        let outcome = engine.check(&request);
        assert_eq!(outcome, explain(&engine, &request, None).0);
        if let Verdict::Ask(asked) = outcome.verdict {
            assert_eq!(engine.resume(&request, asked), explain(&engine, &request, Some(asked)).0);
        }
        let (broken, dry) = (engine.policies().iter().any(|p| p.broken.is_some()), engine.policies().iter().any(|p| p.dry_run));
        if broken && !dry && engine.policies().len() == 1 {
            assert!(!matches!(outcome.verdict, Verdict::Allow(_)) || engine.policies()[0].action.as_str() == "AUDIT");
        }
        request.http = None;
    }
    let _ = Rules::compile(&inbound.jwt).rules().len();
}
