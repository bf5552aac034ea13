//! What the kernel is asked for beyond tokio: listening sockets, original destinations, socket options, pipes for
//! `splice(2)`. All of it through `socket2` and `nix`, so that no unsafe code is needed.

use crate::conn::{Direction, OrigDst};
use crate::settings::Mode;
use nix::fcntl::{OFlag, SpliceFFlags};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use std::cell::RefCell;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

const BACKLOG: i32 = 4096;
/// The mark of `weft-init`'s TPROXY rules.
const TPROXY_MARK: u32 = weft_api::names::PROXY_UID;
/// Size of a splice pipe: the most that one may have without privilege (`/proc/sys/fs/pipe-max-size`).
const PIPE: usize = 1 << 20;
const PIPES_KEPT: usize = 8;

/// Opens a listening socket that other workers may open as well. `transparent`: take connections to foreign addresses.
pub fn listen(address: SocketAddr, transparent: bool) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    if transparent {
        set_transparent(&SockRef::from(&socket), address.is_ipv6())?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn set_transparent(socket: &SockRef<'_>, v6: bool) -> io::Result<()> {
    if v6 { socket.set_ip_transparent_v6(true) } else { socket.set_ip_transparent_v4(true) }
}

/// A socket that is to connect from `source` to `target`.
pub fn dialer(target: SocketAddr, source: Option<IpAddr>, mode: Mode) -> io::Result<tokio::net::TcpSocket> {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_tcp_nodelay(true)?;
    if let Some(source) = source {
        if mode == Mode::Tproxy {
            set_transparent(&SockRef::from(&socket), source.is_ipv6())?;
            // By this mark the redirection knows the connection, and leads the app's answers, which go to the client's
            // address, back to the proxy.
            socket.set_mark(TPROXY_MARK)?;
        }
        // Chooses the port when connecting, so that it need only be unique for the destination.
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::IpBindAddressNoPort, &true)?;
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    Ok(tokio::net::TcpSocket::from_std_stream(socket.into()))
}

/// Where the client of an accepted connection wanted to go: conntrack's answer under REDIRECT, the socket's own address
/// under TPROXY. A connection that nobody redirected has its own address as the original.
pub fn original_dst(stream: &tokio::net::TcpStream, mode: Mode, direction: Direction) -> io::Result<OrigDst> {
    let local = stream.local_addr()?;
    if mode == Mode::Tproxy && direction == Direction::Inbound {
        return Ok(OrigDst(local));
    }
    let socket = SockRef::from(stream);
    let found = if local.is_ipv6() { socket.original_dst_v6() } else { socket.original_dst_v4() };
    match found {
        Ok(address) => Ok(OrigDst(address.as_socket().unwrap_or(local))),
        // No entry, or a kernel without conntrack.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOPROTOOPT)) => Ok(OrigDst(local)),
        Err(error) => Err(error),
    }
}

/// Makes the coming close a reset.
pub fn reset_on_close(stream: &tokio::net::TcpStream) {
    // Fails only on a socket that is gone already.
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// Ends the writing side.
pub fn shutdown_write(stream: &tokio::net::TcpStream) -> io::Result<()> {
    SockRef::from(stream).shutdown(std::net::Shutdown::Write)
}

/// Allows as many descriptors as the hard limit does. Returns the number.
pub fn raise_descriptor_limit() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}

/// How many descriptors the process may have.
pub fn descriptor_limit() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft)
}

/// A pipe through which bytes go from socket to socket without leaving the kernel.
#[derive(Debug)]
pub struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

/// Pipes of a worker that are free: opening and sizing one costs more than splicing through it.
#[derive(Debug, Default)]
pub struct Pipes(RefCell<Vec<Pipe>>);

impl Pipes {
    /// A pipe, empty. Fails when descriptors run out; the caller then copies.
    pub fn take(&self) -> io::Result<Pipe> {
        if let Some(pipe) = self.0.borrow_mut().pop() {
            return Ok(pipe);
        }
        let (read, write) = nix::unistd::pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)?;
        // May be refused by a user's limit on pipe memory: a small pipe works as well.
        let _ = nix::fcntl::fcntl(&write, nix::fcntl::FcntlArg::F_SETPIPE_SZ(PIPE as i32));
        Ok(Pipe { read, write })
    }

    /// Takes an empty pipe back.
    pub fn give(&self, pipe: Pipe) {
        let mut free = self.0.borrow_mut();
        if free.len() < PIPES_KEPT {
            free.push(pipe);
        }
    }
}

impl Pipe {
    /// Moves bytes from a socket into the pipe. 0: end of stream.
    pub fn fill(&self, from: &impl AsFd) -> io::Result<usize> {
        Ok(nix::fcntl::splice(from, None, &self.write, None, PIPE, flags())?)
    }

    /// Moves up to `n` bytes out of the pipe to a socket.
    pub fn pour(&self, to: &impl AsFd, n: usize) -> io::Result<usize> {
        Ok(nix::fcntl::splice(&self.read, None, to, None, n, flags())?)
    }
}

fn flags() -> SpliceFFlags {
    SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK
}

/// The number of CPUs that the cgroup's quota grants, rounded up; none without a quota. Version 2, else version 1.
pub fn cpu_quota() -> Option<usize> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    quota_v2(&read("/sys/fs/cgroup/cpu.max").unwrap_or_default()).or_else(|| {
        let dir = "/sys/fs/cgroup/cpu";
        quota_v1(&read(&format!("{dir}/cpu.cfs_quota_us"))?, &read(&format!("{dir}/cpu.cfs_period_us"))?)
    })
}

fn quota_v2(text: &str) -> Option<usize> {
    let (quota, period) = text.trim().split_once(' ')?;
    quota_v1(quota, period)
}

fn quota_v1(quota: &str, period: &str) -> Option<usize> {
    let (quota, period): (u64, u64) = (quota.trim().parse().ok()?, period.trim().parse().ok()?);
    (quota > 0 && period > 0).then(|| quota.div_ceil(period) as usize)
}

/// The TCP ports on which anybody listens, from the text of `/proc/net/tcp` or `tcp6`.
pub fn listening_ports(table: &str) -> impl Iterator<Item = u16> + '_ {
    table.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (local, _remote, state) = (fields.next()?, fields.next()?, fields.next()?);
        (state == "0A").then_some(())?;
        u16::from_str_radix(local.rsplit(':').next()?, 16).ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas() {
        assert_eq!(quota_v2("max 100000\n"), None);
        assert_eq!(quota_v2("150000 100000\n"), Some(2));
        assert_eq!(quota_v2("5000 100000"), Some(1));
        assert_eq!(quota_v2(""), None);
        assert_eq!(quota_v1("-1\n", "100000\n"), None);
        assert_eq!(quota_v1("400000\n", "100000\n"), Some(4));
    }

    #[test]
    fn listening_sockets_are_found() {
        let table = "  sl  local_address rem_address   st tx_queue\n   0: 00000000:1F90 00000000:0000 0A 0:0\n   \
                     1: 0100007F:1F91 0100007F:C001 01 0:0\n   2: 0000000000000000:3A98 0000:0000 0A 0\n";
        assert_eq!(listening_ports(table).collect::<Vec<_>>(), [8080, 15000]);
        let own = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        assert!(listening_ports(&table).any(|port| port == own.local_addr().unwrap().port()));
    }
}
