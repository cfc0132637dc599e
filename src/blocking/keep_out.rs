//! Work that stops in front of the mounts that a program or another machine serves.
//!
//! A thread that serves everybody must not make a call that may never return, and handing each call to
//! another thread is slow. So it first works by itself and keeps out of such mounts: whatever it opens
//! by one name alone, it declares before it asks anything of it ([`stand_on`](super::stand_on),
//! [`keep_out_of`]), which fails there. Only work that has met such a mount is done by another thread.

use std::{cell::Cell, os::fd::BorrowedFd};

use super::{MountBusy, mount, mount_table};

thread_local! {
    /// While this thread keeps out of such mounts: whether it has met one.
    static MET: Cell<Option<bool>> = const { Cell::new(None) };
}

/// Ends the mode when it is dropped.
struct KeepingOut;

impl Drop for KeepingOut {
    fn drop(&mut self) {
        MET.set(None);
    }
}

/// Does work that keeps out of mounts that a program or another machine serves, other than `/`. None
/// when it has met one: then what it returned is worth nothing.
pub fn keep_out_of_served<T>(work: impl FnOnce() -> T) -> Option<T> {
    MET.set(Some(false));
    let mode = KeepingOut;
    let done = work();
    let met = MET.get() != Some(false);
    drop(mode);
    (!met).then_some(done)
}

/// Whether the work on this thread keeps out of such mounts.
pub fn is_keeping_out() -> bool {
    MET.get().is_some()
}

/// While the work on this thread keeps out of served mounts: fails if that is where `fd` is, or where
/// that cannot be found out. It asks no server.
///
/// # Errors
/// [`MountBusy`].
pub fn keep_out_of(fd: Option<BorrowedFd<'_>>) -> Result<(), MountBusy> {
    match is_keeping_out() {
        true => check(fd.and_then(mount::id_of)),
        false => Ok(()),
    }
}

/// The same of a mount.
pub(super) fn check(id: Option<u64>) -> Result<(), MountBusy> {
    if !is_keeping_out() || id.is_some_and(|id| !mount_table::is_served(id)) {
        return Ok(());
    }
    MET.set(Some(true));
    let mount = id.map_or_else(|| "an unknown mount".to_owned(), mount_table::name_of);
    Err(MountBusy { mount, calls: 0 })
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsFd};

    use super::*;

    #[test]
    fn what_is_not_known_to_be_local_is_left_to_others() {
        let local = File::open("/proc").unwrap();
        let unknown = || keep_out_of(None);
        assert_eq!(unknown(), Ok(()), "nobody keeps out of anything");
        let met = keep_out_of_served(|| super::super::stand_on(local.as_fd()).is_ok());
        assert_eq!(met, Some(true));
        assert_eq!(keep_out_of_served(|| unknown().is_err()), None);
        assert!(!is_keeping_out());
    }
}
