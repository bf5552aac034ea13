//! Settings of the whole mesh: what holds for identity and policy. Where Istio's MeshConfig has the same setting, it has the same name
//! and the same form here, so that it can be copied over.

use super::SettingsError;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// Settings of the whole mesh.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct MeshSettings {
    /// Namespace whose policies hold for the whole mesh; empty: the control plane's.
    pub root_namespace: String,
    /// How paths are made canonical before policies see them.
    pub path_normalization: PathNormalization,
    /// Trust domains whose identities count as those of the mesh's own.
    pub trust_domain_aliases: Vec<String>,
    /// Who may be asked by `CUSTOM` authorization policies.
    pub extension_providers: Vec<ExtensionProvider>,
    /// Proxies (addresses or CIDRs) in front of the mesh whose `x-forwarded-for` and `x-forwarded-client-cert` are believed.
    pub trusted_hops: Vec<String>,
    /// Certificates (PEM) that are trusted, beside the system's, where keys of token issuers are fetched over HTTPS.
    pub jwks_ca_certificates: String,
}

/// See [`MeshSettings::path_normalization`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PathNormalization {
    /// The kind.
    pub normalization: Normalization,
}

/// See [`PathNormalization`]. Each does what the one before it does, and more; `NONE` does nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Normalization {
    /// [`Normalization::Base`].
    #[default]
    Default,
    /// Paths stay as they are.
    None,
    /// RFC 3986: dot segments, unreserved characters decoded; `\` is `/`.
    Base,
    /// `//` is `/` too.
    MergeSlashes,
    /// `%2f` and `%5c` are decoded before.
    DecodeAndMergeSlashes,
}

/// Somebody outside whom the mesh may ask. Kinds other than the two for authorization are passed over.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ExtensionProvider {
    /// What policies call it.
    pub name: String,
    /// It is asked over HTTP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub envoy_ext_authz_http: Option<HttpAuthorizer>,
    /// It is asked over gRPC (`envoy.service.auth.v3.Authorization`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub envoy_ext_authz_grpc: Option<GrpcAuthorizer>,
    /// Other kinds.
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

/// See [`ExtensionProvider::envoy_ext_authz_http`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct HttpAuthorizer {
    /// `[namespace/]host`.
    pub service: String,
    /// Its port.
    pub port: u16,
    /// How long an answer may take, such as `0.5s`; 600 s if absent, as in Istio.
    pub timeout: Option<String>,
    /// Put before the path of the request that is asked about.
    pub path_prefix: String,
    /// Let requests through when no answer comes.
    pub fail_open: bool,
    /// Status of the answer to the client when no answer comes and `failOpen` is off, such as `"503"`; 403 if absent.
    pub status_on_error: Option<String>,
    /// Headers of the request that are sent along (exact, `prefix*`, `*suffix`).
    pub include_request_headers_in_check: Vec<String>,
    /// The older name of the same; exact names only.
    pub include_headers_in_check: Vec<String>,
    /// Headers that are added to what is asked.
    pub include_additional_headers_in_check: BTreeMap<String, String>,
    /// Whether the body is sent along.
    pub include_request_body_in_check: Option<RequestBody>,
    /// Headers of the answer that the app gets.
    pub headers_to_upstream_on_allow: Vec<String>,
    /// Headers of the answer that the client gets with a refusal.
    pub headers_to_downstream_on_deny: Vec<String>,
    /// Headers of the answer that the client gets otherwise.
    pub headers_to_downstream_on_allow: Vec<String>,
}

/// See [`ExtensionProvider::envoy_ext_authz_grpc`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct GrpcAuthorizer {
    /// `[namespace/]host`.
    pub service: String,
    /// Its port.
    pub port: u16,
    /// How long an answer may take; 600 s if absent.
    pub timeout: Option<String>,
    /// Let requests through when no answer comes.
    pub fail_open: bool,
    /// See [`HttpAuthorizer::status_on_error`].
    pub status_on_error: Option<String>,
    /// Whether the body is sent along.
    pub include_request_body_in_check: Option<RequestBody>,
    /// Taken for Istio's sake; routes are not cached.
    pub clear_route_cache: bool,
}

/// How much of a request's body is sent along.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RequestBody {
    /// Most bytes; 0 is none.
    pub max_request_bytes: u32,
    /// A longer body is cut and sent; otherwise its request is refused.
    pub allow_partial_message: bool,
    /// gRPC: as bytes, not as text.
    pub pack_as_bytes: bool,
}

impl MeshSettings {
    /// Checks the values that the types alone leave open.
    pub(super) fn check(&self) -> Result<(), SettingsError> {
        let wrong = |key: &str, message: String| Err(SettingsError(format!("mesh.{key}: {message}")));
        if let Some(alias) = self.trust_domain_aliases.iter().find(|a| a.is_empty() || a.contains('/')) {
            return wrong("trustDomainAliases", format!("{alias:?} is no trust domain, for example old.example.com"));
        }
        for hop in &self.trusted_hops {
            if hop.parse::<IpNet>().is_err() && hop.parse::<std::net::IpAddr>().is_err() {
                return wrong("trustedHops", format!("{hop:?} is no address or CIDR, for example 10.0.0.0/8"));
            }
        }
        let mut names = std::collections::BTreeSet::new();
        for (i, provider) in self.extension_providers.iter().enumerate() {
            let at = format!("extensionProviders[{i}]");
            if provider.name.is_empty() {
                return wrong(&at, "has no name".into());
            }
            if !names.insert(provider.name.as_str()) {
                return wrong(&at, format!("the name {:?} is taken by another one", provider.name));
            }
            provider.check(&at)?;
        }
        Ok(())
    }
}

impl ExtensionProvider {
    fn check(&self, at: &str) -> Result<(), SettingsError> {
        let (kind, service, port, timeout, status) = match (&self.envoy_ext_authz_http, &self.envoy_ext_authz_grpc) {
            (Some(_), Some(_)) => return Err(SettingsError(format!("mesh.{at}: is HTTP and gRPC at once; choose one"))),
            (Some(http), None) => ("envoyExtAuthzHttp", &http.service, http.port, &http.timeout, &http.status_on_error),
            (None, Some(grpc)) => ("envoyExtAuthzGrpc", &grpc.service, grpc.port, &grpc.timeout, &grpc.status_on_error),
            (None, None) => return Ok(()),
        };
        let wrong = |key: &str, message: String| Err(SettingsError(format!("mesh.{at}.{kind}.{key}: {message}")));
        if service.is_empty() || service.matches('/').count() > 1 || service.contains(char::is_whitespace) {
            return wrong("service", format!("{service:?} is no [namespace/]host, for example authz.default.svc.cluster.local"));
        }
        if port == 0 {
            return wrong("port", "must be between 1 and 65535".into());
        }
        if let Some(text) = timeout
            && weft_api::istio::parse_duration(text).is_none_or(|d| d.is_zero())
        {
            return wrong("timeout", format!("{text:?} is no duration, for example 0.5s"));
        }
        if let Some(text) = status
            && text.parse::<u16>().ok().is_none_or(|status| !(200..600).contains(&status))
        {
            return wrong("statusOnError", format!("{text:?} is no HTTP status, for example \"503\""));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::Settings;

    const ISTIO: &str = "
mesh:
  rootNamespace: istio-system
  pathNormalization: {normalization: DECODE_AND_MERGE_SLASHES}
  trustDomainAliases: [old.example.com]
  trustedHops: [10.0.0.0/8, '::1']
  extensionProviders:
  - name: zipkin
    zipkin: {service: zipkin.istio-system.svc.cluster.local, port: 9411}
  - name: oauth
    envoyExtAuthzHttp:
      service: oauth/oauth2-proxy.example.com
      port: 4180
      timeout: 1.5s
      statusOnError: '503'
      includeRequestHeadersInCheck: [authorization, cookie, 'x-ext-*']
      includeAdditionalHeadersInCheck: {x-from: mesh}
      includeRequestBodyInCheck: {maxRequestBytes: 1024, allowPartialMessage: true}
      headersToUpstreamOnAllow: [x-auth-request-email]
      headersToDownstreamOnDeny: [set-cookie]
  - name: opa
    envoyExtAuthzGrpc: {service: opa.opa.svc.cluster.local, port: 9191, failOpen: true, clearRouteCache: true}
";

    #[test]
    fn istios_forms_are_read_and_written() {
        let settings = Settings::from_yaml(ISTIO).unwrap();
        assert_eq!(settings.mesh.extension_providers.len(), 3);
        assert!(settings.mesh.extension_providers[0].other.contains_key("zipkin"));
        let again = Settings::from_yaml(&serde_json::to_string(&settings).unwrap()).unwrap();
        assert_eq!(again, settings);
    }

    #[test]
    fn mistakes_name_their_key() {
        for (text, key) in [
            ("mesh: {rootNamspace: x}", "rootNamspace"),
            ("mesh: {trustedHops: [here]}", "mesh.trustedHops"),
            ("mesh: {trustDomainAliases: ['a/b']}", "mesh.trustDomainAliases"),
            ("mesh: {pathNormalization: {normalization: SOME}}", "SOME"),
            ("mesh: {extensionProviders: [{}]}", "mesh.extensionProviders[0]"),
            ("mesh: {extensionProviders: [{name: a}, {name: a}]}", "mesh.extensionProviders[1]"),
            ("mesh: {extensionProviders: [{name: a, envoyExtAuthzHttp: {service: s}}]}", "envoyExtAuthzHttp.port"),
            ("mesh: {extensionProviders: [{name: a, envoyExtAuthzGrpc: {port: 1}}]}", "envoyExtAuthzGrpc.service"),
            ("mesh: {extensionProviders: [{name: a, envoyExtAuthzGrpc: {service: s, port: 1, timeout: soon}}]}", "timeout"),
            (
                "mesh: {extensionProviders: [{name: a, envoyExtAuthzGrpc: {service: s, port: 1, statusOnError: '99'}}]}",
                "statusOnError",
            ),
            ("mesh: {extensionProviders: [{name: a, envoyExtAuthzHttp: {service: s, port: 1, pathprefix: x}}]}", "pathprefix"),
        ] {
            let error = Settings::from_yaml(text).unwrap_err().to_string();
            assert!(error.contains(key), "{text}: {error}");
        }
    }
}
