//! What the API server fills in and refuses by itself: defaults of the built-in kinds as far as controllers, kubectl and the
//! mesh look at them, the service account admission of pods, and the checks that a typo would otherwise survive.

use super::resource::ResourceInfo;
use super::status::Status;
use serde_json::{Value, json};

fn set(object: &mut Value, key: &str, value: Value) {
    if let Some(map) = object.as_object_mut()
        && map.get(key).is_none_or(Value::is_null)
    {
        map.insert(key.to_owned(), value);
    }
}

fn each<'a>(object: &'a mut Value, key: &str) -> impl Iterator<Item = &'a mut Value> {
    object.get_mut(key).and_then(Value::as_array_mut).into_iter().flatten()
}

/// Fills defaults in.
pub fn apply(info: &ResourceInfo, object: &mut Value) {
    match (info.key.group.as_str(), info.kind.as_str()) {
        ("", "Pod") => {
            if let Some(spec) = object.get_mut("spec") {
                pod_spec(spec);
                set(spec, "serviceAccountName", json!("default"));
                let account = spec["serviceAccountName"].clone();
                set(spec, "serviceAccount", account);
                set(
                    spec,
                    "tolerations",
                    json!([
                        {"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300},
                        {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}
                    ]),
                );
                set(spec, "preemptionPolicy", json!("PreemptLowerPriority"));
                set(spec, "priority", json!(0));
            }
            set(object, "status", json!({}));
            set(&mut object["status"], "phase", json!("Pending"));
            let class = qos(&object["spec"]);
            set(&mut object["status"], "qosClass", json!(class));
        }
        ("apps", kind @ ("Deployment" | "ReplicaSet" | "StatefulSet" | "DaemonSet")) => {
            let Some(spec) = object.get_mut("spec") else { return };
            template(spec);
            if kind != "DaemonSet" {
                set(spec, "replicas", json!(1));
            }
            if kind != "ReplicaSet" {
                set(spec, "revisionHistoryLimit", json!(10));
            }
            if kind == "Deployment" {
                set(spec, "progressDeadlineSeconds", json!(600));
                set(spec, "strategy", json!({"type": "RollingUpdate"}));
                set(&mut spec["strategy"], "type", json!("RollingUpdate"));
                if spec["strategy"]["type"] == "RollingUpdate" {
                    set(&mut spec["strategy"], "rollingUpdate", json!({}));
                    set(&mut spec["strategy"]["rollingUpdate"], "maxSurge", json!("25%"));
                    set(&mut spec["strategy"]["rollingUpdate"], "maxUnavailable", json!("25%"));
                }
            }
            if kind == "StatefulSet" {
                set(spec, "podManagementPolicy", json!("OrderedReady"));
                set(spec, "updateStrategy", json!({"type": "RollingUpdate", "rollingUpdate": {"partition": 0}}));
            }
            if kind == "DaemonSet" {
                set(
                    spec,
                    "updateStrategy",
                    json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0}}),
                );
            }
        }
        ("batch", "Job") => job(object),
        ("batch", "CronJob") => {
            let Some(spec) = object.get_mut("spec") else { return };
            set(spec, "concurrencyPolicy", json!("Allow"));
            set(spec, "suspend", json!(false));
            if let Some(inner) = spec.pointer_mut("/jobTemplate/spec") {
                template(inner);
            }
        }
        ("", "Service") => service(object),
        ("", "Namespace") => {
            set(object, "spec", json!({}));
            set(&mut object["spec"], "finalizers", json!(["kubernetes"]));
            set(object, "status", json!({}));
            set(&mut object["status"], "phase", json!("Active"));
            let name = object["metadata"]["name"].clone();
            set(&mut object["metadata"], "labels", json!({}));
            if name.is_string() {
                object["metadata"]["labels"]["kubernetes.io/metadata.name"] = name;
            }
        }
        ("", "Secret") => {
            set(object, "type", json!("Opaque"));
            let plain = object.as_object_mut().and_then(|m| m.remove("stringData"));
            if let Some(Value::Object(plain)) = plain {
                use base64::Engine as _;
                set(object, "data", json!({}));
                for (key, value) in plain {
                    let text = value.as_str().unwrap_or_default();
                    object["data"][key] = json!(base64::engine::general_purpose::STANDARD.encode(text));
                }
            }
        }
        ("apiextensions.k8s.io", "CustomResourceDefinition") => {
            let Some(spec) = object.get_mut("spec") else { return };
            set(spec, "conversion", json!({"strategy": "None"}));
            if let Some(kind) = spec["names"]["kind"].as_str().map(str::to_owned) {
                set(&mut spec["names"], "singular", json!(kind.to_lowercase()));
                set(&mut spec["names"], "listKind", json!(format!("{kind}List")));
            }
        }
        ("admissionregistration.k8s.io", _) => {
            for hook in each(object, "webhooks") {
                set(hook, "failurePolicy", json!("Fail"));
                set(hook, "matchPolicy", json!("Equivalent"));
                set(hook, "namespaceSelector", json!({}));
                set(hook, "objectSelector", json!({}));
                set(hook, "timeoutSeconds", json!(10));
                if info.kind.starts_with("Mutating") {
                    set(hook, "reinvocationPolicy", json!("Never"));
                }
                if let Some(service) = hook.pointer_mut("/clientConfig/service") {
                    set(service, "port", json!(443));
                }
                for rule in each(hook, "rules") {
                    set(rule, "scope", json!("*"));
                }
            }
        }
        _ => {}
    }
}

fn job(object: &mut Value) {
    let uid = object["metadata"]["uid"].clone();
    let name = object["metadata"]["name"].clone();
    let Some(spec) = object.get_mut("spec") else { return };
    set(spec, "completions", json!(1));
    set(spec, "parallelism", json!(1));
    set(spec, "backoffLimit", json!(6));
    set(spec, "completionMode", json!("NonIndexed"));
    set(spec, "suspend", json!(false));
    template(spec);
    let labels = json!({"batch.kubernetes.io/controller-uid": uid, "controller-uid": uid, "batch.kubernetes.io/job-name": name, "job-name": name});
    // The uid is given after the mutating webhooks; the labels made of it come then.
    if spec.get("selector").is_none_or(Value::is_null) && uid.is_string() {
        set(&mut spec["template"], "metadata", json!({}));
        set(&mut spec["template"]["metadata"], "labels", json!({}));
        for (key, value) in labels.as_object().into_iter().flatten() {
            spec["template"]["metadata"]["labels"][key] = value.clone();
        }
        spec["selector"] = json!({"matchLabels": {"batch.kubernetes.io/controller-uid": uid}});
    }
}

fn service(object: &mut Value) {
    let Some(spec) = object.get_mut("spec") else { return };
    set(spec, "type", json!("ClusterIP"));
    set(spec, "sessionAffinity", json!("None"));
    set(spec, "internalTrafficPolicy", json!("Cluster"));
    if spec["type"] != "ExternalName" {
        set(spec, "ipFamilies", json!(["IPv4"]));
        set(spec, "ipFamilyPolicy", json!("SingleStack"));
    }
    for port in each(spec, "ports") {
        set(port, "protocol", json!("TCP"));
        let number = port["port"].clone();
        set(port, "targetPort", number);
    }
    set(object, "status", json!({"loadBalancer": {}}));
}

fn template(spec: &mut Value) {
    if let Some(pod) = spec.pointer_mut("/template/spec") {
        pod_spec(pod);
    }
    if let Some(template) = spec.get_mut("template") {
        set(template, "metadata", json!({}));
    }
}

fn pod_spec(spec: &mut Value) {
    set(spec, "restartPolicy", json!("Always"));
    set(spec, "terminationGracePeriodSeconds", json!(30));
    set(spec, "dnsPolicy", json!("ClusterFirst"));
    set(spec, "schedulerName", json!("default-scheduler"));
    set(spec, "securityContext", json!({}));
    set(spec, "enableServiceLinks", json!(true));
    for list in ["containers", "initContainers"] {
        for container in each(spec, list) {
            set(container, "terminationMessagePath", json!("/dev/termination-log"));
            set(container, "terminationMessagePolicy", json!("File"));
            set(container, "resources", json!({}));
            let image = container["image"].as_str().unwrap_or_default();
            let latest = !image.contains('@')
                && image.rsplit('/').next().is_some_and(|last| !last.contains(':') || last.ends_with(":latest"));
            set(container, "imagePullPolicy", json!(if latest { "Always" } else { "IfNotPresent" }));
            for port in each(container, "ports") {
                set(port, "protocol", json!("TCP"));
            }
            for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
                if let Some(probe) = container.get_mut(name) {
                    for (field, value) in
                        [("timeoutSeconds", 1), ("periodSeconds", 10), ("successThreshold", 1), ("failureThreshold", 3)]
                    {
                        set(probe, field, json!(value));
                    }
                    http_get(probe);
                }
            }
            for hook in ["postStart", "preStop"] {
                if let Some(handler) = container.pointer_mut(&format!("/lifecycle/{hook}")) {
                    http_get(handler);
                }
            }
            for env in each(container, "env") {
                if let Some(field) = env.pointer_mut("/valueFrom/fieldRef") {
                    set(field, "apiVersion", json!("v1"));
                }
                if let Some(field) = env.pointer_mut("/valueFrom/resourceFieldRef") {
                    set(field, "divisor", json!("0"));
                }
            }
        }
    }
    for volume in each(spec, "volumes") {
        for kind in ["configMap", "secret", "projected", "downwardAPI"] {
            if let Some(source) = volume.get_mut(kind) {
                set(source, "defaultMode", json!(0o644));
                for inner in each(source, "sources") {
                    if let Some(token) = inner.get_mut("serviceAccountToken") {
                        set(token, "expirationSeconds", json!(3600));
                    }
                }
            }
        }
    }
}

fn http_get(holder: &mut Value) {
    if let Some(get) = holder.get_mut("httpGet") {
        set(get, "path", json!("/"));
        set(get, "scheme", json!("HTTP"));
    }
}

fn qos(spec: &Value) -> &'static str {
    let containers: Vec<&Value> = ["containers", "initContainers"].iter().filter_map(|l| spec[*l].as_array()).flatten().collect();
    let has = |c: &Value, kind: &str| c["resources"][kind].as_object().is_some_and(|m| !m.is_empty());
    if containers.iter().all(|c| !has(c, "requests") && !has(c, "limits")) {
        return "BestEffort";
    }
    let full = |c: &&Value| {
        ["cpu", "memory"].iter().all(|r| {
            let (limit, request) = (&c["resources"]["limits"][*r], &c["resources"]["requests"][*r]);
            !limit.is_null() && (request.is_null() || request == limit)
        })
    };
    if containers.iter().all(full) { "Guaranteed" } else { "Burstable" }
}

/// The mount of the API token, as the ServiceAccount admission plugin adds it: to each container that has none there, and
/// so to those of a webhook on its next pass.
pub fn service_account(object: &mut Value) {
    const PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
    let Some(spec) = object.get_mut("spec") else { return };
    if spec["automountServiceAccountToken"] == json!(false) {
        return;
    }
    let existing = spec["volumes"].as_array().into_iter().flatten().filter_map(|v| v["name"].as_str());
    let found = existing.clone().find(|n| n.starts_with("kube-api-access-")).map(str::to_owned);
    let name = found.clone().unwrap_or_else(|| format!("kube-api-access-{}", super::api::suffix()));
    let mut used = false;
    for list in ["initContainers", "containers"] {
        for container in each(spec, list) {
            let mounted = container["volumeMounts"].as_array().into_iter().flatten().any(|m| m["mountPath"] == PATH);
            if !mounted {
                set(container, "volumeMounts", json!([]));
                if let Some(mounts) = container["volumeMounts"].as_array_mut() {
                    mounts.push(json!({"name": name, "mountPath": PATH, "readOnly": true}));
                }
                used = true;
            }
        }
    }
    if used && found.is_none() {
        set(spec, "volumes", json!([]));
        if let Some(volumes) = spec["volumes"].as_array_mut() {
            volumes.push(json!({"name": name, "projected": {"defaultMode": 0o644, "sources": [
                {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
                {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
                {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}}
            ]}}));
        }
    }
}

fn dns_label(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 63
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
}

fn dns_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= 253 && name.split('.').all(dns_label)
}

/// Refuses what the real server refuses and a person gets wrong.
pub fn validate(info: &ResourceInfo, object: &Value) -> Result<(), Status> {
    let mut causes: Vec<(String, String)> = Vec::new();
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    let mut bad = |field: &str, message: String| causes.push((field.to_owned(), message));
    let rbac = info.key.group == "rbac.authorization.k8s.io";
    let label_only = matches!(info.kind.as_str(), "Namespace" | "Service");
    if (label_only && !dns_label(name)) || (!rbac && !dns_name(name)) || name.is_empty() {
        bad("metadata.name", format!("Invalid value: {name:?}: a lowercase RFC 1123 name is required"));
    }
    for field in ["labels", "annotations"] {
        for (key, value) in object["metadata"][field].as_object().into_iter().flatten() {
            if !value.is_string() {
                bad(&format!("metadata.{field}.{key}"), format!("Invalid value: {value}: must be a string"));
            }
        }
    }
    match (info.key.group.as_str(), info.kind.as_str()) {
        ("", "Pod") => pod(&object["spec"], "spec", &mut causes),
        ("apps", "Deployment" | "ReplicaSet" | "StatefulSet" | "DaemonSet") => {
            let spec = &object["spec"];
            let labels = &spec["template"]["metadata"]["labels"];
            match super::selector::Labels::from_object(spec.get("selector")) {
                Err(why) => causes.push(("spec.selector".into(), why)),
                Ok(selector) => {
                    let empty = spec["selector"].as_object().is_none_or(serde_json::Map::is_empty);
                    if empty || !selector.matches(&json!({"metadata": {"labels": labels}})) {
                        causes.push((
                            "spec.template.metadata.labels".into(),
                            "Invalid value: `selector` does not match template `labels`".into(),
                        ));
                    }
                }
            }
            pod(&spec["template"]["spec"], "spec.template.spec", &mut causes);
        }
        ("", "Service")
            if object["spec"]["type"] != "ExternalName"
                && object["spec"]["ports"].as_array().is_none_or(Vec::is_empty)
                && object["spec"]["clusterIP"] != "None" =>
        {
            causes.push(("spec.ports".into(), "Required value".into()));
        }
        ("apiextensions.k8s.io", "CustomResourceDefinition") if super::resource::from_crd(object).is_none() => {
            causes.push(("spec".into(), "Invalid value: group, names, scope and versions are required".into()));
        }
        ("admissionregistration.k8s.io", _) => super::admission::check(object, &mut causes),
        _ => {}
    }
    if causes.is_empty() { Ok(()) } else { Err(Status::invalid(&info.key.group, &info.kind, name, &causes)) }
}

fn pod(spec: &Value, at: &str, causes: &mut Vec<(String, String)>) {
    let mut names: Vec<&str> = Vec::new();
    if spec["containers"].as_array().is_none_or(Vec::is_empty) {
        causes.push((format!("{at}.containers"), "Required value".into()));
    }
    let volumes: Vec<&str> = spec["volumes"].as_array().into_iter().flatten().filter_map(|v| v["name"].as_str()).collect();
    for (i, name) in volumes.iter().enumerate() {
        if volumes[..i].contains(name) {
            causes.push((format!("{at}.volumes[{i}].name"), format!("Duplicate value: {name:?}")));
        }
    }
    for list in ["initContainers", "containers"] {
        for (i, container) in spec[list].as_array().into_iter().flatten().enumerate() {
            let here = format!("{at}.{list}[{i}]");
            let name = container["name"].as_str().unwrap_or_default();
            if !dns_label(name) {
                causes.push((format!("{here}.name"), format!("Invalid value: {name:?}: a lowercase RFC 1123 label is required")));
            }
            if names.contains(&name) {
                causes.push((format!("{here}.name"), format!("Duplicate value: {name:?}")));
            }
            names.push(name);
            if container["image"].as_str().is_none_or(str::is_empty) {
                causes.push((format!("{here}.image"), "Required value".into()));
            }
            for (j, mount) in container["volumeMounts"].as_array().into_iter().flatten().enumerate() {
                let volume = mount["name"].as_str().unwrap_or_default();
                if !volumes.contains(&volume) {
                    causes.push((format!("{here}.volumeMounts[{j}].name"), format!("Not found: {volume:?}")));
                }
            }
        }
    }
}
