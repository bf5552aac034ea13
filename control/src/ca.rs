//! The control plane's own certificate authority and serving certificate.
//!
//! - [`issue`]: makes and reads certificates. Pure but for randomness and the clock that it is given.
//! - [`store`]: where they are kept: two Secrets of the control namespace, or a folder. Replicas that start together agree,
//!   because only one of them can create the Secret; the others read what it wrote.
//! - [`resolver`]: hands rustls the certificate in force. A rotation swaps a pointer; connections that exist and handshakes
//!   that are under way go on with the old one, which stays valid for a third of its life.
//! - [`keeper`]: keeps the certificate in force: follows the Secret, renews what has lived two thirds of its life.
//!
//! The root lives long and has no name constraint: the same root signs the proxies' workload certificates. It never signs
//! for names that somebody else chose: every certificate is built from our own parameters.

pub mod authority;
pub mod issue;
pub mod keeper;
pub mod resolver;
pub mod signer;
pub mod state;
pub mod store;
