//! Performs the app's own probes, as the kubelet would: any status from 200 to 399 is success, certificates are not verified, a
//! TCP probe is a connection and nothing more.

use super::app;
use crate::settings::Settings;
use anyhow::{Context as _, ensure};
use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt as _, Empty, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use weft_api::probe::{Grpc, HttpGet, Probe};

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

async fn http_get(settings: &Settings, get: &HttpGet, headers: &HeaderMap) -> anyhow::Result<StatusCode> {
    let stream = app::connect(settings, &get.host, get.port).await.context("connecting")?;
    let peer = stream.peer_addr()?;
    let path = if get.path.is_empty() { "/" } else { &get.path };
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    let mut request = Request::get(path);
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
    let response = if get.scheme.eq_ignore_ascii_case("https") {
        app::send(unverified(stream).await?, request).await?
    } else {
        app::send(stream, request).await?
    };
    Ok(response.status())
}

async fn grpc_health(settings: &Settings, grpc: &Grpc) -> anyhow::Result<StatusCode> {
    let stream = app::connect(settings, "", grpc.port).await.context("connecting")?;
    let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    // grpc.health.v1.HealthCheckRequest{service = 1}, in a frame.
    let mut message = BytesMut::new();
    if !grpc.service.is_empty() {
        message.put_u8(0x0a);
        message.put_u8(u8::try_from(grpc.service.len()).ok().filter(|n| *n < 128).context("the service's name is too long")?);
        message.put_slice(grpc.service.as_bytes());
    }
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len())?);
    frame.put_slice(&message);
    let request = Request::post(format!("http://localhost:{}/grpc.health.v1.Health/Check", grpc.port))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("user-agent", concat!("weft-proxy/", env!("CARGO_PKG_VERSION")))
        .body(Full::new(frame.freeze()))?;
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

    fn verify_tls12_signature(&self, _: &[u8], _: &CertificateDer<'_>, _: &DigitallySignedStruct) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(&self, _: &[u8], _: &CertificateDer<'_>, _: &DigitallySignedStruct) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
