//! A process under measurement: started on its core, with a folder for its files and its log, and ended with the value.

use crate::machine::Cores;
use anyhow::Result;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a process may take until it serves.
const PATIENCE: Duration = Duration::from_secs(15);

/// A running process.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    started: Instant,
    log: PathBuf,
    _dir: tempfile::TempDir,
}

/// A folder for what a process reads; it is removed with the process.
pub(crate) fn folder() -> Result<tempfile::TempDir> {
    Ok(tempfile::Builder::new().prefix("weft-bench-").tempdir()?)
}

impl Process {
    /// Starts `command`, whose files are in `dir`.
    pub(crate) fn start(mut command: Command, cores: Cores, dir: tempfile::TempDir) -> Result<Self> {
        let log = dir.path().join("log");
        let file = std::fs::File::create(&log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let started = Instant::now();
        Ok(Self { child: cores.spawn_peer(&mut command)?, started, log, _dir: dir })
    }

    /// Its id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The end of its log.
    pub(crate) fn last_words(&self) -> String {
        last_lines(&self.log, 8)
    }

    /// Tries `probe` until it succeeds, and returns how long after exec that was.
    pub(crate) async fn ready<T>(&mut self, mut probe: impl AsyncFnMut() -> Result<T>) -> Result<Duration> {
        loop {
            let outcome = probe().await;
            let after = self.started.elapsed();
            let Err(error) = outcome else {
                return Ok(after);
            };
            let ended = self.child.try_wait()?;
            if ended.is_some() || after > PATIENCE {
                let state = ended.map_or_else(|| format!("does not serve after {after:.0?}"), |s| format!("ended with {s}"));
                return Err(error.context(format!("process {state}; its last words:\n{}", last_lines(&self.log, 8))));
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has nothing to save; what it thinks of a graceful end is not measured here.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn last_lines(file: &Path, count: usize) -> String {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::bail;

    const ANY: Cores = Cores { peer: 0, load: 0 };

    #[tokio::test]
    async fn a_process_that_dies_is_reported_with_its_last_words() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo first; echo no such port >&2; exit 3"]);
        let mut process = Process::start(command, ANY, folder().unwrap()).unwrap();
        let error = process.ready(async || -> Result<()> { bail!("not yet") }).await.unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("exit status: 3") && text.contains("no such port") && text.contains("not yet"), "{text}");
    }

    #[tokio::test]
    async fn a_process_ends_with_its_value() {
        let mut command = Command::new("sleep");
        command.arg("600");
        let mut process = Process::start(command, ANY, folder().unwrap()).unwrap();
        let mut tries = 0;
        let after = process
            .ready(async || {
                tries += 1;
                anyhow::ensure!(tries >= 3, "no");
                Ok(())
            })
            .await
            .unwrap();
        assert!(after >= Duration::from_millis(2));
        let stat = format!("/proc/{}/stat", process.pid());
        assert!(std::fs::exists(&stat).unwrap());
        drop(process);
        assert!(!std::fs::exists(&stat).unwrap());
    }
}
