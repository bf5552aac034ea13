use super::*;
use wire::string_match::Kind;

fn is(text: &str) -> wire::StringMatch {
    wire::StringMatch { kind: Some(Kind::Exact(text.into())) }
}

fn policy(name: &str, action: wire::AuthorizationAction, rules: Vec<wire::AuthorizationRule>) -> wire::AuthorizationPolicy {
    wire::AuthorizationPolicy { namespace: "n".into(), name: name.into(), action: action.into(), rules, ..Default::default() }
}

fn path(path: &str) -> wire::AuthorizationRule {
    let to = vec![wire::Operation { paths: vec![is(path)], ..Default::default() }];
    wire::AuthorizationRule { to, ..Default::default() }
}

fn request<'a>(id: Option<&'a str>, path: Option<&'a str>) -> Request<'a> {
    Request {
        source: id.and_then(Peer::parse),
        source_ip: [10, 0, 0, 1].into(),
        remote_ip: [10, 0, 0, 1].into(),
        destination: ([10, 0, 0, 2], 80).into(),
        sni: None,
        http: path.map(|path| Http { method: "GET", host: b"h", path, query: None, headers: &NONE, token: None }),
    }
}

static NONE: Vec<(String, String)> = Vec::new();

fn verdict(policies: &[wire::AuthorizationPolicy], request: &Request<'_>) -> Verdict {
    Engine::compile(policies, &["cluster.local".into()]).check(request).verdict
}

#[test]
fn empty_forms() {
    use wire::AuthorizationAction as A;
    let get = request(None, Some("/a"));
    assert_eq!(verdict(&[], &get), Verdict::Allow(Allowed::NoAllowPolicy));
    assert_eq!(verdict(&[policy("p", A::Allow, vec![])], &get), Verdict::Deny(Denied::NoAllowMatched));
    let everything = vec![wire::AuthorizationRule::default()];
    assert_eq!(verdict(&[policy("p", A::Allow, everything.clone())], &get), Verdict::Allow(Allowed::By(PolicyId(0))));
    assert_eq!(verdict(&[policy("p", A::Deny, everything)], &get), Verdict::Deny(Denied::By(PolicyId(0))));
    assert_eq!(verdict(&[policy("p", A::Deny, vec![])], &get), Verdict::Allow(Allowed::NoAllowPolicy));
}

#[test]
fn not_principals_matches_plaintext_peers() {
    let from = vec![wire::Source { not_principals: vec![is("cluster.local/ns/a/sa/b")], ..Default::default() }];
    let policies = [policy("p", wire::AuthorizationAction::Deny, vec![wire::AuthorizationRule { from, ..Default::default() }])];
    assert!(matches!(verdict(&policies, &request(None, None)), Verdict::Deny(_)));
    assert!(matches!(verdict(&policies, &request(Some("spiffe://cluster.local/ns/a/sa/b"), None)), Verdict::Allow(_)));
}

#[test]
fn opaque_connections() {
    use wire::AuthorizationAction as A;
    let tcp = request(None, None);
    // Only HTTP fields: an ALLOW matches nothing, a DENY everything.
    assert_eq!(verdict(&[policy("p", A::Allow, vec![path("/a")])], &tcp), Verdict::Deny(Denied::NoAllowMatched));
    assert_eq!(verdict(&[policy("p", A::Deny, vec![path("/a")])], &tcp), Verdict::Deny(Denied::By(PolicyId(0))));
    let asks = |protocol| {
        let authorizer = wire::ExternalAuthorizer { address: "x:1".into(), protocol: Some(protocol), ..Default::default() };
        wire::AuthorizationPolicy { authorizer: Some(authorizer), ..policy("p", A::Custom, vec![path("/a")]) }
    };
    let http = asks(Protocol::Http(wire::HttpAuthorizer::default()));
    assert_eq!(verdict(&[http], &tcp), Verdict::Allow(Allowed::NoAllowPolicy));
    let grpc = asks(Protocol::Grpc(wire::GrpcAuthorizer {}));
    assert_eq!(verdict(&[grpc], &tcp), Verdict::Ask(PolicyId(0)));
}

#[test]
fn broken_policies_close_and_never_open() {
    use wire::AuthorizationAction as A;
    let get = request(None, Some("/a"));
    let bad = wire::AuthorizationRule {
        to: vec![wire::Operation { paths: vec![wire::StringMatch { kind: None }], ..Default::default() }],
        ..Default::default()
    };
    assert_eq!(verdict(&[policy("p", A::Deny, vec![bad.clone()])], &get), Verdict::Deny(Denied::Broken(PolicyId(0))));
    assert_eq!(verdict(&[policy("p", A::Custom, vec![bad.clone()])], &get), Verdict::Deny(Denied::Broken(PolicyId(0))));
    // One good rule beside a bad one opens nothing.
    let mixed = policy("p", A::Allow, vec![path("/a"), bad]);
    assert_eq!(verdict(std::slice::from_ref(&mixed), &get), Verdict::Deny(Denied::NoAllowMatched));
    let engine = Engine::compile(&[mixed], &[]);
    let why = engine.policies()[0].broken.as_deref().unwrap();
    assert!(why.starts_with("rules[1].to[0].operation.paths[0]: "), "{why}");
    let unknown = wire::AuthorizationPolicy { action: 7, ..Default::default() };
    assert!(matches!(verdict(&[unknown], &get), Verdict::Deny(Denied::Broken(_))));
}

#[test]
fn each_authorizer_is_asked_once() {
    let asks = |name: &str, address: &str| wire::AuthorizationPolicy {
        authorizer: Some(wire::ExternalAuthorizer {
            address: address.into(),
            protocol: Some(Protocol::Grpc(wire::GrpcAuthorizer {})),
            ..Default::default()
        }),
        ..policy(name, wire::AuthorizationAction::Custom, vec![path("/a")])
    };
    let policies = [asks("p0", "x:1"), asks("p1", "y:1"), asks("p2", "x:1")];
    let engine = Engine::compile(&policies, &[]);
    let get = request(None, Some("/a"));
    assert_eq!(engine.check(&get).verdict, Verdict::Ask(PolicyId(0)));
    assert_eq!(engine.resume(&get, PolicyId(0)).verdict, Verdict::Ask(PolicyId(1)));
    assert_eq!(engine.resume(&get, PolicyId(1)).verdict, Verdict::Allow(Allowed::NoAllowPolicy));
}

#[test]
fn explanations_name_the_field() {
    let from = vec![wire::Source { principals: vec![is("cluster.local/ns/a/sa/b")], ..Default::default() }];
    let rule = wire::AuthorizationRule { from, ..path("/a") };
    let engine = Engine::compile(&[policy("p", wire::AuthorizationAction::Allow, vec![rule])], &["td".into()]);
    let (outcome, words) = crate::explain::explain(&engine, &request(Some("spiffe://td/ns/a/sa/x"), Some("/a")), None);
    assert_eq!(outcome.verdict, Verdict::Deny(Denied::NoAllowMatched));
    assert_eq!((words.verdict, words.policy.as_deref()), ("deny", None));
    assert_eq!(
        words.policies[0].rules[0].failed[0].words,
        "from[0].source.principals: the request has \"td/ns/a/sa/x\", not one of [td/ns/a/sa/b]"
    );
    let (_, words) = crate::explain::explain(&engine, &request(Some("spiffe://td/ns/a/sa/b"), Some("/b")), None);
    assert_eq!(words.policies[0].rules[0].failed[0].field, "to[0].operation.paths");
    let (_, words) = crate::explain::explain(&engine, &request(Some("spiffe://td/ns/a/sa/b"), Some("/a")), None);
    assert_eq!((words.verdict, words.reason.as_str()), ("allow", "ALLOW policy n/p matches"));
}
