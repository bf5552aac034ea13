//! Proves who a proxy is.
//!
//! In a cluster: the projected token of its pod, by TokenReview with audience `weft`. The API server says which service
//! account and, because such a token is bound to its pod, which pod; a token that is bound to no pod proves nothing that
//! we could hand out a pod's configuration for, and is refused. Nothing is cached: a stream is opened once in a long while,
//! and a token that was revoked must not live on here.
//!
//! What the token says of the service account is the workload's identity; see [`identity`](super::identity).
//!
//! Without a cluster: tokens of a file, or, where there is none, any process of this machine and nobody else.

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use kube::api::PostParams;
use kube::{Api, Client};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use weft_api::names;

/// TokenReviews under way at once: a herd of proxies that comes back after an outage must not be passed on to the API server.
const REVIEWS: usize = 32;
/// Time for a TokenReview.
const PATIENCE: Duration = Duration::from_secs(10);

/// Who a caller was proved to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Namespace of the pod; `None`: any (a local process without a cluster).
    pub namespace: Option<String>,
    /// Name of the pod; `None`: any.
    pub pod: Option<String>,
    /// Name of the service account; `None`: that of the pod's manifest.
    pub service_account: Option<String>,
    /// `metadata.uid` of the pod, where the token has it.
    pub pod_uid: Option<String>,
}

impl Caller {
    /// Any pod: a local process without a cluster.
    pub const ANY: Self = Self { namespace: None, pod: None, service_account: None, pod_uid: None };

    /// Whether it may speak for a pod.
    ///
    /// # Errors
    /// Why not, in words.
    pub fn agrees(&self, namespace: &str, pod: &str) -> Result<(), String> {
        if pod.is_empty() || namespace.is_empty() {
            return Err("the call names no pod".into());
        }
        for (what, proved, said) in [("namespace", &self.namespace, namespace), ("pod", &self.pod, pod)] {
            if let Some(proved) = proved
                && proved != said
            {
                return Err(format!("the token is that of {what} {proved}, and the call says {what} {said}"));
            }
        }
        Ok(())
    }

    /// Whether it is the pod that is known by its name and not one before it: a token outlives its pod by up to its own life where
    /// the API server has not noticed yet.
    ///
    /// # Errors
    /// The token is of a pod that was deleted.
    pub fn is_that(&self, known: Option<&crate::model::Pod>) -> Result<(), AuthError> {
        match (&self.pod_uid, known) {
            (Some(uid), Some(pod)) if !pod.uid.is_empty() && *uid != pod.uid => Err(AuthError::Refused(format!(
                "it was made for a pod {}/{} that is gone; another one has its name now",
                pod.namespace, pod.name
            ))),
            _ => Ok(()),
        }
    }
}

/// The token of a call's `authorization: Bearer` metadata.
pub fn bearer(metadata: &tonic::metadata::MetadataMap) -> Option<&str> {
    let (scheme, token) = metadata.get("authorization")?.to_str().ok()?.split_once(' ')?;
    (scheme.eq_ignore_ascii_case("bearer") && !token.trim().is_empty()).then(|| token.trim())
}

/// A caller who was not let in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// There is no token in the call.
    #[error("no token: send the pod's projected token as `authorization: Bearer …`")]
    NoToken,
    /// The token is not good.
    #[error("the token was refused: {0}")]
    Refused(String),
    /// The API server can't be asked.
    #[error("cannot check the token: {0}")]
    Unavailable(String),
}

impl AuthError {
    /// Code for metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoToken => "no-token",
            Self::Refused(_) => "bad-token",
            Self::Unavailable(_) => "review-failed",
        }
    }
}

/// How callers are checked.
#[derive(Clone)]
pub enum Authenticator {
    /// By TokenReview.
    Reviews {
        /// The cluster.
        client: Client,
        /// Limits reviews under way.
        permits: Arc<Semaphore>,
    },
    /// By tokens that are known.
    Tokens(Arc<HashMap<String, Caller>>),
    /// Any process of this machine.
    Local,
}

impl Authenticator {
    /// By TokenReview of a cluster.
    pub fn reviews(client: Client) -> Self {
        Self::Reviews { client, permits: Arc::new(Semaphore::new(REVIEWS)) }
    }

    /// By the tokens of a file: a line `TOKEN NAMESPACE/POD[/SERVICEACCOUNT]` each, `#` begins a comment. Without an account that of
    /// the pod's manifest counts.
    ///
    /// # Errors
    /// The file can't be read, or a line is none.
    pub fn tokens(file: &Path) -> anyhow::Result<Self> {
        let text =
            std::fs::read_to_string(file).map_err(|e| anyhow::anyhow!("cannot read the tokens {}: {e}", file.display()))?;
        let mut tokens = HashMap::new();
        for (number, line) in text.lines().enumerate().map(|(n, l)| (n + 1, l.split('#').next().unwrap_or_default().trim())) {
            if line.is_empty() {
                continue;
            }
            let Some((token, caller)) = token_line(line) else {
                // The line is not shown: it may hold a token.
                anyhow::bail!("{} line {number}: expected `TOKEN NAMESPACE/POD[/SERVICEACCOUNT]`", file.display());
            };
            if tokens.insert(token, caller).is_some() {
                anyhow::bail!("{} line {number}: the token stands on an earlier line too", file.display());
            }
        }
        Ok(Self::Tokens(Arc::new(tokens)))
    }

    /// Checks a caller.
    ///
    /// # Errors
    /// Why it is not let in.
    pub async fn check(&self, token: Option<&str>, peer: Option<SocketAddr>) -> Result<Caller, AuthError> {
        match self {
            Self::Reviews { client, permits } => {
                let token = token.ok_or(AuthError::NoToken)?;
                let _permit = permits.acquire().await.map_err(|e| AuthError::Unavailable(e.to_string()))?;
                review(client, token).await
            }
            Self::Tokens(tokens) => {
                let token = token.ok_or(AuthError::NoToken)?;
                tokens.get(token).cloned().ok_or_else(|| AuthError::Refused("it is not in the file of tokens".into()))
            }
            Self::Local => match peer {
                Some(peer) if peer.ip().to_canonical().is_loopback() => Ok(Caller::ANY),
                _ => Err(AuthError::Refused("without --tokens only processes of this machine may ask".into())),
            },
        }
    }
}

fn token_line(line: &str) -> Option<(String, Caller)> {
    let (token, who) = line.split_once(char::is_whitespace)?;
    let mut parts = who.trim().split('/').map(str::trim);
    let (namespace, pod, account) = (parts.next()?, parts.next()?, parts.next());
    if parts.next().is_some() || [Some(namespace), Some(pod), account].into_iter().flatten().any(str::is_empty) {
        return None;
    }
    let caller = Caller {
        namespace: Some(namespace.into()),
        pod: Some(pod.into()),
        service_account: account.map(str::to_owned),
        pod_uid: None,
    };
    Some((token.to_owned(), caller))
}

async fn review(client: &Client, token: &str) -> Result<Caller, AuthError> {
    let review = TokenReview {
        spec: TokenReviewSpec { audiences: Some(vec![names::TOKEN_AUDIENCE.into()]), token: Some(token.into()) },
        ..TokenReview::default()
    };
    let api: Api<TokenReview> = Api::all(client.clone());
    let answer = match tokio::time::timeout(PATIENCE, api.create(&PostParams::default(), &review)).await {
        Ok(Ok(answer)) => answer.status.unwrap_or_default(),
        Ok(Err(error)) => return Err(AuthError::Unavailable(format!("the TokenReview failed: {error}"))),
        Err(_) => return Err(AuthError::Unavailable(format!("no answer to the TokenReview in {} s", PATIENCE.as_secs()))),
    };
    if answer.authenticated != Some(true) {
        return Err(AuthError::Refused(answer.error.unwrap_or_else(|| "the API server does not know it (expired?)".into())));
    }
    // An API server that knows nothing of audiences answers without any: it has not checked ours.
    if !answer.audiences.unwrap_or_default().iter().any(|a| a == names::TOKEN_AUDIENCE) {
        return Err(AuthError::Refused(format!("it is not meant for audience {}", names::TOKEN_AUDIENCE)));
    }
    let user = answer.user.unwrap_or_default();
    let username = user.username.unwrap_or_default();
    let account = username.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':'));
    let Some((namespace, account)) = account else {
        return Err(AuthError::Refused(format!("{username:?} is no service account")));
    };
    let extra = user.extra.unwrap_or_default();
    let about = |key: &str| extra.get(key).and_then(|values| values.first()).cloned();
    let Some(pod) = about("authentication.kubernetes.io/pod-name") else {
        return Err(AuthError::Refused("it is not bound to a pod; use the projected token that the webhook mounts".into()));
    };
    Ok(Caller {
        namespace: Some(namespace.into()),
        pod: Some(pod),
        service_account: Some(account.into()),
        pod_uid: about("authentication.kubernetes.io/pod-uid"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn tokens_of_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tokens");
        std::fs::write(&file, "# mine\nsecret-1  default/go-app/web\n\nsecret-2 shop/cart # cart\n").unwrap();
        let auth = Authenticator::tokens(&file).unwrap();
        let peer = Some("10.0.0.1:1".parse().unwrap());
        let caller = auth.check(Some("secret-2"), peer).await.unwrap();
        assert_eq!(caller, Caller { namespace: Some("shop".into()), pod: Some("cart".into()), ..Caller::ANY });
        let caller = auth.check(Some("secret-1"), peer).await.unwrap();
        assert_eq!((caller.pod.as_deref(), caller.service_account.as_deref()), (Some("go-app"), Some("web")));
        assert_eq!(auth.check(None, peer).await.unwrap_err(), AuthError::NoToken);
        assert!(matches!(auth.check(Some("other"), peer).await, Err(AuthError::Refused(_))));
        for bad in ["hush-hush default", "hush-hush a/b/c/d", "hush-hush a//c", "hush-hush a/b/", "hush-hush /b"] {
            std::fs::write(&file, bad).unwrap();
            let error = Authenticator::tokens(&file).err().unwrap().to_string();
            assert!(error.contains("line 1") && !error.contains("hush"), "{error}");
        }
        std::fs::write(&file, "hush-hush a/b\nhush-hush a/c").unwrap();
        let error = Authenticator::tokens(&file).err().unwrap().to_string();
        assert!(error.contains("line 2") && !error.contains("hush"), "{error}");
    }

    #[test]
    fn the_token_and_the_call_must_agree() {
        let caller = Caller { namespace: Some("shop".into()), pod: Some("cart".into()), ..Caller::ANY };
        assert!(caller.agrees("shop", "cart").is_ok());
        assert!(caller.agrees("shop", "other").unwrap_err().contains("pod cart"));
        assert!(caller.agrees("other", "cart").unwrap_err().contains("namespace shop"));
        assert!(Caller::ANY.agrees("a", "b").is_ok());
        assert!(Caller::ANY.agrees("", "b").is_err() && Caller::ANY.agrees("a", "").is_err());
    }

    #[test]
    fn a_token_of_a_pod_that_was_replaced_is_refused() {
        let pod = |uid: &str| crate::model::Pod { name: "cart".into(), uid: uid.into(), ..Default::default() };
        let caller = Caller { pod_uid: Some("one".into()), ..Caller::ANY };
        assert!(caller.is_that(Some(&pod("one"))).is_ok());
        assert!(caller.is_that(None).is_ok(), "the watch may lag behind a new pod; the API server knows its token");
        assert!(caller.is_that(Some(&pod(""))).is_ok(), "manifests have no uid");
        assert!(caller.is_that(Some(&pod("two"))).unwrap_err().to_string().contains("gone"));
    }

    #[test]
    fn bearer_tokens() {
        let of = |value: &str| {
            let mut metadata = tonic::metadata::MetadataMap::new();
            metadata.insert("authorization", value.parse().unwrap());
            bearer(&metadata).map(str::to_owned)
        };
        assert_eq!(of("Bearer abc").as_deref(), Some("abc"));
        assert_eq!(of("bearer  abc ").as_deref(), Some("abc"));
        for bad in ["Basic abc", "Bearer ", "abc"] {
            assert_eq!(of(bad), None, "{bad}");
        }
    }

    #[tokio::test]
    async fn without_tokens_only_this_machine() {
        let auth = Authenticator::Local;
        for (peer, good) in [("127.0.0.1:9", true), ("[::1]:9", true), ("[::ffff:127.0.0.1]:9", true), ("10.0.0.1:9", false)] {
            assert_eq!(auth.check(None, Some(peer.parse().unwrap())).await.is_ok(), good, "{peer}");
        }
        assert!(auth.check(None, None).await.is_err());
    }
}
