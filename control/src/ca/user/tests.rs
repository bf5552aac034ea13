use super::*;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose, GeneralSubtree,
    IsCa, Issuer, KeyUsagePurpose, NameConstraints,
};

type Edit = fn(&mut CertificateParams);

fn params(name: &str, edit: Edit) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "Example Inc.");
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    issue::set_validity(&mut params, SystemTime::now(), Duration::from_secs(3600), Duration::from_secs(30 * 24 * 3600));
    edit(&mut params);
    params
}

fn plain(_: &mut CertificateParams) {}

fn root(name: &str) -> CertifiedIssuer<'static, KeyPair> {
    CertifiedIssuer::self_signed(params(name, plain), KeyPair::generate().unwrap()).unwrap()
}

fn below(above: &Issuer<'_, KeyPair>, name: &str, edit: Edit) -> CertifiedIssuer<'static, KeyPair> {
    CertifiedIssuer::signed_by(params(name, edit), KeyPair::generate().unwrap(), above).unwrap()
}

fn data(entries: &[(&str, &str)]) -> BTreeMap<String, Vec<u8>> {
    entries.iter().map(|(key, text)| ((*key).to_owned(), text.as_bytes().to_vec())).collect()
}

fn istio(certificate: &str, key: &str, root: &str, chain: &str) -> BTreeMap<String, Vec<u8>> {
    data(&[("ca-cert.pem", certificate), ("ca-key.pem", key), ("root-cert.pem", root), ("cert-chain.pem", chain)])
}

fn now() -> SystemTime {
    SystemTime::now()
}

fn reason(data: &BTreeMap<String, Vec<u8>>) -> String {
    read(data, now()).unwrap_err().to_string()
}

#[test]
fn an_intermediate_with_its_chain_in_both_layouts() {
    let root = root("Root");
    let middle = below(&root, "Middle", plain);
    let issuing = below(&middle, "Issuing", plain);
    let key = issuing.key().serialize_pem();
    let chain = format!("{}{}", issuing.pem(), middle.pem());
    let with_root = format!("{chain}{}", root.pem());
    for data in [
        istio(&issuing.pem(), &key, &root.pem(), &chain),
        istio(&issuing.pem(), &key, &root.pem(), &with_root),
        // Out of order, and the whole chain with the certificate.
        istio(&chain, &key, &root.pem(), ""),
        istio(&issuing.pem(), &key, &root.pem(), &format!("{}{}", root.pem(), middle.pem())),
        data(&[("tls.crt", &chain), ("tls.key", &key), ("ca.crt", &root.pem())]),
        // Without ca.crt, where the chain has the root.
        data(&[("tls.crt", &with_root), ("tls.key", &key)]),
        // An anchor that is not self-signed.
        data(&[("tls.crt", &issuing.pem()), ("tls.key", &key), ("ca.crt", &middle.pem())]),
    ] {
        let given = read(&data, now()).unwrap();
        let leaf = given
            .signer
            .sign(
                &signer::ProvedKey::of(&KeyPair::generate().unwrap()).unwrap(),
                "spiffe://d/ns/a/sa/b",
                now(),
                Duration::from_secs(60),
            )
            .unwrap();
        assert!(!leaf.chain.iter().any(|c| given.candidate.roots.iter().any(|(f, _)| *f == issue::hex(&issue::fingerprint(c)))));
        assert_eq!(leaf.chain[1].as_ref(), issuing.der().as_ref());
        assert_eq!(given.candidate.roots.len(), 1);
        assert_eq!(given.candidate.root, given.candidate.roots[0].0);
    }
}

#[test]
fn an_authority_that_is_its_own_root() {
    let root = root("Root");
    let key = root.key().serialize_pem();
    for data in [
        data(&[("tls.crt", &root.pem()), ("tls.key", &key), ("ca.crt", &root.pem())]),
        data(&[("tls.crt", &root.pem()), ("tls.key", &key)]),
        istio(&root.pem(), &key, &root.pem(), &root.pem()),
    ] {
        let given = read(&data, now()).unwrap();
        assert_eq!(given.candidate.issuer, given.candidate.root);
    }
}

#[test]
fn more_roots_than_one_and_the_right_one_is_found() {
    let (old, new) = (root("Old"), root("New"));
    let issuing = below(&new, "Issuing", plain);
    let both = format!("{}{}", old.pem(), new.pem());
    let given = read(&istio(&issuing.pem(), &issuing.key().serialize_pem(), &both, &issuing.pem()), now()).unwrap();
    assert_eq!(given.candidate.roots.len(), 2);
    assert_eq!(given.candidate.root, issue::hex(&issue::fingerprint(new.der())));
}

#[test]
fn keys_as_tools_write_them() {
    // `openssl ecparam -genkey` (SEC1) and `openssl genrsa -traditional` (PKCS #1) are read too.
    for (certificate, key) in [
        (include_str!("tests/ec-sec1.crt"), include_str!("tests/ec-sec1.key")),
        (include_str!("tests/rsa-pkcs1.crt"), include_str!("tests/rsa-pkcs1.key")),
    ] {
        read(&data(&[("tls.crt", certificate), ("tls.key", key), ("ca.crt", certificate)]), now()).unwrap();
    }
}

#[test]
fn a_subject_with_an_attribute_twice_is_refused_by_name() {
    let (certificate, key) = (include_str!("tests/twice.crt"), include_str!("tests/twice.key"));
    let reason = reason(&data(&[("tls.crt", certificate), ("tls.key", key), ("ca.crt", certificate)]));
    assert!(reason.starts_with("key tls.crt: its subject") && reason.contains("DC=com, DC=example"), "{reason}");
}

#[test]
fn what_is_refused_names_the_key() {
    let (one, other) = (root("Root"), root("Other"));
    let middle = below(&one, "Middle", plain);
    let issuing = below(&middle, "Issuing", plain);
    let (pem, key, chain) = (issuing.pem(), issuing.key().serialize_pem(), format!("{}{}", issuing.pem(), middle.pem()));
    let root = one.pem();
    let shut = |edit: Edit| {
        let issuing = below(&one, "Shut", edit);
        istio(&issuing.pem(), &issuing.key().serialize_pem(), &root, "")
    };
    let mut leaf = params("leaf", plain);
    leaf.is_ca = IsCa::ExplicitNoCa;
    let leaf_key = KeyPair::generate().unwrap();
    let leaf = leaf.signed_by(&leaf_key, &one).unwrap();
    for (what, data, expected) in [
        ("nothing", data(&[]), "key ca-cert.pem: it is missing, and so is tls.crt"),
        ("no key", data(&[("tls.crt", &pem), ("ca.crt", &root)]), "key tls.key: it is missing"),
        ("no certificate", istio("", &key, &root, &chain), "key ca-cert.pem: it is missing or empty"),
        ("nonsense", istio("nonsense", &key, &root, &chain), "key ca-cert.pem: there is no PEM certificate"),
        ("cut off", istio(&pem[..pem.len() / 2], &key, &root, &chain), "key ca-cert.pem:"),
        ("nonsense key", istio(&pem, "nonsense", &root, &chain), "key ca-key.pem: there is no PEM private key"),
        ("another's key", istio(&pem, &other.key().serialize_pem(), &root, &chain), "key ca-key.pem: it is not the key"),
        (
            "encrypted",
            istio(&pem, "-----BEGIN ENCRYPTED PRIVATE KEY-----", &root, &chain),
            "key ca-key.pem: the private key is encrypted",
        ),
        ("no root", istio(&pem, &key, "", &chain), "key root-cert.pem: it is missing"),
        ("broken root", istio(&pem, &key, "x", &chain), "key root-cert.pem:"),
        ("another root", istio(&pem, &key, &other.pem(), &chain), "key cert-chain.pem: certificates that"),
        ("a hole in the chain", istio(&pem, &key, &root, &pem), "key cert-chain.pem: certificates that"),
        (
            "a leaf",
            istio(&leaf.pem(), &leaf_key.serialize_pem(), &root, ""),
            "key ca-cert.pem: it is not the certificate of an authority",
        ),
        ("a leaf as root", istio(&pem, &key, &leaf.pem(), &chain), "key root-cert.pem: \"O=Example Inc., CN=leaf\" is not"),
        ("no cert sign", shut(|p| p.key_usages = vec![KeyUsagePurpose::DigitalSignature]), "key ca-cert.pem: its key usage"),
        ("expired", shut(|p| p.not_after = rcgen::date_time_ymd(2020, 1, 1)), "has expired"),
        ("early", shut(|p| p.not_before = rcgen::date_time_ymd(2090, 1, 1)), "is not valid before"),
        ("for servers only", shut(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]), "as a client"),
        ("for DNS names only", shut(constrained), "not accepted"),
    ] {
        let reason = reason(&data);
        assert!(reason.contains(expected), "{what}: {reason}");
    }
}

fn constrained(params: &mut CertificateParams) {
    params.name_constraints = Some(NameConstraints {
        permitted_subtrees: vec![GeneralSubtree::DirectoryName(params.distinguished_name.clone())],
        excluded_subtrees: vec![],
    });
}
