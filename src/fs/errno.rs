//! The texts of errno values as Go prints them, which is what clients of E2B's daemon have seen.
//!
//! libc's `strerror` is not asked: musl's texts differ from glibc's, which Go's table copies.

use std::io;

use nix::errno::Errno;

/// Go's text for an errno: glibc's, in lower case.
pub fn text(errno: Errno) -> String {
    // Where nix's own description, in lower case, is not glibc's.
    let differs = match errno {
        Errno::EXDEV => "invalid cross-device link",
        Errno::ELOOP => "too many levels of symbolic links",
        Errno::EOPNOTSUPP => "operation not supported",
        Errno::ENFILE => "too many open files in system",
        Errno::EDQUOT => "disk quota exceeded",
        Errno::ESTALE => "stale file handle",
        Errno::EIO => "input/output error",
        Errno::ENOMEM => "cannot allocate memory",
        Errno::EAGAIN => "resource temporarily unavailable",
        _ => return errno.desc().to_lowercase(),
    };
    differs.to_owned()
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
