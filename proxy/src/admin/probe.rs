//! Performs the app's own probes, as the kubelet would: any status from 200 to 399 is success, certificates are not verified, a
//! TCP probe is a connection and nothing more.

use super::app;
use crate::settings::Settings;
use anyhow::{Context as _, ensure};
use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use weft_api::probe::{Grpc, HttpGet, Probe};

/// Most redirects that a probe follows, as Go's client, which the kubelet uses.
const REDIRECTS: usize = 10;

/// Performs a probe within its own timeout. The status is the app's; a probe of another kind answers 200.
pub(super) async fn perform(settings: &Settings, probe: &Probe, headers: &HeaderMap) -> Result<StatusCode, String> {
    let work = async {
        if let Some(get) = &probe.http_get {
            http_get(settings, get, headers).await
        } else if let Some(tcp) = &probe.tcp_socket {
            app::connect(settings, &tcp.host, tcp.port).await.context("connecting")?;
            Ok(StatusCode::OK)
        } else if let Some(grpc) = &probe.grpc {
            grpc_health(settings, grpc).await
        } else {
            anyhow::bail!("the probe has no action")
        }
    };
    let limit = Duration::from_secs(probe.timeout_seconds.max(1).into());
    match tokio::time::timeout(limit, work).await {
        Ok(done) => done.map_err(|error| format!("{error:#}")),
        Err(_) => Err(format!("the app did not answer in {} s", limit.as_secs())),
    }
}

/// Redirects within the same host are followed, ten at most; one that leads elsewhere is an answer, and a good one: the
/// kubelet does not leave the pod for its probe either.
async fn http_get(settings: &Settings, get: &HttpGet, headers: &HeaderMap) -> anyhow::Result<StatusCode> {
    let path = match get.path.as_str() {
        path if path.starts_with('/') => path.to_owned(),
        path => format!("/{path}"),
    };
    let mut hop = Hop { https: get.scheme.eq_ignore_ascii_case("https"), port: get.port, path };
    for _ in 0..REDIRECTS {
        let response = ask(settings, get, &hop, headers).await?;
        let location = response.headers().get(http::header::LOCATION).and_then(|l| l.to_str().ok());
        match location.filter(|_| response.status().is_redirection()).and_then(|to| hop.follow(to, &get.host, settings)) {
            Some(next) => hop = next,
            None => return Ok(response.status()),
        }
    }
    anyhow::bail!("stopped after {REDIRECTS} redirects")
}

/// One request of a probe.
#[derive(Debug, PartialEq, Eq)]
struct Hop {
    https: bool,
    port: u16,
    path: String,
}

impl Hop {
    /// Where a `Location` leads, if that is the same host.
    fn follow(&self, location: &str, host: &str, settings: &Settings) -> Option<Self> {
        let location = location.split('#').next().unwrap_or_default();
        if location.starts_with('/') && !location.starts_with("//") {
            return Some(Self { path: location.into(), ..*self });
        }
        if !location.contains("//") {
            // Relative to the path's last segment (RFC 3986, section 5.2).
            let base = self.path.split('?').next().and_then(|p| p.rsplit_once('/')).map_or("", |(base, _)| base);
            return Some(Self { path: format!("{base}/{location}"), ..*self });
        }
        let scheme = if self.https { "https:" } else { "http:" };
        let whole = if location.starts_with("//") { format!("{scheme}{location}") } else { location.into() };
        let uri: http::Uri = whole.parse().ok()?;
        let path = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
        let authority = uri.authority()?;
        let there = authority.host().trim_matches(['[', ']']);
        let own = if host.is_empty() { settings.app_address().to_string() } else { host.to_owned() };
        let https = uri.scheme_str() == Some("https");
        let port = authority.port_u16().unwrap_or(if https { 443 } else { 80 });
        there.eq_ignore_ascii_case(&own).then(|| Self { https, port, path: path.into() })
    }
}

async fn ask(settings: &Settings, get: &HttpGet, hop: &Hop, headers: &HeaderMap) -> anyhow::Result<Response<Incoming>> {
    let stream = app::connect(settings, &get.host, hop.port).await.context("connecting")?;
    let peer = stream.peer_addr()?;
    let mut request = Request::get(&hop.path);
    let named = |name: &str| get.http_headers.iter().any(|h| h.name.eq_ignore_ascii_case(name));
    if !named("host") {
        request = request.header("host", peer.to_string());
    }
    if !named("user-agent")
        && let Some(agent) = headers.get("user-agent")
    {
        request = request.header("user-agent", agent);
    }
    if !named("accept") {
        request = request.header("accept", "*/*");
    }
    request = request.header("connection", "close");
    for header in &get.http_headers {
        request = request.header(&header.name, &header.value);
    }
    let request = request.body(Empty::<Bytes>::new())?;
    if hop.https { app::send(unverified(stream).await?, request).await } else { app::send(stream, request).await }
}

async fn grpc_health(settings: &Settings, grpc: &Grpc) -> anyhow::Result<StatusCode> {
    let stream = app::connect(settings, "", grpc.port).await.context("connecting")?;
    let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let frame = check_request(&grpc.service)?;
    let request = Request::post(format!("http://localhost:{}/grpc.health.v1.Health/Check", grpc.port))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("user-agent", concat!("weft-proxy/", env!("CARGO_PKG_VERSION")))
        .body(Full::new(frame))?;
    let response = sender.send_request(request).await?;
    let early = response.headers().get("grpc-status").cloned();
    let body = response.into_body().collect().await?;
    let status = early.or_else(|| body.trailers().and_then(|t| t.get("grpc-status")).cloned());
    let bytes = body.to_bytes();
    driver.abort();
    let status = status.and_then(|s| s.to_str().ok().map(str::to_owned)).unwrap_or_default();
    ensure!(status == "0", "the health check ended with grpc-status {status:?}");
    // HealthCheckResponse{status = 1}: SERVING is 1.
    ensure!(bytes.get(5..7) == Some(&[0x08, 0x01]), "the app is not serving");
    Ok(StatusCode::OK)
}

/// grpc.health.v1.HealthCheckRequest{service = 1}, in a frame.
fn check_request(service: &str) -> anyhow::Result<Bytes> {
    let mut message = BytesMut::new();
    if !service.is_empty() {
        message.put_u8(0x0a);
        // The length as a varint: seven bits at a time, the lowest first.
        let mut rest = service.len();
        while rest >= 0x80 {
            message.put_u8((rest & 0x7f) as u8 | 0x80);
            rest >>= 7;
        }
        message.put_u8(rest as u8);
        message.put_slice(service.as_bytes());
    }
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len())?);
    frame.put_slice(&message);
    Ok(frame.freeze())
}

/// TLS to the app, whose certificate nobody verifies, as the kubelet doesn't.
pub(super) async fn unverified(stream: TcpStream) -> anyhow::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone(provider)))
        .with_no_client_auth();
    let name = ServerName::from(stream.peer_addr()?.ip());
    Ok(tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await?)
}

#[derive(Debug)]
struct Anyone(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_health_check_s_request_names_services_of_any_length() {
        assert_eq!(&check_request("").unwrap()[..], [0; 5]);
        assert_eq!(&check_request("ab").unwrap()[..], [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
        for (length, varint) in [(127, &[127][..]), (128, &[0x80, 1]), (300, &[0xac, 2]), (20_000, &[0xa0, 0x9c, 1])] {
            let frame = check_request(&"s".repeat(length)).unwrap();
            let size = u32::from_be_bytes(frame[1..5].try_into().unwrap()) as usize;
            assert_eq!((size, frame[5]), (frame.len() - 5, 0x0a));
            assert_eq!(&frame[6..6 + varint.len()], varint, "{length}");
            assert_eq!(frame.len(), 6 + varint.len() + length);
        }
    }

    #[test]
    fn redirects_stay_on_the_host() {
        let settings = Settings::default();
        let hop = Hop { https: false, port: 8080, path: "/a/b?x=1".into() };
        let to = |https, port, path: &str| Some(Hop { https, port, path: path.into() });
        for (location, next) in [
            ("/c?d=e#f", to(false, 8080, "/c?d=e")),
            ("c", to(false, 8080, "/a/c")),
            ("http://127.0.0.1:8081/x", to(false, 8081, "/x")),
            ("https://127.0.0.1/", to(true, 443, "/")),
            ("//127.0.0.1:8082", to(false, 8082, "/")),
            ("http://example.org/", None),
        ] {
            assert_eq!(hop.follow(location, "", &settings), next, "{location}");
        }
    }
}
