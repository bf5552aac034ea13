//! The caller of the guide: asks one URL at a steady rate and says every five seconds how that went.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::{server, told_to_stop, variable};

type Counts = Arc<Mutex<BTreeMap<String, u64>>>;

async fn call(client: Client<hyper_util::client::legacy::connect::HttpConnector, Full<Bytes>>, uri: http::Uri, counts: Counts) {
    let work = async {
        let response = client.get(uri).await.map_err(|e| if e.is_connect() { "cannot connect" } else { "no answer" })?;
        let status = response.status().as_u16().to_string();
        response.into_body().collect().await.map_err(|_| "answer broke off")?;
        Ok::<_, &str>(status)
    };
    let result = match timeout(Duration::from_secs(5), work).await {
        Ok(Ok(status)) => status,
        Ok(Err(why)) => why.to_owned(),
        Err(_) => "timeout".to_owned(),
    };
    *counts.lock().unwrap_or_else(PoisonError::into_inner).entry(result).or_default() += 1;
}

pub(super) async fn run() -> anyhow::Result<()> {
    let target = variable("TARGET_URL", "http://go-app:8080/");
    let uri: http::Uri = target.parse().with_context(|| format!("TARGET_URL {target}"))?;
    let rate: f64 = variable("RATE", "10").parse().context("RATE: requests per second")?;
    anyhow::ensure!(rate > 0.0 && rate.is_finite(), "RATE: must be positive");
    let port = variable("PORT", "8080").parse().context("PORT")?;
    let client = Client::builder(TokioExecutor::new()).build_http();
    let counts = Counts::default();
    let calls = async {
        let mut ticks = interval(Duration::from_secs_f64(1.0 / rate));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut told = Instant::now();
        loop {
            ticks.tick().await;
            tokio::spawn(call(client.clone(), uri.clone(), counts.clone()));
            if told.elapsed() >= Duration::from_secs(5) {
                told = Instant::now();
                let all = std::mem::take(&mut *counts.lock().unwrap_or_else(PoisonError::into_inner));
                let parts: Vec<String> = all.iter().map(|(result, n)| format!("{result}: {n}")).collect();
                println!("GET {target} in 5 s: {}", parts.join(", "));
            }
        }
    };
    tokio::select! {
        () = calls => Ok(()),
        result = server::health(port) => result,
        () = told_to_stop() => Ok(()),
    }
}
