//! Policies and requests out of a seed: from few words, so that they meet often, with everything in them that has fooled proxies before.

use crate::case::{Call, IDENTITIES, Mode, Set};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Map, Value, json};
use std::net::Ipv4Addr;

const HOSTS: &[&str] = &[
    "a.example",
    "A.Example",
    "a.example:8080",
    "b.example",
    "x.a.example",
    "a.example.",
    "127.0.0.1",
    "[::1]:80",
    "b.example:80",
    "a_b.example",
    "",
];
const HOST_PATTERNS: &[&str] =
    &["a.example", "A.EXAMPLE", "a.example:*", "*.example", "*.a.example", "a*", "*", "b.example:80", "*:8080", "127.0.0.1"];
const METHODS: &[&str] =
    &["GET", "GET", "GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "get", "Get", "PURGE", "CUSTOM"];
const METHOD_PATTERNS: &[&str] = &["GET", "POST", "P*", "*T", "*", "get", "DELETE", "HEAD"];
const SEGMENTS: &[&str] = &[
    "admin",
    "admin",
    "admin",
    "public",
    "a",
    "b",
    "A",
    "Admin",
    "%61dmin",
    "adm%69n",
    "a%64min",
    "..",
    "..",
    ".",
    "%2e",
    "%2E",
    "%2e%2e",
    ".%2e",
    "%2E.",
    "...",
    "..;",
    "admin;x=1",
    ";x",
    ";",
    "",
    "",
    "a.b",
    "a%2fb",
    "a%2Fadmin",
    "..%2fadmin",
    "%2e%2e%2fadmin",
    "a%5cb",
    "..%5cadmin",
    "a\\admin",
    "..\\admin",
    "%5c..",
    "%20",
    "a%20b",
    "+",
    "~",
    "%7e",
    "%7E",
    "%25",
    "%252e%252e",
    "%252fadmin",
    "%",
    "%2",
    "%zz",
    "%2G",
    "*",
    ":",
    "@",
    "!",
    "$",
    "'",
    "(a)",
    ",",
    "=",
    "&",
    "a=b",
    "{x}",
    "|",
    "^",
    "`",
    "\"",
    "<a>",
    "[a]",
    "%00",
    "%0a",
    "%ff",
    "%c0%ae",
    "%c3%a9",
    "\u{e9}",
];
const JOINTS: &[&str] = &["/", "/", "/", "/", "/", "/", "//", "\\", "%2f", "%5C", "/./"];
const TAILS: &[&str] = &[
    "",
    "",
    "",
    "",
    "/",
    "?",
    "?q=1",
    "?q=/admin",
    "?/../admin",
    "#f",
    "#",
    "?a#b",
    "#?x",
    "//",
    "/.",
    "/..",
    "%3fq",
    "%23f",
    ";",
    "/;x",
];
const PATH_PATTERNS: &[&str] = &[
    "/admin",
    "/admin",
    "/admin/*",
    "/admin*",
    "*/admin",
    "*admin",
    "*",
    "/",
    "/public",
    "/public*",
    "/a",
    "/a/*",
    "/a/{*}",
    "/{*}/admin",
    "/a/{**}",
    "/{**}/admin",
    "/{*}",
    "/a/{*}/b",
    "/{**}",
    "/Admin",
    "/a.b",
    "*/a",
    "/a/admin",
    "//admin",
    "*;x",
    "/admin/",
    "/a%2Fb",
    "/a%5Cb",
    "/%25",
];
const HEADERS: &[&str] = &[
    "X-Tenant: a",
    "x-tenant: b",
    "X-TENANT: ab",
    "x-tenant:",
    "x-tenant: a,b",
    "x-tenant:  a  ",
    "x-tenant: A",
    "x-debug: 1",
    "X-Debug: true",
    "x-tenant: a b",
    "x-forwarded-for: 10.1.1.1",
    "x-tenant: \t b",
];
const HEADER_KEYS: &[&str] = &["request.headers[x-tenant]", "request.headers[X-Tenant]", "request.headers[x-debug]"];
const HEADER_PATTERNS: &[&str] = &["a", "b", "*", "a*", "*b", "a,b", "1", "A", "a,a"];
const SOURCES: &[Ipv4Addr] = &[Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 0, 0, 2), Ipv4Addr::new(127, 1, 2, 3)];
const BLOCKS: &[&str] =
    &["127.0.0.0/8", "127.0.0.1", "127.0.0.2/32", "127.1.0.0/16", "10.0.0.0/8", "0.0.0.0/0", "127.0.0.1/31", "::/0", "::1"];
/// Both proxies' addresses are in each of them or in none.
const DESTINATIONS: &[&str] = &["127.0.0.0/8", "127.0.3.0/24", "10.0.0.0/8", "127.0.2.0/24"];
const PRINCIPALS: &[&str] = &[
    "cluster.local/ns/default/sa/frontend",
    "cluster.local/ns/prod/sa/frontend",
    "*",
    "cluster.local/ns/default/*",
    "*/sa/frontend",
    "*frontend2",
    "cluster.local/ns/default/sa/a.b",
    "cluster.local/ns/default/sa/axb",
    "cluster.local/ns/default*",
    "other.local/ns/default/sa/frontend",
];
const NAMESPACES: &[&str] = &["default", "prod", "prod*", "*", "*-eu", "p*d", "def.ult", "d*x"];
const ACCOUNTS: &[&str] = &["default/frontend", "prod/frontend", "prod-eu/api", "default/a.b", "default/axb", "default/front"];
const NAMES: &[&str] = &["a.example", "b.example", "x.a.example"];
const NAME_PATTERNS: &[&str] = &["a.example", "*.example", "a*", "*", "c.example"];

struct Dice(StdRng);

impl Dice {
    fn chance(&mut self, percent: u32) -> bool {
        self.0.random_range(0..100) < percent
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.0.random_range(0..from.len())]
    }

    fn some(&mut self, from: &[&str]) -> Value {
        let n = if self.chance(70) { 1 } else { self.0.random_range(2..=3) };
        (0..n).map(|_| self.pick(from)).collect()
    }
}

/// `count` pods, each with some policies and `calls` requests, listening on ports from `first_port` on.
pub(crate) fn sets(seed: u64, count: usize, calls: usize, first_port: u16) -> Vec<Set> {
    let mut dice = Dice(StdRng::seed_from_u64(seed));
    let each = (0..count).map(|n| {
        let port = first_port + n as u16;
        let http = !dice.chance(10);
        let number = dice.pick(&[1, 1, 1, 2, 2, 3]);
        let raw: Vec<Value> = (0..number).map(|_| policy(&mut dice, port)).collect();
        let policies =
            raw.iter().map(|spec| serde_json::from_value(spec.clone()).expect("the generator knows the schema")).collect();
        let mode = dice.pick(&[Mode::Base, Mode::Base, Mode::None, Mode::MergeSlashes, Mode::DecodeAndMergeSlashes]);
        let calls = if http { calls } else { calls / 8 };
        Set { port, mode, http, policies, raw, calls: (0..calls).map(|_| call(&mut dice)).collect() }
    });
    each.collect()
}

fn policy(dice: &mut Dice, port: u16) -> Value {
    let action = dice.pick(&["ALLOW", "ALLOW", "DENY"]);
    if action == "ALLOW" && dice.chance(5) {
        return json!({"action": "ALLOW"});
    }
    let number = dice.pick(&[1, 1, 2, 3]);
    let rules: Vec<Value> = (0..number).map(|_| rule(dice, port)).collect();
    json!({"action": action, "rules": rules})
}

fn rule(dice: &mut Dice, port: u16) -> Value {
    let mut rule = Map::new();
    if dice.chance(45) {
        let number = dice.pick(&[1, 1, 2]);
        let from: Vec<Value> = (0..number).map(|_| json!({"source": source(dice)})).collect();
        rule.insert("from".into(), from.into());
    }
    if dice.chance(75) {
        let number = dice.pick(&[1, 1, 2]);
        let to: Vec<Value> = (0..number).map(|_| json!({"operation": operation(dice, port)})).collect();
        rule.insert("to".into(), to.into());
    }
    if dice.chance(25) {
        let number = dice.pick(&[1, 1, 2]);
        let when: Vec<Value> = (0..number).map(|_| condition(dice, port)).collect();
        rule.insert("when".into(), when.into());
    }
    Value::Object(rule)
}

/// One or two fields, each positive or `not…`.
fn fields(dice: &mut Dice, from: &[(&str, &str, &[&str])]) -> Value {
    let mut out = Map::new();
    for _ in 0..dice.pick(&[1, 1, 2]) {
        let (yes, no, words) = dice.pick(from);
        let name = if dice.chance(30) { no } else { yes };
        let words = dice.some(words);
        out.insert(name.into(), words);
    }
    Value::Object(out)
}

fn source(dice: &mut Dice) -> Value {
    let mut source = fields(
        dice,
        &[
            ("principals", "notPrincipals", PRINCIPALS),
            ("principals", "notPrincipals", PRINCIPALS),
            ("namespaces", "notNamespaces", NAMESPACES),
            ("serviceAccounts", "notServiceAccounts", ACCOUNTS),
            ("ipBlocks", "notIpBlocks", BLOCKS),
            ("remoteIpBlocks", "notRemoteIpBlocks", BLOCKS),
        ],
    );
    // Not allowed together.
    if let Some(source) = source.as_object_mut()
        && (source.contains_key("serviceAccounts") || source.contains_key("notServiceAccounts"))
    {
        source.retain(|key, _| !matches!(key.as_str(), "principals" | "notPrincipals" | "namespaces" | "notNamespaces"));
    }
    source
}

fn operation(dice: &mut Dice, port: u16) -> Value {
    let own = port.to_string();
    let ports = [own.as_str(), "9", own.as_str()];
    fields(
        dice,
        &[
            ("paths", "notPaths", PATH_PATTERNS),
            ("paths", "notPaths", PATH_PATTERNS),
            ("paths", "notPaths", PATH_PATTERNS),
            ("methods", "notMethods", METHOD_PATTERNS),
            ("hosts", "notHosts", HOST_PATTERNS),
            ("ports", "notPorts", &ports),
        ],
    )
}

fn condition(dice: &mut Dice, port: u16) -> Value {
    let own = port.to_string();
    let ports = [own.as_str(), "9"];
    let header = dice.pick(HEADER_KEYS);
    let (key, words): (&str, &[&str]) = dice.pick(&[
        (header, HEADER_PATTERNS),
        (header, HEADER_PATTERNS),
        (header, HEADER_PATTERNS),
        ("source.ip", BLOCKS),
        ("remote.ip", BLOCKS),
        ("source.namespace", NAMESPACES),
        ("source.principal", PRINCIPALS),
        ("destination.ip", DESTINATIONS),
        ("destination.port", ports.as_slice()),
        ("connection.sni", NAME_PATTERNS),
    ]);
    let mut condition = Map::new();
    condition.insert("key".into(), key.into());
    let which = dice.pick(&[(true, false), (true, false), (false, true), (true, true)]);
    if which.0 {
        condition.insert("values".into(), dice.some(words));
    }
    if which.1 {
        condition.insert("notValues".into(), dice.some(words));
    }
    Value::Object(condition)
}

fn call(dice: &mut Dice) -> Call {
    let identity = dice.chance(60).then(|| dice.0.random_range(0..IDENTITIES.len()));
    let sni = (identity.is_some() && dice.chance(50)).then(|| dice.pick(NAMES));
    let method = dice.pick(METHODS);
    let mut line = method.as_bytes().to_vec();
    line.push(b' ');
    line.extend_from_slice(&target(dice));
    let mut headers = Vec::new();
    if !dice.chance(3) {
        let host = dice.pick(HOSTS);
        headers.push(format!("{}: {host}", dice.pick(&["Host", "host", "HOST"])).into_bytes());
        if dice.chance(2) {
            headers.push(format!("Host: {}", dice.pick(HOSTS)).into_bytes());
        }
    }
    while dice.chance(45) {
        headers.push(dice.pick(HEADERS).as_bytes().to_vec());
    }
    Call { identity, source: dice.pick(SOURCES), sni, line, headers }
}

fn target(dice: &mut Dice) -> Vec<u8> {
    if dice.chance(1) {
        return b"*".to_vec();
    }
    let mut target = Vec::new();
    if dice.chance(4) {
        target.extend_from_slice(b"http://");
        target.extend_from_slice(dice.pick(HOSTS).as_bytes());
    }
    let number = dice.pick(&[1, 1, 2, 2, 3, 4]);
    for n in 0..number {
        target.extend_from_slice(if n == 0 { "/" } else { dice.pick(JOINTS) }.as_bytes());
        target.extend_from_slice(dice.pick(SEGMENTS).as_bytes());
    }
    target.extend_from_slice(dice.pick(TAILS).as_bytes());
    target
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_says_everything() {
        let (one, two) = (sets(7, 20, 5, 1000), sets(7, 20, 5, 1000));
        assert!(one.iter().zip(&two).all(|(a, b)| a.policies == b.policies && a.calls == b.calls && a.mode == b.mode));
        assert!(one.iter().any(|set| set.policies != sets(8, 1, 5, 1000)[0].policies));
        assert!(one.iter().any(|set| set.http) && one.iter().all(|set| !set.policies.is_empty()));
    }

    #[test]
    fn requests_stay_one_request() {
        for set in sets(3, 50, 40, 1000) {
            for call in set.calls {
                let bytes = call.bytes();
                assert_eq!(bytes.windows(4).filter(|w| *w == b"\r\n\r\n").count(), 1, "{}", call.words());
                assert!(bytes.ends_with(b"\r\n\r\n"));
            }
        }
    }
}
