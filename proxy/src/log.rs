//! Errors of connections, as log lines: at most some per second and thread, so that a flood of failures neither fills the disk
//! nor slows the request path. What was left out is said with the next line. All lines go through a [`queue`], so that nobody waits for the
//! log.

pub mod queue;

use std::cell::Cell;
use std::fmt;
use std::time::{Duration, Instant};

/// Lines per second and thread.
const LINES: u32 = 10;

thread_local! {
    static WINDOW: Cell<(Option<Instant>, u32, u64)> = const { Cell::new((None, 0, 0)) };
}

/// Says that a connection failed, and why.
pub fn connection_error(message: &fmt::Arguments<'_>) {
    let (start, lines, mut dropped) = WINDOW.get();
    let now = Instant::now();
    let fresh = start.is_none_or(|s| now.duration_since(s) > Duration::from_secs(1));
    let (start, lines) = if fresh { (now, 0) } else { (start.unwrap_or(now), lines) };
    if lines >= LINES {
        WINDOW.set((Some(start), lines, dropped + 1));
        return;
    }
    if dropped > 0 {
        tracing::warn!("{dropped} messages about connections were left out");
        dropped = 0;
    }
    tracing::warn!("{message}");
    WINDOW.set((Some(start), lines + 1, dropped));
}
