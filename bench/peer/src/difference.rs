//! Which differences are meant. Each name is a heading of `docs/authorization-differences.md`, where the reason stands.

use crate::case::{Answer, Call, Set};

/// Whether two answers are the same to whoever relies on them: the same verdict, and the app sees the same path.
pub(crate) fn same(theirs: &Answer, ours: &Answer) -> bool {
    match (theirs, ours) {
        (Answer::Allowed(a), Answer::Allowed(b)) => a == b || a.is_none() || b.is_none(),
        (Answer::Allowed(_), _) | (_, Answer::Allowed(_)) => false,
        // Refused is refused, whatever the reason that is given.
        _ => true,
    }
}

/// The name of the difference that explains these answers; `None`: it should not be. `real`: Weft's answer is a proxy's, not the engine's alone.
pub(crate) fn known(_set: &Set, call: &Call, theirs: &Answer, ours: &Answer, real: bool) -> Option<&'static str> {
    let headers = |name: &str| {
        let prefix = format!("{name}:");
        call.headers.iter().filter(|h| h.get(..prefix.len()).is_some_and(|h| h.eq_ignore_ascii_case(prefix.as_bytes()))).count()
    };
    match (theirs, ours) {
        (Answer::Malformed(_), _) if !METHODS.contains(&call.method()) => Some("Methods of any name"),
        (_, Answer::Malformed(_)) if headers("host") > 1 => Some("Two Hosts"),
        (Answer::Malformed(_), _) if !real => Some("(only a proxy refuses what is malformed)"),
        _ => None,
    }
}

/// Those that Envoy's parser of HTTP/1 knows, as far as they are sent here.
const METHODS: &[&[u8]] = &[b"GET", b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"HEAD", b"TRACE", b"PURGE", b"CONNECT"];
