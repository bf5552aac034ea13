//! The kinds of values that annotations and settings hold. Each parser answers a value that is not allowed with what is
//! allowed, in words that complete "… is not".

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;

/// What a parser says of a value that is not allowed: the allowed ones, in words.
pub type Allowed = &'static str;

const PORTS_OR_STAR: Allowed = "`*` or a comma-separated list of ports and ranges between 1 and 65535, for example 80,8080-8090";
const PORTS: Allowed = "a comma-separated list of ports and ranges between 1 and 65535, for example 80,8080-8090";
const CIDRS_OR_STAR: Allowed = "`*` or a comma-separated list of CIDRs, for example 10.0.0.0/8,fd00::/8";
const CIDRS: Allowed = "a comma-separated list of CIDRs, for example 10.0.0.0/8,fd00::/8";
const INTERFACES: Allowed = "a comma-separated list of interface names (at most 15 of letters, digits, `.`, `_`, `-`, `:` and `@`), for example eth1,net1";
const BOOLEAN: Allowed = "`true` or `false`";
const QUANTITY: Allowed = "a Kubernetes quantity, for example 100m, 0.5, 64Mi";
const IMAGE: Allowed = "an image reference";
const SECONDS: Allowed = "a whole number of seconds between 0 and 86400";
const LOG_LEVEL: Allowed =
    "a log level (`off`, `error`, `warn`, `info`, `debug`, `trace`) or directives such as info,weft_proxy::http=debug";

/// Ports, with ranges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortSet {
    /// All of them, written `*`.
    All,
    /// Ranges, first and last port inclusive, in the order in which they were written.
    Ranges(Vec<(u16, u16)>),
}

impl PortSet {
    /// No port.
    pub const NONE: Self = Self::Ranges(Vec::new());

    /// Reads a comma-separated list; `*` only where `star` allows it.
    ///
    /// # Errors
    /// What is allowed.
    pub fn parse(text: &str, star: bool) -> Result<Self, Allowed> {
        if star && text.trim() == "*" {
            return Ok(Self::All);
        }
        let allowed = if star { PORTS_OR_STAR } else { PORTS };
        items(text).map(|item| port_range(item).ok_or(allowed)).collect::<Result<_, _>>().map(Self::Ranges)
    }

    /// As [`PortSet::parse`] without `*`, but an item may be a name that `resolve` knows. A name that it doesn't know is left
    /// out where `lenient` (a namespace's list meets pods that lack the port), else an error.
    ///
    /// # Errors
    /// What is allowed.
    pub fn parse_named(text: &str, resolve: impl Fn(&str) -> Option<u16>, lenient: bool) -> Result<Self, Allowed> {
        const ALLOWED: Allowed =
            "a comma-separated list of ports, ranges and names of container ports, for example 3306,9300-9310,mysql";
        let mut ranges = Vec::new();
        for item in items(text) {
            if let Some(range) = port_range(item) {
                ranges.push(range);
            } else if let Some(port) = resolve(item) {
                ranges.push((port, port));
            } else if !(lenient && is_port_name(item)) {
                return Err(ALLOWED);
            }
        }
        Ok(Self::Ranges(ranges))
    }

    /// Whether the port is in it.
    pub fn contains(&self, port: u16) -> bool {
        match self {
            Self::All => true,
            Self::Ranges(ranges) => ranges.iter().any(|&(first, last)| first <= port && port <= last),
        }
    }

    /// The same with one more port, unless it is there already.
    #[must_use]
    pub fn with(mut self, port: u16) -> Self {
        if !self.contains(port)
            && let Self::Ranges(ranges) = &mut self
        {
            ranges.push((port, port));
        }
        self
    }

    /// Whether there is no port in it.
    pub fn is_empty(&self) -> bool {
        matches!(self, Self::Ranges(ranges) if ranges.is_empty())
    }
}

impl fmt::Display for PortSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("*"),
            Self::Ranges(ranges) => {
                join(
                    f,
                    ranges,
                    |f, &(first, last)| {
                        if first == last { write!(f, "{first}") } else { write!(f, "{first}-{last}") }
                    },
                )
            }
        }
    }
}

/// Blocks of addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cidrs {
    /// All of them, written `*`.
    All,
    /// These.
    Blocks(Vec<IpNet>),
}

impl Cidrs {
    /// Reads a comma-separated list; a bare address means itself alone, and `*` is allowed only where `star` says so.
    ///
    /// # Errors
    /// What is allowed.
    pub fn parse(text: &str, star: bool) -> Result<Self, Allowed> {
        if star && text.trim() == "*" {
            return Ok(Self::All);
        }
        let allowed = if star { CIDRS_OR_STAR } else { CIDRS };
        items(text)
            .map(|item| item.parse::<IpNet>().or_else(|_| item.parse::<IpAddr>().map(IpNet::from)).map_err(|_| allowed))
            .collect::<Result<_, _>>()
            .map(Self::Blocks)
    }
}

impl fmt::Display for Cidrs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("*"),
            Self::Blocks(blocks) => join(f, blocks, |f, block| write!(f, "{block}")),
        }
    }
}

/// How inbound connections reach the proxy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Mode {
    /// NAT; the app sees a local source address.
    #[default]
    Redirect,
    /// Transparent: the app sees the client's own address. The proxy then runs as root with `NET_ADMIN`.
    Tproxy,
}

impl Mode {
    /// As annotations, flags and environment spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Redirect => "redirect",
            Self::Tproxy => "tproxy",
        }
    }

    /// Reads it, in any letter case.
    ///
    /// # Errors
    /// What is allowed.
    pub fn parse(text: &str) -> Result<Self, Allowed> {
        match text.to_ascii_lowercase().as_str() {
            "redirect" => Ok(Self::Redirect),
            "tproxy" => Ok(Self::Tproxy),
            _ => Err("`redirect` or `tproxy`"),
        }
    }
}

/// `true` or `false`, in any letter case.
///
/// # Errors
/// What is allowed.
pub fn parse_bool(text: &str) -> Result<bool, Allowed> {
    match text.to_ascii_lowercase().as_str() {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(BOOLEAN),
    }
}

/// Interface names: what Linux and the firewall tools take as one literal name, so no wildcard and no blank.
///
/// # Errors
/// What is allowed.
pub fn parse_interfaces(text: &str) -> Result<Vec<String>, Allowed> {
    items(text)
        .map(|item| {
            let fine = item.len() <= 15
                && item != "."
                && item != ".."
                && !item.starts_with('-')
                && item.chars().all(|c| c.is_ascii_alphanumeric() || "._-:@".contains(c));
            fine.then(|| item.to_owned()).ok_or(INTERFACES)
        })
        .collect()
}

/// Checks an image reference as far as telling it from a slip needs.
///
/// # Errors
/// What is allowed.
pub fn check_image(text: &str) -> Result<(), Allowed> {
    let fine = !text.is_empty()
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-:/@+".contains(c))
        && text.starts_with(|c: char| c.is_ascii_alphanumeric());
    if fine { Ok(()) } else { Err(IMAGE) }
}

/// Whole seconds, at most a day.
///
/// # Errors
/// What is allowed.
pub fn parse_seconds(text: &str) -> Result<u32, Allowed> {
    text.parse::<u32>().ok().filter(|s| *s <= 86_400).ok_or(SECONDS)
}

/// A log filter in the form that the proxy takes. Istio's and Linkerd's own words for levels are put in ours.
///
/// # Errors
/// What is allowed.
pub fn parse_log_level(text: &str) -> Result<String, Allowed> {
    let level = |word: &str| -> Option<&'static str> {
        match word.to_ascii_lowercase().as_str() {
            "off" | "none" => Some("off"),
            "error" | "critical" | "fatal" => Some("error"),
            "warn" | "warning" => Some("warn"),
            "info" => Some("info"),
            "debug" => Some("debug"),
            "trace" => Some("trace"),
            _ => None,
        }
    };
    let target = |word: &str| !word.is_empty() && word.chars().all(|c| c.is_ascii_alphanumeric() || "_:-.[]{}".contains(c));
    let mut directives = Vec::new();
    for item in text.split(',').map(str::trim) {
        let directive = match item.rsplit_once('=') {
            Some((name, word)) if target(name) => level(word).map(|l| format!("{name}={l}")),
            None => level(item).map(str::to_owned),
            Some(_) => None,
        };
        directives.push(directive.ok_or(LOG_LEVEL)?);
    }
    Ok(directives.join(","))
}

/// Checks a Kubernetes quantity that is not negative.
///
/// # Errors
/// What is allowed.
pub fn check_quantity(text: &str) -> Result<(), Allowed> {
    quantity(text).map(|_| ()).ok_or(QUANTITY)
}

/// The value of a quantity, for comparing. `None`: it is none.
pub fn quantity(text: &str) -> Option<f64> {
    let text = text.strip_prefix('+').unwrap_or(text);
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    if !number.starts_with(|c: char| c.is_ascii_digit() || c == '.') || !number.contains(|c: char| c.is_ascii_digit()) {
        return None;
    }
    let number: f64 = number.parse().ok()?;
    let factor = match suffix {
        "" => 1.0,
        "n" => 1e-9,
        "u" => 1e-6,
        "m" => 1e-3,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "E" => 1e18,
        "Ki" => 1024.0,
        "Mi" => 1024f64.powi(2),
        "Gi" => 1024f64.powi(3),
        "Ti" => 1024f64.powi(4),
        "Pi" => 1024f64.powi(5),
        "Ei" => 1024f64.powi(6),
        exponent => {
            let digits = exponent.strip_prefix(['e', 'E'])?;
            10f64.powi(digits.parse::<i32>().ok().filter(|e| e.abs() <= 18)?)
        }
    };
    Some(number * factor)
}

fn port_range(item: &str) -> Option<(u16, u16)> {
    // `u16::from_str` takes a leading `+`; a port doesn't.
    let port =
        |text: &str| -> Option<u16> { text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok().filter(|p| *p > 0))? };
    match item.split_once('-') {
        None => port(item).map(|p| (p, p)),
        Some((first, last)) => {
            let (first, last) = (port(first.trim())?, port(last.trim())?);
            (first <= last).then_some((first, last))
        }
    }
}

/// Kubernetes' rule for names of ports (an IANA service name).
fn is_port_name(text: &str) -> bool {
    text.len() <= 15
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && text.bytes().any(|b| b.is_ascii_lowercase())
}

/// The items of a comma-separated list; blanks around them and empty ones at the ends of the list don't count.
fn items(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty())
}

fn join<T>(f: &mut fmt::Formatter<'_>, all: &[T], write: impl Fn(&mut fmt::Formatter<'_>, &T) -> fmt::Result) -> fmt::Result {
    for (i, one) in all.iter().enumerate() {
        if i > 0 {
            f.write_str(",")?;
        }
        write(f, one)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports() {
        for (text, star, want) in [
            ("*", true, Some("*")),
            ("*", false, None),
            ("", true, Some("")),
            ("80", false, Some("80")),
            (" 80 , 90-95,", false, Some("80,90-95")),
            ("0", false, None),
            ("70000", false, None),
            ("95-90", false, None),
            ("-5", false, None),
            ("+80", false, None),
            ("http", false, None),
            ("80;90", false, None),
        ] {
            assert_eq!(PortSet::parse(text, star).ok().map(|p| p.to_string()).as_deref(), want, "{text:?}");
        }
        assert_eq!(PortSet::NONE.with(15020).with(15020).to_string(), "15020");
        assert_eq!(PortSet::parse("15000-16000", false).unwrap().with(15020).to_string(), "15000-16000");
    }

    #[test]
    fn named_ports() {
        let resolve = |name: &str| (name == "mysql").then_some(3306);
        assert_eq!(PortSet::parse_named("mysql,9300-9310", resolve, false).unwrap().to_string(), "3306,9300-9310");
        assert!(PortSet::parse_named("redis", resolve, false).is_err());
        assert_eq!(PortSet::parse_named("redis", resolve, true).unwrap().to_string(), "");
        assert!(PortSet::parse_named("not a port!", resolve, true).is_err());
    }

    #[test]
    fn cidrs() {
        for (text, star, want) in [
            ("*", true, Some("*")),
            ("*", false, None),
            ("10.0.0.0/8, fd00::/8", false, Some("10.0.0.0/8,fd00::/8")),
            ("10.1.2.3", false, Some("10.1.2.3/32")),
            ("10.0.0.0/33", false, None),
            ("example.com", false, None),
        ] {
            assert_eq!(Cidrs::parse(text, star).ok().map(|p| p.to_string()).as_deref(), want, "{text:?}");
        }
    }

    #[test]
    fn interfaces() {
        assert_eq!(parse_interfaces("eth1, net1").unwrap(), ["eth1", "net1"]);
        for bad in ["eth 1", "eth1;reboot", "a/b", "..", "sixteen-letters-", "-j", "eth+"] {
            assert!(parse_interfaces(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn quantities() {
        assert!(quantity("100m").unwrap() < quantity("1").unwrap());
        assert!((quantity("64Mi").unwrap() - 67_108_864.0).abs() < 0.5);
        assert!((quantity("1e3").unwrap() - 1000.0).abs() < 1e-6);
        for bad in ["", "lots", "-1", "1 Gi", "1Mb", "1\n", ".", "1e", "1e99", "0x10"] {
            assert!(quantity(bad).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn log_levels() {
        for (text, want) in [
            ("DEBUG", Some("debug")),
            ("warning", Some("warn")),
            ("warn,linkerd=info", Some("warn,linkerd=info")),
            ("info,weft_proxy::http=debug", Some("info,weft_proxy::http=debug")),
            ("loud", None),
            ("a b=info", None),
            ("", None),
            ("info,", None),
        ] {
            assert_eq!(parse_log_level(text).ok().as_deref(), want, "{text:?}");
        }
    }

    #[test]
    fn images_and_seconds() {
        for good in ["weft-proxy", "ghcr.io/weft-mesh/weft-proxy:0.1.0", "localhost:5000/a/b@sha256:0123"] {
            check_image(good).unwrap();
        }
        for bad in ["", "a b", "a\"b", "-x", "${IMAGE}"] {
            assert!(check_image(bad).is_err(), "{bad:?}");
        }
        assert_eq!(parse_seconds("25"), Ok(25));
        assert!(parse_seconds("-1").is_err() && parse_seconds("1.5").is_err() && parse_seconds("90000").is_err());
    }
}
