//! Watching directories.
//!
//! One inotify instance serves the whole daemon, whatever the number of watchers: the kernel
//! allows a user 128. Its thread (`thread`) owns the table of who watches what (`tree`), turns
//! the kernel's events into theirs (`events`) and compares all files after an overflow
//! (`rescan`, with what it knew: `known`); watchers have a bounded queue each (`queue`).
//!
//! What holds for every watcher: it is set when [`Hub::watch`] returns, and every later change is
//! told; a recursive one tells a CREATE for everything in a directory that appears, once; nothing
//! that happens in the file system ends it, only its owner does.

mod covered;
mod events;
mod known;
mod queue;
mod rescan;
#[cfg(test)]
mod tests;
mod thread;
mod tree;

use std::{
    collections::HashMap,
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{errno::Errno, sys::statfs::statfs};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use self::{
    covered::{Cover, Covered},
    queue::Queue,
    thread::{Command, Shared},
};
pub use self::{
    events::MAX_EVENTS_AT_ONCE, known::MAX_KNOWN_NAMES, queue::MAX_QUEUED_EVENTS,
    tree::MAX_WATCHED_DIRS,
};
use super::{FsError, PathError, entry::Entry};
use crate::{blocking::Pool, guest::users::Users};

/// The watchers that clients poll: they live until they are removed, whether polled or not.
pub const MAX_POLLED_WATCHERS: usize = 1024;

/// The file systems on which others make changes that inotify does not tell: statfs(2) types of
/// NFS, CIFS, SMB, SMB2 and FUSE.
const NETWORK: [i128; 5] = [0x6969, 0xff53_4d42, 0x517b, 0xfe53_4d42, 0x6573_5546];

/// How a directory is watched.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WatchOptions {
    /// With all directories below it.
    pub recursive: bool,
    /// Look at the file for each CREATE, WRITE and CHMOD.
    pub include_entry: bool,
    /// Watch on network file systems too, where changes made elsewhere are not told.
    pub allow_network_mounts: bool,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WatchKind {
    /// It appeared: made, or moved here.
    Create,
    /// Its content changed.
    Write,
    /// It was removed.
    Remove,
    /// It was moved away.
    Rename,
    /// Its mode, owner, times or attributes changed.
    Chmod,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchEvent {
    /// The path below the watched directory, which itself is `.`.
    pub name: String,
    /// What happened.
    pub kind: WatchKind,
    /// The file as it was when the event was taken from the kernel, if it was asked for and was
    /// still there.
    pub entry: Option<Entry>,
}

/// All watching of the daemon.
#[derive(Debug)]
pub struct Hub {
    shared: Arc<Shared>,
    covered: Arc<Covered>,
    polled: Mutex<HashMap<String, Watcher>>,
    files: Arc<Pool>,
}

/// One watch; dropping it ends it.
#[derive(Debug)]
pub struct Watcher {
    id: u64,
    shared: Arc<Shared>,
    queue: Arc<Queue>,
    _cover: Cover,
}

impl Watcher {
    /// The next event. None only when the watching thread has failed, which is logged.
    pub async fn next(&mut self) -> Option<WatchEvent> {
        self.queue.next().await
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.shared.send(Command::Remove(self.id));
    }
}

impl Hub {
    /// A hub without watchers: nothing runs yet. Paths are looked at on `files`.
    pub fn new(users: Arc<Users>, files: Arc<Pool>) -> Arc<Self> {
        let (shared, covered) = (Arc::new(Shared::new(users)), Arc::default());
        Arc::new(Self { shared, covered, polled: Mutex::default(), files })
    }

    /// Whether a change in `dir` is told to a watcher. It may block.
    pub fn covers(&self, dir: &Path) -> bool {
        self.covered.has(dir)
    }

    /// Watches a directory. When this returns, the watch is set.
    ///
    /// # Errors
    /// The `Watch*` errors of [`FsError`], and [`FsError::TooManyDirectories`].
    pub async fn watch(&self, path: &Path, options: WatchOptions) -> Result<Watcher, FsError> {
        let path = path.to_owned();
        // A network mount can take its time to answer; neither an async worker nor the watching
        // thread, which serves everyone, shall wait for it.
        let path = self.files.run(move || check(&path, options).map(|()| path)).await??;
        let queue = Arc::new(Queue::default());
        // Before the command is sent: if this future is dropped, the watch goes with it.
        let id = self.shared.next_id();
        let cover = self.covered.add(id, &path, options.recursive);
        let (shared, told) = (Arc::clone(&self.shared), Arc::clone(&queue));
        let watcher = Watcher { id, shared, queue: told, _cover: cover };
        let (done, added) = oneshot::channel();
        self.shared.send_or_start(Command::Add { id, path, options, queue, done })?;
        match added.await {
            Ok(result) => result.map(|()| watcher),
            Err(_) => Err(FsError::WatchStart("the watching thread has ended".to_owned())),
        }
    }

    /// Watches a directory for a client who will ask for the events; returns the watcher's id.
    ///
    /// # Errors
    /// As [`Self::watch`], and [`FsError::TooManyWatchers`].
    pub async fn create_polled(
        &self,
        path: &Path,
        options: WatchOptions,
    ) -> Result<String, FsError> {
        let full = || FsError::TooManyWatchers(MAX_POLLED_WATCHERS);
        if self.polled.lock().len() >= MAX_POLLED_WATCHERS {
            return Err(full());
        }
        let id = new_id()?;
        let watcher = self.watch(path, options).await?;
        let mut polled = self.polled.lock();
        if polled.len() >= MAX_POLLED_WATCHERS {
            return Err(full());
        }
        polled.insert(id.clone(), watcher);
        Ok(id)
    }

    /// Takes the events of a polled watcher: all that happened before this call, and perhaps some
    /// of what happens during it.
    ///
    /// # Errors
    /// [`FsError::WatcherNotFound`].
    pub async fn take_events(&self, id: &str) -> Result<Vec<WatchEvent>, FsError> {
        let queue = || {
            let polled = self.polled.lock();
            let watcher = polled.get(id).ok_or_else(|| FsError::WatcherNotFound(id.to_owned()))?;
            Ok::<_, FsError>(Arc::clone(&watcher.queue))
        };
        let queue = queue()?;
        let (done, flushed) = oneshot::channel();
        self.shared.send(Command::Flush(done));
        // An error says that there is no thread, and so nothing to wait for.
        let _ = flushed.await;
        Ok(queue.take_all())
    }

    /// Ends a polled watcher.
    ///
    /// # Errors
    /// [`FsError::WatcherNotFound`].
    pub fn remove_polled(&self, id: &str) -> Result<(), FsError> {
        let removed = self.polled.lock().remove(id);
        removed.map(drop).ok_or_else(|| FsError::WatcherNotFound(id.to_owned()))
    }
}

fn check(path: &Path, options: WatchOptions) -> Result<(), FsError> {
    let meta = fs::metadata(path).map_err(|error| {
        let error = PathError::io("stat", path, &error);
        match error.errno {
            Errno::ENOENT => FsError::WatchNotFound { error },
            _ => FsError::WatchStat { error },
        }
    })?;
    if !meta.is_dir() {
        return Err(FsError::WatchNotDirectory(path.to_owned()));
    }
    if options.allow_network_mounts {
        return Ok(());
    }
    let mount =
        statfs(path).map_err(|errno| FsError::WatchMount(PathError::new("statfs", path, errno)))?;
    if NETWORK.contains(&i128::from(mount.filesystem_type().0)) {
        return Err(FsError::WatchNetwork(path.to_owned()));
    }
    Ok(())
}

/// `w` and 20 characters that nobody can guess.
fn new_id() -> Result<String, FsError> {
    const LETTERS: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    let source = PathBuf::from("/dev/urandom");
    let mut random = [0_u8; 20];
    File::open(&source)
        .and_then(|mut file| file.read_exact(&mut random))
        .map_err(|error| FsError::WatchStart(PathError::io("read", &source, &error).to_string()))?;
    let letters = random.iter().filter_map(|byte| LETTERS.get(usize::from(*byte) % LETTERS.len()));
    Ok(std::iter::once('w').chain(letters.map(|letter| char::from(*letter))).collect())
}
