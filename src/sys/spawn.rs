//! Starting a process with one `clone(CLONE_VM | CLONE_VFORK | CLONE_PIDFD)`, and in its control
//! group with `clone3` ([`super::clone`]).
//!
//! Why not `std::process::Command`: with a user to switch to it forks, and a fork copies the page
//! tables: 0.3 ms in a small daemon and 13 ms in one of 300 MB. A child that shares the memory
//! starts in less than 0.1 ms whatever the size (docs/architecture.md). It gives no pidfd either.
//!
//! What makes that sound:
//!
//! * CLONE_VFORK suspends the calling thread until the child has left by exec or exit, so the plan
//!   and the child's stack outlive it.
//! * The child has a stack of its own, and all signals are blocked around the clone, so no handler
//!   of the daemon runs on it.
//! * The child makes raw system calls only ([`super::child`]).
//! * Its table of descriptors is the daemon's until its first step, and has its stdio alone from then on, so
//!   that a file that the daemon has just written can be executed at once ([`super::low_fds`]).
//!
//! Where the system refuses `clone3` (many seccomp filters) the child moves into its control group by
//! itself; where it refuses these flags (some others, gVisor) it is a fork-like clone with the same
//! child, and where it knows no pidfds (Linux before 5.2) a child that is known by its pid. The calls
//! block until the exec: run them on a blocking thread.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    path::Path,
    ptr,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
};

use libc::c_int;
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl, openat},
    sys::stat,
    unistd::pipe2,
};

pub use super::clone::Joining;
use super::{
    child::Plan,
    clone::clone,
    fs_credentials,
    low_fds::{self, LowFds},
    pidfd::{self, ChildRef},
};

/// A process to start.
#[derive(Debug, Clone)]
pub struct Spec<'a> {
    /// The command: a path if it has a slash, else a name to find on the child's PATH.
    pub cmd: &'a str,
    /// Its arguments, without the command itself.
    pub args: &'a [String],
    /// Its whole environment, without doubles.
    pub env: &'a [(String, String)],
    /// Where it runs; entered with its user's rights.
    pub cwd: &'a Path,
    /// Its stdin, stdout and stderr.
    pub stdio: [BorrowedFd<'a>; 3],
    /// Whether stdin is a terminal that shall control the new session.
    pub terminal: bool,
    /// The user to become, or `None` to stay.
    pub credentials: Option<&'a Credentials>,
    /// The limits that it does not inherit; each is set or no process is started.
    pub rlimits: &'a [Rlimit],
    /// The directory of the control group (version 2) in which it starts, or `None` for the
    /// daemon's.
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// A limit of setrlimit(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rlimit {
    /// Which, by the number of the kernel's `RLIMIT_` constant.
    pub resource: u32,
    /// The soft limit.
    pub soft: u64,
    /// The hard limit.
    pub hard: u64,
}

/// A user to become.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The user id.
    pub uid: u32,
    /// The primary group id.
    pub gid: u32,
    /// All supplementary groups.
    pub groups: Vec<u32>,
}

/// What the child was doing when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Stage {
    /// Going into its control group.
    Cgroup = 1,
    /// Leaving the daemon's table of descriptors.
    Descriptors,
    /// Making its own session.
    Session,
    /// Taking the terminal.
    Terminal,
    /// Putting stdin, stdout and stderr in their places.
    Stdio,
    /// Setting a limit: that of the detail's place in the specification.
    Rlimit,
    /// Setting the supplementary groups.
    Groups,
    /// Setting the group.
    Gid,
    /// Setting the user.
    Uid,
    /// Entering the working directory.
    Chdir,
    /// Executing the command.
    Exec,
}

impl Stage {
    fn from_number(number: i32) -> Option<Self> {
        use Stage::{
            Cgroup, Chdir, Descriptors, Exec, Gid, Groups, Rlimit, Session, Stdio, Terminal, Uid,
        };
        [Cgroup, Descriptors, Session, Terminal, Stdio, Rlimit, Groups, Gid, Uid, Chdir, Exec]
            .into_iter()
            .find(|stage| *stage as i32 == number)
    }
}

/// How the child is cloned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Shares the daemon's memory until it executes.
    Vfork,
    /// Has a copy of it.
    Fork,
    /// As [`Mode::Vfork`], without CLONE_PIDFD.
    VforkByPid,
    /// As [`Mode::Fork`], without CLONE_PIDFD.
    ForkByPid,
}

impl Mode {
    pub(super) fn is_vfork(self) -> bool {
        matches!(self, Self::Vfork | Self::VforkByPid)
    }
}

/// A child that was started.
#[derive(Debug)]
pub struct Child {
    /// Its process id.
    pub pid: u32,
    /// Its identity, for waiting and for signals, where the system has pidfds.
    pub pidfd: Option<OwnedFd>,
    /// Why the command could not be executed, when that is the command's own fault (not found, not
    /// executable): the child then has ended with 127 or 126, as a shell would.
    pub exec_error: Option<i32>,
}

impl Child {
    /// What calls on it take, until it is waited for.
    pub fn as_ref(&self) -> ChildRef<'_> {
        ChildRef { pid: self.pid, pidfd: self.pidfd.as_ref().map(OwnedFd::as_fd) }
    }
}

/// Why no process was started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// A string has a NUL inside.
    #[error("a string contains NUL")]
    Nul(#[from] std::ffi::NulError),
    /// The daemon lacks something that it needs for starting processes.
    #[error("{what}: {source}")]
    System {
        /// What could not be made.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The child failed before it could execute the command.
    #[error("{stage:?}: errno {errno}")]
    Child {
        /// What it was doing.
        stage: Stage,
        /// What the kernel said.
        errno: i32,
        /// Which one of several, counted from 0.
        detail: i32,
    },
}

/// The umask of children; beyond all of them where they inherit the daemon's.
static UMASK: AtomicU32 = AtomicU32::new(u32::MAX);

/// Gives all children this umask instead of the daemon's.
pub fn set_umask_of_children(umask: u32) {
    UMASK.store(umask & 0o777, Ordering::Relaxed);
}

pub(super) fn umask_of_children() -> Option<u32> {
    Some(UMASK.load(Ordering::Relaxed)).filter(|umask| *umask <= 0o777)
}

/// Starts a process, in the fast way where the system lets us.
///
/// # Errors
/// [`SpawnError`]; no process is left then.
pub fn spawn(spec: &Spec<'_>) -> Result<Child, SpawnError> {
    let ways = [
        (Mode::Vfork, Joining::Born),
        (Mode::Vfork, Joining::Moved),
        (Mode::Fork, Joining::Moved),
        (Mode::VforkByPid, Joining::Moved),
        (Mode::ForkByPid, Joining::Moved),
    ];
    // Without a group to go to, the first two are the same.
    let ways = if spec.cgroup.is_some() { &ways[..] } else { &ways[1..] };
    let mut refused = None;
    for &(mode, joining) in ways {
        match spawn_as(spec, mode, joining) {
            Err(SpawnError::System { what: CLONE, source }) if is_refusal(&source) => {
                refused = Some(source);
            }
            result => return result,
        }
    }
    let source = refused.unwrap_or_else(|| io::Error::from_raw_os_error(libc::ENOSYS));
    Err(SpawnError::System { what: CLONE, source })
}

/// Whether the system knows or permits no such clone, which says nothing about another way.
fn is_refusal(error: &io::Error) -> bool {
    let refusals = [libc::EINVAL, libc::ENOSYS, libc::EPERM, libc::E2BIG];
    error.raw_os_error().is_some_and(|errno| refusals.contains(&errno))
}

const CLONE: &str = "clone";

/// Whether the system knows no CLOSE_RANGE_UNSHARE (Linux before 5.9), so that children have copies of the
/// daemon's descriptors until they execute.
static COPIES_ONLY: AtomicBool = AtomicBool::new(false);

/// Starts a process in one of the ways. Without a control group `joining` has no meaning.
///
/// # Errors
/// [`SpawnError`]; no process is left then.
pub fn spawn_as(spec: &Spec<'_>, mode: Mode, joining: Joining) -> Result<Child, SpawnError> {
    let failed = |what| move |source: io::Error| SpawnError::System { what, source };
    if fs_credentials::thread_is_changed() {
        // The child would inherit them, and the daemon's uid with them.
        return Err(failed("a thread that acts as a user")(Errno::EPERM.into()));
    }
    if mode.is_vfork()
        && !COPIES_ONLY.load(Ordering::Relaxed)
        && let Some(low) = low_fds::take(spec.stdio)
    {
        match spawn_with(spec, mode, joining, Some(low)) {
            Err(SpawnError::Child { stage: Stage::Descriptors, .. }) => {
                COPIES_ONLY.store(true, Ordering::Relaxed);
            }
            Err(SpawnError::System { what: CLONE, source }) if is_refusal(&source) => {}
            result => return result,
        }
    }
    spawn_with(spec, mode, joining, None)
}

/// Starts a process: with low numbers for its stdio it has no copy of any other descriptor of the daemon's
/// at any time.
fn spawn_with(
    spec: &Spec<'_>,
    mode: Mode,
    joining: Joining,
    low: Option<LowFds>,
) -> Result<Child, SpawnError> {
    let failed = |what| move |source: io::Error| SpawnError::System { what, source };
    // A child that shares the daemon's memory reports there.
    let report = (!mode.is_vfork()).then(|| pipe2(OFlag::O_CLOEXEC)).transpose();
    let (report, report_in) = report.map_err(|e| failed("pipe")(e.into()))?.unzip();
    let report_in = report_in.map(owned_above_stdio).transpose().map_err(failed("dup"))?;
    let stdio = spec.stdio.map(above_stdio);
    let [Ok(stdin), Ok(stdout), Ok(stderr)] = &stdio else {
        let error = stdio.into_iter().find_map(Result::err);
        return Err(failed("dup")(error.unwrap_or_else(|| Errno::EBADF.into())));
    };
    let copied = [stdin.number(), stdout.number(), stderr.number()];
    let numbers = low.as_ref().map_or(copied, |low| low.stdio);
    let born_in = spec.cgroup.filter(|_| joining == Joining::Born);
    let moved_to = spec.cgroup.filter(|_| joining == Joining::Moved).map(processes_of);
    let moved_to = moved_to.transpose().map_err(failed("cgroup.procs"))?;
    let mut plan = Plan::new(spec, (numbers, low), report_in, moved_to)?;

    let (pid, pidfd) = clone(&mut plan, mode, born_in).map_err(failed(CLONE))?;
    let failure = plan.failure();
    // Our ends of its pipes go with it.
    drop(plan);
    let pidfd = match pidfd {
        Some(pidfd) => Some(pidfd),
        None => match pidfd::open(pid) {
            Ok(pidfd) => Some(pidfd),
            Err(error) if pidfd::is_refusal(&error) => None,
            Err(error) => return Err(failed("pidfd")(abandon(pid, error))),
        },
    };
    let child = |exec_error| Child { pid: pid.unsigned_abs(), pidfd, exec_error };
    let report = report
        .map_or(failure, read_report)
        .and_then(|[stage, errno, detail]| Some((Stage::from_number(stage)?, errno, detail)));
    match report {
        None => Ok(child(None)),
        Some((Stage::Exec, errno, _)) if is_the_commands_fault(errno) => Ok(child(Some(errno))),
        Some((stage, errno, detail)) => {
            // It is about to exit; its status says nothing that the report does not.
            let _ = pidfd::wait_blocking(child(None).as_ref());
            Err(SpawnError::Child { stage, errno, detail })
        }
    }
}

/// Whether an execve failed for what the command is, not for what the system lacks.
fn is_the_commands_fault(errno: i32) -> bool {
    !matches!(
        errno,
        libc::E2BIG
            | libc::ENOMEM
            | libc::EINVAL
            | libc::EMFILE
            | libc::ENFILE
            | libc::EAGAIN
            | libc::EFAULT
            | libc::ENOSYS
    )
}

/// A descriptor that the child can put on 0, 1 and 2 without stepping on another.
#[derive(Debug)]
enum Above<'a> {
    Same(BorrowedFd<'a>),
    Moved(OwnedFd),
}

impl Above<'_> {
    fn number(&self) -> c_int {
        match self {
            Self::Same(fd) => fd.as_raw_fd(),
            Self::Moved(fd) => fd.as_raw_fd(),
        }
    }
}

fn above_stdio(fd: BorrowedFd<'_>) -> io::Result<Above<'_>> {
    if fd.as_raw_fd() > 2 {
        return Ok(Above::Same(fd));
    }
    let moved = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(3))?;
    // SAFETY: fcntl has just made this descriptor for us.
    Ok(Above::Moved(unsafe { OwnedFd::from_raw_fd(moved) }))
}

/// The report of a child that failed, or `None` when it has executed its command (or was killed
/// before, which its exit status will say).
fn read_report(pipe: OwnedFd) -> Option<[i32; 3]> {
    let mut report = [0_u8; 12];
    File::from(pipe).read_exact(&mut report).ok()?;
    let [a, b, c, d, e, f, g, h, detail @ ..] = report;
    Some([[a, b, c, d], [e, f, g, h], detail].map(i32::from_ne_bytes))
}

fn owned_above_stdio(fd: OwnedFd) -> io::Result<OwnedFd> {
    let moved = match above_stdio(fd.as_fd())? {
        Above::Moved(fd) => Some(fd),
        Above::Same(_) => None,
    };
    Ok(moved.unwrap_or(fd))
}

/// The file through which processes are moved into a control group.
fn processes_of(cgroup: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    Ok(openat(cgroup, "cgroup.procs", flags, stat::Mode::empty())?)
}

/// Ends a child that we cannot hold on to.
fn abandon(pid: c_int, error: io::Error) -> io::Error {
    // SAFETY: the pid is that of our child, which nobody has waited for, so it is not reused; the
    // calls touch no memory.
    unsafe {
        libc::kill(pid, libc::SIGKILL);
        libc::waitpid(pid, ptr::null_mut(), 0);
    }
    error
}

#[cfg(test)]
mod tests;
