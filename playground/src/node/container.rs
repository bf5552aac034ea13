//! The life of one container: started, probed, stopped, started again.
//!
//! [`run`] owns the process and is the only one that starts it; [`stop`] only sends signals and waits until `run` has seen the
//! end. So there is never a moment in which nobody waits for a process, and a container that is being stopped isn't restarted.

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader};
use tokio::process::Child;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::launch::Spec;
use super::pod::Pod;
use super::{fields, image, probes, volumes};
use crate::json::{number, text};

/// What a container is in its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Has to end before the next one starts.
    Init,
    /// An init container with `restartPolicy: Always`.
    Sidecar,
    /// One of `spec.containers`.
    Main,
}

/// How a run ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Ended {
    /// Exit status, 128 + the signal's number after a signal.
    pub code: i32,
    /// `Completed`, `Error` or `StartError`.
    pub reason: String,
    /// The termination message.
    pub message: String,
    /// RFC 3339.
    pub started: String,
    /// RFC 3339.
    pub finished: String,
}

/// What a container does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Phase {
    /// It has not started, or will be started again.
    Waiting {
        /// CamelCase.
        reason: String,
        /// For people.
        message: String,
    },
    /// Its process runs.
    Running {
        /// RFC 3339.
        since: String,
    },
    /// Its process has ended.
    Ended(Ended),
}

/// Everything that changes about a container.
#[derive(Debug, Clone)]
pub(crate) struct State {
    /// What it does.
    pub phase: Phase,
    /// How the run before ended.
    pub last: Option<Ended>,
    /// How often it was started.
    pub runs: u32,
    /// The startup probe has succeeded, or there is none.
    pub started: bool,
    /// The readiness probe succeeds, or there is none.
    pub ready: bool,
    /// The process, as long as it runs.
    pub pid: Option<i32>,
    /// The first start has been tried, with its `postStart`.
    pub attempted: bool,
    /// Somebody runs it.
    pub entered: bool,
    /// It won't be started again.
    pub finished: bool,
}

impl Default for State {
    fn default() -> Self {
        Self {
            phase: Phase::Waiting { reason: "PodInitializing".into(), message: String::new() },
            last: None,
            runs: 0,
            started: false,
            ready: false,
            pid: None,
            attempted: false,
            entered: false,
            finished: false,
        }
    }
}

/// A container of a pod.
#[derive(Debug)]
pub(crate) struct Container {
    /// Its name.
    pub name: String,
    /// Its part of the pod's spec.
    pub spec: Value,
    /// What it is.
    pub kind: Kind,
    /// What it does.
    pub state: watch::Sender<State>,
    /// Set when it must not start again.
    pub stopping: CancellationToken,
}

/// Why a container couldn't be started.
struct Refused {
    reason: &'static str,
    message: String,
    retry: Duration,
}

impl Container {
    /// A container that hasn't started.
    pub(crate) fn new(spec: &Value, kind: Kind) -> Self {
        let name = text(spec, "/name").to_owned();
        Self { name, spec: spec.clone(), kind, state: watch::Sender::new(State::default()), stopping: CancellationToken::new() }
    }

    /// A copy of its state.
    pub(crate) fn now(&self) -> State {
        self.state.borrow().clone()
    }

    /// Changes its state and has the pod's status written.
    pub(crate) fn set(&self, pod: &Pod, change: impl FnOnce(&mut State)) {
        self.state.send_modify(change);
        pod.dirty.notify_one();
    }

    async fn wait(&self, until: impl FnMut(&State) -> bool) {
        let _ = self.state.subscribe().wait_for(until).await;
    }

    /// Waits until the first start has been tried, or there will be none.
    pub(crate) async fn attempted(&self) {
        self.wait(|s| s.attempted || s.finished).await;
    }

    /// Waits until the startup probe has succeeded, or there is nothing to wait for.
    pub(crate) async fn started(&self) {
        self.wait(|s| s.started || s.finished).await;
    }
}

/// The log file of a run.
pub(crate) fn log_path(pod: &Pod, container: &str, run: u32) -> PathBuf {
    pod.dir.join("logs").join(container).join(format!("{run}.log"))
}

/// Runs a container until it won't be started again. Answers whether it ended with 0.
pub(crate) async fn run(pod: Arc<Pod>, c: Arc<Container>) -> bool {
    c.set(&pod, |s| {
        s.entered = true;
        if let Phase::Waiting { reason, .. } = &mut s.phase {
            "ContainerCreating".clone_into(reason);
        }
    });
    let policy = text(&pod.object.borrow(), "/spec/restartPolicy").to_owned();
    let (mut failures, mut refusals, mut success) = (0_u32, 0_u32, false);
    while !c.stopping.is_cancelled() {
        let begin = Instant::now();
        let delay = match once(&pod, &c).await {
            Err(refused) => {
                // A pull alternates between its failure and the back-off, as `kubectl get pods` shows it.
                let (mut reason, mut message) = (refused.reason, refused.message);
                if reason == "ErrImagePull" && refusals % 2 == 1 {
                    (reason, message) = ("ImagePullBackOff", format!("Back-off pulling image \"{}\"", text(&c.spec, "/image")));
                }
                refusals += 1;
                if refusals == 1 {
                    pod.event("Warning", "Failed", &format!("Error: {reason}: {message}")).await;
                }
                c.set(&pod, |s| {
                    s.attempted = true;
                    s.phase = Phase::Waiting { reason: reason.into(), message };
                });
                refused.retry
            }
            Ok(ended) => {
                success = ended.code == 0;
                let again = match c.kind {
                    Kind::Sidecar => true,
                    Kind::Init => !success && policy != "Never",
                    Kind::Main => policy == "Always" || policy == "OnFailure" && !success,
                };
                if !again || c.stopping.is_cancelled() {
                    c.set(&pod, |s| s.phase = Phase::Ended(ended));
                    break;
                }
                if begin.elapsed() > Duration::from_mins(10) {
                    failures = 0;
                }
                let seconds = if failures == 0 { 0 } else { (10_u64 << (failures - 1).min(5)).min(300) };
                failures += 1;
                c.set(&pod, |s| {
                    s.attempted = true;
                    s.last = Some(ended.clone());
                    s.phase = if seconds == 0 {
                        Phase::Ended(ended)
                    } else {
                        let message = format!(
                            "back-off {seconds}s restarting failed container={} pod={}_{}({})",
                            c.name, pod.name, pod.ns, pod.uid
                        );
                        Phase::Waiting { reason: "CrashLoopBackOff".into(), message }
                    };
                });
                if seconds > 0 {
                    let message = format!("Back-off restarting failed container {} in pod {}", c.name, pod.name);
                    pod.event("Warning", "BackOff", &message).await;
                }
                Duration::from_secs(seconds).max(Duration::from_millis(200))
            }
        };
        tokio::select! {
            () = sleep(delay) => {}
            () = c.stopping.cancelled() => {}
        }
    }
    c.set(&pod, |s| {
        (s.finished, s.ready, s.pid) = (true, false, None);
    });
    success
}

/// One run from start to end.
async fn once(pod: &Arc<Pod>, c: &Arc<Container>) -> Result<Ended, Refused> {
    let run = c.now().runs + 1;
    let spec = prepare(pod, c, run)?;
    let broken =
        |e: std::io::Error| Refused { reason: "RunContainerError", message: e.to_string(), retry: Duration::from_secs(5) };
    let log = log_path(pod, &c.name, run);
    if let Some(dir) = log.parent() {
        fs::create_dir_all(dir).map_err(broken)?;
    }
    let log = Arc::new(Mutex::new(fs::File::create(&log).map_err(broken)?));
    let path = pod.dir.join(format!("{}.json", c.name));
    let mut child = pod.node.launch(&spec, &path, [Stdio::null(), Stdio::piped(), Stdio::piped()]).map_err(broken)?;
    let pumps = [
        child.stdout.take().map(|s| tokio::spawn(pump(s, "stdout", log.clone()))),
        child.stderr.take().map(|s| tokio::spawn(pump(s, "stderr", log))),
    ];
    let began = crate::now();
    let old = log_path(pod, &c.name, run.saturating_sub(2));
    let _ = fs::remove_file(old);
    let pid = inner(&mut child, &path).await;
    let since = began.clone();
    c.set(pod, |s| {
        (s.runs, s.pid, s.started, s.ready) = (run, pid, false, false);
        s.phase = Phase::Running { since };
    });
    if pid.is_some() {
        pod.event("Normal", "Started", &format!("Started container {}", c.name)).await;
    }
    let status = {
        let life = async {
            if let Some(handler) = c.spec.pointer("/lifecycle/postStart")
                && let Err(why) = probes::handler(pod, c, handler).await
            {
                pod.event("Warning", "FailedPostStartHook", &format!("PostStartHook failed: {why}")).await;
                signal(c, Signal::SIGKILL);
            }
            c.set(pod, |s| s.attempted = true);
            probes::supervise(pod, c).await;
        };
        tokio::select! {
            status = child.wait() => status,
            () = life => child.wait().await,
        }
    };
    for pump in pumps.into_iter().flatten() {
        let _ = timeout(Duration::from_secs(1), pump).await;
    }
    let code = status.ok().and_then(|s| s.code()).unwrap_or(137);
    let report = fs::read_to_string(&spec.error).unwrap_or_default();
    let (reason, message) = match code {
        _ if !report.is_empty() => ("StartError", format!("failed to start container: {report}")),
        0 => ("Completed", termination_message(pod, c, code, run)),
        _ => ("Error", termination_message(pod, c, code, run)),
    };
    if !report.is_empty() {
        pod.event("Warning", "Failed", &format!("Error: {message}")).await;
    }
    let ended = Ended { code, reason: reason.into(), message, started: began, finished: crate::now() };
    c.set(pod, |s| {
        (s.pid, s.started, s.ready) = (None, false, false);
        s.phase = Phase::Ended(ended.clone());
    });
    Ok(ended)
}

fn termination_message(pod: &Pod, c: &Container, code: i32, run: u32) -> String {
    let own = fs::read_to_string(message_path(pod, c)).unwrap_or_default();
    if own.is_empty() && code != 0 && text(&c.spec, "/terminationMessagePolicy") == "FallbackToLogsOnError" {
        let log = fs::read_to_string(log_path(pod, &c.name, run)).unwrap_or_default();
        let lines: Vec<&str> = log.lines().rev().take(80).filter_map(|l| l.splitn(4, ' ').nth(3)).collect();
        return lines.into_iter().rev().collect::<Vec<_>>().join("\n").chars().take(2048).collect();
    }
    own.chars().take(4096).collect()
}

fn message_path(pod: &Pod, c: &Container) -> PathBuf {
    pod.dir.join(format!("{}.message", c.name))
}

/// What the launcher has to do for this container.
fn prepare(pod: &Arc<Pod>, c: &Container, run: u32) -> Result<Spec, Refused> {
    let reference = text(&c.spec, "/image");
    let image = image::known(reference).ok_or_else(|| Refused {
        reason: "ErrImagePull",
        message: format!(
            "image \"{reference}\" is not known to the playground; it runs weft-proxy, weft-control, weft-sample, go-app, frontend, echo and client only"
        ),
        retry: Duration::from_secs(10),
    })?;
    let object = pod.described();
    let config = |message: String| Refused { reason: "CreateContainerConfigError", message, retry: Duration::from_secs(1) };
    let identity = image::identity(&object, &c.spec, &image).map_err(config)?;
    let links = object.pointer("/spec/enableServiceLinks").and_then(Value::as_bool).unwrap_or(true);
    let services = fields::services(&pod.node.services.all(), &pod.ns, links);
    let env = fields::environment(&object, &c.spec, services, &*pod.node).map_err(config)?;
    let argv: Vec<String> = image::argv(&c.spec, &image).iter().map(|a| fields::expand(a, &env)).collect();
    let places = pod.places.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let mut mounts = volumes::mounts(&object, &c.spec, &places, &env).map_err(config)?;
    let root = pod.dir.join("root").join(&c.name);
    let message = message_path(pod, c);
    let io = |e: std::io::Error| config(format!("{}: {e}", pod.dir.display()));
    fs::create_dir_all(&root).map_err(io)?;
    fs::write(&message, "").map_err(io)?;
    let _ = fs::set_permissions(&message, std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let to = text(&c.spec, "/terminationMessagePath");
    let to = if to.is_empty() { "/dev/termination-log" } else { to }.to_owned();
    mounts.push(super::launch::Mount { from: message, to, read_only: false });
    Ok(Spec {
        netns: pod.netns.clone(),
        join: None,
        argv,
        env,
        dir: image::working_dir(&c.spec),
        hostname: fields::hostname(&object),
        uid: identity.uid,
        gid: identity.gid,
        groups: identity.groups,
        capabilities: identity.capabilities,
        no_new_privileges: identity.no_new_privileges,
        privileged: identity.privileged,
        read_only_root: identity.read_only_root,
        tty: false,
        root,
        programs: pod.node.programs.clone(),
        etc: pod.etc(),
        mounts,
        error: pod.dir.join(format!("{}.{run}.error", c.name)),
    })
}

/// The process inside, once the program has taken the launcher's place. `None`: it has ended already.
pub(crate) async fn inner(child: &mut Child, spec: &std::path::Path) -> Option<i32> {
    let outer = child.id()?;
    let spec = spec.to_string_lossy().into_owned();
    loop {
        if !matches!(child.try_wait(), Ok(None)) {
            return None;
        }
        let children = fs::read_to_string(format!("/proc/{outer}/task/{outer}/children")).unwrap_or_default();
        if let Some(pid) = children.split_whitespace().next().and_then(|p| p.parse::<i32>().ok()) {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            if !line.is_empty() && !line.trim_end_matches('\0').ends_with(&spec) {
                return Some(pid);
            }
        }
        sleep(Duration::from_millis(4)).await;
    }
}

async fn pump(source: impl AsyncRead + Unpin, stream: &'static str, log: Arc<Mutex<fs::File>>) {
    let mut reader = BufReader::new(source);
    let mut line = Vec::new();
    loop {
        line.clear();
        match reader.read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {
                let whole = line.last() == Some(&b'\n');
                let mut out = format!("{:.9} {stream} {} ", crate::instant(), if whole { 'F' } else { 'P' }).into_bytes();
                out.extend_from_slice(&line);
                if !whole {
                    out.push(b'\n');
                }
                let _ = log.lock().unwrap_or_else(PoisonError::into_inner).write_all(&out);
            }
        }
    }
}

/// Sends a signal to the container's first process. SIGKILL ends all the others in it as well.
pub(crate) fn signal(c: &Container, signal: Signal) {
    if let Some(pid) = c.state.borrow().pid {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

/// Ends the present run: `preStop`, this container's turn, SIGTERM, and SIGKILL when the time is over.
pub(crate) async fn end_run(pod: &Arc<Pod>, c: &Arc<Container>, deadline: Instant, turn: impl Future<Output = ()>) {
    if let Some(handler) = c.spec.pointer("/lifecycle/preStop")
        && c.state.borrow().pid.is_some()
    {
        match timeout_at(deadline, probes::handler(pod, c, handler)).await {
            Ok(Ok(())) | Err(_) => {}
            Ok(Err(why)) => pod.event("Warning", "FailedPreStopHook", &format!("PreStopHook failed: {why}")).await,
        }
    }
    let _ = timeout_at(deadline, turn).await;
    let run = c.now().runs;
    let gone = || c.wait(move |s| s.finished || s.pid.is_none() || s.runs != run);
    signal(c, Signal::SIGTERM);
    // Even late ones get two seconds, as from a kubelet.
    let deadline = deadline.max(Instant::now() + Duration::from_secs(2));
    if timeout_at(deadline, gone()).await.is_err() {
        signal(c, Signal::SIGKILL);
        let _ = timeout(Duration::from_secs(10), gone()).await;
    }
}

/// Stops a container for good.
pub(crate) async fn stop(pod: &Arc<Pod>, c: &Arc<Container>, deadline: Instant, turn: impl Future<Output = ()>) {
    if !c.now().entered {
        c.stopping.cancel();
        return;
    }
    let _ = timeout(
        Duration::from_secs(2),
        c.wait(|s| s.pid.is_some() || s.finished || matches!(s.phase, Phase::Waiting { .. }) && s.attempted),
    )
    .await;
    c.stopping.cancel();
    if c.now().pid.is_some() {
        pod.event("Normal", "Killing", &format!("Stopping container {}", c.name)).await;
    }
    end_run(pod, c, deadline, turn).await;
    if timeout(Duration::from_secs(2), c.wait(|s| s.finished)).await.is_err() {
        // It was just being started when it was told to stop.
        signal(c, Signal::SIGKILL);
        let _ = timeout(Duration::from_secs(10), c.wait(|s| s.finished)).await;
    }
}

/// Restarts a container whose liveness or startup probe has failed.
pub(crate) async fn restart(pod: &Arc<Pod>, c: &Arc<Container>, probe: &Value) {
    let default = number(&pod.object.borrow(), "/spec/terminationGracePeriodSeconds", 30);
    let grace = number(probe, "/terminationGracePeriodSeconds", default).max(0) as u64;
    end_run(pod, c, Instant::now() + Duration::from_secs(grace), async {}).await;
}
