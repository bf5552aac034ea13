//! What goes when its owner goes: garbage collection by `ownerReferences`, foreground deletion, and the contents of a namespace
//! that is being deleted.

use super::api::{Core, DeleteOptions, Request, finalizers, id_of, owners};
use super::auth::User;
use super::resource;
use super::store::revision_of;
use serde_json::{Value, json};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

/// Works until the server ends.
pub(super) async fn run(core: Arc<Core>) {
    let mut seen = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let revision = core.store.revision();
        if revision != seen {
            sweep(&core).await;
            seen = revision;
        }
    }
}

async fn sweep(core: &Arc<Core>) {
    let request = Request::new(User::system("system:serviceaccount:kube-system:generic-garbage-collector"));
    let mut uids: HashMap<String, Arc<Value>> = HashMap::new();
    let mut dependents = Vec::new();
    for key in core.store.keys() {
        for object in core.store.list(&key, None).items {
            if let Some(uid) = object["metadata"]["uid"].as_str() {
                uids.insert(uid.to_owned(), Arc::clone(&object));
            }
            if owners(&object).next().is_some() {
                dependents.push((key.clone(), object));
            }
        }
    }
    let foreground = |owner: &Value| finalizers(owner).contains(&"foregroundDeletion");
    let mut still_owned: HashSet<String> = HashSet::new();
    for (key, object) in &dependents {
        let mut live = 0;
        let mut going = false;
        for owner in owners(object) {
            match uids.get(owner) {
                Some(found) if foreground(found) => {
                    going = true;
                    still_owned.insert(owner.to_owned());
                }
                Some(_) => live += 1,
                None => {}
            }
        }
        if live > 0 || object["metadata"]["deletionTimestamp"].is_string() {
            continue;
        }
        let Some(info) = core.registry.get(&key.group, &key.resource) else { continue };
        let (ns, name) = id_of(object);
        let options = DeleteOptions {
            propagation: Some(if going { "Foreground" } else { "Background" }.into()),
            uid: object["metadata"]["uid"].as_str().map(str::to_owned),
            ..DeleteOptions::default()
        };
        let _ = core.delete(&request, &info, (&ns, &name), &options).await;
    }
    for (uid, owner) in uids.iter().filter(|(_, o)| foreground(o)) {
        if still_owned.contains(uid) {
            continue;
        }
        if let Some(key) = key_of(core, owner) {
            let (ns, name) = id_of(owner);
            let mut free = (**owner).clone();
            if let Some(list) = free["metadata"]["finalizers"].as_array_mut() {
                list.retain(|f| f != "foregroundDeletion");
            }
            if finalizers(&free).is_empty() {
                let _ = core.store.delete(&key, &ns, &name, revision_of(owner));
            } else {
                let _ = core.store.update(&key, &ns, &name, revision_of(owner), free);
            }
        }
    }
    namespaces(core, &request).await;
}

fn key_of(core: &Core, object: &Value) -> Option<resource::Key> {
    let version = object["apiVersion"].as_str()?;
    let group = version.split_once('/').map_or("", |(g, _)| g);
    Some(core.registry.by_kind(group, object["kind"].as_str()?)?.key.clone())
}

async fn namespaces(core: &Arc<Core>, request: &Request) {
    let key = resource::NAMESPACES.key();
    for namespace in core.store.list(&key, None).items {
        if !namespace["metadata"]["deletionTimestamp"].is_string() {
            continue;
        }
        let name = namespace["metadata"]["name"].as_str().unwrap_or_default();
        let mut left = 0;
        for other in core.store.keys() {
            let Some(info) = core.registry.get(&other.group, &other.resource).filter(|i| i.namespaced) else { continue };
            for object in core.store.list(&other, Some(name)).items {
                left += 1;
                let (ns, name) = id_of(&object);
                let _ = core.delete(request, &info, (&ns, &name), &DeleteOptions::default()).await;
            }
        }
        if left == 0 && finalizers(&namespace).is_empty() {
            let _ = core.store.delete(&key, "", name, revision_of(&namespace));
        } else if left == 0 {
            let mut waiting = (*namespace).clone();
            if waiting["spec"]["finalizers"] != json!([]) {
                waiting["spec"]["finalizers"] = json!([]);
                let _ = core.store.update(&key, "", name, revision_of(&namespace), waiting);
            }
        }
    }
}
