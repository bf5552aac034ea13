//! What a decision looks at: borrowed from wherever the proxy has it.

use std::net::{IpAddr, SocketAddr};

/// A request (HTTP) or a connection (TCP: without [`Request::http`]) that wants in.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// Who calls, if mutual TLS has proved it.
    pub source: Option<Peer<'a>>,
    /// The address of the direct peer.
    pub source_ip: IpAddr,
    /// The address of the client as trusted hops name it; that of the direct peer if there are none.
    pub remote_ip: IpAddr,
    /// Where the client connected to: the port is the app's.
    pub destination: SocketAddr,
    /// The server name of the client's TLS, if it has one.
    pub sni: Option<&'a str>,
    /// Absent on connections whose bytes are not looked into.
    pub http: Option<Http<'a>>,
}

impl std::fmt::Debug for Request<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut out = f.debug_struct("Request");
        out.field("source", &self.source).field("source_ip", &self.source_ip).field("remote_ip", &self.remote_ip);
        out.field("destination", &self.destination).field("sni", &self.sni);
        if let Some(http) = &self.http {
            out.field("method", &http.method).field("host", &http.host).field("path", &http.path).field("token", &http.token);
        }
        out.finish_non_exhaustive()
    }
}

/// A proven identity, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer<'a> {
    /// Without the scheme: "cluster.local/ns/default/sa/frontend".
    pub principal: &'a str,
    /// "cluster.local".
    pub trust_domain: &'a str,
    /// Absent in ids of another shape than Kubernetes meshes use.
    pub namespace: Option<&'a str>,
    /// The name alone, as [`Peer::namespace`].
    pub service_account: Option<&'a str>,
    /// "default/sa/frontend": namespace and service account in one piece.
    account: &'a str,
}

impl<'a> Peer<'a> {
    /// Reads a SPIFFE id, with or without `spiffe://`. `None`: it is empty.
    pub fn parse(id: &'a str) -> Option<Self> {
        let principal = id.strip_prefix("spiffe://").unwrap_or(id);
        let (trust_domain, path) = principal.split_once('/').unwrap_or((principal, ""));
        if trust_domain.is_empty() {
            return None;
        }
        let account = path.strip_prefix("ns/").unwrap_or("");
        let parts = account.split_once("/sa/").filter(|(namespace, name)| {
            !namespace.is_empty() && !name.is_empty() && !namespace.contains('/') && !name.contains('/')
        });
        let (namespace, service_account) = parts.unzip();
        Some(Self { principal, trust_domain, namespace, service_account, account: if parts.is_some() { account } else { "" } })
    }

    pub(crate) fn account(&self) -> &'a str {
        self.account
    }
}

/// The HTTP side of a request, after its path was normalised.
#[derive(Clone, Copy)]
pub struct Http<'a> {
    /// As it came: letter case counts.
    pub method: &'a str,
    /// `:authority` or `Host`, with the port if the client wrote one.
    pub host: &'a [u8],
    /// Normalised, without the query. Empty for CONNECT without a path.
    pub path: &'a str,
    /// Without the question mark.
    pub query: Option<&'a str>,
    /// The other header fields.
    pub headers: &'a dyn Headers,
    /// The verified token.
    pub token: Option<&'a crate::jwt::Claims>,
}

/// Header fields by name.
pub trait Headers {
    /// Shows the value of each field with that name (in lower case), in their order.
    fn each(&self, name: &str, show: &mut dyn FnMut(&[u8]));
}

/// Pairs of name (lower case) and value; for tests and for questions that people ask by hand.
impl Headers for [(String, String)] {
    fn each(&self, name: &str, show: &mut dyn FnMut(&[u8])) {
        self.iter().filter(|(field, _)| field == name).for_each(|(_, value)| show(value.as_bytes()));
    }
}

impl Headers for Vec<(String, String)> {
    fn each(&self, name: &str, show: &mut dyn FnMut(&[u8])) {
        self.as_slice().each(name, show);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers() {
        let peer = Peer::parse("spiffe://cluster.local/ns/a/sa/b").unwrap();
        assert_eq!(peer.principal, "cluster.local/ns/a/sa/b");
        assert_eq!((peer.trust_domain, peer.namespace, peer.service_account), ("cluster.local", Some("a"), Some("b")));
        for odd in ["td/x", "td/ns/a", "td/ns/a/sa/", "td/ns//sa/b", "td/ns/a/b/sa/c", "td/ns/a/sa/b/c", "td"] {
            let peer = Peer::parse(odd).unwrap();
            assert_eq!((peer.trust_domain, peer.namespace, peer.account()), ("td", None, ""), "{odd}");
        }
        assert_eq!(Peer::parse("spiffe://"), None);
    }

    #[test]
    fn repeated_fields_are_shown_one_by_one() {
        let fields = vec![("a".to_owned(), "1".to_owned()), ("b".into(), "2".into()), ("a".into(), "3".into())];
        let values = |name: &str| {
            let mut all = Vec::new();
            fields.each(name, &mut |value| all.push(value.to_vec()));
            all
        };
        assert_eq!(values("a"), [b"1", b"3"]);
        assert!(values("c").is_empty());
    }
}
