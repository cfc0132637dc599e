//! What nix lacks about signals, or has as unsafe: waiting for blocked ones, ignoring, realtime ones.

use std::{io, ptr, time::Duration};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Waits for one of these signals, which must be blocked, at most for `timeout` (`None`: for as
/// long as it takes). `Ok(None)` when none came in time.
///
/// Needs no descriptor, unlike signalfd(2), and so cannot fail for want of one.
///
/// # Errors
/// None that a caller could cause.
pub fn wait(signals: &SigSet, timeout: Option<Duration>) -> io::Result<Option<Signal>> {
    // SAFETY: zeros are a valid timespec.
    let mut limit: libc::timespec = unsafe { std::mem::zeroed() };
    let limit = match timeout {
        Some(timeout) => {
            limit.tv_sec = timeout.as_secs().try_into().map_err(io::Error::other)?;
            limit.tv_nsec = timeout.subsec_nanos().into();
            &raw const limit
        }
        None => ptr::null(),
    };
    // SAFETY: the set and the timespec outlive the call, and a null siginfo is allowed.
    let number = unsafe { libc::sigtimedwait(signals.as_ref(), ptr::null_mut(), limit) };
    if number >= 0 {
        return Ok(Signal::try_from(number).ok());
    }
    let error = io::Error::last_os_error();
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
        _ => Err(error),
    }
}

/// Ignores a signal from now on. Whoever executes another program has to undo it there.
///
/// # Errors
/// EINVAL for SIGKILL and SIGSTOP.
pub fn ignore(signal: Signal) -> io::Result<()> {
    let action = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
    // SAFETY: no handler is installed that could run in the middle of anything.
    unsafe { sigaction(signal, &action) }?;
    Ok(())
}

/// Sends the realtime signal that is `offset` behind SIGRTMIN, which [`Signal`] cannot name.
///
/// # Errors
/// EPERM, ESRCH, or EINVAL beyond SIGRTMAX.
pub fn send_realtime(pid: i32, offset: i32) -> io::Result<()> {
    // SAFETY: the call takes two integers and touches no memory.
    match unsafe { libc::kill(pid, libc::SIGRTMIN() + offset) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_a_blocked_signal_or_gives_up_in_time() {
        let mut set = SigSet::empty();
        set.add(Signal::SIGUSR2);
        set.thread_block().unwrap();
        assert_eq!(wait(&set, Some(Duration::from_millis(1))).unwrap(), None);
        // To this thread only, so that no other test gets it.
        nix::sys::signal::raise(Signal::SIGUSR2).unwrap();
        assert_eq!(wait(&set, None).unwrap(), Some(Signal::SIGUSR2));
    }
}
