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
    let mut answer = MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_EMPTY_PATH | libc::AT_NO_AUTOMOUNT;
    let raw = fd.as_fd().as_raw_fd();
    // SAFETY: the name is a C string and the answer a writable statx, both alive during the call.
    let result = unsafe { libc::statx(raw, c"".as_ptr(), flags, 0, answer.as_mut_ptr()) };
    match Errno::result(result) {
        Ok(_) => {}
        Err(Errno::ENOSYS | Errno::EPERM) => return Ok(None),
        Err(error) => return Err(error),
    }
    // SAFETY: it was zeroed, which is a valid statx, and the kernel has filled it.
    let answer = unsafe { answer.assume_init() };
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
}
