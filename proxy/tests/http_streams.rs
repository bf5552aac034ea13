//! Bodies that stream, 100-continue, upgrades, CONNECT, half-closes: HTTP/1 where time matters.

mod support;

use proptest::prelude::*;
use std::io::{Read, Write};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};
use support::{App, PATIENCE, Peer, Proxy, field};
use weft_proxy::conn::Direction;
use weft_proxy::http::HttpVersion;
use weft_proxy::settings::Settings;

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

#[test]
fn the_apps_100_reaches_the_client_and_not_before() {
    let (asked, asks) = mpsc::channel();
    let asked = std::sync::Mutex::new(asked);
    let app = App::new(move |mut peer, _| {
        while let Some(head) = peer.head() {
            assert_eq!(field(&head, "expect"), Some("100-continue"));
            asked.lock().unwrap().send(Instant::now()).unwrap();
            thread::sleep(Duration::from_millis(200));
            peer.send("HTTP/1.1 100 Continue\r\n\r\n");
            assert_eq!(peer.exactly(5), b"hello");
            peer.send(OK);
        }
    });
    let proxy = Proxy::to(app.addr);
    let mut client = proxy.connect();
    for _ in 0..2 {
        client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n");
        let received = asks.recv_timeout(PATIENCE).unwrap();
        assert_eq!(client.head().unwrap(), "HTTP/1.1 100 Continue\r\n\r\n");
        assert!(received.elapsed() >= Duration::from_millis(190), "the 100 came before the app said it");
        client.send("hello");
        assert_eq!(client.message().unwrap().1, b"ok");
    }
}

#[test]
fn an_app_may_refuse_instead_of_continuing() {
    let app = App::new(|mut peer, _| {
        if peer.head().is_some() {
            peer.send("HTTP/1.1 417 Expectation Failed\r\nContent-Length: 2\r\n\r\nno");
            peer.rest();
        }
    });
    let proxy = Proxy::to(app.addr);
    let mut client = proxy.connect();
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n");
    let (head, body) = client.message().unwrap();
    assert!(head.starts_with("HTTP/1.1 417"), "{head}");
    assert_eq!((field(&head, "connection"), &body[..]), (Some("close"), &b"no"[..]));
    assert_eq!(client.rest(), "");
}

#[test]
fn an_app_that_ignores_expect_gets_the_body_all_the_same() {
    let (app, received) = App::answering(OK);
    let proxy = Proxy::to(app.addr);
    let mut client = proxy.connect();
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n");
    // The client's own patience ends.
    thread::sleep(Duration::from_millis(200));
    client.send("hello");
    let first = client.head().unwrap();
    let head = if first.starts_with("HTTP/1.1 100") { client.head().unwrap() } else { first };
    assert!(head.starts_with("HTTP/1.1 200"));
    assert_eq!(received.recv_timeout(PATIENCE).unwrap().1, b"hello");
}

#[test]
fn a_websocket_is_a_tunnel_with_half_close() {
    let app = App::new(|mut peer, _| {
        let Some(head) = peer.head() else { return };
        assert_eq!((field(&head, "upgrade"), field(&head, "connection")), (Some("websocket"), Some("upgrade")));
        // The first bytes of the new protocol come together with the response.
        peer.send("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: x\r\n\r\nhello");
        let mut seen = std::mem::take(&mut peer.buffer);
        loop {
            peer.send(&seen);
            seen.clear();
            if !peer.fill() {
                break;
            }
            seen.append(&mut peer.buffer);
        }
        // The client has half-closed; this direction still works.
        peer.send("bye");
    });
    let proxy = Proxy::to(app.addr);
    let mut client = proxy.connect();
    // A request before, on the same connection, and early bytes behind the head of the upgrade.
    client.send(
        "GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n\r\nearly",
    );
    let head = client.head().unwrap();
    assert!(head.starts_with("HTTP/1.1 101 Switching Protocols\r\n"), "{head}");
    assert_eq!(field(&head, "upgrade"), Some("websocket"));
    assert!(field(&head, "connection").unwrap().eq_ignore_ascii_case("upgrade"));
    assert_eq!(field(&head, "sec-websocket-accept"), Some("x"));
    assert_eq!(client.exactly(10), b"helloearly");
    for n in 0..100_u32 {
        let frame = [b"\0\r\n\n\x81".as_slice(), &n.to_be_bytes(), &vec![7; n as usize * 13]].concat();
        client.send(&frame);
        assert_eq!(client.exactly(frame.len()), frame);
    }
    client.half_close();
    assert_eq!(client.rest(), "bye");
}

#[test]
fn a_declined_upgrade_is_an_ordinary_response() {
    let (app, _received) = App::answering(OK);
    let proxy = Proxy::to(app.addr);
    let mut client = proxy.connect();
    client.send("GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n");
    let (head, body) = client.message().unwrap();
    assert!(head.starts_with("HTTP/1.1 200"));
    // What follows such a request is not known to be HTTP.
    assert_eq!((field(&head, "connection"), &body[..]), (Some("close"), &b"ok"[..]));
    assert_eq!(client.rest(), "");
}

#[test]
fn connect_is_a_tunnel() {
    let app = App::new(|mut peer, _| {
        let Some(head) = peer.head() else { return };
        assert!(head.starts_with("CONNECT far:443 HTTP/1.1\r\n"), "{head}");
        peer.send("HTTP/1.1 200 Connection established\r\n\r\n");
        let got = peer.exactly(4);
        peer.send([b"got ".as_slice(), &got].concat());
    });
    let proxy = Proxy::start(app.addr, HttpVersion::Auto, Direction::Outbound, Settings::default());
    let mut client = proxy.connect();
    client.send("CONNECT far:443 HTTP/1.1\r\nHost: far:443\r\n\r\n");
    assert!(client.head().unwrap().starts_with("HTTP/1.1 200"));
    client.send("\x16\x03\x01\n");
    assert_eq!(client.rest(), "got \x16\x03\x01\n");
}

#[test]
fn a_half_close_after_the_request_is_passed_on_and_the_response_comes() {
    let (half, halves) = mpsc::channel();
    let half = std::sync::Mutex::new(half);
    let app = App::new(move |mut peer, _| {
        if peer.message().is_some() {
            // Sees the client's half-close as it would without a proxy.
            half.lock().unwrap().send(!peer.fill()).unwrap();
            peer.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n");
            thread::sleep(Duration::from_millis(100));
            peer.send("0\r\n\r\n");
        }
    });
    let proxy = Proxy::to(app.addr);
    for _ in 0..3 {
        let mut client = proxy.connect();
        client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
        client.half_close();
        let all = client.rest();
        assert!(all.starts_with("HTTP/1.1 200") && all.ends_with("ok\r\n0\r\n\r\n"), "{all}");
        assert!(halves.recv_timeout(PATIENCE).unwrap());
    }
}

#[test]
fn a_client_that_resets_ends_the_request_at_the_app() {
    let (end, ends) = mpsc::channel();
    let end = std::sync::Mutex::new(end);
    let app = App::new(move |mut peer, _| {
        if peer.message().is_some() {
            peer.fill();
            end.lock().unwrap().send(()).unwrap();
        }
    });
    let proxy = Proxy::to(app.addr);
    let mut client = proxy.connect();
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    thread::sleep(Duration::from_millis(100));
    nix::sys::socket::setsockopt(&client.stream, nix::sys::socket::sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })
        .unwrap();
    drop(client);
    ends.recv_timeout(PATIENCE).expect("the app's connection ends");
}

#[test]
fn bodies_stream_both_ways_at_once() {
    let app = App::new(|mut peer, _| {
        let Some(_) = peer.head() else { return };
        peer.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
        // Echoes each chunk when it has it, before the request is over.
        loop {
            let size = peer.until("\r\n");
            let n = usize::from_str_radix(size.trim(), 16).unwrap();
            let data = peer.exactly(n + 2);
            peer.send([size.as_bytes(), &data].concat());
            if n == 0 {
                return;
            }
        }
    });
    let proxy = Proxy::to(app.addr);
    let mut client = proxy.connect();
    client.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n");
    assert!(client.head().unwrap().starts_with("HTTP/1.1 200"));
    for n in 1..50 {
        let chunk = format!("{n:X}\r\n{}\r\n", "x".repeat(n));
        client.send(&chunk);
        assert_eq!(client.exactly(chunk.len()), chunk.as_bytes());
    }
    client.send("0\r\n\r\n");
    assert_eq!(client.until("0\r\n\r\n"), "0\r\n\r\n");
}

fn rss() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

/// 200 MB up, then 200 MB down, and memory stays where it was; also while the receiver does not read at all.
#[test]
fn large_bodies_take_no_memory() {
    const SIZE: usize = 200 * 1024 * 1024;
    const BLOCK: usize = 256 * 1024;
    let app = App::new(|mut peer, _| {
        let Some(head) = peer.head() else { return };
        let mut left = field(&head, "content-length").unwrap().parse::<usize>().unwrap() - peer.buffer.len();
        // Not reading for a while: the proxy must not read on for us.
        thread::sleep(Duration::from_millis(500));
        let mut block = vec![0; BLOCK];
        while left > 0 {
            left -= peer.stream.read(&mut block).unwrap();
        }
        peer.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n"));
        for _ in 0..SIZE / BLOCK {
            peer.send(&block);
        }
    });
    let proxy = Proxy::to(app.addr);
    let mut client = proxy.connect();
    client.send(format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {SIZE}\r\n\r\n"));
    let mut block = vec![0; BLOCK];
    let before = rss();
    let mut most = before;
    for _ in 0..SIZE / BLOCK {
        client.send(&block);
        most = most.max(rss());
    }
    client.head().unwrap();
    thread::sleep(Duration::from_millis(500));
    most = most.max(rss());
    let mut left = SIZE - client.buffer.len();
    while left > 0 {
        left -= client.stream.read(&mut block).unwrap();
        most = most.max(rss());
    }
    let grown = most.saturating_sub(before);
    assert!(grown < 8 * 1024 * 1024, "resident memory grew by {grown} bytes");
}

#[test]
fn idle_connections_are_small() {
    const N: usize = 400;
    let (app, _received) = App::answering(OK);
    let proxy = Proxy::to(app.addr);
    let mut warm: Vec<Peer> = (0..50).map(|_| proxy.connect()).collect();
    for client in &mut warm {
        client.send("GET / HTTP/1.1\r\nHost: a\r\nUser-Agent: test\r\nAccept: */*\r\n\r\n");
        client.message().unwrap();
    }
    let before = rss();
    let mut clients = Vec::new();
    for _ in 0..N {
        let mut client = proxy.connect();
        client.send("GET / HTTP/1.1\r\nHost: a\r\nUser-Agent: test\r\nAccept: */*\r\n\r\n");
        client.message().unwrap();
        // The test's own buffer is not what is measured.
        client.buffer = Vec::new();
        clients.push(client);
    }
    let each = rss().saturating_sub(before) / N;
    assert!(each < 15 * 1024, "{each} bytes per idle connection");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Any body, cut into any chunks and any writes, arrives as it is; and so does what the app echoes.
    #[test]
    fn bodies_arrive_identically(
        chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..3000), 0..20),
        cut in 1usize..5000,
        by_length: bool,
    ) {
        thread_local! {
            static PROXY: Proxy = Proxy::to(echo());
        }
        let body = chunks.concat();
        let mut wire = Vec::new();
        if by_length {
            write!(wire, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", body.len()).unwrap();
            wire.extend(&body);
        } else {
            write!(wire, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap();
            for chunk in &chunks {
                write!(wire, "{:X};e=1\r\n", chunk.len()).unwrap();
                wire.extend(chunk);
                wire.extend(b"\r\n");
            }
            wire.extend(b"0\r\n\r\n");
        }
        let mut client = PROXY.with(Proxy::connect);
        for piece in wire.chunks(cut) {
            client.send(piece);
        }
        let (head, echoed) = client.message().unwrap();
        prop_assert!(head.starts_with("HTTP/1.1 200"));
        prop_assert_eq!(echoed, body);
    }
}

/// Echoes bodies, framed as they came.
fn echo() -> std::net::SocketAddr {
    let app = App::new(|mut peer, _| {
        peer.stream.set_read_timeout(None).unwrap();
        while let Some((head, body)) = peer.message() {
            if field(&head, "content-length").is_some() {
                peer.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len()));
                peer.send(body);
            } else {
                peer.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
                if !body.is_empty() {
                    peer.send(format!("{:x}\r\n", body.len()));
                    peer.send(body);
                    peer.send("\r\n");
                }
                peer.send("0\r\n\r\n");
            }
        }
    });
    app.addr
}
