//! Errno values of the standard library's errors, and their texts.

use std::io;

use nix::errno::Errno;

/// The text for an errno, which is what clients of E2B's daemon have seen.
pub fn text(errno: Errno) -> String {
    crate::sys::errno::text(errno as i32)
}

/// The errno in an error of the standard library; EIO where there is none.
pub fn of(error: &io::Error) -> Errno {
    match error.raw_os_error() {
        Some(raw) => Errno::from_raw(raw),
        // Without an errno it did not come from the kernel: a NUL byte, or a write of no bytes.
        None if error.kind() == io::ErrorKind::InvalidInput => Errno::EINVAL,
        None => Errno::EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_texts_that_clients_have_seen() {
        for (errno, wanted) in [
            (Errno::ENOENT, "no such file or directory"),
            (Errno::ENOTDIR, "not a directory"),
            (Errno::EACCES, "permission denied"),
            (Errno::EPERM, "operation not permitted"),
            (Errno::EEXIST, "file exists"),
            (Errno::ENOTEMPTY, "directory not empty"),
            (Errno::EINVAL, "invalid argument"),
            (Errno::ENOSPC, "no space left on device"),
            (Errno::EXDEV, "invalid cross-device link"),
            (Errno::EROFS, "read-only file system"),
            (Errno::EMFILE, "too many open files"),
            (Errno::ENAMETOOLONG, "file name too long"),
            (Errno::EBUSY, "device or resource busy"),
            (Errno::ETXTBSY, "text file busy"),
            (Errno::EISDIR, "is a directory"),
        ] {
            assert_eq!(text(errno), wanted);
        }
    }
}
