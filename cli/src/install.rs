//! `weft install` and `weft uninstall`: print what `kubectl apply -f -` and `kubectl delete -f -` take. Neither changes a
//! cluster by itself. `weft install` looks whether there is one that has the custom resources from somebody else ([`present`]): those must
//! not be overwritten.

mod chart;
mod present;

use anyhow::Context as _;
use clap::Args;
use serde_json::{Value, json};
use std::path::PathBuf;
use weft_api::names;

/// Arguments of `weft install`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  weft install | kubectl apply -f -
  weft install --ha --registry registry.example.com/mesh --tag 0.1.0 | kubectl apply -f -
  weft install --set injection.proxy.resources.limits.cpu=500m -f my-values.yaml | kubectl apply -f -
  weft install --print-values > values.yaml")]
pub(crate) struct Install {
    /// Namespace of the control plane
    #[arg(short, long, default_value = names::CONTROL_NAMESPACE)]
    namespace: String,
    /// Two replicas, spread over nodes; pods that want the mesh are refused while none can answer
    #[arg(long)]
    ha: bool,
    /// Where the images are, for example registry.example.com/mesh (as --set image.registry=…)
    #[arg(long)]
    registry: Option<String>,
    /// Tag of the images (as --set image.tag=…)
    #[arg(long)]
    tag: Option<String>,
    /// A value of the chart: key=value, with dots for what is nested; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// As --set, the value is always a string
    #[arg(long = "set-string", value_name = "KEY=VALUE")]
    set_string: Vec<String>,
    /// A file of values; may be repeated, later ones win, --set wins over all
    #[arg(short = 'f', long, value_name = "FILE")]
    values: Vec<PathBuf>,
    /// Leave the custom resources out (as --set crds.install=false), because another mesh has brought them
    #[arg(long)]
    skip_crds: bool,
    /// Print the documented default values and nothing else
    #[arg(long)]
    print_values: bool,
}

/// Arguments of `weft uninstall`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  weft uninstall | kubectl delete --ignore-not-found -f -")]
pub(crate) struct Uninstall {
    /// Namespace of the control plane
    #[arg(short, long, default_value = names::CONTROL_NAMESPACE)]
    namespace: String,
}

/// Prints the install manifest.
///
/// # Errors
/// A values file that can't be read, an unknown value, a bad namespace.
pub(crate) fn install(args: &Install) -> anyhow::Result<()> {
    if args.print_values {
        print!("{}", chart::VALUES);
        return Ok(());
    }
    let documents = documents(args)?;
    let crds = documents.iter().filter_map(|d| crd_name(&d.1)).collect::<Vec<_>>();
    let foreign = present::foreign(&crds);
    for name in &foreign {
        eprintln!(
            "# {name} is left out: the cluster has it from somebody else (it has no label {}={}), and it is not overwritten.",
            present::OWNER.0,
            present::OWNER.1
        );
    }
    let kept = documents.into_iter().filter(|d| !crd_name(&d.1).is_some_and(|name| foreign.iter().any(|f| f == name)));
    print!("{}", stream(kept));
    Ok(())
}

/// The name of a custom resource's definition, if a document is one.
fn crd_name(text: &str) -> Option<&str> {
    let is_crd = text.lines().any(|line| line == "kind: CustomResourceDefinition");
    text.lines().find_map(|line| line.strip_prefix("  name: ")).filter(|_| is_crd)
}

fn stream(documents: impl IntoIterator<Item = (&'static str, String)>) -> String {
    documents.into_iter().map(|(name, text)| format!("---\n# Source: weft/templates/{name}\n{text}\n")).collect()
}

/// The install manifest: YAML documents, by the names of their templates, in the order in which they can be applied.
fn documents(args: &Install) -> anyhow::Result<Vec<(&'static str, String)>> {
    check_namespace(&args.namespace)?;
    let mut values = chart::default_values()?;
    chart::merge(&mut values, &json!({"createNamespace": true}), "weft install")?;
    for file in &args.values {
        let text = std::fs::read_to_string(file).with_context(|| format!("--values {}", file.display()))?;
        let over: Value =
            serde_saphyr::from_str(&text).with_context(|| format!("--values {}: not readable as YAML", file.display()))?;
        if !over.is_null() {
            anyhow::ensure!(over.is_object(), "--values {}: a map is expected at the top", file.display());
            chart::merge(&mut values, &over, &format!("--values {}", file.display()))?;
        }
    }
    if args.ha {
        chart::merge(&mut values, &json!({"ha": true}), "--ha")?;
    }
    if let Some(registry) = &args.registry {
        chart::merge(&mut values, &json!({"image": {"registry": registry.trim_end_matches('/')}}), "--registry")?;
    }
    if let Some(tag) = &args.tag {
        chart::merge(&mut values, &json!({"image": {"tag": tag}}), "--tag")?;
    }
    for (sets, strings) in [(&args.set, false), (&args.set_string, true)] {
        for set in sets {
            chart::merge(&mut values, &chart::parse_set(set, strings)?, &format!("--set {set}"))?;
        }
    }
    if args.skip_crds {
        chart::merge(&mut values, &json!({"crds": {"install": false}}), "--skip-crds")?;
    }
    check(&values)?;
    let mut documents = chart::render(&values, &args.namespace)?;
    documents.retain(|(_, text)| !text.trim().is_empty());
    Ok(documents)
}

/// What the chart's types alone leave open, and the settings of injection with the very check that the control plane makes.
fn check(values: &Value) -> anyhow::Result<()> {
    let one_of = |key: &str, value: &Value, allowed: &[&str]| {
        let text = value.as_str().unwrap_or_default();
        let words: Vec<&str> = allowed.iter().map(|w| if w.is_empty() { "(empty)" } else { *w }).collect();
        anyhow::ensure!(allowed.contains(&text), "{key}: {text:?} is not one of {}", words.join(", "));
        Ok(())
    };
    let identity = &values["identity"];
    for (key, least, most) in [("certificateLifeSeconds", 600, 90 * 86_400), ("rotationDelaySeconds", 0, 86_400)] {
        let given = identity[key].as_u64().unwrap_or_default();
        anyhow::ensure!((least..=most).contains(&given), "identity.{key}: {} is not between {least} and {most}", identity[key]);
    }
    let secret = identity["caSecret"].as_str().unwrap_or_default();
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    anyhow::ensure!(secret.chars().all(allowed), "identity.caSecret: {secret:?} is not the name of a Secret");
    one_of("image.pullPolicy", &values["image"]["pullPolicy"], &["Always", "IfNotPresent", "Never"])?;
    one_of("webhook.failurePolicy", &values["webhook"]["failurePolicy"], &["", "Fail", "Ignore"])?;
    one_of("control.logFormat", &values["control"]["logFormat"], &["text", "json"])?;
    one_of("validation.failurePolicy", &values["validation"]["failurePolicy"], &["", "Fail", "Ignore"])?;
    for part in ["webhook", "validation"] {
        let timeout = values[part]["timeoutSeconds"].as_i64().unwrap_or_default();
        anyhow::ensure!((1..=30).contains(&timeout), "{part}.timeoutSeconds: {timeout} is not between 1 and 30");
    }
    let injection = &values["injection"];
    let settings = json!({
        "imagePullSecrets": injection["imagePullSecrets"],
        "trustDomain": values["trustDomain"],
        "cluster": values["clusterName"],
        "systemNamespaces": values["webhook"]["systemNamespaces"],
        "nativeSidecars": injection["nativeSidecars"],
        "rewriteProbes": injection["rewriteProbes"],
        "mergeMetrics": injection["mergeMetrics"],
        "proxy": injection["proxy"],
        "init": injection["init"],
        "traffic": injection["traffic"],
    });
    weft_webhook::Settings::from_yaml(&settings.to_string()).map_err(|e| anyhow::anyhow!("injection: {e}"))?;
    Ok(())
}

fn check_namespace(name: &str) -> anyhow::Result<()> {
    let fits = !name.is_empty()
        && name.len() <= 63
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-');
    anyhow::ensure!(
        fits,
        "--namespace {name:?}: a namespace is at most 63 of a-z, 0-9 and '-', which neither begins nor ends it"
    );
    Ok(())
}

/// Prints what to delete, in an order in which no new pod is injected any more before anything else goes. Pods that are in
/// the mesh keep running: their proxies forward without a control plane, and the trust bundles that they mount are left. So are
/// the custom resources, with which everybody's policies would go.
///
/// # Errors
/// A bad namespace.
pub(crate) fn uninstall(args: &Uninstall) -> anyhow::Result<()> {
    check_namespace(&args.namespace)?;
    print!("{}", removal(&args.namespace)?);
    eprintln!(
        "# Pods that are in the mesh go on working: their proxies forward without the control plane.
# To take the mesh out of them, restart their workloads afterwards, for example:
#   kubectl rollout restart deployment --namespace NAME
# Once no meshed pod is left, the trust bundles can go too:
#   kubectl delete configmap --all-namespaces --field-selector metadata.name={}
# Policies and their custom resources are kept. To delete them too, everybody's:
#   kubectl delete crd --selector {}={}",
        names::TRUST_BUNDLE_CONFIGMAP,
        present::OWNER.0,
        present::OWNER.1
    );
    Ok(())
}

fn removal(namespace: &str) -> anyhow::Result<String> {
    let mut values = chart::default_values()?;
    chart::merge(&mut values, &json!({"createNamespace": true}), "weft uninstall")?;
    let mut objects: Vec<Value> = Vec::new();
    for (name, text) in chart::render(&values, namespace)? {
        if crd_name(&text).is_some() {
            // With it all objects of that kind would go.
            continue;
        }
        let object: Value = serde_saphyr::from_str(&text).with_context(|| format!("chart template {name}"))?;
        let mut metadata = json!({"name": object["metadata"]["name"]});
        if let Some(ns) = object["metadata"].get("namespace") {
            metadata["namespace"] = ns.clone();
        }
        objects.push(json!({"apiVersion": object["apiVersion"], "kind": object["kind"], "metadata": metadata}));
    }
    // The webhook first, the namespace last.
    objects.reverse();
    let mut out = String::new();
    for object in objects {
        out.push_str(&format!("---\n{}", serde_saphyr::to_string(&object)?));
        if !out.ends_with('\n') {
            out.push('\n');
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(set: &[&str]) -> Install {
        Install {
            namespace: "weft-system".into(),
            ha: false,
            registry: None,
            tag: None,
            set: set.iter().map(ToString::to_string).collect(),
            set_string: vec![],
            values: vec![],
            print_values: false,
            skip_crds: false,
        }
    }

    fn manifest(args: &Install) -> anyhow::Result<String> {
        super::documents(args).map(stream)
    }

    fn documents(text: &str) -> Vec<Value> {
        text.split("---\n").filter(|d| !d.trim().is_empty()).map(|d| serde_saphyr::from_str(d).expect(d)).collect()
    }

    fn find<'a>(all: &'a [Value], kind: &str) -> &'a Value {
        all.iter().find(|d| d["kind"] == kind).unwrap_or_else(|| panic!("no {kind}"))
    }

    #[test]
    fn prints_everything_once_and_in_order() {
        let all = documents(&manifest(&args(&[])).unwrap());
        let kinds: Vec<&str> = all.iter().map(|d| d["kind"].as_str().unwrap()).collect();
        assert_eq!(
            kinds,
            [
                "Namespace",
                "PodDisruptionBudget",
                "ServiceAccount",
                "ConfigMap",
                "CustomResourceDefinition",
                "CustomResourceDefinition",
                "CustomResourceDefinition",
                "ClusterRole",
                "ClusterRoleBinding",
                "Role",
                "RoleBinding",
                "Service",
                "Deployment",
                "MutatingWebhookConfiguration",
                "ValidatingWebhookConfiguration"
            ]
        );
        for d in &all {
            assert!(d["metadata"]["name"].is_string() && d["apiVersion"].is_string());
        }
    }

    #[test]
    fn the_typed_objects_accept_it() {
        let all = documents(&manifest(&args(&[r"control.nodeSelector.kubernetes\.io/os=linux"])).unwrap());
        let deployment = find(&all, "Deployment");
        let typed: k8s_openapi::api::apps::v1::Deployment = serde_json::from_value(deployment.clone()).unwrap();
        // What a typed object does not know is lost on the way: nothing may be.
        assert_eq!(
            serde_json::to_value(&typed).unwrap()["spec"]["template"]["spec"]["containers"],
            deployment["spec"]["template"]["spec"]["containers"]
        );
        let webhook = find(&all, "MutatingWebhookConfiguration");
        let typed: k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration =
            serde_json::from_value(webhook.clone()).unwrap();
        assert_eq!(serde_json::to_value(&typed).unwrap()["webhooks"], webhook["webhooks"]);
        let webhook = find(&all, "ValidatingWebhookConfiguration");
        let typed: k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration =
            serde_json::from_value(webhook.clone()).unwrap();
        assert_eq!(serde_json::to_value(&typed).unwrap()["webhooks"], webhook["webhooks"]);
    }

    /// What a structural schema needs everywhere, and that nothing is pruned anywhere.
    fn check_schema(at: &str, schema: &Value) {
        let kind = schema["type"].as_str().unwrap_or_else(|| panic!("{at} has no type"));
        match kind {
            "object" => {
                let open = schema["x-kubernetes-preserve-unknown-fields"] == json!(true);
                assert!(open != schema["additionalProperties"].is_object(), "{at} prunes");
                for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
                    check_schema(&format!("{at}.{name}"), inner);
                }
                if !open {
                    check_schema(&format!("{at}.*"), &schema["additionalProperties"]);
                }
            }
            "array" => check_schema(&format!("{at}[]"), &schema["items"]),
            other => assert!(matches!(other, "string" | "boolean"), "{at} is {other}"),
        }
    }

    #[test]
    fn custom_resources_are_served_in_both_versions_and_prune_nothing() {
        let all = documents(&manifest(&args(&[])).unwrap());
        let crds: Vec<&Value> = all.iter().filter(|d| d["kind"] == "CustomResourceDefinition").collect();
        let kinds: Vec<&str> = crds.iter().map(|c| c["spec"]["names"]["kind"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["AuthorizationPolicy", "PeerAuthentication", "RequestAuthentication"]);
        for crd in crds {
            let typed: k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition =
                serde_json::from_value(crd.clone()).unwrap();
            assert_eq!(serde_json::to_value(&typed).unwrap()["spec"], crd["spec"]);
            assert_eq!(crd["metadata"]["labels"][present::OWNER.0], present::OWNER.1);
            let versions = crd["spec"]["versions"].as_array().unwrap();
            for (version, (name, storage)) in versions.iter().zip([("v1", true), ("v1beta1", false)]) {
                assert_eq!(
                    (&version["name"], &version["storage"], &version["served"]),
                    (&json!(name), &json!(storage), &json!(true))
                );
                assert!(version["subresources"]["status"].is_object());
                let schema = &version["schema"]["openAPIV3Schema"]["properties"];
                check_schema("spec", &schema["spec"]);
                check_schema("status", &schema["status"]);
            }
            assert_eq!(versions.len(), 2);
        }
        for args in [args(&["crds.install=false"]), Install { skip_crds: true, ..args(&[]) }] {
            assert!(!manifest(&args).unwrap().contains("CustomResourceDefinition"));
        }
        assert!(!manifest(&args(&["validation.enabled=false"])).unwrap().contains("ValidatingWebhookConfiguration"));
    }

    #[test]
    fn the_control_plane_can_read_its_settings() {
        let text = manifest(&args(&["image.registry=localhost/mesh", "injection.proxy.resources.limits.cpu=1"])).unwrap();
        let all = documents(&text);
        let config = find(&all, "ConfigMap")["data"]["config.yaml"].as_str().unwrap();
        let settings = weft_webhook::Settings::from_yaml(config).unwrap();
        assert_eq!(settings.image, format!("localhost/mesh/weft-proxy:{}", chart::VERSION));
        assert_eq!(settings.proxy.resources.limits["cpu"], "1");
        assert_eq!(settings.control_namespace, "weft-system");
    }

    #[test]
    fn the_chart_s_defaults_are_the_settings_defaults() {
        let text = manifest(&args(&[])).unwrap();
        let all = documents(&text);
        let settings =
            weft_webhook::Settings::from_yaml(find(&all, "ConfigMap")["data"]["config.yaml"].as_str().unwrap()).unwrap();
        let default =
            weft_webhook::Settings { image_pull_policy: settings.image_pull_policy, ..weft_webhook::Settings::default() };
        assert_eq!(settings, default);
    }

    #[test]
    fn your_own_authority_is_named_in_the_flag_and_the_role() {
        let secrets = |set: &[&str]| {
            let all = documents(&manifest(&args(set)).unwrap());
            let role = find(&all, "Role");
            let read_only =
                |rule: &&Value| rule["resources"] == json!(["secrets"]) && rule["verbs"] == json!(["get", "list", "watch"]);
            let names = role["rules"].as_array().unwrap().iter().find(read_only).unwrap()["resourceNames"].clone();
            let arguments = &find(&all, "Deployment")["spec"]["template"]["spec"]["containers"][0]["args"];
            let arguments: Vec<String> = serde_json::from_value(arguments.clone()).unwrap();
            (
                names,
                arguments.into_iter().filter(|a| a.contains("ca-secret") || a.contains("life") || a.contains("delay")).collect(),
            )
        };
        let (names, arguments): (Value, Vec<String>) = secrets(&[]);
        assert_eq!((names, arguments), (json!(["cacerts"]), vec!["--leaf-life=86400".into(), "--rotation-delay=300".into()]));
        let (names, arguments) = secrets(&["identity.caSecret=mesh-ca", "identity.certificateLifeSeconds=3600"]);
        assert_eq!(names, json!(["mesh-ca"]));
        assert_eq!(arguments, ["--ca-secret=mesh-ca", "--leaf-life=3600", "--rotation-delay=300"]);
        let error = manifest(&args(&["identity.certificateLifeSeconds=60"])).unwrap_err().to_string();
        assert!(error.contains("identity.certificateLifeSeconds"), "{error}");
        let error = manifest(&args(&["identity.caSecret=Mesh/CA"])).unwrap_err().to_string();
        assert!(error.contains("identity.caSecret"), "{error}");
    }

    #[test]
    fn ha_means_fail_and_two_replicas() {
        let plain = documents(&manifest(&args(&[])).unwrap());
        assert_eq!(find(&plain, "Deployment")["spec"]["replicas"], 1);
        assert_eq!(find(&plain, "MutatingWebhookConfiguration")["webhooks"][0]["failurePolicy"], "Ignore");
        let ha = documents(&manifest(&Install { ha: true, ..args(&[]) }).unwrap());
        assert_eq!(find(&ha, "Deployment")["spec"]["replicas"], 2);
        for (kind, policy) in [(&plain, "Ignore"), (&ha, "Fail")] {
            assert_eq!(find(kind, "ValidatingWebhookConfiguration")["webhooks"][0]["failurePolicy"], policy);
        }
        assert_eq!(find(&ha, "MutatingWebhookConfiguration")["webhooks"][0]["failurePolicy"], "Fail");
        assert!(find(&ha, "Deployment")["spec"]["template"]["spec"]["affinity"]["podAntiAffinity"].is_object());
    }

    #[test]
    fn another_namespace_is_named_everywhere() {
        let text = manifest(&Install { namespace: "mesh".into(), ..args(&[]) }).unwrap();
        assert!(!text.contains("weft-system"), "{text}");
        let all = documents(&text);
        assert_eq!(find(&all, "ClusterRoleBinding")["subjects"][0]["namespace"], "mesh");
        let webhook = &find(&all, "MutatingWebhookConfiguration")["webhooks"][0];
        assert_eq!(webhook["clientConfig"]["service"]["namespace"], "mesh");
        assert_eq!(webhook["namespaceSelector"]["matchExpressions"][0]["values"][0], "mesh");
    }

    #[test]
    fn mistakes_are_refused_by_name() {
        for (set, words) in [
            ("webhook.failurePolicy=Maybe", "webhook.failurePolicy"),
            ("webhook.timeoutSeconds=60", "webhook.timeoutSeconds"),
            ("validation.failurePolicy=Maybe", "validation.failurePolicy"),
            ("validation.timeoutSeconds=0", "validation.timeoutSeconds"),
            ("crds.instal=false", "crds.instal"),
            ("image.pullPolicy=Sometimes", "image.pullPolicy"),
            ("injection.traffic.excludeInboundPorts=0", "traffic.excludeInboundPorts"),
            ("injection.proxy.resources.limits.cpu=lots", "proxy.resources.limits.cpu"),
            ("nothing.like.this=1", "nothing"),
        ] {
            let error = format!("{:#}", manifest(&args(&[set])).unwrap_err());
            assert!(error.contains(words), "{set}: {error}");
        }
        assert!(manifest(&Install { namespace: "No Such".into(), ..args(&[]) }).is_err());
    }

    #[test]
    fn uninstall_ends_injection_first_and_keeps_what_pods_mount() {
        let all = documents(&removal("weft-system").unwrap());
        assert_eq!(all[0]["kind"], "ValidatingWebhookConfiguration");
        assert_eq!(all[1]["kind"], "MutatingWebhookConfiguration");
        assert!(all.iter().all(|d| d["kind"] != "CustomResourceDefinition"));
        assert_eq!(all.last().unwrap()["kind"], "Namespace");
        assert_eq!(all.len(), chart::TEMPLATES.len() - 3);
        assert!(all.iter().all(|d| d["metadata"]["name"] != names::TRUST_BUNDLE_CONFIGMAP));
    }
}
