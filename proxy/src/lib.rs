//! The data plane of Weft: a transparent forwarder that a pod's traffic is redirected to.
//!
//! The life of a connection, which the modules tell in this order: [`listen`] accepts it, [`connection`] asks the kernel
//! where it was going and decides what to do with it, [`detect`] tells the protocol from the first bytes (or
//! from the server's speaking first), and [`http`] or [`tcp`] carry it to its end, closing one record that [`telemetry`] turns
//! into metrics.
//!
//! Everything on that path is single-threaded: each [`worker`] is a thread with its own runtime, its own listening
//! sockets (`SO_REUSEPORT`) and its own connections; what the workers share is read at the start
//! of a connection and never locked while one is served. The process around them is [`run`]: signals, the [`admin`]
//! server and the [`discovery`] client have a thread of their own, so that they never disturb a request.

pub mod admin;
pub mod authz;
pub mod balance;
pub mod conn;
pub mod connection;
pub mod control;
pub mod detect;
pub mod directory;
pub mod discovery;
pub mod dns;
pub mod drain;
pub mod http;
pub mod inbound;
pub mod io;
pub mod listen;
pub mod log;
pub mod report;
pub mod run;
pub mod settings;
pub mod sys;
pub mod tcp;
pub mod telemetry;
pub mod tls;
pub mod upstream;
pub mod worker;
