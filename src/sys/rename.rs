//! Renaming without replacing: nix has renameat2(2) for glibc only.

use std::{
    ffi::{CString, OsStr},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use nix::{errno::Errno, fcntl::AT_FDCWD};

/// Renames `from` to `to`, which must not exist: `EEXIST`.
///
/// # Errors
/// Those of renameat2(2); `EINVAL` and `ENOSYS` where the file system or the kernel cannot do it.
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
        let tmp = tempfile::tempdir().unwrap();
        let (from, to) = (tmp.path().join("from"), tmp.path().join("to"));
        fs::write(&from, "from").unwrap();
        rename_new(&from, &to).unwrap();
        fs::write(&from, "other").unwrap();
        assert_eq!(rename_new(&from, &to).unwrap_err(), Errno::EEXIST);
        assert_eq!(fs::read(&to).unwrap(), b"from");
    }
}
