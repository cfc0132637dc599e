//! Which directories are watched, for whom, and under which names.
//!
//! The kernel gives one watch descriptor per directory, however often it is added, so the table
//! goes from a descriptor to everyone who wants it. Directories come into it in [`super::adopt`].

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    ffi::OsString,
    ops::Bound,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Instant, SystemTime},
};

use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, Inotify, WatchDescriptor},
};

use super::{
    Rescan, WatchEvent, WatchKind, WatchOptions,
    adopt::Job,
    below, bounded,
    place::{self, DirId, Place},
    queue::{Pushed, Queue},
    shown,
};
use crate::{
    fs::{
        actor::Actor,
        entry::{self, Entry, EntryKind},
    },
    guest::users::Users,
};

/// A watch descriptor.
pub(super) type Wd = WatchDescriptor;
/// Names in a directory, with whether each is a directory.
pub(super) type Names = BTreeMap<OsString, bool>;

/// What the kernel is asked for.
const EVENTS: AddWatchFlags = AddWatchFlags::IN_CREATE
    .union(AddWatchFlags::IN_MODIFY)
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_DELETE_SELF)
    .union(AddWatchFlags::IN_MOVED_TO)
    .union(AddWatchFlags::IN_MOVED_FROM)
    .union(AddWatchFlags::IN_MOVE_SELF)
    .union(AddWatchFlags::IN_ATTRIB)
    .union(AddWatchFlags::IN_ONLYDIR)
    // Without it, adding a directory that is watched already replaces the mask, and the kernel drops the
    // events that arrive in between (race): 9 of 25,000 new directories in a test.
    .union(AddWatchFlags::from_bits_retain(libc::IN_MASK_ADD));

/// The roots whose directories are held open while the thread works.
const MAX_RESOLVED_ROOTS: usize = 64;

/// Everything that is watched. It lives on the watching thread alone, hence no locks.
#[derive(Debug)]
pub(super) struct Tree {
    pub(super) inotify: Arc<Inotify>,
    users: Arc<Users>,
    pub(super) dirs: HashMap<Wd, Dir>,
    /// Where the paths of roots have led since the thread waited last.
    resolved: RefCell<HashMap<u64, Arc<place::Root>>>,
    pub(super) watchers: HashMap<u64, Root>,
    /// Directories that are still to be watched.
    pub(super) jobs: VecDeque<Job>,
    /// The number of the newest job.
    pub(super) last_job: u64,
    /// Directories that the kernel, or this daemon, has no watch left for.
    pub(super) unwatched: BTreeMap<(u64, PathBuf), Names>,
    /// When those were looked at last.
    pub(super) looked: SystemTime,
    /// When they are looked at next.
    pub(super) look_at: Instant,
    /// What the last event said to have been moved to where.
    pub(super) arrived: Option<(Wd, OsString)>,
    /// Directories between the two halves of a rename.
    pub(super) moving: Vec<Moving>,
    /// Names that were told because a scan found them, and whose event from the kernel may follow.
    pub(super) fresh: HashSet<(Wd, OsString)>,
    /// The same for names that a scan missed.
    pub(super) gone: HashSet<(Wd, OsString)>,
    /// Directories of watchers that have their name by a rename since they were looked for last.
    pub(super) arrivals: BTreeSet<(u64, PathBuf)>,
    /// Names in directories of which an event could not tell what has them now.
    pub(super) doubtful: HashMap<Wd, BTreeSet<OsString>>,
    /// The names known of all directories together.
    pub(super) names: usize,
    /// The kernel's queue has overflowed, and files have not been compared since.
    pub(super) overflowed: bool,
    /// Not before this, so that comparing does not become all that is done.
    pub(super) rescan_at: Instant,
    /// All that happened before this has been handled.
    pub(super) handled_until: SystemTime,
}

/// One watcher.
#[derive(Debug)]
pub(super) struct Root {
    path: PathBuf,
    /// On whose behalf it is watched.
    actor: Actor,
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
    /// Which directory the kernel watches under this descriptor.
    pub(super) id: DirId,
    pub(super) subs: Vec<Sub>,
    /// The names in it; none beyond [`MAX_KNOWN_NAMES`](super::MAX_KNOWN_NAMES).
    pub(super) known: Option<Names>,
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
        let now = SystemTime::now();
        Self {
            inotify: Arc::new(inotify),
            users,
            dirs: HashMap::new(),
            resolved: RefCell::default(),
            watchers: HashMap::new(),
            jobs: VecDeque::new(),
            last_job: 0,
            unwatched: BTreeMap::new(),
            looked: now,
            look_at: Instant::now(),
            arrived: None,
            moving: Vec::new(),
            fresh: HashSet::new(),
            gone: HashSet::new(),
            arrivals: BTreeSet::new(),
            doubtful: HashMap::new(),
            names: 0,
            overflowed: false,
            rescan_at: Instant::now(),
            handled_until: now,
        }
    }

    /// Makes a watcher, which does not watch anything yet.
    pub(super) fn insert(
        &mut self,
        id: u64,
        (path, actor): (PathBuf, Actor),
        options: WatchOptions,
        queue: Arc<Queue>,
    ) {
        let root = Root { path, actor, options, queue: Feed(queue), rels: BTreeMap::new() };
        self.watchers.insert(id, root);
    }

    /// Ends a watcher.
    pub(super) fn remove(&mut self, id: u64) {
        let Some(root) = self.watchers.remove(&id) else {
            return;
        };
        self.forget_resolved();
        for wd in root.rels.into_values() {
            self.unsubscribe(id, wd);
        }
        self.jobs.retain(|job| job.watcher != id);
        self.drop_unwatched(id, Path::new(""));
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
        Some(below(&self.watchers.get(&id)?.path, rel))
    }

    /// Opens a directory of a watcher.
    pub(super) fn open(&self, id: u64, rel: &Path) -> Result<Place, Errno> {
        let root = self.watchers.get(&id).ok_or(Errno::ENOENT)?;
        if rel.as_os_str().is_empty() {
            // Whether the path still leads to the root is what is asked.
            let (top, actor) = (root.path.clone(), root.actor.clone());
            return bounded::call(&root.path, move || {
                place::Root::resolve(&top, &actor)?.open(Path::new(""))
            })?;
        }
        let (top, actor, inside) = (root.path.clone(), root.actor.clone(), rel.to_owned());
        let known = self.resolved.borrow().get(&id).map(Arc::clone);
        let opened = bounded::call(&below(&root.path, rel), move || {
            let root = match &known {
                Some(known) => Arc::clone(known),
                None => Arc::new(place::Root::resolve(&top, &actor)?),
            };
            root.open(&inside).map(|place| (root, place))
        });
        let (root, place) = opened??;
        let mut resolved = self.resolved.borrow_mut();
        if resolved.len() >= MAX_RESOLVED_ROOTS {
            resolved.clear();
        }
        resolved.insert(id, root);
        Ok(place)
    }

    /// Forgets where the paths of roots have led. An open directory keeps its file system mounted, so
    /// that this is done before the thread waits.
    pub(super) fn forget_resolved(&self) {
        self.resolved.borrow_mut().clear();
    }

    pub(super) fn is_recursive(&self, id: u64) -> bool {
        self.watchers.get(&id).is_some_and(|root| root.options.recursive)
    }

    /// Whether a watcher has a directory of that name.
    pub(super) fn has_dir(&self, id: u64, rel: &Path) -> bool {
        self.watchers.get(&id).is_some_and(|root| root.rels.contains_key(rel))
    }

    /// Whether what a watcher has under a name is what has that name now.
    pub(super) fn is_at(&self, id: u64, rel: &Path) -> bool {
        let wd = self.watchers.get(&id).and_then(|root| root.rels.get(rel));
        wd.is_some_and(|wd| self.look_up(id, rel, *wd) == Ok(true))
    }

    /// Whether what has a name now is this watched directory. Nothing is added to the kernel's watches
    /// by asking. After `wd` was deleted, a directory with its inode passes for it until `IN_IGNORED`
    /// has been handled, which ends `wd` for all.
    pub(super) fn look_up(&self, id: u64, rel: &Path, wd: Wd) -> Result<bool, Errno> {
        Ok(self.is_dir(&self.open(id, rel)?, wd))
    }

    /// The same of a directory that is open.
    pub(super) fn is_dir(&self, place: &Place, wd: Wd) -> bool {
        self.dirs.get(&wd).is_some_and(|dir| dir.id == place.id())
    }

    /// Whether the kernel still watches what has a name now under `wd`: after an overflow, when
    /// `IN_IGNORED` can be among what was lost, and another directory has the inode.
    pub(super) fn is_still_watched(&self, id: u64, rel: &Path, wd: Wd) -> Result<bool, Errno> {
        let found = self.watch_place(&self.open(id, rel)?, rel)?;
        if !self.dirs.contains_key(&found) {
            let _ = self.inotify.rm_watch(found);
        }
        Ok(found == wd)
    }

    /// Whether a watcher was told of something in a directory.
    pub(super) fn knows_below(&self, id: u64, rel: &Path) -> bool {
        let wd = self.watchers.get(&id).and_then(|root| root.rels.get(rel));
        let dir = wd.and_then(|wd| self.dirs.get(wd));
        dir.is_some_and(|dir| dir.known.as_ref().is_none_or(|known| !known.is_empty()))
    }

    /// Asks the kernel to watch. A directory that is watched already keeps its descriptor.
    pub(super) fn watch_place(&self, place: &Place, rel: &Path) -> Result<Wd, Errno> {
        place.watch(&self.inotify, EVENTS, rel.as_os_str().is_empty())
    }

    pub(super) fn unsubscribe(&mut self, id: u64, wd: Wd) {
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
        self.doubtful.remove(&wd);
        self.names -= dir.known.map_or(0, |known| known.len());
        dir.subs
    }

    /// A watcher no longer has the directory of that name, nor those below it.
    pub(super) fn detach(&mut self, id: u64, rel: &Path) {
        self.drop_unwatched(id, rel);
        for (_, wd) in self.take_subtree(id, rel) {
            self.unsubscribe(id, wd);
        }
    }

    /// Takes a directory and all below it out of the names of a watcher.
    pub(super) fn take_subtree(&mut self, id: u64, rel: &Path) -> Vec<(PathBuf, Wd)> {
        let Some(root) = self.watchers.get_mut(&id) else {
            return Vec::new();
        };
        let paths = root.below(rel);
        let taken = paths.into_iter().filter_map(|(path, wd)| {
            root.rels.remove(&path)?;
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
    pub(super) fn emit(&self, id: u64, kind: WatchKind, rel: &Path) -> Pushed {
        let Some(root) = self.watchers.get(&id) else {
            return Pushed::Queued;
        };
        let entry = if root.queue.0.is_merging() { None } else { self.entry_of(id, kind, rel) };
        root.queue.0.push(rel, WatchEvent { name: shown(rel), kind, entry })
    }

    /// Tells a watcher that a directory of its own has another name. Upstream does not tell what is
    /// in it; who keeps account of names needs that.
    pub(super) fn emit_moved(&self, id: u64, rel: &Path) {
        let cursors = self.watchers.get(&id).is_some_and(|root| root.options.cursors);
        if self.emit(id, WatchKind::Create, rel) == Pushed::Merged || cursors {
            self.announce_below(id, rel);
        }
    }

    /// Tells a CREATE for all that is known below a directory.
    pub(super) fn announce_below(&self, id: u64, rel: &Path) {
        let Some(root) = self.watchers.get(&id) else {
            return;
        };
        for (path, wd) in root.below(rel) {
            let known = self.dirs.get(&wd).and_then(|dir| dir.known.as_ref());
            for name in known.into_iter().flat_map(Names::keys) {
                self.emit(id, WatchKind::Create, &path.join(name));
            }
        }
    }

    /// A directory if it is not watched, else those known below it that are not.
    pub(super) fn missing_below(&self, id: u64, rel: &Path) -> Vec<PathBuf> {
        let Some(root) = self.watchers.get(&id) else {
            return Vec::new();
        };
        if !root.rels.contains_key(rel) {
            return vec![rel.to_owned()];
        }
        let mut missing = Vec::new();
        for (path, wd) in root.below(rel) {
            let known = self.dirs.get(&wd).and_then(|dir| dir.known.as_ref());
            let dirs = known.into_iter().flatten().filter(|(_, is_dir)| **is_dir);
            let dirs = dirs.map(|(name, _)| path.join(name));
            missing.extend(dirs.filter(|path| !root.rels.contains_key(path)));
        }
        missing
    }

    /// Declares to a watcher that changes were missed.
    pub(super) fn miss(&self, id: u64, rescan: Rescan) {
        if let Some(root) = self.watchers.get(&id) {
            root.queue.0.miss(rescan);
        }
    }

    /// Turns a watcher's merged changes into events, once it has taken those before.
    pub(super) fn refill(&self, id: u64) {
        let Some(root) = self.watchers.get(&id) else {
            return;
        };
        root.queue.0.refill(|rel, kind| WatchEvent {
            name: shown(rel),
            kind,
            entry: self.entry_of(id, kind, rel),
        });
    }

    fn entry_of(&self, id: u64, kind: WatchKind, rel: &Path) -> Option<Box<Entry>> {
        let root = self.watchers.get(&id)?;
        if !root.options.include_entry || matches!(kind, WatchKind::Remove | WatchKind::Rename) {
            return None;
        }
        let (path, actor) = (self.path_of(id, rel)?, root.actor.clone());
        let (at, users) = (path.clone(), Arc::clone(&self.users));
        let look = move || entry::stat(&at, &actor, &users).ok();
        let entry = bounded::call(&path, look).ok()??;
        // Something else can have the name by now, and the event that says so may be lost.
        let is_dir = entry.kind == EntryKind::Directory && !entry.is_symlink;
        self.sort_of(root, rel).is_none_or(|known| known == is_dir).then(|| Box::new(entry))
    }

    /// Whether a name of a watcher is known to be a directory's, or that of something else.
    fn sort_of(&self, root: &Root, rel: &Path) -> Option<bool> {
        let dir = self.dirs.get(root.rels.get(rel.parent()?)?)?;
        dir.known.as_ref()?.get(rel.file_name()?).copied()
    }
}

impl Root {
    /// A directory and those below it.
    fn below(&self, rel: &Path) -> Vec<(PathBuf, Wd)> {
        // Paths are ordered part by part, so a subtree is one range.
        let range = self.rels.range::<Path, _>((Bound::Included(rel), Bound::Unbounded));
        let range = range.take_while(|(path, _)| path.starts_with(rel));
        range.map(|(path, wd)| (path.clone(), *wd)).collect()
    }
}
