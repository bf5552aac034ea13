//! Policies into the neutral model: which of them hold for a pod, and what they say.
//!
//! Everything here is pure. A policy object is read once when it arrives ([`peer::read`], [`authorization::read`], [`jwt::read`]), which
//! yields either what it says or why it can't be used; what holds for a pod is then a matter of selecting ([`mtls`], [`inbound`]).
//!
//! Which policies hold for a pod, as in Istio: those of its own namespace and those of the root namespace, each if its selector matches
//! the pod's labels or it has none. What is attached to something else (`targetRefs`) is for gateways and passed over here.
//!
//! What is refused rather than guessed: a policy that can't be read leaves its last good version in force (the index sees to that).
//! Without one, an `AuthorizationPolicy` denies what it might have denied, a `PeerAuthentication` asks for STRICT, and a
//! `RequestAuthentication` lets no token of its issuers count.

pub mod authorization;
pub mod jwt;
pub mod peer;
pub mod provider;
mod text;
pub mod verdict;

use crate::compile::Known;
use crate::model::Pod;
use crate::model::policy::{Policies, Policy, Reported, Selector};
use serde_json::Value;
use weft_api::istio::{Object, ParseError, Spec, WorkloadSelector};
use weft_api::wire;

/// Type of the condition in the status of policies.
pub const CONDITION: &str = "Accepted";

/// What a reader makes of an object that it understands: what it says, and what of it may not be meant.
type Understood<T> = Result<(T, Vec<String>), ParseError>;

/// Reads an object: by `understand` if that can, else what `refuse` says.
fn read<S: Spec, T>(
    value: Value,
    understand: impl FnOnce(&Object<S>) -> Understood<T>,
    refuse: impl FnOnce(&Value, &str) -> T,
) -> Policy<T> {
    let text = |pointer: &str| value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
    let namespace = text("/metadata/namespace");
    let understood = Object::<S>::from_value(value.clone()).and_then(|mut object| {
        if object.metadata.namespace.is_empty() {
            object.metadata.namespace = "default".into();
        }
        match object.spec.unknown_fields().into_iter().next() {
            Some(path) => {
                Err(ParseError { path, message: "nobody knows this field; is it misspelt, or of a newer version?".into() })
            }
            None => understand(&object),
        }
    });
    let (spec, doubts, problem) = match understood {
        Ok((spec, doubts)) => (spec, doubts, None),
        Err(error) => (refuse(&value, &error.to_string()), Vec::new(), Some(error.to_string())),
    };
    Policy {
        namespace: if namespace.is_empty() { "default".into() } else { namespace },
        name: text("/metadata/name"),
        uid: text("/metadata/uid"),
        created: text("/metadata/creationTimestamp"),
        generation: value.pointer("/metadata/generation").and_then(Value::as_i64).unwrap_or_default(),
        reported: reported(&value),
        spec,
        problem,
        kept: false,
        doubts,
    }
}

/// Our condition in the object's status.
fn reported(value: &Value) -> Option<Reported> {
    let conditions = value.pointer("/status/conditions")?.as_array()?;
    let ours = conditions.iter().find(|c| c["type"] == CONDITION)?;
    let text = |key: &str| ours[key].as_str().unwrap_or_default().to_owned();
    let generation = match &ours["observedGeneration"] {
        Value::String(text) => text.parse().unwrap_or_default(),
        other => other.as_i64().unwrap_or_default(),
    };
    Some(Reported { status: text("status"), reason: text("reason"), message: text("message"), generation })
}

/// For whom, where the object is understood.
fn selector(selector: Option<&WorkloadSelector>, elsewhere: bool) -> Selector {
    Selector { labels: selector.map(|s| s.match_labels.clone()).unwrap_or_default(), elsewhere }
}

/// For whom, where it is not: as it is written if that can be read, else everybody.
fn selector_of(value: &Value) -> Selector {
    let labels = value.pointer("/spec/selector/matchLabels").and_then(Value::as_object);
    let labels: Option<std::collections::BTreeMap<_, _>> =
        labels.map(|l| l.iter().map(|(k, v)| v.as_str().map(|v| (k.clone(), v.to_owned()))).collect()).unwrap_or_default();
    let named = |v: Option<&Value>| v.is_some_and(|v| v.as_object().is_some_and(|o| !o.is_empty()));
    let targets = value.pointer("/spec/targetRefs").and_then(Value::as_array).is_some_and(|t| !t.is_empty());
    Selector { labels: labels.unwrap_or_default(), elsewhere: targets || named(value.pointer("/spec/targetRef")) }
}

/// Policies of one kind that are for the pod: those of the root namespace first, then by name.
fn selected<'a, T>(
    pod: &'a Pod,
    known: &Known<'a>,
    of: impl Fn(&'a Policies) -> Vec<(&'a Policy<T>, &'a Selector)>,
) -> Vec<&'a Policy<T>> {
    let own = (pod.namespace != known.mesh.root_namespace()).then_some(known.view.policies.as_ref());
    std::iter::once(known.root)
        .chain(own)
        .flat_map(of)
        .filter(|(_, selector)| selector.selects(&pod.labels))
        .map(|(policy, _)| policy)
        .collect()
}

/// Fills in what policies say for a pod.
pub fn inbound(pod: &Pod, known: &Known<'_>, to: &mut wire::Inbound) {
    let modes = peer::modes(pod, known);
    to.mtls = modes.mode.into();
    to.port_mtls =
        modes.ports.iter().map(|(port, mode)| wire::PortMtls { port: u32::from(*port), mode: (*mode).into() }).collect();
    to.authorization = authorization::of_pod(pod, known);
    to.jwt = jwt::of_pod(pod, known);
    to.path_normalization = provider::path_normalization(known.mesh).into();
    to.trust_domains =
        std::iter::once(&known.mesh.trust_domain).chain(&known.mesh.policy.trust_domain_aliases).cloned().collect();
    to.trusted_hops.clone_from(&known.mesh.policy.trusted_hops);
}

#[cfg(test)]
mod agree;
#[cfg(test)]
mod tests;
