//! The echo server: answers with what it saw of the request, over HTTP/1.1, HTTP/2, TLS and gRPC, and sends TCP bytes back.

use std::convert::Infallible;
use std::fs;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use futures::future::join_all;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Frame, Incoming};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

use super::serve::{self, Body};
use super::{grpc, hostname, setting};

#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    http: Vec<u16>,
    grpc: Vec<u16>,
    tcp: Vec<u16>,
    server_first: Vec<u16>,
    tls: Vec<u16>,
    crt: Option<String>,
    key: Option<String>,
    version: String,
}

fn parse(args: &[String]) -> anyhow::Result<Options> {
    let mut out = Options::default();
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        let (name, value) = match arg.split_once('=') {
            Some((name, value)) => (name, value.to_owned()),
            None => (arg.as_str(), rest.next().cloned().with_context(|| format!("{arg} needs a value"))?),
        };
        let port = || value.parse::<u16>().with_context(|| format!("{name}={value}: not a port"));
        match name {
            "--port" => out.http.push(port()?),
            "--grpc" => out.grpc.push(port()?),
            "--tcp" => out.tcp.push(port()?),
            "--server-first" => out.server_first.push(port()?),
            "--tls" => out.tls.push(port()?),
            "--crt" => out.crt = Some(value),
            "--key" => out.key = Some(value),
            "--version" => out.version = value,
            _ => bail!("unknown option {name}\n{}", super::USAGE),
        }
    }
    if out.http.is_empty() && out.grpc.is_empty() && out.tcp.is_empty() && out.server_first.is_empty() {
        out.http.push(setting("PORT", "8080").parse().context("PORT")?);
    }
    Ok(out)
}

fn acceptor(options: &Options) -> anyhow::Result<TlsAcceptor> {
    use rustls_pki_types::pem::PemObject as _;
    use rustls_pki_types::{CertificateDer, PrivateKeyDer};
    let (crt, key) = match (&options.crt, &options.key) {
        (Some(crt), Some(key)) => (fs::read(crt).with_context(|| crt.clone())?, fs::read(key).with_context(|| key.clone())?),
        (None, None) => {
            let own = rcgen::generate_simple_self_signed(["localhost".to_owned(), "echo".to_owned(), hostname()])?;
            (own.cert.pem().into_bytes(), own.signing_key.serialize_pem().into_bytes())
        }
        _ => bail!("--crt and --key belong together"),
    };
    let chain = CertificateDer::pem_slice_iter(&crt).collect::<Result<Vec<_>, _>>().context("--crt")?;
    let key = PrivateKeyDer::from_pem_slice(&key).context("--key")?;
    let mut config = rustls::ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Header values as they came, one line each, names in their usual spelling.
fn header_lines(headers: &HeaderMap, out: &mut String) {
    for (name, value) in headers {
        let name: Vec<String> = name
            .as_str()
            .split('-')
            .map(|part| {
                let mut letters = part.chars();
                letters.next().map(|c| c.to_ascii_uppercase()).into_iter().chain(letters).collect()
            })
            .collect();
        out.push_str(&format!("RequestHeader={}:{}\n", name.join("-"), String::from_utf8_lossy(value.as_bytes())));
    }
}

/// The lines about a request.
fn describe(request: &http::request::Parts, version: &str, port: u16, peer: SocketAddr) -> String {
    let host = request.headers.get("host").and_then(|h| h.to_str().ok()).map(str::to_owned);
    let host = host.or_else(|| request.uri.authority().map(ToString::to_string)).unwrap_or_default();
    let url = request.uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let proto = match request.version {
        http::Version::HTTP_2 => "HTTP/2.0",
        http::Version::HTTP_10 => "HTTP/1.0",
        _ => "HTTP/1.1",
    };
    let mut out = format!(
        "ServiceVersion={version}\nServicePort={port}\nHost={host}\nURL={url}\nMethod={}\nProto={proto}\nIP={}\n",
        request.method,
        peer.ip().to_canonical()
    );
    header_lines(&request.headers, &mut out);
    out.push_str(&format!("Hostname={}\n", hostname()));
    out
}

async fn answer(request: Request<Incoming>, version: String, port: u16, peer: SocketAddr) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let status = serve::misbehave(&parts.uri).await;
    let mut text = describe(&parts, &version, port, peer);
    let size = match body.collect().await {
        Ok(body) => body.to_bytes().len(),
        Err(e) => return serve::plain(400, "text/plain", format!("the request's body: {e}\n")),
    };
    if size > 0 {
        text.push_str(&format!("RequestBytes={size}\n"));
    }
    serve::plain(status, "text/plain", text)
}

fn with_trailers(message: Bytes, status: &'static str) -> Response<Body> {
    let trailers = HeaderMap::from_iter([(http::HeaderName::from_static("grpc-status"), HeaderValue::from_static(status))]);
    let frames = [Frame::data(message), Frame::trailers(trailers)].map(Ok::<_, Infallible>);
    let mut response = Response::new(StreamBody::new(futures::stream::iter(frames)).boxed());
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    response
}

async fn rpc(request: Request<Incoming>, version: String, port: u16, peer: SocketAddr) -> Response<Body> {
    let (parts, body) = request.into_parts();
    match parts.uri.path() {
        grpc::HEALTH => with_trailers(grpc::serving(), "0"),
        grpc::ECHO => {
            let message = body.collect().await.ok().and_then(|b| grpc::unframe(&b.to_bytes()));
            let Some(message) = message else { return with_trailers(Bytes::new(), "3") };
            let mut text = format!("StatusCode=200\n{}", describe(&parts, &version, port, peer));
            if !message.is_empty() {
                text.push_str(&format!("Echo={message}\n"));
            }
            with_trailers(grpc::frame(&text), "0")
        }
        _ => with_trailers(Bytes::new(), "12"),
    }
}

/// Sends back what comes, to the end; a server that speaks first begins with its name.
async fn tcp(mut stream: TcpStream, first: bool) {
    if first && stream.write_all(format!("Hostname={}\n", hostname()).as_bytes()).await.is_err() {
        return;
    }
    let mut buffer = vec![0; 64 << 10];
    while let Ok(n) = stream.read(&mut buffer).await {
        if n == 0 || stream.write_all(&buffer[..n]).await.is_err() {
            break;
        }
    }
    let _ = stream.shutdown().await;
}

/// Serves until SIGTERM.
pub(super) async fn run(args: &[String]) -> anyhow::Result<()> {
    let options = parse(args)?;
    let end = serve::ending()?;
    let version = if options.version.is_empty() { setting("VERSION", "") } else { options.version.clone() };
    let mut servers: Vec<futures::future::BoxFuture<'_, ()>> = Vec::new();
    let plain_tls: Vec<u16> =
        options.tls.iter().filter(|p| !options.http.contains(p) && !options.grpc.contains(p)).copied().collect();
    for port in options.http.iter().chain(&plain_tls).copied() {
        let tls = options.tls.contains(&port).then(|| acceptor(&options)).transpose()?;
        let version = version.clone();
        servers.push(Box::pin(serve::http(serve::listen(port)?, tls, end.clone(), move |r, peer| {
            answer(r, version.clone(), port, peer)
        })));
        println!("echo: HTTP on port {port}");
    }
    for port in options.grpc.iter().copied() {
        let tls = options.tls.contains(&port).then(|| acceptor(&options)).transpose()?;
        let version = version.clone();
        servers.push(Box::pin(serve::http(serve::listen(port)?, tls, end.clone(), move |r, peer| {
            rpc(r, version.clone(), port, peer)
        })));
        println!("echo: gRPC on port {port}");
    }
    for (port, first) in options.tcp.iter().map(|p| (*p, false)).chain(options.server_first.iter().map(|p| (*p, true))) {
        let end = end.clone();
        let listener = serve::listen(port)?;
        servers.push(Box::pin(serve::accept(listener, end, move |stream, _| tcp(stream, first))));
        println!("echo: TCP on port {port}");
    }
    join_all(servers).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_in_both_spellings() {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let got = parse(&words("--port=8080 --port 8443 --tls=8443 --grpc=7070 --tcp=9090 --version=v2")).unwrap();
        assert_eq!(
            (got.http, got.tls, got.grpc, got.tcp, got.version.as_str()),
            (vec![8080, 8443], vec![8443], vec![7070], vec![9090], "v2")
        );
        assert!(parse(&words("--port=x")).is_err());
        assert!(parse(&words("--what=1")).is_err());
    }
}
