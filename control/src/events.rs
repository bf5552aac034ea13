//! Kubernetes events: what happened to a workload's pods, where its owner looks (`kubectl describe`).
//!
//! Events are news, not a log. Admission hands them over without waiting ([`Events::send`] never blocks); a full queue drops them
//! and counts that. The same news about the same workload is written once, and after that at most once a minute with the
//! number of times it came; a rollout of a thousand pods is one event. A cluster-wide budget bounds the rest.

use crate::index::{Index, View};
use crate::metrics::{Ended, Metrics};
use crate::model::Owner;
use crate::source::kube::within;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::debug;

/// News that wait to be written.
const QUEUE: usize = 1024;
/// News that wait for the watch at once.
const SETTLING: usize = 256;
/// How often the same news is written.
const REPEAT: Duration = Duration::from_secs(60);
/// How long news are remembered.
const REMEMBER: Duration = Duration::from_secs(15 * 60);
/// Writes in a burst, and per second in the long run.
const BUDGET: (f64, f64) = (50.0, 5.0);
/// How long the owner of an owner is waited for: the watch may lag behind a ReplicaSet that has just been made.
const OWNER_PATIENCE: Duration = Duration::from_secs(2);

/// What kind of news.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Pods of the workload get the sidecar.
    Injected,
    /// Pods of the workload don't, though the namespace asked for it.
    Skipped,
    /// Pods were refused.
    Refused,
    /// Pods run without it.
    Missed,
    /// What signs certificates or is trusted has changed.
    AuthorityChanged,
    /// A certificate authority, or what was asked of it, can't be used.
    AuthorityRefused,
}

impl Kind {
    /// `reason` of the event.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Injected => "Injected",
            Self::Skipped => "InjectionSkipped",
            Self::Refused => "InjectionRefused",
            Self::Missed => "InjectionMissed",
            Self::AuthorityChanged => "AuthorityChanged",
            Self::AuthorityRefused => "AuthorityRefused",
        }
    }

    fn severity(self) -> &'static str {
        match self {
            Self::Injected | Self::Skipped | Self::AuthorityChanged => "Normal",
            Self::Refused | Self::Missed | Self::AuthorityRefused => "Warning",
        }
    }

    fn action(self) -> &'static str {
        match self {
            Self::Injected | Self::Skipped | Self::Refused | Self::Missed => "Inject",
            Self::AuthorityChanged | Self::AuthorityRefused => "Certify",
        }
    }
}

/// Hands news over.
#[derive(Clone, Debug)]
pub struct Events {
    queue: mpsc::Sender<News>,
    metrics: Arc<Metrics>,
}

#[derive(Clone, Debug)]
struct News {
    namespace: String,
    about: Owner,
    labels: BTreeMap<String, String>,
    kind: Kind,
    note: String,
}

impl Events {
    /// A queue and its end, for [`run`].
    pub fn new(metrics: Arc<Metrics>) -> (Self, Inbox) {
        let (queue, inbox) = mpsc::channel(QUEUE);
        (Self { queue, metrics }, Inbox(inbox))
    }

    /// News about a workload.
    pub fn send(&self, namespace: &str, about: Owner, kind: Kind, note: String) {
        self.send_about_pod(namespace, about, BTreeMap::new(), kind, note);
    }

    /// News about the workload of a pod of which the controlling owner and the labels are known.
    pub fn send_about_pod(&self, namespace: &str, owner: Owner, labels: BTreeMap<String, String>, kind: Kind, note: String) {
        if self.queue.try_send(News { namespace: namespace.into(), about: owner, labels, kind, note }).is_err() {
            self.metrics.events.get_or_create(&Ended::DROPPED).inc();
        }
    }
}

/// The receiving end of the queue.
#[derive(Debug)]
pub struct Inbox(mpsc::Receiver<News>);

/// What was written about a workload.
struct Told {
    name: String,
    count: i32,
    at: Instant,
    unsaid: i32,
}

type About = (String, Owner, Kind, String);

/// Writes news until all senders are gone.
pub async fn run(mut inbox: Inbox, client: Client, reporter: String, index: Arc<Index>, metrics: Arc<Metrics>) {
    let mut told: HashMap<About, Told> = HashMap::new();
    let mut budget = Budget { left: BUDGET.0, at: Instant::now() };
    let mut settling = FuturesUnordered::new();
    loop {
        // News wait side by side for the watch to catch up, so that one does not hold up the others.
        let news = tokio::select! {
            news = inbox.0.recv(), if settling.len() < SETTLING => match news {
                Some(news) => {
                    settling.push(settle(&index, news));
                    continue;
                }
                None if settling.is_empty() => return,
                None => match settling.next().await {
                    Some(news) => news,
                    None => return,
                },
            },
            Some(news) = settling.next() => news,
        };
        told.retain(|_, t| t.at.elapsed() < REMEMBER);
        let about = (news.namespace.clone(), news.about.clone(), news.kind, news.note.clone());
        if let Some(known) = told.get_mut(&about)
            && known.at.elapsed() < REPEAT
        {
            known.unsaid += 1;
            metrics.events.get_or_create(&Ended::DROPPED).inc();
            continue;
        }
        if !budget.take(Instant::now()) {
            metrics.events.get_or_create(&Ended::DROPPED).inc();
            continue;
        }
        let known = told.remove(&about);
        match write(&client, &reporter, &news, known).await {
            Ok(now) => {
                told.insert(about, now);
                metrics.events.get_or_create(&Ended::OK).inc();
            }
            Err(error) => {
                metrics.events.get_or_create(&Ended::ERROR).inc();
                debug!(%error, namespace = %news.namespace, workload = %news.about.name, "cannot write an event");
            }
        }
    }
}

/// Follows the owner up to the workload, waiting a moment where the watch has not seen the step between.
async fn settle(index: &Index, mut news: News) -> News {
    let (kind, name) = (news.about.kind.clone(), news.about.name.clone());
    let mut view = index.subscribe(&news.namespace);
    if matches!(kind.as_str(), "ReplicaSet" | "Job" | "Pod") {
        let known = |view: &Arc<View>| match kind.as_str() {
            "ReplicaSet" => view.replica_sets.contains_key(&name),
            "Job" => view.jobs.contains_key(&name),
            _ => view.pods.contains_key(&name),
        };
        let _ = tokio::time::timeout(OWNER_PATIENCE, view.wait_for(known)).await;
    }
    let view = view.borrow().clone();
    let root = crate::compile::workload::root_of_owner(&news.about, &news.labels, &view);
    if kind == "Pod" {
        // A pod that is being created has no uid yet; the watch brings it.
        news.about.uid = view.pods.get(&name).map(|pod| pod.uid.clone()).unwrap_or_default();
    }
    // `kubectl describe` finds events by uid. An owner that was only guessed has none; then the one that is known gets it.
    if !root.uid.is_empty() {
        news.about = root;
    }
    news
}

async fn write(client: &Client, reporter: &str, news: &News, known: Option<Told>) -> Result<Told, kube::Error> {
    let api: Api<Event> = Api::namespaced(client.clone(), &news.namespace);
    let now = Timestamp::now();
    if let Some(mut known) = known {
        known.count += known.unsaid + 1;
        known.unsaid = 0;
        known.at = Instant::now();
        let patch = serde_json::json!({"count": known.count, "lastTimestamp": Time(now)});
        match within(api.patch(&known.name, &PatchParams::default(), &Patch::Merge(patch))).await {
            Ok(_) => return Ok(known),
            // The API server forgets events after an hour.
            Err(kube::Error::Api(status)) if status.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    // As `kubectl` and others name them: the object's name and something unique.
    let name = format!("{}.{:016x}", news.about.name, rand::random::<u64>());
    let event = Event {
        metadata: ObjectMeta { name: Some(name.clone()), namespace: Some(news.namespace.clone()), ..ObjectMeta::default() },
        involved_object: ObjectReference {
            api_version: Some(news.about.api_version.clone()),
            kind: Some(news.about.kind.clone()),
            name: Some(news.about.name.clone()),
            namespace: Some(news.namespace.clone()),
            uid: Some(news.about.uid.clone()).filter(|uid| !uid.is_empty()),
            ..ObjectReference::default()
        },
        type_: Some(news.kind.severity().into()),
        reason: Some(news.kind.reason().into()),
        message: Some(news.note.clone()),
        action: Some(news.kind.action().into()),
        count: Some(1),
        event_time: Some(MicroTime(now)),
        first_timestamp: Some(Time(now)),
        last_timestamp: Some(Time(now)),
        source: Some(EventSource { component: Some("weft-control".into()), host: None }),
        reporting_component: Some("weft-control".into()),
        reporting_instance: Some(reporter.into()),
        ..Event::default()
    };
    within(api.create(&PostParams::default(), &event)).await?;
    Ok(Told { name, count: 1, at: Instant::now(), unsaid: 0 })
}

/// A token bucket.
struct Budget {
    left: f64,
    at: Instant,
}

impl Budget {
    fn take(&mut self, now: Instant) -> bool {
        self.left = (self.left + now.duration_since(self.at).as_secs_f64() * BUDGET.1).min(BUDGET.0);
        self.at = now;
        let granted = self.left >= 1.0;
        if granted {
            self.left -= 1.0;
        }
        granted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_bounds_bursts_and_refills() {
        let start = Instant::now();
        let mut budget = Budget { left: BUDGET.0, at: start };
        assert_eq!((0..100).filter(|_| budget.take(start)).count(), 50);
        let later = start + Duration::from_secs(2);
        assert_eq!((0..100).filter(|_| budget.take(later)).count(), 10);
    }

    #[tokio::test]
    async fn a_full_queue_never_blocks() {
        let metrics = Arc::new(Metrics::default());
        let (events, _inbox) = Events::new(metrics.clone());
        for _ in 0..QUEUE + 7 {
            events.send("n", Owner::default(), Kind::Injected, String::new());
        }
        assert_eq!(metrics.events.get_or_create(&Ended::DROPPED).get(), 7);
    }
}
