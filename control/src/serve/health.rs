//! Health and metrics, plain HTTP: `/healthz/live`, `/healthz/ready`, `/metrics`.
//!
//! *Ready* means that a call would be answered: both TLS ports are tried with a real handshake that trusts our root and nothing else
//! (a certificate that does not fit would be found here and not by the API server), and every kind was listed
//! once. A replica that is about to end is not ready. Results are kept for a moment, so that probes cost nothing.
//!
//! *Live* means that the process answers; nothing outside of it may get it restarted.

use crate::ca::resolver::client_config;
use crate::index::Index;
use crate::metrics::Metrics;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::registry::Registry;
use rustls_pki_types::ServerName;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::sync::{Mutex, watch};
use tokio_rustls::TlsConnector;

/// How long the result of a self-check counts.
const FRESH: Duration = Duration::from_secs(1);
/// Time for one handshake with ourselves.
const PATIENCE: Duration = Duration::from_secs(1);

/// What readiness depends on.
pub struct Health {
    /// What is known.
    pub index: Arc<Index>,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// The TLS ports with their names.
    pub ports: Vec<(&'static str, SocketAddr)>,
    /// The trust bundle (PEM) and a name that the serving certificate must bear; empty until the certificate is there.
    pub trust: watch::Receiver<Option<Arc<Trust>>>,
    /// The end has begun.
    pub ending: watch::Receiver<bool>,
    last: Mutex<Option<(Instant, Vec<Check>)>>,
}

/// What a client must trust to call us.
#[derive(Debug)]
pub struct Trust {
    /// PEM.
    pub bundle: String,
    /// Name of the Service.
    pub name: String,
}

/// One condition of readiness.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// Its name.
    pub name: &'static str,
    /// Why it does not hold.
    pub problem: Option<String>,
}

impl Health {
    /// Health of these parts.
    pub fn new(
        index: Arc<Index>,
        metrics: Arc<Metrics>,
        ports: Vec<(&'static str, SocketAddr)>,
        trust: watch::Receiver<Option<Arc<Trust>>>,
        ending: watch::Receiver<bool>,
    ) -> Self {
        Self { index, metrics, ports, trust, ending, last: Mutex::new(None) }
    }

    /// All conditions of readiness.
    pub async fn checks(&self) -> Vec<Check> {
        let mut last = self.last.lock().await;
        let ending = *self.ending.borrow();
        if let Some((at, checks)) = &*last
            && at.elapsed() < FRESH
            && !ending
        {
            return checks.clone();
        }
        let mut checks = Vec::new();
        checks.push(Check { name: "not-ending", problem: ending.then(|| "shutting down".to_owned()) });
        let missing: Vec<_> = self.index.missing().iter().map(|kind| kind.plural()).collect();
        let problem = (!missing.is_empty()).then(|| format!("not listed yet: {}", missing.join(", ")));
        checks.push(Check { name: "source", problem });
        let trust = self.trust.borrow().clone();
        for (name, address) in &self.ports {
            let problem = match &trust {
                None => Some("no certificate yet".to_owned()),
                Some(trust) => handshake(*address, trust).await.err(),
            };
            checks.push(Check { name, problem });
        }
        self.metrics.ready.set(i64::from(checks.iter().all(|c| c.problem.is_none())));
        *last = Some((Instant::now(), checks.clone()));
        checks
    }
}

/// A TLS handshake with ourselves, by what a client would trust.
async fn handshake(address: SocketAddr, trust: &Trust) -> Result<(), String> {
    let config = client_config(&trust.bundle).map_err(|e| e.to_string())?;
    let name = ServerName::try_from(trust.name.clone()).map_err(|e| e.to_string())?;
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    let attempt = async {
        let stream = TcpStream::connect((ip, address.port())).await?;
        TlsConnector::from(Arc::new(config)).connect(name, stream).await
    };
    match tokio::time::timeout(PATIENCE, attempt).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(format!("port {} does not serve: {error}", address.port())),
        Err(_) => Err(format!("port {} does not answer", address.port())),
    }
}

#[derive(Clone)]
struct Shared {
    health: Arc<Health>,
    registry: Arc<Registry>,
}

/// The router of the metrics port.
pub fn router(health: Arc<Health>, registry: Arc<Registry>) -> Router {
    Router::new()
        .route("/healthz/live", get(|| async { "ok\n" }))
        .route("/healthz/ready", get(ready))
        .route("/metrics", get(metrics))
        .with_state(Shared { health, registry })
}

async fn ready(State(shared): State<Shared>) -> impl IntoResponse {
    let checks = shared.health.checks().await;
    let good = checks.iter().all(|c| c.problem.is_none());
    let lines: String = checks
        .iter()
        .map(|c| match &c.problem {
            None => format!("[+] {}\n", c.name),
            Some(problem) => format!("[-] {}: {problem}\n", c.name),
        })
        .collect();
    (if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, lines)
}

async fn metrics(State(shared): State<Shared>) -> impl IntoResponse {
    let Shared { health, registry } = shared;
    for kind in crate::model::Kind::ALL {
        let known = health.index.count(kind) as i64;
        health.metrics.objects.get_or_create(&crate::metrics::Resource::of(kind)).set(known);
    }
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &registry) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            (StatusCode::OK, [(header::CONTENT_TYPE, kind)], text)
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, "text/plain")], error.to_string()),
    }
}
