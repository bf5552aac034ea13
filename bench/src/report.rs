//! What came out: values per row, peer and round; their medians; and JSON, Markdown and SVG of them.

use crate::machine::{Cores, Machine};
use crate::stats::{median, percentile};
use crate::svg;
use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// A line of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Row {
    H1OneCpu,
    H1Cpu,
    H1ManyCpu,
    H2Cpu,
    ChurnCpu,
    HandshakeCpu,
    TcpCpu,
    LatencyP50,
    LatencyP99,
    LatencyP999,
    AddedP50,
    AddedP99,
    AddedP999,
    RssIdle,
    RssFull,
    RssPerConnection,
    RssAfter,
    Startup,
    BinarySize,
    H1OneRate,
    H1Rate,
    H1ManyRate,
    H2Rate,
    ChurnRate,
    HandshakeRate,
    Resumed,
    TcpRate,
    LoadCpu,
}

/// Key in JSON, title, unit.
type Words = (&'static str, &'static str, &'static str);

impl Row {
    fn words(self) -> Words {
        match self {
            Self::H1OneCpu => ("h1_1_cpu", "HTTP/1.1, 1 connection: CPU", "µs/request"),
            Self::H1Cpu => ("h1_32_cpu", "HTTP/1.1, 32 connections: CPU", "µs/request"),
            Self::H1ManyCpu => ("h1_256_cpu", "HTTP/1.1, 256 connections: CPU", "µs/request"),
            Self::H2Cpu => ("h2_100_cpu", "HTTP/2, 100 streams: CPU", "µs/request"),
            Self::ChurnCpu => ("churn_cpu", "connection churn: CPU", "µs/connection"),
            Self::HandshakeCpu => ("handshake_cpu", "raw TCP connection, each with mutual TLS of its own: CPU", "µs/connection"),
            Self::TcpCpu => ("tcp_cpu", "raw TCP: CPU", "s/GB"),
            Self::LatencyP50 => ("latency_p50", "latency at 2,000/s: p50", "µs"),
            Self::LatencyP99 => ("latency_p99", "latency at 2,000/s: p99", "µs"),
            Self::LatencyP999 => ("latency_p999", "latency at 2,000/s: p99.9", "µs"),
            Self::AddedP50 => ("added_p50", "added to the direct way: p50", "µs"),
            Self::AddedP99 => ("added_p99", "added to the direct way: p99", "µs"),
            Self::AddedP999 => ("added_p999", "added to the direct way: p99.9", "µs"),
            Self::RssIdle => ("rss_idle", "RSS idle", "MiB"),
            Self::RssFull => ("rss_5000", "RSS with 5,000 idle connections", "MiB"),
            Self::RssPerConnection => ("rss_per_connection", "RSS per idle connection", "KiB"),
            Self::RssAfter => ("rss_after", "RSS after the loads", "MiB"),
            Self::Startup => ("startup", "exec to first response", "ms"),
            Self::BinarySize => ("binary", "size of the binary", "MB"),
            Self::H1OneRate => ("h1_1_rate", "HTTP/1.1, 1 connection", "requests/s"),
            Self::H1Rate => ("h1_32_rate", "HTTP/1.1, 32 connections", "requests/s"),
            Self::H1ManyRate => ("h1_256_rate", "HTTP/1.1, 256 connections", "requests/s"),
            Self::H2Rate => ("h2_100_rate", "HTTP/2, 100 streams", "requests/s"),
            Self::ChurnRate => ("churn_rate", "connection churn", "connections/s"),
            Self::HandshakeRate => ("handshake_rate", "raw TCP connections with mutual TLS", "connections/s"),
            Self::Resumed => ("resumed", "of them resumed", "%"),
            Self::TcpRate => ("tcp_rate", "raw TCP", "GB/s"),
            Self::LoadCpu => ("load_cpu", "(generator + backend in h1-32: CPU)", "µs/request"),
        }
    }
}

/// What was measured: which goals count, and how the plot is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bench {
    /// One plaintext hop.
    Hop,
    /// Two proxies with mutual TLS between them.
    Pair,
}

impl Bench {
    /// Goals for Weft that need no second peer (absolute) or are a share of Envoy's figure in the same run.
    fn goals(self) -> &'static [(Row, Goal)] {
        match self {
            Self::Hop => &[
                (Row::H1Cpu, Goal::OfEnvoy(0.35)),
                (Row::TcpCpu, Goal::OfEnvoy(0.85)),
                (Row::LatencyP999, Goal::OfEnvoy(1.0)),
                (Row::RssIdle, Goal::AtMost(8.0)),
                (Row::RssPerConnection, Goal::AtMost(15.0)),
                (Row::Startup, Goal::AtMost(100.0)),
                (Row::BinarySize, Goal::AtMost(12.0)),
            ],
            Self::Pair => &[
                (Row::H1Cpu, Goal::OfEnvoy(0.36)),
                (Row::TcpCpu, Goal::OfEnvoy(0.86)),
                (Row::HandshakeCpu, Goal::OfEnvoy(0.25)),
                (Row::LatencyP999, Goal::OfEnvoy(1.0)),
            ],
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Hop => "Cost of one hop relative to Envoy (shorter is better)",
            Self::Pair => "Cost of a pair with mutual TLS relative to Envoy's (shorter is better)",
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Goal {
    OfEnvoy(f64),
    AtMost(f64),
}

/// Values as they come in, one per round.
#[derive(Debug, Default)]
pub(crate) struct Results {
    values: BTreeMap<Row, BTreeMap<&'static str, Vec<f64>>>,
}

impl Results {
    /// One more round's value.
    pub(crate) fn add(&mut self, row: Row, peer: &'static str, value: f64) {
        self.values.entry(row).or_default().entry(peer).or_default().push(value);
    }

    /// The value that was added last.
    pub(crate) fn latest(&self, row: Row, peer: &str) -> Option<f64> {
        self.values.get(&row)?.get(peer)?.last().copied()
    }

    /// Notes percentiles of a peer's latencies (`sorted`, nanoseconds), and what of them it added: the direct way was measured in
    /// the same round, under the name `direct`.
    pub(crate) fn note_latency(&mut self, peer: &'static str, sorted: &[u64]) {
        for (percent, whole, added) in [
            (50.0, Row::LatencyP50, Row::AddedP50),
            (99.0, Row::LatencyP99, Row::AddedP99),
            (99.9, Row::LatencyP999, Row::AddedP999),
        ] {
            let micros = percentile(sorted, percent) as f64 / 1e3;
            self.add(whole, peer, micros);
            if peer != "direct"
                && let Some(direct) = self.latest(whole, "direct")
            {
                self.add(added, peer, micros - direct);
            }
        }
    }

    fn median(&self, row: Row, peer: &str) -> Option<f64> {
        median(self.values.get(&row)?.get(peer)?)
    }

    fn ratio(&self, row: Row, above: &str, below: &str) -> Option<f64> {
        let below = self.median(row, below)?;
        // Added latency may be nothing or less than nothing on a noisy machine: no ratio then.
        if below > 0.0 { self.median(row, above).filter(|above| *above > 0.0).map(|above| above / below) } else { None }
    }
}

/// A finished run.
#[derive(Debug)]
pub(crate) struct Report {
    bench: Bench,
    machine: Machine,
    versions: Vec<(&'static str, String)>,
    cores: Cores,
    rounds: usize,
    results: Results,
    failures: Vec<String>,
}

impl Report {
    /// Peers stand in the order of `versions`.
    pub(crate) fn new(
        bench: Bench,
        machine: Machine,
        versions: Vec<(&'static str, String)>,
        cores: Cores,
        rounds: usize,
        results: Results,
        failures: Vec<String>,
    ) -> Self {
        Self { bench, machine, versions, cores, rounds, results, failures }
    }

    /// Whether no peer failed in any scenario.
    pub(crate) fn is_complete(&self) -> bool {
        self.failures.is_empty()
    }

    /// Writes `NAME.json`, `NAME.md` and `NAME.svg` into `dir`.
    pub(crate) fn write(&self, dir: &Path, name: &str) -> Result<()> {
        std::fs::create_dir_all(dir).with_context(|| format!("can't make {}", dir.display()))?;
        let json = format!("{:#}\n", self.json());
        for (extension, text) in [("json", json), ("md", self.markdown()), ("svg", self.svg())] {
            let path = dir.join(format!("{name}.{extension}"));
            std::fs::write(&path, text).with_context(|| format!("can't write {}", path.display()))?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        let mut rows = Map::new();
        for (row, peers) in &self.results.values {
            let (key, title, unit) = row.words();
            let medians: Map<String, Value> =
                peers.iter().map(|(peer, values)| ((*peer).to_owned(), json!(median(values)))).collect();
            rows.insert(
                key.to_owned(),
                json!({
                    "title": title, "unit": unit, "median": medians, "rounds": peers,
                    "weft_per_envoy": self.results.ratio(*row, "weft", "envoy"),
                    "envoy_per_weft": self.results.ratio(*row, "envoy", "weft"),
                }),
            );
        }
        let peers: Map<String, Value> = self.versions.iter().map(|(k, v)| ((*k).to_owned(), json!(v))).collect();
        json!({
            "machine": self.machine, "cores": self.cores, "rounds": self.rounds, "peers": peers, "rows": rows,
            "failures": self.failures,
        })
    }

    /// The table, the goals, and what failed.
    pub(crate) fn markdown(&self) -> String {
        let mut out = format!("Median of {} interleaved rounds. ", self.rounds);
        let versions: Vec<String> = self.versions.iter().map(|(name, version)| format!("{name}: `{version}`")).collect();
        out.push_str(&format!("{}.\n\n", versions.join(", ")));
        let names: Vec<&str> = self.versions.iter().map(|(name, _)| *name).collect();
        out.push_str(&format!("| | unit | {} | Weft/Envoy | Envoy/Weft |\n", names.join(" | ")));
        out.push_str(&format!("|---|---|{}---:|---:|\n", "---:|".repeat(names.len())));
        for row in self.results.values.keys() {
            let (_, title, unit) = row.words();
            out.push_str(&format!("| {title} | {unit} |"));
            for name in &names {
                out.push_str(&format!(" {} |", self.results.median(*row, name).map_or("–".into(), number)));
            }
            for (above, below) in [("weft", "envoy"), ("envoy", "weft")] {
                let ratio = self.results.ratio(*row, above, below);
                out.push_str(&format!(" {} |", ratio.map_or("–".into(), |r| format!("{r:.2}"))));
            }
            out.push('\n');
        }
        if let Some(direct) = self.results.median(Row::LatencyP999, "direct") {
            let p50 = self.results.median(Row::LatencyP50, "direct").unwrap_or(0.0);
            out.push_str(&format!("\nDirect way (no proxy) at 2,000/s: p50 {} µs, p99.9 {} µs.\n", number(p50), number(direct)));
        }
        out.push_str(&self.goals());
        for failure in &self.failures {
            out.push_str(&format!("\nFailed: {}\n", failure.replace('\n', "\n    ")));
        }
        out
    }

    fn goals(&self) -> String {
        let mut out = String::new();
        for (row, goal) in self.bench.goals() {
            let (measured, limit, of) = match goal {
                Goal::OfEnvoy(limit) => (self.results.ratio(*row, "weft", "envoy"), limit, "of Envoy's"),
                Goal::AtMost(limit) => (self.results.median(*row, "weft"), limit, row.words().2),
            };
            let Some(measured) = measured else { continue };
            if out.is_empty() {
                out.push_str("\nGoals:\n\n");
            }
            let verdict = if measured <= *limit { "reached" } else { "**missed**" };
            out.push_str(&format!("- {}: at most {limit} {of}, measured {measured:.2}: {verdict}\n", row.words().1));
        }
        out
    }

    /// CPU, memory and latency of each peer, Envoy's being 1.
    fn svg(&self) -> String {
        let rows = [
            Row::H1OneCpu,
            Row::H1Cpu,
            Row::H1ManyCpu,
            Row::H2Cpu,
            Row::ChurnCpu,
            Row::HandshakeCpu,
            Row::TcpCpu,
            Row::LatencyP50,
            Row::LatencyP99,
            Row::LatencyP999,
            Row::RssIdle,
            Row::RssFull,
            Row::RssAfter,
            Row::Startup,
        ];
        let groups = rows.iter().filter_map(|row| {
            let (_, title, unit) = row.words();
            let bars: Vec<svg::Bar> = self
                .versions
                .iter()
                .filter_map(|(peer, _)| {
                    let value = self.results.median(*row, peer)?;
                    let length = self.results.ratio(*row, peer, "envoy")?;
                    Some(svg::Bar { name: peer, length, label: format!("{} {unit}", number(value)) })
                })
                .collect();
            (!bars.is_empty()).then(|| svg::Group { title: title.to_owned(), bars })
        });
        let groups: Vec<svg::Group> = groups.collect();
        svg::bars(self.bench.title(), &groups)
    }
}

/// Three significant digits, no exponent.
fn number(value: f64) -> String {
    let magnitude = value.abs();
    let digits = match magnitude {
        _ if magnitude >= 100.0 => 0,
        _ if magnitude >= 10.0 => 1,
        _ if magnitude >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut results = Results::default();
        for (weft, envoy) in [(10.0, 40.0), (12.0, 44.0), (90.0, 36.0)] {
            results.add(Row::H1Cpu, "weft", weft);
            results.add(Row::H1Cpu, "envoy", envoy);
        }
        results.add(Row::RssIdle, "weft", 9.0);
        results.add(Row::AddedP50, "weft", -1.0);
        results.add(Row::AddedP50, "envoy", 0.0);
        let cores = Cores { peer: 0, load: 1 };
        let versions = vec![("weft", "weft-proxy 1 <x>".to_owned()), ("envoy", "envoy 2".to_owned())];
        Report::new(Bench::Hop, Machine::look(cores), versions, cores, 3, results, vec!["envoy, Tcp: broke".into()])
    }

    #[test]
    fn medians_and_ratios_stand_in_the_table() {
        let text = report().markdown();
        assert!(text.contains("| HTTP/1.1, 32 connections: CPU | µs/request | 12.0 | 40.0 | 0.30 | 3.33 |"), "{text}");
        assert!(text.contains("| RSS idle | MiB | 9.00 | – | – | – |"), "{text}");
        assert!(text.contains("| added to the direct way: p50 | µs | -1.00 | 0.000 | – | – |"), "{text}");
        assert!(text.contains("at most 0.35 of Envoy's, measured 0.30: reached"), "{text}");
        assert!(text.contains("at most 8 MiB, measured 9.00: **missed**"), "{text}");
        assert!(text.contains("Failed: envoy, Tcp: broke"), "{text}");
        assert!(!report().is_complete());
    }

    #[test]
    fn files_hold_the_rounds_and_can_be_read_back() {
        let dir = tempfile::tempdir().unwrap();
        report().write(&dir.path().join("new"), "proxy").unwrap();
        let read = |name: &str| std::fs::read_to_string(dir.path().join("new").join(name)).unwrap();
        let json: Value = serde_json::from_str(&read("proxy.json")).unwrap();
        let row = &json["rows"]["h1_32_cpu"];
        assert_eq!(row["rounds"]["weft"], json!([10.0, 12.0, 90.0]));
        assert_eq!(row["median"]["weft"], json!(12.0));
        assert_eq!(row["weft_per_envoy"], json!(0.3));
        assert_eq!(json["rows"]["added_p50"]["weft_per_envoy"], Value::Null);
        assert!(read("proxy.svg").starts_with("<svg"));
        assert!(read("proxy.md").contains("Weft/Envoy"));
    }

    #[test]
    fn numbers_have_three_digits() {
        for (value, text) in [(0.1234, "0.123"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (45678.0, "45678")] {
            assert_eq!(number(value), text);
        }
    }
}
