//! Whether a request that failed is tried again. Pure: what happened in, yes or no out; counting, waiting and budgets are the proxy's.
//!
//! `retryOn` given by the user is obeyed to the letter, in Envoy's words. Where he gave retries without it (as the guide does), methods
//! that may be repeated (RFC 9110, section 9.2.2) are tried again after 502, 503, 504, a reset and a try that took too long; any other only when it
//! certainly never reached the app. Without retries at all only the latter holds, for every method.

use std::time::Duration;
use weft_api::wire;

/// What came of a try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A response with this status, and its gRPC status if it has one in its head.
    Status(u16, Option<u16>),
    /// No connection could be made: nothing was sent.
    ConnectFailure,
    /// The peer said that it did not process it (`REFUSED_STREAM`), or it was never written: it never reached the app.
    NeverSent,
    /// The connection broke, and no byte of the response had come.
    Reset,
    /// The try took longer than it may.
    TryTimeout,
}

/// Envoy's words, as bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Conditions(u32);

impl Conditions {
    const WORDS: [&'static str; 15] = [
        "5xx",
        "gateway-error",
        "reset",
        "reset-before-request",
        "connect-failure",
        "retriable-4xx",
        "refused-stream",
        "retriable-status-codes",
        "cancelled",
        "deadline-exceeded",
        "internal",
        "resource-exhausted",
        "unavailable",
        // Accepted, and never true here: rate limits of Envoy's own, HTTP/3, headers that nobody names.
        "envoy-ratelimited",
        "http3-post-connect-failure",
    ];

    /// Reads the words.
    ///
    /// # Errors
    /// One that is none.
    pub fn new(words: &[String]) -> Result<Self, String> {
        let mut bits = 0;
        for word in words {
            match Self::WORDS.iter().position(|known| known == word) {
                Some(at) => bits |= 1 << at,
                None if word == "retriable-headers" => {}
                None => return Err(format!("{word:?} is no condition; there are {}", Self::WORDS.join(", "))),
            }
        }
        Ok(Self(bits))
    }

    fn has(self, word: &str) -> bool {
        Self::WORDS.iter().position(|known| *known == word).is_some_and(|at| self.0 & (1 << at) != 0)
    }
}

/// A compiled retry policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retries {
    /// Tries after the first.
    pub attempts: u32,
    /// Time for each try.
    pub per_try_timeout: Option<Duration>,
    /// Wait before the first of them, doubled each time, give or take.
    pub backoff: Duration,
    /// Longest wait.
    pub longest_backoff: Duration,
    /// Endpoints that failed may be tried again at once.
    pub ignore_previous_hosts: bool,
    /// None: the safe default.
    conditions: Option<Conditions>,
    codes: Vec<u16>,
}

impl Retries {
    pub(super) fn new(wire: &wire::RetryPolicy) -> Result<Self, String> {
        let default = |ms: u64, default: u64| Duration::from_millis(if ms == 0 { default } else { ms });
        let backoff = default(wire.backoff_base_ms, 25);
        Ok(Self {
            attempts: wire.attempts,
            per_try_timeout: super::millis(wire.per_try_timeout_ms),
            backoff,
            longest_backoff: super::millis(wire.backoff_max_ms).unwrap_or(backoff * 10),
            ignore_previous_hosts: wire.ignore_previous_hosts,
            conditions: if wire.on.is_empty() { None } else { Some(Conditions::new(&wire.on)?) },
            codes: wire.status_codes.iter().filter_map(|code| u16::try_from(*code).ok()).collect(),
        })
    }

    /// Whether a request is tried again after `answer`. (How often is for the caller to count.)
    pub fn again(&self, idempotent: bool, answer: Answer) -> bool {
        let Some(on) = self.conditions else {
            return match answer {
                Answer::ConnectFailure | Answer::NeverSent => true,
                Answer::Status(502..=504, _) | Answer::Reset | Answer::TryTimeout => idempotent,
                Answer::Status(..) => false,
            };
        };
        match answer {
            Answer::ConnectFailure => on.has("connect-failure") || on.has("5xx") || on.has("gateway-error"),
            Answer::NeverSent => {
                ["refused-stream", "reset", "reset-before-request", "5xx", "connect-failure"].iter().any(|word| on.has(word))
            }
            Answer::Reset => on.has("reset") || on.has("5xx"),
            // A try that was cut off counts as 504, as with Envoy.
            Answer::TryTimeout => on.has("5xx") || on.has("gateway-error") || on.has("reset") || self.codes_say(on, 504),
            Answer::Status(code, grpc) => {
                on.has("5xx") && (500..=599).contains(&code)
                    || on.has("gateway-error") && (502..=504).contains(&code)
                    || on.has("retriable-4xx") && code == 409
                    || self.codes_say(on, code)
                    || grpc.is_some_and(|status| match status {
                        1 => on.has("cancelled"),
                        4 => on.has("deadline-exceeded"),
                        8 => on.has("resource-exhausted"),
                        13 => on.has("internal"),
                        14 => on.has("unavailable"),
                        _ => false,
                    })
            }
        }
    }

    fn codes_say(&self, on: Conditions, code: u16) -> bool {
        on.has("retriable-status-codes") && self.codes.contains(&code)
    }

    /// How long to wait before the `n`th further try (from 1): random, up to a bound that doubles. `random` is from 0 to 1.
    pub fn wait(&self, n: u32, random: f64) -> Duration {
        let bound = self.backoff.saturating_mul(1 << n.saturating_sub(1).min(16)).min(self.longest_backoff);
        bound.mul_f64(random.clamp(0.0, 1.0))
    }
}
