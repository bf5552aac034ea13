//! The certificate authority: what signs, what is trusted, and the control plane's own serving certificate.
//!
//! - [`issue`]: makes and reads certificates. [`signer`]: signs workloads' and the serving certificate. Both pure but for randomness and
//!   the clock that they are given.
//! - [`state`]: which roots are trusted and what signs, and how that goes on: a rotation is its steps. Pure.
//! - [`user`]: a user's own authority, read and tried.
//! - [`store`]: where all that is kept: Secrets of the control namespace, or a folder. Replicas that start together agree,
//!   because only one of them can create the Secret; the others read what it wrote.
//! - [`keeper`]: keeps the authority in force: follows the Secrets, and takes the steps where it leads. [`serving`]: the same for the
//!   serving certificate.
//! - [`authority`]: what is in force, as everybody else sees it. [`resolver`]: hands rustls the serving certificate in force. A renewal
//!   swaps a pointer; connections that exist and handshakes that are under way go on with the old one, which stays valid for a third of its
//!   life.
//!
//! A root lives long and has no name constraint, which rustls refuses for URIs. It never signs for names that somebody else chose: every
//! certificate is built from our own parameters.

pub mod authority;
pub mod issue;
pub mod keeper;
pub mod resolver;
pub mod serving;
pub mod signer;
pub mod state;
pub mod store;
pub mod user;
