//! Talking to the app inside the pod: for its probes and its metrics. Connections come from 127.0.0.6 (::6), which the
//! redirection lets pass; from any other address they would come back to the proxy.

use crate::settings::{Mode, Settings};
use crate::sys;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;
use tokio::net::TcpStream;
use weft_api::names;
use weft_api::probe::AppMetrics;

/// How long the app may take to hand its metrics over.
const SCRAPE: Duration = Duration::from_secs(5);
/// The most that is taken of them.
const SCRAPE_BYTES: usize = 64 * 1024 * 1024;

/// Connects to the app: at `host`, or at the pod's own address where that is empty.
pub async fn connect(settings: &Settings, host: &str, port: u16) -> io::Result<TcpStream> {
    let own = settings.identity.addresses.first().copied().unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    let target = match host.trim_matches(['[', ']']) {
        "" => SocketAddr::new(own, port),
        "localhost" => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port),
        host => match host.parse() {
            Ok(ip) => SocketAddr::new(ip, port),
            Err(_) => {
                let found = tokio::net::lookup_host((host, port)).await?.next();
                found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("{host} has no address")))?
            }
        },
    };
    let is_own = target.ip().is_loopback() || settings.identity.addresses.contains(&target.ip());
    let source: Option<IpAddr> = (settings.in_pod && is_own).then(|| match target {
        SocketAddr::V4(_) => names::PASSTHROUGH_V4.into(),
        SocketAddr::V6(_) => names::PASSTHROUGH_V6.into(),
    });
    sys::dialer(target, source, Mode::Redirect)?.connect(target).await
}

/// Sends a request without a body over a stream.
pub(super) async fn send<S>(stream: S, request: Request<Empty<Bytes>>) -> anyhow::Result<Response<Incoming>>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::Builder::new().handshake(TokioIo::new(stream)).await?;
    tokio::task::spawn_local(connection);
    Ok(sender.send_request(request).await?)
}

/// The app's own metrics, or a comment that says why there are none: the proxy's are never lost for them.
pub async fn scrape(settings: &Settings, metrics: &AppMetrics) -> String {
    let text = match tokio::time::timeout(SCRAPE, fetch(settings, metrics)).await {
        Ok(Ok(text)) => text,
        Ok(Err(error)) => return failed(&format!("{error:#}")),
        Err(_) => return failed("no answer in 5 s"),
    };
    // An end mark of OpenMetrics would end the whole.
    let mut out = String::with_capacity(text.len() + 1);
    for line in text.lines().filter(|l| *l != "# EOF") {
        out.push_str(line);
        out.push('\n');
    }
    out
}

fn failed(why: &str) -> String {
    crate::log::connection_error(&format_args!("the app's metrics can't be scraped: {why}"));
    format!("# the app's own metrics are missing: {}\n", why.replace('\n', " "))
}

async fn fetch(settings: &Settings, metrics: &AppMetrics) -> anyhow::Result<String> {
    let stream = connect(settings, "", metrics.port).await?;
    let request = Request::get(&metrics.path)
        .header("host", format!("localhost:{}", metrics.port))
        .header("accept", "text/plain;version=0.0.4;q=1,*/*;q=0.1")
        .body(Empty::new())?;
    let response = if metrics.scheme == "https" {
        send(super::probe::unverified(stream).await?, request).await?
    } else {
        send(stream, request).await?
    };
    anyhow::ensure!(response.status().is_success(), "the app answers {}", response.status());
    let body = Limited::new(response.into_body(), SCRAPE_BYTES).collect().await.map_err(|e| anyhow::anyhow!("{e}"))?;
    Ok(String::from_utf8_lossy(&body.to_bytes()).into_owned())
}
