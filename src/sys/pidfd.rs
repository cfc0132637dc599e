//! Processes by pidfd: the identity that is never reused while it is held.
//!
//! Kernels before Linux 5.4, older gVisors and the seccomp filters of older container engines refuse
//! some of these calls or all of them. A child of ours that nobody has waited for is as well known by
//! its pid, which cannot be another's before that: so each call on a [`ChildRef`] falls back to it.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr,
    time::Duration,
};

use libc::{c_int, c_long};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It called exit with this code.
    Exited(i32),
    /// A signal ended it.
    Signalled {
        /// The signal's number.
        signal: i32,
        /// Whether the kernel wrote a core dump.
        core_dumped: bool,
    },
}

/// What a process has used, and those of its children that it has waited for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Spent {
    /// Processor time in user mode.
    pub user: Duration,
    /// Processor time in the kernel.
    pub system: Duration,
}

/// A child of this process that nobody has waited for: its pid is its own, and a pidfd of it where the
/// system has them.
#[derive(Debug, Clone, Copy)]
pub struct ChildRef<'a> {
    /// Its process id.
    pub pid: u32,
    /// Its pidfd, if there is one.
    pub pidfd: Option<BorrowedFd<'a>>,
}

impl ChildRef<'_> {
    fn id(self) -> io::Result<c_int> {
        // 0 and 1 would be others.
        let pid = c_int::try_from(self.pid).ok().filter(|pid| *pid > 1);
        pid.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))
    }
}

/// Whether an error of a call on pidfds means that the system does not know or permit that call: old
/// kernels say ENOSYS or EINVAL, and filters EPERM, EACCES or ENOSYS.
pub fn is_refusal(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOSYS | libc::EPERM | libc::EACCES | libc::EINVAL | libc::EOPNOTSUPP)
    )
}

/// Opens a pidfd. Of a child that has not been waited for the pid cannot have been reused; for any
/// other process the caller has to make sure, behind the call, that it is the one that is meant.
///
/// # Errors
/// ESRCH when there is no such process, EMFILE, ENOSYS.
pub fn open(pid: c_int) -> io::Result<OwnedFd> {
    // SAFETY: the call takes two integers and touches no memory.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    let fd = c_int::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends a signal to a child itself.
///
/// # Errors
/// ESRCH when it has been waited for already, EINVAL for a number that is no signal, EPERM.
pub fn signal_child(child: ChildRef<'_>, signal: i32) -> io::Result<()> {
    signal_by(child.pidfd, child.id()?, signal)
}

/// Sends a signal by a pidfd, and by the pid where there is none or the call is refused. The caller
/// has to make sure that the pid is not another's.
///
/// # Errors
/// As [`signal_child`].
pub fn signal_by(pidfd: Option<BorrowedFd<'_>>, pid: c_int, signal: i32) -> io::Result<()> {
    match pidfd.map(|pidfd| send_signal(pidfd, signal)) {
        // If the refusal was about the process and not about the call, this one gets it as well.
        Some(Err(error)) if is_refusal(&error) => kill(pid, signal),
        None => kill(pid, signal),
        Some(result) => result,
    }
}

/// Sends a signal to whatever process has this pid: the caller has to make sure which one that is.
///
/// # Errors
/// Those of kill(2).
pub fn kill(pid: c_int, signal: i32) -> io::Result<()> {
    // Others than these would be groups, or everybody.
    if pid <= 1 {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    // SAFETY: the call takes two integers and touches no memory.
    check(unsafe { libc::kill(pid, signal) }.into()).map(|_| ())
}

/// Sends a signal to the process itself.
///
/// # Errors
/// ESRCH when it has been waited for already, EINVAL for a number that is no signal, EPERM; and those
/// of [`is_refusal`].
pub fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    let info = ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo is allowed and means what kill(2) sends; the descriptor is open for
    // as long as it is borrowed.
    let result =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, info, 0) };
    check(result).map(|_| ())
}

/// Sends a signal to a process group, by its number: that of a process that has made itself the
/// leader of a group and has not been waited for.
///
/// # Errors
/// ESRCH when there is no such group, EPERM when none of it may be signalled.
pub fn signal_group(group: u32, signal: i32) -> io::Result<()> {
    // 0 and 1 would be the daemon's own group and everybody.
    let group = c_int::try_from(group).ok().filter(|group| *group > 1);
    let group = group.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
    // SAFETY: the call takes two integers and touches no memory.
    check(unsafe { libc::kill(-group, signal) }.into()).map(|_| ())
}

/// How the process ended, or `None` while it runs. Leaves the zombie, so that the pid is not
/// reused yet.
///
/// # Errors
/// ECHILD when it is no child of ours or has been waited for.
pub fn peek(child: ChildRef<'_>) -> io::Result<Option<Exit>> {
    wait_id(child, libc::WEXITED | libc::WNOHANG | libc::WNOWAIT)
}

/// As [`peek`], and takes the zombie away.
///
/// # Errors
/// As [`peek`].
pub fn wait(child: ChildRef<'_>) -> io::Result<Option<Exit>> {
    wait_id(child, libc::WEXITED | libc::WNOHANG)
}

/// Waits for the end of a process, takes the zombie away, and blocks the thread meanwhile.
///
/// # Errors
/// As [`peek`].
pub fn wait_blocking(child: ChildRef<'_>) -> io::Result<Option<Exit>> {
    wait_id(child, libc::WEXITED)
}

/// Makes a call of waitid(2) by the pidfd (Linux 5.4), and where that is refused by the pid.
fn by_pidfd_or_pid<T>(
    child: ChildRef<'_>,
    call: impl Fn(libc::idtype_t, libc::id_t) -> io::Result<T>,
) -> io::Result<T> {
    if let Some(pidfd) = child.pidfd {
        let id = libc::id_t::try_from(pidfd.as_raw_fd()).map_err(io::Error::other)?;
        match call(libc::P_PIDFD, id) {
            Err(error) if is_refusal(&error) => {}
            result => return result,
        }
    }
    call(libc::P_PID, libc::id_t::try_from(child.id()?).map_err(io::Error::other)?)
}

fn wait_id(child: ChildRef<'_>, options: c_int) -> io::Result<Option<Exit>> {
    by_pidfd_or_pid(child, |kind, id| wait_for(kind, id, options))
}

fn wait_for(kind: libc::idtype_t, id: libc::id_t, options: c_int) -> io::Result<Option<Exit>> {
    loop {
        // SAFETY: a siginfo of zeros is valid, and with WNOHANG the kernel leaves si_pid at zero
        // when there is nothing to report.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: `info` is a valid place for the answer and outlives the call.
        if unsafe { libc::waitid(kind, id, &raw mut info, options) } != 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        }
        // SAFETY: waitid has filled in (or left at zero) the fields of a child's siginfo.
        let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
        if pid == 0 {
            return Ok(None);
        }
        return Ok(Some(match info.si_code {
            libc::CLD_EXITED => Exit::Exited(status),
            code => Exit::Signalled { signal: status, core_dumped: code == libc::CLD_DUMPED },
        }));
    }
}

/// What an ended child has used, while nobody has waited for it.
///
/// # Errors
/// As [`peek`].
pub fn spent(child: ChildRef<'_>) -> io::Result<Spent> {
    by_pidfd_or_pid(child, spent_by)
}

fn spent_by(kind: libc::idtype_t, id: libc::id_t) -> io::Result<Spent> {
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: zeros are valid for both.
    let (mut info, mut usage): (libc::siginfo_t, libc::rusage) = unsafe { std::mem::zeroed() };
    // SAFETY: the system call that libc's waitid makes, with the fifth argument that libc hides;
    // both places are valid, and the kernel's rusage is the beginning of libc's.
    let result = unsafe {
        libc::syscall(libc::SYS_waitid, kind, id, &raw mut info, options, &raw mut usage)
    };
    check(result)?;
    let span = |time: libc::timeval| {
        let micros = u32::try_from(time.tv_usec).unwrap_or_default();
        let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
        Duration::from_secs(seconds) + Duration::from_micros(micros.into())
    };
    Ok(Spent { user: span(usage.ru_utime), system: span(usage.ru_stime) })
}

/// Makes the kernel keep the exit status of children: a supervisor that ignores SIGCHLD hands that
/// down through exec, and then every wait fails with ECHILD.
pub fn keep_exit_statuses() {
    // SAFETY: zeros are a valid sigaction: SIG_DFL without flags.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: the old action is written to a valid place; the disposition is only read.
    let read = unsafe { libc::sigaction(libc::SIGCHLD, ptr::null(), &raw mut action) };
    let loses = action.sa_sigaction == libc::SIG_IGN || action.sa_flags & libc::SA_NOCLDWAIT != 0;
    // A handler (the runtime's, for one) already keeps them, and is not touched.
    if read == 0 && loses {
        action.sa_sigaction = libc::SIG_DFL;
        action.sa_flags = 0;
        // SAFETY: installs the default disposition, which runs no code of ours.
        unsafe { libc::sigaction(libc::SIGCHLD, &raw const action, ptr::null_mut()) };
    }
}

fn check(result: c_long) -> io::Result<c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
