//! The rules against the specification in words: for any settings and any connection, walking the rules ends where the
//! sentences of the flow table say. The table is written here a second time, without chains, so that a mistake in their
//! order shows.

use super::*;
use crate::flags::{Cidrs, Mode, PortSet, Ports, Settings, values};
use proptest::prelude::*;
use std::net::{IpAddr, SocketAddr};

/// The flow table.
fn specification(settings: &Settings, connection: &Connection) -> Landing {
    let Connection { hook, protocol, source, destination, interface, owner } = connection;
    let (ip, port) = (destination.ip(), destination.port());
    let tcp = *protocol == Protocol::Tcp;
    let taken_inbound = tcp
        && port != 15020
        && !settings.exclude_inbound_ports.contains(port)
        && match &settings.inbound_ports {
            Ports::All => true,
            Ports::List(ports) => ports.contains(port),
        };
    let inbound = if taken_inbound { Landing::Proxy(settings.inbound_port) } else { Landing::Direct };
    if settings.exclude_interfaces.iter().any(|excluded| excluded.covers(interface)) {
        return Landing::Direct;
    }
    if *hook == Hook::Prerouting {
        return if interface == "lo" { Landing::Direct } else { inbound };
    }
    let within_pod = interface == "lo";
    let forwarded_to_app = source.ip() == IpAddr::from([127, 0, 0, 6]) || source.ip() == "::6".parse::<IpAddr>().unwrap();
    if within_pod && forwarded_to_app {
        return Landing::Direct;
    }
    let proxy = owner.is_some_and(|(uid, gid)| uid != 0 && uid == settings.proxy_uid || gid == settings.proxy_gid);
    if proxy {
        // Its own pod, by another name than loopback: as a peer.
        return if within_pod && !ip.is_loopback() { inbound } else { Landing::Direct };
    }
    if within_pod
        || tcp && settings.exclude_outbound_ports.contains(port)
        || settings.exclude_outbound_cidrs.iter().any(|net| net.contains(&ip))
    {
        return Landing::Direct;
    }
    if settings.dns_capture && port == 53 && !settings.exclude_outbound_ports.contains(53) {
        return Landing::Proxy(15053);
    }
    let listed = match &settings.outbound_cidrs {
        Cidrs::All => true,
        Cidrs::List(nets) => nets.iter().any(|net| net.contains(&ip)),
    };
    if tcp && (listed || settings.outbound_ports.contains(port)) {
        return Landing::Proxy(settings.outbound_port);
    }
    Landing::Direct
}

const PORTS: [u16; 10] = [1, 22, 53, 80, 443, 8080, 15001, 15006, 15020, 65535];

fn port_set() -> impl Strategy<Value = PortSet> {
    let range = (prop::sample::select(PORTS.to_vec()), 0_u16..4)
        .prop_map(|(first, more)| PortRange { first, last: first.saturating_add(more) });
    prop_oneof![
        2 => Just(PortSet::default()),
        3 => prop::collection::vec(range, 0..5).prop_map(|ranges| ranges.into_iter().collect()),
        // Longer than one multiport rule, and without neighbours that merge.
        1 => prop::collection::vec(1_u16..20000, 10..60)
            .prop_map(|ports| ports.into_iter().map(|port| PortRange::single(port * 3)).collect()),
    ]
}

fn nets() -> impl Strategy<Value = Vec<ipnet::IpNet>> {
    let all = vec!["0.0.0.0/0", "10.0.0.0/8", "127.0.0.0/8", "203.0.113.0/24", "::/0", "fd00::/8", "2001:db8::/32"];
    prop::sample::subsequence(all, 0..3).prop_map(|nets| values::cidr_list(&nets.join(",")).unwrap().0)
}

fn settings() -> impl Strategy<Value = Settings> {
    let interfaces = prop::sample::subsequence(vec!["eth1", "eth+", "tun0"], 0..2)
        .prop_map(|names| names.iter().map(|name| name.parse().unwrap()).collect());
    let ids = (prop::sample::select(vec![0_u32, 1000, 1337]), prop::sample::select(vec![1000_u32, 1337]));
    let switches = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    (switches, ids, [port_set(), port_set(), port_set(), port_set()], nets(), nets(), interfaces).prop_map(
        |((all_in, all_out, dns_capture, drop_invalid, tproxy), ids, ports, cidrs, excluded, interfaces)| {
            let [inbound, exclude_inbound, outbound, exclude_outbound] = ports;
            Settings {
                proxy_uid: ids.0,
                proxy_gid: ids.1,
                inbound_ports: if all_in { Ports::All } else { Ports::List(inbound) },
                exclude_inbound_ports: exclude_inbound,
                outbound_ports: outbound,
                exclude_outbound_ports: exclude_outbound,
                outbound_cidrs: if all_out { Cidrs::All } else { Cidrs::List(cidrs) },
                exclude_outbound_cidrs: excluded,
                exclude_interfaces: interfaces,
                dns_capture,
                drop_invalid,
                mode: if tproxy { Mode::Tproxy } else { Mode::Redirect },
                ..Settings::default()
            }
        },
    )
}

fn connection() -> impl Strategy<Value = Connection> {
    let v4 = vec!["127.0.0.1", "127.0.0.6", "10.1.1.2", "203.0.113.9", "8.8.8.8"];
    let v6 = vec!["::1", "::6", "fd01::2", "2001:db8::9", "2620::1"];
    let addresses = any::<bool>().prop_flat_map(move |four| {
        let list = if four { v4.clone() } else { v6.clone() };
        (prop::sample::select(list.clone()), prop::sample::select(list))
    });
    let port = prop_oneof![prop::sample::select(PORTS.to_vec()), 1_u16..];
    let owner = (prop::sample::select(vec![0_u32, 1000, 1337, 5]), prop::sample::select(vec![0_u32, 1000, 1337, 5]));
    let interface = prop::sample::select(vec!["lo", "eth0", "eth1", "tun0"]);
    (addresses, port, owner, interface, any::<bool>(), prop::bool::weighted(0.7)).prop_map(
        |((source, destination), port, owner, interface, out, tcp)| Connection {
            hook: if out { Hook::Output } else { Hook::Prerouting },
            protocol: if tcp { Protocol::Tcp } else { Protocol::Udp },
            source: SocketAddr::new(source.parse().unwrap(), 40000),
            destination: SocketAddr::new(destination.parse().unwrap(), port),
            interface: interface.to_owned(),
            owner: out.then_some(owner),
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn the_rules_say_what_the_specification_says(settings in settings(), connection in connection()) {
        let rules = build(&settings, Family::of(connection.destination.ip()));
        prop_assert_eq!(land(&rules, &connection), specification(&settings, &connection), "{:?} {:?}", settings, connection);
    }

    /// Nothing that a program may not say is ever written.
    #[test]
    fn what_is_built_can_be_written(settings in settings(), six in any::<bool>()) {
        let family = if six { Family::V6 } else { Family::V4 };
        let rules = build(&settings, family);
        for table in &rules.tables {
            prop_assert!(!table.chains.is_empty());
            for chain in &table.chains {
                prop_assert!(!chain.rules.is_empty());
                for rule in &chain.rules {
                    let protocol = rule.matches.iter().any(|each| matches!(each, Match::Protocol(_)));
                    match &rule.target {
                        Target::Jump(name) | Target::Goto(name) => prop_assert!(table.chain(*name).is_some()),
                        Target::Redirect(_) | Target::Tproxy(_) => prop_assert!(protocol),
                        _ => {}
                    }
                    for each in &rule.matches {
                        match each {
                            Match::Ports(ranges) => {
                                let slots: usize = ranges.iter().map(|range| if range.first == range.last { 1 } else { 2 }).sum();
                                prop_assert!(protocol && (1..=MULTIPORT_SLOTS).contains(&slots));
                            }
                            Match::Source(net) | Match::Destination(net) | Match::NotDestination(net) => {
                                prop_assert!(family.has(net) && net.prefix_len() > 0);
                            }
                            _ => {}
                        }
                    }
                }
            }
        }
        let text = crate::render::iptables::rule_set(&rules);
        let lines = text.lines().filter(|line| line.starts_with("-A ")).count();
        prop_assert_eq!(lines, rules.tables.iter().flat_map(|table| &table.chains).map(|chain| chain.rules.len()).sum::<usize>());
        let text = crate::render::nft::rule_set(&rules);
        prop_assert_eq!(text.matches('{').count(), text.matches('}').count());
        prop_assert!(text.is_ascii());
    }

    /// The same settings always give the same text, or a second run would think that something has changed.
    #[test]
    fn order_of_input_does_not_matter(mut ports in prop::collection::vec(1_u16.., 0..40)) {
        let set = |ports: &[u16]| -> PortSet { ports.iter().map(|port| PortRange::single(*port)).collect() };
        let one = Settings { exclude_outbound_ports: set(&ports), ..Settings::default() };
        ports.reverse();
        let other = Settings { exclude_outbound_ports: set(&ports), ..Settings::default() };
        prop_assert_eq!(build(&one, Family::V4), build(&other, Family::V4));
    }
}

#[test]
fn the_table_that_takes_over_is_committed_before_the_one_that_lets_go() {
    let order = |mode| -> Vec<TableKind> {
        let settings = Settings { mode, dns_capture: true, ..Settings::default() };
        build(&settings, Family::V4).tables.iter().map(|table| table.kind).collect()
    };
    assert_eq!(order(Mode::Redirect), [TableKind::Raw, TableKind::Nat, TableKind::Mangle]);
    assert_eq!(order(Mode::Tproxy), [TableKind::Raw, TableKind::Mangle, TableKind::Nat]);
}

/// A packet in the midst of a connection.
fn packet(hook: Hook, interface: &str) -> Packet {
    Packet {
        hook,
        protocol: Protocol::Tcp,
        source: "198.51.100.7:40000".parse().unwrap(),
        destination: "10.1.1.2:8080".parse().unwrap(),
        interface: interface.into(),
        owner: None,
        mark: 0,
        connection_mark: 0,
        state: None,
        reply: false,
    }
}

#[test]
fn tproxy_takes_whole_connections_and_no_others() {
    let rules = build(&Settings { mode: Mode::Tproxy, ..Settings::default() }, Family::V4);
    let first = evaluate(&rules, &Packet { state: Some(CtState::New), ..packet(Hook::Prerouting, "eth0") });
    assert_eq!((first.verdict, first.connection_mark), (Verdict::Tproxy(15006), TAKEN_MARK));
    let later = Packet { connection_mark: TAKEN_MARK, ..packet(Hook::Prerouting, "eth0") };
    assert_eq!(evaluate(&rules, &later).verdict, Verdict::Tproxy(15006));
    // From before the rules, or an answer to what the pod sent.
    assert_eq!(evaluate(&rules, &packet(Hook::Prerouting, "eth0")).verdict, Verdict::Pass);
    // Redirected while the rules for the other mode were in force.
    let translated = Packet { state: Some(CtState::Dnat), ..later };
    assert_eq!(evaluate(&rules, &translated).verdict, Verdict::Pass);
}

#[test]
fn in_tproxy_the_answers_of_the_app_find_the_proxy() {
    let rules = build(&Settings { mode: Mode::Tproxy, ..Settings::default() }, Family::V4);
    let to_app = Packet { mark: LOCAL_MARK, owner: Some((1337, 1337)), state: Some(CtState::New), ..packet(Hook::Output, "lo") };
    let outcome = evaluate(&rules, &to_app);
    assert_eq!((outcome.verdict, outcome.connection_mark), (Verdict::Pass, LOCAL_MARK));
    let answer = Packet {
        source: to_app.destination,
        destination: to_app.source,
        connection_mark: LOCAL_MARK,
        reply: true,
        ..packet(Hook::Output, "eth0")
    };
    assert_eq!(evaluate(&rules, &answer).mark, LOCAL_MARK);
    assert_eq!(evaluate(&rules, &Packet { connection_mark: TAKEN_MARK, ..answer }).mark, 0);
}

#[test]
fn invalid_packets_are_dropped_but_for_excluded_interfaces() {
    let settings = Settings { exclude_interfaces: vec!["eth1".parse().unwrap()], ..Settings::default() };
    let verdict = |settings: &Settings, interface| {
        let rules = build(settings, Family::V4);
        evaluate(&rules, &Packet { state: Some(CtState::Invalid), ..packet(Hook::Prerouting, interface) }).verdict
    };
    assert_eq!(verdict(&settings, "eth0"), Verdict::Drop);
    assert_eq!(verdict(&settings, "eth1"), Verdict::Pass);
    assert_eq!(verdict(&Settings { drop_invalid: false, ..settings.clone() }, "eth0"), Verdict::Pass);
}

#[test]
fn captured_queries_and_the_proxy_s_own_are_tracked_apart() {
    let rules = build(&Settings { dns_capture: true, ..Settings::default() }, Family::V4);
    let query = |owner| {
        let packet = Packet {
            protocol: Protocol::Udp,
            source: "10.1.1.2:40000".parse().unwrap(),
            destination: "10.96.0.10:53".parse().unwrap(),
            owner: Some(owner),
            state: Some(CtState::New),
            ..packet(Hook::Output, "eth0")
        };
        evaluate(&rules, &packet)
    };
    assert_eq!((query((1000, 1000)).zone, query((1000, 1000)).verdict), (CAPTURED_DNS_ZONE, Verdict::Redirect(15053)));
    assert_eq!((query((1337, 0)).zone, query((1337, 0)).verdict), (PROXY_DNS_ZONE, Verdict::Pass));
    assert_eq!((query((0, 1337)).zone, query((0, 1337)).verdict), (PROXY_DNS_ZONE, Verdict::Pass));
    let answer = Packet {
        protocol: Protocol::Udp,
        source: "10.96.0.10:53".parse().unwrap(),
        destination: "10.1.1.2:40000".parse().unwrap(),
        ..packet(Hook::Prerouting, "eth0")
    };
    assert_eq!(evaluate(&rules, &answer).zone, PROXY_DNS_ZONE);
    let captured = Packet {
        protocol: Protocol::Udp,
        source: "127.0.0.1:15053".parse().unwrap(),
        destination: "10.1.1.2:40000".parse().unwrap(),
        owner: Some((1337, 1337)),
        ..packet(Hook::Output, "lo")
    };
    assert_eq!(evaluate(&rules, &captured).zone, CAPTURED_DNS_ZONE);
}
