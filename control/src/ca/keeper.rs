//! Keeps the serving certificate in force, on every replica, and renews it, on the one that leads.
//!
//! A replica follows the Secret by a watch and puts in force what it finds there, if it passes [`issue::check_serving`]. Only
//! the leader writes: at two thirds of the certificate's life, or when what is stored can't be used (it was signed by
//! another root, lacks a name, was damaged). A replica without any usable certificate does not wait for a leader: at first
//! start somebody has to begin, and [`store`](super::store) sees to it that all end up with the same.

use super::issue::{self, Pair};
use super::resolver::Resolver;
use super::store::{Slot, Store, Stored, Written};
use crate::metrics::Metrics;
use crate::source::kube::backoff;
use futures::{StreamExt, pin_mut};
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::runtime::watcher;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use tracing::{debug, error, info, warn};

/// How the serving certificate is made.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The names that it bears.
    pub names: Vec<String>,
    /// Its life.
    pub life: Duration,
}

/// The authority: the root, and the serving certificate in force.
pub struct Keeper {
    store: Store,
    plan: Plan,
    root: Pair,
    resolver: Arc<Resolver>,
    metrics: Arc<Metrics>,
}

impl Keeper {
    /// Reads or makes the root and a serving certificate, and puts it in force in `resolver`. Tries until it has succeeded: an API server that is
    /// away at our start is no reason to end.
    pub async fn open(store: Store, plan: Plan, resolver: Arc<Resolver>, metrics: Arc<Metrics>) -> Self {
        let mut failures = 0;
        loop {
            match Self::try_open(&store, &plan, &resolver, &metrics).await {
                Ok(root) => return Self { store, plan, root, resolver, metrics },
                Err(error) => {
                    failures += 1;
                    if failures == 1 || failures % 10 == 0 {
                        warn!(failures, "not serving yet: {error:#}; trying again");
                    }
                    tokio::time::sleep(backoff(failures)).await;
                }
            }
        }
    }

    async fn try_open(store: &Store, plan: &Plan, resolver: &Resolver, metrics: &Metrics) -> anyhow::Result<Pair> {
        let root = agree_on_root(store).await?;
        let now = SystemTime::now();
        let make = || issue::serving(&root, &plan.names, SystemTime::now(), plan.life);
        let pair = match store.read(Slot::Serving).await? {
            Some(stored) => match usable(&root, &stored, plan, now) {
                Ok(pair) => pair,
                Err(reason) => {
                    info!("replacing the serving certificate: {reason}");
                    let pair = make()?;
                    match store.write(Slot::Serving, &pair, &root, Some(&stored)).await? {
                        Written::Yes => pair,
                        Written::Lost => anyhow::bail!("another replica has just replaced the serving certificate"),
                    }
                }
            },
            None => {
                let pair = make()?;
                match store.write(Slot::Serving, &pair, &root, None).await? {
                    Written::Yes => {
                        info!("made a serving certificate");
                        pair
                    }
                    Written::Lost => anyhow::bail!("another replica has just made the serving certificate"),
                }
            }
        };
        put_in_force(resolver, metrics, &root, &pair)?;
        Ok(root)
    }

    /// The root's certificate, PEM: what clients must trust.
    pub fn trust_bundle(&self) -> &str {
        &self.root.certificate
    }

    /// The root with its key, by which workload certificates are signed.
    pub fn root(&self) -> &Pair {
        &self.root
    }

    /// Follows the stored certificate and, while `leader` says so, renews it. Runs until it is dropped.
    pub async fn run(self: Arc<Self>, mut leader: watch::Receiver<bool>) {
        let follower_leads = leader.clone();
        let follow = async {
            match &self.store {
                Store::Secrets { client, namespace } => {
                    self.follow(Api::namespaced(client.clone(), namespace), follower_leads).await;
                }
                Store::Folder(_) | Store::Memory => std::future::pending().await,
            }
        };
        let renew = async {
            let mut failures = 0;
            loop {
                if leader.wait_for(|leads| *leads).await.is_err() {
                    std::future::pending::<()>().await;
                }
                match self.renew_if_due().await {
                    Ok(next) => {
                        failures = 0;
                        tokio::select! {
                            () = tokio::time::sleep(next) => {}
                            _ = leader.changed() => {}
                        }
                    }
                    Err(error) => {
                        failures += 1;
                        error!("cannot renew the serving certificate: {error:#}; the present one stays in force, trying again");
                        tokio::time::sleep(backoff(failures)).await;
                    }
                }
            }
        };
        tokio::join!(follow, renew);
    }

    /// Renews the certificate if it is due, and returns how long to wait before asking again.
    async fn renew_if_due(&self) -> anyhow::Result<Duration> {
        // The clock is looked at now and then rather than slept through, so that a machine that was suspended, or whose clock
        // was set, renews in time.
        let look_again = (self.plan.life / 20).clamp(Duration::from_millis(50), Duration::from_secs(3600));
        if matches!(self.store, Store::Memory) {
            let pair = issue::serving(&self.root, &self.plan.names, SystemTime::now(), self.plan.life)?;
            put_in_force(&self.resolver, &self.metrics, &self.root, &pair)?;
            return Ok(self.plan.life / 2);
        }
        let now = SystemTime::now();
        let stored = self.store.read(Slot::Serving).await?;
        let reason = match &stored {
            None => "it is gone from the store".to_owned(),
            Some(stored) => match usable(&self.root, stored, &self.plan, now) {
                Ok(pair) if issue::facts(&pair.certificate)?.renew_at() > now => return Ok(look_again),
                Ok(_) => "it has lived two thirds of its life".to_owned(),
                Err(reason) => reason,
            },
        };
        let pair = issue::serving(&self.root, &self.plan.names, now, self.plan.life)?;
        if self.store.write(Slot::Serving, &pair, &self.root, stored.as_ref()).await? == Written::Yes {
            info!("renewed the serving certificate: {reason}");
            self.metrics.serving_renewals.inc();
            put_in_force(&self.resolver, &self.metrics, &self.root, &pair)?;
        }
        Ok(look_again)
    }

    async fn follow(&self, api: Api<Secret>, leader: watch::Receiver<bool>) {
        let fields = format!("metadata.name={}", Slot::Serving.secret());
        let events = watcher::watcher(api, watcher::Config::default().fields(&fields));
        pin_mut!(events);
        let mut failures = 0;
        while let Some(event) = events.next().await {
            let found = match event {
                Ok(watcher::Event::Apply(secret) | watcher::Event::InitApply(secret)) => {
                    usable(&self.root, &super::store::from_secret(&secret), &self.plan, SystemTime::now())
                }
                Ok(watcher::Event::Delete(_)) => Err("it was deleted".into()),
                Ok(_) => {
                    failures = 0;
                    continue;
                }
                Err(error) => {
                    failures += 1;
                    debug!(%error, "watch of the serving certificate failed");
                    tokio::time::sleep(backoff(failures)).await;
                    continue;
                }
            };
            failures = 0;
            let result = match found {
                Ok(pair) => put_in_force(&self.resolver, &self.metrics, &self.root, &pair),
                Err(reason) => {
                    warn!(
                        "secret {} can't be used: {reason}; the certificate in force stays until the leader has replaced it",
                        Slot::Serving.secret()
                    );
                    if *leader.borrow() { self.renew_if_due().await.map(drop) } else { Ok(()) }
                }
            };
            if let Err(error) = result {
                error!("serving certificate: {error:#}");
            }
        }
    }
}

fn usable(root: &Pair, stored: &Stored, plan: &Plan, now: SystemTime) -> Result<Pair, String> {
    let pair = stored.pair.clone().ok_or("it is empty")?;
    issue::check_serving(root, &pair, &plan.names, now).map_err(|e| e.to_string())?;
    Ok(pair)
}

fn put_in_force(resolver: &Resolver, metrics: &Metrics, root: &Pair, pair: &Pair) -> anyhow::Result<()> {
    resolver.set(pair)?;
    let unix = |t: SystemTime| t.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs() as i64;
    metrics.serving_expiry.set(unix(issue::facts(&pair.certificate)?.not_after));
    metrics.root_expiry.set(unix(issue::facts(&root.certificate)?.not_after));
    Ok(())
}

/// Create or read: returns the root on which all replicas agree.
async fn agree_on_root(store: &Store) -> anyhow::Result<Pair> {
    let secret = Slot::Root.secret();
    // Somebody who is faster twice in a row would be strange; the caller tries again anyway.
    for _ in 0..3 {
        let stored = store.read(Slot::Root).await?;
        if let Some(pair) = stored.as_ref().and_then(|s| s.pair.clone()) {
            // A new root would cut off every pod that trusts this one: that is for a person to decide.
            issue::check_root(&pair, SystemTime::now()).map_err(|error| {
                anyhow::anyhow!(
                    "the root in secret {secret} can't be used: {error}. Put it right, or delete it to begin with a new root (pods then \
                     have to be restarted)"
                )
            })?;
            return Ok(pair);
        }
        let pair = issue::root(SystemTime::now())?;
        if store.write(Slot::Root, &pair, &pair, stored.as_ref()).await? == Written::Yes {
            info!(secret, "made a new root");
            return Ok(pair);
        }
    }
    anyhow::bail!("secret {secret} is created and deleted by turns; is something else managing it?")
}
