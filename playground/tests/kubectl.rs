//! The API server as real `kubectl` uses it. Without `kubectl` on the machine nothing is tested here, and that is said.

use serde_json::Value;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use weft_playground::apiserver::{Config, Server};

fn kubectl(config: &Path, args: &[&str], input: &str) -> (bool, String, String) {
    let mut child = Command::new("kubectl")
        .arg("--kubeconfig")
        .arg(config)
        .args(args)
        .env("HOME", config.parent().unwrap())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    (out.status.success(), String::from_utf8_lossy(&out.stdout).into_owned(), String::from_utf8_lossy(&out.stderr).into_owned())
}

const DEPLOYMENT: &str = r"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, labels: {app: web}}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - {name: a, image: 'x:1', env: [{name: A, value: '1'}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80, name: http}]}
";

const CRD: &str = r"
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: widgets.example.com}
spec:
  group: example.com
  names: {kind: Widget, plural: widgets, singular: widget, shortNames: [wd]}
  scope: Namespaced
  versions:
  - name: v1
    served: true
    storage: true
    schema: {openAPIV3Schema: {type: object, properties: {spec: {type: object, x-kubernetes-preserve-unknown-fields: true}}}}
    additionalPrinterColumns: [{name: Size, type: integer, jsonPath: .spec.size}]
";

#[tokio::test(flavor = "multi_thread")]
async fn the_verbs_of_every_day() {
    if Command::new("kubectl").arg("version").arg("--client").output().is_err() {
        println!("kubectl is not on this machine: its verbs are not tested here");
        return;
    }
    let server = Server::start(Config { listen: vec!["127.0.0.1:0".parse().unwrap()], ..Config::default() }).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("kubeconfig");
    std::fs::write(&config, server.kubeconfig(&format!("https://{}", server.addresses()[0]))).unwrap();
    tokio::task::spawn_blocking(move || verbs(&config)).await.unwrap();
}

fn verbs(config: &Path) {
    let run = |args: &[&str], input: &str| -> String {
        let (fine, out, err) = kubectl(config, args, input);
        assert!(fine, "kubectl {args:?}: {out}{err}");
        out
    };
    let json = |args: &[&str]| -> Value { serde_json::from_str(&run(args, "")).unwrap() };

    assert!(run(&["get", "namespaces"], "").contains("kube-system"));
    assert!(run(&["api-resources"], "").contains("deployments"));
    assert_eq!(run(&["apply", "-f", "-"], DEPLOYMENT), "deployment.apps/web created\nservice/web created\n");
    assert_eq!(run(&["apply", "-f", "-"], DEPLOYMENT), "deployment.apps/web unchanged\nservice/web unchanged\n");
    let changed = DEPLOYMENT.replace("value: '1'", "value: '2'");
    assert!(run(&["diff", "--help"], "").contains("Usage"));
    assert_eq!(run(&["apply", "-f", "-"], &changed), "deployment.apps/web configured\nservice/web unchanged\n");
    let web = json(&["get", "deploy", "web", "-o", "json"]);
    assert_eq!(web["spec"]["template"]["spec"]["containers"][0]["env"][0]["value"], "2");
    assert_eq!(web["metadata"]["generation"], 2);
    assert!(run(&["get", "deploy"], "").contains("web    0/2"));
    assert!(run(&["get", "svc", "web", "-o", "wide"], "").contains("app=web"));
    assert!(json(&["get", "svc", "web", "-o", "json"])["spec"]["clusterIP"].as_str().unwrap().starts_with("10.96."));

    run(&["apply", "--server-side", "-f", "-"], "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\ndata: {a: '1', b: '2'}\n");
    run(&["apply", "--server-side", "-f", "-"], "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\ndata: {a: '1'}\n");
    assert_eq!(json(&["get", "cm", "c", "-o", "json"])["data"], serde_json::json!({"a": "1"}));

    run(&["annotate", "namespace", "default", "inject=enabled"], "");
    run(&["label", "deploy", "web", "tier=front"], "");
    assert!(run(&["get", "deploy", "-l", "tier=front", "-o", "name"], "").contains("deployment.apps/web"));
    run(&["patch", "deploy", "web", "--type=json", "-p", r#"[{"op":"replace","path":"/spec/replicas","value":3}]"#], "");
    run(&["patch", "deploy", "web", "--type=merge", "-p", r#"{"metadata":{"labels":{"x":"y"}}}"#], "");
    run(&["patch", "deploy", "web", "-p", r#"{"spec":{"template":{"spec":{"containers":[{"name":"b","image":"y:1"}]}}}}"#], "");
    let web = json(&["get", "deploy", "web", "-o", "json"]);
    assert_eq!(web["spec"]["template"]["spec"]["containers"].as_array().unwrap().len(), 2);
    run(&["scale", "deploy", "web", "--replicas=5"], "");
    assert_eq!(json(&["get", "deploy", "web", "-o", "json"])["spec"]["replicas"], 5);
    run(&["rollout", "restart", "deploy/web"], "");
    let restarted = json(&["get", "deploy", "web", "-o", "json"]);
    assert!(restarted["spec"]["template"]["metadata"]["annotations"]["kubectl.kubernetes.io/restartedAt"].is_string());
    assert!(run(&["describe", "deploy", "web"], "").contains("Replicas:"));

    run(&["create", "-f", "-"], CRD);
    run(&["create", "-f", "-"], "apiVersion: example.com/v1\nkind: Widget\nmetadata: {name: w}\nspec: {size: 7}\n");
    let table = run(&["get", "wd"], "");
    assert!(table.contains("SIZE") && table.contains('7'), "{table}");
    run(&["apply", "-f", "-"], "apiVersion: example.com/v1\nkind: Widget\nmetadata: {name: w2}\nspec: {size: 1}\n");
    run(&["apply", "-f", "-"], "apiVersion: example.com/v1\nkind: Widget\nmetadata: {name: w2}\nspec: {size: 2}\n");
    assert_eq!(json(&["get", "widget", "w2", "-o", "json"])["spec"]["size"], 2);

    let (fine, _, err) = kubectl(
        config,
        &["create", "-f", "-"],
        "apiVersion: v1\nkind: Service\nmetadata: {name: Bad_Name}\nspec: {ports: [{port: 1}]}\n",
    );
    assert!(!fine && err.contains("metadata.name"), "{err}");
    let (fine, _, err) = kubectl(config, &["get", "cm", "nope"], "");
    assert!(!fine && err.contains("NotFound"), "{err}");
    let map = |name: &str| format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}}}\n");
    assert_eq!(run(&["create", "-f", "-", "--dry-run=server", "-o", "name"], &map("dry")), "configmap/dry\n");
    assert!(!kubectl(config, &["get", "cm", "dry"], "").0);

    run(&["create", "-f", "-"], "apiVersion: v1\nkind: Namespace\nmetadata: {name: gone}\n");
    run(&["create", "-n", "gone", "-f", "-"], &map("inside"));
    run(&["delete", "namespace", "gone", "--timeout=20s"], "");
    assert!(!kubectl(config, &["get", "namespace", "gone"], "").0);
    run(&["delete", "deploy", "web"], "");
    run(&["wait", "--for=delete", "deploy/web", "--timeout=5s"], "");
}
