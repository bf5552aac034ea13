//! Asks the control plane: finds every replica of weft-control, forwards a port to each, and hands back what all of them say.
//!
//! Each replica knows only of the proxies that are attached to it, so an answer of one of them is a part of the truth. A replica
//! that doesn't answer while others do is named on standard error (it may just be ending); the command goes on with the rest.
//! Where none answers, the error says what is missing: the control plane, a right, or a way to reach it.

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};
use kube::{Client, Config, ResourceExt as _};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use weft_api::console::{Answer, Problem};
use weft_api::names;

/// Time for one replica's answer.
const PATIENCE: Duration = Duration::from_secs(20);
/// Largest answer that is read.
const ANSWER: usize = 256 << 20;

/// How the control plane is reached: flags of each command that asks it.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ConsoleArgs {
    /// Context of the kubeconfig
    #[arg(long)]
    pub(crate) context: Option<String>,
    /// Namespace of the control plane
    #[arg(long, default_value = names::CONTROL_NAMESPACE)]
    pub(crate) control_namespace: String,
    /// Ask the weft-control at this address of this machine (127.0.0.1:15019) instead of those in the cluster
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) console: Option<String>,
}

/// The replicas of the control plane that can be asked.
pub(crate) struct Console {
    replicas: Vec<Replica>,
    namespace: String,
    client: Option<Client>,
}

enum Replica {
    Address(String),
    Pod { api: Box<Api<Pod>>, namespace: String, name: String },
}

impl Replica {
    fn name(&self) -> String {
        match self {
            Self::Address(address) => address.clone(),
            Self::Pod { namespace, name, .. } => format!("pod/{name} in {namespace}"),
        }
    }
}

/// An answer that is none.
struct Failure {
    /// What the console said, if it was reached.
    status: Option<StatusCode>,
    error: anyhow::Error,
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self { status: None, error }
    }
}

impl Console {
    /// Finds the control plane.
    ///
    /// # Errors
    /// There is none, or it may not be looked for.
    pub(crate) async fn open(args: &ConsoleArgs) -> anyhow::Result<Self> {
        if let Some(address) = &args.console {
            let replicas = vec![Replica::Address(address.clone())];
            return Ok(Self { replicas, namespace: "default".into(), client: None });
        }
        let (client, default_namespace) = client(args.context.as_deref()).await?;
        let namespace = &args.control_namespace;
        let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
        let params = ListParams::default().labels(&format!("app.kubernetes.io/name={}", names::CONTROL));
        let pods = match api.list(&params).await {
            Ok(pods) => pods.items,
            Err(kube::Error::Api(status)) if status.is_forbidden() => return Err(forbidden(namespace)),
            Err(error) => return Err(error).context(format!("looking for {} in namespace {namespace}", names::CONTROL)),
        };
        let all = pods.len();
        let replicas: Vec<Replica> = pods
            .into_iter()
            .filter(|pod| pod.metadata.deletion_timestamp.is_none())
            .filter(|pod| pod.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Running"))
            .map(|pod| Replica::Pod { api: Box::new(api.clone()), namespace: namespace.clone(), name: pod.name_any() })
            .collect();
        if replicas.is_empty() && all > 0 {
            bail!(
                "none of the {all} pods of {} in namespace {namespace} is running; see `kubectl -n {namespace} get pods`",
                names::CONTROL
            );
        }
        if replicas.is_empty() {
            bail!(
                "there is no {} in namespace {namespace}. Install it with `weft install | kubectl apply -f -`, or name its \
                 namespace with --control-namespace",
                names::CONTROL
            );
        }
        Ok(Self { replicas, namespace: default_namespace, client: Some(client) })
    }

    /// The namespace that the kubeconfig's context names.
    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The cluster; `None` with `--console`.
    pub(crate) fn cluster(&self) -> Option<&Client> {
        self.client.as_ref()
    }

    /// GETs a path of every replica.
    ///
    /// # Errors
    /// No replica answered: what the first of them said.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str, query: &[(&str, &str)]) -> anyhow::Result<Vec<Answer<T>>> {
        self.all(Method::GET, &with_query(path, query), None).await
    }

    /// POSTs a question to every replica.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub(crate) async fn post<Q: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        question: &Q,
    ) -> anyhow::Result<Vec<Answer<T>>> {
        self.all(Method::POST, path, Some(Bytes::from(serde_json::to_vec(question)?))).await
    }

    async fn all<T: DeserializeOwned>(&self, method: Method, path: &str, body: Option<Bytes>) -> anyhow::Result<Vec<Answer<T>>> {
        let asked = self.replicas.iter().map(|replica| {
            let (method, body) = (method.clone(), body.clone());
            async move { (replica, ask(replica, method, path, body).await) }
        });
        let mut answers = Vec::new();
        let mut failures: Vec<(String, Failure)> = Vec::new();
        for (replica, result) in futures::future::join_all(asked).await {
            match result.and_then(|bytes| {
                serde_json::from_slice(&bytes).map_err(|e| {
                    anyhow!("its answer is not understood ({e}); do the versions of weft and weft-control differ?").into()
                })
            }) {
                Ok(answer) => answers.push(answer),
                Err(failure) => failures.push((replica.name(), failure)),
            }
        }
        if answers.is_empty() {
            // What a console says about the question is about the question, whichever replica said it.
            failures.sort_by_key(|(_, failure)| failure.status.is_none());
            let Some((name, failure)) = failures.into_iter().next() else { bail!("there is nobody to ask") };
            return Err(match failure.status {
                Some(_) => failure.error,
                None => failure.error.context(format!("asking {name}")),
            });
        }
        for (name, failure) in &failures {
            eprintln!("warning: {name} did not answer, what it knows is missing here: {:#}", failure.error);
        }
        Ok(answers)
    }
}

/// A client of the cluster and the context's namespace.
pub(crate) async fn client(context: Option<&str>) -> anyhow::Result<(Client, String)> {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let options = kube::config::KubeConfigOptions { context: context.map(str::to_owned), ..Default::default() };
    let mut config = Config::from_kubeconfig(&options)
        .await
        .context("reading the kubeconfig (without a cluster: --console 127.0.0.1:15019 asks a weft-control on this machine)")?;
    config.connect_timeout = Some(Duration::from_secs(10));
    let namespace = config.default_namespace.clone();
    Ok((Client::try_from(config)?, namespace))
}

fn forbidden(namespace: &str) -> anyhow::Error {
    anyhow!(
        "you may not reach the control plane: this needs the rights `list pods` and `create pods/portforward` in namespace \
         {namespace}. Check with `kubectl auth can-i create pods --subresource=portforward -n {namespace}`; a Role with the rules \
         pods [get, list] and pods/portforward [get, create] gives them"
    )
}

async fn ask(replica: &Replica, method: Method, path: &str, body: Option<Bytes>) -> Result<Bytes, Failure> {
    let work = async {
        match replica {
            Replica::Address(address) => {
                let hint = || {
                    format!("cannot connect to {address}: does weft-control run on this machine, and is that its --console-port?")
                };
                let stream = TcpStream::connect(address).await.with_context(hint)?;
                exchange(stream, method, path, body).await
            }
            Replica::Pod { api, namespace, name } => {
                let port = names::CONSOLE_PORT;
                let mut forward = match api.portforward(name, &[port]).await {
                    Ok(forward) => forward,
                    Err(error) if refused(&error) => return Err(forbidden(namespace).into()),
                    Err(error) => return Err(anyhow!(error).context("port-forward").into()),
                };
                let errors = forward.take_error(port);
                let stream = forward.take_stream(port).context("the port-forward has no stream")?;
                let result = exchange(stream, method, path, body).await;
                match result {
                    // The tunnel knows better why there was no answer than HTTP does.
                    Err(Failure { status: None, error }) => {
                        let said = match errors {
                            Some(said) => tokio::time::timeout(Duration::from_millis(500), said).await.ok().flatten(),
                            None => None,
                        };
                        Err(match said {
                            Some(said) => anyhow!("the port-forward to port {port} failed: {said}").into(),
                            None => Failure {
                                status: None,
                                error: error.context(format!("no answer on port {port}; is weft-control older than weft?")),
                            },
                        })
                    }
                    other => other,
                }
            }
        }
    };
    tokio::time::timeout(PATIENCE, work).await.unwrap_or_else(|_| Err(anyhow!("no answer in {} s", PATIENCE.as_secs()).into()))
}

/// Whether a port-forward was refused for want of rights.
fn refused(error: &kube::Error) -> bool {
    match error {
        kube::Error::Api(status) => status.is_forbidden(),
        kube::Error::UpgradeConnection(error) => error.to_string().contains("403"),
        _ => false,
    }
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    method: Method,
    path: &str,
    body: Option<Bytes>,
) -> Result<Bytes, Failure> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.context("HTTP")?;
    let driver = tokio::spawn(connection);
    // The console answers to local names only.
    let request = Request::builder().method(method).uri(path).header("host", "localhost");
    let request = if body.is_some() { request.header("content-type", "application/json") } else { request };
    let request = request.body(Full::new(body.unwrap_or_default())).context("the question")?;
    let response = sender.send_request(request).await.context("the connection was closed without an answer")?;
    let status = response.status();
    let read = Limited::new(response.into_body(), ANSWER).collect().await;
    let bytes = read.map_err(|e| anyhow!("the answer broke off: {e}"))?.to_bytes();
    driver.abort();
    if status == StatusCode::OK {
        return Ok(bytes);
    }
    let error = match serde_json::from_slice::<Problem>(&bytes) {
        Ok(problem) => anyhow!(problem.error),
        Err(_) => anyhow!("HTTP {status}: {}", String::from_utf8_lossy(&bytes).trim()),
    };
    Err(Failure { status: Some(status), error })
}

fn with_query(path: &str, query: &[(&str, &str)]) -> String {
    let mut text = path.to_owned();
    for (i, (key, value)) in query.iter().filter(|(_, value)| !value.is_empty()).enumerate() {
        text.push(if i == 0 { '?' } else { '&' });
        text.push_str(key);
        text.push('=');
        for byte in value.bytes() {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                text.push(byte.into());
            } else {
                text.push_str(&format!("%{byte:02X}"));
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries() {
        assert_eq!(with_query("/v1/x", &[]), "/v1/x");
        assert_eq!(with_query("/v1/x", &[("a", ""), ("b", "shop/ü&1"), ("c", "1h")]), "/v1/x?b=shop%2F%C3%BC%261&c=1h");
    }

    async fn server(status: &str, body: &str) -> String {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let answer = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut buffer = [0; 4096];
                let _ = stream.read(&mut buffer).await;
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        address
    }

    fn console(addresses: &[&str]) -> Console {
        let replicas = addresses.iter().map(|a| Replica::Address((*a).to_owned())).collect();
        Console { replicas, namespace: "default".into(), client: None }
    }

    #[tokio::test]
    async fn all_are_asked_and_the_best_error_is_told() {
        let good = server("200 OK", r#"{"version":"1","replica":"r","data":[1,2]}"#).await;
        let bad = server("404 Not Found", r#"{"error":"no such pod"}"#).await;
        let odd = server("200 OK", "hi").await;
        let closed = "127.0.0.1:1";
        let answers = console(&[&good, closed, &good]).get::<Vec<u8>>("/v1/x", &[]).await.unwrap();
        assert_eq!(answers.iter().map(|a| a.data.len()).sum::<usize>(), 4);
        let error = console(&[closed, &bad]).get::<Vec<u8>>("/v1/x", &[]).await.unwrap_err();
        assert_eq!(format!("{error:#}"), "no such pod");
        let error = format!("{:#}", console(&[closed]).get::<Vec<u8>>("/v1/x", &[]).await.unwrap_err());
        assert!(error.contains("asking 127.0.0.1:1") && error.contains("--console-port"), "{error}");
        let error = format!("{:#}", console(&[&odd]).get::<Vec<u8>>("/v1/x", &[]).await.unwrap_err());
        assert!(error.contains("versions"), "{error}");
    }
}
