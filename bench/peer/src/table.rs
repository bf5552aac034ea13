//! By hand: what has fooled proxies before, with the verdict that is right by Istio's documentation. Here a third opinion counts: if
//! Envoy and Weft agree and are both wrong, that is said as well.

use crate::case::{Answer, Call, Mode, Set};
use crate::difference;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::net::Ipv4Addr;

/// What must happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Must {
    Pass,
    /// Denied, or refused as malformed.
    Fail,
}
use Must::{Fail, Pass};

/// Request lines (`METHOD target`, optionally ` | header | header …`; without any header the host is `a.example`), or `@N ` before it for a
/// client with the identity N.
type Rows = &'static [(&'static str, Must)];

fn table() -> Vec<(Mode, Value, Rows)> {
    let deny_admin = json!([{"action": "DENY", "rules": [{"to": [{"operation": {"paths": ["/admin", "/admin/*"]}}]}]}]);
    let allow_public = json!([{"rules": [{"to": [{"operation": {"paths": ["/public/*"]}}]}]}]);
    let mut rows: Vec<(Mode, Value, Rows)> = vec![
        (
            Mode::Base,
            deny_admin.clone(),
            &[
                ("GET /", Pass),
                ("GET /admin", Fail),
                ("GET /admin/", Fail),
                ("GET /admin/x", Fail),
                ("GET /admin?x", Fail),
                ("GET /admin#x", Fail),
                ("GET /admin/x#y?z", Fail),
                ("GET /%61dmin", Fail),
                ("GET /%61%64%6d%69%6e", Fail),
                ("GET /x/../admin", Fail),
                ("GET /x/%2e%2e/admin", Fail),
                ("GET /x/%2E./admin", Fail),
                ("GET /./admin", Fail),
                ("GET /%2e/admin", Fail),
                ("GET \\admin", Fail),
                ("GET /x\\..\\admin", Fail),
                ("GET /../admin", Fail),
                ("GET /../../admin", Fail),
                ("GET /x/y/../../admin/z", Fail),
                ("GET http://a.example/admin", Fail),
                ("GET http://a.example/x/../admin", Fail),
                ("HEAD /admin", Fail),
                ("OPTIONS /admin", Fail),
                ("POST /admin", Fail),
                // Other paths, by Istio's documentation: slashes are not merged, escaped slashes not decoded, letter case and parameters count.
                ("GET //admin", Pass),
                ("GET /x%2f..%2fadmin", Pass),
                ("GET /%2fadmin", Pass),
                ("GET /Admin", Pass),
                ("GET /admin;x", Pass),
                ("GET /adminx", Pass),
                ("GET /%2561dmin", Pass),
                ("GET /x?/admin", Pass),
                ("GET /x?/../admin", Pass),
                ("GET /admin%20", Pass),
                ("GET /admin.", Pass),
                ("GET /admin..", Pass),
            ],
        ),
        (
            Mode::MergeSlashes,
            deny_admin.clone(),
            &[
                ("GET //admin", Fail),
                ("GET ///admin//x", Fail),
                ("GET \\\\admin", Fail),
                ("GET /\\admin", Fail),
                ("GET /x//../admin", Pass),
                ("GET /x//..//../admin", Pass),
                ("GET /x//..//..//../admin", Pass),
                ("GET /%2fadmin", Pass),
                ("GET /admin%2fx", Pass),
            ],
        ),
        (
            Mode::DecodeAndMergeSlashes,
            deny_admin.clone(),
            &[
                ("GET /%2fadmin", Fail),
                ("GET /%2Fadmin", Fail),
                ("GET /%5cadmin", Fail),
                ("GET /x%2f..%2fadmin", Fail),
                ("GET /x%5c..%5Cadmin", Fail),
                ("GET /admin%2fx", Fail),
                ("GET /x%2f%2e%2e%2fadmin", Fail),
                ("GET /%252fadmin", Pass),
            ],
        ),
        (
            Mode::None,
            deny_admin,
            &[
                ("GET /admin", Fail),
                ("GET /admin#x", Fail),
                ("GET /x/../admin", Pass),
                ("GET /%61dmin", Pass),
                ("GET //admin", Pass),
            ],
        ),
        (
            Mode::Base,
            allow_public,
            &[
                ("GET /public/x", Pass),
                ("GET /public/", Pass),
                ("GET /public", Fail),
                ("GET /public/../admin", Fail),
                ("GET /public/%2e%2e/admin", Fail),
                ("GET /public/..%2fadmin", Pass),
                ("GET /public\\..\\admin", Fail),
                ("GET /x/../public/x", Pass),
                ("GET /public/..;/admin", Fail),
                ("GET /public/%2e%2e;x/admin", Fail),
                ("GET /public/..;x=1/../admin", Fail),
                ("GET /publicx", Fail),
                ("GET /admin?/public/x", Fail),
                ("GET /admin#/public/x", Fail),
            ],
        ),
        (
            Mode::DecodeAndMergeSlashes,
            json!([{"rules": [{"to": [{"operation": {"paths": ["/public/*"]}}]}]}]),
            &[("GET /public/..%2fadmin", Fail), ("GET /public%2f..%5cadmin", Fail), ("GET //public//x", Pass)],
        ),
        (
            Mode::Base,
            json!([{"action": "DENY", "rules": [{"to": [{"operation": {"hosts": ["a.example"]}}]}]}]),
            &[
                ("GET /", Fail),
                ("GET / | Host: A.EXAMPLE", Fail),
                ("GET / | Host: a.example:80", Pass),
                ("GET / | Host: b.example", Pass),
                ("GET http://a.example/ | Host: b.example", Fail),
                ("GET http://A.example/ | Host: b.example", Fail),
                ("GET http://b.example/ | Host: a.example", Pass),
                ("GET / | Host:   a.example  ", Fail),
                ("GET / | Host: a.example | Host: b.example", Fail),
                ("GET / | Host: b.example | Host: a.example", Fail),
            ],
        ),
        (
            Mode::Base,
            json!([{"rules": [{"to": [{"operation": {"hosts": ["a.example", "a.example:*", "*.b.example"]}}]}]}]),
            &[
                ("GET / | Host: a.example:8080", Pass),
                ("GET / | Host: a.examplex", Fail),
                ("GET / | Host: x.B.example", Pass),
                ("GET / | Host: b.example", Fail),
                ("GET / | Host: evil.example | X-Forwarded-Host: a.example", Fail),
            ],
        ),
        (
            Mode::Base,
            json!([{"rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]}]),
            &[
                ("GET /", Pass),
                ("get / ", Fail),
                ("POST /", Fail),
                ("POST / | X-HTTP-Method-Override: GET", Fail),
                ("HEAD /", Fail),
                ("GETX /", Fail),
            ],
        ),
        (
            Mode::Base,
            json!([{"action": "DENY", "rules": [{"when": [{"key": "request.headers[x-role]", "notValues": ["admin"]}]}]}]),
            &[
                ("GET / | Host: a | x-role: admin", Pass),
                ("GET / | Host: a | X-Role: admin", Pass),
                ("GET /", Fail),
                ("GET / | Host: a | x-role:", Fail),
                ("GET / | Host: a | x-role: Admin", Fail),
                ("GET / | Host: a | x-role: user | x-role: admin", Pass),
                ("GET / | Host: a | x-role: admin | x-role: user", Pass),
                ("GET / | Host: a | x-role: user,admin", Fail),
            ],
        ),
        (
            Mode::Base,
            json!([{"rules": [{"when": [{"key": "request.headers[x-role]", "values": ["adm*"]}]}]}]),
            &[
                ("GET /", Fail),
                ("GET / | Host: a | x-role: admin", Pass),
                ("GET / | Host: a | x-role: x | x-role: admin", Pass),
                ("GET / | Host: a | x-role: x,admin", Fail),
                ("GET / | Host: a | x_role: admin", Fail),
            ],
        ),
        (
            Mode::Base,
            json!([{"rules": [{"from": [{"source": {"principals": ["cluster.local/ns/default/sa/frontend"]}}]}]}]),
            &[
                ("@0 GET /", Pass),
                ("@1 GET /", Fail),
                ("@3 GET /", Fail),
                ("@4 GET /", Fail),
                ("GET /", Fail),
                ("GET / | Host: a | x-forwarded-client-cert: URI=spiffe://cluster.local/ns/default/sa/frontend", Fail),
            ],
        ),
        (
            Mode::Base,
            json!([{"rules": [{"from": [{"source": {"principals": ["*"]}}]}]}]),
            &[("@0 GET /", Pass), ("@4 GET /", Pass), ("GET /", Fail)],
        ),
        (
            Mode::Base,
            json!([{"action": "DENY", "rules": [{"from": [{"source": {"notPrincipals": ["*"]}}]}]}]),
            &[("@0 GET /", Pass), ("GET /", Fail)],
        ),
        (
            Mode::Base,
            json!([{"rules": [{"from": [{"source": {"notNamespaces": ["default"]}}]}]}]),
            &[("@0 GET /", Fail), ("@4 GET /", Pass), ("@1 GET /", Pass), ("GET /", Pass)],
        ),
        (
            Mode::Base,
            json!([{"rules": [{"from": [{"source": {"namespaces": ["prod*"]}}]}]}]),
            &[("@0 GET /", Fail), ("@1 GET /", Pass), ("@2 GET /", Pass), ("GET /", Fail)],
        ),
        (
            Mode::Base,
            json!([{"rules": [{"from": [{"source": {"serviceAccounts": ["default/a.b"]}}]}]}]),
            &[("@3 GET /", Pass), ("@0 GET /", Fail), ("GET /", Fail)],
        ),
        (
            Mode::Base,
            json!([{"rules": [{"to": [{"operation": {"paths": ["/a/{*}/c", "/d/{**}"]}}]}]}]),
            &[
                ("GET /a/b/c", Pass),
                ("GET /a/b/b/c", Fail),
                ("GET /a//c", Fail),
                ("GET /a/b/c/", Fail),
                ("GET /a/%2e%2e/c", Fail),
                ("GET /d/", Pass),
                ("GET /d/x/y", Pass),
                ("GET /dx", Fail),
                ("GET /a/b%2fb/c", Pass),
            ],
        ),
        (Mode::Base, json!([{}]), &[("GET /", Fail), ("@0 GET /", Fail), ("OPTIONS *", Fail)]),
        (Mode::Base, json!([{"rules": [{}]}]), &[("GET /", Pass), ("@0 GET /", Pass), ("OPTIONS *", Pass)]),
        (Mode::Base, json!([{"action": "DENY", "rules": [{}]}, {"rules": [{}]}]), &[("GET /", Fail), ("@0 GET /", Fail)]),
    ];
    rows.push((
        Mode::Base,
        json!([{"action": "DENY", "rules": [{"when": [{"key": "request.headers[x-role]", "values": ["bad"]}]}]}]),
        &[
            ("GET /", Pass),
            ("GET / | Host: a | x-role: bad", Fail),
            ("GET / | Host: a | x-role: good | x-role: bad", Fail),
            ("GET / | Host: a | x-role: bad | x-role: good", Fail),
            ("GET / | Host: a | X-ROLE:  bad ", Fail),
            ("GET / | Host: a | x-role: bad,good", Pass),
        ],
    ));
    rows.push((
        Mode::Base,
        json!([{"action": "DENY", "rules": [{"to": [{"operation": {"notPaths": ["/healthz"]}}]}]}]),
        &[
            ("GET /healthz", Pass),
            ("GET /healthz?x", Pass),
            ("GET /healthz#x", Pass),
            ("GET /healthz/../x", Fail),
            ("GET /x/../healthz", Pass),
            ("GET /healthz/", Fail),
            ("GET /%68ealthz", Pass),
            ("GET /healthz%2f..%2fx", Fail),
            ("OPTIONS *", Fail),
        ],
    ));
    rows
}

/// The table, with ports from `first_port` on.
pub(crate) fn sets(first_port: u16) -> Result<Vec<Set>> {
    let each = table().into_iter().enumerate().map(|(n, (mode, policies, rows))| {
        let raw = policies.as_array().cloned().unwrap_or_default();
        let policies = serde_json::from_value(policies).with_context(|| format!("policies {n} of the table"))?;
        let calls = rows.iter().map(|(text, _)| call(text)).collect();
        Ok(Set { port: first_port + n as u16, mode, http: true, policies, raw, calls })
    });
    each.collect()
}

fn call(text: &str) -> Call {
    let (identity, text) = match text.strip_prefix('@') {
        Some(rest) => (rest.get(..1).and_then(|digit| digit.parse().ok()), rest.get(2..).unwrap_or_default()),
        None => (None, text),
    };
    let mut parts = text.split(" | ");
    let line = parts.next().unwrap_or_default().as_bytes().to_vec();
    let mut headers: Vec<Vec<u8>> = parts.map(|header| header.as_bytes().to_vec()).collect();
    if headers.is_empty() {
        headers.push(b"Host: a.example".to_vec());
    }
    Call { identity, source: Ipv4Addr::LOCALHOST, sni: None, line, headers }
}

/// What is not as it must be.
pub(crate) fn wrong(sets: &[Set], theirs: &[Vec<Answer>], ours: &[Vec<Answer>]) -> Vec<String> {
    let mut out = Vec::new();
    for (n, (_, _, rows)) in table().into_iter().enumerate() {
        for (m, (text, must)) in rows.iter().enumerate() {
            for (who, answer) in [("Weft", &ours[n][m]), ("Envoy", &theirs[n][m])] {
                let meant =
                    who == "Envoy" && difference::known(&sets[n], &sets[n].calls[m], &theirs[n][m], &ours[n][m], true).is_some();
                if answer.allowed() != (*must == Must::Pass) && !meant {
                    out.push(format!(
                        "{who}, {:?}: {text} must {must:?}, was {}\n{}",
                        sets[n].mode,
                        answer.words(),
                        sets[n].words()
                    ));
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read() {
        let with = call("@2 GET /x | Host: b | A: c");
        assert_eq!((with.identity, with.line, with.headers.len()), (Some(2), b"GET /x".to_vec(), 2));
        assert_eq!(call("GET /").headers, [b"Host: a.example".to_vec()]);
        assert!(sets(1000).unwrap().iter().all(|set| !set.calls.is_empty()));
    }
}
