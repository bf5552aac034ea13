//! Policy on the wire: who is let in, what is answered, what the app gets to see; over real sockets.

mod support;

use arc_swap::ArcSwap;
use std::cell::Cell;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};
use support::{App, Peer, field};
use weft_api::wire;
use weft_api::wire::external_authorizer::Protocol as Asks;
use weft_api::wire::string_match::Kind;
use weft_proxy::balance::Routes;
use weft_proxy::conn::{Arrival, Direction, Downstream, OrigDst};
use weft_proxy::connection::{self, Context};
use weft_proxy::directory::Directory;
use weft_proxy::drain::Drain;
use weft_proxy::http::{self, HttpVersion, Pool};
use weft_proxy::inbound::Config;
use weft_proxy::io::Prefixed;
use weft_proxy::settings::{Control, Listener, Protocol, Settings};
use weft_proxy::sys::Pipes;
use weft_proxy::telemetry::{Metrics, Recorder};
use weft_proxy::worker::Worker;

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
const FRONTEND: &str = "spiffe://cluster.local/ns/default/sa/frontend";

/// A proxy in front of an app, whose configuration can be changed.
struct Gate {
    addr: SocketAddr,
    config: Arc<ArcSwap<Config>>,
    metrics: Arc<Metrics>,
    drain: Drain,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Gate {
    /// `caller`: what clients have proved to be; HTTP only. None: plaintext, and everything that connections are.
    fn new(app: SocketAddr, protocol: Protocol, caller: Option<&str>, inbound: wire::Inbound) -> Self {
        Self::with(app, protocol, caller, Config::from_wire(1, inbound).unwrap())
    }

    fn with(app: SocketAddr, protocol: Protocol, caller: Option<&str>, config: Config) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let addr = listener.local_addr().unwrap();
        let config = Arc::new(ArcSwap::from_pointee(config));
        let metrics = Arc::new(Metrics::new(Arc::clone(&config)));
        let drain = Drain::new();
        let (watch, shared, counted) = (drain.watch(), Arc::clone(&config), Arc::clone(&metrics));
        let caller = caller.map(str::to_owned);
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let local = tokio::task::LocalSet::new();
            local.block_on(&runtime, async move {
                let mut settings = Settings::default();
                settings.timeouts.detect = Duration::from_millis(200);
                let worker = Rc::new(Worker {
                    settings: Arc::new(settings),
                    recorder: Recorder::new(counted, Rc::default()),
                    pool: Pool::new(),
                    drain: watch,
                    config: shared,
                    routes: Routes::new(Arc::new(Directory::closed()), Rc::default()),
                    identity: None,
                });
                let context = Rc::new(Context { worker: Rc::clone(&worker), pipes: Pipes::default(), clients: Cell::new(0) });
                let way =
                    Listener { address: addr, direction: Direction::Inbound, upstream: Some(app), protocol, optional: false };
                let way = Rc::new(way);
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                let accepting = async {
                    loop {
                        let (stream, peer) = listener.accept().await.unwrap();
                        let Some(caller) = &caller else {
                            tokio::task::spawn_local(connection::serve(stream, peer, Rc::clone(&way), Rc::clone(&context)));
                            continue;
                        };
                        let local = stream.local_addr().unwrap();
                        let original = OrigDst(app);
                        let (direction, accepted) = (Direction::Inbound, Instant::now());
                        let down = Downstream { peer, local, original, direction, accepted, principal: None, fixed: true };
                        let arrival = Arrival { caller: Some(caller.as_str().into()), ..Arrival::from(down) };
                        let io = Prefixed::new(bytes::Bytes::new(), stream.into());
                        tokio::task::spawn_local(http::serve(io, HttpVersion::Auto, arrival, Rc::clone(&worker)));
                    }
                };
                tokio::select! { () = accepting => {}, _ = stopped => {} }
            });
        });
        Self { addr, config, metrics, drain, stop: Some(stop), thread: Some(thread) }
    }

    fn connect(&self) -> Peer {
        Peer::new(TcpStream::connect(self.addr).unwrap())
    }

    fn set(&self, inbound: wire::Inbound) {
        self.config.store(Arc::new(Config::from_wire(2, inbound).unwrap()));
        self.drain.changed();
    }

    /// One request over a connection of its own: the response's head and body.
    fn ask(&self, request: &str) -> (String, String) {
        let mut client = self.connect();
        client.send(request);
        let (head, body) = client.message().expect("an answer");
        (head, String::from_utf8(body).unwrap())
    }

    fn get(&self, path: &str) -> u16 {
        status(&self.ask(&format!("GET {path} HTTP/1.1\r\nHost: app\r\n\r\n")).0)
    }

    fn counted(&self, labels: &[&str]) -> bool {
        let text = self.metrics.text();
        text.lines().any(|line| line.starts_with("weft_authz_total") && labels.iter().all(|label| line.contains(label)))
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        drop(self.stop.take());
        let ended = self.thread.take().unwrap().join();
        if !thread::panicking() {
            ended.unwrap();
        }
    }
}

fn status(head: &str) -> u16 {
    head.split(' ').nth(1).unwrap().parse().unwrap()
}

fn is(text: &str) -> wire::StringMatch {
    wire::StringMatch { kind: Some(Kind::Exact(text.into())) }
}

fn policy(name: &str, action: wire::AuthorizationAction, rules: Vec<wire::AuthorizationRule>) -> wire::AuthorizationPolicy {
    wire::AuthorizationPolicy {
        namespace: "default".into(),
        name: name.into(),
        action: action.into(),
        rules,
        ..Default::default()
    }
}

fn to(operation: wire::Operation) -> wire::AuthorizationRule {
    wire::AuthorizationRule { to: vec![operation], ..Default::default() }
}

fn path(path: &str) -> wire::AuthorizationRule {
    to(wire::Operation { paths: vec![is(path)], ..Default::default() })
}

fn inbound(authorization: Vec<wire::AuthorizationPolicy>) -> wire::Inbound {
    let workload = wire::Workload { namespace: "default".into(), service_account: "app".into(), ..Default::default() };
    wire::Inbound { authorization, workload: Some(workload), trust_domains: vec!["cluster.local".into()], ..Default::default() }
}

use wire::AuthorizationAction::{Allow, Audit, Custom, Deny};

#[test]
fn http_is_judged_by_its_canonical_path_and_that_is_what_the_app_gets() {
    let (app, seen) = App::answering(OK);
    let policies = vec![policy("admin", Deny, vec![path("/admin")]), policy("log", Audit, vec![path("/a/c")])];
    let gate = Gate::new(app.addr, Protocol::Http, None, inbound(policies));
    for hidden in ["/admin", "/x/../admin", "/%61dmin", "/./admin", "/x\\..\\admin", "/admin?x=1", "/x/%2e%2e/admin"] {
        let (head, body) = gate.ask(&format!("GET {hidden} HTTP/1.1\r\nHost: app\r\n\r\n"));
        assert_eq!((status(&head), body.as_str()), (403, "RBAC: access denied"), "{hidden}");
        // Plaintext callers are not told more.
        assert_eq!(field(&head, "x-weft-denied-by"), None);
        assert_eq!(field(&head, "content-type"), Some("text/plain"));
    }
    assert_eq!(app.accepted(), 0, "nothing reached the app");
    assert_eq!(gate.get("/a/%62/../c?q=%2e"), 200);
    let (head, _) = seen.recv().unwrap();
    assert!(head.starts_with("GET /a/c?q=%2e HTTP/1.1\r\n"), "{head}");
    assert_eq!(gate.get("/%00"), 400);
    assert!(gate.counted(&["action=\"DENY\"", "policy=\"default/admin\"", "result=\"denied\""]), "{}", gate.metrics.text());
    assert!(gate.counted(&["action=\"AUDIT\"", "policy=\"default/log\"", "result=\"audited\""]));
}

#[test]
fn a_connection_goes_on_after_a_refusal_and_a_new_policy_counts_at_the_next_request() {
    let (app, _seen) = App::answering(OK);
    let gate = Gate::new(app.addr, Protocol::Http, None, inbound(vec![policy("p", Allow, vec![path("/a")])]));
    let mut client = gate.connect();
    let mut ask = |path: &str| {
        client.send(format!("POST {path} HTTP/1.1\r\nHost: app\r\nContent-Length: 5\r\n\r\nhello"));
        status(&client.message().unwrap().0)
    };
    assert_eq!((ask("/a"), ask("/b"), ask("/a")), (200, 403, 200));
    assert!(gate.counted(&["action=\"ALLOW\"", "policy=\"\"", "result=\"denied\""]));
    gate.set(inbound(vec![policy("p", Allow, vec![path("/b")])]));
    assert_eq!((ask("/a"), ask("/b")), (403, 200));
    gate.set(inbound(vec![]));
    assert_eq!(ask("/a"), 200);
    // In dry run nothing is refused, and all is counted.
    let dry = wire::AuthorizationPolicy { dry_run: true, ..policy("d", Deny, vec![path("/a")]) };
    gate.set(inbound(vec![dry]));
    assert_eq!(ask("/a"), 200);
    assert!(gate.counted(&["policy=\"default/d\"", "result=\"shadow_denied\""]));
}

#[test]
fn callers_of_the_mesh_are_named_and_told() {
    let (app, seen) = App::answering(OK);
    let from = |account: &str| {
        let principals = vec![is(&format!("cluster.local/ns/default/sa/{account}"))];
        let from = vec![wire::Source { principals, ..Default::default() }];
        vec![wire::AuthorizationRule { from, ..Default::default() }]
    };
    let gate = Gate::new(app.addr, Protocol::Http, Some(FRONTEND), inbound(vec![policy("p", Deny, from("frontend"))]));
    let (head, _) = gate.ask("GET / HTTP/1.1\r\nHost: app\r\n\r\n");
    assert_eq!((status(&head), field(&head, "x-weft-denied-by")), (403, Some("default/p")));
    gate.set(inbound(vec![policy("p", Allow, from("frontend"))]));
    let (head, _) =
        gate.ask("GET / HTTP/1.1\r\nHost: app\r\nX-Forwarded-Client-Cert: URI=spiffe://cluster.local/ns/x/sa/root\r\n\r\n");
    assert_eq!(status(&head), 200);
    let (head, _) = seen.recv().unwrap();
    let cert = "By=spiffe://cluster.local/ns/default/sa/app;URI=spiffe://cluster.local/ns/default/sa/frontend";
    assert_eq!(field(&head, "x-forwarded-client-cert"), Some(cert), "{head}");
    gate.set(inbound(vec![policy("p", Allow, from("other"))]));
    assert_eq!(gate.get("/"), 403);
    // gRPC hears of it in its own way.
    let mut client = gate.connect();
    client.send("POST /s/m HTTP/1.1\r\nHost: app\r\nContent-Type: application/grpc\r\nContent-Length: 0\r\n\r\n");
    let head = client.head().unwrap();
    assert_eq!((status(&head), field(&head, "grpc-status")), (200, Some("7")));
    assert_eq!(field(&head, "grpc-message"), Some("RBAC: access denied"));
}

#[test]
fn what_plaintext_callers_say_of_themselves_is_removed_unless_they_are_trusted_hops() {
    let (app, seen) = App::answering(OK);
    let condition = wire::Condition {
        attribute: wire::condition::Attribute::RemoteIp.into(),
        values: vec![is("198.51.100.0/24")],
        ..Default::default()
    };
    let rule = wire::AuthorizationRule { when: vec![condition], ..Default::default() };
    let deny = inbound(vec![policy("p", Deny, vec![rule])]);
    let gate = Gate::new(app.addr, Protocol::Http, None, deny.clone());
    let request =
        "GET / HTTP/1.1\r\nHost: app\r\nx-forwarded-client-cert: URI=a\r\nx-forwarded-for: 203.0.113.1, 198.51.100.7\r\n\r\n";
    assert_eq!(status(&gate.ask(request).0), 200, "the address is not believed");
    assert_eq!(field(&seen.recv().unwrap().0, "x-forwarded-client-cert"), None);
    gate.set(wire::Inbound { trusted_hops: vec!["127.0.0.0/8".into()], ..deny });
    assert_eq!(status(&gate.ask(request).0), 403, "the address is believed");
    gate.set(wire::Inbound { trusted_hops: vec!["127.0.0.0/8".into()], ..inbound(vec![]) });
    assert_eq!(status(&gate.ask(request).0), 200);
    assert_eq!(field(&seen.recv().unwrap().0, "x-forwarded-client-cert"), Some("URI=a"));
}

#[test]
fn tokens() {
    use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
    use base64::Engine as _;
    let b64 = |bytes: &[u8]| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes);
    let pair = Ed25519KeyPair::generate().unwrap();
    let jwks = format!(r#"{{"keys":[{{"kty":"OKP","crv":"Ed25519","x":"{}"}}]}}"#, b64(pair.public_key().as_ref()));
    let token = |claims: &str| {
        let signed = format!("{}.{}", b64(br#"{"alg":"EdDSA"}"#), b64(claims.as_bytes()));
        format!("{signed}.{}", b64(pair.sign(signed.as_bytes()).as_ref()))
    };
    let rule = wire::JwtRule {
        issuer: "iss".into(),
        audiences: vec!["aud".into()],
        jwks,
        output_claim_to_headers: vec![wire::ClaimToHeader { header: "X-User".into(), claim: "sub".into() }],
        output_payload_to_header: "x-payload".into(),
        ..Default::default()
    };
    let required = wire::Source {
        request_principals: vec![wire::StringMatch { kind: Some(Kind::Prefix("iss/".into())) }],
        ..Default::default()
    };
    let required = vec![wire::AuthorizationRule { from: vec![required], ..Default::default() }];
    let (app, seen) = App::answering(OK);
    let open = wire::Inbound { jwt: vec![rule], ..inbound(vec![]) };
    let gate = Gate::new(app.addr, Protocol::Http, None, open.clone());
    let ask = |gate: &Gate, more: &str| {
        gate.ask(&format!("GET /a?b=c HTTP/1.1\r\nHost: app:80\r\nX-User: root\r\nx-payload: forged\r\n{more}\r\n"))
    };
    // No token: let in, but what only tokens may say is removed.
    assert_eq!(status(&ask(&gate, "").0), 200);
    let (head, _) = seen.recv().unwrap();
    assert_eq!((field(&head, "x-user"), field(&head, "x-payload")), (None, None), "{head}");
    // A good one.
    let good = token(r#"{"iss":"iss","sub":"me","aud":"aud"}"#);
    assert_eq!(status(&ask(&gate, &format!("Authorization: Bearer {good}\r\n")).0), 200);
    let (head, _) = seen.recv().unwrap();
    assert_eq!((field(&head, "x-user"), field(&head, "authorization")), (Some("me"), None), "{head}");
    assert_eq!(field(&head, "x-payload"), good.split('.').nth(1));
    // Bad ones.
    for (claims, code, text) in [
        (r#"{"iss":"iss","sub":"me","aud":"aud","exp":1}"#, 401, "Jwt is expired"),
        (r#"{"iss":"other","sub":"me","aud":"aud"}"#, 401, "Jwt issuer is not configured"),
        (r#"{"iss":"iss","sub":"me","aud":"x"}"#, 403, "Audiences in Jwt are not allowed"),
    ] {
        let (head, body) = ask(&gate, &format!("Authorization: Bearer {}\r\n", token(claims)));
        assert_eq!((status(&head), body.as_str()), (code, text));
        assert_eq!(field(&head, "www-authenticate"), Some(r#"Bearer realm="http://app:80/a?b=c", error="invalid_token""#));
    }
    // With the signature of another token.
    let (signed, _) = good.rsplit_once('.').unwrap();
    let other = token(r#"{"iss":"iss","sub":"root","aud":"aud"}"#);
    let forged = format!("{signed}.{}", other.rsplit_once('.').unwrap().1);
    assert_eq!(ask(&gate, &format!("Authorization: Bearer {forged}\r\n")).1, "Jwt verification fails");
    // A browser's question beforehand is not held up by it.
    let preflight = "OPTIONS / HTTP/1.1\r\nHost: a\r\nOrigin: http://o\r\nAccess-Control-Request-Method: GET\r\nAuthorization: Bearer x\r\n\r\n";
    assert_eq!(status(&gate.ask(preflight).0), 200);
    // That there is one is a matter of authorization.
    gate.set(wire::Inbound { authorization: vec![policy("jwt", Allow, required)], ..open });
    assert_eq!(status(&ask(&gate, "").0), 403);
    assert_eq!(status(&ask(&gate, &format!("Authorization: Bearer {good}\r\n")).0), 200);
}

/// Reads to the end: whether that was a reset, and what came before.
fn ending(client: &mut TcpStream) -> (bool, Vec<u8>) {
    client.set_read_timeout(Some(support::PATIENCE)).unwrap();
    let mut all = Vec::new();
    let reset = client.read_to_end(&mut all).is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset);
    (reset, all)
}

fn net(block: &str) -> Vec<wire::AuthorizationRule> {
    let from = vec![wire::Source { ip_blocks: vec![block.into()], ..Default::default() }];
    vec![wire::AuthorizationRule { from, ..Default::default() }]
}

fn echo() -> App {
    App::new(|mut peer, _| {
        peer.stream.set_read_timeout(None).unwrap();
        let mut buffer = [0; 64];
        while let Ok(n @ 1..) = peer.stream.read(&mut buffer) {
            peer.stream.write_all(&buffer[..n]).unwrap();
        }
    })
}

#[test]
fn opaque_connections_are_reset_before_the_app_hears_of_them() {
    let app = echo();
    // Only HTTP is asked for: on TCP an ALLOW of it can't match, and a DENY of it matches everything.
    for policies in [
        vec![policy("p", Allow, vec![path("/a")])],
        vec![policy("p", Deny, vec![path("/a")])],
        vec![policy("p", Deny, net("127.0.0.1"))],
    ] {
        for protocol in [Protocol::Tcp, Protocol::Detect] {
            let gate = Gate::new(app.addr, protocol, None, inbound(policies.clone()));
            let mut client = TcpStream::connect(gate.addr).unwrap();
            client.write_all(b"\x00\x01hello").unwrap();
            assert_eq!(ending(&mut client), (true, vec![]), "{protocol:?} {policies:?}");
        }
    }
    assert_eq!(app.accepted(), 0);
    let gate = Gate::new(app.addr, Protocol::Tcp, None, inbound(vec![policy("p", Allow, net("127.0.0.0/8"))]));
    let mut client = TcpStream::connect(gate.addr).unwrap();
    client.write_all(b"ping").unwrap();
    let mut back = [0; 4];
    client.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"ping");
    assert!(gate.counted(&["policy=\"default/p\"", "result=\"allowed\""]));
}

#[test]
fn a_server_that_speaks_first_is_not_even_connected() {
    let app = App::new(|mut peer, _| peer.send(b"220 hello\r\n"));
    let gate = Gate::new(app.addr, Protocol::Detect, None, inbound(vec![policy("p", Deny, net("127.0.0.1"))]));
    assert_eq!(ending(&mut TcpStream::connect(gate.addr).unwrap()), (true, vec![]));
    assert_eq!(app.accepted(), 0);
    gate.set(inbound(vec![]));
    let mut client = gate.connect();
    assert_eq!(client.until("\r\n"), "220 hello\r\n");
}

#[test]
fn open_connections_that_are_no_longer_allowed_are_closed() {
    let app = echo();
    let gate = Gate::new(app.addr, Protocol::Tcp, None, inbound(vec![]));
    let mut client = TcpStream::connect(gate.addr).unwrap();
    client.write_all(b"ping").unwrap();
    client.read_exact(&mut [0; 4]).unwrap();
    // What does not concern it changes nothing.
    gate.set(inbound(vec![policy("p", Deny, net("10.0.0.0/8"))]));
    client.write_all(b"ping").unwrap();
    client.read_exact(&mut [0; 4]).unwrap();
    gate.set(inbound(vec![policy("p", Deny, net("127.0.0.0/8"))]));
    let began = Instant::now();
    let (_, rest) = ending(&mut client);
    assert!(rest.is_empty() && began.elapsed() < Duration::from_secs(5), "at once, not after a drain");
}

#[test]
fn before_the_control_plane_has_spoken_nobody_is_let_in() {
    let app = echo();
    let control = Control { address: "127.0.0.1:1".into(), root: "/nowhere".into(), token: "/nowhere".into() };
    let config = Config::initial(&Settings { control: Some(control), ..Settings::default() });
    let gate = Gate::with(app.addr, Protocol::Http, None, config.clone());
    assert_eq!(gate.get("/"), 503);
    let gate = Gate::with(app.addr, Protocol::Tcp, None, config);
    assert!(ending(&mut TcpStream::connect(gate.addr).unwrap()).0);
    assert_eq!(app.accepted(), 0);
    // Without a control plane there is no policy to wait for.
    let (app, _seen) = App::answering(OK);
    assert_eq!(Gate::with(app.addr, Protocol::Http, None, Config::initial(&Settings::default())).get("/%61"), 200);
}

fn asks(authorizer: wire::ExternalAuthorizer) -> wire::Inbound {
    inbound(vec![wire::AuthorizationPolicy { authorizer: Some(authorizer), ..policy("ext", Custom, vec![path("/a")]) }])
}

fn over_http(address: SocketAddr) -> wire::ExternalAuthorizer {
    let http = wire::HttpAuthorizer {
        path_prefix: "/check".into(),
        include_request_headers: vec![is("X-Asked")],
        additional_headers: [("x-more".to_owned(), "1".to_owned())].into(),
        headers_to_upstream_on_allow: vec![is("x-user")],
        headers_to_downstream_on_allow: vec![is("x-seen")],
        headers_to_downstream_on_deny: vec![is("x-why")],
    };
    wire::ExternalAuthorizer {
        name: "ext".into(),
        address: address.to_string(),
        timeout_ms: 1000,
        protocol: Some(Asks::Http(http)),
        ..Default::default()
    }
}

#[test]
fn an_authorizer_over_http_decides() {
    let (app, seen) = App::answering(OK);
    let (judge, asked) =
        App::answering("HTTP/1.1 200 OK\r\nx-user: me\r\nx-seen: yes\r\nx-other: no\r\ncontent-length: 0\r\n\r\n");
    let gate = Gate::new(app.addr, Protocol::Http, None, asks(over_http(judge.addr)));
    let request = "POST /a?q HTTP/1.1\r\nHost: app\r\nX-Asked: 1\r\nX-Not: 1\r\nx-user: forged\r\nAuthorization: Basic x\r\nContent-Length: 5\r\n\r\nhello";
    let (head, _) = gate.ask(request);
    assert_eq!((status(&head), field(&head, "x-seen"), field(&head, "x-other")), (200, Some("yes"), None));
    let (question, body) = asked.recv().unwrap();
    assert!(question.starts_with("POST /check/a?q HTTP/1.1\r\n") && body.is_empty(), "{question}");
    assert_eq!(
        (field(&question, "host"), field(&question, "x-asked"), field(&question, "x-more")),
        (Some("app"), Some("1"), Some("1"))
    );
    assert_eq!((field(&question, "x-not"), field(&question, "authorization")), (None, Some("Basic x")));
    let (head, body) = seen.recv().unwrap();
    assert_eq!((field(&head, "x-user"), body.as_slice()), (Some("me"), &b"hello"[..]), "{head}");
    // Requests that no CUSTOM policy matches are not asked about.
    assert_eq!(gate.get("/b"), 200);
    assert!(asked.try_recv().is_err());

    let (judge, _asked) = App::answering("HTTP/1.1 418 No\r\nx-why: tea\r\nx-other: no\r\ncontent-length: 6\r\n\r\nno tea");
    gate.set(asks(over_http(judge.addr)));
    let (head, body) = gate.ask(request);
    assert_eq!(
        (status(&head), body.as_str(), field(&head, "x-why"), field(&head, "x-other")),
        (418, "no tea", Some("tea"), None)
    );
    assert!(gate.counted(&["action=\"CUSTOM\"", "policy=\"default/ext\"", "result=\"denied\""]));
}

#[test]
fn an_authorizer_that_cant_be_asked_refuses_unless_it_may_fail_open() {
    let (app, _seen) = App::answering(OK);
    let (broken, _asked) = App::answering("HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n");
    let silent = App::new(|peer, _| {
        thread::sleep(Duration::from_secs(5));
        drop(peer);
    });
    for at in [support::nobody(), broken.addr, silent.addr] {
        let closed = wire::ExternalAuthorizer { timeout_ms: 300, ..over_http(at) };
        let gate = Gate::new(app.addr, Protocol::Http, None, asks(closed.clone()));
        assert_eq!(gate.get("/a"), 403);
        gate.set(asks(wire::ExternalAuthorizer { status_on_error: 503, ..closed.clone() }));
        assert_eq!(gate.get("/a"), 503);
        gate.set(asks(wire::ExternalAuthorizer { fail_open: true, ..closed }));
        assert_eq!(gate.get("/a"), 200);
    }
    // Nobody is named.
    let nobody = inbound(vec![policy("ext", Custom, vec![path("/a")])]);
    assert_eq!(Gate::new(app.addr, Protocol::Http, None, nobody).get("/a"), 403);
}

#[test]
fn an_authorizer_gets_as_much_of_the_body_as_it_takes_and_the_app_all_of_it() {
    let (app, seen) = App::answering(OK);
    let (judge, asked) = App::answering("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
    let bodied =
        |max, partial| wire::ExternalAuthorizer { max_body_bytes: max, allow_partial_body: partial, ..over_http(judge.addr) };
    let gate = Gate::new(app.addr, Protocol::Http, None, asks(bodied(10, false)));
    let post = |body: &str| format!("POST /a HTTP/1.1\r\nHost: app\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let big = "0123456789abcdef".repeat(20_000);
    assert_eq!(status(&gate.ask(&post("0123456789")).0), 200);
    assert_eq!(asked.recv().unwrap().1, b"0123456789");
    assert_eq!(seen.recv().unwrap().1, b"0123456789");
    let chunked = "POST /a HTTP/1.1\r\nHost: app\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n";
    assert_eq!(status(&gate.ask(chunked).0), 200);
    assert_eq!(asked.recv().unwrap().1, b"abcde");
    assert_eq!(seen.recv().unwrap().1, b"abcde");
    assert_eq!(status(&gate.ask(&post("0123456789a")).0), 413);
    gate.set(asks(bodied(10, true)));
    assert_eq!(status(&gate.ask(&post(&big)).0), 200);
    assert_eq!(asked.recv().unwrap().1, b"0123456789");
    assert_eq!(seen.recv().unwrap().1, big.as_bytes());
}

/// A gRPC authorizer: answers every question with the same bytes, and hands on what it was asked.
fn grpc(answer: Vec<u8>) -> (SocketAddr, mpsc::Receiver<(String, Vec<u8>)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    listener.set_nonblocking(true).unwrap();
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (sender, answer) = (sender.clone(), answer.clone());
                tokio::spawn(async move {
                    let mut connection = h2::server::handshake(stream).await.unwrap();
                    while let Some(Ok((request, mut respond))) = connection.accept().await {
                        let (sender, answer) = (sender.clone(), answer.clone());
                        tokio::spawn(async move {
                            let (head, mut body) = request.into_parts();
                            let mut question = Vec::new();
                            while let Some(data) = body.data().await {
                                question.extend_from_slice(&data.unwrap());
                            }
                            sender.send((head.uri.path().to_owned(), question)).unwrap();
                            let head = ::http::Response::builder().header("content-type", "application/grpc").body(()).unwrap();
                            let mut stream = respond.send_response(head, false).unwrap();
                            stream.send_data(answer.into(), false).unwrap();
                            let mut trailers = ::http::HeaderMap::new();
                            trailers.insert("grpc-status", "0".parse().unwrap());
                            stream.send_trailers(trailers).unwrap();
                        });
                    }
                });
            }
        });
    });
    (addr, receiver)
}

/// Protocol buffers by hand: a field of bytes, and one of a number.
fn part(tag: u8, bytes: &[u8]) -> Vec<u8> {
    [&[tag << 3 | 2, u8::try_from(bytes.len()).unwrap()], bytes].concat()
}

fn framed(message: &[u8]) -> Vec<u8> {
    [&[0], &u32::try_from(message.len()).unwrap().to_be_bytes()[..], message].concat()
}

fn over_grpc(address: SocketAddr) -> wire::ExternalAuthorizer {
    let protocol = Some(Asks::Grpc(wire::GrpcAuthorizer {}));
    wire::ExternalAuthorizer {
        name: "ext".into(),
        address: address.to_string(),
        timeout_ms: 2000,
        protocol,
        ..Default::default()
    }
}

#[test]
fn an_authorizer_over_grpc_decides() {
    let (app, seen) = App::answering(OK);
    let header = |key: &str, value: &str| part(1, &[part(1, key.as_bytes()), part(2, value.as_bytes())].concat());
    let ok = [part(2, &header("x-user", "me")), part(5, b"x-secret"), part(6, &header("x-seen", "yes"))].concat();
    let (judge, asked) = grpc(framed(&part(3, &ok)));
    let gate = Gate::new(app.addr, Protocol::Http, Some(FRONTEND), asks(over_grpc(judge)));
    let (head, _) = gate.ask("GET /a HTTP/1.1\r\nHost: app\r\nx-secret: 1\r\nx-user: forged\r\n\r\n");
    assert_eq!((status(&head), field(&head, "x-seen")), (200, Some("yes")));
    let (method, question) = asked.recv().unwrap();
    assert_eq!(method, "/envoy.service.auth.v3.Authorization/Check");
    let contains = |text: &str| question.windows(text.len()).any(|window| window == text.as_bytes());
    assert!(contains(FRONTEND) && contains("/a") && contains("x-secret") && contains(":method"));
    let (head, _) = seen.recv().unwrap();
    assert_eq!((field(&head, "x-user"), field(&head, "x-secret")), (Some("me"), None), "{head}");

    // PERMISSION_DENIED with an answer for the client.
    let denied = [part(1, &[8, 0xa2, 3]), part(2, &header("x-why", "because")), part(3, b"no")].concat();
    let (judge, _asked) = grpc(framed(&[part(1, &[8, 7]), part(2, &denied)].concat()));
    gate.set(asks(over_grpc(judge)));
    let (head, body) = gate.ask("GET /a HTTP/1.1\r\nHost: app\r\n\r\n");
    assert_eq!((status(&head), body.as_str(), field(&head, "x-why")), (418, "no", Some("because")));
    assert_eq!(field(&head, "x-weft-denied-by"), Some("default/ext"));
    // Nonsense is an error, and an error refuses.
    let (judge, _asked) = grpc(b"\0\0\0\0\x09xx".to_vec());
    gate.set(asks(over_grpc(judge)));
    assert_eq!(gate.get("/a"), 403);
}

#[test]
fn opaque_connections_are_asked_about_by_grpc() {
    let app = echo();
    let (judge, asked) = grpc(framed(&part(1, &[8, 7])));
    // The path can't be looked at: every connection is asked about.
    let gate = Gate::new(app.addr, Protocol::Tcp, None, asks(over_grpc(judge)));
    let mut client = TcpStream::connect(gate.addr).unwrap();
    assert_eq!(ending(&mut client), (true, vec![]));
    asked.recv().unwrap();
    assert_eq!(app.accepted(), 0);
    let (judge, _asked) = grpc(framed(&[]));
    gate.set(asks(over_grpc(judge)));
    let mut client = TcpStream::connect(gate.addr).unwrap();
    client.write_all(b"ping").unwrap();
    client.read_exact(&mut [0; 4]).unwrap();
}

#[test]
fn over_http2_a_refusal_is_of_one_stream() {
    let app = support::nobody();
    let deny = policy("p", Deny, vec![to(wire::Operation { methods: vec![is("POST")], ..Default::default() })]);
    let gate = Gate::new(app, Protocol::Http, None, inbound(vec![deny]));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let stream = tokio::net::TcpStream::connect(gate.addr).await.unwrap();
        let (mut client, connection) = h2::client::handshake(stream).await.unwrap();
        tokio::spawn(async move { connection.await.unwrap() });
        for (kind, status, grpc) in [("application/json", 403, None), ("application/grpc", 200, Some("7"))] {
            let request = ::http::Request::post("http://app/s/m").header("content-type", kind).body(()).unwrap();
            let (answer, mut body) = client.send_request(request, false).unwrap();
            body.send_data(bytes::Bytes::from_static(b"\0\0\0\0\0"), false).unwrap();
            let answer = answer.await.unwrap();
            assert_eq!(answer.status(), status);
            assert_eq!(answer.headers().get("grpc-status").map(|value| value.to_str().unwrap()), grpc);
            let mut text = Vec::new();
            let mut stream = answer.into_body();
            while let Some(data) = stream.data().await {
                text.extend_from_slice(&data.unwrap());
            }
            assert_eq!(text, if grpc.is_some() { &b""[..] } else { b"RBAC: access denied" });
        }
        // The connection serves others.
        let request = ::http::Request::get("http://app/").body(()).unwrap();
        let (answer, _) = client.send_request(request, true).unwrap();
        assert_eq!(answer.await.unwrap().status(), 503, "let in, and the app is away");
    });
}
