//! Certificates for the clients and for Envoy.

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, SanType, date_time_ymd,
};
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::sync::Arc;

/// A root that signs workload certificates.
#[derive(Debug)]
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Its certificate, PEM.
    pub(crate) root: String,
}

/// A certificate with its key.
#[derive(Debug)]
pub(crate) struct Leaf {
    /// DER.
    pub(crate) chain: Vec<CertificateDer<'static>>,
    /// DER.
    pub(crate) key: PrivateKeyDer<'static>,
    /// Both as PEM.
    pub(crate) pem: (String, String),
}

impl Authority {
    /// A root of this program.
    pub(crate) fn new() -> Result<Self> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2099, 1, 1));
        let root = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), root })
    }

    /// The root of somebody else (`weft-control`), by certificate and key.
    pub(crate) fn load(root: &str, key: &str) -> Result<Self> {
        let issuer = Issuer::from_ca_cert_pem(root, KeyPair::from_pem(key)?).context("the root is no CA certificate")?;
        Ok(Self { issuer, root: root.to_owned() })
    }

    /// A leaf for the SPIFFE id `id`.
    pub(crate) fn leaf(&self, id: &str) -> Result<Leaf> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2099, 1, 1));
        let cert = params.signed_by(&key, &self.issuer)?;
        let pem = (cert.pem(), key.serialize_pem());
        Ok(Leaf { chain: vec![cert.der().clone()], key: PrivateKeyDer::from_pem_slice(pem.1.as_bytes())?, pem })
    }

    /// Checks signatures of handshakes; chains are no business of this program's clients.
    pub(crate) fn verifier(&self, provider: Arc<CryptoProvider>) -> Result<Arc<WebPkiServerVerifier>> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.root.as_bytes())?)?;
        Ok(WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build()?)
    }
}
