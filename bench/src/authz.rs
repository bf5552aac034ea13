//! What authorization costs a request: the compiled policies alone, no sockets.
//!
//! 1,000 policies with 10 rules each, in several shapes: what people write (principals, methods, paths), the same with everything shared but one
//! field, and the worst one (nothing but exclusions, which no index can narrow). A shape's figure is the mean over requests of which some match.

use std::time::{Duration, Instant};
use weft_api::wire::string_match::Kind;
use weft_api::wire::{self, StringMatch};
use weft_policy::authz::{Engine, Http, Peer, Request, Verdict};

/// Options of `weft-bench authz`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Policies.
    #[arg(long, default_value_t = 1000)]
    policies: usize,
    /// Rules of each.
    #[arg(long, default_value_t = 10)]
    rules: usize,
    /// Milliseconds for each shape.
    #[arg(long, default_value_t = 500)]
    milliseconds: u64,
    /// Most nanoseconds that a request may cost in the shapes that an index can narrow; more is a failure.
    #[arg(long, default_value_t = 20_000.0)]
    limit: f64,
}

fn text(kind: Kind) -> StringMatch {
    StringMatch { kind: Some(kind) }
}

fn exact(value: impl Into<String>) -> StringMatch {
    text(Kind::Exact(value.into()))
}

/// What a rule of a shape is like, by its number.
type Shape = fn(usize) -> wire::AuthorizationRule;

fn callers(n: usize) -> Vec<wire::Source> {
    let principals = (0..3).map(|k| exact(format!("cluster.local/ns/team-{}/sa/client-{}", n % 97, (n + k) % 1009))).collect();
    vec![wire::Source { principals, ..wire::Source::default() }]
}

fn everyday(n: usize) -> wire::AuthorizationRule {
    let operation = wire::Operation {
        methods: vec![exact("GET"), exact("POST")],
        paths: vec![text(Kind::Prefix(format!("/api/v1/resource-{n}/"))), exact(format!("/status/{n}"))],
        ..wire::Operation::default()
    };
    wire::AuthorizationRule { from: callers(n), to: vec![operation], ..wire::AuthorizationRule::default() }
}

fn one_caller(n: usize) -> wire::AuthorizationRule {
    wire::AuthorizationRule { from: callers(7), ..everyday(n) }
}

fn templates(n: usize) -> wire::AuthorizationRule {
    let paths = vec![text(Kind::Template(format!("/api/{{*}}/item-{n}/{{**}}")))];
    let operation = wire::Operation { paths, ..wire::Operation::default() };
    wire::AuthorizationRule { from: callers(n), to: vec![operation], ..wire::AuthorizationRule::default() }
}

fn headers(n: usize) -> wire::AuthorizationRule {
    let condition =
        wire::Condition { path: vec!["x-tenant".into()], values: vec![exact(format!("t{n}"))], ..wire::Condition::default() };
    wire::AuthorizationRule { when: vec![condition], ..wire::AuthorizationRule::default() }
}

fn networks(n: usize) -> wire::AuthorizationRule {
    let ip_blocks = vec![format!("10.{}.{}.0/24", n / 256 % 256, n % 256)];
    let from = vec![wire::Source { ip_blocks, ..wire::Source::default() }];
    wire::AuthorizationRule { from, ..wire::AuthorizationRule::default() }
}

fn exclusions(n: usize) -> wire::AuthorizationRule {
    let operation = wire::Operation {
        not_paths: vec![text(Kind::Prefix("/api/".into())), exact(format!("/status/{n}"))],
        ..wire::Operation::default()
    };
    wire::AuthorizationRule { to: vec![operation], ..wire::AuthorizationRule::default() }
}

/// Shapes, and whether the limit counts for them.
const SHAPES: [(&str, Shape, bool); 6] = [
    ("principals, methods, paths", everyday, true),
    ("all rules for one caller", one_caller, true),
    ("path templates", templates, true),
    ("a header of each rule", headers, true),
    ("a network of each rule", networks, true),
    ("exclusions only (every rule is met)", exclusions, false),
];

/// Measures, prints, and says whether all is within the limit.
pub(crate) fn run(args: &Args) -> bool {
    let mut within = true;
    println!("{} policies with {} rules each, half of them DENY", args.policies, args.rules);
    for (name, shape, counts) in SHAPES {
        let policies: Vec<_> = (0..args.policies).map(|n| policy(n, args.rules, shape)).collect();
        let began = Instant::now();
        let engine = Engine::compile(&policies, &["cluster.local".into()]);
        let compiled = began.elapsed();
        let (nanoseconds, denied) = measure(&engine, args.policies * args.rules, Duration::from_millis(args.milliseconds));
        println!("{name}: {nanoseconds:.0} ns per request ({denied:.0} % refused), compiled in {} ms", compiled.as_millis());
        within &= !counts || nanoseconds <= args.limit;
    }
    if !within {
        println!("more than {:.0} ns", args.limit);
    }
    within
}

fn policy(n: usize, rules: usize, shape: Shape) -> wire::AuthorizationPolicy {
    let action = if n.is_multiple_of(2) { wire::AuthorizationAction::Allow } else { wire::AuthorizationAction::Deny };
    wire::AuthorizationPolicy {
        namespace: "default".into(),
        name: format!("policy-{n}"),
        action: action.into(),
        rules: (0..rules).map(|k| shape(n * rules + k)).collect(),
        ..wire::AuthorizationPolicy::default()
    }
}

/// Nanoseconds per request and the share of refusals in percent.
fn measure(engine: &Engine, rules: usize, time: Duration) -> (f64, f64) {
    const KINDS: usize = 64;
    let step = (rules / KINDS).max(1);
    // Caller, path, header fields.
    type Plain = (String, String, Vec<(String, String)>);
    let plain: Vec<Plain> = (0..KINDS)
        .map(|k| {
            let n = k * step;
            let id = format!("spiffe://cluster.local/ns/team-{}/sa/client-{}", n % 97, n % 1009);
            let fields = vec![("accept".to_owned(), "*/*".to_owned()), ("x-tenant".into(), format!("t{n}"))];
            (id, format!("/api/v1/resource-{n}/items/{k}/details"), fields)
        })
        .collect();
    let requests: Vec<Request<'_>> = plain
        .iter()
        .enumerate()
        .map(|(k, (id, path, fields))| Request {
            source: Peer::parse(id),
            source_ip: std::net::Ipv4Addr::new(10, (k * step / 256 % 256) as u8, (k * step % 256) as u8, 9).into(),
            remote_ip: std::net::Ipv4Addr::new(10, 9, 9, 9).into(),
            destination: (std::net::Ipv4Addr::new(10, 1, 1, 1), 8080).into(),
            sni: None,
            http: Some(Http { method: "GET", host: b"app.default.svc", path, query: None, headers: fields, token: None }),
        })
        .collect();
    let (mut done, mut denied) = (0_u64, 0_u64);
    let began = Instant::now();
    while began.elapsed() < time {
        for request in &requests {
            let outcome = std::hint::black_box(engine).check(std::hint::black_box(request));
            denied += u64::from(matches!(outcome.verdict, Verdict::Deny(_)));
            done += 1;
        }
    }
    (began.elapsed().as_nanos() as f64 / done as f64, 100.0 * denied as f64 / done as f64)
}
