//! Whole files in and out.
//!
//! A client that goes away must not leave half a file, and must not have destroyed the old one:
//!
//! * A **new** file is created in place and written as the bytes come, because E2B's clients
//!   assert what a watcher sees of that: CREATE, CHMOD, WRITE. It is unlinked again when the
//!   upload is abandoned.
//! * An **existing** file is not touched before the whole body is here; the body waits in memory,
//!   and beyond [`MAX_BODY_IN_MEMORY`] in a file without a name. Then it is copied into the same
//!   inode, so that mode, hard links, links to it and open descriptors stay as they are. Whether
//!   there is room for it is looked at before anything is lost.

use std::{
    collections::BTreeMap,
    fs::{self, File, Metadata, OpenOptions},
    io::{self, Seek, Write},
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, fchown},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use nix::{errno::Errno, sys::statvfs::fstatvfs};

use super::{FsError, PathError, errno, metadata, path};
use crate::guest::users::User;

pub use super::metadata::{set_metadata, validate_metadata};

/// The body for an existing file that waits in memory; a longer one waits on the disk.
pub const MAX_BODY_IN_MEMORY: usize = 1 << 20;

/// Opening a FIFO must not wait for its other end, and a terminal must not become ours.
const CAREFULLY: i32 = libc::O_NONBLOCK | libc::O_NOCTTY;

/// Opens a regular file for reading.
///
/// # Errors
/// [`FsError::NotThere`], [`FsError::ReadOfDirectory`], [`FsError::NotRegular`] for devices, FIFOs
/// and sockets, or the call that failed.
pub fn open_read(path: &Path) -> Result<(File, Metadata), FsError> {
    // Before it is opened: opening a device can do things.
    let meta = fs::metadata(path).map_err(|error| {
        let error = PathError::io("stat", path, &error);
        match error.errno {
            Errno::ENOENT => FsError::NotThere(path.to_owned()),
            _ => FsError::CheckPath { error },
        }
    })?;
    readable(path, &meta)?;
    let failed = |error: io::Error| match errno::of(&error) {
        Errno::ENOENT => FsError::NotThere(path.to_owned()),
        _ => FsError::OpenForReading { error: PathError::io("open", path, &error) },
    };
    let file = OpenOptions::new().read(true).custom_flags(CAREFULLY).open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    // Again: it may be another file by now.
    readable(path, &meta)?;
    Ok((file, meta))
}

fn readable(path: &Path, meta: &Metadata) -> Result<(), FsError> {
    if meta.is_dir() {
        Err(FsError::ReadOfDirectory(path.to_owned()))
    } else if !meta.is_file() {
        Err(FsError::NotRegular(path.to_owned()))
    } else {
        Ok(())
    }
}

/// What is told of a file that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WriteInfo {
    /// The last part of the path.
    pub name: String,
    /// The path.
    pub path: String,
    /// The metadata as the file system now has it.
    pub metadata: BTreeMap<String, String>,
}

/// A file that is being written. Dropped without [`Writer::finish`], it leaves everything as it
/// was, except for new directories.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    /// Where the file is, when the path is a link to a file that did not exist.
    real: PathBuf,
    owner: (u32, u32),
    expected: Option<u64>,
    file: File,
    sink: Sink,
}

#[derive(Debug)]
enum Sink {
    /// A file that we created, to be unlinked unless it is finished.
    New { device: u64, inode: u64, finished: bool },
    /// A regular file that existed, and the body that waits for it.
    Existing(Body),
    /// A character device such as /dev/null, written at once.
    Device,
}

#[derive(Debug)]
enum Body {
    Memory(Vec<u8>),
    Disk(File),
}

impl Writer {
    /// Starts to write the file at `path`, which may exist, for `owner`.
    ///
    /// # Errors
    /// [`FsError::EnsureDirectories`], [`FsError::WriteOfDirectory`], [`FsError::NotRegular`],
    /// [`FsError::NoInodes`], or the call that failed.
    pub fn create(path: &Path, owner: &User) -> Result<Self, FsError> {
        let owner = (owner.uid, owner.gid);
        path::ensure_dirs(&path::dir_of(path), owner)
            .map_err(|error| FsError::EnsureDirectories(Box::new(error)))?;
        let mut real = path.to_owned();
        // Again for every link to a file that does not exist, and when somebody was faster.
        for _ in 0..=path::MAX_LINKS {
            match OpenOptions::new().write(true).create_new(true).open(&real) {
                Ok(file) => return Self::new_file(path, real, owner, file),
                Err(error) if matches!(errno::of(&error), Errno::EEXIST | Errno::EISDIR) => {}
                Err(error) => return Err(open_failed(path, &error)),
            }
            match fs::metadata(&real) {
                Ok(meta) => return Self::existing(path, real, owner, &meta),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(open_failed(path, &error)),
            }
            if let Ok(target) = fs::read_link(&real) {
                real = real.parent().unwrap_or_else(|| Path::new("/")).join(target);
            }
        }
        Err(FsError::OpenForWriting(PathError::new("open", path, Errno::ELOOP)))
    }

    fn new_file(
        path: &Path,
        real: PathBuf,
        owner: (u32, u32),
        file: File,
    ) -> Result<Self, FsError> {
        let meta = file.metadata().map_err(|error| open_failed(path, &error))?;
        let sink = Sink::New { device: meta.dev(), inode: meta.ino(), finished: false };
        let writer = Self { path: path.to_owned(), real, owner, expected: None, file, sink };
        writer.change_owner()?;
        Ok(writer)
    }

    fn existing(
        path: &Path,
        real: PathBuf,
        owner: (u32, u32),
        meta: &Metadata,
    ) -> Result<Self, FsError> {
        let device = meta.file_type().is_char_device();
        if meta.is_dir() {
            return Err(FsError::WriteOfDirectory(path.to_owned()));
        }
        if !meta.is_file() && !device {
            return Err(FsError::NotRegular(path.to_owned()));
        }
        // Opened now, not at the end: what forbids it (a running program, a read-only mount) is
        // told before the body is sent.
        let opened = OpenOptions::new().write(true).custom_flags(CAREFULLY).open(&real);
        let file = opened.map_err(|error| open_failed(path, &error))?;
        let now = file.metadata().map_err(|error| open_failed(path, &error))?;
        if now.is_file() == device {
            return Err(FsError::NotRegular(path.to_owned()));
        }
        let sink = if device { Sink::Device } else { Sink::Existing(Body::Memory(Vec::new())) };
        Ok(Self { path: path.to_owned(), real, owner, expected: None, file, sink })
    }

    /// Tells how many bytes the client announced, for the message when they do not fit.
    pub fn expect_bytes(&mut self, bytes: u64) {
        self.expected = (bytes > 0).then_some(bytes);
    }

    /// Takes the next bytes of the body.
    ///
    /// # Errors
    /// [`FsError::NoSpace`] or [`FsError::WriteFile`]; the writer is then to be dropped.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), FsError> {
        let written = match &mut self.sink {
            Sink::New { .. } | Sink::Device => self.file.write_all(bytes),
            Sink::Existing(body) => append(body, bytes, &self.real),
        };
        written.map_err(|error| self.write_failed(&error))
    }

    /// Ends the body: the file has its content, its owner and its metadata.
    ///
    /// # Errors
    /// [`FsError::NoSpace`] while an existing file is still intact, or the call that failed.
    pub fn finish(mut self, metadata: &BTreeMap<String, String>) -> Result<WriteInfo, FsError> {
        if let Sink::Existing(body) = &mut self.sink {
            // Swapped, so that the body can be read while the file is written.
            let body = std::mem::replace(body, Body::Memory(Vec::new()));
            self.replace_content(body)?;
        }
        metadata::replace(&self.file, &self.path, metadata)?;
        if let Sink::New { finished, .. } = &mut self.sink {
            *finished = true;
        }
        Ok(WriteInfo {
            name: path::base_name(&self.path).to_string_lossy().into_owned(),
            path: self.path.to_string_lossy().into_owned(),
            metadata: metadata::read(&self.real),
        })
    }

    fn replace_content(&mut self, body: Body) -> Result<(), FsError> {
        let old = self.file.metadata().map_err(|error| self.write_failed(&error))?;
        let wanted = match &body {
            Body::Memory(bytes) => u64::try_from(bytes.len()).unwrap_or(u64::MAX),
            Body::Disk(spool) => spool.metadata().map_err(|error| self.write_failed(&error))?.len(),
        };
        if room_for(&self.file, &old).is_some_and(|room| room < wanted) {
            return Err(FsError::NoSpace(self.expected));
        }
        self.change_owner()?;
        let write = || -> io::Result<()> {
            // Files of /proc and /sys are empty to the eye, and not all can be truncated.
            if old.len() > 0 {
                self.file.set_len(0)?;
            }
            match body {
                Body::Memory(bytes) => self.file.write_all(&bytes),
                Body::Disk(mut spool) => {
                    spool.rewind()?;
                    // copy_file_range: shared extents where the file system can.
                    io::copy(&mut spool, &mut self.file).map(|_| ())
                }
            }
        };
        write().map_err(|error| self.write_failed(&error))
    }

    fn change_owner(&self) -> Result<(), FsError> {
        let (uid, gid) = self.owner;
        fchown(&self.file, Some(uid), Some(gid))
            .or_else(|error| path::tolerate_own(error, uid, || self.file.metadata()))
            .map_err(|error| FsError::ChangeOwner(PathError::io("chown", &self.path, &error)))
    }

    fn write_failed(&self, error: &io::Error) -> FsError {
        match errno::of(error) {
            Errno::ENOSPC | Errno::EDQUOT => FsError::NoSpace(self.expected),
            errno => FsError::WriteFile(PathError::new("write", &self.path, errno)),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let Sink::New { device, inode, finished: false } = self.sink else {
            return;
        };
        // Only what is still ours: somebody may have put another file there.
        let ours = fs::symlink_metadata(&self.real)
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == (device, inode));
        if ours && let Err(error) = fs::remove_file(&self.real) {
            tracing::warn!(path = %self.real.display(), %error, "half a file stays");
        }
    }
}

fn open_failed(path: &Path, error: &io::Error) -> FsError {
    let error = PathError::io("open", path, error);
    match error.errno {
        Errno::EISDIR => FsError::WriteOfDirectory(path.to_owned()),
        Errno::ENOSPC | Errno::EDQUOT => FsError::NoInodes(error),
        _ => FsError::OpenForWriting(error),
    }
}

/// The bytes that the file can grow to, with its old content gone; none where that is unknown.
fn room_for(file: &File, old: &Metadata) -> Option<u64> {
    let space = fstatvfs(file).ok().filter(|space| space.blocks() > 0)?;
    // The reserve of the file system is root's.
    let root = nix::unistd::geteuid().is_root();
    let blocks = if root { space.blocks_free() } else { space.blocks_available() };
    Some(blocks.saturating_mul(space.fragment_size()).saturating_add(old.blocks() * 512))
}

fn append(body: &mut Body, bytes: &[u8], beside: &Path) -> io::Result<()> {
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
fn spool(dir: &Path) -> io::Result<File> {
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

fn spool_unlinked(dir: &Path) -> io::Result<File> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = dir.join(format!(".envd-upload-{}-{number}", std::process::id()));
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    fs::remove_file(&path)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    fn user() -> User {
        let (uid, gid) = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
        User { name: "me".into(), uid, gid, home: "/".into(), groups: vec![gid] }
    }

    fn none() -> BTreeMap<String, String> {
        BTreeMap::new()
    }

    fn put(path: &Path, content: &[u8]) -> Result<WriteInfo, FsError> {
        let mut writer = Writer::create(path, &user())?;
        content.chunks(300_000).try_for_each(|chunk| writer.write(chunk))?;
        writer.finish(&none())
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn writes_new_files_and_into_existing_ones() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("a/b/f");
        let info = put(&path, b"one").unwrap();
        assert_eq!((info.name.as_str(), info.path.as_str()), ("f", path.to_str().unwrap()));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o751)).unwrap();
        let before = fs::metadata(&path).unwrap();
        fs::hard_link(&path, tmp.path().join("hard")).unwrap();
        symlink("a/b/f", tmp.path().join("soft")).unwrap();

        let big: Vec<u8> = (0..3_000_000_u32).flat_map(|i| i.to_le_bytes()).collect();
        for content in [&b"two"[..], &big, &big[..MAX_BODY_IN_MEMORY], b""] {
            put(&tmp.path().join("soft"), content).unwrap();
            assert!(fs::read(tmp.path().join("hard")).unwrap() == content);
        }
        let after = fs::metadata(&path).unwrap();
        assert_eq!((before.ino(), before.mode()), (after.ino(), after.mode()));
        assert_eq!(names(&tmp.path().join("a/b")), ["f"]);
    }

    #[test]
    fn an_abandoned_upload_leaves_no_half_file_and_the_old_one_whole() {
        let tmp = tempfile::tempdir().unwrap();
        let (new, old) = (tmp.path().join("new"), tmp.path().join("old"));
        fs::write(&old, "old").unwrap();
        for path in [&new, &old] {
            let mut writer = Writer::create(path, &user()).unwrap();
            writer.write(&vec![1; 2 * MAX_BODY_IN_MEMORY]).unwrap();
        }
        assert_eq!(names(tmp.path()), ["old"]);
        assert_eq!(fs::read(&old).unwrap(), b"old");

        // Another file that took the place meanwhile stays.
        let writer = Writer::create(&new, &user()).unwrap();
        fs::write(tmp.path().join("other"), "other").unwrap();
        fs::rename(tmp.path().join("other"), &new).unwrap();
        drop(writer);
        assert_eq!(fs::read(&new).unwrap(), b"other");
    }

    #[test]
    fn a_link_to_nowhere_is_created_where_it_leads() {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir(tmp.path().join("d")).unwrap();
        symlink("d/two", tmp.path().join("one")).unwrap();
        symlink("three", tmp.path().join("d/two")).unwrap();
        symlink("loop", tmp.path().join("loop")).unwrap();
        put(&tmp.path().join("one"), b"x").unwrap();
        assert_eq!(fs::read(tmp.path().join("d/three")).unwrap(), b"x");
        let error = put(&tmp.path().join("loop"), b"").unwrap_err().to_string();
        assert!(error.ends_with("too many levels of symbolic links"), "{error}");
    }

    #[test]
    fn directories_fifos_and_devices() {
        let tmp = tempfile::tempdir().unwrap();
        let shown = tmp.path().display();
        let fifo = tmp.path().join("fifo");
        mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        let error = put(tmp.path(), b"").unwrap_err();
        assert_eq!(error.to_string(), format!("path is a directory: {shown}"));
        let slash = PathBuf::from(format!("{shown}/new/"));
        let error = put(&slash, b"").unwrap_err();
        assert_eq!(error.to_string(), format!("path is a directory: {shown}/new/"));
        assert!(slash.is_dir());
        let not_regular = format!("path '{shown}/fifo' is not a regular file");
        assert_eq!(put(&fifo, b"x").unwrap_err().to_string(), not_regular);
        assert_eq!(open_read(&fifo).unwrap_err().to_string(), not_regular);
        put(Path::new("/dev/null"), b"x").unwrap();
        assert!(matches!(open_read(Path::new("/dev/zero")), Err(FsError::NotRegular(_))));

        let error = put(&fifo.join("x"), b"").unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("error ensuring directories: path is a file: {shown}/fifo")
        );
    }

    #[test]
    fn read_errors_are_upstreams() {
        let tmp = tempfile::tempdir().unwrap();
        let shown = tmp.path().display();
        fs::write(tmp.path().join("f"), "abc").unwrap();
        assert_eq!(open_read(&tmp.path().join("f")).unwrap().1.len(), 3);
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
            assert_eq!(open_read(&path).unwrap_err().to_string(), wanted);
        }
    }

    #[test]
    fn metadata_is_replaced_and_told() {
        let tmp = tempfile::tempdir_in(".").unwrap();
        let path = tmp.path().join("f");
        let author = BTreeMap::from([("author".to_owned(), "me".to_owned())]);
        let told = Writer::create(&path, &user()).unwrap().finish(&author).unwrap();
        assert_eq!(told.metadata, author);
        assert_eq!(put(&path, b"x").unwrap().metadata, none());
    }

    #[test]
    fn a_full_disk_is_told_with_the_announced_length() {
        let full = Path::new("/dev/full");
        if !full.exists() {
            return;
        }
        let mut writer = Writer::create(full, &user()).unwrap();
        let error = writer.write(b"x").unwrap_err();
        assert_eq!(error.to_string(), "not enough disk space available");
        writer.expect_bytes(7);
        let error = writer.write(b"x").unwrap_err();
        assert_eq!(
            error.to_string(),
            "attempted to write 7 bytes: not enough disk space available"
        );
        assert_eq!(error.kind(), super::super::Kind::NoSpace);
    }

    #[test]
    fn both_spools_have_no_name() {
        let tmp = tempfile::tempdir().unwrap();
        for mut spool in [spool(tmp.path()).unwrap(), spool_unlinked(tmp.path()).unwrap()] {
            spool.write_all(b"x").unwrap();
        }
        assert!(names(tmp.path()).is_empty());
    }
}
