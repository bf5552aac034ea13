//! `weft inject`: manifests in, manifests with the sidecar out.

use anyhow::Context as _;
use std::io::{IsTerminal as _, Read as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use weft_webhook::offline::{Offline, Output};
use weft_webhook::{NativeSidecars, Settings};

/// Arguments of `weft inject`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "YAML goes to standard output, a line per document to standard error. Documents that are not changed come out \
byte for byte; in changed ones comments are lost. A workload is injected unless it, or its Namespace among the files, says no. The exit status is 0 \
only if every document was read and none would be refused at admission.

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
pub(crate) fn print(streams: &[(String, String)], work: impl Fn(&str) -> Output) -> ExitCode {
    let mut fine = true;
    let mut begun = false;
    for (name, stream) in streams {
        let out = work(stream);
        if begun && !out.text.is_empty() && !out.text.starts_with("---") {
            println!("---");
        }
        begun |= !out.text.is_empty();
        print!("{}", out.text);
        for line in &out.lines {
            for warning in &line.warnings {
                eprintln!("warning: {}: {warning}", line.title);
            }
            if let weft_webhook::offline::Done::Failed(_) = line.done {
                eprintln!("error: {name}: {line}");
            } else {
                eprintln!("{line}");
            }
        }
        fine &= out.is_fine();
    }
    if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
