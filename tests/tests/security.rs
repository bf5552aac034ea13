//! Who may call whom, as the guide says it: mutual TLS without any configuration, its AuthorizationPolicy and its PeerAuthentication
//! applied as they stand, and what a person can see of it.

#![allow(clippy::large_futures)]

use anyhow::{Context as _, ensure};
use kube::ResourceExt as _;
use kube::api::DynamicObject;
use kube::api::{Api, ApiResource, DeleteParams, GroupVersionKind};
use std::time::Duration;
use weft_tests::cluster::{eventually, file};
use weft_tests::{Cluster, metrics};

const PATIENCE: Duration = Duration::from_secs(60);

fn policies(cluster: &Cluster, kind: &str, namespace: &str) -> Api<DynamicObject> {
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("security.istio.io", "v1", kind));
    Api::namespaced_with(cluster.client.clone(), namespace, &resource)
}

/// Somebody who calls: a pod and a container with the client in it.
struct Caller<'a> {
    cluster: &'a Cluster,
    namespace: String,
    pod: String,
    container: &'static str,
}

impl<'a> Caller<'a> {
    async fn of(cluster: &'a Cluster, namespace: &str, app: &'static str) -> anyhow::Result<Self> {
        let pod = cluster.pods(namespace, &format!("app={app}")).await?.into_iter().next().context("no such pod")?.name_any();
        Ok(Self { cluster, namespace: namespace.into(), pod, container: app })
    }

    /// The status of one request, 0 if there was no answer, and what the client printed.
    async fn status(&self, method: &str, url: &str) -> anyhow::Result<(u16, String)> {
        let method = format!("--method={method}");
        let command = ["client", url, &method, "--timeout=5s"];
        let out = self.cluster.exec(&self.namespace, &self.pod, self.container, &command).await?;
        let text = format!("{}{}", out.stdout, out.stderr);
        let code = text.split("StatusCode=").nth(1).and_then(|rest| rest.get(..3)).and_then(|code| code.parse().ok());
        Ok((code.unwrap_or(0), text))
    }

    /// Waits until a request is answered so: policy takes a moment to arrive.
    async fn expect(&self, method: &str, url: &str, status: u16) -> anyhow::Result<String> {
        let what = format!("{}/{} {method} {url} → {status}", self.namespace, self.pod);
        let mut last = String::new();
        eventually(&what, PATIENCE, async || {
            let (code, text) = self.status(method, url).await?;
            ensure!(code == status, "{code}: {text}");
            last = text;
            Ok(())
        })
        .await?;
        Ok(last)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_guides_security_examples_do_what_the_guide_says() -> anyhow::Result<()> {
    let cluster = Cluster::start("security").await?;
    cluster.install(&[]).await?;
    // The guide's principal is of the namespace default.
    let ns = "default";
    cluster.annotate_namespace(ns, "inject", Some("enabled")).await?;
    for sample in ["go-app", "frontend", "echo"] {
        cluster.apply(&cluster.sample(sample)?, ns).await?;
    }
    let plain = format!("e2e-plain-{}", std::process::id());
    cluster.namespace(&plain, &[]).await?;
    cluster.apply(&cluster.sample("echo")?, &plain).await?;
    for name in ["go-app", "go-app-v2", "frontend", "echo"] {
        cluster.rolled_out(ns, name).await?;
    }
    cluster.rolled_out(&plain, "echo").await?;
    let frontend = Caller::of(&cluster, ns, "frontend").await?;
    let other = Caller::of(&cluster, ns, "echo").await?;
    let outside = Caller::of(&cluster, &plain, "echo").await?;
    let url = "http://go-app.default:8080/api/hello";

    // Without any configuration: mutual TLS inside the mesh, and plaintext from outside is taken.
    frontend.expect("GET", url, 200).await?;
    outside.expect("GET", url, 200).await?;
    let mutual = [
        ("reporter", "destination"),
        ("connection_security_policy", "mutual_tls"),
        ("source_principal", "spiffe://cluster.local/ns/default/sa/frontend"),
    ];
    let mut counted = 0.0;
    for pod in cluster.pods(ns, "app=go-app").await? {
        counted += metrics::sum(&cluster.metrics(ns, &pod.name_any()).await?, "istio_requests_total", &mutual);
    }
    assert!(counted > 0.0, "frontend's requests came by mutual TLS");

    // "only frontend's mTLS identity may GET /api/* on go-app; everything else gets 403"
    cluster.apply(&file("manifests/samples/authorizationpolicy-frontend.yaml")?, ns).await?;
    let refused = other.expect("GET", url, 403).await?;
    assert!(refused.contains("RBAC: access denied"), "{refused}");
    frontend.expect("GET", url, 200).await?;
    frontend.expect("POST", url, 403).await?;
    frontend.expect("GET", "http://go-app.default:8080/healthz", 403).await?;
    frontend.expect("GET", "http://go-app.default:8080/api/../healthz", 403).await?;
    outside.expect("GET", url, 403).await?;
    policies(&cluster, "AuthorizationPolicy", ns).delete("go-app", &DeleteParams::default()).await?;
    other.expect("GET", url, 200).await?;

    // "plaintext to any meshed pod in the namespace is refused, mTLS is accepted", and switching loses no meshed request.
    let failed = async || -> anyhow::Result<f64> {
        let samples = cluster.metrics(ns, &frontend.pod).await?;
        let all = metrics::sum(&samples, "istio_requests_total", &[("reporter", "source")]);
        Ok(all - metrics::sum(&samples, "istio_requests_total", &[("reporter", "source"), ("response_code", "200")]))
    };
    let before = failed().await?;
    for _ in 0..2 {
        cluster.apply(&file("manifests/samples/peerauthentication-strict.yaml")?, ns).await?;
        outside.expect("GET", url, 0).await?;
        frontend.expect("GET", url, 200).await?;
        other.expect("GET", "http://echo.default/strict", 200).await?;
        policies(&cluster, "PeerAuthentication", ns).delete("default", &DeleteParams::default()).await?;
        outside.expect("GET", url, 200).await?;
    }
    assert_eq!(failed().await?, before, "a meshed request failed while the mode was switched");
    Ok(())
}
