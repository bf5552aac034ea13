//! The gRPC contract `weft.v1`, generated from `proto/weft.proto`.
#![allow(missing_docs, clippy::pedantic, unreachable_pub)]

tonic::include_proto!("weft.v1");
