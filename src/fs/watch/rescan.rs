//! After the kernel's queue has overflowed: look at everything, and tell what differs.

use std::{collections::BTreeMap, path::Path};

use super::{
    WatchKind,
    known::{MAX_KNOWN_NAMES, scan},
    tree::{Tree, Wd},
};

impl Tree {
    /// Tells a CREATE for every name that is new in a watched directory and a REMOVE for every one
    /// that is missing, and watches what is there now. Lost writes stay lost.
    pub(super) fn rescan(&mut self) {
        tracing::warn!(
            directories = self.dirs.len(),
            "too many events at once; comparing all files"
        );
        // The second halves of these renames may be among what was lost.
        let moving = std::mem::take(&mut self.moving);
        self.lose(moving);
        let all: Vec<Wd> = self.dirs.keys().copied().collect();
        for wd in all {
            self.verify(wd);
            self.compare(wd);
        }
        if self.fresh.len() + self.gone.len() > MAX_KNOWN_NAMES {
            // At worst some events are told twice.
            self.fresh.clear();
            self.gone.clear();
        }
    }

    /// Finds those for whom another directory, or none, now has the name of this one.
    fn verify(&mut self, wd: Wd) {
        let subs = self.dirs.get(&wd).map(|dir| dir.subs.clone()).unwrap_or_default();
        for sub in subs {
            let Some(path) = self.path_of(sub.watcher, &sub.rel) else {
                continue;
            };
            let found = self.watch_at(&path, &sub.rel);
            if found == Ok(wd) {
                continue;
            }
            self.detach(sub.watcher, &sub.rel);
            if sub.rel.as_os_str().is_empty() {
                self.emit(sub.watcher, WatchKind::Remove, Path::new(""));
                if let Ok(other) = found
                    && !self.dirs.contains_key(&other)
                {
                    let _ = self.inotify.rm_watch(other);
                }
            } else if found.is_ok() {
                self.emit(sub.watcher, WatchKind::Remove, &sub.rel);
                self.emit(sub.watcher, WatchKind::Create, &sub.rel);
                self.adopt_later(sub.watcher, sub.rel);
            }
            // Else the directory above misses it.
        }
    }

    fn compare(&mut self, wd: Wd) {
        let Some(dir) = self.dirs.get(&wd) else {
            return;
        };
        let (Some(known), Some(sub)) = (dir.known.as_ref(), dir.subs.first()) else {
            return;
        };
        let Some(path) = self.path_of(sub.watcher, &sub.rel) else {
            return;
        };
        let (known, subs) = (known.clone(), dir.subs.clone());
        let found = scan(&path);
        let now: BTreeMap<_, _> = found.iter().cloned().collect();
        self.set_known(wd, found);
        for (name, is_dir) in &known {
            if now.get(name) == Some(is_dir) {
                continue;
            }
            self.gone.insert((wd, name.clone()));
            for sub in &subs {
                let rel = sub.rel.join(name);
                self.emit(sub.watcher, WatchKind::Remove, &rel);
                if *is_dir {
                    self.detach(sub.watcher, &rel);
                }
            }
        }
        for (name, is_dir) in now {
            if known.get(&name) == Some(&is_dir) {
                continue;
            }
            for sub in &subs {
                let rel = sub.rel.join(&name);
                self.emit(sub.watcher, WatchKind::Create, &rel);
                if is_dir && self.is_recursive(sub.watcher) {
                    self.adopt_later(sub.watcher, rel);
                }
            }
            self.fresh.insert((wd, name));
        }
    }
}
