//! The compiled engine against a naive evaluator on a million generated pairs of policies and request; and that those who ask why are
//! told what the proxy does.

mod generate;
mod naive;

use generate::Rng;
use std::collections::BTreeMap;
use weft_api::wire;
use weft_policy::authz::{Allowed, Denied, Engine, Http, Outcome, Peer, PolicyId, Request, Shadow, Verdict};
use weft_policy::explain::explain;
use weft_policy::jwt::Claims;

/// Sets of policies, and requests for each of them, in each of as many tests as run side by side.
const SETS: usize = 10_000;
const REQUESTS: usize = 25;

/// A naive verdict as the engine would say it.
fn translated(verdict: &naive::Verdict) -> Verdict {
    let id = |n: &usize| PolicyId(*n as u32);
    match verdict {
        naive::Verdict::AllowNoPolicy => Verdict::Allow(Allowed::NoAllowPolicy),
        naive::Verdict::AllowBy(n) => Verdict::Allow(Allowed::By(id(n))),
        naive::Verdict::DenyBy(n) => Verdict::Deny(Denied::By(id(n))),
        naive::Verdict::DenyNoMatch => Verdict::Deny(Denied::NoAllowMatched),
        naive::Verdict::DenyNobodyToAsk(n) => Verdict::Deny(Denied::NoAuthorizer(id(n))),
        naive::Verdict::DenyBroken(n) => Verdict::Deny(Denied::Broken(id(n))),
        naive::Verdict::Ask(n) => Verdict::Ask(id(n)),
    }
}

fn shadow(shadow: &naive::Shadow) -> Shadow {
    let id = |n: &usize| PolicyId(*n as u32);
    match shadow {
        naive::Shadow::DeniedBy(n) => Shadow::DeniedBy(id(n)),
        naive::Shadow::AllowedBy(n) => Shadow::AllowedBy(id(n)),
        naive::Shadow::NoAllowMatched => Shadow::NoAllowMatched,
        naive::Shadow::WouldAsk(n) => Shadow::WouldAsk(id(n)),
        naive::Shadow::Passed => Shadow::Passed,
    }
}

/// Shows a plain request as the engine wants it.
fn with<T>(plain: &naive::Request, look: impl FnOnce(&Request<'_>) -> T) -> T {
    let claims = plain.http.as_ref().and_then(|http| http.token.clone()).map(Claims::assumed);
    let http = plain.http.as_ref().map(|http| Http {
        method: &http.method,
        host: http.host.as_bytes(),
        path: &http.path,
        query: http.query.as_deref(),
        headers: &http.headers,
        token: claims.as_ref(),
    });
    look(&Request {
        source: plain.principal.as_deref().and_then(Peer::parse),
        source_ip: plain.source_ip,
        remote_ip: plain.remote_ip,
        destination: plain.destination,
        sni: plain.sni.as_deref(),
        http,
    })
}

type Count = BTreeMap<&'static str, usize>;

fn count(seen: &mut Count, outcome: &Outcome, tcp: bool) {
    let name = match outcome.verdict {
        Verdict::Allow(Allowed::NoAllowPolicy) => "allowed, no ALLOW policy",
        Verdict::Allow(Allowed::By(_)) => "allowed by a policy",
        Verdict::Deny(Denied::By(_)) => "denied by a policy",
        Verdict::Deny(Denied::NoAllowMatched) => "denied, no ALLOW matched",
        Verdict::Deny(Denied::NoAuthorizer(_)) => "denied, nobody to ask",
        Verdict::Deny(Denied::Broken(_)) => "denied, broken",
        Verdict::Ask(_) => "ask",
    };
    *seen.entry(name).or_default() += 1;
    if tcp {
        *seen.entry(if matches!(outcome.verdict, Verdict::Deny(_)) { "TCP denied" } else { "TCP passed" }).or_default() += 1;
    }
    if let Some(shadow) = outcome.shadow {
        let name = match shadow {
            Shadow::DeniedBy(_) => "shadow denied",
            Shadow::AllowedBy(_) => "shadow allowed",
            Shadow::NoAllowMatched => "shadow no ALLOW matched",
            Shadow::WouldAsk(_) => "shadow would ask",
            Shadow::Passed => "shadow passed",
        };
        *seen.entry(name).or_default() += 1;
    }
    if outcome.audit.is_some() {
        *seen.entry("audited").or_default() += 1;
    }
}

const KINDS: [&str; 15] = [
    "allowed, no ALLOW policy",
    "allowed by a policy",
    "denied by a policy",
    "denied, no ALLOW matched",
    "denied, nobody to ask",
    "denied, broken",
    "ask",
    "TCP denied",
    "TCP passed",
    "shadow denied",
    "shadow allowed",
    "shadow no ALLOW matched",
    "shadow would ask",
    "shadow passed",
    "audited",
];

/// Compares all outcomes of one set and one request, going on after each authorizer.
fn compare(
    engine: &Engine,
    policies: &[wire::AuthorizationPolicy],
    domains: &[String],
    plain: &naive::Request,
    seen: &mut Count,
    why: bool,
) {
    with(plain, |request| {
        let mut agreed: Vec<wire::ExternalAuthorizer> = Vec::new();
        let mut asked: Option<PolicyId> = None;
        loop {
            let outcome = asked.map_or_else(|| engine.check(request), |id| engine.resume(request, id));
            let (verdict, shadowed, audit) = naive::decide(policies, domains, plain, &agreed);
            let expected = Outcome {
                verdict: translated(&verdict),
                shadow: shadowed.as_ref().map(shadow),
                audit: audit.map(|n| PolicyId(n as u32)),
            };
            assert_eq!(outcome, expected, "\nrequest {plain:#?}\ndomains {domains:?}\npolicies {policies:#?}");
            count(seen, &outcome, plain.http.is_none());
            if why {
                let (explained, words) = explain(engine, request, asked);
                assert_eq!(explained, outcome, "explained otherwise than decided: {words:#?}");
            }
            let Verdict::Ask(id) = outcome.verdict else { break };
            agreed.extend(policies[id.0 as usize].authorizer.clone());
            asked = Some(id);
        }
    });
}

/// A quarter of the million; four tests of it use the cores that there are.
fn quarter(seed: u64) {
    let mut rng = Rng(seed);
    let mut seen = Count::new();
    for set in 0..SETS {
        let n = 1 + rng.below(4);
        let policies: Vec<_> = (0..n).map(|_| generate::policy(&mut rng)).collect();
        let domains = generate::trust_domains(&mut rng);
        let engine = Engine::compile(&policies, &domains);
        for _ in 0..REQUESTS {
            let plain = generate::request(&mut rng);
            compare(&engine, &policies, &domains, &plain, &mut seen, set % 8 == 0);
        }
    }
    // Nothing is proved by verdicts that hardly occur.
    for kind in KINDS {
        let times = seen.get(kind).copied().unwrap_or(0);
        assert!(times * 500 >= SETS * REQUESTS, "{kind}: {times} times only, of {}: {seen:#?}", SETS * REQUESTS);
    }
}

#[test]
fn the_engine_agrees_with_the_naive_evaluator_1() {
    quarter(0x1234_5678_9abc_def1);
}

#[test]
fn the_engine_agrees_with_the_naive_evaluator_2() {
    quarter(0x0f0f_0f0f_3333_3333);
}

#[test]
fn the_engine_agrees_with_the_naive_evaluator_3() {
    quarter(0x7777_1111_2222_9999);
}

#[test]
fn the_engine_agrees_with_the_naive_evaluator_4() {
    quarter(0xfeed_f00d_dead_beef);
}

/// Large sets: what is filed in the index under shared keys.
#[test]
fn the_engine_agrees_with_the_naive_evaluator_on_many_policies() {
    let mut rng = Rng(0x5555_aaaa_1234_4321);
    let mut seen = Count::new();
    for _ in 0..60 {
        let mut policies: Vec<_> = (0..80).map(|_| generate::policy(&mut rng)).collect();
        // Among so many some DENY would decide nearly everything.
        policies.retain(|policy| matches!(policy.action, 0 | 2) || rng.one_in(20) && !naive::is_broken(policy));
        let domains = generate::trust_domains(&mut rng);
        let engine = Engine::compile(&policies, &domains);
        for _ in 0..100 {
            let plain = generate::request(&mut rng);
            compare(&engine, &policies, &domains, &plain, &mut seen, false);
        }
    }
    assert!(seen.len() > 8, "too few kinds of verdicts: {seen:#?}");
}

/// Rules of exclusions only, which no part of a request finds: what many of them exclude is looked at once.
#[test]
fn the_engine_agrees_with_the_naive_evaluator_on_many_exclusions() {
    let mut rng = Rng(0x1357_9bdf_0246_8ace);
    let mut seen = Count::new();
    for _ in 0..150 {
        let mut policies: Vec<_> = (0..60).map(|_| generate::policy(&mut rng)).collect();
        for policy in &mut policies {
            for rule in &mut policy.rules {
                for source in &mut rule.from {
                    source.principals.clear();
                    source.request_principals.clear();
                    source.namespaces.clear();
                    source.service_accounts.clear();
                    source.trust_domains.clear();
                    source.ip_blocks.clear();
                    source.remote_ip_blocks.clear();
                }
                for operation in &mut rule.to {
                    operation.hosts.clear();
                    operation.ports.clear();
                    operation.methods.clear();
                    operation.paths.clear();
                }
                rule.when.retain(|condition| !condition.not_values.is_empty());
                rule.when.iter_mut().for_each(|condition| condition.values.clear());
            }
            policy.rules.retain(|rule| !(rule.from.is_empty() && rule.to.is_empty() && rule.when.is_empty()));
        }
        policies.retain(|policy| !naive::is_broken(policy) && (policy.action == 0 || rng.one_in(8)));
        let domains = generate::trust_domains(&mut rng);
        let engine = Engine::compile(&policies, &domains);
        for _ in 0..100 {
            let plain = generate::request(&mut rng);
            compare(&engine, &policies, &domains, &plain, &mut seen, false);
        }
    }
    assert!(seen.len() > 6, "too few kinds of verdicts: {seen:#?}");
}
