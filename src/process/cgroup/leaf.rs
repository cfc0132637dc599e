//! The control group of one process and all that descends from it.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use super::{Unavailable, Workload, files};
use crate::{
    process::{Usage, limits::Limits},
    sys::{errno, pidfd},
};

/// How often the processes are listed anew for those that were forked meanwhile; each round meets
/// only what was forked during the one before.
const MAX_ROUNDS: usize = 64;
/// The processes that are held by a descriptor at a time.
const HELD: usize = 256;

/// A control group with its limits. It is removed by [`Leaf::remove`], not when it is dropped: that
/// can only be done once it is empty.
#[derive(Debug)]
pub(in crate::process) struct Leaf {
    dir: PathBuf,
    /// For a child to be born there; not for longer, since a group may outlive its process by far.
    fd: Option<OwnedFd>,
    memory_limit: Option<u64>,
    pids_limit: Option<u64>,
}

/// What the kernel says about a group that has met its limits.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::process) struct Verdict {
    /// The processes in it that were killed for want of memory, whoever's limit that was.
    pub(in crate::process) oom_kills: u64,
    /// Its own limit of memory.
    pub(in crate::process) memory_limit: Option<u64>,
    /// Its own limits that were reached, by the names of their files.
    pub(in crate::process) limits_hit: Vec<&'static str>,
}

impl Leaf {
    /// Makes the group, by the first of the names that is not taken, and sets its limits. Blocks
    /// for a moment.
    pub(super) fn make(
        workload: &Workload,
        mut names: impl FnMut() -> String,
        limits: &Limits,
    ) -> Result<Self, Unavailable> {
        let unavailable = |what: &str, dir: &Path, error: &io::Error| Unavailable {
            field: limits.settings().first().map_or("limits", |setting| setting.field).to_owned(),
            why: format!("{what} {}: {}", dir.display(), errno::text_of(error)),
            errno: error.raw_os_error(),
        };
        // There are not more taken ones than directories.
        let dir = loop {
            let dir = workload.dir.join(names());
            match fs::create_dir(&dir) {
                Ok(()) => break dir,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(unavailable("making", &dir, &error)),
            }
        };
        let opened = File::open(&dir).map_err(|error| unavailable("opening", &dir, &error));
        let made = opened.and_then(|fd| {
            let leaf = Self {
                dir: dir.clone(),
                fd: Some(fd.into()),
                memory_limit: limits.memory(),
                pids_limit: limits.pids(),
            };
            leaf.limit(workload, limits)?;
            Ok(leaf)
        });
        if made.is_err() {
            let _ = fs::remove_dir(&dir);
        }
        made
    }

    /// One that was made before.
    pub(super) fn existing(dir: PathBuf) -> io::Result<Self> {
        // Nobody is to be born there: it has to be there, no more.
        File::open(&dir)?;
        Ok(Self { dir, fd: None, memory_limit: None, pids_limit: None })
    }

    fn limit(&self, workload: &Workload, limits: &Limits) -> Result<(), Unavailable> {
        for setting in limits.settings() {
            let unavailable =
                |why, errno| Unavailable { field: setting.field.to_owned(), why, errno };
            if !workload.controllers.contains(&setting.controller) {
                return Err(unavailable(
                    format!(
                        "the controller {} is not enabled in {}",
                        setting.controller,
                        workload.dir.display()
                    ),
                    None,
                ));
            }
            files::write(&self.dir, setting.file, &setting.value).map_err(|error| {
                let why = errno::text_of(&error);
                let text = format!("writing '{}' to {}: {why}", setting.value, setting.file);
                unavailable(text, error.raw_os_error())
            })?;
        }
        if limits.memory().is_some() {
            // Kernels without swap have no such file.
            let _ = files::write(&self.dir, "memory.swap.max", "0");
            // All of it or nothing: a tree that has lost one process in the middle is of no use to
            // anybody, and hangs as often as it fails.
            let _ = files::write(&self.dir, "memory.oom.group", "1");
        }
        Ok(())
    }

    /// For a child to be born there, until [`Leaf::close`].
    pub(in crate::process) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(OwnedFd::as_fd)
    }

    /// Gives up what only a child needs that is to be born there.
    pub(in crate::process) fn close(&mut self) {
        self.fd = None;
    }

    /// Lets the processes of a group that a daemon had frozen for a kill go on.
    pub(super) fn thaw(dir: &Path) {
        if files::number(dir, "cgroup.freeze") == Some(1) {
            let _ = files::write(dir, "cgroup.freeze", "0");
        }
    }

    /// The file whose readiness tells that the last process has gone, among other things.
    pub(in crate::process) fn events(&self) -> io::Result<OwnedFd> {
        Ok(File::open(self.dir.join("cgroup.events"))?.into())
    }

    /// Removes it, if it is empty.
    ///
    /// # Errors
    /// EBUSY while there is a process in it.
    pub(in crate::process) fn remove(&self) -> io::Result<()> {
        files::remove(&self.dir)
    }

    /// Sends a signal to every process in it, also to those that are forked meanwhile. One that
    /// must not be signalled (its user is another, and the daemon's is not root) makes it an error
    /// in the end.
    pub(in crate::process) fn signal(&self, signal: i32) -> io::Result<()> {
        if signal != libc::SIGKILL {
            return self.signal_each(signal);
        }
        match files::write(&self.dir, "cgroup.kill", "1") {
            // Before Linux 5.14: frozen, they cannot fork, and die all the same.
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.dir.exists() => {
                let _ = files::write(&self.dir, "cgroup.freeze", "1");
                let killed = self.signal_each(signal);
                let _ = files::write(&self.dir, "cgroup.freeze", "0");
                killed
            }
            // It has been removed, so it was empty.
            Err(error)
                if error.kind() == io::ErrorKind::NotFound
                    || error.raw_os_error() == Some(libc::ENODEV) =>
            {
                Ok(())
            }
            result => result,
        }
    }

    fn signal_each(&self, signal: i32) -> io::Result<()> {
        let mut done = HashSet::new();
        let mut refused = None;
        for _ in 0..MAX_ROUNDS {
            let new: Vec<i32> =
                self.pids()?.into_iter().filter(|pid| !done.contains(pid)).collect();
            if new.is_empty() {
                break;
            }
            for some in new.chunks(HELD) {
                let gone = |error: &io::Error| error.raw_os_error() == Some(libc::ESRCH);
                let held: Vec<(i32, Option<OwnedFd>)> = some
                    .iter()
                    .filter_map(|pid| match pidfd::open(*pid) {
                        Ok(pidfd) => Some((*pid, Some(pidfd))),
                        Err(error) if gone(&error) => None,
                        // Refused, or no descriptor to be had: by its pid.
                        Err(_) => Some((*pid, None)),
                    })
                    .collect();
                // Those that are still here are those that are held: a pid is not used twice while
                // its process lives, and the descriptor of one that is dead takes no signal.
                let here: HashSet<i32> = self.pids()?.into_iter().collect();
                for (pid, process) in held.iter().filter(|(pid, _)| here.contains(pid)) {
                    let pidfd = process.as_ref().map(OwnedFd::as_fd);
                    match pidfd::signal_by(pidfd, *pid, signal) {
                        Err(error) if !gone(&error) => refused = Some(error),
                        _ => {}
                    }
                    done.insert(*pid);
                }
                done.extend(some);
            }
        }
        refused.map_or(Ok(()), Err)
    }

    /// All processes in it, and in those nested in it.
    pub(in crate::process) fn pids(&self) -> io::Result<Vec<i32>> {
        let mut pids = Vec::new();
        let listed = files::each(&self.dir, &mut |dir: &Path| {
            match fs::read_to_string(dir.join("cgroup.procs")) {
                // 0 is a process of another PID namespace.
                Ok(text) => pids.extend(
                    text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0),
                ),
                // A nested one may go at any moment, and one with threads of its own has no list.
                Err(error) => tracing::debug!(dir = %dir.display(), %error, "not listed"),
            }
            Ok(())
        });
        match listed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(pids),
        }
    }

    /// What has been used in it; `None` where the kernel does not count memory, since half of an
    /// answer would be taken for the whole.
    pub(in crate::process) fn usage(&self) -> Option<Usage> {
        let memory = files::number(&self.dir, "memory.current")?;
        let cpu = fs::read_to_string(self.dir.join("cpu.stat")).ok()?;
        let io = fs::read_to_string(self.dir.join("io.stat")).unwrap_or_default();
        let time = |name| Duration::from_micros(files::keyed(&cpu, name).unwrap_or_default());
        Some(Usage {
            cpu_user: time("user_usec"),
            cpu_system: time("system_usec"),
            // Linux 5.19 has it.
            memory_peak: files::number(&self.dir, "memory.peak").unwrap_or(memory),
            memory,
            io_read: files::summed(&io, "rbytes"),
            io_write: files::summed(&io, "wbytes"),
            pids: files::number(&self.dir, "pids.current").unwrap_or_default(),
            whole_tree: true,
        })
    }

    /// The processor time that was used in it.
    pub(in crate::process) fn processor_time(&self) -> Option<Duration> {
        files::entry(&self.dir, "cpu.stat", "usage_usec").map(Duration::from_micros)
    }

    /// Which limits it has met.
    pub(in crate::process) fn verdict(&self) -> Verdict {
        let events = fs::read_to_string(self.dir.join("memory.events")).unwrap_or_default();
        let oom = |name| files::keyed(&events, name).unwrap_or_default();
        let oom_kills = oom("oom_kill");
        let mut limits_hit = Vec::new();
        // `max` only says that memory had to be reclaimed, as happens to any cache; `oom` that it
        // was not enough.
        if self.memory_limit.is_some() && (oom("oom") > 0 || oom_kills > 0) {
            limits_hit.push("memory.max");
        }
        let refused = files::entry(&self.dir, "pids.events", "max").unwrap_or_default();
        if self.pids_limit.is_some() && refused > 0 {
            limits_hit.push("pids.max");
        }
        Verdict { oom_kills, memory_limit: self.memory_limit, limits_hit }
    }
}
