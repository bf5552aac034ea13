//! What the servers share: sockets for both families, HTTP/1.1 and HTTP/2 on one port, an end that loses no request.

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

/// An answer's body.
pub(super) type Body = BoxBody<Bytes, Infallible>;

/// How long a server that is to end still takes connections: those who call it need that long to hear of it.
const LAME_DUCK: Duration = Duration::from_secs(2);
/// And how long the last requests may take after that.
const LAST_REQUESTS: Duration = Duration::from_secs(20);

/// A body that is there already.
pub(super) fn full(text: impl Into<Bytes>) -> Body {
    Full::new(text.into()).boxed()
}

/// A plain answer.
pub(super) fn plain(status: u16, kind: &str, text: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(full(text));
    *response.status_mut() = http::StatusCode::from_u16(status).unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR);
    if let Ok(kind) = kind.parse() {
        response.headers_mut().insert("content-type", kind);
    }
    response
}

/// Listens on a port, for IPv4 and, where there is IPv6, for that too.
pub(super) fn listen(port: u16) -> io::Result<TcpListener> {
    let open = |domain: Domain, address: SocketAddr| -> io::Result<TcpListener> {
        let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
        if domain == Domain::IPV6 {
            socket.set_only_v6(false)?;
        }
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(1024)?;
        TcpListener::from_std(socket.into())
    };
    let result = open(Domain::IPV6, (Ipv6Addr::UNSPECIFIED, port).into())
        .or_else(|_| open(Domain::IPV4, (Ipv4Addr::UNSPECIFIED, port).into()));
    result.map_err(|e| io::Error::new(e.kind(), format!("listen on port {port}: {e}")))
}

/// Tells servers that they have to end: false while they serve, true when they close.
pub(super) fn ending() -> io::Result<watch::Receiver<bool>> {
    let (sender, receiver) = watch::channel(false);
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::spawn(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        tokio::time::sleep(LAME_DUCK).await;
        sender.send_replace(true);
        // Kept until the process ends: a closed channel would look like a signal.
        std::future::pending::<()>().await;
    });
    Ok(receiver)
}

async fn over(end: &mut watch::Receiver<bool>) {
    let _ = end.wait_for(|e| *e).await;
}

/// Accepts until it is time to end, and waits for what was accepted.
pub(super) async fn accept<F: Future<Output = ()> + Send + 'static>(
    listener: TcpListener,
    mut end: watch::Receiver<bool>,
    work: impl Fn(TcpStream, SocketAddr) -> F,
) {
    let mut tasks = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            () = over(&mut end) => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    let _ = stream.set_nodelay(true);
                    tasks.spawn(work(stream, peer));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            },
            Some(_) = tasks.join_next() => {}
        }
    }
    drop(listener);
    let _ = tokio::time::timeout(LAST_REQUESTS, async { while tasks.join_next().await.is_some() {} }).await;
}

async fn connection<S, H, F>(stream: S, end: watch::Receiver<bool>, handler: Arc<H>, peer: SocketAddr)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    H: Fn(Request<Incoming>, SocketAddr) -> F + Send + Sync + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let service = service_fn(move |request| {
        let answer = handler(request, peer);
        async move { Ok::<_, Infallible>(answer.await) }
    });
    let mut builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(Duration::from_hours(1)).preserve_header_case(true);
    builder.http2().timer(TokioTimer::new());
    let serving = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(serving);
    let mut end = end;
    let stopped = tokio::select! {
        _ = serving.as_mut() => false,
        () = over(&mut end) => true,
    };
    if stopped {
        serving.as_mut().graceful_shutdown();
        let _ = serving.await;
    }
}

/// Serves HTTP/1.1 and HTTP/2 (prior knowledge, or by ALPN) until it is time to end.
pub(super) async fn http<H, F>(listener: TcpListener, tls: Option<TlsAcceptor>, end: watch::Receiver<bool>, handler: H)
where
    H: Fn(Request<Incoming>, SocketAddr) -> F + Send + Sync + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let handler = Arc::new(handler);
    let ending = end.clone();
    accept(listener, end, move |stream, peer| {
        let (handler, end, tls) = (handler.clone(), ending.clone(), tls.clone());
        async move {
            match tls {
                None => connection(stream, end, handler, peer).await,
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        connection(stream, end, handler, peer).await;
                    }
                }
            }
        }
    })
    .await;
}

/// The value of a parameter of a query.
pub(super) fn query<'a>(uri: &'a http::Uri, name: &str) -> Option<&'a str> {
    uri.query()?.split('&').find_map(|pair| pair.split_once('=').filter(|(k, _)| *k == name).map(|(_, v)| v))
}

/// What a caller may ask of a sample for tests: `?delay=MILLISECONDS` and `?status=CODE`.
pub(super) async fn misbehave(uri: &http::Uri) -> u16 {
    if let Some(delay) = query(uri, "delay").and_then(|d| d.parse().ok()) {
        tokio::time::sleep(Duration::from_millis(delay)).await;
    }
    query(uri, "status").and_then(|s| s.parse().ok()).filter(|s| (200..600).contains(s)).unwrap_or(200)
}
