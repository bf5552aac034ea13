//! `weft why request`: what would become of a request, or what became of a refused one, and each rule that was looked at. The verdict is
//! computed by the control plane with the proxy's own code, on what the proxy of a pod behind the destination is sent.

use crate::console::{Console, ConsoleArgs};
use crate::edges::{identity, short, source};
use crate::output::{self, Format, printable};
use anyhow::{Context as _, bail};
use std::process::ExitCode;
use weft_api::console::{Caller, Explained, Judged, Question, QuestionHttp, Refusal, Refusals};

/// Arguments of `weft why request`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  weft why request --from pod/frontend-5d4f-x --to svc/cart --method GET --path /api/items
  weft why request --from sa web/frontend --to svc/cart:8080 -n shop --path /admin --header x-user=ann
  weft why request --from plaintext --to deploy/cart --tcp
  weft why request --id 7a8c1f0e-2f0b-4b83-9c5d-0f6f5b8c1f0e

Exit status: 0 it is allowed, 1 it is refused (or would be decided by an external authorizer), or the question has no answer.")]
pub(crate) struct Args {
    /// Who calls: pod/NAME, pod/NAMESPACE/NAME, `sa NAMESPACE/NAME`, plaintext, or plaintext/ADDRESS
    #[arg(long, num_args = 1..=2, value_names = ["WHO", "NAME"], required_unless_present = "id", conflicts_with = "id")]
    from: Vec<String>,
    /// What is called: svc/NAME[:PORT], pod/NAME[:PORT], deploy/NAME[:PORT] …
    #[arg(long, value_name = "TYPE/NAME[:PORT]", required_unless_present = "id", conflicts_with = "id")]
    to: Option<String>,
    /// HTTP method
    #[arg(long, default_value = "GET")]
    method: String,
    /// Path, with the query if there is one
    #[arg(long, default_value = "/")]
    path: String,
    /// A header field; may be repeated
    #[arg(long = "header", short = 'H', value_name = "NAME=VALUE", value_parser = header)]
    headers: Vec<(String, String)>,
    /// Host header (default: the name of what is called)
    #[arg(long, default_value = "")]
    host: String,
    /// `issuer/subject` of a token that is taken for verified
    #[arg(long, value_name = "ISSUER/SUBJECT", default_value = "")]
    request_principal: String,
    /// Opaque TCP instead of HTTP
    #[arg(long)]
    tcp: bool,
    /// A request that was refused, by its x-request-id
    #[arg(long, value_name = "REQUEST_ID")]
    id: Option<String>,
    /// Namespace of what is called, and of a pod that calls (default: the context's)
    #[arg(short, long)]
    namespace: Option<String>,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    console: ConsoleArgs,
}

/// Runs it.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let console = Console::open(&args.console).await?;
        match &args.id {
            Some(id) => refused(&console, id, args).await,
            None => supposed(&console, args).await,
        }
    })
}

fn header(text: &str) -> Result<(String, String), String> {
    match text.split_once('=').or_else(|| text.split_once(':')) {
        Some((name, value)) if !name.trim().is_empty() => Ok((name.trim().to_lowercase(), value.trim().to_owned())),
        _ => Err("expected NAME=VALUE".into()),
    }
}

/// Who calls, from what was written.
fn caller(from: &[String], namespace: &str) -> anyhow::Result<Caller> {
    let words: Vec<&str> = from.iter().map(String::as_str).collect();
    let (kind, name) = match words[..] {
        [one] => one.split_once('/').unwrap_or((one, "")),
        [kind, name] => (kind, name),
        _ => bail!("--from: expected pod/NAME, sa NAMESPACE/NAME, or plaintext"),
    };
    let (inside, bare) = name.split_once('/').unwrap_or((namespace, name));
    let full = |bare: &str| -> anyhow::Result<(String, String)> {
        anyhow::ensure!(!bare.is_empty(), "--from {kind}: the name is missing");
        Ok((inside.to_owned(), bare.to_owned()))
    };
    Ok(match kind {
        "pod" | "pods" | "po" => {
            let (namespace, name) = full(bare)?;
            Caller::Pod { namespace, name }
        }
        "sa" | "serviceaccount" | "serviceaccounts" => {
            let (namespace, name) = full(bare)?;
            Caller::ServiceAccount { namespace, name }
        }
        "plaintext" => Caller::Plaintext { address: name.to_owned() },
        other => bail!("--from {other}: expected pod/NAME, sa NAMESPACE/NAME, or plaintext"),
    })
}

/// `svc/b:80` taken apart.
fn destination(to: &str) -> (&str, &str) {
    to.rsplit_once(':').unwrap_or((to, ""))
}

async fn supposed(console: &Console, args: &Args) -> anyhow::Result<ExitCode> {
    let namespace = args.namespace.as_deref().unwrap_or(console.namespace());
    let (to, port) = destination(args.to.as_deref().context("--to is missing")?);
    let http = QuestionHttp {
        method: args.method.clone(),
        path: args.path.clone(),
        host: args.host.clone(),
        headers: args.headers.clone(),
        request_principal: args.request_principal.clone(),
    };
    let question = Question {
        from: caller(&args.from, namespace)?,
        namespace: namespace.to_owned(),
        to: to.to_owned(),
        port: port.to_owned(),
        http: (!args.tcp).then_some(http),
    };
    // All replicas know the same configuration.
    let answers = console.post::<_, Explained>("/v1/explain", &question).await?;
    let explained = answers.into_iter().next().context("no answer")?.data;
    if !output::structured(args.output, &explained)? {
        let texts: Vec<String> = explained.verdicts.iter().map(describe).collect();
        print!("{}", texts.join("\n"));
    }
    Ok(exit(&explained))
}

fn exit(explained: &Explained) -> ExitCode {
    if explained.verdicts.iter().all(|v| v.verdict == "allow") { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn refused(console: &Console, id: &str, args: &Args) -> anyhow::Result<ExitCode> {
    let answers = console.get::<Refusals>("/v1/refusals", &[("id", id)]).await?;
    let mut found: Vec<Refusal> = answers.into_iter().flat_map(|a| a.data.refusals).collect();
    found.sort_by_key(|r| std::cmp::Reverse(r.time));
    if found.is_empty() {
        bail!(
            "no refused request with the id {id} is known. The last 10,000 that policies refused are kept, and proxies tell of them \
             within some seconds; was it refused by a policy at all? (the response has status 403)"
        );
    }
    if output::structured(args.output, &Refusals { refusals: found.clone() })? {
        return Ok(ExitCode::FAILURE);
    }
    let Some(newest) = found.first() else { return Ok(ExitCode::FAILURE) };
    print!("{}", story(newest));
    if found.len() > 1 {
        println!("({} requests bore this id; this was the newest.)", found.len());
    }
    // What the configuration of now says, rule by rule.
    match console.post::<_, Explained>("/v1/explain", &again(newest)).await {
        Ok(answers) => {
            if let Some(judged) = answers.into_iter().next().and_then(|a| a.data.verdicts.into_iter().next()) {
                println!("\nWhat the configuration of now says of it (without its headers and token):");
                print!("{}", describe(&judged));
            }
        }
        Err(error) => println!("\nIt can't be judged anew: {error:#}"),
    }
    Ok(ExitCode::FAILURE)
}

fn story(refusal: &Refusal) -> String {
    let what = if refusal.method.is_empty() {
        "A connection".to_owned()
    } else {
        format!("{} {}{}", refusal.method, refusal.host, refusal.path)
    };
    let who = if refusal.source.identity.is_empty() {
        format!("{} ({} in plaintext)", source(&refusal.source), refusal.source.address)
    } else {
        format!("{} (identity {})", source(&refusal.source), identity(&refusal.source.identity))
    };
    let by = if refusal.policy.is_empty() { String::new() } else { format!(", policy {}", refusal.policy) };
    printable(&format!(
        "{what} from {who} to port {} of {}/{} ({}) was refused {}: {}{by}.",
        refusal.port,
        refusal.namespace,
        short(&refusal.destination.kind, &refusal.destination.name),
        format_args!("pod/{}", refusal.pod),
        ago(refusal.time),
        refusal.reason
    )) + "\n"
}

fn ago(milliseconds: u64) -> String {
    let then = std::time::UNIX_EPOCH + std::time::Duration::from_millis(milliseconds);
    match std::time::SystemTime::now().duration_since(then).map(|d| d.as_secs()) {
        Ok(seconds @ 0..=119) => format!("{seconds} s ago"),
        Ok(seconds) => format!("{} min ago", seconds / 60),
        Err(_) => "just now".into(),
    }
}

fn again(refusal: &Refusal) -> Question {
    let from = match crate::edges::account(&refusal.source.identity) {
        Some((namespace, name)) => Caller::ServiceAccount { namespace: namespace.into(), name: name.into() },
        None => Caller::Plaintext { address: refusal.source.address.clone() },
    };
    let http = (!refusal.method.is_empty()).then(|| QuestionHttp {
        method: refusal.method.clone(),
        path: refusal.path.clone(),
        host: refusal.host.clone(),
        ..QuestionHttp::default()
    });
    Question {
        from,
        namespace: refusal.namespace.clone(),
        to: format!("pod/{}", refusal.pod),
        port: refusal.port.to_string(),
        http,
    }
}

fn describe(judged: &Judged) -> String {
    let verdict = match judged.verdict.as_str() {
        "allow" => "ALLOWED",
        "deny" => "REFUSED",
        "ask" => "AN EXTERNAL AUTHORIZER DECIDES",
        other => other,
    };
    let mut text = format!("{}\n{verdict}: {}\n", judged.request, judged.reason);
    if judged.pods.len() > 1 {
        text.push_str(&format!("  (the same for {} pods)\n", judged.pods.len()));
    }
    for policy in &judged.policies {
        let dry_run = if policy.dry_run { ", dry run" } else { "" };
        let outcome = if policy.matched { "matches" } else { "does not match" };
        text.push_str(&format!("  {} ({}{dry_run}): {outcome}\n", policy.policy, policy.action));
        if !policy.note.is_empty() {
            text.push_str(&format!("    {}\n", policy.note));
        }
        for rule in &policy.rules {
            if rule.matched {
                text.push_str(&format!("    rules[{}]: matches\n", rule.rule));
                continue;
            }
            text.push_str(&format!("    rules[{}]: does not match\n", rule.rule));
            for failed in &rule.failed {
                text.push_str(&format!("      {failed}\n"));
            }
        }
    }
    if !judged.dry_run.is_empty() {
        text.push_str(&format!("  dry run: {}\n", judged.dry_run));
    }
    for note in &judged.notes {
        text.push_str(&format!("  note: {note}\n"));
    }
    text.lines().map(|line| printable(line) + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_api::console::{Trace, TraceRule};

    #[test]
    fn who_calls() {
        let from = |words: &[&str]| caller(&words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>(), "here");
        let pod = |ns: &str, name: &str| Caller::Pod { namespace: ns.into(), name: name.into() };
        let sa = |ns: &str, name: &str| Caller::ServiceAccount { namespace: ns.into(), name: name.into() };
        assert_eq!(from(&["pod/a"]).unwrap(), pod("here", "a"));
        assert_eq!(from(&["pod/there/a"]).unwrap(), pod("there", "a"));
        assert_eq!(from(&["sa", "there/b"]).unwrap(), sa("there", "b"));
        assert_eq!(from(&["sa/b"]).unwrap(), sa("here", "b"));
        assert_eq!(from(&["plaintext"]).unwrap(), Caller::Plaintext { address: String::new() });
        assert_eq!(from(&["plaintext/10.0.0.1"]).unwrap(), Caller::Plaintext { address: "10.0.0.1".into() });
        for bad in [&["deploy/a"][..], &["pod/"], &["pod"], &["sa"]] {
            assert!(from(bad).is_err(), "{bad:?}");
        }
        assert_eq!(destination("svc/b:80"), ("svc/b", "80"));
        assert_eq!(destination("svc/b"), ("svc/b", ""));
        assert_eq!(header("X-A=b=c").unwrap(), ("x-a".into(), "b=c".into()));
        assert_eq!(header("X-A: b").unwrap(), ("x-a".into(), "b".into()));
        assert!(header("x").is_err());
    }

    #[test]
    fn a_verdict_in_words() {
        let judged = Judged {
            pods: vec!["cart-1".into()],
            request: "GET /x from a to b".into(),
            verdict: "deny".into(),
            reason: "there are ALLOW policies, and none matches".into(),
            policies: vec![Trace {
                policy: "shop/p".into(),
                action: "ALLOW".into(),
                rules: vec![TraceRule { rule: 0, matched: false, failed: vec!["to[0].operation.paths: \u{1b}[31m".into()] }],
                ..Trace::default()
            }],
            notes: vec!["n".into()],
            ..Judged::default()
        };
        assert_eq!(
            describe(&judged),
            "GET /x from a to b\nREFUSED: there are ALLOW policies, and none matches\n  shop/p (ALLOW): does not match\n    \
             rules[0]: does not match\n      to[0].operation.paths: \u{fffd}[31m\n  note: n\n"
        );
    }
}
