//! The custom resources that people of Istio's already write, as plain types: an [`Object`] of a [`Spec`], read from JSON
//! by [`Object::from_value`], the one door.
//!
//! What is read is what Istio 1.32 accepts: a `null` is an absent field, enum values are their names, and fields that
//! nobody knows are kept (`unknown` of each type), so that whoever enforces a policy can refuse what he does not fully
//! understand instead of enforcing half of it ([`Spec::unknown_fields`]). Reading never judges: whether a policy makes sense
//! is for the validation at admission, which names every mistake and not only the first.

use std::{collections::BTreeMap, fmt, time::Duration};

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

pub mod security;

/// Members of an object that the type does not know, by name.
pub type Unknown = BTreeMap<String, Value>;

/// Annotation by which an `AuthorizationPolicy` is evaluated and reported, but not enforced.
pub const DRY_RUN_ANNOTATION: &str = "istio.io/dry-run";

/// The kind of thing that an [`Object`] holds.
pub trait Spec: DeserializeOwned + Default {
    /// API group, such as `security.istio.io`.
    const GROUP: &'static str;
    /// Versions that are served, the stored one first.
    const VERSIONS: &'static [&'static str];
    /// Kind, such as `PeerAuthentication`.
    const KIND: &'static str;
    /// Plural as in URLs and names of CRDs.
    const PLURAL: &'static str;

    /// Paths (from `spec`) of all fields that the types do not know, in order of appearance.
    fn unknown_fields(&self) -> Vec<String>;
}

/// One object as Kubernetes holds it. An absent `spec` is the default one, as in Istio.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default, bound(deserialize = "S: Spec"))]
pub struct Object<S> {
    /// Group and version, such as `security.istio.io/v1`.
    pub api_version: String,
    /// Kind, the same as [`Spec::KIND`].
    pub kind: String,
    /// Name, namespace and the rest.
    pub metadata: Metadata,
    /// What the user wants.
    pub spec: S,
    /// What was reported about it.
    pub status: Option<Value>,
}

/// The part of an object's metadata that the mesh looks at.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Metadata {
    /// Name, unique among the objects of its kind in its namespace.
    pub name: String,
    /// Namespace; empty where a file leaves it out.
    pub namespace: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// RFC 3339 in UTC with whole seconds, so that comparing strings compares times; `None` before the object is created.
    pub creation_timestamp: Option<String>,
    /// Counts the changes of the spec.
    pub generation: Option<i64>,
    /// Kubernetes' own identity of the object.
    pub uid: Option<String>,
}

/// Why an object can't be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParseError {
    /// Path of the field, such as `spec.rules[0].to[0].operation.methods`; empty for the object itself.
    pub path: String,
    /// What is wrong with it.
    pub message: String,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() { f.write_str(&self.message) } else { write!(f, "{}: {}", self.path, self.message) }
    }
}

impl std::error::Error for ParseError {}

impl<S: Spec> Object<S> {
    /// Reads an object. Its kind and group must be those of `S`, in any version that is served; a missing `apiVersion`
    /// or `kind` is taken as right, because lists leave them out.
    pub fn from_value(mut value: Value) -> Result<Self, ParseError> {
        if !value.is_object() {
            return Err(ParseError { path: String::new(), message: "not an object".into() });
        }
        drop_nulls(&mut value);
        let object: Self = serde_path_to_error::deserialize(value).map_err(|e| {
            let path = e.path().to_string();
            ParseError { path: if path == "." { String::new() } else { path }, message: e.into_inner().to_string() }
        })?;
        if !object.kind.is_empty() && object.kind != S::KIND {
            let message = format!("expected {}, found {:?}", S::KIND, object.kind);
            return Err(ParseError { path: "kind".into(), message });
        }
        let served = |v: &str| v.split_once('/').is_some_and(|(g, v)| g == S::GROUP && S::VERSIONS.contains(&v));
        if !object.api_version.is_empty() && !served(&object.api_version) {
            let message =
                format!("expected {} in version {}, found {:?}", S::GROUP, S::VERSIONS.join(" or "), object.api_version);
            return Err(ParseError { path: "apiVersion".into(), message });
        }
        Ok(object)
    }

    /// `namespace/name`, as people write it.
    pub fn key(&self) -> String {
        format!("{}/{}", self.metadata.namespace, self.metadata.name)
    }

    /// The order in which Istio lets objects of one scope win: the older first, then by name and namespace.
    pub fn age_order(&self) -> (bool, &str, &str, &str) {
        let made = self.metadata.creation_timestamp.as_deref();
        (made.is_none(), made.unwrap_or_default(), &self.metadata.name, &self.metadata.namespace)
    }
}

/// A `null` member is an absent one (proto3's JSON). A `null` among the elements of a list stays and is an error.
fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(members) => {
            members.retain(|_, v| !v.is_null());
            members.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// Which pods an object is for.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WorkloadSelector {
    /// All of these must be among the pod's labels; with none, every pod of the namespace matches.
    pub match_labels: BTreeMap<String, String>,
    /// Members that nobody knows.
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl WorkloadSelector {
    /// Whether a pod with `labels` is selected.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.match_labels.iter().all(|(k, v)| labels.get(k) == Some(v))
    }
}

/// What an object is attached to instead of to pods; sidecars ignore objects that have one.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyTargetReference {
    /// API group; empty for the core group.
    pub group: String,
    /// Kind.
    pub kind: String,
    /// Name.
    pub name: String,
    /// Must be empty or the object's own namespace.
    pub namespace: String,
    /// Members that nobody knows.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// Collects paths of unknown members.
#[derive(Debug, Default)]
struct Paths(Vec<String>);

impl Paths {
    fn add(&mut self, at: &str, unknown: &Unknown) {
        self.0.extend(unknown.keys().map(|k| format!("{at}.{k}")));
    }
}

/// Reads a duration as Go writes them (`1.5s`, `2m30s`, `100ms`), which is what Istio reads in its JSON: a sum of decimal
/// numbers with the units `h`, `m`, `s`, `ms`, `us` (or `µs`), `ns`. `None` for anything else and for negative ones.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Some(Duration::ZERO);
    }
    if rest.is_empty() {
        return None;
    }
    let mut nanos: u128 = 0;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(end);
        let unit_end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        let unit: u128 = match unit {
            "h" => 3_600_000_000_000,
            "m" => 60_000_000_000,
            "s" => 1_000_000_000,
            "ms" => 1_000_000,
            "us" | "µs" | "μs" => 1_000,
            "ns" => 1,
            _ => return None,
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
            return None;
        }
        let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
        nanos = nanos.checked_add(whole.checked_mul(unit)?)?;
        let mut scale = unit;
        for digit in fraction.bytes() {
            scale /= 10;
            nanos = nanos.checked_add(u128::from(digit - b'0') * scale)?;
        }
        rest = tail;
    }
    // Go's durations end at 2^63 nanoseconds.
    (nanos <= i64::MAX as u128).then(|| Duration::from_nanos(nanos as u64))
}

#[cfg(test)]
mod tests;
