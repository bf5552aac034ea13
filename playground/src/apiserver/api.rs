//! The life of a write: defaults, the server's own admission, webhooks, validation, storage. REST and the in-process
//! [`Api`](super::client::Api) go through the same functions.

use super::admission::{Call, Operation};
use super::auth::{Authority, User};
use super::backend::NodeBackend;
use super::patch;
use super::resource::{self, Gvr, Key, Registry, ResourceInfo};
use super::status::Status;
use super::store::{Store, WriteError, revision_of};
use super::{admission, defaults};
use k8s_openapi::jiff::Timestamp;
use rand::Rng as _;
use serde_json::{Map, Value, json};
use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// Namespaces that nobody may delete, as Kubernetes' admission plug-in NamespaceLifecycle has them.
const IMMORTAL: [&str; 3] = ["default", "kube-system", "kube-public"];

/// Everything that the server is.
pub struct Core {
    /// The objects.
    pub store: Store,
    /// The resources.
    pub registry: Registry,
    /// Certificates and tokens.
    pub authority: Authority,
    /// Range of cluster IPs.
    pub services: (Ipv4Addr, u8),
    backend: RwLock<Option<Arc<dyn NodeBackend>>>,
    allocation: Mutex<()>,
}

/// How a write is made.
pub struct Request {
    /// Who.
    pub user: User,
    /// Nothing is stored.
    pub dry_run: bool,
    /// Field manager.
    pub manager: String,
    /// Warnings of webhooks, for the client.
    pub warnings: Mutex<Vec<String>>,
}

impl Request {
    /// A plain one.
    pub fn new(user: User) -> Self {
        Self { user, dry_run: false, manager: "weft-playground".into(), warnings: Mutex::default() }
    }

    pub(super) fn warn(&self, text: String) {
        let mut all = self.warnings.lock().unwrap_or_else(PoisonError::into_inner);
        if !all.contains(&text) {
            all.push(text);
        }
    }
}

/// Options of a deletion.
#[derive(Debug, Clone, Default)]
pub struct DeleteOptions {
    /// Seconds; absent: the object's own.
    pub grace_period_seconds: Option<u64>,
    /// `Background`, `Foreground` or `Orphan`.
    pub propagation: Option<String>,
    /// Only if it still has this uid.
    pub uid: Option<String>,
    /// Only if it is still at this resourceVersion.
    pub resource_version: Option<String>,
    /// Nothing is deleted.
    pub dry_run: bool,
}

/// Five characters as Kubernetes appends them to names.
pub fn suffix() -> String {
    const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut rng = rand::rng();
    (0..5).map(|_| char::from(LETTERS[rng.random_range(0..LETTERS.len())])).collect()
}

pub(super) fn uid() -> String {
    let mut b: [u8; 16] = rand::random();
    b[6] = (b[6] & 0x0f) | 0x40;
    b[8] = (b[8] & 0x3f) | 0x80;
    let h: String = b.iter().map(|x| format!("{x:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &h[..8], &h[8..12], &h[12..16], &h[16..20], &h[20..])
}

/// Seconds since 1970.
pub fn seconds() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX))
}

/// A time as Kubernetes writes it.
pub fn rfc3339(seconds: i64) -> String {
    Timestamp::from_second(seconds).unwrap_or_default().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// The time as Kubernetes writes it.
pub fn now() -> String {
    rfc3339(seconds())
}

fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// `metadata.namespace` and `metadata.name`.
pub fn id_of(object: &Value) -> (String, String) {
    (text(object, "/metadata/namespace").to_owned(), text(object, "/metadata/name").to_owned())
}

impl Core {
    /// An empty cluster.
    pub fn new(history: usize, services: (Ipv4Addr, u8)) -> anyhow::Result<Self> {
        Ok(Self {
            store: Store::new(history),
            registry: Registry::default(),
            authority: Authority::new()?,
            services,
            backend: RwLock::new(None),
            allocation: Mutex::new(()),
        })
    }

    /// Who runs the pods.
    pub fn set_backend(&self, backend: Arc<dyn NodeBackend>) {
        *self.backend.write().unwrap_or_else(PoisonError::into_inner) = Some(backend);
    }

    /// Who runs the pods, once somebody does.
    pub fn backend(&self) -> Result<Arc<dyn NodeBackend>, Status> {
        let backend = self.backend.read().unwrap_or_else(PoisonError::into_inner).clone();
        backend.ok_or_else(|| Status::new(503, "ServiceUnavailable", "the node is not up yet"))
    }

    /// The resource of a GVR.
    pub fn info(&self, gvr: &Gvr) -> Result<Arc<ResourceInfo>, Status> {
        let found = self.registry.get(&gvr.group, &gvr.resource);
        found.ok_or_else(|| Status::new(404, "NotFound", "the server could not find the requested resource"))
    }

    /// The object as it is spelled in this version.
    pub fn present(info: &ResourceInfo, version: &str, object: &Value) -> Value {
        let mut out = object.clone();
        if let Some(map) = out.as_object_mut() {
            let version = if version.is_empty() { info.preferred() } else { version };
            map.insert("apiVersion".into(), json!(info.api_version(version)));
            map.insert("kind".into(), json!(info.kind));
        }
        out
    }

    /// One object.
    pub fn get(&self, info: &ResourceInfo, ns: &str, name: &str) -> Result<Arc<Value>, Status> {
        self.store.get(&info.key, ns, name).ok_or_else(|| Status::not_found(&info.key.group, &info.key.resource, name))
    }

    fn check_namespace(&self, info: &ResourceInfo, ns: &str, name: &str) -> Result<(), Status> {
        if !info.namespaced {
            return Ok(());
        }
        let Some(namespace) = self.store.get(&resource::NAMESPACES.key(), "", ns) else {
            return Err(Status::not_found("", "namespaces", ns));
        };
        if !text(&namespace, "/metadata/deletionTimestamp").is_empty() {
            let why = format!("unable to create new content in namespace {ns} because it is being terminated");
            return Err(Status::forbidden(&info.key.group, &info.key.resource, name, &why));
        }
        Ok(())
    }

    /// Creates an object.
    pub async fn create(
        &self,
        request: &Request,
        info: &ResourceInfo,
        version: &str,
        ns: &str,
        mut object: Value,
    ) -> Result<Value, Status> {
        if !object.is_object() {
            return Err(Status::bad_request("the body is no object"));
        }
        if !object["metadata"].is_object() {
            object["metadata"] = json!({});
        }
        let given = text(&object, "/metadata/namespace").to_owned();
        if info.namespaced {
            if !given.is_empty() && given != ns {
                return Err(Status::bad_request(format!(
                    "the namespace of the provided object does not match the namespace sent on the request ({given} and {ns})"
                )));
            }
            object["metadata"]["namespace"] = json!(ns);
        } else if let Some(meta) = object["metadata"].as_object_mut() {
            meta.remove("namespace");
        }
        let generate = text(&object, "/metadata/generateName").to_owned();
        let name = text(&object, "/metadata/name").to_owned();
        self.check_namespace(info, ns, &name)?;
        if !text(&object, "/metadata/resourceVersion").is_empty() {
            return Err(Status::bad_request("resourceVersion should not be set on objects to be created"));
        }
        let v = info.version(if version.is_empty() { info.preferred() } else { version }).cloned().unwrap_or_default();
        if let Some(meta) = object["metadata"].as_object_mut() {
            for field in ["uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "generation"]
            {
                meta.remove(field);
            }
            if v.status || info.custom {
                meta.insert("generation".into(), json!(1));
            }
        }
        if v.status
            && let Some(map) = object.as_object_mut()
        {
            map.remove("status");
        }
        let mut object = Self::present(info, version, &object);
        events(info, &mut object);
        defaults::apply(info, &mut object);
        let pod = info.key == resource::PODS.key();
        if pod {
            defaults::service_account(&mut object);
        }
        let call = Call { info, version, operation: Operation::Create, subresource: "", namespace: ns, old: None };
        object = admission::mutate(self, request, &call, object, pod).await?;
        // Like the real server, only now: mutating webhooks see a pod of a ReplicaSet without name and uid.
        if text(&object, "/metadata/name").is_empty() && !generate.is_empty() {
            object["metadata"]["name"] = json!(format!("{generate}{}", suffix()));
        }
        object["metadata"]["uid"] = json!(uid());
        object["metadata"]["creationTimestamp"] = json!(now());
        let name = text(&object, "/metadata/name").to_owned();
        defaults::apply(info, &mut object);
        if info.key == resource::CRDS.key() {
            established(&mut object);
        }
        if pod {
            let account = text(&object, "/spec/serviceAccountName").to_owned();
            if self.store.get(&resource::SERVICEACCOUNTS.key(), ns, &account).is_none() {
                let why = format!("error looking up service account {ns}/{account}: serviceaccount \"{account}\" not found");
                return Err(Status::forbidden("", "pods", &name, &why));
            }
        }
        patch::track(
            &mut object,
            None,
            &request.manager,
            "Update",
            &info.api_version(version),
            "",
            patch::Shape::of(info, version),
        );
        defaults::validate(info, &object)?;
        admission::validate(self, request, &call, &object).await?;
        if request.dry_run {
            return match self.store.get(&info.key, ns, text(&object, "/metadata/name")) {
                Some(_) => Err(Status::already_exists(&info.key.group, &info.key.resource, &name)),
                None => Ok(object),
            };
        }
        let _allocating = self.allocation.lock().unwrap_or_else(PoisonError::into_inner);
        if info.key == resource::SERVICES.key() {
            self.allocate(&mut object)?;
        }
        let name = text(&object, "/metadata/name").to_owned();
        let stored = self
            .store
            .create(&info.key, ns, &name, object)
            .map_err(|_| Status::already_exists(&info.key.group, &info.key.resource, &name))?;
        self.created(info, &stored);
        Ok(Self::present(info, version, &stored))
    }

    fn created(&self, info: &ResourceInfo, object: &Value) {
        if info.key == resource::CRDS.key() {
            self.registry.put_crd(object);
        } else if info.key == resource::NAMESPACES.key() {
            let ns = text(object, "/metadata/name");
            let meta = |name: &str| json!({"name": name, "namespace": ns, "uid": uid(), "creationTimestamp": now()});
            let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta("default")});
            let root = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta("kube-root-ca.crt"), "data": {"ca.crt": self.authority.ca_pem()}});
            let _ = self.store.create(&resource::SERVICEACCOUNTS.key(), ns, "default", account);
            let _ = self.store.create(&resource::CONFIGMAPS.key(), ns, "kube-root-ca.crt", root);
        }
    }

    /// Gives a Service its cluster IP.
    fn allocate(&self, service: &mut Value) -> Result<(), Status> {
        let spec = &service["spec"];
        let kind = spec["type"].as_str().unwrap_or("ClusterIP").to_owned();
        if kind == "ExternalName" {
            return Ok(());
        }
        let all = self.store.list(&resource::SERVICES.key(), None).items;
        let used: HashSet<String> = all.iter().map(|s| text(s, "/spec/clusterIP").to_owned()).collect();
        let wanted = spec["clusterIP"].as_str().unwrap_or_default().to_owned();
        let ip = if wanted == "None" {
            wanted
        } else if wanted.is_empty() {
            let base = u32::from(self.services.0);
            let size = 1u32 << (32 - u32::from(self.services.1));
            let free = (10..size - 1).map(|i| Ipv4Addr::from(base + i).to_string()).find(|ip| !used.contains(ip));
            free.ok_or_else(|| Status::internal("no cluster IP is left"))?
        } else if used.contains(&wanted) {
            let cause = ("spec.clusterIPs".to_owned(), format!("Invalid value: [{wanted:?}]: provided IP is already allocated"));
            return Err(Status::invalid("", "Service", text(service, "/metadata/name"), &[cause]));
        } else {
            wanted
        };
        service["spec"]["clusterIP"] = json!(ip);
        service["spec"]["clusterIPs"] = json!([ip]);
        if kind != "ClusterIP" {
            let ports: HashSet<u64> = all
                .iter()
                .flat_map(|s| s["spec"]["ports"].as_array().cloned().unwrap_or_default())
                .filter_map(|p| p["nodePort"].as_u64())
                .collect();
            let mut next = 30000;
            for port in service["spec"]["ports"].as_array_mut().into_iter().flatten() {
                if port["nodePort"].as_u64().unwrap_or(0) == 0 {
                    while ports.contains(&next) {
                        next += 1;
                    }
                    port["nodePort"] = json!(next);
                    next += 1;
                }
            }
        }
        Ok(())
    }

    /// Changes an object by a function of its current state; tried again when somebody else was faster, unless the change names
    /// a resourceVersion.
    pub async fn modify(
        &self,
        request: &Request,
        info: &ResourceInfo,
        version: &str,
        (ns, name): (&str, &str),
        subresource: &str,
        change: &(dyn Fn(&Value) -> Result<Value, Status> + Send + Sync),
    ) -> Result<Value, Status> {
        let conflict = || {
            Status::conflict(
                &info.key.group,
                &info.key.resource,
                name,
                "the object has been modified; please apply your changes to the latest version and try again",
            )
        };
        for _ in 0..20 {
            let current = self.get(info, ns, name)?;
            let shown = Self::present(info, version, &current);
            let mut new = change(&shown)?;
            let given = text(&new, "/metadata/resourceVersion").to_owned();
            if !given.is_empty() && given != text(&current, "/metadata/resourceVersion") {
                return Err(conflict());
            }
            let uid = text(&new, "/metadata/uid");
            if !uid.is_empty() && uid != text(&current, "/metadata/uid") {
                return Err(Status::conflict(
                    &info.key.group,
                    &info.key.resource,
                    name,
                    "Precondition failed: UID in object meta is another",
                ));
            }
            keep(info, version, subresource, &current, &mut new)?;
            new = Self::present(info, version, &new);
            events(info, &mut new);
            defaults::apply(info, &mut new);
            if info.key == resource::CRDS.key() {
                established(&mut new);
            }
            let call = Call { info, version, operation: Operation::Update, subresource, namespace: ns, old: Some(&shown) };
            new = admission::mutate(self, request, &call, new, false).await?;
            if info.key == resource::PODS.key() && subresource.is_empty() {
                pod_is_immutable(&current, &new)?;
            }
            if info.key == resource::SERVICES.key()
                && text(&new, "/spec/clusterIP").is_empty()
                && text(&new, "/spec/type") != "ExternalName"
            {
                new["spec"]["clusterIP"] = current["spec"]["clusterIP"].clone();
                new["spec"]["clusterIPs"] = current["spec"]["clusterIPs"].clone();
            }
            if subresource != "status" {
                defaults::validate(info, &new)?;
            }
            admission::validate(self, request, &call, &new).await?;
            if same(&current, &new) {
                return Ok(shown);
            }
            if !new["metadata"]["generation"].is_null() && differs(&current, &new) {
                let generation = current["metadata"]["generation"].as_i64().unwrap_or(0) + 1;
                new["metadata"]["generation"] = json!(generation);
            }
            patch::track(
                &mut new,
                Some(&current),
                &request.manager,
                "Update",
                &info.api_version(version),
                subresource,
                patch::Shape::of(info, version),
            );
            if request.dry_run {
                return Ok(new);
            }
            let gone = !text(&new, "/metadata/deletionTimestamp").is_empty()
                && finalizers(&new).is_empty()
                && (info.key != resource::PODS.key() || new["metadata"]["deletionGracePeriodSeconds"] == json!(0))
                && (info.key != resource::NAMESPACES.key() || new["spec"]["finalizers"].as_array().is_none_or(Vec::is_empty));
            let revision = revision_of(&current);
            let stored = if gone && !finalizers(&current).is_empty() {
                self.store.delete(&info.key, ns, name, revision)
            } else {
                self.store.update(&info.key, ns, name, revision, new)
            };
            match stored {
                Ok(stored) => {
                    if info.key == resource::CRDS.key() {
                        self.registry.put_crd(&stored);
                    }
                    return Ok(Self::present(info, version, &stored));
                }
                Err(WriteError::Missing) => return Err(Status::not_found(&info.key.group, &info.key.resource, name)),
                Err(_) if !given.is_empty() => return Err(conflict()),
                Err(_) => {}
            }
        }
        Err(conflict())
    }

    /// Deletes an object, or marks it for whoever has to finish it first. Returns its last state and whether it is gone.
    pub async fn delete(
        &self,
        request: &Request,
        info: &ResourceInfo,
        (ns, name): (&str, &str),
        options: &DeleteOptions,
    ) -> Result<(Value, bool), Status> {
        for _ in 0..20 {
            let current = self.get(info, ns, name)?;
            let conflict = |why: &str| Err(Status::conflict(&info.key.group, &info.key.resource, name, why));
            if options.uid.as_deref().is_some_and(|u| u != text(&current, "/metadata/uid")) {
                return conflict("Precondition failed: UID in precondition is another");
            }
            if options.resource_version.as_deref().is_some_and(|v| v != text(&current, "/metadata/resourceVersion")) {
                return conflict("Precondition failed: ResourceVersion in precondition is another");
            }
            let call =
                Call { info, version: "", operation: Operation::Delete, subresource: "", namespace: ns, old: Some(&current) };
            if info.key == resource::NAMESPACES.key() && IMMORTAL.contains(&name) {
                return Err(Status::forbidden("", "namespaces", name, "this namespace may not be deleted"));
            }
            admission::validate(self, request, &call, &Value::Null).await?;
            if options.dry_run || request.dry_run {
                return Ok(((*current).clone(), true));
            }
            let mut new = (*current).clone();
            let mut wait = false;
            match options.propagation.as_deref() {
                Some("Foreground") if self.has_dependents(&current) => add_finalizer(&mut new, "foregroundDeletion"),
                Some("Orphan") => self.orphan(&current),
                _ => {}
            }
            let mut grace = 0;
            if info.key == resource::PODS.key() {
                let own = current["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap_or(30);
                grace = options.grace_period_seconds.unwrap_or(own);
                let before = current["metadata"]["deletionGracePeriodSeconds"].as_u64().unwrap_or(u64::MAX);
                grace = grace.min(before);
                wait = grace > 0 && !text(&current, "/spec/nodeName").is_empty();
            }
            if info.key == resource::NAMESPACES.key() {
                new["status"]["phase"] = json!("Terminating");
                wait = true;
            }
            wait |= !finalizers(&new).is_empty();
            if wait {
                if text(&current, "/metadata/deletionTimestamp").is_empty()
                    || new["metadata"]["deletionGracePeriodSeconds"] != json!(grace)
                {
                    new["metadata"]["deletionTimestamp"] = json!(rfc3339(seconds() + i64::try_from(grace).unwrap_or(0)));
                    new["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
                }
                if same(&current, &new) {
                    return Ok((new, false));
                }
                match self.store.update(&info.key, ns, name, revision_of(&current), new) {
                    Ok(stored) => return Ok(((*stored).clone(), false)),
                    Err(WriteError::Missing) => return Err(Status::not_found(&info.key.group, &info.key.resource, name)),
                    Err(_) => continue,
                }
            }
            match self.store.delete(&info.key, ns, name, revision_of(&current)) {
                Ok(last) => {
                    self.deleted(info, &last);
                    return Ok(((*last).clone(), true));
                }
                Err(WriteError::Missing) => return Err(Status::not_found(&info.key.group, &info.key.resource, name)),
                Err(_) => {}
            }
        }
        Err(Status::conflict(&info.key.group, &info.key.resource, name, "the object keeps changing"))
    }

    fn deleted(&self, info: &ResourceInfo, object: &Value) {
        if info.key == resource::CRDS.key()
            && let Some(gone) = resource::from_crd(object)
        {
            for item in self.store.list(&gone.key, None).items {
                let (ns, name) = id_of(&item);
                let _ = self.store.delete(&gone.key, &ns, &name, revision_of(&item));
            }
            self.registry.remove_crd(&gone.key);
        }
    }

    fn has_dependents(&self, owner: &Value) -> bool {
        let uid = text(owner, "/metadata/uid");
        self.store.keys().iter().any(|key| self.store.list(key, None).items.iter().any(|o| owners(o).any(|u| u == uid)))
    }

    fn orphan(&self, owner: &Value) {
        let uid = text(owner, "/metadata/uid").to_owned();
        for key in self.store.keys() {
            for item in self.store.list(&key, None).items {
                if owners(&item).any(|u| u == uid) {
                    let mut free = (*item).clone();
                    if let Some(list) = free["metadata"]["ownerReferences"].as_array_mut() {
                        list.retain(|r| r["uid"] != json!(uid));
                    }
                    let (ns, name) = id_of(&item);
                    let _ = self.store.update(&key, &ns, &name, revision_of(&item), free);
                }
            }
        }
    }
}

/// The status of a CustomResourceDefinition: its names are accepted and it is served as soon as it is stored.
fn established(crd: &mut Value) {
    let since = crd.pointer("/status/conditions/0/lastTransitionTime").cloned().unwrap_or_else(|| json!(now()));
    let condition = |kind: &str, reason: &str, message: &str| json!({"type": kind, "status": "True", "lastTransitionTime": since, "reason": reason, "message": message});
    let storage = crd["spec"]["versions"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|v| v["storage"] == json!(true))
        .map(|v| v["name"].clone());
    let mut stored: Vec<Value> = crd["status"]["storedVersions"].as_array().cloned().unwrap_or_default();
    for version in storage {
        if !stored.contains(&version) {
            stored.push(version);
        }
    }
    let conditions = [
        condition("NamesAccepted", "NoConflicts", "no conflicts found"),
        condition("Established", "InitialNamesAccepted", "the initial names have been accepted"),
    ];
    crd["status"] = json!({"conditions": conditions, "acceptedNames": crd["spec"]["names"], "storedVersions": stored});
}

/// uids of an object's owners.
pub fn owners(object: &Value) -> impl Iterator<Item = &str> {
    object["metadata"]["ownerReferences"].as_array().into_iter().flatten().filter_map(|r| r["uid"].as_str())
}

/// Finalizers of an object.
pub fn finalizers(object: &Value) -> Vec<&str> {
    object["metadata"]["finalizers"].as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

fn add_finalizer(object: &mut Value, name: &str) {
    if !finalizers(object).contains(&name) {
        match object["metadata"]["finalizers"].as_array_mut() {
            Some(list) => list.push(json!(name)),
            None => object["metadata"]["finalizers"] = json!([name]),
        }
    }
}

/// What a change can't touch.
fn keep(info: &ResourceInfo, version: &str, subresource: &str, current: &Value, new: &mut Value) -> Result<(), Status> {
    if !new.is_object() {
        return Err(Status::bad_request("the body is no object"));
    }
    if !new["metadata"].is_object() {
        new["metadata"] = json!({});
    }
    for field in [
        "name",
        "namespace",
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
        "generateName",
        "resourceVersion",
        "selfLink",
    ] {
        match current["metadata"].get(field) {
            Some(value) => new["metadata"][field] = value.clone(),
            None => {
                if let Some(meta) = new["metadata"].as_object_mut() {
                    meta.remove(field);
                }
            }
        }
    }
    let v = info.version(if version.is_empty() { info.preferred() } else { version }).cloned().unwrap_or_default();
    let copy = |new: &mut Value, field: &str| match current.get(field) {
        Some(value) => new[field] = value.clone(),
        None => {
            if let Some(map) = new.as_object_mut() {
                map.remove(field);
            }
        }
    };
    if subresource == "status" {
        let status = new.get("status").cloned();
        let metadata = new["metadata"].clone();
        *new = current.clone();
        new["status"] = status.unwrap_or(Value::Null);
        if new["status"].is_null()
            && let Some(map) = new.as_object_mut()
        {
            map.remove("status");
        }
        if info.custom || info.key == resource::NODES.key() {
            for field in ["labels", "annotations", "managedFields"] {
                if !metadata[field].is_null() {
                    new["metadata"][field] = metadata[field].clone();
                }
            }
        }
    } else if v.status {
        copy(new, "status");
    }
    Ok(())
}

fn without_book(object: &Value) -> Value {
    let mut plain = object.clone();
    if let Some(meta) = plain.get_mut("metadata").and_then(Value::as_object_mut) {
        meta.remove("managedFields");
        meta.remove("resourceVersion");
    }
    if let Some(map) = plain.as_object_mut() {
        map.remove("apiVersion");
        map.remove("kind");
    }
    plain
}

fn same(a: &Value, b: &Value) -> bool {
    without_book(a) == without_book(b) && a["metadata"]["managedFields"] == b["metadata"]["managedFields"]
}

fn differs(a: &Value, b: &Value) -> bool {
    let strip = |o: &Value| {
        let mut o = without_book(o);
        if let Some(map) = o.as_object_mut() {
            map.remove("metadata");
            map.remove("status");
        }
        o
    };
    strip(a) != strip(b)
}

fn pod_is_immutable(old: &Value, new: &Value) -> Result<(), Status> {
    let strip = |pod: &Value| {
        let mut spec = pod["spec"].clone();
        if let Some(map) = spec.as_object_mut() {
            for field in ["activeDeadlineSeconds", "tolerations", "terminationGracePeriodSeconds", "nodeName"] {
                map.remove(field);
            }
            for list in ["containers", "initContainers"] {
                for c in map.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
                    if let Some(c) = c.as_object_mut() {
                        c.remove("image");
                        c.remove("imagePullPolicy");
                    }
                }
            }
        }
        spec
    };
    if strip(old) == strip(new) {
        return Ok(());
    }
    let cause = ("spec".to_owned(), "Forbidden: pod updates may not change fields other than `spec.containers[*].image`, `spec.initContainers[*].image`, `spec.activeDeadlineSeconds`, `spec.tolerations`".to_owned());
    Err(Status::invalid("", "Pod", text(new, "/metadata/name"), &[cause]))
}

/// Both spellings of an Event: what one API group calls a note is a message in the other.
fn events(info: &ResourceInfo, object: &mut Value) {
    if info.kind != "Event" {
        return;
    }
    for (a, b) in [("regarding", "involvedObject"), ("note", "message"), ("reportingController", "reportingComponent")] {
        if object[a].is_null() && !object[b].is_null() {
            object[a] = object[b].clone();
        } else if object[b].is_null() && !object[a].is_null() {
            object[b] = object[a].clone();
        }
    }
    if object["source"].is_null() && !object["reportingComponent"].is_null() {
        object["source"] = json!({"component": object["reportingComponent"]});
    }
}

/// Where events of both groups are stored.
pub fn canonical(key: &Key) -> Key {
    if key.group == "events.k8s.io" { resource::EVENTS.key() } else { key.clone() }
}

impl Core {
    /// A service account's token, and when it expires (RFC 3339).
    pub fn token(
        &self,
        ns: &str,
        account: &str,
        audiences: &[String],
        seconds: u64,
        pod: Option<(&str, &str)>,
    ) -> Result<(String, String), Status> {
        let object = self
            .store
            .get(&resource::SERVICEACCOUNTS.key(), ns, account)
            .ok_or_else(|| Status::not_found("", "serviceaccounts", account))?;
        let (token, exp) = self.authority.token(ns, (account, text(&object, "/metadata/uid")), audiences, seconds, pod);
        Ok((token, rfc3339(i64::try_from(exp).unwrap_or(i64::MAX))))
    }
}

/// A map with one entry.
pub fn entry(key: &str, value: Value) -> Map<String, Value> {
    Map::from_iter([(key.to_owned(), value)])
}
