//! `weft edges`: who talks to whom, as the receiving proxies saw it within the last hour.

use crate::console::{Console, ConsoleArgs};
use crate::output::{self, Format, or_dash};
use serde::Serialize;
use std::collections::HashMap;
use std::process::ExitCode;
use weft_api::console::{Edge, Edges};

/// Arguments of `weft edges`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  weft edges
  weft edges -A --since 10m
  weft edges -n shop --paths
  weft edges -A -o json")]
pub(crate) struct Args {
    /// Namespace of either side (default: the context's)
    #[arg(short, long)]
    namespace: Option<String>,
    /// All namespaces
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    all_namespaces: bool,
    /// How far back to look: 90s, 10m, up to 1h
    #[arg(long, default_value = "1h", value_name = "TIME")]
    since: String,
    /// Tell methods, hosts and paths apart
    #[arg(long)]
    paths: bool,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    console: ConsoleArgs,
}

/// Runs it.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(ask(args))
}

async fn ask(args: &Args) -> anyhow::Result<ExitCode> {
    let console = Console::open(&args.console).await?;
    let namespace = match (&args.namespace, args.all_namespaces) {
        (_, true) => "",
        (Some(namespace), _) => namespace,
        (None, _) => console.namespace(),
    };
    let detail = if args.paths { "true" } else { "" };
    let query = [("since", args.since.as_str()), ("namespace", namespace), ("detail", detail)];
    let answers = console.get::<Edges>("/v1/edges", &query).await?;
    let merged = merge(answers.into_iter().map(|a| a.data));
    if !output::structured(args.output, &merged)? {
        if merged.edges.is_empty() {
            let place = if namespace.is_empty() { "any namespace".into() } else { format!("namespace {namespace}") };
            eprintln!("No requests to meshed pods were seen in {place} within {}.", args.since);
        } else {
            print!("{}", output::table(heads(args.paths), &rows(&merged, args.paths)));
        }
    }
    notes(&merged);
    Ok(ExitCode::SUCCESS)
}

/// What all replicas know.
#[derive(Debug, Serialize)]
struct Merged {
    edges: Vec<Edge>,
    /// Samples that were not kept.
    dropped: u64,
    /// Edges beyond the limit of an answer.
    left_off: u64,
}

fn merge(answers: impl Iterator<Item = Edges>) -> Merged {
    let mut sums: HashMap<Edge, (u64, u64, u64)> = HashMap::new();
    let (mut dropped, mut left_off) = (0u64, 0u64);
    for answer in answers {
        dropped = dropped.saturating_add(answer.dropped);
        left_off = left_off.saturating_add(answer.left_off);
        for edge in answer.edges {
            let (count, denied, last) = (edge.count, edge.denied, edge.last);
            let sum = sums.entry(Edge { count: 0, denied: 0, last: 0, ..edge }).or_default();
            *sum = (sum.0.saturating_add(count), sum.1.saturating_add(denied), sum.2.max(last));
        }
    }
    let mut edges: Vec<Edge> =
        sums.into_iter().map(|(edge, (count, denied, last))| Edge { count, denied, last, ..edge }).collect();
    edges.sort_by(|a, b| {
        (&a.destination, a.port, &a.source, &a.path, &a.method, &a.host).cmp(&(
            &b.destination,
            b.port,
            &b.source,
            &b.path,
            &b.method,
            &b.host,
        ))
    });
    Merged { edges, dropped, left_off }
}

fn notes(merged: &Merged) {
    if merged.left_off > 0 {
        eprintln!("note: {} rarer edges are left off; look at one namespace with -n", merged.left_off);
    }
    if merged.dropped > 0 {
        eprintln!("note: the control plane had no room for {} samples (weft_reports_dropped)", merged.dropped);
    }
}

fn heads(paths: bool) -> &'static [&'static str] {
    if paths {
        &["SOURCE", "IDENTITY", "DESTINATION", "PORT", "PROTOCOL", "TLS", "METHOD", "HOST", "PATH", "REQUESTS", "DENIED"]
    } else {
        &["SOURCE", "IDENTITY", "DESTINATION", "PORT", "PROTOCOL", "TLS", "REQUESTS", "DENIED"]
    }
}

fn rows(merged: &Merged, paths: bool) -> Vec<Vec<String>> {
    merged
        .edges
        .iter()
        .map(|edge| {
            let mut row = vec![
                source(&edge.source),
                identity(&edge.source.identity),
                format!("{}/{}", edge.destination.namespace, short(&edge.destination.kind, &edge.destination.name)),
                edge.port.to_string(),
                edge.protocol.clone(),
                if edge.source.identity.is_empty() { "PLAINTEXT".into() } else { "mTLS".into() },
            ];
            if paths {
                let http = edge.protocol == "http";
                row.extend([
                    or_dash(&edge.method),
                    or_dash(&edge.host),
                    if http && edge.path.is_empty() { "(others)".into() } else { or_dash(&edge.path) },
                ]);
            }
            row.extend([edge.count.to_string(), edge.denied.to_string()]);
            row
        })
        .collect()
}

/// A sender in few words.
pub(crate) fn source(source: &weft_api::console::Source) -> String {
    match (source.namespace.is_empty(), source.workload.is_empty()) {
        (false, false) => format!("{}/{}", source.namespace, source.workload),
        (false, true) => format!("{}/?", source.namespace),
        (true, _) if !source.address.is_empty() => source.address.clone(),
        (true, _) => "?".into(),
    }
}

/// Namespace and service account of a SPIFFE id.
pub(crate) fn account(id: &str) -> Option<(&str, &str)> {
    id.split_once("/ns/").and_then(|(_, rest)| rest.split_once("/sa/"))
}

/// An identity without what all of a mesh have in common.
pub(crate) fn identity(id: &str) -> String {
    match account(id) {
        Some((namespace, account)) => format!("{namespace}/{account}"),
        None => or_dash(id),
    }
}

/// `deploy/web`, as people write it for kubectl.
pub(crate) fn short(kind: &str, name: &str) -> String {
    let kind = match kind {
        "Deployment" => "deploy",
        "StatefulSet" => "sts",
        "DaemonSet" => "ds",
        "ReplicaSet" => "rs",
        other => return format!("{}/{name}", other.to_lowercase()),
    };
    format!("{kind}/{name}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_api::console::{Source, Workload};

    fn edge(identity: &str, address: &str, count: u64) -> Edge {
        let (namespace, workload) = if identity.is_empty() { ("", "") } else { ("shop", "deploy/web") };
        Edge {
            source: Source {
                identity: identity.into(),
                address: address.into(),
                workload: workload.into(),
                namespace: namespace.into(),
            },
            destination: Workload {
                namespace: "shop".into(),
                kind: "Deployment".into(),
                name: "cart".into(),
                ..Workload::default()
            },
            port: 8080,
            protocol: "http".into(),
            count,
            denied: 1,
            last: count,
            ..Edge::default()
        }
    }

    #[test]
    fn replicas_add_up() {
        let id = "spiffe://cluster.local/ns/shop/sa/web";
        let one = Edges { edges: vec![edge(id, "", 3), edge("", "10.0.0.1", 1)], ..Edges::default() };
        let two = Edges { edges: vec![edge(id, "", 4)], dropped: 2, ..Edges::default() };
        let merged = merge([one, two].into_iter());
        assert_eq!(merged.dropped, 2);
        let text = output::table(heads(false), &rows(&merged, false));
        assert_eq!(
            text,
            "SOURCE            IDENTITY   DESTINATION        PORT   PROTOCOL   TLS         REQUESTS   DENIED\n\
             10.0.0.1          -          shop/deploy/cart   8080   http       PLAINTEXT   1          1\n\
             shop/deploy/web   shop/web   shop/deploy/cart   8080   http       mTLS        7          2\n"
        );
    }
}
