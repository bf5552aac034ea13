//! Log lines on their way to standard error: appended to a buffer by whoever has something to say, written by a thread of their own. A
//! worker therefore never waits for whoever reads the log, be it a full disk or a pipe that nobody empties.
//!
//! Invariants: lines come out whole and in the order in which they were said; no more than [`LIMIT`] bytes wait. What does not fit is
//! dropped and counted, and said in its place as soon as there is room again. [`Queue::flush`] waits for what was
//! said so far, at the end of the process and when something panics, but never for ever.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tracing_subscriber::fmt::MakeWriter;

/// Bytes that may wait: some thousand lines.
pub const LIMIT: usize = 256 * 1024;
/// A buffer that a burst has made larger is given back.
const KEEP: usize = 16 * 1024;
/// How long the end of the process waits for the log.
pub const PATIENCE: Duration = Duration::from_secs(1);

static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Lines that this process has dropped so far.
pub fn dropped() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<u8>,
    /// The thread has bytes in hand that are not written yet.
    writing: bool,
    /// Lines dropped since the last one that was taken.
    dropped: u64,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    said: Condvar,
    written: Condvar,
}

impl Shared {
    /// Whoever panicked has not left anything half done: the state is changed in one go.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&self, line: &[u8]) {
        let mut state = self.lock();
        if state.waiting.len() + line.len() > LIMIT {
            state.dropped += 1;
            DROPPED.fetch_add(1, Ordering::Relaxed);
            return;
        }
        note_dropped(&mut state);
        state.waiting.extend_from_slice(line);
        drop(state);
        self.said.notify_one();
    }

    fn work(&self, mut sink: impl Write) {
        let mut batch = Vec::new();
        loop {
            let mut state = self.lock();
            state.writing = false;
            if state.waiting.is_empty() {
                note_dropped(&mut state);
            }
            if state.waiting.is_empty() {
                self.written.notify_all();
            }
            while state.waiting.is_empty() {
                state = self.said.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            std::mem::swap(&mut state.waiting, &mut batch);
            state.writing = true;
            drop(state);
            // Nobody is left who could be told that the log can't be written.
            let _ = sink.write_all(&batch).and_then(|()| sink.flush());
            if batch.capacity() > KEEP {
                batch = Vec::new();
            }
            batch.clear();
        }
    }
}

/// Says in its place that lines are missing.
fn note_dropped(state: &mut State) {
    let lines = std::mem::take(&mut state.dropped);
    if lines > 0 {
        let note = format!("weft-proxy: {lines} log lines were dropped here: nobody takes them as fast as they come\n");
        state.waiting.extend_from_slice(note.as_bytes());
    }
}

/// A handle; all clones lead to the same thread.
#[derive(Clone, Debug)]
pub struct Queue(Arc<Shared>);

impl Queue {
    /// Starts the thread that writes to `sink`.
    ///
    /// # Errors
    /// The thread can't be started.
    pub fn start(sink: impl Write + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let work = Arc::clone(&shared);
        std::thread::Builder::new().name("log".into()).stack_size(64 * 1024).spawn(move || work.work(sink))?;
        Ok(Self(shared))
    }

    /// Waits until everything that was said before is written, for [`PATIENCE`] at most. False: it is not.
    pub fn flush(&self) -> bool {
        let until = Instant::now() + PATIENCE;
        let mut state = self.0.lock();
        while state.writing || !state.waiting.is_empty() {
            let Some(left) = until.checked_duration_since(Instant::now()) else { return false };
            state = self.0.written.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// From now on a panic, in whichever thread, is told after what was said before it.
    pub fn flush_before_panics(&self) {
        let (queue, tell) = (self.clone(), std::panic::take_hook());
        std::panic::set_hook(Box::new(move |panic| {
            queue.flush();
            tell(panic);
        }));
    }
}

/// Takes one line: the formatter writes each in one go.
#[derive(Debug)]
pub struct Line<'a>(&'a Shared);

impl Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.say(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Queue {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};

    /// Keeps what is written. While a gate is given, each write waits for a permit.
    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>, Option<Arc<Mutex<Receiver<()>>>>);

    impl Sink {
        fn gated() -> (Self, Sender<()>) {
            let (open, gate) = channel();
            (Self(Arc::default(), Some(Arc::new(Mutex::new(gate)))), open)
        }

        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if let Some(gate) = &self.1 {
                // An error: the gate is open for good.
                let _ = gate.lock().unwrap().recv();
            }
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn say(queue: &Queue, line: &str) {
        queue.make_writer().write_all(line.as_bytes()).unwrap();
    }

    #[test]
    fn lines_come_out_whole_and_in_order() {
        let sink = Sink::default();
        let queue = Queue::start(sink.clone()).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let queue = &queue;
                scope.spawn(move || (0..500).for_each(|n| say(queue, &format!("{thread} {n}\n"))));
            }
        });
        assert!(queue.flush());
        let text = sink.text();
        for thread in 0..4 {
            let lines: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix(&format!("{thread} "))).collect();
            assert_eq!(lines, (0..500).map(|n| n.to_string()).collect::<Vec<_>>());
        }
        assert_eq!(text.lines().count(), 2000);
    }

    #[test]
    fn whoever_speaks_never_waits_and_what_is_missing_is_said_in_its_place() {
        let (sink, gate) = Sink::gated();
        let queue = Queue::start(sink.clone()).unwrap();
        let line = format!("{}\n", "x".repeat(1023));
        // The first may already be in the thread's hand, the rest fills the buffer.
        say(&queue, "first\n");
        let before = dropped();
        for _ in 0..400 {
            say(&queue, &line);
        }
        let lost = dropped() - before;
        assert!((400 - LIMIT as u64 / 1024..=400 - LIMIT as u64 / 1024 + 1).contains(&lost), "{lost}");
        let began = Instant::now();
        assert!(!queue.flush(), "nobody takes them");
        assert!(began.elapsed() >= PATIENCE);
        drop(gate);
        assert!(queue.flush());
        say(&queue, "last\n");
        assert!(queue.flush());
        let text = sink.text();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!((lines[0], lines[lines.len() - 1]), ("first", "last"));
        assert_eq!(lines.iter().filter(|line| line.starts_with('x')).count() as u64, 400 - lost);
        assert!(lines[lines.len() - 2].contains(&format!("{lost} log lines were dropped here")), "{}", lines[lines.len() - 2]);
    }

    #[test]
    fn what_was_said_before_a_panic_is_written_before_it_is_told() {
        let (sink, gate) = Sink::gated();
        let queue = Queue::start(sink.clone()).unwrap();
        let (tell, told) = channel();
        let (tell, at_the_time) = (Mutex::new(tell), sink.clone());
        std::panic::set_hook(Box::new(move |_| tell.lock().unwrap().send(at_the_time.text()).unwrap()));
        queue.flush_before_panics();
        let panicking = std::thread::spawn(move || {
            say(&queue, "just before\n");
            panic!("as the test asked for");
        });
        assert!(told.recv_timeout(PATIENCE / 10).is_err(), "it waits for the log");
        gate.send(()).unwrap();
        assert_eq!(told.recv_timeout(PATIENCE * 10).unwrap(), "just before\n");
        assert!(panicking.join().is_err());
        let _ = std::panic::take_hook();
    }
}
