//! `weft`: the command-line tool. One file per command; this one only dispatches.
//!
//! Exit codes: 0 done, 1 it failed or something was refused (the message says what), 2 the command line was wrong.

mod authz;
mod console;
mod edges;
mod identity;
mod inject;
mod install;
mod output;
mod policy;
mod uninject;
mod validate;
mod why;

use clap::{CommandFactory as _, Parser, Subcommand};
use std::process::ExitCode;

#[derive(Debug, Parser)]
#[command(name = "weft", version, about = "Weft, a service mesh for Kubernetes", propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print the manifest that installs Weft
    Install(install::Install),
    /// Print what to delete to remove Weft
    Uninstall(install::Uninstall),
    /// Add the sidecar to manifests, as the webhook would
    Inject(inject::Args),
    /// Take the sidecar out of manifests again, exactly
    Uninject(uninject::Args),
    /// Check policies as the cluster would at admission
    Validate(validate::Args),
    /// Tell why a pod is in the mesh or not, or why a request is refused or not, step by step
    Why(why::Args),
    /// Who talks to whom, as the proxies saw it
    Edges(edges::Args),
    /// The certificates of proxies, and what signs them; rotate them
    Identity(identity::Args),
    /// The policies in force for a workload, and how often they decided
    Authz(authz::Args),
    /// Try policies before they are applied
    Policy(policy::Args),
    /// A one-machine cluster for trying and testing: up, down, status
    Playground(weft_playground::Args),
    /// Print the version
    Version,
    /// Print a shell's completion script
    #[command(after_help = "Example:\n  weft completion bash > /etc/bash_completion.d/weft")]
    Completion {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Install(args) => install::install(&args).map(|()| ExitCode::SUCCESS),
        Command::Uninstall(args) => install::uninstall(&args).map(|()| ExitCode::SUCCESS),
        Command::Inject(args) => inject::run(&args),
        Command::Uninject(args) => uninject::run(&args),
        Command::Validate(args) => validate::run(&args),
        Command::Why(args) => why::run(&args),
        Command::Edges(args) => edges::run(&args),
        Command::Identity(args) => identity::run(&args),
        Command::Authz(args) => authz::run(&args),
        Command::Policy(args) => policy::run(&args),
        Command::Playground(args) => weft_playground::run(args).map(|()| ExitCode::SUCCESS),
        Command::Version => {
            println!("weft {}", env!("CARGO_PKG_VERSION"));
            Ok(ExitCode::SUCCESS)
        }
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "weft", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
