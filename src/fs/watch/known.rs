//! The names that are known to be in watched directories: what the files are compared with after
//! the kernel's queue has overflowed.

use std::{
    ffi::{OsStr, OsString},
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::tree::{Tree, Wd};
use crate::fs::unnamed::is_temporary;

/// How far the time of a change may lie behind the clock: the kernel takes it from its last tick,
/// and there are 100 in a second at the least.
const TICK: Duration = Duration::from_millis(20);

/// The names of files that are kept for finding out what changed when the kernel's queue has
/// overflowed. In directories beyond it, what such an overflow swallows is not told.
pub const MAX_KNOWN_NAMES: usize = 1 << 20;

impl Tree {
    /// Replaces the names that are known of a directory.
    pub(super) fn set_known(&mut self, wd: Wd, found: Vec<(OsString, bool)>) {
        let Some(dir) = self.dirs.get_mut(&wd) else {
            return;
        };
        self.names -= dir.known.take().map_or(0, |known| known.len());
        if self.names + found.len() <= MAX_KNOWN_NAMES {
            self.names += found.len();
            dir.known = Some(found.into_iter().collect());
        }
    }

    /// A name appeared in a directory.
    pub(super) fn learn(&mut self, wd: Wd, name: &OsStr, is_dir: bool) {
        let Some(known) = self.dirs.get_mut(&wd).and_then(|dir| dir.known.as_mut()) else {
            return;
        };
        if known.insert(name.to_owned(), is_dir).is_none() {
            self.names += 1;
        }
        if self.names > MAX_KNOWN_NAMES {
            self.set_known(wd, Vec::new());
            if let Some(dir) = self.dirs.get_mut(&wd) {
                dir.known = None;
            }
        }
    }

    #[cfg(test)]
    pub(super) fn names_are_counted_to_zero(&self) -> bool {
        self.dirs.is_empty() && self.unwatched.is_empty() && self.names == 0
    }

    /// A name went away.
    pub(super) fn forget(&mut self, wd: Wd, name: &OsStr) {
        let Some(known) = self.dirs.get_mut(&wd).and_then(|dir| dir.known.as_mut()) else {
            return;
        };
        if known.remove(name).is_some() {
            self.names -= 1;
        }
    }
}

/// The sorted names in a directory, with whether each is a directory; empty when it is gone.
pub(super) fn scan(path: &Path) -> Vec<(OsString, bool)> {
    let Ok(entries) = fs::read_dir(path) else {
        return Vec::new();
    };
    let readable = entries.take(MAX_KNOWN_NAMES + 1).filter_map(Result::ok);
    let mut found: Vec<_> = readable
        .filter(|entry| !is_temporary(&entry.file_name()))
        .map(|entry| (entry.file_name(), entry.file_type().is_ok_and(|kind| kind.is_dir())))
        .collect();
    found.sort_unstable();
    found
}

/// Whether a file may have changed since then, by the one time that no program can set.
pub(super) fn has_changed(meta: &fs::Metadata, since: SystemTime) -> bool {
    let seconds = Duration::from_secs(meta.ctime().try_into().unwrap_or(0));
    let nanos = Duration::from_nanos(meta.ctime_nsec().try_into().unwrap_or(0));
    let changed = seconds.checked_add(nanos).and_then(|time| time.checked_add(TICK));
    // A FUSE server names any time, also one that no clock reaches: that is later than `since`.
    changed.and_then(|time| UNIX_EPOCH.checked_add(time)).is_none_or(|time| time >= since)
}
