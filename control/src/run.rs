//! Puts the parts together, and takes them apart again.
//!
//! Start: the ports are opened first (a port that is taken ends us at once, with a message); then the source begins to fill the
//! index, while the root and serving certificate are read or made. The TLS ports accept from the beginning and finish handshakes
//! once there is a certificate. Ready is who really serves; see [`health`].
//!
//! End, on SIGTERM or SIGINT: not ready at once, and the lease is given back; calls are still served for a moment, until load
//! balancers have noticed; then no connection is accepted any more, what is under way is finished, streams of proxies are
//! ended so that they go to another replica. A second signal ends at once.

use crate::admission::surroundings::{self, Known};
use crate::admission::{Lookup, Observer};
use crate::ask::Mind;
use crate::ca::authority::{Authority, InForce, system_clock};
use crate::ca::issue::SERVING_LIFE;
use crate::ca::keeper::{Keeper, Moved, Outside, Setup, Status};
use crate::ca::resolver::{Resolver, server_config};
use crate::ca::store::Store;
use crate::events::Events;
use crate::flags::Flags;
use crate::index::{Index, publisher};
use crate::lease::{Candidate, Timing};
use crate::metrics::Metrics;
use crate::model::{Key, Kind};
use crate::reports::{Numbers, Reports};
use crate::serve::auth::Authenticator;
use crate::serve::destinations::Destinations;
use crate::serve::health::{self, Health, Trust};
use crate::serve::limits::Limits;
use crate::serve::{self, console, discovery, identity, tls};
use crate::source::kube::{backoff, within};
use crate::{events, jwks, keep, settings, source};
use anyhow::Context as _;
use kube::Client;
use prometheus_client::registry::Registry;
use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use weft_api::names;
use weft_webhook::{ClusterFacts, Settings};

/// The whole life of the process.
pub fn main(flags: Flags) -> std::process::ExitCode {
    // Two threads are enough for thousands of reviews a second; more would only cost memory.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let result = runtime.context("cannot start the runtime").and_then(|runtime| {
        let result = runtime.block_on(async { Control::start(flags).await?.until_signal().await });
        // What is still under way (a write that nobody answers) must not hold up the end.
        runtime.shutdown_timeout(Duration::from_secs(1));
        result
    });
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            error!("{error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

/// Where the ports are.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    /// The webhook, HTTPS.
    pub webhook: SocketAddr,
    /// The proxies' API, gRPC over TLS.
    pub control: SocketAddr,
    /// Metrics and health, HTTP.
    pub metrics: SocketAddr,
    /// The console, HTTP on loopback; `None`: its port was taken.
    pub console: Option<SocketAddr>,
}

/// A control plane that runs.
pub struct Control {
    /// Where its ports are.
    pub addresses: Addresses,
    flags: Flags,
    ending: watch::Sender<bool>,
    stop_leading: CancellationToken,
    election: Option<tokio::task::JoinHandle<()>>,
    end: CancellationToken,
    servers: JoinSet<()>,
    health_end: CancellationToken,
    tasks: JoinSet<()>,
}

impl Control {
    /// Starts all parts.
    ///
    /// # Errors
    /// A port is taken, a folder does not exist, a kubeconfig can't be read: what time will not mend.
    pub async fn start(flags: Flags) -> anyhow::Result<Self> {
        info!(version = env!("CARGO_PKG_VERSION"), namespace = %flags.namespace(), "weft-control starts");
        let metrics = Arc::new(Metrics::default());
        let mut registry = Registry::default();
        metrics.register(&mut registry);
        let (webhook, webhook_at) = listen(&flags, flags.webhook_port, "--webhook-port").await?;
        let (control, control_at) = listen(&flags, flags.control_port, "--control-port").await?;
        let (monitor, metrics_at) = listen(&flags, flags.metrics_port, "--metrics-port").await?;
        let consoles = console::listen(flags.console_port).await;
        let console_at = consoles.first().and_then(|l| l.local_addr().ok());
        let addresses = Addresses { webhook: webhook_at, control: control_at, metrics: metrics_at, console: console_at };
        let reports = Arc::new(Reports::default());
        registry.register_collector(Box::new(Numbers(reports.clone())));

        let parts = Parts::new(&flags).await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(publisher(parts.index.clone()));

        // Settings, and what the compiler takes from them.
        let defaults = settings::Defaults {
            namespace: flags.namespace(),
            image: flags.image_proxy.clone(),
            cluster_domain: flags.cluster_domain.clone(),
        };
        let mut file = settings::File::new(flags.config.clone(), defaults.clone(), metrics.clone());
        let rules = watch::Sender::new(Arc::new(file.start()));
        let mesh = watch::Sender::new(Arc::new(settings::mesh(&rules.borrow(), &defaults)));
        let (settings, mesh_rules) = (rules.subscribe(), mesh.subscribe());
        tasks.spawn(file.follow(rules));
        tasks.spawn(follow_mesh(settings.clone(), defaults, mesh));

        // Who leads.
        let (stop_leading, leads) = (CancellationToken::new(), watch::Sender::new(parts.client.is_none()));
        let leader = leads.subscribe();
        let election = parts.client.clone().map(|client| {
            let candidate = Candidate {
                client,
                namespace: flags.namespace(),
                name: names::LEASE.into(),
                identity: flags.identity(),
                timing: Timing::default(),
            };
            tokio::spawn(candidate.run(leads.clone(), metrics.clone(), stop_leading.clone()))
        });
        tasks.spawn(async move {
            // Keeps the channel open where there is no election.
            let _leads = leads;
            std::future::pending::<()>().await;
        });

        // The source.
        let facts = watch::Sender::new(ClusterFacts { native_sidecars: true, ..ClusterFacts::default() });
        let cluster = facts.subscribe();
        match &flags.manifests {
            Some(folder) => {
                let watched = source::files::open(folder.clone(), parts.index.clone(), metrics.clone())?;
                tasks.spawn(watched.follow());
            }
            None => {
                if let Some(client) = parts.client.clone() {
                    tasks.spawn(follow_cluster(client, parts.index.clone(), metrics.clone(), facts));
                }
            }
        }

        // What is served.
        let (end, health_end) = (CancellationToken::new(), CancellationToken::new());
        let resolver = Arc::new(Resolver::default());
        let trust = watch::Sender::new(None);
        let ending = watch::Sender::new(false);
        let ports = vec![("webhook", addresses.webhook), ("control", addresses.control)];
        let health = Health::new(parts.index.clone(), metrics.clone(), ports, trust.subscribe(), ending.subscribe());
        let (news, inbox) = Events::new(metrics.clone());
        let lookup = Lookup::new(parts.index.clone(), parts.client.clone());
        let observer = Observer::new(news.clone());
        let destinations = Arc::new(Destinations::new(parts.index.clone(), mesh_rules.clone()));
        tasks.spawn(destinations.clone().run());
        let keys = watch::Sender::new(Arc::default());
        let issuers = jwks::Keeper {
            index: parts.index.clone(),
            mesh: mesh_rules.clone(),
            keys: keys.clone(),
            metrics: metrics.clone(),
            local: flags.manifests.is_some(),
            refresh: jwks::REFRESH,
        };
        tasks.spawn(issuers.run());
        let policies = keep::policies::Task {
            client: parts.client.clone(),
            index: parts.index.clone(),
            mesh: mesh_rules.clone(),
            keys: keys.subscribe(),
            leader: leader.clone(),
            metrics: metrics.clone(),
        };
        tasks.spawn(policies.run());
        let (authority, told) = (watch::Sender::new(None), watch::Sender::new(None));
        let limits = Arc::new(Limits::new(flags.bounds()));
        let doing = watch::Sender::new(Arc::default());
        let mind = Arc::new(Mind {
            index: parts.index.clone(),
            mesh: mesh_rules.clone(),
            keys: keys.subscribe(),
            reports: reports.clone(),
            authority: doing.subscribe(),
        });
        let known =
            Known::new(parts.index.clone(), mesh_rules.clone()).with_plaintext_callers(surroundings::reported(mind.clone()));
        let admission = crate::admission::router(lookup, observer, settings.clone(), cluster, known, &mut registry);
        let discovery = discovery::Service {
            index: parts.index.clone(),
            mesh: mesh_rules.clone(),
            keys: keys.subscribe(),
            destinations,
            auth: parts.auth.clone(),
            trust: told.subscribe(),
            limits: limits.clone(),
            metrics: metrics.clone(),
            reports: reports.clone(),
            end: end.clone(),
        };
        let identity = identity::Service {
            index: parts.index.clone(),
            auth: parts.auth.clone(),
            authority: authority.subscribe(),
            trust: told.subscribe(),
            limits,
            metrics: metrics.clone(),
            life: flags.leaf_life(),
            clock: system_clock(),
        };
        tasks.spawn(crate::ca::authority::follow(authority.subscribe(), mesh_rules, told));
        let grace = Duration::from_secs(flags.shutdown_grace);
        let mut servers = JoinSet::new();
        let https = Arc::new(server_config(resolver.clone(), &[b"h2", b"http/1.1"]));
        servers.spawn(tls::serve(webhook, https, admission, end.clone(), grace));
        let h2 = Arc::new(server_config(resolver.clone(), &[b"h2"]));
        servers.spawn(tls::serve(control, h2, serve::proxies(discovery, identity), end.clone(), grace));
        let router = health::router(Arc::new(health), Arc::new(registry));
        tasks.spawn(serve_plain("metrics and health", monitor, router, health_end.clone()));
        for listener in consoles {
            let router = console::router(mind.clone(), flags.replica());
            tasks.spawn(serve_plain("the console", listener, router, health_end.clone()));
        }

        // What is kept right.
        let keep =
            Keep { flags: flags.clone(), parts, settings, leader, news, metrics, resolver, trust, authority, doing, reports };
        tasks.spawn(keep.run(inbox));
        info!(webhook = %addresses.webhook, control = %addresses.control, metrics = %addresses.metrics, "listening");
        Ok(Self { addresses, flags, ending, stop_leading, election, end, servers, health_end, tasks })
    }

    /// Runs until SIGTERM or SIGINT, then ends in order.
    ///
    /// # Errors
    /// Signals can't be waited for, or a part failed in a way that only a restart mends.
    pub async fn until_signal(mut self) -> anyhow::Result<()> {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate()).context("cannot wait for signals")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for signals")?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            error = panicked(&mut self.tasks) => {
                // Half a control plane that looks whole is worse than a restart.
                return Err(anyhow::anyhow!("a part of the control plane failed ({error}); please report it with the lines above"));
            }
        }
        tokio::select! {
            () = self.shutdown() => info!("ended in order"),
            _ = terminate.recv() => warn!("second signal: ending at once"),
            _ = interrupt.recv() => warn!("second signal: ending at once"),
        }
        Ok(())
    }

    /// Ends in order.
    pub async fn shutdown(mut self) {
        info!(delay = self.flags.shutdown_delay, grace = self.flags.shutdown_grace, "ending: not ready any more, still serving");
        self.ending.send_replace(true);
        self.stop_leading.cancel();
        tokio::time::sleep(Duration::from_secs(self.flags.shutdown_delay)).await;
        self.end.cancel();
        while self.servers.join_next().await.is_some() {}
        if let Some(election) = self.election.take() {
            let _ = tokio::time::timeout(Duration::from_secs(3), election).await;
        }
        self.health_end.cancel();
        self.tasks.shutdown().await;
    }
}

/// What depends on whether there is a cluster.
#[derive(Clone)]
struct Parts {
    client: Option<Client>,
    index: Arc<Index>,
    auth: Authenticator,
    store: Store,
}

impl Parts {
    async fn new(flags: &Flags) -> anyhow::Result<Self> {
        if flags.manifests.is_some() {
            let auth = match &flags.tokens {
                Some(file) => Authenticator::tokens(file)?,
                None => Authenticator::Local,
            };
            let store = flags.state_dir.clone().map_or_else(Store::memory, Store::Folder);
            // The manifests count as listed once the folder was read.
            return Ok(Self { client: None, index: Arc::new(Index::new([Kind::Namespace])), auth, store });
        }
        let client = client(flags.kubeconfig.clone()).await?;
        Ok(Self {
            index: Arc::new(Index::new(source::kube::KINDS)),
            auth: Authenticator::reviews(client.clone()),
            store: Store::Secrets { client: client.clone(), namespace: flags.namespace() },
            client: Some(client),
        })
    }
}

async fn client(kubeconfig: Option<PathBuf>) -> anyhow::Result<Client> {
    let mut config = match kubeconfig {
        Some(path) => {
            let file = kube::config::Kubeconfig::read_from(&path)
                .with_context(|| format!("cannot read the kubeconfig {}", path.display()))?;
            kube::Config::from_custom_kubeconfig(file, &kube::config::KubeConfigOptions::default())
                .await
                .with_context(|| format!("cannot use the kubeconfig {}", path.display()))?
        }
        None => kube::Config::infer().await.context(
            "found no cluster: neither the service account of a pod nor a kubeconfig; use --manifests DIR to run without one",
        )?,
    };
    config.connect_timeout = Some(Duration::from_secs(5));
    Client::try_from(config).context("cannot make a client of the API server")
}

async fn listen(flags: &Flags, port: u16, flag: &str) -> anyhow::Result<(TcpListener, SocketAddr)> {
    let address = SocketAddr::new(flags.bind(), port);
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}: is the port taken? See {flag} and --bind"))?;
    let address = listener.local_addr().context("cannot read the address of a listener")?;
    Ok((listener, address))
}

async fn serve_plain(what: &'static str, listener: TcpListener, router: axum::Router, end: CancellationToken) {
    let served = axum::serve(listener, router).with_graceful_shutdown(async move { end.cancelled().await }).await;
    if let Err(error) = served {
        error!(%error, "{what}: not served any more");
    }
}

async fn follow_mesh(
    mut settings: watch::Receiver<Arc<Settings>>,
    defaults: settings::Defaults,
    mesh: watch::Sender<Arc<crate::compile::Mesh>>,
) {
    while settings.changed().await.is_ok() {
        let now = settings::mesh(&settings.borrow_and_update(), &defaults);
        mesh.send_if_modified(|before| {
            let differs = **before != now;
            if differs {
                *before = Arc::new(now);
            }
            differs
        });
    }
}

/// Asks the cluster what it is, then watches it for ever.
async fn follow_cluster(client: Client, index: Arc<Index>, metrics: Arc<Metrics>, facts: watch::Sender<ClusterFacts>) {
    let mut failures = 0;
    let version = loop {
        match within(client.apiserver_version()).await {
            Ok(version) => break version,
            Err(error) => {
                failures += 1;
                if failures == 1 || failures % 10 == 0 {
                    warn!(%error, failures, "the API server does not answer; trying again (is it up and reachable from this pod?)");
                }
                tokio::time::sleep(backoff(failures)).await;
            }
        }
    };
    let found = ClusterFacts::of_version(&version.major, &version.minor);
    info!(version = %version.git_version, native_sidecars = found.native_sidecars, "the API server answers");
    facts.send_replace(found);
    let mut tasks = JoinSet::new();
    source::kube::watch_all(&client, &index, &metrics, streams_lists(&version.minor), &mut tasks);
    // Other meshes' injectors come and go.
    let injectors = follow_injectors(&index, found, facts);
    tokio::select! {
        () = injectors => {}
        error = panicked(&mut tasks) => std::panic::resume_unwind(error.into_panic()),
    }
}

async fn follow_injectors(index: &Index, found: ClusterFacts, facts: watch::Sender<ClusterFacts>) {
    let mut webhooks = index.webhooks();
    loop {
        let mut now = ClusterFacts { injectors: weft_webhook::OtherInjectors::default(), ..found };
        for (_, name) in webhooks.borrow_and_update().keys().filter(|(kind, _)| *kind == Kind::Webhook) {
            now.injectors.note(name);
        }
        facts.send_if_modified(|before| std::mem::replace(before, now) != now);
        if webhooks.changed().await.is_err() {
            return;
        }
    }
}

/// Waits until one of the tasks has panicked.
async fn panicked(tasks: &mut JoinSet<()>) -> tokio::task::JoinError {
    loop {
        match tasks.join_next().await {
            Some(Err(error)) if error.is_panic() => return error,
            Some(_) => {}
            None => std::future::pending().await,
        }
    }
}

/// Whether to ask for streamed lists: they are on by default in Kubernetes 1.34 and newer.
fn streams_lists(minor: &str) -> bool {
    let digits: String = minor.chars().take_while(char::is_ascii_digit).collect();
    digits.parse::<u32>().is_ok_and(|minor| minor >= 34)
}

/// What needs the certificate, and what writes to the cluster.
struct Keep {
    flags: Flags,
    parts: Parts,
    settings: watch::Receiver<Arc<Settings>>,
    leader: watch::Receiver<bool>,
    news: Events,
    metrics: Arc<Metrics>,
    resolver: Arc<Resolver>,
    trust: watch::Sender<Option<Arc<Trust>>>,
    authority: watch::Sender<Option<Arc<Authority>>>,
    doing: watch::Sender<Arc<Status>>,
    reports: Arc<Reports>,
}

impl Keep {
    async fn run(self, inbox: events::Inbox) {
        let Self { flags, parts, settings, leader, news, metrics, resolver, trust, authority, doing, reports } = self;
        let mut tasks = JoinSet::new();
        if let Some(client) = parts.client.clone() {
            let reporter = flags.identity();
            tasks.spawn(events::run(inbox, client, reporter, parts.index.clone(), metrics.clone()));
            tasks.spawn(keep::missed::run(parts.index.clone(), settings.clone(), leader.clone(), news.clone(), metrics.clone()));
        }
        let plan = flags.plan();
        if plan.life != SERVING_LIFE {
            info!(seconds = plan.life.as_secs(), "serving certificates live for a time that was chosen by flag");
        }
        let in_force = authority.subscribe();
        let setup = Setup {
            store: parts.store,
            plan,
            resolver,
            metrics: metrics.clone(),
            clock: system_clock(),
            news: parts.client.is_some().then_some(news),
            authority,
            status: doing,
        };
        let keeper = Keeper::open(setup).await;
        let name = format!("{}.{}.svc", flags.service, flags.namespace());
        // The authority is open, so that there are roots: nobody is ever told of an empty bundle.
        let present = in_force.borrow().as_ref().map(|authority| authority.bundle.clone());
        let roots = watch::Sender::new(present.unwrap_or_else(|| Arc::from("")));
        let bundle = roots.subscribe();
        let mut outside = Outside::default();
        tasks.spawn(follow_roots(in_force, roots, trust, name, flags.trust_bundle_out.clone()));
        if let Some(client) = parts.client {
            let service = Key::new(flags.namespace(), flags.service.clone());
            let (in_webhooks, in_namespaces) = (watch::Sender::new(Arc::from("")), watch::Sender::new(Arc::from("")));
            outside
                .spread
                .push(("caBundle of our webhook configurations can't be written (see the log)", in_webhooks.subscribe()));
            outside.spread.push((
                "configmap weft-trust-bundle of some namespace can't be written (see the log)",
                in_namespaces.subscribe(),
            ));
            let index = parts.index.clone();
            outside.moved = Some(moved(index.clone(), reports));
            tasks.spawn(keep::ca_bundle::run(
                client.clone(),
                service,
                bundle.clone(),
                in_webhooks,
                index.clone(),
                leader.clone(),
                metrics.clone(),
            ));
            tasks.spawn(keep::trust_bundle::run(client, bundle, in_namespaces, index, settings, leader.clone(), metrics));
        }
        tasks.spawn(async move { Box::pin(keeper.run(leader, outside)).await });
        let error = panicked(&mut tasks).await;
        std::panic::resume_unwind(error.into_panic());
    }
}

/// Whether every meshed pod is known to have a leaf of a signer: each must be attached to this very replica and have said so.
fn moved(index: Arc<Index>, reports: Arc<Reports>) -> Moved {
    Box::new(move |signer| {
        let Some(key) = signer.key_id() else { return false };
        let proxies = reports.proxies();
        let has: HashSet<(&str, &str)> = proxies
            .iter()
            .filter(|proxy| proxy.connected && proxy.certificate.as_ref().is_some_and(|c| c.issuer.contains(&key)))
            .map(|proxy| (proxy.namespace.as_str(), proxy.pod.as_str()))
            .collect();
        // One that is attached and unknown to the index counts too: it has a certificate, whatever it is.
        let attached = proxies.iter().filter(|proxy| proxy.connected).all(|p| has.contains(&(&*p.namespace, &*p.pod)));
        attached
            && *index.synced().borrow()
            && index.views().iter().all(|(namespace, view)| {
                let mut meshed = view.pods.values().filter(|pod| pod.meshed() && !pod.finished);
                meshed.all(|pod| has.contains(&(namespace.as_str(), pod.name.as_str())))
            })
    })
}

/// Tells everybody of the roots that are in force.
async fn follow_roots(
    mut authority: InForce,
    roots: watch::Sender<Arc<str>>,
    trust: watch::Sender<Option<Arc<Trust>>>,
    name: String,
    file: Option<PathBuf>,
) {
    let mut told = None;
    loop {
        let now = authority.borrow_and_update().as_ref().map(|authority| authority.bundle.clone());
        if let Some(bundle) = now.filter(|bundle| told.as_ref() != Some(bundle)) {
            told = Some(bundle.clone());
            trust.send_replace(Some(Arc::new(Trust { bundle: bundle.to_string(), name: name.clone() })));
            if let Some(file) = &file {
                match std::fs::write(file, bundle.as_bytes()) {
                    Ok(()) => info!(file = %file.display(), "wrote the trust bundle"),
                    Err(error) => error!(file = %file.display(), %error, "cannot write the trust bundle"),
                }
            }
            roots.send_replace(bundle);
        }
        if authority.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_offers_streamed_lists() {
        for (minor, streams) in [("28", false), ("33+", false), ("34", true), ("35+", true), ("", false)] {
            assert_eq!(streams_lists(minor), streams, "{minor}");
        }
    }
}
