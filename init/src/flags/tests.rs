//! The command line: what is read, what is refused and in which words.

use super::*;
use proptest::prelude::*;

fn parse(arguments: &[&str]) -> Result<Options, clap::Error> {
    Options::parse([&["weft-init"], arguments].concat())
}

#[test]
fn no_flags_mean_the_defaults() {
    assert_eq!(parse(&[]).unwrap(), Options::default());
}

#[test]
fn every_flag_is_read() {
    let options = parse(&[
        "--outbound-port=16001",
        "--inbound-port",
        "16006",
        "--proxy-uid",
        "2102",
        "--proxy-gid",
        "2103",
        "--inbound-ports",
        "80,443,8000-8010",
        "--exclude-inbound-ports",
        "22",
        "--outbound-ports",
        "3306",
        "--exclude-outbound-ports",
        "25, 587",
        "--outbound-cidrs",
        "10.0.0.0/8,fd00::/8",
        "--exclude-outbound-cidrs",
        "10.1.2.3/16",
        "--exclude-interfaces",
        "eth1,k6t+",
        "--dns-capture",
        "--drop-invalid",
        "false",
        "--mode",
        "tproxy",
        "--backend",
        "legacy",
        "--ipv6",
        "true",
        "--dry-run",
        "--cleanup",
        "--skip-verify",
    ])
    .unwrap();
    let settings = Settings {
        outbound_port: 16001,
        inbound_port: 16006,
        proxy_uid: 2102,
        proxy_gid: 2103,
        inbound_ports: Ports::List(values::port_set("80,443,8000-8010").unwrap()),
        exclude_inbound_ports: values::port_set("22").unwrap(),
        outbound_ports: values::port_set("3306").unwrap(),
        exclude_outbound_ports: values::port_set("25,587").unwrap(),
        outbound_cidrs: Cidrs::List(vec!["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()]),
        exclude_outbound_cidrs: vec!["10.1.0.0/16".parse().unwrap()],
        exclude_interfaces: vec!["eth1".parse().unwrap(), "k6t+".parse().unwrap()],
        dns_capture: true,
        drop_invalid: false,
        mode: Mode::Tproxy,
    };
    let expected =
        Options { settings, backend: BackendChoice::Legacy, ipv6: Ipv6::True, dry_run: true, cleanup: true, skip_verify: true };
    assert_eq!(options, expected);
}

#[test]
fn switches_may_have_a_value_or_none() {
    for (arguments, dns) in [
        (&["--dns-capture"][..], true),
        (&["--dns-capture", "true"], true),
        (&["--dns-capture=false"], false),
        (&["--dns-capture", "false", "--ipv6", "auto"], false),
        (&["--dns-capture", "--ipv6", "auto"], true),
    ] {
        assert_eq!(parse(arguments).unwrap().settings.dns_capture, dns, "{arguments:?}");
    }
}

#[test]
fn empty_lists_are_lists() {
    let options = parse(&[
        "--inbound-ports",
        "",
        "--exclude-inbound-ports",
        "",
        "--outbound-cidrs",
        "",
        "--exclude-outbound-cidrs=",
        "--exclude-interfaces",
        "",
        "--outbound-ports",
        "",
        "--exclude-outbound-ports",
        "",
    ])
    .unwrap();
    assert_eq!(options.settings.inbound_ports, Ports::List(PortSet::default()));
    assert_eq!(options.settings.outbound_cidrs, Cidrs::List(Vec::new()));
}

#[test]
fn a_bad_value_is_refused_with_its_flag() {
    for (flag, value, reason) in [
        ("--outbound-port", "0", "not between 1 and 65535"),
        ("--outbound-port", "70000", "not between 1 and 65535"),
        ("--inbound-port", "http", "not a port number"),
        ("--inbound-port", "-1", "not a port number"),
        ("--inbound-port", "+80", "not a port number"),
        ("--outbound-port", "15020", "admin port"),
        ("--inbound-port", "15001", "the value of --outbound-port"),
        ("--proxy-uid", "root", "not a numeric id"),
        ("--proxy-uid", "4294967295", "not between"),
        ("--proxy-gid", "-5", "not a numeric id"),
        ("--inbound-ports", "80,,81", "empty item"),
        ("--inbound-ports", "80,", "empty item"),
        ("--inbound-ports", "*,80", "not a port number"),
        ("--inbound-ports", "90-80", "ends before it begins"),
        ("--inbound-ports", "0-80", "port 0 is not between"),
        ("--exclude-inbound-ports", "*", "not allowed here"),
        ("--exclude-inbound-ports", "70000", "not between 1 and 65535"),
        ("--outbound-ports", "80:90", "not a port number"),
        ("--exclude-outbound-ports", "22 23", "not a port number"),
        ("--outbound-cidrs", "10.0.0.0", "write 10.0.0.0/32"),
        ("--outbound-cidrs", "fd00::1", "write fd00::1/128"),
        ("--outbound-cidrs", "10.0.0.0/33", "from 0 to 32"),
        ("--outbound-cidrs", "fd00::/129", "from 0 to 128"),
        ("--outbound-cidrs", "10.0.0.0/+8", "from 0 to 32"),
        ("--outbound-cidrs", "10.0.0/8", "not an IP address"),
        ("--exclude-outbound-cidrs", "*", "not allowed here"),
        ("--exclude-outbound-cidrs", "example.com/8", "not an IP address"),
        ("--exclude-outbound-cidrs", "::ffff:10.0.0.0/104", "IPv4 network in IPv6 notation"),
        ("--exclude-interfaces", "eth 0", "' ' in it"),
        ("--exclude-interfaces", "eth0, eth1", "' ' in it"),
        ("--exclude-interfaces", "-j", "no interface name"),
        ("--exclude-interfaces", "a/b", "'/' in it"),
        ("--exclude-interfaces", "eth0\nCOMMIT", "'\\n' in it"),
        ("--exclude-interfaces", "an-interface-too-long", "longer than 15"),
        ("--exclude-interfaces", "+", "every interface"),
        ("--exclude-interfaces", "lo", "covers lo"),
        ("--exclude-interfaces", "l+", "covers lo"),
        ("--mode", "nat", "redirect"),
        ("--backend", "ebtables", "nftables"),
        ("--ipv6", "yes", "auto"),
        ("--drop-invalid", "maybe", "true"),
        ("--dns-capture", "maybe", "true"),
    ] {
        let error = parse(&[&format!("{flag}={value}")]).expect_err(value);
        let said = error.to_string();
        assert_eq!(error.exit_code(), 2, "{said}");
        assert!(said.contains(flag), "{flag} {value}: {said}");
        assert!(said.contains(value), "{flag} {value}: {said}");
        assert!(said.contains(reason), "{flag} {value}: {said}");
    }
}

#[test]
fn what_contradicts_is_refused() {
    for (arguments, reason) in [
        (&["--ipv6=false", "--outbound-cidrs=10.0.0.0/8,fd00::/8"][..], "fd00::/8"),
        (&["--ipv6=false", "--exclude-outbound-cidrs=fd00::/8"], "--exclude-outbound-cidrs"),
        (&["--dns-capture", "--outbound-port=15053"], "DNS port"),
        (&["--proxy-uid=0", "--proxy-gid=0"], "--proxy-uid"),
        (&["--outbound-port=15006"], "'15006' for '--inbound-port'"),
        (&["--unknown"], "--unknown"),
        (&["stray"], "stray"),
    ] {
        let error = parse(arguments).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(reason), "{error}");
    }
    assert!(parse(&["--outbound-port=15053"]).is_ok());
}

#[test]
fn a_list_has_an_end() {
    let long = vec!["80"; LONGEST_LIST + 1].join(",");
    assert!(parse(&[&format!("--inbound-ports={long}")]).unwrap_err().to_string().contains("1001 items"));
}

proptest! {
    #[test]
    fn ports_keep_their_meaning_through_text(
        ranges in prop::collection::vec((1_u16.., 0_u16..2000), 0..30), probes in prop::collection::vec(any::<u16>(), 50),
    ) {
        let ranges: Vec<PortRange> = ranges
            .into_iter()
            .map(|(first, more)| PortRange { first, last: first.saturating_add(more) })
            .collect();
        let set: PortSet = ranges.iter().copied().collect();
        for port in probes.into_iter().chain(ranges.iter().flat_map(|range| [range.first, range.last])) {
            prop_assert_eq!(set.contains(port), ranges.iter().any(|range| range.contains(port)));
        }
        // Ascending, and neither overlapping nor adjacent.
        prop_assert!(set.ranges().windows(2).all(|pair| u32::from(pair[0].last) + 1 < u32::from(pair[1].first)));
        prop_assert_eq!(values::port_set(&set.to_string()).unwrap(), set);
    }

    #[test]
    fn networks_keep_their_meaning_through_text(bits in any::<u128>(), length in 0_u8..=128, four in any::<bool>()) {
        let net: ipnet::IpNet = if four {
            ipnet::Ipv4Net::new((bits as u32).into(), length % 33).unwrap().trunc().into()
        } else {
            ipnet::Ipv6Net::new(bits.into(), length).unwrap().trunc().into()
        };
        prop_assume!(four || !net.to_string().starts_with("::ffff:"));
        prop_assert_eq!(values::cidr_list(&net.to_string()).unwrap().0, vec![net]);
    }

    #[test]
    fn whatever_is_given_is_read_or_refused(text in "\\PC{0,40}") {
        let _ = (values::ports(&text), values::port_set(&text), values::cidrs(&text), values::interfaces(&text), values::id(&text));
        if let Ok(list) = values::interfaces(&text) {
            // Nothing that is let through means anything to a shell, to iptables or to nft.
            for name in list.0 {
                prop_assert!(name.as_str().chars().all(|each| each.is_ascii_alphanumeric() || "._-@+".contains(each)));
                prop_assert!(!name.as_str().starts_with('-'));
            }
        }
    }
}
