//! What can go wrong with files, in the words that clients of E2B's daemon know.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use nix::errno::Errno;

use super::{actor::RightsRefused, compose::ComposeError, errno};
use crate::{
    blocking::{Busy, MountBusy},
    quote,
};

mod kind;

pub use kind::Kind;

/// A failed system call on a path, printed as Go prints it: `lstat /x: no such file or directory`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathError {
    /// The call.
    pub op: &'static str,
    /// Its path.
    pub path: PathBuf,
    /// Its error.
    pub errno: Errno,
}

impl PathError {
    pub(super) fn new(op: &'static str, path: &Path, errno: Errno) -> Self {
        Self { op, path: path.to_owned(), errno }
    }

    /// From an error of the standard library.
    pub fn io(op: &'static str, path: &Path, error: &io::Error) -> Self {
        Self::new(op, path, errno::of(error))
    }
}

impl fmt::Display for PathError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.op, quote::path(&self.path), errno::text(self.errno))
    }
}

impl std::error::Error for PathError {}

/// A failed rename, printed as Go prints it: `rename /a /b: file exists`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RenameError {
    /// The source.
    pub from: PathBuf,
    /// The destination.
    pub to: PathBuf,
    /// The error.
    pub errno: Errno,
}

impl fmt::Display for RenameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (from, to) = (quote::path(&self.from), quote::path(&self.to));
        write!(f, "rename {from} {to}: {}", errno::text(self.errno))
    }
}

impl std::error::Error for RenameError {}

/// Why an operation on files failed. The message is what clients see.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// `~name` is not expanded. (Upstream prints the path empty.)
    #[error("failed to expand path '' for user '{0}': cannot expand user-specific home dir")]
    ExpandHome(String),
    /// The path holds a NUL byte, which no path can.
    #[error("path {:?} contains a NUL byte", quote::text(.0))]
    NulByte(String),
    /// The path is longer than the kernel takes one.
    #[error("path '{}': {}", quote::text(.0), errno::text(Errno::ENAMETOOLONG))]
    PathTooLong(String),

    /// A part of the path to be made is a file.
    #[error("path is a file: {}", quote::path(.0))]
    PathIsFile(PathBuf),
    /// A part of the path to be made could not be looked at.
    #[error("failed to stat directory: {0}")]
    StatDirectory(PathError),
    /// A directory could not be made.
    #[error("failed to create directory: {0}")]
    CreateDirectory(PathError),
    /// A new directory could not be given to its user.
    #[error("failed to chown directory: {0}")]
    ChownDirectory(PathError),
    /// The directories above an uploaded file could not be made.
    #[error("error ensuring directories: {0}")]
    EnsureDirectories(Box<FsError>),

    /// There is no such file.
    #[error("file not found: {0}")]
    FileNotFound(PathError),
    /// The file could not be looked at.
    #[error("error getting file info: {0}")]
    FileInfo(PathError),
    /// The directory to be made exists.
    #[error("directory already exists: {}", quote::path(.0))]
    DirectoryExists(PathBuf),
    /// What was to become a directory is a file.
    #[error("path already exists but it is not a directory: {}", quote::path(.0))]
    ExistsAsFile(PathBuf),
    /// There is nothing to move.
    #[error("source file not found: {0}")]
    SourceNotFound(RenameError),
    /// The move failed.
    #[error("error renaming: {0}")]
    Rename(RenameError),
    /// There is no such path to list.
    #[error("path not found: {0}")]
    PathNotFound(PathError),
    /// The path to list has too many symbolic links.
    #[error("cyclic symlink or chain >255 links at \"{}\"", quote::path(.0))]
    SymlinkLoop(PathBuf),
    /// The path to list could not be resolved.
    #[error("error resolving symlink: {0}")]
    ResolveSymlink(PathError),
    /// The path to list is not a directory.
    #[error("path is not a directory: {}", quote::path(.0))]
    NotADirectory(PathBuf),
    /// A directory could not be read.
    #[error("error reading directory {}: {error}", quote::path(.root))]
    ReadDirectory {
        /// The directory that was to be listed.
        root: PathBuf,
        /// The call that failed, at or below it.
        error: PathError,
    },
    /// A listing would be longer than this daemon answers.
    #[error("directory {}: more than {limit} entries; list it with a smaller depth", quote::path(.path))]
    TooManyEntries {
        /// The directory that was to be listed.
        path: PathBuf,
        /// The bound.
        limit: usize,
    },
    /// Nobody waits for the listing any more.
    #[error("directory {}: the caller has left", quote::path(.0))]
    ListingAbandoned(PathBuf),
    /// The root directory is not removed.
    #[error("error removing file or directory: {}: refusing to remove the root directory", quote::path(.0))]
    RemoveRoot(PathBuf),
    /// A mount is not removed: everything in it would be, and then itself could not.
    #[error("error removing file or directory: {}: refusing to remove a mount point", quote::path(.0))]
    RemoveMount(PathBuf),
    /// The removal failed.
    #[error("error removing file or directory: {0}")]
    Remove(PathError),
    /// What to go on with was not given by a listing.
    #[error("page_token: this listing gave no such token")]
    PageToken,

    /// A call of our own failed.
    #[error("error {doing}: {error}")]
    Doing {
        /// What was being done.
        doing: &'static str,
        /// The call that failed.
        error: PathError,
    },
    /// What is to be made exists.
    #[error("path already exists: {}", quote::path(.0))]
    Exists(PathBuf),
    /// The file is not in the state that the caller knows.
    #[error("path '{}' is not as if_match says: {now}", quote::path(.path))]
    Changed {
        /// The file.
        path: PathBuf,
        /// What it is.
        now: String,
    },
    /// Neither a user nor a group of this name, nor a number.
    #[error("{field}: unknown {field} '{}'", quote::text(.name))]
    UnknownOwner {
        /// The field of the request.
        field: &'static str,
        /// Its value.
        name: String,
    },
    /// A field of a request that cannot be right.
    #[error("{field}: {why}")]
    BadField {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A tree has more levels than this daemon descends.
    #[error("{}: more than {limit} levels of directories", quote::path(.path))]
    TooDeep {
        /// The directory that was too deep.
        path: PathBuf,
        /// The bound.
        limit: usize,
    },
    /// A device or socket cannot be copied or unpacked.
    #[error("{}: a device or socket; only copied with `preserve`", quote::path(.0))]
    Special(PathBuf),
    /// Nobody waits for the work any more.
    #[error("{}: the caller has left", quote::path(.0))]
    Abandoned(PathBuf),
    /// A directory cannot be copied into itself.
    #[error("cannot copy {} into itself, {}", quote::path(.0), quote::path(.1))]
    IntoItself(PathBuf, PathBuf),

    /// A part of an upload lies behind what has come.
    #[error("chunk.offset: {offset} is beyond the {received} bytes that have come")]
    Gap {
        /// The place of the part.
        offset: u64,
        /// The bytes that have come.
        received: u64,
    },
    /// An upload does not have the announced size.
    #[error("commit.size: {received} bytes have come, not {expected}")]
    WrongSize {
        /// As announced.
        expected: u64,
        /// As it is.
        received: u64,
    },
    /// An upload does not have the announced checksum.
    #[error("commit.sha256: what has come has another: {0}")]
    WrongChecksum(String),
    /// The upload is in use.
    #[error("upload_id: upload '{0}' is under way in another call")]
    UploadInUse(String),
    /// The upload is another one's.
    #[error("upload_id: upload '{0}' is of another path or user")]
    UploadOfAnother(String),
    /// As many uploads as this daemon keeps.
    #[error("upload_id: {0} uploads are kept already; commit or continue one of them")]
    TooManyUploads(usize),

    /// An entry of an archive would lie outside of where it is unpacked.
    #[error("error extracting: entry '{}' leads out of the target", quote::path(.0))]
    Escapes(PathBuf),
    /// What was sent is no archive.
    #[error("error extracting: {0}")]
    BadArchive(String),
    /// An archive could not be sent.
    #[error("error archiving {}: {why}", quote::path(.path))]
    Archive {
        /// The file that was being archived.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// The sources of a composed file and the file itself; the words are upstream's.
    #[error("{0}")]
    Compose(ComposeError),

    /// There is no such file to read.
    #[error("path '{}' does not exist", quote::path(.0))]
    NotThere(PathBuf),
    /// The file to read could not be looked at.
    #[error("error checking if path exists '{}': {error}", quote::path(&.error.path))]
    CheckPath {
        /// The call that failed.
        error: PathError,
    },
    /// A directory cannot be read as a file.
    #[error("path '{}' is a directory", quote::path(.0))]
    ReadOfDirectory(PathBuf),
    /// A device, FIFO or socket cannot be transferred.
    #[error("path '{}' is not a regular file", quote::path(.0))]
    NotRegular(PathBuf),
    /// The file could not be opened for reading.
    #[error("error opening file '{}': {error}", quote::path(&.error.path))]
    OpenForReading {
        /// The call that failed.
        error: PathError,
    },

    /// A directory cannot be written as a file.
    #[error("path is a directory: {}", quote::path(.0))]
    WriteOfDirectory(PathBuf),
    /// The file could not be given to its user.
    #[error("error changing file ownership: {0}")]
    ChangeOwner(PathError),
    /// No inode for a new file.
    #[error("not enough inodes available: {0}")]
    NoInodes(PathError),
    /// The file could not be opened for writing.
    #[error("error opening file: {0}")]
    OpenForWriting(PathError),
    /// No room for the content.
    #[error("{}not enough disk space available", attempted(*.0))]
    NoSpace(Option<u64>),
    /// The content could not be written.
    #[error("error writing file: {0}")]
    WriteFile(PathError),
    /// The metadata that was sent is not allowed.
    #[error("invalid metadata: {0}")]
    InvalidMetadata(String),
    /// No room for the metadata.
    #[error("not enough space for file metadata: {0}")]
    NoSpaceForMetadata(PathError),
    /// The metadata could not be written.
    #[error("error writing file metadata: {0}")]
    WriteMetadata(PathError),

    /// There is no such path to watch.
    #[error("path {} not found: {error}", quote::path(&.error.path))]
    WatchNotFound {
        /// The call that failed.
        error: PathError,
    },
    /// The path to watch could not be looked at.
    #[error("error statting path {}: {error}", quote::path(&.error.path))]
    WatchStat {
        /// The call that failed.
        error: PathError,
    },
    /// Only directories are watched.
    #[error("path {} not a directory", quote::path(.0))]
    WatchNotDirectory(PathBuf),
    /// inotify is silent about what other machines do.
    #[error("cannot watch path on network filesystem: {}", quote::path(.0))]
    WatchNetwork(PathBuf),
    /// The file system of the path to watch could not be told.
    #[error("error checking mount status: {0}")]
    WatchMount(PathError),
    /// The watching thread could not be started, or has ended.
    #[error("error creating watcher: {0}")]
    WatchStart(String),
    /// The kernel did not take the watch.
    #[error("error adding path {} to watcher: {}", quote::path(.path), errno::text(*.errno))]
    WatchAdd {
        /// The path.
        path: PathBuf,
        /// Why.
        errno: Errno,
    },
    /// A recursive watch would hold more directories than this daemon watches.
    #[error("error adding path {} to watcher: more than {limit} directories are watched", quote::path(.path))]
    TooManyDirectories {
        /// The path.
        path: PathBuf,
        /// The bound.
        limit: usize,
    },
    /// The daemon could not take on the user's rights.
    #[error(transparent)]
    RightsRefused(#[from] RightsRefused),
    /// The work could not be done where it may block.
    #[error(transparent)]
    Blocking(Busy),
    /// The mount on which the work would go on does not answer.
    #[error(transparent)]
    MountBusy(#[from] MountBusy),
    /// No such polled watcher.
    #[error("watcher with id {0} not found")]
    WatcherNotFound(String),
    /// As many polled watchers as this daemon keeps.
    #[error("more than {0} watchers; remove one that is no longer polled")]
    TooManyWatchers(usize),
    /// As many watchers on network file systems as this daemon keeps.
    #[error("more than {0} watchers on network file systems; remove one")]
    TooManyNetworkWatchers(usize),
    /// As many watches with cursors as this daemon keeps, all with a stream.
    #[error("more than {0} watches with cursors; end one, or watch without")]
    TooManyCursors(usize),
    /// No daemon gave out such a cursor for this watcher.
    #[error("from_cursor: '{}' is no cursor of this watcher", quote::text(.0))]
    BadCursor(String),
    /// The cursor is of a watch of another directory, or with other options.
    #[error("from_cursor: '{}' is of a watch of {} with its own options", quote::text(.cursor), quote::path(.path))]
    OtherCursor {
        /// The cursor.
        cursor: String,
        /// What that watches.
        path: PathBuf,
    },
}

impl FsError {
    /// The error of making the directories above a file that is to be written. A mount that does not
    /// answer is told as such.
    pub(super) fn ensuring(error: Self) -> Self {
        match error {
            busy @ Self::MountBusy(_) => busy,
            error => Self::EnsureDirectories(Box::new(error)),
        }
    }
}

impl From<Busy> for FsError {
    fn from(busy: Busy) -> Self {
        match busy {
            Busy::Mount(mount) => Self::MountBusy(mount),
            busy => Self::Blocking(busy),
        }
    }
}

fn attempted(bytes: Option<u64>) -> String {
    bytes.map_or_else(String::new, |n| format!("attempted to write {n} bytes: "))
}
