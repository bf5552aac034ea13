//! A pod and the world around it, as two network namespaces of the kernel that belong to the test alone: they have no name,
//! and are gone when their last descriptor is closed.
//!
//! ```text
//!   pod                                            outside
//!   lo                                             every TCP connection and UDP datagram that arrives,
//!   eth0 10.66.0.2  fd66::2  ───────────────────── whatever its destination, ends at one listener,
//!   eth1 10.67.0.2  fd67::2  ───────────────────── which asks the kernel for that destination
//! ```
#![allow(dead_code, unreachable_pub)]

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use socket2::{Domain, SockAddr, Socket, Type};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;
use weft_init::flags::{Backend, BackendChoice, Settings};
use weft_init::rules::{Connection, Family, Hook, Landing, Protocol};

pub const POD_V4: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 66, 0, 2), Ipv4Addr::new(10, 67, 0, 2)];
pub const POD_V6: [Ipv6Addr; 2] = [Ipv6Addr::new(0xfd66, 0, 0, 0, 0, 0, 0, 2), Ipv6Addr::new(0xfd67, 0, 0, 0, 0, 0, 0, 2)];
/// Ports on which the app in the pod listens.
pub const APP_PORTS: [u16; 10] = [22, 53, 80, 443, 3000, 8080, 8081, 8443, 9090, 15021];
/// Everything else in the pod that listens.
pub const PROXY_PORTS: [u16; 4] = [15001, 15006, 15020, 15053];
const OUTSIDE_PORT: u16 = 4001;
pub const APP: (u32, u32) = (1000, 1000);
pub const PROXY: (u32, u32) = (1337, 1337);

/// A network namespace.
pub struct Netns(File);

impl Netns {
    pub fn new() -> Self {
        std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
            Self(File::open("/proc/thread-self/ns/net").unwrap())
        })
        .join()
        .unwrap()
    }

    /// Moves the calling thread into it.
    pub fn enter(&self) {
        setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
    }

    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

/// Runs a shell script in the namespace of the calling thread.
pub fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs weft-init in the namespace of the calling thread.
pub fn weft_init(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_weft-init")).args(arguments).output().unwrap()
}

/// Runs weft-init, which must succeed and say nothing on standard output; returns what it said on standard error.
pub fn weft_init_ok(arguments: &[&str]) -> String {
    let output = weft_init(arguments);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{arguments:?}: {said}");
    assert!(output.stdout.is_empty(), "{arguments:?} wrote to standard output");
    said
}

/// The back ends that this kernel and machine offer, found by applying something in a fresh namespace.
pub fn back_ends() -> Vec<Backend> {
    let offered: Vec<Backend> = Backend::ALL
        .into_iter()
        .filter(|backend| {
            std::thread::scope(|scope| {
                scope
                    .spawn(|| {
                        Netns::new().enter();
                        sh("ip link set lo up");
                        weft_init::apply(&Settings::default(), choice(*backend))
                            .inspect_err(|failure| eprintln!("not offered: {failure}"))
                            .is_ok()
                    })
                    .join()
                    .unwrap()
            })
        })
        .collect();
    assert!(!offered.is_empty(), "this kernel offers no back end at all");
    eprintln!("back ends offered here: {offered:?}");
    offered
}

pub fn choice(backend: Backend) -> BackendChoice {
    match backend {
        Backend::Nft => BackendChoice::Nft,
        Backend::Nftables => BackendChoice::Nftables,
        Backend::Legacy => BackendChoice::Legacy,
    }
}

/// Makes the sockets that `make` makes belong to a user and a group, as if a process of theirs had made them.
pub fn owned_by<T>(owner: (u32, u32), make: impl FnOnce() -> T) -> T {
    let (uid, gid) = (setfsuid(Uid::from_raw(owner.0)), setfsgid(Gid::from_raw(owner.1)));
    let made = make();
    setfsuid(uid);
    setfsgid(gid);
    made
}

/// Where something ended up, as seen by whoever got it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landed {
    /// At the app, on this port.
    App(u16),
    /// At the proxy, on this port.
    Proxy(u16),
    /// Outside of the pod.
    Outside,
    /// Nowhere.
    Nowhere,
}

struct Listener {
    socket: Socket,
    landed: Landed,
    family: Family,
    datagrams: bool,
}

/// Something to open: a connection or an exchange of datagrams.
#[derive(Clone, Debug)]
pub struct Flow {
    pub hook: Hook,
    pub protocol: Protocol,
    pub source: Option<IpAddr>,
    pub source_port: Option<u16>,
    pub destination: SocketAddr,
    pub owner: (u32, u32),
    /// Packet mark of the client's socket.
    pub mark: u32,
}

impl Flow {
    fn new(hook: Hook, protocol: Protocol, owner: (u32, u32), ip: IpAddr, port: u16) -> Self {
        let destination = SocketAddr::new(ip, port);
        Self { hook, protocol, source: None, source_port: None, destination, owner, mark: 0 }
    }

    /// A process of the pod opens it.
    pub fn out(owner: (u32, u32), ip: impl Into<IpAddr>, port: u16) -> Self {
        Self::new(Hook::Output, Protocol::Tcp, owner, ip.into(), port)
    }

    /// Somebody outside opens it.
    pub fn inbound(ip: impl Into<IpAddr>, port: u16) -> Self {
        Self::new(Hook::Prerouting, Protocol::Tcp, (0, 0), ip.into(), port)
    }

    pub fn udp(mut self) -> Self {
        self.protocol = Protocol::Udp;
        self
    }

    pub fn source(mut self, source: impl Into<IpAddr>) -> Self {
        self.source = Some(source.into());
        self
    }

    pub fn source_port(mut self, port: u16) -> Self {
        self.source_port = Some(port);
        self
    }

    /// The interface of the pod that it goes through.
    pub fn interface(&self) -> &'static str {
        let ip = self.destination.ip();
        let pod = POD_V4.iter().any(|own| *own == ip) || POD_V6.iter().any(|own| *own == ip);
        let second = match ip {
            IpAddr::V4(v4) => v4.octets()[..3] == [10, 67, 0],
            IpAddr::V6(v6) => v6.segments()[0] == 0xfd67,
        };
        match self.hook {
            Hook::Output if pod || ip.is_loopback() => "lo",
            _ if second => "eth1",
            _ => "eth0",
        }
    }

    /// The source that the kernel will choose.
    fn likely_source(&self) -> IpAddr {
        let second = usize::from(self.interface() == "eth1");
        let ip = self.destination.ip();
        self.source.unwrap_or(match (self.interface(), ip.is_ipv4()) {
            ("lo", _) => ip,
            (_, true) => POD_V4[second].into(),
            (_, false) => POD_V6[second].into(),
        })
    }

    /// The question for the model.
    pub fn connection(&self) -> Connection {
        Connection {
            hook: self.hook,
            protocol: self.protocol,
            source: SocketAddr::new(self.likely_source(), self.source_port.unwrap_or(40000)),
            destination: self.destination,
            interface: self.interface().to_owned(),
            owner: (self.hook == Hook::Output).then_some(self.owner),
        }
    }

    /// What is to be seen if the model says so.
    pub fn expected(&self, landing: Landing) -> Landed {
        match landing {
            Landing::Proxy(port) => Landed::Proxy(port),
            Landing::Dropped => Landed::Nowhere,
            Landing::Direct if self.hook == Hook::Output && self.interface() != "lo" => Landed::Outside,
            Landing::Direct if PROXY_PORTS.contains(&self.destination.port()) => Landed::Proxy(self.destination.port()),
            Landing::Direct => Landed::App(self.destination.port()),
        }
    }
}

/// The pod, what listens in it, and the outside.
pub struct World {
    pub pod: Netns,
    pub outside: Netns,
    listeners: Vec<Listener>,
    next_port: AtomicU16,
}

impl World {
    /// Sets everything up; the calling thread is in the pod afterwards.
    pub fn new() -> Self {
        Self::with_listeners(&APP_PORTS, &PROXY_PORTS)
    }

    pub fn with_listeners(app: &[u16], proxy: &[u16]) -> Self {
        let (pod, outside) = (Netns::new(), Netns::new());
        pod.enter();
        let path = outside.path();
        sh(&format!(
            "ip link set lo up
             for i in 0 1; do
               ip link add eth$i type veth peer name world$i
               ip link set world$i netns {path}
               ip addr add 10.6$((6+i)).0.2/24 dev eth$i
               ip addr add fd6$((6+i))::2/64 dev eth$i nodad
               ip link set eth$i up
             done"
        ));
        outside.enter();
        sh("ip link set lo up
            for i in 0 1; do
              ip addr add 10.6$((6+i)).0.1/24 dev world$i
              ip addr add fd6$((6+i))::1/64 dev world$i nodad
              ip link set world$i up
            done
            for tables in iptables-nft ip6tables-nft; do
              for protocol in tcp udp; do
                $tables -t nat -A PREROUTING -p $protocol -j REDIRECT --to-ports 4001
              done
            done");
        let mut listeners = Vec::new();
        listen_on(&mut listeners, &[OUTSIDE_PORT], |_| Landed::Outside);
        pod.enter();
        sh("ip route add default via 10.66.0.1; ip -6 route add default via fd66::1");
        listen_on(&mut listeners, app, Landed::App);
        owned_by(PROXY, || listen_on(&mut listeners, proxy, Landed::Proxy));
        Self { pod, outside, listeners, next_port: AtomicU16::new(0) }
    }

    /// A source port that has not been used: a datagram's conntrack entry lives for half a minute, and would answer for the
    /// rules of then.
    fn fresh_port(&self) -> u16 {
        20000 + self.next_port.fetch_add(1, Ordering::Relaxed) % 40000
    }

    /// Opens a flow and sees where it ends up. What was asked for must be what the receiver is told was asked for, and the
    /// exchange must work both ways. The calling thread is in the pod afterwards.
    pub fn open(&self, flow: &Flow) -> Landed {
        match flow.hook {
            Hook::Output => self.pod.enter(),
            Hook::Prerouting => self.outside.enter(),
        }
        let landed = match flow.protocol {
            Protocol::Tcp => self.open_tcp(flow),
            Protocol::Udp => self.open_udp(flow),
        };
        self.pod.enter();
        landed
    }

    /// A client's socket, bound.
    fn client(&self, flow: &Flow, kind: Type) -> Socket {
        let any: IpAddr = match flow.destination.ip() {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = owned_by(flow.owner, || Socket::new(Domain::for_address(flow.destination), kind, None).unwrap());
        if flow.mark != 0 {
            socket.set_mark(flow.mark).unwrap();
            transparent(&socket);
        }
        socket.set_reuse_address(true).unwrap();
        let port = flow.source_port.unwrap_or_else(|| self.fresh_port());
        socket
            .bind(&SocketAddr::new(flow.source.unwrap_or(any), port).into())
            .unwrap_or_else(|error| panic!("{flow:?}: {error}"));
        socket
    }

    fn open_tcp(&self, flow: &Flow) -> Landed {
        let client = self.client(flow, Type::STREAM);
        // No connection of the tests may linger and be mistaken for another.
        client.set_linger(Some(Duration::ZERO)).unwrap();
        if client.connect_timeout(&flow.destination.into(), Duration::from_millis(700)).is_err() {
            return Landed::Nowhere;
        }
        let own = client.local_addr().unwrap().as_socket().unwrap();
        let Some(listener) = self.ready(flow, Duration::from_secs(2)) else {
            return Landed::Nowhere;
        };
        let (server, peer) = listener.socket.accept().unwrap();
        server.set_linger(Some(Duration::ZERO)).unwrap();
        assert_eq!(peer.as_socket(), Some(own), "{flow:?} arrived with another source");
        assert_eq!(original(&server, listener), flow.destination, "{flow:?} arrived as for another destination");
        let (mut client, mut server): (std::net::TcpStream, std::net::TcpStream) = (client.into(), server.into());
        exchange(&mut client, &mut server);
        exchange(&mut server, &mut client);
        listener.landed
    }

    fn open_udp(&self, flow: &Flow) -> Landed {
        let client = self.client(flow, Type::DGRAM);
        client.connect(&flow.destination.into()).unwrap();
        let own = client.local_addr().unwrap().as_socket().unwrap();
        client.send(&own.port().to_be_bytes()).unwrap();
        let Some(listener) = self.ready(flow, Duration::from_secs(1)) else {
            return Landed::Nowhere;
        };
        let server: std::net::UdpSocket = listener.socket.try_clone().unwrap().into();
        let mut buffer = [0; 16];
        let (length, peer) = server.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], peer.port()), (&own.port().to_be_bytes()[..], own.port()), "{flow:?}");
        server.send_to(b"answer", peer).unwrap();
        // Connected, so that it takes the answer only if it comes from where the question went.
        let client: std::net::UdpSocket = client.into();
        client.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        let length = client.recv(&mut buffer).unwrap_or_else(|error| panic!("{flow:?} had no answer: {error}"));
        assert_eq!(&buffer[..length], b"answer");
        listener.landed
    }

    /// Whether anything waits to be taken outside.
    pub fn anything_outside(&self) -> bool {
        self.listeners.iter().filter(|each| each.landed == Landed::Outside).any(|each| {
            let mut polled = [PollFd::new(each.socket.as_fd(), PollFlags::POLLIN)];
            poll(&mut polled, PollTimeout::ZERO).unwrap() > 0
        })
    }

    /// The one listener that has got something.
    fn ready(&self, flow: &Flow, patience: Duration) -> Option<&Listener> {
        let family = Family::of(flow.destination.ip());
        let candidates: Vec<&Listener> = self
            .listeners
            .iter()
            .filter(|each| each.family == family && each.datagrams == (flow.protocol == Protocol::Udp))
            .collect();
        let mut polled: Vec<PollFd> = candidates.iter().map(|each| PollFd::new(each.socket.as_fd(), PollFlags::POLLIN)).collect();
        let timeout = PollTimeout::try_from(patience.as_millis() as u64).unwrap();
        poll(&mut polled, timeout).unwrap();
        let ready: Vec<&Listener> = candidates
            .iter()
            .zip(&polled)
            .filter(|(_, polled)| polled.any().unwrap_or_default())
            .map(|(each, _)| *each)
            .collect();
        assert!(ready.len() <= 1, "{flow:?} landed in several places");
        ready.first().copied()
    }
}

/// The IPv4 option; Linux takes it for an IPv6 socket as well and means both.
pub fn transparent(socket: &Socket) {
    socket.set_ip_transparent_v4(true).unwrap();
}

/// Listeners for TCP and UDP, both families, on each port.
fn listen_on(listeners: &mut Vec<Listener>, ports: &[u16], landed: impl Fn(u16) -> Landed) {
    for port in ports {
        for family in Family::ALL {
            let (domain, any, loopback): (_, IpAddr, IpAddr) = match family {
                Family::V4 => (Domain::IPV4, Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::LOCALHOST.into()),
                Family::V6 => (Domain::IPV6, Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::LOCALHOST.into()),
            };
            for (kind, datagrams) in [(Type::STREAM, false), (Type::DGRAM, true)] {
                let socket = Socket::new(domain, kind, None).unwrap();
                socket.set_reuse_address(true).unwrap();
                if family == Family::V6 {
                    socket.set_only_v6(true).unwrap();
                }
                if *port == 15006 {
                    transparent(&socket);
                }
                // An answer must come from the address that the redirection rewrote to.
                let ip = if datagrams && *port == 15053 { loopback } else { any };
                socket.bind(&SockAddr::from(SocketAddr::new(ip, *port))).unwrap();
                if !datagrams {
                    socket.listen(1024).unwrap();
                }
                listeners.push(Listener { socket, landed: landed(*port), family, datagrams });
            }
        }
    }
}

/// The destination that the client asked for: translated by a redirection, or simply the socket's own.
fn original(server: &Socket, listener: &Listener) -> SocketAddr {
    let translated = match listener.family {
        Family::V4 => server.original_dst_v4(),
        Family::V6 => server.original_dst_v6(),
    };
    translated.or_else(|_| server.local_addr()).unwrap().as_socket().unwrap()
}

fn exchange(from: &mut std::net::TcpStream, to: &mut std::net::TcpStream) {
    to.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    from.write_all(b"ping").unwrap();
    let mut buffer = [0; 4];
    to.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"ping");
}
