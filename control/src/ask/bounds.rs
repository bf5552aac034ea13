//! Verdicts about requests of which not everything is known.
//!
//! A sample of traffic has no headers, no claims of tokens, and not always an address or a path. What a policy makes of it is found
//! out by the engine of the proxy itself, asked twice: with policies in which every test of something unknown is taken to go
//! *against* the request (a DENY's test holds, an ALLOW's fails), and with policies in which it goes *in favour* of it. The engine lets pass more if an
//! ALLOW matches more and a DENY less, so: what passes the first lot passes for sure; what the second lot refuses is refused for
//! sure; everything else can't be told, and nothing is ever guessed.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use weft_api::wire::condition::Attribute;
use weft_api::wire::{self, AuthorizationAction, AuthorizationPolicy, AuthorizationRule, Condition, Operation, Source};
use weft_policy::authz::{Denied, Engine, Http, Outcome, Peer, Request, Verdict};
use weft_policy::jwt::Claims;

/// What of a request isn't known, besides its header fields and the address where it arrived, which never are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Unknown {
    /// The address of the peer.
    pub address: bool,
    /// The address of the client behind trusted hops.
    pub remote: bool,
    /// Who the token is of.
    pub principal: bool,
    /// What else is in the token.
    pub claims: bool,
    /// Path and host.
    pub path: bool,
    /// The method.
    pub method: bool,
    /// The server name of the app's own TLS.
    pub sni: bool,
}

/// A verdict that holds whatever the unknown may be, or that there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sure {
    /// It passes. By this policy, if by one.
    Pass {
        /// `namespace/name`, or empty.
        policy: String,
    },
    /// It is refused.
    Refuse {
        /// `namespace/name`, or empty: no ALLOW policy matches.
        policy: String,
        /// In words.
        reason: String,
    },
    /// It depends.
    Depends {
        /// `namespace/name` of the policy that may decide, or empty.
        policy: String,
        /// On what, in words.
        on: String,
    },
}

/// The policies of a workload, compiled for one kind of ignorance.
#[derive(Debug)]
pub struct Bounds {
    against: Engine,
    favour: Engine,
    /// What of the unknown the policies look at, in words.
    looked_at: Vec<String>,
}

/// A request as far as it is known.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// SPIFFE id; empty: none.
    pub identity: &'a str,
    /// Address of the peer, if it is known.
    pub address: Option<IpAddr>,
    /// Port of the app.
    pub port: u16,
    /// Method, path, host and the token's owner; `None`: opaque.
    pub http: Option<(&'a str, &'a str, &'a str, Option<&'a Claims>)>,
}

impl Bounds {
    /// Compiles policies.
    pub fn new(policies: &[AuthorizationPolicy], trust_domains: &[String], unknown: Unknown, http: bool) -> Self {
        let mut looked_at = BTreeSet::new();
        let against: Vec<_> = policies.iter().map(|p| p.bounded(unknown, http, closes(p), &mut looked_at)).collect();
        let favour: Vec<_> = policies.iter().map(|p| p.bounded(unknown, http, !closes(p), &mut looked_at)).collect();
        Self {
            against: Engine::compile(&against, trust_domains),
            favour: Engine::compile(&favour, trust_domains),
            looked_at: looked_at.into_iter().collect(),
        }
    }

    /// What becomes of a request.
    pub fn judge(&self, sample: &Sample<'_>) -> Sure {
        let headers: Vec<(String, String)> = Vec::new();
        let address = sample.address.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let request = Request {
            source: Peer::parse(sample.identity),
            source_ip: address,
            remote_ip: address,
            destination: SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), sample.port),
            sni: None,
            http: sample.http.map(|(method, path, host, token)| Http {
                method,
                host: host.as_bytes(),
                path,
                query: None,
                headers: &headers,
                token,
            }),
        };
        let against = settle(&self.against, &request);
        let favour = settle(&self.favour, &request);
        match (against, favour) {
            ((Verdict::Allow(allowed), None), _) => {
                let policy = match allowed {
                    weft_policy::authz::Allowed::By(id) => name(&self.against, id),
                    weft_policy::authz::Allowed::NoAllowPolicy => String::new(),
                };
                Sure::Pass { policy }
            }
            (_, (Verdict::Deny(denied), _)) => {
                let policy = denied.policy().map(|id| name(&self.favour, id)).unwrap_or_default();
                let reason = match denied {
                    Denied::By(_) => "the DENY policy matches",
                    Denied::NoAllowMatched => "there are ALLOW policies, and none matches",
                    Denied::NoAuthorizer(_) => "the CUSTOM policy matches, and its authorizer is not known",
                    Denied::Broken(_) => "the policy can't be understood, so it refuses everything",
                };
                Sure::Refuse { policy, reason: reason.into() }
            }
            ((verdict, asks), _) => {
                let policy = match (verdict, &asks) {
                    (Verdict::Deny(denied), _) => denied.policy().map(|id| name(&self.against, id)).unwrap_or_default(),
                    (_, Some((policy, _))) => policy.clone(),
                    _ => String::new(),
                };
                let on = match asks {
                    Some((_, authorizer)) if !matches!(verdict, Verdict::Deny(_)) => {
                        format!("the external authorizer {authorizer} decides")
                    }
                    _ => self.on(),
                };
                Sure::Depends { policy, on }
            }
        }
    }

    fn on(&self) -> String {
        format!("it depends on {}, which samples don't tell", self.looked_at.join(", "))
    }
}

/// The verdict as if authorizers agreed, and the first policy (with its authorizer) that would have one asked.
fn settle(engine: &Engine, request: &Request<'_>) -> (Verdict, Option<(String, String)>) {
    let mut asks = None;
    let mut outcome: Outcome = engine.check(request);
    while let Verdict::Ask(id) = outcome.verdict {
        let authorizer = engine.policy(id).and_then(|p| p.authorizer.as_ref()).map(|a| a.name.clone()).unwrap_or_default();
        asks.get_or_insert((name(engine, id), authorizer));
        outcome = engine.resume(request, id);
    }
    (outcome.verdict, asks)
}

fn name(engine: &Engine, id: weft_policy::authz::PolicyId) -> String {
    engine.policy(id).map_or_else(String::new, |policy| policy.name.to_string())
}

/// Whether more matches mean fewer requests that pass.
fn closes(policy: &AuthorizationPolicy) -> bool {
    !matches!(policy.action(), AuthorizationAction::Allow)
}

/// A part of a policy of which every test of something unknown is decided beforehand.
trait Bounded: Sized {
    fn bounded(&self, unknown: Unknown, http: bool, holds: bool, looked_at: &mut BTreeSet<String>) -> Self;
}

impl Bounded for AuthorizationPolicy {
    /// Without rules that could only match by what is taken not to hold. The policy stays: that there is an ALLOW policy has a meaning.
    fn bounded(&self, unknown: Unknown, http: bool, holds: bool, looked_at: &mut BTreeSet<String>) -> Self {
        let rules = self.rules.iter().filter_map(|rule| bounded_rule(rule, unknown, http, holds, looked_at)).collect();
        Self { rules, ..self.clone() }
    }
}

fn bounded_rule(
    rule: &AuthorizationRule,
    unknown: Unknown,
    http: bool,
    holds: bool,
    looked_at: &mut BTreeSet<String>,
) -> Option<AuthorizationRule> {
    let mut bounded = AuthorizationRule::default();
    for source in &rule.from {
        let (known, tests_unknown) = known_source(source, unknown, looked_at);
        if !tests_unknown || holds {
            bounded.from.push(known);
        }
    }
    for operation in &rule.to {
        let (known, tests_unknown) = known_operation(operation, unknown, looked_at);
        if !tests_unknown || holds {
            bounded.to.push(known);
        }
    }
    if bounded.from.is_empty() && !rule.from.is_empty() || bounded.to.is_empty() && !rule.to.is_empty() {
        return None;
    }
    for condition in &rule.when {
        if !unknown_condition(condition, unknown, http) {
            bounded.when.push(condition.clone());
            continue;
        }
        looked_at.insert(words(condition));
        if !holds {
            return None;
        }
    }
    Some(bounded)
}

fn known_source(source: &Source, unknown: Unknown, looked_at: &mut BTreeSet<String>) -> (Source, bool) {
    let mut known = source.clone();
    let mut forgotten = false;
    let mut forget = |is_unknown: bool, what: &str, lists: [bool; 2]| {
        let tests = is_unknown && (lists[0] || lists[1]);
        if tests {
            looked_at.insert(what.to_owned());
            forgotten = true;
        }
        tests
    };
    let lists = [!source.ip_blocks.is_empty(), !source.not_ip_blocks.is_empty()];
    if forget(unknown.address, "the address of the peer (ipBlocks)", lists) {
        (known.ip_blocks, known.not_ip_blocks) = (Vec::new(), Vec::new());
    }
    let lists = [!source.remote_ip_blocks.is_empty(), !source.not_remote_ip_blocks.is_empty()];
    if forget(unknown.remote, "the address of the client (remoteIpBlocks)", lists) {
        (known.remote_ip_blocks, known.not_remote_ip_blocks) = (Vec::new(), Vec::new());
    }
    let lists = [!source.request_principals.is_empty(), !source.not_request_principals.is_empty()];
    if forget(unknown.principal, "the token (requestPrincipals)", lists) {
        (known.request_principals, known.not_request_principals) = (Vec::new(), Vec::new());
    }
    (known, forgotten)
}

fn known_operation(operation: &Operation, unknown: Unknown, looked_at: &mut BTreeSet<String>) -> (Operation, bool) {
    let mut known = operation.clone();
    let mut forgotten = false;
    let mut forget = |is_unknown: bool, what: &str, lists: [bool; 2]| {
        let tests = is_unknown && (lists[0] || lists[1]);
        if tests {
            looked_at.insert(what.to_owned());
            forgotten = true;
        }
        tests
    };
    if forget(unknown.path, "the path", [!operation.paths.is_empty(), !operation.not_paths.is_empty()]) {
        (known.paths, known.not_paths) = (Vec::new(), Vec::new());
    }
    if forget(unknown.path, "the host", [!operation.hosts.is_empty(), !operation.not_hosts.is_empty()]) {
        (known.hosts, known.not_hosts) = (Vec::new(), Vec::new());
    }
    if forget(unknown.method, "the method", [!operation.methods.is_empty(), !operation.not_methods.is_empty()]) {
        (known.methods, known.not_methods) = (Vec::new(), Vec::new());
    }
    (known, forgotten)
}

/// Whether a condition looks at something unknown. On opaque connections what asks for HTTP is left to the engine, which knows what
/// becomes of it there.
fn unknown_condition(condition: &Condition, unknown: Unknown, http: bool) -> bool {
    match condition.attribute() {
        Attribute::RequestHeader => http,
        Attribute::SourceIp => unknown.address,
        Attribute::RemoteIp => unknown.remote,
        Attribute::DestinationIp => true,
        Attribute::RequestPrincipal => http && unknown.principal,
        Attribute::RequestAudiences | Attribute::RequestPresenter | Attribute::RequestClaim => http && unknown.claims,
        Attribute::ConnectionSni => unknown.sni,
        Attribute::SourceNamespace
        | Attribute::SourcePrincipal
        | Attribute::SourceServiceAccount
        | Attribute::SourceTrustDomain
        | Attribute::DestinationPort => false,
    }
}

fn words(condition: &Condition) -> String {
    match condition.attribute() {
        Attribute::RequestHeader => format!("the header {}", condition.path.first().map_or("?", String::as_str)),
        Attribute::SourceIp => "the address of the peer (source.ip)".into(),
        Attribute::RemoteIp => "the address of the client (remote.ip)".into(),
        Attribute::DestinationIp => "the address of the pod (destination.ip)".into(),
        Attribute::ConnectionSni => "the server name (connection.sni)".into(),
        Attribute::RequestClaim => format!("the claim {}", condition.path.join(".")),
        _ => "the token".into(),
    }
}

/// Claims that have this principal ("issuer/subject").
pub fn claims(principal: &str) -> Option<Claims> {
    // Where the issuer ends can't be told, and doesn't matter: together they are the same.
    let (issuer, subject) = principal.rsplit_once('/')?;
    let mut all = serde_json::Map::new();
    all.insert("iss".into(), issuer.into());
    all.insert("sub".into(), subject.into());
    Some(Claims::assumed(all))
}

/// Mode of a port.
pub fn mode(inbound: &wire::Inbound, port: u16) -> wire::MtlsMode {
    let own = inbound.port_mtls.iter().find(|p| p.port == u32::from(port));
    own.map_or_else(|| inbound.mtls(), wire::PortMtls::mode)
}

#[cfg(test)]
mod tests;
