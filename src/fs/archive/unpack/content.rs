//! Files of an archive: the content first, and then the name.
//!
//! What is in the way of a file stays until all of the new one is there: that is written beside it
//! and renamed over it. Where nothing is, it is written in place. Either way, what breaks off leaves
//! no half a file.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::MetadataExt,
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, renameat},
    sys::stat::{FileStat, SFlag, fstatat, futimens},
    unistd::{UnlinkatFlags, unlinkat},
};
use tar::{Entry, EntryType};

use super::{Unpacking, bad, mtime, sparse::Sparse};
use crate::fs::{FsError, errno, resolve::Place, staged::change_owner, unnamed::with_new_name};

/// The bytes of content that are written at a time.
pub(super) const PIECE: usize = 64 << 10;

/// A file that is being written, under its name or one beside it. Dropped before [`Self::publish`],
/// it is unlinked.
struct NewFile<'a> {
    file: File,
    /// Where it is to be.
    place: &'a Place,
    /// The one that it has, where something else has the right one.
    beside: Option<OsString>,
    done: bool,
}

impl<'a> NewFile<'a> {
    fn create(place: &'a Place) -> nix::Result<Self> {
        let create = |name: &OsStr| {
            let private = 0o600;
            place.rights().create_in(&place.dir(), name, OFlag::O_WRONLY, private)
        };
        match create(place.name()) {
            Ok(file) => return Ok(Self { file, place, beside: None, done: false }),
            Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno),
        }
        // Told now, and not once all of the content has come.
        if stat_at(place, place.name())
            .is_ok_and(|stat| stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits())
        {
            return Err(Errno::EISDIR);
        }
        let (file, beside) = with_new_name(create)?;
        Ok(Self { file, place, beside: Some(beside), done: false })
    }

    fn publish(mut self) -> nix::Result<()> {
        if let Some(beside) = &self.beside {
            let (dir, name) = (self.place.dir(), self.place.name());
            self.place.rights().act(|| renameat(dir, beside.as_os_str(), dir, name))?;
        }
        self.done = true;
        Ok(())
    }
}

fn stat_at(place: &Place, name: &OsStr) -> nix::Result<FileStat> {
    place.rights().act(|| fstatat(place.dir(), name, AtFlags::AT_SYMLINK_NOFOLLOW))
}

impl Drop for NewFile<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let name = self.beside.as_deref().unwrap_or_else(|| self.place.name());
        // Only what is still ours.
        let ours = self.file.metadata().is_ok_and(|own| {
            stat_at(self.place, name)
                .is_ok_and(|there| (there.st_dev, there.st_ino) == (own.dev(), own.ino()))
        });
        let unlink = || unlinkat(self.place.dir(), name, UnlinkatFlags::NoRemoveDir);
        if ours && let Err(error) = self.place.rights().act(unlink) {
            tracing::warn!(?name, %error, "could not remove an incomplete file");
        }
    }
}

impl Unpacking<'_> {
    pub(super) fn file<R: Read>(
        &mut self,
        relative: &Path,
        mode: u32,
        sparse: Option<Sparse>,
        entry: &mut Entry<'_, R>,
    ) -> Result<(), FsError> {
        let place = self.place(relative)?;
        let new = NewFile::create(&place).map_err(|errno| match errno {
            Errno::EISDIR => FsError::Exists(self.path.join(relative)),
            errno => self.failed("create", relative, errno),
        })?;
        let file = &new.file;
        let bytes = match sparse {
            Some(sparse) => self.mapped(file, relative, sparse, entry)?,
            // tar has put zeros where the holes were.
            None => {
                let holes = entry.header().entry_type() == EntryType::GNUSparse;
                let size = entry.size();
                // The crate of tar reads an archive that ends here to its end, and is content.
                match self.plain(file, relative, holes, entry)? {
                    bytes if bytes == size => bytes,
                    _ => return Err(ends_early(relative)),
                }
            }
        };
        self.apply(place.rights(), relative, || {
            change_owner(file, &self.path.join(relative), self.owner_of(entry)?)?;
            // Before the mode, which may forbid it to all but root.
            self.attributes(file, relative, entry)?;
            self.set_mode(file, relative, mode)?;
            let modified = mtime(entry);
            futimens(file, &modified, &modified)
                .map_err(|errno| self.failed("utimes", relative, errno))
        })?;
        new.publish().map_err(|errno| match errno {
            Errno::EISDIR => FsError::Exists(self.path.join(relative)),
            errno => self.failed("rename", relative, errno),
        })?;
        self.done.bytes += bytes;
        Ok(())
    }

    /// Writes all that comes, or with `holes` all but the zeros.
    fn plain(
        &self,
        mut file: &File,
        relative: &Path,
        holes: bool,
        input: &mut impl Read,
    ) -> Result<u64, FsError> {
        let failed = |op, error: &io::Error| self.failed(op, relative, errno::of(error));
        let mut piece = vec![0; PIECE];
        let mut bytes = 0;
        loop {
            // What expands by itself brings no end of its input.
            self.check()?;
            let read = input.read(&mut piece).map_err(|error| bad(&error))?;
            let Some(read) = piece.get(..read).filter(|read| !read.is_empty()) else {
                break;
            };
            if holes && read.iter().all(|byte| *byte == 0) {
                let over = i64::try_from(read.len()).unwrap_or_default();
                file.seek(SeekFrom::Current(over)).map_err(|error| failed("seek", &error))?;
            } else {
                file.write_all(read).map_err(|error| failed("write", &error))?;
            }
            bytes += read.len() as u64;
        }
        if holes {
            file.set_len(bytes).map_err(|error| failed("truncate", &error))?;
        }
        Ok(bytes)
    }

    /// Writes the parts of a sparse file where they belong.
    fn mapped(
        &self,
        mut file: &File,
        relative: &Path,
        sparse: Sparse,
        input: &mut impl Read,
    ) -> Result<u64, FsError> {
        let failed = |op, error: &io::Error| self.failed(op, relative, errno::of(error));
        let size = sparse.size;
        // First, so that one which no file system could hold is told before its data.
        file.set_len(size).map_err(|error| failed("truncate", &error))?;
        for (start, length) in sparse.map(input)? {
            file.seek(SeekFrom::Start(start)).map_err(|error| failed("seek", &error))?;
            let part = self.plain(file, relative, false, &mut input.by_ref().take(length))?;
            if part < length {
                return Err(ends_early(relative));
            }
        }
        Ok(size)
    }
}

fn ends_early(relative: &Path) -> FsError {
    let shown = crate::quote::path(relative);
    FsError::BadArchive(format!("the archive ends in the middle of {shown}"))
}
