//! A mesh on loopback: a control plane that says whatever the test wants, certificates, and proxies as processes.
#![allow(dead_code, unreachable_pub, missing_docs)]

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Certificate, Identity as TlsIdentity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};
use weft_api::wire::discovery_server::{Discovery, DiscoveryServer};
use weft_api::wire::identity_server::{Identity, IdentityServer};
use weft_api::wire::{self, CertifyRequest, CertifyResponse, ControlMessage, ProxyMessage, TrustBundle};

pub const PATIENCE: Duration = Duration::from_secs(20);
pub const DOMAIN: &str = "cluster.local";

/// A port that was free a moment ago.
pub fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

pub fn spiffe(account: &str) -> String {
    format!("spiffe://{DOMAIN}/ns/default/sa/{account}")
}

/// An authority.
pub struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub fn der(&self) -> Vec<u8> {
        self.0.der().to_vec()
    }

    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// A proper leaf, for the test to spoil.
    pub fn leaf(uri: &str, life: Duration) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
        params.not_before = (SystemTime::now() - life / 10).into();
        params.not_after = (SystemTime::now() + life).into();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(SerialNumber::from(rand::random::<u64>() >> 1));
        params
    }

    pub fn sign(&self, params: CertificateParams, key: &impl PublicKeyData) -> Vec<u8> {
        params.signed_by(key, &self.0).unwrap().der().to_vec()
    }
}

/// What the control plane says. Whoever changes it calls [`Control::tell`].
pub struct State {
    /// Who signs leaves.
    pub ca: Ca,
    pub trust: TrustBundle,
    /// How long leaves live.
    pub life: Duration,
    /// What a pod's proxy is told of its own pod.
    pub inbound: HashMap<String, wire::Inbound>,
    /// By address.
    pub destinations: HashMap<String, wire::Destination>,
    /// Service account by pod; without one the pod's name.
    pub accounts: HashMap<String, String>,
    /// The trust domain in leaves.
    pub domain: String,
    /// Refuse certificates with this.
    pub no_certificates: Option<String>,
    /// What was answered.
    pub acks: Vec<(String, wire::Ack)>,
    /// What was asked for.
    pub watched: Vec<(String, String)>,
    /// Certificates issued, by pod.
    pub issued: HashMap<String, usize>,
    /// Streams that began, by pod.
    pub attached: HashMap<String, usize>,
    /// Tokens that callers showed.
    pub tokens: Vec<String>,
}

/// A control plane in a thread.
pub struct Control {
    pub addr: SocketAddr,
    pub dir: Arc<tempfile::TempDir>,
    pub state: Arc<Mutex<State>>,
    changes: Arc<watch::Sender<u64>>,
    stop: Option<watch::Sender<bool>>,
    thread: Option<thread::JoinHandle<()>>,
    serving: (String, String),
}

#[derive(Clone)]
struct Service {
    state: Arc<Mutex<State>>,
    changes: Arc<watch::Sender<u64>>,
    stop: watch::Receiver<bool>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn token<T>(request: &Request<T>) -> String {
    request.metadata().get("authorization").and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned()
}

#[tonic::async_trait]
impl Identity for Service {
    async fn certify(&self, request: Request<CertifyRequest>) -> Result<Response<CertifyResponse>, Status> {
        let mut state = lock(&self.state);
        state.tokens.push(token(&request));
        let request = request.into_inner();
        if let Some(why) = &state.no_certificates {
            return Err(Status::unauthenticated(why.clone()));
        }
        let csr = x509_parser::certification_request::X509CertificationRequest::from_der(&request.csr).unwrap().1;
        csr.verify_signature().unwrap();
        let key = SubjectPublicKeyInfo::from_der(csr.certification_request_info.subject_pki.raw).unwrap();
        let account = state.accounts.get(&request.pod).unwrap_or(&request.pod);
        let uri = format!("spiffe://{}/ns/default/sa/{account}", state.domain);
        let leaf = state.ca.sign(Ca::leaf(&uri, state.life), &key);
        *state.issued.entry(request.pod).or_default() += 1;
        Ok(Response::new(CertifyResponse { chain: vec![leaf], trust: Some(state.trust.clone()) }))
    }
}

use x509_parser::prelude::FromDer as _;

#[tonic::async_trait]
impl Discovery for Service {
    type AttachStream = ReceiverStream<Result<ControlMessage, Status>>;

    async fn attach(&self, request: Request<Streaming<ProxyMessage>>) -> Result<Response<Self::AttachStream>, Status> {
        lock(&self.state).tokens.push(token(&request));
        let mut messages = request.into_inner();
        let first = messages.message().await?.and_then(|m| m.kind);
        let Some(wire::proxy_message::Kind::Hello(hello)) = first else {
            return Err(Status::invalid_argument("no hello"));
        };
        *lock(&self.state).attached.entry(hello.pod.clone()).or_default() += 1;
        let (send, receive) = mpsc::channel(64);
        let service = self.clone();
        let mut changes = self.changes.subscribe();
        let mut stop = self.stop.clone();
        tokio::spawn(async move {
            let mut watched: Vec<String> = Vec::new();
            let mut version = 0;
            let mut due = true;
            loop {
                if std::mem::take(&mut due) {
                    let kinds: Vec<_> = {
                        let state = lock(&service.state);
                        let trust = Some(wire::control_message::Kind::Trust(state.trust.clone()));
                        // As the real one does: without it a proxy lets nobody in.
                        let inbound = state.inbound.get(&hello.pod).cloned().unwrap_or_default();
                        let inbound = Some(wire::control_message::Kind::Inbound(inbound));
                        let known = watched.iter().map(|address| {
                            let unknown = wire::Destination { address: address.clone(), ..Default::default() };
                            let known = state.destinations.get(address).cloned().unwrap_or(unknown);
                            Some(wire::control_message::Kind::Destination(known))
                        });
                        [trust, inbound].into_iter().chain(known).flatten().collect()
                    };
                    for kind in kinds {
                        version += 1;
                        if send.send(Ok(ControlMessage { version, kind: Some(kind) })).await.is_err() {
                            return;
                        }
                    }
                }
                tokio::select! {
                    message = messages.message() => match message {
                        Ok(Some(ProxyMessage { kind: Some(kind) })) => match kind {
                            wire::proxy_message::Kind::Ack(ack) => lock(&service.state).acks.push((hello.pod.clone(), ack)),
                            wire::proxy_message::Kind::Watch(watch) => {
                                lock(&service.state).watched.push((hello.pod.clone(), watch.address.clone()));
                                watched.push(watch.address);
                                due = true;
                            }
                            wire::proxy_message::Kind::Unwatch(unwatch) => watched.retain(|a| *a != unwatch.address),
                            _ => {}
                        },
                        _ => return,
                    },
                    changed = changes.changed() => { changed.unwrap(); due = true; }
                    _ = stop.wait_for(|stop| *stop) => return,
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receive)))
    }
}

impl Control {
    pub fn start() -> Self {
        let ca = Ca::new("root one");
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let serving = params.signed_by(&key, &ca.0).unwrap().pem();
        let dir = Arc::new(tempfile::tempdir().unwrap());
        std::fs::write(dir.path().join("root.pem"), ca.pem()).unwrap();
        std::fs::write(dir.path().join("token"), "a-token\n").unwrap();
        let trust =
            TrustBundle { roots: vec![ca.der()], trust_domain: DOMAIN.into(), issuer: b"one".to_vec(), ..TrustBundle::default() };
        let state = State {
            ca,
            trust,
            life: Duration::from_secs(3600),
            inbound: HashMap::new(),
            destinations: HashMap::new(),
            accounts: HashMap::new(),
            domain: DOMAIN.into(),
            no_certificates: None,
            acks: Vec::new(),
            watched: Vec::new(),
            issued: HashMap::new(),
            attached: HashMap::new(),
            tokens: Vec::new(),
        };
        let mut control = Self {
            addr: free(),
            dir,
            state: Arc::new(Mutex::new(state)),
            changes: Arc::new(watch::channel(0).0),
            stop: None,
            thread: None,
            serving: (serving, key.serialize_pem()),
        };
        control.up();
        control
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Changes what is said, and says it.
    pub fn tell(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changes.send_modify(|n| *n += 1);
    }

    /// Goes away: streams end, the port is closed.
    pub fn down(&mut self) {
        if let Some(stop) = self.stop.take() {
            stop.send_replace(true);
        }
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }

    /// Comes back, at the same address.
    pub fn up(&mut self) {
        let (stop, stopped) = watch::channel(false);
        let service = Service { state: Arc::clone(&self.state), changes: Arc::clone(&self.changes), stop: stopped.clone() };
        let (addr, (cert, key)) = (self.addr, self.serving.clone());
        let (ready, is_ready) = std::sync::mpsc::channel();
        self.stop = Some(stop);
        self.thread = Some(thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let begun = Instant::now();
                let listener = loop {
                    match tokio::net::TcpListener::bind(addr).await {
                        Ok(listener) => break listener,
                        Err(error) => assert!(begun.elapsed() < PATIENCE, "{error}"),
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                };
                ready.send(()).unwrap();
                let tls = ServerTlsConfig::new().identity(TlsIdentity::from_pem(cert, key));
                let mut end = stopped;
                let serving = Server::builder()
                    .tls_config(tls)
                    .unwrap()
                    .add_service(DiscoveryServer::new(service.clone()))
                    .add_service(IdentityServer::new(service))
                    .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener));
                // Whatever is open is cut.
                tokio::select! { result = serving => result.unwrap(), _ = end.wait_for(|stop| *stop) => {} }
            });
        }));
        is_ready.recv().unwrap();
    }

    /// An address that stands for `endpoints`, each with the accounts that may be there.
    pub fn service(&self, address: &str, protocol: wire::Protocol, endpoints: &[(SocketAddr, &[&str])]) {
        let endpoints = endpoints.iter().map(|(address, accounts)| wire::Endpoint {
            address: address.to_string(),
            identities: accounts.iter().map(|account| spiffe(account)).collect(),
            ..wire::Endpoint::default()
        });
        let service = wire::ServiceRef { name: "app".into(), namespace: "default".into(), host: "app.default.svc".into() };
        let destination = wire::Destination {
            address: address.into(),
            service: Some(service),
            protocol: protocol.into(),
            direct: false,
            endpoints: endpoints.collect(),
            ..wire::Destination::default()
        };
        self.tell(|state| drop(state.destinations.insert(address.into(), destination)));
    }

    /// Which connections a pod takes.
    pub fn mtls(&self, pod: &str, mode: wire::MtlsMode) {
        self.tell(|state| state.inbound.entry(pod.into()).or_default().mtls = mode.into());
    }

    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root.pem")
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.down();
    }
}

/// A proxy as a process.
pub struct Proxy {
    child: Child,
    pub addr: SocketAddr,
    pub admin: SocketAddr,
    dir: tempfile::TempDir,
}

impl Proxy {
    /// `direction` and where it goes; `more` are further lines of its file. Waits until it is ready.
    pub fn start(control: &Control, pod: &str, direction: &str, upstream: impl std::fmt::Display, more: &str) -> Self {
        Self::start_as(control, pod, direction, upstream, more, "ready")
    }

    /// Waits until `/healthz/…` says yes.
    pub fn start_as(
        control: &Control,
        pod: &str,
        direction: &str,
        upstream: impl std::fmt::Display,
        more: &str,
        until: &str,
    ) -> Self {
        // Another test may take a port between its choice and its use.
        for _ in 0..5 {
            let dir = tempfile::tempdir().unwrap();
            let (addr, admin) = (free(), free());
            let file = dir.path().join("proxy.yaml");
            let (root, token) = (control.root(), control.dir.path().join("token"));
            let yaml = format!(
                "listeners: [{{address: '{addr}', direction: {direction}, upstream: '{upstream}'}}]\n\
                 admin: {admin}\nworkers: 1\nlog: debug,h2=info,tonic=info,hyper=info,rustls=info\n\
                 workload: {{pod: {pod}, namespace: default}}\n\
                 control: {{address: 'localhost:{}', root: {}, token: {}}}\n{more}\n",
                control.addr.port(),
                root.display(),
                token.display()
            );
            std::fs::write(&file, yaml).unwrap();
            let log = std::fs::File::create(dir.path().join("log")).unwrap();
            let program = env!("CARGO_BIN_EXE_weft-proxy");
            let child = Command::new(program).arg("--config").arg(&file).stderr(Stdio::from(log)).spawn().unwrap();
            let mut proxy = Self { child, addr, admin, dir };
            let started = Instant::now();
            while started.elapsed() < PATIENCE {
                if proxy.get(&format!("/healthz/{until}")).is_some_and(|answer| answer.starts_with("HTTP/1.1 200")) {
                    return proxy;
                }
                if proxy.child.try_wait().unwrap().is_some() {
                    break;
                }
                thread::sleep(Duration::from_millis(5));
            }
            assert!(proxy.child.try_wait().unwrap().is_some(), "{pod} does not become {until}:\n{}", proxy.log());
        }
        panic!("{pod} does not start");
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.addr).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    pub fn get(&self, path: &str) -> Option<String> {
        let mut stream = TcpStream::connect(self.admin).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        write!(stream, "GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    }

    /// One HTTP/1 request over a connection of its own: status and body; 0: no answer.
    pub fn request(&self, head: &str) -> (u16, String) {
        let Ok(mut stream) = TcpStream::connect(self.addr) else { return (0, String::new()) };
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut answer = String::new();
        let sent = write!(stream, "{head}host: app\r\nconnection: close\r\n\r\n");
        let read = sent.and_then(|()| stream.read_to_string(&mut answer));
        let status = answer.get(9..12).and_then(|code| code.parse().ok()).unwrap_or(0);
        let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
        (status, body.unwrap_or_else(|| format!("{read:?}")))
    }

    /// Sum of the metric lines that begin so and contain all of `parts`.
    pub fn metric(&self, name: &str, parts: &[&str]) -> u64 {
        let page = self.get("/stats/prometheus").unwrap();
        page.lines()
            .filter(|line| line.starts_with(name) && parts.iter().all(|part| line.contains(part)))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum::<f64>() as u64
    }

    pub fn expect_metric(&self, name: &str, parts: &[&str], least: u64) {
        eventually(&format!("{name} {parts:?} of at least {least}"), || self.metric(name, parts) >= least);
    }

    pub fn certificate(&self) -> serde_json::Value {
        let answer = self.get("/config").unwrap();
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        serde_json::from_str::<serde_json::Value>(body).unwrap()["certificate"].take()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("--- log of {}:\n{}", self.addr, self.log());
        }
    }
}

/// Waits for a condition.
pub fn eventually(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "still not: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// An app whose every connection is handled by `serve` in a thread of its own.
pub fn app(serve: impl Fn(TcpStream) + Clone + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let serve = serve.clone();
            thread::spawn(move || serve(stream));
        }
    });
    addr
}

/// Answers each HTTP/1 request with its own head as the body.
pub fn mirror(mut stream: TcpStream) {
    stream.set_nodelay(true).unwrap();
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        while let Some(end) = seen.windows(4).position(|w| w == b"\r\n\r\n") {
            let head: Vec<u8> = seen.drain(..end + 4).collect();
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", head.len());
            if stream.write_all(&[answer.as_bytes(), &head].concat()).is_err() {
                return;
            }
        }
        match stream.read(&mut buffer) {
            Ok(n) if n > 0 => seen.extend_from_slice(&buffer[..n]),
            _ => return,
        }
    }
}

/// Sends everything back.
pub fn echo(mut stream: TcpStream) {
    let mut buffer = vec![0; 65536];
    while let Ok(n) = stream.read(&mut buffer) {
        if n == 0 || stream.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
}

/// What a client of the control plane needs to make certificates itself.
pub fn certificate(pem: &str) -> Certificate {
    Certificate::from_pem(pem)
}
