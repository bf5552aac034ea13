//! The store's own metrics, read when they are asked for.

use super::Reports;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use std::fmt::Error;
use std::sync::Arc;

/// A collector of `weft_reports_*`.
#[derive(Debug)]
pub struct Numbers(pub Arc<Reports>);

impl Collector for Numbers {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let state = self.0.lock();
        let gauges: [(&str, &str, usize); 4] = [
            ("weft_reports_proxies", "Proxies that are remembered: attached, or gone for less than an hour", state.proxies.len()),
            ("weft_reports_edges", "Distinct edges of the last hour", state.edges.len()),
            ("weft_reports_edge_bytes", "Memory of edges, as accounted", state.edges.bytes()),
            ("weft_reports_refusals", "Refused requests that are remembered", state.refusals.len()),
        ];
        for (name, help, value) in gauges {
            let metric = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
            metric.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        let taken = ConstCounter::new(state.reports);
        taken.encode(encoder.encode_descriptor("weft_reports", "Reports of proxies", None, MetricType::Counter)?)?;
        let mut family = encoder.encode_descriptor(
            "weft_reports_dropped",
            "What of reports was not kept, for want of room",
            None,
            MetricType::Counter,
        )?;
        let dropped = [
            ("report", state.dropped.reports),
            ("edge", state.edges.dropped()),
            ("hit", state.dropped.hits),
            ("refusal", state.dropped.refusals),
        ];
        for (what, value) in dropped {
            ConstCounter::new(value).encode(family.encode_family(&[("what", what)])?)?;
        }
        Ok(())
    }
}
