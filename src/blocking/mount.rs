//! Which jobs work on which mount, and which mounts do not answer.
//!
//! A file system may be served by a program (FUSE) or by another machine (NFS), and a call to one
//! whose server has stopped never returns. Such a call cannot be interrupted from outside, so the
//! daemon must not make the next one. Every job declares the mount on which it works
//! ([`stand_on`]), which asks no server. While all jobs of a mount go on, that is all there is to
//! it. Once a job of a mount has shown no progress for [`QUIET`], or many jobs are on it at once,
//! the next job that would enter it waits for a probe: a thread of its own asks the file system for
//! the attributes of one directory. A mount whose probe has no answer within [`PROBE_WAIT`] does
//! not answer; jobs that would enter it fail with [`MountBusy`], which names it. The probe's thread
//! stays in its call, and the moment it returns the mount is usable again: there is no timer. Where a
//! program or another machine serves the mount, the same thread then looks a name up: a mount that
//! answers for attributes but not for a name within [`LOOKUP_WAIT`] does not answer either.
//!
//! The local file system at `/` is never probed: its root is in the kernel's memory, so that the
//! answer says nothing, and without `/` nothing would work anyway.
//!
//! A file system may answer that question and still not complete others (a frozen disk, one hanging
//! file): a mount other than `/` on which [`MAX_STALLED_JOBS`] jobs have shown no progress for
//! [`STALLED`] counts as one that does not answer either.

use std::{
    collections::HashMap,
    ffi::OsStr,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    sync::{Arc, LazyLock},
    time::Duration,
};

use nix::{
    fcntl::{OFlag, openat},
    sys::stat::Mode,
};
use parking_lot::{Condvar, Mutex, MutexGuard};

use super::{
    job::{self, Job, millis, now},
    keep_out, mount_table,
};
use crate::sys::mounts;

mod probe;

use probe::Target;

/// A job of a mount without progress for this long is the reason to probe the mount.
pub const QUIET: Duration = Duration::from_millis(500);
/// As many jobs on one mount at once are a reason too, so that a burst of calls cannot fill a pool
/// before the first of them is quiet.
pub const MAX_UNPROBED_JOBS: usize = 16;
/// How long a probe may take before its mount counts as one that does not answer.
pub const PROBE_WAIT: Duration = Duration::from_secs(3);
/// How long the answer of a probe is good for.
pub const PROBE_VALID: Duration = Duration::from_secs(1);
/// A probe without an answer for this long makes a mount suspect: what its jobs hold besides their
/// threads is given to others.
pub const SUSPECT: Duration = Duration::from_millis(250);
/// How long the look-up of a name by a probe may take before its mount counts as one that does not
/// answer. Longer than [`PROBE_WAIT`]: it waits for calls that change the same directory.
pub const LOOKUP_WAIT: Duration = STALLED;
/// The probes that may run at a time, one for each mount. Beyond it mounts count as answering.
pub const MAX_PROBES: usize = 64;
/// A job without progress for this long is stalled, whatever the probe says.
pub const STALLED: Duration = Duration::from_secs(10);
/// As many stalled jobs on one mount other than `/` keep further ones out of it.
pub const MAX_STALLED_JOBS: usize = 32;

/// A mount does not answer: calls have waited for it for too long.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the file system at {mount} does not answer: {calls} calls wait for it")]
pub struct MountBusy {
    /// The mount point.
    pub mount: String,
    /// The calls that wait for it.
    pub calls: usize,
}

impl From<MountBusy> for io::Error {
    fn from(busy: MountBusy) -> Self {
        Self::new(io::ErrorKind::ResourceBusy, busy)
    }
}

/// What is known of one mount while jobs are on it or a probe runs.
#[derive(Debug, Default)]
struct Mount {
    jobs: Vec<Arc<Job>>,
    probe: Probe,
    /// Since when a probe waits for the look-up of a name.
    lookup: Option<u64>,
}

/// Times are those of [`now`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Probe {
    #[default]
    Never,
    Running {
        since: u64,
    },
    Answered {
        at: u64,
    },
}

/// Whether a job may go on to a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Free,
    /// After a probe.
    Unknown,
    /// It does not answer.
    Busy,
}

#[derive(Default)]
struct Registry {
    mounts: HashMap<u64, Mount>,
}

static REGISTRY: LazyLock<Mutex<Registry>> = LazyLock::new(Mutex::default);
/// Notified when a probe has its answer.
static ANSWERED: Condvar = Condvar::new();

impl Mount {
    fn verdict(&self, id: u64) -> Verdict {
        match self.judge(id) {
            Verdict::Free => Verdict::Free,
            _ if mount_table::is_local_root(id) => Verdict::Free,
            verdict => verdict,
        }
    }

    fn judge(&self, id: u64) -> Verdict {
        if self.lookup.is_some_and(|since| now().saturating_sub(since) >= millis(LOOKUP_WAIT)) {
            return Verdict::Busy;
        }
        let quiet = |limit: Duration| {
            self.jobs.iter().filter(|job| job.quiet_for() > millis(limit)).count()
        };
        match self.probe {
            Probe::Running { since } if now().saturating_sub(since) >= millis(PROBE_WAIT) => {
                return Verdict::Busy;
            }
            Probe::Running { .. } => return Verdict::Unknown,
            Probe::Never | Probe::Answered { .. } => {}
        }
        if self.jobs.len() >= MAX_STALLED_JOBS
            && quiet(STALLED) >= MAX_STALLED_JOBS
            && !mount_table::is_root(id)
        {
            return Verdict::Busy;
        }
        if self.jobs.len() < MAX_UNPROBED_JOBS && quiet(QUIET) == 0 {
            return Verdict::Free;
        }
        match self.probe {
            Probe::Answered { at } if now().saturating_sub(at) < millis(PROBE_VALID) => {
                Verdict::Free
            }
            _ => Verdict::Unknown,
        }
    }

    /// The threads of its probes.
    fn probes(&self) -> usize {
        usize::from(matches!(self.probe, Probe::Running { .. }))
            + usize::from(self.lookup.is_some())
    }

    fn busy(&self, id: u64) -> MountBusy {
        MountBusy { mount: mount_table::name_of(id), calls: self.jobs.len().max(1) }
    }
}

impl Registry {
    /// Takes a job out of the mounts that it is on.
    fn remove(&mut self, job: &Arc<Job>) {
        for id in job.mounts() {
            self.remove_from(id, job);
        }
        job.clear_mounts();
    }

    fn remove_from(&mut self, id: u64, job: &Arc<Job>) {
        if let Some(mount) = self.mounts.get_mut(&id) {
            mount.jobs.retain(|other| !Arc::ptr_eq(other, job));
        }
        self.forget_if_unused(id);
    }

    fn forget_if_unused(&mut self, id: u64) {
        if self.mounts.get(&id).is_some_and(|mount| mount.jobs.is_empty() && mount.probes() == 0) {
            self.mounts.remove(&id);
        }
    }

    /// Begins a probe of a mount, unless one runs. Where that cannot be, the mount counts as
    /// answering: it is only the bounds of the pools that hold then.
    fn probe(&mut self, id: u64, target: Option<OwnedFd>) {
        let probes: usize = self.mounts.values().map(Mount::probes).sum();
        let mount = self.mounts.entry(id).or_default();
        if matches!(mount.probe, Probe::Running { .. }) {
            return;
        }
        let place = match target {
            Some(fd) => Some(Target::Fd(fd)),
            None => mount_table::point_of(id).map(Target::Path),
        };
        let started =
            probes < MAX_PROBES && place.is_some_and(|place| probe::start(id, place).is_ok());
        mount.probe = match started {
            true => Probe::Running { since: now() },
            false => Probe::Answered { at: now() },
        };
    }
}

/// Declares that the job on this thread works on the mount of `fd` from now on. Call it before the
/// first call that the mount's server has to answer (lookup, read, getattr); it asks no server
/// itself. It may wait up to [`PROBE_WAIT`] while nobody knows whether the mount answers.
///
/// # Errors
/// [`MountBusy`] when the mount does not answer: do not touch it.
pub fn stand_on(fd: BorrowedFd<'_>) -> Result<(), MountBusy> {
    match id_of(fd) {
        Some(id) => enter(id, Some(fd), false),
        None => keep_out::check(None),
    }
}

/// As [`stand_on`], of a second mount besides the one that was declared last: for what is read on
/// one and written on another.
///
/// # Errors
/// [`MountBusy`].
pub fn stand_on_also(fd: BorrowedFd<'_>) -> Result<(), MountBusy> {
    match id_of(fd) {
        Some(id) => enter(id, Some(fd), true),
        None => keep_out::check(None),
    }
}

/// As [`stand_on`], for what has the name `name` in the directory `dir`, which may be another mount.
/// It costs nothing while no mount but `/` could stop answering.
///
/// # Errors
/// [`MountBusy`].
pub fn stand_on_child(dir: BorrowedFd<'_>, name: &OsStr) -> Result<(), MountBusy> {
    if !mount_table::is_any_risky() {
        job::progress();
        return Ok(());
    }
    stand_on(dir)?;
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    match openat(dir, name, flags, Mode::empty()) {
        Ok(child) => stand_on(child.as_fd()),
        // The caller's own call says why.
        Err(_) => Ok(()),
    }
}

/// A mount that a job was on, for later jobs that go on with what is open there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MountId(u64);

impl MountId {
    /// The mount on which the job of this thread works, if that is known.
    pub fn current() -> Option<Self> {
        job::current()?.mount().map(Self)
    }

    /// All on which it works.
    pub(super) fn all() -> impl Iterator<Item = Self> {
        job::current().into_iter().flat_map(|job| job.mounts().map(Self).collect::<Vec<_>>())
    }
}

/// As [`stand_on`], for the mount that an earlier job was on.
///
/// # Errors
/// [`MountBusy`].
pub fn stand_on_again(mount: Option<MountId>) -> Result<(), MountBusy> {
    mount.map_or(Ok(()), |MountId(id)| enter(id, None, false))
}

pub(super) fn stand_on_also_again(MountId(id): MountId) -> Result<(), MountBusy> {
    enter(id, None, true)
}

/// Declares that the job on this thread works on no mount: it waits for a client, say.
pub fn leave_mount() {
    if let Some(job) = job::current() {
        leave(&job);
        job.progress();
    }
}

pub(super) fn leave(job: &Arc<Job>) {
    if job.mounts().next().is_some() {
        REGISTRY.lock().remove(job);
    }
}

/// The mount of a descriptor: from statx(2), from /proc where that has no such answer, and from the
/// path of the descriptor where /proc has none either.
pub(super) fn id_of(fd: BorrowedFd<'_>) -> Option<u64> {
    if let Ok(id) = mounts::mount_id(fd) {
        return Some(id);
    }
    let number = fd.as_raw_fd();
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}"));
    let id = info.ok().and_then(|info| {
        let line = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?;
        line.trim().parse().ok()
    });
    id.or_else(|| mount_table::id_by_link(&PathBuf::from(format!("/proc/self/fd/{number}"))))
}

fn enter(id: u64, fd: Option<BorrowedFd<'_>>, also: bool) -> Result<(), MountBusy> {
    if keep_out::is_keeping_out() {
        return keep_out::check(Some(id));
    }
    let job = job::current();
    if let Some(job) = &job {
        job.progress();
        if job.mount() == Some(id) || (also && job.mounts().any(|other| other == id)) {
            return Ok(());
        }
    }
    let mut registry = REGISTRY.lock();
    if let Some(job) = job.as_ref().filter(|_| !also) {
        registry.remove(job);
    }
    let verdict = wait_for_verdict(&mut registry, id, fd, job.as_deref());
    let mount = registry.mounts.entry(id).or_default();
    match (verdict, job) {
        (Verdict::Busy, _) => {
            let busy = mount.busy(id);
            registry.forget_if_unused(id);
            Err(busy)
        }
        (_, Some(job)) => {
            job.progress();
            mount.jobs.push(Arc::clone(&job));
            if let Some(dropped) = job.add_mount(id) {
                registry.remove_from(dropped, &job);
            }
            Ok(())
        }
        (_, None) => {
            registry.forget_if_unused(id);
            Ok(())
        }
    }
}

fn wait_for_verdict(
    registry: &mut MutexGuard<'_, Registry>,
    id: u64,
    fd: Option<BorrowedFd<'_>>,
    job: Option<&Job>,
) -> Verdict {
    loop {
        let verdict = registry.mounts.get(&id).map_or(Verdict::Free, |mount| mount.verdict(id));
        if verdict != Verdict::Unknown {
            return verdict;
        }
        registry.probe(id, fd.and_then(|fd| fd.try_clone_to_owned().ok()));
        if let Some(job) = job {
            job.set_asking(true);
        }
        // The verdict says when it is enough.
        ANSWERED.wait_for(registry, QUIET);
        if let Some(job) = job {
            job.set_asking(false);
        }
    }
}

/// For whoever waits for a job: the error that names its mount, once the job is overdue and its
/// mount does not answer. It does not block; a mount of which that is not known is probed.
pub(super) fn hung(job: &Arc<Job>) -> Option<MountBusy> {
    if job.quiet_for() <= millis(QUIET) {
        return None;
    }
    let mut registry = REGISTRY.lock();
    for id in job.mounts() {
        let mount = registry.mounts.get(&id)?;
        match mount.verdict(id) {
            Verdict::Free => {}
            Verdict::Busy => return Some(mount.busy(id)),
            Verdict::Unknown => registry.probe(id, None),
        }
    }
    None
}

/// The error that names a job's mount, whatever that has said. None for `/`.
pub(super) fn given_up(job: &Job) -> Option<MountBusy> {
    let id = job.mounts().find(|id| !mount_table::is_root(*id))?;
    REGISTRY.lock().mounts.get(&id).map(|mount| mount.busy(id))
}

/// Whether what a job holds should be given to others meanwhile: it is stalled, or it is quiet on a
/// mount that is suspect, or it waits for the probe of one. A mount of a quiet job is probed.
pub(super) fn is_suspect(job: &Arc<Job>) -> bool {
    if job.is_asking() {
        return true;
    }
    if job.quiet_for() <= millis(QUIET) {
        return false;
    }
    let mut registry = REGISTRY.lock();
    let mut suspect = false;
    for id in job.mounts() {
        suspect |= match registry.mounts.get(&id).map(|mount| mount.probe) {
            Some(Probe::Running { since }) => now().saturating_sub(since) > millis(SUSPECT),
            Some(Probe::Answered { at }) if now().saturating_sub(at) < millis(PROBE_VALID) => {
                job.quiet_for() > millis(STALLED)
            }
            Some(_) => {
                registry.probe(id, None);
                job.quiet_for() > millis(STALLED)
            }
            None => false,
        };
    }
    suspect
}

/// Of these jobs, the mount on which most of them are overdue: one that does not answer, if there is
/// one, and `/` only if they are on no other. A start that waits for a working directory is on the
/// mount of its command as well, so that both count alike.
pub(super) fn busiest<'a>(jobs: impl Iterator<Item = &'a Arc<Job>>) -> Option<MountBusy> {
    let mut counts: HashMap<u64, usize> = HashMap::new();
    for job in jobs.filter(|job| job.is_overdue()) {
        for id in job.mounts() {
            *counts.entry(id).or_default() += 1;
        }
    }
    let registry = REGISTRY.lock();
    let hangs = |id| registry.mounts.get(&id).is_some_and(|m| m.verdict(id) == Verdict::Busy);
    let rank = |(id, calls): &(u64, usize)| (!mount_table::is_root(*id), hangs(*id), *calls);
    let (id, calls) = counts.into_iter().max_by_key(rank)?;
    drop(registry);
    Some(MountBusy { mount: mount_table::name_of(id), calls })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job_on(mounts: &[u64]) -> Arc<Job> {
        let job = Arc::new(Job::default());
        for id in mounts {
            job.add_mount(*id);
        }
        job.set_asking(true);
        job
    }

    #[test]
    fn the_mount_that_jobs_wait_for_is_named_and_not_the_one_of_their_command() {
        let root = mount_table::id_of(std::path::Path::new("/")).unwrap();
        let proc = mount_table::id_of(std::path::Path::new("/proc")).unwrap();
        let jobs = [job_on(&[proc, root]), job_on(&[root, proc]), job_on(&[root])];
        assert_eq!(busiest(jobs.iter()).unwrap().mount, "/proc");
        assert_eq!(busiest(jobs[2..].iter()).unwrap().mount, "/");
    }

    #[test]
    fn the_local_root_is_free_whatever_its_probe_does() {
        let root = mount_table::id_of(std::path::Path::new("/")).unwrap();
        if !mount_table::is_local_root(root) {
            return;
        }
        let waits = Mount { probe: Probe::Running { since: 0 }, ..Mount::default() };
        assert_ne!(waits.judge(root), Verdict::Free);
        assert_eq!(waits.verdict(root), Verdict::Free);
    }
}
