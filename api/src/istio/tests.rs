use serde_json::json;

use super::{
    security::{Action, AuthorizationPolicy, MtlsMode, PeerAuthentication, RequestAuthentication},
    *,
};

fn policy(spec: Value) -> Result<AuthorizationPolicy, ParseError> {
    AuthorizationPolicy::from_value(json!({
        "apiVersion": "security.istio.io/v1beta1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "p", "namespace": "ns", "annotations": {"istio.io/dry-run": "T"}}, "spec": spec,
    }))
}

#[test]
fn reads_all_of_a_policy() {
    let read = policy(json!({
        "selector": {"matchLabels": {"app": "a"}}, "action": "DENY",
        "rules": [{"from": [{"source": {"notPrincipals": ["*"], "trustDomains": ["td"]}}],
                   "to": [{"operation": {"methods": ["GET"], "notPaths": ["/a/{**}"]}}],
                   "when": [{"key": "source.ip", "notValues": ["10.0.0.0/8"]}]}],
    }))
    .unwrap();
    assert_eq!(read.spec.action, Action::Deny);
    assert!(read.dry_run());
    assert_eq!(read.key(), "ns/p");
    let rule = &read.spec.rules[0];
    assert_eq!(rule.from[0].source.as_ref().unwrap().not_principals, ["*"]);
    assert_eq!(rule.to[0].operation.as_ref().unwrap().not_paths, ["/a/{**}"]);
    assert_eq!(rule.when[0].not_values, ["10.0.0.0/8"]);
    assert!(read.spec.unknown_fields().is_empty());
}

#[test]
fn an_absent_spec_and_nulls_are_defaults() {
    let read = AuthorizationPolicy::from_value(json!({"metadata": {"name": "p", "labels": null}})).unwrap();
    assert_eq!(read.spec, security::AuthorizationPolicySpec::default());
    assert_eq!(policy(json!({"rules": null, "action": null, "selector": null})).unwrap().spec.rules, []);
}

#[test]
fn errors_carry_the_path() {
    let at = |spec| policy(spec).unwrap_err().path;
    assert_eq!(at(json!({"rules": [null]})), "spec.rules[0]");
    assert_eq!(at(json!({"action": "deny"})), "spec.action");
    assert_eq!(
        at(json!({"rules": [{"to": [{"operation": {"ports": ["80", 8080]}}]}]})),
        "spec.rules[0].to[0].operation.ports[1]"
    );
    assert_eq!(PeerAuthentication::from_value(json!({"kind": "Pod"})).unwrap_err().path, "kind");
    let other = json!({"apiVersion": "security.istio.io/v1alpha1"});
    assert_eq!(PeerAuthentication::from_value(other).unwrap_err().path, "apiVersion");
    assert_eq!(PeerAuthentication::from_value(json!([])).unwrap_err().to_string(), "not an object");
}

#[test]
fn unknown_fields_are_kept_with_their_paths() {
    let read =
        policy(json!({"rulez": [], "rules": [{"from": [{"source": {"principal": "x"}, "so": 1}], "when": [{"vals": 2}]}]}));
    assert_eq!(
        read.unwrap().spec.unknown_fields(),
        ["spec.rules[0].from[0].source.principal", "spec.rules[0].from[0].so", "spec.rules[0].when[0].vals", "spec.rulez"]
    );
}

#[test]
fn ports_of_peer_authentication_are_numbers() {
    let read = |key: &str| {
        PeerAuthentication::from_value(
            json!({"spec": {"mtls": {"mode": "STRICT"}, "portLevelMtls": {key: {"mode": "DISABLE", "x": 1}}}}),
        )
    };
    let spec = read("8080").unwrap().spec;
    assert_eq!(spec.mode(), MtlsMode::Strict);
    assert_eq!(spec.port_level_mtls[&8080].mode, MtlsMode::Disable);
    assert_eq!(spec.unknown_fields(), ["spec.portLevelMtls.8080.x"]);
    assert!(read("http").unwrap_err().path.starts_with("spec.portLevelMtls"));
}

#[test]
fn jwt_rules_take_the_old_spelling_of_jwks_uri() {
    let read = |rule: Value| RequestAuthentication::from_value(json!({"spec": {"jwtRules": [rule]}}));
    assert_eq!(read(json!({"jwks_uri": "https://a/"})).unwrap().spec.jwt_rules[0].jwks_uri, "https://a/");
    assert_eq!(read(json!({"jwks_uri": "a", "jwksUri": "b"})).unwrap_err().path, "spec.jwtRules[0]");
    let all = read(json!({"issuer": "i", "fromCookies": ["c"], "timeout": "5s", "spaceDelimitedClaims": ["s"],
        "outputClaimToHeaders": [{"header": "h", "claim": "a.b"}], "forwardOriginalToken": true}))
    .unwrap();
    assert!(all.spec.unknown_fields().is_empty());
}

#[test]
fn the_older_goes_first() {
    let made = |at: Option<&str>, name: &str| {
        PeerAuthentication::from_value(json!({"metadata": {"name": name, "creationTimestamp": at}})).unwrap()
    };
    let mut all = [made(None, "new"), made(Some("2026-02-01T00:00:00Z"), "b"), made(Some("2026-01-01T00:00:00Z"), "c")];
    all.sort_by(|a, b| a.age_order().cmp(&b.age_order()));
    assert_eq!(all.map(|o| o.metadata.name), ["c", "b", "new"]);
}

#[test]
fn durations_are_go_s() {
    for (text, millis) in [
        ("5s", 5000),
        ("1m30s", 90_000),
        ("0.5s", 500),
        ("1.5h", 5_400_000),
        ("100ms", 100),
        ("0", 0),
        (".5s", 500),
        ("+1s", 1000),
    ] {
        assert_eq!(parse_duration(text), Some(Duration::from_millis(millis)), "{text}");
    }
    for text in ["", "5", "s", "-1s", "1x", "1..5s", ".s", "1s1", "99999999999999999h", "é", "1é"] {
        assert_eq!(parse_duration(text), None, "{text}");
    }
}
