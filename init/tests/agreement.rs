//! A thousand random configurations: where the model says that a connection lands, the kernel must land it. The
//! configurations of one back end follow each other in one pod, so that each is also a reconciliation with the one before.

mod common;

use common::{APP, APP_PORTS, Flow, POD_V4, POD_V6, PROXY_PORTS, World, back_ends, choice};
use ipnet::IpNet;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use std::net::IpAddr;
use weft_init::flags::{Backend, Cidrs, Mode, PortRange, PortSet, Ports, Settings, values};
use weft_init::rules::{self, Family};

const CONFIGURATIONS: u64 = 1000;
const FLOWS: usize = 20;

/// Ports that configurations and flows have in common, so that they meet.
const PORTS: [u16; 16] = [1, 22, 53, 80, 443, 3000, 3001, 8080, 8081, 8443, 9090, 15001, 15006, 15020, 15021, 65535];
const CIDRS: [&str; 16] = [
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.66.0.0/24",
    "10.67.0.1/32",
    "127.0.0.0/8",
    "172.20.0.0/16",
    "203.0.113.0/25",
    "128.0.0.0/1",
    "::/0",
    "fd66::/64",
    "fd67::1/128",
    "fc00::/7",
    "2001:db8::/32",
    "2001:db8:9::/48",
    "fdaa::/32",
    "8000::/1",
];
const ADDRESSES: [&str; 13] = [
    "10.66.0.1",
    "10.67.0.1",
    "172.20.1.1",
    "203.0.113.9",
    "203.0.113.200",
    "127.0.0.2",
    "fd66::1",
    "fd67::1",
    "fdaa::1",
    "2001:db8:9::9",
    "2001:db8:8::8",
    "::1",
    "192.0.2.1",
];

fn pick<T: Copy>(random: &mut StdRng, from: &[T]) -> T {
    *from.choose(random).expect("not empty")
}

fn port_set(random: &mut StdRng, most: usize) -> PortSet {
    (0..random.random_range(0..=most))
        .map(|_| {
            let port = pick(random, &PORTS);
            if random.random_bool(0.3) {
                let other = if random.random_bool(0.5) { port.saturating_add(3) } else { pick(random, &PORTS) };
                PortRange { first: port.min(other), last: port.max(other) }
            } else if random.random_bool(0.2) {
                // Beside what flows use: it makes lists long.
                PortRange::single(random.random_range(1..=u16::MAX))
            } else {
                PortRange::single(port)
            }
        })
        .collect()
}

fn nets(random: &mut StdRng, most: usize) -> Vec<IpNet> {
    let list: Vec<&str> = (0..random.random_range(0..=most)).map(|_| pick(random, &CIDRS)).collect();
    values::cidr_list(&list.join(",")).unwrap().0
}

/// One configuration. Most lists are short; some are longer than one multiport rule.
fn settings(random: &mut StdRng) -> Settings {
    let most = if random.random_bool(0.1) { 40 } else { 4 };
    let sometimes = |random: &mut StdRng, chance| random.random_bool(chance);
    let dns_capture = sometimes(random, 0.4);
    Settings {
        proxy_uid: pick(random, &[1337, 1337, 1337, 1000, 0, 2102]),
        // What listens on the DNS port in these tests is of group 1337, and only the proxy's answers find their way back.
        proxy_gid: if dns_capture { 1337 } else { pick(random, &[1337, 1337, 1000, 2102]) },
        inbound_ports: if sometimes(random, 0.7) { Ports::All } else { Ports::List(port_set(random, most)) },
        exclude_inbound_ports: port_set(random, most),
        outbound_ports: if sometimes(random, 0.5) { PortSet::default() } else { port_set(random, most) },
        exclude_outbound_ports: if sometimes(random, 0.6) { PortSet::default() } else { port_set(random, most) },
        outbound_cidrs: if sometimes(random, 0.7) { Cidrs::All } else { Cidrs::List(nets(random, 4)) },
        exclude_outbound_cidrs: if sometimes(random, 0.6) { Vec::new() } else { nets(random, 3) },
        exclude_interfaces: values::interfaces(pick(random, &["", "", "", "", "", "eth1", "eth0", "eth+", "tun0,eth1", "eth2"]))
            .unwrap()
            .0,
        dns_capture,
        drop_invalid: sometimes(random, 0.8),
        mode: if sometimes(random, 0.3) { Mode::Tproxy } else { Mode::Redirect },
        ..Settings::default()
    }
}

fn flow(random: &mut StdRng) -> Flow {
    let pod: [IpAddr; 4] = [POD_V4[0].into(), POD_V4[1].into(), POD_V6[0].into(), POD_V6[1].into()];
    let listening: Vec<u16> = APP_PORTS.into_iter().chain(PROXY_PORTS).collect();
    let udp = random.random_bool(0.2);
    if random.random_bool(0.25) {
        let flow = Flow::inbound(pick(random, &pod), pick(random, &listening));
        return if udp && flow.destination.port() != 15053 { flow.udp() } else { flow };
    }
    let owner = (pick(random, &[0, 1000, 1337, 2102]), pick(random, &[0, 1000, 1337, 2102]));
    let ip = if random.random_bool(0.15) { pick(random, &pod) } else { pick(random, &ADDRESSES).parse().unwrap() };
    let stays = ip.is_loopback() || pod.contains(&ip);
    let port = if stays { pick(random, &listening) } else { pick(random, &PORTS) };
    let mut flow = Flow::out(if random.random_bool(0.6) { APP } else { owner }, ip, port);
    if stays && random.random_bool(0.3) {
        flow = flow.source(if ip.is_ipv4() { "127.0.0.6" } else { "::6" }.parse::<IpAddr>().unwrap());
    }
    // At 15053 a datagram's listener has the loopback address alone; a listener that has all addresses answers from the
    // address that the way back has, which for these is another than was asked.
    let answered = !(stays && port == 15053) && flow.source.is_none() && ip != IpAddr::from([127, 0, 0, 2]);
    if udp && answered { flow.udp() } else { flow }
}

fn agree(backend: Backend) {
    let offered = back_ends();
    if !offered.contains(&backend) {
        eprintln!("skipped: this kernel does not offer {backend}");
        return;
    }
    // nf_tables waits for all CPUs at each change and x_tables does not, so that legacy gets half of the seeds.
    let turns: Vec<Backend> = [Backend::Legacy, Backend::Nft, Backend::Legacy, Backend::Nftables]
        .into_iter()
        .filter(|each| offered.contains(each))
        .collect();
    let seeds: Vec<u64> = (0..CONFIGURATIONS).filter(|seed| turns[*seed as usize % turns.len()] == backend).collect();
    let world = World::new();
    weft_init::netlink::add_loopback_address(weft_api::names::PASSTHROUGH_V6).unwrap();
    let (mut redirected, mut total) = (0, 0);
    for seed in seeds.iter().copied() {
        let mut random = StdRng::seed_from_u64(seed);
        let settings = settings(&mut random);
        weft_init::apply(&settings, choice(backend)).unwrap_or_else(|failure| panic!("seed {seed}: {settings:?}: {failure}"));
        for _ in 0..FLOWS {
            let flow = flow(&mut random);
            let rules = rules::build(&settings, Family::of(flow.destination.ip()));
            let landing = rules::land(&rules, &flow.connection());
            let expected = flow.expected(landing);
            let seen = world.open(&flow);
            assert_eq!(seen, expected, "seed {seed}\n{settings:#?}\n{flow:#?}");
            redirected += usize::from(landing != rules::Landing::Direct);
            total += 1;
        }
    }
    eprintln!("{backend}: {total} connections under {} configurations, {redirected} of them redirected", seeds.len());
    // Neither side of the comparison is trivial.
    assert!(redirected * 5 > total && redirected * 5 < total * 4, "{redirected} of {total} redirected");
}

#[test]
fn model_and_kernel_agree_with_iptables_nft() {
    agree(Backend::Nft);
}

#[test]
fn model_and_kernel_agree_with_iptables_legacy() {
    agree(Backend::Legacy);
}

#[test]
fn model_and_kernel_agree_with_nftables() {
    agree(Backend::Nftables);
}
