//! What the leading replica keeps right: caBundle, trust bundles, and the report of missed pods.

use crate::common::{FakeApi, eventually};
use base64::Engine as _;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use weft_control::events::{self, Events};
use weft_control::index::{Index, publisher};
use weft_control::keep;
use weft_control::metrics::{InNamespace, Metrics};
use weft_control::model::Key;
use weft_control::source::kube::{KINDS, watch_all};
use weft_webhook::Settings;

const WEBHOOKS: &str = "apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations";
const CONFIG_MAPS: &str = "api/v1/configmaps";
const BUNDLE: &str = "-----BEGIN CERTIFICATE-----\nabc\n-----END CERTIFICATE-----\n";

struct World {
    api: FakeApi,
    index: Arc<Index>,
    metrics: Arc<Metrics>,
    leader: watch::Sender<bool>,
    settings: watch::Sender<Arc<Settings>>,
    tasks: JoinSet<()>,
}

async fn world() -> World {
    let api = FakeApi::start().await;
    let (index, metrics) = (Arc::new(Index::new(KINDS)), Arc::new(Metrics::default()));
    let mut tasks = JoinSet::new();
    tasks.spawn(publisher(index.clone()));
    watch_all(&api.client(), &index, &metrics, false, &mut tasks);
    World { api, index, metrics, leader: watch::Sender::new(true), settings: watch::Sender::new(Arc::default()), tasks }
}

fn namespace(name: &str, annotations: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "annotations": annotations}})
}

fn injector(bundle: Value) -> Value {
    json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration", "metadata": {"name": "weft-injector"},
    "webhooks": [
        {"name": "other.example", "clientConfig": {"service": {"namespace": "x", "name": "y"}}},
        {"name": "injector.weft.mesh", "clientConfig": {"caBundle": bundle, "service": {"namespace": "weft-system", "name": "weft-control"}}}
    ]})
}

#[tokio::test]
async fn ca_bundle_is_written_and_kept() {
    let mut world = world().await;
    let api = world.api.clone();
    api.put(WEBHOOKS, injector(Value::Null));
    let service = Key::new("weft-system", "weft-control");
    let (bundle, spread) = (watch::Sender::new(Arc::from(BUNDLE)), watch::Sender::new(Arc::from("")));
    world.tasks.spawn(keep::ca_bundle::run(
        api.client(),
        service,
        bundle.subscribe(),
        spread.clone(),
        world.index.clone(),
        world.leader.subscribe(),
        world.metrics.clone(),
    ));
    let right = json!(base64::engine::general_purpose::STANDARD.encode(BUNDLE));
    let is_right = || {
        let object = api.get(WEBHOOKS, "", "weft-injector")?;
        (object["webhooks"][1]["clientConfig"]["caBundle"] == right).then_some(object)
    };
    let object = eventually("caBundle is written", is_right).await;
    assert!(object["webhooks"][0]["clientConfig"]["caBundle"].is_null(), "not ours");
    for drift in [Value::Null, json!("bm9uc2Vuc2U="), json!("no base64!")] {
        api.put(WEBHOOKS, injector(drift.clone()));
        eventually(&format!("drift {drift} is corrected"), is_right).await;
    }
    // Deleted and made anew, as a reinstall does.
    api.remove(WEBHOOKS, "", "weft-injector");
    api.put(WEBHOOKS, injector(Value::Null));
    eventually("a new configuration is written", is_right).await;
    // Who does not lead leaves it alone.
    world.leader.send_replace(false);
    tokio::time::sleep(Duration::from_millis(100)).await;
    api.put(WEBHOOKS, injector(Value::Null));
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(is_right().is_none());
    world.leader.send_replace(true);
    eventually("the next leader corrects it", is_right).await;
    // Another root joins: all configurations get both, and that is told.
    assert_eq!(&**spread.borrow(), BUNDLE);
    let both = format!("{BUNDLE}{BUNDLE}");
    bundle.send_replace(Arc::from(both.as_str()));
    let encoded = json!(base64::engine::general_purpose::STANDARD.encode(&both));
    eventually("both roots are written", || {
        (api.get(WEBHOOKS, "", "weft-injector")?["webhooks"][1]["clientConfig"]["caBundle"] == encoded).then_some(())
    })
    .await;
    eventually("and it is told", || (**spread.borrow() == both).then_some(())).await;
}

#[tokio::test]
async fn trust_bundles_where_they_are_wanted_and_kept() {
    let mut world = world().await;
    let api = world.api.clone();
    for (name, annotations) in
        [("shop", json!({"inject": "enabled"})), ("plain", json!({})), ("kube-system", json!({"inject": "enabled"}))]
    {
        api.put("api/v1/namespaces", namespace(name, annotations));
    }
    let (bundle, spread) = (watch::Sender::new(Arc::from(BUNDLE)), watch::Sender::new(Arc::from("")));
    world.tasks.spawn(keep::trust_bundle::run(
        api.client(),
        bundle.subscribe(),
        spread.clone(),
        world.index.clone(),
        world.settings.subscribe(),
        world.leader.subscribe(),
        world.metrics.clone(),
    ));
    let right = |namespace: &'static str| {
        let api = api.clone();
        move || {
            let map = api.get(CONFIG_MAPS, namespace, "weft-trust-bundle")?;
            (map["data"]["root.pem"] == BUNDLE).then_some(())
        }
    };
    eventually("the namespace that asks has it", right("shop")).await;
    // Drift and deletion.
    api.put(
        CONFIG_MAPS,
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "weft-trust-bundle", "namespace": "shop"},
        "data": {"root.pem": "other"}}),
    );
    eventually("drift is corrected", right("shop")).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    api.remove(CONFIG_MAPS, "shop", "weft-trust-bundle");
    eventually("a deleted one comes back", right("shop")).await;
    // One that was there before and says something else.
    api.put(
        CONFIG_MAPS,
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "weft-trust-bundle", "namespace": "late"},
        "data": {"root.pem": "old"}}),
    );
    // A pod that asks by itself, in a namespace that does not.
    api.put("api/v1/namespaces", namespace("late", json!({})));
    api.put("api/v1/pods", json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "late", "annotations": {"inject": "enabled"}},
        "spec": {"containers": [{"name": "app"}]}}));
    eventually("a pod that asks", right("late")).await;
    // A namespace that asks later.
    api.put("api/v1/namespaces", namespace("plain", json!({"linkerd.io/inject": "enabled"})));
    eventually("a namespace that asks later", right("plain")).await;
    assert!(api.get(CONFIG_MAPS, "kube-system", "weft-trust-bundle").is_none());
    // Another root joins: every namespace gets both, and only then it is told.
    eventually("all have it", || (&**spread.borrow() == BUNDLE).then_some(())).await;
    let both = format!("{BUNDLE}{BUNDLE}");
    api.fail("PATCH /api/v1/namespaces/late/configmaps", true);
    bundle.send_replace(Arc::from(both.as_str()));
    let has_both = |namespace: &str| api.get(CONFIG_MAPS, namespace, "weft-trust-bundle").unwrap()["data"]["root.pem"] == both;
    eventually("both roots are written where that goes", || (has_both("shop") && has_both("plain")).then_some(())).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(&**spread.borrow(), BUNDLE, "one namespace lacks it");
    api.fail("PATCH /api/v1/namespaces/late/configmaps", false);
    eventually("it is told", || (**spread.borrow() == both).then_some(())).await;
    assert!(has_both("late"));
}

#[tokio::test]
async fn missed_pods_are_reported_once_on_their_deployment() {
    let mut world = world().await;
    let api = world.api.clone();
    api.put("api/v1/namespaces", namespace("shop", json!({"inject": "enabled"})));
    api.put("apis/apps/v1/replicasets", json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": {"name": "cart-1", "namespace": "shop",
        "ownerReferences": [{"apiVersion": "apps/v1", "kind": "Deployment", "name": "cart", "uid": "deployment-uid", "controller": true}]}}));
    let pod = |name: &str| {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "shop",
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "cart-1", "uid": "rs", "controller": true}]},
            "spec": {"containers": [{"name": "app"}]}})
    };
    api.put("api/v1/pods", pod("cart-1-a"));
    api.put("api/v1/pods", pod("cart-1-b"));
    let (news, inbox) = Events::new(world.metrics.clone());
    world.tasks.spawn(events::run(inbox, api.client(), "test".into(), world.index.clone(), world.metrics.clone()));
    world.tasks.spawn(keep::missed::run(
        world.index.clone(),
        world.settings.subscribe(),
        world.leader.subscribe(),
        news,
        world.metrics.clone(),
    ));
    let event = eventually("an event", || api.list("api/v1/events").pop()).await;
    assert_eq!(event["reason"], "InjectionMissed");
    assert_eq!(event["type"], "Warning");
    assert_eq!(event["involvedObject"]["kind"], "Deployment");
    assert_eq!(event["involvedObject"]["uid"], "deployment-uid");
    let message = event["message"].as_str().unwrap();
    assert!(message.contains("2 pods") && message.contains("kubectl rollout restart deployment/cart -n shop"), "{message}");
    let gauge = world.metrics.missed_pods.get_or_create(&InNamespace { namespace: "shop".into() }).clone();
    assert_eq!(gauge.get(), 2);
    api.remove("api/v1/pods", "shop", "cart-1-a");
    eventually("the count follows", || {
        (world.metrics.missed_pods.get_or_create(&InNamespace { namespace: "shop".into() }).get() == 1).then_some(())
    })
    .await;
    assert_eq!(api.list("api/v1/events").len(), 1, "nothing new was to be said");
}

#[tokio::test]
async fn the_same_news_is_one_event() {
    let mut world = world().await;
    let api = world.api.clone();
    let (news, inbox) = Events::new(world.metrics.clone());
    world.tasks.spawn(events::run(inbox, api.client(), "test".into(), world.index.clone(), world.metrics.clone()));
    let owner = weft_control::model::Owner {
        api_version: "apps/v1".into(),
        kind: "StatefulSet".into(),
        name: "db".into(),
        uid: "u".into(),
    };
    for _ in 0..200 {
        news.send("shop", owner.clone(), events::Kind::Injected, "Sidecar injected".into());
    }
    eventually("an event", || api.list("api/v1/events").pop()).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(api.list("api/v1/events").len(), 1);
    assert_eq!(api.requests("/events"), 1);
}
