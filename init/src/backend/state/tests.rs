//! Reading what the tools print, and the scripts that follow from it. The kernel's view is simulated by executing a script
//! as iptables-restore would, so that every script can be checked to end in the wanted state from any state before.

use super::*;
use crate::flags::{Interface, Mode, PortRange, Ports, Settings, values};
use crate::rules::build;
use proptest::prelude::*;

fn settings() -> impl Strategy<Value = Settings> {
    let ranges = || {
        prop::collection::vec((1_u16.., 0_u16..50), 0..20).prop_map(|ports| {
            ports
                .into_iter()
                .map(|(first, more)| PortRange {
                    first,
                    last: first.saturating_add(more),
                })
                .collect()
        })
    };
    let nets = || {
        prop::sample::subsequence(
            vec![
                "10.0.0.0/8",
                "0.0.0.0/0",
                "fd00::/8",
                "::/0",
                "192.0.2.1/32",
            ],
            0..4,
        )
        .prop_map(|nets| values::cidr_list(&nets.join(",")).unwrap().0)
    };
    let interfaces =
        prop::sample::subsequence(vec!["eth1", "k6t+", "tun0"], 0..3).prop_map(|names| {
            names
                .iter()
                .map(|name| name.parse().unwrap())
                .collect::<Vec<Interface>>()
        });
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    (
        flags,
        ranges(),
        ranges(),
        ranges(),
        ranges(),
        nets(),
        interfaces,
    )
        .prop_map(
            |(
                (all, dns_capture, drop_invalid, tproxy),
                inbound,
                excluded,
                outbound,
                excluded_out,
                nets,
                interfaces,
            )| {
                Settings {
                    inbound_ports: if all {
                        Ports::All
                    } else {
                        Ports::List(inbound)
                    },
                    exclude_inbound_ports: excluded,
                    outbound_ports: outbound,
                    exclude_outbound_ports: excluded_out,
                    exclude_outbound_cidrs: nets,
                    exclude_interfaces: interfaces,
                    dns_capture,
                    drop_invalid,
                    mode: if tproxy { Mode::Tproxy } else { Mode::Redirect },
                    ..Settings::default()
                }
            },
        )
}

/// One family as the kernel holds it: the chains of each table with their rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Kernel(BTreeMap<String, BTreeMap<String, Vec<String>>>);

impl Kernel {
    fn table(&mut self, name: &str) -> &mut BTreeMap<String, Vec<String>> {
        let table = self.0.entry(name.to_owned()).or_default();
        for chain in ["PREROUTING", "OUTPUT"] {
            table.entry(chain.to_owned()).or_default();
        }
        table
    }

    /// As `iptables-restore --noflush`: refuses what the tool would refuse.
    fn restore(&mut self, script: &str) -> Result<(), String> {
        let mut name = String::new();
        for line in script.lines() {
            if let Some(table) = line.strip_prefix('*') {
                name = table.to_owned();
                continue;
            }
            let table = self.table(&name);
            let words: Vec<&str> = line.splitn(3, ' ').collect();
            match words.as_slice() {
                ["COMMIT"] => {}
                [chain, "-", "[0:0]"] if chain.starts_with(':') => {
                    table.insert(chain[1..].to_owned(), Vec::new());
                }
                ["-A", chain, rule] => {
                    table
                        .get_mut(*chain)
                        .ok_or(format!("no chain: {line}"))?
                        .push((*rule).to_owned());
                }
                ["-I", chain, rule] => {
                    let rule = rule
                        .strip_prefix("1 ")
                        .ok_or(format!("no position: {line}"))?;
                    table
                        .get_mut(*chain)
                        .ok_or(format!("no chain: {line}"))?
                        .insert(0, rule.to_owned());
                }
                ["-D", chain, rule] => {
                    let rules = table.get_mut(*chain).ok_or(format!("no chain: {line}"))?;
                    let at = rules
                        .iter()
                        .position(|each| each == rule)
                        .ok_or(format!("no such rule: {line}"))?;
                    rules.remove(at);
                }
                ["-X", chain] => {
                    let used = table
                        .values()
                        .flatten()
                        .any(|rule| rule.ends_with(&format!(" {chain}")));
                    let rules = table.get(*chain).ok_or(format!("no chain: {line}"))?;
                    if used || !rules.is_empty() {
                        return Err(format!("chain in use: {line}"));
                    }
                    table.remove(*chain);
                }
                _ => return Err(format!("not understood: {line}")),
            }
        }
        let dangling = self.0.values().any(|table| {
            table.values().flatten().any(|rule| {
                rule.rsplit(' ')
                    .next()
                    .is_some_and(|last| last.starts_with(CHAIN_PREFIX) && !table.contains_key(last))
            })
        });
        if dangling {
            Err("a rule leads to a chain that is not there".into())
        } else {
            Ok(())
        }
    }

    fn save(&self) -> String {
        let mut text = String::from("# Generated by a test\n");
        for (name, table) in &self.0 {
            text.push_str(&format!("*{name}\n"));
            for chain in table.keys() {
                let policy = if chain.starts_with(CHAIN_PREFIX) {
                    "-"
                } else {
                    "ACCEPT"
                };
                text.push_str(&format!(":{chain} {policy} [12:3456]\n"));
            }
            for (chain, rules) in table {
                for rule in rules {
                    text.push_str(&format!(
                        "-A {chain} {rule}
"
                    ));
                }
            }
            text.push_str("COMMIT\n");
        }
        text
    }
}

/// What earlier runs, other programs and curious hands may have left.
fn leftovers() -> impl Strategy<Value = Vec<&'static str>> {
    prop::sample::subsequence(
        vec![
            "*nat\n:WEFT_OLD - [0:0]\n-A WEFT_OLD -p tcp -j RETURN\n-A OUTPUT -j WEFT_OLD\nCOMMIT\n",
            "*nat\n:WEFT_A - [0:0]\n:WEFT_B - [0:0]\n-A WEFT_A -j WEFT_B\n-A WEFT_B -j RETURN\nCOMMIT\n",
            "*nat\n:WEFT_OUTPUT - [0:0]\n-A OUTPUT -j WEFT_OUTPUT\n-A OUTPUT -j WEFT_OUTPUT\nCOMMIT\n",
            "*nat\n:WEFT_OUTPUT - [0:0]\n-A PREROUTING -p tcp -j WEFT_OUTPUT\nCOMMIT\n",
            "*mangle\n:WEFT_PREROUTING - [0:0]\n-A WEFT_PREROUTING -j RETURN\nCOMMIT\n",
            "*raw\n:WEFT_TPROXY - [0:0]\n-A PREROUTING -g WEFT_TPROXY\nCOMMIT\n",
        ],
        0..6,
    )
}

const OTHERS: &str = "*nat\n:OTHERS - [0:0]\n-A OTHERS -p tcp -j RETURN\n-A OUTPUT -d 10.0.0.0/8 -j OTHERS\n-A PREROUTING -m comment --comment \"-j WEFT_OUTPUT \\\" -g WEFT_A\" -j RETURN\nCOMMIT\n";

/// What is not ours.
fn foreign(kernel: &Kernel) -> Vec<String> {
    kernel
        .save()
        .lines()
        .filter(|line| line.contains("OTHERS") || line.contains("--comment"))
        .map(ToOwned::to_owned)
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_script_ends_in_the_wanted_state_from_any_state(
        before in settings(), wanted in settings(), leftovers in leftovers(), six in any::<bool>(), killed in 0_usize..4,
    ) {
        let family = if six { Family::V6 } else { Family::V4 };
        let mut kernel = Kernel::default();
        kernel.restore(OTHERS).unwrap();
        let others = foreign(&kernel);
        // An earlier run that got as far as some of its tables.
        let earlier = State::default().script(&build(&before, family));
        for table in earlier.split_inclusive("COMMIT\n").take(killed) {
            kernel.restore(table).unwrap();
        }
        for leftover in leftovers {
            kernel.restore(leftover).unwrap();
        }
        let rules = build(&wanted, family);
        let state = State::parse(&kernel.save());
        let script = state.script(&rules);
        prop_assert_eq!(script.is_empty(), state.holds(&rules));
        kernel.restore(&script).map_err(TestCaseError::fail)?;
        let state = State::parse(&kernel.save());
        prop_assert!(state.holds(&rules) && state.counts(&rules), "{}", kernel.save());
        prop_assert_eq!(state.script(&rules), "", "a second run would change something");
        prop_assert_eq!(foreign(&kernel), others.clone());
        // And nothing of ours is left after the removal.
        kernel.restore(&state.script(&RuleSet::empty(family))).map_err(TestCaseError::fail)?;
        prop_assert!(State::parse(&kernel.save()).is_empty());
        prop_assert_eq!(foreign(&kernel), others);
    }

    #[test]
    fn no_output_of_a_tool_is_too_strange_to_read(text in "(\\*nat\n|:|-A |-N |WEFT_|OUTPUT| |\n|-j |\"|\\\\|é|x){0,60}") {
        let state = State::parse(&text);
        let _ = state.script(&build(&Settings::default(), Family::V4));
    }
}

#[test]
fn only_the_target_of_a_rule_counts() {
    assert!(leads_into_ours("-p tcp -j WEFT_OUTPUT"));
    assert!(leads_into_ours(
        "-m comment --comment \"a b\" -g WEFT_OUTPUT"
    ));
    assert!(!leads_into_ours(
        "-m comment --comment \"x -j WEFT_OUTPUT\" -j RETURN"
    ));
    assert!(!leads_into_ours(
        "-m comment --comment \"\\\" -j WEFT_OUTPUT\" -j RETURN"
    ));
    assert!(!leads_into_ours("-j"));
    assert!(!leads_into_ours("-m comment --comment WEFT_OUTPUT"));
}

#[test]
fn other_words_for_the_same_rules_are_known_by_their_number() {
    let rules = build(&Settings::default(), Family::V4);
    let mut kernel = Kernel::default();
    kernel.restore(&State::default().script(&rules)).unwrap();
    let strange = kernel
        .save()
        .replace("--ctstate INVALID", "--state invalid");
    let state = State::parse(&strange);
    assert!(!state.holds(&rules) && state.counts(&rules));
    let short = strange.replace(
        "-A WEFT_PREROUTING -p tcp -m conntrack --state invalid -j DROP\n",
        "",
    );
    assert!(!State::parse(&short).counts(&rules));
}
