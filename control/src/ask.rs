//! Answers to people's questions, from what is known ([`crate::index`]), what is sent ([`crate::compile`]) and what was reported
//! ([`crate::reports`]). Nothing here changes anything, and nothing of the mesh waits for it.

mod authz;
pub mod bounds;
mod explain;
mod preview;
pub mod who;
pub mod world;

use crate::compile::Mesh;
use crate::compile::security::jwt::Keys;
use crate::index::Index;
use crate::reports::Reports;
use crate::reports::edges::Count;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use weft_api::console::{Edge, Edges, PolicyHits, Proxies, Refusal, Refusals, Source, Workload};
use weft_api::wire;
use who::Directory;
use world::World;

/// Edges of one answer, at most.
pub const MOST_EDGES: usize = 20_000;

/// Why a question has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unanswered {
    /// The question makes no sense.
    #[error("{0}")]
    Bad(String),
    /// It is about something that is not there.
    #[error("{0}")]
    NotFound(String),
    /// The cluster's objects are not all listed yet.
    #[error("this replica has not read the cluster's objects yet; try again in a moment")]
    NotReady,
}

/// What answers are made of.
pub struct Mind {
    /// What is known.
    pub index: Arc<Index>,
    /// What the compiler takes from the settings.
    pub mesh: watch::Receiver<Arc<Mesh>>,
    /// The keys of token issuers.
    pub keys: watch::Receiver<Arc<Keys>>,
    /// What proxies reported.
    pub reports: Arc<Reports>,
    /// What the certificate authority is doing.
    pub authority: watch::Receiver<Arc<crate::ca::keeper::Status>>,
}

/// Which edges are wanted.
#[derive(Clone, Debug)]
pub struct EdgeQuestion {
    /// How far back.
    pub since: Duration,
    /// Source or destination must be in it; empty: any.
    pub namespace: String,
    /// Methods, paths and hosts apart.
    pub detail: bool,
    /// At most so many.
    pub limit: usize,
}

impl Mind {
    /// The proxies of a namespace, or of all.
    pub fn proxies(&self, namespace: &str) -> Proxies {
        let mut proxies = self.reports.proxies();
        proxies.retain(|p| namespace.is_empty() || p.namespace == namespace);
        Proxies { proxies }
    }

    /// What signs certificates and what is trusted.
    pub fn authority(&self) -> weft_api::console::Authority {
        (&**self.authority.borrow()).into()
    }

    /// Who talked to whom.
    pub fn edges(&self, question: &EdgeQuestion) -> Edges {
        let directory = Directory::new(&self.index.views());
        let mut sources: HashMap<(Box<str>, Box<str>), Source> = HashMap::new();
        let mut sums: HashMap<Edge, Count> = HashMap::new();
        for (key, count) in self.reports.edges(question.since) {
            let source = sources
                .entry((key.source_identity.clone(), key.source_address.clone()))
                .or_insert_with(|| directory.source(&key.source_identity, &key.source_address));
            let inside = |namespace: &str| question.namespace.is_empty() || question.namespace == namespace;
            if !inside(&key.destination.namespace) && !inside(&source.namespace) {
                continue;
            }
            let detail = |text: &str| if question.detail { text.to_owned() } else { String::new() };
            let edge = Edge {
                source: source.clone(),
                destination: (*key.destination).clone(),
                port: key.port,
                protocol: if key.http { "http" } else { "tcp" }.into(),
                method: detail(&key.method),
                path: detail(&key.path),
                host: detail(&key.host),
                request_principal: detail(&key.request_principal),
                ..Edge::default()
            };
            sums.entry(edge).or_default().add(count);
        }
        let mut edges: Vec<Edge> =
            sums.into_iter().map(|(edge, sum)| Edge { count: sum.count, denied: sum.denied, last: sum.last, ..edge }).collect();
        edges.sort_by(|a, b| {
            b.count.cmp(&a.count).then_with(|| (&a.destination, &a.source, a.port).cmp(&(&b.destination, &b.source, b.port)))
        });
        let limit = question.limit.min(MOST_EDGES);
        let left_off = edges.len().saturating_sub(limit) as u64;
        edges.truncate(limit);
        Edges { edges, left_off, dropped: self.reports.edges_dropped(), kept_seconds: self.reports.kept().as_secs() }
    }

    /// How often policies decided in pods of a namespace, or of all.
    pub fn hits(&self, namespace: &str) -> PolicyHits {
        let mut hits = self.reports.hits();
        hits.retain(|h| namespace.is_empty() || h.namespace == namespace);
        PolicyHits { hits }
    }

    /// What policy refused of late: by id, in a namespace, or all.
    pub fn refusals(&self, id: &str, namespace: &str, limit: usize) -> Refusals {
        let wanted = |r: &Refusal| (id.is_empty() || r.request_id == id) && (namespace.is_empty() || r.namespace == namespace);
        let mut refusals = self.reports.refusals(wanted, limit);
        let directory = Directory::new(&self.index.views());
        for refusal in &mut refusals {
            refusal.source = directory.source(&refusal.source.identity, &refusal.source.address);
        }
        Refusals { refusals }
    }

    /// What the proxy of a pod is sent.
    ///
    /// # Errors
    /// There is no such pod.
    pub fn config(&self, namespace: &str, pod: &str) -> Result<wire::Inbound, Unanswered> {
        let world = self.world()?;
        let found = world.views.get(namespace).and_then(|view| Some((view, view.pods.get(pod)?)));
        let (view, pod) = found.ok_or_else(|| Unanswered::NotFound(format!("there is no pod {pod} in namespace {namespace}")))?;
        Ok(world.inbound(view, pod))
    }

    /// All that is known now.
    ///
    /// # Errors
    /// It was not read yet.
    fn world(&self) -> Result<World, Unanswered> {
        if !*self.index.synced().borrow() {
            return Err(Unanswered::NotReady);
        }
        let views = self.index.views().into_iter().collect();
        Ok(World { views, mesh: self.mesh.borrow().clone(), keys: self.keys.borrow().clone() })
    }
}

/// The workload of a pod, as reports name it.
pub fn workload_of(labels: &wire::Workload) -> Workload {
    Workload {
        namespace: labels.namespace.clone(),
        kind: labels.kind.clone(),
        name: labels.name.clone(),
        service_account: labels.service_account.clone(),
    }
}

#[cfg(test)]
mod tests;
