//! Tests of the control plane against a small API server in this process.

mod admission;
mod agreement;
mod authority;
mod common;
mod console;
mod discovery;
mod election;
mod identity;
mod keepers;
mod lookup;
mod policies;
mod process;
mod rotation;
mod source;
