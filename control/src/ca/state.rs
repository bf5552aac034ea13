//! Which roots are trusted and what signs: the state that all replicas share, and how it goes on. Pure; times are seconds since 1970.
//!
//! The state is kept with the self-made root, in one object that is replaced as a whole, so that a restart or another leader goes
//! on where the last one was. Only the leader takes steps; the others do what the state says.
//!
//! Two promises, whatever happens in which order (a simulation in the tests holds them up):
//! - *What signs is trusted by all.* A certificate whose root is new is put in force only after that root has been in the bundle for
//!   `delay`, and every namespace and webhook is known to have it. (Another certificate under a root that is in force already needs no wait.)
//! - *What was signed stays trusted.* A root that signs no more stays in the bundle until the last leaf below it has expired, or until every
//!   meshed pod is known to have a leaf below another one.
//!
//! A user's certificate authority goes before the self-made one. Where the user's is broken or gone, nothing is put in its place: the last good
//! one stays in force until it is mended, or until somebody asks for a new self-made root.

use serde::{Deserialize, Serialize};

/// What the replicas share.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct State {
    /// The roots that are trusted, the oldest first.
    pub roots: Vec<Root>,
    /// SHA-256 (hex) of the certificate that signs; empty before there was one.
    pub issuer: String,
    /// SHA-256 (hex) of the root at which its chain ends.
    pub issuer_root: String,
    /// The user's Secret that it comes from; empty: it is self-made.
    pub secret: String,
    /// Leaves that were issued before should be renewed. 0: none.
    pub renew_before: u64,
    /// The last request for new leaves that was heeded, as it was written.
    pub renewed: String,
    /// The last request for a new root that was heeded, as it was written.
    pub rotated: String,
}

/// A root of the bundle.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Root {
    /// SHA-256, hex.
    pub fingerprint: String,
    /// The certificate.
    pub pem: String,
    /// Since when it is in the bundle.
    pub added: u64,
    /// Since when nothing is signed below it any more; 0: it is wanted.
    pub retired: u64,
}

/// A certificate that could sign.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Candidate {
    /// SHA-256 (hex) of it.
    pub issuer: String,
    /// SHA-256 (hex) of the root at which its chain ends.
    pub root: String,
    /// All roots that come with it: fingerprint and PEM.
    pub roots: Vec<(String, String)>,
    /// From when.
    pub not_before: u64,
    /// Until when it (and all above it) can sign.
    pub not_after: u64,
}

/// The user's certificate authority.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Theirs {
    /// There is none.
    #[default]
    Absent,
    /// There is one that can't be used.
    Broken,
    /// A Secret's name, and what it holds.
    Given(String, Candidate),
}

/// What there is to choose from.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// The self-made root.
    pub own: Option<Candidate>,
    /// The self-made root that is to follow it.
    pub next: Option<Candidate>,
    /// The user's.
    pub theirs: Theirs,
}

/// What somebody asked for, as it was written; empty: nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// New leaves.
    pub renew: String,
    /// A new root.
    pub rotate: String,
}

/// What a step depends on beside that.
#[derive(Clone, Copy)]
pub struct Circumstances<'a> {
    /// The present.
    pub now: u64,
    /// How long a root is in the bundle before anything is signed below it, seconds.
    pub delay: u64,
    /// What clocks may differ by, seconds: how long after its `notBefore` a certificate is put in force, if what signs now lasts so long.
    pub settle: u64,
    /// When what signs now ends; 0: it is not known here.
    pub present_until: u64,
    /// How long a root stays after that, seconds: the life of leaves, and what clocks may differ by.
    pub keep: u64,
    /// Every namespace and every webhook has the bundle as the state says it.
    pub spread: bool,
    /// Every meshed pod is known to have a leaf below the root in force.
    pub moved: bool,
    /// Part of the root's life after which the next one is made.
    pub root_part: f64,
    /// Words for what holds up the spread.
    pub held_up: &'a str,
}

/// What a step is worth telling.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// As it should be.
    Good(String),
    /// Somebody should look.
    Bad(String),
}

/// One step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// The state from now on.
    pub state: State,
    /// A self-made root has to be made, to follow the present one; then take the step again.
    pub make: bool,
    /// The root that was to follow is the present one now.
    pub promote: bool,
    /// What to tell.
    pub notes: Vec<Note>,
    /// Seconds until there may be something to do again.
    pub wait: Option<u64>,
    /// What is waited for, for people; empty: nothing.
    pub waiting: String,
}

impl State {
    /// Of an installation that knows but its own root.
    pub fn of_own(own: &Candidate) -> Self {
        let mut state = Self { issuer: own.issuer.clone(), issuer_root: own.root.clone(), ..Self::default() };
        state.want(&own.roots, 0);
        state
    }

    fn root(&self, fingerprint: &str) -> Option<&Root> {
        self.roots.iter().find(|root| root.fingerprint == fingerprint)
    }

    /// Adds roots that are missing, and takes retired ones back.
    fn want(&mut self, roots: &[(String, String)], now: u64) {
        for (fingerprint, pem) in roots {
            match self.roots.iter_mut().find(|root| root.fingerprint == *fingerprint) {
                Some(root) => root.retired = 0,
                None => self.roots.push(Root { fingerprint: fingerprint.clone(), pem: pem.clone(), added: now, retired: 0 }),
            }
        }
    }

    /// All roots, PEM, one after the other.
    pub fn bundle(&self) -> String {
        let mut text = String::new();
        for root in &self.roots {
            text.push_str(root.pem.trim_end());
            text.push('\n');
        }
        text
    }

    /// The next step. It can be taken again and again: without a change of anything it changes nothing.
    pub fn step(&self, found: &Found, asked: &Asked, at: Circumstances<'_>) -> Step {
        let mut step = Step { state: self.clone(), ..Step::default() };
        step.heed(found, asked, at.now);
        step.age(found, at);
        // Where a root has to be made first, it and nothing before it is what ought to sign.
        let Some(candidate) = step.candidate(found).filter(|_| !step.make) else {
            step.retire(&[], at);
            return step;
        };
        step.state.want(&candidate.roots, at.now);
        step.switch(found, &candidate, at);
        let mut wanted: Vec<String> = candidate.roots.iter().map(|(fingerprint, _)| fingerprint.clone()).collect();
        wanted.push(step.state.issuer_root.clone());
        step.retire(&wanted, at);
        step
    }
}

impl Step {
    fn good(&mut self, text: impl Into<String>) {
        self.notes.push(Note::Good(text.into()));
    }

    fn bad(&mut self, text: impl Into<String>) {
        self.notes.push(Note::Bad(text.into()));
    }

    fn wake(&mut self, seconds: u64) {
        let seconds = seconds.max(1);
        self.wait = Some(self.wait.map_or(seconds, |before| before.min(seconds)));
    }

    /// What somebody asked for.
    fn heed(&mut self, found: &Found, asked: &Asked, now: u64) {
        if !asked.renew.is_empty() && asked.renew != self.state.renewed {
            self.state.renewed.clone_from(&asked.renew);
            // Our clock issues certificates, so that it is by our clock that they are older.
            self.state.renew_before = now;
            self.good("asked for new certificates: all proxies renew theirs, spread over some seconds");
        }
        if asked.rotate.is_empty() || asked.rotate == self.state.rotated {
            return;
        }
        self.state.rotated.clone_from(&asked.rotate);
        match &found.theirs {
            Theirs::Given(secret, _) => self.bad(format!(
                "asked for a new root, but the root is the user's (Secret {secret}): put the new certificate and root into it, and the \
                 rotation begins by itself"
            )),
            Theirs::Broken => self.bad(
                "asked for a new root, but the user's Secret can't be used (see above): mend it, or delete it and ask again to go back to a \
                 self-made root",
            ),
            Theirs::Absent if !self.state.secret.is_empty() => {
                self.good(format!("asked for a new root while there is no Secret {}: going back to a self-made root", self.state.secret));
                self.state.secret.clear();
                self.make = found.next.is_none();
            }
            Theirs::Absent if found.next.is_some() => {
                self.good("asked for a new root: a rotation is under way already, and goes on");
            }
            Theirs::Absent => self.make = true,
        }
    }

    /// A self-made root that is needed, or comes of age.
    fn age(&mut self, found: &Found, at: Circumstances<'_>) {
        let ours = self.state.secret.is_empty() && found.theirs == Theirs::Absent;
        if !ours || found.next.is_some() {
            return;
        }
        match &found.own {
            None => self.make = true,
            Some(own) => {
                let life = own.not_after.saturating_sub(own.not_before) as f64;
                let due = own.not_before.saturating_add((life * at.root_part) as u64);
                if due <= at.now {
                    if !self.make {
                        self.good("the root is near its end: making the next one");
                    }
                    self.make = true;
                } else {
                    self.wake(due - at.now);
                }
            }
        }
    }

    /// What ought to sign.
    fn candidate(&self, found: &Found) -> Option<Candidate> {
        match &found.theirs {
            Theirs::Given(_, theirs) => Some(theirs.clone()),
            // Nothing is put in the place of a user's own authority.
            Theirs::Broken => None,
            Theirs::Absent if !self.state.secret.is_empty() => None,
            Theirs::Absent => found.next.clone().or_else(|| found.own.clone()),
        }
    }

    fn switch(&mut self, found: &Found, candidate: &Candidate, at: Circumstances<'_>) {
        if candidate.issuer == self.state.issuer {
            return;
        }
        let added = self.state.root(&candidate.root).map_or(at.now, |root| root.added);
        let first = self.state.issuer.is_empty();
        let same_root = candidate.root == self.state.issuer_root;
        let due = added.saturating_add(at.delay);
        if !first && !same_root {
            if due > at.now {
                self.wake(due - at.now);
                self.waiting =
                    format!("the new root {} is being made known, for {} s more", short(&candidate.root), due - at.now);
                return;
            }
            if !at.spread {
                self.waiting = format!("not everybody has the new root {} yet: {}", short(&candidate.root), at.held_up);
                return;
            }
        }
        // An authority that was made just now (cert-manager's begin at that very moment) is not valid yet for clocks that lag.
        let ripe = candidate.not_before.saturating_add(at.settle);
        if !first && at.now < ripe && ripe < at.present_until {
            self.wake(ripe - at.now);
            self.waiting = format!("{} is too young for clocks that lag, for {} s more", short(&candidate.issuer), ripe - at.now);
            return;
        }
        self.state.issuer.clone_from(&candidate.issuer);
        self.state.issuer_root.clone_from(&candidate.root);
        let name = match &found.theirs {
            Theirs::Given(secret, _) => secret.clone(),
            Theirs::Absent | Theirs::Broken => String::new(),
        };
        self.promote = name.is_empty() && found.next.as_ref().is_some_and(|next| next.issuer == candidate.issuer);
        let whose = if name.is_empty() { "self-made".to_owned() } else { format!("from Secret {name}") };
        self.good(format!(
            "certificates are signed by {} ({whose}) below root {} from now on",
            short(&candidate.issuer),
            short(&candidate.root)
        ));
        self.state.secret = name;
    }

    /// Roots that nothing is signed below any more, and those that can go. Nothing wanted: all stay as they are.
    fn retire(&mut self, wanted: &[String], at: Circumstances<'_>) {
        let mut kept = Vec::new();
        let mut gone = Vec::new();
        let mut soonest = None::<u64>;
        for mut root in std::mem::take(&mut self.state.roots) {
            let needed = wanted.is_empty() && root.retired == 0 || wanted.contains(&root.fingerprint);
            if needed || root.fingerprint == self.state.issuer_root {
                kept.push(root);
                continue;
            }
            if root.retired == 0 {
                root.retired = at.now.max(1);
            }
            let end = root.retired.saturating_add(at.keep);
            // Who is asked whether all have moved must have had time to answer.
            let early = root.retired.saturating_add(at.delay);
            if end <= at.now || (at.moved && early <= at.now) {
                gone.push(root.fingerprint);
                continue;
            }
            let next = if early > at.now { early } else { end };
            soonest = Some(soonest.map_or(next, |s| s.min(next)));
            kept.push(root);
        }
        self.state.roots = kept;
        for fingerprint in gone {
            self.good(format!("root {} is not trusted any more: no certificate below it is left", short(&fingerprint)));
        }
        if let Some(soonest) = soonest {
            self.wake(soonest.saturating_sub(at.now));
            if self.waiting.is_empty() {
                self.waiting = "an old root is trusted until the certificates below it have been renewed or have expired".into();
            }
        }
    }
}

/// The beginning of a fingerprint, for people.
pub fn short(fingerprint: &str) -> &str {
    fingerprint.get(..12).unwrap_or(fingerprint)
}

#[cfg(test)]
mod tests;
