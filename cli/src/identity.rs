//! `weft identity`: the certificate of each proxy as it reported it, and what signs them. `weft identity rotate` (in [`rotate`]) has them
//! replaced.

mod rotate;

use crate::console::{Console, ConsoleArgs};
use crate::output::{self, Format, or_dash};
use serde::Serialize;
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};
use weft_api::console::{Answer, Authority, Certificate, Proxies, Proxy};

/// Arguments of `weft identity`.
#[derive(Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:
  weft identity
  weft identity -A
  weft identity -n shop -o json
  weft identity rotate --wait
  weft identity rotate --root"
)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// Namespace of the pods (default: the context's)
    #[arg(short, long)]
    namespace: Option<String>,
    /// All namespaces
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    all_namespaces: bool,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    console: ConsoleArgs,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Have all certificates replaced, or the root too
    Rotate(rotate::Args),
}

/// Runs it.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match &args.command {
            Some(Command::Rotate(rotate)) => rotate::run(rotate, &args.console).await,
            None => list(args).await,
        }
    })
}

/// What is printed for programs.
#[derive(Debug, Serialize)]
struct Listed {
    authority: Authority,
    proxies: Vec<Shown>,
}

/// A proxy and its certificate.
#[derive(Debug, Serialize)]
struct Shown {
    namespace: String,
    pod: String,
    certificate: Option<Certificate>,
}

async fn list(args: &Args) -> anyhow::Result<ExitCode> {
    let console = Console::open(&args.console).await?;
    let namespace = match (&args.namespace, args.all_namespaces) {
        (_, true) => "",
        (Some(namespace), _) => namespace,
        (None, _) => console.namespace(),
    };
    let proxies = merge(console.get::<Proxies>("/v1/proxies", &[("namespace", namespace)]).await?);
    let authorities = console.get::<Authority>("/v1/authority", &[]).await?;
    let listed = Listed { authority: one(&authorities), proxies };
    let now = now();
    if !output::structured(args.output, &listed)? {
        if listed.proxies.is_empty() {
            let place = if namespace.is_empty() { "any namespace".into() } else { format!("namespace {namespace}") };
            eprintln!("No proxy of {place} is attached to the control plane.");
        } else {
            let heads = ["NAMESPACE", "POD", "IDENTITY", "EXPIRES IN", "ISSUER", "SERIAL"];
            print!("{}", output::table(&heads, &listed.proxies.iter().map(|p| row(p, now)).collect::<Vec<_>>()));
        }
    }
    notes(&listed, &authorities, now);
    Ok(ExitCode::SUCCESS)
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// The proxies that are attached, each once: a replica from which it went may still remember it.
fn merge(answers: Vec<Answer<Proxies>>) -> Vec<Shown> {
    let mut newest: BTreeMap<(String, String), Proxy> = BTreeMap::new();
    for proxy in answers.into_iter().flat_map(|answer| answer.data.proxies).filter(|proxy| proxy.connected) {
        let key = (proxy.namespace.clone(), proxy.pod.clone());
        if newest.get(&key).is_none_or(|known| known.since < proxy.since) {
            newest.insert(key, proxy);
        }
    }
    newest.into_iter().map(|((namespace, pod), proxy)| Shown { namespace, pod, certificate: proxy.certificate }).collect()
}

/// What the replicas say of the authority, as that of them tells it that leads, or else one that can sign.
fn one(answers: &[Answer<Authority>]) -> Authority {
    let by = |wanted: fn(&Authority) -> bool| answers.iter().map(|answer| &answer.data).find(|authority| wanted(authority));
    by(|a| !a.waiting.is_empty()).or_else(|| by(|a| !a.subject.is_empty())).or_else(|| by(|_| true)).cloned().unwrap_or_default()
}

fn row(proxy: &Shown, now: u64) -> Vec<String> {
    let certificate = proxy.certificate.clone().unwrap_or_default();
    let expires = match certificate.not_after {
        0 => String::new(),
        end if end <= now => "expired".into(),
        end => span(end - now),
    };
    vec![
        proxy.namespace.clone(),
        proxy.pod.clone(),
        or_dash(&certificate.identity),
        or_dash(&expires),
        or_dash(name(&certificate.issuer)),
        or_dash(&certificate.serial),
    ]
}

/// The issuer without its key id, which only programs compare.
fn name(issuer: &str) -> &str {
    issuer.split_once(" (").map_or(issuer, |(name, _)| name)
}

/// A time for people: its two greatest units.
fn span(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, minutes) => format!("{minutes}m{:02}s", seconds % 60),
        (0, hours, minutes) => format!("{hours}h{minutes:02}m"),
        (days, hours, _) => format!("{days}d{hours:02}h"),
    }
}

/// What should be looked at.
fn notes(listed: &Listed, authorities: &[Answer<Authority>], now: u64) {
    for proxy in &listed.proxies {
        let place = format!("{}/{}", proxy.namespace, proxy.pod);
        match &proxy.certificate {
            None => eprintln!("note: {place} has told of no certificate yet"),
            Some(certificate) if !certificate.error.is_empty() => {
                eprintln!("note: {place} can't renew its certificate: {}", output::printable(&certificate.error));
            }
            Some(_) => {}
        }
    }
    for answer in authorities.iter().filter(|answer| !answer.data.problem.is_empty()) {
        eprintln!("note: {}: {}", answer.replica, output::printable(&answer.data.problem));
    }
    if !listed.authority.waiting.is_empty() {
        eprintln!("note: a rotation is under way: {}", output::printable(&listed.authority.waiting));
    }
    let end = listed.authority.not_after;
    if end != 0 && end < now + 7 * 86_400 {
        let left = if end <= now { "has expired".into() } else { format!("expires in {}", span(end - now)) };
        eprintln!("note: the issuer {:?} {left}", listed.authority.subject);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxy(pod: &str, connected: bool, since: u64, serial: &str) -> Proxy {
        let certificate = Certificate {
            identity: "spiffe://cluster.local/ns/shop/sa/cart".into(),
            not_after: 10_000,
            issuer: "CN=Weft root 1234, O=Weft (abcd)".into(),
            serial: serial.into(),
            ..Certificate::default()
        };
        let certificate = (!serial.is_empty()).then_some(certificate);
        Proxy { namespace: "shop".into(), pod: pod.into(), connected, since, certificate, ..Proxy::default() }
    }

    fn answer<T>(replica: &str, data: T) -> Answer<T> {
        Answer { version: "1".into(), replica: replica.into(), data }
    }

    #[test]
    fn each_proxy_once_where_it_is_now() {
        let one = Proxies { proxies: vec![proxy("b", true, 5, "01"), proxy("a", false, 9, "02")] };
        let two = Proxies { proxies: vec![proxy("b", true, 7, "03"), proxy("a", true, 1, "04"), proxy("c", true, 1, "")] };
        let merged = merge(vec![answer("x", one), answer("y", two)]);
        let serials: Vec<_> =
            merged.iter().map(|p| (p.pod.as_str(), p.certificate.as_ref().map_or("", |c| c.serial.as_str()))).collect();
        assert_eq!(serials, [("a", "04"), ("b", "03"), ("c", "")]);
        let row = row(&merged[0], 10_000 - 3700);
        assert_eq!(row, ["shop", "a", "spiffe://cluster.local/ns/shop/sa/cart", "1h01m", "CN=Weft root 1234, O=Weft", "04"]);
        assert_eq!(super::row(&merged[2], 0)[2..], ["-", "-", "-", "-"]);
        assert_eq!(super::row(&merged[0], 10_000)[3], "expired");
    }

    #[test]
    fn the_leader_knows_most_of_the_authority() {
        let authority =
            |subject: &str, waiting: &str| Authority { subject: subject.into(), waiting: waiting.into(), ..Authority::default() };
        assert_eq!(one(&[answer("a", authority("", "")), answer("b", authority("CN=x", ""))]).subject, "CN=x");
        assert_eq!(one(&[answer("a", authority("CN=x", "")), answer("b", authority("", "time"))]).waiting, "time");
        assert_eq!(one(&[]), Authority::default());
    }

    #[test]
    fn spans() {
        for (seconds, text) in [(5, "5s"), (65, "1m05s"), (3600, "1h00m"), (86_399, "23h59m"), (90_000, "1d01h")] {
            assert_eq!(span(seconds), text);
        }
    }
}
