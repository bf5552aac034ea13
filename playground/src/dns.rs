//! The cluster's name server: Services, their named ports, headless endpoints. Everything else doesn't exist, at once, because
//! a playground reaches nothing outside.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UdpSocket;

use crate::json::{flag, list, text};
use crate::netns;
use crate::node::Node;

const A: u16 = 1;
const CNAME: u16 = 5;
const PTR: u16 = 12;
const AAAA: u16 = 28;
const SRV: u16 = 33;
const ANY: u16 = 255;
const ZONE: &str = ".cluster.local";
/// Seconds, as the usual cluster name server says.
const TTL: u32 = 5;
/// What a UDP answer without EDNS may have.
const PLAIN: usize = 512;

/// A record of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Record {
    /// `A` or `AAAA`.
    Address(IpAddr),
    /// Port and target.
    Service(u16, String),
    /// Another name.
    Alias(String),
    /// The name of an address.
    Pointer(String),
}

impl Record {
    fn kind(&self) -> u16 {
        match self {
            Self::Address(IpAddr::V4(_)) => A,
            Self::Address(IpAddr::V6(_)) => AAAA,
            Self::Service(..) => SRV,
            Self::Alias(_) => CNAME,
            Self::Pointer(_) => PTR,
        }
    }
}

/// Host label, addresses and ports of a Service's endpoints.
type Endpoints = Vec<(String, Vec<IpAddr>, Vec<(String, String, u16)>)>;

fn endpoints(service: &Value, slices: &[Arc<Value>]) -> Endpoints {
    let all = flag(service, "/spec/publishNotReadyAddresses");
    let mut out = Vec::new();
    for slice in slices {
        let labelled = text(slice, "/metadata/labels/kubernetes.io~1service-name") == text(service, "/metadata/name");
        if !labelled || slice["metadata"]["namespace"] != service["metadata"]["namespace"] {
            continue;
        }
        let lower = |p: &Value, key: &str| text(p, key).to_lowercase();
        let ports: Vec<_> = list(slice, "/ports")
            .iter()
            .map(|p| (lower(p, "/name"), lower(p, "/protocol"), p["port"].as_u64().unwrap_or(0) as u16))
            .collect();
        for endpoint in list(slice, "/endpoints").iter().filter(|e| all || e["conditions"]["ready"] != false) {
            let addresses: Vec<IpAddr> = list(endpoint, "/addresses").iter().filter_map(|a| a.as_str()?.parse().ok()).collect();
            let host = match (text(endpoint, "/hostname"), addresses.first()) {
                ("", Some(ip)) => ip.to_string().replace(['.', ':'], "-"),
                (host, _) => host.to_owned(),
            };
            out.push((host, addresses, ports.clone()));
        }
    }
    out
}

/// All records of a name (lower case, without the last dot). `None`: there is no such name.
pub(crate) fn lookup(name: &str, services: &[Arc<Value>], slices: &[Arc<Value>]) -> Option<Vec<Record>> {
    if let Some(reverse) = name.strip_suffix(".in-addr.arpa") {
        let octets: Vec<&str> = reverse.rsplit('.').collect();
        let ip: Ipv4Addr = octets.join(".").parse().ok()?;
        let found = services.iter().find(|s| text(s, "/spec/clusterIP").parse() == Ok(ip))?;
        let (ns, name) = (text(found, "/metadata/namespace"), text(found, "/metadata/name"));
        return Some(vec![Record::Pointer(format!("{name}.{ns}.svc{ZONE}"))]);
    }
    let labels: Vec<&str> = name.strip_suffix(ZONE)?.split('.').collect();
    let (front, ns, service) = match labels.as_slice() {
        [front @ .., service, ns, "svc"] => (front, *ns, *service),
        _ => return None,
    };
    let service = services.iter().find(|s| s["metadata"]["name"] == service && s["metadata"]["namespace"] == ns)?;
    let base = format!("{}.{ns}.svc{ZONE}", text(service, "/metadata/name"));
    if text(service, "/spec/type") == "ExternalName" {
        return front.is_empty().then(|| vec![Record::Alias(text(service, "/spec/externalName").to_owned())]);
    }
    let cluster_ip: Option<IpAddr> = text(service, "/spec/clusterIP").parse().ok();
    let flat = |found: Endpoints| -> Vec<Record> { found.into_iter().flat_map(|(_, ips, _)| ips).map(Record::Address).collect() };
    let records = match (front, cluster_ip) {
        ([], Some(ip)) => vec![Record::Address(ip)],
        ([], None) => flat(endpoints(service, slices)),
        ([host], None) => flat(endpoints(service, slices).into_iter().filter(|(h, ..)| h == host).collect()),
        ([port, protocol], ip) if port.starts_with('_') && protocol.starts_with('_') => {
            let (port, protocol) = (&port[1..], &protocol[1..]);
            match ip {
                Some(_) => list(service, "/spec/ports")
                    .iter()
                    .filter(|p| {
                        text(p, "/name") == port
                            && (text(p, "/protocol").eq_ignore_ascii_case(protocol) || text(p, "/protocol").is_empty())
                    })
                    .map(|p| Record::Service(p["port"].as_u64().unwrap_or(0) as u16, base.clone()))
                    .collect(),
                None => endpoints(service, slices)
                    .into_iter()
                    .flat_map(|(host, _, ports)| ports.into_iter().map(move |p| (host.clone(), p)))
                    .filter(|(_, (name, kind, _))| name == port && kind == protocol)
                    .map(|(host, (.., number))| Record::Service(number, format!("{host}.{base}")))
                    .collect(),
            }
        }
        _ => return None,
    };
    // A headless Service exists without any endpoint; a name below one doesn't.
    (!records.is_empty() || front.is_empty()).then_some(records)
}

fn encode(name: &str, out: &mut Vec<u8>) {
    for label in name.split('.').filter(|l| !l.is_empty()) {
        let bytes = &label.as_bytes()[..label.len().min(63)];
        out.push(bytes.len() as u8);
        out.extend_from_slice(bytes);
    }
    out.push(0);
}

/// Name, type and end of the first question. Queries have no compressed names.
fn question(query: &[u8]) -> Option<(String, u16, usize)> {
    let (mut at, mut labels) = (12, Vec::new());
    loop {
        let length = usize::from(*query.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        if length > 63 {
            return None;
        }
        labels.push(String::from_utf8_lossy(query.get(at..at + length)?).to_lowercase());
        at += length;
    }
    let kind = u16::from_be_bytes([*query.get(at)?, *query.get(at + 1)?]);
    query.get(at + 4 - 1)?;
    Some((labels.join("."), kind, at + 4))
}

/// The answer to a query; `None` when there is nothing to answer to. At most `limit` bytes, then marked as truncated.
pub(crate) fn answer(query: &[u8], limit: usize, find: impl Fn(&str) -> Option<Vec<Record>>) -> Option<Vec<u8>> {
    if query.len() < 12 || query[2] & 0x80 != 0 {
        return None;
    }
    let header = |code: u8| [query[0], query[1], 0x84 | query[2] & 0x01, code, 0, 1, 0, 0, 0, 0, 0, 0];
    let Some((name, kind, end)) = question(query) else {
        let mut out = header(1).to_vec();
        out[5] = 0;
        return Some(out);
    };
    let records = find(&name);
    let mut out = header(if records.is_none() { 3 } else { 0 }).to_vec();
    out.extend_from_slice(&query[12..end]);
    let mut count = 0_u16;
    for record in records.into_iter().flatten() {
        if record.kind() != kind && kind != ANY && record.kind() != CNAME {
            continue;
        }
        let mut data = Vec::new();
        match &record {
            Record::Address(IpAddr::V4(ip)) => data.extend(ip.octets()),
            Record::Address(IpAddr::V6(ip)) => data.extend(ip.octets()),
            Record::Service(port, target) => {
                data.extend([0, 0, 0, 100]);
                data.extend(port.to_be_bytes());
                encode(target, &mut data);
            }
            Record::Alias(target) | Record::Pointer(target) => encode(target, &mut data),
        }
        if out.len() + 12 + data.len() > limit {
            out[2] |= 0x02;
            break;
        }
        out.extend([0xc0, 0x0c]);
        out.extend(record.kind().to_be_bytes());
        out.extend([0, 1]);
        out.extend(TTL.to_be_bytes());
        out.extend((data.len() as u16).to_be_bytes());
        out.extend(data);
        count += 1;
    }
    out[6..8].copy_from_slice(&count.to_be_bytes());
    Some(out)
}

/// Opens the sockets in the node's namespace and serves for as long as the process lives.
///
/// It listens on the Service's address itself, beside the node's: a resolver sends its questions for A and AAAA at the same time from
/// one port, and when two such packets are translated at once the kernel may drop one, which costs five seconds.
pub(crate) fn start(node: &Arc<Node>) -> anyhow::Result<()> {
    for ip in [netns::NODE, netns::DNS] {
        let socket = netns::within(&node.netns, move || {
            let socket = std::net::UdpSocket::bind((ip, 53))?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        })?;
        let listener = netns::listen(&node.netns, (ip, 53).into())?;
        tokio::spawn(udp(node.clone(), UdpSocket::from_std(socket)?));
        tokio::spawn(tcp(node.clone(), tokio::net::TcpListener::from_std(listener)?));
    }
    Ok(())
}

async fn udp(node: Arc<Node>, socket: UdpSocket) {
    let mut buffer = [0; 4096];
    loop {
        match socket.recv_from(&mut buffer).await {
            Ok((n, from)) => {
                let find = |name: &str| lookup(name, &node.services.all(), &node.slices.all());
                if let Some(reply) = answer(&buffer[..n], PLAIN, find) {
                    let _ = socket.send_to(&reply, from).await;
                }
            }
            // An ICMP error for an earlier answer.
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

async fn tcp(node: Arc<Node>, listener: tokio::net::TcpListener) {
    loop {
        let Ok((mut stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let node = node.clone();
        tokio::spawn(tokio::time::timeout(Duration::from_secs(10), async move {
            while let Ok(length) = stream.read_u16().await {
                let mut query = vec![0; usize::from(length)];
                stream.read_exact(&mut query).await?;
                let find = |name: &str| lookup(name, &node.services.all(), &node.slices.all());
                let Some(reply) = answer(&query, usize::from(u16::MAX), find) else { break };
                stream.write_u16(reply.len() as u16).await?;
                stream.write_all(&reply).await?;
            }
            std::io::Result::Ok(())
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn names_resolve_as_the_cluster_dns_specification_says() {
        let service = |name: &str, ip: &str| {
            Arc::new(
                json!({"metadata": {"name": name, "namespace": "n"}, "spec": {"clusterIP": ip, "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]}}),
            )
        };
        let services = [service("a", "10.96.0.2"), service("h", "None")];
        let slices = [Arc::new(
            json!({"metadata": {"namespace": "n", "labels": {"kubernetes.io/service-name": "h"}}, "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": [{"addresses": ["10.0.0.1"], "hostname": "zero"}, {"addresses": ["10.0.0.2"], "conditions": {"ready": false}}]}),
        )];
        let find = |name: &str| lookup(name, &services, &slices);
        let ip = |text: &str| Record::Address(text.parse().unwrap());
        let target = |name: &str| format!("{name}.n.svc.cluster.local");
        for (name, expected) in [
            ("a.n.svc.cluster.local", Some(vec![ip("10.96.0.2")])),
            ("h.n.svc.cluster.local", Some(vec![ip("10.0.0.1")])),
            ("zero.h.n.svc.cluster.local", Some(vec![ip("10.0.0.1")])),
            ("one.h.n.svc.cluster.local", None),
            ("_http._tcp.a.n.svc.cluster.local", Some(vec![Record::Service(80, target("a"))])),
            ("_http._tcp.h.n.svc.cluster.local", Some(vec![Record::Service(8080, target("zero.h"))])),
            ("2.0.96.10.in-addr.arpa", Some(vec![Record::Pointer(target("a"))])),
            ("b.n.svc.cluster.local", None),
            ("a.n.svc.cluster.local.n.svc.cluster.local", None),
            ("example.com", None),
        ] {
            assert_eq!(find(name), expected, "{name}");
        }
    }

    #[test]
    fn an_answer_has_the_question_and_says_when_nothing_is_there() {
        let mut query = vec![7, 8, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        encode("a.b", &mut query);
        query.extend([0, 1, 0, 1]);
        let reply =
            answer(&query, PLAIN, |name| (name == "a.b").then(|| vec![Record::Address("1.2.3.4".parse().unwrap())])).unwrap();
        assert_eq!((&reply[..2], reply[3], reply[7]), (&[7, 8][..], 0, 1));
        assert_eq!(&reply[reply.len() - 4..], [1, 2, 3, 4]);
        assert_eq!(answer(&query, PLAIN, |_| None).unwrap()[3], 3);
        // The name is there, the type isn't: no error, no record.
        let six = answer(&query, PLAIN, |_| Some(vec![Record::Address("::1".parse().unwrap())])).unwrap();
        assert_eq!((six[3], six[7]), (0, 0));
        assert!(answer(&query[..5], PLAIN, |_| None).is_none());
    }
}
