//! Edits a JSON document and keeps the RFC 6902 operations that do the same to anybody else's copy.
//!
//! What goes into an array is an explicit `add` at its index: a plain difference would rewrite every element behind it, correct
//! but large and unreadable in an audit log. For everything else json-patch's difference serves.

use json_patch::jsonptr::PointerBuf;
use json_patch::{AddOperation, Patch, PatchOperation, RemoveOperation};
use serde_json::{Map, Value};

/// A document, and what has been done to it.
#[derive(Debug)]
pub(crate) struct Editor {
    doc: Value,
    ops: Vec<PatchOperation>,
    /// Pointers of maps and arrays that were not there before.
    pub created: Vec<String>,
}

/// One token of a JSON pointer, escaped.
pub(crate) fn token(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}

impl Editor {
    /// Begins with a document.
    pub(crate) fn new(doc: Value) -> Self {
        Self { doc, ops: Vec::new(), created: Vec::new() }
    }

    /// The document as it is now.
    pub(crate) fn doc(&self) -> &Value {
        &self.doc
    }

    /// The document, and the operations that made it.
    pub(crate) fn finish(self) -> (Value, Patch) {
        (self.doc, Patch(self.ops))
    }

    fn push(&mut self, op: PatchOperation) {
        // Each operation is built from the document as it is, so it applies; should it not, leaving it out of both keeps the
        // document and the patch in agreement.
        if json_patch::patch(&mut self.doc, std::slice::from_ref(&op)).is_ok() {
            self.ops.push(op);
        }
    }

    fn add(&mut self, path: &str, value: Value) {
        if let Ok(path) = PointerBuf::parse(path.to_owned()) {
            self.push(PatchOperation::Add(AddOperation { path, value }));
        }
    }

    /// Takes out what is there.
    pub(crate) fn remove(&mut self, path: &str) -> Option<Value> {
        let old = self.doc.pointer(path)?.clone();
        let path = PointerBuf::parse(path.to_owned()).ok()?;
        self.push(PatchOperation::Remove(RemoveOperation { path }));
        Some(old)
    }

    /// Puts a value into an array at an index (at the end if it is shorter), making the array where there is none.
    pub(crate) fn insert(&mut self, array: &str, index: usize, value: Value) {
        match self.doc.pointer(array) {
            Some(Value::Array(items)) => {
                let index = index.min(items.len());
                self.add(&format!("{array}/{index}"), value);
            }
            _ => {
                self.created.push(array.to_owned());
                self.add(array, Value::Array(vec![value]));
            }
        }
    }

    /// Puts a value at the end of an array.
    pub(crate) fn append(&mut self, array: &str, value: Value) {
        self.insert(array, usize::MAX, value);
    }

    /// Makes sure that there is a map.
    pub(crate) fn ensure_map(&mut self, path: &str) {
        if !matches!(self.doc.pointer(path), Some(Value::Object(_))) {
            self.created.push(path.to_owned());
            self.add(path, Value::Object(Map::new()));
        }
    }

    /// Sets a key of a map that is there.
    pub(crate) fn set(&mut self, map: &str, key: &str, value: Value) {
        if self.doc.pointer(map).and_then(|m| m.get(key)) != Some(&value) {
            self.add(&format!("{map}/{}", token(key)), value);
        }
    }

    /// Makes what is at a path equal to this value, by the difference.
    pub(crate) fn change(&mut self, path: &str, new: &Value) {
        let Some(old) = self.doc.pointer(path) else { return };
        for mut op in json_patch::diff(old, new).0 {
            let moved = |p: &PointerBuf| PointerBuf::parse(format!("{path}{p}")).unwrap_or_default();
            match &mut op {
                PatchOperation::Add(o) => o.path = moved(&o.path),
                PatchOperation::Remove(o) => o.path = moved(&o.path),
                PatchOperation::Replace(o) => o.path = moved(&o.path),
                // The difference makes none of the others.
                PatchOperation::Move(_) | PatchOperation::Copy(_) | PatchOperation::Test(_) => continue,
            }
            self.push(op);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_patch_does_to_a_copy_what_was_done_here() {
        let before = json!({"a": [1, 2], "m": {"x/y": 1, "t~": {"deep": [1]}}});
        let mut editor = Editor::new(before.clone());
        editor.insert("/a", 0, json!(0));
        editor.append("/a", json!(3));
        editor.append("/b", json!("new"));
        editor.ensure_map("/n");
        editor.set("/n", "k/~", json!(true));
        editor.set("/m", "x/y", json!(1));
        editor.change("/m", &json!({"x/y": 2, "t~": {"deep": [1, 2]}}));
        editor.remove("/a/1");
        assert_eq!(editor.created, ["/b", "/n"]);
        let (after, patch) = editor.finish();
        assert_eq!(after, json!({"a": [0, 2, 3], "b": ["new"], "n": {"k/~": true}, "m": {"x/y": 2, "t~": {"deep": [1, 2]}}}));
        let mut copy = before;
        json_patch::patch(&mut copy, &patch).unwrap();
        assert_eq!(copy, after);
        // Nothing behind an insertion is rewritten.
        assert!(serde_json::to_value(&patch).unwrap()[0] == json!({"op": "add", "path": "/a/0", "value": 0}));
    }
}
