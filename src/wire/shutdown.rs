//! The daemon's shutdown, as calls see it.
//!
//! Streams end at once, with `unavailable` and a text that says why, in the caller's protocol: a
//! client that is cut off without a status cannot tell a restart from a fault. Unary calls and
//! transfers may be given a time of their own; when it is over, or where there is none, they end in
//! the same way. New calls on connections that are still open are refused.

use std::pin::Pin;

use tokio::sync::watch;
use tonic::Status;

/// What every call is told that ends because of the shutdown.
pub const SHUTTING_DOWN: &str = "the daemon is shutting down";

/// How far the shutdown has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// There is none.
    Serving,
    /// Streams end, and nothing new begins.
    Draining,
    /// Everything ends.
    Ending,
}

/// Announces the phases.
#[derive(Debug)]
pub struct Shutdown(watch::Sender<Phase>);

/// Sees the phases.
#[derive(Debug, Clone)]
pub struct Phases(watch::Receiver<Phase>);

/// Completes when a phase has been reached.
pub(super) type Reached = Pin<Box<dyn Future<Output = ()> + Send + Sync>>;

impl Shutdown {
    /// A daemon that serves.
    pub fn new() -> (Self, Phases) {
        let (sender, receiver) = watch::channel(Phase::Serving);
        (Self(sender), Phases(receiver))
    }

    /// The shutdown has come so far. It never goes back.
    pub fn advance(&self, phase: Phase) {
        self.0.send_if_modified(|current| {
            let later = phase > *current;
            *current = phase.max(*current);
            later
        });
    }
}

impl Phases {
    /// Those of a server that is never shut down in order.
    pub fn none() -> Self {
        Self(watch::channel(Phase::Serving).1)
    }

    /// Whether this phase has been reached.
    pub fn is(&self, phase: Phase) -> bool {
        *self.0.borrow() >= phase
    }

    /// Waits until this phase has been reached.
    pub fn reached(&self, phase: Phase) -> Reached {
        let mut phases = self.0.clone();
        Box::pin(async move {
            // Who could announce it is gone when the runtime ends, and every call with it.
            if phases.wait_for(|current| *current >= phase).await.is_err() {
                std::future::pending::<()>().await;
            }
        })
    }
}

/// The status of a call that ends because of the shutdown.
pub fn status() -> Status {
    Status::unavailable(SHUTTING_DOWN)
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn phases_are_reached_in_order_and_never_left() {
        let (shutdown, phases) = Shutdown::new();
        let mut waiting = [phases.reached(Phase::Draining), phases.reached(Phase::Ending)];
        let mut done = || waiting.each_mut().map(|phase| phase.as_mut().now_or_never().is_some());
        assert_eq!(done(), [false, false]);
        shutdown.advance(Phase::Draining);
        assert!(phases.is(Phase::Draining) && !phases.is(Phase::Ending));
        shutdown.advance(Phase::Serving);
        assert!(phases.is(Phase::Draining));
        shutdown.advance(Phase::Ending);
        assert!(phases.reached(Phase::Draining).now_or_never().is_some());
        assert!(phases.reached(Phase::Ending).now_or_never().is_some());
        assert!(Phases::none().reached(Phase::Draining).now_or_never().is_none());
    }
}
