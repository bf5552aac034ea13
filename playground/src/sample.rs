//! The sample programs: the guide's `go-app` and `frontend`, and an echo server and client for tests. One binary, `weft-sample`;
//! which of them it is says its first argument, or the name that it is called by.
//!
//! They are ordinary programs: they know nothing of a mesh and run on any cluster.

mod client;
mod echo;
mod frontend;
mod go_app;
mod grpc;
mod serve;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

const USAGE: &str = "usage:
  weft-sample go-app                              serve PORT (8080) as version VERSION (v1)
  weft-sample frontend                            GET TARGET_URL, RATE times a second; serve PORT (8080)
  weft-sample echo [--port=N]... [--grpc=N]... [--tcp=N]... [--server-first=N]... [--tls=N]... [--crt=FILE --key=FILE] [--version=V]
  weft-sample client URL [--method=M] [-H NAME:VALUE]... [--count=N] [--timeout=SECONDS] [--body=TEXT] [--http2]";

/// Runs the program that the command line names.
pub fn main() -> ExitCode {
    let mut args: Vec<String> = std::env::args_os().map(OsString::into_string).map(Result::unwrap_or_default).collect();
    let called = if args.is_empty() { String::new() } else { args.remove(0) };
    let called = Path::new(&called).file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let name = match called.as_str() {
        "go-app" | "frontend" | "echo" | "client" => called,
        _ if args.is_empty() => String::new(),
        _ => args.remove(0),
    };
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("error: {e}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(async {
        match name.as_str() {
            "go-app" => go_app::run().await,
            "frontend" => frontend::run().await,
            "echo" => echo::run(&args).await,
            "client" => client::run(&args).await,
            _ => anyhow::bail!("{USAGE}"),
        }
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// An environment variable, or this.
fn setting(name: &str, default: &str) -> String {
    std::env::var(name).ok().filter(|v| !v.is_empty()).unwrap_or_else(|| default.to_owned())
}

/// The host name, which in a pod is the pod's name.
fn hostname() -> String {
    nix::unistd::gethostname().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}
