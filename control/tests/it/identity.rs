//! Certificates of workloads, end to end: a whole control plane, TLS, tokens, requests.

use crate::common::FakeApi;
use crate::discovery::{attach, bundle, channel, control, hello, metrics, pod, ready};
use clap::Parser as _;
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, SanType};
use rustls_pki_types::{CertificateDer, UnixTime};
use serde_json::json;
use std::time::{Duration, SystemTime};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use weft_api::names::LEAF_BACKDATE_SECONDS;
use weft_api::wire::identity_client::IdentityClient;
use weft_api::wire::{CertifyRequest, CertifyResponse, control_message};
use weft_control::flags::Flags;
use weft_control::run::Control;

pub(crate) fn asked(namespace: &str, pod: &str) -> CertifyRequest {
    let key = KeyPair::generate().unwrap();
    let csr = CertificateParams::default().serialize_request(&key).unwrap().der().to_vec();
    CertifyRequest { csr, namespace: namespace.into(), pod: pod.into(), life_seconds: 0 }
}

pub(crate) async fn certify(channel: &Channel, token: Option<&str>, asked: CertifyRequest) -> Result<CertifyResponse, Status> {
    let mut request = Request::new(asked);
    if let Some(token) = token {
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    }
    IdentityClient::new(channel.clone()).certify(request).await.map(tonic::Response::into_inner)
}

/// Checks a chain as a peer would, at a moment.
pub(crate) fn verify(chain: &[Vec<u8>], roots: &[Vec<u8>], at: SystemTime) -> Result<(), rustls::Error> {
    let mut store = rustls::RootCertStore::empty();
    for root in roots {
        store.add(CertificateDer::from(root.clone())).unwrap();
    }
    let leaf = CertificateDer::from(chain[0].clone());
    let above: Vec<_> = chain[1..].iter().map(|c| CertificateDer::from(c.clone())).collect();
    rustls::client::verify_server_cert_signed_by_trust_anchor(
        &rustls::server::ParsedCertificate::try_from(&leaf)?,
        &store,
        &above,
        UnixTime::since_unix_epoch(at.duration_since(SystemTime::UNIX_EPOCH).unwrap()),
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.all,
    )
}

/// The one name of a leaf, and from when until when it is valid.
pub(crate) fn facts(leaf: &[u8]) -> (String, i64, i64) {
    let (_, x509) = x509_parser::parse_x509_certificate(leaf).unwrap();
    let names = x509.subject_alternative_name().unwrap().unwrap();
    let [x509_parser::extensions::GeneralName::URI(name)] = names.value.general_names[..] else { panic!("{names:?}") };
    assert!(!x509.is_ca());
    (name.to_owned(), x509.validity().not_before.timestamp(), x509.validity().not_after.timestamp())
}

fn now() -> i64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs() as i64
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_gets_the_certificate_of_its_own_account() {
    let api = FakeApi::start().await;
    let dir = tempfile::tempdir().unwrap();
    api.put("api/v1/pods", pod("shop", "cart-1", "cart"));
    api.token("good", "shop", "cart", Some("cart-1"));
    let control = control(&api, dir.path(), &["--leaf-life=7200"]).await;
    ready(control.addresses.metrics).await;
    let channel = channel(control.addresses.control, &bundle(&api)).await;
    let response = certify(&channel, Some("good"), asked("shop", "cart-1")).await.unwrap();
    let trust = response.trust.clone().unwrap();
    assert_eq!((trust.trust_domain.as_str(), trust.roots.len(), trust.renew_before), ("cluster.local", 1, 0));
    assert_eq!(trust.issuer, weft_control::ca::issue::fingerprint(&trust.roots[0]), "the root signs by itself");
    assert_eq!(response.chain.len(), 1, "the root is not in the chain");
    let (name, begin, end) = facts(&response.chain[0]);
    assert_eq!(name, "spiffe://cluster.local/ns/shop/sa/cart");
    assert!((begin + LEAF_BACKDATE_SECONDS as i64 - now()).abs() < 10);
    assert!((end - 7200 - now()).abs() < 10);
    verify(&response.chain, &trust.roots, SystemTime::now()).unwrap();
    // The clock of a peer may lag by minutes.
    verify(&response.chain, &trust.roots, SystemTime::now() - Duration::from_secs(LEAF_BACKDATE_SECONDS - 60)).unwrap();

    // A shorter life is granted, a longer one is not.
    for (seconds, life) in [(60, 60), (1_000_000, 7200)] {
        let request = CertifyRequest { life_seconds: seconds, ..asked("shop", "cart-1") };
        let (_, _, end) = facts(&certify(&channel, Some("good"), request).await.unwrap().chain[0]);
        assert!((end - life - now()).abs() < 10, "{seconds}");
    }

    // The same is told to its stream, before all else.
    let mut proxy = attach(&channel, Some("good"), hello("shop", "cart-1")).await.unwrap();
    let (version, first) = proxy.message().await;
    assert_eq!((version, first), (1, control_message::Kind::Trust(trust.clone())));
    assert!(matches!(proxy.message().await, (2, control_message::Kind::Inbound(_))));
    std::fs::write(dir.path().join("config.yaml"), "trustDomain: mesh.example\n").unwrap();
    // Its configuration, which names the trust domain too, may come first.
    let changed = loop {
        if let (_, control_message::Kind::Trust(trust)) = proxy.message().await {
            break trust;
        }
    };
    assert_eq!((changed.trust_domain.as_str(), &changed.roots), ("mesh.example", &trust.roots));
    let (name, ..) = facts(&certify(&channel, Some("good"), asked("shop", "cart-1")).await.unwrap().chain[0]);
    assert_eq!(name, "spiffe://mesh.example/ns/shop/sa/cart");
    assert!(metrics(control.addresses.metrics).contains("weft_certificates_total{result=\"ok\",reason=\"\"} 4"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_refused_and_why() {
    let api = FakeApi::start().await;
    let dir = tempfile::tempdir().unwrap();
    let mut known = pod("shop", "cart-1", "cart");
    known["metadata"]["uid"] = json!("second");
    api.put("api/v1/pods", known);
    api.bound_token("good", "shop", "cart", "cart-1", "second");
    api.bound_token("replayed", "shop", "cart", "cart-1", "first");
    api.bound_token("expired", "shop", "cart", "cart-1", "second");
    api.foreign_token("vault", "shop", "cart", "cart-1", "vault");
    api.token("unbound", "shop", "cart", None);
    let control = control(&api, dir.path(), &[]).await;
    ready(control.addresses.metrics).await;
    let channel = channel(control.addresses.control, &bundle(&api)).await;
    assert!(certify(&channel, Some("expired"), asked("shop", "cart-1")).await.is_ok());
    api.expire_token("expired");
    for (token, request, code, text) in [
        (None, asked("shop", "cart-1"), Code::Unauthenticated, "no token"),
        (Some("forged"), asked("shop", "cart-1"), Code::Unauthenticated, "the token was refused"),
        (Some("expired"), asked("shop", "cart-1"), Code::Unauthenticated, "expired"),
        (Some("vault"), asked("shop", "cart-1"), Code::Unauthenticated, "audience"),
        (Some("unbound"), asked("shop", "cart-1"), Code::Unauthenticated, "not bound to a pod"),
        (Some("replayed"), asked("shop", "cart-1"), Code::Unauthenticated, "is gone"),
        (Some("good"), asked("bank", "cart-1"), Code::PermissionDenied, "namespace shop"),
        (Some("good"), asked("shop", "cart-2"), Code::PermissionDenied, "pod cart-1"),
        (Some("good"), asked("", ""), Code::PermissionDenied, "names no pod"),
        (Some("good"), CertifyRequest { csr: b"x".to_vec(), ..asked("shop", "cart-1") }, Code::InvalidArgument, "PKCS #10"),
    ] {
        let status = certify(&channel, token, request).await.expect_err(text);
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(text), "{status}");
    }
    // The stream is as strict.
    let status = attach(&channel, Some("replayed"), hello("shop", "cart-1")).await.err().unwrap();
    assert_eq!(status.code(), Code::Unauthenticated, "{status}");

    // A request for somebody else, and for an authority: the answer is the caller's own identity.
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.subject_alt_names = vec![SanType::URI("spiffe://cluster.local/ns/bank/sa/vault".try_into().unwrap())];
    let csr = params.serialize_request(&key).unwrap().der().to_vec();
    let response = certify(&channel, Some("good"), CertifyRequest { csr, ..asked("shop", "cart-1") }).await.unwrap();
    assert_eq!(facts(&response.chain[0]).0, "spiffe://cluster.local/ns/shop/sa/cart");

    // An API server that is away is not a bad token.
    api.set_down(true);
    let status = certify(&channel, Some("good"), asked("shop", "cart-1")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    let text = metrics(control.addresses.metrics);
    for line in [
        "result=\"refused\",reason=\"bad-token\"} 5",
        "result=\"refused\",reason=\"not-its-pod\"} 3",
        "result=\"error\",reason=\"review-failed\"} 1",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_asks_in_a_loop_is_held_back_and_its_neighbour_is_not() {
    let api = FakeApi::start().await;
    let dir = tempfile::tempdir().unwrap();
    for name in ["cart-1", "cart-2"] {
        api.put("api/v1/pods", pod("shop", name, "cart"));
        api.token(name, "shop", "cart", Some(name));
    }
    let control = control(&api, dir.path(), &[]).await;
    ready(control.addresses.metrics).await;
    let channel = channel(control.addresses.control, &bundle(&api)).await;
    let mut granted = 0;
    let status = loop {
        match certify(&channel, Some("cart-1"), asked("shop", "cart-1")).await {
            Ok(_) => granted += 1,
            Err(status) => break status,
        }
        assert!(granted < 100);
    };
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert!(granted >= 20, "{granted}");
    assert!(certify(&channel, Some("cart-2"), asked("shop", "cart-2")).await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_kubernetes_tokens_of_a_file_are_identities() {
    let dir = tempfile::tempdir().unwrap();
    let manifests = dir.path().join("manifests");
    std::fs::create_dir(&manifests).unwrap();
    std::fs::write(manifests.join("app.yaml"), pod("shop", "cart-1", "cart").to_string()).unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("tokens"), "one shop/cart-1\ntwo shop/web-1/web\nthree shop/other\n").unwrap();
    let start = async |tokens: bool| {
        let mut args = vec!["weft-control".to_owned()];
        args.extend(["--manifests".into(), path("manifests"), "--trust-bundle-out".into(), path("root.pem")]);
        args.extend(["--config".into(), path("none.yaml"), "--bind".into(), "127.0.0.1".into(), "--shutdown-delay=0".into()]);
        args.extend(["--webhook-port=0", "--control-port=0", "--metrics-port=0"].map(str::to_owned));
        if tokens {
            args.extend(["--tokens".into(), path("tokens")]);
        }
        let control = Control::start(Flags::try_parse_from(args).unwrap()).await.unwrap();
        ready(control.addresses.metrics).await;
        let channel = channel(control.addresses.control, &std::fs::read_to_string(path("root.pem")).unwrap()).await;
        (control, channel)
    };
    let (_control, channel) = start(true).await;
    for (token, pod, account) in [("one", "cart-1", "cart"), ("two", "web-1", "web"), ("three", "other", "default")] {
        let response = certify(&channel, Some(token), asked("shop", pod)).await.unwrap();
        assert_eq!(facts(&response.chain[0]).0, format!("spiffe://cluster.local/ns/shop/sa/{account}"));
    }
    let status = certify(&channel, Some("one"), asked("shop", "web-1")).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert_eq!(certify(&channel, None, asked("shop", "web-1")).await.unwrap_err().code(), Code::Unauthenticated);
    // Without a list, any process of this machine is what it says, with names that make no other's identity.
    let (_control, channel) = start(false).await;
    let response = certify(&channel, None, asked("shop", "cart-1")).await.unwrap();
    assert_eq!(facts(&response.chain[0]).0, "spiffe://cluster.local/ns/shop/sa/cart");
    let status = certify(&channel, None, asked("shop/sa/root", "cart-1")).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
}
