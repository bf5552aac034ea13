//! Questions about a small cluster, whose proxies have reported a little.

use super::*;
use crate::source::wire::parse;
use serde_json::json;
use weft_api::console::{Caller, Change, Effect, Proposal, Question, QuestionHttp};
use weft_api::wire::{Hello, PolicyHits, Report};

const CLUSTER: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Namespace
metadata: {name: weft-system}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {selector: {app: cart}, ports: [{name: http, port: 80, targetPort: web}, {name: tcp-db, port: 5432}]}
---
apiVersion: v1
kind: Service
metadata: {name: nobody, namespace: shop}
spec: {selector: {app: nobody}, ports: [{name: http, port: 80}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: reads, namespace: shop}
spec:
  selector: {matchLabels: {app: cart}}
  rules:
  - from: [{source: {principals: [cluster.local/ns/shop/sa/web]}}]
    to: [{operation: {methods: [GET]}}]
";

fn pod(name: &str, app: &str, address: &str, meshed: bool) -> serde_json::Value {
    let mut containers = vec![json!({"name": "app", "ports": [{"name": "web", "containerPort": 8080}]})];
    let mut annotations = json!({});
    if meshed {
        containers.push(json!({"name": weft_api::names::PROXY_CONTAINER}));
        annotations = json!({weft_api::annotations::STATUS: "{}"});
    }
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop", "labels": {"app": app}, "annotations": annotations},
        "spec": {"serviceAccountName": app, "containers": containers}, "status": {"podIPs": [{"ip": address}]}
    })
}

fn mind() -> Mind {
    let index = Arc::new(Index::new([]));
    let mut documents: Vec<serde_json::Value> = serde_saphyr::from_multiple(CLUSTER).unwrap();
    documents.extend([
        pod("cart-1", "cart", "10.0.0.1", true),
        pod("cart-2", "cart", "10.0.0.2", true),
        pod("web-1", "web", "10.0.0.3", true),
        pod("old-1", "old", "10.0.0.4", false),
    ]);
    index.replace(documents.into_iter().map(|d| parse(d).unwrap().unwrap()));
    index.publish();
    Mind {
        index,
        mesh: watch::channel(Arc::new(Mesh::default())).1,
        keys: watch::channel(Arc::default()).1,
        authority: watch::channel(Arc::default()).1,
        reports: Arc::new(Reports::default()),
    }
}

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

fn edge(identity: &str, address: &str, method: &str, path: &str, count: u64, denied: u64) -> wire::Edge {
    let http = !method.is_empty();
    wire::Edge {
        source_identity: identity.into(),
        source_address: address.into(),
        port: if http { 8080 } else { 5432 },
        protocol: if http { "http" } else { "tcp" }.into(),
        method: method.into(),
        path: path.into(),
        host: "cart".into(),
        count,
        denied,
        ..wire::Edge::default()
    }
}

fn report(mind: &Mind, pod: &str, report: Report) {
    let attached = mind.reports.attach(&Hello { namespace: "shop".into(), pod: pod.into(), ..Hello::default() });
    attached.workload(&mind.config("shop", pod).unwrap().workload.unwrap());
    attached.report(report);
}

#[test]
fn policies_in_force_and_their_hits() {
    let mind = mind();
    let hit = |policy: &str, allowed, denied| PolicyHits { policy: policy.into(), allowed, denied, ..PolicyHits::default() };
    report(&mind, "cart-1", Report { hits: vec![hit("shop/reads", 5, 0), hit("", 0, 2)], ..Report::default() });
    report(&mind, "cart-2", Report { hits: vec![hit("shop/reads", 1, 0), hit("shop/gone", 9, 9)], ..Report::default() });
    report(&mind, "web-1", Report { hits: vec![hit("shop/reads", 100, 0)], ..Report::default() });
    let authz = mind.authz("shop", "svc/cart").unwrap();
    assert_eq!((authz.pods.len(), authz.unmeshed.len()), (2, 0));
    let policies: Vec<_> =
        authz.policies.iter().map(|p| format!("{} {} {} {}/{}", p.policy, p.action, p.pods, p.allowed, p.denied)).collect();
    assert_eq!(policies, ["shop/reads ALLOW 2 6/0", " ALLOW 2 0/2"]);
    let ports: Vec<_> =
        authz.ports.iter().map(|p| format!("{} {} {}x{}", p.port, p.protocol, p.mtls[0].mode, p.mtls[0].pods)).collect();
    assert_eq!(ports, ["5432 TCP PERMISSIVEx2", "8080 HTTP PERMISSIVEx2"]);
    let old = mind.authz("shop", "pod/old-1").unwrap();
    assert_eq!((old.unmeshed, old.policies.len()), (vec!["old-1".to_owned()], 0));
    for (target, words) in [
        ("svc/absent", "no service absent in namespace shop"),
        ("svc/nobody", "no pod stands behind svc/nobody"),
        ("deploy/x", "no pods"),
        ("cart", "TYPE/NAME"),
        ("node/x", "expected svc, pod"),
    ] {
        let error = mind.authz("shop", target).unwrap_err().to_string();
        assert!(error.contains(words), "{target}: {error}");
    }
    assert!(mind.authz("elsewhere", "svc/cart").unwrap_err().to_string().contains("namespace elsewhere"));
}

fn question(from: Caller, to: &str, port: &str, method: &str, path: &str) -> Question {
    let http = QuestionHttp { method: method.into(), path: path.into(), ..QuestionHttp::default() };
    Question { from, namespace: "shop".into(), to: to.into(), port: port.into(), http: (!method.is_empty()).then_some(http) }
}

fn caller(pod: &str) -> Caller {
    Caller::Pod { namespace: "shop".into(), name: pod.into() }
}

#[test]
fn what_would_become_of_a_request() {
    let mind = mind();
    let sa = |name: &str| Caller::ServiceAccount { namespace: "shop".into(), name: name.into() };
    for (from, to, port, method, verdict, words) in [
        (caller("web-1"), "svc/cart", "80", "GET", "allow", "ALLOW policy shop/reads matches"),
        (caller("web-1"), "svc/cart", "http", "POST", "deny", "none matches"),
        (sa("web"), "pod/cart-1", "8080", "GET", "allow", "shop/reads"),
        (sa("other"), "svc/cart", "80", "GET", "deny", "none matches"),
        (caller("old-1"), "svc/cart", "80", "GET", "deny", "none matches"),
        (Caller::default(), "svc/cart", "80", "GET", "deny", "none matches"),
        (caller("web-1"), "svc/cart", "5432", "", "deny", "none matches"),
        (caller("web-1"), "pod/web-1", "", "GET", "allow", "no policy denies it"),
        (caller("web-1"), "pod/old-1", "", "GET", "allow", "no sidecar"),
    ] {
        let explained = mind.explain(&question(from.clone(), to, port, method, "/x")).unwrap();
        let [judged] = &explained.verdicts[..] else { panic!("{explained:?}") };
        assert_eq!(judged.verdict, verdict, "{from:?} {to} {method}: {judged:?}");
        assert!(judged.reason.contains(words), "{from:?} {to} {method}: {judged:?}");
    }
    let explained = mind.explain(&question(caller("web-1"), "svc/cart", "80", "POST", "/a/../b")).unwrap();
    let judged = &explained.verdicts[0];
    assert_eq!(judged.pods, ["cart-1", "cart-2"], "configured alike");
    assert!(judged.policies[0].rules[0].failed[0].contains("methods"), "{judged:?}");
    assert!(judged.notes.iter().any(|n| n.contains("normalised to /b")), "{judged:?}");
    let tcp = mind.explain(&question(caller("web-1"), "svc/cart", "5432", "GET", "/")).unwrap();
    assert!(tcp.verdicts[0].notes[0].contains("declared as TCP"), "{tcp:?}");
    for (to, port, words) in [
        ("svc/cart", "", "several ports: 80, 5432"),
        ("svc/cart", "81", "no TCP port 81"),
        ("pod/cart-1", "admin", "no port named admin"),
    ] {
        let error = mind.explain(&question(caller("web-1"), to, port, "GET", "/")).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    assert!(
        mind.explain(&question(caller("web-9"), "svc/cart", "80", "GET", "/")).unwrap_err().to_string().contains("no pod web-9")
    );
}

fn preview(mind: &Mind, yaml: &str) -> Result<weft_api::console::Preview, Unanswered> {
    let objects = serde_saphyr::from_multiple(yaml).unwrap();
    mind.preview(Proposal { objects, since_seconds: 0 })
}

fn brief(changes: &[Change]) -> Vec<String> {
    changes
        .iter()
        .map(|c| {
            let source = if c.source.identity.is_empty() { &c.source.address } else { &c.source.workload };
            format!("{:?} {source} {} {} {} {} {}", c.effect, c.port, c.method, c.path, c.count, c.policy)
        })
        .collect()
}

fn with_traffic() -> Mind {
    let mind = mind();
    let edges = vec![
        edge(WEB, "", "GET", "/items", 10, 0),
        edge(WEB, "", "POST", "/items", 3, 3),
        edge("", "10.0.0.4", "GET", "/items", 4, 4),
        edge("", "10.0.0.4", "", "", 2, 2),
    ];
    report(&mind, "cart-1", Report { edges, ..Report::default() });
    report(
        &mind,
        "web-1",
        Report { edges: vec![edge("", "10.0.0.4", "GET", "/", 6, 0), edge(WEB, "", "GET", "/", 1, 0)], ..Report::default() },
    );
    mind
}

#[test]
fn who_would_be_locked_out_and_who_let_in() {
    let mind = with_traffic();
    // STRICT for the namespace: plaintext that passes now would be refused; what is refused now stays so.
    let strict = preview(
        &mind,
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: shop}\nspec: {mtls: {mode: STRICT}}",
    )
    .unwrap();
    assert_eq!(brief(&strict.changes), ["Refused 10.0.0.4 8080 GET / 6 "]);
    assert_eq!((strict.unchanged, strict.gone, strict.dropped), (20, 0, 0));
    assert_eq!(strict.changes[0].source.workload, "pod/old-1");
    assert!(strict.changes[0].reason.contains("STRICT"));

    // The policy is replaced by one of the same name.
    let wider = preview(
        &mind,
        "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: reads, namespace: shop}
spec:
  selector: {matchLabels: {app: cart}}
  rules:
  - from: [{source: {principals: ['*']}}]
    to: [{operation: {methods: [POST]}}]
",
    )
    .unwrap();
    assert_eq!(
        brief(&wider.changes),
        [
            "Refused deploy/web 8080 GET /items 10 ".replace("deploy", "pod").replace("web 8", "web-1 8"),
            "Allowed pod/web-1 8080 POST /items 3 shop/reads".into()
        ]
    );

    // What a sample doesn't tell is not guessed.
    let header = preview(
        &mind,
        "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-robots, namespace: shop}
spec:
  action: DENY
  rules:
  - to: [{operation: {paths: [/items]}}]
    when: [{key: 'request.headers[x-robot]', values: ['yes']}]
",
    )
    .unwrap();
    assert_eq!(brief(&header.changes), ["Undetermined pod/web-1 8080 GET /items 10 shop/no-robots"]);
    assert!(header.changes[0].reason.contains("x-robot"), "{header:?}");
    assert_eq!(header.unchanged, 16);
}

#[test]
fn proposals_that_change_nothing_or_are_wrong() {
    let mind = with_traffic();
    let policy = |spec: &str, annotations: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: shop, annotations: {{{annotations}}}}}\nspec: {spec}"
        )
    };
    let dry = preview(&mind, &policy("{action: DENY, rules: [{}]}", "istio.io/dry-run: 'true'")).unwrap();
    assert!(dry.changes.is_empty() && dry.unchanged == 26, "{dry:?}");
    assert!(dry.notes.iter().any(|n| n.contains("dry run")), "{dry:?}");
    let error = preview(&mind, &policy("{action: DENY}", "")).unwrap_err().to_string();
    assert!(error.contains("shop/p") && error.contains("spec.rules"), "{error}");
    let other = "apiVersion: v1\nkind: Service\nmetadata: {name: s, namespace: shop}\nspec: {ports: [{port: 1}]}";
    assert!(preview(&mind, other).unwrap_err().to_string().contains("neither"));
    let both = preview(&mind, &format!("{other}\n---\n{}", policy("{action: DENY, rules: [{}]}", ""))).unwrap();
    assert!(both.notes.iter().any(|n| n.contains("Service s is left out")), "{both:?}");
    assert_eq!(
        both.changes.iter().map(|c| (c.effect, c.count)).collect::<Vec<_>>(),
        [(Effect::Refused, 10), (Effect::Refused, 6), (Effect::Refused, 1)]
    );
    // Nobody has noticed.
    assert!(mind.config("shop", "cart-1").unwrap().authorization.len() == 1);
}
