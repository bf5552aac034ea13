//! `weft-sample`: the sample programs as one binary, see [`weft_playground::sample`].

use std::process::ExitCode;

fn main() -> ExitCode {
    weft_playground::sample::main()
}
