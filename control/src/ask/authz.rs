//! What holds for the pods behind a name: policies with how often they decided, and the modes of mutual TLS.

use super::bounds::mode;
use super::world::World;
use super::{Mind, Unanswered};
use crate::reports::action;
use std::collections::{BTreeMap, BTreeSet};
use weft_api::console::{Authz, AuthzPolicy, AuthzPort, Mtls};
use weft_api::wire;

/// A policy by what tells its rows apart: name, action, dry run.
type Row = (String, String, bool);

impl Mind {
    /// What holds for the pods behind a name.
    ///
    /// # Errors
    /// Nothing is behind it.
    pub fn authz(&self, namespace: &str, target: &str) -> Result<Authz, Unanswered> {
        let world = self.world()?;
        let mut answer = of(&world, namespace, target)?;
        let pods: BTreeSet<&str> = answer.pods.iter().map(String::as_str).collect();
        let mut hits: BTreeMap<Row, (u64, u64)> = BTreeMap::new();
        for hit in self.reports.hits() {
            if hit.namespace == namespace && pods.contains(hit.pod.as_str()) {
                let sum = hits.entry((hit.policy, hit.action, hit.dry_run)).or_default();
                *sum = (sum.0.saturating_add(hit.allowed), sum.1.saturating_add(hit.denied));
            }
        }
        for policy in &mut answer.policies {
            let row = (policy.policy.clone(), policy.action.clone(), policy.dry_run);
            (policy.allowed, policy.denied) = hits.remove(&row).unwrap_or_default();
        }
        Ok(answer)
    }
}

fn of(world: &World, namespace: &str, target: &str) -> Result<Authz, Unanswered> {
    let behind = world.target(namespace, target)?;
    let mut answer = Authz::default();
    let mut modes: BTreeMap<String, u64> = BTreeMap::new();
    let mut ports: BTreeMap<u16, (BTreeSet<String>, BTreeMap<String, u64>)> = BTreeMap::new();
    let mut policies: Vec<AuthzPolicy> = Vec::new();
    let mut requests = BTreeSet::new();
    for pod in &behind.pods {
        answer.pods.push(pod.name.clone());
        if !pod.meshed() {
            answer.unmeshed.push(pod.name.clone());
            continue;
        }
        let inbound = world.inbound(behind.view, pod);
        *modes.entry(inbound.mtls().as_str_name().to_owned()).or_default() += 1;
        let declared = inbound.ports.iter().map(|p| (p.port, p.protocol().as_str_name()));
        let own = inbound.port_mtls.iter().map(|p| (p.port, ""));
        for (port, protocol) in declared.chain(own) {
            let Ok(port) = u16::try_from(port) else { continue };
            let known = ports.entry(port).or_default();
            let fresh = known.0.insert(pod.name.clone());
            if fresh {
                *known.1.entry(mode(&inbound, port).as_str_name().to_owned()).or_default() += 1;
            }
            protocols(&mut answer.ports, port, protocol);
        }
        let mut closed: BTreeSet<bool> = BTreeSet::new();
        for policy in &inbound.authorization {
            if policy.action() == wire::AuthorizationAction::Allow {
                closed.insert(policy.dry_run);
            }
            count(&mut policies, policy);
        }
        for dry_run in closed {
            // No policy decides where none of the ALLOW policies matches.
            count(&mut policies, &wire::AuthorizationPolicy { dry_run, ..wire::AuthorizationPolicy::default() });
        }
        requests.extend(inbound.jwt.iter().map(|rule| rule.policy.clone()));
    }
    // "None matched" belongs to the end.
    policies.sort_by_key(|p| p.policy.is_empty());
    answer.policies = policies;
    answer.request_authentications = requests.into_iter().collect();
    answer.mtls = modes.into_iter().map(|(mode, pods)| Mtls { mode, pods }).collect();
    answer.ports.sort_by_key(|p| p.port);
    for port in &mut answer.ports {
        let modes = ports.remove(&port.port).unwrap_or_default().1;
        port.mtls = modes.into_iter().map(|(mode, pods)| Mtls { mode, pods }).collect();
    }
    Ok(answer)
}

fn protocols(ports: &mut Vec<AuthzPort>, port: u16, protocol: &str) {
    match ports.iter_mut().find(|p| p.port == port) {
        Some(known) if known.protocol.is_empty() => protocol.clone_into(&mut known.protocol),
        Some(_) => {}
        None => ports.push(AuthzPort { port, protocol: protocol.to_owned(), mtls: Vec::new() }),
    }
}

fn count(policies: &mut Vec<AuthzPolicy>, policy: &wire::AuthorizationPolicy) {
    let name = if policy.name.is_empty() { String::new() } else { format!("{}/{}", policy.namespace, policy.name) };
    if let Some(known) = policies.iter_mut().find(|p| p.policy == name && p.dry_run == policy.dry_run) {
        known.pods += 1;
        return;
    }
    policies.push(AuthzPolicy {
        policy: name,
        action: action(policy.action).into(),
        dry_run: policy.dry_run,
        rules: policy.rules.len() as u64,
        broken: policy.broken.clone(),
        pods: 1,
        allowed: 0,
        denied: 0,
    });
}
