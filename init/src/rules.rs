//! The redirection as a value: tables, chains and rules for one address family, computed from [`Settings`] and from
//! nothing else ([`build`]). What is rendered, applied and proved is this value; [`evaluate`] walks it as the kernel
//! would, so that a question about the rules ("where does this connection land?") has an answer without a kernel.
//!
//! The vocabulary is just what the rule set needs, and each word exists in iptables and in nftables with the same
//! meaning. Invariants: a match on an address has the family of its rule set; a list of ports has at most
//! [`MULTIPORT_SLOTS`] slots, for iptables refuses more; chains are entered from a hook unconditionally, so that a
//! chain's whole meaning is in the chain.

use crate::flags::{Interface, PortRange};
use ipnet::IpNet;
use std::fmt;

pub mod build;
pub mod evaluate;

pub use build::build;
pub use evaluate::{Connection, Landing, Outcome, Packet, Verdict, evaluate, land};

/// Slots of one `multiport` match: a port takes one, a range two.
pub const MULTIPORT_SLOTS: usize = 15;
/// Packet mark of what must be delivered locally whatever its destination (TPROXY mode); the proxy sets it on
/// connections to the app that carry the client's source address.
pub const LOCAL_MARK: u32 = 1337;
/// Connection mark of connections that TPROXY has taken.
pub const TAKEN_MARK: u32 = 1338;
/// Routing table that delivers everything locally (TPROXY mode).
pub const LOCAL_TABLE: u8 = 133;
/// Conntrack zone of the proxy's own DNS queries.
pub const PROXY_DNS_ZONE: u16 = 1;
/// Conntrack zone of captured DNS queries.
pub const CAPTURED_DNS_ZONE: u16 = 2;
/// The port of DNS.
pub const DNS: u16 = 53;

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both, in the order in which they are applied.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    pub fn of(address: std::net::IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// Whether a network belongs to this family.
    pub fn has(self, net: &IpNet) -> bool {
        Self::of(net.addr()) == self
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// A netfilter table, in the order in which a packet meets them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TableKind {
    /// Before connection tracking: conntrack zones.
    Raw,
    /// After connection tracking: drops, marks, TPROXY.
    Mangle,
    /// First packet of a connection only: redirection.
    Nat,
}

impl TableKind {
    /// All, in the order in which a packet meets them.
    pub const ALL: [Self; 3] = [Self::Raw, Self::Mangle, Self::Nat];

    /// The name that iptables gives it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Mangle => "mangle",
            Self::Nat => "nat",
        }
    }
}

/// Where a packet enters the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// It came in through an interface (packets over `lo` included, except in [`TableKind::Nat`], which has seen their
    /// connection in [`Hook::Output`]).
    Prerouting,
    /// A process of the pod sends it.
    Output,
}

impl Hook {
    /// The built-in chain of iptables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prerouting => "PREROUTING",
            Self::Output => "OUTPUT",
        }
    }
}

/// A chain of ours. The same name may be used in several tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ChainName {
    /// Entered from [`Hook::Prerouting`].
    Prerouting,
    /// Entered from [`Hook::Output`].
    Output,
    /// Decides which ports of the app are redirected.
    Inbound,
    /// What the proxy itself sends.
    Proxy,
    /// Hands a connection to the inbound listener with its destination unchanged.
    Tproxy,
}

/// How the names of all our iptables chains begin; whatever begins so is ours to change and to remove.
pub const CHAIN_PREFIX: &str = "WEFT_";

impl ChainName {
    /// Name in iptables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prerouting => "WEFT_PREROUTING",
            Self::Output => "WEFT_OUTPUT",
            Self::Inbound => "WEFT_INBOUND",
            Self::Proxy => "WEFT_PROXY",
            Self::Tproxy => "WEFT_TPROXY",
        }
    }
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// What conntrack says of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CtState {
    /// First packet of a connection.
    New,
    /// Belongs to no connection and cannot start one.
    Invalid,
    /// Of a connection whose destination was rewritten.
    Dnat,
}

/// A condition on a packet. A rule applies when all of its conditions hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Match {
    /// Source address within the network.
    Source(IpNet),
    /// Destination address within the network.
    Destination(IpNet),
    /// Destination address outside of the network.
    NotDestination(IpNet),
    /// Came in through the interface.
    In(Interface),
    /// Goes out through the interface.
    Out(Interface),
    /// Transport protocol.
    Protocol(Protocol),
    /// Source port.
    SourcePort(u16),
    /// Destination port is one of these; at most [`MULTIPORT_SLOTS`] slots.
    Ports(Vec<PortRange>),
    /// The sending socket was made by this user.
    Uid(u32),
    /// The sending socket was made by this group.
    Gid(u32),
    /// The sending socket was made by neither this user nor this group; at least one is given.
    NotOwner {
        /// The user.
        uid: Option<u32>,
        /// The group.
        gid: Option<u32>,
    },
    /// Packet mark.
    Mark(u32),
    /// Connection mark.
    ConnMark(u32),
    /// State of the connection.
    State(CtState),
    /// A packet of the answering direction.
    Reply,
    /// SYN without ACK, FIN, RST.
    Syn,
}

/// What happens to a packet that a rule applies to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Leave the chain; from the chain of a hook: the packet passes unchanged.
    Return,
    /// Discard.
    Drop,
    /// Go through another chain, then on with the next rule.
    Jump(ChainName),
    /// Go on in another chain and do not come back.
    Goto(ChainName),
    /// Deliver to this local port instead.
    Redirect(u16),
    /// Deliver to the socket that listens on this local port, destination unchanged.
    Tproxy(u16),
    /// Set the packet's mark, go on.
    SetMark(u32),
    /// Set the connection's mark, go on.
    SetConnMark(u32),
    /// Track the packet's connection in this zone, go on.
    Zone(u16),
}

/// Conditions and what follows from them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// All must hold; none means always.
    pub matches: Vec<Match>,
    /// What then happens.
    pub target: Target,
}

/// Rules in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Its name.
    pub name: ChainName,
    /// The hook from which every packet enters it, `None` if only other chains lead here.
    pub hook: Option<Hook>,
    /// Its rules.
    pub rules: Vec<Rule>,
}

/// The chains of one table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Which.
    pub kind: TableKind,
    /// Never empty.
    pub chains: Vec<Chain>,
}

impl Table {
    /// A chain by its name.
    pub fn chain(&self, name: ChainName) -> Option<&Chain> {
        self.chains.iter().find(|chain| chain.name == name)
    }
}

/// All rules of one family. Tables are in the order in which they have to be committed so that a connection that both the
/// old and the new rules redirect is redirected at each moment in between: what takes over comes before what lets go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleSet {
    /// The family.
    pub family: Family,
    /// Tables that have rules.
    pub tables: Vec<Table>,
}

impl RuleSet {
    /// No rules.
    pub fn empty(family: Family) -> Self {
        Self { family, tables: Vec::new() }
    }

    /// A table by its kind.
    pub fn table(&self, kind: TableKind) -> Option<&Table> {
        self.tables.iter().find(|table| table.kind == kind)
    }
}

#[cfg(test)]
mod tests;
