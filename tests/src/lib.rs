//! What the end-to-end tests and the demo share: a cluster ([`Cluster`]: the playground, or whatever `KUBECONFIG` names) and
//! the guide's story told on it ([`story`]).

pub mod cluster;
pub mod metrics;
pub mod story;

pub use cluster::Cluster;
