//! Queries in datagrams.
//!
//! A query is sent to the first resolver. If nothing has come back after a while the next is asked as well, from another socket with another id, while
//! the first may still answer; an answer by which a resolver refuses (SERVFAIL, NOTIMP, REFUSED) is kept for the case that no other has a better one.
//! Silent resolvers are asked twice, because datagrams get lost.

use super::{Asking, Outcome, Place, QUERIES, Server, Transport, message};
use futures::stream::{FuturesUnordered, StreamExt as _};
use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::time::{Instant, sleep_until};

/// How often a silent resolver is asked.
const ROUNDS: usize = 2;

/// Answers what comes by this socket.
pub(super) async fn serve(socket: Rc<UdpSocket>, server: Rc<Server>) {
    let mut buffer = vec![0; super::MESSAGE];
    loop {
        let (length, peer) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                crate::log::connection_error(&format_args!("DNS by UDP: {error}"));
                tokio::time::sleep(Duration::from_millis(5)).await;
                continue;
            }
        };
        let query = &buffer[..length];
        if !message::is_query(query) {
            server.count(Transport::Udp, Outcome::Malformed);
            continue;
        }
        if server.is_own(Transport::Udp, peer) {
            server.count(Transport::Udp, Outcome::Loop);
            crate::log::connection_error(&format_args!(
                "DNS: the proxy's own query came back to it and is dropped; does it run as another user than weft-init was told?"
            ));
            continue;
        }
        let (query, socket, server) = (query.to_vec(), Rc::clone(&socket), Rc::clone(&server));
        tokio::task::spawn_local(async move { answer(&query, peer, &socket, &server).await });
    }
}

async fn answer(query: &[u8], peer: SocketAddr, socket: &UdpSocket, server: &Rc<Server>) {
    let began = Instant::now();
    let (answer, outcome) = match Place::take(&server.queries, QUERIES) {
        None => (message::servfail(query), Outcome::Overload),
        Some(_place) => {
            server.metrics.under_way.inc();
            let asked = ask(query, server).await;
            server.metrics.under_way.dec();
            match asked {
                Some(answer) => (answer, Outcome::Answered),
                None => (message::servfail(query), Outcome::Failed),
            }
        }
    };
    server.metrics.took(began.elapsed());
    server.count(Transport::Udp, outcome);
    // An app that has gone meanwhile has no need of it.
    if let Err(error) = socket.send_to(&answer, peer).await {
        tracing::debug!(%peer, "the answer can't be sent: {error}");
    }
}

/// Asks the resolvers. The answer has the query's id.
async fn ask(query: &[u8], server: &Rc<Server>) -> Option<Vec<u8>> {
    let resolvers = server.resolvers.get();
    let patience = server.patience;
    let deadline = Instant::now() + patience.datagram;
    let mut waiting: VecDeque<(usize, SocketAddr)> =
        (0..ROUNDS).flat_map(|round| resolvers.iter().map(move |resolver| (round, *resolver))).collect();
    let mut asked = FuturesUnordered::new();
    let mut refusal = None;
    let mut next = Instant::now();
    loop {
        // The first round goes on as soon as the one before is known to bring nothing, further rounds only in their time.
        let first_round = waiting.front().is_some_and(|(round, _)| *round == 0);
        if (first_round && asked.is_empty() || Instant::now() >= next)
            && let Some((_, resolver)) = waiting.pop_front()
        {
            asked.push(async move { (resolver, exchange(query, resolver, server).await) });
            next = Instant::now() + patience.attempt;
        }
        if asked.is_empty() && waiting.is_empty() {
            if refusal.is_none() {
                let none = if resolvers.is_empty() { ": there is none in resolv.conf" } else { "" };
                crate::log::connection_error(&format_args!("DNS: no resolver answers{none}"));
            }
            return refusal;
        }
        tokio::select! {
            biased;
            Some((resolver, result)) = asked.next(), if !asked.is_empty() => {
                match result {
                    Ok(answer) if message::is_refusal(&answer) => refusal = Some(answer),
                    Ok(answer) => return Some(answer),
                    Err(error) => {
                        server.metrics.resolver_failures.inc();
                        tracing::debug!(%resolver, "no answer: {error}");
                    }
                }
                // It has spoken: asking again brings nothing new.
                waiting.retain(|(_, other)| *other != resolver);
            }
            () = sleep_until(deadline) => {
                server.metrics.resolver_failures.inc_by(asked.len() as u64);
                if refusal.is_none() {
                    crate::log::connection_error(&format_args!(
                        "DNS: no answer from {resolvers:?} in {:?}; does a NetworkPolicy forbid UDP port 53?", patience.datagram
                    ));
                }
                return refusal;
            }
            () = sleep_until(next), if !waiting.is_empty() => {}
        }
    }
}

/// One question to one resolver. Ends with its answer, or with an error of the socket; what is no answer to the question is
/// passed over.
async fn exchange(query: &[u8], resolver: SocketAddr, server: &Rc<Server>) -> io::Result<Vec<u8>> {
    let (socket, _asking) = connect(resolver, server).await?;
    let id: u16 = rand::random();
    let mut question = query.to_vec();
    message::set_id(&mut question, id);
    socket.send(&question).await?;
    loop {
        // Nobody listens there: that is known by an ICMP message, which makes a socket erroneous and not readable.
        if socket.ready(Interest::READABLE | Interest::ERROR).await?.is_error() {
            return Err(socket.take_error()?.unwrap_or_else(|| io::ErrorKind::ConnectionRefused.into()));
        }
        let mut buffer = server.buffer.borrow_mut();
        match socket.try_recv(&mut buffer) {
            Ok(length) => {
                let answer = &buffer[..length];
                if message::id(answer) == Some(id) && message::answers(query, answer) {
                    let mut answer = answer.to_vec();
                    message::set_id(&mut answer, message::id(query).unwrap_or_default());
                    return Ok(answer);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// A socket that only this resolver's datagrams reach; the kernel chooses its port at random.
async fn connect(resolver: SocketAddr, server: &Rc<Server>) -> io::Result<(UdpSocket, Asking)> {
    let any: SocketAddr = match resolver {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(resolver).await?;
    let asking = server.asks(Transport::Udp, socket.local_addr()?);
    Ok((socket, asking))
}
