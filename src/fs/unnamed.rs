//! A file that has no name yet and gets one as a whole: what atomic replacement is made of.
//!
//! `O_TMPFILE` where the file system has it, so that nothing is left behind whatever happens to the
//! daemon; else a file with a name that is told from others by its beginning, [`PREFIX`], and is
//! unlinked on drop.

use std::{
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags},
    unistd::linkat,
};

use super::errno;
use crate::sys::rename::rename_new;

/// What the names of files that wait for theirs begin with.
pub(super) const PREFIX: &str = ".envd-new-";

/// The attempts at finding a name that is free.
const MAX_TRIES: usize = 64;

/// The file.
#[derive(Debug)]
pub(super) struct Unnamed {
    file: File,
    dir: PathBuf,
    /// Its name until it gets the right one, where it must have one.
    named: Named,
}

#[derive(Debug)]
struct Named(Option<PathBuf>);

impl Drop for Named {
    fn drop(&mut self) {
        if let Some(path) = self.0.take()
            && let Err(error) = fs::remove_file(&path)
        {
            tracing::warn!(path = %path.display(), %error, "a temporary file stays");
        }
    }
}

impl Unnamed {
    /// A new file that is to have a name in `dir`, with `mode` less the umask.
    pub(super) fn create(dir: &Path, mode: u32) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(mode);
        match options.clone().custom_flags(libc::O_TMPFILE).open(dir) {
            Ok(file) => Ok(Self { file, dir: dir.to_owned(), named: Named(None) }),
            // Not every file system can, and they say it in different ways.
            Err(error) => match errno::of(&error) {
                Errno::ENOSPC | Errno::EDQUOT | Errno::ENOENT | Errno::EACCES | Errno::EROFS => {
                    Err(error)
                }
                _ => Self::create_named(dir, options),
            },
        }
    }

    fn create_named(dir: &Path, mut options: OpenOptions) -> io::Result<Self> {
        let (file, path) = with_new_name(dir, |path| options.create_new(true).open(path))?;
        Ok(Self { file, dir: dir.to_owned(), named: Named(Some(path)) })
    }

    /// A file of `dir` that was opened without a name.
    pub(super) fn adopt(file: File, dir: &Path) -> Self {
        Self { file, dir: dir.to_owned(), named: Named(None) }
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Gives it the name `to`, which must be free: `EEXIST`.
    pub(super) fn publish(&mut self, to: &Path) -> io::Result<()> {
        match &self.named.0 {
            Some(path) => {
                match rename_new(path, to) {
                    Ok(()) => self.named.0 = None,
                    // A file system that knows no flags: a second link cannot replace anything.
                    Err(Errno::EINVAL | Errno::ENOSYS) => fs::hard_link(path, to)?,
                    Err(error) => return Err(error.into()),
                }
                Ok(())
            }
            None => link(&self.file, to),
        }
    }

    /// Gives it the name `to`, whatever file has that name now.
    pub(super) fn replace(&mut self, to: &Path) -> io::Result<()> {
        if self.named.0.is_none() {
            let ((), path) = with_new_name(&self.dir, |path| link(&self.file, path))?;
            self.named.0 = Some(path);
        }
        if let Some(path) = &self.named.0 {
            fs::rename(path, to)?;
            self.named.0 = None;
        }
        Ok(())
    }
}

/// Gives a file without a name one.
fn link(file: &File, to: &Path) -> io::Result<()> {
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    match linkat(AT_FDCWD, own.as_str(), AT_FDCWD, to, AtFlags::AT_SYMLINK_FOLLOW) {
        // Without /proc. The kernel lets only root do it this way.
        Err(Errno::ENOENT) => Ok(linkat(file.as_fd(), "", AT_FDCWD, to, AtFlags::AT_EMPTY_PATH)?),
        other => Ok(other?),
    }
}

/// Makes something under a name in `dir` that nothing has yet.
pub(super) fn with_new_name<T>(
    dir: &Path,
    mut make: impl FnMut(&Path) -> io::Result<T>,
) -> io::Result<(T, PathBuf)> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    for _ in 0..MAX_TRIES {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(OsStr::new(&format!("{PREFIX}{}-{number}", std::process::id())));
        match make(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => return other.map(|made| (made, path)),
        }
    }
    Err(Errno::EEXIST.into())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// Both kinds, one after the other.
    fn each(dir: &Path, mut check: impl FnMut(Unnamed)) {
        check(Unnamed::create(dir, 0o666).unwrap());
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o666);
        check(Unnamed::create_named(dir, options).unwrap());
    }

    #[test]
    fn a_name_is_got_once_and_nothing_else_stays() {
        let tmp = tempfile::tempdir().unwrap();
        let names = || {
            let entries = fs::read_dir(tmp.path()).unwrap();
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>()
        };
        each(tmp.path(), drop);
        assert!(names().is_empty());
        let target = tmp.path().join("f");
        each(tmp.path(), |mut new| {
            new.file.write_all(b"new").unwrap();
            new.publish(&target).unwrap();
            drop(new);
            assert_eq!((names(), fs::read(&target).unwrap()), (vec!["f".into()], b"new".into()));
            each(tmp.path(), |mut other| {
                let error = other.publish(&target).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
                other.file.write_all(b"other").unwrap();
                other.replace(&target).unwrap();
                assert_eq!(fs::read(&target).unwrap(), b"other");
            });
            fs::remove_file(&target).unwrap();
        });
        fs::create_dir(&target).unwrap();
        each(tmp.path(), |mut new| {
            new.replace(&target).unwrap_err();
        });
        assert_eq!(names(), ["f"]);
    }
}
