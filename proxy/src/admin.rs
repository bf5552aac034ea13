//! The admin server on port 15020: readiness, metrics, the app's rewritten probes, what the proxy runs with, and the way to end
//! it. It lives on the process's own thread, away from the workers.
//!
//! What changes something (`/quitquitquit`, `/drain`, `/logging`) takes only POST or PUT, and only from the pod itself.

pub mod app;
mod probe;
mod state;

use crate::directory::Directory;
use crate::inbound::Config;
use crate::run::Control;
use crate::settings::Settings;
use crate::telemetry::Metrics;
use crate::tls::identity::Holder;
use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;

/// Changes the log filter; an error says what is wrong with the new one.
pub type Relog = Box<dyn Fn(&str) -> Result<(), String>>;

/// What the admin server knows.
pub struct Admin {
    /// What the process was started with.
    pub settings: Arc<Settings>,
    /// What is known of the pod.
    pub config: Arc<ArcSwap<Config>>,
    /// The series.
    pub metrics: Arc<Metrics>,
    /// The process.
    pub control: Control,
    /// What is known of destinations.
    pub directory: Arc<Directory>,
    /// The certificate, if there is a control plane to give one.
    pub identity: Option<Arc<Holder>>,
    /// Changes the log filter; an error says what is wrong with it.
    pub relog: Relog,
}

type Reply = Response<Full<Bytes>>;

/// Serves one listening socket.
pub async fn serve(socket: TcpListener, admin: Rc<Admin>) {
    loop {
        let Ok((stream, peer)) = socket.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let _ = stream.set_nodelay(true);
        let admin = Rc::clone(&admin);
        tokio::task::spawn_local(async move {
            let service = service_fn(move |request| {
                let admin = Rc::clone(&admin);
                async move { Ok::<_, Infallible>(answer(&admin, request, peer).await) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(Duration::from_secs(10))
                .max_buf_size(16 * 1024)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                tracing::debug!(%peer, %error, "a connection to the admin port ended with an error");
            }
        });
    }
}

fn reply(code: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Reply {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = code;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

fn text(code: StatusCode, body: impl Into<String>) -> Reply {
    reply(code, "text/plain; charset=utf-8", body.into())
}

async fn answer(admin: &Admin, request: Request<Incoming>, peer: SocketAddr) -> Reply {
    let path = request.uri().path();
    match path {
        "/healthz/live" => text(StatusCode::OK, "live\n"),
        "/healthz/ready" => match admin.control.not_ready() {
            None => text(StatusCode::OK, "ready\n"),
            Some(why) => text(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")),
        },
        "/stats/prometheus" | "/metrics" => {
            let mut body = admin.metrics.text();
            if let Some(metrics) = &admin.settings.app_metrics {
                body.push_str(&app::scrape(&admin.settings, metrics).await);
            }
            reply(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", body)
        }
        "/config" => {
            let mut all = serde_json::json!({"settings": *admin.settings, "inbound": **admin.config.load()});
            all["certificate"] = state::certificate(admin.identity.as_deref());
            all["destinations"] = state::destinations(&admin.directory);
            reply(StatusCode::OK, "application/json", serde_json::to_vec_pretty(&all).unwrap_or_default())
        }
        "/quitquitquit" | "/drain" | "/logging" => match change(admin, &request, peer) {
            Ok(done) => text(StatusCode::OK, done),
            Err((code, why)) => text(code, why),
        },
        _ if path.starts_with("/app-health/") || path.starts_with("/app-lifecycle/") => match admin.settings.probes.get(path) {
            None => text(StatusCode::NOT_FOUND, format!("{path} is no probe of this pod\n")),
            Some(wanted) => match probe::perform(&admin.settings, wanted, request.headers()).await {
                Ok(code) => text(code, ""),
                Err(why) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{why}\n")),
            },
        },
        _ => text(StatusCode::NOT_FOUND, "nothing is here; see /healthz/ready, /stats/prometheus, /config\n"),
    }
}

fn change(admin: &Admin, request: &Request<Incoming>, peer: SocketAddr) -> Result<String, (StatusCode, String)> {
    let path = request.uri().path();
    if path == "/logging" && request.method() == Method::GET {
        return Ok(format!("{}\n", admin.control.log_filter()));
    }
    let method = request.method();
    if method != Method::POST && !(path == "/logging" && method == Method::PUT) {
        return Err((StatusCode::METHOD_NOT_ALLOWED, "POST is expected\n".into()));
    }
    if !is_own(peer, &admin.settings) {
        return Err((StatusCode::FORBIDDEN, "only from inside the pod\n".into()));
    }
    match path {
        "/quitquitquit" => {
            admin.control.quit();
            Ok("draining, then ending\n".into())
        }
        "/drain" => {
            admin.control.drain();
            Ok("draining\n".into())
        }
        _ => {
            let query = request.uri().query().unwrap_or_default();
            let level = query.split('&').find_map(|p| p.strip_prefix("level="));
            let level =
                level.ok_or_else(|| (StatusCode::BAD_REQUEST, "say ?level=FILTER, for example ?level=debug\n".to_owned()))?;
            let level = level.replace("%3D", "=").replace("%3d", "=").replace("%2C", ",").replace("%2c", ",").replace("%3A", ":");
            (admin.relog)(&level).map_err(|why| (StatusCode::BAD_REQUEST, format!("{level:?}: {why}\n")))?;
            admin.control.set_log_filter(&level);
            Ok(format!("{level}\n"))
        }
    }
}

fn is_own(peer: SocketAddr, settings: &Settings) -> bool {
    let ip = peer.ip().to_canonical();
    ip.is_loopback() || settings.identity.addresses.contains(&ip)
}
