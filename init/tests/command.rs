//! The command as a container runs it: exit codes, what goes where, rights, time.

mod common;

use common::{Netns, back_ends, sh, weft_init, weft_init_ok};
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

const WEFT_INIT: &str = env!("CARGO_BIN_EXE_weft-init");

/// A pod as most are: one interface, both families.
fn pod() -> Netns {
    let pod = Netns::new();
    pod.enter();
    sh("ip link set lo up; ip link add eth0 type veth peer name eth1
        for i in 0 1; do ip link set eth$i addrgenmode none up; done
        ip addr add 10.1.1.2/24 dev eth0; ip addr add fd01::2/64 dev eth0 nodad
        ip route add default via 10.1.1.1; ip -6 route add default via fd01::1");
    pod
}

fn said(output: &std::process::Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn bad_flags_are_refused_before_anything_is_touched() {
    let _pod = pod();
    for (flag, value) in [
        ("--outbound-port", "0"),
        ("--inbound-port", "70000"),
        ("--exclude-outbound-cidrs", "10.0.0.0/40"),
        ("--outbound-cidrs", "10.0.0.0"),
        ("--exclude-outbound-cidrs", "::ffff:10.0.0.0/104"),
        ("--exclude-interfaces", "eth 0"),
        ("--exclude-inbound-ports", "80-"),
        ("--mode", "bridge"),
    ] {
        let output = weft_init(&[flag, value]);
        assert_eq!(output.status.code(), Some(2), "{flag} {value}");
        assert!(said(&output).contains(flag) && said(&output).contains(value), "{}", said(&output));
        assert!(output.stdout.is_empty());
    }
    assert_eq!(sh("nft list ruleset"), "");
    assert_eq!(sh("ip -6 addr show dev lo").matches("inet6").count(), 1);
}

#[test]
fn a_dry_run_prints_and_touches_nothing_and_needs_no_rights() {
    let _pod = pod();
    for backend in ["nft", "legacy", "nftables"] {
        let output = Command::new(WEFT_INIT)
            .args(["--dry-run", "--backend", backend, "--mode", "tproxy", "--dns-capture"])
            .uid(65534)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", said(&output));
        assert!(output.stderr.is_empty(), "{}", said(&output));
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("# IPv4: ") && text.contains("# IPv6: "), "{text}");
        assert_eq!(sh("nft list ruleset; cat /proc/thread-self/net/ip_tables_names"), "");
        // What was printed is what would be applied: it can be fed to the tools, and a run then finds it in place.
        let (v4, v6) = text.split_once("# IPv6").unwrap();
        let feed = |tool: &str, text: &str| {
            sh(&format!("{tool} <<'X'\n{}\nX", text.split_once('\n').unwrap().1));
        };
        match backend {
            "nft" => (feed("iptables-nft-restore --noflush", v4), feed("ip6tables-nft-restore --noflush", v6)),
            "legacy" => (feed("iptables-legacy-restore --noflush", v4), feed("ip6tables-legacy-restore --noflush", v6)),
            _ => (feed("nft -f -", v4), feed("nft -f -", v6)),
        };
        let found = weft_init_ok(&["--backend", backend, "--mode", "tproxy", "--dns-capture"]);
        assert!(found.contains("already redirected"), "{found}");
        let removal = String::from_utf8(weft_init(&["--dry-run", "--cleanup"]).stdout).unwrap();
        assert!(removal.contains("# IPv4: ") && removal.contains("# IPv6: "), "{removal}");
        assert!(weft_init_ok(&["--backend", backend, "--mode", "tproxy", "--dns-capture"]).contains("already"));
        weft_init_ok(&["--cleanup"]);
        assert_eq!(String::from_utf8(weft_init(&["--dry-run", "--cleanup"]).stdout).unwrap(), "");
        pod();
    }
}

#[test]
fn without_the_right_to_change_anything_it_says_which_is_missing() {
    let _pod = pod();
    let output = Command::new(WEFT_INIT).uid(1000).gid(1000).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = said(&output);
    assert!(text.contains("NET_ADMIN") && text.contains("uid 1000") && text.contains("runAsUser: 0"), "{text}");
    let output = Command::new(WEFT_INIT).arg("--cleanup").uid(1000).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("NET_ADMIN"));
}

/// Runs weft-init as root with no capability but these, as a container of which the others are dropped.
fn with_capabilities(capabilities: &str, arguments: &[&str]) -> std::process::Output {
    Command::new("setpriv")
        .args(["--no-new-privs", "--bounding-set", capabilities, "--inh-caps", capabilities, WEFT_INIT])
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn net_admin_alone_is_enough_but_for_legacy() {
    for backend in back_ends() {
        let _pod = pod();
        let arguments = ["--backend", backend.name(), "--mode", "tproxy", "--dns-capture"];
        let output = with_capabilities("-all,+net_admin", &arguments);
        if backend == weft_init::flags::Backend::Legacy {
            assert_eq!(output.status.code(), Some(1), "{}", said(&output));
            assert!(said(&output).contains("NET_RAW"), "{}", said(&output));
            let output = with_capabilities("-all,+net_admin,+net_raw", &arguments);
            assert!(output.status.success(), "{}", said(&output));
        } else {
            assert!(output.status.success(), "{}", said(&output));
            assert!(said(&output).contains("IPv4 proved") && said(&output).contains("IPv6 proved"));
        }
        let output = with_capabilities("-all,+net_admin,+net_raw", &["--cleanup"]);
        assert!(output.status.success(), "{}", said(&output));
    }
}

#[test]
fn in_a_user_namespace_of_the_pod_s_own() {
    // hostUsers: false. Root there has its rights over the pod's network alone.
    let script = format!(
        "ip link set lo up; ip link add eth0 type veth peer name eth1; ip link set eth0 up; ip link set eth1 up
         ip addr add 10.1.1.2/24 dev eth0; ip route add default via 10.1.1.1; {WEFT_INIT}; {WEFT_INIT}; {WEFT_INIT} --cleanup"
    );
    let output = Command::new("unshare").args(["--user", "--map-root-user", "--net", "sh", "-ec", &script]).output().unwrap();
    let text = said(&output);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("IPv4 proved") && text.contains("nothing changed"), "{text}");
}

#[test]
fn an_ipv6_that_is_demanded_but_switched_off_is_an_error() {
    let _pod = pod();
    std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
    let output = weft_init(&["--ipv6", "true"]);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("disable_ipv6") && said(&output).contains("--ipv6"), "{}", said(&output));
    weft_init_ok(&["--ipv6", "auto"]);
}

#[test]
fn the_default_rules_take_less_than_fifty_milliseconds() {
    for backend in back_ends() {
        let mut times: Vec<Duration> = (0..9)
            .map(|_| {
                let _pod = pod();
                let start = Instant::now();
                let output = weft_init(&["--backend", backend.name()]);
                let time = start.elapsed();
                assert!(output.status.success() && said(&output).contains("IPv6 proved"), "{}", said(&output));
                time
            })
            .collect();
        times.sort();
        eprintln!("{backend}: fastest {:?}, median {:?}, slowest {:?}", times[0], times[4], times[8]);
        // The machine may be busy with other things, but hardly nine times in a row.
        assert!(times[0] < Duration::from_millis(50), "{backend}: {times:?}");
    }
}

#[test]
fn the_manual_shows_the_default_rules_as_they_are() {
    let manual = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/redirection.md")).unwrap();
    let printed = String::from_utf8(weft_init(&["--dry-run"]).stdout).unwrap();
    let v4 = printed.split_once("# IPv6").unwrap().0;
    assert!(manual.contains(v4.trim_end()), "docs/redirection.md should show:\n{v4}");
    let help = String::from_utf8(weft_init(&["--help"]).stdout).unwrap();
    for flag in help.split_whitespace().filter(|word| word.starts_with("--") && word.len() > 6) {
        let flag = flag.trim_end_matches(|each: char| !each.is_ascii_alphanumeric());
        assert!(manual.contains(flag), "docs/redirection.md does not mention {flag}");
    }
}
