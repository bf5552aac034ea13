use super::*;

/// A small cluster: `web` listens on 8080 (HTTP, behind port 80) and 9000 (TCP); `db` on 5432 (TCP); `odd` has no sidecar.
#[derive(Default)]
pub(super) struct Shop {
    pub(super) callers: Vec<PlaintextCaller>,
}

impl Surroundings for Shop {
    fn root_namespace(&self) -> Option<String> {
        Some("weft-system".into())
    }

    fn trust_domains(&self) -> Vec<String> {
        vec!["cluster.local".into(), "old.example".into()]
    }

    fn has_namespace(&self, name: &str) -> Option<bool> {
        Some(matches!(name, "shop" | "default" | "weft-system"))
    }

    fn has_provider(&self, name: &str) -> Option<bool> {
        Some(name == "opa")
    }

    fn pods(&self, namespace: Option<&str>, labels: &BTreeMap<String, String>) -> Option<Vec<PodFacts>> {
        let pod = |name: &str, meshed, ports: &[(u16, Protocol)], services: &[(&str, u16, u16)]| PodFacts {
            namespace: "shop".into(),
            name: name.into(),
            meshed,
            ports: ports.iter().map(|(number, protocol)| PodPort { number: *number, protocol: *protocol }).collect(),
            services: services
                .iter()
                .map(|(s, port, target)| ServicePort { service: (*s).into(), port: *port, target: *target })
                .collect(),
        };
        let all = [
            pod(
                "web",
                true,
                &[(8080, Protocol::Http), (9000, Protocol::Tcp), (7000, Protocol::Detected)],
                &[("web", 80, 8080), ("web", 443, 8443)],
            ),
            pod("db", true, &[(5432, Protocol::Tcp)], &[("db", 5432, 5432)]),
            pod("api", true, &[(8080, Protocol::Http)], &[("api", 8080, 8080)]),
            pod("odd", false, &[], &[]),
        ];
        let picked =
            |p: &PodFacts| namespace.is_none_or(|n| n == p.namespace) && labels.get("app").is_none_or(|app| *app == p.name);
        Some(all.into_iter().filter(picked).collect())
    }

    fn plaintext_callers(&self, _: Option<&str>, _: &BTreeMap<String, String>) -> Vec<PlaintextCaller> {
        self.callers.clone()
    }
}

#[test]
fn about_peer_authentication() {
    let quiet = Shop::default();
    let caller = |who: &str, port| PlaintextCaller { who: who.into(), port, count: 7 };
    let loud = Shop { callers: vec![caller("shop/old", 8080), caller("10.9.9.9", 9000)] };
    warnings(
        PEER,
        &quiet,
        &[
            ("{mtls: {mode: STRICT}}", ""),
            ("{selector: {}}", "spec.selector.matchLabels … selects every pod"),
            ("{selector: {matchLabels: {app: web}}, portLevelMtls: {8080: {mode: DISABLE}}}", ""),
            ("{selector: {matchLabels: {app: web}}, portLevelMtls: {80: {mode: DISABLE}}}", "spec.portLevelMtls.80 … write 8080"),
            ("{selector: {matchLabels: {app: wbe}}}", "spec.selector.matchLabels … no pod in namespace shop has app=wbe"),
            ("{selector: {matchLabels: {app: odd}}}", "spec.selector.matchLabels … none of the selected pods has the sidecar"),
        ],
    );
    let port = |port: u16, mode: &str| {
        format!(
            "{{selector: {{matchLabels: {{app: web}}}}, mtls: {{mode: STRICT}}, portLevelMtls: {{{port}: {{mode: {mode}}}}}}}"
        )
    };
    warnings(
        PEER,
        &loud,
        &[
            ("{mtls: {mode: STRICT}}", "spec.mtls.mode … shop/old on port 8080 (7 times) and 1 more"),
            ("{mtls: {mode: PERMISSIVE}}", ""),
            (&port(8080, "PERMISSIVE"), "spec.mtls.mode … 10.9.9.9 on port 9000 (7 times);"),
            (&port(8080, "UNSET"), "spec.mtls.mode … shop/old on port 8080 (7 times) and 1 more"),
            (
                "{selector: {matchLabels: {app: web}}, portLevelMtls: {9000: {mode: STRICT}}}",
                "spec.mtls.mode … 10.9.9.9 on port 9000",
            ),
        ],
    );
    let mut object = object(PEER, "{selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}}");
    object["metadata"]["namespace"] = json!("weft-system");
    let found = validate(PEER, &object, &loud).warnings;
    assert!(found.len() == 1 && found[0].message.contains("ignored"), "{found:?}");
}

#[test]
fn about_request_authentication() {
    let rule =
        |rule: &str, expected: &str| warnings(REQUEST, &Shop::default(), &[(&format!("{{jwtRules: [{rule}]}}"), expected)]);
    rule("{issuer: 'https://a', audiences: [x]}", "");
    rule("{issuer: a, jwksUri: 'http://a/k'}", "spec.jwtRules[0].jwksUri … plain HTTP");
    rule(
        "{issuer: a, jwks: '{\"keys\": [{\"kty\": \"EC\", \"crv\": \"P-256\", \"x\": \"AQ\", \"y\": \"AQ\", \"d\": \"AQ\"}]}'}",
        "spec.jwtRules[0].jwks … keys[0] contains the private key",
    );
    rule("{issuer: a, jwks: '{\"keys\": [{\"kty\": \"oct\", \"k\": \"AQ\"}]}'}", "spec.jwtRules[0].jwks … shared secret");
    rule("{issuer: 'https://a'}, {issuer: 'https://a'}", "spec.jwtRules[1].issuer … also the issuer of jwtRules[0]");
    rule(
        "{issuer: 'https://a', fromHeaders: [{name: X}, {name: x}, {name: x, prefix: 'B '}]}",
        "spec.jwtRules[0].fromHeaders[1] … named twice",
    );
    rule(
        "{issuer: 'https://a', outputClaimToHeaders: [{header: X, claim: a}, {header: x, claim: b}]}",
        "spec.jwtRules[0].outputClaimToHeaders[1].header … already written",
    );
    warnings(REQUEST, &Nothing, &[("{targetRef: {kind: Service, name: a}}", "spec.targetRefs … sidecars ignore")]);
}

#[test]
fn about_who_is_meant() {
    let from = |action: &str, source: &str| format!("{{action: {action}, rules: [{{from: [{{source: {source}}}]}}]}}");
    for (action, source, expected) in [
        (
            "ALLOW",
            "{principals: [cluster.local/ns/shop/sa/web, old.example/ns/default/sa/x, '*', '*/sa/x', 'cluster.local/*']}",
            "",
        ),
        (
            "ALLOW",
            "{principals: ['spiffe://cluster.local/ns/shop/sa/web']}",
            "spec.rules[0].from[0].source.principals[0] … write \"cluster.local/ns/shop/sa/web\"",
        ),
        (
            "ALLOW",
            "{principals: ['cluster.local/ns/*/sa/web']}",
            "spec.rules[0].from[0].source.principals[0] … matches no caller",
        ),
        ("DENY", "{principals: [web]}", "spec.rules[0].from[0].source.principals[0] … so it denies nothing"),
        (
            "ALLOW",
            "{principals: [other.example/ns/shop/sa/web]}",
            "spec.rules[0].from[0].source.principals[0] … not the trust domain of this mesh, which is cluster.local",
        ),
        (
            "ALLOW",
            "{principals: [cluster.local/ns/shpo/sa/web]}",
            "spec.rules[0].from[0].source.principals[0] … there is no namespace \"shpo\"",
        ),
        (
            "ALLOW",
            "{principals: ['cluster.local/ns/shpo/*']}",
            "spec.rules[0].from[0].source.principals[0] … there is no namespace \"shpo\"",
        ),
        ("ALLOW", "{principals: ['cluster.local/ns/sho*']}", ""),
        ("ALLOW", "{namespaces: [shpo, 'sh*']}", "spec.rules[0].from[0].source.namespaces[0] … there is no namespace"),
        ("ALLOW", "{serviceAccounts: [a, shpo/a]}", "spec.rules[0].from[0].source.serviceAccounts[1] … there is no namespace"),
        (
            "DENY",
            "{principals: [cluster.local/ns/shop/sa/a], notPrincipals: [cluster.local/ns/shop/sa/a]}",
            "spec.rules[0].from[0].source … can never match, so it denies nothing",
        ),
        ("ALLOW", "{namespaces: [shop], notNamespaces: ['*']}", "spec.rules[0].from[0].source … so it allows nothing"),
        (
            "DENY",
            "{notPrincipals: [cluster.local/ns/shop/sa/a]}",
            "spec.rules[0].from[0].source … every caller without an identity",
        ),
        ("DENY", "{notNamespaces: [shop]}", "spec.rules[0].from[0].source … every caller without an identity"),
        ("DENY", "{notPrincipals: ['*']}", ""),
        ("DENY", "{principals: ['*'], notPrincipals: [cluster.local/ns/shop/sa/a]}", ""),
        ("ALLOW", "{notPrincipals: [cluster.local/ns/shop/sa/a]}", ""),
    ] {
        warnings(AUTHORIZATION, &Shop::default(), &[(&from(action, source), expected)]);
    }
    warnings(
        AUTHORIZATION,
        &Shop::default(),
        &[(
            "{rules: [{when: [{key: source.principal, values: ['spiffe://x']}]}]}",
            "spec.rules[0].when[0].values[0] … without spiffe://",
        )],
    );
}

#[test]
fn about_what_is_called() {
    let to = |action: &str, operation: &str| {
        format!("{{selector: {{matchLabels: {{app: api}}}}, action: {action}, rules: [{{to: [{{operation: {operation}}}]}}]}}")
    };
    let at = |field: &str, words: &str| format!("spec.rules[0].to[0].operation{field} … {words}");
    for (action, operation, expected) in [
        ("ALLOW", "{paths: [/a, '/a/*', '*.png', '/{*}', '*']}", String::new()),
        ("DENY", "{paths: [admin]}", at(".paths[0]", "paths begin with")),
        ("ALLOW", "{paths: ['/api/.*']}", at(".paths[0]", "not a regular expression")),
        ("ALLOW", "{paths: ['/a/*/b']}", at(".paths[0]", "write {*}")),
        ("ALLOW", "{paths: ['/a?x=1']}", at(".paths[0]", "without its query")),
        ("DENY", "{notPaths: ['/a/../b']}", at(".notPaths[0]", "are resolved")),
        ("ALLOW", "{hosts: [example.com, 'a*b']}", at(".hosts[1]", "matches no host")),
        ("DENY", "{hosts: [example.com]}", at(".hosts[0]", "add \"example.com:*\"")),
        ("DENY", "{hosts: [example.com, 'example.com:*']}", String::new()),
        ("DENY", "{hosts: ['example.com*', 'example.com:8080']}", String::new()),
        ("ALLOW", "{notHosts: [example.com]}", at(".notHosts[0]", "add")),
        ("DENY", "{methods: [GET], notMethods: ['*']}", at("", "can never match")),
        ("ALLOW", "{ports: ['8080']}", String::new()),
        ("ALLOW", "{ports: ['81']}", String::new()),
    ] {
        warnings(AUTHORIZATION, &Shop::default(), &[(&to(action, operation), &expected)]);
    }
    warnings(
        AUTHORIZATION,
        &Shop::default(),
        &[
            (
                "{selector: {matchLabels: {app: web}}, rules: [{to: [{operation: {ports: ['80']}}]}]}",
                &at(".ports[0]", "80 is the port of Service web; policies see the port of the pod, write 8080"),
            ),
            (
                "{selector: {matchLabels: {app: web}}, rules: [{when: [{key: destination.port, values: ['80']}]}]}",
                "spec.rules[0].when[0].values[0] … write 8080",
            ),
            ("{}", "spec.rules … every pod of the namespace will refuse"),
            ("{selector: {matchLabels: {app: web}}}", "spec.rules … the selected pods will refuse"),
            ("{action: CUSTOM, provider: {name: opa}, rules: [{}]}", ""),
            ("{action: CUSTOM, provider: {name: oap}, rules: [{}]}", "spec.provider.name … \"oap\" is not an extension provider"),
            ("{targetRef: {kind: Service, name: web}, rules: [{}]}", "spec.targetRefs … sidecars ignore"),
        ],
    );
}

#[test]
fn about_http_on_tcp() {
    let rule = |app: &str, action: &str, rule: &str| {
        format!("{{selector: {{matchLabels: {{app: {app}}}}}, action: {action}, rules: [{rule}]}}")
    };
    for (app, action, text, expected) in [
        (
            "db",
            "ALLOW",
            "{to: [{operation: {ports: ['5432'], methods: [GET]}}]}",
            "spec.rules[0].to[0].operation.methods … port 5432 is TCP, where there is no such thing: this rule allows nothing there",
        ),
        (
            "db",
            "DENY",
            "{to: [{operation: {ports: ['5432'], methods: [GET]}}]}",
            "spec.rules[0].to[0].operation.methods … denies there without it",
        ),
        (
            "db",
            "DENY",
            "{to: [{operation: {ports: ['5432']}}], when: [{key: 'request.headers[a]', values: [b]}]}",
            "spec.rules[0].when[0] … port 5432 is TCP",
        ),
        ("db", "DENY", "{to: [{operation: {ports: ['5432']}}]}", ""),
        ("web", "DENY", "{to: [{operation: {ports: ['8080'], methods: [GET]}}]}", ""),
        ("web", "DENY", "{to: [{operation: {ports: ['7000'], methods: [GET]}}]}", ""),
        (
            "web",
            "DENY",
            "{to: [{operation: {methods: [GET]}}]}",
            "spec.rules[0] … on TCP ports, such as 9000, the HTTP fields don't exist and this denies all connections;",
        ),
        (
            "web",
            "DENY",
            "{from: [{source: {ipBlocks: [10.0.0.1]}}], to: [{operation: {methods: [GET]}}]}",
            "spec.rules[0] … denies all connections of those callers",
        ),
        ("web", "DENY", "{from: [{source: {requestPrincipals: ['*']}}]}", "spec.rules[0] … denies all connections;"),
        ("web", "ALLOW", "{to: [{operation: {methods: [GET]}}]}", ""),
        ("api", "DENY", "{to: [{operation: {methods: [GET]}}]}", ""),
    ] {
        warnings(AUTHORIZATION, &Shop::default(), &[(&rule(app, action, text), expected)]);
    }
    // Where nothing is known, any port may be TCP.
    warnings(
        AUTHORIZATION,
        &Nothing,
        &[
            ("{action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}", "spec.rules[0] … on TCP ports the HTTP fields"),
            ("{action: DENY, rules: [{to: [{operation: {methods: [GET], ports: ['80']}}]}]}", ""),
        ],
    );
}

#[test]
fn warnings_fit_into_a_header() {
    let long = "x".repeat(200);
    let spec = format!(
        "{{selector: {{matchLabels: {{app: {}}}}}, action: DENY, rules: [{{from: [{{source: {{principals: [{long}], notNamespaces: [a]}}}}], to: [{{operation: {{hosts: ['{long}'], paths: ['{long}']}}}}]}}]}}",
        &long[..60]
    );
    let verdict = validate(AUTHORIZATION, &object(AUTHORIZATION, &spec), &Shop::default());
    assert!(verdict.warnings.len() >= 4, "{:?}", verdict);
    for warning in verdict.warnings {
        assert!(format!("weft: {warning}").chars().count() <= 256, "{warning}");
    }
}
