//! Control groups (version 2): a leaf for each process and all that descends from it, in two pools
//! with upstream's names and weights.
//!
//! ```text
//! base ─┬─ envd          the daemon, protected
//!       ├─ user ─┬─ 7-1  the commands with pipes, each in a leaf of its own
//!       │        └─ 7-2
//!       └─ ptys ─── 7-3  those with a terminal
//! ```
//!
//! The contract of this module:
//!
//! * [`Groups::find`] arranges the base once, at the start of the daemon; what it lacks is told when
//!   somebody asks for it, in [`Unavailable`].
//! * A leaf is named after the daemon's pid and a number, so that daemons that share a base do not
//!   meet, and one that starts knows whose leaves are left over.
//! * Functions block for moments: they read and write files of the kernel's, which are in memory.

mod files;
mod leaf;
mod place;

use std::{
    collections::VecDeque,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

pub(super) use self::leaf::{Leaf, Verdict};
use super::{Stdio, limits::Limits};
use crate::sys::procfs;

/// The groups whose process has ended while others in it live on that are watched for becoming
/// empty, each by one descriptor. What is beyond it is looked at when others end.
pub const MAX_LINGERING: usize = 4096;

/// The groups beyond those that are remembered. What is beyond these too stays until the daemon
/// starts anew, as an empty directory.
const MAX_MISSED: usize = 4096;
/// How many of them are looked at when a process ends.
const LOOKED_AT: usize = 4;

/// What the pools hand down to their leaves.
const CONTROLLERS: [&str; 4] = ["cpu", "memory", "pids", "io"];

/// The memory that all commands together may not have: an eighth, and not more than this. Upstream's
/// rule.
const MAX_RESERVED_MEMORY: u64 = 128 << 20;

/// A limit that cannot be set here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the field `{field}` asks for what this machine does not offer: {why}")]
pub struct Unavailable {
    /// The field that asks for it.
    pub field: String,
    /// Why it cannot be had.
    pub why: String,
    /// What the kernel said to that, if it was the kernel.
    pub errno: Option<i32>,
}

/// The control groups of a daemon, or why it has none.
#[derive(Debug)]
pub struct Groups {
    ready: Result<Ready, String>,
}

#[derive(Debug)]
struct Ready {
    base: PathBuf,
    user: Workload,
    ptys: Workload,
    made: AtomicU64,
    lingering: Arc<Semaphore>,
    stop_lingering: watch::Sender<u64>,
    /// Leaves that nobody watches.
    missed: Mutex<VecDeque<Arc<Leaf>>>,
}

/// A pool of leaves.
#[derive(Debug)]
struct Workload {
    dir: PathBuf,
    controllers: Vec<&'static str>,
}

impl Groups {
    /// None, and why, as the caller of a limit is told.
    pub fn none(why: impl Into<String>) -> Self {
        Self { ready: Err(why.into()) }
    }

    /// Arranges the groups below `root`, where cgroup v2 is mounted. Blocks; for the start of the
    /// daemon.
    pub fn find(root: &Path) -> Self {
        let ready = place::prepare(root).and_then(|base| {
            let workload = |name, properties: &[(&str, &str)]| {
                Workload::make(base.join(name), properties)
                    .map_err(|error| format!("making {}: {error}", base.join(name).display()))
            };
            // The figures are upstream's.
            let user = workload("user", &[("cpu.weight", "50"), ("io.weight", "default 10")])?;
            let ptys = workload("ptys", &[("cpu.weight", "200"), ("io.weight", "default 50")])?;
            let lingering = Arc::new(Semaphore::new(MAX_LINGERING));
            let (made, missed) = (AtomicU64::new(0), Mutex::default());
            let stop_lingering = watch::Sender::new(0);
            Ok(Ready { base, user, ptys, made, lingering, stop_lingering, missed })
        });
        let groups = Self { ready };
        groups.sweep();
        groups
    }

    /// Where they are.
    ///
    /// # Errors
    /// Why there are none.
    pub fn base(&self) -> Result<&Path, &str> {
        self.ready.as_ref().map(|ready| ready.base.as_path()).map_err(String::as_str)
    }

    /// The controllers that limits can be set with, for commands with pipes.
    pub fn controllers(&self) -> &[&'static str] {
        self.ready.as_ref().map_or(&[], |ready| &ready.user.controllers)
    }

    /// A leaf for a process to start. Without limits, one that cannot be made is missed, no more.
    ///
    /// # Errors
    /// A limit cannot be set.
    pub(super) fn leaf(&self, stdio: Stdio, limits: &Limits) -> Result<Option<Leaf>, Unavailable> {
        let asked_for = limits.settings().first().map(|setting| setting.field);
        let ready = match (&self.ready, asked_for) {
            (Ok(ready), _) => ready,
            (Err(_), None) => return Ok(None),
            (Err(why), Some(field)) => {
                return Err(Unavailable { field: field.to_owned(), why: why.clone(), errno: None });
            }
        };
        let workload = match stdio {
            Stdio::Pipes { .. } => &ready.user,
            Stdio::Pty { .. } => &ready.ptys,
        };
        // A daemon before this one may have had its pid, and processes that live on.
        let names = || {
            let number = ready.made.fetch_add(1, Ordering::Relaxed);
            format!("{}-{number}", std::process::id())
        };
        match Leaf::make(workload, names, limits) {
            Ok(leaf) => Ok(Some(leaf)),
            Err(unavailable) if asked_for.is_some() => Err(unavailable),
            Err(unavailable) => {
                tracing::warn!(why = unavailable.why, "a process starts without a control group");
                Ok(None)
            }
        }
    }

    /// A place among those that wait for a leaf to become empty.
    pub(super) fn linger(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.ready.as_ref().ok()?.lingering).try_acquire_owned().ok()
    }

    /// Lets those go that wait for a leaf to become empty, each of which holds a
    /// descriptor; whether there were any. Their leaves are looked at when other processes end.
    pub(super) fn stop_lingering(&self) -> bool {
        let Ok(ready) = &self.ready else { return false };
        if ready.lingering.available_permits() == MAX_LINGERING {
            return false;
        }
        ready.stop_lingering.send_modify(|stops| *stops += 1);
        true
    }

    /// Changes when nobody shall wait any more for a leaf to become empty.
    pub(super) fn lingering_stops(&self) -> Option<watch::Receiver<u64>> {
        self.ready.as_ref().ok().map(|ready| ready.stop_lingering.subscribe())
    }

    /// Remembers a leaf that is not empty and that nobody watches.
    pub(super) fn miss(&self, leaf: Arc<Leaf>) {
        let Ok(ready) = &self.ready else { return };
        let mut missed = ready.missed.lock();
        if missed.len() < MAX_MISSED {
            missed.push_back(leaf);
        }
    }

    /// Sends a signal to everything in the leaves of this daemon, also to what was left behind there
    /// by a process that has ended. Blocks.
    pub(super) fn signal_all(&self, signal: i32) {
        for leaf in self.own_leaves() {
            if let Err(error) = leaf.signal(signal) {
                tracing::debug!(signal, %error, "not all processes of a control group were signalled");
            }
        }
    }

    /// Whether there is any process in the leaves of this daemon. Blocks for a moment.
    pub(super) fn is_any_left(&self) -> bool {
        self.own_leaves().any(|leaf| leaf.pids().is_ok_and(|pids| !pids.is_empty()))
    }

    /// The leaves that this daemon has made. Others that share the base have leaves of their own.
    fn own_leaves(&self) -> impl Iterator<Item = Leaf> {
        let pools = self.ready.as_ref().ok().map(|ready| [&ready.user, &ready.ptys]);
        let entries = pools.into_iter().flatten().filter_map(|pool| fs::read_dir(&pool.dir).ok());
        entries.flatten().flatten().filter_map(|entry| {
            let own = entry.file_name().to_str().and_then(maker) == Some(std::process::id());
            own.then(|| Leaf::existing(entry.path()).ok()).flatten()
        })
    }

    /// Removes some of the leaves that nobody watches, if they are empty by now.
    pub(super) fn sweep_missed(&self) {
        let Ok(ready) = &self.ready else { return };
        for _ in 0..LOOKED_AT {
            let Some(leaf) = ready.missed.lock().pop_front() else { return };
            if leaf.remove().is_err() {
                self.miss(leaf);
            }
        }
    }

    /// Removes the empty leaves of daemons that are gone, and of one that had this pid. Only at the
    /// start: a leaf is empty while its process is being made.
    fn sweep(&self) {
        let Ok(ready) = &self.ready else { return };
        for workload in [&ready.user, &ready.ptys] {
            let Ok(entries) = fs::read_dir(&workload.dir) else { continue };
            for entry in entries.flatten() {
                let name = entry.file_name();
                let Some(pid) = name.to_str().and_then(maker) else { continue };
                let lives = Path::new("/proc").join(pid.to_string()).exists();
                if pid != std::process::id() && lives {
                    continue;
                }
                // One that is not empty belongs to processes that have outlived their daemon.
                if files::remove(&entry.path()).is_err() {
                    Leaf::thaw(&entry.path());
                }
            }
        }
    }
}

/// The pid of the daemon that has made a leaf.
fn maker(name: &str) -> Option<u32> {
    let (pid, number) = name.split_once('-')?;
    number.parse::<u64>().ok()?;
    pid.parse().ok()
}

impl Workload {
    fn make(dir: PathBuf, properties: &[(&str, &str)]) -> std::io::Result<Self> {
        files::make(&dir)?;
        let [memory, pids] = shares();
        let shared = [("memory.high", &memory), ("memory.max", &memory), ("pids.max", &pids)]
            .into_iter()
            .filter_map(|(file, value)| Some((file, value.as_deref()?)));
        for (file, value) in properties.iter().copied().chain(shared) {
            if let Err(error) = files::write(&dir, file, value) {
                tracing::info!(dir = %dir.display(), file, %error, "not set");
            }
        }
        let controllers = enable(&dir, &CONTROLLERS);
        Ok(Self { dir, controllers })
    }
}

/// What all commands of a pool may have together, of memory and of processes, so that something is
/// left for the daemon.
fn shares() -> [Option<String>; 2] {
    let meminfo = fs::read("/proc/meminfo").unwrap_or_default();
    let memory = procfs::entry_bytes(&meminfo, b"MemTotal:").map(memory_share);
    let number = |file: &str| files::number(Path::new("/proc/sys/kernel"), file);
    let most = [number("pid_max"), number("threads-max")].into_iter().flatten().min();
    // An eighth is more than a system needs.
    let pids = most.map(|most| most - most / 8);
    [memory, pids].map(|share| share.map(|share| share.to_string()))
}

fn memory_share(total: u64) -> u64 {
    total - (total / 8).min(MAX_RESERVED_MEMORY)
}

/// Hands controllers down from a group; gives those that are handed down then. One by one: one that
/// cannot be must not take the others with it.
fn enable(dir: &Path, wanted: &[&'static str]) -> Vec<&'static str> {
    let read = |file: &str| fs::read_to_string(dir.join(file)).unwrap_or_default();
    let has = |list: &str, one: &str| list.split_whitespace().any(|word| word == one);
    let (available, enabled) = (read("cgroup.controllers"), read("cgroup.subtree_control"));
    for one in wanted.iter().filter(|one| has(&available, one) && !has(&enabled, one)) {
        if let Err(error) = files::write(dir, "cgroup.subtree_control", &format!("+{one}")) {
            tracing::warn!(dir = %dir.display(), controller = one, %error, "not enabled");
        }
    }
    let enabled = read("cgroup.subtree_control");
    wanted.iter().copied().filter(|one| has(&enabled, one)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_leave_memory_to_the_daemon_as_upstreams_do() {
        assert_eq!(memory_share(512 << 20), 448 << 20);
        assert_eq!(memory_share(4 << 30), (4 << 30) - (128 << 20));
    }

    #[test]
    fn only_our_own_names_are_swept() {
        assert_eq!(maker("12-3"), Some(12));
        for other in ["12", "a-1", "12-x", "12-3-4", "-", "docker-1"] {
            assert_eq!(maker(other), None, "{other}");
        }
    }

    #[test]
    fn a_leaf_that_outlived_a_daemon_of_this_pid_is_passed_over() {
        let base = tempfile::tempdir().unwrap();
        let workload = |name: &str| {
            let dir = base.path().join(name);
            fs::create_dir(&dir).unwrap();
            Workload { dir, controllers: Vec::new() }
        };
        let (user, ptys) = (workload("user"), workload("ptys"));
        let own = |number: u64| user.dir.join(format!("{}-{number}", std::process::id()));
        for number in [0, 1, 3] {
            fs::create_dir(own(number)).unwrap();
        }
        let made = [own(2), own(4)];
        let ready = Ready {
            base: base.path().to_owned(),
            user,
            ptys,
            made: AtomicU64::new(0),
            lingering: Arc::new(Semaphore::new(1)),
            stop_lingering: watch::Sender::new(0),
            missed: Mutex::default(),
        };
        let groups = Groups { ready: Ok(ready) };
        for dir in made {
            let leaf = groups.leaf(Stdio::Pipes { stdin: false }, &Limits::default()).unwrap();
            assert!(leaf.is_some() && dir.exists(), "{}", dir.display());
        }
    }

    #[test]
    fn without_groups_a_limit_is_refused_and_says_why() {
        let groups = Groups::none("there are none today");
        let stdio = Stdio::Pipes { stdin: false };
        assert!(groups.leaf(stdio, &Limits::default()).unwrap().is_none());
        let limits = Limits::new(None, Some(5), None).unwrap();
        let error = groups.leaf(stdio, &limits).unwrap_err().to_string();
        assert!(error.contains("limits.pids") && error.contains("none today"), "{error}");
        let elsewhere = Groups::find(Path::new("/tmp"));
        assert!(elsewhere.base().unwrap_err().contains("no cgroup v2 file system"));
    }
}
