//! The cluster as a source: one watch per kind, each fed into the index.
//!
//! - A watch that drops is resumed where it was; only a server that has forgotten that point (410) makes for one relist.
//!   Nothing polls.
//! - The first list comes as a streamed list where the server offers it, which keeps the memory of both sides low, and in pages
//!   otherwise. A server that refuses the streamed list, or accepts the request and then never ends the list (it ignores
//!   what it does not know), is asked for pages.
//! - Policies are custom resources: their definitions may be installed later, or never. A kind that the server does not serve counts as
//!   listed, so that nothing waits for it, and is asked for again every few seconds. What was known of it stays in force for a while: a
//!   server that has just started may not know yet that it serves it.
//! - While the server is away or refuses, each watch retries with a growing, jittered delay, for ever; what the index holds
//!   stays in force. The log says once per outage what is wrong and what permission would be missing.

use super::wire::{
    Slim, WireEndpointSlice, WireJob, WireNamespace, WirePod, WirePolicy, WireReplicaSet, WireService, WireValidator, WireWebhook,
};
use crate::index::Index;
use crate::metrics::{Metrics, Resource};
use crate::model::{Key, Kind};
use futures::{StreamExt, pin_mut};
use kube::runtime::watcher;
use kube::{Api, Client};
use serde::de::DeserializeOwned;
use std::collections::HashSet;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::{debug, info, warn};
use weft_api::istio::Spec;
use weft_api::istio::security::{AuthorizationPolicySpec, PeerAuthenticationSpec, RequestAuthenticationSpec};

/// Objects per page where the list comes in pages: a page of large pods stays under a few MB.
const PAGE: u32 = 200;
/// How long a streamed list may stay silent before it counts as not offered.
const STREAM_PATIENCE: Duration = Duration::from_secs(5);
/// Time for a call that is no watch.
const CALL: Duration = Duration::from_secs(15);
/// Delays between tries while the server is away.
const BACKOFF: std::ops::RangeInclusive<Duration> = Duration::from_millis(200)..=Duration::from_secs(15);

/// Longest delay between tries of a kind that the server does not serve.
const ABSENT: Duration = Duration::from_secs(5);
/// How long such a kind must be absent before objects of it that are known count as gone.
const GONE: Duration = Duration::from_secs(60);

/// The kinds that a cluster is watched for.
pub const KINDS: [Kind; 11] = Kind::ALL;

/// Starts all watches as tasks of `tasks`. `streamed`: the server is new enough to offer streamed lists.
pub fn watch_all(client: &Client, index: &Arc<Index>, metrics: &Arc<Metrics>, streamed: bool, tasks: &mut JoinSet<()>) {
    let watch = Watch { index: index.clone(), metrics: metrics.clone(), streamed };
    tasks.spawn(watch.clone().run::<WireNamespace>(Api::all(client.clone()), Kind::Namespace));
    tasks.spawn(watch.clone().run::<WirePod>(Api::all(client.clone()), Kind::Pod));
    tasks.spawn(watch.clone().run::<WireService>(Api::all(client.clone()), Kind::Service));
    tasks.spawn(watch.clone().run::<WireEndpointSlice>(Api::all(client.clone()), Kind::EndpointSlice));
    tasks.spawn(watch.clone().run::<WireReplicaSet>(Api::all(client.clone()), Kind::ReplicaSet));
    tasks.spawn(watch.clone().run::<WireJob>(Api::all(client.clone()), Kind::Job));
    tasks.spawn(watch.clone().run::<WireWebhook>(Api::all(client.clone()), Kind::Webhook));
    tasks.spawn(watch.clone().run::<WireValidator>(Api::all(client.clone()), Kind::Validator));
    tasks.spawn(watch.clone().follow_policies::<PeerAuthenticationSpec>(client.clone(), Kind::Peer));
    tasks.spawn(watch.clone().follow_policies::<AuthorizationPolicySpec>(client.clone(), Kind::Authorization));
    tasks.spawn(watch.follow_policies::<RequestAuthenticationSpec>(client.clone(), Kind::Request));
}

/// A call of the API server that fails when it takes longer than [`CALL`]: one that accepts calls and does not answer must not hold
/// up what else there is to do.
///
/// # Errors
/// Those of the call, and its not ending in time.
pub(crate) async fn within<T>(call: impl Future<Output = Result<T, kube::Error>>) -> Result<T, kube::Error> {
    tokio::time::timeout(CALL, call).await.unwrap_or_else(|_| {
        let late = std::io::Error::new(std::io::ErrorKind::TimedOut, format!("no answer in {} s", CALL.as_secs()));
        Err(kube::Error::Service(Box::new(late)))
    })
}

/// A delay before try number `failures` (from 1), jittered so that replicas don't come back in step.
pub(crate) fn backoff(failures: u32) -> Duration {
    let grown = BACKOFF.start().saturating_mul(1 << failures.saturating_sub(1).min(10));
    grown.min(*BACKOFF.end()).mul_f64(rand::random_range(0.7..1.3))
}

#[derive(Clone)]
struct Watch {
    index: Arc<Index>,
    metrics: Arc<Metrics>,
    streamed: bool,
}

/// Why a stream has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    /// The server offers no streamed lists.
    NoStreamedLists,
    /// The server does not serve the kind, or not any more.
    Absent {
        /// It did before.
        served: bool,
    },
}

impl Watch {
    async fn run<K>(mut self, api: Api<K>, kind: Kind)
    where
        K: kube::Resource + Slim + Clone + Debug + DeserializeOwned + Send + 'static,
    {
        loop {
            self.stream(api.clone(), kind).await;
            self.in_pages(kind);
        }
    }

    fn in_pages(&mut self, kind: Kind) {
        debug!(resource = kind.plural(), "the server offers no streamed list; listing in pages");
        self.streamed = false;
    }

    /// Watches a kind that may not be served yet, in the first version that is.
    async fn follow_policies<S>(mut self, client: Client, kind: Kind)
    where
        S: Spec + Send + Sync + 'static,
        WirePolicy<S>: Slim,
    {
        let mut absent: Option<(Instant, u32)> = None;
        loop {
            let mut versions = S::VERSIONS.iter().peekable();
            while let Some(version) = versions.peek() {
                match self.stream(Api::<WirePolicy<S>>::all_with(client.clone(), version), kind).await {
                    Why::NoStreamedLists => self.in_pages(kind),
                    Why::Absent { served } => {
                        if served {
                            absent = None;
                        }
                        versions.next();
                    }
                }
            }
            let (since, tries) = absent.map_or((Instant::now(), 1), |(since, tries)| (since, tries + 1));
            absent = Some((since, tries));
            if tries == 1 {
                info!(
                    resource = kind.plural(),
                    "the API server does not serve {}.{} (yet); looking for it now and then",
                    kind.plural(),
                    S::GROUP
                );
            }
            if self.index.count(kind) == 0 || since.elapsed() > GONE {
                self.index.listed(kind, &HashSet::new());
            }
            tokio::time::sleep(backoff(tries).min(ABSENT)).await;
        }
    }

    /// Feeds the index. Returns when the server turned out not to offer streamed lists, or a policy's kind.
    async fn stream<K>(&self, api: Api<K>, kind: Kind) -> Why
    where
        K: kube::Resource + Slim + Clone + Debug + DeserializeOwned + Send + 'static,
    {
        let resource = Resource::of(kind);
        let config = watcher::Config::default().page_size(PAGE);
        let config = if self.streamed { config.streaming_lists() } else { config };
        let events = watcher::watcher(api, config);
        pin_mut!(events);
        let mut seen: Option<HashSet<Key>> = None;
        let mut failures = 0u32;
        let mut served = false;
        loop {
            let in_list = seen.is_some();
            let next = if self.streamed && in_list {
                match tokio::time::timeout(STREAM_PATIENCE, events.next()).await {
                    Ok(next) => next,
                    Err(_) => return Why::NoStreamedLists,
                }
            } else {
                events.next().await
            };
            let event = match next {
                Some(Ok(event)) => event,
                Some(Err(error)) => {
                    if self.streamed && refuses_streams(&error) {
                        return Why::NoStreamedLists;
                    }
                    if Kind::POLICIES.contains(&kind) && is_absent(&error) {
                        return Why::Absent { served };
                    }
                    failures += 1;
                    self.metrics.watch_errors.get_or_create(&resource).inc();
                    report(kind, &error, failures);
                    tokio::time::sleep(backoff(failures)).await;
                    continue;
                }
                // The watcher's stream has no end; should it get one, begin anew.
                None => {
                    tokio::time::sleep(backoff(1)).await;
                    return Why::NoStreamedLists;
                }
            };
            match event {
                watcher::Event::Init => {
                    seen = Some(HashSet::new());
                }
                watcher::Event::InitApply(object) => {
                    let object = object.slim();
                    if let Some(seen) = &mut seen {
                        seen.insert(object.key());
                    }
                    self.index.apply(object);
                }
                watcher::Event::InitDone => {
                    self.metrics.lists.get_or_create(&resource).inc();
                    served = true;
                    recovered(kind, &mut failures);
                    self.index.listed(kind, &seen.take().unwrap_or_default());
                }
                watcher::Event::Apply(object) => {
                    recovered(kind, &mut failures);
                    self.index.apply(object.slim());
                }
                watcher::Event::Delete(object) => {
                    recovered(kind, &mut failures);
                    self.index.delete(kind, &object.slim().key());
                }
            }
        }
    }
}

/// Whether an error is a server's way to say that it does not offer streamed lists (the feature is off, or unknown).
fn refuses_streams(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::WatchStartFailed(kube::Error::Api(status)) => matches!(status.code, 400 | 422),
        watcher::Error::WatchError(status) => matches!(status.code, 400 | 422),
        _ => false,
    }
}

/// Whether an error says that the server does not serve the kind.
fn is_absent(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status.code == 404,
        watcher::Error::WatchError(status) => status.code == 404,
        _ => false,
    }
}

fn recovered(kind: Kind, failures: &mut u32) {
    if std::mem::take(failures) > 0 {
        info!(resource = kind.plural(), "watching again");
    }
}

fn report(kind: Kind, error: &watcher::Error, failures: u32) {
    let resource = kind.plural();
    let forbidden = matches!(
        error,
        watcher::Error::InitialListFailed(kube::Error::Api(status)) | watcher::Error::WatchStartFailed(kube::Error::Api(status))
            if status.is_forbidden()
    );
    // A watch that the server ends while it restarts is everyday life; a second failure in a row is an outage.
    if forbidden {
        if failures == 1 || failures.is_multiple_of(20) {
            warn!(resource, %error, "not allowed to list and watch {resource}: the service account lacks a rule of the ClusterRole \
                 weft-control; apply the output of `weft install` again");
        }
    } else if failures == 2 || failures.is_multiple_of(20) {
        warn!(resource, %error, failures, "cannot watch {resource}; keeping what is known and trying again (is the API server up \
             and reachable from this pod?)");
    } else {
        debug!(resource, %error, failures, "watch failed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_a_limit() {
        for (failures, around) in [(1, 200), (2, 400), (4, 1600), (30, 15_000)] {
            let delay = backoff(failures).as_millis();
            assert!(delay >= around * 7 / 10 && delay <= around * 13 / 10, "{failures}: {delay}");
        }
    }
}
