//! Admission webhooks as the API server calls them: over HTTPS, in order, again when needed, with the failure policy, the time
//! limit, dry run and warnings of `admissionregistration.k8s.io/v1`.

use axum::extract::{Path, State};
use axum::{Json, Router, routing::post};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use weft_playground::apiserver::{Api, Config, DeleteOptions, Server, Status, resource};

/// What the webhook was asked: path and `request`.
type Calls = Arc<Mutex<Vec<(String, Value)>>>;

struct World {
    server: Server,
    api: Api,
    calls: Calls,
    webhook: SocketAddr,
    bundle: String,
}

/// The webhook's answers, by path: `sidecar` adds a container unless it is there, `label-X` sets a label, `deny…` refuses,
/// `warn` warns, `slow` takes three seconds.
async fn answer(Path(path): Path<String>, State(calls): State<Calls>, Json(review): Json<Value>) -> Json<Value> {
    let request = &review["request"];
    calls.lock().unwrap().push((path.clone(), request.clone()));
    let mut response = json!({"uid": request["uid"], "allowed": true});
    let mut patch = Vec::new();
    match path.as_str() {
        "sidecar" => {
            let containers = request["object"]["spec"]["containers"].as_array().unwrap();
            if containers.iter().all(|c| c["name"] != "sidecar") {
                patch.push(json!({"op": "add", "path": "/spec/containers/-", "value": {"name": "sidecar", "image": "s:1"}}));
            }
        }
        "deny" => {
            response = json!({"uid": request["uid"], "allowed": false, "status": {"code": 418, "reason": "Teapot", "message": "no coffee"}});
        }
        "deny-mute" => response = json!({"uid": request["uid"], "allowed": false}),
        "warn" => response["warnings"] = json!(["look \"here\""]),
        "wrong-uid" => response["uid"] = json!("other"),
        "slow" => tokio::time::sleep(Duration::from_secs(3)).await,
        label => {
            if let Some(label) = label.strip_prefix("label-") {
                if request["object"]["metadata"]["labels"].is_null() {
                    patch.push(json!({"op": "add", "path": "/metadata/labels", "value": {}}));
                }
                patch.push(json!({"op": "add", "path": format!("/metadata/labels/{label}"), "value": "yes"}));
            }
        }
    }
    if !patch.is_empty() {
        response["patchType"] = json!("JSONPatch");
        response["patch"] = json!(STANDARD.encode(Value::Array(patch).to_string()));
    }
    Json(json!({"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1", "response": response}))
}

async fn start() -> World {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["localhost".into()]).unwrap().self_signed(&key).unwrap();
    let tls = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], rustls::pki_types::PrivateKeyDer::Pkcs8(key.serialize_der().into()))
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls));
    let calls = Calls::default();
    let router = Router::new().route("/{path}", post(answer)).with_state(calls.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let webhook = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, router) = (acceptor.clone(), router.clone());
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                let _ = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)).await;
            });
        }
    });
    let server = Server::start(Config { listen: vec!["127.0.0.1:0".parse().unwrap()], ..Config::default() }).await.unwrap();
    let api = server.api("tester");
    World { server, api, calls, webhook, bundle: STANDARD.encode(certificate.pem()) }
}

impl World {
    /// A webhook for the creation and change of pods and config maps, changed by `over`.
    fn hook(&self, name: &str, path: &str, over: &Value) -> Value {
        let mut hook = json!({"name": format!("{name}.example.com"), "sideEffects": "None", "admissionReviewVersions": ["v1"],
            "clientConfig": {"url": format!("https://localhost:{}/{path}", self.webhook.port()), "caBundle": self.bundle},
            "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods", "configmaps"], "operations": ["CREATE", "UPDATE"]}]});
        json_patch::merge(&mut hook, over);
        hook
    }

    async fn configure(&self, name: &str, mutating: bool, hooks: &[Value]) -> Result<Value, Status> {
        let gvr = if mutating { resource::MUTATING_WEBHOOKS } else { resource::VALIDATING_WEBHOOKS };
        self.api.create(&gvr, None, json!({"metadata": {"name": name}, "webhooks": hooks})).await
    }

    async fn map(&self, name: &str) -> Result<Value, Status> {
        self.api.create(&resource::CONFIGMAPS, Some("default"), json!({"metadata": {"name": name}})).await
    }

    async fn pod(&self) -> Value {
        let pod = json!({"metadata": {"generateName": "p-"}, "spec": {"containers": [{"name": "app", "image": "a:1"}]}});
        self.api.create(&resource::PODS, Some("default"), pod).await.unwrap()
    }

    fn paths(&self) -> Vec<String> {
        self.calls.lock().unwrap().iter().map(|(path, _)| path.clone()).collect()
    }

    fn last(&self) -> Value {
        self.calls.lock().unwrap().last().unwrap().1.clone()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mutating_webhooks_run_in_order_of_their_configurations_names() {
    let w = start().await;
    w.configure("b", true, &[w.hook("one", "label-b1", &json!({})), w.hook("two", "label-b2", &json!({}))]).await.unwrap();
    w.configure("a", true, &[w.hook("one", "label-a", &json!({}))]).await.unwrap();
    w.configure("v", false, &[w.hook("v", "look", &json!({}))]).await.unwrap();
    let made = w.map("m").await.unwrap();
    assert_eq!(made["metadata"]["labels"], json!({"a": "yes", "b1": "yes", "b2": "yes"}));
    assert_eq!(w.paths(), ["label-a", "label-b1", "label-b2", "look"]);
    let seen = w.last();
    assert_eq!(seen["object"]["metadata"]["labels"], made["metadata"]["labels"], "validating webhooks see the end result");
    assert_eq!((&seen["operation"], &seen["namespace"], &seen["name"]), (&json!("CREATE"), &json!("default"), &json!("m")));
    assert_eq!(seen["userInfo"]["username"], "tester");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_is_asked_again_only_when_it_wants_and_something_changed_after_it() {
    let w = start().await;
    let again = json!({"reinvocationPolicy": "IfNeeded"});
    w.configure("a", true, &[w.hook("a", "label-a", &again), w.hook("b", "label-b", &json!({})), w.hook("c", "look", &again)])
        .await
        .unwrap();
    w.map("m").await.unwrap();
    // The first sees b's change; b doesn't ask for it; nothing changes after the last.
    assert_eq!(w.paths(), ["label-a", "label-b", "look", "label-a"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_servers_own_admission_is_a_reason_to_ask_again() {
    let w = start().await;
    w.configure("a", true, &[w.hook("a", "sidecar", &json!({"reinvocationPolicy": "IfNeeded"}))]).await.unwrap();
    let pod = w.pod().await;
    let containers = pod["spec"]["containers"].as_array().unwrap();
    assert_eq!(containers.len(), 2);
    // The token is mounted in the container that the webhook added, and the webhook has seen that.
    assert_eq!(containers[1]["volumeMounts"][0]["mountPath"], "/var/run/secrets/kubernetes.io/serviceaccount");
    assert_eq!(w.paths(), ["sidecar", "sidecar"]);
    assert_eq!(w.last()["object"]["spec"]["containers"][1], containers[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_generated_name_comes_after_the_mutating_webhooks() {
    let w = start().await;
    w.configure("a", true, &[w.hook("a", "look", &json!({}))]).await.unwrap();
    let pod = w.pod().await;
    let seen = w.last();
    assert!(seen.get("name").is_none() && seen["object"]["metadata"].get("name").is_none(), "{seen}");
    assert!(seen["object"]["metadata"].get("uid").is_none());
    assert_eq!(seen["object"]["metadata"]["namespace"], "default");
    assert!(pod["metadata"]["name"].as_str().unwrap().starts_with("p-"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_webhook_fails_the_request_unless_it_may_be_ignored() {
    let w = start().await;
    // A port where nobody listens: it was just free, and it is ours.
    let dead = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let dead = json!({"clientConfig": {"url": format!("https://localhost:{}/x", dead.port())}});
    for (n, (path, over)) in
        [("x", dead), ("wrong-uid", json!({})), ("x", json!({"clientConfig": {"caBundle": STANDARD.encode(w.server.ca_pem())}}))]
            .into_iter()
            .enumerate()
    {
        let name = format!("f{n}");
        w.configure(&name, false, &[w.hook("f", path, &over)]).await.unwrap();
        let error = w.map("m").await.unwrap_err();
        assert_eq!((error.code, error.reason.as_str()), (500, "InternalError"), "{error}");
        assert!(error.message.contains("failed calling webhook \"f.example.com\""), "{error}");
        w.api.delete(&resource::VALIDATING_WEBHOOKS, None, &name, DeleteOptions::default()).await.unwrap();
        let mut ignored = over.clone();
        ignored["failurePolicy"] = json!("Ignore");
        w.configure(&name, false, &[w.hook("f", path, &ignored)]).await.unwrap();
        w.map(&format!("m{n}")).await.unwrap();
        w.api.delete(&resource::VALIDATING_WEBHOOKS, None, &name, DeleteOptions::default()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_webhook_is_given_up_in_time() {
    let w = start().await;
    w.configure("s", false, &[w.hook("s", "slow", &json!({"timeoutSeconds": 1}))]).await.unwrap();
    let begin = Instant::now();
    let error = w.map("m").await.unwrap_err();
    assert!(error.message.contains("context deadline exceeded"), "{error}");
    assert!((Duration::from_secs(1)..Duration::from_millis(2500)).contains(&begin.elapsed()), "{:?}", begin.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denial_reaches_the_client_as_the_webhook_put_it() {
    let w = start().await;
    w.configure("d", true, &[w.hook("d", "deny", &json!({"failurePolicy": "Ignore"}))]).await.unwrap();
    let error = w.map("m").await.unwrap_err();
    assert_eq!((error.code, error.reason.as_str()), (418, "Teapot"), "a denial is no failure to ignore");
    assert_eq!(error.message, "admission webhook \"d.example.com\" denied the request: no coffee");
    w.api.delete(&resource::MUTATING_WEBHOOKS, None, "d", DeleteOptions::default()).await.unwrap();
    w.configure("d", false, &[w.hook("d", "deny-mute", &json!({}))]).await.unwrap();
    let error = w.map("m").await.unwrap_err();
    assert_eq!(
        (error.code, error.message.as_str()),
        (400, "admission webhook \"d.example.com\" denied the request without explanation")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn selectors_scope_and_operations_choose() {
    let w = start().await;
    let only = |over: Value| w.hook("o", "look", &over);
    let hooks = [
        only(json!({"objectSelector": {"matchLabels": {"x": "y"}}})),
        only(
            json!({"namespaceSelector": {"matchExpressions": [{"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": ["default"]}]}}),
        ),
        only(
            json!({"rules": [{"apiGroups": [""], "apiVersions": ["v1"], "resources": ["configmaps"], "operations": ["DELETE"]}]}),
        ),
        only(
            json!({"rules": [{"apiGroups": [""], "apiVersions": ["v1"], "resources": ["configmaps"], "operations": ["CREATE"], "scope": "Cluster"}]}),
        ),
        only(json!({"rules": [{"apiGroups": ["apps"], "apiVersions": ["v1"], "resources": ["*"], "operations": ["*"]}]})),
    ];
    w.configure("o", false, &hooks).await.unwrap();
    w.map("m").await.unwrap();
    assert!(w.paths().is_empty(), "{:?}", w.calls.lock().unwrap());
    let labelled = json!({"metadata": {"name": "l", "labels": {"x": "y"}}});
    w.api.create(&resource::CONFIGMAPS, Some("default"), labelled.clone()).await.unwrap();
    assert_eq!(w.paths().len(), 1);
    w.api.create(&resource::CONFIGMAPS, Some("kube-public"), labelled).await.unwrap();
    assert_eq!(w.paths().len(), 3);
    w.api.delete(&resource::CONFIGMAPS, Some("default"), "m", DeleteOptions::default()).await.unwrap();
    let seen = w.last();
    assert_eq!(
        (seen["operation"].as_str(), &seen["object"], &seen["oldObject"]["metadata"]["name"]),
        (Some("DELETE"), &Value::Null, &json!("m"))
    );
}

/// The one expression that the playground understands.
const HOST: &str = "!(has(object.spec.hostNetwork) && object.spec.hostNetwork)";

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_honoured_is_refused() {
    let w = start().await;
    let condition = |expression: &str| json!({"matchConditions": [{"name": "c", "expression": expression}]});
    for (over, field) in [
        (condition("object.metadata.name == 'x'"), "webhooks[0].matchConditions[0]"),
        // Each of several is looked at.
        (
            json!({"matchConditions": [{"name": "a", "expression": HOST}, {"name": "b", "expression": "true"}]}),
            "webhooks[0].matchConditions[1]",
        ),
        (
            json!({"matchConditions": [{"name": "a", "expression": HOST}, {"name": "a", "expression": HOST}]}),
            "webhooks[0].matchConditions[1].name",
        ),
        (json!({"matchConditions": [{"expression": HOST}]}), "webhooks[0].matchConditions[0].name"),
        (json!({"sideEffects": "Some"}), "webhooks[0].sideEffects"),
        (json!({"timeoutSeconds": 31}), "webhooks[0].timeoutSeconds"),
        (json!({"admissionReviewVersions": ["v1beta1"]}), "webhooks[0].admissionReviewVersions"),
        (json!({"clientConfig": {"url": null}}), "webhooks[0].clientConfig"),
    ] {
        let error = w.configure("r", true, &[w.hook("r", "look", &over)]).await.unwrap_err();
        assert!(error.code == 422 && error.message.contains(field), "{error}");
    }
    let skip = condition(HOST);
    w.configure("r", true, &[w.hook("r", "look", &skip)]).await.unwrap();
    let pod = |name: &str, host: bool| json!({"metadata": {"name": name}, "spec": {"hostNetwork": host, "containers": [{"name": "c", "image": "x"}]}});
    w.api.create(&resource::PODS, Some("default"), pod("host", true)).await.unwrap();
    assert!(w.paths().is_empty());
    w.api.create(&resource::PODS, Some("default"), pod("own", false)).await.unwrap();
    assert_eq!(w.paths(), ["look"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_says_so_and_warnings_reach_the_client() {
    let w = start().await;
    w.configure("w", false, &[w.hook("w", "warn", &json!({}))]).await.unwrap();
    let config = Kubeconfig::from_yaml(&w.server.kubeconfig(&format!("https://{}", w.server.addresses()[0]))).unwrap();
    let config = kube::Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await.unwrap();
    let client = kube::Client::try_from(config).unwrap();
    let request = http::Request::post("/api/v1/namespaces/default/configmaps?dryRun=All&fieldManager=me")
        .header("content-type", "application/json")
        .body(kube::client::Body::from(
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "m"}}).to_string().into_bytes(),
        ))
        .unwrap();
    let response = client.send(request).await.unwrap();
    assert_eq!(response.status(), 201);
    assert_eq!(response.headers()["warning"], "299 - \"look \\\"here\\\"\"");
    assert_eq!(w.last()["dryRun"], true);
    assert!(w.api.get(&resource::CONFIGMAPS, Some("default"), "m").await.unwrap_err().is_not_found());
    w.map("m").await.unwrap();
    assert_eq!(w.last()["dryRun"], false);
}

#[tokio::test(flavor = "multi_thread")]
async fn validating_webhooks_are_asked_at_once_and_the_first_refusal_is_told() {
    let w = start().await;
    let hooks = [w.hook("s", "slow", &json!({})), w.hook("t", "slow", &json!({})), w.hook("d", "deny", &json!({}))];
    w.configure("v", false, &hooks).await.unwrap();
    let begin = Instant::now();
    let error = w.map("m").await.unwrap_err();
    assert_eq!(error.message, "admission webhook \"d.example.com\" denied the request: no coffee");
    // Each takes three seconds; one after the other would be six.
    assert!(begin.elapsed() < Duration::from_millis(5500), "{:?}", begin.elapsed());
    let mut asked = w.paths();
    asked.sort();
    assert_eq!(asked, ["deny", "slow", "slow"], "nobody waits for another's refusal");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_custom_resource_is_seen_in_a_version_that_the_rule_lists() {
    let w = start().await;
    let version = |name: &str, storage: bool| {
        json!({"name": name, "served": true, "storage": storage, "subresources": {"status": {}},
            "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}})
    };
    let crd = json!({"metadata": {"name": "things.example.com"}, "spec": {"group": "example.com", "scope": "Namespaced",
        "names": {"kind": "Thing", "plural": "things"}, "versions": [version("v1", true), version("v1beta1", false)]}});
    w.api.create(&resource::CRDS, None, crd).await.unwrap();
    let rules = |versions: Value, policy: &str| json!({"matchPolicy": policy, "rules": [{"apiGroups": ["example.com"], "apiVersions": versions, "resources": ["things"], "operations": ["CREATE", "UPDATE"]}]});
    let hooks = [
        w.hook("a", "v1-equivalent", &rules(json!(["v1"]), "Equivalent")),
        w.hook("b", "v1-exact", &rules(json!(["v1"]), "Exact")),
        w.hook("c", "both-exact", &rules(json!(["v1", "v1beta1"]), "Exact")),
    ];
    w.configure("v", false, &hooks).await.unwrap();
    let beta = resource::Gvr::new("example.com", "v1beta1", "things");
    let thing = json!({"apiVersion": "example.com/v1beta1", "kind": "Thing", "metadata": {"name": "t"}, "spec": {"a": 1}});
    let made = w.api.create(&beta, Some("default"), thing).await.unwrap();
    assert_eq!(made["apiVersion"], "example.com/v1beta1");
    let calls: std::collections::BTreeMap<String, Value> = w.calls.lock().unwrap().drain(..).collect();
    assert_eq!(calls.keys().collect::<Vec<_>>(), ["both-exact", "v1-equivalent"]);
    for (path, seen) in [("both-exact", "v1beta1"), ("v1-equivalent", "v1")] {
        let call = &calls[path];
        assert_eq!(call["object"]["apiVersion"], format!("example.com/{seen}"));
        assert_eq!((&call["resource"]["version"], &call["requestResource"]["version"]), (&json!(seen), &json!("v1beta1")));
    }
    // One stored object, whatever the version; the status is a subresource, of which this webhook is not asked.
    let stable = resource::Gvr::new("example.com", "v1", "things");
    let read = w.api.get(&stable, Some("default"), "t").await.unwrap();
    assert_eq!((&read["apiVersion"], &read["spec"]["a"]), (&json!("example.com/v1"), &json!(1)));
    let mut with_status = read.clone();
    with_status["status"] = json!({"ok": true});
    with_status["spec"]["a"] = json!(2);
    let updated = w.api.update_status(&stable, with_status).await.unwrap();
    assert_eq!((&updated["status"]["ok"], &updated["spec"]["a"]), (&json!(true), &json!(1)));
    assert!(w.paths().is_empty(), "{:?}", w.paths());
}
