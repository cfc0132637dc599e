//! What is mounted where, without ever entering a mount: a lookup inside of one whose server does not
//! answer would not come back.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::sys::procfs;

/// proc_pid_mountinfo(5).
const MOUNT_TABLE: &str = "/proc/self/mountinfo";
/// The links that a path may lead over (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// Where a path leads, behind all links; the directories above it are made. What is mounted at its
/// end is not entered.
///
/// # Errors
/// What the kernel says of a directory above it, or ELOOP.
pub(super) fn behind_links(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..=MAX_LINKS {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        };
        let parent = match parent.canonicalize() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(parent)?;
                parent.canonicalize()?
            }
            other => other?,
        };
        let at = parent.join(name);
        if is_mounted(&at) {
            return Ok(at);
        }
        match fs::read_link(&at) {
            // Also relative ones, since that starts at the directory of the link; and `..` at its
            // end is resolved as what it is.
            Ok(target) if target.file_name().is_some() => path = parent.join(target),
            Ok(target) => return parent.join(target).canonicalize(),
            Err(_) => return Ok(at),
        }
    }
    Err(io::Error::from_raw_os_error(libc::ELOOP))
}

/// Whether something is mounted exactly there; the path has no links. Without /proc nothing is known,
/// and it counts as not mounted.
pub(super) fn is_mounted(path: &Path) -> bool {
    let table = fs::read(MOUNT_TABLE).unwrap_or_default();
    procfs::mountinfo(&table).any(|mount| mount.mount_point == path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_is_mounted() {
        assert!(is_mounted(Path::new("/proc")));
        assert!(!is_mounted(Path::new("/proc/self")));
    }

    #[test]
    fn links_on_the_way_and_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        fs::create_dir_all(dir.join("real/volume")).unwrap();
        symlink("real", dir.join("way")).unwrap();
        symlink("real/volume", dir.join("end")).unwrap();
        symlink("end", dir.join("twice")).unwrap();
        symlink(dir.join("way/later"), dir.join("dangling")).unwrap();
        symlink("real/..", dir.join("up")).unwrap();
        symlink("loop", dir.join("loop")).unwrap();
        for (path, expected) in [
            ("real/volume", "real/volume"),
            ("way/volume", "real/volume"),
            ("end", "real/volume"),
            ("twice", "real/volume"),
            ("dangling", "real/later"),
            ("new/deep/volume", "new/deep/volume"),
        ] {
            assert_eq!(behind_links(&dir.join(path)).unwrap(), dir.join(expected), "{path}");
        }
        assert_eq!(behind_links(&dir.join("up")).unwrap(), dir);
        behind_links(&dir.join("loop")).unwrap_err();
        // A mount is recognised behind a link.
        symlink("/proc", dir.join("mounted")).unwrap();
        let found = behind_links(&dir.join("mounted")).unwrap();
        assert!(is_mounted(&found));
    }
}
