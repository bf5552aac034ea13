//! Where the authority's pairs are kept.
//!
//! The rule by which replicas agree is the same for both stores and both pairs: *create or read*. Who finds nothing makes a
//! pair and tries to create it; if somebody was faster, the creation fails and his pair is read. A pair that was replaced
//! names the version it replaces, so that of two replacements one fails and reads the other's.

use super::issue::Pair;
use crate::source::kube::within;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use weft_api::names;

/// Which pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// The root.
    Root,
    /// The serving certificate.
    Serving,
}

impl Slot {
    /// Name of its Secret.
    pub fn secret(self) -> &'static str {
        match self {
            Self::Root => names::CA_SECRET,
            Self::Serving => names::SERVING_SECRET,
        }
    }

    fn file(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Serving => "serving",
        }
    }
}

/// A pair as it was read. `version` is what a replacement must name.
#[derive(Clone, Debug)]
pub struct Stored {
    /// The pair; `None`: the Secret is there and empty (an operator made it, so that the control plane needs no right to
    /// create Secrets).
    pub pair: Option<Pair>,
    /// `resourceVersion`, or nothing for files.
    pub version: Option<String>,
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
        name: &'static str,
        /// Why it failed.
        cause: Box<kube::Error>,
        /// What to do.
        hint: &'static str,
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

/// Where pairs are kept.
#[derive(Clone)]
pub enum Store {
    /// Secrets of the control namespace.
    Secrets {
        /// Client of the cluster.
        client: Client,
        /// The control namespace.
        namespace: String,
    },
    /// Files of a folder, readable for the owner only.
    Folder(PathBuf),
    /// Nowhere: a new root with every start.
    Memory,
}

impl Store {
    /// Reads a pair. `None`: there is none.
    ///
    /// # Errors
    /// The store can't be reached or refuses.
    pub async fn read(&self, slot: Slot) -> Result<Option<Stored>, StoreError> {
        match self {
            Self::Secrets { client, namespace } => {
                let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
                let secret = within(api.get_opt(slot.secret())).await.map_err(|e| secret_error("read", namespace, slot, e))?;
                Ok(secret.map(|s| from_secret(&s)))
            }
            Self::Folder(folder) => read_files(folder, slot),
            Self::Memory => Ok(None),
        }
    }

    /// Writes a pair: creates it (`replaces`: nothing), or replaces what was read.
    ///
    /// # Errors
    /// The store can't be reached or refuses for another reason than that somebody was faster.
    pub async fn write(&self, slot: Slot, pair: &Pair, root: &Pair, replaces: Option<&Stored>) -> Result<Written, StoreError> {
        match self {
            Self::Secrets { client, namespace } => {
                let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
                let (verb, result) = match replaces {
                    None => {
                        ("create", within(api.create(&PostParams::default(), &secret(slot, namespace, pair, root, None))).await)
                    }
                    Some(stored) => {
                        let secret = secret(slot, namespace, pair, root, stored.version.clone());
                        ("update", within(api.replace(slot.secret(), &PostParams::default(), &secret)).await)
                    }
                };
                match result {
                    Ok(_) => Ok(Written::Yes),
                    Err(kube::Error::Api(status)) if status.code == 409 || (status.code == 404 && replaces.is_some()) => {
                        Ok(Written::Lost)
                    }
                    Err(error) => Err(secret_error(verb, namespace, slot, error)),
                }
            }
            Self::Folder(folder) => write_files(folder, slot, pair).map(|()| Written::Yes),
            Self::Memory => Ok(Written::Yes),
        }
    }
}

fn secret_error(verb: &'static str, namespace: &str, slot: Slot, cause: kube::Error) -> StoreError {
    let hint = match &cause {
        kube::Error::Api(status) if status.is_forbidden() => {
            "; the service account lacks a rule of the Role weft-control in this namespace: apply the output of `weft install` again"
        }
        kube::Error::Api(status) if status.code == 404 => "; does the namespace exist, and is --namespace right?",
        _ => "",
    };
    StoreError::Secret { verb, namespace: namespace.into(), name: slot.secret(), cause: Box::new(cause), hint }
}

/// What a Secret holds.
pub fn from_secret(secret: &Secret) -> Stored {
    let text = |key: &str| {
        let value = secret.data.as_ref()?.get(key)?;
        String::from_utf8(value.0.clone()).ok().filter(|text| !text.trim().is_empty())
    };
    let pair = text("tls.crt").zip(text("tls.key")).map(|(certificate, key)| Pair { certificate, key });
    Stored { pair, version: secret.metadata.resource_version.clone() }
}

fn secret(slot: Slot, namespace: &str, pair: &Pair, root: &Pair, version: Option<String>) -> Secret {
    let data = [("tls.crt", &pair.certificate), ("tls.key", &pair.key), ("ca.crt", &root.certificate)];
    Secret {
        metadata: ObjectMeta {
            name: Some(slot.secret().into()),
            namespace: Some(namespace.into()),
            resource_version: version,
            labels: Some(BTreeMap::from([("app.kubernetes.io/managed-by".into(), names::CONTROL.into())])),
            ..ObjectMeta::default()
        },
        type_: Some("kubernetes.io/tls".into()),
        data: Some(data.into_iter().map(|(k, v)| (k.to_owned(), ByteString(v.clone().into_bytes()))).collect()),
        ..Secret::default()
    }
}

fn read_files(folder: &Path, slot: Slot) -> Result<Option<Stored>, StoreError> {
    let read = |extension: &str| {
        let path = folder.join(format!("{}.{extension}", slot.file()));
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(cause) => Err(StoreError::File { verb: "read", path, cause }),
        }
    };
    let pair = read("pem")?.zip(read("key")?).map(|(certificate, key)| Pair { certificate, key });
    Ok(pair.map(|pair| Stored { pair: Some(pair), version: None }))
}

fn write_files(folder: &Path, slot: Slot, pair: &Pair) -> Result<(), StoreError> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    std::fs::create_dir_all(folder).map_err(|cause| StoreError::File { verb: "create", path: folder.into(), cause })?;
    // The key first: a certificate whose key is missing must never be what a crash leaves behind.
    for (extension, text, mode) in [("key", &pair.key, 0o600), ("pem", &pair.certificate, 0o644)] {
        let path = folder.join(format!("{}.{extension}", slot.file()));
        let fresh = path.with_extension(format!("{extension}.new"));
        let fail = |cause| StoreError::File { verb: "write", path: path.clone(), cause };
        let _ = std::fs::remove_file(&fresh);
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&fresh).map_err(fail)?;
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(fail)?;
        std::fs::rename(&fresh, &path).map_err(fail)?;
    }
    Ok(())
}
