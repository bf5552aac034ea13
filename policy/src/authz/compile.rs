//! From the wire to matchers. Whatever can't be understood makes the whole policy broken, never a part of it silently absent.

use super::field::{Attribute, Field, Values};
use super::rule::{All, Rule};
use super::text::TextMatch;
use ipnet::IpNet;
use std::net::IpAddr;
use weft_api::wire;
use weft_api::wire::condition::Attribute as WireAttribute;
use weft_api::wire::string_match::Kind;

/// What `cluster.local` in a principal stands for, besides itself: this mesh, whatever its trust domain is called.
const LOCAL: &str = "cluster.local";

/// Compiles the rules of one policy for HTTP.
pub(crate) fn rules(policy: &wire::AuthorizationPolicy, trust_domains: &[String]) -> Result<Vec<Rule>, String> {
    policy
        .rules
        .iter()
        .enumerate()
        .map(|(n, rule)| compile(rule, trust_domains).map_err(|why| format!("rules[{n}].{why}")))
        .collect()
}

/// The rule as it counts for connections whose bytes are not looked into; `None`: it does not count there. An ALLOW with a test of HTTP
/// can't be met, so it is dropped; of other actions only the test is, and they act on more.
pub(crate) fn for_tcp(rule: &Rule, allow: bool) -> Option<Rule> {
    if allow {
        return rule.fields().all(|field| !field.attribute.is_http()).then(|| rule.clone());
    }
    let strip = |fields: &All| -> All { fields.iter().filter(|field| !field.attribute.is_http()).cloned().collect() };
    Some(Rule { from: rule.from.iter().map(strip).collect(), to: rule.to.iter().map(strip).collect(), when: strip(&rule.when) })
}

fn compile(rule: &wire::AuthorizationRule, trust_domains: &[String]) -> Result<Rule, String> {
    let numbered = |part: &str, n: usize, why: String| format!("{part}[{n}].{why}");
    let from = rule.from.iter().enumerate();
    let from = from.map(|(n, from)| source(from, trust_domains).map_err(|why| numbered("from", n, why)));
    let to = rule.to.iter().enumerate().map(|(n, to)| operation(to).map_err(|why| numbered("to", n, why)));
    let mut when = Vec::new();
    for (n, condition) in rule.when.iter().enumerate() {
        when.extend(self::condition(condition, trust_domains).map_err(|why| numbered("when", n, why))?);
    }
    Ok(Rule { from: from.collect::<Result<_, _>>()?, to: to.collect::<Result<_, _>>()?, when: when.into() })
}

/// Collects the tests of one source, operation or condition.
#[derive(Default)]
struct Fields(Vec<Field>);

impl Fields {
    /// Adds a pair of lists, `values` and what excludes.
    fn texts(
        &mut self,
        name: &str,
        attribute: &Attribute,
        values: &[wire::StringMatch],
        not_values: &[wire::StringMatch],
    ) -> Result<(), String> {
        for (list, negated) in [(values, false), (not_values, true)] {
            if !list.is_empty() {
                let name = spelled(name, negated);
                let compiled = list
                    .iter()
                    .enumerate()
                    .map(|(n, value)| TextMatch::compile(value, attribute.fold()).map_err(|why| format!("{name}[{n}]: {why}")));
                let values = Values::Texts(compiled.collect::<Result<_, _>>()?);
                self.0.push(Field { attribute: attribute.clone(), negated, values, name: name.into() });
            }
        }
        Ok(())
    }

    fn nets(&mut self, name: &str, attribute: &Attribute, values: &[String], not_values: &[String]) -> Result<(), String> {
        for (list, negated) in [(values, false), (not_values, true)] {
            if !list.is_empty() {
                let name = spelled(name, negated);
                let compiled = list.iter().enumerate().map(|(n, value)| net(value).map_err(|why| format!("{name}[{n}]: {why}")));
                let values = Values::Nets(compiled.collect::<Result<_, _>>()?);
                self.0.push(Field { attribute: attribute.clone(), negated, values, name: name.into() });
            }
        }
        Ok(())
    }

    fn ports(&mut self, name: &str, values: &[String], not_values: &[String]) -> Result<(), String> {
        for (list, negated) in [(values, false), (not_values, true)] {
            if !list.is_empty() {
                let name = spelled(name, negated);
                let compiled = list.iter().enumerate().map(|(n, value)| {
                    value.parse().map_err(|_| format!("{name}[{n}]: {value:?} is no port (a number from 0 to 65535)"))
                });
                let values = Values::Ports(compiled.collect::<Result<_, _>>()?);
                self.0.push(Field { attribute: Attribute::Port, negated, values, name: name.into() });
            }
        }
        Ok(())
    }
}

/// "source.principals" and "source.notPrincipals"; "when x" and "when x (notValues)".
fn spelled(name: &str, negated: bool) -> String {
    match name.rsplit_once('.') {
        _ if !negated => name.into(),
        Some((part @ ("source" | "operation"), field)) => {
            let (first, rest) = field.split_at(1);
            format!("{part}.not{}{rest}", first.to_ascii_uppercase())
        }
        _ => format!("{name} (notValues)"),
    }
}

fn source(source: &wire::Source, trust_domains: &[String]) -> Result<All, String> {
    let mut fields = Fields::default();
    let expanded = |list: &[wire::StringMatch]| expand(list, trust_domains);
    let (is, not) = (expanded(&source.principals), expanded(&source.not_principals));
    fields.texts("source.principals", &Attribute::Principal, &is, &not)?;
    fields.texts(
        "source.requestPrincipals",
        &Attribute::RequestPrincipal,
        &source.request_principals,
        &source.not_request_principals,
    )?;
    fields.texts("source.namespaces", &Attribute::Namespace, &source.namespaces, &source.not_namespaces)?;
    let (is, not) = (accounts(&source.service_accounts)?, accounts(&source.not_service_accounts)?);
    fields.texts("source.serviceAccounts", &Attribute::ServiceAccount, &is, &not)?;
    fields.texts("source.trustDomains", &Attribute::TrustDomain, &source.trust_domains, &source.not_trust_domains)?;
    fields.nets("source.ipBlocks", &Attribute::SourceIp, &source.ip_blocks, &source.not_ip_blocks)?;
    fields.nets("source.remoteIpBlocks", &Attribute::RemoteIp, &source.remote_ip_blocks, &source.not_remote_ip_blocks)?;
    Ok(fields.0.into())
}

fn operation(operation: &wire::Operation) -> Result<All, String> {
    let mut fields = Fields::default();
    let numbers = |ports: &[u32]| ports.iter().map(ToString::to_string).collect::<Vec<_>>();
    // The cheap tests first.
    fields.ports("operation.ports", &numbers(&operation.ports), &numbers(&operation.not_ports))?;
    fields.texts("operation.methods", &Attribute::Method, &operation.methods, &operation.not_methods)?;
    fields.texts("operation.paths", &Attribute::Path, &operation.paths, &operation.not_paths)?;
    fields.texts("operation.hosts", &Attribute::Host, &operation.hosts, &operation.not_hosts)?;
    Ok(fields.0.into())
}

fn condition(condition: &wire::Condition, trust_domains: &[String]) -> Result<Vec<Field>, String> {
    let attribute = WireAttribute::try_from(condition.attribute)
        .map_err(|_| format!("attribute {} is not known to this version", condition.attribute))?;
    let (values, not_values) = (&condition.values, &condition.not_values);
    if values.is_empty() && not_values.is_empty() {
        return Err(format!("{} has neither values nor notValues", attribute.as_str_name()));
    }
    let mut fields = Fields::default();
    let plain = |fields: &mut Fields, name: &str, attribute: Attribute| fields.texts(name, &attribute, values, not_values);
    let nets = |fields: &mut Fields, name: &str, attribute: Attribute| {
        fields.nets(name, &attribute, &exact(values)?, &exact(not_values)?)
    };
    match attribute {
        WireAttribute::RequestHeader => {
            let [name] = condition.path.as_slice() else { return Err("a header's name is missing".into()) };
            if name.is_empty() {
                return Err("a header's name is empty".into());
            }
            let name = name.to_ascii_lowercase();
            plain(&mut fields, &format!("when request.headers[{name}]"), Attribute::Header(name.into()))?;
        }
        WireAttribute::SourceIp => nets(&mut fields, "when source.ip", Attribute::SourceIp)?,
        WireAttribute::RemoteIp => nets(&mut fields, "when remote.ip", Attribute::RemoteIp)?,
        WireAttribute::DestinationIp => nets(&mut fields, "when destination.ip", Attribute::DestinationIp)?,
        WireAttribute::SourceNamespace => plain(&mut fields, "when source.namespace", Attribute::Namespace)?,
        WireAttribute::SourcePrincipal => {
            let (is, not) = (expand(values, trust_domains), expand(not_values, trust_domains));
            fields.texts("when source.principal", &Attribute::Principal, &is, &not)?;
        }
        WireAttribute::SourceServiceAccount => {
            let (is, not) = (accounts(&exact(values)?)?, accounts(&exact(not_values)?)?);
            fields.texts("when source.serviceAccount", &Attribute::ServiceAccount, &is, &not)?;
        }
        WireAttribute::SourceTrustDomain => plain(&mut fields, "when source.trustDomain", Attribute::TrustDomain)?,
        WireAttribute::RequestPrincipal => plain(&mut fields, "when request.auth.principal", Attribute::RequestPrincipal)?,
        WireAttribute::RequestAudiences => plain(&mut fields, "when request.auth.audiences", Attribute::Audiences)?,
        WireAttribute::RequestPresenter => plain(&mut fields, "when request.auth.presenter", Attribute::Presenter)?,
        WireAttribute::RequestClaim => {
            if condition.path.is_empty() || condition.path.iter().any(String::is_empty) {
                return Err("a claim's name is missing".into());
            }
            let name = format!("when request.auth.claims[{}]", condition.path.join("]["));
            let path = condition.path.iter().map(|part| part.as_str().into()).collect();
            plain(&mut fields, &name, Attribute::Claim(path))?;
        }
        WireAttribute::DestinationPort => fields.ports("when destination.port", &exact(values)?, &exact(not_values)?)?,
        WireAttribute::ConnectionSni => plain(&mut fields, "when connection.sni", Attribute::Sni)?,
    }
    Ok(fields.0)
}

/// The plain texts of a list that can't have patterns.
fn exact(list: &[wire::StringMatch]) -> Result<Vec<String>, String> {
    list.iter()
        .map(|value| match &value.kind {
            Some(Kind::Exact(text)) => Ok(text.clone()),
            other => Err(format!("{other:?} is a pattern where only plain values can be")),
        })
        .collect()
}

fn net(text: &str) -> Result<IpNet, String> {
    let net = match text.parse::<IpNet>() {
        Ok(net) => net,
        Err(_) => text.parse::<IpAddr>().map(IpNet::from).map_err(|_| format!("{text:?} is no IP address or CIDR"))?,
    };
    // As addresses of requests are: IPv4 mapped into IPv6 is IPv4.
    Ok(match net {
        IpNet::V6(v6) if v6.prefix_len() >= 96 => match v6.addr().to_ipv4_mapped() {
            Some(v4) => ipnet::Ipv4Net::new(v4, v6.prefix_len() - 96).map_or(net, IpNet::V4).trunc(),
            None => net.trunc(),
        },
        net => net.trunc(),
    })
}

/// "namespace/name" as it stands in an identity.
fn accounts(list: &[String]) -> Result<Vec<wire::StringMatch>, String> {
    list.iter()
        .map(|text| match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(wire::StringMatch { kind: Some(Kind::Exact(format!("{namespace}/sa/{name}"))) })
            }
            _ => Err(format!("service account {text:?} is not \"namespace/name\"")),
        })
        .collect()
}

/// A principal that names one of the mesh's trust domains counts in each of them; so does one that names `cluster.local`. Patterns that leave
/// the trust domain open stay as they are.
fn expand(list: &[wire::StringMatch], trust_domains: &[String]) -> Vec<wire::StringMatch> {
    let mut out: Vec<wire::StringMatch> = Vec::with_capacity(list.len());
    for value in list {
        let (text, kind): (&str, fn(String) -> Kind) = match &value.kind {
            Some(Kind::Exact(text)) => (text, Kind::Exact),
            Some(Kind::Prefix(text)) => (text, Kind::Prefix),
            _ => {
                out.push(value.clone());
                continue;
            }
        };
        let ours = text.split_once('/').filter(|(domain, _)| *domain == LOCAL || trust_domains.iter().any(|ours| ours == domain));
        let mut push = |text: String| {
            let value = wire::StringMatch { kind: Some(kind(text)) };
            if !out.contains(&value) {
                out.push(value);
            }
        };
        match ours {
            // Nothing is known of trust domains: what is written counts.
            Some((_, rest)) if !trust_domains.is_empty() => {
                for domain in trust_domains {
                    push(format!("{domain}/{rest}"));
                }
            }
            _ => push(text.into()),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is(text: &str) -> wire::StringMatch {
        wire::StringMatch { kind: Some(Kind::Exact(text.into())) }
    }

    fn prefix(text: &str) -> wire::StringMatch {
        wire::StringMatch { kind: Some(Kind::Prefix(text.into())) }
    }

    #[test]
    fn aliases() {
        let domains = ["td1".to_owned(), "td2".to_owned()];
        assert_eq!(expand(&[is("td2/ns/a/sa/b")], &domains), [is("td1/ns/a/sa/b"), is("td2/ns/a/sa/b")]);
        assert_eq!(expand(&[is("cluster.local/ns/a/sa/b")], &domains), [is("td1/ns/a/sa/b"), is("td2/ns/a/sa/b")]);
        assert_eq!(expand(&[is("other/ns/a/sa/b")], &domains), [is("other/ns/a/sa/b")]);
        assert_eq!(expand(&[prefix("td1/ns/a/")], &domains), [prefix("td1/ns/a/"), prefix("td2/ns/a/")]);
        assert_eq!(expand(&[prefix("td")], &domains), [prefix("td")]);
        assert_eq!(expand(&[is("cluster.local/ns/a/sa/b")], &[]), [is("cluster.local/ns/a/sa/b")]);
    }

    #[test]
    fn networks() {
        assert_eq!(net("10.1.2.3/8").unwrap().to_string(), "10.0.0.0/8");
        assert_eq!(net("10.1.2.3").unwrap().to_string(), "10.1.2.3/32");
        assert_eq!(net("::ffff:10.0.0.0/104").unwrap().to_string(), "10.0.0.0/8");
        assert_eq!(net("fd00::/8").unwrap().to_string(), "fd00::/8");
        for bad in ["", "10.0.0", "10.0.0.0/33", "x"] {
            assert!(net(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names() {
        assert_eq!(spelled("source.ipBlocks", true), "source.notIpBlocks");
        assert_eq!(spelled("operation.paths", false), "operation.paths");
        assert_eq!(spelled("when request.headers[a.b]", true), "when request.headers[a.b] (notValues)");
    }
}
