//! Puts the webhook on the index: namespaces come from the watch, or by one read where the watch has not seen one yet; what
//! was decided becomes events. Validation of policies knows the cluster by the same index ([`surroundings`]).

pub mod surroundings;

use crate::events::{Events, Kind as EventKind};
use crate::index::Index;
use crate::keep::missed::namespace_facts;
use crate::model::Owner;
use kube::{Api, Client};
use prometheus_client::registry::Registry;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use weft_webhook::review::{Decided, Outcome};
use weft_webhook::server::{self, Injector};
use weft_webhook::validate::{self, server::Validator};
use weft_webhook::{BoxFuture, ClusterFacts, LookupError, NamespaceFacts, Namespaces, Reason, Settings};

/// Time for the one read of a namespace; the API server itself gives a webhook some seconds in all.
const READ: Duration = Duration::from_secs(2);

/// Looks namespaces up.
pub struct Lookup {
    index: Arc<Index>,
    client: Option<Client>,
}

impl Lookup {
    /// From the index, and from the cluster if there is one.
    pub fn new(index: Arc<Index>, client: Option<Client>) -> Self {
        Self { index, client }
    }
}

impl Namespaces for Lookup {
    fn get<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<Arc<NamespaceFacts>>, LookupError>> {
        Box::pin(async move {
            if let Some(known) = self.index.namespace(name) {
                return Ok(Some(Arc::new(namespace_facts(name, Some(&known)))));
            }
            let Some(client) = &self.client else { return Ok(None) };
            let api: Api<crate::source::wire::WireNamespace> = Api::all(client.clone());
            let failed = |cause: String| LookupError { name: name.to_owned(), cause };
            match tokio::time::timeout(READ, api.get_opt(name)).await {
                Ok(Ok(found)) => Ok(found.map(|ns| {
                    Arc::new(NamespaceFacts {
                        name: name.to_owned(),
                        labels: ns.metadata.labels.unwrap_or_default(),
                        annotations: ns.metadata.annotations.unwrap_or_default(),
                    })
                })),
                Ok(Err(error)) => Err(failed(error.to_string())),
                Err(_) => Err(failed(format!("no answer in {} s", READ.as_secs()))),
            }
        })
    }
}

/// Makes events of what the webhook decided.
pub struct Observer {
    events: Events,
}

impl Observer {
    /// Events go to this queue.
    pub fn new(events: Events) -> Self {
        Self { events }
    }
}

/// What is told about an outcome; `None`: nothing, as for a pod that nobody wanted injected, or a dry run.
fn news(outcome: &Outcome) -> Option<(EventKind, String)> {
    if outcome.dry_run {
        return None;
    }
    let reason = outcome.reason.as_str();
    match outcome.decided {
        Decided::Inject if outcome.reason == Reason::AlreadyInjected => None,
        Decided::Inject => Some((EventKind::Injected, format!("Sidecar injected ({reason})"))),
        Decided::Skip if outcome.namespace_asked && outcome.reason != Reason::AlreadyInjected => {
            Some((EventKind::Skipped, format!("Sidecar not injected ({reason})")))
        }
        Decided::Refuse => {
            Some((EventKind::Refused, format!("Pod refused ({reason}): {}", outcome.message.as_deref().unwrap_or_default())))
        }
        Decided::Skip | Decided::Error => None,
    }
}

impl server::Observer for Observer {
    fn observe(&self, outcome: &Outcome) {
        let Some((kind, note)) = news(outcome) else { return };
        let about = match &outcome.owner {
            Some(owner) => Owner {
                api_version: owner.api_version.clone(),
                kind: owner.kind.clone(),
                name: owner.name.clone(),
                uid: owner.uid.clone(),
            },
            None => Owner { api_version: "v1".into(), kind: "Pod".into(), name: outcome.pod.clone(), uid: String::new() },
        };
        // A pod of its own whose name is still to be made can't be told about.
        if !about.name.ends_with('*') {
            self.events.send_about_pod(&outcome.namespace, about, outcome.labels.clone(), kind, note);
        }
    }
}

/// The webhooks as a router: injection at `/inject`, validation at `/validate`.
pub fn router(
    lookup: Lookup,
    observer: Observer,
    settings: watch::Receiver<Arc<Settings>>,
    cluster: watch::Receiver<ClusterFacts>,
    known: surroundings::Known,
    registry: &mut Registry,
) -> axum::Router {
    let validator = Validator { around: Box::new(known), metrics: validate::server::Metrics::register(registry) };
    let injector = server::router(Arc::new(Injector {
        namespaces: Box::new(lookup),
        settings: Box::new(move || settings.borrow().clone()),
        cluster: Box::new(move || *cluster.borrow()),
        observer: Box::new(observer),
        metrics: server::Metrics::register(registry),
    }));
    injector.merge(validate::server::router(Arc::new(validator)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told() {
        let outcome = |decided, reason, namespace_asked, dry_run| Outcome {
            decided,
            reason,
            namespace: "shop".into(),
            pod: "cart-*".into(),
            owner: None,
            labels: std::collections::BTreeMap::default(),
            dry_run,
            namespace_asked,
            warnings: Vec::new(),
            message: Some("why".into()),
        };
        for (outcome, expected) in [
            (outcome(Decided::Inject, Reason::NamespaceEnabled, true, false), Some(EventKind::Injected)),
            (outcome(Decided::Inject, Reason::NamespaceEnabled, true, true), None),
            (outcome(Decided::Inject, Reason::AlreadyInjected, true, false), None),
            (outcome(Decided::Skip, Reason::NotEnabled, false, false), None),
            (outcome(Decided::Skip, Reason::HostNetwork, true, false), Some(EventKind::Skipped)),
            (outcome(Decided::Refuse, Reason::BadAnnotation, false, false), Some(EventKind::Refused)),
            (outcome(Decided::Error, Reason::InternalError, true, false), None),
        ] {
            assert_eq!(news(&outcome).map(|(kind, _)| kind), expected, "{outcome:?}");
        }
    }
}
