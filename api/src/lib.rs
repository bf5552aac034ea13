//! The shared vocabulary of Weft: names and numbers ([`names`]), the annotations of pods and namespaces
//! ([`annotations`]), what a pod's proxy is told through its environment ([`env`], [`probe`]), and the gRPC contract
//! between the control plane and the proxies ([`wire`]); behind the feature `crd` also the types of the custom resources
//! that people write (`istio`). It does no I/O and knows no Kubernetes client.

pub mod annotations;
pub mod console;
pub mod env;
#[cfg(feature = "crd")]
pub mod istio;
pub mod names;
pub mod probe;
pub mod wire;
