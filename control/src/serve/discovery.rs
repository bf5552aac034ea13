//! The proxies' API, `weft.v1.Discovery`.
//!
//! One task per stream: it waits for a change of its pod's namespace, of the root namespace's policies, of the settings or of
//! token issuers' keys (nothing else wakes it), compiles its pod's
//! configuration, and sends it if it differs from what was sent last. Before that, and whenever it changes, it sends whom to trust. A proxy that reads slowly is sent the latest state when it
//! has room, never a queue of old ones. What a proxy refuses is logged and counted; it keeps what it had.
//!
//! The destinations that a proxy asks for come from [`super::destinations`], which computes each once for all proxies. A proxy follows at
//! most [`FOLLOWED`] at a time; it drops those of which its app has not spoken for long. What it asks for beyond that, and what is no
//! address, is answered as unknown, so that its app is not left waiting.
//!
//! A pod that is not known (yet: the watch may lag behind a pod that has just started; any more: it is being deleted) is sent
//! nothing and keeps what it had. A stream that ends is opened again by the proxy, with back-off.

use super::auth::{AuthError, Authenticator};
use super::destinations::{Destinations, Follower};
use super::limits::{Exceeded, Limits, Place};
use super::tls::Peer;
use crate::compile::security::jwt::Keys;
use crate::compile::{self, Known, Mesh, security};
use crate::index::Index;
use crate::metrics::{Ended, Metrics, Refused};
use crate::model::policy::Policies;
use crate::reports::{Attached, Reports};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, info, warn};
use weft_api::wire::discovery_server::{Discovery, DiscoveryServer};
use weft_api::wire::{ControlMessage, Destination, Hello, Inbound, ProxyMessage, TrustBundle, control_message, proxy_message};

/// Time for the first message of a stream.
const HELLO: Duration = Duration::from_secs(10);
/// Largest message that is read: a proxy cuts its reports to a part of that, all else is far smaller.
const MESSAGE: usize = 256 * 1024;

/// Most addresses that one stream follows.
pub const FOLLOWED: usize = 4096;

/// The service.
pub struct Service {
    /// What is known.
    pub index: Arc<Index>,
    /// What the compiler takes from the settings; a change is a change of every proxy's configuration.
    pub mesh: watch::Receiver<Arc<Mesh>>,
    /// The keys of token issuers.
    pub keys: watch::Receiver<Arc<Keys>>,
    /// What stands behind addresses.
    pub destinations: Arc<Destinations>,
    /// How callers are checked.
    pub auth: Authenticator,
    /// What proxies are told to trust.
    pub trust: watch::Receiver<Option<Arc<TrustBundle>>>,
    /// What one source may take.
    pub limits: Arc<Limits>,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// What proxies report.
    pub reports: Arc<Reports>,
    /// The end: streams are ended so that proxies go elsewhere.
    pub end: CancellationToken,
}

impl Service {
    /// The service as a gRPC server.
    pub fn server(self) -> DiscoveryServer<Self> {
        DiscoveryServer::new(self).max_decoding_message_size(MESSAGE)
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
        let exhausted = |limit: Exceeded| self.refuse(limit.code(), Status::resource_exhausted(limit.to_string()));
        let address = peer.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |peer| peer.ip());
        let mut place = self.limits.stream(address).map_err(exhausted)?;
        let token = super::auth::bearer(request.metadata()).map(str::to_owned);
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
        caller
            .agrees(&hello.namespace, &hello.pod)
            .map_err(|message| self.refuse("not-its-pod", Status::permission_denied(message)))?;
        let known = self.index.view(&hello.namespace).and_then(|view| view.pods.get(&hello.pod).cloned());
        caller
            .is_that(known.as_deref())
            .map_err(|error| self.refuse(error.code(), Status::unauthenticated(error.to_string())))?;
        place.of_pod((hello.namespace.clone(), hello.pod.clone())).map_err(exhausted)?;
        info!(pod = %hello.pod, namespace = %hello.namespace, version = %hello.version, "proxy connected");
        let (sender, receiver) = mpsc::channel(1);
        let stream = Stream {
            view: self.index.subscribe(&hello.namespace),
            synced: self.index.synced(),
            mesh: self.mesh.clone(),
            trust: self.trust.clone(),
            _place: place,
            metrics: self.metrics.clone(),
            attached: self.reports.attach(&hello),
            end: self.end.clone(),
            hello,
            sender,
            version: 0,
            sent: None,
            trusted: None,
            destinations: Watched::new(self.destinations.follower()),
            index: self.index.clone(),
            policies: self.index.policies(),
            root: Arc::default(),
            keys: self.keys.clone(),
        };
        tokio::spawn(stream.run(messages));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

struct Stream {
    hello: Hello,
    view: watch::Receiver<Arc<crate::index::View>>,
    synced: watch::Receiver<bool>,
    mesh: watch::Receiver<Arc<Mesh>>,
    trust: watch::Receiver<Option<Arc<TrustBundle>>>,
    /// Given back with the stream.
    _place: Place,
    metrics: Arc<Metrics>,
    attached: Attached,
    end: CancellationToken,
    sender: mpsc::Sender<Result<ControlMessage, Status>>,
    version: u64,
    sent: Option<Inbound>,
    trusted: Option<Arc<TrustBundle>>,
    destinations: Watched,
    index: Arc<Index>,
    /// Ticks when a policy changes, in whatever namespace.
    policies: watch::Receiver<u64>,
    /// The policies of the root namespace that were looked at last.
    root: Arc<Policies>,
    keys: watch::Receiver<Arc<Keys>>,
}

/// The destinations of a stream.
struct Watched {
    follower: Follower,
    /// Addresses that are not followed yet, because the index does not know everything.
    asked: BTreeSet<SocketAddr>,
    /// How the proxy writes each address.
    texts: HashMap<SocketAddr, String>,
    /// Texts to be answered as unknown.
    unknown: VecDeque<String>,
    full: bool,
}

impl Watched {
    fn new(follower: Follower) -> Self {
        Self { follower, asked: BTreeSet::new(), texts: HashMap::new(), unknown: VecDeque::new(), full: false }
    }

    fn watch(&mut self, text: String, proxy: &Hello) {
        let Ok(address) = text.parse::<SocketAddr>() else {
            let shown: String = text.chars().take(100).collect();
            warn!(pod = %proxy.pod, namespace = %proxy.namespace, address = ?shown, "a proxy asks for what is no address; answering that it is unknown");
            self.unknown.push_back(text);
            return;
        };
        if !self.texts.contains_key(&address) && self.texts.len() >= FOLLOWED {
            if !std::mem::replace(&mut self.full, true) {
                warn!(pod = %proxy.pod, namespace = %proxy.namespace, limit = FOLLOWED,
                    "a proxy follows as many addresses as it may; answering that further ones are unknown until it drops some");
            }
            self.unknown.push_back(text);
            return;
        }
        self.texts.insert(address, text);
        self.asked.insert(address);
    }

    fn unwatch(&mut self, text: &str) {
        let Ok(address) = text.parse::<SocketAddr>() else { return };
        self.texts.remove(&address);
        self.asked.remove(&address);
        self.follower.leave(address);
        self.full &= self.texts.len() >= FOLLOWED;
    }

    /// Begins to follow what was asked for; the index knows everything now.
    fn follow(&mut self) {
        for address in std::mem::take(&mut self.asked) {
            self.follower.follow(address);
        }
    }

    fn next(&mut self) -> Option<Destination> {
        if let Some(address) = self.unknown.pop_front() {
            return Some(Destination { address, ..Destination::default() });
        }
        while let Some((address, destination)) = self.follower.mailbox().take() {
            if let Some(text) = self.texts.get(&address) {
                return Some(Destination { address: text.clone(), ..(*destination).clone() });
            }
        }
        None
    }

    fn is_due(&self) -> bool {
        !self.unknown.is_empty() || !self.follower.mailbox().is_empty()
    }
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
        let mailbox = self.destinations.follower.mailbox().clone();
        let mut due = true;
        loop {
            let synced = *self.synced.borrow();
            if synced {
                self.destinations.follow();
            }
            let ready = due || (synced && self.destinations.is_due());
            tokio::select! {
                biased;
                () = end.cancelled() => {
                    // The status only travels if there is room; otherwise the connection's end says the same.
                    let _ = sender.try_send(Err(Status::unavailable("this replica of the control plane shuts down")));
                    return;
                }
                permit = sender.reserve(), if ready => {
                    let Ok(permit) = permit else { return };
                    let next = if due { self.next() } else { None };
                    // Something may be left to say of the pod itself until it has nothing to say.
                    due = next.is_some();
                    let next = next.or_else(|| {
                        let destination = if synced { self.destinations.next() } else { None };
                        destination.map(|d| self.message(control_message::Kind::Destination(d)))
                    });
                    if let Some(message) = next {
                        permit.send(Ok(message));
                    }
                }
                message = messages.message(), if self.destinations.unknown.len() < FOLLOWED => match message {
                    Ok(Some(message)) => if !self.answered(message) { return },
                    Ok(None) | Err(_) => return,
                },
                changed = self.view.changed() => {
                    if changed.is_err() { return }
                    due = true;
                }
                changed = self.mesh.changed() => {
                    if changed.is_err() { return }
                    due = true;
                }
                changed = self.policies.changed() => {
                    if changed.is_err() { return }
                    let root = self.index.policies_of(self.mesh.borrow().root_namespace());
                    due |= !Arc::ptr_eq(&root, &self.root);
                }
                changed = self.keys.changed() => {
                    if changed.is_err() { return }
                    due = true;
                }
                changed = self.trust.changed() => {
                    if changed.is_err() { return }
                    due = true;
                }
                () = mailbox.arrived.notified() => {}
                changed = self.synced.changed(), if !synced => {
                    if changed.is_err() { return }
                    due = true;
                }
                () = sender.closed() => return,
            }
        }
    }

    /// What is to be said next of the pod itself: whom to trust before all else, then the configuration that holds now, each if it is not what was sent
    /// last.
    fn next(&mut self) -> Option<ControlMessage> {
        let trust = self.trust.borrow_and_update().clone();
        if let Some(bundle) = trust.filter(|bundle| self.trusted.as_ref() != Some(bundle)) {
            self.trusted = Some(bundle.clone());
            return Some(self.message(control_message::Kind::Trust(TrustBundle::clone(&bundle))));
        }
        if !*self.synced.borrow() {
            return None;
        }
        let view = self.view.borrow_and_update().clone();
        let mesh = self.mesh.borrow_and_update().clone();
        self.policies.mark_unchanged();
        self.root = self.index.policies_of(mesh.root_namespace());
        let keys = self.keys.borrow_and_update().clone();
        let known = Known { view: &view, root: &self.root, mesh: &mesh, keys: &keys };
        let pod = view.pods.get(&self.hello.pod)?;
        if security::jwt::awaits_keys(pod, &known) {
            // Tokens would be refused that are good: whoever restarts us must not break his users. The first try ends soon.
            return None;
        }
        let inbound = compile::inbound_config(pod, &known);
        if let Some(workload) = &inbound.workload {
            self.attached.workload(workload);
        }
        if self.sent.as_ref() == Some(&inbound) {
            return None;
        }
        self.sent = Some(inbound.clone());
        Some(self.message(control_message::Kind::Inbound(inbound)))
    }

    fn message(&mut self, kind: control_message::Kind) -> ControlMessage {
        self.version += 1;
        self.metrics.pushes.inc();
        ControlMessage { version: self.version, kind: Some(kind) }
    }

    /// Notes a message of the proxy. `false`: the stream makes no sense any more.
    fn answered(&mut self, message: ProxyMessage) -> bool {
        let (pod, namespace) = (&self.hello.pod, &self.hello.namespace);
        match message.kind {
            Some(proxy_message::Kind::Ack(ack)) if ack.error.is_empty() => {
                self.metrics.acks.get_or_create(&Ended::OK).inc();
                self.attached.answered("");
                debug!(%pod, %namespace, version = ack.version, "configuration in force");
                true
            }
            Some(proxy_message::Kind::Ack(ack)) => {
                self.metrics.acks.get_or_create(&Ended::ERROR).inc();
                self.attached.answered(&ack.error);
                warn!(%pod, %namespace, version = ack.version, error = %ack.error,
                    "a proxy refused its configuration and keeps the one before; do its version and ours differ much?");
                true
            }
            Some(proxy_message::Kind::Hello(_)) => {
                warn!(%pod, %namespace, "a proxy introduced itself twice on one stream; ending it");
                false
            }
            Some(proxy_message::Kind::Watch(watch)) => {
                self.destinations.watch(watch.address, &self.hello);
                true
            }
            Some(proxy_message::Kind::Unwatch(unwatch)) => {
                self.destinations.unwatch(&unwatch.address);
                true
            }
            Some(proxy_message::Kind::Report(report)) => {
                self.attached.report(report);
                true
            }
            // A newer proxy may say what we don't know yet.
            None => true,
        }
    }
}
