//! A directory that is held open while it is looked at.
//!
//! Its path can lead to another one, or nowhere, between two system calls; what was watched and what
//! was read have to be the same directory. Through `/proc/self/fd` they are. Without it, the path has
//! to do, with no more rights than the watcher's user has.
//!
//! The root of a watcher is [resolved](Walk) with the rights of whoever asked for it, and everything in
//! its tree is looked at with those ([`Rights`]): one thread serves all watchers, so the rights are taken
//! on for each call and given up again, on the thread that makes the call ([`bounded`]).

use std::{
    ffi::{OsStr, OsString},
    fs::{File, Metadata},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Component, Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2},
    sys::{
        inotify::{AddWatchFlags, Inotify, WatchDescriptor},
        stat::{FileStat, Mode, fstat, stat},
    },
};

use super::{below, bounded, known};
use crate::{
    blocking::{is_keeping_out, keep_out_of},
    fs::{
        actor::{Actor, Rights},
        resolve::{self, Walk},
    },
};

const READ: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NONBLOCK).union(OFlag::O_CLOEXEC);

/// Device and inode of a directory. As long as the kernel watches a directory, no other can have the
/// same inode; once it has dropped the watch (`IN_IGNORED`), the next directory may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DirId {
    device: u64,
    inode: u64,
}

const NODE: OFlag = OFlag::O_PATH.union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// The directory that had a name once.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// A path to it.
    at: PathBuf,
    fd: Option<Arc<OwnedFd>>,
    id: DirId,
    rights: Rights,
}

/// Where the path of a watcher's root leads: the way to it is long, and events come in batches.
#[derive(Debug)]
pub(super) struct Root {
    path: PathBuf,
    place: resolve::Place,
}

impl Root {
    /// Resolves the path.
    ///
    /// # Errors
    /// When it leads nowhere.
    pub(super) fn resolve(path: &Path, actor: &Actor) -> Result<Self, Errno> {
        let place = Walk::new(actor).to(path).map_err(|error| match error.busy {
            Some(_) => Errno::ETIMEDOUT,
            None => error.errno,
        })?;
        Ok(Self { path: path.to_owned(), place })
    }

    /// Opens a directory by its path below the root, following no link below that.
    ///
    /// # Errors
    /// When there is none, or it cannot be read.
    pub(super) fn open(&self, rel: &Path) -> Result<Place, Errno> {
        let place = &self.place;
        if rel.as_os_str().is_empty() {
            return match place.open(READ) {
                Ok((dir, _, rights)) => Place::of(dir.into(), &self.path, rights),
                Err(errno) => Place::by_path(&self.path, place.actor(), errno),
            };
        }
        let found = place.found().ok_or(Errno::ENOENT)?;
        let path = below(&self.path, rel);
        match open_below(&found.fd, rel, place.rights()) {
            Ok(dir) => Place::of(dir, &path, place.rights().clone()),
            Err(errno) => Place::by_path(&path, place.actor(), errno),
        }
    }
}

impl Place {
    /// Opens a directory in this one.
    ///
    /// # Errors
    /// As [`Root::open`].
    pub(super) fn below(&self, name: &OsStr) -> Result<Self, Errno> {
        let (path, name, rights) = (self.at.join(name), name.to_owned(), self.rights.clone());
        let fd = self.fd.as_ref().map(Arc::clone);
        bounded::call(&self.at.join(&name), move || {
            let Some(fd) = &fd else {
                keep_out(None)?;
                let flags = READ | OFlag::O_NOFOLLOW;
                let fd = rights.act(|| nix::fcntl::open(&path, flags, Mode::empty()))?;
                return Self::of(fd, &path, rights.clone());
            };
            match open_below(fd, Path::new(&name), &rights) {
                Ok(dir) => Self::of(dir, &path, rights.clone()),
                Err(errno) => Self::by_path(&path, rights.actor(), errno),
            }
        })?
    }

    fn of(fd: OwnedFd, path: &Path, rights: Rights) -> Result<Self, Errno> {
        let id = DirId::of(&fstat(&fd)?);
        let at = Path::new("/proc/self/fd").join(fd.as_raw_fd().to_string());
        if at.exists() {
            return Ok(Self { at, fd: Some(Arc::new(fd)), id, rights });
        }
        let rights = rights.actor().own_rights();
        Ok(Self { at: path.to_owned(), fd: None, id, rights })
    }

    /// Too many open files are no reason to miss a directory, where the kernel may follow its path.
    fn by_path(path: &Path, actor: &Actor, errno: Errno) -> Result<Self, Errno> {
        match errno {
            Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM if !actor.may_switch() => {
                keep_out(None)?;
                let id = DirId::of(&stat(path)?);
                Ok(Self { at: path.to_owned(), fd: None, id, rights: actor.own_rights() })
            }
            errno => Err(errno),
        }
    }

    fn keep_out(&self) -> Result<(), Errno> {
        keep_out(self.fd.as_deref())
    }

    /// Which directory it is.
    pub(super) fn id(&self) -> DirId {
        self.id
    }

    /// Has the kernel watch it.
    pub(super) fn watch(
        &self,
        inotify: &Arc<Inotify>,
        events: AddWatchFlags,
        is_root: bool,
    ) -> Result<WatchDescriptor, Errno> {
        // A link of /proc has to be followed, and the root may be a link; others lead out of the tree.
        let follow = match self.fd.is_some() || is_root {
            true => AddWatchFlags::empty(),
            false => AddWatchFlags::IN_DONT_FOLLOW,
        };
        let (inotify, place) = (Arc::clone(inotify), self.clone());
        bounded::call(&self.at, move || {
            place.keep_out()?;
            place.rights.act(|| inotify.add_watch(&place.at, events | follow))
        })?
    }

    /// The sorted names in it, with whether each is a directory; empty when it is gone.
    pub(super) fn scan(&self) -> Vec<(OsString, bool)> {
        let place = self.clone();
        bounded::call(&self.at, move || place.look(known::scan)).ok().flatten().unwrap_or_default()
    }

    /// What a name in it is, a link itself; none when that cannot be found out.
    pub(super) fn metadata(&self, name: &OsStr) -> Option<Metadata> {
        let (place, path, name) = (self.clone(), self.at.join(name), name.to_owned());
        let found = bounded::call(&self.at.join(&name), move || {
            let Some(dir) = place.fd.as_ref().filter(|_| is_keeping_out()) else {
                return place.look(|_| path.symlink_metadata().ok());
            };
            place.look(|_| {
                // What has the name can be the root of a mount.
                let child = openat(dir, name.as_os_str(), NODE, Mode::empty()).ok()?;
                keep_out(Some(&child)).ok()?;
                File::from(child).metadata().ok()
            })
        });
        found.ok()??
    }

    /// Whether a name in it is that of a regular file with something in it.
    pub(super) fn has_content(&self, name: &OsStr) -> bool {
        self.metadata(name).is_some_and(|meta| meta.is_file() && meta.len() > 0)
    }

    /// Whether a file in it may have changed since then.
    pub(super) fn has_changed(&self, name: &OsStr, since: SystemTime) -> bool {
        self.metadata(name).is_some_and(|meta| known::has_changed(&meta, since))
    }

    /// Looks at it by its path, with the rights with which it was reached, for as long as that takes.
    pub(super) fn look<T>(&self, look: impl FnOnce(&Path) -> T) -> Option<T> {
        self.keep_out().ok()?;
        self.rights.perform(|| look(&self.at))
    }
}

impl DirId {
    fn of(stat: &FileStat) -> Self {
        Self { device: stat.st_dev, inode: stat.st_ino }
    }
}

/// See [`keep_out_of`]: the call is then made by a thread that may hang.
fn keep_out(fd: Option<&OwnedFd>) -> Result<(), Errno> {
    keep_out_of(fd.map(AsFd::as_fd)).map_err(|_| Errno::ETIMEDOUT)
}

/// Opens a directory by a path of several names that follows no link.
fn open_below(root: &OwnedFd, rel: &Path, rights: &Rights) -> Result<OwnedFd, Errno> {
    keep_out(Some(root))?;
    let open = || {
        let mut resolve = ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_BENEATH;
        if is_keeping_out() {
            resolve |= ResolveFlag::RESOLVE_NO_XDEV;
        }
        match openat2(root, rel, OpenHow::new().flags(READ).resolve(resolve)) {
            // Linux before 5.6, and sandboxes that know only older calls.
            Err(Errno::ENOSYS | Errno::EPERM) => {}
            // There is a mount on the way, which may be a local one.
            Err(Errno::EXDEV) if is_keeping_out() => {}
            opened => return opened,
        }
        let step = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mut at: Option<OwnedFd> = None;
        for component in rel.components() {
            let Component::Normal(name) = component else { return Err(Errno::EXDEV) };
            let from = at.as_ref().unwrap_or(root).as_fd();
            let next = openat(from, name, step, Mode::empty())?;
            keep_out(Some(&next))?;
            at = Some(next);
        }
        openat(at.as_ref().unwrap_or(root), ".", READ, Mode::empty())
    };
    let dir = rights.act(open)?;
    rights.refuse_proc(&dir)?;
    Ok(dir)
}
