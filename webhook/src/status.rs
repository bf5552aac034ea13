//! The annotation that says what was added to a pod: by it a second injection knows the first, and `weft uninject` takes out
//! exactly that. It does not exempt a pod from anything: without the sidecar itself it counts for nothing.

use crate::options::Refusal;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use weft_api::annotations as keys;

/// What was added and changed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Status {
    /// Version of Weft.
    pub version: String,
    /// Names of init containers that were added.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub init_containers: Vec<String>,
    /// Names of containers that were added.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub containers: Vec<String>,
    /// Names of volumes that were added.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<String>,
    /// Names of image pull secrets that were added.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub image_pull_secrets: Vec<String>,
    /// Annotations that were set, with what they were before.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, Option<String>>,
    /// Labels that were added.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<String>,
    /// Probes and hooks as they were, by `<container>/<field>`.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub probes: Map<String, Value>,
    /// Maps and arrays that were not there, innermost last.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub created: Vec<String>,
}

/// A container of the user's that was merged over ours, and where it stood.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Override {
    /// The array, as a JSON pointer into the pod.
    pub list: String,
    /// Its index in it.
    pub index: usize,
    /// The container.
    pub container: Value,
}

impl Status {
    /// The status of a pod that carries one.
    ///
    /// # Errors
    /// The annotation is there and can't be read.
    pub(crate) fn of(pod: &Value) -> Result<Option<Self>, Refusal> {
        let Some(text) = annotation(pod, keys::STATUS) else { return Ok(None) };
        serde_json::from_str(text).map(Some).map_err(|e| {
            Refusal::InTheWay(format!(
                "annotation {} on the pod is not readable ({e}): only Weft writes it, remove it",
                keys::STATUS
            ))
        })
    }

    /// As the annotation's value.
    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

/// The annotation of a pod.
pub(crate) fn annotation<'a>(pod: &'a Value, key: &str) -> Option<&'a str> {
    pod.pointer("/metadata/annotations")?.get(key)?.as_str().filter(|s| !s.is_empty())
}
