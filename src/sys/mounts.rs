//! What a path says about mounts.

use std::{
    ffi::CString,
    io,
    mem::MaybeUninit,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::Path,
};

use nix::errno::Errno;

/// Whether something is mounted at `path` itself; a link is not followed.
///
/// # Errors
/// When it cannot be looked at.
pub fn is_mount_point(path: &Path) -> io::Result<bool> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    let mut answer = MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT;
    // SAFETY: the name is a C string and the answer a writable statx, both alive during the call.
    let result =
        unsafe { libc::statx(libc::AT_FDCWD, name.as_ptr(), flags, 0, answer.as_mut_ptr()) };
    match Errno::result(result) {
        Ok(_) => {
            // SAFETY: it was zeroed, which is a valid statx, and the kernel has filled it.
            let answer = unsafe { answer.assume_init() };
            let known = libc::STATX_ATTR_MOUNT_ROOT as u64;
            if answer.stx_attributes_mask & known != 0 {
                return Ok(answer.stx_attributes & known != 0);
            }
        }
        Err(Errno::ENOSYS | Errno::EPERM) => {}
        Err(error) => return Err(error.into()),
    }
    // Kernels before 5.8: not told of a mount within one file system.
    let above = path.join("..");
    Ok(path.symlink_metadata()?.is_dir()
        && path.symlink_metadata()?.dev() != above.symlink_metadata()?.dev())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_told_from_directories() {
        for (path, expected) in
            [("/", true), ("/proc", true), ("/proc/self", false), ("/usr/bin", false)]
        {
            assert_eq!(is_mount_point(Path::new(path)).unwrap(), expected, "{path}");
        }
        is_mount_point(Path::new("/no/such")).unwrap_err();
    }
}
