//! The built proxy's admin port: probes of all kinds, who may change something, what it tells and what not; and `weft-proxy wait`.

mod binary;
mod netns;

use binary::{PATIENCE, Proxy, free, server};
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Bytes, Frame};
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::convert::Infallible;
use std::io::Read as _;
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

fn silent() -> SocketAddr {
    server(|mut stream| {
        let _ = stream.read(&mut [0; 16]);
    })
}

/// Runs a server of tokio's in a thread.
fn serve<F: Future<Output = ()>>(run: impl FnOnce(tokio::net::TcpListener) -> F + Send + 'static) -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move { run(tokio::net::TcpListener::from_std(listener).unwrap()).await });
    });
    port
}

/// An HTTPS server with a certificate that nobody has reason to trust.
fn https() -> u16 {
    let made = rcgen::generate_simple_self_signed(vec!["nobody.example".into()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    serve(move |listener| async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let Ok(stream) = acceptor.accept(stream).await else { continue };
            let service = hyper::service::service_fn(|request: hyper::Request<hyper::body::Incoming>| async move {
                let code = match request.uri().path() {
                    "/good" if request.headers()["user-agent"].to_str().unwrap().starts_with("kube-probe/") => 204,
                    "/moved" => 307,
                    _ => 418,
                };
                let mut response = hyper::Response::new(Full::<Bytes>::default());
                *response.status_mut() = code.try_into().unwrap();
                response.headers_mut().insert("location", "/good".parse().unwrap());
                Ok::<_, Infallible>(response)
            });
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        }
    })
}

/// A gRPC server that serves `ready` and a service with a long name, knows `stopped`, and no other.
fn grpc(long: String) -> u16 {
    serve(move |listener| async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let long = long.clone();
            let service = hyper::service::service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
                let long = long.clone();
                async move {
                    assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
                    assert_eq!(request.headers()["content-type"], "application/grpc");
                    let body = request.into_body().collect().await.unwrap().to_bytes();
                    let asked: HealthCheckRequest = decode(&body[5..]);
                    let (status, message) = match asked.0.as_str() {
                        "" | "ready" => ("0", Some([0, 0, 0, 0, 2, 8, 1])),
                        "stopped" => ("0", Some([0, 0, 0, 0, 2, 8, 2])),
                        name if name == long => ("0", Some([0, 0, 0, 0, 2, 8, 1])),
                        _ => ("5", None),
                    };
                    let mut trailers = hyper::HeaderMap::new();
                    trailers.insert("grpc-status", status.parse().unwrap());
                    let frames = message.map(|m| Frame::data(Bytes::copy_from_slice(&m))).into_iter();
                    let frames = frames.chain([Frame::trailers(trailers)]).map(Ok::<_, Infallible>);
                    Ok::<_, Infallible>(hyper::Response::new(StreamBody::new(futures::stream::iter(frames))))
                }
            });
            tokio::spawn(
                hyper::server::conn::http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service),
            );
        }
    })
}

struct HealthCheckRequest(String);

/// Field 1, a string: read by hand, so that it is not our own encoder that checks itself.
fn decode(mut message: &[u8]) -> HealthCheckRequest {
    if message.is_empty() {
        return HealthCheckRequest(String::new());
    }
    assert_eq!(message[0], 0x0a);
    message = &message[1..];
    let (mut length, mut shift) = (0, 0);
    loop {
        let byte = message[0];
        message = &message[1..];
        length |= usize::from(byte & 0x7f) << shift;
        shift += 7;
        if byte & 0x80 == 0 {
            break;
        }
    }
    assert_eq!(message.len(), length);
    HealthCheckRequest(String::from_utf8(message.to_vec()).unwrap())
}

#[test]
fn https_and_grpc_probes() {
    let long = "package.with.a.long.name.".repeat(8) + "Service";
    assert!(long.len() > 127);
    let (https, grpc, plain) = (https(), grpc(long.clone()), silent().port());
    let get = |port: u16, path: &str| format!("{{httpGet: {{path: {path}, port: {port}, scheme: HTTPS}}}}");
    let check = |port: u16, service: &str| format!("{{grpc: {{port: {port}, service: '{service}'}}}}");
    let probes = [
        ("s/livez", get(https, "/good"), "204"),
        ("s/readyz", get(https, "/bad"), "418"),
        ("s/startupz", get(https, "/moved"), "204"),
        ("p/livez", get(plain, "/good"), "500"),
        ("g/livez", check(grpc, ""), "200"),
        ("g/readyz", check(grpc, "ready"), "200"),
        ("g/startupz", check(grpc, "stopped"), "500"),
        ("h/livez", check(grpc, "unknown"), "500"),
        ("h/readyz", check(grpc, &long), "200"),
        ("h/startupz", check(https, ""), "500"),
    ];
    let mut more = "probes:\n".to_owned();
    for (name, probe, _) in &probes {
        more += &format!("  /app-health/{name}: {probe}\n");
    }
    let proxy = Proxy::start(silent(), "tcp", &more, None);
    for (name, _, code) in probes {
        let answer = proxy.get(&format!("/app-health/{name}")).unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {code} ")), "{name}: {answer}");
    }
}

#[test]
fn what_changes_something_is_for_the_pod_alone() {
    let (pod, outside) = netns::pod_and_outside();
    // In the pod, as the webhook configures it: the admin port is open to all, for the kubelet and Prometheus.
    let child = Command::new(env!("CARGO_BIN_EXE_weft-proxy"))
        .envs([("WEFT_POD_IPS", "10.66.0.2,fd66::2"), ("WEFT_WORKERS", "1")])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut proxy = Proxy { child, addr: free(), admin: "127.0.0.1:15020".parse().unwrap(), ready_after: Duration::ZERO, dir };
    let begun = Instant::now();
    while !proxy.get("/healthz/ready").is_some_and(|answer| answer.starts_with("HTTP/1.1 200")) {
        assert!(begun.elapsed() < PATIENCE, "the proxy does not become ready");
        std::thread::sleep(Duration::from_millis(5));
    }
    let changes =
        [("POST", "/drain"), ("POST", "/quitquitquit"), ("PUT", "/logging?level=debug"), ("POST", "/logging?level=debug")];
    outside.enter();
    for ip in ["10.66.0.2", "[fd66::2]"] {
        proxy.admin = format!("{ip}:15020").parse().unwrap();
        for path in ["/healthz/ready", "/healthz/live", "/stats/prometheus"] {
            assert!(proxy.get(path).unwrap().starts_with("HTTP/1.1 200"), "{path}");
        }
        for (method, path) in changes {
            assert!(proxy.ask(method, path).unwrap().starts_with("HTTP/1.1 403"), "{method} {path}");
        }
    }
    pod.enter();
    // Nothing of it was done, and from the pod, at whichever of its addresses, it is.
    for (ip, level) in [("127.0.0.1", "debug"), ("10.66.0.2", "info"), ("[fd66::2]", "debug"), ("[::1]", "info")] {
        proxy.admin = format!("{ip}:15020").parse().unwrap();
        let level = format!("weft_proxy={level}");
        assert!(!proxy.get("/logging").unwrap().ends_with(&format!("{level}\n")), "{ip}");
        assert!(proxy.ask("PUT", &format!("/logging?level={level}")).unwrap().starts_with("HTTP/1.1 200"), "{ip}");
        assert!(proxy.get("/logging").unwrap().ends_with(&format!("{level}\n")), "{ip}");
    }
    assert!(proxy.get("/healthz/ready").unwrap().starts_with("HTTP/1.1 200"));
    assert!(proxy.ask("POST", "/drain").unwrap().starts_with("HTTP/1.1 200"));
    assert!(proxy.get("/healthz/ready").unwrap().starts_with("HTTP/1.1 503"));
}

#[test]
fn the_configuration_that_is_told_holds_no_secret() {
    let dir = tempfile::tempdir().unwrap();
    let (root, token) = (dir.path().join("root.pem"), dir.path().join("token"));
    std::fs::write(&root, "a-secret-root").unwrap();
    std::fs::write(&token, "a-secret-token").unwrap();
    let more = format!(
        "control: {{address: '{}', root: {}, token: {}}}\n\
         probes: {{/app-health/a/livez: {{httpGet: {{port: 1, path: /p, httpHeaders: [{{name: Authorization, value: a-secret-header}}]}}}}}}",
        free(),
        root.display(),
        token.display()
    );
    let proxy = Proxy::start_unready(silent(), "tcp", &more);
    let told = proxy.get("/config").unwrap();
    assert!(told.contains(&token.display().to_string()), "where the token is, is told: {told}");
    for page in [told, proxy.get("/stats/prometheus").unwrap(), proxy.get("/app-health/a/livez").unwrap()] {
        assert!(!page.contains("a-secret"), "{page}");
    }
}

fn wait(admin: SocketAddr, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_weft-proxy"));
    command.arg("wait").args(arguments).env("WEFT_ADMIN_PORT", admin.port().to_string()).output().unwrap()
}

#[test]
fn wait_ends_when_the_proxy_is_ready() {
    // Nobody is there yet.
    let admin = free();
    let waiting = std::thread::spawn(move || wait(admin, &["--timeout=20s"]));
    std::thread::sleep(Duration::from_millis(200));
    assert!(!waiting.is_finished());
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("proxy.yaml");
    let yaml = format!("listeners: [{{address: {}, direction: outbound, upstream: {}}}]\nadmin: {admin}", free(), free());
    std::fs::write(&file, yaml).unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_weft-proxy")).arg("--config").arg(&file).stderr(Stdio::null()).spawn().unwrap();
    let proxy = Proxy { child, addr: free(), admin, ready_after: Duration::ZERO, dir };
    let done = waiting.join().unwrap();
    assert_eq!((done.status.code(), done.stderr.len()), (Some(0), 0), "{done:?}");
    assert_eq!(wait(admin, &[]).status.code(), Some(0), "the default is two minutes");

    // A proxy that drains is not ready.
    assert!(proxy.ask("POST", "/drain").unwrap().starts_with("HTTP/1.1 200"));
    let done = wait(admin, &["--timeout=1s"]);
    assert_eq!(done.status.code(), Some(1));
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(said.contains("not ready within 1 s") && said.contains("drains"), "{said}");
}

#[test]
fn wait_gives_up_in_time_and_minds_its_arguments() {
    let nobody = free();
    let begun = Instant::now();
    let done = wait(nobody, &["--timeout=1s"]);
    assert_eq!(done.status.code(), Some(1));
    assert!(begun.elapsed() >= Duration::from_secs(1) && begun.elapsed() < PATIENCE);
    for bad in [&["--timeout=soon"][..], &["now"], &["--timeout=1s", "more"]] {
        let done = wait(nobody, bad);
        assert_eq!(done.status.code(), Some(2), "{bad:?}");
        assert!(String::from_utf8_lossy(&done.stderr).contains("Usage"), "{bad:?}");
    }
    // A server that is no proxy, and says nothing.
    let mute = server(|stream: TcpStream| {
        std::thread::sleep(PATIENCE);
        drop(stream);
    });
    assert_eq!(wait(mute, &["--timeout=1s"]).status.code(), Some(1));
}
