//! What can go wrong, each with what happened, the likely cause and what to do next. Exit code 1 for all of them.

use crate::flags::Backend;
use crate::rules::Family;
use std::fmt::Write as _;
use std::net::SocketAddr;

/// Why a run failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Failure {
    /// The process lacks a capability.
    #[error(
        "weft-init runs as uid {uid} without the capability {capability}, and only with it may the pod's packet filter be \
         changed. Run the container weft-init with securityContext runAsUser: 0 and capabilities.add: [{capability}] (a user \
         other than 0 does not receive added capabilities)"
    )]
    Capability {
        /// Which.
        capability: &'static str,
        /// The user it runs as.
        uid: u32,
    },
    /// A tool is not there.
    #[error("back end {backend}: '{tool}' is not in PATH. Use an image that has it, or another --backend")]
    ToolMissing {
        /// Which.
        tool: String,
        /// For which back end.
        backend: Backend,
    },
    /// A tool failed.
    #[error("back end {backend}, {family}: {tool} failed: {message}{}", advice.as_deref().map(|advice| format!(". {advice}")).unwrap_or_default())]
    Tool {
        /// Which.
        tool: String,
        /// For which back end.
        backend: Backend,
        /// For which family.
        family: Family,
        /// What it said.
        message: String,
        /// What it means and what to do.
        advice: Option<String>,
    },
    /// Another program uses a table of nf_tables in a way that iptables does not know.
    #[error(
        "back end nft, {family}: another program put rules into the table {table} that iptables-nft cannot read. Use --backend \
         nftables (annotation weft.mesh/init-backend), which has tables of its own"
    )]
    Incompatible {
        /// Which table.
        table: String,
        /// Of which family.
        family: Family,
    },
    /// No back end works.
    #[error("no packet filter of this kernel takes the redirection rules:{}", list(refusals))]
    Unsupported {
        /// Each back end's reason.
        refusals: Vec<(Backend, Failure)>,
    },
    /// The kernel does not hold what it said it took.
    #[error(
        "back end {backend}, {family}: the kernel accepted the rules, but reading them back shows others. Something else \
         changes the pod's packet filter at the same time; see `iptables-save` in the pod's network namespace"
    )]
    NotHeld {
        /// Which back end.
        backend: Backend,
        /// Which family.
        family: Family,
    },
    /// IPv6 was demanded of a kernel without it.
    #[error("--ipv6 true, but this kernel has no IPv6 (no /proc/net/if_inet6). Use --ipv6 auto, or boot without ipv6.disable=1")]
    NoIpv6,
    /// IPv6 is switched off in the pod.
    #[error(
        "cannot add {address}/128 to lo: IPv6 is switched off there. Set the sysctl net.ipv6.conf.lo.disable_ipv6 to 0 in the \
         pod, or do without IPv6 by --ipv6 false"
    )]
    Ipv6Off {
        /// The address from which the proxy speaks to the app.
        address: std::net::Ipv6Addr,
    },
    /// A system call failed.
    #[error("{what}: {error}")]
    System {
        /// What was attempted, with its object.
        what: String,
        /// The kernel's answer.
        error: String,
    },
    /// The rules are in place but a connection did not land where it should.
    #[error(
        "the redirection does not work: a connection to {target} should have landed on the outbound port {port}, but {what}. \
         The rules are in place (see `iptables-save` in the pod's network namespace); likely causes: rules of another program \
         that decide earlier, or a container runtime without connection tracking. --skip-verify goes on without this proof"
    )]
    Proof {
        /// The destination that was tried.
        target: SocketAddr,
        /// Where it should have landed.
        port: u16,
        /// What happened instead.
        what: String,
    },
}

impl Failure {
    /// A system call that failed.
    pub fn system(what: impl Into<String>, error: impl std::fmt::Display) -> Self {
        Self::System { what: what.into(), error: error.to_string() }
    }
}

fn list(refusals: &[(Backend, Failure)]) -> String {
    let mut text = String::new();
    for (_, failure) in refusals {
        let _ = write!(text, "\n  {failure}");
    }
    text
}
