//! The rounds of `weft-bench pair`.

use super::{Kind, Pair};
use crate::load::{self, Load};
use crate::machine::{Cores, Machine};
use crate::pace::Schedule;
use crate::peer::{Binaries, Ends};
use crate::proc;
use crate::report::{Bench, Report, Results, Row};
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use std::path::PathBuf;
use std::time::Duration;

/// Requests a second of the latency scenario, and over how many connections.
const LATENCY_RATE: u64 = 2000;
const LATENCY_CONNECTIONS: usize = 32;

/// How to measure the pairs.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which pairs, separated by commas.
    #[arg(long, value_delimiter = ',', value_enum, default_values_t = [Kind::Weft, Kind::Envoy, Kind::EnvoyH2, Kind::Haproxy])]
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
    /// Core of both proxies.
    #[arg(long, default_value = "0")]
    peer_core: usize,
    /// Core of the load generator and backend.
    #[arg(long, default_value = "1")]
    load_core: usize,
    /// Folder for pair.json, pair.svg and pair.md.
    #[arg(long, value_name = "DIR", default_value = "bench/results")]
    out: PathBuf,
    #[command(flatten)]
    binaries: Binaries,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// HTTP/1.1, 1 keep-alive connection.
    H1One,
    /// HTTP/1.1, 32 keep-alive connections.
    H1,
    /// HTTP/2, 100 streams on one connection.
    H2,
    /// Raw TCP, 4 connections.
    Tcp,
    /// A new connection for each HTTP/1.1 request, 16 at a time: proxies that keep connections to each other make no new ones.
    Churn,
    /// The same over what is raw TCP to the proxies: every connection has a TLS connection of its own.
    Handshake,
    /// HTTP/1.1 at 2,000 requests/s, open loop.
    Latency,
}

/// Runs `weft-bench pair`. False if a pair failed in a scenario.
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
        versions.push((kind.name(), args.binaries.version(kind.program())?));
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
            eprintln!("round {} of {}: pair of {}", round + 1, args.rounds, kind.name());
            run.pair(*kind).await;
        }
    }
    let Run { results, failures, .. } = run;
    let report = Report::new(Bench::Pair, machine, versions, cores, args.rounds, results, failures);
    report.write(&args.out, "pair")?;
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
    fn schedule(&self) -> Schedule {
        Schedule::new(LATENCY_RATE, Duration::from_secs_f64(self.args.latency_seconds))
    }

    async fn pair(&mut self, kind: Kind) {
        let pair = match Pair::start(kind, &self.args.binaries, self.cores, self.back).await {
            Ok(pair) => pair,
            Err(error) => return self.fail(kind, "start", &error),
        };
        for scenario in &self.args.scenarios {
            if let Err(error) = self.scenario(kind, &pair, *scenario).await {
                self.fail(kind, &format!("{scenario:?}"), &error);
            }
        }
        let rss: Result<u64> = pair.pids().iter().map(|pid| proc::rss_kib(*pid)).sum();
        match rss {
            Ok(kib) => self.results.add(Row::RssAfter, kind.name(), kib as f64 / 1024.0),
            Err(error) => self.fail(kind, "memory", &error),
        }
    }

    fn fail(&mut self, kind: Kind, what: &str, error: &anyhow::Error) {
        let failure = format!("{}, {what}: {error:#}", kind.name());
        eprintln!("  failed: {failure}");
        self.failures.push(failure);
    }

    async fn scenario(&mut self, kind: Kind, pair: &Pair, scenario: Scenario) -> Result<()> {
        let name = kind.name();
        let ends = pair.front.ends();
        let (load, ends, cpu, rate) = match scenario {
            Scenario::H1One => (Load::H1(1), ends, Row::H1OneCpu, Row::H1OneRate),
            Scenario::H1 => (Load::H1(32), ends, Row::H1Cpu, Row::H1Rate),
            Scenario::H2 => (Load::H2(100), ends, Row::H2Cpu, Row::H2Rate),
            Scenario::Tcp => (Load::Tcp(4), ends, Row::TcpCpu, Row::TcpRate),
            Scenario::Churn => (Load::Churn(16), ends, Row::ChurnCpu, Row::ChurnRate),
            Scenario::Handshake => (Load::Churn(16), pair.front.opaque_ends(), Row::HandshakeCpu, Row::HandshakeRate),
            Scenario::Latency => {
                let latencies = load::open_loop(pair.front.h1, LATENCY_CONNECTIONS, self.schedule()).await?;
                self.results.note_latency(name, &latencies);
                return Ok(());
            }
        };
        let before = if scenario == Scenario::Handshake { pair.handshakes().await? } else { None };
        let lasting = Duration::from_secs_f64(self.args.seconds);
        let sample = load.run(ends, &pair.pids(), lasting.mul_f64(0.2), lasting).await?;
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
        if let Some((all, resumed)) = before
            && let Some((all_after, resumed_after)) = pair.handshakes().await?
        {
            let all = all_after.saturating_sub(all);
            if all == 0 {
                bail!("no handshakes were counted while connections were made: do they use TLS?");
            }
            self.results.add(Row::Resumed, name, resumed_after.saturating_sub(resumed) as f64 * 100.0 / all as f64);
        }
        Ok(())
    }
}
