//! Sends a call to a proxy, byte for byte, and reads off what became of it.

use crate::case::{Answer, Call, IDENTITIES};
use crate::identity::Authority;
use anyhow::{Context, Result, bail};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme, StreamOwned};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(10);
/// What a raw TCP app sends back. Longer than a TLS record header, for which Envoy waits before it tells plaintext.
pub(crate) const PING: &[u8] = b"a line for an echo\n";

/// The clients, one for each identity.
#[derive(Debug)]
pub(crate) struct Clients(Vec<Arc<ClientConfig>>);

impl Clients {
    /// With certificates of `authority`; they offer `alpn`.
    pub(crate) fn new(authority: &Authority, alpn: &[u8]) -> Result<Self> {
        let each = IDENTITIES.iter().map(|id| {
            let leaf = authority.leaf(id)?;
            let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            let builder =
                ClientConfig::builder_with_provider(Arc::clone(&provider)).with_protocol_versions(&[&rustls::version::TLS13])?;
            let builder =
                builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyServer(authority.verifier(provider)?)));
            let mut config = builder.with_client_auth_cert(leaf.chain, leaf.key)?;
            config.alpn_protocols = vec![alpn.to_vec()];
            config.resumption = Resumption::disabled();
            Ok(Arc::new(config))
        });
        Ok(Self(each.collect::<Result<_>>()?))
    }

    /// Makes `call` at `to`, which speaks HTTP or echoes raw bytes.
    pub(crate) fn call(&self, call: &Call, to: SocketAddr, http: bool) -> Result<Answer> {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        socket.bind(&SocketAddr::from((call.source, 0)).into())?;
        socket.connect_timeout(&to.into(), PATIENCE).with_context(|| format!("can't connect to {to}"))?;
        let tcp = TcpStream::from(socket);
        tcp.set_read_timeout(Some(PATIENCE))?;
        tcp.set_nodelay(true)?;
        let bytes = if http { call.bytes() } else { PING.to_vec() };
        let reply = match call.identity {
            None => exchange(tcp, &bytes, http),
            Some(n) => {
                let name = match call.sni {
                    Some(name) => ServerName::try_from(name)?,
                    // An address is not sent as a server name.
                    None => ServerName::IpAddress(IpAddr::from([127, 0, 0, 1]).into()),
                };
                let connection = ClientConnection::new(Arc::clone(&self.0[n]), name)?;
                exchange(StreamOwned::new(connection, tcp), &bytes, http)
            }
        }?;
        if http { read_http(&reply) } else { Ok(if reply == PING { Answer::Allowed(None) } else { Answer::Denied }) }
    }
}

/// Sends, and reads to the end of a response's head, or all that an echo has to say. A connection that is closed under our hands is an end as well: proxies refuse so.
fn exchange(mut stream: impl Read + Write, bytes: &[u8], http: bool) -> Result<Vec<u8>> {
    let mut reply = Vec::new();
    let mut sent = stream.write_all(bytes).and_then(|()| stream.flush());
    if sent.is_ok() {
        let mut buf = [0; 4096];
        loop {
            match stream.read(&mut buf) {
                Ok(0) => break,
                Ok(n) => reply.extend_from_slice(&buf[..n]),
                Err(error) => {
                    sent = Err(error);
                    break;
                }
            }
            // Some proxies keep a connection open for a moment after its last response.
            if if http { reply.windows(4).any(|w| w == b"\r\n\r\n") } else { reply.len() >= PING.len() } {
                break;
            }
        }
    }
    match sent {
        Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
            bail!("no answer within {PATIENCE:?}, after {:?}", reply.escape_ascii().to_string())
        }
        _ => Ok(reply),
    }
}

fn read_http(reply: &[u8]) -> Result<Answer> {
    let head = reply.windows(4).position(|w| w == b"\r\n\r\n").map(|end| &reply[..end + 2]);
    let head = head.with_context(|| format!("no response: {:?}", reply.escape_ascii().to_string()))?;
    let status = head.get(9..12).and_then(|s| std::str::from_utf8(s).ok()).and_then(|s| s.parse::<u16>().ok());
    let header = |name: &[u8]| {
        head.split(|b| *b == b'\n').find_map(|line| {
            let (key, value) = line.split_at_checked(name.len() + 1)?;
            (key[..name.len()].eq_ignore_ascii_case(name) && key[name.len()] == b':').then(|| value.trim_ascii().to_vec())
        })
    };
    match status.context("no status")? {
        200 => Ok(Answer::Allowed(header(b"x-seen-path"))),
        403 => Ok(Answer::Denied),
        status @ (400 | 404 | 405 | 421 | 426 | 431 | 501 | 505) => Ok(Answer::Malformed(status)),
        status => bail!("status {status}: {:?}", reply.escape_ascii().to_string()),
    }
}

/// Whoever answers is the proxy that this program has started.
#[derive(Debug)]
struct AnyServer(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for AnyServer {
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
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_read() {
        let seen = b"HTTP/1.1 200 OK\r\nx-a: b\r\nX-Seen-Path: /a b\r\n\r\nbody";
        assert_eq!(read_http(seen).unwrap(), Answer::Allowed(Some(b"/a b".to_vec())));
        assert_eq!(read_http(b"HTTP/1.1 403 Forbidden\r\n\r\n").unwrap(), Answer::Denied);
        assert_eq!(read_http(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap(), Answer::Malformed(400));
        assert!(read_http(b"HTTP/1.1 503 No\r\n\r\n").is_err());
        assert!(read_http(b"").is_err());
    }
}
