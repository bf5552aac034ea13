//! The daemon: puts the parts together and runs them until it is told to end.

use std::io;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use crate::apiserver::{Api, Config, Server, resource};
use crate::command::{Home, Running, born, write_private};
use crate::node::Node;
use crate::{controllers, dns, netns, services};

/// Runs the daemon; returns after SIGTERM or SIGINT, when everything that it made is gone.
pub(crate) fn serve(home: &Home, images: &Path, port: u16) -> anyhow::Result<()> {
    // A session of its own: the terminal that `up` was called on may go.
    let _ = nix::unistd::setsid();
    let filter = tracing_subscriber::EnvFilter::try_from_env("WEFT_LOG").unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(false).init();
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let result = runtime.block_on(async {
        let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let server = start(home, images, port).await?;
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        server.shutdown();
        Ok(())
    });
    runtime.shutdown_background();
    home.clean();
    result
}

async fn start(home: &Home, images: &Path, port: u16) -> anyhow::Result<Server> {
    home.clean();
    let netns = home.node();
    netns::create_node(&netns)?;
    let address = netns::NODE.to_string();
    let config = Config { listen: vec![([127, 0, 0, 1], port).into()], sans: vec![address], ..Config::default() };
    let server = Server::start(config).await?;
    let inside = (netns::NODE, netns::API_PORT).into();
    server.add_listener(netns::listen(&netns, inside).context("listen on the node's address")?)?;
    let bound = server.addresses();
    let url = format!("https://{}", bound.first().context("the API server has no address")?);
    write_private(&home.kubeconfig(), server.kubeconfig(&url).as_bytes())?;
    let node = Node::start(server.api("system:node:playground"), &home.dir, &home.prefix, &netns, images).await?;
    server.set_backend(Arc::clone(&node) as Arc<_>);
    seed(&server.api("system:kube-controller-manager")).await?;
    dns::start(&node).context("the name server")?;
    let (loaded, first) = tokio::sync::oneshot::channel();
    tokio::spawn(services::run(node, loaded));
    controllers::start(|name| server.api(&format!("system:serviceaccount:kube-system:{name}")));
    first.await.context("the rules for Service addresses")?;
    let pid = i32::try_from(std::process::id())?;
    let state = Running { pid, born: born(pid).context("/proc is not mounted")?, server: url };
    write_private(&home.state(), &serde_json::to_vec(&state)?)?;
    tracing::info!("ready: {}", state.server);
    Ok(server)
}

/// The name server's Service, and the endpoints of it and of the API server, which have no pods.
async fn seed(api: &Api) -> anyhow::Result<()> {
    let service = json!({"metadata": {"name": "kube-dns", "labels": {"k8s-app": "kube-dns", "kubernetes.io/name": "CoreDNS"}},
        "spec": {"clusterIP": netns::DNS.to_string(), "ports": [
            {"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"}]}});
    api.create(&resource::SERVICES, Some("kube-system"), service).await?;
    let slice = |service: &str, ports: Value| {
        json!({"metadata": {"name": service, "labels": {"kubernetes.io/service-name": service}}, "addressType": "IPv4", "ports": ports,
            "endpoints": [{"addresses": [netns::NODE.to_string()], "conditions": {"ready": true, "serving": true, "terminating": false}}]})
    };
    let https = json!([{"name": "https", "port": netns::API_PORT, "protocol": "TCP"}]);
    let dns = json!([{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"}]);
    for (ns, name, ports) in [("default", "kubernetes", https), ("kube-system", "kube-dns", dns)] {
        let endpoints =
            json!({"metadata": {"name": name}, "subsets": [{"addresses": [{"ip": netns::NODE.to_string()}], "ports": ports}]});
        api.create(&resource::ENDPOINTS, Some(ns), endpoints).await?;
        api.create(&resource::ENDPOINTSLICES, Some(ns), slice(name, ports)).await?;
    }
    Ok(())
}
