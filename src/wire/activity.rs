//! What happens on a connection: how many calls run, and else what it waits for since when.

use std::{
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

use super::{Limits, shutdown::Reached};

/// What a connection without a call waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waiting {
    ForRequest,
    ForHead,
}

/// What a connection makes room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    /// Another connection.
    Place,
    /// Memory or descriptors, which it holds until it is closed.
    Resources,
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
    /// Why it is to make room, once it is.
    evicted: watch::Sender<Option<Why>>,
    /// Since when the client has taken nothing of what is there for it.
    stalled: Mutex<Option<Instant>>,
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
            evicted: watch::Sender::new(None),
            stalled: Mutex::default(),
            waiting,
            changed: Notify::new(),
        }
    }

    /// Since when it has been idle, or slow with the head of a request; `None` while it must stay.
    pub(super) fn evictable_since(&self, now: Instant) -> Option<Instant> {
        if self.has_calls() || self.is_evicted() {
            return None;
        }
        let (since, waiting) = *self.waiting.lock();
        let min = match waiting {
            Waiting::ForRequest => Duration::ZERO,
            Waiting::ForHead => MIN_HEAD_TIME,
        };
        (now.saturating_duration_since(since) >= min).then_some(since)
    }

    /// Since when its client has stalled a call, if that is at least `min`.
    pub(super) fn stalled_since(&self, now: Instant, min: Duration) -> Option<Instant> {
        if !self.has_calls() || self.is_evicted() {
            return None;
        }
        let since = *self.stalled.lock();
        since.filter(|since| now.saturating_duration_since(*since) >= min)
    }

    /// Whether the client takes nothing of what is there for it.
    pub(super) fn is_stalled(&self) -> bool {
        self.stalled.lock().is_some()
    }

    /// The client has begun to take nothing of what is there for it, or takes it again.
    pub(super) fn set_stalled(&self, stalled: bool) {
        let mut since = self.stalled.lock();
        match stalled {
            true => _ = since.get_or_insert_with(Instant::now),
            false => *since = None,
        }
    }

    /// Asks the connection to close.
    pub(super) fn evict(&self, why: Why) {
        self.evicted.send_replace(Some(why));
        self.changed.notify_one();
    }

    /// Why it is to close for others, if it is.
    pub(super) fn eviction(&self) -> Option<Why> {
        *self.evicted.borrow()
    }

    pub(super) fn is_evicted(&self) -> bool {
        self.eviction().is_some()
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

/// In the extensions of a request: what happens to its connection.
#[derive(Debug, Clone)]
pub(super) struct Connection {
    read_closed: watch::Receiver<bool>,
    evicted: watch::Receiver<Option<Why>>,
}

impl Connection {
    pub(super) fn new(activity: &Activity) -> Self {
        let (read_closed, evicted) = (&activity.read_closed, &activity.evicted);
        Self { read_closed: read_closed.subscribe(), evicted: evicted.subscribe() }
    }

    /// Completes when the client has sent its last byte, over HTTP/1.1.
    pub(super) fn read_closed(&self) -> Reached {
        reached(self.read_closed.clone(), |closed| *closed)
    }

    /// Completes when the connection is to close for others.
    pub(super) fn evicted(&self) -> Reached {
        reached(self.evicted.clone(), Option::is_some)
    }
}

fn reached<T: Send + Sync + 'static>(
    mut state: watch::Receiver<T>,
    wanted: fn(&T) -> bool,
) -> Reached {
    Box::pin(async move {
        // The connection is gone when nobody can tell, and every call with it.
        if state.wait_for(wanted).await.is_err() {
            std::future::pending::<()>().await;
        }
    })
}
