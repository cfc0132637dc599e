//! Attributes of what an `O_PATH` descriptor stands for: no name is looked up again, so that a race
//! cannot put something else in its place.
//!
//! The kernel's plain calls (`fchmod`, `fsetxattr`) refuse such descriptors. Newer kernels have calls
//! that take them (`fchmodat2` in 6.6); before, the descriptor's own entry in /proc does.

use std::{
    ffi::{CString, OsStr},
    os::{
        fd::{AsFd, AsRawFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::AtFlags,
    sys::{statfs::FsType, time::TimeSpec},
    unistd::{Gid, Uid, fchownat},
};

/// Linux 6.6; the same number on every architecture.
const SYS_FCHMODAT2: libc::c_long = 452;
/// Linux 6.13; likewise.
const SYS_LISTXATTRAT: libc::c_long = 465;

/// The path of a descriptor of this process, for calls that take no descriptor. Only for what the
/// daemon has opened itself; on a symbolic link the last component is the descriptor's, so that the
/// call works on the link only with `O_NOFOLLOW` semantics of its own.
#[must_use]
pub fn proc_path(fd: &impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

/// Gives the object to an owner; what is none stays.
///
/// # Errors
/// Those of fchownat(2).
pub fn chown(fd: &impl AsFd, uid: Option<u32>, gid: Option<u32>) -> nix::Result<()> {
    let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
    fchownat(fd.as_fd(), "", uid, gid, AtFlags::AT_EMPTY_PATH)
}

/// Sets the permission bits of an object that is no symbolic link.
///
/// # Errors
/// Those of fchmodat(2); `ENOSYS` before Linux 6.6 without /proc.
pub fn chmod(fd: &impl AsFd, mode: u32) -> nix::Result<()> {
    let raw = fd.as_fd().as_raw_fd();
    // SAFETY: the name is a C string and the descriptor borrowed for the call.
    let result =
        unsafe { libc::syscall(SYS_FCHMODAT2, raw, c"".as_ptr(), mode, libc::AT_EMPTY_PATH) };
    let refused = match Errno::result(result) {
        // A filter may say EPERM of a call that it does not know.
        Err(error @ (Errno::ENOSYS | Errno::EPERM)) => error,
        other => return other.map(drop),
    };
    let path = c_path(&proc_path(fd))?;
    // SAFETY: the path is a C string that lives during the call.
    match Errno::result(unsafe { libc::chmod(path.as_ptr(), mode) }) {
        Err(Errno::ENOENT) => Err(refused),
        other => other.map(drop),
    }
}

/// Sets the times of an object, a symbolic link included.
///
/// # Errors
/// Those of utimensat(2); `ENOENT` before Linux 5.8 without /proc.
pub fn set_times(fd: &impl AsFd, accessed: TimeSpec, modified: TimeSpec) -> nix::Result<()> {
    let times = [*accessed.as_ref(), *modified.as_ref()];
    let raw = fd.as_fd().as_raw_fd();
    // SAFETY: the name is a C string and the times are two, as the call reads them.
    let result = unsafe { libc::utimensat(raw, c"".as_ptr(), times.as_ptr(), libc::AT_EMPTY_PATH) };
    match Errno::result(result) {
        Err(Errno::EINVAL | Errno::ENOENT) => {}
        other => return other.map(drop),
    }
    let path = c_path(&proc_path(fd))?;
    // SAFETY: the path is a C string and the times are two, as the call reads them.
    let result = unsafe { libc::utimensat(libc::AT_FDCWD, path.as_ptr(), times.as_ptr(), 0) };
    Errno::result(result).map(drop)
}

/// Lists the names of the extended attributes of what has a name in a directory, and follows no link.
/// Each name ends with a NUL byte.
///
/// # Errors
/// Those of listxattrat(2): `ENOSYS` before Linux 6.13, `ERANGE` where the buffer is too small.
pub fn list_xattrs_at<'a>(
    dir: &impl AsFd,
    name: &OsStr,
    buffer: &'a mut [u8],
) -> nix::Result<&'a [u8]> {
    let name = c_path(Path::new(name))?;
    let (raw, flags) = (dir.as_fd().as_raw_fd(), libc::AT_SYMLINK_NOFOLLOW);
    // SAFETY: the name is a C string, and the kernel writes no more than the buffer's length into it.
    let result = unsafe {
        let (list, size) = (buffer.as_mut_ptr(), buffer.len());
        libc::syscall(SYS_LISTXATTRAT, raw, name.as_ptr(), flags, list, size)
    };
    let length = usize::try_from(Errno::result(result)?).unwrap_or(0);
    Ok(buffer.get(..length).unwrap_or_default())
}

/// The file system's type of what a descriptor stands for.
///
/// # Errors
/// Those of fstatfs(2).
pub fn fs_type(fd: &impl AsFd) -> nix::Result<FsType> {
    nix::sys::statfs::fstatfs(fd.as_fd()).map(|stat| stat.filesystem_type())
}

fn c_path(path: &Path) -> nix::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt, symlink},
    };

    use nix::{
        fcntl::{OFlag, open},
        sys::stat::Mode,
    };

    use super::*;

    #[test]
    fn the_object_is_changed_and_not_what_has_its_name_now() {
        let tmp = tempfile::tempdir().unwrap();
        let (path, other) = (tmp.path().join("f"), tmp.path().join("other"));
        fs::write(&path, "").unwrap();
        fs::write(&other, "").unwrap();
        let before = fs::metadata(&other).unwrap();
        let fd = open(&path, OFlag::O_PATH | OFlag::O_NOFOLLOW, Mode::empty()).unwrap();
        fs::rename(&path, tmp.path().join("moved")).unwrap();
        fs::rename(&other, &path).unwrap();
        chmod(&fd, 0o711).unwrap();
        set_times(&fd, TimeSpec::new(1, 2), TimeSpec::new(3, 4)).unwrap();
        chown(&fd, None, None).unwrap();
        let (now, moved) =
            (fs::metadata(&path).unwrap(), fs::metadata(tmp.path().join("moved")).unwrap());
        assert_eq!((now.mode(), now.mtime()), (before.mode(), before.mtime()));
        assert_eq!((moved.mode() & 0o7777, moved.atime(), moved.mtime_nsec()), (0o711, 1, 4));
    }

    #[test]
    fn a_link_is_changed_itself() {
        let tmp = tempfile::tempdir().unwrap();
        let (file, link) = (tmp.path().join("f"), tmp.path().join("l"));
        fs::write(&file, "").unwrap();
        symlink("f", &link).unwrap();
        let fd = open(&link, OFlag::O_PATH | OFlag::O_NOFOLLOW, Mode::empty()).unwrap();
        set_times(&fd, TimeSpec::new(1, 0), TimeSpec::new(2, 0)).unwrap();
        assert_eq!(fs::symlink_metadata(&link).unwrap().mtime(), 2);
        assert_ne!(fs::metadata(&file).unwrap().mtime(), 2);
    }

    #[test]
    fn attributes_are_listed_where_the_kernel_can() {
        let tmp = tempfile::tempdir().unwrap();
        fs::write(tmp.path().join("f"), "").unwrap();
        symlink("f", tmp.path().join("l")).unwrap();
        let kept = xattr::set(tmp.path().join("f"), "user.test", b"x").is_ok();
        let dir = open(tmp.path(), OFlag::O_PATH, Mode::empty()).unwrap();
        let mut buffer = [0; 256];
        match list_xattrs_at(&dir, OsStr::new("f"), &mut buffer) {
            Ok(names) => assert_eq!(names.windows(10).any(|name| name == b"user.test\0"), kept),
            Err(errno) => assert!(matches!(errno, Errno::ENOSYS | Errno::EPERM), "{errno}"),
        }
        // Not those of the file.
        let names = list_xattrs_at(&dir, OsStr::new("l"), &mut buffer).unwrap_or_default();
        assert!(!names.starts_with(b"user."));
    }

    #[test]
    fn procfs_is_known_by_its_type() {
        let proc = fs::File::open("/proc").unwrap();
        assert_eq!(fs_type(&proc).unwrap(), nix::sys::statfs::PROC_SUPER_MAGIC);
    }
}
