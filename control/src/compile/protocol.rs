//! What is spoken on a port, as declared. The rules are Istio's: `appProtocol` if set, else the port's name; the part before the
//! first `-`, in any letter case; a few well-known ports where nothing is declared. Two differences, both on purpose:
//! `http` and `grpc-web` say HTTP of *either* version (browsers speak gRPC-Web over HTTP/1.1 too), and what is not
//! declared is told from the first bytes without ever stalling a server that speaks first.

use weft_api::wire::Protocol;

/// Ports where an undeclared protocol is opaque, because the server speaks first there: SMTP, DNS, MySQL, MongoDB.
const OPAQUE_PORTS: [u16; 4] = [25, 53, 3306, 27017];

/// The protocol of a TCP port with this name, `appProtocol` and number. [`Protocol::Detect`]: nothing was declared.
pub fn select(name: &str, app_protocol: Option<&str>, port: u16) -> Protocol {
    let declared = match app_protocol {
        Some("kubernetes.io/h2c") => return Protocol::Http2,
        Some("kubernetes.io/ws") => return Protocol::Http,
        Some("kubernetes.io/wss") => return Protocol::Tls,
        Some(other) => other,
        None => name,
    };
    let lower = declared.to_ascii_lowercase();
    if lower.starts_with("grpc-web") {
        return Protocol::Http;
    }
    match lower.split('-').next().unwrap_or_default() {
        "http" => Protocol::Http,
        "http2" | "grpc" => Protocol::Http2,
        "https" | "tls" => Protocol::Tls,
        "tcp" | "udp" | "mongo" | "redis" | "mysql" => Protocol::Tcp,
        _ if OPAQUE_PORTS.contains(&port) => Protocol::Tcp,
        _ => Protocol::Detect,
    }
}

/// What holds where two declarations meet on one port of a pod. One that declares nothing yields to one that does; two
/// versions of HTTP are HTTP; two that cannot both be true make the port one that is told from its first bytes, so that
/// whoever is right is served.
pub fn merge(a: Protocol, b: Protocol) -> Protocol {
    let http = |p| matches!(p, Protocol::Http | Protocol::Http1 | Protocol::Http2);
    match (a, b) {
        _ if a == b => a,
        (Protocol::Detect, declared) | (declared, Protocol::Detect) => declared,
        _ if http(a) && http(b) => Protocol::Http,
        _ => Protocol::Detect,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table() {
        for (name, app_protocol, port, expected) in [
            ("http", None, 80, Protocol::Http),
            ("http-web", None, 80, Protocol::Http),
            ("HTTP-Web", None, 80, Protocol::Http),
            ("httpfoo", None, 80, Protocol::Detect),
            ("http2", None, 80, Protocol::Http2),
            ("http2-x", None, 80, Protocol::Http2),
            ("grpc", None, 80, Protocol::Http2),
            ("grpc-api", None, 80, Protocol::Http2),
            ("grpc-web", None, 80, Protocol::Http),
            ("grpc-webby", None, 80, Protocol::Http),
            ("gRPC-Web-x", None, 80, Protocol::Http),
            ("https", None, 443, Protocol::Tls),
            ("tls-x", None, 443, Protocol::Tls),
            ("tcp", None, 80, Protocol::Tcp),
            ("tcp-x", None, 80, Protocol::Tcp),
            ("udp-x", None, 80, Protocol::Tcp),
            ("mongo", None, 80, Protocol::Tcp),
            ("redis-cache", None, 80, Protocol::Tcp),
            ("mysql", None, 80, Protocol::Tcp),
            ("", None, 80, Protocol::Detect),
            ("web", None, 8080, Protocol::Detect),
            ("", None, 3306, Protocol::Tcp),
            ("database", None, 27017, Protocol::Tcp),
            ("", None, 25, Protocol::Tcp),
            ("dns", None, 53, Protocol::Tcp),
            ("http", None, 3306, Protocol::Http),
            ("tcp", Some("http"), 80, Protocol::Http),
            ("http", Some("tcp"), 80, Protocol::Tcp),
            ("http", Some("grpc"), 80, Protocol::Http2),
            ("http", Some("GRPC"), 80, Protocol::Http2),
            ("http", Some("kubernetes.io/h2c"), 80, Protocol::Http2),
            ("tcp", Some("kubernetes.io/ws"), 80, Protocol::Http),
            ("tcp", Some("kubernetes.io/wss"), 80, Protocol::Tls),
            ("http", Some("example.com/own"), 80, Protocol::Detect),
            ("http", Some("example.com/own"), 3306, Protocol::Tcp),
            ("http", Some(""), 80, Protocol::Detect),
        ] {
            assert_eq!(select(name, app_protocol, port), expected, "{name:?} {app_protocol:?} {port}");
        }
    }

    #[test]
    fn declarations_that_meet() {
        for (a, b, expected) in [
            (Protocol::Http, Protocol::Http, Protocol::Http),
            (Protocol::Http, Protocol::Detect, Protocol::Http),
            (Protocol::Http2, Protocol::Http, Protocol::Http),
            (Protocol::Http1, Protocol::Http2, Protocol::Http),
            (Protocol::Http, Protocol::Tcp, Protocol::Detect),
            (Protocol::Tls, Protocol::Tcp, Protocol::Detect),
            (Protocol::Detect, Protocol::Detect, Protocol::Detect),
        ] {
            assert_eq!(merge(a, b), expected);
            assert_eq!(merge(b, a), expected);
        }
    }
}
