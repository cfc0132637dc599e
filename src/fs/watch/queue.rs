//! The events that wait for one watcher.

use std::collections::VecDeque;

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{WatchEvent, WatchKind};

/// The events that wait for one watcher. Beyond half of it, a WRITE or CHMOD that repeats the
/// event before it is not queued again; at the bound, new events are dropped, with one warning.
pub const MAX_QUEUED_EVENTS: usize = 65_536;

#[derive(Debug, Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    ready: Notify,
}

#[derive(Debug, Default)]
struct State {
    events: VecDeque<WatchEvent>,
    dropped: u64,
    closed: bool,
}

impl Queue {
    /// Whether the next event would be dropped, so that nothing need be found out for it.
    pub(super) fn is_full(&self) -> bool {
        self.state.lock().events.len() >= MAX_QUEUED_EVENTS
    }

    pub(super) fn push(&self, event: WatchEvent) {
        let mut state = self.state.lock();
        let queued = state.events.len();
        if queued >= MAX_QUEUED_EVENTS {
            state.dropped += 1;
            if state.dropped == 1 {
                tracing::warn!(name = event.name, "events are dropped: nobody takes them");
            }
            return;
        }
        let repeatable = matches!(event.kind, WatchKind::Write | WatchKind::Chmod);
        match state.events.back_mut() {
            Some(last)
                if queued > MAX_QUEUED_EVENTS / 2
                    && repeatable
                    && last.kind == event.kind
                    && last.name == event.name =>
            {
                *last = event;
            }
            _ => state.events.push_back(event),
        }
        drop(state);
        self.ready.notify_one();
    }

    /// The next event; none when the watching has ended and all are taken.
    pub(super) async fn next(&self) -> Option<WatchEvent> {
        loop {
            {
                let mut state = self.state.lock();
                if let Some(event) = state.events.pop_front() {
                    return Some(event);
                }
                if state.closed {
                    return None;
                }
            }
            // A push in between leaves a permit, so this does not wait for it.
            self.ready.notified().await;
        }
    }

    pub(super) fn take_all(&self) -> Vec<WatchEvent> {
        std::mem::take(&mut self.state.lock().events).into()
    }

    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.ready.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(name: &str) -> WatchEvent {
        WatchEvent { name: name.to_owned(), kind: WatchKind::Write, entry: None }
    }

    #[test]
    fn repeats_are_joined_beyond_half_and_dropped_at_the_bound() {
        let queue = Queue::default();
        for _ in 0..MAX_QUEUED_EVENTS {
            queue.push(write("a"));
        }
        assert_eq!(queue.state.lock().events.len(), MAX_QUEUED_EVENTS / 2 + 1);
        for i in 0..MAX_QUEUED_EVENTS {
            queue.push(write(if i % 2 == 0 { "b" } else { "c" }));
        }
        assert!(queue.is_full());
        assert_eq!(queue.take_all().len(), MAX_QUEUED_EVENTS);
        assert!(!queue.is_full());
    }
}
