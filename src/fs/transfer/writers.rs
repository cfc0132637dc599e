//! Who writes which file, so that several uploads to one never mix.

use std::{collections::HashMap, path::Path, sync::Arc};

use parking_lot::{Mutex, MutexGuard};

use crate::fs::watch::Hub;

/// Device and inode.
pub(in crate::fs) type Key = (u64, u64);

/// The files whose content is being replaced. It holds one entry a file, and that only while somebody
/// does it.
#[derive(Debug, Default)]
pub struct Writers {
    pub(super) state: Mutex<Known>,
    /// Who may watch a file that is replaced; nobody in tests.
    watches: Option<Arc<Hub>>,
}

#[derive(Debug, Default)]
pub(super) struct Known {
    /// The uploads under way, of whatever kind, and of files not yet open.
    live: usize,
    /// How many have joined, and their lock. It is held while the file is written, which may block:
    /// the lock of [`Writers`] is not.
    pub(super) files: HashMap<Key, (usize, Arc<Mutex<()>>)>,
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

    /// Takes part in replacing the content of a file.
    pub(in crate::fs) fn join(self: &Arc<Self>, key: Key) -> Membership {
        let mut state = self.state.lock();
        let (members, lock) = state.files.entry(key).or_default();
        *members += 1;
        let lock = Arc::clone(lock);
        drop(state);
        Membership { writers: Arc::clone(self), key, lock }
    }
}

/// An upload that counts, from before it has touched the disk until it has left it in order.
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

/// A writer's share in a file.
#[derive(Debug)]
pub(in crate::fs) struct Membership {
    writers: Arc<Writers>,
    pub(super) key: Key,
    lock: Arc<Mutex<()>>,
}

impl Membership {
    /// Keeps the others from the file, and waits for who has it.
    pub(in crate::fs) fn lock(&self) -> MutexGuard<'_, ()> {
        self.lock.lock()
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        let mut state = self.writers.state.lock();
        if let Some((members, _)) = state.files.get_mut(&self.key) {
            *members -= 1;
            if *members == 0 {
                state.files.remove(&self.key);
            }
        }
    }
}
