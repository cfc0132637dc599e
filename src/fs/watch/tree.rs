//! Which directories are watched, for whom, and under which names.
//!
//! The kernel gives one watch descriptor per directory, however often it is added, so the table
//! goes from a descriptor to everyone who wants it. A directory is first added and then scanned:
//! what is created in between is found by the scan, or comes as an event, or both, and never
//! neither. [`Tree::fresh`] tells the duplicates apart.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ffi::OsString,
    ops::Bound,
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, Inotify, WatchDescriptor},
};

use super::{
    WatchEvent, WatchKind, WatchOptions,
    known::{MAX_KNOWN_NAMES, has_content, scan},
    queue::Queue,
};
use crate::{
    fs::{FsError, entry},
    guest::users::Users,
};

/// The directories that are watched at once, for all watchers. Each costs about 1 KiB of kernel
/// memory. A request beyond it fails; directories that appear later are left out, with a warning.
pub const MAX_WATCHED_DIRS: usize = 131_072;
/// A watch descriptor.
pub(super) type Wd = WatchDescriptor;

/// Everything that is watched. It lives on the watching thread alone, hence no locks.
#[derive(Debug)]
pub(super) struct Tree {
    pub(super) inotify: Inotify,
    users: Arc<Users>,
    pub(super) dirs: HashMap<Wd, Dir>,
    pub(super) watchers: HashMap<u64, Root>,
    /// Directories between the two halves of a rename.
    pub(super) moving: Vec<Moving>,
    /// Names that were told because a scan found them, and whose event from the kernel may follow.
    pub(super) fresh: HashSet<(Wd, OsString)>,
    /// The same for names that a scan missed.
    pub(super) gone: HashSet<(Wd, OsString)>,
    /// The names known of all directories together.
    pub(super) names: usize,
}

/// One watcher.
#[derive(Debug)]
pub(super) struct Root {
    path: PathBuf,
    pub(super) options: WatchOptions,
    queue: Feed,
    /// Its directories, by their path below the root, which itself is the empty path.
    pub(super) rels: BTreeMap<PathBuf, Wd>,
}

/// Ends the queue when the watcher, or the thread, is gone.
#[derive(Debug)]
struct Feed(Arc<Queue>);

impl Drop for Feed {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// One watched directory.
#[derive(Debug)]
pub(super) struct Dir {
    pub(super) subs: Vec<Sub>,
    /// The names in it, with whether each is a directory; none beyond [`MAX_KNOWN_NAMES`].
    pub(super) known: Option<BTreeMap<OsString, bool>>,
}

/// Who wants a directory, and what they call it.
#[derive(Debug, Clone)]
pub(super) struct Sub {
    pub(super) watcher: u64,
    pub(super) rel: PathBuf,
}

/// A directory of one watcher that was renamed away and has not arrived anywhere.
#[derive(Debug)]
pub(super) struct Moving {
    pub(super) cookie: u32,
    pub(super) watcher: u64,
    pub(super) top: Wd,
    /// Itself and all below it, by the path below it.
    pub(super) dirs: Vec<(PathBuf, Wd)>,
}

impl Tree {
    pub(super) fn new(inotify: Inotify, users: Arc<Users>) -> Self {
        Self {
            inotify,
            users,
            dirs: HashMap::new(),
            watchers: HashMap::new(),
            moving: Vec::new(),
            fresh: HashSet::new(),
            gone: HashSet::new(),
            names: 0,
        }
    }

    /// Starts a watcher.
    pub(super) fn add(
        &mut self,
        id: u64,
        path: PathBuf,
        options: WatchOptions,
        queue: Arc<Queue>,
    ) -> Result<(), FsError> {
        let root = Root { path, options, queue: Feed(queue), rels: BTreeMap::new() };
        self.watchers.insert(id, root);
        self.adopt(id, PathBuf::new(), false).inspect_err(|_| self.remove(id))
    }

    /// Ends a watcher.
    pub(super) fn remove(&mut self, id: u64) {
        let Some(root) = self.watchers.remove(&id) else {
            return;
        };
        for wd in root.rels.into_values() {
            self.unsubscribe(id, wd);
        }
        let (ours, others) =
            std::mem::take(&mut self.moving).into_iter().partition(|m| m.watcher == id);
        self.moving = others;
        self.lose(ours);
    }

    /// Lets directories go that were renamed out of their trees.
    pub(super) fn lose(&mut self, moved: Vec<Moving>) {
        for moving in moved {
            for (_, wd) in moving.dirs {
                self.unsubscribe(moving.watcher, wd);
            }
        }
    }

    /// The path of something of a watcher.
    pub(super) fn path_of(&self, id: u64, rel: &Path) -> Option<PathBuf> {
        let root = &self.watchers.get(&id)?.path;
        // Joining the empty path would add a slash.
        Some(if rel.as_os_str().is_empty() { root.clone() } else { root.join(rel) })
    }

    pub(super) fn is_recursive(&self, id: u64) -> bool {
        self.watchers.get(&id).is_some_and(|root| root.options.recursive)
    }

    /// Asks the kernel to watch, which also tells which directory is there now.
    pub(super) fn watch_at(&self, path: &Path, rel: &Path) -> Result<Wd, Errno> {
        let events = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_ONLYDIR;
        // The root may be a link; links inside lead out of the tree.
        let inside = !rel.as_os_str().is_empty();
        let follow = if inside { AddWatchFlags::IN_DONT_FOLLOW } else { AddWatchFlags::empty() };
        self.inotify.add_watch(path, events | follow)
    }

    /// Watches a directory for a watcher and, when it is recursive, all below it. `announce` tells
    /// a CREATE for everything found there: the directory is new to the watcher.
    pub(super) fn adopt(&mut self, id: u64, rel: PathBuf, announce: bool) -> Result<(), FsError> {
        let recursive = self.is_recursive(id);
        let mut todo = vec![rel];
        while let Some(rel) = todo.pop() {
            let Some(path) = self.path_of(id, &rel) else {
                return Ok(());
            };
            if self.dirs.len() >= MAX_WATCHED_DIRS {
                return Err(FsError::TooManyDirectories { path, limit: MAX_WATCHED_DIRS });
            }
            let wd = match self.watch_at(&path, &rel) {
                Ok(wd) => wd,
                // Gone again already, or not readable: nothing to watch, and no reason to fail.
                Err(Errno::ENOENT | Errno::ENOTDIR | Errno::EACCES | Errno::ELOOP)
                    if !rel.as_os_str().is_empty() =>
                {
                    continue;
                }
                Err(errno) => return Err(FsError::WatchAdd { path, errno }),
            };
            if !self.subscribe(id, &rel, wd, &path, announce) {
                continue;
            }
            let children = match self.dirs.get(&wd).and_then(|dir| dir.known.as_ref()) {
                Some(known) => known.iter().map(|(name, dir)| (name.clone(), *dir)).collect(),
                None if recursive || announce => scan(&path),
                None => Vec::new(),
            };
            let first = todo.len();
            for (name, is_dir) in children {
                let child = rel.join(&name);
                if announce {
                    self.emit(id, WatchKind::Create, &child);
                    // Written before it was watched: whoever waits for content must hear of it.
                    if !is_dir && has_content(&path.join(&name)) {
                        self.emit(id, WatchKind::Write, &child);
                    }
                }
                if is_dir && recursive {
                    todo.push(child);
                }
            }
            if let Some(added) = todo.get_mut(first..) {
                added.reverse();
            }
        }
        Ok(())
    }

    /// [`Self::adopt`] for a directory that appeared: there is nobody to tell an error to.
    pub(super) fn adopt_later(&mut self, id: u64, rel: PathBuf) {
        if let Err(error) = self.adopt(id, rel, true) {
            tracing::warn!(%error, "a new directory is not watched");
        }
    }

    /// Whether the directory is new to the watcher, who now wants it under this name.
    fn subscribe(&mut self, id: u64, rel: &Path, wd: Wd, path: &Path, announce: bool) -> bool {
        match self.watchers.get(&id).and_then(|root| root.rels.get(rel)) {
            Some(old) if *old == wd => return false,
            // Another directory had this name, and its end is not told yet.
            Some(_) => self.detach(id, rel),
            None => {}
        }
        if !self.dirs.contains_key(&wd) {
            let found = scan(path);
            if announce && self.fresh.len() < MAX_KNOWN_NAMES {
                self.fresh.extend(found.iter().map(|(name, _)| (wd, name.clone())));
            }
            self.dirs.insert(wd, Dir { subs: Vec::new(), known: None });
            self.set_known(wd, found);
        }
        let Some(dir) = self.dirs.get_mut(&wd) else {
            return false;
        };
        if let Some(sub) = dir.subs.iter().find(|sub| sub.watcher == id) {
            // The watcher has it under another name: it was moved, and we are early. (Or it is
            // mounted twice in the tree; then the later name counts, except the root's.)
            let old = sub.rel.clone();
            if !old.as_os_str().is_empty() {
                let dirs = self.take_subtree(id, &old);
                self.put_subtree(id, rel, dirs);
            }
            return false;
        }
        dir.subs.push(Sub { watcher: id, rel: rel.to_owned() });
        if let Some(root) = self.watchers.get_mut(&id) {
            root.rels.insert(rel.to_owned(), wd);
        }
        true
    }

    fn unsubscribe(&mut self, id: u64, wd: Wd) {
        let Some(dir) = self.dirs.get_mut(&wd) else {
            return;
        };
        dir.subs.retain(|sub| sub.watcher != id);
        if dir.subs.is_empty() {
            self.drop_dir(wd);
            // Fails when the directory is gone, and the watch with it.
            let _ = self.inotify.rm_watch(wd);
        }
    }

    /// Forgets a directory, and returns who wanted it.
    pub(super) fn drop_dir(&mut self, wd: Wd) -> Vec<Sub> {
        let Some(dir) = self.dirs.remove(&wd) else {
            return Vec::new();
        };
        self.names -= dir.known.map_or(0, |known| known.len());
        dir.subs
    }

    /// A watcher no longer has the directory of that name, nor those below it.
    pub(super) fn detach(&mut self, id: u64, rel: &Path) {
        for (_, wd) in self.take_subtree(id, rel) {
            self.unsubscribe(id, wd);
        }
    }

    /// Takes a directory and all below it out of the names of a watcher.
    pub(super) fn take_subtree(&mut self, id: u64, rel: &Path) -> Vec<(PathBuf, Wd)> {
        let Some(root) = self.watchers.get_mut(&id) else {
            return Vec::new();
        };
        // Paths are ordered part by part, so a subtree is one range.
        let range = root.rels.range::<Path, _>((Bound::Included(rel), Bound::Unbounded));
        let paths: Vec<PathBuf> =
            range.map(|(path, _)| path).take_while(|path| path.starts_with(rel)).cloned().collect();
        let taken = paths.into_iter().filter_map(|path| {
            let wd = root.rels.remove(&path)?;
            Some((path.strip_prefix(rel).ok()?.to_owned(), wd))
        });
        taken.collect()
    }

    /// Puts what was taken back under another name.
    pub(super) fn put_subtree(&mut self, id: u64, rel: &Path, dirs: Vec<(PathBuf, Wd)>) {
        let Some(root) = self.watchers.get_mut(&id) else {
            return;
        };
        for (below, wd) in dirs {
            let now = if below.as_os_str().is_empty() { rel.to_owned() } else { rel.join(below) };
            let Some(dir) = self.dirs.get_mut(&wd) else {
                continue;
            };
            if let Some(sub) = dir.subs.iter_mut().find(|sub| sub.watcher == id) {
                sub.rel.clone_from(&now);
                root.rels.insert(now, wd);
            }
        }
    }

    /// Tells a watcher of something of its own.
    pub(super) fn emit(&self, id: u64, kind: WatchKind, rel: &Path) {
        let Some(root) = self.watchers.get(&id) else {
            return;
        };
        let whole = rel.as_os_str().is_empty();
        let name = if whole { ".".to_owned() } else { rel.to_string_lossy().into_owned() };
        let wanted = root.options.include_entry
            && matches!(kind, WatchKind::Create | WatchKind::Write | WatchKind::Chmod)
            && !root.queue.0.is_full();
        let path = if wanted { self.path_of(id, rel) } else { None };
        let entry = path.and_then(|path| entry::stat(&path, &self.users).ok());
        root.queue.0.push(WatchEvent { name, kind, entry });
    }
}
