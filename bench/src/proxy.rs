//! `weft-bench proxy`: the peers in turn, round after round.
//!
//! A round starts every peer twice: once for start-up and memory (the first listeners, the first request, then thousands of idle
//! connections), once for the loads. Only one peer runs at a time, and the order rotates, so that a slow drift of the
//! machine hits all of them alike. What is reported is the median of the rounds.

use crate::load::{self, Load};
use crate::machine::{Cores, Machine};
use crate::pace::Schedule;
use crate::peer::{Binaries, Ends, Kind, Peer};
use crate::proc;
use crate::report::{Bench, Report, Results, Row};
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Requests a second of the latency scenario, and over how many connections.
const LATENCY_RATE: u64 = 2000;
const LATENCY_CONNECTIONS: usize = 32;
const IDLE_CONNECTIONS: usize = 5000;

/// How to measure the proxies.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which peers, separated by commas.
    #[arg(long, value_delimiter = ',', value_enum, default_values_t = [Kind::Weft, Kind::Envoy, Kind::Haproxy, Kind::Nginx])]
    peers: Vec<Kind>,
    /// Which scenarios, separated by commas.
    #[arg(long, value_delimiter = ',', value_enum, default_values_t = Scenario::value_variants().iter().copied())]
    scenarios: Vec<Scenario>,
    /// How many rounds; odd, so that the median is a measured value.
    #[arg(long, default_value = "5")]
    rounds: usize,
    /// Seconds that each load is measured for.
    #[arg(long, default_value = "2")]
    seconds: f64,
    /// Seconds of the latency scenario (2,000 requests each).
    #[arg(long, default_value = "5")]
    latency_seconds: f64,
    /// Core of the peer.
    #[arg(long, default_value = "0")]
    peer_core: usize,
    /// Core of the load generator and backend.
    #[arg(long, default_value = "1")]
    load_core: usize,
    /// Folder for proxy.json, proxy.svg and proxy.md.
    #[arg(long, value_name = "DIR", default_value = "bench/results")]
    out: PathBuf,
    #[command(flatten)]
    binaries: Binaries,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scenario {
    /// Start-up, RSS idle and with 5,000 idle connections.
    Memory,
    /// HTTP/1.1, 1 keep-alive connection.
    H1One,
    /// HTTP/1.1, 32 keep-alive connections.
    H1,
    /// HTTP/1.1, 256 keep-alive connections.
    H1Many,
    /// HTTP/2, 100 streams on one connection.
    H2,
    /// Raw TCP, 4 connections.
    Tcp,
    /// A new connection for each HTTP/1.1 request, 16 at a time.
    Churn,
    /// HTTP/1.1 at 2,000 requests/s, open loop.
    Latency,
}

/// Runs `weft-bench proxy`. False if a peer failed in a scenario.
pub(crate) async fn run(args: Args) -> Result<bool> {
    if args.rounds == 0 || args.seconds <= 0.0 || args.latency_seconds <= 0.0 {
        bail!("--rounds, --seconds and --latency-seconds must be greater than 0");
    }
    let cores = Cores::new(args.peer_core, args.load_core)?;
    let machine = Machine::look(cores);
    let mut peers = args.peers.clone();
    peers.dedup();
    let mut versions = Vec::new();
    for kind in &peers {
        versions.push((kind.name(), args.binaries.version(*kind)?));
        eprintln!("{}: {}", kind.name(), args.binaries.version(*kind)?);
    }
    let back = load::backends().await?;
    let mut run = Run { args: &args, cores, back, results: Results::default(), failures: Vec::new() };
    for round in 0..args.rounds {
        if args.scenarios.contains(&Scenario::Latency) {
            let latencies = load::open_loop(back.h1, LATENCY_CONNECTIONS, run.schedule()).await;
            run.results.note_latency("direct", &latencies.context("the backend itself failed")?);
        }
        peers.rotate_left(usize::from(round > 0));
        for kind in &peers {
            eprintln!("round {} of {}: {}", round + 1, args.rounds, kind.name());
            if let Err(error) = run.memory(*kind).await {
                run.fail(*kind, "memory and start-up", &error);
            }
            if let Err(error) = run.loads(*kind).await {
                run.fail(*kind, "start", &error);
            }
        }
    }
    let Run { results, failures, .. } = run;
    let report = Report::new(Bench::Hop, machine, versions, cores, args.rounds, results, failures);
    report.write(&args.out, "proxy")?;
    println!("{}", report.markdown());
    Ok(report.is_complete())
}

struct Run<'a> {
    args: &'a Args,
    cores: Cores,
    back: Ends,
    results: Results,
    failures: Vec<String>,
}

impl Run<'_> {
    fn fail(&mut self, kind: Kind, what: &str, error: &anyhow::Error) {
        let failure = format!("{}, {what}: {error:#}", kind.name());
        eprintln!("  failed: {failure}");
        self.failures.push(failure);
    }

    fn schedule(&self) -> Schedule {
        Schedule::new(LATENCY_RATE, Duration::from_secs_f64(self.args.latency_seconds))
    }

    async fn memory(&mut self, kind: Kind) -> Result<()> {
        if !self.args.scenarios.contains(&Scenario::Memory) {
            return Ok(());
        }
        let name = kind.name();
        let size = std::fs::metadata(self.args.binaries.of(kind)?)?.len();
        self.results.add(Row::BinarySize, name, size as f64 / 1e6);
        let peer = Peer::start(kind, &self.args.binaries, self.cores, self.back).await?;
        self.results.add(Row::Startup, name, peer.startup.as_secs_f64() * 1e3);
        tokio::time::sleep(Duration::from_millis(500)).await;
        let idle = proc::rss_kib(peer.pid())?;
        let held = load::hold(peer.front.h1, IDLE_CONNECTIONS).await?;
        tokio::time::sleep(Duration::from_millis(500)).await;
        let full = proc::rss_kib(peer.pid())?;
        drop(held);
        self.results.add(Row::RssIdle, name, idle as f64 / 1024.0);
        self.results.add(Row::RssFull, name, full as f64 / 1024.0);
        self.results.add(Row::RssPerConnection, name, full.saturating_sub(idle) as f64 / IDLE_CONNECTIONS as f64);
        Ok(())
    }

    async fn loads(&mut self, kind: Kind) -> Result<()> {
        let others = self.args.scenarios.iter().copied().filter(|s| *s != Scenario::Memory);
        let scenarios: Vec<Scenario> = others.collect();
        if scenarios.is_empty() {
            return Ok(());
        }
        let peer = Peer::start(kind, &self.args.binaries, self.cores, self.back).await?;
        for scenario in scenarios {
            let start = Instant::now();
            if let Err(error) = self.scenario(kind, &peer, scenario).await {
                self.fail(kind, &format!("{scenario:?} after {:.1} s", start.elapsed().as_secs_f64()), &error);
            }
        }
        Ok(())
    }

    async fn scenario(&mut self, kind: Kind, peer: &Peer, scenario: Scenario) -> Result<()> {
        let name = kind.name();
        let (load, cpu, rate) = match scenario {
            Scenario::H1One => (Load::H1(1), Row::H1OneCpu, Row::H1OneRate),
            Scenario::H1 => (Load::H1(32), Row::H1Cpu, Row::H1Rate),
            Scenario::H1Many => (Load::H1(256), Row::H1ManyCpu, Row::H1ManyRate),
            Scenario::H2 => (Load::H2(100), Row::H2Cpu, Row::H2Rate),
            Scenario::Tcp => (Load::Tcp(4), Row::TcpCpu, Row::TcpRate),
            Scenario::Churn => (Load::Churn(16), Row::ChurnCpu, Row::ChurnRate),
            Scenario::Latency => {
                let latencies = load::open_loop(peer.front.h1, LATENCY_CONNECTIONS, self.schedule()).await?;
                self.results.note_latency(name, &latencies);
                return Ok(());
            }
            Scenario::Memory => return Ok(()),
        };
        let lasting = Duration::from_secs_f64(self.args.seconds);
        let sample = load.run(peer.front, &[peer.pid()], lasting.mul_f64(0.2), lasting).await?;
        if scenario == Scenario::Tcp {
            self.results.add(cpu, name, sample.cpu_per(1e9));
            self.results.add(rate, name, sample.rate() / 1e9);
        } else {
            self.results.add(cpu, name, sample.cpu_per(1e6));
            self.results.add(rate, name, sample.rate());
        }
        if scenario == Scenario::H1 {
            self.results.add(Row::LoadCpu, name, sample.load_cpu.as_secs_f64() * 1e6 / sample.units as f64);
        }
        Ok(())
    }
}
