//! The election of the replica that writes.

use crate::common::{FakeApi, eventually};
use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use weft_control::lease::{Candidate, Timing};

struct Replica {
    leads: watch::Receiver<bool>,
    end: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

fn replica(api: &FakeApi, identity: &str) -> Replica {
    let candidate = Candidate {
        client: api.client(),
        namespace: "weft-system".into(),
        name: "weft-control".into(),
        identity: identity.into(),
        timing: Timing { duration: Duration::from_secs(2), period: Duration::from_millis(200) },
    };
    let (leads, end) = (watch::Sender::new(false), CancellationToken::new());
    let receiver = leads.subscribe();
    let task = tokio::spawn(candidate.run(leads, Arc::default(), end.clone()));
    Replica { leads: receiver, end, task }
}

fn holder(api: &FakeApi) -> String {
    let lease = api.get("apis/coordination.k8s.io/v1/leases", "weft-system", "weft-control").unwrap_or_default();
    lease["spec"]["holderIdentity"].as_str().unwrap_or_default().to_owned()
}

async fn leads(replica: &Replica) {
    tokio::time::timeout(Duration::from_secs(10), replica.leads.clone().wait_for(|l| *l)).await.unwrap().unwrap();
}

#[tokio::test]
async fn one_leads_and_hands_over_at_once() {
    let api = FakeApi::start().await;
    let replicas: Vec<_> = ["a", "b", "c"].iter().map(|name| replica(&api, name)).collect();
    eventually("a leader", || replicas.iter().any(|r| *r.leads.borrow()).then_some(())).await;
    for _ in 0..20 {
        assert_eq!(replicas.iter().filter(|r| *r.leads.borrow()).count(), 1);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let (mut first, others): (Vec<_>, Vec<_>) = replicas.into_iter().partition(|r| *r.leads.borrow());
    let first = first.remove(0);
    first.end.cancel();
    let since = Instant::now();
    first.task.await.unwrap();
    assert!(!*first.leads.borrow());
    eventually("another leader", || others.iter().any(|r| *r.leads.borrow()).then_some(())).await;
    assert!(
        since.elapsed() < Duration::from_millis(1500),
        "a lease that was given back is not waited out: {:?}",
        since.elapsed()
    );
    let lease = api.get("apis/coordination.k8s.io/v1/leases", "weft-system", "weft-control").unwrap();
    assert_eq!(lease["spec"]["leaseTransitions"], 1);
}

#[tokio::test]
async fn a_leader_that_died_is_waited_out_by_our_own_clock() {
    let api = FakeApi::start().await;
    // Its clock was far ahead of ours: only the time that we see pass counts.
    api.put("apis/coordination.k8s.io/v1/leases", json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {"name": "weft-control", "namespace": "weft-system"},
        "spec": {"holderIdentity": "dead", "leaseDurationSeconds": 2, "leaseTransitions": 4, "renewTime": "2126-01-01T00:00:00.000000Z"}}));
    let since = Instant::now();
    let replica = replica(&api, "b");
    leads(&replica).await;
    assert!(since.elapsed() >= Duration::from_secs(2), "{:?}", since.elapsed());
    assert_eq!(holder(&api), "b");
}

#[tokio::test]
async fn a_leader_without_an_api_server_stops_leading_before_another_can_begin() {
    let api = FakeApi::start().await;
    let replica = replica(&api, "a");
    leads(&replica).await;
    let since = Instant::now();
    api.set_down(true);
    let mut leading = replica.leads.clone();
    tokio::time::timeout(Duration::from_secs(5), leading.wait_for(|l| !*l)).await.unwrap().unwrap();
    assert!(since.elapsed() < Duration::from_secs(2), "{:?}", since.elapsed());
    api.set_down(false);
    leads(&replica).await;
}
