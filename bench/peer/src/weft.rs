//! Weft's answers: from the engine that the proxy uses, or from a real proxy.

use crate::case::{Answer, Call, IDENTITIES, Mode, Set};
use anyhow::Result;
use serde_json::{Value, json};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use weft_api::wire;
use weft_control::compile::security::authorization;
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
    let policies: Vec<_> = set.raw.iter().map(compile).collect();
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
            rest[..at].clone_into(&mut host);
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

/// As the control plane understands it.
fn compile(spec: &Value) -> wire::AuthorizationPolicy {
    let policy = authorization::read(json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "p", "namespace": "default"}, "spec": spec,
    }));
    if !policy.spec.broken.is_empty() {
        println!("not understood: {}: {spec}", policy.spec.broken);
    }
    wire::AuthorizationPolicy {
        namespace: policy.namespace,
        name: policy.name,
        action: policy.spec.action.into(),
        dry_run: policy.spec.dry_run,
        rules: policy.spec.rules,
        authorizer: None,
        broken: policy.spec.broken,
    }
}
