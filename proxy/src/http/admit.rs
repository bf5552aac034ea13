//! Whether an incoming request may go on to the app (RequestAuthentication and AuthorizationPolicy), and what the app is told of who calls.
//!
//! In this order, that of Envoy's filters in an Istio sidecar: the path is brought into its one form, which policies see and the app gets;
//! what the client claims about itself without being a trusted hop (`x-forwarded-client-cert`, headers that
//! verified tokens fill) is removed; tokens are proved; policies decide, asking external authorizers where they say so.
//!
//! A request without policies costs a look at its path and headers. What is refused is answered here: 401 or 403 with the texts
//! that Envoy's users know (gRPC: `UNAUTHENTICATED`, `PERMISSION_DENIED`). Which policy it was is told to callers of the mesh only.

use super::Hop;
use super::ask;
use super::body::Source as Body;
use crate::authz::Policy;
use crate::report::SeenHttp;
use crate::telemetry::{Decision, Flag};
use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{Method, StatusCode, Uri};
use std::borrow::Cow;
use std::rc::Rc;
use std::sync::Arc;
use std::time::SystemTime;
use weft_policy::authz::{Headers, Http, Outcome, Peer, PolicyId, Request, Verdict};
use weft_policy::jwt::{self, Claims};
use weft_policy::path;

const CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const DENIED_BY: HeaderName = HeaderName::from_static("x-weft-denied-by");

const GRPC_UNKNOWN: u16 = 2;
const GRPC_PERMISSION_DENIED: u16 = 7;
const GRPC_INTERNAL: u16 = 13;
const GRPC_UNAVAILABLE: u16 = 14;
const GRPC_UNAUTHENTICATED: u16 = 16;

/// The answer to a request that may not go on.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) status: StatusCode,
    pub(crate) flag: Flag,
    pub(crate) body: Bytes,
    pub(crate) headers: HeaderMap,
}

impl Refused {
    pub(crate) fn new(status: StatusCode, flag: Flag, body: impl Into<Bytes>) -> Box<Self> {
        Box::new(Self { status, flag, body: body.into(), headers: HeaderMap::new() })
    }

    /// `grpc-status`, by the table of the gRPC project for statuses of HTTP.
    pub(crate) fn grpc_status(&self) -> u16 {
        match self.status {
            StatusCode::BAD_REQUEST => GRPC_INTERNAL,
            StatusCode::UNAUTHORIZED => GRPC_UNAUTHENTICATED,
            StatusCode::FORBIDDEN => GRPC_PERMISSION_DENIED,
            StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT => GRPC_UNAVAILABLE,
            _ => GRPC_UNKNOWN,
        }
    }
}

/// What goes on with a request that was let in.
pub(crate) type Admitted = Option<Box<HeaderMap>>;

/// Decides about a request, and makes its head what the app may see. `Ok` has header fields for the response, if an authorizer wants any.
pub(crate) async fn admit(head: &mut Parts, hop: &Hop, body: Option<&Rc<Body>>) -> Result<Admitted, Box<Refused>> {
    let policy = Arc::clone(&hop.worker.config.load().policy);
    if policy.is_pending() {
        let text = "weft: the control plane has not said yet who may call [NC]\n";
        return Err(Refused::new(StatusCode::SERVICE_UNAVAILABLE, Flag::NoConfiguration, text));
    }
    canonical_path(head, &policy)?;
    caller(head, hop, &policy);
    let claims = if policy.tokens.is_empty() { None } else { authenticate(head, &policy, hop)? };
    if policy.engine.is_empty() {
        hop.worker.recorder.decided(&decision(head, hop, claims.as_ref(), &policy));
        return Ok(None);
    }
    let outcome = with(head, hop, claims.as_ref(), &policy, |request| policy.engine.check(request));
    let (outcome, extra) = match outcome.verdict {
        // Boxed: it is large, and rare.
        Verdict::Ask(id) => Box::pin(asked(head, hop, body, claims.as_ref(), &policy, id)).await?,
        _ => (outcome, None),
    };
    let record = Decision { outcome: Some(&outcome), ..decision(head, hop, claims.as_ref(), &policy) };
    hop.worker.recorder.decided(&record);
    match outcome.verdict {
        Verdict::Allow(_) => Ok(extra),
        Verdict::Deny(denied) => {
            let (name, _) = policy.reason(denied);
            Err(denial(StatusCode::FORBIDDEN, Flag::Denied, "RBAC: access denied", name, hop))
        }
        // Unreachable: `asked` ends with a verdict.
        Verdict::Ask(_) => Err(denial(StatusCode::FORBIDDEN, Flag::Denied, "RBAC: access denied", "", hop)),
    }
}

/// An answer that names the policy to callers of the mesh.
fn denial(status: StatusCode, flag: Flag, text: &'static str, policy: &str, hop: &Hop) -> Box<Refused> {
    let mut refused = Refused::new(status, flag, text);
    name_policy(&mut refused.headers, policy, hop);
    refused
}

fn name_policy(headers: &mut HeaderMap, policy: &str, hop: &Hop) {
    if hop.arrival.caller.is_some()
        && !policy.is_empty()
        && let Ok(value) = HeaderValue::from_str(policy)
    {
        headers.insert(DENIED_BY, value);
    }
}

/// Asks authorizers until one refuses or there is a verdict.
async fn asked(
    head: &mut Parts,
    hop: &Hop,
    body: Option<&Rc<Body>>,
    claims: Option<&Claims>,
    policy: &Policy,
    mut id: PolicyId,
) -> Result<(Outcome, Admitted), Box<Refused>> {
    let mut extra: Admitted = None;
    loop {
        let name = policy.name(id);
        let authorizer = policy.engine.policy(id).and_then(|policy| policy.authorizer.as_ref());
        let answer = match authorizer {
            Some(authorizer) => ask::about_request(authorizer, head, hop, body, policy.identity()).await,
            None => return Err(denial(StatusCode::FORBIDDEN, Flag::Denied, "RBAC: access denied", name, hop)),
        };
        match answer {
            ask::Answer::Allowed(changes) => {
                let ask::Changes { set, append, remove, response } = *changes;
                for name in remove {
                    head.headers.remove(name);
                }
                for (name, value) in set {
                    head.headers.insert(name, value);
                }
                for (name, value) in append {
                    head.headers.append(name, value);
                }
                if !response.is_empty() {
                    extra.get_or_insert_default().extend(response);
                }
            }
            ask::Answer::Refused(mut refused) => {
                name_policy(&mut refused.headers, name, hop);
                let record = Decision { refused_by_authorizer: Some(id), ..decision(head, hop, claims, policy) };
                hop.worker.recorder.decided(&record);
                return Err(refused);
            }
        }
        let outcome = with(head, hop, claims, policy, |request| policy.engine.resume(request, id));
        match outcome.verdict {
            Verdict::Ask(next) => id = next,
            _ => return Ok((outcome, extra)),
        }
    }
}

/// Brings the path into its canonical form.
fn canonical_path(head: &mut Parts, policy: &Policy) -> Result<(), Box<Refused>> {
    let Some(target) = head.uri.path_and_query() else { return Ok(()) };
    let refused = || Refused::new(StatusCode::BAD_REQUEST, Flag::DownstreamProtocolError, "weft: the path is not valid [DPE]\n");
    match path::normalise(target.as_str(), policy.paths) {
        Ok(Cow::Borrowed(same)) if same.len() == target.as_str().len() => Ok(()),
        Ok(other) => {
            let mut parts = head.uri.clone().into_parts();
            let canonical = Bytes::from(other.into_owned());
            parts.path_and_query = Some(PathAndQuery::from_maybe_shared(canonical).map_err(|_| refused())?);
            head.uri = Uri::from_parts(parts).map_err(|_| refused())?;
            Ok(())
        }
        Err(path::Refused) => Err(refused()),
    }
}

/// Tells the app who calls, and does not let others tell it.
fn caller(head: &mut Parts, hop: &Hop, policy: &Policy) {
    if head.headers.contains_key(CLIENT_CERT) && !policy.trusts(hop.down().peer.ip()) {
        head.headers.remove(CLIENT_CERT);
    }
    let Some(caller) = &hop.arrival.caller else { return };
    let value = hop.client_cert.get_or_init(|| {
        let by = policy.identity().map(|own| format!("By={own};")).unwrap_or_default();
        HeaderValue::from_str(&format!("{by}URI={caller}")).ok()
    });
    let Some(value) = value else { return };
    match head.headers.get(CLIENT_CERT) {
        // In one field, as Envoy writes it: each hop behind the one before.
        Some(before) => {
            let joined = [before.as_bytes(), b",", value.as_bytes()].concat();
            if let Ok(joined) = HeaderValue::from_bytes(&joined) {
                head.headers.insert(CLIENT_CERT, joined);
            }
        }
        None => {
            head.headers.insert(CLIENT_CERT, value.clone());
        }
    }
}

/// Proves tokens, and puts into headers what is to be known of them.
fn authenticate(head: &mut Parts, policy: &Policy, hop: &Hop) -> Result<Option<Claims>, Box<Refused>> {
    for name in policy.tokens.outputs() {
        head.headers.remove(&**name);
    }
    if is_preflight(head) {
        return Ok(None);
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
    match policy.tokens.verify(&Tokens(head), now) {
        Ok(None) => Ok(None),
        Ok(Some(verified)) => {
            let output = verified.rule.output(&verified.claims);
            for name in verified.rule.consumed_headers() {
                head.headers.remove(name);
            }
            for field in output {
                if let (Ok(name), Ok(value)) =
                    (HeaderName::from_bytes(field.header.as_bytes()), HeaderValue::from_str(&field.value))
                {
                    head.headers.insert(name, value);
                }
            }
            Ok(Some(verified.claims))
        }
        Err(why) => {
            let status = StatusCode::from_u16(why.status()).unwrap_or(StatusCode::UNAUTHORIZED);
            let mut refused = Refused::new(status, Flag::Unauthenticated, why.to_string());
            let uri =
                format!("http://{}{}", String::from_utf8_lossy(host(head)), head.uri.path_and_query().map_or("", |p| p.as_str()));
            if let Ok(value) = HeaderValue::from_str(&jwt::challenge(&uri)) {
                refused.headers.insert(header::WWW_AUTHENTICATE, value);
            }
            hop.worker.recorder.decided(&Decision { token: Some(why), ..decision(head, hop, None, policy) });
            Err(refused)
        }
    }
}

/// A browser asks beforehand, without credentials, whether a page of another origin may call.
fn is_preflight(head: &Parts) -> bool {
    let present = |name: HeaderName| head.headers.get(name).is_some_and(|value| !value.is_empty());
    head.method == Method::OPTIONS && present(header::ORIGIN) && present(header::ACCESS_CONTROL_REQUEST_METHOD)
}

/// Where tokens are looked for.
struct Tokens<'a>(&'a Parts);

impl jwt::Source for Tokens<'_> {
    fn header(&self, name: &str, each: &mut dyn FnMut(&[u8])) {
        self.0.headers.get_all(name).iter().for_each(|value| each(value.as_bytes()));
    }

    fn query(&self) -> Option<&str> {
        self.0.uri.query()
    }
}

/// Header fields as policies look them up.
struct Fields<'a>(&'a HeaderMap);

impl Headers for Fields<'_> {
    fn each(&self, name: &str, show: &mut dyn FnMut(&[u8])) {
        self.0.get_all(name).iter().for_each(|value| show(value.as_bytes()));
    }
}

/// `:authority` or `Host`.
pub(crate) fn host(head: &Parts) -> &[u8] {
    match head.uri.authority() {
        Some(authority) => authority.as_str().as_bytes(),
        None => head.headers.get(header::HOST).map_or(b"", HeaderValue::as_bytes),
    }
}

/// Shows a request as policies see it.
fn with<T>(head: &Parts, hop: &Hop, claims: Option<&Claims>, policy: &Policy, look: impl FnOnce(&Request<'_>) -> T) -> T {
    let down = hop.down();
    let peer = down.peer.ip();
    let fields = Fields(&head.headers);
    let forwarded = head.headers.get_all(FORWARDED_FOR).iter().rev().map(HeaderValue::as_bytes);
    let request = Request {
        source: hop.arrival.caller.as_deref().and_then(Peer::parse),
        source_ip: peer,
        remote_ip: policy.remote_ip(peer, forwarded),
        destination: down.original.0,
        sni: hop.arrival.server_name.as_deref(),
        http: Some(Http {
            method: head.method.as_str(),
            host: host(head),
            path: head.uri.path_and_query().map_or("", PathAndQuery::path),
            query: head.uri.query(),
            headers: &fields,
            token: claims,
        }),
    };
    look(&request)
}

/// What is told of a request, whatever becomes of it.
fn decision<'a>(head: &'a Parts, hop: &'a Hop, claims: Option<&'a Claims>, policy: &'a Policy) -> Decision<'a> {
    Decision {
        policy,
        arrival: &hop.arrival,
        outcome: None,
        refused_by_authorizer: None,
        token: None,
        http: Some(SeenHttp {
            method: head.method.as_str(),
            path: head.uri.path_and_query().map_or("", PathAndQuery::path),
            host: host(head),
            principal: claims.and_then(Claims::principal),
            request_id: head.headers.get("x-request-id").map(HeaderValue::as_bytes),
        }),
    }
}
