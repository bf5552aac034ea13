//! SPDY/3.1, as much of it as Kubernetes' streaming protocols use: exec, attach and port-forward of kubectl before WebSocket,
//! and port-forward of kubectl since, which tunnels SPDY through a WebSocket (`SPDY/3.1+portforward.k8s.io`).
//!
//! The client opens the streams, one `SYN_STREAM` each with a `streamtype` header; we answer and carry data both ways. Flow
//! control is left out, as the peers (which all use the same Go library) leave it out; the bounded channels here and TCP
//! below push back instead. Anything malformed ends the connection and with it all its streams.

use super::backend::{Duplex, ExecSession, NodeBackend};
use super::inflate::Inflate;
use bytes::Bytes;
use serde_json::Value;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const FIN: u8 = 1;
/// How long the client may take to open the streams of a command.
const OPENING: Duration = Duration::from_secs(30);

/// The words that header blocks may refer to (SPDY/3, section 2.6.10.1), each with its length before it.
const WORDS: &str = "options,head,post,put,delete,trace,accept,accept-charset,accept-encoding,accept-language,accept-ranges,age,allow,\
authorization,cache-control,connection,content-base,content-encoding,content-language,content-length,content-location,content-md5,\
content-range,content-type,date,etag,expect,expires,from,host,if-match,if-modified-since,if-none-match,if-range,if-unmodified-since,\
last-modified,location,max-forwards,pragma,proxy-authenticate,proxy-authorization,range,referer,retry-after,server,te,trailer,\
transfer-encoding,upgrade,user-agent,vary,via,warning,www-authenticate,method,get,status,200 OK,version,HTTP/1.1,url,public,\
set-cookie,keep-alive,origin";
/// What follows the words in the dictionary.
const TAIL: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505\
203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden404 Not Found\
500 Internal Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 \
Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,\
text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.";

fn dictionary() -> Vec<u8> {
    let mut out = Vec::with_capacity(1423);
    for word in WORDS.split(',') {
        out.extend(u32::try_from(word.len()).unwrap_or(0).to_be_bytes());
        out.extend(word.as_bytes());
    }
    out.extend(TAIL.as_bytes());
    out
}

/// A stream that the client opened.
pub(super) struct Stream {
    /// Its headers, names in lower case.
    pub headers: HashMap<String, String>,
    /// What the client sends; ends with the client's half of the stream.
    pub reader: mpsc::Receiver<Bytes>,
    /// Our half.
    pub writer: Writer,
}

/// Our half of a stream.
#[derive(Clone)]
pub(super) struct Writer {
    id: u32,
    out: mpsc::Sender<Vec<u8>>,
}

impl Writer {
    async fn frame(&self, flags: u8, data: &[u8]) -> bool {
        let mut frame = Vec::with_capacity(data.len() + 8);
        frame.extend(self.id.to_be_bytes());
        frame.extend((u32::from(flags) << 24 | u32::try_from(data.len()).unwrap_or(0)).to_be_bytes());
        frame.extend(data);
        self.out.send(frame).await.is_ok()
    }

    /// Sends; `false` when the connection is gone.
    pub(super) async fn send(&self, data: &[u8]) -> bool {
        for part in data.chunks(32 * 1024) {
            if !self.frame(0, part).await {
                return false;
            }
        }
        true
    }

    /// Ends our half.
    pub(super) async fn finish(&self) {
        self.frame(FIN, &[]).await;
    }
}

fn control(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x80, 3];
    frame.extend(kind.to_be_bytes());
    frame.extend(u32::try_from(payload.len()).unwrap_or(0).to_be_bytes());
    frame.extend(payload);
    frame
}

/// The answer to a `SYN_STREAM`: no headers. The block is one zlib stream over the connection, written in stored pieces, each
/// followed by the empty piece that makes the reader hand out what it has.
fn accepted(id: u32, first: bool) -> Vec<u8> {
    let mut payload = id.to_be_bytes().to_vec();
    if first {
        payload.extend([0x78, 0x01]);
    }
    payload.extend([0, 4, 0, 0xfb, 0xff, 0, 0, 0, 0]);
    payload.extend([0, 0, 0, 0xff, 0xff]);
    control(SYN_REPLY, &payload)
}

fn headers(block: &[u8]) -> Option<HashMap<String, String>> {
    fn number(rest: &mut &[u8]) -> Option<usize> {
        let (head, tail) = rest.split_first_chunk::<4>()?;
        *rest = tail;
        usize::try_from(u32::from_be_bytes(*head)).ok()
    }
    fn text(rest: &mut &[u8]) -> Option<String> {
        let length = number(rest)?;
        let (head, tail) = rest.split_at_checked(length)?;
        *rest = tail;
        Some(String::from_utf8_lossy(head).into_owned())
    }
    let mut rest = block;
    let mut out = HashMap::new();
    for _ in 0..number(&mut rest)? {
        let name = text(&mut rest)?;
        out.insert(name.to_ascii_lowercase(), text(&mut rest)?);
    }
    Some(out)
}

/// Starts to speak SPDY on a connection. Streams come out of the receiver; it ends with the connection. The connection is
/// closed when the receiver and all streams are dropped.
pub(super) fn serve(io: impl Duplex + 'static) -> mpsc::Receiver<Stream> {
    let (streams, receiver) = mpsc::channel(16);
    let (out, mut frames) = mpsc::channel::<Vec<u8>>(64);
    let (mut read, mut write) = tokio::io::split(io);
    let reading = tokio::spawn(async move {
        // An error is the end of the connection, and that is all there is to say about it.
        let _ = frames_in(&mut read, streams, out).await;
    });
    tokio::spawn(async move {
        while let Some(frame) = frames.recv().await {
            if write.write_all(&frame).await.is_err() || write.flush().await.is_err() {
                break;
            }
        }
        let _ = write.shutdown().await;
        reading.abort();
    });
    receiver
}

async fn frames_in(
    read: &mut (impl AsyncRead + Unpin),
    streams: mpsc::Sender<Stream>,
    out: mpsc::Sender<Vec<u8>>,
) -> io::Result<()> {
    let broken = |why: &'static str| io::Error::new(io::ErrorKind::InvalidData, why);
    let mut inflate = Inflate::new(dictionary());
    let mut open: HashMap<u32, mpsc::Sender<Bytes>> = HashMap::new();
    // Held weakly: when nobody takes streams any more and all are done, the connection can close.
    let (answers, held) = (out.downgrade(), out);
    let mut held = Some(held);
    let mut first = true;
    loop {
        if streams.is_closed() {
            held = None;
        }
        let mut head = [0; 8];
        read.read_exact(&mut head).await?;
        let [a, b, c, d, flags, rest @ ..] = head;
        let length = u32::from_be_bytes([0, rest[0], rest[1], rest[2]]) as usize;
        let mut payload = vec![0; length];
        read.read_exact(&mut payload).await?;
        let number = |at: usize| payload.get(at..at + 4).and_then(|p| p.try_into().ok()).map(u32::from_be_bytes);
        if a & 0x80 == 0 {
            let id = u32::from_be_bytes([a, b, c, d]);
            if let Some(stream) = open.get(&id)
                && !payload.is_empty()
                && stream.send(payload.into()).await.is_err()
            {
                open.remove(&id);
            }
            if flags & FIN != 0 {
                open.remove(&id);
            }
            continue;
        }
        match u16::from_be_bytes([c, d]) {
            SYN_STREAM => {
                let id = number(0).ok_or_else(|| broken("a SYN_STREAM is too short"))? & 0x7fff_ffff;
                let block = payload.get(10..).ok_or_else(|| broken("a SYN_STREAM is too short"))?;
                let block = inflate.block(block).map_err(|e| broken(e.0))?;
                let headers = headers(&block).ok_or_else(|| broken("a header block is malformed"))?;
                let Some(out) = answers.upgrade().filter(|_| held.is_some()) else { return Ok(()) };
                let (sender, reader) = mpsc::channel(64);
                if flags & FIN == 0 {
                    open.insert(id, sender);
                }
                if out.send(accepted(id, std::mem::take(&mut first))).await.is_err() {
                    return Ok(());
                }
                if streams.send(Stream { headers, reader, writer: Writer { id, out } }).await.is_err() {
                    return Ok(());
                }
            }
            RST_STREAM => {
                open.remove(&number(0).unwrap_or(0));
            }
            PING => {
                if let Some(out) = answers.upgrade() {
                    let _ = out.send(control(PING, &payload)).await;
                }
            }
            GOAWAY => return Ok(()),
            // SETTINGS, HEADERS and WINDOW_UPDATE change nothing here.
            _ => {}
        }
    }
}

/// Port-forward: each connection of the client's is a pair of streams, `data` and `error`, of one request id.
pub(super) async fn forward(mut streams: mpsc::Receiver<Stream>, backend: Arc<dyn NodeBackend>, ns: String, pod: String) {
    let mut waiting: HashMap<String, Stream> = HashMap::new();
    while let Some(stream) = streams.recv().await {
        let header = |name: &str| stream.headers.get(name).cloned().unwrap_or_default();
        let id = format!("{}/{}", header("requestid"), header("port"));
        let Some(other) = waiting.remove(&id) else {
            waiting.insert(id, stream);
            continue;
        };
        let is_data = header("streamtype") == "data";
        let port = header("port").parse::<u16>().unwrap_or(0);
        let (data, error) = if is_data { (stream, other) } else { (other, stream) };
        let (backend, ns, pod) = (Arc::clone(&backend), ns.clone(), pod.clone());
        tokio::spawn(async move {
            match backend.port_forward(&ns, &pod, port).await {
                Ok(connection) => carry(data, connection).await,
                Err(status) => {
                    error.writer.send(format!("error forwarding port {port} to pod {pod}: {}", status.message).as_bytes()).await;
                    data.writer.finish().await;
                }
            }
            error.writer.finish().await;
        });
    }
}

async fn carry(mut data: Stream, connection: Box<dyn Duplex>) {
    let (mut read, mut write) = tokio::io::split(connection);
    let writer = data.writer.clone();
    let up = async {
        while let Some(bytes) = data.reader.recv().await {
            if write.write_all(&bytes).await.is_err() {
                return;
            }
        }
        let _ = write.shutdown().await;
    };
    let down = async {
        pump(&mut read, &writer).await;
        writer.finish().await;
    };
    // The pod's end decides: what the client still sends after it has nowhere to go.
    let mut down = std::pin::pin!(down);
    tokio::select! {
        () = &mut down => {}
        () = up => down.await,
    }
}

async fn pump(read: &mut (impl AsyncRead + Unpin), writer: &Writer) {
    let mut buffer = vec![0; 32 * 1024];
    while let Ok(n @ 1..) = read.read(&mut buffer).await {
        if !writer.send(&buffer[..n]).await {
            return;
        }
    }
}

/// Exec and attach: the streams are named; the exit status goes out on `error` as `status` makes it (`v4.channel.k8s.io`).
pub(super) async fn exec(
    mut streams: mpsc::Receiver<Stream>,
    session: ExecSession,
    tty: bool,
    status: impl Fn(&io::Result<i32>) -> Value,
) {
    let mut missing = 1
        + usize::from(session.stdin.is_some())
        + usize::from(session.stdout.is_some())
        + usize::from(session.stderr.is_some())
        + usize::from(tty);
    let mut named: HashMap<String, Stream> = HashMap::new();
    while missing > 0 {
        match tokio::time::timeout(OPENING, streams.recv()).await {
            Ok(Some(stream)) => {
                named.insert(stream.headers.get("streamtype").cloned().unwrap_or_default(), stream);
                missing -= 1;
            }
            _ => return,
        }
    }
    let Some(error) = named.remove("error") else { return };
    if let (Some(mut stdin), Some(mut stream)) = (session.stdin, named.remove("stdin")) {
        tokio::spawn(async move {
            while let Some(bytes) = stream.reader.recv().await {
                if stdin.write_all(&bytes).await.is_err() || stdin.flush().await.is_err() {
                    return;
                }
            }
            let _ = stdin.shutdown().await;
        });
    }
    if let (Some(resize), Some(mut stream)) = (session.resize, named.remove("resize")) {
        tokio::spawn(async move {
            while let Some(bytes) = stream.reader.recv().await {
                let size: Value = serde_json::from_slice(&bytes).unwrap_or_default();
                let side = |name: &str| size[name].as_u64().and_then(|n| u16::try_from(n).ok()).unwrap_or(0);
                if resize.send((side("Width"), side("Height"))).await.is_err() {
                    return;
                }
            }
        });
    }
    let mut outputs = Vec::new();
    for (name, output) in [("stdout", session.stdout), ("stderr", session.stderr)] {
        if let (Some(mut output), Some(stream)) = (output, named.remove(name)) {
            outputs.push(tokio::spawn(async move {
                pump(&mut output, &stream.writer).await;
                stream.writer.finish().await;
            }));
        }
    }
    let ended = tokio::select! {
        code = session.exit => code,
        // The client has gone: dropping the session ends the command.
        None = streams.recv() => return,
    };
    for output in outputs {
        let _ = output.await;
    }
    error.writer.send(status(&ended).to_string().as_bytes()).await;
    error.writer.finish().await;
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCKS: [&str; 2] = [
        "78f9e3c6a7c202253a703a2b294a4dcc851625aca9a0808614cb45a024cc64610024398b209198094adc8c0600000000ffff",
        "c2aa15540a2512d209000000ffff",
    ];

    fn unhex(text: &str) -> Vec<u8> {
        (0..text.len() / 2).map(|i| u8::from_str_radix(&text[i * 2..i * 2 + 2], 16).expect("hex")).collect()
    }

    #[test]
    fn the_dictionary_is_the_one_of_spdy_3() {
        let (mut a, mut b) = (1_u32, 0_u32);
        for byte in dictionary() {
            a = (a + u32::from(byte)) % 65521;
            b = (b + a) % 65521;
        }
        // The checksum that every SPDY/3 client writes into the head of its stream.
        assert_eq!(b << 16 | a, 0xe3c6_a7c2);
    }

    #[test]
    fn header_blocks_of_one_connection_are_one_stream() {
        let mut inflate = Inflate::new(dictionary());
        // Written by zlib, level 9, with the dictionary, flushed after each block.
        let blocks = BLOCKS.map(unhex);
        let got = blocks.map(|block| headers(&inflate.block(&block).expect("inflate")).expect("headers"));
        for (got, kind) in got.iter().zip(["error", "data"]) {
            let want = [("streamtype", kind), ("port", "80"), ("requestid", "0")];
            assert_eq!(*got, want.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
        }
    }

    #[test]
    fn broken_blocks_are_refused() {
        for block in ["", "78", "7801", "78bb", "0000", "780107", "7801000100feff", "7801ffff"] {
            let result = Inflate::new(dictionary()).block(&unhex(block));
            assert!(result.is_err() || result.as_deref() == Ok(&[]), "{block}: {result:?}");
        }
        let block = unhex(BLOCKS[0]);
        for cut in 7..block.len() - 5 {
            let whole = Inflate::new(dictionary()).block(&block[..cut]).ok().and_then(|b| headers(&b));
            assert!(whole.is_none(), "cut at {cut}");
        }
        assert!(headers(&[0, 0, 0, 9]).is_none());
        assert!(headers(&[0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff]).is_none());
    }
}
