//! The command line, read strictly: whatever cannot be meant is refused before anything is touched, with the flag and the
//! value in the message and exit code 2. [`Settings`] is what the rules are computed from, [`Options`] what else the user
//! asked of this run. The same syntax stands behind the pod annotations, so [`PortSet`], [`Cidrs`] and their kin are public.

use clap::{ArgAction, Parser, ValueEnum};
use weft_api::names;

pub mod values;

pub use values::{Cidrs, Interface, PortRange, PortSet, Ports};

/// Most ports and ranges in one list: beyond it the rules cost each connection more than anyone wants to pay.
pub const LONGEST_LIST: usize = 1000;

/// How inbound connections are handed to the proxy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, ValueEnum)]
pub enum Mode {
    /// The destination is rewritten; the proxy asks the kernel for the original one.
    #[default]
    Redirect,
    /// The destination stays; the proxy needs a transparent socket and NET_ADMIN. Outbound is as in [`Mode::Redirect`].
    Tproxy,
}

/// Which of the kernel's packet filters holds the rules, and by which tool they get there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backend {
    /// nf_tables, through `iptables-nft`.
    Nft,
    /// nf_tables, through `nft`, in tables of our own.
    Nftables,
    /// x_tables, through `iptables-legacy`.
    Legacy,
}

impl Backend {
    /// All, in the order in which they are tried.
    pub const ALL: [Self; 3] = [Self::Nft, Self::Nftables, Self::Legacy];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nft => "nft",
            Self::Nftables => "nftables",
            Self::Legacy => "legacy",
        }
    }
}

impl std::fmt::Display for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The back end as asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum BackendChoice {
    /// The first that works.
    #[default]
    Auto,
    /// [`Backend::Nft`].
    Nft,
    /// [`Backend::Legacy`].
    Legacy,
    /// [`Backend::Nftables`].
    Nftables,
}

impl BackendChoice {
    /// The back end, `None` for automatic.
    pub fn fixed(self) -> Option<Backend> {
        match self {
            Self::Auto => None,
            Self::Nft => Some(Backend::Nft),
            Self::Legacy => Some(Backend::Legacy),
            Self::Nftables => Some(Backend::Nftables),
        }
    }
}

/// Whether IPv6 is redirected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Ipv6 {
    /// If the pod has IPv6 addresses.
    #[default]
    Auto,
    /// Always; a kernel without IPv6 is an error.
    True,
    /// Never.
    False,
}

/// What the rules are computed from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Where the app's connections go.
    pub outbound_port: u16,
    /// Where connections to the app go.
    pub inbound_port: u16,
    /// Sockets of this user are the proxy's, unless it is 0: see [`Settings::proxy_user`].
    pub proxy_uid: u32,
    /// Sockets of this group are the proxy's, unless it is 0.
    pub proxy_gid: u32,
    /// Ports of the app that are redirected.
    pub inbound_ports: Ports,
    /// Ports of the app that are not.
    pub exclude_inbound_ports: PortSet,
    /// Destination ports that are redirected whatever `outbound_cidrs` says.
    pub outbound_ports: PortSet,
    /// Destination ports that are never redirected.
    pub exclude_outbound_ports: PortSet,
    /// Destinations that are redirected.
    pub outbound_cidrs: Cidrs,
    /// Destinations that are never redirected.
    pub exclude_outbound_cidrs: Vec<ipnet::IpNet>,
    /// Interfaces whose traffic is left alone.
    pub exclude_interfaces: Vec<Interface>,
    /// Whether queries to port 53 go to the proxy.
    pub dns_capture: bool,
    /// Whether packets that conntrack calls INVALID are dropped.
    pub drop_invalid: bool,
    /// How inbound connections are handed over.
    pub mode: Mode,
}

impl Settings {
    /// The user whose sockets are the proxy's. `None` for root: a proxy that runs as root (TPROXY) must not take every root
    /// process of the pod with it past the mesh, so that it is known by its group alone.
    pub fn proxy_user(&self) -> Option<u32> {
        Some(self.proxy_uid).filter(|uid| *uid != 0)
    }

    /// The group whose sockets are the proxy's, `None` for root's as in [`Self::proxy_user`].
    pub fn proxy_group(&self) -> Option<u32> {
        Some(self.proxy_gid).filter(|gid| *gid != 0)
    }

    /// Whether a socket of this user and group is the proxy's.
    pub fn is_proxy(&self, uid: u32, gid: u32) -> bool {
        self.proxy_user() == Some(uid) || self.proxy_group() == Some(gid)
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            outbound_port: names::OUTBOUND_PORT,
            inbound_port: names::INBOUND_PORT,
            proxy_uid: names::PROXY_UID,
            proxy_gid: names::PROXY_GID,
            inbound_ports: Ports::All,
            exclude_inbound_ports: PortSet::default(),
            outbound_ports: PortSet::default(),
            exclude_outbound_ports: PortSet::default(),
            outbound_cidrs: Cidrs::All,
            exclude_outbound_cidrs: Vec::new(),
            exclude_interfaces: Vec::new(),
            dns_capture: false,
            drop_invalid: true,
            mode: Mode::Redirect,
        }
    }
}

/// What one run shall do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The rules.
    pub settings: Settings,
    /// The back end.
    pub backend: BackendChoice,
    /// IPv6.
    pub ipv6: Ipv6,
    /// Print what would be done, touch nothing.
    pub dry_run: bool,
    /// Remove the rules.
    pub cleanup: bool,
    /// Do not try the redirection out after applying it.
    pub skip_verify: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            settings: Settings::default(),
            backend: BackendChoice::Auto,
            ipv6: Ipv6::Auto,
            dry_run: false,
            cleanup: false,
            skip_verify: false,
        }
    }
}

#[derive(Debug, Parser)]
#[command(
    name = "weft-init",
    version,
    about = "Redirects a pod's traffic to its sidecar, proves it, and exits.",
    after_help = "Lists are comma-separated; ports may be ranges (8000-8010). Exit status: 0 done or already in place, 1 failed, 2 bad flags."
)]
struct Arguments {
    /// Port of the proxy that takes the app's outgoing connections
    #[arg(long, value_name = "PORT", default_value_t = names::OUTBOUND_PORT, value_parser = values::port)]
    outbound_port: u16,
    /// Port of the proxy that takes connections to the app
    #[arg(long, value_name = "PORT", default_value_t = names::INBOUND_PORT, value_parser = values::port)]
    inbound_port: u16,
    /// User of the proxy; what it sends is left alone. 0: only the group tells
    #[arg(long, value_name = "UID", default_value_t = names::PROXY_UID, value_parser = values::id)]
    proxy_uid: u32,
    /// Group of the proxy; what it sends is left alone. 0: only the user tells
    #[arg(long, value_name = "GID", default_value_t = names::PROXY_GID, value_parser = values::id)]
    proxy_gid: u32,
    /// Inbound ports to redirect: * for all, or a list; empty for none
    #[arg(long, value_name = "*|LIST", default_value = "*", value_parser = values::ports)]
    inbound_ports: Ports,
    /// Inbound ports that go to the app directly
    #[arg(long, value_name = "LIST", default_value = "", value_parser = values::port_set)]
    exclude_inbound_ports: PortSet,
    /// Outbound ports to redirect whatever --outbound-cidrs says
    #[arg(long, value_name = "LIST", default_value = "", value_parser = values::port_set)]
    outbound_ports: PortSet,
    /// Outbound ports that leave directly (DNS too, if 53 is among them)
    #[arg(long, value_name = "LIST", default_value = "", value_parser = values::port_set)]
    exclude_outbound_ports: PortSet,
    /// Destinations to redirect: * for all, or CIDRs of either family; empty for none
    #[arg(long, value_name = "*|LIST", default_value = "*", value_parser = values::cidrs)]
    outbound_cidrs: Cidrs,
    /// Destinations (CIDRs of either family) that are left alone
    #[arg(long, value_name = "LIST", default_value = "", value_parser = values::cidr_list)]
    exclude_outbound_cidrs: values::List<ipnet::IpNet>,
    /// Interfaces whose traffic is left alone; a + at the end stands for any rest of the name
    #[arg(long, value_name = "LIST", default_value = "", value_parser = values::interfaces)]
    exclude_interfaces: values::List<Interface>,
    /// Send the app's DNS queries (UDP and TCP port 53) to the proxy
    #[arg(long, value_name = "true|false", default_value = "false", default_missing_value = "true",
          num_args = 0..=1, action = ArgAction::Set)]
    dns_capture: bool,
    /// Drop TCP packets that conntrack calls INVALID
    #[arg(long, value_name = "true|false", default_value = "true", default_missing_value = "true",
          num_args = 0..=1, action = ArgAction::Set)]
    drop_invalid: bool,
    /// How inbound connections are handed to the proxy
    #[arg(long, value_enum, default_value = "redirect")]
    mode: Mode,
    /// Which packet filter of the kernel to use
    #[arg(long, value_enum, default_value = "auto")]
    backend: BackendChoice,
    /// Redirect IPv6: auto does if the pod has IPv6 addresses
    #[arg(long, value_enum, default_value = "auto")]
    ipv6: Ipv6,
    /// Print what would be fed to the kernel and touch nothing
    #[arg(long)]
    dry_run: bool,
    /// Remove Weft's rules, and nothing else
    #[arg(long)]
    cleanup: bool,
    /// Do not try the redirection out after applying it
    #[arg(long)]
    skip_verify: bool,
}

impl Options {
    /// Reads a command line, the program's name first.
    ///
    /// # Errors
    /// What clap makes of it: exit code 2 and a message that names flag and value, or the help text.
    pub fn parse<I, T>(arguments: I) -> Result<Self, clap::Error>
    where
        I: IntoIterator<Item = T>,
        T: Into<std::ffi::OsString> + Clone,
    {
        let arguments = Arguments::try_parse_from(arguments)?;
        let options = Self {
            settings: Settings {
                outbound_port: arguments.outbound_port,
                inbound_port: arguments.inbound_port,
                proxy_uid: arguments.proxy_uid,
                proxy_gid: arguments.proxy_gid,
                inbound_ports: arguments.inbound_ports,
                exclude_inbound_ports: arguments.exclude_inbound_ports,
                outbound_ports: arguments.outbound_ports,
                exclude_outbound_ports: arguments.exclude_outbound_ports,
                outbound_cidrs: arguments.outbound_cidrs,
                exclude_outbound_cidrs: arguments.exclude_outbound_cidrs.0,
                exclude_interfaces: arguments.exclude_interfaces.0,
                dns_capture: arguments.dns_capture,
                drop_invalid: arguments.drop_invalid,
                mode: arguments.mode,
            },
            backend: arguments.backend,
            ipv6: arguments.ipv6,
            dry_run: arguments.dry_run,
            cleanup: arguments.cleanup,
            skip_verify: arguments.skip_verify,
        };
        options.check().map_err(|reason| clap::Error::raw(clap::error::ErrorKind::ValueValidation, format!("{reason}\n")))?;
        Ok(options)
    }

    /// What no single flag can know.
    fn check(&self) -> Result<(), String> {
        let settings = &self.settings;
        let mut taken = vec![(names::ADMIN_PORT, "the proxy's admin port")];
        if settings.dns_capture {
            taken.push((names::DNS_PORT, "the proxy's DNS port"));
        }
        for (flag, port) in [("--outbound-port", settings.outbound_port), ("--inbound-port", settings.inbound_port)] {
            if let Some((_, what)) = taken.iter().find(|(number, _)| *number == port) {
                return Err(format!("invalid value '{port}' for '{flag}': it is {what}"));
            }
            taken.push((port, "the value of --outbound-port"));
        }
        if settings.proxy_user().is_none() && settings.proxy_group().is_none() {
            return Err("invalid value '0' for '--proxy-gid': with '--proxy-uid' 0 as well, the proxy could not be told from \
                 processes of the app that run as root"
                .into());
        }
        if self.ipv6 == Ipv6::False {
            let lists = [
                ("--exclude-outbound-cidrs", settings.exclude_outbound_cidrs.as_slice()),
                ("--outbound-cidrs", settings.outbound_cidrs.list()),
            ];
            for (flag, nets) in lists {
                if let Some(net) = nets.iter().find(|net| matches!(net, ipnet::IpNet::V6(_))) {
                    return Err(format!("invalid value '{net}' for '{flag}': an IPv6 network, but --ipv6 is false"));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
