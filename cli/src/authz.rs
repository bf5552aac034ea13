//! `weft authz`: the policies in force for the pods behind a name, how often they decided, and where mutual TLS is asked for.

use crate::console::{Console, ConsoleArgs};
use crate::output::{self, Format, or_dash};
use std::process::ExitCode;
use weft_api::console::{Authz, AuthzPolicy, Mtls};

/// Arguments of `weft authz`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  weft authz svc/cart
  weft authz deploy/cart -n shop
  weft authz pod/cart-5d4f8c7b6-x2x9k -o json")]
pub(crate) struct Args {
    /// svc/NAME, pod/NAME, deploy/NAME, sts/NAME, ds/NAME …
    target: String,
    /// Namespace (default: the context's)
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
    runtime.block_on(ask(args))
}

async fn ask(args: &Args) -> anyhow::Result<ExitCode> {
    let console = Console::open(&args.console).await?;
    let namespace = args.namespace.as_deref().unwrap_or(console.namespace());
    let answers = console.get::<Authz>("/v1/authz", &[("namespace", namespace), ("target", &args.target)]).await?;
    let merged = merge(answers.into_iter().map(|a| a.data));
    if !output::structured(args.output, &merged)? {
        print!("{}", describe(&args.target, namespace, &merged));
    }
    Ok(ExitCode::SUCCESS)
}

/// All replicas say the same of what holds; each knows a part of the hits.
fn merge(answers: impl Iterator<Item = Authz>) -> Authz {
    let mut merged = Authz::default();
    for (i, answer) in answers.enumerate() {
        if i == 0 {
            merged = answer;
            continue;
        }
        for policy in answer.policies {
            let same =
                |p: &&mut AuthzPolicy| (&p.policy, &p.action, p.dry_run) == (&policy.policy, &policy.action, policy.dry_run);
            if let Some(known) = merged.policies.iter_mut().find(same) {
                known.allowed = known.allowed.saturating_add(policy.allowed);
                known.denied = known.denied.saturating_add(policy.denied);
            }
        }
    }
    merged
}

fn describe(target: &str, namespace: &str, authz: &Authz) -> String {
    let mut text = format!("{target} in namespace {namespace}: {}\n", count(authz.pods.len() as u64, "pod"));
    if !authz.unmeshed.is_empty() {
        text.push_str(&format!("Without a sidecar, so nothing is enforced there: {}\n", authz.unmeshed.join(", ")));
    }
    if authz.unmeshed.len() == authz.pods.len() {
        return text;
    }
    text.push_str("\nMutual TLS (PeerAuthentication):\n");
    let mut rows: Vec<Vec<String>> =
        authz.ports.iter().map(|p| vec![p.port.to_string(), or_dash(&p.protocol), modes(&p.mtls)]).collect();
    rows.push(vec![if rows.is_empty() { "all".into() } else { "others".into() }, "-".into(), modes(&authz.mtls)]);
    text.push_str(&output::table(&["PORT", "PROTOCOL", "MODE"], &rows));
    text.push_str("\nAuthorization:\n");
    if authz.policies.is_empty() {
        text.push_str("No AuthorizationPolicy selects these pods: everything that gets in is allowed.\n");
    } else {
        let meshed = (authz.pods.len() - authz.unmeshed.len()) as u64;
        let rows: Vec<Vec<String>> = authz.policies.iter().map(|p| row(p, meshed)).collect();
        text.push_str(&output::table(&["POLICY", "ACTION", "RULES", "ALLOWED", "DENIED", "NOTE"], &rows));
    }
    if !authz.request_authentications.is_empty() {
        text.push_str(&format!("\nTokens (RequestAuthentication): {}\n", authz.request_authentications.join(", ")));
    }
    text
}

fn row(policy: &AuthzPolicy, pods: u64) -> Vec<String> {
    let mut notes = Vec::new();
    if policy.dry_run {
        notes.push("dry run: not enforced".to_owned());
    }
    if !policy.broken.is_empty() {
        notes.push(format!("can't be understood, so it lets nothing pass: {}", policy.broken));
    }
    if policy.pods < pods {
        notes.push(format!("in {} of {pods} pods", policy.pods));
    }
    let named = !policy.policy.is_empty();
    vec![
        if named { policy.policy.clone() } else { "(no ALLOW matched)".into() },
        if named { policy.action.clone() } else { "-".into() },
        if named { policy.rules.to_string() } else { "-".into() },
        policy.allowed.to_string(),
        policy.denied.to_string(),
        notes.join("; "),
    ]
}

fn modes(modes: &[Mtls]) -> String {
    match modes {
        [] => "-".into(),
        [one] => one.mode.clone(),
        several => several.iter().map(|m| format!("{} ({})", m.mode, count(m.pods, "pod"))).collect::<Vec<_>>().join(", "),
    }
}

fn count(n: u64, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_api::console::AuthzPort;

    fn policy(name: &str, action: &str, allowed: u64, denied: u64) -> AuthzPolicy {
        AuthzPolicy { policy: name.into(), action: action.into(), rules: 1, pods: 2, allowed, denied, ..AuthzPolicy::default() }
    }

    #[test]
    fn hits_add_up_and_modes_are_told() {
        let mode = |mode: &str, pods| Mtls { mode: mode.into(), pods };
        let one = Authz {
            pods: vec!["a".into(), "b".into()],
            ports: vec![AuthzPort { port: 8080, protocol: "HTTP".into(), mtls: vec![mode("STRICT", 2)] }],
            mtls: vec![mode("PERMISSIVE", 1), mode("STRICT", 1)],
            policies: vec![
                policy("shop/p", "ALLOW", 5, 0),
                AuthzPolicy { dry_run: true, pods: 1, ..policy("shop/q", "DENY", 0, 1) },
                policy("", "ALLOW", 0, 2),
            ],
            ..Authz::default()
        };
        let merged = merge([one.clone(), one].into_iter());
        let text = describe("svc/cart", "shop", &merged);
        for line in [
            "svc/cart in namespace shop: 2 pods",
            "8080     HTTP       STRICT",
            "others   -          PERMISSIVE (1 pod), STRICT (1 pod)",
            "shop/p               ALLOW    1       10        0",
            "shop/q               DENY     1       0         2        dry run: not enforced; in 1 of 2 pods",
            "(no ALLOW matched)   -        -       0         4",
        ] {
            assert!(text.lines().any(|l| l == line), "{line:?} in\n{text}");
        }
    }
}
