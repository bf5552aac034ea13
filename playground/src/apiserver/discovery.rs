//! What tells clients which resources there are: `/api`, `/apis`, `/version`, and OpenAPI documents that say no more than which
//! kinds exist (every object is taken as it comes).

use super::resource::{Registry, ResourceInfo};
use serde_json::{Map, Value, json};
use std::sync::Arc;

fn verbs(info: &ResourceInfo) -> Value {
    if info.create_only {
        json!(["create"])
    } else {
        json!(["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"])
    }
}

fn subresources(info: &ResourceInfo, version: &str) -> Vec<(String, String, &'static str, Value)> {
    let mut out = Vec::new();
    let v = info.version(version).cloned().unwrap_or_default();
    let own = info.api_version(version);
    if v.status {
        out.push(("status".to_owned(), info.kind.clone(), "", json!(["get", "patch", "update"])));
    }
    if v.scale.is_some() {
        out.push(("scale".to_owned(), "Scale".to_owned(), "autoscaling/v1", json!(["get", "patch", "update"])));
    }
    for sub in &info.subresources {
        let (kind, gv, verbs) = match *sub {
            "exec" => ("PodExecOptions", "v1", json!(["create", "get"])),
            "attach" => ("PodAttachOptions", "v1", json!(["create", "get"])),
            "portforward" => ("PodPortForwardOptions", "v1", json!(["create", "get"])),
            "log" => ("Pod", "v1", json!(["get"])),
            "binding" => ("Binding", "v1", json!(["create"])),
            "eviction" => ("Eviction", "policy/v1", json!(["create"])),
            "token" => ("TokenRequest", "authentication.k8s.io/v1", json!(["create"])),
            _ => (info.kind.as_str(), "", json!(["get", "patch", "update"])),
        };
        out.push(((*sub).to_owned(), kind.to_owned(), if gv == own { "" } else { gv }, verbs));
    }
    out
}

/// `APIResourceList` of a group and version.
pub(super) fn resources(all: &[Arc<ResourceInfo>], group: &str, version: &str) -> Value {
    let mut list = Vec::new();
    for info in all.iter().filter(|r| r.version(version).is_some()) {
        let mut entry = json!({"name": info.key.resource, "singularName": info.singular, "namespaced": info.namespaced, "kind": info.kind, "verbs": verbs(info)});
        if !info.short.is_empty() {
            entry["shortNames"] = json!(info.short);
        }
        if !info.categories.is_empty() {
            entry["categories"] = json!(info.categories);
        }
        list.push(entry);
        for (sub, kind, gv, verbs) in subresources(info, version) {
            let mut entry = json!({"name": format!("{}/{sub}", info.key.resource), "singularName": "", "namespaced": info.namespaced, "kind": kind, "verbs": verbs});
            if let Some((g, v)) = gv.split_once('/') {
                entry["group"] = json!(g);
                entry["version"] = json!(v);
            }
            list.push(entry);
        }
    }
    let gv = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": gv, "resources": list})
}

/// `APIGroup`.
pub(super) fn group(name: &str, all: &[Arc<ResourceInfo>]) -> Value {
    let versions: Vec<Value> =
        Registry::group_versions(all).iter().map(|v| json!({"groupVersion": format!("{name}/{v}"), "version": v})).collect();
    json!({"kind": "APIGroup", "apiVersion": "v1", "name": name, "versions": versions, "preferredVersion": versions.first()})
}

/// `APIGroupList`.
pub(super) fn groups(registry: &Registry) -> Value {
    let all: Vec<Value> = registry.by_group().iter().filter(|(g, _)| !g.is_empty()).map(|(g, r)| group(g, r)).collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": all})
}

/// `APIVersions` of the core group.
pub(super) fn core_versions() -> Value {
    json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []})
}

/// Aggregated discovery (v2): everything of `/api` or `/apis` in one document.
pub(super) fn aggregated(registry: &Registry, core: bool) -> Value {
    let items: Vec<Value> = registry
        .by_group()
        .iter()
        .filter(|(g, _)| g.is_empty() == core)
        .map(|(name, all)| {
            let versions: Vec<Value> = Registry::group_versions(all)
                .iter()
                .map(|version| {
                    let list: Vec<Value> = all
                        .iter()
                        .filter(|r| r.version(version).is_some())
                        .map(|info| {
                            let subs: Vec<Value> = subresources(info, version)
                                .into_iter()
                                .map(|(sub, kind, gv, verbs)| {
                                    let (g, v) = gv.split_once('/').unwrap_or(("", ""));
                                    json!({"subresource": sub, "responseKind": {"group": g, "version": v, "kind": kind}, "verbs": verbs})
                                })
                                .collect();
                            json!({"resource": info.key.resource, "responseKind": {"group": name, "version": version, "kind": info.kind},
                                "scope": if info.namespaced { "Namespaced" } else { "Cluster" }, "singularResource": info.singular, "verbs": verbs(info),
                                "shortNames": info.short, "categories": info.categories, "subresources": subs})
                        })
                        .collect();
                    json!({"version": version, "resources": list, "freshness": "Current"})
                })
                .collect();
            json!({"metadata": {"name": if name.is_empty() { Value::Null } else { json!(name) }, "creationTimestamp": null}, "versions": versions})
        })
        .collect();
    json!({"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items})
}

/// `/version`.
pub(super) fn version() -> Value {
    json!({"major": "1", "minor": "33", "gitVersion": "v1.33.0-weft-playground", "gitCommit": "", "gitTreeState": "clean", "buildDate": "2025-04-23T00:00:00Z",
        "goVersion": "", "compiler": "rustc", "platform": "linux/amd64"})
}

fn definition(group: &str, version: &str, kind: &str) -> Value {
    json!({"type": "object", "description": format!("{kind}, as it comes: the playground checks no fields."), "x-kubernetes-preserve-unknown-fields": true,
        "x-kubernetes-group-version-kind": [{"group": group, "version": version, "kind": kind}],
        "properties": {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}})
}

/// `/openapi/v2`.
pub(super) fn openapi_v2(registry: &Registry) -> Value {
    let mut definitions = Map::new();
    for (group, all) in registry.by_group() {
        for info in all {
            for (version, v) in &info.versions {
                let mut d = definition(&group, version, &info.kind);
                if let Some(schema) = &v.schema
                    && let Some(properties) = schema["properties"].as_object()
                {
                    for (key, value) in
                        properties.iter().filter(|(k, _)| !matches!(k.as_str(), "apiVersion" | "kind" | "metadata"))
                    {
                        d["properties"][key] = value.clone();
                    }
                }
                definitions.insert(format!("{}.{version}.{}", if group.is_empty() { "core" } else { &group }, info.kind), d);
            }
        }
    }
    json!({"swagger": "2.0", "info": {"title": "Weft playground", "version": "v1.33.0"}, "paths": {}, "definitions": definitions})
}

/// `/openapi/v3`: the index.
pub(super) fn openapi_v3_index(registry: &Registry) -> Value {
    let mut paths = Map::new();
    for (group, all) in registry.by_group() {
        for version in Registry::group_versions(&all) {
            let path = if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") };
            paths.insert(path.clone(), json!({"serverRelativeURL": format!("/openapi/v3/{path}?hash=1")}));
        }
    }
    json!({ "paths": paths })
}

/// `/openapi/v3/…` of one group and version.
pub(super) fn openapi_v3(registry: &Registry, group: &str, version: &str) -> Value {
    let mut schemas = Map::new();
    let mut paths = Map::new();
    let base = if group.is_empty() { format!("/api/{version}") } else { format!("/apis/{group}/{version}") };
    for info in registry.by_group().get(group).into_iter().flatten() {
        if let Some(v) = info.version(version) {
            let mut d = definition(group, version, &info.kind);
            if let Some(schema) = &v.schema {
                for (key, value) in schema["properties"]
                    .as_object()
                    .into_iter()
                    .flatten()
                    .filter(|(k, _)| !matches!(k.as_str(), "apiVersion" | "kind" | "metadata"))
                {
                    d["properties"][key] = value.clone();
                }
            }
            schemas.insert(format!("{}.{version}.{}", if group.is_empty() { "core" } else { group }, info.kind), d);
            let gvk = json!({"group": group, "version": version, "kind": info.kind});
            let parameters = json!(
                ["dryRun", "fieldManager", "fieldValidation"]
                    .map(|n| json!({"name": n, "in": "query", "schema": {"type": "string"}}))
            );
            let scope = if info.namespaced { "namespaces/{namespace}/" } else { "" };
            paths.insert(format!("{base}/{scope}{}", info.key.resource), json!({"post": {"x-kubernetes-action": "post", "x-kubernetes-group-version-kind": gvk, "parameters": parameters, "responses": {}}}));
            paths.insert(format!("{base}/{scope}{}/{{name}}", info.key.resource), json!({"patch": {"x-kubernetes-action": "patch", "x-kubernetes-group-version-kind": gvk, "parameters": parameters, "responses": {}}}));
        }
    }
    json!({"openapi": "3.0.0", "info": {"title": "Weft playground", "version": "v1.33.0"}, "paths": paths, "components": {"schemas": schemas}})
}
