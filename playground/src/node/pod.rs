//! The life of one pod on the node: network, volumes, init containers and sidecars in order, containers, end.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::container::{self, Container, Kind};
use super::volumes::{self, TokenCache, Tokens};
use super::{Node, fields, status};
use crate::apiserver::{DeleteOptions, PatchKind, resource};
use crate::json::{list, number, text};
use crate::netns;

/// A pod that the node has.
pub(crate) struct Pod {
    /// The node.
    pub node: Arc<Node>,
    /// Namespace.
    pub ns: String,
    /// Name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// The newest object; `None`-like `Null` once it is gone.
    pub object: watch::Receiver<Arc<Value>>,
    /// Name of its network namespace.
    pub netns: String,
    /// Its addresses.
    pub addresses: OnceLock<Vec<IpAddr>>,
    /// Its folder.
    pub dir: PathBuf,
    /// All containers, init containers first.
    pub containers: Vec<Arc<Container>>,
    /// Where each volume is.
    pub places: Mutex<BTreeMap<String, PathBuf>>,
    /// The status has to be written.
    pub dirty: Notify,
    tokens: Mutex<TokenCache>,
    end: OnceLock<&'static str>,
    started: String,
    closed: CancellationToken,
    number: u16,
    host_network: bool,
}

impl Tokens for &Pod {
    fn token(&self, audience: &str, seconds: u64) -> Result<String, String> {
        let account = text(&self.object.borrow(), "/spec/serviceAccountName").to_owned();
        let account = if account.is_empty() { "default" } else { &account };
        let audiences: Vec<String> = if audience.is_empty() { Vec::new() } else { vec![audience.to_owned()] };
        let result = self.node.api.request_token(&self.ns, account, &audiences, seconds, Some((&self.name, &self.uid)));
        result.map(|(token, _)| token).map_err(|e| format!("token for service account \"{account}\": {}", e.message))
    }
}

impl Pod {
    /// Takes a pod that is bound to the node.
    pub(crate) fn new(node: Arc<Node>, object: watch::Receiver<Arc<Value>>, number: u16) -> Self {
        let pod = object.borrow().clone();
        let (ns, name) = crate::json::id(&pod);
        let uid = text(&pod, "/metadata/uid").to_owned();
        let host_network = crate::json::flag(&pod, "/spec/hostNetwork");
        let mut containers = Vec::new();
        for c in list(&pod, "/spec/initContainers") {
            containers.push(Arc::new(Container::new(c, if c["restartPolicy"] == "Always" { Kind::Sidecar } else { Kind::Init })));
        }
        containers.extend(list(&pod, "/spec/containers").iter().map(|c| Arc::new(Container::new(c, Kind::Main))));
        Self {
            netns: if host_network { node.netns.clone() } else { format!("{}-p{number}", node.prefix) },
            dir: node.dir.join("pods").join(&uid),
            ns,
            name,
            uid,
            object,
            addresses: OnceLock::new(),
            containers,
            places: Mutex::default(),
            dirty: Notify::new(),
            tokens: Mutex::default(),
            end: OnceLock::new(),
            started: crate::now(),
            closed: CancellationToken::new(),
            number,
            host_network,
            node,
        }
    }

    /// Writes an event about this pod.
    pub(crate) async fn event(&self, kind: &str, reason: &str, message: &str) {
        let object = self.object.borrow().clone();
        self.node.event(&object, kind, reason, message).await;
    }

    /// The object with the addresses that the status may not have yet.
    pub(crate) fn described(&self) -> Value {
        let mut pod = (**self.object.borrow()).clone();
        pod["status"]["hostIP"] = json!(netns::NODE.to_string());
        pod["status"]["hostIPs"] = json!([{"ip": netns::NODE.to_string()}]);
        if let Some(addresses) = self.addresses.get() {
            pod["status"]["podIP"] = json!(addresses[0].to_string());
            pod["status"]["podIPs"] = addresses.iter().map(|a| json!({"ip": a.to_string()})).collect();
        }
        pod
    }

    /// Files for the containers' `/etc`.
    pub(crate) fn etc(&self) -> Vec<(String, String)> {
        let pod = self.object.borrow().clone();
        let host = fields::hostname(&pod);
        let mut hosts = String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
        let subdomain = text(&pod, "/spec/subdomain");
        for address in self.addresses.get().into_iter().flatten() {
            if subdomain.is_empty() {
                hosts.push_str(&format!("{address}\t{host}\n"));
            } else {
                hosts.push_str(&format!("{address}\t{host}.{subdomain}.{}.svc.cluster.local\t{host}\n", self.ns));
            }
        }
        for alias in list(&pod, "/spec/hostAliases") {
            let names: Vec<&str> = list(alias, "/hostnames").iter().filter_map(Value::as_str).collect();
            hosts.push_str(&format!("{}\t{}\n", text(alias, "/ip"), names.join("\t")));
        }
        let strings =
            |pointer: &str| list(&pod, pointer).iter().filter_map(|v| v.as_str().map(str::to_owned)).collect::<Vec<_>>();
        let (mut servers, mut search) = (strings("/spec/dnsConfig/nameservers"), strings("/spec/dnsConfig/searches"));
        let mut options = vec!["ndots:5".to_owned()];
        if text(&pod, "/spec/dnsPolicy") == "None" {
            options.clear();
        } else {
            servers.insert(0, netns::DNS.to_string());
            let ns = &self.ns;
            search.splice(0..0, [format!("{ns}.svc.cluster.local"), "svc.cluster.local".into(), "cluster.local".into()]);
        }
        for option in list(&pod, "/spec/dnsConfig/options") {
            let name = text(option, "/name");
            options.retain(|o| o.split(':').next() != Some(name));
            options.push(match text(option, "/value") {
                "" => name.to_owned(),
                value => format!("{name}:{value}"),
            });
        }
        let mut resolv: String = servers.iter().map(|s| format!("nameserver {s}\n")).collect();
        resolv.push_str(&format!("search {}\noptions {}\n", search.join(" "), options.join(" ")));
        vec![("hosts".into(), hosts), ("hostname".into(), format!("{host}\n")), ("resolv.conf".into(), resolv)]
    }

    /// A container by name.
    pub(crate) fn container(&self, name: &str) -> Option<&Arc<Container>> {
        self.containers.iter().find(|c| c.name == name)
    }

    fn of(&self, kind: Kind) -> impl Iterator<Item = &Arc<Container>> {
        self.containers.iter().filter(move |c| c.kind == kind)
    }

    async fn publish(&self) {
        let states: Vec<_> = self.containers.iter().map(|c| (&**c, c.now())).collect();
        let facts = status::Facts {
            addresses: self.addresses.get().into_iter().flatten().map(IpAddr::to_string).collect(),
            host: netns::NODE.to_string(),
            started: self.started.clone(),
            end: self.end.get().copied(),
            now: crate::now(),
        };
        let current = match self.node.api.get(&resource::PODS, Some(&self.ns), &self.name).await {
            Ok(pod) if text(&pod, "/metadata/uid") == self.uid => pod,
            _ => return,
        };
        let status = status::status(&current, &states, &facts);
        if current.get("status") == Some(&status) {
            return;
        }
        let body = json!({"metadata": {"uid": self.uid}, "status": status});
        if let Err(e) =
            self.node.api.patch(&resource::PODS, Some(&self.ns), &self.name, Some("status"), PatchKind::Merge, body).await
            && !e.is_not_found()
        {
            if e.is_conflict() {
                // Somebody else wrote it at the same time: once more, from what is there now.
                self.dirty.notify_one();
                return;
            }
            tracing::warn!("status of pod {}/{}: {e}", self.ns, self.name);
        }
    }

    /// Fills the volumes, or says what is missing.
    fn fill(&self) -> Result<(), String> {
        let pod = self.described();
        let group = pod.pointer("/spec/securityContext/fsGroup").and_then(Value::as_u64).map(|g| g as u32);
        for volume in list(&pod, "/spec/volumes") {
            let name = text(volume, "/name");
            let dir = self.dir.join("volumes").join(name);
            let failed = |e: &dyn std::fmt::Display| format!("MountVolume.SetUp failed for volume \"{name}\": {e}");
            let mut cache = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
            let files = volumes::files(&pod, volume, &*self.node, &self, &mut cache).map_err(|e| failed(&e))?;
            let place = match files {
                Some(files) => {
                    std::fs::create_dir_all(&dir).map_err(|e| failed(&e))?;
                    volumes::write(&dir, &files, group).map_err(|e| failed(&e))?;
                    dir
                }
                None => volumes::plain(volume, &dir, group).map_err(|e| failed(&e))?.ok_or_else(|| {
                    failed(&"this kind of volume is not supported by the playground, or the path does not exist")
                })?,
            };
            self.places.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), place);
        }
        Ok(())
    }

    fn network(&self) -> anyhow::Result<()> {
        let addresses = if self.host_network {
            vec![IpAddr::V4(netns::NODE)]
        } else {
            netns::create_pod(&self.node.netns, &self.netns, self.number)?
        };
        let _ = self.addresses.set(addresses);
        Ok(())
    }

    fn release(&self) {
        if !self.host_network {
            netns::destroy(&self.netns);
        }
    }
}

/// Everything up to the end of the last container; answers how the pod has ended.
async fn live(pod: &Arc<Pod>) -> &'static str {
    for c in &pod.containers {
        pod.dirty.notify_one();
        c.state.send_modify(|s| {
            if c.kind == Kind::Main && pod.of(Kind::Init).next().is_none() && pod.of(Kind::Sidecar).next().is_none() {
                s.phase = container::Phase::Waiting { reason: "ContainerCreating".into(), message: String::new() };
            }
        });
    }
    let mut told = String::new();
    loop {
        let filling = pod.clone();
        match tokio::task::spawn_blocking(move || filling.fill()).await {
            Ok(Ok(())) => break,
            Ok(Err(why)) if told != why => {
                pod.event("Warning", "FailedMount", &why).await;
                told = why;
            }
            _ => {}
        }
        sleep(Duration::from_secs(1)).await;
    }
    let refreshed = pod.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = refreshed.closed.cancelled() => return,
                () = sleep(Duration::from_secs(2)) => {}
            }
            let filling = refreshed.clone();
            // What has vanished meanwhile stays as it was, as on a real node.
            let _ = tokio::task::spawn_blocking(move || filling.fill()).await;
        }
    });
    let mut attempts = 0;
    loop {
        let wiring = pod.clone();
        match tokio::task::spawn_blocking(move || wiring.network()).await {
            Ok(Ok(())) => break,
            Ok(Err(e)) => {
                attempts += 1;
                if attempts == 1 {
                    pod.event("Warning", "FailedCreatePodSandBox", &format!("{e:#}")).await;
                }
                let cleaning = pod.clone();
                let _ = tokio::task::spawn_blocking(move || cleaning.release()).await;
            }
            Err(e) => tracing::error!("network of pod {}/{}: {e}", pod.ns, pod.name),
        }
        sleep(Duration::from_secs(1)).await;
    }
    pod.dirty.notify_one();
    for c in pod.containers.iter().filter(|c| c.kind != Kind::Main) {
        let task = tokio::spawn(container::run(pod.clone(), c.clone()));
        if c.kind == Kind::Sidecar {
            c.started().await;
            continue;
        }
        if !task.await.unwrap_or(false) {
            return "Failed";
        }
    }
    let mut tasks = Vec::new();
    for c in pod.of(Kind::Main) {
        tasks.push(tokio::spawn(container::run(pod.clone(), c.clone())));
        c.attempted().await;
    }
    let mut success = true;
    for task in tasks {
        success &= task.await.unwrap_or(false);
    }
    if success { "Succeeded" } else { "Failed" }
}

/// Stops all containers: the main ones first, then the sidecars in reverse order.
async fn terminate(pod: &Arc<Pod>, grace: Duration) {
    let deadline = Instant::now() + grace;
    let mut order: Vec<(&Arc<Container>, CancellationToken)> = Vec::new();
    order.extend(pod.containers.iter().filter(|c| c.kind != Kind::Sidecar).map(|c| (c, CancellationToken::new())));
    let first = order.len();
    order.extend(pod.containers.iter().rev().filter(|c| c.kind == Kind::Sidecar).map(|c| (c, CancellationToken::new())));
    let before = |n: usize| -> Vec<CancellationToken> {
        let until = if n < first { 0 } else { n };
        order[..until].iter().map(|(_, gone)| gone.clone()).collect()
    };
    let stops = order.iter().enumerate().map(|(n, (c, gone))| {
        let turn = before(n);
        async move {
            let wait = async move {
                for gone in turn {
                    gone.cancelled().await;
                }
            };
            container::stop(pod, c, deadline, wait).await;
            gone.cancel();
        }
    });
    futures::future::join_all(stops).await;
}

/// Waits until the pod is being deleted, or gone from the API.
async fn told_to_go(pod: &Pod) {
    let mut object = pod.object.clone();
    let _ = object.wait_for(|o| o.is_null() || !text(o, "/metadata/deletionTimestamp").is_empty()).await;
}

/// Runs a pod until it is gone. This is the whole of its task.
pub(crate) async fn run(pod: Arc<Pod>) {
    let publisher = {
        let pod = pod.clone();
        tokio::spawn(async move {
            loop {
                pod.dirty.notified().await;
                pod.publish().await;
                // A burst of changes is one write.
                sleep(Duration::from_millis(30)).await;
            }
        })
    };
    tokio::select! {
        () = told_to_go(&pod) => {}
        end = live(&pod) => {
            // No main container is left: the sidecars go, and the pod has ended.
            let grace = number(&pod.object.borrow(), "/spec/terminationGracePeriodSeconds", 30).max(0) as u64;
            terminate(&pod, Duration::from_secs(grace)).await;
            let _ = pod.end.set(end);
            pod.publish().await;
            let releasing = pod.clone();
            let _ = tokio::task::spawn_blocking(move || releasing.release()).await;
            told_to_go(&pod).await;
        }
    }
    let grace = match &**pod.object.borrow() {
        Value::Null => 0,
        o => number(o, "/metadata/deletionGracePeriodSeconds", 30).max(0) as u64,
    };
    terminate(&pod, Duration::from_secs(grace)).await;
    pod.closed.cancel();
    pod.publish().await;
    publisher.abort();
    let releasing = pod.clone();
    let _ = tokio::task::spawn_blocking(move || {
        releasing.release();
        std::fs::remove_dir_all(&releasing.dir)
    })
    .await;
    let options = DeleteOptions { grace_period_seconds: Some(0), uid: Some(pod.uid.clone()), ..DeleteOptions::default() };
    if let Err(e) = pod.node.api.delete(&resource::PODS, Some(&pod.ns), &pod.name, options).await
        && !e.is_not_found()
        && !e.is_conflict()
    {
        tracing::warn!("deletion of pod {}/{}: {e}", pod.ns, pod.name);
    }
    pod.node.forget(&pod, pod.number);
}
