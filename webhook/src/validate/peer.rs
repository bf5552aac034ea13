//! `PeerAuthentication`.

use super::shared;
use super::walk::{At, Findings, get, members, object, quoted, word};
use serde_json::Value;

const MODES: [&str; 4] = ["UNSET", "DISABLE", "PERMISSIVE", "STRICT"];

pub(super) fn check(found: &mut Findings, at: &At<'_>, spec: &Value) {
    let Some(spec) = members(found, at, spec, &["selector", "mtls", "portLevelMtls"]) else { return };
    let selects = shared::selector(found, at, spec);
    if let Some(value) = get(spec, "mtls") {
        mode(found, &at.member("mtls"), value);
    }
    let Some(value) = get(spec, "portLevelMtls") else { return };
    let at = at.member("portLevelMtls");
    let Some(ports) = object(found, &at, value) else { return };
    if ports.is_empty() {
        found.error(&at, "must have at least one port: leave the field out if there is none");
    } else if !selects {
        found.error(&at, "is allowed only with a selector that has labels: ports are those of certain pods");
    }
    for (port, value) in ports {
        let at = at.member(port);
        let number = port.bytes().all(|b| b.is_ascii_digit()) && !port.starts_with('0');
        if !number || !port.parse::<u32>().is_ok_and(|p| (1..=65535).contains(&p)) {
            found.error(
                &at,
                format!("{} is not a port: a number from 1 to 65535 is expected (the pod's, not the Service's)", quoted(port)),
            );
        }
        if !value.is_null() {
            mode(found, &at, value);
        }
    }
}

fn mode(found: &mut Findings, at: &At<'_>, value: &Value) {
    if let Some(mtls) = members(found, at, value, &["mode"]) {
        word(found, at, mtls, "mode", &MODES);
    }
}
