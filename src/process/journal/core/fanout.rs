//! One log, one writer's side, many readers with a cursor each.
//!
//! * A reader gets a gapless sequence of pieces from where it was attached, or a declared gap at
//!   its beginning. What an attached reader still needs is not dropped.
//! * An append has to wait while it would leave the slowest reader more than the window behind;
//!   one that has taken nothing for the stall limit meanwhile is detached. The limit is a short one only
//!   where that helps somebody ([`Stall`]).
//! * Nobody's wake-up is lost: wakers are registered under the same lock under which was seen that
//!   there is nothing to do.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::Waker,
    time::Duration,
};

use bytes::Bytes;
use tokio::time::Instant;

use super::{
    MAX_EVENT, MAX_READERS,
    log::{Channel, Piece},
    state::{Reader, State},
};
use crate::sync::Mutex;

/// What all journals together hold, and may hold.
#[derive(Debug)]
pub struct Pressure {
    pub(super) used: AtomicUsize,
    limit: usize,
}

impl Pressure {
    /// Nothing so far, of `limit` bytes.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { used: AtomicUsize::new(0), limit })
    }

    /// Whether it is more than it should be.
    pub fn is_high(&self) -> bool {
        self.used() > self.limit
    }

    /// How much it is.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }
}

/// How large a journal may get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// In memory, and how far a reader may fall behind; in bytes, with
    /// [`CHUNK_COST`](super::CHUNK_COST) a chunk.
    pub memory: usize,
    /// On disk behind that, in bytes.
    pub disk: u64,
    /// Whether the process waits for a reader rather than lose output.
    pub block: bool,
}

/// How long a reader may hold up the process without taking anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stall {
    /// While another reader waits for the process, or all journals together hold more than they should.
    pub shared: Duration,
    /// Otherwise: its client may be stopped for a while, and loses nothing.
    pub alone: Duration,
}

impl From<Duration> for Stall {
    fn from(both: Duration) -> Self {
        Self { shared: both, alone: both }
    }
}

/// Where a reader begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attach {
    /// With what comes next.
    Now,
    /// With the byte at this offset.
    At(u64),
}

/// The offset lies beyond the end of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("offset {offset} is beyond the end of the output, which is at {end}")]
pub struct Beyond {
    /// The offset that was asked for.
    pub offset: u64,
    /// The end.
    pub end: u64,
}

/// What a reader gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Taken<E> {
    /// Output; the cursor is behind it now.
    Output(Piece),
    /// Output that is gone; the cursor is at `to` now.
    Gap {
        /// The first lost byte.
        from: u64,
        /// The first that is there.
        to: u64,
    },
    /// Output that is on disk, from `from` and before `to`: it is to be read there, and then
    /// [`Fanout::advance`] to be called.
    OnDisk {
        /// The cursor.
        from: u64,
        /// Where the reader's output, or that on disk, ends.
        to: u64,
    },
    /// The end, and nothing after it.
    End(E),
    /// The reader took nothing for too long, and was let go.
    Detached,
}

/// What became of an append.
#[derive(Debug, PartialEq, Eq)]
pub enum Append {
    /// It is in the log.
    Done,
    /// There is no room until a reader takes something, or until the time given, when one of them
    /// is let go. The waker that was passed is woken when it is worth another try.
    Full(Option<Instant>),
    /// These, the oldest, are to be put on disk first; then [`Fanout::spilled`] is to be called.
    Spill(Vec<Piece>),
}

/// A log that is shared. `E` is what is told at the end.
#[derive(Debug)]
pub struct Fanout<E> {
    state: Mutex<State<E>>,
    pressure: Arc<Pressure>,
}

impl<E: Clone> Fanout<E> {
    /// An empty log.
    pub fn new(bounds: Bounds, pressure: Arc<Pressure>) -> Self {
        Self { state: Mutex::new(State::new(bounds)), pressure }
    }

    /// Attaches a reader; its id and the offset where it begins. What one that does not count has
    /// been given is still unread for [`Bounds::block`].
    ///
    /// # Errors
    /// [`Beyond`]: nobody knows what an offset to come will hold.
    pub fn attach(&self, at: Attach, counts: bool) -> Result<(u64, u64), Beyond> {
        let mut state = self.state.lock();
        let end = state.log.end();
        let cursor = match at {
            Attach::Now => end,
            Attach::At(offset) if offset > end => return Err(Beyond { offset, end }),
            Attach::At(offset) => offset,
        };
        // Whoever comes after the end gets what background children wrote since, as far as it is
        // there, and no more.
        let limit = match (&state.ending, at) {
            (None, _) => None,
            (Some(_), Attach::At(_)) => Some(end),
            (Some(_), Attach::Now) => Some(cursor),
        };
        let id = state.next_reader;
        state.next_reader += 1;
        let detached = state.readers.len() >= MAX_READERS;
        let reader = Reader { cursor, counts, limit, holding_since: None, detached, waker: None };
        state.readers.insert(id, reader);
        Ok((id, cursor))
    }

    /// Lets a reader go.
    pub fn detach(&self, id: u64) {
        let mut state = self.state.lock();
        state.readers.remove(&id);
        state.trim(self.pressure.is_high());
        let woken = state.account(&self.pressure).writers();
        drop(state);
        wake(woken);
    }

    /// Takes what is next for a reader, at most `max` bytes; `None` when there is nothing yet:
    /// the waker is woken when there is.
    pub fn take(&self, id: u64, max: usize, waker: Option<&Waker>) -> Option<Taken<E>> {
        let mut state = self.state.lock();
        let taken = state.take(id, max.clamp(1, MAX_EVENT), waker)?;
        // Room may have come about in either way: less behind, or no longer needed.
        let moved = matches!(taken, Taken::Output(_) | Taken::Gap { .. });
        let woken = if moved { state.writers() } else { Vec::new() };
        drop(state);
        wake(woken);
        Some(taken)
    }

    /// Moves a reader over what it has found on disk. False when it was let go meanwhile.
    pub fn advance(&self, id: u64, to: u64) -> bool {
        let mut state = self.state.lock();
        let there = match state.readers.get_mut(&id) {
            Some(reader) if !reader.detached => {
                reader.cursor = reader.cursor.max(to);
                reader.holding_since = None;
                true
            }
            _ => false,
        };
        let woken = state.writers();
        drop(state);
        wake(woken);
        there
    }

    /// A reader has been given what it has found on disk.
    pub fn saw(&self, id: u64, from: u64, to: u64) {
        let mut state = self.state.lock();
        state.saw(id, from, to);
        let woken = state.writers();
        drop(state);
        wake(woken);
    }

    /// Appends, if there is room. `now` and `stall` decide which readers have held it up for too
    /// long.
    pub fn append(
        &self,
        channel: Channel,
        data: &Bytes,
        now: Instant,
        stall: impl Into<Stall>,
        waker: Option<&Waker>,
    ) -> Append {
        let mut state = self.state.lock();
        let (appended, woken) =
            state.append(channel, data, (now, stall.into()), waker, self.pressure.is_high());
        state.account(&self.pressure);
        drop(state);
        wake(woken);
        appended
    }

    /// The log before `to` is on disk. `trim` is told before which offset nobody needs anything
    /// there, may drop from it, and says where the oldest byte is then; the lock is held meanwhile,
    /// so that no reader is attached to what goes.
    pub fn spilled(&self, to: u64, trim: impl FnOnce(u64) -> u64) {
        let mut state = self.state.lock();
        let oldest = trim(state.needed());
        // What a failure or `shrink` left between disk and log is gone, and so is what lies before.
        let (from, behind) = state.disk;
        let from = if behind >= state.log.start() { from } else { state.log.start() };
        state.disk = (from.max(oldest), to);
        // A chunk of which a part is on disk stays until the rest is there too.
        while state.log.first_end().is_some_and(|end| end <= to) {
            state.log.drop_first();
        }
        state.account(&self.pressure);
    }

    /// What is on disk is about to be dropped.
    pub fn discard_disk(&self) {
        self.state.lock().disk = (0, 0);
    }

    /// The disk takes no more.
    pub fn spill_failed(&self) {
        let mut state = self.state.lock();
        state.spills = false;
        let woken = state.writers();
        drop(state);
        wake(woken);
    }

    /// From now on output is dropped rather than waited with, where only [`Bounds::block`] asks
    /// for it: the process has exited.
    pub fn unblock(&self) {
        let mut state = self.state.lock();
        state.bounds.block = false;
        let woken = state.writers();
        drop(state);
        wake(woken);
    }

    /// Publishes the end: what every reader gets after all output so far. Returns where that is.
    pub fn end(&self, ending: E) -> u64 {
        let mut state = self.state.lock();
        let at = state.log.end();
        state.ending = Some((at, ending));
        state.bounds.block = false;
        for reader in state.readers.values_mut() {
            reader.limit.get_or_insert(at);
        }
        state.trim(self.pressure.is_high());
        let mut woken = state.account(&self.pressure).writers();
        woken.extend(state.readers.values_mut().filter_map(|reader| reader.waker.take()));
        drop(state);
        wake(woken);
        at
    }

    /// Drops all output that no reader needs; what is on disk before it with it, so that what stays
    /// has no hole.
    pub fn shrink(&self) {
        let mut state = self.state.lock();
        let needed = state.needed();
        while state.log.first_end().is_some_and(|end| end <= needed) {
            state.log.drop_first();
            state.disk = (0, 0);
        }
        state.account(&self.pressure);
    }

    /// The offsets of the oldest byte and of the next one.
    pub fn range(&self) -> (u64, u64) {
        let state = self.state.lock();
        (state.earliest(), state.log.end())
    }

    /// The end and where it is, once it is published.
    pub fn ending(&self) -> Option<(u64, E)> {
        self.state.lock().ending.clone()
    }

    /// When something was appended last.
    pub fn last_append(&self) -> Option<Instant> {
        self.state.lock().last_append
    }

    /// What the log in memory costs.
    #[cfg(test)]
    pub fn cost(&self) -> usize {
        self.state.lock().log.cost()
    }

    /// Whether an append waits for room.
    #[cfg(test)]
    pub fn has_writers(&self) -> bool {
        !self.state.lock().writers.is_empty()
    }

    /// Forgets appends that waited, and were given up.
    #[cfg(test)]
    pub fn forget_writers(&self) {
        self.state.lock().writers.clear();
    }
}

impl<E> Drop for Fanout<E> {
    fn drop(&mut self) {
        let counted = self.state.lock().counted;
        self.pressure.used.fetch_sub(counted, Ordering::Relaxed);
    }
}

fn wake(woken: Vec<Waker>) {
    for waker in woken {
        waker.wake();
    }
}
