//! A walk through a directory and all that is in it, over open descriptors.
//!
//! Every step is one name relative to a directory that is held open, and follows no link, so the
//! walk never leaves the tree, whatever is renamed meanwhile. What vanishes is left out. Names come
//! sorted, so that the same tree is always told in the same order. The walk has the rights with which
//! its top was reached ([`Rights`]).

use std::{
    ffi::OsString,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    path::{Path, PathBuf},
};

use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{AtFlags, OFlag},
    sys::stat::{FileStat, Mode, SFlag, fstatat},
};

use super::{FsError, PathError, actor::Rights};
use crate::blocking::stand_on_child;

/// The levels that one walk descends, each with an open directory.
pub const MAX_LEVELS: usize = 256;
/// The names that one walk holds, of all directories on the way down together.
pub const MAX_NAMES: usize = 1_000_000;

/// One entry of the tree.
#[derive(Debug)]
pub(super) struct Found {
    /// Its name.
    pub(super) name: OsString,
    /// Its path from the top.
    pub(super) relative: PathBuf,
    /// What it is.
    pub(super) stat: FileStat,
}

impl Found {
    pub(super) fn kind(&self) -> SFlag {
        SFlag::from_bits_truncate(self.stat.st_mode & SFlag::S_IFMT.bits())
    }
}

/// What the walk comes to.
#[derive(Debug)]
pub(super) enum Step {
    /// A directory; what is in it comes next.
    Enter(Found),
    /// Anything else.
    Leaf(Found),
    /// The end of the directory that was entered last and not left.
    Leave(Found),
}

/// The walk.
#[derive(Debug)]
pub(super) struct Walk {
    /// The path of the top, for messages.
    top: PathBuf,
    /// What messages say is being done.
    doing: &'static str,
    rights: Rights,
    levels: Vec<Level>,
    names: usize,
}

#[derive(Debug)]
struct Level {
    fd: OwnedFd,
    /// None for the top, which is not told.
    found: Option<Found>,
    relative: PathBuf,
    /// Sorted backwards.
    names: Vec<OsString>,
}

impl Walk {
    /// A walk through the directory `fd`, which is called `top` and was opened with `rights`.
    pub(super) fn new(
        fd: OwnedFd,
        top: &Path,
        rights: Rights,
        doing: &'static str,
    ) -> Result<Self, FsError> {
        let mut walk = Self { top: top.to_owned(), doing, rights, levels: Vec::new(), names: 0 };
        let names = walk.names_in(&fd, Path::new(""))?;
        walk.levels.push(Level { fd, found: None, relative: PathBuf::new(), names });
        Ok(walk)
    }

    /// The directory that a leaf is in, or that was entered last.
    pub(super) fn dir(&self) -> Option<BorrowedFd<'_>> {
        self.levels.last().map(|level| level.fd.as_fd())
    }

    pub(super) fn next(&mut self) -> Result<Option<Step>, FsError> {
        loop {
            let depth = self.levels.len();
            let Some(level) = self.levels.last_mut() else {
                return Ok(None);
            };
            let Some(name) = level.names.pop() else {
                let left = self.levels.pop();
                return Ok(left.and_then(|level| level.found).map(Step::Leave));
            };
            self.names -= 1;
            stand_on_child(level.fd.as_fd(), &name)?;
            let relative = level.relative.join(&name);
            let look = || fstatat(&level.fd, name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW);
            let stat = match self.rights.act(look) {
                Ok(stat) => stat,
                Err(Errno::ENOENT) => continue,
                Err(errno) => return Err(self.failed("lstat", &relative, errno)),
            };
            let mut found = Found { name, relative, stat };
            if found.kind() != SFlag::S_IFDIR {
                return Ok(Some(Step::Leaf(found)));
            }
            if depth >= MAX_LEVELS {
                let path = self.top.join(&found.relative);
                return Err(FsError::TooDeep { path, limit: MAX_LEVELS });
            }
            let fd = match self.rights.enter(&level.fd, &found.name) {
                Ok((fd, stat)) => {
                    // What is told is told of the directory that was opened.
                    found.stat = stat;
                    fd
                }
                // Gone, or something else by now.
                Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => continue,
                Err(errno) => return Err(self.failed("open", &found.relative, errno)),
            };
            let names = self.names_in(&fd, &found.relative)?;
            let told = Found {
                name: found.name.clone(),
                relative: found.relative.clone(),
                stat: found.stat,
            };
            let relative = found.relative.clone();
            self.levels.push(Level { fd, found: Some(found), relative, names });
            return Ok(Some(Step::Enter(told)));
        }
    }

    fn names_in(&mut self, fd: &OwnedFd, relative: &Path) -> Result<Vec<OsString>, FsError> {
        let read = || -> nix::Result<Vec<OsString>> {
            let mut dir = Dir::openat(fd, ".", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
            let mut names = Vec::new();
            for entry in dir.iter() {
                let name = entry?.file_name().to_bytes().to_vec();
                if !matches!(name.as_slice(), b"." | b"..") {
                    names.push(OsString::from_vec(name));
                }
                if self.names + names.len() > MAX_NAMES {
                    break;
                }
            }
            Ok(names)
        };
        let mut names = match read() {
            Ok(names) => names,
            Err(Errno::ENOENT) => Vec::new(),
            Err(errno) => return Err(self.failed("open", relative, errno)),
        };
        self.names += names.len();
        if self.names > MAX_NAMES {
            let path = self.top.join(relative);
            return Err(FsError::TooManyEntries { path, limit: MAX_NAMES });
        }
        names.sort_unstable_by(|a, b| b.cmp(a));
        Ok(names)
    }

    fn failed(&self, op: &'static str, relative: &Path, errno: Errno) -> FsError {
        let error = PathError::new(op, &self.top.join(relative), errno);
        FsError::Doing { doing: self.doing, error }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use nix::fcntl::open;

    use super::*;
    use crate::{
        fs::actor::{Actor, FileAccess},
        guest::users::User,
    };

    fn rights() -> Rights {
        let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        let user = User { name: "me".into(), uid, gid, home: "/".into(), groups: vec![gid] };
        Actor::new(&user, FileAccess::Compatible).rights()
    }

    #[test]
    fn a_tree_is_told_in_order_and_no_link_is_followed() {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir_all(tmp.path().join("b/c")).unwrap();
        for name in ["a", "b.x", "b/z", "b/c/y"] {
            fs::write(tmp.path().join(name), "").unwrap();
        }
        symlink("b", tmp.path().join("l")).unwrap();
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = open(tmp.path(), flags, Mode::empty()).unwrap();
        let mut walk = Walk::new(fd, tmp.path(), rights(), "testing").unwrap();
        let mut told = Vec::new();
        while let Some(step) = walk.next().unwrap() {
            told.push(match step {
                Step::Enter(found) => format!("+{}", found.relative.display()),
                Step::Leaf(found) => found.relative.display().to_string(),
                Step::Leave(found) => format!("-{}", found.relative.display()),
            });
        }
        assert_eq!(told, ["a", "+b", "+b/c", "b/c/y", "-b/c", "b/z", "-b", "b.x", "l"]);
        assert_eq!((walk.names, walk.levels.len()), (0, 0));
    }

    #[test]
    fn too_many_levels_are_refused() {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir_all(tmp.path().join("d/".repeat(MAX_LEVELS))).unwrap();
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = open(tmp.path(), flags, Mode::empty()).unwrap();
        let mut walk = Walk::new(fd, tmp.path(), rights(), "testing").unwrap();
        let error = loop {
            match walk.next() {
                Ok(step) => assert!(matches!(step, Some(Step::Enter(_)))),
                Err(error) => break error,
            }
        };
        assert!(error.to_string().ends_with("more than 256 levels of directories"), "{error}");
    }
}
