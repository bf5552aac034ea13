//! `weft inject` and `weft uninject`: the decision and the patch of the webhook on manifests. Every document comes out again, in its
//! place; one that is not changed comes out byte for byte. In a changed one comments and the style of the YAML are lost.

use crate::decide::{Origin, Reason, Verdict, decide_from};
use crate::facts::{ClusterFacts, NamespaceFacts};
use crate::patch::{self, Context};
use crate::settings::Settings;
use crate::{workload, yaml};
use serde_json::Value;
use std::collections::BTreeMap;

/// What is known offline.
#[derive(Debug)]
pub struct Offline {
    /// The settings to inject by.
    pub settings: Settings,
    /// What the cluster is taken for.
    pub cluster: ClusterFacts,
    /// Namespaces, from the manifests themselves.
    pub namespaces: BTreeMap<String, NamespaceFacts>,
}

/// What became of one document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Done {
    /// It is injected.
    Injected,
    /// The sidecar is taken out of it.
    Uninjected,
    /// It is as it was.
    Skipped(Reason),
    /// It could not be read, or would be refused at admission.
    Failed(String),
}

/// One line about a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// `kind/name`.
    pub title: String,
    /// What became of it.
    pub done: Done,
    /// What the user should know.
    pub warnings: Vec<String>,
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.done {
            Done::Injected => write!(f, "{} injected", self.title),
            Done::Uninjected => write!(f, "{} uninjected", self.title),
            Done::Skipped(reason) => write!(f, "{} skipped: {reason}", self.title),
            Done::Failed(message) => write!(f, "{} failed: {message}", self.title),
        }
    }
}

/// A stream of documents after the work.
#[derive(Debug, Default)]
pub struct Output {
    /// The YAML.
    pub text: String,
    /// A line per document (per item in a List).
    pub lines: Vec<Line>,
}

impl Output {
    /// Whether every document was read and none would be refused.
    pub fn is_fine(&self) -> bool {
        !self.lines.iter().any(|l| matches!(l.done, Done::Failed(_)))
    }
}

impl Offline {
    /// With these settings, on the newest Kubernetes.
    pub fn new(settings: Settings) -> Self {
        Self { settings, cluster: ClusterFacts { native_sidecars: true, ..ClusterFacts::default() }, namespaces: BTreeMap::new() }
    }

    /// Notes the Namespaces in a stream: their annotations count for the pods in them.
    pub fn note_namespaces(&mut self, stream: &str) {
        for document in yaml::split(stream).into_iter().filter_map(|d| yaml::read(d).ok()) {
            let items = document.get("items").and_then(Value::as_array).cloned().unwrap_or_else(|| vec![document]);
            for object in items.iter().filter(|o| o.get("kind").and_then(Value::as_str) == Some("Namespace")) {
                let facts = NamespaceFacts::from_object(object);
                self.namespaces.insert(facts.name.clone(), facts);
            }
        }
    }

    /// Injects every workload in a stream.
    pub fn inject(&self, stream: &str) -> Output {
        each(stream, |object, line| self.inject_object(object, line))
    }

    fn namespace_of(&self, object: &Value) -> Option<&NamespaceFacts> {
        self.namespaces.get(object.pointer("/metadata/namespace").and_then(Value::as_str)?)
    }

    fn inject_object(&self, object: &Value, line: &mut Line) -> Option<Value> {
        let Some(pointer) = workload::pod_pointer(object) else {
            line.done = Done::Skipped(Reason::NotAPod);
            return None;
        };
        let Some(pod) = object.pointer(pointer).filter(|p| p.get("spec").is_some_and(Value::is_object)) else {
            line.done = Done::Skipped(Reason::NoPodTemplate);
            return None;
        };
        let known = self.namespace_of(object);
        let by_name = object
            .pointer("/metadata/namespace")
            .and_then(Value::as_str)
            .map(|name| NamespaceFacts { name: name.to_owned(), ..NamespaceFacts::default() });
        let namespace = known.or(by_name.as_ref());
        let decision = decide_from(pod, Origin::Offline(namespace), &self.settings);
        line.warnings.extend(decision.warnings);
        if decision.verdict == Verdict::Skip {
            line.done = Done::Skipped(decision.reason);
            return None;
        }
        let text = |p: &str| object.pointer(p).and_then(Value::as_str).unwrap_or_default();
        let top = (text("/kind"), text("/metadata/name"));
        let context = Context {
            namespace,
            settings: &self.settings,
            cluster: self.cluster,
            workload: (!pointer.is_empty()).then_some(top),
        };
        match patch::inject(pod, context) {
            Ok(injection) => {
                line.warnings.extend(injection.warnings);
                if injection.patch.0.is_empty() {
                    line.done = Done::Skipped(Reason::AlreadyInjected);
                    return None;
                }
                line.done = Done::Injected;
                replace(object, pointer, injection.pod)
            }
            Err(refusals) => {
                line.done = Done::Failed(refusals.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "));
                None
            }
        }
    }
}

/// Takes the sidecar out of every workload in a stream.
pub fn uninject(stream: &str) -> Output {
    each(stream, |object, line| {
        let pod = workload::pod_pointer(object).and_then(|p| Some((p, object.pointer(p)?)));
        line.done = Done::Skipped(if pod.is_some() { Reason::NotInjected } else { Reason::NotAPod });
        let (pointer, pod) = pod?;
        match patch::uninject(pod) {
            Ok(None) => None,
            Ok(Some(clean)) => {
                line.done = Done::Uninjected;
                replace(object, pointer, clean)
            }
            Err(refusal) => {
                line.done = Done::Failed(refusal.to_string());
                None
            }
        }
    })
}

fn replace(object: &Value, pointer: &str, pod: Value) -> Option<Value> {
    let mut object = object.clone();
    *object.pointer_mut(pointer)? = pod;
    Some(object)
}

/// Works on every document (every item of a List): `None` leaves it as it is.
fn each(stream: &str, mut work: impl FnMut(&Value, &mut Line) -> Option<Value>) -> Output {
    let mut out = Output::default();
    for raw in yaml::split(stream) {
        let changed = match yaml::read(raw) {
            Err(problem) => {
                out.lines.push(Line { title: "document".into(), done: Done::Failed(problem), warnings: Vec::new() });
                None
            }
            Ok(Value::Null) => None,
            Ok(object) => one(object, &mut out.lines, &mut work),
        };
        match changed {
            None => out.text.push_str(raw),
            Some(object) => match yaml::write(&object) {
                Ok(text) => {
                    if raw.starts_with("---") {
                        out.text.push_str("---\n");
                    }
                    out.text.push_str(&text);
                }
                Err(problem) => {
                    out.text.push_str(raw);
                    out.lines.push(Line { title: workload::title(&object), done: Done::Failed(problem), warnings: Vec::new() });
                }
            },
        }
        if !out.text.is_empty() && !out.text.ends_with('\n') {
            out.text.push('\n');
        }
    }
    out
}

fn one(object: Value, lines: &mut Vec<Line>, work: &mut impl FnMut(&Value, &mut Line) -> Option<Value>) -> Option<Value> {
    let mut single = |object: &Value, lines: &mut Vec<Line>| {
        let mut line = Line { title: workload::title(object), done: Done::Skipped(Reason::NotAPod), warnings: Vec::new() };
        let changed = work(object, &mut line);
        lines.push(line);
        changed
    };
    let is_list = object.get("kind").and_then(Value::as_str).is_some_and(|k| k.ends_with("List"));
    match object.get("items").and_then(Value::as_array).filter(|_| is_list) {
        None => single(&object, lines),
        Some(items) => {
            let mut changed = false;
            let items: Vec<Value> = items
                .iter()
                .map(|item| match single(item, lines) {
                    Some(new) => {
                        changed = true;
                        new
                    }
                    None => item.clone(),
                })
                .collect();
            changed.then(|| {
                let mut object = object.clone();
                object["items"] = Value::Array(items);
                object
            })
        }
    }
}

#[cfg(test)]
mod tests;
