//! The launcher: a fresh process that turns itself into a container's (or an exec's) process.
//!
//! It is started by the node with a [`Spec`] in a file. It has a single thread, which namespaces and fork require. A new container
//! gets a mount, a host name and a process namespace of its own beside the pod's network; the launcher stays outside as the
//! parent and passes the exit status on. The root is a tmpfs with the machine's programs bound read-only, so that a container
//! writes nothing outside of its volumes. When anything fails before the program runs, the reason is written to
//! [`Spec::error`] and the exit status is 128, as container runtimes report it.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{Mode, umask};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Gid, Uid, chdir, execve, pivot_root, setgid, setgroups, sethostname, setsid, setuid};
use serde::{Deserialize, Serialize};

use crate::sys;

/// `PATH` of a container that sets none.
pub(crate) const PATH: &str = "/opt/weft/bin:/opt/weft/names:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What of the machine's `/etc` a container sees.
const ETC: [&str; 15] = [
    "alternatives",
    "ca-certificates",
    "ssl",
    "pki",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "protocols",
    "services",
    "ethertypes",
    "xtables",
    "iproute2",
    "localtime",
    "passwd",
    "group",
];

/// What to run, and in what.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Spec {
    /// Name of the network namespace.
    pub netns: String,
    /// A process whose namespaces to join; otherwise a root is built.
    pub join: Option<i32>,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    /// Working directory.
    pub dir: String,
    /// Host name.
    pub hostname: String,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Capabilities that may be held; bit n is capability n.
    pub capabilities: u64,
    /// `allowPrivilegeEscalation: false`.
    pub no_new_privileges: bool,
    /// `/proc/sys` is writable.
    pub privileged: bool,
    /// The root is read-only.
    pub read_only_root: bool,
    /// Standard input is a terminal, which becomes the controlling one.
    pub tty: bool,
    /// An empty folder to build the root on.
    pub root: PathBuf,
    /// Folder with the workspace's programs.
    pub programs: PathBuf,
    /// Files that go to `/etc`: name and text.
    pub etc: Vec<(String, String)>,
    /// Volumes.
    pub mounts: Vec<Mount>,
    /// Takes the reason when the program can't be run.
    pub error: PathBuf,
}

/// A bind mount.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Mount {
    /// On the machine.
    pub from: PathBuf,
    /// In the container.
    pub to: String,
    /// It can't be written.
    pub read_only: bool,
}

/// The hidden command: never returns but with the exit status of the program.
pub(crate) fn main(path: &Path) -> i32 {
    let spec: Spec = match fs::read(path).map_err(anyhow::Error::from).and_then(|b| Ok(serde_json::from_slice(&b)?)) {
        Ok(spec) => spec,
        Err(e) => {
            eprintln!("error: {}: {e:#}", path.display());
            return 128;
        }
    };
    let mut report = match File::create(&spec.error) {
        Ok(file) => file,
        Err(e) => {
            eprintln!("error: {}: {e}", spec.error.display());
            return 128;
        }
    };
    match launch(&spec, &mut report) {
        Ok(code) => code,
        Err(e) => {
            let _ = write!(report, "{e:#}");
            128
        }
    }
}

fn launch(spec: &Spec, report: &mut File) -> anyhow::Result<i32> {
    let alone = sys::Alone::check()?;
    umask(Mode::from_bits_truncate(0o022));
    if let Some(pid) = spec.join {
        let open = |name: &str| File::open(format!("/proc/{pid}/ns/{name}")).context("the container is not running");
        let (mnt, uts, net, processes) = (open("mnt")?, open("uts")?, open("net")?, open("pid")?);
        setns(processes, CloneFlags::CLONE_NEWPID).context("join the process namespace")?;
        setns(net, CloneFlags::CLONE_NEWNET).context("join the network namespace")?;
        setns(uts, CloneFlags::CLONE_NEWUTS).context("join the host name namespace")?;
        setns(mnt, CloneFlags::CLONE_NEWNS).context("join the mount namespace")?;
    } else {
        let net = File::open(Path::new("/run/netns").join(&spec.netns)).context("the pod's network namespace")?;
        setns(net, CloneFlags::CLONE_NEWNET).context("join the network namespace")?;
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWIPC)
            .context("make namespaces; the playground must run as root")?;
    }
    match sys::fork(alone)? {
        Some(child) => loop {
            match waitpid(child, None) {
                Ok(WaitStatus::Exited(_, code)) => return Ok(code),
                Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(128 + signal as i32),
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(e) => bail!("wait: {e}"),
            }
        },
        None => {
            let error = become_program(spec).err();
            if let Some(error) = error {
                let _ = write!(report, "{error:#}");
            }
            std::process::exit(128);
        }
    }
}

fn become_program(spec: &Spec) -> anyhow::Result<()> {
    if spec.join.is_none() {
        sethostname(&spec.hostname).context("set the host name")?;
        build_root(spec)?;
    }
    setsid().context("setsid")?;
    if spec.tty {
        sys::control_terminal(&std::io::stdin()).context("take the terminal")?;
    }
    let dir = if spec.dir.is_empty() { "/" } else { &spec.dir };
    if spec.join.is_none() {
        let _ = fs::create_dir_all(dir);
    }
    chdir(dir).with_context(|| format!("working directory {dir}"))?;
    sys::limit_capabilities(spec.capabilities).context("limit capabilities")?;
    let groups: Vec<Gid> = spec.groups.iter().map(|g| Gid::from_raw(*g)).collect();
    setgroups(&groups).context("setgroups")?;
    setgid(Gid::from_raw(spec.gid)).context("setgid")?;
    setuid(Uid::from_raw(spec.uid)).context("setuid")?;
    if spec.no_new_privileges {
        nix::sys::prctl::set_no_new_privs().context("no_new_privs")?;
    }
    let program = spec.argv.first().context("no command")?;
    let path = find(program, &spec.env).with_context(|| format!("exec: \"{program}\": executable file not found in $PATH"))?;
    let c = |text: &str| CString::new(text).with_context(|| format!("{text:?} has a NUL byte"));
    let args: Vec<CString> = spec.argv.iter().map(|a| c(a)).collect::<anyhow::Result<_>>()?;
    let env: Vec<CString> = spec.env.iter().map(|(k, v)| c(&format!("{k}={v}"))).collect::<anyhow::Result<_>>()?;
    execve(&c(&path)?, &args, &env).with_context(|| format!("exec: \"{path}\""))?;
    Ok(())
}

fn find(program: &str, env: &[(String, String)]) -> Option<String> {
    if program.contains('/') {
        return Some(program.to_owned());
    }
    let path = env.iter().rev().find(|(k, _)| k == "PATH").map_or(PATH, |(_, v)| v);
    path.split(':')
        .map(|dir| format!("{dir}/{program}"))
        .find(|candidate| fs::metadata(candidate).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0))
}

fn bind(from: &Path, to: &Path, read_only: bool) -> anyhow::Result<()> {
    let what = || format!("mount {} on {}", from.display(), to.display());
    let none: Option<&str> = None;
    mount(Some(from), to, none, MsFlags::MS_BIND | MsFlags::MS_REC, none).with_context(what)?;
    if read_only {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(none, to, none, flags, none).with_context(what)?;
    }
    Ok(())
}

/// Makes a folder or a file to mount on.
fn mount_point(target: &Path, folder: bool) -> anyhow::Result<()> {
    let result = if folder {
        fs::create_dir_all(target)
    } else {
        target
            .parent()
            .map_or(Ok(()), fs::create_dir_all)
            .and_then(|()| fs::OpenOptions::new().create(true).append(true).open(target).map(drop))
    };
    result.with_context(|| format!("mount point {}", target.display()))
}

fn build_root(spec: &Spec) -> anyhow::Result<()> {
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("make mounts private")?;
    let root = &spec.root;
    mount(Some("tmpfs"), root, Some("tmpfs"), MsFlags::empty(), Some("mode=755")).context("mount the root")?;
    for name in ["usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32"] {
        let (from, to) = (Path::new("/").join(name), root.join(name));
        let Ok(meta) = fs::symlink_metadata(&from) else { continue };
        if meta.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(&from)?, &to).context("link")?;
        } else {
            fs::create_dir(&to)?;
            bind(&from, &to, true)?;
        }
    }
    for (name, mode) in [
        ("etc", 0o755),
        ("tmp", 0o1777),
        ("run", 0o755),
        ("var/log", 0o755),
        ("var/run", 0o755),
        ("var/tmp", 0o1777),
        ("root", 0o700),
        ("home", 0o755),
        ("proc", 0o755),
        ("sys", 0o755),
        ("dev/pts", 0o755),
        ("dev/shm", 0o1777),
        ("opt/weft/bin", 0o755),
        ("opt/weft/names", 0o755),
    ] {
        let path = root.join(name);
        fs::create_dir_all(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
    }
    for name in ETC {
        let (from, to) = (Path::new("/etc").join(name), root.join("etc").join(name));
        if from.exists() {
            mount_point(&to, from.is_dir())?;
            bind(&from, &to, true)?;
        }
    }
    for (name, text) in &spec.etc {
        fs::write(root.join("etc").join(name), text)?;
    }
    fs::write(root.join("etc/nsswitch.conf"), "passwd: files\ngroup: files\nhosts: files dns\n")?;
    bind(&spec.programs, &root.join("opt/weft/bin"), true)?;
    // As in the image of the samples, where the client goes by its own name.
    std::os::unix::fs::symlink("../bin/weft-sample", root.join("opt/weft/names/client")).context("link")?;
    devices(root)?;
    mount(Some("proc"), &root.join("proc"), Some("proc"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC, none)
        .context("mount /proc")?;
    if !spec.privileged {
        bind(&root.join("proc/sys"), &root.join("proc/sys"), true)?;
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
    mount(Some("sysfs"), &root.join("sys"), Some("sysfs"), flags, none).context("mount /sys")?;
    for volume in &spec.mounts {
        let to = root.join(volume.to.trim_start_matches('/'));
        mount_point(&to, volume.from.is_dir()).with_context(|| format!("volume mount {}", volume.to))?;
        bind(&volume.from, &to, volume.read_only)?;
    }
    if spec.read_only_root {
        mount(none, root, none, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY, none)
            .context("make the root read-only")?;
    }
    chdir(root).context("enter the root")?;
    pivot_root(".", ".").context("pivot_root")?;
    umount2(".", MntFlags::MNT_DETACH).context("leave the old root")?;
    chdir("/").context("enter the root")?;
    Ok(())
}

fn devices(root: &Path) -> anyhow::Result<()> {
    let none: Option<&str> = None;
    for name in ["null", "zero", "full", "random", "urandom", "tty"] {
        let to = root.join("dev").join(name);
        mount_point(&to, false)?;
        bind(&Path::new("/dev").join(name), &to, false)?;
    }
    let options = Some("newinstance,ptmxmode=0666,mode=0620");
    if mount(Some("devpts"), &root.join("dev/pts"), Some("devpts"), MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, options).is_ok() {
        std::os::unix::fs::symlink("pts/ptmx", root.join("dev/ptmx"))?;
    }
    for (name, target) in
        [("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"), ("stderr", "/proc/self/fd/2")]
    {
        std::os::unix::fs::symlink(target, root.join("dev").join(name))?;
    }
    mount(Some("tmpfs"), &root.join("dev/shm"), Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, none)
        .context("mount /dev/shm")?;
    Ok(())
}
