//! What the mesh trusts and what signs for it, as it is in force at one moment.
//!
//! All that depends on it (the proxies' API, trust bundles, `caBundle`, readiness, the serving certificate) receives this one value
//! by a watch channel and never sees half a change.

use super::issue::CertError;
use super::signer::Signer;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::watch;
use weft_api::wire::TrustBundle;
use weft_webhook::Settings;

/// Tells the time; tests have their own.
pub type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// The machine's clock.
pub fn system_clock() -> Clock {
    Arc::new(SystemTime::now)
}

/// What is in force.
#[derive(Clone, Debug)]
pub struct Authority {
    /// What signs workload certificates.
    pub signer: Arc<Signer>,
    /// The roots (PEM, one after the other) that a peer's chain may end at: never fewer than are needed.
    pub bundle: String,
    /// The same, DER.
    pub roots: Vec<CertificateDer<'static>>,
    /// Seconds since 1970; leaves that were issued before should be renewed. 0: none.
    pub renew_before: u64,
}

impl Authority {
    /// Of a signer and the roots (PEM) that are trusted.
    ///
    /// # Errors
    /// There is no root, or one that can't be read.
    pub fn new(signer: Arc<Signer>, bundle: String, renew_before: u64) -> Result<Self, CertError> {
        let roots: Vec<_> = CertificateDer::pem_slice_iter(bundle.as_bytes())
            .collect::<Result<_, _>>()
            .map_err(|e| CertError::Unusable(format!("the roots can't be read: {e}")))?;
        if roots.is_empty() {
            return Err(CertError::Unusable("there is no root certificate".into()));
        }
        Ok(Self { signer, bundle, roots, renew_before })
    }

    /// What proxies are told.
    pub fn trust_bundle(&self, settings: &Settings) -> TrustBundle {
        TrustBundle {
            roots: self.roots.iter().map(|root| root.to_vec()).collect(),
            trust_domain: settings.trust_domain.clone(),
            trust_domain_aliases: Vec::new(),
            issuer: self.signer.fingerprint().to_vec(),
            renew_before: self.renew_before,
        }
    }
}

/// The authority in force; none before it was read or made.
pub type InForce = watch::Receiver<Option<Arc<Authority>>>;

/// Keeps what proxies are told in step with the authority and the settings. Runs until it is dropped.
pub async fn follow(
    mut authority: InForce,
    mut settings: watch::Receiver<Arc<Settings>>,
    trust: watch::Sender<Option<Arc<TrustBundle>>>,
) {
    loop {
        let now = {
            let settings = settings.borrow_and_update();
            authority.borrow_and_update().as_ref().map(|authority| Arc::new(authority.trust_bundle(&settings)))
        };
        trust.send_if_modified(|before| {
            let differs = *before != now;
            if differs {
                *before = now;
            }
            differs
        });
        tokio::select! {
            changed = authority.changed() => if changed.is_err() { return std::future::pending().await },
            changed = settings.changed() => if changed.is_err() { return std::future::pending().await },
        }
    }
}
