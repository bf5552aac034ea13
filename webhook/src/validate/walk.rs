//! Walking raw JSON with the path at hand. A path is a chain of borrowed steps, spelled out only when there is something to
//! say. `null` members count as absent, as in the typed reader.

use super::Problem;
use crate::options::distance;
use serde_json::{Map, Value};
use std::fmt;

/// How many errors are kept. An object may have as many as fit into 3 MiB, and each costs a search for what was meant.
pub(super) const MOST_ERRORS: usize = 100;
/// How many warnings are kept; Kubernetes passes on 4 KiB of them.
pub(super) const MOST_WARNINGS: usize = 40;

/// What was found so far.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) errors: Vec<Problem>,
    pub(super) warnings: Vec<Problem>,
}

impl Findings {
    pub(super) fn error(&mut self, at: &At<'_>, message: impl Into<String>) {
        if self.errors.len() < MOST_ERRORS {
            self.errors.push(Problem { path: at.to_string(), message: message.into() });
        }
    }

    pub(super) fn warn(&mut self, path: impl fmt::Display, message: impl Into<String>) {
        if self.warnings.len() >= MOST_WARNINGS {
            return;
        }
        let problem = Problem { path: path.to_string(), message: message.into() };
        if !self.warnings.contains(&problem) {
            self.warnings.push(problem);
        }
    }
}

/// A place in an object.
#[derive(Clone, Copy, Debug)]
pub(super) struct At<'a> {
    parent: Option<&'a At<'a>>,
    step: Step<'a>,
}

#[derive(Clone, Copy, Debug)]
enum Step<'a> {
    Member(&'a str),
    Element(usize),
}

impl<'a> At<'a> {
    pub(super) fn root(name: &'a str) -> Self {
        Self { parent: None, step: Step::Member(name) }
    }

    pub(super) fn member(&'a self, name: &'a str) -> Self {
        Self { parent: Some(self), step: Step::Member(name) }
    }

    pub(super) fn element(&'a self, number: usize) -> Self {
        Self { parent: Some(self), step: Step::Element(number) }
    }
}

impl fmt::Display for At<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = self.parent {
            parent.fmt(f)?;
        }
        match self.step {
            Step::Member(name) if self.parent.is_none() => f.write_str(name),
            Step::Member(name) => write!(f, ".{name}"),
            Step::Element(number) => write!(f, "[{number}]"),
        }
    }
}

/// A value as a message shows it: short, and quoted as in JSON.
pub(super) fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text,
    }
}

/// A string as a message shows it.
pub(super) fn quoted(text: &str) -> String {
    shown(&Value::String(text.to_owned()))
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The one of `known` that is probably meant by `name`, if one is near.
pub(super) fn nearest<'k>(name: &str, known: &[&'k str]) -> Option<&'k str> {
    let plain = |s: &str| s.to_lowercase().replace(['_', '-'], "");
    let wanted = plain(name);
    // Nothing that long is a slip of the keyboard, and the distance is quadratic.
    if wanted.len() > 64 {
        return None;
    }
    let near = known.iter().map(|k| (distance(&wanted, &plain(k)), *k)).min()?;
    let longer = wanted.len().max(near.1.len());
    (near.0 <= 2.max(longer / 3) && near.0 < longer).then_some(near.1)
}

/// The members of an object whose fields are `known`; errors for what is none, or has others.
pub(super) fn members<'v>(found: &mut Findings, at: &At<'_>, value: &'v Value, known: &[&str]) -> Option<&'v Map<String, Value>> {
    let members = object(found, at, value)?;
    for name in members.keys().filter(|n| !known.contains(&n.as_str())) {
        if found.errors.len() >= MOST_ERRORS {
            break;
        }
        let hint = match nearest(name, known) {
            Some(near) => format!("did you mean {near}?"),
            None => format!("known are {}", known.join(", ")),
        };
        found.error(&at.member(name), format!("unknown field, which would do nothing; {hint}"));
    }
    Some(members)
}

/// The members of an object whatever they are called.
pub(super) fn object<'v>(found: &mut Findings, at: &At<'_>, value: &'v Value) -> Option<&'v Map<String, Value>> {
    let members = value.as_object();
    if members.is_none() {
        found.error(at, format!("{} is {}; an object is expected", shown(value), type_of(value)));
    }
    members
}

/// A member that is there.
pub(super) fn get<'v>(members: &'v Map<String, Value>, name: &str) -> Option<&'v Value> {
    members.get(name).filter(|v| !v.is_null())
}

/// A list member: its elements, none of which is `null`; `None` if it is absent or no list.
pub(super) fn list<'v>(found: &mut Findings, at: &At<'_>, members: &'v Map<String, Value>, name: &str) -> Option<&'v [Value]> {
    let value = get(members, name)?;
    let at = at.member(name);
    let Some(elements) = value.as_array() else {
        let hint = if value.is_string() { format!(": [{}]", shown(value)) } else { String::new() };
        found.error(&at, format!("{} is {}; a list is expected{hint}", shown(value), type_of(value)));
        return None;
    };
    for (i, _) in elements.iter().enumerate().filter(|(_, e)| e.is_null()) {
        found.error(&at.element(i), "must not be null");
    }
    Some(elements)
}

/// At most `most` elements.
pub(super) fn at_most(found: &mut Findings, at: &At<'_>, count: usize, most: usize) {
    if count > most {
        found.error(at, format!("has {count} elements; at most {most} are allowed"));
    }
}

/// A string member.
pub(super) fn text<'v>(found: &mut Findings, at: &At<'_>, members: &'v Map<String, Value>, name: &str) -> Option<&'v str> {
    let value = get(members, name)?;
    string(found, &at.member(name), value)
}

/// A value that must be a string.
pub(super) fn string<'v>(found: &mut Findings, at: &At<'_>, value: &'v Value) -> Option<&'v str> {
    let text = value.as_str();
    if text.is_none() && !value.is_null() {
        let hint = match value {
            Value::Number(_) | Value::Bool(_) => format!(": write \"{value}\""),
            _ => String::new(),
        };
        found.error(at, format!("{} is {}; a string is expected{hint}", shown(value), type_of(value)));
    }
    text
}

/// A boolean member.
pub(super) fn boolean(found: &mut Findings, at: &At<'_>, members: &Map<String, Value>, name: &str) -> Option<bool> {
    let value = get(members, name)?;
    if !value.is_boolean() {
        found.error(&at.member(name), format!("{} is {}; true or false is expected", shown(value), type_of(value)));
    }
    value.as_bool()
}

/// A member that is one of `words`.
pub(super) fn word<'v>(
    found: &mut Findings,
    at: &At<'_>,
    members: &'v Map<String, Value>,
    name: &str,
    words: &[&str],
) -> Option<&'v str> {
    let given = text(found, at, members, name)?;
    if !words.contains(&given) {
        let hint = match nearest(given, words) {
            Some(near) => format!("; did you mean {near}?"),
            None => String::new(),
        };
        found.error(&at.member(name), format!("{} is not one of {}{hint}", quoted(given), words.join(", ")));
        return None;
    }
    Some(given)
}
