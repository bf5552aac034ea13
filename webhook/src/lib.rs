//! The injection webhook as a library: which pods get the sidecar ([`decide`]), what is done to them ([`inject`],
//! [`uninject`]), the same for manifests ([`offline`]), and the whole as an axum router ([`server`]). And the
//! validation of policies ([`validate`]), at admission and offline. It knows neither proxies nor discovery, and reads namespaces only
//! through [`Namespaces`], the rest of the cluster only through [`validate::Surroundings`].
//!
//! A pod is never denied because something is unclear: only a mistake in a mesh annotation, or a name that the sidecar
//! needs, refuses it, with a message that says what to change.

mod collide;
mod decide;
mod edit;
mod facts;
pub mod offline;
pub mod options;
mod overlay;
mod patch;
mod probes;
pub mod review;
mod scrape;
pub mod server;
mod settings;
pub mod sidecar;
mod status;
pub mod validate;
pub mod workload;
pub mod yaml;

pub use decide::{Decision, Origin, Reason, Step, Verdict, decide, decide_from};
pub use facts::{BoxFuture, ClusterFacts, FixedNamespaces, LookupError, NamespaceFacts, Namespaces, OtherInjectors};
pub use options::Refusal;
pub use patch::{Context, Injection, inject, uninject};
pub use settings::{
    Backend, ExtensionProvider, GrpcAuthorizer, HttpAuthorizer, InitSettings, LogFormat, MeshSettings, NativeSidecars,
    Normalization, PathNormalization, ProxySettings, PullPolicy, RequestBody, Resources, Settings, SettingsError,
    TrafficSettings, TrustBundle,
};
