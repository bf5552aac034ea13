//! Patterns of texts, compiled: plain comparisons of bytes, nothing that backtracks on user text.

use crate::path::Template;
use weft_api::wire;
use weft_api::wire::string_match::Kind;

/// A compiled [`wire::StringMatch`]. Where letter case doesn't matter the pattern is in lower case already.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum TextMatch {
    Exact(Box<[u8]>),
    Prefix(Box<[u8]>),
    Suffix(Box<[u8]>),
    /// Any text that is not empty (of a header: any value).
    Present,
    /// The texts between the stars; two at least.
    Glob(Box<[Box<[u8]>]>),
    Template(Template),
}

/// How texts of an attribute are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fold {
    Exactly,
    /// ASCII letters of either case are the same.
    Lower,
}

impl TextMatch {
    /// Compiles one pattern. An error says what is wrong with it.
    pub(crate) fn compile(wire: &wire::StringMatch, fold: Fold) -> Result<Self, String> {
        let bytes = |text: &str| match fold {
            Fold::Exactly => text.as_bytes().into(),
            Fold::Lower => text.to_ascii_lowercase().into_bytes().into_boxed_slice(),
        };
        match &wire.kind {
            Some(Kind::Exact(text)) => Ok(Self::Exact(bytes(text))),
            Some(Kind::Prefix(text)) => Ok(Self::Prefix(bytes(text))),
            Some(Kind::Suffix(text)) => Ok(Self::Suffix(bytes(text))),
            Some(Kind::Present(true)) => Ok(Self::Present),
            Some(Kind::Present(false)) => Err("a pattern \"present: false\", which means nothing".into()),
            Some(Kind::Glob(text)) if !text.contains('*') => Ok(Self::Exact(bytes(text))),
            Some(Kind::Glob(text)) => Ok(Self::Glob(text.split('*').map(bytes).collect())),
            Some(Kind::Template(text)) => Ok(Self::Template(Template::parse(text)?)),
            None => Err("a pattern of a kind that this version does not know".into()),
        }
    }

    pub(crate) fn matches(&self, text: &[u8], fold: Fold) -> bool {
        match fold {
            Fold::Exactly => self.matches_exactly(text),
            Fold::Lower => match self {
                Self::Exact(pattern) => text.eq_ignore_ascii_case(pattern),
                Self::Prefix(pattern) => text.get(..pattern.len()).is_some_and(|head| head.eq_ignore_ascii_case(pattern)),
                Self::Suffix(pattern) => {
                    text.len().checked_sub(pattern.len()).is_some_and(|at| text[at..].eq_ignore_ascii_case(pattern))
                }
                Self::Present => !text.is_empty(),
                // Not what hosts are matched with; correct all the same.
                Self::Glob(_) | Self::Template(_) => self.matches_exactly(&text.to_ascii_lowercase()),
            },
        }
    }

    fn matches_exactly(&self, text: &[u8]) -> bool {
        match self {
            Self::Exact(pattern) => **pattern == *text,
            Self::Prefix(pattern) => text.starts_with(pattern),
            Self::Suffix(pattern) => text.ends_with(pattern),
            Self::Present => !text.is_empty(),
            Self::Glob(parts) => glob(parts, text),
            Self::Template(template) => template.matches(text),
        }
    }

    /// As people write it.
    pub(crate) fn words(&self) -> String {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match self {
            Self::Exact(pattern) => text(pattern),
            Self::Prefix(pattern) => format!("{}*", text(pattern)),
            Self::Suffix(pattern) => format!("*{}", text(pattern)),
            Self::Present => "*".into(),
            Self::Glob(parts) => parts.iter().map(|part| text(part)).collect::<Vec<_>>().join("*"),
            Self::Template(template) => template.as_str().into(),
        }
    }
}

/// Each part as early as it can be: for stars that is enough, nothing has to be taken back.
fn glob(parts: &[Box<[u8]>], text: &[u8]) -> bool {
    let [first, between @ .., last] = parts else { return false };
    let Some(rest) = text.strip_prefix(&**first) else { return false };
    let Some(mut rest) = rest.strip_suffix(&**last) else { return false };
    for part in between {
        if part.is_empty() {
            continue;
        }
        match rest.windows(part.len()).position(|window| window == &**part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(kind: Kind, fold: Fold) -> TextMatch {
        TextMatch::compile(&wire::StringMatch { kind: Some(kind) }, fold).unwrap()
    }

    #[test]
    fn kinds() {
        let cases: [(Kind, &[&str], &[&str]); 8] = [
            (Kind::Exact("ab".into()), &["ab"], &["", "a", "abc", "AB"]),
            (Kind::Prefix("ab".into()), &["ab", "abc"], &["", "a", "xab"]),
            (Kind::Suffix("ab".into()), &["ab", "xab"], &["", "b", "abx"]),
            (Kind::Present(true), &["a", " "], &[""]),
            (Kind::Glob("a*b*c".into()), &["abc", "axbyc", "abbc"], &["ab", "acb", "abcx", "", "ac"]),
            (Kind::Glob("*".into()), &["", "a"], &[]),
            // The ends may not share a byte.
            (Kind::Glob("aa*aa".into()), &["aaaa", "aaxaa"], &["aaa", "aa"]),
            (Kind::Template("/a/{*}".into()), &["/a/b"], &["/a/", "/a/b/c"]),
        ];
        for (kind, good, bad) in cases {
            let compiled = pattern(kind.clone(), Fold::Exactly);
            for text in good {
                assert!(compiled.matches(text.as_bytes(), Fold::Exactly), "{kind:?} must match {text:?}");
            }
            for text in bad {
                assert!(!compiled.matches(text.as_bytes(), Fold::Exactly), "{kind:?} must not match {text:?}");
            }
        }
    }

    #[test]
    fn letter_case_of_hosts() {
        for kind in [Kind::Exact("Aa.B".into()), Kind::Prefix("aA".into()), Kind::Suffix(".b".into()), Kind::Glob("A*B".into())] {
            assert!(pattern(kind, Fold::Lower).matches(b"aA.b", Fold::Lower));
        }
    }

    #[test]
    fn what_cant_be_read_is_an_error() {
        for kind in [None, Some(Kind::Present(false)), Some(Kind::Template("/a{*}".into()))] {
            assert!(TextMatch::compile(&wire::StringMatch { kind }, Fold::Exactly).is_err());
        }
    }
}
