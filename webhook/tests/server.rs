//! The webhook over real HTTP: what it answers to reviews, and to what is none.

use serde_json::{Value, json};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use weft_webhook::review::{Decided, Outcome};
use weft_webhook::server::{Injector, LIMIT, Metrics, Observer, router};
use weft_webhook::validate;
use weft_webhook::{BoxFuture, ClusterFacts, LookupError, NamespaceFacts, Namespaces, Reason, Settings};

/// Knows `on` (asks for injection) and `off`; can't read `unreadable`; panics at `panic`.
struct Known;

impl Namespaces for Known {
    fn get<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<Arc<NamespaceFacts>>, LookupError>> {
        let found = match name {
            "on" => Ok(Some(Arc::new(NamespaceFacts {
                name: name.into(),
                annotations: [("inject".to_owned(), "enabled".to_owned())].into(),
                ..NamespaceFacts::default()
            }))),
            "off" => Ok(Some(Arc::new(NamespaceFacts { name: name.into(), ..NamespaceFacts::default() }))),
            "unreadable" => Err(LookupError { name: name.into(), cause: "no answer".into() }),
            "panic" => panic!("as the test asked for"),
            _ => Ok(None),
        };
        Box::pin(std::future::ready(found))
    }
}

#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<Outcome>>>);

impl Observer for Seen {
    fn observe(&self, outcome: &Outcome) {
        self.0.lock().unwrap().push(outcome.clone());
    }
}

async fn start() -> (std::net::SocketAddr, Seen, Arc<prometheus_client::registry::Registry>) {
    let mut registry = prometheus_client::registry::Registry::default();
    let seen = Seen::default();
    let settings = Arc::new(Settings::default());
    let injector = Injector {
        namespaces: Box::new(Known),
        settings: Box::new(move || Arc::clone(&settings)),
        cluster: Box::new(|| ClusterFacts { native_sidecars: true, ..ClusterFacts::default() }),
        observer: Box::new(seen.clone()),
        metrics: Metrics::register(&mut registry),
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router(Arc::new(injector))).await });
    (addr, seen, Arc::new(registry))
}

async fn post(addr: std::net::SocketAddr, content: &str, body: &[u8]) -> (u16, String) {
    post_to(addr, "/inject", content, body).await
}

async fn post_to(addr: std::net::SocketAddr, path: &str, content: &str, body: &[u8]) -> (u16, String) {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    let head = format!(
        "POST {path}?timeout=5s HTTP/1.1\r\nhost: x\r\ncontent-type: {content}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let _ = stream.write_all(body).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let text = String::from_utf8_lossy(&answer).into_owned();
    let code = text.split(' ').nth(1).and_then(|c| c.parse().ok()).unwrap_or(0);
    (code, text.split_once("\r\n\r\n").map(|(_, b)| b.to_owned()).unwrap_or_default())
}

fn review(namespace: &str, annotations: Value) -> Value {
    json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {
        "uid": "u-1", "operation": "CREATE", "namespace": namespace, "dryRun": true,
        "resource": {"group": "", "version": "v1", "resource": "pods"},
        "object": {"metadata": {"generateName": "p-", "annotations": annotations}, "spec": {"containers": [{"name": "a", "image": "x"}]}}}})
}

async fn ask(addr: std::net::SocketAddr, review: &Value) -> Value {
    let (code, body) = post(addr, "application/json; charset=utf-8", review.to_string().as_bytes()).await;
    assert_eq!(code, 200, "{body}");
    serde_json::from_str(&body).unwrap()
}

#[tokio::test]
async fn reviews_are_answered() {
    let (addr, seen, registry) = start().await;
    let answer = ask(addr, &review("on", json!({}))).await;
    assert_eq!(
        (&answer["apiVersion"], &answer["response"]["uid"], &answer["response"]["allowed"]),
        (&json!("admission.k8s.io/v1"), &json!("u-1"), &json!(true))
    );
    assert_eq!(answer["response"]["patchType"], "JSONPatch");
    let answer = ask(addr, &review("off", json!({}))).await;
    assert_eq!(answer["response"], json!({"uid": "u-1", "allowed": true}));
    let answer = ask(addr, &review("on", json!({"weft.mesh/dns-capture": "perhaps"}))).await;
    assert_eq!(answer["response"]["allowed"], false);
    assert!(answer["response"]["status"]["message"].as_str().unwrap().contains("weft.mesh/dns-capture"));
    let answer = ask(addr, &review("unreadable", json!({}))).await;
    assert_eq!(answer["response"]["allowed"], true);
    assert!(answer["response"]["warnings"][0].as_str().unwrap().contains("unreadable"), "{answer}");
    let answer = ask(addr, &review("nowhere", json!({"inject": "enabled"}))).await;
    assert!(answer["response"]["patch"].is_string());
    let mut beta = review("on", json!({}));
    beta["apiVersion"] = json!("admission.k8s.io/v1beta1");
    assert_eq!(ask(addr, &beta).await["apiVersion"], "admission.k8s.io/v1beta1");
    let mut other = review("on", json!({}));
    other["request"]["resource"]["resource"] = json!("services");
    assert_eq!(ask(addr, &other).await["response"], json!({"uid": "u-1", "allowed": true}));

    let outcomes = seen.0.lock().unwrap();
    let told: Vec<_> = outcomes.iter().take(3).map(|o| (o.decided, o.reason)).collect();
    assert_eq!(
        told,
        [
            (Decided::Inject, Reason::NamespaceEnabled),
            (Decided::Skip, Reason::NotEnabled),
            (Decided::Refuse, Reason::BadAnnotation)
        ]
    );
    assert!(outcomes[0].dry_run && outcomes[0].pod == "p-*");
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    assert!(text.contains(r#"weft_injection_total{decision="inject",reason="namespace-enabled"} 2"#), "{text}");
}

#[tokio::test]
async fn what_is_no_review_is_refused_as_http() {
    let (addr, _, _) = start().await;
    let good = review("on", json!({}));
    let mut v2 = good.clone();
    v2["apiVersion"] = json!("admission.k8s.io/v2");
    let mut no_uid = good.clone();
    no_uid["request"]["uid"] = json!("");
    for (content, body, code, words) in [
        ("application/json", String::new(), 400, "empty"),
        ("text/plain", good.to_string(), 415, "text/plain"),
        ("application/json", "{\"a\": 1,\n  oops".into(), 400, "line 2 column"),
        ("application/json", v2.to_string(), 400, "admission.k8s.io/v2"),
        ("application/json", "[]".into(), 400, "AdmissionReview"),
        ("application/json", no_uid.to_string(), 400, "uid"),
        ("application/json", json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview"}).to_string(), 400, "request"),
    ] {
        let (got, text) = post(addr, content, body.as_bytes()).await;
        let status: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{text} for {body}"));
        assert_eq!(
            (got, &status["code"], &status["kind"], &status["status"]),
            (code, &json!(code), &json!("Status"), &json!("Failure"))
        );
        let message = status["message"].as_str().unwrap();
        assert!(message.starts_with("weft: ") && message.contains(words), "{message} for {body}");
    }
    let (got, _) = post(addr, "application/json", &vec![b' '; LIMIT + 1]).await;
    assert_eq!(got, 413);
    // The typed form reads it, as the API server does.
    let (_, text) = post(addr, "application/json", v2.to_string().as_bytes()).await;
    let status: k8s_openapi::apimachinery::pkg::apis::meta::v1::Status = serde_json::from_str(&text).unwrap();
    assert_eq!(status.reason.as_deref(), Some("BadRequest"));
    // Just below the limit it is read.
    let mut large = good.to_string().into_bytes();
    large.resize(LIMIT, b' ');
    assert_eq!(post(addr, "application/json", &large).await.0, 200);
}

#[tokio::test]
async fn a_panic_in_one_request_takes_nothing_down() {
    let (addr, _, registry) = start().await;
    let (code, _) = post(addr, "application/json", review("panic", json!({})).to_string().as_bytes()).await;
    assert_eq!(code, 500);
    assert_eq!(ask(addr, &review("on", json!({}))).await["response"]["allowed"], true);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    assert!(text.contains(r#"decision="error",reason="internal-error""#), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once() {
    let (addr, _, _) = start().await;
    let all: Vec<_> = (0..200)
        .map(|i| tokio::spawn(async move { ask(addr, &review(if i % 2 == 0 { "on" } else { "off" }, json!({}))).await }))
        .collect();
    for (i, one) in all.into_iter().enumerate() {
        assert_eq!(one.await.unwrap()["response"]["patch"].is_string(), i % 2 == 0);
    }
}

async fn start_validator() -> (std::net::SocketAddr, prometheus_client::registry::Registry) {
    let mut registry = prometheus_client::registry::Registry::default();
    let metrics = validate::server::Metrics::register(&mut registry);
    let validator = validate::server::Validator { around: Box::new(validate::Nothing), metrics };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, validate::server::router(Arc::new(validator))).await });
    (addr, registry)
}

fn policy(kind: &str, operation: &str, spec: Value) -> Value {
    let object = json!({"apiVersion": "security.istio.io/v1beta1", "kind": kind, "metadata": {"name": "p"}, "spec": spec});
    json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {
        "uid": "u-1", "operation": operation, "namespace": "shop", "name": "p", "object": object}})
}

#[tokio::test]
async fn policies_are_validated() {
    let (addr, registry) = start_validator().await;
    let ask = async |review: &Value| -> Value {
        let (code, body) = post_to(addr, "/validate", "application/json", review.to_string().as_bytes()).await;
        assert_eq!(code, 200, "{body}");
        serde_json::from_str::<Value>(&body).unwrap()["response"].clone()
    };
    let allowed = json!({"uid": "u-1", "allowed": true});
    let strict = json!({"mtls": {"mode": "STRICT"}});
    assert_eq!(ask(&policy("PeerAuthentication", "CREATE", strict)).await, allowed);
    let bad = json!({"mtls": {"mode": "on"}, "x": 1});
    let refused = ask(&policy("PeerAuthentication", "UPDATE", bad.clone())).await;
    let status = &refused["status"];
    assert_eq!((&refused["allowed"], &status["code"], &status["reason"]), (&json!(false), &json!(400), &json!("BadRequest")));
    assert!(status["message"].as_str().unwrap().starts_with("2 mistakes:\n- spec.x: unknown field"), "{status}");
    assert_eq!(status["details"]["causes"][1]["field"], "spec.mtls.mode");
    let warned = ask(&policy("AuthorizationPolicy", "CREATE", json!({}))).await;
    assert!(warned["warnings"][0].as_str().unwrap().starts_with("weft: spec.rules: ALLOW without rules"), "{warned}");

    // What is going away, and what is not ours, passes whatever it is.
    assert_eq!(ask(&policy("PeerAuthentication", "DELETE", bad.clone())).await, allowed);
    assert_eq!(ask(&policy("Pod", "CREATE", bad.clone())).await, allowed);
    let mut going = policy("PeerAuthentication", "UPDATE", bad.clone());
    going["request"]["object"]["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    assert_eq!(ask(&going).await, allowed);
    // What was bad before and is not touched is only told.
    let mut labelled = policy("PeerAuthentication", "UPDATE", bad.clone());
    labelled["request"]["oldObject"] = json!({"spec": bad.clone()});
    let told = ask(&labelled).await;
    assert_eq!(told["allowed"], true);
    assert!(told["warnings"][0].as_str().unwrap().starts_with("weft: spec.x: not valid, was so before: unknown"), "{told}");
    let mut status = policy("PeerAuthentication", "UPDATE", bad);
    status["request"]["subResource"] = json!("status");
    assert_eq!(ask(&status).await, allowed);

    for (content, body, code, words) in [
        ("application/json", "", 400, "empty"),
        ("text/plain", "{}", 415, "text/plain"),
        ("application/json", "{", 400, "line 1"),
        ("application/json", "{}", 400, "AdmissionReview"),
    ] {
        let (got, text) = post_to(addr, "/validate", content, body.as_bytes()).await;
        assert!(got == code && text.contains(words) && text.contains("\"kind\":\"Status\""), "{got} {text}");
    }
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    for line in [
        r#"weft_validation_total{kind="PeerAuthentication",result="accept"} 2"#,
        r#"weft_validation_total{kind="PeerAuthentication",result="refuse"} 1"#,
        r#"weft_validation_total{kind="AuthorizationPolicy",result="warn"} 1"#,
        r#"weft_validation_total{kind="PeerAuthentication",result="warn"} 1"#,
        r#"weft_validation_total{kind="other",result="accept"} 3"#,
        r#"weft_validation_total{kind="other",result="error"} 4"#,
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
}
