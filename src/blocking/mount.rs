//! Which mount the job on this thread works on, so that one that never answers is known by name.

use std::{io, os::fd::BorrowedFd};

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

/// Declares that the job on this thread works on the mount of `fd` from now on. Call it before the
/// first call that the mount's server has to answer (lookup, read, getattr); it asks no server
/// itself.
///
/// # Errors
/// [`MountBusy`] when other jobs have waited for this mount for too long: do not touch it.
pub fn stand_on(_fd: BorrowedFd<'_>) -> Result<(), MountBusy> {
    Ok(())
}
