//! Keeps the certificate authority in force, on every replica, and takes the steps of [`state`](super::state), on the one that leads.
//!
//! Every replica follows two Secrets by watches: `weft-ca`, which holds the shared state, and the user's. What they hold is tried, and
//! what can sign is remembered by its fingerprint; the state says which of them does. What can't be used changes nothing: the last good one
//! stays in force, and the log, an event on the Secret, a metric and [`Status`] say what is wrong, by Secret and key.
//!
//! A replica that lacks what signs (it was restarted while a user's Secret is broken) does not sign, says so, and serves all else.
//!
//! `weft-ca` is never made anew while a replica lives that knows it: whoever deletes it finds it written again, since a new root in its place
//! would cut off every pod.

use super::authority::{Authority, Clock};
use super::issue::{self, Pair};
use super::resolver::Resolver;
use super::serving::Serving;
use super::signer::Signer;
use super::state::{Candidate, Circumstances, Found, Note, State, Theirs, short};
use super::store::{Shared, Store, Written, read_secret, shared_of_secret};
use super::user::{self, seconds};
use crate::events::{Events, Kind};
use crate::metrics::Metrics;
use crate::model::Owner;
use crate::source::kube::backoff;
use futures::{StreamExt, pin_mut};
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::runtime::watcher;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tracing::{debug, error, info, warn};
use weft_api::names;

/// Part of a self-made root's life after which the next one is made.
const ROOT_PART: f64 = 0.8;
/// Longest time between two looks at the state.
const LOOK: Duration = Duration::from_secs(3600);
/// The same while an old root is on its way out: whether all have moved is not told by a watch.
const LOOK_OUT: Duration = Duration::from_secs(20);
/// The same where files are what somebody asks by.
const LOOK_FILES: Duration = Duration::from_secs(2);
/// What clocks may differ by, and signatures that are under way may take: how long a root stays after the last leaf below it has expired.
const MARGIN: Duration = Duration::from_secs(3600);

/// Which Secret a user's certificate authority is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UserSecret {
    /// None is looked for: there is no cluster.
    None,
    /// `cacerts`, if it is there.
    Default,
    /// This one; it must be there.
    Named(String),
}

impl UserSecret {
    /// Its name.
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::None => None,
            Self::Default => Some(names::USER_CA_SECRET),
            Self::Named(name) => Some(name),
        }
    }
}

/// How certificates are made.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The names that the serving certificate bears.
    pub names: Vec<String>,
    /// Its life.
    pub life: Duration,
    /// Longest life of workloads' certificates.
    pub leaf_life: Duration,
    /// How long a new root is made known before anything is signed below it.
    pub delay: Duration,
    /// Where the user's authority is.
    pub secret: UserSecret,
}

/// What a rotation depends on outside of the authority.
#[derive(Default)]
pub struct Outside {
    /// The bundle that all of a kind have, by what the kind is called; see [`keep`](crate::keep).
    pub spread: Vec<(&'static str, watch::Receiver<Arc<str>>)>,
    /// Whether every meshed pod is known to have a leaf that this one signed; `None`: nobody can tell.
    pub moved: Option<Moved>,
}

/// See [`Outside::moved`].
pub type Moved = Box<dyn Fn(&Signer) -> bool + Send + Sync>;

/// What the authority is doing, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// The shared state.
    pub state: State,
    /// Subject of what signs; empty: nothing does, on this replica.
    pub issuer: String,
    /// When it ends, seconds since 1970.
    pub not_after: u64,
    /// What is wrong with the user's Secret or with what signs; empty: nothing.
    pub problem: String,
    /// What is waited for; empty: nothing. Known on the replica that leads.
    pub waiting: String,
}

impl From<&Status> for weft_api::console::Authority {
    fn from(status: &Status) -> Self {
        let state = &status.state;
        let roots = state.roots.iter().map(|root| {
            let facts = issue::facts(&root.pem).ok();
            weft_api::console::Root {
                fingerprint: root.fingerprint.clone(),
                subject: facts.as_ref().map(|facts| facts.subject.clone()).unwrap_or_default(),
                not_after: facts.map(|facts| seconds(facts.not_after)).unwrap_or_default(),
                added: root.added,
                retired: root.retired,
                signs: root.fingerprint == state.issuer_root,
            }
        });
        Self {
            issuer: state.issuer.clone(),
            subject: status.issuer.clone(),
            not_after: status.not_after,
            secret: state.secret.clone(),
            roots: roots.collect(),
            renew_before: state.renew_before,
            renewed: state.renewed.clone(),
            rotated: state.rotated.clone(),
            waiting: status.waiting.clone(),
            problem: status.problem.clone(),
        }
    }
}

#[derive(Default)]
struct Known {
    /// What can sign, by fingerprint, with the root's.
    signers: HashMap<String, (Arc<Signer>, String)>,
    theirs: Theirs,
    theirs_problem: String,
    /// Uid of the user's Secret, for events.
    uid: String,
    shared: Option<Shared>,
    waiting: String,
}

/// The authority.
pub struct Keeper {
    store: Store,
    plan: Plan,
    metrics: Arc<Metrics>,
    clock: Clock,
    news: Option<Events>,
    authority: watch::Sender<Option<Arc<Authority>>>,
    status: watch::Sender<Arc<Status>>,
    known: Mutex<Known>,
    woken: Notify,
    serving: Serving,
}

/// What a keeper is made of.
pub struct Setup {
    /// Where things are kept.
    pub store: Store,
    /// How certificates are made.
    pub plan: Plan,
    /// What hands the serving certificate to TLS.
    pub resolver: Arc<Resolver>,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Tells the time.
    pub clock: Clock,
    /// Where news go.
    pub news: Option<Events>,
    /// Where what is in force is put.
    pub authority: watch::Sender<Option<Arc<Authority>>>,
    /// Where what it is doing is put.
    pub status: watch::Sender<Arc<Status>>,
}

impl Keeper {
    /// Reads or makes the authority and a serving certificate, and puts them in force. Tries until it has succeeded: an API server that is
    /// away at our start is no reason to end, and a broken Secret may be mended.
    pub async fn open(setup: Setup) -> Self {
        let keeper = Self::new(setup);
        let mut failures = 0;
        while let Err(error) = keeper.begin().await {
            failures += 1;
            if failures == 1 || failures % 10 == 0 {
                warn!(failures, "not serving yet: {error:#}; trying again");
            }
            keeper.status.send_modify(|status| Arc::make_mut(status).problem = format!("{error:#}"));
            tokio::time::sleep(backoff(failures)).await;
        }
        keeper
    }

    fn new(setup: Setup) -> Self {
        let Setup { store, plan, resolver, metrics, clock, news, authority, status } = setup;
        let serving = Serving {
            store: store.clone(),
            names: plan.names.clone(),
            life: plan.life,
            resolver,
            metrics: metrics.clone(),
            authority: authority.subscribe(),
            clock: clock.clone(),
        };
        metrics.authority_good.set(1);
        Self { store, plan, metrics, clock, news, authority, status, known: Mutex::default(), woken: Notify::new(), serving }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // What a panic leaves half done is done again by the next look.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it is doing.
    pub fn status(&self) -> watch::Receiver<Arc<Status>> {
        self.status.subscribe()
    }

    /// What is in force.
    pub fn authority(&self) -> super::authority::InForce {
        self.authority.subscribe()
    }

    async fn begin(&self) -> anyhow::Result<()> {
        if let (Store::Secrets { client, namespace }, Some(name)) = (&self.store, self.plan.secret.name()) {
            let secret = read_secret(client, namespace, name).await?;
            self.learn_theirs(secret.as_ref());
        }
        let shared = self.store.shared().await?;
        let begun = shared.as_ref().is_some_and(|s| s.state.as_ref().is_some_and(|state| !state.issuer.is_empty()));
        if begun {
            // Somebody else may lead: what is written counts.
            self.learn_shared(shared.unwrap_or_default())?;
        } else {
            let nothing = shared.as_ref().is_none_or(|s| s.own.is_none());
            let problem = {
                let known = self.known();
                (nothing && known.theirs == Theirs::Broken).then(|| known.theirs_problem.clone())
            };
            if let Some(problem) = problem {
                anyhow::bail!("{problem}");
            }
            self.step(&Outside::default()).await?;
        }
        self.serving.open().await
    }

    /// Follows both Secrets and the serving certificate, and, while `leader` says so, takes steps. Runs until it is dropped.
    pub async fn run(&self, mut leader: watch::Receiver<bool>, outside: Outside) {
        let serving = self.serving.run(leader.clone());
        let lead = async {
            let mut failures = 0;
            let mut spread: Vec<_> = outside.spread.iter().map(|(_, has)| has.clone()).collect();
            loop {
                if leader.wait_for(|leads| *leads).await.is_err() {
                    std::future::pending::<()>().await;
                }
                // Before the step looks at them, so that none of their changes is missed.
                spread.iter_mut().for_each(watch::Receiver::mark_unchanged);
                match self.step(&outside).await {
                    Ok(next) => {
                        failures = 0;
                        tokio::select! {
                            () = tokio::time::sleep(next) => {}
                            () = self.woken.notified() => {}
                            () = any_change(&mut spread) => {}
                            _ = leader.changed() => {}
                        }
                    }
                    Err(error) => {
                        failures += 1;
                        if failures == 1 || failures % 10 == 0 {
                            error!("certificate authority: {error:#}; what is in force stays, trying again");
                        }
                        tokio::time::sleep(backoff(failures)).await;
                    }
                }
            }
        };
        tokio::join!(lead, self.follow_shared(), self.follow_theirs(), serving);
    }

    /// One look at what is shared, and the step that is due, if any. Returns how long there is nothing to do.
    async fn step(&self, outside: &Outside) -> anyhow::Result<Duration> {
        let stored = self.store.shared().await?;
        let gone = stored.is_none();
        let known = self.known().shared.clone();
        let shared = match (stored, known) {
            (Some(shared), _) => shared,
            (None, Some(known)) => {
                warn!("secret {} is gone; writing it again as it was", names::CA_SECRET);
                known.anew()
            }
            (None, None) => Shared::default(),
        };
        let before = shared.clone();
        let mut found = Found { own: self.own(&shared)?, next: None, theirs: self.known().theirs.clone() };
        // A root that is still to come and can't be used is made again.
        found.next = shared.next.as_ref().and_then(|next| self.self_made(next).ok());
        let mut after = shared;
        let mut state = match (&after.state, &found.own) {
            (Some(state), _) => state.clone(),
            (None, Some(own)) => State::of_own(own),
            (None, None) => State::default(),
        };
        let mut notes = Vec::new();
        let (wait, waiting) = loop {
            let bundle = state.bundle();
            let held_up = outside.spread.iter().find(|(_, has)| **has.borrow() != *bundle).map_or("", |(what, _)| what);
            let signer = self.known().signers.get(&state.issuer).map(|(signer, _)| signer.clone());
            let moved = outside.moved.as_ref().zip(signer.as_ref()).is_some_and(|(moved, signer)| moved(signer));
            let present_until = signer.map_or(0, |signer| seconds(signer.not_after()));
            let step = state.step(
                &found,
                &after.asked,
                Circumstances {
                    now: seconds((self.clock)()),
                    delay: self.plan.delay.as_secs(),
                    settle: names::LEAF_BACKDATE_SECONDS,
                    present_until,
                    keep: (self.plan.leaf_life + MARGIN).as_secs(),
                    spread: held_up.is_empty(),
                    moved,
                    root_part: ROOT_PART,
                    held_up,
                },
            );
            notes.extend(step.notes);
            state = step.state;
            if step.promote {
                after.own = after.next.take();
                found.own = found.next.take();
            }
            if !step.make {
                break (step.wait, step.waiting);
            }
            let root = issue::root((self.clock)())?;
            found.next = Some(self.self_made(&root)?);
            after.next = Some(root);
        };
        after.state = Some(state);
        if gone || before.state != after.state || before.next != after.next || before.own != after.own {
            anyhow::ensure!(
                self.store.write_shared(&after).await? == Written::Yes,
                "another replica has just written secret {}",
                names::CA_SECRET
            );
        }
        // The first root of all is no news.
        let news = before.state.as_ref().is_some_and(|state| !state.issuer.is_empty());
        for note in notes {
            self.tell(&note, news);
        }
        let out = after.state.as_ref().is_some_and(|state| state.roots.iter().any(|root| root.retired != 0));
        self.known().waiting = waiting;
        self.learn_shared(after)?;
        let longest = match &self.store {
            Store::Folder(_) => LOOK_FILES,
            Store::Secrets { .. } | Store::Memory(_) if out => LOOK_OUT,
            Store::Secrets { .. } | Store::Memory(_) => LOOK,
        };
        Ok(wait.map_or(longest, Duration::from_secs).min(longest))
    }

    fn own(&self, shared: &Shared) -> anyhow::Result<Option<Candidate>> {
        let Some(own) = &shared.own else { return Ok(None) };
        match self.self_made(own) {
            Ok(own) => Ok(Some(own)),
            // Where another one signs, it is no matter.
            Err(error) if shared.state.as_ref().is_some_and(|state| !state.secret.is_empty()) => {
                warn!("the self-made root in secret {} can't be used: {error}", names::CA_SECRET);
                Ok(None)
            }
            // A new root would cut off every pod that trusts this one: that is for a person to decide.
            Err(error) => anyhow::bail!(
                "the root in secret {} can't be used: {error}. Put it right, or delete the secret and restart the control plane to begin \
                 with a new root (pods then have to be restarted)",
                names::CA_SECRET
            ),
        }
    }

    /// Remembers a self-made root as what can sign.
    fn self_made(&self, root: &Pair) -> anyhow::Result<Candidate> {
        let facts = issue::check_ca(root)?;
        let signer = Arc::new(Signer::of_root(root)?);
        let fingerprint = issue::hex(&signer.fingerprint());
        self.known().signers.entry(fingerprint.clone()).or_insert_with(|| (signer, fingerprint.clone()));
        Ok(Candidate {
            issuer: fingerprint.clone(),
            root: fingerprint.clone(),
            roots: vec![(fingerprint, issue::pem(&issue::der(&root.certificate)?))],
            not_before: seconds(facts.not_before),
            not_after: seconds(facts.not_after),
        })
    }

    /// Takes over what is shared.
    fn learn_shared(&self, shared: Shared) -> anyhow::Result<()> {
        for pair in [&shared.own, &shared.next].into_iter().flatten() {
            if let Err(error) = self.self_made(pair) {
                debug!(%error, "a self-made root can't be used");
            }
        }
        self.known().shared = Some(shared);
        self.publish()
    }

    /// Takes over what the user's Secret holds; `None`: there is none.
    fn learn_theirs(&self, secret: Option<&Secret>) {
        let Some(name) = self.plan.secret.name() else { return };
        let namespace = match &self.store {
            Store::Secrets { namespace, .. } => namespace.as_str(),
            Store::Folder(_) | Store::Memory(_) => "",
        };
        let (theirs, problem) = match secret {
            None => match &self.plan.secret {
                UserSecret::Named(_) => (
                    Theirs::Broken,
                    format!(
                        "secret {namespace}/{name} does not exist; create it, or take --ca-secret (chart value identity.caSecret) out"
                    ),
                ),
                UserSecret::Default | UserSecret::None => (Theirs::Absent, String::new()),
            },
            Some(secret) => {
                let data = secret.data.iter().flatten().map(|(key, value)| (key.clone(), value.0.clone())).collect();
                match user::read(&data, (self.clock)()) {
                    Ok(given) => {
                        let candidate = given.candidate;
                        let signer = (given.signer, candidate.root.clone());
                        self.known().signers.insert(candidate.issuer.clone(), signer);
                        (Theirs::Given(name.to_owned(), candidate), String::new())
                    }
                    Err(error) => (Theirs::Broken, format!("secret {namespace}/{name}, {error}")),
                }
            }
        };
        let mut known = self.known();
        if let Some(secret) = secret {
            known.uid = secret.metadata.uid.clone().unwrap_or_default();
        }
        let changed = known.theirs != theirs || known.theirs_problem != problem;
        known.theirs = theirs;
        known.theirs_problem.clone_from(&problem);
        drop(known);
        self.metrics.authority_good.set(i64::from(problem.is_empty()));
        if !changed {
            return;
        }
        if !problem.is_empty() {
            error!("the certificate authority of the user can't be used: {problem}. The last good one stays in force");
            self.event(name, Kind::AuthorityRefused, format!("{problem}. The last good certificate authority stays in force"));
        }
        self.woken.notify_one();
    }

    fn event(&self, secret: &str, kind: Kind, note: String) {
        let (Some(news), Store::Secrets { namespace, .. }) = (&self.news, &self.store) else { return };
        let uid = if secret == names::CA_SECRET { String::new() } else { self.known().uid.clone() };
        let about = Owner { api_version: "v1".into(), kind: "Secret".into(), name: secret.into(), uid };
        news.send(namespace, about, kind, note);
    }

    fn tell(&self, note: &Note, news: bool) {
        match note {
            Note::Good(text) => {
                info!("certificate authority: {text}");
                if !news {
                    return;
                }
                self.event(names::CA_SECRET, Kind::AuthorityChanged, text.clone());
            }
            Note::Bad(text) => {
                warn!("certificate authority: {text}");
                self.event(names::CA_SECRET, Kind::AuthorityRefused, text.clone());
            }
        }
    }

    /// Puts in force what is known.
    fn publish(&self) -> anyhow::Result<()> {
        let known = self.known();
        let Some(state) = known.shared.as_ref().and_then(|shared| shared.state.clone()) else { return Ok(()) };
        let signer = signer(&known, &state, self.authority.borrow().as_deref());
        let mut problem = known.theirs_problem.clone();
        if problem.is_empty() && known.theirs == Theirs::Absent && !state.secret.is_empty() {
            problem = format!(
                "secret {} is gone; restore it, or go back to a self-made root by `weft identity rotate --root`. The last good certificate \
                 authority stays in force",
                state.secret
            );
        }
        if let (true, Err(reason)) = (problem.is_empty(), &signer) {
            problem.clone_from(reason);
        }
        let status = Status {
            issuer: signer.as_ref().map(|signer| signer.name().to_owned()).unwrap_or_default(),
            not_after: signer.as_ref().map(|signer| seconds(signer.not_after())).unwrap_or_default(),
            problem,
            waiting: known.waiting.clone(),
            state,
        };
        drop(known);
        if let Ok(signer) = &signer {
            self.metrics.issuer_expiry.set(seconds(signer.not_after()) as i64);
        }
        self.metrics.authority_good.set(i64::from(status.problem.is_empty()));
        self.metrics.roots.set(status.state.roots.len() as i64);
        if let Some(root) = status.state.roots.iter().find(|root| root.fingerprint == status.state.issuer_root) {
            self.metrics.root_expiry.set(seconds(issue::facts(&root.pem)?.not_after) as i64);
        }
        let authority = Authority::new(&status.state, signer)?;
        self.authority.send_if_modified(|before| {
            let same = before.as_ref().is_some_and(|before| before.same(&authority));
            if !same {
                *before = Some(Arc::new(authority));
            }
            !same
        });
        self.status.send_if_modified(|before| {
            let differs = **before != status;
            if differs {
                *before = Arc::new(status);
            }
            differs
        });
        Ok(())
    }

    async fn follow_shared(&self) {
        let Store::Secrets { client, namespace } = &self.store else { return std::future::pending().await };
        follow(Api::namespaced(client.clone(), namespace), names::CA_SECRET, |secret| {
            if let Some(secret) = secret
                && let Err(error) =
                    shared_of_secret(secret).map_err(anyhow::Error::from).and_then(|shared| self.learn_shared(shared))
            {
                error!("certificate authority: {error:#}; what is in force stays");
            }
            self.woken.notify_one();
        })
        .await;
    }

    async fn follow_theirs(&self) {
        let (Store::Secrets { client, namespace }, Some(name)) = (&self.store, self.plan.secret.name()) else {
            return std::future::pending().await;
        };
        follow(Api::namespaced(client.clone(), namespace), name, |secret| {
            self.learn_theirs(secret.as_ref());
            if let Err(error) = self.publish() {
                error!("certificate authority: {error:#}; what is in force stays");
            }
        })
        .await;
    }
}

/// What signs by the state; where this replica lacks it, what signed before, as long as its root is no old one.
fn signer(known: &Known, state: &State, before: Option<&Authority>) -> Result<Arc<Signer>, String> {
    if let Some((signer, _)) = known.signers.get(&state.issuer) {
        return Ok(signer.clone());
    }
    if let Some(Ok(signer)) = before.map(|before| &before.signer)
        && let Some((_, root)) = known.signers.get(&issue::hex(&signer.fingerprint()))
        && *root == state.issuer_root
    {
        return Ok(signer.clone());
    }
    let what = if state.secret.is_empty() { names::CA_SECRET } else { &state.secret };
    let why = if known.theirs_problem.is_empty() { String::new() } else { format!(": {}", known.theirs_problem) };
    Err(format!("it lacks the certificate {} (secret {what}) that signs{why}", short(&state.issuer)))
}

/// Waits until one of the bundles that are known to be everywhere is another.
async fn any_change(spread: &mut [watch::Receiver<Arc<str>>]) {
    if spread.is_empty() {
        return std::future::pending().await;
    }
    let waits = spread.iter_mut().map(|has| {
        Box::pin(async move {
            if has.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        })
    });
    futures::future::select_all(waits).await;
}

/// Calls `learn` with a Secret whenever it changes, `None` when it is gone. Runs until it is dropped.
async fn follow(api: Api<Secret>, name: &str, mut learn: impl FnMut(Option<Secret>)) {
    let events = watcher::watcher(api, watcher::Config::default().fields(&format!("metadata.name={name}")));
    pin_mut!(events);
    let mut failures = 0;
    let mut seen = false;
    while let Some(event) = events.next().await {
        match event {
            Ok(watcher::Event::Init) => seen = false,
            Ok(watcher::Event::InitApply(secret) | watcher::Event::Apply(secret)) => {
                failures = 0;
                seen = true;
                learn(Some(secret));
            }
            Ok(watcher::Event::InitDone) => {
                failures = 0;
                if !seen {
                    learn(None);
                }
            }
            Ok(watcher::Event::Delete(_)) => learn(None),
            Err(error) => {
                failures += 1;
                debug!(%error, name, "watch of a secret failed");
                if failures == 3 {
                    warn!(%error, "cannot watch secret {name} (is the Role weft-control complete?); trying again");
                }
                tokio::time::sleep(backoff(failures)).await;
            }
        }
    }
}
