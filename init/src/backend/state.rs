//! What one family of an iptables back end holds, read from `iptables-save` or `iptables -S`, and the script that turns it
//! into what it should hold.
//!
//! A script replaces our chains of one table in one commit of the kernel, so that at no moment a table is half ours. Rules
//! that are not ours are neither moved nor touched; the one line of ours in a built-in chain is a jump. Whatever state a
//! killed run, an older version or a curious hand left behind, the script's outcome is the same.

use crate::render::iptables as render;
use crate::rules::{CHAIN_PREFIX, Chain, Family, Hook, RuleSet, Table, TableKind};
use std::collections::{BTreeMap, BTreeSet};

/// A rule as the tools print it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    chain: String,
    rest: String,
}

/// What matters to us of one table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableState {
    /// Chains whose name says that they are ours.
    ours: BTreeSet<String>,
    /// Rules in our chains, in order.
    rules: Vec<Line>,
    /// Rules of built-in and foreign chains that lead into ours.
    jumps: Vec<Line>,
}

impl TableState {
    fn is_empty(&self) -> bool {
        self.ours.is_empty() && self.jumps.is_empty()
    }

    fn add(&mut self, line: &str) {
        if let Some(chain) = line.strip_prefix(':').or_else(|| line.strip_prefix("-N ")) {
            let name = chain.split_whitespace().next().unwrap_or_default();
            if name.starts_with(CHAIN_PREFIX) {
                self.ours.insert(name.to_owned());
            }
        } else if let Some((chain, rest)) = line.strip_prefix("-A ").and_then(|rule| rule.split_once(' ')) {
            let line = Line { chain: chain.to_owned(), rest: normal(rest) };
            if chain.starts_with(CHAIN_PREFIX) {
                self.rules.push(line);
            } else if leads_into_ours(rest) {
                self.jumps.push(line);
            }
        }
    }

    fn rules_of<'s>(&'s self, chain: &'s str) -> impl Iterator<Item = &'s str> {
        self.rules.iter().filter(move |line| line.chain == chain).map(|line| line.rest.as_str())
    }

    /// Our jumps are exactly the wanted ones, our chains exactly the wanted ones.
    fn has_shape(&self, table: &Table) -> bool {
        let jumps = table.chains.iter().filter_map(|chain| Some((chain.hook?, chain)));
        self.ours.len() == table.chains.len()
            && table.chains.iter().all(|chain| self.ours.contains(chain.name.name()))
            && self.jumps.len() == jumps.clone().count()
            && jumps.into_iter().all(|(hook, chain)| self.has_jump(hook, chain))
    }

    fn has_jump(&self, hook: Hook, chain: &Chain) -> bool {
        self.jumps.iter().any(|line| line.chain == hook.name() && line.rest == render::jump(chain))
    }

    fn holds(&self, family: Family, table: &Table) -> bool {
        self.has_shape(table)
            && table.chains.iter().all(|chain| {
                self.rules_of(chain.name.name()).eq(chain.rules.iter().map(|rule| normal(&render::rule(family, rule))))
            })
    }

    fn counts(&self, table: &Table) -> bool {
        self.has_shape(table) && table.chains.iter().all(|chain| self.rules_of(chain.name.name()).count() == chain.rules.len())
    }
}

/// Whether a rule's target is a chain of ours.
fn leads_into_ours(rest: &str) -> bool {
    let words = words(rest);
    words
        .iter()
        .position(|word| *word == "-j" || *word == "-g")
        .and_then(|at| words.get(at + 1))
        .is_some_and(|target| target.starts_with(CHAIN_PREFIX))
}

/// The words of a rule. What is in quotes (a comment) is one word, whatever it says.
fn words(rest: &str) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = rest.trim_start();
    while !rest.is_empty() {
        let mut quoted = false;
        let mut escaped = false;
        let end = rest
            .char_indices()
            .find(|(_, each)| {
                match each {
                    _ if escaped => escaped = false,
                    '\\' => escaped = true,
                    '"' => quoted = !quoted,
                    each => return each.is_whitespace() && !quoted,
                }
                false
            })
            .map_or(rest.len(), |(at, _)| at);
        words.push(&rest[..end]);
        rest = rest[end..].trim_start();
    }
    words
}

/// Some versions name the protocol's own extension where others leave it out.
fn normal(rest: &str) -> String {
    rest.replace("-m tcp ", "").replace("-m udp ", "")
}

/// What one family holds, by table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State(BTreeMap<TableKind, TableState>);

impl State {
    /// Reads what `iptables-save` printed. Tables and lines that mean nothing to us are passed over.
    pub fn parse(text: &str) -> Self {
        let mut state = Self::default();
        let mut current = None;
        for line in text.lines() {
            if let Some(name) = line.strip_prefix('*') {
                current = TableKind::ALL.into_iter().find(|kind| kind.name() == name.trim());
            } else if let Some(kind) = current {
                state.0.entry(kind).or_default().add(line);
            }
        }
        state
    }

    /// Adds what `iptables -t TABLE -S` printed.
    pub fn add_table(&mut self, kind: TableKind, lines: &[String]) {
        let table = self.0.entry(kind).or_default();
        for line in lines {
            table.add(line);
        }
    }

    /// Whether nothing of ours is there.
    pub fn is_empty(&self) -> bool {
        self.0.values().all(TableState::is_empty)
    }

    fn agrees(&self, rules: &RuleSet, same: impl Fn(&TableState, &Table) -> bool) -> bool {
        let none = TableState::default();
        TableKind::ALL.into_iter().all(|kind| {
            let state = self.0.get(&kind).unwrap_or(&none);
            rules.table(kind).map_or_else(|| state.is_empty(), |table| same(state, table))
        })
    }

    /// Whether it is what `rules` say, rule by rule.
    pub fn holds(&self, rules: &RuleSet) -> bool {
        self.agrees(rules, |state, table| state.holds(rules.family, table))
    }

    /// Whether chains, jumps and the number of rules are as `rules` say. For versions of the tools that print a rule in words
    /// that we do not know.
    pub fn counts(&self, rules: &RuleSet) -> bool {
        self.agrees(rules, TableState::counts)
    }

    /// The input for `iptables-restore --noflush` that makes this state hold `rules`; empty if it does already. Tables come in
    /// the order of `rules`, then those that shall no longer have anything of ours.
    pub fn script(&self, rules: &RuleSet) -> String {
        let none = TableState::default();
        let mut script = String::new();
        for table in &rules.tables {
            let state = self.0.get(&table.kind).unwrap_or(&none);
            if !state.holds(rules.family, table) {
                write_table(&mut script, rules.family, table.kind, &table.chains, state);
            }
        }
        for (kind, state) in &self.0 {
            if rules.table(*kind).is_none() && !state.is_empty() {
                write_table(&mut script, rules.family, *kind, &[], state);
            }
        }
        script
    }
}

fn write_table(script: &mut String, family: Family, kind: TableKind, chains: &[Chain], state: &TableState) {
    let mut lines = vec![format!("*{}", kind.name())];
    let obsolete: Vec<&String> = state.ours.iter().filter(|name| chains.iter().all(|chain| chain.name.name() != *name)).collect();
    // Declaring a chain creates it, or empties it if it is there.
    lines.extend(chains.iter().map(|chain| format!(":{} - [0:0]", chain.name.name())));
    lines.extend(obsolete.iter().map(|name| format!(":{name} - [0:0]")));
    lines.extend(chains.iter().flat_map(|chain| render::chain(family, chain)));
    let mut present = BTreeSet::new();
    for jump in &state.jumps {
        let wanted = chains
            .iter()
            .any(|chain| chain.hook.is_some_and(|hook| hook.name() == jump.chain) && render::jump(chain) == jump.rest);
        // A second copy of a jump goes like any other that is not wanted.
        if !(wanted && present.insert((&jump.chain, &jump.rest))) {
            lines.push(format!("-D {} {}", jump.chain, jump.rest));
        }
    }
    for chain in chains {
        if let Some(hook) = chain.hook
            && !state.has_jump(hook, chain)
        {
            // First, so that no foreign rule decides before ours.
            lines.push(format!("-I {} 1 {}", hook.name(), render::jump(chain)));
        }
    }
    lines.extend(obsolete.iter().map(|name| format!("-X {name}")));
    lines.push("COMMIT\n".to_owned());
    script.push_str(&lines.join("\n"));
}

#[cfg(test)]
mod tests;
