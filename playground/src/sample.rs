//! The programs that the samples, the demo and the tests run in their pods: a small web application, its caller, an echo server that
//! tells what it received, and a client that prints what came back.
//!
//! The program is the name that the binary was called by, or its first argument.

mod client;
mod frontend;
mod server;

use std::path::Path;

/// Runs the program that the arguments (with the binary's name first) ask for; answers its exit status.
pub fn run(args: &[String]) -> i32 {
    let called = args.first().map(|a| Path::new(a).file_name().unwrap_or_default().to_string_lossy().into_owned()).unwrap_or_default();
    let (program, rest) = match called.as_str() {
        "go-app" | "frontend" | "echo" | "client" => (called.as_str(), args.get(1..).unwrap_or_default()),
        _ => (args.get(1).map_or("", String::as_str), args.get(2..).unwrap_or_default()),
    };
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        eprintln!("error: no runtime");
        return 1;
    };
    let result = runtime.block_on(async {
        match program {
            "go-app" => server::go_app().await,
            "frontend" => frontend::run().await,
            "echo" => server::echo(rest).await,
            "client" => client::run(rest).await,
            other => anyhow::bail!("there is no program {other:?}; there are go-app, frontend, echo and client"),
        }
    });
    runtime.shutdown_background();
    match result {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("error: {e:#}");
            1
        }
    }
}

/// An environment variable, or this.
fn variable(name: &str, default: &str) -> String {
    std::env::var(name).ok().filter(|v| !v.is_empty()).unwrap_or_else(|| default.to_owned())
}

/// The pod's name.
fn hostname() -> String {
    match std::env::var("HOSTNAME") {
        Ok(name) if !name.is_empty() => name,
        _ => nix::unistd::gethostname().ok().and_then(|n| n.into_string().ok()).unwrap_or_default(),
    }
}

/// Resolves when the pod is told to stop.
async fn told_to_stop() {
    use tokio::signal::unix::{SignalKind, signal};
    match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(mut term), Ok(mut int)) => {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
        }
        _ => std::future::pending().await,
    }
}

/// One string field (number 1) as a gRPC message.
fn frame(text: &str) -> Vec<u8> {
    let mut message = vec![0x0a];
    let mut length = text.len();
    while length >= 0x80 {
        message.push((length & 0x7f) as u8 | 0x80);
        length >>= 7;
    }
    message.push(length as u8);
    message.extend_from_slice(text.as_bytes());
    let mut out = vec![0];
    out.extend_from_slice(&(message.len() as u32).to_be_bytes());
    out.extend(message);
    out
}

/// The string field 1 of a gRPC message; empty if there is none.
fn unframe(body: &[u8]) -> Option<String> {
    let message = body.get(5..)?;
    let Some((0x0a, mut rest)) = message.split_first().map(|(tag, rest)| (*tag, rest)) else {
        return message.is_empty().then(String::new);
    };
    let (mut length, mut shift) = (0_usize, 0);
    loop {
        let (byte, after) = rest.split_first()?;
        length |= usize::from(byte & 0x7f).checked_shl(shift)?;
        rest = after;
        shift += 7;
        if byte & 0x80 == 0 {
            break;
        }
    }
    Some(String::from_utf8_lossy(rest.get(..length)?).into_owned())
}

/// A header's name as Go's servers print it.
fn title(name: &str) -> String {
    name.split('-').map(|part| part[..part.len().min(1)].to_uppercase() + part.get(1..).unwrap_or_default()).collect::<Vec<_>>().join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_framing() {
        for text in ["", "a", &"x".repeat(127), &"y".repeat(128), &"z".repeat(70_000)] {
            assert_eq!(unframe(&frame(text)).as_deref(), Some(text));
        }
        assert_eq!(unframe(&[0, 0, 0, 0, 0]), Some(String::new()));
        assert_eq!(unframe(&[0, 0, 0, 0, 9, 0x0a, 200]), None);
        assert_eq!(title("x-set-it"), "X-Set-It");
    }
}
