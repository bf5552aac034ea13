//! Reads the Prometheus text format, as far as assertions need it.

use std::collections::BTreeMap;

/// One sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Name of the series, with `_total`, `_bucket` and the like.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its value.
    pub value: f64,
}

/// All samples of an exposition.
///
/// # Errors
/// The first line that is neither a comment nor a sample.
pub fn parse(text: &str) -> anyhow::Result<Vec<Sample>> {
    text.lines()
        .filter(|line| !line.trim().is_empty() && !line.starts_with('#'))
        .map(|line| sample(line).ok_or_else(|| anyhow::anyhow!("not a sample: {line}")))
        .collect()
}

fn sample(line: &str) -> Option<Sample> {
    let end = line.find(['{', ' '])?;
    let name = line[..end].to_owned();
    let mut labels = BTreeMap::new();
    let mut rest = &line[end..];
    if let Some(inner) = rest.strip_prefix('{') {
        let mut text = inner;
        loop {
            text = text.trim_start_matches(',');
            if let Some(after) = text.strip_prefix('}') {
                rest = after;
                break;
            }
            let (key, after) = text.split_once("=\"")?;
            let mut value = String::new();
            let mut chars = after.char_indices();
            let close = loop {
                match chars.next()? {
                    (_, '\\') => value.push(match chars.next()?.1 {
                        'n' => '\n',
                        other => other,
                    }),
                    (at, '"') => break at,
                    (_, c) => value.push(c),
                }
            };
            labels.insert(key.to_owned(), value);
            text = &after[close + 1..];
        }
    }
    let value = rest.split_whitespace().next()?;
    let value = match value {
        "+Inf" => f64::INFINITY,
        "-Inf" => f64::NEG_INFINITY,
        v => v.parse().ok()?,
    };
    Some(Sample { name, labels, value })
}

/// The sum of the series of this name whose labels have these values.
pub fn sum(samples: &[Sample], name: &str, labels: &[(&str, &str)]) -> f64 {
    let fits = |s: &&Sample| s.name == name && labels.iter().all(|(k, v)| s.labels.get(*k).is_some_and(|have| have == v));
    // An empty sum would be -0.
    samples.iter().filter(fits).map(|s| s.value).fold(0.0, |a, b| a + b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_labels_escapes_and_infinities() {
        let all = parse("# HELP x y\na_total{b=\"c\\\"d\",e=\"f\"} 3\nb 1.5 123\nc_bucket{le=\"+Inf\"} +Inf\n").unwrap();
        assert_eq!(all.len(), 3);
        assert_eq!(all[0].labels["b"], "c\"d");
        assert_eq!(sum(&all, "a_total", &[("e", "f")]), 3.0);
        assert_eq!(sum(&all, "a_total", &[("e", "g")]), 0.0);
        assert_eq!(all[1].value, 1.5);
        assert!(parse("{").is_err());
    }
}
