//! The keys of token issuers, fetched for all proxies.
//!
//! - One fetch a source, however many policies and proxies use it: every 20 minutes, and after a failure sooner, with growing delays.
//! - What was fetched last stays in force while a source is away or answers nonsense. Where nothing was ever fetched, tokens of the
//!   issuer are refused, and the reason travels to the proxy.
//! - Whoever may write a policy can make the control plane call a URL. So [`fetch`] keeps away from where it must not go, whatever DNS and
//!   redirects say, and hands on nothing but a key set.

pub mod fetch;

use crate::compile::Mesh;
use crate::compile::security::jwt::{KeySet, Keys};
use crate::index::Index;
use crate::metrics::{Ended, Metrics};
use crate::model::policy::KeySource;
use fetch::Fetcher;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{info, warn};

/// How often keys are fetched, as in Istio.
pub const REFRESH: Duration = Duration::from_secs(20 * 60);
/// Delays after failures.
const BACKOFF: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(5 * 60);

/// A source that some policy names.
struct Wanted {
    /// How long a fetch may take: the longest that a policy allows.
    timeout: Duration,
    /// When it is fetched next; `None` while it is.
    due: Option<Instant>,
    failures: u32,
}

/// Keeps the keys that policies need, until it is dropped.
pub struct Keeper {
    /// Whose policies.
    pub index: Arc<Index>,
    /// The settings, of which the trusted certificates count.
    pub mesh: watch::Receiver<Arc<Mesh>>,
    /// Where keys are put.
    pub keys: watch::Sender<Arc<Keys>>,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Whether loopback addresses may be called: only where policies are files of whoever started this process.
    pub local: bool,
    /// How often keys are fetched; see [`REFRESH`].
    pub refresh: Duration,
}

impl Keeper {
    /// Runs until it is dropped.
    pub async fn run(mut self) {
        let mut policies = self.index.policies();
        let mut synced = self.index.synced();
        let mut wanted: HashMap<KeySource, Wanted> = HashMap::new();
        let mut certificates = self.mesh.borrow_and_update().policy.jwks_ca_certificates.clone();
        let mut fetcher = Arc::new(Fetcher::new(&certificates, self.local));
        let mut running = FuturesUnordered::new();
        loop {
            if *synced.borrow_and_update() {
                self.want(&mut wanted);
            }
            let now = Instant::now();
            for (source, entry) in &mut wanted {
                if entry.due.is_some_and(|due| due <= now) {
                    entry.due = None;
                    let (fetcher, source, timeout) = (fetcher.clone(), source.clone(), entry.timeout);
                    running.push(async move {
                        let result = fetcher.keys(&source, timeout).await;
                        (source, result)
                    });
                }
            }
            let next = wanted.values().filter_map(|w| w.due).min();
            let timer = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                Some((source, result)) = running.next() => self.note(&mut wanted, source, result),
                () = timer => {}
                changed = policies.changed() => if changed.is_err() { return },
                changed = synced.changed() => if changed.is_err() { return },
                changed = self.mesh.changed() => {
                    if changed.is_err() { return std::future::pending().await }
                    let now = self.mesh.borrow_and_update().policy.jwks_ca_certificates.clone();
                    if now != certificates {
                        certificates = now;
                        fetcher = Arc::new(Fetcher::new(&certificates, self.local));
                        // What failed may have failed for want of them.
                        for entry in wanted.values_mut().filter(|w| w.failures > 0 && w.due.is_some()) {
                            entry.due = Some(Instant::now());
                        }
                    }
                }
            }
        }
    }

    /// Brings what is wanted up to date with the policies.
    fn want(&self, wanted: &mut HashMap<KeySource, Wanted>) {
        let mut now: HashMap<KeySource, Duration> = HashMap::new();
        for policies in self.index.all_policies() {
            for jwt in policies.requests.values().flat_map(|p| &p.spec.rules) {
                if let Some(source) = &jwt.keys {
                    let timeout = now.entry(source.clone()).or_default();
                    *timeout = (*timeout).max(jwt.timeout);
                }
            }
        }
        wanted.retain(|source, _| now.contains_key(source));
        self.keys.send_if_modified(|keys| {
            let gone = keys.keys().any(|source| !now.contains_key(source));
            if gone {
                Arc::make_mut(keys).retain(|source, _| now.contains_key(source));
            }
            gone
        });
        for (source, timeout) in now {
            wanted.entry(source).and_modify(|w| w.timeout = timeout).or_insert_with(|| Wanted {
                timeout,
                due: Some(Instant::now()),
                failures: 0,
            });
        }
    }

    fn note(&self, wanted: &mut HashMap<KeySource, Wanted>, source: KeySource, result: Result<String, String>) {
        // Nobody wants it any more.
        let Some(entry) = wanted.get_mut(&source) else { return };
        let error = match &result {
            Ok(_) => {
                self.metrics.key_fetches.get_or_create(&Ended::OK).inc();
                if std::mem::take(&mut entry.failures) > 0 {
                    info!(%source, "fetched the keys again");
                }
                entry.due = Some(Instant::now() + self.refresh.mul_f64(rand::random_range(0.9..1.1)));
                String::new()
            }
            Err(error) => {
                self.metrics.key_fetches.get_or_create(&Ended::ERROR).inc();
                entry.failures += 1;
                if entry.failures == 1 || entry.failures.is_multiple_of(10) {
                    let kept = self.keys.borrow().get(&source).is_some_and(|set| !set.jwks.is_empty());
                    let meanwhile = if kept { "the keys from before stay in force" } else { "tokens of the issuer are refused" };
                    warn!(%source, %error, failures = entry.failures, "cannot fetch the keys of a token issuer; {meanwhile}, trying again");
                }
                entry.due = Some(Instant::now() + backoff(entry.failures));
                error.clone()
            }
        };
        self.keys.send_if_modified(|keys| {
            let before = keys.get(&source).cloned();
            let jwks = result.unwrap_or_else(|_| before.as_ref().map(|set| set.jwks.clone()).unwrap_or_default());
            let now = KeySet { jwks, error };
            let differs = before.as_ref() != Some(&now);
            if differs {
                Arc::make_mut(keys).insert(source, now);
            }
            differs
        });
    }
}

fn backoff(failures: u32) -> Duration {
    let grown = BACKOFF.start().saturating_mul(1 << failures.saturating_sub(1).min(16));
    grown.min(*BACKOFF.end()).mul_f64(rand::random_range(0.8..1.2))
}

#[cfg(test)]
mod tests;
