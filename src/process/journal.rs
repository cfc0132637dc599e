//! The journal: the one owner of a process's output.
//!
//! A byte-exact log of chunks, each with its channel and its offset, which counts over all
//! channels. Whoever reads the pipe appends; every [`Subscription`] has a cursor of its own and
//! shares the bytes (no copy per subscriber).
//!
//! The contract:
//!
//! * **A subscription is gapless** from the point where it was attached: an append waits while it
//!   would leave the slowest subscriber more than [`WINDOW`] behind. The writer then does not read
//!   from its pipe, and the process blocks on it, as on any slow terminal.
//! * **A dead subscription holds nobody up**: one that takes nothing for [`STALL_LIMIT`] while an
//!   append waits for it is detached and told so.
//! * **An absent one costs nothing**: without subscribers the oldest bytes beyond [`WINDOW`] go.
//! * **Memory is bounded**: every chunk counts with its length and [`CHUNK_COST`], and short ones
//!   are joined, so a process that writes single bytes cannot make the log larger than its bound.
//! * No timer runs unless an append waits.

use std::{
    collections::{HashMap, VecDeque},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::{
    sync::Notify,
    time::{Instant, timeout_at},
};

use super::Ending;

/// How much output one process's journal holds, and how far a subscriber may fall behind.
pub const WINDOW: usize = 1024 * 1024;

/// How much of it is kept once the process has ended and nobody is subscribed: background children
/// may go on writing.
pub const LATE_WINDOW: usize = 64 * 1024;

/// How long a subscriber may hold up the process without taking anything.
pub const STALL_LIMIT: Duration = Duration::from_secs(30);

/// What a chunk costs beyond its bytes.
pub const CHUNK_COST: usize = 64;

/// Chunks of one channel are joined, by copying, up to this size.
pub const JOIN_LIMIT: usize = 4096;

/// The most that one event carries. A subscriber that is behind gets adjacent chunks of one channel
/// in one event.
pub const MAX_EVENT: usize = 64 * 1024;

/// The most subscriptions of one process; a further one is born detached.
pub const MAX_SUBSCRIPTIONS: usize = 1024;

const _: () = assert!(LATE_WINDOW <= WINDOW && JOIN_LIMIT <= MAX_EVENT && MAX_EVENT < WINDOW);

/// Where output came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    /// The pipe of file descriptor 1.
    Stdout,
    /// The pipe of file descriptor 2.
    Stderr,
    /// The terminal.
    Pty,
}

/// What a subscriber sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The process wrote something.
    Output {
        /// Where.
        channel: Channel,
        /// What.
        data: Bytes,
    },
    /// The process has ended; the last event.
    End(Ending),
    /// This subscriber took nothing for [`STALL_LIMIT`] while the process waited for it, and was
    /// let go; the last event. The process goes on.
    Detached,
}

/// The output of one process.
#[derive(Debug)]
pub(super) struct Journal {
    stall_limit: Duration,
    state: Mutex<State>,
    /// Told when there is something to take.
    news: Notify,
    /// Told when there may be room to append.
    room: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Adjacent chunks, the oldest first.
    chunks: VecDeque<Chunk>,
    /// The offset of the next byte.
    end: u64,
    /// The cost of everything ever appended, on the scale of [`Chunk::before`].
    cost: usize,
    readers: HashMap<u64, Reader>,
    next_reader: u64,
    ending: Option<(u64, Ending)>,
}

#[derive(Debug)]
struct Chunk {
    offset: u64,
    /// The cost of everything appended before this chunk. It wraps; only differences count.
    before: usize,
    channel: Channel,
    data: Bytes,
}

#[derive(Debug)]
struct Reader {
    cursor: u64,
    /// Since when it has held up an append without taking anything.
    holding_since: Option<Instant>,
    detached: bool,
}

impl Journal {
    /// An empty journal that lets subscribers go after `stall_limit`.
    pub(super) fn new(stall_limit: Duration) -> Self {
        Self { stall_limit, state: Mutex::default(), news: Notify::new(), room: Notify::new() }
    }

    /// Attaches a subscriber: output from now on, then the end.
    pub(super) fn subscribe(self: &Arc<Self>) -> Subscription {
        let mut state = self.state.lock();
        let id = state.next_reader;
        state.next_reader += 1;
        let reader = Reader {
            cursor: state.end,
            holding_since: None,
            detached: state.readers.len() >= MAX_SUBSCRIPTIONS,
        };
        state.readers.insert(id, reader);
        Subscription { journal: Arc::clone(self), id, done: false }
    }

    /// Appends output; waits while a subscriber is too far behind.
    pub(super) async fn append(&self, channel: Channel, data: Bytes) {
        if data.is_empty() {
            return;
        }
        loop {
            let mut room = pin!(self.room.notified());
            // Registered before looking, so that a take in between is not missed.
            room.as_mut().enable();
            let wait = self.try_append(channel, &data);
            match wait {
                Append::Done => break,
                // Those who were let go must be told, and the next look finds room.
                Append::Detached => self.news.notify_waiters(),
                Append::Until(deadline) => {
                    let _ = timeout_at(deadline, room).await;
                }
            }
        }
        self.news.notify_waiters();
    }

    /// Publishes the end: the last event of every subscriber, after all output appended so far.
    pub(super) fn end(&self, ending: Ending) {
        let mut state = self.state.lock();
        let at = state.end;
        state.ending = Some((at, ending));
        state.trim();
        drop(state);
        self.news.notify_waiters();
        self.room.notify_waiters();
    }

    fn try_append(&self, channel: Channel, data: &Bytes) -> Append {
        self.state.lock().try_append(channel, data, Instant::now(), self.stall_limit)
    }

    #[cfg(test)]
    fn retained(&self) -> (usize, usize) {
        let state = self.state.lock();
        (state.chunks.iter().map(|chunk| chunk.data.len()).sum(), state.chunks.len())
    }
}

enum Append {
    Done,
    /// Somebody has been let go.
    Detached,
    /// There is no room, at least until then.
    Until(Instant),
}

impl State {
    fn try_append(
        &mut self,
        channel: Channel,
        data: &Bytes,
        now: Instant,
        stall_limit: Duration,
    ) -> Append {
        let added = data.len() + CHUNK_COST;
        let mut deadline: Option<Instant> = None;
        let mut detached = false;
        let (end, cost, chunks, ending) = (self.end, self.cost, &self.chunks, &self.ending);
        for reader in self.readers.values_mut().filter(|reader| reader.needs(end, ending.as_ref()))
        {
            let behind = chunk_at(chunks, reader.cursor)
                .map_or(0, |(_, chunk)| cost.wrapping_sub(chunk.before));
            // Whoever has everything takes a chunk of any size.
            if behind == 0 || behind + added <= WINDOW {
                continue;
            }
            let limit = *reader.holding_since.get_or_insert(now) + stall_limit;
            if limit <= now {
                reader.detached = true;
                detached = true;
            } else {
                deadline = Some(deadline.map_or(limit, |other| other.min(limit)));
            }
        }
        if detached {
            return Append::Detached;
        }
        if let Some(deadline) = deadline {
            return Append::Until(deadline);
        }
        self.push(channel, data);
        self.trim();
        Append::Done
    }

    fn push(&mut self, channel: Channel, data: &Bytes) {
        let offset = self.end;
        self.end += data.len() as u64;
        if let Some(last) = self.chunks.back_mut()
            && last.channel == channel
            && last.data.len() + data.len() <= JOIN_LIMIT
        {
            last.data = [&last.data[..], &data[..]].concat().into();
            self.cost = self.cost.wrapping_add(data.len());
            return;
        }
        // A short chunk gets memory of its own: a part of the reader's block would keep all of it.
        let data =
            if data.len() < JOIN_LIMIT { Bytes::copy_from_slice(data) } else { data.clone() };
        let before = self.cost;
        self.cost = self.cost.wrapping_add(data.len() + CHUNK_COST);
        self.chunks.push_back(Chunk { offset, before, channel, data });
    }

    /// Drops the oldest chunks beyond the window, but none that a subscriber still needs.
    fn trim(&mut self) {
        let ending = self.ending.as_ref();
        let needed = self
            .readers
            .values()
            .filter(|reader| reader.needs(self.end, ending))
            .map(|reader| reader.cursor)
            .min()
            .unwrap_or(self.end);
        let window = if ending.is_some() { LATE_WINDOW } else { WINDOW };
        while let Some(first) = self.chunks.front()
            && self.cost.wrapping_sub(first.before) > window
            && first.offset + first.data.len() as u64 <= needed
        {
            self.chunks.pop_front();
        }
    }

    /// The next event of a subscriber, or `None` when there is nothing yet. Says too whether an
    /// append may have been waiting for this.
    fn take(&mut self, id: u64) -> Option<(Event, bool)> {
        let limit = self.ending.as_ref().map_or(self.end, |(at, _)| *at);
        let reader = self.readers.get_mut(&id)?;
        if reader.detached {
            return Some((Event::Detached, false));
        }
        if reader.cursor >= limit {
            return self.ending.as_ref().map(|(_, ending)| (Event::End(ending.clone()), false));
        }
        let (index, chunk) = chunk_at(&self.chunks, reader.cursor)?;
        let (channel, mut data) = (chunk.channel, chunk.from(reader.cursor, limit));
        let mut next = index + 1;
        let mut joined = BytesMut::new();
        while let Some(chunk) = self.chunks.get(next)
            && chunk.channel == channel
            && chunk.offset < limit
            && data.len().max(joined.len()) + chunk.data.len() <= MAX_EVENT
        {
            if joined.is_empty() {
                joined.extend_from_slice(&data);
            }
            joined.extend_from_slice(&chunk.from(chunk.offset, limit));
            next += 1;
        }
        if !joined.is_empty() {
            data = joined.freeze();
        }
        reader.cursor += data.len() as u64;
        let held = reader.holding_since.take().is_some();
        Some((Event::Output { channel, data }, held))
    }
}

impl Reader {
    /// Whether this subscriber still has to get what is in the journal, or what comes next.
    fn needs(&self, end: u64, ending: Option<&(u64, Ending)>) -> bool {
        !self.detached && self.cursor < ending.map_or(end + 1, |(at, _)| *at)
    }
}

impl Chunk {
    /// The bytes from `offset`, which lies in this chunk, and before `limit`.
    fn from(&self, offset: u64, limit: u64) -> Bytes {
        let len = self.data.len();
        let start = usize::try_from(offset - self.offset).map_or(len, |start| start.min(len));
        let stop = usize::try_from(limit - self.offset).map_or(len, |stop| stop.clamp(start, len));
        self.data.slice(start..stop)
    }
}

/// The chunk that holds the byte at `offset`.
fn chunk_at(chunks: &VecDeque<Chunk>, offset: u64) -> Option<(usize, &Chunk)> {
    let index = chunks.partition_point(|chunk| chunk.offset <= offset).checked_sub(1)?;
    let chunk = chunks.get(index)?;
    (offset < chunk.offset + chunk.data.len() as u64).then_some((index, chunk))
}

/// A reader of a process's output. Dropping it detaches it.
#[derive(Debug)]
pub struct Subscription {
    journal: Arc<Journal>,
    id: u64,
    done: bool,
}

impl Subscription {
    /// The next event; `None` after [`Event::End`] or [`Event::Detached`]. Dropping the future
    /// loses nothing.
    pub async fn next(&mut self) -> Option<Event> {
        if self.done {
            return None;
        }
        loop {
            let mut news = pin!(self.journal.news.notified());
            // Registered before looking, so that an append in between is not missed.
            news.as_mut().enable();
            let taken = self.journal.state.lock().take(self.id);
            if let Some((event, held)) = taken {
                if held {
                    self.journal.room.notify_waiters();
                }
                self.done = !matches!(event, Event::Output { .. });
                return Some(event);
            }
            news.await;
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut state = self.journal.state.lock();
        state.readers.remove(&self.id);
        state.trim();
        drop(state);
        self.journal.room.notify_waiters();
    }
}

#[cfg(test)]
mod tests;
