use super::*;
use crate::compile::Mesh;
use crate::index::{At, Index};
use crate::source::wire::parse;

/// `ADDRESS -> service, protocol, direct: endpoint [identity]; …` for an address in the world of a YAML text.
fn told(yaml: &str, address: &str) -> String {
    told_in(yaml, address, &Mesh::default())
}

fn told_in(yaml: &str, address: &str, mesh: &Mesh) -> String {
    let index = Index::new([]);
    let documents: Vec<serde_json::Value> = serde_saphyr::from_multiple(yaml).unwrap();
    index.replace(documents.into_iter().map(|d| parse(d).unwrap().unwrap()));
    let address: SocketAddr = address.parse().unwrap();
    let root = index.policies_of(mesh.root_namespace());
    let keys = crate::compile::security::jwt::Keys::default();
    let known = |view| Known { view, root: &root, mesh, keys: &keys };
    let found = match index.at(address.ip()) {
        Some((At::Service(service), view)) => of_service(address, &service, &known(&view)),
        Some((At::Pod(pod), view)) => of_pod(address, &pod, &known(&view)),
        None => unknown(address),
    };
    assert_eq!(found.address, address.to_string());
    let endpoints: Vec<String> = found
        .endpoints
        .iter()
        .map(|e| {
            assert_eq!(e.workload.is_some(), !e.pod.is_empty());
            format!("{}@{}[{}]", e.pod, e.address, e.identities.join(",").replace("spiffe://cluster.local/", ""))
        })
        .collect();
    let service = found.service.as_ref().map_or("-", |s| s.host.as_str());
    let direct = if found.direct { " direct" } else { "" };
    format!("{service} {:?}{direct}: {}", found.protocol(), endpoints.join(" ")).trim().to_owned()
}

fn pod(name: &str, ip: &str, more: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: shop, labels: {{app: cart}}, annotations: {{weft.mesh/status: '{{}}'}}}}
spec:
  serviceAccountName: cart
  initContainers: [{{name: weft-init, args: [--inbound-ports=*, '--exclude-inbound-ports=9000,15020']}}]
  containers: [{{name: app, ports: [{{name: web, containerPort: 8080}}]}}, {{name: weft-proxy}}]
status: {{podIPs: [{{ip: {ip}}}]{more}}}
---"
    )
}

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop, creationTimestamp: '2026-01-01T00:00:00Z'}
spec:
  clusterIPs: [10.96.0.1, 'fd00::1']
  selector: {app: cart}
  ports: [{name: http, port: 80, targetPort: web}, {name: admin, port: 81, targetPort: 9000}, {name: u, port: 82, protocol: UDP}]
---";

fn slice(name: &str, endpoints: &str) -> String {
    format!(
        "
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}, namespace: shop, labels: {{kubernetes.io/service-name: cart}}}}
ports: [{{name: http, port: 8080}}, {{name: admin, port: 9000}}, {{name: u, port: 8080, protocol: UDP}}]
endpoints: [{endpoints}]
---"
    )
}

fn endpoint(pod: &str, ip: &str, conditions: &str) -> String {
    format!("{{addresses: ['{ip}'], targetRef: {{kind: Pod, name: {pod}}}, conditions: {{{conditions}}}}}")
}

#[test]
fn which_endpoints_of_a_service() {
    let pods = [pod("p1", "10.0.0.1", ""), pod("p2", "10.0.0.2", ""), pod("p3", "10.0.0.3", "")].concat();
    let (one, two) = ("p1@10.0.0.1:8080[ns/shop/sa/cart]", "p2@10.0.0.2:8080[ns/shop/sa/cart]");
    let gone = "ready: false, serving: true, terminating: true";
    for (endpoints, expected) in [
        (vec![("p1", "10.0.0.1", "ready: true"), ("p2", "10.0.0.2", "")], format!("{one} {two}")),
        (vec![("p1", "10.0.0.1", "ready: false"), ("p2", "10.0.0.2", "")], two.into()),
        (vec![("p1", "10.0.0.1", gone), ("p2", "10.0.0.2", "ready: true")], two.into()),
        (vec![("p1", "10.0.0.1", gone), ("p2", "10.0.0.2", "ready: false")], one.into()),
        (
            vec![("p1", "10.0.0.1", "ready: false, serving: true"), ("p2", "10.0.0.2", "ready: false, terminating: true")],
            String::new(),
        ),
        (vec![], String::new()),
        // A pod that is not known yet.
        (vec![("new", "10.0.0.9", ""), ("p2", "10.0.0.2", "")], two.into()),
    ] {
        let all: Vec<String> = endpoints.iter().map(|(p, ip, c)| endpoint(p, ip, c)).collect();
        let yaml = [pods.clone(), SERVICE.into(), slice("s", &all.join(", "))].concat();
        assert_eq!(told(&yaml, "10.96.0.1:80"), format!("cart.shop.svc.cluster.local Http: {expected}").trim(), "{endpoints:?}");
    }
}

#[test]
fn several_slices_are_one_set() {
    let yaml = [
        pod("p1", "10.0.0.1", ""),
        pod("p2", "10.0.0.2", ""),
        SERVICE.into(),
        slice("s2", &endpoint("p1", "10.0.0.1", "")),
        slice("s1", &[endpoint("p2", "10.0.0.2", ""), endpoint("p1", "10.0.0.1", "")].join(",")),
    ]
    .concat();
    let expected = "cart.shop.svc.cluster.local Http: p1@10.0.0.1:8080[ns/shop/sa/cart] p2@10.0.0.2:8080[ns/shop/sa/cart]";
    assert_eq!(told(&yaml, "10.96.0.1:80"), expected);
    // A port of the Service that the pods' rules leave to the app, one that is no TCP, and one that is not declared.
    let plain = "cart.shop.svc.cluster.local Detect: p1@10.0.0.1:9000[] p2@10.0.0.2:9000[]";
    assert_eq!(told(&yaml, "10.96.0.1:81"), plain);
    assert_eq!(told(&yaml, "10.96.0.1:82"), "- Detect:");
    assert_eq!(told(&yaml, "10.96.0.1:99"), "- Detect:");
    assert_eq!(told(&yaml, "10.96.0.2:80"), "- Detect:");
}

#[test]
fn families_do_not_mix() {
    let six = "{addresses: ['fd00::a'], targetRef: {kind: Pod, name: p1}}";
    let yaml =
        [pod("p1", "10.0.0.1", ""), SERVICE.into(), slice("v4", &endpoint("p1", "10.0.0.1", "")), slice("v6", six)].concat();
    assert_eq!(told(&yaml, "10.96.0.1:80"), "cart.shop.svc.cluster.local Http: p1@10.0.0.1:8080[ns/shop/sa/cart]");
    assert_eq!(told(&yaml, "[fd00::1]:80"), "cart.shop.svc.cluster.local Http: p1@[fd00::a]:8080[ns/shop/sa/cart]");
}

#[test]
fn endpoints_that_somebody_wrote() {
    let yaml = [
        pod("p1", "10.0.0.1", ""),
        SERVICE.replace("selector: {app: cart}", "selector: {}"),
        slice("s", "{addresses: [10.0.0.1]}, {addresses: [192.0.2.1]}"),
    ]
    .concat();
    let expected = "cart.shop.svc.cluster.local Http: p1@10.0.0.1:8080[ns/shop/sa/cart] @192.0.2.1:8080[]";
    assert_eq!(told(&yaml, "10.96.0.1:80"), expected);
}

#[test]
fn who_has_an_identity() {
    let running = ", containerStatuses: [{name: weft-proxy, state: {running: {startedAt: x}}}]";
    let waiting = ", containerStatuses: [{name: weft-proxy, state: {waiting: {}}}, {name: app, state: {running: {}}}]";
    let restarting =
        ", containerStatuses: [{name: weft-proxy, restartCount: 1, state: {waiting: {}}, lastState: {terminated: {}}}]";
    let native = ", containerStatuses: [{name: app, state: {waiting: {}}}], initContainerStatuses: [{name: weft-proxy, state: {running: {}}}]";
    let yes = "ns/shop/sa/cart";
    let as_is = |s: String| s;
    type Case<'a> = (&'a str, &'a dyn Fn(String) -> String, u16, &'a str);
    let cases: [Case; 13] = [
        (running, &as_is, 8080, yes),
        (waiting, &as_is, 8080, ""),
        (restarting, &as_is, 8080, yes),
        (native, &as_is, 8080, yes),
        // Nobody reports containers in a folder of manifests.
        ("", &as_is, 8080, yes),
        ("", &as_is, 5555, yes),
        ("", &as_is, 9000, ""),
        ("", &as_is, 15020, ""),
        ("", &|s| s.replace("weft.mesh/status", "other"), 8080, ""),
        ("", &|s| s.replace("--inbound-ports=*", "'--inbound-ports=1,2'"), 8080, ""),
        // Without arguments of weft-init, what annotations say.
        ("", &|s| s.replace("args", "image"), 9000, yes),
        (
            "",
            &|s| {
                s.replace("args", "image")
                    .replace("annotations: {", "annotations: {config.linkerd.io/skip-inbound-ports: '9000', ")
            },
            9000,
            "",
        ),
        (
            "",
            &|s| {
                s.replace("args", "image")
                    .replace("annotations: {", "annotations: {traffic.sidecar.istio.io/includeInboundPorts: '80', ")
            },
            9000,
            "",
        ),
    ];
    for (status, change, port, identity) in cases {
        let yaml = change(pod("p1", "10.0.0.1", status));
        let expected = format!("p1@10.0.0.1:{port}[{identity}]");
        let found = told(
            &yaml.replace("image: [--inbound-ports=*, '--exclude-inbound-ports=9000,15020']", "image: x"),
            &format!("10.0.0.1:{port}"),
        );
        assert!(found.ends_with(&expected) && found.contains("direct"), "{found} is not {expected}: {yaml}");
    }
    let host = [
        pod("p1", "10.0.0.1", "").replace("spec:", "spec:\n  hostNetwork: true"),
        SERVICE.into(),
        slice("s", &endpoint("p1", "10.0.0.1", "")),
    ]
    .concat();
    assert_eq!(told(&host, "10.96.0.1:80"), "cart.shop.svc.cluster.local Http: p1@10.0.0.1:8080[]");
    assert_eq!(told(&host, "10.0.0.1:80"), "- Detect:");
    let other = Mesh { trust_domain: "mesh.example".into(), ..Mesh::default() };
    assert!(told_in(&pod("p1", "10.0.0.1", ""), "10.0.0.1:1", &other).ends_with("[spiffe://mesh.example/ns/shop/sa/cart]"));
}

#[test]
fn settings_exclude_ports_too() {
    let mut mesh = Mesh::default();
    mesh.traffic.exclude_inbound_ports = "8080".into();
    let yaml = pod("p1", "10.0.0.1", "").replace("args: [--inbound-ports=*, '--exclude-inbound-ports=9000,15020']", "image: x");
    assert!(told_in(&yaml, "10.0.0.1:8080", &mesh).ends_with("[]"));
    assert!(told_in(&yaml, "10.0.0.1:8081", &mesh).ends_with("[ns/shop/sa/cart]"));
    // A pod that was injected before the settings said so still redirects the port.
    assert!(told_in(&pod("p1", "10.0.0.1", ""), "10.0.0.1:8080", &mesh).ends_with("[ns/shop/sa/cart]"));
}

#[test]
fn a_pods_own_address() {
    let headless =
        SERVICE.replace("clusterIPs: [10.96.0.1, 'fd00::1']", "clusterIP: None").replace("name: cart,", "name: headless,");
    let older = headless.replace("name: headless", "name: older").replace("2026-01-01", "2025-01-01");
    let pod = pod("p1", "10.0.0.1", "");
    let at = |yaml: &[&str], address| told(&yaml.concat(), address);
    let endpoint = "p1@10.0.0.1:8080[ns/shop/sa/cart]";
    assert_eq!(at(&[&pod], "10.0.0.1:8080"), format!("- Detect direct: {endpoint}"));
    assert_eq!(at(&[&pod, &headless], "10.0.0.1:8080"), format!("headless.shop.svc.cluster.local Http direct: {endpoint}"));
    assert_eq!(at(&[&pod, &headless, &older], "10.0.0.1:8080"), format!("older.shop.svc.cluster.local Http direct: {endpoint}"));
    assert!(at(&[&pod, &headless], "10.0.0.1:80").starts_with("- Detect direct: p1@10.0.0.1:80"));
    assert_eq!(at(&[&pod, SERVICE], "10.0.0.1:8080"), format!("cart.shop.svc.cluster.local Http direct: {endpoint}"));
}

#[test]
fn where_mutual_tls_is_switched_off() {
    let policy = |spec: &str| {
        format!(
            "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{name: p, namespace: shop}}
spec: {{{spec}}}
---"
        )
    };
    let at = |spec: &str, port: u16| told(&[pod("p1", "10.0.0.1", ""), policy(spec)].concat(), &format!("10.0.0.1:{port}"));
    assert!(at("mtls: {mode: DISABLE}", 8080).ends_with("[]"));
    assert!(at("mtls: {mode: STRICT}", 8080).ends_with("[ns/shop/sa/cart]"));
    assert!(at("mtls: {mode: NONSENSE}", 8080).ends_with("[ns/shop/sa/cart]"));
    let by_port = "selector: {matchLabels: {app: cart}}, portLevelMtls: {8080: {mode: DISABLE}}";
    assert!(at(by_port, 8080).ends_with("[]"));
    assert!(at(by_port, 8081).ends_with("[ns/shop/sa/cart]"));
}
