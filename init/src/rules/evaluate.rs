//! What the kernel would do with a packet under a [`RuleSet`], so that rules can be reasoned about (and tested against the
//! kernel) without one.

use super::{Chain, ChainName, CtState, Family, Hook, Match, Protocol, Rule, RuleSet, Table, TableKind, Target};
use std::net::SocketAddr;

/// The first packet of a connection, or a packet in its midst.
#[derive(Clone, Debug)]
pub struct Packet {
    /// Where it enters the rules.
    pub hook: Hook,
    /// Its transport protocol.
    pub protocol: Protocol,
    /// Its source.
    pub source: SocketAddr,
    /// Its destination.
    pub destination: SocketAddr,
    /// The interface it came in through ([`Hook::Prerouting`]) or goes out through ([`Hook::Output`]).
    pub interface: String,
    /// User and group that made the sending socket; `None` for what no socket of this pod sent.
    pub owner: Option<(u32, u32)>,
    /// Its mark.
    pub mark: u32,
    /// The mark of its connection.
    pub connection_mark: u32,
    /// What conntrack says; `None` is an established connection.
    pub state: Option<CtState>,
    /// Whether it is of the answering direction.
    pub reply: bool,
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on to where it was going.
    Pass,
    /// It was discarded.
    Drop,
    /// It goes to this local port, its destination rewritten.
    Redirect(u16),
    /// It goes to this local port, its destination intact.
    Tproxy(u16),
}

/// A verdict and what was set on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// What became of it.
    pub verdict: Verdict,
    /// Its mark afterwards.
    pub mark: u32,
    /// The mark of its connection afterwards.
    pub connection_mark: u32,
    /// The conntrack zone it was put in, 0 by default.
    pub zone: u16,
}

/// Walks `packet` through the tables of its hook in the kernel's order.
pub fn evaluate(rules: &RuleSet, packet: &Packet) -> Outcome {
    let mut walk = Walk {
        packet: packet.clone(),
        outcome: Outcome { verdict: Verdict::Pass, mark: packet.mark, connection_mark: packet.connection_mark, zone: 0 },
    };
    for kind in TableKind::ALL {
        // The kernel asks nat only for the first packet of a connection, and has asked for packets over lo on their way out.
        let asked = kind != TableKind::Nat
            || packet.state == Some(CtState::New) && !(packet.hook == Hook::Prerouting && packet.interface == "lo");
        let Some(table) = rules.table(kind).filter(|_| asked) else {
            continue;
        };
        for chain in table.chains.iter().filter(|chain| chain.hook == Some(packet.hook)) {
            if let Some(verdict) = walk.chain(rules.family, table, chain, 0) {
                walk.outcome.verdict = verdict;
                if verdict == Verdict::Drop || kind == TableKind::Nat {
                    return walk.outcome;
                }
            }
        }
    }
    walk.outcome
}

struct Walk {
    packet: Packet,
    outcome: Outcome,
}

/// Deeper than any rule set of ours; a loop would otherwise never end.
const DEPTH: usize = 8;

impl Walk {
    fn chain(&mut self, family: Family, table: &Table, chain: &Chain, depth: usize) -> Option<Verdict> {
        for rule in &chain.rules {
            if !self.applies(family, rule) {
                continue;
            }
            match &rule.target {
                Target::Return => return None,
                Target::Drop => return Some(Verdict::Drop),
                Target::Redirect(port) => return Some(Verdict::Redirect(*port)),
                Target::Tproxy(port) => return Some(Verdict::Tproxy(*port)),
                Target::SetMark(mark) => {
                    self.packet.mark = *mark;
                    self.outcome.mark = *mark;
                }
                Target::SetConnMark(mark) => {
                    self.packet.connection_mark = *mark;
                    self.outcome.connection_mark = *mark;
                }
                Target::Zone(zone) => self.outcome.zone = *zone,
                Target::Jump(name) => {
                    if let Some(verdict) = self.enter(family, table, *name, depth) {
                        return Some(verdict);
                    }
                }
                Target::Goto(name) => return self.enter(family, table, *name, depth),
            }
        }
        None
    }

    fn enter(&mut self, family: Family, table: &Table, name: ChainName, depth: usize) -> Option<Verdict> {
        let chain = table.chain(name).filter(|_| depth < DEPTH)?;
        self.chain(family, table, chain, depth + 1)
    }

    fn applies(&self, family: Family, rule: &Rule) -> bool {
        let packet = &self.packet;
        Family::of(packet.destination.ip()) == family
            && rule.matches.iter().all(|condition| match condition {
                Match::Source(net) => net.contains(&packet.source.ip()),
                Match::Destination(net) => net.contains(&packet.destination.ip()),
                Match::NotDestination(net) => !net.contains(&packet.destination.ip()),
                Match::In(interface) => packet.hook == Hook::Prerouting && interface.covers(&packet.interface),
                Match::Out(interface) => packet.hook == Hook::Output && interface.covers(&packet.interface),
                Match::Protocol(protocol) => *protocol == packet.protocol,
                Match::SourcePort(port) => *port == packet.source.port(),
                Match::Ports(ranges) => ranges.iter().any(|range| range.contains(packet.destination.port())),
                Match::Uid(uid) => packet.owner.is_some_and(|owner| owner.0 == *uid),
                Match::Gid(gid) => packet.owner.is_some_and(|owner| owner.1 == *gid),
                Match::NotOwner { uid, gid } => packet.owner.is_some_and(|owner| Some(owner.0) != *uid && Some(owner.1) != *gid),
                Match::Mark(mark) => packet.mark == *mark,
                Match::ConnMark(mark) => packet.connection_mark == *mark,
                Match::State(state) => packet.state == Some(*state),
                Match::Reply => packet.reply,
                Match::Syn => packet.state == Some(CtState::New),
            })
    }
}

/// A connection (or the first datagram of an exchange) that is about to be opened.
#[derive(Clone, Debug)]
pub struct Connection {
    /// From inside the pod, by a process, or from outside.
    pub hook: Hook,
    /// Its transport protocol.
    pub protocol: Protocol,
    /// Its source.
    pub source: SocketAddr,
    /// The destination that its opener asked for.
    pub destination: SocketAddr,
    /// As [`Packet::interface`].
    pub interface: String,
    /// As [`Packet::owner`].
    pub owner: Option<(u32, u32)>,
}

/// Where a connection ends up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landing {
    /// Where its opener asked for.
    Direct,
    /// On this port of the proxy.
    Proxy(u16),
    /// Nowhere.
    Dropped,
}

/// Where `connection` lands under `rules`.
pub fn land(rules: &RuleSet, connection: &Connection) -> Landing {
    let outcome = evaluate(
        rules,
        &Packet {
            hook: connection.hook,
            protocol: connection.protocol,
            source: connection.source,
            destination: connection.destination,
            interface: connection.interface.clone(),
            owner: connection.owner,
            mark: 0,
            connection_mark: 0,
            state: Some(CtState::New),
            reply: false,
        },
    );
    match outcome.verdict {
        Verdict::Pass => Landing::Direct,
        Verdict::Drop => Landing::Dropped,
        Verdict::Redirect(port) | Verdict::Tproxy(port) => Landing::Proxy(port),
    }
}
