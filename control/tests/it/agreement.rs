//! What passes validation is what the compiler understands, for any policy: nobody is told "created" and then finds in the status that
//! his policy can't be used. And what either calls a mistake, the other never takes for something that allows.

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use weft_control::compile::security::{authorization, jwt, peer};
use weft_webhook::validate::{Kind, Nothing, validate};

const VALUES: [&str; 48] = [
    "",
    "*",
    "a",
    "a*",
    "*a",
    "a*b",
    "GET",
    "get",
    "G*",
    "10.0.0.1",
    "10.0.0.0/8",
    "10.0.0.5/8",
    "10.0.0.0/33",
    "::1",
    "2001:db8::/32",
    "::ffff:1.2.3.4",
    "fe80::1%eth0",
    "10.0.0.0/08",
    "8080",
    "0",
    "00",
    "0080",
    "65536",
    "+80",
    "http",
    "/a",
    "/a/*",
    "/{*}",
    "/{**}",
    "/a/{*}/b/{**}",
    "/{**}/a",
    "/{**}/{*}",
    "{*}",
    "/a{*}",
    "/a*/{*}",
    "/a//{*}",
    "//{*}",
    "/{*}/",
    "cluster.local/ns/a/sa/b",
    "spiffe://cluster.local/ns/a/sa/b",
    "ns/account",
    "a/b/c",
    "/b",
    "a/",
    "*.example.com",
    "example.com:8080",
    "é",
    "a b",
];

const KEYS: [&str; 22] = [
    "source.ip",
    "remote.ip",
    "source.namespace",
    "source.principal",
    "source.serviceAccount",
    "source.trustDomain",
    "request.auth.principal",
    "request.auth.audiences",
    "request.auth.presenter",
    "destination.ip",
    "destination.port",
    "connection.sni",
    "request.headers[x-a]",
    "request.headers[:path]",
    "request.headers[]",
    "request.headers[a b]",
    "request.headersx[a]",
    "request.auth.claims[a]",
    "request.auth.claims[a][b]",
    "request.auth.claims[a]b",
    "experimental.envoy.filters.x[a]",
    "nothing",
];

fn values() -> impl Strategy<Value = Value> {
    proptest::collection::vec(proptest::sample::select(VALUES.to_vec()), 0..3).prop_map(|v| json!(v))
}

fn fields(names: &'static [&'static str]) -> impl Strategy<Value = Value> {
    let field = (proptest::sample::select(names.to_vec()), values());
    proptest::collection::vec(field, 1..3).prop_map(|m| Value::Object(m.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()))
}

fn rule() -> impl Strategy<Value = Value> {
    let source = fields(&[
        "principals",
        "notPrincipals",
        "requestPrincipals",
        "namespaces",
        "notNamespaces",
        "serviceAccounts",
        "notServiceAccounts",
        "ipBlocks",
        "notIpBlocks",
        "remoteIpBlocks",
        "trustDomains",
        "notTrustDomains",
    ]);
    let operation = fields(&["hosts", "notHosts", "ports", "notPorts", "methods", "notMethods", "paths", "notPaths"]);
    let condition = (proptest::sample::select(KEYS.to_vec()), values(), values());
    let condition = condition.prop_map(|(key, values, not)| json!({"key": key, "values": values, "notValues": not}));
    let parts = (
        proptest::collection::vec(source.prop_map(|s| json!({"source": s})), 0..2),
        proptest::collection::vec(operation.prop_map(|o| json!({"operation": o})), 0..2),
        proptest::collection::vec(condition, 0..2),
    );
    parts.prop_map(|(from, to, when)| {
        let all = [("from", from), ("to", to), ("when", when)];
        Value::Object(
            all.into_iter().filter(|(_, l)| !l.is_empty()).map(|(n, l)| (n.to_owned(), json!(l))).collect::<Map<_, _>>(),
        )
    })
}

fn authorization_spec() -> impl Strategy<Value = Value> {
    let action = proptest::sample::select(vec!["ALLOW", "DENY", "AUDIT", "CUSTOM"]);
    (action, proptest::option::of(Just(json!({"name": "x"}))), proptest::collection::vec(rule(), 0..2))
        .prop_map(|(action, provider, rules)| json!({"action": action, "provider": provider, "rules": rules}))
}

fn request_spec() -> impl Strategy<Value = Value> {
    let key = r#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"AQAB"}]}"#;
    let text = |all: &[&'static str]| proptest::option::of(proptest::sample::select(all.to_vec()));
    let names = || {
        proptest::option::of(proptest::collection::vec(proptest::sample::select(vec!["", "x", "X-A", ":path", "a b", "é"]), 0..2))
    };
    let rule = (
        text(&["", "i", "https://i", "http://i/x", "ftp://i", "https://u@i"]),
        text(&["", "https://a/k", "HTTP://a/k", "https://u@a/k", "ftp://a", "x", "http://169.254.169.254/"]),
        text(&["", key, "{}", r#"{"keys":[]}"#, r#"{"kty":"OKP","crv":"Ed25519","x":"AQAB"}"#, r#"{"keys":[{"kty":"X"}]}"#, "x"]),
        names(),
        (names(), names(), text(&["x", "a b", ":path", ""]), text(&["5s", "0s", "1us", "1m30s", "5", "x", "-1s"])),
    );
    rule.prop_map(|(issuer, uri, jwks, audiences, (params, headers, output, timeout))| {
        let headers = headers.map(|h| h.into_iter().map(|name| json!({"name": name})).collect::<Vec<_>>());
        json!({"jwtRules": [{"issuer": issuer, "jwksUri": uri, "jwks": jwks, "audiences": audiences, "fromParams": params,
            "fromHeaders": headers, "outputPayloadToHeader": output, "timeout": timeout}]})
    })
}

fn peer_spec() -> impl Strategy<Value = Value> {
    let mode = || proptest::sample::select(vec!["UNSET", "DISABLE", "PERMISSIVE", "STRICT", "strict"]);
    let port = proptest::sample::select(vec!["1", "8080", "65535", "65536", "0", "http", "08", "-1"]);
    let ports = proptest::option::of(proptest::collection::vec((port, mode()), 0..2));
    (mode(), ports, any::<bool>()).prop_map(|(mode, ports, select)| {
        let ports = ports.map(|p| p.into_iter().map(|(p, m)| (p.to_owned(), json!({"mode": m}))).collect::<Map<_, _>>());
        let selector = if select { json!({"matchLabels": {"app": "a"}}) } else { Value::Null };
        json!({"mtls": {"mode": mode}, "portLevelMtls": ports, "selector": selector})
    })
}

fn object(kind: Kind, spec: &Value) -> Value {
    let metadata = json!({"name": "p", "namespace": "shop"});
    json!({"apiVersion": "security.istio.io/v1", "kind": kind.as_str(), "metadata": metadata, "spec": spec})
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn what_is_valid_is_understood(authorization in authorization_spec(), request in request_spec(), peer in peer_spec()) {
        for (kind, spec) in [(Kind::AuthorizationPolicy, authorization), (Kind::RequestAuthentication, request), (Kind::PeerAuthentication, peer)] {
            let object = object(kind, &spec);
            let verdict = validate(kind, &object, &Nothing);
            let problem = match kind {
                Kind::AuthorizationPolicy => authorization::read(object).problem,
                Kind::RequestAuthentication => jwt::read(object).problem,
                Kind::PeerAuthentication => peer::read(object).problem,
            };
            if verdict.is_valid() {
                prop_assert_eq!(problem, None, "{}", spec);
            }
        }
    }
}
