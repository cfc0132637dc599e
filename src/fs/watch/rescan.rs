//! After the kernel's queue has overflowed: look at everything, and tell what differs.

use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    path::Path,
    time::{Instant, SystemTime},
};

use super::{
    Rescan, RescanReason, WatchKind,
    known::MAX_KNOWN_NAMES,
    place::Place,
    tree::{Names, Sub, Tree, Wd},
};

/// After comparing, others have their turn for so many times as long as that took, unless somebody
/// asks for events.
const PAUSE: u32 = 4;

impl Tree {
    /// Tells a CREATE for every name that is new in a watched directory, a REMOVE for every one that
    /// is missing, a WRITE for every file that has changed, and watches what is there now.
    pub(super) fn rescan(&mut self) {
        let start = Instant::now();
        let since = self.handled_until;
        tracing::warn!(
            directories = self.dirs.len(),
            "too many events at once; comparing all files"
        );
        self.overflowed = false;
        let now = SystemTime::now();
        // The second halves of these renames may be among what was lost.
        let moving = std::mem::take(&mut self.moving);
        self.lose(moving);
        self.declare();
        let all: Vec<Wd> = self.dirs.keys().copied().collect();
        // All before any: a name that is new may be of a directory that had another one.
        for wd in &all {
            self.verify(*wd);
        }
        for wd in all {
            if !self.compare(wd, |name, at| at.has_changed(name, since)) {
                // It has just moved; wherever it is, it is still to be compared.
                self.overflowed = true;
            }
        }
        self.arrivals.clear();
        self.doubtful.clear();
        self.look_at_unwatched();
        if self.fresh.len() + self.gone.len() > MAX_KNOWN_NAMES {
            // At worst some events are told twice.
            self.fresh.clear();
            self.gone.clear();
        }
        self.handled_until = now;
        self.rescan_at = Instant::now() + start.elapsed() * PAUSE;
    }

    /// Says to all watchers that changes were missed.
    fn declare(&self) {
        let unknown = self.dirs.values().filter(|dir| dir.known.is_none());
        let incomplete: BTreeSet<u64> =
            unknown.flat_map(|dir| dir.subs.iter().map(|sub| sub.watcher)).collect();
        for id in self.watchers.keys() {
            let complete = !incomplete.contains(id);
            self.miss(*id, Rescan { reason: RescanReason::KernelQueue, complete });
        }
    }

    /// Finds those for whom another directory, or none, now has the name of this one.
    fn verify(&mut self, wd: Wd) {
        let subs = self.dirs.get(&wd).map(|dir| dir.subs.clone()).unwrap_or_default();
        for sub in subs {
            let found = self.is_still_watched(sub.watcher, &sub.rel, wd);
            if found == Ok(true) {
                continue;
            }
            if sub.rel.as_os_str().is_empty() {
                self.detach(sub.watcher, Path::new(""));
                self.emit(sub.watcher, WatchKind::Remove, Path::new(""));
            } else if found.is_ok() {
                self.replace(sub.watcher, &sub.rel);
            } else {
                // The directory above misses it.
                self.detach(sub.watcher, &sub.rel);
            }
        }
    }

    /// A watcher is told that another directory has a name.
    fn replace(&mut self, id: u64, rel: &Path) {
        self.detach(id, rel);
        self.emit(id, WatchKind::Remove, rel);
        self.emit(id, WatchKind::Create, rel);
        self.adopt_later(id, rel.to_owned());
    }

    /// Looks for directories that were renamed where they should be, and compares those of which
    /// events could not tell what is in them now. `flush` says that somebody waits for all of it.
    pub(super) fn resolve_doubts(&mut self, flush: bool) {
        for (id, rel) in std::mem::take(&mut self.arrivals) {
            let Some(wd) = self.watchers.get(&id).and_then(|root| root.rels.get(&rel).copied())
            else {
                continue;
            };
            match self.look_up(id, &rel, wd) {
                Ok(true) => {}
                Ok(false) => self.replace(id, &rel),
                // It has just moved on, or gone, and the event that says so is on its way.
                Err(_) => _ = self.arrivals.insert((id, rel)),
            }
        }
        for (wd, names) in std::mem::take(&mut self.doubtful) {
            if !self.compare(wd, |name, _| names.contains(name)) {
                // As above.
                self.doubtful.insert(wd, names);
            }
        }
        self.overflowed |= flush && !(self.doubtful.is_empty() && self.arrivals.is_empty());
    }

    /// Tells what is in a directory against what was known of it, and a WRITE for the files that
    /// may have changed. False when it is not where it was.
    fn compare(&mut self, wd: Wd, changed: impl Fn(&OsStr, &Place) -> bool) -> bool {
        let Some(dir) = self.dirs.get(&wd) else {
            return true;
        };
        let (Some(known), Some(sub)) = (dir.known.as_ref(), dir.subs.first()) else {
            return true;
        };
        if !self.watchers.contains_key(&sub.watcher) {
            return true;
        }
        let (known, subs, rel) = (known.clone(), dir.subs.clone(), sub.rel.clone());
        let place = self.open(sub.watcher, &rel);
        let Some(place) = place.ok().filter(|place| self.is_dir(place, wd)) else {
            return false;
        };
        let found = place.scan();
        self.set_known(wd, found.clone());
        self.tell_difference(Some(wd), &subs, &place, (&known, found), changed);
        true
    }

    /// Tells what is in a directory now against what was known of it.
    pub(super) fn tell_difference(
        &mut self,
        wd: Option<Wd>,
        subs: &[Sub],
        place: &Place,
        (known, found): (&Names, Vec<(OsString, bool)>),
        changed: impl Fn(&OsStr, &Place) -> bool,
    ) {
        let now: Names = found.into_iter().collect();
        // A directory that is not watched any more: its end was told by itself alone, and what has
        // its name now is another.
        let lost = |tree: &Self, name: &OsString| {
            let lost = |sub: &Sub| tree.is_unknown(sub.watcher, &sub.rel.join(name));
            wd.is_some() && subs.iter().any(lost)
        };
        let same: BTreeSet<OsString> = known
            .iter()
            .filter(|(name, is_dir)| now.get(*name) == Some(*is_dir))
            .filter(|(name, is_dir)| !**is_dir || !lost(self, name))
            .map(|(name, _)| name.clone())
            .collect();
        for name in known.keys() {
            if same.contains(name) {
                continue;
            }
            // Of what is there again, the end of the present one would be taken for told.
            if let Some(wd) = wd
                && !now.contains_key(name)
            {
                self.fresh.remove(&(wd, name.clone()));
                self.gone.insert((wd, name.clone()));
            }
            for sub in subs {
                let rel = sub.rel.join(name);
                self.emit(sub.watcher, WatchKind::Remove, &rel);
                self.detach(sub.watcher, &rel);
            }
        }
        for (name, is_dir) in now {
            if same.contains(&name) {
                if !is_dir && changed(&name, place) {
                    for sub in subs {
                        self.emit(sub.watcher, WatchKind::Write, &sub.rel.join(&name));
                    }
                }
                continue;
            }
            for sub in subs {
                let rel = sub.rel.join(&name);
                self.announce(sub.watcher, &rel, (place, &name), is_dir);
                if is_dir && self.is_recursive(sub.watcher) {
                    self.adopt_later(sub.watcher, rel);
                }
            }
            if let Some(wd) = wd {
                self.gone.remove(&(wd, name.clone()));
                self.fresh.insert((wd, name));
            }
        }
    }
}
