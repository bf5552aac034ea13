//! Who may: AuthorizationPolicies, compiled once per configuration, and the verdict about a request.
//!
//! Order, as Istio's users know it: CUSTOM policies (an external authorizer is asked), then DENY, then ALLOW, and AUDIT, which only tells.
//! Without an ALLOW policy everything that is not denied may pass; with one, only what an ALLOW matches. Policies in dry run have a verdict
//! of their own, which is reported and never enforced.
//!
//! [`Engine::check`] allocates nothing (but where a policy asks for `:path` and there is a query). A policy that can't be understood is
//! *broken*: as ALLOW it matches nothing, as DENY or CUSTOM it denies everything. Nothing here can fail at the time of a request.
//!
//! Connections whose bytes are not looked into have rules of their own, made beforehand: an ALLOW rule with a test of HTTP does not
//! count, of other rules only the test is left out, and CUSTOM policies whose authorizer speaks HTTP are not asked.

mod compile;
mod field;
mod index;
mod request;
mod rule;
mod text;

pub use request::{Headers, Http, Peer, Request};

pub(crate) use field::Field;
use index::{Index, RuleId};
pub(crate) use rule::{Place, Rule, Unseen, Witness};
use weft_api::wire;
use weft_api::wire::external_authorizer::Protocol;

/// What a policy does with what it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Action {
    /// Lets it in.
    Allow,
    /// Keeps it out.
    Deny,
    /// Tells of it.
    Audit,
    /// Has someone else asked.
    Custom,
}

impl Action {
    /// As metrics and logs spell it: "ALLOW", "DENY", "AUDIT", "CUSTOM".
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "ALLOW",
            Self::Deny => "DENY",
            Self::Audit => "AUDIT",
            Self::Custom => "CUSTOM",
        }
    }
}

impl From<Action> for wire::AuthorizationAction {
    fn from(action: Action) -> Self {
        match action {
            Action::Allow => Self::Allow,
            Action::Deny => Self::Deny,
            Action::Audit => Self::Audit,
            Action::Custom => Self::Custom,
        }
    }
}

/// Place of a policy in the configuration: see [`Engine::policy`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PolicyId(pub u32);

/// What is known of a policy besides its rules.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// "namespace/name".
    pub name: Box<str>,
    /// What it does.
    pub action: Action,
    /// It is evaluated and reported, never enforced.
    pub dry_run: bool,
    /// Why it can't be understood, if so.
    pub broken: Option<Box<str>>,
    /// CUSTOM: who is asked.
    pub authorizer: Option<wire::ExternalAuthorizer>,
    /// Policies with equal authorizers have equal numbers: a request is sent to each authorizer once.
    authorizer_number: u32,
}

/// Why something may pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// There is no ALLOW policy.
    NoAllowPolicy,
    /// This one matched.
    By(PolicyId),
}

/// Why something may not pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    /// This DENY policy matched.
    By(PolicyId),
    /// There are ALLOW policies, and none matched.
    NoAllowMatched,
    /// This CUSTOM policy matched, and it names nobody who could be asked.
    NoAuthorizer(PolicyId),
    /// This DENY or CUSTOM policy can't be understood.
    Broken(PolicyId),
}

impl Denied {
    /// The policy that decided; `None`: that none did is the reason.
    pub fn policy(self) -> Option<PolicyId> {
        match self {
            Self::By(id) | Self::NoAuthorizer(id) | Self::Broken(id) => Some(id),
            Self::NoAllowMatched => None,
        }
    }
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Let it pass.
    Allow(Allowed),
    /// Refuse it.
    Deny(Denied),
    /// Ask the authorizer of this CUSTOM policy; if it agrees, go on with [`Engine::resume`].
    Ask(PolicyId),
}

/// What the policies in dry run would do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shadow {
    /// A DENY in dry run would refuse this.
    DeniedBy(PolicyId),
    /// An ALLOW in dry run matches, so it would pass.
    AllowedBy(PolicyId),
    /// There are ALLOW policies in dry run, and none matches: were they in force, it would be refused.
    NoAllowMatched,
    /// A CUSTOM in dry run would have its authorizer asked.
    WouldAsk(PolicyId),
    /// Policies in dry run have nothing against it.
    Passed,
}

/// All that the policies say of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// What is to be done.
    pub verdict: Verdict,
    /// What policies in dry run say; `None`: there are none.
    pub shadow: Option<Shadow>,
    /// The first AUDIT policy that matches.
    pub audit: Option<PolicyId>,
}

/// Rules that are alike in what follows from a match. Their order is that of rule ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Group {
    /// DENY or CUSTOM, broken or without anybody to ask: refuses.
    Closed,
    Custom,
    Deny,
    Allow,
    Audit,
    DryDeny,
    DryAllow,
    DryCustom,
    DryAudit,
}

const GROUPS: usize = 9;

/// The first rule of each group that matches.
type Found = [Option<RuleId>; GROUPS];

#[derive(Debug)]
struct Entry {
    policy: PolicyId,
    group: Group,
    authorizer: u32,
    rule: Rule,
    /// Its place in the policy.
    place: usize,
}

/// The rules for one kind of traffic.
#[derive(Debug, Default)]
struct Table {
    entries: Vec<Entry>,
    /// Where the ids of each group end.
    ends: [RuleId; GROUPS],
    index: Index,
}

/// The policies of a workload, compiled.
#[derive(Debug, Default)]
pub struct Engine {
    policies: Vec<Policy>,
    http: Table,
    tcp: Table,
    has_allow: bool,
    has_dry: bool,
    has_dry_allow: bool,
}

impl Engine {
    /// Compiles policies. `trust_domains` are the mesh's own, the main one first. It can't fail: what isn't understood is broken
    /// (see [`Policy::broken`]) and closes.
    pub fn compile(policies: &[wire::AuthorizationPolicy], trust_domains: &[String]) -> Self {
        let mut engine = Self::default();
        let mut authorizers: Vec<&wire::ExternalAuthorizer> = Vec::new();
        let mut http = Vec::new();
        let mut tcp = Vec::new();
        for (n, wire) in policies.iter().enumerate() {
            let id = PolicyId(n as u32);
            let (mut policy, rules) = read(wire, trust_domains);
            if let Some(authorizer) = &wire.authorizer {
                let known = authorizers.iter().position(|known| *known == authorizer);
                policy.authorizer_number = known.unwrap_or_else(|| {
                    authorizers.push(authorizer);
                    authorizers.len() - 1
                }) as u32;
            }
            let allow = policy.action == Action::Allow;
            engine.has_dry |= policy.dry_run;
            engine.has_allow |= allow && !policy.dry_run;
            engine.has_dry_allow |= allow && policy.dry_run;
            let group = group(&policy);
            let asks_http = policy.action == Action::Custom && policy.broken.is_none() && asks_http(&policy);
            for (place, rule) in rules.into_iter().enumerate() {
                let entry = |rule| Entry { policy: id, group, authorizer: policy.authorizer_number, rule, place };
                if !asks_http && let Some(rule) = compile::for_tcp(&rule, allow) {
                    tcp.push(entry(rule));
                }
                http.push(entry(rule));
            }
            engine.policies.push(policy);
        }
        engine.http = Table::new(http);
        engine.tcp = Table::new(tcp);
        engine
    }

    /// Decides. The first CUSTOM policy that matches comes as [`Verdict::Ask`]; ask, and go on with [`Engine::resume`].
    pub fn check(&self, request: &Request<'_>) -> Outcome {
        let table = self.table(request);
        self.conclude(table, table.find(request, 0))
    }

    /// Goes on after the authorizer of a policy has agreed: the next authorizer, or the verdict of the others.
    pub fn resume(&self, request: &Request<'_>, asked: PolicyId) -> Outcome {
        let table = self.table(request);
        let next = self.policies.get(asked.0 as usize).map_or(0, |policy| policy.authorizer_number + 1);
        self.conclude(table, table.find(request, next))
    }

    /// All policies, in the order of the configuration.
    pub fn policies(&self) -> &[Policy] {
        &self.policies
    }

    /// A policy by what verdicts call it.
    pub fn policy(&self, id: PolicyId) -> Option<&Policy> {
        self.policies.get(id.0 as usize)
    }

    /// Whether no policy selects the workload: everything passes, and there is nothing to report.
    pub fn is_empty(&self) -> bool {
        self.policies.is_empty()
    }

    fn table(&self, request: &Request<'_>) -> &Table {
        if request.http.is_some() { &self.http } else { &self.tcp }
    }

    /// From what matched to what follows: the one place that knows the order of actions.
    fn conclude(&self, table: &Table, found: Found) -> Outcome {
        let policy = |group: Group| found[group as usize].map(|id| table.entries[id as usize].policy);
        let verdict = if let Some(id) = policy(Group::Closed) {
            let broken = self.policies[id.0 as usize].broken.is_some();
            Verdict::Deny(if broken { Denied::Broken(id) } else { Denied::NoAuthorizer(id) })
        } else if let Some(id) = policy(Group::Custom) {
            Verdict::Ask(id)
        } else if let Some(id) = policy(Group::Deny) {
            Verdict::Deny(Denied::By(id))
        } else if let Some(id) = policy(Group::Allow) {
            Verdict::Allow(Allowed::By(id))
        } else if self.has_allow {
            Verdict::Deny(Denied::NoAllowMatched)
        } else {
            Verdict::Allow(Allowed::NoAllowPolicy)
        };
        let shadow = self.has_dry.then(|| {
            if let Some(id) = policy(Group::DryDeny) {
                Shadow::DeniedBy(id)
            } else if let Some(id) = policy(Group::DryAllow) {
                Shadow::AllowedBy(id)
            } else if self.has_dry_allow {
                Shadow::NoAllowMatched
            } else {
                policy(Group::DryCustom).map_or(Shadow::Passed, Shadow::WouldAsk)
            }
        });
        Outcome { verdict, shadow, audit: policy(Group::Audit) }
    }

    /// Evaluates every rule, in order, telling about each. The verdict is put together from the same tests by the same
    /// [`Engine::conclude`] as in [`Engine::check`].
    pub(crate) fn walk(
        &self,
        request: &Request<'_>,
        from: u32,
        mut each: impl FnMut(&Policy, PolicyId, usize, &Rule) -> bool,
    ) -> Outcome {
        let table = self.table(request);
        let mut found = Found::default();
        for (id, entry) in table.entries.iter().enumerate() {
            let matched = each(&self.policies[entry.policy.0 as usize], entry.policy, entry.place, &entry.rule);
            let counts = entry.group != Group::Custom || entry.authorizer >= from;
            let first = &mut found[entry.group as usize];
            if matched && counts && first.is_none() {
                *first = Some(id as RuleId);
            }
        }
        self.conclude(table, found)
    }

    /// The number of a policy's authorizer, for [`Engine::walk`].
    pub(crate) fn after(&self, asked: PolicyId) -> u32 {
        self.policies.get(asked.0 as usize).map_or(0, |policy| policy.authorizer_number + 1)
    }
}

impl Table {
    fn new(mut entries: Vec<Entry>) -> Self {
        // Stable: within a group by authorizer, else by the order of the configuration.
        entries.sort_by_key(|entry| (entry.group, if entry.group == Group::Custom { entry.authorizer } else { 0 }));
        let index = Index::new(entries.iter().map(|entry| &entry.rule));
        let mut ends = [0; GROUPS];
        for (group, end) in ends.iter_mut().enumerate() {
            *end = entries.partition_point(|entry| entry.group as usize <= group) as RuleId;
        }
        Self { entries, ends, index }
    }

    /// The first rule of each group that matches. CUSTOM counts from the authorizer with this number.
    fn find(&self, request: &Request<'_>, authorizers_from: u32) -> Found {
        let mut found = Found::default();
        self.index.candidates(request, |ids| {
            let mut rest = ids;
            while let Some((&id, tail)) = rest.split_first() {
                rest = tail;
                let entry = &self.entries[id as usize];
                let first = &mut found[entry.group as usize];
                if first.is_some_and(|first| first <= id) {
                    // Nothing better comes in this group: on to the next.
                    let end = self.ends[entry.group as usize];
                    rest = &rest[rest.partition_point(|other| *other < end)..];
                } else if (entry.group != Group::Custom || entry.authorizer >= authorizers_from)
                    && entry.rule.matches(request, &mut Unseen)
                {
                    *first = Some(id);
                }
            }
        });
        found
    }
}

fn group(policy: &Policy) -> Group {
    match (policy.action, policy.dry_run) {
        (Action::Allow, false) => Group::Allow,
        (Action::Audit, false) => Group::Audit,
        (Action::Deny | Action::Custom, false) if policy.broken.is_some() => Group::Closed,
        (Action::Deny, false) => Group::Deny,
        (Action::Custom, false) if policy.authorizer.is_none() => Group::Closed,
        (Action::Custom, false) => Group::Custom,
        (Action::Deny, true) => Group::DryDeny,
        (Action::Allow, true) => Group::DryAllow,
        (Action::Custom, true) => Group::DryCustom,
        (Action::Audit, true) => Group::DryAudit,
    }
}

fn asks_http(policy: &Policy) -> bool {
    policy.authorizer.as_ref().is_some_and(|authorizer| matches!(authorizer.protocol, Some(Protocol::Http(_))))
}

/// A policy and its rules for HTTP.
fn read(wire: &wire::AuthorizationPolicy, trust_domains: &[String]) -> (Policy, Vec<Rule>) {
    let action = wire::AuthorizationAction::try_from(wire.action).map(|action| match action {
        wire::AuthorizationAction::Allow => Action::Allow,
        wire::AuthorizationAction::Deny => Action::Deny,
        wire::AuthorizationAction::Audit => Action::Audit,
        wire::AuthorizationAction::Custom => Action::Custom,
    });
    let rules = match (&action, wire.broken.as_str()) {
        (Err(_), _) => Err(format!("action {} is not known to this version", wire.action)),
        (Ok(_), "") => compile::rules(wire, trust_domains),
        (Ok(_), why) => Err(why.to_owned()),
    };
    // An action that nobody knows may have been meant to deny.
    let action = action.unwrap_or(Action::Deny);
    let usable = wire.authorizer.as_ref().filter(|authorizer| authorizer.protocol.is_some() && !authorizer.address.is_empty());
    let (rules, broken) = match rules {
        Ok(rules) => (rules, None),
        Err(why) => {
            let closes = matches!(action, Action::Deny | Action::Custom);
            (if closes { vec![Rule::default()] } else { Vec::new() }, Some(why.into_boxed_str()))
        }
    };
    let policy = Policy {
        name: format!("{}/{}", wire.namespace, wire.name).into(),
        action,
        dry_run: wire.dry_run,
        broken,
        authorizer: usable.cloned(),
        authorizer_number: 0,
    };
    (policy, rules)
}

#[cfg(test)]
mod tests;
