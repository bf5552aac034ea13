//! A one-machine cluster for trying and testing Weft: a test double, never a production path.

pub mod apiserver;
