use super::*;

fn http(path: &str) -> SeenHttp<'_> {
    SeenHttp { method: "GET", path, host: b"app", principal: None, request_id: None }
}

fn seen<'a>(identity: Option<&'a str>, address: &str, http: Option<SeenHttp<'a>>) -> Seen<'a> {
    Seen { identity, address: address.parse().unwrap(), port: 8080, http, denied: false }
}

fn told(batch: &Batch) -> Vec<String> {
    let mut lines: Vec<String> = batch
        .edges
        .iter()
        .map(|e| {
            let source = if e.source_identity.is_empty() { &e.source_address } else { &e.source_identity };
            format!("{source} {} {} {}{} {}/{}", e.protocol, e.method, e.host, e.path, e.count, e.denied)
        })
        .collect();
    lines.sort();
    lines
}

#[test]
fn alike_requests_are_one_edge() {
    let collector = Collector::default();
    for _ in 0..3 {
        collector.seen(&seen(Some("spiffe://a"), "10.0.0.1", Some(http("/x"))));
    }
    // A mesh peer's address doesn't matter; one without identity is its address.
    collector.seen(&seen(Some("spiffe://a"), "10.0.0.2", Some(http("/x"))));
    collector.seen(&Seen { denied: true, ..seen(None, "10.0.0.1", Some(http("/x"))) });
    collector.seen(&seen(None, "::ffff:10.0.0.1", Some(http("/x"))));
    collector.seen(&seen(None, "10.0.0.2", Some(http("/x"))));
    collector.seen(&seen(None, "10.0.0.2", None));
    collector.seen(&Seen { port: 1, ..seen(None, "10.0.0.2", None) });
    collector.seen(&seen(None, "10.0.0.3", Some(SeenHttp { method: "CONNECT", ..http("") })));
    let unread = SeenHttp { method: "", path: "", host: b"", ..http("") };
    collector.seen(&Seen { denied: true, ..seen(None, "10.0.0.4", Some(unread)) });
    let batch = collector.take();
    assert_eq!(
        told(&batch),
        [
            "10.0.0.1 http GET app/x 2/1",
            "10.0.0.2 http GET app/x 1/0",
            "10.0.0.2 tcp   1/0",
            "10.0.0.2 tcp   1/0",
            "10.0.0.3 http CONNECT app/ 1/0",
            "10.0.0.4 http   1/1",
            "spiffe://a http GET app/x 4/0",
        ]
    );
    assert!(batch.edges.iter().all(|e| e.last > 1_700_000_000));
    assert!(collector.take().is_empty());
    collector.seen(&seen(Some("spiffe://a"), "10.0.0.1", Some(http("/x"))));
    assert_eq!(told(&collector.take()), ["spiffe://a http GET app/x 1/0"], "counted anew");
}

#[test]
fn what_clients_choose_is_bounded() {
    let dropped = Counter::default();
    let collector = Collector::new(dropped.clone());
    for n in 0..KEYS + 500 {
        collector.seen(&seen(Some("spiffe://a"), "10.0.0.1", Some(http(&format!("/{n}")))));
    }
    collector.seen(&seen(Some("spiffe://a"), "10.0.0.1", Some(SeenHttp { method: "X-ODD", ..http("/new") })));
    collector.seen(&seen(Some("spiffe://a"), "10.0.0.1", Some(http("/0"))));
    let batch = collector.take();
    assert_eq!(batch.edges.len(), KEYS + 2);
    assert!(told(&batch).contains(&"spiffe://a http GET  500/0".to_owned()));
    assert!(told(&batch).contains(&"spiffe://a http   1/0".to_owned()));
    assert!(told(&batch).contains(&"spiffe://a http GET app/0 2/0".to_owned()));
    assert_eq!(dropped.get(), 0);
    // Addresses without end.
    for n in 0..2 * FOLDED {
        collector.seen(&seen(None, &format!("10.1.{}.{}", n / 256, n % 256), Some(http("/"))));
    }
    assert_eq!(dropped.get() as usize, FOLDED + 2);
    // What is not met any more makes room.
    for _ in 0..=IDLE {
        collector.take();
    }
    assert_eq!((collector.gathered.borrow().edges.len(), collector.gathered.borrow().folded), (0, 0));
}

#[test]
fn hits_of_policies() {
    use wire::AuthorizationAction::{Allow, Deny};
    let collector = Collector::default();
    collector.hit("a/x", Deny, false, true);
    collector.hit("a/x", Deny, false, true);
    collector.hit("a/y", Allow, false, false);
    // The policy was made another one.
    collector.hit("a/x", Deny, true, true);
    collector.hit("a/x", Deny, false, true);
    collector.hit("a/x", Deny, true, true);
    let mut hits: Vec<_> = collector
        .take()
        .hits
        .iter()
        .map(|h| format!("{} {:?} {} {}/{}", h.policy, h.action(), h.dry_run, h.allowed, h.denied))
        .collect();
    hits.sort();
    assert_eq!(hits, ["a/x Deny false 0/3", "a/x Deny true 0/2", "a/y Allow false 1/0"]);
    assert!(collector.take().is_empty());
}

#[test]
fn refusals_are_few_and_short() {
    let collector = Collector::default();
    let long = "ü".repeat(300);
    let request = SeenHttp { request_id: Some(b"id-1"), ..http(&long) };
    for _ in 0..REFUSALS + 5 {
        collector.refused(&Seen { denied: true, ..seen(None, "10.0.0.1", Some(request)) }, "ns/p", "why");
    }
    let batch = collector.take();
    assert_eq!(batch.refusals.len(), REFUSALS);
    let one = &batch.refusals[0];
    assert_eq!((one.request_id.as_str(), one.policy.as_str(), one.path.len()), ("id-1", "ns/p", 256));
    let closed = Collector::closed();
    closed.seen(&seen(None, "10.0.0.1", None));
    closed.refused(&seen(None, "10.0.0.1", None), "", "");
    assert!(closed.take().is_empty());
}

#[test]
fn a_worker_hands_on_what_it_has_gathered() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (send, mut receive) = mpsc::channel(1);
    let collector = Collector::default();
    runtime.block_on(async {
        collector.seen(&seen(None, "10.0.0.1", None));
        let work = collector.run_every(Duration::from_millis(1), send);
        tokio::select! {
            () = work => panic!("it has ended"),
            batch = receive.recv() => assert_eq!(batch.unwrap().edges.len(), 1),
        }
    });
}
