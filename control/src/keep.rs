//! What the leading replica keeps right in the cluster: [`ca_bundle`] in our webhook configurations, [`trust_bundle`] in the
//! namespaces of meshed pods, the status of [`policies`], and the report of [`missed`] pods.

pub mod ca_bundle;
pub mod missed;
pub mod policies;
pub mod trust_bundle;

/// The roots (PEM, one after the other) that the mesh trusts, as they are in force.
pub type Bundle = tokio::sync::watch::Receiver<std::sync::Arc<str>>;
