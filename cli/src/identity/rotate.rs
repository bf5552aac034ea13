//! `weft identity rotate`: asks the control plane, by an annotation on its Secret, for new certificates or for a new root, and shows how it
//! goes. The control plane does the rest by itself, whether anybody watches or not.

use super::{merge, now, one, span};
use crate::console::{Console, ConsoleArgs};
use crate::output;
use anyhow::{Context as _, bail};
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use std::process::ExitCode;
use std::time::Duration;
use weft_api::console::{Answer, Authority, Proxies, Root};
use weft_api::names;

/// How often progress is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Arguments of `weft identity rotate`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  weft identity rotate
  weft identity rotate --root --wait")]
pub(crate) struct Args {
    /// A new root certificate, and all certificates below it
    #[arg(long)]
    root: bool,
    /// Show what happens until it is finished. A new root can take as long as the longest certificate lives (a day), if not every meshed pod
    /// is attached to one replica of the control plane
    #[arg(long)]
    wait: bool,
    /// Give up waiting after so many seconds (the rotation goes on)
    #[arg(long, value_name = "SECONDS", requires = "wait")]
    timeout: Option<u64>,
}

/// Runs it.
pub(crate) async fn run(args: &Args, console: &ConsoleArgs) -> anyhow::Result<ExitCode> {
    let open = Console::open(console).await?;
    let Some(client) = open.cluster() else {
        bail!(
            "a rotation is asked for through Kubernetes. Without it, write a new value (the time, say) into the file renew-before or rotate-root \
             of weft-control's --state-dir"
        );
    };
    let before = authority(&open).await?;
    if args.root {
        check(&before)?;
    }
    print!("{}", plan(args.root, &before));
    let value = Timestamp::now().to_string();
    annotate(client, &console.control_namespace, args.root, &value).await?;
    if !args.wait {
        println!("Asked for it. `weft identity` shows how it goes.");
        return Ok(ExitCode::SUCCESS);
    }
    let waiting = async { if args.root { wait_for_root(&open, &value).await } else { wait_for_leaves(&open, &value).await } };
    match args.timeout {
        None => waiting.await?,
        Some(seconds) => tokio::time::timeout(Duration::from_secs(seconds), waiting)
            .await
            .with_context(|| format!("not finished after {seconds} s; it goes on, and `weft identity` shows how"))??,
    }
    println!("Done.");
    Ok(ExitCode::SUCCESS)
}

async fn authority(console: &Console) -> anyhow::Result<Authority> {
    Ok(one(&console.get::<Authority>("/v1/authority", &[]).await?))
}

/// Whether a new root can be asked for.
fn check(authority: &Authority) -> anyhow::Result<()> {
    if authority.secret.is_empty() {
        return Ok(());
    }
    // A Secret that is gone is a reason to go back to a self-made root.
    if authority.problem.contains("is gone") {
        return Ok(());
    }
    bail!(
        "the root is yours (Secret {}): put a new certificate, its key and its root into that Secret, and the rotation begins by itself{}",
        authority.secret,
        if authority.problem.is_empty() { String::new() } else { format!(". Now it can't be used: {}", authority.problem) }
    )
}

/// What will happen, in words.
fn plan(root: bool, authority: &Authority) -> String {
    if !root {
        return format!(
            "All proxies renew their certificates within seconds, with new keys. The issuer stays {:?}. Nothing is restarted, no connection is \
             broken.\n",
            authority.subject
        );
    }
    let old = authority.roots.iter().find(|root| root.signs).map(|root| root.subject.as_str()).unwrap_or_default();
    format!(
        "1. A new root is made, and trusted beside {old:?} by all namespaces, webhooks and proxies.\n\
         2. When all have had time to learn it, it signs: all proxies renew their certificates within seconds.\n\
         3. When no certificate below the old root is left, that is trusted no more.\n\
         Nothing is restarted, no connection is broken.\n"
    )
}

async fn annotate(client: &Client, namespace: &str, root: bool, value: &str) -> anyhow::Result<()> {
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let name = if root { names::ROTATE_ROOT_ANNOTATION } else { names::RENEW_ANNOTATION };
    let patch = serde_json::json!({"metadata": {"annotations": {name: value}}});
    match api.patch_metadata(names::CA_SECRET, &PatchParams::default(), &Patch::Merge(patch)).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.is_forbidden() => bail!(
            "you may not do that: it needs the right to patch secrets/{} in namespace {namespace} (`kubectl auth can-i patch secrets/{} -n \
             {namespace}`)",
            names::CA_SECRET,
            names::CA_SECRET
        ),
        Err(kube::Error::Api(status)) if status.is_not_found() => {
            bail!(
                "there is no Secret {} in namespace {namespace}; is the control plane there (--control-namespace)?",
                names::CA_SECRET
            )
        }
        Err(error) => Err(error).with_context(|| format!("annotating Secret {} in namespace {namespace}", names::CA_SECRET)),
    }
}

/// Says something once.
#[derive(Default)]
struct Teller(String);

impl Teller {
    fn say(&mut self, text: String) {
        if self.0 != text {
            println!("{}", output::printable(&text));
            self.0 = text;
        }
    }
}

/// Looks at the control plane; a look that fails (a replica that is being replaced) is tried again.
async fn look(console: &Console, failures: &mut u32) -> anyhow::Result<Option<(Authority, Vec<Answer<Proxies>>)>> {
    tokio::time::sleep(LOOK).await;
    let found = async {
        let authority = authority(console).await?;
        anyhow::Ok((authority, console.get::<Proxies>("/v1/proxies", &[]).await?))
    };
    match found.await {
        Ok(found) => {
            *failures = 0;
            Ok(Some(found))
        }
        Err(error) if *failures > 30 => {
            Err(error.context("the control plane can't be asked any more; the rotation goes on without us"))
        }
        Err(_) => {
            *failures += 1;
            Ok(None)
        }
    }
}

async fn wait_for_leaves(console: &Console, value: &str) -> anyhow::Result<()> {
    let (mut teller, mut failures) = (Teller::default(), 0);
    loop {
        let Some((authority, proxies)) = look(console, &mut failures).await? else { continue };
        match leaves(&authority, proxies, value) {
            Progress::Done => return Ok(()),
            Progress::Under(text) => teller.say(text),
        }
    }
}

async fn wait_for_root(console: &Console, value: &str) -> anyhow::Result<()> {
    let (mut teller, mut failures) = (Teller::default(), 0);
    loop {
        let Some((authority, proxies)) = look(console, &mut failures).await? else { continue };
        match root(&authority, proxies, value) {
            Progress::Done => return Ok(()),
            Progress::Under(text) => teller.say(text),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Progress {
    Done,
    Under(String),
}

/// How far the renewal is.
fn leaves(authority: &Authority, proxies: Vec<Answer<Proxies>>, value: &str) -> Progress {
    if authority.renewed != value {
        return Progress::Under("waiting for the control plane to take notice".into());
    }
    let proxies = merge(proxies);
    let all = proxies.len();
    let renewed = proxies.iter().filter_map(|proxy| proxy.certificate.as_ref()).filter(|certificate| {
        // A replica whose clock lags by a second issues certificates that look older by it.
        certificate.not_before + names::LEAF_BACKDATE_SECONDS + 1 >= authority.renew_before
    });
    let renewed = renewed.count();
    if renewed == all { Progress::Done } else { Progress::Under(format!("{renewed} of {all} proxies have new certificates")) }
}

/// How far the new root is.
fn root(authority: &Authority, proxies: Vec<Answer<Proxies>>, value: &str) -> Progress {
    if authority.rotated != value {
        return Progress::Under("waiting for the control plane to take notice".into());
    }
    let old = |root: &&Root| root.retired != 0;
    match (authority.roots.len(), authority.roots.iter().find(old)) {
        (0 | 1, _) => Progress::Done,
        (_, None) => Progress::Under(if authority.waiting.is_empty() {
            "the new root is being made known".into()
        } else {
            // Seconds would make a line each.
            let waiting = authority.waiting.split(", for ").next().unwrap_or_default();
            waiting.to_owned()
        }),
        (_, Some(old)) => {
            let all = merge(proxies).len();
            Progress::Under(format!(
                "the new root signs, for {all} proxies; {:?} is trusted until the certificates below it are gone (since {} ago)",
                old.subject,
                span(now().saturating_sub(old.retired) / 600 * 600)
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_api::console::{Certificate, Proxy};

    fn proxies(times: &[u64]) -> Vec<Answer<Proxies>> {
        let proxies = times.iter().enumerate().map(|(n, time)| Proxy {
            pod: format!("p{n}"),
            connected: true,
            certificate: Some(Certificate { not_before: *time, ..Certificate::default() }),
            ..Proxy::default()
        });
        vec![Answer { data: Proxies { proxies: proxies.collect() }, ..Answer::default() }]
    }

    #[test]
    fn leaves_are_renewed_when_all_are_younger_than_the_request() {
        let authority = Authority { renewed: "monday".into(), renew_before: 10_000, ..Authority::default() };
        let old = 10_000 - names::LEAF_BACKDATE_SECONDS;
        assert!(matches!(leaves(&authority, proxies(&[]), "tuesday"), Progress::Under(text) if text.contains("notice")));
        assert!(
            matches!(leaves(&authority, proxies(&[old - 100, old + 5]), "monday"), Progress::Under(text) if text.starts_with("1 of 2"))
        );
        assert_eq!(leaves(&authority, proxies(&[old, old + 5]), "monday"), Progress::Done);
    }

    #[test]
    fn a_root_is_done_when_it_is_alone() {
        let with = |roots: Vec<Root>, waiting: &str| Authority {
            rotated: "monday".into(),
            roots,
            waiting: waiting.into(),
            ..Authority::default()
        };
        let (old, new) =
            (Root { retired: 5, subject: "CN=old".into(), ..Root::default() }, Root { signs: true, ..Root::default() });
        assert!(matches!(root(&with(vec![], ""), proxies(&[]), "tuesday"), Progress::Under(text) if text.contains("notice")));
        let waiting =
            root(&with(vec![Root::default(), new.clone()], "the new root x is being made known, for 3 s more"), vec![], "monday");
        assert_eq!(waiting, Progress::Under("the new root x is being made known".into()));
        assert!(
            matches!(root(&with(vec![old, new.clone()], ""), vec![], "monday"), Progress::Under(text) if text.contains("CN=old"))
        );
        assert_eq!(root(&with(vec![new], ""), vec![], "monday"), Progress::Done);
    }

    #[test]
    fn a_users_root_is_the_users_to_rotate() {
        assert!(check(&Authority::default()).is_ok());
        let theirs = Authority { secret: "cacerts".into(), ..Authority::default() };
        assert!(check(&theirs).unwrap_err().to_string().contains("Secret cacerts"));
        assert!(check(&Authority { problem: "secret cacerts is gone; restore it".into(), ..theirs }).is_ok());
    }
}
