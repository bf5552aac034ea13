//! The servers: `go-app`, and `echo`.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};

use super::{frame, hostname, title, told_to_stop, unframe, variable};

type Body = BoxBody<Bytes, std::convert::Infallible>;

fn body(text: impl Into<Bytes>) -> Body {
    Full::new(text.into()).boxed()
}

fn reply(status: StatusCode, text: String) -> Response<Body> {
    let mut response = Response::new(body(text));
    *response.status_mut() = status;
    response.headers_mut().insert("content-type", HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

async fn bind(port: u16) -> anyhow::Result<TcpListener> {
    // Both families where there are two.
    match TcpListener::bind(("::", port)).await {
        Ok(listener) => Ok(listener),
        Err(_) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await.with_context(|| format!("listen on port {port}")),
    }
}

/// Serves HTTP until the pod is told to stop, then finishes what is under way.
pub(super) async fn serve<F>(port: u16, tls: Option<tokio_rustls::TlsAcceptor>, handler: impl Fn(Request<Incoming>, SocketAddr) -> F + Clone + Send + 'static) -> anyhow::Result<()>
where
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let listener = bind(port).await?;
    let graceful = GracefulShutdown::new();
    let mut stop = std::pin::pin!(told_to_stop());
    loop {
        let (stream, from) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(_) => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
            () = &mut stop => break,
        };
        let _ = stream.set_nodelay(true);
        let handler = handler.clone();
        let service = service_fn(move |request| {
            let answer = handler(request, from);
            async move { Ok::<_, std::convert::Infallible>(answer.await) }
        });
        let watcher = graceful.watcher();
        let tls = tls.clone();
        tokio::spawn(async move {
            let builder = Builder::new(TokioExecutor::new());
            match tls {
                None => {
                    let _ = watcher.watch(builder.serve_connection(TokioIo::new(stream), service).into_owned()).await;
                }
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        let _ = watcher.watch(builder.serve_connection(TokioIo::new(stream), service).into_owned()).await;
                    }
                }
            }
        });
    }
    drop(listener);
    let _ = tokio::time::timeout(Duration::from_secs(20), graceful.shutdown()).await;
    Ok(())
}

/// The application of the guide: answers anything, counts, and says which version it is.
pub(super) async fn go_app() -> anyhow::Result<()> {
    let port = variable("PORT", "8080").parse().context("PORT")?;
    let (version, name) = (variable("VERSION", "v1"), hostname());
    let count = Arc::new(AtomicU64::new(0));
    println!("go-app {version} listens on port {port}");
    serve(port, None, move |request: Request<Incoming>, _| {
        let (version, name, count) = (version.clone(), name.clone(), count.clone());
        async move {
            match request.uri().path() {
                "/healthz" => reply(StatusCode::OK, "ok\n".into()),
                "/metrics" => reply(
                    StatusCode::OK,
                    format!(
                        "# HELP go_app_requests_total Requests that the application has answered.\n# TYPE go_app_requests_total counter\ngo_app_requests_total{{version=\"{version}\"}} {}\n",
                        count.load(Ordering::Relaxed)
                    ),
                ),
                path => {
                    count.fetch_add(1, Ordering::Relaxed);
                    reply(StatusCode::OK, format!("go-app version={version} pod={name} path={path}\n"))
                }
            }
        }
    })
    .await
}

/// A port on which only `/healthz` is of interest.
pub(super) async fn health(port: u16) -> anyhow::Result<()> {
    serve(port, None, |request: Request<Incoming>, _| async move {
        match request.uri().path() {
            "/healthz" => reply(StatusCode::OK, "ok\n".into()),
            _ => reply(StatusCode::NOT_FOUND, "not found\n".into()),
        }
    })
    .await
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Ports {
    http: Vec<(u16, bool)>,
    grpc: Vec<u16>,
    tcp: Vec<u16>,
}

fn ports(args: &[String]) -> anyhow::Result<Ports> {
    let mut out = Ports::default();
    for arg in args {
        let number = |text: &str| text.parse::<u16>().with_context(|| format!("{arg}: not a port"));
        match arg.split_once('=') {
            Some(("--port", n)) => out.http.push((number(n)?, false)),
            Some(("--grpc", n)) => out.grpc.push(number(n)?),
            Some(("--tcp", n)) => out.tcp.push(number(n)?),
            None if arg == "--tls" => out.http.last_mut().context("--tls belongs after the --port that it is for")?.1 = true,
            _ => bail!("{arg}: echo knows --port=N, --tls, --grpc=N and --tcp=N"),
        }
    }
    if out == Ports::default() {
        out.http.push((8080, false));
    }
    Ok(out)
}

/// What was received, as the client prints it.
fn describe(request: &http::request::Parts, port: u16, from: SocketAddr, grpc: bool) -> String {
    let mut out = String::new();
    let host = request.uri.authority().map(ToString::to_string);
    let header = request.headers.get("host").map(|h| String::from_utf8_lossy(h.as_bytes()).into_owned());
    for (name, value) in request.headers.iter().filter(|(name, _)| *name != "host") {
        let name = if grpc { name.to_string() } else { title(name.as_str()) };
        let _ = writeln!(out, "RequestHeader={name}:{}", String::from_utf8_lossy(value.as_bytes()));
    }
    let proto = match request.version {
        Version::HTTP_2 => "HTTP/2.0",
        Version::HTTP_10 => "HTTP/1.0",
        _ => "HTTP/1.1",
    };
    let url = request.uri.path_and_query().map_or("/", |p| p.as_str());
    let ip = from.ip().to_canonical();
    let _ = writeln!(out, "Host={}", header.or(host).unwrap_or_default());
    let _ = writeln!(out, "Hostname={}", hostname());
    let _ = writeln!(out, "Method={}\nProto={proto}\nURL={url}\nServicePort={port}\nIP={ip}\nServiceVersion={}", request.method, variable("VERSION", ""));
    out
}

async fn echo_http(request: Request<Incoming>, port: u16, from: SocketAddr) -> Response<Body> {
    let (parts, incoming) = request.into_parts();
    let text = describe(&parts, port, from, false);
    // The body is read to its end, so that the connection can be used again.
    let _ = incoming.collect().await;
    reply(StatusCode::OK, text)
}

async fn echo_grpc(request: Request<Incoming>, port: u16, from: SocketAddr) -> Response<Body> {
    let (parts, incoming) = request.into_parts();
    let path = parts.uri.path().to_owned();
    let message = incoming.collect().await.ok().and_then(|b| unframe(&b.to_bytes()));
    let (code, problem) = match (&path[..], &message) {
        ("/proto.EchoTestService/Echo", Some(_)) => ("0", ""),
        ("/proto.EchoTestService/Echo", None) => ("3", "the message can't be read"),
        _ => ("12", "unknown method"),
    };
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static(code));
    if !problem.is_empty() {
        trailers.insert("grpc-message", HeaderValue::from_static(problem));
    }
    let data = if code == "0" {
        let text = format!("StatusCode=200\nEcho={}\n{}", message.unwrap_or_default(), describe(&parts, port, from, true));
        frame(&text)
    } else {
        Vec::new()
    };
    let mut response = Response::new(Full::new(Bytes::from(data)).with_trailers(async { Some(Ok(trailers)) }).boxed());
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    response
}

/// Speaks first, as many old protocols do, then sends everything back.
async fn echo_tcp(port: u16) -> anyhow::Result<()> {
    let listener = bind(port).await?;
    let greet = |mut stream: TcpStream| async move {
        stream.write_all(format!("hello from {}\n", hostname()).as_bytes()).await?;
        let (mut read, mut write) = stream.split();
        tokio::io::copy(&mut read, &mut write).await?;
        write.shutdown().await
    };
    let mut stop = std::pin::pin!(told_to_stop());
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                if let Ok((stream, _)) = accepted {
                    tokio::spawn(greet(stream));
                }
            }
            () = &mut stop => return Ok(()),
        }
    }
}

fn certificate() -> anyhow::Result<tokio_rustls::TlsAcceptor> {
    let made = rcgen::generate_simple_self_signed(vec!["echo".to_owned(), "localhost".to_owned()])?;
    let key = rustls_pki_types::PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(tokio_rustls::TlsAcceptor::from(Arc::new(config)))
}

/// The echo server, on all the ports that it was given.
pub(super) async fn echo(args: &[String]) -> anyhow::Result<()> {
    let ports = ports(args)?;
    println!("echo listens: {ports:?}");
    let mut all: Vec<futures::future::BoxFuture<'static, anyhow::Result<()>>> = Vec::new();
    for (port, tls) in ports.http {
        let tls = if tls { Some(certificate()?) } else { None };
        all.push(Box::pin(serve(port, tls, move |request, from| echo_http(request, port, from))));
    }
    for port in ports.grpc {
        all.push(Box::pin(serve(port, None, move |request, from| echo_grpc(request, port, from))));
    }
    for port in ports.tcp {
        all.push(Box::pin(echo_tcp(port)));
    }
    futures::future::try_join_all(all).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tls_is_for_the_port_before_it() {
        let args = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let got = ports(&args("--port=80 --port=443 --tls --grpc=7 --tcp=9")).unwrap();
        assert_eq!(got, Ports { http: vec![(80, false), (443, true)], grpc: vec![7], tcp: vec![9] });
        assert!(ports(&args("--tls")).is_err() && ports(&args("--port=99999")).is_err());
        assert_eq!(ports(&[]).unwrap().http, [(8080, false)]);
    }
}
