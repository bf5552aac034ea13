//! Certificates and tokens: a CA of the playground's own, the serving certificate, an administrator's token, and service
//! account tokens (JWTs with the claims of the real ones, signed by HMAC: only this server ever verifies them).

use super::status::Status;
use anyhow::Context as _;
use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as B64;
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use std::time::{SystemTime, UNIX_EPOCH};

/// Who makes a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Name, such as `system:serviceaccount:default:default`.
    pub name: String,
    /// uid of the service account.
    pub uid: String,
    /// Groups.
    pub groups: Vec<String>,
    /// Pod name and uid of a bound token.
    pub pod: Option<(String, String)>,
}

impl User {
    /// Somebody of the playground itself, or its administrator: may do everything.
    pub fn system(name: &str) -> Self {
        Self {
            name: name.into(),
            uid: String::new(),
            groups: vec!["system:masters".into(), "system:authenticated".into()],
            pod: None,
        }
    }

    /// As `userInfo` of reviews.
    pub fn to_json(&self) -> Value {
        let mut user = json!({"username": self.name, "groups": self.groups});
        if !self.uid.is_empty() {
            user["uid"] = json!(self.uid);
        }
        if let Some((name, uid)) = &self.pod {
            user["extra"] =
                json!({"authentication.kubernetes.io/pod-name": [name], "authentication.kubernetes.io/pod-uid": [uid]});
        }
        user
    }
}

/// See the module.
pub struct Authority {
    ca_pem: String,
    issuer: Issuer<'static, KeyPair>,
    admin: String,
    key: hmac::Key,
}

/// The audience of tokens that are for this server.
pub const API_AUDIENCE: &str = "https://kubernetes.default.svc.cluster.local";

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

impl Authority {
    /// A new CA and new keys.
    pub fn new() -> anyhow::Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "weft-playground-ca");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        let pair = KeyPair::generate()?;
        let ca_pem = params.self_signed(&pair)?.pem();
        let secret: [u8; 32] = rand::random();
        let admin: [u8; 24] = rand::random();
        Ok(Self {
            ca_pem,
            issuer: Issuer::new(params, pair),
            admin: B64.encode(admin),
            key: hmac::Key::new(hmac::HMAC_SHA256, &secret),
        })
    }

    /// The CA, PEM.
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// A serving configuration for these names and addresses.
    pub fn serving(&self, sans: Vec<String>) -> anyhow::Result<rustls::ServerConfig> {
        let mut params = CertificateParams::new(sans)?;
        params.distinguished_name.push(DnType::CommonName, "kube-apiserver");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let pair = KeyPair::generate()?;
        let cert = params.signed_by(&pair, &self.issuer)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pair.serialize_der()));
        let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![CertificateDer::from(cert.der().to_vec())], key)
            .context("serving certificate")?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }

    /// A kubeconfig of the administrator.
    pub fn kubeconfig(&self, server: &str) -> String {
        let ca = base64::engine::general_purpose::STANDARD.encode(&self.ca_pem);
        format!(
            "apiVersion: v1\nkind: Config\nclusters:\n- name: weft-playground\n  cluster:\n    server: {server}\n    certificate-authority-data: {ca}\n\
             users:\n- name: admin\n  user:\n    token: {}\ncontexts:\n- name: weft-playground\n  context:\n    cluster: weft-playground\n    user: admin\n\
             current-context: weft-playground\n",
            self.admin
        )
    }

    /// Signs claims.
    fn sign(&self, claims: &Value) -> String {
        let head = B64.encode(json!({"alg": "HS256", "typ": "JWT"}).to_string());
        let body = B64.encode(claims.to_string());
        let tag = hmac::sign(&self.key, format!("{head}.{body}").as_bytes());
        format!("{head}.{body}.{}", B64.encode(tag.as_ref()))
    }

    /// A service account token, and when it expires (seconds since 1970).
    pub fn token(
        &self,
        ns: &str,
        account: (&str, &str),
        audiences: &[String],
        seconds: u64,
        pod: Option<(&str, &str)>,
    ) -> (String, u64) {
        let iat = now();
        let exp = iat + seconds;
        let mut own = json!({"namespace": ns, "serviceaccount": {"name": account.0, "uid": account.1}});
        if let Some((name, uid)) = pod {
            own["pod"] = json!({"name": name, "uid": uid});
        }
        let audiences = if audiences.is_empty() { vec![API_AUDIENCE.to_owned()] } else { audiences.to_vec() };
        let claims = json!({
            "iss": API_AUDIENCE, "sub": format!("system:serviceaccount:{ns}:{}", account.0), "aud": audiences,
            "iat": iat, "nbf": iat, "exp": exp, "kubernetes.io": own
        });
        (self.sign(&claims), exp)
    }

    /// Who a token speaks for, and its audiences.
    pub fn verify(&self, token: &str) -> Result<(User, Vec<String>), String> {
        if token == self.admin {
            return Ok((User::system("kubernetes-admin"), vec![API_AUDIENCE.to_owned()]));
        }
        let mut parts = token.rsplitn(2, '.');
        let (tag, signed) = (parts.next().unwrap_or_default(), parts.next().ok_or("not a token")?);
        let tag = B64.decode(tag).map_err(|_| "not a token")?;
        hmac::verify(&self.key, signed.as_bytes(), &tag).map_err(|_| "the signature is wrong")?;
        let body = signed.split_once('.').map(|(_, b)| b).ok_or("not a token")?;
        let claims: Value = serde_json::from_slice(&B64.decode(body).map_err(|_| "not a token")?).map_err(|_| "not a token")?;
        if claims["exp"].as_u64().unwrap_or(0) <= now() {
            return Err("the token has expired".into());
        }
        let text = |p: &str| claims.pointer(p).and_then(Value::as_str).unwrap_or_default().to_owned();
        let ns = text("/kubernetes.io/namespace");
        let pod =
            claims.pointer("/kubernetes.io/pod/name").map(|_| (text("/kubernetes.io/pod/name"), text("/kubernetes.io/pod/uid")));
        let audiences = claims["aud"].as_array().into_iter().flatten().filter_map(|a| a.as_str().map(str::to_owned)).collect();
        let user = User {
            name: text("/sub"),
            uid: text("/kubernetes.io/serviceaccount/uid"),
            groups: vec!["system:serviceaccounts".into(), format!("system:serviceaccounts:{ns}"), "system:authenticated".into()],
            pod,
        };
        Ok((user, audiences))
    }

    /// The user of an `Authorization` header.
    pub fn user(&self, header: Option<&str>) -> Result<User, Status> {
        let unauthorized = || Status::new(401, "Unauthorized", "Unauthorized");
        let token = header.and_then(|h| h.strip_prefix("Bearer ")).ok_or_else(unauthorized)?;
        match self.verify(token.trim()) {
            Ok((user, audiences)) if audiences.iter().any(|a| a == API_AUDIENCE) => Ok(user),
            _ => Err(unauthorized()),
        }
    }

    /// The status of a TokenReview.
    pub fn review(&self, spec: &Value) -> Value {
        let wanted: Vec<&str> = spec["audiences"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        match self.verify(spec["token"].as_str().unwrap_or_default()) {
            Err(error) => json!({"authenticated": false, "user": {}, "error": error}),
            Ok((user, audiences)) => {
                let own = audiences.iter().any(|a| a == API_AUDIENCE);
                let common: Vec<&str> = wanted.iter().copied().filter(|w| audiences.iter().any(|a| a == w)).collect();
                if common.is_empty() && !(wanted.is_empty() && own) {
                    return json!({"authenticated": false, "user": {}, "error": "token audiences are invalid for the target audiences"});
                }
                json!({"authenticated": true, "user": user.to_json(), "audiences": common})
            }
        }
    }
}
