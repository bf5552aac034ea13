//! The built proxy and a control plane that a test plays: what is refused, what is kept, who comes back and when.

mod binary;

use binary::{PATIENCE, Proxy, server};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};
use weft_api::wire::discovery_server::{Discovery, DiscoveryServer};
use weft_api::wire::{
    Ack, ControlMessage, Inbound, InboundPort, Protocol, ProxyMessage, Workload, control_message, proxy_message,
};

type Push = tokio::sync::mpsc::Sender<Result<ControlMessage, Status>>;

/// A proxy that has attached.
struct Attached {
    token: String,
    push: Push,
    said: Receiver<ProxyMessage>,
}

impl Attached {
    fn next(&self) -> proxy_message::Kind {
        self.said.recv_timeout(PATIENCE).unwrap().kind.unwrap()
    }

    /// Sends a configuration with one port and waits for what becomes of it.
    fn configure(&self, version: u64, port: u32, name: &str) -> Ack {
        let workload = Workload { name: name.into(), namespace: "shop".into(), ..Workload::default() };
        let ports = vec![InboundPort { port, protocol: Protocol::Http1.into(), service: None }];
        let inbound = Inbound { workload: Some(workload), ports, ..Inbound::default() };
        let message = ControlMessage { version, kind: Some(control_message::Kind::Inbound(inbound)) };
        self.push.blocking_send(Ok(message)).unwrap();
        loop {
            if let proxy_message::Kind::Ack(ack) = self.next() {
                assert_eq!(ack.version, version);
                return ack;
            }
        }
    }
}

struct Service {
    attempts: Sender<Instant>,
    attached: Sender<Attached>,
    refuses: Arc<AtomicBool>,
}

#[tonic::async_trait]
impl Discovery for Service {
    type AttachStream = ReceiverStream<Result<ControlMessage, Status>>;

    async fn attach(&self, request: Request<Streaming<ProxyMessage>>) -> Result<Response<Self::AttachStream>, Status> {
        let _ = self.attempts.send(Instant::now());
        if self.refuses.load(Ordering::SeqCst) {
            return Err(Status::unauthenticated("the token is not for this cluster"));
        }
        let token = request.metadata().get("authorization").map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default();
        let (push, out) = tokio::sync::mpsc::channel(8);
        let (tell, said) = channel();
        let mut messages = request.into_inner();
        tokio::spawn(async move {
            while let Ok(Some(message)) = messages.message().await {
                let _ = tell.send(message);
            }
        });
        let _ = self.attached.send(Attached { token, push, said });
        Ok(Response::new(ReceiverStream::new(out)))
    }
}

/// A certificate authority and a certificate for 127.0.0.1.
struct Authority {
    root: String,
    leaf: String,
    key: String,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(params, key);
        let key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::new(vec!["127.0.0.1".into()]).unwrap().signed_by(&key, &issuer).unwrap().pem();
        Self { root, leaf, key: key.serialize_pem() }
    }
}

struct ControlPlane {
    runtime: Option<tokio::runtime::Runtime>,
    address: SocketAddr,
    attempts: Receiver<Instant>,
    attached: Receiver<Attached>,
    refuses: Arc<AtomicBool>,
}

impl ControlPlane {
    fn start(authority: &Authority, at: SocketAddr) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let ((try_, attempts), (attach, attached)) = (channel(), channel());
        let refuses = Arc::new(AtomicBool::new(false));
        let service = Service { attempts: try_, attached: attach, refuses: Arc::clone(&refuses) };
        let tls = ServerTlsConfig::new().identity(Identity::from_pem(&authority.leaf, &authority.key));
        let address = runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind(at).await.unwrap();
            let address = listener.local_addr().unwrap();
            let server = Server::builder().tls_config(tls).unwrap().add_service(DiscoveryServer::new(service));
            tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
            address
        });
        Self { runtime: Some(runtime), address, attempts, attached, refuses }
    }

    fn any(authority: &Authority) -> Self {
        Self::start(authority, "127.0.0.1:0".parse().unwrap())
    }

    fn attached(&self) -> Attached {
        self.attached.recv_timeout(PATIENCE).expect("the proxy does not attach")
    }

    /// Ends it and all of its connections at once.
    fn kill(mut self) -> SocketAddr {
        self.runtime.take().unwrap().shutdown_background();
        self.address
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A proxy that is told of a control plane.
fn proxy(control: SocketAddr, root: &str, dir: &Path) -> Proxy {
    std::fs::write(dir.join("root.pem"), root).unwrap();
    std::fs::write(dir.join("token"), "the-first-token\n").unwrap();
    let echo = server(|mut stream| {
        let mut buffer = [0; 64];
        while let Ok(n @ 1..) = stream.read(&mut buffer) {
            stream.write_all(&buffer[..n]).unwrap();
        }
    });
    let more = format!(
        "control: {{address: '{control}', root: {0}/root.pem, token: {0}/token}}\naddresses: [127.0.0.1]\n\
         workload: {{pod: p-1, name: before, namespace: shop, serviceAccount: shop}}\nports: {{7070: tcp}}",
        dir.display()
    );
    Proxy::start_unready(echo, "tcp", &more)
}

fn forwards(proxy: &Proxy) {
    let mut client: TcpStream = proxy.connect();
    client.write_all(b"ping").unwrap();
    let mut back = [0; 4];
    client.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"ping");
}

/// What it runs with, as JSON.
fn config(proxy: &Proxy) -> serde_json::Value {
    let answer = proxy.get("/config").unwrap();
    serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
}

#[test]
fn it_says_who_it_is_and_what_it_is_told_is_in_force() {
    let (authority, dir) = (Authority::new(), tempfile::tempdir().unwrap());
    let control = ControlPlane::any(&authority);
    let proxy = proxy(control.address, &authority.root, dir.path());
    let attached = control.attached();
    assert_eq!(attached.token, "Bearer the-first-token");
    let proxy_message::Kind::Hello(hello) = attached.next() else { panic!("the first message is no Hello") };
    assert_eq!((hello.pod.as_str(), hello.namespace.as_str(), hello.addresses), ("p-1", "shop", vec!["127.0.0.1".to_owned()]));
    proxy.expect_metric("weft_proxy_control_connected", " 1");
    assert_eq!(config(&proxy)["inbound"]["version"], 0);
    // Nobody has signed a certificate for it: it forwards, but is not ready, and says why.
    let answer = proxy.get("/healthz/ready").unwrap();
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("no certificate yet"), "{answer}");
    forwards(&proxy);

    assert_eq!(attached.configure(3, 8080, "web").error, "");
    let now = config(&proxy);
    assert_eq!((&now["inbound"]["version"], &now["inbound"]["workload"]["name"]), (&3.into(), &"web".into()));
    assert_eq!(now["inbound"]["ports"]["8080"]["protocol"], "http1");
    assert!(now["inbound"]["ports"].get("7070").is_none(), "a configuration is whole");
    proxy.expect_metric("weft_proxy_config_version", " 3");
}

#[test]
fn a_bad_message_is_refused_as_a_whole_and_the_last_good_one_stays() {
    let (authority, dir) = (Authority::new(), tempfile::tempdir().unwrap());
    let control = ControlPlane::any(&authority);
    let mut proxy = proxy(control.address, &authority.root, dir.path());
    let attached = control.attached();
    assert_eq!(attached.configure(1, 8080, "web").error, "");
    let error = attached.configure(2, 0, "worse").error;
    assert!(error.contains("ports: 0 is no port"), "{error}");
    let now = config(&proxy);
    assert_eq!((&now["inbound"]["version"], &now["inbound"]["workload"]["name"]), (&1.into(), &"web".into()));
    proxy.expect_metric("weft_proxy_config_version", " 1");
    forwards(&proxy);
    // The stream goes on.
    assert_eq!(attached.configure(3, 9090, "better").error, "");
    assert_eq!(config(&proxy)["inbound"]["workload"]["name"], "better");
    proxy.signal(nix::sys::signal::Signal::SIGTERM);
    let (_, log) = proxy.end();
    assert!(log.contains("refused, the last good") && log.contains("ports: 0 is no port"), "{log}");
}

#[test]
fn what_was_learnt_outlives_the_control_plane_and_the_proxy_comes_back() {
    let (authority, dir) = (Authority::new(), tempfile::tempdir().unwrap());
    let control = ControlPlane::any(&authority);
    let proxy = proxy(control.address, &authority.root, dir.path());
    let attached = control.attached();
    assert_eq!(attached.configure(5, 8080, "web").error, "");

    // The stream ends in good order: it comes back at once, with the token of now.
    std::fs::write(dir.path().join("token"), "the-second-token").unwrap();
    drop(attached);
    let attached = control.attached();
    assert_eq!(attached.token, "Bearer the-second-token");
    assert!(matches!(attached.next(), proxy_message::Kind::Hello(_)));

    // The process ends, connections with it.
    drop(attached);
    let address = control.kill();
    proxy.expect_metric("weft_proxy_control_connected", " 0");
    forwards(&proxy);
    assert_eq!(config(&proxy)["inbound"]["workload"]["name"], "web");

    // Another one begins its versions anew.
    let control = ControlPlane::start(&authority, address);
    let attached = control.attached();
    assert_eq!(attached.configure(1, 8081, "new").error, "");
    assert_eq!(config(&proxy)["inbound"]["workload"]["name"], "new");
    proxy.expect_metric("weft_proxy_control_connected", " 1");
}

#[test]
fn a_refused_token_leaves_forwarding_alone_and_attempts_back_off() {
    let (authority, dir) = (Authority::new(), tempfile::tempdir().unwrap());
    let control = ControlPlane::any(&authority);
    control.refuses.store(true, Ordering::SeqCst);
    let mut proxy = proxy(control.address, &authority.root, dir.path());
    let mut at = Vec::new();
    for _ in 0..4 {
        at.push(control.attempts.recv_timeout(PATIENCE).unwrap());
        forwards(&proxy);
    }
    // Half of 200 ms, 400 ms, 800 ms at the least.
    for (n, pair) in at.windows(2).enumerate() {
        let (waited, least) = (pair[1] - pair[0], Duration::from_millis(100 << n));
        assert!(waited >= least, "attempt {} came after {waited:?}", n + 2);
    }
    proxy.expect_metric("weft_proxy_control_connected", " 0");
    // And when the token is right again, all is well.
    control.refuses.store(false, Ordering::SeqCst);
    assert_eq!(control.attached().configure(1, 8080, "web").error, "");
    proxy.expect_metric("weft_proxy_control_connected", " 1");
    proxy.signal(nix::sys::signal::Signal::SIGTERM);
    let (_, log) = proxy.end();
    let lines = log.lines().filter(|line| line.contains("can't be reached") && line.contains("not for this cluster")).count();
    assert_eq!(lines, 1, "the same trouble is said once: {log}");
}

#[test]
fn a_control_plane_with_a_certificate_of_another_root_gets_nothing() {
    let (authority, other, dir) = (Authority::new(), Authority::new(), tempfile::tempdir().unwrap());
    let control = ControlPlane::any(&authority);
    let proxy = proxy(control.address, &other.root, dir.path());
    // It tries, and not even the token is sent.
    assert!(control.attempts.recv_timeout(Duration::from_millis(700)).is_err());
    proxy.expect_metric("weft_proxy_control_connected", " 0");
    forwards(&proxy);
    // The bundle is read anew: a rotation needs no restart.
    std::fs::write(dir.path().join("root.pem"), &authority.root).unwrap();
    assert_eq!(control.attached().configure(1, 8080, "web").error, "");
}

#[test]
fn without_a_bundle_or_a_token_it_waits_for_them() {
    let (authority, dir) = (Authority::new(), tempfile::tempdir().unwrap());
    let control = ControlPlane::any(&authority);
    let proxy = proxy(control.address, &authority.root, dir.path());
    drop(control.attached());
    std::fs::remove_file(dir.path().join("token")).unwrap();
    // Streams that were opened with the old token may still come.
    while control.attempts.recv_timeout(Duration::from_millis(1500)).is_ok() {
        let _ = control.attached.try_recv();
    }
    proxy.expect_metric("weft_proxy_control_connected", " 0");
    forwards(&proxy);
    std::fs::write(dir.path().join("token"), "back").unwrap();
    assert_eq!(control.attached().token, "Bearer back");
}
