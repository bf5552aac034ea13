//! How routes match texts.

use regex::{Regex, RegexBuilder};
use weft_api::wire;
use weft_api::wire::text_match::Kind;

/// Memory that a compiled expression may take.
const LARGEST: usize = 1 << 20;

/// A compiled text match.
#[derive(Clone, Debug)]
pub enum Text {
    /// The whole text.
    Exact(String),
    /// Its beginning.
    Prefix(String),
    /// An expression for the whole text.
    Regex(Regex),
    /// Any text that is there.
    Present,
}

impl Text {
    /// Compiles.
    ///
    /// # Errors
    /// The expression is none.
    pub fn new(wire: &wire::TextMatch) -> Result<Self, String> {
        Ok(match &wire.kind {
            Some(Kind::Exact(text)) => Self::Exact(text.clone()),
            Some(Kind::Prefix(text)) => Self::Prefix(text.clone()),
            Some(Kind::Regex(text)) => {
                let whole = format!("^(?:{text})$");
                let built = RegexBuilder::new(&whole).size_limit(LARGEST).dfa_size_limit(LARGEST).build();
                Self::Regex(built.map_err(|error| format!("{text:?} is no regular expression: {error}"))?)
            }
            Some(Kind::Present(_)) | None => Self::Present,
        })
    }

    /// Whether it matches.
    pub fn takes(&self, text: &str) -> bool {
        match self {
            Self::Exact(wanted) => wanted == text,
            Self::Prefix(wanted) => text.starts_with(wanted.as_str()),
            Self::Regex(wanted) => wanted.is_match(text),
            Self::Present => true,
        }
    }
}
