//! The API server as kube-rs uses it: reflectors, patches, conflicts, garbage collection, tokens.

use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenReview};
use k8s_openapi::api::core::v1::{ConfigMap, Pod, ServiceAccount};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, PropagationPolicy, WatchEvent, WatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::{WatchStreamExt as _, reflector, watcher};
use kube::{Client, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::time::Duration;
use weft_playground::apiserver::{Config, Server};

async fn start() -> (Server, Client) {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let server = Server::start(Config { listen: vec!["127.0.0.1:0".parse().unwrap()], ..Config::default() }).await.unwrap();
    let config = Kubeconfig::from_yaml(&server.kubeconfig(&format!("https://{}", server.addresses()[0]))).unwrap();
    let config = kube::Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await.unwrap();
    let client = Client::try_from(config).unwrap();
    (server, client)
}

fn from<T: DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn map(name: &str) -> ConfigMap {
    from(json!({"metadata": {"name": name}, "data": {"k": "v"}}))
}

fn web() -> Deployment {
    from(json!({"metadata": {"name": "web"}, "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": {
        "metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "one", "image": "x:1"}, {"name": "two", "image": "y:1"}]}}}}))
}

fn code<T: std::fmt::Debug>(result: kube::Result<T>) -> (u16, String) {
    match result.unwrap_err() {
        kube::Error::Api(status) => (status.code, status.reason.clone()),
        other => panic!("{other:?}"),
    }
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    for _ in 0..200 {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("not within ten seconds: {what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_resumes_where_it_was_and_an_old_one_is_told_to_list_again() {
    let (server, client) = start().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(client);
    let begin = maps.list(&ListParams::default()).await.unwrap().metadata.resource_version.unwrap();
    maps.create(&PostParams::default(), &map("a")).await.unwrap();
    maps.patch("a", &PatchParams::default(), &Patch::Merge(json!({"data": {"k": "w"}}))).await.unwrap();
    maps.delete("a", &DeleteParams::default()).await.unwrap();
    let mut watch = maps.watch(&WatchParams::default(), &begin).await.unwrap().boxed();
    let mut seen = Vec::new();
    while seen.len() < 3 {
        seen.push(match watch.try_next().await.unwrap().unwrap() {
            WatchEvent::Added(_) => "added",
            WatchEvent::Modified(_) => "modified",
            WatchEvent::Deleted(_) => "deleted",
            other => panic!("{other:?}"),
        });
    }
    assert_eq!(seen, ["added", "modified", "deleted"]);
    server.end_watches(true);
    let mut watch = maps.watch(&WatchParams::default(), &begin).await.unwrap().boxed();
    match watch.try_next().await.unwrap() {
        Some(WatchEvent::Error(status)) => assert_eq!((status.code, status.reason.as_str()), (410, "Expired")),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reflector_survives_a_dropped_watch_and_a_forgotten_history() {
    let (server, client) = start().await;
    for config in [watcher::Config::default(), watcher::Config::default().streaming_lists()] {
        let maps: Api<ConfigMap> = Api::default_namespaced(client.clone());
        let (store, writer) = reflector::store();
        let stream = reflector(writer, watcher(maps.clone(), config)).default_backoff().touched_objects();
        let task = tokio::spawn(stream.for_each(|_| async {}));
        let has = |name: &'static str, want: bool| {
            let store = store.clone();
            async move { until(name, async || store.state().iter().any(|m| m.name_any() == name) == want).await }
        };
        maps.create(&PostParams::default(), &map("first")).await.unwrap();
        has("first", true).await;
        server.end_watches(false);
        maps.create(&PostParams::default(), &map("second")).await.unwrap();
        has("second", true).await;
        // Gone while nobody watched, and the history that would tell is gone too: only a new list can.
        server.end_watches(false);
        maps.delete("first", &DeleteParams::default()).await.unwrap();
        server.end_watches(true);
        maps.create(&PostParams::default(), &map("third")).await.unwrap();
        has("third", true).await;
        has("first", false).await;
        maps.delete_collection(&DeleteParams::default(), &ListParams::default()).await.unwrap();
        task.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_come_in_pages_of_one_snapshot() {
    let (server, client) = start().await;
    let maps: Api<ConfigMap> = Api::namespaced(client, "kube-public");
    for name in ["a", "b", "c"] {
        maps.create(&PostParams::default(), &map(name)).await.unwrap();
    }
    let first = maps.list(&ListParams::default().limit(2)).await.unwrap();
    assert_eq!(first.items.len(), 2);
    maps.create(&PostParams::default(), &map("aa")).await.unwrap();
    let token = first.metadata.continue_.clone().unwrap();
    let rest = maps.list(&ListParams::default().limit(10).continue_token(&token)).await.unwrap();
    let names: Vec<String> = first.items.iter().chain(&rest.items).map(ResourceExt::name_any).collect();
    assert_eq!(names, ["a", "b", "c", "kube-root-ca.crt"]);
    assert_eq!(rest.metadata.resource_version, first.metadata.resource_version);
    server.end_watches(true);
    assert_eq!(code(maps.list(&ListParams::default().continue_token(&token)).await).0, 410);
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_are_guarded_by_revisions_and_names() {
    let (_server, client) = start().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(client.clone());
    let made = maps.create(&PostParams::default(), &map("a")).await.unwrap();
    assert_eq!(code(maps.create(&PostParams::default(), &map("a")).await), (409, "AlreadyExists".into()));
    maps.patch("a", &PatchParams::default(), &Patch::Merge(json!({"data": {"x": "y"}}))).await.unwrap();
    assert_eq!(code(maps.replace("a", &PostParams::default(), &made).await), (409, "Conflict".into()));
    assert_eq!(code(maps.get("b").await), (404, "NotFound".into()));
    assert_eq!(code(maps.create(&PostParams::default(), &map("Bad_Name")).await), (422, "Invalid".into()));
    let elsewhere: Api<ConfigMap> = Api::namespaced(client, "nowhere");
    assert_eq!(code(elsewhere.create(&PostParams::default(), &map("a")).await).0, 404);
    let before = maps.get("a").await.unwrap().resource_version();
    maps.patch("a", &PatchParams::default(), &Patch::Merge(json!({"data": {"x": "y"}}))).await.unwrap();
    assert_eq!(maps.get("a").await.unwrap().resource_version(), before, "a patch that changes nothing writes nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_four_patches_and_the_status() {
    let (_server, client) = start().await;
    let all: Api<Deployment> = Api::default_namespaced(client);
    let made = all.create(&PostParams::default(), &web()).await.unwrap();
    assert_eq!(made.metadata.generation, Some(1));
    let params = PatchParams::default();
    let image = json!({"spec": {"template": {"spec": {"containers": [{"name": "two", "image": "y:2"}]}}}});
    let strategic = all.patch("web", &params, &Patch::Strategic(image.clone())).await.unwrap();
    let images = |d: &Deployment| -> Vec<String> {
        let spec = d.spec.clone().unwrap().template.spec.unwrap();
        spec.containers.into_iter().filter_map(|c| c.image).collect()
    };
    assert_eq!(images(&strategic), ["x:1", "y:2"]);
    let merged = all.patch("web", &params, &Patch::Merge(image)).await.unwrap();
    assert_eq!(images(&merged), ["y:2"]);
    let json: json_patch::Patch = from(json!([{"op": "replace", "path": "/spec/replicas", "value": 4}]));
    let json = serde_json::to_value(json).unwrap();
    let request = all.patch("web", &params, &Patch::<Value>::Json(from(json))).await.unwrap();
    assert_eq!((request.spec.unwrap().replicas, request.metadata.generation), (Some(4), Some(4)));
    let status =
        json!({"spec": {"replicas": 9}, "status": {"replicas": 4, "conditions": [{"type": "Available", "status": "True"}]}});
    let after = all.patch_status("web", &params, &Patch::Merge(status)).await.unwrap();
    assert_eq!((after.spec.unwrap().replicas, after.metadata.generation), (Some(4), Some(4)));
    assert_eq!(after.status.unwrap().replicas, Some(4));
    let spec = all.patch("web", &params, &Patch::Merge(json!({"status": {"replicas": 0}}))).await.unwrap();
    assert_eq!(spec.status.unwrap().replicas, Some(4), "the main resource doesn't touch the status");
}

#[tokio::test(flavor = "multi_thread")]
async fn server_side_apply_shares_objects() {
    let (_server, client) = start().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(client);
    let apply = |manager: &'static str, force: bool, data: Value| {
        let maps = maps.clone();
        async move {
            let mut params = PatchParams::apply(manager);
            params.force = force;
            let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "s"}, "data": data});
            maps.patch("s", &params, &Patch::Apply(object)).await
        }
    };
    let data = |m: ConfigMap| serde_json::to_value(m.data).unwrap();
    let made = apply("one", false, json!({"a": "1", "b": "1"})).await.unwrap();
    let same = apply("one", false, json!({"a": "1", "b": "1"})).await.unwrap();
    assert_eq!(made.resource_version(), same.resource_version(), "applying again writes nothing");
    assert_eq!(data(apply("two", false, json!({"b": "1", "c": "2"})).await.unwrap()), json!({"a": "1", "b": "1", "c": "2"}));
    assert_eq!(code(apply("two", false, json!({"a": "2"})).await), (409, "Conflict".into()));
    // What one no longer applies stays as long as two does.
    assert_eq!(data(apply("one", false, json!({"a": "1"})).await.unwrap()), json!({"a": "1", "b": "1", "c": "2"}));
    assert_eq!(data(apply("two", true, json!({"a": "2"})).await.unwrap()), json!({"a": "2"}));
    assert_eq!(code(apply("one", false, json!({"a": "1"})).await), (409, "Conflict".into()));
    // A plain write takes fields over as well.
    maps.patch("s", &PatchParams::default(), &Patch::Merge(json!({"data": {"a": "3"}}))).await.unwrap();
    assert_eq!(code(apply("two", false, json!({"a": "2"})).await), (409, "Conflict".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn dry_runs_leave_nothing_behind() {
    let (_server, client) = start().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(client);
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    maps.create(&dry, &map("d")).await.unwrap();
    assert_eq!(code(maps.get("d").await).0, 404);
    maps.create(&PostParams::default(), &map("d")).await.unwrap();
    let patch = Patch::Merge(json!({"data": {"k": "new"}}));
    let shown = maps.patch("d", &PatchParams { dry_run: true, ..PatchParams::default() }, &patch).await.unwrap();
    assert_eq!(shown.data.unwrap()["k"], "new");
    maps.delete("d", &DeleteParams::default().dry_run()).await.unwrap();
    assert_eq!(maps.get("d").await.unwrap().data.unwrap()["k"], "v");
}

#[tokio::test(flavor = "multi_thread")]
async fn owners_take_their_dependents_along() {
    let (_server, client) = start().await;
    let owners: Api<Deployment> = Api::default_namespaced(client.clone());
    let sets: Api<ReplicaSet> = Api::default_namespaced(client);
    for (policy, stays) in
        [(PropagationPolicy::Background, false), (PropagationPolicy::Foreground, false), (PropagationPolicy::Orphan, true)]
    {
        let owner = owners.create(&PostParams::default(), &web()).await.unwrap();
        let mut set: ReplicaSet = from(
            json!({"metadata": {"name": "web"}, "spec": web().spec.map(|s| json!({"selector": s.selector, "template": s.template}))}),
        );
        set.metadata.owner_references = Some(vec![from(json!({"apiVersion": "apps/v1", "kind": "Deployment", "name": "web",
            "uid": owner.uid(), "controller": true, "blockOwnerDeletion": true}))]);
        sets.create(&PostParams::default(), &set).await.unwrap();
        let how = DeleteParams { propagation_policy: Some(policy.clone()), ..DeleteParams::default() };
        owners.delete("web", &how).await.unwrap();
        until("the owner goes", async || owners.get_opt("web").await.unwrap().is_none()).await;
        if stays {
            let free = sets.get("web").await.unwrap();
            assert!(free.owner_references().is_empty());
            sets.delete("web", &DeleteParams::default()).await.unwrap();
        } else {
            until("the dependent goes", async || sets.get_opt("web").await.unwrap().is_none()).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn finalizers_hold_an_object() {
    let (_server, client) = start().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(client);
    let mut held = map("held");
    held.metadata.finalizers = Some(vec!["example.com/wait".into()]);
    maps.create(&PostParams::default(), &held).await.unwrap();
    maps.delete("held", &DeleteParams::default()).await.unwrap();
    assert!(maps.get("held").await.unwrap().metadata.deletion_timestamp.is_some());
    maps.patch("held", &PatchParams::default(), &Patch::Merge(json!({"metadata": {"finalizers": null}}))).await.unwrap();
    assert_eq!(code(maps.get("held").await).0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_get_what_the_service_account_admission_gives_and_can_hardly_change() {
    let (_server, client) = start().await;
    let pods: Api<Pod> = Api::default_namespaced(client);
    let pod: Pod = from(json!({"metadata": {"generateName": "p-"}, "spec": {"containers": [{"name": "c", "image": "x:1"}]}}));
    let made = pods.create(&PostParams::default(), &pod).await.unwrap();
    let name = made.name_any();
    assert!(name.starts_with("p-") && name.len() == 7, "{name}");
    let spec = made.spec.unwrap();
    let mounts = spec.containers[0].volume_mounts.clone().unwrap();
    assert_eq!(mounts[0].mount_path, "/var/run/secrets/kubernetes.io/serviceaccount");
    assert_eq!(spec.volumes.unwrap()[0].projected.as_ref().unwrap().sources.as_ref().unwrap().len(), 3);
    assert_eq!(spec.service_account_name.as_deref(), Some("default"));
    let patch = |p: Value| Patch::Strategic(p);
    let params = PatchParams::default();
    pods.patch(&name, &params, &patch(json!({"spec": {"containers": [{"name": "c", "image": "x:2"}]}}))).await.unwrap();
    let args = patch(json!({"spec": {"containers": [{"name": "c", "args": ["x"]}]}}));
    assert_eq!(code(pods.patch(&name, &params, &args).await), (422, "Invalid".into()));
    let stranger: Pod = from(
        json!({"metadata": {"name": "s"}, "spec": {"serviceAccountName": "no", "containers": [{"name": "c", "image": "x"}]}}),
    );
    assert_eq!(code(pods.create(&PostParams::default(), &stranger).await), (403, "Forbidden".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_say_who_they_are_for() {
    let (_server, client) = start().await;
    let accounts: Api<ServiceAccount> = Api::default_namespaced(client.clone());
    let wanted: TokenRequest = from(json!({"metadata": {}, "spec": {"audiences": ["weft"], "expirationSeconds": 600}}));
    let made = accounts.create_token_request("default", &PostParams::default(), &wanted).await.unwrap();
    let token = made.status.unwrap().token;
    let reviews: Api<TokenReview> = Api::all(client);
    let review = async |token: &str, audience: &str| {
        let ask: TokenReview = from(json!({"metadata": {}, "spec": {"token": token, "audiences": [audience]}}));
        reviews.create(&PostParams::default(), &ask).await.unwrap().status.unwrap()
    };
    let good = review(&token, "weft").await;
    assert_eq!(good.authenticated, Some(true));
    assert_eq!(good.user.unwrap().username.as_deref(), Some("system:serviceaccount:default:default"));
    assert_ne!(review(&token, "other").await.authenticated, Some(true));
    let mut forged = token.clone().into_bytes();
    let at = token.find('.').unwrap() + 5;
    forged[at] = if forged[at] == b'A' { b'B' } else { b'A' };
    assert_ne!(review(&String::from_utf8(forged).unwrap(), "weft").await.authenticated, Some(true));
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_comes_in_without_a_name() {
    let (server, _client) = start().await;
    let url = format!("https://{}", server.addresses()[0]);
    let mut config = kube::Config::new(url.parse().unwrap());
    config.accept_invalid_certs = true;
    let maps: Api<ConfigMap> = Api::namespaced(Client::try_from(config).unwrap(), "default");
    assert_eq!(code(maps.list(&ListParams::default()).await).0, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_namespaces_that_kubernetes_lives_in_stay() {
    let (_server, client) = start().await;
    let namespaces: Api<k8s_openapi::api::core::v1::Namespace> = Api::all(client);
    for name in ["default", "kube-system", "kube-public"] {
        for dry_run in [true, false] {
            let parameters = DeleteParams { dry_run, ..DeleteParams::default() };
            let error = namespaces.delete(name, &parameters).await.unwrap_err();
            assert!(
                error.to_string().contains(&format!("namespaces \"{name}\" is forbidden: this namespace may not be deleted")),
                "{error}"
            );
            assert_eq!(code(Err::<(), _>(error)), (403, "Forbidden".into()));
        }
        assert_eq!(namespaces.get(name).await.unwrap().metadata.deletion_timestamp, None);
    }
    namespaces.create(&PostParams::default(), &from(json!({"metadata": {"name": "shop"}}))).await.unwrap();
    namespaces.delete("shop", &DeleteParams::default()).await.unwrap();
    until("the namespace is gone", async || namespaces.get_opt("shop").await.unwrap().is_none()).await;
}
