//! Keeps the serving certificate in force, on every replica, and renews it, on the one that leads.
//!
//! A replica follows the Secret by a watch and puts in force what it finds there, if it passes [`issue::check_serving`]. Only
//! the leader writes: at two thirds of the certificate's life, when something else signs now, or when what is stored can't be used (it leads
//! to no root that is trusted, lacks a name, was damaged). A replica without any usable certificate does not wait for a leader: at first
//! start somebody has to begin, and [`store`](super::store) sees to it that all end up with the same.
//!
//! Where nothing can sign (a user's authority is broken), the certificate in force stays, as long as it is valid.

use super::authority::{Authority, Clock, InForce};
use super::issue::{self, Pair};
use super::resolver::Resolver;
use super::store::{Serving as Stored, Store, Written, serving_of_secret};
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
use weft_api::names;

/// The serving certificate.
pub struct Serving {
    /// Where it is kept.
    pub store: Store,
    /// The names that it bears.
    pub names: Vec<String>,
    /// Its life.
    pub life: Duration,
    /// What hands it to TLS.
    pub resolver: Arc<Resolver>,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// What signs it, and the roots to which it must lead.
    pub authority: InForce,
    /// Tells the time.
    pub clock: Clock,
}

impl Serving {
    fn present(&self) -> anyhow::Result<Arc<Authority>> {
        self.authority.borrow().clone().ok_or_else(|| anyhow::anyhow!("there is no certificate authority yet"))
    }

    /// Reads or makes a certificate, and puts it in force.
    ///
    /// # Errors
    /// The store can't be reached, another replica was faster, or nothing is stored and nothing can sign.
    pub async fn open(&self) -> anyhow::Result<()> {
        let authority = self.present()?;
        let stored = self.store.serving().await?;
        let pair = match &stored {
            Some(stored) => match self.usable(&authority, stored) {
                Ok(pair) => pair,
                Err(reason) => {
                    info!("replacing the serving certificate: {reason}");
                    self.make(&authority, Some(stored)).await?
                }
            },
            None => {
                let pair = self.make(&authority, None).await?;
                info!("made a serving certificate");
                pair
            }
        };
        self.put_in_force(&pair)
    }

    async fn make(&self, authority: &Authority, replaces: Option<&Stored>) -> anyhow::Result<Pair> {
        let signer =
            authority.signer.as_ref().map_err(|reason| anyhow::anyhow!("nothing can sign a serving certificate: {reason}"))?;
        let pair = signer.serving(&self.names, (self.clock)(), self.life)?;
        match self.store.write_serving(&pair, &authority.bundle, replaces).await? {
            Written::Yes => Ok(pair),
            Written::Lost => anyhow::bail!("another replica has just written the serving certificate"),
        }
    }

    fn usable(&self, authority: &Authority, stored: &Stored) -> Result<Pair, String> {
        let pair = stored.pair.clone().ok_or("it is empty")?;
        issue::check_serving(&authority.bundle, &pair, &self.names, (self.clock)()).map_err(|e| e.to_string())?;
        Ok(pair)
    }

    fn put_in_force(&self, pair: &Pair) -> anyhow::Result<()> {
        self.resolver.set(pair)?;
        let end = issue::facts(&pair.certificate)?.not_after;
        self.metrics.serving_expiry.set(super::user::seconds(end) as i64);
        Ok(())
    }

    /// Follows the stored certificate and, while `leader` says so, renews it. Runs until it is dropped.
    pub async fn run(&self, mut leader: watch::Receiver<bool>) {
        let follower_leads = leader.clone();
        let follow = async {
            match &self.store {
                Store::Secrets { client, namespace } => {
                    self.follow(Api::namespaced(client.clone(), namespace), follower_leads).await;
                }
                Store::Folder(_) | Store::Memory(_) => std::future::pending().await,
            }
        };
        let renew = async {
            let mut failures = 0;
            let mut authority = self.authority.clone();
            loop {
                if !*leader.borrow_and_update() {
                    tokio::select! {
                        changed = leader.changed() => if changed.is_err() { std::future::pending::<()>().await },
                        _ = authority.changed() => self.look().await,
                    }
                    continue;
                }
                authority.mark_unchanged();
                match self.renew_if_due().await {
                    Ok(next) => {
                        failures = 0;
                        tokio::select! {
                            () = tokio::time::sleep(next) => {}
                            _ = authority.changed() => {}
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

    /// What is stored may be good now that the roots are others: the two Secrets are watched one by one.
    async fn look(&self) {
        let stored = match (self.store.serving().await, self.present()) {
            (Ok(Some(stored)), Ok(authority)) => self.usable(&authority, &stored),
            _ => return,
        };
        if let Ok(pair) = stored
            && let Err(error) = self.put_in_force(&pair)
        {
            error!("serving certificate: {error:#}");
        }
    }

    /// Renews the certificate if it is due, and returns how long to wait before asking again.
    async fn renew_if_due(&self) -> anyhow::Result<Duration> {
        // The clock is looked at now and then rather than slept through, so that a machine that was suspended, or whose clock
        // was set, renews in time.
        let look_again = (self.life / 20).clamp(Duration::from_millis(50), Duration::from_secs(3600));
        let authority = self.present()?;
        let now = (self.clock)();
        let stored = self.store.serving().await?;
        let reason = match &stored {
            None => "it is gone from the store".to_owned(),
            Some(stored) => match self.usable(&authority, stored) {
                Ok(pair) => match reason_to_renew(&authority, &pair, now)? {
                    None => return Ok(look_again),
                    Some(reason) => reason.to_owned(),
                },
                Err(reason) => reason,
            },
        };
        let pair = self.make(&authority, stored.as_ref()).await?;
        info!("renewed the serving certificate: {reason}");
        self.metrics.serving_renewals.inc();
        self.put_in_force(&pair)?;
        Ok(look_again)
    }

    async fn follow(&self, api: Api<Secret>, leader: watch::Receiver<bool>) {
        let fields = format!("metadata.name={}", names::SERVING_SECRET);
        let events = watcher::watcher(api, watcher::Config::default().fields(&fields));
        pin_mut!(events);
        let mut failures = 0;
        while let Some(event) = events.next().await {
            let found = match event {
                Ok(watcher::Event::Apply(secret) | watcher::Event::InitApply(secret)) => {
                    self.present().map_err(|e| e.to_string()).and_then(|a| self.usable(&a, &serving_of_secret(secret)))
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
                Ok(pair) => self.put_in_force(&pair),
                Err(reason) => {
                    warn!(
                        "secret {} can't be used: {reason}; the certificate in force stays until the leader has replaced it",
                        names::SERVING_SECRET
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

fn reason_to_renew(authority: &Authority, pair: &Pair, now: SystemTime) -> anyhow::Result<Option<&'static str>> {
    // What can't be done is no reason; that nothing signs is said where it is known.
    let Ok(signer) = &authority.signer else { return Ok(None) };
    let chain = issue::ders(&pair.certificate)?;
    if !issue::leads_to(chain.get(..1).unwrap_or_default(), std::slice::from_ref(signer.certificate()), now) {
        return Ok(Some("something else signs now"));
    }
    let due = issue::facts(&pair.certificate)?.renew_at() <= now;
    // One that ends with its issuer can't be had any longer.
    let cut = issue::facts(&pair.certificate)?.not_after >= signer.not_after();
    Ok((due && !cut).then_some("it has lived two thirds of its life"))
}
