//! Certificates of a whole mesh: who has which, and that they and their root are replaced while traffic goes on.

#![allow(clippy::large_futures)]

use anyhow::{Context as _, ensure};
use serde_json::Value;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use weft_tests::Cluster;
use weft_tests::cluster::eventually;

const PATIENCE: Duration = Duration::from_secs(120);

/// What `weft identity -o json` says of a namespace.
fn identities(cluster: &Cluster, namespace: &str) -> anyhow::Result<Value> {
    let out = cluster.weft(&["identity", "-n", namespace, "-o", "json"])?;
    ensure!(out.status.success(), "weft identity: {}", String::from_utf8_lossy(&out.stderr));
    Ok(serde_json::from_slice(&out.stdout)?)
}

/// Serial numbers of the certificates, by pod.
fn serials(listed: &Value) -> Vec<(String, String)> {
    let proxies = listed["proxies"].as_array().into_iter().flatten();
    proxies
        .filter_map(|proxy| Some((proxy["pod"].as_str()?.to_owned(), proxy["certificate"]["serial"].as_str()?.to_owned())))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_and_their_root_are_replaced_under_load() -> anyhow::Result<()> {
    let cluster = Cluster::start("identity").await?;
    cluster.install(&["--set", "identity.rotationDelaySeconds=3"]).await?;
    let namespace = format!("e2e-identity-{}", std::process::id());
    cluster.namespace(&namespace, &[("inject", "enabled")]).await?;
    cluster.apply(&cluster.sample("echo")?, &namespace).await?;
    cluster
        .apply(&cluster.sample("echo")?.replace("name: echo", "name: caller").replace("app: echo", "app: caller"), &namespace)
        .await?;
    for name in ["echo", "caller"] {
        cluster.rolled_out(&namespace, name).await?;
    }
    let pods = cluster.pods(&namespace, "app=caller").await?;
    let caller = pods.into_iter().next().and_then(|pod| pod.metadata.name).context("no caller")?;
    let account = format!("spiffe://cluster.local/ns/{namespace}/sa/default");
    eventually("both pods have certificates", PATIENCE, async || {
        let listed = identities(&cluster, &namespace)?;
        ensure!(serials(&listed).len() == 2, "{listed}");
        ensure!(listed["proxies"].as_array().into_iter().flatten().all(|p| p["certificate"]["identity"] == account), "{listed}");
        Ok(())
    })
    .await?;
    let before = identities(&cluster, &namespace)?;

    // Requests all the while, each on a connection of its own.
    let cluster = Arc::new(cluster);
    let end = Arc::new(AtomicBool::new(false));
    let load = tokio::spawn({
        let (cluster, end, namespace) = (cluster.clone(), end.clone(), namespace.clone());
        async move {
            let mut sent = 0;
            while !end.load(Ordering::SeqCst) {
                let out = cluster.exec(&namespace, &caller, "caller", &["client", "http://echo/", "--count=20"]).await?;
                let good = out.stdout.matches("StatusCode=200").count();
                ensure!(out.success && good == 20, "{good} of 20 requests were answered: {}{}", out.stdout, out.stderr);
                sent += good;
            }
            anyhow::Ok(sent)
        }
    });
    let rotate = async |args: &[&str]| {
        let (cluster, args) = (cluster.clone(), args.iter().map(ToString::to_string).collect::<Vec<_>>());
        let out = tokio::task::spawn_blocking(move || {
            let mut all = vec!["identity", "rotate", "--wait", "--timeout=90"];
            all.extend(args.iter().map(String::as_str));
            cluster.weft(&all)
        });
        let out = out.await??;
        let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        ensure!(out.status.success() && text.contains("Done."), "weft identity rotate: {text}");
        anyhow::Ok(text)
    };
    rotate(&[]).await?;
    let renewed = identities(&cluster, &namespace)?;
    for (pod, serial) in serials(&before) {
        ensure!(serials(&renewed).iter().any(|(p, s)| *p == pod && *s != serial), "{pod} has its old certificate: {renewed}");
    }
    assert_eq!(renewed["authority"]["issuer"], before["authority"]["issuer"]);
    let text = rotate(&["--root"]).await?;
    let after = identities(&cluster, &namespace)?;
    assert_ne!(after["authority"]["issuer"], before["authority"]["issuer"], "{text}");
    assert_eq!(after["authority"]["roots"].as_array().map(Vec::len), Some(1), "{text}");
    for (pod, serial) in serials(&renewed) {
        ensure!(serials(&after).iter().any(|(p, s)| *p == pod && *s != serial), "{pod} has its old certificate: {after}");
    }
    end.store(true, Ordering::SeqCst);
    let sent = load.await??;
    assert!(sent >= 100, "{sent} requests were sent");
    // All of it was mutual TLS.
    let edges = cluster.weft(&["edges", "-n", &namespace, "-o", "json"])?;
    let edges: Value = serde_json::from_slice(&edges.stdout)?;
    let edges = edges["edges"].as_array().context("no edges")?;
    ensure!(!edges.is_empty() && edges.iter().all(|edge| edge["source"]["identity"] == account), "{edges:?}");
    for pod in cluster.pods(&namespace, "").await? {
        let restarts: i32 = pod.status.iter().flat_map(|s| s.container_statuses.iter().flatten()).map(|c| c.restart_count).sum();
        assert_eq!(restarts, 0, "{:?}", pod.metadata.name);
    }
    Ok(())
}
