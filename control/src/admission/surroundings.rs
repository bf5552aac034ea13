//! What validation may know of the cluster, out of the index. Nothing here waits: what is not in memory is not known.

use crate::ask::{EdgeQuestion, MOST_EDGES, Mind, workload_of};
use crate::compile::security::provider;
use crate::compile::{Mesh, inbound, workload};
use crate::index::{Index, View};
use crate::model::{Pod, Transport};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use weft_api::wire;
use weft_webhook::validate::{PlaintextCaller, PodFacts, PodPort, Protocol, ServicePort, Surroundings};

type Labels = BTreeMap<String, String>;

/// Tells who called the pods with some labels, in one namespace or in all, without mutual TLS; the most frequent first.
pub type PlaintextCallers = Box<dyn Fn(Option<&str>, &Labels) -> Vec<PlaintextCaller> + Send + Sync>;

/// The cluster as the index knows it.
pub struct Known {
    index: Arc<Index>,
    mesh: watch::Receiver<Arc<Mesh>>,
    plaintext: Option<PlaintextCallers>,
}

impl Known {
    /// Out of these.
    pub fn new(index: Arc<Index>, mesh: watch::Receiver<Arc<Mesh>>) -> Self {
        Self { index, mesh, plaintext: None }
    }

    /// With what the proxies reported of callers without mutual TLS. Without it nothing is said about them.
    #[must_use]
    pub fn with_plaintext_callers(self, callers: PlaintextCallers) -> Self {
        Self { plaintext: Some(callers), ..self }
    }

    /// Whether the index is whole: before, what is not in it may exist all the same.
    fn synced(&self) -> bool {
        *self.index.synced().borrow()
    }
}

impl Surroundings for Known {
    fn root_namespace(&self) -> Option<String> {
        Some(self.mesh.borrow().root_namespace().to_owned())
    }

    fn trust_domains(&self) -> Vec<String> {
        let mesh = self.mesh.borrow();
        std::iter::once(&mesh.trust_domain).chain(&mesh.policy.trust_domain_aliases).cloned().collect()
    }

    fn has_namespace(&self, name: &str) -> Option<bool> {
        self.synced().then(|| self.index.namespace(name).is_some())
    }

    fn has_provider(&self, name: &str) -> Option<bool> {
        Some(provider::authorizer(name, &self.mesh.borrow()).is_some())
    }

    fn pods(&self, namespace: Option<&str>, labels: &Labels) -> Option<Vec<PodFacts>> {
        if !self.synced() {
            return None;
        }
        let mesh = self.mesh.borrow().clone();
        let views = match namespace {
            Some(name) => self.index.view(name).into_iter().collect(),
            None => self.index.views().into_iter().map(|(_, view)| view).collect::<Vec<_>>(),
        };
        let of_view = |view: &Arc<View>| {
            let selected = view.pods.values().filter(|p| !p.finished && labels.iter().all(|(k, v)| p.labels.get(k) == Some(v)));
            selected.map(|pod| facts(pod, view, &mesh)).collect::<Vec<_>>()
        };
        Some(views.iter().flat_map(of_view).collect())
    }

    fn plaintext_callers(&self, namespace: Option<&str>, labels: &Labels) -> Vec<PlaintextCaller> {
        self.plaintext.as_ref().map(|callers| callers(namespace, labels)).unwrap_or_default()
    }
}

/// How far back callers without mutual TLS count: who calls once an hour should be seen, who was moved into the mesh yesterday should not.
const SINCE: Duration = Duration::from_secs(3600);

/// Tells callers without mutual TLS by what proxies reported to this replica.
pub fn reported(mind: Arc<Mind>) -> PlaintextCallers {
    Box::new(move |namespace, labels| callers(&mind, namespace, labels))
}

fn callers(mind: &Mind, namespace: Option<&str>, labels: &Labels) -> Vec<PlaintextCaller> {
    let mesh = mind.mesh.borrow().clone();
    // Reports are by workload, selectors by pod.
    let views = match namespace {
        Some(name) => mind.index.view(name).into_iter().collect(),
        None => mind.index.views().into_iter().map(|(_, view)| view).collect::<Vec<_>>(),
    };
    let mut selected = HashSet::new();
    for view in &views {
        for pod in view.pods.values().filter(|p| labels.iter().all(|(k, v)| p.labels.get(k) == Some(v))) {
            selected.insert(workload_of(&workload::labels(pod, view, &mesh)));
        }
    }
    let question =
        EdgeQuestion { since: SINCE, namespace: namespace.unwrap_or_default().to_owned(), detail: false, limit: MOST_EDGES };
    let plain =
        mind.edges(&question).edges.into_iter().filter(|e| e.source.identity.is_empty() && selected.contains(&e.destination));
    let mut counts: HashMap<(String, u16), u64> = HashMap::new();
    for edge in plain {
        let source = &edge.source;
        let who = match (source.workload.as_str(), source.namespace.as_str()) {
            ("", _) => source.address.clone(),
            (workload, "") => workload.to_owned(),
            (workload, namespace) => format!("{workload} of {namespace}"),
        };
        *counts.entry((who, edge.port)).or_default() += edge.count;
    }
    let mut callers: Vec<_> = counts.into_iter().map(|((who, port), count)| PlaintextCaller { who, port, count }).collect();
    callers.sort_by(|a, b| b.count.cmp(&a.count).then_with(|| (&a.who, a.port).cmp(&(&b.who, b.port))));
    callers
}

fn facts(pod: &Pod, view: &View, mesh: &Mesh) -> PodFacts {
    let ports = inbound::ports(pod, view, mesh).into_iter().filter_map(|port| {
        let protocol = match port.protocol() {
            wire::Protocol::Http | wire::Protocol::Http1 | wire::Protocol::Http2 => Protocol::Http,
            // The app's own TLS is as opaque to policies as any bytes.
            wire::Protocol::Tcp | wire::Protocol::Tls => Protocol::Tcp,
            wire::Protocol::Detect => Protocol::Detected,
        };
        Some(PodPort { number: u16::try_from(port.port).ok()?, protocol })
    });
    let services = view.services.values().filter(|s| s.selects(&pod.labels)).flat_map(|service| {
        let ports = service.ports.iter().filter(|p| p.transport == Transport::Tcp);
        ports.filter_map(|port| {
            Some(ServicePort { service: service.name.clone(), port: port.port, target: inbound::target(pod, port)? })
        })
    });
    PodFacts {
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        meshed: pod.meshed(),
        ports: ports.collect(),
        services: services.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reports::Reports;
    use crate::source::wire::parse;
    use serde_json::json;
    use weft_webhook::validate::{Kind, validate};

    const SHOP: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop, labels: {app: web}}
spec:
  containers: [{name: app, image: x, ports: [{name: http, containerPort: 8080}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: done, namespace: shop, labels: {app: old}}
spec: {containers: [{name: app, image: x}]}
status: {phase: Succeeded}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: http}, {name: tcp-raw, port: 9000}]
";

    fn known() -> Known {
        let index = Arc::new(Index::new([]));
        let documents: Vec<serde_json::Value> = serde_saphyr::from_multiple(SHOP).unwrap();
        index.replace(documents.into_iter().map(|d| parse(d).unwrap().unwrap()));
        let (_, mesh) = watch::channel(Arc::new(Mesh::default()));
        index.publish();
        Known::new(index, mesh)
    }

    fn warnings(known: &Known, kind: Kind, namespace: &str, spec: serde_json::Value) -> Vec<String> {
        let object = json!({"apiVersion": "security.istio.io/v1", "kind": kind.as_str(), "metadata": {"name": "p", "namespace": namespace}, "spec": spec});
        let verdict = validate(kind, &object, known);
        assert_eq!(verdict.errors, []);
        verdict.warnings.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_index_answers() {
        let known = known();
        let pods = known.pods(Some("shop"), &Labels::default()).unwrap();
        assert_eq!(pods.len(), 1, "a finished pod is none any more");
        let http = PodPort { number: 8080, protocol: Protocol::Http };
        assert_eq!(pods[0].ports, [http, PodPort { number: 9000, protocol: Protocol::Tcp }]);
        let ports: Vec<(u16, u16)> = pods[0].services.iter().map(|s| (s.port, s.target)).collect();
        assert_eq!(ports, [(80, 8080), (9000, 9000)]);
        assert_eq!(known.pods(None, &Labels::default()).unwrap().len(), 1);
        assert_eq!(known.pods(Some("other"), &Labels::default()), Some(vec![]));
        assert_eq!((known.has_namespace("shop"), known.has_namespace("shpo")), (Some(true), Some(false)));
    }

    #[test]
    fn nothing_is_said_before_all_is_known() {
        let (_, mesh) = watch::channel(Arc::new(Mesh::default()));
        let known = Known::new(Arc::new(Index::new([crate::model::Kind::Pod])), mesh);
        assert_eq!((known.pods(None, &Labels::default()), known.has_namespace("shop")), (None, None));
    }

    #[test]
    fn warnings_come_of_it() {
        let known = known();
        let select = json!({"matchLabels": {"app": "web"}});
        let found = warnings(
            &known,
            Kind::AuthorizationPolicy,
            "shop",
            json!({"selector": select, "rules": [{"to": [{"operation": {"ports": ["80"]}}], "from": [{"source": {"namespaces": ["shpo"]}}]}]}),
        );
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(
            found[0].contains("has the sidecar") && found[1].contains("no namespace") && found[2].contains("write 8080"),
            "{found:?}"
        );
        let strict = json!({"mtls": {"mode": "STRICT"}});
        assert!(warnings(&known, Kind::PeerAuthentication, "shop", strict.clone()).is_empty());
        let told = known.with_plaintext_callers(Box::new(|namespace, _| {
            let who = format!("{}/old", namespace.unwrap_or("anywhere"));
            vec![PlaintextCaller { who, port: 8080, count: 3 }]
        }));
        assert!(warnings(&told, Kind::PeerAuthentication, "shop", strict.clone())[0].contains("shop/old on port 8080 (3 times)"));
        assert!(warnings(&told, Kind::PeerAuthentication, "weft-system", strict)[0].contains("anywhere/old"));
    }

    #[test]
    fn reports_tell_who_calls_without_mutual_tls() {
        let known = known();
        let reports = Arc::new(Reports::new(crate::reports::Limits::default()));
        let web = reports.attach(&wire::Hello { namespace: "shop".into(), pod: "web-1".into(), ..wire::Hello::default() });
        let view = known.index.view("shop").unwrap();
        web.workload(&workload::labels(&view.pods["web-1"], &view, &Mesh::default()));
        let edge = |identity: &str, address: &str, port, count, path: &str| wire::Edge {
            source_identity: identity.into(),
            source_address: address.into(),
            port,
            protocol: "http".into(),
            path: path.into(),
            count,
            ..wire::Edge::default()
        };
        let edges = vec![
            edge("", "10.9.9.9", 8080, 2, "/a"),
            edge("", "10.9.9.9", 8080, 3, "/b"),
            edge("", "10.8.8.8", 9000, 9, ""),
            edge("spiffe://cluster.local/ns/shop/sa/x", "", 8080, 100, "/a"),
        ];
        web.report(wire::Report { edges, ..wire::Report::default() });
        let (_, authority) = watch::channel(Arc::default());
        let (_, keys) = watch::channel(Arc::default());
        let mind = Arc::new(Mind { index: known.index.clone(), mesh: known.mesh.clone(), keys, reports, authority });
        let asked = |namespace: Option<&str>, app: &str| {
            let found = reported(mind.clone())(namespace, &Labels::from([("app".to_owned(), app.to_owned())]));
            found.into_iter().map(|c| (c.who, c.port, c.count)).collect::<Vec<_>>()
        };
        let both = [("10.8.8.8".to_owned(), 9000, 9), ("10.9.9.9".to_owned(), 8080, 5)];
        assert_eq!(asked(Some("shop"), "web"), both);
        assert_eq!(asked(None, "web"), both);
        assert_eq!(asked(Some("shop"), "db"), []);
        assert_eq!(asked(Some("other"), "web"), []);
    }
}
