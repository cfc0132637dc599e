//! A body that waits until all of it is here: in memory while it is short, else on the disk.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use nix::errno::Errno;

use crate::fs::errno;

/// The body for an existing file that waits in memory; a longer one waits on the disk.
pub const MAX_BODY_IN_MEMORY: usize = 1 << 20;

/// The bytes that are copied at a time when an unfinished file is saved from another's content.
const COPY_PIECE: usize = 64 << 10;

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
pub(super) fn copy_of(file: &File, beside: &Path) -> io::Result<Body> {
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

pub(super) fn append(body: &mut Body, bytes: &[u8], beside: &Path) -> io::Result<()> {
    if let Body::Memory(held) = body {
        if held.len() + bytes.len() <= MAX_BODY_IN_MEMORY {
            held.extend_from_slice(bytes);
            return Ok(());
        }
        let mut spool = spool(beside.parent().unwrap_or_else(|| Path::new("/")))?;
        spool.write_all(held)?;
        *body = Body::Disk(spool);
    }
    match body {
        Body::Disk(spool) => spool.write_all(bytes),
        Body::Memory(_) => Ok(()),
    }
}

/// A file without a name: in `dir`, where the body will have to fit anyway, else where temporary
/// files go.
pub(super) fn spool(dir: &Path) -> io::Result<File> {
    let unnamed = |dir: &Path| {
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(dir)
    };
    match unnamed(dir) {
        // Not every file system can, and NFS and old FUSE say it in different ways.
        Err(error) if errno::of(&error) != Errno::ENOSPC => {
            spool_unlinked(dir).or_else(|_| unnamed(&std::env::temp_dir())).map_err(|_| error)
        }
        other => other,
    }
}

pub(super) fn spool_unlinked(dir: &Path) -> io::Result<File> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = dir.join(format!(".envd-upload-{}-{number}", std::process::id()));
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    fs::remove_file(&path)?;
    Ok(file)
}
