//! What is known of a job while it runs: where it works, and when it was last seen to go on.

use std::{
    cell::RefCell,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// A job that has shown no progress for this long may be in a call that never returns: it no longer
/// counts against the bound of its pool.
pub const OVERDUE: Duration = Duration::from_secs(2);

/// The mounts on which one job works at the same time: a start depends on those of its command, its
/// interpreter and its working directory.
const MAX_MOUNTS: usize = 3;

/// One job of a pool.
#[derive(Debug, Default)]
pub(super) struct Job {
    /// Milliseconds of the process's clock, at the last sign of progress; 0 before it has begun and
    /// once it has ended.
    since: AtomicU64,
    /// The mounts on which it works, the one declared last first; 0 for none that is known. Changed
    /// by the registry of mounts, under its lock, only.
    mounts: [AtomicU64; MAX_MOUNTS],
    /// It waits to learn whether a mount answers.
    asking: AtomicBool,
}

thread_local! {
    static CURRENT: RefCell<Option<Arc<Job>>> = const { RefCell::new(None) };
}

/// Milliseconds since the process began to count, from 1.
pub(super) fn now() -> u64 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    u64::try_from(START.elapsed().as_millis()).unwrap_or(u64::MAX - 1) + 1
}

/// A duration as [`now`] counts.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The job that this thread works on.
pub(super) fn current() -> Option<Arc<Job>> {
    CURRENT.with_borrow(Clone::clone)
}

/// Says that the job on this thread goes on: long work calls it between system calls.
pub fn progress() {
    CURRENT.with_borrow(|job| {
        if let Some(job) = job {
            job.progress();
        }
    });
}

/// Makes a job this thread's own until it is dropped.
#[derive(Debug)]
pub(super) struct Running(Arc<Job>);

impl Running {
    pub(super) fn begin(job: Arc<Job>) -> Self {
        job.progress();
        CURRENT.set(Some(Arc::clone(&job)));
        Self(job)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        CURRENT.set(None);
        super::mount::leave(&self.0);
        self.0.since.store(0, Ordering::Relaxed);
    }
}

impl Job {
    pub(super) fn progress(&self) {
        self.since.store(now(), Ordering::Relaxed);
    }

    /// The mount that was declared last.
    pub(super) fn mount(&self) -> Option<u64> {
        self.mounts().next()
    }

    /// The mounts on which it works.
    pub(super) fn mounts(&self) -> impl Iterator<Item = u64> + use<> {
        let ids = self.mounts.each_ref().map(|id| id.load(Ordering::Relaxed));
        ids.into_iter().filter(|id| *id != 0)
    }

    /// Works on one mount more; gives that which it then works on no longer.
    pub(super) fn add_mount(&self, id: u64) -> Option<u64> {
        let mut pushed = id;
        for place in &self.mounts {
            pushed = place.swap(pushed, Ordering::Relaxed);
        }
        Some(pushed).filter(|id| *id != 0)
    }

    pub(super) fn clear_mounts(&self) {
        for place in &self.mounts {
            place.store(0, Ordering::Relaxed);
        }
    }

    pub(super) fn set_asking(&self, asking: bool) {
        self.asking.store(asking, Ordering::Relaxed);
    }

    pub(super) fn is_asking(&self) -> bool {
        self.asking.load(Ordering::Relaxed)
    }

    pub(super) fn has_begun(&self) -> bool {
        self.since.load(Ordering::Relaxed) != 0
    }

    /// For how long it has shown no progress.
    pub(super) fn quiet_for(&self) -> u64 {
        match self.since.load(Ordering::Relaxed) {
            0 => 0,
            since => now().saturating_sub(since),
        }
    }

    /// Whether it no longer counts against the bound of its pool.
    pub(super) fn is_overdue(&self) -> bool {
        self.is_asking() || self.quiet_for() > millis(OVERDUE)
    }
}
