//! The process: opens the sockets, starts the workers, and sees to its end.
//!
//! **The end.** On SIGTERM (or `POST /quitquitquit`) HTTP connections are told to end: HTTP/1 with `Connection: close`, HTTP/2 with
//! GOAWAY. In a pod new connections are still taken as long as the app listens, because until then somebody may still be sent to it; the process ends
//! when nobody is left, or when the grace period is over. The last log line and the exit code say which: 0 drained, 3 the
//! grace period was over with connections left, 4 a second signal.

use crate::admin::{self, Admin};
use crate::balance::Routes;
use crate::connection::Context;
use crate::directory::Directory;
use crate::drain::Drain;
use crate::inbound::Config;
use crate::report::Outbox;
use crate::settings::{Listener, Settings};
use crate::telemetry::{Metrics, Recorder};
use crate::tls::identity::Holder;
use crate::worker::Worker;
use crate::{discovery, http, listen, sys, tls};
use anyhow::Context as _;
use arc_swap::ArcSwap;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

/// Exit code: everything was drained.
pub const DRAINED: u8 = 0;
/// Exit code: connections were left when the grace period was over.
pub const GRACE_OVER: u8 = 3;
/// Exit code: a second signal came.
pub const INTERRUPTED: u8 = 4;

/// How often an ending process looks around.
const LOOK: Duration = Duration::from_millis(100);
/// How long nobody has to be there.
const QUIET: Duration = Duration::from_millis(500);

/// The process as the admin server sees it.
#[derive(Clone)]
pub struct Control {
    drain: Drain,
    quit: Rc<watch::Sender<bool>>,
    waiting: Arc<AtomicUsize>,
    filter: Rc<RefCell<String>>,
    identity: Option<Arc<Holder>>,
    config: Arc<ArcSwap<Config>>,
}

impl Control {
    /// Why the proxy is not ready, if it isn't.
    pub fn not_ready(&self) -> Option<&'static str> {
        if self.drain.watch().is_draining() {
            Some("it drains")
        } else if self.waiting.load(Ordering::Acquire) > 0 {
            Some("not all workers take connections yet")
        } else if self.identity.as_ref().is_some_and(|holder| holder.get().is_none()) {
            Some(
                "it has no certificate yet, so nobody could call it by mutual TLS; can it reach the control plane? (its log says)",
            )
        } else if self.config.load().policy.is_pending() {
            Some("the control plane has not said yet who may call, so nobody is let in")
        } else {
            None
        }
    }

    /// Starts the end.
    pub fn quit(&self) {
        self.quit.send_replace(true);
    }

    /// Tells connections to end, and nothing more.
    pub fn drain(&self) {
        self.drain.start();
    }

    /// The log filter in force.
    pub fn log_filter(&self) -> String {
        self.filter.borrow().clone()
    }

    /// Notes another one.
    pub fn set_log_filter(&self, filter: &str) {
        filter.clone_into(&mut self.filter.borrow_mut());
    }
}

/// Runs the proxy to its end. Returns the exit code.
///
/// # Errors
/// A socket can't be opened: the message says which, and why.
pub fn run(settings: Settings, relog: admin::Relog) -> anyhow::Result<u8> {
    let started = Instant::now();
    let settings = Arc::new(settings);
    match sys::raise_descriptor_limit() {
        Ok(limit) => tracing::debug!(limit, "descriptors"),
        Err(error) => tracing::warn!("the limit of descriptors stays as it is: {error}"),
    }
    let config = Arc::new(ArcSwap::from_pointee(Config::initial(&settings)));
    let metrics = Arc::new(Metrics::new(Arc::clone(&config)));
    let drain = Drain::new();
    let (stop, stopped) = watch::channel(false);
    let waiting = Arc::new(AtomicUsize::new(settings.workers));

    let (directory, wishes) = match &settings.control {
        Some(_) => {
            let (directory, wishes) = Directory::new();
            (Arc::new(directory), Some(wishes))
        }
        None => (Arc::new(Directory::closed()), None),
    };
    let identity = settings.control.as_ref().map(|_| Arc::new(Holder::default()));

    // Room for each worker's batch and one more.
    let (reports, reported) = mpsc::channel(settings.workers + 1);

    let mut workers = Vec::new();
    for id in 0..settings.workers {
        let sockets = open(&settings)?;
        let (settings, config, metrics) = (Arc::clone(&settings), Arc::clone(&config), Arc::clone(&metrics));
        let (directory, identity) = (Arc::clone(&directory), identity.clone());
        let reports = identity.is_some().then(|| reports.clone());
        let (watch, stopped, waiting) = (drain.watch(), stopped.clone(), Arc::clone(&waiting));
        let name = format!("worker-{id}");
        let work = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = match runtime {
                Ok(runtime) => runtime,
                Err(error) => return tracing::error!("a worker can't start: {error}"),
            };
            let identities = Rc::<tls::Identities>::default();
            let recorder = Recorder::new(metrics, Rc::clone(&identities));
            let recorder = if reports.is_some() { recorder.reporting() } else { recorder };
            let routes = Routes::new(directory, identities);
            let worker = Worker { settings, recorder, pool: http::Pool::new(), drain: watch, config, routes, identity };
            let context = Context { worker: Rc::new(worker), pipes: sys::Pipes::default(), clients: std::cell::Cell::new(0) };
            let context = Rc::new(context);
            let local = tokio::task::LocalSet::new();
            if let Some(reports) = reports {
                let worker = Rc::clone(&context.worker);
                local.spawn_local(async move { worker.recorder.report().run(reports).await });
            }
            local.block_on(&runtime, serve(sockets, context, stopped, waiting));
            // Whatever is left when the process ends is cut off here.
        };
        workers.push(std::thread::Builder::new().name(name).stack_size(1 << 20).spawn(work).context("starting a worker")?);
    }

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    if let Some(dns) = &settings.dns {
        crate::dns::start(dns, crate::dns::open(dns)?, Arc::clone(&metrics.dns))?;
    }
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async move {
        let (quit, quitting) = watch::channel(false);
        let filter = Rc::new(RefCell::new(settings.log.clone()));
        let control = Control {
            drain: drain.clone(),
            quit: Rc::new(quit),
            waiting,
            filter,
            identity: identity.clone(),
            config: Arc::clone(&config),
        };
        let admin = Rc::new(Admin {
            settings: Arc::clone(&settings),
            config: Arc::clone(&config),
            metrics: Arc::clone(&metrics),
            directory: Arc::clone(&directory),
            identity: identity.clone(),
            control: control.clone(),
            relog,
        });
        for address in &settings.admin {
            match sys::listen(*address, false).and_then(TcpListener::from_std) {
                Ok(socket) => {
                    tokio::task::spawn_local(admin::serve(socket, Rc::clone(&admin)));
                }
                Err(error) if address.is_ipv6() && address.ip().is_unspecified() => {
                    tracing::debug!("no admin port on {address}: {error}");
                }
                Err(error) => anyhow::bail!("the admin port {address} can't be opened: {error}"),
            }
        }
        if let (Some(control), Some(wishes), Some(holder)) = (settings.control.clone(), wishes, identity) {
            let (trust, pushed) = watch::channel(None);
            let outbox = Outbox::new(Some(Arc::clone(&holder)), metrics.reports_dropped.clone());
            let certificates = tls::identity::run(control.clone(), Arc::clone(&settings), holder, pushed, Arc::clone(&metrics));
            tokio::task::spawn_local(certificates);
            let client = discovery::Client {
                control,
                settings: Arc::clone(&settings),
                config: Arc::clone(&config),
                directory,
                wishes,
                trust,
                reported,
                outbox,
                drain: drain.clone(),
                metrics: Arc::clone(&metrics),
            };
            tokio::task::spawn_local(client.run());
        }
        tokio::task::spawn_local(async move {
            loop {
                tokio::time::sleep(Duration::from_secs(60)).await;
                metrics.sweep();
            }
        });
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            workers = settings.workers,
            listeners = settings.listeners.len(),
            milliseconds = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
            "weft-proxy has started"
        );
        end(&settings, &drain, &stop, quitting).await
    })
}

/// The listening sockets of one worker.
fn open(settings: &Settings) -> anyhow::Result<Vec<(std::net::TcpListener, Listener)>> {
    let mut sockets = Vec::new();
    for listener in &settings.listeners {
        let transparent = settings.mode == crate::settings::Mode::Tproxy && listener.direction == crate::conn::Direction::Inbound;
        match sys::listen(listener.address, transparent && listener.upstream.is_none()) {
            Ok(socket) => sockets.push((socket, listener.clone())),
            Err(error) if listener.optional => tracing::debug!("not listening on {}: {error}", listener.address),
            Err(error) => anyhow::bail!("listening on {} failed: {error}", listener.address),
        }
    }
    Ok(sockets)
}

async fn serve(
    sockets: Vec<(std::net::TcpListener, Listener)>,
    context: Rc<Context>,
    stopped: watch::Receiver<bool>,
    waiting: Arc<AtomicUsize>,
) {
    let mut loops = tokio::task::JoinSet::new();
    for (socket, listener) in sockets {
        match TcpListener::from_std(socket) {
            Ok(socket) => {
                loops.spawn_local(listen::accept(socket, Rc::new(listener), Rc::clone(&context), stopped.clone()));
            }
            Err(error) => return tracing::error!("listening on {} failed: {error}", listener.address),
        }
    }
    waiting.fetch_sub(1, Ordering::AcqRel);
    while loops.join_next().await.is_some() {}
    // Connections go on until the process ends.
    std::future::pending::<()>().await;
}

/// Waits for the signal and sees the connections off.
async fn end(
    settings: &Settings,
    drain: &Drain,
    stop: &watch::Sender<bool>,
    mut quitting: watch::Receiver<bool>,
) -> anyhow::Result<u8> {
    let mut term = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let why = tokio::select! {
        _ = term.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
        _ = quitting.wait_for(|quit| *quit) => "quitquitquit",
    };
    let began = Instant::now();
    tracing::info!(connections = drain.open(), "{why}: draining");
    drain.start();
    let mut quiet_since: Option<Instant> = None;
    let mut accepting = true;
    let code = loop {
        let app_listens = settings.in_pod && app_listens(settings);
        if accepting && !app_listens && !settings.in_pod {
            stop.send_replace(true);
            accepting = false;
        }
        let quiet = drain.open() == 0 && !app_listens;
        match (quiet, quiet_since) {
            (false, _) => quiet_since = None,
            (true, None) => quiet_since = Some(Instant::now()),
            (true, Some(since)) if since.elapsed() >= QUIET || !settings.in_pod => break DRAINED,
            (true, Some(_)) => {}
        }
        if began.elapsed() >= settings.timeouts.drain {
            break if drain.open() == 0 { DRAINED } else { GRACE_OVER };
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            _ = term.recv() => break INTERRUPTED,
            _ = interrupt.recv() => break INTERRUPTED,
        }
    };
    stop.send_replace(true);
    let seconds = began.elapsed().as_secs_f64();
    match code {
        DRAINED => tracing::info!("ended after {seconds:.1} s: drained"),
        GRACE_OVER => {
            tracing::warn!("ended after {seconds:.1} s: the grace period is over, {} connections are cut off", drain.open());
        }
        _ => tracing::warn!("ended after {seconds:.1} s: a second signal, {} connections are cut off", drain.open()),
    }
    Ok(code)
}

/// Whether anybody but the proxy itself listens in this pod.
fn app_listens(settings: &Settings) -> bool {
    let own: Vec<u16> = settings
        .listeners
        .iter()
        .map(|l| l.address.port())
        .chain(settings.admin.iter().map(std::net::SocketAddr::port))
        .chain(settings.dns.iter().flat_map(|dns| &dns.listen).map(std::net::SocketAddr::port))
        .collect();
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|path| std::fs::read_to_string(path).unwrap_or_default());
    tables.iter().flat_map(|table| sys::listening_ports(table)).any(|port| !own.contains(&port))
}
