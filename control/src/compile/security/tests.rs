use super::*;
use crate::compile::security::jwt::{KeySet, Keys};
use crate::compile::{Mesh, inbound_config};
use crate::index::Index;
use crate::model::policy::KeySource;
use crate::source::wire::parse;
use weft_api::wire::string_match::Kind;
use weft_api::wire::{AuthorizationAction, Condition, MtlsMode, StringMatch};

const PODS: &str = "
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web, tier: front}}
spec: {containers: [{name: app}]}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, labels: {app: db}}
spec: {containers: [{name: app}]}
---
apiVersion: v1
kind: Pod
metadata: {name: far, namespace: other, labels: {app: web}}
spec: {containers: [{name: app}]}
---
apiVersion: v1
kind: Pod
metadata: {name: control, namespace: weft-system, labels: {app: web}}
spec: {containers: [{name: app}]}
---
";

fn index(yaml: &str) -> Index {
    let index = Index::new([]);
    let documents: Vec<Value> = serde_saphyr::from_multiple(&format!("{PODS}{yaml}")).unwrap();
    index.replace(documents.into_iter().map(|d| parse(d).unwrap().unwrap()));
    index
}

fn told_with(index: &Index, pod: &str, mesh: &Mesh, keys: &Keys) -> wire::Inbound {
    let (namespace, name) = pod.split_once('/').unwrap();
    let view = index.view(namespace).unwrap();
    let root = index.policies_of(mesh.root_namespace());
    inbound_config(&view.pods[name], &Known { view: &view, root: &root, mesh, keys })
}

fn told(yaml: &str, pod: &str) -> wire::Inbound {
    told_with(&index(yaml), pod, &Mesh::default(), &Keys::default())
}

fn peer(name: &str, namespace: &str, created: &str, spec: &str) -> String {
    let created = if created.is_empty() { "null".to_owned() } else { format!("'{created}'") };
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: {namespace}, \
         creationTimestamp: {created}}}\nspec: {{{spec}}}\n---\n"
    )
}

#[test]
fn which_mutual_tls_holds() {
    const STRICT: &str = "mtls: {mode: STRICT}";
    const DISABLE: &str = "mtls: {mode: DISABLE}";
    const PERMISSIVE: &str = "mtls: {mode: PERMISSIVE}";
    const UNSET: &str = "mtls: {mode: UNSET}";
    let (old, new) = ("2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z");
    let web = |more: &str| format!("selector: {{matchLabels: {{app: web}}}}, {more}");
    // Policies (namespace, age, spec), pod, and what holds: the mode, and those of ports.
    type Case<'a> = (Vec<(&'a str, &'a str, String)>, &'a str, &'a str);
    let cases: Vec<Case> = vec![
        (vec![], "shop/web", "Permissive"),
        (vec![("weft-system", old, STRICT.into())], "shop/web", "Strict"),
        (vec![("weft-system", old, STRICT.into())], "weft-system/control", "Strict"),
        (vec![("other", old, STRICT.into())], "shop/web", "Permissive"),
        (vec![("weft-system", old, STRICT.into()), ("shop", old, PERMISSIVE.into())], "shop/web", "Permissive"),
        (vec![("weft-system", old, STRICT.into()), ("shop", old, UNSET.into())], "shop/web", "Strict"),
        (vec![("weft-system", old, STRICT.into()), ("shop", old, String::new())], "shop/web", "Strict"),
        (vec![("shop", old, DISABLE.into()), ("shop", old, web(STRICT))], "shop/web", "Strict"),
        (vec![("shop", old, DISABLE.into()), ("shop", old, web(STRICT))], "shop/db", "Disable"),
        (vec![("shop", old, STRICT.into()), ("shop", old, web(UNSET))], "shop/web", "Strict"),
        // The oldest of a scope, and it alone.
        (vec![("shop", new, STRICT.into()), ("shop", old, DISABLE.into())], "shop/web", "Disable"),
        (vec![("shop", new, STRICT.into()), ("shop", old, UNSET.into())], "shop/web", "Permissive"),
        (vec![("weft-system", new, STRICT.into()), ("weft-system", old, DISABLE.into())], "shop/web", "Disable"),
        (vec![("shop", new, web(STRICT)), ("shop", old, web(DISABLE))], "shop/web", "Disable"),
        (vec![("shop", "", STRICT.into()), ("shop", new, DISABLE.into())], "shop/web", "Disable"),
        // An empty selector is none.
        (vec![("shop", old, format!("selector: {{}}, {STRICT}"))], "shop/db", "Strict"),
        (vec![("shop", old, format!("selector: {{matchLabels: {{}}}}, {STRICT}"))], "shop/db", "Strict"),
        (vec![("shop", old, format!("selector: {{matchLabels: {{app: web, tier: back}}}}, {STRICT}"))], "shop/web", "Permissive"),
        // Those of the root namespace count without selector only.
        (vec![("weft-system", old, web(STRICT))], "shop/web", "Permissive"),
        (vec![("weft-system", old, web(STRICT))], "weft-system/control", "Permissive"),
        // Ports.
        (vec![("shop", old, web("portLevelMtls: {8080: {mode: DISABLE}}"))], "shop/web", "Permissive 8080=Disable"),
        (
            vec![
                ("shop", old, STRICT.into()),
                ("shop", old, web("portLevelMtls: {80: {mode: PERMISSIVE}, 81: {mode: UNSET}, 82: {}}")),
            ],
            "shop/web",
            "Strict 80=Permissive 81=Strict 82=Strict",
        ),
        (vec![("shop", old, web("mtls: {mode: DISABLE}, portLevelMtls: {81: {mode: UNSET}}"))], "shop/web", "Disable 81=Disable"),
        (vec![("shop", old, format!("{STRICT}, portLevelMtls: {{8080: {{mode: DISABLE}}}}"))], "shop/web", "Strict"),
        // What can't be read asks for STRICT, of those whom it is for.
        (vec![("shop", old, "mtls: {mode: STRIKT}".into())], "shop/web", "Strict"),
        (vec![("shop", old, web("mtls: {mode: STRIKT}"))], "shop/db", "Permissive"),
        (vec![("shop", old, web("portLevelMtls: {70000: {mode: DISABLE}}"))], "shop/web", "Strict"),
        (vec![("shop", old, "mtls: {mode: DISABLE, mood: good}".into())], "shop/web", "Strict"),
        (vec![("shop", old, "selector: 1".into())], "shop/db", "Strict"),
    ];
    for (policies, pod, expected) in cases {
        let all: Vec<String> =
            policies.iter().enumerate().map(|(i, (ns, age, spec))| peer(&format!("p{i}"), ns, age, spec)).collect();
        let inbound = told(&all.concat(), pod);
        let ports = inbound.port_mtls.iter().map(|p| format!(" {}={:?}", p.port, p.mode()));
        assert_eq!(format!("{:?}{}", inbound.mtls(), ports.collect::<String>()), expected, "{pod}: {policies:?}");
    }
}

#[test]
fn another_root_namespace() {
    let yaml = peer("p", "istio-system", "", "mtls: {mode: STRICT}");
    let mut mesh = Mesh::default();
    assert_eq!(told_with(&index(&yaml), "shop/web", &mesh, &Keys::default()).mtls(), MtlsMode::Permissive);
    mesh.policy.root_namespace = "istio-system".into();
    assert_eq!(told_with(&index(&yaml), "shop/web", &mesh, &Keys::default()).mtls(), MtlsMode::Strict);
}

fn authorization(name: &str, namespace: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{spec}}}\n---\n"
    )
}

#[test]
fn which_authorization_policies_select_a_pod() {
    let yaml = [
        authorization("z-all", "weft-system", ""),
        authorization("a-web", "weft-system", "selector: {matchLabels: {app: web}}"),
        authorization("m-all", "shop", "selector: {}"),
        authorization("n-web", "shop", "selector: {matchLabels: {app: web, tier: front}}"),
        authorization("o-back", "shop", "selector: {matchLabels: {app: web, tier: back}}"),
        authorization("p-service", "shop", "targetRefs: [{kind: Service, name: web}]"),
        authorization("q-gateway", "shop", "targetRef: {kind: Gateway, group: gateway.networking.k8s.io, name: g}"),
        authorization("r-far", "other", ""),
    ]
    .concat();
    for (pod, expected) in [
        ("shop/web", "weft-system/a-web weft-system/z-all shop/m-all shop/n-web"),
        ("shop/db", "weft-system/z-all shop/m-all"),
        ("other/far", "weft-system/a-web weft-system/z-all other/r-far"),
        ("weft-system/control", "weft-system/a-web weft-system/z-all"),
    ] {
        let names: Vec<String> = told(&yaml, pod).authorization.iter().map(|p| format!("{}/{}", p.namespace, p.name)).collect();
        assert_eq!(names.join(" "), expected, "{pod}");
    }
}

/// The one policy of a pod.
fn one(spec: &str) -> wire::AuthorizationPolicy {
    let inbound = told(&authorization("p", "shop", spec), "shop/web");
    let [policy] = &inbound.authorization[..] else { panic!("{inbound:?}") };
    policy.clone()
}

fn shown(value: &StringMatch) -> String {
    match value.kind.as_ref().unwrap() {
        Kind::Exact(text) => format!("={text}"),
        Kind::Prefix(text) => format!("^{text}"),
        Kind::Suffix(text) => format!("${text}"),
        Kind::Present(present) => format!("present {present}"),
        Kind::Glob(text) => format!("glob {text}"),
        Kind::Template(text) => format!("template {text}"),
    }
}

fn all(values: &[StringMatch]) -> String {
    values.iter().map(shown).collect::<Vec<_>>().join(" ")
}

#[test]
fn actions_and_empty_forms() {
    for (spec, action, rules) in [
        ("", AuthorizationAction::Allow, 0),
        ("rules: []", AuthorizationAction::Allow, 0),
        ("action: ALLOW, rules: [{}]", AuthorizationAction::Allow, 1),
        ("action: DENY, rules: [{}]", AuthorizationAction::Deny, 1),
        ("action: AUDIT, rules: [{}, {}]", AuthorizationAction::Audit, 2),
        ("action: AUDIT", AuthorizationAction::Audit, 0),
        ("action: CUSTOM, provider: {name: nobody}, rules: [{}]", AuthorizationAction::Custom, 1),
        ("rules: [{from: [], to: [], when: []}]", AuthorizationAction::Allow, 1),
    ] {
        let policy = one(spec);
        assert_eq!((policy.action(), policy.rules.len(), policy.broken.as_str()), (action, rules, ""), "{spec}");
        assert!(policy.authorizer.is_none() && !policy.dry_run);
    }
}

#[test]
fn sources() {
    let source = |spec: &str| {
        let policy = one(&format!("rules: [{{from: [{{source: {{{spec}}}}}]}}]"));
        assert_eq!(policy.broken, "", "{spec}");
        policy.rules[0].from[0].clone()
    };
    for (field, value, expected) in [
        ("principals", "cluster.local/ns/a/sa/b", "=cluster.local/ns/a/sa/b"),
        ("principals", "*", "present true"),
        ("principals", "*/sa/b", "$/sa/b"),
        ("principals", "cluster.local/ns/a/*", "^cluster.local/ns/a/"),
        ("principals", "a.b|c+d", "=a.b|c+d"),
        ("notPrincipals", "*", "present true"),
        ("requestPrincipals", "https://me/joe", "=https://me/joe"),
        ("requestPrincipals", "*", "present true"),
        ("requestPrincipals", "https://me/*", "^https://me/"),
        ("notRequestPrincipals", "*/joe", "$/joe"),
        ("namespaces", "a", "=a"),
        ("namespaces", "*", "present true"),
        ("namespaces", "a*", "glob a*"),
        ("namespaces", "*a", "glob *a"),
        ("namespaces", "a*b*c", "glob a*b*c"),
        ("notNamespaces", "a.b", "=a.b"),
        ("trustDomains", "old*", "^old"),
        ("notTrustDomains", "x", "=x"),
    ] {
        let read = source(&format!("{field}: ['{value}']"));
        let lists = [
            ("principals", &read.principals),
            ("notPrincipals", &read.not_principals),
            ("requestPrincipals", &read.request_principals),
            ("notRequestPrincipals", &read.not_request_principals),
            ("namespaces", &read.namespaces),
            ("notNamespaces", &read.not_namespaces),
            ("trustDomains", &read.trust_domains),
            ("notTrustDomains", &read.not_trust_domains),
        ];
        for (name, list) in lists {
            assert_eq!(all(list), if name == field { expected } else { "" }, "{field} {value}");
        }
    }
    let read = source("serviceAccounts: [web, other/db], notServiceAccounts: [a]");
    assert_eq!(read.service_accounts, ["shop/web", "other/db"]);
    assert_eq!(read.not_service_accounts, ["shop/a"]);
    let read = source(
        "ipBlocks: [10.0.0.1, 10.1.2.3/8], notIpBlocks: ['fd00::1'], remoteIpBlocks: ['fd00::/8'], notRemoteIpBlocks: [1.1.1.1/32]",
    );
    assert_eq!(read.ip_blocks, ["10.0.0.1/32", "10.0.0.0/8"]);
    assert_eq!(read.not_ip_blocks, ["fd00::1/128"]);
    assert_eq!(read.remote_ip_blocks, ["fd00::/8"]);
    assert_eq!(read.not_remote_ip_blocks, ["1.1.1.1/32"]);
}

#[test]
fn a_service_account_of_a_policy_of_the_root_namespace_is_of_that_namespace() {
    let yaml = authorization("p", "weft-system", "rules: [{from: [{source: {serviceAccounts: [web]}}]}]");
    assert_eq!(told(&yaml, "shop/web").authorization[0].rules[0].from[0].service_accounts, ["weft-system/web"]);
}

#[test]
fn operations() {
    let policy = one(
        "rules: [{to: [{operation: {hosts: [Shop.example, '*.example'], notHosts: ['a*'], ports: ['80', '8080'], notPorts: ['1'], \
         methods: [GET, '*', 'P*'], notMethods: [PUT], \
         paths: [/a, '/b*', '*/c', '*', '/d/{*}/e', '/f/{**}', '/g*h', '/i/{*}/', '/j/{**}/k'], notPaths: ['/{**}']}}]}]",
    );
    assert_eq!(policy.broken, "");
    let read = &policy.rules[0].to[0];
    assert_eq!(all(&read.hosts), "=Shop.example $.example");
    assert_eq!(all(&read.not_hosts), "^a");
    assert_eq!((&read.ports[..], &read.not_ports[..]), (&[80, 8080][..], &[1][..]));
    assert_eq!(all(&read.methods), "=GET present true ^P");
    assert_eq!(all(&read.not_methods), "=PUT");
    assert_eq!(
        all(&read.paths),
        "=/a ^/b $/c present true template /d/{*}/e template /f/{**} =/g*h template /i/{*}/ template /j/{**}/k"
    );
    assert_eq!(all(&read.not_paths), "template /{**}");
}

#[test]
fn conditions() {
    let condition = |key: &str, values: &str| -> Condition {
        let policy = one(&format!("rules: [{{when: [{{key: '{key}', values: [{values}], notValues: [{values}]}}]}}]"));
        assert_eq!(policy.broken, "", "{key}");
        let read = policy.rules[0].when[0].clone();
        assert_eq!(read.values, read.not_values);
        read
    };
    for (key, values, expected) in [
        ("request.headers[X-Tenant]", "a, 'b*'", "RequestHeader [x-tenant] =a ^b"),
        ("source.ip", "10.0.0.1, 10.0.0.0/8", "SourceIp [] =10.0.0.1/32 =10.0.0.0/8"),
        ("remote.ip", "'fd00::/8'", "RemoteIp [] =fd00::/8"),
        ("source.namespace", "a, 'b*c'", "SourceNamespace [] =a glob b*c"),
        ("source.principal", "'*', 'x*'", "SourcePrincipal [] present true ^x"),
        ("source.serviceAccount", "web, n/db", "SourceServiceAccount [] =shop/web =n/db"),
        ("source.trustDomain", "old", "SourceTrustDomain [] =old"),
        ("request.auth.principal", "'me/*'", "RequestPrincipal [] ^me/"),
        ("request.auth.audiences", "a", "RequestAudiences [] =a"),
        ("request.auth.presenter", "a", "RequestPresenter [] =a"),
        ("request.auth.claims[groups]", "admin", "RequestClaim [groups] =admin"),
        ("request.auth.claims[a.b/c][d]", "'*'", "RequestClaim [a.b/c,d] present true"),
        ("destination.ip", "1.1.1.1", "DestinationIp [] =1.1.1.1/32"),
        ("destination.port", "'80'", "DestinationPort [] =80"),
        ("connection.sni", "'*.example'", "ConnectionSni [] $.example"),
    ] {
        let read = condition(key, values);
        assert_eq!(format!("{:?} [{}] {}", read.attribute(), read.path.join(","), all(&read.values)), expected, "{key}");
    }
}

#[test]
fn dry_run_is_an_annotation() {
    for (value, dry) in [("'true'", true), ("'1'", true), ("'false'", false), ("'yes'", false)] {
        let yaml = authorization("p", "shop", "")
            .replace("namespace: shop", &format!("namespace: shop, annotations: {{istio.io/dry-run: {value}}}"));
        assert_eq!(told(&yaml, "shop/web").authorization[0].dry_run, dry, "{value}");
        let broken = yaml.replace("spec: {}", "spec: {rules: 1}");
        assert_eq!(told(&broken, "shop/web").authorization[0].dry_run, dry, "{value}");
    }
}

#[test]
fn what_can_not_be_understood_is_told_with_its_field() {
    for (spec, path, action) in [
        ("action: PERMIT, rules: [{}]", "spec.action", AuthorizationAction::Deny),
        ("action: DENY", "spec.rules", AuthorizationAction::Deny),
        ("action: CUSTOM, provider: {name: x}", "spec.rules", AuthorizationAction::Custom),
        ("action: CUSTOM, rules: [{}]", "spec.provider.name", AuthorizationAction::Custom),
        ("action: DENY, provider: {name: x}, rules: [{}]", "spec.provider", AuthorizationAction::Deny),
        ("rulez: [{}]", "spec.rulez", AuthorizationAction::Allow),
        ("rules: [{form: []}]", "spec.rules[0].form", AuthorizationAction::Allow),
        ("rules: [{from: [{}]}]", "spec.rules[0].from[0].source", AuthorizationAction::Allow),
        ("rules: [{from: [{source: {}}]}]", "spec.rules[0].from[0].source", AuthorizationAction::Allow),
        ("rules: [{to: [{operation: {}}]}]", "spec.rules[0].to[0].operation", AuthorizationAction::Allow),
        (
            "rules: [{from: [{source: {principals: ['']}}]}]",
            "spec.rules[0].from[0].source.principals[0]",
            AuthorizationAction::Allow,
        ),
        (
            "rules: [{from: [{source: {ipBlocks: [10.0.0.0/33]}}]}]",
            "spec.rules[0].from[0].source.ipBlocks[0]",
            AuthorizationAction::Allow,
        ),
        (
            "rules: [{from: [{source: {ipBlocks: [here]}}]}]",
            "spec.rules[0].from[0].source.ipBlocks[0]",
            AuthorizationAction::Allow,
        ),
        (
            "rules: [{from: [{source: {serviceAccounts: ['a*']}}]}]",
            "spec.rules[0].from[0].source.serviceAccounts[0]",
            AuthorizationAction::Allow,
        ),
        (
            "rules: [{from: [{source: {serviceAccounts: [a/b/c]}}]}]",
            "spec.rules[0].from[0].source.serviceAccounts[0]",
            AuthorizationAction::Allow,
        ),
        (
            "rules: [{from: [{source: {serviceAccounts: [a], namespaces: [b]}}]}]",
            "spec.rules[0].from[0].source.serviceAccounts",
            AuthorizationAction::Allow,
        ),
        (
            "rules: [{from: [{source: {serviceAccounts: [a,a,a,a,a,a,a,a,a,a,a,a,a,a,a,a,a]}}]}]",
            "spec.rules[0].from[0].source.serviceAccounts",
            AuthorizationAction::Allow,
        ),
        (
            "action: DENY, rules: [{}, {to: [{operation: {ports: ['65536']}}]}]",
            "spec.rules[1].to[0].operation.ports[0]",
            AuthorizationAction::Deny,
        ),
        ("rules: [{to: [{operation: {ports: ['http']}}]}]", "spec.rules[0].to[0].operation.ports[0]", AuthorizationAction::Allow),
        (
            "rules: [{to: [{operation: {paths: ['/a/{**}/{*}']}}]}]",
            "spec.rules[0].to[0].operation.paths[0]",
            AuthorizationAction::Allow,
        ),
        (
            "rules: [{to: [{operation: {paths: ['/a/{*}x']}}]}]",
            "spec.rules[0].to[0].operation.paths[0]",
            AuthorizationAction::Allow,
        ),
        (
            "rules: [{to: [{operation: {paths: ['/{*}/*']}}]}]",
            "spec.rules[0].to[0].operation.paths[0]",
            AuthorizationAction::Allow,
        ),
        ("rules: [{when: [{key: request.headers, values: [a]}]}]", "spec.rules[0].when[0].key", AuthorizationAction::Allow),
        ("rules: [{when: [{key: 'request.headers[a', values: [a]}]}]", "spec.rules[0].when[0].key", AuthorizationAction::Allow),
        ("rules: [{when: [{key: 'request.auth.claims', values: [a]}]}]", "spec.rules[0].when[0].key", AuthorizationAction::Allow),
        ("rules: [{when: [{key: source.port, values: [a]}]}]", "spec.rules[0].when[0].key", AuthorizationAction::Allow),
        (
            "rules: [{when: [{key: 'experimental.envoy.filters.a[b]', values: [a]}]}]",
            "spec.rules[0].when[0].key",
            AuthorizationAction::Allow,
        ),
        ("rules: [{when: [{key: source.ip}]}]", "spec.rules[0].when[0]", AuthorizationAction::Allow),
        ("rules: [{when: [{key: source.ip, notValues: [x]}]}]", "spec.rules[0].when[0].notValues[0]", AuthorizationAction::Allow),
        (
            "rules: [{when: [{key: destination.port, values: [x]}]}]",
            "spec.rules[0].when[0].values[0]",
            AuthorizationAction::Allow,
        ),
        ("rules: 1", "spec.rules", AuthorizationAction::Allow),
        ("action: 1", "spec.action", AuthorizationAction::Deny),
    ] {
        let policy = one(spec);
        assert!(policy.broken.starts_with(&format!("{path}: ")), "{spec}: {:?} does not name {path}", policy.broken);
        assert_eq!((policy.action(), policy.rules.len()), (action, 0), "{spec}");
    }
}

#[test]
fn the_selector_of_what_can_not_be_understood_counts_if_it_can_be_read() {
    let broken = |selector: &str| authorization("p", "shop", &format!("{selector}, rules: 1"));
    for (selector, web, db) in [
        ("selector: {matchLabels: {app: web}}", 1, 0),
        ("selector: {matchLabels: {app: [web]}}", 1, 1),
        ("selector: everybody", 1, 1),
        ("targetRefs: [{kind: Service, name: x}]", 0, 0),
    ] {
        let yaml = broken(selector);
        assert_eq!(told(&yaml, "shop/web").authorization.len(), web, "{selector}");
        assert_eq!(told(&yaml, "shop/db").authorization.len(), db, "{selector}");
    }
}

#[test]
fn the_last_good_version_stays() {
    let index = index(&authorization("p", "shop", "action: DENY, rules: [{to: [{operation: {methods: [PUT]}}]}]"));
    let apply = |yaml: &str| {
        let document: Vec<Value> = serde_saphyr::from_multiple(yaml).unwrap();
        index.apply(parse(document[0].clone()).unwrap().unwrap());
    };
    let policy = || told_with(&index, "shop/web", &Mesh::default(), &Keys::default()).authorization.first().cloned();
    let kept = || index.view("shop").unwrap().policies.authorizations["p"].clone();
    apply(&authorization("p", "shop", "action: ALLOW, rules: [{too: []}]"));
    let now = policy().unwrap();
    assert_eq!((now.action(), now.rules.len(), now.broken.as_str()), (AuthorizationAction::Deny, 1, ""));
    assert!(kept().kept && kept().problem.as_ref().unwrap().contains("spec.rules[0].too"));
    // Once more, by another mistake.
    apply(&authorization("p", "shop", "rules: 1"));
    assert_eq!(policy().unwrap().action(), AuthorizationAction::Deny);
    // A relist says the same again and changes nothing.
    index.publish();
    let mut view = index.subscribe("shop");
    view.mark_unchanged();
    apply(&authorization("p", "shop", "rules: 1"));
    index.publish();
    assert!(!view.has_changed().unwrap());
    apply(&authorization("p", "shop", "action: AUDIT"));
    assert_eq!(policy().unwrap().action(), AuthorizationAction::Audit);
    assert!(!kept().kept && kept().problem.is_none());
    // One that was deleted and made anew has no last good version.
    index.delete(crate::model::Kind::Authorization, &crate::model::Key::new("shop", "p"));
    assert!(policy().is_none());
    apply(&authorization("p", "shop", "rules: 1"));
    assert!(!policy().unwrap().broken.is_empty() && !kept().kept);
    // Of what refused from the beginning nothing is kept: the reason is the present one.
    apply(&authorization("p", "shop", "action: 1"));
    assert!(policy().unwrap().broken.contains("spec.action"));
}

fn mesh(yaml: &str) -> Mesh {
    let settings = weft_webhook::Settings::from_yaml(yaml).unwrap();
    Mesh { policy: settings.mesh, ..Mesh::default() }
}

#[test]
fn who_is_asked_by_custom_policies() {
    let mesh = mesh(
        "
mesh:
  extensionProviders:
  - {name: tracer, zipkin: {service: z, port: 1}}
  - name: web
    envoyExtAuthzHttp:
      service: foo/authz.foo.svc.cluster.local
      port: 8000
      timeout: 0.25s
      pathPrefix: /check
      failOpen: true
      statusOnError: '503'
      includeRequestHeadersInCheck: [Authorization, 'X-Ext-*']
      includeHeadersInCheck: [cookie]
      includeAdditionalHeadersInCheck: {x-from: mesh}
      includeRequestBodyInCheck: {maxRequestBytes: 100, allowPartialMessage: true, packAsBytes: true}
      headersToUpstreamOnAllow: [x-user]
      headersToDownstreamOnDeny: ['*']
      headersToDownstreamOnAllow: [set-cookie]
  - {name: opa, envoyExtAuthzGrpc: {service: opa.opa.svc.cluster.local, port: 9191}}
",
    );
    let of = |name: &str| {
        let spec = format!("action: CUSTOM, provider: {{name: {name}}}, rules: [{{}}]");
        told_with(&index(&authorization("p", "shop", &spec)), "shop/web", &mesh, &Keys::default()).authorization[0]
            .authorizer
            .clone()
    };
    let web = of("web").unwrap();
    assert_eq!(
        (web.address.as_str(), web.timeout_ms, web.fail_open, web.status_on_error),
        ("authz.foo.svc.cluster.local:8000", 250, true, 503)
    );
    assert_eq!((web.max_body_bytes, web.allow_partial_body, web.pack_as_bytes), (100, true, true));
    let Some(wire::external_authorizer::Protocol::Http(http)) = web.protocol else { panic!("{web:?}") };
    assert_eq!(all(&http.include_request_headers), "=authorization ^x-ext- =cookie");
    assert_eq!((http.path_prefix.as_str(), http.additional_headers["x-from"].as_str()), ("/check", "mesh"));
    assert_eq!(all(&http.headers_to_upstream_on_allow), "=x-user");
    assert_eq!(all(&http.headers_to_downstream_on_deny), "present true");
    assert_eq!(all(&http.headers_to_downstream_on_allow), "=set-cookie");
    let opa = of("opa").unwrap();
    assert!(matches!(opa.protocol, Some(wire::external_authorizer::Protocol::Grpc(_))));
    assert_eq!((opa.timeout_ms, opa.fail_open, opa.status_on_error), (600_000, false, 403));
    assert_eq!((of("tracer"), of("nobody")), (None, None));
}

#[test]
fn settings_of_the_mesh() {
    for (normalization, expected) in [
        ("DEFAULT", wire::PathNormalization::Base),
        ("BASE", wire::PathNormalization::Base),
        ("NONE", wire::PathNormalization::None),
        ("MERGE_SLASHES", wire::PathNormalization::MergeSlashes),
        ("DECODE_AND_MERGE_SLASHES", wire::PathNormalization::DecodeAndMergeSlashes),
    ] {
        let mesh = mesh(&format!(
            "mesh: {{pathNormalization: {{normalization: {normalization}}}, trustDomainAliases: [old], trustedHops: [10.0.0.0/8]}}"
        ));
        let inbound = told_with(&index(""), "shop/web", &mesh, &Keys::default());
        assert_eq!(inbound.path_normalization(), expected);
        assert_eq!(inbound.trust_domains, ["cluster.local", "old"]);
        assert_eq!(inbound.trusted_hops, ["10.0.0.0/8"]);
    }
    assert_eq!(told("", "shop/web").path_normalization(), wire::PathNormalization::Base);
}

fn request(name: &str, namespace: &str, spec: &str) -> String {
    authorization(name, namespace, spec).replace("AuthorizationPolicy", "RequestAuthentication")
}

const JWKS: &str = r#"{"keys":[{"kty":"RSA"}]}"#;

#[test]
fn token_rules_of_all_policies_are_one_list() {
    let rule = |issuer: &str| format!("jwtRules: [{{issuer: {issuer}, jwks: '{JWKS}'}}]");
    let yaml = [
        request("z", "weft-system", &rule("mesh")),
        request("b", "shop", &rule("shop")),
        request("a", "shop", &format!("selector: {{matchLabels: {{app: web}}}}, {}", rule("web"))),
        request("c", "shop", &format!("targetRefs: [{{kind: Gateway, name: g}}], {}", rule("gateway"))),
    ]
    .concat();
    for (pod, expected) in [("shop/web", "mesh web shop"), ("shop/db", "mesh shop"), ("other/far", "mesh")] {
        let issuers: Vec<String> = told(&yaml, pod).jwt.iter().map(|r| r.issuer.clone()).collect();
        assert_eq!(issuers.join(" "), expected, "{pod}");
    }
}

#[test]
fn token_rules() {
    let yaml = request(
        "p",
        "shop",
        &format!(
            "jwtRules: [{{issuer: me, audiences: [a, b], jwks: '{JWKS}', fromHeaders: [{{name: x-token, prefix: 'Tok '}}], fromParams: [t], \
             fromCookies: [c], forwardOriginalToken: true, outputPayloadToHeader: x-payload, \
             outputClaimToHeaders: [{{header: x-sub, claim: sub}}], spaceDelimitedClaims: [roles], timeout: 3s}}]"
        ),
    );
    let [rule] = &told(&yaml, "shop/web").jwt[..] else { panic!() };
    let expected = wire::JwtRule {
        issuer: "me".into(),
        audiences: vec!["a".into(), "b".into()],
        jwks: JWKS.into(),
        from_headers: vec![wire::JwtHeader { name: "x-token".into(), prefix: "Tok ".into() }],
        from_params: vec!["t".into()],
        from_cookies: vec!["c".into()],
        forward_original_token: true,
        output_payload_to_header: "x-payload".into(),
        output_claim_to_headers: vec![wire::ClaimToHeader { header: "x-sub".into(), claim: "sub".into() }],
        policy: "shop/p".into(),
        space_delimited_claims: vec!["roles".into()],
        ..wire::JwtRule::default()
    };
    assert_eq!(rule, &expected);
}

#[test]
fn keys_in_a_policy_are_a_set_or_one_key() {
    for jwks in [JWKS, r#"{"keys":[]}"#, r#"{"kty":"RSA","n":"AQAB","e":"AQAB"}"#] {
        let inbound = told(&request("p", "shop", &format!("jwtRules: [{{issuer: me, jwks: '{jwks}'}}]")), "shop/web");
        assert_eq!((inbound.jwt[0].jwks.as_str(), inbound.jwt[0].jwks_error.as_str()), (jwks, ""));
    }
}

#[test]
fn keys_come_from_where_the_rule_says() {
    let yaml = request(
        "p",
        "shop",
        "jwtRules: [{issuer: a, jwksUri: 'https://a/keys'}, {issuer: 'https://b'}, {issuer: c, jwksUri: 'https://c/keys'}]",
    );
    let keys = Keys::from([
        (KeySource::Uri("https://a/keys".into()), KeySet { jwks: JWKS.into(), error: "away".into() }),
        (KeySource::Issuer("https://b".into()), KeySet { jwks: String::new(), error: "away".into() }),
    ]);
    let index = index(&yaml);
    let jwt = told_with(&index, "shop/web", &Mesh::default(), &keys).jwt;
    let found: Vec<_> = jwt.iter().map(|r| (r.jwks.as_str(), r.jwks_error.as_str())).collect();
    assert_eq!(found[..2], [(JWKS, ""), ("", "away")]);
    assert!(found[2].0.is_empty() && found[2].1.contains("https://c/keys"));
    let view = index.view("shop").unwrap();
    let (root, mesh) = (Policies::default(), Mesh::default());
    let known = Known { view: &view, root: &root, mesh: &mesh, keys: &keys };
    assert!(jwt::awaits_keys(&view.pods["web"], &known));
    let mut more = keys.clone();
    more.insert(KeySource::Uri("https://c/keys".into()), KeySet::default());
    assert!(!jwt::awaits_keys(&view.pods["web"], &Known { keys: &more, ..known }));
}

#[test]
fn token_rules_that_can_not_be_used_refuse() {
    for (rules, path, issuers) in [
        ("[{}]", "spec.jwtRules[0].issuer", vec![""]),
        ("[{issuer: me, jwks: nonsense}]", "spec.jwtRules[0].jwks", vec!["me"]),
        ("[{issuer: me, jwks: '[]'}]", "spec.jwtRules[0].jwks", vec!["me"]),
        ("[{issuer: me, jwks: '{\"keys\":[{\"kty\":\"RSA\"}]}', jwksUri: 'https://x'}]", "spec.jwtRules[0].jwks", vec!["me"]),
        ("[{issuer: me, jwksUri: 'ftp://x'}]", "spec.jwtRules[0].jwksUri", vec!["me"]),
        ("[{issuer: me}]", "spec.jwtRules[0].issuer", vec!["me"]),
        (
            "[{issuer: 'https://a'}, {issuer: 'https://b', audiences: ['']}]",
            "spec.jwtRules[1].audiences[0]",
            vec!["https://a", "https://b"],
        ),
        ("[{issuer: 'https://a', fromHeaders: [{name: 'x y'}]}]", "spec.jwtRules[0].fromHeaders[0].name", vec!["https://a"]),
        ("[{issuer: 'https://a', outputPayloadToHeader: 'x y'}]", "spec.jwtRules[0].outputPayloadToHeader", vec!["https://a"]),
        (
            "[{issuer: 'https://a', outputClaimToHeaders: [{header: x}]}]",
            "spec.jwtRules[0].outputClaimToHeaders[0].claim",
            vec!["https://a"],
        ),
        ("[{issuer: 'https://a', timeout: soon}]", "spec.jwtRules[0].timeout", vec!["https://a"]),
        ("[{issuer: 'https://a', jwskUri: x}]", "spec.jwtRules[0].jwskUri", vec!["https://a"]),
        ("1", "spec.jwtRules", vec![""]),
    ] {
        let inbound = told(&request("p", "shop", &format!("jwtRules: {rules}")), "shop/web");
        let found: Vec<_> = inbound.jwt.iter().map(|r| r.issuer.as_str()).collect();
        assert_eq!(found, issuers, "{rules}");
        for rule in &inbound.jwt {
            assert!(rule.jwks.is_empty() && rule.jwks_error.contains(path), "{rules}: {:?}", rule.jwks_error);
            assert_eq!(rule.policy, "shop/p");
        }
    }
}

#[test]
fn versions() {
    let yaml = authorization("p", "shop", "action: AUDIT");
    assert_eq!(told(&yaml.replace("/v1\n", "/v1beta1\n"), "shop/web").authorization[0].broken, "");
    assert!(told(&yaml.replace("/v1\n", "/v3\n"), "shop/web").authorization[0].broken.starts_with("apiVersion: "));
}

#[test]
fn what_is_said_of_policies() {
    let yaml = [
        peer("old", "shop", "2026-01-01T00:00:00Z", "mtls: {mode: STRICT}"),
        peer("new", "shop", "2026-02-01T00:00:00Z", "mtls: {mode: DISABLE}"),
        peer("bad", "other", "", "mtls: {mode: STRIKT}"),
        peer("far", "weft-system", "", "selector: {matchLabels: {app: web}}"),
        peer("ports", "other", "", "portLevelMtls: {1: {mode: STRICT}}"),
        authorization("good", "shop", "rules: [{}]"),
        authorization("star", "shop", "rules: [{to: [{operation: {paths: ['/a*b']}}]}]"),
        authorization("typo", "shop", "rulez: []"),
        authorization("deny", "shop", "action: DENY"),
        authorization("gate", "shop", "targetRefs: [{kind: Gateway, name: g}]"),
        authorization("ask", "shop", "action: CUSTOM, provider: {name: nobody}, rules: [{}]"),
        request("keys", "shop", "jwtRules: [{issuer: a, jwksUri: 'https://a/keys'}]"),
        request("kept", "shop", "jwtRules: [{issuer: b, jwksUri: 'https://b/keys'}]"),
        request("soon", "shop", "jwtRules: [{issuer: c, jwksUri: 'https://c/keys'}]"),
    ]
    .concat();
    let keys = Keys::from([
        (KeySource::Uri("https://a/keys".into()), KeySet { jwks: String::new(), error: "away".into() }),
        (KeySource::Uri("https://b/keys".into()), KeySet { jwks: JWKS.into(), error: "away".into() }),
    ]);
    let index = index(&yaml);
    let all: Vec<_> = index.all_policies().iter().flat_map(|p| verdict::of_namespace(p, &Mesh::default(), &keys)).collect();
    for (name, reason, text) in [
        ("shop/old", "Accepted", "in force"),
        ("shop/new", "Conflicted", "shop/old"),
        ("other/bad", "Invalid", "spec.mtls.mode: "),
        ("weft-system/far", "NoEffect", "root namespace"),
        ("other/ports", "Conflicted", "other/bad"),
        ("shop/good", "Accepted", "in force"),
        ("shop/star", "Accepted", "\"/a*b\""),
        ("shop/typo", "Invalid", "it allows nothing"),
        ("shop/deny", "Invalid", "deny all requests"),
        ("shop/gate", "TargetNotSupported", "spec.targetRefs"),
        ("shop/ask", "UnknownProvider", "nobody"),
        ("shop/keys", "KeysNotAvailable", "away"),
        ("shop/kept", "Accepted", "in force"),
    ] {
        let verdict = all.iter().find(|v| v.key.to_string() == name).unwrap_or_else(|| panic!("nothing is said of {name}"));
        assert_eq!(verdict.wanted.reason, reason, "{name}: {}", verdict.wanted.message);
        assert!(verdict.wanted.message.contains(text), "{name}: {}", verdict.wanted.message);
        assert_eq!(verdict.wanted.status == "True", reason == "Accepted");
    }
    assert!(!all.iter().any(|v| v.key.name == "soon"), "of keys that were not asked for yet nothing is said");
}

#[test]
fn a_folder_of_manifests_is_world_enough() {
    let yaml = format!("{PODS}{}{}", peer("p", "weft-system", "", "mtls: {mode: STRICT}"), authorization("a", "shop", ""));
    let documents: Vec<Value> = serde_saphyr::from_multiple(&yaml).unwrap();
    let objects: Vec<_> = documents.into_iter().map(|d| parse(d).unwrap().unwrap()).collect();
    let inbound = crate::compile::offline(objects.clone(), "shop", "web", &Mesh::default()).unwrap();
    assert_eq!((inbound.mtls(), inbound.authorization.len()), (MtlsMode::Strict, 1));
    assert_eq!(crate::compile::offline(objects, "shop", "absent", &Mesh::default()), None);
}
