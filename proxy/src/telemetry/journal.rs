//! What policies decided: `weft_authz_total`, a line in the log for each refusal (so many per second), and the worker's
//! [`Collector`](crate::report::Collector) for the control plane.
//!
//! Series are bounded: names of policies come from the configuration, and from the two hundredth on they share `other`.

use super::recorder::Recorder;
use crate::authz::Policy;
use crate::conn::Arrival;
use crate::log;
use crate::report::{Seen, SeenHttp};
use prometheus_client::metrics::counter::Counter;
use std::collections::HashMap;
use weft_policy::authz::{Action, Allowed, Outcome, PolicyId, Shadow, Verdict};
use weft_policy::jwt;

/// Policies with series of their own.
const POLICIES: usize = 200;
/// Most bytes of a path in the log.
const PATH: usize = 256;

/// What there is to say about a request (or a connection: without method, path and host).
#[derive(Clone, Copy, Debug)]
pub struct Decision<'a> {
    /// What was in force.
    pub policy: &'a Policy,
    /// The connection.
    pub arrival: &'a Arrival,
    /// What policies say; none: there are none, or it did not come to that.
    pub outcome: Option<&'a Outcome>,
    /// The CUSTOM policy whose authorizer refused.
    pub refused_by_authorizer: Option<PolicyId>,
    /// Why its token was refused.
    pub token: Option<jwt::Refusal>,
    /// The HTTP side; none: an opaque connection.
    pub http: Option<SeenHttp<'a>>,
}

/// A policy's part in a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Allowed,
    Denied,
}

/// The series of policies, by name: what a worker has met.
#[derive(Debug, Default)]
pub(super) struct Series(HashMap<Box<str>, Counters>);

/// Of one policy, by the part that it has had.
#[derive(Debug)]
struct Counters {
    action: Action,
    dry_run: bool,
    parts: [Option<Counter>; 2],
}

/// Who refused, by name, and why.
struct Refusal<'a> {
    policy: &'a str,
    reason: String,
}

impl Decision<'_> {
    fn refusal(&self) -> Option<Refusal<'_>> {
        if let Some(why) = self.token {
            return Some(Refusal { policy: "", reason: why.to_string() });
        }
        if let Some(id) = self.refused_by_authorizer {
            return Some(Refusal {
                policy: self.policy.name(id),
                reason: "its external authorizer refused, or can't be asked".into(),
            });
        }
        match self.outcome?.verdict {
            Verdict::Deny(denied) => {
                let (policy, reason) = self.policy.reason(denied);
                Some(Refusal { policy, reason: reason.into() })
            }
            Verdict::Allow(_) | Verdict::Ask(_) => None,
        }
    }

    /// The policies that had a part in it.
    fn parts(&self) -> impl Iterator<Item = (PolicyId, Part)> {
        let mut parts = [None; 3];
        if let Some(id) = self.refused_by_authorizer {
            parts[0] = Some((id, Part::Denied));
        } else if let Some(outcome) = self.outcome {
            parts[0] = match outcome.verdict {
                Verdict::Allow(Allowed::By(id)) => Some((id, Part::Allowed)),
                Verdict::Deny(denied) => denied.policy().map(|id| (id, Part::Denied)),
                Verdict::Allow(Allowed::NoAllowPolicy) | Verdict::Ask(_) => None,
            };
            parts[1] = match outcome.shadow {
                Some(Shadow::DeniedBy(id) | Shadow::WouldAsk(id)) => Some((id, Part::Denied)),
                Some(Shadow::AllowedBy(id)) => Some((id, Part::Allowed)),
                _ => None,
            };
            parts[2] = outcome.audit.map(|id| (id, Part::Allowed));
        }
        parts.into_iter().flatten()
    }

    fn seen(&self, denied: bool) -> Seen<'_> {
        let down = &self.arrival.down;
        Seen {
            identity: self.arrival.caller.as_deref(),
            address: down.peer.ip(),
            port: down.original.0.port(),
            http: self.http,
            denied,
        }
    }
}

impl Recorder {
    /// Takes note of a decision.
    pub fn decided(&self, decision: &Decision<'_>) {
        let refusal = decision.refusal();
        for (id, part) in decision.parts() {
            if let Some(policy) = decision.policy.engine.policy(id) {
                self.report().hit(&policy.name, policy.action.into(), policy.dry_run, part == Part::Denied);
                self.count(policy, part);
            }
        }
        if decision.outcome.is_some_and(|outcome| outcome.shadow == Some(Shadow::NoAllowMatched)) {
            self.report().hit("", weft_api::wire::AuthorizationAction::Allow, true, true);
        }
        let seen = decision.seen(refusal.is_some());
        self.report().seen(&seen);
        let Some(refusal) = refusal else { return };
        if refusal.policy.is_empty() {
            let allow = decision.token.is_none();
            self.metrics().authz(if allow { "ALLOW" } else { "JWT" }, "", "denied").inc();
            if allow {
                self.report().hit("", weft_api::wire::AuthorizationAction::Allow, false, true);
            }
        }
        self.report().refused(&seen, refusal.policy, &refusal.reason);
        line(decision, &refusal);
    }

    fn count(&self, policy: &weft_policy::authz::Policy, part: Part) {
        let mut series = self.policies().borrow_mut();
        let all = &mut series.0;
        let same = |known: &Counters| known.action == policy.action && known.dry_run == policy.dry_run;
        let known = all.get(&policy.name).is_some_and(same);
        if !known {
            if all.len() >= 4 * POLICIES {
                all.clear();
            }
            let counters = Counters { action: policy.action, dry_run: policy.dry_run, parts: [None, None] };
            all.insert(policy.name.clone(), counters);
        }
        let name = if all.len() > POLICIES { "other" } else { &policy.name };
        let Some(counters) = all.get_mut(&policy.name) else { return };
        let counter = counters.parts[usize::from(part == Part::Denied)].get_or_insert_with(|| {
            let result = match (part, policy.dry_run) {
                (Part::Allowed, _) if policy.action == Action::Audit => "audited",
                (Part::Allowed, false) => "allowed",
                (Part::Denied, false) => "denied",
                (Part::Allowed, true) => "shadow_allowed",
                (Part::Denied, true) => "shadow_denied",
            };
            self.metrics().authz(policy.action.as_str(), name, result)
        });
        counter.inc();
    }
}

fn cut(text: &str) -> &str {
    let end = (0..=text.len().min(PATH)).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    &text[..end]
}

/// The line in the log, as a person looks for it. What requests say stands in quotes and is escaped.
fn line(decision: &Decision<'_>, refusal: &Refusal<'_>) {
    let arrival = decision.arrival;
    let port = arrival.down.original.0.port();
    let peer = arrival.down.peer;
    let caller = arrival.caller.as_deref().unwrap_or("plaintext");
    let by = if refusal.policy.is_empty() { "-" } else { refusal.policy };
    let reason = &refusal.reason;
    let Some(http) = &decision.http else {
        return log::connection_error(&format_args!("denied: TCP port={port} peer={peer} caller={caller} policy={by}: {reason}"));
    };
    let id = http.request_id.map(String::from_utf8_lossy).unwrap_or_default();
    log::connection_error(&format_args!(
        "denied: {:?} {:?} host={:?} port={port} peer={peer} caller={caller} request={id:?} policy={by}: {reason}",
        http.method,
        cut(http.path),
        String::from_utf8_lossy(http.host),
    ));
}
