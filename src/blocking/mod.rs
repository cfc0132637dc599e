//! Work that may block, on threads of our own.
//!
//! Not tokio's: its blocking pool panics when the kernel refuses it a thread, which a fork bomb in
//! the sandbox brings about, and all its users share one set of threads, so that a file system that
//! hangs would hang everything. A [`Pool`] has some threads from the start, which stay, and more as
//! they are needed; where the kernel gives none, the work waits for those that live.

use std::{
    collections::VecDeque,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::oneshot;

use crate::sys::fs_credentials;

mod mount;

pub use mount::{MountBusy, stand_on};

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
/// The jobs of one pool that wait for a thread; beyond it, new ones are refused.
pub const MAX_WAITING_JOBS: usize = 1024;
/// How long a thread above a pool's minimum waits for more work.
pub const IDLE_TIME: Duration = Duration::from_secs(10);

/// Why work was not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
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
}

type Job = Box<dyn FnOnce() + Send>;

/// A set of threads. Dropped, it finishes what waits, and its threads leave.
pub struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    /// What the threads do, for messages and for the threads' names.
    name: &'static str,
    min: usize,
    max: usize,
    idle_time: Duration,
    state: Mutex<State>,
    news: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    /// Of the threads, those that wait; a woken one counts until it runs.
    idle: usize,
    closed: bool,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.shared.state.lock();
        f.debug_struct("Pool")
            .field("name", &self.shared.name)
            .field("threads", &state.threads)
            .field("waiting", &state.jobs.len())
            .finish_non_exhaustive()
    }
}

impl Pool {
    /// A pool whose first `min` threads run already. Where the kernel refuses them, they are
    /// started when there is work.
    pub fn new(name: &'static str, min: usize, max: usize) -> Arc<Self> {
        Self::with_idle_time(name, min, max, IDLE_TIME)
    }

    /// The pool for the calls that touch files.
    pub fn for_files() -> Arc<Self> {
        Self::new("files", MIN_FILE_THREADS, MAX_FILE_THREADS)
    }

    fn with_idle_time(
        name: &'static str,
        min: usize,
        max: usize,
        idle_time: Duration,
    ) -> Arc<Self> {
        let (state, news) = (Mutex::default(), Condvar::new());
        let shared = Arc::new(Shared { name, min, max: max.max(1), idle_time, state, news });
        for _ in 0..min {
            shared.state.lock().threads += 1;
            if !shared.start_thread() {
                break;
            }
        }
        Arc::new(Self { shared })
    }

    /// Runs `work` on one of the threads. When this future is dropped before the work has begun, it
    /// is not begun; later, it goes on for nobody.
    ///
    /// # Errors
    /// [`Busy`]; except for [`Busy::Panicked`], the work has not begun.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Busy> {
        self.wait(work, MAX_WAITING_JOBS).await
    }

    /// As [`Pool::run`], for the next step of work whose number the caller bounds: it is not
    /// refused because others wait.
    ///
    /// # Errors
    /// [`Busy::NoThread`], [`Busy::Panicked`].
    pub async fn run_next_step<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Busy> {
        self.wait(work, usize::MAX).await
    }

    /// Runs `work` when there is a thread, for nobody: what has to be cleaned up. Its number is
    /// bounded by that of the things to clean up. Without any thread it is dropped here, undone.
    pub fn run_later(&self, work: impl FnOnce() + Send + 'static) {
        if let Err(error) = self.shared.submit(Box::new(work), usize::MAX) {
            tracing::warn!(%error, "cannot clean up elsewhere");
        }
    }

    async fn wait<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
        limit: usize,
    ) -> Result<T, Busy> {
        let (done, result) = oneshot::channel();
        let job = move || {
            if !done.is_closed() {
                // Whoever has left meanwhile leaves the result to be dropped on this thread.
                let _ = done.send(work());
            }
        };
        self.shared.submit(Box::new(job), limit)?;
        result.await.map_err(|_| Busy::Panicked)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state.lock().closed = true;
        self.shared.news.notify_all();
    }
}

impl Shared {
    fn submit(self: &Arc<Self>, job: Job, limit: usize) -> Result<(), Busy> {
        let mut state = self.state.lock();
        if state.jobs.len() >= limit {
            return Err(Busy::Full(self.name));
        }
        state.jobs.push_back(job);
        if state.jobs.len() <= state.idle {
            self.news.notify_one();
            return Ok(());
        }
        if state.threads >= self.max {
            return Ok(());
        }
        state.threads += 1;
        drop(state);
        if self.start_thread() {
            return Ok(());
        }
        let mut state = self.state.lock();
        if state.threads > 0 {
            // It waits for one of those.
            return Ok(());
        }
        // Nobody would ever run them.
        let lost = std::mem::take(&mut state.jobs);
        drop(state);
        drop(lost);
        Err(Busy::NoThread(self.name))
    }

    /// Starts a thread that has been counted already; false, and no longer counted, when the
    /// kernel refuses it.
    fn start_thread(self: &Arc<Self>) -> bool {
        let shared = Arc::clone(self);
        let name = format!("envd-{}", self.name);
        let started = std::thread::Builder::new().name(name).spawn(move || shared.work());
        if let Err(error) = &started {
            self.state.lock().threads -= 1;
            tracing::warn!(pool = self.name, %error, "cannot start a thread");
        }
        started.is_ok()
    }

    /// The life of a thread.
    fn work(&self) {
        // A thread inherits the credentials of the one that starts it.
        let mut usable = fs_credentials::begin_thread();
        let mut state = self.state.lock();
        loop {
            if !usable {
                break;
            }
            if let Some(job) = state.jobs.pop_front() {
                MutexGuard::unlocked(&mut state, || self.run(job));
                usable = !fs_credentials::thread_is_broken();
                continue;
            }
            if state.closed {
                break;
            }
            state.idle += 1;
            let given_up = if state.threads > self.min {
                self.news.wait_for(&mut state, self.idle_time).timed_out()
            } else {
                self.news.wait(&mut state);
                false
            };
            state.idle -= 1;
            if given_up && state.jobs.is_empty() && state.threads > self.min {
                break;
            }
        }
        state.threads -= 1;
        if !usable && state.threads == 0 {
            // Nobody would run them before the next one comes.
            let lost = std::mem::take(&mut state.jobs);
            drop(state);
            drop(lost);
        }
    }

    fn run(&self, job: Job) {
        // A job owns what it works on, and what it breaks goes with it.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(job)) {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
            let panic = text.unwrap_or_default();
            tracing::error!(pool = self.name, panic, "a job panicked");
        }
    }
}

#[cfg(test)]
impl Pool {
    /// The jobs that wait for a thread.
    pub(crate) fn waiting(&self) -> usize {
        self.shared.state.lock().jobs.len()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    };

    use super::*;

    fn threads(pool: &Pool) -> usize {
        pool.shared.state.lock().threads
    }

    async fn until(what: &str, check: impl Fn() -> bool) {
        for _ in 0..6000 {
            if check() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("never: {what}");
    }

    /// Keeps a thread until the sender is dropped.
    fn hang(pool: &Pool) -> mpsc::Sender<()> {
        let (release, released) = mpsc::channel::<()>();
        pool.run_later(move || {
            let _ = released.recv();
        });
        release
    }

    #[tokio::test]
    async fn grows_while_work_blocks_and_shrinks_to_its_minimum() {
        let pool = Pool::with_idle_time("test", 1, 4, Duration::from_millis(20));
        assert_eq!(threads(&pool), 1);
        let held: Vec<_> = (0..3).map(|_| hang(&pool)).collect();
        assert_eq!(pool.run(|| 7).await, Ok(7));
        assert_eq!(threads(&pool), 4);
        drop(held);
        until("the others leave", || threads(&pool) == 1).await;
        assert_eq!(pool.run(|| 8).await, Ok(8));
    }

    #[tokio::test]
    async fn what_is_too_much_is_refused_and_what_nobody_wants_is_not_begun() {
        let pool = Pool::new("test", 1, 1);
        let release = hang(&pool);
        until("the thread is held", || pool.shared.state.lock().jobs.is_empty()).await;
        let begun = Arc::new(AtomicUsize::new(0));
        let mut waiting = Vec::new();
        for _ in 0..MAX_WAITING_JOBS {
            let begun = Arc::clone(&begun);
            let mut job = Box::pin(pool.run(move || begun.fetch_add(1, Ordering::Relaxed)));
            assert!(futures_util::poll!(&mut job).is_pending());
            waiting.push(job);
        }
        assert_eq!(pool.run(|| ()).await, Err(Busy::Full("test")));
        waiting.truncate(3);
        drop(release);
        for job in waiting {
            job.await.unwrap();
        }
        assert_eq!(pool.run_next_step(|| ()).await, Ok(()));
        assert_eq!(begun.load(Ordering::Relaxed), 3);
    }

    #[tokio::test]
    async fn a_panic_is_an_error_and_the_thread_goes_on() {
        let pool = Pool::new("test", 1, 1);
        assert_eq!(pool.run(|| panic!("as it happens")).await, Err::<(), _>(Busy::Panicked));
        assert_eq!(pool.run(|| 1).await, Ok(1));
        assert_eq!(threads(&pool), 1);
    }

    #[tokio::test]
    async fn a_dropped_pool_finishes_what_waits_and_ends() {
        let pool = Pool::new("test", 2, 2);
        let shared = Arc::clone(&pool.shared);
        let (told, hears) = mpsc::channel();
        pool.run_later(move || told.send(1).unwrap());
        drop(pool);
        assert_eq!(hears.recv(), Ok(1));
        until("the threads leave", || shared.state.lock().threads == 0).await;
    }
}
