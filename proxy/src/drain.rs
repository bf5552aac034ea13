//! The end of the process: who is told that it has begun, and who is still at work.
//!
//! A [`Drain`] is the sending side and belongs to whoever decides that the process ends; each connection holds a
//! [`Watch`], by which it learns of the drain, and a [`Guard`], by which the process knows that it is still there.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::{Notify, watch};

/// Starts a drain and waits for its end.
#[derive(Clone, Debug)]
pub struct Drain {
    state: Arc<watch::Sender<State>>,
    open: Arc<Open>,
}

/// What connections are woken for.
#[derive(Clone, Copy, Debug, Default)]
struct State {
    draining: bool,
    /// Grows with each change of the configuration.
    changes: u64,
}

#[derive(Debug, Default)]
struct Open {
    count: AtomicUsize,
    none_left: Notify,
}

/// Learns that a drain has started.
#[derive(Clone, Debug)]
pub struct Watch {
    state: watch::Receiver<State>,
    open: Arc<Open>,
}

/// Held as long as a connection (or a detached part of one) is served.
#[derive(Debug)]
pub struct Guard(Arc<Open>);

impl Default for Drain {
    fn default() -> Self {
        Self::new()
    }
}

impl Drain {
    /// Nothing drains yet and nothing is open.
    pub fn new() -> Self {
        Self { state: Arc::new(watch::channel(State::default()).0), open: Arc::default() }
    }

    /// Tells every [`Watch`], once and for all.
    pub fn start(&self) {
        self.state.send_modify(|state| state.draining = true);
    }

    /// Every [`Watch`] is to ask anew whether its connection may stay: the configuration has changed.
    pub fn changed(&self) {
        self.state.send_modify(|state| state.changes += 1);
    }

    /// A handle for connections.
    pub fn watch(&self) -> Watch {
        Watch { state: self.state.subscribe(), open: Arc::clone(&self.open) }
    }

    /// How many guards are held.
    pub fn open(&self) -> usize {
        self.open.count.load(Ordering::Acquire)
    }

    /// Resolves when no guard is held, which may be at once. New guards may be taken afterwards.
    pub async fn idle(&self) {
        loop {
            let mut left = std::pin::pin!(self.open.none_left.notified());
            left.as_mut().enable();
            if self.open() == 0 {
                return;
            }
            left.await;
        }
    }
}

impl Watch {
    /// Whether the drain has started.
    pub fn is_draining(&self) -> bool {
        self.state.borrow().draining
    }

    /// Resolves when the drain starts (at once if it has); never if the process ends otherwise.
    pub async fn draining(&mut self) {
        self.over(|| false).await;
    }

    /// Resolves when the drain starts, or `over` (asked at first and after each change of the configuration) says yes.
    pub async fn over(&mut self, over: impl Fn() -> bool) {
        if self.state.wait_for(|state| state.draining || over()).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Resolves when `condition` (asked at first and after each change of the configuration) holds; a drain does not matter.
    pub async fn when(&mut self, condition: impl Fn() -> bool) {
        if self.state.wait_for(|_| condition()).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Counts its holder among the connections that a drain waits for.
    pub fn guard(&self) -> Guard {
        self.open.count.fetch_add(1, Ordering::AcqRel);
        Guard(Arc::clone(&self.open))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.none_left.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_watch_learns_of_the_drain_and_the_last_guard_ends_it() {
        let drain = Drain::new();
        let mut watch = drain.watch();
        assert!(!watch.is_draining());
        drain.idle().await;
        let guard = watch.guard();
        let second = watch.clone().guard();
        assert_eq!(drain.open(), 2);
        drain.start();
        watch.draining().await;
        assert!(drain.watch().is_draining());
        let other = Drain::new();
        let mut changed = other.watch();
        let refused = std::cell::Cell::new(false);
        let ((), ()) = tokio::join!(changed.over(|| refused.get()), async {
            other.changed();
            tokio::task::yield_now().await;
            refused.set(true);
            other.changed();
        });
        let waiting = tokio::spawn({
            let drain = drain.clone();
            async move { drain.idle().await }
        });
        drop(guard);
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(second);
        waiting.await.unwrap();
    }
}
