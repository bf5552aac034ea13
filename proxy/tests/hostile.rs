//! Clients that are not what they should be, against a proxy that is a process of its own: each is refused for its own reason, which the metric
//! and the log tell; nothing of it reaches the app; and afterwards the proxy serves as before.

#[path = "support/mesh.rs"]
mod mesh;

use mesh::{Ca, Control, PATIENCE, Proxy, app, eventually, mirror, spiffe};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, KeyPair, SanType};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, SignatureScheme, StreamOwned};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use weft_api::names;
use weft_api::wire::MtlsMode;

const HOUR: Duration = Duration::from_secs(3600);
const REQUEST: &[u8] = b"GET /hostile HTTP/1.1\r\nhost: app\r\nconnection: close\r\n\r\n";

/// A proxy in front of an app that counts its connections.
struct Server {
    control: Control,
    proxy: Proxy,
    reached: Arc<AtomicUsize>,
}

impl Server {
    fn start() -> Self {
        let control = Control::start();
        let reached = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&reached);
        let at = app(move |stream| {
            counted.fetch_add(1, Ordering::SeqCst);
            mirror(stream);
        });
        let proxy = Proxy::start(&control, "server", "inbound", at, "timeouts: {drain: 1s, handshake: 600ms, detect: 600ms}");
        Self { control, proxy, reached }
    }

    fn mode(&self, mode: MtlsMode) {
        self.control.mtls("server", mode);
        let name = format!("{mode:?}").to_uppercase();
        eventually("the mode is in force", || self.proxy.get("/config").unwrap().to_uppercase().contains(&name));
    }

    fn failed(&self, reason: &str) -> u64 {
        let reason = format!("reason=\"{reason}\"");
        self.proxy.metric("weft_proxy_tls_handshakes_total", &["direction=\"inbound\"", "result=\"failed\"", &reason])
    }

    fn reached(&self) -> usize {
        self.reached.load(Ordering::SeqCst)
    }

    /// A proper client is served: whatever was before it has broken nothing.
    fn is_well(&self) {
        let client = Client::proper(&self.control);
        let answer = client.request(&self.proxy).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(!self.proxy.log().contains("panicked"), "{}", self.proxy.log());
    }
}

/// A TLS client with a certificate that the test has made up.
struct Client(Arc<ClientConfig>);

impl Client {
    fn new(chain: Vec<Vec<u8>>, key: &KeyPair) -> Self {
        Self(Arc::new(config(Some((chain, key)), names::ALPN_HTTP1, &rustls::version::TLS13)))
    }

    fn proper(control: &Control) -> Self {
        let key = KeyPair::generate().unwrap();
        let leaf = control.lock().ca.sign(Ca::leaf(&spiffe("client"), HOUR), &key);
        Self::new(vec![leaf], &key)
    }

    fn connect(&self, proxy: &Proxy) -> StreamOwned<ClientConnection, TcpStream> {
        let name = ServerName::IpAddress(IpAddr::from([127, 0, 0, 1]).into());
        StreamOwned::new(ClientConnection::new(Arc::clone(&self.0), name).unwrap(), proxy.connect())
    }

    /// In TLS 1.3 a client learns that it was refused only when it reads.
    fn request(&self, proxy: &Proxy) -> std::io::Result<String> {
        let mut stream = self.connect(proxy);
        stream.write_all(REQUEST)?;
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            Err(error) if answer.is_empty() => Err(error),
            _ if answer.is_empty() => Err(ErrorKind::UnexpectedEof.into()),
            _ => Ok(String::from_utf8_lossy(&answer).into_owned()),
        }
    }
}

type Own<'a> = Option<(Vec<Vec<u8>>, &'a KeyPair)>;

fn config(own: Own<'_>, alpn: &[u8], version: &'static rustls::SupportedProtocolVersion) -> ClientConfig {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider)).with_protocol_versions(&[version]).unwrap();
    // Whose proxy it is, is not what is tested here; some root is needed for a verifier of signatures.
    let mut roots = RootCertStore::empty();
    roots.add(Ca::new("any").der().into()).unwrap();
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
    let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyServer(verifier)));
    let mut config = match own {
        None => builder.with_no_client_auth(),
        Some((chain, key)) => {
            let chain = chain.into_iter().map(CertificateDer::from).collect();
            builder.with_client_auth_cert(chain, PrivateKeyDer::Pkcs8(key.serialize_der().into())).unwrap()
        }
    };
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = Resumption::disabled();
    config
}

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

#[test]
fn certificates_that_prove_nothing_are_refused() {
    let server = Server::start();
    server.is_well();
    let before = server.reached();
    let now = std::time::SystemTime::now();
    let changed = |change: &dyn Fn(&mut CertificateParams)| {
        let mut params = Ca::leaf(&spiffe("client"), HOUR);
        change(&mut params);
        params
    };
    let uri = |text: &str| SanType::URI(text.try_into().unwrap());
    // The log tells ten in a second, and counts the rest.
    let cases: Vec<(&str, CertificateParams, &str)> = vec![
        ("another trust domain", Ca::leaf("spiffe://other.example/ns/default/sa/client", HOUR), "other.example"),
        ("a trust domain as a prefix", Ca::leaf("spiffe://cluster.local.evil/ns/default/sa/client", HOUR), "cluster.local.evil"),
        ("expired", changed(&|p| (p.not_before, p.not_after) = ((now - 2 * HOUR).into(), (now - HOUR).into())), "has expired"),
        (
            "not yet valid",
            changed(&|p| (p.not_before, p.not_after) = ((now + HOUR).into(), (now + 2 * HOUR).into())),
            "not valid yet",
        ),
        (
            "for servers only",
            changed(&|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]),
            "not meant for this use",
        ),
        (
            "for signing code",
            changed(&|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning]),
            "not meant for this use",
        ),
        ("no name", changed(&|p| p.subject_alt_names = vec![]), "no SPIFFE identity"),
        (
            "a DNS name only",
            changed(&|p| p.subject_alt_names = vec![SanType::DnsName("client.example".try_into().unwrap())]),
            "no SPIFFE identity",
        ),
        ("two identities", changed(&|p| p.subject_alt_names.push(uri(&spiffe("other")))), "several URI names"),
        (
            "another scheme",
            changed(&|p| p.subject_alt_names = vec![uri("https://cluster.local/ns/default/sa/client")]),
            "is no SPIFFE identity",
        ),
        ("no path", changed(&|p| p.subject_alt_names = vec![uri("spiffe://cluster.local")]), "mutual TLS failed"),
    ];
    for (n, (what, params, words)) in cases.into_iter().enumerate() {
        let key = KeyPair::generate().unwrap();
        let leaf = server.control.lock().ca.sign(params, &key);
        let answer = Client::new(vec![leaf], &key).request(&server.proxy);
        assert!(answer.is_err(), "{what}: {answer:?}");
        eventually(&format!("{what} is counted"), || server.failed("peer-identity") == n as u64 + 1);
        assert!(server.proxy.log().contains(words), "{what}: the log should say {words:?}:\n{}", server.proxy.log());
    }
    assert_eq!(server.reached(), before, "nothing of it reached the app");
    server.is_well();
}

#[test]
fn certificates_that_nobody_vouches_for_are_refused() {
    let server = Server::start();
    // Signed by itself; signed by an authority that has the right name and not the right key; none at all.
    let key = KeyPair::generate().unwrap();
    let own = Ca::leaf(&spiffe("client"), HOUR).self_signed(&key).unwrap().der().to_vec();
    assert!(Client::new(vec![own], &key).request(&server.proxy).is_err());
    eventually("it is counted", || server.failed("peer-identity") == 1);
    let impostor = Ca::new("root one");
    let leaf = impostor.sign(Ca::leaf(&spiffe("client"), HOUR), &key);
    assert!(Client::new(vec![leaf, impostor.der()], &key).request(&server.proxy).is_err());
    eventually("it is counted", || server.failed("peer-identity") == 2);
    let none = Client(Arc::new(config(None, names::ALPN_HTTP1, &rustls::version::TLS13)));
    assert!(none.request(&server.proxy).is_err());
    eventually("it is counted", || server.failed("peer-identity") == 3);
    assert!(server.proxy.log().contains("showed no certificate"));
    assert_eq!(server.reached(), 0);
    server.is_well();
}

#[test]
fn a_leaf_that_signs_others_makes_no_identities() {
    let server = Server::start();
    let (stolen, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let params = Ca::leaf(&spiffe("client"), HOUR);
    let leaf = server.control.lock().ca.sign(params.clone(), &stolen);
    let issuer = rcgen::Issuer::new(params, stolen);
    let forged = Ca::leaf(&spiffe("admin"), HOUR).signed_by(&key, &issuer).unwrap().der().to_vec();
    assert!(Client::new(vec![forged, leaf], &key).request(&server.proxy).is_err());
    eventually("it is counted", || server.failed("peer-identity") == 1);
    assert_eq!(server.reached(), 0);
    server.is_well();
}

#[test]
fn an_old_version_of_tls_is_refused_although_it_names_the_mesh() {
    let server = Server::start();
    let key = KeyPair::generate().unwrap();
    let leaf = server.control.lock().ca.sign(Ca::leaf(&spiffe("client"), HOUR), &key);
    let old = Client(Arc::new(config(Some((vec![leaf], &key)), names::ALPN_HTTP1, &rustls::version::TLS12)));
    for mode in [MtlsMode::Permissive, MtlsMode::Strict] {
        server.mode(mode);
        assert!(old.request(&server.proxy).is_err());
    }
    eventually("both are counted", || server.failed("protocol") == 2);
    assert_eq!(server.reached(), 0);
    server.is_well();
}

/// A ClientHello of the mesh, as a rustls client sends it.
fn mesh_hello() -> Vec<u8> {
    let config = config(None, names::ALPN_HTTP1, &rustls::version::TLS13);
    let name = ServerName::IpAddress(IpAddr::from([127, 0, 0, 1]).into());
    let mut bytes = Vec::new();
    ClientConnection::new(Arc::new(config), name).unwrap().write_tls(&mut bytes).unwrap();
    bytes
}

#[test]
fn garbage_behind_a_hello_of_the_mesh_is_refused() {
    let server = Server::start();
    for garbage in [&[0xff; 300][..], b"GET / HTTP/1.1\r\n\r\n", b"\x17\x03\x03\x00\x05hello", b"\x15\x03\x03\x00\x02\x02\x28"] {
        let mut stream = server.proxy.connect();
        stream.write_all(&[mesh_hello(), garbage.to_vec()].concat()).unwrap();
        let mut rest = Vec::new();
        // Ends, with or without an alert before, and soon.
        let _ = stream.read_to_end(&mut rest);
        assert!(!rest.windows(8).any(|w| w == b"HTTP/1.1"));
    }
    eventually("each is counted", || server.failed("protocol") + server.failed("alert") == 4);
    assert_eq!(server.reached(), 0);
    server.is_well();
}

/// A ClientHello of `size` bytes, in records, whose only extension is padding.
fn huge_hello(size: usize) -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend([0, 0, 2, 0x13, 1, 1, 0]);
    let mut handshake = vec![1];
    handshake.extend(&(size as u32).to_be_bytes()[1..]);
    handshake.extend(body);
    handshake.resize(size + 4, 0);
    let mut out = Vec::new();
    for part in handshake.chunks(16_000) {
        out.extend([0x16, 3, 1]);
        out.extend((part.len() as u16).to_be_bytes());
        out.extend(part);
    }
    out
}

#[test]
fn a_huge_hello_costs_little_and_is_refused_under_strict() {
    let server = Server::start();
    server.mode(MtlsMode::Strict);
    let hello = huge_hello(1 << 20);
    let mut streams = Vec::new();
    for _ in 0..50 {
        let mut stream = server.proxy.connect();
        // The proxy may have closed before all is written.
        let _ = stream.write_all(&hello);
        streams.push(stream);
    }
    for mut stream in streams {
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert!(rest.is_empty(), "{}", rest.escape_ascii());
    }
    assert_eq!(server.reached(), 0);
    server.proxy.expect_metric("weft_proxy_plaintext_refused_total", &[], 50);
    server.is_well();
}

#[test]
fn a_slow_handshake_is_given_up() {
    let server = Server::start();
    server.mode(MtlsMode::Strict);
    let hello = mesh_hello();
    let cases: [&[u8]; 4] = [&[], &hello[..1], &hello[..hello.len() / 2], &hello];
    for part in cases {
        let begun = Instant::now();
        let mut stream = server.proxy.connect();
        stream.write_all(part).unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        let took = begun.elapsed();
        assert!(took > Duration::from_millis(500) && took < PATIENCE / 2, "{} bytes: {took:?}", part.len());
    }
    eventually("the one that had begun is counted", || server.failed("timeout") == 1);
    assert_eq!(server.reached(), 0);
    server.is_well();
}

#[test]
fn drops_of_a_hello_dont_keep_a_connection_for_ever() {
    let server = Server::start();
    server.mode(MtlsMode::Strict);
    let mut stream = server.proxy.connect();
    let begun = Instant::now();
    // A byte at a time, each in time by itself.
    let ended = mesh_hello().iter().any(|byte| {
        std::thread::sleep(Duration::from_millis(50));
        stream.write_all(&[*byte]).is_err()
    });
    assert!(ended || stream.read(&mut [0]).map_or(true, |n| n == 0));
    assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
    assert_eq!(server.reached(), 0);
    server.is_well();
}

#[test]
fn connections_that_end_in_mid_handshake_leave_nothing() {
    let server = Server::start();
    let hello = mesh_hello();
    for n in 0..200 {
        let mut stream = server.proxy.connect();
        stream.write_all(&hello[..=(n * 7) % hello.len()]).unwrap();
        if n % 2 == 0 {
            socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
        }
    }
    let open = || server.proxy.metric("weft_proxy_connections_open", &["inbound"]);
    eventually("all are gone", || open() == 0);
    server.is_well();
}

#[test]
fn plaintext_and_tls_of_others_to_a_strict_port_are_refused() {
    let server = Server::start();
    server.mode(MtlsMode::Strict);
    let foreign = Client(Arc::new(config(None, b"http/1.1", &rustls::version::TLS13)));
    assert!(foreign.request(&server.proxy).is_err());
    let mut stream = server.proxy.connect();
    stream.write_all(REQUEST).unwrap();
    let mut rest = Vec::new();
    assert_eq!(stream.read_to_end(&mut rest).unwrap_err().kind(), ErrorKind::ConnectionReset);
    server.proxy.expect_metric("weft_proxy_plaintext_refused_total", &[], 2);
    assert_eq!(server.reached(), 0);
    server.is_well();
}

#[test]
fn mesh_tls_to_a_port_where_it_is_disabled_is_the_apps_to_judge() {
    let control = Control::start();
    let (send, seen) = std::sync::mpsc::channel();
    let at = app(move |mut stream| {
        let mut first = [0; 5];
        stream.read_exact(&mut first).unwrap();
        send.send(first).unwrap();
    });
    let proxy = Proxy::start(&control, "server", "inbound", at, "timeouts: {drain: 1s}");
    control.mtls("server", MtlsMode::Disable);
    eventually("it is disabled", || proxy.get("/config").unwrap().contains("DISABLE"));
    assert!(Client::proper(&control).request(&proxy).is_err());
    let first = seen.recv_timeout(PATIENCE).unwrap();
    assert_eq!(first[..2], [0x16, 3], "the ClientHello as it is");
    assert_eq!(proxy.metric("weft_proxy_tls_handshakes_total", &[]), 0);
}

#[test]
fn a_session_outlives_its_certificate_for_nothing() {
    let server = Server::start();
    let key = KeyPair::generate().unwrap();
    let life = Duration::from_secs(4);
    let leaf = server.control.lock().ca.sign(Ca::leaf(&spiffe("client"), life), &key);
    let until = Instant::now() + life;
    let mut config = config(Some((vec![leaf], &key)), names::ALPN_HTTP1, &rustls::version::TLS13);
    config.resumption = Resumption::in_memory_sessions(64);
    let client = Client(Arc::new(config));
    let resumed = || server.proxy.metric("weft_proxy_tls_handshakes_total", &["direction=\"inbound\"", "result=\"resumed\""]);
    assert!(client.request(&server.proxy).unwrap().starts_with("HTTP/1.1 200"));
    assert!(client.request(&server.proxy).unwrap().starts_with("HTTP/1.1 200"));
    eventually("the second is resumed", || resumed() >= 1);
    std::thread::sleep(until.saturating_duration_since(Instant::now()) + Duration::from_millis(1200));
    let (before, was_resumed) = (server.reached(), resumed());
    assert!(client.request(&server.proxy).is_err(), "the certificate behind the session has expired");
    eventually("it is counted", || server.failed("peer-identity") == 1);
    assert_eq!((server.reached(), resumed()), (before, was_resumed));
    server.is_well();
}
