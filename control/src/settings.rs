//! The settings of injection, from a file that is read again whenever it changes (in a cluster, a mounted ConfigMap, whose
//! change is a swap of symbolic links).
//!
//! A new file takes effect as a whole or not at all: one that can't be read or names an unknown key leaves the last good settings in
//! force, and says so in the log and in `weft_settings_good`. At the start there are none before, and the defaults hold: a
//! control plane that ends because of a misspelt key would take the webhook with it.

use crate::compile::Mesh;
use crate::metrics::{Ended, Metrics};
use notify::Watcher as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tracing::{error, info, warn};
use weft_webhook::Settings;

/// How long after a change the file is read.
const SETTLE: Duration = Duration::from_millis(50);

/// What the command line says where the file is silent.
#[derive(Clone, Debug)]
pub struct Defaults {
    /// The control namespace; it goes before what the file says, which could only be wrong.
    pub namespace: String,
    /// Image of the proxy.
    pub image: Option<String>,
    /// Domain of Services.
    pub cluster_domain: String,
}

/// Reads settings from YAML.
///
/// # Errors
/// What is wrong, with key or position.
pub fn parse(text: &str, defaults: &Defaults) -> Result<Settings, String> {
    let mut settings = Settings::from_yaml(text).map_err(|e| e.to_string())?;
    let named: serde_json::Value =
        if text.trim().is_empty() { serde_json::Value::Null } else { serde_saphyr::from_str(text).map_err(|e| e.to_string())? };
    if named.get("image").is_none()
        && let Some(image) = &defaults.image
    {
        settings.image.clone_from(image);
    }
    settings.control_namespace.clone_from(&defaults.namespace);
    settings.check().map_err(|e| e.to_string())?;
    Ok(settings)
}

/// What the compiler takes from settings.
pub fn mesh(settings: &Settings, defaults: &Defaults) -> Mesh {
    Mesh {
        cluster: settings.cluster.clone(),
        cluster_domain: defaults.cluster_domain.clone(),
        trust_domain: settings.trust_domain.clone(),
        traffic: settings.traffic.clone(),
        control_namespace: settings.control_namespace.clone(),
        policy: settings.mesh.clone(),
    }
}

/// The settings file.
pub struct File {
    path: PathBuf,
    defaults: Defaults,
    metrics: Arc<Metrics>,
    last: Last,
}

/// What the file held when it was read last.
#[derive(Debug, PartialEq, Eq)]
enum Last {
    NotRead,
    Absent,
    Text(String),
}

impl File {
    /// A file that was not read yet.
    pub fn new(path: PathBuf, defaults: Defaults, metrics: Arc<Metrics>) -> Self {
        Self { path, defaults, metrics, last: Last::NotRead }
    }

    /// Reads the file. `None`: nothing changed, or it is wrong (which was logged).
    pub fn read(&mut self) -> Option<Settings> {
        let now = match std::fs::read_to_string(&self.path) {
            Ok(text) => Last::Text(text),
            // A ConfigMap that is being swapped is away for a moment; one that was deleted leaves us as we are.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => match self.last {
                Last::NotRead => Last::Absent,
                Last::Absent | Last::Text(_) => return None,
            },
            Err(error) => {
                self.wrong(&error.to_string());
                return None;
            }
        };
        if self.last == now {
            return None;
        }
        self.last = now;
        let text = match &self.last {
            Last::Text(text) => Some(text.clone()),
            Last::NotRead | Last::Absent => None,
        };
        match parse(text.as_deref().unwrap_or_default(), &self.defaults) {
            Ok(settings) => {
                if text.is_some() {
                    info!(file = %self.path.display(), "settings in force");
                } else {
                    info!(file = %self.path.display(), "no settings file; the defaults are in force");
                }
                self.metrics.settings_reads.get_or_create(&Ended::OK).inc();
                self.metrics.settings_good.set(1);
                Some(settings)
            }
            Err(reason) => {
                self.wrong(&reason);
                None
            }
        }
    }

    fn wrong(&self, reason: &str) {
        self.metrics.settings_reads.get_or_create(&Ended::ERROR).inc();
        self.metrics.settings_good.set(0);
        error!(file = %self.path.display(), "cannot use the settings: {reason}. The settings from before stay in force; correct the file \
             (in a cluster: ConfigMap weft-config in namespace {})", self.defaults.namespace);
    }

    /// The settings at the start: those of the file, or the defaults.
    pub fn start(&mut self) -> Settings {
        self.read().unwrap_or_else(|| {
            parse("", &self.defaults).unwrap_or_else(|reason| {
                error!("the flags make no good settings: {reason}; using built-in ones");
                Settings { control_namespace: self.defaults.namespace.clone(), ..Settings::default() }
            })
        })
    }

    /// Follows the file until dropped.
    pub async fn follow(mut self, settings: watch::Sender<Arc<Settings>>) {
        let (changed, mut changes) = mpsc::channel::<()>(1);
        let folder = self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned();
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if !event.is_ok_and(|e| e.kind.is_access()) {
                let _ = changed.try_send(());
            }
        });
        // The folder is watched and not the file: both editors and the kubelet put another file in its place.
        let watching = watcher.and_then(|mut w| w.watch(&folder, notify::RecursiveMode::NonRecursive).map(|()| w));
        let _watcher = match watching {
            Ok(watcher) => watcher,
            Err(error) => {
                warn!(folder = %folder.display(), %error, "cannot watch the settings; a change takes effect with a restart");
                return std::future::pending().await;
            }
        };
        // What changed between the first reading and the beginning of the watch.
        let mut look = true;
        loop {
            if !look && changes.recv().await.is_none() {
                return std::future::pending().await;
            }
            look = false;
            tokio::time::sleep(SETTLE).await;
            while changes.try_recv().is_ok() {}
            if let Some(new) = self.read() {
                settings.send_replace(Arc::new(new));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn defaults() -> Defaults {
        Defaults { namespace: "mesh".into(), image: Some("reg/weft-proxy:flag".into()), cluster_domain: "cluster.local".into() }
    }

    #[test]
    fn flags_fill_what_the_file_leaves_open() {
        let settings = parse("cluster: c1\n", &defaults()).unwrap();
        assert_eq!((settings.image.as_str(), settings.cluster.as_str()), ("reg/weft-proxy:flag", "c1"));
        assert_eq!(settings.control_namespace, "mesh");
        assert_eq!(parse("image: reg/weft-proxy:file\n", &defaults()).unwrap().image, "reg/weft-proxy:file");
        assert!(parse("imgae: x\n", &defaults()).unwrap_err().contains("imgae"));
    }

    #[test]
    fn a_wrong_file_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.yaml");
        let metrics = Arc::new(Metrics::default());
        let mut file = File::new(path.clone(), defaults(), metrics.clone());
        assert_eq!(file.start().cluster, Settings::default().cluster);
        std::fs::write(&path, "cluster: one\n").unwrap();
        assert_eq!(file.read().unwrap().cluster, "one");
        assert!(file.read().is_none(), "unchanged");
        std::fs::write(&path, "clusterr: two\n").unwrap();
        assert!(file.read().is_none());
        assert_eq!(metrics.settings_good.get(), 0);
        std::fs::remove_file(&path).unwrap();
        assert!(file.read().is_none());
        std::fs::write(&path, "cluster: three\n").unwrap();
        assert_eq!(file.read().unwrap().cluster, "three");
        assert_eq!(metrics.settings_good.get(), 1);
    }

    #[tokio::test]
    async fn a_swap_of_links_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let link = |target: &str| {
            let fresh = dir.path().join("..data_tmp");
            std::os::unix::fs::symlink(target, &fresh).unwrap();
            std::fs::rename(&fresh, dir.path().join("..data")).unwrap();
        };
        for (version, text) in [("..1", "cluster: one\n"), ("..2", "cluster: two\n")] {
            std::fs::create_dir(dir.path().join(version)).unwrap();
            std::fs::write(dir.path().join(version).join("config.yaml"), text).unwrap();
        }
        link("..1");
        std::os::unix::fs::symlink("..data/config.yaml", dir.path().join("config.yaml")).unwrap();
        let mut file = File::new(dir.path().join("config.yaml"), defaults(), Arc::default());
        let (sender, mut settings) = watch::channel(Arc::new(file.start()));
        assert_eq!(settings.borrow().cluster, "one");
        let task = tokio::spawn(file.follow(sender));
        tokio::time::sleep(SETTLE * 4).await;
        link("..2");
        tokio::time::timeout(Duration::from_secs(5), settings.wait_for(|s| s.cluster == "two")).await.unwrap().unwrap();
        task.abort();
    }
}
