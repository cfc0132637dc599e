//! Processes by pidfd: the identity that is never reused while it is held.

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
    /// The most memory of one of them, in bytes.
    pub memory: u64,
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

/// Sends a signal to the process itself.
///
/// # Errors
/// ESRCH when it has been waited for already, EINVAL for a number that is no signal, EPERM.
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
pub fn peek(pidfd: BorrowedFd<'_>) -> io::Result<Option<Exit>> {
    wait_id(pidfd, libc::WEXITED | libc::WNOHANG | libc::WNOWAIT)
}

/// As [`peek`], and takes the zombie away.
///
/// # Errors
/// As [`peek`].
pub fn wait(pidfd: BorrowedFd<'_>) -> io::Result<Option<Exit>> {
    wait_id(pidfd, libc::WEXITED | libc::WNOHANG)
}

/// Waits for the end of a process, takes the zombie away, and blocks the thread meanwhile.
///
/// # Errors
/// As [`peek`].
pub fn wait_blocking(pidfd: BorrowedFd<'_>) -> io::Result<Option<Exit>> {
    wait_id(pidfd, libc::WEXITED)
}

fn wait_id(pidfd: BorrowedFd<'_>, options: c_int) -> io::Result<Option<Exit>> {
    let id = libc::id_t::try_from(pidfd.as_raw_fd()).map_err(io::Error::other)?;
    loop {
        // SAFETY: a siginfo of zeros is valid, and with WNOHANG the kernel leaves si_pid at zero
        // when there is nothing to report.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: `info` is a valid place for the answer and outlives the call.
        if unsafe { libc::waitid(libc::P_PIDFD, id, &raw mut info, options) } != 0 {
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
pub fn spent(pidfd: BorrowedFd<'_>) -> io::Result<Spent> {
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: zeros are valid for both.
    let (mut info, mut usage): (libc::siginfo_t, libc::rusage) = unsafe { std::mem::zeroed() };
    // SAFETY: the system call that libc's waitid makes, with the fifth argument that libc hides;
    // both places are valid, and the kernel's rusage is the beginning of libc's.
    let result = unsafe {
        libc::syscall(
            libc::SYS_waitid,
            libc::P_PIDFD,
            pidfd.as_raw_fd(),
            &raw mut info,
            options,
            &raw mut usage,
        )
    };
    check(result)?;
    let span = |time: libc::timeval| {
        let micros = u32::try_from(time.tv_usec).unwrap_or_default();
        let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
        Duration::from_secs(seconds) + Duration::from_micros(micros.into())
    };
    // The kernel counts it in KiB.
    let memory = u64::try_from(usage.ru_maxrss).unwrap_or_default().saturating_mul(1024);
    Ok(Spent { user: span(usage.ru_utime), system: span(usage.ru_stime), memory })
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
