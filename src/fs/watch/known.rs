//! The names that are known to be in watched directories: what the files are compared with after
//! the kernel's queue has overflowed.

use std::{
    ffi::{OsStr, OsString},
    fs,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{ffi::OsStrExt, fs::MetadataExt},
    },
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::{
    dir::{Dir, Type},
    fcntl::{OFlag, openat},
    sys::stat::{Mode, SFlag, fstat},
};

use super::tree::{Tree, Wd};
use crate::{blocking::keep_out_of, fs::unnamed::is_temporary};

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
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let Ok(mut dir) = Dir::open(path, flags, Mode::empty()) else {
        return Vec::new();
    };
    let entries = dir.iter().map_while(Result::ok).take(MAX_KNOWN_NAMES + 3);
    let named = entries.filter(|entry| !matches!(entry.file_name().to_bytes(), b"." | b".."));
    let names: Vec<(OsString, Option<Type>)> = named
        .map(|entry| {
            (OsStr::from_bytes(entry.file_name().to_bytes()).to_owned(), entry.file_type())
        })
        .collect();
    let is_dir = |name: &OsStr, kind: Option<Type>| match kind {
        Some(kind) => kind == Type::Directory,
        None => is_dir(dir.as_fd(), name),
    };
    let mut found: Vec<_> = names
        .into_iter()
        .filter(|(name, _)| !is_temporary(name))
        .map(|(name, kind)| {
            let is_dir = is_dir(&name, kind);
            (name, is_dir)
        })
        .collect();
    found.sort_unstable();
    found
}

/// Whether a name is a directory's, where the file system does not say so in the listing.
fn is_dir(dir: BorrowedFd<'_>, name: &OsStr) -> bool {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let Ok(fd) = openat(dir, name, flags, Mode::empty()) else {
        return false;
    };
    // It can be the root of a mount.
    keep_out_of(Some(fd.as_fd())).is_ok()
        && fstat(&fd).is_ok_and(|stat| {
            SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR
        })
}

/// Whether a file may have changed since then, by the one time that no program can set.
pub(super) fn has_changed(meta: &fs::Metadata, since: SystemTime) -> bool {
    let seconds = Duration::from_secs(meta.ctime().try_into().unwrap_or(0));
    let nanos = Duration::from_nanos(meta.ctime_nsec().try_into().unwrap_or(0));
    let changed = seconds.checked_add(nanos).and_then(|time| time.checked_add(TICK));
    // A FUSE server names any time, also one that no clock reaches: that is later than `since`.
    changed.and_then(|time| UNIX_EPOCH.checked_add(time)).is_none_or(|time| time >= since)
}
