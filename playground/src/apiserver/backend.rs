//! What the API server asks of the node: the byte streams behind `logs`, `exec` and `port-forward`, and a way into the
//! cluster's network for webhooks that are addressed by Service.
//!
//! The API server knows no processes and no network namespaces; whoever runs the pods implements [`NodeBackend`].

use std::io;
use std::pin::Pin;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

use super::status::Status;

/// Bytes in both directions, such as a TCP connection.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// Options of `GET …/pods/{name}/log`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// Container; the API server has resolved it (it always names one that the pod has).
    pub container: String,
    /// Keep the stream open and deliver what is written later.
    pub follow: bool,
    /// The log of the container's previous run.
    pub previous: bool,
    /// Only what is younger than this many seconds.
    pub since_seconds: Option<i64>,
    /// Only what was written at or after this RFC 3339 time.
    pub since_time: Option<String>,
    /// Only the last this many lines.
    pub tail_lines: Option<u64>,
    /// Prefix each line with its RFC 3339 time.
    pub timestamps: bool,
    /// Stop after this many bytes.
    pub limit_bytes: Option<u64>,
}

/// Options of `…/pods/{name}/exec` and `…/attach`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecRequest {
    /// Container; the API server has resolved it.
    pub container: String,
    /// Program and arguments; empty for attach.
    pub command: Vec<String>,
    /// The client sends standard input.
    pub stdin: bool,
    /// The client wants standard output.
    pub stdout: bool,
    /// The client wants standard error (never together with `tty`).
    pub stderr: bool,
    /// Run on a pseudo-terminal.
    pub tty: bool,
}

/// A running command. A stream that wasn't asked for is `None`.
pub struct ExecSession {
    /// The command's standard input; dropping it is end-of-file.
    pub stdin: Option<Pin<Box<dyn AsyncWrite + Send>>>,
    /// The command's standard output (the terminal's output with `tty`).
    pub stdout: Option<Pin<Box<dyn AsyncRead + Send>>>,
    /// The command's standard error.
    pub stderr: Option<Pin<Box<dyn AsyncRead + Send>>>,
    /// Takes new terminal sizes (columns, rows).
    pub resize: Option<mpsc::Sender<(u16, u16)>>,
    /// Resolves to the exit code when the command has ended. Dropping the future before that should kill the command.
    pub exit: BoxFuture<'static, io::Result<i32>>,
}

/// What the node does for the API server. All methods name pods by namespace and name; a pod that isn't running there
/// is answered with a [`Status`] that says so.
pub trait NodeBackend: Send + Sync + 'static {
    /// The log of one container.
    fn logs<'a>(
        &'a self,
        namespace: &'a str,
        pod: &'a str,
        options: LogOptions,
    ) -> BoxFuture<'a, Result<BoxStream<'static, io::Result<Bytes>>, Status>>;

    /// Starts a command in a container.
    fn exec<'a>(&'a self, namespace: &'a str, pod: &'a str, request: ExecRequest) -> BoxFuture<'a, Result<ExecSession, Status>>;

    /// Connects to a port on the pod's loopback address, from inside the pod's network namespace.
    fn port_forward<'a>(&'a self, namespace: &'a str, pod: &'a str, port: u16) -> BoxFuture<'a, Result<Box<dyn Duplex>, Status>>;

    /// Connects to a Service (its own port number, not the target port) as the control plane of a cluster would: to a
    /// ready endpoint, from inside the node's network.
    fn connect_service<'a>(
        &'a self,
        namespace: &'a str,
        service: &'a str,
        port: u16,
    ) -> BoxFuture<'a, io::Result<Box<dyn Duplex>>>;
}
