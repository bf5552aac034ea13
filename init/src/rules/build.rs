//! From settings to rules. One function per chain; the order of the rules within a chain is the meaning, so each states
//! why it stands where it stands.
//!
//! Two laws hold throughout: **an exclusion always wins** over whatever would redirect, and **the proxy's own traffic is
//! never sent to the outbound listener**, or it would loop.

use super::{
    CAPTURED_DNS_ZONE, Chain, ChainName, CtState, DNS, Family, Hook, LOCAL_MARK, MULTIPORT_SLOTS, Match, PROXY_DNS_ZONE,
    Protocol, Rule, RuleSet, TAKEN_MARK, Table, TableKind, Target,
};
use crate::flags::{Cidrs, Interface, Mode, PortRange, PortSet, Ports, Settings};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::net::{Ipv4Addr, Ipv6Addr};
use weft_api::names;

/// The rules that `settings` ask for in `family`.
pub fn build(settings: &Settings, family: Family) -> RuleSet {
    let builder = Builder { settings, family };
    let raw = table(TableKind::Raw, builder.raw());
    let mangle = table(TableKind::Mangle, builder.mangle());
    let nat = table(TableKind::Nat, builder.nat());
    // The table that takes inbound connections in this mode is committed before the one that does in the other.
    let tables = match settings.mode {
        Mode::Redirect => [raw, nat, mangle],
        Mode::Tproxy => [raw, mangle, nat],
    };
    RuleSet { family, tables: tables.into_iter().flatten().collect() }
}

fn table(kind: TableKind, chains: Vec<Chain>) -> Option<Table> {
    (!chains.is_empty()).then_some(Table { kind, chains })
}

fn chain(name: ChainName, hook: Option<Hook>, rules: Vec<Rule>) -> Option<Chain> {
    (!rules.is_empty()).then_some(Chain { name, hook, rules })
}

fn rule(matches: impl IntoIterator<Item = Match>, target: Target) -> Rule {
    Rule { matches: matches.into_iter().collect(), target }
}

const TCP: Match = Match::Protocol(Protocol::Tcp);
const UDP: Match = Match::Protocol(Protocol::Udp);

fn port(number: u16) -> Match {
    Match::Ports(vec![PortRange::single(number)])
}

fn loopback() -> Interface {
    Interface::loopback()
}

/// A set of ports as lists that one `multiport` match can hold.
pub(super) fn chunks(ports: &PortSet) -> Vec<Vec<PortRange>> {
    let mut chunks: Vec<Vec<PortRange>> = Vec::new();
    let mut used = MULTIPORT_SLOTS;
    for range in ports.ranges() {
        let slots = if range.first == range.last { 1 } else { 2 };
        if used + slots > MULTIPORT_SLOTS {
            chunks.push(Vec::new());
            used = 0;
        }
        used += slots;
        if let Some(chunk) = chunks.last_mut() {
            chunk.push(*range);
        }
    }
    chunks
}

struct Builder<'a> {
    settings: &'a Settings,
    family: Family,
}

impl Builder<'_> {
    fn passthrough(&self) -> IpNet {
        match self.family {
            Family::V4 => IpNet::from(std::net::IpAddr::V4(names::PASSTHROUGH_V4)),
            Family::V6 => IpNet::from(std::net::IpAddr::V6(names::PASSTHROUGH_V6)),
        }
    }

    /// What only the pod itself can reach.
    fn loopback_net(&self) -> IpNet {
        match self.family {
            Family::V4 => IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8)),
            Family::V6 => IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128)),
        }
    }

    /// The networks of this family as matches; a network that holds every address needs none.
    fn nets<'n>(&self, nets: &'n [IpNet], direction: fn(IpNet) -> Match) -> impl Iterator<Item = Vec<Match>> + use<'n> {
        let family = self.family;
        nets.iter().filter(move |net| family.has(net)).map(
            move |net| {
                if net.prefix_len() == 0 { Vec::new() } else { vec![direction(*net)] }
            },
        )
    }

    fn excluded_interfaces(&self, direction: fn(Interface) -> Match) -> Vec<Rule> {
        self.settings.exclude_interfaces.iter().map(|interface| rule([direction(interface.clone())], Target::Return)).collect()
    }

    /// What tells the proxy's sockets from others.
    fn proxy(&self) -> impl Iterator<Item = Match> + use<> {
        let user = self.settings.proxy_user().map(Match::Uid);
        user.into_iter().chain(self.settings.proxy_group().map(Match::Gid))
    }

    fn dns(&self) -> bool {
        self.settings.dns_capture && !self.settings.exclude_outbound_ports.contains(DNS)
    }

    fn redirects_inbound(&self) -> bool {
        !matches!(&self.settings.inbound_ports, Ports::List(ports) if ports.is_empty())
    }

    fn nat(&self) -> Vec<Chain> {
        let prerouting = if self.settings.mode == Mode::Redirect && self.redirects_inbound() {
            let mut rules = self.excluded_interfaces(Match::In);
            rules.push(rule([TCP], Target::Jump(ChainName::Inbound)));
            rules
        } else {
            Vec::new()
        };
        [
            chain(ChainName::Prerouting, Some(Hook::Prerouting), prerouting),
            chain(ChainName::Output, Some(Hook::Output), self.nat_output()),
            chain(ChainName::Proxy, None, self.nat_proxy()),
            chain(ChainName::Inbound, None, self.inbound(Target::Redirect(self.settings.inbound_port))),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    fn nat_output(&self) -> Vec<Rule> {
        let settings = self.settings;
        let mut rules = self.excluded_interfaces(Match::Out);
        // The proxy hands a connection on to the app of its own pod: before the owner rules, which would send it back.
        rules.push(rule([Match::Source(self.passthrough()), Match::Out(loopback())], Target::Return));
        // Before all exclusions: those speak of the app's traffic, not of the proxy's.
        let proxy = if self.nat_proxy().is_empty() { Target::Return } else { Target::Goto(ChainName::Proxy) };
        for owner in self.proxy() {
            rules.push(rule([owner], proxy.clone()));
        }
        // The app speaks to its own pod: loopback, or the pod's own address.
        rules.push(rule([Match::Out(loopback())], Target::Return));
        for ports in chunks(&settings.exclude_outbound_ports) {
            rules.push(rule([TCP, Match::Ports(ports)], Target::Return));
        }
        for net in self.nets(&settings.exclude_outbound_cidrs, Match::Destination) {
            rules.push(rule(net, Target::Return));
        }
        if self.dns() {
            rules.push(rule([UDP, port(DNS)], Target::Redirect(names::DNS_PORT)));
            rules.push(rule([TCP, port(DNS)], Target::Redirect(names::DNS_PORT)));
        }
        let outbound = Target::Redirect(settings.outbound_port);
        for ports in chunks(&settings.outbound_ports) {
            rules.push(rule([TCP, Match::Ports(ports)], outbound.clone()));
        }
        match &settings.outbound_cidrs {
            Cidrs::All => rules.push(rule([TCP], outbound)),
            Cidrs::List(nets) => {
                for net in self.nets(nets, Match::Destination) {
                    rules.push(rule(net.into_iter().chain([TCP]), outbound.clone()));
                }
            }
        }
        rules
    }

    /// The proxy reaches its own pod as a peer would: a request that the app sends to a Service and that the proxy sends
    /// back to this pod must pass the inbound side too.
    fn nat_proxy(&self) -> Vec<Rule> {
        if !self.redirects_inbound() {
            return Vec::new();
        }
        let mut rules = Vec::new();
        if self.settings.mode == Mode::Tproxy {
            // To the app with the client's address as source: already through the inbound side.
            rules.push(rule([Match::Mark(LOCAL_MARK)], Target::Return));
        }
        rules.push(rule(
            [Match::NotDestination(self.loopback_net()), Match::Out(loopback()), TCP],
            Target::Jump(ChainName::Inbound),
        ));
        rules
    }

    fn inbound(&self, taken: Target) -> Vec<Rule> {
        let settings = self.settings;
        if !self.redirects_inbound() {
            return Vec::new();
        }
        let mut excluded = settings.exclude_inbound_ports.clone();
        excluded.insert(PortRange::single(names::ADMIN_PORT));
        let mut rules: Vec<Rule> =
            chunks(&excluded).into_iter().map(|ports| rule([TCP, Match::Ports(ports)], Target::Return)).collect();
        match &settings.inbound_ports {
            Ports::All => rules.push(rule([TCP], taken)),
            Ports::List(ports) => {
                for ports in chunks(ports) {
                    rules.push(rule([TCP, Match::Ports(ports)], taken.clone()));
                }
            }
        }
        rules
    }

    fn mangle(&self) -> Vec<Chain> {
        let tproxy = self.settings.mode == Mode::Tproxy && self.redirects_inbound();
        let mut prerouting = Vec::new();
        if self.settings.drop_invalid || tproxy {
            prerouting.extend(self.excluded_interfaces(Match::In));
        }
        if self.settings.drop_invalid {
            // Such a packet is not translated back; the kernel would answer it with a reset and kill a healthy connection.
            prerouting.push(rule([TCP, Match::State(CtState::Invalid)], Target::Drop));
        }
        let mut chains = Vec::new();
        if tproxy {
            prerouting.push(rule([Match::In(loopback())], Target::Return));
            prerouting.push(rule([TCP], Target::Jump(ChainName::Inbound)));
        }
        chains.extend(chain(ChainName::Prerouting, Some(Hook::Prerouting), prerouting));
        if tproxy {
            chains.extend(chain(ChainName::Output, Some(Hook::Output), Self::mangle_output()));
            chains.extend(chain(ChainName::Inbound, None, self.inbound(Target::Goto(ChainName::Tproxy))));
            chains.extend(chain(ChainName::Tproxy, None, self.tproxy()));
        }
        chains
    }

    fn tproxy(&self) -> Vec<Rule> {
        vec![
            // A connection is taken at its first packet or not at all: answers to what the pod sent, and connections from
            // before these rules, would be killed.
            rule([TCP, Match::Syn, Match::State(CtState::New)], Target::SetConnMark(TAKEN_MARK)),
            // Opened while rules for the other mode were in force: translated, hence not to be taken here.
            rule([TCP, Match::State(CtState::Dnat)], Target::Return),
            rule([TCP, Match::ConnMark(TAKEN_MARK)], Target::Tproxy(self.settings.inbound_port)),
            // No proxy listens: nftables would let the packet through to the app where iptables drops it.
            rule([TCP, Match::ConnMark(TAKEN_MARK)], Target::Drop),
        ]
    }

    /// The app answers to the client's address; the answer must come back to the proxy, which holds that connection.
    fn mangle_output() -> Vec<Rule> {
        vec![
            rule([TCP, Match::Mark(LOCAL_MARK)], Target::SetConnMark(LOCAL_MARK)),
            rule([TCP, Match::ConnMark(LOCAL_MARK), Match::Reply], Target::SetMark(LOCAL_MARK)),
        ]
    }

    /// A captured query leaves a conntrack entry behind for half a minute. Should the proxy ask the same server from the
    /// same port meanwhile, its query would be taken for part of that entry and sent back to the proxy; so the app's
    /// queries and the proxy's are tracked apart.
    fn raw(&self) -> Vec<Chain> {
        if !self.dns() {
            return Vec::new();
        }
        let excluded = &self.settings.exclude_outbound_cidrs;
        let app = Match::NotOwner { uid: self.settings.proxy_user(), gid: self.settings.proxy_group() };
        let mut output = self.excluded_interfaces(Match::Out);
        for owner in self.proxy() {
            output.push(rule([UDP, Match::SourcePort(names::DNS_PORT), owner], Target::Zone(CAPTURED_DNS_ZONE)));
        }
        output.push(rule([Match::Out(loopback())], Target::Return));
        output.extend(self.nets(excluded, Match::Destination).map(|net| rule(net, Target::Return)));
        for owner in self.proxy() {
            output.push(rule([UDP, port(DNS), owner], Target::Zone(PROXY_DNS_ZONE)));
        }
        output.push(rule([UDP, port(DNS), app], Target::Zone(CAPTURED_DNS_ZONE)));
        let mut prerouting = self.excluded_interfaces(Match::In);
        prerouting.extend(self.nets(excluded, Match::Source).map(|net| rule(net, Target::Return)));
        prerouting.push(rule([UDP, Match::SourcePort(DNS)], Target::Zone(PROXY_DNS_ZONE)));
        [chain(ChainName::Prerouting, Some(Hook::Prerouting), prerouting), chain(ChainName::Output, Some(Hook::Output), output)]
            .into_iter()
            .flatten()
            .collect()
    }
}
