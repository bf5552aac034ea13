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
    started: Arc<watch::Sender<bool>>,
    open: Arc<Open>,
}

#[derive(Debug, Default)]
struct Open {
    count: AtomicUsize,
    none_left: Notify,
}

/// Learns that a drain has started.
#[derive(Clone, Debug)]
pub struct Watch {
    started: watch::Receiver<bool>,
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
        Self { started: Arc::new(watch::channel(false).0), open: Arc::default() }
    }

    /// Tells every [`Watch`], once and for all.
    pub fn start(&self) {
        self.started.send_replace(true);
    }

    /// A handle for connections.
    pub fn watch(&self) -> Watch {
        Watch { started: self.started.subscribe(), open: Arc::clone(&self.open) }
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
        *self.started.borrow()
    }

    /// Resolves when the drain starts (at once if it has); never if the process ends otherwise.
    pub async fn draining(&mut self) {
        if self.started.wait_for(|started| *started).await.is_err() {
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
