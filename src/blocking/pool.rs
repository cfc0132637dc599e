//! A set of threads for work that may block.

use std::{
    collections::VecDeque,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, OnceLock},
    time::Duration,
};

use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::{
    runtime::Handle,
    sync::oneshot,
    time::{sleep, timeout},
};

use super::{
    ALIVE_WAIT, Busy, IDLE_TIME, JOB_STALL, MAX_FILE_THREADS, MAX_STUCK_THREADS, MAX_WAITING_JOBS,
    MIN_FILE_THREADS, MountBusy, OVERDUE,
    job::{Job, Running, millis},
    mount, mount_table,
};
use crate::sys::fs_credentials;

/// How often a pool with waiting jobs looks whether running ones have become overdue.
const GROW_INTERVAL: Duration = Duration::from_millis(100);
/// How often whoever waits for an overdue job looks whether its mount answers.
const HUNG_INTERVAL: Duration = Duration::from_millis(100);

/// Work that waits for a thread.
struct Queued {
    job: Arc<Job>,
    work: Box<dyn FnOnce() + Send>,
}

/// A set of threads. Dropped, it finishes what waits, and its threads leave.
pub struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    /// What the threads do, for messages and for the threads' names.
    name: &'static str,
    min: usize,
    /// The most threads whose jobs are not overdue.
    max: usize,
    idle_time: Duration,
    /// See [`Pool::before_each_job`].
    before: OnceLock<Box<dyn Fn() + Send + Sync>>,
    state: Mutex<State>,
    news: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Queued>,
    /// The jobs that threads work on.
    running: Vec<Arc<Job>>,
    threads: usize,
    /// Of the threads, those that wait; a woken one counts until it runs.
    idle: usize,
    /// Whether a task looks for overdue jobs while others wait.
    growing: bool,
    closed: bool,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.shared.state.lock();
        f.debug_struct("Pool")
            .field("name", &self.shared.name)
            .field("threads", &state.threads)
            .field("waiting", &state.queue.len())
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
        // The table of mounts stays open; it is so before the first call.
        mount_table::is_any_risky();
        Self::new("files", MIN_FILE_THREADS, MAX_FILE_THREADS)
    }

    fn with_idle_time(
        name: &'static str,
        min: usize,
        max: usize,
        idle_time: Duration,
    ) -> Arc<Self> {
        let (state, news) = (Mutex::default(), Condvar::new());
        let (max, before) = (max.max(1), OnceLock::new());
        let shared = Arc::new(Shared { name, min, max, idle_time, before, state, news });
        for _ in 0..min {
            shared.state.lock().threads += 1;
            if !shared.start_thread() {
                break;
            }
        }
        Arc::new(Self { shared })
    }

    /// Calls `hook` before each job, on its thread. Only the first hook counts.
    pub fn before_each_job(&self, hook: impl Fn() + Send + Sync + 'static) {
        let _ = self.shared.before.set(Box::new(hook));
    }

    /// What the threads do.
    pub fn name(&self) -> &'static str {
        self.shared.name
    }

    /// Runs `work` on one of the threads. When this future is dropped before the work has begun, it
    /// is not begun; later, it goes on for nobody.
    ///
    /// # Errors
    /// [`Busy`]; with [`Busy::Mount`] the work may have begun and may still go on, for nobody. Except
    /// for that and [`Busy::Panicked`], it has not begun.
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
    /// [`Busy::NoThread`], [`Busy::Panicked`], [`Busy::Mount`].
    pub async fn run_next_step<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Busy> {
        self.wait(work, usize::MAX).await
    }

    /// Runs `work` when there is a thread, for nobody: what has to be cleaned up. Its number is
    /// bounded by that of the things to clean up. Without any thread it is dropped here, undone.
    pub fn run_later(&self, work: impl FnOnce() + Send + 'static) {
        let queued = Queued { job: Arc::default(), work: Box::new(work) };
        if let Err(error) = self.shared.submit(queued, usize::MAX) {
            tracing::warn!(%error, "cannot clean up elsewhere");
        }
    }

    /// Whether a job is run within [`ALIVE_WAIT`]: a pool whose threads all hang runs none any more.
    pub async fn is_alive(&self) -> bool {
        matches!(timeout(ALIVE_WAIT, self.run_next_step(|| ())).await, Ok(Ok(())))
    }

    /// Runs `work` for a thread that waits for it, at most for `limit`.
    ///
    /// # Errors
    /// [`Busy`]; [`Busy::Mount`] when it takes longer, and on a mount that does not answer. With
    /// `Ok(None)` it takes longer, and no mount is known.
    pub fn run_and_block<T: Send + 'static>(
        &self,
        limit: Duration,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<Option<T>, Busy> {
        let (done, result) = std::sync::mpsc::sync_channel(1);
        let job = Arc::new(Job::default());
        let work = Box::new(move || {
            let _ = done.send(work());
        });
        self.shared.submit(Queued { job: Arc::clone(&job), work }, MAX_WAITING_JOBS)?;
        match result.recv_timeout(limit) {
            Ok(value) => Ok(Some(value)),
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => Err(Busy::Panicked),
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                mount::given_up(&job).map_or(Ok(None), |busy| Err(busy.into()))
            }
        }
    }

    async fn wait<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
        limit: usize,
    ) -> Result<T, Busy> {
        let (done, mut result) = oneshot::channel();
        let job = Arc::new(Job::default());
        let work = Box::new(move || {
            if !done.is_closed() {
                // Whoever has left meanwhile leaves the result to be dropped on this thread.
                let _ = done.send(work());
            }
        });
        self.shared.submit(Queued { job: Arc::clone(&job), work }, limit)?;
        tokio::select! {
            biased;
            result = &mut result => result.map_err(|_| Busy::Panicked),
            hung = self.shared.hung(&job) => Err(hung.into()),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state.lock().closed = true;
        self.shared.news.notify_all();
    }
}

impl Shared {
    fn submit(self: &Arc<Self>, queued: Queued, limit: usize) -> Result<(), Busy> {
        let mut state = self.state.lock();
        if state.queue.len() >= limit {
            return Err(Busy::Full(self.name));
        }
        state.queue.push_back(queued);
        if state.queue.len() <= state.idle {
            self.news.notify_one();
            return Ok(());
        }
        if !self.may_grow(&state) {
            self.grow_later(&mut state);
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
        let lost = std::mem::take(&mut state.queue);
        drop(state);
        drop(lost);
        Err(Busy::NoThread(self.name))
    }

    /// Whether there may be one thread more: those whose jobs are overdue do not count, up to
    /// [`MAX_STUCK_THREADS`].
    fn may_grow(&self, state: &State) -> bool {
        if state.threads < self.max {
            return true;
        }
        if state.threads >= self.max + MAX_STUCK_THREADS {
            return false;
        }
        let overdue = state.running.iter().filter(|job| job.is_overdue()).count();
        state.threads - overdue.min(state.threads) < self.max
    }

    /// Starts threads for what waits as jobs become overdue. A task does it that exists while
    /// something waits; outside of the runtime the next job does it.
    fn grow_later(self: &Arc<Self>, state: &mut State) {
        if state.growing {
            return;
        }
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        state.growing = true;
        let shared = Arc::clone(self);
        runtime.spawn(async move {
            loop {
                sleep(GROW_INTERVAL).await;
                let mut state = shared.state.lock();
                if state.queue.is_empty() || state.closed {
                    state.growing = false;
                    return;
                }
                let mut more = 0;
                while more < state.queue.len().saturating_sub(state.idle) && shared.may_grow(&state)
                {
                    state.threads += 1;
                    more += 1;
                }
                drop(state);
                for _ in 0..more {
                    shared.start_thread();
                }
            }
        });
    }

    /// Returns once a job is overdue on a mount that does not answer, or waits behind such jobs.
    async fn hung(&self, job: &Arc<Job>) -> MountBusy {
        sleep(OVERDUE).await;
        loop {
            if !job.has_begun() {
                let state = self.state.lock();
                let full = state.threads >= self.max + MAX_STUCK_THREADS;
                let all = full && state.running.iter().all(|job| job.is_overdue());
                if all && let Some(busy) = mount::busiest(state.running.iter()) {
                    return busy;
                }
            } else if job.is_overdue() && !job.is_asking() {
                if let Some(busy) = mount::hung(job) {
                    return busy;
                }
                if job.quiet_for() > millis(JOB_STALL)
                    && let Some(busy) = mount::given_up(job)
                {
                    return busy;
                }
            }
            sleep(HUNG_INTERVAL).await;
        }
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
            if let Some(queued) = state.queue.pop_front() {
                let job = Arc::clone(&queued.job);
                state.running.push(Arc::clone(&job));
                MutexGuard::unlocked(&mut state, || self.run(queued));
                state.running.retain(|other| !Arc::ptr_eq(other, &job));
                usable = !fs_credentials::thread_is_broken();
                if self.has_too_many(&state) {
                    break;
                }
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
            if given_up && state.queue.is_empty() && state.threads > self.min {
                break;
            }
        }
        state.threads -= 1;
        if !usable && state.threads == 0 {
            // Nobody would run them before the next one comes.
            let lost = std::mem::take(&mut state.queue);
            drop(state);
            drop(lost);
        }
    }

    /// Whether a thread that has ended its job leaves: jobs that were overdue have gone on, and more
    /// threads run than the bound allows.
    fn has_too_many(&self, state: &State) -> bool {
        if state.threads <= self.max {
            return false;
        }
        let overdue = state.running.iter().filter(|job| job.is_overdue()).count();
        state.threads - overdue.min(state.threads) > self.max
    }

    fn run(&self, queued: Queued) {
        let running = Running::begin(queued.job);
        // A job owns what it works on, and what it breaks goes with it.
        let panic = catch_unwind(AssertUnwindSafe(|| {
            if let Some(before) = self.before.get() {
                before();
            }
            (queued.work)();
        }));
        drop(running);
        if let Err(panic) = panic {
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
        self.shared.state.lock().queue.len()
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
        until("the thread is held", || pool.shared.state.lock().queue.is_empty()).await;
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
