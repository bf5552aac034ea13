//! The client of the control plane: one gRPC stream by which the proxy says who it is and learns what its own pod's ports
//! speak.
//!
//! It runs beside the traffic, never in its way: without a control plane, at the start or for ever, the proxy
//! forwards by what it detects. What it has learnt it keeps. A message that it can't use is refused as a whole, with the reason,
//! and the last good configuration stays. Reconnecting backs off with jitter, so that a thousand proxies don't come at once.

use crate::inbound::Config;
use crate::settings::{Control, Settings};
use crate::telemetry::Metrics;
use anyhow::{Context as _, bail};
use arc_swap::ArcSwap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataValue;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};
use weft_api::wire::discovery_client::DiscoveryClient;
use weft_api::wire::{Ack, Hello, ProxyMessage, control_message, proxy_message};

const CONNECT: Duration = Duration::from_secs(5);
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// A stream that stood this long makes the next wait short again.
const STOOD: Duration = Duration::from_secs(60);

/// Keeps the configuration as the control plane says, for ever.
pub async fn run(control: Control, settings: Arc<Settings>, config: Arc<ArcSwap<Config>>, metrics: Arc<Metrics>) {
    let mut wait = FIRST_WAIT;
    let mut said: Option<String> = None;
    loop {
        let started = tokio::time::Instant::now();
        let ended = attach(&control, &settings, &config, &metrics, &mut said).await;
        metrics.control_connected.set(0);
        if let Err(error) = ended {
            let text = format!("{error:#}");
            // The same trouble is said once, not every few seconds for days.
            if said.as_deref() != Some(&text) {
                tracing::warn!("the control plane {} can't be reached, forwarding goes on: {text}", control.address);
                said = Some(text);
            }
        }
        if started.elapsed() > STOOD {
            wait = FIRST_WAIT;
        }
        tokio::time::sleep(wait.mul_f64(jitter())).await;
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}

/// Between 0.5 and 1.5, from the clock: good enough to spread proxies.
fn jitter() -> f64 {
    let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.subsec_nanos());
    0.5 + f64::from(nanos % 1_000_000) / 1_000_000.0
}

async fn attach(
    control: &Control,
    settings: &Settings,
    config: &ArcSwap<Config>,
    metrics: &Metrics,
    said: &mut Option<String>,
) -> anyhow::Result<()> {
    // Read anew each time: both are renewed while the process runs.
    let root = tokio::fs::read(&control.root).await.with_context(|| format!("trust bundle {}", control.root.display()))?;
    let token = tokio::fs::read_to_string(&control.token).await.with_context(|| format!("token {}", control.token.display()))?;
    let host = control.address.rsplit_once(':').map_or(control.address.as_str(), |(host, _)| host).trim_matches(['[', ']']);
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(root)).domain_name(host);
    let channel = Endpoint::from_shared(format!("https://{}", control.address))?
        .tls_config(tls)?
        .connect_timeout(CONNECT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(10))
        .keep_alive_while_idle(true)
        .connect()
        .await?;
    let mut bearer: MetadataValue<_> = format!("Bearer {}", token.trim()).parse().context("the token is not text")?;
    bearer.set_sensitive(true);
    let mut client = DiscoveryClient::with_interceptor(channel, move |mut request: tonic::Request<()>| {
        request.metadata_mut().insert("authorization", bearer.clone());
        Ok(request)
    });
    let (send, receive) = mpsc::channel(8);
    send.send(message(proxy_message::Kind::Hello(hello(settings)))).await?;
    let mut stream = client.attach(ReceiverStream::new(receive)).await?.into_inner();
    metrics.control_connected.set(1);
    tracing::info!("attached to the control plane {}", control.address);
    *said = None;
    while let Some(update) = stream.message().await? {
        let version = update.version;
        let error = match update.kind {
            Some(control_message::Kind::Inbound(inbound)) => match Config::from_wire(version, inbound) {
                Ok(new) => {
                    tracing::info!(version, ports = new.ports.len(), "configuration in force");
                    config.store(Arc::new(new));
                    metrics.config_version.set(i64::try_from(version).unwrap_or(i64::MAX));
                    metrics.relabel();
                    String::new()
                }
                Err(error) => {
                    tracing::error!(version, "a configuration is refused, the last good one stays in force: {error}");
                    error
                }
            },
            // Something newer than this build: nothing for us.
            Some(control_message::Kind::Trust(_) | control_message::Kind::Destination(_)) | None => String::new(),
        };
        send.send(message(proxy_message::Kind::Ack(Ack { version, error }))).await?;
    }
    bail!("it ended the stream")
}

fn message(kind: proxy_message::Kind) -> ProxyMessage {
    ProxyMessage { kind: Some(kind) }
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
