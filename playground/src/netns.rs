//! Network namespaces: one for the node, one for each pod, wired with a bridge that exists only inside the node's.
//!
//! The host's own namespace is never changed: links are born inside the node's namespace, and no interface of it leads
//! outside, so that nothing in a playground can reach the network of the machine, and two playgrounds can use the same
//! addresses. Pods have `/32` (`/128`) addresses and reach everything through the node. That way even the traffic between two pods
//! passes the node's address translation, in both directions, which Service addresses need.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpStream;

/// The node's own address: the API server is there, and pods with `hostNetwork`.
pub(crate) const NODE: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
/// Port of the API server on [`NODE`].
pub(crate) const API_PORT: u16 = 6443;
/// What the pods' packets go through.
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 1);
/// The same for IPv6.
pub(crate) const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x244, 0, 0, 0, 0, 0, 1);
/// The address of the name server.
pub(crate) const DNS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);

/// The addresses of the pod with this number (from 2).
pub(crate) fn pod_addresses(number: u16) -> (Ipv4Addr, Ipv6Addr) {
    let [high, low] = number.to_be_bytes();
    (Ipv4Addr::new(10, 244, high, low), Ipv6Addr::new(0xfd00, 0x244, 0, 0, 0, 0, 0, number))
}

/// Runs a command to its end; an error has its output.
pub(crate) fn run<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> anyhow::Result<String> {
    let mut command = Command::new(program);
    command.args(args);
    let out = command.output().with_context(|| format!("{program} can't be started; is it installed?"))?;
    if !out.status.success() {
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// `ip` with words.
pub(crate) fn ip(words: &str) -> anyhow::Result<String> {
    run("ip", words.split_whitespace())
}

/// Runs a function on a thread of its own that is in a namespace; sockets made there stay there.
pub(crate) fn within<T: Send + 'static>(netns: &str, work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    let path = format!("/run/netns/{netns}");
    let thread = std::thread::Builder::new().name("netns".into()).spawn(move || {
        let file = File::open(&path).map_err(|e| io::Error::new(e.kind(), format!("{path}: {e}")))?;
        setns(&file, CloneFlags::CLONE_NEWNET)?;
        work()
    })?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread inside the namespace panicked")))
}

/// Connects from inside a namespace.
pub(crate) async fn dial(netns: &str, to: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    let socket = within(netns, move || {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    })?;
    let socket = tokio::net::TcpSocket::from_std_stream(socket.into());
    match tokio::time::timeout(timeout, socket.connect(to)).await {
        Ok(stream) => stream,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("connect to {to}: timed out"))),
    }
}

/// Listens inside a namespace.
pub(crate) fn listen(netns: &str, on: SocketAddr) -> io::Result<std::net::TcpListener> {
    within(netns, move || {
        let listener = std::net::TcpListener::bind(on)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    })
}

fn sysctl(netns: &str, settings: &[(&'static str, &'static str)]) -> anyhow::Result<()> {
    let settings = settings.to_vec();
    within(netns, move || {
        for (key, value) in settings {
            let path = format!("/proc/sys/{key}");
            match std::fs::write(&path, value) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(io::Error::new(e.kind(), format!("{path}: {e}"))),
            }
        }
        Ok(())
    })
    .with_context(|| format!("settings of network namespace {netns}"))
}

/// Makes the node's namespace with the bridge and the addresses that it answers on.
pub(crate) fn create_node(netns: &str) -> anyhow::Result<()> {
    ip(&format!("netns add {netns}"))?;
    sysctl(
        netns,
        &[
            ("net/ipv4/ip_forward", "1"),
            ("net/ipv6/conf/all/forwarding", "1"),
            // Otherwise the bridge itself translates what is addressed to a Service, and drops what would have to go back
            // out of the port it came from: a pod couldn't reach itself.
            ("net/bridge/bridge-nf-call-iptables", "0"),
            ("net/bridge/bridge-nf-call-ip6tables", "0"),
            ("net/ipv4/conf/all/send_redirects", "0"),
            ("net/ipv4/conf/default/send_redirects", "0"),
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv4/conf/default/rp_filter", "0"),
            ("net/ipv4/ip_unprivileged_port_start", "0"),
        ],
    )?;
    ip(&format!("-n {netns} link set lo up"))?;
    // With an address of its own: a bridge without one takes the lowest of its ports', and pods would lose their gateway for
    // seconds whenever another pod comes or goes.
    ip(&format!("-n {netns} link add br0 address 02:00:0a:f4:00:01 type bridge"))?;
    ip(&format!("-n {netns} addr add {GATEWAY}/16 dev br0"))?;
    ip(&format!("-n {netns} addr add {NODE}/32 dev lo"))?;
    ip(&format!("-n {netns} addr add {DNS}/32 dev lo"))?;
    // Without IPv6 in the kernel pods have IPv4 only.
    let _ = ip(&format!("-6 -n {netns} addr add {GATEWAY6}/64 dev br0 nodad"));
    ip(&format!("-n {netns} link set br0 up"))?;
    // Locally made packets for a Service are routed before they are translated.
    ip(&format!("-n {netns} route add 10.96.0.0/16 dev br0 src {GATEWAY}"))?;
    sysctl(netns, &[("net/ipv4/conf/br0/send_redirects", "0"), ("net/ipv4/conf/br0/rp_filter", "0")])?;
    Ok(())
}

/// Makes a pod's namespace. Answers its addresses: IPv4, and IPv6 where the kernel has it.
pub(crate) fn create_pod(node: &str, netns: &str, number: u16) -> anyhow::Result<Vec<IpAddr>> {
    let (v4, v6) = pod_addresses(number);
    ip(&format!("netns add {netns}"))?;
    sysctl(netns, &[("net/ipv4/ip_unprivileged_port_start", "0"), ("net/ipv4/ping_group_range", "0 2147483647")])?;
    let link = format!("v{number}");
    ip(&format!("-n {node} link add {link} type veth peer name eth0 netns {netns}"))?;
    ip(&format!("-n {node} link set {link} master br0 up"))?;
    ip(&format!("-n {netns} link set lo up"))?;
    ip(&format!("-n {netns} link set eth0 up"))?;
    ip(&format!("-n {netns} addr add {v4}/32 dev eth0"))?;
    ip(&format!("-n {netns} route add {GATEWAY} dev eth0 scope link"))?;
    ip(&format!("-n {netns} route add default via {GATEWAY} dev eth0"))?;
    let mut addresses = vec![IpAddr::V4(v4)];
    let second = ip(&format!("-6 -n {netns} addr add {v6}/128 dev eth0 nodad"))
        .and_then(|_| ip(&format!("-6 -n {netns} route add {GATEWAY6} dev eth0")))
        .and_then(|_| ip(&format!("-6 -n {netns} route add default via {GATEWAY6} dev eth0")));
    if second.is_ok() {
        addresses.push(IpAddr::V6(v6));
    }
    Ok(addresses)
}

/// Kills whatever runs in a namespace and removes it. It need not be there.
pub(crate) fn destroy(netns: &str) {
    kill_all(netns);
    let _ = ip(&format!("netns del {netns}"));
}

/// SIGKILL to every process in a namespace, until there is none (at most two seconds).
pub(crate) fn kill_all(netns: &str) {
    for _ in 0..40 {
        let pids: Vec<i32> =
            ip(&format!("netns pids {netns}")).unwrap_or_default().lines().filter_map(|l| l.trim().parse().ok()).collect();
        if pids.is_empty() {
            return;
        }
        for pid in pids {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The namespaces whose name starts like this.
pub(crate) fn names(prefix: &str) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/run/netns") else { return Vec::new() };
    entries.filter_map(|e| e.ok()?.file_name().into_string().ok()).filter(|n| n.starts_with(prefix)).collect()
}
