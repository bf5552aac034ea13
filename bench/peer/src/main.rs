//! `weft-peer`: the same AuthorizationPolicies in Weft and, translated, in a real Envoy; the same requests, byte for byte, to both; and a
//! list of everything on which they differ.
//!
//! The policies are [generated](generate) from a seed, besides [a table](table) by hand of what has fooled proxies before. Differences that are meant are
//! known by [rules](difference), each of which is argued in `docs/authorization-differences.md`; any other makes the exit status 1.

mod case;
mod client;
mod difference;
mod envoy;
mod generate;
mod identity;
mod proxy;
mod table;
mod translate;
mod weft;

use anyhow::{Context, Result};
use case::{Answer, Set};
use clap::Parser;
use client::Clients;
use identity::Authority;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;

/// Authorization policies in Weft and in Envoy, the same requests to both.
#[derive(Debug, Parser)]
#[command(name = "weft-peer", version)]
struct Args {
    /// Envoy.
    #[arg(long, value_name = "FILE", default_value = "bench/.peers/python/envoy/_bin/envoy")]
    envoy: PathBuf,
    /// Which policies and requests are generated.
    #[arg(long, default_value = "1")]
    seed: u64,
    /// How many pods, each with policies of its own.
    #[arg(long, default_value = "200")]
    sets: usize,
    /// Requests to each pod.
    #[arg(long, default_value = "60")]
    calls: usize,
    /// First of the ports that are used, on 127.0.3.1 and 127.0.3.2.
    #[arg(long, default_value = "21000")]
    first_port: u16,
    /// Ask weft-proxy (with weft-control) and not only the engine that it uses: the folder of the two executables.
    #[arg(long, value_name = "DIR")]
    proxy: Option<PathBuf>,
    /// Print at most so many differences of each kind.
    #[arg(long, default_value = "3")]
    show: usize,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("weft-peer: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<bool> {
    let mut sets = table::sets(args.first_port)?;
    let by_hand = sets.len();
    sets.extend(generate::sets(args.seed, args.sets, args.calls, args.first_port + by_hand as u16));
    let dir = tempfile::Builder::new().prefix("weft-peer-").tempdir()?;
    let authority = Authority::new()?;
    let echo = echo()?;
    let clients = Clients::new(&authority, b"istio")?;
    let envoy = envoy::Envoy::start(&args.envoy, dir.path(), &sets, &authority, echo)?;
    let mut theirs = Vec::new();
    for set in &sets {
        let each = set.calls.iter().map(|call| {
            let answer = clients.call(call, SocketAddr::from((envoy::ADDRESS, set.port)), set.http);
            answer.with_context(|| {
                format!("Envoy, port {}, {}, {}\n{}", set.port, if set.http { "HTTP" } else { "TCP" }, call.words(), set.words())
            })
        });
        theirs.push(each.collect::<Result<Vec<Answer>>>()?);
    }
    drop(envoy);
    let ours = weft::answers(&sets, args.proxy.as_deref(), dir.path())?;
    Ok(report(args, &sets, &theirs, &ours, by_hand))
}

/// Compares, prints, and says whether all is as it should be.
fn report(args: &Args, sets: &[Set], theirs: &[Vec<Answer>], ours: &[Vec<Answer>], by_hand: usize) -> bool {
    let mut tally: BTreeMap<&str, usize> = BTreeMap::new();
    let mut known: BTreeMap<&str, usize> = BTreeMap::new();
    let (mut pairs, mut unknown) = (0, 0);
    for ((set, theirs), ours) in sets.iter().zip(theirs).zip(ours) {
        for ((call, theirs), ours) in set.calls.iter().zip(theirs).zip(ours) {
            pairs += 1;
            *tally.entry(class(theirs, ours)).or_default() += 1;
            if difference::same(theirs, ours) {
                continue;
            }
            let words = || {
                format!(
                    "  {} {:?}\n    {}\n    Envoy: {}; Weft: {}\n{}",
                    if set.http { "HTTP" } else { "TCP" },
                    set.mode,
                    call.words(),
                    theirs.words(),
                    ours.words(),
                    set.words()
                )
            };
            match difference::known(set, call, theirs, ours, args.proxy.is_some()) {
                Some(name) => {
                    let count = known.entry(name).or_default();
                    *count += 1;
                    if *count <= args.show.saturating_sub(2) {
                        println!("meant ({name}):\n{}", words());
                    }
                }
                None => {
                    unknown += 1;
                    if unknown <= args.show {
                        println!("DIFFERENT:\n{}", words());
                    }
                }
            }
        }
    }
    let wrong = table::wrong(&sets[..by_hand], theirs, ours);
    for line in wrong.iter().take(20) {
        println!("TABLE: {line}");
    }
    println!("{pairs} pairs of policies and requests ({} pods, seed {}):", sets.len(), args.seed);
    for (what, count) in tally {
        println!("  {count:6} {what}");
    }
    for (name, count) in &known {
        println!("  {count:6} differ as meant: {name}");
    }
    println!("{unknown} differ and should not; {} expectations of the table are missed", wrong.len());
    unknown == 0 && wrong.is_empty()
}

fn class(theirs: &Answer, ours: &Answer) -> &'static str {
    use Answer::{Allowed, Denied, Malformed};
    match (theirs, ours) {
        (Allowed(a), Allowed(b)) if a == b || a.is_none() || b.is_none() => "allowed by both",
        (Allowed(_), Allowed(_)) => "allowed by both, the app sees another path",
        (Denied, Denied) => "denied by both",
        (Malformed(_), Malformed(_)) => "malformed to both",
        (Denied, Malformed(_)) => "denied by Envoy, malformed to Weft",
        (Malformed(_), Denied) => "malformed to Envoy, denied by Weft",
        (Allowed(_), _) => "let through by Envoy only",
        (_, Allowed(_)) => "let through by Weft only",
    }
}

/// An app that sends back what it gets.
fn echo() -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            std::thread::spawn(move || -> std::io::Result<()> {
                let mut buf = [0; 512];
                loop {
                    let n = stream.read(&mut buf)?;
                    if n == 0 {
                        return Ok(());
                    }
                    stream.write_all(&buf[..n])?;
                }
            });
        }
    });
    Ok(address)
}
