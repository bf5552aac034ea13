//! Namespaces for admission: from the watch, or by one read.

use crate::common::FakeApi;
use serde_json::json;
use std::sync::Arc;
use weft_control::admission::Lookup;
use weft_control::index::Index;
use weft_control::model::{Namespace, Object};
use weft_webhook::Namespaces as _;

#[tokio::test]
async fn what_the_watch_has_not_seen_is_read_once() {
    let api = FakeApi::start().await;
    let index = Arc::new(Index::new([]));
    let lookup = Lookup::new(index.clone(), Some(api.client()));
    api.put(
        "api/v1/namespaces",
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "new", "annotations": {"inject": "enabled"}}}),
    );
    let found = lookup.get("new").await.unwrap().unwrap();
    assert_eq!((found.name.as_str(), found.annotations["inject"].as_str()), ("new", "enabled"));
    assert_eq!(api.requests("/api/v1/namespaces/new"), 1);
    assert!(lookup.get("absent").await.unwrap().is_none());
    index.apply(Object::Namespace(Namespace { name: "new".into(), ..Namespace::default() }));
    assert!(lookup.get("new").await.unwrap().unwrap().annotations.is_empty(), "the watch goes before");
    assert_eq!(api.requests("/api/v1/namespaces/new"), 1);
    api.set_down(true);
    let error = lookup.get("other").await.unwrap_err().to_string();
    assert!(error.contains("other"), "{error}");
    assert!(Lookup::new(index, None).get("other").await.unwrap().is_none());
}
