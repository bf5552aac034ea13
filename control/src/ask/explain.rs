//! What would become of a request: the verdict of the very code that the proxy runs, on the very configuration that it is sent.

use super::bounds::{claims, mode};
use super::world::{Behind, World, app_port, named_port};
use super::{Mind, Unanswered};
use crate::model::Pod;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use weft_api::console::{Caller, Explained, Judged, Question, QuestionHttp, Trace, TraceRule};
use weft_api::names;
use weft_api::wire::{self, MtlsMode, Protocol};
use weft_policy::authz::{Engine, Http, Peer, Request};
use weft_policy::explain::{Explanation, explain};
use weft_policy::path::{Normalization, normalise};

/// Who calls, found out.
struct Found {
    identity: Option<String>,
    address: Option<IpAddr>,
    words: String,
    notes: Vec<String>,
}

impl Mind {
    /// What would become of a request.
    ///
    /// # Errors
    /// The question names something that is not there, or can't be understood.
    pub fn explain(&self, question: &Question) -> Result<Explained, Unanswered> {
        judge(&self.world()?, question)
    }
}

fn judge(world: &World, question: &Question) -> Result<Explained, Unanswered> {
    let caller = caller(world, &question.from)?;
    let behind = world.target(&question.namespace, &question.to)?;
    let mut explained = Explained::default();
    for pod in &behind.pods {
        let port = port(&behind, pod, question)?;
        let judged = about(pod, port, &world.inbound(behind.view, pod), &caller, question)?;
        // Pods of one Deployment differ in nothing that counts.
        match explained.verdicts.iter_mut().find(|same| alike(same, &judged)) {
            Some(same) => same.pods.extend(judged.pods),
            None => explained.verdicts.push(judged),
        }
    }
    Ok(explained)
}

/// Whether two pods say the same.
fn alike(a: &Judged, b: &Judged) -> bool {
    let told = |j: &Judged| Judged { pods: Vec::new(), request: String::new(), ..j.clone() };
    told(a) == told(b)
}

fn caller(world: &World, from: &Caller) -> Result<Found, Unanswered> {
    let mesh = &world.mesh;
    match from {
        Caller::Pod { namespace, name } => {
            let pod = world.views.get(namespace).and_then(|view| view.pods.get(name));
            let pod = pod.ok_or_else(|| Unanswered::NotFound(format!("there is no pod {name} in namespace {namespace}")))?;
            let id = names::spiffe_id(&mesh.trust_domain, namespace, &pod.service_account);
            let meshed = pod.meshed();
            let notes = if meshed {
                Vec::new()
            } else {
                vec![format!("pod/{name} has no sidecar: it calls in plaintext and proves nothing")]
            };
            let words = if meshed { id.clone() } else { format!("pod/{name} in plaintext") };
            Ok(Found { identity: meshed.then_some(id), address: pod.addresses.first().copied(), words, notes })
        }
        Caller::ServiceAccount { namespace, name } => {
            let id = names::spiffe_id(&mesh.trust_domain, namespace, name);
            let known = world.views.get(namespace).is_some_and(|v| v.pods.values().any(|p| p.service_account == *name));
            let notes = if known {
                Vec::new()
            } else {
                vec![format!("no pod runs as service account {name} of namespace {namespace} now")]
            };
            Ok(Found { identity: Some(id.clone()), address: None, words: id, notes })
        }
        Caller::Plaintext { address } => {
            let address = match address.as_str() {
                "" => None,
                text => Some(text.parse().map_err(|_| Unanswered::Bad(format!("{text:?} is no IP address")))?),
            };
            let words = address.map_or_else(|| "plaintext".to_owned(), |a: IpAddr| format!("{a} in plaintext"));
            Ok(Found { identity: None, address, words, notes: Vec::new() })
        }
    }
}

/// The app's port that is meant.
fn port(behind: &Behind<'_>, pod: &Pod, question: &Question) -> Result<u16, Unanswered> {
    let wanted = question.port.as_str();
    if let Some(service) = behind.service {
        let fits = |p: &&crate::model::ServicePort| wanted.is_empty() || p.name == wanted || p.port.to_string() == wanted;
        let fitting: Vec<_> = service.ports.iter().filter(|p| p.transport == crate::model::Transport::Tcp).filter(fits).collect();
        let all = || service.ports.iter().map(|p| p.port.to_string()).collect::<Vec<_>>().join(", ");
        let chosen = match fitting[..] {
            [] => return Err(Unanswered::Bad(format!("svc/{} has no TCP port {wanted}; it has {}", service.name, all()))),
            [one] => one,
            _ => return Err(Unanswered::Bad(format!("svc/{} has several ports: {}; name one", service.name, all()))),
        };
        return app_port(pod, service, chosen, behind.view).ok_or_else(|| {
            Unanswered::NotFound(format!("port {} of svc/{} leads to no port of pod/{}", chosen.port, service.name, pod.name))
        });
    }
    if let Ok(number) = wanted.parse::<u16>() {
        return Ok(number);
    }
    if !wanted.is_empty() {
        return named_port(pod, wanted).ok_or_else(|| Unanswered::Bad(format!("pod/{} has no port named {wanted}", pod.name)));
    }
    let mut declared = pod.app_containers().flat_map(|c| &c.ports).filter(|p| p.transport == crate::model::Transport::Tcp);
    match (declared.next(), declared.next()) {
        (Some(only), None) => Ok(only.port),
        _ => Err(Unanswered::Bad(format!("which port of pod/{}? Name one, as {}:8080", pod.name, question.to))),
    }
}

fn about(pod: &Pod, port: u16, inbound: &wire::Inbound, caller: &Found, question: &Question) -> Result<Judged, Unanswered> {
    let declared = inbound.ports.iter().find(|p| p.port == u32::from(port)).map_or(Protocol::Detect, wire::InboundPort::protocol);
    let opaque = question.http.is_none() || matches!(declared, Protocol::Tcp | Protocol::Tls);
    let mut judged = Judged { pods: vec![pod.name.clone()], notes: caller.notes.clone(), ..Judged::default() };
    let mode = mode(inbound, port);
    let what = match &question.http {
        Some(http) if !opaque => format!("{} {}", http.method, http.path),
        _ => "a connection".into(),
    };
    judged.request = format!("{what} from {} to port {port} of pod/{}", caller.words, pod.name);
    if question.http.is_some() && opaque {
        judged.notes.push(format!(
            "port {port} is declared as {}: bytes are not looked into, so rules see no method, path or header",
            declared.as_str_name()
        ));
    }
    if !pod.meshed() {
        "allow".clone_into(&mut judged.verdict);
        "the pod has no sidecar: nothing is enforced there".clone_into(&mut judged.reason);
        return Ok(judged);
    }
    if mode == MtlsMode::Strict && caller.identity.is_none() {
        "deny".clone_into(&mut judged.verdict);
        judged.reason = format!("port {port} takes only mutual TLS (PeerAuthentication STRICT), and the caller speaks plaintext");
        return Ok(judged);
    }
    let identity = match (&caller.identity, mode) {
        (Some(_), MtlsMode::Disable) => {
            judged
                .notes
                .push(format!("mutual TLS is DISABLEd on port {port}: the caller comes in plaintext and has no identity"));
            None
        }
        (identity, _) => identity.as_deref(),
    };
    if caller.address.is_none() && looks_at_addresses(inbound) {
        judged.notes.push("the caller's address is not known; ipBlocks were judged as for 0.0.0.0".into());
    }
    let address = caller.address.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    let engine = Engine::compile(&inbound.authorization, &inbound.trust_domains);
    let destination = SocketAddr::new(pod.addresses.first().copied().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), port);
    let mut request = Request {
        source: identity.and_then(Peer::parse),
        source_ip: address,
        remote_ip: address,
        destination,
        sni: None,
        http: None,
    };
    let plain = QuestionHttp::default();
    let http = question.http.as_ref().unwrap_or(&plain);
    let path = normalise(&http.path, Normalization::from(inbound.path_normalization()))
        .map_err(|refused| Unanswered::Bad(format!("the proxy answers 400: {refused}")))?;
    let (path, query) = path.split_once('?').map_or((&*path, None), |(path, query)| (path, Some(query)));
    let host = if http.host.is_empty() { assumed_host(question) } else { http.host.clone() };
    let headers: Vec<(String, String)> = http.headers.iter().map(|(n, v)| (n.to_lowercase(), v.clone())).collect();
    let token = claims(&http.request_principal);
    if !opaque {
        if http.host.is_empty() {
            judged.notes.push(format!("host {host} was assumed; --host says another one"));
        }
        if path != http.path.split('?').next().unwrap_or_default() {
            judged.notes.push(format!("the path is normalised to {path}"));
        }
        request.http =
            Some(Http { method: &http.method, host: host.as_bytes(), path, query, headers: &headers, token: token.as_ref() });
        if !inbound.jwt.is_empty() && token.is_none() {
            judged.notes.push("judged as without a token; RequestAuthentication is in force here".into());
        }
    }
    let (_, explanation) = explain(&engine, &request, None);
    Ok(told(judged, explanation))
}

fn assumed_host(question: &Question) -> String {
    let name = question.to.split_once('/').map_or("", |(_, name)| name);
    format!("{name}.{}", question.namespace)
}

fn looks_at_addresses(inbound: &wire::Inbound) -> bool {
    use wire::condition::Attribute::{RemoteIp, SourceIp};
    inbound.authorization.iter().flat_map(|p| &p.rules).any(|rule| {
        let blocks = |s: &wire::Source| {
            [&s.ip_blocks, &s.not_ip_blocks, &s.remote_ip_blocks, &s.not_remote_ip_blocks].iter().any(|list| !list.is_empty())
        };
        rule.from.iter().any(blocks) || rule.when.iter().any(|c| matches!(c.attribute(), SourceIp | RemoteIp))
    })
}

fn told(judged: Judged, explanation: Explanation) -> Judged {
    let policies = explanation.policies.into_iter().map(|policy| Trace {
        policy: policy.policy,
        action: policy.action.as_str().into(),
        dry_run: policy.dry_run,
        matched: policy.matched,
        note: policy.note.unwrap_or_default(),
        rules: policy
            .rules
            .into_iter()
            .map(|rule| TraceRule {
                rule: rule.rule as u64,
                matched: rule.matched,
                failed: rule.failed.into_iter().map(|failure| failure.words).collect(),
            })
            .collect(),
    });
    Judged {
        verdict: explanation.verdict.into(),
        reason: explanation.reason,
        policy: explanation.policy.unwrap_or_default(),
        dry_run: explanation.dry_run.unwrap_or_default(),
        policies: policies.collect(),
        ..judged
    }
}
