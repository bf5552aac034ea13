//! Where the authority's state and the serving certificate are kept.
//!
//! The rule by which replicas agree is the same for both: *create or read*. Who finds nothing makes it and tries to create it; if somebody
//! was faster, the creation fails and his is read. What was replaced names the version it replaces, so that of two replacements one fails and
//! reads the other's.
//!
//! In a cluster: the Secret `weft-ca` (`tls.crt`, `tls.key`: the self-made root; `next.crt`, `next.key`: the one that is to follow; `state.json`;
//! `ca.crt`: all roots that are trusted, for whoever looks), and `weft-control-serving`. Annotations, labels, owners and type of a Secret that is
//! there already stay as they are. Without a cluster: one file each, readable for the owner only and replaced by renaming, or the memory.

use super::issue::Pair;
use super::state::{Asked, State};
use crate::source::kube::within;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use weft_api::names;

const STATE: &str = "state.json";

/// What the replicas share of the authority.
#[derive(Clone, Debug, Default)]
pub struct Shared {
    /// The self-made root; `None` where the user's authority was there from the beginning.
    pub own: Option<Pair>,
    /// The self-made root that is to follow it.
    pub next: Option<Pair>,
    /// `None`: it was written before there was a state.
    pub state: Option<State>,
    /// What was asked for by annotations.
    pub asked: Asked,
    replaces: Replaces,
}

/// The serving certificate as it was read.
#[derive(Clone, Debug, Default)]
pub struct Serving {
    /// `None`: the Secret is there and empty (an operator made it, so that the control plane needs no right to create Secrets).
    pub pair: Option<Pair>,
    replaces: Replaces,
}

/// What a replacement replaces.
#[derive(Clone, Default)]
struct Replaces(Option<Box<Secret>>);

impl std::fmt::Debug for Replaces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // It holds keys.
        f.write_str(if self.0.is_some() { "(something)" } else { "(nothing)" })
    }
}

/// What became of an attempt to write.
#[derive(Debug, PartialEq, Eq)]
pub enum Written {
    /// It is in force.
    Yes,
    /// Somebody was faster: read again.
    Lost,
}

/// The store can't be reached or refuses.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The API server.
    #[error("cannot {verb} secret {namespace}/{name}: {cause}{hint}")]
    Secret {
        /// What was tried.
        verb: &'static str,
        /// The control namespace.
        namespace: String,
        /// The Secret.
        name: String,
        /// Why it failed.
        cause: Box<kube::Error>,
        /// What to do.
        hint: &'static str,
    },
    /// What a Secret or file holds can't be read.
    #[error("{place}: {reason}; put it right, or delete it to begin with a new root (pods then have to be restarted)")]
    Damaged {
        /// The Secret and key, or the file.
        place: String,
        /// What is wrong.
        reason: String,
    },
    /// A file.
    #[error("cannot {verb} {}: {cause}", path.display())]
    File {
        /// What was tried.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        cause: std::io::Error,
    },
}

/// Where things are kept.
#[derive(Clone)]
pub enum Store {
    /// Secrets of the control namespace.
    Secrets {
        /// Client of the cluster.
        client: Client,
        /// The control namespace.
        namespace: String,
    },
    /// Files of a folder.
    Folder(PathBuf),
    /// Nowhere: a new root with every start.
    Memory(Arc<Mutex<Memory>>),
}

/// What [`Store::Memory`] holds.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    shared: Option<Shared>,
    serving: Option<Pair>,
}

impl Shared {
    /// The same, to be written where nothing is: somebody deleted it.
    pub fn anew(&self) -> Self {
        Self { replaces: Replaces::default(), ..self.clone() }
    }
}

impl Store {
    /// A store that forgets with the process.
    pub fn memory() -> Self {
        Self::Memory(Arc::default())
    }

    /// Reads what the replicas share. `None`: nobody has begun.
    ///
    /// # Errors
    /// The store can't be reached, or what it holds can't be read.
    pub async fn shared(&self) -> Result<Option<Shared>, StoreError> {
        match self {
            Self::Secrets { client, namespace } => {
                let secret = read_secret(client, namespace, names::CA_SECRET).await?;
                secret.map(shared_of_secret).transpose()
            }
            Self::Folder(folder) => read_shared(folder),
            Self::Memory(memory) => Ok(lock(memory).shared.clone()),
        }
    }

    /// Writes what the replicas share; what was read before (or nothing) is in it.
    ///
    /// # Errors
    /// The store can't be reached or refuses for another reason than that somebody was faster.
    pub async fn write_shared(&self, shared: &Shared) -> Result<Written, StoreError> {
        match self {
            Self::Secrets { client, namespace } => {
                write_secret(client, namespace, names::CA_SECRET, &shared.replaces, secret_data(shared)).await
            }
            Self::Folder(folder) => write_shared(folder, shared).map(|()| Written::Yes),
            Self::Memory(memory) => {
                lock(memory).shared = Some(shared.clone());
                Ok(Written::Yes)
            }
        }
    }

    /// Reads the serving certificate. `None`: there is none.
    ///
    /// # Errors
    /// The store can't be reached.
    pub async fn serving(&self) -> Result<Option<Serving>, StoreError> {
        match self {
            Self::Secrets { client, namespace } => {
                Ok(read_secret(client, namespace, names::SERVING_SECRET).await?.map(serving_of_secret))
            }
            Self::Folder(folder) => {
                let pair = read_pair(folder, "serving")?;
                Ok(pair.map(|pair| Serving { pair: Some(pair), replaces: Replaces::default() }))
            }
            Self::Memory(memory) => {
                let pair = lock(memory).serving.clone();
                Ok(pair.map(|pair| Serving { pair: Some(pair), replaces: Replaces::default() }))
            }
        }
    }

    /// Writes a serving certificate: creates it (`replaces`: nothing), or replaces what was read. `bundle`: the roots, for whoever looks.
    ///
    /// # Errors
    /// The store can't be reached or refuses for another reason than that somebody was faster.
    pub async fn write_serving(&self, pair: &Pair, bundle: &str, replaces: Option<&Serving>) -> Result<Written, StoreError> {
        match self {
            Self::Secrets { client, namespace } => {
                let data = vec![
                    ("tls.crt", Some(pair.certificate.clone())),
                    ("tls.key", Some(pair.key.clone())),
                    ("ca.crt", Some(bundle.to_owned())),
                ];
                let nothing = Replaces::default();
                let replaces = replaces.map_or(&nothing, |r| &r.replaces);
                write_secret(client, namespace, names::SERVING_SECRET, replaces, data).await
            }
            Self::Folder(folder) => {
                // The key first: a certificate whose key is missing must never be what a crash leaves behind.
                write_file(folder, "serving.key", &pair.key, 0o600)?;
                write_file(folder, "serving.pem", &pair.certificate, 0o644)?;
                Ok(Written::Yes)
            }
            Self::Memory(memory) => {
                lock(memory).serving = Some(pair.clone());
                Ok(Written::Yes)
            }
        }
    }
}

fn lock(memory: &Mutex<Memory>) -> std::sync::MutexGuard<'_, Memory> {
    memory.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads a Secret of the control namespace.
///
/// # Errors
/// The API server can't be reached or refuses.
pub async fn read_secret(client: &Client, namespace: &str, name: &str) -> Result<Option<Secret>, StoreError> {
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    within(api.get_opt(name)).await.map_err(|e| secret_error("read", namespace, name, e))
}

async fn write_secret(
    client: &Client,
    namespace: &str,
    name: &str,
    replaces: &Replaces,
    data: Vec<(&'static str, Option<String>)>,
) -> Result<Written, StoreError> {
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let mut secret = replaces.0.as_deref().cloned().unwrap_or_else(|| Secret {
        metadata: ObjectMeta {
            name: Some(name.into()),
            namespace: Some(namespace.into()),
            labels: Some(BTreeMap::from([("app.kubernetes.io/managed-by".into(), names::CONTROL.into())])),
            ..ObjectMeta::default()
        },
        type_: Some("kubernetes.io/tls".into()),
        ..Secret::default()
    });
    let held = secret.data.get_or_insert_default();
    for (key, value) in data {
        match value {
            Some(value) => drop(held.insert(key.into(), ByteString(value.into_bytes()))),
            None => drop(held.remove(key)),
        }
    }
    let existed = replaces.0.is_some();
    let (verb, result) = if existed {
        ("update", within(api.replace(name, &PostParams::default(), &secret)).await)
    } else {
        ("create", within(api.create(&PostParams::default(), &secret)).await)
    };
    match result {
        Ok(_) => Ok(Written::Yes),
        Err(kube::Error::Api(status)) if status.code == 409 || (status.code == 404 && existed) => Ok(Written::Lost),
        Err(error) => Err(secret_error(verb, namespace, name, error)),
    }
}

fn secret_error(verb: &'static str, namespace: &str, name: &str, cause: kube::Error) -> StoreError {
    let hint = match &cause {
        kube::Error::Api(status) if status.is_forbidden() => {
            "; the service account lacks a rule of the Role weft-control in this namespace: apply the output of `weft install` again"
        }
        kube::Error::Api(status) if status.code == 404 => "; does the namespace exist, and is --namespace right?",
        _ => "",
    };
    StoreError::Secret { verb, namespace: namespace.into(), name: name.into(), cause: Box::new(cause), hint }
}

fn text(secret: &Secret, key: &str) -> Option<String> {
    let value = secret.data.as_ref()?.get(key)?;
    String::from_utf8(value.0.clone()).ok().filter(|text| !text.trim().is_empty())
}

fn pair(secret: &Secret, certificate: &str, key: &str) -> Option<Pair> {
    text(secret, certificate).zip(text(secret, key)).map(|(certificate, key)| Pair { certificate, key })
}

/// What the Secret `weft-ca` holds.
///
/// # Errors
/// Its state can't be read.
pub fn shared_of_secret(secret: Secret) -> Result<Shared, StoreError> {
    let state = text(&secret, STATE)
        .map(|text| serde_json::from_str(&text))
        .transpose()
        .map_err(|e| StoreError::Damaged { place: format!("secret {}, key {STATE}", names::CA_SECRET), reason: e.to_string() })?;
    let annotation = |name: &str| secret.metadata.annotations.as_ref().and_then(|a| a.get(name)).cloned().unwrap_or_default();
    Ok(Shared {
        own: pair(&secret, "tls.crt", "tls.key"),
        next: pair(&secret, "next.crt", "next.key"),
        state,
        asked: Asked { renew: annotation(names::RENEW_ANNOTATION), rotate: annotation(names::ROTATE_ROOT_ANNOTATION) },
        replaces: Replaces(Some(Box::new(secret))),
    })
}

/// What the Secret `weft-control-serving` holds.
pub fn serving_of_secret(secret: Secret) -> Serving {
    Serving { pair: pair(&secret, "tls.crt", "tls.key"), replaces: Replaces(Some(Box::new(secret))) }
}

fn secret_data(shared: &Shared) -> Vec<(&'static str, Option<String>)> {
    let part = |pair: &Option<Pair>, part: fn(&Pair) -> &String| pair.as_ref().map(|pair| part(pair).clone());
    // A Secret of type kubernetes.io/tls must have both keys, empty or not.
    vec![
        ("tls.crt", Some(part(&shared.own, |p| &p.certificate).unwrap_or_default())),
        ("tls.key", Some(part(&shared.own, |p| &p.key).unwrap_or_default())),
        ("next.crt", part(&shared.next, |p| &p.certificate)),
        ("next.key", part(&shared.next, |p| &p.key)),
        ("ca.crt", shared.state.as_ref().map(State::bundle)),
        (STATE, shared.state.as_ref().and_then(|state| serde_json::to_string(state).ok())),
    ]
}

/// What `authority.json` holds.
#[derive(Serialize, Deserialize)]
struct File {
    own: Option<FilePair>,
    next: Option<FilePair>,
    state: Option<State>,
}

#[derive(Serialize, Deserialize)]
struct FilePair {
    certificate: String,
    key: String,
}

impl From<&Pair> for FilePair {
    fn from(pair: &Pair) -> Self {
        Self { certificate: pair.certificate.clone(), key: pair.key.clone() }
    }
}

impl From<FilePair> for Pair {
    fn from(pair: FilePair) -> Self {
        Self { certificate: pair.certificate, key: pair.key }
    }
}

fn read_shared(folder: &Path) -> Result<Option<Shared>, StoreError> {
    let Some(text) = read_file(folder, "authority.json")? else {
        // As versions before wrote it, or as somebody puts his own root there.
        let own = read_pair(folder, "root")?;
        return Ok(own.map(|own| Shared { own: Some(own), ..Shared::default() }));
    };
    let file: File = serde_json::from_str(&text)
        .map_err(|e| StoreError::Damaged { place: folder.join("authority.json").display().to_string(), reason: e.to_string() })?;
    // What annotations are in a cluster.
    let asked = |name: &str| read_file(folder, name).map(|text| text.unwrap_or_default().trim().to_owned());
    let asked = Asked { renew: asked("renew-before")?, rotate: asked("rotate-root")? };
    let (own, next) = (file.own.map(Pair::from), file.next.map(Pair::from));
    Ok(Some(Shared { own, next, state: file.state, asked, replaces: Replaces::default() }))
}

fn write_shared(folder: &Path, shared: &Shared) -> Result<(), StoreError> {
    let file = File {
        own: shared.own.as_ref().map(FilePair::from),
        next: shared.next.as_ref().map(FilePair::from),
        state: shared.state.clone(),
    };
    let path = folder.join("authority.json");
    let text = serde_json::to_string_pretty(&file).map_err(|e| StoreError::File {
        verb: "write",
        path,
        cause: std::io::Error::other(e),
    })?;
    write_file(folder, "authority.json", &text, 0o600)
}

fn read_file(folder: &Path, name: &str) -> Result<Option<String>, StoreError> {
    let path = folder.join(name);
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text)),
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(StoreError::File { verb: "read", path, cause }),
    }
}

fn read_pair(folder: &Path, name: &str) -> Result<Option<Pair>, StoreError> {
    let certificate = read_file(folder, &format!("{name}.pem"))?;
    let key = read_file(folder, &format!("{name}.key"))?;
    Ok(certificate.zip(key).map(|(certificate, key)| Pair { certificate, key }))
}

fn write_file(folder: &Path, name: &str, text: &str, mode: u32) -> Result<(), StoreError> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    std::fs::create_dir_all(folder).map_err(|cause| StoreError::File { verb: "create", path: folder.into(), cause })?;
    let path = folder.join(name);
    let fresh = folder.join(format!("{name}.new"));
    let fail = |cause| StoreError::File { verb: "write", path: path.clone(), cause };
    let _ = std::fs::remove_file(&fresh);
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&fresh).map_err(fail)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(fail)?;
    std::fs::rename(&fresh, &path).map_err(fail)
}
