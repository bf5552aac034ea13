//! Which program an image stands for, and as whom it runs. Pure.

use serde_json::Value;

use crate::json::{flag, list, text};

/// What the playground knows about an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Image {
    /// Entry point.
    pub entrypoint: Vec<&'static str>,
    /// User and group of an unprivileged image.
    pub user: u32,
}

/// Looks an image up by the last segment of its name, without tag and digest.
pub(crate) fn known(reference: &str) -> Option<Image> {
    let name = reference.split('@').next().unwrap_or_default();
    let last = name.rsplit('/').next().unwrap_or_default();
    let (entrypoint, user) = match last.split(':').next().unwrap_or_default() {
        "weft-proxy" => (vec!["weft-proxy"], 1337),
        "weft-control" => (vec!["weft-control"], 65532),
        "weft-sample" => (vec!["weft-sample"], 65532),
        "go-app" => (vec!["weft-sample", "go-app"], 65532),
        "frontend" => (vec!["weft-sample", "frontend"], 65532),
        "echo" => (vec!["weft-sample", "echo"], 65532),
        "client" => (vec!["weft-sample", "client"], 65532),
        _ => return None,
    };
    Some(Image { entrypoint, user })
}

/// The names of Linux capabilities by number.
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// What containerd grants by default.
const DEFAULT: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// As whom a container runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Bounding set, bit n is capability n.
    pub capabilities: u64,
    /// `allowPrivilegeEscalation: false`.
    pub no_new_privileges: bool,
    /// `privileged: true`.
    pub privileged: bool,
    /// `readOnlyRootFilesystem: true`.
    pub read_only_root: bool,
}

fn bits(names: &[Value]) -> u64 {
    names.iter().filter_map(Value::as_str).fold(0, |set, name| {
        let name = name.to_uppercase();
        let name = name.strip_prefix("CAP_").unwrap_or(&name).to_owned();
        if name == "ALL" {
            return u64::MAX;
        }
        set | CAPABILITIES.iter().position(|c| *c == name).map_or(0, |n| 1 << n)
    })
}

/// Reads the pod's and the container's `securityContext`.
///
/// # Errors
/// The image runs as root although the pod forbids it.
pub(crate) fn identity(pod: &Value, container: &Value, image: &Image) -> Result<Identity, String> {
    let (outer, own) = (&pod["spec"]["securityContext"], &container["securityContext"]);
    let id =
        |key: &str| own.get(key).and_then(Value::as_u64).or_else(|| outer.get(key).and_then(Value::as_u64)).map(|n| n as u32);
    let user = id("runAsUser");
    let uid = user.unwrap_or(image.user);
    // A user that the image doesn't know has the group 0.
    let gid = id("runAsGroup").unwrap_or(if uid == image.user { image.user } else { 0 });
    if uid == 0 && (flag(own, "/runAsNonRoot") || own.get("runAsNonRoot").is_none() && flag(outer, "/runAsNonRoot")) {
        return Err("container has runAsNonRoot and image will run as root".to_owned());
    }
    let mut groups: Vec<u32> = list(outer, "/supplementalGroups").iter().filter_map(|g| Some(g.as_u64()? as u32)).collect();
    groups.extend(outer.get("fsGroup").and_then(Value::as_u64).map(|g| g as u32));
    let privileged = flag(own, "/privileged");
    let default =
        DEFAULT.iter().filter_map(|name| CAPABILITIES.iter().position(|c| c == name)).fold(0, |set, n| set | 1_u64 << n);
    let (add, drop) = (bits(list(own, "/capabilities/add")), bits(list(own, "/capabilities/drop")));
    // As container runtimes do it: ALL first, single names after, so that "drop ALL, add X" leaves X.
    let base = if add == u64::MAX { u64::MAX } else { default };
    let capabilities = match (privileged, drop) {
        (true, _) => u64::MAX,
        (false, u64::MAX) => {
            if add == u64::MAX {
                u64::MAX
            } else {
                add
            }
        }
        (false, _) => (base | add) & !drop,
    };
    Ok(Identity {
        uid,
        gid,
        groups,
        capabilities,
        no_new_privileges: own.get("allowPrivilegeEscalation") == Some(&Value::Bool(false)),
        privileged,
        read_only_root: flag(own, "/readOnlyRootFilesystem"),
    })
}

/// The program and its arguments, before `$(VAR)` is expanded.
pub(crate) fn argv(container: &Value, image: &Image) -> Vec<String> {
    let strings =
        |pointer: &str| list(container, pointer).iter().filter_map(|v| v.as_str().map(str::to_owned)).collect::<Vec<_>>();
    let mut argv = strings("/command");
    if argv.is_empty() {
        argv = image.entrypoint.iter().map(|s| (*s).to_owned()).collect();
    }
    argv.extend(strings("/args"));
    argv
}

/// Where a container's working directory is.
pub(crate) fn working_dir(container: &Value) -> String {
    match text(container, "/workingDir") {
        "" => "/".to_owned(),
        dir => dir.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn images_are_known_by_their_last_segment() {
        for (reference, program) in [
            ("ghcr.io/weft-mesh/weft-proxy:0.1.0", Some("weft-proxy")),
            ("localhost:5000/a/echo@sha256:00", Some("weft-sample")),
            ("weft-control", Some("weft-control")),
            ("docker.io/library/nginx:1", None),
            ("echo/other", None),
        ] {
            assert_eq!(known(reference).map(|i| i.entrypoint[0]), program, "{reference}");
        }
    }

    #[test]
    fn capabilities_are_added_and_dropped_as_runtimes_do() {
        let image = known("weft-proxy").unwrap();
        let caps = |context: Value| identity(&json!({}), &json!({"securityContext": context}), &image).unwrap().capabilities;
        let (admin, raw) = (1 << 12, 1 << 13);
        assert_eq!(caps(json!({"capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"]}})), admin | raw);
        assert_eq!(caps(json!({"capabilities": {"drop": ["NET_RAW"]}})) & raw, 0);
        assert_eq!(caps(json!({"capabilities": {"add": ["CAP_NET_ADMIN"]}})) & (admin | raw), admin | raw);
        assert_eq!(caps(json!({})).count_ones(), 14);
        assert_eq!(caps(json!({"privileged": true})), u64::MAX);
    }

    #[test]
    fn the_container_overrides_the_pod_and_root_can_be_forbidden() {
        let image = known("echo").unwrap();
        let pod = json!({"spec": {"securityContext": {"runAsUser": 5, "runAsGroup": 6, "fsGroup": 7, "runAsNonRoot": true}}});
        let got = identity(&pod, &json!({"securityContext": {"runAsUser": 8}}), &image).unwrap();
        assert_eq!((got.uid, got.gid, got.groups), (8, 6, vec![7]));
        assert!(identity(&pod, &json!({"securityContext": {"runAsUser": 0}}), &image).is_err());
        assert!(identity(&pod, &json!({"securityContext": {"runAsUser": 0, "runAsNonRoot": false}}), &image).is_ok());
    }
}
