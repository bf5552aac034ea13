//! Compiles the gRPC contract without a system `protoc`.

/// Fields that hold the number of an enumeration, with the function of `wire` that writes its name into JSON.
const ENUMERATIONS: [(&str, &str); 6] = [
    ("weft.v1.Inbound.mtls", "mtls_mode"),
    ("weft.v1.Inbound.path_normalization", "path_normalization"),
    ("weft.v1.PortMtls.mode", "mtls_mode"),
    ("weft.v1.AuthorizationPolicy.action", "authorization_action"),
    ("weft.v1.Condition.attribute", "attribute"),
    ("weft.v1.InboundPort.protocol", "protocol"),
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/weft.proto");
    let files = protox::compile(["proto/weft.proto"], ["proto"])?;
    // For people to read (the console shows what a proxy was sent), never to be read back.
    let mut build = tonic_prost_build::configure().type_attribute(".", "#[derive(serde::Serialize)]");
    for (field, function) in ENUMERATIONS {
        build = build.field_attribute(field, format!("#[serde(serialize_with = \"crate::wire::json::{function}\")]"));
    }
    build.compile_fds(files)?;
    Ok(())
}
