//! The language of `nft -f`: one table of our own per family, `ip weft` and `ip6 weft`, replaced as a whole in one
//! transaction. An empty chain whose name is a digest of the rules says which rules the table holds, whatever words this
//! version of `nft` prints them in.

use crate::flags::Interface;
use crate::rules::{
    Chain, ChainName, CtState, Family, Hook, LOCAL_MARK, Match, Protocol, Rule, RuleSet, Table, TableKind, Target,
};
use std::fmt::Write as _;

/// The name of our tables.
pub const TABLE: &str = "weft";
/// How the name of the chain with the digest begins.
pub const DIGEST_PREFIX: &str = "rules_";

fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

/// `ip weft` or `ip6 weft`.
pub fn table_name(family: Family) -> String {
    format!("{} {TABLE}", family_name(family))
}

/// All tables of the rule set share one nftables table, so that chains carry the table's name.
pub fn chain_name(kind: TableKind, name: ChainName) -> String {
    let chain = match name {
        ChainName::Prerouting => "prerouting",
        ChainName::Output => "output",
        ChainName::Inbound => "inbound",
        ChainName::Proxy => "proxy",
        ChainName::Tproxy => "tproxy",
    };
    format!("{}_{chain}", kind.name())
}

/// Kind and priority of a base chain. As the tables of iptables, but for nat, where ours come a little earlier, so that no
/// foreign rule decides before them.
fn base(kind: TableKind, hook: Hook) -> String {
    let (kind, priority) = match (kind, hook) {
        (TableKind::Raw, _) => ("filter", -300),
        (TableKind::Mangle, Hook::Prerouting) => ("filter", -150),
        // A changed mark must be routed again.
        (TableKind::Mangle, Hook::Output) => ("route", -150),
        (TableKind::Nat, _) => ("nat", -110),
    };
    let hook = match hook {
        Hook::Prerouting => "prerouting",
        Hook::Output => "output",
    };
    format!("type {kind} hook {hook} priority {priority}; policy accept;")
}

fn protocol(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    }
}

fn interface(interface: &Interface) -> String {
    match interface.prefix() {
        Some(prefix) => format!("\"{prefix}*\""),
        None => format!("\"{interface}\""),
    }
}

/// One rule.
pub fn rule(family: Family, kind: TableKind, rule: &Rule) -> String {
    let ip = family_name(family);
    let l4 = rule.matches.iter().find_map(|condition| match condition {
        Match::Protocol(each) => Some(protocol(*each)),
        _ => None,
    });
    let l4 = l4.unwrap_or("tcp");
    let mut line = String::with_capacity(96);
    // Writing to a String cannot fail, hence the discarded results.
    for condition in &rule.matches {
        let _ = match condition {
            Match::Source(net) => write!(line, "{ip} saddr {net} "),
            Match::Destination(net) => write!(line, "{ip} daddr {net} "),
            Match::NotDestination(net) => write!(line, "{ip} daddr != {net} "),
            Match::In(name) => write!(line, "iifname {} ", interface(name)),
            Match::Out(name) => write!(line, "oifname {} ", interface(name)),
            Match::Protocol(each) => write!(line, "meta l4proto {} ", protocol(*each)),
            Match::SourcePort(port) => write!(line, "{l4} sport {port} "),
            Match::Ports(ranges) => {
                let list: Vec<String> = ranges.iter().map(ToString::to_string).collect();
                write!(line, "{l4} dport {{ {} }} ", list.join(", "))
            }
            Match::Uid(uid) => write!(line, "meta skuid {uid} "),
            Match::Gid(gid) => write!(line, "meta skgid {gid} "),
            Match::NotOwner { uid, gid } => {
                let uid = uid.iter().map(|uid| format!("meta skuid != {uid} "));
                line.extend(uid.chain(gid.iter().map(|gid| format!("meta skgid != {gid} "))));
                Ok(())
            }
            Match::Mark(mark) => write!(line, "meta mark {mark:#x} "),
            Match::ConnMark(mark) => write!(line, "ct mark {mark:#x} "),
            Match::State(CtState::New) => write!(line, "ct state new "),
            Match::State(CtState::Invalid) => write!(line, "ct state invalid "),
            Match::State(CtState::Dnat) => write!(line, "ct status dnat "),
            Match::Reply => write!(line, "ct direction reply "),
            Match::Syn => write!(line, "tcp flags & (fin | syn | rst | ack) == syn "),
        };
    }
    let _ = match &rule.target {
        Target::Return => write!(line, "return"),
        Target::Drop => write!(line, "drop"),
        Target::Jump(chain) => write!(line, "jump {}", chain_name(kind, *chain)),
        Target::Goto(chain) => write!(line, "goto {}", chain_name(kind, *chain)),
        Target::Redirect(port) => write!(line, "redirect to :{port}"),
        Target::Tproxy(port) => write!(line, "tproxy to :{port} meta mark set {LOCAL_MARK:#x} accept"),
        Target::SetMark(mark) => write!(line, "meta mark set {mark:#x}"),
        Target::SetConnMark(mark) => write!(line, "ct mark set {mark:#x}"),
        Target::Zone(zone) => write!(line, "ct zone set {zone}"),
    };
    line
}

fn write_chain(text: &mut String, family: Family, table: &Table, chain: &Chain) {
    text.push_str(&format!("\tchain {} {{\n", chain_name(table.kind, chain.name)));
    if let Some(hook) = chain.hook {
        text.push_str(&format!("\t\t{}\n", base(table.kind, hook)));
    }
    for each in &chain.rules {
        text.push_str(&format!("\t\t{}\n", rule(family, table.kind, each)));
    }
    text.push_str("\t}\n");
}

fn chains(rules: &RuleSet) -> String {
    let mut text = String::new();
    for table in &rules.tables {
        // Chains that others lead to come first: nft resolves names in order.
        let (inner, entered): (Vec<_>, Vec<_>) = table.chains.iter().partition(|chain| chain.hook.is_none());
        for chain in inner.into_iter().rev().chain(entered) {
            write_chain(&mut text, rules.family, table, chain);
        }
    }
    text
}

/// FNV-1a: stable between builds, which the standard hasher does not promise.
fn digest(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The name of the empty chain that says which rules these are.
pub fn digest_chain(rules: &RuleSet) -> String {
    format!("{DIGEST_PREFIX}{:016x}", digest(&chains(rules)))
}

/// Creates our table, which must not be there.
pub fn definition(rules: &RuleSet) -> String {
    format!("table {} {{\n\tchain {} {{\n\t}}\n{}}}\n", table_name(rules.family), digest_chain(rules), chains(rules))
}

/// Creates our table or replaces it.
pub fn rule_set(rules: &RuleSet) -> String {
    let name = table_name(rules.family);
    // Adding first makes deleting succeed on a machine that has no such table.
    format!("add table {name}\ndelete table {name}\n{}", definition(rules))
}

/// Removes our table, which must be there.
pub fn removal(family: Family) -> String {
    format!("delete table {}\n", table_name(family))
}
