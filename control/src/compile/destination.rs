//! What stands behind an address that an app connects to: a Service by its cluster IP, or a pod by its own address.
//!
//! Which endpoints: those that are ready; where none is, those that still serve while they terminate, since a request that may
//! succeed is better than one that cannot. None at all is an answer too: the Service is known, and nobody is ready.
//!
//! Which identities: an endpoint has one exactly if mutual TLS will be terminated there. That is decided by what the pod really
//! does (the arguments of its `weft-init`), not by what it would do if it were injected today. In doubt (the pod that an
//! EndpointSlice names is not known yet) the endpoint is left out for a moment: plaintext to a pod of the mesh, or the wrong
//! identity, would be worse than one endpoint less.

use super::security::peer;
use super::{Known, inbound, protocol, workload};
use crate::model::{Endpoint, EndpointSlice, Pod, Redirection, Service, Transport};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use weft_api::{names, wire};

/// A destination about which nothing is known: connections are passed through as they are.
pub fn unknown(address: SocketAddr) -> wire::Destination {
    wire::Destination { address: address.to_string(), ..wire::Destination::default() }
}

/// What stands behind a port of a Service's cluster IP. `slices` are those of the Service's namespace.
pub fn of_service(address: SocketAddr, service: &Service, known: &Known<'_>) -> wire::Destination {
    let declared = |p: &&crate::model::ServicePort| p.port == address.port() && p.transport == Transport::Tcp;
    let Some(port) = service.ports.iter().find(declared) else { return unknown(address) };
    // In order of address, whatever the order of slices: two replicas of the control plane then say the same.
    let (mut ready, mut leaving) = (BTreeMap::new(), BTreeMap::new());
    for slice in known.view.slices.values().filter(|slice| slice.service == service.name) {
        let number = slice.ports.iter().find(|p| p.name == port.name && p.transport == Transport::Tcp).map(|p| p.port);
        let Some(number) = number.filter(|number| *number != 0) else { continue };
        for (endpoint, ip) in of_family(slice, address.ip()) {
            let chosen = match endpoint {
                e if e.ready => &mut ready,
                e if e.serving && e.terminating => &mut leaving,
                _ => continue,
            };
            if let Some(found) = resolve(endpoint, SocketAddr::new(ip, number), known) {
                chosen.insert((ip, number), found);
            }
        }
    }
    let chosen = if ready.is_empty() { leaving } else { ready };
    wire::Destination {
        address: address.to_string(),
        service: Some(inbound::reference(service, known.mesh)),
        protocol: protocol::select(&port.name, port.app_protocol.as_deref(), port.port).into(),
        direct: false,
        endpoints: chosen.into_values().collect(),
        ..wire::Destination::default()
    }
}

/// Endpoints with their addresses of the same family as the cluster IP: a dual-stack Service has both.
fn of_family(slice: &EndpointSlice, like: IpAddr) -> impl Iterator<Item = (&Endpoint, IpAddr)> {
    slice.endpoints.iter().filter_map(move |endpoint| {
        // Kubernetes defines the addresses of one endpoint as interchangeable.
        let ip = endpoint.addresses.iter().find(|ip| ip.is_ipv4() == like.is_ipv4())?;
        Some((endpoint, *ip))
    })
}

fn resolve(endpoint: &Endpoint, address: SocketAddr, known: &Known<'_>) -> Option<wire::Endpoint> {
    let pod = match &endpoint.pod {
        Some(name) => Some(known.view.pods.get(name)?),
        // Written by hand; it may be a pod's address all the same.
        None => known.view.pods.values().find(|p| !p.finished && !p.host_network && p.addresses.contains(&address.ip())),
    };
    // Ready means that the kubelet found the sidecar ready too, so its container need not be looked at.
    Some(pod.map_or_else(
        || wire::Endpoint { address: address.to_string(), ..wire::Endpoint::default() },
        |pod| of(pod, address, true, known),
    ))
}

fn of(pod: &Pod, address: SocketAddr, started: bool, known: &Known<'_>) -> wire::Endpoint {
    let identities = if started && takes_mutual_tls(pod, address.port(), known) {
        vec![names::spiffe_id(&known.mesh.trust_domain, &pod.namespace, &pod.service_account)]
    } else {
        Vec::new()
    };
    wire::Endpoint {
        address: address.to_string(),
        identities,
        workload: Some(workload::labels(pod, known.view, known.mesh)),
        pod: pod.name.clone(),
        ..wire::Endpoint::default()
    }
}

/// Whether the pod's sidecar terminates mutual TLS on this port.
fn takes_mutual_tls(pod: &Pod, port: u16, known: &Known<'_>) -> bool {
    pod.meshed()
        && !pod.host_network
        && redirected(pod, port, known)
        && peer::modes(pod, known).of(port) != wire::MtlsMode::Disable
}

/// Whether connections to the port reach the pod's sidecar.
fn redirected(pod: &Pod, port: u16, known: &Known<'_>) -> bool {
    if let Some(redirection) = &pod.redirection {
        return redirection.takes(port);
    }
    let namespace = known.view.namespace.as_ref().map(|n| &n.annotations);
    let (inbound, exclude) = weft_webhook::options::inbound_ports(&pod.annotations, namespace, &known.mesh.traffic);
    Redirection { inbound, exclude }.takes(port)
}

/// What stands behind a pod's own address: that pod, with the Service that leads to the port, if one does.
pub fn of_pod(address: SocketAddr, pod: &Pod, known: &Known<'_>) -> wire::Destination {
    let declared = inbound::ports(pod, known.view, known.mesh).into_iter().find(|p| p.port == u32::from(address.port()));
    let (protocol, service) = declared.map_or((0, None), |p| (p.protocol, p.service));
    wire::Destination {
        address: address.to_string(),
        service,
        protocol,
        direct: true,
        endpoints: vec![of(pod, address, pod.proxy_started, known)],
        ..wire::Destination::default()
    }
}

#[cfg(test)]
mod tests;
