//! Resolvers made of real sockets on loopback, in the same thread.

use super::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

const QUICK: Patience = Patience {
    attempt: Duration::from_millis(60),
    datagram: Duration::from_millis(400),
    stream: Duration::from_millis(150),
    idle: Duration::from_millis(300),
};
const ID: u16 = 0x1234;

fn query(id: u16, name: &str) -> Vec<u8> {
    let mut message = [&id.to_be_bytes()[..], &[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]].concat();
    for label in name.split('.') {
        message.push(label.len() as u8);
        message.extend(label.as_bytes());
    }
    message.extend([0, 0, 1, 0, 1]);
    message
}

fn answer(query: &[u8], code: u8, text: &[u8]) -> Vec<u8> {
    let mut answer = [query, text].concat();
    answer[2] |= 0x80;
    answer[3] = 0x80 | code;
    answer
}

/// Runs a test where local tasks may be started.
fn local(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, async {
        tokio::time::timeout(Duration::from_secs(20), test).await.expect("no answer");
    });
}

/// Starts DNS for these resolvers on a port of its own. Returns where it is and what it counts.
fn start(resolvers: &[SocketAddr]) -> (SocketAddr, Rc<Server>) {
    for _ in 0..20 {
        let port = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        // The port of the same number may be taken by TCP.
        let settings = Settings { listen: vec![port], resolvers: resolvers.to_vec() };
        if let Ok(sockets) = open(&settings) {
            let server = Server::new(Resolvers::new(resolvers), Arc::default(), QUICK);
            tokio::task::spawn_local(serve(sockets, Rc::clone(&server)));
            return (port, server);
        }
    }
    panic!("no port is free");
}

/// A resolver of datagrams: what it answers, if it does. Says what it was asked.
async fn resolver(reply: impl Fn(&[u8]) -> Vec<Vec<u8>> + 'static) -> (SocketAddr, Rc<RefCell<Vec<(Vec<u8>, u16)>>>) {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let (address, asked) = (socket.local_addr().unwrap(), Rc::new(RefCell::new(Vec::new())));
    let log = Rc::clone(&asked);
    tokio::task::spawn_local(async move {
        let mut buffer = [0; 4096];
        loop {
            let (length, peer) = socket.recv_from(&mut buffer).await.unwrap();
            log.borrow_mut().push((buffer[..length].to_vec(), peer.port()));
            for message in reply(&buffer[..length]) {
                socket.send_to(&message, peer).await.unwrap();
            }
        }
    });
    (address, asked)
}

async fn ask(at: SocketAddr, question: &[u8]) -> Vec<u8> {
    let app = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    app.connect(at).await.unwrap();
    app.send(question).await.unwrap();
    let mut buffer = vec![0; 4096];
    let length = app.recv(&mut buffer).await.unwrap();
    buffer.truncate(length);
    buffer
}

fn counted(server: &Server, transport: &str, outcome: &str) -> u64 {
    let mut registry = prometheus_client::registry::Registry::default();
    server.metrics.register(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    let line = format!("weft_dns_queries_total{{transport=\"{transport}\",outcome=\"{outcome}\"}} ");
    text.lines().find_map(|l| l.strip_prefix(&line)).map_or(0, |n| n.parse().unwrap())
}

#[test]
fn bytes_go_through_but_for_the_id() {
    local(async {
        let (address, asked) = resolver(|q| vec![answer(q, 0, b"records")]).await;
        let (dns, server) = start(&[address]);
        let question = query(ID, "go-app.default.svc.cluster.local");
        for _ in 0..4 {
            assert_eq!(ask(dns, &question).await, answer(&question, 0, b"records"));
        }
        let asked = asked.borrow();
        assert!(asked.iter().all(|(bytes, _)| bytes[2..] == question[2..]));
        let mut ids: Vec<_> = asked.iter().map(|(bytes, port)| (message::id(bytes), *port)).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), 4, "each time another id or port");
        assert_eq!(counted(&server, "udp", "answered"), 4);
        assert_eq!(server.metrics.under_way.get(), 0);
        assert!(server.asking.borrow().is_empty());
    });
}

#[test]
fn a_forged_answer_is_passed_over() {
    local(async {
        let (address, _) = resolver(|q| {
            let mut wrong = answer(q, 0, b"forged");
            message::set_id(&mut wrong, message::id(q).unwrap().wrapping_add(1));
            let mut other = answer(&query(0, "other.example"), 0, b"forged");
            message::set_id(&mut other, message::id(q).unwrap());
            vec![wrong, other, q.to_vec(), vec![1, 2, 3], answer(q, 3, b"real")]
        })
        .await;
        let (dns, _) = start(&[address]);
        let question = query(ID, "a.example");
        assert_eq!(ask(dns, &question).await, answer(&question, 3, b"real"), "NXDOMAIN is an answer");
    });
}

#[test]
fn the_next_resolver_is_asked_when_one_is_silent_refuses_or_is_not_there() {
    local(async {
        let (silent, silently) = resolver(|_| vec![]).await;
        let (refusing, _) = resolver(|q| vec![answer(q, 5, b"")]).await;
        let absent = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let (good, _) = resolver(|q| vec![answer(q, 0, b"good")]).await;
        let question = query(ID, "a.example");
        for first in [silent, refusing, absent] {
            let (dns, server) = start(&[first, good]);
            assert_eq!(ask(dns, &question).await, answer(&question, 0, b"good"));
            assert_eq!(counted(&server, "udp", "answered"), 1);
        }
        assert_eq!(silently.borrow().len(), 1);
        // Nobody knows better: the refusal is what the app gets, not an invention.
        let (dns, _) = start(&[refusing, absent]);
        let began = std::time::Instant::now();
        assert_eq!(ask(dns, &question).await, answer(&question, 5, b""));
        assert!(began.elapsed() < QUICK.datagram, "at once, both have spoken");
    });
}

#[test]
fn a_late_answer_of_the_first_still_counts_and_a_lost_datagram_is_sent_again() {
    local(async {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let (silent, _) = resolver(|_| vec![]).await;
        let question = query(ID, "a.example");
        let (dns, _) = start(&[address, silent]);
        let slow = async {
            let mut buffer = [0; 512];
            let (length, peer) = socket.recv_from(&mut buffer).await.unwrap();
            tokio::time::sleep(QUICK.attempt + QUICK.attempt / 2).await;
            socket.send_to(&answer(&buffer[..length], 0, b"late"), peer).await.unwrap();
        };
        let (got, ()) = tokio::join!(ask(dns, &question), slow);
        assert_eq!(got, answer(&question, 0, b"late"));

        let (dns, _) = start(&[address]);
        let lossy = async {
            let mut buffer = [0; 512];
            let (_, first) = socket.recv_from(&mut buffer).await.unwrap();
            let (length, second) = socket.recv_from(&mut buffer).await.unwrap();
            assert_ne!(first, second, "from a new socket");
            socket.send_to(&answer(&buffer[..length], 0, b"again"), second).await.unwrap();
        };
        let (got, ()) = tokio::join!(ask(dns, &question), lossy);
        assert_eq!(got, answer(&question, 0, b"again"));
    });
}

#[test]
fn without_an_answer_the_app_is_told() {
    local(async {
        let question = query(ID, "a.example");
        let (silent, asked) = resolver(|_| vec![]).await;
        let (dns, server) = start(&[silent]);
        assert_eq!(ask(dns, &question).await, message::servfail(&question));
        assert_eq!((asked.borrow().len(), counted(&server, "udp", "failed")), (2, 1));
        assert!(server.asking.borrow().is_empty());

        // No resolver at all, as with an empty resolv.conf.
        let server = Server::new(Resolvers::new(&[]), Arc::default(), QUICK);
        let empty = Rc::new(Server {
            resolvers: Resolvers::of_file(&[], std::path::Path::new("/nowhere")),
            ..Rc::into_inner(server).unwrap()
        });
        let socket = Rc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let dns = socket.local_addr().unwrap();
        tokio::task::spawn_local(udp::serve(socket, Rc::clone(&empty)));
        assert_eq!(ask(dns, &question).await, message::servfail(&question));
    });
}

#[test]
fn too_many_are_refused_and_what_is_no_query_is_dropped() {
    local(async {
        let (silent, asked) = resolver(|_| vec![]).await;
        let (dns, server) = start(&[silent]);
        server.queries.set(QUERIES);
        let question = query(ID, "a.example");
        assert_eq!(ask(dns, &question).await, message::servfail(&question));
        assert_eq!(counted(&server, "udp", "overload"), 1);
        let app = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        app.send_to(&answer(&question, 0, b""), dns).await.unwrap();
        app.send_to(&question[..11], dns).await.unwrap();
        while counted(&server, "udp", "malformed") < 2 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        assert!(asked.borrow().is_empty());
    });
}

#[test]
fn its_own_queries_never_go_round() {
    local(async {
        // As if the redirection led the proxy's queries back to it: the resolver is the proxy itself.
        let port = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let sockets = open(&Settings { listen: vec![port], resolvers: vec![] }).unwrap();
        let server = Server::new(Resolvers::new(&[port]), Arc::default(), QUICK);
        tokio::task::spawn_local(serve(sockets, Rc::clone(&server)));
        let question = query(ID, "a.example");
        assert_eq!(ask(port, &question).await, message::servfail(&question));
        assert_eq!((counted(&server, "udp", "loop"), counted(&server, "udp", "failed")), (2, 1));
        let mut stream = TcpStream::connect(port).await.unwrap();
        send(&mut stream, &question).await;
        assert_eq!(receive(&mut stream).await.unwrap(), message::servfail(&question));
        assert!(counted(&server, "tcp", "loop") >= 1);
    });
}

async fn send(stream: &mut TcpStream, message: &[u8]) {
    stream.write_all(&(message.len() as u16).to_be_bytes()).await.unwrap();
    stream.write_all(message).await.unwrap();
}

async fn receive(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let length = stream.read_u16().await.ok()?;
    let mut message = vec![0; length.into()];
    stream.read_exact(&mut message).await.ok()?;
    Some(message)
}

#[test]
fn pipelined_queries_may_be_answered_in_any_order() {
    local(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (dns, server) = start(&[listener.local_addr().unwrap()]);
        let mut app = TcpStream::connect(dns).await.unwrap();
        let questions: Vec<_> = (0..3).map(|n| query(ID + n, &format!("host{n}.example"))).collect();
        for question in &questions {
            send(&mut app, question).await;
        }
        let (mut upstream, _) = listener.accept().await.unwrap();
        let mut came = Vec::new();
        for _ in 0..3 {
            came.push(receive(&mut upstream).await.unwrap());
        }
        assert_eq!(came, questions, "unchanged");
        for n in [2, 0, 1] {
            let message = answer(&questions[n], 0, &vec![n as u8; 20_000]);
            // In pieces.
            upstream.write_all(&(message.len() as u16).to_be_bytes()[..1]).await.unwrap();
            tokio::task::yield_now().await;
            upstream.write_all(&(message.len() as u16).to_be_bytes()[1..]).await.unwrap();
            upstream.write_all(&message).await.unwrap();
            assert_eq!(receive(&mut app).await.unwrap(), message);
        }
        assert_eq!((counted(&server, "tcp", "answered"), server.metrics.under_way.get()), (3, 0));
        // A further message of an answer, as in a zone transfer.
        let more = answer(&questions[0], 0, b"more");
        send(&mut upstream, &more).await;
        assert_eq!(receive(&mut app).await.unwrap(), more);
        // The idle client is left.
        assert_eq!(receive(&mut app).await, None);
        assert_eq!(receive(&mut upstream).await, None);
        assert_eq!(server.clients.get(), 0);
    });
}

#[test]
fn a_half_closed_client_has_its_answer() {
    local(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (dns, _) = start(&[listener.local_addr().unwrap()]);
        let mut app = TcpStream::connect(dns).await.unwrap();
        let question = query(ID, "a.example");
        send(&mut app, &question).await;
        app.shutdown().await.unwrap();
        let (mut upstream, _) = listener.accept().await.unwrap();
        let asked = receive(&mut upstream).await.unwrap();
        send(&mut upstream, &answer(&asked, 0, b"x")).await;
        assert_eq!(receive(&mut app).await.unwrap(), answer(&question, 0, b"x"));
        assert_eq!(receive(&mut app).await, None);
    });
}

#[test]
fn over_tcp_too_the_next_resolver_gets_what_one_left_open() {
    local(async {
        let (closing, silent, good) = tokio::join!(bind(), bind(), bind());
        let absent = bind().await.local_addr().unwrap();
        let at = |listener: &TcpListener| listener.local_addr().unwrap();
        let (dns, server) = start(&[absent, at(&closing), at(&silent), at(&good)]);
        let question = query(ID, "a.example");
        let mut app = TcpStream::connect(dns).await.unwrap();
        send(&mut app, &question).await;
        let (mut first, _) = closing.accept().await.unwrap();
        assert_eq!(receive(&mut first).await.unwrap(), question);
        drop(first);
        let (mut second, _) = silent.accept().await.unwrap();
        assert_eq!(receive(&mut second).await.unwrap(), question);
        let (mut third, _) = good.accept().await.unwrap();
        assert_eq!(receive(&mut third).await.unwrap(), question);
        send(&mut third, &answer(&question, 0, b"good")).await;
        assert_eq!(receive(&mut app).await.unwrap(), answer(&question, 0, b"good"));
        assert_eq!(server.metrics.resolver_failures.get(), 3);
    });
}

async fn bind() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.unwrap()
}

#[test]
fn over_tcp_too_the_app_is_told() {
    local(async {
        let listener = bind().await;
        let question = query(ID, "a.example");
        // Silent: two chances. Absent: at once.
        for (resolver, wait) in [(listener.local_addr().unwrap(), 2), (bind().await.local_addr().unwrap(), 0)] {
            let (dns, server) = start(&[resolver]);
            let mut app = TcpStream::connect(dns).await.unwrap();
            let began = std::time::Instant::now();
            send(&mut app, &question).await;
            assert_eq!(receive(&mut app).await.unwrap(), message::servfail(&question));
            assert!(began.elapsed() >= QUICK.stream * wait);
            assert_eq!((counted(&server, "tcp", "failed"), server.metrics.under_way.get()), (1, 0));
        }
    });
}

#[test]
fn what_is_no_query_ends_a_tcp_client_and_so_does_one_client_too_many() {
    local(async {
        let listener = bind().await;
        let (dns, server) = start(&[listener.local_addr().unwrap()]);
        for bytes in [&[0, 0][..], &[0, 3, 1, 2, 3], &[0, 1]] {
            let mut app = TcpStream::connect(dns).await.unwrap();
            app.write_all(bytes).await.unwrap();
            app.shutdown().await.unwrap();
            assert_eq!(receive(&mut app).await, None);
        }
        assert_eq!(counted(&server, "tcp", "malformed"), 2);
        server.clients.set(CLIENTS);
        let mut app = TcpStream::connect(dns).await.unwrap();
        assert_eq!(receive(&mut app).await, None);
        assert_eq!(counted(&server, "tcp", "overload"), 1);
    });
}
