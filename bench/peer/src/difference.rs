//! Which differences are meant. Each name is a heading of `docs/authorization-differences.md`, where the reason stands.

use crate::case::{Answer, Call, Mode, Set};

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
pub(crate) fn known(set: &Set, call: &Call, theirs: &Answer, ours: &Answer, real: bool) -> Option<&'static str> {
    let headers = |name: &str| {
        let prefix = format!("{name}:");
        call.headers.iter().filter(|h| h.get(..prefix.len()).is_some_and(|h| h.eq_ignore_ascii_case(prefix.as_bytes()))).count()
    };
    let malformed = matches!(theirs, Answer::Malformed(_));
    if malformed && !METHODS.contains(&call.method()) {
        return Some("Methods of any name");
    }
    if malformed && call.target() == b"*" {
        return Some("The asterisk form");
    }
    if matches!(ours, Answer::Malformed(_)) && headers("host") != 1 {
        return Some("Two Hosts, or none");
    }
    if malformed && !real {
        return Some("(only a proxy refuses what is malformed)");
    }
    if malformed && call.target().starts_with(b"http://") {
        return Some("Hosts and paths that Envoy does not read");
    }
    if headers("x-forwarded-for") > 0 && set.raw.iter().any(|policy| is_remote(&policy.to_string())) {
        return Some("Forwarded addresses");
    }
    if dots_with_parameters(call.target()) {
        return Some("Escaped dots with parameters");
    }
    if set.raw.iter().any(|policy| policy.to_string().contains('{')) && odd_in_template(call.target()) {
        return Some("Templates match any character");
    }
    let merged = matches!(set.mode, Mode::MergeSlashes | Mode::DecodeAndMergeSlashes);
    if merged && only_slashes(theirs) {
        return Some("Slashes and nothing else");
    }
    None
}

fn is_remote(policy: &str) -> bool {
    ["remoteIpBlocks", "notRemoteIpBlocks", "remote.ip"].iter().any(|word| policy.contains(&format!("\"{word}\"")))
}

/// Whether there is a segment of dots, at least one of them escaped or all before a backslash, and parameters.
fn dots_with_parameters(target: &[u8]) -> bool {
    let text = String::from_utf8_lossy(target).to_ascii_lowercase();
    let path = text.split(['?', '#']).next().unwrap_or_default().replace("%2f", "/").replace("%5c", "\\");
    path.split(['/', '\\']).any(|segment| {
        let dots = segment.split(';').next().unwrap_or_default();
        segment.contains(';') && (dots.contains("%2e") || path.contains('\\')) && matches!(&*dots.replace("%2e", "."), "." | "..")
    })
}

/// Whether the path has a character that Envoy's wildcards of templates do not take for a part of a segment.
fn odd_in_template(target: &[u8]) -> bool {
    let path = target.split(|b| matches!(b, b'?' | b'#')).next().unwrap_or_default();
    path.iter().any(|b| !b.is_ascii_alphanumeric() && !b"-._~%!$&'()*+,;:@=/".contains(b))
}

/// Whether the app was sent `//`, which Envoy leaves where it merges slashes.
fn only_slashes(answer: &Answer) -> bool {
    matches!(answer, Answer::Allowed(Some(target)) if target.split(|b| *b == b'?').next() == Some(b"//"))
}

/// Those that Envoy's parser of HTTP/1 knows, as far as they are sent here.
const METHODS: &[&[u8]] = &[b"GET", b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"HEAD", b"TRACE", b"PURGE", b"CONNECT"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dots_with_parameters_are_told() {
        for (target, told) in [
            ("/a/%2e%2e;x/b", true),
            ("/a/.%2E;/b", true),
            ("/a/..;\\b", true),
            ("/a/..;x/b", false),
            ("/a/%2e%2e/b", false),
            ("/a/b%2e;x", false),
            ("/a?/%2e%2e;x", false),
        ] {
            assert_eq!(dots_with_parameters(target.as_bytes()), told, "{target}");
        }
    }

    #[test]
    fn refusals_are_the_same_whatever_they_are_called() {
        assert!(same(&Answer::Denied, &Answer::Malformed(400)));
        assert!(!same(&Answer::Denied, &Answer::Allowed(None)));
        assert!(!same(&Answer::Allowed(Some(b"/a".to_vec())), &Answer::Allowed(Some(b"/b".to_vec()))));
    }
}
