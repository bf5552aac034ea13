//! `weft-sample`: the sample programs, and for this crate's tests also the playground.

use std::process::ExitCode;

use clap::{FromArgMatches as _, Subcommand};

#[derive(Debug, Subcommand)]
enum Hidden {
    /// As `weft playground`
    Playground(weft_playground::Args),
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).map(String::as_str) == Some("playground") {
        let matches = Hidden::augment_subcommands(clap::Command::new("weft-sample")).get_matches_from(&args);
        let result = Hidden::from_arg_matches(&matches).map_err(anyhow::Error::from).and_then(|Hidden::Playground(args)| weft_playground::run(args));
        return match result {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("error: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    ExitCode::from(u8::try_from(weft_playground::sample::run(&args)).unwrap_or(1))
}
