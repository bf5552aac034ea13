use super::*;
use crate::source::wire::parse;
use axum::Router;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Redirect};
use axum::routing::get;
use serde_json::json;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

const KEYS: &str = r#"{"keys":[{"kty":"RSA","kid":"1","n":"AQAB","e":"AQAB"}]}"#;

/// An issuer on this machine, and how often it was asked for its keys.
async fn issuer() -> (String, Arc<AtomicUsize>, Arc<Mutex<Result<String, u16>>>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let answer = Arc::new(Mutex::new(Ok(KEYS.to_owned())));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (count, says, at) = (asked.clone(), answer.clone(), url.clone());
    let keys = move || {
        count.fetch_add(1, Ordering::SeqCst);
        let answer = says.lock().unwrap().clone();
        async move {
            match answer {
                Ok(text) => text.into_response(),
                Err(status) => StatusCode::from_u16(status).unwrap().into_response(),
            }
        }
    };
    let configuration = json!({"issuer": at, "jwks_uri": format!("{at}/keys")}).to_string();
    let router = Router::new()
        .route("/keys", get(keys))
        .route("/.well-known/openid-configuration", get(move || async move { configuration }))
        .route("/hop1", get(|| async { Redirect::to("/keys") }))
        .route("/hop2", get(|| async { Redirect::to("hop1") }))
        .route("/hop3", get(|| async { Redirect::to("/hop2") }))
        .route("/hop4", get(|| async { Redirect::to("/hop3") }))
        .route("/metadata", get(|| async { Redirect::to("http://169.254.169.254/latest/meta-data") }))
        .route("/large", get(|| async { "x".repeat(fetch::LARGEST + 1) }))
        .route("/text", get(|| async { "hello" }))
        .route("/none", get(|| async { r#"{"keys":[]}"# }))
        .route("/slow", get(|| async { std::future::pending::<&str>().await }));
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    (url, asked, answer)
}

#[tokio::test]
async fn what_is_fetched_and_what_is_not() {
    let (url, _, _) = issuer().await;
    let local = Fetcher::new("", true);
    let time = Duration::from_secs(5);
    let uri = |path: &str| KeySource::Uri(format!("{url}{path}"));
    for path in ["/keys", "/hop1", "/hop3"] {
        assert_eq!(local.keys(&uri(path), time).await.unwrap(), KEYS, "{path}");
    }
    assert_eq!(local.keys(&KeySource::Issuer(format!("{url}/")), time).await.unwrap(), KEYS);
    for (path, problem) in [
        ("/hop4", "redirects"),
        ("/metadata", "link-local"),
        ("/large", "longer than"),
        ("/text", "no JSON"),
        ("/none", "without keys"),
        ("/absent", "404"),
    ] {
        let error = local.keys(&uri(path), time).await.unwrap_err();
        assert!(error.contains(problem) && error.contains(path), "{path}: {error}");
    }
    let error = local.keys(&uri("/slow"), Duration::from_millis(100)).await.unwrap_err();
    assert!(error.contains("no answer"), "{error}");
    // This machine itself is only for whoever started us.
    let port = url.rsplit(':').next().unwrap();
    let strict = Fetcher::new("", false);
    for host in ["127.0.0.1", "localhost", "0.0.0.0", "[::ffff:127.0.0.1]", "[::1]"] {
        let error = strict.keys(&KeySource::Uri(format!("http://{host}:{port}/keys")), time).await.unwrap_err();
        assert!(error.contains("this machine itself"), "{host}: {error}");
    }
    for bad in ["ftp://x/y", "keys", "http://user@host/", "http:///x"] {
        assert!(strict.keys(&KeySource::Uri(bad.into()), time).await.is_err(), "{bad}");
    }
}

#[tokio::test]
async fn tls_is_checked_against_the_roots_that_are_given() {
    let root = crate::ca::issue::root(std::time::SystemTime::now()).unwrap();
    let names = vec!["localhost".to_owned()];
    let pair = crate::ca::signer::Signer::of_root(&root)
        .unwrap()
        .serving(&names, std::time::SystemTime::now(), Duration::from_secs(3600))
        .unwrap();
    let chain: Vec<_> = {
        use rustls_pki_types::pem::PemObject as _;
        rustls_pki_types::CertificateDer::pem_slice_iter(pair.certificate.as_bytes()).map(Result::unwrap).collect()
    };
    let key = {
        use rustls_pki_types::pem::PemObject as _;
        rustls_pki_types::PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap()
    };
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                let _ = stream.read(&mut [0; 4096]).await;
                let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{KEYS}", KEYS.len());
                let _ = stream.write_all(answer.as_bytes()).await;
                let _ = stream.shutdown().await;
            });
        }
    });
    let source = KeySource::Uri(format!("https://localhost:{port}/keys"));
    let time = Duration::from_secs(5);
    let error = Fetcher::new("", true).keys(&source, time).await.unwrap_err();
    assert!(error.contains("TLS"), "{error}");
    assert_eq!(Fetcher::new(&root.certificate, true).keys(&source, time).await.unwrap(), KEYS);
    let other = KeySource::Uri(format!("https://127.0.0.1:{port}/keys"));
    assert!(Fetcher::new(&root.certificate, true).keys(&other, time).await.unwrap_err().contains("TLS"), "another name");
}

fn policy(name: &str, uri: &str) -> crate::model::Object {
    parse(json!({"apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication", "metadata": {"name": name, "namespace": "shop"},
        "spec": {"jwtRules": [{"issuer": "me", "jwksUri": uri}]}}))
    .unwrap()
    .unwrap()
}

#[tokio::test]
async fn keys_are_fetched_once_for_all_and_kept_while_the_issuer_is_away() {
    let (url, asked, answer) = issuer().await;
    let uri = format!("{url}/keys");
    let index = Arc::new(Index::new([]));
    index.replace([policy("a", &uri), policy("b", &uri)]);
    index.publish();
    let (_mesh, mesh) = watch::channel(Arc::default());
    let (keys, mut seen) = watch::channel(Arc::default());
    let keeper =
        Keeper { index: index.clone(), mesh, keys, metrics: Arc::default(), local: true, refresh: Duration::from_secs(1) };
    let task = tokio::spawn(keeper.run());
    let source = KeySource::Uri(uri.clone());
    let wait = Duration::from_secs(10);
    let set = |keys: &Keys| keys.get(&source).cloned();
    tokio::time::timeout(wait, seen.wait_for(|k: &Arc<Keys>| set(k).is_some())).await.unwrap().unwrap();
    assert_eq!(set(&seen.borrow()).unwrap(), KeySet { jwks: KEYS.into(), error: String::new() });
    assert_eq!(asked.load(Ordering::SeqCst), 1);

    // A policy more for the same source is no further fetch.
    index.apply(policy("c", &uri));
    index.publish();
    *answer.lock().unwrap() = Err(503);
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    tokio::time::timeout(wait, seen.wait_for(|k| set(k).is_some_and(|s| !s.error.is_empty()))).await.unwrap().unwrap();
    let kept = set(&seen.borrow()).unwrap();
    assert!(kept.jwks == KEYS && kept.error.contains("503"), "{kept:?}");

    // It is tried again soon.
    let rotated = KEYS.replace("\"1\"", "\"2\"");
    *answer.lock().unwrap() = Ok(rotated.clone());
    tokio::time::timeout(wait, seen.wait_for(|k| set(k).is_some_and(|s| s.error.is_empty()))).await.unwrap().unwrap();
    assert_eq!(set(&seen.borrow()).unwrap().jwks, rotated);

    // A source that nobody names any more is forgotten.
    index.replace([]);
    index.publish();
    tokio::time::timeout(wait, seen.wait_for(|k| k.is_empty())).await.unwrap().unwrap();
    task.abort();
}

#[test]
fn delays_grow() {
    for (failures, around) in [(1u32, 1.0f64), (2, 2.0), (5, 16.0), (100, 300.0)] {
        let delay = backoff(failures).as_secs_f64();
        assert!(delay >= around * 0.79 && delay <= around * 1.21, "{failures}: {delay}");
    }
}
