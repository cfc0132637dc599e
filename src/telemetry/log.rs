//! The log on stderr: a bounded, lossy queue and a thread of its own that writes it.
//!
//! A write to stderr blocks as long as its reader does: a full pipe that nobody reads, a serial console
//! of 11 KB/s, a terminal that is stopped. So no thread that serves anybody writes there. Threads push
//! finished lines into a queue of [`MAX_QUEUED_BYTES`]; what does not fit is dropped and counted, and a
//! later line says how many were lost. Errors may use the part of the queue that other lines may not, so
//! that a flood does not displace the reason why the daemon ends.

use std::{
    collections::VecDeque,
    io,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use parking_lot::{Condvar, Mutex};
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

use super::rate_limit;

/// The most bytes of lines that wait for stderr.
pub const MAX_QUEUED_BYTES: usize = 256 << 10;
/// Of those, the ones that only errors may use.
const RESERVED_FOR_ERRORS: usize = 32 << 10;
const _: () = assert!(RESERVED_FOR_ERRORS < MAX_QUEUED_BYTES);
/// What one queued line costs beside its text.
const LINE_OVERHEAD: usize = 32;

/// Lines that never reached stderr, since the start.
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// How many log lines were dropped since the start because stderr did not take them.
pub fn dropped_lines() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// The queue, shared by whoever logs and the thread that writes.
#[derive(Debug, Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    /// Signalled when a line or a report is due.
    work: Condvar,
    /// Signalled when everything queued has been written.
    drained: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lines: VecDeque<Vec<u8>>,
    /// What `lines` cost.
    bytes: usize,
    /// Whether the thread is in a write right now.
    writing: bool,
    /// Lines dropped since the last line that reported it.
    dropped: u64,
    /// When suppressed lines are to be reported.
    report_at: Option<Instant>,
}

impl Queue {
    /// Starts the thread that writes to stderr. It lives as long as the process.
    ///
    /// # Errors
    /// The kernel refuses a thread.
    pub(super) fn start() -> io::Result<Arc<Self>> {
        let queue = Arc::new(Self::default());
        let shared = Arc::clone(&queue);
        std::thread::Builder::new().name("envd-log".to_owned()).spawn(move || shared.write())?;
        Ok(queue)
    }

    /// Queues a line, or drops and counts it. Never blocks.
    fn push(&self, line: &[u8], error: bool) {
        let mut state = self.state.lock();
        let limit = MAX_QUEUED_BYTES - if error { 0 } else { RESERVED_FOR_ERRORS };
        let cost = line.len() + LINE_OVERHEAD;
        if state.bytes + cost > limit {
            state.dropped += 1;
            drop(state);
            DROPPED.fetch_add(1, Ordering::Relaxed);
            return;
        }
        state.bytes += cost;
        state.lines.push_back(line.to_vec());
        drop(state);
        self.work.notify_one();
    }

    /// Wakes the thread up after `delay` to report suppressed lines.
    pub(super) fn report_after(&self, delay: Duration) {
        let mut state = self.state.lock();
        if state.report_at.is_none() {
            state.report_at = Some(Instant::now() + delay);
            drop(state);
            self.work.notify_one();
        }
    }

    /// Waits until everything queued has been written, for `time` at most.
    pub(super) fn flush(&self, time: Duration) {
        let deadline = Instant::now() + time;
        let mut state = self.state.lock();
        while !state.lines.is_empty() || state.writing {
            if self.drained.wait_until(&mut state, deadline).timed_out() {
                return;
            }
        }
    }

    /// The life of the thread.
    fn write(&self) {
        loop {
            let (lines, dropped, report) = self.next();
            for line in &lines {
                if write_to_stderr(line).is_err() {
                    // Closed, and so for good: there is nobody left to tell.
                    DROPPED.fetch_add(1, Ordering::Relaxed);
                }
            }
            {
                let mut state = self.state.lock();
                state.writing = false;
                if state.lines.is_empty() {
                    self.drained.notify_all();
                }
            }
            if dropped > 0 {
                tracing::warn!(dropped, "log lines were dropped: stderr did not take them");
            }
            if report && let Some(again) = rate_limit::report() {
                self.report_after(again);
            }
        }
    }

    /// Waits for lines; those, how many were dropped meanwhile, and whether a report is due.
    fn next(&self) -> (VecDeque<Vec<u8>>, u64, bool) {
        let mut state = self.state.lock();
        loop {
            let report = state.report_at.is_some_and(|at| at <= Instant::now());
            if report {
                state.report_at = None;
            }
            if report || !state.lines.is_empty() {
                state.bytes = 0;
                state.writing = true;
                let dropped = std::mem::take(&mut state.dropped);
                return (std::mem::take(&mut state.lines), dropped, report);
            }
            match state.report_at {
                None => self.work.wait(&mut state),
                Some(at) => {
                    self.work.wait_until(&mut state, at);
                }
            }
        }
    }
}

/// Writes all of it, however long stderr takes; not through the lock of [`io::stderr`], which then would
/// be held while the write blocks.
fn write_to_stderr(mut bytes: &[u8]) -> nix::Result<()> {
    let stderr = io::stderr();
    while !bytes.is_empty() {
        match nix::unistd::write(&stderr, bytes) {
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(Errno::EINTR) => {}
            // Somebody has made the shared file description non-blocking.
            Err(Errno::EAGAIN) => {
                let mut wanted = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
                match poll(&mut wanted, PollTimeout::NONE) {
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(error) => return Err(error),
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Puts what `fmt` writes for one event into the queue.
#[derive(Debug)]
pub(super) struct Lines(pub(super) Arc<Queue>);

/// One event's line.
#[derive(Debug)]
pub(super) struct Line<'a> {
    queue: &'a Queue,
    error: bool,
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line { queue: &self.0, error: false }
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> Line<'a> {
        Line { queue: &self.0, error: *meta.level() == Level::ERROR }
    }
}

impl io::Write for Line<'_> {
    /// `fmt` writes a whole line at once.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.queue.push(line, self.error);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_drops_and_counts_and_keeps_room_for_errors() {
        let queue = Queue::default();
        let line = [b'x'; 1000];
        for _ in 0..1000 {
            queue.push(&line, false);
        }
        let queued = queue.state.lock().lines.len();
        assert!(queue.state.lock().bytes <= MAX_QUEUED_BYTES - RESERVED_FOR_ERRORS);
        queue.push(b"the reason", true);
        let (lines, dropped, report) = queue.next();
        assert_eq!((lines.len(), dropped, report), (queued + 1, 1000 - queued as u64, false));
        assert_eq!(lines.back().unwrap(), b"the reason");
        queue.push(&line, false);
        assert_eq!(queue.next().1, 0, "what was dropped is reported once");
    }

    #[test]
    fn a_flush_has_a_deadline() {
        let queue = Queue::default();
        queue.flush(Duration::from_secs(60));
        queue.push(b"nobody writes it", true);
        let begun = Instant::now();
        queue.flush(Duration::from_millis(20));
        assert!(begun.elapsed() >= Duration::from_millis(20));
    }
}
