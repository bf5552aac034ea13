//! `weft validate`: what admission would say about policies, without a cluster. Errors are the same to the letter, by the same
//! code; warnings that need to know the cluster are not given.

use crate::inject::read_all;
use std::path::PathBuf;
use std::process::ExitCode;
use weft_webhook::validate::{offline, report};

/// Arguments of `weft validate`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Validates AuthorizationPolicy, PeerAuthentication and RequestAuthentication; other kinds are passed over. A line per object \
goes to standard output, mistakes and warnings to standard error. The exit status is 0 only if every object would be accepted.

Examples:
  weft validate -f policy.yaml
  kubectl get authorizationpolicies -A -o yaml | weft validate -f -
  weft validate -f manifests/"
)]
pub(crate) struct Args {
    /// A file, a folder (its .yaml, .yml and .json files, sorted), or - for standard input; may be repeated
    #[arg(short = 'f', long = "filename", value_name = "FILE|DIR|-", required = true)]
    filename: Vec<PathBuf>,
}

/// Runs it.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let (mut seen, mut refused) = (0, 0);
    for (name, stream) in read_all(&args.filename)? {
        for checked in offline::check(&stream) {
            seen += 1;
            for warning in &checked.verdict.warnings {
                eprintln!("warning: {name}: {}: {warning}", checked.title);
            }
            if checked.verdict.is_valid() {
                println!("{} is valid", checked.title);
            } else {
                refused += 1;
                eprintln!("error: {name}: {}: {}", checked.title, report::refusal(&checked.verdict.errors));
            }
        }
    }
    if seen == 0 {
        println!("nothing to validate: no AuthorizationPolicy, PeerAuthentication or RequestAuthentication");
    }
    Ok(if refused == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
