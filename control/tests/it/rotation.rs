//! Roots that change while everything runs: by request, by a user's own authority, over restarts and changes of the leader.

use crate::authority::{plan, replica_of};
use crate::common::{FakeApi, eventually};
use crate::discovery::{Proxy, attach, channel, control, hello, metrics, pod, ready};
use crate::identity::{asked, certify, facts, verify};
use base64::Engine as _;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use tonic::Code;
use weft_api::wire::{CertificateState, ProxyMessage, Report, TrustBundle, control_message, proxy_message};
use weft_control::ca::authority::Clock;
use weft_control::ca::keeper::{Outside, Plan};
use weft_control::ca::store::Store;

const SECRETS: &str = "api/v1/secrets";

fn text(object: &Value, key: &str) -> String {
    let data = object["data"][key].as_str().unwrap_or_default();
    String::from_utf8(base64::engine::general_purpose::STANDARD.decode(data).unwrap()).unwrap()
}

fn annotate(api: &FakeApi, name: &str, value: &str) {
    let mut secret = api.get(SECRETS, "weft-system", "weft-ca").unwrap();
    secret["metadata"]["annotations"][name] = json!(value);
    api.put(SECRETS, secret);
}

fn meshed(namespace: &str, name: &str) -> Value {
    let mut pod = pod(namespace, name, "cart");
    pod["metadata"]["annotations"] = json!({"weft.mesh/status": "{}"});
    pod["spec"]["containers"].as_array_mut().unwrap().push(json!({"name": "weft-proxy"}));
    pod
}

/// What pods of the namespace trust when they call the control plane.
fn mounted(api: &FakeApi) -> Option<String> {
    Some(api.get("api/v1/configmaps", "shop", "weft-trust-bundle")?["data"]["root.pem"].as_str()?.to_owned())
}

fn roots(pem: &str) -> usize {
    pem.matches("BEGIN CERTIFICATE").count()
}

async fn told(proxy: &mut Proxy, wanted: impl Fn(&TrustBundle) -> bool) -> TrustBundle {
    loop {
        if let (_, control_message::Kind::Trust(trust)) = proxy.message().await
            && wanted(&trust)
        {
            return trust;
        }
    }
}

/// The key id by which a leaf names what signed it.
fn key_id(leaf: &[u8]) -> String {
    let (_, x509) = x509_parser::parse_x509_certificate(leaf).unwrap();
    let id = x509.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        x509_parser::extensions::ParsedExtension::AuthorityKeyIdentifier(id) => id.key_identifier.as_ref(),
        _ => None,
    });
    id.unwrap().0.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_root_is_replaced_while_everybody_goes_on() {
    let api = FakeApi::start().await;
    let dir = tempfile::tempdir().unwrap();
    api.put("api/v1/pods", meshed("shop", "cart-1"));
    api.token("good", "shop", "cart", Some("cart-1"));
    api.put(
        "apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations",
        json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration", "metadata": {"name": "weft-injector"},
        "webhooks": [{"name": "injector.weft.mesh", "clientConfig": {"service": {"namespace": "weft-system", "name": "weft-control"}}}]}),
    );
    let control = control(&api, dir.path(), &["--rotation-delay=2"]).await;
    ready(control.addresses.metrics).await;
    let first_bundle = eventually("the bundle is there", || mounted(&api)).await;
    let channel_of = channel(control.addresses.control, &first_bundle).await;
    let mut proxy = attach(&channel_of, Some("good"), hello("shop", "cart-1")).await.unwrap();
    let before = told(&mut proxy, |_| true).await;
    let old = certify(&channel_of, Some("good"), asked("shop", "cart-1")).await.unwrap();

    // Pods that start all the while trust what is mounted at that moment.
    let (end, address, caller) = (Arc::new(AtomicBool::new(false)), control.addresses.control, api.clone());
    let calls = Arc::new(AtomicU64::new(0));
    let calling = tokio::spawn({
        let (end, calls) = (end.clone(), calls.clone());
        async move {
            while !end.load(Ordering::SeqCst) {
                drop(channel(address, &mounted(&caller).unwrap()).await);
                calls.fetch_add(1, Ordering::SeqCst);
            }
        }
    });

    // New leaves of the same root.
    annotate(&api, "weft.mesh/renew-before", "monday");
    let renew = told(&mut proxy, |trust| trust.renew_before != 0).await;
    assert_eq!((&renew.roots, &renew.issuer), (&before.roots, &before.issuer));

    // A new root: trusted first, signing later.
    annotate(&api, "weft.mesh/rotate-root", "tuesday");
    let both = told(&mut proxy, |trust| trust.roots.len() == 2).await;
    assert_eq!(both.issuer, before.issuer);
    let since = std::time::Instant::now();
    let switched = told(&mut proxy, |trust| trust.issuer != before.issuer).await;
    assert!(since.elapsed() > Duration::from_millis(900), "{:?}", since.elapsed());
    assert_eq!(switched.roots, both.roots);
    assert_eq!(roots(&mounted(&api).unwrap()), 2, "before anything is signed below it, all pods have the new root");
    let webhook = api.get("apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations", "", "weft-injector").unwrap();
    let bundle =
        base64::engine::general_purpose::STANDARD.decode(webhook["webhooks"][0]["clientConfig"]["caBundle"].as_str().unwrap());
    assert_eq!(roots(&String::from_utf8(bundle.unwrap()).unwrap()), 2);
    let new = certify(&channel_of, Some("good"), asked("shop", "cart-1")).await.unwrap();
    assert_ne!(key_id(&new.chain[0]), key_id(&old.chain[0]));
    for chain in [&old.chain, &new.chain] {
        verify(chain, &switched.roots, SystemTime::now()).unwrap();
    }
    verify(&new.chain, &before.roots, SystemTime::now()).unwrap_err();
    eventually("the serving certificate is signed anew", || {
        let secret = api.get(SECRETS, "weft-system", "weft-control-serving")?;
        (key_id(&weft_control_der(&text(&secret, "tls.crt"))) == key_id(&new.chain[0])).then_some(())
    })
    .await;

    // The one proxy that there is tells that it has moved: the old root is not waited for any longer.
    let state =
        CertificateState { issuer: format!("CN=x ({})", key_id(&new.chain[0])), not_after: 1, ..CertificateState::default() };
    let report = Report { certificate: Some(state), ..Report::default() };
    proxy.send.send(ProxyMessage { kind: Some(proxy_message::Kind::Report(report)) }).await.unwrap();
    annotate(&api, "example.com/look", "again");
    tokio::time::sleep(Duration::from_secs(3)).await;
    annotate(&api, "example.com/look", "once more");
    let alone = told(&mut proxy, |trust| trust.roots.len() == 1).await;
    verify(&new.chain, &alone.roots, SystemTime::now()).unwrap();
    verify(&old.chain, &alone.roots, SystemTime::now()).unwrap_err();
    eventually("no namespace has the old root", || (roots(&mounted(&api)?) == 1).then_some(())).await;
    end.store(true, Ordering::SeqCst);
    calling.await.expect("no call failed");
    assert!(calls.load(Ordering::SeqCst) > 20);
    assert!(metrics(control.addresses.metrics).contains("weft_trusted_roots 1"));
    let events: Vec<_> = api.list("api/v1/events").iter().map(|e| e["reason"].as_str().unwrap_or_default().to_owned()).collect();
    assert!(events.contains(&"AuthorityChanged".to_owned()), "{events:?}");
    let text = api.get(SECRETS, "weft-system", "weft-ca").unwrap()["metadata"]["annotations"].clone();
    assert_eq!(text["example.com/look"], "once more", "what others wrote stays");
}

fn weft_control_der(pem: &str) -> Vec<u8> {
    use rustls_pki_types::pem::PemObject as _;
    rustls_pki_types::CertificateDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec()
}

/// An authority of somebody else.
fn ca(name: &str, above: Option<&Issuer<'_, KeyPair>>) -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let key = KeyPair::generate().unwrap();
    match above {
        Some(above) => CertifiedIssuer::signed_by(params, key, above).unwrap(),
        None => CertifiedIssuer::self_signed(params, key).unwrap(),
    }
}

fn secret(name: &str, entries: &[(&str, String)]) -> Value {
    let encode = |text: &String| base64::engine::general_purpose::STANDARD.encode(text);
    let data: serde_json::Map<String, Value> =
        entries.iter().map(|(key, text)| ((*key).to_owned(), json!(encode(text)))).collect();
    json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": "weft-system"}, "data": data})
}

fn cacerts(issuing: &CertifiedIssuer<'_, KeyPair>, root: &CertifiedIssuer<'_, KeyPair>) -> Value {
    secret(
        "cacerts",
        &[
            ("ca-cert.pem", issuing.pem()),
            ("ca-key.pem", issuing.key().serialize_pem()),
            ("cert-chain.pem", issuing.pem()),
            ("root-cert.pem", root.pem()),
        ],
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_users_authority_and_what_happens_when_it_breaks() {
    let api = FakeApi::start().await;
    let dir = tempfile::tempdir().unwrap();
    api.put("api/v1/pods", meshed("shop", "cart-1"));
    api.token("good", "shop", "cart", Some("cart-1"));
    let root = ca("Example root", None);
    let (one, two) = (ca("One", Some(&root)), ca("Two", Some(&root)));
    api.put(SECRETS, cacerts(&one, &root));
    let first = control(&api, dir.path(), &["--rotation-delay=1"]).await;
    ready(first.addresses.metrics).await;
    let channel_of = channel(first.addresses.control, &root.pem()).await;
    let mut proxy = attach(&channel_of, Some("good"), hello("shop", "cart-1")).await.unwrap();
    let trust = told(&mut proxy, |_| true).await;
    assert_eq!(trust.roots, [root.der().to_vec()]);
    let response = certify(&channel_of, Some("good"), asked("shop", "cart-1")).await.unwrap();
    assert_eq!((response.chain.len(), response.chain[1].as_slice()), (2, one.der().as_ref()));
    assert_eq!(facts(&response.chain[0]).0, "spiffe://cluster.local/ns/shop/sa/cart");
    verify(&response.chain, &trust.roots, SystemTime::now()).unwrap();
    assert_eq!(text(&api.get(SECRETS, "weft-system", "weft-ca").unwrap(), "tls.key"), "", "no root of our own is made");

    // Another intermediate: in force without a restart, and proxies are told.
    api.put(SECRETS, cacerts(&two, &root));
    let trust = told(&mut proxy, |after| after.issuer != trust.issuer).await;
    assert_eq!(trust.issuer, weft_control::ca::issue::fingerprint(two.der()));
    let response = certify(&channel_of, Some("good"), asked("shop", "cart-1")).await.unwrap();
    assert_eq!(response.chain[1].as_slice(), two.der().as_ref());

    // A broken one: said by Secret and key, and the last good one goes on.
    let mut broken = cacerts(&one, &root);
    broken["data"]["ca-key.pem"] = json!(base64::engine::general_purpose::STANDARD.encode("no key"));
    api.put(SECRETS, broken.clone());
    let event =
        eventually("an event", || api.list("api/v1/events").into_iter().find(|e| e["reason"] == "AuthorityRefused")).await;
    assert_eq!(event["involvedObject"]["name"], "cacerts");
    assert!(event["message"].as_str().unwrap().contains("secret weft-system/cacerts, key ca-key.pem"), "{event}");
    assert!(metrics(first.addresses.metrics).contains("weft_certificate_authority_good 0"));
    let response = certify(&channel_of, Some("good"), asked("shop", "cart-1")).await.unwrap();
    assert_eq!(response.chain[1].as_slice(), two.der().as_ref());
    drop(proxy);
    first.shutdown().await;

    // Over a restart nothing can sign, which is said; all else is served.
    let second = control(&api, dir.path(), &["--rotation-delay=1"]).await;
    ready(second.addresses.metrics).await;
    let channel_of = channel(second.addresses.control, &root.pem()).await;
    let mut proxy = attach(&channel_of, Some("good"), hello("shop", "cart-1")).await.unwrap();
    let trust = told(&mut proxy, |_| true).await;
    assert_eq!(trust.roots, [root.der().to_vec()]);
    let status = certify(&channel_of, Some("good"), asked("shop", "cart-1")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("cacerts, key ca-key.pem"), "{status}");

    // Mended, with another root even: that is made known first.
    let other = ca("Other root", None);
    let three = ca("Three", Some(&other));
    api.put(SECRETS, cacerts(&three, &other));
    let both = told(&mut proxy, |trust| trust.roots.len() == 2).await;
    assert_eq!(both.issuer, trust.issuer);
    let switched = told(&mut proxy, |trust| trust.issuer != both.issuer).await;
    let after = certify(&channel_of, Some("good"), asked("shop", "cart-1")).await.unwrap();
    assert_eq!(after.chain[1].as_slice(), three.der().as_ref());
    verify(&after.chain, &switched.roots, SystemTime::now()).unwrap();
    verify(&response.chain, &switched.roots, SystemTime::now()).unwrap();
    assert!(metrics(second.addresses.metrics).contains("weft_certificate_authority_good 1"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_authority_at_the_first_start_is_waited_for_and_a_lost_one_is_not_replaced() {
    let api = FakeApi::start().await;
    let root = ca("Root", None);
    let issuing = ca("Issuing", Some(&root));
    let good = cacerts(&issuing, &root);
    let mut broken = good.clone();
    broken["data"].as_object_mut().unwrap().remove("root-cert.pem");
    api.put(SECRETS, broken);
    let store = Store::Secrets { client: api.client(), namespace: "weft-system".into() };
    let plan = Plan { delay: Duration::from_secs(1), ..plan(Duration::from_secs(3600)) };
    let opening = tokio::spawn({
        let (store, plan) = (store.clone(), plan.clone());
        async move { replica_of(store, plan, weft_control::ca::authority::system_clock()).await }
    });
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert!(!opening.is_finished() && api.get(SECRETS, "weft-system", "weft-ca").is_none(), "nothing takes its place");
    api.put(SECRETS, good);
    let replica = opening.await.unwrap();
    let (leader, keeper) = (watch::Sender::new(true), replica.keeper.clone());
    let follows = leader.subscribe();
    tokio::spawn(async move { Box::pin(keeper.run(follows, Outside::default())).await });
    let before = replica.authority();
    assert_eq!(before.issuer, weft_control::ca::issue::fingerprint(issuing.der()));

    // Deleted, perhaps for a moment: the last good one signs on.
    api.remove(SECRETS, "weft-system", "cacerts");
    let problem = || Some(replica.keeper.status().borrow().problem.clone()).filter(|problem| !problem.is_empty());
    let problem = eventually("it is said", problem).await;
    assert!(problem.contains("secret cacerts is gone") && problem.contains("weft identity rotate --root"), "{problem}");
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(replica.authority().same(&before));
    // For good, when somebody says so: back to a root of our own, in the usual order.
    annotate(&api, "weft.mesh/rotate-root", "x");
    eventually("both are trusted", || (replica.authority().roots.len() == 2).then_some(())).await;
    eventually("ours signs", || (replica.authority().issuer != before.issuer).then_some(())).await;
    let status = replica.keeper.status().borrow().clone();
    assert_eq!((status.problem.as_str(), status.state.secret.as_str()), ("", ""));
    assert!(status.issuer.contains("Weft root"), "{status:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_of_cert_manager_by_name_is_waited_for() {
    let api = FakeApi::start().await;
    let dir = tempfile::tempdir().unwrap();
    api.put("api/v1/pods", meshed("shop", "cart-1"));
    api.token("good", "shop", "cart", Some("cart-1"));
    let control = control(&api, dir.path(), &["--ca-secret=mesh-ca"]).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(api.get(SECRETS, "weft-system", "weft-ca").is_none(), "nothing is put in its place");
    let root = ca("Root", None);
    let issuing = ca("Issuing", Some(&root));
    api.put(
        SECRETS,
        secret("mesh-ca", &[("tls.crt", issuing.pem()), ("tls.key", issuing.key().serialize_pem()), ("ca.crt", root.pem())]),
    );
    ready(control.addresses.metrics).await;
    let channel = channel(control.addresses.control, &root.pem()).await;
    let response = certify(&channel, Some("good"), asked("shop", "cart-1")).await.unwrap();
    assert_eq!(response.chain[1].as_slice(), issuing.der().as_ref());
}

struct Time(Arc<AtomicU64>, SystemTime);

impl Time {
    fn new() -> Self {
        Self(Arc::default(), SystemTime::now())
    }

    fn clock(&self) -> Clock {
        let (passed, start) = (self.0.clone(), self.1);
        Arc::new(move || start + Duration::from_secs(passed.load(Ordering::SeqCst)))
    }

    fn now(&self) -> SystemTime {
        (self.clock())()
    }

    fn hours(&self, hours: u64) {
        self.0.store(hours * 3600, Ordering::SeqCst);
    }
}

/// A control plane that begins, leads, and ends again; returns what it says then.
async fn life(api: &FakeApi, time: &Time, plan: &Plan, until: impl Fn(&str, &str) -> bool) -> crate::authority::Replica {
    let store = Store::Secrets { client: api.client(), namespace: "weft-system".into() };
    let replica = replica_of(store, plan.clone(), time.clock()).await;
    let (leader, keeper) = (watch::Sender::new(true), replica.keeper.clone());
    let follows = leader.subscribe();
    let task = tokio::spawn(async move { Box::pin(keeper.run(follows, Outside::default())).await });
    eventually("what is waited for", || {
        let state = replica.keeper.status().borrow().state.clone();
        until(&state.issuer, &state.bundle()).then_some(())
    })
    .await;
    task.abort();
    replica
}

fn leaf(replica: &crate::authority::Replica, at: SystemTime) -> Vec<Vec<u8>> {
    let key = weft_control::ca::signer::ProvedKey::of(&KeyPair::generate().unwrap()).unwrap();
    let signer = replica.authority().signer.clone().unwrap();
    let leaf = signer.sign(&key, "spiffe://cluster.local/ns/shop/sa/cart", at, Duration::from_secs(24 * 3600)).unwrap();
    leaf.chain.iter().map(|certificate| certificate.to_vec()).collect()
}

fn trusted(replica: &crate::authority::Replica) -> Vec<Vec<u8>> {
    replica.authority().roots.iter().map(|root| root.to_vec()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_plane_that_is_away_for_twenty_hours_is_missed_by_nobody() {
    let (api, time) = (FakeApi::start().await, Time::new());
    let plan = plan(Duration::from_secs(90 * 24 * 3600));
    let first = life(&api, &time, &plan, |_, _| true).await;
    // Renewed at half life, just before it goes away.
    let leaf_of_a = leaf(&first, time.now());
    let a = first.keeper.status().borrow().state.issuer.clone();
    time.hours(20);
    let second = life(&api, &time, &plan, |_, _| true).await;
    assert_eq!(second.keeper.status().borrow().state.issuer, a);
    verify(&leaf_of_a, &trusted(&second), time.now()).expect("what was issued 20 hours ago is still good");
    verify(&leaf(&second, time.now()), &trusted(&second), time.now()).unwrap();

    // The same in the middle of a rotation: it goes on where it was, and no leaf is left alone.
    annotate(&api, "weft.mesh/rotate-root", "x");
    let third = life(&api, &time, &plan, |_, bundle| roots(bundle) == 2).await;
    let late = leaf(&third, time.now());
    time.hours(40);
    verify(&late, &trusted(&third), time.now()).unwrap();
    let fourth = life(&api, &time, &plan, |issuer, _| issuer != a).await;
    verify(&late, &trusted(&fourth), time.now()).expect("a leaf of the old root, 20 hours old");
    verify(&leaf(&fourth, time.now()), &trusted(&third), time.now())
        .expect("whoever knows the old bundle only knows the new root");
    // A day and an hour after the last leaf, and not before.
    time.hours(64);
    assert_eq!(trusted(&life(&api, &time, &plan, |_, _| true).await).len(), 2);
    time.hours(66);
    let last = life(&api, &time, &plan, |_, bundle| roots(bundle) == 1).await;
    verify(&leaf(&last, time.now()), &trusted(&last), time.now()).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn replicas_agree_whoever_leads() {
    let api = FakeApi::start().await;
    let plan = Plan { delay: Duration::from_secs(2), ..plan(Duration::from_secs(3600)) };
    let mut replicas = Vec::new();
    for n in 0..3 {
        let store = Store::Secrets { client: api.client(), namespace: "weft-system".into() };
        let replica = replica_of(store, plan.clone(), weft_control::ca::authority::system_clock()).await;
        let (leader, keeper) = (watch::Sender::new(n == 0), replica.keeper.clone());
        let follows = leader.subscribe();
        tokio::spawn(async move { Box::pin(keeper.run(follows, Outside::default())).await });
        replicas.push((replica, leader));
    }
    let agreed = |wanted: &dyn Fn(&crate::authority::Replica) -> bool| {
        let first = replicas[0].0.authority();
        replicas.iter().all(|(replica, _)| wanted(replica) && replica.authority().same(&first)).then(|| first.issuer.clone())
    };
    let before = eventually("they agree", || agreed(&|_| true)).await;
    annotate(&api, "weft.mesh/rotate-root", "x");
    eventually("all trust both", || agreed(&|r| roots(&r.bundle()) == 2)).await;
    // The leader goes in the middle; for a moment nobody leads, then two do.
    replicas[0].1.send_replace(false);
    tokio::time::sleep(Duration::from_millis(300)).await;
    replicas[1].1.send_replace(true);
    replicas[2].1.send_replace(true);
    let after = eventually("all have switched", || agreed(&|r| r.authority().issuer != before)).await;
    assert_ne!(after, before);
    for (replica, _) in &replicas {
        let signer = replica.authority().signer.clone().unwrap();
        assert_eq!(signer.fingerprint().to_vec(), after);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_kubernetes_files_ask_for_a_rotation() {
    let dir = tempfile::tempdir().unwrap();
    let plan = Plan {
        delay: Duration::from_secs(1),
        secret: weft_control::ca::keeper::UserSecret::None,
        ..plan(Duration::from_secs(3600))
    };
    let store = Store::Folder(dir.path().join("state"));
    let replica = replica_of(store.clone(), plan.clone(), weft_control::ca::authority::system_clock()).await;
    let (leader, keeper) = (watch::Sender::new(true), replica.keeper.clone());
    let follows = leader.subscribe();
    let task = tokio::spawn(async move { Box::pin(keeper.run(follows, Outside::default())).await });
    let before = replica.authority();
    std::fs::write(dir.path().join("state/renew-before"), "monday\n").unwrap();
    std::fs::write(dir.path().join("state/rotate-root"), "monday\n").unwrap();
    eventually("another root signs", || (replica.authority().issuer != before.issuer).then_some(())).await;
    let after = replica.authority();
    assert!(after.renew_before > 0 && after.roots.len() == 2);
    task.abort();
    let again = replica_of(store, plan, weft_control::ca::authority::system_clock()).await;
    assert!(again.authority().same(&after), "a restart goes on there");
}

/// Ten thousand streams from one address: its share is served, the rest is told so, and everybody else is served as before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_streams_is_refused() {
    let api = FakeApi::start().await;
    let dir = tempfile::tempdir().unwrap();
    for n in 0..20 {
        api.put("api/v1/pods", pod("shop", &format!("cart-{n}"), "cart"));
        api.token(&format!("token-{n}"), "shop", "cart", Some(&format!("cart-{n}")));
    }
    let control = control(&api, dir.path(), &["--max-streams-per-address=50"]).await;
    ready(control.addresses.metrics).await;
    let bundle = crate::discovery::bundle(&api);
    let mut held = Vec::new();
    // One pod has no more than eight of them.
    let first = channel(control.addresses.control, &bundle).await;
    let status = loop {
        match attach(&first, Some("token-0"), hello("shop", "cart-0")).await {
            Ok(proxy) => held.push(proxy),
            Err(status) => break status,
        }
    };
    assert_eq!((held.len(), status.code()), (8, Code::ResourceExhausted), "{status}");
    assert!(status.message().contains("of this pod"), "{status}");
    let mut refused = 0;
    for round in 0..100 {
        let channel = channel(control.addresses.control, &bundle).await;
        let attempts = (0..100).map(|n| {
            let (channel, n) = (channel.clone(), (n + round) % 20);
            async move { attach(&channel, Some(&format!("token-{n}")), hello("shop", &format!("cart-{n}"))).await }
        });
        for result in futures::future::join_all(attempts).await {
            match result {
                Ok(proxy) => held.push(proxy),
                Err(status) => {
                    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
                    refused += 1;
                }
            }
        }
    }
    assert_eq!(held.len(), 50);
    assert_eq!(refused, 10_000 - 42);
    assert_eq!(crate::discovery::http_get(control.addresses.metrics, "/healthz/ready").await.unwrap().0, 200);
    let text = metrics(control.addresses.metrics);
    assert!(text.contains("weft_discovery_streams 50") && text.contains("reason=\"too-many-streams-of-address\"}"), "{text}");
    held.truncate(10);
    let channel = channel(control.addresses.control, &bundle).await;
    eventually("places are given back", || {
        metrics(control.addresses.metrics).contains("weft_discovery_streams 10").then_some(())
    })
    .await;
    assert!(attach(&channel, Some("token-9"), hello("shop", "cart-9")).await.is_ok());
}
