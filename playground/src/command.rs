//! `weft playground up|down|status`: starts, ends and describes the daemon.
//!
//! The state of a playground is one folder. Two playgrounds in two folders don't meet: the names of their network namespaces
//! are derived from the folder's path. `up` is idempotent: it leaves a living playground alone, and removes what a dead one left
//! (after `kill -9`, say) before it starts a new one.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::Subcommand;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};
use serde::{Deserialize, Serialize};

use crate::{daemon, json, netns, node};

/// Folder of the playground unless `--dir` names another.
const DEFAULT_DIR: &str = "/var/lib/weft-playground";
/// How long `up` waits for the daemon.
const PATIENCE: Duration = Duration::from_mins(1);

/// Arguments of `weft playground`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Args)]
struct Place {
    /// Folder for its state, its logs and the kubeconfig
    #[arg(long, default_value = DEFAULT_DIR)]
    dir: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Start a playground, unless it runs already, and wait until it is ready
    Up {
        #[command(flatten)]
        place: Place,
        /// Folder with the programs that images stand for [default: the folder of this program]
        #[arg(long)]
        image_dir: Option<PathBuf>,
        /// Port of the API server on 127.0.0.1; 0 takes a free one
        #[arg(long, default_value_t = 0)]
        port: u16,
    },
    /// End it and remove everything that it made
    Down {
        #[command(flatten)]
        place: Place,
    },
    /// Say whether it runs; fails when it doesn't
    Status {
        #[command(flatten)]
        place: Place,
    },
    /// The daemon
    #[command(hide = true)]
    Serve {
        #[arg(long)]
        dir: PathBuf,
        #[arg(long)]
        image_dir: PathBuf,
        #[arg(long)]
        port: u16,
    },
    /// Becomes a container's process
    #[command(hide = true)]
    Launch { spec: PathBuf },
}

/// What the daemon writes down when it is ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Running {
    /// Process of the daemon.
    pub pid: i32,
    /// When that process started, in clock ticks since boot: a later process with the same number has another.
    pub born: u64,
    /// URL of the API server.
    pub server: String,
}

/// The files of a playground.
#[derive(Debug, Clone)]
pub(crate) struct Home {
    /// The folder, absolute.
    pub dir: PathBuf,
    /// What the names of its network namespaces begin with.
    pub prefix: String,
}

impl Home {
    /// The playground of this folder, which is made if it isn't there.
    pub(crate) fn new(dir: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("--dir {}", dir.display()))?;
        let dir = dir.canonicalize().with_context(|| format!("--dir {}", dir.display()))?;
        let prefix = format!("weft-{:08x}", json::fnv(&dir.to_string_lossy()) >> 32);
        Ok(Self { dir, prefix })
    }

    /// Name of the node's network namespace.
    pub(crate) fn node(&self) -> String {
        format!("{}-node", self.prefix)
    }

    /// The administrator's kubeconfig.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.dir.join("kubeconfig")
    }

    /// Where [`Running`] is.
    pub(crate) fn state(&self) -> PathBuf {
        self.dir.join("state.json")
    }

    fn log(&self) -> PathBuf {
        self.dir.join("playground.log")
    }

    /// The living daemon, if there is one.
    fn running(&self) -> Option<Running> {
        let state: Running = serde_json::from_slice(&fs::read(self.state()).ok()?).ok()?;
        (born(state.pid) == Some(state.born)).then_some(state)
    }

    /// One `up` or `down` at a time.
    fn lock(&self) -> anyhow::Result<Flock<File>> {
        let path = self.dir.join("lock");
        let file = fs::OpenOptions::new().create(true).append(true).open(&path).with_context(|| path.display().to_string())?;
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| anyhow::anyhow!("{}: {e}", path.display()))
    }

    /// Ends what still runs in its network namespaces and removes them, with the pods' folders.
    pub(crate) fn clean(&self) {
        let mut names = netns::names(&format!("{}-", self.prefix));
        // Pods first: without the node's namespace their links would be gone before their processes are.
        names.sort_by_key(|name| *name == self.node());
        for name in names {
            netns::destroy(&name);
        }
        let _ = fs::remove_dir_all(self.dir.join("pods"));
        for file in [self.state(), self.kubeconfig()] {
            let _ = fs::remove_file(file);
        }
    }
}

/// When a process started (clock ticks since boot), if there is one that isn't a zombie.
pub(crate) fn born(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the name in parentheses, which may contain anything.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    if fields.first() == Some(&"Z") {
        return None;
    }
    fields.get(19)?.parse().ok()
}

/// Runs `weft playground …`.
///
/// # Errors
/// The message says what failed and what to do; `status` fails when no playground runs.
pub fn run(args: Args) -> anyhow::Result<()> {
    match args.action {
        Action::Launch { spec } => std::process::exit(node::launch::main(&spec)),
        Action::Serve { dir, image_dir, port } => daemon::serve(&Home::new(&dir)?, &image_dir, port),
        Action::Up { place, image_dir, port } => up(&Home::new(&place.dir)?, image_dir, port),
        Action::Down { place } => {
            if !place.dir.exists() {
                println!("No playground in {}.", place.dir.display());
                return Ok(());
            }
            down(&Home::new(&place.dir)?)
        }
        Action::Status { place } => status(&place.dir),
    }
}

fn check_machine() -> anyhow::Result<()> {
    ensure!(
        Uid::effective().is_root(),
        "the playground makes network namespaces, so it must run as root: try `sudo -E weft playground up`"
    );
    for (program, package) in [("ip", "iproute2"), ("nft", "nftables")] {
        let found = Command::new(program).arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status();
        ensure!(found.is_ok(), "the program `{program}` is missing: install the package {package}");
    }
    Ok(())
}

/// The words before the action on the command line, so that the daemon and the launcher can be called in the same way.
pub(crate) fn words_before_action() -> Vec<String> {
    std::env::args().skip(1).take_while(|word| !["up", "serve"].contains(&word.as_str())).collect()
}

fn up(home: &Home, image_dir: Option<PathBuf>, port: u16) -> anyhow::Result<()> {
    check_machine()?;
    let _lock = home.lock()?;
    if home.running().is_some() {
        println!("The playground in {} is up already.", home.dir.display());
        announce(home);
        return Ok(());
    }
    home.clean();
    let exe = std::env::current_exe().context("the path of this program")?;
    let image_dir = match image_dir {
        Some(dir) => dir.canonicalize().with_context(|| format!("--image-dir {}", dir.display()))?,
        None => exe.parent().map(Path::to_owned).context("the folder of this program")?,
    };
    let log = fs::OpenOptions::new().create(true).write(true).truncate(true).mode(0o644).open(home.log())?;
    let mut command = Command::new(&exe);
    command.args(words_before_action()).arg("serve").arg("--dir").arg(&home.dir).arg("--image-dir").arg(&image_dir);
    command.args(["--port", &port.to_string()]).current_dir("/").stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let mut child = command.spawn().with_context(|| format!("{} can't be started", exe.display()))?;
    let begin = Instant::now();
    while home.running().is_none() {
        let ended = child.try_wait()?;
        if ended.is_some() || begin.elapsed() > PATIENCE {
            let _ = child.kill();
            let _ = child.wait();
            home.clean();
            let text = fs::read_to_string(home.log()).unwrap_or_default();
            let tail: Vec<&str> = text.lines().rev().take(10).collect();
            let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
            let how = ended.map_or_else(|| format!("wasn't ready within {} s", PATIENCE.as_secs()), |s| format!("ended ({s})"));
            bail!("the playground's daemon {how}; the end of {}:\n{tail}", home.log().display());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    println!(
        "The playground is up: an API server and one node in network namespaces of this machine, in {}.",
        home.dir.display()
    );
    println!("It is for trying and testing; it is not Kubernetes, and it forgets everything at `down`.");
    announce(home);
    Ok(())
}

fn announce(home: &Home) {
    println!("export KUBECONFIG={}", home.kubeconfig().display());
}

fn down(home: &Home) -> anyhow::Result<()> {
    ensure!(
        Uid::effective().is_root(),
        "the playground was started as root, so root has to end it: try `sudo weft playground down`"
    );
    let lock = home.lock()?;
    if let Some(state) = home.running() {
        let pid = Pid::from_raw(state.pid);
        let _ = kill(pid, Signal::SIGTERM);
        let begin = Instant::now();
        while born(state.pid) == Some(state.born) {
            if begin.elapsed() > Duration::from_secs(10) {
                let _ = kill(pid, Signal::SIGKILL);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    home.clean();
    for file in [home.log(), home.dir.join("lock")] {
        let _ = fs::remove_file(file);
    }
    drop(lock);
    // Only when nothing else is in it.
    let _ = fs::remove_dir(&home.dir);
    println!("The playground in {} is gone.", home.dir.display());
    Ok(())
}

fn status(dir: &Path) -> anyhow::Result<()> {
    let home = if dir.exists() { Some(Home::new(dir)?) } else { None };
    let Some((home, state)) = home.and_then(|h| h.running().map(|state| (h, state))) else {
        bail!("no playground runs in {}; start one with `weft playground up`", dir.display());
    };
    let pods = netns::names(&format!("{}-p", home.prefix)).len();
    println!("The playground in {} is up: process {}, {}, {pods} pod networks.", home.dir.display(), state.pid, state.server);
    announce(&home);
    Ok(())
}

/// Writes a file that only its owner can read, so that nobody sees half of it.
pub(crate) fn write_private(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    let next = path.with_extension("new");
    let _ = fs::remove_file(&next);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&next)?;
    // Under sudo the kubeconfig belongs to whoever called it.
    if let Some(uid) = std::env::var("SUDO_UID").ok().and_then(|u| u.parse::<u32>().ok())
        && file.metadata()?.uid() == 0
    {
        std::os::unix::fs::fchown(&file, Some(uid), None)?;
    }
    file.write_all(content)?;
    fs::rename(&next, path).with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_was_born_and_an_unused_number_was_not() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(born(own).is_some_and(|b| b > 0));
        assert_eq!(born(own), born(own));
        assert_eq!(born(i32::MAX), None);
    }

    #[test]
    fn a_state_of_another_process_is_no_running_playground() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::new(dir.path()).unwrap();
        assert_eq!(home.running(), None);
        let pid = i32::try_from(std::process::id()).unwrap();
        let mut state = Running { pid, born: born(pid).unwrap(), server: String::new() };
        write_private(&home.state(), &serde_json::to_vec(&state).unwrap()).unwrap();
        assert_eq!(home.running(), Some(state.clone()));
        state.born += 1;
        write_private(&home.state(), &serde_json::to_vec(&state).unwrap()).unwrap();
        assert_eq!(home.running(), None);
    }
}
