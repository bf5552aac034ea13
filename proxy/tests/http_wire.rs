//! HTTP/1 on the wire: what is forwarded, byte by byte, and what is refused.

mod support;

use std::time::{Duration, Instant};
use support::{App, Peer, Proxy, field, nobody};
use weft_proxy::conn::Direction;
use weft_proxy::http::HttpVersion;
use weft_proxy::settings::Settings;

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// What the client sends, what the app has to receive.
const FORWARDED: &[(&str, &str, &str)] = &[
    (
        "case and order of fields stay",
        "GET /a?b=c HTTP/1.1\r\nHOST: app\r\nx-LOWER: 1\r\nETag: w\r\nB: 2\r\nA: 3\r\nB: 4\r\n\r\n",
        "GET /a?b=c HTTP/1.1\r\nHOST: app\r\nx-LOWER: 1\r\nETag: w\r\nB: 2\r\nB: 4\r\nA: 3\r\n\r\n",
    ),
    (
        "hop-by-hop fields go, also nominated ones",
        "GET / HTTP/1.1\r\nConnection: close, X-Gone\r\nHost: app\r\nX-Gone: 1\r\nKeep-Alive: 3\r\nProxy-Connection: x\r\nX-Stays: 1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: app\r\nX-Stays: 1\r\n\r\n",
    ),
    (
        "a length and its body",
        "POST /p HTTP/1.1\r\nHost: app\r\nContent-Length: 5\r\n\r\nhello",
        "POST /p HTTP/1.1\r\nHost: app\r\nContent-Length: 5\r\n\r\nhello",
    ),
    (
        "a repeated equal length is one",
        "POST /p HTTP/1.1\r\nHost: app\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
        "POST /p HTTP/1.1\r\nHost: app\r\nContent-Length: 5\r\n\r\nhello",
    ),
    (
        "chunks, extensions dropped",
        "POST /p HTTP/1.1\r\nHost: app\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\n\r\n",
        "POST /p HTTP/1.1\r\nHost: app\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ),
    (
        "announced trailers of a request",
        "POST /p HTTP/1.1\r\nHost: app\r\nTransfer-Encoding: chunked\r\nTrailer: Sum\r\n\r\n2\r\nhi\r\n0\r\nSum: 7\r\n\r\n",
        "POST /p HTTP/1.1\r\nHost: app\r\nTransfer-Encoding: chunked\r\nTrailer: Sum\r\n\r\n2\r\nhi\r\n0\r\nsum: 7\r\n\r\n",
    ),
    (
        "an empty post",
        "POST /p HTTP/1.1\r\nHost: app\r\nContent-Length: 0\r\n\r\n",
        "POST /p HTTP/1.1\r\nHost: app\r\nContent-Length: 0\r\n\r\n",
    ),
    (
        "absolute form becomes origin form towards the app, its authority the Host",
        "GET http://real:80/x HTTP/1.1\r\nHost: other\r\n\r\n",
        "GET /x HTTP/1.1\r\nHost: real:80\r\n\r\n",
    ),
    ("OPTIONS *", "OPTIONS * HTTP/1.1\r\nHost: app\r\n\r\n", "OPTIONS * HTTP/1.1\r\nHost: app\r\n\r\n"),
    (
        "an unknown method and odd but valid targets",
        "PURGE /%7Ea//b/../c;d?e=[f]&g HTTP/1.1\r\nHost: app\r\n\r\n",
        "PURGE /%7Ea//b/../c;d?e=[f]&g HTTP/1.1\r\nHost: app\r\n\r\n",
    ),
    (
        "TE: trailers is kept and nominated anew",
        "GET / HTTP/1.1\r\nHost: app\r\nTE: trailers, deflate;q=0.5\r\nConnection: TE\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: app\r\nTE: trailers\r\nConnection: TE\r\n\r\n",
    ),
    (
        "an offer of h2c is ignored",
        "GET / HTTP/1.1\r\nHost: app\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: app\r\n\r\n",
    ),
    (
        "bytes beyond ASCII in values",
        "GET / HTTP/1.1\r\nHost: app\r\nX: caf\u{e9}\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: app\r\nX: caf\u{e9}\r\n\r\n",
    ),
    ("HTTP/1.0 becomes HTTP/1.1", "GET /old HTTP/1.0\r\nHost: app\r\n\r\n", "GET /old HTTP/1.1\r\nHost: app\r\n\r\n"),
];

/// As the app receives it: with chunks as they are on the wire.
fn raw_message(peer: &mut Peer) -> Option<String> {
    let head = peer.head()?;
    let body = if let Some(length) = field(&head, "content-length") {
        String::from_utf8(peer.exactly(length.parse().unwrap())).unwrap()
    } else if field(&head, "transfer-encoding").is_some() {
        let mut body = peer.until("0\r\n");
        loop {
            let line = peer.until("\r\n");
            body.push_str(&line);
            if line == "\r\n" {
                break body;
            }
        }
    } else {
        String::new()
    };
    Some(head + &body)
}

#[test]
fn requests_are_forwarded_as_the_table_says() {
    let (sender, received) = std::sync::mpsc::channel();
    let sender = std::sync::Mutex::new(sender);
    let app = App::new(move |mut peer, _| {
        while let Some(message) = raw_message(&mut peer) {
            sender.lock().unwrap().send(message).unwrap();
            peer.send(OK);
        }
    });
    let proxy = Proxy::to(app.addr);
    for (what, sent, expected) in FORWARDED {
        let mut client = proxy.connect();
        client.send(sent);
        let got = received.recv_timeout(support::PATIENCE).unwrap_or_else(|_| panic!("{what}: {:?}", client.rest()));
        assert_eq!(got, *expected, "{what}");
        let (head, body) = client.message().unwrap();
        assert!(
            head.ends_with("200 OK\r\ncontent-length: 2\r\n\r\n") || sent.contains("1.0") || sent.contains("close"),
            "{what}: {head}"
        );
        assert_eq!(body, b"ok");
    }
    // The same, byte by byte, and all in one pipeline on one connection.
    let mut client = proxy.connect();
    for (what, sent, expected) in FORWARDED.iter().filter(|(_, sent, _)| !sent.contains("1.0") && !sent.contains("close")) {
        for byte in sent.as_bytes() {
            client.send([*byte]);
        }
        // How the bytes of a body are cut into chunks is nobody's business.
        assert_eq!(joined(&received.recv_timeout(support::PATIENCE).unwrap()), joined(expected), "{what}, byte by byte");
        assert_eq!(client.message().unwrap().1, b"ok");
    }
    let pipeline: Vec<_> = FORWARDED.iter().filter(|(_, sent, _)| !sent.contains("1.0") && !sent.contains("close")).collect();
    client.send(pipeline.iter().map(|(_, sent, _)| *sent).collect::<String>());
    for (what, _, expected) in pipeline {
        assert_eq!(joined(&received.recv_timeout(support::PATIENCE).unwrap()), joined(expected), "{what}, in a pipeline");
        assert_eq!(client.message().unwrap().1, b"ok");
    }
}

/// A message with all of its chunks in one.
fn joined(message: &str) -> String {
    let Some((head, mut rest)) = message.split_once("\r\n\r\n") else { return message.to_owned() };
    if !head.to_lowercase().contains("transfer-encoding: chunked") {
        return message.to_owned();
    }
    let mut body = String::new();
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 {
            rest = after;
            break;
        }
        body.push_str(&after[..size]);
        rest = &after[size + 2..];
    }
    format!("{head}\r\n\r\n{body}\r\n0\r\n{rest}")
}

/// What the client sends, and how the answer begins. Nothing of it may reach the app as a request.
const REFUSED: &[(&str, &str, &str)] = &[
    (
        "length and chunks",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG",
        "400",
    ),
    (
        "chunks and length",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\nG",
        "400",
    ),
    ("two lengths", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\nContent-Length: 5\r\n\r\n0\r\n\r\nG", "400"),
    ("a list of lengths", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 5\r\n\r\nhello", "400"),
    ("a signed length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\nhello", "400"),
    ("a negative length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\nhello", "400"),
    ("a huge length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 184467440737095516160\r\n\r\nhello", "400"),
    ("an empty length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length:\r\n\r\nhello", "400"),
    ("a hexadecimal length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x5\r\n\r\nhello", "400"),
    ("a coding before chunked", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "400"),
    ("a coding after chunked", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", "400"),
    ("chunked twice", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", "400"),
    (
        "chunked in two fields",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "400",
    ),
    (
        "chunked and another field",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "400",
    ),
    ("not quite chunked", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", "400"),
    ("quoted chunked", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \"chunked\"\r\n\r\n0\r\n\r\n", "400"),
    ("vertical tab before chunked", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \u{b}chunked\r\n\r\n0\r\n\r\n", "400"),
    ("chunks in HTTP/1.0", "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400"),
    ("a space before the colon", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length : 5\r\n\r\nhello", "400"),
    (
        "a space before the colon of Transfer-Encoding",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        "400",
    ),
    ("a folded line", "GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n", "400"),
    ("a folded framing line", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", "400"),
    ("a first line that is folded", "GET / HTTP/1.1\r\n Host: a\r\n\r\n", "400"),
    ("a bare CR in a value", "GET / HTTP/1.1\r\nHost: a\r\nX: b\rContent-Length: 5\r\n\r\n", "400"),
    ("a bare CR as line end", "GET / HTTP/1.1\rHost: a\r\n\r\n", "400"),
    ("a bare LF as line end", "GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n", "400"),
    ("NUL in a value", "GET / HTTP/1.1\r\nHost: a\r\nX: b\0c\r\n\r\n", "400"),
    ("NUL in a name", "GET / HTTP/1.1\r\nHost: a\r\nX\0: b\r\n\r\n", "400"),
    ("NUL in the target", "GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n", "400"),
    ("a line without a colon", "GET / HTTP/1.1\r\nHost: a\r\nX\r\n\r\n", "400"),
    ("an empty name", "GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n", "400"),
    ("a bracket in a name", "GET / HTTP/1.1\r\nHost: a\r\nX(y): b\r\n\r\n", "400"),
    ("two spaces in the request line", "GET  / HTTP/1.1\r\nHost: a\r\n\r\n", "400"),
    ("a space in the target", "GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", "400"),
    ("no version", "GET /\r\nHost: a\r\n\r\n", "400"),
    ("a version to come", "GET / HTTP/3.0\r\nHost: a\r\n\r\n", "400"),
    ("no Host", "GET / HTTP/1.1\r\nA: b\r\n\r\n", "400"),
    ("two Hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", "400"),
    ("a Host with a path", "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", "400"),
    ("a Host with user information", "GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", "400"),
    ("two Hosts in one", "GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", "400"),
    ("an asterisk with GET", "GET * HTTP/1.1\r\nHost: a\r\n\r\n", "400"),
    ("an authority with GET", "GET a:80 HTTP/1.1\r\nHost: a\r\n\r\n", "400"),
    ("a path with CONNECT", "CONNECT /a HTTP/1.1\r\nHost: a\r\n\r\n", "400"),
    ("no HTTP at all", "\u{1}\u{2}\u{3}\r\n\r\n", "400"),
    ("a chunk size that is no number", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "400"),
    (
        "a chunk size with a prefix",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0x5\r\nhello\r\n0\r\n\r\n",
        "400",
    ),
    (
        "a chunk size with a sign",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n+5\r\nhello\r\n0\r\n\r\n",
        "400",
    ),
    ("an overflowing chunk size", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\n", "400"),
    ("an empty chunk size", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n\r\nhello\r\n0\r\n\r\n", "400"),
    ("a chunk line ended by LF", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\nhello\r\n0\r\n\r\n", "400"),
    (
        "a chunk extension ended by LF",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;a\nhello\r\n0\r\n\r\n",
        "400",
    ),
    (
        "a chunk longer than its size",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhello\r\n0\r\n\r\n",
        "400",
    ),
    ("a bad trailer", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nbad trailer\r\n\r\n", "400"),
];

#[test]
fn what_two_parties_could_read_differently_is_refused() {
    let (app, received) = App::answering(OK);
    let proxy = Proxy::to(app.addr);
    let smuggled = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";
    for (what, sent, status) in REFUSED {
        for piecewise in [false, true] {
            let mut client = proxy.connect();
            // A sound request first: its response must still come, in its turn.
            client.send("GET /sound HTTP/1.1\r\nHost: a\r\n\r\n");
            if piecewise {
                for byte in sent.as_bytes() {
                    if std::io::Write::write_all(&mut client.stream, &[*byte]).is_err() {
                        break;
                    }
                }
                let _ = std::io::Write::write_all(&mut client.stream, smuggled.as_bytes());
            } else {
                let _ = std::io::Write::write_all(&mut client.stream, [sent.as_bytes(), smuggled.as_bytes()].concat().as_slice());
            }
            let (sound, body) = client.message().unwrap_or_else(|| panic!("{what}: no answer to the first"));
            assert!(sound.starts_with("HTTP/1.1 200"), "{what}: {sound}");
            assert_eq!(body, b"ok");
            let rest = client.rest();
            assert!(rest.starts_with(&format!("HTTP/1.1 {status} ")), "{what} (piecewise: {piecewise}): {rest:?}");
            assert_eq!(rest.matches("HTTP/1.1 ").count(), 1, "{what}: more than one answer: {rest:?}");
        }
    }
    drop(proxy);
    let heads: Vec<String> = received.try_iter().map(|(head, _)| head).collect();
    assert!(heads.iter().all(|head| head.starts_with("GET /sound")), "reached the app: {heads:?}");
    assert_eq!(heads.len(), 2 * REFUSED.len());
}

#[test]
fn heads_have_limits() {
    let (app, received) = App::answering(OK);
    let proxy = Proxy::to(app.addr);
    let fields = |n: usize| (1..n).map(|n| format!("X-{n}: v\r\n")).collect::<String>();
    let cases: &[(String, &str)] = &[
        (format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", fields(200)), "200"),
        (format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", fields(201)), "431"),
        (format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "v".repeat(100_000)), "200"),
        (format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "v".repeat(110_000)), "431"),
        (format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}", "v".repeat(1_000_000)), "431"),
        (format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "v".repeat(70_000)), "414"),
    ];
    for (sent, status) in cases {
        let mut client = proxy.connect();
        let _ = std::io::Write::write_all(&mut client.stream, sent.as_bytes());
        let head = client.head().unwrap();
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{} bytes: {head}", sent.len());
        if *status != "200" {
            client.rest();
        }
    }
    drop(proxy);
    assert_eq!(received.try_iter().count(), 2);
}

/// What the app answers to which request, and what the client has to receive.
const ANSWERED: &[(&str, &str, &str, &str)] = &[
    (
        "reason, case and order stay; hop-by-hop fields go",
        "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "HTTP/1.1 299 Very Odd\r\nServer: x\r\nETag: y\r\nConnection: keep-alive, X-Gone\r\nKeep-Alive: timeout=5\r\nX-Gone: 1\r\nB: 1\r\nContent-Length: 2\r\n\r\nok",
        "HTTP/1.1 299 Very Odd\r\nServer: x\r\nETag: y\r\nB: 1\r\nContent-Length: 2\r\n\r\nok",
    ),
    (
        "HEAD has a length and no body",
        "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n",
    ),
    (
        "HEAD of what would be chunked (RFC 9112, section 6.1: the field may be left out)",
        "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n",
        "HTTP/1.1 200 OK\r\nA: b\r\nTransfer-Encoding: chunked\r\n\r\n",
        "HTTP/1.1 200 OK\r\nA: b\r\n\r\n",
    ),
    (
        "204",
        "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "HTTP/1.1 204 No Content\r\nA: b\r\n\r\n",
        "HTTP/1.1 204 No Content\r\nA: b\r\n\r\n",
    ),
    (
        // hyper leaves the length out, as RFC 9110 (section 8.6) allows.
        "304 with the length of the whole",
        "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "HTTP/1.1 304 Not Modified\r\nETag: e\r\nContent-Length: 77\r\n\r\n",
        "HTTP/1.1 304 Not Modified\r\nETag: e\r\n\r\n",
    ),
    (
        "chunks",
        "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    ),
    (
        "trailers, announced and wanted",
        "GET / HTTP/1.1\r\nHost: a\r\nTE: trailers\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTrailer: Sum\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nSum: 5\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTrailer: Sum\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nsum: 5\r\n\r\n",
    ),
    (
        "an informational response before the final one",
        "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    ),
    (
        "an app that asks to close closes for itself",
        "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    ),
];

#[test]
fn responses_are_passed_on_as_the_table_says() {
    for (what, request, answer, expected) in ANSWERED {
        let (app, _received) = App::answering(*answer);
        let proxy = Proxy::to(app.addr);
        let mut client = proxy.connect();
        // Twice: the second shows that the framing of the first was understood on both sides.
        for _ in 0..2 {
            client.send(request);
            let got = String::from_utf8(client.exactly(expected.len())).unwrap();
            assert_eq!(got, *expected, "{what}");
        }
        assert!(client.buffer.is_empty(), "{what}: {:?}", String::from_utf8_lossy(&client.buffer));
    }
}

#[test]
fn a_body_that_ends_with_the_connection() {
    let app = App::new(|mut peer, _| {
        if peer.message().is_some() {
            peer.send("HTTP/1.1 200 OK\r\nA: b\r\n\r\nsome bytes");
        }
    });
    let proxy = Proxy::to(app.addr);
    let mut client = proxy.connect();
    for _ in 0..2 {
        client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
        let (head, body) = client.message().unwrap();
        assert_eq!(field(&head, "transfer-encoding"), Some("chunked"));
        assert_eq!(body, b"some bytes");
    }
}

#[test]
fn clients_of_http_1_0() {
    let (app, _received) = App::answering("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n");
    let proxy = Proxy::to(app.addr);
    let mut client = proxy.connect();
    client.send("GET / HTTP/1.0\r\n\r\n");
    let all = client.rest();
    assert!(all.starts_with("HTTP/1.0 200 OK\r\n") && all.ends_with("\r\n\r\nok"), "{all:?}");
    assert!(!all.to_lowercase().contains("transfer-encoding"), "{all:?}");

    let (app, received) = App::answering(OK);
    let proxy = Proxy::to(app.addr);
    let mut client = proxy.connect();
    for _ in 0..2 {
        client.send("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
        let (head, body) = client.message().unwrap();
        assert!(head.starts_with("HTTP/1.0 200") && field(&head, "connection") == Some("keep-alive"), "{head:?}");
        assert_eq!(body, b"ok");
        let (seen, _) = received.recv_timeout(support::PATIENCE).unwrap();
        assert_eq!(field(&seen, "host"), Some(app.addr.to_string().as_str()));
    }
}

#[test]
fn apps_that_cannot_be_used_become_5xx() {
    let proxy = Proxy::to(nobody());
    let mut client = proxy.connect();
    for _ in 0..2 {
        client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
        let (head, body) = client.message().unwrap();
        assert!(head.starts_with("HTTP/1.1 503 "), "{head}");
        assert!(String::from_utf8(body).unwrap().contains("[UF]"));
        client.send("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n");
        assert!(client.head().unwrap().starts_with("HTTP/1.1 503 "));
    }
    let malformed = [
        ("no status", "HTTP/1.1 OK\r\n\r\n", "502"),
        ("no HTTP", "SSH-2.0-OpenSSH_9.9\r\n\r\n", "502"),
        ("two lengths", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok!", "502"),
        ("a length and chunks", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "502"),
        ("an unknown coding", "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "502"),
        ("a folded line", "HTTP/1.1 200 OK\r\nA: b\r\n c\r\nContent-Length: 2\r\n\r\nok", "502"),
        ("NUL in a value", "HTTP/1.1 200 OK\r\nA: b\0c\r\nContent-Length: 2\r\n\r\nok", "502"),
        ("an upgrade that nobody asked for", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", "502"),
        ("nothing", "", "503"),
        ("half a head", "HTTP/1.1 200 OK\r\nContent-Le", "50"),
    ];
    for (what, answer, status) in malformed {
        let app = App::new(move |mut peer, _| {
            if peer.message().is_some() {
                peer.send(answer);
            }
        });
        let proxy = Proxy::to(app.addr);
        let mut client = proxy.connect();
        for method in ["GET", "POST"] {
            client.send(format!("{method} / HTTP/1.1\r\nHost: a\r\n\r\n"));
            let (head, body) = client.message().unwrap();
            assert!(head.starts_with(&format!("HTTP/1.1 {status}")), "{what}: {head}{}", String::from_utf8_lossy(&body));
        }
    }
}

#[test]
fn slow_heads_are_timed_out_and_idle_connections_are_not() {
    let (app, _received) = App::answering(OK);
    let mut settings = Settings::default();
    settings.timeouts.request_header = Duration::from_millis(300);
    let proxy = Proxy::start(app.addr, HttpVersion::H1, Direction::Inbound, settings);
    let mut client = proxy.connect();
    let begun = Instant::now();
    for byte in "GET / HTTP/1.1\r\nHost: a\r\nX: 1234567890".bytes() {
        if std::io::Write::write_all(&mut client.stream, &[byte]).is_err() {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let rest = client.rest();
    assert!(rest.starts_with("HTTP/1.1 408 "), "{rest:?}");
    assert!(begun.elapsed() < Duration::from_secs(3));

    let mut client = proxy.connect();
    std::thread::sleep(Duration::from_millis(600));
    for _ in 0..3 {
        client.send("GET / HTTP/1.1\r\nHo");
        std::thread::sleep(Duration::from_millis(100));
        client.send("st: a\r\n\r\n");
        assert_eq!(client.message().unwrap().1, b"ok");
        std::thread::sleep(Duration::from_millis(600));
    }
}

#[test]
fn a_drain_ends_connections_after_their_request() {
    let app = App::new(|mut peer, _| {
        while peer.message().is_some() {
            std::thread::sleep(Duration::from_millis(300));
            peer.send(OK);
        }
    });
    let proxy = Proxy::to(app.addr);
    let mut idle = proxy.connect();
    idle.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    idle.message().unwrap();
    let mut busy = proxy.connect();
    busy.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    std::thread::sleep(Duration::from_millis(100));
    proxy.drain.start();
    assert_eq!(idle.rest(), "");
    let (head, body) = busy.message().unwrap();
    assert_eq!((field(&head, "connection"), &body[..]), (Some("close"), &b"ok"[..]));
    assert_eq!(busy.rest(), "");
    let started = Instant::now();
    while proxy.drain.open() > 0 {
        assert!(started.elapsed() < support::PATIENCE);
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A connection that pauses gives its buffers back in between; the client must not see that.
#[test]
fn a_connection_goes_on_after_a_pause() {
    let (app, _) = App::answering(OK);
    let proxy = Proxy::to(app.addr);
    let mut client = proxy.connect();
    let pause = || std::thread::sleep(Duration::from_millis(350));
    let get = b"GET / HTTP/1.1\r\nHost: app\r\n\r\n";
    pause();
    for cut in [get.len(), 1, 20, get.len() - 1] {
        client.send(&get[..cut]);
        if cut < get.len() {
            // In the middle of a head nothing may be thrown away.
            pause();
            client.send(&get[cut..]);
        }
        assert_eq!(client.message().unwrap().1, b"ok", "head cut at {cut}");
        pause();
    }
    // Empty lines between messages are passed over, also where a pause follows.
    client.send("\r\n");
    pause();
    client.send(get.repeat(2));
    assert_eq!((client.message().unwrap().1, client.message().unwrap().1), (b"ok".to_vec(), b"ok".to_vec()));
    pause();
    client.half_close();
    assert_eq!(client.rest(), "");
}

/// A drain also ends connections that pause.
#[test]
fn a_drain_ends_a_connection_that_pauses() {
    let (app, _) = App::answering(OK);
    let proxy = Proxy::to(app.addr);
    let mut client = proxy.connect();
    client.send("GET / HTTP/1.1\r\nHost: app\r\n\r\n");
    client.message().unwrap();
    std::thread::sleep(Duration::from_millis(350));
    let begun = Instant::now();
    proxy.drain.start();
    assert_eq!(client.rest(), "");
    assert!(begun.elapsed() < Duration::from_secs(2));
}
