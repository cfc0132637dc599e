//! The registry: which processes live, and which have ended and are retained.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    hash::{BuildHasher, Hasher, RandomState},
    io,
    os::fd::AsFd,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{Semaphore, watch},
    time::{Instant, sleep_until},
};

use super::{
    Groups, Options, Process, StartError, StartSpec, StopNotes, Subscription, Tether,
    journal::{Attach, Bounds, Disk, Journal, Pressure, Relief, SpillDir},
    options::{MAX_RETAINED_REQUESTS, SMALL_REQUEST},
    record::{Finished, Found},
    spec::RequestCharge,
    start,
};
use crate::{
    blocking::{
        Busy, MAX_DIRECTORY_THREADS, MAX_SPAWN_THREADS, MAX_TREE_THREADS, MIN_SPAWN_THREADS, Pool,
    },
    sys::pidfd,
};

/// The most threads that put output on disk and read it there.
pub const MAX_SPILL_THREADS: usize = 4;

/// The most threads that look for matches in output: an expression may take its time.
pub const MAX_MATCH_THREADS: usize = 2;

/// The descriptors that a call for files needs, with some to spare.
const DESCRIPTORS_OF_A_CALL: usize = 8;
/// The descriptors that a start takes, for a moment or longer.
const DESCRIPTORS_OF_A_START: usize = 16;
/// How often and when it is looked whether there are so many.
const DESCRIPTOR_LOOKS: u32 = 100;
const DESCRIPTOR_PAUSE: Duration = Duration::from_millis(1);

/// Which process is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selector {
    /// By process id.
    Pid(u32),
    /// By tag: the one started last, if several have it.
    Tag(String),
    /// By identity.
    Id(String),
}

/// All processes of the daemon.
#[derive(Debug)]
pub struct Manager {
    state: Mutex<State>,
    pub(super) options: Options,
    pub(super) slots: Arc<Semaphore>,
    /// Makes identities of this daemon's processes differ from those of the one before it.
    instance: u64,
    pressure: Arc<Pressure>,
    /// Where children are made. Apart from the work on files, so that a start never waits for a
    /// file system that hangs.
    pub(super) spawners: Arc<Pool>,
    /// Where working directories are looked at, which may be on such a file system.
    pub(super) directories: Arc<Pool>,
    spillers: Arc<Pool>,
    spill_dir: Arc<SpillDir>,
    /// Gives up what others retain, for descriptors.
    relief: OtherRelief,
    matchers: Arc<Pool>,
    /// What large requests of processes take together.
    requests: Arc<AtomicUsize>,
    /// Where trees are signalled and measured.
    pub(super) trees: Arc<Pool>,
    pub(super) groups: Groups,
    pub(super) stop_notes: Arc<StopNotes>,
}

#[derive(Debug, Default)]
struct State {
    live: HashMap<u32, Arc<Process>>,
    by_id: HashMap<String, Found>,
    /// Identities whose process is being started: told when that is over.
    starting: HashMap<String, watch::Receiver<()>>,
    started: u64,
    /// The oldest first.
    ended: VecDeque<(Instant, Arc<Finished>)>,
    /// Whether a task waits for the oldest one's time.
    expiring: bool,
    /// Whether the daemon is shut down, and starts nothing any more.
    closed: bool,
}

impl Manager {
    /// A manager without processes. There should be one.
    pub fn new(options: Options) -> Arc<Self> {
        Self::with(options, Groups::none("nobody has looked for any"))
    }

    /// As [`Manager::new`], for a daemon that has control groups.
    pub fn with(options: Options, groups: Groups) -> Arc<Self> {
        pidfd::keep_exit_statuses();
        let stop_notes = Arc::new(StopNotes::new(options.stop_notes.clone()));
        stop_notes.continue_left();
        let spillers = Pool::new("journal", 1, MAX_SPILL_THREADS);
        let spill_dir = SpillDir::new(options.spill_dir.clone());
        let swept = Arc::clone(&spill_dir);
        spillers.run_later(move || swept.sweep());
        Arc::new(Self {
            state: Mutex::default(),
            slots: Arc::new(Semaphore::new(options.max_processes)),
            instance: RandomState::new().build_hasher().finish(),
            pressure: Pressure::new(options.output_total),
            spawners: Pool::new("spawn", MIN_SPAWN_THREADS, MAX_SPAWN_THREADS),
            directories: Pool::new("cwd", 1, MAX_DIRECTORY_THREADS),
            spillers,
            spill_dir,
            relief: OtherRelief::default(),
            matchers: Pool::new("match", 0, MAX_MATCH_THREADS),
            requests: Arc::default(),
            options,
            trees: Pool::new("trees", 1, MAX_TREE_THREADS),
            groups,
            stop_notes,
        })
    }

    /// What the operator has set.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Starts a process and subscribes to it before it can write. Once begun, dropping the future
    /// does not stop it: the process then runs without a subscriber.
    ///
    /// With an identity in `spec` the call may be repeated: where there is a process of that
    /// identity, running or retained, the same request subscribes to it from its first byte.
    ///
    /// # Errors
    /// [`StartError`]; no process is left then.
    pub async fn start(
        self: &Arc<Self>,
        spec: StartSpec,
    ) -> Result<(Found, Subscription), StartError> {
        let (found, subscription, _) = self.start_and(spec, false).await?;
        Ok((found, subscription))
    }

    /// As [`Manager::start`], but the process does not outlive what is returned here: a start whose
    /// future is dropped kills the process as soon as there is one. No tether is for a process that
    /// has ended.
    ///
    /// # Errors
    /// As [`Manager::start`].
    pub async fn start_tethered(
        self: &Arc<Self>,
        spec: StartSpec,
    ) -> Result<(Found, Subscription, Option<Tether>), StartError> {
        self.start_and(spec, true).await
    }

    async fn start_and(
        self: &Arc<Self>,
        mut spec: StartSpec,
        tethered: bool,
    ) -> Result<(Found, Subscription, Option<Tether>), StartError> {
        if self.state.lock().closed {
            return Err(StartError::ShuttingDown);
        }
        let tether = move |process: &Arc<Process>| tethered.then(|| Tether::new(process));
        let turn = match &spec.id {
            None => None,
            Some(id) => match self.turn(id, &spec).await? {
                Turn::There(found) => {
                    let subscription = found.subscribe(Attach::At(0));
                    let subscription = subscription.map_err(|error| {
                        // Nothing is beyond zero.
                        StartError::Task(error.to_string())
                    })?;
                    let tether = match &found {
                        Found::Live(process) => tether(process),
                        Found::Ended(_) => None,
                    };
                    return Ok((found, subscription, tether));
                }
                Turn::Mine(turn) => Some(turn),
            },
        };
        let slot = Arc::clone(&self.slots)
            .try_acquire_owned()
            .map_err(|_| StartError::TooMany { max: self.options.max_processes })?;
        spec.charge = self.charge(&spec)?;
        let manager = Arc::clone(self);
        // On a task of its own, so that no child is left alone between clone and registration.
        let starting = tokio::spawn(async move {
            let started = start::start(manager, spec, slot).await;
            drop(turn);
            // Here, so that it is dropped with the result that nobody waits for any more.
            started.map(|(process, subscription)| {
                let tether = tether(&process);
                (Found::Live(process), subscription, tether)
            })
        });
        starting.await.unwrap_or_else(|error| Err(StartError::Task(error.to_string())))
    }

    /// Counts a large request, which stays in memory as long as its process is known.
    fn charge(&self, spec: &StartSpec) -> Result<Option<Arc<RequestCharge>>, StartError> {
        let bytes = spec.size();
        if bytes <= SMALL_REQUEST {
            return Ok(None);
        }
        let max = self.options.max_requests;
        let add = |used: usize| used.checked_add(bytes).filter(|sum| *sum <= max);
        self.requests
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, add)
            .map_err(|_| StartError::Requests { max })?;
        Ok(Some(Arc::new(RequestCharge { used: Arc::clone(&self.requests), bytes })))
    }

    /// Waits until no other call starts a process of this identity, and says whether there is one.
    async fn turn(self: &Arc<Self>, id: &str, spec: &StartSpec) -> Result<Turn, StartError> {
        loop {
            let mut other = {
                let mut state = self.state.lock();
                if let Some(found) = state.by_id.get(id) {
                    return match found.record().spec.is_same_request(spec) {
                        true => Ok(Turn::There(found.clone())),
                        false => Err(StartError::IdTaken(id.to_owned())),
                    };
                }
                match state.starting.get(id) {
                    Some(other) => other.clone(),
                    None => {
                        let (over, told) = watch::channel(());
                        state.starting.insert(id.to_owned(), told);
                        let manager = Arc::downgrade(self);
                        let id = id.to_owned();
                        return Ok(Turn::Mine(Starting { manager, id, _over: over }));
                    }
                }
            };
            // An error means that it is over.
            let _ = other.changed().await;
        }
    }

    /// Finds a process among the live ones, then among those that ended lately.
    pub fn find(&self, selector: &Selector) -> Option<Found> {
        let mut state = self.state.lock();
        state.expire(Instant::now(), &self.options);
        if let Selector::Id(id) = selector {
            return state.by_id.get(id).cloned();
        }
        if let Some(process) = state.live(selector) {
            return Some(Found::Live(process));
        }
        let ended = state.ended.iter().map(|(_, finished)| finished);
        let ended = ended.filter(|finished| match selector {
            Selector::Pid(pid) => finished.record.pid == *pid,
            Selector::Tag(tag) => finished.record.spec.tag.as_ref() == Some(tag),
            Selector::Id(_) => false,
        });
        let last = ended.max_by_key(|finished| finished.record.number)?;
        Some(Found::Ended(Arc::clone(last)))
    }

    /// Runs a search in output where it holds up nobody but other searches.
    ///
    /// # Errors
    /// [`Busy`].
    pub async fn search<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Busy> {
        self.matchers.run(work).await
    }

    /// The pools that starts and signals go through.
    pub fn pools(&self) -> [&Arc<Pool>; 3] {
        [&self.spawners, &self.directories, &self.trees]
    }

    /// Finds a live process.
    pub fn live(&self, selector: &Selector) -> Option<Arc<Process>> {
        self.state.lock().live(selector)
    }

    /// All live processes, in the order of their starts; on request the retained ones too.
    pub fn list(&self, with_ended: bool) -> Vec<Found> {
        let mut state = self.state.lock();
        state.expire(Instant::now(), &self.options);
        let mut all: Vec<_> = state.live.values().cloned().map(Found::Live).collect();
        if with_ended {
            let ended = state.ended.iter();
            all.extend(ended.map(|(_, finished)| Found::Ended(Arc::clone(finished))));
        }
        drop(state);
        all.sort_by_key(|found| found.record().number);
        all
    }

    /// What the output of all processes in memory costs, in bytes.
    pub fn output_in_memory(&self) -> usize {
        self.pressure.used()
    }

    /// How many processes live.
    pub fn len(&self) -> usize {
        self.state.lock().live.len()
    }

    /// Whether no process lives.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The number of the next start, and the identity that goes with it.
    pub(super) fn next_number(&self) -> (u64, String) {
        let mut state = self.state.lock();
        state.started += 1;
        (state.started, format!("{:016x}-{}", self.instance, state.started))
    }

    /// A journal for a new process.
    pub(super) fn journal(self: &Arc<Self>, bounds: Bounds) -> Arc<Journal> {
        let relief = Arc::new(ByManager(Arc::downgrade(self)));
        let (dir, pool) = (Arc::clone(&self.spill_dir), Arc::clone(&self.spillers));
        let disk = Disk { dir, pool, relief };
        let pressure = Arc::clone(&self.pressure);
        Arc::new(Journal::new(bounds, self.options.stall, pressure, Some(disk)))
    }

    /// Makes a new process known.
    pub(super) fn register(&self, process: &Arc<Process>) {
        let mut state = self.state.lock();
        let id = process.record().id.clone();
        state.by_id.insert(id, Found::Live(Arc::clone(process)));
        state.live.insert(process.pid(), Arc::clone(process));
        if state.closed {
            // It was being started when the daemon was told to end.
            process.kill_tree();
        }
    }

    /// Starts nothing from now on.
    pub(super) fn close(&self) {
        self.state.lock().closed = true;
    }

    /// All live processes, in no order.
    pub(super) fn processes(&self) -> Vec<Arc<Process>> {
        self.state.lock().live.values().cloned().collect()
    }

    /// Blocks: removes output from the disk, at the end of the daemon.
    pub fn clean_up(&self) {
        self.spill_dir.remove_all();
    }

    /// Who else retains what holds descriptors: called when there are none left, on a thread that may
    /// block for a moment, it gives some up and says whether it could.
    pub fn on_exhaustion(&self, relief: impl Fn() -> bool + Send + Sync + 'static) {
        self.relief.0.lock().push(Box::new(relief));
    }

    /// Blocks for a moment: gives up retained state if there are hardly any descriptors left, before work
    /// that needs a few. Costs some microseconds where there are enough.
    pub fn spare_descriptors(&self) {
        // One at a time: what is tried with is missing meanwhile.
        static TRYING: Mutex<()> = Mutex::new(());
        let trying = TRYING.lock();
        let tried: io::Result<Vec<_>> =
            (0..DESCRIPTORS_OF_A_CALL).map(|_| io::stderr().as_fd().try_clone_to_owned()).collect();
        let errno = tried.err().and_then(|error| error.raw_os_error());
        drop(trying);
        if matches!(errno, Some(libc::EMFILE | libc::ENFILE)) {
            self.relieve(errno);
        }
    }

    /// Blocks for a moment: gives up retained state for new work that was refused with this error;
    /// whether there was any to give up.
    pub(super) fn relieve(&self, errno: Option<i32>) -> bool {
        let relieved = match errno {
            Some(libc::EMFILE | libc::ENFILE) => {
                let lingering = self.groups.stop_lingering();
                // All of them: what one gives up may be taken before the work is tried again.
                let others = self.relief.0.lock();
                let relieved =
                    others.iter().fold(lingering, |relieved, relief| relief() | relieved);
                drop(others);
                if relieved {
                    await_descriptors();
                }
                relieved
            }
            Some(libc::ENOSPC | libc::EDQUOT) => {
                let ended: Vec<_> =
                    self.state.lock().ended.iter().map(|(_, ended)| Arc::clone(ended)).collect();
                // The oldest first.
                ended.iter().any(|ended| ended.journal.discard_disk())
            }
            Some(libc::ENOMEM) => {
                let ended: Vec<_> =
                    self.state.lock().ended.iter().map(|(_, ended)| Arc::clone(ended)).collect();
                let before = self.pressure.used();
                ended.iter().for_each(|ended| ended.journal.shrink());
                self.pressure.used() < before
            }
            _ => false,
        };
        if relieved {
            tracing::info!(errno, "gave up retained state for new work");
        }
        relieved
    }

    /// Moves a process from the live ones to the ended ones.
    pub(super) fn retire(self: &Arc<Self>, process: &Arc<Process>) {
        let now = Instant::now();
        let finished = Arc::new(Finished {
            record: Arc::clone(process.record()),
            journal: Arc::clone(&process.journal),
        });
        let mut state = self.state.lock();
        if state.live.get(&process.pid()).is_some_and(|live| Arc::ptr_eq(live, process)) {
            state.live.remove(&process.pid());
        }
        let id = finished.record.id.clone();
        state.by_id.insert(id, Found::Ended(Arc::clone(&finished)));
        state.ended.push_back((now, finished));
        state.expire(now, &self.options);
        for (_, oldest) in &state.ended {
            if !self.pressure.is_high() {
                break;
            }
            oldest.journal.shrink();
        }
        if !state.expiring && !state.ended.is_empty() {
            state.expiring = true;
            tokio::spawn(expire(Arc::downgrade(self)));
        }
    }

    /// Forgets what is too old; when the next one is.
    fn expire(&self) -> Option<Instant> {
        let mut state = self.state.lock();
        state.expire(Instant::now(), &self.options);
        let next = state.ended.front().map(|(since, _)| *since + self.options.retention);
        state.expiring = next.is_some();
        next
    }
}

/// Forgets ended processes when their time has come. Runs only while there are any.
async fn expire(manager: Weak<Manager>) {
    while let Some(next) = manager.upgrade().and_then(|manager| manager.expire()) {
        sleep_until(next).await;
    }
}

/// Blocks until there are descriptors for a start, for a moment at most: what is given up is closed by
/// tasks.
fn await_descriptors() {
    let opened = || (0..DESCRIPTORS_OF_A_START).map(|_| std::fs::File::open("/dev/null"));
    for _ in 0..DESCRIPTOR_LOOKS {
        if opened().collect::<Result<Vec<_>, _>>().is_ok() {
            return;
        }
        std::thread::sleep(DESCRIPTOR_PAUSE);
    }
}

#[derive(Default)]
struct OtherRelief(Mutex<Vec<Box<dyn Fn() -> bool + Send + Sync>>>);

impl fmt::Debug for OtherRelief {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OtherRelief").field(&self.0.lock().len()).finish()
    }
}

#[derive(Debug)]
struct ByManager(Weak<Manager>);

impl Relief for ByManager {
    fn relieve(&self, errno: Option<i32>) -> bool {
        self.0.upgrade().is_some_and(|manager| manager.relieve(errno))
    }
}

enum Turn {
    There(Found),
    Mine(Starting),
}

/// Held by the one call that starts a process of an identity.
struct Starting {
    manager: Weak<Manager>,
    id: String,
    _over: watch::Sender<()>,
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(manager) = self.manager.upgrade() {
            manager.state.lock().starting.remove(&self.id);
        }
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
                .max_by_key(|process| process.record().number)
                .cloned(),
            Selector::Id(id) => match self.by_id.get(id) {
                Some(Found::Live(process)) => Some(Arc::clone(process)),
                _ => None,
            },
        }
    }

    /// Forgets what is too old or too much.
    fn expire(&mut self, now: Instant, options: &Options) {
        let size = |finished: &Finished| finished.record.spec.size();
        let mut sizes: usize = self.ended.iter().map(|(_, finished)| size(finished)).sum();
        while let Some((since, oldest)) = self.ended.front() {
            let old = now.saturating_duration_since(*since) >= options.retention;
            if !old && self.ended.len() <= options.max_retained && sizes <= MAX_RETAINED_REQUESTS {
                break;
            }
            sizes -= size(oldest);
            let id = oldest.record.id.clone();
            self.ended.pop_front();
            if matches!(self.by_id.get(&id), Some(Found::Ended(_))) {
                self.by_id.remove(&id);
            }
        }
    }
}
