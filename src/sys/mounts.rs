//! What a path says about mounts.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use nix::{errno::Errno, sys::stat::fstat};

use super::procfs;

/// Whether a descriptor (`O_PATH`) stands for the root of a mount. None where the kernel does not say:
/// before 5.8.
///
/// # Errors
/// Those of statx(2).
pub fn is_mount_root(fd: &impl AsFd) -> nix::Result<Option<bool>> {
    // Nothing is asked for that the file system's server has to be asked for.
    let answer = match statx(fd.as_fd(), libc::AT_STATX_DONT_SYNC, 0) {
        Ok(answer) => answer,
        Err(Errno::ENOSYS | Errno::EPERM) => return Ok(None),
        Err(error) => return Err(error),
    };
    let known = libc::STATX_ATTR_MOUNT_ROOT as u64;
    Ok((answer.stx_attributes_mask & known != 0).then_some(answer.stx_attributes & known != 0))
}

/// Whether two open files are on different mounts, by the numbers of those, or by the devices where
/// there is no /proc: then a mount within one file system is not seen.
///
/// # Errors
/// Those of fstat(2), where there is no /proc.
pub fn are_on_two_mounts(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> io::Result<bool> {
    match (procfs::mount_id(one), procfs::mount_id(other)) {
        (Some(one), Some(other)) => Ok(one != other),
        _ => Ok(fstat(one)?.st_dev != fstat(other)?.st_dev),
    }
}

/// The id of the mount that a descriptor is on. It is taken from what the kernel holds in memory:
/// a file system that does not answer is not asked.
///
/// # Errors
/// ENOSYS where the kernel has no such answer (before 5.8).
pub fn mount_id(fd: BorrowedFd<'_>) -> nix::Result<u64> {
    let answer = statx(fd, libc::AT_STATX_DONT_SYNC, libc::STATX_MNT_ID)?;
    match answer.stx_mask & libc::STATX_MNT_ID {
        0 => Err(Errno::ENOSYS),
        _ => Ok(answer.stx_mnt_id),
    }
}

/// Asks the file system of a descriptor for its attributes, whatever the kernel has cached. It
/// blocks for as long as the file system's server does not answer.
///
/// # Errors
/// Those of statx(2); they are answers too.
pub fn ask(fd: BorrowedFd<'_>) -> nix::Result<()> {
    statx(fd, libc::AT_STATX_FORCE_SYNC, libc::STATX_BASIC_STATS).map(drop)
}

/// statx(2) of a descriptor, which never mounts anything.
fn statx(fd: BorrowedFd<'_>, flags: i32, mask: u32) -> nix::Result<libc::statx> {
    let mut answer = MaybeUninit::<libc::statx>::zeroed();
    let flags = flags | libc::AT_EMPTY_PATH | libc::AT_NO_AUTOMOUNT;
    // SAFETY: the name is a C string and the answer a writable statx, both alive during the call.
    let result =
        unsafe { libc::statx(fd.as_raw_fd(), c"".as_ptr(), flags, mask, answer.as_mut_ptr()) };
    Errno::result(result)?;
    // SAFETY: it was zeroed, which is a valid statx, and the kernel has filled it.
    Ok(unsafe { answer.assume_init() })
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn mounts_are_told_from_directories() {
        for (path, expected) in
            [("/", true), ("/proc", true), ("/proc/self", false), ("/usr/bin", false)]
        {
            let is = is_mount_root(&File::open(path).unwrap()).unwrap();
            assert!(is.is_none_or(|is| is == expected), "{path}");
        }
    }

    #[test]
    fn a_descriptor_has_the_id_of_its_mount() {
        let id = |path| mount_id(File::open(path).unwrap().as_fd()).unwrap();
        assert_eq!(id("/proc"), id("/proc/self/status"));
        assert_ne!(id("/proc"), id("/"));
        ask(File::open("/proc").unwrap().as_fd()).unwrap();
    }
}
