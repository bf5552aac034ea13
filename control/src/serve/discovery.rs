//! The proxies' API, `weft.v1.Discovery`.
//!
//! One task per stream: it waits for a change of its pod's namespace (nothing else wakes it), compiles its pod's
//! configuration, and sends it if it differs from what was sent last. A proxy that reads slowly is sent the latest state when it
//! has room, never a queue of old ones. What a proxy refuses is logged and counted; it keeps what it had.
//!
//! A pod that is not known (yet: the watch may lag behind a pod that has just started; any more: it is being deleted) is sent
//! nothing and keeps what it had. A stream that ends is opened again by the proxy, with back-off.

use super::auth::{AuthError, Authenticator, Caller};
use super::tls::Peer;
use crate::compile::{self, Mesh};
use crate::index::Index;
use crate::metrics::{Ended, Metrics, Refused};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, info, warn};
use weft_api::wire::discovery_server::{Discovery, DiscoveryServer};
use weft_api::wire::{ControlMessage, Hello, Inbound, ProxyMessage, control_message, proxy_message};

/// Time for the first message of a stream.
const HELLO: Duration = Duration::from_secs(10);
/// Largest message that is read: a Hello or an Ack is far smaller.
const MESSAGE: usize = 64 * 1024;

/// The service.
pub struct Service {
    /// What is known.
    pub index: Arc<Index>,
    /// What the compiler takes from the settings; a change is a change of every proxy's configuration.
    pub mesh: watch::Receiver<Arc<Mesh>>,
    /// How callers are checked.
    pub auth: Authenticator,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// The end: streams are ended so that proxies go elsewhere.
    pub end: CancellationToken,
}

impl Service {
    /// The service as an axum router.
    pub fn router(self) -> axum::Router {
        let service = DiscoveryServer::new(self).max_decoding_message_size(MESSAGE);
        tonic::service::Routes::new(service).prepare().into_axum_router()
    }

    fn refuse(&self, reason: &'static str, status: Status) -> Status {
        self.metrics.refused.get_or_create(&Refused { reason }).inc();
        warn!(reason, "refused a proxy: {}", status.message());
        status
    }
}

#[tonic::async_trait]
impl Discovery for Service {
    type AttachStream = ReceiverStream<Result<ControlMessage, Status>>;

    async fn attach(&self, request: Request<Streaming<ProxyMessage>>) -> Result<Response<Self::AttachStream>, Status> {
        let peer = request.extensions().get::<Peer>().map(|p| p.0);
        let token = request.metadata().get("authorization").and_then(|v| v.to_str().ok()).and_then(bearer).map(str::to_owned);
        let caller = self.auth.check(token.as_deref(), peer).await.map_err(|error| {
            let status = match &error {
                AuthError::NoToken | AuthError::Refused(_) => Status::unauthenticated(error.to_string()),
                AuthError::Unavailable(_) => Status::unavailable(error.to_string()),
            };
            self.refuse(error.code(), status)
        })?;
        let mut messages = request.into_inner();
        let hello = match tokio::time::timeout(HELLO, messages.message()).await {
            Ok(first) => match first?.and_then(|m| m.kind) {
                Some(proxy_message::Kind::Hello(hello)) => hello,
                _ => return Err(self.refuse("no-hello", Status::invalid_argument("the first message must be a Hello"))),
            },
            Err(_) => return Err(self.refuse("no-hello", Status::deadline_exceeded("no Hello came"))),
        };
        agree(&caller, &hello).map_err(|message| self.refuse("not-its-pod", Status::permission_denied(message)))?;
        info!(pod = %hello.pod, namespace = %hello.namespace, version = %hello.version, "proxy connected");
        let (sender, receiver) = mpsc::channel(1);
        let stream = Stream {
            view: self.index.subscribe(&hello.namespace),
            synced: self.index.synced(),
            mesh: self.mesh.clone(),
            metrics: self.metrics.clone(),
            end: self.end.clone(),
            hello,
            sender,
            version: 0,
            sent: None,
        };
        tokio::spawn(stream.run(messages));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

fn bearer(header: &str) -> Option<&str> {
    let (scheme, token) = header.split_once(' ')?;
    (scheme.eq_ignore_ascii_case("bearer") && !token.trim().is_empty()).then(|| token.trim())
}

fn agree(caller: &Caller, hello: &Hello) -> Result<(), String> {
    if hello.pod.is_empty() || hello.namespace.is_empty() {
        return Err("the Hello names no pod".into());
    }
    for (what, proved, said) in [("namespace", &caller.namespace, &hello.namespace), ("pod", &caller.pod, &hello.pod)] {
        if let Some(proved) = proved
            && proved != said
        {
            return Err(format!("the token is that of {what} {proved}, and the Hello says {what} {said}"));
        }
    }
    Ok(())
}

struct Stream {
    hello: Hello,
    view: watch::Receiver<Arc<crate::index::View>>,
    synced: watch::Receiver<bool>,
    mesh: watch::Receiver<Arc<Mesh>>,
    metrics: Arc<Metrics>,
    end: CancellationToken,
    sender: mpsc::Sender<Result<ControlMessage, Status>>,
    version: u64,
    sent: Option<Inbound>,
}

impl Stream {
    async fn run(mut self, mut messages: Streaming<ProxyMessage>) {
        self.metrics.streams.inc();
        self.live(&mut messages).await;
        self.metrics.streams.dec();
        debug!(pod = %self.hello.pod, namespace = %self.hello.namespace, "proxy disconnected");
    }

    async fn live(&mut self, messages: &mut Streaming<ProxyMessage>) {
        let end = self.end.clone();
        let sender = self.sender.clone();
        let mut due = true;
        loop {
            let ready = due && *self.synced.borrow();
            tokio::select! {
                biased;
                () = end.cancelled() => {
                    // The status only travels if there is room; otherwise the connection's end says the same.
                    let _ = sender.try_send(Err(Status::unavailable("this replica of the control plane shuts down")));
                    return;
                }
                message = messages.message() => match message {
                    Ok(Some(message)) => if !self.answered(message) { return },
                    Ok(None) | Err(_) => return,
                },
                permit = sender.reserve(), if ready => {
                    let Ok(permit) = permit else { return };
                    due = false;
                    if let Some(message) = self.next() {
                        permit.send(Ok(message));
                    }
                }
                changed = self.view.changed() => {
                    if changed.is_err() { return }
                    due = true;
                }
                changed = self.mesh.changed() => {
                    if changed.is_err() { return }
                    due = true;
                }
                changed = self.synced.changed(), if !ready => {
                    if changed.is_err() { return }
                }
                () = sender.closed() => return,
            }
        }
    }

    /// The configuration that holds now, if it is not what was sent last.
    fn next(&mut self) -> Option<ControlMessage> {
        let view = self.view.borrow_and_update().clone();
        let mesh = self.mesh.borrow_and_update().clone();
        let pod = view.pods.get(&self.hello.pod)?;
        let inbound = compile::inbound_config(pod, &view, &mesh);
        if self.sent.as_ref() == Some(&inbound) {
            return None;
        }
        self.version += 1;
        self.sent = Some(inbound.clone());
        self.metrics.pushes.inc();
        Some(ControlMessage { version: self.version, kind: Some(control_message::Kind::Inbound(inbound)) })
    }

    /// Notes a message of the proxy. `false`: the stream makes no sense any more.
    fn answered(&self, message: ProxyMessage) -> bool {
        let (pod, namespace) = (&self.hello.pod, &self.hello.namespace);
        match message.kind {
            Some(proxy_message::Kind::Ack(ack)) if ack.error.is_empty() => {
                self.metrics.acks.get_or_create(&Ended::OK).inc();
                debug!(%pod, %namespace, version = ack.version, "configuration in force");
                true
            }
            Some(proxy_message::Kind::Ack(ack)) => {
                self.metrics.acks.get_or_create(&Ended::ERROR).inc();
                warn!(%pod, %namespace, version = ack.version, error = %ack.error,
                    "a proxy refused its configuration and keeps the one before; do its version and ours differ much?");
                true
            }
            Some(proxy_message::Kind::Hello(_)) => {
                warn!(%pod, %namespace, "a proxy introduced itself twice on one stream; ending it");
                false
            }
            // A newer proxy may say what we don't know yet.
            Some(proxy_message::Kind::Watch(_) | proxy_message::Kind::Unwatch(_) | proxy_message::Kind::Report(_)) | None => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_and_the_hello_must_agree() {
        let hello = |namespace: &str, pod: &str| Hello { namespace: namespace.into(), pod: pod.into(), ..Hello::default() };
        let caller = Caller { namespace: Some("shop".into()), pod: Some("cart".into()) };
        assert!(agree(&caller, &hello("shop", "cart")).is_ok());
        assert!(agree(&caller, &hello("shop", "other")).unwrap_err().contains("pod cart"));
        assert!(agree(&caller, &hello("other", "cart")).unwrap_err().contains("namespace shop"));
        let anyone = Caller { namespace: None, pod: None };
        assert!(agree(&anyone, &hello("a", "b")).is_ok());
        assert!(agree(&anyone, &hello("", "b")).is_err());
    }

    #[test]
    fn bearer_tokens() {
        assert_eq!(bearer("Bearer abc"), Some("abc"));
        assert_eq!(bearer("bearer  abc "), Some("abc"));
        assert_eq!(bearer("Basic abc"), None);
        assert_eq!(bearer("Bearer "), None);
        assert_eq!(bearer("abc"), None);
    }
}
