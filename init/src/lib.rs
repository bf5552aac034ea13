//! Redirects the traffic of a pod to its sidecar: the init container `weft-init`.
//!
//! ```text
//! flags ──► Settings ──► rules::build ──► RuleSet (one per family) ──► backend ──► kernel
//!                                           │                                       ▲
//!                                           └──► rules::evaluate        prove ───────┘
//! ```
//!
//! [`run`] is one run from beginning to end. It is idempotent: rules that are in place stay untouched, rules that differ
//! are replaced without a moment in which a connection passes by, and what a killed run left is completed. A run that
//! fails leaves each table of the kernel as it was or as it should be; the pod does not start, and the next run continues.

use flags::{Backend, BackendChoice, Ipv6, Mode, Options};
use rules::{Family, RuleSet};
use tracing::{info, warn};

pub mod backend;
pub mod error;
pub mod flags;
pub mod host;
pub mod netlink;
pub mod prove;
pub mod render;
pub mod rules;

use backend::Wanted;
use error::Failure;
use host::{Host, Need};

/// Does what `options` say in the network namespace of the calling thread. Returns what belongs on standard output: nothing,
/// but for a dry run.
///
/// # Errors
/// [`Failure`], made for the operator's eyes.
pub fn run(options: &Options) -> Result<String, Failure> {
    match (options.dry_run, options.cleanup) {
        (true, false) => Ok(script(options)),
        (true, true) => backend::cleanup_script(&Host::survey()?),
        (false, true) => cleanup().map(|()| String::new()),
        (false, false) => install(options).map(|()| String::new()),
    }
}

/// What would be fed to the kernel of a fresh pod, the same on every machine: a dry run asks the kernel nothing, so `auto`
/// stands for the first choice there.
fn script(options: &Options) -> String {
    let backend = options.backend.fixed().unwrap_or(Backend::Nft);
    Family::ALL
        .into_iter()
        .filter(|family| *family == Family::V4 || options.ipv6 != Ipv6::False)
        .map(|family| backend::script(backend, &rules::build(&options.settings, family)))
        .collect()
}

/// Applies the rules that `options` ask for and, unless told not to, proves them.
fn install(options: &Options) -> Result<(), Failure> {
    let settings = &options.settings;
    let host = Host::survey()?;
    host.may_change()?;
    let mut wanted = Vec::new();
    for family in Family::ALL {
        let need = host.need(family, options.ipv6)?;
        let rules = if need == Need::None { RuleSet::empty(family) } else { rules::build(settings, family) };
        wanted.push(Wanted { rules, required: need == Need::Required });
    }
    // What the rules rely on comes before them.
    for Wanted { rules, required } in wanted.iter().filter(|wanted| !wanted.rules.tables.is_empty()) {
        match prepare(rules.family, settings.mode) {
            Err(failure) if *required => return Err(failure),
            Err(failure) => warn!("{failure}"),
            Ok(()) => {}
        }
    }
    let report = backend::reconcile(&host, options.backend, &wanted)?;
    // And what they no longer rely on goes after them.
    for family in Family::ALL {
        let in_force = report.families.contains(&family);
        if !(in_force && settings.mode == Mode::Tproxy) {
            netlink::remove_local_delivery(family)?;
        }
    }
    if !report.families.contains(&Family::V6) && host.ipv6 {
        netlink::remove_loopback_address(weft_api::names::PASSTHROUGH_V6)?;
    }
    let families = report.families.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ");
    let backend = report.backend.map_or("none", Backend::name);
    if report.changed {
        info!("{families} redirected through the back end {backend}");
    } else {
        info!("{families} already redirected through the back end {backend}; nothing changed");
    }
    if !options.skip_verify {
        for Wanted { rules, .. } in wanted.iter().filter(|wanted| report.families.contains(&wanted.rules.family)) {
            report_proof(rules.family, &prove::prove(&host, settings, rules)?);
        }
    }
    Ok(())
}

fn prepare(family: Family, mode: Mode) -> Result<(), Failure> {
    if family == Family::V6 {
        netlink::add_loopback_address(weft_api::names::PASSTHROUGH_V6)?;
    }
    if mode == Mode::Tproxy {
        netlink::add_local_delivery(family)?;
    }
    Ok(())
}

fn report_proof(family: Family, proof: &prove::Proof) {
    match proof {
        prove::Proof::Landed(target) => {
            info!("{family} proved: a connection to {target} landed on the outbound port, its destination intact");
        }
        prove::Proof::Taken(target) => {
            info!("{family} proved in part: a connection to {target} was taken by what already listens on the outbound port");
        }
        prove::Proof::Skipped(reason) => info!("{family} not proved: {reason}"),
    }
}

/// Removes exactly what [`run`] can have added.
fn cleanup() -> Result<(), Failure> {
    let host = Host::survey()?;
    host.may_change()?;
    let found = backend::cleanup(&host)?;
    for family in Family::ALL {
        netlink::remove_local_delivery(family)?;
    }
    if host.ipv6 {
        netlink::remove_loopback_address(weft_api::names::PASSTHROUGH_V6)?;
    }
    info!("{}", if found { "the redirection is removed" } else { "there was no redirection to remove" });
    Ok(())
}

/// Applies settings without proving them: what tests and tools use that do many runs.
///
/// # Errors
/// As [`run`].
pub fn apply(settings: &flags::Settings, backend: BackendChoice) -> Result<(), Failure> {
    install(&Options { settings: settings.clone(), backend, skip_verify: true, ..Options::default() })
}
