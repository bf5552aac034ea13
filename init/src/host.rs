//! What the pod's network namespace and this process have, asked without changing anything: addresses, capabilities, and
//! the kernel's own lists of packet-filter tables.
//!
//! Everything is read of the calling thread (`/proc/thread-self`), whose network namespace it is.

use crate::error::Failure;
use crate::flags::{Backend, Ipv6};
use crate::netlink;
use crate::rules::{Family, TableKind};
use std::net::IpAddr;

/// An address and the interface that has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Name of the interface.
    pub interface: String,
    /// The address.
    pub address: IpAddr,
}

/// A look at where we run.
#[derive(Clone, Debug)]
pub struct Host {
    /// All addresses.
    pub addresses: Vec<Address>,
    /// Whether the kernel has IPv6 at all.
    pub ipv6: bool,
    /// Tables of nf_tables, `None` if the kernel has none or does not tell.
    nft_tables: Option<Vec<(Family, String)>>,
    /// Whether x_tables has any table, by family.
    legacy_tables: [bool; 2],
    capabilities: u64,
    uid: u32,
}

/// How much a family matters to a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// The pod can be reached, or reach others, by this family: it must be redirected.
    Required,
    /// Only its own link can be reached: redirected if the kernel can.
    Welcome,
    /// Nothing can come or go by this family.
    None,
}

const NET_ADMIN: u32 = 12;
const NET_RAW: u32 = 13;

impl Host {
    /// Looks.
    ///
    /// # Errors
    /// When the interfaces cannot be listed.
    pub fn survey() -> Result<Self, Failure> {
        let proc = "/proc/thread-self";
        let status = std::fs::read_to_string(format!("{proc}/status"))
            .map_err(|error| Failure::system(format!("cannot read {proc}/status"), error))?;
        let legacy = |file: &str| {
            // Absent or unreadable: no such tables, or none that we could have made.
            std::fs::read_to_string(format!("{proc}/net/{file}"))
                .is_ok_and(|names| names.lines().any(|name| TableKind::ALL.iter().any(|kind| kind.name() == name)))
        };
        Ok(Self {
            addresses: addresses()?,
            ipv6: std::path::Path::new(&format!("{proc}/net/if_inet6")).exists(),
            nft_tables: netlink::nft_tables().ok(),
            legacy_tables: [legacy("ip_tables_names"), legacy("ip6_tables_names")],
            capabilities: effective_capabilities(&status),
            uid: nix::unistd::geteuid().as_raw(),
        })
    }

    /// Whether a back end may hold rules of ours in a family: if not, it need not be asked.
    pub fn may_hold(&self, backend: Backend, family: Family) -> bool {
        let has = |name: &str| self.nft_tables.iter().flatten().any(|table| table.0 == family && table.1 == name);
        match backend {
            Backend::Nft => TableKind::ALL.iter().any(|kind| has(kind.name())),
            Backend::Nftables => has(crate::render::nft::TABLE),
            Backend::Legacy => self.legacy_tables[usize::from(family == Family::V6)],
        }
    }

    /// Whether this process may change the packet filter.
    ///
    /// # Errors
    /// [`Failure::Capability`] if not.
    pub fn may_change(&self) -> Result<(), Failure> {
        self.capability(NET_ADMIN, "NET_ADMIN")
    }

    /// Whether this process may use a back end.
    ///
    /// # Errors
    /// [`Failure::Capability`] if not.
    pub fn may_use(&self, backend: Backend) -> Result<(), Failure> {
        match backend {
            Backend::Legacy => self.capability(NET_RAW, "NET_RAW"),
            Backend::Nft | Backend::Nftables => Ok(()),
        }
    }

    fn capability(&self, bit: u32, capability: &'static str) -> Result<(), Failure> {
        if self.capabilities & (1 << bit) == 0 {
            return Err(Failure::Capability { capability, uid: self.uid });
        }
        Ok(())
    }

    /// How much a family matters here.
    ///
    /// # Errors
    /// [`Failure::NoIpv6`] if IPv6 is demanded and the kernel has none.
    pub fn need(&self, family: Family, ipv6: Ipv6) -> Result<Need, Failure> {
        if family == Family::V6 {
            match (ipv6, self.ipv6) {
                (Ipv6::True, false) => return Err(Failure::NoIpv6),
                (Ipv6::True, true) => return Ok(Need::Required),
                (Ipv6::False, _) | (Ipv6::Auto, false) => return Ok(Need::None),
                (Ipv6::Auto, true) => {}
            }
        }
        let mut need = if family == Family::V4 { Need::Welcome } else { Need::None };
        let mut any = false;
        for Address { address, .. } in self.addresses.iter().filter(|each| !each.address.is_loopback()) {
            if each_is_passthrough(*address) {
                continue;
            }
            any = true;
            if Family::of(*address) == family {
                need = if reaches_far(*address) {
                    Need::Required
                } else if need == Need::None {
                    Need::Welcome
                } else {
                    need
                };
            }
            if need == Need::Required {
                break;
            }
        }
        // A namespace without any address: whatever it gets later, IPv4 has to be in place.
        if family == Family::V4 && !any {
            need = Need::Required;
        }
        Ok(need)
    }

    /// The interface that has an address.
    pub fn interface_of(&self, address: IpAddr) -> Option<&str> {
        self.addresses.iter().find(|each| each.address == address).map(|each| each.interface.as_str())
    }
}

/// The address that we add to lo ourselves says nothing about the pod.
fn each_is_passthrough(address: IpAddr) -> bool {
    address == IpAddr::V6(weft_api::names::PASSTHROUGH_V6)
}

fn reaches_far(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(_) => true,
        IpAddr::V6(v6) => v6.segments()[0] & 0xffc0 != 0xfe80,
    }
}

fn addresses() -> Result<Vec<Address>, Failure> {
    let list = nix::ifaddrs::getifaddrs().map_err(|error| Failure::system("cannot list the pod's network interfaces", error))?;
    Ok(list
        .filter_map(|each| {
            let storage = each.address?;
            let address = storage
                .as_sockaddr_in()
                .map(|v4| IpAddr::V4(v4.ip()))
                .or_else(|| storage.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))?;
            Some(Address { interface: each.interface_name, address })
        })
        .collect())
}

fn effective_capabilities(status: &str) -> u64 {
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(addresses: &[(&str, &str)]) -> Host {
        Host {
            addresses: addresses
                .iter()
                .map(|(interface, address)| Address { interface: (*interface).into(), address: address.parse().unwrap() })
                .collect(),
            ipv6: true,
            nft_tables: None,
            legacy_tables: [false; 2],
            capabilities: 0,
            uid: 1000,
        }
    }

    fn needs(addresses: &[(&str, &str)]) -> (Need, Need) {
        let host = host(addresses);
        (host.need(Family::V4, Ipv6::Auto).unwrap(), host.need(Family::V6, Ipv6::Auto).unwrap())
    }

    #[test]
    fn a_family_matters_as_far_as_its_addresses_reach() {
        let lo = [("lo", "127.0.0.1"), ("lo", "::1"), ("lo", "::6")];
        let with = |more: &[(&'static str, &'static str)]| needs(&[&lo[..], more].concat());
        assert_eq!(with(&[]), (Need::Required, Need::None));
        assert_eq!(with(&[("eth0", "10.1.1.1")]), (Need::Required, Need::None));
        assert_eq!(with(&[("eth0", "10.1.1.1"), ("eth0", "fe80::1")]), (Need::Required, Need::Welcome));
        assert_eq!(with(&[("eth0", "10.1.1.1"), ("eth0", "fd00::1")]), (Need::Required, Need::Required));
        assert_eq!(with(&[("eth0", "fd00::1")]), (Need::Welcome, Need::Required));
    }

    #[test]
    fn what_the_flag_says_goes_before_what_the_pod_has() {
        let mut host = host(&[("eth0", "fd00::1")]);
        assert_eq!(host.need(Family::V6, Ipv6::False).unwrap(), Need::None);
        host.ipv6 = false;
        assert_eq!(host.need(Family::V6, Ipv6::Auto).unwrap(), Need::None);
        assert!(matches!(host.need(Family::V6, Ipv6::True), Err(Failure::NoIpv6)));
    }

    #[test]
    fn capabilities_are_read_from_the_status_file() {
        assert_eq!(effective_capabilities("Name:\tx\nCapPrm:\t0000000000000000\nCapEff:\t0000000000001000\n"), 1 << NET_ADMIN);
        let failure = host(&[]).may_change().unwrap_err().to_string();
        assert!(failure.contains("NET_ADMIN") && failure.contains("uid 1000") && failure.contains("runAsUser: 0"), "{failure}");
    }
}
