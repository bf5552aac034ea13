//! `weft-bench`: what a hop through `weft-proxy` costs beside what it costs through Envoy, HAProxy and nginx, and what a
//! review costs the webhook.
//!
//! The whole measuring side (load generator and the backend that answers) is one thread pinned to one core; the
//! peer that is measured has the other core for itself. Raw protocol bytes are prepared beforehand, so that
//! the generator costs a fraction of any proxy. The figure to trust is the CPU time that the kernel accounts to the peer ([`proc`]):
//! unlike requests per second it hardly moves when the machine has other work.
//!
//! A peer that fails a scenario gets no number for it, the reason is printed, and the exit status is 1.

mod authz;
mod certs;
mod fetch;
mod h1;
mod h2;
mod load;
mod machine;
mod pace;
mod pair;
mod peer;
mod proc;
mod process;
mod proxy;
mod report;
mod stats;
mod svg;
mod tcp;
mod webhook;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Side-by-side measurements of Weft.
#[derive(Debug, Parser)]
#[command(name = "weft-bench", version, about)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// weft-proxy, Envoy, HAProxy and nginx in turn: CPU, latency, memory, start-up.
    Proxy(proxy::Args),
    /// Two proxies with mutual TLS between them: weft-proxy, Envoy, HAProxy in turn.
    Pair(pair::Args),
    /// AdmissionReviews posted to the webhook over TLS at a fixed rate.
    Webhook(webhook::Args),
    /// The compiled policies alone: what a verdict costs.
    Authz(authz::Args),
    /// One peer under one load until the time is over: for a profiler beside it.
    Load(load::Args),
}

fn main() -> ExitCode {
    let args = Args::parse();
    let outcome = machine::raise_descriptor_limit().and_then(|()| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            match args.command {
                Command::Proxy(args) => proxy::run(args).await,
                Command::Pair(args) => pair::run(args).await,
                Command::Webhook(args) => webhook::run(args).await,
                Command::Authz(args) => Ok(authz::run(&args)),
                Command::Load(args) => load::run(args).await,
            }
        })
    });
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("weft-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
