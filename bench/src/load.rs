//! The loads, and what is read off a peer while it bears one.

use crate::machine::Cores;
use crate::pace::{Backlog, Schedule};
use crate::peer::{Binaries, Ends, Kind, Peer};
use crate::{h1, h2, proc, tcp};
use anyhow::{Context, Result, bail};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// A closed-loop load: as much as the peer (or the generator) can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    /// HTTP/1.1 over so many keep-alive connections.
    H1(usize),
    /// HTTP/2 with so many streams at a time on one connection.
    H2(u32),
    /// Raw TCP from the backend to so many clients.
    Tcp(usize),
    /// A connection for each HTTP/1.1 request, so many at a time.
    Churn(usize),
}

/// What a load brought.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// Requests, connections or bytes.
    pub(crate) units: u64,
    /// CPU time of the peer (of both proxies of a pair).
    pub(crate) cpu: Duration,
    /// CPU time of generator and backend together.
    pub(crate) load_cpu: Duration,
    /// Length of the measurement.
    pub(crate) wall: Duration,
}

impl Sample {
    /// CPU seconds of the peer for `per` units.
    pub(crate) fn cpu_per(&self, per: f64) -> f64 {
        self.cpu.as_secs_f64() / self.units as f64 * per
    }

    /// Units a second.
    pub(crate) fn rate(&self) -> f64 {
        self.units as f64 / self.wall.as_secs_f64()
    }
}

/// Starts the three backends on this thread.
pub(crate) async fn backends() -> Result<Ends> {
    let [h1, h2, tcp] = [listener()?, listener()?, listener()?];
    let ends = Ends { h1: h1.local_addr()?, h2: h2.local_addr()?, tcp: tcp.local_addr()? };
    tokio::spawn(h1::serve(h1));
    tokio::spawn(h2::serve(h2));
    tokio::spawn(tcp::serve(tcp));
    Ok(ends)
}

fn listener() -> Result<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())?;
    socket.listen(4096)?;
    socket.set_nonblocking(true)?;
    Ok(TcpListener::from_std(socket.into())?)
}

impl Load {
    /// Puts the load on `front`; after `warm` measures for `lasting` what the processes `pids` use together.
    pub(crate) async fn run(self, front: Ends, pids: &[u32], warm: Duration, lasting: Duration) -> Result<Sample> {
        let done = Arc::new(AtomicU64::new(0));
        // The measured part ends before the load does.
        let stop = Instant::now() + warm + lasting + Duration::from_millis(50);
        let mut clients = JoinSet::new();
        let connections = match self {
            Self::H1(n) | Self::Tcp(n) | Self::Churn(n) => n,
            Self::H2(_) => 1,
        };
        for _ in 0..connections {
            let done = Arc::clone(&done);
            match self {
                Self::H1(_) => clients.spawn(h1::closed_loop(front.h1, done, stop)),
                Self::H2(streams) => clients.spawn(h2::closed_loop(front.h2, streams, done, stop)),
                Self::Tcp(_) => clients.spawn(tcp::drain(front.tcp, done, stop)),
                Self::Churn(_) => clients.spawn(h1::churn(front.h1, done, stop)),
            };
        }
        let me = std::process::id();
        let look =
            || -> Result<_> { Ok((done.load(Ordering::Relaxed), proc::cpu_time_of(pids)?, proc::cpu_time(me)?, Instant::now())) };
        tokio::time::sleep(warm).await;
        let before = look()?;
        tokio::time::sleep(lasting).await;
        let after = look()?;
        while let Some(outcome) = clients.join_next().await {
            outcome.context("a client panicked")??;
        }
        let sample = Sample {
            units: after.0 - before.0,
            cpu: after.1.saturating_sub(before.1),
            load_cpu: after.2.saturating_sub(before.2),
            wall: after.3 - before.3,
        };
        if sample.units == 0 {
            bail!("nothing was done within {lasting:?}");
        }
        Ok(sample)
    }
}

/// HTTP/1.1 requests at a fixed rate over `connections`, whatever the peer does: latencies in nanoseconds from the intended
/// starts, ascending.
pub(crate) async fn open_loop(to: SocketAddr, connections: usize, schedule: Schedule) -> Result<Vec<u64>> {
    let backlog = Arc::new(Backlog::default());
    let mut clients = JoinSet::new();
    for _ in 0..connections {
        let mut conn = h1::probe(to).await?;
        let backlog = Arc::clone(&backlog);
        clients.spawn(async move {
            let mut latencies = Vec::new();
            while let Some(intended) = backlog.take().await {
                h1::checked(conn.exchange(h1::KEEP_ALIVE)).await?;
                latencies.push(intended.elapsed().as_nanos() as u64);
            }
            Ok::<_, anyhow::Error>(latencies)
        });
    }
    collect(&backlog, schedule, clients).await
}

/// Releases the schedule to `clients` and gathers their latencies, ascending.
pub(crate) async fn collect(backlog: &Backlog, schedule: Schedule, mut clients: JoinSet<Result<Vec<u64>>>) -> Result<Vec<u64>> {
    backlog.release(schedule).await;
    let mut all = Vec::with_capacity(schedule.total() as usize);
    while let Some(outcome) = clients.join_next().await {
        all.extend(outcome.context("a client panicked")??);
    }
    all.sort_unstable();
    Ok(all)
}

/// Opens `count` connections, each of which makes one request and then stays.
pub(crate) async fn hold(to: SocketAddr, count: usize) -> Result<Vec<h1::Conn<tokio::net::TcpStream>>> {
    let mut held = Vec::with_capacity(count);
    while held.len() < count {
        let batch = (count - held.len()).min(50);
        let mut opening = JoinSet::new();
        (0..batch).for_each(|_| drop(opening.spawn(h1::probe(to))));
        while let Some(conn) = opening.join_next().await {
            held.push(conn.context("a client panicked")??);
        }
    }
    Ok(held)
}

/// One peer under one load.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The peer.
    #[arg(default_value = "weft")]
    peer: Kind,
    /// `h1-N` (keep-alive connections), `h2-N` (streams), `tcp-N` or `churn-N` (connections).
    #[arg(default_value = "h1-32", value_parser = parse)]
    load: Load,
    /// For how long.
    #[arg(long, default_value = "20")]
    seconds: f64,
    /// Core of the peer.
    #[arg(long, default_value = "0")]
    peer_core: usize,
    /// Core of the load generator and backend.
    #[arg(long, default_value = "1")]
    load_core: usize,
    #[command(flatten)]
    binaries: Binaries,
}

fn parse(text: &str) -> Result<Load, String> {
    let (kind, number) = text.split_once('-').ok_or("expected KIND-N, for example h1-32")?;
    let n: u32 = number.parse().ok().filter(|n| (1..=10_000).contains(n)).ok_or("N must be from 1 to 10000")?;
    match kind {
        "h1" => Ok(Load::H1(n as usize)),
        "h2" => Ok(Load::H2(n)),
        "tcp" => Ok(Load::Tcp(n as usize)),
        "churn" => Ok(Load::Churn(n as usize)),
        _ => Err("the kind must be h1, h2, tcp or churn".into()),
    }
}

/// Runs `weft-bench load`.
pub(crate) async fn run(args: Args) -> Result<bool> {
    let cores = Cores::new(args.peer_core, args.load_core)?;
    let back = backends().await?;
    let peer = Peer::start(args.peer, &args.binaries, cores, back).await?;
    eprintln!("{} is process {}", args.peer.name(), peer.pid());
    let lasting = Duration::from_secs_f64(args.seconds);
    let sample = args.load.run(peer.front, &[peer.pid()], Duration::from_millis(300), lasting).await?;
    println!(
        "{:.0} units/s; CPU of {}: {:.2} µs/unit ({:.0} % of a core); of generator and backend: {:.2} µs/unit; RSS {} KiB",
        sample.rate(),
        args.peer.name(),
        sample.cpu_per(1e6),
        sample.cpu.as_secs_f64() / sample.wall.as_secs_f64() * 100.0,
        sample.load_cpu.as_secs_f64() / sample.units as f64 * 1e6,
        proc::rss_kib(peer.pid())?,
    );
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_are_read_from_the_command_line() {
        assert_eq!(parse("h1-256"), Ok(Load::H1(256)));
        assert_eq!(parse("churn-16"), Ok(Load::Churn(16)));
        assert!(parse("h1").is_err());
        assert!(parse("h1-0").is_err());
        assert!(parse("h9-1").is_err());
    }

    #[tokio::test]
    async fn a_load_is_measured() {
        let back = backends().await.unwrap();
        let me = std::process::id();
        for load in [Load::H1(4), Load::H2(10), Load::Tcp(2), Load::Churn(2)] {
            let sample = load.run(back, &[me], Duration::from_millis(20), Duration::from_millis(100)).await.unwrap();
            assert!(
                sample.units > 0 && sample.cpu.abs_diff(sample.load_cpu) <= Duration::from_millis(50),
                "{load:?}: {sample:?}"
            );
            assert!(sample.wall >= Duration::from_millis(100));
        }
        let schedule = Schedule::new(500, Duration::from_millis(200));
        let latencies = open_loop(back.h1, 4, schedule).await.unwrap();
        assert_eq!(latencies.len(), 100);
        assert!(latencies.is_sorted());
        assert_eq!(hold(back.h1, 120).await.unwrap().len(), 120);
    }
}
