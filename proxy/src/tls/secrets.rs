//! A certificate with its key and the trust bundle, made into what the TLS library wants.

use super::spiffe::Leaf;
use super::{Alpn, verify};
use anyhow::Context as _;
use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::SystemTime;
use weft_api::wire::TrustBundle;

/// Generations of [`Secrets`], so that what was made from one is not used with another.
static GENERATION: AtomicU64 = AtomicU64::new(1);

/// What we speak: TLS 1.3, AES-GCM (128 bits first: it costs less and nobody can tell), the post-quantum hybrid first.
static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    use aws_lc_rs::{cipher_suite as suite, kx_group as group};
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            suite::TLS13_AES_128_GCM_SHA256,
            suite::TLS13_AES_256_GCM_SHA384,
            suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        kx_groups: vec![group::X25519MLKEM768, group::X25519, group::SECP256R1, group::SECP384R1],
        ..aws_lc_rs::default_provider()
    })
});

/// See the module.
#[derive(Debug)]
pub struct Secrets {
    /// How we serve.
    pub server: Arc<ServerConfig>,
    /// Our own identity and its times.
    pub leaf: Leaf,
    /// Serial number of our certificate, hexadecimal.
    pub serial: String,
    /// Who issued it: the issuer's name or, without one, the identifier of its key.
    pub issuer: String,
    /// Of these very secrets.
    pub(super) generation: u64,
    signer: Vec<u8>,
    renew_before: u64,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
    trust_domains: Arc<[String]>,
}

impl Secrets {
    /// Checks what the control plane has issued and makes it ready for use.
    ///
    /// # Errors
    /// The chain or the bundle can't be used; the text says which and why.
    pub fn new(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>, trust: &TrustBundle) -> anyhow::Result<Self> {
        Self::build(chain, key, trust, trust.issuer.clone(), trust.renew_before)
    }

    fn build(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        trust: &TrustBundle,
        signer: Vec<u8>,
        renew_before: u64,
    ) -> anyhow::Result<Self> {
        let first = chain.first().context("the control plane issued no certificate")?;
        let leaf = Leaf::of(first).context("the certificate that the control plane issued")?;
        let (serial, issuer) = origin(first)?;
        let mut roots = RootCertStore::empty();
        for (n, root) in trust.roots.iter().enumerate() {
            roots.add(CertificateDer::from(root.clone())).with_context(|| format!("root {n} of the trust bundle"))?;
        }
        anyhow::ensure!(!roots.is_empty(), "the trust bundle is empty");
        let roots = Arc::new(roots);
        let mut domains = vec![trust.trust_domain.clone()];
        domains.extend(trust.trust_domain_aliases.iter().cloned());
        let trust_domains: Arc<[String]> = domains.into();
        leaf.check(SystemTime::now(), &trust_domains).context("the certificate that the control plane issued")?;

        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&PROVIDER))
            .build()
            .context("the trust bundle")?;
        let verifier = verify::Client { chain: verifier, trust_domains: Arc::clone(&trust_domains) };
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&PROVIDER))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_single_cert(chain.clone(), key.clone_key())
            .context("the certificate and its key don't fit together")?;
        server.alpn_protocols = Alpn::ALL.iter().map(|alpn| alpn.name().to_vec()).collect();
        server.ticketer = aws_lc_rs::Ticketer::new()?;
        server.max_early_data_size = 0;
        let generation = GENERATION.fetch_add(1, Ordering::Relaxed);
        let server = Arc::new(server);
        Ok(Self { server, leaf, serial, issuer, generation, signer, renew_before, chain, key, roots, trust_domains })
    }

    /// The same certificate with another trust bundle.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_trust(&self, trust: &TrustBundle) -> anyhow::Result<Self> {
        Self::build(self.chain.clone(), self.key.clone_key(), trust, self.signer.clone(), self.renew_before)
    }

    /// Whether both believe the same authorities about the same trust domains.
    pub fn same_trust(&self, other: &Self) -> bool {
        self.trust_domains == other.trust_domains && self.roots.roots == other.roots.roots
    }

    /// Our trust domain and its aliases.
    pub fn trust_domains(&self) -> &[String] {
        &self.trust_domains
    }

    /// Whether the control plane now wants another certificate than this one: it signs with another key, or wants all that it issued
    /// before to be replaced. Decided by comparing what it says now with what it said then, so that no clock matters.
    pub fn outdated_by(&self, trust: &TrustBundle) -> bool {
        trust.issuer != self.signer || trust.renew_before > self.renew_before
    }

    /// How we ask a server that has one of these identities.
    pub(super) fn client(
        &self,
        identities: Arc<[String]>,
        alpn: Alpn,
        sessions: Resumption,
    ) -> Result<ClientConfig, rustls::Error> {
        let verifier = verify::Server {
            identities,
            roots: Arc::clone(&self.roots),
            trust_domains: Arc::clone(&self.trust_domains),
            algorithms: PROVIDER.signature_verification_algorithms,
        };
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&PROVIDER))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())?;
        client.alpn_protocols = vec![alpn.name().to_vec()];
        client.enable_sni = false;
        client.resumption = sessions;
        Ok(client)
    }
}

/// Serial number and issuer, for people.
fn origin(der: &CertificateDer<'_>) -> anyhow::Result<(String, String)> {
    use std::fmt::Write as _;
    use x509_parser::extensions::ParsedExtension;
    use x509_parser::prelude::{FromDer, X509Certificate};
    let (_, certificate) = X509Certificate::from_der(der).context("the certificate that the control plane issued")?;
    let hex = |bytes: &[u8]| {
        bytes.iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    };
    let key = certificate.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::AuthorityKeyIdentifier(id) => id.key_identifier.as_ref().map(|key| hex(key.0)),
        _ => None,
    });
    let name = certificate.issuer().to_string();
    let issuer = match key {
        Some(key) if name.is_empty() => key,
        Some(key) => format!("{name} ({key})"),
        None => name,
    };
    Ok((hex(certificate.raw_serial()), issuer))
}
