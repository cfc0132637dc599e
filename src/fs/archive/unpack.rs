//! Unpacking an archive below a directory, and nowhere else.
//!
//! Every entry is made relative to a descriptor of the directory that holds it, which a
//! [confined](Walk::confined) walk from the target has reached: an archive cannot get out by `..`, by an
//! absolute name, or through a link that it made before; nor can somebody who renames directories
//! meanwhile. Absolute names lose their slash, as tar does it. What is in the way of a file is replaced
//! once the new one is whole, and never written through ([`content`]).
//!
//! What is made belongs to the caller from its first moment, and owner, mode, times and attributes are
//! set through descriptors. Owners, set-user-ID and set-group-ID bits and devices come from an archive
//! only for a caller who acts as root and asks for it: whoever made the archive chose them.

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
    fcntl::{OFlag, openat},
    sys::{
        stat::{Mode, SFlag},
        time::TimeSpec,
    },
};
use tar::{Entry, EntryType};
use xattr::FileExt;

use super::{Compression, XATTR};
use crate::{
    blocking::stand_on_path,
    fs::{
        FsError, PathError,
        actor::{Actor, Rights},
        beneath::is_name,
        errno,
        metadata::MAX_TOTAL_BYTES,
        path::{self, PATH_MAX},
        resolve::{Found, Place, Walk, WalkError},
        staged::change_owner,
    },
    guest::users::NO_ID,
    quote,
};

mod content;
mod input;
mod sparse;
mod special;

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
/// How often a directory is looked for again that others make and remove meanwhile.
const MAX_TRIES: usize = 16;

/// What was unpacked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Extracted {
    /// Files, links and directories.
    pub entries: u64,
    /// Their content.
    pub bytes: u64,
}

/// Unpacks an archive into the directory at `path`, made where it is missing, on behalf of `actor`. With
/// `preserve` the modes of existing directories are the archive's, and for a caller who acts as root
/// owners, set-id bits and devices too. Without `compression` the first bytes tell.
///
/// # Errors
/// [`FsError::Escapes`], [`FsError::BadArchive`], [`FsError::Special`], [`FsError::Exists`] where a
/// directory is in the way, [`FsError::Abandoned`] once `stop` is set, or the call that failed. What
/// was unpacked before stays, whole files only.
pub fn extract(
    path: &Path,
    actor: &Actor,
    input: impl Read,
    compression: Option<Compression>,
    preserve: bool,
    stop: &AtomicBool,
) -> Result<Extracted, FsError> {
    let place = Walk::new(actor).make_all().to(path);
    let place = place.map_err(WalkError::of_making_directories)?;
    let (rights, real) = (place.rights().clone(), place.real().to_owned());
    let Some(found) = place.into_found().filter(Found::is_dir) else {
        return Err(FsError::PathIsFile(path::clean(path)));
    };
    let mut input = BufReader::with_capacity(PIECE, input);
    let compression = match compression {
        Some(compression) => compression,
        None => guess(&mut input).map_err(|error| bad(&error))?,
    };
    let done = Extracted::default();
    let mut unpacking = Unpacking {
        path,
        root: found.fd,
        real,
        rights,
        preserve,
        keep_owner: preserve && !actor.may_switch(),
        stop,
        done,
    };
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
    root: OwnedFd,
    /// Its path without links.
    real: PathBuf,
    /// With whose rights it was reached.
    rights: Rights,
    preserve: bool,
    /// Owners, set-id bits and devices are the archive's.
    keep_owner: bool,
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

    /// Finds where an entry is to be, makes the missing directories above, and gives the entry's name.
    fn place(&self, relative: &Path) -> Result<Place, FsError> {
        let place = self.walk().no_follow().make_parents().from(&self.root, &self.real, relative);
        let place = place
            .map_err(|error| error.or_busy(|error| self.failed("mkdir", relative, error.errno)))?;
        match is_name(place.name()) {
            true => Ok(place),
            false => Err(FsError::Escapes(relative.to_owned())),
        }
    }

    fn walk(&self) -> Walk<'_> {
        Walk::new(self.rights.actor()).with_rights_of(&self.rights).confined()
    }

    /// Does something with the rights of a place.
    fn apply<T>(
        &self,
        rights: &Rights,
        relative: &Path,
        work: impl FnOnce() -> Result<T, FsError>,
    ) -> Result<T, FsError> {
        let done = rights.perform(work);
        done.unwrap_or_else(|| Err(self.failed("setfsuid", relative, Errno::EPERM)))
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
        let bits = if self.keep_owner { 0o7777 } else { 0o1777 };
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
                let place = self.place(&relative)?;
                let rights = self.owning(&place, entry)?;
                self.replacing(&relative, &place, "symlink", || {
                    rights.symlink_in(OsStr::from_bytes(&target), &place.dir(), place.name())
                })?;
                self.finish(&rights, &place, SFlag::S_IFLNK, &relative, entry)?;
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
        let failed = |op| move |errno| self.failed(op, relative, errno);
        for _ in 0..MAX_TRIES {
            let place = self.walk().make_parents().from(&self.root, &self.real, relative);
            let place =
                place.map_err(|error| error.or_busy(|error| failed("mkdir")(error.errno)))?;
            let dir = match place.found() {
                // One that was there is somebody's already: `/etc` does not become the caller's because
                // something is unpacked below it.
                Some(found) if found.is_dir() => {
                    let own = found.stat.st_uid == self.rights.actor().uid();
                    if !self.preserve || !(own || self.keep_owner) {
                        return Ok(());
                    }
                    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
                    let open = || openat(&found.fd, ".", flags, Mode::empty());
                    place.rights().act(open).map_err(failed("open"))?
                }
                Some(_) => return Err(failed("mkdir")(Errno::ENOTDIR)),
                None => match place.rights().make_dir_in(&place.dir(), place.name()) {
                    // Somebody else was faster.
                    Err(Errno::EEXIST) => continue,
                    made => made.map_err(failed("mkdir"))?,
                },
            };
            let (dir, rights) = (File::from(dir), place.rights());
            return self.apply(rights, relative, || {
                change_owner(&dir, &self.path.join(relative), self.owner_of(entry)?)?;
                self.attributes(&dir, relative, entry)?;
                // Without root, what comes below could not be written.
                let root = nix::unistd::geteuid().is_root() && !rights.switched();
                self.set_mode(&dir, relative, if root { mode } else { mode | 0o700 })
            });
        }
        Err(failed("mkdir")(Errno::EBUSY))
    }

    /// Whose an entry shall be.
    ///
    /// # Errors
    /// [`FsError::BadArchive`] for a number that is not an id, which chown(2) would take for "no
    /// change" or the entry would silently get another owner.
    fn owner_of<R: Read>(&self, entry: &Entry<'_, R>) -> Result<(u32, u32), FsError> {
        let own = self.rights.actor().owner();
        if !self.preserve {
            return Ok(own);
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
        let kept = (id("uid", header.uid(), own.0)?, id("gid", header.gid(), own.1)?);
        Ok(if self.keep_owner { kept } else { own })
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
    // The crate of tar reads the last eight bytes of a binary number, also of one below zero.
    let seconds = entry.header().mtime().map(u64::cast_signed);
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
