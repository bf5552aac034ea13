//! The authority and its certificates, on several replicas.

use crate::common::{FakeApi, eventually};
use rustls_pki_types::ServerName;
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use weft_control::ca::authority::{Authority, Clock, system_clock};
use weft_control::ca::issue;
use weft_control::ca::keeper::{Keeper, Outside, Plan, Setup, UserSecret};
use weft_control::ca::resolver::{Resolver, client_config, server_config};
use weft_control::ca::store::Store;
use weft_control::metrics::Metrics;
use weft_control::serve::tls;

const NAME: &str = "weft-control.weft-system.svc";
const SECRETS: &str = "api/v1/secrets";

pub(crate) struct Replica {
    pub(crate) keeper: Arc<Keeper>,
    resolver: Arc<Resolver>,
    metrics: Arc<Metrics>,
}

impl Replica {
    pub(crate) fn authority(&self) -> Arc<Authority> {
        self.keeper.authority().borrow().clone().unwrap()
    }

    pub(crate) fn bundle(&self) -> String {
        self.authority().bundle.to_string()
    }
}

pub(crate) fn plan(life: Duration) -> Plan {
    Plan {
        names: issue::serving_names("weft-control", "weft-system", "cluster.local"),
        life,
        leaf_life: Duration::from_secs(24 * 3600),
        delay: Duration::from_secs(300),
        secret: UserSecret::Default,
    }
}

pub(crate) async fn replica_of(store: Store, plan: Plan, clock: Clock) -> Replica {
    let (resolver, metrics) = (Arc::new(Resolver::default()), Arc::new(Metrics::default()));
    let (resolver_of, metrics_of) = (resolver.clone(), metrics.clone());
    let setup = Setup {
        store,
        plan,
        resolver: resolver_of,
        metrics: metrics_of,
        clock,
        news: None,
        authority: watch::Sender::new(None),
        status: watch::Sender::default(),
    };
    Replica { keeper: Arc::new(Keeper::open(setup).await), resolver, metrics }
}

async fn replica(api: &FakeApi, life: Duration) -> Replica {
    let store = Store::Secrets { client: api.client(), namespace: "weft-system".into() };
    replica_of(store, plan(life), system_clock()).await
}

fn lead(replica: &Replica, leads: bool) -> watch::Sender<bool> {
    let (leader, keeper) = (watch::Sender::new(leads), replica.keeper.clone());
    let follows = leader.subscribe();
    tokio::spawn(async move { Box::pin(keeper.run(follows, Outside::default())).await });
    leader
}

fn stored(api: &FakeApi, name: &str) -> String {
    use base64::Engine as _;
    let secret = api.get(SECRETS, "weft-system", name).unwrap();
    let data = secret["data"]["tls.crt"].as_str().unwrap();
    String::from_utf8(base64::engine::general_purpose::STANDARD.decode(data).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn replicas_that_start_together_agree() {
    for _ in 0..5 {
        let api = FakeApi::start().await;
        let life = Duration::from_secs(3600);
        let (a, b, c) = tokio::join!(replica(&api, life), replica(&api, life), replica(&api, life));
        assert_eq!(a.bundle(), b.bundle());
        assert_eq!(b.bundle(), c.bundle());
        assert_eq!(a.bundle(), stored(&api, "weft-ca"));
        let secret = api.get(SECRETS, "weft-system", "weft-ca").unwrap();
        assert_eq!(secret["type"], "kubernetes.io/tls");
        let again = replica(&api, life).await;
        assert_eq!(again.bundle(), a.bundle(), "a restart keeps the root");
    }
}

#[tokio::test]
async fn an_empty_secret_is_filled() {
    let api = FakeApi::start().await;
    for name in ["weft-ca", "weft-control-serving"] {
        api.put(SECRETS, json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": "weft-system"}}));
    }
    let replica = replica(&api, Duration::from_secs(3600)).await;
    assert_eq!(replica.bundle(), stored(&api, "weft-ca"));
    assert!(replica.resolver.is_set());
}

async fn call(address: std::net::SocketAddr, config: Arc<rustls::ClientConfig>) -> Result<Vec<u8>, String> {
    let stream = TcpStream::connect(address).await.map_err(|e| e.to_string())?;
    let mut tls = tokio_rustls::TlsConnector::from(config)
        .connect(ServerName::try_from(NAME).unwrap(), stream)
        .await
        .map_err(|e| e.to_string())?;
    tls.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.map_err(|e| e.to_string())?;
    let mut answer = Vec::new();
    let read = tls.read_to_end(&mut answer).await;
    if !answer.starts_with(b"HTTP/1.1 200") {
        return Err(format!("{read:?} {}", String::from_utf8_lossy(&answer)));
    }
    Ok(tls.get_ref().1.peer_certificates().unwrap()[0].to_vec())
}

/// A client that never stops calling sees new certificates and no failure, on the replica that renews and on the one
/// that follows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rotation_fails_no_call() {
    let api = FakeApi::start().await;
    let life = Duration::from_secs(3);
    let end = CancellationToken::new();
    let mut calls = Vec::new();
    let mut replicas = Vec::new();
    for leads in [true, false] {
        let replica = replica(&api, life).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = axum::Router::new().route("/", axum::routing::get(|| async { "ok" }));
        let config = Arc::new(server_config(replica.resolver.clone(), &[b"http/1.1"]));
        tokio::spawn(tls::serve(listener, config, router, end.clone(), Duration::from_secs(1)));
        let leader = lead(&replica, leads);
        let client = Arc::new(client_config(&replica.bundle()).unwrap());
        calls.push((address, client));
        replicas.push((replica, leader));
    }
    let begin = SystemTime::now();
    let count = Arc::new(AtomicU64::new(0));
    let mut clients = Vec::new();
    for (address, client) in calls {
        let count = count.clone();
        clients.push(tokio::spawn(async move {
            let mut seen = std::collections::HashSet::new();
            while begin.elapsed().unwrap() < Duration::from_secs(8) {
                // A new session each time: resumption would hide a certificate.
                let mut fresh = (*client).clone();
                fresh.resumption = rustls::client::Resumption::disabled();
                seen.insert(call(address, Arc::new(fresh)).await.unwrap());
                count.fetch_add(1, Ordering::Relaxed);
            }
            seen.len()
        }));
    }
    for client in clients {
        let certificates = client.await.unwrap();
        assert!(certificates >= 3, "saw {certificates} certificates in 8 s of 3 s lives");
    }
    assert!(count.load(Ordering::Relaxed) > 100);
    assert!(replicas[0].0.metrics.serving_renewals.get() >= 2);
    assert_eq!(replicas[1].0.metrics.serving_renewals.get(), 0);
    end.cancel();
}

#[tokio::test]
async fn a_damaged_or_deleted_serving_secret_is_put_right() {
    let api = FakeApi::start().await;
    let replica = replica(&api, Duration::from_secs(3600)).await;
    let _leader = lead(&replica, true);
    let root = replica.bundle();
    let good = |api: &FakeApi| {
        api.get(SECRETS, "weft-system", "weft-control-serving")?;
        let facts = issue::facts(&stored(api, "weft-control-serving")).ok()?;
        (!facts.is_ca && facts.names.contains(&NAME.to_owned())).then_some(())
    };
    tokio::time::sleep(Duration::from_millis(200)).await;
    let mut secret = api.get(SECRETS, "weft-system", "weft-control-serving").unwrap();
    use base64::Engine as _;
    secret["data"]["tls.crt"] = json!(base64::engine::general_purpose::STANDARD.encode(&root));
    api.put(SECRETS, secret);
    eventually("the damaged secret is replaced", || good(&api)).await;
    api.remove(SECRETS, "weft-system", "weft-control-serving");
    eventually("the deleted secret is made anew", || good(&api)).await;
    assert_eq!(stored(&api, "weft-ca"), root, "the root is never replaced by itself");
    // Not even when its Secret is deleted: every pod trusts it.
    api.remove(SECRETS, "weft-system", "weft-ca");
    eventually("the root comes back", || api.get(SECRETS, "weft-system", "weft-ca")).await;
    assert_eq!(stored(&api, "weft-ca"), root);
}

#[tokio::test]
async fn files_keep_the_root_over_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let open = || async {
        let plan = Plan { secret: UserSecret::None, ..plan(Duration::from_secs(3600)) };
        replica_of(Store::Folder(dir.path().join("state")), plan, system_clock()).await.bundle()
    };
    let first = open().await;
    assert_eq!(open().await, first);
    use std::os::unix::fs::PermissionsExt as _;
    let mode = std::fs::metadata(dir.path().join("state/authority.json")).unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0, "the key is for its owner only");
}
