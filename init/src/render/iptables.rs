//! The language of `iptables-restore` and `iptables-save`. Rules are written just as the tools print them back, in the
//! tools' own order of matches (addresses, interfaces, protocol, extensions), so that a comparison of lines tells whether
//! the kernel holds what we want.

use crate::rules::{Chain, CtState, Family, LOCAL_MARK, Match, Protocol, Rule, RuleSet, Table, Target};
use std::fmt::Write as _;

/// The arguments of one rule, without the chain.
pub fn rule(family: Family, rule: &Rule) -> String {
    let mut line = String::with_capacity(96);
    // Stable, so that extensions stay in the order in which they were given.
    let mut matches: Vec<&Match> = rule.matches.iter().collect();
    matches.sort_by_key(|condition| rank(condition));
    let protocol = matches.iter().find_map(|condition| match condition {
        Match::Protocol(protocol) => Some(name(*protocol)),
        _ => None,
    });
    for condition in matches {
        write_match(&mut line, condition, protocol.unwrap_or("tcp"));
    }
    write_target(&mut line, family, &rule.target);
    line.truncate(line.trim_end().len());
    line
}

fn rank(condition: &Match) -> u8 {
    match condition {
        Match::Source(_) => 0,
        Match::Destination(_) | Match::NotDestination(_) => 1,
        Match::In(_) => 2,
        Match::Out(_) => 3,
        Match::Protocol(_) => 4,
        _ => 5,
    }
}

fn name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    }
}

// Writing to a String cannot fail, hence the discarded results.
fn write_match(line: &mut String, condition: &Match, protocol: &str) {
    let _ = match condition {
        Match::Source(net) => write!(line, "-s {net} "),
        Match::Destination(net) => write!(line, "-d {net} "),
        Match::NotDestination(net) => write!(line, "! -d {net} "),
        Match::In(interface) => write!(line, "-i {interface} "),
        Match::Out(interface) => write!(line, "-o {interface} "),
        Match::Protocol(protocol) => write!(line, "-p {} ", name(*protocol)),
        Match::SourcePort(port) => write!(line, "-m {protocol} --sport {port} "),
        Match::Ports(ranges) => match ranges.as_slice() {
            [one] if one.first == one.last => write!(line, "-m {protocol} --dport {} ", one.first),
            [one] => write!(line, "-m {protocol} --dport {}:{} ", one.first, one.last),
            many => {
                let list: Vec<String> = many
                    .iter()
                    .map(|range| {
                        if range.first == range.last {
                            range.first.to_string()
                        } else {
                            format!("{}:{}", range.first, range.last)
                        }
                    })
                    .collect();
                write!(line, "-m multiport --dports {} ", list.join(","))
            }
        },
        Match::Uid(uid) => write!(line, "-m owner --uid-owner {uid} "),
        Match::Gid(gid) => write!(line, "-m owner --gid-owner {gid} "),
        Match::NotOwner { uid, gid } => {
            line.push_str("-m owner ");
            let uid = uid.iter().map(|uid| format!("! --uid-owner {uid} "));
            line.extend(uid.chain(gid.iter().map(|gid| format!("! --gid-owner {gid} "))));
            Ok(())
        }
        Match::Mark(mark) => write!(line, "-m mark --mark {mark:#x} "),
        Match::ConnMark(mark) => write!(line, "-m connmark --mark {mark:#x} "),
        Match::State(state) => write!(
            line,
            "-m conntrack --ctstate {} ",
            match state {
                CtState::New => "NEW",
                CtState::Invalid => "INVALID",
                CtState::Dnat => "DNAT",
            }
        ),
        Match::Reply => write!(line, "-m conntrack --ctdir REPLY "),
        Match::Syn => write!(line, "-m tcp --tcp-flags FIN,SYN,RST,ACK SYN "),
    };
}

fn write_target(line: &mut String, family: Family, target: &Target) {
    let any = match family {
        Family::V4 => "0.0.0.0",
        Family::V6 => "::",
    };
    let _ = match target {
        Target::Return => write!(line, "-j RETURN"),
        Target::Drop => write!(line, "-j DROP"),
        Target::Jump(chain) => write!(line, "-j {}", chain.name()),
        Target::Goto(chain) => write!(line, "-g {}", chain.name()),
        Target::Redirect(port) => write!(line, "-j REDIRECT --to-ports {port}"),
        Target::Tproxy(port) => {
            write!(line, "-j TPROXY --on-port {port} --on-ip {any} --tproxy-mark {LOCAL_MARK:#x}/0xffffffff")
        }
        Target::SetMark(mark) => write!(line, "-j MARK --set-xmark {mark:#x}/0xffffffff"),
        Target::SetConnMark(mark) => write!(line, "-j CONNMARK --set-xmark {mark:#x}/0xffffffff"),
        Target::Zone(zone) => write!(line, "-j CT --zone {zone}"),
    };
}

/// The rules of a chain, each as the tools print it: `-A CHAIN …`.
pub fn chain(family: Family, chain: &Chain) -> Vec<String> {
    chain.rules.iter().map(|each| format!("-A {} {}", chain.name.name(), rule(family, each))).collect()
}

/// The jump from a hook into a chain, without `-A HOOK`.
pub fn jump(chain: &Chain) -> String {
    format!("-j {}", chain.name.name())
}

/// One table on a machine that has nothing of ours: what `--dry-run` shows.
pub fn table(family: Family, table: &Table) -> String {
    let mut text = format!("*{}\n", table.kind.name());
    for chain in &table.chains {
        text.push_str(&format!(":{} - [0:0]\n", chain.name.name()));
    }
    for each in &table.chains {
        for line in chain(family, each) {
            text.push_str(&line);
            text.push('\n');
        }
    }
    for each in &table.chains {
        if let Some(hook) = each.hook {
            text.push_str(&format!("-I {} 1 {}\n", hook.name(), jump(each)));
        }
    }
    text.push_str("COMMIT\n");
    text
}

/// All tables on a machine that has nothing of ours.
pub fn rule_set(rules: &RuleSet) -> String {
    rules.tables.iter().map(|each| table(rules.family, each)).collect()
}
