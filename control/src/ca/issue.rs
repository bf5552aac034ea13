//! Makes and reads certificates.
//!
//! ECDSA P-256 throughout. Validity begins an hour before the present, so that a machine whose clock lags behind accepts a
//! new certificate. Serial numbers are random.

use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyPair, KeyUsagePurpose};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How long before the present validity begins: what clocks may differ by.
pub const BACKDATE: Duration = Duration::from_secs(3600);
/// Life of the root: ten years. Another one takes its place in the last fifth; see [`state`](super::state).
pub const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Life of a serving certificate unless the operator chose another.
pub const SERVING_LIFE: Duration = Duration::from_secs(90 * 24 * 3600);

/// A certificate and its key, PEM, as a `kubernetes.io/tls` Secret holds them.
#[derive(Clone, PartialEq, Eq)]
pub struct Pair {
    /// The certificate (chain).
    pub certificate: String,
    /// The private key, PKCS#8.
    pub key: String,
}

impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pair").field("certificate", &self.certificate).field("key", &"(not shown)").finish()
    }
}

/// A certificate or key that can't be made or used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CertError {
    /// The library refused.
    #[error("cannot make the certificate: {0}")]
    Make(String),
    /// What was stored can't be used.
    #[error("{0}")]
    Unusable(String),
}

impl From<rcgen::Error> for CertError {
    fn from(error: rcgen::Error) -> Self {
        Self::Make(error.to_string())
    }
}

fn unusable(reason: impl std::fmt::Display) -> CertError {
    CertError::Unusable(reason.to_string())
}

/// Gives a certificate that is made `now` its validity, and returns its end. A certificate carries whole seconds.
pub(crate) fn set_validity(params: &mut CertificateParams, now: SystemTime, backdate: Duration, life: Duration) -> SystemTime {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let begin = Duration::from_secs(since.as_secs()).saturating_sub(backdate);
    let end = Duration::from_secs((since + life).as_secs());
    params.not_before = epoch + begin;
    params.not_after = epoch + end;
    UNIX_EPOCH + end
}

/// A time of a certificate that was read.
pub(crate) fn system_time(time: x509_parser::time::ASN1Time) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or(0))
}

/// Bytes as lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Lower-case or upper-case hex as bytes; `None`: it is none.
pub fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok()).collect()
}

/// A certificate as PEM.
pub fn pem(certificate: &rustls_pki_types::CertificateDer<'_>) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(certificate);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.push_str(std::str::from_utf8(line).unwrap_or_default());
        pem.push('\n');
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

/// SHA-256 of a certificate.
pub fn fingerprint(certificate: &[u8]) -> [u8; 32] {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, certificate);
    digest.as_ref().try_into().unwrap_or_default()
}

pub(crate) fn serial() -> rcgen::SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    // Positive, and of full length.
    bytes[0] = (bytes[0] & 0x7f) | 0x40;
    rcgen::SerialNumber::from_slice(&bytes)
}

/// A new self-signed root.
///
/// # Errors
/// The library can't make it.
pub fn root(now: SystemTime) -> Result<Pair, CertError> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    set_validity(&mut params, now, BACKDATE, ROOT_LIFE);
    params.serial_number = Some(serial());
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "Weft");
    // A root that was made anew must not bear the name of the one before: verifiers find issuers by name.
    params.distinguished_name.push(DnType::CommonName, format!("Weft root {:08x}", rand::random::<u32>()));
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    let certificate = params.self_signed(&key)?;
    Ok(Pair { certificate: certificate.pem(), key: key.serialize_pem() })
}

/// The names that the control plane answers to in a cluster.
pub fn serving_names(service: &str, namespace: &str, cluster_domain: &str) -> Vec<String> {
    vec![
        format!("{service}.{namespace}.svc"),
        format!("{service}.{namespace}.svc.{cluster_domain}"),
        format!("{service}.{namespace}"),
        "localhost".into(),
    ]
}

/// What a stored certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Its subject.
    pub subject: String,
    /// Valid from.
    pub not_before: SystemTime,
    /// Valid until.
    pub not_after: SystemTime,
    /// DNS names and IP addresses.
    pub names: Vec<String>,
    /// It may sign others.
    pub is_ca: bool,
}

impl Facts {
    /// When it should be renewed: at two thirds of its life, the backdated hour not counted.
    pub fn renew_at(&self) -> SystemTime {
        let begin = self.not_before + BACKDATE;
        let life = self.not_after.duration_since(begin).unwrap_or_default();
        begin + life.mul_f64(2.0 / 3.0)
    }
}

pub(crate) fn der(certificate: &str) -> Result<rustls_pki_types::CertificateDer<'static>, CertError> {
    use rustls_pki_types::pem::PemObject;
    rustls_pki_types::CertificateDer::from_pem_slice(certificate.as_bytes())
        .map_err(|e| unusable(format!("no PEM certificate: {e}")))
}

/// Reads the first certificate of a PEM text.
///
/// # Errors
/// It is none.
pub fn facts(certificate: &str) -> Result<Facts, CertError> {
    let der = der(certificate)?;
    let (_, x509) = x509_parser::parse_x509_certificate(&der).map_err(|e| unusable(format!("no X.509 certificate: {e}")))?;
    let names = x509.subject_alternative_name().ok().flatten().map(|san| {
        let dns = san.value.general_names.iter().filter_map(|name| match name {
            x509_parser::extensions::GeneralName::DNSName(name) => Some((*name).to_owned()),
            x509_parser::extensions::GeneralName::IPAddress(bytes) => match bytes.len() {
                4 => <[u8; 4]>::try_from(*bytes).ok().map(|b| std::net::IpAddr::from(b).to_string()),
                _ => <[u8; 16]>::try_from(*bytes).ok().map(|b| std::net::IpAddr::from(b).to_string()),
            },
            _ => None,
        });
        dns.collect()
    });
    Ok(Facts {
        subject: x509.subject().to_string(),
        not_before: system_time(x509.validity().not_before),
        not_after: system_time(x509.validity().not_after),
        names: names.unwrap_or_default(),
        is_ca: x509.is_ca(),
    })
}

/// Checks that a pair is a self-signed root and its key, whatever its age: one that has expired is followed by another.
///
/// # Errors
/// Why it is none.
pub fn check_ca(root: &Pair) -> Result<Facts, CertError> {
    let facts = facts(&root.certificate)?;
    if !facts.is_ca {
        return Err(unusable("tls.crt is not the certificate of an authority (CA:TRUE is missing)"));
    }
    let key = KeyPair::from_pem(&root.key).map_err(|e| unusable(format!("tls.key is no private key: {e}")))?;
    if !belongs(&root.certificate, &key)? {
        return Err(unusable("tls.key is not the key of tls.crt"));
    }
    Ok(facts)
}

/// Checks that a serving pair leads to one of the roots (PEM), bears all the names, and is valid now.
///
/// # Errors
/// Why it should be replaced.
pub fn check_serving(bundle: &str, pair: &Pair, names: &[String], now: SystemTime) -> Result<Facts, CertError> {
    let found = facts(&pair.certificate)?;
    if found.not_after <= now {
        return Err(unusable("the serving certificate has expired"));
    }
    let chain = ders(&pair.certificate)?;
    if !leads_to(&chain, &ders(bundle)?, now) {
        return Err(unusable("the serving certificate was not signed below a root that is trusted"));
    }
    if let Some(name) = names.iter().find(|name| !found.names.contains(name)) {
        return Err(unusable(format!("the serving certificate lacks the name {name}")));
    }
    let key = KeyPair::from_pem(&pair.key).map_err(|e| unusable(format!("tls.key is no private key: {e}")))?;
    if !belongs(&pair.certificate, &key)? {
        return Err(unusable("tls.key is not the key of tls.crt"));
    }
    Ok(found)
}

/// All certificates of a PEM text.
pub(crate) fn ders(text: &str) -> Result<Vec<rustls_pki_types::CertificateDer<'static>>, CertError> {
    use rustls_pki_types::pem::PemObject;
    rustls_pki_types::CertificateDer::pem_slice_iter(text.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|e| unusable(format!("no PEM certificates: {e}")))
}

fn belongs(certificate: &str, key: &KeyPair) -> Result<bool, CertError> {
    let der = der(certificate)?;
    let (_, x509) = x509_parser::parse_x509_certificate(&der).map_err(unusable)?;
    Ok(x509.public_key().subject_public_key.data.as_ref() == key.public_key_raw())
}

/// Whether a chain (a leaf for servers, then those above it) ends at one of the roots.
pub(crate) fn leads_to(
    chain: &[rustls_pki_types::CertificateDer<'static>],
    roots: &[rustls_pki_types::CertificateDer<'static>],
    now: SystemTime,
) -> bool {
    let mut store = rustls::RootCertStore::empty();
    store.add_parsable_certificates(roots.iter().cloned());
    let Some((leaf, above)) = chain.split_first() else { return false };
    let Ok(parsed) = rustls::server::ParsedCertificate::try_from(leaf) else { return false };
    let algorithms = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.all;
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let result = rustls::client::verify_server_cert_signed_by_trust_anchor(
        &parsed,
        &store,
        above,
        rustls_pki_types::UnixTime::since_unix_epoch(since),
        algorithms,
    );
    result.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::signer::Signer;

    fn names() -> Vec<String> {
        serving_names("weft-control", "weft-system", "cluster.local")
    }

    #[test]
    fn a_root_and_what_it_signs() {
        let now = SystemTime::now();
        let root = root(now).unwrap();
        let root_facts = check_ca(&root).unwrap();
        assert!(root_facts.is_ca && root_facts.not_before < now - BACKDATE / 2);
        let pair = Signer::of_root(&root).unwrap().serving(&names(), now, Duration::from_secs(3000)).unwrap();
        let facts = check_serving(&root.certificate, &pair, &names(), now).unwrap();
        assert_eq!(facts.names, names());
        assert!(!facts.is_ca);
        let renew = facts.renew_at().duration_since(now).unwrap().as_secs();
        assert!((1998..=2000).contains(&renew), "{renew}");
    }

    #[test]
    fn what_is_wrong_with_a_serving_certificate() {
        let now = SystemTime::now();
        let (ours, other) = (root(now).unwrap(), root(now).unwrap());
        let life = Duration::from_secs(100);
        let signer = Signer::of_root(&ours).unwrap();
        let pair = signer.serving(&names(), now, life).unwrap();
        let reason = |root: &Pair, pair: &Pair, names: &[String], now| {
            check_serving(&root.certificate, pair, names, now).unwrap_err().to_string()
        };
        assert!(reason(&other, &pair, &names(), now).contains("not signed below a root that is trusted"));
        assert!(reason(&ours, &pair, &names(), now + life * 2).contains("expired"));
        assert!(reason(&ours, &pair, &["x.y".to_owned()], now).contains("x.y"));
        let mixed = Pair { key: signer.serving(&names(), now, life).unwrap().key, ..pair.clone() };
        assert!(reason(&ours, &mixed, &names(), now).contains("not the key"));
        let broken = Pair { certificate: "-----BEGIN".into(), key: String::new() };
        assert!(reason(&ours, &broken, &names(), now).contains("PEM"));
        assert!(check_ca(&pair).unwrap_err().to_string().contains("CA:TRUE"));
        let chain = ders(&pair.certificate).unwrap();
        assert!(leads_to(&chain, &ders(&ours.certificate).unwrap(), now));
        assert!(!leads_to(&chain, &ders(&other.certificate).unwrap(), now));
    }

    #[test]
    fn hex_and_pem_there_and_back() {
        assert_eq!(hex(&[0, 0x1f, 0xff]), "001fff");
        assert_eq!(unhex("001FFf"), Some(vec![0, 0x1f, 0xff]));
        assert_eq!((unhex("0"), unhex("zz"), unhex("é")), (None, None, None));
        let root = root(SystemTime::now()).unwrap();
        let certificate = der(&root.certificate).unwrap();
        assert_eq!(der(&pem(&certificate)).unwrap(), certificate);
    }

    #[test]
    fn keys_are_not_printed() {
        let root = root(SystemTime::now()).unwrap();
        assert!(!format!("{root:?}").contains("PRIVATE KEY"));
    }
}
