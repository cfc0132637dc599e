//! Descriptors that the runtime watches.

use std::os::fd::OwnedFd;

use tokio::io::{
    Interest,
    unix::{AsyncFd, AsyncFdRegisterError},
};

/// Has the runtime watch a descriptor, for reading and for writing. Must be called in its context.
///
/// # Errors
/// The kernel cannot watch it; the descriptor comes back with the reason.
pub fn watch(fd: OwnedFd) -> Result<AsyncFd<OwnedFd>, AsyncFdRegisterError<OwnedFd>> {
    // SAFETY: an OwnedFd stays the same open descriptor until it is dropped, and inside the
    // AsyncFd, which only lends it out, nobody can close or replace it.
    unsafe { AsyncFd::register(fd) }
}

/// As [`watch`], for changes of a file of the kernel's (POLLPRI).
///
/// # Errors
/// As [`watch`].
pub fn watch_priority(fd: OwnedFd) -> Result<AsyncFd<OwnedFd>, AsyncFdRegisterError<OwnedFd>> {
    // SAFETY: as in `watch`.
    unsafe { AsyncFd::register_with_interest(fd, Interest::PRIORITY) }
}
