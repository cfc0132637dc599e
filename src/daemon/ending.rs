//! The end of the daemon: what is told, signalled and waited for once a signal has asked for it.
//!
//! Orchestrators restart envd and wait for its port, so it is gone within [`EXIT_TIME`]: streams end
//! at once with a status, processes are asked to end and then killed, and nothing else is waited for
//! unless the operator gives calls a grace.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    process::Manager,
    wire::shutdown::{Phase, Shutdown},
};

/// How long processes have between SIGTERM and SIGKILL.
pub(super) const KILL_AFTER: Duration = Duration::from_millis(500);
/// How long clients have to take the last of what they are told.
const FLUSH_TIME: Duration = Duration::from_millis(250);
/// How long the whole end may take, beside the operator's grace. The clean-up of uploads and the last
/// lines of the log may take a little more, where a disk or a reader is slow.
pub(super) const EXIT_TIME: Duration = Duration::from_millis(650);

/// What the operator has said of the end.
#[derive(Debug, Clone, Copy)]
pub(super) struct Policy {
    /// The time for unary calls and transfers.
    pub(super) grace: Option<Duration>,
    /// Whether processes are left alone.
    pub(super) keep_processes: bool,
}

/// Ends calls and processes. `drained` gives a future that completes when no connection is left;
/// `again` completes when a second signal asks for the end at once.
pub(super) async fn end<D>(
    shutdown: &Shutdown,
    processes: &Arc<Manager>,
    policy: Policy,
    drained: impl Fn() -> D,
    again: impl Future<Output = ()>,
) where
    D: Future<Output = ()>,
{
    let calls = async {
        if let Some(grace) = policy.grace.filter(|grace| !grace.is_zero()) {
            shutdown.advance(Phase::Draining);
            if tokio::time::timeout(grace, drained()).await.is_err() {
                tracing::warn!("calls still ran after the grace");
            }
        }
        shutdown.advance(Phase::Ending);
        match tokio::time::timeout(FLUSH_TIME, drained()).await {
            Ok(()) => tracing::info!("drained"),
            Err(_) => tracing::info!("connections are cut whose clients do not read"),
        }
    };
    let killed = async {
        if !policy.keep_processes {
            processes.end_all(KILL_AFTER).await;
        }
    };
    let in_order = async { tokio::join!(calls, killed) };
    tokio::select! {
        _ = in_order => {}
        () = again => {
            tracing::warn!("asked to end again: not waiting");
            shutdown.advance(Phase::Ending);
            if !policy.keep_processes {
                processes.end_all(Duration::ZERO).await;
            }
        }
    }
}

/// The moment at which the process is to be gone, for what is still to be done.
pub(super) fn exit_by(asked: Instant, policy: Policy) -> Instant {
    let by = asked + EXIT_TIME;
    match policy.grace {
        // The grace may have been used up.
        Some(_) => by.max(Instant::now() + FLUSH_TIME),
        None => by,
    }
}
