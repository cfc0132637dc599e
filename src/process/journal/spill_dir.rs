//! Where output on disk is: files with names in a directory of the daemon's own, so that nothing
//! holds a descriptor while nobody reads or writes.
//!
//! The directory has a random name and is closed to other users, and files are made and opened
//! through its descriptor, following no link: the programs of the sandbox can neither look into it nor
//! put another one in its place. A file is removed when its output is dropped. What a daemon leaves
//! that is killed, the next one that is started removes: a daemon holds a lock (flock(2)) on its
//! directory while it lives.

use std::{
    fs::{self, DirBuilder, File},
    hash::{BuildHasher, Hasher, RandomState},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{Flock, FlockArg, OFlag, open, openat},
    sys::stat::{Mode, fstat, lstat},
    unistd::{UnlinkatFlags, geteuid, unlinkat},
};
use parking_lot::Mutex;

/// What the names of the directories begin with.
const PREFIX: &str = "envd-spill-";
/// How often another name is tried.
const MAX_TRIES: usize = 8;
/// The most directories of other daemons that are looked at, and the most files that are removed from
/// one.
const MAX_LEFT: usize = 4096;
const MAX_FILES_LEFT: usize = 1 << 20;

/// The place for the output of all processes of a daemon.
#[derive(Debug)]
pub(in crate::process) struct SpillDir {
    parent: PathBuf,
    own: Mutex<Option<Arc<Own>>>,
    next: AtomicU64,
}

/// The daemon's own directory, locked. It is removed with the last file in it.
#[derive(Debug)]
struct Own {
    path: PathBuf,
    fd: Locked,
}

#[derive(Debug)]
enum Locked {
    Locked(Flock<OwnedFd>),
    /// On a file system without locks, where nobody else removes it either.
    Without(OwnedFd),
}

impl Locked {
    fn fd(&self) -> &OwnedFd {
        match self {
            Self::Locked(fd) => fd,
            Self::Without(fd) => fd,
        }
    }
}

/// A file that is removed when it is dropped.
#[derive(Debug)]
pub(super) struct SpillFile {
    dir: Arc<Own>,
    name: String,
}

impl SpillDir {
    /// A directory in `parent`, made when there is something to put there.
    pub(in crate::process) fn new(parent: PathBuf) -> Arc<Self> {
        Arc::new(Self { parent, own: Mutex::default(), next: AtomicU64::new(0) })
    }

    /// Blocks: makes a new file, empty and open for reading and writing.
    pub(super) fn create(&self) -> io::Result<(SpillFile, File)> {
        let dir = self.own()?;
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let name = number.to_string();
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL;
        let file = open_in(&dir, &name, flags)?;
        Ok((SpillFile { dir, name }, file))
    }

    fn own(&self) -> io::Result<Arc<Own>> {
        let mut own = self.own.lock();
        // It may have been removed, as somebody does who tidies up.
        if let Some(dir) = own.as_ref().filter(|dir| is_at(dir.fd.fd(), &dir.path)) {
            return Ok(Arc::clone(dir));
        }
        DirBuilder::new().recursive(true).mode(0o700).create(&self.parent)?;
        let mut last = io::Error::from(io::ErrorKind::AlreadyExists);
        for _ in 0..MAX_TRIES {
            match Own::make(&self.parent) {
                Ok(made) => {
                    let made = Arc::new(made);
                    *own = Some(Arc::clone(&made));
                    return Ok(made);
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => last = error,
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }

    /// Blocks: removes everything, at the end of the daemon.
    pub(in crate::process) fn remove_all(&self) {
        let Some(own) = self.own.lock().take() else { return };
        let removed = empty(own.fd.fd().as_fd()).and_then(|()| fs::remove_dir(&own.path));
        if let Err(error) = removed
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %own.path.display(), %error, "could not remove output on disk");
        }
    }

    /// Blocks: removes what daemons have left that are gone.
    pub(in crate::process) fn sweep(&self) {
        let entries = fs::read_dir(&self.parent).into_iter().flatten();
        let left = entries.filter_map(|entry| entry.ok()).filter(|entry| {
            entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX))
        });
        for entry in left.take(MAX_LEFT) {
            let path = entry.path();
            match sweep_one(&path) {
                Ok(true) => {
                    tracing::info!(path = %path.display(), "removed output that a daemon left");
                }
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "could not remove output that a daemon left");
                }
            }
        }
    }
}

impl Own {
    fn make(parent: &Path) -> io::Result<Self> {
        let random = RandomState::new().build_hasher().finish();
        let path = parent.join(format!("{PREFIX}{}-{random:016x}", std::process::id()));
        DirBuilder::new().mode(0o700).create(&path)?;
        let fd = open_dir(&path)?;
        let fd = match Flock::lock(fd, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => Locked::Locked(locked),
            Err((fd, Errno::EWOULDBLOCK)) => {
                // A daemon that starts has taken it for one that was left.
                drop(fd);
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            Err((fd, _)) => Locked::Without(fd),
        };
        let made = Self { path, fd };
        match is_at(made.fd.fd(), &made.path) {
            true => Ok(made),
            false => Err(io::ErrorKind::AlreadyExists.into()),
        }
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        // What is in it is gone, but for files that could not be removed.
        let _ = fs::remove_dir(&self.path);
    }
}

impl SpillFile {
    /// Blocks: opens it for reading and writing.
    pub(super) fn open(&self) -> io::Result<File> {
        open_in(&self.dir, &self.name, OFlag::O_RDWR)
    }
}

impl Drop for SpillFile {
    fn drop(&mut self) {
        let removed = unlinkat(self.dir.fd.fd(), self.name.as_str(), UnlinkatFlags::NoRemoveDir);
        if let Err(error) = removed
            && error != Errno::ENOENT
        {
            let path = self.dir.path.join(&self.name);
            tracing::warn!(path = %path.display(), %error, "could not remove output on disk");
        }
    }
}

fn open_in(dir: &Own, name: &str, flags: OFlag) -> io::Result<File> {
    let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(openat(dir.fd.fd(), name, flags, Mode::S_IRUSR | Mode::S_IWUSR)?.into())
}

fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let fd = open(path, flags, Mode::empty())?;
    let stat = fstat(&fd)?;
    match stat.st_uid == geteuid().as_raw() && stat.st_mode & 0o077 == 0 {
        true => Ok(fd),
        false => Err(io::Error::other("it is not closed to other users")),
    }
}

/// Whether a directory still has this path.
fn is_at(fd: &OwnedFd, path: &Path) -> bool {
    let identity = |stat: nix::sys::stat::FileStat| (stat.st_dev, stat.st_ino);
    let (held, named) = (fstat(fd).map(identity), lstat(path).map(identity));
    matches!((held, named), (Ok(held), Ok(named)) if held == named)
}

/// Removes a directory whose daemon is gone; whether it was.
fn sweep_one(path: &Path) -> io::Result<bool> {
    let fd = match open_dir(path) {
        Ok(fd) => fd,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let Ok(locked) = Flock::lock(fd, FlockArg::LockExclusiveNonblock) else { return Ok(false) };
    empty(locked.as_fd())?;
    fs::remove_dir(path)?;
    Ok(true)
}

fn empty(fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut dir = Dir::from_fd(fd.try_clone_to_owned()?)?;
    for entry in dir.iter().take(MAX_FILES_LEFT) {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            unlinkat(fd, name, UnlinkatFlags::NoRemoveDir)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::fs::PermissionsExt};

    use super::*;

    fn names(dir: &Path) -> Vec<PathBuf> {
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    #[test]
    fn files_are_closed_to_others_and_go_when_they_are_dropped() {
        let tmp = tempfile::tempdir().unwrap();
        let parent = tmp.path().join("deep/er");
        let spill = SpillDir::new(parent.clone());
        let (file, mut opened) = spill.create().unwrap();
        opened.write_all(b"x").unwrap();
        let own = names(&parent);
        assert_eq!(own.len(), 1);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let within = names(&own[0]);
        assert_eq!((mode(&parent), mode(&own[0]), mode(&within[0])), (0o700, 0o700, 0o600));
        assert_eq!(file.open().unwrap().metadata().unwrap().len(), 1);
        // A link in its place is not followed.
        fs::remove_file(&within[0]).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &within[0]).unwrap();
        file.open().unwrap_err();
        drop(file);
        assert_eq!(names(&own[0]).len(), 0);
        // Somebody tidies up: there is another directory for what comes.
        fs::remove_dir(&own[0]).unwrap();
        let (_file, _) = spill.create().unwrap();
        assert_ne!(names(&parent), own);
    }

    #[test]
    fn what_a_dead_daemon_has_left_is_removed_and_nothing_else() {
        let tmp = tempfile::tempdir().unwrap();
        let alive = SpillDir::new(tmp.path().to_owned());
        let (_file, _) = alive.create().unwrap();
        let kept = names(tmp.path());
        let make = |name: &str, mode: u32| {
            let path = tmp.path().join(name);
            fs::create_dir(&path).unwrap();
            fs::write(path.join("0"), "output").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path
        };
        let dead = make("envd-spill-1-0", 0o700);
        let strange = [make("other", 0o700), make("envd-spill-2-0", 0o755)];
        let link = tmp.path().join("envd-spill-3-0");
        std::os::unix::fs::symlink(&strange[0], &link).unwrap();
        SpillDir::new(tmp.path().to_owned()).sweep();
        assert!(!dead.exists());
        assert!(kept.iter().all(|path| path.exists()));
        assert!(strange.iter().all(|path| path.join("0").exists()) && link.is_symlink());
    }
}
