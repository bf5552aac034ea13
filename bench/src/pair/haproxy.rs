//! HAProxy on both sides of a mutual TLS connection. Both ends prove themselves by certificates of the same root; HAProxy 2.6 can't look at
//! SPIFFE ids (URIs), so it checks less than the others do.

use super::Fronts;
use crate::certs::Files;

const COMMON: &str = "global\n  nbthread 1\n  maxconn 8000\n  ssl-default-bind-options ssl-min-ver TLSv1.3\n  \
     ssl-default-server-options ssl-min-ver TLSv1.3\n\
     defaults\n  timeout connect 5s\n  timeout client 5m\n  timeout server 5m\n";

/// The proxy of the client.
pub(super) fn outbound(front: Fronts, to: Fronts, files: &Files) -> String {
    let tls = format!("ssl verify required ca-file {} crt {}", files.root.display(), files.both.display());
    let mut text = COMMON.to_owned();
    for (name, from, to, extra) in [
        ("h1", front.h1, to.h1, "alpn http/1.1"),
        ("h2", front.h2, to.h2, "alpn h2"),
        ("tcp", front.tcp, to.tcp, ""),
        ("opaque", front.opaque, to.opaque, ""),
    ] {
        let (mode, proto, reuse) = words(name);
        text.push_str(&format!(
            "frontend {name}\n  mode {mode}\n  bind {from}{proto}\n  default_backend {name}\n\
             backend {name}\n  mode {mode}\n{reuse}  server s {to} {tls} {extra}\n"
        ));
    }
    text
}

/// The proxy of the app.
pub(super) fn inbound(front: Fronts, back: Fronts, files: &Files) -> String {
    let tls = format!("ssl verify required ca-file {} crt {}", files.root.display(), files.both.display());
    let mut text = COMMON.to_owned();
    for (name, from, to, extra) in [
        ("h1", front.h1, back.h1, "alpn http/1.1"),
        ("h2", front.h2, back.h2, "alpn h2"),
        ("tcp", front.tcp, back.tcp, ""),
        ("opaque", front.opaque, back.opaque, ""),
    ] {
        let (mode, proto, reuse) = words(name);
        text.push_str(&format!(
            "frontend {name}\n  mode {mode}\n  bind {from} {tls} {extra}\n  default_backend {name}\n\
             backend {name}\n  mode {mode}\n{reuse}  server s {to}{proto}\n"
        ));
    }
    text
}

fn words(name: &str) -> (&'static str, &'static str, &'static str) {
    match name {
        "h1" => ("http", "", "  http-reuse always\n"),
        "h2" => ("http", " proto h2", "  http-reuse always\n"),
        _ => ("tcp", "", ""),
    }
}
