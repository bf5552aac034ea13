//! The ports on which a pod's app listens, and what is spoken on each.
//!
//! A port is declared by a Service that leads to the pod (by its selector, or, for a Service without one, by an EndpointSlice
//! that names the pod or its address), or by the pod itself (a container's `ports`). What a Service says goes before what
//! the container says; where Services disagree, [`protocol::merge`] decides, and the oldest names the port. UDP and SCTP
//! are not carried, and the proxy's own ports are not the app's.

use super::{Mesh, protocol};
use crate::index::View;
use crate::model::{EndpointSlice, Pod, Service, ServicePort, Target, Transport};
use std::collections::BTreeMap;
use weft_api::names;
use weft_api::wire::{InboundPort, Protocol, ServiceRef};

#[derive(Default)]
struct Found {
    by_service: Option<(Protocol, ServiceRef)>,
    by_pod: Option<Protocol>,
}

/// The declared ports of a pod in ascending order, each once.
pub fn ports(pod: &Pod, view: &View, mesh: &Mesh) -> Vec<InboundPort> {
    let mut found: BTreeMap<u16, Found> = BTreeMap::new();
    let mut services: Vec<&Service> = view.services.values().map(AsRef::as_ref).collect();
    // The oldest first; one whose age is unknown comes last, and names break ties.
    services.sort_by(|a, b| (a.created.is_empty(), &a.created, &a.name).cmp(&(b.created.is_empty(), &b.created, &b.name)));
    for service in services {
        for (port, protocol) in service_ports(pod, service, view) {
            let entry = &mut found.entry(port).or_default().by_service;
            match entry {
                Some((known, _)) => *known = protocol::merge(*known, protocol),
                None => *entry = Some((protocol, reference(service, mesh))),
            }
        }
    }
    for port in pod.app_containers().flat_map(|c| &c.ports).filter(|p| p.transport == Transport::Tcp && p.port != 0) {
        let protocol = protocol::select(&port.name, None, port.port);
        let entry = &mut found.entry(port.port).or_default().by_pod;
        *entry = Some(entry.map_or(protocol, |known| protocol::merge(known, protocol)));
    }
    found
        .into_iter()
        .filter(|(port, _)| !names::PROXY_PORTS.contains(port))
        .map(|(port, found)| {
            let by_pod = found.by_pod.unwrap_or(Protocol::Detect);
            let (protocol, service) = match found.by_service {
                Some((Protocol::Detect, service)) => (by_pod, Some(service)),
                Some((protocol, service)) => (protocol, Some(service)),
                None => (by_pod, None),
            };
            InboundPort { port: u32::from(port), protocol: protocol.into(), service }
        })
        .collect()
}

/// How a Service is named on the wire.
pub(super) fn reference(service: &Service, mesh: &Mesh) -> ServiceRef {
    ServiceRef {
        name: service.name.clone(),
        namespace: service.namespace.clone(),
        host: format!("{}.{}.svc.{}", service.name, service.namespace, mesh.cluster_domain),
    }
}

/// The pod's ports to which a Service leads, with what it declares for each.
fn service_ports(pod: &Pod, service: &Service, view: &View) -> Vec<(u16, Protocol)> {
    if service.selects(&pod.labels) {
        return service
            .ports
            .iter()
            .filter(|port| port.transport == Transport::Tcp)
            .filter_map(|port| {
                let protocol = protocol::select(&port.name, port.app_protocol.as_deref(), port.port);
                target(pod, port).map(|number| (number, protocol))
            })
            .collect();
    }
    if !service.selector.is_empty() || service.external_name {
        return Vec::new();
    }
    let leads_here = |slice: &&EndpointSlice| slice.service == service.name && slice.names(pod);
    view.slices
        .values()
        .map(AsRef::as_ref)
        .filter(leads_here)
        .flat_map(|slice| &slice.ports)
        .filter(|port| port.transport == Transport::Tcp && port.port != 0)
        .map(|port| {
            // The Service's own port of the same name says what is spoken, and its number counts; the slice's appProtocol
            // is a copy of it where a controller wrote the slice.
            let declared = service.ports.iter().find(|p| p.name == port.name && p.transport == Transport::Tcp);
            let app_protocol = declared.and_then(|p| p.app_protocol.as_deref()).or(port.app_protocol.as_deref());
            (port.port, protocol::select(&port.name, app_protocol, declared.map_or(port.port, |p| p.port)))
        })
        .collect()
}

/// The port of a pod to which a port of a Service leads.
pub(crate) fn target(pod: &Pod, port: &ServicePort) -> Option<u16> {
    let target = match &port.target {
        Target::Same => Some(port.port),
        Target::Number(number) => Some(*number),
        Target::Name(name) => named(pod, name),
    };
    target.filter(|number| *number != 0)
}

fn named(pod: &Pod, name: &str) -> Option<u16> {
    pod.app_containers().flat_map(|c| &c.ports).find(|p| p.name == name && p.transport == Transport::Tcp).map(|p| p.port)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::wire::parse;

    fn view(yaml: &str) -> View {
        let index = crate::index::Index::new([]);
        let documents: Vec<serde_json::Value> = serde_saphyr::from_multiple(yaml).unwrap();
        index.replace(documents.into_iter().map(|d| parse(d).unwrap().unwrap()));
        (*index.view("default").unwrap()).clone()
    }

    fn compiled(yaml: &str, pod: &str) -> Vec<String> {
        let view = view(yaml);
        let mesh = Mesh { cluster: "c".into(), ..Mesh::default() };
        ports(&view.pods[pod], &view, &mesh)
            .iter()
            .map(|p| {
                let service = p.service.as_ref().map_or("-", |s| s.host.as_str());
                format!("{} {:?} {service}", p.port, p.protocol())
            })
            .collect()
    }

    const PODS: &str = "
apiVersion: v1
kind: Pod
metadata: {name: one, namespace: default, labels: {app: go}}
spec:
  containers:
  - name: app
    ports: [{name: web, containerPort: 8080}, {name: http-admin, containerPort: 9000}, {name: dns, containerPort: 5353, protocol: UDP}]
  - name: weft-proxy
    ports: [{name: metrics, containerPort: 15020}, {name: http-x, containerPort: 7777}]
status: {podIPs: [{ip: 10.0.0.1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: two, namespace: default, labels: {app: go}}
spec:
  containers: [{name: app, ports: [{name: web, containerPort: 8081}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: other, namespace: default, labels: {app: other}}
spec:
  initContainers:
  - {name: setup, ports: [{name: web, containerPort: 1111}]}
  - {name: helper, restartPolicy: Always, ports: [{name: web, containerPort: 2222}]}
  containers: [{name: app}]
";

    fn with(services: &str) -> String {
        format!("{PODS}\n---\n{services}")
    }

    #[test]
    fn a_pod_alone_declares_its_own_ports() {
        assert_eq!(compiled(PODS, "one"), ["8080 Detect -", "9000 Http -"]);
    }

    #[test]
    fn named_target_ports_differ_per_pod() {
        let yaml = with(
            "
apiVersion: v1
kind: Service
metadata: {name: go-app, namespace: default}
spec: {selector: {app: go}, ports: [{name: http, port: 80, targetPort: web}]}
",
        );
        assert_eq!(compiled(&yaml, "one")[0], "8080 Http go-app.default.svc.cluster.local");
        assert_eq!(compiled(&yaml, "two"), ["8081 Http go-app.default.svc.cluster.local"]);
        assert_eq!(compiled(&yaml, "other"), ["2222 Detect -"]);
    }

    #[test]
    fn a_native_sidecars_port_is_found_by_name() {
        let yaml = with(
            "
apiVersion: v1
kind: Service
metadata: {name: s, namespace: default}
spec: {selector: {app: other}, ports: [{name: grpc, port: 80, targetPort: web}]}
",
        );
        assert_eq!(compiled(&yaml, "other"), ["2222 Http2 s.default.svc.cluster.local"]);
    }

    #[test]
    fn every_kind_of_target() {
        let yaml = with(
            "
apiVersion: v1
kind: Service
metadata: {name: s, namespace: default}
spec:
  selector: {app: go}
  ports:
  - {name: tcp-a, port: 1000}
  - {name: http-b, port: 1001, targetPort: 2001}
  - {name: c, port: 1002, targetPort: nowhere}
  - {name: d, port: 1003, protocol: UDP}
  - {name: e, port: 1004, appProtocol: kubernetes.io/h2c}
  - {name: f, port: 3306, targetPort: 13306}
  - {name: g, port: 15020}
",
        );
        assert_eq!(
            compiled(&yaml, "two"),
            [
                "1000 Tcp s.default.svc.cluster.local",
                "1004 Http2 s.default.svc.cluster.local",
                "2001 Http s.default.svc.cluster.local",
                "8081 Detect -",
                "13306 Tcp s.default.svc.cluster.local",
            ]
        );
    }

    #[test]
    fn services_that_disagree() {
        let service = |name: &str, created: &str, port: &str| {
            format!(
                "
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: default, creationTimestamp: '{created}'}}
spec: {{selector: {{app: go}}, ports: [{{name: {port}, port: 80, targetPort: 8081}}]}}
"
            )
        };
        let two = |a: &str, b: &str| {
            with(&[service("aaa", "2026-02-01T00:00:00Z", a), service("zzz", "2026-01-01T00:00:00Z", b)].join("\n---\n"))
        };
        let oldest = "zzz.default.svc.cluster.local";
        assert_eq!(compiled(&two("http", "tcp"), "two"), [format!("8081 Detect {oldest}")]);
        assert_eq!(compiled(&two("http", "grpc"), "two"), [format!("8081 Http {oldest}")]);
        assert_eq!(compiled(&two("x", "grpc"), "two"), [format!("8081 Http2 {oldest}")]);
    }

    #[test]
    fn a_container_says_what_a_service_leaves_open() {
        let yaml = with(
            "
apiVersion: v1
kind: Service
metadata: {name: s, namespace: default}
spec: {selector: {app: go}, ports: [{name: admin, port: 9000}]}
",
        );
        assert_eq!(compiled(&yaml, "one")[1], "9000 Http s.default.svc.cluster.local");
    }

    #[test]
    fn a_service_without_selector_leads_by_its_slices() {
        let yaml = with(
            "
apiVersion: v1
kind: Service
metadata: {name: manual, namespace: default}
spec: {ports: [{name: http, port: 80, targetPort: 9999}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: manual-1, namespace: default, labels: {kubernetes.io/service-name: manual}}
addressType: IPv4
ports: [{name: http, port: 8888}]
endpoints: [{addresses: [10.0.0.1]}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: manual-2, namespace: default, labels: {kubernetes.io/service-name: manual}}
addressType: IPv4
ports: [{name: http, port: 8889}]
endpoints: [{addresses: [10.0.0.7], targetRef: {kind: Pod, name: two}}]
",
        );
        assert!(compiled(&yaml, "one").contains(&"8888 Http manual.default.svc.cluster.local".to_owned()));
        assert!(!compiled(&yaml, "one").iter().any(|p| p.starts_with("8889")));
        assert!(compiled(&yaml, "two").contains(&"8889 Http manual.default.svc.cluster.local".to_owned()));
    }

    #[test]
    fn external_names_and_empty_selectors_lead_nowhere() {
        let yaml = with(
            "
apiVersion: v1
kind: Service
metadata: {name: e, namespace: default}
spec: {type: ExternalName, externalName: example.com, selector: {app: go}, ports: [{name: http, port: 80}]}
",
        );
        assert_eq!(compiled(&yaml, "two"), ["8081 Detect -"]);
    }
}
