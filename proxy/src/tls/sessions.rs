//! Sessions that a worker can resume, for servers of one identity.
//!
//! A ticket is used once, and only with the address that gave it. Each handshake brings two, so a store that keeps enough of them
//! resumes every connection but the first, also when many are made at the same time; the library's own keeps eight.

use rustls::NamedGroup;
use rustls::client::{ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue};
use rustls_pki_types::ServerName;
use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Tickets that are kept for an address.
const TICKETS: usize = 64;
/// Addresses that are kept. With more of them one is forgotten, whichever it is.
const ADDRESSES: usize = 1024;

#[derive(Debug, Default)]
struct Kept {
    tickets: VecDeque<Tls13ClientSessionValue>,
    group: Option<NamedGroup>,
}

/// See the module. Only its worker uses it, so the lock is always free.
#[derive(Debug, Default)]
pub(super) struct Sessions(Mutex<HashMap<ServerName<'static>, Kept>>);

impl Sessions {
    fn lock(&self) -> MutexGuard<'_, HashMap<ServerName<'static>, Kept>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with(&self, name: ServerName<'static>, change: impl FnOnce(&mut Kept)) {
        let mut all = self.lock();
        if all.len() >= ADDRESSES
            && !all.contains_key(&name)
            && let Some(some) = all.keys().next().cloned()
        {
            all.remove(&some);
        }
        change(all.entry(name).or_default());
    }
}

impl ClientSessionStore for Sessions {
    fn set_kx_hint(&self, name: ServerName<'static>, group: NamedGroup) {
        self.with(name, |kept| kept.group = Some(group));
    }

    fn kx_hint(&self, name: &ServerName<'_>) -> Option<NamedGroup> {
        self.lock().get(name).and_then(|kept| kept.group)
    }

    // TLS 1.2 is not spoken.
    fn set_tls12_session(&self, _: ServerName<'static>, _: Tls12ClientSessionValue) {}

    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        None
    }

    fn remove_tls12_session(&self, _: &ServerName<'static>) {}

    fn insert_tls13_ticket(&self, name: ServerName<'static>, ticket: Tls13ClientSessionValue) {
        self.with(name, |kept| {
            if kept.tickets.len() >= TICKETS {
                kept.tickets.pop_front();
            }
            kept.tickets.push_back(ticket);
        });
    }

    fn take_tls13_ticket(&self, name: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        self.lock().get_mut(name)?.tickets.pop_back()
    }
}
