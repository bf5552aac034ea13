//! One fetch: HTTP/1.1, over TLS or not, bounded in time, size and redirects, and kept away from addresses that are none of an issuer's.
//!
//! The address is checked after its name was resolved, and it is the checked address that is connected to: a name that means something
//! else a moment later, or behind a redirect, gains nothing. Forbidden are loopback (this very pod), link-local and the
//! metadata services of clouds; private addresses are not, since an issuer may well run in the cluster.

use crate::compile::security::jwt::{check_jwks, check_url};
use crate::model::policy::KeySource;
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty, LengthLimitError, Limited};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Most bytes of an answer.
pub const LARGEST: usize = 1024 * 1024;
/// Most redirects that are followed.
pub const REDIRECTS: usize = 3;

/// Fetches keys.
pub struct Fetcher {
    /// None if TLS can't be had at all: HTTPS then fails.
    tls: Option<TlsConnector>,
    /// How many roots there are; without any, HTTPS can only fail.
    roots: usize,
    local: bool,
}

impl Fetcher {
    /// Trusts the system's roots and `certificates` (PEM; what can't be read of them is left out). `local`: loopback is allowed.
    pub fn new(certificates: &str, local: bool) -> Self {
        let mut store = RootCertStore::empty();
        store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        store.add_parsable_certificates(CertificateDer::pem_slice_iter(certificates.as_bytes()).filter_map(Result::ok));
        let roots = store.len();
        let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .map(|builder| builder.with_root_certificates(store).with_no_client_auth());
        let tls = config.ok().map(|mut config| {
            config.alpn_protocols = vec![b"http/1.1".to_vec()];
            TlsConnector::from(Arc::new(config))
        });
        Self { tls, roots, local }
    }

    /// The key set of a source, checked to be one.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub async fn keys(&self, source: &KeySource, timeout: Duration) -> Result<String, String> {
        let fetch = async {
            let uri = match source {
                KeySource::Uri(uri) => check_url(uri)?,
                KeySource::Issuer(issuer) => {
                    let at = format!("{}/.well-known/openid-configuration", issuer.trim_end_matches('/'));
                    let text = self.get(check_url(&at)?).await.map_err(|e| format!("{at}: {e}"))?;
                    let document: serde_json::Value =
                        serde_json::from_str(&text).map_err(|_| format!("{at}: the answer is no JSON"))?;
                    let uri = document["jwks_uri"].as_str().ok_or_else(|| format!("{at}: the answer has no jwks_uri"))?;
                    check_url(uri).map_err(|e| format!("{at}: jwks_uri: {e}"))?
                }
            };
            let text = self.get(uri.clone()).await.map_err(|e| format!("{uri}: {e}"))?;
            check_jwks(&text).map_err(|e| format!("{uri}: the answer is {e}"))?;
            Ok(text)
        };
        tokio::time::timeout(timeout, fetch).await.unwrap_or_else(|_| Err(format!("no answer in {timeout:?}")))
    }

    async fn get(&self, mut uri: Uri) -> Result<String, String> {
        for _ in 0..=REDIRECTS {
            match self.ask(&uri).await? {
                Answer::Text(text) => return Ok(text),
                Answer::Elsewhere(location) => {
                    let next = join(&uri, &location).ok_or_else(|| format!("a redirect to {location:?}, which is no URL"))?;
                    check_url(&next.to_string())?;
                    if uri.scheme_str() == Some("https") && next.scheme_str() != Some("https") {
                        return Err(format!("a redirect from https to {next}, which anybody on the way could change"));
                    }
                    uri = next;
                }
            }
        }
        Err(format!("more than {REDIRECTS} redirects"))
    }

    async fn ask(&self, uri: &Uri) -> Result<Answer, String> {
        let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
        let secure = uri.scheme_str() == Some("https");
        let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
        let stream = self.connect(host, port).await?;
        if !secure {
            return exchange(stream, uri).await;
        }
        let name = ServerName::try_from(host.to_owned()).map_err(|_| format!("{host:?} is no name of a server"))?;
        let tls = self.tls.as_ref().ok_or("TLS is not available")?;
        let stream = tls.connect(name, stream).await.map_err(|error| {
            let hint = if self.roots == 0 {
                "; no root certificates are known, see mesh.jwksCaCertificates in the settings"
            } else {
                ""
            };
            format!("TLS with {host} failed: {error}{hint}")
        })?;
        exchange(stream, uri).await
    }

    /// Connects to an address of the host that is allowed.
    async fn connect(&self, host: &str, port: u16) -> Result<TcpStream, String> {
        let found = tokio::net::lookup_host((host, port)).await.map_err(|e| format!("cannot resolve {host}: {e}"))?;
        let all: Vec<SocketAddr> = found.collect();
        let mut problem = format!("{host} has no address");
        for address in all {
            if let Some(why) = self.forbidden(address.ip()) {
                problem = format!("{host} is {}, {why}, which is not called", address.ip());
                continue;
            }
            match TcpStream::connect(address).await {
                Ok(stream) => return Ok(stream),
                Err(error) => problem = format!("cannot connect to {host} at {address}: {error}"),
            }
        }
        Err(problem)
    }

    fn forbidden(&self, ip: IpAddr) -> Option<&'static str> {
        match forbidden(ip) {
            Some(LOOPBACK) if self.local => None,
            other => other,
        }
    }
}

enum Answer {
    Text(String),
    Elsewhere(String),
}

async fn exchange<S>(stream: S, uri: &Uri) -> Result<Answer, String>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let broken = |error: hyper::Error| format!("the exchange failed: {error}");
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    // Ends with the exchange, or with whoever waits for it.
    let connection = AbortOnDrop(tokio::spawn(connection));
    let path = uri.path_and_query().map_or("/", |p| p.as_str());
    let host = uri.authority().map_or("", |a| a.as_str());
    let request = Request::get(path)
        .header(header::HOST, host)
        .header(header::ACCEPT, "application/json, */*;q=0.1")
        .header(header::USER_AGENT, concat!("weft-control/", env!("CARGO_PKG_VERSION")))
        .body(Empty::<hyper::body::Bytes>::new())
        .map_err(|e| e.to_string())?;
    let answer = sender.send_request(request).await.map_err(broken)?;
    let status = answer.status();
    if status.is_redirection() && status != StatusCode::NOT_MODIFIED {
        let location = answer.headers().get(header::LOCATION).and_then(|l| l.to_str().ok());
        return location
            .map(|l| Answer::Elsewhere(l.to_owned()))
            .ok_or_else(|| format!("the answer was {status} without Location"));
    }
    if status != StatusCode::OK {
        return Err(format!("the answer was {status}"));
    }
    let body = Limited::new(answer.into_body(), LARGEST).collect().await.map_err(|error| {
        if error.is::<LengthLimitError>() {
            format!("the answer is longer than {LARGEST} bytes")
        } else {
            format!("the answer broke off: {error}")
        }
    })?;
    drop(connection);
    String::from_utf8(body.to_bytes().to_vec()).map(Answer::Text).map_err(|_| "the answer is no text".into())
}

struct AbortOnDrop<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Where a `Location` leads.
fn join(base: &Uri, location: &str) -> Option<Uri> {
    let location = location.split('#').next().unwrap_or_default();
    if location.contains("://") {
        return location.parse().ok();
    }
    let scheme = base.scheme_str()?;
    if let Some(rest) = location.strip_prefix("//") {
        return format!("{scheme}://{rest}").parse().ok();
    }
    let authority = base.authority()?;
    let path = if location.starts_with('/') {
        location.to_owned()
    } else {
        let folder = base.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{folder}/{location}")
    };
    format!("{scheme}://{authority}{path}").parse().ok()
}

const LOOPBACK: &str = "an address of this machine itself";

/// Why an address is not called, if it is not.
pub fn forbidden(ip: IpAddr) -> Option<&'static str> {
    match ip.to_canonical() {
        IpAddr::V4(ip) => forbidden_v4(ip),
        IpAddr::V6(ip) => forbidden_v6(ip),
    }
}

fn forbidden_v4(ip: Ipv4Addr) -> Option<&'static str> {
    match ip.octets() {
        // "This network": Linux connects it to itself.
        [0 | 127, ..] => Some(LOOPBACK),
        [169, 254, ..] => Some("a link-local address, where clouds keep credentials"),
        [100, 100, 100, 200] => Some("a metadata service"),
        [224..=255, ..] => Some("no address of one machine"),
        _ => None,
    }
}

fn forbidden_v6(ip: Ipv6Addr) -> Option<&'static str> {
    /// Where AWS keeps credentials.
    const METADATA: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
    if ip.is_loopback() || ip.is_unspecified() {
        return Some(LOOPBACK);
    }
    if ip == METADATA {
        return Some("a metadata service");
    }
    match ip.segments() {
        [0xfe80..=0xfebf, ..] => Some("a link-local address, where clouds keep credentials"),
        [0xff00..=0xffff, ..] => Some("no address of one machine"),
        // An IPv4 address behind a translator (RFC 6052), or in the old way of writing it.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] | [0, 0, 0, 0, 0, 0, high, low] => {
            let [a, b] = high.to_be_bytes();
            let [c, d] = low.to_be_bytes();
            forbidden_v4(Ipv4Addr::new(a, b, c, d))
        }
        // 6to4.
        [0x2002, high, low, ..] => {
            let [a, b] = high.to_be_bytes();
            let [c, d] = low.to_be_bytes();
            forbidden_v4(Ipv4Addr::new(a, b, c, d))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_not_to_go() {
        for (ip, not) in [
            ("127.0.0.1", true),
            ("127.9.9.9", true),
            ("0.0.0.0", true),
            ("169.254.169.254", true),
            ("100.100.100.200", true),
            ("224.0.0.1", true),
            ("255.255.255.255", true),
            ("::1", true),
            ("::", true),
            ("fe80::1", true),
            ("febf::1", true),
            ("fd00:ec2::254", true),
            ("::ffff:169.254.169.254", true),
            ("::ffff:127.0.0.1", true),
            ("::127.0.0.1", true),
            ("64:ff9b::169.254.169.254", true),
            ("64:ff9b::7f00:1", true),
            ("2002:a9fe:a9fe::1", true),
            ("ff02::1", true),
            ("10.0.0.1", false),
            ("192.168.1.1", false),
            ("8.8.8.8", false),
            ("fd00::1", false),
            ("2001:db8::1", false),
            ("64:ff9b::8.8.8.8", false),
        ] {
            assert_eq!(forbidden(ip.parse().unwrap()).is_some(), not, "{ip}");
        }
    }

    #[test]
    fn redirects_lead_somewhere() {
        let base: Uri = "https://a.example:8443/x/y?q=1".parse().unwrap();
        for (location, to) in [
            ("https://b.example/k", "https://b.example/k"),
            ("/k#f", "https://a.example:8443/k"),
            ("k?z=2", "https://a.example:8443/x/k?z=2"),
            ("//c.example/k", "https://c.example/k"),
        ] {
            assert_eq!(join(&base, location).unwrap().to_string(), to, "{location}");
        }
    }
}
