//! What a meshed pod must do: speak every protocol through the mesh, keep going without the control plane, be refused for a
//! user's mistake and for nothing else, end when its job is done.

#![allow(clippy::large_futures)]

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use std::time::Duration;
use weft_tests::cluster::{containers, eventually};
use weft_tests::{Cluster, metrics};

async fn start(name: &str) -> anyhow::Result<(Cluster, String)> {
    let cluster = Cluster::start(name).await?;
    cluster.install(&[]).await?;
    let namespace = format!("e2e-{name}-{}", std::process::id());
    cluster.namespace(&namespace, &[("inject", "enabled")]).await?;
    Ok((cluster, namespace))
}

async fn echo(cluster: &Cluster, namespace: &str) -> anyhow::Result<String> {
    cluster.apply(&cluster.sample("echo")?, namespace).await?;
    cluster.rolled_out(namespace, "echo").await?;
    let pod = cluster.pods(namespace, "app=echo").await?.into_iter().next().context("no echo pod")?;
    ensure!(containers(&pod).iter().any(|(name, _)| name == "weft-proxy"), "echo is not in the mesh");
    pod.metadata.name.context("no name")
}

async fn call(cluster: &Cluster, namespace: &str, pod: &str, args: &[&str]) -> anyhow::Result<String> {
    let command = [&["client"], args].concat();
    let out = cluster.exec(namespace, pod, "echo", &command).await?;
    ensure!(out.success, "client {args:?}: {}{}", out.stdout, out.stderr);
    Ok(out.stdout)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_protocol_passes_through_the_mesh() -> anyhow::Result<()> {
    let (cluster, ns) = start("protocols").await?;
    let pod = echo(&cluster, &ns).await?;

    let out = call(&cluster, &ns, &pod, &["http://echo/a%20path?q=1", "-H", "X-One:1", "-H", "X-One:2", "--method=POST"]).await?;
    for line in ["StatusCode=200", "Method=POST", "RequestHeader=X-One:1", "RequestHeader=X-One:2", "Proto=HTTP/1.1", "Host=echo"]
    {
        assert!(out.contains(line), "{line} is missing:\n{out}");
    }
    assert!(out.contains("/a%20path?q=1"), "the path is passed on as it is:\n{out}");

    let out = call(&cluster, &ns, &pod, &["grpc://echo:7070", "-H", "x-meta:yes"]).await?;
    assert!(out.contains("StatusCode=200") && out.to_lowercase().contains("requestheader=x-meta:yes"), "{out}");

    // Nothing is declared for this port.
    let out = call(&cluster, &ns, &pod, &["http://echo:8081/detected", "--count=20"]).await?;
    assert_eq!(out.matches("StatusCode=200").count(), 20, "{out}");

    let samples = cluster.metrics(&ns, &pod).await?;
    for (reporter, protocol, at_least) in
        [("source", "http", 21.0), ("destination", "http", 21.0), ("source", "grpc", 1.0), ("destination", "grpc", 1.0)]
    {
        let n = metrics::sum(&samples, "istio_requests_total", &[("reporter", reporter), ("request_protocol", protocol)]);
        assert!(n >= at_least, "{reporter} has counted {n} {protocol} requests");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn traffic_goes_on_without_the_control_plane() -> anyhow::Result<()> {
    let (cluster, ns) = start("outage").await?;
    let pod = echo(&cluster, &ns).await?;
    call(&cluster, &ns, &pod, &["http://echo/before"]).await?;

    let deployments: Api<k8s_openapi::api::apps::v1::Deployment> = Api::namespaced(cluster.client.clone(), "weft-system");
    let scale = |replicas: i32| Patch::Merge(json!({"spec": {"replicas": replicas}}));
    deployments.patch("weft-control", &PatchParams::default(), &scale(0)).await?;
    cluster.rolled_out("weft-system", "weft-control").await?;

    let out = call(&cluster, &ns, &pod, &["http://echo/during", "--count=50"]).await?;
    assert_eq!(out.matches("StatusCode=200").count(), 50, "{out}");

    // Without HA the webhook is skipped while it is away: the pod starts, outside the mesh …
    cluster.restart(&ns, "echo").await?;
    cluster.rolled_out(&ns, "echo").await?;
    let missed = cluster.pods(&ns, "app=echo").await?.into_iter().next().context("no pod")?;
    assert!(containers(&missed).iter().all(|(name, _)| name != "weft-proxy"));

    // … and the control plane says so when it is back.
    deployments.patch("weft-control", &PatchParams::default(), &scale(1)).await?;
    cluster.rolled_out("weft-system", "weft-control").await?;
    eventually("the missed pod in the metrics", Duration::from_secs(60), async || {
        let control = cluster.pods("weft-system", "app.kubernetes.io/name=weft-control").await?;
        let name = control.first().and_then(|p| p.metadata.name.clone()).context("no weft-control")?;
        let (_, text) = cluster.get("weft-system", &name, weft_api::names::CONTROL_METRICS_PORT, "/metrics").await?;
        let n = metrics::sum(&metrics::parse(&text)?, "weft_missed_pods", &[]);
        ensure!(n >= 1.0, "weft_missed_pods is {n}");
        Ok(())
    })
    .await?;
    Ok(())
}

fn pod(cluster: &Cluster, name: &str, annotations: &Value, spec: &Value) -> anyhow::Result<Pod> {
    let mut all = json!({
        "containers": [{"name": "app", "image": cluster.sample_image(), "args": ["echo", "--port=8080"], "ports": [{"containerPort": 8080}]}]
    });
    for (key, value) in spec.as_object().into_iter().flatten() {
        all[key] = value.clone();
    }
    Ok(serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "annotations": annotations}, "spec": all
    }))?)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_for_is_done_and_mistakes_are_refused_by_name() -> anyhow::Result<()> {
    let (cluster, ns) = start("decision").await?;
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), &ns);
    let create = async |name: &str, annotations: Value, spec: Value| {
        anyhow::Ok(pods.create(&PostParams::default(), &pod(&cluster, name, &annotations, &spec)?).await?)
    };
    let meshed = |pod: &Pod| {
        let spec = pod.spec.as_ref().unwrap();
        spec.init_containers.iter().flatten().chain(&spec.containers).any(|c| c.name == "weft-proxy")
    };

    assert!(meshed(&create("plain", json!({}), json!({})).await?));
    assert!(!meshed(&create("no", json!({"weft.mesh/inject": "disabled"}), json!({})).await?));
    assert!(!meshed(&create("host", json!({}), json!({"hostNetwork": true})).await?));

    let error = create("wrong", json!({"weft.mesh/exclude-inbound-ports": "70000"}), json!({})).await.unwrap_err().to_string();
    assert!(error.contains("weft.mesh/exclude-inbound-ports") && error.contains("70000"), "{error}");

    // `weft why` tells the same.
    let why = |name: &str| {
        let out = cluster.weft(&["why", &format!("pod/{name}"), "-n", &ns])?;
        ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        Ok(String::from_utf8(out.stdout)?)
    };
    assert!(why("host")?.contains("host-network"), "{}", why("host")?);
    assert!(why("no")?.contains("weft.mesh/inject"), "{}", why("no")?);

    for name in ["plain", "no", "host"] {
        pods.delete(name, &DeleteParams::default()).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_ends_and_its_init_container_is_in_the_mesh_too() -> anyhow::Result<()> {
    let (cluster, ns) = start("job").await?;
    echo(&cluster, &ns).await?;
    let image = cluster.sample_image();
    let client =
        |name: &str, path: &str| json!({"name": name, "image": image, "args": ["client", format!("http://echo/{path}")]});
    let jobs: Api<k8s_openapi::api::batch::v1::Job> = Api::namespaced(cluster.client.clone(), &ns);
    let job = serde_json::from_value(json!({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "once"},
        "spec": {"template": {"spec": {
            "restartPolicy": "Never",
            "initContainers": [client("first", "from-init")],
            "containers": [client("then", "from-main")]
        }}}
    }))?;
    jobs.create(&PostParams::default(), &job).await?;
    let done = eventually("the job's completion", Duration::from_secs(90), async || {
        let status = jobs.get("once").await?.status.unwrap_or_default();
        ensure!(status.succeeded == Some(1), "{status:?}");
        Ok(())
    })
    .await;
    ensure!(done.is_ok(), "{done:?}\n{}", cluster.describe(&ns).await);
    let echo = cluster.pods(&ns, "app=echo").await?.into_iter().next().and_then(|p| p.metadata.name).context("no echo")?;
    let samples = cluster.metrics(&ns, &echo).await?;
    let n = metrics::sum(&samples, "istio_requests_total", &[("reporter", "destination"), ("response_code", "200")]);
    assert!(n >= 2.0, "echo's proxy has counted {n}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn tproxy_keeps_the_client_s_address() -> anyhow::Result<()> {
    let (cluster, ns) = start("tproxy").await?;
    cluster.annotate_namespace(&ns, "weft.mesh/interception-mode", Some("tproxy")).await?;
    let client = echo(&cluster, &ns).await?;
    let other = cluster.sample("echo")?.replace("name: echo\n", "name: echo2\n").replace("app: echo\n", "app: echo2\n");
    cluster.apply(&other, &ns).await?;
    cluster.rolled_out(&ns, "echo2").await?;
    let address = cluster.pods(&ns, "app=echo").await?[0].status.clone().and_then(|s| s.pod_ip).context("no address")?;
    let out = call(&cluster, &ns, &client, &["http://echo2/who"]).await?;
    assert!(out.contains("StatusCode=200") && out.contains(&format!("IP={address}\n")), "{address} called:\n{out}");
    Ok(())
}
