//! Files of an archive: the content first, and then the name.
//!
//! A file is written without a name ([`Unnamed`]), and gets its name with all of its content. What is in
//! the way stays until then. What breaks off, also by the end of the daemon, leaves no half a file.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    path::Path,
};

use nix::{errno::Errno, sys::stat::futimens};
use tar::{Entry, EntryType};

use super::{Unpacking, bad, mtime, sparse::Sparse};
use crate::fs::{FsError, errno, resolve::Place, staged::change_owner, unnamed::Unnamed};

/// The bytes of content that are written at a time.
pub(super) const PIECE: usize = 64 << 10;

/// A file without a name that is to be at `place`. A directory there is told now, and not once all of
/// the content has come: `EISDIR`.
fn new_file(place: &Place) -> nix::Result<Unnamed> {
    if place.stat_now().is_ok_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFDIR) {
        return Err(Errno::EISDIR);
    }
    Unnamed::create(place.dir(), place.rights(), 0o600)
}

/// Gives it its name, in the place of whatever file has that.
fn publish(mut new: Unnamed, place: &Place) -> nix::Result<()> {
    let (dir, rights, name) = (place.dir(), place.rights(), place.name());
    match new.publish(dir, rights, name) {
        Err(Errno::EEXIST) => new.replace(dir, rights, name),
        other => other,
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
        let new = new_file(&place).map_err(|errno| match errno {
            Errno::EISDIR => FsError::Exists(self.path.join(relative)),
            errno => self.failed("create", relative, errno),
        })?;
        let file = new.file();
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
        publish(new, &place).map_err(|errno| match errno {
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
        let failed = |op, error: &std::io::Error| self.failed(op, relative, errno::of(error));
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
        let failed = |op, error: &std::io::Error| self.failed(op, relative, errno::of(error));
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
