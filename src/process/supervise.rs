//! From a process's exit to its end: the one task that waits for it.

use std::{io, os::fd::AsFd, sync::Arc, time::Duration};

use tokio::{
    io::Interest,
    sync::{OwnedSemaphorePermit, watch},
    time::{Instant, sleep_until, timeout_at},
};

use super::{
    Ending, Manager, Process,
    output::{Progress, Source, pump},
};
use crate::sys::pidfd::{self, Exit};

/// A timeout beyond this is none: it would overflow the clock.
pub const MAX_TIMEOUT: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Starts the tasks of a process: one for each channel, and the one that waits for its exit. The
/// slot is free again when all of them have ended.
pub(super) fn supervise(
    manager: Arc<Manager>,
    process: Arc<Process>,
    sources: Vec<Source>,
    timeout: Option<Duration>,
    slot: OwnedSemaphorePermit,
) {
    let slot = Arc::new(slot);
    let (exited, exit_seen) = watch::channel(false);
    let channels = sources
        .into_iter()
        .map(|source| {
            let (progress, seen) = watch::channel(Progress::Open);
            let journal = Arc::clone(&process.journal);
            let reading = pump(source, journal, exit_seen.clone(), progress);
            let slot = Arc::clone(&slot);
            tokio::spawn(async move {
                reading.await;
                drop(slot);
            });
            seen
        })
        .collect();
    tokio::spawn(async move {
        let (exit, timed_out) = exit(&process, timeout).await;
        exited.send_replace(true);
        process.input.close();
        process.journal.exited();
        drain(channels, manager.options.drain_grace).await;
        let ending = match exit {
            Ok(exit) => Ending::new(exit, timed_out),
            Err(error) => Ending::unknown(&error, timed_out),
        };
        tracing::debug!(pid = process.pid(), status = ending.status, "process ended");
        // In this order: whoever sees the end finds the process neither among the live ones nor
        // among the zombies; and until it has left the registry its pid is not reused.
        manager.retire(&process);
        let _ = pidfd::wait(process.pidfd.as_fd());
        process.journal.end(ending);
        drop(process);
        drop(slot);
    });
}

/// Waits for the exit, and kills the process when its time runs out.
async fn exit(process: &Process, timeout: Option<Duration>) -> (io::Result<Exit>, bool) {
    // The zombie stays for now: it keeps the pid.
    let exit = process.pidfd.async_io(Interest::READABLE, |fd| {
        pidfd::peek(fd.as_fd())?.ok_or_else(|| io::ErrorKind::WouldBlock.into())
    });
    let Some(timeout) = timeout.filter(|timeout| *timeout < MAX_TIMEOUT) else {
        return (exit.await, false);
    };
    let deadline = Instant::now() + timeout;
    tokio::pin!(exit);
    tokio::select! {
        biased;
        exit = &mut exit => (exit, false),
        () = sleep_until(deadline) => {
            let _ = pidfd::send_signal(process.pidfd.as_fd(), libc::SIGKILL);
            (exit.await, true)
        }
    }
}

/// Waits until all that the process wrote is in the journal (however long a slow subscriber makes
/// that), then a moment for those who still hold a channel open.
async fn drain(mut channels: Vec<watch::Receiver<Progress>>, grace: Duration) {
    for channel in &mut channels {
        // An error means that the reader is gone; nothing more comes from there.
        let _ = channel.wait_for(|progress| *progress >= Progress::Drained).await;
    }
    let grace = Instant::now() + grace;
    for channel in &mut channels {
        let closed = channel.wait_for(|progress| *progress == Progress::Closed);
        let _ = timeout_at(grace, closed).await;
    }
}
