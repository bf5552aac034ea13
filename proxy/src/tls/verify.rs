//! Who is taken for whom. Chains are verified by webpki (signatures, validity, usage); what makes a certificate a mesh identity is
//! checked on top, because a URI can't be expressed in what TLS libraries match by themselves.

use super::spiffe::{Leaf, SpiffeError, split};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

fn invalid(error: SpiffeError) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
}

/// What is wrong with a certificate, for people.
pub fn describe(error: &CertificateError) -> String {
    match error {
        CertificateError::Other(other) => other.0.to_string(),
        CertificateError::UnknownIssuer => {
            "the certificate was issued by an authority that the trust bundle does not hold".into()
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "the certificate has expired".into(),
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "the certificate is not valid yet: are the clocks of the nodes right?".into()
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "the certificate is not meant for this use".into()
        }
        other => format!("the certificate is invalid: {other:?}"),
    }
}

fn time(now: UnixTime) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(now.as_secs())
}

/// Takes a server that proves one of the expected identities.
#[derive(Debug)]
pub struct Server {
    /// Who is expected.
    pub identities: Arc<[String]>,
    /// Whose signatures count.
    pub roots: Arc<RootCertStore>,
    /// Our trust domain and its aliases.
    pub trust_domains: Arc<[String]>,
    /// The signatures that are understood.
    pub algorithms: WebPkiSupportedAlgorithms,
}

impl Server {
    /// The trust domain and its aliases are one: while they change, a server may have its old name.
    fn expects(&self, got: &str) -> bool {
        let Some((_, path)) = split(got) else { return false };
        self.identities.iter().any(|expected| {
            expected == got
                || split(expected)
                    .is_some_and(|(domain, same)| same == path && self.trust_domains.iter().any(|ours| ours == domain))
        })
    }
}

impl ServerCertVerifier for Server {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = ParsedCertificate::try_from(leaf)?;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, self.algorithms.all)?;
        let leaf = Leaf::of(leaf).map_err(invalid)?;
        leaf.check(time(now), &self.trust_domains).map_err(invalid)?;
        if !self.expects(&leaf.id) {
            return Err(invalid(SpiffeError::Unexpected { expected: self.identities.to_vec(), got: leaf.id }));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Takes a client that proves any identity of our trust domains. What it may do is the policy's business.
#[derive(Debug)]
pub struct Client {
    /// Verifies the chain.
    pub chain: Arc<dyn ClientCertVerifier>,
    /// Our trust domain and its aliases.
    pub trust_domains: Arc<[String]>,
}

impl ClientCertVerifier for Client {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // A peer has one certificate: hints would only be bytes.
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(leaf, intermediates, now)?;
        let leaf = Leaf::of(leaf).map_err(invalid)?;
        leaf.check(time(now), &self.trust_domains).map_err(invalid)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, cert, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}
