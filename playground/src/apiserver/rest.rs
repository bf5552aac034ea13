//! The HTTP face: from a path and a verb to the functions of [`Core`], and back to what the client asked to see.

use super::api::{Core, DeleteOptions, Request as Write, canonical};
use super::auth::User;
use super::patch::{self, PatchKind};
use super::resource::{self, ResourceInfo};
use super::selector::{Fields, Labels};
use super::status::Status;
use super::store::{EventKind, Watch};
use super::{discovery, protobuf, streams, table};
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::StreamExt as _;
use http_body_util::{BodyExt as _, Limited};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// The largest body that is read.
const LIMIT: usize = 3 * 1024 * 1024;
/// How often a watch that asks for bookmarks gets one.
const BOOKMARKS: Duration = Duration::from_secs(10);

/// A path, taken apart.
#[derive(Debug, PartialEq)]
pub(super) struct Target {
    pub group: String,
    pub version: String,
    pub namespace: String,
    pub resource: String,
    pub name: String,
    pub sub: String,
}

fn parse(path: &str) -> Option<Target> {
    let mut parts: Vec<String> = path.trim_matches('/').split('/').map(percent).collect();
    let rest = match parts.first().map(String::as_str) {
        Some("api") => {
            parts.insert(1, String::new());
            parts.split_off(1)
        }
        Some("apis") => parts.split_off(1),
        _ => return None,
    };
    let [group, version, rest @ ..] = rest.as_slice() else { return None };
    let (namespace, rest) = match rest {
        [ns, name, more @ ..] if ns == "namespaces" && !more.is_empty() && !matches!(more[0].as_str(), "status" | "finalize") => {
            (name.clone(), more)
        }
        other => (String::new(), other),
    };
    let at = |i: usize| rest.get(i).cloned().unwrap_or_default();
    (!rest.is_empty()).then(|| Target {
        group: group.clone(),
        version: version.clone(),
        namespace,
        resource: at(0),
        name: at(1),
        sub: rest.get(2..).unwrap_or_default().join("/"),
    })
}

fn percent(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let hex = bytes
            .get(i + 1..i + 3)
            .filter(|_| bytes[i] == b'%')
            .and_then(|h| u8::from_str_radix(std::str::from_utf8(h).ok()?, 16).ok());
        if let Some(byte) = hex {
            out.push(byte);
            i += 3;
        } else {
            out.push(if bytes[i] == b'+' { b' ' } else { bytes[i] });
            i += 1;
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// The query, decoded; of a repeated key all values.
pub(super) fn query(text: &str) -> HashMap<String, Vec<String>> {
    let mut out: HashMap<String, Vec<String>> = HashMap::new();
    for pair in text.split('&').filter(|p| !p.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        out.entry(percent(key)).or_default().push(percent(value));
    }
    out
}

/// One request, as the handlers need it.
pub(super) struct Ask {
    pub core: Arc<Core>,
    pub user: User,
    pub info: Arc<ResourceInfo>,
    pub target: Target,
    pub query: HashMap<String, Vec<String>>,
    accept: String,
    content: String,
    agent: String,
}

impl Ask {
    pub(super) fn param(&self, key: &str) -> &str {
        self.query.get(key).and_then(|v| v.first()).map_or("", String::as_str)
    }

    pub(super) fn flag(&self, key: &str) -> bool {
        matches!(self.param(key), "true" | "1")
    }

    fn write(&self) -> Write {
        let manager = match self.param("fieldManager") {
            "" => self.agent.split('/').next().unwrap_or("unknown").to_owned(),
            given => given.to_owned(),
        };
        Write { dry_run: self.param("dryRun") == "All", manager, ..Write::new(self.user.clone()) }
    }

    fn namespace(&self) -> &str {
        if self.info.namespaced { &self.target.namespace } else { "" }
    }

    /// An object in the shape that the client asked for.
    fn shape(&self, object: Value) -> Value {
        if self.accept.contains("as=Table") {
            let meta = json!({"resourceVersion": object["metadata"]["resourceVersion"]});
            return table::table(&self.info, &self.target.version, &[object], &meta, self.param("includeObject"), true);
        }
        if self.accept.contains("as=PartialObjectMetadata") { table::partial(&object) } else { object }
    }
}

pub(super) fn reply(code: u16, body: &Value) -> Response {
    let code = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (code, [(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}

fn error(status: &Status) -> Response {
    reply(status.code, &status.to_json())
}

/// The whole server.
pub(super) async fn handle(State(core): State<Arc<Core>>, request: Request) -> Response {
    match route(core, request).await {
        Ok(response) => response,
        Err(status) => error(&status),
    }
}

async fn route(core: Arc<Core>, request: Request) -> Result<Response, Status> {
    let path = request.uri().path().to_owned();
    if matches!(path.as_str(), "/healthz" | "/readyz" | "/livez") {
        return Ok("ok".into_response());
    }
    let text = |headers: &HeaderMap, name: header::HeaderName| {
        headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned()
    };
    let headers = request.headers();
    let user = core.authority.user(headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok()))?;
    let accept = text(headers, header::ACCEPT);
    if let Some(response) = documents(&core, &path, &accept) {
        return Ok(response);
    }
    let missing = || Status::new(404, "NotFound", "the server could not find the requested resource");
    let target = parse(&path).ok_or_else(missing)?;
    let info = core
        .registry
        .get(&target.group, &target.resource)
        .filter(|i| i.version(&target.version).is_some())
        .ok_or_else(missing)?;
    let info = if info.key == canonical(&info.key) {
        info
    } else {
        Arc::new(ResourceInfo { key: canonical(&info.key), ..(*info).clone() })
    };
    let ask = Ask {
        user,
        info,
        query: query(request.uri().query().unwrap_or_default()),
        accept,
        content: text(headers, header::CONTENT_TYPE),
        agent: text(headers, header::USER_AGENT),
        core,
        target,
    };
    let method = request.method().clone();
    if ask.info.key == resource::PODS.key() && matches!(ask.target.sub.as_str(), "exec" | "attach" | "portforward") {
        return streams::upgrade(ask, request).await;
    }
    let body = Limited::new(request.into_body(), LIMIT).collect().await;
    let body = body.map_err(|_| Status::new(413, "RequestEntityTooLarge", "the body is larger than 3 MiB"))?.to_bytes();
    dispatch(ask, &method, body).await
}

fn documents(core: &Core, path: &str, accept: &str) -> Option<Response> {
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let wants_aggregated = accept.contains("as=APIGroupDiscoveryList");
    let registry = &core.registry;
    let aggregated = |core: bool| {
        let mut response = reply(200, &discovery::aggregated(registry, core));
        response.headers_mut().insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"),
        );
        response
    };
    Some(match parts.as_slice() {
        ["version"] => reply(200, &discovery::version()),
        ["api"] if wants_aggregated => aggregated(true),
        ["apis"] if wants_aggregated => aggregated(false),
        ["api"] => reply(200, &discovery::core_versions()),
        ["apis"] => reply(200, &discovery::groups(registry)),
        ["api", version] => reply(200, &discovery::resources(registry.by_group().get("")?, "", version)),
        ["apis", group] => reply(200, &discovery::group(group, registry.by_group().get(*group)?)),
        ["apis", group, version] => reply(200, &discovery::resources(registry.by_group().get(*group)?, group, version)),
        ["openapi", "v2"] => reply(200, &discovery::openapi_v2(registry)),
        ["openapi", "v3"] => reply(200, &discovery::openapi_v3_index(registry)),
        ["openapi", "v3", "api", version] => reply(200, &discovery::openapi_v3(registry, "", version)),
        ["openapi", "v3", "apis", group, version] => reply(200, &discovery::openapi_v3(registry, group, version)),
        _ => return None,
    })
}

/// A body as JSON; YAML is read too, as the real server does.
fn decode(ask: &Ask, body: &Bytes) -> Result<Value, Status> {
    if body.is_empty() {
        return Ok(Value::Null);
    }
    if ask.content.contains("protobuf") {
        let object = protobuf::object(body);
        return object.map_err(|why| {
            Status::new(
                415,
                "UnsupportedMediaType",
                format!("the playground can't read this protobuf body ({why}): use JSON or YAML, with kubectl: apply -f"),
            )
        });
    }
    if ask.content.contains("cbor") {
        return Err(Status::new(
            415,
            "UnsupportedMediaType",
            format!(
                "the body of the request was in an unknown format - accepted media types include: application/json, application/yaml ({})",
                ask.content
            ),
        ));
    }
    if ask.content.contains("yaml") {
        let text = std::str::from_utf8(body).map_err(|e| Status::bad_request(e.to_string()))?;
        return serde_saphyr::from_str(text).map_err(|e| Status::bad_request(format!("error decoding YAML: {e}")));
    }
    serde_json::from_slice(body).map_err(|e| Status::bad_request(format!("couldn't get version/kind; json parse error: {e}")))
}

async fn dispatch(ask: Ask, method: &Method, body: Bytes) -> Result<Response, Status> {
    let sub = ask.target.sub.clone();
    if method == Method::GET && sub == "log" {
        return streams::logs(&ask).await;
    }
    let decoded = decode(&ask, &body)?;
    if method == Method::POST && (ask.info.create_only || matches!(sub.as_str(), "token" | "binding" | "eviction")) {
        return special(&ask, decoded).await;
    }
    if sub == "scale" {
        return scale(&ask, method, decoded).await;
    }
    let write = ask.write();
    let (ns, name) = (ask.namespace().to_owned(), ask.target.name.clone());
    let version = ask.target.version.clone();
    let (code, object) = match *method {
        Method::GET if name.is_empty() => return list(ask).await,
        Method::GET if ask.flag("watch") => return list(ask).await,
        Method::GET => (200, Core::present(&ask.info, &version, &*ask.core.get(&ask.info, &ns, &name)?)),
        Method::POST if name.is_empty() => (201, ask.core.create(&write, &ask.info, &version, &ns, decoded).await?),
        Method::PUT => (200, put(&ask, &write, &ns, &name, &sub, decoded).await?),
        Method::PATCH => patch(&ask, &write, &ns, &name, &sub, decoded).await?,
        Method::DELETE if name.is_empty() => return delete_collection(&ask, &write, &decoded).await,
        Method::DELETE => {
            let (last, gone) = ask.core.delete(&write, &ask.info, (&ns, &name), &delete_options(&ask, &decoded)).await?;
            if gone {
                let details = json!({"name": name, "group": ask.info.key.group, "kind": ask.info.key.resource, "uid": last["metadata"]["uid"]});
                (200, json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}))
            } else {
                (202, Core::present(&ask.info, &version, &last))
            }
        }
        _ => return Err(Status::new(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")),
    };
    let shaped = if object["kind"] == "Status" { object } else { ask.shape(object) };
    let mut response = reply(code, &shaped);
    for warning in write.warnings.lock().unwrap_or_else(std::sync::PoisonError::into_inner).iter() {
        let text = warning.replace('\\', "\\\\").replace('"', "\\\"");
        if let Ok(value) = HeaderValue::from_bytes(format!("299 - \"{text}\"").as_bytes()) {
            response.headers_mut().append(header::WARNING, value);
        }
    }
    Ok(response)
}

async fn put(ask: &Ask, write: &Write, ns: &str, name: &str, sub: &str, object: Value) -> Result<Value, Status> {
    let (info, version) = (&ask.info, &ask.target.version);
    let given = object.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
    if !given.is_empty() && given != name {
        return Err(Status::bad_request(format!("the name of the object ({given}) does not match the name on the URL ({name})")));
    }
    let absent = ask.core.store.get(&info.key, ns, name).is_none();
    // Unconditional update of what isn't there creates it, for the kinds whose strategy says so; leases are one.
    if absent && sub.is_empty() && info.key == resource::LEASES.key() && object["metadata"]["resourceVersion"].is_null() {
        return ask.core.create(write, info, version, ns, object).await;
    }
    if info.key == resource::NAMESPACES.key() && sub == "finalize" {
        let change = |current: &Value| {
            let mut new = current.clone();
            new["spec"]["finalizers"] = object["spec"]["finalizers"].clone();
            Ok(new)
        };
        return ask.core.modify(write, info, version, (ns, name), sub, &change).await;
    }
    ask.core.modify(write, info, version, (ns, name), sub, &|_| Ok(object.clone())).await
}

async fn patch(ask: &Ask, write: &Write, ns: &str, name: &str, sub: &str, body: Value) -> Result<(u16, Value), Status> {
    let (info, version) = (&ask.info, &ask.target.version);
    let content = ask.content.split(';').next().unwrap_or_default().trim();
    let kind = match content {
        "application/json-patch+json" => PatchKind::Json,
        "application/merge-patch+json" => PatchKind::Merge,
        "application/strategic-merge-patch+json" if info.custom => {
            return Err(Status::new(415, "UnsupportedMediaType", "strategic merge patch is not supported for custom resources"));
        }
        "application/strategic-merge-patch+json" => PatchKind::Strategic,
        "application/apply-patch+yaml" | "application/apply-patch+cbor" => return apply(ask, write, ns, name, sub, body).await,
        other => {
            return Err(Status::new(
                415,
                "UnsupportedMediaType",
                format!("the body of the request was in an unknown format: {other}"),
            ));
        }
    };
    let change = |current: &Value| patch::apply(kind, current, &body);
    Ok((200, ask.core.modify(write, info, version, (ns, name), sub, &change).await?))
}

async fn apply(ask: &Ask, write: &Write, ns: &str, name: &str, sub: &str, body: Value) -> Result<(u16, Value), Status> {
    let (info, version) = (&ask.info, &ask.target.version);
    if ask.param("fieldManager").is_empty() {
        return Err(Status::bad_request(
            "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required for apply patch",
        ));
    }
    let force = ask.flag("force");
    let api_version = info.api_version(version);
    let shape = patch::Shape::of(info, version);
    if ask.core.store.get(&info.key, ns, name).is_none() {
        let mut object = patch::server_side(None, &body, &write.manager, force, &api_version, shape)?;
        object["metadata"]["name"] = json!(name);
        return match ask.core.create(write, info, version, ns, object).await {
            Ok(made) => Ok((201, made)),
            Err(status) if status.is_already_exists() => Box::pin(apply(ask, write, ns, name, sub, body)).await,
            Err(status) => Err(status),
        };
    }
    let change = |current: &Value| patch::server_side(Some(current), &body, &write.manager, force, &api_version, shape);
    Ok((200, ask.core.modify(write, info, version, (ns, name), sub, &change).await?))
}

fn delete_options(ask: &Ask, body: &Value) -> DeleteOptions {
    let number = ask.param("gracePeriodSeconds").parse().ok();
    let text = |key: &str| match ask.param(key) {
        "" => body[key].as_str().map(str::to_owned),
        given => Some(given.to_owned()),
    };
    DeleteOptions {
        grace_period_seconds: number.or_else(|| body["gracePeriodSeconds"].as_u64()),
        propagation: text("propagationPolicy").or_else(|| (body["orphanDependents"] == json!(true)).then(|| "Orphan".into())),
        uid: body.pointer("/preconditions/uid").and_then(Value::as_str).map(str::to_owned),
        resource_version: body.pointer("/preconditions/resourceVersion").and_then(Value::as_str).map(str::to_owned),
        dry_run: body["dryRun"].as_array().is_some_and(|d| !d.is_empty()),
    }
}

async fn delete_collection(ask: &Ask, write: &Write, body: &Value) -> Result<Response, Status> {
    let (labels, fields) = selectors(ask)?;
    let options = delete_options(ask, body);
    let ns = (ask.info.namespaced && !ask.target.namespace.is_empty()).then_some(ask.target.namespace.as_str());
    for item in ask.core.store.list(&ask.info.key, ns).items {
        if labels.matches(&item) && fields.matches(&item) {
            let (ns, name) = super::api::id_of(&item);
            match ask.core.delete(write, &ask.info, (&ns, &name), &options).await {
                Err(status) if !status.is_not_found() => return Err(status),
                _ => {}
            }
        }
    }
    Ok(reply(200, &json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"})))
}

fn selectors(ask: &Ask) -> Result<(Labels, Fields), Status> {
    let labels = Labels::parse(ask.param("labelSelector"))?;
    let fields = Fields::parse(ask.param("fieldSelector"), &ask.info.kind)?;
    Ok((labels, fields))
}

async fn list(ask: Ask) -> Result<Response, Status> {
    let (labels, mut fields) = selectors(&ask)?;
    if !ask.target.name.is_empty() {
        fields = Fields::parse(&format!("metadata.name={}", ask.target.name), &ask.info.kind)?;
    }
    let ns = (ask.info.namespaced && !ask.target.namespace.is_empty()).then(|| ask.target.namespace.clone());
    if ask.flag("watch") {
        return watch(ask, ns, labels, fields);
    }
    let store = &ask.core.store;
    let wanted = ask.param("resourceVersion");
    if ask.param("resourceVersionMatch") == "Exact" && wanted.parse::<u64>().is_ok_and(|w| w != store.revision() && w != 0) {
        return Err(Status::expired("The provided resource version is too old to be listed exactly"));
    }
    let limit: usize = ask.param("limit").parse().unwrap_or(0);
    let (all, revision, start) = match ask.param("continue").split_once('.') {
        Some((page, offset)) => {
            let found = page.parse().ok().and_then(|p| store.page(p));
            let (items, revision) = found.ok_or_else(|| {
                Status::expired("The provided continue parameter is too old to display a consistent list result")
            })?;
            (items, revision, offset.parse().unwrap_or(0))
        }
        None => {
            let snapshot = store.list(&ask.info.key, ns.as_deref());
            let items = snapshot.items.into_iter().filter(|o| labels.matches(o) && fields.matches(o)).collect();
            (Arc::new(items), snapshot.revision, 0)
        }
    };
    let end = if limit == 0 { all.len() } else { (start + limit).min(all.len()) };
    let mut meta = json!({"resourceVersion": revision.to_string()});
    if end < all.len() {
        let page = store.keep_page(Arc::clone(&all), revision);
        meta["continue"] = json!(format!("{page}.{end}"));
        meta["remainingItemCount"] = json!(all.len() - end);
    }
    let items: Vec<Value> = all[start.min(end)..end].iter().map(|o| Core::present(&ask.info, &ask.target.version, o)).collect();
    if ask.accept.contains("as=Table") {
        return Ok(reply(200, &table::table(&ask.info, &ask.target.version, &items, &meta, ask.param("includeObject"), true)));
    }
    let (kind, version, items) = if ask.accept.contains("as=PartialObjectMetadataList") {
        ("PartialObjectMetadataList".to_owned(), "meta.k8s.io/v1".to_owned(), items.iter().map(table::partial).collect())
    } else {
        (ask.info.list_kind.clone(), ask.info.api_version(&ask.target.version), items)
    };
    Ok(reply(200, &json!({"kind": kind, "apiVersion": version, "metadata": meta, "items": items})))
}

/// What a watch still has to send before it follows the store.
struct Watching {
    ask: Ask,
    ns: Option<String>,
    labels: Labels,
    fields: Fields,
    first: std::collections::VecDeque<Value>,
    watch: Watch,
    bookmarks: bool,
    columns: bool,
    until: tokio::time::Instant,
}

fn watch(ask: Ask, ns: Option<String>, labels: Labels, fields: Fields) -> Result<Response, Status> {
    let store = &ask.core.store;
    let since = ask.param("resourceVersion").to_owned();
    let initial = ask.flag("sendInitialEvents");
    let mut first = std::collections::VecDeque::new();
    let watch = if initial || since.is_empty() || since == "0" {
        let (snapshot, watch) = store.list_and_watch(&ask.info.key);
        let fits = |o: &&Arc<Value>| {
            ns.as_deref().is_none_or(|ns| o["metadata"]["namespace"] == ns) && labels.matches(o) && fields.matches(o)
        };
        for object in snapshot.items.iter().filter(fits) {
            first.push_back(json!({"type": "ADDED", "object": Core::present(&ask.info, &ask.target.version, object)}));
        }
        if initial && ask.flag("allowWatchBookmarks") {
            first.push_back(json!({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": snapshot.revision.to_string(), "annotations": {"k8s.io/initial-events-end": "true"}}}}));
        }
        watch
    } else {
        let revision = since.parse().map_err(|_| Status::bad_request(format!("Invalid value: {since:?}: resourceVersion")))?;
        match store.watch(&ask.info.key, revision) {
            Ok(watch) => watch,
            Err(oldest) => {
                // As the real server says it: the watch starts and its one event is the error. Reflectors list again only
                // then; a refused request they repeat.
                let status = Status::expired(format!("too old resource version: {since} ({oldest})"));
                let event = json!({"type": "ERROR", "object": status.to_json()});
                let headers = [(header::CONTENT_TYPE, "application/json")];
                return Ok((StatusCode::OK, headers, format!("{event}\n")).into_response());
            }
        }
    };
    let seconds: u64 = ask.param("timeoutSeconds").parse().ok().filter(|s| *s > 0).unwrap_or(1800);
    let state = Watching {
        bookmarks: ask.flag("allowWatchBookmarks"),
        until: tokio::time::Instant::now() + Duration::from_secs(seconds),
        columns: true,
        ask,
        ns,
        labels,
        fields,
        first,
        watch,
    };
    let body = futures::stream::unfold(state, |mut state| async move {
        state.next().await.map(|line| (Ok::<_, std::io::Error>(line), state))
    });
    Ok((StatusCode::OK, [(header::CONTENT_TYPE, "application/json")], Body::from_stream(body)).into_response())
}

impl Watching {
    async fn next(&mut self) -> Option<Bytes> {
        if let Some(event) = self.first.pop_front() {
            return Some(self.line(event));
        }
        loop {
            let next = tokio::select! {
                event = self.watch.next() => event?,
                () = tokio::time::sleep(BOOKMARKS), if self.bookmarks => {
                    let event = json!({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": self.watch.seen().to_string()}}});
                    return Some(self.line(event));
                }
                () = tokio::time::sleep_until(self.until) => return None,
            };
            let fits = |o: &Value| {
                self.ns.as_deref().is_none_or(|ns| o["metadata"]["namespace"] == ns)
                    && self.labels.matches(o)
                    && self.fields.matches(o)
            };
            let now = fits(&next.object);
            let before = next.previous.as_ref().is_some_and(|p| fits(p));
            let kind = match (next.kind, before, now) {
                (EventKind::Added, _, true) | (EventKind::Modified, false, true) => "ADDED",
                (EventKind::Modified, true, true) => "MODIFIED",
                (EventKind::Modified, true, false) => "DELETED",
                (EventKind::Deleted, ..) if before || now => "DELETED",
                _ => continue,
            };
            let event = json!({"type": kind, "object": Core::present(&self.ask.info, &self.ask.target.version, &next.object)});
            return Some(self.line(event));
        }
    }

    fn line(&mut self, mut event: Value) -> Bytes {
        let bookmark = event["type"] == "BOOKMARK";
        let object = event["object"].take();
        event["object"] = if self.ask.accept.contains("as=Table") {
            let items = if bookmark { vec![] } else { vec![object.clone()] };
            let meta = json!({"resourceVersion": object["metadata"]["resourceVersion"]});
            let columns = std::mem::replace(&mut self.columns, false);
            table::table(&self.ask.info, &self.ask.target.version, &items, &meta, self.ask.param("includeObject"), columns)
        } else if self.ask.accept.contains("as=PartialObjectMetadata") {
            let mut partial = table::partial(&object);
            partial["metadata"] = object["metadata"].clone();
            partial
        } else if bookmark {
            let mut marked = object;
            marked["kind"] = json!(self.ask.info.kind);
            marked["apiVersion"] = json!(self.ask.info.api_version(&self.ask.target.version));
            marked["metadata"]["creationTimestamp"] = Value::Null;
            marked
        } else {
            object
        };
        Bytes::from(format!("{event}\n"))
    }
}

async fn scale(ask: &Ask, method: &Method, body: Value) -> Result<Response, Status> {
    let paths = ask.info.version(&ask.target.version).and_then(|v| v.scale.clone());
    let paths = paths.ok_or_else(|| Status::new(404, "NotFound", "there is no scale subresource"))?;
    let pointer = |path: &str| path.replace('.', "/");
    let (ns, name) = (ask.namespace(), ask.target.name.as_str());
    let show = |object: &Value| {
        let number = |p: &str| object.pointer(&pointer(p)).and_then(Value::as_i64).unwrap_or(0);
        let selector = match paths.selector.as_deref().and_then(|p| object.pointer(&pointer(p))) {
            Some(Value::String(text)) => text.clone(),
            Some(selector) => selector["matchLabels"]
                .as_object()
                .into_iter()
                .flatten()
                .map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default()))
                .collect::<Vec<_>>()
                .join(","),
            None => String::new(),
        };
        let mut metadata = json!({});
        for field in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
            metadata[field] = object["metadata"][field].clone();
        }
        json!({"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata, "spec": {"replicas": number(&paths.spec)},
            "status": {"replicas": number(&paths.status), "selector": selector}})
    };
    if method == Method::GET {
        return Ok(reply(200, &show(&*ask.core.get(&ask.info, ns, name)?)));
    }
    let kind = match (method, ask.content.split(';').next().unwrap_or_default().trim()) {
        (&Method::PATCH, "application/json-patch+json") => Some(PatchKind::Json),
        (&Method::PATCH, _) => Some(PatchKind::Merge),
        _ => None,
    };
    let change = |current: &Value| {
        let scale = match kind {
            Some(kind) => patch::apply(kind, &show(current), &body)?,
            None => body.clone(),
        };
        let replicas = scale["spec"]["replicas"].as_i64().unwrap_or(0);
        if replicas < 0 {
            return Err(Status::bad_request("spec.replicas must not be negative"));
        }
        patch::apply(PatchKind::Merge, current, &nested(&paths.spec, &json!(replicas))).map(|mut new| {
            if let Some(version) = scale["metadata"]["resourceVersion"].as_str().filter(|v| !v.is_empty()) {
                new["metadata"]["resourceVersion"] = json!(version);
            }
            new
        })
    };
    let object = ask.core.modify(&ask.write(), &ask.info, &ask.target.version, (ns, name), "", &change).await?;
    Ok(reply(200, &show(&object)))
}

fn nested(path: &str, value: &Value) -> Value {
    path.split('.').filter(|s| !s.is_empty()).rev().fold(value.clone(), |inner, key| Value::Object(super::api::entry(key, inner)))
}

async fn special(ask: &Ask, mut body: Value) -> Result<Response, Status> {
    let (ns, name) = (ask.target.namespace.as_str(), ask.target.name.as_str());
    match (ask.info.kind.as_str(), ask.target.sub.as_str()) {
        ("TokenReview", _) => body["status"] = ask.core.authority.review(&body["spec"]),
        ("SelfSubjectReview", _) => body["status"] = json!({"userInfo": ask.user.to_json()}),
        ("SelfSubjectRulesReview", _) => {
            body["status"] = json!({"resourceRules": [{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}], "nonResourceRules": [], "incomplete": false});
        }
        (kind, "") if kind.ends_with("AccessReview") => {
            body["status"] = json!({"allowed": true, "reason": "the playground enforces no RBAC"});
        }
        (_, "token") => {
            let spec = &body["spec"];
            let audiences: Vec<String> =
                spec["audiences"].as_array().into_iter().flatten().filter_map(|a| a.as_str().map(str::to_owned)).collect();
            let seconds = spec["expirationSeconds"].as_u64().unwrap_or(3600);
            let bound = &spec["boundObjectRef"];
            let pod = (bound["kind"] == "Pod")
                .then(|| (bound["name"].as_str().unwrap_or_default(), bound["uid"].as_str().unwrap_or_default()));
            let (token, expires) = ask.core.token(ns, name, &audiences, seconds, pod)?;
            body["status"] = json!({"token": token, "expirationTimestamp": expires});
        }
        (_, "binding") => {
            let node = body["target"]["name"].as_str().unwrap_or_default().to_owned();
            super::client::Api::new(Arc::clone(&ask.core), ask.user.clone()).bind(ns, name, &node).await?;
            return Ok(reply(201, &json!({"kind": "Status", "apiVersion": "v1", "status": "Success"})));
        }
        (_, "eviction") => {
            ask.core.delete(&ask.write(), &ask.info, (ns, name), &delete_options(ask, &body["deleteOptions"])).await?;
            return Ok(reply(201, &json!({"kind": "Status", "apiVersion": "v1", "status": "Success"})));
        }
        _ => return Err(Status::new(405, "MethodNotAllowed", "the playground does not serve this")),
    }
    Ok(reply(201, &body))
}

/// For streams of bytes as a body.
pub(super) fn stream(body: futures::stream::BoxStream<'static, std::io::Result<Bytes>>) -> Response {
    (StatusCode::OK, [(header::CONTENT_TYPE, "text/plain")], Body::from_stream(body.map(|b| b))).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_taken_apart() {
        for (path, want) in [
            ("/api/v1/pods", ("", "v1", "", "pods", "", "")),
            ("/api/v1/namespaces/a", ("", "v1", "", "namespaces", "a", "")),
            ("/api/v1/namespaces/a/status", ("", "v1", "", "namespaces", "a", "status")),
            ("/api/v1/namespaces/a/pods/b/log", ("", "v1", "a", "pods", "b", "log")),
            ("/apis/apps/v1/namespaces/a/deployments/d/scale", ("apps", "v1", "a", "deployments", "d", "scale")),
        ] {
            let t = parse(path).unwrap();
            assert_eq!(
                (
                    t.group.as_str(),
                    t.version.as_str(),
                    t.namespace.as_str(),
                    t.resource.as_str(),
                    t.name.as_str(),
                    t.sub.as_str()
                ),
                want,
                "{path}"
            );
        }
        assert_eq!(query("labelSelector=a%3Db%2Cc&x=1+2&command=a&command=b")["labelSelector"], ["a=b,c"]);
        assert_eq!(query("command=a&command=b")["command"], ["a", "b"]);
    }
}
