//! Directories that there is no watch left for: `fs.inotify.max_user_watches` is reached, or this
//! daemon's own bound. They are looked at every second, and whenever events are asked for, until
//! they can be watched.

use std::{
    ffi::{OsStr, OsString},
    ops::Bound,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use nix::errno::Errno;

use super::{
    Rescan, RescanReason,
    adopt::MAX_WATCHED_DIRS,
    known::MAX_KNOWN_NAMES,
    place::Place,
    tree::{Names, Sub, Tree},
};

/// How often they are looked at, while there are any.
pub const UNWATCHED_INTERVAL: Duration = Duration::from_secs(1);
/// The directories without a watch, of all watchers together. What is beyond it is lost, which is
/// declared to those who asked for rescans to be.
pub const MAX_UNWATCHED_DIRS: usize = 16_384;

impl Tree {
    /// Notes a directory that cannot be watched, and returns what is in it.
    pub(super) fn leave_unwatched(
        &mut self,
        id: u64,
        rel: &Path,
        place: Option<&Place>,
    ) -> Vec<(OsString, bool)> {
        let found = place.map(Place::scan).unwrap_or_default();
        let first = self.unwatched_below(id, Path::new("")).is_empty();
        let fits = self.unwatched.len() < MAX_UNWATCHED_DIRS
            && self.names + found.len() <= MAX_KNOWN_NAMES;
        if first || !fits {
            let path = self.path_of(id, rel).unwrap_or_default();
            tracing::warn!(path = %path.display(), looked_at = fits, "no watch left for a directory");
            self.miss(id, Rescan { reason: RescanReason::WatchLimit, complete: fits });
        }
        if self.unwatched.is_empty() {
            self.looked = SystemTime::now();
            self.look_at = Instant::now() + UNWATCHED_INTERVAL;
        }
        if fits {
            self.drop_one(&(id, rel.to_owned()));
            self.names += found.len();
            self.unwatched.insert((id, rel.to_owned()), found.iter().cloned().collect());
        }
        found
    }

    /// When there is something to look at next.
    pub(super) fn look_at(&self) -> Option<Instant> {
        (!self.unwatched.is_empty()).then_some(self.look_at)
    }

    /// Whether that is now.
    pub(super) fn is_look_due(&self) -> bool {
        self.look_at().is_some_and(|at| Instant::now() >= at)
    }

    /// Whether a watcher has directories without a watch.
    pub(super) fn has_unwatched(&self, id: u64) -> bool {
        !self.unwatched_below(id, Path::new("")).is_empty()
    }

    /// Whether a directory of a recursive watcher is neither watched nor looked at.
    pub(super) fn is_unknown(&self, id: u64, rel: &Path) -> bool {
        self.is_recursive(id)
            && !self.has_dir(id, rel)
            && !self.unwatched.contains_key(&(id, rel.to_owned()))
    }

    /// Those at and below `rel`.
    fn unwatched_below(&self, id: u64, rel: &Path) -> Vec<PathBuf> {
        let range = (Bound::Included((id, rel.to_owned())), Bound::Unbounded);
        let range = self.unwatched.range(range).map(|(key, _)| key);
        range
            .take_while(|(watcher, path)| *watcher == id && path.starts_with(rel))
            .map(|(_, path)| path.clone())
            .collect()
    }

    /// Forgets those at and below `rel`, which it returns.
    pub(super) fn drop_unwatched(&mut self, id: u64, rel: &Path) -> Vec<PathBuf> {
        if self.unwatched.is_empty() {
            return Vec::new();
        }
        let rels = self.unwatched_below(id, rel);
        for rel in &rels {
            self.drop_one(&(id, rel.clone()));
        }
        rels
    }

    fn drop_one(&mut self, key: &(u64, PathBuf)) -> Option<Names> {
        let names = self.unwatched.remove(key)?;
        self.names -= names.len();
        Some(names)
    }

    /// Tells what has changed in them, and watches those that can be.
    pub(super) fn look_at_unwatched(&mut self) {
        let (since, now, start) = (self.looked, SystemTime::now(), Instant::now());
        let changed = |name: &OsStr, at: &Place| at.has_changed(name, since);
        let all: Vec<(u64, PathBuf)> = self.unwatched.keys().cloned().collect();
        for key in all {
            // A difference above can have taken it away.
            if !self.unwatched.contains_key(&key) {
                continue;
            }
            let (id, rel) = &key;
            if !self.watchers.contains_key(id) {
                self.drop_one(&key);
                continue;
            }
            let subs = [Sub { watcher: *id, rel: rel.clone() }];
            let place = match self.open(*id, rel) {
                Ok(place) => place,
                // Its file system does not answer.
                Err(Errno::ETIMEDOUT) => continue,
                Err(_) => {
                    // The directory above tells it.
                    self.drop_unwatched(*id, rel);
                    continue;
                }
            };
            match self.watch_anew(*id, rel, &place) {
                Ok(wd) if self.dirs.len() < MAX_WATCHED_DIRS || self.dirs.contains_key(&wd) => {
                    let Some(known) = self.drop_one(&key) else {
                        continue;
                    };
                    if !self.subscribe(*id, rel, wd, &place, true) {
                        continue;
                    }
                    let found = self.dirs.get(&wd).and_then(|dir| dir.known.clone());
                    let found =
                        found.map_or_else(|| place.scan(), |known| known.into_iter().collect());
                    self.tell_difference(Some(wd), &subs, &place, (&known, found), changed);
                }
                Ok(_) | Err(Errno::ENOSPC) => {
                    let Some(known) = self.drop_one(&key) else {
                        continue;
                    };
                    let found = place.scan();
                    self.names += found.len();
                    self.unwatched.insert(key.clone(), found.iter().cloned().collect());
                    self.tell_difference(None, &subs, &place, (&known, found), changed);
                }
                // Its file system does not answer.
                Err(Errno::ETIMEDOUT) => {}
                // The directory above tells it.
                Err(_) => {
                    self.drop_unwatched(*id, rel);
                }
            }
        }
        self.looked = now;
        // However long it takes, others have their turn.
        self.look_at = Instant::now() + UNWATCHED_INTERVAL.max(start.elapsed() * 4);
    }
}
