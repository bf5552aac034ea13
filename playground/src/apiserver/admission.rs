//! Admission webhooks, called over HTTPS as Kubernetes calls them: mutating ones one after the other in the order of their names, then
//! the validating ones all at once; those with `reinvocationPolicy: IfNeeded` again when something changed the object after them.
//!
//! A match condition is evaluated only in the one form that a mesh's injector needs; any other is refused when the
//! configuration is created, because ignoring it would call a webhook that should not be called.

use super::api::{Core, Request};
use super::defaults;
use super::resource::{self, ResourceInfo};
use super::selector::Labels;
use super::status::Status;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

/// The one match condition that is understood.
const NOT_HOST_NETWORK: &str = "!(has(object.spec.hostNetwork) && object.spec.hostNetwork)";

/// What is done to the object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// It is new.
    Create,
    /// It changes.
    Update,
    /// It goes.
    Delete,
}

impl Operation {
    fn as_str(self) -> &'static str {
        match self {
            Self::Create => "CREATE",
            Self::Update => "UPDATE",
            Self::Delete => "DELETE",
        }
    }
}

/// One write as admission sees it.
pub struct Call<'a> {
    /// The resource.
    pub info: &'a ResourceInfo,
    /// The version of the request; empty: the preferred one.
    pub version: &'a str,
    /// What is done.
    pub operation: Operation,
    /// The subresource.
    pub subresource: &'a str,
    /// The namespace.
    pub namespace: &'a str,
    /// The object as it was.
    pub old: Option<&'a Value>,
}

/// What a webhook configuration says that can't be honoured, or is wrong.
pub fn check(configuration: &Value, causes: &mut Vec<(String, String)>) {
    for (i, hook) in configuration["webhooks"].as_array().into_iter().flatten().enumerate() {
        let at = format!("webhooks[{i}]");
        let mut names = HashSet::new();
        for (j, condition) in hook["matchConditions"].as_array().into_iter().flatten().enumerate() {
            let name = condition["name"].as_str().unwrap_or_default();
            if name.is_empty() {
                causes.push((format!("{at}.matchConditions[{j}].name"), "Required value".into()));
            } else if !names.insert(name) {
                causes.push((format!("{at}.matchConditions[{j}].name"), format!("Duplicate value: \"{name}\"")));
            }
            if condition["expression"].as_str() != Some(NOT_HOST_NETWORK) {
                causes.push((
                    format!("{at}.matchConditions[{j}]"),
                    "Unsupported value: the playground has no CEL and evaluates only the condition on hostNetwork".into(),
                ));
            }
        }
        if !hook["clientConfig"]["url"].is_string() && !hook["clientConfig"]["service"].is_object() {
            causes.push((format!("{at}.clientConfig"), "Required value: exactly one of url or service is required".into()));
        }
        if !matches!(hook["sideEffects"].as_str(), Some("None" | "NoneOnDryRun")) {
            causes.push((format!("{at}.sideEffects"), "Unsupported value: None or NoneOnDryRun is required".into()));
        }
        if hook["admissionReviewVersions"].as_array().is_none_or(|v| !v.contains(&json!("v1"))) {
            causes.push((format!("{at}.admissionReviewVersions"), "Invalid value: v1 is required".into()));
        }
        let timeout = hook["timeoutSeconds"].as_i64().unwrap_or(10);
        if !(1..=30).contains(&timeout) {
            causes.push((format!("{at}.timeoutSeconds"), format!("Invalid value: {timeout}: must be between 1 and 30")));
        }
    }
}

fn hooks(core: &Core, mutating: bool) -> Vec<Value> {
    let gvr = if mutating { resource::MUTATING_WEBHOOKS } else { resource::VALIDATING_WEBHOOKS };
    let all = core.store.list(&gvr.key(), None).items;
    all.iter().flat_map(|c| c["webhooks"].as_array().cloned().unwrap_or_default()).collect()
}

/// The version in which a webhook wants to see a call: that of the call where a rule lists it, else (unless `matchPolicy` is Exact)
/// another served one that a rule lists. `None`: no rule covers the call.
fn covered<'a>(hook: &Value, call: &Call<'a>) -> Option<&'a str> {
    let info = call.info;
    let has = |list: &Value, what: &str| list.as_array().into_iter().flatten().any(|v| v == "*" || v == what);
    let resource = if call.subresource.is_empty() {
        info.key.resource.clone()
    } else {
        format!("{}/{}", info.key.resource, call.subresource)
    };
    let covers = |pattern: &str| {
        pattern == "*/*"
            || pattern == resource
            || (pattern == "*" && call.subresource.is_empty())
            || pattern.strip_suffix("/*").is_some_and(|p| p == info.key.resource && !call.subresource.is_empty())
            || pattern.strip_prefix("*/").is_some_and(|s| s == call.subresource)
    };
    let rules = hook["rules"].as_array().into_iter().flatten().filter(|rule| {
        let scope = match rule["scope"].as_str() {
            Some("Namespaced") => info.namespaced,
            Some("Cluster") => !info.namespaced,
            _ => true,
        };
        scope
            && has(&rule["operations"], call.operation.as_str())
            && has(&rule["apiGroups"], &info.key.group)
            && rule["resources"].as_array().into_iter().flatten().filter_map(Value::as_str).any(covers)
    });
    let asked = if call.version.is_empty() { info.preferred() } else { call.version };
    let others = info.versions.iter().map(|(v, _)| v.as_str()).filter(|_| hook["matchPolicy"] != "Exact");
    let rules: Vec<&Value> = rules.collect();
    std::iter::once(asked).chain(others).find(|version| rules.iter().any(|rule| has(&rule["apiVersions"], version)))
}

/// Whether a webhook is called, and with which version.
fn matches<'a>(core: &Core, hook: &Value, call: &Call<'a>, object: &Value) -> Result<Option<&'a str>, String> {
    let info = call.info;
    // Webhooks never see the configurations of webhooks: they could lock themselves in.
    if info.key.group == "admissionregistration.k8s.io" {
        return Ok(None);
    }
    let Some(version) = covered(hook, call) else { return Ok(None) };
    let objects = Labels::from_object(hook.get("objectSelector"))?;
    if !(objects.matches(object) || call.old.is_some_and(|o| objects.matches(o))) {
        return Ok(None);
    }
    let namespaces = Labels::from_object(hook.get("namespaceSelector"))?;
    if info.namespaced || info.key == resource::NAMESPACES.key() {
        let ns = if info.namespaced {
            core.store.get(&resource::NAMESPACES.key(), "", call.namespace)
        } else {
            Some(Arc::new(object.clone()))
        };
        if !ns.is_some_and(|ns| namespaces.matches(&ns)) {
            return Ok(None);
        }
    }
    let conditions = hook["matchConditions"].as_array().into_iter().flatten();
    for condition in conditions {
        if condition["expression"].as_str() == Some(NOT_HOST_NETWORK) && object["spec"]["hostNetwork"] == json!(true) {
            return Ok(None);
        }
    }
    Ok(Some(version))
}

/// Runs the mutating webhooks, and the server's own admission again where they changed something.
pub async fn mutate(core: &Core, request: &Request, call: &Call<'_>, mut object: Value, pod: bool) -> Result<Value, Status> {
    let all = hooks(core, true);
    let mut last_seen: Vec<Option<Value>> = vec![None; all.len()];
    for pass in 0..2 {
        for (i, hook) in all.iter().enumerate() {
            let again = hook["reinvocationPolicy"] == "IfNeeded" && last_seen[i].as_ref().is_some_and(|seen| *seen != object);
            if pass == 1 && !again {
                continue;
            }
            let mut said = Vec::new();
            let result = one(core, request, hook, call, &object, true, &mut said).await;
            for warning in said {
                request.warn(warning);
            }
            if let Some(new) = result? {
                object = new;
            }
            if matches(core, hook, call, &object).is_ok_and(|m| m.is_some()) {
                last_seen[i] = Some(object.clone());
            }
        }
        if last_seen.iter().all(Option::is_none) {
            break;
        }
        if pod {
            defaults::service_account(&mut object);
        }
        defaults::apply(call.info, &mut object);
    }
    Ok(object)
}

/// Runs the validating webhooks, all at once: none sees what another says. Of several refusals the client sees the first that
/// came; warnings of all that answered by then, in the order of the webhooks.
pub async fn validate(core: &Core, request: &Request, call: &Call<'_>, object: &Value) -> Result<(), Status> {
    let hooks = hooks(core, false);
    let mut warnings: Vec<Vec<String>> = vec![Vec::new(); hooks.len()];
    let mut running: FuturesUnordered<_> = hooks
        .iter()
        .enumerate()
        .map(|(number, hook)| async move {
            let mut said = Vec::new();
            let result = one(core, request, hook, call, object, false, &mut said).await;
            (number, said, result)
        })
        .collect();
    let mut refused = None;
    while let Some((number, said, result)) = running.next().await {
        warnings[number] = said;
        if let Err(status) = result {
            refused.get_or_insert(status);
        }
    }
    for warning in warnings.into_iter().flatten() {
        request.warn(warning);
    }
    refused.map_or(Ok(()), Err)
}

async fn one(
    core: &Core,
    request: &Request,
    hook: &Value,
    call: &Call<'_>,
    object: &Value,
    mutating: bool,
    said: &mut Vec<String>,
) -> Result<Option<Value>, Status> {
    let name = hook["name"].as_str().unwrap_or_default();
    let seen = if call.operation == Operation::Delete { call.old.unwrap_or(object) } else { object };
    let version = match matches(core, hook, call, seen) {
        Ok(None) => return Ok(None),
        Ok(Some(version)) => version,
        Err(why) => return Err(Status::internal(format!("webhook {name}: {why}"))),
    };
    let failed = |why: String| {
        if hook["failurePolicy"] == "Ignore" {
            tracing::warn!(webhook = name, "failed, which its failure policy ignores: {why}");
            Ok(None)
        } else {
            Err(Status::internal(format!("failed calling webhook {name:?}: failed to call webhook: {why}")))
        }
    };
    let review = review(request, call, version, object);
    let uid = review["request"]["uid"].clone();
    let timeout = Duration::from_secs(hook["timeoutSeconds"].as_u64().unwrap_or(10));
    let answer = match tokio::time::timeout(timeout, send(core, hook, &review, timeout)).await {
        Err(_) => return failed("context deadline exceeded".into()),
        Ok(Err(error)) => return failed(format!("{error:#}")),
        Ok(Ok(answer)) => answer,
    };
    let response = &answer["response"];
    if answer["kind"] != "AdmissionReview" || answer["apiVersion"] != "admission.k8s.io/v1" || response["uid"] != uid {
        return failed(format!("the response is no AdmissionReview v1 with the request's uid: {answer}"));
    }
    for warning in response["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        said.push(warning.to_owned());
    }
    if response["allowed"] != json!(true) {
        let status = &response["status"];
        let given = |field: &str| status[field].as_str().filter(|text| !text.is_empty());
        let why =
            given("message").or(given("reason")).map_or_else(|| " without explanation".to_owned(), |why| format!(": {why}"));
        let code = status["code"].as_u64().and_then(|c| u16::try_from(c).ok()).filter(|c| *c >= 400).unwrap_or(400);
        let text = format!("admission webhook {name:?} denied the request{why}");
        let mut denied = Status::new(code, given("reason").unwrap_or_default(), text);
        denied.details = status["details"].clone();
        return Err(denied);
    }
    let Some(patch) = response["patch"].as_str().filter(|_| mutating) else { return Ok(None) };
    if response["patchType"] != "JSONPatch" {
        return failed(format!("patchType {} is not JSONPatch", response["patchType"]));
    }
    let patched = STANDARD
        .decode(patch)
        .map_err(|e| e.to_string())
        .and_then(|bytes| serde_json::from_slice::<json_patch::Patch>(&bytes).map_err(|e| e.to_string()))
        .and_then(|patch| {
            let mut new = in_version(call.info, version, object);
            json_patch::patch(&mut new, &patch).map_err(|e| e.to_string())?;
            let asked = if call.version.is_empty() { call.info.preferred() } else { call.version };
            Ok(in_version(call.info, asked, &new))
        });
    match patched {
        Ok(new) => Ok(Some(new)),
        Err(why) => failed(format!("the patch can't be applied: {why}")),
    }
}

/// An object as another version shows it.
fn in_version(info: &ResourceInfo, version: &str, object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(members) = object.as_object_mut().filter(|m| m.contains_key("apiVersion")) {
        members.insert("apiVersion".into(), json!(info.api_version(version)));
    }
    object
}

fn review(request: &Request, call: &Call<'_>, version: &str, object: &Value) -> Value {
    let info = call.info;
    let asked = if call.version.is_empty() { info.preferred() } else { call.version };
    let kind = |version: &str| json!({"group": info.key.group, "version": version, "kind": info.kind});
    let resource = |version: &str| json!({"group": info.key.group, "version": version, "resource": info.key.resource});
    let name = object
        .pointer("/metadata/name")
        .or_else(|| call.old.and_then(|o| o.pointer("/metadata/name")))
        .and_then(Value::as_str)
        .unwrap_or_default();
    let options = match call.operation {
        Operation::Create => "CreateOptions",
        Operation::Update => "UpdateOptions",
        Operation::Delete => "DeleteOptions",
    };
    let mut body = json!({
        "uid": super::api::uid(), "kind": kind(version), "resource": resource(version), "requestKind": kind(asked), "requestResource": resource(asked),
        "operation": call.operation.as_str(), "userInfo": request.user.to_json(), "object": in_version(info, version, object),
        "oldObject": call.old.map_or(Value::Null, |old| in_version(info, version, old)), "dryRun": request.dry_run, "options": {"kind": options, "apiVersion": "meta.k8s.io/v1"}
    });
    // A pod of a ReplicaSet has no name yet; the field is then left out.
    if !name.is_empty() {
        body["name"] = json!(name);
    }
    if info.namespaced {
        body["namespace"] = json!(call.namespace);
    }
    if !call.subresource.is_empty() {
        body["subResource"] = json!(call.subresource);
        body["requestSubResource"] = json!(call.subresource);
    }
    json!({"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1", "request": body})
}

async fn send(core: &Core, hook: &Value, review: &Value, timeout: Duration) -> anyhow::Result<Value> {
    let config = &hook["clientConfig"];
    let mut roots = rustls::RootCertStore::empty();
    if let Some(bundle) = config["caBundle"].as_str() {
        for cert in CertificateDer::pem_slice_iter(&STANDARD.decode(bundle)?) {
            roots.add(cert?)?;
        }
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(tls));
    let (host, path, stream) = if let Some(url) = config["url"].as_str() {
        let uri: http::Uri = url.parse()?;
        anyhow::ensure!(uri.scheme_str() == Some("https"), "{url}: only https is allowed");
        let host = uri.host().unwrap_or_default().to_owned();
        let stream = tokio::net::TcpStream::connect((host.trim_matches(['[', ']']), uri.port_u16().unwrap_or(443))).await?;
        let path = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str).to_owned();
        (host, path, Box::new(stream) as Box<dyn super::backend::Duplex>)
    } else {
        let service = &config["service"];
        let text = |f: &str| service[f].as_str().unwrap_or_default();
        let port = u16::try_from(service["port"].as_u64().unwrap_or(443))?;
        let host = format!("{}.{}.svc", text("name"), text("namespace"));
        let backend = core.backend().map_err(|s| anyhow::anyhow!(s.message))?;
        let stream = backend.connect_service(text("namespace"), text("name"), port).await?;
        let path = if text("path").is_empty() { "/" } else { text("path") };
        (host, path.to_owned(), stream)
    };
    let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned())?;
    let stream = connector.connect(name, stream).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let request =
        http::Request::post(format!("{path}{}timeout={}s", if path.contains('?') { '&' } else { '?' }, timeout.as_secs()))
            .header("host", host)
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(review.to_string())))?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    driver.abort();
    anyhow::ensure!(status.is_success(), "the webhook answered {status}: {}", String::from_utf8_lossy(&body).trim());
    Ok(serde_json::from_slice(&body)?)
}
