//! Which resources exist: the built-in table, and what CustomResourceDefinition objects add to it.
//!
//! An object is stored once, under group and plural; the version is only how it is spelled on the way out. That is the
//! `None` conversion of CRDs, and it is right for the built-in kinds served here, whose versions don't differ in shape
//! (those that would are served in one version only).

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Arc, RwLock};

use serde_json::Value;

/// Group, version and plural name of a resource. The version may be left to the server (empty).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Gvr {
    /// API group; empty for the core group.
    pub group: Cow<'static, str>,
    /// Version as in `apiVersion`; empty means the preferred one.
    pub version: Cow<'static, str>,
    /// Lower-case plural, such as `pods`.
    pub resource: Cow<'static, str>,
}

impl Gvr {
    /// A resource known at run time.
    pub fn new(group: &str, version: &str, resource: &str) -> Self {
        Self {
            group: Cow::Owned(group.to_owned()),
            version: Cow::Owned(version.to_owned()),
            resource: Cow::Owned(resource.to_owned()),
        }
    }

    const fn fixed(group: &'static str, version: &'static str, resource: &'static str) -> Self {
        Self { group: Cow::Borrowed(group), version: Cow::Borrowed(version), resource: Cow::Borrowed(resource) }
    }

    /// The key under which objects are stored.
    pub fn key(&self) -> Key {
        Key { group: self.group.to_string(), resource: self.resource.to_string() }
    }
}

/// Group and plural: where the objects of a resource are stored, whatever the version.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// API group; empty for the core group.
    pub group: String,
    /// Lower-case plural.
    pub resource: String,
}

impl Key {
    /// The key of a group and plural.
    pub fn new(group: &str, resource: &str) -> Self {
        Self { group: group.to_owned(), resource: resource.to_owned() }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.group.is_empty() { f.write_str(&self.resource) } else { write!(f, "{}.{}", self.resource, self.group) }
    }
}

macro_rules! gvrs {
    ($($(#[$doc:meta])* $name:ident = $group:literal $version:literal $plural:literal;)*) => {
        $($(#[$doc])* pub const $name: Gvr = Gvr::fixed($group, $version, $plural);)*
    };
}

gvrs! {
    /// `v1/pods`
    PODS = "" "v1" "pods";
    /// `v1/nodes`
    NODES = "" "v1" "nodes";
    /// `v1/namespaces`
    NAMESPACES = "" "v1" "namespaces";
    /// `v1/services`
    SERVICES = "" "v1" "services";
    /// `v1/configmaps`
    CONFIGMAPS = "" "v1" "configmaps";
    /// `v1/secrets`
    SECRETS = "" "v1" "secrets";
    /// `v1/serviceaccounts`
    SERVICEACCOUNTS = "" "v1" "serviceaccounts";
    /// `v1/events`
    EVENTS = "" "v1" "events";
    /// `v1/endpoints`
    ENDPOINTS = "" "v1" "endpoints";
    /// `apps/v1/deployments`
    DEPLOYMENTS = "apps" "v1" "deployments";
    /// `apps/v1/replicasets`
    REPLICASETS = "apps" "v1" "replicasets";
    /// `apps/v1/statefulsets`
    STATEFULSETS = "apps" "v1" "statefulsets";
    /// `apps/v1/daemonsets`
    DAEMONSETS = "apps" "v1" "daemonsets";
    /// `batch/v1/jobs`
    JOBS = "batch" "v1" "jobs";
    /// `batch/v1/cronjobs`
    CRONJOBS = "batch" "v1" "cronjobs";
    /// `discovery.k8s.io/v1/endpointslices`
    ENDPOINTSLICES = "discovery.k8s.io" "v1" "endpointslices";
    /// `coordination.k8s.io/v1/leases`
    LEASES = "coordination.k8s.io" "v1" "leases";
    /// `policy/v1/poddisruptionbudgets`
    PDBS = "policy" "v1" "poddisruptionbudgets";
    /// `apiextensions.k8s.io/v1/customresourcedefinitions`
    CRDS = "apiextensions.k8s.io" "v1" "customresourcedefinitions";
    /// `admissionregistration.k8s.io/v1/mutatingwebhookconfigurations`
    MUTATING_WEBHOOKS = "admissionregistration.k8s.io" "v1" "mutatingwebhookconfigurations";
    /// `admissionregistration.k8s.io/v1/validatingwebhookconfigurations`
    VALIDATING_WEBHOOKS = "admissionregistration.k8s.io" "v1" "validatingwebhookconfigurations";
}

/// Where the scale subresource finds its numbers (dotted paths, such as `.spec.replicas`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scale {
    /// Wanted replicas.
    pub spec: String,
    /// Observed replicas.
    pub status: String,
    /// Label selector: an object or a string.
    pub selector: Option<String>,
}

/// What differs by version.
#[derive(Debug, Clone, Default)]
pub struct VersionInfo {
    /// `openAPIV3Schema` of a CRD.
    pub schema: Option<Arc<Value>>,
    /// `additionalPrinterColumns` of a CRD.
    pub columns: Vec<Value>,
    /// Whether there is a status subresource.
    pub status: bool,
    /// The scale subresource.
    pub scale: Option<Scale>,
}

/// A resource the server serves.
#[derive(Debug, Clone)]
pub struct ResourceInfo {
    /// Where its objects are stored.
    pub key: Key,
    /// Kind of one object.
    pub kind: String,
    /// Kind of a list.
    pub list_kind: String,
    /// Lower-case singular.
    pub singular: String,
    /// Short names, such as `po`.
    pub short: Vec<String>,
    /// Categories, such as `all`.
    pub categories: Vec<String>,
    /// Whether objects live in namespaces.
    pub namespaced: bool,
    /// Served versions, the preferred one first.
    pub versions: Vec<(String, VersionInfo)>,
    /// Further subresources, such as `log`.
    pub subresources: Vec<&'static str>,
    /// Only `create`, nothing is stored (reviews).
    pub create_only: bool,
    /// Made by a CustomResourceDefinition.
    pub custom: bool,
}

impl ResourceInfo {
    /// What is particular to a version, if it is served.
    pub fn version(&self, name: &str) -> Option<&VersionInfo> {
        self.versions.iter().find(|(v, _)| v == name).map(|(_, info)| info)
    }

    /// `apiVersion` for a version of this resource.
    pub fn api_version(&self, version: &str) -> String {
        if self.key.group.is_empty() { version.to_owned() } else { format!("{}/{version}", self.key.group) }
    }

    /// The preferred version.
    pub fn preferred(&self) -> &str {
        self.versions.first().map_or("v1", |(v, _)| v.as_str())
    }
}

// group, versions, kind, plural, short names, namespaced, categories, subresources ("status" and "scale" included)
type Row = (&'static str, &'static str, &'static str, &'static str, &'static str, bool, &'static str, &'static str);

const ADM: &str = "admissionregistration.k8s.io";
const RBAC: &str = "rbac.authorization.k8s.io";
const NET: &str = "networking.k8s.io";
const STO: &str = "storage.k8s.io";

#[rustfmt::skip]
const BUILTIN: &[Row] = &[
    ("", "v1", "Pod", "pods", "po", true, "all", "status log exec attach portforward binding eviction ephemeralcontainers resize"),
    ("", "v1", "Node", "nodes", "no", false, "", "status"),
    ("", "v1", "Namespace", "namespaces", "ns", false, "", "status finalize"),
    ("", "v1", "Service", "services", "svc", true, "all", "status"),
    ("", "v1", "ConfigMap", "configmaps", "cm", true, "", ""),
    ("", "v1", "Secret", "secrets", "", true, "", ""),
    ("", "v1", "ServiceAccount", "serviceaccounts", "sa", true, "", "token"),
    ("", "v1", "Event", "events", "ev", true, "", ""),
    ("", "v1", "Endpoints", "endpoints", "ep", true, "", ""),
    ("", "v1", "LimitRange", "limitranges", "limits", true, "", ""),
    ("", "v1", "ResourceQuota", "resourcequotas", "quota", true, "", "status"),
    ("", "v1", "PersistentVolume", "persistentvolumes", "pv", false, "", "status"),
    ("", "v1", "PersistentVolumeClaim", "persistentvolumeclaims", "pvc", true, "", "status"),
    ("", "v1", "ReplicationController", "replicationcontrollers", "rc", true, "all", "status scale"),
    ("", "v1", "PodTemplate", "podtemplates", "", true, "", ""),
    ("apps", "v1", "Deployment", "deployments", "deploy", true, "all", "status scale"),
    ("apps", "v1", "ReplicaSet", "replicasets", "rs", true, "all", "status scale"),
    ("apps", "v1", "StatefulSet", "statefulsets", "sts", true, "all", "status scale"),
    ("apps", "v1", "DaemonSet", "daemonsets", "ds", true, "all", "status"),
    ("apps", "v1", "ControllerRevision", "controllerrevisions", "", true, "", ""),
    ("batch", "v1", "Job", "jobs", "", true, "all", "status"),
    ("batch", "v1", "CronJob", "cronjobs", "cj", true, "all", "status"),
    ("autoscaling", "v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers", "hpa", true, "all", "status"),
    ("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets", "pdb", true, "", "status"),
    ("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices", "", true, "", ""),
    ("coordination.k8s.io", "v1", "Lease", "leases", "", true, "", ""),
    ("events.k8s.io", "v1", "Event", "events", "ev", true, "", ""),
    (NET, "v1", "NetworkPolicy", "networkpolicies", "netpol", true, "", ""),
    (NET, "v1", "Ingress", "ingresses", "ing", true, "", "status"),
    (NET, "v1", "IngressClass", "ingressclasses", "", false, "", ""),
    (RBAC, "v1", "Role", "roles", "", true, "", ""),
    (RBAC, "v1", "RoleBinding", "rolebindings", "", true, "", ""),
    (RBAC, "v1", "ClusterRole", "clusterroles", "", false, "", ""),
    (RBAC, "v1", "ClusterRoleBinding", "clusterrolebindings", "", false, "", ""),
    (ADM, "v1", "MutatingWebhookConfiguration", "mutatingwebhookconfigurations", "", false, "api-extensions", ""),
    (ADM, "v1", "ValidatingWebhookConfiguration", "validatingwebhookconfigurations", "", false, "api-extensions", ""),
    ("apiextensions.k8s.io", "v1", "CustomResourceDefinition", "customresourcedefinitions", "crd crds", false, "api-extensions", "status"),
    ("apiregistration.k8s.io", "v1", "APIService", "apiservices", "", false, "api-extensions", "status"),
    ("scheduling.k8s.io", "v1", "PriorityClass", "priorityclasses", "pc", false, "", ""),
    ("node.k8s.io", "v1", "RuntimeClass", "runtimeclasses", "", false, "", ""),
    ("certificates.k8s.io", "v1", "CertificateSigningRequest", "certificatesigningrequests", "csr", false, "", "status approval"),
    (STO, "v1", "StorageClass", "storageclasses", "sc", false, "", ""),
    (STO, "v1", "CSIDriver", "csidrivers", "", false, "", ""),
    (STO, "v1", "CSINode", "csinodes", "", false, "", ""),
    (STO, "v1", "VolumeAttachment", "volumeattachments", "", false, "", "status"),
    ("authentication.k8s.io", "v1", "TokenReview", "tokenreviews", "", false, "", ""),
    ("authentication.k8s.io", "v1", "SelfSubjectReview", "selfsubjectreviews", "", false, "", ""),
    ("authorization.k8s.io", "v1", "SubjectAccessReview", "subjectaccessreviews", "", false, "", ""),
    ("authorization.k8s.io", "v1", "SelfSubjectAccessReview", "selfsubjectaccessreviews", "", false, "", ""),
    ("authorization.k8s.io", "v1", "LocalSubjectAccessReview", "localsubjectaccessreviews", "", true, "", ""),
    ("authorization.k8s.io", "v1", "SelfSubjectRulesReview", "selfsubjectrulesreviews", "", false, "", ""),
];

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn builtin(row: &'static Row) -> ResourceInfo {
    let (group, version, kind, plural, short, namespaced, categories, subs) = *row;
    let subs: Vec<&'static str> = subs.split_whitespace().collect();
    let scale = subs.contains(&"scale").then(|| Scale {
        spec: ".spec.replicas".to_owned(),
        status: ".status.replicas".to_owned(),
        selector: Some(".spec.selector".to_owned()),
    });
    let info = VersionInfo { schema: None, columns: Vec::new(), status: subs.contains(&"status"), scale };
    ResourceInfo {
        key: Key::new(group, plural),
        kind: kind.to_owned(),
        list_kind: if kind == "Endpoints" { "EndpointsList".to_owned() } else { format!("{kind}List") },
        singular: kind.to_lowercase(),
        short: words(short),
        categories: words(categories),
        namespaced,
        versions: vec![(version.to_owned(), info)],
        subresources: subs.into_iter().filter(|s| *s != "status" && *s != "scale").collect(),
        create_only: kind.ends_with("Review"),
        custom: false,
    }
}

/// Reads what a CustomResourceDefinition declares; `None` when a needed field is missing (validation refuses such
/// objects before they are stored).
pub fn from_crd(crd: &Value) -> Option<ResourceInfo> {
    let spec = crd.get("spec")?;
    let names = spec.get("names")?;
    let text = |v: &Value, key: &str| v.get(key).and_then(Value::as_str).map(str::to_owned);
    let list = |key: &str| -> Vec<String> {
        names.get(key).and_then(Value::as_array).into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect()
    };
    let kind = text(names, "kind")?;
    let mut versions: Vec<(String, VersionInfo)> = Vec::new();
    for version in spec.get("versions")?.as_array()? {
        if version.get("served").and_then(Value::as_bool) != Some(true) {
            continue;
        }
        let subs = version.get("subresources");
        let scale = subs.and_then(|s| s.get("scale")).and_then(|s| {
            Some(Scale {
                spec: text(s, "specReplicasPath")?,
                status: text(s, "statusReplicasPath")?,
                selector: text(s, "labelSelectorPath"),
            })
        });
        let info = VersionInfo {
            schema: version.pointer("/schema/openAPIV3Schema").cloned().map(Arc::new),
            columns: version.get("additionalPrinterColumns").and_then(Value::as_array).cloned().unwrap_or_default(),
            status: subs.is_some_and(|s| s.get("status").is_some()),
            scale,
        };
        versions.push((text(version, "name")?, info));
    }
    versions.sort_by_key(|(name, _)| std::cmp::Reverse(version_rank(name)));
    Some(ResourceInfo {
        key: Key::new(&text(spec, "group")?, &text(names, "plural")?),
        list_kind: text(names, "listKind").unwrap_or_else(|| format!("{kind}List")),
        singular: text(names, "singular").unwrap_or_else(|| kind.to_lowercase()),
        kind,
        short: list("shortNames"),
        categories: list("categories"),
        namespaced: spec.get("scope").and_then(Value::as_str) == Some("Namespaced"),
        versions,
        subresources: Vec::new(),
        create_only: false,
        custom: true,
    })
}

/// Kubernetes' order of versions: stable before beta before alpha, newer before older.
fn version_rank(version: &str) -> (u8, u32, u32) {
    let digits = |s: &str| s.chars().take_while(char::is_ascii_digit).collect::<String>();
    let Some(rest) = version.strip_prefix('v') else { return (0, 0, 0) };
    let major = digits(rest);
    let tail = &rest[major.len()..];
    let major = major.parse().unwrap_or(0);
    if tail.is_empty() {
        (3, major, 0)
    } else if let Some(n) = tail.strip_prefix("beta") {
        (2, major, n.parse().unwrap_or(0))
    } else if let Some(n) = tail.strip_prefix("alpha") {
        (1, major, n.parse().unwrap_or(0))
    } else {
        (0, 0, 0)
    }
}

/// All resources that are served now.
pub struct Registry {
    builtin: Vec<Arc<ResourceInfo>>,
    index: RwLock<HashMap<Key, Arc<ResourceInfo>>>,
}

impl Default for Registry {
    fn default() -> Self {
        let builtin: Vec<Arc<ResourceInfo>> = BUILTIN.iter().map(|row| Arc::new(self::builtin(row))).collect();
        let index = builtin.iter().map(|info| (info.key.clone(), info.clone())).collect();
        Self { builtin, index: RwLock::new(index) }
    }
}

impl Registry {
    /// The resource of that group and plural.
    pub fn get(&self, group: &str, plural: &str) -> Option<Arc<ResourceInfo>> {
        let index = self.index.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        index.get(&Key::new(group, plural)).cloned()
    }

    /// The resource of that group and kind.
    pub fn by_kind(&self, group: &str, kind: &str) -> Option<Arc<ResourceInfo>> {
        let index = self.index.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        index.values().find(|r| r.key.group == group && r.kind == kind).cloned()
    }

    /// Whether a plural is one of the server's own (a CRD can't take it).
    pub fn is_builtin(&self, key: &Key) -> bool {
        self.builtin.iter().any(|r| r.key == *key)
    }

    /// Serves what a CRD declares, in place of what it declared before.
    pub fn put_crd(&self, crd: &Value) {
        if let Some(info) = from_crd(crd)
            && !self.is_builtin(&info.key)
        {
            let mut index = self.index.write().unwrap_or_else(std::sync::PoisonError::into_inner);
            index.insert(info.key.clone(), Arc::new(info));
        }
    }

    /// Stops serving a CRD's resource.
    pub fn remove_crd(&self, key: &Key) {
        if !self.is_builtin(key) {
            self.index.write().unwrap_or_else(std::sync::PoisonError::into_inner).remove(key);
        }
    }

    /// Everything, by group (core first), in a fixed order.
    pub fn by_group(&self) -> BTreeMap<String, Vec<Arc<ResourceInfo>>> {
        let mut out: BTreeMap<String, Vec<Arc<ResourceInfo>>> = BTreeMap::new();
        let index = self.index.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        for info in index.values() {
            out.entry(info.key.group.clone()).or_default().push(info.clone());
        }
        for list in out.values_mut() {
            list.sort_by(|a, b| a.key.cmp(&b.key));
        }
        out
    }

    /// The served versions of a group, the preferred one first.
    pub fn group_versions(resources: &[Arc<ResourceInfo>]) -> Vec<String> {
        let mut out: Vec<String> = resources.iter().flat_map(|r| r.versions.iter().map(|(v, _)| v.clone())).collect();
        out.sort_by_key(|v| std::cmp::Reverse(version_rank(v)));
        out.dedup();
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_as_kubernetes_orders_them() {
        let mut versions = vec!["v1alpha3", "v1", "v1beta1", "v2", "v1beta2", "foo"];
        versions.sort_by_key(|v| std::cmp::Reverse(version_rank(v)));
        assert_eq!(versions, ["v2", "v1", "v1beta2", "v1beta1", "v1alpha3", "foo"]);
    }
}
