//! Directories as tar archives, and back ([`extract`]), while the bytes come and go: nothing is kept
//! on the disk or as a whole in memory.
//!
//! Archives are made over descriptors ([`tree::Walk`](super::tree::Walk)), so nothing outside of the
//! directory is ever read, whatever is renamed meanwhile, and with the rights that the path to it
//! allows ([`resolve`]). They hold files, directories, links, FIFOs and the attributes
//! `user.*`; sockets are left out. A file that shrinks while it is read is filled up with zeros, as
//! tar does, since its length has been told already.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{BorrowedFd, OwnedFd},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use flate2::write::GzEncoder;
use nix::{
    errno::Errno,
    fcntl::{OFlag, readlinkat},
    sys::stat::{FileStat, SFlag},
};
use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use tar::{Builder, EntryType, Header};
use xattr::FileExt;

use super::{
    CAREFULLY, FsError, PathError,
    actor::{Actor, Rights},
    resolve::{self, Place},
    tree::{Found, Step, Walk},
};
use crate::{blocking::progress, guest::users::Users};

mod unpack;

pub use unpack::{Extracted, MAX_ENTRY_HEAD, MAX_ZSTD_WINDOW, extract};

/// What is being done, for messages.
const ARCHIVING: &str = "archiving";
/// The bytes of an archive that become one frame of Zstandard. Frames stand for themselves, so this
/// is also what is held in memory.
const ZSTD_FRAME: usize = 512 << 10;
/// What an attribute is called in an archive, as GNU tar and bsdtar do.
const XATTR: &str = "SCHILY.xattr.";

/// How an archive is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip.
    Gzip,
    /// Zstandard.
    Zstd,
}

/// Writes an archive of the directory at `path`, or of the one file there, to `out`, on behalf of
/// `actor`.
///
/// # Errors
/// [`FsError::TooDeep`], [`FsError::NotRegular`], [`FsError::Archive`], [`FsError::Abandoned`] once
/// `stop` is set, or the call that failed.
pub fn archive(
    path: &Path,
    actor: &Actor,
    compression: Compression,
    users: &Users,
    out: impl Write,
    stop: &AtomicBool,
) -> Result<(), FsError> {
    let out = match compression {
        Compression::None => Coder::None(out),
        Compression::Gzip => {
            Coder::Gzip(Box::new(GzEncoder::new(out, flate2::Compression::fast())))
        }
        Compression::Zstd => Coder::Zstd(Frames { out, held: Vec::new() }),
    };
    let place = resolve::Walk::new(actor)
        .to(path)
        .map_err(|error| error.or_busy(|error| failed_at("open", path, error.errno)))?;
    let rights = place.rights().clone();
    let mut archive = Archive { path, rights, users, stop, builder: Builder::new(out) };
    archive.everything(&place)?;
    let failed = |error| archive_failed(path, &error);
    archive.builder.into_inner().and_then(Coder::finish).map_err(failed)
}

fn archive_failed(path: &Path, error: &io::Error) -> FsError {
    FsError::Archive { path: path.to_owned(), why: error.to_string() }
}

fn failed_at(op: &'static str, path: &Path, errno: Errno) -> FsError {
    FsError::Doing { doing: ARCHIVING, error: PathError::new(op, path, errno) }
}

struct Archive<'a, W: Write> {
    path: &'a Path,
    /// With whose rights it is read.
    rights: Rights,
    users: &'a Users,
    stop: &'a AtomicBool,
    builder: Builder<Coder<W>>,
}

impl<W: Write> Archive<'_, W> {
    fn everything(&mut self, place: &Place) -> Result<(), FsError> {
        let Some(there) = place.found() else {
            return Err(failed_at("open", self.path, Errno::ENOENT));
        };
        if !there.is_dir() {
            if !there.is_file() {
                return Err(FsError::NotRegular(self.path.to_owned()));
            }
            let name = place.name().to_owned();
            let found = Found { relative: name.clone().into(), name, stat: there.stat };
            let opened = place.open(OFlag::O_RDONLY | OFlag::from_bits_truncate(CAREFULLY));
            let (file, stat, _) = opened.map_err(|errno| failed_at("open", self.path, errno))?;
            return self.file(file, &stat, &found);
        }
        let opened = place.open(OFlag::O_RDONLY | OFlag::O_DIRECTORY);
        let (dir, ..) = opened.map_err(|errno| failed_at("open", self.path, errno))?;
        let mut walk = Walk::new(OwnedFd::from(dir), self.path, self.rights.clone(), ARCHIVING)?;
        while let Some(step) = walk.next()? {
            if self.stop.load(Ordering::Relaxed) {
                return Err(FsError::Abandoned(self.path.to_owned()));
            }
            let Some(dir) = walk.dir() else { break };
            match step {
                Step::Enter(found) => self.entry(dir, &found, Some(dir))?,
                Step::Leaf(found) => self.entry(dir, &found, None)?,
                Step::Leave(_) => {}
            }
        }
        Ok(())
    }

    /// Adds a file that was opened, if it is a regular one, as it is told by its descriptor.
    fn file(&mut self, file: File, stat: &FileStat, found: &Found) -> Result<(), FsError> {
        if stat.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
            return Ok(());
        }
        let path = self.path.join(&found.relative);
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        self.attributes(&file, &path)?;
        let mut header = self.header(stat);
        header.set_size(size);
        header.set_entry_type(EntryType::Regular);
        let content = Exactly { file, left: size, stop: self.stop };
        let added = self.builder.append_data(&mut header, &found.relative, content);
        added.map_err(|error| archive_failed(&path, &error))
    }

    /// Adds one entry; `itself` is the entry where it is an open directory.
    fn entry(
        &mut self,
        dir: BorrowedFd<'_>,
        found: &Found,
        itself: Option<BorrowedFd<'_>>,
    ) -> Result<(), FsError> {
        let path = self.path.join(&found.relative);
        let mut header = self.header(&found.stat);
        let kind = found.kind();
        if kind == SFlag::S_IFREG {
            let flags = OFlag::O_RDONLY | OFlag::from_bits_truncate(CAREFULLY);
            return match self.rights.open_in(&dir, &found.name, flags) {
                Ok((file, stat, _)) => self.file(file, &stat, found),
                Err(Errno::ENOENT) => Ok(()),
                Err(errno) => Err(failed_at("open", &path, errno)),
            };
        }
        let added = match kind {
            SFlag::S_IFDIR => {
                if let Some(fd) = itself {
                    let own = fd.try_clone_to_owned().map(File::from);
                    self.attributes(&own.map_err(|error| archive_failed(&path, &error))?, &path)?;
                }
                header.set_entry_type(EntryType::Directory);
                self.builder.append_data(&mut header, &found.relative, io::empty())
            }
            SFlag::S_IFLNK => {
                let read = || readlinkat(dir, found.name.as_os_str());
                let target = match self.rights.act(read) {
                    Ok(target) => target,
                    Err(Errno::ENOENT | Errno::EINVAL) => return Ok(()),
                    Err(errno) => return Err(failed_at("readlink", &path, errno)),
                };
                header.set_entry_type(EntryType::Symlink);
                self.builder.append_link(&mut header, &found.relative, target)
            }
            SFlag::S_IFIFO => {
                header.set_entry_type(EntryType::Fifo);
                self.builder.append_data(&mut header, &found.relative, io::empty())
            }
            SFlag::S_IFCHR | SFlag::S_IFBLK => {
                header.set_entry_type(match kind {
                    SFlag::S_IFCHR => EntryType::Char,
                    _ => EntryType::Block,
                });
                let (major, minor) =
                    (libc::major(found.stat.st_rdev), libc::minor(found.stat.st_rdev));
                header
                    .set_device_major(major)
                    .and_then(|()| header.set_device_minor(minor))
                    .and_then(|()| {
                        self.builder.append_data(&mut header, &found.relative, io::empty())
                    })
            }
            // A socket: nobody could listen on a copy.
            _ => Ok(()),
        };
        added.map_err(|error| archive_failed(&path, &error))
    }

    fn header(&self, stat: &FileStat) -> Header {
        let mut header = Header::new_gnu();
        header.set_size(0);
        header.set_mode(stat.st_mode & 0o7777);
        header.set_uid(stat.st_uid.into());
        header.set_gid(stat.st_gid.into());
        match u64::try_from(stat.st_mtime) {
            Ok(seconds) => header.set_mtime(seconds),
            Err(_) => header.as_old_mut().mtime = before_1970(stat.st_mtime),
        }
        // A name that does not fit is left to the number.
        let _ = header.set_username(&self.users.user_name(stat.st_uid));
        let _ = header.set_groupname(&self.users.group_name(stat.st_gid));
        header
    }

    /// Adds the attributes that go before the entry.
    fn attributes(&mut self, file: &File, path: &Path) -> Result<(), FsError> {
        let names = file.list_xattr().into_iter().flatten();
        let records: Vec<(String, Vec<u8>)> = names
            .filter_map(|name| {
                let key = name.to_str().filter(|name| name.starts_with("user."))?;
                let value = file.get_xattr(&name).ok()??;
                Some((format!("{XATTR}{key}"), value))
            })
            .collect();
        if records.is_empty() {
            return Ok(());
        }
        let records = records.iter().map(|(key, value)| (key.as_str(), value.as_slice()));
        self.builder.append_pax_extensions(records).map_err(|error| archive_failed(path, &error))
    }
}

/// A time before 1970 as GNU tar writes it: a binary number in two's complement.
fn before_1970(seconds: i64) -> [u8; 12] {
    let [a, b, c, d, e, f, g, h] = seconds.to_be_bytes();
    [0xff, 0xff, 0xff, 0xff, a, b, c, d, e, f, g, h]
}

/// A file as long as was told, whatever becomes of it.
struct Exactly<'a> {
    file: File,
    left: u64,
    stop: &'a AtomicBool,
}

impl Read for Exactly<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(io::Error::other("the caller has left"));
        }
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let Some(buffer) = buffer.get_mut(..most).filter(|buffer| !buffer.is_empty()) else {
            return Ok(0);
        };
        progress();
        let mut read = self.file.read(buffer)?;
        if read == 0 {
            buffer.fill(0);
            read = most;
        }
        self.left -= read as u64;
        Ok(read)
    }
}

enum Coder<W: Write> {
    None(W),
    Gzip(Box<GzEncoder<W>>),
    Zstd(Frames<W>),
}

impl<W: Write> Coder<W> {
    fn finish(self) -> io::Result<()> {
        match self {
            Self::None(mut out) => out.flush(),
            Self::Gzip(encoder) => encoder.finish()?.flush(),
            Self::Zstd(mut frames) => {
                frames.end_frame()?;
                frames.out.flush()
            }
        }
    }
}

impl<W: Write> Write for Coder<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::None(out) => out.write(bytes),
            Self::Gzip(encoder) => encoder.write(bytes),
            Self::Zstd(frames) => frames.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One frame of Zstandard after the other: every decoder takes them as one text.
struct Frames<W> {
    out: W,
    held: Vec<u8>,
}

impl<W: Write> Frames<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.get(..ZSTD_FRAME - self.held.len()).unwrap_or(bytes);
        self.held.extend_from_slice(taken);
        if self.held.len() == ZSTD_FRAME {
            self.end_frame()?;
        }
        Ok(taken.len())
    }

    fn end_frame(&mut self) -> io::Result<()> {
        let packed = compress_to_vec(self.held.as_slice(), CompressionLevel::Fastest);
        self.held.clear();
        self.out.write_all(&packed)
    }
}
