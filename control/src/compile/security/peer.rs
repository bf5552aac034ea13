//! `PeerAuthentication`: which mutual TLS a pod asks for.
//!
//! Three scopes, the narrower before the wider: the pod (a selector that matches), its namespace, the mesh (the root namespace). In each
//! the oldest policy counts and the others don't; UNSET leaves it to the wider scope; where none says anything, PERMISSIVE holds. Modes of
//! single ports stand in the pod's scope only. A policy with a selector in the root namespace counts nowhere, as in Istio.

use super::text::At;
use super::{read as read_object, selector, selector_of};
use crate::compile::Known;
use crate::model::Pod;
use crate::model::policy::{Peer, Policies, Policy};
use serde_json::Value;
use std::collections::BTreeMap;
use weft_api::istio::security::{MtlsMode, PeerAuthenticationSpec};
use weft_api::wire;

/// What a pod asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Modes {
    /// Where `ports` says nothing else.
    pub mode: wire::MtlsMode,
    /// Ports with a mode of their own.
    pub ports: BTreeMap<u16, wire::MtlsMode>,
}

impl Modes {
    /// The mode of a port.
    pub fn of(&self, port: u16) -> wire::MtlsMode {
        self.ports.get(&port).copied().unwrap_or(self.mode)
    }
}

/// Reads an object.
pub fn read(value: Value) -> Policy<Peer> {
    read_object::<PeerAuthenticationSpec, _>(
        value,
        |object| {
            let spec = &object.spec;
            let mut ports = BTreeMap::new();
            for (number, mtls) in &spec.port_level_mtls {
                match u16::try_from(*number) {
                    Ok(port) if port > 0 => drop(ports.insert(port, mtls.mode)),
                    _ => return At(format!("spec.portLevelMtls.{number}")).wrong("is no port between 1 and 65535"),
                }
            }
            let peer = Peer { selector: selector(spec.selector.as_ref(), false), mode: spec.mode(), ports };
            let mut doubts = Vec::new();
            if !peer.ports.is_empty() && peer.selector.is_all() {
                doubts.push("spec.portLevelMtls: counts only in a policy with a selector; it has no effect here".into());
            }
            Ok((peer, doubts))
        },
        // Whoever wrote it wanted something other than the default, and STRICT is what can't let anybody in by mistake.
        |value, _| Peer { selector: selector_of(value), mode: MtlsMode::Strict, ports: BTreeMap::new() },
    )
}

/// The oldest of those that `counts`.
fn oldest(policies: &Policies, counts: impl Fn(&Peer) -> bool) -> Option<&Policy<Peer>> {
    policies.peers.values().map(AsRef::as_ref).filter(|p| counts(&p.spec)).min_by(|a, b| a.age().cmp(&b.age()))
}

/// What holds for a pod.
pub fn modes(pod: &Pod, known: &Known<'_>) -> Modes {
    let in_root = pod.namespace == known.mesh.root_namespace();
    let mesh = oldest(known.root, |p| p.selector.is_all());
    let (namespace, workload) = if in_root {
        (None, None)
    } else {
        let own = &known.view.policies;
        (oldest(own, |p| p.selector.is_all()), oldest(own, |p| !p.selector.is_all() && p.selector.selects(&pod.labels)))
    };
    let mut mode = wire::MtlsMode::Permissive;
    for policy in [mesh, namespace, workload].into_iter().flatten() {
        mode = said(policy.spec.mode).unwrap_or(mode);
    }
    let ports = workload.map(|p| &p.spec.ports).into_iter().flatten();
    Modes { mode, ports: ports.map(|(port, said_mode)| (*port, said(*said_mode).unwrap_or(mode))).collect() }
}

fn said(mode: MtlsMode) -> Option<wire::MtlsMode> {
    match mode {
        MtlsMode::Unset => None,
        MtlsMode::Disable => Some(wire::MtlsMode::Disable),
        MtlsMode::Permissive => Some(wire::MtlsMode::Permissive),
        MtlsMode::Strict => Some(wire::MtlsMode::Strict),
    }
}
