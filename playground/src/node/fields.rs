//! What a pod's environment and files say about itself: `fieldRef`, `resourceFieldRef`, `$(VAR)`, service variables.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use crate::json::{entries, list, text};

/// Why a container can't be configured. The text names the object and the field.
pub(crate) type Missing = String;

/// Where `configMapKeyRef` and the like are read.
pub(crate) trait Objects {
    /// The ConfigMap (or, with `secret`, the Secret) of this namespace.
    fn find(&self, secret: bool, ns: &str, name: &str) -> Option<Arc<Value>>;
}

/// The entries of a ConfigMap or a Secret as bytes.
pub(crate) fn data(object: &Value, secret: bool) -> BTreeMap<String, Vec<u8>> {
    use base64::Engine as _;
    let decode = |text: &str| base64::engine::general_purpose::STANDARD.decode(text).unwrap_or_default();
    let mut out = BTreeMap::new();
    for (key, value) in entries(object, "/data") {
        out.insert(key.to_owned(), if secret { decode(value) } else { value.as_bytes().to_vec() });
    }
    for (key, value) in entries(object, "/binaryData") {
        out.insert(key.to_owned(), decode(value));
    }
    out
}

fn quoted(object: &Value, pointer: &str) -> String {
    let mut pairs: Vec<_> = entries(object, pointer).collect();
    pairs.sort_unstable();
    pairs.iter().map(|(k, v)| format!("{k}={v:?}")).collect::<Vec<_>>().join("\n")
}

/// The value of a `fieldRef`.
pub(crate) fn field(pod: &Value, path: &str) -> Result<String, Missing> {
    for map in ["labels", "annotations"] {
        if let Some(key) = path.strip_prefix(&format!("metadata.{map}['")).and_then(|rest| rest.strip_suffix("']")) {
            let found = pod["metadata"][map].get(key).and_then(Value::as_str);
            return Ok(found.unwrap_or_default().to_owned());
        }
    }
    let joined = |pointer: &str| list(pod, pointer).iter().map(|a| text(a, "/ip")).collect::<Vec<_>>().join(",");
    Ok(match path {
        "metadata.name"
        | "metadata.namespace"
        | "metadata.uid"
        | "spec.nodeName"
        | "spec.serviceAccountName"
        | "status.hostIP"
        | "status.podIP" => text(pod, &format!("/{}", path.replace('.', "/"))).to_owned(),
        "metadata.labels" => quoted(pod, "/metadata/labels"),
        "metadata.annotations" => quoted(pod, "/metadata/annotations"),
        "status.podIPs" => joined("/status/podIPs"),
        "status.hostIPs" => joined("/status/hostIPs"),
        other => return Err(format!("fieldRef.fieldPath: \"{other}\" is not supported")),
    })
}

/// A Kubernetes quantity in thousandths.
pub(crate) fn quantity(text: &str) -> Option<i128> {
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let number: f64 = digits.parse().ok()?;
    let factor: f64 = match unit {
        "m" => 1.0,
        "" => 1e3,
        "k" => 1e6,
        "M" => 1e9,
        "G" => 1e12,
        "T" => 1e15,
        "Ki" => 1024e3,
        "Mi" => 1024e3 * 1024.0,
        "Gi" => 1024e3 * 1024.0 * 1024.0,
        "Ti" => 1024e3 * 1024.0 * 1024.0 * 1024.0,
        _ => return None,
    };
    Some((number * factor).round() as i128)
}

/// The value of a `resourceFieldRef`; what has no limit gets the node's size.
pub(crate) fn resource(pod: &Value, container: &Value, reference: &Value) -> Result<String, Missing> {
    let named = text(reference, "/containerName");
    let all = list(pod, "/spec/containers").iter().chain(list(pod, "/spec/initContainers"));
    let container = if named.is_empty() { Some(container) } else { all.into_iter().find(|c| c["name"] == named) };
    let container = container.ok_or_else(|| format!("resourceFieldRef.containerName: there is no container \"{named}\""))?;
    let path = text(reference, "/resource");
    let (kind, name) = path.split_once('.').ok_or_else(|| format!("resourceFieldRef.resource: \"{path}\" is not supported"))?;
    let own = text(&container["resources"], &format!("/{kind}/{name}"));
    let whole = match (kind, name) {
        ("limits", "cpu") => std::thread::available_parallelism().map_or(1, std::num::NonZero::get).to_string(),
        ("limits", "memory") => "8Gi".to_owned(),
        _ => "0".to_owned(),
    };
    let amount = quantity(if own.is_empty() { &whole } else { own })
        .ok_or_else(|| format!("resources.{path}: \"{own}\" is not a quantity"))?;
    let divisor = match text(reference, "/divisor") {
        "" | "0" => 1000,
        other => quantity(other)
            .filter(|d| *d > 0)
            .ok_or_else(|| format!("resourceFieldRef.divisor: \"{other}\" is not a quantity"))?,
    };
    Ok(((amount + divisor - 1) / divisor).to_string())
}

/// Replaces `$(NAME)`; `$$` is one dollar, and what isn't known stays as it is.
pub(crate) fn expand(input: &str, env: &[(String, String)]) -> String {
    let mut out = String::new();
    let mut rest = input;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(tail) = after.strip_prefix('$') {
            out.push('$');
            rest = tail;
        } else if let Some((name, tail)) = after.strip_prefix('(').and_then(|r| r.split_once(')')) {
            match env.iter().rev().find(|(k, _)| k == name) {
                Some((_, value)) => out.push_str(value),
                None => out.push_str(&format!("$({name})")),
            }
            rest = tail;
        } else {
            out.push('$');
            rest = after;
        }
    }
    out.push_str(rest);
    out
}

/// The variables for the Services of a namespace, and always those of the API server.
pub(crate) fn services(all: &[Arc<Value>], ns: &str, links: bool) -> Vec<(String, String)> {
    let mut out = Vec::new();
    for service in all {
        let (namespace, name) = (text(service, "/metadata/namespace"), text(service, "/metadata/name"));
        let api = namespace == "default" && name == "kubernetes";
        let ip = text(service, "/spec/clusterIP");
        let ports = list(service, "/spec/ports");
        if !(api || links && namespace == ns) || ip.is_empty() || ip == "None" || ports.is_empty() {
            continue;
        }
        let prefix = name.to_uppercase().replace('-', "_");
        let first = ports[0]["port"].to_string();
        out.push((format!("{prefix}_SERVICE_HOST"), ip.to_owned()));
        out.push((format!("{prefix}_SERVICE_PORT"), first.clone()));
        for port in ports {
            let named = text(port, "/name");
            if !named.is_empty() {
                out.push((format!("{prefix}_SERVICE_PORT_{}", named.to_uppercase().replace('-', "_")), port["port"].to_string()));
            }
        }
        out.push((format!("{prefix}_PORT"), format!("tcp://{ip}:{first}")));
        for port in ports {
            let protocol = if text(port, "/protocol").is_empty() { "TCP" } else { text(port, "/protocol") };
            let (lower, number) = (protocol.to_lowercase(), port["port"].to_string());
            let stem = format!("{prefix}_PORT_{number}_{protocol}");
            out.push((stem.clone(), format!("{lower}://{ip}:{number}")));
            out.push((format!("{stem}_PROTO"), lower));
            out.push((format!("{stem}_PORT"), number));
            out.push((format!("{stem}_ADDR"), ip.to_owned()));
        }
    }
    out
}

fn set(env: &mut Vec<(String, String)>, key: &str, value: String) {
    match env.iter_mut().find(|(k, _)| k == key) {
        Some(entry) => entry.1 = value,
        None => env.push((key.to_owned(), value)),
    }
}

/// The environment of a container, in Kubernetes' order: services, `envFrom`, `env`.
pub(crate) fn environment(
    pod: &Value,
    container: &Value,
    service_variables: Vec<(String, String)>,
    objects: &impl Objects,
) -> Result<Vec<(String, String)>, Missing> {
    let ns = text(pod, "/metadata/namespace");
    let mut env = vec![("PATH".to_owned(), super::launch::PATH.to_owned()), ("HOSTNAME".to_owned(), hostname(pod))];
    for (key, value) in service_variables {
        set(&mut env, &key, value);
    }
    for source in list(container, "/envFrom") {
        let secret = source.get("secretRef").is_some();
        let reference = if secret { &source["secretRef"] } else { &source["configMapRef"] };
        let name = text(reference, "/name");
        match objects.find(secret, ns, name) {
            Some(object) => {
                for (key, value) in data(&object, secret) {
                    set(&mut env, &format!("{}{key}", text(source, "/prefix")), String::from_utf8_lossy(&value).into_owned());
                }
            }
            None if reference["optional"] == true => {}
            None => return Err(format!("{} \"{name}\" not found", if secret { "secret" } else { "configmap" })),
        }
    }
    for variable in list(container, "/env") {
        let name = text(variable, "/name");
        let from = &variable["valueFrom"];
        let value = if let Some(reference) = from.get("fieldRef") {
            field(pod, text(reference, "/fieldPath"))?
        } else if let Some(reference) = from.get("resourceFieldRef") {
            resource(pod, container, reference)?
        } else if let Some((secret, reference)) =
            from.get("configMapKeyRef").map(|r| (false, r)).or_else(|| from.get("secretKeyRef").map(|r| (true, r)))
        {
            let (object, key) = (text(reference, "/name"), text(reference, "/key"));
            let what = if secret { "secret" } else { "configmap" };
            let found = objects.find(secret, ns, object);
            match found.as_ref().map(|o| data(o, secret).remove(key)) {
                Some(Some(value)) => String::from_utf8_lossy(&value).into_owned(),
                _ if reference["optional"] == true => continue,
                Some(None) => return Err(format!("couldn't find key {key} in {what} {ns}/{object}")),
                None => return Err(format!("{what} \"{object}\" not found")),
            }
        } else {
            expand(text(variable, "/value"), &env)
        };
        set(&mut env, name, value);
    }
    Ok(env)
}

/// The host name that a pod's processes see.
pub(crate) fn hostname(pod: &Value) -> String {
    let own = text(pod, "/spec/hostname");
    let name = if own.is_empty() { text(pod, "/metadata/name") } else { own };
    name.chars().take(63).collect::<String>().trim_end_matches(['-', '.']).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    struct None_;
    impl Objects for None_ {
        fn find(&self, _: bool, _: &str, name: &str) -> Option<Arc<Value>> {
            (name == "there").then(|| Arc::new(json!({"data": {"a": "1", "b": "2"}})))
        }
    }

    #[test]
    fn variables_expand_in_order_and_dollars_escape() {
        let env = vec![("A".to_owned(), "x".to_owned())];
        for (input, expected) in [("$(A)-$(B)", "x-$(B)"), ("$$(A)", "$(A)"), ("$", "$"), ("a$(A", "a$(A"), ("$$$$", "$$")] {
            assert_eq!(expand(input, &env), expected, "{input}");
        }
    }

    #[test]
    fn the_environment_reads_every_source_and_names_what_is_missing() {
        let pod = json!({"metadata": {"name": "p", "namespace": "n", "labels": {"x": "y"}}, "status": {"podIP": "1.2.3.4"}});
        let container = json!({"resources": {"limits": {"cpu": "1500m"}}, "envFrom": [{"configMapRef": {"name": "there"}, "prefix": "P_"}], "env": [
            {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "L", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['x']"}}},
            {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
            {"name": "MILLI", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu", "divisor": "1m"}}},
            {"name": "K", "valueFrom": {"configMapKeyRef": {"name": "there", "key": "b"}}},
            {"name": "O", "valueFrom": {"configMapKeyRef": {"name": "gone", "key": "b", "optional": true}}},
            {"name": "URL", "value": "http://$(IP)/$(L)/$(LATER)"},
            {"name": "LATER", "value": "1"}
        ]});
        let env = environment(&pod, &container, vec![], &None_).unwrap();
        let get = |k: &str| env.iter().find(|(key, _)| key == k).map(|(_, v)| v.as_str());
        let expected = [
            ("IP", "1.2.3.4"),
            ("L", "y"),
            ("CPU", "2"),
            ("MILLI", "1500"),
            ("K", "2"),
            ("P_a", "1"),
            ("URL", "http://1.2.3.4/y/$(LATER)"),
        ];
        for (key, value) in expected {
            assert_eq!(get(key), Some(value), "{key}");
        }
        assert_eq!(get("O"), None);
        let bad = json!({"env": [{"name": "S", "valueFrom": {"secretKeyRef": {"name": "there", "key": "zz"}}}]});
        assert_eq!(environment(&pod, &bad, vec![], &None_).unwrap_err(), "couldn't find key zz in secret n/there");
    }
}
