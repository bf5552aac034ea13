//! `client <scheme>://<host[:port]><path> [--method=GET] [-H Name:value]… [--count=N]`: prints one block per request.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{frame, title, unframe};

const LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug)]
struct Ask {
    url: String,
    uri: Uri,
    grpc: bool,
    method: Method,
    headers: Vec<(HeaderName, HeaderValue)>,
    authority: String,
    count: u32,
}

fn parse(args: &[String]) -> anyhow::Result<Ask> {
    let (mut url, mut method, mut headers, mut count, mut host) = (None, Method::GET, Vec::new(), 1, None);
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        let (key, value) = match arg.split_once('=') {
            Some((key, value)) if key.starts_with('-') => (key, Some(value.to_owned())),
            _ => (arg.as_str(), None),
        };
        let mut value = || value.clone().or_else(|| rest.next().cloned()).with_context(|| format!("{arg} needs a value"));
        match key {
            "--method" => method = value()?.parse().context("--method")?,
            "--count" => count = value()?.parse().context("--count")?,
            "-H" | "--header" => {
                let text = value()?;
                let (name, content) = text.split_once(':').with_context(|| format!("-H {text}: should be Name:value"))?;
                if name.eq_ignore_ascii_case("host") {
                    host = Some(content.trim().to_owned());
                } else {
                    headers.push((name.parse().with_context(|| format!("-H {text}"))?, content.trim().parse().with_context(|| format!("-H {text}"))?));
                }
            }
            _ if key.starts_with('-') => bail!("{arg}: client knows --method, --count and -H"),
            _ => url = Some(arg.clone()),
        }
    }
    let url = url.context("a URL is needed, such as http://echo/path")?;
    let uri: Uri = url.parse().with_context(|| url.clone())?;
    let grpc = match uri.scheme_str() {
        Some("http") => false,
        Some("grpc") => true,
        other => bail!("{url}: the scheme must be http or grpc, not {}", other.unwrap_or("none")),
    };
    let authority = host.or_else(|| uri.authority().map(ToString::to_string)).context("the URL has no host")?;
    Ok(Ask { url, uri, grpc, method, headers, authority, count })
}

/// One answer: status, headers, body.
type Answer = (u16, HeaderMap, String);

enum Connection {
    One(http1::SendRequest<Full<Bytes>>),
    Two(http2::SendRequest<Full<Bytes>>),
}

async fn connect(ask: &Ask) -> anyhow::Result<Connection> {
    let host = ask.uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
    let port = ask.uri.port_u16().unwrap_or(80);
    let stream = TcpStream::connect((host.as_str(), port)).await.with_context(|| format!("connect to {host}:{port}"))?;
    stream.set_nodelay(true)?;
    if ask.grpc {
        let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        return Ok(Connection::Two(sender));
    }
    let (sender, connection) = http1::Builder::new().title_case_headers(true).handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(Connection::One(sender))
}

async fn send(ask: &Ask, connection: &mut Connection) -> anyhow::Result<Answer> {
    let path = ask.uri.path_and_query().map_or("/", |p| p.as_str());
    let response = match connection {
        Connection::One(sender) => {
            let mut request = Request::builder().method(ask.method.clone()).uri(path).header("host", &ask.authority);
            for (name, value) in &ask.headers {
                request = request.header(name, value);
            }
            sender.ready().await?;
            sender.send_request(request.body(Full::default())?).await?
        }
        Connection::Two(sender) => {
            let path = if path == "/" { "/proto.EchoTestService/Echo" } else { path };
            let mut request = Request::post(format!("http://{}{path}", ask.authority)).header("content-type", "application/grpc").header("te", "trailers");
            for (name, value) in &ask.headers {
                request = request.header(name, value);
            }
            sender.ready().await?;
            sender.send_request(request.body(Full::new(Bytes::from(frame("hello"))))?).await?
        }
    };
    let (parts, body) = response.into_parts();
    let collected = body.collect().await.context("the answer broke off")?;
    let trailers = collected.trailers().cloned().unwrap_or_default();
    let bytes = collected.to_bytes();
    if !ask.grpc {
        return Ok((parts.status.as_u16(), parts.headers, String::from_utf8_lossy(&bytes).into_owned()));
    }
    let code = trailers.get("grpc-status").or_else(|| parts.headers.get("grpc-status")).and_then(|v| v.to_str().ok()).unwrap_or("none");
    if code != "0" {
        let message = trailers.get("grpc-message").or_else(|| parts.headers.get("grpc-message")).and_then(|v| v.to_str().ok()).unwrap_or_default();
        bail!("grpc status {code} (HTTP {}): {message}", parts.status.as_u16());
    }
    let text = unframe(&bytes).context("the answer is no EchoResponse")?;
    Ok((200, parts.headers, text))
}

fn block(n: u32, ask: &Ask, (status, headers, body): &Answer) -> String {
    let mut out = format!("[{n}] Url={}\n", ask.url);
    if !ask.grpc {
        let _ = writeln!(out, "[{n}] StatusCode={status}");
    }
    for (name, value) in headers {
        let name = if ask.grpc { name.to_string() } else { title(name.as_str()) };
        let _ = writeln!(out, "[{n}] ResponseHeader={name}:{}", String::from_utf8_lossy(value.as_bytes()));
    }
    for line in body.lines() {
        let _ = writeln!(out, "[{n} body] {line}");
    }
    out
}

pub(super) async fn run(args: &[String]) -> anyhow::Result<()> {
    let ask = parse(args)?;
    let mut connection = None;
    for n in 0..ask.count {
        let reused = connection.is_some();
        let work = async {
            if connection.is_none() {
                connection = Some(connect(&ask).await?);
            }
            let open = connection.as_mut().context("no connection")?;
            match send(&ask, open).await {
                // The server may have closed an idle connection.
                Err(_) if reused => {
                    let fresh = connection.insert(connect(&ask).await?);
                    send(&ask, fresh).await
                }
                other => other,
            }
        };
        let answer = timeout(LIMIT, work).await.with_context(|| format!("{}: no answer within 5 s", ask.url))?;
        let answer = answer.with_context(|| format!("request {n} to {}", ask.url))?;
        if n > 0 {
            println!();
        }
        print!("{}", block(n, &ask, &answer));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_read_as_the_conformance_suite_writes_them() {
        let args = ["http://echo:81/a%20b?q=1", "--method=POST", "-H", "X-One:1", "-H", "Host:other", "--count=3"].map(str::to_owned);
        let ask = parse(&args).unwrap();
        assert_eq!((ask.authority.as_str(), ask.count, ask.method.as_str(), ask.headers.len()), ("other", 3, "POST", 1));
        assert_eq!(ask.uri.path_and_query().unwrap().as_str(), "/a%20b?q=1");
        assert!(parse(&["https://x".into()]).is_err() && parse(&["-H".into()]).is_err());
    }
}
