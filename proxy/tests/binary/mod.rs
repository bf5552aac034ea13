//! The built proxy as a process on loopback, and servers made of threads.
#![allow(dead_code, unreachable_pub, missing_docs)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

pub const PATIENCE: Duration = Duration::from_secs(20);

pub struct Proxy {
    pub child: Child,
    pub addr: SocketAddr,
    pub admin: SocketAddr,
    pub ready_after: Duration,
    pub dir: tempfile::TempDir,
}

/// A port that was free a moment ago.
pub fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

impl Proxy {
    pub fn start(upstream: SocketAddr, protocol: &str, more: &str, limit: Option<u64>) -> Self {
        Self::launch(upstream, protocol, more, limit, "/healthz/ready")
    }

    /// Without waiting for a certificate: one whose control plane signs none is not ready, but forwards.
    pub fn start_unready(upstream: SocketAddr, protocol: &str, more: &str) -> Self {
        Self::launch(upstream, protocol, more, None, "/healthz/live")
    }

    fn launch(upstream: SocketAddr, protocol: &str, more: &str, limit: Option<u64>, sign: &str) -> Self {
        // Another test may take a port between its choice and its use.
        for _ in 0..5 {
            let dir = tempfile::tempdir().unwrap();
            let (addr, admin) = (free(), free());
            let file = dir.path().join("proxy.yaml");
            let yaml = format!(
                "listeners: [{{address: {addr}, direction: outbound, upstream: {upstream}, protocol: {protocol}}}]\n\
                 admin: {admin}\nworkers: 1\n{more}\n"
            );
            std::fs::write(&file, yaml).unwrap();
            let program = env!("CARGO_BIN_EXE_weft-proxy");
            let mut command = match limit {
                Some(limit) => {
                    let mut shell = Command::new("sh");
                    shell.args(["-c", &format!("ulimit -n {limit}; exec \"$0\" \"$@\""), program]);
                    shell
                }
                None => Command::new(program),
            };
            let started = Instant::now();
            let child = command.arg("--config").arg(&file).stderr(Stdio::piped()).spawn().unwrap();
            let mut proxy = Self { child, addr, admin, ready_after: Duration::ZERO, dir };
            while started.elapsed() < PATIENCE {
                if proxy.get(sign).is_some_and(|answer| answer.starts_with("HTTP/1.1 200")) {
                    proxy.ready_after = started.elapsed();
                    return proxy;
                }
                if proxy.child.try_wait().unwrap().is_some() {
                    break;
                }
                thread::sleep(Duration::from_millis(2));
            }
        }
        panic!("the proxy does not become ready");
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.addr).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    pub fn ask(&self, method: &str, path: &str) -> Option<String> {
        let mut stream = TcpStream::connect(self.admin).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        write!(stream, "{method} {path} HTTP/1.1\r\nhost: a\r\nuser-agent: kube-probe/1.33\r\nconnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    }

    pub fn get(&self, path: &str) -> Option<String> {
        self.ask("GET", path)
    }

    /// Waits until the metrics have a line that begins and ends so.
    pub fn expect_metric(&self, start: &str, end: &str) {
        let begun = Instant::now();
        let mut page = String::new();
        while begun.elapsed() < PATIENCE {
            page = self.get("/stats/prometheus").unwrap();
            if page.lines().any(|line| line.starts_with(start) && line.ends_with(end)) {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        panic!("no {start} … {end} in:\n{page}");
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    pub fn end(&mut self) -> (ExitStatus, String) {
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(begun.elapsed() < PATIENCE, "the proxy does not end");
            thread::sleep(Duration::from_millis(10));
        };
        let mut log = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        (status, log)
    }

    pub fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A server whose every connection is handled by `serve` in a thread of its own.
pub fn server(serve: impl Fn(TcpStream) + Clone + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let serve = serve.clone();
            thread::spawn(move || serve(stream));
        }
    });
    addr
}
