//! Renders the Helm chart in `manifests/chart`, which is built into the binary: one source of truth for `weft install` and
//! for Helm. The chart keeps to Go's templates with the functions below, all of which Helm has with the same meaning.

use anyhow::{Context as _, bail};
use gtmpl_ng::{Context, FuncError, Template, Value as GoValue};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashMap};
use weft_webhook::options::distance;

/// `values.yaml` as it stands in the chart: the defaults, and the schema of what may be set.
pub(crate) const VALUES: &str = include_str!("../../../manifests/chart/values.yaml");

/// The version of the chart and of what it installs.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

macro_rules! templates {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../../manifests/chart/templates/", $name)))),*]
    };
}

/// The templates in the order in which Helm installs their kinds, so that each object comes after what it needs.
pub(crate) const TEMPLATES: &[(&str, &str)] = templates![
    "namespace.yaml",
    "poddisruptionbudget.yaml",
    "serviceaccount.yaml",
    "configmap.yaml",
    "crd-authorizationpolicies.yaml",
    "crd-peerauthentications.yaml",
    "crd-requestauthentications.yaml",
    "clusterrole.yaml",
    "clusterrolebinding.yaml",
    "role.yaml",
    "rolebinding.yaml",
    "service.yaml",
    "deployment.yaml",
    "webhook.yaml",
    "validator.yaml",
];

/// Renders every template with these values for this namespace. Each result is one document, or empty where the values
/// switch it off.
///
/// # Errors
/// A template that the values break, by name.
pub(crate) fn render(values: &Value, namespace: &str) -> anyhow::Result<Vec<(&'static str, String)>> {
    let data = serde_json::json!({
        "Values": values,
        "Release": {"Name": "weft", "Namespace": namespace, "Service": "Helm"},
        "Chart": {"Name": "weft", "Version": VERSION, "AppVersion": VERSION},
    });
    let context = Context::from(to_go(&data));
    TEMPLATES
        .iter()
        .map(|(name, text)| {
            let mut template = Template::default();
            template.add_func("quote", quote);
            template.add_func("default", default);
            template.add_func("toJson", to_json);
            template.parse(*text).with_context(|| format!("chart template {name}"))?;
            let text = template.render(&context).with_context(|| format!("chart template {name}"))?;
            Ok((*name, text.trim_matches('\n').to_owned()))
        })
        .collect()
}

/// The chart's default values.
///
/// # Errors
/// Only if the chart itself is broken.
pub(crate) fn default_values() -> anyhow::Result<Value> {
    serde_saphyr::from_str(VALUES).context("the chart's values.yaml")
}

/// Merges what the user gave over the chart's values.
///
/// # Errors
/// A key that the chart doesn't have (maps that are empty and lists in `values.yaml` take anything), or a scalar where a
/// map belongs: the message names the key and where it came from.
pub(crate) fn merge(base: &mut Value, over: &Value, origin: &str) -> anyhow::Result<()> {
    merge_at(base, over, &mut Vec::new(), false, origin)
}

fn merge_at(base: &mut Value, over: &Value, path: &mut Vec<String>, free: bool, origin: &str) -> anyhow::Result<()> {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            // A map that is empty in the chart's own values is the user's to fill.
            let free = free || (base.is_empty() && !path.is_empty());
            for (key, value) in over {
                path.push(key.clone());
                match base.get_mut(key) {
                    Some(slot) => merge_at(slot, value, path, free, origin)?,
                    None if free || is_quantities(path) => {
                        base.insert(key.clone(), value.clone());
                    }
                    None => {
                        let full = path.join(".");
                        let hint = nearest(base, key).map(|k| format!(" (did you mean {k:?}?)")).unwrap_or_default();
                        bail!("{origin}: {full}: the chart has no such value{hint}; `weft install --print-values` lists all");
                    }
                }
                path.pop();
            }
        }
        (base, over) => {
            if !free && !over.is_null() && kind(base) != kind(over) && !matches!(base, Value::Null) && !both_scalar(base, over) {
                bail!("{origin}: {}: {} is expected here, not {over}", path.join("."), kind(base));
            }
            // As Helm does: null takes a default away.
            *base = if !free && matches!(base, Value::String(_)) && is_scalar(over) {
                Value::String(match over {
                    Value::String(s) => s.clone(),
                    Value::Null => String::new(),
                    other => other.to_string(),
                })
            } else {
                over.clone()
            };
        }
    }
    Ok(())
}

/// Requests and limits take any resource's name.
fn is_quantities(path: &[String]) -> bool {
    path.len() >= 2 && matches!(path[path.len() - 2].as_str(), "requests" | "limits")
        || path.last().is_some_and(|k| matches!(k.as_str(), "requests" | "limits")) && path.iter().any(|k| k == "resources")
}

fn nearest<'a>(map: &'a Map<String, Value>, key: &str) -> Option<&'a str> {
    map.keys()
        .map(String::as_str)
        .filter(|k| k.eq_ignore_ascii_case(key) || distance(k, key) <= 2)
        .min_by_key(|k| distance(k, key))
}

fn is_scalar(value: &Value) -> bool {
    !matches!(value, Value::Array(_) | Value::Object(_))
}

fn both_scalar(base: &Value, over: &Value) -> bool {
    is_scalar(over) && matches!(base, Value::String(_))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "a map",
    }
}

/// Parses one `--set` argument in Helm's syntax: `a.b=value`, a dot in a key as `\.`, lists as `{x,y}`, and
/// several assignments after commas (a comma in a value as `\,`).
///
/// # Errors
/// No `=`, an empty key, or an index (`a[0]`), which is better written in a file.
pub(crate) fn parse_set(text: &str, strings: bool) -> anyhow::Result<Value> {
    let mut all = Value::Object(Map::new());
    for assignment in split_unescaped(text, ',') {
        let Some((key, value)) = assignment.split_once('=') else {
            bail!("--set {text}: {assignment:?} is not key=value");
        };
        let value = if let Some(list) = value.strip_prefix('{').and_then(|v| v.strip_suffix('}')) {
            let items = if list.is_empty() { vec![] } else { split_unescaped(list, ',') };
            Value::Array(items.iter().map(|v| scalar(v, strings)).collect())
        } else {
            scalar(value, strings)
        };
        let keys = split_unescaped(key, '.');
        if keys.iter().any(String::is_empty) {
            bail!("--set {text}: {key:?} has an empty part");
        }
        if key.contains('[') {
            bail!("--set {text}: indexes are not supported; give the whole list as {{a,b}}, or write it in a file for --values");
        }
        insert(&mut all, &keys, value);
    }
    Ok(all)
}

fn insert(map: &mut Value, keys: &[String], value: Value) {
    let [first, rest @ ..] = keys else { return };
    if !map.is_object() {
        *map = Value::Object(Map::new());
    }
    if let Some(object) = map.as_object_mut() {
        if rest.is_empty() {
            object.insert(first.clone(), value);
        } else {
            insert(object.entry(first.clone()).or_insert(Value::Null), rest, value);
        }
    }
}

fn scalar(text: &str, strings: bool) -> Value {
    let text = text.replace("\\,", ",");
    if strings {
        return Value::String(text);
    }
    match text.as_str() {
        "true" => Value::Bool(true),
        "false" => Value::Bool(false),
        "null" => Value::Null,
        // As Helm: a leading zero is text (a file mode, a phone number), not a number.
        t if t == "0" || !t.starts_with('0') => t.parse::<i64>().map_or_else(|_| Value::String(text.clone()), Value::from),
        _ => Value::String(text),
    }
}

/// Splits at a separator that is neither escaped nor inside braces. Escapes stay for the next step (a comma's for [`scalar`]);
/// a dot's end here when keys are split at dots.
fn split_unescaped(text: &str, separator: char) -> Vec<String> {
    let mut parts = vec![String::new()];
    let (mut escaped, mut depth) = (false, 0_u32);
    for c in text.chars() {
        let last = parts.len() - 1;
        match c {
            '\\' if !escaped => escaped = true,
            '{' if !escaped => {
                depth += 1;
                parts[last].push(c);
            }
            '}' if !escaped => {
                depth = depth.saturating_sub(1);
                parts[last].push(c);
            }
            c if c == separator && !escaped && depth == 0 => parts.push(String::new()),
            c => {
                if escaped && !(c == '.' && separator == '.') {
                    parts[last].push('\\');
                }
                parts[last].push(c);
                escaped = false;
            }
        }
    }
    parts
}

fn to_go(value: &Value) -> GoValue {
    match value {
        Value::Null => GoValue::Nil,
        Value::Bool(b) => GoValue::Bool(*b),
        Value::Number(n) => match (n.as_i64(), n.as_f64()) {
            (Some(i), _) => GoValue::from(i),
            (None, f) => GoValue::from(f.unwrap_or_default()),
        },
        Value::String(s) => GoValue::String(s.clone()),
        Value::Array(a) => GoValue::Array(a.iter().map(to_go).collect()),
        Value::Object(o) => GoValue::Map(o.iter().map(|(k, v)| (k.clone(), to_go(v))).collect::<HashMap<_, _>>()),
    }
}

fn from_go(value: &GoValue) -> Result<serde_json::Value, FuncError> {
    Ok(match value {
        GoValue::NoValue | GoValue::Nil => Value::Null,
        GoValue::Bool(b) => Value::Bool(*b),
        GoValue::String(s) => Value::String(s.clone()),
        GoValue::Number(n) => match (n.as_i64(), n.as_f64()) {
            (Some(i), _) => Value::from(i),
            (None, f) => Value::from(f),
        },
        GoValue::Array(a) => Value::Array(a.iter().map(from_go).collect::<Result<_, _>>()?),
        GoValue::Map(m) | GoValue::Object(m) => {
            // Go writes maps in the order of their keys.
            let sorted: BTreeMap<&String, &GoValue> = m.iter().collect();
            let mut object = Map::new();
            for (k, v) in sorted {
                object.insert(k.clone(), from_go(v)?);
            }
            Value::Object(object)
        }
        GoValue::Function(_) => return Err(FuncError::UnableToConvertFromValue),
    })
}

/// Helm's `toJson`; like Go it escapes what HTML could misread.
fn to_json(args: &[GoValue]) -> Result<GoValue, FuncError> {
    let [value] = args else { return Err(FuncError::ExactlyXArgs("toJson".into(), 1)) };
    let text = from_go(value)?.to_string();
    Ok(GoValue::String(text.replace('<', "\\u003c").replace('>', "\\u003e").replace('&', "\\u0026")))
}

/// Helm's `quote`.
fn quote(args: &[GoValue]) -> Result<GoValue, FuncError> {
    let [value] = args else { return Err(FuncError::ExactlyXArgs("quote".into(), 1)) };
    let text = match value {
        GoValue::String(s) => s.clone(),
        GoValue::Nil | GoValue::NoValue => return Ok(GoValue::String(String::new())),
        other => other.to_string(),
    };
    Ok(GoValue::String(Value::String(text).to_string()))
}

/// Helm's `default`: the first argument unless the second is something.
fn default(args: &[GoValue]) -> Result<GoValue, FuncError> {
    let [fallback, value] = args else { return Err(FuncError::ExactlyXArgs("default".into(), 2)) };
    let empty = match value {
        GoValue::NoValue | GoValue::Nil => true,
        GoValue::Bool(b) => !b,
        GoValue::String(s) => s.is_empty(),
        GoValue::Array(a) => a.is_empty(),
        GoValue::Map(m) | GoValue::Object(m) => m.is_empty(),
        GoValue::Number(n) => n.as_i64() == Some(0),
        GoValue::Function(_) => false,
    };
    Ok(if empty { fallback.clone() } else { value.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn set_arguments_are_read_as_helm_reads_them() {
        for (text, want) in [
            ("a=1", json!({"a": 1})),
            ("a.b=true,c=x", json!({"a": {"b": true}, "c": "x"})),
            (r"a\.b=1", json!({"a.b": 1})),
            ("a={x,2}", json!({"a": ["x", 2]})),
            ("a={}", json!({"a": []})),
            (r"a=x\,y", json!({"a": "x,y"})),
            ("a=0644", json!({"a": "0644"})),
            ("a=null", json!({"a": null})),
            ("a=", json!({"a": ""})),
        ] {
            assert_eq!(parse_set(text, false).unwrap(), want, "{text}");
        }
        assert_eq!(parse_set("a=1", true).unwrap(), json!({"a": "1"}));
        for bad in ["a", ".a=1", "a[0]=1", "a..b=1"] {
            assert!(parse_set(bad, false).is_err(), "{bad}");
        }
    }

    #[test]
    fn unknown_and_misplaced_values_are_refused_by_name() {
        let mut values = default_values().unwrap();
        for (set, words) in [
            ("imgae.tag=x", "imgae"),
            ("image.tga=x", "image.tga: the chart has no such value (did you mean \"tag\"?)"),
            ("control=3", "control: a map is expected"),
            ("ha.x=1", "ha: true or false is expected"),
            ("webhook.timeoutSeconds=soon", "webhook.timeoutSeconds: a number is expected"),
        ] {
            let error = merge(&mut values, &parse_set(set, false).unwrap(), "--set").unwrap_err().to_string();
            assert!(error.contains(words), "{set}: {error}");
        }
    }

    #[test]
    fn free_maps_take_anything_and_strings_take_numbers() {
        let mut values = default_values().unwrap();
        for set in [
            r"control.nodeSelector.kubernetes\.io/os=linux",
            "image.tag=1.0",
            "image.tag=7",
            "injection.proxy.resources.limits.cpu=500m",
            "control.resources.requests.ephemeral-storage=1Gi",
            "injection.proxy.env.RUST_BACKTRACE=1",
        ] {
            merge(&mut values, &parse_set(set, false).unwrap(), "--set").unwrap();
        }
        assert_eq!(values["image"]["tag"], "7");
        assert_eq!(values["control"]["nodeSelector"]["kubernetes.io/os"], "linux");
        assert_eq!(values["injection"]["proxy"]["resources"]["limits"]["cpu"], "500m");
    }
}
