//! The data plane of Weft: a transparent forwarder that a pod's traffic is redirected to.
//!
//! The life of a connection, which the modules tell in this order: `listen` accepts it and asks the kernel where it was
//! going, `inbound` or `outbound` decide what to do with it, `detect` tells the protocol from the first bytes (or
//! from the server's silence), and [`http`] or `tcp` carry it to its end, closing one record that [`telemetry`] turns
//! into metrics.
//!
//! Everything on that path is single-threaded: each [`worker`] is a thread with its own runtime, its own listening
//! sockets (`SO_REUSEPORT`) and its own connections; what the workers share is read at the start
//! of a connection and never locked while one is served.

pub mod conn;
pub mod drain;
pub mod http;
pub mod io;
pub mod settings;
pub mod telemetry;
pub mod upstream;
pub mod worker;
