//! A folder of manifests as a source: the same objects as a cluster's, from YAML or JSON files, for tests and machines without
//! Kubernetes.
//!
//! - Every `*.yaml`, `*.yml` and `*.json` below the folder is read, hidden files and folders excepted; documents of other kinds are
//!   passed over, so that one folder can hold whole applications.
//! - The folder is watched. A change is read a moment later (editors write in several steps) and takes effect in one step.
//! - A file that can't be read or parsed keeps what it last held that was good, and the log says file, document and field; the
//!   other files are not affected. A file that was bad from the beginning holds nothing.
//! - Two files that hold the same object: the first by path counts, and the log names both.

use crate::index::Index;
use crate::metrics::Metrics;
use crate::model::{Key, Kind, Object};
use notify::Watcher as _;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tracing::{error, info, warn};

/// How long after a change the folder is read.
pub const SETTLE: Duration = Duration::from_millis(100);

/// The folder and what was last good in each of its files.
pub struct Folder {
    root: PathBuf,
    good: BTreeMap<PathBuf, Vec<Object>>,
    /// Files that are bad now, with what is wrong: said once, not with each reload.
    bad: BTreeMap<PathBuf, String>,
    doubles: BTreeSet<String>,
}

impl Folder {
    /// A folder that was not read yet.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), good: BTreeMap::new(), bad: BTreeMap::new(), doubles: BTreeSet::new() }
    }

    /// Reads the folder and returns all objects that are in force.
    ///
    /// # Errors
    /// The folder itself can't be listed; nothing has changed then.
    pub fn read(&mut self) -> Result<Vec<Object>, FolderError> {
        let mut files = BTreeSet::new();
        list(&self.root, &mut files)?;
        self.good.retain(|path, _| files.contains(path));
        self.bad.retain(|path, _| files.contains(path));
        for path in files {
            match read_file(&path) {
                Ok(objects) => {
                    if self.bad.remove(&path).is_some() {
                        info!(file = %path.display(), "the manifest is good again");
                    }
                    self.good.insert(path, objects);
                }
                Err(reason) => {
                    let kept = self.good.get(&path).map_or(0, Vec::len);
                    if self.bad.get(&path) != Some(&reason) {
                        error!(file = %path.display(), kept, "cannot use the manifest: {reason}; the {kept} objects that it last held \
                             stay in force until it is corrected");
                        self.bad.insert(path, reason);
                    }
                }
            }
        }
        Ok(self.merged())
    }

    /// Files that can't be used at present, with the reason.
    pub fn bad(&self) -> &BTreeMap<PathBuf, String> {
        &self.bad
    }

    fn merged(&mut self) -> Vec<Object> {
        let mut first: HashMap<(Kind, Key), &Path> = HashMap::new();
        let mut objects = Vec::new();
        let mut doubles = BTreeSet::new();
        for (path, held) in &self.good {
            for object in held {
                let key = (object.kind(), object.key());
                if let Some(earlier) = first.get(&key) {
                    let double = format!("{} {} is in {} and in {}", key.0.plural(), key.1, earlier.display(), path.display());
                    if !self.doubles.contains(&double) {
                        warn!("{double}: the first counts; remove one of them");
                    }
                    doubles.insert(double);
                    continue;
                }
                first.insert(key, path);
                objects.push(object.clone());
            }
        }
        self.doubles = doubles;
        objects
    }
}

/// A folder that can't be listed.
#[derive(Debug, thiserror::Error)]
#[error("cannot list the folder {}: {cause}; does it exist, and may this process read it?", path.display())]
pub struct FolderError {
    path: PathBuf,
    cause: std::io::Error,
}

fn list(folder: &Path, files: &mut BTreeSet<PathBuf>) -> Result<(), FolderError> {
    let fail = |cause| FolderError { path: folder.to_owned(), cause };
    for entry in std::fs::read_dir(folder).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let path = entry.path();
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        // Follows symbolic links: a ConfigMap mount consists of them. One that leads nowhere is passed over.
        let Ok(meta) = std::fs::metadata(&path) else { continue };
        if meta.is_dir() {
            // A link to a folder is not followed, so that a circle of links can't trap the reader.
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                list(&path, files)?;
            }
        } else if path.extension().and_then(|e| e.to_str()).is_some_and(|e| matches!(e, "yaml" | "yml" | "json")) {
            files.insert(path);
        }
    }
    Ok(())
}

fn read_file(path: &Path) -> Result<Vec<Object>, String> {
    let text = std::fs::read_to_string(path).map_err(|e| e.to_string())?;
    let documents: Vec<serde_json::Value> = if path.extension().is_some_and(|e| e == "json") {
        vec![serde_json::from_str(&text).map_err(|e| e.to_string())?]
    } else {
        serde_saphyr::from_multiple(&text).map_err(|e| e.to_string())?
    };
    let mut objects = Vec::new();
    for (number, document) in documents.into_iter().enumerate() {
        let at = |reason: String| format!("document {}: {reason}", number + 1);
        if document.is_null() {
            continue;
        }
        if document["kind"] == "List" {
            let items = document.get("items").and_then(|i| i.as_array()).cloned().unwrap_or_default();
            for item in items {
                objects.extend(super::wire::parse(item).map_err(at)?);
            }
        } else {
            objects.extend(super::wire::parse(document).map_err(at)?);
        }
    }
    Ok(objects)
}

/// A folder that was read and is watched.
pub struct Watched {
    folder: Folder,
    index: Arc<Index>,
    metrics: Arc<Metrics>,
    changes: mpsc::Receiver<()>,
    /// Watches as long as it lives.
    _watcher: notify::RecommendedWatcher,
}

/// Reads the folder into the index and begins to watch it.
///
/// # Errors
/// The folder can't be listed or watched.
pub fn open(root: PathBuf, index: Arc<Index>, metrics: Arc<Metrics>) -> anyhow::Result<Watched> {
    let (changed, changes) = mpsc::channel::<()>(1);
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading a file is an event too, and would make us read for ever.
        if !event.is_ok_and(|e| e.kind.is_access()) {
            let _ = changed.try_send(());
        }
    })?;
    watcher
        .watch(&root, notify::RecursiveMode::Recursive)
        .map_err(|e| anyhow::anyhow!("--manifests: cannot watch the folder {}: {e}; does it exist?", root.display()))?;
    let mut watched = Watched { folder: Folder::new(&root), index, metrics, changes, _watcher: watcher };
    watched.load()?;
    info!(folder = %root.display(), "reading manifests instead of a cluster");
    Ok(watched)
}

impl Watched {
    fn load(&mut self) -> Result<(), FolderError> {
        let objects = self.folder.read()?;
        self.metrics.bad_manifests.set(self.folder.bad().len() as i64);
        self.index.replace(objects);
        Ok(())
    }

    /// Reads the folder with every change, until it is dropped.
    pub async fn follow(mut self) {
        while self.changes.recv().await.is_some() {
            tokio::time::sleep(SETTLE).await;
            while self.changes.try_recv().is_ok() {}
            if let Err(error) = self.load() {
                error!("{error} What was read last stays in force.");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: NAME}\nspec: {containers: [{name: c}]}\n";

    fn pod(name: &str) -> String {
        POD.replace("NAME", name)
    }

    fn names(objects: &[Object]) -> Vec<String> {
        objects.iter().map(|o| o.key().name).collect()
    }

    #[test]
    fn a_broken_file_keeps_what_was_good_and_the_others_go_on() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a.yaml"), dir.path().join("b.yaml"));
        std::fs::write(&a, format!("{}---\n{}", pod("one"), pod("two"))).unwrap();
        std::fs::write(&b, pod("three")).unwrap();
        let mut folder = Folder::new(dir.path());
        assert_eq!(names(&folder.read().unwrap()), ["one", "two", "three"]);
        std::fs::write(&a, format!("{}---\nkind: Pod\nmetadata: [", pod("one"))).unwrap();
        std::fs::write(&b, pod("four")).unwrap();
        assert_eq!(names(&folder.read().unwrap()), ["one", "two", "four"]);
        assert_eq!(folder.bad().keys().collect::<Vec<_>>(), [&a]);
        std::fs::write(&a, pod("five")).unwrap();
        assert_eq!(names(&folder.read().unwrap()), ["five", "four"]);
        assert!(folder.bad().is_empty());
        std::fs::remove_file(&a).unwrap();
        assert_eq!(names(&folder.read().unwrap()), ["four"]);
    }

    #[test]
    fn a_bad_document_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.yml");
        std::fs::write(
            &file,
            format!(
                "{}---\napiVersion: v1\nkind: Service\nmetadata: {{name: s}}\nspec: {{ports: [{{port: 99999}}]}}\n",
                pod("p")
            ),
        )
        .unwrap();
        let mut folder = Folder::new(dir.path());
        assert!(folder.read().unwrap().is_empty());
        let reason = &folder.bad()[&file];
        assert!(reason.contains("document 2") && reason.contains("Service s") && reason.contains("99999"), "{reason}");
    }

    #[test]
    fn other_kinds_lists_json_hidden_files_and_sub_folders() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("sub/.git")).unwrap();
        std::fs::write(dir.path().join("sub/.git/x.yaml"), "no yaml: [").unwrap();
        std::fs::write(dir.path().join(".x.yaml"), "no yaml: [").unwrap();
        std::fs::write(dir.path().join("notes.txt"), "hello").unwrap();
        std::fs::write(dir.path().join("sub/d.yaml"), "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\n---\n---\n")
            .unwrap();
        std::fs::write(
            dir.path().join("sub/l.json"),
            r#"{"apiVersion":"v1","kind":"List","items":[{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"n"}}]}"#,
        )
        .unwrap();
        let mut folder = Folder::new(dir.path());
        assert_eq!(names(&folder.read().unwrap()), ["n"]);
        assert!(folder.bad().is_empty());
    }

    #[test]
    fn doubles_count_once() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.yaml"), pod("one")).unwrap();
        std::fs::write(dir.path().join("b.yaml"), pod("one")).unwrap();
        assert_eq!(Folder::new(dir.path()).read().unwrap().len(), 1);
        assert!(Folder::new(dir.path().join("absent")).read().unwrap_err().to_string().contains("absent"));
    }
}
