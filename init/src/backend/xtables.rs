//! `iptables-nft` and `iptables-legacy`: running the tools.

use super::diagnose;
use super::state::State;
use crate::error::Failure;
use crate::flags::Backend;
use crate::rules::{Family, RuleSet};
use std::io::Write as _;
use std::process::{Command, Output, Stdio};

/// Seconds that a tool may wait for another that changes x_tables at the same time.
const LOCK_WAIT_SECONDS: u8 = 10;

fn tool(backend: Backend, family: Family) -> &'static str {
    match (backend, family) {
        (Backend::Legacy, Family::V4) => "iptables-legacy",
        (Backend::Legacy, Family::V6) => "ip6tables-legacy",
        (_, Family::V4) => "iptables-nft",
        (_, Family::V6) => "ip6tables-nft",
    }
}

/// The name of the restore tool.
pub(super) fn restore_command(backend: Backend, family: Family) -> String {
    format!("{}-restore", tool(backend, family))
}

fn command(name: &str, backend: Backend) -> Command {
    let mut command = Command::new(name);
    if backend == Backend::Legacy {
        // The lock guards the tables of this network namespace, so the namespace's own file is the right thing to lock, and
        // it is there on a read-only root file system too.
        command.env("XTABLES_LOCKFILE", "/proc/self/ns/net");
    }
    command
}

fn run(backend: Backend, family: Family, name: &str, command: &mut Command, input: Option<&str>) -> Result<Output, Failure> {
    let output = feed(command, input).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Failure::ToolMissing { tool: name.to_owned(), backend },
        _ => Failure::Tool { tool: name.to_owned(), backend, family, message: error.to_string(), advice: None },
    })?;
    if output.status.success() {
        return Ok(output);
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let message = if message.is_empty() { output.status.to_string() } else { message };
    let advice = diagnose::advice(backend, family, &message, input.unwrap_or_default());
    Err(Failure::Tool { tool: name.to_owned(), backend, family, message, advice })
}

/// Runs a command with an input. The inputs are far smaller than what the tools print on an error is large, so writing all
/// before reading cannot block for ever: the tools read their input to the end first.
pub(super) fn feed(command: &mut Command, input: Option<&str>) -> std::io::Result<Output> {
    let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
    let mut child = command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
        // A tool that stops at the first bad line closes the pipe; its own message says more than ours could.
        match stdin.write_all(input.as_bytes()) {
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => return Err(error),
            _ => {}
        }
    }
    child.wait_with_output()
}

/// What `iptables-save` prints.
pub(super) fn save(backend: Backend, family: Family) -> Result<String, Failure> {
    let name = format!("{}-save", tool(backend, family));
    let output = run(backend, family, &name, &mut command(&name, backend), None)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // The tool counts this as a success, and its restore would then say that it has changed what it has not.
    match text.split_once("# Table `").and_then(|(_, rest)| rest.split_once("' is incompatible")) {
        Some((table, _)) => Err(Failure::Incompatible { table: table.to_owned(), family }),
        None => Ok(text),
    }
}

/// Feeds a script to `iptables-restore`.
pub(super) fn restore(backend: Backend, family: Family, script: &str) -> Result<(), Failure> {
    let name = restore_command(backend, family);
    let mut command = command(&name, backend);
    command.arg("--noflush");
    if backend == Backend::Legacy {
        command.arg(format!("--wait={LOCK_WAIT_SECONDS}"));
    }
    run(backend, family, &name, &mut command, Some(script)).map(drop)
}

/// What the kernel holds in the tables of `rules`.
pub(super) fn read_back(backend: Backend, rules: &RuleSet) -> Result<State, Failure> {
    if backend == Backend::Legacy {
        // The library gives its commands no environment, and on a read-only root the lock needs one.
        return save(backend, rules.family).map(|text| State::parse(&text));
    }
    let Ok(mut reader) = iptables::new(rules.family == Family::V6) else {
        // An image may have the tools of one back end only, without the plain name that the library asks for its version.
        return save(backend, rules.family).map(|text| State::parse(&text));
    };
    reader.cmd = tool(backend, rules.family);
    let mut state = State::default();
    for table in &rules.tables {
        let lines = reader.list_table(table.kind.name()).map_err(|error| Failure::Tool {
            tool: reader.cmd.to_owned(),
            backend,
            family: rules.family,
            message: error.to_string(),
            advice: None,
        })?;
        state.add_table(table.kind, &lines);
    }
    Ok(state)
}
