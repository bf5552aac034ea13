//! Signs workload certificates.
//!
//! What is signed is built from our own parameters alone. Of a certificate signing request the public key is taken, after its
//! self-signature has proved that the caller holds the private one, and nothing else: a request that asks for another's name, for CA:TRUE or
//! for a longer life gets what everybody gets.
//!
//! A leaf is ECDSA or RSA as its key is, has an empty subject, exactly one name (the SPIFFE id, critical because the subject is
//! empty, as X.509-SVID section 4.1 wants), serves for both ends of TLS, and never outlives what it was signed by.

use super::issue::{self, CertError, Pair};
use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
    SanType, SigningKey, SubjectPublicKeyInfo,
};
use rustls_pki_types::CertificateDer;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use weft_api::names;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey as Parsed;

/// How long before the present a leaf's validity begins: what the clocks of two pods may differ by.
pub const BACKDATE: Duration = Duration::from_secs(names::LEAF_BACKDATE_SECONDS);
/// Largest request that is looked at; one with an RSA key of 8192 bits has less than 3 KiB.
const REQUEST: usize = 16 * 1024;
/// RSA keys: from, to (bits). What is longer only costs.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

/// Milliseconds of grace are no life: below this an issuer counts as expired.
const LEAST_LIFE: Duration = Duration::from_secs(1);

/// A public key whose private half the caller was proved to hold.
#[derive(Clone, Debug)]
pub struct ProvedKey(SubjectPublicKeyInfo);

/// Why a request gets no certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// It is no PKCS #10.
    #[error("the request is no PKCS #10 certificate signing request in DER: {0}")]
    Malformed(String),
    /// Its key is of a kind that we don't sign.
    #[error("its key is {0}; use ECDSA P-256 (what weft-proxy makes), ECDSA P-384, or RSA of 2048 to 8192 bits")]
    Key(String),
    /// Its signature does not fit its key.
    #[error("its signature was not made by the key that it holds, so that nothing proves possession of that key")]
    Signature,
}

impl RequestError {
    /// Code for metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "bad-request",
            Self::Key(_) => "bad-key",
            Self::Signature => "bad-signature",
        }
    }
}

impl ProvedKey {
    /// The public half of a key that we hold ourselves.
    ///
    /// # Errors
    /// The library can't read what it wrote.
    pub fn of(key: &KeyPair) -> Result<Self, String> {
        SubjectPublicKeyInfo::from_der(&key.subject_public_key_info()).map(Self).map_err(|e| e.to_string())
    }
}

/// Takes the key out of a request (PKCS #10, DER), and checks that the request was signed by it.
///
/// # Errors
/// It can't be read, its key is weak or of a foreign kind, or its signature is wrong.
pub fn proved_key(request: &[u8]) -> Result<ProvedKey, RequestError> {
    let malformed = |reason: &str| RequestError::Malformed(reason.to_owned());
    if request.is_empty() || request.len() > REQUEST {
        return Err(malformed(&format!("it has {} bytes (1 to {REQUEST} are read)", request.len())));
    }
    let (rest, parsed) = X509CertificationRequest::from_der(request).map_err(|e| malformed(&e.to_string()))?;
    if !rest.is_empty() {
        return Err(malformed("bytes follow after it"));
    }
    let info = &parsed.certification_request_info.subject_pki;
    match info.parsed() {
        Ok(Parsed::RSA(key)) if !RSA_BITS.contains(&key.key_size()) => {
            return Err(RequestError::Key(format!("RSA of {} bits", key.key_size())));
        }
        Ok(Parsed::RSA(_) | Parsed::EC(_)) => {}
        Ok(_) | Err(_) => return Err(RequestError::Key(format!("of algorithm {}", info.algorithm.algorithm))),
    }
    let key = SubjectPublicKeyInfo::from_der(info.raw)
        .map_err(|_| RequestError::Key(format!("of a kind of {} that is not known", info.algorithm.algorithm)))?;
    let known = [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_RSA_SHA256];
    if !known.contains(&key.algorithm()) {
        return Err(RequestError::Key("on another curve, or restricted to a scheme".into()));
    }
    parsed.verify_signature().map_err(|_| RequestError::Signature)?;
    Ok(ProvedKey(key))
}

/// The SPIFFE id of a service account.
///
/// # Errors
/// A part is empty or has characters that a name of Kubernetes (or a trust domain) can't have, and that could
/// make one id look like another.
pub fn identity(trust_domain: &str, namespace: &str, service_account: &str) -> Result<String, String> {
    for (what, text) in [("trust domain", trust_domain), ("namespace", namespace), ("service account", service_account)] {
        let known = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.' | b'_');
        if text.is_empty() || text.len() > 253 || !text.bytes().all(known) {
            return Err(format!(
                "the {what} {text:?} can't be part of an identity: lower-case letters, digits, '-', '.' and '_' can, at most 253"
            ));
        }
    }
    Ok(names::spiffe_id(trust_domain, namespace, service_account))
}

/// A leaf that was signed.
#[derive(Clone, Debug)]
pub struct Leaf {
    /// DER: the leaf, then intermediates up to (without) the root.
    pub chain: Vec<CertificateDer<'static>>,
    /// Valid until.
    pub not_after: SystemTime,
}

/// Why no leaf could be signed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignError {
    /// The issuer's own certificate, or one above it, has run out.
    #[error(
        "the issuing certificate {name:?} (or one above it) has expired; give the control plane a new one (docs/identity.md)"
    )]
    Expired {
        /// Its subject.
        name: String,
    },
    /// The library refused.
    #[error("{0}")]
    Failed(String),
}

/// A key that several signers share.
#[derive(Clone)]
struct Key(Arc<KeyPair>);

impl PublicKeyData for Key {
    fn der_bytes(&self) -> &[u8] {
        self.0.der_bytes()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        PublicKeyData::algorithm(&*self.0)
    }
}

impl SigningKey for Key {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        SigningKey::sign(&*self.0, message)
    }
}

/// What signs: a certificate authority with its key and the certificates between it and the root.
pub struct Signer {
    issuer: Issuer<'static, Key>,
    certificate: CertificateDer<'static>,
    /// The issuing certificate, unless it is the root, and those above it up to the root.
    sent: Vec<CertificateDer<'static>>,
    name: String,
    not_after: SystemTime,
}

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signer").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Signer {
    /// A signer of a root (PEM) and its key.
    ///
    /// # Errors
    /// The certificate or the key can't be used, or don't fit each other.
    pub fn of_root(root: &Pair) -> Result<Self, CertError> {
        let certificate = issue::der(&root.certificate)?;
        let key = KeyPair::from_pem(&root.key).map_err(|e| CertError::Unusable(format!("tls.key is no private key: {e}")))?;
        let (_, parsed) = x509_parser::parse_x509_certificate(&certificate).map_err(|e| CertError::Unusable(e.to_string()))?;
        if parsed.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
            return Err(CertError::Unusable("tls.key is not the key of tls.crt".into()));
        }
        Self::from_parts(&certificate, &[], &certificate, &Arc::new(key))
    }

    /// A signer of an issuing certificate, those between it and the root (from below), the root, and the key.
    ///
    /// # Errors
    /// A certificate can't be read.
    pub fn from_parts(
        issuing: &CertificateDer<'static>,
        between: &[CertificateDer<'static>],
        root: &CertificateDer<'static>,
        key: &Arc<KeyPair>,
    ) -> Result<Self, CertError> {
        let parse =
            |der| x509_parser::parse_x509_certificate(der).map(|(_, c)| c).map_err(|e| CertError::Unusable(e.to_string()));
        let mut not_after = issue::system_time(parse(root)?.validity().not_after);
        let mut sent = Vec::new();
        for certificate in std::iter::once(issuing).chain(between) {
            not_after = not_after.min(issue::system_time(parse(certificate)?.validity().not_after));
            // The root is what the other side has; sending it would only cost bytes.
            if certificate != root {
                sent.push(certificate.clone());
            }
        }
        let name = parse(issuing)?.subject().to_string();
        let issuer = Issuer::from_ca_cert_der(issuing, Key(key.clone()))?;
        Ok(Self { issuer, certificate: issuing.clone(), sent, name, not_after })
    }

    /// The issuing certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The key id by which leaves name it, hex; `None`: it has none.
    pub fn key_id(&self) -> Option<String> {
        let (_, parsed) = x509_parser::parse_x509_certificate(&self.certificate).ok()?;
        parsed.extensions().iter().find_map(|extension| match extension.parsed_extension() {
            x509_parser::extensions::ParsedExtension::SubjectKeyIdentifier(id) => Some(issue::hex(id.0)),
            _ => None,
        })
    }

    /// SHA-256 of the issuing certificate.
    pub fn fingerprint(&self) -> [u8; 32] {
        issue::fingerprint(&self.certificate)
    }

    /// Subject of the issuing certificate.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// When the first of the certificates on the way to the root runs out.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    fn left(&self, now: SystemTime) -> Result<Duration, SignError> {
        let left = self.not_after.duration_since(now).unwrap_or_default();
        if left < LEAST_LIFE { Err(SignError::Expired { name: self.name.clone() }) } else { Ok(left) }
    }

    /// A new serving certificate for DNS names (or IP addresses as text), with its chain and key. Its life is cut where the issuer's ends.
    ///
    /// # Errors
    /// The issuer has expired, or a name is none.
    pub fn serving(&self, names: &[String], now: SystemTime, life: Duration) -> Result<Pair, SignError> {
        let failed = |e: rcgen::Error| SignError::Failed(format!("cannot make a serving certificate: {e}"));
        let left = self.left(now)?;
        let key = KeyPair::generate().map_err(failed)?;
        let mut params = CertificateParams::new(names.to_vec()).map_err(failed)?;
        issue::set_validity(&mut params, now, issue::BACKDATE, life.min(left));
        params.serial_number = Some(issue::serial());
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, "weft-control");
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let mut certificate = params.signed_by(&key, &self.issuer).map_err(failed)?.pem();
        certificate.extend(self.sent.iter().map(issue::pem));
        Ok(Pair { certificate, key: key.serialize_pem() })
    }

    /// Signs a leaf for an identity. Its life is cut where the issuer's ends.
    ///
    /// # Errors
    /// The issuer has expired, or the library refuses.
    pub fn sign(&self, key: &ProvedKey, identity: &str, now: SystemTime, life: Duration) -> Result<Leaf, SignError> {
        let failed = |e: rcgen::Error| SignError::Failed(format!("cannot sign for {identity}: {e}"));
        let left = self.left(now)?;
        let mut params = CertificateParams::default();
        let not_after = issue::set_validity(&mut params, now, BACKDATE, life.min(left));
        params.serial_number = Some(issue::serial());
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.try_into().map_err(failed)?)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        if key.0.algorithm() == &rcgen::PKCS_RSA_SHA256 {
            // X.509-SVID allows it, and old peers look for it with RSA keys.
            params.key_usages.push(KeyUsagePurpose::KeyEncipherment);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key.0, &self.issuer).map_err(failed)?;
        let mut chain = vec![certificate.der().clone()];
        chain.extend(self.sent.iter().cloned());
        Ok(Leaf { chain, not_after })
    }
}

#[cfg(test)]
mod tests;
