//! The events that wait for one watcher, and those that it has taken and may ask for again.

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{Rescan, RescanReason, WatchEvent, WatchKind, WatchOptions, changes::Changes};

/// The events that wait for one watcher. Beyond half of it, a WRITE or CHMOD that repeats the
/// event before it is not queued again; at the bound, further changes are merged, one state for each
/// name ([`MAX_MERGED_NAMES`](super::MAX_MERGED_NAMES)), until those that wait are taken.
pub const MAX_QUEUED_EVENTS: usize = 16_384;

/// The events that a watcher with cursors has taken and can ask for again; older ones are forgotten.
pub const MAX_KEPT_EVENTS: usize = 8192;

/// What a watcher is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// A change.
    Event(WatchEvent),
    /// Changes were not seen one by one.
    Rescan(Rescan),
}

/// An item, and where the watcher stands after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// The item.
    pub item: Item,
    /// The number of items up to it, itself included.
    pub position: u64,
}

/// What is next for whoever reads a queue.
pub(super) enum Next {
    Item(Told),
    /// Merged changes wait: the owner of the queue has to turn them into events.
    Merged,
    /// The watching has ended and all is taken.
    End,
}

/// Whether an event became one of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pushed {
    Queued,
    Merged,
}

#[derive(Debug)]
pub(super) struct Queue {
    cursors: bool,
    state: Mutex<State>,
    ready: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// First those that were taken, if they are kept.
    items: VecDeque<Item>,
    taken: usize,
    /// How many came before `items`.
    forgotten: u64,
    /// Comes after `items`, as the next of them.
    rescan: Option<Rescan>,
    /// Come after that.
    changes: Changes,
    closed: bool,
}

impl Queue {
    pub(super) fn new(options: WatchOptions) -> Self {
        Self { cursors: options.cursors, state: Mutex::default(), ready: Notify::new() }
    }

    pub(super) fn has_cursors(&self) -> bool {
        self.cursors
    }

    /// Whether the next event would be merged, so that nothing need be found out for it.
    pub(super) fn is_merging(&self) -> bool {
        self.state.lock().is_merging()
    }

    /// Queues an event about `rel`, or merges it.
    pub(super) fn push(&self, rel: &Path, event: WatchEvent) -> Pushed {
        let mut state = self.state.lock();
        if state.is_merging() {
            if state.changes.is_empty() {
                tracing::warn!(name = event.name, "events are merged: nobody takes them");
                state.miss(Rescan { reason: RescanReason::SlowClient, complete: true });
            }
            if !state.changes.apply(rel, event.kind) {
                state.miss(Rescan { reason: RescanReason::SlowClient, complete: false });
            }
            return Pushed::Merged;
        }
        let crowded = state.unread() > MAX_QUEUED_EVENTS / 2;
        let repeatable = matches!(event.kind, WatchKind::Write | WatchKind::Chmod);
        match state.items.back_mut() {
            Some(Item::Event(last))
                if crowded && repeatable && last.kind == event.kind && last.name == event.name =>
            {
                *last = event;
            }
            _ => state.items.push_back(Item::Event(event)),
        }
        drop(state);
        self.ready.notify_one();
        Pushed::Queued
    }

    /// Declares that changes were missed, before what is pushed next.
    pub(super) fn miss(&self, rescan: Rescan) {
        let mut state = self.state.lock();
        if state.is_merging() {
            state.miss(rescan);
        } else if self.cursors {
            state.items.push_back(Item::Rescan(rescan));
        }
        drop(state);
        self.ready.notify_one();
    }

    /// Turns merged changes into events, when all before them are taken.
    pub(super) fn refill(&self, mut event: impl FnMut(&Path, WatchKind) -> WatchEvent) {
        let changes: Vec<(PathBuf, WatchKind)> = {
            let mut state = self.state.lock();
            if state.unread() > 0 {
                return;
            }
            if let Some(rescan) = state.rescan.take()
                && self.cursors
            {
                state.items.push_back(Item::Rescan(rescan));
            }
            state.changes.take(MAX_QUEUED_EVENTS)
        };
        // Not under the lock: it looks at files. Only the caller pushes, so nothing comes between.
        let events: Vec<Item> =
            changes.iter().map(|(rel, kind)| Item::Event(event(rel, *kind))).collect();
        self.state.lock().items.extend(events);
        self.ready.notify_one();
    }

    /// What is next, as soon as there is something.
    pub(super) async fn next(&self) -> Next {
        loop {
            {
                let mut state = self.state.lock();
                if let Some(told) = state.take(self.cursors) {
                    return Next::Item(told);
                }
                if state.closed {
                    return Next::End;
                }
                if !state.changes.is_empty() {
                    return Next::Merged;
                }
            }
            // A push in between leaves a permit, so this does not wait for it.
            self.ready.notified().await;
        }
    }

    /// Waits for the next push.
    pub(super) async fn news(&self) {
        self.ready.notified().await;
    }

    /// Everything that is queued, and whether merged changes wait as well.
    pub(super) fn take_all(&self) -> (Vec<Told>, bool) {
        let mut state = self.state.lock();
        let told = std::iter::from_fn(|| state.take(self.cursors)).collect();
        (told, !state.changes.is_empty() && !state.closed)
    }

    /// Where the watcher stands.
    pub(super) fn position(&self) -> u64 {
        let state = self.state.lock();
        state.forgotten + state.taken as u64
    }

    /// Goes back, or on, to a position; where it is no longer kept, to the end, with that declared.
    pub(super) fn seek(&self, position: u64) {
        let mut state = self.state.lock();
        let kept = position.checked_sub(state.forgotten).and_then(|at| usize::try_from(at).ok());
        match kept.filter(|at| *at <= state.items.len()) {
            Some(at) => state.taken = at,
            None => {
                state.taken = state.items.len();
                state.changes.clear();
                state.rescan = None;
                let rescan = Rescan { reason: RescanReason::CursorExpired, complete: false };
                state.items.push_back(Item::Rescan(rescan));
            }
        }
        state.forget();
        drop(state);
        self.ready.notify_one();
    }

    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.ready.notify_one();
    }
}

impl State {
    fn unread(&self) -> usize {
        self.items.len() - self.taken
    }

    fn is_merging(&self) -> bool {
        !self.changes.is_empty() || self.unread() >= MAX_QUEUED_EVENTS
    }

    fn miss(&mut self, rescan: Rescan) {
        let complete = rescan.complete && self.rescan.is_none_or(|earlier| earlier.complete);
        let reason = self.rescan.map_or(rescan.reason, |earlier| earlier.reason);
        self.rescan = Some(Rescan { reason, complete });
    }

    fn take(&mut self, keep: bool) -> Option<Told> {
        let item = self.items.get(self.taken)?;
        let position = self.forgotten + self.taken as u64 + 1;
        if !keep {
            self.forgotten += 1;
            return self.items.pop_front().map(|item| Told { item, position });
        }
        let item = item.clone();
        self.taken += 1;
        self.forget();
        Some(Told { item, position })
    }

    /// Forgets what is too old to be asked for.
    fn forget(&mut self) {
        while self.taken > MAX_KEPT_EVENTS {
            self.items.pop_front();
            self.taken -= 1;
            self.forgotten += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(cursors: bool) -> Queue {
        Queue::new(WatchOptions { cursors, ..WatchOptions::default() })
    }

    fn event(name: &str, kind: WatchKind) -> WatchEvent {
        WatchEvent { name: name.to_owned(), kind, entry: None }
    }

    fn push(queue: &Queue, name: &str, kind: WatchKind) -> Pushed {
        queue.push(Path::new(name), event(name, kind))
    }

    fn refill(queue: &Queue) {
        queue.refill(|rel, kind| event(rel.to_str().unwrap(), kind));
    }

    fn items(queue: &Queue) -> Vec<Item> {
        queue.take_all().0.into_iter().map(|told| told.item).collect()
    }

    #[test]
    fn repeats_are_joined_beyond_half() {
        let queue = queue(false);
        for _ in 0..MAX_QUEUED_EVENTS {
            push(&queue, "a", WatchKind::Write);
        }
        assert_eq!(queue.state.lock().items.len(), MAX_QUEUED_EVENTS / 2 + 1);
        assert!(!queue.is_merging());
    }

    #[test]
    fn what_there_is_no_room_for_is_merged_and_declared_to_those_who_want_it() {
        for cursors in [false, true] {
            let queue = queue(cursors);
            for i in 0..MAX_QUEUED_EVENTS {
                let kind = if i % 2 == 0 { WatchKind::Create } else { WatchKind::Remove };
                assert_eq!(push(&queue, "a", kind), Pushed::Queued);
            }
            for _ in 0..100 {
                assert_eq!(push(&queue, "b", WatchKind::Write), Pushed::Merged);
                assert_eq!(push(&queue, "c", WatchKind::Create), Pushed::Merged);
            }
            refill(&queue);
            let (told, more) = queue.take_all();
            assert_eq!((told.len(), more), (MAX_QUEUED_EVENTS, true));
            // Merging goes on until the merged ones are taken, or their order would be lost.
            assert_eq!(push(&queue, "b", WatchKind::Remove), Pushed::Merged);
            refill(&queue);
            let rescan = Rescan { reason: RescanReason::SlowClient, complete: true };
            let mut wanted = vec![
                Item::Event(event("b", WatchKind::Remove)),
                Item::Event(event("c", WatchKind::Create)),
            ];
            if cursors {
                wanted.insert(0, Item::Rescan(rescan));
            }
            assert_eq!(items(&queue), wanted);
            assert_eq!(push(&queue, "d", WatchKind::Create), Pushed::Queued);
            assert_eq!(items(&queue), [Item::Event(event("d", WatchKind::Create))]);
        }
    }

    #[test]
    fn what_was_taken_is_told_again_from_a_position_while_it_is_kept() {
        let queue = queue(true);
        for i in 0..10 {
            push(&queue, &i.to_string(), WatchKind::Create);
        }
        let told = queue.take_all().0;
        assert_eq!(
            told.iter().map(|told| told.position).collect::<Vec<_>>(),
            Vec::from_iter(1..11)
        );
        queue.seek(told[6].position);
        assert_eq!(queue.take_all().0, told[7..]);
        queue.seek(0);
        assert_eq!(queue.take_all().0, told);

        for i in 0..MAX_KEPT_EVENTS {
            push(&queue, &i.to_string(), WatchKind::Create);
        }
        queue.take_all();
        push(&queue, "unread", WatchKind::Create);
        for lost in [0, 9, u64::MAX] {
            queue.seek(lost);
            let expired = Rescan { reason: RescanReason::CursorExpired, complete: false };
            assert_eq!(items(&queue), [Item::Rescan(expired)]);
        }
        push(&queue, "new", WatchKind::Create);
        assert_eq!(items(&queue), [Item::Event(event("new", WatchKind::Create))]);
    }
}
