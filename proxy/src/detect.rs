//! Tells a connection's protocol from its first bytes. Pure: a verdict on the bytes so far.
//!
//! A verdict is only `More` while the bytes are a proper beginning of something that is told apart; the first byte that
//! fits nothing makes it [`Verdict::Opaque`], so that a protocol we don't know is held up as briefly as can be.

use weft_api::names;

/// HTTP/2's connection preface (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Longest method that is taken for one.
const METHOD: usize = 24;
/// A request line that is longer is believed without its end.
const LINE: usize = 4096;
/// Most bytes of a ClientHello that are waited for.
pub const HELLO: usize = 64 * 1024;

/// What the first bytes say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not enough yet; if nothing more comes, it is to be taken for the inner kind.
    More(Leaning),
    /// An HTTP/1 request line.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// A TLS ClientHello.
    Tls(Hello),
    /// Anything else.
    Opaque,
}

/// What counts of a ClientHello.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    /// The server name.
    pub server_name: Option<String>,
    /// It names one of the mesh's protocols: a peer's mutual TLS, not the app's own.
    pub mesh: bool,
}

/// What an unfinished beginning most likely is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaning {
    /// A method and the start of a target have been seen.
    Http1,
    /// A TLS handshake record has begun.
    Tls,
    /// Too little to say.
    Opaque,
}

/// Judges the first bytes of a client.
pub fn judge(bytes: &[u8]) -> Verdict {
    let n = bytes.len().min(PREFACE.len());
    if bytes[..n] == PREFACE[..n] {
        return if n == PREFACE.len() { Verdict::Http2 } else { Verdict::More(Leaning::Opaque) };
    }
    if bytes[0] == 0x16 {
        return tls(bytes);
    }
    http1(bytes)
}

/// As [`judge`], where only TLS is told apart: on a port that is declared opaque.
pub fn tls_or_opaque(bytes: &[u8]) -> Verdict {
    if bytes.first() == Some(&0x16) { tls(bytes) } else { Verdict::Opaque }
}

fn http1(bytes: &[u8]) -> Verdict {
    let method = bytes.iter().take_while(|b| b.is_ascii_uppercase() || **b == b'-' || **b == b'_').count();
    if method > METHOD {
        return Verdict::Opaque;
    }
    let Some(after) = bytes.get(method) else { return Verdict::More(Leaning::Opaque) };
    if method < 3 || *after != b' ' {
        return Verdict::Opaque;
    }
    let target = &bytes[method + 1..];
    let Some(&first) = target.first() else { return Verdict::More(Leaning::Opaque) };
    // Origin form, absolute form, asterisk form; authority form is only CONNECT's (RFC 9112, section 3.2).
    let connect = bytes.starts_with(b"CONNECT ");
    if !(first == b'/' || first == b'*' || first.is_ascii_alphabetic() || connect && first == b'[') {
        return Verdict::Opaque;
    }
    let plausible = if first == b'/' || connect { Leaning::Http1 } else { Leaning::Opaque };
    match target.iter().position(|b| *b == b'\n') {
        None if target.len() > LINE => Verdict::Http1,
        None if target.iter().any(|b| (*b < b' ' && *b != b'\r') || *b == 0x7f) => Verdict::Opaque,
        None => Verdict::More(plausible),
        Some(end) => {
            let line = target[..end].strip_suffix(b"\r").unwrap_or(&target[..end]);
            let version = line.rsplit(|b| *b == b' ').next().unwrap_or_default();
            let http = version.len() == 8 && version.starts_with(b"HTTP/1.") && version[7].is_ascii_digit();
            // What would have been opaque piece by piece is so as a whole.
            let control = line.iter().any(|b| (*b < b' ' && *b != b'\r') || *b == 0x7f);
            if http && !control { Verdict::Http1 } else { Verdict::Opaque }
        }
    }
}

/// The ClientHello may be cut into records, and records into segments, as its sender likes (RFC 8446, section 5.1).
fn tls(bytes: &[u8]) -> Verdict {
    let mut handshake = Vec::new();
    let mut rest = bytes;
    let complete = loop {
        // Record header: type, version (major 3), length.
        if rest.iter().zip([0x16, 3]).any(|(have, want)| *have != want) {
            return if handshake.is_empty() { Verdict::Opaque } else { Verdict::Tls(Hello::default()) };
        }
        let Some((header, body)) = rest.split_at_checked(5) else { break false };
        let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
        if length == 0 || length > (1 << 14) {
            return Verdict::Opaque;
        }
        handshake.extend_from_slice(&body[..length.min(body.len())]);
        if handshake.first().is_some_and(|kind| *kind != 1) {
            return Verdict::Opaque;
        }
        if handshake.len() >= 4 {
            let whole = 4 + usize::from_be_bytes([0, 0, 0, 0, 0, handshake[1], handshake[2], handshake[3]]);
            if handshake.len() >= whole {
                handshake.truncate(whole);
                break true;
            }
        }
        match body.get(length..) {
            Some(next) if !next.is_empty() => rest = next,
            _ => break false,
        }
    };
    if complete {
        Verdict::Tls(hello(&handshake[4..]).unwrap_or_default())
    } else if bytes.len() > HELLO {
        Verdict::Tls(Hello::default())
    } else {
        Verdict::More(if bytes.len() >= 6 { Leaning::Tls } else { Leaning::Opaque })
    }
}

/// What counts of a ClientHello's body (RFC 8446, section 4.1.2). None: it is malformed.
fn hello(body: &[u8]) -> Option<Hello> {
    let rest = body.get(34..)?;
    let (_session, rest) = vector(rest, 1)?;
    let (_suites, rest) = vector(rest, 2)?;
    let (_compression, rest) = vector(rest, 1)?;
    let mut hello = Hello::default();
    // Before extensions there were none.
    let Some((mut extensions, _)) = vector(rest, 2) else { return Some(hello) };
    while extensions.len() >= 4 {
        let kind = u16::from_be_bytes([extensions[0], extensions[1]]);
        let (body, rest) = vector(&extensions[2..], 2)?;
        extensions = rest;
        match kind {
            0 => hello.server_name = server_name(body),
            16 => hello.mesh = names_mesh(body),
            _ => {}
        }
    }
    Some(hello)
}

/// The `server_name` extension (RFC 6066, section 3).
fn server_name(body: &[u8]) -> Option<String> {
    let (mut names, _) = vector(body, 2)?;
    while let Some((&kind, rest)) = names.split_first() {
        let (name, rest) = vector(rest, 2)?;
        names = rest;
        if kind == 0 {
            let name = std::str::from_utf8(name).ok()?;
            let proper = !name.is_empty() && name.len() <= 255 && name.bytes().all(|b| b.is_ascii_graphic());
            return proper.then(|| name.to_ascii_lowercase());
        }
    }
    None
}

/// Whether the `application_layer_protocol_negotiation` extension (RFC 7301, section 3.1) names a protocol of the mesh.
fn names_mesh(body: &[u8]) -> bool {
    let Some((mut protocols, _)) = vector(body, 2) else { return false };
    while let Some((protocol, rest)) = vector(protocols, 1) {
        if names::MESH_ALPNS.contains(&protocol) {
            return true;
        }
        protocols = rest;
    }
    false
}

/// Splits a vector with a length of `width` bytes off.
fn vector(bytes: &[u8], width: usize) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_at_checked(width)?;
    let length = length.iter().fold(0, |sum, b| sum << 8 | usize::from(*b));
    rest.split_at_checked(length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hello(name: Option<&str>) -> Vec<u8> {
        let mut extensions = vec![0, 43, 0, 3, 2, 3, 4];
        if let Some(name) = name {
            let n = name.len() as u16;
            extensions.extend([0, 0]);
            for length in [n + 5, n + 3] {
                extensions.extend(length.to_be_bytes());
            }
            extensions.push(0);
            extensions.extend(n.to_be_bytes());
            extensions.extend(name.as_bytes());
        }
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.push(0);
        body.extend([0, 2, 0x13, 1, 1, 0]);
        body.extend((extensions.len() as u16).to_be_bytes());
        body.extend(extensions);
        let mut handshake = vec![1, 0];
        handshake.extend((body.len() as u16).to_be_bytes());
        handshake.extend(body);
        handshake
    }

    fn records(handshake: &[u8], size: usize) -> Vec<u8> {
        let mut out = Vec::new();
        for part in handshake.chunks(size) {
            out.extend([0x16, 3, 1]);
            out.extend((part.len() as u16).to_be_bytes());
            out.extend(part);
        }
        out
    }

    #[test]
    fn whole_beginnings() {
        let cases: &[(&[u8], Verdict)] = &[
            (b"GET / HTTP/1.1\r\n", Verdict::Http1),
            (b"GET / HTTP/1.0\n", Verdict::Http1),
            (b"PROPFIND /x HTTP/1.1\r\nHost: a\r\n\r\n", Verdict::Http1),
            (b"M-SEARCH * HTTP/1.1\r\n", Verdict::Http1),
            (b"CONNECT a:443 HTTP/1.1\r\n", Verdict::Http1),
            (b"CONNECT [::1]:443 HTTP/1.1\r\n", Verdict::Http1),
            (b"GET http://a/ HTTP/1.1\r\n", Verdict::Http1),
            (PREFACE, Verdict::Http2),
            (b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", Verdict::Opaque),
            (b"get key\r\n", Verdict::Opaque),
            (b"HELO mail.example\r\n", Verdict::Opaque),
            (b"SET a 0 0 5\r\n", Verdict::Opaque),
            (b"*1\r\n$4\r\nPING\r\n", Verdict::Opaque),
            (b"PING\r\n", Verdict::Opaque),
            (b"GET /x\r\n", Verdict::Opaque),
            (b"SSH-2.0-x\r\n", Verdict::Opaque),
            (b"\0\0\0\x08\x04\xd2\x16\x2f", Verdict::Opaque),
            (b"\x16\x02\x01", Verdict::Opaque),
            (b"\x16\x03\x01\x00\x05\x02abcd", Verdict::Opaque),
        ];
        for (bytes, verdict) in cases {
            assert_eq!(judge(bytes), *verdict, "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn every_split_waits_and_then_says_the_same() {
        let tls = records(&hello(Some("App.Example")), 7);
        let cases: [(&[u8], Verdict); 4] = [
            (b"DELETE /a/b?c HTTP/1.1\r\n", Verdict::Http1),
            (PREFACE, Verdict::Http2),
            (&tls, Verdict::Tls(Hello { server_name: Some("app.example".into()), mesh: false })),
            (b"PUT /x HTTP/1.1\n", Verdict::Http1),
        ];
        for (bytes, verdict) in cases {
            for n in 1..bytes.len() {
                assert!(matches!(judge(&bytes[..n]), Verdict::More(_)), "{}", bytes[..n].escape_ascii());
            }
            assert_eq!(judge(bytes), verdict);
        }
    }

    #[test]
    fn a_peer_is_known_by_its_protocol_name() {
        let with_alpn = |protocols: &[&[u8]]| {
            let list: Vec<u8> = protocols.iter().flat_map(|p| std::iter::once(p.len() as u8).chain(p.iter().copied())).collect();
            let mut extensions = vec![0, 16];
            extensions.extend((list.len() as u16 + 2).to_be_bytes());
            extensions.extend((list.len() as u16).to_be_bytes());
            extensions.extend(list);
            let mut body = vec![3, 3];
            body.extend([7; 32]);
            body.extend([0, 0, 2, 0x13, 1, 1, 0]);
            body.extend((extensions.len() as u16).to_be_bytes());
            body.extend(extensions);
            let mut handshake = vec![1, 0];
            handshake.extend((body.len() as u16).to_be_bytes());
            handshake.extend(body);
            records(&handshake, 900)
        };
        for (protocols, mesh) in [
            (&[b"weft-h2".as_slice()][..], true),
            (&[b"weft"], true),
            (&[b"h2", b"http/1.1"], false),
            (&[b"h2", b"weft-tcp"], true),
            (&[b"weft-other"], false),
            (&[], false),
        ] {
            assert_eq!(judge(&with_alpn(protocols)), Verdict::Tls(Hello { server_name: None, mesh }), "{protocols:?}");
        }
    }

    #[test]
    fn how_a_line_arrives_does_not_matter() {
        let line = b"CONNECT [::1]:4\x01\x0043 HTTP/1.1\r\n";
        assert_eq!((judge(&line[..17]), judge(line)), (Verdict::Opaque, Verdict::Opaque));
    }

    #[test]
    fn leanings() {
        assert_eq!(judge(b"GET /a"), Verdict::More(Leaning::Http1));
        assert_eq!(judge(b"GET"), Verdict::More(Leaning::Opaque));
        assert_eq!(judge(&records(&hello(None), 900)[..20]), Verdict::More(Leaning::Tls));
        assert_eq!(judge(&records(&hello(None), 900)), Verdict::Tls(Hello::default()));
        let long = [b"GET /".to_vec(), vec![b'a'; LINE + 1]].concat();
        assert_eq!(judge(&long), Verdict::Http1);
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 1..300), tls: bool) {
            let mut bytes = bytes;
            if tls {
                bytes.splice(0..0, [0x16, 3, 1, 0, 80, 1, 0, 0, 60]);
            }
            judge(&bytes);
        }
    }
}
