//! The cluster as a source: what is watched, resumed, listed again and survived.

use crate::common::{FakeApi, eventually};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use weft_control::index::{Index, publisher};
use weft_control::metrics::{Metrics, Resource};
use weft_control::model::Kind;
use weft_control::source::kube::{KINDS, watch_all};

fn pod(namespace: &str, name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace},
        "spec": {"containers": [{"name": "app", "ports": [{"containerPort": 80}]}]}})
}

fn namespace(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "annotations": {"inject": "enabled"}}})
}

struct Source {
    index: Arc<Index>,
    metrics: Arc<Metrics>,
    _tasks: JoinSet<()>,
}

fn start(api: &FakeApi, streamed: bool) -> Source {
    let (index, metrics) = (Arc::new(Index::new(KINDS)), Arc::new(Metrics::default()));
    let mut tasks = JoinSet::new();
    tasks.spawn(publisher(index.clone()));
    watch_all(&api.client(), &index, &metrics, streamed, &mut tasks);
    Source { index, metrics, _tasks: tasks }
}

impl Source {
    async fn synced(&self) {
        tokio::time::timeout(Duration::from_secs(10), self.index.synced().wait_for(|s| *s)).await.unwrap().unwrap();
    }

    fn lists(&self, kind: Kind) -> u64 {
        self.metrics.lists.get_or_create(&Resource::of(kind)).get()
    }

    async fn pods(&self, count: usize) {
        eventually(&format!("{count} pods"), || (self.index.count(Kind::Pod) == count).then_some(())).await;
    }
}

#[tokio::test]
async fn a_dropped_watch_is_resumed_without_a_list() {
    let api = FakeApi::start().await;
    api.put("api/v1/namespaces", namespace("shop"));
    api.put("api/v1/pods", pod("shop", "one"));
    let source = start(&api, false);
    source.synced().await;
    assert_eq!(source.index.namespace("shop").unwrap().annotations["inject"], "enabled");
    for round in 0..3 {
        api.cut_watches();
        api.put("api/v1/pods", pod("shop", &format!("more-{round}")));
        source.pods(2 + round).await;
    }
    api.remove("api/v1/pods", "shop", "one");
    source.pods(3).await;
    assert_eq!(source.lists(Kind::Pod), 1);
    assert_eq!(api.requests("/api/v1/pods?&limit"), 1, "listed once");
}

#[tokio::test]
async fn a_server_that_forgot_is_listed_once_more() {
    let api = FakeApi::start().await;
    api.put("api/v1/pods", pod("shop", "one"));
    api.put("api/v1/pods", pod("shop", "two"));
    let source = start(&api, false);
    source.synced().await;
    api.set_down(true);
    api.remove("api/v1/pods", "shop", "one");
    api.put("api/v1/pods", pod("shop", "three"));
    api.forget();
    api.set_down(false);
    eventually("the new state", || {
        let view = source.index.view("shop")?;
        (view.pods.keys().collect::<Vec<_>>() == ["three", "two"]).then_some(())
    })
    .await;
    assert_eq!(source.lists(Kind::Pod), 2);
}

#[tokio::test]
async fn pages_are_put_together() {
    let api = FakeApi::start().await;
    for n in 0..450 {
        api.put("api/v1/pods", pod(&format!("ns-{}", n % 7), &format!("pod-{n}")));
    }
    let source = start(&api, false);
    source.synced().await;
    assert_eq!(source.index.count(Kind::Pod), 450);
    assert_eq!(api.requests("/api/v1/pods?&limit"), 3);
}

#[tokio::test]
async fn streamed_lists_where_they_are_offered_and_pages_where_not() {
    for offered in [true, false] {
        let api = FakeApi::start().await;
        api.offer_streams("35", offered);
        api.put("api/v1/pods", pod("shop", "one"));
        let source = start(&api, true);
        source.synced().await;
        assert_eq!(source.index.count(Kind::Pod), 1, "offered: {offered}");
        assert_eq!(api.requests("/api/v1/pods?&limit"), usize::from(!offered));
        api.put("api/v1/pods", pod("shop", "two"));
        source.pods(2).await;
    }
}

#[tokio::test]
async fn a_server_that_never_ends_a_streamed_list_is_asked_for_pages() {
    let api = FakeApi::start().await;
    api.ignore_streams();
    api.put("api/v1/pods", pod("shop", "one"));
    let source = start(&api, true);
    source.synced().await;
    assert_eq!(source.index.count(Kind::Pod), 1);
    api.put("api/v1/pods", pod("shop", "two"));
    source.pods(2).await;
}

#[tokio::test]
async fn a_server_that_is_away_at_the_start_is_waited_for() {
    let api = FakeApi::start().await;
    api.put("api/v1/pods", pod("shop", "one"));
    api.set_down(true);
    let source = start(&api, false);
    eventually("a failed try", || (source.metrics.watch_errors.get_or_create(&Resource::of(Kind::Pod)).get() >= 1).then_some(()))
        .await;
    assert!(!*source.index.synced().borrow());
    api.set_down(false);
    source.synced().await;
    assert_eq!(source.index.count(Kind::Pod), 1);
}

#[tokio::test]
async fn nothing_polls() {
    let api = FakeApi::start().await;
    let source = start(&api, false);
    source.synced().await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let before = api.requests("");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(api.requests(""), before);
    // One list and one watch of each kind.
    assert_eq!(before, 2 * KINDS.len());
}
