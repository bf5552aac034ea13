//! The gRPC contract `weft.v1`, generated from `proto/weft.proto`.
// Messages are moved a few times in their life: the size of an enum is no matter.
#![allow(missing_docs, clippy::pedantic, clippy::large_enum_variant, unreachable_pub)]

tonic::include_proto!("weft.v1");
