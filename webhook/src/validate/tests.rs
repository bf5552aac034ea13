//! One line a rule: a spec (YAML), then the path and words of each error, or of each warning.

use super::*;
use proptest::prelude::*;
use serde_json::json;
use std::collections::BTreeMap;

mod doubts;
mod errors;

pub(super) const AUTHORIZATION: Kind = Kind::AuthorizationPolicy;
pub(super) const PEER: Kind = Kind::PeerAuthentication;
pub(super) const REQUEST: Kind = Kind::RequestAuthentication;

pub(super) fn object(kind: Kind, spec: &str) -> Value {
    let spec = crate::yaml::read(spec).unwrap_or_else(|e| panic!("{spec}: {e}"));
    json!({"apiVersion": "security.istio.io/v1", "kind": kind.as_str(), "metadata": {"name": "p", "namespace": "shop"}, "spec": spec})
}

fn check(rows: &[(&str, &str)], found: impl Fn(&str) -> Vec<Problem>) {
    for (spec, expected) in rows {
        let found: Vec<String> = found(spec).iter().map(ToString::to_string).collect();
        let expected: Vec<&str> = expected.split(" | ").filter(|e| !e.is_empty()).collect();
        assert_eq!(found.len(), expected.len(), "{spec}\n{found:#?}");
        for (found, expected) in found.iter().zip(expected) {
            // `path … words`: the path to the letter, the words somewhere.
            let (path, words) = expected.split_once(" … ").unwrap_or((expected, ""));
            assert!(
                found.starts_with(&format!("{path}: ")) && found.contains(words),
                "{spec}\nfound    {found}\nexpected {expected}"
            );
        }
    }
}

/// Each row: a spec and its errors; none: it is valid.
pub(super) fn errors(kind: Kind, rows: &[(&str, &str)]) {
    check(rows, |spec| validate(kind, &object(kind, spec), &Nothing).errors);
}

/// Each row: a valid spec and its warnings.
pub(super) fn warnings(kind: Kind, around: &dyn Surroundings, rows: &[(&str, &str)]) {
    check(rows, |spec| {
        let verdict = validate(kind, &object(kind, spec), around);
        assert_eq!(verdict.errors, [], "{spec}");
        verdict.warnings
    });
}

#[test]
fn the_kind_is_told_from_group_and_kind() {
    let of = |version: &str, kind: &str| Kind::of(&json!({"apiVersion": version, "kind": kind}));
    assert_eq!(of("security.istio.io/v1beta1", "PeerAuthentication"), Some(PEER));
    assert_eq!(of("security.istio.io/v7", "RequestAuthentication"), Some(REQUEST));
    assert_eq!(of("security.istio.io", "PeerAuthentication"), None);
    assert_eq!(of("other/v1", "PeerAuthentication"), None);
    assert_eq!(of("security.istio.io/v1", "Pod"), None);
}

fn scalar() -> impl Strategy<Value = Value> {
    let words = [
        "",
        "*",
        "a",
        "GET",
        "get",
        "DENY",
        "ALLOW",
        "CUSTOM",
        "STRICT",
        "10.0.0.0/8",
        "10.0.0.0/99",
        "8080",
        "0",
        "/a/{*}",
        "/{**}/{*}",
        "é*é",
        "cluster.local/ns/shop/sa/web",
        "spiffe://x",
        "source.ip",
        "request.headers[x]",
        "request.auth.claims[a][b]",
        "source.principal",
        "https://a/b",
        "http://169.254.1.1/",
        "{\"keys\":[{\"kty\":\"RSA\"}]}",
        "5s",
        "true",
        "a/b/c",
        "request.headers[",
        "[",
        "destination.port",
    ];
    prop_oneof![
        4 => proptest::sample::select(words.to_vec()).prop_map(Value::from),
        1 => "\\PC{0,12}".prop_map(Value::from),
        1 => any::<i64>().prop_map(Value::from),
        1 => any::<bool>().prop_map(Value::from),
        1 => Just(Value::Null),
    ]
}

fn name() -> impl Strategy<Value = String> {
    let names = [
        "spec",
        "metadata",
        "selector",
        "matchLabels",
        "targetRef",
        "targetRefs",
        "rules",
        "action",
        "provider",
        "name",
        "from",
        "to",
        "when",
        "source",
        "operation",
        "principals",
        "notPrincipals",
        "namespaces",
        "serviceAccounts",
        "ipBlocks",
        "trustDomains",
        "hosts",
        "ports",
        "methods",
        "paths",
        "notPaths",
        "key",
        "values",
        "notValues",
        "mtls",
        "mode",
        "portLevelMtls",
        "8080",
        "99999",
        "jwtRules",
        "issuer",
        "jwks",
        "jwksUri",
        "jwks_uri",
        "fromHeaders",
        "outputClaimToHeaders",
        "header",
        "claim",
        "timeout",
        "annotations",
        "istio.io/dry-run",
        "kind",
        "apiVersion",
        "audiences",
    ];
    prop_oneof![6 => proptest::sample::select(names.to_vec()).prop_map(str::to_owned), 1 => "\\PC{0,8}"]
}

fn any_json() -> impl Strategy<Value = Value> {
    scalar().prop_recursive(7, 64, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::vec((name(), inner), 0..5).prop_map(|m| Value::Object(m.into_iter().collect())),
        ]
    })
}

/// Objects of the right shape whose leaves are anything: these get far.
fn shaped() -> impl Strategy<Value = Value> {
    let values = || proptest::collection::vec(scalar(), 0..3);
    let fields = |names: &'static [&'static str]| {
        let members = proptest::collection::vec((proptest::sample::select(names.to_vec()), values()), 0..4);
        members.prop_map(|m| Value::Object(m.into_iter().map(|(k, v)| (k.to_owned(), Value::from(v))).collect()))
    };
    let source = fields(&[
        "principals",
        "notPrincipals",
        "namespaces",
        "notNamespaces",
        "serviceAccounts",
        "ipBlocks",
        "notIpBlocks",
        "trustDomains",
    ]);
    let operation = fields(&["hosts", "notHosts", "ports", "methods", "notMethods", "paths", "notPaths"]);
    let condition = (scalar(), values(), values()).prop_map(|(k, v, n)| json!({"key": k, "values": v, "notValues": n}));
    let rule = (
        proptest::collection::vec(source.prop_map(|s| json!({"source": s})), 0..3),
        proptest::collection::vec(operation.prop_map(|o| json!({"operation": o})), 0..3),
        proptest::collection::vec(condition, 0..3),
    );
    let rule = rule.prop_map(|(from, to, when)| {
        let mut rule = serde_json::Map::new();
        for (name, list) in [("from", from), ("to", to), ("when", when)] {
            if !list.is_empty() {
                rule.insert(name.into(), Value::from(list));
            }
        }
        Value::Object(rule)
    });
    let action = proptest::sample::select(vec!["ALLOW", "DENY", "AUDIT", "CUSTOM"]);
    let provider = proptest::option::weighted(0.2, Just(json!({"name": "x"})));
    (action, provider, proptest::collection::vec(rule, 0..3)).prop_map(|(action, provider, rules)| {
        json!({"action": action, "provider": provider, "rules": rules, "selector": {"matchLabels": {"app": "a"}}})
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn no_input_panics_and_what_is_valid_is_understood(spec in prop_oneof![any_json(), shaped()], whole in any_json(), around in 0..2u8) {
        let known = doubts::Shop::default();
        let around: &dyn Surroundings = if around == 0 { &Nothing } else { &known };
        for kind in Kind::ALL {
            let _ = validate(kind, &whole, around);
            let object = json!({"apiVersion": "security.istio.io/v1", "kind": kind.as_str(), "metadata": {"name": "p", "namespace": "shop"}, "spec": spec});
            let verdict = validate(kind, &object, around);
            // The same errors, whatever is known of the cluster.
            prop_assert_eq!(&verdict.errors, &validate(kind, &object, &Nothing).errors);
            if verdict.is_valid() {
                let unknown = match kind {
                    AUTHORIZATION => read::<AuthorizationPolicySpec>(&object).map(|o| o.spec.unknown_fields()),
                    PEER => read::<PeerAuthenticationSpec>(&object).map(|o| o.spec.unknown_fields()),
                    REQUEST => read::<RequestAuthenticationSpec>(&object).map(|o| o.spec.unknown_fields()),
                };
                prop_assert_eq!(unknown, Ok(Vec::new()));
            } else {
                // The walk finds whatever the typed reader can't read: its error is never the only one.
                prop_assert!(verdict.errors.iter().all(|e| !e.message.contains("invalid type")), "{:?}", verdict.errors);
            }
            for problem in verdict.errors.iter().chain(&verdict.warnings) {
                prop_assert!(!problem.message.is_empty());
            }
        }
    }
}

#[test]
fn the_guide_s_two_policies_are_accepted_without_a_word() {
    for text in [
        include_str!("../../../manifests/samples/authorizationpolicy-frontend.yaml"),
        include_str!("../../../manifests/samples/peerauthentication-strict.yaml"),
    ] {
        let object = crate::yaml::read(text).unwrap();
        let kind = Kind::of(&object).unwrap();
        assert_eq!(validate(kind, &object, &Nothing), Verdict::default());
    }
}

#[test]
fn refusals_are_told_in_full() {
    let many: BTreeMap<String, i32> = (0..30).map(|n| (format!("zzzzzzzz{n:02}"), n)).collect();
    let verdict = validate(PEER, &object(PEER, &serde_json::to_string(&many).unwrap()), &Nothing);
    let text = report::refusal(&verdict.errors);
    assert!(text.starts_with("30 mistakes:\n- spec.zzzzzzzz00: unknown field") && text.ends_with("\n- and 10 more"), "{text}");
    let most: BTreeMap<String, i32> = (0..100_000).map(|n| (format!("zzzzzzzzzzzzzzzz{n:05}"), n)).collect();
    let verdict = validate(PEER, &json!({"spec": most}), &Nothing);
    assert!(report::refusal(&verdict.errors).starts_with("at least 100 mistakes:"));
    let one = validate(PEER, &object(PEER, "{mtls: {mode: strict}}"), &Nothing);
    let text = report::refusal(&one.errors);
    assert_eq!(text, "spec.mtls.mode: \"strict\" is not one of UNSET, DISABLE, PERMISSIVE, STRICT; did you mean STRICT?");
}
