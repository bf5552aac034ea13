//! What the control plane serves: [`tls`] accepts, [`discovery`] tells proxies their configuration, [`auth`] proves who asks,
//! [`health`] is for the kubelet and Prometheus. The webhook itself is the crate `weft-webhook`.

pub mod auth;
pub mod discovery;
pub mod health;
pub mod tls;
