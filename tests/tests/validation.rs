//! Policies at admission: what is refused and in which words, what is warned of, and that the guide's two policies pass as they are.

#![allow(clippy::large_futures)]

use anyhow::{Context as _, ensure};
use kube::api::{Api, DynamicObject, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::json;
use std::io::Write as _;
use std::process::{Command, Stdio};
use weft_tests::{Cluster, cluster};

/// What `kubectl` said: whether it succeeded, and both of its streams. `None` without kubectl on this machine.
fn kubectl(cluster: &Cluster, args: &[&str], input: &str) -> anyhow::Result<Option<(bool, String)>> {
    let child = Command::new("kubectl")
        .arg("--kubeconfig")
        .arg(&cluster.kubeconfig)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).context("kubectl"),
    };
    child.stdin.take().context("stdin")?.write_all(input.as_bytes())?;
    let out = child.wait_with_output()?;
    let text = [out.stdout, out.stderr].map(|s| String::from_utf8_lossy(&s).into_owned()).concat();
    Ok(Some((out.status.success(), text)))
}

fn policies(cluster: &Cluster, version: &str, kind: &str, namespace: &str) -> Api<DynamicObject> {
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("security.istio.io", version, kind));
    Api::namespaced_with(cluster.client.clone(), namespace, &resource)
}

const BAD: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: bad}
spec:
  action: DENY
  rules:
  - to: [{operation: {methods: [GET, get]}}]
    form: []
";

const DOUBTFUL: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: doubtful}
spec:
  rules:
  - from: [{source: {principals: [cluster.local/ns/no-such-place/sa/web]}}]
";

#[tokio::test(flavor = "multi_thread")]
async fn policies_are_validated_at_admission() -> anyhow::Result<()> {
    let cluster = Cluster::start("validation").await?;
    cluster.install(&[]).await?;
    let ns = &format!("e2e-validation-{}", std::process::id());
    cluster.namespace(ns, &[]).await?;

    // The guide's own two, character for character, and in both versions.
    for name in ["authorizationpolicy-frontend", "peerauthentication-strict"] {
        cluster.apply(&cluster.sample(name)?, ns).await?;
    }
    let strict = policies(&cluster, "v1", "PeerAuthentication", ns).get("default").await?;
    assert_eq!(
        (strict.types.unwrap().api_version.as_str(), &strict.data["spec"]["mtls"]["mode"]),
        ("security.istio.io/v1", &json!("STRICT"))
    );

    // A mistake is refused with the path of the field; nothing is stored.
    let api = policies(&cluster, "v1", "AuthorizationPolicy", ns);
    let object: DynamicObject = serde_json::from_value(serde_saphyr::from_str(BAD)?)?;
    let error = api.create(&PostParams::default(), &object).await.unwrap_err().to_string();
    let paths = ["spec.rules[0].form", "did you mean from?", "spec.rules[0].to[0].operation.methods[1]", "did you mean \"GET\"?"];
    for words in paths {
        assert!(error.contains(words), "{words} is missing: {error}");
    }
    assert!(api.get_opt("bad").await?.is_none());

    // So is a change, in the older version too; what was there stays.
    let beta = policies(&cluster, "v1beta1", "PeerAuthentication", ns);
    let change = Patch::Merge(json!({"spec": {"mtls": {"mode": "STRCT"}}}));
    let error = beta.patch("default", &PatchParams::default(), &change).await.unwrap_err().to_string();
    assert!(error.contains("spec.mtls.mode: \"STRCT\" is not one of"), "{error}");
    assert_eq!(beta.get("default").await?.data["spec"]["mtls"]["mode"], "STRICT");

    // The status is not the user's, and a deletion needs no permission of ours.
    beta.patch_status("default", &PatchParams::default(), &Patch::Merge(json!({"status": {"x": 1}}))).await?;
    beta.delete("default", &kube::api::DeleteParams::default()).await?;

    // As people see it.
    if let Some((done, said)) = kubectl(&cluster, &["apply", "-n", ns, "-f", "-"], BAD)? {
        assert!(!done && said.contains("spec.rules[0].to[0].operation.methods[1]: \"get\" is not a method"), "{said}");
        let (done, said) = kubectl(&cluster, &["apply", "-n", ns, "-f", "-"], DOUBTFUL)?.context("kubectl is gone")?;
        assert!(
            done && said.contains("Warning: weft: spec.rules[0].from[0].source.principals[0]: there is no namespace"),
            "{said}"
        );
        let (done, said) = kubectl(&cluster, &["get", "ap", "-n", ns], "")?.context("kubectl is gone")?;
        assert!(done && said.contains("ACTION") && said.contains("go-app"), "{said}");
        let (done, said) = kubectl(&cluster, &["get", "istio-io", "-n", ns], "")?.context("kubectl is gone")?;
        assert!(done && said.contains("doubtful"), "{said}");
    } else {
        eprintln!("no kubectl on this machine: what it shows is not tested");
    }

    // The same words without a cluster.
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("bad.yaml");
    std::fs::write(&file, BAD)?;
    let out = cluster.weft(&["validate", "-f", &file.display().to_string()])?;
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1));
    for words in paths {
        assert!(said.contains(words), "{words} is missing: {said}");
    }
    let good = ["validate", "-f", concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests/samples/authorizationpolicy-frontend.yaml")];
    let out = cluster.weft(&good)?;
    assert!(out.status.success() && out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));

    // An apply of the install manifest takes the caBundle away; it comes back, and validation with it.
    cluster.install(&[]).await?;
    cluster::eventually("validation after another install", std::time::Duration::from_secs(60), async || {
        let error = api.create(&PostParams { dry_run: true, ..PostParams::default() }, &object).await;
        ensure!(error.is_err_and(|e| e.to_string().contains("spec.rules[0].form")), "not validated");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn custom_resources_of_another_mesh_are_left_alone() -> anyhow::Result<()> {
    let cluster = Cluster::start("crds").await?;
    if !cluster.is_playground() {
        // It would take the custom resources, and all policies, from a cluster that is not ours.
        return Ok(());
    }
    let theirs = "
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: peerauthentications.security.istio.io, labels: {app: istio-pilot}}
spec:
  group: security.istio.io
  names: {kind: PeerAuthentication, plural: peerauthentications}
  scope: Namespaced
  versions:
  - {name: v1, served: true, storage: true, schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}}
";
    cluster.apply(theirs, "default").await?;
    let out = cluster.weft(&["install"])?;
    let (text, said) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(
        !text.contains("name: peerauthentications.security.istio.io")
            && text.contains("name: authorizationpolicies.security.istio.io")
    );
    assert!(said.contains("peerauthentications.security.istio.io is left out"), "{said}");
    let out = cluster.weft(&["install", "--skip-crds"])?;
    assert!(!String::from_utf8_lossy(&out.stdout).contains("CustomResourceDefinition") && out.stderr.is_empty());
    // What is ours is printed again, or an update could never change it.
    cluster.install(&[]).await?;
    let out = cluster.weft(&["install"])?;
    assert!(String::from_utf8_lossy(&out.stdout).contains("name: authorizationpolicies.security.istio.io"));
    Ok(())
}
