//! The end of all processes when the daemon is shut down.
//!
//! On a plain host nobody else would end them: they would be orphans that no client reaches any
//! more. Each tree gets SIGHUP, for shells that ignore SIGTERM at a terminal, and SIGTERM, once, and
//! SIGCONT for what was stopped; what is left after the grace gets SIGKILL. With control groups that
//! is everything in the groups of this daemon, also what ended commands have left behind; without
//! them it is what descends from living commands, looked for once for all of them together.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep, timeout_at};

use super::{Manager, descent};
use crate::sys::procfs::Group;

/// How long killed processes may take to be gone; one in an uninterruptible wait never is.
const AFTER_KILL: Duration = Duration::from_millis(100);
/// The pause between two looks at who is left.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Asks for the end, in this order.
const POLITE: [i32; 3] = [libc::SIGHUP, libc::SIGTERM, libc::SIGCONT];

impl Manager {
    /// Ends every process with all that descends from it, by SIGHUP and SIGTERM, and by SIGKILL what
    /// is left after the grace. From now on none is started, and one that is being started is killed.
    /// Returns when all are gone, soon after the grace at the latest.
    pub async fn end_all(self: &Arc<Self>, grace: Duration) {
        self.close();
        let kill_at = Instant::now() + grace;
        let mut known = descent::Known::default();
        for signal in POLITE {
            // A pass that is held up goes on beside the kill.
            match timeout_at(kill_at, self.signal_everything(signal, known.clone())).await {
                Ok(found) => known = found,
                Err(_) => break,
            }
        }
        if timeout_at(kill_at, self.gone(&known)).await.is_ok() {
            return;
        }
        let deadline = Instant::now() + AFTER_KILL;
        tracing::info!("processes that have not ended are killed");
        let killed = async {
            let known = self.signal_everything(libc::SIGKILL, known).await;
            self.gone(&known).await;
        };
        if timeout_at(deadline, killed).await.is_err() {
            tracing::warn!(processes = self.len(), "processes are left after SIGKILL");
        }
    }

    /// Sends a signal to all trees. Gives what is known of those without a control group, beginning
    /// with what was known before.
    async fn signal_everything(
        self: &Arc<Self>,
        signal: i32,
        known: descent::Known,
    ) -> descent::Known {
        let manager = Arc::clone(self);
        let before = known.clone();
        let signalled = self.trees.run_next_step(move || {
            manager.groups.signal_all(signal);
            let processes = manager.processes();
            let known =
                processes.iter().fold(known, |known, process| process.tree.join(known, signal));
            if known.is_empty() {
                return known;
            }
            match descent::signal(known.clone(), signal, &manager.stop_notes) {
                Ok(found) => found,
                Err(error) => {
                    tracing::debug!(signal, %error, "not all processes were signalled");
                    known
                }
            }
        });
        signalled.await.unwrap_or_else(|error| {
            tracing::warn!(signal, %error, "processes were not signalled");
            before
        })
    }

    /// Waits until no process lives, nor anything that is known of one.
    async fn gone(self: &Arc<Self>, known: &descent::Known) {
        loop {
            if self.is_empty() {
                let (manager, known) = (Arc::clone(self), known.clone());
                let left = self.trees.run_next_step(move || {
                    let lives = |member: &descent::Member| member.group() != Group::Dead;
                    known.members.iter().any(lives) || manager.groups.is_any_left()
                });
                if !left.await.unwrap_or(false) {
                    return;
                }
            }
            sleep(LOOK_AGAIN).await;
        }
    }
}
