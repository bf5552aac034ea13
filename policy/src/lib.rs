//! Pure decisions on the neutral model of [`weft_api::wire`]: no I/O, no clock, no sockets. The proxy enforces what is decided here,
//! and `weft why` and `weft policy preview` ask the very same code.
//!
//! - [`path`] brings a request's path into the one form that policies see and the app gets.
//! - [`jwt`] proves tokens.
//! - [`authz`] compiles policies once and gives verdicts without allocation.
//! - [`route`] finds a request's way, and says what happens to it on that way.
//! - [`explain`] gives the same verdicts with every rule's reason in words.
//!
//! What can't be understood never allows: a policy with a part that this version can't read denies what it might have denied.

pub mod authz;
pub mod explain;
pub mod jwt;
pub mod path;
pub mod route;
