//! Why: the verdict of [`crate::authz`] with each policy and rule that was looked at, in words.
//!
//! The same tests are run by the same code, rule by rule instead of through the index; a witness writes down which failed.

use crate::authz::{Action, Allowed, Denied, Engine, Field, Outcome, Place, PolicyId, Request, Shadow, Verdict, Witness};

/// The verdict and how it came about.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Explanation {
    /// "allow", "deny" or "ask" (an external authorizer, who can't be asked here).
    pub verdict: &'static str,
    /// One sentence.
    pub reason: String,
    /// "namespace/name" of the policy that decided, if one did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// One sentence about policies in dry run, if there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<String>,
    /// Every policy, in the order of the configuration.
    pub policies: Vec<PolicyTrace>,
}

/// What became of one policy.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct PolicyTrace {
    /// "namespace/name".
    pub policy: String,
    /// What it does.
    pub action: Action,
    /// Whether it is evaluated only.
    pub dry_run: bool,
    /// Whether any rule matched.
    pub matched: bool,
    /// What has to be known besides the rules, in words; for example why it can't be understood.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Every rule that counts for this kind of traffic.
    pub rules: Vec<RuleTrace>,
}

/// What became of one rule.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct RuleTrace {
    /// Its place in the policy, from 0.
    pub rule: usize,
    /// Whether it matched.
    pub matched: bool,
    /// The tests that failed: one of each alternative that was tried.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<Failure>,
}

/// A test that failed.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Failure {
    /// "from[0].source.principals", "to[1].operation.notPaths", "when request.headers[x-a]".
    pub field: String,
    /// What it was compared with.
    pub expected: Vec<String>,
    /// What the request has; absent: nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actual: Option<String>,
    /// A sentence with all that.
    pub words: String,
}

/// Decides about a request and tells why. After [`Verdict::Ask`] it can go on with the policy that was asked for (`asked`), as
/// if its authorizer had agreed.
pub fn explain(engine: &Engine, request: &Request<'_>, asked: Option<PolicyId>) -> (Outcome, Explanation) {
    let mut policies: Vec<PolicyTrace> = engine
        .policies()
        .iter()
        .map(|policy| PolicyTrace {
            policy: policy.name.to_string(),
            action: policy.action,
            dry_run: policy.dry_run,
            matched: false,
            note: policy.broken.as_ref().map(|why| match policy.action {
                Action::Allow | Action::Audit => format!("it can't be understood, so it matches nothing: {why}"),
                Action::Deny | Action::Custom => format!("it can't be understood, so it refuses everything: {why}"),
            }),
            rules: Vec::new(),
        })
        .collect();
    let outcome = engine.walk(request, asked.map_or(0, |id| engine.after(id)), |_, id, place, rule| {
        let mut notes = Notes(Vec::new());
        let matched = rule.matches(request, &mut notes);
        let trace = &mut policies[id.0 as usize];
        trace.matched |= matched;
        let failed = if matched { Vec::new() } else { notes.0 };
        trace.rules.push(RuleTrace { rule: place, matched, failed });
        matched
    });
    for (trace, policy) in policies.iter_mut().zip(engine.policies()) {
        trace.rules.sort_by_key(|rule| rule.rule);
        if trace.note.is_none() && trace.rules.is_empty() {
            trace.note = Some(match (request.http.is_some(), policy.action) {
                (false, Action::Allow) => {
                    "its rules ask for HTTP, and this is opaque TCP: they can't match, or it has none".into()
                }
                (false, Action::Custom) => {
                    "its authorizer speaks HTTP and is not asked about opaque TCP, or it has no rules".into()
                }
                _ => "it has no rules, so it matches nothing".into(),
            });
        }
    }
    let explanation = conclude(engine, &outcome, policies);
    (outcome, explanation)
}

fn conclude(engine: &Engine, outcome: &Outcome, policies: Vec<PolicyTrace>) -> Explanation {
    let name = |id: PolicyId| engine.policy(id).map_or_else(String::new, |policy| policy.name.to_string());
    let (verdict, reason, policy) = match outcome.verdict {
        Verdict::Allow(Allowed::NoAllowPolicy) => ("allow", "no policy denies it, and there is no ALLOW policy".to_owned(), None),
        Verdict::Allow(Allowed::By(id)) => ("allow", format!("ALLOW policy {} matches", name(id)), Some(id)),
        Verdict::Deny(Denied::NoAllowMatched) => ("deny", "there are ALLOW policies, and none matches".to_owned(), None),
        Verdict::Deny(Denied::By(id)) => ("deny", format!("DENY policy {} matches", name(id)), Some(id)),
        Verdict::Deny(Denied::NoAuthorizer(id)) => {
            ("deny", format!("CUSTOM policy {} matches, and its authorizer is not known", name(id)), Some(id))
        }
        Verdict::Deny(Denied::Broken(id)) => {
            ("deny", format!("policy {} can't be understood, so it refuses everything", name(id)), Some(id))
        }
        Verdict::Ask(id) => {
            let authorizer = engine.policy(id).and_then(|policy| policy.authorizer.as_ref());
            let authorizer = authorizer.map_or_else(String::new, |authorizer| format!(" ({})", authorizer.name));
            ("ask", format!("CUSTOM policy {} matches: its authorizer{authorizer} decides first", name(id)), Some(id))
        }
    };
    let dry_run = outcome.shadow.map(|shadow| match shadow {
        Shadow::DeniedBy(id) => format!("DENY policy {} (dry run) would refuse it", name(id)),
        Shadow::AllowedBy(id) => format!("ALLOW policy {} (dry run) matches", name(id)),
        Shadow::NoAllowMatched => "no ALLOW policy in dry run matches: they would refuse it".into(),
        Shadow::WouldAsk(id) => format!("CUSTOM policy {} (dry run) would have its authorizer asked", name(id)),
        Shadow::Passed => "policies in dry run have nothing against it".into(),
    });
    Explanation { verdict, reason, policy: policy.map(name), dry_run, policies }
}

/// Writes down what failed.
struct Notes(Vec<Failure>);

impl Witness for Notes {
    fn failed(&mut self, place: Place, field: &Field, request: &Request<'_>) {
        let name = match place {
            Place::From(n) => format!("from[{n}].{}", field.name),
            Place::To(n) => format!("to[{n}].{}", field.name),
            Place::When => field.name.to_string(),
        };
        let expected = field.expected();
        let list = expected.join(", ");
        let actual = field.actual(request);
        let has =
            actual.as_ref().map_or_else(|| "the request has none".to_owned(), |actual| format!("the request has {actual:?}"));
        let relation = if field.negated { "which is excluded" } else { "not one" };
        let words = format!("{name}: {has}, {relation} of [{list}]");
        self.0.push(Failure { field: name, expected, actual, words });
    }
}
