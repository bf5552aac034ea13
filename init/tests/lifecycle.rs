//! What happens to rules over time: run again, changed, killed half-way, mixed with the rules of others, moved between
//! back ends, removed; and what never happens meanwhile: a connection that passes by the proxy.

mod common;

use common::{APP, Flow, Landed, Netns, PROXY, World, back_ends, choice, sh, weft_init, weft_init_ok};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use weft_init::flags::{Backend, Mode, Settings, values};

const WEFT_INIT: &str = env!("CARGO_BIN_EXE_weft-init");

/// A pod with an address of each family, as far as rules without traffic need one. The calling thread is in it.
fn small_pod() -> Netns {
    let pod = Netns::new();
    pod.enter();
    sh("ip link set lo up; ip link add eth0 type veth peer name eth1
        for i in 0 1; do ip link set eth$i addrgenmode none up; done
        ip addr add 10.1.1.2/24 dev eth0; ip addr add fd01::2/64 dev eth0 nodad
        ip route add default via 10.1.1.1; ip -6 route add default via fd01::1");
    pod
}

/// Everything that netfilter and routing hold, but for counters and dates; each line of iptables begins with the tool's name.
fn everything() -> String {
    sh("for tables in iptables-nft ip6tables-nft iptables-legacy ip6tables-legacy; do
          $tables-save 2>/dev/null | sed \"s/\\[.*\\]//; /^#/d; s/^/$tables: /\"
        done
        nft list tables | grep -Ev ' (nat|mangle|raw|filter)$' | while read -r table; do nft -s list $table; done
        ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; ip -o addr show dev lo")
}

#[test]
fn a_second_run_changes_nothing_and_says_so() {
    for backend in back_ends() {
        let _pod = small_pod();
        for mode in ["redirect", "tproxy"] {
            let arguments = [
                "--backend",
                backend.name(),
                "--mode",
                mode,
                "--dns-capture",
                "--exclude-outbound-ports",
                "1,3,5,7,9,11,13,15,17,19,21,23,25,27,29,31-40",
                "--exclude-outbound-cidrs",
                "10.0.0.0/8,0.0.0.0/1,fd00::/8",
                "--exclude-interfaces",
                "tun0,k6t+",
                "--inbound-ports",
                "80,443,8000-8100",
            ];
            weft_init_ok(&arguments);
            let before = everything();
            let monitor = Monitor::start();
            let said = weft_init_ok(&arguments);
            assert!(said.contains("already redirected") && said.contains("nothing changed"), "{said}");
            assert_eq!(monitor.seen(), "", "the second run with {backend} touched nf_tables");
            assert_eq!(everything(), before);
        }
    }
}

/// Watches for transactions of nf_tables in the namespace of the calling thread.
struct Monitor(std::process::Child);

impl Monitor {
    fn start() -> Self {
        let child = Command::new("nft").arg("monitor").stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(300));
        Self(child)
    }

    fn seen(mut self) -> String {
        std::thread::sleep(Duration::from_millis(200));
        self.0.kill().unwrap();
        String::from_utf8(self.0.wait_with_output().unwrap().stdout).unwrap()
    }
}

#[test]
fn a_monitor_would_see_a_change() {
    let _pod = small_pod();
    weft_init_ok(&["--backend", "nft"]);
    let monitor = Monitor::start();
    weft_init_ok(&["--backend", "nft", "--exclude-outbound-ports", "22"]);
    assert!(monitor.seen().contains("generation"));
}

#[test]
fn a_tampered_rule_is_set_right() {
    for backend in back_ends() {
        let _pod = small_pod();
        let arguments = ["--backend", backend.name()];
        weft_init_ok(&arguments);
        let intact = everything();
        let tamperings: &[&str] = match backend {
            Backend::Nft => &[
                "iptables-nft -t nat -I WEFT_OUTPUT 1 -j RETURN",
                "iptables-nft -t nat -D OUTPUT -j WEFT_OUTPUT",
                "ip6tables-nft -t nat -R WEFT_INBOUND 2 -p tcp -j REDIRECT --to-ports 15007",
                "iptables-nft -t nat -A OUTPUT -j WEFT_OUTPUT",
                "iptables-nft -t nat -N WEFT_STRAY; iptables-nft -t nat -A PREROUTING -j WEFT_STRAY",
                "iptables-nft -t mangle -F WEFT_PREROUTING",
                "ip6tables-nft -t mangle -F; ip6tables-nft -t mangle -X",
            ],
            Backend::Legacy => &[
                "iptables-legacy -t nat -I WEFT_OUTPUT 1 -j RETURN",
                "ip6tables-legacy -t nat -D OUTPUT -j WEFT_OUTPUT",
                "iptables-legacy -t nat -F; iptables-legacy -t nat -X",
            ],
            Backend::Nftables => {
                &["nft insert rule ip weft nat_output return", "nft flush chain ip6 weft nat_output", "nft delete table ip weft"]
            }
        };
        for tampering in tamperings {
            sh(tampering);
            assert_ne!(everything(), intact, "{tampering}");
            let said = weft_init_ok(&arguments);
            assert!(!said.contains("already"), "{tampering}: {said}");
            assert_eq!(sorted(&everything()), sorted(&intact), "{tampering}");
        }
    }
}

fn sorted(text: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    lines
}

#[test]
fn the_rules_of_others_stay_and_cleanup_removes_exactly_ours() {
    let _pod = small_pod();
    sh("for tables in iptables-nft ip6tables-nft iptables-legacy ip6tables-legacy; do
          $tables -t nat -N OTHERS; $tables -t nat -A OTHERS -p tcp --dport 1 -j RETURN
          $tables -t nat -A OUTPUT -p tcp --dport 2 -j OTHERS
          $tables -t nat -A PREROUTING -m comment --comment 'say -j WEFT_OUTPUT' -j RETURN
          $tables -t mangle -A PREROUTING -p udp -j ACCEPT
          $tables -t raw -A OUTPUT -p udp --dport 3 -j ACCEPT
          $tables -A INPUT -p tcp --dport 4 -j DROP
        done
        nft add table inet others; nft add chain inet others c '{ type filter hook input priority 0; }'
        nft add rule inet others c tcp dport 5 drop
        ip rule add fwmark 7 lookup 133; ip route add local 10.9.9.9/32 dev lo table 133");
    let before = everything();
    for backend in back_ends() {
        for arguments in [
            &["--mode", "redirect", "--dns-capture"][..],
            &["--mode", "tproxy", "--dns-capture"],
            &["--mode", "redirect", "--exclude-inbound-ports", "22"],
        ] {
            weft_init_ok(&[&["--backend", backend.name()], arguments].concat());
            let with = everything();
            for line in before.lines().filter(|line| !line.trim().is_empty()) {
                assert!(with.contains(line), "{backend} {arguments:?} lost: {line}");
            }
        }
        weft_init_ok(&["--backend", backend.name(), "--mode", "tproxy", "--dns-capture"]);
        weft_init_ok(&["--cleanup"]);
        assert_eq!(sorted(&everything()), sorted(&before), "{backend}");
        assert!(weft_init_ok(&["--cleanup"]).contains("no redirection to remove"));
    }
}

#[test]
fn rules_move_to_another_back_end_and_auto_stays_where_they_are() {
    let offered = back_ends();
    let _pod = small_pod();
    for backend in offered.iter().chain(&offered) {
        weft_init_ok(&["--backend", backend.name(), "--mode", "tproxy"]);
        let said = weft_init_ok(&["--mode", "redirect"]);
        assert!(said.contains(&format!("back end {backend}")), "auto left {backend}: {said}");
        let everything = everything();
        let homes = [
            everything.contains("iptables-nft: :WEFT_OUTPUT"),
            everything.contains("table ip weft"),
            everything.contains("iptables-legacy: :WEFT_OUTPUT"),
        ];
        assert_eq!(homes.iter().filter(|home| **home).count(), 1, "{everything}");
        assert!(!everything.contains("fwmark 0x539"), "{everything}");
    }
}

#[test]
fn a_run_killed_at_any_moment_is_healed_by_the_next() {
    for backend in back_ends() {
        let world = World::new();
        let settings = [
            ["--mode", "redirect", "--exclude-outbound-ports", "22", "--dns-capture=false"],
            ["--mode", "tproxy", "--exclude-outbound-ports", "23,24", "--dns-capture=true"],
        ];
        for round in 0..24_u32 {
            let mut child = Command::new(WEFT_INIT)
                .args(["--skip-verify", "--backend", backend.name()])
                .args(settings[round as usize % 2])
                .process_group(0)
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            std::thread::sleep(Duration::from_micros(u64::from(round) * 1300 + 500));
            // The tools that it runs as well, as when a container is killed.
            let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
            child.wait().unwrap();
            if round % 8 == 7 {
                let arguments = [&["--skip-verify", "--backend", backend.name()], &settings[0][..]].concat();
                weft_init_ok(&arguments);
                assert!(weft_init_ok(&arguments).contains("nothing changed"));
                for (far, pod) in [("203.0.113.9", "10.66.0.2"), ("2001:db8::9", "fd66::2")] {
                    let (far, pod): (IpAddr, IpAddr) = (far.parse().unwrap(), pod.parse().unwrap());
                    assert_eq!(world.open(&Flow::out(APP, far, 80)), Landed::Proxy(15001));
                    assert_eq!(world.open(&Flow::out(APP, far, 22)), Landed::Outside);
                    assert_eq!(world.open(&Flow::inbound(pod, 80)), Landed::Proxy(15006));
                    assert_eq!(world.open(&Flow::out(PROXY, far, 80)), Landed::Outside);
                }
            }
        }
        weft_init_ok(&["--cleanup"]);
        assert!(!everything().to_lowercase().contains("weft"), "{}", everything());
    }
}

#[test]
fn a_family_that_fails_half_way_is_an_error_and_the_next_run_completes_it() {
    let _pod = small_pod();
    let fake = tempfile::tempdir().unwrap();
    let tool = fake.path().join("ip6tables-nft-restore");
    std::fs::write(
        &tool,
        "#!/bin/sh\necho \"Warning: Extension owner revision 0 not supported, missing kernel module?\" >&2\nexit 4\n",
    )
    .unwrap();
    sh(&format!("chmod +x {}", tool.display()));
    let path = format!("{}:{}", fake.path().display(), std::env::var("PATH").unwrap());
    let run = |arguments: &[&str]| Command::new(WEFT_INIT).args(arguments).env("PATH", &path).output().unwrap();

    let output = run(&["--backend", "nft"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("IPv6") && said.contains("modprobe xt_owner"), "{said}");
    assert!(!everything().contains("WEFT_"), "a failed first attempt left rules behind");

    let said = weft_init_ok(&["--backend", "nft"]);
    assert!(said.contains("IPv4 and IPv6 redirected"), "{said}");

    // With auto, the next back end that works takes its place, for both families.
    weft_init_ok(&["--cleanup"]);
    let offered = back_ends();
    small_pod();
    let output = run(&[]);
    let said = String::from_utf8(output.stderr).unwrap();
    if offered.len() > 1 {
        assert!(output.status.success(), "{said}");
        assert!(said.contains(&format!("IPv4 and IPv6 redirected through the back end {}", offered[1])), "{said}");
        assert!(!everything().contains("WEFT_OUTPUT"), "{}", everything());
    }
}

#[test]
fn without_any_back_end_each_one_s_reason_is_given() {
    let _pod = small_pod();
    let output = Command::new(WEFT_INIT).env("PATH", "/nonexistent").output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    for tool in ["iptables-nft-restore", "'nft'", "iptables-legacy-restore"] {
        assert!(said.contains(tool), "{said}");
    }
}

#[test]
fn a_pod_without_ipv6_gets_ipv4_rules_alone() {
    for backend in back_ends() {
        let _pod = small_pod();
        // As on a node booted with ipv6.disable=1, as far as a namespace can tell.
        std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
        let said = weft_init_ok(&["--backend", backend.name()]);
        assert!(said.contains("IPv4 redirected") && !said.contains("IPv6"), "{said}");
        let everything = everything();
        assert!(!everything.contains("ip6tables") && !everything.contains("table ip6"), "{everything}");
        assert!(weft_init_ok(&["--backend", backend.name()]).contains("nothing changed"));
        weft_init_ok(&["--cleanup"]);
    }
}

#[test]
fn ipv6_false_takes_earlier_ipv6_rules_away() {
    for backend in back_ends() {
        let _pod = small_pod();
        weft_init_ok(&["--backend", backend.name()]);
        assert!(everything().contains("::6/128"));
        let said = weft_init_ok(&["--backend", backend.name(), "--ipv6", "false"]);
        assert!(said.contains("IPv4 redirected"), "{said}");
        let script = match backend {
            Backend::Legacy => "ip6tables-legacy-save",
            Backend::Nft => "ip6tables-nft-save",
            Backend::Nftables => "nft list tables ip6",
        };
        assert!(!sh(script).to_lowercase().contains("weft"));
        assert!(!everything().contains("::6/128"));
    }
}

#[test]
fn a_read_only_root_without_a_lock_file_is_no_obstacle() {
    let _pod = small_pod();
    for backend in back_ends() {
        let script = format!(
            "mount --make-rprivate /; mount --bind / /mnt; mount -o remount,bind,ro /mnt
             mount -t proc proc /mnt/proc; mount --bind /dev /mnt/dev
             chroot /mnt sh -c 'touch /run/x 2>/dev/null && exit 9; PATH=/usr/sbin:/usr/bin:/sbin:/bin; {0} --backend {1}'",
            WEFT_INIT,
            backend.name()
        );
        let output = Command::new("unshare").args(["--mount", "--pid", "--fork", "sh", "-ec", &script]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{backend}: {said}");
        assert!(said.contains("IPv4 and IPv6 redirected"), "{said}");
        weft_init_ok(&["--cleanup"]);
    }
}

/// Counts who gets connections: accepts them on a listener until told to stop.
fn accept_all(listener: &std::net::TcpListener, counter: &AtomicUsize, stop: &AtomicBool) {
    listener.set_nonblocking(true).unwrap();
    while !stop.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((stream, _)) => {
                counter.fetch_add(1, Ordering::Relaxed);
                drop(stream);
            }
            Err(_) => std::thread::sleep(Duration::from_micros(200)),
        }
    }
}

/// Opens connections without a pause. Whether one fails does not matter here, only where it lands.
fn hammer(target: SocketAddr, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let socket = socket2::Socket::new(socket2::Domain::for_address(target), socket2::Type::STREAM, None).unwrap();
        let _ = socket.set_linger(Some(Duration::ZERO));
        let _ = socket.connect_timeout(&target.into(), Duration::from_millis(100));
    }
}

#[test]
fn no_connection_passes_by_while_settings_change() {
    // Nobody of the app listens in the world but us: on port 80 of the pod (the app), outside, and as the proxy.
    let world = World::with_listeners(&[], &[]);
    let listen = |address: &str| std::net::TcpListener::bind(address).unwrap();
    let tproxy = |family: socket2::Domain, address: &str| {
        let socket = socket2::Socket::new(family, socket2::Type::STREAM, None).unwrap();
        if family == socket2::Domain::IPV6 {
            socket.set_only_v6(true).unwrap();
        }
        common::transparent(&socket);
        socket.bind(&address.parse::<SocketAddr>().unwrap().into()).unwrap();
        socket.listen(1024).unwrap();
        std::net::TcpListener::from(socket)
    };
    let v6 = |address: &str| {
        let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None).unwrap();
        socket.set_only_v6(true).unwrap();
        socket.bind(&address.parse::<SocketAddr>().unwrap().into()).unwrap();
        socket.listen(1024).unwrap();
        std::net::TcpListener::from(socket)
    };
    let proxy = [
        listen("0.0.0.0:15001"),
        v6("[::]:15001"),
        tproxy(socket2::Domain::IPV4, "0.0.0.0:15006"),
        tproxy(socket2::Domain::IPV6, "[::]:15006"),
    ];
    let direct = [listen("0.0.0.0:80"), v6("[::]:80")];
    let (taken, passed, stop) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicBool::new(false));
    let offered = back_ends();
    world.pod.enter();
    weft_init::apply(&Settings::default(), choice(offered[0])).unwrap();
    let mut changes = 0;
    std::thread::scope(|scope| {
        for listener in &proxy {
            scope.spawn(|| accept_all(listener, &taken, &stop));
        }
        for listener in &direct {
            scope.spawn(|| accept_all(listener, &passed, &stop));
        }
        for target in ["203.0.113.9:80", "[2001:db8::9]:80"] {
            let (world, stop, target) = (&world, &stop, target.parse().unwrap());
            scope.spawn(move || {
                world.pod.enter();
                hammer(target, stop);
            });
        }
        for target in ["10.66.0.2:80", "[fd66::2]:80"] {
            let (world, stop, target) = (&world, &stop, target.parse().unwrap());
            scope.spawn(move || {
                world.outside.enter();
                hammer(target, stop);
            });
        }
        let variants: Vec<Settings> = vec![
            Settings { exclude_outbound_ports: values::port_set("22,443").unwrap(), ..Settings::default() },
            Settings { dns_capture: true, exclude_inbound_ports: values::port_set("9090").unwrap(), ..Settings::default() },
            Settings { mode: Mode::Tproxy, ..Settings::default() },
            Settings { mode: Mode::Tproxy, dns_capture: true, drop_invalid: false, ..Settings::default() },
            Settings { outbound_ports: values::port_set("80").unwrap(), drop_invalid: false, ..Settings::default() },
        ];
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            // Each change twice in each back end, and from each back end to the next.
            for backend in &offered {
                for settings in variants.iter().cycle().take(2 * variants.len() + 1) {
                    weft_init::apply(settings, choice(*backend)).unwrap();
                    changes += 1;
                }
            }
        }));
        stop.store(true, Ordering::Relaxed);
        outcome.unwrap();
    });
    let (taken, passed) = (taken.into_inner(), passed.into_inner());
    eprintln!("{changes} changes, {taken} connections taken by the proxy, {passed} passed by");
    assert_eq!(passed, 0, "connections reached the app directly");
    assert!(!world.anything_outside(), "connections left the pod directly");
    assert!(changes > 10 && taken > 500, "{changes} changes, {taken} connections: too few to mean anything");
}

#[test]
fn failing_proof_fails_the_run() {
    for backend in back_ends() {
        let _pod = small_pod();
        // Somebody's rule sees the connection before the address is rewritten.
        sh("iptables-nft -t raw -A OUTPUT -p tcp -d 192.0.2.1 -j CT --notrack");
        let output = weft_init(&["--backend", backend.name()]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("192.0.2.1:15002") && said.contains("15001"), "{said}");
        weft_init_ok(&["--backend", backend.name(), "--skip-verify"]);
    }
}

#[test]
fn the_proof_copes_with_a_proxy_that_listens_already() {
    let _pod = small_pod();
    let _proxy = std::net::TcpListener::bind("0.0.0.0:15001").unwrap();
    let said = weft_init_ok(&["--ipv6", "false"]);
    assert!(said.contains("proved in part"), "{said}");
}

#[test]
fn a_table_that_iptables_cannot_read_is_left_to_its_owner() {
    if !back_ends().contains(&Backend::Nftables) {
        return;
    }
    let _pod = small_pod();
    sh("nft -f - <<X
table ip nat {
    chain OUTPUT {
        type nat hook output priority -100
        tcp dport vmap { 81 : accept, 82 : drop }
        numgen random mod 2 0 counter
    }
}
X");
    let before = sh("nft -s list table ip nat");
    let output = weft_init(&["--backend", "nft"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("the table nat") && said.contains("--backend nftables"), "{said}");
    let said = weft_init_ok(&[]);
    assert!(said.contains("back end nftables") && said.contains("IPv4 proved"), "{said}");
    assert!(weft_init_ok(&[]).contains("nothing changed"));
    weft_init_ok(&["--cleanup"]);
    assert_eq!(sh("nft -s list table ip nat"), before);
    assert!(!everything().to_lowercase().contains("weft"));
}

#[test]
fn a_pod_with_ipv6_alone() {
    for backend in back_ends() {
        let _pod = small_pod();
        sh("ip addr flush dev eth0; ip addr add fd01::2/64 dev eth0 nodad; ip -6 route replace default via fd01::1");
        let said = weft_init_ok(&["--backend", backend.name()]);
        assert!(said.contains("IPv6 proved") && said.contains("IPv4 not proved: the pod has no IPv4 route"), "{said}");
    }
}

#[test]
fn a_link_s_own_ipv6_is_redirected_if_the_kernel_can_and_no_error_if_not() {
    let pod = || {
        let pod = small_pod();
        sh("ip addr flush dev eth0; ip addr add 10.1.1.2/24 dev eth0; ip route replace default via 10.1.1.1
            ip addr add fe80::2/64 dev eth0 nodad");
        pod
    };
    let _pod = pod();
    assert!(weft_init_ok(&["--backend", "nft"]).contains("IPv4 and IPv6 redirected"));
    let _pod = pod();
    let fake = tempfile::tempdir().unwrap();
    let tool = fake.path().join("ip6tables-nft-restore");
    std::fs::write(&tool, "#!/bin/sh\necho 'CHAIN_ADD failed (No such file or directory)' >&2\nexit 4\n").unwrap();
    sh(&format!("chmod +x {}", tool.display()));
    let path = format!("{}:{}", fake.path().display(), std::env::var("PATH").unwrap());
    let output = Command::new(WEFT_INIT).args(["--backend", "nft"]).env("PATH", path).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("IPv6 is not redirected") && said.contains("IPv4 redirected"), "{said}");
}
