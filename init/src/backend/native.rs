//! nftables by its own tool: our tables `ip weft` and `ip6 weft`, each replaced in one transaction.

use super::{diagnose, xtables};
use crate::error::Failure;
use crate::flags::Backend;
use crate::render::nft as render;
use crate::rules::{Family, RuleSet};
use std::collections::BTreeMap;
use std::process::Command;

const TOOL: &str = "nft";

fn run(family: Family, arguments: &[&str], input: Option<&str>) -> Result<String, Failure> {
    let backend = Backend::Nftables;
    let output = xtables::feed(Command::new(TOOL).args(arguments), input).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Failure::ToolMissing { tool: TOOL.into(), backend },
        _ => Failure::Tool { tool: TOOL.into(), backend, family, message: error.to_string(), advice: None },
    })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let advice = diagnose::advice(backend, family, &message, input.unwrap_or_default());
    Err(Failure::Tool { tool: TOOL.into(), backend, family, message, advice })
}

/// Makes our table hold `rules`; `exists` says whether there is one. Returns whether anything changed.
pub(super) fn apply(rules: &RuleSet, exists: bool) -> Result<bool, Failure> {
    let family = rules.family;
    if rules.tables.is_empty() {
        if exists {
            remove(family)?;
        }
        return Ok(exists);
    }
    if exists && holds(rules)? {
        return Ok(false);
    }
    // Deleting waits for all CPUs to leave the old rules; a fresh pod need not.
    let script = if exists { render::rule_set(rules) } else { render::definition(rules) };
    run(family, &["-f", "-"], Some(&script))?;
    if holds(rules)? { Ok(true) } else { Err(Failure::NotHeld { backend: Backend::Nftables, family }) }
}

/// Removes our table.
pub(super) fn remove(family: Family) -> Result<(), Failure> {
    run(family, &["-f", "-"], Some(&render::removal(family))).map(drop)
}

fn holds(rules: &RuleSet) -> Result<bool, Failure> {
    let family = if rules.family == Family::V4 { "ip" } else { "ip6" };
    let listing = run(rules.family, &["-n", "-s", "list", "table", family, render::TABLE], None)?;
    Ok(matches(rules, &listing))
}

/// Whether a listing has the digest of `rules` and as many rules in each chain.
fn matches(rules: &RuleSet, listing: &str) -> bool {
    let mut wanted: BTreeMap<String, usize> = rules
        .tables
        .iter()
        .flat_map(|table| table.chains.iter().map(|chain| (render::chain_name(table.kind, chain.name), chain.rules.len())))
        .collect();
    wanted.insert(render::digest_chain(rules), 0);
    count(listing) == wanted
}

/// The number of rules in each chain of a listing. A long set is printed over several lines.
fn count(listing: &str) -> BTreeMap<String, usize> {
    let mut chains = BTreeMap::new();
    let mut chain: Option<String> = None;
    let mut depth = 0_usize;
    for line in listing.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("chain ").and_then(|rest| rest.strip_suffix(" {")).filter(|_| depth == 1) {
            chains.insert(name.to_owned(), 0);
            chain = Some(name.to_owned());
        } else if depth == 2
            && !line.is_empty()
            && line != "}"
            && !line.starts_with("type ")
            && let Some(rules) = chain.as_ref().and_then(|name| chains.get_mut(name))
        {
            *rules += 1;
        }
        depth = (depth + line.matches('{').count()).saturating_sub(line.matches('}').count());
    }
    chains
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flags::Settings;
    use crate::rules::build;

    #[test]
    fn a_listing_is_known_by_its_digest_and_its_counts() {
        let rules = build(&Settings::default(), Family::V4);
        let listing = render::definition(&rules);
        assert!(matches(&rules, &listing));
        assert!(!matches(&rules, &listing.replacen("\t\tmeta l4proto tcp redirect to :15001\n", "", 1)));
        let other = build(&Settings { outbound_port: 16001, ..Settings::default() }, Family::V4);
        assert!(!matches(&other, &listing));
    }

    #[test]
    fn a_set_over_several_lines_is_one_rule() {
        let listing = "table ip weft {\n\tchain a {\n\t\ttype nat hook output priority -110; policy accept;\n\t\ttcp dport { 1, 2,\n\t\t\t     3 } return\n\t\tmeta l4proto 6 return\n\t}\n\n\tchain b {\n\t}\n}\n";
        assert_eq!(count(listing), BTreeMap::from([("a".into(), 2), ("b".into(), 0)]));
    }
}
