//! Whether the cluster at hand has our custom resources from somebody else. `kubectl apply` would overwrite them, and with them what
//! the other mesh's objects may hold. Without a kubeconfig, or when the cluster does not answer at once, nothing is known and
//! nothing is left out: `weft install` works offline.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::core::PartialObjectMeta;
use kube::{Api, Client};
use std::time::Duration;

/// The label of what is ours.
pub(crate) const OWNER: (&str, &str) = ("app.kubernetes.io/part-of", "weft");

/// How long a cluster may take to answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// Those of `names` that the cluster has without our label.
pub(crate) fn foreign(names: &[&str]) -> Vec<String> {
    if names.is_empty() {
        return Vec::new();
    }
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return Vec::new() };
    let found = runtime.block_on(async { tokio::time::timeout(PATIENCE, look(names)).await });
    // A resolver that hangs must not hold up the end.
    runtime.shutdown_background();
    match found {
        Ok(Ok(foreign)) => foreign,
        Ok(Err(_)) | Err(_) => Vec::new(),
    }
}

async fn look(names: &[&str]) -> Result<Vec<String>, kube::Error> {
    let Ok(config) = kube::Config::infer().await else { return Ok(Vec::new()) };
    let api: Api<CustomResourceDefinition> = Api::all(Client::try_from(config)?);
    let mut foreign = Vec::new();
    for name in names {
        if let Some(known) = api.get_metadata_opt(name).await?
            && !ours(&known)
        {
            foreign.push((*name).to_owned());
        }
    }
    Ok(foreign)
}

fn ours(known: &PartialObjectMeta<CustomResourceDefinition>) -> bool {
    known.metadata.labels.as_ref().is_some_and(|l| l.get(OWNER.0).is_some_and(|v| v == OWNER.1))
}
