//! What the proxy has learnt at run time, for `/config`. No secret is in it: keys never leave [`crate::tls`].

use crate::directory::Directory;
use crate::tls::identity::Holder;
use serde_json::{Value, json};

/// The certificate in force, and why there is no newer one.
pub(super) fn certificate(holder: Option<&Holder>) -> Value {
    let Some(state) = holder.map(Holder::state) else { return Value::Null };
    json!({
        "identity": state.identity,
        "notBefore": state.not_before,
        "notAfter": state.not_after,
        "issuer": state.issuer,
        "serial": state.serial,
        "error": state.error,
    })
}

/// What is known of each destination; null where there was no answer yet.
pub(super) fn destinations(directory: &Directory) -> Value {
    let all = directory.list().into_iter().map(|(address, known)| {
        let known = known.map(|destination| {
            let endpoints: Vec<Value> = destination
                .endpoints
                .iter()
                .map(|e| json!({"address": e.address, "identities": e.identities, "pod": e.pod}))
                .collect();
            json!({
                "service": destination.service.as_ref().map(|service| service.host.as_str()),
                "protocol": destination.protocol,
                "direct": destination.direct,
                "endpoints": endpoints,
            })
        });
        (address.to_string(), known.unwrap_or(Value::Null))
    });
    Value::Object(all.collect())
}
