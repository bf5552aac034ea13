use super::*;
use rcgen::{BasicConstraints, DnType};
use x509_parser::extensions::{GeneralName, ParsedExtension};

const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";

fn root(now: SystemTime) -> Signer {
    Signer::of_root(&issue::root(now).unwrap()).unwrap()
}

fn request(key: &KeyPair) -> Vec<u8> {
    CertificateParams::default().serialize_request(key).unwrap().der().to_vec()
}

fn p256() -> KeyPair {
    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap()
}

#[test]
fn a_hostile_request_gets_what_everybody_gets() {
    let now = SystemTime::now();
    let signer = root(now);
    let key = p256();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.subject_alt_names = vec![
        SanType::URI("spiffe://cluster.local/ns/kube-system/sa/admin".try_into().unwrap()),
        SanType::DnsName("weft-control.weft-system.svc".try_into().unwrap()),
    ];
    params.distinguished_name.push(DnType::CommonName, "Weft root");
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::Any];
    let hostile = params.serialize_request(&key).unwrap().der().to_vec();
    let leaf = signer.sign(&proved_key(&hostile).unwrap(), CART, now, Duration::from_secs(600)).unwrap();
    assert_eq!(leaf.chain.len(), 1, "no root is sent");
    let (_, x509) = x509_parser::parse_x509_certificate(&leaf.chain[0]).unwrap();
    assert!(!x509.is_ca());
    assert_eq!(x509.basic_constraints().unwrap().map(|c| c.value.ca), Some(false));
    assert_eq!(x509.subject().iter().count(), 0, "{}", x509.subject());
    let names = x509.subject_alternative_name().unwrap().unwrap();
    assert!(names.critical, "as the subject is empty");
    assert_eq!(names.value.general_names, [GeneralName::URI(CART)]);
    let usage = x509.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && !usage.key_cert_sign() && !usage.crl_sign());
    let extended = x509.extended_key_usage().unwrap().unwrap().value;
    assert!(extended.client_auth && extended.server_auth && !extended.any);
    assert_eq!(x509.public_key().subject_public_key.data.as_ref(), key.public_key_raw());
    let has = |wanted: fn(&ParsedExtension<'_>) -> bool| x509.extensions().iter().any(|e| wanted(e.parsed_extension()));
    let above = x509.extensions().iter().find_map(|e| match e.parsed_extension() {
        ParsedExtension::AuthorityKeyIdentifier(id) => id.key_identifier.as_ref().map(|id| issue::hex(id.0)),
        _ => None,
    });
    assert!(above.is_some() && above == signer.key_id(), "{above:?}");
    assert!(has(|e| matches!(e, ParsedExtension::SubjectKeyIdentifier(_))));
}

#[test]
fn serials_are_random_and_validity_begins_in_the_past() {
    let now = SystemTime::now();
    let signer = root(now);
    let key = proved_key(&request(&p256())).unwrap();
    let (one, two) = (
        signer.sign(&key, CART, now, Duration::from_secs(600)).unwrap(),
        signer.sign(&key, CART, now, Duration::from_secs(600)).unwrap(),
    );
    let parse = |leaf: &Leaf| {
        let (_, x509) = x509_parser::parse_x509_certificate(&leaf.chain[0]).unwrap();
        let serial = x509.serial.clone();
        (serial, issue::system_time(x509.validity().not_before), issue::system_time(x509.validity().not_after))
    };
    let ((serial, begin, end), (other, ..)) = (parse(&one), parse(&two));
    assert_ne!(serial, other, "the same key twice");
    assert!(serial.bits() >= 120);
    let second = Duration::from_secs(1);
    assert!(begin <= now - BACKDATE && begin + second > now - BACKDATE - second);
    assert!(end <= now + Duration::from_secs(600) && end + second > now + Duration::from_secs(600));
}

#[test]
fn a_leaf_never_outlives_its_issuer() {
    let now = SystemTime::now();
    let signer = root(now);
    let key = proved_key(&request(&p256())).unwrap();
    let late = signer.not_after() - Duration::from_secs(100);
    let leaf = signer.sign(&key, CART, late, Duration::from_secs(24 * 3600)).unwrap();
    assert!(leaf.not_after <= signer.not_after());
    let error = signer.sign(&key, CART, signer.not_after() + Duration::from_secs(1), Duration::from_secs(60)).unwrap_err();
    assert!(matches!(&error, SignError::Expired { name } if name.contains("Weft root")), "{error}");
}

#[test]
fn keys_that_are_taken() {
    for algorithm in [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384] {
        assert!(proved_key(&request(&KeyPair::generate_for(algorithm).unwrap())).is_ok());
    }
    let rsa = KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048).unwrap();
    let now = SystemTime::now();
    let leaf = root(now).sign(&proved_key(&request(&rsa)).unwrap(), CART, now, Duration::from_secs(60)).unwrap();
    let (_, x509) = x509_parser::parse_x509_certificate(&leaf.chain[0]).unwrap();
    assert!(x509.key_usage().unwrap().unwrap().value.key_encipherment());
}

#[test]
fn requests_that_are_refused() {
    let ed = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let error = proved_key(&request(&ed)).unwrap_err();
    assert!(matches!(error, RequestError::Key(_)) && error.to_string().contains("P-256"), "{error}");
    let good = request(&p256());
    let mut forged = good.clone();
    *forged.last_mut().unwrap() ^= 1;
    assert_eq!(proved_key(&forged).unwrap_err(), RequestError::Signature);
    // Somebody else's key in our request.
    let (_, parsed) = X509CertificationRequest::from_der(&good).unwrap();
    let ours = parsed.certification_request_info.subject_pki.subject_public_key.data.to_vec();
    let position = good.windows(ours.len()).position(|w| w == ours).unwrap();
    let mut stolen = good.clone();
    stolen[position..position + ours.len()].copy_from_slice(p256().public_key_raw());
    assert_eq!(proved_key(&stolen).unwrap_err(), RequestError::Signature);
    let mut longer = good.clone();
    longer.push(0);
    for bad in [&b""[..], b"nonsense", &good[..good.len() - 1], &longer, &vec![0; REQUEST + 1]] {
        assert!(matches!(proved_key(bad), Err(RequestError::Malformed(_))), "{} bytes", bad.len());
    }
    // No prefix and no changed byte may panic, or get another key signed. (What surrounds the signature is not signed.)
    let proved = proved_key(&good).unwrap();
    for n in 0..good.len() {
        let _ = proved_key(&good[..n]);
        let mut flipped = good.clone();
        flipped[n] ^= 0x55;
        if let Ok(key) = proved_key(&flipped) {
            assert_eq!(key.0.der_bytes(), proved.0.der_bytes(), "byte {n}");
            assert!(n >= position + ours.len(), "byte {n} is signed");
        }
    }
}

#[test]
fn a_weak_rsa_key_is_refused_by_name() {
    // Made by `openssl req -new -newkey rsa:1024 -nodes -outform DER -subj /`.
    use base64::Engine as _;
    let text = include_str!("weak-rsa.b64").replace('\n', "");
    let request = base64::engine::general_purpose::STANDARD.decode(text).unwrap();
    let error = proved_key(&request).unwrap_err();
    assert!(error.to_string().contains("RSA of 1024 bits"), "{error}");
}

#[test]
fn identities_of_odd_names() {
    assert_eq!(identity("cluster.local", "shop", "cart").unwrap(), CART);
    for (domain, namespace, account) in [
        ("", "a", "b"),
        ("d", "", "b"),
        ("d", "a", ""),
        ("d", "a/sa/x", "b"),
        ("d", "a", "b/../c"),
        ("d", "A", "b"),
        ("d?", "a", "b"),
    ] {
        assert!(identity(domain, namespace, account).is_err(), "{domain} {namespace} {account}");
    }
}

#[test]
fn a_key_of_another_certificate_signs_nothing() {
    let now = SystemTime::now();
    let (one, two) = (issue::root(now).unwrap(), issue::root(now).unwrap());
    let reason = |certificate: &str, key: &str| {
        Signer::of_root(&Pair { certificate: certificate.into(), key: key.into() }).unwrap_err().to_string()
    };
    assert!(reason(&one.certificate, &two.key).contains("not the key of"));
    assert!(reason("", &two.key).contains("PEM"));
    assert!(reason(&one.certificate, "nonsense").contains("tls.key"));
}

/// Signing is done off the I/O threads; this says what it costs there (`--nocapture`).
#[test]
fn signing_is_cheap() {
    let now = SystemTime::now();
    let signer = root(now);
    let request = request(&p256());
    let begin = std::time::Instant::now();
    const ROUNDS: u32 = 200;
    for _ in 0..ROUNDS {
        signer.sign(&proved_key(&request).unwrap(), CART, now, Duration::from_secs(60)).unwrap();
    }
    let each = begin.elapsed() / ROUNDS;
    println!("{} µs for one request, checked and signed", each.as_micros());
    assert!(each < Duration::from_millis(20), "{each:?}");
}
