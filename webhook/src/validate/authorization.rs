//! `AuthorizationPolicy`.

use super::shared;
use super::values::{Sort, attribute};
use super::walk::{At, Findings, at_most, get, list, members, quoted, string, text, word};
use serde_json::{Map, Value};

const ACTIONS: [&str; 4] = ["ALLOW", "DENY", "AUDIT", "CUSTOM"];

/// Fields of a source: its name, its negation, what its values are, and whether an external authorizer can be asked by it.
const SOURCE: [(&str, &str, Sort, bool); 7] = [
    ("principals", "notPrincipals", Sort::Text, false),
    ("requestPrincipals", "notRequestPrincipals", Sort::Text, false),
    ("namespaces", "notNamespaces", Sort::Text, false),
    ("serviceAccounts", "notServiceAccounts", Sort::ServiceAccount, false),
    ("ipBlocks", "notIpBlocks", Sort::Ip, true),
    ("remoteIpBlocks", "notRemoteIpBlocks", Sort::Ip, true),
    ("trustDomains", "notTrustDomains", Sort::TrustDomain, false),
];

const OPERATION: [(&str, &str, Sort, bool); 4] = [
    ("hosts", "notHosts", Sort::Text, true),
    ("ports", "notPorts", Sort::Port, true),
    ("methods", "notMethods", Sort::Method, true),
    ("paths", "notPaths", Sort::Path, true),
];

pub(super) fn check(found: &mut Findings, at: &At<'_>, spec: &Value) {
    let known = ["selector", "targetRef", "targetRefs", "rules", "action", "provider"];
    let Some(spec) = members(found, at, spec, &known) else { return };
    shared::selector(found, at, spec);
    shared::targets(found, at, spec);
    let action = word(found, at, spec, "action", &ACTIONS).unwrap_or("ALLOW");
    provider(found, at, spec, action);
    let rules = list(found, at, spec, "rules");
    let at_rules = at.member("rules");
    let rules_given = rules.is_some_and(|r| !r.is_empty()) || get(spec, "rules").is_some_and(|r| !r.is_array());
    if !rules_given && matches!(action, "DENY" | "CUSTOM") {
        found.error(
            &at_rules,
            format!(
                "{action} without rules would never apply; add rules, or one empty rule (rules: [{{}}]) to match every request"
            ),
        );
    }
    let rules = rules.unwrap_or_default();
    at_most(found, &at_rules, rules.len(), 512);
    for (i, value) in rules.iter().enumerate().filter(|(_, v)| !v.is_null()) {
        rule(found, &at_rules.element(i), value, action);
    }
}

fn provider(found: &mut Findings, at: &At<'_>, spec: &Map<String, Value>, action: &str) {
    let here = at.member("provider");
    let Some(value) = get(spec, "provider") else {
        if action == "CUSTOM" {
            found.error(
                &here.member("name"),
                "must be set with the action CUSTOM: the name of an extension provider of the mesh settings",
            );
        }
        return;
    };
    if action != "CUSTOM" {
        found.error(&here, format!("is allowed only with the action CUSTOM, not with {action}"));
    }
    let Some(provider) = members(found, &here, value, &["name"]) else { return };
    if text(found, &here, provider, "name").is_none_or(str::is_empty) && action == "CUSTOM" {
        found.error(&here.member("name"), "must not be empty: the name of an extension provider of the mesh settings");
    }
}

fn rule(found: &mut Findings, at: &At<'_>, value: &Value, action: &str) {
    let Some(rule) = members(found, at, value, &["from", "to", "when"]) else { return };
    let custom = action == "CUSTOM";
    for (name, inner, fields) in [("from", "source", &SOURCE[..]), ("to", "operation", &OPERATION[..])] {
        let Some(entries) = list(found, at, rule, name) else { continue };
        let at = at.member(name);
        if entries.is_empty() {
            found.error(&at, "must not be empty: leave it out to match everything");
        }
        if name == "from" {
            at_most(found, &at, entries.len(), 512);
        }
        for (i, entry) in entries.iter().enumerate().filter(|(_, e)| !e.is_null()) {
            let at = at.element(i);
            let Some(entry) = members(found, &at, entry, &[inner]) else { continue };
            match get(entry, inner) {
                Some(value) => matcher(found, &at.member(inner), value, fields, custom),
                None => found.error(&at.member(inner), "must be set"),
            }
        }
    }
    for (i, value) in list(found, at, rule, "when").unwrap_or_default().iter().enumerate().filter(|(_, v)| !v.is_null()) {
        condition(found, &at.member("when").element(i), value, custom);
    }
}

/// A source or an operation.
fn matcher(found: &mut Findings, at: &At<'_>, value: &Value, fields: &[(&str, &str, Sort, bool)], custom: bool) {
    let known: Vec<&str> = fields.iter().flat_map(|(name, not, ..)| [*name, *not]).collect();
    let Some(members) = members(found, at, value, &known) else { return };
    let mut any = false;
    for (name, sort, in_custom) in fields.iter().flat_map(|(name, not, sort, c)| [(*name, *sort, *c), (*not, *sort, *c)]) {
        let Some(values) = list(found, at, members, name) else {
            any |= get(members, name).is_some();
            continue;
        };
        any |= !values.is_empty();
        let at = at.member(name);
        if custom && !in_custom && !values.is_empty() {
            found.error(
                &at,
                "is not supported with the action CUSTOM, which is decided before identities and tokens are looked at",
            );
        }
        strings(found, &at, values, sort);
    }
    if !any {
        found.error(at, format!("must not be empty: set at least one of {}", known.join(", ")));
    }
    let given = |name: &&str| get(members, name).is_some();
    let accounts = ["serviceAccounts", "notServiceAccounts"].into_iter().find(given);
    let others = ["principals", "notPrincipals", "namespaces", "notNamespaces"].into_iter().find(given);
    if let (Some(accounts), Some(other)) = (accounts, others) {
        found.error(at, format!("has {accounts} and {other}; service accounts can't be combined with namespaces or principals"));
    }
}

/// The values of a list.
fn strings(found: &mut Findings, at: &At<'_>, values: &[Value], sort: Sort) {
    if let Some(most) = sort.most() {
        at_most(found, at, values.len(), most);
    }
    for (i, value) in values.iter().enumerate() {
        let at = at.element(i);
        if let Some(Err(message)) = string(found, &at, value).map(|text| sort.check(text)) {
            found.error(&at, message);
        }
    }
}

fn condition(found: &mut Findings, at: &At<'_>, value: &Value, custom: bool) {
    let Some(condition) = members(found, at, value, &["key", "values", "notValues"]) else { return };
    let lists: Vec<(&str, &[Value])> =
        ["values", "notValues"].into_iter().filter_map(|name| Some((name, list(found, at, condition, name)?))).collect();
    if lists.iter().all(|(_, values)| values.is_empty()) {
        found.error(at, "must have at least one of values and notValues");
    }
    let key = text(found, at, condition, "key").unwrap_or_default();
    let at_key = at.member("key");
    if key.is_empty() {
        if get(condition, "key").is_none_or(Value::is_string) {
            found.error(&at_key, "must be set: an attribute of the request, such as request.headers[x-tenant]");
        }
        return;
    }
    let sort = match attribute(key) {
        Ok(sort) => sort,
        Err(message) => {
            found.error(&at_key, message);
            return;
        }
    };
    let identity = matches!(key, "source.namespace" | "source.serviceAccount" | "source.trustDomain" | "source.principal");
    if custom && (identity || key.starts_with("request.auth.")) {
        let why = "is not supported with the action CUSTOM, which is decided before identities and tokens are looked at";
        found.error(&at_key, format!("{} {why}", quoted(key)));
    }
    for (name, values) in lists {
        strings(found, &at.member(name), values, sort);
    }
}
