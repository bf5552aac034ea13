use super::*;
use crate::settings::TrafficSettings;
use serde_json::json;

fn read(pod: Value, namespace: Option<&NamespaceFacts>) -> Result<Options, Vec<Refusal>> {
    Options::read(
        &json!({"metadata": {"annotations": pod}, "spec": {"containers": [{"name": "a", "ports": [{"name": "db", "containerPort": 5432}]}]}}),
        namespace,
        &Settings::default(),
        ClusterFacts { native_sidecars: true, ..ClusterFacts::default() },
    )
}

fn namespace(pairs: &[(&str, &str)]) -> NamespaceFacts {
    NamespaceFacts {
        name: "n".into(),
        annotations: pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
        ..NamespaceFacts::default()
    }
}

#[test]
fn aliases_mean_the_same_and_ours_win() {
    for known in KNOWN {
        let value = match known.key {
            keys::EXCLUDE_INBOUND_PORTS => "81,90-95",
            _ => continue,
        };
        for alias in known.aliases {
            assert_eq!(read(json!({*alias: value}), None).unwrap().exclude_inbound_ports.to_string(), value, "{alias}");
        }
    }
    let both = json!({"weft.mesh/exclude-outbound-ports": "1", "config.linkerd.io/skip-outbound-ports": "2"});
    assert_eq!(read(both, None).unwrap().exclude_outbound_ports.to_string(), "1");
    let linkerd = json!({"config.linkerd.io/proxy-cpu-limit": "1", "config.linkerd.io/proxy-memory-request": "64Mi", "config.linkerd.io/proxy-log-level": "warn,linkerd=info"});
    let options = read(linkerd, None).unwrap();
    assert_eq!((options.resources.limits["cpu"].as_str(), options.resources.requests["memory"].as_str()), ("1", "64Mi"));
    let istio = json!({"sidecar.istio.io/proxyCPU": "100m", "sidecar.istio.io/nativeSidecar": "false", "traffic.sidecar.istio.io/includeOutboundIPRanges": "10.0.0.0/8",
        "traffic.sidecar.istio.io/excludeInterfaces": "eth1"});
    let options = read(istio, None).unwrap();
    assert_eq!(
        (options.native, options.outbound_cidrs.to_string().as_str(), options.resources.requests["cpu"].as_str()),
        (false, "10.0.0.0/8", "100m")
    );
    assert_eq!(options.exclude_interfaces, ["eth1"]);
}

#[test]
fn a_namespace_speaks_for_its_pods_until_they_speak_themselves() {
    let ns = namespace(&[("weft.mesh/exclude-outbound-ports", "3306"), ("config.linkerd.io/opaque-ports", "db,nope")]);
    let options = read(json!({}), Some(&ns)).unwrap();
    assert_eq!(
        (options.exclude_outbound_ports.to_string().as_str(), options.opaque_ports.to_string().as_str()),
        ("3306", "5432")
    );
    let options = read(json!({"traffic.sidecar.istio.io/excludeOutboundPorts": "1"}), Some(&ns)).unwrap();
    assert_eq!(options.exclude_outbound_ports.to_string(), "1");
}

#[test]
fn mistakes_name_level_key_value_and_what_is_allowed() {
    for (key, value, allowed) in [
        ("weft.mesh/exclude-inbound-ports", "70000", "ports"),
        ("traffic.sidecar.istio.io/excludeOutboundIPRanges", "*", "CIDRs"),
        ("weft.mesh/rewrite-probes", "maybe", "`true` or `false`"),
        ("weft.mesh/proxy-cpu-limit", "lots", "quantity"),
        ("weft.mesh/interception-mode", "magic", "`redirect` or `tproxy`"),
        ("weft.mesh/init-backend", "ebpf", "`nftables`"),
        ("weft.mesh/exclude-interfaces", "eth 1", "interface names"),
        ("weft.mesh/opaque-ports", "nope", "ports"),
        ("weft.mesh/proxy-log-level", "loud", "log level"),
        ("weft.mesh/drain-seconds", "-1", "seconds"),
        ("weft.mesh/proxy-image", "a b", "image"),
        ("weft.mesh/exclude-inbound-ports", "80\"; rm", "ports"),
    ] {
        let refusals = read(json!({key: value}), None).unwrap_err();
        let text = refusals[0].to_string();
        assert!(text.contains(key) && text.contains("on the pod") && text.contains(allowed), "{text}");
        assert!(text.contains(&format!("{value:?}")), "{text}");
        let ns = namespace(&[(key, value)]);
        if key != "weft.mesh/opaque-ports" {
            assert!(read(json!({}), Some(&ns)).unwrap_err()[0].to_string().contains("on the namespace"));
        }
    }
    let two = read(json!({"weft.mesh/dns-capture": "x", "weft.mesh/drop-invalid": "y"}), None).unwrap_err();
    assert_eq!(two.len(), 2);
}

#[test]
fn limits_and_requests_never_contradict_each_other() {
    let options = read(json!({"weft.mesh/proxy-cpu-limit": "5m"}), None).unwrap();
    assert_eq!((options.resources.requests["cpu"].as_str(), options.resources.limits["cpu"].as_str()), ("5m", "5m"));
    let error = read(json!({"weft.mesh/proxy-cpu-limit": "5m", "weft.mesh/proxy-cpu-request": "1"}), None).unwrap_err();
    assert!(error[0].to_string().contains("more than the limit"), "{error:?}");
}

#[test]
fn unknown_keys_of_ours_are_said_with_a_guess() {
    let pod = json!({"metadata": {"annotations": {"weft.mesh/exclude-inbound-port": "1", "example.com/x": "1", "weft.mesh/status": "{}"}}});
    let warnings = unknown_keys(&pod, None);
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].contains("did you mean weft.mesh/exclude-inbound-ports"), "{warnings:?}");
}

#[test]
fn every_annotation_of_ours_is_known_and_documented() {
    let source = include_str!("../../../api/src/annotations.rs");
    let doc = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/injection.md")).unwrap();
    for line in source.lines().filter(|l| l.contains("\"weft.mesh/") && !l.contains("PREFIX")) {
        let key = line.split('"').nth(1).unwrap();
        assert!(KNOWN.iter().any(|k| k.key == key), "{key} is read nowhere");
        assert!(doc.contains(&format!("`{key}`")), "{key} is not in docs/injection.md");
    }
    for known in KNOWN {
        for alias in known.aliases {
            assert!(doc.contains(&format!("`{alias}`")), "{alias} is not in docs/injection.md");
        }
    }
    for reason in crate::Reason::ALL {
        assert!(doc.contains(&format!("`{reason}`")), "reason {reason} is not in docs/injection.md");
    }
}

#[test]
fn inbound_ports_by_every_name_and_level() {
    let map = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    };
    let settings = TrafficSettings { exclude_inbound_ports: "1".into(), ..TrafficSettings::default() };
    for (pod, namespace, inbound, exclude) in [
        (map(&[]), map(&[]), "*", "1"),
        (map(&[("config.linkerd.io/skip-inbound-ports", "2")]), map(&[]), "*", "2"),
        (
            map(&[("traffic.sidecar.istio.io/excludeInboundPorts", "3")]),
            map(&[("weft.mesh/exclude-inbound-ports", "4")]),
            "*",
            "3",
        ),
        (map(&[]), map(&[("weft.mesh/exclude-inbound-ports", "4")]), "*", "4"),
        (map(&[("traffic.sidecar.istio.io/includeInboundPorts", "80,90-91")]), map(&[]), "80,90-91", "1"),
        (map(&[("weft.mesh/inbound-ports", "")]), map(&[("weft.mesh/inbound-ports", "*")]), "", "1"),
        (map(&[("weft.mesh/exclude-inbound-ports", "x")]), map(&[]), "*", "1"),
    ] {
        let (a, b) = inbound_ports(&pod, Some(&namespace), &settings);
        assert_eq!((a.to_string().as_str(), b.to_string().as_str()), (inbound, exclude), "{pod:?} {namespace:?}");
    }
}
