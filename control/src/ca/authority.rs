//! What the mesh trusts and what signs for it, as it is in force at one moment.
//!
//! All that depends on it (the proxies' API, trust bundles, `caBundle`, readiness, the serving certificate) receives this one value
//! by a watch channel and never sees half a change.

use super::issue::{self, CertError};
use super::signer::Signer;
use super::state::State;
use crate::compile::Mesh;
use rustls_pki_types::CertificateDer;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::watch;
use weft_api::wire::TrustBundle;

/// Tells the time; tests have their own.
pub type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// The machine's clock.
pub fn system_clock() -> Clock {
    Arc::new(SystemTime::now)
}

/// What is in force.
#[derive(Clone, Debug)]
pub struct Authority {
    /// What signs workload certificates; or why nothing does on this replica.
    pub signer: Result<Arc<Signer>, String>,
    /// SHA-256 of the certificate that signs, here or on other replicas.
    pub issuer: Vec<u8>,
    /// The roots (PEM, one after the other) that a peer's chain may end at: never fewer than are needed.
    pub bundle: Arc<str>,
    /// The same, DER.
    pub roots: Vec<CertificateDer<'static>>,
    /// Seconds since 1970; leaves that were issued before should be renewed. 0: none.
    pub renew_before: u64,
}

impl Authority {
    /// Of a state, and what signs.
    ///
    /// # Errors
    /// There is no root, or one that can't be read.
    pub fn new(state: &State, signer: Result<Arc<Signer>, String>) -> Result<Self, CertError> {
        let bundle = state.bundle();
        let roots = issue::ders(&bundle)?;
        if roots.is_empty() {
            return Err(CertError::Unusable("there is no root certificate".into()));
        }
        let issuer = issue::unhex(&state.issuer).unwrap_or_default();
        Ok(Self { signer, issuer, bundle: bundle.into(), roots, renew_before: state.renew_before })
    }

    /// Whether nothing that matters differs.
    pub fn same(&self, other: &Self) -> bool {
        let signers = match (&self.signer, &other.signer) {
            (Ok(one), Ok(other)) => one.fingerprint() == other.fingerprint() && one.not_after() == other.not_after(),
            (Err(one), Err(other)) => one == other,
            _ => false,
        };
        signers && self.issuer == other.issuer && self.bundle == other.bundle && self.renew_before == other.renew_before
    }

    /// What proxies are told.
    pub fn trust_bundle(&self, trust_domain: &str, aliases: &[String]) -> TrustBundle {
        TrustBundle {
            roots: self.roots.iter().map(|root| root.to_vec()).collect(),
            trust_domain: trust_domain.into(),
            trust_domain_aliases: aliases.to_vec(),
            issuer: self.issuer.clone(),
            renew_before: self.renew_before,
        }
    }
}

/// The authority in force; none before it was read or made.
pub type InForce = watch::Receiver<Option<Arc<Authority>>>;

/// Keeps what proxies are told in step with the authority and the settings of the mesh. Runs until it is dropped.
pub async fn follow(
    mut authority: InForce,
    mut mesh: watch::Receiver<Arc<Mesh>>,
    trust: watch::Sender<Option<Arc<TrustBundle>>>,
) {
    loop {
        let now = {
            let mesh = mesh.borrow_and_update();
            authority
                .borrow_and_update()
                .as_ref()
                .map(|authority| Arc::new(authority.trust_bundle(&mesh.trust_domain, &mesh.policy.trust_domain_aliases)))
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
            changed = mesh.changed() => if changed.is_err() { return std::future::pending().await },
        }
    }
}
