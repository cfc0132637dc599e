//! What happens on a connection: how many calls run, and else what it waits for since when.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::Notify, time::Instant};

use super::Limits;

/// What a connection without a call waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waiting {
    ForRequest,
    ForHead,
}

/// How long a connection has for the head of a request before it may be evicted like an idle one.
const MIN_HEAD_TIME: Duration = Duration::from_millis(500);

/// What happens on a connection.
#[derive(Debug)]
pub(super) struct Activity {
    calls: AtomicUsize,
    evicted: AtomicBool,
    /// Since when it waits, and for what; of no meaning while calls run.
    waiting: Mutex<(Instant, Waiting)>,
    pub(super) changed: Notify,
}

impl Activity {
    pub(super) fn new(waiting: Waiting) -> Self {
        let waiting = Mutex::new((Instant::now(), waiting));
        let (calls, evicted) = (AtomicUsize::new(0), AtomicBool::new(false));
        Self { calls, evicted, waiting, changed: Notify::new() }
    }

    /// Since when it has been idle, or slow with the head of a request; `None` while it must stay.
    pub(super) fn evictable_since(&self, now: Instant) -> Option<Instant> {
        if self.calls.load(Ordering::Acquire) > 0 || self.is_evicted() {
            return None;
        }
        let (since, waiting) = *self.waiting.lock();
        let min = match waiting {
            Waiting::ForRequest => Duration::ZERO,
            Waiting::ForHead => MIN_HEAD_TIME,
        };
        (now.saturating_duration_since(since) >= min).then_some(since)
    }

    /// Asks the connection to close, because another one waits for its place.
    pub(super) fn evict(&self) {
        self.evicted.store(true, Ordering::Release);
        self.changed.notify_one();
    }

    pub(super) fn is_evicted(&self) -> bool {
        self.evicted.load(Ordering::Acquire)
    }

    /// Completes when the connection is to close for another one.
    pub(super) async fn evicted(&self) {
        while !self.is_evicted() {
            self.changed.notified().await;
        }
    }

    pub(super) fn timer(&self, limits: &Limits) -> Option<(Instant, Waiting)> {
        if self.calls.load(Ordering::Acquire) > 0 {
            return None;
        }
        let (since, waiting) = *self.waiting.lock();
        let patience = match waiting {
            Waiting::ForRequest => limits.idle_timeout,
            Waiting::ForHead => limits.header_timeout,
        };
        Some((since + patience, waiting))
    }

    pub(super) fn has_calls(&self) -> bool {
        self.calls.load(Ordering::Acquire) > 0
    }

    pub(super) fn bytes_came(&self) {
        let mut waiting = self.waiting.lock();
        if self.calls.load(Ordering::Acquire) == 0 && waiting.1 == Waiting::ForRequest {
            *waiting = (Instant::now(), Waiting::ForHead);
            self.changed.notify_one();
        }
    }

    pub(super) fn begin(self: &Arc<Self>) -> Running {
        self.calls.fetch_add(1, Ordering::AcqRel);
        self.changed.notify_one();
        Running(Arc::clone(self))
    }

    /// From now on it waits for a request.
    pub(super) fn rest(&self) {
        *self.waiting.lock() = (Instant::now(), Waiting::ForRequest);
    }
}

/// A running call: one is dropped with its response's body, another with its request's, of which
/// more may come, and be thrown away, after the answer.
#[derive(Debug)]
pub(super) struct Running(Arc<Activity>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.rest();
        self.0.calls.fetch_sub(1, Ordering::AcqRel);
        self.0.changed.notify_one();
    }
}
