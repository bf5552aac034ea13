use super::*;

/// A rule with one `from`.
fn from(source: &str) -> String {
    format!("{{rules: [{{from: [{{source: {source}}}]}}]}}")
}

/// A rule with one `to`.
fn to(operation: &str) -> String {
    format!("{{rules: [{{to: [{{operation: {operation}}}]}}]}}")
}

/// A rule with one condition.
fn when(condition: &str) -> String {
    format!("{{rules: [{{when: [{condition}]}}]}}")
}

fn each(build: fn(&str) -> String, rows: &[(&str, &str)]) {
    for (part, expected) in rows {
        errors(AUTHORIZATION, &[(&build(part), expected)]);
    }
}

#[test]
fn of_the_shape() {
    errors(
        AUTHORIZATION,
        &[
            ("{}", ""),
            ("{rules: null, action: null, selector: null}", ""),
            ("[]", "spec … an object is expected"),
            ("{rules: {}}", "spec.rules … a list is expected"),
            ("{rules: [null]}", "spec.rules[0] … must not be null"),
            ("{rules: [{}]}", ""),
            ("{rules: [x]}", "spec.rules[0] … an object is expected"),
            ("{rulez: []}", "spec.rulez … did you mean rules?"),
            ("{rules: [{form: []}]}", "spec.rules[0].form … did you mean from?"),
            ("{rules: [{zzzzzzzzz: []}]}", "spec.rules[0].zzzzzzzzz … known are from, to, when"),
            ("{action: Deny, rules: [{}]}", "spec.action … did you mean DENY?"),
            ("{action: 1}", "spec.action … a string is expected"),
            ("{action: AUDIT}", ""),
            ("{action: AUDIT, rules: [{}]}", ""),
            ("{action: DENY}", "spec.rules … DENY without rules would never apply"),
            ("{action: DENY, rules: []}", "spec.rules … would never apply"),
            ("{action: DENY, rules: [{}]}", ""),
            ("{provider: {name: x}}", "spec.provider … only with the action CUSTOM, not with ALLOW"),
            ("{action: CUSTOM, rules: [{}]}", "spec.provider.name … must be set"),
            ("{action: CUSTOM, rules: [{}], provider: {}}", "spec.provider.name … must not be empty"),
            ("{action: CUSTOM, rules: [{}], provider: {name: ''}}", "spec.provider.name … must not be empty"),
            ("{action: CUSTOM, provider: {name: x}}", "spec.rules … CUSTOM without rules"),
            ("{action: CUSTOM, rules: [{}], provider: {name: x}}", ""),
            ("{rules: [{from: []}]}", "spec.rules[0].from … must not be empty"),
            ("{rules: [{to: []}]}", "spec.rules[0].to … must not be empty"),
            ("{rules: [{from: [{}]}]}", "spec.rules[0].from[0].source … must be set"),
            ("{rules: [{from: [null]}]}", "spec.rules[0].from[0] … must not be null"),
            ("{rules: [{to: [{operation: null}]}]}", "spec.rules[0].to[0].operation … must be set"),
            ("{rules: [{from: [{source: {}}]}]}", "spec.rules[0].from[0].source … must not be empty"),
            ("{rules: [{from: [{source: {principals: []}}]}]}", "spec.rules[0].from[0].source … must not be empty"),
            ("{rules: [{to: [{operation: {}}]}]}", "spec.rules[0].to[0].operation … must not be empty"),
            (
                "{rules: [{to: [{source: {}}]}]}",
                "spec.rules[0].to[0].source … known are operation | spec.rules[0].to[0].operation … must be set",
            ),
        ],
    );
    let rules = vec!["{}"; 513].join(",");
    errors(AUTHORIZATION, &[(&format!("{{rules: [{rules}]}}"), "spec.rules … at most 512")]);
    let sources = vec!["{source: {namespaces: [a]}}"; 513].join(",");
    errors(AUTHORIZATION, &[(&format!("{{rules: [{{from: [{sources}]}}]}}"), "spec.rules[0].from … at most 512")]);
}

#[test]
fn of_sources() {
    each(
        from,
        &[
            ("{principals: [cluster.local/ns/a/sa/b, '*', 'x*', '*x']}", ""),
            ("{principals: [a, '']}", "spec.rules[0].from[0].source.principals[1] … an empty string"),
            ("{notPrincipals: ['']}", "spec.rules[0].from[0].source.notPrincipals[0] … an empty string"),
            ("{requestPrincipals: ['']}", "spec.rules[0].from[0].source.requestPrincipals[0] … an empty string"),
            ("{notRequestPrincipals: ['']}", "spec.rules[0].from[0].source.notRequestPrincipals[0] … an empty string"),
            ("{namespaces: ['']}", "spec.rules[0].from[0].source.namespaces[0] … an empty string"),
            ("{notNamespaces: ['']}", "spec.rules[0].from[0].source.notNamespaces[0] … an empty string"),
            ("{namespaces: ['a*b', 'x']}", ""),
            ("{principals: a}", "spec.rules[0].from[0].source.principals … a list is expected: [\"a\"]"),
            (
                "{principal: [a]}",
                "spec.rules[0].from[0].source.principal … did you mean principals? | spec.rules[0].from[0].source … must not be empty",
            ),
            (
                "{not_principals: [a], namespaces: [b]}",
                "spec.rules[0].from[0].source.not_principals … did you mean notPrincipals?",
            ),
            ("{ipBlocks: [10.1.2.3, 10.0.0.0/8, '2001:db8::/32', '::1', 0.0.0.0/0, '1.2.3.4/32']}", ""),
            ("{ipBlocks: [10.1.2]}", "spec.rules[0].from[0].source.ipBlocks[0] … \"10.1.2\" is not an IP address or CIDR range"),
            ("{ipBlocks: ['']}", "spec.rules[0].from[0].source.ipBlocks[0] … an empty string"),
            ("{ipBlocks: [10.0.0.0/33]}", "spec.rules[0].from[0].source.ipBlocks[0] … from 0 to 32"),
            ("{notIpBlocks: ['::/129']}", "spec.rules[0].from[0].source.notIpBlocks[0] … from 0 to 128"),
            ("{remoteIpBlocks: [10.0.0.0/08]}", "spec.rules[0].from[0].source.remoteIpBlocks[0] … from 0 to 32"),
            (
                "{notRemoteIpBlocks: [host/8]}",
                "spec.rules[0].from[0].source.notRemoteIpBlocks[0] … \"host\" is not an IP address",
            ),
            (
                "{remoteIpBlocks: ['10.0.0.0/+8', '10.0.0.0/']}",
                "spec.rules[0].from[0].source.remoteIpBlocks[0] | spec.rules[0].from[0].source.remoteIpBlocks[1]",
            ),
            ("{serviceAccounts: [a, b/c]}", ""),
            ("{serviceAccounts: ['']}", "spec.rules[0].from[0].source.serviceAccounts[0] … an empty string"),
            ("{serviceAccounts: ['a*']}", "spec.rules[0].from[0].source.serviceAccounts[0] … wildcards are not allowed"),
            ("{serviceAccounts: [a/b/c]}", "spec.rules[0].from[0].source.serviceAccounts[0] … \"namespace/account\" is expected"),
            ("{serviceAccounts: [/b]}", "spec.rules[0].from[0].source.serviceAccounts[0] … the namespace before"),
            ("{notServiceAccounts: [a/]}", "spec.rules[0].from[0].source.notServiceAccounts[0] … the name after"),
            ("{serviceAccounts: [a], principals: [b]}", "spec.rules[0].from[0].source … can't be combined"),
            ("{notServiceAccounts: [a], notNamespaces: [b]}", "spec.rules[0].from[0].source … can't be combined"),
            ("{serviceAccounts: [a], ipBlocks: [10.0.0.1], trustDomains: [x]}", ""),
            ("{trustDomains: [cluster.local, '*', '*.example', 'x*']}", ""),
            ("{trustDomains: ['a*b']}", "spec.rules[0].from[0].source.trustDomains[0] … first or last"),
            ("{trustDomains: ['*a*']}", "spec.rules[0].from[0].source.trustDomains[0] … only one"),
            ("{notTrustDomains: [a/b]}", "spec.rules[0].from[0].source.notTrustDomains[0] … contains \"/\""),
            ("{notTrustDomains: ['']}", "spec.rules[0].from[0].source.notTrustDomains[0] … an empty string"),
        ],
    );
    let many = |n: usize| format!("{{serviceAccounts: [{}]}}", (0..n).map(|i| format!("a{i}")).collect::<Vec<_>>().join(","));
    each(from, &[(&many(16), ""), (&many(17), "spec.rules[0].from[0].source.serviceAccounts … at most 16")]);
    let long = format!("{{serviceAccounts: [{}]}}", "a".repeat(321));
    each(from, &[(&long, "spec.rules[0].from[0].source.serviceAccounts[0] … longer than 320")]);
}

#[test]
fn of_operations() {
    each(
        to,
        &[
            ("{methods: [GET, 'G*', '*', PURGE, M-SEARCH, '*ET']}", ""),
            (
                "{methods: [GET, get]}",
                "spec.rules[0].to[0].operation.methods[1] … \"get\" is not a method: methods are upper case, did you mean \"GET\"?",
            ),
            ("{notMethods: [Post]}", "spec.rules[0].to[0].operation.notMethods[0] … did you mean \"POST\"?"),
            ("{methods: ['A B']}", "spec.rules[0].to[0].operation.methods[0] … characters that no method has"),
            ("{methods: ['']}", "spec.rules[0].to[0].operation.methods[0] … an empty string"),
            ("{notMethods: ['']}", "spec.rules[0].to[0].operation.notMethods[0] … an empty string"),
            ("{hosts: ['']}", "spec.rules[0].to[0].operation.hosts[0] … an empty string"),
            ("{notHosts: ['']}", "spec.rules[0].to[0].operation.notHosts[0] … an empty string"),
            ("{paths: ['']}", "spec.rules[0].to[0].operation.paths[0] … an empty string"),
            ("{notPaths: ['']}", "spec.rules[0].to[0].operation.notPaths[0] … an empty string"),
            ("{ports: ['80', '65535', '0080']}", ""),
            ("{ports: ['0', '00']}", "spec.rules[0].to[0].operation.ports[0] | spec.rules[0].to[0].operation.ports[1]"),
            ("{ports: ['']}", "spec.rules[0].to[0].operation.ports[0] … an empty string"),
            (
                "{ports: [8080]}",
                "spec.rules[0].to[0].operation.ports[0] … 8080 is a number; a string is expected: write \"8080\"",
            ),
            ("{ports: ['65536']}", "spec.rules[0].to[0].operation.ports[0] … from 1 to 65535"),
            ("{ports: [http]}", "spec.rules[0].to[0].operation.ports[0] … names and ranges are not allowed"),
            ("{notPorts: ['80-90']}", "spec.rules[0].to[0].operation.notPorts[0] … names and ranges"),
            (
                "{ports: ['-1', '+80', '99999999999999999999']}",
                "spec.rules[0].to[0].operation.ports[0] | spec.rules[0].to[0].operation.ports[1] | spec.rules[0].to[0].operation.ports[2]",
            ),
            ("{paths: [/a, '/a/*', '*/b', '*', '/a*b']}", ""),
            ("{paths: ['/a/{*}', '/{*}/b/{**}', '/{**}', '/{*}/', '/a/{**}/b']}", ""),
            ("{paths: ['{*}']}", "spec.rules[0].to[0].operation.paths[0] … must begin with"),
            ("{paths: ['/{**}/{*}']}", "spec.rules[0].to[0].operation.paths[0] … {**} must be the last operator"),
            ("{paths: ['/{**}/a/{**}']}", "spec.rules[0].to[0].operation.paths[0] … {**} must be the last operator"),
            ("{paths: ['/{a}']}", "spec.rules[0].to[0].operation.paths[0] … braces are allowed only as"),
            ("{paths: ['/a{*}']}", "spec.rules[0].to[0].operation.paths[0] … braces are allowed only as"),
            ("{notPaths: ['/a}']}", "spec.rules[0].to[0].operation.notPaths[0] … braces are allowed only as"),
            ("{paths: ['/{*}/b*']}", "spec.rules[0].to[0].operation.paths[0] … can't be mixed"),
            ("{paths: ['/a//{*}']}", "spec.rules[0].to[0].operation.paths[0] … an empty segment"),
            ("{paths: ['/{*}/a b']}", "spec.rules[0].to[0].operation.paths[0] … characters that no path has"),
            ("{path: [/a], methods: [GET]}", "spec.rules[0].to[0].operation.path … did you mean paths?"),
        ],
    );
}

#[test]
fn of_conditions() {
    each(
        when,
        &[
            ("{key: 'request.headers[x-a]', values: [a]}", ""),
            ("{key: 'request.headers[:authority]', notValues: ['*']}", ""),
            ("{key: source.ip, values: [10.0.0.0/8]}", ""),
            ("{key: remote.ip, values: [x]}", "spec.rules[0].when[0].values[0] … not an IP address"),
            ("{key: destination.ip, notValues: [x/8]}", "spec.rules[0].when[0].notValues[0] … not an IP address"),
            ("{key: destination.port, values: ['80']}", ""),
            ("{key: destination.port, values: [http]}", "spec.rules[0].when[0].values[0] … is not a port"),
            ("{key: source.namespace, values: ['a*b']}", ""),
            ("{key: source.principal, values: ['*']}", ""),
            ("{key: source.serviceAccount, values: [a/b]}", ""),
            ("{key: source.serviceAccount, values: ['a/*']}", "spec.rules[0].when[0].values[0] … wildcards are not allowed"),
            ("{key: source.trustDomain, values: ['*.x']}", ""),
            ("{key: source.trustDomain, values: ['a*b']}", "spec.rules[0].when[0].values[0] … first or last"),
            ("{key: request.auth.principal, values: [iss/sub]}", ""),
            ("{key: request.auth.audiences, values: [x]}", ""),
            ("{key: request.auth.presenter, values: [x]}", ""),
            ("{key: 'request.auth.claims[iss]', values: [x]}", ""),
            ("{key: 'request.auth.claims[a][b]', values: [x]}", ""),
            ("{key: connection.sni, values: [www.example.com]}", ""),
            ("{key: source.ip, values: ['']}", "spec.rules[0].when[0].values[0] … an empty string"),
            ("{key: source.ip}", "spec.rules[0].when[0] … at least one of values and notValues"),
            ("{key: source.ip, values: [], notValues: []}", "spec.rules[0].when[0] … at least one of values and notValues"),
            ("{values: [a]}", "spec.rules[0].when[0].key … must be set"),
            ("{key: '', values: [a]}", "spec.rules[0].when[0].key … must be set"),
            ("{key: request.header, values: [a]}", "spec.rules[0].when[0].key … did you mean request.headers?"),
            ("{key: request.headers, values: [a]}", "spec.rules[0].when[0].key … the form request.headers[name]"),
            ("{key: 'request.headers[]', values: [a]}", "spec.rules[0].when[0].key … the form request.headers[name]"),
            ("{key: 'request.headers[a b]', values: [a]}", "spec.rules[0].when[0].key … not a header's name"),
            ("{key: 'request.auth.claims', values: [a]}", "spec.rules[0].when[0].key … the form request.auth.claims[name]"),
            (
                "{key: 'request.auth.claims[a]b[c]', values: [a]}",
                "spec.rules[0].when[0].key … the form request.auth.claims[name]",
            ),
            ("{key: 'request.auth.claims[[a]]', values: [a]}", "spec.rules[0].when[0].key … the form request.auth.claims[name]"),
            ("{key: source.user, values: [a]}", "spec.rules[0].when[0].key … is not an attribute"),
            ("{key: destination.namespace, values: [a]}", "spec.rules[0].when[0].key … the policy's own namespace"),
            ("{key: 'destination.labels[app]', values: [a]}", "spec.rules[0].when[0].key … spec.selector"),
            ("{key: destination.name, values: [a]}", "spec.rules[0].when[0].key … v1alpha1"),
            ("{key: destination.user, values: [a]}", "spec.rules[0].when[0].key … v1alpha1"),
            (
                "{key: 'experimental.envoy.filters.network.mysql_proxy[a]', values: [a]}",
                "spec.rules[0].when[0].key … not supported by Weft",
            ),
            ("{key: source.ip, value: [a], values: [10.0.0.1]}", "spec.rules[0].when[0].value … did you mean values?"),
        ],
    );
}

#[test]
fn of_custom() {
    let custom = |rule: &str| format!("{{action: CUSTOM, provider: {{name: x}}, rules: [{rule}]}}");
    for (rule, expected) in [
        ("{to: [{operation: {paths: [/a]}}]}", ""),
        ("{from: [{source: {ipBlocks: [10.0.0.1], remoteIpBlocks: [10.0.0.1]}}]}", ""),
        (
            "{from: [{source: {principals: [a]}}]}",
            "spec.rules[0].from[0].source.principals … not supported with the action CUSTOM",
        ),
        ("{from: [{source: {notPrincipals: [a]}}]}", "spec.rules[0].from[0].source.notPrincipals … not supported with"),
        ("{from: [{source: {requestPrincipals: [a]}}]}", "spec.rules[0].from[0].source.requestPrincipals … not supported with"),
        ("{from: [{source: {namespaces: [a]}}]}", "spec.rules[0].from[0].source.namespaces … not supported with"),
        ("{from: [{source: {serviceAccounts: [a]}}]}", "spec.rules[0].from[0].source.serviceAccounts … not supported with"),
        ("{from: [{source: {notTrustDomains: [a]}}]}", "spec.rules[0].from[0].source.notTrustDomains … not supported with"),
        ("{when: [{key: source.principal, values: [a]}]}", "spec.rules[0].when[0].key … not supported with"),
        ("{when: [{key: source.namespace, values: [a]}]}", "spec.rules[0].when[0].key … not supported with"),
        ("{when: [{key: 'request.auth.claims[a]', values: [a]}]}", "spec.rules[0].when[0].key … not supported with"),
        ("{when: [{key: 'request.headers[a]', values: [a]}]}", ""),
    ] {
        errors(AUTHORIZATION, &[(&custom(rule), expected)]);
    }
}

#[test]
fn of_selectors_and_targets() {
    for kind in [AUTHORIZATION, REQUEST] {
        errors(
            kind,
            &[
                ("{selector: {matchLabels: {app: a}}}", ""),
                ("{selector: {matchLabel: {app: a}}}", "spec.selector.matchLabel … did you mean matchLabels?"),
                ("{selector: {matchLabels: {'': a}}}", "spec.selector.matchLabels. … a label needs a name"),
                ("{selector: {matchLabels: {app: 'a*'}}}", "spec.selector.matchLabels.app … wildcards are not allowed"),
                ("{selector: {matchLabels: {'a*': a}}}", "spec.selector.matchLabels.a* … wildcards are not allowed"),
                ("{selector: {matchLabels: {app: 1}}}", "spec.selector.matchLabels.app … write \"1\""),
                ("{targetRef: {kind: Service, name: a}}", ""),
                ("{targetRef: {kind: Service, name: a, group: core}}", ""),
                ("{targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: a}]}", ""),
                ("{targetRefs: [{kind: ServiceEntry, group: networking.istio.io, name: a}]}", ""),
                ("{targetRef: {kind: Gateway, name: a}}", "spec.targetRef.kind … is not one of"),
                ("{targetRef: {kind: Service}}", "spec.targetRef.name … must be set"),
                ("{targetRef: {kind: Service, name: a, namespace: b}}", "spec.targetRef.namespace … must not be set"),
                ("{targetRefs: [null]}", "spec.targetRefs[0] … must not be null"),
                ("{selector: {matchLabels: {a: b}}, targetRef: {kind: Service, name: a}}", "spec … only one of selector"),
                ("{targetRefs: [{kind: Service, name: a}], targetRef: {kind: Service, name: a}}", "spec … only one of selector"),
            ],
        );
        let targets = vec!["{kind: Service, name: a}"; 17].join(",");
        errors(kind, &[(&format!("{{targetRefs: [{targets}]}}"), "spec.targetRefs … at most 16")]);
        let long = format!("{{selector: {{matchLabels: {{a: {}}}}}}}", "b".repeat(64));
        errors(kind, &[(&long, "spec.selector.matchLabels.a … longer than the 63")]);
    }
}

#[test]
fn of_peer_authentication() {
    let selector = "selector: {matchLabels: {app: a}}";
    errors(
        PEER,
        &[
            ("{}", ""),
            ("{mtls: {}}", ""),
            ("{mtls: {mode: STRICT}}", ""),
            ("{mtls: {mode: UNSET}}", ""),
            ("{mtls: {mode: MUTUAL}}", "spec.mtls.mode … is not one of UNSET, DISABLE, PERMISSIVE, STRICT"),
            ("{mtls: STRICT}", "spec.mtls … an object is expected"),
            ("{mTLS: {mode: STRICT}}", "spec.mTLS … did you mean mtls?"),
            ("{mtls: {mode: STRICT, x: 1}}", "spec.mtls.x … known are mode"),
            ("{targetRef: {kind: Service, name: a}}", "spec.targetRef … unknown field"),
            ("{portLevelMtls: {8080: {mode: STRICT}}}", "spec.portLevelMtls … only with a selector"),
            ("{selector: {}, portLevelMtls: {8080: {mode: STRICT}}}", "spec.portLevelMtls … only with a selector"),
            (&format!("{{{selector}, portLevelMtls: {{}}}}"), "spec.portLevelMtls … at least one port"),
            (&format!("{{{selector}, portLevelMtls: {{8080: {{mode: STRICT}}, 65535: {{}}}}}}"), ""),
            (&format!("{{{selector}, portLevelMtls: {{'0': {{mode: STRICT}}}}}}"), "spec.portLevelMtls.0 … from 1 to 65535"),
            (
                &format!("{{{selector}, portLevelMtls: {{65536: {{mode: STRICT}}}}}}"),
                "spec.portLevelMtls.65536 … from 1 to 65535",
            ),
            (&format!("{{{selector}, portLevelMtls: {{http: {{mode: STRICT}}}}}}"), "spec.portLevelMtls.http … from 1 to 65535"),
            (&format!("{{{selector}, portLevelMtls: {{8080: {{mode: on}}}}}}"), "spec.portLevelMtls.8080.mode"),
            (&format!("{{{selector}, portLevelMtls: {{8080: STRICT}}}}"), "spec.portLevelMtls.8080 … an object is expected"),
        ],
    );
}

#[test]
fn of_request_authentication() {
    let rule = |rule: &str, expected: &str| errors(REQUEST, &[(&format!("{{jwtRules: [{rule}]}}"), expected)]);
    let at = |field: &str, words: &str| format!("spec.jwtRules[0].{field} … {words}");
    rule("{issuer: 'https://i', jwksUri: 'https://a/k'}", "");
    rule("{jwksUri: 'https://a/k'}", &at("issuer", "must be set"));
    rule("{issuer: i}", &at("issuer", "must begin with http:// or https://, so keys can't be found there"));
    rule("{issuer: i, jwks: ''}", &at("issuer", "keys can't be found there"));
    rule("{issuer: i, jwksUri: 'https://a/k'}", "");
    rule("{}", &at("issuer", "must be set"));
    let key = "{\"kty\":\"OKP\",\"crv\":\"Ed25519\",\"x\":\"AQAB\"}";
    rule(&format!("{{jwks: '{{\"keys\":[{key}]}}'}}"), &at("issuer", "must be set"));
    rule(&format!("{{issuer: i, jwks: '{{\"keys\":[{key}]}}'}}"), "");
    rule("{issuer: i, jwks: '{\"keys\":[]}'}", &at("jwks", "every token of this issuer would be refused"));
    rule("{issuer: i, jwksUri: 'https://u:p@a/k'}", &at("jwksUri", "contains a user"));
    rule("{issuer: 'https://i', fromHeaders: [{name: ':authority'}]}", &at("fromHeaders[0].name", "not a header's name"));
    rule("{issuer: ''}", &at("issuer", "must not be an empty string"));
    rule("{issuer: 'https://i', audiences: [a, '']}", &at("audiences[1]", "empty string"));
    rule(
        "{issuer: 'https://i', jwksUri: 'https://a/k', jwks: '{\"keys\":[{\"kty\":\"oct\",\"k\":\"AQ\"}]}'}",
        "spec.jwtRules[0] … only one of jwksUri and jwks",
    );
    rule(
        "{issuer: 'https://i', jwksUri: 'https://a/k', jwks_uri: 'https://a/k'}",
        "spec.jwtRules[0] … only one of jwksUri and jwks",
    );
    rule("{issuer: 'https://i', jwks_uri: 'https://a/k'}", "");
    for bad in ["ftp://a", "a/b", "", "https://", "://x", "HTTPS//a"] {
        rule(&format!("{{issuer: 'https://i', jwksUri: '{bad}'}}"), &at("jwksUri", ""));
    }
    for bad in ["http://169.254.169.254/latest", "http://[fe80::1]/", "http://[::ffff:169.254.0.1]/k"] {
        rule(&format!("{{issuer: 'https://i', jwksUri: '{bad}'}}"), &at("jwksUri", "link-local"));
    }
    rule("{issuer: 'https://i', jwksUri: 'HTTP://a:8080/k?x=y'}", "");
    rule(&format!("{{issuer: 'https://i', jwksUri: 'https://a/{}'}}", "k".repeat(2048)), &at("jwksUri", "longer than 2048"));
    rule("{issuer: 'https://i', jwks: 'hello'}", &at("jwks", "is not JSON"));
    rule("{issuer: 'https://i', jwks: '[]'}", &at("jwks", "an object is expected"));
    rule("{issuer: 'https://i', jwks: '{\"keys\": 1}'}", &at("jwks", "it has no list \"keys\""));
    rule("{issuer: 'https://i', jwks: '{}'}", &at("jwks", "it has no list"));
    rule("{issuer: 'https://i', jwks: '{\"keys\": [{}]}'}", &at("jwks", "keys[0] is not a JSON Web Key: it has no type"));
    rule("{issuer: 'https://i', jwks: '{\"keys\": [{\"kty\": \"X\"}]}'}", &at("jwks", "keys[0] has the type (kty) \"X\""));
    rule("{issuer: 'https://i', jwks: '{\"keys\": [{\"kty\": \"RSA\", \"n\": \"AQAB\"}]}'}", &at("jwks", "e is missing"));
    rule(
        "{issuer: 'https://i', jwks: '{\"keys\": [{\"kty\": \"RSA\", \"n\": \"AQAB\", \"e\": \"!\"}]}'}",
        &at("jwks", "e is missing or not base64url"),
    );
    rule("{issuer: 'https://i', jwks: '{\"keys\": [{\"kty\": \"RSA\", \"n\": \"AQAB\", \"e\": \"AQAB\"}]}'}", "");
    rule(&format!("{{issuer: i, jwks: '{key}'}}"), &at("jwks", "it has no list"));
    rule("{issuer: 'https://i', fromHeaders: [{name: x, prefix: 'Bearer '}]}", "");
    rule("{issuer: 'https://i', fromHeaders: [{prefix: x}]}", &at("fromHeaders[0].name", "must be set"));
    rule("{issuer: 'https://i', fromHeaders: [{name: 'a b'}]}", &at("fromHeaders[0].name", "not a header's name"));
    rule("{issuer: 'https://i', fromHeaders: [null]}", &at("fromHeaders[0]", "must not be null"));
    rule("{issuer: 'https://i', fromHeaders: [{name: x, value: y}]}", &at("fromHeaders[0].value", "known are name, prefix"));
    rule("{issuer: 'https://i', fromParams: ['']}", &at("fromParams[0]", "empty string"));
    rule("{issuer: 'https://i', fromCookies: ['']}", &at("fromCookies[0]", "empty string"));
    rule("{issuer: 'https://i', fromCookie: [a]}", &at("fromCookie", "did you mean fromCookies?"));
    rule("{issuer: 'https://i', outputClaimToHeaders: [{header: x-a, claim: a.b}]}", "");
    rule("{issuer: 'https://i', outputClaimToHeaders: [{header: x-a}]}", &at("outputClaimToHeaders[0].claim", "must be set"));
    rule("{issuer: 'https://i', outputClaimToHeaders: [{claim: x}]}", &at("outputClaimToHeaders[0].header", "must be set"));
    rule(
        "{issuer: 'https://i', outputClaimToHeaders: [{header: 'x.a', claim: x}]}",
        &at("outputClaimToHeaders[0].header", "only letters"),
    );
    rule("{issuer: 'https://i', outputPayloadToHeader: 'a b'}", &at("outputPayloadToHeader", "not a header's name"));
    rule("{issuer: 'https://i', forwardOriginalToken: 'true'}", &at("forwardOriginalToken", "true or false is expected"));
    rule("{issuer: 'https://i', forwardOriginalToken: true, timeout: 1m30s, spaceDelimitedClaims: [scope]}", "");
    rule("{issuer: 'https://i', timeout: 5}", &at("timeout", "a string is expected"));
    rule("{issuer: 'https://i', timeout: '5'}", &at("timeout", "is not a duration"));
    rule("{issuer: 'https://i', timeout: 10us}", &at("timeout", "too short"));
    rule("{issuer: 'https://i', timeout: 1001us}", &at("timeout", "finer than milliseconds"));
    rule("{issuer: 'https://i', spaceDelimitedClaims: ['']}", &at("spaceDelimitedClaims[0]", "empty string"));
    let claims = vec!["a"; 65].join(",");
    rule(&format!("{{issuer: 'https://i', spaceDelimitedClaims: [{claims}]}}"), &at("spaceDelimitedClaims", "at most 64"));
    rule("{issuer: 'https://i', jwksURI: 'https://a'}", &at("jwksURI", "did you mean jwksUri?"));
    rule("null", "spec.jwtRules[0] … must not be null");
}

#[test]
fn a_key_s_text_is_never_shown() {
    let secret = "{issuer: 'https://i', jwks: '{\"keys\": [{\"kty\": \"RSA\", \"n\": \"AQAB\", \"d\": \"SECRET\"}]'}";
    let verdict = validate(REQUEST, &object(REQUEST, &format!("{{jwtRules: [{secret}]}}")), &Nothing);
    assert_eq!(verdict.errors.len(), 1);
    assert!(!report::refusal(&verdict.errors).contains("SECRET"));
}

#[test]
fn of_the_envelope() {
    let with = |kind: Kind, change: Value| {
        let mut object = object(kind, "{}");
        let object_map = object.as_object_mut().unwrap();
        object_map.extend(change.as_object().unwrap().clone());
        validate(kind, &object, &Nothing).errors.iter().map(ToString::to_string).collect::<Vec<_>>().join(" | ")
    };
    let annotated = |kind: Kind, name: &str, value: &str, spec: Value| {
        with(kind, json!({"metadata": {"name": "p", "annotations": {name: value}}, "spec": spec}))
    };
    for (found, expected) in [
        (with(PEER, json!({"spec": null})), ""),
        (with(PEER, json!({"status": {"anything": 1}})), ""),
        (with(PEER, json!({"sepc": {}})), "sepc: unknown field, which would do nothing; did you mean spec?"),
        (with(PEER, json!({"mtls": {}})), "mtls: unknown field, which would do nothing; did you mean spec.…?"),
        (
            with(PEER, json!({"apiVersion": "security.istio.io/v1alpha1"})),
            "apiVersion: \"security.istio.io/v1alpha1\" is not served",
        ),
        (with(PEER, json!({"apiVersion": "security.istio.io/v1beta1"})), ""),
        (with(PEER, json!({"kind": "Pod"})), "kind: \"Pod\" is not PeerAuthentication"),
        (
            with(PEER, json!({"metadata": {"annotations": {"a": 1}}})),
            "metadata.annotations.a: 1 is a number; a string is expected",
        ),
        (annotated(AUTHORIZATION, "istio.io/dry-run", "true", json!({})), ""),
        (annotated(AUTHORIZATION, "istio.io/dry-run", "T", json!({"action": "DENY", "rules": [{}]})), ""),
        (
            annotated(AUTHORIZATION, "istio.io/dry-run", "yes", json!({})),
            "metadata.annotations.istio.io/dry-run: \"yes\" is neither",
        ),
        (
            annotated(AUTHORIZATION, "istio.io/dry-run", "true", json!({"action": "AUDIT"})),
            "metadata.annotations.istio.io/dry-run: a dry run is possible only",
        ),
        (
            annotated(PEER, "istio.io/dry-run", "true", json!({})),
            "metadata.annotations.istio.io/dry-run: only an AuthorizationPolicy",
        ),
        (
            annotated(PEER, "internal.istio.io/parents", "x", json!({})),
            "metadata.annotations.internal.istio.io/parents: may not be set",
        ),
    ] {
        assert!(if expected.is_empty() { found.is_empty() } else { found.starts_with(expected) }, "{found} / {expected}");
    }
    assert!(!validate(PEER, &json!(7), &Nothing).is_valid());
}
