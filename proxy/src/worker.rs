//! A worker: one thread with a current-thread runtime, its own listeners and its own connections. What it owns is in a
//! [`Worker`], held by `Rc` by each of its connections, which run as local tasks.

use crate::settings::Settings;
use crate::telemetry::Recorder;
use crate::{drain, http};
use std::sync::Arc;

/// The state of a worker thread.
#[derive(Debug)]
pub struct Worker {
    /// What the process was started with.
    pub settings: Arc<Settings>,
    /// Where records go.
    pub recorder: Recorder,
    /// Idle HTTP connections to apps and destinations.
    pub pool: http::Pool,
    /// Tells that the process ends.
    pub drain: drain::Watch,
}
