//! What a proxy is started with, from the environment that the webhook writes or from a file, in one schema.

use std::time::Duration;

/// How long things may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// A connection to the destination, default 5 s.
    pub connect: Duration,
    /// How long the client of a connection without a declared protocol may be silent before the destination is connected
    /// (and may speak first), default 5 ms.
    pub detect_silence: Duration,
    /// How long the first bytes may take to become enough to tell the protocol once the first has come, default 2 s.
    pub detect: Duration,
    /// A request's head, from its first byte (or from the start of the connection) to its last, default 10 s.
    pub request_header: Duration,
    /// An idle keep-alive connection to the app or the destination stays in the pool, default 50 s.
    pub pool_idle: Duration,
    /// How long a drain may take, default 25 s.
    pub drain: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            detect_silence: Duration::from_millis(5),
            detect: Duration::from_secs(2),
            request_header: Duration::from_secs(10),
            pool_idle: Duration::from_secs(50),
            drain: Duration::from_secs(25),
        }
    }
}

/// Everything that stays as it is while the process runs.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// How long things may take.
    pub timeouts: Timeouts,
}
