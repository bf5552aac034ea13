//! Rules into the kernel: which back end works here, what it holds, and how to get from there to what it should hold.
//!
//! * **A back end is chosen by trying.** The rule set itself is what is tried: it is applied table by table, each
//!   atomically; where the kernel refuses, what was applied is taken back and the next back end gets its turn. A stand-in
//!   rule would prove less (it has not every match of the real set) and cost more (removing a rule waits for all CPUs).
//! * **Where our rules are, they stay**: a back end that holds rules of ours is tried first. Should the rules move to
//!   another, they are added there before they are removed here.
//! * **Reading never changes anything.** Listing a table of x_tables creates it in the namespace, so the kernel's own list of
//!   tables is asked first; the same list, over netlink, saves the costly look into nf_tables on a fresh pod.
//! * **Failure** leaves each table as it was or as it should be; the next run continues from whatever it finds.

use crate::error::Failure;
use crate::flags::{Backend, BackendChoice};
use crate::host::Host;
use crate::rules::{Family, RuleSet};
use tracing::{debug, info, warn};

mod diagnose;
mod native;
pub mod state;
mod xtables;

/// What one family shall hold.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The rules; none: nothing of ours shall be there.
    pub rules: RuleSet,
    /// Whether it is an error if they cannot be applied.
    pub required: bool,
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The back end that now holds the rules; `None` if there are none to hold.
    pub backend: Option<Backend>,
    /// Whether anything had to be changed.
    pub changed: bool,
    /// Families whose rules are in force.
    pub families: Vec<Family>,
}

/// What the back ends of one kernel hold before a run.
struct Survey {
    nft: [Result<state::State, Failure>; 2],
    legacy: [Result<state::State, Failure>; 2],
    native: [bool; 2],
}

fn index(family: Family) -> usize {
    match family {
        Family::V4 => 0,
        Family::V6 => 1,
    }
}

impl Survey {
    fn take(host: &Host) -> Self {
        let read = |backend, family| {
            if host.may_hold(backend, family) {
                xtables::save(backend, family).map(|text| state::State::parse(&text))
            } else {
                Ok(state::State::default())
            }
        };
        Self {
            nft: Family::ALL.map(|family| read(Backend::Nft, family)),
            legacy: Family::ALL.map(|family| read(Backend::Legacy, family)),
            native: Family::ALL.map(|family| host.may_hold(Backend::Nftables, family)),
        }
    }

    fn holds_ours(&self, backend: Backend) -> bool {
        match backend {
            Backend::Nft => self.nft.iter().flatten().any(|state| !state.is_empty()),
            Backend::Legacy => self.legacy.iter().flatten().any(|state| !state.is_empty()),
            Backend::Nftables => self.native.contains(&true),
        }
    }

    fn state(&self, backend: Backend, family: Family) -> Result<&state::State, Failure> {
        let states = if backend == Backend::Legacy { &self.legacy } else { &self.nft };
        states[index(family)].as_ref().map_err(Clone::clone)
    }
}

/// Makes the kernel hold what is wanted, in one back end, and nothing of ours in the others.
///
/// # Errors
/// [`Failure::Unsupported`] with the reason of each back end that was tried, or the failure of the only one allowed.
pub fn reconcile(host: &Host, choice: BackendChoice, wanted: &[Wanted]) -> Result<Report, Failure> {
    let survey = Survey::take(host);
    let candidates = candidates(&survey, choice);
    let mut refusals = Vec::new();
    for backend in candidates {
        match host.may_use(backend).and_then(|()| install(&survey, backend, wanted)) {
            Ok((mut changed, families)) => {
                for other in Backend::ALL.into_iter().filter(|other| *other != backend) {
                    if survey.holds_ours(other) {
                        info!("removing the rules that the back end {other} still holds");
                        remove(&survey, other)?;
                        changed = true;
                    }
                }
                return Ok(Report { backend: Some(backend), changed, families });
            }
            Err(failure) => {
                debug!("back end {backend}: {failure}");
                if !survey.holds_ours(backend) {
                    // Nothing was there before, so whatever is there now is this attempt's.
                    take_back(backend);
                }
                refusals.push((backend, failure));
            }
        }
    }
    match refusals.len() {
        1 => Err(refusals.remove(0).1),
        _ => Err(Failure::Unsupported { refusals }),
    }
}

fn candidates(survey: &Survey, choice: BackendChoice) -> Vec<Backend> {
    if let Some(backend) = choice.fixed() {
        return vec![backend];
    }
    let (mut holders, others): (Vec<_>, Vec<_>) = Backend::ALL.into_iter().partition(|backend| survey.holds_ours(*backend));
    holders.extend(others);
    holders
}

/// Applies all families to one back end. Returns whether anything changed and which families are in force.
fn install(survey: &Survey, backend: Backend, wanted: &[Wanted]) -> Result<(bool, Vec<Family>), Failure> {
    let mut changed = false;
    let mut families = Vec::new();
    for Wanted { rules, required } in wanted {
        let family = rules.family;
        let done = match backend {
            Backend::Nftables => native::apply(rules, survey.native[index(family)]),
            Backend::Nft | Backend::Legacy => apply(survey.state(backend, family), backend, rules),
        };
        match done {
            Ok(did) => {
                changed |= did;
                if !rules.tables.is_empty() {
                    families.push(family);
                }
            }
            Err(failure) if *required => return Err(failure),
            Err(failure) => {
                warn!("{family} is not redirected; the pod has no {family} address that reaches beyond its link: {failure}");
            }
        }
    }
    Ok((changed, families))
}

fn apply(state: Result<&state::State, Failure>, backend: Backend, rules: &RuleSet) -> Result<bool, Failure> {
    let script = state?.script(rules);
    if script.is_empty() {
        return Ok(false);
    }
    xtables::restore(backend, rules.family, &script)?;
    verify(backend, rules)?;
    Ok(true)
}

/// Reads back what the kernel holds now.
fn verify(backend: Backend, rules: &RuleSet) -> Result<(), Failure> {
    let held = xtables::read_back(backend, rules)?;
    if held.holds(rules) {
        return Ok(());
    }
    if held.counts(rules) {
        debug!("the {} rules are in place, but this version of the tools prints them in its own words", rules.family);
        return Ok(());
    }
    Err(Failure::NotHeld { backend, family: rules.family })
}

fn remove(survey: &Survey, backend: Backend) -> Result<(), Failure> {
    for family in Family::ALL {
        match backend {
            Backend::Nftables => {
                if survey.native[index(family)] {
                    native::remove(family)?;
                }
            }
            Backend::Nft | Backend::Legacy => {
                let script = match survey.state(backend, family) {
                    Ok(state) => state.script(&RuleSet::empty(family)),
                    Err(Failure::Incompatible { .. }) => continue,
                    Err(failure) => return Err(failure),
                };
                if !script.is_empty() {
                    xtables::restore(backend, family, &script)?;
                }
            }
        }
    }
    Ok(())
}

/// Takes back what an attempt may have left. Its failure is not worth more than a word: the attempt has failed already, and
/// the next run looks again.
fn take_back(backend: Backend) {
    let outcome = Host::survey().and_then(|host| remove(&Survey::take(&host), backend));
    if let Err(failure) = outcome {
        debug!("back end {backend}: could not take back what was applied: {failure}");
    }
}

/// Removes everything of ours from every back end. Returns whether there was anything.
///
/// # Errors
/// The first failure; the next call continues.
pub fn cleanup(host: &Host) -> Result<bool, Failure> {
    let survey = Survey::take(host);
    let mut found = false;
    for backend in Backend::ALL {
        if survey.holds_ours(backend) {
            remove(&survey, backend)?;
            found = true;
        }
    }
    for state in survey.nft.into_iter().chain(survey.legacy) {
        match state {
            // iptables cannot have put anything there.
            Ok(_) | Err(Failure::Incompatible { .. }) => {}
            // What could not be read cannot be known to be free of ours.
            Err(failure) => return Err(failure),
        }
    }
    Ok(found)
}

/// What `--cleanup` would feed to the tools now.
///
/// # Errors
/// When a back end that may hold rules cannot be read.
pub fn cleanup_script(host: &Host) -> Result<String, Failure> {
    let survey = Survey::take(host);
    let mut text = String::new();
    for backend in [Backend::Nft, Backend::Legacy] {
        for family in Family::ALL {
            let script = match survey.state(backend, family) {
                Ok(state) => state.script(&RuleSet::empty(family)),
                Err(Failure::Incompatible { .. }) => continue,
                Err(failure) => return Err(failure),
            };
            if !script.is_empty() {
                text.push_str(&format!("# {family}: {} --noflush\n{script}", xtables::restore_command(backend, family)));
            }
        }
    }
    for family in Family::ALL {
        if survey.native[index(family)] {
            text.push_str(&format!("# {family}: nft -f -\n{}", crate::render::nft::removal(family)));
        }
    }
    Ok(text)
}

/// What would be fed to the tools on a pod that has nothing of ours.
pub fn script(backend: Backend, rules: &RuleSet) -> String {
    match backend {
        Backend::Nftables => format!("# {}: nft -f -\n{}", rules.family, crate::render::nft::rule_set(rules)),
        Backend::Nft | Backend::Legacy => format!(
            "# {}: {} --noflush\n{}",
            rules.family,
            xtables::restore_command(backend, rules.family),
            crate::render::iptables::rule_set(rules)
        ),
    }
}
