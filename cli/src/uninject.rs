//! `weft uninject`: takes out again what `weft inject` (or the webhook) put in.

use crate::inject;
use std::path::PathBuf;
use std::process::ExitCode;

/// Arguments of `weft uninject`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  weft uninject -f injected.yaml
  kubectl get deploy -o yaml | weft uninject -f - | kubectl apply -f -")]
pub(crate) struct Args {
    /// A file, a folder (its .yaml, .yml and .json files, sorted), or - for standard input; may be repeated
    #[arg(short = 'f', long = "filename", value_name = "FILE|DIR|-", required = true)]
    filename: Vec<PathBuf>,
}

/// Runs it.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    Ok(inject::print(&inject::read_all(&args.filename)?, weft_webhook::offline::uninject))
}
