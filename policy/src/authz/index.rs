//! Finds the rules that may match a request, without looking at the others.
//!
//! Each rule is filed under one part of it that must hold (its sources, its operations or one condition), and there under the keys
//! of one test each: "the path begins with /api/" is a key, "the principal is X" is one. Which part and which tests are chosen by how many rules
//! share their keys, so that a request meets few. A rule without such a part is met by every request.
//!
//! Of the rules without such a part many may exclude the same (`notPaths: ["/api/*"]` in a thousand of them). What most of them exclude is looked at
//! once per request, and those that it excludes are passed over.
//!
//! The index only narrows; whoever is found is evaluated in full. So a collision of hashes costs time, never a wrong verdict.
//! That it misses nobody is what the property tests are about.

use super::field::{Attribute, Field, Values, address, header, text};
use super::request::Request;
use super::rule::{All, Rule};
use super::text::{Fold, TextMatch};
use ipnet::IpNet;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::net::IpAddr;

/// Place of a rule in the engine's list; the lowest of those that match wins.
pub(crate) type RuleId = u32;

/// More names of headers than this are not looked up for each request; rules that could be filed only under others are met by all.
const MAX_HEADERS: usize = 16;

const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
const PRIME: u64 = 0x0000_0100_0000_01b3;

/// FNV-1a, which can be taken on byte by byte: the hashes of all prefixes cost one pass.
#[inline]
fn step(hash: u64, byte: u8) -> u64 {
    (hash ^ u64::from(byte)).wrapping_mul(PRIME)
}

fn hash<'a>(bytes: impl IntoIterator<Item = &'a u8>, fold: Fold) -> u64 {
    bytes.into_iter().fold(BASIS, |hash, byte| step(hash, folded(*byte, fold)))
}

#[inline]
fn folded(byte: u8, fold: Fold) -> u8 {
    if fold == Fold::Lower { byte.to_ascii_lowercase() } else { byte }
}

/// The keys are hashes already.
#[derive(Default)]
struct AsIs(u64);

impl Hasher for AsIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0 = bytes.iter().fold(self.0, |hash, byte| step(hash, *byte));
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

type Map<T> = HashMap<u64, T, BuildHasherDefault<AsIs>>;

/// Under what a rule can be filed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    Exact(u64),
    Prefix(u32, u64),
    Suffix(u32, u64),
    Present,
    Net(u8, u128),
    Port(u16),
}

impl Key {
    /// How likely a request has it, roughly, before it is known how many rules do.
    fn commonness(&self, attribute: &Attribute) -> f64 {
        match (self, attribute) {
            (Self::Present | Self::Exact(_), Attribute::Method) | (Self::Present, _) => 1.0,
            (Self::Prefix(len, _), _) if *len <= 1 => 1.0,
            (Self::Net(len, _), _) if *len == 0 => 1.0,
            (Self::Port(_), _) => 0.6,
            (Self::Prefix(..) | Self::Suffix(..) | Self::Net(..), _) => 0.3,
            (Self::Exact(_), Attribute::Namespace | Attribute::TrustDomain) => 0.4,
            (Self::Exact(_), _) => 0.2,
        }
    }
}

/// Addresses of both families on one line of numbers, IPv4 as it is mapped into IPv6.
fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(ip.to_ipv6_mapped()),
        IpAddr::V6(ip) => u128::from(ip),
    }
}

fn masked(number: u128, len: u8) -> u128 {
    if len == 0 { 0 } else { number & (u128::MAX << (128 - u32::from(len))) }
}

fn spread(number: u128, len: u8) -> u64 {
    let mixed = (number as u64) ^ ((number >> 64) as u64).rotate_left(29) ^ (u64::from(len) << 57);
    let mixed = mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 32)
}

/// The keys of a test, of which one at least must be there for the test to hold. `None`: it can't be filed.
fn keys(field: &Field) -> Option<Vec<Key>> {
    if field.negated || matches!(field.attribute, Attribute::Audiences | Attribute::Claim(_)) {
        return None;
    }
    let fold = field.attribute.fold();
    Some(match &field.values {
        Values::Ports(ports) => ports.iter().map(|port| Key::Port(*port)).collect(),
        Values::Nets(nets) => nets
            .iter()
            .map(|net| {
                let len = net.prefix_len() + if matches!(net, IpNet::V4(_)) { 96 } else { 0 };
                Key::Net(len, masked(number(net.addr()), len))
            })
            .collect(),
        Values::Texts(patterns) => patterns
            .iter()
            .map(|pattern| match pattern {
                TextMatch::Exact(text) => Key::Exact(hash(&**text, fold)),
                TextMatch::Prefix(text) => Key::Prefix(text.len() as u32, hash(&**text, fold)),
                TextMatch::Suffix(text) => Key::Suffix(text.len() as u32, hash(text.iter().rev(), fold)),
                TextMatch::Present => Key::Present,
                TextMatch::Glob(parts) => match parts.split_first() {
                    Some((first, _)) if !first.is_empty() => Key::Prefix(first.len() as u32, hash(&**first, fold)),
                    _ => Key::Present,
                },
                TextMatch::Template(template) => Key::Prefix(template.prefix().len() as u32, hash(template.prefix(), fold)),
            })
            .collect(),
    })
}

/// The rules filed under the values of one attribute.
#[derive(Debug, Default)]
struct Drawer {
    exact: Map<Vec<RuleId>>,
    /// By the lengths that there are, ascending.
    prefix: Vec<(u32, Map<Vec<RuleId>>)>,
    suffix: Vec<(u32, Map<Vec<RuleId>>)>,
    /// Met by whatever is there, also an empty text.
    present: Vec<RuleId>,
    nets: Vec<(u8, Map<Vec<RuleId>>)>,
    ports: Map<Vec<RuleId>>,
}

impl Drawer {
    fn file(&mut self, key: &Key, rule: RuleId) {
        fn at<K: Ord + Copy>(list: &mut Vec<(K, Map<Vec<RuleId>>)>, len: K) -> &mut Map<Vec<RuleId>> {
            let place = match list.binary_search_by_key(&len, |(len, _)| *len) {
                Ok(place) => place,
                Err(place) => {
                    list.insert(place, (len, Map::default()));
                    place
                }
            };
            &mut list[place].1
        }
        let rules = match *key {
            Key::Exact(hash) => self.exact.entry(hash).or_default(),
            Key::Prefix(len, hash) => at(&mut self.prefix, len).entry(hash).or_default(),
            Key::Suffix(len, hash) => at(&mut self.suffix, len).entry(hash).or_default(),
            Key::Present => &mut self.present,
            Key::Net(len, number) => at(&mut self.nets, len).entry(spread(number, len)).or_default(),
            Key::Port(port) => self.ports.entry(u64::from(port)).or_default(),
        };
        if rules.last() != Some(&rule) {
            rules.push(rule);
        }
    }

    /// Shows the rules that a text meets.
    #[inline]
    fn text(&self, text: &[u8], fold: Fold, show: &mut impl FnMut(&[RuleId])) {
        show(&self.present);
        if !self.exact.is_empty() || !self.prefix.is_empty() {
            let mut lengths = self.prefix.iter().peekable();
            let mut running = BASIS;
            for (at, byte) in text.iter().enumerate() {
                while let Some((_, rules)) = lengths.next_if(|(len, _)| *len as usize == at) {
                    rules.get(&running).into_iter().for_each(|rules| show(rules));
                }
                running = step(running, folded(*byte, fold));
            }
            if let Some((_, rules)) = lengths.next_if(|(len, _)| *len as usize == text.len()) {
                rules.get(&running).into_iter().for_each(|rules| show(rules));
            }
            self.exact.get(&running).into_iter().for_each(|rules| show(rules));
        }
        if let Some((longest, _)) = self.suffix.last() {
            let mut lengths = self.suffix.iter().peekable();
            let mut running = BASIS;
            for at in 0..=text.len().min(*longest as usize) {
                while let Some((_, rules)) = lengths.next_if(|(len, _)| *len as usize == at) {
                    rules.get(&running).into_iter().for_each(|rules| show(rules));
                }
                if at < text.len() {
                    running = step(running, folded(text[text.len() - 1 - at], fold));
                }
            }
        }
    }

    #[inline]
    fn address(&self, ip: IpAddr, show: &mut impl FnMut(&[RuleId])) {
        let number = number(ip);
        for (len, rules) in &self.nets {
            rules.get(&spread(masked(number, *len), *len)).into_iter().for_each(|rules| show(rules));
        }
    }
}

/// Rules that are met by every request, fewer of which are not worth the work.
const MANY: usize = 32;

/// Tests that exclude, each with one value, shared by rules that every request meets.
#[derive(Debug, Default)]
struct Exclusions {
    /// At most 64.
    tests: Vec<Field>,
    /// For each rule that every request meets, which of the tests are its own.
    of: Vec<u64>,
}

impl Exclusions {
    fn new(rules: &[&Rule]) -> Self {
        if rules.len() < MANY {
            return Self::default();
        }
        let mut shared: HashMap<(&Attribute, Values), (usize, Vec<usize>)> = HashMap::new();
        for (n, rule) in rules.iter().enumerate() {
            for field in unavoidable(rule).filter(|field| field.negated) {
                for value in each(&field.values) {
                    let next = shared.len();
                    let (_, of) = shared.entry((&field.attribute, value)).or_insert_with(|| (next, Vec::new()));
                    of.push(n);
                }
            }
        }
        let mut shared: Vec<_> = shared.into_iter().filter(|(_, (_, of))| of.len() > 1).collect();
        // The most shared first; ties by their order, so that the same policies make the same index.
        shared.sort_by(|(_, (first, a)), (_, (second, b))| b.len().cmp(&a.len()).then(first.cmp(second)));
        shared.truncate(64);
        let mut masks = vec![0; rules.len()];
        for (bit, (_, (_, of))) in shared.iter().enumerate() {
            for n in of {
                masks[*n] |= 1 << bit;
            }
        }
        let test = |(attribute, values): (&Attribute, Values)| Field {
            attribute: attribute.clone(),
            negated: true,
            values,
            name: Box::default(),
        };
        Self { tests: shared.into_iter().map(|(key, _)| test(key)).collect(), of: masks }
    }
}

/// The tests without which a rule can't match, whichever alternative does.
fn unavoidable(rule: &Rule) -> impl Iterator<Item = &Field> {
    fn only(alternatives: &[All]) -> &[Field] {
        if let [one] = alternatives { one } else { &[] }
    }
    only(&rule.from).iter().chain(only(&rule.to)).chain(&*rule.when)
}

/// Each value on its own.
fn each(values: &Values) -> Vec<Values> {
    match values {
        Values::Texts(list) => list.iter().map(|value| Values::Texts([value.clone()].into())).collect(),
        Values::Nets(list) => list.iter().map(|value| Values::Nets([*value].into())).collect(),
        Values::Ports(list) => list.iter().map(|value| Values::Ports([*value].into())).collect(),
    }
}

/// All rules of an engine, filed.
#[derive(Debug, Default)]
pub(crate) struct Index {
    /// Met by every request.
    always: Vec<RuleId>,
    exclusions: Exclusions,
    drawers: Vec<(Attribute, Drawer)>,
}

impl Index {
    pub(crate) fn new<'a>(rules: impl Iterator<Item = &'a Rule> + Clone) -> Self {
        let mut shared: HashMap<(Attribute, Key), f64> = HashMap::new();
        let mut headers: HashMap<&str, usize> = HashMap::new();
        let mut count: f64 = 0.0;
        for rule in rules.clone() {
            count += 1.0;
            for field in rule.fields() {
                if let Attribute::Header(name) = &field.attribute {
                    *headers.entry(name).or_default() += 1;
                }
                for key in keys(field).unwrap_or_default() {
                    *shared.entry((field.attribute.clone(), key)).or_default() += 1.0;
                }
            }
        }
        let mut names: Vec<_> = headers.into_iter().collect();
        names.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
        names.truncate(MAX_HEADERS);
        let chooser = Chooser { shared, count, headers: names.into_iter().map(|(name, _)| name.into()).collect() };
        let mut index = Self::default();
        let mut always = Vec::new();
        for (id, rule) in rules.enumerate() {
            index.file(id as RuleId, rule, &chooser);
            if index.always.last() == Some(&(id as RuleId)) {
                always.push(rule);
            }
        }
        index.exclusions = Exclusions::new(&always);
        index
    }

    fn file(&mut self, id: RuleId, rule: &Rule, chooser: &Chooser) {
        let parts = [
            chooser.alternatives(&rule.from),
            chooser.alternatives(&rule.to),
            chooser.best(&rule.when).map(|(field, cost)| (vec![field], cost)),
        ];
        let best = parts.into_iter().flatten().min_by(|a, b| a.1.total_cmp(&b.1));
        let Some((fields, _)) = best else {
            self.always.push(id);
            return;
        };
        for field in fields {
            let drawer = self.drawer(&field.attribute);
            for key in keys(field).unwrap_or_default() {
                drawer.file(&key, id);
            }
        }
    }

    fn drawer(&mut self, attribute: &Attribute) -> &mut Drawer {
        let place = self.drawers.iter().position(|(known, _)| known == attribute).unwrap_or_else(|| {
            self.drawers.push((attribute.clone(), Drawer::default()));
            self.drawers.len() - 1
        });
        &mut self.drawers[place].1
    }

    fn unfiled(&self, request: &Request<'_>, show: &mut impl FnMut(&[RuleId])) {
        let Exclusions { tests, of } = &self.exclusions;
        let mut excluding = 0_u64;
        for (bit, test) in tests.iter().enumerate() {
            excluding |= u64::from(!test.holds(request)) << bit;
        }
        if excluding == 0 {
            return show(&self.always);
        }
        // In runs, within which the engine can skip.
        let mut from = 0;
        for (n, own) in of.iter().enumerate() {
            if own & excluding != 0 {
                if from < n {
                    show(&self.always[from..n]);
                }
                from = n + 1;
            }
        }
        if from < self.always.len() {
            show(&self.always[from..]);
        }
    }

    /// Shows every rule that may match the request, some perhaps twice.
    #[inline]
    pub(crate) fn candidates(&self, request: &Request<'_>, mut show: impl FnMut(&[RuleId])) {
        self.unfiled(request, &mut show);
        for (attribute, drawer) in &self.drawers {
            match attribute {
                Attribute::SourceIp | Attribute::RemoteIp | Attribute::DestinationIp => {
                    if let Some(ip) = address(attribute, request) {
                        drawer.address(ip, &mut show);
                    }
                }
                Attribute::Port => {
                    if let Some(rules) = drawer.ports.get(&u64::from(request.destination.port())) {
                        show(rules);
                    }
                }
                Attribute::Header(name) => header(name, request, &mut |value| drawer.text(value, Fold::Exactly, &mut show)),
                plain => {
                    if let Some(text) = text(plain, request) {
                        drawer.text(text, plain.fold(), &mut show);
                    }
                }
            }
        }
    }
}

/// Decides where rules are filed.
struct Chooser {
    /// How many rules share a key.
    shared: HashMap<(Attribute, Key), f64>,
    count: f64,
    /// The headers that are worth a drawer.
    headers: Vec<Box<str>>,
}

impl Chooser {
    /// How often a rule filed under this test would be met: the sum over its keys of how common they are.
    fn cost(&self, field: &Field) -> Option<f64> {
        if let Attribute::Header(name) = &field.attribute
            && !self.headers.contains(name)
        {
            return None;
        }
        let share = |key: &Key| {
            let sharing = self.shared.get(&(field.attribute.clone(), key.clone())).copied().unwrap_or(1.0);
            key.commonness(&field.attribute) * (sharing / self.count.max(1.0)).max(1e-6)
        };
        Some(keys(field)?.iter().map(share).sum())
    }

    fn best<'a>(&self, fields: &'a [Field]) -> Option<(&'a Field, f64)> {
        fields.iter().filter_map(|field| Some((field, self.cost(field)?))).min_by(|a, b| a.1.total_cmp(&b.1))
    }

    /// One test of each alternative. `None` if one has none, or there are no alternatives.
    fn alternatives<'a>(&self, alternatives: &'a [All]) -> Option<(Vec<&'a Field>, f64)> {
        let chosen: Vec<(&Field, f64)> = alternatives.iter().map(|fields| self.best(fields)).collect::<Option<_>>()?;
        let cost = chosen.iter().map(|(_, cost)| cost).sum();
        (!chosen.is_empty()).then(|| (chosen.into_iter().map(|(field, _)| field).collect(), cost))
    }
}
