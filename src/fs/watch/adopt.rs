//! How directories come to be watched.
//!
//! A directory is first added and then scanned: what is created in between is found by the scan, or
//! comes as an event, or both, and never neither. [`Tree::fresh`] tells the duplicates apart.
//!
//! One thread serves all watchers, so a large tree is adopted in slices: between them the events of
//! all others are handled.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::errno::Errno;
use tokio::sync::oneshot;

use super::{
    WatchKind, WatchOptions,
    known::MAX_KNOWN_NAMES,
    place::Place,
    queue::Queue,
    tree::{Dir, Sub, Tree, Wd},
};
use crate::fs::{FsError, actor::Actor};

/// The directories that are watched at once, for all watchers. Each costs about 1 KiB of kernel
/// memory. A request beyond it fails; directories that appear later are looked at instead
/// ([`super::unwatched`]).
pub const MAX_WATCHED_DIRS: usize = 131_072;
/// The names that are looked at before other watchers have their turn. A directory is not divided.
pub const SLICE_NAMES: usize = 4096;

/// A directory of one watcher with what is below it, still to be watched.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) number: u64,
    pub(super) watcher: u64,
    /// Whether to tell a CREATE for everything found: it is new to the watcher.
    announce: bool,
    /// A stack: what is below a directory comes before its neighbours.
    pub(super) todo: Vec<PathBuf>,
    /// Whom to tell how it went.
    done: Option<oneshot::Sender<Result<(), FsError>>>,
}

impl Tree {
    /// Starts a watcher; `done` hears of it when everything is watched.
    pub(super) fn add(
        &mut self,
        id: u64,
        (path, actor): (PathBuf, Actor),
        options: WatchOptions,
        queue: Arc<Queue>,
        done: oneshot::Sender<Result<(), FsError>>,
    ) {
        self.insert(id, (path, actor), options, queue);
        self.begin(id, vec![PathBuf::new()], false, Some(done));
    }

    /// Watches a directory that appeared: at once if it is small.
    pub(super) fn adopt_later(&mut self, id: u64, rel: PathBuf) {
        self.begin(id, vec![rel], true, None);
    }

    /// Watches a directory and those known below it that are not watched yet: they were to be, and
    /// were not found because one above them had another name by then.
    pub(super) fn adopt_missing(&mut self, id: u64, rel: &Path) {
        let missing = self.missing_below(id, rel);
        if !missing.is_empty() {
            self.begin(id, missing, true, None);
        }
    }

    fn begin(
        &mut self,
        watcher: u64,
        todo: Vec<PathBuf>,
        announce: bool,
        done: Option<oneshot::Sender<Result<(), FsError>>>,
    ) {
        self.last_job += 1;
        let job = Job { number: self.last_job, watcher, announce, todo, done };
        if let Some(rest) = self.work_on(job) {
            self.jobs.push_back(rest);
        }
    }

    /// Goes on with what is begun, for one slice.
    pub(super) fn work(&mut self) {
        if let Some(job) = self.jobs.pop_front()
            && let Some(rest) = self.work_on(job)
        {
            self.jobs.push_back(rest);
        }
    }

    /// Whether everything is watched that was to be when `last_job` was this.
    pub(super) fn has_adopted(&self, id: u64, last_job: u64) -> bool {
        !self.jobs.iter().any(|job| job.watcher == id && job.number <= last_job)
    }

    /// One slice of a job; returns what is left of it.
    fn work_on(&mut self, mut job: Job) -> Option<Job> {
        let mut names = 0;
        while let Some(rel) = job.todo.pop() {
            match self.adopt(job.watcher, &rel, job.announce) {
                Ok(adopted) => {
                    names += adopted.names + 1;
                    job.todo.extend(adopted.dirs.into_iter().rev());
                }
                Err(error) => match job.done {
                    Some(done) => {
                        self.remove(job.watcher);
                        let _ = done.send(Err(error));
                        return None;
                    }
                    None => tracing::warn!(%error, "a new directory is not watched"),
                },
            }
            if names >= SLICE_NAMES && !job.todo.is_empty() {
                return Some(job);
            }
        }
        if let Some(done) = job.done {
            // Nobody waits any more: the removal of this watcher is on its way.
            let _ = done.send(Ok(()));
        }
        None
    }

    /// Watches one directory.
    fn adopt(&mut self, id: u64, rel: &Path, announce: bool) -> Result<Adopted, FsError> {
        let Some(path) = self.path_of(id, rel) else {
            return Ok(Adopted::default());
        };
        if !self.is_told(id, rel) {
            // It has gone meanwhile, or something above it. When that comes back, so does this.
            return Ok(Adopted::default());
        }
        let full = self.dirs.len() >= MAX_WATCHED_DIRS;
        let failed = |errno| match errno {
            // Gone again already, or not readable: nothing to watch, and no reason to fail.
            Errno::ENOENT | Errno::ENOTDIR | Errno::EACCES | Errno::ELOOP
                if !rel.as_os_str().is_empty() =>
            {
                Ok(Adopted::default())
            }
            errno => Err(FsError::WatchAdd { path: path.clone(), errno }),
        };
        let place = match self.place_of(id, rel) {
            Ok(place) => place,
            Err(Errno::ETIMEDOUT) if !rel.as_os_str().is_empty() => {
                self.leave_unwatched(id, rel, None);
                return Ok(Adopted::default());
            }
            Err(errno) => return failed(errno),
        };
        let found = match self.watch_anew(id, rel, &place) {
            Ok(wd) if full && !self.dirs.contains_key(&wd) => {
                let _ = self.inotify.rm_watch(wd);
                if !announce {
                    return Err(FsError::TooManyDirectories { path, limit: MAX_WATCHED_DIRS });
                }
                self.leave_unwatched(id, rel, Some(&place))
            }
            Ok(wd) => {
                if !self.subscribe(id, rel, wd, &place, announce) {
                    let dirs = if self.has_dir(id, rel) {
                        self.missing_below(id, rel)
                    } else {
                        Vec::new()
                    };
                    return Ok(Adopted { names: dirs.len(), dirs });
                }
                let known = self.dirs.get(&wd).and_then(|dir| dir.known.as_ref());
                match known {
                    Some(known) => known.iter().map(|(name, dir)| (name.clone(), *dir)).collect(),
                    None if announce || self.is_recursive(id) => place.scan(),
                    None => Vec::new(),
                }
            }
            // Its file system does not answer; others go on.
            Err(Errno::ETIMEDOUT) if !rel.as_os_str().is_empty() => {
                self.leave_unwatched(id, rel, Some(&place))
            }
            Err(Errno::ENOSPC) if announce => self.leave_unwatched(id, rel, Some(&place)),
            Err(errno) => return failed(errno),
        };
        let recursive = self.is_recursive(id);
        let mut adopted = Adopted { names: found.len(), dirs: Vec::new() };
        for (name, is_dir) in found {
            let child = rel.join(&name);
            if announce {
                self.announce(id, &child, (&place, &name), is_dir);
            }
            if is_dir && recursive {
                adopted.dirs.push(child);
            }
        }
        Ok(adopted)
    }

    /// Whether the watcher was told of a directory, and has the one above it.
    fn is_told(&self, id: u64, rel: &Path) -> bool {
        let (Some(above), Some(name)) = (rel.parent(), rel.file_name()) else {
            return true;
        };
        let dir = self.watchers.get(&id).and_then(|root| root.rels.get(above));
        match dir.and_then(|wd| self.dirs.get(wd)) {
            Some(dir) => dir.known.as_ref().is_none_or(|known| known.get(name) == Some(&true)),
            None => {
                let above = self.unwatched.get(&(id, above.to_owned()));
                above.is_some_and(|known| known.get(name) == Some(&true))
            }
        }
    }

    /// Opens a directory of a watcher: through the one above it, which another can have replaced.
    fn place_of(&self, id: u64, rel: &Path) -> Result<Place, Errno> {
        let (Some(above), Some(name)) = (rel.parent(), rel.file_name()) else {
            return self.open(id, rel);
        };
        let wanted = self.watchers.get(&id).and_then(|root| root.rels.get(above).copied());
        let Some(wanted) = wanted else {
            return self.open(id, rel);
        };
        let up = self.open(id, above)?;
        match self.is_dir(&up, wanted) {
            true => up.below(name),
            false => Err(Errno::ENOENT),
        }
    }

    /// Watches what has a name now. If the watcher has it under another name, or between the halves
    /// of a rename, it is found where it has gone to before that was told: then it is new.
    pub(super) fn watch_anew(&mut self, id: u64, rel: &Path, place: &Place) -> Result<Wd, Errno> {
        let wd = self.watch_place(place, rel)?;
        let given_up = self.give_up_moving(wd);
        let subs = self.dirs.get(&wd).map(|dir| dir.subs.as_slice()).unwrap_or_default();
        let elsewhere = subs
            .iter()
            .find(|sub| sub.watcher == id && sub.rel != rel && !sub.rel.as_os_str().is_empty());
        if let Some(old) = elsewhere.map(|sub| sub.rel.clone()) {
            self.detach(id, &old);
            self.expect_news(id, &old);
        } else if !given_up {
            return Ok(wd);
        }
        self.watch_place(place, rel)
    }

    /// What was told of a name is no longer so, and the event that says it is still to come.
    fn expect_news(&mut self, id: u64, rel: &Path) {
        let above = rel.parent().and_then(|above| self.watchers.get(&id)?.rels.get(above).copied());
        if let (Some(above), Some(name)) = (above, rel.file_name()) {
            self.fresh.remove(&(above, name.to_owned()));
        }
    }

    /// Tells what a scan has found.
    pub(super) fn announce(&self, id: u64, rel: &Path, (at, name): (&Place, &OsStr), is_dir: bool) {
        self.emit(id, WatchKind::Create, rel);
        // Written before it was watched: whoever waits for content must hear of it.
        if !is_dir && at.has_content(name) {
            self.emit(id, WatchKind::Write, rel);
        }
    }

    /// Whether the directory is new to the watcher, who now wants it under this name.
    pub(super) fn subscribe(
        &mut self,
        id: u64,
        rel: &Path,
        wd: Wd,
        place: &Place,
        announce: bool,
    ) -> bool {
        match self.watchers.get(&id).and_then(|root| root.rels.get(rel)) {
            Some(old) if *old == wd => return false,
            // Another directory had this name, and its end is not told yet.
            Some(_) => self.detach(id, rel),
            None => {}
        }
        if !self.dirs.contains_key(&wd) {
            let found = place.scan();
            if announce && self.fresh.len() < MAX_KNOWN_NAMES {
                self.fresh.extend(found.iter().map(|(name, _)| (wd, name.clone())));
            }
            self.dirs.insert(wd, Dir { id: place.id(), subs: Vec::new(), known: None });
            self.set_known(wd, found);
        }
        let Some(dir) = self.dirs.get_mut(&wd) else {
            return false;
        };
        if dir.subs.iter().any(|sub| sub.watcher == id) {
            // It is mounted inside itself.
            return false;
        }
        dir.subs.push(Sub { watcher: id, rel: rel.to_owned() });
        if let Some(root) = self.watchers.get_mut(&id) {
            root.rels.insert(rel.to_owned(), wd);
        }
        true
    }
}

/// What adopting a directory has found in it.
#[derive(Debug, Default)]
struct Adopted {
    names: usize,
    dirs: Vec<PathBuf>,
}
