//! Label selectors (both spellings) and field selectors.

use serde_json::Value;

use super::status::Status;

/// One requirement of a label selector.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Requirement {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    Absent(String),
    Greater(String, i64),
    Less(String, i64),
}

/// A parsed label selector; the default selects everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Labels(Vec<Requirement>);

impl Labels {
    /// Parses `a=b,c!=d,e in (f,g),h,!i`.
    pub fn parse(text: &str) -> Result<Self, Status> {
        let bad = |why: &str| Status::bad_request(format!("unable to parse requirement: {why} in label selector {text:?}"));
        let mut out = Vec::new();
        for part in split_outside_parentheses(text) {
            let part = part.trim();
            if part.is_empty() {
                continue;
            }
            let requirement = if let Some(key) = part.strip_prefix('!') {
                Requirement::Absent(key.trim().to_owned())
            } else if let Some((head, tail)) = part.split_once('(') {
                let list = tail.trim_end().strip_suffix(')').ok_or_else(|| bad("missing ')'"))?;
                let values = list.split(',').map(|v| v.trim().to_owned()).collect();
                let mut words = head.split_whitespace();
                match (words.next(), words.next(), words.next()) {
                    (Some(key), Some("in"), None) => Requirement::In(key.to_owned(), values),
                    (Some(key), Some("notin"), None) => Requirement::NotIn(key.to_owned(), values),
                    _ => return Err(bad("expected 'in' or 'notin'")),
                }
            } else if let Some((key, value)) = part.split_once("!=") {
                Requirement::NotIn(key.trim().to_owned(), vec![value.trim().to_owned()])
            } else if let Some((key, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
                Requirement::In(key.trim().to_owned(), vec![value.trim().to_owned()])
            } else if let Some((key, value)) = part.split_once('>') {
                Requirement::Greater(key.trim().to_owned(), value.trim().parse().map_err(|_| bad("not a number"))?)
            } else if let Some((key, value)) = part.split_once('<') {
                Requirement::Less(key.trim().to_owned(), value.trim().parse().map_err(|_| bad("not a number"))?)
            } else if part.contains(char::is_whitespace) {
                return Err(bad("unexpected blank"));
            } else {
                Requirement::Exists(part.to_owned())
            };
            out.push(requirement);
        }
        Ok(Self(out))
    }

    /// Reads a `LabelSelector` object. An empty or missing one selects everything.
    pub fn from_object(selector: Option<&Value>) -> Result<Self, String> {
        let mut out = Vec::new();
        let Some(selector) = selector else { return Ok(Self(out)) };
        for (key, value) in selector.get("matchLabels").and_then(Value::as_object).into_iter().flatten() {
            out.push(Requirement::In(key.clone(), vec![value.as_str().unwrap_or_default().to_owned()]));
        }
        for expression in selector.get("matchExpressions").and_then(Value::as_array).into_iter().flatten() {
            let key = expression.get("key").and_then(Value::as_str).ok_or("matchExpressions[].key is missing")?.to_owned();
            let values: Vec<String> = expression
                .get("values")
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
                .filter_map(|v| v.as_str().map(str::to_owned))
                .collect();
            out.push(match expression.get("operator").and_then(Value::as_str) {
                Some("In") => Requirement::In(key, values),
                Some("NotIn") => Requirement::NotIn(key, values),
                Some("Exists") => Requirement::Exists(key),
                Some("DoesNotExist") => Requirement::Absent(key),
                other => return Err(format!("matchExpressions[].operator {other:?} is not a valid label selector operator")),
            });
        }
        Ok(Self(out))
    }

    /// Whether an object's labels match.
    pub fn matches(&self, object: &Value) -> bool {
        let labels = object.pointer("/metadata/labels");
        let get = |key: &str| labels.and_then(|l| l.get(key)).and_then(Value::as_str);
        self.0.iter().all(|requirement| match requirement {
            Requirement::In(key, values) => get(key).is_some_and(|v| values.iter().any(|x| x == v)),
            Requirement::NotIn(key, values) => get(key).is_none_or(|v| values.iter().all(|x| x != v)),
            Requirement::Exists(key) => get(key).is_some(),
            Requirement::Absent(key) => get(key).is_none(),
            Requirement::Greater(key, n) => get(key).and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v > *n),
            Requirement::Less(key, n) => get(key).and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v < *n),
        })
    }
}

fn split_outside_parentheses(text: &str) -> Vec<&str> {
    let (mut depth, mut start, mut out) = (0_u32, 0, Vec::new());
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                out.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    out.push(&text[start..]);
    out
}

/// A parsed field selector: `metadata.name=x,status.phase!=Running`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fields(Vec<(String, bool, String)>);

/// Which fields the API server can select by, beside `metadata.name` and `metadata.namespace`.
fn selectable(kind: &str, field: &str) -> bool {
    match kind {
        "Pod" => matches!(
            field,
            "spec.nodeName"
                | "spec.restartPolicy"
                | "spec.schedulerName"
                | "spec.serviceAccountName"
                | "spec.hostNetwork"
                | "status.phase"
                | "status.podIP"
                | "status.nominatedNodeName"
        ),
        "Event" => field.starts_with("involvedObject.") || matches!(field, "reason" | "reportingComponent" | "source" | "type"),
        "Secret" => field == "type",
        "Namespace" => field == "status.phase",
        "Node" => field == "spec.unschedulable",
        "Service" => matches!(field, "spec.clusterIP" | "spec.type"),
        "ReplicaSet" | "ReplicationController" => field == "status.replicas",
        "Job" => field == "status.successful",
        _ => false,
    }
}

impl Fields {
    /// Parses a field selector for a kind; an unknown field is a 400, as in Kubernetes.
    pub fn parse(text: &str, kind: &str) -> Result<Self, Status> {
        let mut out = Vec::new();
        for part in text.split(',').filter(|p| !p.trim().is_empty()) {
            let (field, equal, value) = if let Some((f, v)) = part.split_once("!=") {
                (f, false, v)
            } else if let Some((f, v)) = part.split_once("==").or_else(|| part.split_once('=')) {
                (f, true, v)
            } else {
                return Err(Status::bad_request(format!("invalid field selector {part:?}: expected field=value")));
            };
            let field = field.trim();
            if field != "metadata.name" && field != "metadata.namespace" && !selectable(kind, field) {
                return Err(Status::bad_request(format!("field label not supported: {field}")));
            }
            out.push((field.to_owned(), equal, value.trim().to_owned()));
        }
        Ok(Self(out))
    }

    /// Whether an object matches. A missing field is the empty string.
    pub fn matches(&self, object: &Value) -> bool {
        self.0.iter().all(|(field, equal, want)| {
            let value = field.split('.').try_fold(object, |v, part| v.get(part));
            let text = match value {
                Some(Value::String(s)) => s.clone(),
                Some(Value::Null) | None => default_text(field).to_owned(),
                Some(other) => other.to_string(),
            };
            (text == *want) == *equal
        })
    }

    /// The name, when the selector pins it.
    pub fn name(&self) -> Option<&str> {
        self.0.iter().find(|(f, equal, _)| f == "metadata.name" && *equal).map(|(_, _, v)| v.as_str())
    }
}

fn default_text(field: &str) -> &'static str {
    match field {
        "spec.hostNetwork" | "spec.unschedulable" => "false",
        "status.replicas" | "status.successful" => "0",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn label_selectors_select_what_kubernetes_selects() {
        let pod = json!({"metadata": {"labels": {"app": "go-app", "rank": "7"}}});
        for (text, want) in [
            ("", true),
            ("app=go-app", true),
            ("app==go-app,rank>6", true),
            ("rank<7", false),
            ("app!=go-app", false),
            ("other!=x", true),
            ("app in (a, go-app)", true),
            ("app notin (a,b),rank", true),
            ("other notin (a,b)", true),
            ("!app", false),
            ("!other", true),
            ("other", false),
        ] {
            assert_eq!(Labels::parse(text).expect(text).matches(&pod), want, "{text}");
        }
        assert!(Labels::parse("app in (a").is_err());
        assert!(Labels::parse("app near (a)").is_err());
        assert!(Labels::parse("two words").is_err());
    }

    #[test]
    fn field_selectors_refuse_what_kubernetes_refuses() {
        let pod = json!({"metadata": {"name": "x"}, "spec": {"nodeName": "n"}, "status": {"phase": "Running"}});
        assert!(Fields::parse("spec.nodeName=n,status.phase!=Failed", "Pod").expect("parse").matches(&pod));
        assert!(!Fields::parse("metadata.name!=x", "Pod").expect("parse").matches(&pod));
        assert!(Fields::parse("spec.hostNetwork=false", "Pod").expect("parse").matches(&pod));
        assert_eq!(Fields::parse("spec.foo=n", "Pod").expect_err("refused").code, 400);
    }
}
