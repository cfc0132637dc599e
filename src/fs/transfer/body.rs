//! A body that waits until all of it is here: in memory while it is short, else on the disk.

use std::{
    fs::File,
    io::{self, Seek, Write},
    os::fd::AsFd,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open, openat},
    sys::stat::Mode,
    unistd::{UnlinkatFlags, unlinkat},
};

use crate::fs::{
    actor::Rights,
    resolve::Place,
    unnamed::{Unnamed, unnamed_file},
};

/// The body for an existing file that waits in memory; a longer one waits on the disk.
pub const MAX_BODY_IN_MEMORY: usize = 1 << 20;

/// The permissions of a body that waits on the disk.
const PRIVATE: Mode = Mode::from_bits_truncate(0o600);

#[derive(Debug)]
pub(super) enum Body {
    Memory(Vec<u8>),
    Disk(File),
    /// The file itself, of which nothing existed when the upload began.
    New(Unnamed),
}

impl Default for Body {
    fn default() -> Self {
        Self::Memory(Vec::new())
    }
}

impl Body {
    /// Its bytes.
    pub(super) fn length(&self) -> io::Result<u64> {
        match self {
            Self::Memory(bytes) => Ok(u64::try_from(bytes.len()).unwrap_or(u64::MAX)),
            Self::Disk(spool) => Ok(spool.metadata()?.len()),
            Self::New(new) => Ok(new.file().metadata()?.len()),
        }
    }

    /// Writes all of it, also a second time.
    pub(super) fn copy_to(&self, to: &mut &File) -> io::Result<()> {
        let mut spool = match self {
            Self::Memory(bytes) => return to.write_all(bytes),
            Self::Disk(spool) => spool,
            Self::New(new) => new.file(),
        };
        spool.rewind()?;
        // copy_file_range: shared extents where the file system can.
        io::copy(&mut spool, to).map(drop)
    }
}

pub(super) fn append(body: &mut Body, bytes: &[u8], beside: &Place) -> io::Result<()> {
    if let Body::Memory(held) = body {
        if held.len() + bytes.len() <= MAX_BODY_IN_MEMORY {
            held.extend_from_slice(bytes);
            return Ok(());
        }
        let mut spool = spool(beside)?;
        spool.write_all(held)?;
        *body = Body::Disk(spool);
    }
    match body {
        Body::Disk(spool) => spool.write_all(bytes),
        Body::New(new) => new.file().write_all(bytes),
        Body::Memory(_) => Ok(()),
    }
}

/// A file without a name: in the target's directory, where the body will have to fit anyway, else
/// where temporary files go.
pub(super) fn spool(beside: &Place) -> io::Result<File> {
    match unnamed_file(beside.dir(), beside.rights(), PRIVATE) {
        // Not every file system can, and NFS and old FUSE say it in different ways.
        Err(error) if error != Errno::ENOSPC => spool_unlinked(beside.dir(), beside.rights())
            .or_else(|_| spool_elsewhere())
            .map_err(|_| error.into()),
        other => Ok(other?),
    }
}

pub(super) fn spool_unlinked(dir: impl AsFd, rights: &Rights) -> nix::Result<File> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!(".envd-upload-{}-{number}", std::process::id());
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    let file = rights.create(|| openat(&dir, name.as_str(), flags, PRIVATE))?;
    rights.act(|| unlinkat(&dir, name.as_str(), UnlinkatFlags::NoRemoveDir))?;
    Ok(File::from(file))
}

/// The daemon's own directory, and its own file.
fn spool_elsewhere() -> nix::Result<File> {
    let flags = OFlag::O_RDWR | OFlag::O_TMPFILE | OFlag::O_CLOEXEC;
    let dir = std::env::temp_dir();
    open(Path::new(&dir), flags, PRIVATE).map(File::from)
}
