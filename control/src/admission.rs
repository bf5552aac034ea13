//! Puts the webhook on the index: namespaces come from the watch, or by one read where the watch has not seen one yet.

use crate::index::Index;
use crate::keep::missed::namespace_facts;
use kube::{Api, Client};
use std::sync::Arc;
use std::time::Duration;
use weft_webhook::{BoxFuture, LookupError, NamespaceFacts, Namespaces};

/// Time for the one read of a namespace; the API server itself gives a webhook some seconds in all.
const READ: Duration = Duration::from_secs(2);

/// Looks namespaces up.
pub struct Lookup {
    index: Arc<Index>,
    client: Option<Client>,
}

impl Lookup {
    /// From the index, and from the cluster if there is one.
    pub fn new(index: Arc<Index>, client: Option<Client>) -> Self {
        Self { index, client }
    }
}

impl Namespaces for Lookup {
    fn get<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<Arc<NamespaceFacts>>, LookupError>> {
        Box::pin(async move {
            if let Some(known) = self.index.namespace(name) {
                return Ok(Some(Arc::new(namespace_facts(name, Some(&known)))));
            }
            let Some(client) = &self.client else { return Ok(None) };
            let api: Api<crate::source::wire::WireNamespace> = Api::all(client.clone());
            let failed = |cause: String| LookupError { name: name.to_owned(), cause };
            match tokio::time::timeout(READ, api.get_metadata_opt(name)).await {
                Ok(Ok(found)) => Ok(found.map(|ns| {
                    Arc::new(NamespaceFacts {
                        name: name.to_owned(),
                        labels: ns.metadata.labels.unwrap_or_default(),
                        annotations: ns.metadata.annotations.unwrap_or_default(),
                    })
                })),
                Ok(Err(error)) => Err(failed(error.to_string())),
                Err(_) => Err(failed(format!("no answer in {} s", READ.as_secs()))),
            }
        })
    }
}
