use super::*;

/// A store whose time stands still until it is moved.
fn store(limits: Limits) -> Arc<Reports> {
    let mut reports = Reports::new(limits);
    // At the beginning of a minute, so that minutes are those of the test.
    reports.clock.wall = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    reports.clock.moved = Some(Arc::default());
    Arc::new(reports)
}

fn advance(reports: &Reports, time: Duration) {
    reports.clock.moved.as_ref().unwrap().fetch_add(time.as_millis() as u64, Ordering::Relaxed);
}

fn hello(pod: &str) -> Hello {
    Hello {
        namespace: "shop".into(),
        pod: pod.into(),
        version: "1".into(),
        addresses: vec!["10.0.0.1".into()],
        ..Hello::default()
    }
}

fn labels(name: &str) -> wire::Workload {
    wire::Workload { namespace: "shop".into(), kind: "Deployment".into(), name: name.into(), ..wire::Workload::default() }
}

fn edge(path: &str, count: u64) -> wire::Edge {
    wire::Edge {
        source_identity: "spiffe://cluster.local/ns/a/sa/b".into(),
        port: 8080,
        protocol: "http".into(),
        method: "GET".into(),
        path: path.into(),
        count,
        ..wire::Edge::default()
    }
}

fn hit(policy: &str, allowed: u64, denied: u64) -> wire::PolicyHits {
    wire::PolicyHits { policy: policy.into(), action: AuthorizationAction::Deny.into(), dry_run: false, allowed, denied }
}

#[test]
fn a_proxy_comes_goes_and_is_forgotten() {
    let reports = store(Limits::default());
    let first = reports.attach(&hello("cart"));
    first.workload(&labels("cart"));
    first.report(Report {
        certificate: Some(wire::CertificateState { identity: "spiffe://x".into(), not_after: 7, ..Default::default() }),
        ..Report::default()
    });
    // It reconnects before the old stream was noticed to be dead.
    advance(&reports, Duration::from_secs(10));
    let second = reports.attach(&hello("cart"));
    drop(first);
    let [proxy] = &reports.proxies()[..] else { panic!() };
    assert!(proxy.connected && proxy.gone == 0, "{proxy:?}");
    assert_eq!(proxy.certificate.as_ref().unwrap().not_after, 7);
    assert_eq!(proxy.workload.name, "cart");
    second.answered("no such protocol");
    drop(second);
    let [proxy] = &reports.proxies()[..] else { panic!() };
    assert!(!proxy.connected && proxy.gone == proxy.since && proxy.refused == "no such protocol");
    advance(&reports, Duration::from_secs(3599));
    assert_eq!(reports.proxies().len(), 1);
    advance(&reports, Duration::from_secs(2));
    assert!(reports.proxies().is_empty() && reports.lock().gone.is_empty());
}

#[test]
fn who_came_back_is_not_forgotten() {
    let reports = store(Limits::default());
    drop(reports.attach(&hello("cart")));
    advance(&reports, Duration::from_secs(1800));
    let back = reports.attach(&hello("cart"));
    back.report(Report { hits: vec![hit("shop/p", 1, 0)], ..Report::default() });
    advance(&reports, Duration::from_secs(1801));
    assert_eq!((reports.proxies().len(), reports.hits().len()), (1, 1));
    drop(back);
    advance(&reports, Duration::from_secs(3600));
    assert_eq!(reports.proxies().len(), 0);
    assert_eq!((reports.hits().len(), reports.lock().hit_count), (0, 0));
}

#[test]
fn those_that_are_gone_are_bounded() {
    let reports = store(Limits { gone: 5, ..Limits::default() });
    for n in 0..20 {
        drop(reports.attach(&hello(&format!("pod-{n:02}"))));
    }
    let names: Vec<_> = reports.proxies().into_iter().map(|p| p.pod).collect();
    assert_eq!(names, ["pod-15", "pod-16", "pod-17", "pod-18", "pod-19"]);
}

#[test]
fn edges_age_by_the_minute_and_name_the_workload() {
    let reports = store(Limits::default());
    let proxy = reports.attach(&hello("cart-1"));
    proxy.report(Report { edges: vec![edge("/early", 1)], ..Report::default() });
    proxy.workload(&labels("cart"));
    advance(&reports, Duration::from_secs(30 * 60));
    proxy.report(Report { edges: vec![edge("/late", 2), wire::Edge { port: 0, ..edge("/no", 1) }], ..Report::default() });
    let all = |since| {
        let mut found: Vec<_> = reports
            .edges(Duration::from_secs(since))
            .iter()
            .map(|(k, c)| format!("{} {} {}", k.destination.name, k.path, c.count))
            .collect();
        found.sort();
        found
    };
    assert_eq!(all(3600), ["cart /late 2", "cart-1 /early 1"]);
    assert_eq!(all(60), ["cart /late 2"]);
    assert_eq!(reports.kept(), Duration::from_secs(1800));
    advance(&reports, Duration::from_secs(31 * 60));
    assert_eq!(all(3600), ["cart /late 2"]);
    assert_eq!(reports.edges_dropped(), 0);
}

#[test]
fn a_proxy_that_reports_without_end_is_ignored() {
    let reports = store(Limits { burst: 3, pause: Duration::from_secs(1), ..Limits::default() });
    let (loud, quiet) = (reports.attach(&hello("loud")), reports.attach(&hello("quiet")));
    for _ in 0..10 {
        loud.report(Report { edges: vec![edge("/", 1)], ..Report::default() });
    }
    quiet.report(Report { edges: vec![edge("/", 1)], ..Report::default() });
    assert_eq!(counted(&reports), (4, 7));
    advance(&reports, Duration::from_secs(2));
    for _ in 0..3 {
        loud.report(Report::default());
    }
    assert_eq!(counted(&reports), (6, 8));
}

#[test]
fn hits_add_up_per_pod_and_policy_within_limits() {
    let reports = store(Limits { hits: 3, hits_per_pod: 2, ..Limits::default() });
    let (one, two) = (reports.attach(&hello("one")), reports.attach(&hello("two")));
    one.report(Report { hits: vec![hit("a/x", 1, 2), hit("a/y", 1, 0), hit("a/z", 1, 0)], ..Report::default() });
    one.report(Report { hits: vec![hit("a/x", 1, 1)], ..Report::default() });
    two.report(Report { hits: vec![hit("a/x", 5, 0), hit("a/y", 5, 0)], ..Report::default() });
    let found: Vec<_> =
        reports.hits().iter().map(|h| format!("{} {} {} {}/{}", h.policy, h.pod, h.action, h.allowed, h.denied)).collect();
    assert_eq!(found, ["a/x one DENY 2/3", "a/x two DENY 5/0", "a/y one DENY 1/0"]);
    assert_eq!(reports.lock().dropped.hits, 2);
}

#[test]
fn refusals_are_a_ring_and_texts_are_cut() {
    let reports = store(Limits { refusals: 4, refusals_per_report: 3, ..Limits::default() });
    let proxy = reports.attach(&hello("cart"));
    let refusal = |n: u64| wire::Refusal { time: n, request_id: format!("r{n}"), path: "ü".repeat(500), ..Default::default() };
    proxy.report(Report { refusals: (0..5).map(refusal).collect(), ..Report::default() });
    proxy.report(Report { refusals: (5..7).map(refusal).collect(), ..Report::default() });
    let found: Vec<_> = reports.refusals(|_| true, 100).iter().map(|r| r.request_id.clone()).collect();
    assert_eq!(found, ["r6", "r5", "r4", "r3"]);
    assert_eq!(reports.lock().dropped.refusals, 2);
    let [one] = &reports.refusals(|r| r.request_id == "r5", 100)[..] else { panic!() };
    assert_eq!((one.path.len(), one.pod.as_str(), one.namespace.as_str()), (256, "cart", "shop"));
}

#[test]
fn numbers() {
    let reports = store(Limits::default());
    let proxy = reports.attach(&hello("cart"));
    proxy.report(Report { edges: vec![edge("/", 1)], ..Report::default() });
    let mut registry = prometheus_client::registry::Registry::default();
    registry.register_collector(Box::new(Numbers(reports.clone())));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    for line in
        ["weft_reports_total 1", "weft_reports_edges 1", "weft_reports_proxies 1", "weft_reports_dropped_total{what=\"edge\"} 0"]
    {
        assert!(text.contains(line), "{line} in\n{text}");
    }
}

/// Reports that were taken, and those that were ignored.
fn counted(reports: &Reports) -> (u64, u64) {
    let state = reports.lock();
    (state.reports, state.dropped.reports)
}
