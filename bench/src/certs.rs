//! A certificate authority for a measurement: identities as a mesh gives them, in files that any peer can read.
//!
//! Keys and certificates live in the folder of one run and vouch for nothing outside it, so their validity is as wide as
//! the clocks of test machines are wrong.

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, date_time_ymd,
};
use std::path::{Path, PathBuf};

/// The trust domain of all identities here.
pub(crate) const TRUST_DOMAIN: &str = "cluster.local";

/// A root with its key.
#[derive(Debug)]
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    root: String,
}

/// A certificate with its key, both PEM.
#[derive(Clone, Debug)]
pub(crate) struct Leaf {
    pub(crate) chain: String,
    pub(crate) key: String,
}

/// Where a peer finds its own certificate and what it trusts.
#[derive(Clone, Debug)]
pub(crate) struct Files {
    pub(crate) chain: PathBuf,
    pub(crate) key: PathBuf,
    /// Certificate and key in one file, as HAProxy wants them.
    pub(crate) both: PathBuf,
    pub(crate) root: PathBuf,
}

impl Authority {
    /// A new root of its own.
    pub(crate) fn new() -> Result<Self> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = named("weft-bench");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2099, 1, 1));
        let root = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), root })
    }

    /// A P-256 leaf for `id` (a SPIFFE id), for both ends of a connection, without a subject.
    pub(crate) fn leaf(&self, id: &str) -> Result<Leaf> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.try_into().with_context(|| format!("{id} is no URI"))?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2099, 1, 1));
        let chain = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Leaf { chain, key: key.serialize_pem() })
    }

    /// Writes a leaf for `id` into `dir`, under `name`.
    pub(crate) fn write(&self, dir: &Path, name: &str, id: &str) -> Result<Files> {
        let leaf = self.leaf(id)?;
        let file = |suffix: &str| dir.join(format!("{name}{suffix}"));
        let files = Files { chain: file(".crt"), key: file(".key"), both: file(".pem"), root: dir.join("root.crt") };
        for (path, text) in [
            (&files.chain, leaf.chain.clone()),
            (&files.key, leaf.key.clone()),
            (&files.both, leaf.chain + &leaf.key),
            (&files.root, self.root.clone()),
        ] {
            std::fs::write(path, text).with_context(|| format!("can't write {}", path.display()))?;
        }
        Ok(files)
    }
}

fn named(name: &str) -> DistinguishedName {
    let mut names = DistinguishedName::new();
    names.push(DnType::CommonName, name);
    names
}

/// The identity of a service account of namespace `bench`.
pub(crate) fn identity(account: &str) -> String {
    format!("spiffe://{TRUST_DOMAIN}/ns/bench/sa/{account}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    use rustls::server::WebPkiClientVerifier;
    use std::sync::Arc;

    #[test]
    fn a_leaf_is_good_for_both_ends() {
        let authority = Authority::new().unwrap();
        let leaf = authority.leaf(&identity("client")).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(authority.root.as_bytes()).unwrap()).unwrap();
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build().unwrap();
        let cert = CertificateDer::from_pem_slice(leaf.chain.as_bytes()).unwrap();
        verifier.verify_client_cert(&cert, &[], rustls::pki_types::UnixTime::now()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(leaf.key.as_bytes()).unwrap();
        let builder = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        builder.with_client_cert_verifier(verifier).with_single_cert(vec![cert], key).unwrap();
    }

    #[test]
    fn files_hold_what_their_names_say() {
        let dir = tempfile::tempdir().unwrap();
        let files = Authority::new().unwrap().write(dir.path(), "client", &identity("client")).unwrap();
        let read = |path: &Path| std::fs::read_to_string(path).unwrap();
        assert_eq!(read(&files.both), read(&files.chain) + &read(&files.key));
        assert!(read(&files.root).contains("BEGIN CERTIFICATE") && read(&files.key).contains("PRIVATE KEY"));
    }
}
