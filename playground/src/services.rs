//! Service addresses: the node's packet rules, made from Services and EndpointSlices.
//!
//! The rules are one nftables table in the node's network namespace, replaced as a whole and atomically. A connection to a Service's
//! address goes to one of its ready endpoints by chance; a Service without any refuses. A pod that reaches itself
//! through a Service sees the node as the source, otherwise the answer would never leave the pod.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use crate::json::{list, text};
use crate::node::Node;

/// The ready IPv4 endpoints of a Service's port, by the port's name.
pub(crate) fn backends(slices: &[Arc<Value>], ns: &str, service: &str, port: &str) -> Vec<(Ipv4Addr, u16)> {
    let mut out = BTreeSet::new();
    for slice in slices {
        let own = slice["metadata"]["labels"]["kubernetes.io/service-name"] == service && slice["metadata"]["namespace"] == ns;
        if !own || slice["addressType"] != "IPv4" {
            continue;
        }
        for p in list(slice, "/ports").iter().filter(|p| text(p, "/name") == port) {
            let Some(number) = p["port"].as_u64().and_then(|n| u16::try_from(n).ok()) else { continue };
            for endpoint in list(slice, "/endpoints").iter().filter(|e| e["conditions"]["ready"] != false) {
                out.extend(list(endpoint, "/addresses").iter().filter_map(|a| Some((a.as_str()?.parse().ok()?, number))));
            }
        }
    }
    out.into_iter().collect()
}

/// The rules for these objects.
pub(crate) fn rules(services: &[Arc<Value>], slices: &[Arc<Value>]) -> String {
    let (mut nat, mut empty, mut pods) = (String::new(), String::new(), BTreeSet::new());
    for service in services {
        let (ns, name) = (text(service, "/metadata/namespace"), text(service, "/metadata/name"));
        let addresses: BTreeSet<Ipv4Addr> = std::iter::once(text(service, "/spec/clusterIP"))
            .chain(list(service, "/spec/clusterIPs").iter().filter_map(Value::as_str))
            .filter_map(|ip| ip.parse().ok())
            // The name server listens there itself.
            .filter(|ip| *ip != crate::netns::DNS)
            .collect();
        for port in list(service, "/spec/ports") {
            let protocol = match text(port, "/protocol") {
                "" | "TCP" => "tcp",
                "UDP" => "udp",
                _ => continue,
            };
            let Some(number) = port["port"].as_u64() else { continue };
            let targets = backends(slices, ns, name, text(port, "/name"));
            pods.extend(targets.iter().map(|(ip, _)| *ip));
            let own = addresses.iter().map(|ip| (*ip, number));
            let outside = port["nodePort"].as_u64().filter(|n| *n > 0).map(|n| (crate::netns::NODE, n));
            for (ip, number) in own.chain(outside) {
                if targets.is_empty() {
                    empty.push_str(&format!("    ip daddr {ip} {protocol} dport {number} reject\n"));
                    continue;
                }
                let map: Vec<String> = targets.iter().enumerate().map(|(n, (ip, port))| format!("{n} : {ip} . {port}")).collect();
                nat.push_str(&format!(
                    "    ip daddr {ip} {protocol} dport {number} dnat to numgen random mod {} map {{ {} }}\n",
                    targets.len(),
                    map.join(", ")
                ));
            }
        }
    }
    let hairpin: String = pods.iter().map(|ip| format!("    ip saddr {ip} ip daddr {ip} masquerade\n")).collect();
    format!(
        "table ip weft {{}}\ndelete table ip weft\ntable ip weft {{
  chain services {{\n{nat}  }}
  chain nobody {{\n{empty}  }}
  chain arriving {{ type nat hook prerouting priority -100; jump services; }}
  chain leaving {{ type nat hook output priority -100; jump services; }}
  chain returning {{ type nat hook postrouting priority 100;\n{hairpin}  }}
  chain passing {{ type filter hook forward priority 0; jump nobody; }}
  chain own {{ type filter hook output priority 0; jump nobody; }}
}}\n"
    )
}

fn load(netns: &str, rules: &str) -> anyhow::Result<()> {
    let mut child = Command::new("ip")
        .args(["netns", "exec", netns, "nft", "-f", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(rules.as_bytes())?;
    }
    let out = child.wait_with_output()?;
    anyhow::ensure!(out.status.success(), "nft: {}", String::from_utf8_lossy(&out.stderr).trim());
    Ok(())
}

/// Keeps the rules current for as long as the process lives. `first` is told when they are loaded for the first time.
pub(crate) async fn run(node: Arc<Node>, first: tokio::sync::oneshot::Sender<()>) {
    let mut first = Some(first);
    let (mut services, mut slices) = (node.services.changes(), node.slices.changes());
    let mut loaded = String::new();
    loop {
        services.mark_unchanged();
        slices.mark_unchanged();
        let wanted = rules(&node.services.all(), &node.slices.all());
        if wanted != loaded {
            let (netns, text) = (node.netns.clone(), wanted.clone());
            match tokio::task::spawn_blocking(move || load(&netns, &text)).await {
                Ok(Ok(())) => {
                    loaded = wanted;
                    if let Some(first) = first.take() {
                        let _ = first.send(());
                    }
                }
                Ok(Err(e)) => tracing::error!("the rules for Service addresses can't be loaded, Services do not answer: {e:#}"),
                Err(e) => tracing::error!("rules for Service addresses: {e}"),
            }
        }
        tokio::select! {
            _ = services.changed() => {}
            _ = slices.changed() => {}
            () = tokio::time::sleep(Duration::from_secs(5)) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn ready_endpoints_get_the_traffic_and_services_without_any_refuse() {
        let service = |name: &str, ip: &str| {
            Arc::new(
                json!({"metadata": {"name": name, "namespace": "n"}, "spec": {"clusterIP": ip, "ports": [{"name": "http", "port": 80, "nodePort": 30000}]}}),
            )
        };
        let slice = Arc::new(
            json!({"metadata": {"namespace": "n", "labels": {"kubernetes.io/service-name": "a"}}, "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080}], "endpoints": [
                {"addresses": ["10.0.0.1"], "conditions": {"ready": true}}, {"addresses": ["10.0.0.2"], "conditions": {"ready": false}}]}),
        );
        let text = rules(&[service("a", "10.96.0.2"), service("b", "10.96.0.3"), service("c", "None")], &[slice]);
        assert!(
            text.contains("ip daddr 10.96.0.2 tcp dport 80 dnat to numgen random mod 1 map { 0 : 10.0.0.1 . 8080 }"),
            "{text}"
        );
        assert!(
            text.contains("ip daddr 10.99.0.1 tcp dport 30000 dnat to numgen random mod 1 map { 0 : 10.0.0.1 . 8080 }"),
            "{text}"
        );
        assert!(text.contains("ip daddr 10.96.0.3 tcp dport 80 reject"), "{text}");
        assert!(text.contains("ip saddr 10.0.0.1 ip daddr 10.0.0.1 masquerade"), "{text}");
        assert!(!text.contains("10.0.0.2") && !text.contains("None"), "{text}");
    }
}
