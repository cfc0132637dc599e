//! Unpacking an archive below a directory, and nowhere else.
//!
//! Every entry is made relative to a descriptor of the directory that holds it, which was resolved
//! [beneath](Root) the target: an archive cannot get out by `..`, by an absolute name, or through a
//! link that it made before; nor can somebody who renames directories meanwhile. Absolute names lose
//! their slash, as tar does it. What is in the way of a file is replaced once the new one is whole, and
//! never written through ([`content`]).

use std::{
    cell::Cell,
    ffi::{OsStr, OsString},
    fs::{File, Permissions},
    io::{self, BufReader, Read},
    os::{
        fd::OwnedFd,
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::PermissionsExt,
        },
    },
    path::{Component, Path, PathBuf},
    rc::Rc,
    sync::atomic::{AtomicBool, Ordering},
};

use flate2::bufread::MultiGzDecoder;
use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag},
    sys::{
        stat::{Mode, SFlag, UtimensatFlags, makedev, mknodat, utimensat},
        time::TimeSpec,
    },
    unistd::{UnlinkatFlags, linkat, symlinkat, unlinkat},
};
use tar::{Entry, EntryType};
use xattr::FileExt;

use super::{Compression, XATTR};
use crate::{
    blocking::stand_on_path,
    fs::{
        FsError, PathError,
        beneath::{Root, is_name, own},
        errno,
        metadata::MAX_TOTAL_BYTES,
        path::{PATH_MAX, ensure_dirs},
        staged::change_owner,
    },
    guest::users::{NO_ID, User},
    quote,
};

mod content;
mod input;
mod sparse;

use content::PIECE;
use input::{Bounded, Zstd, guess};
use sparse::Sparse;

pub use input::MAX_ZSTD_WINDOW;

/// What is being done, for messages.
const EXTRACTING: &str = "extracting";
/// The most bytes from one entry's content to the next: names and attributes, which are held in
/// memory.
pub const MAX_ENTRY_HEAD: u64 = 1 << 20;
/// The most bytes behind the end of an archive that are looked at: padding and checksums.
const MAX_REST: u64 = 1 << 20;

/// What was unpacked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Extracted {
    /// Files, links and directories.
    pub entries: u64,
    /// Their content.
    pub bytes: u64,
}

/// Unpacks an archive into the directory at `path`, made where it is missing, for `user`. With
/// `preserve` owners and setuid bits are the archive's. Without `compression` the first bytes tell.
///
/// # Errors
/// [`FsError::Escapes`], [`FsError::BadArchive`], [`FsError::Special`], [`FsError::Exists`] where a
/// directory is in the way, [`FsError::Abandoned`] once `stop` is set, or the call that failed. What
/// was unpacked before stays, whole files only.
pub fn extract(
    path: &Path,
    user: &User,
    input: impl Read,
    compression: Option<Compression>,
    preserve: bool,
    stop: &AtomicBool,
) -> Result<Extracted, FsError> {
    let owner = (user.uid, user.gid);
    ensure_dirs(path, owner)?;
    let root = Root::open(path).map_err(|errno| FsError::Doing {
        doing: EXTRACTING,
        error: PathError::new("open", path, errno),
    })?;
    let mut input = BufReader::with_capacity(PIECE, input);
    let compression = match compression {
        Some(compression) => compression,
        None => guess(&mut input).map_err(|error| bad(&error))?,
    };
    let done = Extracted::default();
    let mut unpacking = Unpacking { path, root, owner, preserve, stop, done };
    match compression {
        Compression::None => unpacking.everything(input)?,
        Compression::Gzip => unpacking.everything(MultiGzDecoder::new(input))?,
        Compression::Zstd => unpacking.everything(Zstd::Between(Some(input)))?,
    }
    Ok(unpacking.done)
}

fn bad(error: &io::Error) -> FsError {
    FsError::BadArchive(error.to_string())
}

struct Unpacking<'a> {
    /// The target, for messages.
    path: &'a Path,
    root: Root,
    owner: (u32, u32),
    preserve: bool,
    stop: &'a AtomicBool,
    done: Extracted,
}

impl Unpacking<'_> {
    fn everything(&mut self, input: impl Read) -> Result<(), FsError> {
        let allowance = Rc::new(Cell::new(MAX_ENTRY_HEAD));
        let bounded = Bounded { input, allowance: Rc::clone(&allowance) };
        let mut archive = tar::Archive::new(bounded);
        let mut entries = archive.entries().map_err(|error| bad(&error))?;
        loop {
            self.check()?;
            allowance.set(MAX_ENTRY_HEAD);
            let Some(entry) = entries.next() else { break };
            let mut entry = entry.map_err(|error| bad(&error))?;
            allowance.set(u64::MAX);
            self.entry(&mut entry)?;
            // Whatever it is, what belongs to it does not count for the next.
            let mut piece = [0; 4 << 10];
            while entry.read(&mut piece).map_err(|error| bad(&error))? > 0 {
                self.check()?;
            }
        }
        // A compressed archive tells at its end whether it was whole.
        allowance.set(u64::MAX);
        let rest = archive.into_inner();
        io::copy(&mut rest.take(MAX_REST), &mut io::sink()).map_err(|error| bad(&error))?;
        Ok(())
    }

    fn check(&self) -> Result<(), FsError> {
        match self.stop.load(Ordering::Relaxed) {
            true => Err(FsError::Abandoned(self.path.to_owned())),
            false => Ok(()),
        }
    }

    fn failed(&self, op: &'static str, relative: &Path, errno: Errno) -> FsError {
        if errno == Errno::EXDEV && matches!(op, "open" | "mkdir") {
            return FsError::Escapes(relative.to_owned());
        }
        let error = PathError::new(op, &self.path.join(relative), errno);
        FsError::Doing { doing: EXTRACTING, error }
    }

    /// Opens the directory that holds an entry, for the user where it has to be made.
    fn parent<'p>(&self, relative: &'p Path) -> Result<(OwnedFd, &'p OsStr), FsError> {
        let owner = self.owner;
        let made = |dir: &OwnedFd, name: &OsStr| own(dir, name, SFlag::S_IFDIR, owner);
        let (dir, name) = self
            .root
            .parent_of(relative, made)
            .map_err(|errno| self.failed("open", relative, errno))?;
        match is_name(name) {
            true => Ok((dir, name)),
            false => Err(FsError::Escapes(relative.to_owned())),
        }
    }

    fn entry<R: Read>(&mut self, entry: &mut Entry<'_, R>) -> Result<(), FsError> {
        let kind = entry.header().entry_type();
        if kind.is_pax_global_extensions() {
            return Ok(());
        }
        let sparse = Sparse::of(entry)?;
        let relative = match sparse.as_ref().and_then(|sparse| sparse.name.as_deref()) {
            Some(name) => inside(name)?,
            None => inside(&entry.path_bytes())?,
        };
        if relative.as_os_str().is_empty() {
            // The target itself, `./`.
            return Ok(());
        }
        // A directory on the way may be a mount.
        stand_on_path(&self.path.join(&relative))?;
        let mode = entry.header().mode().map_err(|error| bad(&error))?;
        // Before anything of it is made.
        self.owner_of(entry)?;
        let bits = if self.preserve { 0o7777 } else { 0o1777 };
        let mode = mode & bits;
        match kind {
            EntryType::Directory => self.directory(&relative, mode, entry)?,
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                self.file(&relative, mode, sparse, entry)?;
            }
            EntryType::Link => self.hard_link(&relative, entry)?,
            EntryType::Symlink => {
                let target = entry.link_name_bytes().unwrap_or_default().into_owned();
                if target.is_empty() || target.contains(&0) || target.len() >= PATH_MAX {
                    let shown = relative.display();
                    return Err(FsError::BadArchive(format!("link {shown} has no target")));
                }
                let (dir, name) = self.parent(&relative)?;
                self.replacing(&relative, &dir, name, "symlink", || {
                    symlinkat(OsStr::from_bytes(&target), &dir, name)
                })?;
                self.dress(&dir, name, SFlag::S_IFLNK, &relative, entry)?;
            }
            EntryType::Fifo | EntryType::Char | EntryType::Block => {
                self.node(kind, &relative, mode, entry)?;
            }
            other => {
                let shown = relative.display();
                let why = format!("entry {shown} is of an unknown type, {:?}", other.as_byte());
                return Err(FsError::BadArchive(why));
            }
        }
        self.done.entries += 1;
        Ok(())
    }

    fn directory<R: Read>(
        &self,
        relative: &Path,
        mode: u32,
        entry: &mut Entry<'_, R>,
    ) -> Result<(), FsError> {
        let owner = self.owner;
        let mut new = false;
        let mut made = |dir: &OwnedFd, name: &OsStr| {
            new = Some(name) == relative.file_name();
            own(dir, name, SFlag::S_IFDIR, owner)
        };
        self.root
            .make_dirs(relative, &mut made)
            .map_err(|errno| self.failed("mkdir", relative, errno))?;
        // One that was there is somebody's already: `/etc` does not become the caller's because
        // something is unpacked below it.
        if !new && !self.preserve {
            return Ok(());
        }
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let dir = self.root.open_at(relative, flags, Mode::empty());
        let dir = File::from(dir.map_err(|errno| self.failed("open", relative, errno))?);
        change_owner(&dir, &self.path.join(relative), self.owner_of(entry)?)?;
        self.attributes(&dir, relative, entry)?;
        // Without root, what comes below could not be written.
        let mode = if nix::unistd::geteuid().is_root() { mode } else { mode | 0o700 };
        self.set_mode(&dir, relative, mode)
    }

    fn hard_link<R: Read>(&self, relative: &Path, entry: &mut Entry<'_, R>) -> Result<(), FsError> {
        let target = inside(&entry.link_name_bytes().unwrap_or_default())?;
        let (from, old) = self.parent(&target)?;
        let (dir, name) = self.parent(relative)?;
        if target == relative {
            return Ok(());
        }
        self.replacing(relative, &dir, name, "link", || {
            linkat(&from, old, &dir, name, AtFlags::empty())
        })
    }

    fn node<R: Read>(
        &self,
        kind: EntryType,
        relative: &Path,
        mode: u32,
        entry: &mut Entry<'_, R>,
    ) -> Result<(), FsError> {
        let node = match kind {
            EntryType::Fifo => SFlag::S_IFIFO,
            _ if !self.preserve => return Err(FsError::Special(relative.to_owned())),
            EntryType::Char => SFlag::S_IFCHR,
            _ => SFlag::S_IFBLK,
        };
        let number = |number: io::Result<Option<u32>>| {
            number.map(|number| number.unwrap_or(0).into()).map_err(|error| bad(&error))
        };
        let header = entry.header();
        let device = match node {
            SFlag::S_IFIFO => 0,
            _ => makedev(number(header.device_major())?, number(header.device_minor())?),
        };
        let (dir, name) = self.parent(relative)?;
        let mode = Mode::from_bits_truncate(mode);
        self.replacing(relative, &dir, name, "mknod", || mknodat(&dir, name, node, mode, device))?;
        self.dress(&dir, name, node, relative, entry)
    }

    /// Makes something that must not exist yet, in the place of what does.
    fn replacing<T>(
        &self,
        relative: &Path,
        dir: &OwnedFd,
        name: &OsStr,
        op: &'static str,
        make: impl Fn() -> nix::Result<T>,
    ) -> Result<T, FsError> {
        match make() {
            Err(Errno::EEXIST) => {}
            other => return other.map_err(|errno| self.failed(op, relative, errno)),
        }
        match unlinkat(dir, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(Errno::EISDIR) => return Err(FsError::Exists(self.path.join(relative))),
            Err(errno) => return Err(self.failed("unlink", relative, errno)),
        }
        make().map_err(|errno| self.failed(op, relative, errno))
    }

    /// Owner and time of what is no file or directory.
    fn dress<R: Read>(
        &self,
        dir: &OwnedFd,
        name: &OsStr,
        kind: SFlag,
        relative: &Path,
        entry: &Entry<'_, R>,
    ) -> Result<(), FsError> {
        own(dir, name, kind, self.owner_of(entry)?)
            .map_err(|errno| self.failed("chown", relative, errno))?;
        let modified = mtime(entry);
        utimensat(dir, name, &modified, &modified, UtimensatFlags::NoFollowSymlink)
            .map_err(|errno| self.failed("utimes", relative, errno))
    }

    /// Whose an entry shall be.
    ///
    /// # Errors
    /// [`FsError::BadArchive`] for a number that is not an id, which chown(2) would take for "no
    /// change" or the entry would silently get another owner.
    fn owner_of<R: Read>(&self, entry: &Entry<'_, R>) -> Result<(u32, u32), FsError> {
        if !self.preserve {
            return Ok(self.owner);
        }
        let id = |field, number: io::Result<u64>, own| {
            // Some tools leave the field empty.
            let Ok(number) = number else { return Ok(own) };
            u32::try_from(number).ok().filter(|id| *id != NO_ID).ok_or_else(|| {
                let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
                FsError::BadArchive(format!(
                    "{}: {field} {number} is not an id",
                    quote::text(&name)
                ))
            })
        };
        let header = entry.header();
        Ok((id("uid", header.uid(), self.owner.0)?, id("gid", header.gid(), self.owner.1)?))
    }

    fn set_mode(&self, file: &File, relative: &Path, mode: u32) -> Result<(), FsError> {
        file.set_permissions(Permissions::from_mode(mode))
            .map_err(|error| self.failed("chmod", relative, errno::of(&error)))
    }

    /// The attributes `user.*` that the archive has for an entry. Where the file system has none
    /// they are lost.
    fn attributes<R: Read>(
        &self,
        file: &File,
        relative: &Path,
        entry: &mut Entry<'_, R>,
    ) -> Result<(), FsError> {
        let Some(extensions) = entry.pax_extensions().map_err(|error| bad(&error))? else {
            return Ok(());
        };
        for extension in extensions {
            let extension = extension.map_err(|error| bad(&error))?;
            let name = extension.key().ok().and_then(|key| key.strip_prefix(XATTR));
            let value = extension.value_bytes();
            let Some(name) = name.filter(|name| name.starts_with("user.")) else {
                continue;
            };
            if value.len() > MAX_TOTAL_BYTES {
                let why = format!("attribute {name} of {} is too long", relative.display());
                return Err(FsError::BadArchive(why));
            }
            match file.set_xattr(name, value) {
                Err(error) if errno::of(&error) == Errno::EOPNOTSUPP => {}
                other => {
                    other.map_err(|error| self.failed("setxattr", relative, errno::of(&error)))?;
                }
            }
        }
        Ok(())
    }
}

fn mtime<R: Read>(entry: &Entry<'_, R>) -> TimeSpec {
    let seconds = entry.header().mtime().ok().and_then(|time| i64::try_from(time).ok());
    TimeSpec::new(seconds.unwrap_or(0), 0)
}

/// The path of an entry, relative to the target: without slashes in front, and without `.`.
fn inside(bytes: &[u8]) -> Result<PathBuf, FsError> {
    let path = PathBuf::from(OsString::from_vec(bytes.to_vec()));
    let mut relative = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) if !name.as_bytes().contains(&0) => relative.push(name),
            Component::CurDir | Component::RootDir => {}
            _ => return Err(FsError::Escapes(path)),
        }
    }
    match relative.as_os_str().len() < PATH_MAX {
        true => Ok(relative),
        false => Err(FsError::PathTooLong(relative.to_string_lossy().into_owned())),
    }
}
