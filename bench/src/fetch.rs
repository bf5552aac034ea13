//! A GET of a whole text, for what peers say of themselves.

use anyhow::{Context, Result, bail};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The body of `path` at `from`, which must be there (200).
pub(crate) async fn text(from: SocketAddr, path: &str) -> Result<String> {
    let exchange = async {
        let mut stream = TcpStream::connect(from).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await?;
        Ok::<_, std::io::Error>(bytes)
    };
    let bytes =
        tokio::time::timeout(Duration::from_secs(10), exchange).await.with_context(|| format!("{from}{path}: no answer"))?;
    let text = String::from_utf8(bytes.with_context(|| format!("{from}{path}"))?)?;
    body(&text).with_context(|| format!("{from}{path}"))
}

fn body(response: &str) -> Result<String> {
    let (head, body) = response.split_once("\r\n\r\n").context("no HTTP response")?;
    if head.split(' ').nth(1) != Some("200") {
        bail!("{}", head.lines().next().unwrap_or_default());
    }
    if !head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        return Ok(body.to_owned());
    }
    let (mut out, mut rest) = (String::new(), body);
    loop {
        let (length, after) = rest.split_once("\r\n").context("a chunk without a length")?;
        let length = usize::from_str_radix(length.split(';').next().unwrap_or_default().trim(), 16)?;
        if length == 0 {
            return Ok(out);
        }
        let (chunk, after) = after.split_at_checked(length).context("a chunk that is cut off")?;
        out.push_str(chunk);
        rest = after.strip_prefix("\r\n").context("a chunk without an end")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_come_in_one_piece_or_in_chunks() {
        assert_eq!(body("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc").unwrap(), "abc");
        let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=1\r\nde\r\n0\r\n\r\n";
        assert_eq!(body(chunked).unwrap(), "abcde");
        assert!(body(&chunked[..chunked.len() - 9]).is_err());
        assert!(body("HTTP/1.1 404 Not Found\r\n\r\n").is_err());
    }
}
