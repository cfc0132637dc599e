//! Replacing a system file so that its readers see the old content or the new one, and nothing
//! between.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    process,
    sync::atomic::{AtomicU64, Ordering},
};

use nix::errno::Errno;

/// Gives a file this content and these permission bits. Blocks.
///
/// A file that a container's engine has mounted over cannot be renamed over; such a one is
/// rewritten where it is.
///
/// # Errors
/// What the kernel says; the file is then as it was, unless it was rewritten where it is.
pub fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let target = match path.canonicalize() {
        Ok(target) => target,
        Err(error) if error.kind() == io::ErrorKind::NotFound => path.to_owned(),
        Err(error) => return Err(error),
    };
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let temporary = target.with_file_name(format!(".envd-{}-{number}.tmp", process::id()));
    let written =
        write_new(&temporary, content, mode).and_then(|()| fs::rename(&temporary, &target));
    let Err(error) = written else { return Ok(()) };
    let _ = fs::remove_file(&temporary);
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EBUSY | Errno::EXDEV) => fs::write(&target, content),
        _ => Err(error),
    }
}

fn write_new(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    // Whatever the daemon's umask is.
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(mode))?;
    file.write_all(content)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn through_a_link_and_without_remains() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        replace(&file, b"one", 0o644).unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        replace(&link, b"two", 0o600).unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read(&file).unwrap(), b"two");
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        replace(&dir.path().join("none/file"), b"", 0o600).unwrap_err();
    }
}
