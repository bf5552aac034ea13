//! Mutual TLS between proxies: TLS 1.3 only, both sides prove a SPIFFE identity, the post-quantum hybrid X25519MLKEM768 is
//! preferred, sessions are resumed.
//!
//! - [`spiffe`]: the identity in a certificate.
//! - [`verify`]: whom a server takes for a peer, and whom a client takes for the server that it wants.
//! - [`secrets`]: a certificate with its key and the trust bundle, as the TLS configurations of both sides. Immutable: a renewal or a new
//!   trust bundle makes another one, which new connections take up; none is ever patched.
//! - `sessions`: what is kept for resumption.
//! - [`identity`]: gets the certificate from the control plane and renews it.
//!
//! Mesh TLS is known by its ALPN name ([`weft_api::names::MESH_ALPNS`]), so that an app's own TLS is never mistaken for it. What can't be
//! checked is refused: no certificate, no mutual TLS; and where mutual TLS is due, no connection without it.
//!
//! A resumed session carries the certificates of the full handshake before it, which the library does not look at again. What may have
//! changed since is covered so: whose certificate it is can't change; that it has expired meanwhile is checked after
//! each handshake ([`spiffe::Leaf::check`]); a trust bundle or a certificate of our own that is new makes new configurations, which know nothing of old
//! sessions.

pub mod identity;
pub mod secrets;
mod sessions;
pub mod spiffe;
pub mod verify;

pub use secrets::Secrets;

use crate::io::{Bulk, Prefixed, Stream};
use rustls_pki_types::ServerName;
use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use weft_api::names;

/// What a client tells of the protocol inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Alpn {
    /// Nothing (yet): it is told from the bytes.
    Detect,
    /// Opaque bytes.
    Tcp,
    /// HTTP/1.x.
    Http1,
    /// HTTP/2.
    Http2,
}

impl Alpn {
    const ALL: [Self; 4] = [Self::Detect, Self::Tcp, Self::Http1, Self::Http2];

    /// Its name in the handshake.
    pub fn name(self) -> &'static [u8] {
        match self {
            Self::Detect => names::ALPN_DETECT,
            Self::Tcp => names::ALPN_TCP,
            Self::Http1 => names::ALPN_HTTP1,
            Self::Http2 => names::ALPN_HTTP2,
        }
    }

    /// The one of that name.
    pub fn of(name: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|alpn| alpn.name() == name)
    }
}

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The other side could not prove that it is who it should be. Nothing was sent to it.
    #[error("{0}")]
    Peer(String),
    /// The connection broke, or the other side does not speak TLS as we do.
    #[error("{0}")]
    Broken(#[from] io::Error),
}

impl HandshakeError {
    fn of(error: io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::InvalidCertificate(why)) => Self::Peer(verify::describe(why)),
            Some(rustls::Error::NoCertificatesPresented) => Self::Peer("the other side showed no certificate".into()),
            _ => Self::Broken(error),
        }
    }

    /// A word for metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Peer(_) => "peer-identity",
            Self::Broken(error) if error.kind() == io::ErrorKind::TimedOut => "timeout",
            Self::Broken(error) => match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
                Some(rustls::Error::AlertReceived(_)) => "alert",
                Some(_) => "protocol",
                None => "connection",
            },
        }
    }
}

/// The proved other side of a connection.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its SPIFFE id.
    pub id: Rc<str>,
    /// What the client says of the protocol inside.
    pub alpn: Alpn,
    /// The session was resumed.
    pub resumed: bool,
}

/// Serves a handshake with a client whose ClientHello names one of our protocols.
pub async fn accept(secrets: &Secrets, client: Prefixed<TcpStream>) -> Result<(Stream, Peer), HandshakeError> {
    let (seen, client) = client.into_parts();
    let client = Prefixed::new(seen, Bulk::from(client));
    let stream = TlsAcceptor::from(Arc::clone(&secrets.server)).accept(client).await.map_err(HandshakeError::of)?;
    let (_, session) = stream.get_ref();
    let alpn = session.alpn_protocol().and_then(Alpn::of);
    let alpn = alpn.ok_or_else(|| HandshakeError::Peer("the client agreed on none of the mesh's protocols".into()))?;
    let id = proved(session.peer_certificates(), secrets)?;
    let resumed = session.handshake_kind() == Some(rustls::HandshakeKind::Resumed);
    Ok((Stream::Secure(Box::new(stream.into())), Peer { id, alpn, resumed }))
}

fn proved(chain: Option<&[rustls_pki_types::CertificateDer<'_>]>, secrets: &Secrets) -> Result<Rc<str>, HandshakeError> {
    let leaf = chain.and_then(<[_]>::first).ok_or_else(|| HandshakeError::Peer("the other side showed no certificate".into()))?;
    let leaf = spiffe::Leaf::of(leaf).map_err(|error| HandshakeError::Peer(error.to_string()))?;
    leaf.check(SystemTime::now(), secrets.trust_domains()).map_err(|error| HandshakeError::Peer(error.to_string()))?;
    Ok(leaf.id.into())
}

/// A set of identities that a server may have, by number: cheap to copy and to compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IdentitySet(u32);

/// The sets of identities that a worker has met, by number. Their count is bounded by the service accounts of the mesh.
#[derive(Debug, Default)]
pub struct Identities {
    sets: RefCell<Vec<Arc<[String]>>>,
    numbers: RefCell<HashMap<Arc<[String]>, IdentitySet>>,
}

impl Identities {
    /// The number of a set.
    pub fn number(&self, identities: &[String]) -> IdentitySet {
        if let Some(number) = self.numbers.borrow().get(identities) {
            return *number;
        }
        let set: Arc<[String]> = identities.into();
        let mut sets = self.sets.borrow_mut();
        let number = IdentitySet(u32::try_from(sets.len()).unwrap_or(u32::MAX));
        sets.push(Arc::clone(&set));
        self.numbers.borrow_mut().insert(set, number);
        number
    }

    /// The identities of a set.
    pub fn get(&self, number: IdentitySet) -> Option<Arc<[String]>> {
        self.sets.borrow().get(number.0 as usize).map(Arc::clone)
    }
}

/// A worker's TLS clients: one configuration for each set of identities and protocol, made at first use and again when there is a new
/// certificate or trust bundle.
#[derive(Default)]
pub struct Clients {
    identities: Rc<Identities>,
    generation: std::cell::Cell<u64>,
    connectors: RefCell<HashMap<(IdentitySet, Alpn), TlsConnector>>,
    stores: RefCell<HashMap<IdentitySet, Arc<sessions::Sessions>>>,
}

impl std::fmt::Debug for Clients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Clients").field("identities", &self.identities).finish_non_exhaustive()
    }
}

impl Clients {
    /// Clients for sets of this registry.
    pub fn new(identities: Rc<Identities>) -> Self {
        Self { identities, ..Self::default() }
    }

    /// The registry.
    pub fn identities(&self) -> &Identities {
        &self.identities
    }

    fn connector(&self, secrets: &Secrets, expected: IdentitySet, alpn: Alpn) -> Result<TlsConnector, HandshakeError> {
        if self.generation.replace(secrets.generation) != secrets.generation {
            self.connectors.borrow_mut().clear();
            self.stores.borrow_mut().clear();
        }
        if let Some(connector) = self.connectors.borrow().get(&(expected, alpn)) {
            return Ok(connector.clone());
        }
        let identities = self.identities.get(expected).unwrap_or_else(|| Arc::from(Vec::new()));
        let mut stores = self.stores.borrow_mut();
        let store = stores.entry(expected).or_default();
        let sessions = rustls::client::Resumption::store(Arc::clone(store) as Arc<dyn rustls::client::ClientSessionStore>);
        let config = secrets.client(identities, alpn, sessions).map_err(|e| HandshakeError::Broken(io::Error::other(e)))?;
        let connector = TlsConnector::from(Arc::new(config));
        self.connectors.borrow_mut().insert((expected, alpn), connector.clone());
        Ok(connector)
    }

    /// Makes `stream`, a connection to `address`, a secure one with one of the expected identities at its other end.
    pub async fn secure(
        &self,
        secrets: &Secrets,
        expected: IdentitySet,
        alpn: Alpn,
        address: IpAddr,
        stream: TcpStream,
    ) -> Result<(Stream, bool), HandshakeError> {
        let connector = self.connector(secrets, expected, alpn)?;
        // Sessions are kept by this name, and a ticket is good only for the proxy that gave it. Addresses are not sent.
        let name = ServerName::IpAddress(address.into());
        let stream =
            connector.connect(name, Prefixed::new(bytes::Bytes::new(), Bulk::from(stream))).await.map_err(HandshakeError::of)?;
        let (_, session) = stream.get_ref();
        if session.alpn_protocol() != Some(alpn.name()) {
            return Err(HandshakeError::Peer("the server agreed on none of the mesh's protocols".into()));
        }
        proved(session.peer_certificates(), secrets)?;
        let resumed = session.handshake_kind() == Some(rustls::HandshakeKind::Resumed);
        Ok((Stream::Secure(Box::new(stream.into())), resumed))
    }
}
