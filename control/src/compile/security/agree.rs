//! Admission and the compiler must agree: what is let into the cluster has to be in force.

use super::{authorization, jwt, peer};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Map, Value, json};
use weft_webhook::validate::{Kind, Nothing, validate};

/// Makes objects of values that are sometimes wrong.
struct Maker(StdRng);

impl Maker {
    fn one<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of.choose(&mut self.0).unwrap()
    }

    fn list(&mut self, of: &[&str]) -> Value {
        let count = self.0.random_range(0..3);
        json!((0..count).map(|_| self.one(of)).collect::<Vec<_>>())
    }

    /// Each field with some probability.
    fn some(&mut self, fields: &[(&str, &[&str])], to: &mut Map<String, Value>) {
        for (name, values) in fields {
            if self.0.random_bool(0.15) {
                to.insert((*name).into(), self.list(values));
            }
        }
    }

    fn object(&mut self, kind: Kind, spec: Map<String, Value>) -> Value {
        let namespace = self.one(&["shop", "weft-system"]);
        json!({"apiVersion": self.one(&["security.istio.io/v1", "security.istio.io/v1beta1"]), "kind": kind.as_str(),
            "metadata": {"name": "p", "namespace": namespace}, "spec": spec})
    }

    fn selector(&mut self, spec: &mut Map<String, Value>) {
        match self.0.random_range(0..6) {
            0 => drop(spec.insert("selector".into(), json!({"matchLabels": {"app": "web"}}))),
            1 => drop(spec.insert("selector".into(), json!({}))),
            2 => drop(spec.insert("targetRefs".into(), json!([{"kind": "Service", "name": "s"}]))),
            _ => {}
        }
    }
}

const NAMES: &[&str] = &["a", "a*", "*a", "*", "a*b", "", "a.b|c", "cluster.local/ns/a/sa/b", "https://me/joe", "*/x"];
const ACCOUNTS: &[&str] = &["a", "n/a", "a/b/c", "a*", "", "/a", "a/"];
const BLOCKS: &[&str] = &["10.0.0.1", "10.0.0.0/8", "10.1.2.3/8", "fd00::/8", "::1", "x", "10.0.0.0/33", ""];
const PORTS: &[&str] = &["80", "0", "65535", "65536", "http", "", "+80", "080"];
const METHODS: &[&str] = &["GET", "*", "P*", "get", "", "M-SEARCH"];
const PATHS: &[&str] = &[
    "/a",
    "/a*",
    "*/a",
    "*",
    "/a*b",
    "/{*}",
    "/a/{**}",
    "/{**}/a",
    "/{*}/{**}",
    "/a/{*}x",
    "{*}",
    "/a/{**}/",
    "/{*}/",
    "//{*}",
    "/{*}//a",
    "a",
    "",
    "/{a}",
    "/%41/{*}",
    "/é/{*}",
    "/{*}*",
    "/{**}*",
];
const KEYS: &[&str] = &[
    "request.headers[x]",
    "request.headers[X-y]",
    "request.headers",
    "request.headers[]",
    "request.headers[a][b]",
    "source.ip",
    "remote.ip",
    "source.namespace",
    "source.principal",
    "source.serviceAccount",
    "source.trustDomain",
    "request.auth.principal",
    "request.auth.audiences",
    "request.auth.presenter",
    "request.auth.claims[a]",
    "request.auth.claims[a][b]",
    "request.auth.claims",
    "request.auth.claims[a]b",
    "request.auth.claims[]",
    "destination.ip",
    "destination.port",
    "connection.sni",
    "source.port",
    "",
    "experimental.envoy.filters.a[b]",
];
const VALUES: &[&str] = &["a", "10.0.0.1", "10.0.0.0/8", "80", "n/a", "*", "a*", "*a", "a*b", ""];

fn rule(maker: &mut Maker) -> Value {
    let mut rule = Map::new();
    if maker.0.random_bool(0.6) {
        let mut source = Map::new();
        maker.some(
            &[
                ("principals", NAMES),
                ("notPrincipals", NAMES),
                ("requestPrincipals", NAMES),
                ("notRequestPrincipals", NAMES),
                ("namespaces", NAMES),
                ("notNamespaces", NAMES),
                ("serviceAccounts", ACCOUNTS),
                ("notServiceAccounts", ACCOUNTS),
                ("trustDomains", NAMES),
                ("notTrustDomains", NAMES),
                ("ipBlocks", BLOCKS),
                ("notIpBlocks", BLOCKS),
                ("remoteIpBlocks", BLOCKS),
                ("notRemoteIpBlocks", BLOCKS),
            ],
            &mut source,
        );
        rule.insert("from".into(), json!([{"source": source}]));
    }
    if maker.0.random_bool(0.6) {
        let mut operation = Map::new();
        maker.some(
            &[
                ("hosts", NAMES),
                ("notHosts", NAMES),
                ("ports", PORTS),
                ("notPorts", PORTS),
                ("methods", METHODS),
                ("notMethods", METHODS),
                ("paths", PATHS),
                ("notPaths", PATHS),
            ],
            &mut operation,
        );
        rule.insert("to".into(), json!([{"operation": operation}]));
    }
    if maker.0.random_bool(0.4) {
        let mut condition = Map::from_iter([("key".to_owned(), json!(maker.one(KEYS)))]);
        condition.insert("values".into(), maker.list(VALUES));
        if maker.0.random_bool(0.3) {
            condition.insert("notValues".into(), maker.list(VALUES));
        }
        rule.insert("when".into(), json!([condition]));
    }
    Value::Object(rule)
}

fn authorization_policy(maker: &mut Maker) -> Value {
    let mut spec = Map::new();
    maker.selector(&mut spec);
    if maker.0.random_bool(0.7) {
        spec.insert("action".into(), json!(maker.one(&["ALLOW", "DENY", "AUDIT", "CUSTOM", "PERMIT"])));
    }
    if maker.0.random_bool(0.2) {
        spec.insert("provider".into(), json!({"name": maker.one(&["opa", ""])}));
    }
    let count = maker.0.random_range(0..3);
    spec.insert("rules".into(), (0..count).map(|_| rule(maker)).collect());
    maker.object(Kind::AuthorizationPolicy, spec)
}

fn peer_authentication(maker: &mut Maker) -> Value {
    let mode = |maker: &mut Maker| json!({"mode": maker.one(&["UNSET", "DISABLE", "PERMISSIVE", "STRICT", "STRIKT"])});
    let mut spec = Map::new();
    maker.selector(&mut spec);
    if maker.0.random_bool(0.7) {
        spec.insert("mtls".into(), mode(maker));
    }
    if maker.0.random_bool(0.4) {
        let port = maker.one(&["80", "0", "65535", "65536", "x"]);
        let mode = mode(maker);
        spec.insert("portLevelMtls".into(), json!({port: mode}));
    }
    maker.object(Kind::PeerAuthentication, spec)
}

fn request_authentication(maker: &mut Maker) -> Value {
    let mut rule = Map::new();
    let issuer = maker.one(&["https://me", "https://me.example/x/", "http://10.0.0.1:80", ""]);
    rule.insert("issuer".into(), json!(issuer));
    if maker.0.random_bool(0.4) {
        rule.insert(
            "jwksUri".into(),
            json!(maker.one(&["https://me/keys", "http://10.0.0.1:80/k?x=1", "ftp://x", "x", "http:///x"])),
        );
    }
    if maker.0.random_bool(0.3) {
        let rsa = r#"{"keys":[{"kty":"RSA","n":"AQAB","e":"AQAB"}]}"#;
        rule.insert(
            "jwks".into(),
            json!(maker.one(&[rsa, r#"{"keys":[]}"#, r#"{"kty":"RSA","n":"AQAB","e":"AQAB"}"#, "[]", "x", "{}"])),
        );
    }
    let texts: &[&str] = &["a", "x-y", ""];
    maker
        .some(&[("audiences", texts), ("fromParams", texts), ("fromCookies", texts), ("spaceDelimitedClaims", texts)], &mut rule);
    if maker.0.random_bool(0.2) {
        rule.insert("fromHeaders".into(), json!([{"name": maker.one(&["x", "x y", ""]), "prefix": maker.one(&["", "Bearer "])}]));
    }
    if maker.0.random_bool(0.2) {
        let (header, claim) = (maker.one(&["x", "x y", ""]), maker.one(&["a", "a.b", ""]));
        rule.insert("outputClaimToHeaders".into(), json!([{"header": header, "claim": claim}]));
    }
    if maker.0.random_bool(0.2) {
        rule.insert("outputPayloadToHeader".into(), json!(maker.one(&["x", "x y", ""])));
    }
    if maker.0.random_bool(0.2) {
        rule.insert("timeout".into(), json!(maker.one(&["5s", "0s", "1.5s", "soon", "1h"])));
    }
    let mut spec = Map::from_iter([("jwtRules".to_owned(), json!([rule]))]);
    maker.selector(&mut spec);
    maker.object(Kind::RequestAuthentication, spec)
}

/// How many of the objects admission accepts; each of them must be understood.
fn accepted(kind: Kind, make: fn(&mut Maker) -> Value, problem: fn(Value) -> Option<String>) -> usize {
    let mut maker = Maker(StdRng::seed_from_u64(1));
    let mut accepted = 0;
    let mut disagreements = std::collections::BTreeMap::new();
    for _ in 0..20_000 {
        let object = make(&mut maker);
        if validate(kind, &object, &Nothing).errors.is_empty() {
            accepted += 1;
            if let Some(problem) = problem(object.clone()) {
                disagreements.insert(problem, object);
            }
        }
    }
    assert!(disagreements.is_empty(), "admission accepts what is then refused: {disagreements:#?}");
    accepted
}

#[test]
fn what_admission_accepts_is_in_force() {
    let counts = [
        accepted(Kind::AuthorizationPolicy, authorization_policy, |o| authorization::read(o).problem),
        accepted(Kind::PeerAuthentication, peer_authentication, |o| peer::read(o).problem),
        accepted(Kind::RequestAuthentication, request_authentication, |o| jwt::read(o).problem),
    ];
    assert!(counts.iter().all(|count| *count > 300), "too few were accepted for this to say anything: {counts:?}");
}
