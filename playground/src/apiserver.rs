//! The API server of the playground: real kubectl and kube-rs work against it, everything is in memory.
//!
//! It stores any resource, built-in or custom, as JSON; serves list, watch, the patches, status and the other subresources; calls
//! admission webhooks as Kubernetes does. It does not enforce RBAC, and checks fields only where a typo would otherwise
//! survive.

pub mod admission;
pub mod api;
pub mod auth;
pub mod backend;
pub mod client;
pub mod defaults;
mod discovery;
mod gc;
mod inflate;
pub mod patch;
mod protobuf;
pub mod resource;
mod rest;
pub mod selector;
mod spdy;
pub mod status;
pub mod store;
mod streams;
pub mod table;

pub use api::DeleteOptions;
pub use backend::NodeBackend;
pub use client::{Api, List};
pub use patch::PatchKind;
pub use status::Status;
pub use store::{Event, EventKind, Watch};

use anyhow::Context as _;
use api::{Core, Request};
use auth::User;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use serde_json::json;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::task::AbortHandle;
use tokio_rustls::TlsAcceptor;

/// How a server is started.
#[derive(Debug, Clone)]
pub struct Config {
    /// Addresses to listen on; port 0 takes a free one.
    pub listen: Vec<SocketAddr>,
    /// Names and addresses in the serving certificate, beside localhost and the names of the Service `kubernetes`.
    pub sans: Vec<String>,
    /// Range of cluster IPs: address and prefix length.
    pub service_cidr: (Ipv4Addr, u8),
    /// Changes that are kept for watches that resume.
    pub history: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { listen: Vec::new(), sans: Vec::new(), service_cidr: (Ipv4Addr::new(10, 96, 0, 0), 16), history: 20_000 }
    }
}

/// A running server.
pub struct Server {
    core: Arc<Core>,
    acceptor: TlsAcceptor,
    router: axum::Router,
    addresses: Mutex<Vec<SocketAddr>>,
    tasks: Mutex<Vec<AbortHandle>>,
}

impl Server {
    /// Starts it.
    pub async fn start(config: Config) -> anyhow::Result<Self> {
        let core = Arc::new(Core::new(config.history, config.service_cidr)?);
        let mut sans: Vec<String> = [
            "localhost",
            "127.0.0.1",
            "::1",
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
        ]
        .map(String::from)
        .into();
        let kubernetes = Ipv4Addr::from(u32::from(config.service_cidr.0) + 1).to_string();
        sans.push(kubernetes.clone());
        sans.extend(config.sans);
        let tls = core.authority.serving(sans)?;
        let router = axum::Router::new().fallback(rest::handle).with_state(Arc::clone(&core));
        let server = Self {
            acceptor: TlsAcceptor::from(Arc::new(tls)),
            router,
            addresses: Mutex::default(),
            tasks: Mutex::default(),
            core: Arc::clone(&core),
        };
        server.seed(&kubernetes).await?;
        for address in config.listen {
            server.add_listener(std::net::TcpListener::bind(address).with_context(|| format!("listening on {address}"))?)?;
        }
        server.keep(tokio::spawn(gc::run(core)).abort_handle());
        Ok(server)
    }

    /// What every cluster has.
    async fn seed(&self, kubernetes: &str) -> anyhow::Result<()> {
        let request = Request::new(User::system("system:apiserver"));
        let create = async |gvr: &resource::Gvr, ns: &str, object: serde_json::Value| {
            let info = self.core.info(gvr).map_err(|s| anyhow::anyhow!(s))?;
            self.core.create(&request, &info, "", ns, object).await.map_err(|s| anyhow::anyhow!(s))
        };
        for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
            create(&resource::NAMESPACES, "", json!({"metadata": {"name": name}})).await?;
        }
        let service = json!({"metadata": {"name": "kubernetes", "labels": {"component": "apiserver", "provider": "kubernetes"}},
            "spec": {"clusterIP": kubernetes, "ports": [{"name": "https", "port": 443, "targetPort": 6443, "protocol": "TCP"}]}});
        create(&resource::SERVICES, "default", service).await?;
        Ok(())
    }

    fn keep(&self, task: AbortHandle) {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).push(task);
    }

    /// One more socket to serve, for example one that was opened inside a network namespace.
    pub fn add_listener(&self, listener: std::net::TcpListener) -> anyhow::Result<()> {
        listener.set_nonblocking(true)?;
        self.addresses.lock().unwrap_or_else(PoisonError::into_inner).push(listener.local_addr()?);
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let (acceptor, router) = (self.acceptor.clone(), self.router.clone());
        let task = tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else {
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                    continue;
                };
                let (acceptor, router) = (acceptor.clone(), router.clone());
                tokio::spawn(async move {
                    let _ = stream.set_nodelay(true);
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                    let _ = builder.serve_connection_with_upgrades(TokioIo::new(stream), TowerToHyperService::new(router)).await;
                });
            }
        });
        self.keep(task.abort_handle());
        Ok(())
    }

    /// Who runs the pods; until it is set, logs, exec and the like answer 503.
    pub fn set_backend(&self, backend: Arc<dyn NodeBackend>) {
        self.core.set_backend(backend);
    }

    /// The cluster's CA, PEM.
    pub fn ca_pem(&self) -> &str {
        self.core.authority.ca_pem()
    }

    /// The administrator's kubeconfig for this server.
    pub fn kubeconfig(&self, server: &str) -> String {
        self.core.authority.kubeconfig(server)
    }

    /// Where it listens.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.addresses.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The API for this process, as this user.
    pub fn api(&self, user: &str) -> Api {
        Api::new(Arc::clone(&self.core), User::system(user))
    }

    /// Ends all watches and forgets their history, as a restart does.
    pub fn end_watches(&self, compact: bool) {
        if compact {
            self.core.store.compact();
        }
        self.core.store.end_watches();
    }

    /// Stops serving.
    pub fn shutdown(&self) {
        for task in self.tasks.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            task.abort();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shutdown();
    }
}
