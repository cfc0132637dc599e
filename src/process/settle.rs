//! Decides when the output of a process that has exited is complete.
//!
//! Descendants may hold a pipe open after the exit: a filter behind `> >(sort)` that is about to write the
//! result, or a server that runs for days. They are told apart by what they do. The end of the process is
//! held back while bytes arrive or its tree uses processor time, and for
//! [`DRAIN_GRACE`](super::options::DRAIN_GRACE) of silence after that; never for longer than
//! [`DRAIN_LIMIT`](super::options::DRAIN_LIMIT). Time in which the daemon itself does not read, because a slow
//! subscriber applies backpressure, does not count.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::{sync::watch, time::timeout_at};

use super::{Manager, Process, activity::Activity, output::Progress};

/// What one channel's reader reports while the end of its process is awaited.
#[derive(Debug, Default)]
pub(super) struct Flow(Mutex<FlowState>);

#[derive(Debug, Default)]
struct FlowState {
    /// When bytes arrived, or the journal took them.
    last: Option<Instant>,
    /// Since when the journal has not taken the bytes that were read.
    blocked_since: Option<Instant>,
    /// For how long it has not, in all.
    blocked: Duration,
    /// Whether the end has been reported with this channel open.
    ended: bool,
}

impl Flow {
    /// Bytes have been read and go to the journal. True for the first ones after the end was reported.
    pub(super) fn received(&self) -> bool {
        let mut state = self.0.lock();
        let now = Instant::now();
        state.last = Some(now);
        state.blocked_since = Some(now);
        std::mem::take(&mut state.ended)
    }

    /// The journal has taken them.
    pub(super) fn stored(&self) {
        let mut state = self.0.lock();
        let now = Instant::now();
        state.last = Some(now);
        if let Some(since) = state.blocked_since.take() {
            state.blocked += now.duration_since(since);
        }
    }

    fn end_reported(&self) {
        self.0.lock().ended = true;
    }

    /// When bytes moved last, which is now while the journal does not take them.
    fn last_moved(&self, now: Instant) -> Option<Instant> {
        let state = self.0.lock();
        state.blocked_since.map(|_| now).or(state.last)
    }

    fn blocked(&self, now: Instant) -> Duration {
        let state = self.0.lock();
        state.blocked + state.blocked_since.map_or(Duration::ZERO, |since| now - since)
    }
}

/// One channel, as the supervisor of its process sees it.
#[derive(Debug)]
pub(super) struct Reader {
    pub(super) progress: watch::Receiver<Progress>,
    pub(super) flow: Arc<Flow>,
}

impl Reader {
    /// Whether somebody may still write to it.
    fn is_open(&self) -> bool {
        // Without its sender the reader is gone.
        *self.progress.borrow() != Progress::Closed && self.progress.has_changed().is_ok()
    }
}

/// What is known about the output when the end is reported.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Held {
    /// A descendant holds a channel open: what it writes from now on comes after the end.
    pub(super) open: bool,
    /// It was writing or working when [`DRAIN_LIMIT`](super::options::DRAIN_LIMIT) ran out.
    pub(super) truncated: bool,
}

/// How long the end of a process waits for its descendants.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// For as long as they are silent and use no processor time.
    pub(super) grace: Duration,
    /// In all.
    pub(super) limit: Duration,
}

/// Waits until all that the process itself wrote is in the journal, however long a slow subscriber makes
/// that.
pub(super) async fn drained(readers: &mut [Reader]) {
    for reader in readers {
        // An error means that the reader is gone; nothing more comes from there.
        let _ = reader.progress.wait_for(|progress| *progress >= Progress::Drained).await;
    }
}

/// Waits for those who hold a channel open, as the module's description says. None are waited for without
/// a patience.
pub(super) async fn settle(
    manager: &Arc<Manager>,
    process: &Arc<Process>,
    readers: &mut [Reader],
    patience: Option<Patience>,
) -> Held {
    let held = match patience {
        Some(patience) if readers.iter().any(Reader::is_open) => {
            wait(manager, process, readers, patience).await
        }
        _ => Held::default(),
    };
    let held = Held { open: readers.iter().any(Reader::is_open), ..held };
    readers.iter().filter(|reader| reader.is_open()).for_each(|reader| reader.flow.end_reported());
    held
}

async fn wait(
    manager: &Arc<Manager>,
    process: &Arc<Process>,
    readers: &mut [Reader],
    Patience { grace, limit }: Patience,
) -> Held {
    let limit = limit.max(grace);
    let start = Instant::now();
    let mut active = start;
    let (mut before, mut looked) = (activity(manager, process).await, start);
    loop {
        let now = Instant::now();
        let moved = readers.iter().filter_map(|reader| reader.flow.last_moved(now)).max();
        let quiet_at = active.max(moved.unwrap_or(start)) + grace;
        let blocked = readers.iter().map(|reader| reader.flow.blocked(now)).max();
        let limit_at = start + limit + blocked.unwrap_or_default();
        if now >= limit_at && now < quiet_at {
            return Held { open: true, truncated: true };
        }
        if now >= quiet_at {
            let after = activity(manager, process).await;
            if !after.is_busy_since(&before, looked.elapsed()) {
                return Held { open: true, truncated: false };
            }
            (before, looked) = (after, Instant::now());
            active = looked;
            continue;
        }
        if moved.is_some_and(|moved| moved > looked) {
            // What the tree did before its last output says nothing about the silence after that.
            (before, looked) = (activity(manager, process).await, Instant::now());
        }
        if timeout_at(quiet_at.min(limit_at).into(), closed(readers)).await.is_ok() {
            return Held::default();
        }
    }
}

/// Waits until nobody can write to any channel.
async fn closed(readers: &mut [Reader]) {
    for reader in readers {
        let _ = reader.progress.wait_for(|progress| *progress == Progress::Closed).await;
    }
}

/// What the tree has done so far; nothing where that cannot be found out.
async fn activity(manager: &Manager, process: &Arc<Process>) -> Activity {
    let tree = Arc::clone(&process.tree);
    manager.trees.run_next_step(move || tree.activity()).await.unwrap_or_default()
}
