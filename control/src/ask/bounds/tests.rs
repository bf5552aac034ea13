use super::*;
use weft_api::wire::StringMatch;
use weft_api::wire::string_match::Kind;

fn exact(text: &str) -> StringMatch {
    StringMatch { kind: Some(Kind::Exact(text.into())) }
}

fn policy(name: &str, action: AuthorizationAction, rules: Vec<AuthorizationRule>) -> AuthorizationPolicy {
    AuthorizationPolicy {
        namespace: "ns".into(),
        name: name.into(),
        action: action.into(),
        rules,
        ..AuthorizationPolicy::default()
    }
}

fn paths(path: &str) -> AuthorizationRule {
    let to = vec![Operation { paths: vec![exact(path)], ..Operation::default() }];
    AuthorizationRule { to, ..AuthorizationRule::default() }
}

fn header(rule: AuthorizationRule, name: &str) -> AuthorizationRule {
    let condition = Condition { path: vec![name.into()], values: vec![exact("v")], ..Condition::default() };
    AuthorizationRule { when: vec![condition], ..rule }
}

fn blocks(cidr: &str) -> AuthorizationRule {
    let from = vec![Source { ip_blocks: vec![cidr.into()], ..Source::default() }];
    AuthorizationRule { from, ..AuthorizationRule::default() }
}

fn judge(policies: &[AuthorizationPolicy], unknown: Unknown, sample: &Sample<'_>) -> Sure {
    Bounds::new(policies, &["cluster.local".into()], unknown, sample.http.is_some()).judge(sample)
}

fn get(path: &str) -> Sample<'_> {
    Sample { identity: "spiffe://cluster.local/ns/a/sa/b", address: None, port: 80, http: Some(("GET", path, "h", None)) }
}

fn brief(sure: &Sure) -> String {
    match sure {
        Sure::Pass { policy } => format!("pass {policy}"),
        Sure::Refuse { policy, .. } => format!("refuse {policy}"),
        Sure::Depends { policy, on } => format!("depends {policy}: {on}"),
    }
}

#[test]
fn what_is_known_is_sure() {
    use AuthorizationAction::{Allow, Deny};
    let policies = [policy("d", Deny, vec![paths("/no")]), policy("a", Allow, vec![paths("/yes"), paths("/no")])];
    let know = Unknown::default();
    assert_eq!(brief(&judge(&policies, know, &get("/yes"))), "pass ns/a");
    assert_eq!(brief(&judge(&policies, know, &get("/no"))), "refuse ns/d");
    assert_eq!(brief(&judge(&policies, know, &get("/other"))), "refuse ");
    assert_eq!(brief(&judge(&[], know, &get("/"))), "pass ");
}

#[test]
fn what_is_not_known_is_never_guessed() {
    use AuthorizationAction::{Allow, Deny};
    let know = Unknown::default();
    let deny = [policy("d", Deny, vec![header(paths("/x"), "x-a")])];
    assert_eq!(brief(&judge(&deny, know, &get("/x"))), "depends ns/d: it depends on the header x-a, which samples don't tell");
    assert_eq!(brief(&judge(&deny, know, &get("/y"))), "pass ", "the path alone says enough");
    let allow = [policy("a", Allow, vec![header(paths("/x"), "x-a"), paths("/z")])];
    assert!(brief(&judge(&allow, know, &get("/x"))).starts_with("depends :"));
    assert_eq!(brief(&judge(&allow, know, &get("/y"))), "refuse ", "no header could help");
    assert_eq!(brief(&judge(&allow, know, &get("/z"))), "pass ns/a");
    // Both together: whatever the header is, somebody refuses.
    let both = [policy("d", Deny, vec![paths("/x")]), policy("a", Allow, vec![header(paths("/x"), "x-a")])];
    assert_eq!(brief(&judge(&both, know, &get("/x"))), "refuse ns/d");
}

#[test]
fn each_kind_of_ignorance() {
    use AuthorizationAction::Deny;
    let unknown = Unknown { address: true, ..Unknown::default() };
    let policies = [policy("d", Deny, vec![blocks("10.0.0.0/8")])];
    assert!(brief(&judge(&policies, unknown, &get("/"))).contains("ipBlocks"));
    let here = Sample { identity: "", address: Some("10.1.1.1".parse().unwrap()), ..get("/") };
    assert_eq!(brief(&judge(&policies, Unknown::default(), &here)), "refuse ns/d");
    let there = Sample { address: Some("11.1.1.1".parse().unwrap()), ..here };
    assert_eq!(brief(&judge(&policies, Unknown::default(), &there)), "pass ");

    let folded = Unknown { path: true, method: true, principal: true, claims: true, ..Unknown::default() };
    let policies = [policy("d", Deny, vec![paths("/x")])];
    assert!(brief(&judge(&policies, folded, &get(""))).contains("the path"));

    // An alternative that is known still counts when another one isn't.
    let mut rule = blocks("10.0.0.0/8");
    rule.from.push(Source { namespaces: vec![exact("a")], ..Source::default() });
    let policies = [policy("d", Deny, vec![rule])];
    assert_eq!(brief(&judge(&policies, unknown, &get("/"))), "refuse ns/d");

    // Opaque connections have no headers: the engine's own rules for TCP hold.
    let policies = [policy("a", AuthorizationAction::Allow, vec![header(AuthorizationRule::default(), "x-a")])];
    let tcp = Sample { http: None, ..get("") };
    assert_eq!(brief(&judge(&policies, Unknown { sni: true, ..Unknown::default() }, &tcp)), "refuse ");
}

#[test]
fn authorizers_decide_for_themselves() {
    let mut custom = policy("c", AuthorizationAction::Custom, vec![paths("/x")]);
    assert_eq!(brief(&judge(&[custom.clone()], Unknown::default(), &get("/x"))), "refuse ns/c", "nobody could be asked");
    custom.authorizer = Some(wire::ExternalAuthorizer {
        name: "opa".into(),
        address: "opa:9000".into(),
        protocol: Some(wire::external_authorizer::Protocol::Grpc(wire::GrpcAuthorizer {})),
        ..wire::ExternalAuthorizer::default()
    });
    let policies = [custom, policy("d", AuthorizationAction::Deny, vec![header(paths("/y"), "x-a"), paths("/z")])];
    assert_eq!(brief(&judge(&policies, Unknown::default(), &get("/x"))), "depends ns/c: the external authorizer opa decides");
    assert_eq!(brief(&judge(&policies, Unknown::default(), &get("/z"))), "refuse ns/d");
}

#[test]
fn principals_of_tokens() {
    assert_eq!(claims("https://issuer/a/sub").unwrap().principal(), Some("https://issuer/a/sub"));
    assert!(claims("none").is_none());
}
