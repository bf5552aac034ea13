use super::*;
use k8s_openapi::api::core::v1::Pod;
use proptest::prelude::*;
use std::collections::BTreeSet;

const NATIVE: ClusterFacts =
    ClusterFacts { native_sidecars: true, injectors: crate::OtherInjectors { istio: false, linkerd: false } };

fn context(settings: &Settings) -> Context<'_> {
    Context { namespace: None, settings, cluster: NATIVE, workload: None }
}

fn app() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "web-5d4f-x", "labels": {"app": "web", "pod-template-hash": "5d4f"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-5d4f", "uid": "u", "controller": true}]},
        "spec": {
            "futureField": {"kept": ["byte", "for", "byte"]},
            "securityContext": {"runAsNonRoot": true, "fsGroup": 7},
            "initContainers": [{"name": "setup", "image": "x:1"}],
            "containers": [
                {"name": "web", "image": "x:1", "ports": [{"name": "http", "containerPort": 8080}],
                 "readinessProbe": {"httpGet": {"path": "/ready", "port": "http"}, "periodSeconds": 3}},
                {"name": "other", "image": "y:1"}],
            "volumes": [{"name": "data", "emptyDir": {}}]
        }
    })
}

fn names(pod: &Value, list: &str) -> Vec<String> {
    pod["spec"][list].as_array().into_iter().flatten().filter_map(|c| c["name"].as_str().map(str::to_owned)).collect()
}

fn find<'a>(pod: &'a Value, name: &str) -> &'a Value {
    ["initContainers", "containers"]
        .iter()
        .filter_map(|l| pod["spec"][*l].as_array())
        .flatten()
        .find(|c| c["name"] == name)
        .unwrap()
}

fn env<'a>(container: &'a Value, name: &str) -> Option<&'a Value> {
    container["env"].as_array()?.iter().find(|e| e["name"] == name)
}

/// What the API server checks of any pod, as far as an injector can break it.
fn valid(pod: &Value) {
    let typed: Pod = serde_json::from_value(pod.clone()).expect("a Pod");
    let spec = typed.spec.expect("a spec");
    let volumes: Vec<&str> = spec.volumes.iter().flatten().map(|v| v.name.as_str()).collect();
    assert_eq!(volumes.len(), volumes.iter().collect::<BTreeSet<_>>().len(), "{volumes:?}");
    let all: Vec<_> = spec.init_containers.iter().flatten().chain(&spec.containers).collect();
    let names: Vec<&str> = all.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(names.len(), names.iter().collect::<BTreeSet<_>>().len(), "{names:?}");
    for container in all {
        for mount in container.volume_mounts.iter().flatten() {
            assert!(volumes.contains(&mount.name.as_str()), "{} mounts {}", container.name, mount.name);
        }
        let env: Vec<&str> = container.env.iter().flatten().map(|e| e.name.as_str()).collect();
        assert_eq!(env.len(), env.iter().collect::<BTreeSet<_>>().len(), "{env:?}");
    }
}

#[test]
fn native_sidecar_comes_first_and_the_rest_stays() {
    let settings = Settings::default();
    let injection = inject(&app(), context(&settings)).unwrap();
    let pod = &injection.pod;
    valid(pod);
    assert_eq!(names(pod, "initContainers"), ["weft-init", "weft-proxy", "setup"]);
    assert_eq!(names(pod, "containers"), ["web", "other"]);
    assert_eq!(pod["spec"]["futureField"], app()["spec"]["futureField"]);
    assert_eq!(pod["spec"]["securityContext"], app()["spec"]["securityContext"]);
    let proxy = find(pod, "weft-proxy");
    assert_eq!(proxy["restartPolicy"], "Always");
    let security = &proxy["securityContext"];
    assert_eq!(
        (&security["runAsUser"], &security["runAsNonRoot"], &security["readOnlyRootFilesystem"]),
        (&json!(1337), &json!(true), &json!(true))
    );
    assert_eq!(security["capabilities"], json!({"drop": ["ALL"]}));
    assert_eq!(security["seccompProfile"]["type"], "RuntimeDefault");
    assert_eq!(proxy["resources"], json!({"requests": {"cpu": "10m", "memory": "20Mi"}}));
    assert_eq!(env(proxy, "WEFT_WORKLOAD").unwrap()["value"], "Deployment/web");
    assert!(env(proxy, "WEFT_PROBES").unwrap()["value"].as_str().unwrap().contains("/ready"));
    let init = find(pod, "weft-init");
    assert_eq!(init["securityContext"]["capabilities"], json!({"add": ["NET_ADMIN"], "drop": ["ALL"]}));
    assert_eq!((&init["securityContext"]["runAsUser"], &init["securityContext"]["runAsNonRoot"]), (&json!(0), &json!(false)));
    assert!(init["args"].as_array().unwrap().contains(&json!("--exclude-inbound-ports=15020")));
    let token = &pod["spec"]["volumes"][1]["projected"]["sources"][0]["serviceAccountToken"];
    assert_eq!(token, &json!({"audience": "weft", "expirationSeconds": 3600, "path": "token"}));
    let web = find(pod, "web");
    assert_eq!(
        web["readinessProbe"],
        json!({"periodSeconds": 3, "httpGet": {"path": "/app-health/web/readyz", "port": 15020, "scheme": "HTTP"}})
    );
    assert_eq!(pod["metadata"]["annotations"]["kubectl.kubernetes.io/default-container"], "web");
    assert_eq!(pod["metadata"]["labels"]["service.istio.io/canonical-name"], "web");
}

#[test]
fn without_native_sidecars_the_init_container_is_last_and_the_proxy_first() {
    let settings = Settings { native_sidecars: crate::NativeSidecars::Disabled, ..Settings::default() };
    let injection = inject(&app(), context(&settings)).unwrap();
    valid(&injection.pod);
    assert_eq!(names(&injection.pod, "initContainers"), ["setup", "weft-init"]);
    assert_eq!(names(&injection.pod, "containers"), ["weft-proxy", "web", "other"]);
    let proxy = find(&injection.pod, "weft-proxy");
    assert!(proxy.get("restartPolicy").is_none());
    let wait = proxy["lifecycle"]["postStart"]["exec"]["command"].as_array().unwrap();
    assert_eq!(wait[..2], [json!("weft-proxy"), json!("wait")]);
    assert_eq!(uninject(&injection.pod).unwrap().unwrap(), app());
}

#[test]
fn the_patch_is_small_and_rewrites_nothing_of_the_user_s() {
    let settings = Settings::default();
    let injection = inject(&app(), context(&settings)).unwrap();
    let ops = serde_json::to_value(&injection.patch).unwrap();
    for op in ops.as_array().unwrap() {
        let path = op["path"].as_str().unwrap();
        let probe = path.contains("readinessProbe");
        assert!(op["op"] == "add" || probe, "{op}");
    }
    let mut copy = app();
    json_patch::patch(&mut copy, &injection.patch).unwrap();
    assert_eq!(copy, injection.pod);
}

#[test]
fn twice_is_once_even_after_others_have_added_to_our_containers() {
    let settings = Settings::default();
    let mut pod = inject(&app(), context(&settings)).unwrap().pod;
    assert!(inject(&pod, context(&settings)).unwrap().patch.0.is_empty());
    // The ServiceAccount admission mounts the API's token into every container, ours too.
    pod["spec"]["initContainers"][1]["volumeMounts"]
        .as_array_mut()
        .unwrap()
        .push(json!({"name": "api", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}));
    pod["spec"]["volumes"].as_array_mut().unwrap().push(json!({"name": "api", "emptyDir": {}}));
    assert!(inject(&pod, context(&settings)).unwrap().patch.0.is_empty());
}

#[test]
fn a_container_that_came_in_between_gets_its_probes_rewritten_and_is_kept() {
    let settings = Settings::default();
    let mut pod = inject(&app(), context(&settings)).unwrap().pod;
    let late = json!({"name": "late", "image": "z", "livenessProbe": {"tcpSocket": {"port": 9}}});
    pod["spec"]["containers"].as_array_mut().unwrap().push(late);
    let again = inject(&pod, context(&settings)).unwrap();
    valid(&again.pod);
    assert_eq!(find(&again.pod, "late")["livenessProbe"]["httpGet"]["path"], "/app-health/late/livez");
    let probes = env(find(&again.pod, "weft-proxy"), "WEFT_PROBES").unwrap()["value"].as_str().unwrap();
    assert!(probes.contains("/app-health/late/livez") && probes.contains("/app-health/web/readyz"), "{probes}");
    let clean = uninject(&again.pod).unwrap().unwrap();
    assert_eq!(find(&clean, "late")["livenessProbe"], json!({"tcpSocket": {"port": 9}}));
}

#[test]
fn the_status_annotation_alone_exempts_nobody() {
    let settings = Settings::default();
    let mut pod = app();
    pod["metadata"]["annotations"] = json!({"weft.mesh/status": "{\"initContainers\":[\"weft-init\"]}"});
    let injection = inject(&pod, context(&settings)).unwrap();
    assert!(names(&injection.pod, "initContainers").contains(&"weft-proxy".to_owned()));
    pod["metadata"]["annotations"] = json!({"weft.mesh/status": "nonsense"});
    assert!(inject(&pod, context(&settings)).unwrap_err()[0].to_string().contains("weft.mesh/status"));
}

#[test]
fn overrides_are_merged_and_come_back() {
    let settings = Settings::default();
    for name in ["weft-proxy", "istio-proxy", "linkerd-proxy"] {
        let mut pod = app();
        let over = json!({"name": name, "image": "auto", "resources": {"limits": {"memory": "1Gi"}}, "env": [{"name": "EXTRA", "value": "1"}],
            "securityContext": {"runAsUser": 2000}});
        pod["spec"]["containers"].as_array_mut().unwrap().insert(1, over);
        let injection = inject(&pod, context(&settings)).unwrap();
        valid(&injection.pod);
        let proxy = find(&injection.pod, "weft-proxy");
        assert_eq!(proxy["resources"], json!({"requests": {"cpu": "10m", "memory": "20Mi"}, "limits": {"memory": "1Gi"}}));
        assert_eq!(env(proxy, "EXTRA").unwrap()["value"], "1");
        assert!(proxy["image"].as_str().unwrap().contains("weft-proxy"));
        assert!(find(&injection.pod, "weft-init")["args"].as_array().unwrap().contains(&json!("--proxy-uid=2000")));
        assert!(inject(&injection.pod, context(&settings)).unwrap().patch.0.is_empty());
        assert_eq!(uninject(&injection.pod).unwrap().unwrap(), pod);
    }
}

#[test]
fn a_name_alone_is_no_exemption() {
    let settings = Settings::default();
    let mut pod = app();
    pod["spec"]["containers"][1]["name"] = json!("weft-proxy");
    assert!(inject(&pod, context(&settings)).unwrap_err()[0].to_string().contains("\"weft-proxy\""));
    pod["spec"]["containers"][1]["name"] = json!("istio-proxy");
    let injection = inject(&pod, context(&settings)).unwrap();
    assert!(names(&injection.pod, "initContainers").contains(&"weft-proxy".to_owned()));
    assert!(injection.warnings.iter().any(|w| w.contains("istio-proxy")), "{:?}", injection.warnings);
}

#[test]
fn collisions_are_named() {
    let settings = Settings::default();
    let mut pod = app();
    pod["spec"]["containers"][0]["securityContext"] = json!({"runAsUser": 1337});
    pod["spec"]["containers"][1]["ports"] = json!([{"containerPort": 15006}]);
    let ns = NamespaceFacts {
        name: "n".into(),
        labels: [
            ("pod-security.kubernetes.io/enforce".to_owned(), "restricted".to_owned()),
            ("istio-injection".to_owned(), "enabled".to_owned()),
        ]
        .into(),
        ..NamespaceFacts::default()
    };
    let cluster = ClusterFacts { injectors: crate::OtherInjectors { istio: true, linkerd: false }, ..NATIVE };
    let warnings = inject(&pod, Context { namespace: Some(&ns), cluster, ..context(&settings) }).unwrap().warnings;
    for word in ["1337", "15006", "restricted", "Istio"] {
        assert!(warnings.iter().any(|w| w.contains(word)), "{word} is not in {warnings:?}");
    }
    let mut pod = app();
    pod["spec"]["volumes"][0]["name"] = json!("weft-secrets");
    assert!(inject(&pod, context(&settings)).unwrap_err()[0].to_string().contains("weft-secrets"));
}

#[test]
fn metrics_are_merged_where_asked_and_probes_left_where_asked() {
    let settings = Settings::default();
    let mut pod = app();
    pod["metadata"]["annotations"] =
        json!({"prometheus.io/scrape": "true", "prometheus.io/port": "9100", "weft.mesh/rewrite-probes": "false"});
    let injection = inject(&pod, context(&settings)).unwrap();
    let annotations = &injection.pod["metadata"]["annotations"];
    assert_eq!(
        (&annotations["prometheus.io/port"], &annotations["prometheus.io/path"]),
        (&json!("15020"), &json!("/stats/prometheus"))
    );
    let metrics = env(find(&injection.pod, "weft-proxy"), "WEFT_APP_METRICS").unwrap()["value"].as_str().unwrap();
    assert_eq!(serde_json::from_str::<Value>(metrics).unwrap(), json!({"port": 9100, "path": "/metrics", "scheme": "http"}));
    assert_eq!(find(&injection.pod, "web")["readinessProbe"], app()["spec"]["containers"][0]["readinessProbe"]);
    assert!(inject(&injection.pod, context(&settings)).unwrap().patch.0.is_empty());
    assert_eq!(uninject(&injection.pod).unwrap().unwrap(), pod);
}

#[test]
fn a_quote_in_a_value_stays_a_quote() {
    let mut settings = Settings::default();
    settings.proxy.env.insert("ODD".into(), "a\"b\n{{x}} $(POD)".into());
    let injection = inject(&app(), context(&settings)).unwrap();
    assert_eq!(env(find(&injection.pod, "weft-proxy"), "ODD").unwrap()["value"], "a\"b\n{{x}} $(POD)");
}

#[test]
fn tproxy_and_legacy_ask_for_what_the_kernel_demands() {
    let settings = Settings::default();
    let mut pod = app();
    pod["metadata"]["annotations"] = json!({"weft.mesh/interception-mode": "tproxy", "weft.mesh/init-backend": "legacy"});
    let injection = inject(&pod, context(&settings)).unwrap();
    let proxy = find(&injection.pod, "weft-proxy");
    assert_eq!(proxy["securityContext"]["capabilities"], json!({"add": ["NET_ADMIN"], "drop": ["ALL"]}));
    assert_eq!((&proxy["securityContext"]["runAsUser"], &proxy["securityContext"]["runAsGroup"]), (&json!(0), &json!(1337)));
    let init = find(&injection.pod, "weft-init");
    assert_eq!(init["securityContext"]["capabilities"]["add"], json!(["NET_ADMIN", "NET_RAW"]));
    for arg in ["--mode=tproxy", "--backend=legacy", "--proxy-gid=1337"] {
        assert!(init["args"].as_array().unwrap().contains(&json!(arg)), "{arg}");
    }
}

fn generated() -> impl Strategy<Value = Value> {
    let probe = prop_oneof![
        Just(Value::Null),
        (1u16..9999).prop_map(|p| json!({"httpGet": {"port": p, "path": "/x"}})),
        Just(json!({"tcpSocket": {"port": "web"}, "timeoutSeconds": 4})),
        Just(json!({"grpc": {"port": 50}})),
        Just(json!({"exec": {"command": ["true"]}})),
    ];
    let container = (proptest::collection::vec(probe, 3), any::<bool>()).prop_map(|(probes, port)| {
        let mut c = json!({"image": "x:1"});
        for (field, probe) in ["livenessProbe", "readinessProbe", "startupProbe"].iter().zip(probes) {
            if !probe.is_null() {
                c[*field] = probe;
            }
        }
        if port {
            c["ports"] = json!([{"name": "web", "containerPort": 8080}]);
        }
        c
    });
    let named = |prefix: &'static str| {
        move |list: Vec<Value>| -> Vec<Value> {
            list.into_iter()
                .enumerate()
                .map(|(i, mut c)| {
                    c["name"] = json!(format!("{prefix}{i}"));
                    c
                })
                .collect()
        }
    };
    let apps = proptest::collection::vec(container.clone(), 1..3).prop_map(named("app"));
    let inits = proptest::option::of(proptest::collection::vec(container, 0..3).prop_map(named("init")));
    let annotations = proptest::option::of(proptest::collection::btree_map(
        prop_oneof![Just("a/b~c".to_owned()), Just("prometheus.io/scrape".to_owned()), Just("x".to_owned())],
        prop_oneof![Just("true"), Just("\"q\"")],
        0..3,
    ));
    (apps, inits, annotations, any::<bool>(), any::<bool>()).prop_map(|(apps, inits, annotations, volumes, secrets)| {
        let mut pod = json!({"metadata": {"name": "p"}, "spec": {"containers": apps}});
        if let Some(inits) = inits {
            pod["spec"]["initContainers"] = json!(inits);
        }
        if let Some(annotations) = annotations {
            pod["metadata"]["annotations"] = json!(annotations);
        }
        if volumes {
            pod["spec"]["volumes"] = json!([]);
        }
        if secrets {
            pod["spec"]["imagePullSecrets"] = json!([{"name": "mine"}]);
        }
        pod
    })
}

proptest! {
    #[test]
    fn any_pod_once_twice_and_back(pod in generated(), native: bool) {
        let settings = Settings {
            native_sidecars: if native { crate::NativeSidecars::Enabled } else { crate::NativeSidecars::Disabled },
            image_pull_secrets: vec!["mine".into(), "ours".into()],
            ..Settings::default()
        };
        let injection = inject(&pod, context(&settings)).unwrap();
        valid(&injection.pod);
        let mut copy = pod.clone();
        json_patch::patch(&mut copy, &injection.patch).unwrap();
        prop_assert_eq!(&copy, &injection.pod);
        prop_assert!(inject(&injection.pod, context(&settings)).unwrap().patch.0.is_empty());
        prop_assert_eq!(uninject(&injection.pod).unwrap().unwrap(), pod);
    }
}

#[test]
fn without_a_native_sidecar_init_containers_keep_their_probes() {
    let mut pod = app();
    let probe = json!({"tcpSocket": {"port": 9}});
    pod["spec"]["initContainers"][0] = json!({"name": "mine", "image": "x", "restartPolicy": "Always", "startupProbe": probe});
    let settings = Settings { native_sidecars: crate::NativeSidecars::Disabled, ..Settings::default() };
    assert_eq!(find(&inject(&pod, context(&settings)).unwrap().pod, "mine")["startupProbe"], probe);
    let native = inject(&pod, context(&Settings::default())).unwrap().pod;
    assert_eq!(find(&native, "mine")["startupProbe"]["httpGet"]["path"], "/app-health/mine/startupz");
}

#[test]
fn dns_capture_reaches_both_the_rules_and_the_proxy() {
    let mut pod = app();
    pod["metadata"]["annotations"] = json!({"weft.mesh/dns-capture": "true"});
    for (pod, on) in [(app(), false), (pod, true)] {
        let injection = inject(&pod, context(&Settings::default())).unwrap();
        let env = find(&injection.pod, "weft-proxy")["env"].as_array().unwrap();
        assert_eq!(env.contains(&json!({"name": "WEFT_DNS_CAPTURE", "value": "true"})), on);
        let args = find(&injection.pod, "weft-init")["args"].as_array().unwrap();
        assert_eq!(args.contains(&json!("--dns-capture=true")), on);
        assert!(!injection.warnings.iter().any(|w| w.contains("DNS")), "{:?}", injection.warnings);
    }
}
