//! The flow table of the specification, row by row: real sockets in a pod of two network namespaces, both families, every
//! back end that this kernel offers, REDIRECT and TPROXY.

mod common;

use common::{APP, APP_PORTS, Flow, Landed, POD_V4, POD_V6, PROXY, World, back_ends, choice, sh};
use std::net::IpAddr;
use weft_init::flags::{Cidrs, Mode, PortRange, PortSet, Ports, Settings, values};

const MODES: [Mode; 2] = [Mode::Redirect, Mode::Tproxy];

/// The addresses of a family that a row speaks of.
struct Addresses {
    pod: IpAddr,
    pod_second: IpAddr,
    loopback: IpAddr,
    passthrough: IpAddr,
    outside: IpAddr,
    outside_second: IpAddr,
    /// Somewhere in the world; a Service's address looks no different.
    far: IpAddr,
    excluded: IpAddr,
    peer: IpAddr,
}

fn both_families() -> [Addresses; 2] {
    let ip = |text: &str| text.parse().unwrap();
    [
        Addresses {
            pod: POD_V4[0].into(),
            pod_second: POD_V4[1].into(),
            loopback: ip("127.0.0.1"),
            passthrough: ip("127.0.0.6"),
            outside: ip("10.66.0.1"),
            outside_second: ip("10.67.0.1"),
            far: ip("203.0.113.9"),
            excluded: ip("172.20.1.1"),
            peer: ip("198.51.100.77"),
        },
        Addresses {
            pod: POD_V6[0].into(),
            pod_second: POD_V6[1].into(),
            loopback: ip("::1"),
            passthrough: ip("::6"),
            outside: ip("fd66::1"),
            outside_second: ip("fd67::1"),
            far: ip("2001:db8:9::9"),
            excluded: ip("fdaa::1"),
            peer: ip("2001:db8:77::77"),
        },
    ]
}

fn ports(text: &str) -> PortSet {
    values::port_set(text).unwrap()
}

/// Runs rows for each back end, mode and family, in a world of their own per back end.
fn each(settings: Settings, rows: impl Fn(&World, &Addresses, Mode)) {
    for backend in back_ends() {
        let world = World::new();
        for mode in MODES {
            weft_init::apply(&Settings { mode, ..settings.clone() }, choice(backend)).unwrap();
            for addresses in both_families() {
                rows(&world, &addresses, mode);
            }
        }
    }
}

#[track_caller]
fn lands(world: &World, flow: Flow, expected: Landed) {
    assert_eq!(world.open(&flow), expected, "{flow:?}");
}

#[test]
fn what_the_app_opens_goes_to_the_proxy_and_what_stays_in_the_pod_does_not() {
    each(Settings::default(), |world, at, _| {
        lands(world, Flow::out(APP, at.far, 80), Landed::Proxy(15001));
        lands(world, Flow::out(APP, at.far, 12345), Landed::Proxy(15001));
        lands(world, Flow::out(APP, at.outside, 80), Landed::Proxy(15001));
        lands(world, Flow::out((0, 0), at.far, 443), Landed::Proxy(15001));
        lands(world, Flow::out(APP, at.loopback, 8080), Landed::App(8080));
        lands(world, Flow::out(APP, at.pod, 8080), Landed::App(8080));
        lands(world, Flow::out(APP, at.pod_second, 8080), Landed::App(8080));
        lands(world, Flow::out(APP, at.far, 5000).udp(), Landed::Outside);
        lands(world, Flow::out(APP, at.far, 53).udp(), Landed::Outside);
        lands(world, Flow::out(APP, at.loopback, 8080).udp(), Landed::App(8080));
    });
}

#[test]
fn what_the_proxy_opens_is_left_alone() {
    each(Settings::default(), |world, at, _| {
        for owner in [PROXY, (1337, 0), (0, 1337), (1000, 1337)] {
            lands(world, Flow::out(owner, at.far, 80), Landed::Outside);
            lands(world, Flow::out(owner, at.far, 53).udp(), Landed::Outside);
            lands(world, Flow::out(owner, at.far, 5000).udp(), Landed::Outside);
            lands(world, Flow::out(owner, at.loopback, 8080), Landed::App(8080));
            // Inbound forwarding: the proxy to its own app.
            lands(world, Flow::out(owner, at.pod, 8080).source(at.passthrough), Landed::App(8080));
        }
    });
}

#[test]
fn the_app_s_own_service_passes_the_inbound_side_too() {
    each(Settings { exclude_inbound_ports: ports("9090"), ..Settings::default() }, |world, at, _| {
        // The app asks for the Service's address, the proxy takes it and chooses this very pod.
        lands(world, Flow::out(APP, at.far, 80), Landed::Proxy(15001));
        for owner in [PROXY, (1337, 0), (0, 1337)] {
            lands(world, Flow::out(owner, at.pod, 8080), Landed::Proxy(15006));
            lands(world, Flow::out(owner, at.pod_second, 8080), Landed::Proxy(15006));
            // As a peer's would.
            lands(world, Flow::out(owner, at.pod, 9090), Landed::App(9090));
            lands(world, Flow::out(owner, at.pod, 15020), Landed::Proxy(15020));
        }
    });
}

#[test]
fn what_comes_in_goes_to_the_proxy_except_for_its_admin_port() {
    each(Settings { exclude_inbound_ports: ports("22,8080-8081"), ..Settings::default() }, |world, at, _| {
        lands(world, Flow::inbound(at.pod, 80), Landed::Proxy(15006));
        lands(world, Flow::inbound(at.pod_second, 80), Landed::Proxy(15006));
        // Nothing of the app listens there; the proxy decides.
        lands(world, Flow::inbound(at.pod, 7777), Landed::Proxy(15006));
        // No detour around the proxy's inbound side.
        lands(world, Flow::inbound(at.pod, 15001), Landed::Proxy(15006));
        // Probes and scrapes.
        lands(world, Flow::inbound(at.pod, 15020), Landed::Proxy(15020));
        for port in [22, 8080, 8081] {
            lands(world, Flow::inbound(at.pod, port), Landed::App(port));
        }
        lands(world, Flow::inbound(at.pod, 8080).udp(), Landed::App(8080));
        lands(world, Flow::inbound(at.pod, 443).udp(), Landed::App(443));
    });
}

#[test]
fn only_listed_inbound_ports_are_taken_if_there_is_a_list() {
    let settings = Settings {
        inbound_ports: Ports::List(ports("80,8080-8090")),
        exclude_inbound_ports: ports("8081"),
        ..Settings::default()
    };
    each(settings, |world, at, _| {
        lands(world, Flow::inbound(at.pod, 80), Landed::Proxy(15006));
        lands(world, Flow::inbound(at.pod, 8080), Landed::Proxy(15006));
        lands(world, Flow::inbound(at.pod, 8081), Landed::App(8081));
        lands(world, Flow::inbound(at.pod, 443), Landed::App(443));
        lands(world, Flow::out(PROXY, at.pod, 80), Landed::Proxy(15006));
        lands(world, Flow::out(PROXY, at.pod, 443), Landed::App(443));
    });
    each(Settings { inbound_ports: Ports::List(PortSet::default()), ..Settings::default() }, |world, at, _| {
        lands(world, Flow::inbound(at.pod, 80), Landed::App(80));
        lands(world, Flow::out(PROXY, at.pod, 80), Landed::App(80));
        lands(world, Flow::out(APP, at.far, 80), Landed::Proxy(15001));
    });
}

#[test]
fn an_exclusion_wins_over_whatever_would_redirect() {
    let settings = Settings {
        exclude_interfaces: vec!["eth1".parse().unwrap()],
        exclude_outbound_ports: ports("22,3306-3310,53"),
        exclude_outbound_cidrs: values::cidr_list("172.20.0.0/16,fdaa::/32").unwrap().0,
        outbound_ports: ports("22,80"),
        dns_capture: true,
        ..Settings::default()
    };
    each(settings, |world, at, _| {
        lands(world, Flow::out(APP, at.outside_second, 80), Landed::Outside);
        lands(world, Flow::inbound(at.pod_second, 80), Landed::App(80));
        lands(world, Flow::out(APP, at.far, 22), Landed::Outside);
        lands(world, Flow::out(APP, at.far, 3308), Landed::Outside);
        lands(world, Flow::out(APP, at.far, 3311), Landed::Proxy(15001));
        // An excluded port is excluded for datagrams as well.
        lands(world, Flow::out(APP, at.far, 53).udp(), Landed::Outside);
        lands(world, Flow::out(APP, at.far, 53), Landed::Outside);
        lands(world, Flow::out(APP, at.excluded, 80), Landed::Outside);
        lands(world, Flow::out(APP, at.far, 80), Landed::Proxy(15001));
        lands(world, Flow::inbound(at.pod, 80), Landed::Proxy(15006));
    });
    each(Settings { exclude_interfaces: vec!["eth+".parse().unwrap()], ..Settings::default() }, |world, at, _| {
        lands(world, Flow::out(APP, at.far, 80), Landed::Outside);
        lands(world, Flow::inbound(at.pod, 80), Landed::App(80));
    });
}

#[test]
fn only_listed_destinations_are_taken_if_there_is_a_list() {
    let settings = Settings {
        outbound_cidrs: values::cidrs("172.20.0.0/16,fdaa::/32").unwrap(),
        outbound_ports: ports("443"),
        ..Settings::default()
    };
    each(settings, |world, at, _| {
        lands(world, Flow::out(APP, at.excluded, 80), Landed::Proxy(15001));
        lands(world, Flow::out(APP, at.far, 80), Landed::Outside);
        lands(world, Flow::out(APP, at.far, 443), Landed::Proxy(15001));
    });
    each(Settings { outbound_cidrs: Cidrs::List(vec![]), ..Settings::default() }, |world, at, _| {
        lands(world, Flow::out(APP, at.far, 80), Landed::Outside);
        lands(world, Flow::inbound(at.pod, 80), Landed::Proxy(15006));
    });
}

#[test]
fn more_ports_than_one_rule_can_hold() {
    // Every third port of twenty, and a range: two rules with multiport at least.
    let list: PortSet = (0..20).map(|each| PortRange::single(3000 + 3 * each)).collect();
    let mut list = list;
    list.insert("9090-9095".parse().unwrap());
    let settings = Settings { exclude_outbound_ports: list.clone(), exclude_inbound_ports: list, ..Settings::default() };
    each(settings, |world, at, _| {
        for port in (3000..3062).step_by(3).take(20) {
            lands(world, Flow::out(APP, at.far, port), if port < 3060 { Landed::Outside } else { Landed::Proxy(15001) });
        }
        lands(world, Flow::out(APP, at.far, 3001), Landed::Proxy(15001));
        lands(world, Flow::out(APP, at.far, 9095), Landed::Outside);
        lands(world, Flow::inbound(at.pod, 3000), Landed::App(3000));
        lands(world, Flow::inbound(at.pod, 9090), Landed::App(9090));
    });
}

#[test]
fn dns_is_captured_and_the_proxy_s_own_queries_are_not() {
    let settings = Settings {
        dns_capture: true,
        exclude_outbound_cidrs: values::cidr_list("172.20.0.0/16,fdaa::/32").unwrap().0,
        ..Settings::default()
    };
    each(settings, |world, at, _| {
        lands(world, Flow::out(APP, at.far, 53).udp(), Landed::Proxy(15053));
        lands(world, Flow::out(APP, at.far, 53), Landed::Proxy(15053));
        lands(world, Flow::out(PROXY, at.far, 53).udp(), Landed::Outside);
        lands(world, Flow::out(PROXY, at.far, 53), Landed::Outside);
        lands(world, Flow::out((0, 1337), at.far, 53).udp(), Landed::Outside);
        // A resolver of the app's own.
        lands(world, Flow::out(APP, at.loopback, 53).udp(), Landed::App(53));
        lands(world, Flow::out(APP, at.excluded, 53).udp(), Landed::Outside);
        lands(world, Flow::out(APP, at.far, 5353).udp(), Landed::Outside);
        // The app as a DNS server.
        lands(world, Flow::inbound(at.pod, 53).udp(), Landed::App(53));
        // The proxy asks the same server from the port that the app has just used.
        for port in [61001, 61002, 61003] {
            lands(world, Flow::out(APP, at.far, 53).udp().source_port(port), Landed::Proxy(15053));
            lands(world, Flow::out(PROXY, at.far, 53).udp().source_port(port), Landed::Outside);
            lands(world, Flow::out(APP, at.far, 53).udp().source_port(port), Landed::Proxy(15053));
        }
        // Its queries have their answers, also in the eyes of conntrack: without, each would look like an attack's.
        let family = if at.far.is_ipv4() { "ipv4" } else { "ipv6" };
        let tracked = sh(&format!("conntrack -L -f {family} -p udp -w 1 2>/dev/null"));
        assert!(tracked.contains("dport=53") && !tracked.contains("UNREPLIED"), "{tracked}");
        sh("conntrack -F 2>&1");
    });
}

#[test]
fn with_tproxy_the_proxy_may_speak_to_the_app_as_the_client() {
    each(Settings::default(), |world, at, mode| {
        if mode == Mode::Tproxy {
            // The answer to an address far away must come back to the proxy's socket.
            let mut flow = Flow::out(PROXY, at.pod, 8080).source(at.peer);
            flow.mark = weft_init::rules::LOCAL_MARK;
            lands(world, flow, Landed::App(8080));
        }
    });
}

#[test]
fn another_user_and_other_ports_for_the_proxy() {
    let settings = Settings {
        proxy_uid: 2102,
        proxy_gid: 2103,
        inbound_port: APP_PORTS[0],
        outbound_port: APP_PORTS[4],
        ..Settings::default()
    };
    for backend in back_ends() {
        let world = World::new();
        weft_init::apply(&settings, choice(backend)).unwrap();
        for at in both_families() {
            lands(&world, Flow::out((2102, 0), at.far, 80), Landed::Outside);
            lands(&world, Flow::out((0, 2103), at.far, 80), Landed::Outside);
            lands(&world, Flow::out(PROXY, at.far, 80), Landed::App(APP_PORTS[4]));
            lands(&world, Flow::inbound(at.pod, 80), Landed::App(APP_PORTS[0]));
        }
    }
}

/// A packet that fits no connection: SYN and FIN at once. A pod that does not drop it answers with a reset.
mod invalid {
    use super::*;
    use socket2::{Domain, Protocol, Socket, Type};
    use std::io::Read as _;
    use std::net::SocketAddr;
    use std::time::{Duration, Instant};

    const RESET: u8 = 0x04;
    const SYN_FIN: u8 = 0x03;

    fn checksum(at: &Addresses, segment: &[u8]) -> u16 {
        let mut pseudo = Vec::new();
        for ip in [at.outside, at.pod] {
            match ip {
                IpAddr::V4(v4) => pseudo.extend(v4.octets()),
                IpAddr::V6(v6) => pseudo.extend(v6.octets()),
            }
        }
        pseudo.extend([0, 6, 0, segment.len() as u8]);
        pseudo.extend(segment);
        let sum: u32 = pseudo.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        !((sum & 0xffff) + (sum >> 16)) as u16
    }

    /// Whether the pod answers with a reset.
    fn is_reset(world: &World, at: &Addresses, port: u16) -> bool {
        world.outside.enter();
        let socket = Socket::new(Domain::for_address(SocketAddr::new(at.pod, 0)), Type::RAW, Some(Protocol::TCP)).unwrap();
        socket.bind(&SocketAddr::new(at.outside, 0).into()).unwrap();
        let mut segment = Vec::new();
        segment.extend(port.to_be_bytes());
        segment.extend(7_u16.to_be_bytes());
        segment.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, SYN_FIN, 0x20, 0, 0, 0, 0, 0]);
        let sum = checksum(at, &segment);
        segment[16..18].copy_from_slice(&sum.to_be_bytes());
        socket.send_to(&segment, &SocketAddr::new(at.pod, 0).into()).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let end = Instant::now() + Duration::from_millis(300);
        let mut reset = false;
        while Instant::now() < end && !reset {
            let mut received = [0; 256];
            if (&socket).read(&mut received).is_err() {
                continue;
            }
            // IPv4 hands out its header as well.
            let segment = if at.pod.is_ipv4() { &received[20..] } else { &received[..] };
            reset = segment[2..4] == port.to_be_bytes() && segment[13] & RESET != 0;
        }
        world.pod.enter();
        reset
    }

    #[test]
    fn is_dropped_unless_told_otherwise() {
        for backend in back_ends() {
            let world = World::new();
            for mode in MODES {
                for (drop_invalid, port) in [(true, 5001), (false, 5002)] {
                    weft_init::apply(&Settings { drop_invalid, mode, ..Settings::default() }, choice(backend)).unwrap();
                    for at in both_families() {
                        assert_eq!(is_reset(&world, &at, port), !drop_invalid, "{backend} {mode:?} {}", at.pod);
                    }
                }
            }
        }
    }
}

#[test]
fn without_rules_everything_is_direct() {
    // The tests can fail: the same world without rules.
    let world = World::new();
    for at in both_families() {
        lands(&world, Flow::out(APP, at.far, 80), Landed::Outside);
        lands(&world, Flow::inbound(at.pod, 80), Landed::App(80));
        lands(&world, Flow::out(PROXY, at.pod, 8080), Landed::App(8080));
        lands(&world, Flow::out(APP, at.far, 53).udp(), Landed::Outside);
    }
}

#[test]
fn without_a_proxy_nothing_reaches_the_app() {
    for backend in back_ends() {
        // The app listens, the proxy does not: it has crashed, or is not up yet.
        let world = World::with_listeners(&APP_PORTS, &[]);
        for mode in MODES {
            weft_init::apply(&Settings { mode, ..Settings::default() }, choice(backend)).unwrap();
            for at in both_families() {
                let start = std::time::Instant::now();
                lands(&world, Flow::inbound(at.pod, 80), Landed::Nowhere);
                let refused = start.elapsed() < std::time::Duration::from_millis(600);
                assert_eq!(refused, mode == Mode::Redirect, "{backend} {mode:?}");
                lands(&world, Flow::out(APP, at.far, 80), Landed::Nowhere);
            }
        }
    }
}

#[test]
fn a_proxy_that_runs_as_root_does_not_take_the_app_s_root_processes_along() {
    for uid_and_gid in [(0, 1337), (1337, 0)] {
        let settings = Settings { proxy_uid: uid_and_gid.0, proxy_gid: uid_and_gid.1, dns_capture: true, ..Settings::default() };
        each(settings, |world, at, _| {
            lands(world, Flow::out((0, 0), at.far, 80), Landed::Proxy(15001));
            lands(world, Flow::out((0, 0), at.far, 53).udp(), Landed::Proxy(15053));
            lands(world, Flow::out(uid_and_gid, at.far, 80), Landed::Outside);
            lands(world, Flow::out(uid_and_gid, at.far, 53).udp(), Landed::Outside);
            lands(world, Flow::out(uid_and_gid, at.pod, 80), Landed::Proxy(15006));
            lands(world, Flow::out((0, 0), at.pod, 80), Landed::App(80));
        });
    }
}
