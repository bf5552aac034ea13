//! The guide's story from `kubectl annotate` to the last byte.

#![allow(clippy::large_futures)]

use weft_tests::{Cluster, cluster::containers, story};

#[tokio::test(flavor = "multi_thread")]
async fn annotate_restart_and_every_request_is_counted_on_both_sides() -> anyhow::Result<()> {
    let cluster = Cluster::start("story").await?;
    cluster.install(&[]).await?;
    let namespace = &format!("e2e-story-{}", std::process::id());
    cluster.namespace(namespace, &[]).await?;
    story::deploy(&cluster, namespace).await?;
    for pod in story::pods(&cluster, namespace).await? {
        assert!(!pod.meshed && pod.all == 1, "nothing asked for the mesh: {pod:?}");
    }

    cluster.annotate_namespace(namespace, "inject", Some("enabled")).await?;
    story::restart(&cluster, namespace).await?;
    let pods = story::pods(&cluster, namespace).await?;
    assert_eq!(pods.len(), 4);
    for pod in &pods {
        assert!(pod.meshed && pod.ready == 2 && pod.all == 2, "{pod:?}\n{}", cluster.describe(namespace).await);
    }

    // The app is what logs and exec mean by default.
    for pod in cluster.pods(namespace, "app=go-app").await? {
        assert_eq!(
            pod.metadata.annotations.as_ref().and_then(|a| a.get("kubectl.kubernetes.io/default-container")).unwrap(),
            "go-app"
        );
        assert!(containers(&pod).iter().all(|(_, ready)| *ready));
    }

    let counted = story::counted(&cluster, namespace, 50.0).await?;
    assert!(counted.destination.iter().all(|(_, n)| *n > 0.0), "every pod of go-app gets its share: {counted:?}");

    let probes = story::probes(&cluster, namespace).await?;
    assert!(probes.len() == 3 && probes.iter().all(|(_, status)| *status == 200), "{probes:?}");

    // One scrape has the app's metrics and the proxy's.
    let pod = cluster.pods(namespace, "app=go-app").await?[0].metadata.name.clone().unwrap();
    let samples = cluster.metrics(namespace, &pod).await?;
    for name in ["istio_requests_total", "go_app_requests_total"] {
        assert!(samples.iter().any(|s| s.name == name), "{name} is missing from the merged scrape");
    }

    // And out again.
    cluster.annotate_namespace(namespace, "inject", None).await?;
    story::restart(&cluster, namespace).await?;
    for pod in story::pods(&cluster, namespace).await? {
        assert!(!pod.meshed, "{pod:?}");
    }
    Ok(())
}
