//! Work that may block, on threads of our own.
//!
//! Not tokio's: its blocking pool panics when the kernel refuses it a thread, which a fork bomb in
//! the sandbox brings about, and all its users share one set of threads, so that a file system that
//! hangs would hang everything. A [`Pool`] has some threads from the start, which stay, and more as
//! they are needed; where the kernel gives none, the work waits for those that live.
//!
//! A call to a file system whose server does not answer never returns, and keeps its thread. Such a
//! thread stops to count against the bound of its pool once it is [`OVERDUE`], up to
//! [`MAX_STUCK_THREADS`] of them; whoever waits for its job gets an error that names the mount; and
//! further jobs do not enter that mount ([`mount`]). What jobs hold besides threads is bounded by
//! [`JobSlots`], with the same rule.

mod job;
mod job_slots;
mod keep_out;
mod mount;
mod mount_table;
mod pool;
mod walk;

use std::time::Duration;

pub use self::{
    job::{OVERDUE, progress},
    job_slots::{JobSlot, JobSlots, MAX_HUNG_FACTOR},
    keep_out::{is_keeping_out, keep_out_of, keep_out_of_served},
    mount::{
        LOOKUP_WAIT, MAX_PROBES, MAX_STALLED_JOBS, MAX_UNPROBED_JOBS, MountBusy, MountId,
        PROBE_VALID, PROBE_WAIT, QUIET, STALLED, SUSPECT, leave_mount, stand_on, stand_on_again,
        stand_on_also, stand_on_child,
    },
    mount_table::{mount_inside, mounts_in},
    pool::Pool,
    walk::{can_mounts_hang, can_servers_hang, stand_on_path, stand_on_path_also, stand_on_paths},
};

/// The threads for files that are started at once, and stay.
pub const MIN_FILE_THREADS: usize = 4;
/// The most threads for files.
pub const MAX_FILE_THREADS: usize = 64;
/// The threads that start processes, and stay. Few: one start takes less than a millisecond.
pub const MIN_SPAWN_THREADS: usize = 2;
/// The most of them: each start of a command that is on a file system that hangs keeps one, since
/// its parent sleeps until it has executed.
pub const MAX_SPAWN_THREADS: usize = 64;
/// The most threads that look at the directories of processes to start, which may be on a file
/// system that hangs; one of them stays.
pub const MAX_DIRECTORY_THREADS: usize = 64;
/// The most threads that signal and measure trees of processes; one of them stays.
pub const MAX_TREE_THREADS: usize = 4;
/// The threads of one pool whose jobs are overdue, beyond its bound: so many more are started.
pub const MAX_STUCK_THREADS: usize = 192;
/// The jobs of one pool that wait for a thread; beyond it, new ones are refused.
pub const MAX_WAITING_JOBS: usize = 1024;
/// How long a thread above a pool's minimum waits for more work.
pub const IDLE_TIME: Duration = Duration::from_secs(10);
/// How long a pool may take for a job that does nothing. Longer than [`OVERDUE`]: one mount that has
/// just stopped to answer may hold all threads for that time.
pub const ALIVE_WAIT: Duration = Duration::from_secs(5);
/// A job without progress for this long is given up by whoever waits for it if it is on a mount,
/// though the mount answers other calls. Long: writing much to a slow disk can take its time.
pub const JOB_STALL: Duration = Duration::from_secs(60);

/// Why work was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Busy {
    /// Too much waits already.
    #[error("too many calls wait for a thread for {0}: the limit is {MAX_WAITING_JOBS}")]
    Full(&'static str),
    /// The kernel gives no thread, and there is none.
    #[error("no thread for {0}: the kernel refuses to start one")]
    NoThread(&'static str),
    /// It broke down; a fault of this daemon.
    #[error("the daemon could not finish the call; its log says why")]
    Panicked,
    /// It works on a mount that does not answer, and may end at any time or never; or it waits for a
    /// thread, and all threads are there.
    #[error(transparent)]
    Mount(#[from] MountBusy),
}
