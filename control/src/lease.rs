//! Which replica writes: an election over one `coordination.k8s.io/v1` Lease.
//!
//! All replicas serve admission and proxies; what is written to the cluster (caBundle, trust bundles, renewals, reports of missed
//! pods) is written by one. Two that write for a moment do no harm, since all writes converge and name the version they
//! replace, so the election aims at quick takeover and few calls.
//!
//! Clocks of different machines are never compared: a replica counts from the moment at which *it* saw the holder renew for the
//! last time, and takes over when that is longer ago than the lease lasts. The holder stops leading when it could not
//! renew for two thirds of that time, thus before anybody can have taken over. Each write names the version it replaces.

use crate::metrics::Metrics;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// Times of an election.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// How long a lease lasts without being renewed.
    pub duration: Duration,
    /// How often it is renewed, or looked at by those who wait.
    pub period: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self { duration: Duration::from_secs(15), period: Duration::from_secs(5) }
    }
}

/// A candidate.
pub struct Candidate {
    /// The cluster.
    pub client: Client,
    /// The control namespace.
    pub namespace: String,
    /// Name of the Lease.
    pub name: String,
    /// Who we are: unique among replicas.
    pub identity: String,
    /// Times.
    pub timing: Timing,
}

/// What a candidate remembers of the lease between looks.
#[derive(Debug, Default)]
struct Seen {
    holder: String,
    renewed: Option<MicroTime>,
    transitions: i32,
    at: Option<Instant>,
}

impl Candidate {
    /// Takes part until `end`, then gives the lease back so that another can take over at once. `leads` says who leads.
    pub async fn run(self, leads: watch::Sender<bool>, metrics: Arc<Metrics>, end: CancellationToken) {
        let mut seen = Seen::default();
        let mut renewed_at = None::<Instant>;
        let mut failures = 0u32;
        loop {
            match tokio::time::timeout(self.timing.duration / 3, self.try_hold(&mut seen)).await {
                Ok(Ok(true)) => {
                    renewed_at = Some(Instant::now());
                    failures = 0;
                    set(&leads, &metrics, true, &self.identity);
                }
                Ok(Ok(false)) => {
                    renewed_at = None;
                    failures = 0;
                    set(&leads, &metrics, false, &self.identity);
                }
                Ok(Err(error)) => self.failed(&mut failures, &error.to_string()),
                Err(_) => self.failed(&mut failures, "no answer"),
            }
            if let Some(at) = renewed_at
                && at.elapsed() > self.timing.duration * 2 / 3
            {
                warn!("could not renew lease {}/{} in time; not leading any more", self.namespace, self.name);
                renewed_at = None;
                set(&leads, &metrics, false, &self.identity);
            }
            let pause = self.timing.period.mul_f64(rand::random_range(0.9..1.1));
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = end.cancelled() => break,
            }
        }
        let led = *leads.borrow();
        set(&leads, &metrics, false, &self.identity);
        if led {
            match tokio::time::timeout(Duration::from_secs(3), self.give_back()).await {
                Ok(Ok(())) => info!("gave the lease back"),
                Ok(Err(error)) => debug!(%error, "could not give the lease back; it runs out by itself"),
                Err(_) => debug!("no answer when giving the lease back; it runs out by itself"),
            }
        }
    }

    fn failed(&self, failures: &mut u32, error: &str) {
        *failures += 1;
        if *failures == 3 || failures.is_multiple_of(60) {
            warn!(
                error,
                failures,
                "cannot read or write lease {}/{}; while nobody holds it, nothing is put right in the cluster (is the API server up, \
                 and the Role weft-control complete?)",
                self.namespace,
                self.name
            );
        } else {
            debug!(error, "cannot read or write lease {}/{}", self.namespace, self.name);
        }
    }

    fn api(&self) -> Api<Lease> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Takes or renews the lease if that is due. `true`: it is ours now.
    async fn try_hold(&self, seen: &mut Seen) -> Result<bool, kube::Error> {
        let Some(mut lease) = self.api().get_opt(&self.name).await? else {
            let lease = Lease {
                metadata: ObjectMeta {
                    name: Some(self.name.clone()),
                    namespace: Some(self.namespace.clone()),
                    ..ObjectMeta::default()
                },
                spec: Some(self.spec(true, None, 0)),
            };
            return won(self.api().create(&PostParams::default(), &lease).await);
        };
        let spec = lease.spec.take().unwrap_or_default();
        let holder = spec.holder_identity.clone().unwrap_or_default();
        let transitions = spec.lease_transitions.unwrap_or_default();
        if seen.holder != holder || seen.renewed != spec.renew_time || seen.transitions != transitions || seen.at.is_none() {
            *seen = Seen { holder: holder.clone(), renewed: spec.renew_time.clone(), transitions, at: Some(Instant::now()) };
        }
        let lasts =
            spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok()).map_or(self.timing.duration, Duration::from_secs);
        let run_out = seen.at.is_some_and(|at| at.elapsed() > lasts.max(self.timing.duration));
        let ours = holder == self.identity;
        if !ours && !holder.is_empty() && !run_out {
            return Ok(false);
        }
        lease.spec = Some(self.spec(!ours, spec.acquire_time.filter(|_| ours), transitions + i32::from(!ours)));
        won(self.api().replace(&self.name, &PostParams::default(), &lease).await)
    }

    fn spec(&self, acquire: bool, acquired: Option<MicroTime>, transitions: i32) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: Some(i32::try_from(self.timing.duration.as_secs().max(1)).unwrap_or(i32::MAX)),
            acquire_time: if acquire { Some(now.clone()) } else { acquired },
            renew_time: Some(now),
            lease_transitions: Some(transitions),
            ..LeaseSpec::default()
        }
    }

    async fn give_back(&self) -> Result<(), kube::Error> {
        let Some(mut lease) = self.api().get_opt(&self.name).await? else { return Ok(()) };
        if let Some(spec) = lease.spec.as_mut().filter(|s| s.holder_identity.as_deref() == Some(&self.identity)) {
            spec.holder_identity = Some(String::new());
            spec.lease_duration_seconds = Some(1);
            self.api().replace(&self.name, &PostParams::default(), &lease).await?;
        }
        Ok(())
    }
}

/// A conflict means that another was faster, which is an answer and no error.
fn won(result: Result<Lease, kube::Error>) -> Result<bool, kube::Error> {
    match result {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        Err(error) => Err(error),
    }
}

fn set(leads: &watch::Sender<bool>, metrics: &Metrics, now: bool, identity: &str) {
    metrics.leader.set(i64::from(now));
    leads.send_if_modified(|before| {
        if *before == now {
            return false;
        }
        if now {
            info!(identity, "leading: this replica writes to the cluster");
        } else {
            info!(identity, "not leading any more");
        }
        *before = now;
        true
    });
}
