//! What waits to be told to the control plane: batches of all workers, added up, and the certificate's state when it is
//! another one than was told last. Bounded, because the control plane may be away for a day.

use super::Batch;
use crate::tls::identity::Holder;
use prometheus_client::metrics::counter::Counter;
use prost::Message as _;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use weft_api::wire::{CertificateState, Edge, PolicyHits, Refusal, Report};

/// Edges that wait.
const EDGES: usize = 8192;
/// Policies whose hits wait.
const POLICIES: usize = 8192;
/// Refusals that wait; the newest are kept.
const REFUSALS: usize = 256;
/// Of them those of one report.
const REFUSALS_OF_ONE: usize = 32;
/// Bytes of one report, about: the control plane reads twice as much.
const SIZE: usize = 96 * 1024;
/// Reports that are told in a row; the rest waits for the next time.
const IN_A_ROW: usize = 32;

/// What alike edges have in common: all but the counts.
type EdgeKey = Edge;
/// Policy, action, dry run.
type HitKey = (String, i32, bool);

/// See the module.
#[derive(Debug)]
pub struct Outbox {
    identity: Option<Arc<Holder>>,
    told: Option<CertificateState>,
    edges: HashMap<Ident, (u64, u64, u64)>,
    hits: HashMap<HitKey, (u64, u64)>,
    refusals: VecDeque<Refusal>,
    dropped: Counter,
}

/// An edge without its counts, comparable.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Ident {
    texts: [String; 7],
    port: u32,
}

impl Ident {
    fn of(edge: EdgeKey) -> Self {
        let texts =
            [edge.source_identity, edge.source_address, edge.protocol, edge.method, edge.path, edge.host, edge.request_principal];
        Self { texts, port: edge.port }
    }

    fn edge(self, (count, denied, last): (u64, u64, u64)) -> Edge {
        let [source_identity, source_address, protocol, method, path, host, request_principal] = self.texts;
        let port = self.port;
        Edge { source_identity, source_address, port, protocol, method, path, host, count, denied, last, request_principal }
    }
}

impl Outbox {
    /// An empty one; what finds no room is counted in `dropped`.
    pub fn new(identity: Option<Arc<Holder>>, dropped: Counter) -> Self {
        Self { identity, told: None, edges: HashMap::new(), hits: HashMap::new(), refusals: VecDeque::new(), dropped }
    }

    /// Adds a worker's batch.
    pub fn add(&mut self, batch: Batch) {
        for edge in batch.edges {
            let counts = (edge.count, edge.denied, edge.last);
            let key = Ident::of(edge);
            if self.edges.len() >= EDGES && !self.edges.contains_key(&key) {
                self.dropped.inc_by(counts.0);
                continue;
            }
            let sum = self.edges.entry(key).or_default();
            *sum = (sum.0 + counts.0, sum.1 + counts.1, sum.2.max(counts.2));
        }
        for hit in batch.hits {
            let key = (hit.policy, hit.action, hit.dry_run);
            if self.hits.len() >= POLICIES && !self.hits.contains_key(&key) {
                self.dropped.inc_by(hit.allowed + hit.denied);
                continue;
            }
            let sum = self.hits.entry(key).or_default();
            *sum = (sum.0 + hit.allowed, sum.1 + hit.denied);
        }
        for refusal in batch.refusals {
            if self.refusals.len() >= REFUSALS {
                self.refusals.pop_front();
                self.dropped.inc();
            }
            self.refusals.push_back(refusal);
        }
    }

    /// A control plane (another replica, maybe) listens anew: it is told of the certificate again.
    pub fn attached(&mut self) {
        self.told = None;
    }

    /// What is to be told now, in pieces that the control plane reads. Empty: nothing.
    pub fn take(&mut self) -> Vec<Report> {
        let mut reports = Vec::new();
        let mut report = Report::default();
        if let Some(holder) = &self.identity {
            let state = holder.state();
            // Before there is anything to tell.
            let news = state != CertificateState::default();
            if news && self.told.as_ref() != Some(&state) {
                report.certificate = Some(state.clone());
                self.told = Some(state);
            }
        }
        let mut size = 0;
        let mut full = |report: &mut Report, bytes: usize| {
            size += bytes;
            if size > SIZE {
                reports.push(std::mem::take(report));
                size = bytes;
            }
            reports.len() < IN_A_ROW
        };
        let hits: Vec<HitKey> = self.hits.keys().cloned().collect();
        for key in hits {
            let Some((allowed, denied)) = self.hits.remove(&key) else { continue };
            let (policy, action, dry_run) = key;
            let hit = PolicyHits { policy, action, dry_run, allowed, denied };
            full(&mut report, hit.encoded_len() + 4);
            report.hits.push(hit);
        }
        let mut left = HashMap::new();
        let mut room = true;
        for (key, counts) in std::mem::take(&mut self.edges) {
            if !room {
                left.insert(key, counts);
                continue;
            }
            let edge = key.edge(counts);
            room = full(&mut report, edge.encoded_len() + 4);
            report.edges.push(edge);
        }
        self.edges = left;
        for refusal in self.refusals.drain(..self.refusals.len().min(REFUSALS_OF_ONE)) {
            full(&mut report, refusal.encoded_len() + 4);
            report.refusals.push(refusal);
        }
        if report != Report::default() {
            reports.push(report);
        }
        reports
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edge(path: &str, count: u64) -> Edge {
        Edge { source_identity: "spiffe://x".into(), port: 80, path: path.into(), count, last: count, ..Edge::default() }
    }

    #[test]
    fn batches_add_up_and_are_told_once() {
        let mut outbox = Outbox::new(None, Counter::default());
        let hit = |denied| PolicyHits { policy: "a/b".into(), denied, ..PolicyHits::default() };
        outbox.add(Batch { edges: vec![edge("/a", 1), edge("/b", 1)], hits: vec![hit(1)], refusals: vec![Refusal::default()] });
        outbox.add(Batch { edges: vec![edge("/a", 5)], hits: vec![hit(2)], refusals: Vec::new() });
        let [report] = &outbox.take()[..] else { panic!() };
        let mut edges = report.edges.clone();
        edges.sort_by(|a, b| a.path.cmp(&b.path));
        assert_eq!(edges, [Edge { count: 6, last: 5, ..edge("/a", 5) }, edge("/b", 1)]);
        assert_eq!((report.hits.len(), report.hits[0].denied, report.refusals.len()), (1, 3, 1));
        assert!(outbox.take().is_empty());
    }

    #[test]
    fn the_certificate_is_told_when_it_changes_and_to_each_listener() {
        let holder = Arc::new(Holder::default());
        let mut outbox = Outbox::new(Some(Arc::clone(&holder)), Counter::default());
        assert!(outbox.take().is_empty());
        holder.failed("no answer");
        let state = CertificateState { error: "no answer".into(), ..CertificateState::default() };
        assert_eq!(outbox.take()[0].certificate, Some(state));
        assert!(outbox.take().is_empty());
        outbox.attached();
        assert_eq!(outbox.take().len(), 1);
    }

    #[test]
    fn a_day_without_a_control_plane_is_bounded_and_comes_in_pieces() {
        let dropped = Counter::default();
        let mut outbox = Outbox::new(None, dropped.clone());
        for n in 0..10_000 {
            let refusals = vec![Refusal { time: n, ..Refusal::default() }];
            outbox.add(Batch { edges: vec![edge(&format!("/{n:0>240}"), 1)], refusals, ..Batch::default() });
        }
        assert_eq!((outbox.edges.len(), outbox.refusals.len()), (EDGES, REFUSALS));
        assert_eq!(dropped.get() as usize, 2 * 10_000 - EDGES - REFUSALS);
        let (mut edges, mut refusals) = (0, 0);
        let mut rounds = 0;
        loop {
            let reports = outbox.take();
            if reports.is_empty() {
                break;
            }
            rounds += 1;
            assert!(reports.len() <= IN_A_ROW + 2);
            for report in reports {
                assert!(report.encoded_len() <= SIZE + 1024, "{}", report.encoded_len());
                edges += report.edges.len();
                refusals += report.refusals.len();
            }
        }
        assert_eq!((edges, refusals), (EDGES, REFUSALS));
        assert!(rounds >= 8);
    }
}
