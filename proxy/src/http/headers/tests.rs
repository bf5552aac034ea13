use super::*;
use http::{Request, Response};

const ORIGINAL: &str = "10.1.2.3:8080";

fn request(method: &str, uri: &str, version: Version, fields: &[(&str, &str)]) -> RequestHead {
    let mut builder = Request::builder().method(method).uri(uri).version(version);
    for (name, value) in fields {
        builder = builder.header(*name, *value);
    }
    builder.body(()).unwrap().into_parts().0
}

fn fields(headers: &HeaderMap) -> Vec<(String, String)> {
    headers.iter().map(|(n, v)| (n.to_string(), v.to_str().unwrap().to_owned())).collect()
}

type Fields = &'static [(&'static str, &'static str)];

fn prepared(
    head: &mut RequestHead,
    from: Wire,
    to: Wire,
    direction: Direction,
) -> Result<(String, Vec<(String, String)>), Refusal> {
    prepare_request(head, from, to, direction, ORIGINAL.parse().unwrap())?;
    Ok((head.uri.to_string(), fields(&head.headers)))
}

#[test]
fn requests_over_http_1() {
    use Direction::{Inbound, Outbound};
    type Case = (&'static str, &'static str, Version, Fields, Direction, Result<(&'static str, Fields), Refusal>);
    let h11 = Version::HTTP_11;
    let table: &[Case] = &[
        ("GET", "/a?b", h11, &[("host", "x"), ("a", "1")], Inbound, Ok(("/a?b", &[("host", "x"), ("a", "1")]))),
        // Hop-by-hop fields go, the rest keeps its order, framing cannot be withdrawn.
        (
            "POST",
            "/",
            h11,
            &[
                ("connection", "keep-alive, x-secret, Host, content-length"),
                ("host", "x"),
                ("x-secret", "1"),
                ("keep-alive", "timeout=5"),
                ("proxy-connection", "keep-alive"),
                ("content-length", "3"),
                ("z", "2"),
            ],
            Inbound,
            Ok(("/", &[("host", "x"), ("content-length", "3"), ("z", "2")])),
        ),
        (
            "GET",
            "/",
            h11,
            &[("host", "x"), ("te", "gzip, trailers"), ("connection", "te"), ("trailer", "sum")],
            Inbound,
            Ok(("/", &[("host", "x"), ("te", "trailers"), ("connection", "TE"), ("trailer", "sum")])),
        ),
        ("GET", "/", h11, &[("host", "x"), ("te", "gzip")], Inbound, Ok(("/", &[("host", "x")]))),
        (
            "GET",
            "/",
            h11,
            &[("host", "x"), ("connection", "Upgrade, HTTP2-Settings"), ("upgrade", "h2c"), ("http2-settings", "AA")],
            Inbound,
            Ok(("/", &[("host", "x")])),
        ),
        (
            "GET",
            "/",
            h11,
            &[("host", "x"), ("connection", "Upgrade"), ("upgrade", "websocket")],
            Inbound,
            Ok(("/", &[("host", "x"), ("connection", "upgrade"), ("upgrade", "websocket")])),
        ),
        // Not nominated: not forwarded.
        ("GET", "/", h11, &[("host", "x"), ("upgrade", "websocket")], Inbound, Ok(("/", &[("host", "x")]))),
        // Targets and Host.
        ("GET", "http://y/p?q", h11, &[("host", "x")], Inbound, Ok(("/p?q", &[("host", "y")]))),
        ("GET", "http://y/p", h11, &[("host", "x")], Outbound, Ok(("http://y/p", &[("host", "y")]))),
        ("GET", "http://u@y/p", h11, &[("host", "y")], Outbound, Err(Refusal::BadTarget)),
        ("OPTIONS", "*", h11, &[("host", "x")], Inbound, Ok(("*", &[("host", "x")]))),
        ("GET", "*", h11, &[("host", "x")], Inbound, Err(Refusal::BadTarget)),
        ("GET", "y:80", h11, &[("host", "y")], Inbound, Err(Refusal::BadTarget)),
        ("CONNECT", "y:80", h11, &[("host", "x")], Outbound, Ok(("y:80", &[("host", "y:80")]))),
        ("CONNECT", "/p", h11, &[("host", "x")], Outbound, Err(Refusal::BadTarget)),
        ("GET", "/", h11, &[], Inbound, Err(Refusal::NoHost)),
        ("GET", "/", h11, &[("host", "")], Inbound, Ok(("/", &[("host", "")]))),
        ("GET", "/", h11, &[("host", "a"), ("host", "a")], Inbound, Err(Refusal::ManyHosts)),
        ("GET", "/", h11, &[("host", "a b")], Inbound, Err(Refusal::BadHost)),
        ("GET", "/", h11, &[("host", "a/b")], Inbound, Err(Refusal::BadHost)),
        ("GET", "/", h11, &[("host", "a@b")], Inbound, Err(Refusal::BadHost)),
        ("GET", "/", h11, &[("host", "a,b")], Inbound, Err(Refusal::BadHost)),
        ("GET", "/", h11, &[("host", "[::1]:80")], Inbound, Ok(("/", &[("host", "[::1]:80")]))),
        ("GET", "/", Version::HTTP_10, &[], Inbound, Ok(("/", &[("host", ORIGINAL)]))),
        ("POST", "/", h11, &[("host", "a"), ("transfer-encoding", "gzip, chunked")], Inbound, Err(Refusal::TransferEncoding)),
    ];
    for (method, uri, version, given, direction, expected) in table {
        let mut head = request(method, uri, *version, given);
        let got = prepared(&mut head, Wire::H1, Wire::H1, *direction);
        let expected = expected.as_ref().map_err(|e| *e).map(|(uri, fields)| {
            let fields = fields.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect::<Vec<_>>();
            ((*uri).to_owned(), fields)
        });
        assert_eq!(got, expected, "{method} {uri} {given:?}");
        if got.is_ok() {
            assert_eq!(head.version, Version::HTTP_11);
        }
    }
}

#[test]
fn wishes_are_read() {
    let head = |fields: &[(&str, &str)]| {
        let mut head = request("POST", "/", Version::HTTP_11, fields);
        prepare_request(&mut head, Wire::H1, Wire::H1, Direction::Inbound, ORIGINAL.parse().unwrap()).unwrap()
    };
    assert!(head(&[("host", "x"), ("expect", "100-Continue")]).expect_continue);
    assert!(head(&[("host", "x"), ("content-type", "application/grpc+proto")]).grpc);
    assert!(!head(&[("host", "x"), ("content-type", "application/grpc-web")]).grpc);
    let upgrade = head(&[("host", "x"), ("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")]);
    assert!(upgrade.upgrade && upgrade.opaque_after);
    let stray = head(&[("host", "x"), ("upgrade", "websocket")]);
    assert!(!stray.upgrade && stray.opaque_after);
    assert_eq!(head(&[("host", "x"), ("connection", "upgrade"), ("upgrade", "h2c")]), Wishes::default());
}

#[test]
fn too_many_fields_are_refused() {
    let mut head = request("GET", "/", Version::HTTP_11, &[("host", "x")]);
    for n in 0..MAX_FIELDS {
        head.headers.append("x", HeaderValue::from(n));
    }
    let refused = prepared(&mut head, Wire::H1, Wire::H1, Direction::Inbound).unwrap_err();
    assert_eq!(refused.status(), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
}

#[test]
fn requests_change_versions() {
    let mut head = request("GET", "http://y:80/p?q", Version::HTTP_2, &[("cookie", "a=1"), ("cookie", "b=2")]);
    let got = prepared(&mut head, Wire::H2, Wire::H1, Direction::Inbound).unwrap();
    let cookie = ("cookie".to_owned(), "a=1; b=2".to_owned());
    assert_eq!(got, ("/p?q".to_owned(), vec![cookie, ("host".to_owned(), "y:80".to_owned())]));

    let given = [("host", "y"), ("transfer-encoding", "chunked"), ("te", "trailers"), ("connection", "te")];
    let mut head = request("POST", "/p", Version::HTTP_11, &given);
    let got = prepared(&mut head, Wire::H1, Wire::H2, Direction::Inbound).unwrap();
    assert_eq!(got, ("http://y/p".to_owned(), vec![("te".to_owned(), "trailers".to_owned())]));
    assert_eq!(head.version, Version::HTTP_2);

    let mut head = request("CONNECT", "y:443", Version::HTTP_11, &[("host", "y:443")]);
    assert_eq!(prepared(&mut head, Wire::H1, Wire::H2, Direction::Outbound).unwrap().0, "y:443");
}

#[test]
fn hosts_of_http_2_agree() {
    let check = |uri: &str, fields: &[(&str, &str)]| {
        prepared(&mut request("GET", uri, Version::HTTP_2, fields), Wire::H2, Wire::H2, Direction::Inbound).map(|_| ())
    };
    assert_eq!(check("http://y/", &[]), Ok(()));
    assert_eq!(check("http://y/", &[("host", "Y")]), Ok(()));
    assert_eq!(check("http://y/", &[("host", "z")]), Err(Refusal::HostMismatch));
    assert_eq!(check("/", &[("host", "z")]), Ok(()));
    assert_eq!(check("/", &[]), Err(Refusal::NoHost));
    assert_eq!(check("http://u@y/", &[]), Err(Refusal::BadHost));
}

#[test]
fn responses() {
    let given = |status: u16, fields: &[(&str, &str)]| {
        let mut builder = Response::builder().status(status);
        for (name, value) in fields {
            builder = builder.header(*name, *value);
        }
        builder.body(()).unwrap().into_parts().0
    };
    let check = |status: u16, list: &[(&str, &str)], to: Wire, client: Version| {
        let mut head = given(status, list);
        prepare_response(&mut head, Wire::H1, to, client).map(|()| fields(&head.headers))
    };
    let owned = |list: &[(&str, &str)]| -> Vec<(String, String)> {
        list.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect()
    };
    let h11 = Version::HTTP_11;
    assert_eq!(
        check(200, &[("connection", "keep-alive, x-a"), ("keep-alive", "timeout=5"), ("x-a", "1"), ("b", "2")], Wire::H1, h11),
        Ok(owned(&[("b", "2")]))
    );
    assert_eq!(check(200, &[("upgrade", "h2"), ("b", "2")], Wire::H1, h11), Ok(owned(&[("b", "2")])));
    assert_eq!(
        check(426, &[("connection", "upgrade"), ("upgrade", "TLS/1.0")], Wire::H1, h11),
        Ok(owned(&[("connection", "upgrade"), ("upgrade", "TLS/1.0")]))
    );
    let chunked = [("transfer-encoding", "chunked")];
    assert_eq!(check(200, &chunked, Wire::H1, h11), Ok(owned(&chunked)));
    assert_eq!(check(200, &chunked, Wire::H1, Version::HTTP_10), Ok(vec![]));
    assert_eq!(check(200, &chunked, Wire::H2, Version::HTTP_2), Ok(vec![]));
    assert_eq!(check(200, &[("transfer-encoding", "gzip, chunked")], Wire::H1, h11), Err(Malformed::TransferEncoding));
    assert_eq!(check(200, &[("transfer-encoding", "chunked"), ("content-length", "1")], Wire::H1, h11), Err(Malformed::Framing));
}
