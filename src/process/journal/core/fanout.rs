//! One log, one writer's side, many readers with a cursor each.
//!
//! * A reader gets a gapless sequence of pieces from where it was attached, or a declared gap at
//!   its beginning. What an attached reader still needs is not dropped.
//! * An append has to wait while it would leave the slowest reader more than the window behind;
//!   one that has taken nothing for the stall limit meanwhile is detached.
//! * Nobody's wake-up is lost: wakers are registered under the same lock under which was seen that
//!   there is nothing to do.

use std::{
    collections::BTreeMap,
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
    LEAN_WINDOW, MAX_EVENT, MAX_READERS, SPILL_BATCH,
    log::{Channel, Log, Piece},
};
use crate::sync::Mutex;

/// What all journals together hold, and may hold.
#[derive(Debug)]
pub struct Pressure {
    used: AtomicUsize,
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

#[derive(Debug)]
struct State<E> {
    log: Log,
    bounds: Bounds,
    /// What is on disk: from, to. Without a hole, and as long as nothing failed none before the log.
    disk: (u64, u64),
    /// Whether more goes to disk.
    spills: bool,
    /// How far any reader has come.
    seen: u64,
    readers: BTreeMap<u64, Reader>,
    next_reader: u64,
    writers: Vec<Waker>,
    ending: Option<(u64, E)>,
    last_append: Option<Instant>,
    /// What [`Pressure`] knows of this log.
    counted: usize,
}

#[derive(Debug)]
struct Reader {
    cursor: u64,
    /// Where its output ends, once that is known.
    limit: Option<u64>,
    /// Since when it has held up an append without taking anything.
    holding_since: Option<Instant>,
    detached: bool,
    waker: Option<Waker>,
}

impl<E: Clone> Fanout<E> {
    /// An empty log.
    pub fn new(bounds: Bounds, pressure: Arc<Pressure>) -> Self {
        let state = State {
            log: Log::default(),
            bounds,
            disk: (0, 0),
            spills: bounds.disk > 0,
            seen: 0,
            readers: BTreeMap::new(),
            next_reader: 0,
            writers: Vec::new(),
            ending: None,
            last_append: None,
            counted: 0,
        };
        Self { state: Mutex::new(state), pressure }
    }

    /// Attaches a reader; its id and the offset where it begins.
    ///
    /// # Errors
    /// [`Beyond`]: nobody knows what an offset to come will hold.
    pub fn attach(&self, at: Attach) -> Result<(u64, u64), Beyond> {
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
        let reader = Reader { cursor, limit, holding_since: None, detached, waker: None };
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

    /// Moves a reader over what it has read from disk. False when it was let go meanwhile.
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
        state.seen = state.seen.max(to);
        let woken = state.writers();
        drop(state);
        wake(woken);
        there
    }

    /// Appends, if there is room. `now` and `stall` decide which readers have held it up for too
    /// long.
    pub fn append(
        &self,
        channel: Channel,
        data: &Bytes,
        now: Instant,
        stall: Duration,
        waker: Option<&Waker>,
    ) -> Append {
        let mut state = self.state.lock();
        let (appended, woken) =
            state.append(channel, data, (now, stall), waker, self.pressure.is_high());
        state.account(&self.pressure);
        drop(state);
        wake(woken);
        appended
    }

    /// The log before `to` is on disk, where the oldest byte is that at `oldest`.
    pub fn spilled(&self, to: u64, oldest: u64) {
        let mut state = self.state.lock();
        // What a failure left between disk and log is gone, and so is what lies before it.
        let from = if state.disk.1 >= state.log.start() { oldest } else { state.log.start() };
        state.disk = (from.max(oldest), to);
        // A chunk of which a part is on disk stays until the rest is there too.
        while state.log.first_end().is_some_and(|end| end <= to) {
            state.log.drop_first();
        }
        state.account(&self.pressure);
    }

    /// The disk takes no more.
    pub fn spill_failed(&self) {
        let mut state = self.state.lock();
        state.spills = false;
        let woken = state.writers();
        drop(state);
        wake(woken);
    }

    /// The offset before which nobody needs what is on disk.
    pub fn droppable_before(&self) -> u64 {
        self.state.lock().needed()
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

    /// Drops all output that no reader needs.
    pub fn shrink(&self) {
        let mut state = self.state.lock();
        let needed = state.needed();
        while state.log.first_end().is_some_and(|end| end <= needed) {
            state.log.drop_first();
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

impl<E: Clone> State<E> {
    fn append(
        &mut self,
        channel: Channel,
        data: &Bytes,
        (now, stall): (Instant, Duration),
        waker: Option<&Waker>,
        high: bool,
    ) -> (Append, Vec<Waker>) {
        let added = data.len() + super::CHUNK_COST;
        let window = self.bounds.memory.saturating_add(match self.spills {
            true => usize::try_from(self.bounds.disk).unwrap_or(usize::MAX),
            false => 0,
        });
        let mut woken = Vec::new();
        let mut full = None;
        for reader in self.readers.values_mut().filter(|reader| reader.needs(self.log.end())) {
            let behind = behind(&self.log, reader.cursor);
            // Whoever has everything takes a chunk of any size.
            if behind == 0 || behind.saturating_add(added) <= window {
                continue;
            }
            let limit = *reader.holding_since.get_or_insert(now) + stall;
            if limit <= now {
                reader.detached = true;
                woken.extend(reader.waker.take());
            } else {
                full = Some(full.map_or(limit, |other: Instant| other.min(limit)));
            }
        }
        let unseen = behind(&self.log, self.seen);
        let blocked = self.bounds.block && unseen > 0 && unseen.saturating_add(added) > window;
        if full.is_some() || blocked {
            if let Some(waker) = waker {
                self.writers.push(waker.clone());
            }
            return (Append::Full(full), woken);
        }
        if self.spills && self.log.cost().saturating_add(added) > self.bounds.memory {
            let batch = self.oldest();
            if !batch.is_empty() {
                return (Append::Spill(batch), woken);
            }
        }
        self.log.push(channel, data);
        self.last_append = Some(now);
        self.trim(high);
        let end = self.log.end();
        let hungry = self.readers.values_mut().filter(|reader| reader.cursor < end);
        woken.extend(hungry.filter_map(|reader| reader.waker.take()));
        (Append::Done, woken)
    }

    /// What goes to disk next.
    fn oldest(&mut self) -> Vec<Piece> {
        let (mut batch, mut size) = (Vec::new(), 0);
        let mut at = self.log.start();
        while size < SPILL_BATCH
            && let Some(piece) = self.log.read(at, u64::MAX, MAX_EVENT)
        {
            at = piece.end();
            size += piece.data.len();
            batch.push(piece);
        }
        batch
    }

    /// Drops the oldest chunks beyond the window, but none that somebody still needs. Where there
    /// is a disk they go there instead.
    fn trim(&mut self, high: bool) {
        if self.spills {
            return;
        }
        let needed = self.needed();
        let window = if high { self.bounds.memory.min(LEAN_WINDOW) } else { self.bounds.memory };
        while self.log.cost() > window && self.log.first_end().is_some_and(|end| end <= needed) {
            self.log.drop_first();
        }
    }

    /// The offset before which nobody needs anything.
    fn needed(&self) -> u64 {
        let end = self.log.end();
        let readers = self.readers.values().filter(|reader| reader.needs(end));
        let needed = readers.map(|reader| reader.cursor).min().unwrap_or(end);
        if self.bounds.block { needed.min(self.seen) } else { needed }
    }

    fn earliest(&self) -> u64 {
        if self.disk.0 < self.disk.1 { self.disk.0 } else { self.log.start() }
    }

    fn take(&mut self, id: u64, max: usize, waker: Option<&Waker>) -> Option<Taken<E>> {
        let reader = self.readers.get_mut(&id)?;
        if reader.detached {
            return Some(Taken::Detached);
        }
        let limit = reader.limit.unwrap_or(u64::MAX);
        if reader.cursor >= limit.min(self.log.end()) {
            if let Some((_, ending)) = &self.ending {
                return Some(Taken::End(ending.clone()));
            }
            reader.waker = waker.cloned();
            return None;
        }
        reader.holding_since = None;
        let from = reader.cursor;
        let start = self.log.start();
        if from < start {
            let (on_disk, behind) = self.disk;
            if (on_disk..behind).contains(&from) {
                return Some(Taken::OnDisk { from, to: behind.min(limit) });
            }
            let next = if from < on_disk && on_disk < behind { on_disk } else { start };
            let to = next.min(limit);
            reader.cursor = to;
            return Some(Taken::Gap { from, to });
        }
        let piece = self.log.read(from, limit, max)?;
        reader.cursor = piece.end();
        self.seen = self.seen.max(piece.end());
        Some(Taken::Output(piece))
    }

    /// Those who wait for room.
    fn writers(&mut self) -> Vec<Waker> {
        std::mem::take(&mut self.writers)
    }

    /// Tells how much there is now.
    fn account(&mut self, pressure: &Pressure) -> &mut Self {
        let cost = self.log.cost();
        if cost >= self.counted {
            pressure.used.fetch_add(cost - self.counted, Ordering::Relaxed);
        } else {
            pressure.used.fetch_sub(self.counted - cost, Ordering::Relaxed);
        }
        self.counted = cost;
        self
    }
}

/// What a cursor is behind: the cost of the log from there, and the bytes before the log.
fn behind(log: &Log, cursor: u64) -> usize {
    let start = log.start();
    let before = usize::try_from(start.saturating_sub(cursor)).unwrap_or(usize::MAX);
    log.cost_from(cursor.max(start)).saturating_add(before)
}

impl Reader {
    /// Whether it still has to get what is in the log, or what comes next.
    fn needs(&self, end: u64) -> bool {
        !self.detached && self.cursor < self.limit.unwrap_or(end.saturating_add(1))
    }
}
