//! The way to the control plane: TLS, checked by the trust bundle that the pod was given, and the pod's token.

use crate::settings::Control;
use anyhow::Context as _;
use std::time::Duration;
use tonic::metadata::MetadataValue;
use tonic::service::Interceptor;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Request, Status};

/// Time for a connection.
const CONNECT: Duration = Duration::from_secs(5);

/// Adds the token to each call.
#[derive(Clone)]
pub struct Bearer(MetadataValue<tonic::metadata::Ascii>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", self.0.clone());
        Ok(request)
    }
}

/// Connects. Bundle and token are read anew each time: both are renewed while the process runs.
///
/// # Errors
/// A file can't be read, or the control plane can't be reached or has a certificate that the bundle does not vouch for.
pub async fn connect(control: &Control) -> anyhow::Result<(Channel, Bearer)> {
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
    Ok((channel, Bearer(bearer)))
}

/// Waits between attempts: doubled each time up to a limit, and never the same for two proxies.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(200);
    const LONGEST: Duration = Duration::from_secs(30);

    /// Short at first.
    pub fn new() -> Self {
        Self { next: Self::FIRST }
    }

    /// Short again: all is well.
    pub fn reset(&mut self) {
        self.next = Self::FIRST;
    }

    /// How long to wait now: between half and one and a half of what is due.
    pub fn wait(&mut self) -> Duration {
        let now = self.next.mul_f64(0.5 + rand::random::<f64>());
        self.next = (self.next * 2).min(Self::LONGEST);
        now
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new()
    }
}
