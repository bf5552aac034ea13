//! A verdict in words, the same at admission and offline.

use super::{Kind, Problem, Verdict};
use serde_json::Value;

/// How many mistakes are spelled out.
const MOST: usize = 20;

/// Why an object is refused: one mistake on one line, several as a list.
pub fn refusal(errors: &[Problem]) -> String {
    match errors {
        [] => String::new(),
        [one] => one.to_string(),
        many => {
            let least = if many.len() >= super::walk::MOST_ERRORS { "at least " } else { "" };
            let mut text = format!("{least}{} mistakes:", many.len());
            for error in many.iter().take(MOST) {
                text.push_str(&format!("\n- {error}"));
            }
            if many.len() > MOST {
                text.push_str(&format!("\n- and {} more", many.len() - MOST));
            }
            text
        }
    }
}

/// `Kind namespace/name`, for a title; what is missing is left out.
pub fn title(kind: Kind, object: &Value) -> String {
    let text = |field: &str| object.pointer(&format!("/metadata/{field}")).and_then(Value::as_str).unwrap_or_default();
    let name = if text("name").is_empty() { text("generateName") } else { text("name") };
    match (text("namespace"), name) {
        (_, "") => kind.as_str().to_owned(),
        ("", name) => format!("{} {name}", kind.as_str()),
        (namespace, name) => format!("{} {namespace}/{name}", kind.as_str()),
    }
}

/// How a verdict ended, for metrics and logs.
pub fn result(verdict: &Verdict) -> &'static str {
    match (verdict.is_valid(), verdict.warnings.is_empty()) {
        (false, _) => "refuse",
        (true, false) => "warn",
        (true, true) => "accept",
    }
}
