//! `security.istio.io`: `PeerAuthentication`, `AuthorizationPolicy`, `RequestAuthentication`, with all fields of Istio 1.32.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{DRY_RUN_ANNOTATION, Object, Paths, PolicyTargetReference, Spec, Unknown, WorkloadSelector};

/// The API group.
pub const GROUP: &str = "security.istio.io";
/// Versions that are served; the first is the stored one.
pub const VERSIONS: &[&str] = &["v1", "v1beta1"];

/// Which mutual TLS a proxy asks of those who call its pod.
pub type PeerAuthentication = Object<PeerAuthenticationSpec>;
/// Who may do what.
pub type AuthorizationPolicy = Object<AuthorizationPolicySpec>;
/// Which end users' tokens are believed.
pub type RequestAuthentication = Object<RequestAuthenticationSpec>;

/// See [`PeerAuthentication`].
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PeerAuthenticationSpec {
    /// Pods; none means all of the namespace, or of the mesh in the root namespace.
    pub selector: Option<WorkloadSelector>,
    /// The mode; absent is the same as [`MtlsMode::Unset`].
    pub mtls: Option<MutualTls>,
    /// Modes of single ports of the pod; only with a selector.
    pub port_level_mtls: BTreeMap<u32, MutualTls>,
    /// Members that nobody knows.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// A mode of mutual TLS.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MutualTls {
    /// The mode.
    pub mode: MtlsMode,
    /// Members that nobody knows.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// See [`MutualTls`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum MtlsMode {
    /// As the next wider scope says; PERMISSIVE if none says anything.
    #[default]
    Unset,
    /// No mutual TLS: what comes is the app's.
    Disable,
    /// Mutual TLS and plaintext.
    Permissive,
    /// Mutual TLS only.
    Strict,
}

impl MtlsMode {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unset => "UNSET",
            Self::Disable => "DISABLE",
            Self::Permissive => "PERMISSIVE",
            Self::Strict => "STRICT",
        }
    }
}

impl PeerAuthenticationSpec {
    /// The mode, [`MtlsMode::Unset`] if there is none.
    pub fn mode(&self) -> MtlsMode {
        self.mtls.as_ref().map_or(MtlsMode::Unset, |m| m.mode)
    }
}

impl Spec for PeerAuthenticationSpec {
    const GROUP: &'static str = GROUP;
    const VERSIONS: &'static [&'static str] = VERSIONS;
    const KIND: &'static str = "PeerAuthentication";
    const PLURAL: &'static str = "peerauthentications";

    fn unknown_fields(&self) -> Vec<String> {
        let mut paths = Paths::default();
        if let Some(selector) = &self.selector {
            paths.add("spec.selector", &selector.unknown);
        }
        if let Some(mtls) = &self.mtls {
            paths.add("spec.mtls", &mtls.unknown);
        }
        for (port, mtls) in &self.port_level_mtls {
            paths.add(&format!("spec.portLevelMtls.{port}"), &mtls.unknown);
        }
        paths.add("spec", &self.unknown);
        paths.0
    }
}

/// See [`AuthorizationPolicy`].
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AuthorizationPolicySpec {
    /// Pods; none means all of the namespace, or of the mesh in the root namespace.
    pub selector: Option<WorkloadSelector>,
    /// Attached to one thing other than pods.
    pub target_ref: Option<PolicyTargetReference>,
    /// Attached to things other than pods.
    pub target_refs: Vec<PolicyTargetReference>,
    /// A request matches if any of the rules does; with none, no request matches.
    pub rules: Vec<Rule>,
    /// What happens to a request that matches.
    pub action: Action,
    /// With [`Action::Custom`]: who decides.
    pub provider: Option<ExtensionProvider>,
    /// Members that nobody knows.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// What an `AuthorizationPolicy` does with a request that matches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Action {
    /// Lets it pass; and what no ALLOW policy of the pod lets pass is denied.
    #[default]
    Allow,
    /// Denies it.
    Deny,
    /// Marks it for the audit log.
    Audit,
    /// Asks an external authorizer.
    Custom,
}

impl Action {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "ALLOW",
            Self::Deny => "DENY",
            Self::Audit => "AUDIT",
            Self::Custom => "CUSTOM",
        }
    }
}

/// An external authorizer of the mesh settings.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ExtensionProvider {
    /// Its name in the mesh settings.
    pub name: String,
    /// Members that nobody knows.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// Matches a request that matches one of `from`, one of `to` and all of `when`; an empty list matches anything.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Rule {
    /// Who calls.
    pub from: Vec<From>,
    /// What is called.
    pub to: Vec<To>,
    /// Further conditions.
    pub when: Vec<Condition>,
    /// Members that nobody knows.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// Wraps a [`Source`].
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct From {
    /// The source; absent is a mistake that admission refuses.
    pub source: Option<Source>,
    /// Members that nobody knows.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// Wraps an [`Operation`].
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct To {
    /// The operation; absent is a mistake that admission refuses.
    pub operation: Option<Operation>,
    /// Members that nobody knows.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// Who calls: all fields that are not empty must match, each by any of its values (`not…`: by none).
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs)] // The names say it; the semantics are those of the type.
pub struct Source {
    pub principals: Vec<String>,
    pub not_principals: Vec<String>,
    pub request_principals: Vec<String>,
    pub not_request_principals: Vec<String>,
    pub namespaces: Vec<String>,
    pub not_namespaces: Vec<String>,
    pub service_accounts: Vec<String>,
    pub not_service_accounts: Vec<String>,
    pub ip_blocks: Vec<String>,
    pub not_ip_blocks: Vec<String>,
    pub remote_ip_blocks: Vec<String>,
    pub not_remote_ip_blocks: Vec<String>,
    pub trust_domains: Vec<String>,
    pub not_trust_domains: Vec<String>,
    /// Members that nobody knows.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// What is called: all fields that are not empty must match, each by any of its values (`not…`: by none).
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs)] // The names say it; the semantics are those of the type.
pub struct Operation {
    pub hosts: Vec<String>,
    pub not_hosts: Vec<String>,
    pub ports: Vec<String>,
    pub not_ports: Vec<String>,
    pub methods: Vec<String>,
    pub not_methods: Vec<String>,
    pub paths: Vec<String>,
    pub not_paths: Vec<String>,
    /// Members that nobody knows.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// One attribute of a request, such as `request.headers[x-tenant]`, and what it must or must not be.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Condition {
    /// The attribute.
    pub key: String,
    /// One of these must match, if there are any.
    pub values: Vec<String>,
    /// None of these may match.
    pub not_values: Vec<String>,
    /// Members that nobody knows.
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl AuthorizationPolicy {
    /// Whether it is evaluated and reported but not enforced. As in Istio, what can't be read as true enforces.
    pub fn dry_run(&self) -> bool {
        self.metadata.annotations.get(DRY_RUN_ANNOTATION).and_then(|v| parse_bool(v)).unwrap_or(false)
    }
}

/// Reads a boolean as Go does in annotations: `1`, `t`, `T`, `TRUE`, `true`, `True` and their counterparts.
pub fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Some(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Some(false),
        _ => None,
    }
}

fn target_paths(paths: &mut Paths, one: Option<&PolicyTargetReference>, many: &[PolicyTargetReference]) {
    if let Some(target) = one {
        paths.add("spec.targetRef", &target.unknown);
    }
    for (i, target) in many.iter().enumerate() {
        paths.add(&format!("spec.targetRefs[{i}]"), &target.unknown);
    }
}

impl Spec for AuthorizationPolicySpec {
    const GROUP: &'static str = GROUP;
    const VERSIONS: &'static [&'static str] = VERSIONS;
    const KIND: &'static str = "AuthorizationPolicy";
    const PLURAL: &'static str = "authorizationpolicies";

    fn unknown_fields(&self) -> Vec<String> {
        let mut paths = Paths::default();
        if let Some(selector) = &self.selector {
            paths.add("spec.selector", &selector.unknown);
        }
        target_paths(&mut paths, self.target_ref.as_ref(), &self.target_refs);
        if let Some(provider) = &self.provider {
            paths.add("spec.provider", &provider.unknown);
        }
        for (i, rule) in self.rules.iter().enumerate() {
            let at = format!("spec.rules[{i}]");
            for (j, from) in rule.from.iter().enumerate() {
                if let Some(source) = &from.source {
                    paths.add(&format!("{at}.from[{j}].source"), &source.unknown);
                }
                paths.add(&format!("{at}.from[{j}]"), &from.unknown);
            }
            for (j, to) in rule.to.iter().enumerate() {
                if let Some(operation) = &to.operation {
                    paths.add(&format!("{at}.to[{j}].operation"), &operation.unknown);
                }
                paths.add(&format!("{at}.to[{j}]"), &to.unknown);
            }
            for (j, condition) in rule.when.iter().enumerate() {
                paths.add(&format!("{at}.when[{j}]"), &condition.unknown);
            }
            paths.add(&at, &rule.unknown);
        }
        paths.add("spec", &self.unknown);
        paths.0
    }
}

/// See [`RequestAuthentication`].
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RequestAuthenticationSpec {
    /// Pods; none means all of the namespace, or of the mesh in the root namespace.
    pub selector: Option<WorkloadSelector>,
    /// Attached to one thing other than pods.
    pub target_ref: Option<PolicyTargetReference>,
    /// Attached to things other than pods.
    pub target_refs: Vec<PolicyTargetReference>,
    /// Issuers that are believed.
    pub jwt_rules: Vec<JwtRule>,
    /// Members that nobody knows.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// How tokens of one issuer are found and checked.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct JwtRule {
    /// Must equal the token's `iss`.
    pub issuer: String,
    /// One must be among the token's `aud`; with none, the audience is not looked at.
    pub audiences: Vec<String>,
    /// Where the issuer's keys are fetched from. With neither this nor `jwks`: found by OpenID discovery at the issuer.
    #[serde(alias = "jwks_uri")]
    pub jwks_uri: String,
    /// The issuer's keys themselves, as JSON in a string.
    pub jwks: String,
    /// Headers in which tokens are looked for.
    pub from_headers: Vec<JwtHeader>,
    /// Query parameters in which tokens are looked for.
    pub from_params: Vec<String>,
    /// Cookies in which tokens are looked for.
    pub from_cookies: Vec<String>,
    /// Header in which the app gets the payload (base64url), if not empty.
    pub output_payload_to_header: String,
    /// Whether the app sees the token itself.
    pub forward_original_token: bool,
    /// Claims that the app gets as headers.
    pub output_claim_to_headers: Vec<ClaimToHeader>,
    /// How long fetching keys may take, as Go writes durations; default 5 s. See [`super::parse_duration`].
    pub timeout: Option<String>,
    /// Claims, besides `scope` and `permission`, whose string is a list separated by spaces.
    pub space_delimited_claims: Vec<String>,
    /// Members that nobody knows.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// Where in the headers a token is.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct JwtHeader {
    /// Name of the header.
    pub name: String,
    /// What precedes the token, such as `Bearer `.
    pub prefix: String,
    /// Members that nobody knows.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// A claim that the app gets as a header.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClaimToHeader {
    /// Name of the header.
    pub header: String,
    /// The claim; `a.b` is the member `b` of the claim `a`.
    pub claim: String,
    /// Members that nobody knows.
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl Spec for RequestAuthenticationSpec {
    const GROUP: &'static str = GROUP;
    const VERSIONS: &'static [&'static str] = VERSIONS;
    const KIND: &'static str = "RequestAuthentication";
    const PLURAL: &'static str = "requestauthentications";

    fn unknown_fields(&self) -> Vec<String> {
        let mut paths = Paths::default();
        if let Some(selector) = &self.selector {
            paths.add("spec.selector", &selector.unknown);
        }
        target_paths(&mut paths, self.target_ref.as_ref(), &self.target_refs);
        for (i, rule) in self.jwt_rules.iter().enumerate() {
            let at = format!("spec.jwtRules[{i}]");
            for (j, header) in rule.from_headers.iter().enumerate() {
                paths.add(&format!("{at}.fromHeaders[{j}]"), &header.unknown);
            }
            for (j, claim) in rule.output_claim_to_headers.iter().enumerate() {
                paths.add(&format!("{at}.outputClaimToHeaders[{j}]"), &claim.unknown);
            }
            paths.add(&at, &rule.unknown);
        }
        paths.add("spec", &self.unknown);
        paths.0
    }
}
