//! A file that is written apart and then takes its place at once: what `Write` does.
//!
//! The content goes to a file without a name beside the target ([`Unnamed`]). The commit checks size,
//! checksum and what the target is by then, gives the new file owner, mode and attributes, and
//! renames it over the target: whoever opens the path reads the old content or the new, whole.
//! Where another file would not be the same thing, the content is copied into the file that is
//! there: when it has more names than one, or is a mount point. [`Writers`] keeps apart those who
//! replace one file at a time.

use std::{
    collections::BTreeMap,
    fs::{self, File, Metadata, Permissions},
    io::{self, Seek, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::errno::Errno;
use sha2::{Digest, Sha256};
use xattr::FileExt;

use super::{
    CAREFULLY, FsError, PathError, errno, metadata, path, read, transfer::Writers, unnamed::Unnamed,
};
use crate::guest::users::User;

/// What is done to the target.
#[derive(Debug, Clone, Default)]
pub struct WriteOptions {
    /// Permission bits; otherwise those of the replaced file, or of a new one.
    pub mode: Option<u32>,
    /// The [`read::tag`] that the target must have.
    pub if_match: Option<String>,
    /// The target must not exist.
    pub create_only: bool,
    /// All metadata of the file.
    pub metadata: BTreeMap<String, String>,
    /// Wait for the disk.
    pub fsync: bool,
}

/// What the client says that the content is.
#[derive(Debug, Clone, Default)]
pub struct Expected {
    /// Its bytes.
    pub size: Option<u64>,
    /// Its SHA-256.
    pub sha256: Option<[u8; 32]>,
}

/// A file that is being written.
#[derive(Debug)]
pub struct Staged {
    /// As the client named it.
    path: PathBuf,
    /// Where it is, links followed.
    real: PathBuf,
    /// How many directories above it are new.
    made: usize,
    owner: (u32, u32),
    new: Unnamed,
    length: u64,
    hash: Sha256,
}

impl Staged {
    /// Starts to write what is to be at `path`, for `owner`. The target is looked at already, so
    /// that what cannot be is told before the content is sent.
    ///
    /// # Errors
    /// [`FsError::EnsureDirectories`], [`FsError::WriteOfDirectory`], [`FsError::NotRegular`],
    /// [`FsError::Exists`], [`FsError::Changed`], or the call that failed.
    pub fn create(path: &Path, owner: &User, options: &WriteOptions) -> Result<Self, FsError> {
        metadata::validate_metadata(&options.metadata)?;
        let owner = (owner.uid, owner.gid);
        if path.as_os_str().as_encoded_bytes().ends_with(b"/") {
            return Err(FsError::WriteOfDirectory(path.to_owned()));
        }
        let made = path::ensure_dirs(&path::dir_of(path), owner)
            .map_err(|error| FsError::EnsureDirectories(Box::new(error)))?;
        let real = follow(path)?;
        look(path, &real, options)?;
        let new = Unnamed::create(&path::dir_of(&real), 0o666)
            .map_err(|error| doing("opening file", path, "open", &error))?;
        let (length, hash) = (0, Sha256::new());
        Ok(Self { path: path.to_owned(), real, made, owner, new, length, hash })
    }

    /// The path that it is for.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The user that it is for.
    pub fn owner(&self) -> u32 {
        self.owner.0
    }

    /// The bytes so far.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// SHA-256 of the bytes so far.
    pub fn sha256(&self) -> [u8; 32] {
        self.hash.clone().finalize().into()
    }

    /// Takes bytes that belong at `offset`, or behind all others. What is there already is skipped.
    ///
    /// # Errors
    /// [`FsError::Gap`], or [`FsError::NoSpace`] and [`FsError::WriteFile`], after which what has
    /// been taken is as it was.
    pub fn write(&mut self, offset: Option<u64>, bytes: &[u8]) -> Result<(), FsError> {
        let offset = offset.unwrap_or(self.length);
        let known = self
            .length
            .checked_sub(offset)
            .ok_or(FsError::Gap { offset, received: self.length })?;
        let known = usize::try_from(known).unwrap_or(usize::MAX);
        let Some(bytes) = bytes.get(known..).filter(|bytes| !bytes.is_empty()) else {
            return Ok(());
        };
        let mut file = self.new.file();
        let written =
            file.seek(io::SeekFrom::Start(self.length)).and_then(|_| file.write_all(bytes));
        if let Err(error) = written {
            return Err(match errno::of(&error) {
                Errno::ENOSPC | Errno::EDQUOT => FsError::NoSpace(None),
                errno => FsError::WriteFile(PathError::new("write", &self.path, errno)),
            });
        }
        self.hash.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Whether the content is what the client says.
    ///
    /// # Errors
    /// [`FsError::WrongSize`], [`FsError::WrongChecksum`].
    pub fn check(&self, expected: &Expected) -> Result<(), FsError> {
        if let Some(size) = expected.size.filter(|size| *size != self.length) {
            return Err(FsError::WrongSize { expected: size, received: self.length });
        }
        let sum = self.sha256();
        if expected.sha256.is_some_and(|expected| expected != sum) {
            return Err(FsError::WrongChecksum(hex(&sum)));
        }
        Ok(())
    }

    /// Puts the file in its place; gives its tag.
    ///
    /// # Errors
    /// As [`Self::create`]; nothing has changed then, unless the target had to be written in place.
    pub fn commit(
        mut self,
        writers: &Arc<Writers>,
        options: &WriteOptions,
    ) -> Result<String, FsError> {
        // A writer of the same file is waited for, and waits for us. The target may be another file
        // by the time we have the lock.
        for _ in 0..=path::MAX_LINKS {
            let found = look(&self.path, &self.real, options)?;
            let member = found.as_ref().map(|meta| writers.join((meta.dev(), meta.ino())));
            let locked = member.as_ref().map(|member| member.lock());
            let now = look(&self.path, &self.real, options)?;
            let same = |a: &Metadata, b: &Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
            match (&found, &now) {
                (Some(found), Some(now)) if same(found, now) => {}
                (None, None) => {}
                _ => continue,
            }
            let done = self.place(now.as_ref(), options);
            drop(locked);
            match done {
                Err(FsError::Doing { error, .. })
                    if now.is_none() && error.errno == Errno::EEXIST && !options.create_only => {}
                Err(FsError::Doing { error, .. })
                    if now.is_none() && error.errno == Errno::EEXIST =>
                {
                    return Err(FsError::Exists(self.path));
                }
                other => return other,
            }
        }
        Err(FsError::OpenForWriting(PathError::new("open", &self.path, Errno::EBUSY)))
    }

    fn place(&mut self, old: Option<&Metadata>, options: &WriteOptions) -> Result<String, FsError> {
        let in_place = old.is_some_and(|old| old.nlink() > 1);
        if let (true, Some(old)) = (in_place, old) {
            return self.overwrite(old, options);
        }
        self.dress(old, options)?;
        let moved = match old {
            None => self.new.publish(&self.real),
            Some(_) => self.new.replace(&self.real),
        };
        match (moved, old) {
            (Ok(()), _) => {}
            // A mount point keeps its file.
            (Err(error), Some(old)) if errno::of(&error) == Errno::EBUSY => {
                return self.overwrite(old, options);
            }
            (Err(error), _) => return Err(doing("writing file", &self.path, "rename", &error)),
        }
        if options.fsync {
            sync_names(&self.path, &self.real, self.made)
                .map_err(|error| doing("writing file", &self.path, "fsync", &error))?;
        }
        let meta = self.new.file().metadata();
        let meta = meta.map_err(|error| doing("writing file", &self.path, "stat", &error))?;
        Ok(read::tag(&meta))
    }

    /// Gives the new file what the old one has, and what is asked for.
    fn dress(&self, old: Option<&Metadata>, options: &WriteOptions) -> Result<(), FsError> {
        let file = self.new.file();
        change_owner(file, &self.path, self.owner)?;
        if old.is_some() {
            keep_attributes(&self.real, file);
        }
        metadata::replace(file, &self.path, &options.metadata)?;
        // Last: it may forbid attributes to all but root, and a change of the owner takes setuid bits.
        if let Some(mode) = options.mode.or_else(|| old.map(Metadata::mode)) {
            let mode = Permissions::from_mode(mode & 0o7777);
            file.set_permissions(mode)
                .map_err(|error| doing("changing file mode", &self.path, "chmod", &error))?;
        }
        if options.fsync {
            file.sync_all().map_err(|error| doing("writing file", &self.path, "fsync", &error))?;
        }
        Ok(())
    }

    /// Copies the content into the file that is there.
    fn overwrite(&mut self, old: &Metadata, options: &WriteOptions) -> Result<String, FsError> {
        let failed = |op: &'static str| {
            let path = self.path.clone();
            move |error: io::Error| doing("writing file", &path, op, &error)
        };
        let mut from = self.new.file();
        from.rewind().map_err(failed("seek"))?;
        let mut to = open_in_place(&self.real).map_err(failed("open"))?;
        if super::transfer::room_for(&to, old).is_some_and(|room| room < self.length) {
            return Err(FsError::NoSpace(None));
        }
        change_owner(&to, &self.path, self.owner)?;
        io::copy(&mut from, &mut to).map_err(failed("write"))?;
        to.set_len(self.length).map_err(failed("truncate"))?;
        metadata::replace(&to, &self.path, &options.metadata)?;
        if let Some(mode) = options.mode {
            to.set_permissions(Permissions::from_mode(mode)).map_err(failed("chmod"))?;
        }
        if options.fsync {
            to.sync_all().map_err(failed("fsync"))?;
        }
        Ok(read::tag(&to.metadata().map_err(failed("stat"))?))
    }
}

/// The file that is to be replaced, if there is one and it may be.
fn look(path: &Path, real: &Path, options: &WriteOptions) -> Result<Option<Metadata>, FsError> {
    let meta = match fs::symlink_metadata(real) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return match &options.if_match {
                Some(_) => Err(FsError::Changed {
                    path: path.to_owned(),
                    now: "it does not exist".to_owned(),
                }),
                None => Ok(None),
            };
        }
        Err(error) => return Err(doing("opening file", path, "stat", &error)),
    };
    if meta.is_dir() {
        return Err(FsError::WriteOfDirectory(path.to_owned()));
    }
    if options.create_only {
        return Err(FsError::Exists(path.to_owned()));
    }
    if !meta.is_file() {
        return Err(FsError::NotRegular(path.to_owned()));
    }
    let now = read::tag(&meta);
    match &options.if_match {
        Some(tag) if *tag != now => {
            Err(FsError::Changed { path: path.to_owned(), now: format!("its tag is {now}") })
        }
        _ => Ok(Some(meta)),
    }
}

/// Where a path leads through links at its end, whether that exists or not.
pub(super) fn follow(path: &Path) -> Result<PathBuf, FsError> {
    let mut real = path.to_owned();
    for _ in 0..=path::MAX_LINKS {
        match fs::read_link(&real) {
            Ok(target) => real = real.parent().unwrap_or_else(|| Path::new("/")).join(target),
            Err(_) => return Ok(real),
        }
    }
    Err(FsError::OpenForWriting(PathError::new("open", path, Errno::ELOOP)))
}

/// Gives a file to its user.
pub(super) fn change_owner(file: &File, path: &Path, owner: (u32, u32)) -> Result<(), FsError> {
    fchown(file, Some(owner.0), Some(owner.1))
        .or_else(|error| path::tolerate_own(error, owner.0, || file.metadata()))
        .map_err(|error| FsError::ChangeOwner(PathError::io("chown", path, &error)))
}

/// Copies the attributes of a file that shall look like another, except ours, which are replaced
/// anyway, and capabilities, which writing takes away. What the file system does not take stays out.
pub(super) fn keep_attributes(from: &Path, to: &File) {
    let Ok(names) = xattr::list(from) else {
        return;
    };
    for name in names {
        let bytes = name.as_encoded_bytes();
        if bytes.starts_with(metadata::PREFIX.as_bytes()) || bytes == b"security.capability" {
            continue;
        }
        if let Ok(Some(value)) = xattr::get(from, &name)
            && let Err(error) = to.set_xattr(&name, &value)
        {
            tracing::debug!(path = %from.display(), ?name, %error, "an attribute is lost");
        }
    }
}

/// Waits until the name of a file is on the disk: in its directory, at `real`, and those of `made` new
/// directories above `path` in theirs.
pub(super) fn sync_names(path: &Path, real: &Path, made: usize) -> io::Result<()> {
    File::open(path::dir_of(real))?.sync_all()?;
    let above = path::dir_of(path);
    above.ancestors().skip(1).take(made).try_for_each(|dir| File::open(dir)?.sync_all())
}

/// Opens a file to write it in place: no link, and nothing that blocks.
fn open_in_place(path: &Path) -> io::Result<File> {
    let mut options = fs::OpenOptions::new();
    let file = options.write(true).custom_flags(CAREFULLY | libc::O_NOFOLLOW).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(Errno::EINVAL.into()),
    }
}

pub(super) fn doing(
    doing: &'static str,
    path: &Path,
    op: &'static str,
    error: &io::Error,
) -> FsError {
    FsError::Doing { doing, error: PathError::io(op, path, error) }
}

/// Bytes in hexadecimal.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Somebody may put something else in the place of a file with several names.
    #[test]
    fn nothing_but_a_file_is_written_in_place() {
        let tmp = tempfile::tempdir().unwrap();
        let at = |name: &str| tmp.path().join(name);
        fs::write(at("file"), "x").unwrap();
        nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::os::unix::fs::symlink("file", at("link")).unwrap();
        open_in_place(&at("file")).unwrap();
        for name in ["fifo", "link", "."] {
            open_in_place(&at(name)).unwrap_err();
        }
        open_in_place(Path::new("/dev/null")).unwrap_err();
    }
}
