//! Random policies and requests over a small world, so that they meet: a handful of names, addresses, paths and headers.

use super::naive::{Http, Request};
use serde_json::{Map, Value, json};
use weft_api::wire::condition::Attribute;
use weft_api::wire::external_authorizer::Protocol;
use weft_api::wire::string_match::Kind;
use weft_api::wire::{self, StringMatch};

/// xorshift64*: reproducible, and fast also where nothing is optimised.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        ((self.next() >> 33) as usize) % n
    }

    /// True one time in `n`.
    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len())]
    }
}

const DOMAINS: [&str; 4] = ["cluster.local", "td1", "td2", "other"];
const NAMESPACES: [&str; 3] = ["a", "ab", "b"];
const ACCOUNTS: [&str; 3] = ["x", "xy", "z"];
const ADDRESSES: [&str; 6] = ["10.0.0.1", "10.0.1.1", "10.1.0.1", "::ffff:10.0.0.1", "fd00::1", "fd01::1"];
const BLOCKS: [&str; 8] = ["10.0.0.0/24", "10.0.0.1", "10.0.0.0/15", "10.0.1.7/16", "fd00::/8", "fd00::1", "0.0.0.0/0", "::/0"];
const PORTS: [u32; 3] = [80, 8080, 443];
const METHODS: [&str; 4] = ["GET", "POST", "get", "GETS"];
const HOSTS: [&str; 6] = ["h", "H", "h:80", "x.h", "X.H", ""];
const PATHS: [&str; 12] = ["/", "/a", "/a/", "/a/b", "/a/b/c", "/ab", "/b", "/a//b", "/a/b/a", "", "/a/bb/c", "/A"];
const TEMPLATES: [&str; 8] = ["/{*}", "/a/{*}", "/a/{**}", "/{**}", "/{*}/b", "/{**}/c", "/a/{*}/{**}", "/{*}/{*}"];
const HEADERS: [&str; 4] = ["x-a", "x-b", "x-c", ":path"];
const TEXTS: [&str; 5] = ["1", "12", "2", "", "1,2"];
const ISSUERS: [&str; 2] = ["i", "https://i/"];
const SUBJECTS: [&str; 3] = ["s", "st", ""];

fn principal(rng: &mut Rng) -> String {
    if rng.one_in(30) {
        return rng.pick(&["td1/x", "cluster.local", "td1/ns/a/sa/", "td1/ns/a/sa/x/y"]).into();
    }
    format!("{}/ns/{}/sa/{}", rng.pick(&DOMAINS), rng.pick(&NAMESPACES), rng.pick(&ACCOUNTS))
}

/// A pattern that is made of a text of the world.
fn pattern(rng: &mut Rng, text: &str) -> StringMatch {
    let cut = (0..=text.len()).filter(|at| text.is_char_boundary(*at)).nth(rng.below(text.len() + 1)).unwrap_or(0);
    let kind = match rng.below(10) {
        0..=4 => Kind::Exact(text.into()),
        5 | 6 => Kind::Prefix(text[..cut].into()),
        7 | 8 => Kind::Suffix(text[cut..].into()),
        _ => Kind::Present(true),
    };
    let kind = if rng.one_in(400) { None } else { Some(kind) };
    StringMatch { kind }
}

/// None mostly, else one to three values.
fn list<T>(rng: &mut Rng, rarity: usize, mut one: impl FnMut(&mut Rng) -> T) -> Vec<T> {
    if !rng.one_in(rarity) {
        return Vec::new();
    }
    let n = 1 + rng.below(3);
    (0..n).map(|_| one(rng)).collect()
}

fn pick_pattern(rng: &mut Rng, texts: &[&str]) -> StringMatch {
    let text = rng.pick(texts);
    pattern(rng, text)
}

fn principals(rng: &mut Rng) -> StringMatch {
    let text = principal(rng);
    pattern(rng, &text)
}

fn request_principals(rng: &mut Rng) -> StringMatch {
    let text = format!("{}/{}", rng.pick(&ISSUERS), rng.pick(&SUBJECTS));
    pattern(rng, &text)
}

fn namespaces(rng: &mut Rng) -> StringMatch {
    if rng.one_in(3) {
        return StringMatch { kind: Some(Kind::Glob(rng.pick(&["*", "a*", "*b", "a*b", "**", "b"]).into())) };
    }
    pick_pattern(rng, &NAMESPACES)
}

fn accounts(rng: &mut Rng) -> String {
    if rng.one_in(200) {
        return "a".into();
    }
    format!("{}/{}", rng.pick(&NAMESPACES), rng.pick(&ACCOUNTS))
}

fn blocks(rng: &mut Rng) -> String {
    if rng.one_in(300) { "10.0.0.0/33".into() } else { rng.pick(&BLOCKS).into() }
}

fn ports(rng: &mut Rng) -> u32 {
    if rng.one_in(300) { 70000 } else { rng.pick(&PORTS) }
}

fn paths(rng: &mut Rng) -> StringMatch {
    match rng.below(200) {
        0 => StringMatch { kind: Some(Kind::Template(rng.pick(&["/a{*}", "{*}", "/{**}/{*}"]).into())) },
        1..=60 => StringMatch { kind: Some(Kind::Template(rng.pick(&TEMPLATES).into())) },
        _ => pick_pattern(rng, &PATHS),
    }
}

fn source(rng: &mut Rng) -> wire::Source {
    wire::Source {
        principals: list(rng, 2, principals),
        not_principals: list(rng, 6, principals),
        request_principals: list(rng, 8, request_principals),
        not_request_principals: list(rng, 14, request_principals),
        namespaces: list(rng, 5, namespaces),
        not_namespaces: list(rng, 9, namespaces),
        service_accounts: list(rng, 8, accounts),
        not_service_accounts: list(rng, 14, accounts),
        trust_domains: list(rng, 12, |rng| pick_pattern(rng, &DOMAINS)),
        not_trust_domains: list(rng, 18, |rng| pick_pattern(rng, &DOMAINS)),
        ip_blocks: list(rng, 7, blocks),
        not_ip_blocks: list(rng, 12, blocks),
        remote_ip_blocks: list(rng, 12, blocks),
        not_remote_ip_blocks: list(rng, 15, blocks),
    }
}

fn operation(rng: &mut Rng) -> wire::Operation {
    wire::Operation {
        hosts: list(rng, 5, |rng| pick_pattern(rng, &HOSTS)),
        not_hosts: list(rng, 9, |rng| pick_pattern(rng, &HOSTS)),
        ports: list(rng, 5, ports),
        not_ports: list(rng, 9, ports),
        methods: list(rng, 4, |rng| pick_pattern(rng, &METHODS)),
        not_methods: list(rng, 9, |rng| pick_pattern(rng, &METHODS)),
        paths: list(rng, 2, paths),
        not_paths: list(rng, 7, paths),
    }
}

fn condition(rng: &mut Rng) -> wire::Condition {
    let attribute = if rng.one_in(200) { 99 } else { rng.below(14) as i32 };
    let mut path = Vec::new();
    let mut one: Box<dyn FnMut(&mut Rng) -> StringMatch> = Box::new(|rng| pick_pattern(rng, &TEXTS));
    let exactly = |text: String| StringMatch { kind: Some(Kind::Exact(text)) };
    match Attribute::try_from(attribute) {
        Ok(Attribute::RequestHeader) => {
            path = vec![rng.pick(&["x-a", "X-A", "x-b", "x-c", ":path", "host", ":method", ""]).to_owned()];
            if path[0] == ":path" {
                one = Box::new(paths);
            } else if path[0] == "host" {
                one = Box::new(|rng| pick_pattern(rng, &HOSTS));
            }
        }
        Ok(Attribute::SourceIp | Attribute::RemoteIp | Attribute::DestinationIp) => {
            one = Box::new(move |rng| exactly(blocks(rng)));
        }
        Ok(Attribute::DestinationPort) => one = Box::new(move |rng| exactly(ports(rng).to_string())),
        Ok(Attribute::SourceNamespace) => one = Box::new(namespaces),
        Ok(Attribute::SourcePrincipal) => one = Box::new(principals),
        Ok(Attribute::SourceServiceAccount) => one = Box::new(move |rng| exactly(accounts(rng))),
        Ok(Attribute::SourceTrustDomain) => one = Box::new(|rng| pick_pattern(rng, &DOMAINS)),
        Ok(Attribute::RequestPrincipal) => one = Box::new(request_principals),
        Ok(Attribute::ConnectionSni) => one = Box::new(|rng| pick_pattern(rng, &HOSTS)),
        Ok(Attribute::RequestClaim) => {
            path =
                rng.pick(&[&["g"][..], &["g", "h"], &["scope"], &["n"], &["none"]]).iter().map(|part| (*part).into()).collect();
            if rng.one_in(50) {
                path.clear();
            }
        }
        Ok(Attribute::RequestAudiences | Attribute::RequestPresenter) | Err(_) => {}
    }
    let values = list(rng, 2, &mut one);
    // Rarely neither.
    let rarity = if values.is_empty() && !rng.one_in(30) { 1 } else { 5 };
    let not_values = list(rng, rarity, &mut one);
    wire::Condition { attribute, path, values, not_values }
}

fn authorizer(rng: &mut Rng) -> Option<wire::ExternalAuthorizer> {
    let protocol = match rng.below(8) {
        0 => return None,
        1 => None,
        2..=4 => Some(Protocol::Http(wire::HttpAuthorizer::default())),
        _ => Some(Protocol::Grpc(wire::GrpcAuthorizer {})),
    };
    let name = rng.pick(&["one", "two"]).to_owned();
    let address = if rng.one_in(20) { String::new() } else { format!("{name}.ext:9000") };
    Some(wire::ExternalAuthorizer { name, address, protocol, ..wire::ExternalAuthorizer::default() })
}

fn rule(rng: &mut Rng) -> wire::AuthorizationRule {
    let part = |rng: &mut Rng| if rng.one_in(2) { 0 } else { 1 + rng.below(2) };
    let (from, to) = (part(rng), part(rng));
    let when = if rng.one_in(3) { 1 + rng.below(2) } else { 0 };
    wire::AuthorizationRule {
        from: (0..from).map(|_| source(rng)).collect(),
        to: (0..to).map(|_| operation(rng)).collect(),
        when: (0..when).map(|_| condition(rng)).collect(),
    }
}

pub(crate) fn policy(rng: &mut Rng) -> wire::AuthorizationPolicy {
    let action = match rng.below(200) {
        0 => 9,
        1..=80 => 0,
        81..=140 => 1,
        141..=165 => 2,
        _ => 3,
    };
    let rules = if rng.one_in(12) { 0 } else { 1 + rng.below(3) };
    wire::AuthorizationPolicy {
        namespace: "n".into(),
        name: "p".into(),
        action,
        dry_run: rng.one_in(6),
        rules: (0..rules).map(|_| rule(rng)).collect(),
        authorizer: if action == 3 { authorizer(rng) } else { None },
        broken: if rng.one_in(60) { "why".into() } else { String::new() },
    }
}

pub(crate) fn trust_domains(rng: &mut Rng) -> Vec<String> {
    let list: &[&str] = rng.pick(&[&["cluster.local"][..], &["td1", "td2"], &["td1"], &[]]);
    list.iter().map(|domain| (*domain).into()).collect()
}

fn token(rng: &mut Rng) -> Map<String, Value> {
    let mut claims = Map::new();
    claims.insert("iss".into(), rng.pick(&ISSUERS).into());
    if !rng.one_in(6) {
        claims.insert("sub".into(), rng.pick(&SUBJECTS).into());
    }
    let text = |rng: &mut Rng| Value::from(rng.pick(&TEXTS));
    let aud = match rng.below(3) {
        0 => text(rng),
        1 => json!([text(rng), text(rng)]),
        _ => Value::Null,
    };
    claims.insert("aud".into(), aud);
    if rng.one_in(2) {
        claims.insert("azp".into(), text(rng));
    }
    let group = match rng.below(5) {
        0 => text(rng),
        1 => json!([text(rng), 1, text(rng)]),
        2 => json!({"h": text(rng)}),
        3 => json!({"h": [text(rng), text(rng)]}),
        _ => json!(1),
    };
    claims.insert("g".into(), group);
    claims.insert("scope".into(), rng.pick(&["1 2", "12", " 1", ""]).into());
    claims.insert("n".into(), rng.pick(&[json!(1), json!(true), json!("1")].each_ref()).clone());
    claims
}

pub(crate) fn request(rng: &mut Rng) -> Request {
    let http = (!rng.one_in(5)).then(|| {
        let n = rng.below(4);
        let headers = (0..n).map(|_| (rng.pick(&HEADERS[..3]).to_owned(), rng.pick(&TEXTS).to_owned())).collect();
        Http {
            method: rng.pick(&METHODS).into(),
            host: rng.pick(&HOSTS).into(),
            path: rng.pick(&PATHS).into(),
            query: rng.one_in(4).then(|| rng.pick(&["", "q", "a/b"]).into()),
            headers,
            token: rng.one_in(2).then(|| token(rng)),
        }
    });
    Request {
        principal: (!rng.one_in(4)).then(|| principal(rng)),
        source_ip: rng.pick(&ADDRESSES).parse().unwrap(),
        remote_ip: rng.pick(&ADDRESSES).parse().unwrap(),
        destination: std::net::SocketAddr::new(rng.pick(&ADDRESSES).parse().unwrap(), rng.pick(&PORTS) as u16),
        sni: rng.one_in(2).then(|| rng.pick(&HOSTS).into()),
        http,
    }
}
