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
    fs::{File, Permissions},
    io::{self, Seek, Write},
    os::unix::fs::{PermissionsExt, fchown},
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{errno::Errno, fcntl::OFlag};
use sha2::{Digest, Sha256};

use super::{
    FsError, PathError,
    actor::{Actor, Rights},
    errno, metadata, path, privileges, read,
    resolve::{self, Found, Place, Walk},
    transfer::Writers,
    unnamed::Unnamed,
};

/// How often a target is looked up again because others change it meanwhile.
const MAX_TRIES: usize = 256;

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
    /// How many directories above it are new.
    made: usize,
    actor: Actor,
    new: Unnamed,
    length: u64,
    hash: Sha256,
}

impl Staged {
    /// Starts to write what is to be at `path`, for `actor`. The target is looked at already, so
    /// that what cannot be is told before the content is sent.
    ///
    /// # Errors
    /// [`FsError::EnsureDirectories`], [`FsError::WriteOfDirectory`], [`FsError::NotRegular`],
    /// [`FsError::Exists`], [`FsError::Changed`], or the call that failed.
    pub fn create(path: &Path, actor: &Actor, options: &WriteOptions) -> Result<Self, FsError> {
        metadata::validate_metadata(&options.metadata)?;
        if path.as_os_str().as_encoded_bytes().ends_with(b"/") {
            return Err(FsError::WriteOfDirectory(path.to_owned()));
        }
        let place = target(path, actor, true)?;
        look(path, &place, options)?;
        let new = Unnamed::create(place.dir(), place.rights(), 0o666)
            .map_err(|errno| doing("opening file", path, "open", &errno.into()))?;
        let (length, hash, made) = (0, Sha256::new(), place.made());
        Ok(Self { path: path.to_owned(), made, actor: actor.clone(), new, length, hash })
    }

    /// The path that it is for.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The user that it is for.
    pub fn owner(&self) -> u32 {
        self.actor.uid()
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

    /// Puts the file in its place.
    ///
    /// # Errors
    /// As [`Self::create`]; nothing has changed then, unless the target had to be written in place.
    pub fn commit(
        mut self,
        writers: &Arc<Writers>,
        options: &WriteOptions,
    ) -> Result<Committed, FsError> {
        // A writer of the same file is waited for, and waits for us. The target may be another file
        // by the time we have the lock.
        for _ in 0..MAX_TRIES {
            // The path as it leads now: what was begun may have waited for minutes.
            let place = target(&self.path, &self.actor, false)?;
            look(&self.path, &place, options)?;
            let member = place.found().map(|found| writers.join(found.key()));
            let locked = member.as_ref().map(|member| member.lock());
            let now = target(&self.path, &self.actor, false)?;
            look(&self.path, &now, options)?;
            if place.found().map(Found::key) != now.found().map(Found::key) {
                continue;
            }
            let done = self.place(&now, options);
            drop(locked);
            match done {
                Err(FsError::Doing { error, .. })
                    if now.found().is_none()
                        && error.errno == Errno::EEXIST
                        && !options.create_only => {}
                Err(FsError::Doing { error, .. })
                    if now.found().is_none() && error.errno == Errno::EEXIST =>
                {
                    return Err(FsError::Exists(self.path));
                }
                Err(error) => return Err(error),
                Ok(Some((file, rights))) => return Committed::new(file, rights, &self.path),
                Ok(None) => {
                    let rights = now.rights().clone();
                    return Committed::new(self.new.into_file(), rights, &self.path);
                }
            }
        }
        Err(FsError::OpenForWriting(PathError::new("open", &self.path, Errno::EBUSY)))
    }

    /// Gives the new file its name; or, where that would not be the same thing, writes the old one and
    /// returns it.
    fn place(
        &mut self,
        place: &Place,
        options: &WriteOptions,
    ) -> Result<Option<(File, Rights)>, FsError> {
        let old = place.found();
        if old.is_some_and(|old| old.stat.st_nlink > 1) {
            match self.overwrite(place, options) {
                // A program that runs cannot be written: only this name gets another file.
                Err(FsError::Doing { error, .. }) if error.errno == Errno::ETXTBSY => {}
                written => return written.map(Some),
            }
        }
        if !self.prepare(place, options)? {
            return self.overwrite(place, options).map(Some);
        }
        let (dir, rights, name) = (place.dir(), place.rights(), place.name());
        let moved = match old {
            None => self.new.publish(dir, rights, name),
            Some(_) => self.new.replace(dir, rights, name),
        };
        match (moved, old) {
            (Ok(()), _) => {}
            // A mount point keeps its file.
            (Err(Errno::EBUSY), Some(_)) => return self.overwrite(place, options).map(Some),
            (Err(error), _) => {
                return Err(doing("writing file", &self.path, "rename", &error.into()));
            }
        }
        if options.fsync {
            place
                .sync_names(self.made)
                .map_err(|error| doing("writing file", &self.path, "fsync", &error))?;
        }
        Ok(None)
    }

    /// Gives the new file what the old one has, and what is asked for. False when it cannot have a
    /// label of the old one.
    fn prepare(&self, place: &Place, options: &WriteOptions) -> Result<bool, FsError> {
        let (file, rights) = (self.new.file(), place.rights());
        rights.act(|| give_to_user(file, &self.path, rights))?;
        if let Some(old) = place.found()
            && let Ok((from, stat, rights)) = place.open(OFlag::O_RDONLY | OFlag::O_NONBLOCK)
            && (stat.st_dev, stat.st_ino) == old.key()
            && rights.perform(|| privileges::keep_attributes(&from, file)) == Some(false)
        {
            return Ok(false);
        }
        rights.act(|| {
            metadata::replace(file, &self.path, &options.metadata)?;
            // Last: it may forbid attributes to all but root, and a change of the owner takes setuid
            // bits, which only the request can give.
            let kept = place.found().map(|old| privileges::kept_mode(old.stat.st_mode));
            if let Some(mode) = options.mode.or(kept) {
                file.set_permissions(Permissions::from_mode(mode & 0o7777))
                    .map_err(|error| doing("changing file mode", &self.path, "chmod", &error))?;
            }
            Ok::<_, FsError>(())
        })?;
        if options.fsync {
            file.sync_all().map_err(|error| doing("writing file", &self.path, "fsync", &error))?;
        }
        Ok(true)
    }

    /// Copies the content into the file that is there.
    fn overwrite(
        &mut self,
        place: &Place,
        options: &WriteOptions,
    ) -> Result<(File, Rights), FsError> {
        let failed = |op: &'static str| {
            let path = self.path.clone();
            move |error: io::Error| doing("writing file", &path, op, &error)
        };
        let mut from = self.new.file();
        from.rewind().map_err(failed("seek"))?;
        let (mut to, stat, rights) = place
            .open(OFlag::O_WRONLY | OFlag::O_NONBLOCK)
            .map_err(|errno| failed("open")(errno.into()))?;
        if stat.st_mode & libc::S_IFMT != libc::S_IFREG {
            return Err(failed("open")(Errno::EINVAL.into()));
        }
        let old = to.metadata().map_err(failed("stat"))?;
        if super::transfer::room_for(&to, &old).is_some_and(|room| room < self.length) {
            return Err(FsError::NoSpace(None));
        }
        rights.act(|| {
            give_existing_to_user(&to, &self.path, &rights)?;
            privileges::clear(&to, rights.switched() || !nix::unistd::geteuid().is_root())
                .map_err(|errno| failed("chmod")(errno.into()))?;
            io::copy(&mut from, &mut to).map_err(failed("write"))?;
            to.set_len(self.length).map_err(failed("truncate"))?;
            metadata::replace(&to, &self.path, &options.metadata)?;
            if let Some(mode) = options.mode {
                to.set_permissions(Permissions::from_mode(mode)).map_err(failed("chmod"))?;
            }
            Ok::<_, FsError>(())
        })?;
        if options.fsync {
            to.sync_all().map_err(failed("fsync"))?;
        }
        Ok((to, rights))
    }
}

/// A file that was written.
#[derive(Debug)]
pub struct Committed {
    /// Its [`read::tag`].
    pub tag: String,
    /// The file.
    pub file: File,
    /// The rights with which it is looked at.
    pub rights: Rights,
}

impl Committed {
    fn new(file: File, rights: Rights, path: &Path) -> Result<Self, FsError> {
        let meta = file.metadata();
        let meta = meta.map_err(|error| doing("writing file", path, "stat", &error))?;
        Ok(Self { tag: read::tag(&meta), file, rights })
    }
}

/// Walks to what is to be written; with `make` the missing directories above it are made.
fn target(path: &Path, actor: &Actor, make: bool) -> Result<Place, FsError> {
    let walk = Walk::new(actor).max_links(path::MAX_LINKS);
    let walk = if make { walk.make_parents() } else { walk };
    let place = walk.to(path).map_err(|error| match error.at_last {
        true => error.or_busy(|error| {
            let loops = error.step == resolve::Step::TooManyLinks;
            let (doing, op) =
                if loops { ("opening file", "open") } else { ("opening file", "stat") };
            FsError::Doing { doing, error: PathError::new(op, path, error.errno) }
        }),
        false => FsError::ensuring(error.of_making_directories()),
    })?;
    match place.is_nameless() {
        true => Err(FsError::WriteOfDirectory(path.to_owned())),
        false => Ok(place),
    }
}

/// Checks the file that is to be replaced, if there is one.
fn look(path: &Path, place: &Place, options: &WriteOptions) -> Result<(), FsError> {
    let Some(found) = place.found() else {
        return match &options.if_match {
            Some(_) => {
                Err(FsError::Changed { path: path.to_owned(), now: "it does not exist".to_owned() })
            }
            None => Ok(()),
        };
    };
    if found.is_dir() {
        return Err(FsError::WriteOfDirectory(path.to_owned()));
    }
    if options.create_only {
        return Err(FsError::Exists(path.to_owned()));
    }
    if !found.is_file() {
        return Err(FsError::NotRegular(path.to_owned()));
    }
    let now = read::tag_of(&found.stat);
    match &options.if_match {
        Some(tag) if *tag != now => {
            Err(FsError::Changed { path: path.to_owned(), now: format!("its tag is {now}") })
        }
        _ => Ok(()),
    }
}

/// Gives a file to its user.
pub(super) fn change_owner(file: &File, path: &Path, owner: (u32, u32)) -> Result<(), FsError> {
    fchown(file, Some(owner.0), Some(owner.1))
        .or_else(|error| path::tolerate_own(error, owner.0, || file.metadata()))
        .map_err(|error| FsError::ChangeOwner(PathError::io("chown", path, &error)))
}

/// As [`change_owner`], for a file that is written with these rights. With the user's own rights a
/// file of another's stays theirs, as for any program of the user.
pub(super) fn give_to_user(file: &File, path: &Path, rights: &Rights) -> Result<(), FsError> {
    match change_owner(file, path, rights.actor().owner()) {
        Err(FsError::ChangeOwner(error)) if rights.switched() && error.errno == Errno::EPERM => {
            Ok(())
        }
        other => other,
    }
}

/// As [`give_to_user`], for a file that was there before. A daemon without root writes what its user may
/// write, and leaves it to whoever owns it.
pub(super) fn give_existing_to_user(
    file: &File,
    path: &Path,
    rights: &Rights,
) -> Result<(), FsError> {
    match give_to_user(file, path, rights) {
        Err(FsError::ChangeOwner(error))
            if error.errno == Errno::EPERM
                && nix::unistd::geteuid().as_raw() == rights.actor().uid() =>
        {
            Ok(())
        }
        other => other,
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
