//! Who writes which file, so that several uploads to one never mix.

use std::{
    collections::HashMap,
    fs::{self, File, Metadata},
    io,
    os::unix::fs::MetadataExt,
    path::PathBuf,
    sync::Arc,
};

use parking_lot::Mutex;

use super::body::Body;

/// Device and inode.
pub(super) type Key = (u64, u64);

/// The files that are being written. It holds one entry a file, and that only while there is a
/// [`Writer`] of it.
#[derive(Debug, Default)]
pub struct Writers {
    pub(super) state: Mutex<Known>,
}

#[derive(Debug, Default)]
pub(super) struct Known {
    /// The writers, of whatever kind, and of files not yet open.
    live: usize,
    pub(super) files: HashMap<Key, (usize, Arc<Mutex<Shared>>)>,
}

/// What the writers of one file share. Its lock is held while the file is written, which may block:
/// the lock of [`Writers`] is not.
#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) writers: usize,
    /// Some have finished.
    pub(super) finished: bool,
    /// The path of a file that was created by a writer and has been finished by none.
    pub(super) fresh: Option<PathBuf>,
    /// The file of the writer that writes in place.
    pub(super) creator: Option<Arc<File>>,
    /// What that one had written when another replaced it.
    pub(super) saved: Option<Body>,
}

impl Writers {
    /// Nobody writes yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// How many files are being written.
    pub fn live(&self) -> usize {
        self.state.lock().live
    }

    pub(super) fn join(self: &Arc<Self>, key: Key) -> Membership {
        let shared = {
            let mut state = self.state.lock();
            let (members, shared) = state.files.entry(key).or_default();
            *members += 1;
            Arc::clone(shared)
        };
        shared.lock().writers += 1;
        Membership { writers: Arc::clone(self), key, shared }
    }
}

/// A writer that counts, from before it has touched the disk until it has left it in order.
#[derive(Debug)]
pub(super) struct Live(Arc<Writers>);

impl Live {
    pub(super) fn new(writers: &Arc<Writers>) -> Self {
        writers.state.lock().live += 1;
        Self(Arc::clone(writers))
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.0.state.lock().live -= 1;
    }
}

/// A writer's share in its file. Dropped, it unlinks a new file that nobody has finished, if it is
/// the last.
#[derive(Debug)]
pub(super) struct Membership {
    pub(super) writers: Arc<Writers>,
    key: Key,
    pub(super) shared: Arc<Mutex<Shared>>,
}

impl Drop for Membership {
    fn drop(&mut self) {
        let mut shared = self.shared.lock();
        shared.writers -= 1;
        // Under the lock: who opens the file now looks, once they have joined, whether it is there.
        if shared.writers == 0
            && let Some(path) = shared.fresh.take()
            // Only what is still ours: somebody may have put another file there.
            && leads_to(fs::symlink_metadata(&path), self.key)
            && let Err(error) = fs::remove_file(&path)
        {
            tracing::warn!(path = %path.display(), %error, "half a file stays");
        }
        drop(shared);
        let mut state = self.writers.state.lock();
        if let Some((members, _)) = state.files.get_mut(&self.key) {
            *members -= 1;
            if *members == 0 {
                state.files.remove(&self.key);
            }
        }
    }
}

pub(super) fn leads_to(found: io::Result<Metadata>, key: Key) -> bool {
    found.is_ok_and(|meta| (meta.dev(), meta.ino()) == key)
}
