//! Who is behind an identity or an address: a directory of the cluster's pods, made for one answer and dropped with it.

use crate::compile::workload;
use crate::index::View;
use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use weft_api::console::Source;

/// See the module.
#[derive(Debug, Default)]
pub struct Directory {
    addresses: HashMap<IpAddr, (String, String)>,
    accounts: HashMap<(String, String), BTreeSet<String>>,
}

/// `deploy/web`, `sts/db`: a workload as people write it for kubectl.
pub fn short(kind: &str, name: &str) -> String {
    let kind = match kind {
        "Deployment" => "deploy",
        "StatefulSet" => "sts",
        "DaemonSet" => "ds",
        "ReplicaSet" => "rs",
        "CronJob" => "cronjob",
        other => return format!("{}/{name}", other.to_lowercase()),
    };
    format!("{kind}/{name}")
}

/// Namespace and service account of a SPIFFE id of a mesh like ours.
pub fn account(identity: &str) -> Option<(&str, &str)> {
    let (_, path) = identity.strip_prefix("spiffe://")?.split_once('/')?;
    let (namespace, account) = path.strip_prefix("ns/")?.split_once("/sa/")?;
    (!namespace.is_empty() && !account.is_empty() && !account.contains('/')).then_some((namespace, account))
}

impl Directory {
    /// The directory of these namespaces.
    pub fn new(views: &[(String, Arc<View>)]) -> Self {
        let mut directory = Self::default();
        for (namespace, view) in views {
            for pod in view.pods.values() {
                let root = workload::root(pod, view);
                let name = short(&root.kind, &root.name);
                let account = (namespace.clone(), pod.service_account.clone());
                directory.accounts.entry(account).or_default().insert(name.clone());
                // A node's address belongs to all of its host-network pods, and a finished pod's may be another one's by now.
                if !pod.host_network && !pod.finished {
                    for address in &pod.addresses {
                        directory.addresses.insert(address.to_canonical(), (namespace.clone(), name.clone()));
                    }
                }
            }
        }
        directory
    }

    /// What is known of a sender.
    pub fn source(&self, identity: &str, address: &str) -> Source {
        let mut source = Source { identity: identity.into(), address: address.into(), ..Source::default() };
        if let Some((namespace, account)) = account(identity) {
            namespace.clone_into(&mut source.namespace);
            if let Some(workloads) = self.accounts.get(&(namespace.to_owned(), account.to_owned()))
                && workloads.len() == 1
            {
                source.workload = workloads.first().cloned().unwrap_or_default();
            }
        } else if let Some((namespace, workload)) =
            address.parse::<IpAddr>().ok().and_then(|a| self.addresses.get(&a.to_canonical()))
        {
            source.namespace.clone_from(namespace);
            source.workload.clone_from(workload);
        }
        source
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_and_addresses_lead_to_workloads() {
        let index = crate::index::Index::new([]);
        let yaml = "
apiVersion: v1
kind: Pod
metadata: {name: web-5d4f-x, namespace: shop, labels: {pod-template-hash: 5d4f}, ownerReferences: [{apiVersion: apps/v1, kind: ReplicaSet, name: web-5d4f, uid: u, controller: true}]}
spec: {serviceAccountName: web, containers: [{name: c}]}
status: {podIPs: [{ip: 10.0.0.1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: shop}
spec: {serviceAccountName: shared, containers: [{name: c}]}
---
apiVersion: v1
kind: Pod
metadata: {name: b, namespace: shop}
spec: {serviceAccountName: shared, hostNetwork: true, containers: [{name: c}]}
status: {podIPs: [{ip: 10.9.0.1}]}
";
        let documents: Vec<serde_json::Value> = serde_saphyr::from_multiple(yaml).unwrap();
        index.replace(documents.into_iter().map(|d| crate::source::wire::parse(d).unwrap().unwrap()));
        let directory = Directory::new(&index.views());
        for (identity, address, namespace, workload) in [
            ("spiffe://cluster.local/ns/shop/sa/web", "", "shop", "deploy/web"),
            ("spiffe://cluster.local/ns/shop/sa/shared", "", "shop", ""),
            ("spiffe://cluster.local/ns/gone/sa/x", "", "gone", ""),
            ("spiffe://cluster.local/other", "", "", ""),
            ("", "10.0.0.1", "shop", "deploy/web"),
            ("", "::ffff:10.0.0.1", "shop", "deploy/web"),
            ("", "10.9.0.1", "", ""),
            ("", "nonsense", "", ""),
        ] {
            let source = directory.source(identity, address);
            assert_eq!((source.namespace.as_str(), source.workload.as_str()), (namespace, workload), "{identity} {address}");
        }
    }
}
