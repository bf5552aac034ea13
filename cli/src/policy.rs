//! `weft policy preview`: who would be refused by proposed policies, and who newly let in, judged by the traffic of the last hour.
//!
//! Exit codes: 0 nothing would be refused that passes now, 1 something would, or it can't be told, or the command failed.

use crate::console::{Console, ConsoleArgs};
use crate::edges::{identity, short, source};
use crate::output::{self, Format, or_dash};
use anyhow::{Context as _, bail};
use serde_json::Value;
use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use weft_api::console::{Change, Effect, Preview, Proposal};

/// Arguments of `weft policy`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Tell who would be refused by policies, and who newly let in, by the traffic that the proxies saw
    Preview(PreviewArgs),
}

/// Arguments of `weft policy preview`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  weft policy preview -f strict.yaml
  weft policy preview -f policies/ -n shop --since 10m
  kubectl kustomize overlays/prod | weft policy preview -f - -o json

Exit status: 0 nothing that passes now would be refused, 1 something would (or it can't be told), or it failed.")]
struct PreviewArgs {
    /// File or folder of AuthorizationPolicies and PeerAuthentications, or - for standard input; may be repeated
    #[arg(short = 'f', long = "filename", value_name = "FILE|DIR|-", required = true)]
    filename: Vec<PathBuf>,
    /// Namespace of objects that name none (default: the context's)
    #[arg(short, long)]
    namespace: Option<String>,
    /// How far back to look: 90s, 10m, up to 1h
    #[arg(long, default_value = "1h", value_name = "TIME", value_parser = seconds)]
    since: u64,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    console: ConsoleArgs,
}

/// Runs it.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let Command::Preview(args) = &args.command;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(preview(args))
}

fn seconds(text: &str) -> Result<u64, String> {
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let factor = match unit {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err("expected a time as 90s, 10m or 1h".into()),
    };
    let number = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(factor)).filter(|n| (1..=3600).contains(n));
    number.ok_or_else(|| "samples are kept for an hour: expected 1s to 1h".into())
}

async fn preview(args: &PreviewArgs) -> anyhow::Result<ExitCode> {
    let mut objects = Vec::new();
    for file in &args.filename {
        objects.extend(read(file)?);
    }
    let console = Console::open(&args.console).await?;
    let namespace = args.namespace.as_deref().unwrap_or(console.namespace());
    for object in &mut objects {
        if object.pointer("/metadata/namespace").and_then(Value::as_str).unwrap_or_default().is_empty()
            && object["metadata"].is_object()
        {
            object["metadata"]["namespace"] = namespace.into();
        }
    }
    let proposal = Proposal { objects, since_seconds: args.since };
    let answers = console.post::<_, Preview>("/v1/preview", &proposal).await?;
    let merged = merge(answers.into_iter().map(|a| a.data));
    if !output::structured(args.output, &merged)? {
        print!("{}", describe(&merged, args.since));
    }
    let harmless = merged.left_off == 0 && merged.changes.iter().all(|c| c.effect == Effect::Allowed);
    Ok(if harmless { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// All objects of a file, a folder (its YAML and JSON files, those of sub-folders too) or standard input.
fn read(path: &Path) -> anyhow::Result<Vec<Value>> {
    let mut objects = Vec::new();
    if path.is_dir() {
        let mut entries: Vec<PathBuf> =
            std::fs::read_dir(path).with_context(|| path.display().to_string())?.filter_map(|e| Some(e.ok()?.path())).collect();
        entries.sort();
        for entry in entries {
            let hidden = entry.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
            let wanted = entry.extension().is_some_and(|e| ["yaml", "yml", "json"].iter().any(|w| e.eq_ignore_ascii_case(w)));
            if !hidden && (wanted || entry.is_dir()) {
                objects.extend(read(&entry)?);
            }
        }
        return Ok(objects);
    }
    let text = if path == Path::new("-") {
        std::io::read_to_string(std::io::stdin()).context("standard input")?
    } else {
        std::fs::read_to_string(path).with_context(|| path.display().to_string())?
    };
    let documents: Vec<Value> =
        serde_saphyr::from_multiple(&text).with_context(|| format!("{}: not readable as YAML", path.display()))?;
    for document in documents {
        match document {
            Value::Null => {}
            Value::Object(_) if document["kind"] == "List" => {
                objects.extend(document["items"].as_array().into_iter().flatten().cloned());
            }
            Value::Object(_) => objects.push(document),
            _ => bail!("{}: a document is no object", path.display()),
        }
    }
    Ok(objects)
}

fn merge(answers: impl Iterator<Item = Preview>) -> Preview {
    let mut merged = Preview::default();
    let mut sums: HashMap<Change, u64> = HashMap::new();
    let mut notes = BTreeSet::new();
    for answer in answers {
        for change in answer.changes {
            let count = change.count;
            let sum = sums.entry(Change { count: 0, ..change }).or_default();
            *sum = sum.saturating_add(count);
        }
        merged.left_off += answer.left_off;
        merged.unchanged += answer.unchanged;
        merged.gone += answer.gone;
        merged.dropped += answer.dropped;
        merged.kept_seconds = merged.kept_seconds.max(answer.kept_seconds);
        notes.extend(answer.notes);
    }
    merged.notes = notes.into_iter().collect();
    merged.changes = sums.into_iter().map(|(change, count)| Change { count, ..change }).collect();
    merged.changes.sort_by(|a, b| {
        (a.effect, std::cmp::Reverse(a.count), &a.destination, &a.source, a.port, &a.path, &a.method, &a.reason).cmp(&(
            b.effect,
            std::cmp::Reverse(b.count),
            &b.destination,
            &b.source,
            b.port,
            &b.path,
            &b.method,
            &b.reason,
        ))
    });
    merged
}

fn describe(preview: &Preview, since: u64) -> String {
    let mut text = String::new();
    let total = |effect| preview.changes.iter().filter(|c| c.effect == effect).map(|c| c.count).sum::<u64>();
    let (refused, unknown, allowed) = (total(Effect::Refused), total(Effect::Undetermined), total(Effect::Allowed));
    let seen = refused + unknown + allowed + preview.unchanged + preview.gone;
    if !preview.changes.is_empty() {
        let rows: Vec<Vec<String>> = preview.changes.iter().map(row).collect();
        let heads = ["WOULD BE", "SOURCE", "IDENTITY", "DESTINATION", "PORT", "REQUEST", "COUNT", "POLICY", "REASON"];
        text.push_str(&output::table(&heads, &rows));
        text.push('\n');
    }
    let minutes = since.min(preview.kept_seconds.max(1)).div_ceil(60);
    text.push_str(&format!(
        "Of {seen} requests and connections of the last {minutes} min: {refused} would be refused, {allowed} newly allowed, {unknown} undetermined, {} unchanged.\n",
        preview.unchanged
    ));
    if preview.gone > 0 {
        text.push_str(&format!("{} went to pods that are gone.\n", preview.gone));
    }
    if preview.left_off > 0 {
        text.push_str(&format!("{} rarer changes are left off.\n", preview.left_off));
    }
    if preview.dropped > 0 {
        text.push_str(&format!("The control plane had no room for {} samples: the picture is not complete.\n", preview.dropped));
    }
    if seen == 0 {
        text.push_str("No traffic to meshed pods was seen: this says nothing about the policies.\n");
    }
    for note in &preview.notes {
        text.push_str(&format!("note: {note}\n"));
    }
    text
}

fn row(change: &Change) -> Vec<String> {
    let request = match (change.protocol.as_str(), change.path.is_empty()) {
        ("http", false) => format!("{} {}{}", or_dash(&change.method), change.host, change.path),
        ("http", true) if change.method.is_empty() => "(not known)".into(),
        ("http", true) => format!("{} (others)", change.method),
        _ => "connection".into(),
    };
    let effect = match change.effect {
        Effect::Refused => "REFUSED",
        Effect::Undetermined => "UNDETERMINED",
        Effect::Allowed => "allowed",
    };
    vec![
        effect.into(),
        source(&change.source),
        identity(&change.source.identity),
        format!("{}/{}", change.destination.namespace, short(&change.destination.kind, &change.destination.name)),
        change.port.to_string(),
        request,
        change.count.to_string(),
        or_dash(&change.policy),
        change.reason.clone(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_api::console::{Source, Workload};

    #[test]
    fn times() {
        assert_eq!((seconds("10m"), seconds("90"), seconds("1h")), (Ok(600), Ok(90), Ok(3600)));
        for bad in ["2h", "0s", "x", "1d", ""] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn files_folders_and_lists() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        std::fs::write(dir.path().join("a.yaml"), "kind: A\n---\n---\nkind: List\nitems: [{kind: B}, {kind: C}]\n").unwrap();
        std::fs::write(dir.path().join("sub/b.json"), "{\"kind\": \"D\"}").unwrap();
        std::fs::write(dir.path().join("notes.txt"), "no").unwrap();
        std::fs::write(dir.path().join(".hidden.yaml"), "[").unwrap();
        let kinds: Vec<String> = read(dir.path()).unwrap().iter().map(|o| o["kind"].as_str().unwrap().to_owned()).collect();
        assert_eq!(kinds, ["A", "B", "C", "D"]);
        assert!(format!("{:#}", read(&dir.path().join("absent.yaml")).unwrap_err()).contains("absent.yaml"));
    }

    #[test]
    fn replicas_add_up() {
        let change = |effect, count, policy: &str| Change {
            effect,
            source: Source {
                identity: "spiffe://t/ns/a/sa/b".into(),
                namespace: "a".into(),
                workload: "deploy/b".into(),
                ..Source::default()
            },
            destination: Workload {
                namespace: "shop".into(),
                kind: "Deployment".into(),
                name: "cart".into(),
                ..Workload::default()
            },
            port: 8080,
            protocol: "http".into(),
            method: "GET".into(),
            path: "/x".into(),
            host: "cart".into(),
            count,
            policy: policy.into(),
            reason: "why".into(),
        };
        let one = Preview {
            changes: vec![change(Effect::Refused, 2, "shop/p"), change(Effect::Allowed, 9, "")],
            unchanged: 5,
            kept_seconds: 600,
            notes: vec!["n".into()],
            ..Preview::default()
        };
        let merged = merge([one.clone(), one].into_iter());
        let text = describe(&merged, 3600);
        assert!(
            text.contains("REFUSED    a/deploy/b   a/b        shop/deploy/cart   8080   GET cart/x   4       shop/p   why\n"),
            "{text}"
        );
        assert!(text.contains("Of 32 requests and connections of the last 10 min: 4 would be refused, 18 newly allowed, 0 undetermined, 10 unchanged."), "{text}");
        assert_eq!(text.matches("note: n").count(), 1);
    }
}
