//! Policy in force for what comes in: the compiled form of what the control plane says ([`weft_policy`] decides), and the decision about opaque
//! connections. That about HTTP requests is in `http/admit.rs`.
//!
//! A [`Policy`] is immutable and part of the configuration: a new configuration brings a new one, and the next request or connection
//! is judged by it. While a proxy that has a control plane has not heard from it, it is [*pending*](Policy::pending): nobody knows what it would say, so
//! nothing is let in.

use crate::conn::Arrival;
use ipnet::IpNet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use weft_api::{names, wire};
use weft_policy::authz::{Denied, Engine, Outcome, Peer, PolicyId, Request};
use weft_policy::jwt::Rules;
use weft_policy::path::Normalization;

/// See the module.
#[derive(Debug)]
pub struct Policy {
    /// AuthorizationPolicies.
    pub engine: Engine,
    /// RequestAuthentications.
    pub tokens: Rules,
    /// How paths are brought into one form.
    pub paths: Normalization,
    /// Proxies in front of the mesh.
    hops: Vec<IpNet>,
    /// The pod's own SPIFFE id.
    identity: Option<Box<str>>,
    pending: bool,
    /// It is what a control plane has said.
    told: bool,
    source: Source,
}

/// What a policy was compiled from: by that two are equal.
#[derive(Debug, Default, PartialEq)]
struct Source {
    authorization: Vec<wire::AuthorizationPolicy>,
    jwt: Vec<wire::JwtRule>,
    rest: (i32, Vec<String>, Vec<String>),
}

impl Default for Policy {
    /// Without a control plane there is no policy: all is let in, as it came.
    fn default() -> Self {
        Self {
            engine: Engine::default(),
            tokens: Rules::default(),
            paths: Normalization::None,
            hops: Vec::new(),
            identity: None,
            pending: false,
            told: false,
            source: Source::default(),
        }
    }
}

impl PartialEq for Policy {
    fn eq(&self, other: &Self) -> bool {
        self.pending == other.pending && self.source == other.source
    }
}

impl Eq for Policy {}

impl serde::Serialize for Policy {
    /// What is in force, by name: for the admin port.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let policies: Vec<_> = self
            .engine
            .policies()
            .iter()
            .map(|policy| {
                serde_json::json!({
                    "name": policy.name, "action": policy.action, "dryRun": policy.dry_run, "broken": policy.broken,
                })
            })
            .collect();
        let tokens: Vec<_> = self
            .tokens
            .rules()
            .iter()
            .map(|rule| serde_json::json!({"policy": rule.policy, "issuer": rule.issuer(), "keysError": rule.keys_error()}))
            .collect();
        let all = serde_json::json!({
            "pending": self.pending,
            "authorization": policies,
            "tokens": tokens,
            "pathNormalization": format!("{:?}", self.paths),
            "trustedHops": self.hops,
        });
        all.serialize(serializer)
    }
}

impl Policy {
    /// Nothing is known yet, and something will be: nothing is let in meanwhile.
    pub fn pending() -> Self {
        Self { pending: true, ..Self::default() }
    }

    /// Compiles what the control plane says. Nothing in it can make it fail: what isn't understood denies. A trusted hop that is no CIDR is
    /// not trusted.
    pub fn from_wire(inbound: &wire::Inbound) -> Self {
        let source = Source {
            authorization: inbound.authorization.clone(),
            jwt: inbound.jwt.clone(),
            rest: (inbound.path_normalization, inbound.trust_domains.clone(), inbound.trusted_hops.clone()),
        };
        let hops = inbound.trusted_hops.iter().filter_map(|text| {
            let net = text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
            net.inspect_err(|_| tracing::error!("trusted hop {text:?} is no CIDR: it is not trusted")).ok()
        });
        let engine = Engine::compile(&inbound.authorization, &inbound.trust_domains);
        for policy in engine.policies() {
            if let Some(why) = &policy.broken {
                tracing::error!(policy = &*policy.name, "a policy can't be understood, it lets nothing pass: {why}");
            }
        }
        // A number of the future means one of the stricter kinds.
        let paths = wire::PathNormalization::try_from(inbound.path_normalization)
            .map_or(Normalization::DecodeAndMergeSlashes, Normalization::from);
        let tokens = Rules::compile(&inbound.jwt);
        Self { engine, tokens, paths, hops: hops.collect(), identity: identity(inbound), pending: false, told: true, source }
    }

    /// The same policy if nothing has changed for it, else a new one: compiling thousands of rules takes a while, and a configuration comes
    /// again for many reasons.
    pub fn after(previous: &Arc<Self>, inbound: &wire::Inbound) -> Arc<Self> {
        let known = &previous.source;
        let unchanged = previous.told
            && known.authorization == inbound.authorization
            && known.jwt == inbound.jwt
            && known.rest == (inbound.path_normalization, inbound.trust_domains.clone(), inbound.trusted_hops.clone())
            && previous.identity == identity(inbound);
        if unchanged { Arc::clone(previous) } else { Arc::new(Self::from_wire(inbound)) }
    }

    /// Whether the control plane has not spoken yet.
    pub fn is_pending(&self) -> bool {
        self.pending
    }

    /// The pod's own SPIFFE id, where it is known.
    pub fn identity(&self) -> Option<&str> {
        self.identity.as_deref()
    }

    /// Whether what this peer says of others is believed.
    pub fn trusts(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        self.hops.iter().any(|hop| hop.contains(&ip))
    }

    /// The client's address as trusted hops name it. `forwarded` are the values of `x-forwarded-for`, the last one first.
    pub fn remote_ip<'a>(&self, peer: IpAddr, forwarded: impl Iterator<Item = &'a [u8]>) -> IpAddr {
        let mut ip = peer;
        for value in forwarded {
            for part in value.rsplit(|byte| *byte == b',') {
                if !self.trusts(ip) {
                    return ip;
                }
                // What can't be read ends what can be believed.
                let Some(named) = address(part.trim_ascii()) else { return ip };
                ip = named;
            }
        }
        ip
    }

    /// A connection whose bytes are not looked into, as policies see it.
    pub fn connection(arrival: &Arrival) -> Request<'_> {
        let down = &arrival.down;
        Request {
            source: arrival.caller.as_deref().and_then(Peer::parse),
            source_ip: down.peer.ip(),
            remote_ip: down.peer.ip(),
            destination: down.original.0,
            sni: arrival.server_name.as_deref(),
            http: None,
        }
    }

    /// Decides about an opaque connection; `None`: there are no policies. An authorizer may have to be asked.
    pub fn judge(&self, arrival: &Arrival) -> Option<Outcome> {
        (!self.engine.is_empty()).then(|| self.engine.check(&Self::connection(arrival)))
    }

    /// "namespace/name" of a policy.
    pub fn name(&self, id: PolicyId) -> &str {
        self.engine.policy(id).map_or("", |policy| &policy.name)
    }

    /// Why something was denied, in words, and by which policy.
    pub fn reason(&self, denied: Denied) -> (&str, &'static str) {
        match denied {
            Denied::By(id) => (self.name(id), "a DENY policy matches"),
            Denied::NoAllowMatched => ("", "no ALLOW policy matches"),
            Denied::NoAuthorizer(id) => (self.name(id), "a CUSTOM policy matches whose authorizer is not known"),
            Denied::Broken(id) => (self.name(id), "the policy can't be understood"),
        }
    }
}

/// The pod's own SPIFFE id.
fn identity(inbound: &wire::Inbound) -> Option<Box<str>> {
    let (domain, workload) = inbound.trust_domains.first().zip(inbound.workload.as_ref())?;
    Some(names::spiffe_id(domain, &workload.namespace, &workload.service_account).into())
}

/// An address with or without a port.
fn address(text: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(text).ok()?;
    let bare = text.trim_matches(['[', ']']);
    bare.parse().ok().or_else(|| text.parse::<SocketAddr>().ok().map(|address| address.ip()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_not_changed_is_not_compiled_again() {
        let inbound = wire::Inbound { trust_domains: vec!["td".into()], ..Default::default() };
        let first = Policy::after(&Arc::new(Policy::default()), &inbound);
        assert_eq!(first.paths, Normalization::Base, "an empty message is one");
        let again = wire::Inbound { mtls: 1, ..inbound.clone() };
        assert!(Arc::ptr_eq(&first, &Policy::after(&first, &again)));
        let changed = wire::Inbound { authorization: vec![wire::AuthorizationPolicy::default()], ..inbound.clone() };
        assert!(!Arc::ptr_eq(&first, &Policy::after(&first, &changed)));
        assert!(!Policy::after(&Arc::new(Policy::pending()), &wire::Inbound::default()).is_pending());
    }

    #[test]
    fn only_trusted_hops_are_believed() {
        let inbound =
            wire::Inbound { trusted_hops: vec!["10.0.0.0/8".into(), "fd00::1".into(), "x".into()], ..Default::default() };
        let policy = Policy::from_wire(&inbound);
        let remote = |peer: &str, values: &[&str]| {
            let values = values.iter().rev().map(|value| value.as_bytes());
            policy.remote_ip(peer.parse().unwrap(), values).to_string()
        };
        assert_eq!(remote("192.0.2.1", &["198.51.100.1"]), "192.0.2.1");
        assert_eq!(remote("10.0.0.1", &[]), "10.0.0.1");
        assert_eq!(remote("10.0.0.1", &["198.51.100.1"]), "198.51.100.1");
        // Further to the left anybody may have written.
        assert_eq!(remote("10.0.0.1", &["203.0.113.9, 198.51.100.1"]), "198.51.100.1");
        assert_eq!(remote("10.0.0.1", &["203.0.113.9", "198.51.100.1, 10.2.0.1"]), "198.51.100.1");
        assert_eq!(remote("10.0.0.1", &["203.0.113.9, nonsense, 10.2.0.1"]), "10.2.0.1");
        assert_eq!(remote("fd00::1", &["[2001:db8::1]:443"]), "2001:db8::1");
        assert_eq!(remote("::ffff:10.0.0.1", &["198.51.100.1:80"]), "198.51.100.1");
    }
}
