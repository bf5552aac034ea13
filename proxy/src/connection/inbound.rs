//! Connections that come in for the app: which of them are taken (PeerAuthentication), and who is calling.
//!
//! | mode | mutual TLS of the mesh | plaintext | the app's own TLS |
//! | --- | --- | --- | --- |
//! | PERMISSIVE | terminated | taken | passed through |
//! | STRICT | terminated | refused | refused |
//! | DISABLE | the app's bytes | taken | passed through |
//!
//! A refused connection is reset, as it would be by Istio, and counted. Without a certificate nothing can be terminated: what would have to be is
//! refused, never passed on. A silent client never holds up a server that speaks first, except under STRICT, where nothing
//! may reach the app before its client has proved who he is.

use super::{dispatch, first_bytes, http, opaque};
use crate::conn::{Arrival, Direction, Downstream};
use crate::connection::{Context, detected};
use crate::detect::{self, Hello, Verdict};
use crate::http::HttpVersion;
use crate::inbound::Mtls;
use crate::io::{Prefixed, Stream};
use crate::log;
use crate::report::{Seen, SeenHttp};
use crate::settings::Protocol;
use crate::sys;
use crate::telemetry::{ConnectionRecord, Detected, Flag};
use crate::tls::{self, Alpn};
use bytes::BytesMut;

/// How long a client of a port whose clients speak first may be silent before it has said anything.
const IDLE: std::time::Duration = std::time::Duration::from_secs(3600);

/// Whether mutual TLS of the mesh would be terminated on this connection.
pub(super) fn terminates(down: &Downstream, context: &Context) -> bool {
    let worker = &context.worker;
    down.direction == Direction::Inbound
        && down.principal.is_none()
        && worker.identity.is_some()
        && worker.config.load().mtls(down.original.0.port()) != Mtls::Disable
}

/// Serves a connection to its end.
pub(super) async fn serve(mut io: Prefixed<Stream>, declared: Protocol, arrival: Arrival, context: &Context) {
    let mode = context.worker.config.load().mtls(arrival.down.original.0.port());
    if mode == Mtls::Strict {
        return strict(io, declared, arrival, context).await;
    }
    if !terminates(&arrival.down, context) {
        return dispatch(io, declared, arrival, context).await;
    }
    if !declared.is_http() {
        return detected(io, declared, arrival, context).await;
    }
    // The client speaks first. What is plaintext is not touched.
    let speaks = tokio::select! {
        biased;
        speaks = tokio::time::timeout(IDLE, io.speaks()) => speaks.is_ok(),
        () = context.worker.over(&arrival.down) => false,
    };
    if !speaks {
        return;
    }
    let mut first = [0];
    match io.get_ref().tcp().peek(&mut first).await {
        Ok(1) if first[0] == 0x16 => {}
        _ => return dispatch(io, declared, arrival, context).await,
    }
    let mut seen = BytesMut::new();
    let verdict = hello(&mut io, &mut seen, context).await;
    let (_, stream) = io.into_parts();
    let io = Prefixed::new(seen.freeze(), stream);
    match verdict {
        Some(hello) if hello.mesh => Box::pin(secure(io, declared, arrival, context)).await,
        _ => dispatch(io, declared, arrival, context).await,
    }
}

/// Reads a ClientHello, within the time for it. None: it is none.
async fn hello(io: &mut Prefixed<Stream>, seen: &mut BytesMut, context: &Context) -> Option<Hello> {
    let patience = context.worker.settings.timeouts.detect;
    let reading = first_bytes(io, seen, detect::tls_or_opaque);
    match tokio::time::timeout(patience, reading).await {
        Ok(Ok(Verdict::Tls(hello))) => Some(hello),
        _ => None,
    }
}

/// Only mutual TLS is taken.
async fn strict(mut io: Prefixed<Stream>, declared: Protocol, arrival: Arrival, context: &Context) {
    let speaks = tokio::time::timeout(context.worker.settings.timeouts.handshake, io.speaks()).await.is_ok();
    let mut seen = BytesMut::new();
    let verdict = if speaks { hello(&mut io, &mut seen, context).await } else { None };
    let (_, stream) = io.into_parts();
    let is_tls = seen.first() == Some(&0x16);
    match verdict {
        Some(hello) if hello.mesh => {
            Box::pin(secure(Prefixed::new(seen.freeze(), stream), declared, arrival, context)).await;
        }
        _ => {
            let what = match (speaks, is_tls) {
                (false, _) => "it said nothing",
                (true, true) => "its TLS is not the mesh's",
                (true, false) => "it is plaintext",
            };
            let down = &arrival.down;
            log::connection_error(&format_args!(
                "inbound {}: refused on port {}, which takes only mutual TLS (PeerAuthentication STRICT): {what}",
                down.peer,
                down.original.0.port()
            ));
            context.worker.recorder.refused_plaintext();
            // One that said nothing was hardly a caller: something looks whether the port is open.
            if speaks {
                let report = context.worker.recorder.report();
                let seen = turned_away(down, declared);
                report.seen(&seen);
                report.refused(&seen, "", "the port takes only mutual TLS (PeerAuthentication STRICT)");
            }
            refuse(&stream, down, Flag::PlaintextRefused, context);
        }
    }
}

/// A connection that was refused before it was known what it wants.
fn turned_away(down: &Downstream, declared: Protocol) -> Seen<'static> {
    let opaque = matches!(declared, Protocol::Tcp | Protocol::Tls);
    let http = SeenHttp { method: "", path: "", host: b"", principal: None, request_id: None };
    Seen { identity: None, address: down.peer.ip(), port: down.original.0.port(), http: (!opaque).then_some(http), denied: true }
}

fn refuse(stream: &Stream, down: &Downstream, flag: Flag, context: &Context) {
    context.worker.recorder.refused(&ConnectionRecord {
        downstream: down,
        upstream: None,
        principal: None,
        flag: Some(flag),
        duration: down.accepted.elapsed(),
        received: 0,
        sent: 0,
    });
    sys::reset_on_close(stream.tcp());
}

/// Terminates mutual TLS, and serves what is inside.
pub(super) async fn secure(io: Prefixed<Stream>, declared: Protocol, mut arrival: Arrival, context: &Context) {
    let worker = &context.worker;
    let (seen, stream) = io.into_parts();
    let Stream::Plain(stream) = stream else { return };
    let secrets = worker.identity.as_ref().and_then(|holder| holder.get());
    let Some(secrets) = secrets else {
        log::connection_error(&format_args!(
            "inbound {}: refused, it wants mutual TLS and this proxy has no certificate yet; can it reach the control plane?",
            arrival.down.peer
        ));
        worker.recorder.handshake(Direction::Inbound, "failed", "no-certificate");
        return refuse(&Stream::Plain(stream), &arrival.down, Flag::DownstreamProtocolError, context);
    };
    // The handshake is large, and most of a connection's life comes after it.
    let accepting = Box::pin(tls::accept(&secrets, Prefixed::new(seen, stream)));
    let accepted = tokio::time::timeout(worker.settings.timeouts.handshake, accepting).await;
    let accepted = accepted.unwrap_or_else(|_| Err(tls::HandshakeError::Broken(std::io::ErrorKind::TimedOut.into())));
    let (stream, peer) = match accepted {
        Ok(accepted) => accepted,
        Err(error) => {
            worker.recorder.handshake(Direction::Inbound, "failed", error.reason());
            log::connection_error(&format_args!("inbound {}: mutual TLS failed: {error}", arrival.down.peer));
            return;
        }
    };
    worker.recorder.handshake(Direction::Inbound, if peer.resumed { "resumed" } else { "full" }, "");
    arrival.down.principal = Some(worker.routes.clients.identities().number(&[peer.id.to_string()]));
    arrival.caller = Some(peer.id);
    let io = Prefixed::new(bytes::Bytes::new(), stream);
    // Where our own port declares something the client's word does not count.
    match (declared, peer.alpn) {
        (Protocol::Tcp, _) => opaque(io, None, arrival, Detected::Tcp, context).await,
        (Protocol::Http | Protocol::Http1 | Protocol::Http2, _) => Box::pin(dispatch(io, declared, arrival, context)).await,
        (Protocol::Detect | Protocol::Tls, Alpn::Http1) => http(io, HttpVersion::H1, Detected::Http1, arrival, context).await,
        (Protocol::Detect | Protocol::Tls, Alpn::Http2) => http(io, HttpVersion::H2, Detected::Http2, arrival, context).await,
        // The client's proxy has waited and found nothing that it knows; what it carries may still be the app's own TLS.
        (Protocol::Detect | Protocol::Tls, Alpn::Tcp) => opaque(io, None, arrival, Detected::Tcp, context).await,
        (Protocol::Detect | Protocol::Tls, Alpn::Detect) => Box::pin(detected(io, declared, arrival, context)).await,
    }
}
