//! The console over real HTTP: what proxies report comes out of it, and only this machine's own names may ask.

use crate::discovery::{Proxy, attach, channel, hello, http_get, pod, ready, service};
use clap::Parser as _;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::Path;
use weft_api::wire::{self, ProxyMessage, Report, proxy_message};
use weft_control::flags::Flags;
use weft_control::run::Control;

pub(crate) async fn control(dir: &Path, objects: &[Value]) -> Control {
    let manifests = dir.join("manifests");
    std::fs::create_dir_all(&manifests).unwrap();
    let text: Vec<String> = objects.iter().map(Value::to_string).collect();
    std::fs::write(manifests.join("all.yaml"), text.join("\n---\n")).unwrap();
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let args = [
        "weft-control".to_owned(),
        format!("--manifests={}", path("manifests")),
        format!("--trust-bundle-out={}", path("root.pem")),
        format!("--config={}", path("none.yaml")),
        "--webhook-port=0".into(),
        "--control-port=0".into(),
        "--metrics-port=0".into(),
        "--console-port=0".into(),
        "--shutdown-delay=0".into(),
        "--identity=replica-1".into(),
    ];
    let control = Control::start(Flags::try_parse_from(args).unwrap()).await.unwrap();
    ready(control.addresses.metrics).await;
    control
}

async fn proxy(control: &Control, dir: &Path, namespace: &str, pod: &str) -> Proxy {
    let channel = channel(control.addresses.control, &std::fs::read_to_string(dir.join("root.pem")).unwrap()).await;
    attach(&channel, None, hello(namespace, pod)).await.unwrap()
}

async fn report(proxy: &Proxy, report: Report) {
    proxy.send.send(ProxyMessage { kind: Some(proxy_message::Kind::Report(report)) }).await.unwrap();
}

async fn get(address: SocketAddr, path: &str, head: &str) -> (u16, Value) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\n{head}Connection: close\r\n\r\n").as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let body = serde_json::from_str(body).unwrap_or_else(|e| panic!("{e}: {text}"));
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body)
}

async fn data(address: SocketAddr, path: &str) -> Value {
    let (status, mut answer) = get(address, path, "Host: localhost:15019\r\n").await;
    assert_eq!(status, 200, "{path}: {answer}");
    assert_eq!((answer["version"].as_str(), answer["replica"].as_str()), (Some(env!("CARGO_PKG_VERSION")), Some("replica-1")));
    answer["data"].take()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_proxies_report_can_be_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let mut caller = pod("web", "front-1", "front");
    caller["status"] = json!({"podIPs": [{"ip": "10.1.1.1"}]});
    let objects = [pod("shop", "cart-1", "cart"), service("shop", "cart", "cart", "http"), caller];
    let control = control(dir.path(), &objects).await;
    let console = control.addresses.console.unwrap();
    assert!(console.ip().is_loopback());
    let mut proxy = proxy(&control, dir.path(), "shop", "cart-1").await;
    proxy.next().await;

    let edge = |identity: &str, address: &str, path: &str, count: u64, denied: u64| wire::Edge {
        source_identity: identity.into(),
        source_address: address.into(),
        port: 8080,
        protocol: "http".into(),
        method: "GET".into(),
        path: path.into(),
        host: "cart".into(),
        count,
        denied,
        ..wire::Edge::default()
    };
    let id = "spiffe://cluster.local/ns/web/sa/cart";
    report(
        &proxy,
        Report {
            certificate: Some(wire::CertificateState {
                identity: "spiffe://cluster.local/ns/shop/sa/cart".into(),
                not_after: 99,
                ..Default::default()
            }),
            hits: vec![wire::PolicyHits { policy: "shop/p".into(), action: 1, dry_run: true, allowed: 2, denied: 3 }],
            edges: vec![edge(id, "", "/a", 5, 0), edge(id, "", "/b", 2, 1), edge("", "10.1.1.1", "/a", 1, 1)],
            refusals: vec![wire::Refusal {
                time: 1,
                request_id: "r-1".into(),
                source_address: "10.1.1.1".into(),
                port: 8080,
                reason: "no".into(),
                ..Default::default()
            }],
        },
    )
    .await;
    let edges = eventually_json(console, "/v1/edges", |v| v["edges"].as_array().is_some_and(|e| e.len() == 2)).await;
    let first = &edges["edges"][0];
    assert_eq!((first["count"].as_u64(), first["denied"].as_u64(), first["port"].as_u64()), (Some(7), Some(1), Some(8080)));
    assert_eq!(first["source"]["identity"], id);
    assert_eq!(first["source"]["workload"], "pod/front-1", "the only workload of that account");
    assert_eq!(first["destination"], json!({"namespace": "shop", "kind": "Pod", "name": "cart-1", "service_account": "cart"}));
    assert_eq!(
        edges["edges"][1]["source"],
        json!({"identity": "", "address": "10.1.1.1", "workload": "pod/front-1", "namespace": "web"})
    );

    let detailed = data(console, "/v1/edges?detail=true&since=10m").await;
    assert_eq!(detailed["edges"].as_array().unwrap().len(), 3);
    assert_eq!(detailed["edges"][0]["path"], "/a");
    assert_eq!(data(console, "/v1/edges?detail=true&limit=1").await["left_off"], 2);
    assert_eq!(data(console, "/v1/edges?namespace=web").await["edges"].as_array().unwrap().len(), 2);
    assert_eq!(data(console, "/v1/edges?namespace=other").await["edges"], json!([]));

    let proxies = data(console, "/v1/proxies").await;
    let one = &proxies["proxies"][0];
    assert_eq!(
        (one["pod"].as_str(), one["version"].as_str(), one["connected"].as_bool()),
        (Some("cart-1"), Some("test"), Some(true))
    );
    assert_eq!(one["certificate"]["not_after"], 99);
    assert_eq!(one["workload"]["name"], "cart-1");
    let hits = data(console, "/v1/policies/hits").await;
    assert_eq!(
        hits["hits"][0],
        json!({"namespace": "shop", "pod": "cart-1", "policy": "shop/p", "action": "DENY", "dry_run": true, "allowed": 2, "denied": 3})
    );
    let refusals = data(console, "/v1/refusals?id=r-1").await;
    assert_eq!(refusals["refusals"][0]["source"]["workload"], "pod/front-1");
    assert_eq!(data(console, "/v1/refusals?id=r-2").await["refusals"], json!([]));

    let config = data(console, "/v1/config?pod=shop/cart-1").await;
    assert_eq!(config["ports"][0]["protocol"], "HTTP");
    assert_eq!((&config["mtls"], &config["path_normalization"]), (&json!("PERMISSIVE"), &json!("BASE")));

    let metrics = http_get(control.addresses.metrics, "/metrics").await.unwrap().1;
    for line in ["weft_reports_total 1", "weft_reports_edges 3", "weft_reports_dropped_total{what=\"edge\"} 0"] {
        assert!(metrics.contains(line), "{line} in\n{metrics}");
    }
    drop(proxy);
    eventually_json(console, "/v1/proxies", |v| v["proxies"][0]["connected"] == json!(false)).await;
    control.shutdown().await;
}

async fn eventually_json(console: SocketAddr, path: &str, good: impl Fn(&Value) -> bool) -> Value {
    for _ in 0..400 {
        let value = data(console, path).await;
        if good(&value) {
            return value;
        }
        tokio::time::sleep(std::time::Duration::from_millis(25)).await;
    }
    panic!("{path}: {}", data(console, path).await)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_questions_and_foreign_callers_are_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let control = control(dir.path(), &[pod("shop", "cart-1", "cart")]).await;
    let console = control.addresses.console.unwrap();
    let local = "Host: 127.0.0.1\r\n";
    for (path, head, status, words) in [
        ("/v1/edges", "Host: rebound.example:15019\r\n", 403, "rebound.example"),
        ("/v1/edges", "Host: localhost\r\nOrigin: https://evil.example\r\n", 403, "evil.example"),
        ("/v1/edges?since=2d", local, 400, "since=2d"),
        ("/v1/config?pod=cart-1", local, 400, "NAMESPACE/NAME"),
        ("/v1/config?pod=shop/cart-2", local, 404, "no pod cart-2 in namespace shop"),
        ("/v2/edges", local, 404, "does not know this path"),
    ] {
        let (found, body) = get(console, path, head).await;
        assert_eq!(found, status, "{path} {head}: {body}");
        assert!(body["error"].as_str().unwrap().contains(words), "{path}: {body}");
    }
    // Both loopback addresses, where there are two.
    if let Ok(stream) = tokio::net::TcpStream::connect(("::1", console.port())).await {
        drop(stream);
        assert_eq!(
            get(SocketAddr::new(std::net::Ipv6Addr::LOCALHOST.into(), console.port()), "/v1/proxies", "Host: [::1]:9\r\n")
                .await
                .0,
            200
        );
    }
    control.shutdown().await;
}
