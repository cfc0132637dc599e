//! Copying files, links and whole directories.
//!
//! A copy is made apart, beside its destination, and renamed there once all of it is: a copy that
//! fails or is abandoned leaves nothing. Content is shared with the source where the file system
//! can ([`reflink`](crate::sys::reflink)), else copied in the kernel; holes stay holes. A directory is walked over
//! descriptors ([`tree::Walk`](super::tree::Walk)), so nothing outside of it is ever read, whatever is
//! renamed meanwhile.
//!
//! Source and destination are resolved with the caller's rights ([`resolve`]). What is
//! made belongs to the caller from its first moment; owner, mode, times and attributes are set through
//! descriptors only. Set-user-ID and set-group-ID bits, capabilities, owners and devices are kept only
//! for a caller who acts as root and asks for it ([`CopyOptions::preserve`]): whoever owns a file can
//! change its content, also while it is copied.

use std::{
    ffi::OsStr,
    fs::{File, Permissions},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, openat, readlinkat},
    sys::{
        stat::{FileStat, Mode, SFlag, fstat, futimens},
        time::TimeSpec,
    },
};
use xattr::FileExt;

use super::{
    CAREFULLY, FsError, PathError,
    actor::{Actor, Rights},
    errno, path,
    resolve::{self, Place},
    staged::change_owner,
    tree::{Found, Step, Walk},
    unnamed::Unnamed,
};
use crate::blocking::stand_on_also;

mod apart;
mod content;

use apart::Apart;
use content::copy_content;

/// What is being done, for messages.
const COPYING: &str = "copying";
/// How to copy.
#[derive(Debug, Clone, Copy, Default)]
pub struct CopyOptions {
    /// Keep times; for a caller who acts as root also owners, set-id bits, devices and all attributes.
    pub preserve: bool,
    /// The destination must not exist.
    pub create_only: bool,
}

/// What was copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Copied {
    /// Files, links and directories.
    pub entries: u64,
    /// Their content.
    pub bytes: u64,
}

/// Copies `src` to `dst` on behalf of `actor`. An existing file at `dst` is replaced, a directory is
/// not.
///
/// # Errors
/// [`FsError::Exists`], [`FsError::IntoItself`], [`FsError::Special`], [`FsError::TooDeep`],
/// [`FsError::Abandoned`] once `stop` is set, or the call that failed. Nothing is left then.
pub fn copy(
    src: &Path,
    dst: &Path,
    actor: &Actor,
    options: CopyOptions,
    stop: &AtomicBool,
) -> Result<Copied, FsError> {
    let (src, dst) = (path::without_trailing_slashes(src), path::without_trailing_slashes(dst));
    let from = resolve::Walk::new(actor).no_follow().to(src);
    let from = from.map_err(|e| e.or_busy(|e| failed_at("lstat", src, e.errno)))?;
    let there = from.found().ok_or_else(|| failed_at("lstat", src, Errno::ENOENT))?;
    if there.is_dir() && is_inside(actor, dst, from.real()) {
        return Err(FsError::IntoItself(src.to_owned(), dst.to_owned()));
    }
    let to = resolve::Walk::new(actor).no_follow().make_parents().to(dst);
    let to = to.map_err(|error| match error.at_last {
        true => error.or_busy(|error| failed_at("lstat", dst, error.errno)),
        false => error.of_making_directories(),
    })?;
    let only_new = options.create_only || there.is_dir();
    if to.found().is_some_and(|old| only_new || old.is_dir()) {
        return Err(FsError::Exists(dst.to_owned()));
    }
    let mut copying = Copying {
        rights: from.rights().clone(),
        to: to.rights().clone(),
        keep_owner: options.preserve && !actor.may_switch(),
        keep_times: options.preserve,
        create_only: options.create_only,
        stop,
        src,
        copied: Copied::default(),
    };
    let top = Found { name: from.name().to_owned(), relative: PathBuf::new(), stat: there.stat };
    let apart = match there.kind() {
        SFlag::S_IFREG => {
            copying.file(&from, &top, &to, dst)?;
            return Ok(copying.copied);
        }
        SFlag::S_IFDIR => copying.directory_apart(&from, &top, &to, dst)?,
        _ => {
            copying.check_kind(&top)?;
            let made = Apart::create(&to, |name| copying.make(&there.fd, &top, &to.dir(), name));
            made.map_err(|errno| failed_at("create", dst, errno))?
        }
    };
    apart.publish(only_new).map_err(|errno| match errno {
        Errno::EEXIST => FsError::Exists(dst.to_owned()),
        errno => failed_at("rename", dst, errno),
    })?;
    Ok(copying.copied)
}

fn failed_at(op: &'static str, path: &Path, errno: Errno) -> FsError {
    FsError::Doing { doing: COPYING, error: PathError::new(op, path, errno) }
}

/// Whether `path`, as far as it exists, lies in the directory `dir`, a path without links.
fn is_inside(actor: &Actor, path: &Path, dir: &Path) -> bool {
    let above = path::dir_of(path);
    let mut existing = above.ancestors().filter_map(|path| {
        let place = resolve::Walk::new(actor).to(path).ok()?;
        place.found().is_some().then(|| place.real().to_owned())
    });
    existing.next().is_some_and(|path| path.starts_with(dir))
}

struct Copying<'a> {
    /// With whose rights the source is read.
    rights: Rights,
    /// With whose rights the copy is made.
    to: Rights,
    /// Owners, set-id bits, devices and all attributes are kept.
    keep_owner: bool,
    keep_times: bool,
    create_only: bool,
    stop: &'a AtomicBool,
    /// The source, for messages.
    src: &'a Path,
    copied: Copied,
}

impl Copying<'_> {
    fn failed(&self, op: &'static str, found: &Found, error: &io::Error) -> FsError {
        let path = match found.relative.as_os_str().is_empty() {
            true => self.src.to_owned(),
            false => self.src.join(&found.relative),
        };
        failed_at(op, &path, errno::of(error))
    }

    fn check(&self) -> Result<(), FsError> {
        match self.stop.load(Ordering::Relaxed) {
            true => Err(FsError::Abandoned(self.src.to_owned())),
            false => Ok(()),
        }
    }

    /// Copies one file beside the destination, and gives it that name.
    fn file(&mut self, from: &Place, found: &Found, to: &Place, dst: &Path) -> Result<(), FsError> {
        let opened = from.open(OFlag::O_RDONLY | OFlag::from_bits_truncate(CAREFULLY));
        let (old, stat, _) = opened.map_err(|errno| self.failed("open", found, &errno.into()))?;
        let (dir, rights, name) = (to.dir(), to.rights(), to.name());
        let new = Unnamed::create(dir, rights, 0o600);
        let mut new = new.map_err(|errno| failed_at("create", dst, errno))?;
        self.content(&old, &stat, found, new.file())?;
        let moved = match self.create_only {
            true => new.publish(dir, rights, name),
            false => new.replace(dir, rights, name),
        };
        moved.map_err(|errno| match errno {
            Errno::EEXIST => FsError::Exists(dst.to_owned()),
            errno => failed_at("rename", dst, errno),
        })
    }

    /// Copies a directory, with all that is in it, beside the destination.
    fn directory_apart<'t>(
        &mut self,
        from: &Place,
        top: &Found,
        to: &'t Place,
        dst: &Path,
    ) -> Result<Apart<'t>, FsError> {
        let opened = from.open(OFlag::O_RDONLY | OFlag::O_DIRECTORY);
        let (old, stat, _) = opened.map_err(|errno| self.failed("open", top, &errno.into()))?;
        let top = Found { name: top.name.clone(), relative: PathBuf::new(), stat };
        let mut new = None;
        let mut apart = Apart::create(to, |name| {
            new = Some(to.rights().make_dir_in(&to.dir(), name)?);
            Ok(())
        })
        .map_err(|errno| failed_at("create", dst, errno))?;
        let new = new.ok_or_else(|| failed_at("create", dst, Errno::EEXIST))?;
        let kept = new.try_clone().map_err(|error| self.failed("dup", &top, &error))?;
        apart.holds(kept);
        self.directory(&top, old.into(), new)?;
        Ok(apart)
    }

    /// Fills the new directory `to` with what is in `from`.
    fn directory(&mut self, top: &Found, from: OwnedFd, to: OwnedFd) -> Result<(), FsError> {
        let (old, mut into) = (File::from(from), vec![File::from(to)]);
        if let Some(to) = into.last() {
            self.keep_owner_and_attributes(&old, to, &top.stat, top)?;
        }
        let from = OwnedFd::from(old);
        let mut walk = Walk::new(from, self.src, self.rights.clone(), COPYING)?;
        while let Some(step) = walk.next()? {
            self.check()?;
            let (Some(from), Some(to)) = (walk.dir(), into.last()) else {
                break;
            };
            stand_on_also(to.as_fd())?;
            match step {
                Step::Enter(found) => {
                    let made = self.to.make_dir_in(to, &found.name);
                    let made = made.map_err(|error| self.failed("mkdir", &found, &error.into()))?;
                    let (old, made) = (from.try_clone_to_owned(), File::from(made));
                    let old = old.map_err(|error| self.failed("dup", &found, &error))?;
                    let old = File::from(old);
                    self.keep_owner_and_attributes(&old, &made, &found.stat, &found)?;
                    into.push(made);
                }
                Step::Leaf(found) => self.leaf(from, &found, to)?,
                Step::Leave(found) => {
                    if let Some(made) = into.pop() {
                        self.keep_mode_and_times(&made, &found.stat, &found)?;
                    }
                }
            }
        }
        if let Some(made) = into.pop() {
            self.keep_mode_and_times(&made, &top.stat, top)?;
        }
        Ok(())
    }

    fn leaf(&mut self, from: BorrowedFd<'_>, found: &Found, to: &File) -> Result<(), FsError> {
        match found.kind() {
            SFlag::S_IFREG => {
                let flags = OFlag::O_RDONLY | OFlag::from_bits_truncate(CAREFULLY);
                let opened = self.rights.open_in(&from, &found.name, flags);
                let (old, stat, _) =
                    opened.map_err(|error| self.failed("open", found, &error.into()))?;
                let new = self.to.create_in(to, &found.name, OFlag::O_RDWR, 0o600);
                let new = new.map_err(|error| self.failed("create", found, &error.into()))?;
                self.content(&old, &stat, found, &new)
            }
            // Of nobody who listens there is nothing to copy.
            SFlag::S_IFSOCK => Ok(()),
            _ => {
                self.check_kind(found)?;
                let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let name = found.name.as_os_str();
                let old = self.rights.act(|| openat(from, name, flags, Mode::empty()));
                let made = old.and_then(|old| self.make(&old, found, to, name));
                made.map_err(|error| self.failed("create", found, &error.into()))
            }
        }
    }

    /// Refuses what is not copied.
    fn check_kind(&self, found: &Found) -> Result<(), FsError> {
        let kind = found.kind();
        let device = kind == SFlag::S_IFCHR || kind == SFlag::S_IFBLK;
        match kind == SFlag::S_IFSOCK || (device && !self.keep_owner) {
            true => Err(FsError::Special(self.src.join(&found.relative))),
            false => Ok(()),
        }
    }

    /// Makes a link, FIFO or device as `old` is, of the sort that was found.
    fn make(
        &mut self,
        old: &OwnedFd,
        found: &Found,
        to: &impl AsFd,
        name: &OsStr,
    ) -> nix::Result<()> {
        let (kind, stat) = (found.kind(), fstat(old)?);
        if stat.st_mode & SFlag::S_IFMT.bits() != kind.bits() {
            return Err(Errno::ESTALE);
        }
        let rights = match self.keep_owner {
            true => self.to.for_owner(stat.st_uid, stat.st_gid),
            false => self.to.clone(),
        };
        if kind == SFlag::S_IFLNK {
            rights.symlink_in(&readlinkat(old, "")?, to, name)?;
        } else {
            let mode = stat.st_mode & self.mode_bits();
            rights.node_in(to, name, kind, mode, stat.st_rdev)?;
        }
        let times = self.keep_times.then(|| times(&stat));
        rights.finish_in(to, name, kind, times)?;
        self.copied.entries += 1;
        Ok(())
    }

    /// Copies the content of a regular file, and all else that it has.
    fn content(
        &mut self,
        old: &File,
        stat: &FileStat,
        found: &Found,
        new: &File,
    ) -> Result<(), FsError> {
        if stat.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
            return Err(FsError::NotRegular(self.src.join(&found.relative)));
        }
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        stand_on_also(new.as_fd())?;
        self.copied.bytes += copy_content(old, new, size, || self.check().is_err())
            .map_err(|error| self.failed("copy", found, &error))?;
        self.check()?;
        self.keep_owner_and_attributes(old, new, stat, found)?;
        self.keep_mode_and_times(new, stat, found)
    }

    /// Does something to the copy with the rights with which it is made.
    fn apply<T>(
        &self,
        found: &Found,
        work: impl FnOnce() -> Result<T, FsError>,
    ) -> Result<T, FsError> {
        let done = self.to.perform(work);
        done.unwrap_or_else(|| Err(self.failed("setfsuid", found, &Errno::EPERM.into())))
    }

    /// The owner, and then the attributes of the descriptor `old`: a new owner takes capabilities away.
    fn keep_owner_and_attributes(
        &self,
        old: &File,
        new: &File,
        stat: &FileStat,
        found: &Found,
    ) -> Result<(), FsError> {
        let path = self.src.join(&found.relative);
        self.apply(found, || {
            change_owner(new, &path, self.owner_of(stat))?;
            self.keep_attributes(old, new, found)
        })
    }

    /// Mode and times, last: a mode may forbid attributes to all but root, and a new owner takes set-id
    /// bits away.
    fn keep_mode_and_times(
        &mut self,
        new: &File,
        stat: &FileStat,
        found: &Found,
    ) -> Result<(), FsError> {
        self.apply(found, || {
            let mode = Permissions::from_mode(stat.st_mode & self.mode_bits());
            new.set_permissions(mode).map_err(|error| self.failed("chmod", found, &error))?;
            if self.keep_times {
                let (accessed, modified) = times(stat);
                futimens(new, &accessed, &modified)
                    .map_err(|error| self.failed("utimes", found, &error.into()))?;
            }
            Ok(())
        })?;
        self.copied.entries += 1;
        Ok(())
    }

    fn keep_attributes(&self, from: &File, to: &File, found: &Found) -> Result<(), FsError> {
        let Ok(names) = from.list_xattr() else {
            return Ok(());
        };
        for name in names {
            let bytes = name.as_encoded_bytes();
            let common = bytes.starts_with(b"user.") || bytes.starts_with(b"system.posix_acl_");
            if !common && !self.keep_owner {
                continue;
            }
            let Ok(Some(value)) = from.get_xattr(&name) else {
                continue;
            };
            match to.set_xattr(&name, &value) {
                // The other file system has none, or none of this kind.
                Err(error)
                    if matches!(
                        errno::of(&error),
                        Errno::EOPNOTSUPP | Errno::EPERM | Errno::EACCES
                    ) => {}
                other => other.map_err(|error| self.failed("setxattr", found, &error))?,
            }
        }
        Ok(())
    }

    fn owner_of(&self, stat: &FileStat) -> (u32, u32) {
        match self.keep_owner {
            true => (stat.st_uid, stat.st_gid),
            false => self.to.actor().owner(),
        }
    }

    /// Whose setuid program a copy is would change, so those bits go with the owner only.
    fn mode_bits(&self) -> u32 {
        if self.keep_owner { 0o7777 } else { 0o1777 }
    }
}

fn times(stat: &FileStat) -> (TimeSpec, TimeSpec) {
    (
        TimeSpec::new(stat.st_atime, stat.st_atime_nsec),
        TimeSpec::new(stat.st_mtime, stat.st_mtime_nsec),
    )
}
