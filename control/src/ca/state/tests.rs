use super::*;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

const DELAY: u64 = 300;
const LEAF: u64 = 24 * 3600;
const KEEP: u64 = LEAF + 3600;
const YEAR: u64 = 365 * 24 * 3600;

fn candidate(name: &str, root: &str, now: u64) -> Candidate {
    Candidate {
        issuer: name.into(),
        root: root.into(),
        roots: vec![(root.into(), format!("-----{root}-----\n"))],
        not_before: now,
        not_after: now + 10 * YEAR,
    }
}

fn own(name: &str, now: u64) -> Candidate {
    candidate(name, name, now)
}

fn at(now: u64) -> Circumstances<'static> {
    Circumstances {
        now,
        delay: DELAY,
        settle: 0,
        present_until: 0,
        keep: KEEP,
        spread: true,
        moved: false,
        root_part: 0.8,
        held_up: "",
    }
}

fn bundle(state: &State) -> Vec<&str> {
    state.roots.iter().map(|root| root.fingerprint.as_str()).collect()
}

fn rotate(value: &str) -> Asked {
    Asked { rotate: value.into(), ..Asked::default() }
}

#[test]
fn the_first_root_is_made_and_in_force_at_once() {
    let step = State::default().step(&Found::default(), &Asked::default(), at(1000));
    assert!(step.make && step.state.issuer.is_empty());
    let found = Found { next: Some(own("a", 1000)), ..Found::default() };
    let step = step.state.step(&found, &Asked::default(), at(1000));
    assert!(step.promote && !step.make);
    assert_eq!((step.state.issuer.as_str(), bundle(&step.state)), ("a", vec!["a"]));
    let found = Found { own: Some(own("a", 1000)), ..Found::default() };
    let again = step.state.step(&found, &Asked::default(), at(1001));
    assert_eq!((&again.state, again.notes.len(), again.make), (&step.state, 0, false), "nothing is left to do");
    assert_eq!(again.wait, Some(8 * YEAR - 1));
}

#[test]
fn a_rotation_adds_waits_switches_and_drops() {
    let (a, b) = (own("a", 0), own("b", 1000));
    let state = State::of_own(&a);
    let only_a = Found { own: Some(a.clone()), ..Found::default() };
    let step = state.step(&only_a, &rotate("monday"), at(1000));
    assert!(step.make);
    let both = Found { own: Some(a), next: Some(b.clone()), ..Found::default() };
    let step = step.state.step(&both, &rotate("monday"), at(1000));
    assert_eq!((step.state.issuer.as_str(), bundle(&step.state), step.wait), ("a", vec!["a", "b"], Some(DELAY)));
    assert!(!step.make && step.waiting.contains("300 s"), "{}", step.waiting);
    // Not before everybody has it.
    let late = step.state.step(&both, &rotate("monday"), Circumstances { spread: false, held_up: "shop", ..at(1000 + DELAY) });
    assert_eq!(late.state.issuer, "a");
    assert!(late.waiting.contains("shop"), "{}", late.waiting);
    let step = late.state.step(&both, &rotate("monday"), at(1000 + DELAY));
    assert!(step.promote);
    assert_eq!((step.state.issuer.as_str(), bundle(&step.state)), ("b", vec!["a", "b"]));
    let only_b = Found { own: Some(b), ..Found::default() };
    let switched = 1000 + DELAY;
    let step = step.state.step(&only_b, &rotate("monday"), at(switched + KEEP - 1));
    assert_eq!((bundle(&step.state), step.wait), (vec!["a", "b"], Some(1)));
    let step = step.state.step(&only_b, &rotate("monday"), at(switched + KEEP));
    assert_eq!(bundle(&step.state), ["b"]);
    assert!(matches!(&step.notes[..], [Note::Good(text)] if text.contains("not trusted any more")));
    assert_eq!(step.state.step(&only_b, &rotate("monday"), at(switched + KEEP)).notes, []);
}

#[test]
fn who_has_moved_need_not_wait_for_the_end() {
    let (a, b) = (own("a", 0), own("b", 1000));
    let both = Found { own: Some(a.clone()), next: Some(b.clone()), ..Found::default() };
    let mut state = State::of_own(&a).step(&both, &Asked::default(), at(1000)).state;
    state = state.step(&both, &Asked::default(), at(1000 + DELAY)).state;
    let only_b = Found { own: Some(b), ..Found::default() };
    let moved = |now| Circumstances { moved: true, ..at(now) };
    let step = state.step(&only_b, &Asked::default(), moved(1000 + DELAY + 1));
    assert_eq!(bundle(&step.state), ["a", "b"], "who says so at once can't have asked everybody");
    assert_eq!(bundle(&state.step(&only_b, &Asked::default(), moved(1000 + 2 * DELAY)).state), ["b"]);
}

#[test]
fn a_request_for_new_leaves_counts_once_and_by_our_clock() {
    let a = own("a", 0);
    let found = Found { own: Some(a.clone()), ..Found::default() };
    let asked = Asked { renew: "2099-01-01T00:00:00Z".into(), ..Asked::default() };
    let step = State::of_own(&a).step(&found, &asked, at(5000));
    assert_eq!(step.state.renew_before, 5000);
    assert_eq!(step.state.step(&found, &asked, at(9000)).state.renew_before, 5000);
}

#[test]
fn a_root_is_replaced_in_the_last_fifth_of_its_life() {
    let a = own("a", 0);
    let found = Found { own: Some(a.clone()), ..Found::default() };
    let step = State::of_own(&a).step(&found, &Asked::default(), at(8 * YEAR - 100));
    assert_eq!((step.make, step.wait), (false, Some(100)));
    assert!(State::of_own(&a).step(&found, &Asked::default(), at(8 * YEAR)).make);
    // The user's own is his.
    let theirs = candidate("i", "r", 0);
    let found = Found { theirs: Theirs::Given("cacerts".into(), theirs), ..found };
    assert!(!State::default().step(&found, &Asked::default(), at(9 * YEAR)).make);
}

#[test]
fn a_users_authority_at_the_first_start_needs_no_other() {
    let found = Found { theirs: Theirs::Given("cacerts".into(), candidate("i1", "r", 0)), ..Found::default() };
    let step = State::default().step(&found, &Asked::default(), at(1000));
    assert_eq!((step.make, step.state.issuer.as_str(), step.state.secret.as_str()), (false, "i1", "cacerts"));
    assert_eq!(bundle(&step.state), ["r"]);
    // Another intermediate below the same root: at once.
    let found = Found { theirs: Theirs::Given("cacerts".into(), candidate("i2", "r", 0)), ..Found::default() };
    let next = step.state.step(&found, &Asked::default(), at(1001));
    assert_eq!((next.state.issuer.as_str(), bundle(&next.state)), ("i2", vec!["r"]));
    // Below another root: after the delay.
    let found = Found { theirs: Theirs::Given("cacerts".into(), candidate("i3", "s", 0)), ..Found::default() };
    let next = next.state.step(&found, &Asked::default(), at(2000));
    assert_eq!((next.state.issuer.as_str(), bundle(&next.state)), ("i2", vec!["r", "s"]));
    let next = next.state.step(&found, &Asked::default(), at(2000 + DELAY));
    assert_eq!((next.state.issuer.as_str(), bundle(&next.state)), ("i3", vec!["r", "s"]));
    assert_eq!(bundle(&next.state.step(&found, &Asked::default(), at(2000 + DELAY + KEEP)).state), ["s"]);
}

#[test]
fn an_authority_that_was_made_just_now_waits_for_clocks_that_lag() {
    let given = |name: &str, not_before| {
        let candidate = Candidate { not_before, ..candidate(name, "r", 0) };
        Found { theirs: Theirs::Given("cacerts".into(), candidate), ..Found::default() }
    };
    let young = |now, present_until| Circumstances { settle: 600, present_until, ..at(now) };
    let first = State::default().step(&given("i1", 1000), &Asked::default(), young(1000, 0)).state;
    assert_eq!(first.issuer, "i1", "there is no other");
    let step = first.step(&given("i2", 5000), &Asked::default(), young(5100, 9000));
    assert_eq!((step.state.issuer.as_str(), step.wait), ("i1", Some(500)));
    assert!(step.waiting.contains("500 s"), "{}", step.waiting);
    assert_eq!(first.step(&given("i2", 5000), &Asked::default(), young(5600, 9000)).state.issuer, "i2");
    assert_eq!(
        first.step(&given("i2", 5000), &Asked::default(), young(5100, 5500)).state.issuer,
        "i2",
        "the present one ends before"
    );
    assert_eq!(first.step(&given("i2", 5000), &Asked::default(), young(5100, 0)).state.issuer, "i2", "the present one is lost");
}

#[test]
fn from_self_made_to_the_users_and_back() {
    let a = own("a", 0);
    let found =
        Found { own: Some(a.clone()), theirs: Theirs::Given("cacerts".into(), candidate("i", "r", 0)), ..Found::default() };
    let step = State::of_own(&a).step(&found, &Asked::default(), at(1000));
    assert_eq!((step.state.issuer.as_str(), bundle(&step.state)), ("a", vec!["a", "r"]));
    let state = step.state.step(&found, &Asked::default(), at(1000 + DELAY)).state;
    assert_eq!((state.issuer.as_str(), state.secret.as_str()), ("i", "cacerts"));
    // A rotation of what is the user's is his.
    let step = state.step(&found, &rotate("x"), at(2000));
    assert!(!step.make && matches!(&step.notes[..], [Note::Bad(text)] if text.contains("cacerts")), "{step:?}");
    // Broken, or gone: nothing changes, however long.
    for theirs in [Theirs::Broken, Theirs::Absent] {
        let found = Found { own: Some(a.clone()), theirs, ..Found::default() };
        let step = state.step(&found, &Asked::default(), at(YEAR));
        assert_eq!((step.state.issuer.as_str(), step.make, step.state.secret.as_str()), ("i", false, "cacerts"));
        assert!(bundle(&step.state).contains(&"r"));
    }
    let broken = Found { own: Some(a.clone()), theirs: Theirs::Broken, ..Found::default() };
    let step = state.step(&broken, &rotate("y"), at(3000));
    assert!(!step.make && matches!(&step.notes[..], [Note::Bad(text)] if text.contains("delete it")), "{step:?}");
    // Gone, and asked for: back to a new self-made root, in the same order.
    let gone = Found { own: Some(a.clone()), ..Found::default() };
    let step = state.step(&gone, &rotate("z"), at(4000));
    assert!(step.make);
    let gone = Found { next: Some(own("b", 4000)), ..gone };
    let step = step.state.step(&gone, &rotate("z"), at(4000));
    assert_eq!((step.state.issuer.as_str(), bundle(&step.state)), ("i", vec!["a", "r", "b"]));
    let step = step.state.step(&gone, &rotate("z"), at(4000 + DELAY));
    assert!(step.promote && step.state.issuer == "b" && step.state.secret.is_empty(), "{step:?}");
}

/// Whatever happens in which order: what is unexpired is trusted, and nothing is signed below a root that somebody may not have yet.
#[test]
fn no_leaf_is_ever_left_without_its_root() {
    for seed in 0..300 {
        let mut random = StdRng::seed_from_u64(seed);
        let mut now: u64 = 1_000_000;
        let (mut own_root, mut next) = (None::<Candidate>, None::<Candidate>);
        let mut theirs = Theirs::Absent;
        let mut state = State::default();
        let mut asked = Asked::default();
        // End and root of each leaf.
        let mut leaves: Vec<(u64, String)> = Vec::new();
        let mut named = 0;
        let mut restarts_from = serde_json::to_string(&state).unwrap();
        for round in 0..400 {
            let longest = random.random_range(2..7200);
            now += random.random_range(1..longest);
            match random.random_range(0..12) {
                0 => asked.rotate = format!("r{round}"),
                1 => asked.renew = format!("n{round}"),
                2 => theirs = Theirs::Broken,
                3 => theirs = Theirs::Absent,
                4 | 5 => {
                    named += 1;
                    let root = format!("u{}", random.random_range(0..3));
                    let mut given = candidate(&format!("i{named}"), &root, now);
                    if random.random_bool(0.3) {
                        given.roots.push(("extra".into(), "-----extra-----\n".into()));
                    }
                    theirs = Theirs::Given("cacerts".into(), given);
                }
                // Another leader, or a restart: from what was written.
                6 => state = serde_json::from_str(&restarts_from).unwrap(),
                _ => {}
            }
            let before = state.clone();
            let circumstances = Circumstances { spread: random.random_bool(0.7), ..at(now) };
            for _ in 0..2 {
                let found = Found { own: own_root.clone(), next: next.clone(), theirs: theirs.clone() };
                let step = state.step(&found, &asked, circumstances);
                state = step.state;
                if step.promote {
                    own_root = next.take();
                }
                if step.make {
                    named += 1;
                    next = Some(own(&format!("own{named}"), now));
                }
            }
            restarts_from = serde_json::to_string(&state).unwrap();
            if !before.issuer.is_empty() && before.issuer_root != state.issuer_root {
                let root = before.root(&state.issuer_root).expect("a new root is known before it signs");
                assert!(root.added + DELAY <= now && circumstances.spread, "seed {seed}: {state:?}");
            }
            leaves.retain(|(end, _)| *end > now);
            for (_, root) in &leaves {
                assert!(state.root(root).is_some(), "seed {seed}: a leaf below {root} is left alone: {state:?}");
            }
            if !state.issuer.is_empty() {
                assert!(state.root(&state.issuer_root).is_some_and(|root| root.retired == 0), "seed {seed}: {state:?}");
                leaves.push((now + LEAF, state.issuer_root.clone()));
            }
            assert!(state.roots.len() < 40, "seed {seed}: roots pile up");
        }
        assert!(!state.issuer.is_empty());
    }
}
