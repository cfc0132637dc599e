//! From a process's exit to its end: the one task that waits for it.

use std::{
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{OwnedSemaphorePermit, watch},
    time::{Instant, sleep, sleep_until},
};

use super::{
    Ending, KillScope, Manager, Process, TimeLimit,
    descent::Known,
    ending::{Cause, Circumstances},
    output::{Progress, Source, pump},
    settle::{self, Flow, Patience, Reader},
    tree::Conclusion,
};
use crate::sys::pidfd::Exit;

/// A timeout beyond this is none: it would overflow the clock.
pub const MAX_TIMEOUT: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// When a tree that could not be killed is to be killed again; twice as long each time.
const KILL_AGAIN: Duration = Duration::from_secs(1);
/// The longest time between two attempts.
const MAX_KILL_AGAIN: Duration = Duration::from_secs(60);
/// The attempts to kill what is left of a tree whose process has exited.
const MAX_KILLS_OF_REST: usize = 8;

/// The times after which a process is made to end.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    /// It alone, by SIGKILL.
    pub(super) timeout: Option<Duration>,
    /// Its tree.
    pub(super) time_limit: Option<TimeLimit>,
    /// Whether `timeout` is for the tree as well.
    pub(super) kill_scope: KillScope,
}

/// Starts the tasks of a process: one for each channel, and the one that waits for its exit. The
/// slot is free again when all of them have ended.
pub(super) fn supervise(
    manager: Arc<Manager>,
    process: Arc<Process>,
    sources: Vec<Source>,
    limits: Times,
    exec_error: Option<i32>,
    slot: OwnedSemaphorePermit,
) {
    let slot = Arc::new(slot);
    let (exited, exit_seen) = watch::channel(false);
    let mut readers: Vec<Reader> = sources
        .into_iter()
        .map(|source| {
            let (progress, seen) = watch::channel(Progress::Open);
            let flow = Arc::new(Flow::default());
            let journal = (process.pid(), Arc::clone(&process.journal));
            let reading = pump(source, journal, exit_seen.clone(), (progress, Arc::clone(&flow)));
            let slot = Arc::clone(&slot);
            tokio::spawn(async move {
                reading.await;
                drop(slot);
            });
            Reader { progress: seen, flow }
        })
        .collect();
    tokio::spawn(async move {
        let Exited { exit, cause, rest } = exit(&process, limits).await;
        let exited_at = SystemTime::now();
        exited.send_replace(true);
        process.input.close();
        process.journal.exited();
        let conclusion = conclude(&manager, &process).await;
        let gone = conclusion.gone;
        if let Some((kill_at, found)) = rest.filter(|_| !gone) {
            tokio::spawn(kill_rest(
                Arc::clone(&manager),
                Arc::clone(&process),
                kill_at,
                found,
                Arc::clone(&slot),
            ));
        }
        settle::drained(&mut readers).await;
        let is_killed =
            matches!(exit, Ok(Exit::Signalled { signal: libc::SIGKILL, .. })) && conclusion.killed;
        let options = &manager.options;
        let patience = Patience { grace: options.drain_grace, limit: options.drain_limit };
        // Whoever kills a process does not wait for what its descendants have to say.
        let patience = Some(patience).filter(|_| !is_killed);
        let held = settle::settle(&manager, &process, &mut readers, patience).await;
        if held.truncated {
            tracing::warn!(
                pid = process.pid(),
                limit = ?patience.map(|patience| patience.limit),
                "the output of a process that has exited is cut: a background process still writes \
                 to it or uses processor time"
            );
        }
        let known = Circumstances { exited_at, exec_error, cause, conclusion, held };
        let ending = Ending::of_process(exit, known);
        tracing::debug!(pid = process.pid(), status = ending.status, "process ended");
        // In this order: whoever sees the end finds the process neither among the live ones nor
        // among the zombies; and until it has left the registry its pid is not reused.
        manager.retire(&process);
        process.tree.reap(process.exit.child());
        process.journal.end(ending);
        if !gone {
            process.tree.linger(&manager);
        }
        drop(process);
        drop(slot);
    });
}

/// How a process came to its exit.
struct Exited {
    exit: io::Result<Exit>,
    cause: Option<Cause>,
    /// When the rest of the tree is to be killed that was asked to end, and who was found then.
    rest: Option<(Instant, Known)>,
}

/// Waits for the exit, and makes the process end when its time runs out.
async fn exit(process: &Process, Times { timeout, time_limit, kill_scope }: Times) -> Exited {
    // The zombie stays for now: it keeps the pid.
    let exit = process.exit.exited();
    tokio::pin!(exit);
    let start = Instant::now();
    let after = |span: Duration| (span < MAX_TIMEOUT).then(|| start + span);
    let mut deadline = timeout.and_then(|span| Some((after(span)?, span)));
    let mut limit = time_limit.and_then(|limit| Some((after(limit.timeout)?, limit)));
    let mut cause = None;
    let mut rest: Option<(Instant, Known)> = None;
    let (mut killed, mut again) = (false, KILL_AGAIN);
    loop {
        let kill_at = rest.as_ref().map(|(at, _)| *at).filter(|_| !killed);
        tokio::select! {
            biased;
            exit = &mut exit => {
                return Exited { exit, cause, rest: rest.filter(|_| !killed) };
            }
            Some(()) = until(deadline.map(|(at, _)| at)) => {
                if let Some((_, span)) = deadline.take() {
                    cause = cause.or(Some(Cause::Deadline(span)));
                    match kill_scope {
                        KillScope::Process => {
                            let _ = process.signal(libc::SIGKILL);
                        }
                        // At once, and again while that fails.
                        KillScope::Tree => {
                            let known = rest.take().map(|(_, known)| known).unwrap_or_default();
                            rest = Some((Instant::now(), known));
                            killed = false;
                        }
                    }
                }
            }
            Some(()) = until(limit.as_ref().map(|(at, _)| *at)) => {
                if let Some((_, limit)) = limit.take() {
                    cause = cause.or(Some(Cause::TimeLimit(limit.timeout)));
                    let found = process.terminate_tree().await;
                    rest = Some((Instant::now() + limit.grace, found));
                }
            }
            Some(()) = until(kill_at) => {
                let known = rest.as_ref().map(|(_, known)| known.clone()).unwrap_or_default();
                let Err(error) = process.finish_tree(known).await else {
                    killed = true;
                    continue;
                };
                tracing::warn!(pid = process.pid(), %error, "not killed after its time");
                if let Some((at, _)) = &mut rest {
                    *at = Instant::now() + again;
                    again = MAX_KILL_AGAIN.min(again * 2);
                }
            }
        }
    }
}

/// Waits for a moment, if there is one to wait for.
async fn until(moment: Option<Instant>) -> Option<()> {
    sleep_until(moment?).await;
    Some(())
}

/// Asks the tree how it went, and removes its control group if that is empty.
async fn conclude(manager: &Arc<Manager>, process: &Arc<Process>) -> Conclusion {
    let (again, looking) = (Arc::clone(process), Arc::clone(manager));
    let concluded = manager.trees.run_next_step(move || {
        looking.groups.sweep_missed();
        again.tree.conclude(again.exit.child())
    });
    concluded.await.unwrap_or_else(|error| {
        tracing::warn!(pid = process.pid(), %error, "nothing is known of what it used");
        Conclusion::default()
    })
}

/// Kills what has not ended in the time that the tree had for it, though its process has.
async fn kill_rest(
    manager: Arc<Manager>,
    process: Arc<Process>,
    at: Instant,
    known: Known,
    slot: Arc<OwnedSemaphorePermit>,
) {
    sleep_until(at).await;
    let mut again = KILL_AGAIN;
    for _ in 0..MAX_KILLS_OF_REST {
        let (tree, known) = (Arc::clone(&process.tree), known.clone());
        let error = match manager.trees.run_next_step(move || tree.kill_rest(known)).await {
            Ok(Ok(())) => break,
            Ok(Err(error)) => error,
            Err(busy) => io::Error::other(busy),
        };
        tracing::warn!(pid = process.pid(), %error, "its descendants were not all killed");
        sleep(again).await;
        again = MAX_KILL_AGAIN.min(again * 2);
    }
    drop(slot);
}
