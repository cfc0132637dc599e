//! Sharing the blocks of one file with another: what makes a copy cost nothing where the file
//! system can (btrfs, XFS, bcachefs).

use std::os::fd::{AsFd, AsRawFd};

/// Makes `to` have the content of `from` without copying it: ioctl_ficlone(2).
///
/// # Errors
/// `EOPNOTSUPP`, `EXDEV`, `EINVAL` and others where it has to be copied instead.
pub fn clone_content(from: &impl AsFd, to: &impl AsFd) -> nix::Result<()> {
    let (from, to) = (from.as_fd().as_raw_fd(), to.as_fd().as_raw_fd());
    // SAFETY: both descriptors are open for the call, since they are borrowed, and the kernel only
    // reads the argument, which is a number.
    let result = unsafe { libc::ioctl(to, libc::FICLONE, from) };
    nix::errno::Errno::result(result).map(drop)
}
