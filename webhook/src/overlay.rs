//! Merges a container of the user's over ours, as Kubernetes' strategic merge does: maps by key, `env` by name,
//! `volumeMounts` by mount path, `ports` by number; other lists and scalars replace. The name and the word `auto` for the
//! image stay behind.

use serde_json::Value;

/// Merges `over` over `base`.
pub(crate) fn merge_container(base: &mut Value, over: &Value) {
    let mut over = over.clone();
    if let Some(map) = over.as_object_mut() {
        map.remove("name");
        if map.get("image").and_then(Value::as_str) == Some("auto") {
            map.remove("image");
        }
    }
    merge(base, &over, "");
}

fn key_of(field: &str) -> Option<&'static str> {
    match field {
        "env" => Some("name"),
        "volumeMounts" => Some("mountPath"),
        "volumeDevices" => Some("devicePath"),
        "ports" => Some("containerPort"),
        _ => None,
    }
}

/// Of these a map has only one: setting one takes the others away.
const HANDLERS: [&str; 4] = ["exec", "httpGet", "tcpSocket", "grpc"];

fn merge(base: &mut Value, over: &Value, field: &str) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            if HANDLERS.iter().any(|h| over.contains_key(*h)) {
                base.retain(|k, _| !HANDLERS.contains(&k.as_str()) || over.contains_key(k));
            }
            // A variable has a value or a source of it, not both.
            if over.contains_key("valueFrom") {
                base.remove("value");
            }
            if over.contains_key("value") {
                base.remove("valueFrom");
            }
            for (key, value) in over {
                match base.get_mut(key) {
                    _ if value.is_null() => {
                        base.remove(key);
                    }
                    Some(slot) => merge(slot, value, key),
                    None => {
                        base.insert(key.clone(), value.clone());
                    }
                }
            }
        }
        (Value::Array(base), Value::Array(over)) if key_of(field).is_some() => {
            let key = key_of(field).unwrap_or_default();
            for item in over {
                match base.iter_mut().find(|b| b.get(key).is_some() && b.get(key) == item.get(key)) {
                    Some(slot) => merge(slot, item, ""),
                    None => base.push(item.clone()),
                }
            }
        }
        (base, over) => *base = over.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn merges_as_kubernetes_does() {
        let mut base = json!({
            "name": "weft-proxy", "image": "ours", "args": ["a"],
            "env": [{"name": "A", "value": "1"}, {"name": "B", "valueFrom": {"fieldRef": {"fieldPath": "x"}}}],
            "resources": {"requests": {"cpu": "10m", "memory": "20Mi"}},
            "readinessProbe": {"httpGet": {"path": "/x"}, "periodSeconds": 3},
            "volumeMounts": [{"name": "s", "mountPath": "/s", "readOnly": true}]
        });
        merge_container(
            &mut base,
            &json!({
                "name": "istio-proxy", "image": "auto", "args": ["b"],
                "env": [{"name": "B", "value": "2"}, {"name": "C", "value": "3"}],
                "resources": {"requests": {"cpu": "1"}, "limits": {"cpu": "2"}},
                "readinessProbe": {"exec": {"command": ["true"]}},
                "volumeMounts": [{"name": "mine", "mountPath": "/mine"}, {"name": "s", "mountPath": "/s", "subPath": "z"}]
            }),
        );
        assert_eq!(
            base,
            json!({
                "name": "weft-proxy", "image": "ours", "args": ["b"],
                "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}, {"name": "C", "value": "3"}],
                "resources": {"requests": {"cpu": "1", "memory": "20Mi"}, "limits": {"cpu": "2"}},
                "readinessProbe": {"exec": {"command": ["true"]}, "periodSeconds": 3},
                "volumeMounts": [{"name": "s", "mountPath": "/s", "readOnly": true, "subPath": "z"}, {"name": "mine", "mountPath": "/mine"}]
            })
        );
        merge_container(&mut base, &json!({"image": "other:1"}));
        assert_eq!(base["image"], "other:1");
    }
}
