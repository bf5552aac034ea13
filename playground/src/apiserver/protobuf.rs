//! Bodies in Kubernetes' protobuf encoding, which kubectl from 1.32 on sends for what it makes itself (`create deployment`,
//! `create token`, `auth can-i`, evictions), whatever the server says it accepts.
//!
//! The table holds the messages that those commands send, with the field numbers of `k8s.io/api`. It need not be complete:
//! a field that isn't in it is an error that the client sees, never a field that gets lost.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

/// What a field holds: `s` text, `x` bytes, `i` a number, `b` a flag, `n` an IntOrString, `q` a Quantity, `t` a time, otherwise a
/// message of that name. A `*` before it: repeated; a `%`: a map from text to it.
type Field = (u32, &'static str, &'static str);

#[rustfmt::skip]
const MESSAGES: &[(&str, &[Field])] = &[
    ("ObjectMeta", &[(1, "name", "s"), (2, "generateName", "s"), (3, "namespace", "s"), (4, "selfLink", "s"), (5, "uid", "s"), (6, "resourceVersion", "s"),
        (7, "generation", "i"), (8, "creationTimestamp", "t"), (9, "deletionTimestamp", "t"), (10, "deletionGracePeriodSeconds", "i"),
        (11, "labels", "%s"), (12, "annotations", "%s"), (13, "ownerReferences", "*OwnerReference"), (14, "finalizers", "*s")]),
    ("OwnerReference", &[(1, "kind", "s"), (3, "name", "s"), (4, "uid", "s"), (5, "apiVersion", "s"), (6, "controller", "b"), (7, "blockOwnerDeletion", "b")]),
    ("LabelSelector", &[(1, "matchLabels", "%s"), (2, "matchExpressions", "*Requirement")]),
    ("Requirement", &[(1, "key", "s"), (2, "operator", "s"), (3, "values", "*s")]),
    ("Empty", &[]),
    ("NamespaceSpec", &[(1, "finalizers", "*s")]),
    ("NamespaceStatus", &[(1, "phase", "s")]),
    ("Namespace", &[(1, "metadata", "ObjectMeta"), (2, "spec", "NamespaceSpec"), (3, "status", "NamespaceStatus")]),
    ("ConfigMap", &[(1, "metadata", "ObjectMeta"), (2, "data", "%s"), (3, "binaryData", "%x"), (4, "immutable", "b")]),
    ("Secret", &[(1, "metadata", "ObjectMeta"), (2, "data", "%x"), (3, "type", "s"), (4, "stringData", "%s"), (5, "immutable", "b")]),
    ("ServiceAccount", &[(1, "metadata", "ObjectMeta"), (4, "automountServiceAccountToken", "b")]),
    ("Deployment", &[(1, "metadata", "ObjectMeta"), (2, "spec", "DeploymentSpec"), (3, "status", "Empty")]),
    ("DeploymentSpec", &[(1, "replicas", "i"), (2, "selector", "LabelSelector"), (3, "template", "PodTemplateSpec"), (4, "strategy", "Strategy"),
        (5, "minReadySeconds", "i"), (6, "revisionHistoryLimit", "i"), (7, "paused", "b"), (9, "progressDeadlineSeconds", "i")]),
    ("Strategy", &[(1, "type", "s"), (2, "rollingUpdate", "RollingUpdate")]),
    ("RollingUpdate", &[(1, "maxUnavailable", "n"), (2, "maxSurge", "n")]),
    ("PodTemplateSpec", &[(1, "metadata", "ObjectMeta"), (2, "spec", "PodSpec")]),
    ("Pod", &[(1, "metadata", "ObjectMeta"), (2, "spec", "PodSpec"), (3, "status", "Empty")]),
    ("PodSpec", &[(2, "containers", "*Container"), (3, "restartPolicy", "s"), (4, "terminationGracePeriodSeconds", "i"), (5, "activeDeadlineSeconds", "i"),
        (6, "dnsPolicy", "s"), (7, "nodeSelector", "%s"), (8, "serviceAccountName", "s"), (9, "serviceAccount", "s"), (10, "nodeName", "s"),
        (11, "hostNetwork", "b"), (12, "hostPID", "b"), (13, "hostIPC", "b"), (14, "securityContext", "Empty"), (16, "hostname", "s"), (17, "subdomain", "s"),
        (19, "schedulerName", "s"), (20, "initContainers", "*Container")]),
    ("Container", &[(1, "name", "s"), (2, "image", "s"), (3, "command", "*s"), (4, "args", "*s"), (5, "workingDir", "s"), (6, "ports", "*ContainerPort"),
        (7, "env", "*EnvVar"), (8, "resources", "Resources"), (13, "terminationMessagePath", "s"), (14, "imagePullPolicy", "s"), (16, "stdin", "b"),
        (17, "stdinOnce", "b"), (18, "tty", "b"), (20, "terminationMessagePolicy", "s")]),
    ("ContainerPort", &[(1, "name", "s"), (2, "hostPort", "i"), (3, "containerPort", "i"), (4, "protocol", "s"), (5, "hostIP", "s")]),
    ("EnvVar", &[(1, "name", "s"), (2, "value", "s")]),
    ("Resources", &[(1, "limits", "%q"), (2, "requests", "%q")]),
    ("Service", &[(1, "metadata", "ObjectMeta"), (2, "spec", "ServiceSpec"), (3, "status", "ServiceStatus")]),
    ("ServiceStatus", &[(1, "loadBalancer", "Empty")]),
    ("ServiceSpec", &[(1, "ports", "*ServicePort"), (2, "selector", "%s"), (3, "clusterIP", "s"), (4, "type", "s"), (5, "externalIPs", "*s"),
        (7, "sessionAffinity", "s"), (8, "loadBalancerIP", "s"), (10, "externalName", "s"), (11, "externalTrafficPolicy", "s"),
        (13, "publishNotReadyAddresses", "b"), (17, "ipFamilyPolicy", "s"), (18, "clusterIPs", "*s"), (19, "ipFamilies", "*s"), (22, "internalTrafficPolicy", "s")]),
    ("ServicePort", &[(1, "name", "s"), (2, "protocol", "s"), (3, "port", "i"), (4, "targetPort", "n"), (5, "nodePort", "i"), (6, "appProtocol", "s")]),
    ("Job", &[(1, "metadata", "ObjectMeta"), (2, "spec", "JobSpec"), (3, "status", "Empty")]),
    ("JobSpec", &[(1, "parallelism", "i"), (2, "completions", "i"), (3, "activeDeadlineSeconds", "i"), (4, "selector", "LabelSelector"), (5, "manualSelector", "b"),
        (6, "template", "PodTemplateSpec"), (7, "backoffLimit", "i"), (8, "ttlSecondsAfterFinished", "i")]),
    ("TokenRequest", &[(1, "metadata", "ObjectMeta"), (2, "spec", "TokenRequestSpec"), (3, "status", "TokenRequestStatus")]),
    ("TokenRequestSpec", &[(1, "audiences", "*s"), (3, "boundObjectRef", "BoundObjectRef"), (4, "expirationSeconds", "i")]),
    ("TokenRequestStatus", &[(1, "token", "s"), (2, "expirationTimestamp", "t")]),
    ("BoundObjectRef", &[(1, "kind", "s"), (2, "apiVersion", "s"), (3, "name", "s"), (4, "uid", "s")]),
    ("SelfSubjectReview", &[(1, "metadata", "ObjectMeta"), (2, "status", "SelfSubjectReviewStatus")]),
    ("SelfSubjectReviewStatus", &[(1, "userInfo", "Empty")]),
    ("SelfSubjectAccessReview", &[(1, "metadata", "ObjectMeta"), (2, "spec", "AccessSpec"), (3, "status", "AccessStatus")]),
    ("AccessSpec", &[(1, "resourceAttributes", "ResourceAttributes"), (2, "nonResourceAttributes", "NonResourceAttributes")]),
    ("AccessStatus", &[(1, "allowed", "b"), (2, "reason", "s"), (3, "evaluationError", "s"), (4, "denied", "b")]),
    ("ResourceAttributes", &[(1, "namespace", "s"), (2, "verb", "s"), (3, "group", "s"), (4, "version", "s"), (5, "resource", "s"), (6, "subresource", "s"), (7, "name", "s")]),
    ("NonResourceAttributes", &[(1, "path", "s"), (2, "verb", "s")]),
    ("SelfSubjectRulesReview", &[(1, "metadata", "ObjectMeta"), (2, "spec", "RulesSpec"), (3, "status", "RulesStatus")]),
    ("RulesSpec", &[(1, "namespace", "s")]),
    ("RulesStatus", &[(3, "incomplete", "b")]),
    ("Eviction", &[(1, "metadata", "ObjectMeta"), (2, "deleteOptions", "DeleteOptions")]),
    ("DeleteOptions", &[(1, "gracePeriodSeconds", "i"), (2, "preconditions", "Preconditions"), (3, "orphanDependents", "b"), (4, "propagationPolicy", "s"), (5, "dryRun", "*s")]),
    ("Preconditions", &[(1, "uid", "s"), (2, "resourceVersion", "s")]),
    ("Role", &[(1, "metadata", "ObjectMeta"), (2, "rules", "*PolicyRule")]),
    ("ClusterRole", &[(1, "metadata", "ObjectMeta"), (2, "rules", "*PolicyRule")]),
    ("PolicyRule", &[(1, "verbs", "*s"), (2, "apiGroups", "*s"), (3, "resources", "*s"), (4, "resourceNames", "*s"), (5, "nonResourceURLs", "*s")]),
    ("RoleBinding", &[(1, "metadata", "ObjectMeta"), (2, "subjects", "*Subject"), (3, "roleRef", "RoleRef")]),
    ("ClusterRoleBinding", &[(1, "metadata", "ObjectMeta"), (2, "subjects", "*Subject"), (3, "roleRef", "RoleRef")]),
    ("Subject", &[(1, "kind", "s"), (2, "apiGroup", "s"), (3, "name", "s"), (4, "namespace", "s")]),
    ("RoleRef", &[(1, "apiGroup", "s"), (2, "kind", "s"), (3, "name", "s")]),
];

/// A field as it is on the wire.
enum Wire<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

fn varint(input: &mut &[u8]) -> Result<u64, String> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = input.split_first().ok_or("it ends in the middle")?;
        *input = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err("a number is too long".into())
}

fn field<'a>(input: &mut &'a [u8]) -> Result<(u32, Wire<'a>), String> {
    let tag = varint(input)?;
    let number = u32::try_from(tag >> 3).map_err(|_| "a field number is too large")?;
    match tag & 7 {
        0 => Ok((number, Wire::Number(varint(input)?))),
        2 => {
            let length = usize::try_from(varint(input)?).map_err(|_| "a length is too large")?;
            let (bytes, rest) = input.split_at_checked(length).ok_or("it ends in the middle")?;
            *input = rest;
            Ok((number, Wire::Bytes(bytes)))
        }
        kind => Err(format!("wire type {kind} is not used by Kubernetes")),
    }
}

fn text(bytes: &[u8]) -> Result<String, String> {
    String::from_utf8(bytes.to_vec()).map_err(|e| e.to_string())
}

/// The one field that a small message such as a Quantity has.
fn only(mut input: &[u8]) -> Result<Vec<(u32, Wire<'_>)>, String> {
    let mut out = Vec::new();
    while !input.is_empty() {
        out.push(field(&mut input)?);
    }
    Ok(out)
}

fn value(kind: &str, wire: &Wire<'_>) -> Result<Value, String> {
    Ok(match (kind, wire) {
        ("i", Wire::Number(n)) => json!(n.cast_signed()),
        ("b", Wire::Number(n)) => json!(*n != 0),
        ("s", Wire::Bytes(bytes)) => json!(text(bytes)?),
        ("x", Wire::Bytes(bytes)) => json!(STANDARD.encode(bytes)),
        ("q", Wire::Bytes(bytes)) => match only(bytes)?.as_slice() {
            [(1, Wire::Bytes(amount))] => json!(text(amount)?),
            _ => return Err("a quantity is malformed".into()),
        },
        ("t", Wire::Bytes(bytes)) => match only(bytes)?.iter().find(|(n, _)| *n == 1) {
            Some((_, Wire::Number(seconds))) => json!(super::api::rfc3339(seconds.cast_signed())),
            _ => Value::Null,
        },
        ("n", Wire::Bytes(bytes)) => {
            let (mut is_text, mut number, mut word) = (false, json!(0), json!(""));
            for (at, wire) in only(bytes)? {
                match (at, &wire) {
                    (1, Wire::Number(n)) => is_text = *n == 1,
                    (2, wire) => number = value("i", wire)?,
                    (3, wire) => word = value("s", wire)?,
                    _ => return Err("a number or text is malformed".into()),
                }
            }
            if is_text { word } else { number }
        }
        (name, Wire::Bytes(bytes)) => message(name, bytes)?,
        _ => return Err("a field has another type than it should".into()),
    })
}

fn message(name: &str, mut input: &[u8]) -> Result<Value, String> {
    let (_, fields) = MESSAGES.iter().find(|(n, _)| *n == name).ok_or_else(|| format!("{name} is not known"))?;
    let mut out = Map::new();
    while !input.is_empty() {
        let (number, wire) = field(&mut input)?;
        let Some((_, key, kind)) = fields.iter().find(|(n, ..)| *n == number) else {
            // Kubernetes writes fields that are not set as zero or as nothing; those say nothing.
            if matches!(wire, Wire::Number(0) | Wire::Bytes([])) {
                continue;
            }
            return Err(format!("field {number} of {name} is not known"));
        };
        if let Some(kind) = kind.strip_prefix('*') {
            let value = value(kind, &wire)?;
            if let Some(list) = out.entry(*key).or_insert_with(|| json!([])).as_array_mut() {
                list.push(value);
            }
        } else if let Some(kind) = kind.strip_prefix('%') {
            let Wire::Bytes(bytes) = wire else { return Err("a map is malformed".into()) };
            let (mut name, mut inner) = (String::new(), if matches!(kind, "s" | "x") { json!("") } else { Value::Null });
            for (at, wire) in only(bytes)? {
                match (at, &wire) {
                    (1, Wire::Bytes(bytes)) => name = text(bytes)?,
                    (2, wire) => inner = value(kind, wire)?,
                    _ => return Err("a map is malformed".into()),
                }
            }
            out.entry(*key).or_insert_with(|| json!({}))[name] = inner;
        } else {
            let value = value(kind, &wire)?;
            // Protobuf as Kubernetes writes it spells out empty texts that JSON leaves out.
            if value != json!("") && !value.is_null() {
                out.insert((*key).to_owned(), value);
            }
        }
    }
    Ok(Value::Object(out))
}

/// The object in a protobuf body: four bytes of magic, then an envelope with the kind and the object's own bytes.
pub(super) fn object(body: &[u8]) -> Result<Value, String> {
    let envelope = body.strip_prefix(b"k8s\0").ok_or("it doesn't begin as Kubernetes' protobuf does")?;
    let (mut version, mut kind, mut raw): (String, String, &[u8]) = (String::new(), String::new(), &[]);
    for (number, wire) in only(envelope)? {
        let Wire::Bytes(bytes) = wire else { return Err("the envelope is malformed".into()) };
        match number {
            1 => {
                for (number, wire) in only(bytes)? {
                    match (number, wire) {
                        (1, Wire::Bytes(bytes)) => version = text(bytes)?,
                        (2, Wire::Bytes(bytes)) => kind = text(bytes)?,
                        _ => return Err("the envelope is malformed".into()),
                    }
                }
            }
            2 => raw = bytes,
            _ => {}
        }
    }
    let mut object = message(&kind, raw)?;
    object["apiVersion"] = json!(version);
    object["kind"] = json!(kind);
    Ok(object)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(number: u32, content: &[u8]) -> Vec<u8> {
        let mut out = vec![u8::try_from(number << 3 | 2).unwrap(), u8::try_from(content.len()).unwrap()];
        out.extend(content);
        out
    }

    fn body(kind: &str, raw: &[u8]) -> Vec<u8> {
        let meta = [bytes(1, b"v1"), bytes(2, kind.as_bytes())].concat();
        [b"k8s\0".to_vec(), bytes(1, &meta), bytes(2, raw)].concat()
    }

    #[test]
    fn an_object_comes_out_as_json() {
        let port = [bytes(1, b"http"), vec![3 << 3, 80], bytes(4, &[vec![1 << 3, 1], bytes(3, b"web")].concat())].concat();
        let spec = [bytes(1, &port), bytes(2, &[bytes(1, b"app"), bytes(2, b"x")].concat())].concat();
        let raw = [bytes(1, &bytes(1, b"svc")), bytes(2, &spec)].concat();
        assert_eq!(
            object(&body("Service", &raw)).unwrap(),
            json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "svc"},
                "spec": {"ports": [{"name": "http", "port": 80, "targetPort": "web"}], "selector": {"app": "x"}}})
        );
        let secret = bytes(2, &[bytes(1, b"k"), bytes(2, &[0, 255])].concat());
        assert_eq!(object(&body("Secret", &secret)).unwrap()["data"], json!({"k": "AP8="}));
    }

    #[test]
    fn what_is_not_known_is_refused_and_garbage_too() {
        let unknown = bytes(1, &bytes(15, b"x"));
        assert!(object(&body("ConfigMap", &unknown)).unwrap_err().contains("field 15 of ObjectMeta"));
        assert!(object(&body("Zebra", &[])).is_err());
        assert!(object(b"{}").is_err());
        let whole = body("ConfigMap", &bytes(1, &bytes(1, b"name")));
        for cut in 5..whole.len() {
            let part = object(&whole[..cut]);
            assert!(part.as_ref().map_or(true, |o| o["metadata"]["name"].is_null()), "{cut}: {part:?}");
        }
    }
}
