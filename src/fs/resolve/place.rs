//! Where a walk has ended: a directory's descriptor, a name in it, and what was there.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat},
    sys::stat::{FileStat, Mode, SFlag, fstat, fstatat},
    unistd::{UnlinkatFlags, unlinkat},
};

use super::{Rights, is_others, trust};
use crate::fs::actor::Actor;

/// What the walk found at its end.
#[derive(Debug)]
pub struct Found {
    /// `O_PATH`: the very object, whatever has its name by now.
    pub fd: OwnedFd,
    /// What it was.
    pub stat: FileStat,
}

impl Found {
    /// Its type, of `S_IFMT`.
    #[must_use]
    pub fn kind(&self) -> SFlag {
        SFlag::from_bits_truncate(self.stat.st_mode) & SFlag::S_IFMT
    }

    /// Device and inode.
    #[must_use]
    pub fn key(&self) -> (u64, u64) {
        (self.stat.st_dev, self.stat.st_ino)
    }

    /// Whether it is a directory.
    #[must_use]
    pub fn is_dir(&self) -> bool {
        trust::is_dir(&self.stat)
    }

    /// Whether it is a regular file.
    #[must_use]
    pub fn is_file(&self) -> bool {
        self.kind() == SFlag::S_IFREG
    }

    /// Whether it is a symbolic link: only with [`Walk::no_follow`](super::Walk::no_follow).
    #[must_use]
    pub fn is_link(&self) -> bool {
        trust::is_link(&self.stat)
    }
}

/// Where a walk has ended. Every call at this place is made through [`Place::rights`].
#[derive(Debug)]
pub struct Place {
    pub(super) rights: Rights,
    pub(super) dir: OwnedFd,
    pub(super) name: OsString,
    pub(super) found: Option<Found>,
    pub(super) real: PathBuf,
    /// The name is a link of procfs that the kernel has to follow.
    pub(super) magic: bool,
    pub(super) made: usize,
    pub(super) last_made: bool,
}

impl Place {
    /// With whose rights calls at this place are made.
    #[must_use]
    pub fn rights(&self) -> &Rights {
        &self.rights
    }

    /// For whom.
    #[must_use]
    pub fn actor(&self) -> &Actor {
        self.rights.actor()
    }

    /// Whether they are the user's own.
    #[must_use]
    pub fn switched(&self) -> bool {
        self.rights.switched()
    }

    /// The directory in which [`Self::name`] lies (`O_PATH`).
    #[must_use]
    pub fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// The last name; `.` where the path ends at a directory without one (`/`, `a/`, `a/..`): then
    /// [`Self::dir`] is what was found.
    #[must_use]
    pub fn name(&self) -> &OsStr {
        &self.name
    }

    /// Whether the path ends at a directory without a name.
    #[must_use]
    pub fn is_nameless(&self) -> bool {
        self.name == "."
    }

    /// Whether the last name is a link of procfs, whose target the kernel has found: it is no path.
    #[must_use]
    pub fn is_magic(&self) -> bool {
        self.magic
    }

    /// What was there; none if nothing was.
    #[must_use]
    pub fn found(&self) -> Option<&Found> {
        self.found.as_ref()
    }

    /// As [`Self::found`], to keep.
    #[must_use]
    pub fn into_found(self) -> Option<Found> {
        self.found
    }

    /// The place alone, without the descriptor of what was there.
    #[must_use]
    pub fn without_found(self) -> Self {
        Self { found: None, ..self }
    }

    /// The path without links. For messages and for comparing: others may have renamed what is on it.
    #[must_use]
    pub fn real(&self) -> &Path {
        &self.real
    }

    /// How many directories the walk has made.
    #[must_use]
    pub fn made(&self) -> usize {
        self.made
    }

    /// Whether the walk has made the last one.
    #[must_use]
    pub fn last_was_made(&self) -> bool {
        self.last_made
    }

    /// Opens what has the name now, with the flags of open(2) without those that create, and tells
    /// what was opened. No link is followed: `ELOOP`. What others may have put there (several hard
    /// links, not the user's) is opened with the user's rights.
    ///
    /// # Errors
    /// Those of openat(2).
    pub fn open(&self, flags: OFlag) -> nix::Result<(File, FileStat, Rights)> {
        let follow = if self.magic { OFlag::empty() } else { OFlag::O_NOFOLLOW };
        let flags = flags | follow | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
        let open = || {
            let fd = openat(&self.dir, self.name.as_os_str(), flags, Mode::empty())?;
            let stat = fstat(&fd)?;
            Ok::<_, Errno>((File::from(fd), stat))
        };
        let (file, stat) = self.rights.act(open)?;
        if self.switched() {
            // Something else by now, which may be a mount.
            if trust::is_proc(&file)? {
                return Err(Errno::EACCES);
            }
            return Ok((file, stat, self.rights.clone()));
        }
        let actor = self.actor();
        if self.magic || !actor.may_switch() || !is_others(&self.dir, &stat, actor)? {
            return Ok((file, stat, self.rights.clone()));
        }
        drop(file);
        let rights = actor.own_rights();
        let (file, stat) = rights.act(open)?;
        Ok((file, stat, rights))
    }

    /// Creates a file that must not exist (`EEXIST`), owned by the user from its first moment.
    ///
    /// # Errors
    /// Those of openat(2).
    pub fn create_new(&self, flags: OFlag, mode: u32) -> nix::Result<File> {
        let fixed = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mode = Mode::from_bits_truncate(mode);
        let make = || openat(&self.dir, self.name.as_os_str(), flags | fixed, mode);
        Ok(File::from(self.rights.create(make)?))
    }

    /// What has the name now, a link included.
    ///
    /// # Errors
    /// Those of fstatat(2).
    pub fn stat_now(&self) -> nix::Result<FileStat> {
        let name = self.name.as_os_str();
        self.rights.act(|| fstatat(&self.dir, name, AtFlags::AT_SYMLINK_NOFOLLOW))
    }

    /// Removes what has the name now, if it is still the file of this device and inode.
    ///
    /// # Errors
    /// Those of unlinkat(2).
    pub fn unlink_if(&self, key: (u64, u64)) -> nix::Result<()> {
        match self.stat_now() {
            Ok(stat) if (stat.st_dev, stat.st_ino) == key => {}
            Ok(_) | Err(Errno::ENOENT) => return Ok(()),
            Err(errno) => return Err(errno),
        }
        let name = self.name.as_os_str();
        self.rights.act(|| unlinkat(&self.dir, name, UnlinkatFlags::NoRemoveDir))
    }

    /// Waits until the name is on the disk, with those of the `made` new directories above it.
    ///
    /// # Errors
    /// Those of open(2) and fsync(2).
    pub fn sync_names(&self, made: usize) -> io::Result<()> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        // With the daemon's rights: nothing is read, and a user may write where they cannot read.
        let mut at = File::from(openat(&self.dir, ".", flags, Mode::empty())?);
        at.sync_all()?;
        for _ in 0..made {
            at = File::from(openat(&at, "..", flags, Mode::empty())?);
            at.sync_all()?;
        }
        Ok(())
    }
}
