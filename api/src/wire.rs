//! The gRPC contract `weft.v1`, generated from `proto/weft.proto`.
// Messages are moved a few times in their life: the size of an enum is no matter.
#![allow(missing_docs, clippy::pedantic, clippy::large_enum_variant, unreachable_pub)]

tonic::include_proto!("weft.v1");

/// Enumerations in JSON: by name, and a number that this version doesn't know as the number.
mod json {
    macro_rules! named {
        ($($function:ident: $kind:ty),*) => {$(
            pub(super) fn $function<S: serde::Serializer>(value: &i32, serializer: S) -> Result<S::Ok, S::Error> {
                match <$kind>::try_from(*value) {
                    Ok(known) => serializer.serialize_str(known.as_str_name()),
                    Err(_) => serializer.serialize_i32(*value),
                }
            }
        )*};
    }
    named! {
        mtls_mode: super::MtlsMode,
        path_normalization: super::PathNormalization,
        authorization_action: super::AuthorizationAction,
        attribute: super::condition::Attribute,
        protocol: super::Protocol
    }
}
