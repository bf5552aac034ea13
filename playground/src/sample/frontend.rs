//! The guide's `frontend`: calls `go-app` all the time and says every few seconds how that went.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use serde_json::Value;

use super::{serve, setting};

/// Between two summaries.
const SUMMARY: Duration = Duration::from_secs(5);
/// What one request may take.
const TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
struct Tally {
    /// By status, or `error`.
    results: BTreeMap<String, u64>,
    /// By the version that answered.
    versions: BTreeMap<String, u64>,
    times: Vec<Duration>,
    last_error: String,
}

impl Tally {
    /// One line about everything since the last one.
    fn summary(&mut self) -> String {
        self.times.sort_unstable();
        let at = |p: usize| {
            self.times.get((self.times.len() * p / 100).min(self.times.len().saturating_sub(1))).copied().unwrap_or_default()
        };
        let pairs = |map: &BTreeMap<String, u64>| map.iter().map(|(k, n)| format!("{k}={n}")).collect::<Vec<_>>().join(" ");
        let mut line = format!("requests: {}", if self.results.is_empty() { "none".to_owned() } else { pairs(&self.results) });
        if !self.versions.is_empty() {
            line.push_str(&format!(" | versions: {}", pairs(&self.versions)));
        }
        line.push_str(&format!(" | p50 {:.1} ms, p99 {:.1} ms", at(50).as_secs_f64() * 1e3, at(99).as_secs_f64() * 1e3));
        if !self.last_error.is_empty() {
            line.push_str(&format!(" | last error: {}", self.last_error));
        }
        *self = Self::default();
        line
    }
}

type Http = Client<HttpConnector, Empty<Bytes>>;

/// Requests on one connection.
const CONNECTION: u64 = 10;

async fn call(client: &Http, target: &http::Uri) -> anyhow::Result<(u16, String)> {
    let mut request = http::Request::new(Empty::new());
    *request.uri_mut() = target.clone();
    request.headers_mut().insert("user-agent", http::HeaderValue::from_static("frontend"));
    let response = client.request(request).await.map_err(|e| {
        let cause = std::error::Error::source(&e).map(|s| format!(": {s}")).unwrap_or_default();
        anyhow::anyhow!("{e}{cause}")
    })?;
    let status = response.status().as_u16();
    let body = response.into_body().collect().await?.to_bytes();
    let version = serde_json::from_slice::<Value>(&body).ok().and_then(|v| v["version"].as_str().map(str::to_owned));
    Ok((status, version.unwrap_or_default()))
}

/// Calls until SIGTERM.
pub(super) async fn run() -> anyhow::Result<()> {
    let target: http::Uri = setting("TARGET_URL", "http://go-app:8080/api/hello").parse().context("TARGET_URL")?;
    let rate: f64 = setting("RATE", "10").parse().context("RATE")?;
    ensure!(rate > 0.0 && rate <= 10_000.0, "RATE: {rate} is not a number of requests per second from above 0 to 10000");
    let port: u16 = setting("PORT", "8080").parse().context("PORT")?;
    let end = serve::ending()?;
    let tally = Arc::new(Mutex::new(Tally::default()));
    let total = Arc::new(Mutex::new(BTreeMap::<String, u64>::new()));
    println!("frontend calls {target} {rate} times a second");
    tokio::spawn(calls(target, rate, tally.clone(), total.clone()));
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(SUMMARY).await;
            println!("{}", tally.lock().unwrap_or_else(PoisonError::into_inner).summary());
        }
    });
    let handler = move |request: http::Request<hyper::body::Incoming>, _: SocketAddr| {
        let total = total.clone();
        async move {
            match request.uri().path() {
                "/metrics" => {
                    let mut text =
                        String::from("# HELP frontend_requests_total Requests sent.\n# TYPE frontend_requests_total counter\n");
                    for (result, count) in total.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                        text.push_str(&format!("frontend_requests_total{{result=\"{result}\"}} {count}\n"));
                    }
                    serve::plain(200, "text/plain; version=0.0.4", text)
                }
                "/healthz" | "/readyz" => serve::plain(200, "text/plain", "ok\n"),
                _ => serve::plain(404, "text/plain", "not found\n"),
            }
        }
    };
    serve::http(serve::listen(port)?, None, end, handler).await;
    println!("frontend ends");
    Ok(())
}

/// Sends at a fixed rate, whether or not the answers keep up, with a limit of what is under way.
async fn calls(target: http::Uri, rate: f64, tally: Arc<Mutex<Tally>>, total: Arc<Mutex<BTreeMap<String, u64>>>) {
    let fresh = || -> Http {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(10))
            .build(connector)
    };
    let mut client = fresh();
    let mut sent = 0_u64;
    let limit = Arc::new(tokio::sync::Semaphore::new(256));
    let mut ticks = tokio::time::interval(Duration::from_secs_f64(1.0 / rate));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Ok(permit) = limit.clone().acquire_owned().await else { return };
        // A Service is balanced by connection: one that stays open would meet one pod for ever.
        sent += 1;
        if sent.is_multiple_of(CONNECTION) {
            client = fresh();
        }
        let (client, target, tally, total) = (client.clone(), target.clone(), tally.clone(), total.clone());
        tokio::spawn(async move {
            let begin = Instant::now();
            let result = tokio::time::timeout(TIMEOUT, call(&client, &target)).await;
            let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
            tally.times.push(begin.elapsed());
            let key = match result {
                Ok(Ok((status, version))) => {
                    if !version.is_empty() {
                        *tally.versions.entry(version).or_default() += 1;
                    }
                    status.to_string()
                }
                Ok(Err(e)) => {
                    tally.last_error = e.to_string();
                    "error".to_owned()
                }
                Err(_) => {
                    tally.last_error = format!("no answer within {} s", TIMEOUT.as_secs());
                    "error".to_owned()
                }
            };
            *tally.results.entry(key.clone()).or_default() += 1;
            *total.lock().unwrap_or_else(PoisonError::into_inner).entry(key).or_default() += 1;
            drop(permit);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_counts_and_starts_again() {
        let mut tally = Tally::default();
        tally.results.insert("200".into(), 3);
        tally.versions.insert("v1".into(), 2);
        tally.times = (1..=100).map(Duration::from_millis).collect();
        assert_eq!(tally.summary(), "requests: 200=3 | versions: v1=2 | p50 51.0 ms, p99 100.0 ms");
        assert!(tally.summary().starts_with("requests: none"));
    }
}
