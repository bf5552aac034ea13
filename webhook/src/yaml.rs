//! Reads and writes YAML as `kubectl` does: a number with a leading zero is octal (a file's mode), and a string that an
//! older reader would take for something else is written in quotes.

use serde_json::Value;

/// Reads one document.
///
/// # Errors
/// What is wrong, with line and column.
pub fn read(text: &str) -> Result<Value, String> {
    let options = serde_saphyr::options! { legacy_octal_numbers: true, with_snippet: false };
    serde_saphyr::from_str_with_options(text, options).map_err(|e| e.to_string())
}

/// Writes one document, ending with a line's end.
///
/// # Errors
/// A value that YAML can't hold.
pub fn write(value: &Value) -> Result<String, String> {
    let options = serde_saphyr::ser_options! { min_fold_chars: usize::MAX };
    let mut text = String::new();
    serde_saphyr::to_fmt_writer_with_options(&mut text, value, options).map_err(|e| e.to_string())?;
    if !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(text)
}

/// Splits a stream into its documents, each with the `---` line that begins it, if one does. Together they are the stream.
pub fn split(stream: &str) -> Vec<&str> {
    let mut starts = vec![0];
    let mut at = 0;
    for line in stream.split_inclusive('\n') {
        let marker = line.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']));
        if marker && at > 0 {
            starts.push(at);
        }
        at += line.len();
    }
    starts.push(stream.len());
    starts.windows(2).map(|w| &stream[w[0]..w[1]]).filter(|d| !d.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn reads_as_kubectl_reads() {
        for (text, want) in [
            ("a: 0644", json!({"a": 420})),
            ("a: '0644'", json!({"a": "0644"})),
            ("a: yes\nb: \"yes\"\nc: 'off'", json!({"a": true, "b": "yes", "c": "off"})),
            ("x: &a {p: 1}\ny: *a", json!({"x": {"p": 1}, "y": {"p": 1}})),
            ("{\"a\": [1, \"b\"]}", json!({"a": [1, "b"]})),
            ("# nothing\n", Value::Null),
        ] {
            assert_eq!(read(text).unwrap(), want, "{text}");
        }
        assert!(read("a: [").unwrap_err().contains("line 1"));
        assert!(read("a: 1\na: 2").unwrap_err().contains('a'));
    }

    #[test]
    fn a_stream_is_the_sum_of_its_documents() {
        let stream = "# head\na: 1\n---\nb: |\n  x\n  --- not a marker\n--- # c\nc: 1\n---\n";
        let parts = split(stream);
        assert_eq!(parts.concat(), stream);
        assert_eq!(parts.len(), 4);
        assert!(parts[1].contains("not a marker"));
        assert_eq!(split("---\na: 1\n").len(), 1);
    }

    fn text() -> impl Strategy<Value = String> {
        let tricky = [
            "yes", "on", "012", "1e3", "~", "", "null", "a: b", "- x", "#", "x #y", "1_000", "0x1F", "a\nb\n", "a\n\n", " lead",
            "trail ", "12:30:45", "true", "{}", "[", "*", "&a", "!t", "%", "@", "`", "\t", "é", "\u{1}", "'", "\"", "a\\b",
            "---", "...", "=", "<<",
        ];
        prop_oneof![proptest::sample::select(tricky.to_vec()).prop_map(String::from), "\\PC{0,20}", "[ \\n\\ta-c:#-]{0,12}"]
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            text().prop_map(Value::from)
        ];
        leaf.prop_recursive(4, 32, 5, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::hash_map(text(), inner, 0..4).prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(value in value()) {
            let text = write(&value).unwrap();
            prop_assert_eq!(read(&text).unwrap_or(Value::String("unreadable".into())), value, "{}", text);
        }
    }
}
