//! The SPIFFE identity in a certificate (SPIFFE X.509-SVID, sections 2 and 5): exactly one URI among the subject's alternative
//! names, `spiffe://<trust domain>/<path>`.

use rustls_pki_types::CertificateDer;
use std::time::{Duration, SystemTime};
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::{FromDer, X509Certificate};

/// Why a certificate says nothing that we could rely on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeError {
    /// It is no certificate.
    #[error("the certificate can't be read: {0}")]
    Unreadable(String),
    /// There is no URI among its names.
    #[error("the certificate has no SPIFFE identity")]
    Missing,
    /// There are several.
    #[error("the certificate has several URI names, a SPIFFE certificate has one")]
    Several,
    /// It is a URI of another kind.
    #[error("{0:?} is no SPIFFE identity")]
    Malformed(String),
    /// Its trust domain is neither ours nor an alias.
    #[error("{0} is of another trust domain")]
    Foreign(String),
    /// Its time is over.
    #[error("the certificate of {0} has expired")]
    Expired(String),
    /// It is somebody else's.
    #[error("the server is {got}, and {} was expected", expected.join(" or "))]
    Unexpected {
        /// Who may be there.
        expected: Vec<String>,
        /// Who is.
        got: String,
    },
}

/// What counts of a leaf certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// The SPIFFE id.
    pub id: String,
    /// When its life begins.
    pub not_before: SystemTime,
    /// When it ends.
    pub not_after: SystemTime,
}

impl Leaf {
    /// Reads a certificate.
    ///
    /// # Errors
    /// See [`SpiffeError`].
    pub fn of(der: &CertificateDer<'_>) -> Result<Self, SpiffeError> {
        let (_, certificate) = X509Certificate::from_der(der).map_err(|e| SpiffeError::Unreadable(e.to_string()))?;
        let mut found = None;
        for extension in certificate.extensions() {
            let ParsedExtension::SubjectAlternativeName(names) = extension.parsed_extension() else { continue };
            for name in &names.general_names {
                let GeneralName::URI(uri) = name else { continue };
                if found.replace(*uri).is_some() {
                    return Err(SpiffeError::Several);
                }
            }
        }
        let id = found.ok_or(SpiffeError::Missing)?;
        split(id).ok_or_else(|| SpiffeError::Malformed(id.into()))?;
        let validity = certificate.validity();
        let time = |seconds: i64| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.max(0).unsigned_abs());
        let (not_before, not_after) = (time(validity.not_before.timestamp()), time(validity.not_after.timestamp()));
        Ok(Self { id: id.to_owned(), not_before, not_after })
    }

    /// Whether it still counts, and in one of our trust domains.
    ///
    /// # Errors
    /// [`SpiffeError::Expired`], [`SpiffeError::Foreign`].
    pub fn check(&self, now: SystemTime, trust_domains: &[String]) -> Result<(), SpiffeError> {
        if now > self.not_after {
            return Err(SpiffeError::Expired(self.id.clone()));
        }
        let domain = split(&self.id).map_or("", |(domain, _)| domain);
        if trust_domains.iter().any(|ours| ours == domain) { Ok(()) } else { Err(SpiffeError::Foreign(self.id.clone())) }
    }
}

/// Trust domain and path of a SPIFFE id (SPIFFE-ID, section 2).
pub fn split(id: &str) -> Option<(&str, &str)> {
    let (domain, path) = id.strip_prefix("spiffe://")?.split_once('/')?;
    let proper = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, b'.' | b'-' | b'_');
    let segment = |s: &str| {
        !s.is_empty() && s != "." && s != ".." && s.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'-' | b'_'))
    };
    (!domain.is_empty() && domain.bytes().all(proper) && path.split('/').all(segment)).then_some((domain, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids() {
        assert_eq!(split("spiffe://cluster.local/ns/a/sa/b"), Some(("cluster.local", "ns/a/sa/b")));
        for bad in [
            "",
            "spiffe://",
            "spiffe:///ns/a",
            "spiffe://td",
            "spiffe://td/",
            "spiffe://TD/ns/a",
            "spiffe://td/ns//sa",
            "spiffe://td/../x",
            "spiffe://td/a?b",
            "spiffe://td:1/a",
            "https://td/ns/a/sa/b",
            "spiffe://td/a%2fb",
        ] {
            assert_eq!(split(bad), None, "{bad}");
        }
    }
}
