//! What is to be said of each policy: whether it is in force as it is written, and if not, why.
//!
//! A condition of type [`super::CONDITION`] in the object's status, as in the Gateway API: `True` means that the policy does what it says.
//! Reasons are a closed set ([`Reason`]).

use super::jwt::Keys;
use super::provider;
use crate::compile::Mesh;
use crate::model::policy::{Authorization, Peer, Policies, Policy, Reported, Request, Selector};
use crate::model::{Key, Kind};
use weft_api::wire::AuthorizationAction;

/// Longest message; conditions of Kubernetes may have 32 KiB, but nobody reads that.
const LONGEST: usize = 1024;

/// `reason` of the condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// In force as it is written.
    Accepted,
    /// It can't be understood.
    Invalid,
    /// It is attached to something other than pods.
    TargetNotSupported,
    /// An older policy of the same scope counts.
    Conflicted,
    /// It counts nowhere, where it stands.
    NoEffect,
    /// The mesh settings don't know who is to be asked.
    UnknownProvider,
    /// An issuer's keys can't be fetched.
    KeysNotAvailable,
}

impl Reason {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "Accepted",
            Self::Invalid => "Invalid",
            Self::TargetNotSupported => "TargetNotSupported",
            Self::Conflicted => "Conflicted",
            Self::NoEffect => "NoEffect",
            Self::UnknownProvider => "UnknownProvider",
            Self::KeysNotAvailable => "KeysNotAvailable",
        }
    }
}

/// What is said of one policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace and name.
    pub key: Key,
    /// Which object of that name.
    pub uid: String,
    /// What its status should say.
    pub wanted: Reported,
    /// What it says.
    pub reported: Option<Reported>,
}

impl Verdict {
    /// Whether the policy is in force as it is written.
    pub fn is_good(&self) -> bool {
        self.wanted.status == "True"
    }
}

/// What is said of all policies of a namespace. `None` while something is not known yet.
pub fn of_namespace(policies: &Policies, mesh: &Mesh, keys: &Keys) -> Vec<Verdict> {
    let peers = policies.peers.values().map(|p| said(Kind::Peer, p, peer(p, policies, mesh)));
    let authorizations = policies.authorizations.values().map(|p| said(Kind::Authorization, p, authorization(p, mesh)));
    let requests = policies.requests.values().filter_map(|p| Some(said(Kind::Request, p, request(p, keys)?)));
    peers.chain(authorizations).chain(requests).collect()
}

fn said<T>(kind: Kind, policy: &Policy<T>, (reason, mut message): (Reason, String)) -> Verdict {
    if message.len() > LONGEST {
        let end = (0..=LONGEST - 4).rev().find(|i| message.is_char_boundary(*i)).unwrap_or_default();
        message.truncate(end);
        message.push('…');
    }
    Verdict {
        kind,
        key: Key::new(policy.namespace.as_str(), policy.name.as_str()),
        uid: policy.uid.clone(),
        wanted: Reported {
            status: if reason == Reason::Accepted { "True" } else { "False" }.into(),
            reason: reason.as_str().into(),
            message,
            generation: policy.generation,
        },
        reported: policy.reported.clone(),
    }
}

/// What goes for all kinds. `refused` is what an object that never was good does.
fn common<T>(policy: &Policy<T>, selector: &Selector, refused: &str) -> Option<(Reason, String)> {
    if let Some(problem) = &policy.problem {
        let meanwhile = if policy.kept { "the version before stays in force" } else { refused };
        return Some((Reason::Invalid, format!("{problem}; until this is corrected, {meanwhile}")));
    }
    if selector.elsewhere {
        let message =
            "spec.targetRefs: it is attached to something other than pods, of which Weft has none; use spec.selector for pods";
        return Some((Reason::TargetNotSupported, message.into()));
    }
    None
}

fn accepted(doubts: &[String]) -> (Reason, String) {
    let mut message = "in force".to_owned();
    for doubt in doubts {
        message.push_str("; but ");
        message.push_str(doubt);
    }
    (Reason::Accepted, message)
}

fn peer(policy: &Policy<Peer>, policies: &Policies, mesh: &Mesh) -> (Reason, String) {
    if let Some(found) = common(policy, &policy.spec.selector, "STRICT holds for its pods") {
        return found;
    }
    if !policy.spec.selector.is_all() {
        if policy.namespace == mesh.root_namespace() {
            let message = "spec.selector: in the root namespace only a policy without selector counts, for the whole mesh";
            return (Reason::NoEffect, message.into());
        }
        return accepted(&policy.doubts);
    }
    let older = policies.peers.values().filter(|p| p.spec.selector.is_all()).min_by(|a, b| a.age().cmp(&b.age()));
    match older.filter(|older| older.name != policy.name) {
        Some(older) => {
            let message = format!("{} is older, has no selector either and counts alone; delete one of them", older.key());
            (Reason::Conflicted, message)
        }
        None => accepted(&policy.doubts),
    }
}

fn authorization(policy: &Policy<Authorization>, mesh: &Mesh) -> (Reason, String) {
    let refused = match (policy.spec.dry_run, policy.spec.action) {
        (true, _) | (_, AuthorizationAction::Audit) => "it does nothing",
        (_, AuthorizationAction::Allow) => "it allows nothing, and its pods deny what no other policy allows",
        (_, AuthorizationAction::Deny | AuthorizationAction::Custom) => "its pods deny all requests",
    };
    if let Some(found) = common(policy, &policy.spec.selector, refused) {
        return found;
    }
    if policy.spec.action == AuthorizationAction::Custom && provider::authorizer(&policy.spec.provider, mesh).is_none() {
        let message = format!(
            "spec.provider.name: mesh.extensionProviders in the settings has no authorizer {:?}; what the rules match is refused",
            policy.spec.provider
        );
        return (Reason::UnknownProvider, message);
    }
    accepted(&policy.doubts)
}

fn request(policy: &Policy<Request>, keys: &Keys) -> Option<(Reason, String)> {
    if let Some(found) = common(policy, &policy.spec.selector, "its pods refuse tokens") {
        return Some(found);
    }
    for (i, jwt) in policy.spec.rules.iter().enumerate() {
        let Some(source) = &jwt.keys else { continue };
        let set = keys.get(source)?;
        if set.jwks.is_empty() {
            let message = format!("spec.jwtRules[{i}]: tokens of {:?} are refused: {}", jwt.rule.issuer, set.error);
            return Some((Reason::KeysNotAvailable, message));
        }
    }
    Some(accepted(&policy.doubts))
}
