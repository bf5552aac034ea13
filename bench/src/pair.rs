//! `weft-bench pair`: two proxies with mutual TLS between them, as every call in a mesh has it. The client's proxy takes plaintext, proves who it is,
//! and checks whose server it talks to; the app's proxy does the same the other way round, and asks its authorization policy.
//!
//! Both proxies of a pair share the peer's core, one worker each, and what is reported is the CPU time of the two together. Otherwise this is
//! as [`crate::proxy`]: interleaved rounds, rotated order, medians.

mod envoy;
mod haproxy;
mod run;
mod weft;

pub(crate) use run::{Args, run};

use crate::certs::{self, Authority};
use crate::machine::Cores;
use crate::peer::{Binaries, Ends, Kind as Program};
use crate::process::{self, Process};
use crate::{fetch, h1};
use anyhow::{Context, Result};
use clap::ValueEnum;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

/// A pair to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Two `weft-proxy`, with identities from a `weft-control`.
    Weft,
    /// Two Envoys, HTTP/1.1 between them.
    Envoy,
    /// Two Envoys, HTTP/2 between them.
    EnvoyH2,
    /// Two HAProxies.
    Haproxy,
}

/// What the two proxies speak with each other when the client speaks HTTP/1.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Between {
    Http1,
    Http2,
}

impl Kind {
    /// As on the command line and in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Weft => "weft",
            Self::Envoy => "envoy",
            Self::EnvoyH2 => "envoy-h2",
            Self::Haproxy => "haproxy",
        }
    }

    /// The program that is run twice.
    pub(crate) fn program(self) -> Program {
        match self {
            Self::Weft => Program::Weft,
            Self::Envoy | Self::EnvoyH2 => Program::Envoy,
            Self::Haproxy => Program::Haproxy,
        }
    }
}

/// An address per protocol; `opaque` is for connections that carry HTTP/1.1 while the proxies think of them as raw TCP.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fronts {
    pub(crate) h1: SocketAddr,
    pub(crate) h2: SocketAddr,
    pub(crate) tcp: SocketAddr,
    pub(crate) opaque: SocketAddr,
}

impl Fronts {
    fn free(host: [u8; 4]) -> Result<Self> {
        let [h1, h2, tcp, opaque] = free_ports(host)?;
        Ok(Self { h1, h2, tcp, opaque })
    }

    fn all(self) -> [SocketAddr; 4] {
        [self.h1, self.h2, self.tcp, self.opaque]
    }

    /// For loads over the protocols themselves.
    pub(crate) fn ends(self) -> Ends {
        Ends { h1: self.h1, h2: self.h2, tcp: self.tcp }
    }

    /// For loads of HTTP/1.1 over what is raw TCP to the proxies.
    pub(crate) fn opaque_ends(self) -> Ends {
        Ends { h1: self.opaque, ..self.ends() }
    }
}

/// Free ports of `host`, which somebody else could take before they are used: not likely, and then an error.
fn free_ports<const N: usize>(host: [u8; 4]) -> Result<[SocketAddr; N]> {
    let sockets = [(); N].map(|()| std::net::TcpListener::bind(SocketAddr::from((host, 0))));
    let mut ports = [SocketAddr::from((host, 0)); N];
    for (port, socket) in ports.iter_mut().zip(sockets) {
        *port = socket?.local_addr()?;
    }
    Ok(ports)
}

/// A running pair. Ends with the value.
#[derive(Debug)]
pub(crate) struct Pair {
    kind: Kind,
    /// Which the figures are about: the client's proxy, the app's proxy.
    proxies: [Process; 2],
    admin: [SocketAddr; 2],
    /// The listeners of the client's proxy.
    pub(crate) front: Fronts,
    /// What the proxies need and nobody measures.
    _control: Option<weft::Control>,
}

impl Pair {
    /// Starts `kind` in front of `back` and waits until all its listeners work.
    pub(crate) async fn start(kind: Kind, binaries: &Binaries, cores: Cores, back: Ends) -> Result<Self> {
        // The backend of raw connections with a request in them is that of HTTP/1.1.
        let back = Fronts { h1: back.h1, h2: back.h2, tcp: back.tcp, opaque: back.h1 };
        let (front, middle) = (Fronts::free([127, 0, 0, 1])?, Fronts::free(weft::SERVER_ADDRESS)?);
        let admin = free_ports([127, 0, 0, 1])?;
        let dirs = [process::folder()?, process::folder()?];
        let binary = binaries.of(kind.program())?;
        let (control, commands) = match kind {
            Kind::Weft => {
                let control = weft::Control::start(binaries, cores, middle).await?;
                let commands = control.commands(binary, [dirs[0].path(), dirs[1].path()], front, middle, back, admin)?;
                (Some(control), commands)
            }
            Kind::Envoy | Kind::EnvoyH2 | Kind::Haproxy => {
                let authority = Authority::new()?;
                let client = authority.write(dirs[0].path(), "client", &certs::identity("client"))?;
                let server = authority.write(dirs[1].path(), "server", &certs::identity("server"))?;
                let between = if kind == Kind::EnvoyH2 { Between::Http2 } else { Between::Http1 };
                let texts = if kind == Kind::Haproxy {
                    [haproxy::outbound(front, middle, &client), haproxy::inbound(middle, back, &server)]
                } else {
                    let outbound = envoy::outbound(front, middle, admin[0], &client, between);
                    let inbound = envoy::inbound(middle, back, admin[1], &server, between);
                    [outbound, inbound].map(|config| config.to_string())
                };
                let [a, b] = texts;
                (None, [foreign(kind, binary, dirs[0].path(), &a)?, foreign(kind, binary, dirs[1].path(), &b)?])
            }
        };
        let ([outbound, inbound], [dir_out, dir_in]) = (commands, dirs);
        let inbound = Process::start(inbound, cores, dir_in)?;
        let outbound = Process::start(outbound, cores, dir_out)?;
        let mut pair = Self { kind, proxies: [outbound, inbound], admin, front, _control: control };
        for to in [front.h1, front.opaque] {
            let ready = pair.proxies[0].ready(async || h1::probe(to).await).await;
            ready.with_context(|| format!("{}; the app's proxy says:\n{}", kind.name(), pair.proxies[1].last_words()))?;
        }
        Ok(pair)
    }

    /// Both proxies.
    pub(crate) fn pids(&self) -> [u32; 2] {
        [self.proxies[0].pid(), self.proxies[1].pid()]
    }

    /// TLS handshakes of the client's proxy so far, and how many of them resumed a session; `None` if the peer doesn't say.
    pub(crate) async fn handshakes(&self) -> Result<Option<(u64, u64)>> {
        match self.kind {
            Kind::Haproxy => Ok(None),
            Kind::Envoy | Kind::EnvoyH2 => {
                let text = fetch::text(self.admin[0], "/stats?filter=ssl").await?;
                Ok(Some(envoy::handshakes(&text).context("Envoy's /stats lacks the handshakes of cluster `opaque`")?))
            }
            Kind::Weft => {
                let text = fetch::text(self.admin[0], "/stats/prometheus").await?;
                Ok(Some(weft::handshakes(&text).context("weft-proxy's /metrics has no handshakes of outbound TLS")?))
            }
        }
    }
}

fn foreign(kind: Kind, binary: &Path, dir: &Path, text: &str) -> Result<Command> {
    let mut command = Command::new(std::fs::canonicalize(binary)?);
    let path = dir.join(if kind == Kind::Haproxy { "haproxy.cfg" } else { "envoy.json" });
    std::fs::write(&path, text).with_context(|| format!("can't write {}", path.display()))?;
    match kind {
        Kind::Haproxy => command.arg("-db").arg("-f").arg(path),
        _ => command.arg("-c").arg(path).args(["--concurrency", "1", "--disable-hot-restart", "-l", "error"]),
    };
    Ok(command)
}
