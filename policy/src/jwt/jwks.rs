//! Key sets (RFC 7517) and signatures (RFC 7518, RFC 8037). Which algorithms a key may check follows from its type, its curve and its `alg`.

use super::{Refusal, base64url};
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ECDSA_P521_SHA512_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256,
    RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512, RSA_PSS_2048_8192_SHA256, RSA_PSS_2048_8192_SHA384,
    RSA_PSS_2048_8192_SHA512, RsaPublicKeyComponents, UnparsedPublicKey,
};
use serde_json::{Map, Value};

/// Keys of a set that are looked at; a set with more is refused.
const MAX_KEYS: usize = 100;
/// RSA keys with a longer modulus are not used: checking costs too much.
const MAX_MODULUS_BYTES: usize = 1024;

/// What a token can be signed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Algorithm {
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Ps384,
    Ps512,
    Es256,
    Es384,
    Es512,
    EdDsa,
}

const NAMES: [(&str, Algorithm); 10] = [
    ("RS256", Algorithm::Rs256),
    ("RS384", Algorithm::Rs384),
    ("RS512", Algorithm::Rs512),
    ("PS256", Algorithm::Ps256),
    ("PS384", Algorithm::Ps384),
    ("PS512", Algorithm::Ps512),
    ("ES256", Algorithm::Es256),
    ("ES384", Algorithm::Es384),
    ("ES512", Algorithm::Es512),
    ("EdDSA", Algorithm::EdDsa),
];

impl Algorithm {
    pub(super) fn by_name(name: &str) -> Option<Self> {
        NAMES.iter().find(|(known, _)| *known == name).map(|(_, algorithm)| *algorithm)
    }
}

#[derive(Debug)]
enum Material {
    Rsa(RsaPublicKeyComponents<Vec<u8>>),
    /// Uncompressed point.
    P256(Vec<u8>),
    P384(Vec<u8>),
    P521(Vec<u8>),
    Ed25519(Vec<u8>),
}

#[derive(Debug)]
struct Key {
    id: Option<String>,
    /// If the key is for one only.
    algorithm: Option<Algorithm>,
    material: Material,
}

/// The usable keys of a set.
#[derive(Debug)]
pub(super) struct Jwks {
    keys: Vec<Key>,
}

impl Jwks {
    /// Reads a set. Keys of other kinds or for other uses are left out; an error says why none is left.
    pub(super) fn parse(json: &str) -> Result<Self, String> {
        let set: Value = serde_json::from_str(json).map_err(|error| format!("Jwks is an invalid JSON ({error})"))?;
        let Some(Value::Array(list)) = set.get("keys") else {
            return Err("Jwks does not have [keys], a list".into());
        };
        if list.len() > MAX_KEYS {
            return Err(format!("Jwks has {} keys, more than {MAX_KEYS}", list.len()));
        }
        let mut problem = String::from("it is empty");
        let mut keys = Vec::new();
        for (n, key) in list.iter().enumerate() {
            match key.as_object().ok_or_else(|| "it is no object".to_owned()).and_then(read) {
                Ok(key) => keys.push(key),
                Err(why) => problem = format!("keys[{n}]: {why}"),
            }
        }
        if keys.is_empty() { Err(format!("Jwks doesn't have any valid public key ({problem})")) } else { Ok(Self { keys }) }
    }

    /// Whether any key that the token may mean has made the signature.
    pub(super) fn verify(&self, id: Option<&str>, algorithm: Algorithm, signed: &[u8], signature: &[u8]) -> Result<(), Refusal> {
        let mut refusal = Refusal::NoSuchKey;
        for key in &self.keys {
            let other_id = id.zip(key.id.as_deref()).is_some_and(|(wanted, has)| wanted != has);
            if other_id || key.algorithm.is_some_and(|only| only != algorithm) {
                continue;
            }
            match key.material.verify(algorithm, signed, signature) {
                Some(true) => return Ok(()),
                Some(false) => refusal = Refusal::Signature,
                None => {}
            }
        }
        Err(refusal)
    }
}

impl Material {
    /// `None`: the algorithm is not one for this key.
    fn verify(&self, algorithm: Algorithm, signed: &[u8], signature: &[u8]) -> Option<bool> {
        let verified = match (self, algorithm) {
            (Self::Rsa(key), _) => {
                let how = match algorithm {
                    Algorithm::Rs256 => &RSA_PKCS1_2048_8192_SHA256,
                    Algorithm::Rs384 => &RSA_PKCS1_2048_8192_SHA384,
                    Algorithm::Rs512 => &RSA_PKCS1_2048_8192_SHA512,
                    Algorithm::Ps256 => &RSA_PSS_2048_8192_SHA256,
                    Algorithm::Ps384 => &RSA_PSS_2048_8192_SHA384,
                    Algorithm::Ps512 => &RSA_PSS_2048_8192_SHA512,
                    _ => return None,
                };
                key.verify(how, signed, signature)
            }
            (Self::P256(point), Algorithm::Es256) => {
                UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point).verify(signed, signature)
            }
            (Self::P384(point), Algorithm::Es384) => {
                UnparsedPublicKey::new(&ECDSA_P384_SHA384_FIXED, point).verify(signed, signature)
            }
            (Self::P521(point), Algorithm::Es512) => {
                UnparsedPublicKey::new(&ECDSA_P521_SHA512_FIXED, point).verify(signed, signature)
            }
            (Self::Ed25519(key), Algorithm::EdDsa) => UnparsedPublicKey::new(&ED25519, key).verify(signed, signature),
            _ => return None,
        };
        Some(verified.is_ok())
    }
}

fn read(key: &Map<String, Value>) -> Result<Key, String> {
    let text = |name: &str| key.get(name).and_then(Value::as_str);
    let bytes = |name: &str| {
        let text = text(name).ok_or_else(|| format!("[{name}] is missing or no string"))?;
        base64url(text).filter(|bytes| !bytes.is_empty()).ok_or_else(|| format!("[{name}] is an invalid Base64url encoded"))
    };
    if text("use").is_some_and(|used| used != "sig") {
        return Err("it is not for signatures ([use])".into());
    }
    if let Some(Value::Array(operations)) = key.get("key_ops")
        && !operations.iter().any(|operation| operation.as_str() == Some("verify"))
    {
        return Err("it is not for verifying ([key_ops])".into());
    }
    let algorithm = match key.get("alg") {
        None => None,
        Some(Value::String(name)) => Some(Algorithm::by_name(name).ok_or_else(|| format!("[alg] {name:?} is not supported"))?),
        Some(_) => return Err("[alg] is no string".into()),
    };
    let material = match (text("kty"), text("crv")) {
        (Some("RSA"), _) => rsa(bytes("n")?, bytes("e")?)?,
        (Some("EC"), Some("P-256")) => Material::P256(point(&bytes("x")?, &bytes("y")?, 32)?),
        (Some("EC"), Some("P-384")) => Material::P384(point(&bytes("x")?, &bytes("y")?, 48)?),
        (Some("EC"), Some("P-521")) => Material::P521(point(&bytes("x")?, &bytes("y")?, 66)?),
        (Some("OKP"), Some("Ed25519")) => match bytes("x")? {
            key if key.len() == 32 => Material::Ed25519(key),
            _ => return Err("Jwks OKP [x] field is wrong length.".into()),
        },
        (Some("oct"), _) => return Err("a shared secret is no public key".into()),
        (kty, crv) => return Err(format!("[kty] {kty:?} with [crv] {crv:?} is not supported")),
    };
    Ok(Key { id: text("kid").filter(|id| !id.is_empty()).map(Into::into), algorithm, material })
}

fn rsa(n: Vec<u8>, e: Vec<u8>) -> Result<Material, String> {
    let strip = |mut bytes: Vec<u8>| {
        let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
        bytes.drain(..zeros);
        bytes
    };
    let (n, e) = (strip(n), strip(e));
    if n.len() < 256 || n.len() > MAX_MODULUS_BYTES {
        return Err(format!("an RSA key of {} bits (2048 to 8192 are taken)", n.len() * 8));
    }
    if e.is_empty() || e.len() > 8 {
        return Err("an RSA key with an exponent that nobody uses".into());
    }
    Ok(Material::Rsa(RsaPublicKeyComponents { n, e }))
}

fn point(x: &[u8], y: &[u8], size: usize) -> Result<Vec<u8>, String> {
    let mut point = vec![4];
    for coordinate in [x, y] {
        let pad = size.checked_sub(coordinate.len()).ok_or("Jwks EC [x] or [y] is too long")?;
        point.resize(point.len() + pad, 0);
        point.extend_from_slice(coordinate);
    }
    Ok(point)
}
