//! The decision: is this pod injected? Pure, over the pod as it is and what is known of its namespace; the steps that led
//! to it are kept in words, for `weft why`.
//!
//! The order, the first that applies wins: host network → Windows → system namespace → what the pod says → what its
//! namespace says → no. Where one level contradicts itself, "no" wins and the user is warned; a word that is none of the
//! allowed ones is as if it were not there, and the user is warned too.

use crate::facts::NamespaceFacts;
use crate::settings::Settings;
use serde_json::{Map, Value};
use std::borrow::Cow;
use weft_api::annotations as keys;

/// Whether a pod is injected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is.
    Inject,
    /// It is not, and goes its way untouched.
    Skip,
}

/// A short stable code for why, the same in events, metrics, log lines and `weft why`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// The pod uses the node's network.
    HostNetwork,
    /// The pod runs on Windows.
    Windows,
    /// The namespace is on the system list.
    SystemNamespace,
    /// The pod says no.
    PodDisabled,
    /// The pod says yes.
    PodEnabled,
    /// The namespace says no.
    NamespaceDisabled,
    /// The namespace says yes.
    NamespaceEnabled,
    /// Nobody asked.
    NotEnabled,
    /// Nobody was found to ask: the namespace could not be read, and the pod says nothing itself.
    NamespaceUnknown,
    /// The pod carries everything already.
    AlreadyInjected,
    /// `weft inject` was asked for it.
    Offline,
    /// The review or document is about something else than the creation of a pod.
    NotAPod,
    /// A workload without a pod template (an Argo Rollout with a `workloadRef`, say).
    NoPodTemplate,
    /// Refused: a mesh annotation has a value that is not allowed.
    BadAnnotation,
    /// `weft uninject` found nothing of ours.
    NotInjected,
    /// The review failed inside the webhook.
    InternalError,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 16] = [
        Self::HostNetwork,
        Self::Windows,
        Self::SystemNamespace,
        Self::PodDisabled,
        Self::PodEnabled,
        Self::NamespaceDisabled,
        Self::NamespaceEnabled,
        Self::NotEnabled,
        Self::NamespaceUnknown,
        Self::AlreadyInjected,
        Self::Offline,
        Self::NotAPod,
        Self::NoPodTemplate,
        Self::BadAnnotation,
        Self::NotInjected,
        Self::InternalError,
    ];

    /// The code.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::HostNetwork => "host-network",
            Self::Windows => "windows",
            Self::SystemNamespace => "system-namespace",
            Self::PodDisabled => "pod-disabled",
            Self::PodEnabled => "pod-enabled",
            Self::NamespaceDisabled => "namespace-disabled",
            Self::NamespaceEnabled => "namespace-enabled",
            Self::NotEnabled => "not-enabled",
            Self::NamespaceUnknown => "namespace-unknown",
            Self::AlreadyInjected => "already-injected",
            Self::Offline => "offline",
            Self::NotAPod => "not-a-pod",
            Self::NoPodTemplate => "no-pod-template",
            Self::BadAnnotation => "bad-annotation",
            Self::NotInjected => "not-injected",
            Self::InternalError => "internal-error",
        }
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One step of a decision, in words.
pub type Step = String;

/// The decision on a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Injected or not.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// What was looked at, in order, in words.
    pub steps: Vec<Step>,
    /// What the user should know: contradictions and words that are none of the allowed ones.
    pub warnings: Vec<String>,
    /// Whether the namespace itself asked for injection (a skipped pod is an event only then).
    pub namespace_asked: bool,
}

/// What is known of the pod's namespace.
#[derive(Clone, Copy, Debug)]
pub enum Origin<'a> {
    /// A pod at admission, in this namespace.
    Admission(&'a NamespaceFacts),
    /// A pod at admission in the namespace of this name, about which nothing could be learnt.
    Unknown(&'a str),
    /// A manifest: who runs `weft inject` on it wants it injected unless it, or its namespace where that is known, says no.
    Offline(Option<&'a NamespaceFacts>),
}

impl<'a> Origin<'a> {
    /// The namespace, where anything is known of it.
    pub fn namespace(self) -> Option<&'a NamespaceFacts> {
        match self {
            Self::Admission(ns) => Some(ns),
            Self::Unknown(_) => None,
            Self::Offline(ns) => ns,
        }
    }

    fn name(self) -> Option<&'a str> {
        match self {
            Self::Admission(ns) => Some(&ns.name),
            Self::Unknown(name) => Some(name),
            Self::Offline(ns) => ns.map(|n| n.name.as_str()),
        }
    }
}

/// Decides on a pod at admission.
pub fn decide(pod: &Value, namespace: &NamespaceFacts, settings: &Settings) -> Decision {
    decide_from(pod, Origin::Admission(namespace), settings)
}

/// Decides on a pod, wherever it comes from.
pub fn decide_from(pod: &Value, origin: Origin<'_>, settings: &Settings) -> Decision {
    let mut steps = Vec::new();
    let mut warnings = Vec::new();
    let (verdict, reason, namespace_asked) = walk(pod, origin, settings, &mut steps, &mut warnings);
    Decision { verdict, reason, steps, warnings, namespace_asked }
}

fn walk(
    pod: &Value,
    origin: Origin<'_>,
    settings: &Settings,
    steps: &mut Vec<Step>,
    warnings: &mut Vec<String>,
) -> (Verdict, Reason, bool) {
    let asked_by_namespace = origin.namespace().and_then(|ns| {
        // The namespace's own contradictions are reported below, if it comes to that.
        namespace_says(ns, &mut Vec::new(), &mut Vec::new())
    });
    let asked = asked_by_namespace == Some(true);
    let skip = |reason| (Verdict::Skip, reason, asked);
    let inject = |reason| (Verdict::Inject, reason, asked);

    if pod.pointer("/spec/hostNetwork").and_then(Value::as_bool) == Some(true) {
        steps
            .push("spec.hostNetwork is true: redirection would take the node's own traffic, so the pod is never injected".into());
        return skip(Reason::HostNetwork);
    }
    steps.push("spec.hostNetwork is not true".into());

    if pod.pointer("/spec/os/name").and_then(Value::as_str).is_some_and(|os| os.eq_ignore_ascii_case("windows")) {
        steps.push("spec.os.name is windows: the proxy and its redirection are for Linux".into());
        return skip(Reason::Windows);
    }
    steps.push("spec.os.name is not windows".into());

    match origin.name() {
        Some(name) if settings.is_system_namespace(name) => {
            steps.push(format!("namespace {name} is on the list of system namespaces, whose pods are never injected"));
            return skip(Reason::SystemNamespace);
        }
        Some(name) => steps.push(format!("namespace {name} is no system namespace")),
        None => steps.push("the namespace is not known".into()),
    }

    match pod_says(pod, steps, warnings) {
        Some(false) => return skip(Reason::PodDisabled),
        Some(true) => return inject(Reason::PodEnabled),
        None => {}
    }

    let said = origin.namespace().and_then(|ns| namespace_says(ns, steps, warnings));
    match (said, origin) {
        (Some(false), _) => skip(Reason::NamespaceDisabled),
        (Some(true), _) => inject(Reason::NamespaceEnabled),
        (None, Origin::Offline(_)) => {
            steps.push("nobody says no, and injecting the manifest was asked for".into());
            inject(Reason::Offline)
        }
        (None, _) if carries_status(pod) => {
            steps.push(format!(
                "nobody asks for injection here, but the pod was injected before it was created ({})",
                keys::STATUS
            ));
            skip(Reason::AlreadyInjected)
        }
        (None, Origin::Unknown(name)) => {
            steps.push(format!("namespace {name} could not be read, and the pod itself does not ask for injection"));
            skip(Reason::NamespaceUnknown)
        }
        (None, Origin::Admission(_)) => {
            steps.push("nobody asks for injection".into());
            skip(Reason::NotEnabled)
        }
    }
}

/// Whether the pod carries our status annotation.
pub(crate) fn carries_status(pod: &Value) -> bool {
    pod.pointer("/metadata/annotations").and_then(|a| a.get(keys::STATUS)).and_then(Value::as_str).is_some_and(|s| !s.is_empty())
}

/// Which words a key takes.
#[derive(Clone, Copy)]
enum Words {
    EnabledDisabled,
    TrueFalse,
}

impl Words {
    fn read(self, word: &str) -> Option<bool> {
        let (yes, no) = match self {
            Self::EnabledDisabled => ("enabled", "disabled"),
            Self::TrueFalse => ("true", "false"),
        };
        if word.eq_ignore_ascii_case(yes) {
            Some(true)
        } else if word.eq_ignore_ascii_case(no) {
            Some(false)
        } else {
            None
        }
    }

    fn allowed(self) -> &'static str {
        match self {
            Self::EnabledDisabled => "`enabled` or `disabled`",
            Self::TrueFalse => "`true` or `false`",
        }
    }
}

/// The keys that both pods and namespaces take, as label or annotation.
const KEYS: [(&str, Words); 4] = [
    (keys::INJECT_BARE, Words::EnabledDisabled),
    (keys::INJECT, Words::EnabledDisabled),
    (keys::INJECT_LINKERD, Words::EnabledDisabled),
    (keys::INJECT_ISTIO, Words::TrueFalse),
];

/// The key that only a namespace takes, as a label.
const NAMESPACE_LABEL: (&str, Words) = (keys::INJECTION_ISTIO, Words::EnabledDisabled);

struct Said {
    key: &'static str,
    form: &'static str,
    word: String,
    yes: bool,
}

impl std::fmt::Display for Said {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}: {}", self.form, self.key, self.word)
    }
}

fn pod_says(pod: &Value, steps: &mut Vec<Step>, warnings: &mut Vec<String>) -> Option<bool> {
    let mut said = Vec::new();
    for (form, pointer) in [("annotation", "/metadata/annotations"), ("label", "/metadata/labels")] {
        let Some(map) = pod.pointer(pointer).and_then(Value::as_object) else { continue };
        for (key, words) in KEYS {
            if let Some(word) = word_of(map, key) {
                hear("the pod", form, key, words, &word, &mut said, warnings);
            }
        }
    }
    sum_up("the pod", said, steps, warnings)
}

fn namespace_says(ns: &NamespaceFacts, steps: &mut Vec<Step>, warnings: &mut Vec<String>) -> Option<bool> {
    let who = format!("namespace {}", ns.name);
    let mut said = Vec::new();
    for (form, map) in [("annotation", &ns.annotations), ("label", &ns.labels)] {
        let label_only = (form == "label").then_some(NAMESPACE_LABEL);
        for (key, words) in KEYS.into_iter().chain(label_only) {
            if let Some(word) = map.get(key) {
                hear(&who, form, key, words, word, &mut said, warnings);
            }
        }
    }
    sum_up(&who, said, steps, warnings)
}

/// A label's or annotation's value as a word. In a manifest it may be a bare `true`, which the API server would refuse as no
/// string; it is read all the same.
fn word_of<'a>(map: &'a Map<String, Value>, key: &str) -> Option<Cow<'a, str>> {
    match map.get(key)? {
        Value::String(word) => Some(Cow::Borrowed(word)),
        Value::Null => None,
        other => Some(Cow::Owned(other.to_string())),
    }
}

fn hear(
    who: &str,
    form: &'static str,
    key: &'static str,
    words: Words,
    word: &str,
    said: &mut Vec<Said>,
    warnings: &mut Vec<String>,
) {
    match words.read(word) {
        Some(yes) => said.push(Said { key, form, word: word.to_owned(), yes }),
        None => warnings.push(format!("{who} has the {form} {key}: {word:?}, which is not {}: it is ignored", words.allowed())),
    }
}

fn sum_up(who: &str, said: Vec<Said>, steps: &mut Vec<Step>, warnings: &mut Vec<String>) -> Option<bool> {
    let Some(first) = said.first() else {
        steps.push(format!("{who} says nothing about injection"));
        return None;
    };
    let no = said.iter().find(|s| !s.yes);
    let yes = said.iter().find(|s| s.yes);
    if let (Some(no), Some(yes)) = (no, yes) {
        let text = format!("{who} contradicts itself ({yes}; {no}): the no wins");
        steps.push(text.clone());
        warnings.push(text);
        return Some(false);
    }
    steps.push(format!("{who} says {} ({first})", if first.yes { "yes" } else { "no" }));
    Some(first.yes)
}

#[cfg(test)]
mod tests;
