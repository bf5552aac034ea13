//! The built binary on loopback: what becomes of connections that are not HTTP, the admin port, the end of the process.

mod binary;

use binary::{PATIENCE, Proxy, free, server};
use socket2::SockRef;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
}

/// Says everything back once the client has ended.
fn echo_at_the_end(mut stream: TcpStream) {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    stream.write_all(&all).unwrap();
}

fn echo(mut stream: TcpStream) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(n @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..n]).is_err() {
            return;
        }
    }
}

#[test]
fn a_half_close_leaves_the_other_way_open() {
    for protocol in ["tcp", "detect"] {
        let proxy = Proxy::start(server(echo_at_the_end), protocol, "", None);
        let mut client = proxy.connect();
        client.write_all(b"*1\r\nhello").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut back = String::new();
        client.read_to_string(&mut back).unwrap();
        assert_eq!(back, "*1\r\nhello");
        proxy.expect_metric("istio_tcp_received_bytes_total{", " 9");
        proxy.expect_metric("weft_proxy_connections_open{direction=\"outbound\"}", " 0");
    }
}

#[test]
fn bytes_arrive_once_however_they_are_cut() {
    let proxy = Proxy::start(server(echo_at_the_end), "detect", "timeouts: {detect: 300ms}", None);
    let beginnings: [&[u8]; 6] = [
        b"\x16\x03\x01\x00\x30\x01\x00\x00\x2cabcdefgh",
        b"GET",
        b"GET /x\r\nrest",
        b"PRI * HTTP/2.0\r\nx",
        b"P",
        b"\x00\x01binary",
    ];
    thread::scope(|scope| {
        for (number, beginning) in beginnings.into_iter().enumerate() {
            for cut in 0..beginning.len() {
                // Every cut with another pause: none, shorter and longer than the silence that is waited for.
                let pause = Duration::from_millis([0, 1, 12][(cut + number) % 3]);
                let proxy = &proxy;
                scope.spawn(move || {
                    let mut client = proxy.connect();
                    thread::sleep(pause);
                    client.write_all(&beginning[..cut]).unwrap();
                    thread::sleep(pause);
                    client.write_all(&beginning[cut..]).unwrap();
                    client.shutdown(Shutdown::Write).unwrap();
                    let mut back = Vec::new();
                    client.read_to_end(&mut back).unwrap();
                    assert_eq!(back, beginning, "cut at {cut}");
                });
            }
        }
    });
}

#[test]
fn bulk_arrives_whole_both_ways_at_once() {
    let proxy = Proxy::start(server(echo), "detect", "", None);
    let data: Vec<u8> = (0..24_000_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut client = proxy.connect();
    let mut sender = client.try_clone().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            sender.write_all(&data).unwrap();
            sender.shutdown(Shutdown::Write).unwrap();
        });
        let mut back = Vec::new();
        client.read_to_end(&mut back).unwrap();
        assert!(back == data, "{} of {} bytes came back, or others", back.len(), data.len());
    });
}

#[test]
fn a_server_that_speaks_first_is_heard_at_once() {
    let greeting = server(|mut stream| {
        stream.write_all(b"220 ready\r\n").unwrap();
        echo(stream);
    });
    let proxy = Proxy::start(greeting, "detect", "", None);
    let mut client = proxy.connect();
    let begun = Instant::now();
    let mut back = [0; 11];
    client.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"220 ready\r\n");
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    client.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    let mut back = [0; 16];
    client.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"GET / HTTP/1.1\r\n", "nothing is looked into any more");
    proxy.expect_metric("weft_proxy_connections_total{direction=\"outbound\",protocol=\"server-first\"}", " 1");
}

#[test]
fn resets_are_passed_on() {
    // By the server.
    let (told, heard) = mpsc::channel();
    let resetting = server(move |mut stream| {
        let mut byte = [0];
        if stream.read(&mut byte).is_ok_and(|n| n == 1) && byte[0] == b'r' {
            return reset(stream);
        }
        told.send(stream.read(&mut byte).map_err(|error| error.kind())).unwrap();
    });
    let proxy = Proxy::start(resetting, "tcp", "", None);
    let mut client = proxy.connect();
    client.write_all(b"r").unwrap();
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    proxy.expect_metric("istio_tcp_connections_closed_total{", " 1");
    assert!(proxy.get("/metrics").unwrap().contains("response_flags=\"UC\""));
    // By the client, in the middle and after its half-close.
    for half in [false, true] {
        let mut client = proxy.connect();
        client.write_all(b"x").unwrap();
        if half {
            client.shutdown(Shutdown::Write).unwrap();
        }
        thread::sleep(Duration::from_millis(50));
        reset(client);
        let end = heard.recv_timeout(PATIENCE).unwrap();
        if half {
            assert_eq!(end, Ok(0));
        } else {
            assert_eq!(end, Err(ErrorKind::ConnectionReset));
        }
        proxy.expect_metric("weft_proxy_connections_open{direction=\"outbound\"}", " 0");
    }
}

#[test]
fn a_destination_that_refuses_resets_the_client() {
    let proxy = Proxy::start(free(), "tcp", "", None);
    let mut client = proxy.connect();
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    proxy.expect_metric("weft_proxy_connect_failures_total", " 1");
    // Opened and closed under the same labels.
    let page = proxy.get("/stats/prometheus").unwrap();
    let series = |name: &str| -> Vec<String> {
        page.lines().filter_map(|line| line.strip_prefix(name)).filter(|line| !line.ends_with(" 0")).map(str::to_owned).collect()
    };
    let opened = series("istio_tcp_connections_opened_total");
    assert!(opened.len() == 1 && opened[0].contains("response_flags=\"UF\""), "{page}");
    assert_eq!(opened, series("istio_tcp_connections_closed_total"));
}

#[test]
fn a_connection_to_the_proxy_itself_is_refused_and_counted() {
    let port = free().port();
    let more = format!("addresses: [127.0.0.1]\n# and one without a fixed upstream\nports: {{{port}: tcp}}");
    let upstream = server(echo);
    let mut proxy = Proxy::start(upstream, "tcp", &more, None);
    // The same with a transparent listener, to which nobody redirects: its own address is the original destination.
    let file = proxy.dir.path().join("loop.yaml");
    let (addr, admin) = (free(), free());
    std::fs::write(&file, format!("listeners: [{{address: {addr}, direction: outbound}}]\nadmin: {admin}")).unwrap();
    proxy.child.kill().unwrap();
    proxy.child.wait().unwrap();
    proxy.child =
        Command::new(env!("CARGO_BIN_EXE_weft-proxy")).arg("--config").arg(&file).stderr(Stdio::piped()).spawn().unwrap();
    (proxy.addr, proxy.admin) = (addr, admin);
    let begun = Instant::now();
    while proxy.get("/healthz/ready").is_none() {
        assert!(begun.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(5));
    }
    let mut client = proxy.connect();
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    proxy.expect_metric("weft_proxy_loops_refused_total", " 1");
}

#[test]
fn http_goes_through_and_is_counted() {
    let app = server(|mut stream| {
        let mut buffer = [0; 4096];
        while let Ok(1..) = stream.read(&mut buffer) {
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello").unwrap();
        }
    });
    let proxy = Proxy::start(app, "detect", "", None);
    let mut client = proxy.connect();
    // After a silence: the destination is connected ahead, and HTTP it is all the same.
    thread::sleep(Duration::from_millis(50));
    client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").unwrap();
    let mut back = String::new();
    client.read_to_string(&mut back).unwrap();
    assert!(back.starts_with("HTTP/1.1 200 OK\r\n") && back.ends_with("hello"), "{back}");
    proxy.expect_metric("istio_requests_total{reporter=\"source\"", " 1");
    proxy.expect_metric("istio_request_duration_milliseconds_count{", " 1");
}

#[test]
fn it_is_small_and_soon_ready() {
    let proxy = Proxy::start(
        server(|stream| thread::park_timeout(PATIENCE + Duration::from_secs(u64::from(stream.ttl().unwrap())))),
        "tcp",
        "",
        None,
    );
    // The goal is 100 ms for an optimised build on a free machine; this is neither.
    assert!(proxy.ready_after < Duration::from_secs(2), "{:?}", proxy.ready_after);
    drop(proxy);

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = Proxy::start(listener.local_addr().unwrap(), "tcp", "", None);
    let (count, mut held) = (400, Vec::new());
    let warm = |held: &mut Vec<TcpStream>, count: usize| {
        for _ in 0..count {
            let mut client = proxy.connect();
            let (mut server, _) = listener.accept().unwrap();
            client.write_all(b"x").unwrap();
            server.read_exact(&mut [0]).unwrap();
            held.extend([client, server]);
        }
    };
    warm(&mut held, 20);
    let before = proxy.resident();
    warm(&mut held, count);
    let each = (proxy.resident() - before) / count as u64;
    assert!(each < 15 * 1024, "{each} bytes per idle connection");
    println!("idle: {before} bytes, {each} per connection, ready after {:?}", proxy.ready_after);
}

/// Connects clients that are silent. Returns them, and what each costs in bytes of memory.
fn silent_clients(proxy: &Proxy, count: usize) -> (Vec<TcpStream>, u64) {
    let settled = |connections: usize| {
        proxy.expect_metric("weft_proxy_connections_open{direction=\"outbound\"}", &format!(" {connections}"));
        proxy.resident()
    };
    let mut held: Vec<_> = (0..20).map(|_| proxy.connect()).collect();
    let before = settled(20);
    held.extend((0..count).map(|_| proxy.connect()));
    let each = (settled(20 + count) - before) / count as u64;
    (held, each)
}

#[test]
fn silent_clients_of_http_cost_little_and_are_served_whenever_they_speak() {
    let app = server(|mut stream| {
        let mut buffer = [0; 4096];
        while let Ok(1..) = stream.read(&mut buffer) {
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello").unwrap();
        }
    });
    for protocol in ["http1", "http", "http2"] {
        let proxy = Proxy::start(app, protocol, "timeouts: {requestHeader: 200ms}", None);
        let (mut silent, each) = silent_clients(&proxy, 400);
        println!("{protocol}: {each} bytes per silent connection");
        assert!(each < 10 * 1024, "{protocol}: {each} bytes per silent connection");
        // Longer than a head may take.
        thread::sleep(Duration::from_millis(600));
        let mut client = silent.swap_remove(0);
        if protocol == "http2" {
            client.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").unwrap();
            let mut settings = [0; 9];
            client.read_exact(&mut settings).unwrap();
            assert_eq!(settings[3], 4, "SETTINGS");
        } else {
            client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").unwrap();
            let mut back = String::new();
            client.read_to_string(&mut back).unwrap();
            assert!(back.starts_with("HTTP/1.1 200 OK\r\n"), "{back}");
        }
        // Whoever has begun has to end.
        let mut client = proxy.connect();
        client.write_all(if protocol == "http1" { b"GET / HT" } else { b"PRI * HT" }).unwrap();
        let begun = Instant::now();
        let mut back = String::new();
        client.read_to_string(&mut back).unwrap();
        assert!((Duration::from_millis(150)..PATIENCE).contains(&begun.elapsed()), "{:?}", begun.elapsed());
        assert_eq!(back.starts_with("HTTP/1.1 408 "), protocol == "http1", "{back}");
    }
}

#[test]
fn a_silent_client_does_not_hold_up_the_end() {
    for protocol in ["http1", "http", "http2"] {
        let mut proxy = Proxy::start(server(echo), protocol, "timeouts: {drain: 10m}", None);
        let mut client = proxy.connect();
        proxy.expect_metric("weft_proxy_connections_open{direction=\"outbound\"}", " 1");
        proxy.signal(nix::sys::signal::Signal::SIGTERM);
        assert_eq!(client.read(&mut [0]).unwrap(), 0, "closed in good order");
        let (status, log) = proxy.end();
        assert_eq!(status.code(), Some(0), "{log}");
    }
}

#[test]
fn running_out_of_descriptors_pauses_and_heals() {
    let proxy = Proxy::start(server(echo), "tcp", "", Some(64));
    let mut held: Vec<_> = (0..80).map(|_| proxy.connect()).collect();
    thread::sleep(Duration::from_millis(300));
    held.drain(..70);
    for client in &mut held {
        client.write_all(b"still").unwrap();
        let mut back = [0; 5];
        client.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"still");
    }
}

#[test]
fn the_admin_port_minds_methods() {
    let proxy = Proxy::start(server(echo), "tcp", "", None);
    for path in ["/quitquitquit", "/drain"] {
        assert!(proxy.get(path).unwrap().starts_with("HTTP/1.1 405"), "{path}");
    }
    assert!(proxy.get("/healthz/live").unwrap().starts_with("HTTP/1.1 200"));
    assert!(proxy.get("/nothing").unwrap().starts_with("HTTP/1.1 404"));
    assert!(proxy.get("/config").unwrap().contains("\"listeners\""));
    assert!(proxy.ask("PUT", "/logging?level=debug").unwrap().starts_with("HTTP/1.1 200"));
    assert!(proxy.get("/logging").unwrap().ends_with("debug\n"));
    assert!(proxy.ask("PUT", "/logging?level=a=b=c").unwrap().starts_with("HTTP/1.1 400"));
}

#[test]
fn probes_are_performed_as_the_kubelet_does() {
    let app = server(|mut stream| {
        let mut buffer = [0; 4096];
        let n = stream.read(&mut buffer).unwrap();
        let head = String::from_utf8_lossy(&buffer[..n]).to_ascii_lowercase();
        let answer = match head.split(' ').nth(1) {
            Some("/good") if head.contains("host: special\r\n") && head.contains("user-agent: kube-probe/") => "200 OK",
            Some("/moved") => "302 Found\r\nlocation: /bad",
            Some("/elsewhere") => "302 Found\r\nlocation: http://example.org/",
            Some("/metrics") => "200 OK\r\ncontent-type: text/plain\r\n\r\napp_things 7\n# EOF\n",
            Some("/slow") => {
                thread::sleep(Duration::from_millis(1500));
                "200 OK"
            }
            _ => "503 Service Unavailable",
        };
        let end = if answer.contains("\r\n\r\n") { "" } else { "\r\ncontent-length: 0\r\n\r\n" };
        let _ = write!(stream, "HTTP/1.1 {answer}{end}");
    });
    let (port, closed) = (app.port(), free().port());
    let get = |path: &str| format!("{{httpGet: {{path: {path}, port: {port}}}}}");
    let more = format!(
        "probes:\n  /app-health/a/readyz: {{httpGet: {{path: /good, port: {port}, httpHeaders: [{{name: Host, value: special}}]}}}}\n  \
         /app-health/a/livez: {}\n  /app-health/a/startupz: {}\n  /app-health/b/livez: {}\n  /app-health/b/readyz: {}\n  \
         /app-health/c/livez: {{tcpSocket: {{port: {port}}}}}\n  /app-health/c/readyz: {{tcpSocket: {{port: {closed}}}}}\n\
         appMetrics: {{port: {port}}}",
        get("/bad"),
        get("/moved"),
        get("/elsewhere"),
        get("/slow"),
    );
    let proxy = Proxy::start(server(echo), "tcp", &more, None);
    for (probe, code) in [
        ("a/readyz", "200"),
        ("a/livez", "503"),
        ("a/startupz", "503"),
        ("b/livez", "302"),
        ("b/readyz", "500"),
        ("c/livez", "200"),
        ("c/readyz", "500"),
        ("c/startupz", "404"),
    ] {
        let answer = proxy.get(&format!("/app-health/{probe}")).unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {code} ")), "{probe}: {answer}");
    }
    let page = proxy.get("/stats/prometheus").unwrap();
    assert!(page.contains("\napp_things 7\n") && page.contains("weft_proxy_build_info") && !page.contains("# EOF"), "{page}");
}

#[test]
fn the_proxy_s_metrics_survive_the_app() {
    let proxy = Proxy::start(server(echo), "tcp", &format!("appMetrics: {{port: {}}}", free().port()), None);
    let page = proxy.get("/stats/prometheus").unwrap();
    assert!(page.contains("weft_proxy_build_info") && page.contains("# the app's own metrics are missing"), "{page}");
}

#[test]
fn it_ends_when_the_last_connection_does() {
    let mut proxy = Proxy::start(server(echo), "tcp", "", None);
    let mut client = proxy.connect();
    client.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
    proxy.signal(nix::sys::signal::Signal::SIGTERM);
    thread::sleep(Duration::from_millis(400));
    assert!(proxy.child.try_wait().unwrap().is_none(), "a connection is left");
    assert!(TcpStream::connect(proxy.addr).is_err(), "nothing is taken any more");
    client.write_all(b"y").unwrap();
    client.read_exact(&mut [0]).unwrap();
    drop(client);
    let (status, log) = proxy.end();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(log.trim_end().ends_with("drained"), "{log}");
}

#[test]
fn it_ends_with_the_grace_period() {
    let mut proxy = Proxy::start(server(echo), "tcp", "timeouts: {drain: 300ms}", None);
    let mut client = proxy.connect();
    client.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
    assert!(proxy.ask("POST", "/quitquitquit").unwrap().starts_with("HTTP/1.1 200"));
    let (status, log) = proxy.end();
    assert_eq!(status.code(), Some(3), "{log}");
    assert!(log.trim_end().ends_with("1 connections are cut off"), "{log}");
}

#[test]
fn bad_configuration_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("bad.yaml");
    std::fs::write(&file, "listners: []").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_weft-proxy")).arg("--config").arg(&file).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("listners"));
}

#[test]
fn a_second_signal_ends_it_at_once() {
    use nix::sys::signal::Signal::{SIGINT, SIGTERM};
    for second in [SIGTERM, SIGINT] {
        let mut proxy = Proxy::start(server(echo), "tcp", "timeouts: {drain: 10m}", None);
        let mut client = proxy.connect();
        client.write_all(b"x").unwrap();
        client.read_exact(&mut [0]).unwrap();
        proxy.signal(SIGTERM);
        let begun = Instant::now();
        while !proxy.get("/healthz/ready").unwrap().contains("drains") {
            assert!(begun.elapsed() < PATIENCE);
            thread::sleep(Duration::from_millis(5));
        }
        proxy.signal(second);
        let (status, log) = proxy.end();
        assert_eq!(status.code(), Some(4), "{log}");
        assert!(log.trim_end().ends_with("a second signal, 1 connections are cut off"), "{log}");
        assert_eq!(client.read(&mut [0]).unwrap_or(0), 0);
    }
}

#[test]
fn a_log_that_nobody_reads_holds_nothing_up() {
    // Standard error is a pipe of 64 KiB, which nobody empties before the end. HTTP/2 pings are what most is said about.
    let mut proxy = Proxy::start(server(echo), "http2", "log: trace", None);
    let mut client = proxy.connect();
    client.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").unwrap();
    let begun = Instant::now();
    loop {
        for _ in 0..100 {
            client.write_all(b"\0\0\x08\x06\0\0\0\0\0pingping").unwrap();
            // Whatever comes before the answer: settings, window updates.
            loop {
                let mut head = [0; 9];
                client.read_exact(&mut head).unwrap();
                let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
                let mut body = vec![0; length as usize];
                client.read_exact(&mut body).unwrap();
                if (head[3], head[4], &body[..]) == (6, 1, &b"pingping"[..]) {
                    break;
                }
            }
        }
        let page = proxy.get("/stats/prometheus").unwrap();
        let dropped = page.lines().find_map(|line| line.strip_prefix("weft_proxy_log_lines_dropped_total ")).unwrap();
        if dropped != "0" {
            break;
        }
        assert!(begun.elapsed() < PATIENCE);
    }
    proxy.signal(nix::sys::signal::Signal::SIGTERM);
    drop(client);
    let mut log = String::new();
    proxy.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    assert_eq!(proxy.child.wait().unwrap().code(), Some(0));
    assert!(log.contains("log lines were dropped here"), "what is missing is said");
    // The runtime may have something to trace after the last words.
    assert!(log.contains("ended after") && log.contains("drained"), "{}", &log[log.len() - 500..]);
}
