//! A file that has no name yet and gets one as a whole: what atomic replacement is made of.
//!
//! `O_TMPFILE` where the file system has it, so that nothing is left behind whatever happens to the
//! daemon; else a file with a name that is told from others by its beginning, [`PREFIX`], is unlinked on
//! drop, and is [noted](super::leftovers) for the case that the daemon is killed.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag, openat, renameat},
    sys::stat::Mode,
    unistd::{UnlinkatFlags, linkat, unlinkat},
};

use super::{actor::Rights, errno, leftovers::Note};
use crate::sys::rename::rename_new_at;

/// What the names of files that wait for theirs begin with.
pub(super) const PREFIX: &str = ".envd-new-";

/// Whether a name is one that this daemon gives to what has no other yet.
pub(super) fn is_temporary(name: &OsStr) -> bool {
    let Some(rest) = name.as_encoded_bytes().strip_prefix(PREFIX.as_bytes()) else { return false };
    let pid = rest.split(|byte| *byte == b'-').next().and_then(|pid| str::from_utf8(pid).ok());
    pid.is_some_and(|pid| pid.parse() == Ok(std::process::id()))
}

/// The attempts at finding a name that is free.
const MAX_TRIES: usize = 64;

/// The file. It is created, linked, renamed and unlinked with the same [`Rights`].
#[derive(Debug)]
pub(super) struct Unnamed {
    file: File,
    /// Its name until it gets the right one, where it must have one.
    named: Named,
}

/// A name in a directory that is unlinked on drop.
#[derive(Debug)]
struct Named {
    dir: OwnedFd,
    rights: Rights,
    name: Option<(OsString, Note)>,
}

impl Drop for Named {
    fn drop(&mut self) {
        if let Some((name, _note)) = self.name.take()
            && let Err(error) = self
                .rights
                .act(|| unlinkat(&self.dir, name.as_os_str(), UnlinkatFlags::NoRemoveDir))
        {
            tracing::warn!(?name, %error, "could not remove temporary file");
        }
    }
}

impl Unnamed {
    /// A new file that is to have a name in `dir`, with `mode` less the umask, owned by the user.
    pub(super) fn create(dir: BorrowedFd<'_>, rights: &Rights, mode: u32) -> nix::Result<Self> {
        let mode = Mode::from_bits_truncate(mode);
        match unnamed_file(dir, rights, mode) {
            Ok(file) => Self::adopt(file, dir, rights),
            // Not every file system can, and they say it in different ways.
            Err(
                error @ (Errno::ENOSPC
                | Errno::EDQUOT
                | Errno::ENOENT
                | Errno::EACCES
                | Errno::EROFS),
            ) => Err(error),
            Err(_) => Self::create_named(dir, rights, mode),
        }
    }

    fn create_named(dir: BorrowedFd<'_>, rights: &Rights, mode: Mode) -> nix::Result<Self> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        let create = |name: &OsStr| rights.create(|| openat(dir, name, flags, mode));
        let (file, name, note) = with_new_name(dir, rights, create)?;
        let mut new = Self::adopt(File::from(file), dir, rights)?;
        new.named.name = Some((name, note));
        Ok(new)
    }

    /// A file of `dir` that was opened without a name.
    pub(super) fn adopt(file: File, dir: BorrowedFd<'_>, rights: &Rights) -> nix::Result<Self> {
        let dir = dir.try_clone_to_owned().map_err(|error| errno::of(&error))?;
        Ok(Self { file, named: Named { dir, rights: rights.clone(), name: None } })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// The file, for good.
    pub(super) fn into_file(self) -> File {
        self.file
    }

    /// Gives it the name `to` in `dir`, which must be free: `EEXIST`.
    pub(super) fn publish(
        &mut self,
        dir: BorrowedFd<'_>,
        rights: &Rights,
        to: &OsStr,
    ) -> nix::Result<()> {
        let Some((name, _)) = &self.named.name else {
            return rights.act(|| link(&self.file, dir, to));
        };
        let from = self.named.dir.as_fd();
        self.named.rights.both(rights).act(|| rename_new_at(from, name, dir, to))?;
        self.named.name = None;
        Ok(())
    }

    /// Gives it the name `to` in `dir`, whatever file has that name now.
    pub(super) fn replace(
        &mut self,
        dir: BorrowedFd<'_>,
        rights: &Rights,
        to: &OsStr,
    ) -> nix::Result<()> {
        if self.named.name.is_none() {
            let link = |name: &OsStr| rights.act(|| link(&self.file, dir, name));
            let ((), name, note) = with_new_name(dir, rights, link)?;
            self.named.name = Some((name, note));
            self.named.dir = dir.try_clone_to_owned().map_err(|error| errno::of(&error))?;
            self.named.rights = rights.clone();
        }
        if let Some((name, _)) = &self.named.name {
            let from = self.named.dir.as_fd();
            let rights = self.named.rights.both(rights);
            rights.act(|| renameat(from, name.as_os_str(), dir, to))?;
            self.named.name = None;
        }
        Ok(())
    }
}

/// A file of the user's without a name in `dir`.
pub(super) fn unnamed_file(dir: BorrowedFd<'_>, rights: &Rights, mode: Mode) -> nix::Result<File> {
    // Without root's capabilities a thread can give a file a name only through /proc.
    let able = nix::unistd::geteuid().is_root() && !rights.switched();
    if !able && !Path::new("/proc/self/fd").exists() {
        return Err(Errno::EOPNOTSUPP);
    }
    let flags = OFlag::O_RDWR | OFlag::O_TMPFILE | OFlag::O_CLOEXEC;
    Ok(File::from(rights.create(|| openat(dir, ".", flags, mode))?))
}

/// Gives a file without a name one.
fn link(file: &File, dir: BorrowedFd<'_>, to: &OsStr) -> nix::Result<()> {
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    match linkat(AT_FDCWD, own.as_str(), dir, to, AtFlags::AT_SYMLINK_FOLLOW) {
        // Without /proc. The kernel lets only root do it this way.
        Err(Errno::ENOENT) => linkat(file.as_fd(), "", dir, to, AtFlags::AT_EMPTY_PATH),
        other => other,
    }
}

/// Makes something in `dir`, with these rights, under a name that nothing has yet there. The note is to be
/// dropped when the thing has another name, or is gone.
pub(super) fn with_new_name<T>(
    dir: BorrowedFd<'_>,
    rights: &Rights,
    mut make: impl FnMut(&OsStr) -> nix::Result<T>,
) -> nix::Result<(T, OsString, Note)> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    for _ in 0..MAX_TRIES {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = OsString::from(format!("{PREFIX}{}-{number}", std::process::id()));
        let note = Note::of(dir, &name, rights);
        match make(&name) {
            Err(Errno::EEXIST) => {}
            other => return other.map(|made| (made, name, note)),
        }
    }
    Err(Errno::EEXIST)
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write};

    use super::*;

    /// Both kinds, one after the other.
    fn each(dir: &File, mut check: impl FnMut(Unnamed)) {
        let rights = Rights::of_daemon();
        check(Unnamed::create(dir.as_fd(), &rights, 0o666).unwrap());
        let mode = Mode::from_bits_truncate(0o666);
        check(Unnamed::create_named(dir.as_fd(), &rights, mode).unwrap());
    }

    #[test]
    fn a_name_is_got_once_and_nothing_else_stays() {
        let tmp = tempfile::tempdir().unwrap();
        let names = || {
            let entries = fs::read_dir(tmp.path()).unwrap();
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>()
        };
        let dir = File::open(tmp.path()).unwrap();
        let (at, rights, name) = (dir.as_fd(), Rights::of_daemon(), OsStr::new("f"));
        each(&dir, drop);
        assert!(names().is_empty());
        let target = tmp.path().join("f");
        each(&dir, |mut new| {
            new.file.write_all(b"new").unwrap();
            new.publish(at, &rights, name).unwrap();
            drop(new);
            assert_eq!((names(), fs::read(&target).unwrap()), (vec!["f".into()], b"new".into()));
            each(&dir, |mut other| {
                assert_eq!(other.publish(at, &rights, name).unwrap_err(), Errno::EEXIST);
                other.file.write_all(b"other").unwrap();
                other.replace(at, &rights, name).unwrap();
                assert_eq!(fs::read(&target).unwrap(), b"other");
            });
            fs::remove_file(&target).unwrap();
        });
        fs::create_dir(&target).unwrap();
        each(&dir, |mut new| {
            new.replace(at, &rights, name).unwrap_err();
        });
        assert_eq!(names(), ["f"]);
    }
}
