//! `weft-control`: the control plane. See the library for what it does.

use clap::Parser as _;
use weft_control::{flags::Flags, logging, run};

fn main() -> std::process::ExitCode {
    let flags = Flags::parse();
    if let Err(error) = logging::start(&flags.log_level, flags.log_format) {
        eprintln!("weft-control: {error}");
        return std::process::ExitCode::from(2);
    }
    run::main(flags)
}
