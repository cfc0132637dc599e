//! Descriptors that the daemon was started with and that its commands must not get.

use std::{fs, io};

use libc::c_int;

/// The descriptors that are looked at where neither the system call nor /proc is there.
const MAX_GUESSED: c_int = 4096;

/// Marks every descriptor but stdin, stdout and stderr close-on-exec: close_range(2) of Linux 5.11, and
/// elsewhere one by one. A child does the same before it executes; without that system call it relies
/// on this one, since all that the daemon opens itself is close-on-exec. Only at the start: a
/// descriptor that another thread opens meanwhile could be missed.
///
/// # Errors
/// When one could not be marked.
pub fn set_close_on_exec() -> io::Result<()> {
    let flag = libc::CLOSE_RANGE_CLOEXEC;
    // SAFETY: the call takes three integers, touches no memory and closes nothing with this flag.
    if unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, flag) } == 0 {
        return Ok(());
    }
    for fd in listed() {
        // SAFETY: the call takes three integers and touches no memory; whoever owns the descriptor
        // goes on owning it.
        if fd > 2 && unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            let error = io::Error::last_os_error();
            // The list itself had one that is closed by now.
            if error.raw_os_error() != Some(libc::EBADF) {
                return Err(error);
            }
        }
    }
    Ok(())
}

/// Closes every descriptor but stdin, stdout and stderr. Only at the start, before the daemon has opened any
/// of its own.
pub fn close_all() {
    // SAFETY: the call takes three integers and touches no memory; nothing in the daemon owns a descriptor
    // yet.
    if unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) } == 0 {
        return;
    }
    for fd in listed().into_iter().filter(|fd| *fd > 2) {
        // SAFETY: as above. One that is not open is an error that says nothing.
        unsafe { libc::close(fd) };
    }
}

/// The descriptors that are open, or may be.
fn listed() -> Vec<c_int> {
    let listed = fs::read_dir("/proc/self/fd").map(|entries| {
        let names = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        names.collect()
    });
    listed.unwrap_or_else(|_| (3..MAX_GUESSED).collect())
}
