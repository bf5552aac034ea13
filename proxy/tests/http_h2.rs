//! HTTP/2 through the proxy: streams, trailers, resets, GOAWAY, tunnels. Both ends are spoken frame by frame.

mod support;

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream, client, server};
use http::{HeaderMap, Request, Response, StatusCode};
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use support::{PATIENCE, Proxy, nobody};
use tokio::net::{TcpListener, TcpStream};

type Responder = server::SendResponse<Bytes>;

/// What an app's connection is like.
#[derive(Clone, Copy)]
struct Manners {
    max_streams: u32,
    extended_connect: bool,
    /// GOAWAY after so many requests.
    requests: usize,
}

const PLAIN: Manners = Manners { max_streams: 1000, extended_connect: false, requests: usize::MAX };

/// An app whose requests are served by a function, each in a task. Counts its connections.
async fn app<F, Fut>(manners: Manners, serve: F) -> (SocketAddr, Arc<AtomicUsize>)
where
    F: Fn(Request<RecvStream>, Responder) -> Fut + Clone + Send + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let connections = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&connections);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            stream.set_nodelay(true).unwrap();
            count.fetch_add(1, Ordering::SeqCst);
            let serve = serve.clone();
            tokio::spawn(async move {
                let mut builder = server::Builder::new();
                builder.max_concurrent_streams(manners.max_streams);
                if manners.extended_connect {
                    builder.enable_connect_protocol();
                }
                let Ok(mut connection) = builder.handshake::<_, Bytes>(stream).await else { return };
                let mut served = 0;
                while let Some(Ok((request, responder))) = connection.accept().await {
                    tokio::spawn(serve(request, responder));
                    served += 1;
                    if served == manners.requests {
                        connection.graceful_shutdown();
                    }
                }
            });
        }
    });
    (addr, connections)
}

async fn connect(proxy: &Proxy) -> (client::SendRequest<Bytes>, tokio::task::JoinHandle<Result<(), h2::Error>>) {
    let stream = TcpStream::connect(proxy.addr).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let (sender, connection) = client::handshake(stream).await.unwrap();
    (sender, tokio::spawn(connection))
}

fn get(path: &str) -> Request<()> {
    Request::get(format!("http://app{path}")).body(()).unwrap()
}

fn post(path: &str) -> Request<()> {
    Request::post(format!("http://app{path}")).body(()).unwrap()
}

/// All of a body, and its trailers.
async fn read(mut body: RecvStream) -> Result<(Vec<u8>, Option<HeaderMap>), h2::Error> {
    let mut all = Vec::new();
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        all.extend_from_slice(&data);
    }
    Ok((all, body.trailers().await?))
}

async fn send_all(stream: &mut SendStream<Bytes>, mut data: Bytes, end: bool) -> Result<(), h2::Error> {
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        let n = match std::future::poll_fn(|cx| stream.poll_capacity(cx)).await {
            Some(n) => n?,
            // The stream is closed.
            None => return Err(Reason::STREAM_CLOSED.into()),
        };
        let piece = data.split_to(n.min(data.len()));
        stream.send_data(piece, end && data.is_empty())?;
    }
    Ok(())
}

async fn ok(_request: Request<RecvStream>, mut responder: Responder) {
    if let Ok(mut stream) = responder.send_response(Response::new(()), false) {
        let _ = stream.send_data(Bytes::from_static(b"ok"), true);
    }
}

/// Sends back each frame as it comes, then trailers.
async fn echo(request: Request<RecvStream>, mut responder: Responder) {
    let (head, mut body) = request.into_parts();
    let response = Response::builder().header("x-path", head.uri.path()).body(()).unwrap();
    let mut stream = responder.send_response(response, false).unwrap();
    while let Some(Ok(data)) = body.data().await {
        let _ = body.flow_control().release_capacity(data.len());
        if send_all(&mut stream, data, false).await.is_err() {
            return;
        }
    }
    let mut trailers = body.trailers().await.ok().flatten().unwrap_or_default();
    trailers.insert("grpc-status", "0".parse().unwrap());
    let _ = stream.send_trailers(trailers);
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("in time")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_flow_both_ways_at_once_and_end_with_trailers() {
    let (app, _) = app(PLAIN, echo).await;
    let proxy = Proxy::to(app);
    let (mut sender, _connection) = connect(&proxy).await;
    let mut request = post("/package.Service/Method");
    request.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
    request.headers_mut().insert("te", "trailers".parse().unwrap());
    let (response, mut up) = sender.send_request(request, false).unwrap();
    let response = within(response).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["x-path"], "/package.Service/Method");
    assert!(!response.headers().contains_key("date"), "the proxy adds nothing");
    let mut down = response.into_body();
    for n in 1..50 {
        let message = Bytes::from(vec![n; usize::from(n) * 17]);
        up.send_data(message.clone(), false).unwrap();
        let mut got = Vec::new();
        while got.len() < message.len() {
            let data = within(down.data()).await.unwrap().unwrap();
            down.flow_control().release_capacity(data.len()).unwrap();
            got.extend_from_slice(&data);
        }
        assert_eq!(got, message);
    }
    let mut trailers = HeaderMap::new();
    trailers.insert("sum", "7".parse().unwrap());
    up.send_trailers(trailers).unwrap();
    let (rest, trailers) = within(read(down)).await.unwrap();
    let trailers = trailers.unwrap();
    assert!(rest.is_empty());
    assert_eq!(trailers["sum"], "7");
    assert_eq!(trailers["grpc-status"], "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_is_shared_and_more_are_made_when_its_streams_are_used_up() {
    async fn slow(request: Request<RecvStream>, responder: Responder) {
        tokio::time::sleep(Duration::from_millis(200)).await;
        ok(request, responder).await;
    }
    for (max_streams, most) in [(1000, 1), (10, 12)] {
        let (app, connections) = app(Manners { max_streams, ..PLAIN }, slow).await;
        let proxy = Proxy::to(app);
        let (mut sender, _connection) = connect(&proxy).await;
        // Lets the app's settings arrive.
        within(sender.send_request(get("/"), true).unwrap().0).await.unwrap();
        let mut waiting = Vec::new();
        for _ in 0..100 {
            sender = sender.ready().await.unwrap();
            waiting.push(sender.send_request(get("/"), true).unwrap().0);
        }
        for response in waiting {
            let response = within(response).await.unwrap();
            assert_eq!(within(read(response.into_body())).await.unwrap().0, b"ok");
        }
        let made = connections.load(Ordering::SeqCst);
        assert!((1..=most).contains(&made), "{made} connections for {max_streams} streams each");
        assert_eq!(made > 1, most > 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_app_that_goes_away_all_the_time_causes_no_error() {
    const EACH: usize = 300;
    let (app, connections) = app(Manners { requests: 7, ..PLAIN }, echo).await;
    let proxy = Proxy::to(app);
    let (sender, _connection) = connect(&proxy).await;
    let mut tasks = Vec::new();
    for task in 0..8 {
        let sender = sender.clone();
        tasks.push(tokio::spawn(async move {
            for n in 0..EACH {
                let (response, mut up) = sender.clone().ready().await.unwrap().send_request(post("/"), false).unwrap();
                up.send_data(Bytes::from_static(b"once"), true).unwrap();
                let response = within(response).await.unwrap();
                let status = response.status();
                let body = within(read(response.into_body())).await.unwrap().0;
                assert_eq!((status.as_u16(), &body[..]), (200, &b"once"[..]), "request {n} of task {task}");
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    assert!(connections.load(Ordering::SeqCst) > 8 * EACH / 7 / 8);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_stream_is_sent_again_with_its_body_and_no_other_reset_is() {
    let tries = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&tries);
    let (app, _) = app(PLAIN, move |request: Request<RecvStream>, mut responder: Responder| {
        let count = Arc::clone(&count);
        async move {
            let tried = count.fetch_add(1, Ordering::SeqCst);
            let path = request.uri().path().to_owned();
            let (_, mut body) = request.into_parts();
            let first = body.data().await;
            match (&*path, tried) {
                ("/refuse", 0) => responder.send_reset(Reason::REFUSED_STREAM),
                ("/internal", _) => responder.send_reset(Reason::INTERNAL_ERROR),
                _ => {
                    let data = first.and_then(Result::ok).unwrap_or_default();
                    let mut stream = responder.send_response(Response::new(()), false).unwrap();
                    stream.send_data(data, true).unwrap();
                }
            }
        }
    })
    .await;
    let proxy = Proxy::to(app);
    let (mut sender, _connection) = connect(&proxy).await;
    for (path, status, expected, times) in [("/refuse", 200, "payload", 2), ("/internal", 503, "", 1)] {
        tries.store(0, Ordering::SeqCst);
        let (response, mut up) = sender.send_request(post(path), false).unwrap();
        up.send_data(Bytes::from_static(b"payload"), true).unwrap();
        let response = within(response).await.unwrap();
        assert_eq!(response.status().as_u16(), status, "{path}");
        let body = within(read(response.into_body())).await.unwrap().0;
        assert!(status != 200 || body == expected.as_bytes());
        assert_eq!(tries.load(Ordering::SeqCst), times, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_app_that_cannot_be_reached_is_told_in_the_clients_terms() {
    let proxy = Proxy::to(nobody());
    let (mut sender, _connection) = connect(&proxy).await;
    let response = within(sender.send_request(get("/"), true).unwrap().0).await.unwrap();
    assert_eq!(response.status(), 503);
    let body = within(read(response.into_body())).await.unwrap().0;
    assert!(String::from_utf8(body).unwrap().contains("[UF]"));

    let mut request = post("/package.Service/Method");
    request.headers_mut().insert("content-type", "application/grpc+proto".parse().unwrap());
    let (response, mut up) = sender.send_request(request, false).unwrap();
    let _ = up.send_data(Bytes::from_static(b"\0\0\0\0\0"), true);
    let response = within(response).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["grpc-status"], "14");
    assert!(response.headers()["grpc-message"].to_str().unwrap().contains("[UF]"));
    assert!(response.into_body().is_end_stream());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_may_not_be_forwarded_are_refused_alone() {
    let (app, _) = app(PLAIN, ok).await;
    let proxy = Proxy::to(app);
    let (mut sender, _connection) = connect(&proxy).await;
    let with = |name: &'static str, value: &str| {
        let mut request = get("/");
        request.headers_mut().insert(name, value.parse().unwrap());
        request
    };
    let mut many = get("/");
    for n in 0..201 {
        many.headers_mut().append("x", n.into());
    }
    for (request, status) in
        [(with("host", "other"), 400), (with("host", "app"), 200), (many, 431), (with("te", "trailers"), 200)]
    {
        let response = within(sender.send_request(request, true).unwrap().0).await.unwrap();
        assert_eq!(response.status().as_u16(), status);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_resets_its_stream_resets_the_apps() {
    let (reset, resets) = std::sync::mpsc::channel();
    let (app, _) = app(PLAIN, move |_request: Request<RecvStream>, mut responder: Responder| {
        let reset = reset.clone();
        async move {
            let reason = std::future::poll_fn(|cx| responder.poll_reset(cx)).await;
            let _ = reset.send(reason.ok());
        }
    })
    .await;
    let proxy = Proxy::to(app);
    let (mut sender, _connection) = connect(&proxy).await;
    let (response, mut up) = sender.send_request(post("/"), false).unwrap();
    up.send_data(Bytes::from_static(b"x"), false).unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    up.send_reset(Reason::CANCEL);
    drop(response);
    let reason = tokio::task::spawn_blocking(move || resets.recv_timeout(PATIENCE)).await.unwrap().unwrap();
    assert_eq!(reason, Some(Reason::CANCEL));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_websocket_over_http_2_is_a_tunnel_with_half_close() {
    async fn tunnel(request: Request<RecvStream>, mut responder: Responder) {
        assert_eq!(request.extensions().get::<h2::ext::Protocol>().map(h2::ext::Protocol::as_str), Some("websocket"));
        let mut body = request.into_body();
        let mut stream = responder.send_response(Response::new(()), false).unwrap();
        while let Some(Ok(data)) = body.data().await {
            let _ = body.flow_control().release_capacity(data.len());
            send_all(&mut stream, data, false).await.unwrap();
        }
        // The client's direction is closed, this one is not.
        stream.send_data(Bytes::from_static(b"bye"), true).unwrap();
    }
    for offered in [true, false] {
        let (app, _) = app(Manners { extended_connect: offered, ..PLAIN }, tunnel).await;
        let proxy = Proxy::to(app);
        let (mut sender, _connection) = connect(&proxy).await;
        // Extended CONNECT may only be used once the proxy's settings are here.
        while !sender.is_extended_connect_protocol_enabled() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let mut request = Request::connect("http://app/chat").body(()).unwrap();
        request.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
        let (response, mut up) = sender.send_request(request, false).unwrap();
        let response = within(response).await.unwrap();
        if !offered {
            assert_eq!(response.status(), 501);
            continue;
        }
        assert_eq!(response.status(), 200);
        let mut down = response.into_body();
        up.send_data(Bytes::from_static(b"hello"), false).unwrap();
        assert_eq!(within(down.data()).await.unwrap().unwrap(), "hello");
        up.send_data(Bytes::new(), true).unwrap();
        assert_eq!(within(read(down)).await.unwrap().0, b"bye");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_holds_the_app_back() {
    const BLOCK: usize = 64 * 1024;
    let sent = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&sent);
    let (app, _) = app(PLAIN, move |_request: Request<RecvStream>, mut responder: Responder| {
        let count = Arc::clone(&count);
        async move {
            let mut stream = responder.send_response(Response::new(()), false).unwrap();
            while send_all(&mut stream, Bytes::from(vec![7; BLOCK]), false).await.is_ok() {
                count.fetch_add(BLOCK, Ordering::SeqCst);
            }
        }
    })
    .await;
    let proxy = Proxy::to(app);
    let (mut sender, _connection) = connect(&proxy).await;
    let response = within(sender.send_request(get("/"), true).unwrap().0).await.unwrap();
    let body = response.into_body();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let first = sent.load(Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(sent.load(Ordering::SeqCst), first, "the app goes on sending");
    assert!(first < 8 * 1024 * 1024, "{first} bytes are in flight");
    drop(body);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_is_a_goaway_and_ends_with_the_last_stream() {
    async fn slow(request: Request<RecvStream>, responder: Responder) {
        tokio::time::sleep(Duration::from_millis(300)).await;
        ok(request, responder).await;
    }
    let (app, _) = app(PLAIN, slow).await;
    let proxy = Proxy::to(app);
    let (mut sender, connection) = connect(&proxy).await;
    let response = sender.send_request(get("/"), true).unwrap().0;
    tokio::time::sleep(Duration::from_millis(100)).await;
    proxy.drain.start();
    let response = within(response).await.unwrap();
    assert_eq!(within(read(response.into_body())).await.unwrap().0, b"ok");
    within(connection).await.unwrap().expect("a graceful end");
    let begun = std::time::Instant::now();
    while proxy.drain.open() > 0 {
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_bodies_pass_whole() {
    const SIZE: usize = 50 * 1024 * 1024;
    let (app, _) = app(PLAIN, echo).await;
    let proxy = Proxy::to(app);
    let (mut sender, _connection) = connect(&proxy).await;
    let (response, mut up) = sender.send_request(post("/"), false).unwrap();
    let sending = tokio::spawn(async move { send_all(&mut up, Bytes::from(vec![3; SIZE]), true).await });
    let response = within(response).await.unwrap();
    let (body, _) = tokio::time::timeout(PATIENCE * 4, read(response.into_body())).await.unwrap().unwrap();
    assert!(body.len() == SIZE && body.iter().all(|byte| *byte == 3));
    sending.await.unwrap().unwrap();
}
