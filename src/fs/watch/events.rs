//! What each event of the kernel means for whom.

use std::{
    collections::BTreeSet, ffi::OsStr, os::unix::ffi::OsStrExt, path::Path, time::SystemTime,
};

use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InotifyEvent},
};

use super::{
    WatchKind,
    tree::{Moving, Sub, Tree, Wd},
};
use crate::fs::unnamed::is_temporary;

/// The events that are handled before the commands are looked at again, so that writers without
/// end cannot keep a command waiting for ever. More than the kernel queues (16,384 unless
/// `fs.inotify.max_queued_events` was raised), so that a flush tells all that came before it.
pub const MAX_EVENTS_AT_ONCE: usize = 131_072;

/// The renames that are looked at one by one; if there are more at once, everything is compared
/// instead.
const MAX_DOUBTS: usize = 4096;

impl Tree {
    /// Handles the events that the kernel has queued.
    ///
    /// # Errors
    /// When the queue cannot be read.
    pub(super) fn drain(&mut self) -> Result<(), Errno> {
        let mut handled = 0;
        while handled < MAX_EVENTS_AT_ONCE {
            let now = SystemTime::now();
            match self.inotify.read_events() {
                Ok(events) => {
                    handled += events.len();
                    events.into_iter().for_each(|event| self.handle(event));
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    // What a scan found had its event by now.
                    self.fresh.clear();
                    self.gone.clear();
                    if !self.overflowed {
                        self.handled_until = now;
                    }
                    return Ok(());
                }
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    pub(super) fn handle(&mut self, event: InotifyEvent) {
        if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
            // Not here: several overflows in a row are one reason to compare.
            self.overflowed = true;
            return;
        }
        if event.name.is_some() {
            self.give_up_moving(event.wd);
        }
        // An event of a directory that is no longer watched can still have been queued.
        let Some(dir) = self.dirs.get(&event.wd) else {
            return;
        };
        let subs = dir.subs.clone();
        match event.name {
            Some(name) => self.handle_child(event.wd, &subs, event.mask, event.cookie, &name),
            None => self.handle_own(event.wd, &subs, event.mask),
        }
    }

    /// Something happened to `name` in the directory `wd`.
    fn handle_child(
        &mut self,
        wd: Wd,
        subs: &[Sub],
        mask: AddWatchFlags,
        cookie: u32,
        name: &OsStr,
    ) {
        // What the daemon itself is still making: it is reported under its own name, once it has that.
        if is_temporary(name) {
            return;
        }
        let is_dir = mask.contains(AddWatchFlags::IN_ISDIR);
        let moved_to = mask.contains(AddWatchFlags::IN_MOVED_TO);
        if moved_to || mask.contains(AddWatchFlags::IN_CREATE) {
            let known = self.dirs.get(&wd).and_then(|dir| dir.known.as_ref());
            let was = known.and_then(|known| known.get(name).copied());
            let was_dir = was == Some(true);
            self.learn(wd, name, is_dir);
            self.arrived = moved_to.then(|| (wd, name.to_owned()));
            // What was told may have come later, and be of another sort.
            let told = self.was_told(wd, name, true) && was.is_none_or(|was| was == is_dir);
            for sub in subs {
                let rel = sub.rel.join(name);
                let deep = is_dir && self.is_recursive(sub.watcher);
                if was_dir && !told && self.is_unknown(sub.watcher, &rel) {
                    // It was found elsewhere, and its leaving here has been lost.
                    self.emit(sub.watcher, WatchKind::Remove, &rel);
                }
                let replaced = self.settle(sub.watcher, &rel, is_dir);
                if deep && moved_to && self.arrive(sub.watcher, cookie, &rel) {
                    self.emit_moved(sub.watcher, &rel);
                } else if !told || replaced {
                    self.emit(sub.watcher, WatchKind::Create, &rel);
                } else if moved_to && !is_dir {
                    // The scan can have found what it has replaced.
                    self.emit(sub.watcher, WatchKind::Write, &rel);
                }
                if deep {
                    self.adopt_missing(sub.watcher, &rel);
                }
            }
            return;
        }
        let moved_from = mask.contains(AddWatchFlags::IN_MOVED_FROM);
        if moved_from || mask.contains(AddWatchFlags::IN_DELETE) {
            let exchanged = if moved_from { self.exchanged(wd, subs, name) } else { None };
            // What is known under the name may be what came, not what goes.
            let exchange = exchanged.is_some();
            self.forget(wd, name);
            let told = self.was_told(wd, name, false);
            // It is here again before that was noticed, or never left; to those who are told that it
            // has left, all of it is new.
            let back = subs.iter().any(|sub| self.is_at(sub.watcher, &sub.rel.join(name)));
            let there = if back { Some(true) } else { exchanged.flatten() };
            if let Some(is_dir) = there {
                self.learn(wd, name, is_dir);
            }
            for sub in subs {
                let rel = sub.rel.join(name);
                if !told {
                    let kind = if moved_from { WatchKind::Rename } else { WatchKind::Remove };
                    self.emit(sub.watcher, kind, &rel);
                }
                if is_dir && moved_from && !back && !exchange {
                    self.depart(sub.watcher, cookie, &rel);
                } else {
                    self.detach(sub.watcher, &rel);
                }
                if let Some(is_dir) = there {
                    self.emit(sub.watcher, WatchKind::Create, &rel);
                    if is_dir && self.is_recursive(sub.watcher) {
                        self.adopt_later(sub.watcher, rel);
                    }
                }
            }
            if back {
                // It may have an event of its own to come.
                self.fresh.insert((wd, name.to_owned()));
            }
            return;
        }
        if self.is_unnamed(wd, name) {
            return;
        }
        for (bit, kind) in [
            (AddWatchFlags::IN_ATTRIB, WatchKind::Chmod),
            (AddWatchFlags::IN_MODIFY, WatchKind::Write),
        ] {
            if mask.contains(bit) {
                for sub in subs {
                    self.emit(sub.watcher, kind, &sub.rel.join(name));
                }
            }
        }
    }

    /// Something happened to the directory itself. Of a directory inside a tree, the directory
    /// above tells it already.
    fn handle_own(&mut self, wd: Wd, subs: &[Sub], mask: AddWatchFlags) {
        let roots = || subs.iter().filter(|sub| sub.rel.as_os_str().is_empty()).map(|s| s.watcher);
        if mask.contains(AddWatchFlags::IN_MOVE_SELF) {
            // It comes after both halves of the rename: what has not arrived has left its tree.
            let left = self.moving.extract_if(.., |moving| moving.top == wd).collect();
            self.lose(left);
            for id in roots() {
                self.emit(id, WatchKind::Rename, Path::new(""));
                self.detach(id, Path::new(""));
            }
        }
        if mask.contains(AddWatchFlags::IN_ATTRIB) {
            roots().for_each(|id| _ = self.emit(id, WatchKind::Chmod, Path::new("")));
        }
        if mask.contains(AddWatchFlags::IN_DELETE_SELF) {
            roots().for_each(|id| _ = self.emit(id, WatchKind::Remove, Path::new("")));
        }
        if mask.contains(AddWatchFlags::IN_IGNORED) {
            // The kernel has dropped the watch: deleted or unmounted, with all below it.
            let held = self.dirs.get(&wd).and_then(|dir| dir.known.as_ref());
            let held = held.is_some_and(|known| !known.is_empty());
            for sub in self.drop_dir(wd) {
                let rels = self.watchers.get(&sub.watcher).map(|root| &root.rels);
                if rels.is_none_or(|rels| rels.get(&sub.rel) != Some(&wd)) {
                    continue;
                }
                self.detach(sub.watcher, &sub.rel);
                if held && !sub.rel.as_os_str().is_empty() {
                    // What was in it went without a word: more has been lost.
                    self.lost(sub.watcher, &sub.rel);
                }
            }
            // The directory below an end of a mount is there, and empty.
            self.overflowed |= mask.contains(AddWatchFlags::IN_UNMOUNT) || held;
        }
    }

    /// RENAME_EXCHANGE of `a` and `b` is told as if `a` became `b`, and then `b` became `a`, but
    /// `b` does not go away by that. Whether this may be the second of these, and if so, whether there
    /// is a directory at `b` now: it may as well have been renamed there and on at once, or its path
    /// lead elsewhere by now, so the directory is compared as well.
    fn exchanged(&mut self, wd: Wd, subs: &[Sub], name: &OsStr) -> Option<Option<bool>> {
        let (last, arrived) = self.arrived.take()?;
        let sub = subs.first().filter(|_| last == wd && arrived == name)?;
        self.doubtful.entry(wd).or_default().insert(name.to_owned());
        if self.doubtful.values().map(BTreeSet::len).sum::<usize>() > MAX_DOUBTS {
            self.doubtful.clear();
            self.overflowed = true;
        }
        let place = self.open(sub.watcher, &sub.rel).ok();
        let meta = place.and_then(|place| place.metadata(name));
        Some(meta.map(|meta| meta.is_dir()))
    }

    /// Tells the end of a directory that was not told by the one above.
    fn lost(&mut self, id: u64, rel: &Path) {
        let above = rel.parent().and_then(|above| self.watchers.get(&id)?.rels.get(above).copied());
        let (Some(above), Some(name)) = (above, rel.file_name()) else {
            self.emit(id, WatchKind::Remove, rel);
            return;
        };
        self.forget(above, name);
        // Others can have found another directory there, but what is known is known for all.
        let subs = self.dirs.get(&above).map(|dir| dir.subs.clone()).unwrap_or_default();
        for sub in subs {
            let rel = sub.rel.join(name);
            self.emit(sub.watcher, WatchKind::Remove, &rel);
            self.detach(sub.watcher, &rel);
        }
    }

    /// Something appears under a name that a watcher has another directory of: the end of that was
    /// lost, or it was empty and is replaced. Whether its end is told by this.
    fn settle(&mut self, id: u64, rel: &Path, is_dir: bool) -> bool {
        if !self.has_dir(id, rel) || (is_dir && self.is_at(id, rel)) {
            return false;
        }
        let told = self.knows_below(id, rel);
        if told {
            self.emit(id, WatchKind::Remove, rel);
        }
        self.detach(id, rel);
        told
    }

    /// Whether a scan has told already that a name appeared, or went away. What it told of the
    /// opposite is no longer so.
    fn was_told(&mut self, wd: Wd, name: &OsStr, appeared: bool) -> bool {
        if self.fresh.is_empty() && self.gone.is_empty() {
            return false;
        }
        let key = (wd, name.to_owned());
        let (same, opposite) = match appeared {
            true => (&mut self.fresh, &mut self.gone),
            false => (&mut self.gone, &mut self.fresh),
        };
        opposite.remove(&key);
        same.remove(&key)
    }

    /// The first half of a rename of a directory.
    fn depart(&mut self, id: u64, cookie: u32, rel: &Path) {
        let top = self.watchers.get(&id).and_then(|root| root.rels.get(rel).copied());
        let Some(top) = top else {
            // Not watched yet, or not to be: where it arrives it is new.
            return self.detach(id, rel);
        };
        let dirs = self.take_subtree(id, rel);
        self.drop_unwatched(id, rel);
        self.moving.push(Moving { cookie, watcher: id, top, dirs });
    }

    /// Something happens in a directory that is between the halves of a rename. It has no name to
    /// tell that under; if the second half comes, all of it is told as new. Whether that was so.
    pub(super) fn give_up_moving(&mut self, wd: Wd) -> bool {
        let on_the_way = |moving: &mut Moving| moving.dirs.iter().any(|(_, dir)| *dir == wd);
        let given_up: Vec<Moving> = self.moving.extract_if(.., on_the_way).collect();
        let any = !given_up.is_empty();
        self.lose(given_up);
        any
    }

    /// The second half: whether the directory was the watcher's before.
    fn arrive(&mut self, id: u64, cookie: u32, rel: &Path) -> bool {
        let ours = |moving: &Moving| (moving.cookie, moving.watcher) == (cookie, id);
        let Some(at) = self.moving.iter().position(ours) else {
            return false;
        };
        let moving = self.moving.swap_remove(at);
        if self.is_at(id, rel) {
            // What is there now was found before, and has come later than this.
            self.lose(vec![moving]);
            return false;
        }
        // An empty directory of that name can have been replaced.
        self.detach(id, rel);
        self.put_subtree(id, rel, moving.dirs);
        // What had the old name when that was watched can have been another by then.
        self.arrivals.insert((id, rel.to_owned()));
        if self.arrivals.len() > MAX_DOUBTS {
            self.arrivals.clear();
            self.overflowed = true;
        }
        true
    }

    /// Whether it is a file of `O_TMPFILE`, which has no name; the kernel tells `#` and its inode.
    fn is_unnamed(&self, wd: Wd, name: &OsStr) -> bool {
        let [b'#', digits @ ..] = name.as_bytes() else {
            return false;
        };
        let known = self.dirs.get(&wd).and_then(|dir| dir.known.as_ref());
        digits.iter().all(u8::is_ascii_digit)
            && known.is_some_and(|known| !known.contains_key(name))
    }
}
