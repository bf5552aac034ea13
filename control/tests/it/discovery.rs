//! The proxies' API, end to end: a whole control plane, TLS, tokens, streams.

use crate::common::{FakeApi, eventually};
use clap::Parser as _;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::sync::mpsc;
use tonic::transport::{Certificate, Channel, ClientTlsConfig};
use tonic::{Code, Request, Status, Streaming};
use weft_api::wire::discovery_client::DiscoveryClient;
use weft_api::wire::{
    Ack, ControlMessage, Destination, Hello, Inbound, Protocol, ProxyMessage, Unwatch, Watch, control_message, proxy_message,
};
use weft_control::flags::Flags;
use weft_control::run::Control;

const SAN: &str = "weft-control.weft-system.svc";

pub(crate) async fn control(api: &FakeApi, dir: &std::path::Path, more: &[&str]) -> Control {
    let kubeconfig = dir.join("kubeconfig");
    std::fs::write(&kubeconfig, api.kubeconfig()).unwrap();
    let config = dir.join("config.yaml");
    let mut args = vec!["weft-control", "--kubeconfig", kubeconfig.to_str().unwrap(), "--config", config.to_str().unwrap()];
    args.extend([
        "--namespace",
        "weft-system",
        "--bind",
        "127.0.0.1",
        "--webhook-port",
        "0",
        "--control-port",
        "0",
        "--metrics-port",
        "0",
        "--console-port",
        "0",
    ]);
    args.extend(["--shutdown-delay", "0"]);
    args.extend(more);
    Control::start(Flags::try_parse_from(args).unwrap()).await.unwrap()
}

/// Plain HTTP/1.1, the status and the body.
pub(crate) async fn http_get(address: std::net::SocketAddr, path: &str) -> Option<(u16, String)> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(address).await.ok()?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes()).await.ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await.ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
}

pub(crate) async fn ready(address: std::net::SocketAddr) {
    for _ in 0..400 {
        if http_get(address, "/healthz/ready").await.is_some_and(|(status, _)| status == 200) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("never ready: {:?}", http_get(address, "/healthz/ready").await);
}

pub(crate) fn bundle(api: &FakeApi) -> String {
    use base64::Engine as _;
    let secret = api.get("api/v1/secrets", "weft-system", "weft-ca").unwrap();
    let data = base64::engine::general_purpose::STANDARD.decode(secret["data"]["tls.crt"].as_str().unwrap()).unwrap();
    String::from_utf8(data).unwrap()
}

pub(crate) async fn channel(address: std::net::SocketAddr, bundle: &str) -> Channel {
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(bundle)).domain_name(SAN);
    let endpoint = Channel::from_shared(format!("https://{address}")).unwrap().tls_config(tls).unwrap();
    endpoint.connect().await.unwrap()
}

pub(crate) struct Proxy {
    pub(crate) send: mpsc::Sender<ProxyMessage>,
    stream: Streaming<ControlMessage>,
}

pub(crate) fn hello(namespace: &str, pod: &str) -> ProxyMessage {
    let hello = Hello { namespace: namespace.into(), pod: pod.into(), version: "test".into(), ..Hello::default() };
    ProxyMessage { kind: Some(proxy_message::Kind::Hello(hello)) }
}

pub(crate) async fn attach(channel: &Channel, token: Option<&str>, first: ProxyMessage) -> Result<Proxy, Status> {
    let (send, receive) = mpsc::channel(8);
    send.send(first).await.unwrap();
    let mut request = Request::new(tokio_stream::wrappers::ReceiverStream::new(receive));
    if let Some(token) = token {
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    }
    let stream = DiscoveryClient::new(channel.clone()).attach(request).await?.into_inner();
    Ok(Proxy { send, stream })
}

impl Proxy {
    pub(crate) async fn message(&mut self) -> (u64, control_message::Kind) {
        let message = tokio::time::timeout(Duration::from_secs(5), self.stream.message()).await.expect("a message in time");
        let message = message.unwrap().expect("the stream goes on");
        (message.version, message.kind.unwrap())
    }

    /// The next configuration.
    pub(crate) async fn next(&mut self) -> (u64, Inbound) {
        loop {
            if let (version, control_message::Kind::Inbound(inbound)) = self.message().await {
                return (version, inbound);
            }
        }
    }

    /// As [`Proxy::next`], for as long as it takes.
    pub(crate) async fn patient(&mut self) -> (u64, Inbound) {
        loop {
            let message = self.stream.message().await.unwrap().expect("the stream goes on");
            if let Some(control_message::Kind::Inbound(inbound)) = message.kind {
                return (message.version, inbound);
            }
        }
    }

    pub(crate) async fn silent(&mut self, time: Duration) {
        if let Ok(message) = tokio::time::timeout(time, self.stream.message()).await {
            panic!("unexpected: {message:?}");
        }
    }

    async fn ack(&self, version: u64, error: &str) {
        let ack = Ack { version, error: error.into() };
        self.send.send(ProxyMessage { kind: Some(proxy_message::Kind::Ack(ack)) }).await.unwrap();
    }
}

pub(crate) fn pod(namespace: &str, name: &str, app: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace, "labels": {"app": app}},
        "spec": {"serviceAccountName": "cart", "containers": [{"name": "app", "ports": [{"name": "web", "containerPort": 8080}]}]}})
}

pub(crate) fn service(namespace: &str, name: &str, app: &str, port: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace},
        "spec": {"selector": {"app": app}, "ports": [{"name": port, "port": 80, "targetPort": "web"}]}})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_is_told_its_ports_and_their_changes() {
    let api = FakeApi::start().await;
    let dir = tempfile::tempdir().unwrap();
    api.put("api/v1/pods", pod("shop", "cart-1", "cart"));
    api.put("api/v1/services", service("shop", "cart", "cart", "http"));
    api.token("good", "shop", "cart", Some("cart-1"));
    let control = control(&api, dir.path(), &[]).await;
    ready(control.addresses.metrics).await;
    let channel = channel(control.addresses.control, &bundle(&api)).await;
    let mut proxy = attach(&channel, Some("good"), hello("shop", "cart-1")).await.unwrap();

    let (version, inbound) = proxy.next().await;
    assert_eq!(version, 2, "after whom to trust");
    let workload = inbound.workload.clone().unwrap();
    assert_eq!((workload.service_account.as_str(), workload.app.as_str(), workload.kind.as_str()), ("cart", "cart", "Pod"));
    let [port] = &inbound.ports[..] else { panic!("{inbound:?}") };
    assert_eq!((port.port, port.protocol()), (8080, Protocol::Http));
    assert_eq!(port.service.as_ref().unwrap().host, "cart.shop.svc.cluster.local");
    proxy.ack(version, "").await;

    // A change of the same namespace that is none for this pod, and one of another namespace.
    api.put("api/v1/services", service("shop", "other", "other", "grpc"));
    api.put("api/v1/services", service("else", "cart", "cart", "grpc"));
    proxy.silent(Duration::from_millis(400)).await;

    api.put("api/v1/services", service("shop", "cart", "cart", "tcp-x"));
    let (version, inbound) = proxy.next().await;
    assert_eq!((version, inbound.ports[0].protocol()), (3, Protocol::Tcp));
    proxy.ack(version, "cannot listen").await;
    eventually("the refusal is counted", || {
        let text = metrics(control.addresses.metrics);
        text.contains("weft_discovery_acks_total{result=\"error\"} 1").then_some(text)
    })
    .await;

    // A watch that drops and comes back is no news.
    api.cut_watches();
    proxy.silent(Duration::from_millis(500)).await;

    // The pod's end is none either: it keeps what it has while it drains.
    api.remove("api/v1/pods", "shop", "cart-1");
    proxy.silent(Duration::from_millis(300)).await;

    // The settings' cluster name is a label of its telemetry.
    api.put("api/v1/pods", pod("shop", "cart-1", "cart"));
    std::fs::write(dir.path().join("config.yaml"), "cluster: berlin\n").unwrap();
    let (version, inbound) = proxy.next().await;
    assert_eq!((version, inbound.workload.unwrap().cluster.as_str()), (4, "berlin"));

    let ending = tokio::spawn(control.shutdown());
    let end = tokio::time::timeout(Duration::from_secs(5), proxy.stream.message()).await.unwrap();
    assert_eq!(end.unwrap_err().code(), Code::Unavailable);
    drop(proxy);
    tokio::time::timeout(Duration::from_secs(10), ending).await.unwrap().unwrap();
}

pub(crate) fn metrics(address: std::net::SocketAddr) -> String {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_ask() {
    let api = FakeApi::start().await;
    let dir = tempfile::tempdir().unwrap();
    api.put("api/v1/pods", pod("shop", "cart-1", "cart"));
    api.token("good", "shop", "cart", Some("cart-1"));
    api.token("unbound", "shop", "cart", None);
    let control = control(&api, dir.path(), &[]).await;
    ready(control.addresses.metrics).await;
    let channel = channel(control.addresses.control, &bundle(&api)).await;
    for (token, first, code, text) in [
        (None, hello("shop", "cart-1"), Code::Unauthenticated, "no token"),
        (Some("wrong"), hello("shop", "cart-1"), Code::Unauthenticated, "refused"),
        (Some("unbound"), hello("shop", "cart-1"), Code::Unauthenticated, "not bound to a pod"),
        (Some("good"), hello("other", "cart-1"), Code::PermissionDenied, "namespace shop"),
        (Some("good"), hello("shop", "cart-2"), Code::PermissionDenied, "pod cart-1"),
        (Some("good"), ProxyMessage { kind: Some(proxy_message::Kind::Ack(Ack::default())) }, Code::InvalidArgument, "Hello"),
    ] {
        let status = attach(&channel, token, first).await.err().unwrap_or_else(|| panic!("{token:?} was let in"));
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(text), "{status}");
    }
    assert!(attach(&channel, Some("good"), hello("shop", "cart-1")).await.is_ok());
    // Plaintext and foreign roots get nowhere.
    let foreign = weft_control::ca::issue::root(std::time::SystemTime::now()).unwrap();
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&foreign.certificate)).domain_name(SAN);
    let endpoint = Channel::from_shared(format!("https://{}", control.addresses.control)).unwrap().tls_config(tls).unwrap();
    assert!(endpoint.connect().await.is_err());
    // An API server that is away is not a bad token.
    api.set_down(true);
    let status = attach(&channel, Some("good"), hello("shop", "cart-1")).await.err().unwrap();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
}

/// A control plane with a folder of manifests, and a pod's proxy at it.
pub(crate) async fn of_manifests(
    dir: &std::path::Path,
    manifests: &std::path::Path,
    namespace: &str,
    pod: &str,
) -> (Control, Proxy) {
    let trust = dir.join("root.pem");
    let flags = Flags::try_parse_from([
        "weft-control",
        "--manifests",
        manifests.to_str().unwrap(),
        "--trust-bundle-out",
        trust.to_str().unwrap(),
        "--config",
        dir.join("none.yaml").to_str().unwrap(),
        "--webhook-port=0",
        "--control-port=0",
        "--metrics-port=0",
        "--console-port=0",
        "--shutdown-delay=0",
    ])
    .unwrap();
    let control = Control::start(flags).await.unwrap();
    ready(control.addresses.metrics).await;
    let channel = channel(control.addresses.control, &std::fs::read_to_string(&trust).unwrap()).await;
    let proxy = attach(&channel, None, hello(namespace, pod)).await.unwrap();
    (control, proxy)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_of_manifests_in_place_of_a_cluster() {
    let dir = tempfile::tempdir().unwrap();
    let manifests = dir.path().join("manifests");
    std::fs::create_dir(&manifests).unwrap();
    let write = |name: &str, objects: &[Value]| {
        let text: Vec<String> = objects.iter().map(Value::to_string).collect();
        std::fs::write(manifests.join(name), text.join("\n---\n")).unwrap();
    };
    write("app.yaml", &[pod("shop", "cart-1", "cart"), service("shop", "cart", "cart", "http")]);
    let (control, mut proxy) = of_manifests(dir.path(), &manifests, "shop", "cart-1").await;
    assert_eq!(proxy.next().await.1.ports[0].protocol(), Protocol::Http);
    write("app.yaml", &[pod("shop", "cart-1", "cart"), service("shop", "cart", "cart", "grpc")]);
    assert_eq!(proxy.next().await.1.ports[0].protocol(), Protocol::Http2);
    std::fs::write(manifests.join("app.yaml"), "kind: [broken").unwrap();
    proxy.silent(Duration::from_millis(500)).await;
    assert!(metrics(control.addresses.metrics).contains("weft_bad_manifests 1"));
    write("app.yaml", &[pod("shop", "cart-1", "cart"), service("shop", "cart", "cart", "tls")]);
    assert_eq!(proxy.next().await.1.ports[0].protocol(), Protocol::Tls);
    drop(proxy);
    control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_streams_are_cheap() {
    let api = FakeApi::start().await;
    let dir = tempfile::tempdir().unwrap();
    for n in 0..500 {
        api.put("api/v1/pods", pod("shop", &format!("cart-{n}"), "cart"));
        api.token(&format!("token-{n}"), "shop", "cart", Some(&format!("cart-{n}")));
    }
    api.put("api/v1/services", service("shop", "cart", "cart", "http"));
    let control = control(&api, dir.path(), &[]).await;
    ready(control.addresses.metrics).await;
    let bundle = bundle(&api);
    let mut proxies = Vec::new();
    for n in 0..500 {
        // As many streams per connection as one allows would hide the cost of connections: a fifth of them has its own.
        let channel = if n % 5 == 0 {
            channel(control.addresses.control, &bundle).await
        } else {
            Channel::clone(&proxies_channel(&proxies))
        };
        let mut proxy = attach(&channel, Some(&format!("token-{n}")), hello("shop", &format!("cart-{n}"))).await.unwrap();
        proxy.next().await;
        proxies.push((channel, proxy));
    }
    assert!(metrics(control.addresses.metrics).contains("weft_discovery_streams 500"));
    api.put("api/v1/services", service("shop", "cart", "cart", "grpc"));
    let all = async {
        for (_, proxy) in &mut proxies {
            assert_eq!(proxy.next().await.1.ports[0].protocol(), Protocol::Http2);
        }
    };
    tokio::time::timeout(Duration::from_secs(10), all).await.expect("all are told in time");
    drop(proxies);
    eventually("streams that ended are forgotten", || {
        metrics(control.addresses.metrics).contains("weft_discovery_streams 0").then_some(())
    })
    .await;
}

fn proxies_channel(proxies: &[(Channel, Proxy)]) -> Channel {
    proxies.last().expect("the first has its own").0.clone()
}

fn watch(address: &str) -> ProxyMessage {
    ProxyMessage { kind: Some(proxy_message::Kind::Watch(Watch { address: address.into() })) }
}

fn unwatch(address: &str) -> ProxyMessage {
    ProxyMessage { kind: Some(proxy_message::Kind::Unwatch(Unwatch { address: address.into() })) }
}

/// A Service of another namespace with these addresses behind it.
fn upstream(api: &FakeApi, endpoints: &[(&str, &str)]) {
    for (name, ip) in endpoints {
        api.put(
            "api/v1/pods",
            json!({"apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": name, "namespace": "db", "annotations": {"weft.mesh/status": "{}"}},
                "spec": {"serviceAccountName": "store", "containers": [{"name": "app"}, {"name": "weft-proxy"}]},
                "status": {"podIPs": [{"ip": ip}], "containerStatuses": [{"name": "weft-proxy", "state": {"running": {}}}]}}),
        );
    }
    api.put(
        "api/v1/services",
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "store", "namespace": "db"},
            "spec": {"clusterIPs": ["10.96.0.7"], "ports": [{"name": "grpc", "port": 80}]}}),
    );
    let list: Vec<Value> = endpoints
        .iter()
        .map(|(name, ip)| json!({"addresses": [ip], "targetRef": {"kind": "Pod", "name": name}, "conditions": {"ready": true}}))
        .collect();
    api.put(
        "apis/discovery.k8s.io/v1/endpointslices",
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": "store-1", "namespace": "db", "labels": {"kubernetes.io/service-name": "store"}},
            "ports": [{"name": "grpc", "port": 9000}], "endpoints": list}),
    );
}

impl Proxy {
    async fn destination(&mut self) -> (u64, Destination) {
        match self.message().await {
            (version, control_message::Kind::Destination(destination)) => (version, destination),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_follows_destinations() {
    let api = FakeApi::start().await;
    let dir = tempfile::tempdir().unwrap();
    api.put("api/v1/pods", pod("shop", "cart-1", "cart"));
    api.token("good", "shop", "cart", Some("cart-1"));
    upstream(&api, &[("store-1", "10.0.0.1")]);
    let control = control(&api, dir.path(), &[]).await;
    ready(control.addresses.metrics).await;
    let channel = channel(control.addresses.control, &bundle(&api)).await;
    let mut proxy = attach(&channel, Some("good"), hello("shop", "cart-1")).await.unwrap();
    proxy.next().await;

    proxy.send.send(watch("10.96.0.7:80")).await.unwrap();
    let (version, destination) = proxy.destination().await;
    assert_eq!(destination.address, "10.96.0.7:80");
    assert_eq!((destination.service.unwrap().host.as_str(), destination.protocol), ("store.db.svc.cluster.local", 2));
    let [endpoint] = &destination.endpoints[..] else { panic!("{:?}", destination.endpoints) };
    assert_eq!((endpoint.address.as_str(), endpoint.pod.as_str()), ("10.0.0.1:9000", "store-1"));
    assert_eq!(endpoint.identities, ["spiffe://cluster.local/ns/db/sa/store"]);

    // An endpoint more, and how long it takes from the change to the proxy.
    let start = std::time::Instant::now();
    upstream(&api, &[("store-1", "10.0.0.1"), ("store-2", "10.0.0.2")]);
    let (next, destination) = proxy.destination().await;
    assert_eq!((next - version, destination.endpoints.len()), (1, 2));
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());

    // What is no address and what nobody has are unknown; a text is echoed as it came.
    for address in ["10.96.0.8:80", "store.db:80", "[0:0::1]:80"] {
        proxy.send.send(watch(address)).await.unwrap();
        let (_, destination) = proxy.destination().await;
        let expected = Destination { address: address.into(), ..Destination::default() };
        assert_eq!(destination, expected);
    }

    // A pod's own address.
    proxy.send.send(watch("10.0.0.2:1234")).await.unwrap();
    let (_, destination) = proxy.destination().await;
    assert!(destination.direct && destination.endpoints.len() == 1);

    // What is not followed any more is not sent.
    proxy.send.send(unwatch("10.96.0.7:80")).await.unwrap();
    proxy.send.send(unwatch("10.0.0.2:1234")).await.unwrap();
    proxy.send.send(watch("10.96.0.9:80")).await.unwrap();
    proxy.destination().await;
    upstream(&api, &[("store-2", "10.0.0.2")]);
    api.remove("api/v1/pods", "db", "store-2");
    proxy.silent(Duration::from_millis(300)).await;

    // An address that somebody gets.
    api.put(
        "api/v1/services",
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "late", "namespace": "new"},
            "spec": {"clusterIP": "10.96.0.9", "ports": [{"name": "http", "port": 80}]}}),
    );
    let (_, destination) = proxy.destination().await;
    assert_eq!((destination.service.unwrap().name.as_str(), destination.endpoints.len()), ("late", 0));
    drop(proxy);
    control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_may_not_follow_everything() {
    let api = FakeApi::start().await;
    let dir = tempfile::tempdir().unwrap();
    api.put("api/v1/pods", pod("shop", "cart-1", "cart"));
    api.token("good", "shop", "cart", Some("cart-1"));
    upstream(&api, &[("store-1", "10.0.0.1")]);
    let control = control(&api, dir.path(), &[]).await;
    ready(control.addresses.metrics).await;
    let channel = channel(control.addresses.control, &bundle(&api)).await;
    let mut proxy = attach(&channel, Some("good"), hello("shop", "cart-1")).await.unwrap();
    proxy.next().await;
    for n in 0..4096u32 {
        proxy.send.send(watch(&format!("10.1.{}.{}:80", n / 256, n % 256))).await.unwrap();
        proxy.destination().await;
    }
    proxy.send.send(watch("10.96.0.7:80")).await.unwrap();
    assert_eq!(proxy.destination().await.1.service, None, "one too many is passed through");
    proxy.send.send(unwatch("10.1.0.0:80")).await.unwrap();
    proxy.send.send(watch("10.96.0.7:80")).await.unwrap();
    assert!(proxy.destination().await.1.service.is_some());
    drop(proxy);
    control.shutdown().await;
}
