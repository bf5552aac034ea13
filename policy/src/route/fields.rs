//! Changes of header fields: set (replaces what is there), add (beside what is there), remove.

use weft_api::wire;

/// Compiled changes. Names are in lower case and, like values, such as HTTP allows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Fields that get this value instead of theirs.
    pub set: Vec<(String, String)>,
    /// Fields that get this value besides.
    pub add: Vec<(String, String)>,
    /// Fields that go.
    pub remove: Vec<String>,
    /// `host` or `:authority` among those that are set: the request's authority.
    pub authority: Option<String>,
}

/// Fields that frame a message or belong to one connection: not a route's to change.
const FRAMING: [&str; 6] = ["connection", "content-length", "transfer-encoding", "upgrade", "te", "keep-alive"];

impl Changes {
    pub(super) fn new(wire: Option<&wire::HeaderChanges>) -> Result<Self, String> {
        let mut changes = Self::default();
        let Some(wire) = wire else { return Ok(changes) };
        for (fields, set) in [(&wire.set, true), (&wire.add, false)] {
            for field in fields {
                let name = field.name.to_ascii_lowercase();
                if name == "host" || name == ":authority" {
                    changes.authority = Some(value(&name, &field.value)?);
                    continue;
                }
                proper(&name)?;
                let entry = (name.clone(), value(&name, &field.value)?);
                if set { changes.set.push(entry) } else { changes.add.push(entry) }
            }
        }
        for name in &wire.remove {
            let name = name.to_ascii_lowercase();
            proper(&name)?;
            changes.remove.push(name);
        }
        Ok(changes)
    }

    /// There is nothing to change.
    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.add.is_empty() && self.remove.is_empty() && self.authority.is_none()
    }
}

/// RFC 9110, section 5.6.2: a token.
fn proper(name: &str) -> Result<(), String> {
    let token = |c: u8| c.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&c);
    if name.is_empty() || !name.bytes().all(token) {
        return Err(format!("{name:?} is no name of a header field"));
    }
    if FRAMING.contains(&name) {
        return Err(format!("{name} belongs to the connection and can't be changed by a route"));
    }
    Ok(())
}

fn value(name: &str, value: &str) -> Result<String, String> {
    if value.bytes().any(|c| c < b' ' && c != b'\t' || c == 0x7f) {
        return Err(format!("the value of {name} has control characters"));
    }
    Ok(value.to_owned())
}
