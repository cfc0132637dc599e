//! One step below a directory that a walk has reached, for operations on whole trees.
//!
//! Such an operation opens each name relative to the descriptor of its directory and follows no link,
//! so of the rule's points only the last is left: a file with several hard links that is not the
//! user's, in a directory that is not owned by root. It is opened with the user's own rights. What is
//! created belongs to the user from its first moment, so that no chown(2) by name follows, and a
//! directory that was just made is known again: whoever may rename in the directory around could have
//! put another one under its name.

use std::{
    ffi::OsStr,
    fs::File,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, openat},
    sys::{
        stat::{FileStat, Mode, SFlag, fstat, mkdirat, mknodat},
        time::TimeSpec,
    },
    unistd::symlinkat,
};

use super::{Actor, Rights, is_others, trust};
use crate::{fs::actor::FileAccess, guest::users::User, sys::path_fd};

const DIR: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);
/// The mode of a directory that is filled before it gets its own: private, and with the sticky bit,
/// by which it is known again ([`Rights::make_dir_in`]).
const NEW_DIR: Mode = Mode::S_IRWXU.union(Mode::S_ISVTX);
/// The bits by which it is known. A directory inherits S_ISGID.
const NEW_DIR_MASK: u32 = 0o1777;

impl Rights {
    /// Opens what has the name in `dir` now, with the flags of open(2) without those that create, and
    /// gives what was opened and with whose rights. No link is followed: `ELOOP`. What others may have
    /// put there (several hard links, not the user's) is opened with the user's rights; after a switch
    /// what lies in procfs is `EACCES`.
    ///
    /// # Errors
    /// Those of openat(2).
    pub fn open_in(
        &self,
        dir: &impl AsFd,
        name: &OsStr,
        flags: OFlag,
    ) -> nix::Result<(File, FileStat, Self)> {
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
        let open = || {
            let fd = openat(dir, name, flags, Mode::empty())?;
            let stat = fstat(&fd)?;
            Ok::<_, Errno>((File::from(fd), stat))
        };
        let (file, stat) = self.act(open)?;
        if self.switched() {
            self.refuse_proc(&file)?;
            return Ok((file, stat, self.clone()));
        }
        let actor = self.actor();
        if !actor.may_switch() || !is_others(dir, &stat, actor)? {
            return Ok((file, stat, self.clone()));
        }
        drop(file);
        let rights = actor.own_rights();
        let (file, stat) = rights.act(open)?;
        rights.refuse_proc(&file)?;
        Ok((file, stat, rights))
    }

    /// Opens the directory `name` of `dir` to read it. No link is followed.
    ///
    /// # Errors
    /// As [`Self::open_in`].
    pub fn enter(&self, dir: &impl AsFd, name: &OsStr) -> nix::Result<(OwnedFd, FileStat)> {
        let fd = self.act(|| openat(dir, name, DIR | OFlag::O_NONBLOCK, Mode::empty()))?;
        self.refuse_proc(&fd)?;
        let stat = fstat(&fd)?;
        Ok((fd, stat))
    }

    /// Creates a file in `dir` that must not exist (`EEXIST`), owned by the user from its first moment.
    ///
    /// # Errors
    /// Those of openat(2).
    pub fn create_in(
        &self,
        dir: &impl AsFd,
        name: &OsStr,
        flags: OFlag,
        mode: u32,
    ) -> nix::Result<File> {
        let fixed = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mode = Mode::from_bits_truncate(mode);
        Ok(self.create(|| openat(dir, name, flags | fixed, mode))?.into())
    }

    /// Makes a directory that must not exist (`EEXIST`) and opens it. It is private to the user until
    /// it gets a mode of its own.
    ///
    /// # Errors
    /// Those of mkdirat(2) and openat(2); `ESTALE` when another directory has the name by then.
    pub fn make_dir_in(&self, dir: &impl AsFd, name: &OsStr) -> nix::Result<OwnedFd> {
        self.create(|| mkdirat(dir, name, NEW_DIR))?;
        let (fd, stat) = match self.enter(dir, name) {
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Err(Errno::ESTALE),
            other => other?,
        };
        let same_mode = stat.st_mode & NEW_DIR_MASK == NEW_DIR.bits();
        match same_mode && stat.st_uid == self.creator() {
            true => Ok(fd),
            false => Err(Errno::ESTALE),
        }
    }

    /// Makes a symbolic link that must not exist (`EEXIST`), owned by the user from its first moment.
    ///
    /// # Errors
    /// Those of symlinkat(2).
    pub fn symlink_in(&self, target: &OsStr, dir: &impl AsFd, name: &OsStr) -> nix::Result<()> {
        self.create(|| symlinkat(target, dir, name))
    }

    /// Makes a FIFO or device that must not exist (`EEXIST`), owned by the user from its first moment.
    ///
    /// # Errors
    /// Those of mknodat(2).
    pub fn node_in(
        &self,
        dir: &impl AsFd,
        name: &OsStr,
        kind: SFlag,
        mode: u32,
        device: u64,
    ) -> nix::Result<()> {
        self.create(|| mknodat(dir, name, kind, Mode::from_bits_truncate(mode), device))
    }

    /// The daemon's rights, under which what is created belongs to another owner: for what a caller who
    /// acts as root wants preserved.
    #[must_use]
    pub fn for_owner(&self, uid: u32, gid: u32) -> Self {
        let (name, home) = (String::new(), PathBuf::from("/"));
        let owner = User { name, uid, gid, home, groups: Vec::new() };
        Actor::new(&owner, FileAccess::Compatible).rights()
    }

    /// Sets the owning group and the times of a link, FIFO or device that was just created in `dir` with
    /// these rights.
    ///
    /// # Errors
    /// Those of the calls; `ESTALE` when something else has the name by then.
    pub fn finish_in(
        &self,
        dir: &impl AsFd,
        name: &OsStr,
        kind: SFlag,
        times: Option<(TimeSpec, TimeSpec)>,
    ) -> nix::Result<()> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = match self.act(|| openat(dir, name, flags, Mode::empty())) {
            Err(Errno::ENOENT) => return Err(Errno::ESTALE),
            other => other?,
        };
        let stat = fstat(&fd)?;
        let same_kind = stat.st_mode & SFlag::S_IFMT.bits() == kind.bits();
        if !same_kind || stat.st_nlink != 1 || stat.st_uid != self.creator() {
            return Err(Errno::ESTALE);
        }
        let (_, gid) = self.actor().owner();
        if stat.st_gid != gid && nix::unistd::geteuid().is_root() {
            self.act(|| path_fd::chown(&fd, None, Some(gid)))?;
        }
        match times {
            Some((accessed, modified)) => self.act(|| path_fd::set_times(&fd, accessed, modified)),
            None => Ok(()),
        }
    }

    /// After a switch, refuses what lies in procfs: the daemon is there as `self`.
    ///
    /// # Errors
    /// `EACCES`, or those of fstatfs(2).
    pub fn refuse_proc(&self, fd: &impl AsFd) -> nix::Result<()> {
        match self.switched() && trust::is_proc(fd)? {
            true => Err(Errno::EACCES),
            false => Ok(()),
        }
    }

    /// Who owns what is created.
    fn creator(&self) -> u32 {
        match self.actor().may_switch() {
            true => self.actor().uid(),
            false => nix::unistd::geteuid().as_raw(),
        }
    }
}
