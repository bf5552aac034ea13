//! The proxies that are measured: how each is configured as a plain forwarder of one worker, started, and ended.
//!
//! Every peer has the same three listeners in one configuration (HTTP/1.1, HTTP/2 and raw TCP), each with one fixed destination,
//! keeps connections to the backend, and writes no access log. Beyond that each runs with its defaults, for better or worse.

use crate::h1;
use crate::machine::Cores;
use crate::process::{self, Process};
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// A proxy to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum)]
pub(crate) enum Kind {
    /// `weft-proxy`.
    Weft,
    /// Envoy.
    Envoy,
    /// HAProxy.
    Haproxy,
    /// nginx.
    Nginx,
}

impl Kind {
    /// As on the command line and in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Weft => "weft",
            Self::Envoy => "envoy",
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx",
        }
    }
}

/// Where the executables are.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Binaries {
    /// weft-proxy, built with the profile that is to be measured.
    #[arg(long, value_name = "FILE", default_value = "target/dist/weft-proxy")]
    weft: PathBuf,
    /// weft-control, for pairs: it gives the proxies their identities.
    #[arg(long, value_name = "FILE", default_value = "target/dist/weft-control")]
    pub(crate) control: PathBuf,
    /// Envoy.
    #[arg(long, value_name = "FILE", default_value = "bench/.peers/python/envoy/_bin/envoy")]
    envoy: PathBuf,
    /// HAProxy.
    #[arg(long, value_name = "FILE", default_value = "/usr/sbin/haproxy")]
    haproxy: PathBuf,
    /// nginx.
    #[arg(long, value_name = "FILE", default_value = "/usr/sbin/nginx")]
    nginx: PathBuf,
}

impl Binaries {
    /// The executable of `kind`; an error if it isn't there.
    pub(crate) fn of(&self, kind: Kind) -> Result<&Path> {
        let path = match kind {
            Kind::Weft => &self.weft,
            Kind::Envoy => &self.envoy,
            Kind::Haproxy => &self.haproxy,
            Kind::Nginx => &self.nginx,
        };
        if !path.exists() {
            bail!(
                "{name} is not at {}: `bench/run.sh` builds and installs what is needed, --{name} FILE names another place, --peers leaves it out",
                path.display(),
                name = kind.name()
            );
        }
        Ok(path)
    }

    /// What the executable says of its version, in one line.
    pub(crate) fn version(&self, kind: Kind) -> Result<String> {
        let flag = if matches!(kind, Kind::Haproxy | Kind::Nginx) { "-v" } else { "--version" };
        let output = Command::new(self.of(kind)?).arg(flag).output()?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        let line = text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("unknown");
        // Envoy: `PATH  version: COMMIT/1.40.0/Clean/RELEASE/BoringSSL`.
        let line = line.split_once("version: ").map_or(line, |(_, rest)| rest.split_once('/').map_or(rest, |(_, v)| v));
        Ok(line.to_owned())
    }
}

/// One address per protocol: of a peer's listeners, or of the backends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ends {
    pub(crate) h1: SocketAddr,
    pub(crate) h2: SocketAddr,
    pub(crate) tcp: SocketAddr,
}

impl Ends {
    /// Three free ports of 127.0.0.1, which somebody else could take before they are used: not likely, and then an error.
    fn free() -> Result<Self> {
        let sockets = [(); 3].map(|()| std::net::TcpListener::bind("127.0.0.1:0"));
        let [h1, h2, tcp] = sockets;
        Ok(Self { h1: h1?.local_addr()?, h2: h2?.local_addr()?, tcp: tcp?.local_addr()? })
    }
}

/// A running peer. Ends with the value.
#[derive(Debug)]
pub(crate) struct Peer {
    process: Process,
    /// Its listeners.
    pub(crate) front: Ends,
    /// From exec to the end of the first request through it.
    pub(crate) startup: Duration,
}

impl Peer {
    /// Starts `kind` in front of `back` and waits until it serves.
    pub(crate) async fn start(kind: Kind, binaries: &Binaries, cores: Cores, back: Ends) -> Result<Self> {
        let dir = process::folder()?;
        let front = Ends::free()?;
        let command = command(kind, binaries.of(kind)?, front, back, dir.path())?;
        let mut process = Process::start(command, cores, dir)?;
        let startup = process.ready(async || h1::probe(front.h1).await).await.with_context(|| kind.name())?;
        Ok(Self { process, front, startup })
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }
}

fn command(kind: Kind, binary: &Path, front: Ends, back: Ends, dir: &Path) -> Result<Command> {
    let (file, text) = match kind {
        Kind::Weft => ("weft.yaml", weft(front, back)?),
        Kind::Envoy => ("envoy.yaml", envoy(front, back)),
        Kind::Haproxy => ("haproxy.cfg", haproxy(front, back)),
        Kind::Nginx => ("nginx.conf", nginx(front, back, dir)),
    };
    let path = dir.join(file);
    std::fs::write(&path, text).with_context(|| format!("can't write {}", path.display()))?;
    let mut command = Command::new(std::fs::canonicalize(binary)?);
    match kind {
        Kind::Weft => command.arg("--config").arg(path),
        Kind::Envoy => command.arg("-c").arg(path).args(["--concurrency", "1", "--disable-hot-restart", "-l", "error"]),
        Kind::Haproxy => command.arg("-db").arg("-f").arg(path),
        Kind::Nginx => command.arg("-p").arg(dir).arg("-c").arg(path),
    };
    Ok(command)
}

fn weft(front: Ends, back: Ends) -> Result<String> {
    let admin = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let mut text = format!("workers: 1\nadmin: {admin}\nlisteners:\n");
    for (protocol, front, back) in [("http1", front.h1, back.h1), ("http2", front.h2, back.h2), ("tcp", front.tcp, back.tcp)] {
        text.push_str(&format!("- address: {front}\n  direction: inbound\n  protocol: {protocol}\n  upstream: {back}\n"));
    }
    Ok(text)
}

fn envoy(front: Ends, back: Ends) -> String {
    const HCM: &str = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
    const ROUTER: &str = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";
    const TCP: &str = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
    const OPTIONS: &str = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    let mut listeners = String::new();
    let mut clusters = String::new();
    for (name, front, back) in [("h1", front.h1, back.h1), ("h2", front.h2, back.h2), ("tcp", front.tcp, back.tcp)] {
        let filter = match name {
            "tcp" => format!("{{name: tcp, typed_config: {{\"@type\": {TCP}, stat_prefix: tcp, cluster: tcp}}}}"),
            _ => format!(
                "{{name: http, typed_config: {{\"@type\": {HCM}, stat_prefix: {name}, codec_type: {}, \
                 route_config: {{virtual_hosts: [{{name: all, domains: ['*'], routes: [{{match: {{prefix: /}}, route: {{cluster: {name}}}}}]}}]}}, \
                 http_filters: [{{name: router, typed_config: {{\"@type\": {ROUTER}}}}}]}}}}",
                if name == "h1" { "HTTP1" } else { "HTTP2" }
            ),
        };
        listeners.push_str(&format!(
            "  - {{name: {name}, address: {}, filter_chains: [{{filters: [{filter}]}}]}}\n",
            envoy_address(front)
        ));
        let options = match name {
            "h2" => format!(
                ", typed_extension_protocol_options: {{envoy.extensions.upstreams.http.v3.HttpProtocolOptions: \
                 {{\"@type\": {OPTIONS}, explicit_http_config: {{http2_protocol_options: {{}}}}}}}}"
            ),
            _ => String::new(),
        };
        clusters.push_str(&format!(
            "  - {{name: {name}, type: STATIC, connect_timeout: 5s, load_assignment: {{cluster_name: {name}, \
             endpoints: [{{lb_endpoints: [{{endpoint: {{address: {}}}}}]}}]}}{options}}}\n",
            envoy_address(back)
        ));
    }
    format!("static_resources:\n  listeners:\n{listeners}  clusters:\n{clusters}")
}

fn envoy_address(address: SocketAddr) -> String {
    format!("{{socket_address: {{address: {}, port_value: {}}}}}", address.ip(), address.port())
}

fn haproxy(front: Ends, back: Ends) -> String {
    format!(
        "global\n  nbthread 1\n  maxconn 8000\n\
         defaults\n  timeout connect 5s\n  timeout client 5m\n  timeout server 5m\n\
         frontend h1\n  mode http\n  bind {}\n  default_backend h1\n\
         backend h1\n  mode http\n  http-reuse always\n  server s {}\n\
         frontend h2\n  mode http\n  bind {} proto h2\n  default_backend h2\n\
         backend h2\n  mode http\n  http-reuse always\n  server s {} proto h2\n\
         frontend tcp\n  mode tcp\n  bind {}\n  default_backend tcp\n\
         backend tcp\n  mode tcp\n  server s {}\n",
        front.h1, back.h1, front.h2, back.h2, front.tcp, back.tcp
    )
}

/// nginx speaks HTTP/2 to a server only by its gRPC module, which takes any request.
fn nginx(front: Ends, back: Ends, dir: &Path) -> String {
    let dir = dir.display();
    // Debian builds the module for raw TCP as a file of its own.
    let module = "/usr/lib/nginx/modules/ngx_stream_module.so";
    let load = if Path::new(module).exists() { format!("load_module {module};\n") } else { String::new() };
    // Root would become `nobody`, who may not read the folder.
    let user = if nix::unistd::geteuid().is_root() { "user root;\n" } else { "" };
    format!(
        "{load}{user}daemon off;\nmaster_process off;\npid {dir}/pid;\nerror_log stderr crit;\nworker_rlimit_nofile 20000;\n\
         events {{ worker_connections 12000; }}\n\
         http {{\n  access_log off;\n  keepalive_timeout 5m;\n  keepalive_requests 2000000000;\n\
         client_body_temp_path {dir}/1;\n  proxy_temp_path {dir}/2;\n  fastcgi_temp_path {dir}/3;\n  uwsgi_temp_path {dir}/4;\n  scgi_temp_path {dir}/5;\n\
         upstream h1 {{ server {}; keepalive 512; keepalive_requests 2000000000; }}\n\
         upstream h2 {{ server {}; keepalive 512; keepalive_requests 2000000000; }}\n\
         server {{ listen {}; location / {{ proxy_pass http://h1; proxy_http_version 1.1; proxy_set_header Connection \"\"; }} }}\n\
         server {{ listen {} http2; location / {{ grpc_pass grpc://h2; }} }}\n}}\n\
         stream {{ server {{ listen {}; proxy_pass {}; }} }}\n",
        back.h1, back.h2, front.h1, front.h2, front.tcp, back.tcp
    )
}
