//! Says what became of policies: in the log of each replica, in a metric, and, from the replica that leads, in their status.
//!
//! A status is written only where it differs from what it should be, which the watch tells: nobody who is content is asked or told anything.
//! Writes are few a second, name the version that they change, and leave other people's conditions as they are.

use crate::compile::Mesh;
use crate::compile::security::CONDITION;
use crate::compile::security::jwt::Keys;
use crate::compile::security::verdict::{self, Verdict};
use crate::index::Index;
use crate::metrics::{Ended, Metrics};
use crate::model::policy::Reported;
use crate::model::{Key, Kind};
use crate::source::kube::within;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::{Api, Client};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{debug, info, warn};
use weft_api::istio::Spec;
use weft_api::istio::security::{AuthorizationPolicySpec, GROUP, PeerAuthenticationSpec, RequestAuthenticationSpec, VERSIONS};

/// How long a burst of changes is gathered.
const GATHER: Duration = Duration::from_millis(200);
/// Pause between two writes.
const PACE: Duration = Duration::from_millis(100);
/// How long a write has to come back by the watch before it is made again, and how long a failure is left alone.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is followed.
pub struct Task {
    /// The cluster; none with a folder of manifests.
    pub client: Option<Client>,
    /// What is known.
    pub index: Arc<Index>,
    /// The settings.
    pub mesh: watch::Receiver<Arc<Mesh>>,
    /// The keys of token issuers.
    pub keys: watch::Receiver<Arc<Keys>>,
    /// Whether this replica writes.
    pub leader: watch::Receiver<bool>,
    /// Counts.
    pub metrics: Arc<Metrics>,
}

impl Task {
    /// Runs until it is dropped.
    pub async fn run(mut self) {
        let mut policies = self.index.policies();
        let mut synced = self.index.synced();
        let mut said: HashMap<(Kind, Key), Reported> = HashMap::new();
        let mut tried: HashMap<(Kind, Key), (Reported, Instant)> = HashMap::new();
        loop {
            let mut due = None;
            if *synced.borrow_and_update() {
                policies.mark_unchanged();
                let verdicts = self.verdicts();
                Self::say(&mut said, &verdicts);
                if *self.leader.borrow_and_update() {
                    due = self.write(&mut tried, &verdicts).await;
                }
            }
            let again = async {
                match due {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let alive = tokio::select! {
                changed = policies.changed() => changed.is_ok(),
                changed = synced.changed() => changed.is_ok(),
                changed = self.mesh.changed() => changed.is_ok(),
                changed = self.keys.changed() => changed.is_ok(),
                changed = self.leader.changed() => changed.is_ok(),
                () = again => true,
            };
            if !alive {
                return std::future::pending().await;
            }
            tokio::time::sleep(GATHER).await;
        }
    }

    fn verdicts(&mut self) -> Vec<Verdict> {
        let (mesh, keys) = (self.mesh.borrow_and_update().clone(), self.keys.borrow_and_update().clone());
        let all = self.index.all_policies();
        let verdicts: Vec<_> = all.iter().flat_map(|policies| verdict::of_namespace(policies, &mesh, &keys)).collect();
        let bad = verdicts.iter().filter(|v| !v.is_good()).count();
        self.metrics.bad_policies.set(i64::try_from(bad).unwrap_or(i64::MAX));
        verdicts
    }

    /// Logs what is new about policies that are not in force as they are written.
    fn say(said: &mut HashMap<(Kind, Key), Reported>, verdicts: &[Verdict]) {
        let mut now = HashMap::new();
        for verdict in verdicts {
            let at = (verdict.kind, verdict.key.clone());
            let before = said.get(&at);
            if verdict.is_good() {
                if before.is_some_and(|b| b.status != "True") {
                    info!(policy = %verdict.key, kind = kind(verdict.kind), "the policy is in force");
                }
            } else if before.is_none_or(|b| b.message != verdict.wanted.message) {
                warn!(policy = %verdict.key, kind = kind(verdict.kind), reason = %verdict.wanted.reason,
                    "a policy is not in force as it is written: {}", verdict.wanted.message);
            }
            now.insert(at, verdict.wanted.clone());
        }
        *said = now;
    }

    /// Writes what differs. Returns when to look again, if something is left.
    async fn write(&mut self, tried: &mut HashMap<(Kind, Key), (Reported, Instant)>, verdicts: &[Verdict]) -> Option<Instant> {
        let client = self.client.clone()?;
        tried.retain(|_, (_, at)| at.elapsed() < PATIENCE);
        let mut again = None;
        for verdict in verdicts.iter().filter(|v| v.reported.as_ref() != Some(&v.wanted)) {
            if !*self.leader.borrow() {
                return None;
            }
            let at = (verdict.kind, verdict.key.clone());
            if let Some((_, last)) = tried.get(&at).filter(|(wanted, _)| *wanted == verdict.wanted) {
                let due = *last + PATIENCE;
                again = Some(again.map_or(due, |earlier: Instant| earlier.min(due)));
                continue;
            }
            match write(&client, verdict).await {
                Ok(()) => drop(self.metrics.policy_status_writes.get_or_create(&Ended::OK).inc()),
                Err(error) => {
                    self.metrics.policy_status_writes.get_or_create(&Ended::ERROR).inc();
                    debug!(%error, policy = %verdict.key, kind = kind(verdict.kind), "cannot write the status of a policy");
                }
            }
            tried.insert(at, (verdict.wanted.clone(), Instant::now()));
            again = Some(again.unwrap_or_else(|| Instant::now() + PATIENCE));
            tokio::time::sleep(PACE).await;
        }
        again
    }
}

/// `kind` of a policy.
fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Peer => PeerAuthenticationSpec::KIND,
        Kind::Authorization => AuthorizationPolicySpec::KIND,
        Kind::Request => RequestAuthenticationSpec::KIND,
        _ => "",
    }
}

async fn write(client: &Client, verdict: &Verdict) -> Result<(), kube::Error> {
    for version in VERSIONS {
        let resource =
            ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(GROUP, version, kind(verdict.kind)), verdict.kind.plural());
        let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), &verdict.key.namespace, &resource);
        // Of the version that is written nothing but other people's conditions matters.
        let Some(object) = within(api.get_opt(&verdict.key.name)).await? else { continue };
        if object.metadata.uid.as_deref().unwrap_or_default() != verdict.uid {
            return Ok(());
        }
        let conditions = object.data.pointer("/status/conditions").and_then(Value::as_array).cloned().unwrap_or_default();
        let Some(conditions) = with(conditions, &verdict.wanted, &Timestamp::now().to_string()) else { return Ok(()) };
        let patch = json!({
            "metadata": {"resourceVersion": object.metadata.resource_version},
            "status": {"conditions": conditions},
        });
        within(api.patch_status(&verdict.key.name, &PatchParams::default(), &Patch::Merge(patch))).await?;
        return Ok(());
    }
    Ok(())
}

/// The conditions with ours as it should be. `None`: it is so already.
fn with(mut conditions: Vec<Value>, wanted: &Reported, now: &str) -> Option<Vec<Value>> {
    let ours = conditions.iter().position(|c| c["type"] == CONDITION);
    let known = ours.map(|i| &conditions[i]);
    let since = known.filter(|c| c["status"] == wanted.status.as_str()).and_then(|c| c["lastTransitionTime"].as_str());
    let mut condition = json!({
        "type": CONDITION,
        "status": wanted.status,
        "reason": wanted.reason,
        "message": wanted.message,
        "lastTransitionTime": since.unwrap_or(now),
    });
    // Objects of a folder have no generation, and neither have those of servers that don't count.
    if wanted.generation != 0 {
        condition["observedGeneration"] = json!(wanted.generation);
    }
    if known == Some(&condition) {
        return None;
    }
    match ours {
        Some(i) => conditions[i] = condition,
        None => conditions.push(condition),
    }
    Some(conditions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_of_others_stay() {
        let wanted = |status: &str| Reported { status: status.into(), reason: "R".into(), message: "m".into(), generation: 3 };
        let other = json!({"type": "Reconciled", "status": "True"});
        let first = with(vec![other.clone()], &wanted("True"), "t1").unwrap();
        assert_eq!(first[0], other);
        assert_eq!(first[1]["lastTransitionTime"], "t1");
        assert_eq!(first[1]["observedGeneration"], 3);
        assert!(with(first.clone(), &wanted("True"), "t2").is_none(), "it says so already");
        // The time is that of the last change of `status`, not of the last write.
        let mut said = wanted("True");
        said.message = "n".into();
        let second = with(first.clone(), &said, "t2").unwrap();
        assert_eq!((second.len(), &second[1]["lastTransitionTime"]), (2, &json!("t1")));
        let third = with(second, &wanted("False"), "t3").unwrap();
        assert_eq!((third.len(), &third[1]["lastTransitionTime"]), (2, &json!("t3")));
    }
}
