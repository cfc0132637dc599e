//! A body that waits until all of it is here: in memory while it is short, else on the disk.

use std::{
    fs::File,
    io::{self, Write},
    os::{fd::AsFd, unix::fs::FileExt},
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open, openat},
    sys::stat::Mode,
    unistd::{UnlinkatFlags, unlinkat},
};

use crate::fs::{actor::Rights, resolve::Place, unnamed::unnamed_file};

/// The body for an existing file that waits in memory; a longer one waits on the disk.
pub const MAX_BODY_IN_MEMORY: usize = 1 << 20;

/// The bytes that are copied at a time when an unfinished file is saved from another's content.
const COPY_PIECE: usize = 64 << 10;
/// The permissions of a body that waits on the disk.
const PRIVATE: Mode = Mode::from_bits_truncate(0o600);

#[derive(Debug)]
pub(super) enum Body {
    Memory(Vec<u8>),
    Disk(File),
}

impl Default for Body {
    fn default() -> Self {
        Self::Memory(Vec::new())
    }
}

/// The whole content of a file, wherever it is read or written meanwhile.
pub(super) fn copy_of(file: &File, beside: &Place) -> io::Result<Body> {
    let mut body = Body::default();
    let mut piece = vec![0; COPY_PIECE];
    let mut at = 0;
    loop {
        match file.read_at(&mut piece, at) {
            Ok(0) => return Ok(body),
            Ok(read) => {
                append(&mut body, piece.get(..read).unwrap_or_default(), beside)?;
                at += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
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
