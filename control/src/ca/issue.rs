//! Makes and reads certificates.
//!
//! ECDSA P-256 throughout. Validity begins an hour before the present, so that a machine whose clock lags behind accepts a
//! new certificate. Serial numbers are random.

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How long before the present validity begins: what clocks may differ by.
pub const BACKDATE: Duration = Duration::from_secs(3600);
/// Life of the root: ten years. Rotating it is a procedure of its own, not something that happens by itself.
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

/// A new serving certificate for DNS names (or IP addresses as text), signed by a root.
///
/// # Errors
/// The root can't be used, or a name is none.
pub fn serving(root: &Pair, names: &[String], now: SystemTime, life: Duration) -> Result<Pair, CertError> {
    let issuer = Issuer::from_ca_cert_pem(&root.certificate, KeyPair::from_pem(&root.key)?)?;
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(names.to_vec())?;
    set_validity(&mut params, now, BACKDATE, life);
    params.serial_number = Some(serial());
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "weft-control");
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let certificate = params.signed_by(&key, &issuer)?;
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

fn der(certificate: &str) -> Result<rustls_pki_types::CertificateDer<'static>, CertError> {
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
        not_before: system_time(x509.validity().not_before),
        not_after: system_time(x509.validity().not_after),
        names: names.unwrap_or_default(),
        is_ca: x509.is_ca(),
    })
}

/// Checks that a pair is a root that can sign now.
///
/// # Errors
/// Why it can't.
pub fn check_root(root: &Pair, now: SystemTime) -> Result<Facts, CertError> {
    let facts = facts(&root.certificate)?;
    if !facts.is_ca {
        return Err(unusable("tls.crt is not the certificate of an authority (CA:TRUE is missing)"));
    }
    if facts.not_after <= now {
        return Err(unusable("the root has expired"));
    }
    let key = KeyPair::from_pem(&root.key).map_err(|e| unusable(format!("tls.key is no private key: {e}")))?;
    if !belongs(&root.certificate, &key)? {
        return Err(unusable("tls.key is not the key of tls.crt"));
    }
    Ok(facts)
}

/// Checks that a serving pair was signed by the root, bears all the names, and is valid now.
///
/// # Errors
/// Why it should be replaced.
pub fn check_serving(root: &Pair, pair: &Pair, names: &[String], now: SystemTime) -> Result<Facts, CertError> {
    let found = facts(&pair.certificate)?;
    let (leaf, issuer) = (der(&pair.certificate)?, der(&root.certificate)?);
    let parse = |der| x509_parser::parse_x509_certificate(der).map(|(_, c)| c).map_err(unusable);
    let (leaf, issuer) = (parse(&leaf)?, parse(&issuer)?);
    if leaf.issuer().as_raw() != issuer.subject().as_raw() || !signed_by(&pair.certificate, &root.certificate, now) {
        return Err(unusable("the serving certificate was not signed by the present root"));
    }
    if found.not_after <= now {
        return Err(unusable("the serving certificate has expired"));
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

fn belongs(certificate: &str, key: &KeyPair) -> Result<bool, CertError> {
    let der = der(certificate)?;
    let (_, x509) = x509_parser::parse_x509_certificate(&der).map_err(unusable)?;
    Ok(x509.public_key().subject_public_key.data.as_ref() == key.public_key_raw())
}

fn signed_by(leaf: &str, root: &str, now: SystemTime) -> bool {
    let (Ok(leaf), Ok(root)) = (der(leaf), der(root)) else { return false };
    let mut roots = rustls::RootCertStore::empty();
    if roots.add(root).is_err() {
        return false;
    }
    let Ok(parsed) = rustls::server::ParsedCertificate::try_from(&leaf) else { return false };
    let algorithms = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.all;
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let result = rustls::client::verify_server_cert_signed_by_trust_anchor(
        &parsed,
        &roots,
        &[],
        rustls_pki_types::UnixTime::since_unix_epoch(since),
        algorithms,
    );
    // Age is the caller's question; here only the signature is.
    !matches!(result, Err(error) if !matches!(error, rustls::Error::InvalidCertificate(
        rustls::CertificateError::ExpiredContext { .. } | rustls::CertificateError::Expired
            | rustls::CertificateError::NotValidYetContext { .. } | rustls::CertificateError::NotValidYet)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Vec<String> {
        serving_names("weft-control", "weft-system", "cluster.local")
    }

    #[test]
    fn a_root_and_what_it_signs() {
        let now = SystemTime::now();
        let root = root(now).unwrap();
        let root_facts = check_root(&root, now).unwrap();
        assert!(root_facts.is_ca && root_facts.not_before < now - BACKDATE / 2);
        let pair = serving(&root, &names(), now, Duration::from_secs(3000)).unwrap();
        let facts = check_serving(&root, &pair, &names(), now).unwrap();
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
        let pair = serving(&ours, &names(), now, life).unwrap();
        let reason =
            |root: &Pair, pair: &Pair, names: &[String], now| check_serving(root, pair, names, now).unwrap_err().to_string();
        assert!(reason(&other, &pair, &names(), now).contains("not signed by the present root"));
        assert!(reason(&ours, &pair, &names(), now + life * 2).contains("expired"));
        assert!(reason(&ours, &pair, &["x.y".to_owned()], now).contains("x.y"));
        let mixed = Pair { key: serving(&ours, &names(), now, life).unwrap().key, ..pair.clone() };
        assert!(reason(&ours, &mixed, &names(), now).contains("not the key"));
        let broken = Pair { certificate: "-----BEGIN".into(), key: String::new() };
        assert!(reason(&ours, &broken, &names(), now).contains("PEM"));
        assert!(check_root(&pair, now).unwrap_err().to_string().contains("CA:TRUE"));
        assert!(check_root(&ours, now + ROOT_LIFE * 2).unwrap_err().to_string().contains("expired"));
        // A forger who gives his root our root's name is found out by the signature.
        assert!(!signed_by(&pair.certificate, &other.certificate, now));
    }

    #[test]
    fn keys_are_not_printed() {
        let root = root(SystemTime::now()).unwrap();
        assert!(!format!("{root:?}").contains("PRIVATE KEY"));
    }
}
