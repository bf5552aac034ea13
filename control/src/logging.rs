//! The log: `tracing` to standard error, as text or JSON.

use crate::flags::LogFormat;
use tracing_subscriber::EnvFilter;

/// Starts logging.
///
/// # Errors
/// The filter can't be read.
pub fn start(filter: &str, format: LogFormat) -> anyhow::Result<()> {
    // What libraries say below a warning is for those who ask for it; the client logs each failed call as an error, which whoever
    // made the call says better.
    let quiet = [
        "kube=warn",
        "kube_client=warn",
        "kube_client::client::builder=off",
        "kube_runtime=warn",
        "kube_runtime::watcher=error",
        "hyper=warn",
        "h2=warn",
        "rustls=warn",
        "tower=warn",
    ];
    let mut parsed = EnvFilter::try_new(quiet.join(","))?;
    for directive in filter.split(',').map(str::trim).filter(|d| !d.is_empty()) {
        let directive = directive.parse().map_err(|e| {
            anyhow::anyhow!(
                "--log-level: {directive:?} is no log filter ({e}); try error, warn, info, debug, trace, or MODULE=LEVEL"
            )
        })?;
        parsed = parsed.add_directive(directive);
    }
    let log = tracing_subscriber::fmt().with_env_filter(parsed).with_writer(std::io::stderr);
    let result = match format {
        LogFormat::Text => log.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).try_init(),
        LogFormat::Json => log.json().flatten_event(true).with_current_span(false).with_span_list(false).try_init(),
    };
    result.map_err(|e| anyhow::anyhow!("cannot start logging: {e}"))
}
