//! Mutual TLS between two proxies, each a process of its own, and a control plane that says what the test wants.

#[path = "support/mesh.rs"]
mod mesh;

use mesh::{Ca, Control, PATIENCE, Proxy, app, echo, eventually, mirror, spiffe};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use weft_api::wire::{MtlsMode, Protocol, TrustBundle};

const SERVICE: &str = "10.96.0.7:80";

/// client → proxy "client" → mutual TLS → proxy "server" → app.
struct Pair {
    control: Control,
    client: Proxy,
    server: Proxy,
}

impl Pair {
    fn of(app: SocketAddr, protocol: Protocol) -> Self {
        Self::told(app, protocol, |_| {})
    }

    fn told(app: SocketAddr, protocol: Protocol, tell: impl FnOnce(&Control)) -> Self {
        let control = Control::start();
        tell(&control);
        let server = Proxy::start(&control, "server", "inbound", app, "timeouts: {drain: 1s}");
        control.service(SERVICE, protocol, &[(server.addr, &["server"])]);
        let client = Proxy::start(&control, "client", "outbound", SERVICE, "timeouts: {drain: 1s}");
        let pair = Self { control, client, server };
        // Both have what they were told.
        eventually("all is acknowledged", || pair.control.lock().acks.iter().any(|(pod, _)| pod == "client"));
        pair
    }

    fn handshakes(&self, result: &str) -> u64 {
        self.server.metric("weft_proxy_tls_handshakes_total", &["direction=\"inbound\"", &format!("result=\"{result}\"")])
    }
}

fn read_all(stream: &mut TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    all
}

#[test]
fn http_is_carried_over_mutual_tls_and_connections_are_shared() {
    for protocol in [Protocol::Http, Protocol::Detect] {
        let pair = Pair::of(app(mirror), protocol);
        for n in 0..20 {
            let (status, body) = pair.client.request(&format!("GET /{n} HTTP/1.1\r\n"));
            assert_eq!(status, 200, "{body}");
            assert!(body.starts_with(&format!("GET /{n} HTTP/1.1\r\n")), "{body}");
        }
        assert_eq!((pair.handshakes("full"), pair.handshakes("resumed")), (1, 0), "twenty clients share a connection");
        assert_eq!(pair.client.certificate()["identity"], spiffe("client"));
        let (client, server) = (spiffe("client"), spiffe("server"));
        let names = [format!("source_principal=\"{client}\""), format!("destination_principal=\"{server}\"")];
        let [source, destination] = names.each_ref().map(String::as_str);
        let mutual = "connection_security_policy=\"mutual_tls\"";
        pair.server.expect_metric("istio_requests_total", &["reporter=\"destination\"", mutual, source, destination], 20);
        pair.client.expect_metric("istio_requests_total", &["reporter=\"source\"", source, destination], 20);
    }
}

#[test]
fn opaque_bytes_half_closes_and_resumption() {
    let pair = Pair::of(app(echo), Protocol::Tcp);
    let payload: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    for _ in 0..5 {
        let mut stream = pair.client.connect();
        let mut reader = stream.try_clone().unwrap();
        let reading = thread::spawn(move || read_all(&mut reader));
        stream.write_all(&payload).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert!(reading.join().unwrap() == payload);
    }
    assert_eq!((pair.handshakes("full"), pair.handshakes("resumed")), (1, 4));
    assert_eq!(pair.handshakes("failed"), 0);
}

#[test]
fn a_server_that_speaks_first_does() {
    let greet = |mut stream: TcpStream| {
        stream.write_all(b"220 ready\r\n").unwrap();
        echo(stream);
    };
    for protocol in [Protocol::Tcp, Protocol::Detect] {
        for client in ["client", "plain"] {
            let pair = Pair::of(app(greet), protocol);
            let at = if client == "client" { pair.client.addr } else { pair.server.addr };
            let mut stream = TcpStream::connect(at).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut greeting = [0; 11];
            stream.read_exact(&mut greeting).unwrap();
            assert_eq!(&greeting, b"220 ready\r\n");
            stream.write_all(b"hello").unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            assert_eq!(read_all(&mut stream), b"hello");
            assert_eq!(pair.handshakes("full"), u64::from(client == "client"), "{protocol:?} {client}");
        }
    }
}

#[test]
fn a_reset_stays_a_reset() {
    let (send, seen) = std::sync::mpsc::channel();
    let pair = Pair::of(
        app(move |mut stream| {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            if byte == *b"r" {
                socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
                return;
            }
            send.send(stream.read(&mut byte).map_err(|e| e.kind())).unwrap();
        }),
        Protocol::Tcp,
    );
    let mut stream = pair.client.connect();
    stream.write_all(b"r").unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    let mut stream = pair.client.connect();
    stream.write_all(b"x").unwrap();
    thread::sleep(Duration::from_millis(100));
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
    assert_eq!(seen.recv_timeout(PATIENCE).unwrap(), Err(ErrorKind::ConnectionReset));
}

#[test]
fn a_server_that_is_somebody_else_gets_nothing() {
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&connections);
    let pair = Pair::of(
        app(move |stream| {
            counted.fetch_add(1, Ordering::SeqCst);
            mirror(stream);
        }),
        Protocol::Http,
    );
    pair.control.service(SERVICE, Protocol::Http, &[(pair.server.addr, &["other", "another"])]);
    let (status, body) = pair.client.request("GET / HTTP/1.1\r\n");
    assert_eq!(status, 502, "{body}");
    assert!(body.contains("[UPI]") && body.contains(&spiffe("server")) && body.contains(&spiffe("other")), "{body}");
    pair.control.service(SERVICE, Protocol::Tcp, &[(pair.server.addr, &["other"])]);
    eventually("it is TCP", || pair.client.get("/config").unwrap().contains("\"protocol\": \"tcp\""));
    let mut stream = pair.client.connect();
    let _ = stream.write_all(b"hello");
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(connections.load(Ordering::SeqCst), 0);
    pair.client.expect_metric("weft_proxy_tls_handshakes_total", &["outbound", "reason=\"peer-identity\""], 2);
    // One of several is enough.
    pair.control.service(SERVICE, Protocol::Http, &[(pair.server.addr, &["other", "server"])]);
    eventually("it is served", || pair.client.request("GET / HTTP/1.1\r\n").0 == 200);
}

#[test]
fn a_foreign_trust_domain_is_refused_by_both_sides() {
    let pair = Pair::told(app(mirror), Protocol::Http, |control| {
        control.tell(|state| state.trust.trust_domain_aliases = vec!["old.example".into()]);
    });
    // An alias is as good as the domain itself.
    pair.control.tell(|state| {
        state.domain = "old.example".into();
        state.trust.renew_before += 1;
    });
    eventually("the client is of the alias", || {
        pair.client.certificate()["identity"] == "spiffe://old.example/ns/default/sa/client"
    });
    assert_eq!(pair.client.request("GET / HTTP/1.1\r\n").0, 200);
    // Without it the server does not know the client any more. (The client's own certificate stays as it is: a bundle that would
    // make it worthless is refused.)
    pair.control.tell(|state| state.trust.trust_domain_aliases.clear());
    let foreign = |proxy: &Proxy| proxy.log().contains("is of another trust domain");
    eventually("it is refused", || foreign(&pair.client) && foreign(&pair.server));
}

#[test]
fn strict_takes_only_mutual_tls_and_permissive_takes_all() {
    let pair = Pair::of(app(mirror), Protocol::Http);
    assert_eq!(pair.server.request("GET /plain HTTP/1.1\r\n").0, 200);
    assert_eq!(pair.client.request("GET /meshed HTTP/1.1\r\n").0, 200);
    // An open connection with a request now and then, and an idle one.
    let mut open = pair.server.connect();
    let ask = |open: &mut TcpStream| {
        open.write_all(b"GET /a HTTP/1.1\r\nhost: a\r\n\r\n").ok()?;
        let mut head = [0; 4096];
        let n = open.read(&mut head).ok().filter(|n| *n > 0)?;
        Some(String::from_utf8_lossy(&head[..n]).into_owned())
    };
    assert!(ask(&mut open).is_some());
    pair.control.mtls("server", MtlsMode::Strict);
    eventually("plaintext is refused", || pair.server.request("GET /plain HTTP/1.1\r\n").0 == 0);
    assert_eq!(pair.client.request("GET /meshed HTTP/1.1\r\n").0, 200);
    let mut rest = Vec::new();
    open.set_read_timeout(Some(PATIENCE)).unwrap();
    open.read_to_end(&mut rest).unwrap();
    let mut stream = pair.server.connect();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset, "reset, not answered");
    pair.server.expect_metric("weft_proxy_plaintext_refused_total", &[], 1);
    assert!(pair.server.log().contains("takes only mutual TLS (PeerAuthentication STRICT): it is plaintext"));
    pair.control.mtls("server", MtlsMode::Permissive);
    eventually("plaintext is taken again", || pair.server.request("GET /plain HTTP/1.1\r\n").0 == 200);
}

#[test]
fn under_strict_nothing_reaches_the_app_before_the_client_has_proved_itself() {
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&connections);
    let pair = Pair::told(
        app(move |_| {
            counted.fetch_add(1, Ordering::SeqCst);
        }),
        Protocol::Tcp,
        |control| control.mtls("server", MtlsMode::Strict),
    );
    eventually("it is strict", || pair.server.get("/config").unwrap().contains("STRICT"));
    let silent = pair.server.connect();
    thread::sleep(Duration::from_millis(200));
    let mut early = pair.server.connect();
    early.write_all(b"x").unwrap();
    assert_eq!(early.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(connections.load(Ordering::SeqCst), 0);
    drop(silent);
}

#[test]
fn an_open_opaque_connection_that_is_not_taken_any_more_is_cut_after_the_drain_time() {
    let pair = Pair::of(app(echo), Protocol::Tcp);
    let mut plain = pair.server.connect();
    let mut meshed = pair.client.connect();
    for stream in [&mut plain, &mut meshed] {
        stream.write_all(b"a").unwrap();
        stream.read_exact(&mut [0]).unwrap();
    }
    pair.control.mtls("server", MtlsMode::Strict);
    let begun = Instant::now();
    assert_eq!(plain.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!(begun.elapsed() > Duration::from_millis(900), "it had its time: {:?}", begun.elapsed());
    meshed.write_all(b"b").unwrap();
    meshed.read_exact(&mut [0]).unwrap();
}

#[test]
fn with_disable_all_bytes_are_the_apps() {
    let pair = Pair::of(app(echo), Protocol::Tcp);
    pair.control.mtls("server", MtlsMode::Disable);
    eventually("it is disabled", || pair.server.get("/config").unwrap().contains("DISABLE"));
    // Even a ClientHello of the mesh; this echo is no TLS server, so the client's proxy gives up.
    let mut stream = pair.client.connect();
    let _ = stream.write_all(b"x");
    assert!(stream.read(&mut [0]).is_err());
    let mut stream = pair.server.connect();
    stream.write_all(b"\x16\x03\x01\x00\x05hello").unwrap();
    let mut back = [0; 10];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(pair.handshakes("full") + pair.handshakes("failed"), 0);
}

/// The app's own TLS server: says hello to whoever has shaken hands.
fn tls_app() -> (SocketAddr, rustls::RootCertStore) {
    let ca = Ca::new("the app's own");
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["app.example".to_owned()]).unwrap();
    let chain = vec![ca.sign(params, &key).into()];
    let key = rustls::pki_types::PrivateKeyDer::Pkcs8(key.serialize_der().into());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let config = Arc::new(config);
    let at = app(move |mut socket| {
        let mut session = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
        let mut stream = rustls::Stream::new(&mut session, &mut socket);
        let _ = stream.write_all(b"secret");
    });
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ca.der().into()).unwrap();
    (at, roots)
}

fn tls_client(at: SocketAddr, roots: rustls::RootCertStore) -> std::io::Result<Vec<u8>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut session = rustls::ClientConnection::new(Arc::new(config), "app.example".try_into().unwrap()).unwrap();
    let mut socket = TcpStream::connect(at)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut answer = vec![0; 6];
    rustls::Stream::new(&mut session, &mut socket).read_exact(&mut answer)?;
    Ok(answer)
}

#[test]
fn the_apps_own_tls_passes_through_untouched() {
    let (at, roots) = tls_app();
    let pair = Pair::of(at, Protocol::Detect);
    for address in [pair.client.addr, pair.server.addr] {
        assert_eq!(tls_client(address, roots.clone()).unwrap(), b"secret");
    }
    // From the mesh it travels inside mutual TLS.
    assert_eq!(pair.handshakes("full"), 1);
    pair.control.mtls("server", MtlsMode::Strict);
    eventually("it is strict", || pair.server.get("/config").unwrap().contains("STRICT"));
    assert_eq!(tls_client(pair.client.addr, roots.clone()).unwrap(), b"secret");
    assert!(tls_client(pair.server.addr, roots).is_err());
    assert!(pair.server.log().contains("its TLS is not the mesh's"));
}

/// Requests without pause, over connections that are kept and new ones, until it is told to stop. Returns how many, and what failed.
struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    threads: Vec<thread::JoinHandle<Vec<String>>>,
}

impl Load {
    fn on(addr: SocketAddr) -> Self {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let threads: Vec<_> = (0..3)
            .map(|n| {
                let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
                thread::spawn(move || {
                    let mut failed = Vec::new();
                    let mut kept: Option<TcpStream> = None;
                    while !stop.load(Ordering::Relaxed) {
                        let mut stream = match kept.take() {
                            Some(stream) if n > 0 => stream,
                            _ => TcpStream::connect(addr).unwrap(),
                        };
                        stream.set_read_timeout(Some(PATIENCE)).unwrap();
                        stream.write_all(b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n").unwrap();
                        let mut answer = Vec::new();
                        let mut buffer = [0; 2048];
                        let whole = |answer: &[u8]| {
                            let end = answer.windows(4).position(|w| w == b"\r\n\r\n")?;
                            let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
                            let length: usize = head.split("content-length: ").nth(1)?.split("\r\n").next()?.parse().ok()?;
                            (answer.len() >= end + 4 + length).then_some(head)
                        };
                        let head = loop {
                            match stream.read(&mut buffer) {
                                Ok(n) if n > 0 => answer.extend_from_slice(&buffer[..n]),
                                other => break Err(format!("{other:?}")),
                            }
                            if let Some(head) = whole(&answer) {
                                break Ok(head);
                            }
                        };
                        match head {
                            Ok(head) if head.starts_with("http/1.1 200") => {
                                if !head.contains("connection: close") {
                                    kept = Some(stream);
                                }
                            }
                            Ok(_) => failed.push(String::from_utf8_lossy(&answer).into_owned()),
                            Err(error) => failed.push(error),
                        }
                        done.fetch_add(1, Ordering::Relaxed);
                        thread::sleep(Duration::from_millis(2));
                    }
                    failed
                })
            })
            .collect();
        Self { stop, done, threads }
    }

    /// Waits for some more requests.
    fn goes_on(&self) {
        let before = self.done.load(Ordering::Relaxed);
        eventually("the load goes on", || self.done.load(Ordering::Relaxed) > before + 100);
    }

    fn end(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        let failed: Vec<String> = self.threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
        assert!(failed.is_empty(), "{} failed: {}", failed.len(), failed[0]);
        self.done.load(Ordering::Relaxed)
    }
}

#[test]
fn switching_modes_loses_no_meshed_request() {
    let pair = Pair::of(app(mirror), Protocol::Http);
    let load = Load::on(pair.client.addr);
    for mode in [MtlsMode::Strict, MtlsMode::Permissive, MtlsMode::Strict, MtlsMode::Permissive] {
        load.goes_on();
        pair.control.mtls("server", mode);
    }
    load.goes_on();
    assert!(load.end() > 400);
}

#[test]
fn certificates_are_renewed_at_half_life_with_a_new_key_and_no_failed_request() {
    let pair = Pair::told(app(mirror), Protocol::Http, |control| control.tell(|state| state.life = Duration::from_secs(4)));
    let first = pair.client.certificate()["serial"].clone();
    let load = Load::on(pair.client.addr);
    eventually("each has its third certificate", || {
        let state = pair.control.lock();
        state.issued["client"] >= 3 && state.issued["server"] >= 3
    });
    load.goes_on();
    load.end();
    assert_ne!(pair.client.certificate()["serial"], first);
}

#[test]
fn a_root_is_rotated_without_a_failed_request() {
    let pair = Pair::of(app(mirror), Protocol::Http);
    let load = Load::on(pair.client.addr);
    load.goes_on();
    let (new, roots) = {
        let new = Ca::new("root two");
        let roots = vec![pair.control.lock().ca.der(), new.der()];
        (new, roots)
    };
    let only_new = vec![new.der()];
    // First everybody learns of the new root, then leaves are signed with it, then the old one goes.
    pair.control.tell(|state| state.trust.roots = roots);
    let known = |proxy: &Proxy, n: usize| proxy.log().contains(&format!("trust bundle in force roots={n}"));
    eventually("both roots are known", || known(&pair.client, 2) && known(&pair.server, 2));
    load.goes_on();
    pair.control.tell(|state| {
        state.ca = new;
        state.trust.issuer = b"two".to_vec();
    });
    let renewed = |proxy: &Proxy| proxy.certificate()["issuer"].as_str().unwrap().contains("root two");
    eventually("both have new leaves", || renewed(&pair.client) && renewed(&pair.server));
    load.goes_on();
    pair.control.tell(|state| state.trust.roots = only_new);
    eventually("the old root is gone", || known(&pair.client, 1) && known(&pair.server, 1));
    load.goes_on();
    load.end();
}

#[test]
fn without_a_control_plane_what_is_known_goes_on() {
    let mut pair = Pair::of(app(mirror), Protocol::Http);
    assert_eq!(pair.client.request("GET / HTTP/1.1\r\n").0, 200);
    pair.control.down();
    eventually("they know", || pair.client.metric("weft_proxy_control_connected", &[]) == 0);
    let load = Load::on(pair.client.addr);
    load.goes_on();
    load.end();
    pair.control.up();
    eventually("they are back", || pair.client.metric("weft_proxy_control_connected", &[]) == 1);
    // What has changed meanwhile counts.
    let other = Proxy::start(&pair.control, "other", "inbound", app(mirror), "");
    pair.control.service(SERVICE, Protocol::Http, &[(other.addr, &["other"])]);
    eventually("requests go elsewhere", || {
        pair.client.request("GET / HTTP/1.1\r\n");
        other.metric("istio_requests_total", &[]) > 0
    });
}

#[test]
fn without_a_certificate_nothing_that_wants_mutual_tls_is_carried_and_the_pod_is_not_ready() {
    let control = Control::start();
    let server = Proxy::start(&control, "server", "inbound", app(mirror), "");
    control.service(SERVICE, Protocol::Http, &[(server.addr, &["server"])]);
    control.tell(|state| state.no_certificates = Some("the token has expired".into()));
    let client = Proxy::start_as(&control, "client", "outbound", SERVICE, "", "live");
    eventually("it says why", || client.log().contains("no certificate yet, so no mutual TLS: the token has expired"));
    let ready = client.get("/healthz/ready").unwrap();
    assert!(ready.starts_with("HTTP/1.1 503") && ready.contains("no certificate"), "{ready}");
    let (status, body) = client.request("GET / HTTP/1.1\r\n");
    assert!(status == 503 && body.contains("no certificate"), "{status} {body}");
    assert_eq!(server.metric("istio_requests_total", &[]), 0);
    control.tell(|state| state.no_certificates = None);
    eventually("it is ready", || client.get("/healthz/ready").unwrap().starts_with("HTTP/1.1 200"));
    assert_eq!(client.request("GET / HTTP/1.1\r\n").0, 200);
}

#[test]
fn requests_are_balanced_and_go_to_another_endpoint_when_one_is_gone() {
    let control = Control::start();
    let servers: Vec<Proxy> = ["one", "two"].iter().map(|pod| Proxy::start(&control, pod, "inbound", app(mirror), "")).collect();
    let plain = app(mirror);
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let endpoints: [(SocketAddr, &[&str]); 4] =
        [(servers[0].addr, &["one"]), (servers[1].addr, &["two"]), (plain, &[]), (gone, &["one"])];
    control.service(SERVICE, Protocol::Http, &endpoints);
    let client = Proxy::start(&control, "client", "outbound", SERVICE, "");
    for _ in 0..120 {
        let (status, body) = client.request("GET / HTTP/1.1\r\n");
        assert_eq!(status, 200, "{body}");
    }
    for server in &servers {
        server.expect_metric("istio_requests_total", &["response_code=\"200\""], 15);
    }
    control.service(SERVICE, Protocol::Http, &[]);
    eventually("nobody is ready", || client.request("GET / HTTP/1.1\r\n").0 == 503);
    let (_, body) = client.request("GET / HTTP/1.1\r\n");
    assert!(body.contains("[UH]") && body.contains("app.default.svc"), "{body}");
}

#[test]
fn a_bundle_without_roots_is_refused() {
    let pair = Pair::of(app(mirror), Protocol::Http);
    pair.control.tell(|state| state.trust = TrustBundle { trust_domain: mesh::DOMAIN.into(), ..TrustBundle::default() });
    eventually("it is refused", || pair.control.lock().acks.iter().any(|(_, ack)| ack.error.contains("without a root")));
    assert_eq!(pair.client.request("GET / HTTP/1.1\r\n").0, 200);
}
