//! What the control plane serves: [`tls`] accepts, [`discovery`] tells proxies their configuration and [`destinations`] what stands behind
//! addresses, [`identity`] signs their certificates, [`auth`] proves who asks and [`limits`] how much he may, [`console`] answers the
//! `weft` command, [`health`] is for the kubelet and Prometheus. The webhook itself is the crate `weft-webhook`.

pub mod auth;
pub mod console;
pub mod destinations;
pub mod discovery;
pub mod health;
pub mod identity;
pub mod limits;
pub mod tls;

/// The proxies' API as an axum router.
pub fn proxies(discovery: discovery::Service, identity: identity::Service) -> axum::Router {
    tonic::service::Routes::new(discovery.server()).add_service(identity.server()).prepare().into_axum_router()
}
