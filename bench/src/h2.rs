//! HTTP/2 (RFC 9113) from prepared frames, as much of it as a load generator and its backend need.
//!
//! The client keeps a fixed number of streams open on one connection; every request has the same prepared header block, every response is
//! judged by its first header field (`:status 200` is one byte of HPACK) and its length. The dynamic table is
//! switched off on both sides (SETTINGS_HEADER_TABLE_SIZE 0), so that header blocks need no state.

use crate::h1::BODY;
use anyhow::{Context, Result, bail};
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;

/// ACK of SETTINGS and PING.
const ACK: u8 = 0x1;
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

const SETTINGS_HEADER_TABLE_SIZE: u16 = 1;
const SETTINGS_ENABLE_PUSH: u16 = 2;
const SETTINGS_MAX_CONCURRENT_STREAMS: u16 = 3;
const SETTINGS_INITIAL_WINDOW_SIZE: u16 = 4;

/// Every connection and stream starts with this window.
const DEFAULT_WINDOW: i64 = 65_535;
/// What the client grants the peer on the connection at once, and again when it is half used.
const GRANT: u32 = 1 << 30;

/// `:method GET`, `:scheme http`, `:path /bench`, `:authority bench.example`, `user-agent`, `accept`: indexed fields of
/// the static table and literals that nobody has to remember (RFC 7541, 6.1 and 6.2.2).
const REQUEST_BLOCK: &[u8] = b"\x82\x86\x04\x06/bench\x01\x0dbench.example\x0f\x2b\x0aweft-bench\x0f\x04\x03*/*";
/// `:status 200`, `content-length 1024`, `content-type text/plain`.
const RESPONSE_BLOCK: &[u8] = b"\x88\x0f\x0d\x041024\x0f\x10\x0atext/plain";

#[derive(Debug, PartialEq)]
struct Frame<'a> {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: &'a [u8],
}

/// Takes one frame off `bytes`; `None` while it is incomplete.
fn take_frame<'a>(bytes: &mut &'a [u8]) -> Option<Frame<'a>> {
    let (head, rest) = bytes.split_at_checked(9)?;
    let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
    let (payload, rest) = rest.split_at_checked(length)?;
    *bytes = rest;
    let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & 0x7fff_ffff;
    Some(Frame { kind: head[3], flags: head[4], stream, payload })
}

fn put_frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes()[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}

fn put_settings(out: &mut Vec<u8>, settings: &[(u16, u32)]) {
    let mut payload = Vec::with_capacity(settings.len() * 6);
    for (id, value) in settings {
        payload.extend_from_slice(&id.to_be_bytes());
        payload.extend_from_slice(&value.to_be_bytes());
    }
    put_frame(out, SETTINGS, 0, 0, &payload);
}

/// Answers what both ends have to answer. Whether the frame was of that kind.
fn housekeeping(frame: &Frame<'_>, out: &mut Vec<u8>) -> bool {
    match (frame.kind, frame.flags & ACK) {
        (SETTINGS, 0) => put_frame(out, SETTINGS, ACK, 0, &[]),
        (PING, 0) => put_frame(out, PING, ACK, 0, frame.payload),
        (SETTINGS | PING, _) => {}
        _ => return false,
    }
    true
}

fn setting(frame: &Frame<'_>, id: u16) -> Option<u32> {
    let pairs = frame.payload.chunks_exact(6);
    pairs.filter(|p| u16::from_be_bytes([p[0], p[1]]) == id).map(|p| u32::from_be_bytes([p[2], p[3], p[4], p[5]])).next_back()
}

/// Whether a header block begins with `:status 200`, behind any number of table size updates.
fn is_ok(frame: &Frame<'_>) -> bool {
    let mut block = frame.payload;
    if frame.flags & PADDED != 0 {
        block = block.get(1..).unwrap_or_default();
    }
    if frame.flags & PRIORITY != 0 {
        block = block.get(5..).unwrap_or_default();
    }
    while let [first, rest @ ..] = block {
        if first & 0xe0 != 0x20 {
            break;
        }
        block = rest;
    }
    block.first() == Some(&0x88)
}

/// A connection's bytes, as frames.
#[derive(Debug)]
struct Wire {
    stream: TcpStream,
    input: Vec<u8>,
    filled: usize,
    output: Vec<u8>,
}

impl Wire {
    fn new(stream: TcpStream) -> Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self { stream, input: vec![0; 256 * 1024], filled: 0, output: Vec::with_capacity(256 * 1024) })
    }

    /// Writes what is due, reads what there is, and passes every whole frame to `each`. False at the end of the connection.
    async fn turn(&mut self, mut each: impl FnMut(Frame<'_>, &mut Vec<u8>) -> Result<()>) -> Result<bool> {
        if !self.output.is_empty() {
            self.stream.write_all(&self.output).await.context("writing frames")?;
            self.output.clear();
        }
        let n = self.stream.read(&mut self.input[self.filled..]).await.context("reading frames")?;
        if n == 0 {
            return Ok(false);
        }
        self.filled += n;
        let mut rest = &self.input[..self.filled];
        while let Some(frame) = take_frame(&mut rest) {
            each(frame, &mut self.output)?;
        }
        let from = self.filled - rest.len();
        self.input.copy_within(from..self.filled, 0);
        self.filled -= from;
        if self.filled == self.input.len() {
            bail!("a frame of more than {} bytes", self.input.len());
        }
        Ok(true)
    }
}

/// `streams` requests at a time on one connection until `stop`; each response adds one to `done`.
pub(crate) async fn closed_loop(to: SocketAddr, streams: u32, done: Arc<AtomicU64>, stop: Instant) -> Result<()> {
    let stream = TcpStream::connect(to).await.with_context(|| format!("can't connect to {to}"))?;
    let mut wire = Wire::new(stream)?;
    wire.output.extend_from_slice(PREFACE);
    put_settings(
        &mut wire.output,
        &[(SETTINGS_HEADER_TABLE_SIZE, 0), (SETTINGS_ENABLE_PUSH, 0), (SETTINGS_INITIAL_WINDOW_SIZE, 1 << 20)],
    );
    put_frame(&mut wire.output, WINDOW_UPDATE, 0, 0, &GRANT.to_be_bytes());
    let mut next = 1u32;
    let mut request = |out: &mut Vec<u8>| {
        put_frame(out, HEADERS, END_STREAM | END_HEADERS, next, REQUEST_BLOCK);
        next += 2;
    };
    for _ in 0..streams {
        request(&mut wire.output);
    }
    // Body bytes so far of the streams that are open: the responses of different streams interleave.
    let mut open: HashMap<u32, usize> = HashMap::new();
    let mut consumed = 0;
    while Instant::now() < stop {
        let turn = wire.turn(|frame, out| {
            match frame.kind {
                HEADERS if open.contains_key(&frame.stream) => {} // trailers
                HEADERS if !is_ok(&frame) => bail!("a response other than 200: header block {:02x?}", frame.payload),
                HEADERS => {
                    open.insert(frame.stream, 0);
                }
                DATA => {
                    consumed += frame.payload.len() as u32;
                    let padding =
                        if frame.flags & PADDED != 0 { 1 + usize::from(*frame.payload.first().unwrap_or(&0)) } else { 0 };
                    *open.entry(frame.stream).or_default() += frame.payload.len() - padding;
                }
                RST_STREAM => bail!("stream {} was reset: {:02x?}", frame.stream, frame.payload),
                GOAWAY => bail!("the peer closes the connection (GOAWAY {:02x?})", frame.payload),
                _ => {
                    housekeeping(&frame, out);
                    return Ok(());
                }
            }
            if frame.flags & END_STREAM != 0 {
                let body = open.remove(&frame.stream).unwrap_or(0);
                if body != BODY {
                    bail!("a body of {body} bytes where {BODY} were expected");
                }
                done.fetch_add(1, Ordering::Relaxed);
                request(out);
            }
            if consumed > GRANT / 2 {
                put_frame(out, WINDOW_UPDATE, 0, 0, &consumed.to_be_bytes());
                consumed = 0;
            }
            Ok(())
        });
        if !tokio::time::timeout(Duration::from_secs(10), turn).await.context("no answer within 10 s")?? {
            bail!("the peer closed the connection");
        }
    }
    Ok(())
}

/// The backend: answers every request with the same 1 KiB.
pub(crate) async fn serve(listener: TcpListener) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(5)).await;
            continue;
        };
        tokio::spawn(async move {
            if let Err(error) = answer(stream).await {
                eprintln!("HTTP/2 backend: {error:#}");
            }
        });
    }
}

async fn answer(mut stream: TcpStream) -> Result<()> {
    let mut preface = [0; PREFACE.len()];
    if stream.read_exact(&mut preface).await.is_err() {
        return Ok(());
    }
    if preface != PREFACE {
        bail!("the peer does not speak HTTP/2");
    }
    let mut wire = Wire::new(stream)?;
    put_settings(&mut wire.output, &[(SETTINGS_HEADER_TABLE_SIZE, 0), (SETTINGS_MAX_CONCURRENT_STREAMS, 1000)]);
    let body = [b'w'; BODY];
    let mut window = DEFAULT_WINDOW;
    let mut waiting = VecDeque::new();
    loop {
        let turn = wire.turn(|frame, out| {
            match frame.kind {
                HEADERS | DATA if frame.flags & END_STREAM != 0 => waiting.push_back(frame.stream),
                WINDOW_UPDATE if frame.stream == 0 => {
                    let grant = frame.payload.try_into().map(u32::from_be_bytes).context("a short WINDOW_UPDATE")?;
                    window += i64::from(grant & 0x7fff_ffff);
                }
                RST_STREAM => waiting.retain(|stream| *stream != frame.stream),
                SETTINGS if setting(&frame, SETTINGS_INITIAL_WINDOW_SIZE).is_some_and(|w| (w as usize) < BODY) => {
                    bail!("the peer's stream window is smaller than the one response that there is");
                }
                _ => {
                    housekeeping(&frame, out);
                }
            }
            while window >= BODY as i64
                && let Some(stream) = waiting.pop_front()
            {
                put_frame(out, HEADERS, END_HEADERS, stream, RESPONSE_BLOCK);
                put_frame(out, DATA, END_STREAM, stream, &body);
                window -= BODY as i64;
            }
            Ok(())
        });
        match turn.await {
            Ok(true) => {}
            // The peer was ended, with or without good-bye.
            Ok(false) => return Ok(()),
            Err(error) if error.downcast_ref::<std::io::Error>().is_some() => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_the_round_trip_and_any_cut() {
        let mut bytes = Vec::new();
        put_frame(&mut bytes, HEADERS, END_HEADERS, 7, RESPONSE_BLOCK);
        put_frame(&mut bytes, DATA, END_STREAM, 7, &[1; 300]);
        for cut in 0..bytes.len() {
            let mut rest = &bytes[..cut];
            let whole = std::iter::from_fn(|| take_frame(&mut rest)).count();
            assert_eq!(whole, usize::from(cut >= 9 + RESPONSE_BLOCK.len()), "cut at {cut}");
        }
        let mut rest = &bytes[..];
        let first = take_frame(&mut rest).unwrap();
        assert_eq!(first, Frame { kind: HEADERS, flags: END_HEADERS, stream: 7, payload: RESPONSE_BLOCK });
        assert_eq!(take_frame(&mut rest).unwrap().payload.len(), 300);
        assert!(rest.is_empty());
    }

    #[test]
    fn status_is_found_behind_size_updates_and_padding() {
        let frame = |flags, payload| Frame { kind: HEADERS, flags, stream: 1, payload };
        assert!(is_ok(&frame(END_HEADERS, b"\x88")));
        assert!(is_ok(&frame(END_HEADERS, b"\x20\x88\x0f")));
        assert!(is_ok(&frame(PADDED | PRIORITY, b"\x01\0\0\0\0\0\x88\0")));
        assert!(!is_ok(&frame(END_HEADERS, b"\x8d")));
        assert!(!is_ok(&frame(END_HEADERS, b"")));
    }

    #[tokio::test]
    async fn generator_and_backend_understand_each_other() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        tokio::spawn(serve(listener));
        let done = Arc::new(AtomicU64::new(0));
        closed_loop(to, 100, Arc::clone(&done), Instant::now() + Duration::from_millis(100)).await.unwrap();
        assert!(done.load(Ordering::Relaxed) >= 100);
    }
}
