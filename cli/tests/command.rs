//! The built `weft`: what goes to which output, exit codes, and a cluster that is asked.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::mpsc;

const GOOD: &str =
    "apiVersion: v1\nkind: Pod\nmetadata: {name: good, namespace: shop}\nspec: {containers: [{name: a, image: x}]}\n";
const BAD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: bad, annotations: {weft.mesh/dns-capture: perhaps}}\n\
                   spec: {containers: [{name: a, image: x}]}\n";

fn weft(arguments: &[&str], kubeconfig: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_weft")).args(arguments).env("KUBECONFIG", kubeconfig).env_remove("HOME").output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn file(dir: &Path, name: &str, content: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, content).unwrap();
    path
}

#[test]
fn a_stream_of_which_a_document_fails_is_not_printed() {
    let dir = tempfile::tempdir().unwrap();
    let nowhere = dir.path().join("none");
    file(dir.path(), "1.yaml", GOOD);
    let folder = dir.path().to_str().unwrap().to_owned();
    let done = weft(&["inject", "-f", &folder], &nowhere);
    assert_eq!(done.status.code(), Some(0));
    assert!(text(&done.stdout).contains("weft-init"), "{done:?}");
    assert_eq!(text(&done.stderr), "pod/good injected\n");

    file(dir.path(), "2.yaml", BAD);
    let done = weft(&["inject", "-f", &folder], &nowhere);
    assert_eq!((done.status.code(), text(&done.stdout)), (Some(1), String::new()));
    let said = text(&done.stderr);
    assert!(said.contains("2.yaml: pod/bad failed: ") && said.contains("weft.mesh/dns-capture"), "{said}");
    assert!(said.ends_with("error: 1 document failed: nothing is printed, so that nothing is applied in part\n"), "{said}");

    let done = weft(&["uninject", "-f", file(dir.path(), "3.yaml", "a: [").to_str().unwrap()], &nowhere);
    assert_eq!((done.status.code(), text(&done.stdout)), (Some(1), String::new()));
}

/// An API server that knows these paths. Says what it was asked.
fn api_server(answers: Vec<(&'static str, String)>) -> (String, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (told, asked) = mpsc::channel();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let (answers, told) = (answers.clone(), told.clone());
            std::thread::spawn(move || {
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                while let Some(Ok(first)) = lines.next() {
                    while lines.next().is_some_and(|line| line.is_ok_and(|line| !line.is_empty())) {}
                    let path = first.split([' ', '?']).nth(1).unwrap_or_default().to_owned();
                    let found = answers.iter().find(|(known, _)| *known == path);
                    let (code, body) = found.map_or_else(
                        || ("404 Not Found", r#"{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","reason":"NotFound","code":404}"#.into()),
                        |(_, body)| ("200 OK", body.clone()),
                    );
                    told.send(path).unwrap();
                    let head =
                        format!("HTTP/1.1 {code}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", body.len());
                    if stream.write_all((head + &body).as_bytes()).is_err() {
                        return;
                    }
                }
            });
        }
    });
    (url, asked)
}

fn kubeconfig(dir: &Path, url: &str) -> PathBuf {
    let yaml = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{{name: c, cluster: {{server: '{url}'}}}}]\n\
         users: [{{name: u, user: {{}}}}]\ncontexts: [{{name: c, context: {{cluster: c, user: u, namespace: shop}}}}]\n"
    );
    file(dir, "kubeconfig", &yaml)
}

#[test]
fn why_judges_a_manifest_by_the_settings_of_the_cluster() {
    let dir = tempfile::tempdir().unwrap();
    let manifest = file(dir.path(), "pod.yaml", GOOD);
    let manifest = manifest.to_str().unwrap();
    let version = r#"{"major":"1","minor":"33","gitVersion":"v1.33.0","gitCommit":"","gitTreeState":"","buildDate":"","goVersion":"","compiler":"","platform":""}"#;
    let settings = "systemNamespaces: [shop]\n";
    let config = format!(
        r#"{{"apiVersion":"v1","kind":"ConfigMap","metadata":{{"name":"weft-config"}},"data":{{"config.yaml":"{}"}}}}"#,
        settings.replace('\n', "\\n")
    );
    let shop = r#"{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"shop","annotations":{"inject":"enabled"}}}"#;
    let paths = ["/version", "/api/v1/namespaces/shop", "/api/v1/namespaces/weft-system/configmaps/weft-config"];

    // The namespace asks for the mesh; the settings are the defaults.
    let (url, asked) = api_server(vec![(paths[0], version.into()), (paths[1], shop.into())]);
    let done = weft(&["why", "-f", manifest], &kubeconfig(dir.path(), &url));
    assert_eq!(done.status.code(), Some(0), "{done:?}");
    assert!(text(&done.stdout).starts_with("pod/good: injected (namespace-enabled)\n"), "{done:?}");
    assert!(text(&done.stderr).contains("no ConfigMap weft-config"), "{done:?}");
    let mut asked: Vec<String> = asked.try_iter().collect();
    asked.sort();
    let mut expected = paths;
    expected.sort_unstable();
    assert_eq!(asked, expected);

    // The cluster's settings call it a system namespace.
    let (url, _asked) = api_server(vec![(paths[0], version.into()), (paths[1], shop.into()), (paths[2], config)]);
    let cluster = kubeconfig(dir.path(), &url);
    let done = weft(&["why", "-f", manifest], &cluster);
    assert!(text(&done.stdout).starts_with("pod/good: not injected ("), "{done:?}");
    assert_eq!(text(&done.stderr), "");

    // Settings of a file: nobody is asked.
    let (url, asked) = api_server(vec![]);
    let own = file(dir.path(), "config.yaml", settings);
    let done = weft(&["why", "-f", manifest, "--config", own.to_str().unwrap()], &kubeconfig(dir.path(), &url));
    assert_eq!((done.status.code(), asked.try_iter().count()), (Some(0), 0), "{done:?}");
    assert!(text(&done.stdout).starts_with("pod/good: not injected ("), "{done:?}");

    // Without a cluster: as weft inject, and that is said.
    let done = weft(&["why", "-f", manifest], &dir.path().join("none"));
    assert!(text(&done.stdout).starts_with("pod/good: injected (offline)\n"), "{done:?}");
    assert!(text(&done.stderr).starts_with("note: no cluster is asked"), "{done:?}");
    let done = weft(&["why", "-f", manifest, "--config", "/nowhere.yaml"], &cluster);
    assert_eq!(done.status.code(), Some(1));
}
