//! Rewrites the kubelet's probes and HTTP lifecycle hooks: they go to the proxy's admin port, and the proxy performs the
//! original inside the pod. So they work whatever the mesh demands of other callers.
//!
//! `httpGet`, `tcpSocket` and `grpc` are rewritten, `exec` runs in the container and is left alone. A named port is resolved
//! with the container's own ports, as the kubelet does; one that can't be resolved stays as it is, with a warning, since
//! the kubelet fails it too. What was there before is kept for `weft uninject`.

use serde_json::{Map, Value, json};
use weft_api::names::ADMIN_PORT;
use weft_api::probe::{Grpc, HttpGet, HttpHeader, Probe, Probes, TcpSocket};

/// Field of a container → last part of the path.
const PROBES: [(&str, &str); 3] = [("livenessProbe", "livez"), ("readinessProbe", "readyz"), ("startupProbe", "startupz")];
/// Field of `lifecycle` → last part of the path.
const HOOKS: [(&str, &str); 2] = [("postStart", "poststartz"), ("preStop", "prestopz")];
/// The handlers that are rewritten.
const HANDLERS: [&str; 3] = ["httpGet", "tcpSocket", "grpc"];

/// What rewriting one container's probes brought.
#[derive(Debug, Default)]
pub(crate) struct Rewritten {
    /// For the proxy: path → original probe.
    pub probes: Probes,
    /// For `weft uninject`: `<container>/<field>` → the handler as it was, for example `{"httpGet": {…}}`.
    pub originals: Map<String, Value>,
    /// What could not be rewritten.
    pub warnings: Vec<String>,
}

/// Rewrites the probes of a container in place. Running it again changes nothing.
pub(crate) fn rewrite(container: &mut Value, out: &mut Rewritten) {
    let Some(name) = container.get("name").and_then(Value::as_str).map(str::to_owned) else { return };
    let ports = container.get("ports").cloned().unwrap_or(Value::Null);
    for (field, last) in PROBES {
        let path = format!("/app-health/{name}/{last}");
        if let Some(probe) = container.get_mut(field) {
            rewrite_one(probe, &name, field, &path, &ports, out);
        }
    }
    for (hook, last) in HOOKS {
        let path = format!("/app-lifecycle/{name}/{last}");
        if let Some(handler) = container.get_mut("lifecycle").and_then(|l| l.get_mut(hook)) {
            rewrite_one(handler, &name, hook, &path, &ports, out);
        }
    }
}

fn rewrite_one(holder: &mut Value, container: &str, field: &str, path: &str, ports: &Value, out: &mut Rewritten) {
    let Some(object) = holder.as_object_mut() else { return };
    let Some(kind) = HANDLERS.into_iter().find(|k| object.get(*k).is_some_and(|v| !v.is_null())) else { return };
    if is_ours(&object[kind], path) {
        return;
    }
    match probe_of(kind, &object[kind], object.get("timeoutSeconds"), ports) {
        Ok(probe) => {
            out.probes.insert(path.to_owned(), probe);
        }
        Err(problem) => {
            out.warnings
                .push(format!("container {container}: {field}.{kind}: {problem}; it is not rewritten and may fail in the mesh"));
            return;
        }
    }
    let ours = json!({"path": path, "port": ADMIN_PORT, "scheme": "HTTP"});
    if let Some(original) = object.remove(kind) {
        out.originals.insert(format!("{container}/{field}"), json!({ kind: original }));
    }
    object.insert("httpGet".into(), ours);
}

fn is_ours(handler: &Value, path: &str) -> bool {
    handler.get("path").and_then(Value::as_str) == Some(path)
        && handler.get("port").and_then(Value::as_u64) == Some(ADMIN_PORT.into())
}

fn probe_of(kind: &str, handler: &Value, timeout: Option<&Value>, ports: &Value) -> Result<Probe, String> {
    let text = |field: &str| handler.get(field).and_then(Value::as_str).unwrap_or_default().to_owned();
    let port = port_of(handler.get("port").unwrap_or(&Value::Null), ports)?;
    let timeout_seconds = timeout.and_then(Value::as_u64).and_then(|t| u32::try_from(t).ok()).filter(|t| *t > 0).unwrap_or(1);
    let mut probe = Probe { timeout_seconds, ..Probe::default() };
    match kind {
        "httpGet" => {
            let headers = handler.get("httpHeaders").and_then(Value::as_array).into_iter().flatten();
            let field = |h: &Value, f: &str| h.get(f).and_then(Value::as_str).unwrap_or_default().to_owned();
            probe.http_get = Some(HttpGet {
                path: text("path"),
                port,
                scheme: text("scheme"),
                host: text("host"),
                http_headers: headers.map(|h| HttpHeader { name: field(h, "name"), value: field(h, "value") }).collect(),
            });
        }
        "tcpSocket" => probe.tcp_socket = Some(TcpSocket { port, host: text("host") }),
        _ => probe.grpc = Some(Grpc { port, service: text("service") }),
    }
    Ok(probe)
}

/// A port as the kubelet reads it: a number, the name of one of the container's ports, or a number in a string.
fn port_of(port: &Value, ports: &Value) -> Result<u16, String> {
    let number = |n: u64| u16::try_from(n).ok().filter(|n| *n > 0);
    match port {
        Value::Number(n) => n.as_u64().and_then(number).ok_or_else(|| format!("port {n} is no port")),
        Value::String(name) => named(ports, name)
            .or_else(|| name.parse().ok().and_then(number))
            .ok_or_else(|| format!("port {name:?} is the name of none of the container's ports")),
        _ => Err("it has no port".into()),
    }
}

fn named(ports: &Value, name: &str) -> Option<u16> {
    ports
        .as_array()?
        .iter()
        .find(|p| p.get("name").and_then(Value::as_str) == Some(name))?
        .get("containerPort")?
        .as_u64()?
        .try_into()
        .ok()
}

/// The number of the port with this name in any container of a pod.
pub(crate) fn any_port_named(pod: &Value, name: &str) -> Option<u16> {
    ["/spec/containers", "/spec/initContainers"]
        .into_iter()
        .filter_map(|p| pod.pointer(p)?.as_array())
        .flatten()
        .find_map(|c| named(c.get("ports")?, name))
}

/// Puts a container's handlers back as they were.
pub(crate) fn restore(container: &mut Value, originals: &Map<String, Value>) {
    let Some(name) = container.get("name").and_then(Value::as_str).map(str::to_owned) else { return };
    let put = |holder: Option<&mut Value>, field: &str| {
        let (Some(Value::Object(holder)), Some(Value::Object(original))) = (holder, originals.get(&format!("{name}/{field}")))
        else {
            return;
        };
        holder.remove("httpGet");
        holder.extend(original.clone());
    };
    for (field, _) in PROBES {
        put(container.get_mut(field), field);
    }
    for (hook, _) in HOOKS {
        put(container.get_mut("lifecycle").and_then(|l| l.get_mut(hook)), hook);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container() -> Value {
        json!({
            "name": "app",
            "ports": [{"name": "web", "containerPort": 8080}],
            "livenessProbe": {"httpGet": {"path": "/live?x=1", "port": "web", "scheme": "HTTPS",
                "httpHeaders": [{"name": "Host", "value": "a"}]}, "timeoutSeconds": 3, "periodSeconds": 7},
            "readinessProbe": {"tcpSocket": {"port": 8080}},
            "startupProbe": {"grpc": {"port": 9000, "service": "s"}},
            "lifecycle": {"preStop": {"httpGet": {"path": "/bye", "port": "8080"}}, "postStart": {"exec": {"command": ["true"]}}}
        })
    }

    #[test]
    fn every_handler_goes_to_the_proxy_and_keeps_its_timing() {
        let (mut c, mut out) = (container(), Rewritten::default());
        rewrite(&mut c, &mut out);
        assert_eq!(
            c["livenessProbe"],
            json!({"timeoutSeconds": 3, "periodSeconds": 7,
            "httpGet": {"path": "/app-health/app/livez", "port": 15020, "scheme": "HTTP"}})
        );
        assert_eq!(c["readinessProbe"]["httpGet"]["path"], "/app-health/app/readyz");
        assert!(c["readinessProbe"].get("tcpSocket").is_none());
        assert_eq!(c["lifecycle"]["preStop"]["httpGet"]["path"], "/app-lifecycle/app/prestopz");
        assert_eq!(c["lifecycle"]["postStart"], json!({"exec": {"command": ["true"]}}));
        let live = &out.probes["/app-health/app/livez"];
        assert_eq!(live.timeout_seconds, 3);
        let get = live.http_get.as_ref().unwrap();
        assert_eq!((get.port, get.path.as_str(), get.scheme.as_str()), (8080, "/live?x=1", "HTTPS"));
        assert_eq!(get.http_headers[0].name, "Host");
        assert_eq!(out.probes["/app-health/app/startupz"].grpc, Some(Grpc { port: 9000, service: "s".into() }));
        assert_eq!(out.probes["/app-lifecycle/app/prestopz"].http_get.as_ref().unwrap().port, 8080);
        assert!(out.warnings.is_empty());
    }

    #[test]
    fn twice_is_once_and_back_is_the_same() {
        let (mut c, mut out) = (container(), Rewritten::default());
        rewrite(&mut c, &mut out);
        let once = c.clone();
        let mut again = Rewritten::default();
        rewrite(&mut c, &mut again);
        assert_eq!(c, once);
        assert!(again.probes.is_empty() && again.originals.is_empty());
        restore(&mut c, &out.originals);
        assert_eq!(c, container());
    }

    #[test]
    fn a_port_that_nobody_knows_is_left_alone_and_said() {
        let mut c =
            json!({"name": "a", "readinessProbe": {"httpGet": {"port": "nope"}}, "livenessProbe": {"tcpSocket": {"port": 0}}});
        let (before, mut out) = (c.clone(), Rewritten::default());
        rewrite(&mut c, &mut out);
        assert_eq!(c, before);
        assert_eq!(out.warnings.len(), 2);
        assert!(out.warnings.iter().any(|w| w.contains("readinessProbe.httpGet") && w.contains("nope")), "{:?}", out.warnings);
    }
}
