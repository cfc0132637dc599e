//! The state behind the fan-out's lock: who needs what, and what may go.

use std::{collections::BTreeMap, sync::atomic::Ordering, task::Waker, time::Duration};

use bytes::Bytes;
use tokio::time::Instant;

use super::{
    LEAN_WINDOW, MAX_EVENT, SPILL_BATCH,
    fanout::{Append, Bounds, Pressure, Stall, Taken},
    log::{Channel, Log, Piece},
};

/// What the lock is around.
#[derive(Debug)]
pub(super) struct State<E> {
    pub(super) log: Log,
    pub(super) bounds: Bounds,
    /// What is on disk: from, to. Without a hole, and as long as nothing failed none before the log.
    pub(super) disk: (u64, u64),
    /// Whether more goes to disk.
    pub(super) spills: bool,
    /// How far the output has been read without a hole.
    pub(super) seen: u64,
    pub(super) readers: BTreeMap<u64, Reader>,
    pub(super) next_reader: u64,
    pub(super) writers: Vec<Waker>,
    pub(super) ending: Option<(u64, E)>,
    pub(super) last_append: Option<Instant>,
    /// What [`Pressure`] knows of this log.
    pub(super) counted: usize,
}

/// One who reads.
#[derive(Debug)]
pub(super) struct Reader {
    pub(super) cursor: u64,
    /// Whether what it has been given counts as read.
    pub(super) counts: bool,
    /// Where its output ends, once that is known.
    pub(super) limit: Option<u64>,
    /// Since when it has held up an append without taking anything.
    pub(super) holding_since: Option<Instant>,
    pub(super) detached: bool,
    pub(super) waker: Option<Waker>,
}

impl<E: Clone> State<E> {
    /// Nothing, and nobody.
    pub(super) fn new(bounds: Bounds) -> Self {
        Self {
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
        }
    }

    pub(super) fn append(
        &mut self,
        channel: Channel,
        data: &Bytes,
        (now, stall): (Instant, Stall),
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
        // One that waits for the process is hit by who holds it up.
        let end = self.log.end();
        let others_wait = self.readers.values().any(|reader| {
            let room = behind(&self.log, reader.cursor).saturating_add(added) <= window;
            reader.needs(end) && room
        });
        let patience = if others_wait || high { stall.shared } else { stall.alone };
        for reader in self.readers.values_mut().filter(|reader| reader.needs(end)) {
            let behind = behind(&self.log, reader.cursor);
            // Whoever has everything takes a chunk of any size.
            if behind == 0 || behind.saturating_add(added) <= window {
                continue;
            }
            let since = *reader.holding_since.get_or_insert(now);
            if since + patience <= now {
                reader.detached = true;
                woken.extend(reader.waker.take());
            } else {
                // Who waits, and how much memory there is, may change until then.
                let limit = next_look(since, now, stall.shared).min(since + patience);
                full = Some(full.map_or(limit, |other: Instant| other.min(limit)));
            }
        }
        let unseen = behind(&self.log, self.seen);
        // The other half is for what was given to a reader and may not have arrived.
        let blocked = self.bounds.block && unseen > 0 && unseen.saturating_add(added) > window / 2;
        if full.is_some() || blocked {
            if let Some(waker) = waker {
                self.writers.push(waker.clone());
            }
            return (Append::Full(full), woken);
        }
        if self.spills && self.log.cost().saturating_add(added) > self.window(high) {
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
    pub(super) fn trim(&mut self, high: bool) {
        if self.spills {
            return;
        }
        let needed = self.needed();
        let window = self.window(high);
        while self.log.cost() > window && self.log.first_end().is_some_and(|end| end <= needed) {
            self.log.drop_first();
        }
    }

    /// What is kept in memory of what nobody waits for.
    fn window(&self, high: bool) -> usize {
        if high { self.bounds.memory.min(LEAN_WINDOW) } else { self.bounds.memory }
    }

    /// A reader has been given output. What lies between the part that was read before and this is
    /// still unread.
    pub(super) fn saw(&mut self, id: u64, from: u64, to: u64) {
        let counts = self.readers.get(&id).is_some_and(|reader| reader.counts);
        if counts && from <= self.seen {
            self.seen = self.seen.max(to);
        }
    }

    /// The offset before which nobody needs anything.
    pub(super) fn needed(&self) -> u64 {
        let end = self.log.end();
        let readers = self.readers.values().filter(|reader| reader.needs(end));
        let needed = readers.map(|reader| reader.cursor).min().unwrap_or(end);
        if self.bounds.block { needed.min(self.seen) } else { needed }
    }

    pub(super) fn earliest(&self) -> u64 {
        if self.disk.0 < self.disk.1 { self.disk.0 } else { self.log.start() }
    }

    pub(super) fn take(&mut self, id: u64, max: usize, waker: Option<&Waker>) -> Option<Taken<E>> {
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
            // What is gone needs no reader any more.
            self.saw(id, from, to);
            return Some(Taken::Gap { from, to });
        }
        let piece = self.log.read(from, limit, max)?;
        reader.cursor = piece.end();
        self.saw(id, piece.offset, piece.end());
        Some(Taken::Output(piece))
    }

    /// Those who wait for room.
    pub(super) fn writers(&mut self) -> Vec<Waker> {
        std::mem::take(&mut self.writers)
    }

    /// Tells how much there is now.
    pub(super) fn account(&mut self, pressure: &Pressure) -> &mut Self {
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

/// The first time after `now` that is a multiple of `step` behind `since`.
fn next_look(since: Instant, now: Instant, step: Duration) -> Instant {
    let steps = now.saturating_duration_since(since).as_nanos() / step.as_nanos().max(1) + 1;
    since + step.saturating_mul(u32::try_from(steps).unwrap_or(u32::MAX))
}

impl Reader {
    /// Whether it still has to get what is in the log, or what comes next.
    fn needs(&self, end: u64) -> bool {
        !self.detached && self.cursor < self.limit.unwrap_or_else(|| end.saturating_add(1))
    }
}
