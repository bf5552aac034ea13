//! The user's own certificate authority, as a Secret holds it: read and tried before it is put in force.
//!
//! Two layouts are known: Istio's (`ca-cert.pem`, `ca-key.pem`, `root-cert.pem`, `cert-chain.pem`) and that of cert-manager and
//! `kubectl create secret tls` (`tls.crt`, `tls.key`, `ca.crt`). What is read has to prove itself: a leaf is signed and checked as a peer would
//! check it, on both ends of TLS, against the roots that came with it. So an authority that is restricted in a way that shuts workloads out (a
//! path length, name constraints, an extended key usage) is found out here and not by the first request.
//!
//! Every refusal names the key of the Secret that has to be mended.

use super::issue;
use super::signer::{self, Signer};
use super::state::Candidate;
use rcgen::KeyPair;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, UnixTime};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use x509_parser::certificate::X509Certificate;

/// The keys of a layout.
#[derive(Clone, Copy, Debug)]
struct Layout {
    certificate: &'static str,
    key: &'static str,
    roots: &'static str,
    chain: Option<&'static str>,
}

const ISTIO: Layout =
    Layout { certificate: "ca-cert.pem", key: "ca-key.pem", roots: "root-cert.pem", chain: Some("cert-chain.pem") };
const TLS: Layout = Layout { certificate: "tls.crt", key: "tls.key", roots: "ca.crt", chain: None };

/// Longest way from an issuing certificate to its root.
const DEPTH: usize = 8;

/// An authority that was tried and is good.
#[derive(Clone, Debug)]
pub struct Given {
    /// What signs.
    pub signer: Arc<Signer>,
    /// What the state has to know of it.
    pub candidate: Candidate,
}

/// Why a Secret can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("key {key}: {reason}")]
pub struct Refused {
    /// The key to be mended.
    pub key: &'static str,
    /// What is wrong with it.
    pub reason: String,
}

fn refused<T>(key: &'static str, reason: impl Into<String>) -> Result<T, Refused> {
    Err(Refused { key, reason: reason.into() })
}

/// Reads the data of a Secret and tries what it holds.
///
/// # Errors
/// The key that has to be mended, and what is wrong with it.
pub fn read(data: &BTreeMap<String, Vec<u8>>, now: SystemTime) -> Result<Given, Refused> {
    let istio = [ISTIO.certificate, ISTIO.key, ISTIO.roots].iter().any(|key| data.contains_key(*key));
    let layout = if istio { ISTIO } else { TLS };
    if !istio && !data.contains_key(TLS.certificate) && !data.contains_key(TLS.key) {
        return refused(
            ISTIO.certificate,
            "it is missing, and so is tls.crt; expected are ca-cert.pem, ca-key.pem, root-cert.pem and cert-chain.pem, or tls.crt, tls.key \
             and ca.crt",
        );
    }
    let mut certificates = certificates(data, layout.certificate, true)?;
    let key = private_key(data, layout.key)?;
    let issuing = certificates.remove(0);
    let parsed = check_issuing(&issuing, layout.certificate, now)?;
    if parsed.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
        return refused(layout.key, format!("it is not the key of the certificate in {}", layout.certificate));
    }
    let mut between = certificates;
    if let Some(chain) = layout.chain {
        between.extend(self::certificates(data, chain, false)?);
    }
    let mut roots = self::certificates(data, layout.roots, false)?;
    if roots.is_empty() {
        // A self-signed authority is its own root; some issuers append the root to the chain.
        roots.extend(std::iter::once(&issuing).chain(&between).find(|c| self_signed(c)).cloned());
    }
    if roots.is_empty() {
        return refused(layout.roots, "it is missing; it must hold the root (PEM) at which the chain ends");
    }
    for root in &roots {
        check_root(root, layout.roots, now)?;
    }
    let path = path(&issuing, &between, &roots);
    let mut reason = String::new();
    for root in &roots {
        let signer = Signer::from_parts(&issuing, &path, root, &key)
            .or_else(|e| refused(layout.certificate, format!("it can't sign: {e}")))?;
        match try_out(&signer, root, now) {
            Ok(()) => return Ok(given(signer, &parsed, root, &roots)),
            Err(error) => reason = error,
        }
    }
    let which = layout.chain.unwrap_or(layout.certificate);
    let subject = parsed.subject().to_string();
    refused(
        which,
        format!(
            "certificates that {subject:?} signs are not accepted below any root of {}: {reason}. Is an intermediate missing, is {} the root of \
             this chain, or does a certificate of the chain restrict what may be signed?",
            layout.roots, layout.roots
        ),
    )
}

fn given(
    signer: Signer,
    parsed: &X509Certificate<'_>,
    root: &CertificateDer<'static>,
    roots: &[CertificateDer<'static>],
) -> Given {
    let candidate = Candidate {
        issuer: issue::hex(&signer.fingerprint()),
        root: issue::hex(&issue::fingerprint(root)),
        roots: roots.iter().map(|root| (issue::hex(&issue::fingerprint(root)), issue::pem(root))).collect(),
        not_before: seconds(issue::system_time(parsed.validity().not_before)),
        not_after: seconds(signer.not_after()),
    };
    Given { signer: Arc::new(signer), candidate }
}

/// Seconds since 1970.
pub(crate) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn text<'a>(data: &'a BTreeMap<String, Vec<u8>>, key: &'static str) -> Result<Option<&'a str>, Refused> {
    match data.get(key) {
        None => Ok(None),
        Some(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) if text.trim().is_empty() => Ok(None),
            Ok(text) => Ok(Some(text)),
            Err(_) => refused(key, "it is no text; expected PEM"),
        },
    }
}

fn certificates(
    data: &BTreeMap<String, Vec<u8>>,
    key: &'static str,
    needed: bool,
) -> Result<Vec<CertificateDer<'static>>, Refused> {
    let Some(text) = text(data, key)? else {
        return if needed { refused(key, "it is missing or empty") } else { Ok(Vec::new()) };
    };
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    match found {
        Ok(found) if found.is_empty() => refused(key, "there is no PEM certificate in it (`-----BEGIN CERTIFICATE-----`)"),
        Ok(found) => {
            for certificate in &found {
                if let Err(error) = x509_parser::parse_x509_certificate(certificate) {
                    return refused(key, format!("a certificate in it can't be read: {error}"));
                }
            }
            Ok(found)
        }
        Err(error) => refused(key, format!("it is no PEM: {error}")),
    }
}

fn private_key(data: &BTreeMap<String, Vec<u8>>, name: &'static str) -> Result<Arc<KeyPair>, Refused> {
    let Some(text) = text(data, name)? else { return refused(name, "it is missing or empty") };
    if text.contains("ENCRYPTED") {
        return refused(name, "the private key is encrypted; store it without a passphrase");
    }
    let key = rustls_pki_types::PrivateKeyDer::from_pem_slice(text.as_bytes())
        .or_else(|e| refused(name, format!("there is no PEM private key in it: {e}")))?;
    KeyPair::try_from(&key).map(Arc::new).or_else(|e| {
        refused(name, format!("the private key can't be used ({e}); ECDSA P-256 or P-384 and RSA from 2048 bits can"))
    })
}

fn check_issuing<'a>(
    certificate: &'a CertificateDer<'_>,
    key: &'static str,
    now: SystemTime,
) -> Result<X509Certificate<'a>, Refused> {
    let (_, parsed) =
        x509_parser::parse_x509_certificate(certificate).or_else(|e| refused(key, format!("it can't be read: {e}")))?;
    if !parsed.is_ca() {
        return refused(key, "it is not the certificate of an authority (CA:TRUE is missing; cert-manager: `isCA: true`)");
    }
    if parsed.key_usage().ok().flatten().is_some_and(|usage| !usage.value.key_cert_sign()) {
        return refused(key, "its key usage does not allow to sign certificates (keyCertSign; cert-manager: usage `cert sign`)");
    }
    if let Ok(x509_parser::public_key::PublicKey::RSA(rsa)) = parsed.public_key().parsed()
        && rsa.key_size() < 2048
    {
        return refused(key, format!("its key is RSA of {} bits; at least 2048 are needed", rsa.key_size()));
    }
    check_subject(&parsed, key)?;
    check_validity(&parsed, key, now)?;
    Ok(parsed)
}

/// A leaf must name its issuer byte by byte; the library that writes it knows each attribute once.
fn check_subject(parsed: &X509Certificate<'_>, key: &'static str) -> Result<(), Refused> {
    let mut seen = std::collections::HashSet::new();
    for part in parsed.subject().iter_rdn() {
        let attributes: Vec<_> = part.iter().map(|attribute| attribute.attr_type().to_id_string()).collect();
        if attributes.len() > 1 || attributes.iter().any(|attribute| !seen.insert(attribute.clone())) {
            return refused(
                key,
                format!(
                    "its subject {:?} has an attribute more than once, which is not supported; issue the authority with a subject such as \
                     `O=Example, CN=Weft CA`",
                    parsed.subject().to_string()
                ),
            );
        }
    }
    if seen.is_empty() {
        return refused(key, "its subject is empty; verifiers find an issuer by its name");
    }
    Ok(())
}

fn check_root(certificate: &CertificateDer<'_>, key: &'static str, now: SystemTime) -> Result<(), Refused> {
    let (_, parsed) =
        x509_parser::parse_x509_certificate(certificate).or_else(|e| refused(key, format!("it can't be read: {e}")))?;
    if !parsed.is_ca() {
        return refused(
            key,
            format!("{:?} is not the certificate of an authority (CA:TRUE is missing)", parsed.subject().to_string()),
        );
    }
    check_validity(&parsed, key, now)
}

fn check_validity(parsed: &X509Certificate<'_>, key: &'static str, now: SystemTime) -> Result<(), Refused> {
    let (subject, validity) = (parsed.subject().to_string(), parsed.validity());
    if issue::system_time(validity.not_after) <= now {
        return refused(key, format!("certificate {subject:?} has expired ({})", validity.not_after));
    }
    if issue::system_time(validity.not_before) > now {
        return refused(key, format!("certificate {subject:?} is not valid before {}; is a clock wrong?", validity.not_before));
    }
    Ok(())
}

fn self_signed(certificate: &CertificateDer<'_>) -> bool {
    x509_parser::parse_x509_certificate(certificate).is_ok_and(|(_, c)| c.subject().as_raw() == c.issuer().as_raw())
}

/// The certificates between the issuing one and a root, from below, roots left out.
fn path(
    issuing: &CertificateDer<'static>,
    between: &[CertificateDer<'static>],
    roots: &[CertificateDer<'static>],
) -> Vec<CertificateDer<'static>> {
    let mut path: Vec<CertificateDer<'static>> = Vec::new();
    let mut below = issuing.clone();
    while path.len() < DEPTH && !roots.contains(&below) && !self_signed(&below) {
        let Ok((_, parsed)) = x509_parser::parse_x509_certificate(&below) else { break };
        let wanted = parsed.issuer().as_raw();
        let named = |c: &&CertificateDer<'static>| {
            x509_parser::parse_x509_certificate(c).is_ok_and(|(_, c)| {
                // Of two with one name (an authority that was renewed) the one whose key signed it.
                c.subject().as_raw() == wanted && parsed.verify_signature(Some(c.public_key())).is_ok()
            })
        };
        if roots.iter().any(|root| named(&root)) {
            break;
        }
        let Some(above) = between.iter().find(|c| named(c) && !path.contains(c)) else { break };
        below = above.clone();
        path.push(above.clone());
    }
    path
}

/// Signs a leaf and checks it as a peer would.
fn try_out(signer: &Signer, root: &CertificateDer<'static>, now: SystemTime) -> Result<(), String> {
    let key = KeyPair::generate().map_err(|e| e.to_string())?;
    let identity = "spiffe://cluster.local/ns/default/sa/default";
    let leaf = signer.sign(&signer::ProvedKey::of(&key)?, identity, now, Duration::from_secs(600)).map_err(|e| e.to_string())?;
    let mut store = rustls::RootCertStore::empty();
    store.add(root.clone()).map_err(|e| e.to_string())?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let algorithms = provider.signature_verification_algorithms.all;
    let at = UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).unwrap_or_default());
    let parsed = rustls::server::ParsedCertificate::try_from(&leaf.chain[0]).map_err(|e| e.to_string())?;
    rustls::client::verify_server_cert_signed_by_trust_anchor(&parsed, &store, &leaf.chain[1..], at, algorithms)
        .map_err(|e| format!("as a server: {e}"))?;
    let client = WebPkiClientVerifier::builder_with_provider(Arc::new(store), provider).build().map_err(|e| e.to_string())?;
    client.verify_client_cert(&leaf.chain[0], &leaf.chain[1..], at).map_err(|e| format!("as a client: {e}"))?;
    Ok(())
}

#[cfg(test)]
mod tests;
