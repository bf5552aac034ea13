//! The API for whoever is in the same process: the controllers and the node. It goes through the very functions that REST goes through.

use super::api::{Core, DeleteOptions, Request, id_of, now};
use super::auth::User;
use super::patch::{self, PatchKind};
use super::resource::{self, Gvr};
use super::selector::Labels;
use super::status::Status;
use super::store::Watch;
use serde_json::{Value, json};
use std::sync::Arc;

/// The API for whoever is in the same process.
#[derive(Clone)]
pub struct Api {
    core: Arc<Core>,
    user: User,
}

/// A list.
#[derive(Debug, Clone)]
pub struct List {
    /// Its items.
    pub items: Vec<Value>,
    /// The revision it was made at.
    pub revision: u64,
}

impl Api {
    pub(super) fn new(core: Arc<Core>, user: User) -> Self {
        Self { core, user }
    }

    fn request(&self) -> Request {
        Request { manager: self.user.name.clone(), ..Request::new(self.user.clone()) }
    }

    /// One object.
    #[allow(clippy::unused_async)]
    pub async fn get(&self, gvr: &Gvr, ns: Option<&str>, name: &str) -> Result<Value, Status> {
        let info = self.core.info(gvr)?;
        Ok(Core::present(&info, &gvr.version, &*self.core.get(&info, ns.unwrap_or_default(), name)?))
    }

    /// The objects of a namespace (all of them without one) that a label selector matches.
    #[allow(clippy::unused_async)]
    pub async fn list(&self, gvr: &Gvr, ns: Option<&str>, labels: Option<&str>) -> Result<List, Status> {
        let info = self.core.info(gvr)?;
        let labels = labels.map(Labels::parse).transpose()?;
        let snapshot = self.core.store.list(&info.key, ns);
        let items = snapshot.items.iter().filter(|o| labels.as_ref().is_none_or(|l| l.matches(o)));
        Ok(List { items: items.map(|o| Core::present(&info, &gvr.version, o)).collect(), revision: snapshot.revision })
    }

    /// Creates an object.
    pub async fn create(&self, gvr: &Gvr, ns: Option<&str>, object: Value) -> Result<Value, Status> {
        let info = self.core.info(gvr)?;
        self.core.create(&self.request(), &info, &gvr.version, ns.unwrap_or_default(), object).await
    }

    /// Replaces an object.
    pub async fn update(&self, gvr: &Gvr, object: Value) -> Result<Value, Status> {
        self.replace(gvr, object, "").await
    }

    /// Replaces an object's status.
    pub async fn update_status(&self, gvr: &Gvr, object: Value) -> Result<Value, Status> {
        self.replace(gvr, object, "status").await
    }

    async fn replace(&self, gvr: &Gvr, object: Value, subresource: &str) -> Result<Value, Status> {
        let info = self.core.info(gvr)?;
        let (ns, name) = id_of(&object);
        self.core.modify(&self.request(), &info, &gvr.version, (&ns, &name), subresource, &|_| Ok(object.clone())).await
    }

    /// Patches an object.
    pub async fn patch(
        &self,
        gvr: &Gvr,
        ns: Option<&str>,
        name: &str,
        subresource: Option<&str>,
        kind: PatchKind,
        body: Value,
    ) -> Result<Value, Status> {
        let info = self.core.info(gvr)?;
        let change = |current: &Value| patch::apply(kind, current, &body);
        self.core
            .modify(
                &self.request(),
                &info,
                &gvr.version,
                (ns.unwrap_or_default(), name),
                subresource.unwrap_or_default(),
                &change,
            )
            .await
    }

    /// Deletes an object.
    pub async fn delete(&self, gvr: &Gvr, ns: Option<&str>, name: &str, options: DeleteOptions) -> Result<(), Status> {
        let info = self.core.info(gvr)?;
        self.core.delete(&self.request(), &info, (ns.unwrap_or_default(), name), &options).await.map(drop)
    }

    /// Puts a pod on a node.
    pub async fn bind(&self, ns: &str, pod: &str, node: &str) -> Result<(), Status> {
        let info = self.core.info(&resource::PODS)?;
        let change = |current: &Value| {
            let mut new = current.clone();
            new["spec"]["nodeName"] = json!(node);
            Ok(new)
        };
        self.core.modify(&self.request(), &info, "v1", (ns, pod), "binding", &change).await?;
        let change = |current: &Value| {
            let mut new = current.clone();
            let condition = json!({"type": "PodScheduled", "status": "True", "lastProbeTime": null, "lastTransitionTime": now()});
            let mut all: Vec<Value> = new["status"]["conditions"].as_array().cloned().unwrap_or_default();
            all.retain(|c| c["type"] != "PodScheduled");
            all.push(condition);
            new["status"]["conditions"] = Value::Array(all);
            Ok(new)
        };
        self.core.modify(&self.request(), &info, "v1", (ns, pod), "status", &change).await.map(drop)
    }

    /// Changes after a revision; 410 when that is too long ago.
    pub fn watch(&self, gvr: &Gvr, since: u64) -> Result<Watch, Status> {
        self.core
            .store
            .watch(&gvr.key(), since)
            .map_err(|oldest| Status::expired(format!("too old resource version: {since} ({oldest})")))
    }

    /// All objects, and the changes from then on.
    pub fn list_and_watch(&self, gvr: &Gvr) -> (Vec<Value>, Watch) {
        let (snapshot, watch) = self.core.store.list_and_watch(&gvr.key());
        (snapshot.items.iter().map(|o| (**o).clone()).collect(), watch)
    }

    /// A service account's token, and when it expires.
    pub fn request_token(
        &self,
        ns: &str,
        account: &str,
        audiences: &[String],
        expiration_seconds: u64,
        pod: Option<(&str, &str)>,
    ) -> Result<(String, String), Status> {
        self.core.token(ns, account, audiences, expiration_seconds, pod)
    }
}
