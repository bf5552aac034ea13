//! A second evaluator, written to be obviously right and nothing else: it walks the wire messages as they are, for every request
//! anew, and shares no code with the crate.

use serde_json::Value;
use std::net::{IpAddr, SocketAddr};
use weft_api::wire::condition::Attribute;
use weft_api::wire::external_authorizer::Protocol;
use weft_api::wire::string_match::Kind;
use weft_api::wire::{self, AuthorizationAction as Action};

/// A request in plain words.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) principal: Option<String>,
    pub(crate) source_ip: IpAddr,
    pub(crate) remote_ip: IpAddr,
    pub(crate) destination: SocketAddr,
    pub(crate) sni: Option<String>,
    pub(crate) http: Option<Http>,
}

#[derive(Clone, Debug)]
pub(crate) struct Http {
    pub(crate) method: String,
    pub(crate) host: String,
    pub(crate) path: String,
    pub(crate) query: Option<String>,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) token: Option<serde_json::Map<String, Value>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    AllowNoPolicy,
    AllowBy(usize),
    DenyBy(usize),
    DenyNoMatch,
    DenyNobodyToAsk(usize),
    DenyBroken(usize),
    Ask(usize),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Shadow {
    DeniedBy(usize),
    AllowedBy(usize),
    NoAllowMatched,
    WouldAsk(usize),
    Passed,
}

/// The verdict, if the authorizers in `agreed` have said yes already.
pub(crate) fn decide(
    policies: &[wire::AuthorizationPolicy],
    domains: &[String],
    request: &Request,
    agreed: &[wire::ExternalAuthorizer],
) -> (Verdict, Option<Shadow>, Option<usize>) {
    let all: Vec<(usize, &wire::AuthorizationPolicy)> = policies.iter().enumerate().collect();
    let of = |action: Action, dry: bool| {
        all.iter().copied().filter(move |(_, policy)| action_of(policy) == action && policy.dry_run == dry)
    };
    let hit = |policy: &wire::AuthorizationPolicy| matches(policy, domains, request);
    let shadow = all.iter().any(|(_, policy)| policy.dry_run).then(|| {
        if let Some((n, _)) = of(Action::Deny, true).find(|(_, policy)| hit(policy)) {
            Shadow::DeniedBy(n)
        } else if let Some((n, _)) = of(Action::Allow, true).find(|(_, policy)| hit(policy)) {
            Shadow::AllowedBy(n)
        } else if of(Action::Allow, true).next().is_some() {
            Shadow::NoAllowMatched
        } else if let Some((n, _)) = of(Action::Custom, true).find(|(_, policy)| hit(policy)) {
            Shadow::WouldAsk(n)
        } else {
            Shadow::Passed
        }
    });
    let audit = of(Action::Audit, false).find(|(_, policy)| hit(policy)).map(|(n, _)| n);
    let closed = all.iter().find(|(_, policy)| {
        let custom = action_of(policy) == Action::Custom;
        let deny = action_of(policy) == Action::Deny;
        !policy.dry_run && ((custom || deny) && is_broken(policy) || custom && nobody_to_ask(policy) && hit(policy))
    });
    let verdict = 'verdict: {
        if let Some((n, policy)) = closed {
            break 'verdict if is_broken(policy) { Verdict::DenyBroken(*n) } else { Verdict::DenyNobodyToAsk(*n) };
        }
        // Authorizers are asked in the order in which policies (of any action) name them first.
        let mut order: Vec<&wire::ExternalAuthorizer> = Vec::new();
        for authorizer in policies.iter().filter_map(|policy| policy.authorizer.as_ref()) {
            if !order.contains(&authorizer) {
                order.push(authorizer);
            }
        }
        for authorizer in order.into_iter().filter(|authorizer| !agreed.contains(authorizer)) {
            let mut asked = of(Action::Custom, false).filter(|(_, policy)| policy.authorizer.as_ref() == Some(authorizer));
            if let Some((n, _)) = asked.find(|(_, policy)| hit(policy)) {
                break 'verdict Verdict::Ask(n);
            }
        }
        if let Some((n, _)) = of(Action::Deny, false).find(|(_, policy)| hit(policy)) {
            break 'verdict Verdict::DenyBy(n);
        }
        if of(Action::Allow, false).next().is_none() {
            break 'verdict Verdict::AllowNoPolicy;
        }
        match of(Action::Allow, false).find(|(_, policy)| hit(policy)) {
            Some((n, _)) => Verdict::AllowBy(n),
            None => Verdict::DenyNoMatch,
        }
    };
    (verdict, shadow, audit)
}

fn action_of(policy: &wire::AuthorizationPolicy) -> Action {
    match policy.action {
        0 => Action::Allow,
        2 => Action::Audit,
        3 => Action::Custom,
        // 1, and what nobody knows.
        _ => Action::Deny,
    }
}

fn nobody_to_ask(policy: &wire::AuthorizationPolicy) -> bool {
    policy.authorizer.as_ref().is_none_or(|authorizer| authorizer.protocol.is_none() || authorizer.address.is_empty())
}

fn matches(policy: &wire::AuthorizationPolicy, domains: &[String], request: &Request) -> bool {
    let action = action_of(policy);
    if is_broken(policy) {
        return action == Action::Deny || action == Action::Custom;
    }
    if request.http.is_none() && action == Action::Custom && !nobody_to_ask(policy) {
        let authorizer = policy.authorizer.as_ref().unwrap();
        if matches!(authorizer.protocol, Some(Protocol::Http(_))) {
            return false;
        }
    }
    policy.rules.iter().any(|rule| rule_matches(rule, action == Action::Allow, domains, request))
}

fn rule_matches(rule: &wire::AuthorizationRule, allow: bool, domains: &[String], request: &Request) -> bool {
    if request.http.is_none() && allow && mentions_http(rule) {
        return false;
    }
    let tcp = request.http.is_none();
    let from = rule.from.is_empty() || rule.from.iter().any(|source| source_matches(source, domains, request, tcp));
    let to = rule.to.is_empty() || rule.to.iter().any(|operation| operation_matches(operation, request, tcp));
    let when = rule.when.iter().all(|condition| condition_matches(condition, domains, request, tcp));
    from && to && when
}

fn mentions_http(rule: &wire::AuthorizationRule) -> bool {
    rule.from.iter().any(|source| !source.request_principals.is_empty() || !source.not_request_principals.is_empty())
        || rule.to.iter().any(|to| {
            !to.hosts.is_empty()
                || !to.not_hosts.is_empty()
                || !to.methods.is_empty()
                || !to.not_methods.is_empty()
                || !to.paths.is_empty()
                || !to.not_paths.is_empty()
        })
        || rule.when.iter().any(is_http_condition)
}

fn is_http_condition(condition: &wire::Condition) -> bool {
    matches!(
        condition.attribute(),
        Attribute::RequestHeader
            | Attribute::RequestPrincipal
            | Attribute::RequestAudiences
            | Attribute::RequestPresenter
            | Attribute::RequestClaim
    )
}

/// `values` must hold a match, `not` none; an empty list says nothing.
fn pair<T>(values: &[T], not: &[T], is: impl Fn(&T) -> bool) -> bool {
    (values.is_empty() || values.iter().any(&is)) && !not.iter().any(&is)
}

fn source_matches(source: &wire::Source, domains: &[String], request: &Request, tcp: bool) -> bool {
    let principal = request.principal.as_deref();
    let (domain, namespace, account) = parts(principal);
    let token = request.http.as_ref().and_then(|http| http.token.as_ref());
    pair(&source.principals, &source.not_principals, |p| principal_is(p, domains, principal))
        && (tcp
            || pair(&source.request_principals, &source.not_request_principals, |p| opt(p, request_principal(token).as_deref())))
        && pair(&source.namespaces, &source.not_namespaces, |p| opt(p, namespace))
        && pair(&source.service_accounts, &source.not_service_accounts, |text| {
            namespace.zip(account).is_some_and(|(ns, name)| *text == format!("{ns}/{name}"))
        })
        && pair(&source.trust_domains, &source.not_trust_domains, |p| opt(p, domain))
        && pair(&source.ip_blocks, &source.not_ip_blocks, |block| in_block(block, request.source_ip))
        && pair(&source.remote_ip_blocks, &source.not_remote_ip_blocks, |block| in_block(block, request.remote_ip))
}

fn operation_matches(to: &wire::Operation, request: &Request, tcp: bool) -> bool {
    let ports = pair(&to.ports, &to.not_ports, |port| *port == u32::from(request.destination.port()));
    let Some(http) = &request.http else {
        assert!(tcp);
        return ports;
    };
    let lower = |p: &wire::StringMatch| {
        let mut p = p.clone();
        match p.kind.as_mut().unwrap() {
            Kind::Exact(t) | Kind::Prefix(t) | Kind::Suffix(t) | Kind::Glob(t) | Kind::Template(t) => *t = t.to_lowercase(),
            Kind::Present(_) => {}
        }
        p
    };
    ports
        && pair(&to.hosts, &to.not_hosts, |p| text_is(&lower(p), &http.host.to_lowercase()))
        && pair(&to.methods, &to.not_methods, |p| text_is(p, &http.method))
        && pair(&to.paths, &to.not_paths, |p| text_is(p, &http.path))
}

fn condition_matches(condition: &wire::Condition, domains: &[String], request: &Request, tcp: bool) -> bool {
    if tcp && is_http_condition(condition) {
        return true;
    }
    let (values, not) = (&condition.values, &condition.not_values);
    let principal = request.principal.as_deref();
    let (domain, namespace, account) = parts(principal);
    let token = request.http.as_ref().and_then(|http| http.token.as_ref());
    let claim_text = |name: &str| token.and_then(|token| token.get(name)).and_then(Value::as_str);
    match condition.attribute() {
        Attribute::RequestHeader => {
            let http = request.http.as_ref().unwrap();
            let name = condition.path[0].to_lowercase();
            let all: Vec<String> = match name.as_str() {
                "host" | ":authority" => vec![http.host.clone()],
                ":method" => vec![http.method.clone()],
                ":path" => vec![http.path.clone() + &http.query.as_ref().map(|q| format!("?{q}")).unwrap_or_default()],
                _ => http.headers.iter().filter(|(n, _)| *n == name).map(|(_, value)| value.clone()).collect(),
            };
            pair(values, not, |p| all.iter().any(|value| p.kind == Some(Kind::Present(true)) || text_is(p, value)))
        }
        Attribute::SourceIp => pair(values, not, |p| in_block(exact(p), request.source_ip)),
        Attribute::RemoteIp => pair(values, not, |p| in_block(exact(p), request.remote_ip)),
        Attribute::DestinationIp => pair(values, not, |p| in_block(exact(p), request.destination.ip())),
        Attribute::DestinationPort => pair(values, not, |p| exact(p) == request.destination.port().to_string()),
        Attribute::SourceNamespace => pair(values, not, |p| opt(p, namespace)),
        Attribute::SourcePrincipal => pair(values, not, |p| principal_is(p, domains, principal)),
        Attribute::SourceServiceAccount => {
            let own = namespace.zip(account).map(|(ns, name)| format!("{ns}/{name}"));
            pair(values, not, |p| own.as_deref() == Some(exact(p)))
        }
        Attribute::SourceTrustDomain => pair(values, not, |p| opt(p, domain)),
        Attribute::RequestPrincipal => pair(values, not, |p| opt(p, request_principal(token).as_deref())),
        Attribute::RequestAudiences => {
            let list = texts(token.and_then(|token| token.get("aud")), false);
            pair(values, not, |p| list.iter().any(|text| text_is(p, text)))
        }
        Attribute::RequestPresenter => pair(values, not, |p| opt(p, claim_text("azp"))),
        Attribute::RequestClaim => {
            let mut value = token.cloned().map(Value::Object);
            for part in &condition.path {
                value = value.and_then(|value| value.get(part).cloned());
            }
            let spaced = condition.path.len() == 1 && ["scope", "permission"].contains(&condition.path[0].as_str());
            let list = texts(value.as_ref(), spaced);
            pair(values, not, |p| list.iter().any(|text| text_is(p, text)))
        }
        Attribute::ConnectionSni => pair(values, not, |p| opt(p, request.sni.as_deref())),
    }
}

fn exact(p: &wire::StringMatch) -> &str {
    match &p.kind {
        Some(Kind::Exact(text)) => text,
        _ => unreachable!("broken policies are not evaluated"),
    }
}

fn texts(value: Option<&Value>, spaced: bool) -> Vec<String> {
    match value {
        Some(Value::String(text)) if spaced => text.split(' ').filter(|word| !word.is_empty()).map(Into::into).collect(),
        Some(Value::String(text)) => vec![text.clone()],
        Some(Value::Array(list)) => list.iter().filter_map(|item| item.as_str().map(Into::into)).collect(),
        _ => Vec::new(),
    }
}

fn request_principal(token: Option<&serde_json::Map<String, Value>>) -> Option<String> {
    let text = |name: &str| token?.get(name)?.as_str().filter(|text| !text.is_empty());
    Some(format!("{}/{}", text("iss")?, text("sub")?))
}

/// Trust domain, namespace, service account.
fn parts(principal: Option<&str>) -> (Option<&str>, Option<&str>, Option<&str>) {
    let Some(principal) = principal else { return (None, None, None) };
    let pieces: Vec<&str> = principal.split('/').collect();
    match pieces.as_slice() {
        [domain, "ns", namespace, "sa", account] if !namespace.is_empty() && !account.is_empty() => {
            (Some(domain), Some(namespace), Some(account))
        }
        _ => (Some(pieces[0]), None, None),
    }
}

fn principal_is(p: &wire::StringMatch, domains: &[String], principal: Option<&str>) -> bool {
    let Some(principal) = principal else { return false };
    let Some(Kind::Exact(text) | Kind::Prefix(text)) = &p.kind else { return text_is(p, principal) };
    if let Some((wanted, _)) = text.split_once('/')
        && !domains.is_empty()
        && (wanted == "cluster.local" || domains.iter().any(|domain| domain == wanted))
    {
        // One of the mesh's names for itself: the caller's may be any of them.
        let Some((domain, rest)) = principal.split_once('/') else { return false };
        return domains.iter().any(|ours| ours == domain) && text_is(p, &format!("{wanted}/{rest}"));
    }
    text_is(p, principal)
}

fn opt(p: &wire::StringMatch, text: Option<&str>) -> bool {
    text.is_some_and(|text| text_is(p, text))
}

fn text_is(p: &wire::StringMatch, text: &str) -> bool {
    match p.kind.as_ref().unwrap() {
        Kind::Exact(pattern) => text == pattern,
        Kind::Prefix(pattern) => text.len() >= pattern.len() && text[..pattern.len()] == **pattern,
        Kind::Suffix(pattern) => text.len() >= pattern.len() && text[text.len() - pattern.len()..] == **pattern,
        Kind::Present(_) => !text.is_empty(),
        Kind::Glob(pattern) => backtrack(&pieces(pattern, &["*"]), text.as_bytes()),
        Kind::Template(pattern) => backtrack(&pieces(pattern, &["{**}", "{*}"]), text.as_bytes()),
    }
}

enum Piece {
    Byte(u8),
    /// Any bytes.
    Any,
    /// One byte or more, none of them a slash.
    Segment,
}

fn pieces(pattern: &str, specials: &[&str]) -> Vec<Piece> {
    let mut out = Vec::new();
    let mut rest = pattern;
    while let Some(first) = rest.bytes().next() {
        match specials.iter().find(|special| rest.starts_with(**special)) {
            Some(&"{*}") => out.push(Piece::Segment),
            Some(_) => out.push(Piece::Any),
            None => out.push(Piece::Byte(first)),
        }
        rest = &rest[specials.iter().find(|special| rest.starts_with(**special)).map_or(1, |special| special.len())..];
    }
    out
}

/// Tries everything.
fn backtrack(pattern: &[Piece], text: &[u8]) -> bool {
    match pattern.split_first() {
        None => text.is_empty(),
        Some((Piece::Byte(byte), rest)) => text.first() == Some(byte) && backtrack(rest, &text[1..]),
        Some((Piece::Any, rest)) => (0..=text.len()).any(|n| backtrack(rest, &text[n..])),
        Some((Piece::Segment, rest)) => (1..=text.len()).take_while(|n| text[n - 1] != b'/').any(|n| backtrack(rest, &text[n..])),
    }
}

/// Bit by bit.
fn in_block(block: &str, ip: IpAddr) -> bool {
    let (address, bits) = block.split_once('/').unwrap_or((block, ""));
    let address: IpAddr = address.parse().unwrap();
    let four = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => Some(u32::from(ip)),
        IpAddr::V6(ip) => ip.to_ipv4_mapped().map(u32::from),
    };
    let full = if address.is_ipv4() { 32 } else { 128 };
    let bits: u32 = if bits.is_empty() { full } else { bits.parse().unwrap() };
    match (address, four(ip)) {
        (IpAddr::V4(net), Some(ip)) => (0..bits).all(|bit| (u32::from(net) ^ ip) >> (31 - bit) & 1 == 0),
        (IpAddr::V6(net), None) => {
            let IpAddr::V6(ip) = ip else { return false };
            (0..bits).all(|bit| (u128::from(net) ^ u128::from(ip)) >> (127 - bit) & 1 == 0)
        }
        _ => false,
    }
}

/// Whether any part of a policy can't be understood.
pub(crate) fn is_broken(policy: &wire::AuthorizationPolicy) -> bool {
    !policy.broken.is_empty()
        || !(0..=3).contains(&policy.action)
        || policy.rules.iter().any(|rule| {
            rule.from.iter().any(|source| {
                let lists = [&source.principals, &source.not_principals, &source.request_principals]
                    .into_iter()
                    .chain([&source.not_request_principals, &source.namespaces, &source.not_namespaces])
                    .chain([&source.trust_domains, &source.not_trust_domains]);
                let blocks = [&source.ip_blocks, &source.not_ip_blocks, &source.remote_ip_blocks, &source.not_remote_ip_blocks];
                let accounts = [&source.service_accounts, &source.not_service_accounts];
                lists.into_iter().flatten().any(bad_text)
                    || blocks.into_iter().flatten().any(|block| bad_block(block))
                    || accounts.into_iter().flatten().any(|account| bad_account(account))
            }) || rule.to.iter().any(|to| {
                let lists = [&to.hosts, &to.not_hosts, &to.methods, &to.not_methods, &to.paths, &to.not_paths];
                lists.into_iter().flatten().any(bad_text) || to.ports.iter().chain(&to.not_ports).any(|port| *port > 65535)
            }) || rule.when.iter().any(bad_condition)
        })
}

fn bad_condition(condition: &wire::Condition) -> bool {
    let mut both = condition.values.iter().chain(&condition.not_values);
    let plain = |p: &wire::StringMatch| match &p.kind {
        Some(Kind::Exact(text)) => Some(text.clone()),
        _ => None,
    };
    if condition.values.is_empty() && condition.not_values.is_empty() {
        return true;
    }
    match Attribute::try_from(condition.attribute) {
        Err(_) => true,
        Ok(Attribute::RequestHeader) => condition.path.len() != 1 || condition.path[0].is_empty() || both.any(bad_text),
        Ok(Attribute::RequestClaim) => condition.path.is_empty() || condition.path.contains(&String::new()) || both.any(bad_text),
        Ok(Attribute::SourceIp | Attribute::RemoteIp | Attribute::DestinationIp) => {
            both.any(|p| plain(p).is_none_or(|block| bad_block(&block)))
        }
        Ok(Attribute::DestinationPort) => both.any(|p| plain(p).is_none_or(|port| port.parse::<u16>().is_err())),
        Ok(Attribute::SourceServiceAccount) => both.any(|p| plain(p).is_none_or(|account| bad_account(&account))),
        Ok(_) => both.any(bad_text),
    }
}

fn bad_account(text: &str) -> bool {
    let pieces: Vec<&str> = text.split('/').collect();
    pieces.len() != 2 || pieces.contains(&"")
}

fn bad_block(block: &str) -> bool {
    let (address, bits) = block.split_once('/').map_or((block, None), |(address, bits)| (address, Some(bits)));
    let Ok(address) = address.parse::<IpAddr>() else { return true };
    let most = if address.is_ipv4() { 32 } else { 128 };
    bits.is_some_and(|bits| bits.parse::<u32>().map_or(true, |bits| bits > most))
}

fn bad_text(p: &wire::StringMatch) -> bool {
    match &p.kind {
        None | Some(Kind::Present(false)) => true,
        Some(Kind::Template(text)) => {
            let segments: Vec<&str> = text.split('/').collect();
            let odd = segments.iter().any(|s| !["{*}", "{**}"].contains(s) && s.chars().any(|c| "{}*".contains(c)));
            let last_many = segments.iter().position(|s| *s == "{**}");
            let after = last_many.is_some_and(|at| segments[at + 1..].iter().any(|s| s.starts_with('{')));
            odd || after || !text.starts_with('/')
        }
        Some(_) => false,
    }
}
