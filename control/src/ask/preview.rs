//! What would break? Proposed policies against the traffic that the proxies saw.
//!
//! The proposal is put into a copy of all that is known, and what each destination's proxy would be sent is compiled from it as ever. Where
//! that is what it is sent now, nothing changes. Elsewhere each sample is judged by both configurations ([`super::bounds`]). What was
//! made of it now is taken from what was seen where policies alone don't tell. What can't be known from samples is counted as
//! undetermined, with the reason.

use super::bounds::{Bounds, Sample, Sure, Unknown, claims, mode};
use super::who::Directory;
use super::world::World;
use super::{Mind, Unanswered};
use crate::compile::workload;
use crate::reports::edges::{Count, Key};
use crate::source::wire::parse;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use weft_api::console::{Change, Effect, Preview, Proposal, Source, Workload};
use weft_api::wire::{self, MtlsMode};

/// Changes of one answer.
const MOST: usize = 10_000;
/// Objects of one proposal.
const OBJECTS: usize = 1_000;

impl Mind {
    /// What the proposal would change for the traffic of late.
    ///
    /// # Errors
    /// A proposed object can't be used; the message says which and why.
    pub fn preview(&self, proposal: Proposal) -> Result<Preview, Unanswered> {
        let world = self.world()?;
        if proposal.objects.len() > OBJECTS {
            return Err(Unanswered::Bad(format!(
                "{} objects at once; at most {OBJECTS} can be previewed",
                proposal.objects.len()
            )));
        }
        let since = if proposal.since_seconds == 0 { 3600 } else { proposal.since_seconds.min(3600) };
        let (after, notes) = propose(&world, proposal.objects)?;
        let samples = self.reports.edges(Duration::from_secs(since));
        let mut preview = compare(&world, &after, &samples);
        preview.notes = notes;
        preview.dropped = self.reports.edges_dropped();
        preview.kept_seconds = self.reports.kept().as_secs();
        Ok(preview)
    }
}

/// The world with the proposal, and what is worth knowing about it.
fn propose(world: &World, objects: Vec<serde_json::Value>) -> Result<(World, Vec<String>), Unanswered> {
    use crate::model::Object;
    let mut notes = Vec::new();
    let mut policies = Vec::new();
    for object in objects {
        let title = format!(
            "{} {}",
            object["kind"].as_str().unwrap_or("an object without kind"),
            object.pointer("/metadata/name").and_then(serde_json::Value::as_str).unwrap_or("without a name")
        );
        let parsed = parse(object).map_err(|error| Unanswered::Bad(format!("{title}: {error}")))?;
        let (doubts, dry_run, place) = match &parsed {
            Some(Object::Authorization(p)) => (p.doubts.clone(), p.spec.dry_run, p.namespace.clone()),
            Some(Object::Peer(p)) => (p.doubts.clone(), false, p.namespace.clone()),
            _ => {
                notes.push(format!("{title} is left out: only AuthorizationPolicy and PeerAuthentication are previewed"));
                continue;
            }
        };
        if dry_run {
            notes.push(format!("{title} is in dry run (istio.io/dry-run): it changes nothing as it is"));
        }
        if !world.views.contains_key(&place) {
            notes.push(format!("{title}: nothing is known of a namespace {place}; was -n forgotten?"));
        }
        notes.extend(doubts.into_iter().map(|doubt| format!("{title}: {doubt}")));
        policies.extend(parsed);
    }
    if policies.is_empty() {
        return Err(Unanswered::Bad("there is neither an AuthorizationPolicy nor a PeerAuthentication to preview".into()));
    }
    Ok((world.with(policies)?, notes))
}

/// Both configurations of a destination, and engines as they were needed.
struct Place {
    before: Configured,
    after: Configured,
}

struct Configured {
    inbound: wire::Inbound,
    bounds: HashMap<(Unknown, bool), Bounds>,
}

impl Configured {
    fn new(inbound: wire::Inbound) -> Self {
        Self { inbound, bounds: HashMap::new() }
    }

    /// What becomes of a sample.
    fn judge(&mut self, key: &Key) -> Sure {
        let mode = mode(&self.inbound, key.port);
        if mode == MtlsMode::Strict && key.source_identity.is_empty() {
            let reason = format!("port {} takes only mutual TLS (PeerAuthentication STRICT)", key.port);
            return Sure::Refuse { policy: String::new(), reason };
        }
        // Without mutual TLS the proxies of both sides speak plaintext, and nobody proves who he is.
        let identity = if mode == MtlsMode::Disable { "" } else { &*key.source_identity };
        let address: Option<IpAddr> = key.source_address.parse().ok();
        let token = claims(&key.request_principal);
        let folded = key.http && key.path.is_empty();
        let unknown = Unknown {
            address: address.is_none(),
            remote: address.is_none() || !self.inbound.trusted_hops.is_empty(),
            principal: folded && !self.inbound.jwt.is_empty(),
            claims: (folded && !self.inbound.jwt.is_empty()) || token.is_some(),
            path: folded,
            method: key.http && key.method.is_empty(),
            sni: !key.http,
        };
        let http = key.http.then_some((&*key.method, &*key.path, &*key.host, token.as_ref()));
        let sample = Sample { identity, address, port: key.port, http };
        let Self { inbound, bounds } = self;
        let bounds = bounds
            .entry((unknown, key.http))
            .or_insert_with(|| Bounds::new(&inbound.authorization, &inbound.trust_domains, unknown, key.http));
        bounds.judge(&sample)
    }
}

/// What both worlds make of the samples.
fn compare(before: &World, after: &World, samples: &[(Arc<Key>, Count)]) -> Preview {
    let views: Vec<_> = before.views.iter().map(|(name, view)| (name.clone(), view.clone())).collect();
    let directory = Directory::new(&views);
    let mut places: HashMap<Arc<Workload>, Option<Place>> = HashMap::new();
    let mut sums: HashMap<Change, u64> = HashMap::new();
    let mut preview = Preview::default();
    for (key, count) in samples {
        let place = places.entry(key.destination.clone()).or_insert_with(|| place(before, after, &key.destination));
        let Some(Place { before, after }) = place else {
            preview.gone += count.count;
            continue;
        };
        if before.inbound == after.inbound {
            preview.unchanged += count.count;
            continue;
        }
        let (now, then) = (before.judge(key), after.judge(key));
        let (passed, refused) = now_of(&now, *count);
        let changed = match &then {
            Sure::Pass { .. } => refused,
            Sure::Refuse { .. } => passed,
            // The same as now, for the same reason: nobody knows, but nothing changes either.
            Sure::Depends { .. } if then == now => 0,
            Sure::Depends { .. } => count.count,
        };
        preview.unchanged += count.count - changed;
        if changed > 0 {
            let source = directory.source(&key.source_identity, &key.source_address);
            *sums.entry(change(key, source, then)).or_default() += changed;
        }
    }
    let mut changes: Vec<Change> = sums.into_iter().map(|(change, count)| Change { count, ..change }).collect();
    changes.sort_by(|a, b| {
        (a.effect, std::cmp::Reverse(a.count), &a.destination, &a.source, a.port, &a.path, &a.method).cmp(&(
            b.effect,
            std::cmp::Reverse(b.count),
            &b.destination,
            &b.source,
            b.port,
            &b.path,
            &b.method,
        ))
    });
    preview.left_off = changes.len().saturating_sub(MOST) as u64;
    changes.truncate(MOST);
    preview.changes = changes;
    preview
}

/// Configurations of a workload's pods: all alike, so the first one speaks for all. `None`: it has no meshed pods any more.
fn place(before: &World, after: &World, destination: &Workload) -> Option<Place> {
    let view = before.views.get(&destination.namespace)?;
    let pod = view.pods.values().filter(|pod| pod.meshed() && !pod.finished).find(|pod| {
        let root = workload::root(pod, view);
        root.kind == destination.kind && root.name == destination.name
    })?;
    let view_after = after.views.get(&destination.namespace)?;
    Some(Place { before: Configured::new(before.inbound(view, pod)), after: Configured::new(after.inbound(view_after, pod)) })
}

/// How many pass now, and how many are refused: by policy if that is enough to tell, else as it was seen.
fn now_of(now: &Sure, count: Count) -> (u64, u64) {
    match now {
        Sure::Pass { .. } => (count.count, 0),
        Sure::Refuse { .. } => (0, count.count),
        Sure::Depends { .. } => (count.count - count.denied, count.denied),
    }
}

fn change(key: &Key, source: Source, then: Sure) -> Change {
    let (effect, policy, reason) = match then {
        Sure::Pass { policy } => (Effect::Allowed, policy, String::new()),
        Sure::Refuse { policy, reason } => (Effect::Refused, policy, reason),
        Sure::Depends { policy, on } => (Effect::Undetermined, policy, on),
    };
    Change {
        effect,
        source,
        destination: (*key.destination).clone(),
        port: key.port,
        protocol: if key.http { "http" } else { "tcp" }.into(),
        method: key.method.to_string(),
        path: key.path.to_string(),
        host: key.host.to_string(),
        count: 0,
        policy,
        reason,
    }
}
