//! A verdict allocates nothing: the request path is not the place for it.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use weft_api::wire;
use weft_api::wire::string_match::Kind;
use weft_policy::authz::{Engine, Http, Peer, Request, Verdict};
use weft_policy::jwt::Claims;
use weft_policy::path::{Normalization, normalise};

thread_local! {
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: all is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = COUNT.try_with(|count| count.set(count.get() + 1));
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn counted<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = COUNT.get();
    let result = work();
    (result, COUNT.get() - before)
}

fn text(kind: Kind) -> wire::StringMatch {
    wire::StringMatch { kind: Some(kind) }
}

#[test]
fn verdicts_and_normal_paths_allocate_nothing() {
    // Every field that there is, in an ALLOW that does not match by its last field, and a DENY that does match.
    let source = wire::Source {
        principals: vec![text(Kind::Prefix("cluster.local/ns/a/".into()))],
        not_principals: vec![text(Kind::Suffix("/sa/evil".into()))],
        request_principals: vec![text(Kind::Present(true))],
        namespaces: vec![text(Kind::Glob("a*".into()))],
        service_accounts: vec!["a/b".into()],
        trust_domains: vec![text(Kind::Exact("cluster.local".into()))],
        ip_blocks: vec!["10.0.0.0/8".into()],
        not_remote_ip_blocks: vec!["192.0.2.0/24".into()],
        ..wire::Source::default()
    };
    let operation = wire::Operation {
        hosts: vec![text(Kind::Suffix(".Default".into()))],
        ports: vec![8080],
        methods: vec![text(Kind::Exact("GET".into()))],
        paths: vec![text(Kind::Template("/api/{*}/x/{**}".into()))],
        not_paths: vec![text(Kind::Exact("/api".into()))],
        ..wire::Operation::default()
    };
    let when = |attribute: wire::condition::Attribute, path: &[&str], value: &str| wire::Condition {
        attribute: attribute.into(),
        path: path.iter().map(|part| (*part).to_owned()).collect(),
        values: vec![text(Kind::Exact(value.into()))],
        ..wire::Condition::default()
    };
    use wire::condition::Attribute as A;
    let conditions = vec![
        when(A::RequestHeader, &["x-a"], "1"),
        when(A::RequestAudiences, &[], "aud"),
        when(A::RequestClaim, &["scope"], "write"),
        when(A::RequestClaim, &["groups", "of"], "g"),
        when(A::ConnectionSni, &[], "sni"),
    ];
    let rule = wire::AuthorizationRule { from: vec![source], to: vec![operation], when: conditions };
    let mut almost = rule.clone();
    almost.when.push(when(A::RequestHeader, &["x-b"], "2"));
    let policy = |action: wire::AuthorizationAction, rule: wire::AuthorizationRule| wire::AuthorizationPolicy {
        action: action.into(),
        rules: vec![rule],
        ..wire::AuthorizationPolicy::default()
    };
    let policies = [policy(wire::AuthorizationAction::Allow, almost), policy(wire::AuthorizationAction::Deny, rule)];
    let engine = Engine::compile(&policies, &["cluster.local".into()]);
    let claims = serde_json::json!({"iss": "i", "sub": "s", "aud": ["aud"], "scope": "read write", "groups": {"of": ["g"]}});
    let claims = Claims::assumed(claims.as_object().unwrap().clone());
    let headers = vec![("x-a".to_owned(), "1".to_owned()), ("x-b".into(), "1".into())];
    let (verdict, allocations) = counted(|| {
        let path = normalise("/api/v1/x/y", Normalization::Base).unwrap();
        let request = Request {
            source: Peer::parse("spiffe://cluster.local/ns/a/sa/b"),
            source_ip: [10, 0, 0, 1].into(),
            remote_ip: [10, 0, 0, 1].into(),
            destination: ([10, 0, 0, 2], 8080).into(),
            sni: Some("sni"),
            http: Some(Http {
                method: "GET",
                host: b"app.default",
                path: &path,
                query: None,
                headers: &headers,
                token: Some(&claims),
            }),
        };
        engine.check(&request).verdict
    });
    assert!(
        matches!(verdict, Verdict::Deny(denied) if denied.policy().is_some()),
        "{verdict:?}: the rule has to be evaluated to its end"
    );
    assert_eq!(allocations, 0);
    // And the count would show one.
    assert_eq!(counted(|| String::from("x")).1, 1);
}
