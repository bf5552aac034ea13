//! What the console of `weft-control` answers to the `weft` command: JSON over HTTP on [`crate::names::CONSOLE_PORT`].
//!
//! Each replica knows what the proxies that are attached to *it* have reported; whoever asks has to ask all of them and to add
//! up. Every answer is an [`Answer`], so that a reader can tell which version of the control plane it talks to. Fields are only ever
//! added; a reader ignores those that it doesn't know.

use serde::{Deserialize, Serialize};

/// The envelope of every answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Answer<T> {
    /// Version of the control plane.
    pub version: String,
    /// Name of the replica (its pod).
    pub replica: String,
    /// What was asked for.
    pub data: T,
}

/// Why a question could not be answered; the body of every status that is not 200.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What happened, in words for whoever asked.
    pub error: String,
}

/// `GET /v1/proxies?namespace=`: the proxies that are attached, and those that were within the last hour.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proxies {
    /// In order of namespace and pod.
    pub proxies: Vec<Proxy>,
}

/// A proxy as this replica knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proxy {
    /// Namespace of its pod.
    pub namespace: String,
    /// Name of its pod.
    pub pod: String,
    /// Addresses of its pod.
    pub addresses: Vec<String>,
    /// Its node; empty if unknown.
    pub node: String,
    /// Version of weft-proxy.
    pub version: String,
    /// The workload of the pod; empty names if it is not known yet.
    pub workload: Workload,
    /// Whether its stream is open on this replica now.
    pub connected: bool,
    /// Seconds since 1970 at which it attached last.
    pub since: u64,
    /// Seconds since 1970 at which it went; 0 while it is connected.
    pub gone: u64,
    /// Its certificate as it reported it last; `None`: it has none yet, or said nothing.
    pub certificate: Option<Certificate>,
    /// Why it refused its last configuration; empty: it did not.
    pub refused: String,
}

/// A workload: the object at the top of a pod's owners.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Workload {
    /// Its namespace.
    pub namespace: String,
    /// `Deployment`, `StatefulSet`, `Pod` …
    pub kind: String,
    /// Its name.
    pub name: String,
    /// The service account that its pods run as.
    pub service_account: String,
}

/// The certificate of a proxy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// Its SPIFFE id.
    pub identity: String,
    /// Seconds since 1970.
    pub not_before: u64,
    /// Seconds since 1970.
    pub not_after: u64,
    /// Who signed it: subject and key id.
    pub issuer: String,
    /// Serial number, hex.
    pub serial: String,
    /// Why the last renewal failed; empty: it did not.
    pub error: String,
}

/// `GET /v1/authority`: what signs certificates and what is trusted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authority {
    /// SHA-256 (hex) of the certificate that signs; empty: there is none yet.
    pub issuer: String,
    /// Its subject; empty: this replica can't sign.
    pub subject: String,
    /// When it, or the first of those above it, ends: seconds since 1970; 0: this replica can't sign.
    pub not_after: u64,
    /// The Secret of the user's that it comes from; empty: it is self-made.
    pub secret: String,
    /// The roots that are trusted, the oldest first.
    pub roots: Vec<Root>,
    /// Certificates that were issued before are being renewed: seconds since 1970; 0: none.
    pub renew_before: u64,
    /// The last request for new certificates that was heeded, as it was written.
    pub renewed: String,
    /// The last request for a new root that was heeded, as it was written.
    pub rotated: String,
    /// What a rotation waits for; empty: nothing, or this replica does not lead.
    pub waiting: String,
    /// What is wrong with the user's Secret, or with what signs here; empty: nothing.
    pub problem: String,
}

/// A root certificate that is trusted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    /// SHA-256, hex.
    pub fingerprint: String,
    /// Its subject.
    pub subject: String,
    /// When it ends, seconds since 1970.
    pub not_after: u64,
    /// Since when it is trusted, seconds since 1970; 0: since before anybody noted it.
    pub added: u64,
    /// Since when nothing is signed below it any more, seconds since 1970; 0: it is wanted.
    pub retired: u64,
    /// What signs now is below it.
    pub signs: bool,
}

/// `GET /v1/edges?since=1h&namespace=&detail=true`: who talked to whom. Without `detail` methods, paths and hosts are added up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Edges {
    /// The most frequent first.
    pub edges: Vec<Edge>,
    /// Edges beyond the limit of the answer.
    pub left_off: u64,
    /// Samples that proxies reported and that this replica could not keep, since it started.
    pub dropped: u64,
    /// Seconds for which this replica has kept samples; shorter than what was asked for if it started later.
    pub kept_seconds: u64,
}

/// Requests (HTTP) or connections (TCP) that were alike, seen by the receiving proxy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Edge {
    /// Who sent it.
    pub source: Source,
    /// Who received it.
    pub destination: Workload,
    /// The port of the app.
    pub port: u16,
    /// `http` or `tcp`.
    pub protocol: String,
    /// HTTP method; empty: added up, or not known.
    pub method: String,
    /// Normalised path without query; empty: added up, or not known.
    pub path: String,
    /// Host; empty: added up, not known, or none.
    pub host: String,
    /// `issuer/subject` of a verified token; empty: none.
    pub request_principal: String,
    /// How many.
    pub count: u64,
    /// Of them refused by policy.
    pub denied: u64,
    /// Seconds since 1970 of the newest.
    pub last: u64,
}

/// The sending side.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Source {
    /// Its SPIFFE id; empty: it spoke plaintext.
    pub identity: String,
    /// Its address if it spoke plaintext.
    pub address: String,
    /// What the cluster knows of it, in words: `deploy/frontend`, `pod/x`; empty: nothing, or several.
    pub workload: String,
    /// Namespace of it; empty: unknown.
    pub namespace: String,
}

/// `GET /v1/policies/hits?namespace=`: how often policies decided, since the proxies started or this replica did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyHits {
    /// In order of policy and pod.
    pub hits: Vec<PolicyHit>,
}

/// How often a policy decided in one pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyHit {
    /// Namespace of the pod.
    pub namespace: String,
    /// The pod.
    pub pod: String,
    /// `namespace/name` of the policy.
    pub policy: String,
    /// `ALLOW`, `DENY`, `AUDIT`, `CUSTOM`.
    pub action: String,
    /// It is not enforced.
    pub dry_run: bool,
    /// Requests or connections that it allowed (or would have).
    pub allowed: u64,
    /// That it denied (or would have).
    pub denied: u64,
}

/// `GET /v1/refusals?id=&namespace=&limit=`: what policy refused of late.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusals {
    /// Newest first.
    pub refusals: Vec<Refusal>,
}

/// A refused request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Milliseconds since 1970.
    pub time: u64,
    /// `x-request-id`, if it had one.
    pub request_id: String,
    /// Who sent it.
    pub source: Source,
    /// Namespace of the pod that refused it.
    pub namespace: String,
    /// The pod that refused it.
    pub pod: String,
    /// Its workload.
    pub destination: Workload,
    /// The port of the app.
    pub port: u16,
    /// HTTP method; empty for TCP.
    pub method: String,
    /// Normalised path; empty for TCP.
    pub path: String,
    /// Host; empty for TCP.
    pub host: String,
    /// `namespace/name` of the policy that decided; empty if none did.
    pub policy: String,
    /// Why, in words.
    pub reason: String,
}

/// `GET /v1/authz?namespace=&target=svc/b`: what holds for the pods behind a name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authz {
    /// Names of the pods.
    pub pods: Vec<String>,
    /// Of them those without a proxy: nothing is enforced there.
    pub unmeshed: Vec<String>,
    /// Their ports, and the mode of mutual TLS in force on each.
    pub ports: Vec<AuthzPort>,
    /// Mode on all ports that are not listed.
    pub mtls: Vec<Mtls>,
    /// The policies, in the order in which the proxy has them; one with an empty name stands for "there are ALLOW policies, and none matched".
    pub policies: Vec<AuthzPolicy>,
    /// RequestAuthentications in force, `namespace/name`.
    pub request_authentications: Vec<String>,
}

/// A mode of mutual TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Mtls {
    /// `PERMISSIVE`, `STRICT`, `DISABLE`.
    pub mode: String,
    /// In how many of the pods.
    pub pods: u64,
}

/// A port of an [`Authz`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthzPort {
    /// The port of the app.
    pub port: u16,
    /// What is declared for it: `HTTP`, `TCP`, `DETECT` …
    pub protocol: String,
    /// The mode; several if the pods differ.
    pub mtls: Vec<Mtls>,
}

/// A policy of an [`Authz`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthzPolicy {
    /// `namespace/name`.
    pub policy: String,
    /// `ALLOW`, `DENY`, `AUDIT`, `CUSTOM`.
    pub action: String,
    /// It is not enforced.
    pub dry_run: bool,
    /// How many rules it has.
    pub rules: u64,
    /// Why it can't be understood; empty: it can.
    pub broken: String,
    /// Of how many of the pods it holds.
    pub pods: u64,
    /// What it allowed (AUDIT: what it matched), as far as this replica was told.
    pub allowed: u64,
    /// What it denied.
    pub denied: u64,
}

/// `POST /v1/explain`: what would become of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// Who calls.
    pub from: Caller,
    /// Namespace of the destination.
    pub namespace: String,
    /// `svc/b`, `pod/x`, `deploy/y`.
    pub to: String,
    /// The port: of the Service for `svc/…`, of the app otherwise; by number or name. Empty: the only one.
    #[serde(default)]
    pub port: String,
    /// The request; `None`: opaque TCP.
    pub http: Option<QuestionHttp>,
}

/// Who calls in a [`Question`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Caller {
    /// A pod.
    Pod {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// Any meshed pod that runs as a service account.
    ServiceAccount {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// Somebody without an identity.
    Plaintext {
        /// His address; empty: some address.
        address: String,
    },
}

impl Default for Caller {
    fn default() -> Self {
        Self::Plaintext { address: String::new() }
    }
}

/// The HTTP side of a [`Question`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuestionHttp {
    /// As it is sent.
    pub method: String,
    /// As it is sent: with the query, not normalised.
    pub path: String,
    /// `Host` or `:authority`; empty: the name of what is called.
    #[serde(default)]
    pub host: String,
    /// Further header fields.
    #[serde(default)]
    pub headers: Vec<(String, String)>,
    /// `issuer/subject` of a token that is taken for verified; empty: there is none.
    #[serde(default)]
    pub request_principal: String,
}

/// The answer to a [`Question`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explained {
    /// One for each way in which the pods behind the destination are configured: one, as a rule.
    pub verdicts: Vec<Judged>,
}

/// What pods with one configuration say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judged {
    /// The pods.
    pub pods: Vec<String>,
    /// The request as the proxy sees it, in words.
    pub request: String,
    /// `allow`, `deny`, or `ask` (an external authorizer decides).
    pub verdict: String,
    /// Why, in one sentence.
    pub reason: String,
    /// `namespace/name` of the policy that decides; empty: none does.
    pub policy: String,
    /// What policies in dry run say; empty: there are none.
    pub dry_run: String,
    /// What was assumed, and what else is worth knowing.
    pub notes: Vec<String>,
    /// Each policy that was looked at.
    pub policies: Vec<Trace>,
}

/// What became of one policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// `namespace/name`.
    pub policy: String,
    /// `ALLOW`, `DENY`, `AUDIT`, `CUSTOM`.
    pub action: String,
    /// It is not enforced.
    pub dry_run: bool,
    /// Whether any rule matched.
    pub matched: bool,
    /// What has to be known besides the rules; empty: nothing.
    pub note: String,
    /// Its rules.
    pub rules: Vec<TraceRule>,
}

/// What became of one rule.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceRule {
    /// Its place, from 0.
    pub rule: u64,
    /// Whether it matched.
    pub matched: bool,
    /// Which tests failed, in words.
    pub failed: Vec<String>,
}

/// `POST /v1/preview`: what these policies would change for the traffic of late.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Proposal {
    /// AuthorizationPolicies and PeerAuthentications, added to those in force or replacing those of the same name.
    pub objects: Vec<serde_json::Value>,
    /// How far back to look, in seconds; 0: an hour.
    pub since_seconds: u64,
}

/// The answer to a [`Proposal`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preview {
    /// What changes, and what can't be told; the most frequent first.
    pub changes: Vec<Change>,
    /// Changes beyond the limit of the answer.
    pub left_off: u64,
    /// Requests and connections for which nothing changes.
    pub unchanged: u64,
    /// Those whose destination is not there any more.
    pub gone: u64,
    /// Samples that were not kept; see [`Edges::dropped`].
    pub dropped: u64,
    /// See [`Edges::kept_seconds`].
    pub kept_seconds: u64,
    /// What is worth knowing about the proposal.
    pub notes: Vec<String>,
}

/// What becomes of requests that were alike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// They would be refused, and are not now.
    Refused,
    /// It can't be told.
    #[default]
    Undetermined,
    /// They would be let in, and are refused now.
    Allowed,
}

/// Requests that were alike, and what becomes of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Change {
    /// What.
    pub effect: Effect,
    /// Who sent them.
    pub source: Source,
    /// Who received them.
    pub destination: Workload,
    /// The port of the app.
    pub port: u16,
    /// `http` or `tcp`.
    pub protocol: String,
    /// See [`Edge::method`].
    pub method: String,
    /// See [`Edge::path`].
    pub path: String,
    /// See [`Edge::host`].
    pub host: String,
    /// How many.
    pub count: u64,
    /// `namespace/name` of the policy that would decide; empty: none would.
    pub policy: String,
    /// Why, in words; for what can't be told, what isn't known.
    pub reason: String,
}
