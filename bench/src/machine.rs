//! The machine that measures: which core does what, and what a reader of the numbers has to know of it.

use anyhow::{Context, Result, bail};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::Pid;
use serde::Serialize;
use std::process::{Child, Command};

/// Which core belongs to whom.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Cores {
    /// The peer under measurement.
    pub(crate) peer: usize,
    /// Load generator and backend.
    pub(crate) load: usize,
}

impl Cores {
    /// Pins this thread (the generator) to its core.
    pub(crate) fn new(peer: usize, load: usize) -> Result<Self> {
        if peer == load {
            bail!("the peer and the load generator need a core each, both were given core {peer}");
        }
        let cores = Self { peer, load };
        pin(peer)?;
        pin(load)?;
        Ok(cores)
    }

    /// Starts `command` on the peer's core. A child inherits the affinity of the thread that starts it.
    pub(crate) fn spawn_peer(self, command: &mut Command) -> Result<Child> {
        pin(self.peer)?;
        let child = command.spawn();
        pin(self.load)?;
        child.with_context(|| format!("can't start {}", command.get_program().display()))
    }
}

fn pin(core: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(core)?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| {
        format!("can't use core {core}: this machine may have fewer (two are needed); see --peer-core and --load-core")
    })
}

/// Allows as many descriptors as the hard limit does: thousands of connections are held open.
pub(crate) fn raise_descriptor_limit() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("can't raise the limit of open files")
}

/// What a report says of where it was made.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    cpu: String,
    cpus: usize,
    /// Hardware threads of one core share its units: then peer and generator slow each other down.
    siblings_of_peer_core: String,
    kernel: String,
    memory_mib: u64,
    load_average: String,
}

impl Machine {
    /// Looks around; what can't be found out is empty.
    pub(crate) fn look(cores: Cores) -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let field = |text: &str, key: &str| -> String {
            let line = text.lines().find(|l| l.starts_with(key));
            line.and_then(|l| l.split_once(':')).map(|(_, v)| v.trim().to_owned()).unwrap_or_default()
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        Self {
            cpu: field(&read("/proc/cpuinfo"), "model name"),
            cpus: read("/proc/cpuinfo").lines().filter(|l| l.starts_with("processor")).count(),
            siblings_of_peer_core: read(&format!("/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list", cores.peer)),
            kernel: read("/proc/sys/kernel/osrelease"),
            memory_mib: memory.split(' ').next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) / 1024,
            load_average: read("/proc/loadavg"),
        }
    }
}
