//! The client of the control plane: one gRPC stream by which the proxy says who it is and learns what its own pod's ports
//! speak, what stands behind the addresses that its app connects to, and whose certificates to believe.
//!
//! It runs beside the traffic, never in its way: without a control plane, at the start or for ever, the proxy
//! forwards by what it detects. What it has learnt it keeps. A message that it can't use is refused as a whole, with the reason,
//! and the last good configuration stays. Reconnecting backs off with jitter, so that a thousand proxies don't come at once.

use crate::control::{self, Backoff};
use crate::directory::{Destination, Directory, Wish};
use crate::drain::Drain;
use crate::inbound::Config;
use crate::report::{self, Batch, Outbox};
use crate::settings::{Control, Settings};
use crate::telemetry::Metrics;
use anyhow::bail;
use arc_swap::ArcSwap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use weft_api::wire::discovery_client::DiscoveryClient;
use weft_api::wire::{Ack, ControlMessage, Hello, ProxyMessage, TrustBundle, Unwatch, Watch, control_message, proxy_message};

/// A stream that stood this long makes the next wait short again.
const STOOD: Duration = Duration::from_secs(60);
/// How often destinations that nobody uses are looked for.
const SWEEP: Duration = Duration::from_secs(60);
/// Messages that wait to be sent.
const QUEUE: usize = 64;

/// What the client of the control plane keeps up to date.
pub struct Client {
    /// Where the control plane is.
    pub control: Control,
    /// Who we are.
    pub settings: Arc<Settings>,
    /// The pod's own configuration.
    pub config: Arc<ArcSwap<Config>>,
    /// Destinations.
    pub directory: Arc<Directory>,
    /// What is asked about them.
    pub wishes: mpsc::UnboundedReceiver<Wish>,
    /// The trust bundle.
    pub trust: watch::Sender<Option<TrustBundle>>,
    /// What workers have gathered.
    pub reported: mpsc::Receiver<Batch>,
    /// What of it waits to be told.
    pub outbox: Outbox,
    /// Connections are told of a new configuration.
    pub drain: Drain,
    /// Counts.
    pub metrics: Arc<Metrics>,
}

impl Client {
    /// Keeps everything as the control plane says, for ever.
    pub async fn run(mut self) {
        let mut backoff = Backoff::new();
        let mut said: Option<String> = None;
        loop {
            let started = tokio::time::Instant::now();
            let ended = self.attach(&mut said).await;
            self.metrics.control_connected.set(0);
            self.directory.connected(false);
            if let Err(error) = ended {
                let text = format!("{error:#}");
                // The same trouble is said once, not every few seconds for days.
                if said.as_deref() != Some(&text) {
                    tracing::warn!("the control plane {} can't be reached, forwarding goes on: {text}", self.control.address);
                    said = Some(text);
                }
            }
            if started.elapsed() > STOOD {
                backoff.reset();
            }
            self.pause(backoff.wait()).await;
        }
    }

    /// Waits, taking what workers have gathered, so that they need not keep it.
    async fn pause(&mut self, wait: Duration) {
        let mut over = std::pin::pin!(tokio::time::sleep(wait));
        loop {
            tokio::select! {
                () = &mut over => return,
                Some(batch) = self.reported.recv() => self.outbox.add(batch),
            }
        }
    }

    async fn attach(&mut self, said: &mut Option<String>) -> anyhow::Result<()> {
        let (channel, bearer) = control::connect(&self.control).await?;
        let mut client = DiscoveryClient::with_interceptor(channel, bearer);
        let (send, receive) = mpsc::channel(QUEUE);
        send.send(message(proxy_message::Kind::Hello(hello(&self.settings)))).await?;
        let mut stream = client.attach(ReceiverStream::new(receive)).await.map_err(|status| told(&status))?.into_inner();
        self.metrics.control_connected.set(1);
        tracing::info!("attached to the control plane {}", self.control.address);
        *said = None;
        // Wishes of before are in the list of all.
        while self.wishes.try_recv().is_ok() {}
        let mut again = self.directory.connected(true);
        let mut sweep = tokio::time::interval(SWEEP);
        let mut tell = tokio::time::interval(report::GATHER);
        tell.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        self.outbox.attached();
        loop {
            tokio::select! {
                update = stream.message() => {
                    let update = update.map_err(|status| told(&status))?;
                    let Some(update) = update else { bail!("it ended the stream") };
                    let version = update.version;
                    let error = self.take(update);
                    send.send(message(proxy_message::Kind::Ack(Ack { version, error }))).await?;
                }
                // What was known before the connection, as fast as the other side takes it.
                permit = send.reserve(), if !again.is_empty() => {
                    if let Some(address) = again.pop() {
                        permit?.send(watch_message(address));
                    }
                }
                Some(wish) = self.wishes.recv() => {
                    let wish = match wish {
                        Wish::Watch(address) => watch_message(address),
                        Wish::Unwatch(address) => {
                            again.retain(|other| *other != address);
                            message(proxy_message::Kind::Unwatch(Unwatch { address: address.to_string() }))
                        }
                    };
                    send.send(wish).await?;
                }
                _ = sweep.tick() => self.directory.sweep(),
                Some(batch) = self.reported.recv() => self.outbox.add(batch),
                _ = tell.tick() => {
                    for report in self.outbox.take() {
                        send.send(message(proxy_message::Kind::Report(report))).await?;
                    }
                }
            }
        }
    }

    /// Puts a message in force. The answer is empty, or says why it was refused.
    fn take(&self, update: ControlMessage) -> String {
        let version = update.version;
        let refused = |error: String| {
            tracing::error!(version, "a message of the control plane is refused, the last good state stays in force: {error}");
            error
        };
        match update.kind {
            Some(control_message::Kind::Inbound(inbound)) => match self.config.load().succeed(version, inbound) {
                Ok(new) => {
                    let policies = new.policy.engine.policies().len();
                    tracing::info!(version, ports = new.ports.len(), mtls = ?new.mtls, policies, "configuration in force");
                    self.config.store(Arc::new(new));
                    self.metrics.config_version.set(i64::try_from(version).unwrap_or(i64::MAX));
                    self.metrics.relabel();
                    self.drain.changed();
                    String::new()
                }
                Err(error) => refused(error),
            },
            Some(control_message::Kind::Trust(trust)) => {
                if trust.roots.is_empty() {
                    return refused("a trust bundle without a root would cut the pod off from all others".into());
                }
                self.trust.send_replace(Some(trust));
                String::new()
            }
            Some(control_message::Kind::Destination(destination)) => match Destination::from_wire(destination) {
                Ok((address, destination)) => {
                    let (endpoints, service) =
                        (destination.endpoints.len(), destination.service.as_ref().map(|s| s.host.clone()));
                    if self.directory.put(address, destination) {
                        tracing::debug!(%address, endpoints, ?service, "destination");
                    }
                    String::new()
                }
                Err(error) => refused(error),
            },
            // Something newer than this build: nothing for us.
            None => String::new(),
        }
    }
}

/// What a status says, without the machinery around it.
fn told(status: &tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{} ({:?})", status.message(), status.code())
}

fn message(kind: proxy_message::Kind) -> ProxyMessage {
    ProxyMessage { kind: Some(kind) }
}

fn watch_message(address: std::net::SocketAddr) -> ProxyMessage {
    message(proxy_message::Kind::Watch(Watch { address: address.to_string() }))
}

fn hello(settings: &Settings) -> Hello {
    let identity = &settings.identity;
    Hello {
        pod: identity.pod.clone(),
        namespace: identity.namespace.clone(),
        addresses: identity.addresses.iter().map(ToString::to_string).collect(),
        node: identity.node.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
    }
}
