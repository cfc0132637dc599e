//! Renaming without replacing: nix has renameat2(2) for glibc only.

use std::{
    ffi::{CString, OsStr},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, renameat},
    sys::stat::fstatat,
    unistd::{UnlinkatFlags, linkat, unlinkat},
};

/// Renames `from` to `to`, which must not exist: `EEXIST`.
///
/// # Errors
/// Those of renameat2(2), linkat(2) and renameat(2).
pub fn rename_new(from: &Path, to: &Path) -> nix::Result<()> {
    rename_new_at(AT_FDCWD, from.as_os_str(), AT_FDCWD, to.as_os_str())
}

/// As [`rename_new`], with names in two directories.
///
/// # Errors
/// As [`rename_new`].
pub fn rename_new_at(
    from_dir: BorrowedFd<'_>,
    from: &OsStr,
    to_dir: BorrowedFd<'_>,
    to: &OsStr,
) -> nix::Result<()> {
    match rename_no_replace(from_dir, from, to_dir, to) {
        // A file system that knows no flags, a kernel without the call, a filter that forbids it.
        Err(Errno::EINVAL | Errno::ENOSYS | Errno::EPERM) => {
            link_or_rename(from_dir, from, to_dir, to)
        }
        renamed => renamed,
    }
}

/// A second link to a file cannot replace anything. What can have none (a directory, and anything on
/// some file systems) is looked for before it is renamed; a directory replaces nothing but an empty
/// one then.
fn link_or_rename(
    from_dir: BorrowedFd<'_>,
    from: &OsStr,
    to_dir: BorrowedFd<'_>,
    to: &OsStr,
) -> nix::Result<()> {
    match linkat(from_dir, from, to_dir, to, AtFlags::empty()) {
        Ok(()) => unlinkat(from_dir, from, UnlinkatFlags::NoRemoveDir),
        Err(Errno::EPERM | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EMLINK) => {
            match fstatat(to_dir, to, AtFlags::AT_SYMLINK_NOFOLLOW) {
                Ok(_) => Err(Errno::EEXIST),
                Err(Errno::ENOENT) => renameat(from_dir, from, to_dir, to),
                Err(error) => Err(error),
            }
        }
        Err(error) => Err(error),
    }
}

fn rename_no_replace(
    from_dir: BorrowedFd<'_>,
    from: &OsStr,
    to_dir: BorrowedFd<'_>,
    to: &OsStr,
) -> nix::Result<()> {
    let name = |name: &OsStr| CString::new(name.as_bytes()).map_err(|_| Errno::EINVAL);
    let (from, to) = (name(from)?, name(to)?);
    // SAFETY: both names are C strings and both descriptors open while the call lasts, and the flag is
    // the kernel's.
    let result = unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            from_dir.as_fd().as_raw_fd(),
            from.as_ptr(),
            to_dir.as_fd().as_raw_fd(),
            to.as_ptr(),
            libc::RENAME_NOREPLACE,
        )
    };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_exists_is_not_replaced() {
        for rename in [rename_new_at, rename_no_replace, link_or_rename] {
            let rename = |from: &Path, to: &Path| {
                rename(AT_FDCWD, from.as_os_str(), AT_FDCWD, to.as_os_str())
            };
            let tmp = tempfile::tempdir().unwrap();
            let (from, to) = (tmp.path().join("from"), tmp.path().join("to"));
            fs::write(&from, "from").unwrap();
            rename(&from, &to).unwrap();
            fs::write(&from, "other").unwrap();
            assert_eq!(rename(&from, &to).unwrap_err(), Errno::EEXIST);
            assert_eq!(fs::read(&to).unwrap(), b"from");
            let (from, to) = (tmp.path().join("from-dir"), tmp.path().join("to-dir"));
            fs::create_dir(&from).unwrap();
            rename(&from, &to).unwrap();
            fs::create_dir(&from).unwrap();
            assert_eq!(rename(&from, &to).unwrap_err(), Errno::EEXIST);
            assert_eq!(rename(&tmp.path().join("no"), &from.join("x")).unwrap_err(), Errno::ENOENT);
        }
    }
}
