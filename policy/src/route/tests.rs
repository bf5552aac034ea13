// Fields of messages are optional.
#![allow(clippy::unnecessary_wraps)]

use super::*;
use proptest::prelude::*;
use std::collections::HashMap;
use wire::text_match::Kind;

#[derive(Clone, Debug, Default)]
struct Asked {
    method: String,
    path: String,
    query: Option<String>,
    authority: String,
    scheme: String,
    headers: HashMap<String, String>,
}

impl Request for Asked {
    fn method(&self) -> &str {
        &self.method
    }
    fn path(&self) -> &str {
        &self.path
    }
    fn query(&self) -> Option<&str> {
        self.query.as_deref()
    }
    fn authority(&self) -> &str {
        &self.authority
    }
    fn scheme(&self) -> &str {
        &self.scheme
    }
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

/// `METHOD /path?query header=value …`
fn asked(line: &str) -> Asked {
    let mut words = line.split(' ');
    let method = words.next().unwrap().to_owned();
    let target = words.next().unwrap();
    let (path, query) = target.split_once('?').map_or((target, None), |(p, q)| (p, Some(q.to_owned())));
    let headers = words.map(|w| w.split_once('=').map(|(n, v)| (n.to_owned(), v.to_owned())).unwrap()).collect();
    Asked { method, path: path.into(), query, authority: "app:8080".into(), scheme: "http".into(), headers }
}

fn text(kind: Kind) -> wire::TextMatch {
    wire::TextMatch { kind: Some(kind) }
}

fn exact(t: &str) -> Option<wire::TextMatch> {
    Some(text(Kind::Exact(t.into())))
}

fn prefix(t: &str) -> Option<wire::TextMatch> {
    Some(text(Kind::Prefix(t.into())))
}

fn regex(t: &str) -> Option<wire::TextMatch> {
    Some(text(Kind::Regex(t.into())))
}

fn field(name: &str, value: Option<wire::TextMatch>) -> wire::FieldMatch {
    wire::FieldMatch { name: name.into(), value }
}

fn to(backend: u32) -> Option<WireAction> {
    let backends = vec![wire::WeightedBackend { backend, weight: 1, ..Default::default() }];
    Some(WireAction::Split(wire::Split { backends }))
}

fn route(name: &str, matches: Vec<wire::HttpMatch>) -> wire::HttpRoute {
    wire::HttpRoute { name: name.into(), matches, action: to(0), ..Default::default() }
}

fn one(m: wire::HttpMatch, request: &str) -> bool {
    Routes::new(&[route("r", vec![m])]).unwrap().find(&asked(request)).is_some()
}

#[test]
fn every_kind_of_match() {
    let path = |path| wire::HttpMatch { path, ..Default::default() };
    let header = |f| wire::HttpMatch { headers: vec![f], ..Default::default() };
    let without = |f| wire::HttpMatch { without_headers: vec![f], ..Default::default() };
    let query = |f| wire::HttpMatch { query: vec![f], ..Default::default() };
    let segments = |p: &str| wire::HttpMatch { path_segment_prefix: p.into(), ..Default::default() };
    let no_case = |path| wire::HttpMatch { path, path_ignores_case: true, ..Default::default() };
    for (m, request, expected) in [
        (path(exact("/a")), "GET /a?x", true),
        (path(exact("/a")), "GET /A", false),
        (path(exact("/a")), "GET /a/", false),
        (path(prefix("/foo")), "GET /foobar", true),
        (path(prefix("/foo")), "GET /fo", false),
        (path(regex("/a.c")), "GET /abc", true),
        (path(regex("/a.c")), "GET /abcd", false),
        (path(regex("a|/b")), "GET /b", true),
        (path(regex("/a|/b")), "GET /ax", false),
        (no_case(exact("/Foo")), "GET /fOO", true),
        (no_case(exact("/Foo")), "GET /fOOx", false),
        (no_case(prefix("/Foo")), "GET /fOOx", true),
        (no_case(prefix("/Foo")), "GET /fé", false),
        (segments("/foo"), "GET /foo", true),
        (segments("/foo/"), "GET /foo/bar", true),
        (segments("/foo"), "GET /foobar", false),
        (segments("/"), "GET /anything", true),
        (header(field("X-User", exact("a"))), "GET / x-user=a", true),
        (header(field("x-user", exact("a"))), "GET / x-user=b", false),
        (header(field("x-user", exact("a"))), "GET /", false),
        (header(field("x-user", None)), "GET / x-user=b", true),
        (header(field("x-user", Some(text(Kind::Present(true))))), "GET /", false),
        (without(field("x-user", exact("a"))), "GET /", true),
        (without(field("x-user", exact("a"))), "GET / x-user=a", false),
        (without(field("x-user", exact("a"))), "GET / x-user=b", true),
        (without(field("x-user", None)), "GET / x-user=b", false),
        (without(field("x-user", None)), "GET /", true),
        (without(field("x-user", regex(".*"))), "GET /", false),
        (query(field("v", exact("2"))), "GET /?a=1&v=2", true),
        (query(field("v", exact("a b"))), "GET /?v=a%20b", true),
        (query(field("v", exact("2"))), "GET /?V=2", false),
        (query(field("v", None)), "GET /?v", true),
        (query(field("v", exact("1"))), "GET /?v=2&v=1", false),
        (query(field("v", exact("1"))), "GET /", false),
        (wire::HttpMatch { method: exact("GET"), ..Default::default() }, "GET /", true),
        (wire::HttpMatch { method: exact("GET"), ..Default::default() }, "get /", false),
        (wire::HttpMatch { authority: prefix("app"), ..Default::default() }, "GET /", true),
        (wire::HttpMatch { authority: exact("app"), ..Default::default() }, "GET /", false),
        (wire::HttpMatch { scheme: exact("https"), ..Default::default() }, "GET /", false),
        (wire::HttpMatch { method: exact("GET"), path: prefix("/a"), ..Default::default() }, "POST /a", false),
    ] {
        assert_eq!(one(m.clone(), request), expected, "{m:?} on {request}");
    }
}

#[test]
fn the_first_route_counts_and_any_of_its_matches() {
    let path = |p: &str| wire::HttpMatch { path: prefix(p), ..Default::default() };
    let routes = Routes::new(&[
        route("ab", vec![path("/a"), path("/b")]),
        route("a-too", vec![path("/a/long")]),
        route("post", vec![wire::HttpMatch { method: exact("POST"), ..Default::default() }]),
    ])
    .unwrap();
    let name = |request: &str| routes.find(&asked(request)).map(|found| found.route.name.clone());
    assert_eq!(name("GET /b/x").as_deref(), Some("ab"));
    assert_eq!(name("GET /a/long").as_deref(), Some("ab"));
    assert_eq!(name("POST /c").as_deref(), Some("post"));
    assert_eq!(name("GET /c"), None);
    assert!(Routes::new(&[]).unwrap().is_empty());
}

#[test]
fn rewrites() {
    let rewritten = |m: wire::HttpMatch, rewrite: wire::Rewrite, request: &str| {
        let route = wire::HttpRoute { rewrite: Some(rewrite), ..route("r", vec![m]) };
        let routes = Routes::new(&[route]).unwrap();
        let request = asked(request);
        let found = routes.find(&request).unwrap();
        found.path(&request.path)
    };
    let by = |prefix: &str| wire::Rewrite { prefix: prefix.into(), has_prefix: true, ..Default::default() };
    let path = |path| wire::HttpMatch { path, ..Default::default() };
    let segments = |p: &str| wire::HttpMatch { path_segment_prefix: p.into(), ..Default::default() };
    for (m, rewrite, request, expected) in [
        (path(prefix("/api")), by("/v2"), "GET /api/x", "/v2/x"),
        (path(prefix("/api/")), by("/"), "GET /api/x", "/x"),
        (path(prefix("/api")), by("/"), "GET /api/x", "/x"),
        (path(prefix("/api")), by("/"), "GET /api", "/"),
        (path(exact("/api")), by("/v2"), "GET /api", "/v2"),
        (path(regex("/a.*")), by("/v2"), "GET /api", "/v2/api"),
        (path(None), by("/v2"), "GET /x", "/v2/x"),
        (segments("/foo"), by("/bar"), "GET /foo/x", "/bar/x"),
        (segments("/foo"), by(""), "GET /foo", "/"),
        (segments("/foo"), by("/bar/"), "GET /foo/x", "/bar/x"),
        (segments("/"), by("/bar"), "GET /x", "/bar/x"),
        (path(None), wire::Rewrite { full_path: "/only".into(), ..Default::default() }, "GET /x/y", "/only"),
        (
            path(None),
            wire::Rewrite { regex: "^/([^/]*)/(.*)$".into(), substitution: r"/\2/$\1".into(), ..Default::default() },
            "GET /a/b",
            "/b/$a",
        ),
    ] {
        assert_eq!(rewritten(m.clone(), rewrite.clone(), request).as_deref(), Some(expected), "{m:?} {rewrite:?} {request}");
    }
    assert_eq!(rewritten(path(None), wire::Rewrite { authority: "b".into(), ..Default::default() }, "GET /x"), None);
}

#[test]
fn redirects() {
    let location = |redirect: wire::Redirect, request: &str| {
        let m = wire::HttpMatch { path: prefix("/old"), ..Default::default() };
        let route = wire::HttpRoute { action: Some(WireAction::Redirect(redirect)), ..route("r", vec![m]) };
        let routes = Routes::new(&[route]).unwrap();
        let request = asked(request);
        let found = routes.find(&request).unwrap();
        let Action::Redirect(redirect) = &found.route.action else { panic!() };
        (redirect.code, redirect.location(&request, &found))
    };
    let redirect = wire::Redirect::default;
    for (wanted, expected) in [
        (redirect(), (301, "http://app:8080/old/x?q=1")),
        (wire::Redirect { code: 308, authority: "b.example".into(), ..redirect() }, (308, "http://b.example/old/x?q=1")),
        (wire::Redirect { scheme: "https".into(), ..redirect() }, (301, "https://app/old/x?q=1")),
        (wire::Redirect { scheme: "https".into(), port: 443, ..redirect() }, (301, "https://app/old/x?q=1")),
        (wire::Redirect { scheme: "https".into(), port: 8443, ..redirect() }, (301, "https://app:8443/old/x?q=1")),
        (wire::Redirect { scheme: "https".into(), port_from_request: true, ..redirect() }, (301, "https://app:8080/old/x?q=1")),
        (wire::Redirect { path: "/new".into(), ..redirect() }, (301, "http://app:8080/new?q=1")),
        (wire::Redirect { path: "/new?a=b".into(), ..redirect() }, (301, "http://app:8080/new?a=b")),
        (wire::Redirect { prefix: "/new".into(), has_prefix: true, ..redirect() }, (301, "http://app:8080/new/x?q=1")),
        (wire::Redirect { authority: "[fd00::1]:80".into(), ..redirect() }, (301, "http://[fd00::1]/old/x?q=1")),
    ] {
        let (code, at) = location(wanted.clone(), "GET /old/x?q=1");
        assert_eq!((code, at.as_str()), expected, "{wanted:?}");
    }
    let bad =
        wire::HttpRoute { action: Some(WireAction::Redirect(wire::Redirect { code: 300, ..redirect() })), ..route("r", vec![]) };
    assert!(Routes::new(&[bad]).unwrap_err().reason.contains("300"));
}

#[test]
fn weights_are_met_at_once_and_in_the_long_run() {
    let weighted = |weights: &[u32]| {
        let backends = weights.iter().enumerate();
        let backends =
            backends.map(|(n, weight)| wire::WeightedBackend { backend: n as u32, weight: *weight, ..Default::default() });
        Split::new(&wire::Split { backends: backends.collect() }).unwrap()
    };
    for (weights, runs) in [(&[80, 20][..], 100), (&[80, 20], 20_000), (&[1, 1, 1], 300), (&[99, 1], 1000), (&[5, 0, 95], 1000)] {
        let split = weighted(weights);
        let mut count = vec![0u32; weights.len()];
        for n in 0..runs {
            count[split.nth(n).unwrap().backend] += 1;
        }
        let total: u32 = weights.iter().sum();
        for (weight, n) in weights.iter().zip(&count) {
            let expected = f64::from(runs) * f64::from(*weight) / f64::from(total);
            assert!((f64::from(*n) - expected).abs() <= 4.0, "{weights:?}: {count:?} of {runs}");
        }
    }
    assert_eq!(weighted(&[0]).nth(7).unwrap().backend, 0, "a single destination ignores its weight");
    assert!(weighted(&[0, 0]).nth(0).is_none());
}

#[test]
fn what_cannot_be_compiled_is_named() {
    let bad_regex = wire::HttpMatch { path: regex("("), ..Default::default() };
    let error = Routes::new(&[route("first", vec![]), route("second", vec![bad_regex])]).unwrap_err();
    assert_eq!((error.route.as_str(), error.field), ("second", "matches"));
    let nothing = wire::HttpRoute { action: None, ..route("r", vec![]) };
    assert_eq!(Routes::new(&[nothing]).unwrap_err().field, "action");
    let changes = |name: &str, value: &str| {
        let set = vec![wire::HeaderValue { name: name.into(), value: value.into() }];
        wire::HttpRoute { request_headers: Some(wire::HeaderChanges { set, ..Default::default() }), ..route("r", vec![]) }
    };
    for (name, value) in [("a b", "x"), ("", "x"), ("x", "a\nb"), ("Content-Length", "1")] {
        assert_eq!(Routes::new(&[changes(name, value)]).unwrap_err().field, "request_headers", "{name:?}");
    }
    let routes = Routes::new(&[changes("Host", "other")]).unwrap();
    assert_eq!(routes.iter().next().unwrap().request.authority.as_deref(), Some("other"));
}

fn retries(on: &[&str], codes: &[u32]) -> Retries {
    let on = on.iter().map(|word| (*word).to_owned()).collect();
    Retries::new(&wire::RetryPolicy { attempts: 3, on, status_codes: codes.to_vec(), ..Default::default() }).unwrap()
}

#[test]
fn retries_without_conditions_are_safe() {
    let safe = retries(&[], &[]);
    for (answer, get, post) in [
        (Answer::Status(503, None), true, false),
        (Answer::Status(500, None), false, false),
        (Answer::Status(404, None), false, false),
        (Answer::Reset, true, false),
        (Answer::TryTimeout, true, false),
        (Answer::ConnectFailure, true, true),
        (Answer::NeverSent, true, true),
    ] {
        assert_eq!((safe.again(true, answer), safe.again(false, answer)), (get, post), "{answer:?}");
    }
}

#[test]
fn retry_on_is_obeyed_to_the_letter() {
    for (on, codes, answer, expected) in [
        (&["5xx"][..], &[][..], Answer::Status(500, None), true),
        (&["5xx"], &[], Answer::Status(429, None), false),
        (&["5xx"], &[], Answer::Reset, true),
        (&["5xx"], &[], Answer::ConnectFailure, true),
        (&["gateway-error"], &[], Answer::Status(500, None), false),
        (&["gateway-error"], &[], Answer::Status(504, None), true),
        (&["gateway-error"], &[], Answer::TryTimeout, true),
        (&["reset"], &[], Answer::Reset, true),
        (&["reset"], &[], Answer::Status(503, None), false),
        (&["connect-failure"], &[], Answer::Reset, false),
        (&["connect-failure"], &[], Answer::ConnectFailure, true),
        (&["refused-stream"], &[], Answer::NeverSent, true),
        (&["retriable-4xx"], &[], Answer::Status(409, None), true),
        (&["retriable-4xx"], &[], Answer::Status(404, None), false),
        (&["retriable-status-codes"], &[418], Answer::Status(418, None), true),
        (&["retriable-status-codes"], &[418], Answer::Status(419, None), false),
        (&["5xx"], &[418], Answer::Status(418, None), false),
        (&["unavailable", "internal"], &[], Answer::Status(200, Some(14)), true),
        (&["unavailable"], &[], Answer::Status(200, Some(13)), false),
        (&["cancelled"], &[], Answer::Status(200, None), false),
    ] {
        for idempotent in [true, false] {
            assert_eq!(retries(on, codes).again(idempotent, answer), expected, "{on:?} {codes:?} {answer:?}");
        }
    }
    assert!(Conditions::new(&["sometimes".into()]).unwrap_err().contains("sometimes"));
}

#[test]
fn waits_double_up_to_a_bound() {
    let r = retries(&[], &[]);
    let at = |n| r.wait(n, 1.0).as_millis();
    assert_eq!([at(1), at(2), at(3), at(4), at(5), at(60)], [25, 50, 100, 200, 250, 250]);
    assert_eq!(r.wait(3, 0.0), Duration::ZERO);
    let bounded = Retries::new(&wire::RetryPolicy { backoff_max_ms: 40, ..Default::default() }).unwrap();
    assert_eq!([bounded.wait(1, 1.0), bounded.wait(2, 1.0)].map(|wait| wait.as_millis()), [25, 40]);
}

#[test]
fn cross_origin_requests() {
    let policy = wire::Cors {
        allow_origins: vec![exact("https://a.example").unwrap(), regex(r"https://.*\.b\.example").unwrap()],
        allow_methods: vec!["GET".into(), "PUT".into()],
        allow_headers: vec!["x-a".into()],
        expose_headers: vec!["x-b".into()],
        max_age: Some(60),
        allow_credentials: true,
        ..Default::default()
    };
    let cors = Cors::new(&policy).unwrap();
    let preflight = "OPTIONS / origin=https://a.example access-control-request-method=PUT";
    let Preflight::Answer(fields) = cors.preflight(&asked(preflight)) else { panic!() };
    let expected = [
        ("access-control-allow-origin", "https://a.example"),
        ("access-control-allow-credentials", "true"),
        ("access-control-allow-methods", "GET,PUT"),
        ("access-control-allow-headers", "x-a"),
        ("access-control-max-age", "60"),
    ];
    assert_eq!(fields, expected.map(|(n, v)| (n, v.to_owned())));
    assert_eq!(cors.preflight(&asked("GET / origin=https://a.example")), Preflight::No);
    assert_eq!(cors.preflight(&asked("OPTIONS / origin=https://a.example")), Preflight::No);
    let foreign = "OPTIONS / origin=https://evil access-control-request-method=PUT";
    assert_eq!(cors.preflight(&asked(foreign)), Preflight::Forward);
    let ignoring = Cors::new(&wire::Cors { ignore_unmatched_preflights: true, ..policy }).unwrap();
    assert_eq!(ignoring.preflight(&asked(foreign)), Preflight::Answer(Vec::new()));
    assert_eq!(cors.response(Some("https://x.b.example")).len(), 3);
    assert!(cors.response(Some("https://xb.example")).is_empty() && cors.response(None).is_empty());
    let any = Cors::new(&wire::Cors { allow_origins: vec![exact("*").unwrap()], ..Default::default() }).unwrap();
    assert_eq!(any.response(Some("https://z")), [("access-control-allow-origin", "https://z".to_owned())]);
}

proptest! {
    #[test]
    fn no_request_and_no_rewrite_panics(path in "/.{0,40}", prefix_text in "/.{0,8}", with in ".{0,8}", query in proptest::option::of(".{0,20}")) {
        let m = wire::HttpMatch { path: prefix(&prefix_text), query: vec![field("a", None)], ..Default::default() };
        let n = wire::HttpMatch { path_segment_prefix: prefix_text.clone(), ..Default::default() };
        let o = wire::HttpMatch { path: prefix(&prefix_text), path_ignores_case: true, ..Default::default() };
        let rewrite = Some(wire::Rewrite { prefix: with, has_prefix: true, ..Default::default() });
        let routes = Routes::new(&[wire::HttpRoute { rewrite, ..route("r", vec![m, n, o]) }]).unwrap();
        let request = Asked { method: "GET".into(), path: path.clone(), query, ..Default::default() };
        if let Some(found) = routes.find(&request) {
            let new = found.path(&path);
            prop_assert!(new.is_some_and(|new| new.starts_with('/')));
        }
    }
}
