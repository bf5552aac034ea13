//! What the API server asks of the node: logs, exec, port-forward, and connections to Services.

use std::fs;
use std::io::{self, SeekFrom};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::pin::Pin;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt as _, StreamExt as _};
use k8s_openapi::jiff::Timestamp;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncSeekExt as _, AsyncWrite, BufReader};
use tokio::process::Child;
use tokio::sync::mpsc;

use super::container::{self, Container};
use super::launch::Spec;
use super::pod::Pod;
use super::{Node, fields, image};
use crate::apiserver::Status;
use crate::apiserver::backend::{Duplex, ExecRequest, ExecSession, LogOptions, NodeBackend};
use crate::json::{list, text};
use crate::{netns, services, sys};

fn missing(ns: &str, pod: &str) -> Status {
    Status::bad_request(format!("pod {ns}/{pod} is not running on the node"))
}

fn read_options(options: &LogOptions) -> Result<Option<Timestamp>, Status> {
    if let Some(time) = &options.since_time {
        return time.parse().map(Some).map_err(|e| Status::bad_request(format!("sinceTime: {e}")));
    }
    Ok(options.since_seconds.and_then(|s| crate::instant().checked_sub(k8s_openapi::jiff::SignedDuration::from_secs(s)).ok()))
}

/// One line of a log file as it is delivered.
fn render(line: &str, since: Option<&Timestamp>, timestamps: bool) -> Option<String> {
    let mut parts = line.splitn(4, ' ');
    let (time, _, flag, body) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    if let Some(since) = since
        && time.parse::<Timestamp>().is_ok_and(|t| t < *since)
    {
        return None;
    }
    let body = if flag == "P" { body.trim_end_matches('\n') } else { body };
    Some(if timestamps { format!("{time} {body}") } else { body.to_owned() })
}

struct Follow {
    reader: BufReader<tokio::fs::File>,
    container: Arc<Container>,
    run: u32,
    since: Option<Timestamp>,
    options: LogOptions,
    left: u64,
    partial: String,
}

impl Follow {
    async fn next(mut self) -> Option<(io::Result<Bytes>, Self)> {
        loop {
            if self.left == 0 {
                return None;
            }
            let over = {
                let state = self.container.state.borrow();
                state.finished || state.runs != self.run || state.pid.is_none()
            };
            match self.reader.read_line(&mut self.partial).await {
                Err(e) => return Some((Err(e), Self { left: 0, ..self })),
                Ok(_) if self.partial.ends_with('\n') => {
                    let line = std::mem::take(&mut self.partial);
                    if let Some(mut text) = render(&line, self.since.as_ref(), self.options.timestamps) {
                        if text.len() as u64 > self.left {
                            text = String::from_utf8_lossy(&text.as_bytes()[..self.left as usize]).into_owned();
                            self.left = 0;
                        } else {
                            self.left -= text.len() as u64;
                        }
                        return Some((Ok(Bytes::from(text)), self));
                    }
                }
                Ok(0) if !self.options.follow || over => return None,
                Ok(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }
}

/// Where the last `lines` lines begin.
fn tail(path: &PathBuf, lines: u64) -> io::Result<u64> {
    let content = fs::read(path)?;
    let starts = std::iter::once(0).chain(content.iter().enumerate().filter(|(_, b)| **b == b'\n').map(|(n, _)| n + 1));
    let starts: Vec<usize> = starts.filter(|n| *n < content.len()).collect();
    let skip = starts.len().saturating_sub(lines as usize);
    Ok(starts.get(skip).copied().unwrap_or(content.len()) as u64)
}

async fn logs(node: &Node, ns: &str, name: &str, options: LogOptions) -> Result<BoxStream<'static, io::Result<Bytes>>, Status> {
    let pod = node.pod(ns, name).ok_or_else(|| missing(ns, name))?;
    let c = pod
        .container(&options.container)
        .ok_or_else(|| Status::bad_request(format!("container {} is not valid for pod {name}", options.container)))?;
    let runs = c.now().runs;
    let run = if options.previous { runs.saturating_sub(1) } else { runs };
    let path = container::log_path(&pod, &c.name, run);
    if run == 0 || !path.exists() {
        return Err(Status::bad_request(if options.previous {
            format!("previous terminated container \"{}\" in pod \"{name}\" not found", c.name)
        } else {
            format!("container \"{}\" in pod \"{name}\" is waiting to start: {}", c.name, waiting(c))
        }));
    }
    let failed = |e: io::Error| Status::internal(format!("{}: {e}", path.display()));
    let since = read_options(&options)?;
    let mut file = tokio::fs::File::open(&path).await.map_err(failed)?;
    if let Some(lines) = options.tail_lines {
        file.seek(SeekFrom::Start(tail(&path, lines).map_err(failed)?)).await.map_err(failed)?;
    }
    let left = options.limit_bytes.unwrap_or(u64::MAX);
    let start = Follow { reader: BufReader::new(file), container: c.clone(), run, since, options, left, partial: String::new() };
    Ok(futures::stream::unfold(start, Follow::next).boxed())
}

fn waiting(c: &Container) -> String {
    match c.now().phase {
        container::Phase::Waiting { reason, .. } => reason,
        _ => "ContainerCreating".to_owned(),
    }
}

/// A command started in a container; it is killed when this is dropped before its end.
struct Running {
    child: Child,
    inner: Option<i32>,
    files: [PathBuf; 2],
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            if let Some(pid) = self.inner {
                let _ = kill(Pid::from_raw(-pid), Signal::SIGKILL);
            }
            let _ = self.child.start_kill();
        }
        for file in &self.files {
            let _ = fs::remove_file(file);
        }
    }
}

impl Running {
    async fn exit(mut self) -> io::Result<i32> {
        let code = self.child.wait().await?.code().unwrap_or(137);
        match fs::read_to_string(&self.files[1]).unwrap_or_default() {
            report if report.is_empty() => Ok(code),
            report => Err(io::Error::other(report)),
        }
    }
}

async fn start(pod: &Arc<Pod>, c: &Container, command: Vec<String>, tty: bool, stdio: [Stdio; 3]) -> io::Result<Running> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let pid = c.now().pid.ok_or_else(|| io::Error::other(format!("container {} is not running", c.name)))?;
    let image = image::known(text(&c.spec, "/image")).ok_or_else(|| io::Error::other("unknown image"))?;
    let object = pod.described();
    let identity = image::identity(&object, &c.spec, &image).map_err(io::Error::other)?;
    let services = fields::services(&pod.node.services.all(), &pod.ns, true);
    let mut env = fields::environment(&object, &c.spec, services, &*pod.node).map_err(io::Error::other)?;
    if tty {
        env.push(("TERM".into(), "xterm".into()));
    }
    let n = NUMBER.fetch_add(1, Ordering::Relaxed);
    let files = [pod.dir.join(format!("exec-{n}.json")), pod.dir.join(format!("exec-{n}.error"))];
    let spec = Spec {
        netns: pod.netns.clone(),
        join: Some(pid),
        argv: command,
        env,
        dir: image::working_dir(&c.spec),
        uid: identity.uid,
        gid: identity.gid,
        groups: identity.groups,
        capabilities: identity.capabilities,
        no_new_privileges: identity.no_new_privileges,
        tty,
        error: files[1].clone(),
        ..Spec::default()
    };
    let child = pod.node.launch(&spec, &files[0], stdio)?;
    let mut running = Running { child, inner: None, files };
    running.inner = container::inner(&mut running.child, &running.files[0].clone()).await;
    Ok(running)
}

/// Runs a command in a container: exit status and everything that it printed.
pub(crate) async fn run_in(pod: &Arc<Pod>, c: &Container, command: Vec<String>) -> io::Result<(i32, String)> {
    let mut running = start(pod, c, command, false, [Stdio::null(), Stdio::piped(), Stdio::piped()]).await?;
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let (stdout, stderr) = (running.child.stdout.take(), running.child.stderr.take());
    let read = async |from: &mut (dyn AsyncRead + Send + Unpin), to: &mut Vec<u8>| {
        let _ = from.take(64 << 10).read_to_end(to).await;
    };
    if let (Some(mut a), Some(mut b)) = (stdout, stderr) {
        tokio::join!(read(&mut a, &mut out), read(&mut b, &mut err));
    }
    let code = running.exit().await?;
    out.extend(err);
    Ok((code, String::from_utf8_lossy(&out).into_owned()))
}

/// The reading side of a pseudo-terminal: its end is an error number, which is turned into the end of the stream.
struct Terminal(tokio::fs::File);

impl AsyncRead for Terminal {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        match Pin::new(&mut self.0).poll_read(cx, buf) {
            std::task::Poll::Ready(Err(e)) if e.raw_os_error() == Some(libc::EIO) => std::task::Poll::Ready(Ok(())),
            other => other,
        }
    }
}

async fn exec(node: &Node, ns: &str, name: &str, request: ExecRequest) -> Result<ExecSession, Status> {
    let pod = node.pod(ns, name).ok_or_else(|| missing(ns, name))?;
    let c = pod
        .container(&request.container)
        .ok_or_else(|| Status::bad_request(format!("container {} not found", request.container)))?
        .clone();
    if request.command.is_empty() {
        return Err(Status::new(
            501,
            "NotImplemented",
            "the playground can't attach to a running process; use `kubectl logs -f` or `kubectl exec`",
        ));
    }
    let failed = |e: io::Error| Status::internal(format!("error executing command in container: {e}"));
    if request.tty {
        let pty = nix::pty::openpty(None, None).map_err(|e| failed(e.into()))?;
        let copy = || pty.slave.try_clone().map(Stdio::from);
        let stdio = [copy().map_err(failed)?, copy().map_err(failed)?, copy().map_err(failed)?];
        let running = start(&pod, &c, request.command, true, stdio).await.map_err(failed)?;
        drop(pty.slave);
        let master = fs::File::from(pty.master);
        let (reader, sizes) = (master.try_clone().map_err(failed)?, master.try_clone().map_err(failed)?);
        let (resize, mut wanted) = mpsc::channel::<(u16, u16)>(4);
        tokio::spawn(async move {
            while let Some((columns, rows)) = wanted.recv().await {
                let _ = sys::resize_terminal(&sizes, columns, rows);
            }
        });
        let stdin: Pin<Box<dyn AsyncWrite + Send>> = Box::pin(tokio::fs::File::from_std(master));
        return Ok(ExecSession {
            stdin: request.stdin.then_some(stdin),
            stdout: Some(Box::pin(Terminal(tokio::fs::File::from_std(reader)))),
            stderr: None,
            resize: Some(resize),
            exit: running.exit().boxed(),
        });
    }
    let pipe = |wanted: bool| if wanted { Stdio::piped() } else { Stdio::null() };
    let stdio = [pipe(request.stdin), pipe(request.stdout), pipe(request.stderr)];
    let mut running = start(&pod, &c, request.command, false, stdio).await.map_err(failed)?;
    let (stdin, stdout, stderr) = (running.child.stdin.take(), running.child.stdout.take(), running.child.stderr.take());
    Ok(ExecSession {
        stdin: stdin.map(|s| Box::pin(s) as Pin<Box<dyn AsyncWrite + Send>>),
        stdout: stdout.map(|s| Box::pin(s) as Pin<Box<dyn AsyncRead + Send>>),
        stderr: stderr.map(|s| Box::pin(s) as Pin<Box<dyn AsyncRead + Send>>),
        resize: None,
        exit: running.exit().boxed(),
    })
}

async fn forward(node: &Node, ns: &str, name: &str, port: u16) -> Result<Box<dyn Duplex>, Status> {
    let pod = node.pod(ns, name).ok_or_else(|| missing(ns, name))?;
    let wait = Duration::from_secs(5);
    let first = netns::dial(&pod.netns, SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port), wait).await;
    if let Ok(stream) = first {
        return Ok(Box::new(stream));
    }
    let own = pod.addresses.get().and_then(|a| a.first()).copied().ok_or_else(|| missing(ns, name))?;
    match netns::dial(&pod.netns, SocketAddr::new(own, port), wait).await {
        Ok(stream) => Ok(Box::new(stream)),
        Err(e) => Err(Status::internal(format!("port {port} of pod {ns}/{name}: {e}"))),
    }
}

async fn connect(node: &Node, ns: &str, name: &str, port: u16) -> io::Result<Box<dyn Duplex>> {
    let service = node.services.get(ns, name).ok_or_else(|| io::Error::other(format!("service {ns}/{name} not found")))?;
    let named = list(&service, "/spec/ports").iter().find(|p| p["port"] == port);
    let named =
        text(named.ok_or_else(|| io::Error::other(format!("service {ns}/{name} has no port {port}")))?, "/name").to_owned();
    let all = services::backends(&node.slices.all(), ns, name, &named);
    let mut last =
        io::Error::new(io::ErrorKind::ConnectionRefused, format!("no endpoints available for service \"{ns}/{name}\""));
    let skip = rand::random_range(0..all.len().max(1));
    for (ip, port) in all.iter().cycle().skip(skip).take(all.len()) {
        match netns::dial(&node.netns, SocketAddr::new(IpAddr::V4(*ip), *port), Duration::from_secs(5)).await {
            Ok(stream) => return Ok(Box::new(stream)),
            Err(e) => last = e,
        }
    }
    Err(last)
}

impl NodeBackend for Node {
    fn logs<'a>(
        &'a self,
        namespace: &'a str,
        pod: &'a str,
        options: LogOptions,
    ) -> BoxFuture<'a, Result<BoxStream<'static, io::Result<Bytes>>, Status>> {
        logs(self, namespace, pod, options).boxed()
    }

    fn exec<'a>(&'a self, namespace: &'a str, pod: &'a str, request: ExecRequest) -> BoxFuture<'a, Result<ExecSession, Status>> {
        exec(self, namespace, pod, request).boxed()
    }

    fn port_forward<'a>(&'a self, namespace: &'a str, pod: &'a str, port: u16) -> BoxFuture<'a, Result<Box<dyn Duplex>, Status>> {
        forward(self, namespace, pod, port).boxed()
    }

    fn connect_service<'a>(
        &'a self,
        namespace: &'a str,
        service: &'a str,
        port: u16,
    ) -> BoxFuture<'a, io::Result<Box<dyn Duplex>>> {
        connect(self, namespace, service, port).boxed()
    }
}
