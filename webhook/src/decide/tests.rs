//! The truth tables of the decision: all keys, forms, levels and words.

use super::*;
use serde_json::json;

const FORMS: [&str; 2] = ["annotations", "labels"];

/// What a key's word means: yes, no, or nothing (with a warning).
fn words(key: &str) -> [(&'static str, Option<bool>); 8] {
    let (yes, yes_odd, no, no_odd) = if key == keys::INJECT_ISTIO {
        ("true", "True", "false", "FALSE")
    } else {
        ("enabled", "Enabled", "disabled", "DISABLED")
    };
    let other = if key == keys::INJECT_ISTIO { "enabled" } else { "true" };
    [
        (yes, Some(true)),
        (yes_odd, Some(true)),
        (no, Some(false)),
        (no_odd, Some(false)),
        (other, None),
        ("yes", None),
        ("", None),
        (" enabled", None),
    ]
}

fn pod(form: &str, key: &str, word: &str) -> Value {
    json!({"metadata": {form: {key: word}}, "spec": {}})
}

fn namespace(form: &str, key: &str, word: &str) -> NamespaceFacts {
    NamespaceFacts::from_object(&json!({"metadata": {"name": "shop", form: {key: word}}}))
}

fn silent() -> NamespaceFacts {
    NamespaceFacts { name: "shop".into(), ..NamespaceFacts::default() }
}

fn reason(pod: &Value, ns: &NamespaceFacts) -> Reason {
    let decision = decide(pod, ns, &Settings::default());
    let yes = matches!(decision.reason, Reason::PodEnabled | Reason::NamespaceEnabled);
    assert_eq!(decision.verdict == Verdict::Inject, yes, "{decision:?}");
    decision.reason
}

#[test]
fn every_key_form_level_and_word() {
    for (key, _) in KEYS {
        for form in FORMS {
            for (word, meaning) in words(key) {
                let case = format!("{form} {key}={word:?}");
                let on_pod = decide(&pod(form, key, word), &silent(), &Settings::default());
                let on_namespace = decide(&json!({"spec": {}}), &namespace(form, key, word), &Settings::default());
                let (pod_reason, namespace_reason) = match meaning {
                    Some(true) => (Reason::PodEnabled, Reason::NamespaceEnabled),
                    Some(false) => (Reason::PodDisabled, Reason::NamespaceDisabled),
                    None => (Reason::NotEnabled, Reason::NotEnabled),
                };
                assert_eq!((on_pod.reason, on_namespace.reason), (pod_reason, namespace_reason), "{case}");
                for decision in [&on_pod, &on_namespace] {
                    assert_eq!(decision.warnings.len(), usize::from(meaning.is_none()), "{case}: {decision:?}");
                    assert!(decision.warnings.iter().all(|w| w.contains(key) && w.contains(&format!("{word:?}"))), "{case}");
                }
                assert_eq!(on_namespace.namespace_asked, meaning == Some(true), "{case}");
            }
        }
    }
}

#[test]
fn the_pod_wins_over_its_namespace() {
    for (key, _) in KEYS {
        for (ns_key, _) in KEYS {
            let [(yes, _), _, (no, _), ..] = words(key);
            let [(ns_yes, _), _, (ns_no, _), ..] = words(ns_key);
            assert_eq!(reason(&pod("labels", key, no), &namespace("annotations", ns_key, ns_yes)), Reason::PodDisabled);
            assert_eq!(reason(&pod("labels", key, yes), &namespace("annotations", ns_key, ns_no)), Reason::PodEnabled);
            // A word that means nothing leaves the question to the namespace.
            assert_eq!(reason(&pod("labels", key, "maybe"), &namespace("annotations", ns_key, ns_yes)), Reason::NamespaceEnabled);
        }
    }
}

#[test]
fn a_contradiction_is_a_no_and_a_warning() {
    for (yes_key, _) in KEYS {
        for (no_key, _) in KEYS {
            let (yes, no) = (words(yes_key)[0].0, words(no_key)[2].0);
            let both = json!({"metadata": {"name": "shop", "annotations": {yes_key: yes}, "labels": {no_key: no}}, "spec": {}});
            for (decision, expected) in [
                (decide(&both, &silent(), &Settings::default()), Reason::PodDisabled),
                (
                    decide(&json!({"spec": {}}), &NamespaceFacts::from_object(&both), &Settings::default()),
                    Reason::NamespaceDisabled,
                ),
            ] {
                assert_eq!(decision.reason, expected, "{both}");
                assert!(decision.warnings.iter().any(|w| w.contains(yes_key) && w.contains(no_key)), "{decision:?}");
            }
        }
    }
}

#[test]
fn istios_namespace_label_counts_only_there() {
    let silent_pod = json!({"spec": {}});
    assert_eq!(reason(&silent_pod, &namespace("labels", keys::INJECTION_ISTIO, "enabled")), Reason::NamespaceEnabled);
    assert_eq!(reason(&silent_pod, &namespace("labels", keys::INJECTION_ISTIO, "disabled")), Reason::NamespaceDisabled);
    assert_eq!(reason(&silent_pod, &namespace("annotations", keys::INJECTION_ISTIO, "enabled")), Reason::NotEnabled);
    assert_eq!(reason(&pod("labels", keys::INJECTION_ISTIO, "enabled"), &silent()), Reason::NotEnabled);
}

#[test]
fn what_goes_before_any_word() {
    let yes = json!({keys::INJECT: "enabled"});
    let host = json!({"metadata": {"annotations": yes}, "spec": {"hostNetwork": true, "os": {"name": "windows"}}});
    let windows = json!({"metadata": {"annotations": yes}, "spec": {"hostNetwork": false, "os": {"name": "windows"}}});
    let plain = json!({"metadata": {"annotations": yes}, "spec": {"os": {"name": "linux"}}});
    let system = |name: &str| NamespaceFacts { name: name.into(), ..namespace("annotations", keys::INJECT, "enabled") };
    assert_eq!(reason(&host, &system("kube-system")), Reason::HostNetwork);
    assert_eq!(reason(&windows, &system("kube-system")), Reason::Windows);
    for name in ["kube-system", "kube-public", "kube-node-lease", "weft-system"] {
        assert_eq!(reason(&plain, &system(name)), Reason::SystemNamespace, "{name}");
    }
    assert_eq!(reason(&plain, &silent()), Reason::PodEnabled);
}

#[test]
fn origins_without_a_word() {
    let settings = Settings::default();
    let plain = json!({"spec": {}});
    let status = json!({"metadata": {"annotations": {keys::STATUS: "{}"}}, "spec": {}});
    let no = namespace("annotations", keys::INJECT, "disabled");
    let nothing = silent();
    for (pod, origin, verdict, reason) in [
        (&plain, Origin::Offline(None), Verdict::Inject, Reason::Offline),
        (&plain, Origin::Offline(Some(&no)), Verdict::Skip, Reason::NamespaceDisabled),
        (&plain, Origin::Unknown("shop"), Verdict::Skip, Reason::NamespaceUnknown),
        (&plain, Origin::Unknown("kube-system"), Verdict::Skip, Reason::SystemNamespace),
        (&status, Origin::Admission(&nothing), Verdict::Skip, Reason::AlreadyInjected),
    ] {
        let decision = decide_from(pod, origin, &settings);
        assert_eq!((decision.verdict, decision.reason), (verdict, reason), "{origin:?}");
        assert!(!decision.steps.is_empty());
    }
}

#[test]
fn codes_are_unique_and_short() {
    let codes: std::collections::BTreeSet<&str> = Reason::ALL.iter().map(|r| r.as_str()).collect();
    assert_eq!(codes.len(), Reason::ALL.len());
    assert!(codes.iter().all(|c| c.len() <= 20 && c.bytes().all(|b| b.is_ascii_lowercase() || b == b'-')));
}
