//! Cross-origin requests (the Fetch standard, section 3.2), as Istio's `corsPolicy` says.

use super::{Request, Text};
use weft_api::wire;

/// A compiled policy.
#[derive(Debug)]
pub struct Cors {
    origins: Vec<Text>,
    methods: String,
    headers: String,
    expose: String,
    max_age: Option<u64>,
    credentials: bool,
    ignore_unmatched: bool,
}

/// What becomes of a preflight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Preflight {
    /// It is answered here with these fields.
    Answer(Vec<(&'static str, String)>),
    /// It goes to the app like any request.
    Forward,
    /// It is none.
    No,
}

impl Cors {
    pub(super) fn new(wire: &wire::Cors) -> Result<Self, String> {
        Ok(Self {
            origins: wire.allow_origins.iter().map(Text::new).collect::<Result<_, _>>()?,
            methods: wire.allow_methods.join(","),
            headers: wire.allow_headers.join(","),
            expose: wire.expose_headers.join(","),
            max_age: wire.max_age,
            credentials: wire.allow_credentials,
            ignore_unmatched: wire.ignore_unmatched_preflights,
        })
    }

    fn allows(&self, origin: &str) -> bool {
        self.origins.iter().any(|allowed| match allowed {
            Text::Exact(star) if star == "*" => true,
            allowed => allowed.takes(origin),
        })
    }

    /// Looks at a request.
    pub fn preflight(&self, request: &impl Request) -> Preflight {
        let origin = request.header("origin");
        let (Some(origin), true, true) =
            (origin, request.method() == "OPTIONS", request.header("access-control-request-method").is_some())
        else {
            return Preflight::No;
        };
        if !self.allows(origin) {
            return if self.ignore_unmatched { Preflight::Answer(Vec::new()) } else { Preflight::Forward };
        }
        let mut fields = self.common(origin);
        for (name, value) in [("access-control-allow-methods", &self.methods), ("access-control-allow-headers", &self.headers)] {
            if !value.is_empty() {
                fields.push((name, value.clone()));
            }
        }
        if let Some(age) = self.max_age {
            fields.push(("access-control-max-age", age.to_string()));
        }
        Preflight::Answer(fields)
    }

    /// The fields that the response to an ordinary request gets; they replace what the app says.
    pub fn response(&self, origin: Option<&str>) -> Vec<(&'static str, String)> {
        let Some(origin) = origin.filter(|origin| self.allows(origin)) else { return Vec::new() };
        let mut fields = self.common(origin);
        if !self.expose.is_empty() {
            fields.push(("access-control-expose-headers", self.expose.clone()));
        }
        fields
    }

    fn common(&self, origin: &str) -> Vec<(&'static str, String)> {
        let mut fields = vec![("access-control-allow-origin", origin.to_owned())];
        if self.credentials {
            fields.push(("access-control-allow-credentials", "true".to_owned()));
        }
        fields
    }
}
