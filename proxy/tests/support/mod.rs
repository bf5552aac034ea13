//! A proxy in a thread of its own and apps made of raw sockets, over loopback.
#![allow(dead_code, unreachable_pub, missing_docs)]

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use weft_proxy::balance::Routes;
use weft_proxy::conn::{Direction, Downstream, OrigDst};
use weft_proxy::directory::Directory;
use weft_proxy::drain::Drain;
use weft_proxy::http::{self, HttpVersion, Pool};
use weft_proxy::io::Prefixed;
use weft_proxy::settings::Settings;
use weft_proxy::telemetry::Recorder;
use weft_proxy::worker::Worker;

pub const PATIENCE: Duration = Duration::from_secs(10);

/// A proxy that sends everything to one address.
pub struct Proxy {
    pub addr: SocketAddr,
    pub drain: Drain,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Proxy {
    pub fn to(app: SocketAddr) -> Self {
        Self::start(app, HttpVersion::Auto, Direction::Inbound, Settings::default())
    }

    pub fn start(app: SocketAddr, version: HttpVersion, direction: Direction, settings: Settings) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let addr = listener.local_addr().unwrap();
        let drain = Drain::new();
        let watch = drain.watch();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let local = tokio::task::LocalSet::new();
            local.block_on(&runtime, async move {
                let worker = Rc::new(Worker {
                    settings: Arc::new(settings),
                    recorder: Recorder::default(),
                    pool: Pool::new(),
                    drain: watch,
                    config: Arc::default(),
                    routes: Routes::new(Arc::new(Directory::closed()), Rc::default()),
                    identity: None,
                });
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                let accepting = async {
                    loop {
                        let (stream, peer) = listener.accept().await.unwrap();
                        stream.set_nodelay(true).unwrap();
                        let local = stream.local_addr().unwrap();
                        let down = Downstream {
                            peer,
                            local,
                            original: OrigDst(app),
                            direction,
                            accepted: Instant::now(),
                            principal: None,
                            fixed: true,
                        };
                        let guard = worker.drain.guard();
                        let worker = Rc::clone(&worker);
                        tokio::task::spawn_local(async move {
                            http::serve(Prefixed::new(bytes::Bytes::new(), stream.into()), version, down, worker).await;
                            drop(guard);
                        });
                    }
                };
                tokio::select! { () = accepting => {}, _ = stopped => {} }
            });
        });
        Self { addr, drain, stop: Some(stop), thread: Some(thread) }
    }

    pub fn connect(&self) -> Peer {
        Peer::new(TcpStream::connect(self.addr).unwrap())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            if !thread::panicking() {
                ended.unwrap();
            }
        }
    }
}

/// One side of a connection, spoken by hand.
pub struct Peer {
    pub stream: TcpStream,
    pub buffer: Vec<u8>,
}

impl Peer {
    pub fn new(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self { stream, buffer: Vec::new() }
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
    }

    /// Reads more. `false` at the end of the stream (a reset counts as one).
    pub fn fill(&mut self) -> bool {
        let mut chunk = vec![0; 65536];
        match self.stream.read(&mut chunk) {
            Ok(0) => false,
            Ok(n) => {
                self.buffer.extend_from_slice(&chunk[..n]);
                true
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => false,
            Err(error) => panic!("no bytes in time: {error}; so far {:?}", String::from_utf8_lossy(&self.buffer)),
        }
    }

    /// Everything up to and with `mark`.
    pub fn until(&mut self, mark: &str) -> String {
        let mark = mark.as_bytes();
        loop {
            if let Some(at) = self.buffer.windows(mark.len()).position(|window| window == mark) {
                let rest = self.buffer.split_off(at + mark.len());
                let taken = std::mem::replace(&mut self.buffer, rest);
                return String::from_utf8_lossy(&taken).into_owned();
            }
            let more = self.fill();
            assert!(more, "the stream ended within {:?}", String::from_utf8_lossy(&self.buffer));
        }
    }

    /// A head; `None` if the stream ends before one begins.
    pub fn head(&mut self) -> Option<String> {
        if self.buffer.is_empty() && !self.fill() {
            return None;
        }
        Some(self.until("\r\n\r\n"))
    }

    pub fn exactly(&mut self, n: usize) -> Vec<u8> {
        while self.buffer.len() < n {
            let more = self.fill();
            assert!(more, "the stream ended after {} of {n} bytes", self.buffer.len());
        }
        let rest = self.buffer.split_off(n);
        std::mem::replace(&mut self.buffer, rest)
    }

    /// A head and its body, by length or in chunks: as they are on the wire.
    pub fn message(&mut self) -> Option<(String, Vec<u8>)> {
        let head = self.head()?;
        let body = if let Some(length) = field(&head, "content-length") {
            self.exactly(length.parse().unwrap())
        } else if field(&head, "transfer-encoding").is_some() {
            let mut out = Vec::new();
            loop {
                let size = self.until("\r\n");
                let n = usize::from_str_radix(size.trim().split(';').next().unwrap(), 16).unwrap();
                if n == 0 {
                    while self.until("\r\n") != "\r\n" {}
                    break;
                }
                out.extend(self.exactly(n));
                self.exactly(2);
            }
            out
        } else {
            Vec::new()
        };
        Some((head, body))
    }

    /// All that comes until the other side closes.
    pub fn rest(&mut self) -> String {
        while self.fill() {}
        String::from_utf8_lossy(&std::mem::take(&mut self.buffer)).into_owned()
    }

    pub fn half_close(&self) {
        self.stream.shutdown(Shutdown::Write).unwrap();
    }
}

/// The value of a field of a head.
pub fn field<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.split("\r\n").skip(1).find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

/// A server whose connections are served by a function, each in a thread; it is told the connection's number.
pub struct App {
    pub addr: SocketAddr,
    pub connections: Arc<AtomicUsize>,
}

impl App {
    pub fn new(serve: impl Fn(Peer, usize) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&connections);
        let serve = Arc::new(serve);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { return };
                let number = count.fetch_add(1, Ordering::SeqCst);
                let serve = Arc::clone(&serve);
                thread::spawn(move || serve(Peer::new(stream), number));
            }
        });
        Self { addr, connections }
    }

    /// Answers every request with the same bytes, and hands what it received to the test.
    pub fn answering(response: impl Into<Vec<u8>>) -> (Self, std::sync::mpsc::Receiver<(String, Vec<u8>)>) {
        let response = response.into();
        let (sender, receiver) = std::sync::mpsc::channel();
        let sender = std::sync::Mutex::new(sender);
        let app = Self::new(move |mut peer, _| {
            // The connection may wait in the pool for as long as the test lasts.
            peer.stream.set_read_timeout(None).unwrap();
            while let Some(message) = peer.message() {
                let _ = sender.lock().unwrap().send(message);
                if peer.stream.write_all(&response).is_err() {
                    return;
                }
            }
        });
        (app, receiver)
    }

    pub fn accepted(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

/// An address where nobody listens.
pub fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}
