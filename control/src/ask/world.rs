//! All that answers are computed from, at one moment: views of all namespaces, settings, keys. It can be varied ("what if this policy were
//! there?") without anybody else noticing.

use super::Unanswered;
use super::who::short;
use crate::compile::security::jwt::Keys;
use crate::compile::{self, Known, Mesh, workload};
use crate::index::View;
use crate::model::policy::Policies;
use crate::model::{Object, Pod, Service, ServicePort, Target, Transport};
use std::collections::HashMap;
use std::sync::Arc;
use weft_api::wire;

/// See the module.
#[derive(Clone, Debug)]
pub struct World {
    /// Views by namespace.
    pub views: HashMap<String, Arc<View>>,
    /// The settings.
    pub mesh: Arc<Mesh>,
    /// The keys of token issuers.
    pub keys: Arc<Keys>,
}

/// What a name like `svc/b` leads to.
#[derive(Debug)]
pub struct Behind<'a> {
    /// The view of its namespace.
    pub view: &'a View,
    /// The pods, by name; at least one.
    pub pods: Vec<&'a Pod>,
    /// The Service, if it was named.
    pub service: Option<&'a Service>,
}

impl World {
    /// What the proxy of a pod is sent.
    pub fn inbound(&self, view: &View, pod: &Pod) -> wire::Inbound {
        let none = Policies::default();
        let root = self.views.get(self.mesh.root_namespace()).map_or(&none, |view| &*view.policies);
        compile::inbound_config(pod, &Known { view, root, mesh: &self.mesh, keys: &self.keys })
    }

    /// The same world with these policies, added or in place of those of the same name.
    ///
    /// # Errors
    /// One of them can't be used, or is no policy.
    pub fn with(&self, objects: Vec<Object>) -> Result<Self, Unanswered> {
        let mut world = self.clone();
        for object in objects {
            match object {
                Object::Authorization(policy) => {
                    usable("AuthorizationPolicy", &policy)?;
                    let policies = world.policies(&policy.namespace);
                    let policy = as_old_as(policy, |name| policies.authorizations.get(name).map(|p| p.created.clone()));
                    policies.authorizations.insert(policy.name.clone(), Arc::new(policy));
                }
                Object::Peer(policy) => {
                    usable("PeerAuthentication", &policy)?;
                    let policies = world.policies(&policy.namespace);
                    let policy = as_old_as(policy, |name| policies.peers.get(name).map(|p| p.created.clone()));
                    policies.peers.insert(policy.name.clone(), Arc::new(policy));
                }
                other => {
                    let text =
                        format!("{}: only AuthorizationPolicy and PeerAuthentication can be previewed", other.kind().plural());
                    return Err(Unanswered::Bad(text));
                }
            }
        }
        Ok(world)
    }

    fn policies(&mut self, namespace: &str) -> &mut Policies {
        let view = Arc::make_mut(self.views.entry(namespace.to_owned()).or_default());
        Arc::make_mut(&mut view.policies)
    }

    /// The pods behind a name.
    ///
    /// # Errors
    /// It is none, or nothing is behind it.
    pub fn target(&self, namespace: &str, name: &str) -> Result<Behind<'_>, Unanswered> {
        let (kind, name) = name.split_once('/').filter(|(_, name)| !name.is_empty()).ok_or_else(|| {
            Unanswered::Bad(format!("{name:?}: expected TYPE/NAME, for example svc/cart, pod/cart-0 or deploy/cart"))
        })?;
        let view = self
            .views
            .get(namespace)
            .ok_or_else(|| Unanswered::NotFound(format!("nothing is known of a namespace {namespace}; does it exist?")))?;
        let living = || view.pods.values().map(AsRef::as_ref).filter(|p: &&Pod| !p.finished);
        let owner = match kind {
            "pod" | "pods" | "po" => {
                let pod = view.pods.get(name).ok_or_else(|| absent("pod", name, namespace))?;
                return Ok(Behind { view, pods: vec![pod], service: None });
            }
            "svc" | "service" | "services" => {
                let service = view.services.get(name).ok_or_else(|| absent("service", name, namespace))?;
                let pods: Vec<&Pod> = living().filter(|pod| leads_to(service, pod, view)).collect();
                if pods.is_empty() {
                    return Err(Unanswered::NotFound(format!("no pod stands behind svc/{name} in namespace {namespace}")));
                }
                return Ok(Behind { view, pods, service: Some(service) });
            }
            "deploy" | "deployment" | "deployments" => "Deployment",
            "sts" | "statefulset" | "statefulsets" => "StatefulSet",
            "ds" | "daemonset" | "daemonsets" => "DaemonSet",
            "rs" | "replicaset" | "replicasets" => "ReplicaSet",
            "job" | "jobs" => "Job",
            "cronjob" | "cronjobs" | "cj" => "CronJob",
            other => {
                return Err(Unanswered::Bad(format!("{other}: expected svc, pod, deploy, sts, ds, rs, job or cronjob")));
            }
        };
        let pods: Vec<&Pod> = living()
            .filter(|pod| {
                let root = workload::root(pod, view);
                root.kind == owner && root.name == name
            })
            .collect();
        if pods.is_empty() {
            return Err(Unanswered::NotFound(format!(
                "{} in namespace {namespace} has no pods that are known",
                short(owner, name)
            )));
        }
        Ok(Behind { view, pods, service: None })
    }
}

fn absent(kind: &str, name: &str, namespace: &str) -> Unanswered {
    Unanswered::NotFound(format!("there is no {kind} {name} in namespace {namespace}"))
}

fn usable<T>(kind: &str, policy: &crate::model::Policy<T>) -> Result<(), Unanswered> {
    match &policy.problem {
        Some(problem) => Err(Unanswered::Bad(format!("{kind} {}/{}: {problem}", policy.namespace, policy.name))),
        None => Ok(()),
    }
}

/// A policy that replaces one is as old as that; a new one is the youngest.
fn as_old_as<T>(mut policy: crate::model::Policy<T>, created: impl Fn(&str) -> Option<String>) -> crate::model::Policy<T> {
    policy.created = created(&policy.name).unwrap_or_default();
    policy
}

/// Whether a Service has a pod among its endpoints, ready or not.
fn leads_to(service: &Service, pod: &Pod, view: &View) -> bool {
    if !service.selector.is_empty() || service.external_name {
        return service.selects(&pod.labels);
    }
    view.slices.values().filter(|slice| slice.service == service.name).any(|slice| slice.names(pod))
}

/// The app's port behind a port of a Service.
pub fn app_port(pod: &Pod, service: &Service, port: &ServicePort, view: &View) -> Option<u16> {
    if service.selector.is_empty() {
        let slices = view.slices.values().filter(|slice| slice.service == service.name && slice.names(pod));
        return slices
            .flat_map(|slice| &slice.ports)
            .find(|p| p.name == port.name && p.transport == Transport::Tcp)
            .map(|p| p.port);
    }
    match &port.target {
        Target::Same => Some(port.port),
        Target::Number(number) => Some(*number),
        Target::Name(name) => named_port(pod, name),
    }
}

/// A port that a container of the app declares by name.
pub fn named_port(pod: &Pod, name: &str) -> Option<u16> {
    pod.app_containers().flat_map(|c| &c.ports).find(|p| p.name == name && p.transport == Transport::Tcp).map(|p| p.port)
}
