//! Weft's answers: from the engine that the proxy uses, or from a real proxy.

use crate::case::{Answer, Call, IDENTITIES, Mode, Set};
use anyhow::Result;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use weft_api::istio::security::{Action, AuthorizationPolicySpec};
use weft_api::wire;
use weft_policy::authz::{Engine, Http, Peer, Request, Verdict};
use weft_policy::path::{Normalization, normalise};

/// Where Weft's apps are.
pub(crate) const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 3, 2);

/// The answers to all calls of all sets.
pub(crate) fn answers(sets: &[Set], proxy: Option<&Path>, dir: &Path) -> Result<Vec<Vec<Answer>>> {
    if let Some(binaries) = proxy {
        return crate::proxy::answers(sets, binaries, dir);
    }
    Ok(sets.iter().map(engine).collect())
}

fn engine(set: &Set) -> Vec<Answer> {
    let policies: Vec<_> = set.policies.iter().map(lower).collect();
    let engine = Engine::compile(&policies, &["cluster.local".to_owned()]);
    set.calls.iter().map(|call| one(&engine, set, call)).collect()
}

fn one(engine: &Engine, set: &Set, call: &Call) -> Answer {
    let bytes = call.bytes();
    let head = if set.http { Head::parse(&bytes, set.mode) } else { Some(Head::default()) };
    let Some(head) = head else { return Answer::Malformed(400) };
    let (path, query) = head.target.split_once('?').map_or((head.target.as_str(), None), |(path, query)| (path, Some(query)));
    let request = Request {
        source: call.identity.and_then(|n| Peer::parse(IDENTITIES[n])),
        source_ip: call.source.into(),
        remote_ip: call.source.into(),
        destination: SocketAddr::from((ADDRESS, set.port)),
        sni: call.identity.and(call.sni),
        http: set.http.then_some(Http {
            method: &head.method,
            host: head.host.as_bytes(),
            path,
            query,
            headers: &head.headers,
            token: None,
        }),
    };
    match engine.check(&request).verdict {
        Verdict::Allow(_) => Answer::Allowed(set.http.then(|| head.target.clone().into_bytes())),
        Verdict::Deny(_) | Verdict::Ask(_) => Answer::Denied,
    }
}

/// A request's head as the proxy sees it.
#[derive(Default)]
struct Head {
    method: String,
    target: String,
    host: String,
    headers: Vec<(String, String)>,
}

impl Head {
    fn parse(bytes: &[u8], mode: Mode) -> Option<Self> {
        let mut fields = [httparse::EMPTY_HEADER; 64];
        let mut request = httparse::Request::new(&mut fields);
        request.parse(bytes).ok()?;
        let headers: Vec<(String, String)> = request
            .headers
            .iter()
            .map(|h| (h.name.to_ascii_lowercase(), String::from_utf8_lossy(h.value).into_owned()))
            .collect();
        let mut hosts = headers.iter().filter(|(name, _)| name == "host").map(|(_, host)| host.clone());
        let (mut host, more) = (hosts.next()?, hosts.next());
        if more.is_some() {
            return None;
        }
        let mut target = request.path?;
        if let Some(rest) = target.strip_prefix("http://") {
            let at = rest.find(['/', '?', '#']).unwrap_or(rest.len());
            host = rest[..at].to_owned();
            target = &rest[at..];
        }
        let how = match mode {
            Mode::None => Normalization::None,
            Mode::Base => Normalization::Base,
            Mode::MergeSlashes => Normalization::MergeSlashes,
            Mode::DecodeAndMergeSlashes => Normalization::DecodeAndMergeSlashes,
        };
        let target = normalise(target, how).ok()?.into_owned();
        let headers = headers.into_iter().filter(|(name, _)| name != "host").collect();
        Some(Self { method: request.method?.to_owned(), target, host, headers })
    }
}

fn lower(spec: &AuthorizationPolicySpec) -> wire::AuthorizationPolicy {
    let matches = |list: &[String], glob: bool| -> Vec<wire::StringMatch> { list.iter().map(|v| text(v, glob)).collect() };
    let ports = |list: &[String]| list.iter().filter_map(|v| v.parse().ok()).collect();
    let rules = spec.rules.iter().map(|rule| wire::AuthorizationRule {
        from: rule
            .from
            .iter()
            .filter_map(|from| from.source.as_ref())
            .map(|s| wire::Source {
                principals: matches(&s.principals, false),
                not_principals: matches(&s.not_principals, false),
                namespaces: matches(&s.namespaces, true),
                not_namespaces: matches(&s.not_namespaces, true),
                service_accounts: s.service_accounts.clone(),
                not_service_accounts: s.not_service_accounts.clone(),
                ip_blocks: s.ip_blocks.clone(),
                not_ip_blocks: s.not_ip_blocks.clone(),
                remote_ip_blocks: s.remote_ip_blocks.clone(),
                not_remote_ip_blocks: s.not_remote_ip_blocks.clone(),
                ..wire::Source::default()
            })
            .collect(),
        to: rule
            .to
            .iter()
            .filter_map(|to| to.operation.as_ref())
            .map(|o| wire::Operation {
                hosts: matches(&o.hosts, false),
                not_hosts: matches(&o.not_hosts, false),
                ports: ports(&o.ports),
                not_ports: ports(&o.not_ports),
                methods: matches(&o.methods, false),
                not_methods: matches(&o.not_methods, false),
                paths: matches(&o.paths, false),
                not_paths: matches(&o.not_paths, false),
            })
            .collect(),
        when: rule
            .when
            .iter()
            .map(|c| {
                use wire::condition::Attribute as A;
                let (attribute, path) = match c.key.as_str() {
                    "source.ip" => (A::SourceIp, vec![]),
                    "remote.ip" => (A::RemoteIp, vec![]),
                    "source.namespace" => (A::SourceNamespace, vec![]),
                    "source.principal" => (A::SourcePrincipal, vec![]),
                    "destination.ip" => (A::DestinationIp, vec![]),
                    "destination.port" => (A::DestinationPort, vec![]),
                    "connection.sni" => (A::ConnectionSni, vec![]),
                    header => (A::RequestHeader, vec![header["request.headers[".len()..header.len() - 1].to_owned()]),
                };
                let glob = attribute == A::SourceNamespace;
                wire::Condition {
                    attribute: attribute.into(),
                    path,
                    values: matches(&c.values, glob),
                    not_values: matches(&c.not_values, glob),
                }
            })
            .collect(),
    });
    wire::AuthorizationPolicy {
        namespace: "default".into(),
        name: "p".into(),
        action: match spec.action {
            Action::Allow => wire::AuthorizationAction::Allow,
            Action::Deny => wire::AuthorizationAction::Deny,
            Action::Audit => wire::AuthorizationAction::Audit,
            Action::Custom => wire::AuthorizationAction::Custom,
        }
        .into(),
        rules: rules.collect(),
        ..wire::AuthorizationPolicy::default()
    }
}

fn text(value: &str, glob: bool) -> wire::StringMatch {
    use wire::string_match::Kind;
    let kind = if glob {
        Kind::Glob(value.into())
    } else if value.contains('{') {
        Kind::Template(value.into())
    } else if value == "*" {
        Kind::Present(true)
    } else if let Some(suffix) = value.strip_prefix('*') {
        Kind::Suffix(suffix.into())
    } else if let Some(prefix) = value.strip_suffix('*') {
        Kind::Prefix(prefix.into())
    } else {
        Kind::Exact(value.into())
    };
    wire::StringMatch { kind: Some(kind) }
}
