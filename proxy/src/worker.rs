//! A worker: one thread with a current-thread runtime, its own listeners and its own connections. What it owns is in a
//! [`Worker`], held by `Rc` by each of its connections, which run as local tasks.

use crate::balance::Routes;
use crate::conn::Downstream;
use crate::inbound::Config;
use crate::settings::Settings;
use crate::telemetry::Recorder;
use crate::tls::identity::Holder;
use crate::{drain, http};
use arc_swap::ArcSwap;
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
    /// Tells that the process ends, or that the configuration has changed.
    pub drain: drain::Watch,
    /// What is known of the pod.
    pub config: Arc<ArcSwap<Config>>,
    /// What is known of destinations.
    pub routes: Routes,
    /// The proxy's certificate. None: there is no control plane to give one, so no mutual TLS either.
    pub identity: Option<Arc<Holder>>,
}

impl Worker {
    /// Resolves when a connection has to come to its end: the process ends, or the configuration does not take it any more.
    pub async fn over(&self, down: &Downstream) {
        let mut watch = self.drain.clone();
        watch.over(|| !self.config.load().takes(down)).await;
    }

    /// Whether it has.
    pub fn is_over(&self, down: &Downstream) -> bool {
        self.drain.is_draining() || !self.config.load().takes(down)
    }
}
