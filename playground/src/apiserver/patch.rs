//! The four kinds of patches, and the book of who set which field (`metadata.managedFields`).
//!
//! Strategic merge and server-side apply both merge lists of the built-in kinds by key; the keys stand in one table, by the
//! name of the field. Server-side apply works on the fields that a manager applied before and applies now: what it no longer
//! names, and nobody else owns, goes away; what another manager owns with another value is a conflict unless forced.

use super::api::now;
use super::resource::ResourceInfo;
use super::status::Status;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

/// Which patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PatchKind {
    /// RFC 6902.
    Json,
    /// RFC 7386.
    Merge,
    /// Kubernetes' own.
    Strategic,
}

/// Applies a patch.
pub fn apply(kind: PatchKind, current: &Value, body: &Value) -> Result<Value, Status> {
    let mut new = current.clone();
    match kind {
        PatchKind::Merge => json_patch::merge(&mut new, body),
        PatchKind::Json => {
            let patch: json_patch::Patch =
                serde_json::from_value(body.clone()).map_err(|e| Status::bad_request(format!("error decoding patch: {e}")))?;
            json_patch::patch(&mut new, &patch).map_err(|e| {
                Status::new(422, "Invalid", format!("the server rejected our request due to an error in our request: {e}"))
            })?;
        }
        PatchKind::Strategic => strategic(&mut new, body, "", Shape::BuiltIn(current["kind"].as_str().unwrap_or_default())),
    }
    Ok(new)
}

/// What is known about the type of a value: which lists under it are keyed or sets, which maps are one value.
#[derive(Debug, Clone, Copy)]
pub enum Shape<'a> {
    /// In an object of this built-in kind: the table below knows.
    BuiltIn(&'a str),
    /// In a custom resource: the schema of this place knows, if there is one. The flag is set at the root, where `metadata` is
    /// built in.
    Custom(Option<&'a Value>, bool),
}

impl<'a> Shape<'a> {
    /// The root of an object.
    pub fn of(info: &'a ResourceInfo, version: &str) -> Self {
        if info.custom {
            let version = if version.is_empty() { info.preferred() } else { version };
            Self::Custom(info.version(version).and_then(|v| v.schema.as_deref()), true)
        } else {
            Self::BuiltIn(&info.kind)
        }
    }

    fn child(self, field: &str) -> Self {
        match self {
            Self::Custom(_, true) if field == "metadata" => Self::BuiltIn(""),
            Self::Custom(schema, _) => {
                let inner =
                    schema.and_then(|s| s.get("properties").and_then(|p| p.get(field)).or_else(|| s.get("additionalProperties")));
                Self::Custom(inner, false)
            }
            built_in @ Self::BuiltIn(_) => built_in,
        }
    }

    fn item(self) -> Self {
        match self {
            Self::Custom(schema, _) => Self::Custom(schema.and_then(|s| s.get("items")), false),
            built_in @ Self::BuiltIn(_) => built_in,
        }
    }

    /// The fields by which the items of the list here are told apart; empty: the list is replaced as a whole.
    fn keys(self, field: &str, sample: Option<&Value>) -> Vec<&'a str> {
        match self {
            Self::BuiltIn(kind) => {
                // A list of plain values under such a name is another list.
                if sample.is_some_and(|s| !s.is_object()) { Vec::new() } else { keys(kind, field, sample).to_vec() }
            }
            Self::Custom(schema, _) => {
                let Some(schema) = schema.filter(|s| s["x-kubernetes-list-type"] == "map") else { return Vec::new() };
                schema["x-kubernetes-list-map-keys"].as_array().into_iter().flatten().filter_map(Value::as_str).collect()
            }
        }
    }

    /// Whether the list here is a set of plain values.
    fn is_set(self, field: &str) -> bool {
        match self {
            Self::BuiltIn(_) => field == "finalizers",
            Self::Custom(schema, _) => schema.is_some_and(|s| s["x-kubernetes-list-type"] == "set"),
        }
    }

    /// Whether the map here is one value, owned as a whole.
    fn is_atomic(self, field: &str) -> bool {
        match self {
            Self::BuiltIn(_) => matches!(
                field,
                "selector"
                    | "labelSelector"
                    | "podSelector"
                    | "namespaceSelector"
                    | "objectSelector"
                    | "nodeSelector"
                    | "fieldRef"
                    | "secretKeyRef"
                    | "configMapKeyRef"
                    | "roleRef"
            ),
            Self::Custom(schema, _) => schema.is_some_and(|s| s["x-kubernetes-map-type"] == "atomic"),
        }
    }
}

/// The merge keys of the built-in kinds, as server-side apply has them.
fn keys(kind: &str, field: &str, sample: Option<&Value>) -> &'static [&'static str] {
    let has = |key: &str| sample.is_some_and(|s| s.get(key).is_some());
    match field {
        "containers"
        | "initContainers"
        | "ephemeralContainers"
        | "env"
        | "volumes"
        | "imagePullSecrets"
        | "webhooks"
        | "claims" => &["name"],
        "secrets" if kind == "ServiceAccount" => &["name"],
        "volumeMounts" => &["mountPath"],
        "volumeDevices" => &["devicePath"],
        "ports" if has("containerPort") => &["containerPort", "protocol"],
        "ports" if has("port") && kind == "Service" => &["port", "protocol"],
        "conditions" => &["type"],
        "addresses" if kind == "Node" => &["type"],
        "ownerReferences" => &["uid"],
        "hostAliases" | "podIPs" | "hostIPs" => &["ip"],
        "topologySpreadConstraints" => &["topologyKey", "whenUnsatisfiable"],
        "matchConditions" => &["name"],
        _ => &[],
    }
}

/// The value of a key field; a key that is left out has its default, and the only one of those is the protocol.
fn key_of(item: &Value, key: &str) -> Option<Value> {
    item.get(key).cloned().or_else(|| (key == "protocol" && item.is_object()).then(|| json!("TCP")))
}

fn same_item(keys: &[&str], a: &Value, b: &Value) -> bool {
    keys.iter().all(|k| key_of(a, k).is_some_and(|v| key_of(b, k) == Some(v)))
}

/// Strategic merge patch has one key per list, the first of those of server-side apply.
fn merge_key<'a>(shape: Shape<'a>, field: &str, sample: Option<&Value>) -> Vec<&'a str> {
    let mut keys = shape.keys(field, sample);
    keys.truncate(1);
    keys
}

fn strategic(base: &mut Value, patch: &Value, field: &str, shape: Shape<'_>) {
    match patch {
        Value::Object(over) => {
            if over.get("$patch").and_then(Value::as_str) == Some("replace") {
                let mut plain = over.clone();
                plain.remove("$patch");
                *base = Value::Object(plain);
                return;
            }
            if !base.is_object() {
                *base = Value::Object(Map::new());
            }
            let Some(map) = base.as_object_mut() else { return };
            if let Some(retain) = over.get("$retainKeys").and_then(Value::as_array) {
                map.retain(|k, _| retain.iter().any(|r| r == k));
            }
            for (key, value) in over {
                if let Some(list) = key.strip_prefix("$deleteFromPrimitiveList/") {
                    if let Some(items) = map.get_mut(list).and_then(Value::as_array_mut) {
                        items.retain(|i| value.as_array().is_none_or(|gone| !gone.contains(i)));
                    }
                } else if key.starts_with('$') {
                    // The order of elements is settled below; `$patch: delete` is handled where lists are merged.
                } else if value.is_null() || value.get("$patch").and_then(Value::as_str) == Some("delete") {
                    map.remove(key);
                } else {
                    let slot = map.entry(key.clone()).or_insert(Value::Null);
                    strategic(slot, value, key, shape);
                }
            }
            for (key, order) in over {
                if let (Some(list), Some(order)) = (key.strip_prefix("$setElementOrder/"), order.as_array())
                    && let Some(items) = map.get_mut(list).and_then(Value::as_array_mut)
                {
                    sort_as(items, order, &merge_key(shape, list, order.first()));
                }
            }
        }
        Value::Array(over) => {
            let merge_by = merge_key(shape, field, over.iter().find(|o| o.is_object()));
            let set = shape.is_set(field);
            if (merge_by.is_empty() && !set)
                || !base.is_array()
                || over.iter().any(|o| o.get("$patch") == Some(&json!("replace")))
            {
                let plain = over.iter().filter(|o| o.get("$patch").is_none());
                *base = Value::Array(
                    plain
                        .map(|item| {
                            let mut clean = Value::Null;
                            strategic(&mut clean, item, "", shape);
                            clean
                        })
                        .collect(),
                );
                return;
            }
            let Some(items) = base.as_array_mut() else { return };
            for item in over {
                if set {
                    if !items.contains(item) {
                        items.push(item.clone());
                    }
                    continue;
                }
                let at = items.iter().position(|i| same_item(&merge_by, i, item));
                if item.get("$patch").and_then(Value::as_str) == Some("delete") {
                    if let Some(at) = at {
                        items.remove(at);
                    }
                    continue;
                }
                match at {
                    Some(at) => strategic(&mut items[at], item, "", shape),
                    None => {
                        let mut clean = Value::Null;
                        strategic(&mut clean, item, "", shape);
                        items.push(clean);
                    }
                }
            }
        }
        plain => *base = plain.clone(),
    }
}

fn sort_as(items: &mut [Value], order: &[Value], keys: &[&str]) {
    let rank = |item: &Value| {
        order.iter().position(|o| if keys.is_empty() { o == item } else { same_item(keys, o, item) }).unwrap_or(usize::MAX)
    };
    items.sort_by_key(rank);
}

/// A field's path, in the spelling of `FieldsV1`.
type Path = Vec<String>;

fn fields(value: &Value, field: &str, shape: Shape<'_>, at: &mut Path, out: &mut BTreeSet<Path>) {
    match value {
        Value::Object(map) if !map.is_empty() && !shape.is_atomic(field) => {
            for (key, inner) in map {
                at.push(format!("f:{key}"));
                fields(inner, key, shape.child(key), at, out);
                at.pop();
            }
        }
        Value::Array(items) if !shape.keys(field, items.first()).is_empty() => {
            let by = shape.keys(field, items.first());
            for item in items {
                let key: Map<String, Value> = by.iter().filter_map(|k| Some(((*k).to_owned(), key_of(item, k)?))).collect();
                at.push(format!("k:{}", Value::Object(key)));
                out.insert(at.clone());
                fields(item, "", shape.item(), at, out);
                at.pop();
            }
        }
        Value::Array(items) if shape.is_set(field) => {
            for item in items {
                at.push(format!("v:{item}"));
                out.insert(at.clone());
                at.pop();
            }
        }
        _ => {
            out.insert(at.clone());
        }
    }
}

fn set_of(object: &Value, shape: Shape<'_>) -> BTreeSet<Path> {
    let mut plain = object.clone();
    if let Some(map) = plain.as_object_mut() {
        map.remove("apiVersion");
        map.remove("kind");
        if let Some(meta) = map.get_mut("metadata").and_then(Value::as_object_mut) {
            for own in [
                "name",
                "namespace",
                "uid",
                "resourceVersion",
                "creationTimestamp",
                "generation",
                "managedFields",
                "deletionTimestamp",
                "deletionGracePeriodSeconds",
                "selfLink",
                "generateName",
            ] {
                meta.remove(own);
            }
            if meta.is_empty() {
                map.remove("metadata");
            }
        }
    }
    let mut out = BTreeSet::new();
    if plain.as_object().is_some_and(|m| !m.is_empty()) {
        fields(&plain, "", shape, &mut Vec::new(), &mut out);
    }
    out
}

fn to_v1(paths: &BTreeSet<Path>) -> Value {
    let mut root = Value::Object(Map::new());
    for path in paths {
        let mut at = &mut root;
        for (i, step) in path.iter().enumerate() {
            let Some(map) = at.as_object_mut() else { break };
            let slot = map.entry(step.clone()).or_insert_with(|| json!({}));
            if i + 1 == path.len() && step.starts_with("k:") {
                slot["."] = json!({});
            }
            at = slot;
        }
    }
    root
}

fn from_v1(value: &Value, at: &mut Path, out: &mut BTreeSet<Path>) {
    let Some(map) = value.as_object() else { return };
    if map.is_empty() && !at.is_empty() {
        out.insert(at.clone());
    }
    for (key, inner) in map {
        if key == "." {
            out.insert(at.clone());
            continue;
        }
        at.push(key.clone());
        from_v1(inner, at, out);
        at.pop();
    }
}

fn get<'a>(object: &'a Value, path: &[String]) -> Option<&'a Value> {
    let mut at = object;
    for step in path {
        at = if let Some(key) = step.strip_prefix("f:") {
            at.get(key)?
        } else if let Some(key) = step.strip_prefix("k:") {
            let key: Value = serde_json::from_str(key).ok()?;
            at.as_array()?.iter().find(|i| matches_key(i, &key))?
        } else {
            let want: Value = serde_json::from_str(step.strip_prefix("v:")?).ok()?;
            at.as_array()?.iter().find(|i| **i == want)?
        };
    }
    Some(at)
}

fn matches_key(item: &Value, key: &Value) -> bool {
    key.as_object().is_some_and(|k| k.iter().all(|(name, value)| key_of(item, name).as_ref() == Some(value)))
}

fn remove(object: &mut Value, path: &[String]) {
    let Some((step, rest)) = path.split_first() else { return };
    if let Some(key) = step.strip_prefix("f:") {
        let Some(map) = object.as_object_mut() else { return };
        if rest.is_empty() {
            map.remove(key);
        } else if let Some(inner) = map.get_mut(key) {
            remove(inner, rest);
            if inner.as_object().is_some_and(Map::is_empty) || inner.as_array().is_some_and(Vec::is_empty) {
                map.remove(key);
            }
        }
    } else if let Some(key) = step.strip_prefix("k:") {
        let Ok(key) = serde_json::from_str::<Value>(key) else { return };
        let Some(items) = object.as_array_mut() else { return };
        if let Some(at) = items.iter().position(|i| matches_key(i, &key)) {
            if rest.is_empty() {
                items.remove(at);
            } else {
                remove(&mut items[at], rest);
            }
        }
    } else if let Some(items) = object.as_array_mut()
        && let Some(want) = step.strip_prefix("v:").and_then(|v| serde_json::from_str::<Value>(v).ok())
    {
        items.retain(|i| *i != want);
    }
}

fn dotted(path: &[String]) -> String {
    path.iter()
        .map(|s| match s.strip_prefix("f:") {
            Some(key) => format!(".{key}"),
            None => format!("[{}]", s.get(2..).unwrap_or_default().trim_matches(['{', '}']).replace("\":", "=").replace('"', "")),
        })
        .collect()
}

/// Server-side apply of `config` on `current` (`None`: it does not exist yet).
pub fn server_side(
    current: Option<&Value>,
    config: &Value,
    manager: &str,
    force: bool,
    api_version: &str,
    shape: Shape<'_>,
) -> Result<Value, Status> {
    let mut config = config.clone();
    if let Some(meta) = config.get_mut("metadata").and_then(Value::as_object_mut)
        && meta.remove("managedFields").is_some_and(|m| m.as_array().is_some_and(|a| !a.is_empty()))
    {
        return Err(Status::bad_request("metadata.managedFields must be nil"));
    }
    let wanted = set_of(&config, shape);
    let mut new = current.cloned().unwrap_or_else(|| json!({"metadata": config["metadata"].clone()}));
    let entries: Vec<Value> = new["metadata"]["managedFields"].as_array().cloned().unwrap_or_default();
    let mine = |e: &Value| {
        e["manager"] == json!(manager) && e["operation"] == "Apply" && e["subresource"].as_str().unwrap_or_default().is_empty()
    };
    let set = |e: &Value| {
        let mut out = BTreeSet::new();
        from_v1(&e["fieldsV1"], &mut Vec::new(), &mut out);
        out
    };
    let mut conflicts = Vec::new();
    let mut others = Vec::new();
    for entry in entries.iter().filter(|e| !mine(e)) {
        let owned = set(entry);
        for path in owned.intersection(&wanted) {
            let differs = path.last().is_some_and(|s| s.starts_with("f:")) && get(&new, path) != get(&config, path);
            if differs && !force {
                conflicts.push(json!({"reason": "FieldManagerConflict", "message": format!("conflict with {:?}", entry["manager"].as_str().unwrap_or_default()), "field": dotted(path)}));
            }
        }
        let left: BTreeSet<Path> = if force {
            owned.iter().filter(|p| !(wanted.contains(*p) && get(&new, p) != get(&config, p))).cloned().collect()
        } else {
            owned
        };
        let mut entry = entry.clone();
        entry["fieldsV1"] = to_v1(&left);
        if !left.is_empty() {
            others.push((entry, left));
        }
    }
    if !conflicts.is_empty() {
        let fields: Vec<&str> = conflicts.iter().filter_map(|c| c["field"].as_str()).collect();
        let mut status =
            Status::new(409, "Conflict", format!("Apply failed with {} conflict(s): {}", conflicts.len(), fields.join(", ")));
        status.details = json!({"causes": conflicts});
        return Err(status);
    }
    let before: BTreeSet<Path> = entries.iter().filter(|e| mine(e)).flat_map(&set).collect();
    let mut gone: Vec<&Path> = before.difference(&wanted).filter(|p| !others.iter().any(|(_, o)| o.contains(*p))).collect();
    gone.sort_by_key(|p| std::cmp::Reverse(p.len()));
    for path in gone {
        remove(&mut new, path);
    }
    overlay(&mut new, &config, "", shape);
    let entry = json!({"manager": manager, "operation": "Apply", "apiVersion": api_version, "time": now(), "fieldsType": "FieldsV1", "fieldsV1": to_v1(&wanted)});
    let unchanged = entries.iter().find(|e| mine(e)).filter(|e| e["fieldsV1"] == entry["fieldsV1"]).cloned();
    let mut all: Vec<Value> = others.into_iter().map(|(e, _)| e).collect();
    all.push(unchanged.unwrap_or(entry));
    new["metadata"]["managedFields"] = Value::Array(all);
    Ok(new)
}

/// Puts a configuration over an object, lists by key.
fn overlay(base: &mut Value, over: &Value, field: &str, shape: Shape<'_>) {
    match (&mut *base, over) {
        (Value::Object(map), Value::Object(over)) if !shape.is_atomic(field) => {
            for (key, value) in over {
                overlay(map.entry(key.clone()).or_insert(Value::Null), value, key, shape.child(key));
            }
        }
        (Value::Array(items), Value::Array(over)) if shape.is_set(field) => {
            for item in over {
                if !items.contains(item) {
                    items.push(item.clone());
                }
            }
        }
        (Value::Array(items), Value::Array(over)) if !shape.keys(field, over.first()).is_empty() => {
            let by = shape.keys(field, over.first());
            for item in over {
                match items.iter_mut().find(|i| same_item(&by, i, item)) {
                    Some(slot) => overlay(slot, item, "", shape.item()),
                    None => items.push(item.clone()),
                }
            }
        }
        (base, over) => *base = over.clone(),
    }
}

/// Writes down that a manager set, by a plain write, what differs from before.
pub fn track(
    new: &mut Value,
    old: Option<&Value>,
    manager: &str,
    operation: &str,
    api_version: &str,
    subresource: &str,
    shape: Shape<'_>,
) {
    let mut entries: Vec<Value> = new["metadata"]["managedFields"].as_array().cloned().unwrap_or_default();
    let before_entries = old.and_then(|o| o["metadata"]["managedFields"].as_array().cloned()).unwrap_or_default();
    if entries != before_entries && old.is_some() || entries.iter().any(|e| e["operation"] == "Apply") && old.is_none() {
        // Server-side apply has written the book itself.
        return;
    }
    let all = set_of(new, shape);
    let changed: BTreeSet<Path> = match old {
        None => all.clone(),
        Some(old) => all.iter().filter(|p| get(old, p) != get(new, p)).cloned().collect(),
    };
    let mine = |e: &Value| {
        e["manager"] == json!(manager)
            && e["operation"] == json!(operation)
            && e["subresource"].as_str().unwrap_or_default() == subresource
    };
    let mut owned = changed.clone();
    for entry in &mut entries {
        let mut set = BTreeSet::new();
        from_v1(&entry["fieldsV1"], &mut Vec::new(), &mut set);
        let is_mine = mine(entry);
        // What is gone belongs to nobody, and what changed to who changed it.
        set.retain(|p| get(new, p).is_some() && (is_mine || !changed.contains(p)));
        if is_mine {
            owned.extend(set.iter().cloned());
        }
        entry["fieldsV1"] = to_v1(&set);
    }
    entries.retain(|e| !mine(e) && e["fieldsV1"].as_object().is_some_and(|m| !m.is_empty()));
    if !owned.is_empty() {
        let mut entry = json!({"manager": manager, "operation": operation, "apiVersion": api_version, "time": now(), "fieldsType": "FieldsV1", "fieldsV1": to_v1(&owned)});
        if !subresource.is_empty() {
            entry["subresource"] = json!(subresource);
        }
        entries.push(entry);
    }
    if !entries.is_empty() {
        new["metadata"]["managedFields"] = Value::Array(entries);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: Shape<'static> = Shape::BuiltIn("ConfigMap");

    #[test]
    fn strategic_merge_knows_lists_by_key_and_the_directives() {
        let base = json!({"spec": {"containers": [{"name": "a", "image": "1", "env": [{"name": "X", "value": "1"}]}, {"name": "b"}], "tolerations": [1], "x": {"p": 1, "q": 2}}, "metadata": {"finalizers": ["f", "g"]}});
        let patch = json!({"spec": {
            "$setElementOrder/containers": [{"name": "c"}, {"name": "a"}],
            "containers": [{"name": "a", "image": "2", "env": [{"name": "Y", "value": "2"}]}, {"name": "b", "$patch": "delete"}, {"name": "c"}],
            "tolerations": [2], "x": {"$retainKeys": ["q"], "q": 3}},
            "metadata": {"$deleteFromPrimitiveList/finalizers": ["f"], "finalizers": ["h"]}});
        let new = apply(PatchKind::Strategic, &base, &patch).unwrap();
        assert_eq!(
            new["spec"],
            json!({"containers": [{"name": "c"}, {"name": "a", "image": "2", "env": [{"name": "X", "value": "1"}, {"name": "Y", "value": "2"}]}], "tolerations": [2], "x": {"q": 3}})
        );
        assert_eq!(new["metadata"]["finalizers"], json!(["g", "h"]));
    }

    #[test]
    fn server_side_apply_removes_what_is_no_longer_applied_and_guards_what_others_own() {
        let first = server_side(
            None,
            &json!({"metadata": {"name": "x", "labels": {"a": "1", "b": "2"}}, "data": {"k": "v"}}),
            "one",
            false,
            "v1",
            MAP,
        )
        .unwrap();
        let second = server_side(
            Some(&first),
            &json!({"metadata": {"name": "x", "labels": {"a": "1"}}, "data": {"k": "v"}}),
            "one",
            false,
            "v1",
            MAP,
        )
        .unwrap();
        assert_eq!(second["metadata"]["labels"], json!({"a": "1"}));
        let conflict =
            server_side(Some(&second), &json!({"metadata": {"name": "x"}, "data": {"k": "w"}}), "two", false, "v1", MAP)
                .unwrap_err();
        assert_eq!(conflict.code, 409);
        let forced =
            server_side(Some(&second), &json!({"metadata": {"name": "x"}, "data": {"k": "w"}}), "two", true, "v1", MAP).unwrap();
        assert_eq!(forced["data"]["k"], "w");
        let again =
            server_side(Some(&forced), &json!({"metadata": {"name": "x"}, "data": {"k": "w"}}), "two", false, "v1", MAP).unwrap();
        assert_eq!(again["metadata"]["managedFields"], forced["metadata"]["managedFields"]);
    }

    #[test]
    fn plain_writes_own_what_they_changed() {
        let mut object = json!({"metadata": {"name": "x"}, "spec": {"a": 1, "b": 2}});
        track(&mut object, None, "one", "Update", "v1", "", MAP);
        let old = object.clone();
        object["spec"]["b"] = json!(3);
        track(&mut object, Some(&old), "two", "Update", "v1", "", MAP);
        let book = object["metadata"]["managedFields"].as_array().unwrap();
        assert_eq!(book[0]["fieldsV1"], json!({"f:spec": {"f:a": {}}}));
        assert_eq!(book[1]["fieldsV1"], json!({"f:spec": {"f:b": {}}}));
    }

    fn applied(first: &Value, second: &Value, shape: Shape<'_>) -> Value {
        let made = server_side(None, first, "one", false, "v1", shape).unwrap();
        server_side(Some(&made), second, "one", false, "v1", shape).unwrap()
    }

    #[test]
    fn ports_of_both_protocols_are_two_items() {
        let ports = |target: u16| json!({"spec": {"ports": [{"port": 53, "protocol": "UDP", "targetPort": target}, {"port": 53, "targetPort": target}]}});
        let new = applied(&ports(53), &ports(1053), Shape::BuiltIn("Service"));
        assert_eq!(new["spec"]["ports"], ports(1053)["spec"]["ports"]);
    }

    #[test]
    fn a_custom_resource_merges_as_its_schema_says_and_not_by_the_names_of_fields() {
        let list = |values: [&str; 2]| json!({"spec": {"addresses": values.map(|v| json!({"type": "IP", "value": v}))}});
        let schema =
            json!({"properties": {"spec": {"properties": {"addresses": {"type": "array", "items": {"type": "object"}}}}}});
        let new = applied(&list(["1", "2"]), &list(["3", "4"]), Shape::Custom(Some(&schema), true));
        assert_eq!(new["spec"], list(["3", "4"])["spec"]);
        let keyed = json!({"properties": {"spec": {"properties": {"addresses": {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["value"]}}}}});
        let shape = Shape::Custom(Some(&keyed), true);
        let made = server_side(None, &list(["1", "2"]), "one", false, "v1", shape).unwrap();
        let both = server_side(Some(&made), &list(["2", "3"]), "two", false, "v1", shape).unwrap();
        let values: Vec<&str> =
            both["spec"]["addresses"].as_array().unwrap().iter().filter_map(|a| a["value"].as_str()).collect();
        assert_eq!(values, ["1", "2", "3"]);
        // Plain values under a name that elsewhere is a keyed list.
        let plain = |v: &str| json!({"spec": {"addresses": [v, "x"]}});
        assert_eq!(applied(&plain("a"), &plain("b"), Shape::BuiltIn("Node"))["spec"], plain("b")["spec"]);
    }

    #[test]
    fn a_strategic_patch_can_delete_a_map() {
        let base =
            json!({"kind": "Deployment", "spec": {"strategy": {"rollingUpdate": {"maxSurge": 1}, "type": "RollingUpdate"}}});
        let patch = json!({"spec": {"strategy": {"rollingUpdate": {"$patch": "delete"}, "type": "Recreate"}}});
        assert_eq!(apply(PatchKind::Strategic, &base, &patch).unwrap()["spec"], json!({"strategy": {"type": "Recreate"}}));
    }
}
