//! What is valid but surely not meant. Each warning is one sentence of at most some 200 characters (Kubernetes cuts at 256): what will
//! happen, and what to write instead. None is given on a guess; see [`super::surroundings`].

use super::surroundings::{PodFacts, Protocol, Surroundings};
use super::values::is_template;
use super::walk::{Findings, quoted};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use weft_api::istio::security::{
    Action, AuthorizationPolicy, MtlsMode, Operation, PeerAuthentication, RequestAuthentication, Rule, Source,
};
use weft_api::istio::{Metadata, PolicyTargetReference, WorkloadSelector};
use weft_api::names;

type Labels = BTreeMap<String, String>;

/// How many values of a list are looked at: a list of thousands is made by a program, and a look must stay cheap.
const MOST_VALUES: usize = 1000;

/// Which pods an object is for.
struct Scope<'a> {
    namespace: Option<&'a str>,
    labels: Labels,
    /// `None`: not known.
    pods: Option<Vec<PodFacts>>,
    /// The ports of the pods, and what is spoken there if all that have it agree.
    ports: BTreeMap<u16, Option<Protocol>>,
    /// Ports of Services that lead to another port of a pod: the Service and that port.
    services: BTreeMap<u16, (String, u16)>,
}

impl<'a> Scope<'a> {
    /// `None`: it is for no pods, but attached to something else.
    fn of(
        metadata: &'a Metadata,
        selector: Option<&WorkloadSelector>,
        targets: (Option<&PolicyTargetReference>, &[PolicyTargetReference]),
        around: &dyn Surroundings,
    ) -> Option<Self> {
        if targets.0.is_some() || !targets.1.is_empty() {
            return None;
        }
        // A file may leave the namespace to kubectl, and then nothing is known of its pods.
        let known = !metadata.namespace.is_empty();
        let root = around.root_namespace();
        let mesh_wide = root.as_deref() == Some(metadata.namespace.as_str());
        let namespace = (!mesh_wide).then_some(metadata.namespace.as_str());
        let labels = selector.map(|s| s.match_labels.clone()).unwrap_or_default();
        let pods = if known { around.pods(namespace, &labels) } else { None };
        let (mut ports, mut services) = (BTreeMap::new(), BTreeMap::new());
        for pod in pods.iter().flatten() {
            for port in &pod.ports {
                let entry = ports.entry(port.number).or_insert(Some(port.protocol));
                *entry = entry.filter(|p| *p == port.protocol);
            }
            for service in pod.services.iter().filter(|s| s.port != s.target) {
                services.entry(service.port).or_insert_with(|| (service.service.clone(), service.target));
            }
        }
        Some(Self { namespace, labels, pods, ports, services })
    }

    fn where_(&self) -> String {
        self.namespace.map_or_else(|| "the mesh".to_owned(), |n| format!("namespace {n}"))
    }

    /// Whether a port is declared as TCP by all pods that have it.
    fn is_tcp(&self, number: u16) -> bool {
        self.ports.get(&number) == Some(&Some(Protocol::Tcp))
    }

    /// The lowest port that is declared as TCP.
    fn tcp_port(&self) -> Option<u16> {
        let tcp = |pod: &PodFacts| pod.ports.iter().filter(|p| p.protocol == Protocol::Tcp).map(|p| p.number).min();
        self.pods.iter().flatten().filter_map(tcp).min()
    }

    /// Warns where `number` is a port of a Service, while the pods listen on another.
    fn check_port(&self, found: &mut Findings, path: &str, number: u16) {
        if self.ports.contains_key(&number) {
            return;
        }
        if let Some((service, target)) = self.services.get(&number) {
            found.warn(
                path,
                format!("{number} is the port of Service {service}; policies see the port of the pod, write {target}"),
            );
        }
    }

    fn check_pods(&self, found: &mut Findings) {
        let Some(pods) = &self.pods else { return };
        if self.labels.is_empty() {
            return;
        }
        if pods.is_empty() {
            let labels: Vec<String> = self.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
            let labels = shorten(&labels.join(","));
            found.warn(
                "spec.selector.matchLabels",
                format!("no pod in {} has {labels}; until one has, this does nothing", self.where_()),
            );
        } else if pods.iter().all(|p| !p.meshed) {
            let name = &pods[0].name;
            let why = "none of the selected pods has the sidecar, so nothing enforces this";
            found.warn("spec.selector.matchLabels", format!("{why} (for example {name}); see weft why pod"));
        }
    }
}

fn shorten(text: &str) -> String {
    match text.char_indices().nth(60) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text.to_owned(),
    }
}

fn attached(found: &mut Findings) {
    found.warn(
        "spec.targetRefs",
        "sidecars ignore policies that are attached to something; without a gateway or waypoint this does nothing",
    );
}

/// Of a `PeerAuthentication`.
pub(super) fn peer(found: &mut Findings, object: &PeerAuthentication, around: &dyn Surroundings) {
    let Some(scope) = Scope::of(&object.metadata, object.spec.selector.as_ref(), (None, &[]), around) else { return };
    if scope.namespace.is_none() && !scope.labels.is_empty() {
        found.warn(
            "spec.selector",
            "a selector in the root namespace is ignored with all of this object; move it to the pods' namespace",
        );
        return;
    }
    scope.check_pods(found);
    for port in object.spec.port_level_mtls.keys().filter_map(|p| u16::try_from(*p).ok()) {
        scope.check_port(found, &format!("spec.portLevelMtls.{port}"), port);
    }
    let ports: BTreeMap<u16, MtlsMode> = object
        .spec
        .port_level_mtls
        .iter()
        .filter_map(|(p, m)| Some((u16::try_from(*p).ok()?, m.mode)))
        .filter(|(_, m)| *m != MtlsMode::Unset)
        .collect();
    let mode = |port: u16| ports.get(&port).copied().unwrap_or_else(|| object.spec.mode());
    if object.spec.mode() != MtlsMode::Strict && ports.values().all(|m| *m != MtlsMode::Strict) {
        return;
    }
    let callers = around.plaintext_callers(scope.namespace, &scope.labels);
    let refused: Vec<_> = callers.iter().filter(|c| mode(c.port) == MtlsMode::Strict).collect();
    let Some(first) = refused.first() else { return };
    let others = match refused.len() {
        1 => String::new(),
        n => format!(" and {} more", n - 1),
    };
    found.warn(
        "spec.mtls.mode",
        format!(
            "STRICT refuses callers that were seen without mutual TLS: {} on port {} ({} times){others}; see weft policy preview",
            shorten(&first.who),
            first.port,
            first.count
        ),
    );
}

/// Of a `RequestAuthentication`.
pub(super) fn request(found: &mut Findings, object: &RequestAuthentication, around: &dyn Surroundings) {
    let spec = &object.spec;
    match Scope::of(&object.metadata, spec.selector.as_ref(), (spec.target_ref.as_ref(), &spec.target_refs), around) {
        Some(scope) => scope.check_pods(found),
        None => attached(found),
    }
    let mut issuers = BTreeMap::new();
    for (i, rule) in spec.jwt_rules.iter().enumerate() {
        let at = format!("spec.jwtRules[{i}]");
        if rule.jwks_uri.get(..7).is_some_and(|s| s.eq_ignore_ascii_case("http://")) {
            found.warn(format!("{at}.jwksUri"), "keys that come over plain HTTP can be replaced on the way; use https");
        }
        if let Some(first) = issuers.insert(rule.issuer.clone(), i).filter(|_| !rule.issuer.is_empty()) {
            found.warn(
                format!("{at}.issuer"),
                format!("is also the issuer of jwtRules[{first}]: a token passes if one of them accepts it"),
            );
        }
        let mut seen = BTreeSet::new();
        for (j, header) in rule.from_headers.iter().enumerate() {
            if !seen.insert((header.name.to_ascii_lowercase(), header.prefix.clone())) {
                found.warn(
                    format!("{at}.fromHeaders[{j}]"),
                    format!("{} is named twice with the same prefix", quoted(&header.name)),
                );
            }
        }
        let mut seen = BTreeSet::new();
        for (j, entry) in rule.output_claim_to_headers.iter().enumerate() {
            if !seen.insert(entry.header.to_ascii_lowercase()) {
                let why = format!("{} is already written from another claim; only one of them arrives", quoted(&entry.header));
                found.warn(format!("{at}.outputClaimToHeaders[{j}].header"), why);
            }
        }
    }
}

/// Of an `AuthorizationPolicy`.
pub(super) fn authorization(found: &mut Findings, object: &AuthorizationPolicy, around: &dyn Surroundings) {
    let spec = &object.spec;
    let targets = (spec.target_ref.as_ref(), &spec.target_refs[..]);
    let Some(scope) = Scope::of(&object.metadata, spec.selector.as_ref(), targets, around) else {
        attached(found);
        return;
    };
    scope.check_pods(found);
    if spec.action == Action::Allow && spec.rules.is_empty() {
        let who = match (scope.namespace, scope.labels.is_empty()) {
            (None, true) => "every pod of the mesh",
            (Some(_), true) => "every pod of the namespace",
            (_, false) => "the selected pods",
        };
        found.warn(
            "spec.rules",
            format!("ALLOW without rules allows nothing: {who} will refuse all requests that no other policy allows"),
        );
    }
    if let Some(provider) = spec.provider.as_ref().filter(|p| around.has_provider(&p.name) == Some(false)) {
        let why = "is not an extension provider of the mesh settings; requests that match are denied until it is";
        found.warn("spec.provider.name", format!("{} {why}", quoted(&provider.name)));
    }
    for (i, rule) in spec.rules.iter().enumerate() {
        let path = format!("spec.rules[{i}]");
        for (j, source) in rule.from.iter().enumerate().filter_map(|(j, f)| Some((j, f.source.as_ref()?))) {
            check_source(found, &format!("{path}.from[{j}].source"), source, spec.action, around);
        }
        for (j, operation) in rule.to.iter().enumerate().filter_map(|(j, t)| Some((j, t.operation.as_ref()?))) {
            check_operation(found, &format!("{path}.to[{j}].operation"), operation, spec.action, &scope);
        }
        for (j, condition) in rule.when.iter().enumerate() {
            let at = format!("{path}.when[{j}]");
            contradiction(found, &at, ("values", &condition.values), ("notValues", &condition.not_values), spec.action);
            if condition.key == "source.principal" {
                principals(found, &format!("{at}.values"), &condition.values, spec.action, around);
                principals(found, &format!("{at}.notValues"), &condition.not_values, spec.action, around);
            }
            if condition.key == "destination.port" {
                for (k, port) in
                    condition.values.iter().take(MOST_VALUES).enumerate().filter_map(|(k, p)| Some((k, p.parse().ok()?)))
                {
                    scope.check_port(found, &format!("{at}.values[{k}]"), port);
                }
            }
        }
        check_tcp(found, &path, rule, spec.action, &scope);
    }
}

/// What comes of a part that can never match.
fn never(action: Action) -> &'static str {
    match action {
        Action::Allow => "so it allows nothing",
        Action::Deny => "so it denies nothing",
        Action::Audit | Action::Custom => "so it has no effect",
    }
}

fn contradiction(found: &mut Findings, at: &str, yes: (&str, &[String]), no: (&str, &[String]), action: Action) {
    if yes.1.is_empty() || no.1.is_empty() || yes.1.len() > MOST_VALUES {
        return;
    }
    let excluded: HashSet<&str> = no.1.iter().map(String::as_str).collect();
    if excluded.contains("*") || yes.1.iter().all(|value| excluded.contains(value.as_str())) {
        found.warn(at, format!("{} excludes all of {}: this can never match, {}", no.0, yes.0, never(action)));
    }
}

fn check_source(found: &mut Findings, at: &str, source: &Source, action: Action, around: &dyn Surroundings) {
    let pairs: [(&str, &[String], &str, &[String]); 7] = [
        ("principals", &source.principals, "notPrincipals", &source.not_principals),
        ("requestPrincipals", &source.request_principals, "notRequestPrincipals", &source.not_request_principals),
        ("namespaces", &source.namespaces, "notNamespaces", &source.not_namespaces),
        ("serviceAccounts", &source.service_accounts, "notServiceAccounts", &source.not_service_accounts),
        ("ipBlocks", &source.ip_blocks, "notIpBlocks", &source.not_ip_blocks),
        ("remoteIpBlocks", &source.remote_ip_blocks, "notRemoteIpBlocks", &source.not_remote_ip_blocks),
        ("trustDomains", &source.trust_domains, "notTrustDomains", &source.not_trust_domains),
    ];
    for (yes, values, no, excluded) in pairs {
        contradiction(found, at, (yes, values), (no, excluded), action);
    }
    principals(found, &format!("{at}.principals"), &source.principals, action, around);
    principals(found, &format!("{at}.notPrincipals"), &source.not_principals, action, around);
    for (field, values) in [("namespaces", &source.namespaces), ("notNamespaces", &source.not_namespaces)] {
        for (i, name) in values.iter().take(MOST_VALUES).enumerate().filter(|(_, n)| !n.contains('*')) {
            unknown_namespace(found, &format!("{at}.{field}[{i}]"), name, around);
        }
    }
    for (field, values) in [("serviceAccounts", &source.service_accounts), ("notServiceAccounts", &source.not_service_accounts)] {
        for (i, (namespace, _)) in values.iter().take(MOST_VALUES).enumerate().filter_map(|(i, v)| Some((i, v.split_once('/')?)))
        {
            unknown_namespace(found, &format!("{at}.{field}[{i}]"), namespace, around);
        }
    }
    // `notPrincipals: ["*"]` is how one denies those without an identity on purpose.
    let only_not = source.principals.is_empty() && source.namespaces.is_empty() && source.service_accounts.is_empty();
    let named = [&source.not_principals, &source.not_namespaces, &source.not_service_accounts];
    let excludes_some = named.iter().any(|v| v.iter().any(|n| n != "*"));
    let others = !source.ip_blocks.is_empty() || !source.remote_ip_blocks.is_empty() || !source.request_principals.is_empty();
    if action == Action::Deny && only_not && excludes_some && !others && source.trust_domains.is_empty() {
        let why =
            "also denies every caller without an identity (plaintext); add principals: [\"*\"] if only meshed callers are meant";
        found.warn(at, why);
    }
}

fn unknown_namespace(found: &mut Findings, at: &str, name: &str, around: &dyn Surroundings) {
    if around.has_namespace(name) == Some(false) {
        found.warn(at, format!("there is no namespace {}", quoted(&shorten(name))));
    }
}

fn principals(found: &mut Findings, at: &str, values: &[String], action: Action, around: &dyn Surroundings) {
    let domains = around.trust_domains();
    for (i, value) in values.iter().take(MOST_VALUES).enumerate() {
        let at = format!("{at}[{i}]");
        if let Some(rest) = value.strip_prefix("spiffe://") {
            found.warn(
                &at,
                format!(
                    "principals are written without spiffe://: write {}; as it is, nothing matches it",
                    quoted(&shorten(rest))
                ),
            );
            continue;
        }
        if middle_star(value) {
            found.warn(
                &at,
                format!("{} matches no caller: \"*\" is a wildcard only as first or last character", quoted(&shorten(value))),
            );
            continue;
        }
        if value.starts_with('*') {
            continue;
        }
        let parts: Vec<&str> = value.split('/').collect();
        let whole = !value.ends_with('*');
        let form = matches!(parts[..], [_, "ns", _, "sa", _]);
        if whole && !form {
            let why = "no caller is called that: identities are TRUSTDOMAIN/ns/NAMESPACE/sa/ACCOUNT";
            found.warn(&at, format!("{}: {why}, {}", quoted(&shorten(value)), never(action)));
            continue;
        }
        if let [domain, "ns", namespace, rest @ ..] = &parts[..] {
            // `cluster.local` stands for this mesh, whatever its trust domain is called.
            let ours = *domain == names::TRUST_DOMAIN || domains.iter().any(|d| d == domain);
            if !domains.is_empty() && !domain.contains('*') && !ours {
                found.warn(
                    &at,
                    format!("{} is not the trust domain of this mesh, which is {}", quoted(&shorten(domain)), domains[0]),
                );
            }
            if !rest.is_empty() {
                unknown_namespace(found, &at, namespace, around);
            }
        }
    }
}

/// A star that is no wildcard.
fn middle_star(value: &str) -> bool {
    let inner = value.strip_prefix('*').or_else(|| value.strip_suffix('*')).unwrap_or(value);
    inner.contains('*')
}

fn check_operation(found: &mut Findings, at: &str, operation: &Operation, action: Action, scope: &Scope<'_>) {
    let pairs: [(&str, &[String], &str, &[String]); 4] = [
        ("hosts", &operation.hosts, "notHosts", &operation.not_hosts),
        ("ports", &operation.ports, "notPorts", &operation.not_ports),
        ("methods", &operation.methods, "notMethods", &operation.not_methods),
        ("paths", &operation.paths, "notPaths", &operation.not_paths),
    ];
    for (yes, values, no, excluded) in pairs {
        contradiction(found, at, (yes, values), (no, excluded), action);
    }
    for (field, values) in [("ports", &operation.ports), ("notPorts", &operation.not_ports)] {
        for (i, port) in values.iter().take(MOST_VALUES).enumerate().filter_map(|(i, p)| Some((i, p.parse().ok()?))) {
            let path = format!("{at}.{field}[{i}]");
            scope.check_port(found, &path, port);
        }
    }
    for (field, values) in [("paths", &operation.paths), ("notPaths", &operation.not_paths)] {
        for (i, path) in values.iter().take(MOST_VALUES).enumerate() {
            if let Some(why) = odd_path(path) {
                found.warn(format!("{at}.{field}[{i}]"), format!("{} {why}", quoted(&shorten(path))));
            }
        }
    }
    let denies = action == Action::Deny;
    let hosts = [("hosts", &operation.hosts, denies), ("notHosts", &operation.not_hosts, !denies)];
    for (field, values, lets_pass) in hosts {
        let all: HashSet<&str> = values.iter().map(String::as_str).collect();
        for (i, host) in values.iter().take(MOST_VALUES).enumerate() {
            let at = format!("{at}.{field}[{i}]");
            if middle_star(host) {
                found.warn(
                    &at,
                    format!("{} matches no host: \"*\" is a wildcard only as first or last character", quoted(&shorten(host))),
                );
            } else if lets_pass && !host.ends_with('*') && !has_port(host) && !all.contains(format!("{host}:*").as_str()) {
                // A client may write the port into the Host header, and then it is another host.
                found.warn(
                    &at,
                    format!("doesn't match {0}:80 and the like, which clients may send; add \"{0}:*\"", shorten(host)),
                );
            }
        }
    }
}

fn has_port(host: &str) -> bool {
    host.rsplit_once(':').is_some_and(|(_, port)| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()))
}

/// Why a path will not match what it looks like.
fn odd_path(path: &str) -> Option<&'static str> {
    if !path.starts_with(['/', '*']) {
        return Some("can never match: paths begin with \"/\"");
    }
    if is_template(path) {
        return None;
    }
    if path.contains(".*") {
        return Some("is not a regular expression: \"*\" is a wildcard only as first or last character, and \".\" is a dot");
    }
    if path.contains(['?', '#']) {
        return Some("can never match: a path is compared without its query and fragment");
    }
    if middle_star(path) {
        return Some("has a \"*\" inside, which matches only a star; write {*} for one segment");
    }
    let dots = path.split('/').any(|s| s == "." || s == "..");
    (dots || path.contains('\\')).then_some("can never match: paths are compared after \"..\", \".\" and \"\\\" are resolved")
}

/// Fields of a rule that exist only in HTTP, with their paths.
fn http_fields(rule: &Rule) -> Vec<String> {
    let mut fields = Vec::new();
    for (j, source) in rule.from.iter().enumerate().filter_map(|(j, f)| Some((j, f.source.as_ref()?))) {
        for (name, values) in
            [("requestPrincipals", &source.request_principals), ("notRequestPrincipals", &source.not_request_principals)]
        {
            if !values.is_empty() {
                fields.push(format!("from[{j}].source.{name}"));
            }
        }
    }
    for (j, operation) in rule.to.iter().enumerate().filter_map(|(j, t)| Some((j, t.operation.as_ref()?))) {
        for (name, values) in [
            ("hosts", &operation.hosts),
            ("notHosts", &operation.not_hosts),
            ("methods", &operation.methods),
            ("notMethods", &operation.not_methods),
            ("paths", &operation.paths),
            ("notPaths", &operation.not_paths),
        ] {
            if !values.is_empty() {
                fields.push(format!("to[{j}].operation.{name}"));
            }
        }
    }
    let conditions = rule.when.iter().enumerate().filter(|(_, c)| c.key.starts_with("request."));
    fields.extend(conditions.map(|(j, _)| format!("when[{j}]")));
    fields
}

/// HTTP fields on connections that are not HTTP: an ALLOW rule is left out as a whole, a DENY rule is enforced without the field.
fn check_tcp(found: &mut Findings, at: &str, rule: &Rule, action: Action, scope: &Scope<'_>) {
    let fields = http_fields(rule);
    let Some(field) = fields.first() else { return };
    let operations: Vec<&Operation> = rule.to.iter().filter_map(|t| t.operation.as_ref()).collect();
    let named: BTreeSet<u16> = operations.iter().flat_map(|o| &o.ports).filter_map(|p| p.parse().ok()).collect();
    let all_named = !operations.is_empty() && operations.iter().all(|o| !o.ports.is_empty());
    let tcp_named: Vec<String> = named.iter().filter(|p| scope.is_tcp(**p)).map(ToString::to_string).collect();
    if !tcp_named.is_empty() {
        let ports = shorten(&tcp_named.join(", "));
        let what = match action {
            Action::Allow => "this rule allows nothing there",
            Action::Deny => "this rule denies there without it, which is more than it says",
            Action::Audit => "this rule audits there without it, which is more than it says",
            Action::Custom => "this rule is not applied there",
        };
        found.warn(format!("{at}.{field}"), format!("port {ports} is TCP, where there is no such thing: {what}"));
        return;
    }
    if action != Action::Deny || all_named {
        return;
    }
    let tcp = scope.tcp_port();
    // Nothing known: any port may be TCP. Known: only if one is.
    if scope.pods.is_some() && tcp.is_none() {
        return;
    }
    let network = |s: &Source| {
        let values = [
            &s.principals,
            &s.not_principals,
            &s.namespaces,
            &s.not_namespaces,
            &s.service_accounts,
            &s.not_service_accounts,
            &s.ip_blocks,
            &s.not_ip_blocks,
            &s.remote_ip_blocks,
            &s.not_remote_ip_blocks,
            &s.trust_domains,
            &s.not_trust_domains,
        ];
        values.iter().any(|v| !v.is_empty())
    };
    let sources: Vec<&Source> = rule.from.iter().filter_map(|f| f.source.as_ref()).collect();
    let narrowed = !sources.is_empty() && sources.iter().all(|s| network(s));
    let whom = if narrowed { "all connections of those callers" } else { "all connections" };
    let example = match tcp {
        Some(port) => format!("TCP ports, such as {port},"),
        None => "TCP ports".to_owned(),
    };
    found.warn(
        at,
        format!("on {example} the HTTP fields don't exist and this denies {whom}; name the HTTP ports in to[].operation.ports"),
    );
}
