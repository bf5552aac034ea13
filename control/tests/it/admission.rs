//! Admission through the whole control plane: HTTPS by the certificate that caBundle announces, a namespace from the watch, a patch,
//! an event on the Deployment.

use crate::common::{FakeApi, eventually};
use crate::discovery::{bundle, control, ready};
use rustls_pki_types::ServerName;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use weft_control::ca::resolver::client_config;

async fn connect(address: SocketAddr, bundle: &str) -> TlsStream<TcpStream> {
    let config = Arc::new(client_config(bundle).unwrap());
    let name = ServerName::try_from("weft-control.weft-system.svc").unwrap();
    let stream = TcpStream::connect(address).await.unwrap();
    tokio_rustls::TlsConnector::from(config).connect(name, stream).await.unwrap()
}

fn review(namespace: &str, dry_run: bool) -> String {
    json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {
        "uid": "1", "kind": {"group": "", "version": "v1", "kind": "Pod"}, "resource": {"group": "", "version": "v1", "resource": "pods"},
        "namespace": namespace, "operation": "CREATE", "dryRun": dry_run,
        "object": {"apiVersion": "v1", "kind": "Pod", "metadata": {"generateName": "cart-1-", "labels": {"app": "cart"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "cart-1", "uid": "rs", "controller": true}]},
            "spec": {"containers": [{"name": "app", "image": "cart", "ports": [{"containerPort": 8080}]}]}}}})
    .to_string()
}

fn post(body: &str) -> String {
    format!(
        "POST /inject?timeout=5s HTTP/1.1\r\nHost: weft-control.weft-system.svc\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

async fn answer(stream: &mut TlsStream<TcpStream>) -> Value {
    let mut text = String::new();
    // The other side may close without a TLS goodbye once it has answered.
    let _ = stream.read_to_string(&mut text).await;
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
    assert!(head.starts_with("HTTP/1.1 200"), "{text}");
    serde_json::from_str(body).unwrap()
}

fn cluster(api: &FakeApi) {
    for (name, annotations) in [("shop", json!({"inject": "enabled"})), ("plain", json!({}))] {
        api.put(
            "api/v1/namespaces",
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "annotations": annotations}}),
        );
        api.put("apis/apps/v1/replicasets", json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": {"name": "cart-1", "namespace": name,
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "Deployment", "name": "cart", "uid": "deployment-uid", "controller": true}]}}));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_is_injected_and_its_deployment_told() {
    let api = FakeApi::start().await;
    cluster(&api);
    api.put(
        "apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations",
        json!({"apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingWebhookConfiguration", "metadata": {"name": "weft-injector"}, "webhooks": [
            {"name": "injector.weft.mesh", "clientConfig": {"service": {"namespace": "weft-system", "name": "weft-control"}}}]}),
    );
    let dir = tempfile::tempdir().unwrap();
    let control = control(&api, dir.path(), &["--image-proxy", "registry.example/weft-proxy:test"]).await;
    ready(control.addresses.metrics).await;
    // What the API server would trust.
    let announced = eventually("caBundle is announced", || {
        use base64::Engine as _;
        let object = api.get("apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations", "", "weft-injector")?;
        let bundle = object["webhooks"][0]["clientConfig"]["caBundle"].as_str()?.to_owned();
        String::from_utf8(base64::engine::general_purpose::STANDARD.decode(bundle).ok()?).ok()
    })
    .await;
    for (namespace, dry_run, patched) in
        [("plain", false, false), ("shop", true, true), ("shop", false, true), ("shop", false, true)]
    {
        let mut stream = connect(control.addresses.webhook, &announced).await;
        stream.write_all(post(&review(namespace, dry_run)).as_bytes()).await.unwrap();
        let answer = answer(&mut stream).await;
        assert_eq!(answer["response"]["allowed"], true);
        let patch = answer["response"]["patch"].as_str();
        assert_eq!(patch.is_some(), patched, "{answer}");
        if let Some(patch) = patch {
            use base64::Engine as _;
            let patch = String::from_utf8(base64::engine::general_purpose::STANDARD.decode(patch).unwrap()).unwrap();
            assert!(patch.contains("registry.example/weft-proxy:test"), "{patch}");
            assert!(patch.contains("weft-control.weft-system.svc:15012"), "{patch}");
        }
    }
    let event = eventually("an event", || api.list("api/v1/events").pop()).await;
    assert_eq!((event["reason"].as_str(), event["metadata"]["namespace"].as_str()), (Some("Injected"), Some("shop")));
    assert_eq!(event["involvedObject"]["uid"], "deployment-uid");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(api.list("api/v1/events").len(), 1);
    control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_review_that_is_under_way_at_the_end_is_answered() {
    let api = FakeApi::start().await;
    cluster(&api);
    let dir = tempfile::tempdir().unwrap();
    let control = control(&api, dir.path(), &[]).await;
    ready(control.addresses.metrics).await;
    let address = control.addresses.webhook;
    let bundle = bundle(&api);
    let mut slow = connect(address, &bundle).await;
    let request = post(&review("shop", false));
    let (first, rest) = request.split_at(request.len() - 20);
    slow.write_all(first.as_bytes()).await.unwrap();
    slow.flush().await.unwrap();
    let idle = connect(address, &bundle).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let ending = tokio::spawn(control.shutdown());
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert!(!ending.is_finished(), "it waits for what is under way");
    assert!(TcpStream::connect(address).await.is_err(), "and takes nothing new");
    slow.write_all(rest.as_bytes()).await.unwrap();
    assert!(answer(&mut slow).await["response"]["patch"].is_string());
    drop(idle);
    tokio::time::timeout(Duration::from_secs(5), ending).await.unwrap().unwrap();
}
