//! How commands print: a table for people, JSON and YAML for programs, as kubectl does.

use serde::Serialize;

/// `-o`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// A table.
    #[default]
    Table,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
}

/// Prints a value for programs. `false`: a table is wanted, and nothing was printed.
///
/// # Errors
/// The value can't be written.
pub(crate) fn structured(format: Format, value: &impl Serialize) -> anyhow::Result<bool> {
    match format {
        Format::Table => return Ok(false),
        Format::Json => println!("{}", serde_json::to_string_pretty(value)?),
        Format::Yaml => print!("{}", serde_saphyr::to_string(value)?),
    }
    Ok(true)
}

/// A table: columns as wide as their widest cell, three spaces between, no trailing spaces.
pub(crate) fn table(heads: &[&str], rows: &[Vec<String>]) -> String {
    let widths: Vec<usize> = (0..heads.len())
        .map(|i| {
            let cells = rows.iter().filter_map(|row| row.get(i)).map(|cell| cell.chars().count());
            cells.chain([heads[i].chars().count()]).max().unwrap_or_default()
        })
        .collect();
    let mut text = String::new();
    let heads: Vec<String> = heads.iter().map(|h| (*h).to_owned()).collect();
    for row in std::iter::once(&heads).chain(rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{:width$}   ", printable(cell)));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A text that may come from a stranger's request, safe for a terminal.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// A text, or `-` where there is none.
pub(crate) fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".into() } else { text.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables() {
        let rows = vec![vec!["a".into(), "bb".into(), String::new()], vec!["cccc".into(), "\u{1b}[2J".into(), "x".into()]];
        assert_eq!(table(&["ONE", "T", "L"], &rows), "ONE    T      L\na      bb\ncccc   \u{fffd}[2J   x\n");
    }
}
