//! `AuthorizationPolicy`: who may do what, as typed matchers. The forms of values are Istio's; [`super::text`] has them.

use super::text::{At, block, glob, has_literal_star, list, matching, path, port, service_account, stars};
use super::{provider, read as read_object, selected, selector, selector_of};
use crate::compile::Known;
use crate::model::Pod;
use crate::model::policy::{Authorization, Policy};
use serde_json::Value;
use weft_api::istio::security::{self, Action, AuthorizationPolicySpec, Rule, parse_bool};
use weft_api::istio::{DRY_RUN_ANNOTATION, Object, ParseError};
use weft_api::wire::condition::Attribute;
use weft_api::wire::string_match::Kind;
use weft_api::wire::{self, AuthorizationAction, StringMatch};

/// Most service accounts in one list, as in Istio.
const SERVICE_ACCOUNTS: usize = 16;

fn action(action: Action) -> AuthorizationAction {
    match action {
        Action::Allow => AuthorizationAction::Allow,
        Action::Deny => AuthorizationAction::Deny,
        Action::Audit => AuthorizationAction::Audit,
        Action::Custom => AuthorizationAction::Custom,
    }
}

/// Reads an object.
pub fn read(value: Value) -> Policy<Authorization> {
    read_object::<AuthorizationPolicySpec, _>(value, understand, |value, reason| {
        let action = match value.pointer("/spec/action").map(Value::as_str) {
            None | Some(Some("ALLOW")) => AuthorizationAction::Allow,
            Some(Some("AUDIT")) => AuthorizationAction::Audit,
            Some(Some("CUSTOM")) => AuthorizationAction::Custom,
            // What it is can't be read either.
            Some(_) => AuthorizationAction::Deny,
        };
        let annotation = value.pointer("/metadata/annotations").and_then(|a| a.get(DRY_RUN_ANNOTATION)).and_then(Value::as_str);
        Authorization {
            selector: selector_of(value),
            action,
            dry_run: annotation.and_then(parse_bool).unwrap_or(false),
            rules: Vec::new(),
            provider: String::new(),
            broken: reason.into(),
        }
    })
}

fn understand(object: &Object<AuthorizationPolicySpec>) -> super::Understood<Authorization> {
    let spec = &object.spec;
    let at = At("spec".into());
    let provider = spec.provider.as_ref().map(|p| p.name.clone()).unwrap_or_default();
    match (spec.action, provider.is_empty()) {
        (Action::Custom, true) => return at.field("provider.name").wrong("CUSTOM needs the name of an extension provider"),
        (Action::Allow | Action::Deny | Action::Audit, false) => {
            return at
                .field("provider")
                .wrong(format!("has a meaning with CUSTOM only, and the action is {}", spec.action.as_str()));
        }
        _ => {}
    }
    if spec.rules.is_empty() && matches!(spec.action, Action::Deny | Action::Custom) {
        return at.field("rules").wrong(format!("{} needs a rule; {{}} matches every request", spec.action.as_str()));
    }
    let mut reader = Reader { namespace: &object.metadata.namespace, doubts: Vec::new() };
    let rules = spec.rules.iter().enumerate().map(|(i, rule)| reader.rule(rule, &at.field("rules").item(i)));
    let rules = rules.collect::<Result<_, _>>()?;
    let mut doubts = reader.doubts;
    if let Some(text) = object.metadata.annotations.get(DRY_RUN_ANNOTATION)
        && parse_bool(text).is_none()
    {
        doubts.push(format!("annotation {DRY_RUN_ANNOTATION}: {text:?} is neither true nor false; the policy is enforced"));
    }
    let elsewhere = spec.target_ref.is_some() || !spec.target_refs.is_empty();
    let authorization = Authorization {
        selector: selector(spec.selector.as_ref(), elsewhere),
        action: action(spec.action),
        dry_run: object.dry_run(),
        rules,
        provider,
        broken: String::new(),
    };
    Ok((authorization, doubts))
}

/// What reading needs to know, and what it notes.
struct Reader<'a> {
    namespace: &'a str,
    doubts: Vec<String>,
}

impl Reader<'_> {
    fn rule(&mut self, rule: &Rule, at: &At) -> Result<wire::AuthorizationRule, ParseError> {
        let mut read = wire::AuthorizationRule::default();
        for (i, from) in rule.from.iter().enumerate() {
            let at = at.field("from").item(i).field("source");
            let Some(source) = &from.source else { return at.wrong("must not be missing") };
            read.from.push(self.source(source, &at)?);
        }
        for (i, to) in rule.to.iter().enumerate() {
            let at = at.field("to").item(i).field("operation");
            let Some(operation) = &to.operation else { return at.wrong("must not be missing") };
            read.to.push(self.operation(operation, &at)?);
        }
        for (i, condition) in rule.when.iter().enumerate() {
            read.when.push(self.condition(condition, &at.field("when").item(i))?);
        }
        Ok(read)
    }

    fn stars(&mut self, value: &str, at: &At) -> StringMatch {
        if has_literal_star(value) {
            self.doubts.push(format!(
                "{}: {value:?} has a * that is neither the first nor the last character, and stands for itself there",
                at.0
            ));
        }
        stars(value)
    }

    fn source(&mut self, source: &security::Source, at: &At) -> Result<wire::Source, ParseError> {
        let unset = security::Source { unknown: source.unknown.clone(), ..security::Source::default() };
        if *source == unset {
            return at.wrong("must name something; leave `from` out for every caller");
        }
        let accounts = !source.service_accounts.is_empty() || !source.not_service_accounts.is_empty();
        let others = [&source.principals, &source.not_principals, &source.namespaces, &source.not_namespaces];
        if accounts && others.iter().any(|list| !list.is_empty()) {
            return at.field("serviceAccounts").wrong("can't stand beside principals or namespaces; an account has both in it");
        }
        let namespace = self.namespace;
        let matches = |me: &mut Self, values: &[String], name: &str| list(values, &at.field(name), |v, at| Ok(me.stars(v, at)));
        let globs = |values: &[String], name: &str| list(values, &at.field(name), |v, _| Ok(glob(v)));
        let blocks = |values: &[String], name: &str| list(values, &at.field(name), block);
        let accounts = |values: &[String], name: &str| {
            let at = at.field(name);
            if values.len() > SERVICE_ACCOUNTS {
                return at.wrong(format!("has {} items; {SERVICE_ACCOUNTS} are allowed", values.len()));
            }
            list(values, &at, |v, at| service_account(v, namespace, at))
        };
        Ok(wire::Source {
            principals: matches(self, &source.principals, "principals")?,
            not_principals: matches(self, &source.not_principals, "notPrincipals")?,
            request_principals: matches(self, &source.request_principals, "requestPrincipals")?,
            not_request_principals: matches(self, &source.not_request_principals, "notRequestPrincipals")?,
            namespaces: globs(&source.namespaces, "namespaces")?,
            not_namespaces: globs(&source.not_namespaces, "notNamespaces")?,
            service_accounts: accounts(&source.service_accounts, "serviceAccounts")?,
            not_service_accounts: accounts(&source.not_service_accounts, "notServiceAccounts")?,
            trust_domains: matches(self, &source.trust_domains, "trustDomains")?,
            not_trust_domains: matches(self, &source.not_trust_domains, "notTrustDomains")?,
            ip_blocks: blocks(&source.ip_blocks, "ipBlocks")?,
            not_ip_blocks: blocks(&source.not_ip_blocks, "notIpBlocks")?,
            remote_ip_blocks: blocks(&source.remote_ip_blocks, "remoteIpBlocks")?,
            not_remote_ip_blocks: blocks(&source.not_remote_ip_blocks, "notRemoteIpBlocks")?,
        })
    }

    fn operation(&mut self, operation: &security::Operation, at: &At) -> Result<wire::Operation, ParseError> {
        let unset = security::Operation { unknown: operation.unknown.clone(), ..security::Operation::default() };
        if *operation == unset {
            return at.wrong("must name something; leave `to` out for every operation");
        }
        let matches = |me: &mut Self, values: &[String], name: &str| list(values, &at.field(name), |v, at| Ok(me.stars(v, at)));
        let ports = |values: &[String], name: &str| list(values, &at.field(name), |v, at| port(v, at).map(u32::from));
        let paths = |me: &mut Self, values: &[String], name: &str| {
            list(values, &at.field(name), |v, at| {
                let read = path(v, at)?;
                if !matches!(read.kind, Some(Kind::Template(_))) {
                    me.stars(v, at);
                }
                Ok(read)
            })
        };
        Ok(wire::Operation {
            hosts: matches(self, &operation.hosts, "hosts")?,
            not_hosts: matches(self, &operation.not_hosts, "notHosts")?,
            ports: ports(&operation.ports, "ports")?,
            not_ports: ports(&operation.not_ports, "notPorts")?,
            methods: matches(self, &operation.methods, "methods")?,
            not_methods: matches(self, &operation.not_methods, "notMethods")?,
            paths: paths(self, &operation.paths, "paths")?,
            not_paths: paths(self, &operation.not_paths, "notPaths")?,
        })
    }

    fn condition(&mut self, condition: &security::Condition, at: &At) -> Result<wire::Condition, ParseError> {
        if condition.values.is_empty() && condition.not_values.is_empty() {
            return at.wrong("has neither values nor notValues");
        }
        let (attribute, path) = attribute(&condition.key, &at.field("key"))?;
        let namespace = self.namespace;
        let mut value = |v: &str, at: &At| -> Result<StringMatch, ParseError> {
            let exact = |text: String| matching(Kind::Exact(text));
            match attribute {
                Attribute::SourceIp | Attribute::RemoteIp | Attribute::DestinationIp => block(v, at).map(exact),
                Attribute::DestinationPort => port(v, at).map(|p| exact(p.to_string())),
                Attribute::SourceNamespace => Ok(glob(v)),
                Attribute::SourceServiceAccount => service_account(v, namespace, at).map(exact),
                _ => Ok(self.stars(v, at)),
            }
        };
        let values = list(&condition.values, &at.field("values"), &mut value)?;
        let not_values = list(&condition.not_values, &at.field("notValues"), &mut value)?;
        Ok(wire::Condition { attribute: attribute.into(), path, values, not_values })
    }
}

/// What a condition looks at.
fn attribute(key: &str, at: &At) -> Result<(Attribute, Vec<String>), ParseError> {
    let plain = match key {
        "source.ip" => Attribute::SourceIp,
        "remote.ip" => Attribute::RemoteIp,
        "source.namespace" => Attribute::SourceNamespace,
        "source.principal" => Attribute::SourcePrincipal,
        "source.serviceAccount" => Attribute::SourceServiceAccount,
        "source.trustDomain" => Attribute::SourceTrustDomain,
        "request.auth.principal" => Attribute::RequestPrincipal,
        "request.auth.audiences" => Attribute::RequestAudiences,
        "request.auth.presenter" => Attribute::RequestPresenter,
        "destination.ip" => Attribute::DestinationIp,
        "destination.port" => Attribute::DestinationPort,
        "connection.sni" => Attribute::ConnectionSni,
        _ => {
            if let Some(rest) = key.strip_prefix("request.headers") {
                return match brackets(rest).as_deref() {
                    Some([name]) => Ok((Attribute::RequestHeader, vec![name.to_ascii_lowercase()])),
                    _ => at.wrong(format!("{key:?} is not request.headers[name]")),
                };
            }
            if let Some(rest) = key.strip_prefix("request.auth.claims") {
                return match brackets(rest) {
                    Some(path) if !path.is_empty() => Ok((Attribute::RequestClaim, path)),
                    _ => at.wrong(format!("{key:?} is not request.auth.claims[name], with further [name] for nested claims")),
                };
            }
            if key.starts_with("experimental.envoy.filters.") {
                return at.wrong(format!("{key:?} is about filters of Envoy, of which there are none here"));
            }
            return at.wrong(format!("{key:?} is no attribute of a request"));
        }
    };
    Ok((plain, Vec::new()))
}

/// `[a][b]`.
fn brackets(text: &str) -> Option<Vec<String>> {
    let mut parts = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (part, after) = rest.strip_prefix('[')?.split_once(']')?;
        if part.is_empty() || part.contains('[') {
            return None;
        }
        parts.push(part.to_owned());
        rest = after;
    }
    Some(parts)
}

/// The policies that hold for a pod: those of the root namespace first, then by name.
pub fn of_pod(pod: &Pod, known: &Known<'_>) -> Vec<wire::AuthorizationPolicy> {
    let policies =
        selected(pod, known, |policies| policies.authorizations.values().map(|p| (p.as_ref(), &p.spec.selector)).collect());
    policies
        .into_iter()
        .map(|policy| {
            let spec = &policy.spec;
            wire::AuthorizationPolicy {
                namespace: policy.namespace.clone(),
                name: policy.name.clone(),
                action: spec.action.into(),
                dry_run: spec.dry_run,
                rules: spec.rules.clone(),
                authorizer: (spec.action == AuthorizationAction::Custom)
                    .then(|| provider::authorizer(&spec.provider, known.mesh))
                    .flatten(),
                broken: spec.broken.clone(),
            }
        })
        .collect()
}
