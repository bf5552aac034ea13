//! A one-machine cluster for trying and testing Weft: a test double, never a production path.
//!
//! `weft playground up` starts a daemon (the same binary again) that holds an API server ([`apiserver`]), the controllers that a
//! mesh notices, and one node whose pods are host processes in network namespaces, with Service addresses and names. Nothing
//! is kept when it ends: the next `up` begins with an empty cluster, after removing what an earlier one left behind.

pub mod apiserver;
mod command;
mod controllers;
mod daemon;
mod dns;
mod events;
mod json;
mod mirror;
mod netns;
mod node;
pub mod sample;
mod services;
mod sys;
mod tls;

pub use command::{Args, run};

/// The time.
pub(crate) fn instant() -> k8s_openapi::jiff::Timestamp {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    k8s_openapi::jiff::Timestamp::new(since.as_secs() as i64, since.subsec_nanos() as i32).unwrap_or_default()
}

/// The time as Kubernetes writes it.
pub(crate) fn now() -> String {
    apiserver::api::now()
}
