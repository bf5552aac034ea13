//! The node: runs the pods that are bound to it as processes in network namespaces, and reports what becomes of them.
//!
//! One task per pod ([`pod::run`]) from binding to deletion. Nothing is kept over a restart of the playground: its API
//! server begins empty, too, and what an earlier one left is removed before a new one starts.

pub(crate) mod backend;
pub(crate) mod container;
pub(crate) mod fields;
pub(crate) mod image;
pub(crate) mod launch;
pub(crate) mod pod;
pub(crate) mod probes;
pub(crate) mod status;
pub(crate) mod volumes;

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};
use tokio::process::{Child, Command};
use tokio::sync::watch;

use crate::apiserver::{Api, EventKind, resource};
use crate::json::text;
use crate::mirror::Mirror;
use crate::netns;
use fields::Objects;
use launch::Spec;
use pod::Pod;

/// The name of the one node.
pub(crate) const NAME: &str = "playground";

struct Entry {
    pod: Arc<Pod>,
    object: watch::Sender<Arc<Value>>,
}

/// See the module.
pub(crate) struct Node {
    /// Acts as the node.
    pub api: Api,
    /// The node's network namespace.
    pub netns: String,
    /// What the names of the pods' network namespaces begin with.
    pub prefix: String,
    /// Folder for the pods' folders.
    pub dir: PathBuf,
    /// Folder with the programs that images stand for.
    pub programs: PathBuf,
    /// All Services.
    pub services: Arc<Mirror>,
    /// All EndpointSlices.
    pub slices: Arc<Mirror>,
    configmaps: Arc<Mirror>,
    secrets: Arc<Mirror>,
    exe: PathBuf,
    words: Vec<String>,
    pods: Mutex<HashMap<String, Entry>>,
    numbers: Mutex<BTreeSet<u16>>,
}

impl Objects for Node {
    fn find(&self, secret: bool, ns: &str, name: &str) -> Option<Arc<Value>> {
        if secret { self.secrets.get(ns, name) } else { self.configmaps.get(ns, name) }
    }
}

impl Node {
    /// Registers the node and begins to run pods.
    pub(crate) async fn start(api: Api, dir: &Path, prefix: &str, netns: &str, programs: &Path) -> anyhow::Result<Arc<Self>> {
        let node = Arc::new(Self {
            services: Mirror::start(&api, &resource::SERVICES),
            slices: Mirror::start(&api, &resource::ENDPOINTSLICES),
            configmaps: Mirror::start(&api, &resource::CONFIGMAPS),
            secrets: Mirror::start(&api, &resource::SECRETS),
            netns: netns.to_owned(),
            prefix: prefix.to_owned(),
            dir: dir.to_owned(),
            programs: programs.to_owned(),
            exe: std::env::current_exe()?,
            words: crate::command::words_before_action(),
            pods: Mutex::default(),
            numbers: Mutex::default(),
            api,
        });
        let registered = node.api.create(&resource::NODES, None, description()).await?;
        // The status is a resource of its own: a creation ignores it.
        let mut registered = registered;
        registered["status"] = description()["status"].clone();
        node.api.update_status(&resource::NODES, registered).await?;
        tokio::spawn(node.clone().follow());
        Ok(node)
    }

    async fn follow(self: Arc<Self>) {
        loop {
            let (items, mut watch) = self.api.list_and_watch(&resource::PODS);
            let present: BTreeSet<String> = items.iter().map(|p| text(p, "/metadata/uid").to_owned()).collect();
            for (uid, entry) in self.pods.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                if !present.contains(uid) {
                    entry.object.send_replace(Arc::new(Value::Null));
                }
            }
            for item in items {
                self.see(Arc::new(item), false);
            }
            while let Some(event) = watch.next().await {
                self.see(event.object.clone(), event.kind == EventKind::Deleted);
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    }

    fn see(self: &Arc<Self>, object: Arc<Value>, deleted: bool) {
        if text(&object, "/spec/nodeName") != NAME {
            return;
        }
        let uid = text(&object, "/metadata/uid").to_owned();
        let mut pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        match pods.get(&uid) {
            // The last object stays readable; that it is gone is told by `Null`.
            Some(entry) if deleted => {
                entry.object.send_replace(Arc::new(Value::Null));
            }
            Some(entry) => {
                entry.object.send_replace(object);
                entry.pod.dirty.notify_one();
            }
            None if deleted => {}
            None => {
                let number = {
                    let mut numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
                    // Addresses are not used again at once: something may still know the old owner.
                    let last = numbers.last().copied().unwrap_or(1);
                    let next = (last + 1..u16::MAX)
                        .chain(2..=last)
                        .find(|n| n & 0xff != 0 && n & 0xff != 255 && !numbers.contains(n))
                        .unwrap_or(2);
                    numbers.insert(next);
                    next
                };
                let (sender, receiver) = watch::channel(object);
                let pod = Arc::new(Pod::new(self.clone(), receiver, number));
                pods.insert(uid, Entry { pod: pod.clone(), object: sender });
                tokio::spawn(pod::run(pod));
            }
        }
    }

    fn forget(&self, pod: &Pod, number: u16) {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).remove(&pod.uid);
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner).remove(&number);
    }

    /// The running pod of this name.
    pub(crate) fn pod(&self, ns: &str, name: &str) -> Option<Arc<Pod>> {
        let pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        pods.values().find(|e| e.pod.ns == ns && e.pod.name == name && !e.object.borrow().is_null()).map(|e| e.pod.clone())
    }

    /// Starts the launcher with a spec, which is written to `path`.
    pub(crate) fn launch(&self, spec: &Spec, path: &Path, [stdin, stdout, stderr]: [Stdio; 3]) -> io::Result<Child> {
        use std::os::unix::fs::OpenOptionsExt as _;
        let _ = std::fs::remove_file(path);
        let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        serde_json::to_writer(file, spec)?;
        let mut command = Command::new(&self.exe);
        command.args(&self.words).arg("launch").arg(path).stdin(stdin).stdout(stdout).stderr(stderr).env_clear();
        command.process_group(0).spawn()
    }

    /// Writes an event about a pod; the same one again only counts up.
    pub(crate) async fn event(&self, pod: &Value, kind: &str, reason: &str, message: &str) {
        if pod.is_null() {
            return;
        }
        let mut about = json!({"apiVersion": "v1", "kind": "Pod"});
        about["metadata"] = pod["metadata"].clone();
        crate::events::record(&self.api, "kubelet", &about, kind, reason, message).await;
    }
}

fn description() -> Value {
    let now = crate::now();
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).to_string();
    let size = json!({"cpu": cpus, "memory": "8Gi", "pods": "1000", "ephemeral-storage": "10Gi"});
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": NAME, "labels": {
            "kubernetes.io/hostname": NAME, "kubernetes.io/os": "linux", "node-role.kubernetes.io/control-plane": "",
            "kubernetes.io/arch": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }
        }},
        "spec": {"podCIDR": "10.244.0.0/16", "podCIDRs": ["10.244.0.0/16"]},
        "status": {
            "addresses": [{"type": "InternalIP", "address": netns::NODE.to_string()}, {"type": "Hostname", "address": NAME}],
            "capacity": size, "allocatable": size,
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "the playground runs pods",
                "lastHeartbeatTime": now, "lastTransitionTime": now}],
            "nodeInfo": {
                "kubeletVersion": "v1.33.0", "kubeProxyVersion": "v1.33.0", "containerRuntimeVersion": concat!("weft-playground://", env!("CARGO_PKG_VERSION")),
                "osImage": "Weft playground (processes, not containers)", "operatingSystem": "linux", "kernelVersion": kernel.trim(),
                "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
                "bootID": "", "machineID": "", "systemUUID": ""
            }
        }
    })
}
