//! Queries over TCP (RFC 7766): a client's connection has one of its own to a resolver, and messages go through unchanged, several at
//! a time and in whatever order they are answered; answers of many messages (zone transfers) too.
//!
//! A resolver that can't be connected, closes or stays silent with queries under way is followed by the next, which gets those queries. Each
//! query has as many chances as there are resolvers, two at least (a server may close an idle connection just as a query comes); then it is answered with SERVFAIL.

use super::{Asking, CLIENTS, Outcome, Place, Server, Transport, message};
use bytes::{Buf as _, BytesMut};
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep_until, timeout};

/// Most queries of a client under way; more wait in its socket.
const PIPELINE: usize = 64;

/// Takes clients.
pub(super) async fn accept(listener: TcpListener, server: Rc<Server>) {
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                crate::log::connection_error(&format_args!("DNS by TCP: {error}"));
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        if server.is_own(Transport::Tcp, peer) {
            server.count(Transport::Tcp, Outcome::Loop);
            crate::log::connection_error(&format_args!(
                "DNS: the proxy's own connection came back to it and is closed; does it run as another user than weft-init was told?"
            ));
            continue;
        }
        let server = Rc::clone(&server);
        tokio::task::spawn_local(async move {
            match Place::take(&server.clients, CLIENTS) {
                Some(_place) => {
                    let mut client = Client::new(stream, Rc::clone(&server));
                    if let Err(error) = client.serve().await {
                        tracing::debug!(%peer, "DNS by TCP: {error}");
                    }
                    server.metrics.under_way.dec_by(client.waiting.len() as i64);
                }
                None => server.count(Transport::Tcp, Outcome::Overload),
            }
        });
    }
}

/// A stream of messages, each with its length before it.
struct Messages {
    stream: TcpStream,
    buffer: BytesMut,
}

impl Messages {
    fn new(stream: TcpStream) -> Self {
        Self { stream, buffer: BytesMut::new() }
    }

    /// The next one; none at the end of the stream. Nothing is lost if the future is dropped.
    async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(length) = self.buffer.get(..2).map(|two| usize::from(u16::from_be_bytes([two[0], two[1]]))) {
                if self.buffer.len() >= 2 + length {
                    self.buffer.advance(2);
                    return Ok(Some(self.buffer.split_to(length).to_vec()));
                }
                self.buffer.reserve(2 + length - self.buffer.len());
            }
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return if self.buffer.is_empty() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
        }
    }

    async fn send(&mut self, message: &[u8], patience: Duration) -> io::Result<()> {
        let length = u16::try_from(message.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        let mut frame = Vec::with_capacity(2 + message.len());
        frame.extend_from_slice(&length.to_be_bytes());
        frame.extend_from_slice(message);
        timeout(patience, self.stream.write_all(&frame)).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }
}

struct Waiting {
    query: Vec<u8>,
    came: Instant,
    sent: Instant,
    chances: usize,
}

struct Client {
    server: Rc<Server>,
    messages: Messages,
    upstream: Option<(Messages, Asking)>,
    /// Which resolver is the next to be tried.
    turn: usize,
    waiting: VecDeque<Waiting>,
    ended: bool,
}

enum Event {
    Query(Option<Vec<u8>>),
    Answer(Option<Vec<u8>>),
    Late,
}

impl Client {
    fn new(stream: TcpStream, server: Rc<Server>) -> Self {
        Self { server, messages: Messages::new(stream), upstream: None, turn: 0, waiting: VecDeque::new(), ended: false }
    }

    /// Serves the client until it has ended and has its answers, or is idle. An error is one of its own connection.
    async fn serve(&mut self) -> io::Result<()> {
        self.messages.stream.set_nodelay(true)?;
        while !(self.ended && self.waiting.is_empty()) {
            if self.upstream.is_none() && !self.waiting.is_empty() {
                self.connect().await?;
                continue;
            }
            match self.event().await? {
                Event::Query(Some(query)) => self.query(query).await,
                Event::Query(None) => self.ended = true,
                Event::Answer(Some(answer)) => self.answer(&answer).await?,
                Event::Late if self.waiting.is_empty() => return Ok(()),
                Event::Answer(None) | Event::Late => self.give_up().await?,
            }
        }
        self.messages.stream.shutdown().await
    }

    async fn event(&mut self) -> io::Result<Event> {
        let patience = self.server.patience;
        let until = match self.waiting.iter().map(|each| each.sent).min() {
            Some(sent) => sent + patience.stream,
            None => Instant::now() + patience.idle,
        };
        let room = !self.ended && self.waiting.len() < PIPELINE;
        let connected = self.upstream.is_some();
        let answer = async {
            match &mut self.upstream {
                Some((upstream, _)) => upstream.next().await.unwrap_or_default(),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            query = self.messages.next(), if room => Ok(Event::Query(query?)),
            answer = answer, if connected => Ok(Event::Answer(answer)),
            () = sleep_until(until) => Ok(Event::Late),
        }
    }

    async fn query(&mut self, query: Vec<u8>) {
        if !message::is_query(&query) {
            self.server.count(Transport::Tcp, Outcome::Malformed);
            self.ended = true;
            return;
        }
        let now = Instant::now();
        self.server.metrics.under_way.inc();
        if let Some((upstream, _)) = &mut self.upstream
            && upstream.send(&query, self.server.patience.stream).await.is_err()
        {
            self.upstream = None;
        }
        self.waiting.push_back(Waiting { query, came: now, sent: now, chances: 0 });
    }

    async fn answer(&mut self, answer: &[u8]) -> io::Result<()> {
        let of = |each: &Waiting| message::id(&each.query) == message::id(answer) && message::answers(&each.query, answer);
        if let Some(at) = self.waiting.iter().position(of)
            && let Some(done) = self.waiting.remove(at)
        {
            self.done(&done, Outcome::Answered);
        }
        // Further messages of an answer go through too.
        self.messages.send(answer, self.server.patience.stream).await
    }

    fn done(&self, query: &Waiting, outcome: Outcome) {
        self.server.metrics.under_way.dec();
        self.server.metrics.took(query.came.elapsed());
        self.server.count(Transport::Tcp, outcome);
    }

    /// The resolver has left, or says nothing: those that wait have one chance fewer.
    async fn give_up(&mut self) -> io::Result<()> {
        self.upstream = None;
        if self.waiting.is_empty() {
            return Ok(());
        }
        self.server.metrics.resolver_failures.inc();
        self.turn += 1;
        let most = self.server.resolvers.get().len().max(2);
        for mut query in std::mem::take(&mut self.waiting) {
            query.chances += 1;
            if query.chances < most {
                self.waiting.push_back(query);
            } else {
                self.fail(&query).await?;
            }
        }
        Ok(())
    }

    async fn fail(&mut self, query: &Waiting) -> io::Result<()> {
        self.done(query, Outcome::Failed);
        self.messages.send(&message::servfail(&query.query), self.server.patience.stream).await
    }

    /// Connects a resolver, beginning with the one whose turn it is, and sends it all that waits. If there is none, all that
    /// waits has failed.
    async fn connect(&mut self) -> io::Result<()> {
        let resolvers = self.server.resolvers.get();
        for n in 0..resolvers.len() {
            let resolver = resolvers[(self.turn + n) % resolvers.len()];
            match self.dial(resolver).await {
                Ok(upstream) => {
                    self.turn += n;
                    self.upstream = Some(upstream);
                    return Ok(());
                }
                Err(error) => {
                    self.server.metrics.resolver_failures.inc();
                    crate::log::connection_error(&format_args!(
                        "DNS: connecting {resolver} by TCP failed: {error}; maybe a NetworkPolicy forbids TCP port 53"
                    ));
                }
            }
        }
        for query in std::mem::take(&mut self.waiting) {
            self.fail(&query).await?;
        }
        Ok(())
    }

    async fn dial(&mut self, resolver: SocketAddr) -> io::Result<(Messages, Asking)> {
        let patience = self.server.patience.stream;
        let socket = match resolver {
            SocketAddr::V4(_) => tokio::net::TcpSocket::new_v4()?,
            SocketAddr::V6(_) => tokio::net::TcpSocket::new_v6()?,
        };
        // Bound before it connects, so that its own port is known should the connection come back.
        socket.bind(if resolver.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() })?;
        let asking = self.server.asks(Transport::Tcp, socket.local_addr()?);
        let connecting = timeout(patience, socket.connect(resolver)).await;
        let stream = connecting.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        stream.set_nodelay(true)?;
        let mut upstream = Messages::new(stream);
        for query in &mut self.waiting {
            upstream.send(&query.query, patience).await?;
            query.sent = Instant::now();
        }
        Ok((upstream, asking))
    }
}
