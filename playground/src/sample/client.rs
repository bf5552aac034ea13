//! The echo client: sends requests and prints, per request, what came back in lines that tests read.
//!
//! `[0] StatusCode=200`, `[0] ResponseHeader=Name:value`, `[0 body] …` for each line of the body; an empty line between requests.
//! Redirects aren't followed, paths are sent as they are given. One connection is reused; when the server has closed it, the next request
//! makes a new one. The exit status is 0 only if every request was answered.

use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::grpc;

#[derive(Debug, Clone, PartialEq)]
struct Options {
    scheme: String,
    /// Where to connect: host and port.
    address: (String, u16),
    /// `host[:port]` of the URL.
    authority: String,
    path: String,
    method: http::Method,
    headers: Vec<(String, String)>,
    count: u32,
    timeout: Duration,
    body: String,
    http2: bool,
}

fn parse(args: &[String]) -> anyhow::Result<Options> {
    let (mut url, mut headers, mut method) = (None, Vec::new(), http::Method::GET);
    let (mut count, mut timeout, mut body, mut http2) = (1, Duration::from_secs(5), String::new(), false);
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        let (name, inline) = match arg.split_once('=') {
            Some((name, value)) if name.starts_with("--") => (name, Some(value.to_owned())),
            _ => (arg.as_str(), None),
        };
        let mut value = || inline.clone().or_else(|| rest.next().cloned()).with_context(|| format!("{name} needs a value"));
        match name {
            "--method" => method = value()?.parse().context("--method")?,
            "-H" | "--header" => {
                let header = value()?;
                let (name, value) = header.split_once(':').with_context(|| format!("-H {header}: not NAME:VALUE"))?;
                headers.push((name.trim().to_owned(), value.trim().to_owned()));
            }
            "--count" => count = value()?.parse().context("--count")?,
            "--timeout" => timeout = Duration::from_secs_f64(value()?.trim_end_matches('s').parse().context("--timeout")?),
            "--body" => body = value()?,
            "--http2" => http2 = true,
            _ if name.starts_with('-') => bail!("unknown option {name}\n{}", super::USAGE),
            _ if url.is_some() => bail!("more than one URL\n{}", super::USAGE),
            _ => url = Some(arg.clone()),
        }
    }
    let url = url.with_context(|| format!("no URL\n{}", super::USAGE))?;
    let (scheme, rest) = url.split_once("://").with_context(|| format!("{url}: not SCHEME://HOST[:PORT]/PATH"))?;
    let default = match scheme {
        "http" | "grpc" => 80,
        "https" => 443,
        "tcp" => 0,
        _ => bail!("{url}: the scheme is none of http, https, grpc, tcp"),
    };
    let cut = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(cut);
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port.parse().with_context(|| format!("{url}: port"))?),
        _ => (authority, default),
    };
    ensure!(!host.is_empty() && port != 0, "{url}: host or port is missing");
    let path = match path {
        "" => "/".to_owned(),
        path if path.starts_with('?') => format!("/{path}"),
        path => path.to_owned(),
    };
    let address = (host.trim_matches(['[', ']']).to_owned(), port);
    let authority = authority.to_owned();
    Ok(Options { scheme: scheme.to_owned(), address, authority, path, method, headers, count, timeout, body, http2 })
}

enum Sender {
    One(http1::SendRequest<Full<Bytes>>),
    Two(http2::SendRequest<Full<Bytes>>),
}

impl Sender {
    async fn ready(&mut self) -> bool {
        match self {
            Self::One(s) => s.ready().await.is_ok(),
            Self::Two(s) => s.ready().await.is_ok(),
        }
    }

    async fn send(&mut self, request: Request<Full<Bytes>>) -> hyper::Result<Response<Incoming>> {
        match self {
            Self::One(s) => s.send_request(request).await,
            Self::Two(s) => s.send_request(request).await,
        }
    }
}

async fn handshake<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(stream: S, two: bool) -> anyhow::Result<Sender> {
    let io = TokioIo::new(stream);
    if two {
        let (sender, connection) = http2::Builder::new(TokioExecutor::new()).timer(TokioTimer::new()).handshake(io).await?;
        tokio::spawn(connection);
        Ok(Sender::Two(sender))
    } else {
        let (sender, connection) = http1::handshake(io).await?;
        tokio::spawn(connection);
        Ok(Sender::One(sender))
    }
}

async fn connect(options: &Options) -> anyhow::Result<Sender> {
    let (host, port) = &options.address;
    let stream = TcpStream::connect((host.as_str(), *port)).await.with_context(|| format!("connect to {host}:{port}"))?;
    stream.set_nodelay(true)?;
    let two = options.http2 || options.scheme == "grpc";
    if options.scheme == "https" {
        return handshake(crate::tls::unverified(host, stream).await.context("TLS")?, two).await;
    }
    handshake(stream, two).await
}

fn request(options: &Options) -> anyhow::Result<Request<Full<Bytes>>> {
    let grpc = options.scheme == "grpc";
    let authority = options.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case("host")).map_or(&options.authority, |(_, v)| v);
    let two = options.http2 || grpc;
    let path = if grpc { grpc::ECHO } else { &options.path };
    let scheme = if options.scheme == "https" { "https" } else { "http" };
    let uri = if two { format!("{scheme}://{authority}{path}") } else { path.to_owned() };
    let body = if grpc { grpc::frame(&options.body) } else { Bytes::from(options.body.clone()) };
    let method = if grpc { http::Method::POST } else { options.method.clone() };
    let mut request = Request::builder()
        .method(method)
        .uri(&uri)
        .body(Full::new(body))
        .with_context(|| format!("{uri:?} as a request target"))?;
    let headers = request.headers_mut();
    if !two {
        headers.insert("host", HeaderValue::from_str(authority)?);
    }
    if grpc {
        headers.insert("content-type", HeaderValue::from_static("application/grpc"));
        headers.insert("te", HeaderValue::from_static("trailers"));
    }
    for (name, value) in options.headers.iter().filter(|(n, _)| !n.eq_ignore_ascii_case("host")) {
        headers.append(
            HeaderName::from_bytes(name.as_bytes()).with_context(|| format!("-H {name}"))?,
            HeaderValue::from_str(value)?,
        );
    }
    if !headers.contains_key("user-agent") {
        headers.insert("user-agent", HeaderValue::from_static("weft-sample-client"));
    }
    Ok(request)
}

/// Prints the block of one answer.
async fn print(index: u32, options: &Options, response: Response<Incoming>) -> anyhow::Result<()> {
    let (parts, body) = response.into_parts();
    let collected = body.collect().await.context("the answer's body")?;
    let trailers = collected.trailers().cloned().unwrap_or_default();
    let bytes = collected.to_bytes();
    let mut out = format!("[{index}] Url={}://{}{}\n", options.scheme, options.authority, options.path);
    let text = if options.scheme == "grpc" {
        let status = parts
            .headers
            .get("grpc-status")
            .or_else(|| trailers.get("grpc-status"))
            .and_then(|s| s.to_str().ok())
            .unwrap_or("none");
        if status != "0" {
            let message = parts.headers.get("grpc-message").or_else(|| trailers.get("grpc-message"));
            let message = message.map(|m| String::from_utf8_lossy(m.as_bytes()).into_owned()).unwrap_or_default();
            bail!("rpc error: grpc-status {status} (HTTP {}): {message}", parts.status.as_u16());
        }
        let text = grpc::unframe(&bytes).context("the answer is no gRPC message")?;
        let code = text.lines().find_map(|l| l.strip_prefix("StatusCode=")).unwrap_or("200");
        out.push_str(&format!("[{index}] StatusCode={code}\n"));
        text
    } else {
        out.push_str(&format!("[{index}] StatusCode={}\n", parts.status.as_u16()));
        String::from_utf8_lossy(&bytes).into_owned()
    };
    for (name, value) in parts.headers.iter().chain(&trailers) {
        out.push_str(&format!("[{index}] ResponseHeader={}:{}\n", canonical(name), String::from_utf8_lossy(value.as_bytes())));
    }
    for line in text.lines() {
        out.push_str(&format!("[{index} body] {line}\n"));
    }
    if index + 1 < options.count {
        out.push('\n');
    }
    std::io::stdout().write_all(out.as_bytes())?;
    Ok(())
}

/// A header's name in its usual spelling.
fn canonical(name: &HeaderName) -> String {
    let part = |p: &str| p.get(..1).map(|first| first.to_uppercase() + &p[1..]).unwrap_or_default();
    name.as_str().split('-').map(part).collect::<Vec<_>>().join("-")
}

async fn tcp(index: u32, options: &Options) -> anyhow::Result<()> {
    let (host, port) = &options.address;
    let mut stream = TcpStream::connect((host.as_str(), *port)).await.with_context(|| format!("connect to {host}:{port}"))?;
    stream.write_all(options.body.as_bytes()).await?;
    stream.shutdown().await?;
    let mut text = Vec::new();
    stream.read_to_end(&mut text).await?;
    println!("[{index}] Url=tcp://{}\n[{index}] StatusCode=200", options.authority);
    for line in String::from_utf8_lossy(&text).lines() {
        println!("[{index} body] {line}");
    }
    if index + 1 < options.count {
        println!();
    }
    Ok(())
}

/// Sends the requests, one after another.
pub(super) async fn run(args: &[String]) -> anyhow::Result<()> {
    let options = parse(args)?;
    let mut sender: Option<Sender> = None;
    for index in 0..options.count {
        let once = async {
            if options.scheme == "tcp" {
                return tcp(index, &options).await;
            }
            let mut open = match sender.take() {
                Some(mut open) => {
                    if open.ready().await {
                        open
                    } else {
                        connect(&options).await?
                    }
                }
                None => connect(&options).await?,
            };
            let response = open.send(request(&options)?).await.with_context(|| format!("request {index}"))?;
            print(index, &options, response).await?;
            sender = Some(open);
            Ok(())
        };
        match tokio::time::timeout(options.timeout, once).await {
            Ok(result) => result?,
            Err(_) => bail!("request {index}: no answer within {:?}", options.timeout),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_of_the_conformance_suite_is_understood() {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let got = parse(&words("http://echo/path/../x?a=b -H Host:other -H A:1 -H A:2 --method=POST --count=500")).unwrap();
        assert_eq!((got.address, got.path.as_str(), got.count), (("echo".to_owned(), 80), "/path/../x?a=b", 500));
        assert_eq!(got.headers.len(), 3);
        let got = parse(&words("grpc://[fd00::1]:7070")).unwrap();
        assert_eq!((got.address, got.path.as_str()), (("fd00::1".to_owned(), 7070), "/"));
        for bad in
            ["", "echo", "ftp://a/", "http:///x", "http://a http://b", "http://a --count=x", "http://a -H nothing", "tcp://a"]
        {
            assert!(parse(&words(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_host_header_is_the_authority() {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let one = request(&parse(&words("http://echo:8080/a//b -H Host:other")).unwrap()).unwrap();
        assert_eq!((one.headers()["host"].to_str().unwrap(), one.uri().to_string().as_str()), ("other", "/a//b"));
        let two = request(&parse(&words("grpc://echo:7070 -H host:other")).unwrap()).unwrap();
        assert_eq!(two.uri().to_string(), format!("http://other{}", grpc::ECHO));
    }
}
