//! Entry point of `weft-init`: flags in, exit code out. Standard output is for `--dry-run` alone; the rest is said on
//! standard error.

use std::io::Write as _;
use std::process::ExitCode;
use weft_init::flags::Options;

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args_os()) {
        Ok(options) => options,
        Err(error) => {
            // Nothing is left to tell anyone when standard error is closed.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(tracing::Level::INFO)
        .with_target(false)
        .with_ansi(false)
        .without_time()
        .init();
    match weft_init::run(&options) {
        Ok(text) => match std::io::stdout().write_all(text.as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                tracing::error!("cannot write to standard output: {error}");
                ExitCode::FAILURE
            }
        },
        Err(failure) => {
            tracing::error!("{failure}");
            ExitCode::FAILURE
        }
    }
}
