//! `weft inject`: manifests in, manifests with the sidecar out.

use anyhow::Context as _;
use std::io::{IsTerminal as _, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use weft_webhook::offline::{Done, Offline, Output};
use weft_webhook::{NativeSidecars, Settings};

/// Arguments of `weft inject`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "YAML goes to standard output, a line per document to standard error. Documents that are not changed come out \
byte for byte; in changed ones comments are lost. A workload is injected unless it, or its Namespace among the files, says no. The exit status is 0 \
only if every document was read and none would be refused at admission; otherwise nothing is printed to standard output, so that a pipe applies all or \
nothing.

Examples:
  weft inject -f app.yaml | kubectl apply -f -
  kubectl get deploy -o yaml | weft inject -f -
  weft inject -f manifests/ > injected.yaml"
)]
pub(crate) struct Args {
    /// A file, a folder (its .yaml, .yml and .json files, sorted), or - for standard input; may be repeated
    #[arg(short = 'f', long = "filename", value_name = "FILE|DIR|-", required = true)]
    filename: Vec<PathBuf>,
    /// The settings to inject by: the `config.yaml` of the control plane's ConfigMap weft-config
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A file with Namespaces, whose annotations count for the pods in them
    #[arg(long, value_name = "FILE")]
    namespace_file: Option<PathBuf>,
    /// Whether the proxy is a native sidecar (Kubernetes 1.29 and newer)
    #[arg(long, value_name = "true|false")]
    native_sidecars: Option<bool>,
}

/// Reads a file of settings, or the defaults.
pub(crate) fn settings(file: Option<&Path>) -> anyhow::Result<Settings> {
    let Some(file) = file else { return Ok(Settings::default()) };
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    Settings::from_yaml(&text).with_context(|| file.display().to_string())
}

/// Runs it.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut settings = settings(args.config.as_deref())?;
    if let Some(native) = args.native_sidecars {
        settings.native_sidecars = if native { NativeSidecars::Enabled } else { NativeSidecars::Disabled };
    }
    let mut offline = Offline::new(settings);
    if let Some(file) = &args.namespace_file {
        offline.note_namespaces(&std::fs::read_to_string(file).with_context(|| file.display().to_string())?);
    }
    let streams = read_all(&args.filename)?;
    for (_, stream) in &streams {
        offline.note_namespaces(stream);
    }
    Ok(print(&streams, |stream| offline.inject(stream)))
}

/// The streams that the arguments name, with their names.
///
/// # Errors
/// A file that can't be read, a folder without manifests.
pub(crate) fn read_all(names: &[PathBuf]) -> anyhow::Result<Vec<(String, String)>> {
    let mut streams = Vec::new();
    for name in names {
        if name.as_os_str() == "-" {
            let mut text = String::new();
            if std::io::stdin().is_terminal() {
                eprintln!("reading from standard input …");
            }
            std::io::stdin().read_to_string(&mut text).context("standard input")?;
            streams.push(("standard input".to_owned(), text));
            continue;
        }
        let mut files = Vec::new();
        collect(name, &mut files)?;
        anyhow::ensure!(!files.is_empty(), "{}: no .yaml, .yml or .json file in it", name.display());
        for file in files {
            let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
            streams.push((file.display().to_string(), text));
        }
    }
    Ok(streams)
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    if !path.is_dir() {
        files.push(path.to_owned());
        return Ok(());
    }
    let entries = std::fs::read_dir(path).with_context(|| path.display().to_string())?;
    let mut inside: Vec<PathBuf> = entries.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
    inside.sort();
    for entry in inside {
        let manifest =
            entry.extension().is_some_and(|e| ["yaml", "yml", "json"].iter().any(|known| e.eq_ignore_ascii_case(known)));
        if entry.is_dir() || manifest {
            collect(&entry, files)?;
        }
    }
    Ok(())
}

/// Works on each stream and prints: documents to standard output, lines to standard error.
///
/// If any document fails, nothing goes to standard output: what stands behind the pipe (`kubectl apply`, mostly) would take a part for the
/// whole, and apply workloads without the sidecar among those that have it.
pub(crate) fn print(streams: &[(String, String)], work: impl Fn(&str) -> Output) -> ExitCode {
    let (text, lines, failed) = outcome(streams, work);
    for line in &lines {
        eprintln!("{line}");
    }
    if failed > 0 {
        let documents = if failed == 1 { "1 document".to_owned() } else { format!("{failed} documents") };
        eprintln!("error: {documents} failed: nothing is printed, so that nothing is applied in part");
        return ExitCode::FAILURE;
    }
    // A reader that has left (head, say) is no error of ours.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
    ExitCode::SUCCESS
}

/// All the documents, all the lines about them, and how many failed.
fn outcome(streams: &[(String, String)], work: impl Fn(&str) -> Output) -> (String, Vec<String>, usize) {
    let (mut text, mut lines, mut failed) = (String::new(), Vec::new(), 0);
    for (name, stream) in streams {
        let out = work(stream);
        if !text.is_empty() && !out.text.is_empty() && !out.text.starts_with("---") {
            text.push_str("---\n");
        }
        text.push_str(&out.text);
        for line in &out.lines {
            lines.extend(line.warnings.iter().map(|warning| format!("warning: {}: {warning}", line.title)));
            if let Done::Failed(_) = line.done {
                failed += 1;
                lines.push(format!("error: {name}: {line}"));
            } else {
                lines.push(line.to_string());
            }
        }
    }
    (text, lines, failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: NAME, annotations: {weft.mesh/dns-capture: \"VALUE\"}}\n\
                       spec: {containers: [{name: a, image: x}]}\n";

    fn pod(name: &str, value: &str) -> (String, String) {
        (format!("{name}.yaml"), POD.replace("NAME", name).replace("VALUE", value))
    }

    fn injected(streams: &[(String, String)]) -> (String, Vec<String>, usize) {
        let offline = Offline::new(Settings::default());
        outcome(streams, |stream| offline.inject(stream))
    }

    #[test]
    fn streams_become_one() {
        let service = ("service.yaml".to_owned(), "kind: Service\nmetadata: {name: s}".to_owned());
        let (text, lines, failed) = injected(&[pod("one", "true"), service, pod("two", "false")]);
        assert_eq!(failed, 0);
        assert_eq!(lines, ["pod/one injected", "service/s skipped: not-a-pod", "pod/two injected"]);
        let documents = weft_webhook::yaml::split(&text);
        assert_eq!(documents.len(), 3);
        assert_eq!(documents[1].trim_start_matches("---\n"), "kind: Service\nmetadata: {name: s}\n");
    }

    #[test]
    fn a_failed_document_is_named_with_its_file_and_the_message_of_admission() {
        let (_, lines, failed) = injected(&[pod("good", "true"), pod("bad", "perhaps"), ("x.yaml".into(), "a: [".into())]);
        assert_eq!(failed, 2);
        assert_eq!(lines[0], "pod/good injected");
        assert!(
            lines[1].starts_with("error: bad.yaml: pod/bad failed: ") && lines[1].contains("weft.mesh/dns-capture"),
            "{}",
            lines[1]
        );
        assert!(lines[2].starts_with("error: x.yaml: document failed: "), "{}", lines[2]);
    }
}
