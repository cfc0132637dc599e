//! Temporary names that this daemon has in directories of others, noted where the next daemon finds them:
//! one that is killed cannot remove what it was making ([`with_new_name`]).
//!
//! A note is a symbolic link to the temporary name, in a directory that is closed to other users. Its own
//! name says which daemon it is of, by pid and start time, and on whose behalf the thing was made. It is
//! written before the thing and removed after it. Without a place for notes everything else goes on.
//!
//! What is at the noted path later may be somebody else's, put there to have the daemon remove it. So no
//! link is followed on the way, the name must be one of ours, and a directory is emptied with the rights
//! of the user on whose behalf it was made.
//!
//! [`with_new_name`]: super::unnamed::with_new_name

use std::{
    ffi::{OsStr, OsString},
    fs::{self, DirBuilder},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{DirBuilderExt, MetadataExt, symlink},
        },
    },
    path::{Component, Path, PathBuf},
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, open, openat},
    sys::stat::{Mode, fstatat},
    unistd::{UnlinkatFlags, geteuid, unlinkat},
};

use super::{
    actor::{Actor, FileAccess, Rights},
    remove::empty_and_remove,
    unnamed::PREFIX,
};
use crate::{guest::users::User, sys::procfs::Stat};

/// The directory, below that for the state of daemons.
const DIRECTORY: &str = "envd/unfinished";
/// The most notes that are read at the start.
const MAX_NOTES: usize = 4096;

static NOTES: OnceLock<Notes> = OnceLock::new();

/// The notes of this daemon.
#[derive(Debug)]
struct Notes {
    dir: PathBuf,
    /// `PID-STARTED`
    own: String,
    next: AtomicU64,
    /// The directory was made.
    made: AtomicBool,
    /// There is no place for notes.
    useless: AtomicBool,
}

/// Keeps notes below `state`, where the state of daemons is, from now on.
pub fn keep_notes(state: &Path) {
    let Some(own) = own_name() else { return };
    let notes = Notes {
        dir: state.join(DIRECTORY),
        own,
        next: AtomicU64::new(0),
        made: AtomicBool::new(false),
        useless: AtomicBool::new(false),
    };
    // The first daemon of a process is its only one.
    let _ = NOTES.set(notes);
}

fn own_name() -> Option<String> {
    let stat = Stat::read(i32::try_from(std::process::id()).ok()?).ok()??;
    Some(format!("{}-{}", stat.pid, stat.started))
}

/// A note of one temporary name. Dropped, it is removed.
#[derive(Debug, Default)]
pub(super) struct Note(Option<PathBuf>);

impl Drop for Note {
    fn drop(&mut self) {
        if let Some(path) = &self.0
            && let Err(error) = fs::remove_file(path)
        {
            tracing::debug!(path = %path.display(), %error, "could not remove the note of a temporary name");
        }
    }
}

impl Note {
    /// Notes a name that is about to be made in `dir` with these rights.
    pub(super) fn of(dir: BorrowedFd<'_>, name: &OsStr, rights: &Rights) -> Self {
        let Some(notes) = NOTES.get().filter(|notes| !notes.useless.load(Ordering::Relaxed)) else {
            return Self::default();
        };
        if let Err(error) = notes.prepare() {
            notes.warn(&error);
            return Self::default();
        }
        let noted = notes.write(dir, name, rights);
        Self(noted.inspect_err(|error| tracing::debug!(?name, %error, "could not note it")).ok())
    }
}

impl Notes {
    fn prepare(&self) -> io::Result<()> {
        if self.made.load(Ordering::Relaxed) {
            return Ok(());
        }
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        check(&self.dir)?;
        self.made.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn write(&self, dir: BorrowedFd<'_>, name: &OsStr, rights: &Rights) -> io::Result<PathBuf> {
        let target = fs::read_link(format!("/proc/self/fd/{}", dir.as_raw_fd()))?.join(name);
        let (uid, gid) = rights.actor().owner();
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let path = self.dir.join(format!("{}-{uid}-{gid}-{number}", self.own));
        symlink(target, &path)?;
        Ok(path)
    }

    fn warn(&self, error: &io::Error) {
        if !self.useless.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                dir = %self.dir.display(), %error,
                "temporary names cannot be noted: should the daemon be killed, they stay"
            );
        }
    }
}

/// Refuses a directory that others could write to.
fn check(dir: &Path) -> io::Result<()> {
    let meta = fs::symlink_metadata(dir)?;
    let closed = meta.uid() == geteuid().as_raw() && meta.mode() & 0o077 == 0;
    match meta.is_dir() && closed {
        true => Ok(()),
        false => Err(io::Error::other("it is not a directory that is closed to other users")),
    }
}

/// Blocks: removes what daemons have left that are gone.
pub fn remove_left(state: &Path) {
    let dir = state.join(DIRECTORY);
    let Ok(entries) = fs::read_dir(&dir) else { return };
    if let Err(error) = check(&dir) {
        return tracing::warn!(dir = %dir.display(), %error, "notes of temporary names are not trusted");
    }
    for note in entries.take(MAX_NOTES).filter_map(|entry| Some(entry.ok()?.path())) {
        let Some(owner) = owner_of_dead(&note) else { continue };
        let Ok(path) = fs::read_link(&note) else { continue };
        match remove_one(&path, owner) {
            Ok(true) => {
                tracing::info!(path = %path.display(), "removed what a daemon left unfinished");
            }
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "could not remove what a daemon left unfinished");
                continue;
            }
        }
        let _ = fs::remove_file(&note);
    }
}

/// The user and group of a note whose daemon is gone.
fn owner_of_dead(note: &Path) -> Option<(u32, u32)> {
    let mut numbers = note.file_name()?.to_str()?.split('-').map(str::parse::<u64>);
    let mut number = || numbers.next()?.ok();
    let (pid, started) = (i32::try_from(number()?).ok()?, number()?);
    let owner = (u32::try_from(number()?).ok()?, u32::try_from(number()?).ok()?);
    let daemon = Stat::read(pid).ok()?;
    let lives = daemon.is_some_and(|daemon| daemon.started == started && daemon.state != b'Z');
    (!lives).then_some(owner)
}

/// Removes what has the name, if that is one of ours; whether it was there.
fn remove_one(path: &Path, (uid, gid): (u32, u32)) -> Result<bool, Errno> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(false) };
    if !path.is_absolute() || !name.as_bytes().starts_with(PREFIX.as_bytes()) {
        return Ok(false);
    }
    let dir = match open_dir(parent) {
        Ok(dir) => dir,
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(false),
        Err(errno) => return Err(errno),
    };
    let stat = match fstatat(&dir, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(Errno::ENOENT) => return Ok(false),
        Err(errno) => return Err(errno),
    };
    if stat.st_mode & libc::S_IFMT != libc::S_IFDIR {
        unlinkat(&dir, name, UnlinkatFlags::NoRemoveDir)?;
        return Ok(true);
    }
    let user =
        User { name: String::new(), uid, gid, home: OsString::from("/").into(), groups: vec![gid] };
    let rights = Actor::new(&user, FileAccess::Strict).own_rights();
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let emptied = rights.act(|| {
        let inside = openat(&dir, name, flags, Mode::empty())?;
        let around = dir.try_clone().map_err(|error| super::errno::of(&error))?;
        empty_and_remove(around, parent, name, inside).map_err(|error| error.errno)
    });
    match emptied {
        // The user may not remove it from the directory around it; nothing is in it any more.
        Err(Errno::EACCES | Errno::EPERM) => unlinkat(&dir, name, UnlinkatFlags::RemoveDir)?,
        other => other?,
    }
    Ok(true)
}

/// Opens a directory by a path on which no link is followed.
fn open_dir(path: &Path) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut at = open("/", flags, Mode::empty())?;
    for component in path.components() {
        match component {
            Component::RootDir => {}
            Component::Normal(name) => at = openat(at.as_fd(), name, flags, Mode::empty())?,
            _ => return Err(Errno::ENOENT),
        }
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_dead_daemon_has_left_is_removed_and_nothing_else() {
        let tmp = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(tmp.path()).unwrap();
        let notes = root.join(DIRECTORY);
        DirBuilder::new().recursive(true).mode(0o700).create(&notes).unwrap();
        let owner = format!("{}-{}", geteuid(), nix::unistd::getegid());
        // No process has this start time.
        let dead = format!("{}-1-{owner}", std::process::id());
        let alive = format!("{}-{owner}", own_name().unwrap());
        let place = root.join("place");
        fs::create_dir_all(place.join(".envd-new-1-0/deep/er")).unwrap();
        fs::write(place.join(".envd-new-1-0/deep/file"), "half").unwrap();
        for name in [".envd-new-1-1", ".envd-new-1-2", "precious"] {
            fs::write(place.join(name), "x").unwrap();
        }
        symlink(&place, root.join("link")).unwrap();
        for (note, target) in [
            (format!("{dead}-0"), place.join(".envd-new-1-0")),
            (format!("{dead}-1"), place.join(".envd-new-1-1")),
            (format!("{alive}-0"), place.join(".envd-new-1-2")),
            (format!("{dead}-2"), place.join("precious")),
            (format!("{dead}-3"), root.join("link/.envd-new-1-2")),
            (format!("{dead}-4"), place.join("gone/.envd-new-1-3")),
            ("strange".to_owned(), place.join("precious")),
        ] {
            symlink(target, notes.join(note)).unwrap();
        }
        remove_left(&root);
        let names = |dir: &Path| {
            let mut names: Vec<_> = fs::read_dir(dir)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        assert_eq!(names(&place), [".envd-new-1-2", "precious"]);
        assert_eq!(names(&notes), [format!("{alive}-0"), "strange".to_owned()]);
        // Notes that others could have written are not read.
        symlink(place.join(".envd-new-1-2"), notes.join(format!("{dead}-9"))).unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&notes, open).unwrap();
        remove_left(&root);
        assert_eq!(names(&place), [".envd-new-1-2", "precious"]);
    }
}
