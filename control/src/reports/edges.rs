//! The edges of the last hour: who called what, how often, in buckets of a minute.
//!
//! What alike requests have in common is kept once ([`Key`]); a minute holds only counts by number. Room is bounded in distinct keys
//! and in bytes. When it is used up the oldest minute goes as a whole; when only the current minute is left, news are
//! dropped. Both are counted: an answer must not look complete when it isn't. One destination may fill a part of the room only
//! ([`Limits::per_destination`]): beyond it paths and hosts of its requests are no longer told apart, so that a scan of one app doesn't
//! push out what is known of all others.
//!
//! Pure: time comes with each call, in minutes.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use weft_api::console::Workload;

/// What is accounted for a key beside its texts: the key, its slot, its place in the map.
const KEY_COST: usize = 320;
/// What is accounted for a key in one minute.
const CELL_COST: usize = 64;
/// Methods that are kept where paths no longer are; any other text is the client's choice.
const METHODS: [&str; 9] = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "CONNECT", "TRACE"];

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Distinct keys.
    pub keys: usize,
    /// Bytes, as accounted.
    pub bytes: usize,
    /// Minutes.
    pub minutes: u64,
    /// Distinct keys of one destination before paths and hosts are dropped from new ones. Four times as many are taken at all.
    pub per_destination: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { keys: 200_000, bytes: 64 << 20, minutes: 60, per_destination: 10_000 }
    }
}

/// What alike requests have in common.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Who received them.
    pub destination: Arc<Workload>,
    /// The port of the app.
    pub port: u16,
    /// HTTP, or opaque.
    pub http: bool,
    /// SPIFFE id of the peer; empty: plaintext.
    pub source_identity: Box<str>,
    /// Address of a peer without identity.
    pub source_address: Box<str>,
    /// Method; empty: not known.
    pub method: Box<str>,
    /// Path; empty: not known.
    pub path: Box<str>,
    /// Host; empty: none, or (with an empty path) not known.
    pub host: Box<str>,
    /// Principal of the token; empty: none.
    pub request_principal: Box<str>,
}

impl Key {
    fn bytes(&self) -> usize {
        let texts = [&self.source_identity, &self.source_address, &self.method, &self.path, &self.host, &self.request_principal];
        KEY_COST + texts.iter().map(|t| t.len()).sum::<usize>()
    }

    /// The key without what a client may choose freely.
    fn folded(&self) -> Self {
        let method = if METHODS.contains(&&*self.method) { self.method.clone() } else { Box::default() };
        Self { method, path: Box::default(), host: Box::default(), ..self.clone() }
    }
}

/// How many, and of them refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// All.
    pub count: u64,
    /// Of them refused.
    pub denied: u64,
    /// Seconds since 1970 of the newest.
    pub last: u64,
}

impl Count {
    /// Adds another one.
    pub fn add(&mut self, other: Self) {
        self.count = self.count.saturating_add(other.count);
        self.denied = self.denied.saturating_add(other.denied);
        self.last = self.last.max(other.last);
    }
}

#[derive(Debug)]
struct Slot {
    key: Arc<Key>,
    /// Minutes that have it.
    minutes: usize,
}

#[derive(Debug)]
struct Minute {
    minute: u64,
    cells: HashMap<usize, Count>,
}

/// The store.
#[derive(Debug)]
pub struct Edges {
    limits: Limits,
    numbers: HashMap<Arc<Key>, usize>,
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    per_destination: HashMap<Arc<Workload>, usize>,
    /// Oldest first, each minute once.
    minutes: VecDeque<Minute>,
    bytes: usize,
    dropped: u64,
}

impl Edges {
    /// An empty store.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            numbers: HashMap::new(),
            slots: Vec::new(),
            free: Vec::new(),
            per_destination: HashMap::new(),
            minutes: VecDeque::new(),
            bytes: 0,
            dropped: 0,
        }
    }

    /// Distinct keys that are kept.
    pub fn len(&self) -> usize {
        self.numbers.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }

    /// Bytes, as accounted.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Samples that were not kept, or went before their time.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Adds a sample to a minute; `now` is the current one. A minute to come counts as the current one; one that is over is dropped.
    pub fn add(&mut self, now: u64, minute: u64, key: Key, count: Count) {
        self.expire(now);
        let minute = minute.min(now);
        if minute + self.limits.minutes <= now {
            self.dropped = self.dropped.saturating_add(count.count);
            return;
        }
        let key = self.fit(key);
        let Some(number) = self.number(key) else {
            self.dropped = self.dropped.saturating_add(count.count);
            return;
        };
        let position = self.minute(minute);
        let cells = &mut self.minutes[position].cells;
        if let Some(cell) = cells.get_mut(&number) {
            cell.add(count);
        } else {
            cells.insert(number, count);
            self.bytes += CELL_COST;
            if let Some(slot) = &mut self.slots[number] {
                slot.minutes += 1;
            }
        }
        while self.bytes > self.limits.bytes && self.minutes.len() > 1 {
            self.drop_oldest();
        }
    }

    /// All that was seen in the last `minutes` (the current one included), added up over them, in no order.
    pub fn since(&mut self, now: u64, minutes: u64) -> Vec<(Arc<Key>, Count)> {
        self.expire(now);
        let mut sums: HashMap<usize, Count> = HashMap::new();
        for minute in self.minutes.iter().filter(|m| m.minute + minutes > now) {
            for (number, count) in &minute.cells {
                sums.entry(*number).or_default().add(*count);
            }
        }
        sums.into_iter().filter_map(|(number, count)| Some((self.slots[number].as_ref()?.key.clone(), count))).collect()
    }

    /// Lets go of what is over.
    pub fn expire(&mut self, now: u64) {
        while self.minutes.front().is_some_and(|m| m.minute + self.limits.minutes <= now) {
            self.release_oldest();
        }
    }

    /// The key as it is kept: a destination that has used up its part is no longer told apart by what its clients choose.
    fn fit(&self, key: Key) -> Key {
        let used = self.per_destination.get(&key.destination).copied().unwrap_or_default();
        if used < self.limits.per_destination || self.numbers.contains_key(&key) { key } else { key.folded() }
    }

    /// The number of a key, a new one if there is room.
    fn number(&mut self, key: Key) -> Option<usize> {
        if let Some(number) = self.numbers.get(&key) {
            return Some(*number);
        }
        let cost = key.bytes() + CELL_COST;
        let used = self.per_destination.get(&key.destination).copied().unwrap_or_default();
        if used >= self.limits.per_destination.saturating_mul(4) {
            return None;
        }
        while (self.numbers.len() >= self.limits.keys || self.bytes + cost > self.limits.bytes) && self.minutes.len() > 1 {
            self.drop_oldest();
        }
        if self.numbers.len() >= self.limits.keys || self.bytes + cost > self.limits.bytes {
            return None;
        }
        let key = Arc::new(key);
        let number = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.bytes += key.bytes();
        *self.per_destination.entry(key.destination.clone()).or_default() += 1;
        self.numbers.insert(key.clone(), number);
        self.slots[number] = Some(Slot { key, minutes: 0 });
        Some(number)
    }

    /// Position of a minute.
    fn minute(&mut self, minute: u64) -> usize {
        let position = self.minutes.partition_point(|m| m.minute < minute);
        if self.minutes.get(position).is_none_or(|m| m.minute != minute) {
            self.minutes.insert(position, Minute { minute, cells: HashMap::new() });
        }
        position
    }

    fn drop_oldest(&mut self) {
        let lost = self.release_oldest();
        self.dropped = self.dropped.saturating_add(lost);
    }

    /// Lets the oldest minute go; how many samples it had.
    fn release_oldest(&mut self) -> u64 {
        let Some(minute) = self.minutes.pop_front() else { return 0 };
        let mut lost = 0u64;
        for (number, count) in minute.cells {
            lost = lost.saturating_add(count.count);
            self.bytes = self.bytes.saturating_sub(CELL_COST);
            let Some(slot) = self.slots[number].as_mut() else { continue };
            slot.minutes -= 1;
            if slot.minutes == 0
                && let Some(slot) = self.slots[number].take()
            {
                self.forget(&slot.key);
                self.free.push(number);
            }
        }
        lost
    }

    fn forget(&mut self, key: &Arc<Key>) {
        self.bytes = self.bytes.saturating_sub(key.bytes());
        self.numbers.remove(key);
        if let Some(used) = self.per_destination.get_mut(&key.destination) {
            *used -= 1;
            if *used == 0 {
                self.per_destination.remove(&key.destination);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(destination: &str, path: &str) -> Key {
        Key {
            destination: Arc::new(Workload { name: destination.into(), ..Workload::default() }),
            port: 80,
            http: true,
            source_identity: "spiffe://t/ns/a/sa/b".into(),
            source_address: "".into(),
            method: "GET".into(),
            path: path.into(),
            host: "h".into(),
            request_principal: "".into(),
        }
    }

    fn one() -> Count {
        Count { count: 1, denied: 0, last: 1 }
    }

    fn paths(edges: &mut Edges, now: u64, minutes: u64) -> Vec<(String, u64)> {
        let mut found: Vec<_> = edges.since(now, minutes).iter().map(|(k, c)| (k.path.to_string(), c.count)).collect();
        found.sort();
        found
    }

    #[test]
    fn an_hour_in_minutes() {
        let mut edges = Edges::new(Limits::default());
        edges.add(100, 100, key("d", "/a"), one());
        edges.add(101, 101, key("d", "/a"), Count { count: 2, denied: 1, last: 9 });
        edges.add(110, 110, key("d", "/b"), one());
        // Late, but still within the hour; from a clock that goes before; too late.
        edges.add(110, 99, key("d", "/late"), one());
        edges.add(110, 900, key("d", "/b"), one());
        edges.add(110, 50, key("d", "/old"), Count { count: 7, denied: 0, last: 1 });
        assert_eq!(edges.dropped(), 7);
        assert_eq!(paths(&mut edges, 110, 60), [("/a".into(), 3), ("/b".into(), 2), ("/late".into(), 1)]);
        assert_eq!(paths(&mut edges, 110, 10), [("/a".into(), 2), ("/b".into(), 2)]);
        assert_eq!(paths(&mut edges, 110, 1), [("/b".into(), 2)]);
        let (_, count) = edges.since(110, 60).into_iter().find(|(k, _)| &*k.path == "/a").unwrap();
        assert_eq!(count, Count { count: 3, denied: 1, last: 9 });
        // The hour goes on.
        assert_eq!(paths(&mut edges, 160, 60), [("/a".into(), 2), ("/b".into(), 2)]);
        assert_eq!(paths(&mut edges, 170, 60), []);
        assert_eq!((edges.len(), edges.bytes(), edges.dropped()), (0, 0, 7));
        assert!(edges.per_destination.is_empty() && edges.minutes.is_empty());
    }

    #[test]
    fn the_oldest_minute_goes_when_room_is_used_up() {
        let mut edges = Edges::new(Limits { keys: 3, ..Limits::default() });
        edges.add(1, 1, key("d", "/1"), one());
        edges.add(2, 2, key("d", "/2"), one());
        edges.add(2, 2, key("d", "/3"), one());
        edges.add(3, 3, key("d", "/4"), one());
        assert_eq!(paths(&mut edges, 3, 60), [("/2".into(), 1), ("/3".into(), 1), ("/4".into(), 1)]);
        assert_eq!((edges.len(), edges.dropped()), (3, 1));
        // Only the current minute is left: news are dropped, what is known goes on.
        edges.add(4, 4, key("d", "/5"), one());
        edges.add(4, 4, key("d", "/6"), one());
        edges.add(4, 4, key("d", "/7"), one());
        edges.add(4, 4, key("d", "/8"), one());
        edges.add(4, 4, key("d", "/5"), one());
        let now: Vec<_> = paths(&mut edges, 4, 1);
        assert_eq!(now, [("/5".into(), 2), ("/6".into(), 1), ("/7".into(), 1)]);
        assert_eq!(edges.len(), 3);
    }

    #[test]
    fn bytes_are_bounded_whatever_comes() {
        let limits = Limits { bytes: 40_000, ..Limits::default() };
        let mut edges = Edges::new(limits);
        for n in 0..5_000u64 {
            edges.add(n / 50, n / 50, key(&format!("d{}", n % 7), &format!("/{n:0>200}")), one());
            assert!(edges.bytes() <= limits.bytes, "{n}: {}", edges.bytes());
        }
        let kept: u64 = edges.since(99, 60).iter().map(|(_, c)| c.count).sum();
        assert!(kept > 0 && kept + edges.dropped() <= 5_000);
        // All is given back.
        edges.expire(1_000);
        assert_eq!((edges.len(), edges.bytes()), (0, 0));
    }

    #[test]
    fn a_scan_of_one_app_is_folded_and_leaves_the_others_alone() {
        let mut edges = Edges::new(Limits { per_destination: 5, ..Limits::default() });
        for n in 0..100 {
            edges.add(1, 1, key("scanned", &format!("/{n}")), one());
        }
        edges.add(1, 1, Key { method: "BREW".into(), ..key("scanned", "/x") }, one());
        edges.add(1, 1, key("other", "/fine"), one());
        edges.add(1, 1, key("scanned", "/0"), one());
        let found = paths(&mut edges, 1, 60);
        assert!(found.contains(&("/fine".into(), 1)) && found.contains(&("/0".into(), 2)), "{found:?}");
        assert!(found.contains(&(String::new(), 95)) && found.contains(&(String::new(), 1)), "{found:?}");
        assert_eq!(edges.dropped(), 0);
        // Sources without end come to an end too.
        for n in 0..100 {
            edges.add(
                1,
                1,
                Key { source_identity: "".into(), source_address: format!("10.0.0.{n}").into(), ..key("scanned", "/") },
                one(),
            );
        }
        assert_eq!(edges.per_destination.values().max(), Some(&20));
        assert!(edges.dropped() > 80);
    }
}
