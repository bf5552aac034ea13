//! Logs, exec and port-forward, and what kubectl sends in protobuf, with real `kubectl` against a node that echoes. Without
//! `kubectl` on the machine nothing is tested here, and that is said.

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use serde_json::json;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use weft_playground::apiserver::backend::{Duplex, ExecRequest, ExecSession, LogOptions, NodeBackend};
use weft_playground::apiserver::{Config, Server, Status, resource};

/// A node whose commands print their arguments, echo their input and exit with 3, and whose ports echo (port 9 refuses).
struct Echo;

impl NodeBackend for Echo {
    fn logs<'a>(
        &'a self,
        _: &'a str,
        pod: &'a str,
        options: LogOptions,
    ) -> BoxFuture<'a, Result<BoxStream<'static, io::Result<Bytes>>, Status>> {
        let line = format!("{pod}/{} tail {:?}\n", options.container, options.tail_lines);
        async move { Ok(Box::pin(futures::stream::iter([Ok(Bytes::from(line))])) as _) }.boxed()
    }

    fn exec<'a>(&'a self, _: &'a str, _: &'a str, request: ExecRequest) -> BoxFuture<'a, Result<ExecSession, Status>> {
        async move {
            let (mut near, stdout) = tokio::io::duplex(1024);
            let (stdin, mut from) = tokio::io::duplex(1024);
            let words = request.command.join(" ");
            let wants_input = request.stdin;
            let exit = async move {
                near.write_all(format!("{words}\n").as_bytes()).await?;
                if wants_input {
                    tokio::io::copy(&mut from, &mut near).await?;
                }
                Ok(3)
            };
            Ok(ExecSession {
                stdin: wants_input.then(|| Box::pin(stdin) as _),
                stdout: Some(Box::pin(stdout)),
                stderr: request.stderr.then(|| Box::pin(&b"oops\n"[..]) as _),
                resize: None,
                exit: exit.boxed(),
            })
        }
        .boxed()
    }

    fn port_forward<'a>(&'a self, _: &'a str, _: &'a str, port: u16) -> BoxFuture<'a, Result<Box<dyn Duplex>, Status>> {
        async move {
            if port == 9 {
                return Err(Status::new(500, "InternalError", "nobody listens on 9"));
            }
            let (near, far) = tokio::io::duplex(4096);
            tokio::spawn(async move {
                let (mut read, mut write) = tokio::io::split(far);
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            });
            Ok(Box::new(near) as Box<dyn Duplex>)
        }
        .boxed()
    }

    fn connect_service<'a>(&'a self, _: &'a str, _: &'a str, _: u16) -> BoxFuture<'a, io::Result<Box<dyn Duplex>>> {
        async { Err(io::Error::other("there are no services here")) }.boxed()
    }
}

async fn start(dir: &Path) -> Option<Server> {
    if Command::new("kubectl").args(["version", "--client"]).output().is_err() {
        println!("kubectl is not on this machine: its streams are not tested here");
        return None;
    }
    let server = Server::start(Config { listen: vec!["127.0.0.1:0".parse().unwrap()], ..Config::default() }).await.unwrap();
    server.set_backend(Arc::new(Echo));
    std::fs::write(dir.join("kubeconfig"), server.kubeconfig(&format!("https://{}", server.addresses()[0]))).unwrap();
    let api = server.api("test");
    let pod = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "one", "image": "x"}, {"name": "two", "image": "x"}]}});
    let mut pod = api.create(&resource::PODS, Some("default"), pod).await.unwrap();
    pod["status"] = json!({"phase": "Running"});
    api.update_status(&resource::PODS, pod).await.unwrap();
    Some(server)
}

fn kubectl(dir: &Path) -> Command {
    let mut command = Command::new("kubectl");
    command.arg("--kubeconfig").arg(dir.join("kubeconfig")).env("HOME", dir).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(mut command: Command, input: &str) -> (Option<i32>, String, String) {
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    (out.status.code(), String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap())
}

/// A `kubectl port-forward` that ends with the test.
struct Forward(std::process::Child, u16);

impl Drop for Forward {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn forward(dir: &Path, port: u16, websocket: bool) -> Forward {
    let mut command = kubectl(dir);
    command.args(["port-forward", "--address=127.0.0.1", "pod/p", &format!(":{port}")]);
    command.env("KUBECTL_PORT_FORWARD_WEBSOCKETS", websocket.to_string());
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let local = line.split("127.0.0.1:").nth(1).and_then(|rest| rest.split(' ').next()).and_then(|p| p.parse().ok());
    Forward(child, local.unwrap_or_else(|| panic!("kubectl said: {line}")))
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_and_exec() {
    let dir = tempfile::tempdir().unwrap();
    let Some(_server) = start(dir.path()).await else { return };
    tokio::task::spawn_blocking(move || {
        let dir = dir.path();
        let mut command = kubectl(dir);
        command.args(["logs", "p", "-c", "two", "--tail=4"]);
        assert_eq!(run(command, ""), (Some(0), "p/two tail Some(4)\n".into(), String::new()));
        // Over WebSocket, and over SPDY as kubectl before 1.30 does it.
        for websocket in ["true", "false"] {
            let mut command = kubectl(dir);
            command
                .args(["exec", "p", "-c", "one", "-i", "--", "say", "two words"])
                .env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", websocket);
            let (code, out, err) = run(command, "typed\n");
            assert_eq!((code, out.as_str()), (Some(3), "say two words\ntyped\n"), "websocket {websocket}: {err}");
            assert!(err.contains("oops\n") && err.contains("exit code 3"), "websocket {websocket}: {err}");
            assert!(!err.contains("websocket: close"), "{err}");
        }
        let mut command = kubectl(dir);
        command.args(["exec", "p", "-c", "three", "--", "x"]);
        let (code, _, err) = run(command, "");
        assert!(code == Some(1) && err.contains("three"), "{err}");
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn port_forward() {
    let dir = tempfile::tempdir().unwrap();
    let Some(_server) = start(dir.path()).await else { return };
    tokio::task::spawn_blocking(move || {
        for websocket in [true, false] {
            let kubectl = forward(dir.path(), 80, websocket);
            let connections: Vec<_> = (0..4_u8)
                .map(|n| {
                    let port = kubectl.1;
                    std::thread::spawn(move || {
                        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
                        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
                        let sent = vec![n; 300_000];
                        let mut writer = stream.try_clone().unwrap();
                        let data = sent.clone();
                        let writing = std::thread::spawn(move || {
                            writer.write_all(&data).unwrap();
                            writer.shutdown(Shutdown::Write).unwrap();
                        });
                        let mut got = Vec::new();
                        stream.read_to_end(&mut got).unwrap();
                        writing.join().unwrap();
                        assert!(got == sent, "connection {n}: {} of {} bytes", got.len(), sent.len());
                    })
                })
                .collect();
            for connection in connections {
                connection.join().unwrap();
            }
        }
        // A port that refuses closes the connection; what came before it is not lost in silence.
        let kubectl = forward(dir.path(), 9, true);
        let mut stream = TcpStream::connect(("127.0.0.1", kubectl.1)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut got = Vec::new();
        let ended = stream.read_to_end(&mut got);
        assert!(
            got.is_empty() && ended.as_ref().map_or_else(|e| e.kind() == io::ErrorKind::ConnectionReset, |_| true),
            "{ended:?}"
        );
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_kubectl_makes_itself() {
    let dir = tempfile::tempdir().unwrap();
    let Some(_server) = start(dir.path()).await else { return };
    tokio::task::spawn_blocking(move || {
        let dir = dir.path();
        for args in [
            "create deployment web --image=x:1 --replicas=2 --port=80",
            "create configmap c --from-literal=a=b",
            "create secret generic s --from-literal=a=b",
            "create namespace n",
            "create serviceaccount a",
            "create service clusterip svc --tcp=80:http",
            "create job j --image=x -- say hello",
            "create role r --verb=get --resource=pods",
            "create rolebinding r --role=r --serviceaccount=default:a",
            "create clusterrole r --verb=get --resource=nodes",
            "create clusterrolebinding r --clusterrole=r --user=u",
            "create token default --audience=weft",
            "auth can-i get pods",
            "auth whoami",
            "run one --image=x --labels=a=b",
            "expose deployment web --port=80 --name=exposed",
            "set image deployment/web x=x:2",
            "wait --for=jsonpath={.spec.replicas}=2 deployment/web --timeout=5s",
            "explain deployment",
            "get deployments,services,configmaps -A -o wide",
            "delete configmap c --wait=true --timeout=10s",
        ] {
            let mut command = kubectl(dir);
            command.args(args.split(' '));
            let (code, out, err) = run(command, "");
            assert_eq!(code, Some(0), "kubectl {args}: {out}{err}");
        }
        let mut command = kubectl(dir);
        command.args(["get", "deployment", "web", "-o", "jsonpath={.spec.replicas} {.spec.template.spec.containers[0].image} {.spec.template.spec.containers[0].ports[0].containerPort}"]);
        assert_eq!(run(command, "").1, "2 x:2 80");
        let mut command = kubectl(dir);
        command.args(["get", "service", "svc", "-o", "jsonpath={.spec.ports[0].targetPort} {.spec.selector.app}"]);
        assert_eq!(run(command, "").1, "http svc");
    })
    .await
    .unwrap();
}
