//! The patch: what is done to a pod that is injected, on its raw JSON. What the user wrote stays, but for probes that are
//! declared to be rewritten; a pod of a newer Kubernetes loses none of the fields that this build doesn't know.

use crate::collide::{self, PROXY_NAMES};
use crate::edit::Editor;
use crate::facts::{ClusterFacts, NamespaceFacts};
use crate::options::{Options, Refusal, unknown_keys};
use crate::probes::{self, Rewritten};
use crate::settings::Settings;
use crate::sidecar::{self, PodFacts, RunAs};
use crate::status::{Override, Status, annotation};
use crate::{overlay, scrape, workload};
use json_patch::Patch;
use serde_json::{Value, json};
use weft_api::{annotations as keys, env, names};

/// Where containers are in a pod.
const CONTAINERS: &str = "/spec/containers";
/// Where init containers are.
const INIT_CONTAINERS: &str = "/spec/initContainers";

/// The result of injecting a pod.
#[derive(Debug)]
pub struct Injection {
    /// The pod as it is now.
    pub pod: Value,
    /// What makes it of the pod as it was; empty: it was injected already.
    pub patch: Patch,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// What injection needs to know besides the pod.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// The pod's namespace, where it is known.
    pub namespace: Option<&'a NamespaceFacts>,
    /// The settings.
    pub settings: &'a Settings,
    /// The cluster.
    pub cluster: ClusterFacts,
    /// Kind and name of the workload, where they are known better than from the pod itself (a manifest's template).
    pub workload: Option<(&'a str, &'a str)>,
}

/// Injects a pod. Injecting it again changes nothing; a container that somebody added in between gets its probes
/// rewritten.
///
/// # Errors
/// Mistakes in mesh annotations, and names that the sidecar needs.
pub fn inject(pod: &Value, context: Context<'_>) -> Result<Injection, Vec<Refusal>> {
    let options = Options::read(pod, context.namespace, context.settings, context.cluster)?;
    let mut warnings = unknown_keys(pod, context.namespace);
    let status = Status::of(pod).map_err(|r| vec![r])?;
    let mut editor = Editor::new(pod.clone());
    match status {
        Some(status) if has_sidecar(pod) => again(&mut editor, status, &options, &mut warnings),
        _ => first(&mut editor, context, &options, &mut warnings)?,
    }
    let (pod, patch) = editor.finish();
    warnings.extend(collide::warnings(&pod, context.namespace, context.cluster, &options));
    Ok(Injection { pod, patch, warnings })
}

/// Whether both of our containers are in the pod: the status annotation alone exempts nobody.
fn has_sidecar(pod: &Value) -> bool {
    place(pod, names::INIT_CONTAINER).is_some() && place(pod, names::PROXY_CONTAINER).is_some()
}

/// The pointer of a container by name.
fn place(pod: &Value, name: &str) -> Option<String> {
    [INIT_CONTAINERS, CONTAINERS].into_iter().find_map(|list| {
        let index = pod.pointer(list)?.as_array()?.iter().position(|c| c.get("name").and_then(Value::as_str) == Some(name))?;
        Some(format!("{list}/{index}"))
    })
}

fn first(editor: &mut Editor, context: Context<'_>, options: &Options, warnings: &mut Vec<String>) -> Result<(), Vec<Refusal>> {
    let Context { settings, .. } = context;
    let overrides = take_overrides(editor);
    let refusals = collide::refusals(editor.doc());
    if !refusals.is_empty() {
        return Err(refusals);
    }
    for path in ["/metadata", "/metadata/annotations", "/metadata/labels"] {
        editor.ensure_map(path);
    }
    let mut status = Status { version: env!("CARGO_PKG_VERSION").into(), ..Status::default() };

    let mut rewritten = Rewritten::default();
    if options.rewrite_probes {
        rewrite_probes(editor, options.native, &mut rewritten);
    }
    let merge = if options.merge_metrics { scrape::merge(editor.doc()) } else { None };
    let (kind, name) = match context.workload {
        Some((kind, name)) => (kind.to_owned(), name.to_owned()),
        None => workload::workload(editor.doc()),
    };

    let facts = PodFacts {
        workload: format!("{kind}/{name}"),
        probes: &rewritten.probes,
        metrics: merge.as_ref().and_then(|m| m.app.as_ref()),
    };
    let mut proxy = to_value(&sidecar::proxy(options, settings, &facts));
    for over in &overrides {
        overlay::merge_container(&mut proxy, &over.container);
    }
    let run_as = |field: &str, default: u32| {
        proxy.get("securityContext").and_then(|s| s.get(field)).and_then(Value::as_i64).unwrap_or_else(|| default.into())
    };
    let run_as = RunAs { uid: run_as("runAsUser", names::PROXY_UID), gid: run_as("runAsGroup", names::PROXY_GID) };
    let init = to_value(&sidecar::init(options, settings, run_as));

    let default_container = first_app_container(editor.doc());
    if options.native {
        editor.insert(INIT_CONTAINERS, 0, init);
        editor.insert(INIT_CONTAINERS, 1, proxy);
        status.init_containers = vec![names::INIT_CONTAINER.into(), names::PROXY_CONTAINER.into()];
    } else {
        editor.append(INIT_CONTAINERS, init);
        editor.insert(CONTAINERS, 0, proxy);
        status.init_containers = vec![names::INIT_CONTAINER.into()];
        status.containers = vec![names::PROXY_CONTAINER.into()];
    }
    for volume in sidecar::volumes(settings) {
        status.volumes.push(volume.name.clone());
        editor.append("/spec/volumes", to_value(&volume));
    }
    for secret in &settings.image_pull_secrets {
        let known = editor.doc().pointer("/spec/imagePullSecrets").and_then(Value::as_array);
        if known.is_some_and(|l| l.iter().any(|s| s.get("name").and_then(Value::as_str) == Some(secret))) {
            continue;
        }
        status.image_pull_secrets.push(secret.clone());
        editor.append("/spec/imagePullSecrets", json!({"name": secret}));
    }

    for (label, value) in labels(editor.doc(), &name) {
        status.labels.push(label.to_owned());
        editor.set("/metadata/labels", label, Value::String(value));
    }
    let mut annotate = |editor: &mut Editor, key: &str, value: String| {
        let before = annotation(editor.doc(), key).map(str::to_owned);
        status.annotations.insert(key.to_owned(), before);
        editor.set("/metadata/annotations", key, Value::String(value));
    };
    if let Some(name) = default_container {
        for key in ["kubectl.kubernetes.io/default-container", "kubectl.kubernetes.io/default-logs-container"] {
            if annotation(editor.doc(), key).is_none() {
                annotate(editor, key, name.clone());
            }
        }
    }
    if let Some(merge) = merge {
        warnings.extend(merge.warning);
        for (key, value) in merge.annotations {
            annotate(editor, &key, value);
        }
    }
    if !overrides.is_empty() {
        annotate(editor, keys::OVERRIDES, serde_json::to_string(&overrides).unwrap_or_default());
    }
    warnings.extend(rewritten.warnings);
    status.probes = rewritten.originals;
    status.created = std::mem::take(&mut editor.created);
    editor.set("/metadata/annotations", keys::STATUS, Value::String(status.to_json()));
    Ok(())
}

/// The pod is injected: only containers that have come since are looked after. Ours stay as they are, with whatever others
/// have added to them.
fn again(editor: &mut Editor, mut status: Status, options: &Options, warnings: &mut Vec<String>) {
    if !options.rewrite_probes {
        return;
    }
    let mut rewritten = Rewritten::default();
    rewrite_probes(editor, options.native, &mut rewritten);
    warnings.extend(rewritten.warnings);
    let Some(path) = place(editor.doc(), names::PROXY_CONTAINER).filter(|_| !rewritten.probes.is_empty()) else { return };
    let Some(mut proxy) = editor.doc().pointer(&path).cloned() else { return };
    let mut all = env_of(&proxy, env::PROBES).and_then(sidecar::read_probes).unwrap_or_default();
    all.extend(rewritten.probes);
    overlay::merge_container(&mut proxy, &json!({"env": [{"name": env::PROBES, "value": sidecar::probes_json(&all)}]}));
    editor.change(&path, &proxy);
    status.probes.extend(rewritten.originals);
    editor.set("/metadata/annotations", keys::STATUS, Value::String(status.to_json()));
}

fn env_of<'a>(container: &'a Value, name: &str) -> Option<&'a str> {
    let all = container.get("env")?.as_array()?;
    all.iter().find(|e| e.get("name").and_then(Value::as_str) == Some(name))?.get("value")?.as_str()
}

/// Without a native sidecar the proxy starts after the init containers: a probe of one of those (a native sidecar of the
/// user's) that waited for the proxy would keep the pod from ever starting, so it stays as it is.
fn rewrite_probes(editor: &mut Editor, native: bool, out: &mut Rewritten) {
    let lists: &[&str] = if native { &[INIT_CONTAINERS, CONTAINERS] } else { &[CONTAINERS] };
    for list in lists {
        let count = editor.doc().pointer(list).and_then(Value::as_array).map_or(0, Vec::len);
        for i in 0..count {
            let path = format!("{list}/{i}");
            let Some(container) = editor.doc().pointer(&path) else { continue };
            let name = container.get("name").and_then(Value::as_str).unwrap_or_default();
            if name == names::PROXY_CONTAINER || name == names::INIT_CONTAINER {
                continue;
            }
            let mut new = container.clone();
            probes::rewrite(&mut new, out);
            editor.change(&path, &new);
        }
    }
}

/// Takes the user's overrides of the sidecar out of the pod: containers with a sidecar's name and the image `auto`.
fn take_overrides(editor: &mut Editor) -> Vec<Override> {
    let mut taken = Vec::new();
    for list in [INIT_CONTAINERS, CONTAINERS] {
        let mut index = 0;
        let mut original = 0;
        while let Some(container) = editor.doc().pointer(&format!("{list}/{index}")) {
            let text = |field: &str| container.get(field).and_then(Value::as_str);
            if text("name").is_some_and(|n| PROXY_NAMES.contains(&n)) && text("image") == Some("auto") {
                if let Some(container) = editor.remove(&format!("{list}/{index}")) {
                    taken.push(Override { list: list.to_owned(), index: original, container });
                }
            } else {
                index += 1;
            }
            original += 1;
        }
    }
    taken
}

fn first_app_container(pod: &Value) -> Option<String> {
    let containers = pod.pointer(CONTAINERS)?.as_array()?;
    containers.first()?.get("name")?.as_str().map(str::to_owned)
}

/// The labels by which telemetry names the workload, as Istio and Kiali read them; only those that are not there.
fn labels(pod: &Value, workload: &str) -> Vec<(&'static str, String)> {
    let label =
        |key: &str| pod.pointer("/metadata/labels").and_then(|l| l.get(key)).and_then(Value::as_str).filter(|s| !s.is_empty());
    let name = label("app.kubernetes.io/name").or_else(|| label("app")).unwrap_or(workload);
    let revision = label("app.kubernetes.io/version").or_else(|| label("version")).unwrap_or("latest");
    [("service.istio.io/canonical-name", name), ("service.istio.io/canonical-revision", revision)]
        .into_iter()
        .filter(|(key, value)| label(key).is_none() && !value.is_empty())
        .map(|(key, value)| (key, as_label(value)))
        .collect()
}

/// A label's value is at most 63 characters and ends with a letter or digit.
fn as_label(text: &str) -> String {
    let cut: String = text.chars().filter(|c| c.is_ascii_alphanumeric() || "-_.".contains(*c)).take(63).collect();
    cut.trim_matches(|c: char| !c.is_ascii_alphanumeric()).to_owned()
}

fn to_value<T: serde::Serialize>(typed: &T) -> Value {
    serde_json::to_value(typed).unwrap_or(Value::Null)
}

/// Takes the sidecar out of a pod again, exactly; `None`: there is none of ours in it.
///
/// # Errors
/// The status annotation can't be read.
pub fn uninject(pod: &Value) -> Result<Option<Value>, Refusal> {
    let Some(status) = Status::of(pod)? else { return Ok(None) };
    let overrides: Vec<Override> =
        annotation(pod, keys::OVERRIDES).and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    let mut pod = pod.clone();
    let mut drop_named = |pointer: &str, gone: &[String]| {
        if let Some(Value::Array(list)) = pod.pointer_mut(pointer) {
            list.retain(|item| !item.get("name").and_then(Value::as_str).is_some_and(|n| gone.iter().any(|g| g == n)));
        }
    };
    drop_named(INIT_CONTAINERS, &status.init_containers);
    drop_named(CONTAINERS, &status.containers);
    drop_named("/spec/volumes", &status.volumes);
    drop_named("/spec/imagePullSecrets", &status.image_pull_secrets);
    for list in [INIT_CONTAINERS, CONTAINERS] {
        for container in pod.pointer_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            probes::restore(container, &status.probes);
        }
    }
    for over in overrides {
        if let Some(Value::Array(list)) = pod.pointer_mut(&over.list) {
            list.insert(over.index.min(list.len()), over.container);
        }
    }
    if let Some(Value::Object(labels)) = pod.pointer_mut("/metadata/labels") {
        labels.retain(|key, _| !status.labels.contains(key));
    }
    if let Some(Value::Object(annotations)) = pod.pointer_mut("/metadata/annotations") {
        annotations.remove(keys::STATUS);
        for (key, before) in &status.annotations {
            match before {
                Some(value) => annotations.insert(key.clone(), Value::String(value.clone())),
                None => annotations.remove(key),
            };
        }
    }
    for pointer in status.created.iter().rev() {
        let empty = match pod.pointer(pointer) {
            Some(Value::Object(m)) => m.is_empty(),
            Some(Value::Array(a)) => a.is_empty(),
            _ => false,
        };
        if let Some((parent, last)) = pointer.rsplit_once('/').filter(|_| empty)
            && let Some(Value::Object(parent)) = pod.pointer_mut(parent)
        {
            parent.remove(last);
        }
    }
    Ok(Some(pod))
}

#[cfg(test)]
mod tests;
