//! Who is asked: the nameservers of the pod's `/etc/resolv.conf`, which the kubelet writes by the pod's `dnsPolicy` and `dnsConfig`.
//! It is looked at again when it has changed, every few seconds at most.

use std::cell::RefCell;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// Where it usually is.
pub const RESOLV_CONF: &str = "/etc/resolv.conf";
/// How many of its nameservers count, as for any stub resolver (resolv.conf(5), `MAXNS`).
const MOST: usize = 3;
const LOOK: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Debug)]
pub struct Resolvers {
    fixed: Vec<SocketAddr>,
    file: PathBuf,
    read: RefCell<Option<Read>>,
}

#[derive(Debug)]
struct Read {
    looked: Instant,
    changed: Option<SystemTime>,
    servers: Vec<SocketAddr>,
}

impl Resolvers {
    /// These, or the file's if there are none.
    pub fn new(fixed: &[SocketAddr]) -> Self {
        Self::of_file(fixed, Path::new(RESOLV_CONF))
    }

    pub(super) fn of_file(fixed: &[SocketAddr], file: &Path) -> Self {
        Self { fixed: fixed.to_vec(), file: file.into(), read: RefCell::new(None) }
    }

    /// Who is to be asked, in order. May be empty.
    pub fn get(&self) -> Vec<SocketAddr> {
        self.at(Instant::now())
    }

    fn at(&self, now: Instant) -> Vec<SocketAddr> {
        if !self.fixed.is_empty() {
            return self.fixed.clone();
        }
        let mut read = self.read.borrow_mut();
        if let Some(read) = read.as_ref().filter(|read| now.duration_since(read.looked) < LOOK) {
            return read.servers.clone();
        }
        let changed = std::fs::metadata(&self.file).and_then(|meta| meta.modified()).ok();
        if let Some(read) = read.as_mut().filter(|read| read.changed.is_some() && read.changed == changed) {
            read.looked = now;
            return read.servers.clone();
        }
        let servers = match std::fs::read_to_string(&self.file) {
            Ok(text) => parse(&text),
            Err(error) => {
                crate::log::connection_error(&format_args!("DNS: {} can't be read: {error}", self.file.display()));
                Vec::new()
            }
        };
        *read = Some(Read { looked: now, changed, servers: servers.clone() });
        servers
    }
}

/// The nameservers of a `resolv.conf`; lines that can't be read don't count.
fn parse(text: &str) -> Vec<SocketAddr> {
    let servers = text.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let ip = (words.next() == Some("nameserver")).then(|| words.next()).flatten()?;
        ip.parse::<IpAddr>().ok()
    });
    servers.map(|ip| SocketAddr::new(ip, 53)).take(MOST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_three_nameservers_count() {
        let text = "# by the kubelet\nsearch default.svc.cluster.local\nnameserver 10.96.0.10\n nameserver\tfd00::a\n\
                    nameserver nonsense\nnameserver\noptions ndots:5\nnameserver 1.1.1.1\nnameserver 8.8.8.8\n";
        let expected = ["10.96.0.10:53", "[fd00::a]:53", "1.1.1.1:53"].map(|a| a.parse::<SocketAddr>().unwrap());
        assert_eq!(parse(text), expected);
    }

    #[test]
    fn a_changed_file_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("resolv.conf");
        let resolvers = Resolvers::of_file(&[], &file);
        let start = Instant::now();
        assert!(resolvers.at(start).is_empty());
        std::fs::write(&file, "nameserver 10.0.0.1").unwrap();
        assert!(resolvers.at(start).is_empty(), "not at once");
        assert_eq!(resolvers.at(start + LOOK), ["10.0.0.1:53".parse::<SocketAddr>().unwrap()]);
        std::fs::write(&file, "nameserver 10.0.0.2").unwrap();
        let later = SystemTime::now() + Duration::from_secs(9);
        std::fs::File::open(&file).unwrap().set_modified(later).unwrap();
        assert_eq!(resolvers.at(start + 2 * LOOK), ["10.0.0.2:53".parse::<SocketAddr>().unwrap()]);
    }

    #[test]
    fn fixed_ones_go_before_the_file() {
        let own: SocketAddr = "127.0.0.1:5300".parse().unwrap();
        assert_eq!(Resolvers::new(&[own]).get(), [own]);
    }
}
