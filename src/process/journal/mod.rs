//! The journal: the one owner of a process's output.
//!
//! A byte-exact log of chunks, each with its channel and its offset, which counts over all
//! channels. Whoever reads the pipe appends; every [`Subscription`] has a cursor of its own and
//! shares the bytes (no copy per subscriber).
//!
//! The contract:
//!
//! * **A subscription is gapless** from the point where it was attached: an append waits while it
//!   would leave the slowest subscriber more than the window behind. The writer then does not read
//!   from its pipe, and the process blocks on it, as on any slow terminal.
//! * **One attached at an offset** sees what is retained from there, then what comes; no byte is
//!   lost or doubled between the two. What is gone is told first, as a gap.
//! * **A dead subscription holds nobody up**: one that takes nothing for the stall limit while an
//!   append waits for it is detached and told so. It may come back by offset.
//! * **An absent one costs nothing**: without subscribers the oldest bytes beyond the window go.
//!   A process that was started with [`Bounds::block`] waits for a reader instead.
//! * **Memory is bounded**: every chunk counts with its length and [`CHUNK_COST`], short ones are
//!   joined, and beyond [`Pressure`]'s limit over all journals what nobody needs is dropped down to
//!   [`LEAN_WINDOW`]. With a [`spill`] the oldest bytes go to disk first.
//! * No timer runs unless an append waits.

mod core;
mod spill;
mod spill_dir;
#[cfg(test)]
mod tests;

use std::{collections::VecDeque, fmt, future::poll_fn, pin::pin, sync::Arc, task::Poll};

use bytes::Bytes;
use tokio::time::{Instant, sleep_until};

use self::core::{Append, Fanout, Taken};
pub use self::core::{
    Attach, Beyond, Bounds, CHUNK_COST, Channel, JOIN_LIMIT, LEAN_WINDOW, MAX_EVENT, MAX_READERS,
    Piece, Pressure, Stall,
};
use self::spill::Spill;
pub(super) use self::spill_dir::SpillDir;
use super::Ending;
use crate::blocking::Pool;

/// What a subscriber sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The process wrote something.
    Output(Piece),
    /// Output that this subscriber asked for and that is gone.
    Gap {
        /// The offset of the first lost byte.
        from: u64,
        /// The offset behind the last one.
        to: u64,
    },
    /// The process has ended; the last event.
    End(Ended),
    /// This subscriber took nothing for the stall limit while the process waited for it, and was
    /// let go; the last event. The process goes on.
    Detached,
}

/// The end of a process's output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// How it ended.
    pub ending: Ending,
    /// The offset behind all that was written before.
    pub offset: u64,
}

/// Where and how the oldest output goes to disk.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    pub(super) dir: Arc<SpillDir>,
    pub(super) pool: Arc<Pool>,
    pub(super) relief: Arc<dyn Relief>,
}

/// Who gives up retained state for new output.
pub(super) trait Relief: fmt::Debug + Send + Sync {
    /// Blocks: gives up something that holds what was refused with this error; whether there was any.
    fn relieve(&self, errno: Option<i32>) -> bool;
}

/// How often state is given up for one piece of output.
const MAX_RELIEFS: usize = 16;

/// The output of one process.
#[derive(Debug)]
pub(super) struct Journal {
    stall: Stall,
    fanout: Fanout<Ending>,
    disk: Option<Spill>,
    /// Held while the oldest output is put on disk: the channels are read by two tasks.
    turn: tokio::sync::Mutex<()>,
}

impl Journal {
    /// An empty journal that lets subscribers go after `stall`. Without a `disk` all is kept
    /// in memory, whatever `bounds` say.
    pub(super) fn new(
        bounds: Bounds,
        stall: impl Into<Stall>,
        pressure: Arc<Pressure>,
        disk: Option<Disk>,
    ) -> Self {
        let disk = disk.filter(|_| bounds.disk > 0);
        let bounds = Bounds { disk: if disk.is_some() { bounds.disk } else { 0 }, ..bounds };
        let disk = disk.map(|disk| Spill::new(disk, bounds.disk));
        Self {
            stall: stall.into(),
            fanout: Fanout::new(bounds, pressure),
            disk,
            turn: Default::default(),
        }
    }

    /// Attaches a subscriber. What one who only looks on (`counts` is false) has been given is still
    /// unread for [`Bounds::block`].
    ///
    /// # Errors
    /// [`Beyond`] the end.
    pub(super) fn subscribe(
        self: &Arc<Self>,
        at: Attach,
        counts: bool,
    ) -> Result<Subscription, Beyond> {
        let (id, begin) = self.fanout.attach(at, counts)?;
        let (queue, done) = (VecDeque::new(), false);
        Ok(Subscription { journal: Arc::clone(self), id, begin, queue, done })
    }

    /// Appends output; waits while a subscriber is too far behind.
    pub(super) async fn append(&self, channel: Channel, data: Bytes) {
        if data.is_empty() {
            return;
        }
        let mut deadline = None;
        loop {
            let until = deadline;
            let mut expired = pin!(async move {
                match until {
                    Some(until) => sleep_until(until).await,
                    None => std::future::pending().await,
                }
            });
            let append = poll_fn(|cx| {
                let tried = self.fanout.append(
                    channel,
                    &data,
                    Instant::now(),
                    self.stall,
                    Some(cx.waker()),
                );
                match tried {
                    // The timer is set in the next turn, which looks again.
                    Append::Full(full) if full == until => {
                        expired.as_mut().poll(cx).map(|()| Append::Full(full))
                    }
                    other => Poll::Ready(other),
                }
            });
            match append.await {
                Append::Done => return,
                Append::Full(full) => deadline = full,
                Append::Spill(batch) => self.put_on_disk(batch).await,
            }
        }
    }

    async fn put_on_disk(&self, batch: Vec<Piece>) {
        let Some(spill) = &self.disk else { return self.fanout.spill_failed() };
        let _turn = self.turn.lock().await;
        // The other channel may have put them there meanwhile, or some, or a part of one.
        let written = spill.end();
        let batch: Vec<_> = batch
            .into_iter()
            .filter(|piece| piece.end() > written)
            .map(|piece| piece.between(written, u64::MAX))
            .collect();
        let Some(end) = batch.last().map(Piece::end) else { return };
        let mut written = spill.write(batch.clone()).await;
        for _ in 0..MAX_RELIEFS {
            match &written {
                Err(error) if spill.relieve(error).await => {
                    written = spill.write(batch.clone()).await;
                }
                _ => break,
            }
        }
        match written {
            Ok(()) => self.fanout.spilled(end, |droppable| spill.trim(droppable)),
            Err(error) => {
                tracing::warn!(%error, "output is no longer put on disk");
                self.fanout.spill_failed();
            }
        }
    }

    /// The process has exited: nothing waits any more for a reader that may never come.
    pub(super) fn exited(&self) {
        self.fanout.unblock();
    }

    /// Publishes the end: the last event of every subscriber, after all output appended so far.
    pub(super) fn end(&self, ending: Ending) {
        self.fanout.end(ending);
    }

    /// The offsets of the oldest byte that is retained, and of the next one.
    pub(super) fn range(&self) -> (u64, u64) {
        self.fanout.range()
    }

    /// The end, once it is published.
    pub(super) fn ended(&self) -> Option<Ended> {
        self.fanout.ending().map(|(offset, ending)| Ended { ending, offset })
    }

    /// When something was written last.
    pub(super) fn last_output(&self) -> Option<Instant> {
        self.fanout.last_append()
    }

    /// Drops the output in memory that no subscriber needs.
    pub(super) fn shrink(&self) {
        self.fanout.shrink();
    }

    /// Blocks: drops the output on disk; whether there was any. Who reads it is told of a gap.
    pub(super) fn discard_disk(&self) -> bool {
        let Some(spill) = self.disk.as_ref().filter(|spill| spill.is_used()) else { return false };
        self.fanout.discard_disk();
        spill.clear();
        true
    }

    /// What the output in memory costs.
    #[cfg(test)]
    pub(super) fn cost(&self) -> usize {
        self.fanout.cost()
    }
}

/// A reader of a process's output. Dropping it detaches it.
#[derive(Debug)]
pub struct Subscription {
    journal: Arc<Journal>,
    id: u64,
    begin: u64,
    /// Read from disk, and not yet told.
    queue: VecDeque<Piece>,
    done: bool,
}

impl Subscription {
    /// The offset of the first byte that it was to see.
    pub fn begin(&self) -> u64 {
        self.begin
    }

    /// The offset of the oldest byte that is retained, and of the next one.
    pub fn range(&self) -> (u64, u64) {
        self.journal.range()
    }

    /// The next event; `None` after [`Event::End`] or [`Event::Detached`]. Dropping the future
    /// loses nothing.
    pub async fn next(&mut self) -> Option<Event> {
        self.next_within(MAX_EVENT).await
    }

    /// As [`Subscription::next`], with at most `max` bytes of output.
    pub async fn next_within(&mut self, max: usize) -> Option<Event> {
        while !self.done {
            if let Some(piece) = self.queued(max) {
                return Some(Event::Output(piece));
            }
            let taken = poll_fn(|cx| {
                let taken = self.journal.fanout.take(self.id, max, Some(cx.waker()));
                taken.map_or(Poll::Pending, Poll::Ready)
            });
            let taken = taken.await;
            if let Some(event) = self.event(taken).await {
                return Some(event);
            }
        }
        None
    }

    /// The next event if it is there already, though it may have to come from disk.
    pub async fn next_present(&mut self, max: usize) -> Option<Event> {
        while !self.done {
            if let Some(piece) = self.queued(max) {
                return Some(Event::Output(piece));
            }
            let taken = self.journal.fanout.take(self.id, max, None)?;
            if let Some(event) = self.event(taken).await {
                return Some(event);
            }
        }
        None
    }

    /// The next of what was read from disk.
    fn queued(&mut self, max: usize) -> Option<Piece> {
        let mut piece = self.queue.pop_front()?;
        let cut = piece.offset + max.max(1) as u64;
        if piece.end() > cut {
            self.queue.push_front(piece.between(cut, u64::MAX));
            piece = piece.between(piece.offset, cut);
        }
        self.journal.fanout.saw(self.id, piece.offset, piece.end());
        Some(piece)
    }

    /// What was taken, as an event; `None` when it is worth another look.
    async fn event(&mut self, taken: Taken<Ending>) -> Option<Event> {
        Some(match taken {
            Taken::Output(piece) => Event::Output(piece),
            Taken::Gap { from, to } => Event::Gap { from, to },
            Taken::OnDisk { from, to } => return self.read_disk(from, to).await,
            Taken::End(ending) => {
                self.done = true;
                let offset = self.journal.fanout.ending().map_or(0, |(offset, _)| offset);
                Event::End(Ended { ending, offset })
            }
            Taken::Detached => {
                self.done = true;
                Event::Detached
            }
        })
    }

    async fn read_disk(&mut self, from: u64, to: u64) -> Option<Event> {
        let Journal { disk, fanout, .. } = &*self.journal;
        let read = match disk {
            Some(disk) => disk.read(from, to).await,
            None => Ok(Vec::new()),
        };
        let pieces = read.unwrap_or_else(|error| {
            tracing::warn!(%error, from, to, "output on disk cannot be read");
            Vec::new()
        });
        // Dropped since the look, or broken: that part is told as lost.
        let end = match (pieces.last(), disk) {
            (Some(last), _) => last.end(),
            (None, Some(disk)) => disk.next_after(from, to),
            (None, None) => to,
        };
        if !fanout.advance(self.id, end) {
            return None;
        }
        self.queue.extend(pieces);
        if !self.queue.is_empty() {
            return None;
        }
        fanout.saw(self.id, from, end);
        Some(Event::Gap { from, to: end })
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.journal.fanout.detach(self.id);
    }
}
