//! Keeps `caBundle` of our webhook configurations right: without it the API server does not trust us, and no pod
//! is injected and no policy validated.
//!
//! It is written when it differs, whoever changed it: an `apply` of the install manifests takes it out, and is answered
//! within moments. Only webhooks that call *our* Service are touched.

use super::Bundle;
use crate::index::Index;
use crate::metrics::{Ended, Metrics};
use crate::model::{Key, Kind, Webhook};
use crate::source::kube::{backoff, within};
use k8s_openapi::api::admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use std::sync::Arc;
use tokio::sync::watch;
use tracing::{info, warn};
use weft_api::names;

/// The patch that puts a configuration right; `None` if it is right.
pub fn correction(webhook: &Webhook, service: &Key, bundle: &str) -> Option<json_patch::Patch> {
    use base64::Engine as _;
    let encoded = base64::engine::general_purpose::STANDARD.encode(bundle);
    let mut operations = Vec::new();
    for (number, entry) in webhook.entries.iter().enumerate() {
        if entry.service.as_ref() != Some(service) || entry.ca_bundle == bundle.as_bytes() {
            continue;
        }
        // The name is tested, so that a list that was reordered meanwhile is not corrected in the wrong place.
        operations.push(serde_json::json!({"op": "test", "path": format!("/webhooks/{number}/name"), "value": entry.name}));
        operations.push(
            serde_json::json!({"op": "add", "path": format!("/webhooks/{number}/clientConfig/caBundle"), "value": encoded}),
        );
    }
    if operations.is_empty() {
        return None;
    }
    serde_json::from_value(serde_json::Value::Array(operations)).ok()
}

/// Our configurations, and what it means when one of them is wrong.
const OURS: [(Kind, &str, &str); 2] = [
    (Kind::Webhook, names::WEBHOOK_CONFIGURATION, "no pod is injected"),
    (Kind::Validator, names::VALIDATOR_CONFIGURATION, "policies are not validated (or refused, with failurePolicy Fail)"),
];

/// Writes a correction.
async fn write(client: &Client, kind: Kind, name: &str, patch: &json_patch::Patch) -> Result<(), kube::Error> {
    // The client's library has its own version of the patch type; both are the same JSON.
    let patch = serde_json::to_value(patch).and_then(serde_json::from_value).map_err(kube::Error::SerdeError)?;
    let (patch, options) = (Patch::<()>::Json(patch), PatchParams::default());
    if kind == Kind::Webhook {
        let api: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
        within(api.patch(name, &options, &patch)).await.map(drop)
    } else {
        let api: Api<ValidatingWebhookConfiguration> = Api::all(client.clone());
        within(api.patch(name, &options, &patch)).await.map(drop)
    }
}

/// Keeps all our configurations right while `leader` says so, and tells in `spread` which bundle they all have. Runs until it is
/// dropped.
pub async fn run(
    client: Client,
    service: Key,
    mut bundle: Bundle,
    spread: watch::Sender<Arc<str>>,
    index: Arc<Index>,
    mut leader: watch::Receiver<bool>,
    metrics: Arc<Metrics>,
) {
    let mut failures = 0;
    // Before the list was seen, nothing is known to be right.
    if index.synced().wait_for(|synced| *synced).await.is_err() {
        return;
    }
    let mut webhooks = index.webhooks();
    loop {
        if leader.wait_for(|leads| *leads).await.is_err() {
            return;
        }
        let right = bundle.borrow_and_update().clone();
        let known = webhooks.borrow_and_update().clone();
        let mut failed = false;
        for (kind, name, otherwise) in OURS {
            let known = known.get(&(kind, name.to_owned()));
            let Some(patch) = known.and_then(|known| correction(known, &service, &right)) else { continue };
            match write(&client, kind, name, &patch).await {
                Ok(()) => {
                    metrics.ca_bundle_writes.get_or_create(&Ended::OK).inc();
                    info!("put caBundle of {name} right");
                }
                Err(error) => {
                    failed = true;
                    metrics.ca_bundle_writes.get_or_create(&Ended::ERROR).inc();
                    if failures % 10 == 0 {
                        warn!(%error, "cannot write caBundle of {} {name}; until it is right {otherwise}. Trying again", kind.plural());
                    }
                }
            }
        }
        if failed {
            failures += 1;
            tokio::time::sleep(backoff(failures)).await;
            continue;
        }
        failures = 0;
        spread.send_if_modified(|told| std::mem::replace(told, right.clone()) != right);
        tokio::select! {
            changed = bundle.changed() => if changed.is_err() { return },
            changed = webhooks.changed() => if changed.is_err() { return },
            changed = leader.changed() => if changed.is_err() { return },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::WebhookEntry;

    #[test]
    fn what_differs_is_corrected_and_nothing_else() {
        let service = Key::new("weft-system", "weft-control");
        let entry = |name: &str, service: Option<Key>, bundle: &str| WebhookEntry {
            name: name.into(),
            service,
            ca_bundle: bundle.as_bytes().into(),
        };
        let webhook = Webhook {
            name: "weft-injector".into(),
            entries: vec![
                entry("right", Some(service.clone()), "PEM"),
                entry("empty", Some(service.clone()), ""),
                entry("foreign", Some(Key::new("x", "y")), ""),
                entry("url", None, ""),
                entry("old", Some(service.clone()), "OTHER"),
            ],
        };
        let patch = serde_json::to_value(correction(&webhook, &service, "PEM").unwrap()).unwrap();
        assert_eq!(
            patch,
            serde_json::json!([
                {"op": "test", "path": "/webhooks/1/name", "value": "empty"},
                {"op": "add", "path": "/webhooks/1/clientConfig/caBundle", "value": "UEVN"},
                {"op": "test", "path": "/webhooks/4/name", "value": "old"},
                {"op": "add", "path": "/webhooks/4/clientConfig/caBundle", "value": "UEVN"},
            ])
        );
        let right = Webhook { entries: webhook.entries[..1].to_vec(), ..webhook };
        assert!(correction(&right, &service, "PEM").is_none());
    }
}
