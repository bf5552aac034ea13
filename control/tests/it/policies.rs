//! Policies, end to end: a whole control plane, an API server, a proxy's stream.

use crate::common::{FakeApi, eventually};
use crate::discovery::{Proxy, attach, bundle, channel, control, hello, http_get, pod, ready};
use serde_json::{Value, json};
use std::time::Duration;
use weft_api::wire::{Inbound, MtlsMode};

const AUTHORIZATION: &str = "apis/security.istio.io/v1/authorizationpolicies";
const PEER: &str = "apis/security.istio.io/v1/peerauthentications";
const REQUEST: &str = "apis/security.istio.io/v1/requestauthentications";

fn policy(kind: &str, namespace: &str, name: &str, generation: i64, spec: Value) -> Value {
    json!({"apiVersion": "security.istio.io/v1", "kind": kind, "spec": spec,
        "metadata": {"name": name, "namespace": namespace, "generation": generation, "uid": format!("uid-of-{name}")}})
}

impl Proxy {
    /// Waits for a configuration that is as it should be; others may come before.
    async fn until(&mut self, what: &str, check: impl Fn(&Inbound) -> bool) -> Inbound {
        for _ in 0..20 {
            let (_, inbound) = self.next().await;
            if check(&inbound) {
                return inbound;
            }
        }
        panic!("never: {what}");
    }
}

fn condition(api: &FakeApi, resource: &str, name: &str) -> Option<Value> {
    let object = api.get(resource, "shop", name)?;
    object.pointer("/status/conditions")?.as_array()?.iter().find(|c| c["type"] == "Accepted").cloned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn policies_reach_the_proxies_that_they_are_for() {
    let api = FakeApi::start().await;
    let dir = tempfile::tempdir().unwrap();
    api.put("api/v1/pods", pod("shop", "cart-1", "cart"));
    api.token("good", "shop", "cart", Some("cart-1"));
    let control = control(&api, dir.path(), &[]).await;
    ready(control.addresses.metrics).await;
    let channel = channel(control.addresses.control, &bundle(&api)).await;
    let mut proxy = attach(&channel, Some("good"), hello("shop", "cart-1")).await.unwrap();
    let (_, inbound) = proxy.next().await;
    assert_eq!((inbound.mtls(), inbound.authorization.len(), inbound.trust_domains.len()), (MtlsMode::Permissive, 0, 1));

    // Of the root namespace, of the pod's own, and none of its business.
    api.put(PEER, policy("PeerAuthentication", "weft-system", "mesh", 1, json!({"mtls": {"mode": "STRICT"}})));
    proxy.until("STRICT holds", |i| i.mtls() == MtlsMode::Strict).await;
    api.put(AUTHORIZATION, policy("AuthorizationPolicy", "other", "nothing", 1, json!({})));
    proxy.silent(Duration::from_millis(300)).await;
    api.put(
        AUTHORIZATION,
        policy(
            "AuthorizationPolicy",
            "shop",
            "one",
            1,
            json!({"action": "DENY", "rules": [{"to": [{"operation": {"methods": ["PUT"]}}]}]}),
        ),
    );
    proxy.until("the policy holds", |i| i.authorization.len() == 1 && i.authorization[0].rules.len() == 1).await;
    eventually("its status says so", || {
        condition(&api, AUTHORIZATION, "one").filter(|c| c["status"] == "True" && c["observedGeneration"] == 1)
    })
    .await;

    // A version that can't be understood changes nothing for the proxy, and is told.
    api.put(AUTHORIZATION, policy("AuthorizationPolicy", "shop", "one", 2, json!({"action": "DENY", "rulez": []})));
    let said = eventually("its status says why", || {
        condition(&api, AUTHORIZATION, "one").filter(|c| c["status"] == "False" && c["observedGeneration"] == 2)
    })
    .await;
    assert_eq!(said["reason"], "Invalid");
    assert!(said["message"].as_str().unwrap().contains("spec.rulez"), "{said}");
    proxy.silent(Duration::from_millis(300)).await;
    let (_, metrics) = http_get(control.addresses.metrics, "/metrics").await.unwrap();
    assert!(metrics.contains("weft_bad_policies 1"), "{metrics}");

    // One that never was good refuses.
    api.put(AUTHORIZATION, policy("AuthorizationPolicy", "shop", "two", 1, json!({"action": "DENY", "rulez": []})));
    proxy.until("it refuses", |i| i.authorization.len() == 2 && i.authorization[1].broken.contains("spec.rulez")).await;
    api.remove(AUTHORIZATION, "shop", "two");
    proxy.until("it is gone", |i| i.authorization.len() == 1).await;

    // Who is content is not written to again.
    let writes = api.requests("/status");
    api.put("api/v1/pods", pod("shop", "cart-2", "cart"));
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(api.requests("/status"), writes);

    // The settings name another root namespace.
    std::fs::write(dir.path().join("config.yaml"), "mesh: {rootNamespace: istio-system}\n").unwrap();
    proxy.until("the other's policies don't hold", |i| i.mtls() == MtlsMode::Permissive).await;
    api.put(PEER, policy("PeerAuthentication", "istio-system", "mesh", 1, json!({"mtls": {"mode": "STRICT"}})));
    proxy.until("those of the new one do", |i| i.mtls() == MtlsMode::Strict).await;
    drop(proxy);
    control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn definitions_of_policies_may_come_later() {
    let api = FakeApi::start().await;
    let dir = tempfile::tempdir().unwrap();
    api.not_served("security.istio.io", true);
    api.put("api/v1/pods", pod("shop", "cart-1", "cart"));
    api.token("good", "shop", "cart", Some("cart-1"));
    let control = control(&api, dir.path(), &[]).await;
    ready(control.addresses.metrics).await;
    let channel = channel(control.addresses.control, &bundle(&api)).await;
    let mut proxy = attach(&channel, Some("good"), hello("shop", "cart-1")).await.unwrap();
    assert_eq!(proxy.next().await.1.mtls(), MtlsMode::Permissive);
    api.put(PEER, policy("PeerAuthentication", "shop", "p", 1, json!({"mtls": {"mode": "STRICT"}})));
    proxy.silent(Duration::from_millis(300)).await;
    api.not_served("security.istio.io", false);
    let (_, inbound) = tokio::time::timeout(Duration::from_secs(15), proxy.patient()).await.expect("noticed in time");
    assert_eq!(inbound.mtls(), MtlsMode::Strict);
    // A server that forgets for a moment that it serves them takes no policy away.
    api.not_served("security.istio.io", true);
    api.forget();
    api.cut_watches();
    proxy.silent(Duration::from_secs(2)).await;
    drop(proxy);
    control.shutdown().await;
}

/// An issuer on this machine. What is answered is what the sender says.
async fn issuer() -> (String, tokio::sync::watch::Sender<Option<&'static str>>) {
    use axum::http::StatusCode;
    use axum::response::IntoResponse as _;
    let answer = tokio::sync::watch::Sender::<Option<&'static str>>::new(None);
    let says = answer.subscribe();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/keys", listener.local_addr().unwrap());
    let keys = move || {
        let now = *says.borrow();
        async move { now.map_or_else(|| StatusCode::SERVICE_UNAVAILABLE.into_response(), axum::response::IntoResponse::into_response) }
    };
    let router = axum::Router::new().route("/keys", axum::routing::get(keys));
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    (url, answer)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_of_issuers_come_from_the_control_plane() {
    const KEYS: &str = r#"{"keys":[{"kty":"RSA","n":"AQAB","e":"AQAB"}]}"#;
    let dir = tempfile::tempdir().unwrap();
    let manifests = dir.path().join("manifests");
    std::fs::create_dir(&manifests).unwrap();
    let (url, answer) = issuer().await;
    let rule = json!({"jwtRules": [{"issuer": "me", "jwksUri": url}]});
    let objects = [pod("shop", "cart-1", "cart"), policy("RequestAuthentication", "shop", "tokens", 1, rule)];
    std::fs::write(manifests.join("all.yaml"), objects.map(|o| o.to_string()).join("\n---\n")).unwrap();
    let (control, mut proxy) = crate::discovery::of_manifests(dir.path(), &manifests, "shop", "cart-1").await;

    // The issuer is away: its tokens are refused, and it is said why.
    let (_, inbound) = proxy.next().await;
    let [rule] = &inbound.jwt[..] else { panic!("{inbound:?}") };
    assert!(rule.jwks.is_empty() && rule.jwks_error.contains("503"), "{rule:?}");
    answer.send_replace(Some(KEYS));
    let inbound = proxy.until("the keys are there", |i| i.jwt.len() == 1 && !i.jwt[0].jwks.is_empty()).await;
    assert_eq!(
        (inbound.jwt[0].jwks.as_str(), inbound.jwt[0].jwks_error.as_str(), inbound.jwt[0].policy.as_str()),
        (KEYS, "", "shop/tokens")
    );
    drop(proxy);
    control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_gives_nobody_the_control_planes_own_address() {
    let api = FakeApi::start().await;
    let dir = tempfile::tempdir().unwrap();
    api.put("api/v1/pods", pod("shop", "cart-1", "cart"));
    api.token("good", "shop", "cart", Some("cart-1"));
    let (url, answer) = issuer().await;
    answer.send_replace(Some(r#"{"keys":[{"kty":"RSA","n":"AQAB","e":"AQAB"}]}"#));
    api.put(
        REQUEST,
        policy("RequestAuthentication", "shop", "tokens", 1, json!({"jwtRules": [{"issuer": "me", "jwksUri": url}]})),
    );
    let control = control(&api, dir.path(), &[]).await;
    ready(control.addresses.metrics).await;
    let channel = channel(control.addresses.control, &bundle(&api)).await;
    let mut proxy = attach(&channel, Some("good"), hello("shop", "cart-1")).await.unwrap();
    let inbound = proxy.until("the rule is there", |i| i.jwt.len() == 1).await;
    assert!(inbound.jwt[0].jwks.is_empty() && inbound.jwt[0].jwks_error.contains("this machine itself"), "{:?}", inbound.jwt[0]);
    eventually("its status says why", || condition(&api, REQUEST, "tokens").filter(|c| c["reason"] == "KeysNotAvailable")).await;
    drop(proxy);
    control.shutdown().await;
}
