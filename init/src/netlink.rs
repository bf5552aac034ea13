//! The few requests to the kernel for which no tool need be in the image: the list of nf_tables' tables, the passthrough
//! address on `lo`, and the routing that TPROXY needs. Messages are built and read as bytes; anything malformed in an
//! answer ends the reading of that answer, never the process.

use crate::error::Failure;
use crate::rules::{Family, LOCAL_MARK, LOCAL_TABLE};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket};
use std::net::Ipv6Addr;
use std::os::fd::AsRawFd as _;

// include/uapi/linux/netlink.h
const HEADER: usize = 16;
const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const DUMP: u16 = 0x300;
const EXCLUSIVE: u16 = 0x200;
const CREATE: u16 = 0x400;
const ERROR: u16 = 2;
const DONE: u16 = 3;
// include/uapi/linux/nfnetlink.h, nf_tables.h
const NFT_GET_TABLE: u16 = 10 << 8 | 1;
const NFT_NEW_TABLE: u16 = 10 << 8;
const NFT_TABLE_NAME: u16 = 1;
// include/uapi/linux/rtnetlink.h, if_addr.h, fib_rules.h
const NEW_ADDRESS: u16 = 20;
const DELETE_ADDRESS: u16 = 21;
const NEW_ROUTE: u16 = 24;
const DELETE_ROUTE: u16 = 25;
const NEW_RULE: u16 = 32;
const DELETE_RULE: u16 = 33;
const ADDRESS: u16 = 1;
const LOCAL: u16 = 2;
const NO_DUPLICATE_DETECTION: u8 = 0x02;
const ROUTE_OUT: u16 = 4;
const RULE_PRIORITY: u16 = 6;
const RULE_MARK: u16 = 10;
const BOOT: u8 = 3;
const SCOPE_HOST: u8 = 254;
const TYPE_LOCAL: u8 = 2;
const TO_TABLE: u8 = 1;
/// Before the main table, after the local one.
const PRIORITY: u32 = 1337;

fn family_number(family: Family) -> u8 {
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}

fn attribute(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    message.extend_from_slice(&((value.len() + 4) as u16).to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(value);
    message.resize(message.len().next_multiple_of(4), 0);
}

fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(HEADER + body.len());
    message.extend_from_slice(&((HEADER + body.len()) as u32).to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&(REQUEST | flags).to_ne_bytes());
    message.extend_from_slice(&1_u32.to_ne_bytes());
    message.extend_from_slice(&0_u32.to_ne_bytes());
    message.extend_from_slice(body);
    message
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

/// Sends a request and hands each answering message (its kind and body) to `each` until the kernel says that was all.
fn ask(protocol: SockProtocol, request: &[u8], mut each: impl FnMut(u16, &[u8])) -> Result<(), Errno> {
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
    sendto(socket.as_raw_fd(), request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut buffer = vec![0; 32 * 1024];
    loop {
        let length = match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Err(Errno::EINTR) => continue,
            Err(error) => return Err(error),
            Ok(0) => return Err(Errno::EPIPE),
            Ok(length) => length,
        };
        let mut rest = &buffer[..length];
        while let (Some(size), Some(kind)) = (u32_at(rest, 0), u16_at(rest, 4)) {
            let size = size as usize;
            let Some(body) = rest.get(HEADER..size) else {
                break;
            };
            match kind {
                DONE => return Ok(()),
                ERROR => {
                    let code = u32_at(body, 0).unwrap_or_default() as i32;
                    return if code == 0 { Ok(()) } else { Err(Errno::from_raw(-code)) };
                }
                _ => each(kind, body),
            }
            rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

/// The value of the first attribute of a kind.
fn find(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let size = usize::from(u16_at(attributes, 0)?);
        let kind = u16_at(attributes, 2)?;
        let value = attributes.get(4..size)?;
        if kind & 0x3fff == wanted {
            return Some(value);
        }
        attributes = attributes.get(size.next_multiple_of(4)..)?;
    }
}

/// The IPv4 and IPv6 tables of nf_tables in this network namespace.
///
/// # Errors
/// When the kernel has no nf_tables, or the process lacks NET_ADMIN.
pub fn nft_tables() -> Result<Vec<(Family, String)>, Errno> {
    let mut tables = Vec::new();
    ask(SockProtocol::NetlinkNetFilter, &message(NFT_GET_TABLE, DUMP, &[0; 4]), |kind, body| {
        let family = Family::ALL.into_iter().find(|family| body.first() == Some(&family_number(*family)));
        let name = body.get(4..).and_then(|attributes| find(attributes, NFT_TABLE_NAME));
        if let (NFT_NEW_TABLE, Some(family), Some(name)) = (kind, family, name) {
            let name = String::from_utf8_lossy(name).trim_end_matches('\0').to_owned();
            tables.push((family, name));
        }
    })?;
    Ok(tables)
}

fn change(what: &str, request: &[u8], fine: &[Errno]) -> Result<(), Failure> {
    match ask(SockProtocol::NetlinkRoute, request, |_, _| {}) {
        Ok(()) => Ok(()),
        Err(error) if fine.contains(&error) => Ok(()),
        Err(error) => Err(Failure::system(what, error)),
    }
}

fn loopback_index() -> Result<u32, Failure> {
    nix::net::if_::if_nametoindex("lo").map_err(|error| Failure::system("the pod has no interface lo", error))
}

fn address_body(address: Ipv6Addr, index: u32) -> Vec<u8> {
    let mut body = vec![family_number(Family::V6), 128, NO_DUPLICATE_DETECTION, SCOPE_HOST];
    body.extend_from_slice(&index.to_ne_bytes());
    attribute(&mut body, LOCAL, &address.octets());
    attribute(&mut body, ADDRESS, &address.octets());
    body
}

/// Adds an address to `lo`; it may be there already. IPv4's loopback is a whole network, IPv6's a single address.
///
/// # Errors
/// The kernel's refusal.
pub fn add_loopback_address(address: Ipv6Addr) -> Result<(), Failure> {
    let body = address_body(address, loopback_index()?);
    let request = message(NEW_ADDRESS, ACK | CREATE | EXCLUSIVE, &body);
    match ask(SockProtocol::NetlinkRoute, &request, |_, _| {}) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(Errno::EACCES) => Err(Failure::Ipv6Off { address }),
        Err(error) => Err(Failure::system(format!("cannot add {address}/128 to lo"), error)),
    }
}

/// Removes what [`add_loopback_address`] added.
///
/// # Errors
/// The kernel's refusal.
pub fn remove_loopback_address(address: Ipv6Addr) -> Result<(), Failure> {
    let body = address_body(address, loopback_index()?);
    let request = message(DELETE_ADDRESS, ACK, &body);
    change(
        &format!("cannot remove {address}/128 from lo"),
        &request,
        &[Errno::EADDRNOTAVAIL, Errno::EAFNOSUPPORT, Errno::EOPNOTSUPP],
    )
}

/// `ip route local default dev lo table 133` and `ip rule fwmark 1337 lookup 133`.
fn local_delivery(family: Family) -> Result<(Vec<u8>, Vec<u8>), Failure> {
    let mut route = vec![family_number(family), 0, 0, 0, LOCAL_TABLE, BOOT, SCOPE_HOST, TYPE_LOCAL, 0, 0, 0, 0];
    attribute(&mut route, ROUTE_OUT, &loopback_index()?.to_ne_bytes());
    let mut rule = vec![family_number(family), 0, 0, 0, LOCAL_TABLE, 0, 0, TO_TABLE, 0, 0, 0, 0];
    attribute(&mut rule, RULE_PRIORITY, &PRIORITY.to_ne_bytes());
    attribute(&mut rule, RULE_MARK, &LOCAL_MARK.to_ne_bytes());
    Ok((route, rule))
}

/// Has packets with [`LOCAL_MARK`] delivered locally, whatever their destination; it may be so already.
///
/// # Errors
/// The kernel's refusal.
pub fn add_local_delivery(family: Family) -> Result<(), Failure> {
    let (route, rule) = local_delivery(family)?;
    let flags = ACK | CREATE | EXCLUSIVE;
    let what = format!("cannot add the {family} route of routing table {LOCAL_TABLE}");
    change(&what, &message(NEW_ROUTE, flags, &route), &[Errno::EEXIST])?;
    let what = format!("cannot add the {family} routing rule for mark {LOCAL_MARK}");
    change(&what, &message(NEW_RULE, flags, &rule), &[Errno::EEXIST])
}

/// Removes what [`add_local_delivery`] added, if it is there.
///
/// # Errors
/// The kernel's refusal.
pub fn remove_local_delivery(family: Family) -> Result<(), Failure> {
    let (route, rule) = local_delivery(family)?;
    let gone = [Errno::ENOENT, Errno::ESRCH, Errno::EAFNOSUPPORT, Errno::EOPNOTSUPP, Errno::ENETUNREACH];
    let what = format!("cannot remove the {family} routing rule for mark {LOCAL_MARK}");
    change(&what, &message(DELETE_RULE, ACK, &rule), &gone)?;
    let what = format!("cannot remove the {family} route of routing table {LOCAL_TABLE}");
    change(&what, &message(DELETE_ROUTE, ACK, &route), &gone)
}
