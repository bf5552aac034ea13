//! The values that flags and annotations take: ports, networks, interfaces. Everything here is a pure function from text;
//! an error says what is wrong with the text, the caller says where the text came from.

use super::LONGEST_LIST;
use ipnet::IpNet;
use std::fmt;
use std::str::FromStr;

/// Consecutive ports, never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    /// The lowest.
    pub first: u16,
    /// The highest, at least `first`.
    pub last: u16,
}

impl PortRange {
    /// One port.
    pub fn single(port: u16) -> Self {
        Self { first: port, last: port }
    }

    /// Whether `port` is in it.
    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last { write!(f, "{}", self.first) } else { write!(f, "{}-{}", self.first, self.last) }
    }
}

impl FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((first, last)) = text.split_once('-') else {
            return Ok(Self::single(port(text)?));
        };
        let (first, last) = (port(first.trim())?, port(last.trim())?);
        if first > last {
            return Err(format!("range '{text}' ends before it begins"));
        }
        Ok(Self { first, last })
    }
}

/// Ports as ranges: ascending, neither overlapping nor adjacent, so that equal sets are equal values.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct PortSet(Vec<PortRange>);

impl PortSet {
    /// The ranges, ascending.
    pub fn ranges(&self) -> &[PortRange] {
        &self.0
    }

    /// Whether there is no port in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether `port` is in it.
    pub fn contains(&self, port: u16) -> bool {
        self.0.iter().any(|range| range.contains(port))
    }

    /// Adds a range.
    pub fn insert(&mut self, range: PortRange) {
        self.0.push(range);
        *self = std::mem::take(&mut self.0).into_iter().collect();
    }
}

impl FromIterator<PortRange> for PortSet {
    fn from_iter<I: IntoIterator<Item = PortRange>>(ranges: I) -> Self {
        let mut ranges: Vec<PortRange> = ranges.into_iter().collect();
        ranges.sort_unstable();
        let mut merged: Vec<PortRange> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match merged.last_mut() {
                Some(last) if u32::from(range.first) <= u32::from(last.last) + 1 => {
                    last.last = last.last.max(range.last);
                }
                _ => merged.push(range),
            }
        }
        Self(merged)
    }
}

impl fmt::Display for PortSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, range) in self.0.iter().enumerate() {
            write!(f, "{}{range}", if index == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

/// All ports or some.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Ports {
    /// All.
    All,
    /// These; perhaps none.
    List(PortSet),
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("*"),
            Self::List(ports) => ports.fmt(f),
        }
    }
}

/// All addresses or some networks, of either family.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Cidrs {
    /// All.
    All,
    /// These; perhaps none.
    List(Vec<IpNet>),
}

impl Cidrs {
    /// The networks; none stand for all.
    pub fn list(&self) -> &[IpNet] {
        match self {
            Self::All => &[],
            Self::List(nets) => nets,
        }
    }
}

/// Name of a network interface, or with a `+` at its end the beginning of names.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Interface(String);

impl Interface {
    /// `lo`.
    pub fn loopback() -> Self {
        Self("lo".into())
    }

    /// As written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What names begin with, if it is a pattern.
    pub fn prefix(&self) -> Option<&str> {
        self.0.strip_suffix('+')
    }

    /// Whether it means the interface `name`.
    pub fn covers(&self, name: &str) -> bool {
        self.prefix().map_or(self.0 == name, |prefix| name.starts_with(prefix))
    }
}

impl fmt::Display for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Interface {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // Linux allows 15 bytes. It would allow more characters too, but none of these has a second meaning anywhere.
        let name = text.strip_suffix('+').unwrap_or(text);
        if text.len() > 15 {
            return Err(format!("interface name '{text}' is longer than 15 bytes"));
        }
        if name.is_empty() {
            return Err(format!("interface name '{text}' would stand for every interface"));
        }
        if let Some(bad) = name.chars().find(|character| !(character.is_ascii_alphanumeric() || "._-@".contains(*character))) {
            return Err(format!("interface name '{text}' has a {bad:?} in it; letters, digits and ._-@ are allowed"));
        }
        if name.starts_with('-') || name == "." || name == ".." {
            return Err(format!("'{text}' is no interface name"));
        }
        let interface = Self(text.to_owned());
        if interface.covers("lo") {
            return Err(format!("'{text}' covers lo, which the redirection itself needs"));
        }
        Ok(interface)
    }
}

/// A list as clap sees it: one value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct List<T>(pub Vec<T>);

/// The items of a comma-separated list; an empty text has none, an empty item is a mistake.
fn items(text: &str) -> Result<Vec<&str>, String> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let items: Vec<&str> = text.split(',').map(str::trim).collect();
    if items.iter().any(|item| item.is_empty()) {
        return Err("the list has an empty item (two commas in a row, or one at an end)".into());
    }
    if items.len() > LONGEST_LIST {
        return Err(format!("the list has {} items, more than {LONGEST_LIST}", items.len()));
    }
    Ok(items)
}

/// A port, 1 to 65535.
pub fn port(text: &str) -> Result<u16, String> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(format!("'{text}' is not a port number"));
    }
    match text.parse::<u16>() {
        Ok(0) | Err(_) => Err(format!("port {text} is not between 1 and 65535")),
        Ok(port) => Ok(port),
    }
}

/// A user or group id. The highest number means "none" to the kernel.
pub fn id(text: &str) -> Result<u32, String> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(format!("'{text}' is not a numeric id"));
    }
    text.parse::<u32>()
        .ok()
        .filter(|id| *id != u32::MAX)
        .ok_or_else(|| format!("id {text} is not between 0 and {}", u32::MAX - 1))
}

/// A list of ports and ranges.
pub fn port_set(text: &str) -> Result<PortSet, String> {
    if text.trim() == "*" {
        return Err("'*' is not allowed here: list the ports".into());
    }
    items(text)?.into_iter().map(PortRange::from_str).collect()
}

/// `*` or a list of ports and ranges.
pub fn ports(text: &str) -> Result<Ports, String> {
    if text.trim() == "*" { Ok(Ports::All) } else { port_set(text).map(Ports::List) }
}

/// One network, its host bits cleared.
fn cidr(text: &str) -> Result<IpNet, String> {
    let Some((address, length)) = text.split_once('/') else {
        let hint = match text.parse() {
            Ok(std::net::IpAddr::V4(_)) => format!(": write {text}/32 for the one address"),
            Ok(std::net::IpAddr::V6(_)) => format!(": write {text}/128 for the one address"),
            Err(_) => String::new(),
        };
        return Err(format!("'{text}' is not a CIDR{hint}"));
    };
    let address: std::net::IpAddr =
        address.parse().map_err(|_| format!("'{text}' is not a CIDR: '{address}' is not an IP address"))?;
    let (bits, family) = if address.is_ipv4() { (32, "IPv4") } else { (128, "IPv6") };
    let length = length
        .parse::<u8>()
        .ok()
        .filter(|prefix| *prefix <= bits && length.bytes().all(|byte| byte.is_ascii_digit()))
        .ok_or_else(|| {
        format!("'{text}' is not a CIDR: an {family} prefix length is a number from 0 to {bits}, not '{length}'")
    })?;
    if let std::net::IpAddr::V6(v6) = address
        && v6.to_ipv4_mapped().is_some()
    {
        return Err(format!("'{text}' is an IPv4 network in IPv6 notation, which no IPv6 packet carries: write it as IPv4"));
    }
    IpNet::new(address, length).map(|net| net.trunc()).map_err(|error| format!("'{text}': {error}"))
}

/// A list of networks, repeated ones once.
pub fn cidr_list(text: &str) -> Result<List<IpNet>, String> {
    if text.trim() == "*" {
        return Err("'*' is not allowed here: list the CIDRs".into());
    }
    let mut nets = Vec::new();
    for item in items(text)? {
        let net = cidr(item)?;
        if !nets.contains(&net) {
            nets.push(net);
        }
    }
    Ok(List(nets))
}

/// `*` or a list of networks.
pub fn cidrs(text: &str) -> Result<Cidrs, String> {
    if text.trim() == "*" { Ok(Cidrs::All) } else { cidr_list(text).map(|list| Cidrs::List(list.0)) }
}

/// A list of interfaces, repeated ones once.
pub fn interfaces(text: &str) -> Result<List<Interface>, String> {
    let mut interfaces = Vec::new();
    // Not trimmed like numbers: an interface name with a space is a mistake, not a matter of style.
    if text.is_empty() {
        return Ok(List(interfaces));
    }
    if text.split(',').count() > LONGEST_LIST {
        return Err(format!("the list has more than {LONGEST_LIST} items"));
    }
    for item in text.split(',') {
        if item.is_empty() {
            return Err("the list has an empty item (two commas in a row, or one at an end)".into());
        }
        let interface = Interface::from_str(item)?;
        if !interfaces.contains(&interface) {
            interfaces.push(interface);
        }
    }
    Ok(List(interfaces))
}
