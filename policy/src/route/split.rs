//! Which of several weighted backends a request goes to.

use super::Changes;
use weft_api::wire;

/// Backends with weights.
#[derive(Debug)]
pub struct Split {
    backends: Vec<Weighted>,
    total: u64,
}

/// One of them.
#[derive(Debug)]
pub struct Weighted {
    /// Its place.
    pub backend: usize,
    /// Changes of the request's header for it alone.
    pub request: Changes,
    /// Changes of the response's header.
    pub response: Changes,
    until: u64,
}

impl Split {
    pub(super) fn new(wire: &wire::Split) -> Result<Self, String> {
        // Without a choice a weight says nothing.
        let only = wire.backends.len() == 1;
        let mut backends = Vec::new();
        let mut total = 0;
        for weighted in &wire.backends {
            let weight = if only { 1 } else { u64::from(weighted.weight) };
            if weight == 0 {
                continue;
            }
            total += weight;
            backends.push(Weighted {
                backend: weighted.backend as usize,
                request: Changes::new(weighted.request_headers.as_ref())?,
                response: Changes::new(weighted.response_headers.as_ref())?,
                until: total,
            });
        }
        Ok(Self { backends, total })
    }

    /// All that can be chosen.
    pub fn backends(&self) -> &[Weighted] {
        &self.backends
    }

    /// The backend of the `n`th request. None: all weights are 0.
    ///
    /// Consecutive numbers fall evenly on the backends (multiples of the golden ratio are spread as evenly as any sequence is), so that 80 to 20
    /// is met within a hundred requests, not only in the long run; and not in blocks, as taking turns would.
    pub fn nth(&self, n: u32) -> Option<&Weighted> {
        const GOLDEN: u32 = 2_654_435_769;
        let point = (u64::from(n.wrapping_mul(GOLDEN)) * self.total) >> 32;
        self.backends.iter().find(|weighted| point < weighted.until)
    }
}
