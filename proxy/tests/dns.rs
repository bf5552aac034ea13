//! DNS capture as in a pod: the rules of `weft-init`, the built proxy as user 1337, an app as another user, and a resolver outside, in
//! network namespaces that belong to the test alone.

mod netns;

use netns::{as_app, pod_and_outside};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use weft_init::flags::{BackendChoice, Settings};

const PATIENCE: Duration = Duration::from_secs(10);
const OUTSIDE: [&str; 2] = ["10.66.0.1", "fd66::1"];

struct Proxy(Child);

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts the proxy with WEFT_DNS_CAPTURE in a mount namespace where resolv.conf says what the test wants.
fn start(dir: &std::path::Path, resolv_conf: &str) -> Proxy {
    use std::os::unix::fs::PermissionsExt as _;
    let (binary, file) = (dir.join("weft-proxy"), dir.join("resolv.conf"));
    // Where any user may get at it.
    std::fs::copy(env!("CARGO_BIN_EXE_weft-proxy"), &binary).unwrap();
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::write(&file, resolv_conf).unwrap();
    let script = format!(
        "mount --make-rprivate / && mount --bind {} /etc/resolv.conf && \
         exec setpriv --reuid 1337 --regid 1337 --clear-groups env WEFT_DNS_CAPTURE=true {}",
        file.display(),
        binary.display()
    );
    let child = Command::new("unshare").args(["--mount", "sh", "-c", &script]).process_group(0).spawn().unwrap();
    Proxy(child)
}

fn scrape() -> Option<String> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, 15020)).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    stream.write_all(b"GET /stats/prometheus HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").ok()?;
    let mut page = String::new();
    stream.read_to_string(&mut page).ok()?;
    Some(page)
}

const QUERY: &[u8] = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x06go-app\x07default\x03svc\0\0\x01\0\x01";

fn answer(query: &[u8], text: &[u8]) -> Vec<u8> {
    let mut answer = [query, text].concat();
    answer[2] |= 0x80;
    answer
}

#[test]
fn a_query_of_the_app_is_captured_and_answered() {
    let (pod, outside) = pod_and_outside();
    outside.enter();
    // The resolvers: they say who asked.
    let (told, heard) = mpsc::channel();
    for ip in OUTSIDE {
        let address = SocketAddr::new(ip.parse().unwrap(), 53);
        let (datagrams, streams) = (UdpSocket::bind(address).unwrap(), TcpListener::bind(address).unwrap());
        let tell = told.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 512];
            while let Ok((n, peer)) = datagrams.recv_from(&mut buffer) {
                tell.send((buffer[..n].to_vec(), peer)).unwrap();
                datagrams.send_to(&answer(&buffer[..n], b"by udp"), peer).unwrap();
            }
        });
        let tell = told.clone();
        std::thread::spawn(move || {
            for mut stream in streams.incoming().flatten() {
                let mut buffer = vec![0; 2 + QUERY.len()];
                stream.read_exact(&mut buffer).unwrap();
                tell.send((buffer[2..].to_vec(), stream.peer_addr().unwrap())).unwrap();
                let answer = answer(&buffer[2..], b"by tcp");
                stream.write_all(&[&(answer.len() as u16).to_be_bytes()[..], &answer].concat()).unwrap();
            }
        });
    }

    pod.enter();
    weft_init::apply(&Settings { dns_capture: true, ..Settings::default() }, BackendChoice::Auto).unwrap();
    let dir = tempfile::tempdir().unwrap();
    // The app asks a resolver that is not there: only the pod's own resolvers can answer.
    for (resolver, ask) in [("10.66.0.1", "10.66.0.99:53"), ("fd66::1", "[fd66::99]:53")] {
        let proxy = start(dir.path(), &format!("nameserver {resolver}\n"));
        let begun = Instant::now();
        while scrape().is_none() {
            assert!(begun.elapsed() < PATIENCE, "the proxy does not come up");
            std::thread::sleep(Duration::from_millis(10));
        }
        let ask: SocketAddr = ask.parse().unwrap();
        let any: SocketAddr = if ask.is_ipv4() { "0.0.0.0:0".parse().unwrap() } else { "[::]:0".parse().unwrap() };
        let app = as_app(|| UdpSocket::bind(any).unwrap());
        app.set_read_timeout(Some(PATIENCE)).unwrap();
        // Connected, so that only an answer from there is taken.
        app.connect(ask).unwrap();
        app.send(QUERY).unwrap();
        let mut buffer = [0; 512];
        let n = app.recv(&mut buffer).unwrap();
        assert_eq!(buffer[..n], answer(QUERY, b"by udp"));
        let (asked, peer) = heard.recv_timeout(PATIENCE).unwrap();
        assert_eq!(asked[2..], QUERY[2..]);
        assert_ne!(peer.port(), app.local_addr().unwrap().port());

        let mut app = as_app(|| TcpStream::connect_timeout(&ask, PATIENCE)).unwrap();
        app.set_read_timeout(Some(PATIENCE)).unwrap();
        app.write_all(&[&(QUERY.len() as u16).to_be_bytes()[..], QUERY].concat()).unwrap();
        let expected = answer(QUERY, b"by tcp");
        let mut buffer = vec![0; 2 + expected.len()];
        app.read_exact(&mut buffer).unwrap();
        assert_eq!(buffer[2..], expected);
        assert_eq!(heard.recv_timeout(PATIENCE).unwrap().0, QUERY);
        let page = scrape().unwrap();
        for transport in ["udp", "tcp"] {
            let line = format!("weft_dns_queries_total{{transport=\"{transport}\",outcome=\"answered\"}} 1");
            assert!(page.lines().any(|l| l == line), "{line} is not in {page}");
        }
        drop(proxy);
    }
    assert!(heard.try_recv().is_err(), "each query reached a resolver once");
}
