//! The open-loop schedule: when each request is meant to start, whatever became of those before it.
//!
//! Latency is counted from the intended start. A generator that waits for an answer before it sends the next request
//! would send nothing while the peer stalls, and so leave out just the samples that matter (coordinated omission).

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Equidistant starts at a fixed rate.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    rate: u64,
    total: u64,
}

impl Schedule {
    /// `rate` requests a second (at least one) for the length of `lasting`.
    pub(crate) fn new(rate: u64, lasting: Duration) -> Self {
        let rate = rate.max(1);
        Self { rate, total: (lasting.as_secs_f64() * rate as f64).round() as u64 }
    }

    /// How many requests there are.
    pub(crate) fn total(self) -> u64 {
        self.total
    }

    /// When request `n` (from 0) is meant to start, after the start of the whole. Computed from `n`, not added up: no
    /// rounding error accumulates.
    pub(crate) fn offset(self, n: u64) -> Duration {
        let nanos = u128::from(n) * 1_000_000_000 / u128::from(self.rate);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// How many requests should have been started when `elapsed` has gone by.
    pub(crate) fn due(self, elapsed: Duration) -> u64 {
        let whole = elapsed.as_nanos() * u128::from(self.rate) / 1_000_000_000;
        u64::try_from(whole).unwrap_or(u64::MAX).saturating_add(1).min(self.total)
    }
}

/// Intended starts that no connection has taken yet.
#[derive(Debug, Default)]
pub(crate) struct Backlog {
    queue: Mutex<(VecDeque<Instant>, bool)>,
    wake: tokio::sync::Notify,
}

impl Backlog {
    /// Releases the requests of `schedule` in time, from now on, and returns when the last was released. Runs hot: a timer of a millisecond's
    /// resolution is too coarse for it, and the core is the generator's own.
    pub(crate) async fn release(&self, schedule: Schedule) {
        let start = Instant::now();
        let mut released = 0;
        while released < schedule.total() {
            let due = schedule.due(start.elapsed());
            while released < due {
                self.push(start + schedule.offset(released));
                released += 1;
            }
            tokio::task::yield_now().await;
        }
        self.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).1 = true;
        self.wake.notify_waiters();
    }

    fn push(&self, intended: Instant) {
        self.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).0.push_back(intended);
        self.wake.notify_one();
    }

    /// The oldest start that is due; waits for one; `None` when all were taken and no more come.
    pub(crate) async fn take(&self) -> Option<Instant> {
        loop {
            let mut woken = std::pin::pin!(self.wake.notified());
            // Before the look at the queue: what comes between the look and the await is not missed.
            woken.as_mut().enable();
            {
                let mut queue = self.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                if let Some(intended) = queue.0.pop_front() {
                    return Some(intended);
                }
                if queue.1 {
                    return None;
                }
            }
            woken.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn starts_are_equidistant_and_do_not_drift() {
        let s = Schedule::new(3, Duration::from_secs(1000));
        assert_eq!(s.total(), 3000);
        assert_eq!(s.offset(0), Duration::ZERO);
        assert_eq!(s.offset(3), Duration::from_secs(1));
        assert_eq!(s.offset(2997), Duration::from_secs(999));
    }

    #[test]
    fn due_is_the_inverse_of_offset() {
        let s = Schedule::new(2000, Duration::from_secs(2));
        for n in [0, 1, 2, 999, 3998] {
            assert_eq!(s.due(s.offset(n)), n + 1);
            assert_eq!(s.due(s.offset(n) + Duration::from_micros(499)), n + 1);
        }
        assert_eq!(s.due(Duration::from_secs(3600)), 4000);
    }

    #[tokio::test]
    async fn a_stalled_worker_is_charged_for_the_whole_stall() {
        let backlog = Arc::new(Backlog::default());
        let schedule = Schedule::new(1000, Duration::from_millis(50));
        let worker = tokio::spawn({
            let backlog = Arc::clone(&backlog);
            async move {
                let mut latencies = Vec::new();
                while let Some(intended) = backlog.take().await {
                    if latencies.is_empty() {
                        tokio::time::sleep(Duration::from_millis(40)).await;
                    }
                    latencies.push(intended.elapsed());
                }
                latencies
            }
        });
        backlog.release(schedule).await;
        let latencies = worker.await.unwrap();
        assert_eq!(latencies.len(), 50, "every request was sent, none left out during the stall");
        // A closed loop would have seen one slow request; here all that were due meanwhile are slow.
        assert!(latencies.iter().filter(|l| **l > Duration::from_millis(5)).count() > 25);
    }
}
