//! Connections to the app are reused, and that a reused one was just closed never surfaces.

mod support;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;
use support::{App, Peer, Proxy};
use weft_proxy::conn::Direction;
use weft_proxy::http::HttpVersion;
use weft_proxy::settings::Settings;

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";

fn expect_ok(client: &mut Peer, what: &str) {
    let (head, body) = client.message().unwrap_or_else(|| panic!("{what}: the connection ended"));
    assert!(head.starts_with("HTTP/1.1 200"), "{what}: {head}{}", String::from_utf8_lossy(&body));
    assert_eq!(body, b"ok", "{what}");
}

#[test]
fn one_connection_serves_many_clients_in_turn() {
    let (app, _received) = App::answering(OK);
    let proxy = Proxy::to(app.addr);
    for _ in 0..20 {
        let mut client = proxy.connect();
        for _ in 0..5 {
            client.send(GET);
            expect_ok(&mut client, "reuse");
        }
        client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc");
        expect_ok(&mut client, "reuse");
    }
    assert_eq!(app.accepted(), 1);
}

/// An app that closes every connection after one response, without a word, some at once and some a little later, so that its close
/// meets the next request at every stage.
#[test]
fn an_app_that_closes_without_saying_so_causes_no_error() {
    const CLIENTS: usize = 8;
    const EACH: usize = 1250;
    let app = App::new(|mut peer, number| {
        if peer.message().is_none() {
            return;
        }
        peer.send(OK);
        match number % 4 {
            0 => {}
            1 => thread::yield_now(),
            2 => thread::sleep(Duration::from_micros(50)),
            // This one reads the next request, too, and closes on it.
            _ => drop(peer.head()),
        }
    });
    let proxy = Proxy::to(app.addr);
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                let mut client = proxy.connect();
                for n in 0..EACH {
                    client.send(GET);
                    expect_ok(&mut client, &format!("request {n}"));
                }
            });
        }
    });
}

#[test]
fn a_post_finds_a_closed_connection_closed() {
    let app = App::new(|mut peer, _| {
        if peer.message().is_some() {
            peer.send(OK);
        }
    });
    let proxy = Proxy::to(app.addr);
    let mut client = proxy.connect();
    for n in 0..200 {
        client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc");
        expect_ok(&mut client, &format!("request {n}"));
        // The app's close has arrived, whether or not the proxy has looked.
        thread::sleep(Duration::from_millis(1));
    }
}

/// A POST that the app read before it died is not sent twice, an idempotent one is, once.
#[test]
fn only_what_may_be_repeated_is_repeated() {
    let seen = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&seen);
    let app = App::new(move |mut peer, _| {
        while let Some((head, _)) = peer.message() {
            if head.contains("/die") {
                count.fetch_add(1, Ordering::SeqCst);
                return;
            }
            peer.send(OK);
        }
    });
    let proxy = Proxy::to(app.addr);
    let mut client = proxy.connect();
    for (request, times) in [
        ("POST /die HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx", 1),
        ("POST /die HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", 1),
        ("PUT /die HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx", 1),
        ("GET /die HTTP/1.1\r\nHost: a\r\n\r\n", 2),
        ("DELETE /die HTTP/1.1\r\nHost: a\r\n\r\n", 2),
    ] {
        // Makes an idle connection, which the request will reuse.
        client.send(GET);
        expect_ok(&mut client, request);
        seen.store(0, Ordering::SeqCst);
        client.send(request);
        let (head, body) = client.message().unwrap();
        assert!(head.starts_with("HTTP/1.1 503"), "{request}: {head}");
        assert!(String::from_utf8(body).unwrap().contains("[UC]"), "{request}");
        assert_eq!(seen.load(Ordering::SeqCst), times, "{request}");
    }
}

#[test]
fn idle_connections_are_let_go() {
    let (ended, ends) = std::sync::mpsc::channel();
    let ended = std::sync::Mutex::new(ended);
    let app = App::new(move |mut peer, _| {
        peer.stream.set_read_timeout(None).unwrap();
        while peer.message().is_some() {
            peer.send(OK);
        }
        ended.lock().unwrap().send(()).unwrap();
    });
    let mut settings = Settings::default();
    settings.timeouts.pool_idle = Duration::from_millis(100);
    let proxy = Proxy::start(app.addr, HttpVersion::H1, Direction::Inbound, settings);
    let mut client = proxy.connect();
    client.send(GET);
    expect_ok(&mut client, "idle");
    ends.recv_timeout(Duration::from_secs(12)).expect("the idle connection is closed");
    client.send(GET);
    expect_ok(&mut client, "after");
}

#[test]
fn concurrent_requests_take_a_connection_each() {
    const N: usize = 16;
    let barrier = Arc::new(Barrier::new(N));
    let waiting = Arc::clone(&barrier);
    let app = App::new(move |mut peer, _| {
        while peer.message().is_some() {
            waiting.wait();
            peer.send(OK);
        }
    });
    let proxy = Proxy::to(app.addr);
    thread::scope(|scope| {
        for _ in 0..N {
            scope.spawn(|| {
                let mut client = proxy.connect();
                for _ in 0..3 {
                    client.send(GET);
                    expect_ok(&mut client, "concurrent");
                }
            });
        }
    });
    assert_eq!(app.accepted(), N);
}
