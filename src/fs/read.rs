//! Reading files: what may be read, in pieces, and what tells two states of a file apart.

use std::{
    fs::{File, Metadata},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::MetadataExt,
    path::Path,
};

use nix::{errno::Errno, fcntl::OFlag, sys::stat::FileStat};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::{
    FsError, PathError,
    actor::{Actor, Rights},
    errno,
    resolve::Walk,
};

/// Bytes read at a time. Each client that does not take what it has asked for holds one such piece and
/// one that is being sent, and there may be as many as calls.
pub const PIECE: usize = 64 << 10;
/// Bytes read at a time by those with a permit of [`roomy`], which makes them twice as fast.
pub const LARGE_PIECE: usize = 256 << 10;
/// Those who may read more than [`PIECE`] at a time.
pub const LARGE_READERS: usize = 32;

/// How often a file is looked up again because others change it meanwhile.
const MAX_TRIES: usize = 64;

static ROOMY: Semaphore = Semaphore::const_new(LARGE_READERS);

/// Leave to read more than [`PIECE`] at a time, while it is held; none when others have it all.
pub fn roomy() -> Option<SemaphorePermit<'static>> {
    ROOMY.try_acquire().ok()
}

/// A file that is open for reading.
#[derive(Debug)]
pub struct Opened {
    /// The file.
    pub file: File,
    /// What it was when it was opened.
    pub meta: Metadata,
    /// The rights with which it was opened.
    pub rights: Rights,
}

/// Opens a regular file for reading.
///
/// # Errors
/// As [`open_any`], and [`FsError::NotRegular`] for character devices.
pub fn open(path: &Path, actor: &Actor) -> Result<Opened, FsError> {
    open_if(path, actor, &|kind| kind == libc::S_IFREG)
}

/// Opens a regular file or a character device for reading.
///
/// # Errors
/// [`FsError::NotThere`], [`FsError::ReadOfDirectory`], [`FsError::NotRegular`] for block devices, FIFOs
/// and sockets, or the call that failed.
pub fn open_any(path: &Path, actor: &Actor) -> Result<Opened, FsError> {
    open_if(path, actor, &|kind| matches!(kind, libc::S_IFREG | libc::S_IFCHR))
}

fn open_if(
    path: &Path,
    actor: &Actor,
    wanted: &dyn Fn(libc::mode_t) -> bool,
) -> Result<Opened, FsError> {
    let checked = |errno| match errno {
        Errno::ENOENT => FsError::NotThere(path.to_owned()),
        errno => FsError::CheckPath { error: PathError::new("stat", path, errno) },
    };
    let failed = |errno| match errno {
        Errno::ENOENT => FsError::NotThere(path.to_owned()),
        errno => FsError::OpenForReading { error: PathError::new("open", path, errno) },
    };
    // Again when what was found was exchanged for a link.
    for _ in 0..MAX_TRIES {
        let place = Walk::new(actor).to(path);
        let place = place.map_err(|error| error.or_busy(|error| checked(error.errno)))?;
        // Before it is opened: opening a device can do things.
        let found = place.found().ok_or_else(|| FsError::NotThere(path.to_owned()))?;
        readable(path, found.stat.st_mode, wanted)?;
        let (file, stat, rights) =
            match place.open(OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY) {
                Ok(opened) => opened,
                Err(Errno::ELOOP) => continue,
                Err(errno) => return Err(failed(errno)),
            };
        // Again: it may be another file by now.
        readable(path, stat.st_mode, wanted)?;
        let meta = file.metadata().map_err(|error| failed(errno::of(&error)))?;
        return Ok(Opened { file, meta, rights });
    }
    Err(failed(Errno::ELOOP))
}

fn readable(
    path: &Path,
    mode: libc::mode_t,
    wanted: &dyn Fn(libc::mode_t) -> bool,
) -> Result<(), FsError> {
    match mode & libc::S_IFMT {
        kind if wanted(kind) => Ok(()),
        libc::S_IFDIR => Err(FsError::ReadOfDirectory(path.to_owned())),
        _ => Err(FsError::NotRegular(path.to_owned())),
    }
}

/// What changes whenever the file becomes another, or its content, mode, owner or attributes
/// change: device, inode, size, and both times to the nanosecond. Two changes within one tick of
/// the kernel's clock (at most 10 ms) that leave the size as it is look the same.
pub fn tag(meta: &Metadata) -> String {
    format!(
        "{:x}-{:x}-{:x}-{:x}.{:x}-{:x}.{:x}",
        meta.dev(),
        meta.ino(),
        meta.len(),
        meta.mtime(),
        meta.mtime_nsec(),
        meta.ctime(),
        meta.ctime_nsec()
    )
}

/// As [`tag`], of what fstat(2) gave.
pub(super) fn tag_of(stat: &FileStat) -> String {
    format!(
        "{:x}-{:x}-{:x}-{:x}.{:x}-{:x}.{:x}",
        stat.st_dev,
        stat.st_ino,
        stat.st_size,
        stat.st_mtime,
        stat.st_mtime_nsec,
        stat.st_ctime,
        stat.st_ctime_nsec
    )
}

/// A part of a file, read piece by piece.
#[derive(Debug)]
pub struct Reader {
    file: File,
    left: u64,
}

impl Reader {
    /// The bytes of `file` from `start`, at most `length` of them.
    ///
    /// # Errors
    /// When the file cannot be read from there.
    pub fn new(mut file: File, start: u64, length: u64) -> io::Result<Self> {
        // Some of /proc can be read from the beginning only.
        if start > 0 {
            file.seek(SeekFrom::Start(start))?;
        }
        Ok(Self { file, left: length })
    }

    /// Goes on elsewhere in the file.
    ///
    /// # Errors
    /// When the file cannot be read from there.
    pub fn go_to(&mut self, start: u64, length: u64) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(start))?;
        self.left = length;
        Ok(())
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The bytes that are still to come, as far as the file has them.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// The next bytes, `most` of them but for the last; none at the end.
    ///
    /// # Errors
    /// What reading gives.
    pub fn next(&mut self, most: usize) -> io::Result<Vec<u8>> {
        let wanted = usize::try_from(self.left).unwrap_or(most).min(most);
        let mut piece = Vec::with_capacity(wanted);
        // It does not fill the memory with zeros first.
        (&self.file).take(wanted as u64).read_to_end(&mut piece)?;
        self.left = match piece.len() < wanted {
            // The file has become shorter than it was.
            true => 0,
            false => self.left - wanted as u64,
        };
        Ok(piece)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::FileExt, path::PathBuf};

    use super::*;
    use crate::fs::resolve::own_actor;

    #[test]
    fn errors_are_upstreams() {
        let tmp = tempfile::tempdir().unwrap();
        let shown = tmp.path().display();
        fs::write(tmp.path().join("f"), "abc").unwrap();
        assert_eq!(open(&tmp.path().join("f"), &own_actor()).unwrap().meta.len(), 3);
        for (path, wanted) in [
            ("no", format!("path '{shown}/no' does not exist")),
            (".", format!("path '{shown}/.' is a directory")),
            (
                "f/x",
                format!(
                    "error checking if path exists '{shown}/f/x': stat {shown}/f/x: not a directory"
                ),
            ),
        ] {
            let path = PathBuf::from(format!("{shown}/{path}"));
            assert_eq!(open(&path, &own_actor()).unwrap_err().to_string(), wanted);
        }
        assert!(matches!(open(Path::new("/dev/zero"), &own_actor()), Err(FsError::NotRegular(_))));
    }

    #[test]
    fn pieces_are_bounded_and_end_with_the_part() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(200_000).unwrap();
        file.write_all_at(b"end", 149_997).unwrap();
        let mut reader = Reader::new(file, 50_000, 100_000).unwrap();
        let pieces: Vec<_> =
            std::iter::from_fn(|| Some(reader.next(65_536).unwrap())).take(3).collect();
        assert_eq!(pieces.iter().map(Vec::len).collect::<Vec<_>>(), [65_536, 34_464, 0]);
        assert!(pieces[1].ends_with(b"end"));
        reader.go_to(199_999, u64::MAX).unwrap();
        assert_eq!(reader.next(10).unwrap(), [0]);
        assert_eq!((reader.left(), reader.next(10).unwrap().len()), (0, 0));
    }

    #[test]
    fn another_state_has_another_tag() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("f");
        let mut seen = std::collections::BTreeSet::new();
        for content in ["a", "ab"] {
            fs::write(&path, content).unwrap();
            assert!(seen.insert(tag(&fs::metadata(&path).unwrap())));
            let stat = nix::sys::stat::stat(&path).unwrap();
            assert_eq!(tag_of(&stat), tag(&fs::metadata(&path).unwrap()));
        }
        fs::write(tmp.path().join("g"), "ab").unwrap();
        fs::rename(tmp.path().join("g"), &path).unwrap();
        assert!(seen.insert(tag(&fs::metadata(&path).unwrap())));
        assert!(!seen.insert(tag(&fs::metadata(&path).unwrap())));
    }
}
