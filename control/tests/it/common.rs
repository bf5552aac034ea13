//! A small API server in this process: enough of list, watch, create, replace, patch and delete, with versions and conflicts, for what
//! the control plane asks. What it answers is what Kubernetes documents; the end-to-end tests run against more than this.

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use futures::StreamExt as _;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use tokio::sync::watch;

/// One change: version, resource path, type, object.
#[derive(Clone)]
struct Change {
    version: u64,
    resource: String,
    kind: &'static str,
    object: Value,
}

/// A token of a service account, perhaps bound to a pod.
#[derive(Clone)]
struct Token {
    namespace: String,
    account: String,
    pod: Option<String>,
    uid: Option<String>,
    audience: String,
}

#[derive(Default)]
struct Inner {
    version: u64,
    objects: BTreeMap<(String, String, String), Value>,
    changes: Vec<Change>,
    requests: Vec<String>,
    tokens: HashMap<String, Token>,
    forgotten: u64,
    failing: Vec<String>,
}

/// The server.
#[derive(Clone)]
pub(crate) struct FakeApi {
    inner: Arc<Mutex<Inner>>,
    changed: Arc<watch::Sender<u64>>,
    cuts: Arc<watch::Sender<u64>>,
    down: Arc<AtomicBool>,
    /// Answer streamed lists (otherwise refuse them).
    streams: Arc<AtomicBool>,
    /// Know nothing of streamed lists: take the request for a plain watch.
    ignores_streams: Arc<AtomicBool>,
    minor: Arc<Mutex<String>>,
    /// A group of custom resources of which no definition exists.
    absent: Arc<Mutex<String>>,
    pub(crate) url: String,
}

impl FakeApi {
    pub(crate) async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let api = Self {
            inner: Arc::default(),
            changed: Arc::new(watch::Sender::new(0)),
            cuts: Arc::new(watch::Sender::new(0)),
            down: Arc::default(),
            streams: Arc::default(),
            ignores_streams: Arc::default(),
            minor: Arc::new(Mutex::new("33".into())),
            absent: Arc::default(),
            url: format!("http://{}", listener.local_addr().unwrap()),
        };
        let router = Router::new().fallback(handle).with_state(api.clone());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        api
    }

    pub(crate) fn client(&self) -> kube::Client {
        kube::Client::try_from(kube::Config::new(self.url.parse().unwrap())).unwrap()
    }

    pub(crate) fn kubeconfig(&self) -> String {
        json!({"apiVersion": "v1", "kind": "Config", "current-context": "x",
            "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
            "clusters": [{"name": "x", "cluster": {"server": self.url}}], "users": [{"name": "x", "user": {}}]})
        .to_string()
    }

    pub(crate) fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::SeqCst);
        if down {
            self.cut_watches();
        }
    }

    pub(crate) fn offer_streams(&self, minor: &str, offered: bool) {
        *self.minor.lock().unwrap() = minor.into();
        self.streams.store(offered, Ordering::SeqCst);
    }

    /// Whether definitions of a group's resources are missing.
    pub(crate) fn not_served(&self, group: &str, absent: bool) {
        *self.absent.lock().unwrap() = if absent { format!("/apis/{group}/") } else { String::new() };
    }

    pub(crate) fn ignore_streams(&self) {
        self.ignores_streams.store(true, Ordering::SeqCst);
    }

    pub(crate) fn cut_watches(&self) {
        self.cuts.send_modify(|n| *n += 1);
    }

    /// Forgets history: watches that resume from before get 410.
    pub(crate) fn forget(&self) {
        let mut inner = self.inner.lock().unwrap();
        inner.version += 1;
        inner.forgotten = inner.version;
        inner.changes.clear();
    }

    pub(crate) fn token(&self, token: &str, namespace: &str, account: &str, pod: Option<&str>) {
        self.insert_token(token, namespace, account, pod, None, "weft");
    }

    /// A token that is bound to one pod of that name, and not to another.
    pub(crate) fn bound_token(&self, token: &str, namespace: &str, account: &str, pod: &str, uid: &str) {
        self.insert_token(token, namespace, account, Some(pod), Some(uid), "weft");
    }

    /// A token that is meant for somebody else.
    pub(crate) fn foreign_token(&self, token: &str, namespace: &str, account: &str, pod: &str, audience: &str) {
        self.insert_token(token, namespace, account, Some(pod), None, audience);
    }

    fn insert_token(&self, token: &str, namespace: &str, account: &str, pod: Option<&str>, uid: Option<&str>, audience: &str) {
        let known = Token {
            namespace: namespace.into(),
            account: account.into(),
            pod: pod.map(str::to_owned),
            uid: uid.map(str::to_owned),
            audience: audience.into(),
        };
        self.inner.lock().unwrap().tokens.insert(token.into(), known);
    }

    /// The API server knows a token no more: it has expired, or its pod was deleted.
    pub(crate) fn expire_token(&self, token: &str) {
        self.inner.lock().unwrap().tokens.remove(token);
    }

    /// Requests that begin so (method and path) fail, until they don't.
    pub(crate) fn fail(&self, request: &str, fails: bool) {
        let mut inner = self.inner.lock().unwrap();
        inner.failing.retain(|known| known != request);
        if fails {
            inner.failing.push(request.into());
        }
    }

    pub(crate) fn requests(&self, containing: &str) -> usize {
        self.inner.lock().unwrap().requests.iter().filter(|r| r.contains(containing)).count()
    }

    pub(crate) fn get(&self, resource: &str, namespace: &str, name: &str) -> Option<Value> {
        self.inner.lock().unwrap().objects.get(&(resource.into(), namespace.into(), name.into())).cloned()
    }

    pub(crate) fn list(&self, resource: &str) -> Vec<Value> {
        self.inner.lock().unwrap().objects.iter().filter(|(k, _)| k.0 == resource).map(|(_, v)| v.clone()).collect()
    }

    pub(crate) fn put(&self, resource: &str, object: Value) {
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
        self.store(resource, &namespace, object);
    }

    pub(crate) fn remove(&self, resource: &str, namespace: &str, name: &str) -> Option<Value> {
        let mut inner = self.inner.lock().unwrap();
        let mut object = inner.objects.remove(&(resource.into(), namespace.into(), name.into()))?;
        inner.version += 1;
        object["metadata"]["resourceVersion"] = json!(inner.version.to_string());
        let change = Change { version: inner.version, resource: resource.into(), kind: "DELETED", object: object.clone() };
        inner.changes.push(change);
        drop(inner);
        self.changed.send_modify(|n| *n += 1);
        Some(object)
    }

    fn store(&self, resource: &str, namespace: &str, mut object: Value) -> Value {
        let mut inner = self.inner.lock().unwrap();
        inner.version += 1;
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        let key = (resource.to_owned(), namespace.to_owned(), name);
        let kind = if inner.objects.contains_key(&key) { "MODIFIED" } else { "ADDED" };
        object["metadata"]["resourceVersion"] = json!(inner.version.to_string());
        if object["metadata"]["uid"].is_null() {
            object["metadata"]["uid"] = json!(format!("uid-{}", inner.version));
        }
        if !namespace.is_empty() {
            object["metadata"]["namespace"] = json!(namespace);
        }
        inner.objects.insert(key, object.clone());
        let change = Change { version: inner.version, resource: resource.into(), kind, object: object.clone() };
        inner.changes.push(change);
        drop(inner);
        self.changed.send_modify(|n| *n += 1);
        object
    }
}

pub(crate) async fn eventually<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    for _ in 0..400 {
        if let Some(found) = check() {
            return found;
        }
        tokio::time::sleep(std::time::Duration::from_millis(25)).await;
    }
    panic!("did not happen: {what}");
}

fn status(code: u16, reason: &str, message: &str) -> Response {
    let body =
        json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": message});
    (StatusCode::from_u16(code).unwrap(), axum::Json(body)).into_response()
}

fn partial(mut object: Value, only_metadata: bool) -> Value {
    if only_metadata {
        let metadata = object["metadata"].take();
        return json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata});
    }
    object
}

async fn handle(State(api): State<FakeApi>, method: Method, uri: Uri, headers: HeaderMap, body: Bytes) -> Response {
    let path = uri.path().to_owned();
    let query: HashMap<String, String> = form(uri.query().unwrap_or_default());
    api.inner.lock().unwrap().requests.push(format!("{method} {uri}"));
    if api.down.load(Ordering::SeqCst) {
        // Not 503, which the client itself tries again.
        return status(500, "InternalError", "down");
    }
    let request = format!("{method} {path}");
    if api.inner.lock().unwrap().failing.iter().any(|failing| request.starts_with(failing)) {
        return status(403, "Forbidden", "not for you");
    }
    let absent = api.absent.lock().unwrap().clone();
    if !absent.is_empty() && path.starts_with(&absent) {
        return status(404, "NotFound", "the server could not find the requested resource");
    }
    if path == "/version" {
        let minor = api.minor.lock().unwrap().clone();
        return axum::Json(
            json!({"major": "1", "minor": minor, "gitVersion": format!("v1.{minor}.0"), "gitCommit": "", "gitTreeState": "",
            "buildDate": "", "goVersion": "", "compiler": "", "platform": ""}),
        )
        .into_response();
    }
    let mut parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let base: Vec<&str> = parts.drain(..if parts[0] == "api" { 2 } else { 3 }).collect();
    let namespace = if parts.len() > 2 && parts[0] == "namespaces" {
        let namespace = parts[1].to_owned();
        parts.drain(..2);
        namespace
    } else {
        String::new()
    };
    let resource = format!("{}/{}", base.join("/"), parts[0]);
    let name = parts.get(1).map(|n| (*n).to_owned());
    let only_metadata = headers.get("accept").and_then(|a| a.to_str().ok()).is_some_and(|a| a.contains("PartialObjectMetadata"));
    match (method, name) {
        (Method::GET, None) if query.get("watch").is_some_and(|w| w == "true" || w == "1") => {
            watch_stream(api, resource, namespace, query, only_metadata)
        }
        (Method::GET, None) => list(&api, &resource, &namespace, &query, only_metadata),
        (Method::GET, Some(name)) => match api.get(&resource, &namespace, &name) {
            Some(object) => axum::Json(partial(object, only_metadata)).into_response(),
            None => status(404, "NotFound", &format!("{resource} {name} not found")),
        },
        (Method::POST, None) => create(&api, &resource, &namespace, serde_json::from_slice(&body).unwrap()),
        (Method::PUT, Some(name)) => {
            let object: Value = serde_json::from_slice(&body).unwrap();
            let Some(old) = api.get(&resource, &namespace, &name) else { return status(404, "NotFound", "no such object") };
            let version = &object["metadata"]["resourceVersion"];
            if !version.is_null() && *version != old["metadata"]["resourceVersion"] {
                return status(409, "Conflict", "the object has been modified");
            }
            axum::Json(api.store(&resource, &namespace, object)).into_response()
        }
        (Method::PATCH, Some(name)) => {
            let Some(mut object) = api.get(&resource, &namespace, &name) else {
                return status(404, "NotFound", "no such object");
            };
            let patch: Value = serde_json::from_slice(&body).unwrap();
            if headers["content-type"] == "application/json-patch+json" {
                let patch: json_patch::Patch = serde_json::from_value(patch).unwrap();
                if let Err(error) = json_patch::patch(&mut object, &patch) {
                    return status(422, "Invalid", &error.to_string());
                }
            } else {
                json_patch::merge(&mut object, &patch);
            }
            axum::Json(api.store(&resource, &namespace, object)).into_response()
        }
        (Method::DELETE, Some(name)) => match api.remove(&resource, &namespace, &name) {
            Some(object) => axum::Json(object).into_response(),
            None => status(404, "NotFound", "no such object"),
        },
        _ => status(405, "MethodNotAllowed", "not here"),
    }
}

fn create(api: &FakeApi, resource: &str, namespace: &str, object: Value) -> Response {
    if resource.ends_with("/tokenreviews") {
        let token = object["spec"]["token"].as_str().unwrap_or_default();
        let known = api.inner.lock().unwrap().tokens.get(token).cloned();
        let answer = match known {
            None => json!({"authenticated": false, "error": "[invalid bearer token, token has expired]"}),
            // As Kubernetes does: a token of which no audience is asked for is not authenticated.
            Some(known) if !object["spec"]["audiences"].as_array().is_some_and(|a| a.contains(&json!(known.audience))) => {
                json!({"authenticated": false, "error": format!("[invalid bearer token, token audiences [{:?}] is invalid for the target \
                    audiences {}]", known.audience, object["spec"]["audiences"])})
            }
            Some(Token { namespace, account, pod, uid, audience }) => {
                let mut extra = json!({});
                if let Some(pod) = pod {
                    extra["authentication.kubernetes.io/pod-name"] = json!([pod]);
                }
                if let Some(uid) = uid {
                    extra["authentication.kubernetes.io/pod-uid"] = json!([uid]);
                }
                json!({"authenticated": true, "audiences": [audience],
                    "user": {"username": format!("system:serviceaccount:{namespace}:{account}"), "extra": extra}})
            }
        };
        let mut review = object;
        review["status"] = answer;
        return axum::Json(review).into_response();
    }
    let name = object["metadata"]["name"].as_str().unwrap().to_owned();
    if api.get(resource, namespace, &name).is_some() {
        return status(409, "AlreadyExists", &format!("{name} already exists"));
    }
    (StatusCode::CREATED, axum::Json(api.store(resource, namespace, object))).into_response()
}

fn matches(key: &(String, String, String), resource: &str, namespace: &str, query: &HashMap<String, String>) -> bool {
    let by_name = query.get("fieldSelector").is_none_or(|f| *f == format!("metadata.name={}", key.2));
    key.0 == resource && (namespace.is_empty() || key.1 == namespace) && by_name
}

fn list(api: &FakeApi, resource: &str, namespace: &str, query: &HashMap<String, String>, only_metadata: bool) -> Response {
    let inner = api.inner.lock().unwrap();
    let from: usize = query.get("continue").and_then(|c| c.parse().ok()).unwrap_or(0);
    let limit: usize = query.get("limit").and_then(|l| l.parse().ok()).unwrap_or(usize::MAX);
    let all: Vec<&Value> = inner.objects.iter().filter(|(k, _)| matches(k, resource, namespace, query)).map(|(_, v)| v).collect();
    let items: Vec<Value> = all.iter().skip(from).take(limit).map(|v| partial((*v).clone(), only_metadata)).collect();
    let next = from + items.len();
    let token = if next < all.len() { next.to_string() } else { String::new() };
    axum::Json(json!({"kind": "List", "apiVersion": "v1", "items": items,
        "metadata": {"resourceVersion": inner.version.to_string(), "continue": token}}))
    .into_response()
}

fn watch_stream(
    api: FakeApi,
    resource: String,
    namespace: String,
    query: HashMap<String, String>,
    only_metadata: bool,
) -> Response {
    let initial = query.get("sendInitialEvents").is_some_and(|s| s == "true");
    let ignored = api.ignores_streams.load(Ordering::SeqCst);
    if initial && !ignored && !api.streams.load(Ordering::SeqCst) {
        return status(422, "Invalid", "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled");
    }
    let mut lines = Vec::new();
    let mut since: u64 = query.get("resourceVersion").and_then(|v| v.parse().ok()).unwrap_or(0);
    let line = move |kind: &str, object: Value| {
        Bytes::from(format!("{}\n", json!({"type": kind, "object": partial(object, only_metadata)})))
    };
    {
        let inner = api.inner.lock().unwrap();
        if initial {
            for (key, object) in &inner.objects {
                if matches(key, &resource, &namespace, &query) {
                    lines.push(line("ADDED", object.clone()));
                }
            }
            since = inner.version;
            let end = if ignored { "none" } else { "k8s.io/initial-events-end" };
            let bookmark = json!({"type": "BOOKMARK", "object": {"kind": "X", "apiVersion": "v1", "metadata": {
                "resourceVersion": since.to_string(), "annotations": {end: "true"}}}});
            lines.push(Bytes::from(format!("{bookmark}\n")));
        } else if since < inner.forgotten {
            let gone = json!({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 410,
                "reason": "Expired", "message": "too old resource version"}});
            return Body::from(format!("{gone}\n")).into_response();
        }
    }
    let (changed, mut cuts) = (api.changed.subscribe(), api.cuts.subscribe());
    cuts.mark_unchanged();
    let live = futures::stream::unfold((api, since, changed), move |(api, mut since, mut changed)| {
        let (resource, namespace, query) = (resource.clone(), namespace.clone(), query.clone());
        async move {
            loop {
                changed.mark_unchanged();
                let found: Vec<Bytes> = {
                    let inner = api.inner.lock().unwrap();
                    let begin = inner.changes.partition_point(|c| c.version <= since);
                    let mut found = Vec::new();
                    for change in &inner.changes[begin..] {
                        since = change.version;
                        let metadata = &change.object["metadata"];
                        let key = (
                            change.resource.clone(),
                            metadata["namespace"].as_str().unwrap_or_default().to_owned(),
                            metadata["name"].as_str().unwrap_or_default().to_owned(),
                        );
                        if matches(&key, &resource, &namespace, &query) {
                            found.push(line(change.kind, change.object.clone()));
                        }
                    }
                    found
                };
                if !found.is_empty() {
                    let chunk = Bytes::from(found.concat());
                    return Some((chunk, (api, since, changed)));
                }
                if changed.changed().await.is_err() {
                    return None;
                }
            }
        }
    });
    let stream = futures::stream::iter(lines).chain(live).take_until(async move {
        let _ = cuts.changed().await;
    });
    Body::from_stream(stream.map(Ok::<_, std::convert::Infallible>)).into_response()
}

fn form(query: &str) -> HashMap<String, String> {
    let decode = |text: &str| {
        let mut bytes = Vec::new();
        let mut rest = text.bytes();
        while let Some(byte) = rest.next() {
            match byte {
                b'+' => bytes.push(b' '),
                b'%' => {
                    let hex: String = rest.by_ref().take(2).map(char::from).collect();
                    bytes.push(u8::from_str_radix(&hex, 16).unwrap());
                }
                other => bytes.push(other),
            }
        }
        String::from_utf8(bytes).unwrap()
    };
    query.split('&').filter_map(|pair| pair.split_once('=')).map(|(k, v)| (decode(k), decode(v))).collect()
}
