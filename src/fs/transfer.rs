//! Whole files in.
//!
//! A client that goes away, and a daemon that is killed, must not leave half a file, and must not have
//! destroyed the old one. No name in the file system leads to the body before all of it is here:
//!
//! * The body of a **new** file goes to a file without a name ([`Unnamed`]), which gets its name at the
//!   end. E2B's clients assert what a watcher sees of an upload: CREATE, CHMOD, WRITE. A link gives
//!   CREATE alone, so the other two are caused afterwards ([`announce()`]).
//! * The body for an **existing** file waits in memory, and beyond [`MAX_BODY_IN_MEMORY`] in a file
//!   without a name. Then that becomes a file with the old one's mode and attributes and is renamed
//!   over it, so that whoever reads has the old content or the new, whole. Where that would not be the
//!   same thing, the body is copied into the old file: when it has other names (hard links), is a mount
//!   point, or lies in a directory that a client watches, to whom E2B's daemon tells a WRITE. Whether
//!   there is room for it is looked at before anything is lost.
//! * A program that **runs** cannot be written (`ETXTBSY`): it is replaced in any case.
//!
//! Nothing keeps a descriptor that can write a file under its name while the client sends: nobody could
//! execute the file for as long as that takes.
//!
//! Several uploads may write one file at a time. Their contents never mix: the path is looked up again
//! at the end, [`Writers`] lets one at a time replace the content of a file, and whoever finishes last
//! has their whole content there.

use std::{
    collections::BTreeMap,
    fs::{File, Metadata, Permissions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    sys::{stat::SFlag, statvfs::fstatvfs},
};

use super::{
    FsError, PathError,
    actor::{Actor, Rights},
    errno, metadata, path,
    resolve::{Found, Place, Walk},
    staged,
    unnamed::Unnamed,
};

mod announce;
mod body;
mod exchange;
#[cfg(test)]
mod tests;
mod writers;

pub use super::metadata::{set_metadata, validate_metadata};
use announce::announce;
pub use body::MAX_BODY_IN_MEMORY;
use body::{Body, append};
pub use writers::Writers;
use writers::{Key, Live};

/// How often a target is looked up again because others change it meanwhile.
const MAX_TRIES: usize = 256;
/// The permissions of a new file, less the umask.
const NEW_FILE: u32 = 0o666;

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

/// How a file that exists is opened to be written.
const WRITING: OFlag = OFlag::O_WRONLY.union(OFlag::O_NONBLOCK);

/// A file that is being written. Dropped without [`Writer::finish`], it leaves everything as it
/// was, except for new directories.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    /// Where the file is, links followed. Its descriptor of a file that exists keeps the inode from
    /// being given to another.
    place: Place,
    /// How many directories above it are new.
    made: usize,
    expected: Option<u64>,
    fsync: bool,
    /// The permissions of a new file, if not the usual ones.
    mode: Option<u32>,
    sink: Sink,
    /// The file that the user was found to be allowed to write.
    allowed: Option<Key>,
    writers: Arc<Writers>,
    /// Behind what it counts, so that it is dropped after it.
    _live: Live,
}

#[derive(Debug)]
enum Sink {
    /// A regular file, which exists or not, and its body.
    File(Body),
    /// A character device such as /dev/null, written at once.
    Device(File, Rights),
}

/// A file that has its content, and with whose rights it is looked at.
type Done = (File, Rights);

impl Writer {
    /// Starts to write the file at `path`, which may exist, for `actor`.
    ///
    /// # Errors
    /// [`FsError::EnsureDirectories`], [`FsError::WriteOfDirectory`], [`FsError::NotRegular`],
    /// [`FsError::NoInodes`], or the call that failed.
    pub fn create(writers: &Arc<Writers>, path: &Path, actor: &Actor) -> Result<Self, FsError> {
        let live = Live::new(writers);
        let mut made = 0;
        // Again when what was found was removed, or exchanged for a link.
        for _ in 0..MAX_TRIES {
            let place = to_be_written(path, actor)?;
            made += place.made();
            let (sink, allowed) = match place.found() {
                None => (Sink::File(Body::New(new_file(path, &place)?)), None),
                Some(found) if found.kind() == SFlag::S_IFCHR => match place.open(WRITING) {
                    Ok((file, now, rights)) if now.st_mode & libc::S_IFMT == libc::S_IFCHR => {
                        (Sink::Device(file, rights), None)
                    }
                    Ok(_) => return Err(FsError::NotRegular(path.to_owned())),
                    Err(Errno::ENOENT | Errno::ELOOP) => continue,
                    Err(errno) => return Err(open_failed(path, errno)),
                },
                // What forbids it (a read-only mount) is told before the body is sent.
                Some(_) => match may_write(path, &place)? {
                    None => continue,
                    allowed => (Sink::File(Body::default()), allowed),
                },
            };
            return Ok(Self {
                path: path.to_owned(),
                place,
                made,
                expected: None,
                fsync: false,
                mode: None,
                sink,
                allowed,
                writers: Arc::clone(writers),
                _live: live,
            });
        }
        Err(FsError::OpenForWriting(PathError::new("open", path, Errno::ELOOP)))
    }

    /// Tells how many bytes the client announced, for the message when they do not fit.
    pub fn expect_bytes(&mut self, bytes: u64) {
        self.expected = (bytes > 0).then_some(bytes);
    }

    /// Gives these permissions to a file that did not exist; one that exists keeps its own.
    pub fn mode_of_new(&mut self, mode: u32) {
        self.mode = Some(mode);
    }

    /// Makes [`Self::finish`] wait until content and name are on the disk.
    pub fn fsync(&mut self) {
        self.fsync = true;
    }

    /// Takes the next bytes of the body.
    ///
    /// # Errors
    /// [`FsError::NoSpace`] or [`FsError::WriteFile`]; the writer is then to be dropped.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), FsError> {
        let written = match &mut self.sink {
            Sink::Device(file, _) => file.write_all(bytes),
            Sink::File(body) => append(body, bytes, &self.place),
        };
        written.map_err(|error| self.write_failed(&error))
    }

    /// Ends the body: the file has its content, its owner and its metadata.
    ///
    /// # Errors
    /// [`FsError::NoSpace`] while an existing file is still intact, or the call that failed.
    pub fn finish(mut self, metadata: &BTreeMap<String, String>) -> Result<WriteInfo, FsError> {
        let nothing = Sink::File(Body::default());
        let (file, rights) = match std::mem::replace(&mut self.sink, nothing) {
            Sink::Device(file, rights) => {
                rights.act(|| metadata::replace(&file, &self.path, metadata))?;
                (file, rights)
            }
            Sink::File(body) => self.put(body, metadata)?,
        };
        Ok(WriteInfo {
            name: path::base_name(&self.path).to_string_lossy().into_owned(),
            path: self.path.to_string_lossy().into_owned(),
            metadata: rights.perform(|| metadata::read_open(&file)).unwrap_or_default(),
        })
    }

    /// Puts the body where the path leads by now: it may have been created, replaced or removed since
    /// the client began.
    fn put(
        &mut self,
        mut body: Body,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Done, FsError> {
        let actor = self.place.actor().clone();
        for _ in 0..MAX_TRIES {
            let place = to_be_written(&self.path, &actor)?;
            self.made += place.made();
            let Some(found) = place.found() else {
                match self.publish(&mut body, &place, metadata)? {
                    Some(done) => return Ok(done),
                    None => continue,
                }
            };
            // One at a time, to the end: the content and the metadata of one upload.
            let member = self.writers.join(found.key());
            let locked = member.lock();
            let place = to_be_written(&self.path, &actor)?;
            self.made += place.made();
            if place.found().map(Found::key) != Some(member.key) {
                continue;
            }
            if self.allowed != Some(member.key) && may_write(&self.path, &place)?.is_none() {
                continue;
            }
            let done = match self.exchange(&mut body, &place, metadata, false)? {
                Some(done) => done,
                None => match place.open(WRITING) {
                    Ok((file, now, rights)) if (now.st_dev, now.st_ino) == member.key => {
                        self.overwrite(&mut body, &file, &rights, metadata)?;
                        (file, rights)
                    }
                    Ok(_) | Err(Errno::ENOENT | Errno::ELOOP) => continue,
                    // A program that runs, with other names or before a watcher.
                    Err(Errno::ETXTBSY) => {
                        match self.exchange(&mut body, &place, metadata, true)? {
                            Some(done) => done,
                            None => return Err(open_failed(&self.path, Errno::ETXTBSY)),
                        }
                    }
                    Err(errno) => return Err(open_failed(&self.path, errno)),
                },
            };
            drop(locked);
            if self.fsync {
                place.sync_names(self.made).map_err(|error| self.write_failed(&error))?;
            }
            return Ok(done);
        }
        Err(FsError::OpenForWriting(PathError::new("open", &self.path, Errno::EBUSY)))
    }

    /// Gives a new file its name; none when something else has it by now, or the directory is gone.
    fn publish(
        &self,
        body: &mut Body,
        place: &Place,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Option<Done>, FsError> {
        let rights = place.rights().clone();
        if !matches!(body, Body::New(_)) {
            // The old file was removed meanwhile.
            let new = new_file(&self.path, place)?;
            body.copy_to(&mut new.file()).map_err(|error| self.write_failed(&error))?;
            *body = Body::New(new);
        }
        let Body::New(new) = &mut *body else { return Ok(None) };
        rights.act(|| metadata::replace(new.file(), &self.path, metadata))?;
        if let Some(mode) = self.mode {
            let changed = rights.act(|| new.file().set_permissions(Permissions::from_mode(mode)));
            changed.map_err(|error| self.write_failed(&error))?;
        }
        if self.fsync {
            // First: the name must not lead to less.
            new.file().sync_all().map_err(|error| self.write_failed(&error))?;
        }
        match new.publish(place.dir(), &rights, place.name()) {
            Ok(()) => {}
            Err(Errno::EEXIST | Errno::ENOENT) => return Ok(None),
            Err(errno) => return Err(open_failed(&self.path, errno)),
        }
        announce(place, new.file());
        if self.fsync {
            place.sync_names(self.made).map_err(|error| self.write_failed(&error))?;
        }
        let file = new.file().try_clone().map_err(|error| self.write_failed(&error))?;
        Ok(Some((file, rights)))
    }

    /// Copies the body into the file that is there.
    fn overwrite(
        &self,
        body: &mut Body,
        file: &File,
        rights: &Rights,
        metadata: &BTreeMap<String, String>,
    ) -> Result<(), FsError> {
        let old = file.metadata().map_err(|error| self.write_failed(&error))?;
        let wanted = body.length().map_err(|error| self.write_failed(&error))?;
        if room_for(file, &old).is_some_and(|room| room < wanted) {
            return Err(FsError::NoSpace(self.expected));
        }
        self.prepare_in_place(file, rights)?;
        // With the user's rights, if those opened the file: the kernel then takes set-uid bits away
        // that the user could not.
        let write = || -> io::Result<()> {
            let mut file = file;
            // Files of /proc and /sys are empty to the eye, and not all can be truncated.
            if old.len() > 0 {
                file.set_len(0)?;
            }
            body.copy_to(&mut file)
        };
        rights.act(write).map_err(|error| self.write_failed(&error))?;
        rights.act(|| metadata::replace(file, &self.path, metadata))?;
        if self.fsync {
            file.sync_all().map_err(|error| self.write_failed(&error))?;
        }
        Ok(())
    }

    fn write_failed(&self, error: &io::Error) -> FsError {
        match errno::of(error) {
            Errno::ENOSPC | Errno::EDQUOT => FsError::NoSpace(self.expected),
            errno => FsError::WriteFile(PathError::new("write", &self.path, errno)),
        }
    }
}

/// Walks to the file that is to be written, and makes the missing directories above it.
fn to_be_written(path: &Path, actor: &Actor) -> Result<Place, FsError> {
    let place = Walk::new(actor).make_parents().to(path).map_err(|error| match error.at_last {
        true => error.or_busy(|error| open_failed(path, error.errno)),
        false => FsError::ensuring(error.of_making_directories()),
    })?;
    match place.is_nameless() || place.found().is_some_and(Found::is_dir) {
        true => Err(FsError::WriteOfDirectory(path.to_owned())),
        false => Ok(place),
    }
}

/// A file without a name that belongs to the user.
fn new_file(path: &Path, place: &Place) -> Result<Unnamed, FsError> {
    let rights = place.rights();
    let new = Unnamed::create(place.dir(), rights, NEW_FILE);
    let new = new.map_err(|errno| open_failed(path, errno))?;
    rights.act(|| staged::give_to_user(new.file(), path, rights))?;
    Ok(new)
}

/// Which file it is that the user may write; none when it is gone. It is opened for that and closed
/// again: a program that runs is `ETXTBSY` only behind the check of the permissions.
fn may_write(path: &Path, place: &Place) -> Result<Option<Key>, FsError> {
    let Some(found) = place.found() else { return Ok(None) };
    if !found.is_file() {
        return Err(FsError::NotRegular(path.to_owned()));
    }
    match place.open(WRITING) {
        Ok((_, now, _)) if now.st_mode & libc::S_IFMT != libc::S_IFREG => {
            Err(FsError::NotRegular(path.to_owned()))
        }
        Ok((_, now, _)) => Ok(Some((now.st_dev, now.st_ino))),
        Err(Errno::ETXTBSY) => Ok(Some(found.key())),
        Err(Errno::ENOENT | Errno::ELOOP) => Ok(None),
        Err(errno) => Err(open_failed(path, errno)),
    }
}

fn open_failed(path: &Path, errno: Errno) -> FsError {
    let error = PathError::new("open", path, errno);
    match errno {
        Errno::EISDIR => FsError::WriteOfDirectory(path.to_owned()),
        Errno::ENOSPC | Errno::EDQUOT => FsError::NoInodes(error),
        _ => FsError::OpenForWriting(error),
    }
}

/// The bytes that the file can grow to, with its old content gone; none where that is unknown.
pub(super) fn room_for(file: &File, old: &Metadata) -> Option<u64> {
    let space = fstatvfs(file).ok().filter(|space| space.blocks() > 0)?;
    // The reserve of the file system is root's.
    let root = nix::unistd::geteuid().is_root();
    let blocks = if root { space.blocks_free() } else { space.blocks_available() };
    let own = old.blocks().saturating_mul(512);
    Some(blocks.saturating_mul(space.fragment_size()).saturating_add(own))
}
