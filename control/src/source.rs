//! Where objects come from: a cluster ([`kube`]) or a folder of manifests ([`files`]). Both do the same thing, feed the
//! [`crate::index::Index`], and nothing behind the index knows which of them did.

pub mod files;
pub mod kube;
pub mod wire;
