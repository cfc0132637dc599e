//! The registry: which processes live, and how the last ones ended.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::Semaphore, time::Instant};

use super::{Ending, Process, StartError, StartSpec, Subscription, start};
use crate::{
    blocking::{MAX_DIRECTORY_THREADS, Pool, SPAWN_THREADS},
    sys::pidfd,
};

/// The most processes at a time. One that has ended counts for as long as a background child of it
/// holds its output open, since that is still read.
pub const MAX_PROCESSES: usize = 4096;

/// How long the ending of a process can be asked for.
pub const RETENTION: Duration = Duration::from_secs(30);

/// The most endings kept; beyond it the oldest goes.
pub const MAX_RETAINED: usize = 256;

/// Which process is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selector {
    /// By process id.
    Pid(u32),
    /// By tag: the one started last, if several have it.
    Tag(String),
}

/// A process that was found.
#[derive(Debug, Clone)]
pub enum Found {
    /// It lives.
    Live(Arc<Process>),
    /// It ended a short while ago.
    Ended {
        /// Its process id.
        pid: u32,
        /// Its tag.
        tag: Option<String>,
        /// How.
        ending: Ending,
    },
}

/// All processes of the daemon.
#[derive(Debug)]
pub struct Manager {
    state: Mutex<State>,
    pub(super) slots: Arc<Semaphore>,
    /// The limits of open files (soft, hard) that processes get, where the daemon has changed its
    /// own.
    pub(super) nofile: Option<(u64, u64)>,
    /// Where children are made. Apart from the work on files, so that a start never waits for a
    /// file system that hangs.
    pub(super) spawners: Arc<Pool>,
    /// Where working directories are looked at, which may be on such a file system.
    pub(super) directories: Arc<Pool>,
}

#[derive(Debug, Default)]
struct State {
    live: HashMap<u32, Arc<Process>>,
    started: u64,
    /// The oldest first.
    retained: VecDeque<Retained>,
}

#[derive(Debug)]
struct Retained {
    pid: u32,
    tag: Option<String>,
    ending: Ending,
    since: Instant,
}

impl Manager {
    /// A manager without processes. There should be one.
    pub fn new() -> Arc<Self> {
        Self::with_nofile(None)
    }

    /// As [`Manager::new`], for a daemon that has raised its own limit of open files: its processes
    /// get these (soft, hard) limits instead of its own.
    pub fn with_nofile(nofile: Option<(u64, u64)>) -> Arc<Self> {
        pidfd::keep_exit_statuses();
        Arc::new(Self {
            state: Mutex::default(),
            slots: Arc::new(Semaphore::new(MAX_PROCESSES)),
            nofile,
            spawners: Pool::new("spawn", SPAWN_THREADS, SPAWN_THREADS),
            directories: Pool::new("cwd", 1, MAX_DIRECTORY_THREADS),
        })
    }

    /// Starts a process and subscribes to it before it can write. Once begun, dropping the future
    /// does not stop it: the process then runs without a subscriber.
    ///
    /// # Errors
    /// [`StartError`]; no process is left then.
    pub async fn start(
        self: &Arc<Self>,
        spec: StartSpec,
    ) -> Result<(Arc<Process>, Subscription), StartError> {
        let slot = Arc::clone(&self.slots).try_acquire_owned().map_err(|_| StartError::TooMany)?;
        // On a task of its own, so that no child is left alone between clone and registration.
        let starting = tokio::spawn(start::start(Arc::clone(self), spec, slot));
        starting.await.unwrap_or_else(|error| Err(StartError::Task(error.to_string())))
    }

    /// Finds a process among the live ones, then among those that ended lately.
    pub fn find(&self, selector: &Selector) -> Option<Found> {
        let mut state = self.state.lock();
        if let Some(process) = state.live(selector) {
            return Some(Found::Live(process));
        }
        state.expire(Instant::now());
        let ended = state.retained.iter().rev().find(|ended| match selector {
            Selector::Pid(pid) => ended.pid == *pid,
            Selector::Tag(tag) => ended.tag.as_ref() == Some(tag),
        })?;
        Some(Found::Ended { pid: ended.pid, tag: ended.tag.clone(), ending: ended.ending.clone() })
    }

    /// Finds a live process.
    pub fn live(&self, selector: &Selector) -> Option<Arc<Process>> {
        self.state.lock().live(selector)
    }

    /// All live processes, in the order of their starts.
    pub fn list(&self) -> Vec<Arc<Process>> {
        let mut all: Vec<_> = self.state.lock().live.values().cloned().collect();
        all.sort_by_key(|process| process.number);
        all
    }

    /// How many processes live.
    pub fn len(&self) -> usize {
        self.state.lock().live.len()
    }

    /// Whether no process lives.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The number of the next start.
    pub(super) fn next_number(&self) -> u64 {
        let mut state = self.state.lock();
        state.started += 1;
        state.started
    }

    /// Makes a new process known. Endings that its pid or tag would now name are forgotten.
    pub(super) fn register(&self, process: &Arc<Process>) {
        let mut state = self.state.lock();
        let tag = process.tag();
        state.retained.retain(|ended| {
            ended.pid != process.pid() && (tag.is_none() || ended.tag.as_deref() != tag)
        });
        state.live.insert(process.pid(), Arc::clone(process));
    }

    /// Moves a process from the live ones to the ended ones.
    pub(super) fn retire(&self, process: &Arc<Process>, ending: &Ending) {
        let now = Instant::now();
        let mut state = self.state.lock();
        if state.live.get(&process.pid()).is_some_and(|live| Arc::ptr_eq(live, process)) {
            state.live.remove(&process.pid());
        }
        state.expire(now);
        if state.retained.len() >= MAX_RETAINED {
            state.retained.pop_front();
        }
        state.retained.push_back(Retained {
            pid: process.pid(),
            tag: process.tag().map(str::to_owned),
            ending: ending.clone(),
            since: now,
        });
    }
}

impl State {
    fn live(&self, selector: &Selector) -> Option<Arc<Process>> {
        match selector {
            Selector::Pid(pid) => self.live.get(pid).cloned(),
            Selector::Tag(tag) => self
                .live
                .values()
                .filter(|process| process.tag() == Some(tag))
                .max_by_key(|process| process.number)
                .cloned(),
        }
    }

    /// Forgets what is too old. Whoever asks pays for it; no timer does.
    fn expire(&mut self, now: Instant) {
        while self.retained.front().is_some_and(|ended| now - ended.since >= RETENTION) {
            self.retained.pop_front();
        }
    }
}
