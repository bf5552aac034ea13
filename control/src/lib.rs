//! The control plane: watches Kubernetes (or a folder of manifests), serves the injection webhook, tells proxies their
//! configuration, and keeps certificates, caBundle and trust bundles right. `docs/control.md` describes it for operators.
//!
//! How it hangs together, in the order in which to read it: [`run`] puts the parts together and takes them apart again;
//! [`source`] feeds [`index`], which holds [`model`] objects as snapshots; [`compile`] turns a snapshot into what a proxy is
//! told; [`serve`] answers proxies and probes; [`reports`] keeps what proxies report, and [`ask`] answers people's questions
//! about it; [`admission`] puts the webhook on the index; [`ca`] and [`keep`] write to the cluster what the mesh needs there,
//! on the replica that [`lease`] elects.
//!
//! It never ends because of something that may pass: an API server that is away, a broken settings file, a refused
//! write are said, counted and tried again, while what is known stays in force.

pub mod admission;
pub mod ask;
pub mod ca;
pub mod compile;
pub mod events;
pub mod flags;
pub mod index;
pub mod jwks;
pub mod keep;
pub mod lease;
pub mod logging;
pub mod metrics;
pub mod model;
pub mod reports;
pub mod run;
pub mod serve;
pub mod settings;
pub mod source;
