//! The guide's `go-app`: says its version and its pod under any path, is healthy, counts.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use http::Response;
use serde_json::json;

use super::serve::{self, Body};
use super::{hostname, setting};

/// Serves until SIGTERM.
pub(super) async fn run() -> anyhow::Result<()> {
    let port: u16 = setting("PORT", "8080").parse()?;
    let (version, pod) = (setting("VERSION", "v1"), hostname());
    let served = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
    let end = serve::ending()?;
    let listener = serve::listen(port)?;
    println!("go-app {version} serves port {port}");
    let handler = move |request: http::Request<hyper::body::Incoming>, _: SocketAddr| {
        let (version, pod, served) = (version.clone(), pod.clone(), served.clone());
        async move {
            let path = request.uri().path().to_owned();
            match path.as_str() {
                "/healthz" | "/readyz" => serve::plain(200, "text/plain", "ok\n"),
                "/metrics" => metrics(&version, &served),
                _ => {
                    let status = serve::misbehave(request.uri()).await;
                    served[usize::from(status >= 500)].fetch_add(1, Ordering::Relaxed);
                    let body = json!({"app": "go-app", "version": version, "pod": pod, "method": request.method().as_str(), "path": path});
                    serve::plain(status, "application/json", format!("{body}\n"))
                }
            }
        }
    };
    serve::http(listener, None, end, handler).await;
    println!("go-app ends");
    Ok(())
}

fn metrics(version: &str, served: &[AtomicU64; 2]) -> Response<Body> {
    let mut text = String::from("# HELP go_app_requests_total Requests answered.\n# TYPE go_app_requests_total counter\n");
    for (result, count) in ["ok", "error"].iter().zip(served) {
        let count = count.load(Ordering::Relaxed);
        text.push_str(&format!("go_app_requests_total{{version=\"{version}\",result=\"{result}\"}} {count}\n"));
    }
    serve::plain(200, "text/plain; version=0.0.4", text)
}
