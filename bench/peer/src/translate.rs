//! AuthorizationPolicies as filters of Envoy: what Istio documents, said in Envoy's words.
//!
//! Written from the documentation of `AuthorizationPolicy` and of Envoy's RBAC filter alone, without a look at how Weft compiles policies: two
//! independent readings that agree are the point of this program. Regular expressions are used where Envoy has no other way; texts from
//! policies are quoted in them.

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};
use weft_api::istio::security::{Action, AuthorizationPolicySpec, Operation, Rule, Source};

const TEMPLATE: &str = "type.googleapis.com/envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig";

/// `rules` of Envoy's RBAC filters in the order in which they have to stand: what denies, then what allows. (CUSTOM needs another
/// filter and AUDIT decides nothing: both are left out.)
pub(crate) fn filters(policies: &[AuthorizationPolicySpec], http: bool) -> Result<Vec<Value>> {
    let mut filters = Vec::new();
    for action in [Action::Deny, Action::Allow] {
        let of_action: Vec<_> = policies.iter().filter(|policy| policy.action == action).collect();
        if of_action.is_empty() {
            continue;
        }
        let mut entries = Map::new();
        for (n, policy) in of_action.iter().enumerate() {
            for (m, rule) in policy.rules.iter().enumerate() {
                if let Some(entry) = entry(rule, action, http).with_context(|| format!("policy {n}, rule {m}"))? {
                    entries.insert(format!("policy[{n}]-rule[{m}]"), entry);
                }
            }
        }
        filters.push(json!({"action": action.as_str(), "policies": entries}));
    }
    Ok(filters)
}

/// A rule; `None`: it doesn't count, as it asks for something of HTTP on a port that is raw TCP.
fn entry(rule: &Rule, action: Action, http: bool) -> Result<Option<Value>> {
    if !http && action == Action::Allow && needs_http(rule) {
        return Ok(None);
    }
    let (mut permissions, mut principals) = (Vec::new(), Vec::new());
    if !rule.to.is_empty() {
        let each = rule.to.iter().map(|to| operation(&to.operation.clone().unwrap_or_default(), http));
        permissions.push(any_of("or_rules", "rules", each.collect::<Result<_>>()?));
    }
    if !rule.from.is_empty() {
        let each = rule.from.iter().map(|from| source(&from.source.clone().unwrap_or_default(), http));
        principals.push(any_of("or_ids", "ids", each.collect::<Result<_>>()?));
    }
    for condition in &rule.when {
        let is_permission = matches!(condition.key.as_str(), "destination.ip" | "destination.port" | "connection.sni");
        if !http && is_http_key(&condition.key) {
            continue;
        }
        let one = |value: &String| attribute(&condition.key, value);
        let yes: Vec<Value> = condition.values.iter().map(one).collect::<Result<_>>()?;
        let no: Vec<Value> = condition.not_values.iter().map(one).collect::<Result<_>>()?;
        let (out, words) = if is_permission { (&mut permissions, RULES) } else { (&mut principals, IDS) };
        push(out, yes, no, words);
    }
    Ok(Some(json!({
        "permissions": [all_of("and_rules", "rules", permissions)],
        "principals": [all_of("and_ids", "ids", principals)],
    })))
}

fn is_http_key(key: &str) -> bool {
    key.starts_with("request.")
}

fn needs_http(rule: &Rule) -> bool {
    let of_source = |s: &Source| !s.request_principals.is_empty() || !s.not_request_principals.is_empty();
    let of_operation = |o: &Operation| {
        [&o.hosts, &o.not_hosts, &o.methods, &o.not_methods, &o.paths, &o.not_paths].iter().any(|list| !list.is_empty())
    };
    rule.from.iter().filter_map(|f| f.source.as_ref()).any(of_source)
        || rule.to.iter().filter_map(|t| t.operation.as_ref()).any(of_operation)
        || rule.when.iter().any(|condition| is_http_key(&condition.key))
}

/// Names of "or", "not" and the list in an "or".
type Words = (&'static str, &'static str, &'static str);
const RULES: Words = ("or_rules", "not_rule", "rules");
const IDS: Words = ("or_ids", "not_id", "ids");

/// Values, of which one must match, and values, of which none may.
fn push(out: &mut Vec<Value>, yes: Vec<Value>, no: Vec<Value>, (or, not, list): Words) {
    if !yes.is_empty() {
        out.push(any_of(or, list, yes));
    }
    if !no.is_empty() {
        let mut inverted = Map::new();
        inverted.insert(not.to_owned(), any_of(or, list, no));
        out.push(Value::Object(inverted));
    }
}

fn any_of(or: &str, list: &str, of: Vec<Value>) -> Value {
    json!({or: {list: of}})
}

fn all_of(and: &str, list: &str, of: Vec<Value>) -> Value {
    if of.is_empty() { json!({"any": true}) } else { json!({and: {list: of}}) }
}

fn operation(operation: &Operation, http: bool) -> Result<Value> {
    let mut out = Vec::new();
    let each = |list: &[String], make: &dyn Fn(&str) -> Result<Value>| list.iter().map(|v| make(v)).collect::<Result<Vec<_>>>();
    let host = |v: &str| Ok(json!({"header": {"name": ":authority", "string_match": ignoring_case(text(v))}}));
    let method = |v: &str| Ok(json!({"header": {"name": ":method", "string_match": text(v)}}));
    let port = |v: &str| Ok(json!({"destination_port": v.parse::<u16>()?}));
    if http {
        push(&mut out, each(&operation.hosts, &host)?, each(&operation.not_hosts, &host)?, RULES);
    }
    push(&mut out, each(&operation.ports, &port)?, each(&operation.not_ports, &port)?, RULES);
    if http {
        push(&mut out, each(&operation.methods, &method)?, each(&operation.not_methods, &method)?, RULES);
        push(&mut out, each(&operation.paths, &|v| Ok(path(v)))?, each(&operation.not_paths, &|v| Ok(path(v)))?, RULES);
    }
    Ok(all_of("and_rules", "rules", out))
}

fn path(value: &str) -> Value {
    if value.contains('{') {
        let template = value.replace("{**}", "**").replace("{*}", "*");
        return json!({"uri_template": {"name": "t", "typed_config": {"@type": TEMPLATE, "path_template": template}}});
    }
    json!({"url_path": {"path": text(value)}})
}

fn source(source: &Source, http: bool) -> Result<Value> {
    let mut out = Vec::new();
    let keys: [(&[String], &[String], &str); 7] = [
        (&source.principals, &source.not_principals, "source.principal"),
        (&source.request_principals, &source.not_request_principals, "request.auth.principal"),
        (&source.namespaces, &source.not_namespaces, "source.namespace"),
        (&source.service_accounts, &source.not_service_accounts, "source.serviceAccount"),
        (&source.trust_domains, &source.not_trust_domains, "source.trustDomain"),
        (&source.ip_blocks, &source.not_ip_blocks, "source.ip"),
        (&source.remote_ip_blocks, &source.not_remote_ip_blocks, "remote.ip"),
    ];
    for (yes, no, key) in keys {
        if !http && is_http_key(key) {
            continue;
        }
        let each = |list: &[String]| list.iter().map(|value| attribute(key, value)).collect::<Result<Vec<_>>>();
        push(&mut out, each(yes)?, each(no)?, IDS);
    }
    Ok(all_of("and_ids", "ids", out))
}

/// One value of one attribute, as a permission for those of the destination, else as a principal.
fn attribute(key: &str, value: &str) -> Result<Value> {
    if let Some(name) = key.strip_prefix("request.headers[").and_then(|rest| rest.strip_suffix(']')) {
        return Ok(if value == "*" {
            json!({"header": {"name": name, "present_match": true}})
        } else {
            json!({"header": {"name": name, "string_match": text(value)}})
        });
    }
    Ok(match key {
        "source.principal" => principal(&match text_kind(value) {
            Text::Present => regex(".+"),
            Text::Suffix(suffix) => json!({"suffix": suffix}),
            Text::Prefix(prefix) => json!({"prefix": format!("spiffe://{prefix}")}),
            Text::Exact(exact) => json!({"exact": format!("spiffe://{exact}")}),
        }),
        "source.namespace" => {
            let quoted: Vec<String> = value.split('*').map(quote).collect();
            principal(&regex(&format!("spiffe://[^/]+/ns/{}/sa/[^/]+", quoted.join("[^/]*"))))
        }
        "source.serviceAccount" => {
            let (namespace, name) = value.split_once('/').context("a service account is NAMESPACE/NAME here")?;
            principal(&regex(&format!("spiffe://[^/]+/ns/{}/sa/{}", quote(namespace), quote(name))))
        }
        "source.trustDomain" => principal(&regex(&format!(
            "spiffe://{}/.*",
            match text_kind(value) {
                Text::Present => "[^/]+".to_owned(),
                Text::Suffix(suffix) => format!("[^/]*{}", quote(suffix)),
                Text::Prefix(prefix) => format!("{}[^/]*", quote(prefix)),
                Text::Exact(exact) => quote(exact),
            }
        ))),
        "source.ip" => json!({"direct_remote_ip": cidr(value)?}),
        "remote.ip" => json!({"remote_ip": cidr(value)?}),
        "destination.ip" => json!({"destination_ip": cidr(value)?}),
        "destination.port" => json!({"destination_port": value.parse::<u16>()?}),
        "connection.sni" => json!({"requested_server_name": text(value)}),
        "request.auth.principal" => token_principal(value)?,
        _ => match key.strip_prefix("request.auth.claims[").and_then(|rest| rest.strip_suffix(']')) {
            Some(names) => claim(&names.split("][").collect::<Vec<_>>(), &text(value)),
            None if key == "request.auth.audiences" => claim(&["aud"], &text(value)),
            None if key == "request.auth.presenter" => claim(&["azp"], &text(value)),
            None => bail!("{key}: unknown"),
        },
    })
}

fn principal(name: &Value) -> Value {
    json!({"authenticated": {"principal_name": name}})
}

/// `issuer/subject`: both claims must be there.
fn token_principal(value: &str) -> Result<Value> {
    let all = |of: Vec<Value>| json!({"and_ids": {"ids": of}});
    let some = regex(".+");
    Ok(match text_kind(value) {
        Text::Present => all(vec![claim(&["iss"], &some), claim(&["sub"], &some)]),
        // The issuer may hold slashes; the subjects that this program makes do not.
        Text::Exact(exact) => {
            let (issuer, subject) = exact.rsplit_once('/').context("a request principal is ISSUER/SUBJECT")?;
            all(vec![claim(&["iss"], &json!({"exact": issuer})), claim(&["sub"], &json!({"exact": subject}))])
        }
        Text::Prefix(prefix) => match prefix.rsplit_once('/') {
            Some((issuer, "")) => all(vec![claim(&["iss"], &json!({"exact": issuer})), claim(&["sub"], &some)]),
            _ => bail!("{value}: this program makes no such request principal"),
        },
        Text::Suffix(suffix) => match suffix.split_once('/') {
            Some(("", subject)) => all(vec![claim(&["iss"], &some), claim(&["sub"], &json!({"exact": subject}))]),
            _ => bail!("{value}: this program makes no such request principal"),
        },
    })
}

/// A claim of the verified token, a string or one of a list of strings.
fn claim(names: &[&str], text: &Value) -> Value {
    let mut path = vec![json!({"key": "payload"})];
    path.extend(names.iter().map(|name| json!({"key": name})));
    let of = |value: Value| json!({"metadata": {"filter": "envoy.filters.http.jwt_authn", "path": path, "value": value}});
    let single = of(json!({"string_match": text}));
    let listed = of(json!({"list_match": {"one_of": {"string_match": text}}}));
    json!({"or_ids": {"ids": [single, listed]}})
}

enum Text<'a> {
    Exact(&'a str),
    Prefix(&'a str),
    Suffix(&'a str),
    Present,
}

fn text_kind(value: &str) -> Text<'_> {
    if value == "*" {
        Text::Present
    } else if let Some(suffix) = value.strip_prefix('*') {
        Text::Suffix(suffix)
    } else if let Some(prefix) = value.strip_suffix('*') {
        Text::Prefix(prefix)
    } else {
        Text::Exact(value)
    }
}

fn text(value: &str) -> Value {
    match text_kind(value) {
        Text::Exact(exact) => json!({"exact": exact}),
        Text::Prefix(prefix) => json!({"prefix": prefix}),
        Text::Suffix(suffix) => json!({"suffix": suffix}),
        Text::Present => regex(".+"),
    }
}

fn ignoring_case(mut text: Value) -> Value {
    // A regular expression has no such member; ".+" has no letters.
    if text.get("safe_regex").is_none() {
        text["ignore_case"] = json!(true);
    }
    text
}

fn regex(text: &str) -> Value {
    json!({"safe_regex": {"regex": text}})
}

fn quote(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if !c.is_ascii_alphanumeric() && c != '_' && c.is_ascii() {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

fn cidr(value: &str) -> Result<Value> {
    let (address, length) = match value.split_once('/') {
        Some((address, length)) => (address, length.parse()?),
        None if value.contains(':') => (value, 128),
        None => (value, 32),
    };
    Ok(json!({"address_prefix": address, "prefix_len": length}))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(value: Value) -> AuthorizationPolicySpec {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn what_denies_stands_before_what_allows() {
        let policies =
            [spec(json!({})), spec(json!({"action": "DENY", "rules": [{}]})), spec(json!({"action": "AUDIT", "rules": [{}]}))];
        let filters = filters(&policies, true).unwrap();
        assert_eq!(filters.len(), 2);
        assert_eq!(filters[0]["action"], "DENY");
        assert_eq!(filters[0]["policies"]["policy[0]-rule[0]"]["permissions"], json!([{"any": true}]));
        assert_eq!(filters[1], json!({"action": "ALLOW", "policies": {}}));
    }

    #[test]
    fn rules_about_http_count_differently_on_raw_ports() {
        let rules = json!([{"to": [{"operation": {"paths": ["/a"], "ports": ["80"]}}]}]);
        let allow = filters(&[spec(json!({"rules": rules}))], false).unwrap();
        assert_eq!(allow[0]["policies"], json!({}));
        let deny = filters(&[spec(json!({"action": "DENY", "rules": rules}))], false).unwrap();
        let text = deny[0].to_string();
        assert!(text.contains("destination_port") && !text.contains("url_path"), "{text}");
    }

    #[test]
    fn texts_are_quoted_in_expressions() {
        let namespace = attribute("source.namespace", "a.b*").unwrap().to_string();
        assert!(namespace.contains(r"/ns/a\\.b[^/]*/sa/"), "{namespace}");
    }
}
