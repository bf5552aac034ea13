//! Hands rustls the certificate in force.

use super::issue::{CertError, Pair};
use arc_swap::ArcSwapOption;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::sync::Arc;

/// The certificate in force; none before the first was loaded, and handshakes fail until then.
#[derive(Debug, Default)]
pub struct Resolver {
    current: ArcSwapOption<CertifiedKey>,
}

impl Resolver {
    /// Puts a pair in force, for handshakes that begin from now on.
    ///
    /// # Errors
    /// The pair can't be used; the one in force stays.
    pub fn set(&self, pair: &Pair) -> Result<(), CertError> {
        let unusable = |e: &dyn std::fmt::Display| CertError::Unusable(format!("cannot use the certificate: {e}"));
        let chain: Vec<_> =
            CertificateDer::pem_slice_iter(pair.certificate.as_bytes()).collect::<Result<_, _>>().map_err(|e| unusable(&e))?;
        let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).map_err(|e| unusable(&e))?;
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let key = CertifiedKey::from_der(chain, key, &provider).map_err(|e| unusable(&e))?;
        self.current.store(Some(Arc::new(key)));
        Ok(())
    }

    /// Whether a certificate is in force.
    pub fn is_set(&self) -> bool {
        self.current.load().is_some()
    }
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.current.load_full()
    }
}

/// TLS settings of a server that presents what the resolver holds. `alpn` in order of preference.
pub fn server_config(resolver: Arc<Resolver>, alpn: &[&[u8]]) -> rustls::ServerConfig {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ServerConfig::builder_with_provider(provider);
    // The provider offers both versions, so that this cannot fail; were it to, the default is as good.
    let versions = builder.with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12]);
    let mut config = match versions {
        Ok(builder) => builder.with_no_client_auth().with_cert_resolver(resolver),
        Err(_) => rustls::ServerConfig::builder().with_no_client_auth().with_cert_resolver(resolver),
    };
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    config
}

/// TLS settings of a client that trusts the certificates of a PEM text, and nothing else.
///
/// # Errors
/// There is no certificate in it.
pub fn client_config(roots: &str) -> Result<rustls::ClientConfig, CertError> {
    let unusable = |e: &dyn std::fmt::Display| CertError::Unusable(format!("cannot use the roots: {e}"));
    let mut store = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(roots.as_bytes()) {
        store.add(certificate.map_err(|e| unusable(&e))?).map_err(|e| unusable(&e))?;
    }
    if store.is_empty() {
        return Err(unusable(&"no certificate in it"));
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config =
        rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().map_err(|e| unusable(&e))?;
    Ok(config.with_root_certificates(store).with_no_client_auth())
}
