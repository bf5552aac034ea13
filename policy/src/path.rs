//! The one canonical form of a request's path.
//!
//! Policies match what comes out of [`normalise`], and the app is sent the same, so that nobody can be shown one path and the
//! app another. The rules are those of Envoy as Istio configures it: a fragment is cut off; then, as [`Normalization`] says, escaped
//! slashes are decoded, dot segments resolved (also where the dots are escaped), a backslash is a slash, unreserved characters are decoded and characters
//! that no URI may hold are encoded, and runs of slashes become one. One pass, not repeated: `%252e` becomes
//! `%252e`, which is what the app would decode to `%2e`, a name. Path parameters (`;v=1`) are part of their segment, but on a dot segment, which they don't hide:
//! servers that strip them would see one in `/public/..;/admin`.
//!
//! The query is not touched. Whatever the bytes, nothing panics; a NUL, plain or escaped, is refused.

use std::borrow::Cow;
use weft_api::wire::PathNormalization;

/// How far paths are normalised; each includes the one before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Normalization {
    /// Only the fragment is cut off.
    None,
    /// RFC 3986: dot segments, unreserved characters; `\` is `/`.
    #[default]
    Base,
    /// And `//` is `/`.
    MergeSlashes,
    /// After `%2f` and `%5c` were decoded.
    DecodeAndMergeSlashes,
}

impl From<PathNormalization> for Normalization {
    fn from(wire: PathNormalization) -> Self {
        match wire {
            PathNormalization::Base => Self::Base,
            PathNormalization::None => Self::None,
            PathNormalization::MergeSlashes => Self::MergeSlashes,
            PathNormalization::DecodeAndMergeSlashes => Self::DecodeAndMergeSlashes,
        }
    }
}

/// A path that has no canonical form: it holds a NUL, plain or as `%00`. To be answered with 400.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the path holds a NUL")]
pub struct Refused;

/// What a character of a path asks for.
const PLAIN: u8 = 0;
/// Has to be looked at: `%`, `.`, `\`.
const SPECIAL: u8 = 1;
/// May not stand in a URI's path as it is.
const ENCODE: u8 = 2;

const fn class(byte: u8) -> u8 {
    match byte {
        b'%' | b'.' | b'\\' => SPECIAL,
        0..=0x20 | 0x7f..=0xff | b'"' | b'#' | b'<' | b'>' | b'?' | b'^' | b'`' | b'{' | b'|' | b'}' => ENCODE,
        _ => PLAIN,
    }
}

static CLASS: [u8; 256] = {
    let mut table = [PLAIN; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = class(byte as u8);
        byte += 1;
    }
    table
};

/// Normalises a request target in origin form (`/a/b?q`). Borrowed where nothing changes, the common case.
///
/// The asterisk form (`*`) is no path and stays.
pub fn normalise(target: &str, how: Normalization) -> Result<Cow<'_, str>, Refused> {
    let target = target.split_once('#').map_or(target, |(before, _)| before);
    if how == Normalization::None || target == "*" {
        return Ok(Cow::Borrowed(target));
    }
    let (path, query) = match target.find('?') {
        Some(at) => target.split_at(at),
        None => (target, ""),
    };
    if is_normal(path.as_bytes(), how) {
        return Ok(Cow::Borrowed(target));
    }
    let mut decoded = None;
    if how == Normalization::DecodeAndMergeSlashes {
        decoded = decode_slashes(path.as_bytes());
    }
    let mut out = canonical(decoded.as_deref().unwrap_or(path.as_bytes()))?;
    if matches!(how, Normalization::MergeSlashes | Normalization::DecodeAndMergeSlashes) {
        out.dedup_by(|next, before| *next == b'/' && *before == b'/');
    }
    out.extend_from_slice(query.as_bytes());
    // What is not ASCII was encoded, so this never replaces anything.
    Ok(Cow::Owned(String::from_utf8(out).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())))
}

/// Whether normalising would change nothing, told without allocation; a dot within a name is no reason to look closer.
fn is_normal(path: &[u8], how: Normalization) -> bool {
    if path.first() != Some(&b'/') {
        return false;
    }
    let merge = matches!(how, Normalization::MergeSlashes | Normalization::DecodeAndMergeSlashes);
    let mut before = 0;
    for (at, byte) in path.iter().copied().enumerate() {
        match CLASS[usize::from(byte)] {
            PLAIN => {
                if merge && byte == b'/' && before == b'/' {
                    return false;
                }
            }
            SPECIAL if byte == b'.' => {
                let after = path.get(at + 1).copied();
                if before == b'/' && matches!(after, None | Some(b'/' | b'.' | b'\\' | b'%' | b';')) {
                    return false;
                }
            }
            SPECIAL if byte == b'%' => {
                // An escape that stays as it is.
                let decodes = how == Normalization::DecodeAndMergeSlashes;
                match escape(path, at) {
                    Some(b'/' | b'\\') if decodes => return false,
                    Some(value) if value != 0 && !is_unreserved(value) => {}
                    _ => return false,
                }
            }
            _ => return false,
        }
        before = byte;
    }
    true
}

const fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

/// The value of the escape that begins at `at`, if there is one.
fn escape(path: &[u8], at: usize) -> Option<u8> {
    let digit = |byte: u8| (byte as char).to_digit(16).map(|digit| digit as u8);
    match path.get(at..at + 3)? {
        [b'%', high, low] => Some(digit(*high)? << 4 | digit(*low)?),
        _ => None,
    }
}

/// `%2f` becomes `/` and `%5c` becomes `\`, in any case of letters. `None`: there are none.
fn decode_slashes(path: &[u8]) -> Option<Vec<u8>> {
    let slash = |at| escape(path, at).filter(|value| matches!(value, b'/' | b'\\'));
    let first = (0..path.len()).find(|at| slash(*at).is_some())?;
    let mut out = path[..first].to_vec();
    let mut at = first;
    while at < path.len() {
        if let Some(value) = slash(at) {
            out.push(value);
            at += 3;
        } else {
            out.push(path[at]);
            at += 1;
        }
    }
    Some(out)
}

/// Length of the dot, plain or escaped, that stands at `at`; 0: none.
fn dot(path: &[u8], at: usize) -> usize {
    match path.get(at) {
        Some(b'.') => 1,
        Some(b'%') if escape(path, at) == Some(b'.') => 3,
        _ => 0,
    }
}

fn is_slash(byte: u8) -> bool {
    matches!(byte, b'/' | b'\\')
}

/// Where the next segment begins, if the current one ends at `at` or has nothing but parameters (`;v=1`) from there on.
fn segment_after(path: &[u8], at: usize) -> Result<Option<usize>, Refused> {
    match path.get(at).copied() {
        None => Ok(Some(at)),
        Some(b';') => {
            let rest = &path[at..];
            let length = rest.iter().position(|byte| is_slash(*byte)).unwrap_or(rest.len());
            // What is dropped is looked at as what is kept.
            if rest[..length].contains(&0) || rest[..length].windows(3).any(|escape| escape == b"%00") {
                return Err(Refused);
            }
            Ok(Some((at + length + 1).min(path.len())))
        }
        Some(byte) => Ok(is_slash(byte).then_some(at + 1)),
    }
}

fn canonical(path: &[u8]) -> Result<Vec<u8>, Refused> {
    let mut out = Vec::with_capacity(path.len() + 8);
    // An escape that was broken in the input and must not become a whole one by what is decoded behind it.
    let mut stray: Option<usize> = None;
    let mut at = 0;
    if path.first().is_none_or(|byte| !is_slash(*byte)) {
        out.push(b'/');
    }
    while let Some(&byte) = path.get(at) {
        let dots = dot(path, at);
        if dots > 0 {
            at += dots;
            if out.last() != Some(&b'/') {
                push_decoded(&mut out, b'.', path, at, &mut stray);
                continue;
            }
            let second = dot(path, at);
            if let Some(next) = segment_after(path, at)? {
                at = next;
            } else if second > 0
                && let Some(next) = segment_after(path, at + second)?
            {
                at = next;
                out.pop();
                while out.last().is_some_and(|byte| *byte != b'/') {
                    out.pop();
                }
                if out.is_empty() {
                    out.push(b'/');
                }
            } else {
                out.push(b'.');
            }
            continue;
        }
        match byte {
            0 => return Err(Refused),
            b'\\' => out.push(b'/'),
            b'%' => match escape(path, at) {
                Some(0) => return Err(Refused),
                Some(value) if is_unreserved(value) => {
                    at += 3;
                    push_decoded(&mut out, value, path, at, &mut stray);
                    continue;
                }
                Some(_) => {
                    out.extend_from_slice(&path[at..at + 3]);
                    at += 3;
                    continue;
                }
                None => {
                    stray = Some(out.len());
                    out.push(b'%');
                }
            },
            byte if CLASS[usize::from(byte)] == ENCODE => {
                let hex = |nibble: u8| char::from_digit(u32::from(nibble), 16).unwrap_or('0').to_ascii_uppercase() as u8;
                out.extend_from_slice(&[b'%', hex(byte >> 4), hex(byte & 15)]);
            }
            byte => out.push(byte),
        }
        at += 1;
    }
    Ok(out)
}

/// Appends a character that was escaped. If with it (and the character that follows) a stray `%` would read as an escape, that
/// `%` is written as `%25`.
fn push_decoded(out: &mut Vec<u8>, byte: u8, path: &[u8], next: usize, stray: &mut Option<usize>) {
    out.push(byte);
    let Some(percent) = *stray else { return };
    let behind = out.len().saturating_sub(percent + 1);
    let whole = match behind {
        1 => path.get(next).is_some_and(|after| byte.is_ascii_hexdigit() && after.is_ascii_hexdigit()),
        2 => escape(out, percent).is_some(),
        _ => false,
    };
    if whole {
        out.splice(percent..=percent, *b"%25");
        *stray = None;
    }
}

/// A pattern of paths: literal segments, `{*}` for exactly one segment (not empty), `{**}` for any text, of which there is at most one and after
/// which only literals follow.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Template {
    /// Literal texts between the `{*}`: the first is where the path begins.
    head: Box<[Box<[u8]>]>,
    /// What stands behind a `{**}`; `None`: there is none.
    tail: Option<Box<[u8]>>,
    text: Box<str>,
}

impl Template {
    /// Reads a pattern. An error says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut head: Vec<Vec<u8>> = vec![Vec::new()];
        let mut tail: Option<Vec<u8>> = None;
        for (n, segment) in text.split('/').enumerate() {
            let closed = tail.is_some();
            let Some(open) = tail.as_mut().or(head.last_mut()) else { break };
            if n > 0 {
                open.push(b'/');
            }
            match segment {
                "{*}" if closed => return Err(format!("path template {text:?}: {{*}} must not follow {{**}}")),
                "{**}" if closed => return Err(format!("path template {text:?}: {{**}} may stand there once only")),
                "{*}" => head.push(Vec::new()),
                "{**}" => tail = Some(Vec::new()),
                literal if literal.contains(['{', '}', '*']) => {
                    return Err(format!("path template {text:?}: {{*}} and {{**}} must be whole segments, {literal:?} is not"));
                }
                literal => open.extend_from_slice(literal.as_bytes()),
            }
        }
        if !text.starts_with('/') {
            return Err(format!("path template {text:?} must begin with a slash"));
        }
        let head = head.into_iter().map(Vec::into_boxed_slice).collect();
        Ok(Self { head, tail: tail.map(Vec::into_boxed_slice), text: text.into() })
    }

    /// The text that every path it matches begins with.
    pub fn prefix(&self) -> &[u8] {
        self.head.first().map_or(b"", |first| first)
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether the whole of a path fits.
    pub fn matches(&self, path: &[u8]) -> bool {
        let mut rest = path;
        for (n, literal) in self.head.iter().enumerate() {
            if n > 0 {
                let end = rest.iter().position(|byte| *byte == b'/').unwrap_or(rest.len());
                if end == 0 {
                    return false;
                }
                rest = &rest[end..];
            }
            match rest.strip_prefix(&**literal) {
                Some(after) => rest = after,
                None => return false,
            }
        }
        match &self.tail {
            None => rest.is_empty(),
            Some(tail) => rest.ends_with(tail),
        }
    }
}

#[cfg(test)]
mod tests;
