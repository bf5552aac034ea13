//! `weft-playground`: the same as `weft playground`, for the tests of this crate, which can't build the whole tool.

use clap::Parser;
use std::process::ExitCode;

#[derive(Debug, Parser)]
#[command(name = "weft-playground", about = "A one-machine cluster for trying and testing")]
struct Cli {
    #[command(flatten)]
    args: weft_playground::Args,
}

fn main() -> ExitCode {
    match weft_playground::run(Cli::parse().args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
