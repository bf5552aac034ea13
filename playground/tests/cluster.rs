//! A whole playground, from `up` to `down`: pods are processes in network namespaces, Services and names work, and nothing is left behind.
//! Needs root, as CI has it. Every test has a playground of its own, so they run side by side.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, AttachParams, DeleteParams, LogParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config, ResourceExt as _};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;

const PATIENCE: Duration = Duration::from_mins(1);

fn playground(dir: &Path, action: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_weft-playground"));
    command.arg(action).arg("--dir").arg(dir).output().unwrap()
}

/// A playground that goes when the test ends, however it ends.
struct Playground {
    dir: PathBuf,
    client: Client,
}

impl Drop for Playground {
    fn drop(&mut self) {
        playground(&self.dir, "down");
    }
}

fn folder(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("weft-playground-{name}-{}", std::process::id()))
}

async fn client(dir: &Path) -> Client {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let config = Kubeconfig::read_from(dir.join("kubeconfig")).unwrap();
    Client::try_from(Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await.unwrap()).unwrap()
}

async fn up(name: &str) -> Playground {
    let dir = folder(name);
    let out = playground(&dir, "up");
    assert!(out.status.success(), "{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    let client = client(&dir).await;
    let accounts: Api<ServiceAccount> = Api::default_namespaced(client.clone());
    eventually("the default service account", async || accounts.get("default").await.ok()).await;
    Playground { dir, client }
}

/// Tries until there is an answer.
async fn eventually<T>(what: &str, mut attempt: impl AsyncFnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = attempt().await {
            return found;
        }
        assert!(begin.elapsed() < PATIENCE, "waited for {what} for {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

impl Playground {
    fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
    {
        Api::default_namespaced(self.client.clone())
    }

    async fn create<K>(&self, object: Value) -> K
    where
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
            + serde::de::DeserializeOwned
            + serde::Serialize
            + Clone
            + std::fmt::Debug,
    {
        self.api::<K>().create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await.unwrap()
    }

    async fn pod(&self, name: &str, spec: Value) -> Pod {
        self.create(json!({"metadata": {"name": name, "labels": {"app": name}}, "spec": spec})).await
    }

    async fn wait(&self, pod: &str, what: &str, until: impl Fn(&Value) -> bool) -> Value {
        let pods = self.api::<Pod>();
        let mut last = Value::Null;
        let begin = Instant::now();
        while begin.elapsed() < PATIENCE {
            last = serde_json::to_value(pods.get(pod).await.unwrap()).unwrap();
            if until(&last) {
                return last;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("pod {pod} isn't {what}: {:#}", last["status"]);
    }

    async fn ready(&self, pod: &str) -> Value {
        self.wait(pod, "ready", |p| condition(p, "Ready")).await
    }

    /// Standard output and exit code of a command in a pod.
    async fn exec(&self, pod: &str, command: &[&str]) -> (String, i32) {
        let mut attached =
            self.api::<Pod>().exec(pod, command.iter().copied(), &AttachParams::default().stderr(true)).await.unwrap();
        let (mut out, mut err) = (String::new(), String::new());
        let (mut stdout, mut stderr) = (attached.stdout().unwrap(), attached.stderr().unwrap());
        let _ = tokio::join!(stdout.read_to_string(&mut out), stderr.read_to_string(&mut err));
        let status = attached.take_status().unwrap().await.unwrap();
        let code = match status.status.as_deref() {
            Some("Success") => 0,
            _ => status
                .details
                .iter()
                .flat_map(|d| d.causes.iter().flatten())
                .find_map(|c| c.message.as_deref()?.parse().ok())
                .unwrap_or(-1),
        };
        (out + &err, code)
    }
}

fn condition(object: &Value, kind: &str) -> bool {
    object["status"]["conditions"].as_array().is_some_and(|all| all.iter().any(|c| c["type"] == kind && c["status"] == "True"))
}

fn echo(name: &str) -> Value {
    json!({"name": name, "image": "localhost/weft/echo:dev", "args": ["--port=8080", "--grpc=7070", "--tcp=9090", "--server-first=9091"]})
}

fn shell(name: &str, script: &str) -> Value {
    json!({"name": name, "image": "localhost/weft/weft-sample:dev", "command": ["sh", "-c", script]})
}

#[tokio::test(flavor = "multi_thread")]
async fn services_names_logs_exec_and_a_rollout_without_a_gap() {
    let p = up("rollout").await;
    p.create::<Service>(json!({"metadata": {"name": "web"}, "spec": {"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]}})).await;
    p.create::<Deployment>(
        json!({"metadata": {"name": "web"}, "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "web"}},
        "strategy": {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
        "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{
            "name": "go-app", "image": "example.com/x/go-app:1", "ports": [{"name": "http", "containerPort": 8080}],
            "readinessProbe": {"httpGet": {"path": "/healthz", "port": "http"}, "periodSeconds": 1}}]}}}}),
    )
    .await;
    p.create::<Deployment>(json!({"metadata": {"name": "front"}, "spec": {"selector": {"matchLabels": {"app": "front"}},
        "template": {"metadata": {"labels": {"app": "front"}}, "spec": {"containers": [{
            "name": "frontend", "image": "frontend", "env": [{"name": "TARGET_URL", "value": "http://web/api"}, {"name": "RATE", "value": "50"}]}]}}}}))
        .await;
    p.pod("echo", json!({"containers": [echo("echo")]})).await;
    p.ready("echo").await;
    let deployments = p.api::<Deployment>();
    let available = async |generation: i64| {
        let d = serde_json::to_value(deployments.get("web").await.unwrap()).unwrap();
        let s = &d["status"];
        (s["observedGeneration"].as_i64() >= Some(generation)
            && s["updatedReplicas"] == 2
            && s["replicas"] == 2
            && s["availableReplicas"] == 2)
            .then_some(())
    };
    eventually("two available replicas", async || available(1).await).await;

    // Pods are ready a moment before the rules for their Service are.
    let out = eventually("twenty answers", async || {
        let (out, code) = p.exec("echo", &["client", "http://web/api/x", "--count=20"]).await;
        (code == 0).then_some(out)
    })
    .await;
    assert_eq!(out.matches("StatusCode=200").count(), 20, "{out}");
    let answers: std::collections::BTreeSet<String> =
        futures::future::join_all((0..12).map(|_| p.exec("echo", &["client", "http://web.default.svc.cluster.local/"])))
            .await
            .into_iter()
            .map(|(out, _)| out.lines().find(|l| l.contains("\"pod\"")).unwrap_or_default().to_owned())
            .collect();
    assert_eq!(answers.len(), 2, "both pods answer: {answers:?}");
    let (out, code) = p.exec("echo", &["client", "http://nowhere/"]).await;
    assert!(code == 1 && out.contains("lookup"), "{code}: {out}");
    let (out, code) = p.exec("echo", &["sh", "-c", "echo out; exit 7"]).await;
    assert_eq!((out.as_str(), code), ("out\n", 7));
    // The API server from inside, with the pod's own token.
    let (out, _) = p
        .exec("echo", &["sh", "-c", "cd /var/run/secrets/kubernetes.io/serviceaccount && curl -s --cacert ca.crt -H \"Authorization: Bearer $(cat token)\" https://kubernetes.default.svc/version"])
        .await;
    assert!(out.contains("gitVersion"), "{out}");
    // Nothing leads out of the playground.
    let (_, code) = p.exec("echo", &["sh", "-c", "ping -c1 -W1 192.0.2.2 >/dev/null 2>&1"]).await;
    assert_ne!(code, 0);

    let names = async |app: &str| {
        let all = p.api::<Pod>().list(&kube::api::ListParams::default().labels(&format!("app={app}"))).await.unwrap();
        all.items.iter().map(kube::ResourceExt::name_any).collect::<std::collections::BTreeSet<_>>()
    };
    let front = names("front").await.pop_first().unwrap();
    let address = p.ready(&front).await["status"]["podIP"].as_str().unwrap().to_owned();
    // What frontend has counted: answers, and failures of whatever kind.
    let counted = async || {
        let (text, _) = p.exec("echo", &["curl", "-s", &format!("http://{address}:8080/metrics")]).await;
        let (mut good, mut bad) = (0_u64, 0_u64);
        for line in text.lines().filter(|l| l.starts_with("frontend_requests_total")) {
            let count = line.rsplit(' ').next().unwrap().parse::<u64>().unwrap();
            *(if line.contains("\"200\"") { &mut good } else { &mut bad }) += count;
        }
        (good, bad)
    };
    let calm = counted().await;
    let before = names("web").await;
    deployments.restart("web").await.unwrap();
    eventually("the restart", async || available(2).await).await;
    eventually("the end of the old pods", async || names("web").await.is_disjoint(&before).then_some(())).await;
    // A request that hangs is one that failed, after at most five seconds.
    tokio::time::sleep(Duration::from_secs(6)).await;
    let after = counted().await;
    let log = p.api::<Pod>().logs(&front, &LogParams { timestamps: true, ..LogParams::default() }).await.unwrap();
    assert!(after.0 > calm.0 + 100 && after.1 == calm.1, "{calm:?} {after:?}\n{log}");
    assert!(log.lines().all(|l| l.starts_with("20") && l.as_bytes()[10] == b'T'), "{log}");
    let first = before.first().unwrap().rsplit_once('-').unwrap().0.to_owned();
    let template = p.api::<k8s_openapi::api::apps::v1::ReplicaSet>().get(&first).await.unwrap().spec.unwrap().template.unwrap();
    // What `kubectl rollout undo` does: the template of an earlier ReplicaSet comes back, and with it that ReplicaSet.
    let mut undo = serde_json::to_value(template).unwrap();
    undo["metadata"]["labels"].as_object_mut().unwrap().remove("pod-template-hash");
    undo["metadata"]["creationTimestamp"] = Value::Null;
    let patch = json!([{"op": "replace", "path": "/spec/template", "value": undo}]);
    let patch = Patch::<()>::Json(serde_json::from_value(patch).unwrap());
    deployments.patch("web", &PatchParams::default(), &patch).await.unwrap();
    eventually("the undo", async || available(3).await).await;
    eventually("the first ReplicaSet", async || names("web").await.iter().all(|n| n.starts_with(&first)).then_some(())).await;
    let revision = deployments.get("web").await.unwrap().annotations()["deployment.kubernetes.io/revision"].clone();
    assert_eq!(revision, "3");
}

#[tokio::test(flavor = "multi_thread")]
async fn echo_speaks_http_grpc_and_tcp_through_a_service() {
    let p = up("echo").await;
    p.create::<Service>(json!({"metadata": {"name": "echo"}, "spec": {"selector": {"app": "echo"}, "ports": [
        {"name": "http", "port": 80, "targetPort": 8080}, {"name": "grpc", "port": 7070}, {"name": "tcp", "port": 9090}, {"name": "first", "port": 9091}]}}))
        .await;
    // Not by the Service's name: a pod finds its own name in its hosts file first.
    let labels = json!({"name": "server", "labels": {"app": "echo"}});
    p.create::<Pod>(json!({"metadata": labels, "spec": {"containers": [echo("echo")]}})).await;
    p.ready("server").await;
    let slices = p.api::<EndpointSlice>();
    eventually("the endpoint", async || {
        let all = slices.list(&kube::api::ListParams::default().labels("kubernetes.io/service-name=echo")).await.unwrap();
        all.items.iter().any(|s| !s.endpoints.is_empty()).then_some(())
    })
    .await;
    // The pod reaches itself through the Service, too.
    let call = async |args: &[&str]| {
        let (out, code) = p.exec("server", &[&["client"], args].concat()).await;
        assert_eq!(code, 0, "{args:?}: {out}");
        out
    };
    let out = eventually("the rules", async || {
        let (out, code) = p
            .exec("server", &["client", "http://echo/a//b?c=d", "-H", "X-A:1", "-H", "x-a:2", "--method=PUT", "--body=xyz"])
            .await;
        (code == 0).then_some(out)
    })
    .await;
    for line in [
        "[0] StatusCode=200",
        "[0 body] Hostname=server",
        "[0 body] URL=/a//b?c=d",
        "[0 body] Method=PUT",
        "[0 body] RequestHeader=X-A:1",
        "[0 body] RequestHeader=X-A:2",
        "[0 body] RequestBytes=3",
    ] {
        assert!(out.contains(line), "{line} in\n{out}");
    }
    assert!(call(&["http://echo/?status=503"]).await.contains("[0] StatusCode=503"));
    assert!(call(&["http://echo/", "--http2"]).await.contains("Proto=HTTP/2.0"));
    let out = call(&["grpc://echo:7070", "-H", "x-test:1", "--count=3"]).await;
    assert!(out.matches("StatusCode=200").count() >= 3 && out.contains("[2 body] RequestHeader=X-Test:1"), "{out}");
    assert!(call(&["tcp://echo:9090", "--body=bytes"]).await.contains("[0 body] bytes"));
    assert!(call(&["tcp://echo:9091"]).await.contains("[0 body] Hostname=server"));
    let mut forward = p.api::<Pod>().portforward("server", &[8080]).await.unwrap();
    let stream = forward.take_stream(8080).unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(hyper_util::rt::TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::get("/").header("host", "x").body(http_body_util::Empty::<bytes::Bytes>::new()).unwrap();
    assert_eq!(sender.send_request(request).await.unwrap().status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn sidecars_start_before_the_app_and_end_after_it_and_do_not_keep_a_job() {
    let p = up("job").await;
    let sidecar = json!({"name": "sidecar", "image": "echo", "restartPolicy": "Always", "args": ["--port=8080"],
        "startupProbe": {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1}});
    let record = |name: &str, script: &str| {
        let mut c = shell(name, script);
        c["volumeMounts"] = json!([{"name": "shared", "mountPath": "/shared"}]);
        c
    };
    p.create::<Job>(json!({"metadata": {"name": "work"}, "spec": {"template": {"spec": {"restartPolicy": "Never",
        "initContainers": [record("first", "echo first >> /shared/log"), sidecar, record("second", "curl -sf localhost:8080 >/dev/null && echo second >> /shared/log")],
        "containers": [record("main", "echo main >> /shared/log; cat /shared/log")], "volumes": [{"name": "shared", "emptyDir": {}}]}}}}))
        .await;
    let jobs = p.api::<Job>();
    let job = eventually("the job", async || {
        let job = serde_json::to_value(jobs.get("work").await.unwrap()).unwrap();
        condition(&job, "Complete").then_some(job)
    })
    .await;
    assert_eq!(job["status"]["succeeded"], 1);
    let pods = p.api::<Pod>().list(&kube::api::ListParams::default().labels("job-name=work")).await.unwrap();
    let name = pods.items[0].name_any();
    let log = p.api::<Pod>().logs(&name, &LogParams { container: Some("main".into()), ..LogParams::default() }).await.unwrap();
    assert_eq!(log, "first\nsecond\nmain\n");
    let pod = serde_json::to_value(&pods.items[0]).unwrap();
    assert_eq!(pod["status"]["phase"], "Succeeded", "{:#}", pod["status"]);
    let end = |list: &str, n: usize| pod["status"][list][n]["state"]["terminated"]["finishedAt"].as_str().unwrap().to_owned();
    assert!(end("initContainerStatuses", 1) >= end("containerStatuses", 0), "the sidecar ended first");

    // A job that fails fails.
    p.create::<Job>(json!({"metadata": {"name": "bad"}, "spec": {"backoffLimit": 0, "template": {"spec": {"restartPolicy": "Never", "containers": [shell("main", "exit 3")]}}}})).await;
    let job = eventually("the failure", async || {
        let job = serde_json::to_value(jobs.get("bad").await.unwrap()).unwrap();
        condition(&job, "Failed").then_some(job)
    })
    .await;
    assert_eq!(job["status"]["failed"], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_restart_and_unready_pods_and_hooks_run() {
    let p = up("probes").await;
    let mut live =
        shell("live", "trap 'echo term; exit 0' TERM; touch /tmp/ok; sleep 3; rm /tmp/ok; while :; do sleep 0.1; done");
    live["livenessProbe"] = json!({"exec": {"command": ["test", "-e", "/tmp/ok"]}, "periodSeconds": 1, "failureThreshold": 1, "initialDelaySeconds": 1});
    p.pod("live", json!({"containers": [live]})).await;
    let mut crash = shell("crash", "echo once; exit 4");
    crash["terminationMessagePolicy"] = json!("FallbackToLogsOnError");
    p.pod("crash", json!({"containers": [crash]})).await;
    let mut hooks = shell("hooks", "trap 'cat /shared/hooks > /dev/termination-log; exit 0' TERM; while :; do sleep 0.1; done");
    hooks["lifecycle"] = json!({"postStart": {"exec": {"command": ["sh", "-c", "echo post > /shared/hooks"]}}, "preStop": {"exec": {"command": ["sh", "-c", "echo pre >> /shared/hooks"]}}});
    hooks["volumeMounts"] = json!([{"name": "shared", "mountPath": "/shared"}]);
    hooks["readinessProbe"] =
        json!({"exec": {"command": ["test", "-e", "/shared/ready"]}, "periodSeconds": 1, "failureThreshold": 1});
    p.pod("hooks", json!({"volumes": [{"name": "shared", "emptyDir": {}}], "containers": [hooks]})).await;
    p.pod("unknown", json!({"containers": [{"name": "x", "image": "docker.io/library/nginx:1"}]})).await;

    p.wait("unknown", "refused", |s| s["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "ErrImagePull").await;
    let crashed = p
        .wait("crash", "in CrashLoopBackOff", |s| {
            s["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "CrashLoopBackOff"
        })
        .await;
    let status = &crashed["status"]["containerStatuses"][0];
    assert_eq!(
        (status["lastState"]["terminated"]["exitCode"].as_i64(), status["lastState"]["terminated"]["message"].as_str()),
        (Some(4), Some("once"))
    );
    assert!(status["restartCount"].as_i64() >= Some(1));
    let previous = p.api::<Pod>().logs("crash", &LogParams { previous: true, ..LogParams::default() }).await.unwrap();
    assert_eq!(previous, "once\n");

    p.wait("hooks", "running", |s| s["status"]["phase"] == "Running").await;
    assert_eq!(p.exec("hooks", &["cat", "/shared/hooks"]).await.0, "post\n");
    let now = p.api::<Pod>().get("hooks").await.unwrap();
    assert!(!condition(&serde_json::to_value(now).unwrap(), "Ready"));
    p.exec("hooks", &["touch", "/shared/ready"]).await;
    p.ready("hooks").await;
    p.exec("hooks", &["rm", "/shared/ready"]).await;
    p.wait("hooks", "unready", |s| !condition(s, "Ready")).await;
    p.api::<Pod>().delete("hooks", &DeleteParams::default().grace_period(20)).await.unwrap();
    let ended = eventually("the end of hooks", async || {
        let pod = p.api::<Pod>().get_opt("hooks").await.unwrap().map(|pod| serde_json::to_value(pod).unwrap());
        match pod {
            None => Some(Value::Null),
            Some(pod) => (!pod["status"]["containerStatuses"][0]["state"]["terminated"].is_null()).then_some(pod),
        }
    })
    .await;
    if !ended.is_null() {
        assert_eq!(ended["status"]["containerStatuses"][0]["state"]["terminated"]["message"], "post\npre\n");
    }
    eventually("the deletion of hooks", async || p.api::<Pod>().get_opt("hooks").await.unwrap().is_none().then_some(())).await;

    p.wait("live", "restarted", |s| s["status"]["containerStatuses"][0]["restartCount"].as_i64() >= Some(1)).await;
    let previous = p.api::<Pod>().logs("live", &LogParams { previous: true, ..LogParams::default() }).await.unwrap();
    assert_eq!(previous, "term\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_has_the_user_capabilities_files_and_environment_that_it_asks_for() {
    let p = up("files").await;
    let script = "grep -E '^(Uid|Gid|CapEff|CapBnd|NoNewPrivs)' /proc/self/status; touch /x 2>/dev/null && echo writable; ip link set lo mtu 9000 2>/dev/null && echo admin; echo end; while :; do sleep 0.2; done";
    let with = |name: &str, context: Value| {
        let mut c = shell(name, script);
        c["securityContext"] = context;
        c
    };
    let drop = json!({"drop": ["ALL"], "add": ["NET_ADMIN"]});
    p.pod(
        "who",
        json!({"terminationGracePeriodSeconds": 0, "containers": [
            with("admin", json!({"runAsUser": 0, "allowPrivilegeEscalation": false, "capabilities": drop})),
            with("user", json!({"runAsUser": 1337, "runAsGroup": 1338, "readOnlyRootFilesystem": true, "capabilities": drop})),
            with("root", json!({"runAsUser": 0})),
        ]}),
    )
    .await;
    p.ready("who").await;
    let log = async |name: &'static str| {
        eventually("the log", async || {
            let text =
                p.api::<Pod>().logs("who", &LogParams { container: Some(name.into()), ..LogParams::default() }).await.unwrap();
            text.contains("\nend\n").then_some(text)
        })
        .await
        .replace('\t', " ")
    };
    let admin = log("admin").await;
    for line in ["Uid: 0 0 0 0", "CapEff: 0000000000001000", "CapBnd: 0000000000001000", "NoNewPrivs: 1", "writable", "admin"] {
        assert!(admin.contains(line), "{line} in\n{admin}");
    }
    let user = log("user").await;
    for line in [
        "Uid: 1337 1337 1337 1337",
        "Gid: 1338 1338 1338 1338",
        "CapEff: 0000000000000000",
        "CapBnd: 0000000000001000",
        "NoNewPrivs: 0",
    ] {
        assert!(user.contains(line), "{line} in\n{user}");
    }
    assert!(!user.contains("writable") && !user.contains("admin"), "{user}");
    let root = log("root").await;
    assert!(root.contains("CapEff: 00000000a80425fb") && root.contains("writable") && !root.contains("admin"), "{root}");

    let mut reader = shell("reader", "while :; do sleep 0.2; done");
    reader["volumeMounts"] = json!([{"name": "all", "mountPath": "/all"}, {"name": "map", "mountPath": "/map"}]);
    reader["env"] = json!([{"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}, {"name": "URL", "value": "http://$(IP):80"},
        {"name": "V", "valueFrom": {"configMapKeyRef": {"name": "late", "key": "v"}}}]);
    p.pod("reader", json!({"terminationGracePeriodSeconds": 0, "containers": [reader], "volumes": [{"name": "map", "configMap": {"name": "late"}}, {"name": "all", "projected": {"sources": [
        {"serviceAccountToken": {"audience": "weft", "expirationSeconds": 3600, "path": "token"}}, {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}}]}}]}))
        .await;
    // It waits for the ConfigMap.
    let waiting = p
        .wait("reader", "creating", |s| s["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "ContainerCreating")
        .await;
    assert_eq!(waiting["status"]["phase"], "Pending");
    tokio::time::sleep(Duration::from_secs(2)).await;
    p.create::<ConfigMap>(json!({"metadata": {"name": "late"}, "data": {"v": "one"}})).await;
    let pod = p.ready("reader").await;
    let (out, _) = p.exec("reader", &["sh", "-c", "echo $URL $V; cat /map/v /all/labels"]).await;
    assert_eq!(out, format!("http://{}:80 one\noneapp=\"reader\"", pod["status"]["podIP"].as_str().unwrap()));
    let (token, _) = p.exec("reader", &["cat", "/all/token"]).await;
    let review: Api<k8s_openapi::api::authentication::v1::TokenReview> = Api::all(p.client.clone());
    let ask = async |audience: &str| {
        let body = json!({"metadata": {}, "spec": {"token": token, "audiences": [audience]}});
        let got = review.create(&PostParams::default(), &serde_json::from_value(body).unwrap()).await.unwrap();
        serde_json::to_value(got.status).unwrap()
    };
    let status = ask("weft").await;
    assert_eq!(
        (&status["authenticated"], &status["user"]["username"]),
        (&json!(true), &json!("system:serviceaccount:default:default"))
    );
    assert_ne!(ask("other").await["authenticated"], true);
    let change = json!({"data": {"v": "two"}});
    p.api::<ConfigMap>().patch("late", &PatchParams::default(), &Patch::Merge(change)).await.unwrap();
    eventually("the new file", async || (p.exec("reader", &["cat", "/map/v"]).await.0 == "two").then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn up_is_idempotent_heals_after_a_kill_and_down_leaves_nothing() {
    let p = up("life").await;
    p.pod("echo", json!({"containers": [echo("echo")]})).await;
    p.pod("host", json!({"hostNetwork": true, "containers": [{"name": "e", "image": "echo", "args": ["--port=8081"]}]})).await;
    p.ready("echo").await;
    let host = p.ready("host").await;
    assert_eq!(host["status"]["podIP"], "10.99.0.1");
    let again = playground(&p.dir, "up");
    assert!(again.status.success() && String::from_utf8_lossy(&again.stdout).contains("up already"));
    p.ready("echo").await;
    let marker = p.dir.to_string_lossy().into_owned();
    let leftovers = || {
        let mut out: Vec<String> = Vec::new();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            if line.contains(&marker) {
                out.push(line);
            }
        }
        out
    };
    let state: Value = serde_json::from_slice(&std::fs::read(p.dir.join("state.json")).unwrap()).unwrap();
    let pid = state["pid"].as_i64().unwrap().to_string();
    assert!(Command::new("kill").args(["-9", &pid]).status().unwrap().success());
    eventually("status to notice", async || (!playground(&p.dir, "status").status.success()).then_some(())).await;
    assert!(!leftovers().is_empty(), "the pods outlive the daemon, so that there is something to heal");
    let healed = playground(&p.dir, "up");
    assert!(healed.status.success(), "{}", String::from_utf8_lossy(&healed.stderr));
    assert!(playground(&p.dir, "status").status.success());
    let fresh = client(&p.dir).await;
    assert!(
        Api::<Pod>::default_namespaced(fresh.clone()).list(&kube::api::ListParams::default()).await.unwrap().items.is_empty()
    );
    assert_eq!(leftovers().len(), 1, "only the new daemon: {:?}", leftovers());
    let fresh = Playground { dir: p.dir.clone(), client: fresh };
    let accounts: Api<ServiceAccount> = fresh.api();
    eventually("the default service account", async || accounts.get("default").await.ok()).await;
    fresh.pod("echo", json!({"containers": [echo("echo")]})).await;
    fresh.ready("echo").await;
    let networks = || {
        std::fs::read_dir("/run/netns")
            .unwrap()
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .collect::<Vec<_>>()
    };
    let text = String::from_utf8(playground(&p.dir, "down").stdout).unwrap();
    assert!(text.contains("is gone"), "{text}");
    assert_eq!(leftovers(), Vec::<String>::new());
    assert!(!p.dir.exists(), "the folder is gone");
    let prefix = format!("weft-{:08x}-", fnv(&marker) >> 32);
    assert!(networks().iter().all(|n| !n.starts_with(&prefix)), "{:?}", networks());
    assert!(!std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&marker));
}

/// How a playground's namespaces are named: FNV-1a of its folder.
fn fnv(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
