//! The proxies' API, `weft.v1.Identity`: certificates for workloads.
//!
//! The identity is the caller's own, as its token proves it; what the request says of itself is compared with that and never believed.
//! The order is from cheap to dear: the address's rate, the token, the pod's rate, the key and its proof of possession, the signature. The
//! last two are done on threads for blocking work, a few at a time: an RSA key of a user's CA takes milliseconds, and streams must not
//! wait for it.
//!
//! A call that fails costs the proxy nothing but a try: its certificate has half its life left when it asks for the next one.

use super::auth::{AuthError, Authenticator, Caller};
use super::limits::{Exceeded, Limits};
use super::tls::Peer;
use crate::ca::authority::{Clock, InForce};
use crate::ca::signer::{self, RequestError, SignError, Signer};
use crate::index::Index;
use crate::metrics::{Certified, Metrics};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, watch};
use tonic::{Request, Response, Status};
use tracing::{debug, info, warn};
use weft_api::wire::identity_server::{Identity, IdentityServer};
use weft_api::wire::{CertifyRequest, CertifyResponse, TrustBundle};

/// Largest message that is read.
const MESSAGE: usize = 64 * 1024;
/// Signatures under way at once.
const SIGNING: usize = 2;

/// The service.
pub struct Service {
    /// What is known of pods.
    pub index: Arc<Index>,
    /// How callers are checked.
    pub auth: Authenticator,
    /// What signs.
    pub authority: InForce,
    /// What proxies are told to trust.
    pub trust: watch::Receiver<Option<Arc<TrustBundle>>>,
    /// What one source may ask for.
    pub limits: Arc<Limits>,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Longest life of a certificate, and that of one for which the caller asks no other.
    pub life: Duration,
    /// Tells the time.
    pub clock: Clock,
}

/// Why a caller gets no certificate.
#[derive(Debug, thiserror::Error)]
enum Denied {
    #[error("{0}")]
    Limit(#[from] Exceeded),
    #[error("{0}")]
    Caller(#[from] AuthError),
    #[error("{0}")]
    NotItsPod(String),
    #[error("{0}")]
    Request(#[from] RequestError),
    #[error("{0}")]
    Name(String),
    #[error("the control plane has no certificate authority yet")]
    NotReady,
    #[error("this replica of the control plane can't sign: {0}")]
    NoSigner(String),
    #[error("{0}")]
    Sign(#[from] SignError),
    #[error("signing was interrupted: {0}")]
    Interrupted(String),
}

impl Denied {
    fn code(&self) -> &'static str {
        match self {
            Self::Limit(limit) => limit.code(),
            Self::Caller(error) => error.code(),
            Self::NotItsPod(_) => "not-its-pod",
            Self::Request(error) => error.code(),
            Self::Name(_) => "bad-name",
            Self::NotReady => "not-ready",
            Self::NoSigner(_) => "no-issuer",
            Self::Sign(SignError::Expired { .. }) => "issuer-expired",
            Self::Sign(SignError::Failed(_)) => "signing-failed",
            Self::Interrupted(_) => "interrupted",
        }
    }

    /// Whether the caller is to blame.
    fn refused(&self) -> bool {
        match self {
            Self::Limit(_) | Self::NotItsPod(_) | Self::Request(_) | Self::Name(_) => true,
            Self::Caller(error) => !matches!(error, AuthError::Unavailable(_)),
            Self::NotReady | Self::NoSigner(_) | Self::Sign(_) | Self::Interrupted(_) => false,
        }
    }

    fn status(&self) -> Status {
        let message = self.to_string();
        match self {
            Self::Limit(_) => Status::resource_exhausted(message),
            Self::Caller(AuthError::Unavailable(_)) | Self::NotReady | Self::NoSigner(_) | Self::Interrupted(_) => {
                Status::unavailable(message)
            }
            Self::Caller(AuthError::NoToken | AuthError::Refused(_)) => Status::unauthenticated(message),
            Self::NotItsPod(_) => Status::permission_denied(message),
            Self::Request(_) | Self::Name(_) => Status::invalid_argument(message),
            Self::Sign(SignError::Expired { .. }) => Status::failed_precondition(message),
            Self::Sign(SignError::Failed(_)) => Status::internal(message),
        }
    }
}

/// The signatures that may be under way.
struct Desk {
    service: Service,
    permits: Arc<Semaphore>,
}

impl Service {
    /// The service as a gRPC server.
    pub fn server(self) -> IdentityServer<impl Identity> {
        let desk = Desk { service: self, permits: Arc::new(Semaphore::new(SIGNING)) };
        IdentityServer::new(desk).max_decoding_message_size(MESSAGE)
    }

    /// The identity of a caller who asks for a pod.
    fn identity(&self, caller: &Caller, asked: &CertifyRequest, trust_domain: &str) -> Result<String, Denied> {
        caller.agrees(&asked.namespace, &asked.pod).map_err(Denied::NotItsPod)?;
        // A token tells the account; where tokens are only a list, the pod's manifest does.
        let account = caller.service_account.clone().unwrap_or_else(|| {
            let view = self.index.view(&asked.namespace);
            let known = view.and_then(|view| view.pods.get(&asked.pod).map(|pod| pod.service_account.clone()));
            known.filter(|account| !account.is_empty()).unwrap_or_else(|| "default".into())
        });
        signer::identity(trust_domain, &asked.namespace, &account).map_err(Denied::Name)
    }
}

impl Desk {
    async fn serve(&self, request: Request<CertifyRequest>) -> Result<(String, CertifyResponse), Denied> {
        let service = &self.service;
        let peer = request.extensions().get::<Peer>().map(|p| p.0);
        service.limits.certificate_of_address(peer.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |p| p.ip()), Instant::now())?;
        let token = super::auth::bearer(request.metadata()).map(str::to_owned);
        let caller = service.auth.check(token.as_deref(), peer).await?;
        let asked = request.into_inner();
        let known = service.index.view(&asked.namespace).and_then(|view| view.pods.get(&asked.pod).cloned());
        caller.is_that(known.as_deref())?;
        let trust = service.trust.borrow().clone().ok_or(Denied::NotReady)?;
        let identity = service.identity(&caller, &asked, &trust.trust_domain)?;
        service.limits.certificate_of_pod((asked.namespace.clone(), asked.pod.clone()), Instant::now())?;
        let life = match asked.life_seconds {
            0 => service.life,
            seconds => service.life.min(Duration::from_secs(seconds)),
        };
        let authority = service.authority.borrow().clone().ok_or(Denied::NotReady)?;
        let signer = authority.signer.clone().map_err(Denied::NoSigner)?;
        let leaf = self.sign(signer, asked.csr, identity.clone(), life).await?;
        debug!(pod = %asked.pod, namespace = %asked.namespace, %identity, "signed a certificate");
        let chain = leaf.chain.iter().map(|certificate| certificate.to_vec()).collect();
        // As of the same moment as the signature: what is pushed may be one step behind.
        let trust = authority.trust_bundle(&trust.trust_domain, &trust.trust_domain_aliases);
        Ok((identity, CertifyResponse { chain, trust: Some(trust) }))
    }

    async fn sign(&self, signer: Arc<Signer>, csr: Vec<u8>, identity: String, life: Duration) -> Result<signer::Leaf, Denied> {
        let interrupted = |e: &dyn std::fmt::Display| Denied::Interrupted(e.to_string());
        let permit = self.permits.clone().acquire_owned().await.map_err(|e| interrupted(&e))?;
        let now = (self.service.clock)();
        let signed = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let key = signer::proved_key(&csr)?;
            Ok::<_, Denied>(signer.sign(&key, &identity, now, life)?)
        });
        signed.await.map_err(|e| interrupted(&e))?
    }
}

#[tonic::async_trait]
impl Identity for Desk {
    async fn certify(&self, request: Request<CertifyRequest>) -> Result<Response<CertifyResponse>, Status> {
        let peer = request.extensions().get::<Peer>().map(|p| p.0);
        let (pod, namespace) = (request.get_ref().pod.clone(), request.get_ref().namespace.clone());
        match self.serve(request).await {
            Ok((identity, response)) => {
                self.service.metrics.certificates.get_or_create(&Certified::OK).inc();
                info!(%identity, pod = %shown(&pod), "issued a certificate");
                Ok(Response::new(response))
            }
            Err(denied) => {
                let labels = Certified::not(denied.refused(), denied.code());
                self.service.metrics.certificates.get_or_create(&labels).inc();
                let peer = peer.map(|p| p.to_string()).unwrap_or_default();
                // A flood must not become a flood of log lines; it is counted.
                if matches!(denied, Denied::Limit(_)) {
                    debug!(%peer, reason = denied.code(), "no certificate: {denied}");
                } else {
                    warn!(%peer, namespace = %shown(&namespace), pod = %shown(&pod), reason = denied.code(), "no certificate: {denied}");
                }
                Err(denied.status())
            }
        }
    }
}

/// A name that a caller made up, as it may stand in a log.
fn shown(text: &str) -> String {
    text.chars().take(253).flat_map(char::escape_default).collect()
}
