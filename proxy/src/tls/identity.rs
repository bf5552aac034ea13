//! Gets the proxy's certificate from the control plane and keeps it fresh.
//!
//! A new key for each certificate, made here and never written anywhere. Renewal is due at half of the certificate's life, give or take some
//! (so that pods that started together don't come together), or when the control plane wants another ([`Secrets::outdated_by`]). The
//! certificate in force stays until its successor is ready to use: there is no gap. While the control plane is away attempts go on with
//! back-off; what is running goes on until the certificate ends, which is half a day at the least.

use super::Secrets;
use crate::control::{self, Backoff};
use crate::settings::{Control, Settings};
use crate::telemetry::Metrics;
use anyhow::Context as _;
use arc_swap::ArcSwapOption;
use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use weft_api::wire::identity_client::IdentityClient;
use weft_api::wire::{CertificateState, CertifyRequest, TrustBundle};

/// Time for a certificate to be issued.
const PATIENCE: Duration = Duration::from_secs(15);
/// When the control plane wants new certificates, proxies come within this time.
const SPREAD: Duration = Duration::from_secs(5);
/// A certificate is looked at at least this often, because clocks may jump and machines sleep.
const LOOK: Duration = Duration::from_secs(60);

/// The certificate in force, if there is one, and what became of the last attempt. Shared by all threads.
#[derive(Debug, Default)]
pub struct Holder {
    secrets: ArcSwapOption<Secrets>,
    error: Mutex<String>,
}

impl Holder {
    /// What is in force.
    pub fn get(&self) -> Option<Arc<Secrets>> {
        self.secrets.load_full()
    }

    /// Puts a certificate in force.
    pub fn set(&self, secrets: Secrets) {
        self.secrets.store(Some(Arc::new(secrets)));
    }

    /// What the control plane is told of it.
    pub fn state(&self) -> CertificateState {
        let seconds = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let error = self.error.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match self.get() {
            None => CertificateState { error, ..CertificateState::default() },
            Some(secrets) => CertificateState {
                identity: secrets.leaf.id.clone(),
                not_before: seconds(secrets.leaf.not_before),
                not_after: seconds(secrets.leaf.not_after),
                issuer: secrets.issuer.clone(),
                serial: secrets.serial.clone(),
                error,
            },
        }
    }

    /// Notes why the last attempt failed; empty: it did not.
    pub(crate) fn failed(&self, error: &str) {
        error.clone_into(&mut self.error.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// When a certificate is to be renewed: at half of its life, `jitter` (-1 to 1) hundredths of it sooner or later.
pub fn renewal(not_before: SystemTime, not_after: SystemTime, jitter: f64) -> SystemTime {
    let life = not_after.duration_since(not_before).unwrap_or_default();
    not_before + life.mul_f64(0.5 + 0.01 * jitter.clamp(-1.0, 1.0))
}

/// Keeps `holder` fresh, for ever. `trust` is what the control plane pushes.
pub async fn run(
    control: Control,
    settings: Arc<Settings>,
    holder: Arc<Holder>,
    mut trust: watch::Receiver<Option<TrustBundle>>,
    metrics: Arc<Metrics>,
) {
    let mut backoff = Backoff::new();
    let mut said = None;
    // The bundle that came with the certificate may be older than one that was pushed before.
    loop {
        let attempt = tokio::time::timeout(PATIENCE, certify(&control, &settings));
        let result = attempt.await.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer within {PATIENCE:?}")));
        match result {
            Ok(secrets) => {
                let leaf = secrets.leaf.clone();
                holder.failed("");
                said = None;
                backoff.reset();
                metrics.certificate(&leaf);
                tracing::info!(identity = %leaf.id, serial = %secrets.serial, issuer = %secrets.issuer, "certificate in force");
                holder.set(secrets);
                let due = renewal(leaf.not_before, leaf.not_after, rand::random::<f64>() * 2.0 - 1.0);
                until_due(due, &holder, &mut trust).await;
            }
            Err(error) => {
                let text = format!("{error:#}");
                metrics.certificate_failed();
                holder.failed(&text);
                if said.as_ref() != Some(&text) {
                    match holder.get() {
                        None => tracing::warn!("no certificate yet, so no mutual TLS: {text}; trying again"),
                        Some(secrets) => {
                            let left = secrets.leaf.not_after.duration_since(SystemTime::now()).unwrap_or_default();
                            let hours = left.as_secs_f64() / 3600.0;
                            tracing::warn!(
                                "the certificate can't be renewed: {text}; it is good for {hours:.1} h more, trying again"
                            );
                        }
                    }
                    said = Some(text);
                }
                tokio::time::sleep(backoff.wait()).await;
            }
        }
    }
}

/// Waits until a new certificate is wanted, and takes over trust bundles meanwhile.
async fn until_due(due: SystemTime, holder: &Holder, trust: &mut watch::Receiver<Option<TrustBundle>>) {
    let mut applied = None;
    loop {
        let pushed = trust.borrow_and_update().clone();
        if applied != pushed
            && let (Some(pushed), Some(secrets)) = (pushed.clone(), holder.get())
        {
            applied = Some(pushed.clone());
            match secrets.with_trust(&pushed) {
                Ok(renewed) => {
                    if !renewed.same_trust(&secrets) {
                        tracing::info!(roots = pushed.roots.len(), "trust bundle in force");
                        holder.set(renewed);
                    }
                }
                Err(error) => tracing::error!("a trust bundle is refused, the last good one stays in force: {error:#}"),
            }
            if secrets.outdated_by(&pushed) {
                tracing::info!("the control plane wants a new certificate");
                return tokio::time::sleep(SPREAD.mul_f64(rand::random())).await;
            }
        }
        let Ok(left) = due.duration_since(SystemTime::now()) else { return };
        tokio::select! {
            () = tokio::time::sleep(left.min(LOOK)) => {}
            changed = trust.changed() => if changed.is_err() {
                // Nobody pushes any more; time goes on.
                tokio::time::sleep(left.min(LOOK)).await;
            },
        }
    }
}

async fn certify(control: &Control, settings: &Settings) -> anyhow::Result<Secrets> {
    let key = KeyPair::generate().context("a key can't be made")?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let csr = params.serialize_request(&key).context("a certificate request can't be made")?.der().to_vec();
    let (channel, bearer) = control::connect(control).await?;
    let request = CertifyRequest {
        csr,
        pod: settings.identity.pod.clone(),
        namespace: settings.identity.namespace.clone(),
        life_seconds: 0,
    };
    let answer = IdentityClient::with_interceptor(channel, bearer).certify(request).await;
    let answer = answer.map_err(|status| anyhow::anyhow!("{} ({:?})", status.message(), status.code()))?.into_inner();
    let chain = answer.chain.into_iter().map(CertificateDer::from).collect();
    let trust = answer.trust.context("the control plane sent no trust bundle")?;
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    Secrets::new(chain, key, &trust)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_is_at_half_life_give_or_take() {
        let start = SystemTime::UNIX_EPOCH;
        let end = start + Duration::from_secs(86_400);
        let hours = |jitter| renewal(start, end, jitter).duration_since(start).unwrap().as_secs_f64() / 3600.0;
        assert!((hours(0.0) - 12.0).abs() < 1e-6);
        assert!((hours(-1.0) - 11.76).abs() < 1e-6);
        assert!((hours(5.0) - 12.24).abs() < 1e-6);
        assert_eq!(renewal(end, start, 0.0), end);
    }
}
