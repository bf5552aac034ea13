//! The proof: a connection to an address that no network routes must land on the outbound port of this very pod, and the
//! kernel must remember where it was going. No packet leaves the pod when the redirection works, and the app has not been
//! started yet, so nobody is disturbed.
//!
//! What is proved is the outbound side with everything it needs: hooks, connection tracking, NAT, original destination. The
//! inbound side cannot be tried from inside (its packets have to come in through an interface); its rules are read back.

use crate::error::Failure;
use crate::flags::Settings;
use crate::host::Host;
use crate::rules::{self, Connection, Family, Hook, Landing, Protocol, RuleSet};
use socket2::{Domain, SockAddr, Socket, Type};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::time::{Duration, Instant};

/// How long a connection within the machine may take. It takes microseconds; more than this means that it left.
const PATIENCE: Duration = Duration::from_secs(2);

/// What came of the proof for one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proof {
    /// A connection to this destination landed where it should.
    Landed(SocketAddr),
    /// Something listens on the outbound port already and took the connection; what it was told cannot be seen.
    Taken(SocketAddr),
    /// Nothing could be tried, for this reason.
    Skipped(String),
}

/// Tries the redirection out.
///
/// # Errors
/// [`Failure::Proof`] when a connection lands elsewhere.
pub fn prove(host: &Host, settings: &Settings, rules: &RuleSet) -> Result<Proof, Failure> {
    let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    if settings.is_proxy(uid, gid) {
        return Ok(Proof::Skipped(format!(
            "weft-init runs as the proxy's own user or group ({uid}:{gid}), whose traffic is not redirected"
        )));
    }
    let target = match target(host, settings, rules, (uid, gid)) {
        Ok(target) => target,
        Err(reason) => return Ok(Proof::Skipped(reason)),
    };
    let port = settings.outbound_port;
    let fail = |what: String| Failure::Proof { target, port, what };
    // To this address the kernel redirects what the pod itself sends.
    let local = match rules.family {
        Family::V4 => IpAddr::V4(Ipv4Addr::LOCALHOST),
        Family::V6 => IpAddr::V6(Ipv6Addr::LOCALHOST),
    };
    let listener = match TcpListener::bind((local, port)) {
        Ok(listener) => Some(listener),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => None,
        Err(error) => return Err(fail(format!("that port cannot be listened on: {error}"))),
    };
    let client = connect(target).map_err(|error| fail(format!("connecting failed: {error}")))?;
    let Some(listener) = listener else {
        return Ok(Proof::Taken(target));
    };
    let own = client
        .local_addr()
        .ok()
        .and_then(|address| address.as_socket())
        .ok_or_else(|| fail("the connection has no address".into()))?;
    let server = accept(&listener, own)
        .map_err(|error| fail(format!("waiting for it there failed: {error}")))?
        .ok_or_else(|| fail("it landed elsewhere".into()))?;
    let original = match rules.family {
        Family::V4 => server.original_dst_v4(),
        Family::V6 => server.original_dst_v6(),
    };
    match original.map(|address| address.as_socket()) {
        Ok(Some(original)) if original == target => Ok(Proof::Landed(target)),
        Ok(original) => Err(fail(format!(
            "there its original destination reads {}",
            original.map_or_else(|| "nothing".into(), |address| address.to_string())
        ))),
        Err(error) => Err(fail(format!("there its original destination cannot be read: {error}"))),
    }
}

fn connect(target: SocketAddr) -> std::io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM, None)?;
    socket.connect_timeout(&SockAddr::from(target), PATIENCE)?;
    Ok(socket)
}

/// The connection from `own`, among whatever else may arrive.
fn accept(listener: &TcpListener, own: SocketAddr) -> std::io::Result<Option<Socket>> {
    listener.set_nonblocking(true)?;
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        match listener.accept() {
            Ok((stream, peer)) if peer == own => return Ok(Some(stream.into())),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                // Connected means that it is queued somewhere; if not here by now, then not here.
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// A destination that these rules redirect for this process, preferably one that exists nowhere.
fn target(host: &Host, settings: &Settings, rules: &RuleSet, owner: (u32, u32)) -> Result<SocketAddr, String> {
    let mut routed = false;
    for address in addresses(settings, rules.family) {
        let Some(source) = source(address) else {
            continue;
        };
        let Some(interface) = host.interface_of(source) else {
            continue;
        };
        routed = true;
        for port in ports(settings) {
            let destination = SocketAddr::new(address, port);
            let connection = Connection {
                hook: Hook::Output,
                protocol: Protocol::Tcp,
                source: SocketAddr::new(source, 0),
                destination,
                interface: interface.to_owned(),
                owner: Some(owner),
            };
            if rules::land(rules, &connection) == Landing::Proxy(settings.outbound_port) {
                return Ok(destination);
            }
        }
    }
    Err(if routed {
        "the settings redirect no outbound connection".into()
    } else {
        format!("the pod has no {} route to try it on", rules.family)
    })
}

/// The documentation networks, then what is to be redirected in particular.
fn addresses(settings: &Settings, family: Family) -> Vec<IpAddr> {
    let documentation = [
        IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
        IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)),
        IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1)),
        IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
        IpAddr::V6(Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 1)),
    ];
    let included = settings.outbound_cidrs.list().iter().flat_map(|net| net.hosts().take(2));
    documentation.into_iter().chain(included).filter(|address| Family::of(*address) == family).collect()
}

fn ports(settings: &Settings) -> impl Iterator<Item = u16> {
    let included = settings.outbound_ports.ranges().iter().map(|range| range.first);
    [15002, 80, 1, 65535].into_iter().chain(included)
}

/// The address from which the kernel would reach `address`. Connecting a datagram socket asks for a route and sends nothing.
fn source(address: IpAddr) -> Option<IpAddr> {
    let any: IpAddr = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect((address, 9)).ok()?;
    socket.local_addr().ok().map(|local| local.ip())
}
