//! `weft-proxy`: the sidecar.
//!
//! Without arguments it is configured by the `WEFT_*` variables of its container; `--config FILE` reads a file instead.
//! `weft-proxy wait [--timeout=SECONDSs]` waits until the proxy of this pod is ready.

use std::process::ExitCode;
use std::time::{Duration, Instant};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, reload};
use weft_api::{env, names};
use weft_proxy::admin::Relog;
use weft_proxy::log::queue::Queue;
use weft_proxy::settings::{self, LogFormat, Settings};
use weft_proxy::{run, sys};

const USAGE: &str = "weft-proxy: Weft's sidecar

Usage:
  weft-proxy                        configured by WEFT_* environment variables, as in a pod
  weft-proxy --config FILE          configured by a file (docs/proxy.md)
  weft-proxy wait [--timeout=120s]  wait until the proxy of this pod is ready
  weft-proxy --version
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let settings = match args.as_slice() {
        [] => settings::env::read(|name| std::env::var(name).ok(), sys::cpu_quota()).map_err(|e| e.to_string()),
        ["--config", file] => from_file(file),
        [one] if one.starts_with("--config=") => from_file(&one["--config=".len()..]),
        ["wait", rest @ ..] => return wait(rest),
        ["--version" | "-V"] => {
            println!("weft-proxy {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        ["--help" | "-h"] => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    let settings = match settings {
        Ok(settings) => settings,
        Err(problem) => {
            eprintln!("weft-proxy: {problem}");
            return ExitCode::from(2);
        }
    };
    let queue = match Queue::start(std::io::stderr()) {
        Ok(queue) => queue,
        Err(problem) => {
            eprintln!("weft-proxy: the thread that writes the log can't be started: {problem}");
            return ExitCode::FAILURE;
        }
    };
    queue.flush_before_panics();
    let relog = match log(&settings, &queue) {
        Ok(relog) => relog,
        Err(problem) => {
            eprintln!("weft-proxy: log filter {:?}: {problem}", settings.log);
            return ExitCode::from(2);
        }
    };
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let code = run::run(settings, relog).map_or_else(
        |error| {
            tracing::error!("{error:#}");
            1
        },
        i32::from,
    );
    queue.flush();
    // Whatever workers still do ends with the process.
    std::process::exit(code)
}

fn from_file(file: &str) -> Result<Settings, String> {
    let text = std::fs::read_to_string(file).map_err(|e| format!("{file}: {e}"))?;
    settings::file::read(&text, sys::cpu_quota()).map_err(|e| format!("{file}: {e}"))
}

fn log(settings: &Settings, queue: &Queue) -> Result<Relog, String> {
    let filter = EnvFilter::try_new(&settings.log).map_err(|e| e.to_string())?;
    let (filter, handle) = reload::Layer::new(filter);
    let registry = tracing_subscriber::registry().with(filter);
    let queue = queue.clone();
    match settings.log_format {
        LogFormat::Text => registry.with(tracing_subscriber::fmt::layer().with_writer(queue).with_ansi(false)).init(),
        LogFormat::Json => registry.with(tracing_subscriber::fmt::layer().json().with_writer(queue)).init(),
    }
    Ok(Box::new(move |level| {
        let new = EnvFilter::try_new(level).map_err(|e| e.to_string())?;
        handle.reload(new).map_err(|e| e.to_string())
    }))
}

fn wait(args: &[&str]) -> ExitCode {
    let seconds = match args {
        [] => Some(120),
        [one] => one.strip_prefix("--timeout=").and_then(|t| t.trim_end_matches('s').parse().ok()),
        _ => None,
    };
    let Some(seconds) = seconds else {
        eprint!("{USAGE}");
        return ExitCode::from(2);
    };
    let port = std::env::var(env::ADMIN_PORT).ok().and_then(|p| p.parse().ok()).unwrap_or(names::ADMIN_PORT);
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut last = String::new();
    while Instant::now() < until {
        match ready(port) {
            Ok(()) => return ExitCode::SUCCESS,
            Err(error) => last = error.to_string(),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    eprintln!("weft-proxy: not ready within {seconds} s: {last}");
    ExitCode::FAILURE
}

fn ready(port: u16) -> std::io::Result<()> {
    use std::io::{Error, Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect_timeout(&([127, 0, 0, 1], port).into(), Duration::from_secs(1))?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    stream.write_all(b"GET /healthz/ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    if answer.starts_with("HTTP/1.1 200") {
        Ok(())
    } else {
        Err(Error::other(answer.lines().last().unwrap_or_default().to_owned()))
    }
}
