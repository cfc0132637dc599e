//! The texts of error numbers.
//!
//! Clients show them and tests compare them, so they must not depend on the C library that the
//! binary was linked with: musl and glibc disagree on about a third of them, and `nix` on others.
//! The table holds those that a daemon meets, spelt as glibc and Go do.

use nix::errno::Errno;

/// The text with a capital, as programs print it: `No such file or directory`.
pub fn capitalised(errno: i32) -> String {
    let text = match errno {
        libc::EPERM => "Operation not permitted",
        libc::ENOENT => "No such file or directory",
        libc::ESRCH => "No such process",
        libc::EINTR => "Interrupted system call",
        libc::EIO => "Input/output error",
        libc::ENXIO => "No such device or address",
        libc::E2BIG => "Argument list too long",
        libc::ENOEXEC => "Exec format error",
        libc::EBADF => "Bad file descriptor",
        libc::ECHILD => "No child processes",
        libc::EAGAIN => "Resource temporarily unavailable",
        libc::ENOMEM => "Cannot allocate memory",
        libc::EACCES => "Permission denied",
        libc::EFAULT => "Bad address",
        libc::EBUSY => "Device or resource busy",
        libc::EEXIST => "File exists",
        libc::EXDEV => "Invalid cross-device link",
        libc::ENODEV => "No such device",
        libc::ENOTDIR => "Not a directory",
        libc::EISDIR => "Is a directory",
        libc::EINVAL => "Invalid argument",
        libc::ENFILE => "Too many open files in system",
        libc::EMFILE => "Too many open files",
        libc::ENOTTY => "Inappropriate ioctl for device",
        libc::ETXTBSY => "Text file busy",
        libc::EFBIG => "File too large",
        libc::ENOSPC => "No space left on device",
        libc::EROFS => "Read-only file system",
        libc::EMLINK => "Too many links",
        libc::EPIPE => "Broken pipe",
        libc::ENAMETOOLONG => "File name too long",
        libc::ENOSYS => "Function not implemented",
        libc::ENOTEMPTY => "Directory not empty",
        libc::ELOOP => "Too many levels of symbolic links",
        libc::ELIBBAD => "Accessing a corrupted shared library",
        libc::EDQUOT => "Disk quota exceeded",
        libc::ESTALE => "Stale file handle",
        libc::ETIMEDOUT => "Connection timed out",
        other => match Errno::from_raw(other) {
            Errno::UnknownErrno => return format!("Errno {other}"),
            known => known.desc(),
        },
    };
    text.to_owned()
}

/// The text in lower case, as Go prints it: `no such file or directory`.
pub fn text(errno: i32) -> String {
    let mut text = capitalised(errno);
    if let Some(first) = text.get_mut(..1) {
        first.make_ascii_lowercase();
    }
    text
}

/// The text of an I/O error: that of its number, else its own.
pub fn text_of(error: &std::io::Error) -> String {
    error.raw_os_error().map_or_else(|| error.to_string(), text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_those_of_go_and_of_glibc() {
        assert_eq!(text(libc::ENOENT), "no such file or directory");
        assert_eq!(text(libc::EACCES), "permission denied");
        assert_eq!(text(libc::E2BIG), "argument list too long");
        assert_eq!(text(libc::EPERM), "operation not permitted");
        assert_eq!(capitalised(libc::ENOENT), "No such file or directory");
        assert_eq!(text(99_999), "errno 99999");
    }
}
