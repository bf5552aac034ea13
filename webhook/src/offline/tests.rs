use super::*;
use serde_json::json;

const STREAM: &str = "# a comment that stays
apiVersion: v1
kind: Service
metadata: {name: web}   # style that stays
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - name: web
        image: x:1
        env: [{name: ANSWER, value: \"yes\"}]
        readinessProbe: {httpGet: {port: 80}}
      volumes:
      - name: c
        configMap: {name: c, defaultMode: 0644}
---
apiVersion: v1
kind: Pod
metadata: {name: host}
spec: {hostNetwork: true, containers: [{name: a, image: x}]}
---
apiVersion: batch/v1
kind: CronJob
metadata: {name: nightly}
spec: {jobTemplate: {spec: {template: {spec: {restartPolicy: Never, containers: [{name: a, image: x}]}}}}}
---
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: ConfigMap, metadata: {name: c}}
- {apiVersion: apps/v1, kind: StatefulSet, metadata: {name: db}, spec: {template: {spec: {containers: [{name: a, image: x}]}}}}
";

fn offline() -> Offline {
    Offline::new(Settings::default())
}

fn lines(out: &Output) -> Vec<String> {
    out.lines.iter().map(ToString::to_string).collect()
}

#[test]
fn every_document_comes_out_in_its_place() {
    let out = offline().inject(STREAM);
    assert_eq!(
        lines(&out),
        [
            "service/web skipped: not-a-pod",
            "deployment/web injected",
            "pod/host skipped: host-network",
            "cronjob/nightly injected",
            "configmap/c skipped: not-a-pod",
            "statefulset/db injected"
        ]
    );
    assert!(out.is_fine());
    let (before, after) = (yaml::split(STREAM), yaml::split(&out.text));
    assert_eq!(before.len(), after.len());
    assert_eq!(before[0], after[0]);
    assert_eq!(before[2], after[2]);
    let deployment = yaml::read(after[1]).unwrap();
    let spec = &deployment["spec"]["template"]["spec"];
    assert_eq!(spec["initContainers"][0]["name"], "weft-init");
    assert_eq!(spec["containers"][0]["env"][0]["value"], "yes");
    assert_eq!(spec["volumes"][0]["configMap"]["defaultMode"], 0o644);
    let workload = spec["initContainers"][1]["env"].as_array().unwrap().iter().find(|e| e["name"] == "WEFT_WORKLOAD").unwrap();
    assert_eq!(workload["value"], "Deployment/web");
}

#[test]
fn uninject_is_the_inverse() {
    let out = uninject(&offline().inject(STREAM).text);
    assert!(out.is_fine());
    let read = |text: &str| yaml::split(text).into_iter().map(|d| yaml::read(d).unwrap()).collect::<Vec<_>>();
    assert_eq!(read(&out.text), read(STREAM));
    assert_eq!(lines(&out)[1], "deployment/web uninjected");
    let again = uninject(&out.text);
    assert_eq!(again.text, out.text);
    assert_eq!(lines(&again)[1], "deployment/web skipped: not-injected");
}

#[test]
fn a_second_injection_changes_not_a_byte() {
    let once = offline().inject(STREAM);
    let twice = offline().inject(&once.text);
    assert_eq!(twice.text, once.text);
    assert_eq!(lines(&twice)[1], "deployment/web skipped: already-injected");
}

#[test]
fn namespaces_among_the_manifests_count() {
    let stream =
        format!("{STREAM}---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, annotations: {{inject: disabled}}}}\n");
    let mut offline = offline();
    offline.note_namespaces(&stream);
    assert_eq!(lines(&offline.inject(&stream))[1], "deployment/web skipped: namespace-disabled");
}

#[test]
fn a_mistake_is_told_and_loses_nothing() {
    let stream = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, annotations: {weft.mesh/exclude-inbound-ports: '70000'}}\nspec: {containers: [{name: a, image: x}]}\n---\na: [\n---\nkind: Thing\n";
    let out = offline().inject(stream);
    assert!(!out.is_fine());
    assert_eq!(out.text, stream);
    assert!(lines(&out)[0].contains("weft.mesh/exclude-inbound-ports") && lines(&out)[0].contains("70000"), "{:?}", lines(&out));
    assert!(lines(&out)[1].contains("line"), "{:?}", lines(&out));
}

#[test]
fn kinds_without_a_template_are_said() {
    let out = offline()
        .inject("apiVersion: argoproj.io/v1alpha1\nkind: Rollout\nmetadata: {name: r}\nspec: {workloadRef: {name: x}}\n");
    assert_eq!(lines(&out), ["rollout/r skipped: no-pod-template"]);
    let list = json!({"apiVersion": "apps/v1", "kind": "DeploymentList", "items": []});
    assert!(offline().inject(&yaml::write(&list).unwrap()).is_fine());
}
