//! Who writes which file, so that several uploads to one never mix.

use std::{collections::HashMap, fs::File, path::Path, sync::Arc};

use parking_lot::{Mutex, MutexGuard};

use super::body::Body;
use crate::fs::{resolve::Place, watch::Hub};

/// Device and inode.
pub(in crate::fs) type Key = (u64, u64);

/// The files that are being written. It holds one entry a file, and that only while there is a
/// [`Writer`](super::Writer) of it.
#[derive(Debug, Default)]
pub struct Writers {
    pub(super) state: Mutex<Known>,
    /// Who may watch a file that is replaced; nobody in tests.
    watches: Option<Arc<Hub>>,
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
pub(in crate::fs) struct Shared {
    pub(super) writers: usize,
    /// Some have finished.
    pub(super) finished: bool,
    /// Where a file is that was created by a writer and has been finished by none.
    pub(super) fresh: Option<Arc<Place>>,
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

    /// As [`Self::new`], where `watches` has watchers to whom a file that is replaced by another
    /// would not look as E2B's clients expect it.
    pub fn beside(watches: Arc<Hub>) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), watches: Some(watches) })
    }

    /// Whether changes in a directory are told to a client.
    pub(super) fn is_watched(&self, dir: &Path) -> bool {
        self.watches.as_ref().is_some_and(|watches| watches.covers(dir))
    }

    /// How many files are being written.
    pub fn live(&self) -> usize {
        self.state.lock().live
    }

    pub(in crate::fs) fn join(self: &Arc<Self>, key: Key) -> Membership {
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
pub(in crate::fs) struct Membership {
    pub(super) writers: Arc<Writers>,
    pub(super) key: Key,
    pub(super) shared: Arc<Mutex<Shared>>,
}

impl Membership {
    /// Keeps the others from the file, and waits for who has it.
    pub(in crate::fs) fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock()
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        let mut shared = self.shared.lock();
        shared.writers -= 1;
        // Under the lock: who opens the file now looks, once they have joined, whether it is there.
        if shared.writers == 0
            && let Some(place) = shared.fresh.take()
            // Only what is still ours: somebody may have put another file there.
            && let Err(error) = place.unlink_if(self.key)
        {
            tracing::warn!(path = %place.real().display(), %error, "could not remove partial file");
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
