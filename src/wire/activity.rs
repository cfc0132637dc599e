//! What happens on a connection: how many calls run, and else what it waits for since when.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

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
    /// Of the calls, the bodies of requests that have not come whole, or are being thrown away.
    bodies: AtomicUsize,
    /// Whether the client has sent its last byte.
    read_closed: watch::Sender<bool>,
    /// Whether the connection is read to its end before it is closed.
    drain_at_end: AtomicBool,
    evicted: AtomicBool,
    /// Since when it waits, and for what; of no meaning while calls run.
    waiting: Mutex<(Instant, Waiting)>,
    pub(super) changed: Notify,
}

impl Activity {
    pub(super) fn new(waiting: Waiting) -> Self {
        let waiting = Mutex::new((Instant::now(), waiting));
        Self {
            calls: AtomicUsize::new(0),
            bodies: AtomicUsize::new(0),
            read_closed: watch::Sender::new(false),
            drain_at_end: AtomicBool::new(false),
            evicted: AtomicBool::new(false),
            waiting,
            changed: Notify::new(),
        }
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

    /// Whether calls run whose requests have come whole.
    pub(super) fn is_answering(&self) -> bool {
        self.has_calls() && self.bodies.load(Ordering::Acquire) == 0
    }

    /// Notes that the client has sent its last byte.
    pub(super) fn read_side_closed(&self) {
        self.read_closed.send_replace(true);
    }

    /// Has the connection read to its end before it is closed, so that its answer arrives
    /// ([`super::drain`]).
    pub(super) fn drain_at_end(&self) {
        self.drain_at_end.store(true, Ordering::Release);
    }

    pub(super) fn is_drained_at_end(&self) -> bool {
        self.drain_at_end.load(Ordering::Acquire)
    }

    /// A call begins.
    pub(super) fn begin(self: &Arc<Self>) -> Running {
        self.calls.fetch_add(1, Ordering::AcqRel);
        self.changed.notify_one();
        Running { activity: Arc::clone(self), body: false }
    }

    /// The body of a request begins.
    pub(super) fn begin_body(self: &Arc<Self>) -> Running {
        self.bodies.fetch_add(1, Ordering::AcqRel);
        let mut running = self.begin();
        running.body = true;
        running
    }

    /// From now on it waits for a request.
    pub(super) fn rest(&self) {
        *self.waiting.lock() = (Instant::now(), Waiting::ForRequest);
    }
}

/// A running call: one is dropped with its response's body, another with its request's, of which
/// more may come, and be thrown away, after the answer.
#[derive(Debug)]
pub(super) struct Running {
    activity: Arc<Activity>,
    body: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.activity.rest();
        if self.body {
            self.activity.bodies.fetch_sub(1, Ordering::AcqRel);
        }
        self.activity.calls.fetch_sub(1, Ordering::AcqRel);
        self.activity.changed.notify_one();
    }
}

/// In the extensions of an HTTP/1.1 request: what tells that its client has closed its sending side.
#[derive(Debug, Clone)]
pub(super) struct ReadSide(watch::Receiver<bool>);

impl ReadSide {
    pub(super) fn new(activity: &Activity) -> Self {
        Self(activity.read_closed.subscribe())
    }

    /// Completes when the client has sent its last byte.
    pub(super) fn closed(mut self) -> Pin<Box<dyn Future<Output = ()> + Send + Sync>> {
        Box::pin(async move {
            // The connection is gone when nobody can tell, and every call with it.
            if self.0.wait_for(|closed| *closed).await.is_err() {
                std::future::pending::<()>().await;
            }
        })
    }
}
