//! Copying files, links and whole directories.
//!
//! A copy is made apart, beside its destination, and renamed there once all of it is: a copy that
//! fails or is abandoned leaves nothing. Content is shared with the source where the file system
//! can ([`reflink`](crate::sys::reflink)), else copied in the kernel; holes stay holes. A directory is walked over
//! descriptors ([`Walk`]), so nothing outside of it is ever read, whatever is renamed meanwhile.

use std::{
    ffi::OsStr,
    fs::{self, File, Permissions},
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
        stat::{FileStat, Mode, SFlag, UtimensatFlags, futimens, mkdirat, mknodat, utimensat},
        time::TimeSpec,
    },
    unistd::symlinkat,
};
use xattr::FileExt;

use super::{
    CAREFULLY, FsError, PathError,
    actor::Rights,
    beneath::own,
    errno, path,
    remove::remove_at,
    staged::{change_owner, doing},
    tree::{Found, Step, Walk},
    unnamed::{Unnamed, with_new_name},
};
use crate::{blocking::stand_on_also, guest::users::User, sys::rename::rename_new};

mod content;

use content::copy_content;

/// What is being done, for messages.
const COPYING: &str = "copying";
/// How to copy.
#[derive(Debug, Clone, Copy, Default)]
pub struct CopyOptions {
    /// Keep owners, times, setuid bits, devices and all attributes.
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

/// Copies `src` to `dst` for `user`. An existing file at `dst` is replaced, a directory is not.
///
/// # Errors
/// [`FsError::Exists`], [`FsError::IntoItself`], [`FsError::Special`], [`FsError::TooDeep`],
/// [`FsError::Abandoned`] once `stop` is set, or the call that failed. Nothing is left then.
pub fn copy(
    src: &Path,
    dst: &Path,
    user: &User,
    options: CopyOptions,
    stop: &AtomicBool,
) -> Result<Copied, FsError> {
    let (src, dst) = (path::without_trailing_slashes(src), path::without_trailing_slashes(dst));
    let failed = |path: &Path, op, error: &io::Error| doing(COPYING, path, op, error);
    let meta = fs::symlink_metadata(src).map_err(|error| failed(src, "lstat", &error))?;
    let above = path::dir_of(dst);
    if meta.is_dir() && is_inside(&above, src) {
        return Err(FsError::IntoItself(src.to_owned(), dst.to_owned()));
    }
    path::ensure_dirs(&above, (user.uid, user.gid))?;
    match fs::symlink_metadata(dst) {
        Ok(there) if options.create_only || there.is_dir() || meta.is_dir() => {
            return Err(FsError::Exists(dst.to_owned()));
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(dst, "lstat", &error)),
    }
    let owner = (user.uid, user.gid);
    let mut copying = Copying { owner, options, stop, src, copied: Copied::default() };
    let parent = nix::fcntl::open(
        &path::dir_of(src),
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    );
    let parent = parent.map_err(|errno| failed(src, "open", &errno.into()))?;
    let found = Found {
        name: path::base_name(src).to_owned(),
        relative: PathBuf::new(),
        stat: nix::sys::stat::lstat(src).map_err(|errno| failed(src, "lstat", &errno.into()))?,
    };
    if found.kind() == SFlag::S_IFREG {
        copying.file_apart(&parent, &found, dst)?;
        return Ok(copying.copied);
    }
    let apart = Apart::new(&above, dst, |path| {
        let (dir, name) = (path::dir_of(path), path::base_name(path).to_owned());
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let dir = nix::fcntl::open(&dir, flags, Mode::empty())?;
        match found.kind() {
            SFlag::S_IFDIR => mkdirat(&dir, name.as_os_str(), Mode::S_IRWXU)?,
            _ => copying.make(&parent, &found, &dir, &name).map_err(|error| match error {
                FsError::Doing { error, .. } => io::Error::from(error.errno),
                other => io::Error::other(other.to_string()),
            })?,
        }
        Ok(())
    });
    let apart = match apart {
        Ok(apart) => apart,
        Err(_) if is_refused(found.kind(), options) => {
            return Err(FsError::Special(src.to_owned()));
        }
        Err(error) => return Err(failed(dst, "create", &error)),
    };
    if found.kind() == SFlag::S_IFDIR {
        copying.directory(&found, &parent, &apart.path)?;
    }
    apart.publish(options.create_only || meta.is_dir())?;
    Ok(copying.copied)
}

/// Whether `path`, as far as it exists, lies in the directory `dir` or is it.
fn is_inside(path: &Path, dir: &Path) -> bool {
    let Ok(dir) = fs::canonicalize(dir) else {
        return false;
    };
    let mut existing = path.ancestors().filter_map(|path| fs::canonicalize(path).ok());
    existing.next().is_some_and(|path| path.starts_with(dir))
}

fn is_refused(kind: SFlag, options: CopyOptions) -> bool {
    let device = kind == SFlag::S_IFCHR || kind == SFlag::S_IFBLK;
    kind == SFlag::S_IFSOCK || (device && !options.preserve)
}

/// Something under a name of its own, which is removed unless it gets the right one.
struct Apart<'a> {
    path: PathBuf,
    to: &'a Path,
    done: bool,
}

impl<'a> Apart<'a> {
    fn new(
        dir: &Path,
        to: &'a Path,
        mut make: impl FnMut(&Path) -> io::Result<()>,
    ) -> io::Result<Self> {
        let made = |name: &OsStr| make(&dir.join(name)).map_err(|error| errno::of(&error));
        let ((), name) = with_new_name(made)?;
        Ok(Self { path: dir.join(name), to, done: false })
    }

    fn publish(mut self, only_new: bool) -> Result<(), FsError> {
        let moved = match only_new {
            true => rename_new(&self.path, self.to).map_err(io::Error::from),
            false => fs::rename(&self.path, self.to),
        };
        match moved {
            Ok(()) => self.done = true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(FsError::Exists(self.to.to_owned()));
            }
            Err(error) => return Err(doing(COPYING, self.to, "rename", &error)),
        }
        Ok(())
    }
}

impl Drop for Apart<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let above = path::dir_of(&self.path);
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let removed = nix::fcntl::open(&above, flags, Mode::empty())
            .map_err(|errno| PathError::new("open", &above, errno))
            .and_then(|dir| remove_at(dir, &above, path::base_name(&self.path)));
        if let Err(error) = removed {
            tracing::warn!(path = %self.path.display(), %error, "half a copy stays");
        }
    }
}

struct Copying<'a> {
    owner: (u32, u32),
    options: CopyOptions,
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
        FsError::Doing { doing: COPYING, error: PathError::new(op, &path, errno::of(error)) }
    }

    fn check(&self) -> Result<(), FsError> {
        match self.stop.load(Ordering::Relaxed) {
            true => Err(FsError::Abandoned(self.src.to_owned())),
            false => Ok(()),
        }
    }

    /// Copies one file beside `dst` and gives it that name.
    fn file_apart(&mut self, dir: &OwnedFd, found: &Found, dst: &Path) -> Result<(), FsError> {
        let failed = |error: Errno| doing(COPYING, dst, "create", &error.into());
        let rights = Rights::of_daemon();
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let above = nix::fcntl::open(&path::dir_of(dst), flags, Mode::empty()).map_err(failed)?;
        let mut new = Unnamed::create(above.as_fd(), &rights, 0o600).map_err(failed)?;
        self.content(dir.as_fd(), found, new.file())?;
        let name = path::base_name(dst);
        let moved = match self.options.create_only {
            true => new.publish(above.as_fd(), &rights, name),
            false => new.replace(above.as_fd(), &rights, name),
        };
        moved.map_err(|error| match error {
            Errno::EEXIST => FsError::Exists(dst.to_owned()),
            _ => doing(COPYING, dst, "rename", &error.into()),
        })
    }

    /// Fills the new directory at `to` with what is in the one that was found.
    fn directory(&mut self, top: &Found, parent: &OwnedFd, to: &Path) -> Result<(), FsError> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let io = |error: Errno| io::Error::from(error);
        let from = openat(parent, top.name.as_os_str(), flags, Mode::empty())
            .map_err(|error| self.failed("open", top, &io(error)))?;
        let to = nix::fcntl::open(to, flags, Mode::empty())
            .map_err(|error| self.failed("open", top, &io(error)))?;
        self.keep_attributes(from.as_fd(), to.as_fd(), top)?;
        let mut walk = Walk::new(from, self.src, COPYING)?;
        let mut into = vec![to];
        while let Some(step) = walk.next()? {
            self.check()?;
            let (Some(from), Some(to)) = (walk.dir(), into.last()) else {
                break;
            };
            stand_on_also(to.as_fd())?;
            match step {
                Step::Enter(found) => {
                    let name = found.name.as_os_str();
                    let made = mkdirat(to, name, Mode::S_IRWXU)
                        .and_then(|()| openat(to, name, flags, Mode::empty()))
                        .map_err(|error| self.failed("mkdir", &found, &io(error)))?;
                    self.keep_attributes(from, made.as_fd(), &found)?;
                    into.push(made);
                }
                Step::Leaf(found) => self.leaf(from, &found, to)?,
                Step::Leave(found) => {
                    if let Some(made) = into.pop() {
                        self.dress(&File::from(made), &found)?;
                    }
                }
            }
        }
        if let Some(made) = into.pop() {
            self.dress(&File::from(made), top)?;
        }
        Ok(())
    }

    fn leaf(&mut self, from: BorrowedFd<'_>, found: &Found, to: &OwnedFd) -> Result<(), FsError> {
        match found.kind() {
            SFlag::S_IFREG => {
                let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDWR | OFlag::O_CLOEXEC;
                let mode = Mode::S_IRUSR | Mode::S_IWUSR;
                let new = openat(to, found.name.as_os_str(), flags, mode)
                    .map_err(|error| self.failed("create", found, &error.into()))?;
                self.content(from, found, &File::from(new))
            }
            // Of nobody who listens there is nothing to copy.
            SFlag::S_IFSOCK => Ok(()),
            _ => self.make(&from, found, to, &found.name),
        }
    }

    /// Makes a link, FIFO or device as the one that was found.
    fn make(
        &mut self,
        from: &impl AsFd,
        found: &Found,
        to: &OwnedFd,
        name: &std::ffi::OsStr,
    ) -> Result<(), FsError> {
        let kind = found.kind();
        if is_refused(kind, self.options) {
            return Err(FsError::Special(self.src.join(&found.relative)));
        }
        let stat = &found.stat;
        let made = if kind == SFlag::S_IFLNK {
            readlinkat(from, found.name.as_os_str())
                .and_then(|target| symlinkat(target.as_os_str(), to, name))
        } else {
            let mode = Mode::from_bits_truncate(stat.st_mode & self.mode_bits());
            mknodat(to, name, kind, mode, stat.st_rdev)
        };
        made.map_err(|error| self.failed("create", found, &error.into()))?;
        own(to, name, kind, self.owner_of(stat))
            .map_err(|error| self.failed("chown", found, &error.into()))?;
        if self.options.preserve {
            let (accessed, modified) = times(stat);
            utimensat(to, name, &accessed, &modified, UtimensatFlags::NoFollowSymlink)
                .map_err(|error| self.failed("utimes", found, &error.into()))?;
        }
        self.copied.entries += 1;
        Ok(())
    }

    /// Copies the content of a regular file, and all else that it has.
    fn content(&mut self, dir: BorrowedFd<'_>, found: &Found, new: &File) -> Result<(), FsError> {
        let flags = OFlag::O_RDONLY
            | OFlag::O_NOFOLLOW
            | OFlag::O_CLOEXEC
            | OFlag::from_bits_truncate(CAREFULLY);
        let old = openat(dir, found.name.as_os_str(), flags, Mode::empty())
            .map_err(|error| self.failed("open", found, &error.into()))?;
        let old = File::from(old);
        let size = match old.metadata() {
            Ok(meta) if meta.is_file() => meta.len(),
            Ok(_) => return Err(FsError::NotRegular(self.src.join(&found.relative))),
            Err(error) => return Err(self.failed("stat", found, &error)),
        };
        stand_on_also(new.as_fd())?;
        self.copied.bytes += copy_content(&old, new, size, || self.check().is_err())
            .map_err(|error| self.failed("copy", found, &error))?;
        self.check()?;
        self.keep_attributes_of(&old, new, found)?;
        self.dress(new, found)
    }

    fn keep_attributes(
        &self,
        from: BorrowedFd<'_>,
        to: BorrowedFd<'_>,
        found: &Found,
    ) -> Result<(), FsError> {
        let file = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map(File::from);
        let failed = |error: io::Error| self.failed("dup", found, &error);
        self.keep_attributes_of(&file(from).map_err(failed)?, &file(to).map_err(failed)?, found)
    }

    fn keep_attributes_of(&self, from: &File, to: &File, found: &Found) -> Result<(), FsError> {
        let Ok(names) = from.list_xattr() else {
            return Ok(());
        };
        for name in names {
            let bytes = name.as_encoded_bytes();
            let common = bytes.starts_with(b"user.") || bytes.starts_with(b"system.posix_acl_");
            if !common && !self.options.preserve {
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

    /// Owner, mode and times of what has its content.
    fn dress(&mut self, new: &File, found: &Found) -> Result<(), FsError> {
        let path = self.src.join(&found.relative);
        change_owner(new, &path, self.owner_of(&found.stat))?;
        let mode = Permissions::from_mode(found.stat.st_mode & self.mode_bits());
        new.set_permissions(mode).map_err(|error| self.failed("chmod", found, &error))?;
        if self.options.preserve {
            let (accessed, modified) = times(&found.stat);
            futimens(new, &accessed, &modified)
                .map_err(|error| self.failed("utimes", found, &error.into()))?;
        }
        self.copied.entries += 1;
        Ok(())
    }

    fn owner_of(&self, stat: &FileStat) -> (u32, u32) {
        match self.options.preserve {
            true => (stat.st_uid, stat.st_gid),
            false => self.owner,
        }
    }

    /// Whose setuid program a copy is would change, so those bits go with the owner only.
    fn mode_bits(&self) -> u32 {
        if self.options.preserve { 0o7777 } else { 0o1777 }
    }
}

fn times(stat: &FileStat) -> (TimeSpec, TimeSpec) {
    (
        TimeSpec::new(stat.st_atime, stat.st_atime_nsec),
        TimeSpec::new(stat.st_mtime, stat.st_mtime_nsec),
    )
}
