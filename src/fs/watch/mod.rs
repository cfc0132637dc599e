//! Watching directories.
//!
//! One inotify instance serves the whole daemon, whatever the number of watchers: the kernel
//! allows a user 128. Its thread (`thread`) owns the table of who watches what (`tree`), adds
//! directories to it in slices (`adopt`), turns the kernel's events into theirs (`events`), compares
//! all files after an overflow (`rescan`, with what it knew: `known`), and looks at directories for
//! which the kernel has no watch left (`unwatched`). Network file systems, of which the kernel tells
//! nothing, are looked at by turns (`network`). Watchers have a bounded queue each (`queue`), which
//! merges what it has no room for (`changes`).
//!
//! What holds for every watcher: it is set when it is returned, and every later change is told; a
//! recursive one tells a CREATE for everything in a directory that appears, once; nothing that
//! happens in the file system ends it, only its owner does. Where changes cannot be told one by one,
//! the difference is told, and whoever asks for it ([`WatchOptions::cursors`]) hears that it is one.
//!
//! Watchers belong to a stream ([`Hub::watch`]), or are asked for their events (`polled`), or go on
//! while their stream is away (`cursor`).

mod adopt;
mod bounded;
mod changes;
mod covered;
mod cursor;
mod events;
mod known;
mod network;
mod place;
mod polled;
mod queue;
mod rescan;
#[cfg(test)]
mod tests;
mod thread;
mod tree;
mod unwatched;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::errno::Errno;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, oneshot};

pub use self::{
    adopt::{MAX_WATCHED_DIRS, SLICE_NAMES},
    bounded::GIVE_UP,
    changes::MAX_MERGED_NAMES,
    cursor::{DEFAULT_CURSOR_RETENTION, Follower, MAX_CURSOR_WATCHES, TakenOver},
    events::MAX_EVENTS_AT_ONCE,
    known::MAX_KNOWN_NAMES,
    network::{MAX_NETWORK_NAMES, MAX_NETWORK_WATCHERS, NETWORK_INTERVAL},
    polled::{DEFAULT_WATCHER_EXPIRY, MAX_POLLED_WATCHERS},
    queue::{Item, MAX_KEPT_EVENTS, MAX_QUEUED_EVENTS, Told},
    unwatched::{MAX_UNWATCHED_DIRS, UNWATCHED_INTERVAL},
};
use self::{
    covered::{Cover, Covered},
    cursor::Cursors,
    network::{Poller, Polling},
    polled::Polled,
    queue::{Next, Queue},
    thread::{Command, Shared},
};
use super::{FsError, PathError, actor::Actor, entry::Entry, path, resolve::Walk};
use crate::{blocking::Pool, guest::users::Users, sys::path_fd};

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
    /// Watch on network file systems too, by looking at them every [`NETWORK_INTERVAL`].
    pub allow_network_mounts: bool,
    /// Tell rescans, and all that is in a directory that was moved inside the tree, and keep what was
    /// told so that it can be told again.
    pub cursors: bool,
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
    pub entry: Option<Box<Entry>>,
}

/// Changes were not seen one by one: what differs is told instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rescan {
    /// Why.
    pub reason: RescanReason,
    /// Whether the events that follow tell all that was missed.
    pub complete: bool,
}

/// Why changes were not seen one by one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RescanReason {
    /// The kernel's queue overflowed.
    KernelQueue,
    /// No watch is left for some directories.
    WatchLimit,
    /// The watcher did not take its events in time.
    SlowClient,
    /// What the watcher wants to go on from is not kept any more.
    CursorExpired,
}

/// How long watchers are kept that nobody listens to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// A polled watcher that is not polled.
    pub polled: Duration,
    /// A watcher with cursors whose stream has ended.
    pub cursors: Duration,
}

impl Default for Retention {
    fn default() -> Self {
        Self { polled: DEFAULT_WATCHER_EXPIRY, cursors: DEFAULT_CURSOR_RETENTION }
    }
}

/// All watching of the daemon.
#[derive(Debug)]
pub struct Hub {
    shared: Arc<Shared>,
    covered: Arc<Covered>,
    users: Arc<Users>,
    files: Arc<Pool>,
    network: Arc<Semaphore>,
    retention: Retention,
    polled: Mutex<HashMap<String, Polled>>,
    cursors: Cursors,
}

/// One watch; dropping it ends it.
#[derive(Debug)]
pub struct Watcher {
    source: Source,
    queue: Arc<Queue>,
    _cover: Option<Cover>,
    files: Arc<Pool>,
}

/// Who fills a watcher's queue.
#[derive(Debug)]
enum Source {
    Kernel { id: u64, shared: Arc<Shared> },
    Network(Polling),
}

impl Watcher {
    /// What is next. None only when the watching thread has failed, which is logged.
    pub async fn next(&self) -> Option<Told> {
        loop {
            match self.queue.next().await {
                Next::Item(told) => return Some(told),
                Next::End => return None,
                Next::Merged => {
                    match &self.source {
                        Source::Kernel { id, shared } => shared.send(Command::Refill(*id)),
                        Source::Network(polling) => polling.refill(&self.files).await,
                    }
                    self.queue.news().await;
                }
            }
        }
    }

    /// Everything that happened before this call, and perhaps some of what happens during it.
    ///
    /// # Errors
    /// [`FsError::Blocking`].
    async fn take(&self) -> Result<Vec<Told>, FsError> {
        // At most as often as there are merged names to be taken.
        const ROUNDS: usize = MAX_MERGED_NAMES / MAX_QUEUED_EVENTS + 2;
        let mut all = Vec::new();
        for _ in 0..ROUNDS {
            match &self.source {
                Source::Kernel { id, shared } => {
                    let (done, flushed) = oneshot::channel();
                    shared.send(Command::Flush(*id, done));
                    // An error says that there is no thread, and so nothing to wait for.
                    let _ = flushed.await;
                }
                Source::Network(polling) => polling.flush(&self.files).await?,
            }
            let (told, more) = self.queue.take_all();
            all.extend(told);
            if !more {
                break;
            }
        }
        Ok(all)
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        if let Source::Kernel { id, shared } = &self.source {
            shared.send(Command::Remove(*id));
        }
    }
}

impl Hub {
    /// A hub without watchers: nothing runs yet. Paths are looked at on `files`.
    pub fn new(users: Arc<Users>, files: Arc<Pool>, retention: Retention) -> Arc<Self> {
        Arc::new(Self {
            shared: Arc::new(Shared::new(Arc::clone(&users))),
            covered: Arc::default(),
            users,
            files,
            network: Arc::new(Semaphore::new(MAX_NETWORK_WATCHERS)),
            retention,
            polled: Mutex::default(),
            cursors: Cursors::default(),
        })
    }

    /// Whether a change in `dir` is told to a watcher. It may block.
    pub fn covers(&self, dir: &Path) -> bool {
        self.covered.has(dir)
    }

    /// Watches a directory on behalf of `actor`. When this returns, the watch is set.
    ///
    /// # Errors
    /// The `Watch*` errors of [`FsError`], [`FsError::TooManyDirectories`] and
    /// [`FsError::TooManyNetworkWatchers`].
    pub async fn watch(
        &self,
        path: &Path,
        actor: &Actor,
        options: WatchOptions,
    ) -> Result<Watcher, FsError> {
        let (asked, actor) = (path.to_owned(), actor.clone());
        // A network mount can take its time to answer; neither an async worker nor the watching
        // thread, which serves everyone, shall wait for it.
        let check = move || check(&asked, &actor, options).map(|network| (asked, actor, network));
        let (asked, actor, network) = self.files.run(check).await??;
        // As upstream: entries show what is below the cleaned path, so that it is what is watched.
        let path = path::clean(&asked);
        let queue = Arc::new(Queue::new(options));
        let files = Arc::clone(&self.files);
        if network {
            let (users, theirs) = (Arc::clone(&self.users), Arc::clone(&queue));
            let polling =
                Poller::start((path, actor), options, users, theirs, &files, &self.network).await?;
            return Ok(Watcher { source: Source::Network(polling), queue, files, _cover: None });
        }
        // Before the command is sent: if this future is dropped, the watch goes with it.
        let (id, shared) = (self.shared.next_id(), Arc::clone(&self.shared));
        let cover = Some(self.covered.add(id, &path, options.recursive));
        let source = Source::Kernel { id, shared };
        let watcher = Watcher { source, queue: Arc::clone(&queue), files, _cover: cover };
        let (done, added) = oneshot::channel();
        let root = path.clone();
        self.shared.send_or_start(Command::Add { id, path, actor, options, queue, done })?;
        match added.await {
            Ok(Ok(())) => Ok(watcher),
            Ok(Err(FsError::WatchAdd { path, errno })) if path == root => {
                Err(FsError::WatchAdd { path: asked, errno })
            }
            Ok(Err(error)) => Err(error),
            Err(_) => Err(FsError::WatchStart("the watching thread has ended".to_owned())),
        }
    }
}

/// Whether the path can be watched, and is on a network file system.
fn check(path: &Path, actor: &Actor, options: WatchOptions) -> Result<bool, FsError> {
    let failed = |errno| {
        let error = PathError::new("stat", path, errno);
        match errno {
            Errno::ENOENT => FsError::WatchNotFound { error },
            _ => FsError::WatchStat { error },
        }
    };
    let place = Walk::new(actor).to(path);
    let place = place.map_err(|error| error.or_busy(|error| failed(error.errno)))?;
    let found = place.found().ok_or_else(|| failed(Errno::ENOENT))?;
    if !found.is_dir() {
        return Err(FsError::WatchNotDirectory(path.to_owned()));
    }
    let kind = match path_fd::fs_type(&found.fd) {
        Ok(kind) => kind,
        Err(_) if options.allow_network_mounts => return Ok(false),
        Err(errno) => return Err(FsError::WatchMount(PathError::new("statfs", path, errno))),
    };
    let network = NETWORK.contains(&i128::from(kind.0));
    if network && !options.allow_network_mounts {
        return Err(FsError::WatchNetwork(path.to_owned()));
    }
    Ok(network)
}

/// A name as clients are told it: the directory itself is `.`.
fn shown(rel: &Path) -> String {
    match rel.as_os_str().is_empty() {
        true => ".".to_owned(),
        false => rel.to_string_lossy().into_owned(),
    }
}

/// The path of a name below a directory, without a slash for the directory itself.
fn below(root: &Path, rel: &Path) -> PathBuf {
    if rel.as_os_str().is_empty() { root.to_owned() } else { root.join(rel) }
}
