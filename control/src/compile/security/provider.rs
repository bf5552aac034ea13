//! What the mesh settings say about policy, in the neutral model.

use super::text::{matching, stars};
use crate::compile::Mesh;
use std::time::Duration;
use weft_api::istio::parse_duration;
use weft_api::wire::external_authorizer::Protocol;
use weft_api::wire::string_match::Kind;
use weft_api::wire::{self, StringMatch};
use weft_webhook::{ExtensionProvider, Normalization};

/// How long an authorizer may take where the settings don't say, as in Istio.
const TIMEOUT: Duration = Duration::from_secs(600);
/// What a client is told when none answers and nothing is said of it.
const STATUS_ON_ERROR: u32 = 403;

/// How paths are made canonical.
pub fn path_normalization(mesh: &Mesh) -> wire::PathNormalization {
    match mesh.policy.path_normalization.normalization {
        Normalization::Default | Normalization::Base => wire::PathNormalization::Base,
        Normalization::None => wire::PathNormalization::None,
        Normalization::MergeSlashes => wire::PathNormalization::MergeSlashes,
        Normalization::DecodeAndMergeSlashes => wire::PathNormalization::DecodeAndMergeSlashes,
    }
}

/// The authorizer of a name. `None`: there is none, or it is of a kind that can't be asked; what a policy matches is then refused.
pub fn authorizer(name: &str, mesh: &Mesh) -> Option<wire::ExternalAuthorizer> {
    let provider = mesh.policy.extension_providers.iter().find(|p| p.name == name)?;
    of(provider)
}

fn of(provider: &ExtensionProvider) -> Option<wire::ExternalAuthorizer> {
    let (service, port, timeout, fail_open, status, body, protocol) =
        match (&provider.envoy_ext_authz_http, &provider.envoy_ext_authz_grpc) {
            (Some(http), _) => {
                let include = http.include_headers_in_check.iter().map(|h| matching(Kind::Exact(h.to_ascii_lowercase())));
                let protocol = Protocol::Http(wire::HttpAuthorizer {
                    path_prefix: http.path_prefix.clone(),
                    include_request_headers: headers(&http.include_request_headers_in_check).chain(include).collect(),
                    additional_headers: http.include_additional_headers_in_check.clone().into_iter().collect(),
                    headers_to_upstream_on_allow: headers(&http.headers_to_upstream_on_allow).collect(),
                    headers_to_downstream_on_deny: headers(&http.headers_to_downstream_on_deny).collect(),
                    headers_to_downstream_on_allow: headers(&http.headers_to_downstream_on_allow).collect(),
                });
                let body = http.include_request_body_in_check;
                (&http.service, http.port, &http.timeout, http.fail_open, &http.status_on_error, body, protocol)
            }
            (None, Some(grpc)) => {
                let body = grpc.include_request_body_in_check;
                let protocol = Protocol::Grpc(wire::GrpcAuthorizer {});
                (&grpc.service, grpc.port, &grpc.timeout, grpc.fail_open, &grpc.status_on_error, body, protocol)
            }
            (None, None) => return None,
        };
    let host = service.split_once('/').map_or(service.as_str(), |(_, host)| host);
    let body = body.unwrap_or_default();
    let timeout = timeout.as_deref().and_then(parse_duration).unwrap_or(TIMEOUT);
    Some(wire::ExternalAuthorizer {
        name: provider.name.clone(),
        address: format!("{host}:{port}"),
        protocol: Some(protocol),
        timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX).max(1),
        fail_open,
        status_on_error: status.as_deref().and_then(|s| s.parse().ok()).unwrap_or(STATUS_ON_ERROR),
        max_body_bytes: body.max_request_bytes,
        allow_partial_body: body.allow_partial_message,
        pack_as_bytes: body.pack_as_bytes,
    })
}

fn headers(patterns: &[String]) -> impl Iterator<Item = StringMatch> {
    patterns.iter().map(|pattern| stars(&pattern.to_ascii_lowercase()))
}
