//! What one source may take of the control plane, so that none takes it all.
//!
//! - Streams: per address, per pod, and in all. A proxy has one; a few more are those that it has lost and we have not noticed yet. Many
//!   proxies may share an address where pods are behind one (a gateway, a masquerading node), so that the address's limit is far higher.
//! - Certificates: token buckets per address (before anything is checked, so that a flood costs neither a TokenReview nor a signature)
//!   and per pod.
//!
//! Who is over a limit is told so (RESOURCE_EXHAUSTED) and comes back with back-off; nobody else notices. All tables are bounded:
//! an entry lives as long as its streams, or until its bucket is full again.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// How much is allowed.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Streams of one address.
    pub streams_per_address: usize,
    /// Streams in all.
    pub streams: usize,
    /// Streams of one pod.
    pub streams_per_pod: usize,
    /// Certificates for one address: at once, and per second in the long run.
    pub certificates_per_address: (f64, f64),
    /// Certificates for one pod: at once, and per second in the long run.
    pub certificates_per_pod: (f64, f64),
    /// Buckets that are remembered of each kind. When more would be needed, newcomers are refused until some are full again.
    pub remembered: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            streams_per_address: 1000,
            streams: 50_000,
            streams_per_pod: 8,
            // A node of 250 pods that all restart, behind one address.
            certificates_per_address: (500.0, 50.0),
            // A proxy asks twice a day; one that crashes at once, again and again, a few times a minute.
            certificates_per_pod: (20.0, 0.2),
            remembered: 100_000,
        }
    }
}

/// A namespace and a pod.
pub type PodName = (String, String);

/// Which limit was met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Exceeded {
    /// Streams of an address.
    #[error(
        "{0} streams are open from this address, which is the limit (--max-streams-per-address); is a client opening them in a loop?"
    )]
    AddressStreams(usize),
    /// Streams of a pod.
    #[error("{0} streams are open of this pod, which is the limit; is a client opening them in a loop?")]
    PodStreams(usize),
    /// Streams in all.
    #[error("{0} streams are open in all, which is the limit (--max-streams); add a replica of the control plane")]
    Streams(usize),
    /// Certificates for an address.
    #[error("too many certificates are asked for from this address; try again in some seconds")]
    AddressCertificates,
    /// Certificates for a pod.
    #[error("too many certificates are asked for by this pod; try again in a minute")]
    PodCertificates,
}

impl Exceeded {
    /// Code for metrics.
    pub fn code(self) -> &'static str {
        match self {
            Self::AddressStreams(_) => "too-many-streams-of-address",
            Self::PodStreams(_) => "too-many-streams-of-pod",
            Self::Streams(_) => "too-many-streams",
            Self::AddressCertificates => "too-many-requests-of-address",
            Self::PodCertificates => "too-many-requests-of-pod",
        }
    }
}

#[derive(Debug, Default)]
struct State {
    streams: usize,
    addresses: HashMap<IpAddr, usize>,
    pods: HashMap<PodName, usize>,
    by_address: Buckets<IpAddr>,
    by_pod: Buckets<PodName>,
}

/// Counts who takes what. Share it by `Arc`.
#[derive(Debug)]
pub struct Limits {
    bounds: Bounds,
    state: Mutex<State>,
}

impl Limits {
    /// Nothing is taken yet.
    pub fn new(bounds: Bounds) -> Self {
        Self { bounds, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Counts are changed in single steps, so that a panic elsewhere leaves them right.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a stream of an address, before it is known whose it is.
    ///
    /// # Errors
    /// The limit that was met.
    pub fn stream(self: &Arc<Self>, address: IpAddr) -> Result<Place, Exceeded> {
        let address = address.to_canonical();
        let mut state = self.lock();
        if state.streams >= self.bounds.streams {
            return Err(Exceeded::Streams(state.streams));
        }
        let of_address = state.addresses.get(&address).copied().unwrap_or_default();
        if of_address >= self.bounds.streams_per_address {
            return Err(Exceeded::AddressStreams(of_address));
        }
        state.addresses.insert(address, of_address + 1);
        state.streams += 1;
        Ok(Place { limits: self.clone(), address, pod: None })
    }

    /// Whether an address may ask for a certificate now.
    ///
    /// # Errors
    /// It has asked too often.
    pub fn certificate_of_address(&self, address: IpAddr, now: Instant) -> Result<(), Exceeded> {
        let taken = self.lock().by_address.take(
            address.to_canonical(),
            self.bounds.certificates_per_address,
            self.bounds.remembered,
            now,
        );
        if taken { Ok(()) } else { Err(Exceeded::AddressCertificates) }
    }

    /// Whether a pod may ask for a certificate now.
    ///
    /// # Errors
    /// It has asked too often.
    pub fn certificate_of_pod(&self, pod: PodName, now: Instant) -> Result<(), Exceeded> {
        let taken = self.lock().by_pod.take(pod, self.bounds.certificates_per_pod, self.bounds.remembered, now);
        if taken { Ok(()) } else { Err(Exceeded::PodCertificates) }
    }
}

/// A place of a stream, given back when it is dropped.
#[derive(Debug)]
pub struct Place {
    limits: Arc<Limits>,
    address: IpAddr,
    pod: Option<PodName>,
}

impl Place {
    /// Counts the stream for a pod too, once it is known whose it is.
    ///
    /// # Errors
    /// The pod has too many.
    pub fn of_pod(&mut self, pod: PodName) -> Result<(), Exceeded> {
        let mut state = self.limits.lock();
        let of_pod = state.pods.get(&pod).copied().unwrap_or_default();
        if of_pod >= self.limits.bounds.streams_per_pod {
            return Err(Exceeded::PodStreams(of_pod));
        }
        state.pods.insert(pod.clone(), of_pod + 1);
        drop(state);
        self.pod = Some(pod);
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.limits.lock();
        state.streams = state.streams.saturating_sub(1);
        give_back(&mut state.addresses, &self.address);
        if let Some(pod) = &self.pod {
            give_back(&mut state.pods, pod);
        }
    }
}

fn give_back<K: Eq + Hash>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count = count.saturating_sub(1);
        if *count == 0 {
            counts.remove(key);
        }
    }
}

/// Token buckets by key; one that is full is the same as one that was never made.
#[derive(Debug)]
struct Buckets<K>(HashMap<K, (f64, Instant)>);

impl<K> Default for Buckets<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Eq + Hash> Buckets<K> {
    fn take(&mut self, key: K, (burst, rate): (f64, f64), remembered: usize, now: Instant) -> bool {
        let filled = |left: f64, at: Instant| (left + now.duration_since(at).as_secs_f64() * rate).min(burst);
        if self.0.len() >= remembered && !self.0.contains_key(&key) {
            self.0.retain(|_, (left, at)| filled(*left, *at) < burst);
            if self.0.len() >= remembered {
                return false;
            }
        }
        let (left, at) = self.0.entry(key).or_insert((burst, now));
        *left = filled(*left, *at);
        *at = now;
        let granted = *left >= 1.0;
        if granted {
            *left -= 1.0;
        }
        granted
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    fn pod(name: &str) -> PodName {
        ("shop".into(), name.into())
    }

    #[test]
    fn streams_of_an_address_of_a_pod_and_in_all() {
        let bounds = Bounds { streams_per_address: 3, streams: 5, streams_per_pod: 2, ..Bounds::default() };
        let limits = Arc::new(Limits::new(bounds));
        let mut places: Vec<Place> = (0..3).map(|_| limits.stream(ip(1)).unwrap()).collect();
        assert_eq!(limits.stream(ip(1)).unwrap_err(), Exceeded::AddressStreams(3));
        assert_eq!(
            limits.stream("::ffff:10.0.0.1".parse().unwrap()).unwrap_err(),
            Exceeded::AddressStreams(3),
            "the same address"
        );
        let others = [limits.stream(ip(2)).unwrap(), limits.stream(ip(3)).unwrap()];
        assert_eq!(limits.stream(ip(4)).unwrap_err(), Exceeded::Streams(5));
        places[0].of_pod(pod("a")).unwrap();
        places[1].of_pod(pod("a")).unwrap();
        assert_eq!(places[2].of_pod(pod("a")).unwrap_err(), Exceeded::PodStreams(2));
        places[2].of_pod(pod("b")).unwrap();
        places.remove(0);
        let mut again = limits.stream(ip(1)).unwrap();
        again.of_pod(pod("a")).unwrap();
        drop((places, again, others));
        let state = limits.lock();
        assert!(state.streams == 0 && state.addresses.is_empty() && state.pods.is_empty(), "{state:?}");
    }

    #[test]
    fn certificates_in_bursts_and_in_the_long_run() {
        let limits = Limits::new(Bounds { certificates_per_pod: (5.0, 0.5), ..Bounds::default() });
        let start = Instant::now();
        let granted = |n: usize, now| (0..n).filter(|_| limits.certificate_of_pod(pod("a"), now).is_ok()).count();
        assert_eq!(granted(50, start), 5);
        assert!(limits.certificate_of_pod(pod("b"), start).is_ok(), "another's flood is nothing to it");
        assert_eq!(granted(50, start + Duration::from_secs(4)), 2);
        assert_eq!(granted(50, start + Duration::from_secs(3600)), 5, "no more than a burst is saved up");
    }

    #[test]
    fn the_table_is_bounded_and_forgets_who_is_quiet() {
        let limits = Limits::new(Bounds { certificates_per_address: (2.0, 1.0), remembered: 10, ..Bounds::default() });
        let start = Instant::now();
        for n in 0..10 {
            limits.certificate_of_address(ip(n), start).unwrap();
        }
        assert_eq!(limits.certificate_of_address(ip(100), start).unwrap_err(), Exceeded::AddressCertificates);
        assert!(limits.certificate_of_address(ip(3), start).is_ok(), "who is known goes on");
        assert!(limits.certificate_of_address(ip(100), start + Duration::from_secs(5)).is_ok());
        assert!(limits.lock().by_address.0.len() <= 10);
    }
}
